"""Problems with known answers, from a local file, a folder or a named set on the Hugging Face hub.

    python data.py math500                                    # what is in it, and does the verifier accept every answer?
    python data.py aime24 --against my.jsonl                  # are the evaluation's questions in my training set?
    problems = data.load_problems("deepmath", max_bad=0.01)   # [Problem(question, answer, ...)]
    data.batch(problems, step=7, batch_size=128, seed=0)      # the questions of step 7, whatever happened before

A row is used as it stands or not at all. One that cannot be used is skipped and reported with its place, and more of them than the
caller allows is an error: a run that silently learns from half of its file is worse than one that does not start.
"""

import argparse
import collections
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet

import verify

log = logging.getLogger("nanobupo.data")

# Of these the first that a row has is read, whatever its case. Rows in verl's format have `prompt`, a list of messages, and
# `reward_model.ground_truth`. All named sets are covered: aime24 has only a `solution`, everywhere else the answer has its own column.
QUESTION = ("problem", "question", "prompt")
ANSWER = ("answer", "final_answer", "solution", "ground_truth")
META = ("difficulty", "level", "subject")
MAX_CHARS = 100_000  # of one field; the longest question of the sets below that evaluate has 1,895

NAMED = {  # name: (hub id, revision, files). A commit as revision means the same rows for ever; "main" would mean "not pinned".
    "math500": (
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        ["test.jsonl"],
    ),  # 500 problems
    "amc23": (
        "math-ai/amc23",
        "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        ["test-00000-of-00001.parquet"],
    ),  # 40
    "aime24": (
        "math-ai/aime24",
        "83a7f387baaa524a8bda0022eac0541582297103",
        ["test-00000-of-00001.parquet"],
    ),  # 30
    "aime25": ("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", ["test.jsonl"]),  # 30
    "deepmath": (
        "zwhe99/DeepMath-103K",
        "5cf055d1fe3d7a2eb19719ac020211469736ae44",  # 103,022, a download of 2.1 GB
        [f"data/train-{i:05}-of-00010.parquet" for i in range(10)],
    ),
    "deepscaler": (
        "agentica-org/DeepScaleR-Preview-Dataset",
        "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        ["deepscaler.json"],
    ),  # 40,315
    "gsm8k": (
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        ["main/test-00000-of-00001.parquet"],
    ),  # 1,319
    "gsm8k-train": (
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        ["main/train-00000-of-00001.parquet"],
    ),  # 7,473
}


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer, where they came from. `id` is unique in what one call loads; `meta` has difficulty, level, subject."""

    question: str
    answer: str
    id: str = ""
    source: str = ""
    meta: dict = field(default_factory=dict, compare=False)


class DataError(ValueError):
    """The data cannot be used as it is. The message is one line: what, where, and what to do."""

    exit_code = 3


class _BadRow(ValueError):
    """One row cannot be used; the message says why."""


def _short(text):
    return " ".join(str(text).split())[:160]


# ------------------------------------------------------------------------------------------------------------ where the files are


def download(repo, file, revision):
    """Path of one file of a hub data set, from the cache if it is there. Raises DataError saying what failed and what to do.

    HF_HUB_OFFLINE=1 (not one request), HF_HOME, HF_ENDPOINT and the token of `hf auth login` work as they do everywhere.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except Exception as e:  # the library's own, its http client's and the system's errors have no common class below this one
        known = (
            (
                errors.GatedRepoError,
                "access is restricted (403): ask for it on its page, then `hf auth login`",
            ),
            (
                errors.RepositoryNotFoundError,
                "no such data set, or a private one (401, 404): `hf auth login` if it is yours",
            ),
            (errors.RevisionNotFoundError, "there is no such revision"),
            (
                (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
                "it is not in the cache and the hub cannot be asked",
            ),
            (errors.EntryNotFoundError, "there is no such file in it"),
        )
        why = next(
            (text for kind, text in known if isinstance(e, kind)),
            f"{type(e).__name__}: {_short(e)}",
        )
        cache, offline = (
            huggingface_hub.constants.HF_HUB_CACHE,
            " (HF_HUB_OFFLINE is set)" * huggingface_hub.constants.HF_HUB_OFFLINE,
        )
        raise DataError(
            f"cannot read {file} of the hub data set {repo} at revision {revision}: {why}{offline}. Cache folder: {cache}. "
            f"Run `hf download --repo-type dataset {repo} {file} --revision {revision}` where there is a network, "
            "or set HF_HOME to a folder whose cache has it, or pass the path of a local file"
        ) from None


def _files(name):
    """Iterator of (path, source name). A path that exists wins over a named set, and needs no network."""
    path, name = Path(name).expanduser(), str(name)
    if os.path.isdir(path):
        files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in READERS]
        if not files:
            raise DataError(
                f"{path}: no {', '.join(READERS)} file in this folder; name the folder that holds the files themselves"
            )
        return ((p, p.stem) for p in files)
    if os.path.exists(path):
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{path}: cannot read this kind of file; convert it to one of {', '.join(READERS)}"
            )
        return iter([(path, path.stem)])
    if name in NAMED:
        repo, revision, files = NAMED[name]
        return (
            (Path(download(repo, file, revision)), name) for file in files
        )  # with a limit, later files are never fetched
    close = difflib.get_close_matches(name, NAMED, n=1)
    raise FileNotFoundError(
        f"there is no file, folder or named set {name!r}; "
        + (f"did you mean {close[0]}?" if close else f"the named sets are {', '.join(NAMED)}")
    )


