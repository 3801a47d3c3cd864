"""Avg@K and pass@k of a model on maths problems, every response kept.

    Avg@K   mean over questions of (correct of K) / K: the unbiased accuracy of one sample
    pass@k  mean over questions of 1 - C(n-c, k) / C(n, k): at least one of k samples right, unbiased from n >= k (arXiv 2107.03374)

    python eval.py --model qwen3-4b --data aime24 --samples 32
    python eval.py --model out/qwen3-4b/step_000300 --data math500.parquet,aime24 --samples 4 --limit 100
    torchrun --nproc-per-node 8 eval.py ...                                             questions shared out over 8 GPUs

A difference of a few points on 30 questions is noise: the standard error over questions is printed beside every average.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import parallel
import tokenizer as tokenizers
from cli import guarded, natural, pick_device, short_name
from data import DataError, Problem, fingerprint, load_problems
from model import load
from rollout import Sample, Sampler
from tokenizer import SYSTEM
from verify import Verdict, grade, hendrycks


def avg_at_k(correct) -> float:
    """Mean accuracy of one sample, from correct [N,K] of 0 and 1: K samples to each of N questions."""
    correct = torch.as_tensor(correct, dtype=torch.float64)
    if correct.dim() != 2 or not correct.numel():
        raise ValueError(f"correct must be [questions, samples], not {list(correct.shape)}")
    return correct.mean().item()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples drawn from n, of which c are correct, hold a correct one: 1 - C(n-c, k) / C(n, k), as a product."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n} c={c} k={k}")
    fail = 1.0
    for i in range(n - c + 1, n + 1):
        fail *= max(0.0, 1 - k / i)
    return 1 - fail


@dataclass
class Answered:
    """A problem's prompt, one sampled response to it and the verdict: one record, so that they cannot be mispaired."""

    problem: Problem
    prompt: list[int]
    sample: Sample
    text: str  # the response decoded, without its stop token
    verdict: Verdict

    def row(self, **extra) -> dict:
        """The line of samples.jsonl."""
        return {
            **extra,
            "question": self.problem.question,
            "answer": self.problem.answer,
            "response": self.text,
            "extracted": self.verdict.extracted,
            "reward": float(self.verdict.correct),
            "reason": self.verdict.reason,
            "finish_reason": "stop" if self.sample.stopped else "length",
            "prompt_ids": self.prompt,
            "ids": self.sample.ids,
        }


