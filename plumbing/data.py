"""Problems with known answers: from a file, a folder, a named set on the Hugging Face hub, or made
here.

    problems = data.load_problems("deepmath", difficulty=(5, 8), max_bad=0.01)
    problems, dropped = data.without_shared(problems, tests)
    data.batch(problems, step=7, batch_size=128, seed=0)   what step 7 sees, whatever came before

A row is used as it stands or not at all. One that cannot be used is skipped and reported with its
place, and more of them than the caller allows is an error: a run that silently learns from half of
its file is worse than one that does not start.
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
import unicodedata
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet

import verify
from plumbing import arithmetic, download
from plumbing.rows import printable

log = logging.getLogger("nanobupo.data")

# Of these the first that a row has is read, whatever its case. Rows in verl's format have
# `prompt`, a list of messages, and `reward_model.ground_truth`. All named sets are covered:
# aime24 has only a `solution`, everywhere else the answer has its own column.
QUESTION = ("problem", "question", "prompt")
ANSWER = ("answer", "final_answer", "solution", "ground_truth")
VERL_ANSWER = "reward_model.ground_truth"
META = ("difficulty", "level", "subject")
COLUMNS = (*QUESTION, *ANSWER, "reward_model", "id", "unique_id", *META)  # of parquet files
MAX_CHARS = 100_000  # of one field; the longest question of the sets below that evaluate has 1,895


@dataclass(frozen=True)
class Named:
    """A set on the hub: its repository, the commit that is meant, and {file: its SHA-256, or None
    where not known}.

    evaluation: whether it is there to measure with, and not to be trained on.
    draw: so many rows of each file instead of all, the same ones for everybody (see `drawn`).
    """

    repo: str
    revision: str  # a commit means the same rows for ever; "main" would mean "not pinned"
    files: dict
    evaluation: bool = False
    draw: int | None = None


DEEPMATH_SHA256 = """
d6412432f30425e848a224dc641e681eb1ed51b970d52536eda7daefc01d8c8b
eef9d3012456239eb0f4cd462ac7bebb7d6c4f675c41329c680ef8a506ded512
20e4dc6527d94c2057a9b727f8b58994395de602e284b3294f7d2451f75d681a
c5b20135f93e7890da191973ad77d88e67c95144ccc169ec592489f044e7c38a
4153e531d78ca278d2e12e6d08099b66126b26b99ca6a92b3d6f95c156818749
110586bdc6f35b0434bccbd582f1e97e8328da0752ccd36590a50178885f0360
e39c00ed42a6a1af74ddc042840884a59adcb9139a23f535e399ddf0c292ef76
fdeb213b5c2d0bb50f1081ae48b7ce4fa38147efe623de5d6d836a32f4044dad
d8e5b1417f0364312896d259efbea0600c1fac22eacb2f71187c5b0e9704f388
67639c6620cabce348e91c2cc331c4877307ed1a5d8fbd1c0d7dcca561cea8df
""".split()
DEEPMATH = (
    "zwhe99/DeepMath-103K",
    "5cf055d1fe3d7a2eb19719ac020211469736ae44",
    {f"data/train-{i:05}-of-00010.parquet": hash for i, hash in enumerate(DEEPMATH_SHA256)},
)
GSM8K = ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866")
GSM8K_TRAIN_SHA256 = "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d"
PARQUET = "test-00000-of-00001.parquet"

NAMED = {
    "math500": Named(  # 500 problems
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {"test.jsonl": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"},
        evaluation=True,
    ),
    "amc23": Named(  # 40
        "math-ai/amc23",
        "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        {PARQUET: "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e"},
        evaluation=True,
    ),
    "aime24": Named(  # 30
        "math-ai/aime24",
        "83a7f387baaa524a8bda0022eac0541582297103",
        {PARQUET: "2602156eb2a0ab64393dc46617a3bfee3451ae3c985a7ea6ac2b55436e094a38"},
        evaluation=True,
    ),
    "aime25": Named(  # 30
        "math-ai/aime25",
        "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        {"test.jsonl": "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"},
        evaluation=True,
    ),
    "gsm8k": Named(  # 7,473
        *GSM8K,
        {"main/train-00000-of-00001.parquet": GSM8K_TRAIN_SHA256},
    ),
    "gsm8k-test": Named(  # 1,319
        *GSM8K,
        {f"main/{PARQUET}": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59"},
        evaluation=True,
    ),
    "deepmath": Named(*DEEPMATH, draw=500),  # 5,000, as many as the paper trains on
    "deepmath-103k": Named(*DEEPMATH),  # 103,022; either is a download of 2.1 GB
    "deepscaler": Named(  # 40,315
        "agentica-org/DeepScaleR-Preview-Dataset",
        "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        {"deepscaler.json": None},
    ),
}
NAMED["gsm8k-train"] = NAMED["gsm8k"]


def needs_hub(name) -> bool:
    """Whether a set is one of those that are fetched, and not a file or made here."""
    return str(name) in NAMED and not _exists(name)


def is_evaluation(name) -> bool:
    """Whether a set is named one to measure with: training on it is a mistake unless somebody says
    that it is not."""
    name = str(name)
    held_out = bool(re.fullmatch(r"(sums|words)-(test|long)(:.*)?", name))
    return held_out or (name in NAMED and NAMED[name].evaluation)


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer, where they came from.

    `id` is unique in what one call loads; `meta` has difficulty, level, subject.
    """

    question: str
    answer: str
    id: str = ""
    source: str = ""
    meta: dict = field(default_factory=dict, compare=False)


