"""Faults, by the number of their row in the project's list F1-F36. What has a test elsewhere is
named here and not repeated.

F1   below: SIGKILL in rollout, grading, backward, optimizer, between two rows, while resuming;
     kill_many.py at random moments
F2   test_checkpoint.py::test_killed_at_every_file_operation_old_or_new_loads_never_neither,
     test_the_order_that_outlives_a_power_cut, test_rewind_killed_anywhere_loses_no_row; below: in
     the saves of a run that then goes on
F3   test_checkpoint.py::test_killed_at_every_file_operation... ("next"),
     test_leftovers_go_and_the_rest_stays; below: in a run
F4   test_checkpoint.py::test_damage_falls_back_to_the_checkpoint_before,
     test_no_bit_of_any_file_can_flip_unnoticed; below: the command
F5   test_train.py::test_a_signal_saves_the_last_whole_step,
     test_rollout.py::test_a_signal_ends_it_within_one_block_of_steps_and_leaves_it_usable
F6   below
F7   test_parallel.py::test_F07_a_signal_to_one_rank_stops_all_at_the_same_step
F8   test_parallel.py::test_a_lost_rank_ends_the_other_and_leaves_nothing_half_written
F9   test_checkpoint.py::test_writing_stops_at_any_byte,
     test_disk_full_is_one_line_and_nothing_lost; below: the run, and how it goes on
F10  below: a disk that is full for a step, and to the end;
     test_train.py::test_a_finished_run_ends_well_whatever_its_rows_are
F11  below; test_checkpoint.py::test_wrong_arguments_are_one_line
F12  test_model.py::test_files_that_are_not_what_their_names_say,
     test_checkpoint.py::test_damage_falls_back...
F13  test_model.py::test_shards_missing_twice_or_outside_the_folder
F14  test_model.py::test_everything_wrong_with_the_weights_is_one_message_before_any_is_read,
     test_rotary_buffers_of_old_checkpoints_...,
     test_checkpoint.py::test_load_names_all_that_does_not_fit_and_touches_nothing
F15  test_model.py::test_a_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it
F16  test_model.py::test_weights_that_are_not_numbers
F17  test_checkpoint.py::test_a_second_process_is_told_who_holds_the_run,
     test_a_file_system_without_locks_is_a_warning; below: the command
F18  test_train.py::test_changed_settings_are_refused_on_resume; below: more steps, override
F19  below: logs without checkpoints, checkpoints without logs
F20  test_train.py::test_a_gradient_that_is_not_finite_makes_no_update_and_leaves_its_batch
F21  test_train.py::test_three_in_a_row_end_the_run,
     test_checkpoint.py::test_not_a_number_is_never_written
F22  test_train.py::test_equal_rewards_make_no_update; below: moments too
F23  below
F24  test_data.py::test_bad_row_is_skipped_with_its_place, test_any_row_is_a_problem_or_a_bad_row,
     test_share_of_bad_rows
F25  test_data.py::test_unusable_files_raise_one_line,
     test_select_filters_and_says_what_removed_what; below: before the model is loaded
F26  test_data.py::test_set_smaller_than_a_batch, test_repeated_id; below: a run on one problem
F27  test_train.py::test_mistakes_end_in_one_line ("256 tokens", "longer than 2"); below: dropped
     and counted
F28  test_data.py::test_hub_errors_say_what_and_what_to_do, test_offline_means_not_one_request,
     test_a_local_path_never_asks_the_hub,
     test_model.py::test_an_unreachable_hub_names_the_repository_and_the_ways_out,
     test_train.py::test_the_headline_command_...
F29  below: the message; test_train.py::test_out_of_memory_..., test_the_rehearsal_... No GPU really
     runs out of memory here
F30  test_model.py::test_shards_missing_twice_or_outside_the_folder; fuzz.py "index"
F31  test_model.py::test_files_that_are_not_what_their_names_say; fuzz.py "weights"
F32  test_model.py::test_settings_that_would_change_the_maths_are_refused; fuzz.py "config"; below:
     sizes, foreign code
F33  test_tokenizer.py::test_what_is_not_supported_is_one_clear_line, test_files_that_are_none;
     fuzz.py "tokenizer"; below: templates
F34  test_tokenizer.py::test_a_million_characters, test_verify.py::test_hostile_inputs_end_quickly
F35  test_data.py::test_json_in_its_shapes (CRLF, byte order marks); below: clocks, names, empty
     files
F36  there is no optional logger; below: nobody who reads what is printed
"""

import builtins
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import kill_many
import pytest
import torch
from kill_many import command, difference, ended, result, rows, tensors
from kill_many import saved as steps
from safetensors import safe_open
from safetensors.torch import save_file

import eval as evaluation
import train
from plumbing import checkpoint, hub
from plumbing import rows as rows_file
from plumbing.cli import guarded
from verify import verifiable

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kill_many.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server():
    return kill_many.Server(preload=["test_faults"])  # here are the places to die at


@pytest.fixture(scope="module")
def live(server, folder):
    """live(out, prepare, ...) runs a life of the command, to its end or to its death: its exit
    code, and what it printed."""

    def live(out, prepare=None, argv=None, draws=False, **change):
        log = out.parent / f"{out.name}.log"
        start = log.stat().st_size if log.exists() else 0
        life = server.start(argv or command(folder, out, **change), log, prepare, draws)
        code = ended(life, 60)
        if code is None:
            life.kill()
        with open(log, encoding="utf-8") as f:
            f.seek(start)
            return code, f.read()

    return live