# ------------------------------------------------------------------- the three formats: iterators of (place, row or the _BadRow it is)


def _json_value(raw):
    try:
        return json.loads(
            raw.decode("utf-8-sig")
        )  # -sig: Windows editors begin a file with a byte order mark
    except (
        ValueError,
        RecursionError,
    ) as e:  # not UTF-8, not JSON, a number of more than 4,300 digits, nesting thousands deep
        return _BadRow(f"not JSON: {_short(e).replace('line 1 column', 'column')}")


def _jsonl_rows(path):
    with open(path, "rb") as f:  # bytes: one undecodable line must not take the others with it
        for n, raw in enumerate(f, 1):
            if raw.strip():
                yield f"{path.name}:{n}", _json_value(raw)


def _json_rows(path):
    raw = path.read_bytes()
    value = _json_value(raw) if raw.strip() else []
    if isinstance(value, _BadRow):
        if not re.match(rb"\s*\{.*\}\s*\n\s*\{", raw):  # many a .json file has one object a line
            raise DataError(f"{path}: {value}")
        yield from _jsonl_rows(path)
        return
    if isinstance(value, dict):
        lists = [
            k
            for k, v in value.items()
            if isinstance(v, list) and all(isinstance(row, dict) for row in v)
        ]
        value = value[lists[0]] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected an array of objects, or one object with exactly one such array in it"
        )
    yield from ((f"{path.name} row {n}", row) for n, row in enumerate(value, 1))


def _parquet_rows(path):
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            has = f.schema_arrow.names
            columns = [_pick(has, QUESTION), _pick(has, ANSWER) or "reward_model.ground_truth"]
            if not columns[0] or columns[1].split(".")[0] not in has:
                raise DataError(
                    f"{path}: needs a column {' or '.join(QUESTION)} and one {' or '.join(ANSWER)}; it has {_short(has)}"
                )
            columns += [name for name in has if name in ("id", "unique_id", *META)]
            # Only these are read: DeepMath has three long solutions beside each question, nearly all of its 2 GB.
            for n, part in enumerate(f.iter_batches(batch_size=1024, columns=columns)):
                yield from (
                    (f"{path.name} row {1024 * n + i}", row)
                    for i, row in enumerate(part.to_pylist(), 1)
                )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path}: not a readable parquet file ({_short(e)}); fetch or write it again"
        ) from None


READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


# ----------------------------------------------------------------------------------------------------------- from a row to a problem