class DataError(ValueError):
    """The data cannot be used as it is. The message is one line: what, where, and what to do."""

    exit_code = 3

    def __init__(self, message):
        super().__init__(printable(message, keep=""))  # it may quote the data


class _BadRow(ValueError):
    """One row cannot be used; the message says why."""


def _short(text):
    return printable(" ".join(str(text).split()))[:160]


# ---------------------------------------------------------------------------- where the files are


def hub_file(repo, file, revision, sha256=None):
    """Path of one file of a hub data set, from the cache if it is there; compared with its hash
    either way.

    Raises DataError saying what failed and what to do.
    """
    try:
        path = download.fetch("dataset", repo, revision, file)
        download.check(path, sha256)
    except download.HubError as e:
        raise DataError(str(e)) from None
    return path


def _exists(name):
    return os.path.exists(os.path.expanduser(str(name)))


def _local(path):
    """The files to read at a path: itself, or those of the folder that it is."""
    files = [path]
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in READERS]
    kinds = ", ".join(READERS)
    if not files:
        raise DataError(f"{path}: no {kinds} file in this folder")
    if files[0].suffix.lower() not in READERS:
        raise DataError(f"{path}: cannot read this kind of file; convert it to one of {kinds}")
    for p in files:
        if not p.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{p}: not a file (a pipe, device or broken link)")
    return files


def drawn(rows, number, size) -> set[int]:
    """Which rows (from 1) of the file with that number (from 0) are drawn: `size` of them, by
    `order` of seed 0.

    All rows are equally likely, and no file has to be read for the draw from another one.
    """
    return {i + 1 for i in order(rows, 0, number)[:size]}


def _rows(name, revision):
    """Iterator of (place, row or the _BadRow it is, source) of what a name stands for.

    A path that exists wins over a named set, and needs no network. Files of a named set are
    fetched one by one, as the iterator comes to them: with a limit, later ones never are.
    """
    named = NAMED[name] if needs_hub(name) else None
    if revision and not named:
        raise ValueError(f"{name} has no revisions; sets on the hub have: {', '.join(NAMED)}")
    if _exists(name):
        for path in _local(Path(name).expanduser()):
            for place, row in READERS[path.suffix.lower()](path):
                yield place, row, path.stem
    elif named:
        for number, (file, sha256) in enumerate(named.files.items()):
            if revision not in (None, named.revision):
                sha256 = None  # another revision has other hashes
            path = hub_file(named.repo, file, revision or named.revision, sha256)
            rows = READERS[path.suffix](path)
            if named.draw:
                rows = list(rows)
                rows = [rows[n - 1] for n in sorted(drawn(len(rows), number, named.draw))]
            for place, row in rows:
                yield place, row, name
    elif (made := arithmetic.problems(name)) is not None:
        for n, (question, answer) in enumerate(made, 1):
            yield f"{name} row {n}", {"question": question, "answer": answer}, name
    else:
        names = [*NAMED, "sums", "sums-test", "sums-long", "words", "words-test"]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the named sets are {', '.join(names)}"
        raise FileNotFoundError(f"there is no file, folder or named set {name!r}; {hint}")