@pytest.fixture(scope="module")
def whole(live, tmp_path_factory):
    """The run that nothing befell."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = live(out)
    assert code == 0, said
    assert [r["step"] for r in rows(out / "metrics.jsonl")] == list(range(11)) and len(
        list(out.glob("step_*"))
    ) == 2
    return out


# --------------------------------------------------------------------------------------------------
# where a life ends. Each is prepare() of a life: from here on, SIGKILL at that place. Classes, so
# that they travel to the process


class Place:
    def __init__(self, n):
        self.n = n

    def tick(self, *args):
        self.n -= 1
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class InRollout(Place):
    """In the n-th call of a Python function below the sampler's generate."""

    def __call__(self):
        import rollout

        generate = rollout.Sampler.generate

        def counted(*a, **k):
            sys.setprofile(lambda frame, event, arg: event == "call" and self.tick())
            try:
                return generate(*a, **k)
            finally:
                sys.setprofile(None)

        rollout.Sampler.generate = counted


class InGrading(Place):
    """Before the n-th verdict."""

    def __call__(self):
        judge = evaluation.judge
        evaluation.judge = lambda *a: self.tick() or judge(*a)


class InBackward(Place):
    """After the n-th backward: gradients there, weights as before."""

    def __call__(self):
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda *a, **k: backward(*a, **k) or self.tick()


class InOptimizer(Place):
    """Between the n-th step of the optimizer and whatever comes next: of two in a step, one is
    done."""

    def __call__(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self.tick)