def _pick(names, aliases):
    lower = {name.lower(): name for name in names}
    return next((lower[alias] for alias in aliases if alias in lower), None)


def _text(value, name):
    """`value` as clean text (no space around it, lines end in \\n); raises _BadRow for what no tokenizer or verifier should see."""
    if not isinstance(value, str):
        raise _BadRow(
            f"{name!r} is {'null' if value is None else type(value).__name__}, expected text"
        )
    if len(value) > MAX_CHARS:
        raise _BadRow(f"{name!r} has {len(value):,} characters, at most {MAX_CHARS:,} are read")
    strange = re.search("[\0\ufeff\ud800-\udfff]", value)
    if strange:
        raise _BadRow(
            f"{name!r} contains U+{ord(strange[0]):04X} (a NUL, byte order mark or half of a surrogate pair)"
        )
    value = value.replace("\r\n", "\n").strip()
    if not value:
        raise _BadRow(f"{name!r} is empty")
    return value


def _answer(value, name):
    """The gold answer as text: numbers in their shortest form (27.0 -> 27), worked solutions cut to their \\boxed{} or #### answer."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not isinstance(value, int) and not math.isfinite(
            value
        ):  # isfinite of an integer beyond 1e308 is an error itself
            raise _BadRow(f"{name!r} is {value}")
        value = str(int(value)) if value == int(value) else format(Decimal(str(value)), "f")
    text = _text(value, name)
    if re.search(r"\\f?box|####", text):
        text = verify.extract(text)
        if not text:
            raise _BadRow(f"{name!r} has no answer in its last \\boxed{{}} or ####")
    elif name.lower() == "solution" and not re.fullmatch(r"\$?[-+]?[\d.,/]+\$?", text):
        # the last number of a worked solution would be a guess, and a wrong gold answer is worse than a row less
        raise _BadRow(
            f"{name!r} has neither \\boxed{{}} nor ####; put the bare answer into a field 'answer'"
        )
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def _problem(row, place, source):
    """(Problem, name of its question field, name of its answer field) of one row; raises _BadRow."""
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"{type(row).__name__}, expected an object")
    q, a, gold = _pick(row, QUESTION), _pick(row, ANSWER), row.get("reward_model")
    if a is None and isinstance(gold, dict) and "ground_truth" in gold:
        a, gold = "reward_model.ground_truth", gold["ground_truth"]
    elif a is not None:
        gold = row[a]
    for name, aliases in (q, QUESTION), (a, ANSWER):
        if name is None:
            raise _BadRow(
                f"none of the fields {', '.join(aliases)}; it has {_short(list(row)) if row else 'none'}"
            )
    question = row[q]
    if isinstance(question, list):  # messages
        said = [
            m.get("content") for m in question if isinstance(m, dict) and m.get("role") == "user"
        ]
        if len(said) != 1:
            raise _BadRow(f"{q!r} has {len(said)} user messages, expected one")
        question = said[0]
    own = row.get(_pick(row, ("id", "unique_id")))
    own = f"{source}/{_text(str(own), 'id')}" if isinstance(own, str | int) and own != "" else place
    meta = {k: row[k] for k in META if isinstance(row.get(k), str | int | float)}
    return Problem(_text(question, q), _answer(gold, a), own, source, meta), q, a


@dataclass
class Report:
    """What was read: number of rows, {(question field, answer field): rows that had them}, [(place, why)] of the unusable rows."""

    name: str
    rows: int = 0
    fields: collections.Counter = field(default_factory=collections.Counter)
    bad: list = field(default_factory=list)

    def check(self, max_bad):
        """Raise DataError when there are no usable rows, or more than the share `max_bad` of unusable ones; log what was skipped."""
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the rows, from 0 to 1, not {max_bad}")
        first = "; ".join(f"{place}: {why}" for place, why in self.bad[:3]) + "; ..." * (
            len(self.bad) > 3
        )
        said = f"{self.name}: {len(self.bad)} of {self.rows} rows are unusable ({first})"
        if not self.rows:
            raise DataError(f"{self.name}: there are no rows in it")
        if len(self.bad) == self.rows or len(self.bad) > max_bad * self.rows:
            raise DataError(
                f"{said}; at most {max_bad:.4g} of them may be: repair them, remove them, or allow more (max_bad)"
            )
        if self.bad:
            log.warning("%s", said)


def read(name_or_path, limit=None):
    """([Problem], Report): every usable row, however many are not. Raises as `load_problems` for what cannot be read at all."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of problems from 1 on, not {limit}")
    problems, report, ids = [], Report(str(name_or_path)), {}
    for path, source in _files(name_or_path):
        for place, row in READERS[path.suffix.lower()](path):
            report.rows += 1
            try:
                problem, *names = _problem(row, place, source)
                if (
                    ids.setdefault(problem.id, place) != place
                ):  # samples and seeds are told apart by the id
                    raise _BadRow(f"the id {problem.id!r:.80} is that of {ids[problem.id]}")
            except _BadRow as e:
                report.bad.append((place, str(e)))
                continue
            report.fields[tuple(names)] += 1
            problems.append(problem)
            if len(problems) == limit:
                return problems, report
    return problems, report