# ------------------------------ the three formats: iterators of (place, row or the _BadRow it is)


def _json_value(raw):
    try:
        # -sig: Windows editors begin a file with a byte order mark
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        # not UTF-8, not JSON, a number of more than 4,300 digits, nesting thousands deep
        return _BadRow(f"not JSON: {_short(e).replace('line 1 column', 'column')}")


def _jsonl_rows(path):
    with open(path, "rb") as f:  # bytes: one undecodable line must not take the others with it
        for n, raw in enumerate(f, 1):
            if raw.strip():
                yield f"{path.name}:{n}", _json_value(raw)


def _json_rows(path):
    raw = path.read_bytes()
    value = _json_value(raw) if raw.strip() else []
    if isinstance(value, _BadRow) and re.match(rb"\s*\{.*\}\s*\n\s*\{", raw):
        yield from _jsonl_rows(path)  # many a .json file has one object a line
        return
    if isinstance(value, _BadRow):
        raise DataError(f"{path}: {value}; repair it, or {download.again(path)}")
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        lists = [v for v in lists if all(isinstance(row, dict) for row in v)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected an array of objects, or one object with exactly one such array in it"
        )
    for n, row in enumerate(value, 1):
        yield f"{path.name} row {n}", row


def _parquet_rows(path):
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            has = f.schema_arrow.names
            if not _pick(has, QUESTION) or not (_pick(has, ANSWER) or "reward_model" in has):
                raise DataError(
                    f"{path}: needs a column {' or '.join(QUESTION)} "
                    f"and one {' or '.join(ANSWER)}; it has {_short(has)}"
                )
            # Only these are read: DeepMath has three long solutions beside each question, nearly
            # all of its 2 GB.
            columns = [name for name in has if name.lower() in COLUMNS]
            for part in f.iter_batches(batch_size=1024, columns=columns):
                for row in part.to_pylist():
                    n += 1
                    yield f"{path.name} row {n}", row
    except DataError:
        raise
    except Exception as e:  # of pyarrow's own, or of a value that Python has nothing for
        raise DataError(
            f"{path}: not a readable parquet file ({_short(e)}); {download.again(path)}"
        ) from None


READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


# ------------------------------------------------------------------------ from a row to a problem


def _pick(names, aliases):
    lower = {name.lower(): name for name in names}
    return next((lower[alias] for alias in aliases if alias in lower), None)


def _text(value, name):
    """`value` as clean text: no space around it, lines end in \\n.

    Raises _BadRow for what no tokenizer or verifier should see.
    """
    if not isinstance(value, str):
        raise _BadRow(
            f"{name!r} is {'null' if value is None else type(value).__name__}, expected text"
        )
    if len(value) > MAX_CHARS:
        raise _BadRow(f"{name!r} has {len(value):,} characters, at most {MAX_CHARS:,} are read")
    strange = re.search("[\0\ufeff\ud800-\udfff]", value)
    if strange:
        raise _BadRow(
            f"{name!r} contains U+{ord(strange[0]):04X} "
            "(a NUL, byte order mark or half of a surrogate pair)"
        )
    value = value.replace("\r\n", "\n").strip()
    if not value:
        raise _BadRow(f"{name!r} is empty")
    return value