class BeforeOpening(Place):
    """Before the n-th opening of a file of that name for writing, or once it is opened and
    empty."""

    def __init__(self, name, n=1, emptied=False):
        self.name, self.n, self.emptied = name, n, emptied

    def __call__(self):
        def audit(event, args):
            if (
                event == "open"
                and str(args[0]).endswith(self.name)
                and args[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                if self.emptied and self.n == 1:
                    os.truncate(args[0], 0)
                self.tick()

        sys.addaudithook(audit)


class InDrawing(Place):
    """While the figures are drawn, when these are there already."""

    def __init__(self, drawn):
        self.drawn, self.n = drawn, 1

    def __call__(self):
        from plumbing import figures

        def draw(folder):
            for name in self.drawn:
                (folder / name).write_bytes(kill_many.FIGURES[name])
            self.tick()

        figures.draw = draw


class BeforeRenaming(Place):
    """Before the n-th renaming to a name that begins so."""

    def __init__(self, start, n=1):
        self.start, self.n = start, n

    def __call__(self):
        sys.addaudithook(
            lambda event, args: (
                event == "os.rename" and Path(args[1]).name.startswith(self.start) and self.tick()
            )
        )


class InRetention(Place):
    """Before the n-th file of an old checkpoint is deleted."""

    def __call__(self):
        trash = []

        def audit(event, args):
            if event == "shutil.rmtree":
                trash[:] = [1] if ".trash-" in str(args[0]) else []
            if event == "os.remove" and trash:
                self.tick()

        sys.addaudithook(audit)


# One run folder each: where its lives end, and the checkpoints that are there then. Saves are at
# steps 2, 4, 6, ..., two are kept; each place counts from its life's start, which is the last of
# these checkpoints
PLACES = {
    "rollout": [
        (InRollout(2000), []),
        (InGrading(4 + 16 * 3 + 4 + 5), [2]),
        (InGrading(16 + 4 + 16 * 2 + 5), [2, 4]),
    ],
    # of step 1; of the switch; of two in step 6, one
    "update": [(InBackward(1), []), (InBackward(7), [2]), (InOptimizer(7), [2, 4])],
    "save": [
        (BeforeOpening("state.json"), []),
        (BeforeOpening("MANIFEST.json", 3), [2, 4]),
        (BeforeRenaming("step_000006"), [2, 4]),
        (BeforeOpening("MANIFEST.json", 3), [6, 8]),
    ],
    # while a file is deleted after a save; before any is; and where the resume that follows makes
    # up for it
    "retention": [
        (InRetention(3), [4, 6]),
        (BeforeRenaming(".trash-step_000004"), [4, 6, 8]),
        (InRetention(3), [6, 8]),
    ],
    # the run is over, but for what its last save was to delete
    "last": [(BeforeRenaming(".trash-step_000006"), [6, 8, 10])],
    "resume": [
        (InOptimizer(11), [2, 4]),
        (BeforeRenaming("metrics.jsonl"), [2, 4]),
        (BeforeRenaming("samples.jsonl"), [2, 4]),
    ],
}


@pytest.mark.parametrize("place", PLACES)
def test_F01_F02_F03_killed_the_same_command_ends_the_same(live, whole, tmp_path, place):
    """SIGKILL, then the same command, and so on: in the end every weight and moment, metrics and
    samples of the run that nothing befell."""
    out, before = tmp_path / "run", []
    for n, (die, left) in enumerate(PLACES[place]):
        code, said = live(out, die)
        assert code == KILLED and steps(out) == left, f"life {n + 1}: {steps(out)}: {said}"
        assert (
            (f"resuming {out} after step {before[-1]}" in said)
            if before
            else "resuming" not in said
        )
        before = left
    code, said = live(out)
    assert (
        code == 0
        and "taken over from pid" in said
        and (not before or f"resuming {out} after step {before[-1]}" in said)
    ), said
    assert difference(result(whole), result(out)) == ""


def test_F01_killed_while_the_settings_are_written(live, whole, tmp_path):
    out = tmp_path / "run"
    for die in (InOptimizer(11), BeforeRenaming("config.json")):
        assert live(out, die)[0] == KILLED
    code, said = live(out)
    assert code == 0 and difference(result(whole), result(out)) == "", said


def test_F01_killed_while_the_figure_is_drawn(live, whole, tmp_path):
    """Before each of its two files; then, and when all is done, the same command draws them and
    says how it went."""
    out = tmp_path / "run"
    for die, left in (
        (InDrawing([]), []),
        (InDrawing(["training.png"]), ["training.png"]),
    ):
        code, said = live(out, die, draws=True)
        assert code == KILLED and steps(out) == [8, 10] and result(out)["figures"] == left, said
    for _ in range(2):
        code, said = live(out, draws=True)
        assert (
            code == 0
            and said.splitlines()[-1].startswith("accuracy ")
            and len(result(out)["figures"]) == 3
        )
    for name in result(out)["figures"]:
        (out / name).unlink()
    assert difference(result(whole), result(out)) == ""


def test_F01_real_processes_killed_in_rollout_update_save_and_retention(folder, whole, tmp_path):
    """Five interpreters, one run folder; the fifth may finish. What forks do not show: a start from
    nothing, imports, exit codes."""
    out, log = tmp_path / "run", tmp_path / "log"
    code = "import sys, kill_many, test_faults as t; kill_many.live(sys.argv[3:], sys.argv[2], eval(sys.argv[1], vars(t)))"  # noqa: E501
    for die, left in (
        ("InRollout(3000)", []),
        ("InBackward(6)", [2]),
        ("BeforeRenaming('step_000006')", [2, 4]),
        ("InRetention(2)", [4, 6]),
        ("None", [8, 10]),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code, die, str(log), *command(folder, out)],
            timeout=120,
            env=os.environ | {"PYTHONPATH": f"{kill_many.HERE}:{kill_many.HERE.parent}"},
        )
        assert ran.returncode == (0 if die == "None" else KILLED) and steps(out) == left, (
            f"{die}: {log.read_text()[-2000:]}"
        )
    assert difference(result(whole), result(out)) == ""


def test_F01_killed_many_times_at_random(tmp_path):
    """A short kill_many.py."""
    hit, runs = kill_many.kill_many(tmp_path, kills=5, seed=1, say=lambda line: None)
    assert hit.total() == 5 and runs >= 1


def test_F01_a_difference_would_be_seen(whole, tmp_path):
    """What the tests above rest on: one bit of one moment, one reward, one file too many."""
    same = Path(shutil.copytree(whole, tmp_path / "same"))
    good = result(whole)
    assert difference(good, result(same)) == ""
    name, value = next(iter(tensors(whole / "step_000010").items()))
    for change in (
        lambda r: r["checkpoints"]["step_000010"].update({name: value[::-1]}),
        lambda r: r["metrics"][3].update(reward=9),
        lambda r: r["samples"].pop(),
        lambda r: r["checkpoints"].pop("step_000008"),
        lambda r: r["names"].append(".tmp-x"),
    ):
        other = json.loads(json.dumps(good))
        change(other)
        assert difference(good, other) and difference(other, good)
    path = same / "step_000010/resume/optim.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="optim.safetensors is damaged"):
        result(same)


class Twice:
    """The signal in the n-th backward, two times: the first alone would let the step end."""

    def __init__(self, number, n):
        self.number, self.n = number, n

    def __call__(self):
        backward = torch.Tensor.backward

        def signalled(*a, **k):
            self.n -= 1
            if self.n == 0:
                first = signal.getsignal(self.number)
                signal.raise_signal(self.number)
                # two at one instant would be one to Python
                while signal.getsignal(self.number) is first:
                    time.sleep(0.001)
                signal.raise_signal(self.number)
            return backward(*a, **k)

        torch.Tensor.backward = signalled


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_F06_a_second_signal_ends_it_at_once_without_damage(live, whole, tmp_path, number, code):
    """In the update of step 4, the checkpoint of step 2 being the last: these two steps are lost
    and nothing else."""
    out = tmp_path / "run"
    got, said = live(out, Twice(number, 7))
    assert (
        got == code
        and "stopped after" not in said
        and "Traceback" not in said
        and steps(out) == [2]
    ), said
    code, said = live(out)
    assert (
        code == 0
        and f"resuming {out} after step 2" in said
        and difference(result(whole), result(out)) == ""
    ), said


# --------------------------------------------------------------------------------------------------
# damaged checkpoints, full disks, folders that are none


def zero_tail(path):
    size = path.stat().st_size
    with open(path, "r+b") as f:
        f.seek(size // 2)
        f.write(b"\0" * (size - size // 2))


def test_F04_a_power_cut_costs_one_checkpoint_and_of_all_is_exit_4(live, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    zero_tail(out / "step_000010/model.safetensors")
    code, said = live(out)
    assert (
        code == 0
        and "skipped" in said
        and "model.safetensors is damaged" in said
        and f"resuming {out} after step 8" in said
    )
    (bad,) = (p for p in out.iterdir() if ".bad-" in p.name)  # kept for whoever wants to look
    shutil.rmtree(bad)
    assert difference(result(whole), result(out)) == ""
    before = (out / "metrics.jsonl").read_bytes()
    for step in out.glob("step_*"):
        zero_tail(step / "resume/optim.safetensors")
    code, said = live(out)
    assert (
        code == 4
        and "none of 2 checkpoints is whole" in said.splitlines()[-1]
        and "Traceback" not in said
    )
    assert steps(out) == [8, 10] and (out / "metrics.jsonl").read_bytes() == before


class DiskFull:
    """From step 5 on no file grows beyond `size` bytes."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        next_problems = train.next_problems

        def begin_step(run, step, *rest):
            if step == 5:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
            return next_problems(run, step, *rest)

        train.next_problems = begin_step


def test_F09_a_full_disk_stops_a_save_and_the_run_goes_on_later(live, whole, tmp_path):
    out = tmp_path / "run"
    # of all files only the moments are larger
    code, said = live(out, DiskFull((whole / "samples.jsonl").stat().st_size))
    last = said.splitlines()[-1]
    assert (
        code == 8
        and "step_000006: not saved" in last
        and "bytes" in last
        and "Traceback" not in said
    )
    assert steps(out) == [2, 4] and not [p for p in out.iterdir() if p.name.startswith(".")]
    assert live(out)[0] == 0 and difference(result(whole), result(out)) == ""


class FullInStep3:
    """While step 3 runs no file grows by more than 20 bytes beyond what metrics.jsonl has: the
    kernel itself writes a part of its row and says how much that was; of samples.jsonl, which is
    longer, it writes nothing. Nothing is saved then."""

    def __init__(self, out):
        self.out = out

    def __call__(self):
        after_updates = train.after_updates

        def end_step(run, *rest):
            size = resource.RLIM_INFINITY
            if run.step + 1 == 3:
                size = (self.out / "metrics.jsonl").stat().st_size + 20
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return after_updates(run, *rest)

        train.after_updates = end_step


def test_F10_a_disk_that_is_full_for_a_step_costs_no_row(live, whole, tmp_path):
    out = tmp_path / "run"
    code, said = live(out, FullInStep3(out))
    assert (
        code == 0 and said.count("cannot be written (File too large)") == 2 and "lost" not in said
    ), said
    assert (
        said.splitlines()[-1].startswith("accuracy ")
        and difference(result(whole), result(out)) == ""
    )


def test_F10_nor_the_watch_of_layers(live, tmp_path):
    out = tmp_path / "run"
    code, said = live(out, FullInStep3(out), watch_layers=1)
    assert code == 0 and all("watch/perplexity" in r for r in rows(out / "metrics.jsonl")[1:]), said


class NoRoom:
    """From its fourth row on metrics.jsonl finds no room: of that row a kernel takes 20 bytes, and
    then refuses."""

    def __call__(self):
        class Full:
            def __init__(self, f):
                self.f, self.left = f, 20

            def __getattr__(self, name):
                return getattr(self.f, name)

            def write(self, data):
                if b'"step": 3' not in data and self.left == 20:
                    return self.f.write(data)
                if not self.left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done, self.left = self.f.write(data[: self.left]), 0
                return done

        def opened(path, *a, real=builtins.open, **k):
            f = real(path, *a, **k)
            return Full(f) if str(path).endswith("metrics.jsonl") and a[:1] == ("a+b",) else f

        builtins.open = opened


def test_F10_a_disk_that_stays_full_costs_rows_and_not_the_run(live, whole, tmp_path):
    """The figure shows what is there, the last line what was seen; the command again mends the torn
    row."""
    out = tmp_path / "run"
    code, said = live(out, NoRoom(), draws=True)
    assert code == 0 and said.count("No space left") == 1 and "its last 8 rows are lost" in said
    assert (
        said.splitlines()[-1].startswith("accuracy ")
        and (out / "training.png").stat().st_size > 5000
    )
    assert [r and r["step"] for r in rows_file.each_row(out / "metrics.jsonl")] == [0, 1, 2, None]
    code, said = live(out)
    assert code == 0 and "1 lines after step 10 moved" in said and "Traceback" not in said
    assert [r["step"] for r in rows(out / "metrics.jsonl")] == [0, 1, 2]
    assert (
        result(whole)["checkpoints"] == result(out)["checkpoints"]
        and result(whole)["samples"] == result(out)["samples"]
    )


class FullForTheFigure:
    """No file grows beyond 10,000 bytes once the run is saved: its figure does not fit."""

    def __call__(self):
        from plumbing import figures

        draw = figures.draw

        def drawn(folder):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            return draw(folder)

        figures.draw = drawn


def test_F10_a_figure_that_does_not_fit_on_the_disk_is_a_line(live, whole, tmp_path):
    out = tmp_path / "run"
    code, said = live(out, FullForTheFigure(), draws=True)
    assert (
        code == 0
        and "not drawn (" in said
        and "File too large" in said
        and said.splitlines()[-1].startswith("accuracy ")
    ), said
    assert result(whole)["checkpoints"] == result(out)["checkpoints"]


class FullInWarmUp:
    """A warm-up of one step, and a disk on which its model finds no room."""

    def __call__(self):
        import tiny

        tiny.warm_up.__defaults__ = 1, 4, 3e-3, "tiny"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_F09_a_full_disk_in_the_warm_up_is_one_line(live, tmp_path):
    code, said = live(
        tmp_path / "run", FullInWarmUp(), argv=["--out", str(tmp_path / "run"), "--steps", "1"]
    )
    assert code == 8 and "os error 27" in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "run/warm-up/warm_up.json").exists()  # the next start does it again


# --------------------------------------------------------------------------------------------------
# nobody reads what is printed, or the terminal is gone


class Lost:
    """How stdout and stderr are lost: no reader, a full disk behind them, closed from the start, a
    terminal that has gone, or few letters."""

    def __init__(self, how):
        self.how = how

    def __call__(self):
        if self.how == "ascii":
            sys.stdout.reconfigure(encoding="ascii", errors="strict")
            return
        if self.how == "closed":
            os.close(1)
            os.close(2)
            sys.stdout = sys.stderr = None
            return
        reader, writer = os.openpty() if self.how == "terminal" else os.pipe()
        if self.how == "full":
            writer = os.open("/dev/full", os.O_WRONLY)
        os.close(reader)
        for fd in (1, 2):
            os.dup2(writer, fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))


@pytest.mark.parametrize("how", ["pipe", "full", "closed", "terminal"])
def test_F36_losing_the_reader_costs_output_and_not_the_run(live, whole, tmp_path, how):
    code, said = live(tmp_path / "run", Lost(how))
    assert code == 0 and difference(result(whole), result(tmp_path / "run")) == "", said


def test_F36_a_terminal_of_few_letters(live, tmp_path):
    code, said = live(
        tmp_path / "run", Lost("ascii"), system="é日本", max_prompt_tokens=40, steps=2
    )
    assert code == 0 and r"\xe9\u65e5\u672c" in said and steps(tmp_path / "run") == [2]


class Signalled:
    """Signals in the n-th backward, one after the other; `ignored` are so from the start."""

    def __init__(self, n, *numbers, ignored=()):
        self.n, self.numbers, self.ignored = n, numbers, ignored

    def __call__(self):
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        backward = torch.Tensor.backward

        def signalled(*a, **k):
            self.n -= 1
            for number in self.numbers if self.n == 0 else ():
                signal.raise_signal(number)
                time.sleep(0.01)
            return backward(*a, **k)

        torch.Tensor.backward = signalled


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP),
        (signal.SIGUSR1, signal.SIGTERM),
    ],
)
def test_F05_warnings_come_as_often_as_they_like(live, whole, tmp_path, numbers):
    """A closed terminal, a scheduler that ends the job soon: step 4 is finished and saved, what
    follows the first is no second signal."""
    out = tmp_path / "run"
    code, said = live(out, Signalled(7, *numbers), save_every=5)
    assert code == 75 and "stopped after step 4, which is saved" in said and steps(out) == [4], said
    assert live(out)[0] == 0 and difference(result(whole), result(out)) == ""


def test_F05_a_signal_that_nohup_ignores_stays_ignored(live, whole, tmp_path):
    out = tmp_path / "run"
    code, said = live(out, Signalled(7, signal.SIGHUP, ignored=[signal.SIGHUP]))
    assert code == 0 and difference(result(whole), result(out)) == "", said


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def loaded(*a, **k):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(train, "load_model", loaded)


def mistake(argv, capsys):
    """Exit code and the one line of a command that is to fail."""
    with pytest.raises(SystemExit) as e:
        guarded(train.main, argv)
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    return e.value.code, err


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "/proc/1/run"])
def test_F11_a_run_folder_that_cannot_be(folder, tmp_path, capsys, no_model, out):
    (tmp_path / "file").write_text("x")
    code, said = mistake(command(folder, tmp_path / out), capsys)
    assert code == 2 and "cannot be a run folder" in said and out in said


def test_F17_the_second_of_two_is_told_who_the_first_is(folder, tmp_path, capsys, no_model):
    hold = "import sys; from plumbing import checkpoint\nwith checkpoint.lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"  # noqa: E501
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=kill_many.HERE.parent,
    ) as first:
        assert first.stdout.readline() == b"held\n"
        code, said = mistake(command(folder, tmp_path / "run"), capsys)
        assert code == 2 and f"in use by pid {first.pid} on " in said
        first.kill()


# --------------------------------------------------------------------------------------------------
# resume


def test_F18_more_steps_are_no_other_run(live, whole, tmp_path):
    out = tmp_path / "run"
    assert live(out, steps=4)[0] == 0 and steps(out) == [2, 4]
    code, said = live(out)
    assert code == 0 and f"resuming {out} after step 4" in said
    assert (
        result(out)["checkpoints"] == result(whole)["checkpoints"]
        and result(out)["samples"] == result(whole)["samples"]
    )


def test_F18_an_override_goes_on_with_the_new_setting(live, folder, tmp_path):
    out = tmp_path / "run"
    assert live(out, steps=2)[0] == 0
    argv = command(folder, out, steps=3, lr=5e-4)
    code, said = live(out, argv=argv)
    assert code == 2 and "lr: 0.001 -> 0.0005" in said.splitlines()[-1] and steps(out) == [2]
    assert (
        live(out, argv=[*argv, "--existing", "override"])[0] == 0
        and rows(out / "metrics.jsonl")[-1]["lr"] == 5e-4
    )


def test_F19_a_run_without_its_checkpoints_does_not_start_anew_in_silence(live, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in out.glob("step_*"):
        shutil.rmtree(step)
    code, said = live(out)
    assert code == 0 and "10 lines after step 0 moved to metrics.jsonl.bak" in said
    # step 0 is the accuracy before any step: it stands
    assert rows(out / "metrics.jsonl.bak") == rows(whole / "metrics.jsonl")[1:]
    assert difference(result(whole), result(out)) == ""


def test_F19_without_checkpoints_the_row_of_another_model_does_not_stand(live, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in out.glob("step_*"):
        shutil.rmtree(step)
    code, said = live(out, seed=3, steps=2)
    assert (
        code == 0
        and "11 lines after step -1 moved to metrics.jsonl.bak" in said
        and "before training" in said
    )
    assert [r["step"] for r in rows(out / "metrics.jsonl")] == [0, 1, 2]


LOG_FILES = {
    "metrics": ["metrics.jsonl"],
    "samples": ["samples.jsonl"],
    "both": ["metrics.jsonl", "samples.jsonl"],
}


@pytest.fixture(scope="module")
def half(live, tmp_path_factory):
    """The run after its first four steps."""
    out = tmp_path_factory.mktemp("half") / "run"
    assert live(out, steps=4)[0] == 0
    return out


@pytest.mark.parametrize("lost", LOG_FILES)
def test_F19_checkpoints_without_logs_go_on_and_say_where_from(live, whole, half, tmp_path, lost):
    """A run is what its checkpoints say. The accuracy that is measured first carries the step it
    was measured at."""
    out = Path(shutil.copytree(half, tmp_path / "run"))
    for name in LOG_FILES[lost]:
        (out / name).unlink()
    code, said = live(out, watch_layers=3)
    assert code == 0 and f"resuming {out} after step 4" in said and "before training" not in said, (
        said
    )
    assert result(out)["checkpoints"] == result(whole)["checkpoints"]
    seen, last = rows(out / "metrics.jsonl"), said.splitlines()[-1]
    if "metrics.jsonl" in LOG_FILES[lost]:
        assert [r["step"] for r in seen] == [4, 5, 6, 7, 8, 9, 10] and seen[0].keys() == {
            "step",
            "eval/accuracy",
            "eval/questions",
        }
        assert "held-out accuracy after step 4" in said and " (step 4) -> " in last
    else:
        assert [r["step"] for r in seen] == [*range(11)] and "(step" not in last
    assert ("no responses of step 1" in said) == ("samples.jsonl" in LOG_FILES[lost])
    whole_rows = [{k: v for k, v in r.items() if not k.startswith("watch/")} for r in seen[-6:]]
    assert whole_rows == rows(whole / "metrics.jsonl")[-6:]


@pytest.mark.parametrize("lost", LOG_FILES)
def test_F18_checkpoints_without_logs_are_a_run_all_the_same(live, folder, half, tmp_path, lost):
    """Other settings are refused; with --existing overwrite nothing of it is left in the new
    run."""
    out = Path(shutil.copytree(half, tmp_path / "run"))
    for name in LOG_FILES[lost]:
        (out / name).unlink()
    argv = command(folder, out, steps=4, lr=5e-4)
    code, said = live(out, argv=argv)
    assert code == 2 and "lr: 0.001 -> 0.0005" in said.splitlines()[-1]
    assert steps(out) == [2, 4]
    code, said = live(out, argv=[*argv, "--existing", "overwrite"])
    assert code == 0 and "resuming" not in said and "before training" in said
    assert (
        live(tmp_path / "other", argv=command(folder, tmp_path / "other", steps=4, lr=5e-4))[0] == 0
    )
    assert difference(result(tmp_path / "other"), result(out)) == ""


def test_F18_checkpoints_without_their_settings_are_not_resumed_blindly(
    live, folder, whole, half, tmp_path
):
    out = Path(shutil.copytree(half, tmp_path / "run"))
    (out / "config.json").unlink()
    code, said = live(out)
    assert (
        code == 2
        and "holds checkpoints and no config.json" in said.splitlines()[-1]
        and steps(out) == [2, 4]
    )
    assert live(out, argv=[*command(folder, out), "--existing", "override"])[0] == 0
    assert result(out)["checkpoints"] == result(whole)["checkpoints"]


# --------------------------------------------------------------------------------------------------
# batches with nothing in them


class RewardsOne:
    def __call__(self):
        train.reward = lambda answered, args: 1.0


def test_F22_a_step_without_advantage_moves_no_weight_and_no_moment(live, tmp_path):
    out = tmp_path / "run"
    assert live(out, steps=2)[0] == 0
    code, said = live(out, RewardsOne(), steps=4)
    assert code == 0, said
    assert tensors(out / "step_000004") == tensors(out / "step_000002")
    assert [(r["updates"], r["frac_reward_zero_std"]) for r in rows(out / "metrics.jsonl")[3:]] == [
        (0, 1),
        (0, 1),
    ]


class Truncated:
    """No response stops by itself, and what counts is what train.py really counts."""

    def __init__(self, reward):
        self.reward = reward

    def __call__(self):
        sample = train.sample

        def truncated(*a, **k):
            groups = sample(*a, **k)
            for response in [r for group in groups for r in group]:
                response.stopped = False
            return groups

        train.sample = truncated
        if self.reward:
            train.reward = lambda answered, args: float(answered.verdict.correct)


@pytest.mark.parametrize("overlong", ["zero", "mask", "soft"])
def test_F23_all_responses_cut_off(live, tmp_path, overlong):
    out = tmp_path / "run"
    code, said = live(out, Truncated(True), steps=2, overlong=overlong)
    assert code == 0, said
    for r in rows(out / "metrics.jsonl")[1:]:
        assert (
            r["completions/clipped_ratio"] == 1 and r["completions/mean_terminated_length"] is None
        )
        assert all(v == v and abs(v) < float("inf") for v in r.values() if isinstance(v, float))
        assert overlong != "mask" or r["updates"] == 0


def test_F23_all_responses_stop_at_once(live, folder, tmp_path):
    """Every id is a stop id: each response is that one token and its text is empty."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(257))}))
    code, said = live(tmp_path / "run", argv=command(model, tmp_path / "run", steps=2))
    assert code == 0, said
    for r in rows(tmp_path / "run/metrics.jsonl")[1:]:
        assert r["completions/max_length"] == 1 and all(
            v == v and abs(v) < float("inf") for v in r.values() if isinstance(v, float)
        )
    assert {s["response"] for s in rows(tmp_path / "run/samples.jsonl")} == {""}


# --------------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "no rows"),
        ('{"problem": "1+1"}\n' * 3, "3 of 3 rows are unusable"),
        ('{"problem": "1+1", "answer": "2"}\n' + "{\n" * 9, "9 of 10 rows are unusable"),
    ],
)
def test_F25_no_usable_problem_is_exit_3_before_the_model_is_loaded(
    folder, tmp_path, capsys, no_model, content, says
):
    (tmp_path / "set.jsonl").write_text(content)
    code, said = mistake(command(folder, tmp_path / "run", data=tmp_path / "set.jsonl"), capsys)
    assert code == 3 and says in said and "set.jsonl" in said


def test_F26_one_problem_fills_a_batch(live, tmp_path):
    (tmp_path / "set.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    code, said = live(tmp_path / "run", steps=2, data=tmp_path / "set.jsonl")
    samples = rows(tmp_path / "run/samples.jsonl")
    assert code == 0 and len(samples) == 32 and {s["question"] for s in samples} == {"1+1"}, said
    # its places in the batch are drawn for themselves
    assert len({tuple(s["ids"]) for s in samples[:16]}) > 8


def test_F27_prompts_too_long_are_dropped_and_counted(live, tmp_path):
    problems = [{"problem": "1+" * n + "1", "answer": str(n + 1)} for n in (1, 2, 50, 60)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    code, said = live(tmp_path / "run", steps=1, data=tmp_path / "set.jsonl")
    assert code == 0 and "2 problems (2 more dropped: prompt too long)" in said
    # none was cut
    assert {s["question"] for s in rows(tmp_path / "run/samples.jsonl")} == {"1+1", "1+1+1"}


# --------------------------------------------------------------------------------------------------
# memory, hostile folders


class OutOfMemory:
    def __call__(self):
        def backward(*a, **k):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB.\nmore\nlines"
            )

        torch.Tensor.backward = backward


def test_F29_out_of_memory_names_the_flags_to_lower(live, tmp_path):
    code, said = live(tmp_path / "run", OutOfMemory())
    last = said.splitlines()[-1]
    assert (
        code == 6
        and "--micro-tokens" in last
        and "--slots" in last
        and "20.00 GiB" in last
        and "Traceback" not in said
    )


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**7, "hidden_size": 65536, "intermediate_size": 10**6},
        {"num_hidden_layers": 1000},
        {"num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 1024},
    ],
)
def test_F32_absurd_sizes_are_refused_before_any_memory_is_taken(folder, tmp_path, change):
    path = Path(shutil.copytree(folder, tmp_path / "model")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    limits, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
        with pytest.raises(ValueError, match="do not fit config.json") as e:
            hub.load_model(path.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "\n" not in str(e.value) and time.process_time() - began < 2


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncate, "not a readable safetensors file"),
        (Path.unlink, "missing weight files"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "do not fit config.json"),
    ],
)
def test_F12_F13_F14_a_model_whose_weights_are_damaged_is_exit_4(
    folder, tmp_path, capsys, damage, says
):
    path = Path(shutil.copytree(folder, tmp_path / "model")) / "model.safetensors"
    damage(path)
    code, said = mistake(command(path.parent, tmp_path / "run"), capsys)
    assert code == 4 and says in said and str(path.parent) in said


@pytest.mark.parametrize(
    "name",
    [
        "run/metrics.jsonl",
        "run/samples.jsonl",
        "run/config.json",
        "run/LOCK",
        "model/config.json",
        "model/model.safetensors",
        "model/model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_F11_a_pipe_or_folder_where_a_file_should_be(live, folder, tmp_path, name, make):
    """A pipe that nobody writes to would be waited for, for ever."""
    for source in (shutil.copytree(folder, tmp_path / "model"), tmp_path / "run"):
        source.mkdir(exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    code, said = live(tmp_path / "run", argv=command(tmp_path / "model", tmp_path / "run"))
    assert code in (2, 4) and name.split("/")[0] in said and len(said.splitlines()) == 1, said


def test_F32_F33_no_code_of_a_folder_is_run(folder, tmp_path):
    """A folder that asks for its own classes, its own template: both are there, neither is looked
    at."""
    from plumbing import tokenizer

    path = Path(shutil.copytree(folder, tmp_path / "model"))
    mark = tmp_path / "executed"
    for name in (
        "modeling_evil.py",
        "tokenization_evil.py",
        "configuration_evil.py",
        "sitecustomize.py",
    ):
        (path / name).write_text(f"open({str(mark)!r}, 'w')\n")
    maps = {
        "auto_map": {
            n: f"{m}_evil.Evil"
            for n, m in (("AutoConfig", "configuration"), ("AutoModelForCausalLM", "modeling"))
        }
    }
    template = {
        "chat_template": "{{ cycler.__init__.__globals__.os.mknod('" + str(mark) + "') }}",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
    }
    for name, more in (("config.json", maps), ("tokenizer_config.json", template)):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | more))
    (path / "chat_template.jinja").write_text(template["chat_template"])
    plain, hostile = hub.load_model(folder), hub.load_model(path)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), hostile.parameters(), strict=True)
    )
    assert (
        tokenizer.load_tokenizer(path).chat("1+1") == tokenizer.load_tokenizer(folder).chat("1+1")
        and not mark.exists()
    )


