"""Avg@K and pass@k of a model on maths problems, every response kept.

    Avg@K   mean over questions of (correct of K) / K: the unbiased accuracy of
            one sample
    pass@k  mean over questions of 1 - C(n-c, k) / C(n, k): at least one of k
            samples right, unbiased from n >= k (arXiv 2107.03374)

    python eval.py --model qwen3-4b --data aime24 --samples 32
    python eval.py --model out/run/step_000300 --data math500,my.jsonl
    python eval.py --model qwen3-4b,out/run/step_000300 --data aime24 --paper
    python eval.py --out out/eval-qwen3-4b --regrade    judge what is there again
    torchrun --nproc-per-node 8 eval.py ...     questions shared over 8 GPUs

A difference of a few points on 30 questions is noise: every score has its 95 %
interval over questions. `python -m tools.compare` compares folders, question by
question.

The folder (--out) holds results.json and samples.jsonl. Nothing in it is lost:
another set is added to those that are there, a set that is there is not sampled
again, and the same command after a kill goes on where it was. A folder belongs
to one model and one way of sampling; others are refused.
"""

import argparse
import gc
import hashlib
import json
import re
import time
from collections import Counter
from contextlib import nullcontext
from copy import copy
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
from plumbing.intervals import bootstrap_mean
from plumbing.memory import default_new_tokens
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


def pass_at_each_k(group) -> dict[str, float]:
    """pass@k of one question for powers of two up to K, from its K rows of samples.jsonl."""
    K = len(group)
    right = sum(int(row["reward"]) for row in group)
    return {f"pass@{2**i}": pass_at_k(K, right, 2**i) for i in range(K.bit_length())}


def scores(groups: list[list[dict]]) -> dict:
    """Avg@K with its standard error over questions, pass@k for powers of two up to K, the 95 %
    interval of each over questions, lengths and reasons, of the rows of samples.jsonl: K in each of
    N groups."""
    rows = list(chain(*groups))
    correct = [[int(row["reward"]) for row in group] for group in groups]  # [N,K]
    N, K = len(groups), len(groups[0])
    questions = [pass_at_each_k(group) for group in groups]
    passes, intervals = {}, {}
    for name in questions[0]:
        values = [question[name] for question in questions]
        passes[name], *ends = bootstrap_mean(values, within=(0, 1))
        intervals[f"{name}_interval"] = None if None in ends else ends
    return {
        "questions": N,
        "samples": K,
        "avg@k": avg_at_k(correct),
        "avg@k_stderr": stdev(map(fmean, correct)) / N**0.5 if N > 1 else None,
        "avg@k_interval": intervals["pass@1_interval"],  # pass@1 of a question is its mean
        **passes,
        **intervals,
        "mean_length": fmean(len(row["ids"]) for row in rows),
        "truncated": fmean(row["finish_reason"] != "stop" for row in rows),
        "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
    }


def with_error(value, interval, stderr=None) -> str:
    """A score for a person, with its interval, or else with its standard error."""
    if interval:
        return "{:.3f} [{:.3f}, {:.3f}]".format(value, *interval)
    return f"{value:.3f}" + (f" +- {stderr:.3f}" if stderr is not None else "")


def line_of(name, score) -> str:
    """The scores of a set, for a person; those of older files have no intervals."""
    shown = {}
    for key, value in score.items():
        if re.fullmatch(r"avg@k|pass@\d+", key):
            errors = score.get(f"{key}_interval"), score.get(f"{key}_stderr")
            shown[key] = with_error(value, *errors)
    average = shown.pop("avg@k")
    passes = "  ".join(f"{key} {text}" for key, text in shown.items())
    line = (
        "Avg@{samples} {average}  {passes}  ({questions} questions, {dropped_prompts} dropped, "
        "length {mean_length:.0f}, truncated {truncated:.0%}, {seconds:.0f} s)"
    )
    return f"{name}: {line.format(average=average, passes=passes, **score)}"


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


def verdict_fields(verdict) -> dict:
    """What samples.jsonl says of a verdict."""
    return {
        "extracted": verdict.extracted,
        "reward": float(verdict.correct),
        "reason": verdict.reason,
    }