def load_problems(name_or_path, limit=None, max_bad=0.0):
    """[Problem] of a .json, .jsonl or .parquet file, a folder of them, or a set in NAMED. A path that exists never touches the network.

    limit: stop after that many problems. max_bad: share of the rows seen that may be unusable: 0 for evaluation, where other questions
    mean another score, about 0.01 for training. Raises DataError, one line with the first bad places, when there are more or when no row
    is usable; FileNotFoundError for a name that is neither a path nor in NAMED; OSError for a file that may not be read.
    """
    problems, report = read(name_or_path, limit)
    report.check(max_bad)
    for (q, a), n in report.fields.items():
        log.info("%s: question from %r, answer from %r (%d rows)", report.name, q, a, n)
    return problems


# --------------------------------------------------------------------------------------------------------------- choosing, ordering

SHAPES = {  # class of answers: what it looks like once text macros, dollars, spaces and \left \right are gone
    "yes/no": r"(?i:yes|no|true|false)",
    "integer": r"[-+]?(\d+|\d{1,3}(,\d{3})+)",
    "decimal": r"[-+]?\d*\.\d+",
    "fraction": r"[-+]?(\d+/\d+|\\[dtc]?frac(\{[-+]?\d+\}|\d)(\{\d+\}|\d))",
    "choice": r"\(?[A-E]\)?",
    "tuple/interval": r"([\[(]|\\\{).*,.*([\])]|\\\})",
    "expression": r".*",
}


def answer_class(answer):
    """One of SHAPES. Report rewards by class: in DeepMath a fifth of the answers is yes or no, where a guess is right half of the time."""
    s = re.sub(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", answer)
    s = re.sub(r"\\left|\\right|\\[!,;: ]|\\?\$|\s|\{(?=,\})|(?<=,)\}", "", s).rstrip(".")
    return next(
        name for name, shape in SHAPES.items() if re.fullmatch(shape, s, re.ASCII | re.DOTALL)
    )


def select(problems, difficulty=None, classes=None, max_tokens=None, count=None):
    """The problems that pass every filter, in order. Raises DataError, saying what each filter removed, when none is left.

    difficulty: (lowest, highest), both included, of meta's difficulty or level. classes: names of SHAPES. max_tokens: longest prompt as
    measured by count(question) -> int, such as lambda q: len(tokenizer.chat(q)); a longer one is dropped whole, never cut.
    """

    def hard(p):
        number = re.search(
            r"-?\d+(\.\d+)?", str(p.meta.get("difficulty", p.meta.get("level")))
        )  # 5.5, 4 or "Level 4"
        return number and difficulty[0] <= float(number[0]) <= difficulty[1]

    if classes is not None and not set(classes) <= set(SHAPES):
        raise ValueError(
            f"unknown class of answers among {', '.join(map(repr, classes))}; there are {', '.join(SHAPES)}"
        )
    left, said = list(problems), []
    for name, wanted, keep in (
        ("difficulty", difficulty, hard),
        ("classes", classes, lambda p: answer_class(p.answer) in classes),
        ("max_tokens", max_tokens, lambda p: count(p.question) <= max_tokens),
    ):
        if wanted is not None:
            before, left = len(left), [p for p in left if keep(p)]
            said.append(f"{name} {wanted} removed {before - len(left)}")
            log.info("%s of %d problems", said[-1], before)
    if not left:
        raise DataError(
            f"none of {len(problems)} problems is left: {', '.join(said) or 'there were none'}"
        )
    return left


def order(n, seed, epoch):
    """A random permutation of range(n), as a list: indices sorted by SHA-256 of (seed, epoch, index).

    It depends on its arguments alone: no generator's state, no rank, no version of any library.
    """
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed} {epoch} {i}".encode()).digest())


