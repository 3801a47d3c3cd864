"""data.py: every format and alias, rows that cannot be used, the hub without a hub, the order of
training, the report."""

import argparse
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub import damage, empty_cache, fill

import tiny
from plumbing import arithmetic, data, download
from plumbing.cli import guarded
from plumbing.data import DataError, Problem, load_problems
from tools import problems as tool
from verify import verifiable

ROWS = [{"problem": "What is 1+1?", "answer": "2"}, {"problem": "Is 7 prime?", "answer": "Yes"}]
PAIRS = [("What is 1+1?", "2"), ("Is 7 prime?", "Yes")]


def pairs(problems):
    return [(p.question, p.answer) for p in problems]


def write(path, *rows):
    """JSONL; bytes are written as they are."""
    path.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return path


def answer_of(tmp_path, row):
    return load_problems(write(tmp_path / "one.jsonl", {"question": "q", **row}))[0].answer


def verl(question, answer, **more):
    return {
        "data_source": "x",
        "prompt": [
            {"role": "system", "content": "Use \\boxed{}."},
            {"role": "user", "content": question},
        ],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": -1},
        **more,
    }


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"version": 1, "data": ROWS, "notes": ["no", "rows"]})),
        ("a.json", "\n".join(map(json.dumps, ROWS)) + "\n"),  # JSON lines under the wrong name
        ("a.JSONL", "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n"),
        ("bom.jsonl", "\ufeff" + "\n".join(map(json.dumps, ROWS))),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("an odd näme.jsonl", "\n\n".join(map(json.dumps, ROWS))),
    ],
)
def test_json_in_its_shapes(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    problems = load_problems(tmp_path / name)
    assert pairs(problems) == PAIRS
    assert {p.source for p in problems} == {(tmp_path / name).stem} and len(
        {p.id for p in problems}
    ) == 2
    assert pairs(load_problems(str(tmp_path / name), limit=1)) == PAIRS[:1]


def test_parquet_verl_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist([verl(q, a) for q, a in PAIRS]), tmp_path / "v.parquet")
    problems, report = data.read_problems(tmp_path / "v.parquet")
    assert pairs(problems) == PAIRS and report.fields == {
        ("prompt", "reward_model.ground_truth"): 2
    }
    write(tmp_path / "v.jsonl", *[verl(q, a) for q, a in PAIRS])
    assert pairs(load_problems(tmp_path / "v.jsonl")) == PAIRS


def test_parquet_reads_only_the_columns_it_uses(tmp_path):
    """DeepMath's layout. The bytes of the column that must not be read are destroyed: reading it
    would raise."""
    path, n = tmp_path / "d.parquet", 3000
    junk = [f"a long solution number {i}" * 5 for i in range(n)]
    pq.write_table(
        pa.table(
            {
                "question": [f"q{i}" for i in range(n)],
                "final_answer": [str(i) for i in range(n)],
                "difficulty": [i / 2 for i in range(n)],
                "r1_solution_1": junk,
            }
        ),
        path,
        compression="snappy",
    )
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(
        group.column(i) for i in range(4) if group.column(i).path_in_schema == "r1_solution_1"
    )
    raw = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table(path, columns=["r1_solution_1"])
    problems = load_problems(path)
    assert pairs(problems) == [(f"q{i}", str(i)) for i in range(n)]
    assert problems[5].meta == {"difficulty": 2.5} and len({p.id for p in problems}) == n


def test_folder_reads_its_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", {"id": 1, "question": "b", "answer": 1})
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "question": "a", "answer": 1}]))
    pq.write_table(
        pa.table({"id": [1], "question": ["c"], "answer": ["1"]}), tmp_path / "c.parquet"
    )
    (tmp_path / "README.md").write_text("not data")
    problems = load_problems(tmp_path)
    assert [(p.question, p.source, p.id) for p in problems] == [
        ("a", "a", "a/1"),
        ("b", "b", "b/1"),
        ("c", "c", "c/1"),
    ]


# ----------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    "q, a", [(q, a) for q in data.QUESTION for a in data.ANSWER] + [("Problem", "Answer")]
)
def test_every_alias(tmp_path, q, a):
    problems, report = data.read_problems(write(tmp_path / "a.jsonl", {q: " how many? ", a: "27"}))
    assert pairs(problems) == [("how many?", "27")] and report.fields == {(q, a): 1}
    pq.write_table(pa.Table.from_pylist([{q: "how many?", a: 27.0}]), tmp_path / "a.parquet")
    assert pairs(load_problems(tmp_path / "a.parquet")) == [("how many?", "27")]


def test_first_alias_wins_and_is_logged(tmp_path, caplog):
    row = {
        "solution": "So \\boxed{9}.",
        "answer": "5",
        "question": "second",
        "problem": "first",
        "prompt": "third",
    }
    with caplog.at_level("INFO", "nanobupo.data"):
        assert pairs(load_problems(write(tmp_path / "a.jsonl", row))) == [("first", "5")]
    assert "'problem'" in caplog.text and "'answer'" in caplog.text


