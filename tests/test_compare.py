"""Tables of folders that are made here row by row: numbers, paired differences, what is refused."""

import json
import re

import pytest

import eval as evaluation
from plumbing.cli import guarded
from plumbing.intervals import bootstrap_mean, bootstrap_paired
from tools import compare

EASY = [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
HARD = [[0, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def folder(out, sets, **change):
    """A folder of eval.py. sets: {name: 0 or 1 of each sample of each question}."""
    out.mkdir()
    results = {"model": out.name, "temperature": 1.0, "verifier": "nanobupo", "sets": {}} | change
    with open(out / "samples.jsonl", "wb") as f:
        for name, correct in sets.items():
            groups = []
            for i, question in enumerate(correct):
                row = {"set": name, "id": f"{name}:{i}", "answer": "1", "response": "", "ids": [1]}
                row |= {"reason": "different", "finish_reason": "stop"}
                samples = enumerate(map(float, question))
                groups.append([row | {"sample": k, "reward": reward} for k, reward in samples])
                f.writelines(map(evaluation.encoded, groups[-1]))
            score = evaluation.scores(groups) | {"dropped_prompts": 0, "seconds": 1.0}
            results["sets"][name] = score | {"data_sha256": f"of {len(correct)}"}
    (out / "results.json").write_text(json.dumps(results))
    return str(out)


def printed(capsys, *args):
    guarded(compare.main, args)
    return capsys.readouterr().out


def refused(capsys, *args):
    with pytest.raises(SystemExit) as e:
        guarded(compare.main, args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2
    return line


def text(mean, low, high, sign=""):
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def test_tables(tmp_path, capsys):
    """Each number by hand, or by the intervals' own function of values by hand."""
    a = folder(tmp_path / "a|1", {"easy": HARD, "hard": HARD})
    b = folder(tmp_path / "b", {"easy": EASY, "other": [[1, 0]] * 4}, temperature=0.5)
    said = printed(capsys, a, b)
    shares = [[sum(question) / 4 for question in correct] for correct in (HARD, EASY)]
    one, two = (text(*bootstrap_mean(values, within=(0, 1))) for values in shares)
    more = text(*bootstrap_paired(*reversed(shares), within=(0, 1)), sign="+")
    assert said.startswith(
        "| Avg@K | easy | hard | other |\n| --- | --- | --- | --- |\n"
        f"| a\\|1 | {one}, K = 4 | {one}, K = 4 |  |\n| b | {two}, K = 4 |  | 0.500, K = 2 |\n\n"
        "| Avg@K minus that of a\\|1 | easy | other |\n| --- | --- | --- |\n"
        f"| b | {more} |  |\n\n| pass@2 | easy | hard | other |\n"
    )
    # of 4 samples with c right: 1 - C(4-c, 2) / C(4, 2)
    a_of, b_of = ([1 / 2, 5 / 6, 5 / 6, 5 / 6, 1, 0], [1, 1, 1, 1, 1, 0])
    assert f"| b | {text(*bootstrap_mean(b_of, within=(0, 1)))}, K = 4 |" in said
    assert f"| b | {text(*bootstrap_paired(b_of, a_of), sign='+')} |" in said
    assert said.endswith(f"{b} was sampled or judged otherwise: temperature 0.5, not 1.0\n")
    assert "pass@4 | easy" in printed(capsys, a, b, "--k", "4")
    assert printed(capsys, a, "--k", "1").count("|\n\n") == 1
    assert compare.table([a, b]) == said[: said.index("\n\n") + 1]


def test_pairs_are_matched_by_id(tmp_path, capsys):
    """Whatever the order of the questions: a run against its own questions in another order."""
    a = folder(tmp_path / "a", {"s": HARD})
    b = folder(tmp_path / "b", {"s": HARD})
    rows = (tmp_path / "b" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "samples.jsonl").write_bytes(b"".join(rows[8:] + rows[:8]))
    said = printed(capsys, a, b)
    assert said.count("| b | +0.000 |\n") == 2


def test_two_folders_of_one_model_go_by_their_paths(tmp_path, capsys):
    a = folder(tmp_path / "a", {"s": HARD}, model="m")
    b = folder(tmp_path / "b", {"s": EASY}, model="m")
    assert len(re.findall(f"^[|] ({a}|{b}) [|]", printed(capsys, a, b), re.M)) == 6


def test_folders_of_older_versions(tmp_path, capsys):
    """Without intervals in results.json the same tables."""
    a, b = folder(tmp_path / "a", {"s": HARD}), folder(tmp_path / "b", {"s": EASY})
    said = printed(capsys, a, b)
    path = tmp_path / "a" / "results.json"
    path.write_text(re.sub(r'"[a-z0-9@]*_interval": [^]]*\], ', "", path.read_text()))
    assert "interval" not in path.read_text()
    assert printed(capsys, a, b) == said


def test_refused(tmp_path, capsys):
    a, b = folder(tmp_path / "a", {"s": HARD}), folder(tmp_path / "b", {"s": HARD[:5]})
    assert refused(capsys, a, b).endswith(f"s: {b} has other questions or answers than {a}")
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    results["sets"]["s"]["data_sha256"] = "of 6"  # but one prompt was dropped
    (tmp_path / "b" / "results.json").write_text(json.dumps(results))
    assert "too long (--max-prompt-tokens)" in refused(capsys, a, b)
    assert "--k 3: pass@k is there for powers of two up to 4" in refused(capsys, a, "--k", "3")
    assert "up to 4" in refused(capsys, a, "--k", "8")
    assert "nothing holds no results of eval.py" in refused(capsys, a, str(tmp_path / "nothing"))
    assert "holds no set yet" in refused(capsys, folder(tmp_path / "empty", {}))
    path = tmp_path / "a" / "samples.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"reward": 1.0', '"reward": 0.0', 1))
    assert "eval.py --regrade makes them one" in refused(capsys, a)
    path.write_text(whole + whole.splitlines()[-1])
    assert "does not hold the responses of s" in refused(capsys, a)
    path.unlink()
    assert "does not hold the responses of s" in refused(capsys, a)
    (tmp_path / "a" / evaluation.HALF).touch()
    assert "--regrade of it was cut short" in refused(capsys, a)
