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
import os
import time
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch

import verify
from plumbing import checkpoint, download, parallel
from plumbing.cli import Parser, amount, guarded, natural, pick_device, seed, short_name
from plumbing.data import DataError, fingerprint, load_problems
from plumbing.hub import load_model, read_config, resolve
from plumbing.rows import each_row, parse_json, printable, read_json
from plumbing.tokenizer import SYSTEM, load_tokenizer
from rollout import Sampler
from verify import Verdict

# --------------------------------------------------------------------------------------------------
# scores


def avg_at_k(correct) -> float:
    """Mean accuracy of one sample, from correct [N,K] of 0 and 1: K samples to each of N
    questions."""
    correct = torch.as_tensor(correct, dtype=torch.float64)
    if correct.dim() != 2 or not correct.numel():
        raise ValueError(f"correct must be [questions, samples], not {list(correct.shape)}")
    return correct.mean().item()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples drawn from n, of which c are correct, hold a correct one:
    1 - C(n-c, k) / C(n, k), as a product."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n} c={c} k={k}")
    fail = 1.0
    for i in range(n - c + 1, n + 1):
        fail *= max(0.0, 1 - k / i)
    return 1 - fail


def scores(groups: list[list[dict]]) -> dict:
    """Avg@K with its standard error over questions, pass@k for powers of two up to K, lengths and
    reasons, of the rows of samples.jsonl: K in each of N groups."""
    correct = torch.tensor([[row["reward"] for row in group] for group in groups]).double()  # [N,K]
    N, K = correct.shape
    rows = [row for group in groups for row in group]
    out = {"questions": N, "samples": K, "avg@k": avg_at_k(correct), "avg@k_stderr": None}
    if N > 1:
        out["avg@k_stderr"] = (correct.mean(1).std() / N**0.5).item()
    for k in (2**i for i in range(K.bit_length())):
        out[f"pass@{k}"] = sum(pass_at_k(K, int(c), k) for c in correct.sum(1)) / N
    out["mean_length"] = sum(len(row["ids"]) for row in rows) / len(rows)
    out["truncated"] = sum(row["finish_reason"] != "stop" for row in rows) / len(rows)
    out["reasons"] = dict(Counter(row["reason"] for row in rows).most_common())
    return out


def line_of(name, score) -> str:
    """The scores of a set, for a person."""
    error = "" if score["avg@k_stderr"] is None else f" +- {score['avg@k_stderr']:.3f}"
    passes = "  ".join(f"{k} {v:.3f}" for k, v in score.items() if k.startswith("pass@"))
    return (
        f"{name}: Avg@{score['samples']} {score['avg@k']:.3f}{error}  {passes}  "
        f"({score['questions']} questions, {score['dropped_prompts']} dropped, "
        f"length {score['mean_length']:.0f}, truncated {score['truncated']:.0%}, "
        f"{score['seconds']:.0f} s)"
    )


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
    """Decode a response to a problem and judge it."""
    ids = response.ids[:-1] if response.stopped else response.ids
    response.problem, response.text = problem, tokenizer.decode(ids)
    response.verdict = judge(response.text, problem.answer, verifier)


def judge(text, gold, verifier) -> Verdict:
    if verifier == "nanobupo":
        return verify.grade(text, gold)
    correct = verify.hendrycks(text, gold)
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
        "reward": float(verdict.correct),
        "reason": verdict.reason,
        "finish_reason": "stop" if response.stopped else "length",
        "prompt_ids": response.prompt,
        "ids": response.ids,
    }


# --------------------------------------------------------------------------------------------------
# one set of problems. Its rows go to a file of its own, `part`, as they come

ROUNDS = 32  # times that the slots are filled between two looks at the disk