_order = functools.lru_cache(maxsize=4)(
    order
)  # `batch` asks for the same one at every step of an epoch


def batch(problems, step, batch_size, seed):
    """The `batch_size` problems of `step` (from 1 on): a walk through the problems, a new order in each epoch, cut into equal pieces.

    The step is the only cursor, so a resumed run goes on exactly where it was. A batch may end in another epoch than it began in, and so
    hold a problem twice; a set smaller than a batch is walked through as often as it takes.
    """
    if not problems or step < 1 or batch_size < 1:
        raise ValueError(
            f"batch needs problems, step and batch_size from 1 on, not {len(problems)}, {step} and {batch_size}"
        )
    n, start = len(problems), (step - 1) * batch_size
    return [problems[_order(n, seed, i // n)[i % n]] for i in range(start, start + batch_size)]


# ------------------------------------------------------------------------------------------------------------------ looking at them


def fingerprint(problems):
    """SHA-256 (hex) of the questions and answers in their order: runs with equal ones were given the same data."""
    return hashlib.sha256(
        "".join(json.dumps([p.question, p.answer]) + "\n" for p in problems).encode()
    ).hexdigest()


def unverifiable(problems):
    """The problems whose gold answer the verifier rejects when a response says exactly that: nothing can earn their reward."""
    return [p for p in problems if not verify.verify(f"\\boxed{{{p.answer}}}", p.answer)]


def _fold(text):
    return " ".join(text.split()).casefold()


def overlap(problems, others, n=20):
    """Questions shared with `others`: ([(i, j)] equal but for spaces and case, {i: share of its runs of n words that others have too}).

    Equal questions are in the first alone, questions below n words can only be there. A few per cent is boilerplate, half a paraphrase.
    """

    def runs(p):
        words = _fold(p.question).split()
        return {hash(" ".join(words[k : k + n])) for k in range(len(words) - n + 1)}

    place = {_fold(p.question): j for j, p in enumerate(others)}
    equal = [
        (i, place[_fold(p.question)]) for i, p in enumerate(problems) if _fold(p.question) in place
    ]
    mine = {i: runs(p) for i, p in enumerate(problems) if _fold(p.question) not in place}
    wanted = set().union(*mine.values())
    seen = {
        run for p in others for run in runs(p) if run in wanted
    }  # of `others`, perhaps 100,000 questions, nothing else is kept
    return equal, {i: len(r & seen) / len(r) for i, r in mine.items() if r & seen}


def describe(problems, report, count=None):
    """Print a set's answers, lengths, first rows, bad rows and the verifier's self-check. Returns how many answers the verifier rejects."""
    print(
        f"{report.name}: {len(problems)} problems of {report.rows} rows, sha256 {fingerprint(problems)}"
    )
    for (q, a), n in report.fields.items():
        print(f"  question from {q!r}, answer from {a!r}: {n} rows")
    for name, n in collections.Counter(answer_class(p.answer) for p in problems).most_common():
        print(f"  answer is {name:15} {n:6}  {n / len(problems):6.1%}")
    lengths = {
        "question, characters": [len(p.question) for p in problems],
        "answer, characters": [len(p.answer) for p in problems],
        "prompt, tokens": [count(p.question) for p in problems] if count else [],
    }
    for name, s in ((name, sorted(values)) for name, values in lengths.items() if values):
        print(
            f"  {name:25} median {s[len(s) // 2]:,}   95 % up to {s[len(s) * 95 // 100]:,}   longest {s[-1]:,}"
        )
    print(f"  {len(problems) - len({_fold(p.question) for p in problems})} questions are repeated")
    for p in problems[:3]:
        print(f"  {p.id}  {p.question[:100]!r} -> {p.answer[:60]!r}")
    print(
        f"{len(report.bad)} bad rows",
        *(f"{place}: {why}" for place, why in report.bad[:20]),
        sep="\n  ",
    )
    failed = unverifiable(problems)
    print(
        f"the verifier rejects {len(failed)} of {len(problems)} answers when a response says exactly that",
        *(f"{p.id}: {p.answer!r}" for p in failed[:20]),
        sep="\n  ",
    )
    return len(failed)


def main():
    parser = argparse.ArgumentParser(
        description="What is in a set of problems, and is it fit for training or evaluation? Exit code 2: usage; 3: bad data.",
        epilog=f"Named sets: {', '.join(NAMED)}. Example: python data.py deepmath --difficulty 5 7 --against math500",
    )
    add = parser.add_argument
    add(
        "data",
        metavar="NAME_OR_PATH",
        help=f"a named set, a file ({', '.join(READERS)}) or a folder of them",
    )
    add(
        "--against",
        metavar="OTHER",
        help="also count the questions that this set has in common with it",
    )
    add("--limit", type=int, metavar="N", help="read the first N problems (default: all)")
    add(
        "--max-bad",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of bad rows that is no error (default: 0; training allows 0.01)",
    )
    add = parser.add_argument_group("filters (default: keep all)").add_argument
    add(
        "--difficulty",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="keep this difficulty or level, both ends included",
    )
    add(
        "--classes",
        nargs="+",
        choices=SHAPES,
        metavar="CLASS",
        help=f"keep these classes of answers: {', '.join(SHAPES)}",
    )
    add("--max-tokens", type=int, metavar="N", help="keep prompts of at most N tokens")
    add("--tokenizer", metavar="FOLDER", help="model folder that counts them")
    args = parser.parse_args()
    if args.max_tokens and not args.tokenizer:
        parser.error("--max-tokens needs --tokenizer FOLDER, the model folder that counts them")
    if (
        not 0 <= args.max_bad <= 1
        or 0 in (args.limit, args.max_tokens)
        or min(args.limit or 1, args.max_tokens or 1) < 0
    ):
        parser.error(
            "--max-bad is a share from 0 to 1, --limit and --max-tokens are whole numbers from 1 on"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a file name or an answer must not break a terminal that is not UTF-8
    count = None
    if args.tokenizer:
        import tokenizer

        chat = tokenizer.load(args.tokenizer).chat
        count = lambda question: len(chat(question))  # noqa: E731
    problems, report = read(args.data, args.limit)
    if problems:
        problems = select(problems, args.difficulty, args.classes, args.max_tokens, count)
        failed = describe(problems, report, count)
    if problems and args.against:
        others = load_problems(args.against, max_bad=1)
        equal, shared = overlap(problems, others)
        print(
            f"{len(equal)} questions are equal to one of {args.against}, {len(shared)} others share runs of 20 words with it",
            *(f"{problems[i].id} = {others[j].id}" for i, j in equal[:20]),
            *(
                f"{problems[i].id}: {part:.0%} of its runs"
                for i, part in sorted(shared.items(), key=lambda x: -x[1])[:20]
            ),
            sep="\n  ",
        )
    report.check(args.max_bad)
    if failed > 0.01 * len(problems):
        raise DataError(
            f"{report.name}: the verifier rejects {failed} of {len(problems)} answers, more than 1 in 100"
        )


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(
            print(f"data.py: {error}", file=sys.stderr)
            or (2 if isinstance(error, FileNotFoundError) else 3)
        )