@pytest.mark.parametrize(
    "answer",
    [
        "\\boxed{" * 5000,
        "9" * 4000 + "^" + "9" * 4000,
        "(" * 20_000,
        "\\frac{1}{" * 3000,
        "1" + "+1" * 20_000,
    ],
)
def test_F34_a_gold_answer_cannot_hold_up_the_start(tmp_path, answer):
    """The self-check of the golds runs before anything else does: whatever they are, it ends
    soon."""
    from plumbing import data

    (tmp_path / "set.jsonl").write_text(
        '{"problem": "1+1", "answer": "2"}\n'
        + json.dumps({"problem": "x", "answer": answer})
        + "\n"
    )
    began = time.process_time()
    verifiable(data.load_problems(tmp_path / "set.jsonl", max_bad=1)[-1].answer)
    assert time.process_time() - began < 2


# --------------------------------------------------------------------------------------------------
# clocks, names, empty files


class MadClock:
    """Every look at the clock finds it an hour earlier than the one before."""

    def __call__(self):
        now = [time.time()]

        def earlier():
            now[0] -= 3600
            return now[0]

        time.time = earlier


def test_F35_names_and_clocks(live, whole, tmp_path):
    """Killed once on the way, too."""
    out = tmp_path / "with spaces" / "日本 é" / ("x" * 200) / "-out" / "a%sb{c}"
    out.parent.mkdir(parents=True)
    code, said = live(out, InOptimizer(9))
    assert code == KILLED and steps(out) == [2, 4], said
    code, said = live(out, MadClock())
    assert code == 0 and difference(result(whole), result(out)) == "", said


