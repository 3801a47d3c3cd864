"""docs/results.md and marked figures elsewhere: made of the rows, or refused."""

import json
from pathlib import Path

import pytest

from experiments import report, table
from experiments.arms import EXPERIMENTS, Experiment
from plumbing.data import DataError

HOME = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with one experiment of two arms and three seeds: `up` is higher at step 10, at the
    end nobody is."""
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    e = Experiment("Which?", {"base": "--lr 1", "up": "--lr 2"}, seeds=3)
    monkeypatch.setitem(EXPERIMENTS, "made-up", e)
    rows = []
    for arm, gain in (("base", 0.0), ("up", 0.1)):
        for seed in (1, 2, 3):
            early = 0.5 + gain + 0.01 * seed * (1 + gain)
            late = {"10": early, "20": 0.9 + gain * (seed - 2)}
            row = {"arm": arm, "seed": seed, "commit": "c", "accuracy": late}
            row["command"] = table.command_of("made-up", e, arm, seed)
            rows.append(row | {"length": {"10": 7.0, "20": 8.0 + seed}})
    results = tmp_path / report.RESULTS
    results.mkdir(parents=True)
    (results / "made-up.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (results / "made-up.md").write_text(table.page("made-up", e, rows))
    (results / "made-up.png").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.in.md").write_text("Nothing, \\boxed{20}.\n")
    (tmp_path / "README.md").write_text("Nothing.\n")
    return tmp_path


def made(root, text):
    (root / "docs/results.in.md").write_text(text)
    report.main([], root)
    return (root / "docs/results.md").read_text()


def test_placeholders(root):
    _, low, high = table.bootstrap_mean([0.51, 0.52, 0.53])
    expected = f"0.52 [{low:.2f}, {high:.2f}]"
    assert made(root, "It is {made-up/base accuracy 10}.\n") == f"It is {expected}.\n"
    up = [0.611, 0.622, 0.633]
    _, low, high = table.bootstrap_paired(up, [0.51, 0.52, 0.53])
    text = made(root, "{made-up/up - base accuracy\n10} \\boxed{20}, {made-up/base length end}")
    assert text.startswith(f"+0.10 [{low:+.2f}, {high:+.2f}] \\boxed{{20}}, 10.0 [")
    lines = made(root, "Before.\n\n{table made-up}\n\n{figure made-up}\n").splitlines()
    assert lines[2].startswith("| arm | accuracy, step 10 | accuracy, step 20 | minus base")
    assert lines[-3] == "    python -m experiments.sweep made-up"
    link = "../results/experiments/made-up.png"
    assert lines[-1] == f"![made-up: accuracy over the steps]({link})"


def test_verdicts(root):
    words = ("up - base accuracy 10", "base - up accuracy 10", "up - base accuracy end")
    text = made(root, "; ".join(f"{{made-up/{w} verdict}}" for w in words))
    assert text == "higher; lower; no difference seen"
    verdicts = [report.verdict_of(t) for t in ((0.1, None, None), (0.0, None, None), (0.1, 0, 0.2))]
    assert verdicts == ["not known", "no difference seen", "no difference seen"]


def test_marks_in_other_pages(root):
    readme = (
        "<!-- a note --> It is <!-- made-up/base accuracy 20 -->0.1<!-- end -->.\n"
        "<!-- figure made-up -->\nold\n<!-- end -->\n{made-up/base accuracy 20}\n"
    )
    (root / "README.md").write_text(readme)
    report.main([], root)
    assert (root / "README.md").read_text() == (
        "<!-- a note --> It is <!-- made-up/base accuracy 20 -->0.90<!-- end -->.\n"
        "<!-- figure made-up -->\n"
        "![made-up: accuracy over the steps](results/experiments/made-up.png)\n<!-- end -->\n"
        "{made-up/base accuracy 20}\n"
    )
    report.main(["--check"], root)  # as it is


@pytest.mark.parametrize(
    "words, why",
    [
        ("tabel made-up", "no such placeholder"),
        ("made-up/base accuracy 10 verdict", "no such placeholder"),
        ("table other", "no experiment 'other': there are made-up"),
        ("made-up/down accuracy 10", "no arm 'down' in made-up: there are base, up"),
        ("made-up/up - down accuracy 10", "no arm 'down' in made-up"),
        ("made-up/up accuracy 15", "no run has 'accuracy' at step '15'"),
        ("made-up/up lenght 10", "no run has 'lenght'"),
    ],
)
def test_what_is_not_there_is_a_line_and_nothing_is_written(root, words, why):
    (root / "README.md").write_text("<!-- made-up/base accuracy 20 -->0.1<!-- end -->")
    before = (root / "README.md").read_text()
    with pytest.raises(DataError, match=why) as e:
        made(root, f"{{made-up/base accuracy 10}} {{{words}}}")
    assert str(e.value).startswith(f"docs/results.in.md: {{{words}}}: ") and "\n" not in str(
        e.value
    )
    assert (root / "README.md").read_text() == before and not (root / "docs/results.md").exists()


def test_rows_of_other_flags_are_none(root, monkeypatch):
    e = Experiment("Which?", {"base": "--lr 3", "up": "--lr 4"}, seeds=3)
    monkeypatch.setitem(EXPERIMENTS, "made-up", e)
    with pytest.raises(DataError, match="python -m experiments.sweep made-up makes them"):
        made(root, "{made-up/base accuracy 10}")


def test_check_tells_what_would_change(root, capsys):
    report.main([], root)
    capsys.readouterr()
    report.main(["--check"], root)
    assert capsys.readouterr().out == ""
    page = root / report.RESULTS / "made-up.md"
    page.write_text(page.read_text().replace("0.52", "0.59"))
    with pytest.raises(SystemExit) as end:
        report.main(["--check"], root)
    assert end.value.code == 1
    assert capsys.readouterr().out == "would change: results/experiments/made-up.md\n"
    assert "0.59" in page.read_text()


def test_the_pages_are_those_of_the_committed_rows():
    if not list((HOME / report.RESULTS).glob("*.jsonl")):
        pytest.skip("no rows of experiments yet")
    report.main(["--check"])