def evaluate(sampler, tokenizer, name, prompts, args, part):
    """The rows of K responses to each prompt of a set, K in a group, kept in `part` as they come;
    those that are there already are not sampled again."""
    groups = parallel.on_rank_0(sampled, part, prompts, args.samples)
    at_once = max(1, ROUNDS * sampler.slots * parallel.world() // args.samples)
    while len(groups) < len(prompts):
        first = len(groups)
        some = prompts[first : first + at_once]
        local = parallel.local_slice(len(some))
        responses = sampler.generate(
            [ids for _, ids in some[local]],
            args.samples,
            args.max_new_tokens,
            args.temperature,
            tokenizer.stop_ids,
            args.seed,
            n_vocab=min(tokenizer.n_vocab, sampler.model.config.vocab_size),
            progress=f"{name}, from question {first + 1} of {len(prompts)}",
            first=first + local.start,
        )
        new = []
        for group, (problem, _) in zip(responses, some[local], strict=True):
            for response in group:
                grade(response, problem, tokenizer, args.verifier)
            about = {"set": name, "id": problem.id}
            new.append([sample_row(r, **about, sample=k) for k, r in enumerate(group)])
        new = parallel.all_gather(new)
        parallel.on_rank_0(keep, part, new)
        if not first:
            prompt = tokenizer.decode(new[0][0]["prompt_ids"])
            say(f"first prompt:\n{prompt}\nfirst response:\n{new[0][0]['response']}\n")
        groups += new
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
    if not part.exists():
        return []
    groups, size = [], 0
    lines = part.read_bytes().split(b"\n")[:-1]  # behind the last newline is nothing, or torn
    for i, (problem, ids) in enumerate(prompts):
        group = lines[i * n : i * n + n]
        rows = [parse_json(line) for line in group]
        due = [{"id": problem.id, "sample": k, "prompt_ids": ids} for k in range(n)]
        if [isinstance(row, dict) and {key: row.get(key) for key in due[0]} for row in rows] != due:
            break
        groups.append(rows)
        size += sum(len(line) + 1 for line in group)
    os.truncate(part, size)
    return groups


def say(text):
    """Print a line, what would act on a terminal as escapes."""
    print(printable(text), flush=True)


# --------------------------------------------------------------------------------------------------
# the folder. When all rows of a set are there, its own file joins samples.jsonl, and then its
# scores join results.json. Both are replaced by a renaming: a kill at any moment leaves what was
# there, and the rows sampled since

# what the scores depend on: sets that differ in one of these do not share a folder
SETTINGS = """model_sha256 samples temperature max_new_tokens max_prompt_tokens system thinking
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


def default_folder(model) -> Path:
    """out/eval-MODEL, with the run before a checkpoint of it."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    name = short_name(path)
    if name == "warm-up" or name.startswith("step_"):
        name = f"{short_name(path.parent)}-{name}"
    return Path(f"out/eval-{name}")


def part_of(out, settings, name, data_sha256) -> Path:
    """The file for the rows of a set while it is sampled: those of other settings, or of other
    questions, are never taken for them."""
    digest = hashlib.sha256(json.dumps([settings, name, data_sha256]).encode()).hexdigest()
    return out / f".samples-{digest[:16]}.jsonl"


def earlier(out, settings, data, fresh) -> dict:
    """The results.json of a folder, or a new one with these settings.

    data: {set: SHA-256 of its questions} of the sets asked for. Raises ValueError, in one line that
    says what differs, when the folder holds something else: results of other settings, or of other
    questions under the name of one of these sets.
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
    for name, sha256 in data.items():
        score = old["sets"].get(name)
        if score and score.get("data_sha256") != sha256 and not fresh:
            raise ValueError(
                f"{out} holds {name} with other questions ({score['questions']} of them, "
                f"--limit {score.get('limit')}): name another --out, or replace it by --fresh"
            )
    return old


def differences(old, new) -> list[str]:
    """The settings of a results.json that are not those of this run, in words."""
    changed = []
    for name in SETTINGS:
        there, now = old.get(name), new[name]
        if there == now:
            continue
        if name == "model_sha256":  # the same files in another place are the same model
            name, there, now = "model", old.get("model"), new["model"]
        flag = f"--{name.replace('_', '-')}"
        changed.append(f"{flag} {there!r:.100} there, {now!r:.100} now")
        if there == now:
            changed[-1] = f"the files of {now} have changed since"
    return changed


def replace(path, lines):
    """Write a file anew, whole or not at all."""
    new = path.with_name(f".new-{path.name}")
    with open(new, "wb") as f:
        f.writelines(lines)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)


def save_results(out, results):
    replace(out / "results.json", [json.dumps(results, indent=1).encode() + b"\n"])


def begin(out, stale, results):
    """Remove the rows of sets that are complete or sampled again; record the settings that the
    folder belongs to."""
    for part in stale:
        part.unlink(missing_ok=True)
    save_results(out, results)


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
    out = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
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
    add(
        "--dtype", None, "of the weights (default: bfloat16 on a GPU, else float32)", choices=dtypes
    )
    add("--device", "auto", "auto, cpu, cuda")
    add("--seed", 0, "of sampling", type=seed)
    add("--fresh", False, "sample the sets again that the folder holds", action="store_true")
    add("--out", None, "folder (default out/eval-MODEL, with the run of a step_000300 before it)")
    return p.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# the command


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

    known = vars(args) | {"dtype": str(dtype), "format": tokenizer.format}
    known["model_sha256"] = parallel.on_rank_0(identity, folder)
    settings = {name: known[name] for name in ("model", *SETTINGS)}
    about = {"device": device, "torch": torch.__version__, "limit": args.limit}
    about["model_commit"] = download.commit(folder)
    data = {name: fingerprint(p) for name, p in problems.items()}
    out = Path(args.out or default_folder(args.model))
    parts = {name: part_of(out, settings, name, data[name]) for name in data}
    with nullcontext() if parallel.rank() else checkpoint.lock(out):
        results = parallel.on_rank_0(earlier, out, settings, data, args.fresh)
        done = [name for name in data if name in results["sets"] and not args.fresh]
        for name in done:
            say(f"{line_of(name, results['sets'][name])}: {out} has it")
        todo = [name for name in data if name not in done]
        if todo:
            model = load_model(folder, dtype, device)
            compiled = on_gpu if args.compile is None else args.compile
            sampler = Sampler(model, args.slots, max_len, compile=compiled)
            sampler.start()
        stale = parts if args.fresh else done
        parallel.on_rank_0(begin, out, [parts[name] for name in stale], results)
        for name in todo:
            start, (pairs, dropped) = time.time(), prompts[name]
            groups = evaluate(sampler, tokenizer, name, pairs, args, parts[name])
            score = {**scores(groups), "dropped_prompts": dropped, "data_sha256": data[name]}
            score |= {**about, "seconds": time.time() - start}
            results["sets"][name] = score
            parallel.on_rank_0(finish, out, parts[name], name, results)
            say(line_of(name, score))
    say(f"written: {out}/results.json and samples.jsonl")


if __name__ == "__main__":
    guarded(main)
