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
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import verify
from decompose import folder_name
from plumbing import checkpoint, download, parallel
from plumbing import tokenizer as tokenizers
from plumbing.cli import guarded, natural, pick_device
from plumbing.data import DataError, fingerprint, load_problems
from plumbing.hub import load_model, read_config, resolve
from plumbing.rows import parse_json, printable, read_json
from plumbing.tokenizer import SYSTEM
from rollout import Sampler
from tools.plot import number
from verify import Verdict

# ----------------------------------------------------------------------------------------------
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
    ks = [2**i for i in range(K.bit_length()) if 2**i <= K]
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return {
        "questions": N,
        "samples": K,
        "avg@k": avg_at_k(correct),
        "avg@k_stderr": (correct.mean(1).std() / N**0.5).item() if N > 1 else None,
        **{f"pass@{k}": sum(pass_at_k(K, int(c), k) for c in correct.sum(1)) / N for k in ks},
        "mean_length": sum(len(row["ids"]) for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] != "stop" for row in rows) / len(rows),
        "reasons": dict(sorted(reasons.items(), key=lambda kv: -kv[1])),
    }


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


# ----------------------------------------------------------------------------------------------
# sampling and grading; train.py does it with these functions too


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


# ----------------------------------------------------------------------------------------------
# the flags


def names(text):
    """argparse type: names with commas, none twice."""
    out = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not out:
        raise argparse.ArgumentTypeError("names no set: give a named set or a file")
    return out