def sample_row(response, **extra) -> dict:
    """The line of samples.jsonl."""
    verdict = response.verdict
    return {
        **extra,
        "question": response.problem.question,
        "answer": response.problem.answer,
        "response": response.text,
        **verdict_fields(verdict),
        "reward": response.reward,  # train.py may have shaped it
        "finish_reason": "stop" if response.stopped else "length",
        "prompt_ids": response.prompt,
        "ids": response.ids,
    }


def light(row) -> dict:
    """What `scores` needs of a row: of 10,000 long responses the rest would fill the memory."""
    names = "id sample reward reason finish_reason".split()
    return {name: row[name] for name in names} | {"ids": range(len(row["ids"]))}


# --------------------------------------------------------------------------------------------------
# a set of problems. Its rows go to a file of its own, `part`, as they come

ROUNDS = 32  # times that the slots are filled between two looks at the disk
PAPER = {"aime24": 32, "aime25": 32, "amc23": 16, "math500": 16}  # K of its tables


def samples_of(name, args) -> int:
    """K of a set."""
    return PAPER.get(name, args.samples) if args.paper else args.samples


def evaluate(sampler, tokenizer, name, prompts, args, part):
    """The rows of K responses to each prompt of a set, K in a group, kept in `part` as they come
    and returned `light`; those that are there already are not sampled again. Ranks share the
    questions of each piece."""
    K = samples_of(name, args)
    groups = [list(map(light, group)) for group in on_rank_0(sampled, part, prompts, K)]
    at_once = max(1, ROUNDS * sampler.slots * parallel.world() // K)
    for first in range(len(groups), len(prompts), at_once):
        piece = prompts[first : first + at_once]
        local = parallel.local_slice(len(piece))
        responses = sampler.generate(
            [ids for _, ids in piece[local]],
            K,
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
        groups += [list(map(light, group)) for group in rows]
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

# what the scores depend on: sets that differ in one of these do not share a folder. K is not among
# them, it is each set's own
SETTINGS = """model temperature max_new_tokens max_prompt_tokens system thinking format verifier
    dtype seed""".split()


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


def read_results(out, half=False) -> dict:
    """The results.json of a folder of eval.py; ValueError, in one line, for what is none.

    half: even where a kill has left the verdicts of samples.jsonl and those of results.json to
    different verifiers.
    """
    if (out / HALF).exists() and not half:
        raise ValueError(f"{out}: a --regrade of it was cut short, run that again")
    try:
        results = read_json(out / "results.json")
        for name, score in results["sets"].items():
            line_of(name, score)  # what can be told in a line is a score
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError):
        raise ValueError(f"{out} holds no results of eval.py: name another folder") from None
    return results


def earlier(out, settings, asked, fresh) -> dict:
    """The results.json of a folder, or a new one with these settings.

    asked: {set: (SHA-256 of its problems, K)} of the sets asked for. Raises ValueError, in one line
    that says what differs, when the folder holds something else: results of other settings, or of
    other questions or another K under the name of one of these sets.
    """
    if not (out / "results.json").exists() and not (out / "samples.jsonl").exists():
        return {**settings, "sets": {}}
    old = read_results(out)
    old.pop("samples", None)  # older files have one K for all sets
    if changed := differences(old, settings):
        raise ValueError(f"{out} holds other results ({'; '.join(changed)}): name another --out")
    for name, what in asked.items():
        score = old["sets"].get(name)
        if fresh or not score:
            continue
        if (score.get("data_sha256"), score["samples"]) != what:
            raise ValueError(
                f"{out} holds {name} with other questions or samples ({score['questions']} "
                f"questions, --limit {score.get('limit')}, --samples {score['samples']}): name "
                "another --out, or replace it by --fresh"
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
    try:
        with open(new, "wb") as f:
            f.writelines(lines)
            f.flush()
            fsync(f.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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
# what a folder holds, read and judged again

HALF = ".regrading"  # is there while samples.jsonl is new and results.json old
# what must be in a row of samples.jsonl
ROW = dict(set=str, id=str, sample=int, answer=str, response=str, reward=float, reason=str)
ROW |= dict(finish_reason=str, ids=list)


def kept_rows(out):
    """Yield the rows of samples.jsonl; ValueError for a line that is none."""
    for n, row in enumerate(each_row(out / "samples.jsonl"), 1):
        if not row or not all(isinstance(row.get(name), kind) for name, kind in ROW.items()):
            raise ValueError(f"{out}/samples.jsonl: line {n} is no response that eval.py kept")
        yield row


def by_question(out, name, score, rows) -> list[list[dict]]:
    """The rows of a set in groups of K; ValueError where they are not those of its score."""
    K = score["samples"]
    groups = [rows[i : i + K] for i in range(0, len(rows), K)]
    whole = len(rows) == K * score["questions"]
    for group in groups:
        expected = [(group[0]["id"], k) for k in range(K)]
        whole &= [(row["id"], row["sample"]) for row in group] == expected
    if not whole:
        raise ValueError(f"{out}/samples.jsonl does not hold the responses of {name}")
    return groups


def regraded(out, verifier, sets, changed):
    """Yield the lines of samples.jsonl as this verifier has them. At the end `sets` has new scores,
    and `changed` a text for each verdict that is another one."""
    rows = {name: [] for name in sets}
    for old in kept_rows(out):
        verdict = judge(old["response"], old["answer"], verifier)
        row = old | verdict_fields(verdict)
        if row["reward"] != old["reward"]:
            about = "{id}, sample {sample}: {extracted!r:.60} for {answer!r:.60}, now {reward:.0f}"
            changed.append(f"{about.format(**row)} ({verdict.reason})")
        rows.setdefault(row["set"], []).append(light(row))
        yield encoded(row)
    for name, score in sets.items():
        score.update(scores(by_question(out, name, score, rows[name])))
    (out / HALF).touch()  # not earlier: up to here a kill changes nothing


def regrade(out, verifier):
    """Judge all sets of a folder again. Both files are replaced at the end, by renamings."""
    read_results(out, half=True)  # or no folder is made
    with checkpoint.lock(out):
        results = read_results(out, half=True)
        if parts := sorted(path.name for path in out.glob(".samples-*")):
            raise ValueError(
                f"{out} holds a set that is not complete: run the command that began it again, or "
                f"delete {parts[0]}"
            )
        sets, changed = results["sets"], []
        replace(out / "samples.jsonl", regraded(out, verifier, sets, changed))
        before = results.get("verifier")
        results["verifier"] = verifier
        save_results(out, results)
        (out / HALF).unlink()
    of = sum(score["questions"] * score["samples"] for score in sets.values())
    say(f"{out}: {len(changed)} of {of} verdicts changed ({verifier} now, {before} before)")
    for text in changed[:5]:
        say(f"  {text}")
    for name, score in sets.items():
        say(line_of(name, score))


# --------------------------------------------------------------------------------------------------
# the flags


def names(text):
    """argparse type: names with commas, none twice."""
    out = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not out:
        raise argparse.ArgumentTypeError("names nothing")
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
    models = "folder, preset (qwen3-4b), hub id, or several with commas"
    folder = "folder (default out/eval-MODEL, with the run of a step_000300 before it)"
    tokens = "response tokens at most (default 3072; --paper: 7168, llama 3072)"
    papers = "K = 32 on AIME, 16 on AMC and MATH-500, T = 1"
    again = "judge the responses in --out again by --verifier, sample nothing"
    add("--model", None, models, type=names)
    add("--revision", None, "branch, tag or commit of a model on the hub")
    add("--data", None, several, type=names)
    add("--samples", 1, "responses to each question, K; tables on AIME use 32", type=natural)
    add("--limit", None, "only the first so many questions of each set", type=natural)
    add("--temperature", 1.0, "0 is greedy", type=amount)
    add("--max-new-tokens", None, tokens, type=natural)
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
    add("--paper", False, papers, action="store_true")
    add("--regrade", False, again, action="store_true")
    add("--out", None, folder + "; of several models, the folder that holds theirs")
    args = p.parse_args(argv)
    if args.regrade:
        if not args.out and not args.model:
            p.error("--regrade needs --out, the folder to judge again")
    elif not args.model or not args.data:
        p.error("--model and --data are needed")
    if args.paper and args.temperature != 1:
        p.error("--paper samples at --temperature 1")
    return args


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


def plan(args, model, out, problems) -> argparse.Namespace:
    """The flags for one model, and what follows from them. Mistakes end here, before anything is
    sampled."""
    args = copy(args)
    args.model = model
    args.out = out
    args.folder = resolve(model, args.revision)
    config = read_config(read_json(args.folder / "config.json"))
    args.tokenizer = load_tokenizer(args.folder, args.format)
    args.format = args.tokenizer.format
    if args.max_new_tokens is None:
        papers = default_new_tokens(config, args.max_prompt_tokens)
        args.max_new_tokens = papers if args.paper else 3072
    limits = args.max_prompt_tokens, args.system, args.thinking
    args.prompts = {n: encode_prompts(args.tokenizer, p, *limits) for n, p in problems.items()}
    args.max_len = tokens_a_row(args.prompts, args, config)
    args.settings = {name: getattr(args, name) for name in SETTINGS}
    args.settings["model_sha256"] = on_rank_0(identity, args.folder)
    args.asked = {name: (fingerprint(p), samples_of(name, args)) for name, p in problems.items()}
    on_rank_0(earlier, out, args.settings, args.asked, args.fresh)
    return args


def run(args):
    """Sample and judge what the folder of a model lacks."""
    out, sampler = args.out, None
    with nullcontext() if parallel.rank() else checkpoint.lock(out):
        results = on_rank_0(earlier, out, args.settings, args.asked, args.fresh)
        sets = results["sets"]
        for name, (pairs, dropped) in args.prompts.items():
            sha256, K = args.asked[name]
            # rows of other settings, or of other questions, are never taken for this set's
            about = {"model": args.model, "samples": K, **args.settings}
            digest = hashlib.sha256(json.dumps([about, name, sha256]).encode()).hexdigest()
            part = out / f".samples-{digest[:16]}.jsonl"
            if name in sets or args.fresh:  # what a kill has left
                on_rank_0(part.unlink, missing_ok=True)
            if name in sets and not args.fresh:
                say(f"{line_of(name, sets[name])}: {out} has it")
                continue
            if not sampler:
                model = load_model(
                    args.folder, getattr(torch, args.dtype.removeprefix("torch.")), args.device
                )
                sampler = Sampler(model, args.slots, args.max_len, compile=args.compile)
                sampler.allocate()
                on_rank_0(save_results, out, results)  # the folder is of these settings
            start = time.time()
            groups = evaluate(sampler, args.tokenizer, name, pairs, args, part)
            score = scores(groups) | {"dropped_prompts": dropped, "data_sha256": sha256}
            score |= {"device": args.device, "torch": torch.__version__, "limit": args.limit}
            score |= {"model_commit": download.commit(args.folder), "seconds": time.time() - start}
            sets[name] = score
            on_rank_0(finish, out, part, name, results)
            say(line_of(name, score))
    say(f"written: {out}/results.json and samples.jsonl")


def main(argv=None):
    args = parse(argv)
    models = args.model or [""]
    folders = [Path(args.out or "out") / f"eval-{folder_name(model)}" for model in models]
    if args.out and len(models) == 1:
        folders = [Path(args.out)]
    if len(set(folders)) < len(models):
        raise ValueError("two of these models have one name: give each a command and an --out")
    if args.regrade:
        for folder in folders:
            on_rank_0(regrade, folder, args.verifier)
        return
    args.device = pick_device(args.device)
    on_gpu = args.device.startswith("cuda")
    args.compile = on_gpu if args.compile is None else args.compile
    args.dtype = str(getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32")))
    problems = {name: load_problems(name, limit=args.limit) for name in args.data}
    plans = [plan(args, *place, problems) for place in zip(models, folders, strict=True)]
    for one in plans:
        run(one)
        gc.collect()  # the next model needs the memory
    if len(folders) > 1:
        from tools.compare import table  # it reads what this file writes

        say(on_rank_0(table, folders))


if __name__ == "__main__":
    guarded(main)