def _answer(value, name):
    """The gold answer as text: numbers in their shortest form (27.0 -> 27), worked solutions cut to
    their \\boxed{} or #### answer."""
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        # by way of its shortest form: int(1e23) would be 99999999999999991611392
        number = Decimal(str(value))
        if not number.is_finite():
            raise _BadRow(f"{name!r} is {value}")
        value = format(number, "f")
    text = _text(value, name)
    if re.search(r"\\f?box|####", text):
        parts = verify.boxes(text)  # of the last sentence, where they are a list
        text = ", ".join(parts) if len(parts) > 1 else verify.extract(text)
        if not text:
            raise _BadRow(f"{name!r} has no answer in its last \\boxed{{}} or ####")
    elif name.lower() == "solution" and not re.fullmatch(r"\$?[-+]?[\d.,/]+\$?", text):
        # the last number of a worked solution would be a guess; a wrong gold answer is worse than
        # a row less
        raise _BadRow(
            f"{name!r} has neither \\boxed{{}} nor ####; put the bare answer into a field 'answer'"
        )
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def _problem(row, place, source):
    """(Problem, names of its question's and its answer's field) of one row; raises _BadRow."""
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"{type(row).__name__}, expected an object")
    nested = row.get("reward_model")
    if isinstance(nested, dict) and "ground_truth" in nested:
        row = {**row, VERL_ANSWER: nested["ground_truth"]}
    q, a = _pick(row, QUESTION), _pick(row, (*ANSWER, VERL_ANSWER))
    if q is None or a is None:
        wanted = ", ".join(QUESTION if q is None else ANSWER)
        has = _short(list(row)) if row else "none"
        raise _BadRow(f"none of the fields {wanted}; it has {has}")
    question = row[q]
    if isinstance(question, list):
        messages = [m for m in question if isinstance(m, dict) and m.get("role") == "user"]
        if len(messages) != 1:
            raise _BadRow(f"{q!r} has {len(messages)} user messages, expected one")
        question = messages[0].get("content")
    own = row.get(_pick(row, ("id", "unique_id")))
    if isinstance(own, (str, int)) and own != "":
        place = f"{source}/{_text(str(own), 'id')}"
    meta = {k: row[k] for k in META if isinstance(row.get(k), (str, int, float))}
    return Problem(_text(question, q), _answer(row[a], a), place, source, meta), q, a


def difficulty_of(problem) -> float | None:
    """The number in its row's difficulty or level (5.5, 4, "Level 4"), or None."""
    value = str(problem.meta.get("difficulty", problem.meta.get("level")))
    number = re.search(r"-?\d+(\.\d+)?(e[+-]\d+)?", value)
    return float(number[0]) if number else None


@dataclass
class Report:
    """What was read."""

    name: str
    rows: int = 0
    # (question's field, answer's field): number of rows that had them
    fields: collections.Counter = field(default_factory=collections.Counter)
    bad: list = field(default_factory=list)  # (place, why) of the unusable rows

    def check(self, max_bad):
        """Raise DataError when there are no usable rows, or more than the share `max_bad` of
        unusable ones; log what was skipped."""
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the rows, from 0 to 1, not {max_bad}")
        if not self.rows:
            raise DataError(f"{self.name}: there are no rows in it")
        first = "; ".join(f"{place}: {why}" for place, why in self.bad[:3])
        said = f"{self.name}: {len(self.bad)} of {self.rows} rows are unusable ({first})"
        if len(self.bad) == self.rows or len(self.bad) > max_bad * self.rows:
            raise DataError(
                f"{said}; at most {max_bad:.4g} of them may be: repair them, remove them, "
                "or allow more (max_bad)"
            )
        if self.bad:
            log.warning("%s", printable(said, keep=""))


def _usable(report, revision):
    """Iterator of the problems of a set. What was read goes into the report, bad rows too."""
    places = {}  # {id: place}; samples and seeds are told apart by the id
    for place, row, source in _rows(report.name, revision):
        report.rows += 1
        try:
            problem, *names = _problem(row, place, source)
            if places.setdefault(problem.id, place) != place:
                raise _BadRow(f"the id {problem.id!r:.80} is that of {places[problem.id]}")
        except _BadRow as e:
            report.bad.append((place, str(e)))
        else:
            report.fields[tuple(names)] += 1
            yield problem