def encode_prompts(tokenizer, problems, max_prompt_tokens, system=SYSTEM, thinking=False):
    """(problem, prompt ids) of every problem whose prompt fits, and how many did not: a prompt is dropped, never cut."""
    pairs = [(p, tokenizer.chat(p.question, system=system, thinking=thinking)) for p in problems]
    kept = [(p, ids) for p, ids in pairs if len(ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"every prompt is longer than {max_prompt_tokens} tokens: raise --max-prompt-tokens"
        )
    return kept, len(pairs) - len(kept)


def answer(
    sampler,
    tokenizer,
    prompts,
    n,
    max_new_tokens,
    temperature=1.0,
    seed=0,
    verifier="nanobupo",
    progress=None,
):
    """Sample n responses to each (problem, prompt ids) of this rank's share and grade them: a list of n Answered for each, in order."""
    mine, out = parallel.share(len(prompts)), []
    groups = sampler.generate(
        [ids for _, ids in prompts[mine]],
        n,
        max_new_tokens,
        temperature,
        tokenizer.stop_ids,
        seed,
        n_vocab=min(tokenizer.n_vocab, sampler.model.config.vocab_size),
        progress=None if parallel.rank() else progress,
        first=mine.start,
    )
    for (problem, ids), samples in zip(prompts[mine], groups, strict=True):
        texts = [tokenizer.decode(s.ids[:-1] if s.stopped else s.ids) for s in samples]
        verdicts = [judge(text, problem.answer, verifier) for text in texts]
        out.append(
            [Answered(problem, ids, *rest) for rest in zip(samples, texts, verdicts, strict=True)]
        )
    return out


def judge(text, gold, verifier) -> Verdict:
    if verifier == "nanobupo":
        return grade(text, gold)
    correct = hendrycks(text, gold)
    return Verdict(correct, None, "equal: hendrycks" if correct else "different")


def scores(groups: list[list[Answered]]) -> dict:
    """Avg@K with its standard error over questions, pass@k for powers of two up to K, lengths and reasons."""
    correct = torch.tensor(
        [[a.verdict.correct for a in group] for group in groups], dtype=torch.float64
    )  # [N,K]
    N, K = correct.shape
    flat = [a for group in groups for a in group]
    ks = [2**i for i in range(K.bit_length()) if 2**i <= K]
    reasons: dict[str, int] = {}
    for a in flat:
        reasons[a.verdict.reason] = reasons.get(a.verdict.reason, 0) + 1
    return {
        "questions": N,
        "samples": K,
        "avg@k": avg_at_k(correct),
        "avg@k_stderr": (correct.mean(1).std() / N**0.5).item() if N > 1 else None,
        **{f"pass@{k}": sum(pass_at_k(K, int(c), k) for c in correct.sum(1)) / N for k in ks},
        "mean_length": sum(len(a.sample.ids) for a in flat) / len(flat),
        "truncated": sum(not a.sample.stopped for a in flat) / len(flat),
        "reasons": dict(sorted(reasons.items(), key=lambda kv: -kv[1])),
    }


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", required=True, help="folder, preset (qwen3-4b) or hub id")
    p.add_argument(
        "--data",
        required=True,
        help="named set, .json/.jsonl/.parquet file, or several with commas",
    )
    p.add_argument(
        "--samples",
        type=natural,
        default=1,
        help="responses to each question, K (default 1; tables on AIME use 32)",
    )
    p.add_argument("--limit", type=natural, help="only the first so many questions of each set")
    p.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    p.add_argument(
        "--max-new-tokens",
        type=natural,
        default=3072,
        help="response tokens at most (default 3072)",
    )
    p.add_argument(
        "--max-prompt-tokens",
        type=natural,
        default=1024,
        help="longer prompts are dropped and counted (default 1024)",
    )
    p.add_argument("--system", default=SYSTEM, help="system prompt (default: the paper's)")
    p.add_argument(
        "--thinking", action="store_true", help="Qwen3: leave thinking on (the paper turns it off)"
    )
    p.add_argument(
        "--format", default="auto", help="prompt format: auto, chatml, llama3, base (default auto)"
    )
    p.add_argument(
        "--verifier",
        choices=("nanobupo", "hendrycks"),
        default="nanobupo",
        help="hendrycks: the reference's string equality",
    )
    p.add_argument(
        "--slots", type=natural, default=64, help="responses decoded together (default 64)"
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: bfloat16 on cuda, float32 on cpu)",
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", help="folder for results.json and samples.jsonl (default out/eval-MODEL)"
    )
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    sets = {name: load_problems(name, limit=args.limit) for name in args.data.split(",") if name}
    model = load(args.model, dtype, device)
    tokenizer = tokenizers.load(model.folder, args.format)
    sampler = Sampler(model, args.slots, args.max_prompt_tokens + args.max_new_tokens)
    out = Path(args.out or f"out/eval-{short_name(args.model)}")
    if parallel.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    results = {
        **vars(args),
        "dtype": str(dtype),
        "device": device,
        "format": tokenizer.format,
        "torch": torch.__version__,
        "sets": {},
    }
    with open(
        os.devnull if parallel.rank() else out / "samples.jsonl", "w", encoding="utf-8"
    ) as samples:
        for name, problems in sets.items():
            start = time.time()
            prompts, dropped = encode_prompts(
                tokenizer, problems, args.max_prompt_tokens, args.system, args.thinking
            )
            groups = parallel.collect(
                answer(
                    sampler,
                    tokenizer,
                    prompts,
                    args.samples,
                    args.max_new_tokens,
                    args.temperature,
                    args.seed,
                    args.verifier,
                    progress=name,
                )
            )
            if not results["sets"]:
                print(
                    f"first prompt:\n{tokenizer.decode(groups[0][0].prompt)}\nfirst response:\n{groups[0][0].text}\n"
                )
            for group in groups:
                for k, a in enumerate(group):
                    samples.write(
                        json.dumps(a.row(set=name, id=a.problem.id, sample=k), ensure_ascii=False)
                        + "\n"
                    )
            seconds = time.time() - start
            score = {
                **scores(groups),
                "dropped_prompts": dropped,
                "data_sha256": fingerprint(problems),
                "seconds": seconds,
            }
            results["sets"][name] = score
            error = "" if score["avg@k_stderr"] is None else f" +- {score['avg@k_stderr']:.3f}"
            passes = "  ".join(f"{k} {v:.3f}" for k, v in score.items() if k.startswith("pass@"))
            print(
                f"{name}: Avg@{args.samples} {score['avg@k']:.3f}{error}  {passes}  ({score['questions']} questions, {dropped} dropped, "
                f"length {score['mean_length']:.0f}, truncated {score['truncated']:.0%}, {seconds:.0f} s)",
                flush=True,
            )
            if parallel.rank() == 0:
                (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {out}/results.json and samples.jsonl")


if __name__ == "__main__":
    guarded(main)
