"""What is in a set of problems, and is it fit for training or evaluation?

python -m tools.problems math500                    does the verifier accept its answers?
python -m tools.problems aime24 --against my.jsonl  are its questions in my training set?
python -m tools.problems words:2:20                 made here: see plumbing/arithmetic.py
python -m tools.problems deepmath --samples-file out/eval-x/samples.jsonl --solved .2-.8 \\
    --out easy.jsonl                                those a model solves now and then
"""

import argparse
import collections
import json
import logging
import re
from pathlib import Path

import verify
from plumbing.cli import Parser, guarded, natural, share
from plumbing.data import (
    NAMED,
    READERS,
    DataError,
    fingerprint,
    load_problems,
    log,
    normalised,
    read_problems,
    span,
)
from plumbing.rows import each_row, printable
from plumbing.tokenizer import load_tokenizer

# class of answers: what it looks like once text macros, dollars, spaces and \left \right are gone
SHAPES = {
    "yes/no": r"(?i:yes|no|true|false)",
    "integer": r"[-+]?(\d+|\d{1,3}(,\d{3})+)",
    "decimal": r"[-+]?\d*\.\d+",
    "fraction": r"[-+]?(\d+/\d+|\\[dtc]?frac(\{[-+]?\d+\}|\d)(\{\d+\}|\d))",
    "choice": r"\(?[A-E]\)?",
    "tuple/interval": r"([\[(]|\\\{).*,.*([\])]|\\\})",
    "expression": r".*",
}


def answer_class(answer):
    """One of SHAPES. Report rewards by class: in DeepMath a fifth of the answers is yes or no,
    where a guess is right half of the time."""
    s = re.sub(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", answer)
    s = re.sub(r"\\left|\\right|\\[!,;: ]|\\?\$|\s|\{(?=,\})|(?<=,)\}", "", s).rstrip(".")
    return next(
        name for name, shape in SHAPES.items() if re.fullmatch(shape, s, re.ASCII | re.DOTALL)
    )


def select(problems, classes=None, max_tokens=None, count=None):
    """The problems that pass every filter, in order. DataError, saying what each one removed, if
    none is left.

    classes: names of SHAPES. max_tokens: longest prompt as measured by count(question) -> int,
    such as lambda q: len(tokenizer.chat(q)); a longer one is dropped whole, never cut.
    """
    if classes is not None and not set(classes) <= set(SHAPES):
        raise ValueError(
            f"unknown class of answers among {', '.join(map(repr, classes))}; "
            f"there are {', '.join(SHAPES)}"
        )
    left, said = list(problems), []
    filters = (
        ("classes", classes, lambda p: answer_class(p.answer) in classes),
        ("max_tokens", max_tokens, lambda p: count(p.question) <= max_tokens),
    )
    for name, wanted, keep in filters:
        if wanted is not None:
            before, left = len(left), [p for p in left if keep(p)]
            said.append(f"{name} {wanted} removed {before - len(left)}")
            log.info("%s of %d problems", said[-1], before)
    if not left:
        removed = ", ".join(said) or "there were none"
        raise DataError(f"none of {len(problems)} problems is left: {removed}")
    return left


def shares(text) -> tuple[float, float]:
    """argparse type: .2-.8 as (0.2, 0.8), .5 as (0.5, 0.5)."""
    first, _, last = text.partition("-")
    low, high = share(first), share(last or first)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} goes from more to less")
    return low, high