@pytest.mark.parametrize(
    "empty", [("metrics.jsonl", "samples.jsonl", "LOCK"), ("step_000010/MANIFEST.json",)]
)
def test_F35_empty_files(live, whole, tmp_path, empty):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in empty:
        (out / name).write_bytes(b"")
    code, said = live(out)
    assert code == 0 and result(out)["checkpoints"] == result(whole)["checkpoints"], said


# --------------------------------------------------------------------------------------------------
# files that are none


def forged(folder, name, change):
    """Change a file of a checkpoint and make the manifest fit it."""
    path, manifest = folder / name, folder / "MANIFEST.json"
    if name.endswith(".json"):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        with safe_open(path, framework="pt") as f:
            held, about = {n: f.get_tensor(n).clone() for n in f.keys()}, f.metadata()
        held, about = change(held, about)
        save_file(held, path, metadata=about)
    listed = json.loads(manifest.read_text())
    listed["files"][name] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "name, change, says",
    [
        (
            "resume/rng.safetensors",
            lambda t, a: ({"x": t["torch_cpu"]}, a),
            "no state of torch's generator",
        ),
        (
            "resume/rng.safetensors",
            lambda t, a: ({"torch_cpu": t["torch_cpu"].float()}, a),
            "no state of torch's generator",
        ),
        (
            "resume/rng.safetensors",
            lambda t, a: ({"torch_cpu": t["torch_cpu"][:-8].clone()}, a),
            "no state of torch's generator",
        ),
        (
            "resume/rng.safetensors",
            lambda t, a: ({"torch_cpu": t["torch_cpu"] | 255}, a),
            "no state of torch's generator",
        ),
        (
            "resume/optim.safetensors",
            lambda t, a: (t, {**a, "numbers": "[" * 99_999}),
            "no numbers of an optimizer",
        ),
        (
            "resume/optim.safetensors",
            lambda t, a: (t, {**a, "numbers": '{"norm.weight/step": "7"}'}),
            "no numbers of an optimizer",
        ),
        (
            "resume/optim.safetensors",
            lambda t, a: (t, {"optimizer": a["optimizer"]}),
            "no numbers of an optimizer",
        ),
        (
            "model.safetensors",
            lambda t, a: ({**t, "a\nb" * 9999: t["model.norm.weight"].clone()}, a),
            "a ba ba b",
        ),
        ("state.json", lambda s: {"which": 2}, "no step in it"),
        ("state.json", lambda s: {**s, "step": "2"}, "no step in it"),
    ],
)
def test_F14_a_manifest_made_to_fit_does_not_make_a_checkpoint_load(tmp_path, name, change, says):
    """Hashes keep accidents out, not intentions: what they vouch for is looked at all the same,
    before anything is touched."""
    model, optimizer = fuzz.trainable()
    step = checkpoint.save(tmp_path, 2, model, optimizer, {})
    forged(step, "state.json", lambda s: s)
    before, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    checkpoint.restore(step, model, optimizer)
    forged(step, name, change)
    with pytest.raises(checkpoint.CheckpointError, match=says) as e:
        checkpoint.restore(step, model, optimizer)
    assert "\n" not in str(e.value) and len(str(e.value)) < 5000 and str(step) in str(e.value)
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    ) and torch.equal(rng, torch.get_rng_state())


