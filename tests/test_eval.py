"""Avg@K and pass@k against counting, and the command on a small random model: killed, run again,
beside results that are there, judged again, with several models, with nobody reading what it says.
"""

import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import eval as evaluation
import tiny
from eval import avg_at_k, pass_at_k, scores
from model import Config, Transformer
from plumbing.cli import guarded, short_name
from plumbing.data import load_problems
from plumbing.hub import save_model
from plumbing.intervals import bootstrap_mean
from plumbing.runs import folder_name


@pytest.mark.parametrize(
    "n, c, k",
    [
        (1, 0, 1),
        (1, 1, 1),
        (4, 1, 1),
        (4, 1, 2),
        (4, 2, 3),
        (5, 3, 4),
        (6, 0, 3),
        (6, 6, 3),
        (8, 1, 8),
    ],
)
def test_pass_at_k_by_counting(n, c, k):
    """The share of the k-subsets of n samples that hold one of the c correct ones."""
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_avg_at_k():
    assert avg_at_k([[1, 0], [1, 1], [0, 0]]) == pytest.approx(0.5)
    assert avg_at_k(torch.eye(4)) == pass_at_k(4, 1, 1)
    for bad in ([], [[]], [1, 0]):
        with pytest.raises(ValueError):
            avg_at_k(bad)


def test_scores_of_made_up_answers():
    from plumbing.data import Problem
    from rollout import Response
    from verify import Verdict

    def made(right, length):
        verdict = Verdict(right, None, "equal: string" if right else "different")
        r = Response([1], [2] * length, [0.0] * length, stopped=right, text="t", verdict=verdict)
        r.problem, r.reward = Problem("q", "1"), float(right)
        return r

    answered = [
        [made(True, 4), made(False, 8)],
        [made(True, 4), made(True, 4)],
        [made(False, 2), made(False, 2)],
    ]
    s = scores([[evaluation.sample_row(a) for a in group] for group in answered])
    assert (s["questions"], s["samples"], s["avg@k"], s["pass@1"]) == (3, 2, 0.5, 0.5)
    assert (s["mean_length"], s["truncated"]) == (4, 0.5)
    assert s["pass@2"] == pytest.approx(2 / 3)
    assert s["reasons"] == {"equal: string": 3, "different": 3}
    assert s["avg@k_stderr"] == pytest.approx(torch.tensor([0.5, 1, 0]).std().item() / 3**0.5)
    for name, values in (("avg@k", [0.5, 1, 0]), ("pass@1", [0.5, 1, 0]), ("pass@2", [1, 1, 0])):
        assert s[f"{name}_interval"] == list(bootstrap_mean(values, within=(0, 1))[1:])
    s |= {"dropped_prompts": 0, "seconds": 1}
    line = evaluation.line_of("a", s)
    assert line.startswith(
        "a: Avg@2 0.500 [0.000, 1.000]  pass@1 0.500 [0.000, 1.000]  pass@2 0.66"
    )
    one = scores([[evaluation.sample_row(made(True, 1)), evaluation.sample_row(made(False, 1))]])
    assert one["avg@k_interval"] is one["pass@1_interval"] is one["avg@k_stderr"] is None
    line = evaluation.line_of("a", one | {"dropped_prompts": 0, "seconds": 1})
    # of one question nothing is known, but that all of one were right
    assert line.startswith("a: Avg@2 0.500  pass@1 0.500  pass@2 1.000 [0.025, 1.000]  (1 ")


def older(out):
    """Make a folder what eval.py wrote before scores had intervals and K was each set's own."""
    results = results_of(out)
    for score in results["sets"].values():
        for name in [name for name in score if name.endswith("_interval")]:
            del score[name]
        results["samples"] = score["samples"]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def test_short_name():
    assert [
        short_name(x)
        for x in ("Qwen/Qwen3-4B", "a/b/math500.parquet", "x.jsonl", "out/run/", "qwen2.5-0.5b")
    ] == ["Qwen3-4B", "math500", "x", "run", "qwen2.5-0.5b"]
    assert folder_name("Qwen/Qwen3-4B") == "Qwen3-4B"