def solved_shares(path) -> dict:
    """{(question, answer): share of its samples that are right} of a samples.jsonl."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; eval.py writes samples.jsonl into its folder")
    right = collections.defaultdict(list)
    for n, row in enumerate(each_row(path), 1):
        row = row or {}
        about = row.get("question"), row.get("answer")
        if row.get("reward") not in (0, 1) or not all(isinstance(text, str) for text in about):
            raise DataError(f"{path}: line {n} is no response with a reward of 0 or 1")
        right[about].append(row["reward"])
    return {about: sum(rewards) / len(rewards) for about, rewards in right.items()}


def select_solved(problems, shares, low, high):
    """The problems of which a share from low to high was solved; prints how many were left out, and
    why. shares: of `solved_shares`."""
    kept, why = [], collections.Counter()
    for p in problems:
        solved = shares.get((p.question, p.answer))
        if solved is None:
            why["never sampled"] += 1
        elif solved > high:
            why["too easy"] += 1
        elif solved < low:
            why["too hard"] += 1
        else:
            kept.append(p)
    left_out = ", ".join(
        f"{why[name]} {name}" for name in ("never sampled", "too easy", "too hard")
    )
    said = f"{len(kept)} of {len(problems)} problems are solved {low:g} to {high:g} of the time"
    print(f"{said}; left out: {left_out}")
    if not kept:
        raise DataError(f"none of {len(problems)} problems is left: {left_out}")
    return kept


def write(problems, path):
    """A .jsonl file of problems that `train.py --data` reads as they are."""
    try:
        with open(path, "x", encoding="utf-8") as f:
            for p in problems:
                row = {"id": p.id, "question": p.question, "answer": p.answer, **p.meta}
                f.write(json.dumps(row) + "\n")
    except FileExistsError:
        raise ValueError(f"{path} is there already: name another --out") from None
    if fingerprint(load_problems(path)) != fingerprint(problems):
        raise DataError(f"{path} is not read as it was meant")
    print(f"written: {path}, {len(problems)} problems")


def overlap(problems, others, n=20):
    """Questions shared with `others`: ([(i, j)] equal as `normalised`, {i: share of its runs of n
    words that others have too}).

    Equal questions are in the first alone, questions below n words can only be there. A few per
    cent is boilerplate, half a paraphrase.
    """

    def runs(p):
        words = p.question.casefold().split()
        return {hash(" ".join(words[k : k + n])) for k in range(len(words) - n + 1)}

    place = {normalised(p.question): j for j, p in enumerate(others)}
    found = [place.get(normalised(p.question)) for p in problems]
    equal = [(i, j) for i, j in enumerate(found) if j is not None]
    mine = {i: runs(problems[i]) for i, j in enumerate(found) if j is None}
    wanted = set().union(*mine.values())
    # of `others`, perhaps 100,000 questions, nothing else is kept
    seen = {run for p in others for run in runs(p) if run in wanted}
    return equal, {i: len(r & seen) / len(r) for i, r in mine.items() if r & seen}


def _list(title, lines):
    """Print a title and its lines, each as one."""
    print(*(printable(line, keep="") for line in (title, *lines)), sep="\n  ")


def describe(problems, report, count=None):
    """Print a set's answers, lengths, first rows, bad rows and the verifier's self-check. Returns
    how many answers the verifier rejects."""
    total = len(problems)
    lines = [
        f"question from {q!r}, answer from {a!r}: {n} rows" for (q, a), n in report.fields.items()
    ]
    for name, n in collections.Counter(answer_class(p.answer) for p in problems).most_common():
        lines.append(f"answer is {name:15} {n:6}  {n / total:6.1%}")
    lengths = {
        "question, characters": [len(p.question) for p in problems],
        "answer, characters": [len(p.answer) for p in problems],
    }
    if count:
        lengths["prompt, tokens"] = [count(p.question) for p in problems]
    for name, values in lengths.items():
        values.sort()
        median, most = values[total // 2], values[total * 95 // 100]
        lines.append(f"{name:25} median {median:,}   95 % up to {most:,}   longest {values[-1]:,}")
    lines.append(
        f"{total - len({normalised(p.question) for p in problems})} questions are repeated"
    )
    lines += [f"{p.id}  {p.question[:100]!r} -> {p.answer[:60]!r}" for p in problems[:3]]
    sha256 = fingerprint(problems)
    _list(f"{report.name}: {total} problems of {report.rows} rows, sha256 {sha256}", lines)
    _list(f"{len(report.bad)} bad rows", [f"{place}: {why}" for place, why in report.bad[:20]])
    failed = [p for p in problems if not verify.verifiable(p.answer)]
    _list(
        f"the verifier rejects {len(failed)} of {total} answers when a response says exactly that",
        [f"{p.id}: {p.answer!r}" for p in failed[:20]],
    )
    return len(failed)


def show_overlap(problems, against):
    """Print which questions another set has too."""
    others = load_problems(against, max_bad=1)
    equal, shared = overlap(problems, others)
    lines = [f"{problems[i].id} = {others[j].id}" for i, j in equal[:20]]
    for i, part in sorted(shared.items(), key=lambda x: -x[1])[:20]:
        lines.append(f"{problems[i].id}: {part:.0%} of its runs")
    _list(
        f"{len(equal)} questions are equal to one of {against}, "
        f"{len(shared)} others share runs of 20 words with it",
        lines,
    )


def parse(argv):
    parser = Parser(
        description="What is in a set of problems, and is it fit for training or evaluation? "
        "Exit code 2: usage; 3: bad data.",
        epilog=f"Named sets: {', '.join(NAMED)}; without a network sums, sums-test, "
        "words[:operations[:largest number]], words-test. "
        "Example: python -m tools.problems deepmath --difficulty 5-7 --against math500",
        allow_abbrev=False,
    )
    add = parser.add_argument
    kinds = ", ".join(READERS)
    add("data", metavar="NAME_OR_PATH", help=f"a named set, a file ({kinds}) or a folder of them")
    against = "also count the questions that this set has in common with it"
    add("--against", metavar="OTHER", help=against)
    add("--limit", type=natural, metavar="N", help="read the first N problems (default: all)")
    add("--revision", help="branch, tag or commit of a named set (default: the one that is pinned)")
    bad = "share of bad rows that is no error (default: 0; training allows 0.01)"
    add("--max-bad", type=share, default=0.0, metavar="SHARE", help=bad)
    add = parser.add_argument_group("filters (default: keep all)").add_argument
    difficulty = "keep this difficulty or level, as 5-8 or 6"
    add("--difficulty", type=span, metavar="LOW-HIGH", help=difficulty)
    classes = f"keep these classes of answers: {', '.join(SHAPES)}"
    add("--classes", nargs="+", choices=SHAPES, metavar="CLASS", help=classes)
    add("--max-tokens", type=natural, metavar="N", help="keep prompts of at most N tokens")
    add("--tokenizer", metavar="FOLDER", help="model folder that counts them")
    solved = "keep those of which this share of the responses in --samples-file is right, as .2-.8"
    add("--solved", type=shares, metavar="LOW-HIGH", help=solved)
    add("--samples-file", metavar="FILE", help="samples.jsonl of eval.py, for --solved")
    add("--out", metavar="FILE.jsonl", help="write what is left into a new file")
    args = parser.parse_args(argv)
    if bool(args.solved) != bool(args.samples_file):
        parser.error("--solved and --samples-file go together")
    if args.out and Path(args.out).suffix != ".jsonl":
        parser.error(f"--out {args.out}: a .jsonl file is written")
    if args.max_tokens and not args.tokenizer:
        parser.error("--max-tokens needs --tokenizer FOLDER, the model folder that counts them")
    return args


def main(argv=None):
    args = parse(argv)
    # of this project alone: the hub's libraries log every request
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    count = None
    if args.tokenizer:
        chat = load_tokenizer(args.tokenizer).chat
        count = lambda question: len(chat(question))  # noqa: E731
    problems, report = read_problems(args.data, args.limit, args.difficulty, args.revision)
    failed = 0
    if problems:
        problems = select(problems, args.classes, args.max_tokens, count)
        if args.solved:
            problems = select_solved(problems, solved_shares(args.samples_file), *args.solved)
        failed = describe(problems, report, count)
        if args.against:
            show_overlap(problems, args.against)
    report.check(args.max_bad)
    if failed > 0.01 * len(problems):
        raise DataError(
            f"{report.name}: the verifier rejects {failed} of {len(problems)} answers, "
            "more than 1 in 100"
        )
    if args.out:
        write(problems, args.out)


if __name__ == "__main__":
    guarded(main)