def test_F14_names_in_a_header_cannot_break_the_line(folder, tmp_path):
    path = Path(shutil.copytree(folder, tmp_path / "model")) / "model.safetensors"
    save_file({"a\nb\r" * 9999: torch.ones(1)}, path)
    with pytest.raises(ValueError, match="do not fit config.json: a b a b") as e:
        hub.load_model(path.parent)
    assert "\n" not in str(e.value) and len(str(e.value)) < 5000


@pytest.mark.parametrize("digits", [309, 4000])
def test_F24_whole_numbers_that_no_float_holds(tmp_path, digits):
    from plumbing import data

    (tmp_path / "set.jsonl").write_text(f'{{"problem": "x", "answer": {"9" * digits}}}\n')
    assert data.load_problems(tmp_path / "set.jsonl")[0].answer == "9" * digits


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "a" * 10**5}}),
        ("tokenizer.json", {"normalizer": {"type": "a\nb" * 10**4}}),
        ("tokenizer.json", {"model": {"type": ["x"] * 10**4}}),
        ("generation_config.json", {"eos_token_id": "\n" * 10**4}),
    ],
)
def test_F33_values_in_a_tokenizer_cannot_fill_the_screen(folder, tmp_path, name, change):
    from plumbing import tokenizer

    path = Path(shutil.copytree(folder, tmp_path / "model")) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=name) as e:
        tokenizer.load_tokenizer(path.parent)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_F12_F16_F30_F31_F32_F33_fuzzing(tmp_path):
    """A short fuzz.py: every kind of file is both refused and read."""
    outcomes, failures = fuzz.run(350, 7, tmp_path)
    assert not failures, "\n".join(failures)
    ways = {(t, o) for t in fuzz.TARGETS for o in ("loads", "refused")} - {("logs", "refused")}
    assert ways == set(outcomes) and outcomes.total() == 350


def test_the_fuzzer_sees_what_it_looks_for(tmp_path, monkeypatch):
    """Every way to fail, on purpose."""

    def spin(rng, good, folder):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    def raises(e):
        def target(rng, good, folder):
            raise e(f"{folder}: x") if e is not ValueError else ValueError("where is it?")

        return target

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    targets = {
        "slow": spin,
        "key": raises(KeyError),
        "unicode": lambda *a: b"\xff".decode(),
        "json": lambda *a: json.loads("{"),
        "panic": raises(type("PanicException", (BaseException,), {})),
        "memory": raises(MemoryError),
        "nameless": raises(ValueError),
    }
    monkeypatch.setattr(fuzz, "TARGETS", targets)
    said = [fuzz.case(i, 0, tmp_path, tmp_path / "case")[1] for i in range(len(targets))]
    assert all(s.startswith("FAILED") for s in said), said
    monkeypatch.setattr(fuzz, "TARGETS", {"fine": raises(OSError)})
    assert fuzz.case(0, 0, tmp_path, tmp_path / "case") == ("fine", "refused")
