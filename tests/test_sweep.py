"""Sweeps: what is started, how often, and what is left after a kill; the numbers of the table."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

import tiny
from experiments import sweep, table
from experiments.arms import EXPERIMENTS, Experiment
from plumbing import intervals

# stands for train.py: a row a step, resumed after its last one; no result but of seed, lr and step.
# Where a file `hold` is, it stays before step 2
FAKE = """
import argparse, fcntl, json, os, signal, sys, time
from pathlib import Path

p = argparse.ArgumentParser()
for name in ("--steps", "--seed", "--lr", "--fail"):
    p.add_argument(name, type=int, default=0)
p.add_argument("--out", type=Path)
a = p.parse_args()
lock = open(a.out / "LOCK", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(a.out.parents[2] / "starts", "a") as f:
    f.write(f"{a.out.parent.name}/{a.out.name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\\n")
if a.fail == a.seed:
    sys.exit("it would not\\ntrain.py: --fail: this seed fails")

def save(*_):
    (a.out / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(a.out / "config.json").write_text(json.dumps({"commit": "0123456789", "torch": "2.13"}))
path = a.out / "metrics.jsonl"
begun = len(path.read_text().splitlines()) if path.exists() else 0
for step in range(begun, a.steps + 1):
    begin = time.perf_counter()
    (a.out / f"step_{step:06}").mkdir(exist_ok=True)
    while step == 2 and (a.out.parents[2] / "hold").exists():
        time.sleep(0.02)
    row = {"step": step, "completions/mean_length": 10 + step, "train_tflop": 0.5}
    row |= {"time/rollout": time.perf_counter() - begin, "time/setup": 100.0}
    if step % 2 == 0:
        row["eval/accuracy"] = (step * a.lr + a.seed) / 100
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\\n")
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in sweep.ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two experiments on a script that stands for train.py, with a baseline in common; no
    figures."""
    monkeypatch.setattr(table, "draw", lambda experiment, rows, path: path.touch())
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    common = dict(command=str(script), seeds=2, at=(2,))
    experiments = {
        "first": Experiment("First?", {"base": "--lr 1", "twice": "--lr 2"}, "--steps 4", **common),
        "second": Experiment(
            "Second?", {"same": "--lr=1 --steps 4", "short": "--lr 3 --steps 2"}, **common
        ),
    }
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    for name, experiment in experiments.items():
        monkeypatch.setitem(EXPERIMENTS, name, experiment)
    return experiments


def run(folder, *argv):
    sweep.main([*argv, "--out", str(folder / "out"), "--results", str(folder / "results")])


def starts(folder):
    return [line.split() for line in (folder / "out/runs/../starts").read_text().splitlines()]


def rows(folder, name, times=False):
    out = [json.loads(line) for line in (folder / f"results/{name}.jsonl").read_text().splitlines()]
    for row in out:
        seconds = row.pop("seconds")
        assert times or all(0 <= s < 50 for s in seconds.values())  # without time/setup
    return out


def test_a_run_that_two_experiments_share_is_made_once(fake, tmp_path):
    run(tmp_path, "all")
    assert len(starts(tmp_path)) == 6 == len({name for name, *_ in starts(tmp_path)})
    assert {threads for *_, threads in starts(tmp_path)} == {os.environ.get("OMP_NUM_THREADS", "1")}
    first, second = rows(tmp_path, "first"), rows(tmp_path, "second")
    keys = [(row["arm"], row["seed"]) for row in first]
    assert keys == [("base", 1), ("base", 2), ("twice", 1), ("twice", 2)]
    assert first[2]["accuracy"] == {"0": 0.01, "2": 0.05, "4": 0.09}
    assert first[2]["length"] == {"0": 10, "1": 11, "2": 12, "4": 14}
    assert first[2]["tflop"] == {"0": 0.5, "1": 1.0, "2": 1.5, "4": 2.5}
    assert first[2]["commit"] == "0123456789"
    assert first[0]["accuracy"] == second[0]["accuracy"]
    command = first[3]["command"]
    assert command.endswith("--steps 4 --lr 2 --seed 2 --out out/first/twice/seed2")
    assert not list(tmp_path.glob("out/runs/*/*/step_*"))
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        f"{name}.{kind}" for name in ("first", "second") for kind in ("jsonl", "md", "png")
    }
    run(tmp_path, "all")
    assert len(starts(tmp_path)) == 6  # all are there


def test_a_sweep_that_was_killed_equals_one_that_was_not(fake, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    hold = killed / "out/hold"
    hold.parent.mkdir(parents=True)
    run(whole, "first", "--jobs", "4")

    def rows_there():
        """How many rows each run that has begun has written."""
        logs = killed.glob("out/runs/*/*/metrics.jsonl")
        return sorted(len(log.read_text().splitlines()) for log in logs)

    def begin():
        """The sweep as a process of its own."""
        if pid := os.fork():
            return pid
        os.setsid()
        sweep_and_exit(killed)

    hold.touch()
    pid = begin()
    wait_until(lambda: rows_there() == [2, 2])
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.kill(int(starts(killed)[0][1]), signal.SIGKILL)
    hold.unlink()  # the other run is left at work, and comes to its end
    wait_until(lambda: rows_there() == [2, 5])
    hold.touch()
    pid = begin()
    wait_until(lambda: rows_there() == [2, 2, 5] and len(starts(killed)) == 5)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert len(list(killed.glob("out/runs/*/*/saved"))) == 2
    assert len(list(killed.glob("out/runs/*/*/FINISHED"))) == 1
    hold.unlink()
    run(killed, "first")
    assert rows(killed, "first") == rows(whole, "first")
    begun = Counter(name for name, *_ in starts(killed))
    assert sorted(begun.values()) == [1, 2, 2, 3]


def wait_until(there):
    for _ in range(1000):
        if there():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


def sweep_and_exit(folder):
    code = 1
    try:
        run(folder, "first")
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def test_it_waits_for_runs_that_a_killed_sweep_left(tmp_path, capsys):
    folder = tmp_path / "runs/any/seed1"
    folder.mkdir(parents=True)
    lock = open(folder / "LOCK", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.2, lock.close).start()
    sweep.wait_for_orphans(tmp_path, [])
    assert lock.closed and f"still at work: {folder}" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_go_on(fake, tmp_path, monkeypatch, capsys):
    arms = {"base": "--lr 1", "bad": "--lr 2 --fail 2"}
    command = fake["first"].command
    broken = Experiment("Bad?", arms, "--steps 2", command=command, seeds=2, at=())
    monkeypatch.setitem(EXPERIMENTS, "first", broken)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "first")
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "train.py: --fail: this seed fails (exit code 1" in said.out
    assert "1 runs failed" in said.err
    assert [(row["arm"], row["seed"]) for row in rows(tmp_path, "first")] == [
        ("base", 1),
        ("base", 2),
        ("bad", 1),
    ]
    assert "| bad (1 of 2 seeds) | 0.05 | +0.02 |" in (tmp_path / "results/first.md").read_text()


def test_rows_stay_while_their_command_does(fake, tmp_path, monkeypatch):
    run(tmp_path, "first", "--seeds", "1", "--arms", "twice")
    (tmp_path / "out").rename(tmp_path / "gone")
    run(tmp_path, "first", "--rows-only")
    assert len(rows(tmp_path, "first")) == 1 and not (tmp_path / "out").exists()
    run(tmp_path, "first", "--seeds", "2", "--arms", "twice")
    assert [row["seed"] for row in rows(tmp_path, "first")] == [1, 2]
    monkeypatch.setattr(sys.modules["experiments.sweep"], "EXPERIMENTS", EXPERIMENTS)
    other = Experiment("Other?", {"twice": "--lr 4"}, command=fake["first"].command)
    monkeypatch.setitem(EXPERIMENTS, "first", other)
    kept = table.rows_of("first", other, {}, rows(tmp_path, "first"))
    assert kept == []


def test_train_itself_takes_a_warm_up_that_is_kept(tmp_path, monkeypatch):
    flags = "--steps 1 --prompts 2 --group 2 --max-new-tokens 8 --eval-limit 2 --watch-layers 0"
    e = Experiment("Does it run?", {"grpo": "--bupo-layer none"}, flags, seeds=1, at=(0,))
    monkeypatch.setitem(EXPERIMENTS, "layers", e)
    kept = tiny.warm_up(tmp_path / "out/warm-ups/tiny-seed1", 1, steps=3, batch=8)
    expected = {"model": "tiny", "seed": 1, "steps": 600, "batch": 64, "lr": 0.003}
    (kept / "warm_up.json").write_text(json.dumps(expected) + "\n")
    run(tmp_path, "layers", "--keep-checkpoints")
    (row,) = rows(tmp_path, "layers")
    assert row["accuracy"].keys() == {"0", "1"} and row["length"].keys() == {"1"}
    (folder,) = tmp_path.glob("out/runs/*/seed1")
    weights = "model.safetensors"
    assert (folder / "warm-up" / weights).read_bytes() == (kept / weights).read_bytes()
    assert (folder / "step_000001").exists() and row["torch"]


def test_runs_of_a_seed_wait_for_its_warm_up(tmp_path):
    def job(arm, seed):
        words = ("train.py", *arm.split())
        return sweep.Run(words, seed, sweep.folder_of(words, tmp_path) / f"seed{seed}")

    a, b, c = job("--lr 1", 1), job("--lr 2", 1), job("--lr 2", 2)
    words = job("--recipe words", 1)
    assert [sweep.may_start(run, [a]) for run in (b, c, words)] == [False, True, True]
    assert sweep.warm_up_of(words) is None
    assert sweep.may_start(job("--model tiny-llama", 1), [a])
    kept = sweep.warm_up_of(a)
    kept.mkdir(parents=True)
    assert not sweep.may_start(b, [a])  # not whole yet
    (kept / "warm_up.json").touch()
    assert sweep.may_start(b, [a])


def test_flags_are_the_same_in_any_order_and_the_last_counts(tmp_path):
    arms = {
        "a": "--lr 2 --x=y --z 1",
        "b": "--z 1 --x y --steps 3 --steps 4",
        "m": "-m experiments.traps late --lr 2",
    }
    e = Experiment("?", arms, "--steps 4 --lr 2")
    a, b, m = (table.words_of(e, arm) for arm in arms)
    assert a == ("train.py", "--steps", "4", "--lr", "2", "--x", "y", "--z", "1")
    assert sweep.folder_of(a, tmp_path) == sweep.folder_of(b, tmp_path)
    assert m == ("-m", "experiments.traps", "late", "--steps", "4", "--lr", "2")
    with pytest.raises(ValueError, match="'4' stands before any flag"):
        table.words_of(Experiment("?", {"a": "4"}), "a")


def test_what_is_wrong_with_a_command_is_a_line(fake, tmp_path):
    for argv, why in (
        ([], "name an experiment, or all: there are first, second"),
        (["third"], "no experiment 'third'"),
        (["first", "--arms", "base,none"], "no arm 'none': there are base, twice"),
    ):
        with pytest.raises(ValueError, match=why):
            sweep.main(argv)
    assert sweep.seeds("1,3-5") == [1, 3, 4, 5]
    for text in ("0", "1-", "a", "3-1", ""):
        with pytest.raises(SystemExit):
            sweep.main(["first", "--seeds", text])


def made_up():
    """Rows of two arms and three seeds; only step 10 differs, by a tenth of the seed."""
    out = []
    for arm, offset in (("base", 0.0), ("other", 0.1)):
        for seed in (1, 2, 3):
            accuracy = {"0": 0.2, "10": 0.5 + offset * seed, "20": 0.9}
            row = {"arm": arm, "seed": seed, "commit": "abcdef012345", "accuracy": accuracy}
            row |= {"accuracy/long": {"20": 0.25}, "length": {"10": 9.0, "20": 30.0}}
            out.append(row | {"seconds": {"20": 60.0 + seed}})
    return out


def test_the_numbers_of_the_table():
    e = Experiment("?", {"base": "", "other": "--lr 2"}, seeds=3)
    lines = table.table("made-up", e, made_up()).splitlines()
    _, low, high = intervals.bootstrap_mean([0.6, 0.7, 0.8], within=(0, 1))
    _, less, more = intervals.bootstrap_mean([0.1, 0.2, 0.3])
    _, s_low, s_high = intervals.bootstrap_mean([61.0, 62.0, 63.0])
    seconds = f"62 [{s_low:.0f}, {s_high:.0f}]"
    assert lines[0] == (
        "| arm | accuracy, step 10 | accuracy, step 20 | long, step 20 | minus base, step 10 "
        "| minus base, step 20 | length | seconds |"
    )
    assert lines[2] == f"| base | 0.50 | 0.90 | 0.25 |  |  | 30.0 | {seconds} |"
    assert lines[3] == (
        f"| other | 0.70 [{low:.2f}, {high:.2f}] | 0.90 | 0.25 "
        f"| +0.20 [{less:+.2f}, {more:+.2f}] | 0.00 | 30.0 | {seconds} |"
    )
    assert lines[5].startswith("Means over 3 seeds") and "Commit abcdef0." in " ".join(lines)
    assert lines[-1] == "    python -m experiments.sweep made-up"
    two = [row for row in made_up() if row["seed"] < 3]
    lines = table.table("made-up", replace(e, seeds=2), two).splitlines()
    assert lines[5].startswith("Means over 2 seeds, too few for intervals.")
    assert lines[3].startswith("| other | 0.65 | 0.90 |")


def test_the_figure_is_drawn(tmp_path):
    rows = [row for row in made_up() if row["arm"] == "base"]  # nothing of the other one yet
    table.draw(Experiment("?", {"base": "", "other": ""}), rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_differences_are_of_the_seeds_that_both_have():
    rows = [row for row in made_up() if (row["arm"], row["seed"]) != ("base", 2)]
    mean, low, high = table.interval(rows, "other", "accuracy", 10, "base")
    assert mean == pytest.approx((0.1 + 0.3) / 2)
    one = [row for row in rows if row["seed"] == 3]
    assert table.text_of(table.interval(one, "other", "accuracy", 10), "accuracy") == "0.80"
    assert table.interval(rows, "other", "accuracy", 15) is None
    assert table.text_of((-0.001, -0.012, 0.01), "accuracy", signed=True) == "0.00 [-0.01, +0.01]"
    # an end that rounds to 0 says on which side it lies
    close = table.text_of((0.012, 0.0013, 0.03), "accuracy", signed=True)
    assert close == "+0.012 [+0.001, +0.030]"
    assert table.text_of((0.012, 0.0, 0.03), "accuracy", signed=True) == "+0.01 [0.00, +0.03]"
    spread = [{"arm": "a", "seed": i, "seconds": {"1": s}} for i, s in enumerate((1.0, 1.0, 99.0))]
    assert table.interval(spread, "a", "seconds", 1)[1] == 0  # and no less
    assert table.values(rows, "other", "length", "end") == {1: 30.0, 2: 30.0, 3: 30.0}


def test_a_length_that_the_flags_give_has_no_interval():
    rows = [{"arm": "a", "seed": seed, "internal_steps": {"40": 15}} for seed in (1, 2, 3)]
    assert table.interval(rows, "a", "internal_steps", "end") == (15, None, None)
    rows[0]["internal_steps"]["40"] = 12
    assert table.interval(rows, "a", "internal_steps", "end")[1] < 14
