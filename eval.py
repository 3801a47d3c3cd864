"""Avg@K and pass@k of a model on maths problems, every response kept.

    Avg@K   mean over questions of (correct of K) / K: the unbiased accuracy of
            one sample
    pass@k  mean over questions of 1 - C(n-c, k) / C(n, k): at least one of k
            samples right, unbiased from n >= k (arXiv 2107.03374)

    python eval.py --model qwen3-4b --data aime24 --samples 32
    python eval.py --model out/run/step_000300 --data math500,my.jsonl
    torchrun --nproc-per-node 8 eval.py ...     questions shared over 8 GPUs

A difference of a few points on 30 questions is noise: the standard error over
questions is printed beside every average.

The folder (--out) holds results.json and samples.jsonl. Nothing in it is lost:
another set is added to those that are there, a set that is there is not sampled
again, and the same command after a kill goes on where it was. A folder belongs
to one model and one way of sampling; others are refused.
"""

import argparse
import hashlib
import json
import time
from collections import Counter
from contextlib import nullcontext
from itertools import chain, islice
from math import comb
from os import fsync
from pathlib import Path
from statistics import fmean, stdev

import torch

import verify
from plumbing import checkpoint, download, parallel
from plumbing.cli import Parser, amount, guarded, natural, pick_device, seed
from plumbing.data import DataError, fingerprint, load_problems
from plumbing.hendrycks import hendrycks
from plumbing.hub import load_model, read_config, resolve
from plumbing.parallel import on_rank_0
from plumbing.rows import each_row, printable, read_json
from plumbing.runs import folder_name
from plumbing.tokenizer import SYSTEM, load_tokenizer
from rollout import Sampler
from verify import Verdict

# --------------------------------------------------------------------------------------------------
# what Avg@K and pass@k are: of K samples to each of N questions


def avg_at_k(correct) -> float:
    """Mean accuracy of one sample, from correct [N,K] of 0 and 1."""
    correct = torch.as_tensor(correct, dtype=torch.float64)
    if correct.dim() != 2 or not correct.numel():
        raise ValueError(f"correct must be [questions, samples], not {list(correct.shape)}")
    return correct.mean().item()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples drawn from n, of which c are correct, hold a correct one:
    1 - C(n-c, k) / C(n, k)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n} c={c} k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def scores(groups: list[list[dict]]) -> dict:
    """Avg@K with its standard error over questions, pass@k for powers of two up to K, lengths and
    reasons, of the rows of samples.jsonl: K in each of N groups."""
    rows = list(chain(*groups))
    correct = [[int(row["reward"]) for row in group] for group in groups]  # [N,K]
    N, K = len(groups), len(groups[0])
    passes = {}
    for k in (2**i for i in range(K.bit_length())):
        passes[f"pass@{k}"] = fmean(pass_at_k(K, sum(question), k) for question in correct)
    return {
        "questions": N,
        "samples": K,
        "avg@k": avg_at_k(correct),
        "avg@k_stderr": stdev(map(fmean, correct)) / N**0.5 if N > 1 else None,
        **passes,
        "mean_length": fmean(len(row["ids"]) for row in rows),
        "truncated": fmean(row["finish_reason"] != "stop" for row in rows),
        "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
    }


def line_of(name, score) -> str:
    """The scores of a set, for a person."""
    error = "" if score["avg@k_stderr"] is None else " +- {avg@k_stderr:.3f}"
    passes = "  ".join(f"{k} {v:.3f}" for k, v in score.items() if k.startswith("pass@"))
    line = (
        "Avg@{samples} {avg@k:.3f}" + error + "  {passes}  ({questions} questions, "
        "{dropped_prompts} dropped, length {mean_length:.0f}, truncated {truncated:.0%}, "
        "{seconds:.0f} s)"
    )
    return f"{name}: {line.format(passes=passes, **score)}"


# --------------------------------------------------------------------------------------------------
# prompts and grading; train.py does it with these functions too