def test_folders_of_checkpoints_are_named_after_their_run(tmp_path):
    for name in ("step_000300", "warm-up"):
        (tmp_path / "run" / name).mkdir(parents=True)
        assert folder_name(tmp_path / "run" / name) == f"run-{name}"


QUESTIONS = [
    "0+1",
    "\u00e9\u4f60 1+1",
    "a\u2028b",
    "\x1b[31m red",
    *(f"{i}+1" for i in range(4, 9)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random byte-level model, nine problems, and three others."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, 0)
    for name, questions in (("problems", QUESTIONS), ("others", ["1+1", "2+2", "3+3"])):
        rows = [{"problem": q, "answer": i + 1} for i, q in enumerate(questions)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def write_model(folder, seed):
    config = Config("qwen3", 260, 16, 2, 2, 1, 8, 32, tied=True, max_len=256)
    save_model(Transformer(config).init_weights(seed, 0.3), folder)
    tiny.write_tokenizer(folder)


def flags(folder, out, *more, **change):
    """The command's flags: 18 responses, in pieces of two questions where ROUNDS is 1."""
    f = {"model": folder, "data": folder / "problems.jsonl", "out": out, "samples": 2}
    f |= {"max-new-tokens": 12, "slots": 4, "system": "", "device": "cpu"} | change
    given = {name: str(value) for name, value in f.items() if value is not None}
    return [x for name, value in given.items() for x in (f"--{name}", value)] + list(more)


def run(*args, **change):
    guarded(evaluation.main, flags(*args, **change))


def refused(capsys, *args, **change):
    """Exit code and the one line of a command that is refused."""
    with pytest.raises(SystemExit) as e:
        run(*args, **change)
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if "taken over from" not in line]  # the lock's, after a kill
    assert len(said) == 1, said
    return e.value.code, said[0]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def rows_of(out):
    return [json.loads(x) for x in (out / "samples.jsonl").read_bytes().split(b"\n") if x]


def bytes_of(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "LOCK"}


def without_seconds(results):
    for score in results["sets"].values():
        score.pop("seconds")
    return results


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "e"
    run(folder, out, samples=4)
    said = capsys.readouterr().out
    assert "first prompt:\n0+1" in said and "Avg@4" in said
    (score,) = results_of(out)["sets"].values()
    known = {"avg@k", "avg@k_stderr", "pass@1", "pass@2", "pass@4", "mean_length", "truncated"}
    assert set(score) >= known | {"data_sha256"} and score["questions"] == 9
    rows = rows_of(out)
    assert len(rows) == 36
    assert [r["question"] for r in rows[::4]] == QUESTIONS
    known = {"question", "answer", "response", "extracted", "reward", "reason", "finish_reason"}
    assert set(rows[0]) >= known | {"prompt_ids", "ids", "set", "id", "sample"}
    for r in rows:
        assert (r["ids"][-1] == tiny.END) == (r["finish_reason"] == "stop")
        assert len(r["ids"]) <= 12
    assert score["avg@k"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
    assert {p.name for p in out.iterdir()} == {"LOCK", "results.json", "samples.jsonl"}


# what is there stays ---------------------------------------------------------------------------


def test_sets_are_added(folder, tmp_path, capsys, monkeypatch):
    """A second --data joins the first; for one that is there no model is even loaded."""
    both, out = tmp_path / "both", tmp_path / "out"
    problems, others = folder / "problems.jsonl", folder / "others.jsonl"
    run(folder, both, data=f"{problems}, {others},{problems}")
    run(folder, out, data=problems)
    first = bytes_of(out)
    run(folder, out, data=others)
    assert without_seconds(results_of(out)) == without_seconds(results_of(both))
    assert list(results_of(out)["sets"]) == [str(problems), str(others)]
    assert (out / "samples.jsonl").read_bytes() == (both / "samples.jsonl").read_bytes()
    assert (out / "samples.jsonl").read_bytes().startswith(first["samples.jsonl"])
    before = bytes_of(out)
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "load_model", None)
    run(folder, out, data=f"{problems},{others}")
    said = capsys.readouterr().out
    assert said.count("has it") == said.count("Avg@2") == 2
    assert bytes_of(out) == before


def test_checkpoints_of_two_runs_have_folders_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("run2", "run10")):
        write_model(tmp_path / name / "step_000300", seed)
        run(folder, None, model=f"{name}/step_000300")
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {"eval-run2-step_000300", "eval-run10-step_000300"}
    assert len({(tmp_path / "out" / name / "samples.jsonl").read_bytes() for name in made}) == 2


def test_other_settings_are_refused(folder, tmp_path, capsys):
    """In one line that says what differs, and what is there stays as it is."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    run(folder, out)
    before = bytes_of(out)
    write_model(copy, 0)
    run(folder, out, data=folder / "others.jsonl", model=copy)  # the same files elsewhere
    assert len(results_of(out)["sets"]) == 2
    before = bytes_of(out)
    write_model(copy, 1)
    for says, more, change in (
        ("--temperature 1.0 there, 0.5 now", (), {"temperature": 0.5}),
        ("--seed 0 there, 7 now", (), {"seed": 7}),
        (
            "--max-new-tokens 12 there, 9 now",
            (),
            {"max-new-tokens": 9},
        ),
        ("--thinking False there, True now", ("--thinking",), {}),
        ("--system '' there, 'x' now", (), {"system": "x"}),
        ("--dtype 'torch.float32' there, 'torch.bfloat16' now", (), {"dtype": "bfloat16"}),
        (f"--model '{folder}' there, '{copy}' now", (), {"model": copy}),
        (
            "with other questions or samples (9 questions, --limit None, --samples 2)",
            (),
            {"limit": 2},
        ),
    ):
        code, said = refused(capsys, folder, out, *more, **change)
        assert code == 2 and says in said and "name another --out" in said, said
    assert bytes_of(out) == before


def test_changed_weights_are_refused(folder, tmp_path, capsys):
    """The same name, trained further; and a tokenizer that was mended."""
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model, 0)
    run(folder, out, model=model)
    state = evaluation.load_model(model)
    with torch.no_grad():
        for p in state.parameters():
            p.mul_(1.001)
    save_model(state, model)
    said = refused(capsys, folder, out, model=model, data=folder / "others.jsonl")[1]
    assert f"the files of {model} have changed since" in said
    write_model(model, 0)
    run(folder, out, model=model, data=folder / "others.jsonl")
    with open(model / "tokenizer.json", "a") as f:
        f.write("\n")
    assert "have changed since" in refused(capsys, folder, out, model=model)[1]


def test_the_identity_of_large_weights(tmp_path):
    """Pieces of 4 KB: one changed byte in every 4 KB is seen, and so is another size."""
    path = tmp_path / "model.safetensors"
    data = bytearray(3 << 20)
    path.write_bytes(data)
    first = evaluation.identity(tmp_path)
    assert evaluation.identity(tmp_path) == first
    for change in (slice(100, None, 4096), slice(-1, None), slice(0, 1)):
        new = bytearray(data)
        new[change] = b"\1" * len(new[change])
        path.write_bytes(new)
        assert evaluation.identity(tmp_path) != first
    path.write_bytes(data + b"\0")
    assert evaluation.identity(tmp_path) != first


def test_fresh_replaces_one_set(folder, tmp_path, capsys):
    """The others stay; without it other questions under the same name are refused."""
    out, data = tmp_path / "out", tmp_path / "mine.jsonl"
    data.write_text((folder / "others.jsonl").read_text())
    run(folder, out, data=f"{data},{folder / 'problems.jsonl'}")
    before = rows_of(out)
    data.write_text('{"problem": "5+5", "answer": 10}\n')
    code, said = refused(capsys, folder, out, data=data)
    assert code == 2 and "replace it by --fresh" in said
    assert rows_of(out) == before
    run(folder, out, "--fresh", data=data)
    assert [s["questions"] for s in results_of(out)["sets"].values()] == [1, 9]
    assert rows_of(out) == [*before[6:], *rows_of(out)[18:]]
    assert len(rows_of(out)) == 20


@pytest.mark.parametrize(
    "content", ["torn {", "[]", "{}", '{"sets": []}', '{"sets": {"a": {}}}', None]
)
def test_what_is_not_ours_is_left_alone(folder, tmp_path, capsys, content):
    if content is None:  # a folder of train.py
        (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    else:
        (tmp_path / "results.json").write_text(content)
    before = bytes_of(tmp_path)
    assert refused(capsys, folder, tmp_path)[0] == 2 and bytes_of(tmp_path) == before


@pytest.mark.parametrize("name", ["results.json", "samples.jsonl"])
def test_what_is_no_file_is_refused(folder, tmp_path, capsys, name):
    os.mkfifo(tmp_path / name)
    assert "holds no results of eval.py" in refused(capsys, folder, tmp_path)[1]


def test_one_folder_at_a_time(folder, tmp_path, capsys):
    with evaluation.checkpoint.lock(tmp_path / "out"):
        assert "in use by pid" in refused(capsys, folder, tmp_path / "out")[1]


def test_folders_of_older_versions(folder, tmp_path, capsys):
    """Their sets stand, another one joins them, and --regrade adds the intervals."""
    out = tmp_path / "out"
    run(folder, out, data=folder / "others.jsonl")
    expected = results_of(out)
    older(out)
    capsys.readouterr()
    run(folder, out, data=folder / "others.jsonl")
    assert re.search(r"Avg@2 0\.\d{3} \+- 0\.\d{3}  pass@1", capsys.readouterr().out)
    regrade(out)
    assert {**results_of(out), "samples": 0} == {**expected, "samples": 0}
    older(out)
    run(folder, out)
    assert len(results_of(out)["sets"]) == 2 and "samples" not in results_of(out)


def test_each_set_has_its_own_k(folder, tmp_path, capsys, monkeypatch):
    """--paper by the set's name, other sets by --samples; and one that is there keeps its K."""
    out, others, problems = (tmp_path / "out", folder / "others.jsonl", folder / "problems.jsonl")
    monkeypatch.setitem(evaluation.PAPER, str(others), 3)
    change = {"data": f"{others},{problems}", "max-new-tokens": None}
    run(folder, out, "--paper", "--max-prompt-tokens", "248", **change)
    results = results_of(out)
    assert [score["samples"] for score in results["sets"].values()] == [3, 2]
    assert [row["sample"] for row in rows_of(out)[:9]] == [0, 1, 2] * 3
    assert results["max_new_tokens"] == 256 - 248  # as far as positions go, else 7,168
    (tmp_path / "third.jsonl").write_text('{"problem": "9+9", "answer": 18}\n')
    change = {"max-prompt-tokens": 248, "max-new-tokens": 8}
    run(folder, out, data=tmp_path / "third.jsonl", samples=1, **change)
    assert [score["samples"] for score in results_of(out)["sets"].values()] == [3, 2, 1]
    before = bytes_of(out)
    said = refused(capsys, folder, out, data=others, **change)[1]
    assert "others.jsonl with other questions or samples (3 questions, --limit None, --sam" in said
    assert bytes_of(out) == before
    assert "--paper samples at --temp" in refused(capsys, folder, out, "--paper", temperature=0)[1]


# judged again ----------------------------------------------------------------------------------


def regrade(out, *more):
    guarded(evaluation.main, ["--regrade", "--out", str(out), *more])


@pytest.fixture
def boxed(whole, tmp_path):
    """A folder whose first three responses say, in other words, what is right; they were judged
    wrong."""
    out = tmp_path / "boxed"
    out.mkdir()
    rows = rows_of(whole)
    for row in rows[:3]:
        row |= {"reward": 0.0, "reason": "different", "extracted": None}
        row["response"] = f"\\boxed{{{2 * int(row['answer'])}/2}}"
    (out / "samples.jsonl").write_bytes(b"".join(map(evaluation.encoded, rows)))
    (out / "results.json").write_bytes((whole / "results.json").read_bytes())
    return out


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", None)
    monkeypatch.setattr(evaluation, "Sampler", None)


def test_judged_again_is_as_judged_first(folder, whole, tmp_path, capsys, no_model):
    """Byte for byte, results and rows."""
    before = bytes_of(whole)
    regrade(whole)
    assert bytes_of(whole) == before
    assert "0 of 18 verdicts changed (nanobupo now, nanobupo before)" in capsys.readouterr().out


def test_another_verifier(folder, boxed, capsys, no_model):
    """Its verdicts in rows and scores, its name in the settings; all else as it was."""
    rows, results = rows_of(boxed), results_of(boxed)
    regrade(boxed)
    said = capsys.readouterr().out
    assert "3 of 18 verdicts changed" in said
    assert "problems.jsonl:1, sample 1: '2/2' for '1', now 1 (equal" in said
    now = rows_of(boxed)
    verdict = "extracted", "reward", "reason"
    for old, new in zip(rows, now, strict=True):
        assert {k: v for k, v in old.items() if k not in verdict} == {
            k: v for k, v in new.items() if k not in verdict
        }
    assert [row["reward"] for row in now] == [1] * 3 + [0] * 15
    (score,) = results_of(boxed)["sets"].values()
    assert (score["avg@k"], score["pass@2"]) == (3 / 18, 2 / 9)
    regrade(boxed, "--verifier", "hendrycks")
    assert [row["reward"] for row in rows_of(boxed)] == [0] * 18
    assert results_of(boxed)["verifier"] == "hendrycks"
    assert "3 of 18 verdicts changed (hendrycks now, nanobupo before)" in capsys.readouterr().out
    assert "--verifier 'hendrycks' there, 'nanobupo' now" in refused(capsys, folder, boxed)[1]
    regrade(boxed)
    assert rows_of(boxed) == now and results_of(boxed)["verifier"] == "nanobupo"
    assert results_of(boxed).keys() == results.keys()


@pytest.mark.parametrize("place", ["samples", "results", "mark"])
def test_killed_while_judging_again(folder, boxed, killed, capsys, place):
    """Nothing is sampled beside verdicts of two kinds; the same command makes them one."""
    killed(["--regrade", "--out", str(boxed)], place)
    assert "--regrade of it was cut short" in refused(capsys, folder, boxed)[1]
    regrade(boxed)
    assert [row["reward"] for row in rows_of(boxed)] == [1] * 3 + [0] * 15
    (score,) = results_of(boxed)["sets"].values()
    assert score["avg@k"] == 3 / 18
    run(folder, boxed)
    assert {p.name for p in boxed.iterdir()} == {"LOCK", "results.json", "samples.jsonl"}


def test_what_cannot_be_judged_again(folder, boxed, capsys):
    """In one line, and nothing has changed."""

    def says(out=boxed):
        before = bytes_of(boxed)
        with pytest.raises(SystemExit) as e:
            regrade(out)
        assert e.value.code == 2 and bytes_of(boxed) == before
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "holds no results of eval.py" in says(boxed / "nothing")
    assert not (boxed / "nothing").exists()
    lines = (boxed / "samples.jsonl").read_bytes().splitlines(keepends=True)
    row = json.loads(lines[3])
    for content, why in (
        (lines[:-1], "does not hold the responses of"),
        (lines[2:], "does not hold the responses of"),
        (lines[:3] + lines[2:3] + lines[4:], "does not hold the responses of"),
        ([*lines, lines[-1]], "does not hold the responses of"),
        (lines[:3] + [lines[3][:50]], "line 4 is no response"),
        (lines[:3] + [json.dumps(row | {"answer": 7}).encode()], "line 4 is no response"),
    ):
        (boxed / "samples.jsonl").write_bytes(b"".join(content))
        assert why in says()
    (boxed / "samples.jsonl").write_bytes(b"".join(lines))
    (boxed / ".samples-1234.jsonl").write_text("")
    assert "or delete .samples-1234.jsonl" in says()
    with pytest.raises(SystemExit):
        evaluation.parse(["--regrade"])
    assert "--regrade needs --out" in capsys.readouterr().err


# several models --------------------------------------------------------------------------------


def test_several_models(folder, tmp_path, capsys, monkeypatch):
    """A folder each, one table; the first model is gone when the second is loaded."""
    write_model(tmp_path / "a", 0)
    write_model(tmp_path / "b", 1)
    loaded, load = [], evaluation.load_model

    def counted(*args):
        assert not any(model() for model in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluation, "load_model", counted)
    models, others = f"{tmp_path / 'a'},{tmp_path / 'b'}", folder / "others.jsonl"
    out = tmp_path / "out"
    run(folder, out, data=others, model=models)
    assert len(loaded) == 2
    said = capsys.readouterr().out
    assert f"| Avg@K | {others} |\n| --- | --- |\n| a | 0." in said and "\n| b | 0." in said
    run(folder, tmp_path / "alone", data=others, model=tmp_path / "b")
    assert rows_of(out / "eval-b") == rows_of(tmp_path / "alone") != rows_of(out / "eval-a")


def test_mistakes_of_the_second_model_come_first(folder, tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "other" / "a", 0)
    for name in "ab":
        write_model(tmp_path / name, 0)
    out = tmp_path / "out"
    run(folder, out / "eval-b", model=tmp_path / "b", seed=1)
    monkeypatch.setattr(evaluation, "load_model", None)
    a = tmp_path / "a"
    for second, says in (
        ("nothing-there", "no preset of that name"),
        (tmp_path / "b", "--seed 1 there, 0 now"),
        (tmp_path / "other" / "a", "two of these models have one name"),
    ):
        assert says in refused(capsys, folder, out, model=f"{a},{second}")[1]
    assert {p.name for p in out.iterdir()} == {"eval-b"}


# killed ----------------------------------------------------------------------------------------

PLACES = ("second piece", "half a line", "samples", "results", "own file")


def life(argv, place):
    """The command in a process of its own, which ends by SIGKILL at a place."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    evaluation.ROUNDS = 1

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def second(part, groups, keep=evaluation.keep):
        if part.exists():
            if place == "half a line":
                keep(part, groups[:1])
                line = evaluation.encoded(groups[1][0])
                with open(part, "ab") as f:
                    f.write(line[: len(line) // 2])
            die()
        keep(part, groups)

    if place in ("second piece", "half a line"):
        evaluation.keep = second
    else:
        ends = {
            "samples": ".new-samples.jsonl",
            "results": ".new-results.json",
            "own file": ".samples-",
            "mark": evaluation.HALF,
        }
        events = dict.fromkeys(("samples", "results"), "os.rename")
        events |= dict.fromkeys(("own file", "mark"), "os.remove")

        def audit(event, args):
            name = Path(str(args[0])).name if args else ""
            done = life.out / "samples.jsonl"
            if event == events[place] and name.startswith(ends[place]):
                if place != "results" or done.exists():  # not the first one, of the settings
                    die()

        life.out = Path(argv[argv.index("--out") + 1])
        sys.addaudithook(audit)
    guarded(evaluation.main, argv)


@pytest.fixture(scope="module")
def killed():
    """killed(argv, place): that life, to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval"])

    def killed(argv, place):
        process = context.Process(target=life, args=(argv, place))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL

    return killed


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run that nothing befell."""
    out = tmp_path_factory.mktemp("whole")
    run(folder, out)
    return out


@pytest.mark.parametrize("place", PLACES)
def test_killed_the_same_command_ends_the_same(folder, whole, killed, tmp_path, monkeypatch, place):
    """And samples nothing that was there: two of nine questions after the first piece, three with
    half a line, all of them later."""
    out, asked = tmp_path / "out", []
    killed(flags(folder, out), place)
    generate = evaluation.Sampler.generate

    def counted(self, prompts, *args, **kw):
        asked.append(len(prompts))
        return generate(self, prompts, *args, **kw)

    monkeypatch.setattr(evaluation.Sampler, "generate", counted)
    run(folder, out)
    assert sum(asked) == {"second piece": 7, "half a line": 6}.get(place, 0)
    assert without_seconds(results_of(out)) == without_seconds(results_of(whole))
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert {p.name for p in out.iterdir()} == {"LOCK", "results.json", "samples.jsonl"}


def test_killed_beside_earlier_sets(folder, whole, killed, tmp_path):
    """What was there is there after the kill, and a third set can be added before the killed."""
    out = tmp_path / "out"
    run(folder, out, data=folder / "others.jsonl")
    before = bytes_of(out)
    killed(flags(folder, out), "second piece")
    after = bytes_of(out)
    (part,) = after.keys() - before.keys()
    assert {k: v for k, v in after.items() if k != part} == before
    assert part.startswith(".samples-")
    assert len(after[part].splitlines()) >= 4
    (tmp_path / "third.jsonl").write_text('{"problem": "9+9", "answer": 18}\n')
    run(folder, out, data=tmp_path / "third.jsonl")
    assert (out / part).read_bytes() == after[part]
    run(folder, out)
    assert rows_of(out)[-18:] == rows_of(whole)
    assert len(rows_of(out)) == 6 + 2 + 18


def test_a_killed_run_of_other_settings_is_refused(folder, killed, tmp_path, capsys):
    """The folder belongs to its settings from the start, before any set is complete."""
    out = tmp_path / "out"
    killed(flags(folder, out), "second piece")
    assert "--seed 0 there, 1 now" in refused(capsys, folder, out, seed=1)[1]
    (out / "results.json").unlink()
    run(folder, out, seed=1)  # nothing of the killed run is taken for this one's
    assert {r["sample"] for r in rows_of(out)} == {0, 1}
    assert len(rows_of(out)) == 18
    alone = tmp_path / "alone"
    run(folder, alone, seed=1)
    assert rows_of(out) == rows_of(alone)


def test_rows_left_behind(folder, tmp_path):
    """Only whole groups from the first prompt on count, and the file is cut behind them."""
    out, part = tmp_path / "out", tmp_path / "part"
    run(folder, out)
    problems = load_problems(folder / "problems.jsonl")
    lines = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    rows = rows_of(out)
    prompts = [(p, r["prompt_ids"]) for p, r in zip(problems, rows[::2], strict=True)]
    assert evaluation.sampled(part, prompts, 2) == []
    for content, groups in (
        (b"", 0),
        (lines[0], 0),
        (b"".join(lines[:5]), 2),
        (b"".join(lines[:4]) + lines[4][:-1], 2),
        (b"".join(lines[:5]) + lines[5][:-1], 3),  # whole, but for its end
        (b"".join(lines[:2]) + b"[]\n" + b"".join(lines[2:]), 1),
        (b"".join(lines[:2]) + bytes(100) + b"".join(lines[2:]), 1),
        (b"".join(lines[2:]), 0),  # not from the first prompt on
        (lines[0] + lines[2], 0),
        (b"".join(lines), 9),
        (b"".join(lines) + lines[0], 9),
    ):
        part.write_bytes(content)
        found = evaluation.sampled(part, prompts, 2)
        assert [row for group in found for row in group] == rows[: 2 * groups], groups
        assert part.read_bytes() == b"".join(lines[: 2 * groups])


# nobody reads what it says ---------------------------------------------------------------------


def test_a_closed_pipe_costs_no_sampled_set(folder, whole, tmp_path):
    """`| head` that has left before anything is said: a real process, exit code 0, no line."""
    out = tmp_path / "out"
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, evaluation.__file__, *flags(folder, out)]
    ended = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, env=env, timeout=300)
    os.close(write)
    assert ended.returncode == 0 and ended.stderr == b""
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


class Broken(io.TextIOWrapper):
    """An output that takes so many writes."""

    def __init__(self, error, n=0):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error, self.n = error, n

    def flush(self):
        self.n -= 1
        if self.n < 0:
            raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left")]
)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_an_output_that_breaks_costs_what_is_said(folder, whole, tmp_path, monkeypatch, error, n):
    data = f"{folder / 'others.jsonl'},{folder / 'problems.jsonl'}"
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", Broken(error, n))
        run(folder, tmp_path / "out", data=data)
    assert rows_of(tmp_path / "out")[6:] == rows_of(whole)


def test_an_ascii_terminal_shows_escapes(folder, whole, tmp_path, monkeypatch):
    """And no control character of a question reaches any terminal."""
    for encoding, accent in (("ascii", b"\\xe9"), ("utf-8", "\u00e9".encode())):
        out, screen = tmp_path / encoding, io.BytesIO()
        for n, question in enumerate(QUESTIONS[1:4]):
            data = tmp_path / f"{n}.jsonl"
            data.write_text(json.dumps({"problem": question, "answer": "1"}) + "\n")
            with monkeypatch.context() as m:
                m.setattr(
                    sys, "stdout", io.TextIOWrapper(screen, encoding=encoding, errors="strict")
                )
                run(folder, out, data=data)
                sys.stdout.detach()
        said = screen.getvalue()
        assert accent in said and b"\\x1b[31m red" in said and b"a\\u2028b" in said
        assert b"\x1b" not in said and said.isascii() == (encoding == "ascii")
        assert len(rows_of(out)) == 6


# refused before anything is opened -------------------------------------------------------------


@pytest.mark.parametrize(
    "change, code, says",
    [
        ({"model": "no-such-model"}, 2, "no preset of that name"),
        ({"data": "nothing-here.parquet"}, 2, "nothing-here"),
        ({"data": " , "}, 2, "--data: names nothing"),
        ({"device": "cuda:77"}, 2, "--device"),
        ({"temperature": "-1"}, 2, "--temperature: '-1' is not a number from 0 on"),
        ({"temperature": "nan"}, 2, "--temperature: 'nan'"),
        ({"temperature": "inf"}, 2, "--temperature: 'inf'"),
        ({"temperature": "warm"}, 2, "--temperature: 'warm'"),
        ({"slots": "0"}, 2, "--slots"),
        ({"samples": "-3"}, 2, "--samples"),
        ({"max-prompt-tokens": "1"}, 3, "longer than 1"),
        ({"max-new-tokens": "250"}, 2, "lower --max-new-tokens, to at most 246"),
        ({"max-new-tokens": "9" * 30}, 2, "is not a whole number from 1"),
        ({"max-new-tokens": "99999999"}, 2, "the 256 tokens this model was made for"),
        ({"format": "chatml"}, 2, "prompt format"),
    ],
)
def test_mistakes_end_in_one_line(folder, whole, tmp_path, capsys, monkeypatch, change, code, says):
    """Beside results that are there, which stay, and in a new folder, which is not made."""
    monkeypatch.setattr(evaluation, "load_model", None)
    before = bytes_of(whole)
    for out in (whole, tmp_path / "new"):
        got, said = refused(capsys, folder, out, **change)
        assert got == code and says in said, said
    assert bytes_of(whole) == before and not (tmp_path / "new").exists()


def test_a_prompt_longer_than_the_model(folder, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "1+" * 200 + "1", "answer": 1}))
    said = refused(capsys, folder, tmp_path / "out", data=tmp_path / "long.jsonl")[1]
    assert "lower --max-prompt-tokens" in said


def test_slots_and_compile_reach_the_sampler(folder, tmp_path, monkeypatch):
    """By default the sampler chooses its slots, and the decode step is compiled on a GPU alone."""
    seen, load = [], evaluation.load_model

    class Seen(evaluation.Sampler):
        def __init__(self, model, slots, max_len, compile):
            seen.append((slots, max_len, compile))
            super().__init__(model, slots, max_len)

    monkeypatch.setattr(evaluation, "Sampler", Seen)
    monkeypatch.setattr(evaluation, "load_model", lambda folder, dtype, device: load(folder))
    monkeypatch.setattr(evaluation, "pick_device", lambda name: name)
    argv = flags(folder, "OUT", slots=None, device=None)
    for n, (more, want) in enumerate(
        (
            (["--device", "cpu"], (None, 22, False)),
            (["--device", "cpu", "--compile", "--slots", "3"], (3, 22, True)),
            (["--device", "cuda"], (None, 22, True)),
            (["--device", "cuda:1", "--no-compile"], (None, 22, False)),
        )
    ):
        argv[argv.index("--out") + 1] = str(tmp_path / str(n))
        guarded(evaluation.main, [*argv, *more])
        assert seen[-1] == want
    assert [results_of(tmp_path / n)["dtype"] for n in "02"] == ["torch.float32", "torch.bfloat16"]


def test_help_says_what_the_defaults_are(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--compile, --no-compile" in said and "(default: on a GPU)" in said
    assert "the sampler's choice" in said


def test_interruption_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        guarded(main)
    assert e.value.code == 130 and capsys.readouterr().err.strip().endswith("interrupted")