def read_problems(name_or_path, limit=None, difficulty=None, revision=None):
    """([Problem], Report): every usable row, however many are not.

    Raises as `load_problems` for what cannot be read at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of problems from 1 on, not {limit}")
    lowest, highest = difficulty or (-math.inf, math.inf)
    if not lowest <= highest:
        raise ValueError(f"difficulty is (lowest, highest), not {difficulty}")
    report = Report(str(name_or_path))
    problems, left_out = [], []  # left_out: difficulties
    for problem in _usable(report, revision):
        hard = difficulty_of(problem)
        if difficulty and (hard is None or not lowest <= hard <= highest):
            left_out.append(hard)
            if left_out == [None] * 1000:
                break  # there is no such column: no reason to fetch the next file
            continue
        problems.append(problem)
        if len(problems) == limit:
            break
    if left_out and not problems:
        known = [hard for hard in left_out if hard is not None]
        theirs = "it has no such column"
        if known:
            theirs = f"theirs go from {min(known):g} to {max(known):g}"
        raise DataError(
            f"{report.name}: no problem has a difficulty or level from {lowest:g} to {highest:g}; "
            f"{theirs}"
        )
    if left_out:
        log.info("%s: difficulty %g to %g left out %d", report.name, lowest, highest, len(left_out))
    return problems, report


def load_problems(name_or_path, limit=None, max_bad=0.0, difficulty=None, revision=None):
    """[Problem] of a .json, .jsonl or .parquet file, a folder of them, a set in NAMED, or one made
    here.

    limit: stop after that many problems, and fetch no file beyond.
    max_bad: share of the rows seen that may be unusable: 0 for evaluation, where other questions
    mean another score, about 0.01 for training.
    difficulty: (lowest, highest), both included, of the row's difficulty or level.
    revision: a branch, tag or commit in place of the commit that NAMED has.

    A path that exists never touches the network. Raises DataError, one line with the first bad
    places, when more rows are unusable or when none is left; FileNotFoundError for a name that is
    nothing of all this; OSError for a file that may not be read.
    """
    problems, report = read_problems(name_or_path, limit, difficulty, revision)
    report.check(max_bad)
    for (q, a), n in report.fields.items():
        log.info("%s: question from %r, answer from %r (%d rows)", report.name, q, a, n)
    return problems


# ----------------------------------------------------------------------------- choosing, ordering


# what is no part of a question: LaTeX that only moves things apart, delimiters of maths, braces,
# punctuation
SPACING = re.compile(
    r"\\\\|\\[ ,;:!()\[\]$]|\\(?:quad|qquad|left|right|displaystyle)(?![a-z])"
    r"|[.](?!\d)|[,;:!?'\"`~${}\u2018-\u201f]"
)


def normalised(question) -> str:
    """What questions have in common that differ in case, spaces, LaTeX's spacing or punctuation
    alone.

    Symbols and numbers stay apart as they are: x + 1 is x+1, 1.5 is not 15.
    """
    text = SPACING.sub(" ", unicodedata.normalize("NFKC", question).casefold())
    parts = re.findall(r"\\?[^\W\d_]+|\d*\.\d+|\d+|\S", text)
    return " ".join(parts) or question


def without_shared(train, held_out):
    """(the problems of `train` whose question is none of `held_out`, how many were dropped)."""
    taken = {normalised(p.question) for p in held_out}
    kept = [p for p in train if normalised(p.question) not in taken]
    return kept, len(train) - len(kept)


def order(n, seed, epoch):
    """A random permutation of range(n), as a list: indices sorted by SHA-256 of (seed, epoch,
    index).

    It depends on its arguments alone: no generator's state, no rank, no version of any library.
    """
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed} {epoch} {i}".encode()).digest())


# `batch` asks for the same one at every step of an epoch
_order = functools.lru_cache(maxsize=4)(order)


def batch(problems, step, batch_size, seed):
    """The `batch_size` problems of `step` (from 1 on): a walk through the problems, a new order in
    each epoch, cut into equal pieces.

    The step is the only cursor, so a resumed run goes on exactly where it was. A batch may end in
    another epoch than it began in, and so hold a problem twice; a set smaller than a batch is
    walked through as often as it takes.
    """
    if not problems or step < 1 or batch_size < 1:
        raise ValueError("batch needs problems, and a step and batch_size from 1 on")
    n, start = len(problems), (step - 1) * batch_size
    return [problems[_order(n, seed, i // n)[i % n]] for i in range(start, start + batch_size)]


# -------------------------------------------------------------------------------- looking at them


def fingerprint(problems):
    """SHA-256 (hex) of questions and answers in their order: runs with equal ones had the same
    data."""
    lines = (json.dumps([p.question, p.answer]) + "\n" for p in problems)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def span(text) -> tuple[float, float]:
    """argparse type of --difficulty: 5-8, 5.5-8 or 6, as (lowest, highest)."""
    shape = r"\d+(\.\d+)?(-\d+(\.\d+)?)?"
    numbers = [float(n) for n in text.split("-")] if re.fullmatch(shape, text) else []
    if not numbers or numbers[0] > numbers[-1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a difficulty such as 5-8 or 6")
    return numbers[0], numbers[-1]