@pytest.mark.parametrize(
    "value, text",
    [
        (27, "27"),
        (27.0, "27"),
        ("27.0", "27"),
        ("-3.00", "-3"),
        (0.5, "0.5"),
        (-1e-7, "-0.0000001"),
        (1e22, "10000000000000000000000"),
        (1e23, "100000000000000000000000"),
        ("0.50", "0.50"),
        (" \\frac{1}{2} ", "\\frac{1}{2}"),
        ("1.0.0", "1.0.0"),
        ("We get \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("First \\boxed{1}, then \\boxed{2}.", "2"),
        ("So $x$ is \\boxed{1} or \\boxed{-2}.", "1, -2"),
        ("She has 3 * 6 = <<3*6=18>>18 eggs.\n#### 18", "18"),
        ("A lot.\n#### 1,080", "1,080"),
    ],
)
def test_answers(tmp_path, value, text):
    assert answer_of(tmp_path, {"answer": value}) == text


def test_answer_from_decimal_column(tmp_path):
    pq.write_table(
        pa.table({"question": ["a", "b"], "answer": [Decimal("27.000"), Decimal("0.125")]}),
        tmp_path / "d.parquet",
    )
    assert [p.answer for p in load_problems(tmp_path / "d.parquet")] == ["27", "0.125"]


def test_solution_needs_a_marked_answer(tmp_path):
    assert answer_of(tmp_path, {"solution": "\\boxed{204}"}) == "204"
    assert answer_of(tmp_path, {"solution": "$204$"}) == "$204$"
    for text in ("The answer is 5.", "Adding 2 and 3 gives 5", "We get \\boxed{5", "So \\boxed{}"):
        with pytest.raises(DataError, match="one.jsonl:1: 'solution'"):
            answer_of(tmp_path, {"solution": text})


def test_ids_and_meta(tmp_path):
    rows = [
        {
            "question": "a",
            "answer": 1,
            "unique_id": "test/1.json",
            "level": 4,
            "subject": "Algebra",
            "other": 1,
        },
        {"question": "b", "answer": 1, "id": 0},
        {"question": "c", "answer": 1, "id": None, "difficulty": 5.5},
    ]
    assert load_problems(write(tmp_path / "a.jsonl", *rows)) == [
        Problem("a", "1", "a/test/1.json", "a"),
        Problem("b", "1", "a/0", "a"),
        Problem("c", "1", "a.jsonl:3", "a"),
    ]
    assert [p.meta for p in load_problems(tmp_path / "a.jsonl")] == [
        {"level": 4, "subject": "Algebra"},
        {},
        {"difficulty": 5.5},
    ]


# --------------------------------------------------------------------------------------- bad rows

GOOD = [{"question": f"good {i}", "answer": i} for i in range(99)]
BAD = {
    "cut off": (b'{"question": "q", "answ', "not JSON"),
    "not UTF-8": (b'{"question": "\xff", "answer": 1}', "not JSON.*utf-8"),
    "nested deep": (b"[" * 100_000, "not JSON"),
    "a list": (b"[1, 2]", "list, expected an object"),
    "null row": (b"null", "NoneType, expected"),
    "digits": (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
    "no question": (
        {"q": "?", "answer": 1},
        r"none of the fields problem, question, prompt; it has \['q', 'answer'\]",
    ),
    "no answer": ({"question": "q"}, "none of the fields answer, final_answer"),
    "empty row": ({}, "it has none"),
    "null": ({"question": "q", "answer": None}, "'answer' is null"),
    "empty": ({"question": " \n", "answer": 1}, "'question' is empty"),
    "wrong type": ({"question": 5, "answer": 1}, "'question' is int"),
    "list": ({"question": "q", "answer": ["1"]}, "'answer' is list"),
    "bool": ({"question": "q", "answer": True}, "'answer' is bool"),
    "nan": (b'{"question": "q", "answer": NaN}', "'answer' is nan"),
    "inf": (b'{"question": "q", "answer": 1e999}', "'answer' is inf"),
    "huge": ({"question": "q" * 100_001, "answer": 1}, "100,001 characters"),
    "NUL": ({"question": "a\0b", "answer": 1}, r"U\+0000"),
    "surrogate": (b'{"question": "a\\ud800b", "answer": 1}', r"U\+D800"),
    "BOM inside": ({"question": "a", "answer": "\ufeff1"}, r"U\+FEFF"),
    "no user": ({"prompt": [{"role": "system", "content": "s"}], "answer": 1}, "0 user messages"),
    "two users": (
        {"prompt": [{"role": "user", "content": "s"}] * 2, "answer": 1},
        "2 user messages",
    ),
    "messages of another kind": (
        {"prompt": ["s", {"role": "user", "content": ["x"]}], "answer": 1},
        "'prompt' is list",
    ),
    "no ground truth": (
        {"question": "q", "reward_model": {"style": "rule"}},
        "none of the fields answer",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_is_skipped_with_its_place(tmp_path, kind, caplog):
    row, why = BAD[kind]
    path = write(tmp_path / "t.jsonl", *GOOD[:40], row, *GOOD[40:])
    with pytest.raises(DataError, match=rf"1 of 100 rows are unusable \(t.jsonl:41: .*{why}") as e:
        load_problems(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    assert len(load_problems(path, max_bad=0.01)) == 99
    assert "t.jsonl:41" in caplog.text


NAMES = st.sampled_from(
    [*data.QUESTION, *data.ANSWER, *data.META, "id", "reward_model", "role", "content", "x"]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "\\boxed{1}", "#### "])
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=5), max_leaves=12
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=8) | VALUES)
def test_any_row_is_a_problem_or_a_bad_row(row):
    try:
        problem, q, a = data._problem(row, "f:1", "f")
    except data._BadRow as e:
        assert "\n" not in str(e)
    else:
        assert (
            problem.question.encode()
            and problem.answer.encode()
            and problem.id.encode()
            and q in row
            and isinstance(a, str)
        )


def test_crlf_inside_text_becomes_a_line_end(tmp_path):
    assert (
        load_problems(write(tmp_path / "a.jsonl", {"question": "a\r\nb", "answer": 1}))[0].question
        == "a\nb"
    )


def test_share_of_bad_rows(tmp_path):
    path = write(tmp_path / "t.jsonl", *GOOD[:98], b"?", b"??")
    with pytest.raises(DataError, match="t.jsonl:99: .*; t.jsonl:100: .*at most 0.01 of them"):
        load_problems(path, max_bad=0.01)
    assert len(load_problems(path, max_bad=0.02)) == 98
    assert len(load_problems(path, limit=98)) == 98  # the rows behind the limit are not looked at
    with pytest.raises(ValueError, match="from 0 to 1"):
        load_problems(path, max_bad=2)
    with pytest.raises(
        DataError, match="2 of 2 rows"
    ):  # nothing left is an error whatever is allowed
        load_problems(write(tmp_path / "u.jsonl", b"?", b"??"), max_bad=1)


def test_repeated_id(tmp_path):
    path = write(
        tmp_path / "t.jsonl", *({"id": i, "question": str(i), "answer": i} for i in (7, 8, 7))
    )
    with pytest.raises(DataError, match="t.jsonl:3: the id 't/7' is that of t.jsonl:1"):
        load_problems(path)


@pytest.mark.parametrize("depth", [100, 900, 10_000])
@pytest.mark.parametrize("name", ["question", "answer", "id", "level", "other", "reward_model"])
def test_deep_nesting_is_a_bad_row_or_none(tmp_path, name, depth):
    row = (
        b'{"question": "q", "answer": "1", "%s": ' % name.encode()
        + b"[" * depth
        + b"]" * depth
        + b"}"
    )
    for file, content in (
        ("a.jsonl", b'{"question": "r", "answer": "1"}\n' + row),
        ("a.json", b'[{"question": "r", "answer": "1"}, ' + row + b"]"),
    ):
        (tmp_path / file).write_bytes(content)
        try:
            problems = load_problems(tmp_path / file)
        except DataError as e:
            assert "\n" not in str(e) and len(str(e)) < 600
        else:
            assert len(problems) == 2 and name in ("id", "level", "other", "reward_model")


@pytest.mark.parametrize(
    "number", ["9" * 25, "-" + "9" * 400, "1e308", "1.7976931348623157e308", "5e-324"]
)
def test_numbers_of_any_size(tmp_path, number):
    row = b'{"question": "q", "answer": N, "id": N, "difficulty": N}'.replace(b"N", number.encode())
    problem = load_problems(write(tmp_path / "a.jsonl", row), difficulty=(-1e309, 1e309))[0]
    assert Fraction(problem.answer) == Fraction(str(json.loads(number)))
    tool.describe([problem], data.Report("x"))


def test_values_that_python_has_nothing_for(tmp_path):
    """Dates beyond the year 9999, and before 1: in an answer, an id, a level."""
    far = pa.array([0, 2**60, -(2**60), 1], pa.timestamp("ms"))
    for name in ("answer", "id", "level"):
        columns = {"question": list("abcd"), "answer": list("1234")} | {name: far}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="a.parquet: not a readable parquet file") as e:
            load_problems(tmp_path / "a.parquet")
        assert "\n" not in str(e.value)
    wide = pa.array([Decimal(10) ** 75, Decimal(-1), None, Decimal(1)], pa.decimal256(76, 0))
    pq.write_table(pa.table({"question": list("abcd"), "answer": wide}), tmp_path / "a.parquet")
    problems, report = data.read_problems(tmp_path / "a.parquet")
    assert [p.answer for p in problems] == [str(10**75), "-1", "1"] and len(report.bad) == 1


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in ("pipe.jsonl", "pipe.json", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: not a file"):
            load_problems(tmp_path / name)
    with pytest.raises(DataError, match="pipe.json: not a file"):
        load_problems(tmp_path)  # in a folder too
    with pytest.raises(FileNotFoundError, match="no file, folder or named set ''"):
        load_problems("")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08c\x7f\x9b", "a\\rb\\x08c\\x7f\\x9b"),
        ("user\u202egnp.exe \u2066x\u2069", "user\\u202egnp.exe \\u2066x\\u2069"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("half \ud800", "half \\ud800"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("lines\n\tstay, \\frac{1}{2} too, \u6f22\U0001f642 \u00e9", None),
        ("joined \U0001f469\u200d\U0001f52c", None),
    ],
)
def test_printable(text, shown):
    assert data.printable(text) == (text if shown is None else shown)
    data.printable(text).encode()
    assert "\n" not in data.printable(text, keep="") and "\t" not in data.printable(text, keep="")


def test_escapes_in_data_do_not_reach_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07 \u202e"
    rows = [
        {"question": evil + "q", "answer": evil + "1", "id": evil},
        {"question": "r", "answer": None, evil: evil},
        {evil: evil},
    ]
    path = write(tmp_path / f"{evil}.jsonl", *rows)
    problems, report = data.read_problems(path)
    tool.describe(problems, report)
    shown = capsys.readouterr().out
    with pytest.raises(DataError) as e:
        load_problems(path)
    for text in (shown, str(e.value)):
        assert "owned" in text and not set(evil) & set(text) - {" ", *"]0;owned"}


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("a.jsonl", b"", "no rows"),
        ("a.json", b" \n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"[{]", "not JSON: .*column 3"),
        ("a.json", b"[\n\n  {]", "not JSON: .*line 3 column 4"),
        ("a.json", b'"text"', "expected an array"),
        ("a.json", b'{"a": 1}', "expected an array"),
        ("a.json", b'{"train": [{}], "test": [{}]}', "exactly one"),
        ("a.json", b"[1, null]", "a.json row 1: int"),
        ("a.csv", b"question,answer", "cannot read this kind"),
        ("a.parquet", b"", "not a readable parquet"),
        ("a.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "not a readable parquet"),
    ],
)
def test_unusable_files_raise_one_line(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as e:
        load_problems(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)


def test_parquet_without_the_columns_or_cut_off(tmp_path):
    pq.write_table(pa.table({"question": ["q"], "text": ["t"]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError,
        match="answer or final_answer or solution or ground_truth; it has \\['question', 'text'\\]",
    ):
        load_problems(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"question": ["q"] * 500, "answer": ["1"] * 500}), tmp_path / "b.parquet"
    )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet"):
        load_problems(tmp_path / "b.parquet")
    pq.write_table(
        pa.table({"question": ["q"], "answer": ["1"]}).slice(0, 0), tmp_path / "c.parquet"
    )
    with pytest.raises(DataError, match="no rows"):
        load_problems(tmp_path / "c.parquet")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean aime24"):
        load_problems("aime2024")
    with pytest.raises(FileNotFoundError, match="named sets are math500"):
        load_problems(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="in this folder"):
        load_problems(tmp_path)
    with pytest.raises(ValueError, match="from 1 on"):
        load_problems("math500", limit=0)


# ---------------------------------------------------------------------------------------- the hub


DEEPMATH = {"question": "q", "final_answer": "0", "difficulty": 4.5, "r1_solution_1": "\\boxed{1}"}
MATH500 = {"problem": "q", "solution": "s \\boxed{0}", "answer": "\\frac12", "unique_id": "1"}
GSM8K = {"question": "q", "answer": "<<1+1=2>>\n#### 2"}
LAYOUTS = {  # a row as the real set has it, and the answer in it
    "math500": (MATH500, "\\frac12"),
    "aime24": ({"id": 60, "problem": "q", "solution": "\\boxed{204}", "url": "u"}, "204"),
    "aime25": ({"problem": "q", "answer": "70", "id": "0"}, "70"),
    "amc23": ({"id": 0, "question": "q", "answer": 27.0, "url": "u"}, "27"),
    "deepmath": (DEEPMATH, "0"),
    "deepmath-103k": (DEEPMATH, "0"),
    "deepscaler": ({"problem": "q", "answer": "-1", "solution": ""}, "-1"),
    "gsm8k": (GSM8K, "2"),
    "gsm8k-train": (GSM8K, "2"),
    "gsm8k-test": (GSM8K, "2"),
}


def table(file, rows):
    """The bytes of a file of that kind with these rows."""
    if file.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    text = json.dumps(rows) if file.endswith(".json") else "\n".join(map(json.dumps, rows))
    return text.encode()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made({file: rows}) puts files in place of the hub's; the list of what was asked for."""
    asked = []

    def make(rows_of):
        def fake(repo, file, revision, sha256=None):
            asked.append((repo, file, revision, sha256))
            path = tmp_path / str(len(asked)) / os.path.basename(file)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(table(file, rows_of(file)))
            return path

        monkeypatch.setattr(data, "hub_file", fake)
        return asked

    return make


@pytest.mark.parametrize("name", data.NAMED)
def test_named_sets_are_pinned_and_read_through_one_function(name, made):
    """The layouts of the real sets, as rows made here; only `download` is asked for a file."""
    row, gold = LAYOUTS[name]
    asked = made(lambda file: [row])
    problem = load_problems(name, limit=1)[0]
    assert (problem.question, problem.answer, problem.source) == ("q", gold, name)
    named = data.NAMED[name]
    first = next(iter(named.files))
    # with a limit, the files behind the first are never fetched
    assert asked == [(named.repo, first, named.revision, named.files[first])]
    assert re.fullmatch("[0-9a-f]{40}", named.revision)
    for sha256 in named.files.values():
        assert (sha256 is None) == (name == "deepscaler") or re.fullmatch("[0-9a-f]{64}", sha256)
    asked.clear()
    load_problems(name, limit=1, revision="main")
    assert asked == [(named.repo, first, "main", None)]  # another revision has other hashes


def test_deepmath_is_a_draw_of_5000_and_the_whole_is_there_too(made):
    """500 rows of each of ten files, the same ones for everybody, spread over the file."""
    size = 520

    def rows(file):
        return [
            {**DEEPMATH, "question": f"{file} {i}", "difficulty": i % 9} for i in range(1, size + 1)
        ]

    asked = made(rows)
    drawn = load_problems("deepmath")
    assert len(drawn) == 5000 and len(asked) == 10 and len({p.question for p in drawn}) == 5000
    numbers = [int(p.question.split()[-1]) for p in drawn]
    assert all(numbers[i : i + 500] == sorted(numbers[i : i + 500]) for i in range(0, 5000, 500))
    # from a shell: for i in $(seq 0 519); do echo $(printf "0 0 $i" | sha256sum) $i; done | sort
    # (rows count from 1); the last 20 lines are the rows that are not drawn
    assert data.drawn(8, number=0, size=3) == {8, 1, 6}
    missing = set(range(1, size + 1)) - set(numbers[:500])
    assert missing == {i + 1 for i in data.order(size, 0, 0)[500:]}
    assert set(numbers[:500]) != set(numbers[500:1000])  # each file has a draw of its own
    assert load_problems("deepmath") == drawn
    asked.clear()
    assert load_problems("deepmath", limit=2) == drawn[:2] and len(asked) == 1
    assert [
        p.meta["difficulty"] for p in load_problems("deepmath", limit=9, difficulty=(5, 8))
    ] == [n % 9 for n in numbers if n % 9 >= 5][:9]
    assert len(load_problems("deepmath-103k")) == 10 * size


def test_difficulty(tmp_path, made):
    rows = [
        {"question": "a", "answer": 1, "difficulty": 2.0},
        {"question": "b", "answer": 1, "level": "Level 4"},
        {"question": "c", "answer": 1, "level": 5},
        {"question": "d", "answer": 1},
        {"question": "e", "answer": 1, "difficulty": 1e308},
        {"question": "f", "answer": 1, "difficulty": 10**400},
        {"question": "g", "answer": 1, "difficulty": float("nan")},
    ]
    path = write(tmp_path / "a.jsonl", *rows)

    def read(lowest, highest, **more):
        return "".join(
            p.question for p in load_problems(path, difficulty=(lowest, highest), **more)
        )

    assert (read(2, 4), read(4, 5), read(0, 9), read(0, 1e309)) == ("ab", "bc", "abc", "abcef")
    assert read(2, 5, limit=2) == "ab"  # a number of problems, not of rows
    with pytest.raises(DataError, match="a.jsonl: no problem has .* from 6 to 7; theirs go from 2"):
        read(6, 7)
    with pytest.raises(ValueError, match="lowest, highest"):
        read(3, 2)
    write(path, *rows[3:4])
    with pytest.raises(DataError, match="no problem has .* from 6 to 7; it has no such column"):
        read(6, 7)
    asked = made(
        lambda file: [{"question": f"{file} {i}", "final_answer": "1"} for i in range(1500)]
    )
    with pytest.raises(DataError, match="deepmath-103k: .*it has no such column"):
        load_problems("deepmath-103k", difficulty=(5, 8))
    assert len(asked) == 1  # that it has none is seen in the first file


def test_which_sets_are_there_to_measure_with(tmp_path):
    evaluation = {name for name in data.NAMED if data.is_evaluation(name)}
    assert evaluation == {"math500", "amc23", "aime24", "aime25", "gsm8k-test"}
    assert all(map(data.is_evaluation, ("words-test", "words-test:2:20", "sums-test", "sums-long")))
    assert not any(
        map(data.is_evaluation, ("words", "words:2", "sums", tmp_path / "x.jsonl", "gsm8k"))
    )


def test_sets_made_here_need_no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "hub_file", lambda *a: pytest.fail("asked the hub"))
    words = load_problems("words:2:20", limit=3)
    assert [p.id for p in words] == [f"words:2:20 row {i}" for i in (1, 2, 3)]
    assert pairs(words) == arithmetic.problems("words:2:20")[:3]
    assert pairs(load_problems("sums-test", limit=256)) == pairs(
        tiny.problems(256, 0, held_out=True)
    )
    assert (
        all(verifiable(p.answer) for p in load_problems("words"))
        and words[0].source == "words:2:20"
    )
    with pytest.raises(FileNotFoundError, match="words:9"):
        load_problems("words:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    write(tmp_path / "words" / "x.jsonl", *ROWS)
    assert pairs(load_problems("words")) == PAIRS  # a path that exists wins
    for name in ("words", "sums", "words/x.jsonl"):
        with pytest.raises(ValueError, match="has no revisions"):
            load_problems(name, revision="main")


def test_a_local_path_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "hub_file", lambda *a: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math500").mkdir()
    write(tmp_path / "math500" / "x.jsonl", *ROWS)
    assert pairs(load_problems("math500")) == PAIRS


FILES = {  # a file of each kind as the hub has it
    "aime25": ("test.jsonl", [{"problem": f"q{i}", "answer": "70", "id": i} for i in range(30)]),
    "deepscaler": ("deepscaler.json", [{"problem": f"q{i}", "answer": "-1"} for i in range(30)]),
    "gsm8k-test": (f"main/{data.PARQUET}", [GSM8K | {"question": f"q{i}"} for i in range(30)]),
}


def in_cache(cache, monkeypatch, name):
    """A set in the cache, at the commit and with the hash that NAMED has."""
    file, rows = FILES[name]
    content, named = table(file, rows), data.NAMED[name]
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data.NAMED, name, replace(named, files={file: sha256}))
    return fill(cache, "dataset", named.repo, {file: content}, named.revision) / file


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["zeros", "short", "a portal's page", *range(5, 2000, 113)])
def test_damaged_set_in_the_cache_is_not_read(tmp_path, monkeypatch, name, how):
    path = in_cache(empty_cache(tmp_path, monkeypatch), monkeypatch, name)
    assert len(load_problems(name)) == 30
    damage(path, how)
    named = data.NAMED[name]
    command = (
        f"`hf download {named.repo} {FILES[name][0]} --force-download --repo-type dataset "
        f"--revision {named.revision}`"
    )
    with pytest.raises(DataError, match="is damaged") as e:
        load_problems(name)
    assert command in str(e.value) and "\n" not in str(e.value)
    # the same where the cache has no links and the hash is not known: what cannot be read says so
    # too
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    monkeypatch.setitem(data.NAMED, name, replace(named, files=dict.fromkeys(named.files)))
    if isinstance(how, str) and not (how == "short" and path.suffix == ".jsonl"):
        with pytest.raises(DataError) as e:
            load_problems(name)
        # of single lines that are none it is not known whether they were damaged on the way
        assert command in str(e.value) or path.suffix == ".jsonl"
        assert path.name in str(e.value) and "\n" not in str(e.value)


def test_hub_errors_say_what_and_what_to_do(monkeypatch):
    def fail(*args):
        raise download.HubError("cannot get it: why; what to do")

    monkeypatch.setattr(download, "fetch", fail)
    with pytest.raises(DataError, match="cannot get it: why; what to do") as e:
        load_problems("aime25")
    assert e.value.__suppress_context__ and e.value.exit_code == 3


def test_offline_means_not_one_request(tmp_path, monkeypatch):
    """The real library with HF_HUB_OFFLINE (set in conftest.py) and an empty cache: an answer at
    once, and no connection tried."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: tried.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a) or [])
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load_problems("aime25")
    assert not tried


# ------------------------------------------------------------------------------------------ order


def some(n):
    return [Problem(str(i), str(i)) for i in range(n)]


def test_order_is_a_permutation_that_depends_on_its_arguments_alone():
    orders = {
        (n, seed, epoch): data.order(n, seed, epoch)
        for n in (0, 1, 2, 50)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(o) == list(range(n)) for (n, _, _), o in orders.items())
    assert len({tuple(o) for (n, _, _), o in orders.items() if n == 50}) == 4
    # from a shell: for i in 0 1 2 3 4 5 6 7; do echo $(printf "0 0 $i" | sha256sum) $i; done |
    # sort. A change breaks every run's resume.
    assert data.order(8, seed=0, epoch=0) == [7, 0, 5, 1, 2, 3, 6, 4]
    fresh = subprocess.run(
        [sys.executable, "-c", "from plumbing import data; print(data.order(50, 1, 1))"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=os.path.dirname(tiny.__file__),
    )
    assert fresh.stdout.strip() == str(orders[50, 1, 1])


def test_order_is_uniform():
    """Each of 5 problems is first in a fifth of 2,000 epochs: 400, standard deviation 18."""
    first = [data.order(5, seed=3, epoch=e)[0] for e in range(2000)]
    assert all(abs(first.count(i) - 400) < 4.5 * 18 for i in range(5))


def test_batches_walk_through_epochs():
    problems = some(10)
    walk = [
        p for step in range(1, 16) for p in data.batch(problems, step, 4, seed=5)
    ]  # 60 = 6 epochs of 10, steps of 4: most straddle
    for epoch in range(6):
        assert walk[10 * epoch : 10 * epoch + 10] == [problems[i] for i in data.order(10, 5, epoch)]
    third = data.batch(problems, 3, 4, seed=5)
    assert third == [problems[i] for i in data.order(10, 5, 0)[8:] + data.order(10, 5, 1)[:2]]


def test_batch_is_a_function_of_the_step():
    """What a resumed run sees at step k does not depend on which steps were drawn before it, or in
    which order."""
    problems = some(7)
    forward = [data.batch(problems, k, 3, seed=0) for k in range(1, 20)]
    data._order.cache_clear()
    assert [data.batch(problems, k, 3, seed=0) for k in range(19, 0, -1)] == forward[::-1]
    data.order(7, 0, 0).reverse()  # what order() returns belongs to its caller
    assert [data.batch(problems, k, 3, seed=0) for k in range(1, 20)] == forward
    assert [data.batch(problems, k, 3, seed=1) for k in range(1, 20)] != forward


def test_set_smaller_than_a_batch():
    problems = some(3)
    got = data.batch(problems, 2, 8, seed=0)
    assert (
        len(got) == 8
        and got == [p for e in range(6) for p in (problems[i] for i in data.order(3, 0, e))][8:16]
    )
    assert data.batch(some(1), 1, 4, seed=0) == some(1) * 4


@pytest.mark.parametrize("problems, step, size", [([], 1, 1), (some(2), 0, 1), (some(2), 1, 0)])
def test_batch_refuses(problems, step, size):
    with pytest.raises(ValueError, match="from 1 on"):
        data.batch(problems, step, size, seed=0)


# --------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    "name, answers",
    {
        "integer": [
            "0",
            "-17",
            "+3",
            "1,234,567",
            "12{,}345",
            "\\$32,\\!348",
            "$5$",
            "\\text{7}",
            "12.",
        ],
        "decimal": ["0.5", "-.25", "\\$18.90"],
        "fraction": ["1/2", "-3/4", "\\frac{1}{2}", "\\dfrac12", "-\\tfrac{ 10 }{ 3 }"],
        "yes/no": ["Yes", "\\text{No}", "\\mathrm{true}", "FALSE."],
        "choice": ["A", "(B)", "\\textbf{(C)}"],
        "tuple/interval": [
            "(1, 2)",
            "\\left( 3, \\frac{\\pi}{2} \\right)",
            "[0,1)",
            "\\{1, 2\\}",
            "(-\\infty,0)\\cup(1,2)",
        ],
        "expression": [
            "\\infty",
            "\\sqrt{2}",
            "x+1",
            "1,23",
            "p - q",
            "\\frac{\\pi}{2}",
            "x = 5",
            "F",
            "(x+1)",
            "٣",
        ],
    }.items(),
)
def test_answer_class(name, answers):
    assert {a: tool.answer_class(a) for a in answers} == dict.fromkeys(answers, name)


def test_select_filters_and_says_what_removed_what(caplog):
    problems = [
        Problem("one", "1"),
        Problem("a b c", "yes"),
        Problem("d e", "\\pi"),
        Problem("none", "3"),
    ]
    assert tool.select(problems) == problems
    assert tool.select(problems, classes=["integer", "expression"]) == [
        problems[0],
        problems[2],
        problems[3],
    ]
    with caplog.at_level("INFO", "nanobupo.data"):
        assert tool.select(problems, max_tokens=2, count=lambda q: len(q.split())) == [
            problems[0],
            problems[2],
            problems[3],
        ]
    assert "max_tokens 2 removed 1 of 4" in caplog.text
    with pytest.raises(
        DataError,
        match=r"none of 4 problems is left: classes \['decimal'\] removed 4",
    ):
        tool.select(problems, classes=["decimal"])
    with pytest.raises(ValueError, match="'number'; there are yes/no, integer"):
        tool.select(problems, classes=["number"])
    with pytest.raises(DataError, match="there were none"):
        tool.select([])


def sampled(path, shares, samples=40):
    """A samples.jsonl as eval.py writes it: of each (question, answer) that share is right."""
    rows = []
    for (question, answer), right in shares.items():
        row = {"set": "s", "question": question, "answer": answer}
        rows += [row | {"sample": k, "reward": float(k < right)} for k in range(samples)]
    return write(path, *rows)


def test_solved_keeps_what_is_neither_too_easy_nor_too_hard(tmp_path, capsys):
    """Both ends belong to the range; what is written is read as the same problems."""
    rows = [
        {"problem": "never", "answer": 1},
        {"problem": "easy", "answer": "2"},
        {"problem": "hard", "answer": "3"},
        {"problem": "8 of 40 \u2028", "answer": "27.0", "difficulty": 5.5, "id": "mine"},
        {"problem": "20 of 40", "solution": "so it is \\boxed{\\frac{1}{2}}"},
        {"problem": "32 of 40", "answer": "x+1", "id": 7},
        {"problem": "two answers", "answer": "5"},
    ]
    path, out = write(tmp_path / "all.jsonl", *rows), tmp_path / "kept.jsonl"
    problems = load_problems(path)
    right = [None, 33, 7, 8, 20, 32, 33]
    shares = {(p.question, p.answer): n for p, n in zip(problems, right, strict=True) if n}
    samples = sampled(tmp_path / "samples.jsonl", shares | {("two answers", "6"): 20})
    argv = [path, "--samples-file", samples, "--solved", ".2-.8", "--out", out]
    guarded(tool.main, [str(x) for x in argv])
    said = capsys.readouterr().out
    assert (
        "3 of 7 problems are solved 0.2 to 0.8 of the time; left out: 1 never sampled, "
        "2 too easy, 1 too hard"
    ) in said
    assert f"written: {out}, 3 problems" in said
    kept = load_problems(out)
    assert pairs(kept) == pairs(problems[3:6]) and kept[0].meta == {"difficulty": 5.5}
    assert data.fingerprint(kept) == data.fingerprint(problems[3:6])
    assert len({p.id for p in kept}) == 3


def test_solved_refuses(tmp_path, capsys):
    """In one line; and no file is written, or written over."""
    path = write(tmp_path / "all.jsonl", *GOOD[:3])
    samples = sampled(tmp_path / "samples.jsonl", {("good 1", "1"): 20})
    foreign = write(tmp_path / "foreign.jsonl", {"question": "q", "answer": "1", "reward": 0.5})
    torn = write(tmp_path / "torn.jsonl", b'{"question": "q"')
    given = ["--samples-file", samples, "--solved"]
    for argv, code, says in (
        (["--solved", ".2-.8"], 2, "--solved and --samples-file go together"),
        (["--samples-file", samples], 2, "--solved and --samples-file go together"),
        ([*given, ".8-.2"], 2, "goes from more to less"),
        ([*given, "2-8"], 2, "'2' is not a number from 0 to 1"),
        ([*given, ".2-.8-.9"], 2, "is not a number from 0 to 1"),
        ([*given, ".6"], 3, "none of 3 problems is left: 2 never sampled, 0 too easy, 1 too hard"),
        ([*given, ".2-.8", "--out", path], 2, "is there already: name another --out"),
        ([*given, ".2-.8", "--out", tmp_path / "x.json"], 2, "a .jsonl file is written"),
        (["--samples-file", foreign, "--solved", ".5"], 3, "foreign.jsonl: line 1 is no response"),
        (["--samples-file", torn, "--solved", ".5"], 3, "torn.jsonl: line 1 is no response"),
        (["--samples-file", tmp_path / "none", "--solved", ".5"], 2, "none: no such file"),
    ):
        with pytest.raises(SystemExit) as e:
            guarded(tool.main, [str(x) for x in (path, *argv)])
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert e.value.code == code and says in line, line
    assert len(load_problems(path)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {
        "all.jsonl",
        "samples.jsonl",
        "foreign.jsonl",
        "torn.jsonl",
    }


def test_fingerprint_sees_content_and_order():
    a, b = Problem("q", "1"), Problem("q", "2")
    prints = {data.fingerprint(p) for p in ([a], [b], [a, b], [b, a], [Problem("q1", "")])}
    assert len(prints) == 5 and data.fingerprint([a]) == data.fingerprint(
        [Problem("q", "1", "id", "elsewhere")]
    )
    # from a shell: printf '["q", "1"]\n' | sha256sum
    assert (
        data.fingerprint([a]) == "62804bba6403c3c950d25cf75ad2283d2b278c55a298a9a83e7a0e0e0cde59c4"
    )


def test_overlap_equal_and_partial():
    words = [f"w{i}" for i in range(40)]
    long = " ".join(f"v{i}" for i in range(30))
    mine = [
        Problem(t, "1")
        for t in (" ".join(words), "Short  one?", "other", " ".join(words[:30]), long)
    ]
    others = [
        Problem(t, "2")
        for t in ("nothing", "short ONE?\n", "x " + " ".join(words[:25]) + " y", long.upper())
    ]
    equal, shared = tool.overlap(mine, others)
    assert equal == [(1, 1), (4, 3)]
    assert shared == {0: 6 / 21, 3: 6 / 11}  # w0..w24 hold 6 runs of 20 words, of 21 and of 11
    assert tool.overlap(mine, others, n=26)[1] == {}


SAME = [
    ("What is  $x + 1$?", "what is $x+1$"),
    ("Find \\(a\\, b\\) .", "Find $a b$"),
    ("Let $f(x)=x^{2}$; find $f(1.5)$.", "Let \\[ f(x) = x^2 \\] Find \\quad $ f ( 1.5 ) $"),
    ("Tom\u2019s \u201ccat\u201d, and dog", 'Tom\'s "cat" and dog!'),
    ("It costs \\$5.", "It costs $5"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("STRASSE", "stra\u00dfe"),
]
OTHER = [
    ("What is 3+1?", "What is 3-1?"),
    ("What is 1.5?", "What is 15?"),
    ("What is .5?", "What is 5?"),
    ("1 2", "12"),
    ("\\alpha b", "\\beta b"),
    ("x < 2", "x > 2"),
    ("\\frac{1}{23}", "\\frac{12}{3}"),
    ("ab", "a b"),
    ("?", "!"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_questions_that_differ_in_nothing_that_counts(a, b):
    assert data.normalised(a) == data.normalised(b)


@pytest.mark.parametrize("a, b", OTHER)
def test_questions_that_differ(a, b):
    assert data.normalised(a) != data.normalised(b)


def test_shared_questions_are_dropped_from_training_and_counted():
    train = [Problem(a, "1") for a, _ in (*SAME, *OTHER)]
    tests = [Problem(b, "2") for _, b in (*SAME, *OTHER)]
    assert data.without_shared(train, tests) == ([Problem(a, "1") for a, _ in OTHER], len(SAME))
    assert data.without_shared(train, train) == ([], len(train))
    assert data.without_shared(train, []) == (train, 0)


# ------------------------------------------------------------------------------------ the command


def run(*args):
    folder = os.path.dirname(tiny.__file__)
    return subprocess.run(
        [sys.executable, "-m", "tools.problems", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )


def test_command_reports_and_exits_with_its_codes(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        *GOOD[:20],
        {"question": "Good  3", "answer": "1/2"},
        b"{",
        {"question": "q", "answer": None},
    )
    got = run(path, "--against", write(tmp_path / "o.jsonl", GOOD[0]), "--max-bad", "0.1")
    assert got.returncode == 0, got.stderr
    for line in (
        "21 problems of 23 rows",
        "answer is integer             20",
        "1 questions are repeated",
        "2 bad rows",
        "t.jsonl:22: not JSON",
        "t.jsonl:23: 'answer' is null",
        "rejects 0 of 21 answers",
        "1 questions are equal",
        "t.jsonl:1 = o.jsonl:1",
    ):
        assert line in got.stdout
    bad = run(path)
    assert (
        bad.returncode == 3
        and "21 problems of 23 rows" in bad.stdout
        and bad.stderr.endswith("or allow more (max_bad)\n")
    )
    for args in (
        [tmp_path / "missing.jsonl"],
        ["aime2024"],
        [path, "--limit", "0"],
        [path, "--max-tokens", "5"],
        [path, "--colour"],
        [],
    ):
        usage = run(*args)
        assert usage.returncode == 2 and "Traceback" not in usage.stderr, usage.stderr
    assert "default: 0" in run("--help").stdout


@pytest.mark.parametrize(
    "text, wanted", [("5-8", (5, 8)), ("6", (6, 6)), ("5.5-8", (5.5, 8)), ("0-10", (0, 10))]
)
def test_span(text, wanted):
    assert data.span(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "8-5", "-1", "5-", "-", "a", "5-8-9", "nan", "inf", "1e3", "5 8"]
)
def test_span_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="5-8 or 6"):
        data.span(text)


def test_command_reads_sets_made_here_and_says_nothing_of_others_logs():
    got = run("words:2:20", "--limit", "5", "--against", "words-test:2:20")
    assert got.returncode == 0 and "5 problems of 5 rows" in got.stdout, got.stderr
    assert "0 questions are equal" in got.stdout
    script = (
        "import sys, logging; from plumbing import data; from tools import problems; "
        "sys.argv = ['problems', 'words', '--limit', '1']; problems.main();"
        "logging.getLogger('httpx').info('HTTP Request'); data.log.info('ours')"
    )
    folder = os.path.dirname(tiny.__file__)
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert "HTTP Request" not in got.stderr and "ours" in got.stderr


def test_self_check_finds_answers_that_no_response_can_match():
    problems = [Problem("q", "\\frac{1}{2}"), Problem("q", "}{"), Problem("q", "Yes")]
    assert [verifiable(p.answer) for p in problems] == [True, False, True]


# --------------------------------------------------------------------------------- the real files


# of the paper's files as read here; that of math500 is also that of the hub's file in data.NAMED
FINGERPRINTS = {
    "aime_2024": "62dff389c8bd977f39af1cd899e34a2da5a98894db67e11e9138f4d69b6e2af4",
    "aime_2025": "9881ee50886a7acf1007d947f1ce96bfb66fcd898c11271a7a22bf6bb1bfa595",
    "amc2023": "384fd72ba43ba21855c214b73956c052e1f6ae8af9696fcf9aae5425f5979640",
    "math500": "f4baeb27c3e5bac0396fdc3e42173df932f77910bb436684edaf9c6fa18cc3df",
    "deepmath-5k": "98ec539b952920159fb07e7ed424316225a21ee150341b73ef93af1bcad496c0",
}


@pytest.mark.parametrize(
    "name, rows, first, answer",
    [
        ("aime_2024", 30, "Find the largest possible real part of", "540"),
        ("aime_2025", 30, "Find the sum of all integer bases", "70"),
        ("amc2023", 40, "Cities $A$ and $B$ are $45$ miles apart.", "27"),
        ("math500", 500, "Convert the point $(0,3)$", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("deepmath-5k", 5000, "Determine the order of the cyclic subgroup", "\\infty"),
    ],
)
def test_real_files(shared, name, rows, first, answer):
    problems, report = data.read_problems(shared / "data" / f"{name}.parquet")
    assert data.fingerprint(problems) == FINGERPRINTS[name]
    assert len(problems) == report.rows == rows == len({p.id for p in problems}) and not report.bad
    assert (
        problems[0].question.startswith(first)
        and problems[0].answer == answer
        and problems[0].source == name
    )
    raw = pq.read_table(shared / "data" / f"{name}.parquet").to_pylist()
    assert pairs(problems) == [
        (r["prompt"][1]["content"].strip(), r["reward_model"]["ground_truth"].strip()) for r in raw
    ]
    assert ("difficulty" in problems[0].meta) == (name == "deepmath-5k")
    if name in ("aime_2024", "aime_2025", "amc2023"):
        assert all(
            p.answer.isascii()
            and p.answer.lstrip("-").isdigit()
            and tool.answer_class(p.answer) == "integer"
            for p in problems
        )


def test_training_and_evaluation_questions_do_not_meet(shared):
    train = load_problems(shared / "data" / "deepmath-5k.parquet")
    for name in ("aime_2024", "aime_2025", "amc2023", "math500"):
        equal, parts = tool.overlap(load_problems(shared / "data" / f"{name}.parquet"), train)
        assert (
            not equal
            and len(parts) == (2 if name == "math500" else 0)
            and max(parts.values(), default=0) < 0.4
        )