def temperature(text):
    """argparse type: a number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--model", required=True, help="folder, preset (qwen3-4b) or hub id")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add(
        "--data",
        required=True,
        type=names,
        help="named set, .json/.jsonl/.parquet file, or several with commas",
    )
    add(
        "--samples",
        type=natural,
        default=1,
        help="responses to each question, K (default 1; tables on AIME use 32)",
    )
    add("--limit", type=natural, help="only the first so many questions of each set")
    add("--temperature", type=temperature, default=1.0, help="0 is greedy (default 1)")
    add(
        "--max-new-tokens",
        type=natural,
        default=3072,
        help="response tokens at most (default 3072)",
    )
    add(
        "--max-prompt-tokens",
        type=natural,
        default=1024,
        help="longer prompts are dropped and counted (default 1024)",
    )
    add("--system", default=SYSTEM, help="system prompt (default: the paper's)")
    add(
        "--thinking",
        action="store_true",
        help="Qwen3: leave thinking on (the paper turns it off)",
    )
    add("--format", default="auto", help="prompt format: auto, chatml, llama3, base (default auto)")
    add(
        "--verifier",
        choices=("nanobupo", "hendrycks"),
        default="nanobupo",
        help="hendrycks: the reference's string equality",
    )
    add(
        "--slots",
        type=natural,
        help="responses decoded together (default: the sampler's choice, on a GPU what the free "
        "memory holds, at most 256, elsewhere 64)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the decode step (default: on a GPU)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: bfloat16 on cuda, float32 on cpu)",
    )
    add("--device", default="auto", help="auto, cpu, cuda (default auto)")
    add("--seed", type=int, default=0, help="of sampling (default 0)")
    add(
        "--fresh",
        action="store_true",
        help="sample the sets again that the folder holds, and replace them",
    )
    add(
        "--out",
        help="folder for results.json and samples.jsonl (default out/eval-MODEL, with the run of a "
        "step_000300 before it)",
    )
    p.error = lambda message: p.exit(2, f"eval.py: {message}; see python eval.py --help\n")
    return p.parse_args(argv)


def tokens_a_row(prompts, args, config) -> int:
    """Tokens that the longest prompt and its response take; ValueError for more than the model was
    made for."""
    longest = max(len(ids) for pairs, _ in prompts.values() for _, ids in pairs)
    if longest + args.max_new_tokens <= config.max_len:
        return longest + args.max_new_tokens
    advice = f"--max-new-tokens, to at most {config.max_len - longest}"
    if longest >= config.max_len:
        advice = "--max-prompt-tokens"
    raise ValueError(
        f"the longest prompt, {longest} tokens, and --max-new-tokens {args.max_new_tokens} exceed "
        f"the {config.max_len} tokens this model was made for: lower {advice}"
    )


# ----------------------------------------------------------------------------------------------
# the folder. The rows of a set go to a file of its own as they come. When all are there, that file
# joins samples.jsonl, and then the scores join results.json. Both are replaced by a renaming: a
# kill at any moment leaves what was there, and the rows sampled since.

# what the scores depend on: sets that differ in one of these do not share a folder
SETTINGS = (
    "model_sha256",
    "samples",
    "temperature",
    "max_new_tokens",
    "max_prompt_tokens",
    "system",
    "thinking",
    "format",
    "verifier",
    "dtype",
    "seed",
)


def identity(folder) -> str:
    """SHA-256 (hex) that tells models apart: of the files that make one, weights by their size and
    by 256 pieces of 4 KB each. A step of training changes weights everywhere."""
    texts = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    out = hashlib.sha256()
    for path in [Path(folder) / name for name in texts]:
        out.update(path.read_bytes() if path.is_file() else b"none")
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        out.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(256):
                f.seek(i * max(0, size - 4096) // 255)
                out.update(f.read(4096))
    return out.hexdigest()


def earlier(out, now, fingerprints, fresh) -> dict:
    """The results.json of a folder, or a new one with the settings `now`.

    fingerprints: {set: SHA-256 of its questions} of the sets asked for. Raises ValueError, in one
    line that says what differs, when the folder holds something else: results of other settings, or
    of other questions under the name of one of these sets.
    """
    path, samples = out / "results.json", out / "samples.jsonl"
    if samples.exists() and not (samples.is_file() and path.exists()):
        raise ValueError(f"{samples} is not one of eval.py's: name another --out")
    if not path.exists():
        return {**now, "sets": {}}
    old = read_json(path) if path.is_file() else {}
    sets = old.get("sets")
    if not isinstance(sets, dict) or not all(map(is_score, sets.values())):
        raise ValueError(f"{path} is not one of eval.py's: name another --out")
    if changed := differences(old, now):
        raise ValueError(f"{out} holds other results ({'; '.join(changed)}): name another --out")
    for name, sha256 in fingerprints.items():
        if name in sets and sets[name].get("data_sha256") != sha256 and not fresh:
            raise ValueError(
                f"{out} holds {name} with other questions ({sets[name].get('questions')} of them, "
                f"--limit {sets[name].get('limit')}): name another --out, or replace it by --fresh"
            )
    return old


def is_score(value) -> bool:
    """Whether this is what results.json holds of a set."""
    known = (
        "samples",
        "avg@k",
        "questions",
        "dropped_prompts",
        "mean_length",
        "truncated",
        "seconds",
    )
    return (
        isinstance(value, dict)
        and all(number(value.get(key)) for key in known)
        and (value.get("avg@k_stderr") is None or number(value["avg@k_stderr"]))
        and all(number(v) for key, v in value.items() if key.startswith("pass@"))
    )


def differences(old, now) -> list[str]:
    """The settings of a results.json that are not those of this run, in words."""
    changed = []
    if "model_sha256" not in old:
        changed.append("of an earlier version, which did not record the model")
    elif old["model_sha256"] != now["model_sha256"]:
        there = old.get("model")
        same = there == now["model"]
        changed.append(
            f"the files of {there} have changed since"
            if same
            else f"--model {there!r:.100} there, {now['model']!r:.100} now"
        )
    for name in SETTINGS[1:]:
        if old.get(name) != now[name]:
            flag = f"--{name.replace('_', '-')}"
            changed.append(f"{flag} {old.get(name)!r:.60} there, {now[name]!r:.60} now")
    return changed


def digest(value) -> str:
    """A short name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def save_results(out, results):
    """Replace results.json, whole or not at all."""
    new = out / ".new-results.json"
    with open(new, "w", encoding="utf-8") as f:
        f.write(json.dumps(results, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    new.replace(out / "results.json")


def encoded(row) -> bytes:
    """A line of samples.jsonl. What UTF-8 cannot hold (half of a pair, out of a path) is an escape
    of JSON's own."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def sampled(part, prompts, n) -> list[list[dict]]:
    """The groups of n rows that a killed run left in `part`, whole ones from the first prompt on;
    what stands behind them, such as a torn line, is cut off."""
    if not part.exists():
        return []
    groups, group, size, whole = [], [], 0, 0
    with open(part, "r+b") as f:
        for line in f:
            row = parse_json(line)
            if len(groups) == len(prompts) or not isinstance(row, dict) or line[-1:] != b"\n":
                break
            problem, ids = prompts[len(groups)]
            if (row.get("id"), row.get("sample"), row.get("prompt_ids")) != (
                problem.id,
                len(group),
                ids,
            ):
                break
            group.append(row)
            size += len(line)
            if len(group) == n:
                groups.append(group)
                group, whole = [], size
        f.truncate(whole)
    return groups


def keep(part, groups):
    """Add rows to a set's own file."""
    with open(part, "ab") as f:
        for group in groups:
            f.writelines(map(encoded, group))


def join(out, part, name):
    """Put the rows of a set into samples.jsonl, in the place of earlier ones of that set."""
    new, old = out / ".new-samples.jsonl", out / "samples.jsonl"
    with open(new, "wb") as f:
        if old.exists():
            with open(old, "rb") as lines:
                f.writelines(line for line in lines if set_of(line) != name)
        with open(part, "rb") as rows:
            shutil.copyfileobj(rows, f)
        f.flush()
        os.fsync(f.fileno())
    new.replace(old)


def set_of(line):
    """The set that a line of samples.jsonl belongs to; None for a line that is no row."""
    row = parse_json(line)
    return row.get("set") if isinstance(row, dict) else None


def finish(out, part, name, results):
    """A set is complete: its rows, then its scores, and only then its own file goes."""
    join(out, part, name)
    save_results(out, results)
    part.unlink()


# ----------------------------------------------------------------------------------------------
# the command

ROUNDS = 32  # times that the slots are filled between two looks at the disk


def say(text):
    """Print a line, what would act on a terminal as escapes. That nobody reads it, or that the
    terminal knows few letters, is `guarded`'s concern: it costs what is said, not what was
    sampled."""
    print(printable(text), flush=True)


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
            rows = []
            for k, response in enumerate(group):
                grade(response, problem, tokenizer, args.verifier)
                rows.append(sample_row(response, set=name, id=problem.id, sample=k))
            new.append(rows)
        new = parallel.all_gather(new)
        parallel.on_rank_0(keep, part, new)
        if not first:
            prompt = tokenizer.decode(new[0][0]["prompt_ids"])
            say(f"first prompt:\n{prompt}\nfirst response:\n{new[0][0]['response']}\n")
        groups += new
    return groups


def begin(out, parts, results):
    """Remove what a killed run left half written, and the rows of sets that are not gone on with;
    record the settings that the folder belongs to."""
    for stale in [*out.glob(".new-*"), *parts]:
        stale.unlink(missing_ok=True)
    save_results(out, results)


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    on_gpu = device.startswith("cuda")
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    sets = {name: load_problems(name, limit=args.limit) for name in args.data}
    folder = resolve(args.model, args.revision)
    tokenizer = tokenizers.load_tokenizer(folder, args.format)
    limits = args.max_prompt_tokens, args.system, args.thinking
    prompts = {name: encode_prompts(tokenizer, p, *limits) for name, p in sets.items()}
    max_len = tokens_a_row(prompts, args, read_config(read_json(folder / "config.json")))
    about = {"device": device, "torch": torch.__version__, "limit": args.limit}
    about["model_commit"] = download.commit(folder)
    found = {"model_sha256": parallel.on_rank_0(identity, folder), "dtype": str(dtype)}
    found |= {"format": tokenizer.format}
    now = {"model": args.model} | {name: (vars(args) | found)[name] for name in SETTINGS}
    out = Path(args.out or f"out/eval-{folder_name(args.model)}")
    data = {name: fingerprint(problems) for name, problems in sets.items()}
    parts = {name: out / f".samples-{digest([now, data[name]])}.jsonl" for name in sets}
    with nullcontext() if parallel.rank() else checkpoint.lock(out):
        results = parallel.on_rank_0(earlier, out, now, data, args.fresh)
        todo = [name for name in sets if args.fresh or name not in results["sets"]]
        for name in [name for name in sets if name not in todo]:
            say(f"{line_of(name, results['sets'][name])}: {out} has it")
        if todo:
            model = load_model(folder, dtype, device)
            compiled = on_gpu if args.compile is None else args.compile
            sampler = Sampler(model, args.slots, max_len, compile=compiled)
            sampler.start()
        stale = [parts[name] for name in sets if args.fresh or name not in todo]
        parallel.on_rank_0(begin, out, stale, results)
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