def encode_prompts(tokenizer, problems, max_prompt_tokens, system=SYSTEM, thinking=False):
    """(problem, prompt ids) of every problem whose prompt fits, and how many did not: a prompt is
    dropped, never cut."""
    pairs = [(p, tokenizer.chat(p.question, system=system, thinking=thinking)) for p in problems]
    kept = [(p, ids) for p, ids in pairs if len(ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"every prompt is longer than {max_prompt_tokens} tokens: raise --max-prompt-tokens"
        )
    return kept, len(pairs) - len(kept)


def grade(response, problem, tokenizer, verifier="nanobupo"):
    """Decode a response to a problem and judge it: reward 1 or 0."""
    ids = response.ids[:-1] if response.stopped else response.ids
    response.problem, response.text = problem, tokenizer.decode(ids)
    response.verdict = judge(response.text, problem.answer, verifier)
    response.reward = float(response.verdict.correct)


def judge(text, gold, verifier) -> Verdict:
    """Whether a response is right: by verify.py, or by the string equality of the reference."""
    if verifier == "nanobupo":
        return verify.grade(text, gold)
    correct = hendrycks(text, gold)
    return Verdict(correct, None, "equal: hendrycks" if correct else "different")


def sample_row(response, **extra) -> dict:
    """The line of samples.jsonl."""
    verdict = response.verdict
    return {
        **extra,
        "question": response.problem.question,
        "answer": response.problem.answer,
        "response": response.text,
        "extracted": verdict.extracted,
        "reward": response.reward,
        "reason": verdict.reason,
        "finish_reason": "stop" if response.stopped else "length",
        "prompt_ids": response.prompt,
        "ids": response.ids,
    }


# --------------------------------------------------------------------------------------------------
# a set of problems. Its rows go to a file of its own, `part`, as they come

ROUNDS = 32  # times that the slots are filled between two looks at the disk


def evaluate(sampler, tokenizer, name, prompts, args, part):
    """The rows of K responses to each prompt of a set, K in a group, kept in `part` as they come;
    those that are there already are not sampled again. Ranks share the questions of each piece."""
    groups = on_rank_0(sampled, part, prompts, args.samples)
    at_once = max(1, ROUNDS * sampler.slots * parallel.world() // args.samples)
    for first in range(len(groups), len(prompts), at_once):
        piece = prompts[first : first + at_once]
        local = parallel.local_slice(len(piece))
        responses = sampler.generate(
            [ids for _, ids in piece[local]],
            args.samples,
            args.max_new_tokens,
            args.temperature,
            tokenizer.stop_ids,
            args.seed,
            n_vocab=min(tokenizer.n_vocab, sampler.model.config.vocab_size),
            progress=f"{name}, from question {first + 1} of {len(prompts)}",
            first=first + local.start,
        )
        rows = []
        for (problem, _), group in zip(piece[local], responses, strict=True):
            for response in group:
                grade(response, problem, tokenizer, args.verifier)
            about = {"set": name, "id": problem.id}
            rows.append([sample_row(r, **about, sample=k) for k, r in enumerate(group)])
        rows = parallel.all_gather(rows)
        on_rank_0(keep, part, rows)
        if not first:
            prompt, response = tokenizer.decode(prompts[0][1]), rows[0][0]["response"]
            say(f"first prompt:\n{prompt}\nfirst response:\n{response}\n")
        groups += rows
    return groups


def encoded(row) -> bytes:
    """A line of samples.jsonl. What UTF-8 cannot hold (half of a pair, out of a path) is an escape
    of JSON's own."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def keep(part, groups):
    """Add rows to a set's own file."""
    with open(part, "ab") as f:
        f.writelines(map(encoded, chain(*groups)))


def sampled(part, prompts, n) -> list[list[dict]]:
    """The groups of n rows that a killed run left in `part`, whole ones from the first prompt on;
    what stands behind them, such as a torn line, is cut off."""
    rows, groups = each_row(part), []
    for problem, _ in prompts:
        group = [row for row in islice(rows, n) if row]
        found = [(row.get("id"), row.get("sample")) for row in group]
        if found != [(problem.id, k) for k in range(n)]:
            break
        groups.append(group)
    if part.exists():
        replace(part, map(encoded, chain(*groups)))
    return groups


def say(text):
    """Print a line, what would act on a terminal as escapes."""
    print(printable(text), flush=True)


# --------------------------------------------------------------------------------------------------
# the folder. When all rows of a set are there, its own file joins samples.jsonl, and then its
# scores join results.json. Both are replaced by a renaming: a kill at any moment leaves what was
# there, and the rows sampled since

# what the scores depend on: sets that differ in one of these do not share a folder
SETTINGS = """model samples temperature max_new_tokens max_prompt_tokens system thinking
    format verifier dtype seed""".split()


def identity(folder) -> str:
    """SHA-256 (hex) that tells models apart: of the files that make one, weights by their size and
    by 256 pieces of 4 KB each. A step of training changes weights everywhere."""
    digest = hashlib.sha256()
    for name in "config generation_config tokenizer tokenizer_config".split():
        path = Path(folder) / f"{name}.json"
        digest.update(path.read_bytes() if path.is_file() else b"none")
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(256):
                f.seek(i * max(0, size - 4096) // 255)
                digest.update(f.read(4096))
    return digest.hexdigest()


def earlier(out, settings, questions, fresh) -> dict:
    """The results.json of a folder, or a new one with these settings.

    questions: {set: SHA-256 of its problems} of the sets asked for. Raises ValueError, in one line
    that says what differs, when the folder holds something else: results of other settings, or of
    other questions under the name of one of these sets.
    """
    path = out / "results.json"
    if not path.exists() and not (out / "samples.jsonl").exists():
        return {**settings, "sets": {}}
    try:
        old = read_json(path)
        for name, score in old["sets"].items():
            line_of(name, score)  # what can be told in a line is a score
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError):
        raise ValueError(f"{out} holds files not of eval.py: name another --out") from None
    if changed := differences(old, settings):
        raise ValueError(f"{out} holds other results ({'; '.join(changed)}): name another --out")
    for name, sha256 in questions.items():
        score = old["sets"].get(name)
        if score and score.get("data_sha256") != sha256 and not fresh:
            raise ValueError(
                f"{out} holds {name} with other questions ({score['questions']} of them, "
                f"--limit {score.get('limit')}): name another --out, or replace it by --fresh"
            )
    return old


def differences(old, new) -> list[str]:
    """The settings of a results.json that are not those of this run, in words."""
    if old.get("model_sha256") == new["model_sha256"]:
        old = {**old, "model": new["model"]}  # the same files in another place are the same model
    elif old.get("model") == new["model"]:
        return [f"the files of {new['model']} have changed since"]
    changed = []
    for name in SETTINGS:
        there, now = old.get(name), new[name]
        if there != now:
            changed.append(f"--{name.replace('_', '-')} {there!r:.100} there, {now!r:.100} now")
    return changed


def replace(path, lines):
    """Write a file anew, whole or not at all."""
    new = path.with_name(f".new-{path.name}")
    with open(new, "wb") as f:
        f.writelines(lines)
        f.flush()
        fsync(f.fileno())
    new.replace(path)


def save_results(out, results):
    replace(out / "results.json", [json.dumps(results, indent=1).encode() + b"\n"])


def finish(out, part, name, results):
    """A set is complete: its rows, in the place of earlier ones of that set, then its scores, and
    only then its own file goes."""
    samples = out / "samples.jsonl"
    others = (row for row in each_row(samples) if row and row.get("set") != name)
    replace(samples, map(encoded, chain(others, each_row(part))))
    save_results(out, results)
    part.unlink()


# --------------------------------------------------------------------------------------------------
# the flags


def names(text):
    """argparse type: names with commas, none twice."""
    out = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not out:
        raise argparse.ArgumentTypeError("names no set: give a named set or a file")
    return out


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)

    def add(name, default, help, **more):
        if default is not None and "action" not in more:
            help += f" (default {default})"
        p.add_argument(name, default=default, help=help, **more)

    several = "named set, .json/.jsonl/.parquet file, or several with commas"
    slots = "responses decoded together (default: the sampler's choice, on a GPU what fits)"
    dtypes = ("float32", "bfloat16")
    verifiers = ("nanobupo", "hendrycks")
    switch = argparse.BooleanOptionalAction
    add("--model", None, "folder, preset (qwen3-4b) or hub id", required=True)
    add("--revision", None, "branch, tag or commit of a model on the hub")
    add("--data", None, several, type=names, required=True)
    add("--samples", 1, "responses to each question, K; tables on AIME use 32", type=natural)
    add("--limit", None, "only the first so many questions of each set", type=natural)
    add("--temperature", 1.0, "0 is greedy", type=amount)
    add("--max-new-tokens", 3072, "response tokens at most", type=natural)
    add("--max-prompt-tokens", 1024, "longer prompts are dropped and counted", type=natural)
    add("--system", SYSTEM, "system prompt")
    add("--thinking", False, "Qwen3: leave thinking on, unlike the paper", action="store_true")
    add("--format", "auto", "prompt format: auto, chatml, llama3, base")
    add("--verifier", "nanobupo", "hendrycks: the reference's string equality", choices=verifiers)
    add("--slots", None, slots, type=natural)
    add("--compile", None, "compile the decode step (default: on a GPU)", action=switch)
    add("--dtype", None, "weights (default: bfloat16 on a GPU, else float32)", choices=dtypes)
    add("--device", "auto", "auto, cpu, cuda")
    add("--seed", 0, "of sampling", type=seed)
    add("--fresh", False, "sample the named sets again, and replace them", action="store_true")
    add("--out", None, "folder (default out/eval-MODEL, with the run of a step_000300 before it)")
    return p.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# main


def tokens_a_row(prompts, args, config) -> int:
    """Tokens that the longest prompt and its response take; ValueError for more than the model was
    made for."""
    longest = max(len(ids) for pairs, _ in prompts.values() for _, ids in pairs)
    room = config.max_len - longest
    if args.max_new_tokens <= room:
        return longest + args.max_new_tokens
    advice = f"--max-new-tokens, to at most {room}" if room > 0 else "--max-prompt-tokens"
    raise ValueError(
        f"the longest prompt, {longest} tokens, and --max-new-tokens {args.max_new_tokens} exceed "
        f"the {config.max_len} tokens this model was made for: lower {advice}"
    )


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    on_gpu = device.startswith("cuda")
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    problems = {name: load_problems(name, limit=args.limit) for name in args.data}
    folder = resolve(args.model, args.revision)
    tokenizer = load_tokenizer(folder, args.format)
    limits = args.max_prompt_tokens, args.system, args.thinking
    prompts = {name: encode_prompts(tokenizer, p, *limits) for name, p in problems.items()}
    max_len = tokens_a_row(prompts, args, read_config(read_json(folder / "config.json")))
    vars(args).update(dtype=str(dtype), format=tokenizer.format)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["model_sha256"] = on_rank_0(identity, folder)

    out = Path(args.out or f"out/eval-{folder_name(args.model)}")
    with nullcontext() if parallel.rank() else checkpoint.lock(out):
        questions = {name: fingerprint(p) for name, p in problems.items()}
        results = on_rank_0(earlier, out, settings, questions, args.fresh)
        sets, sampler = results["sets"], None
        for name, (pairs, dropped) in prompts.items():
            # rows of other settings, or of other questions, are never taken for this set's
            about = json.dumps([settings, name, questions[name]])
            digest = hashlib.sha256(about.encode()).hexdigest()
            part = out / f".samples-{digest[:16]}.jsonl"
            if name in sets or args.fresh:  # what a kill has left
                on_rank_0(part.unlink, missing_ok=True)
            if name in sets and not args.fresh:
                say(f"{line_of(name, sets[name])}: {out} has it")
                continue
            if not sampler:
                compiled = on_gpu if args.compile is None else args.compile
                model = load_model(folder, dtype, device)
                sampler = Sampler(model, args.slots, max_len, compile=compiled)
                sampler.allocate()
                on_rank_0(save_results, out, results)  # the folder is of these settings
            start = time.time()
            groups = evaluate(sampler, tokenizer, name, pairs, args, part)
            score = scores(groups) | {"dropped_prompts": dropped, "data_sha256": questions[name]}
            score |= {"device": device, "torch": torch.__version__, "limit": args.limit}
            score |= {"model_commit": download.commit(folder), "seconds": time.time() - start}
            sets[name] = score
            on_rank_0(finish, out, part, name, results)
            say(line_of(name, score))
    say(f"written: {out}/results.json and samples.jsonl")


if __name__ == "__main__":
    guarded(main)
