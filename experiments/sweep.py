"""Settings x seeds, each a run of train.py in a process of its own, and what came of them.

    python -m experiments.sweep layers            the runs that are not there yet, then the results
    python -m experiments.sweep all --jobs 1      every experiment of experiments/arms.py, in turn
    python -m experiments.sweep layers --seeds 1-2 --arms grpo,bupo3      some of its runs
    python -m experiments.sweep layers --rows-only         start nothing, write what is there
    python -m experiments.sweep --list

Ended by Ctrl-C or SIGTERM, the runs under way save and end with it; the same command goes on.
Of each experiment NAME, results/experiments gets

    NAME.jsonl   a line an arm and seed: accuracy, length, ... at the steps that were evaluated
    NAME.md      the table: means over seeds, 95 % intervals, differences of the same seeds
    NAME.png     accuracy over the steps

Runs live in OUT/runs/FLAGS/seedS. A run that several experiments ask for is made once, and one that
is FINISHED never again: delete OUT after a change of the code that changes numbers. Lines of
NAME.jsonl whose runs are not in OUT stay as long as their commands are the experiment's.
Exit codes: 0 all runs asked for are there, 1 some failed, 2 usage, 75 or 130 ended by a signal.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from experiments.arms import EXPERIMENTS
from experiments.table import words_of, write
from plumbing import checkpoint
from plumbing.cli import Parser, given, guarded, natural, printable
from plumbing.recipes import RECIPES
from plumbing.rows import one_line

HOME = Path(__file__).resolve().parents[1]
ENDS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# --------------------------------------------------------------------------------------------------
# what to run


@dataclass(frozen=True)
class Run:
    """One process: what is typed after `python`, the seed, and the folder it is kept in."""

    words: tuple[str, ...] = field(compare=False)
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "FINISHED").exists()


def folder_of(words, out) -> Path:
    """Where runs of these words are kept, whatever the order of the flags: a name to read, and a
    hash that finds it."""
    program, *flags = re.split(r" (?=--)", shlex.join(words))
    flags.sort()
    digest = hashlib.sha256("\n".join([program, *flags]).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.,]+", "-", " ".join([*flags, program])).strip("-")
    there = sorted(out.glob(f"runs/*-{digest}"))
    return there[0] if there else out / "runs" / f"{name[:60]}-{digest}"


def plan(experiment, out, seeds=None, arms=None) -> dict:
    """{(arm, seed): Run}, all arms of a seed before the next seed: a sweep cut short is
    balanced."""
    runs = {}
    for seed in seeds or range(1, experiment.seeds + 1):
        for arm in experiment.arms:
            if arms is None or arm in arms:
                words = words_of(experiment, arm)
                runs[arm, seed] = Run(words, seed, folder_of(words, out) / f"seed{seed}")
    return runs


def warm_up_of(run) -> Path | None:
    """Where the warm-up of a run is kept, for all runs of its seed; None for a model that has
    none."""
    words = [*run.words, "", ""]
    flags = dict(zip(words, words[1:], strict=False))
    model = RECIPES.get(flags.get("--recipe"), {}).get("model", "tiny")
    model = flags.get("--model", model)
    if not model.startswith("tiny"):
        return None
    return run.folder.parents[2] / "warm-ups" / f"{model}-seed{run.seed}"


# --------------------------------------------------------------------------------------------------
# running


def copy_warm_up(source, target):
    """Copy a whole warm-up to where none is; renamed into place."""
    if (target / "warm_up.json").exists() or not (source / "warm_up.json").exists():
        return
    new = target.with_name(f".new-{target.name}")
    for folder in (new, target):  # of a kill
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, new)
    new.rename(target)


def start(run) -> subprocess.Popen:
    """A child in a session of its own: a Ctrl-C reaches it once, through us, and it saves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if kept := warm_up_of(run):
        copy_warm_up(kept, run.folder / "warm-up")
    command = [sys.executable, *run.words, "--seed", str(run.seed), "--out", str(run.folder)]
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(run.folder / "stdout.txt", "w") as out, open(run.folder / "stderr.txt", "w") as err:
        files = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        return subprocess.Popen(command, cwd=HOME, env=env, start_new_session=True, **files)


def may_start(run, running) -> bool:
    """Whether no run under way is making the warm-up that this one needs."""
    kept = warm_up_of(run)
    known = not kept or (kept / "warm_up.json").exists()
    return known or kept not in map(warm_up_of, running)


def why_failed(run, code) -> str:
    """The last line of its stderr."""
    text = (run.folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    said = printable(one_line(lines[-1:]), keep="")[:300]
    return f"{said or 'said nothing'} (exit code {code}, {run.folder})"


def work(waiting, jobs, signals, ended) -> dict:
    """Make every run, `jobs` at a time; returns {run: why} of those that failed.

    signals: a list that the number of each signal is appended to. It is passed on to the children
    as SIGTERM, and nothing more is started; another one ends them on the spot. ended(run) is told
    of each run that is finished.
    """
    waiting, running, failed, passed_on = list(waiting), {}, {}, 0
    while running or (waiting and not signals):
        free = len(running) < jobs and not signals
        if free and (run := next((r for r in waiting if may_start(r, running)), None)):
            waiting.remove(run)
            running[run] = start(run)
            continue
        if len(signals) > passed_on:
            print("ending: runs under way save, the same command goes on", flush=True)
            for child in running.values():
                child.terminate()
            time.sleep(0.5)  # `timeout` sends its signal twice; a second one would end them at once
            passed_on = len(signals)
        time.sleep(0.2)
        for run in list(running):
            if kept := warm_up_of(run):
                copy_warm_up(run.folder / "warm-up", kept)
            code = running[run].poll()
            if code is None:
                continue
            del running[run]
            if code == 0:
                (run.folder / "FINISHED").touch()
                ended(run)
            elif not signals:
                failed[run] = why_failed(run, code)
                print(f"failed: {failed[run]}", flush=True)
    return failed


def wait_for_orphans(out, signals):
    """Until no run is at work: a sweep that was killed alone, with SIGKILL, leaves its children."""
    locks = [open(path) for path in out.glob("runs/*/*/LOCK")]
    while locks and not signals:
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
            locks.pop().close()
        except BlockingIOError:
            print(f"still at work: {Path(locks[-1].name).parent}; waiting for it", flush=True)
            time.sleep(1)


def discard_checkpoints(run):
    """Leave logs and settings of a finished run; its warm-up is kept for all runs of its seed."""
    for folder in (*run.folder.glob("step_*"), run.folder / "warm-up"):
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------


def seeds(text):
    """argparse type: 1-8, or 3, or 1,3,5-7."""
    out = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = natural(last, most=1000) if dash else natural(first)
        out |= set(range(natural(first), last + 1))
    if out:
        return sorted(out)
    raise argparse.ArgumentTypeError(f"{text!r:.40}: no seeds; give them as 1-8 or 1,3")


def parse(argv=None):
    p = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all")
    p.add_argument("--seeds", type=seeds, help="as 1-8 (default: what the experiment says)")
    p.add_argument("--arms", help="only these, with commas between them")
    p.add_argument("--jobs", type=natural, default=2, help="runs at a time (default 2)")
    p.add_argument(
        "--out", type=given, default="out/experiments", help="the runs (default %(default)s)"
    )
    p.add_argument(
        "--results", type=given, default="results/experiments", help="(default %(default)s)"
    )
    p.add_argument("--keep-checkpoints", action="store_true", help="of runs that finish")
    p.add_argument("--rows-only", action="store_true", help="start nothing, write what is there")
    p.add_argument("--list", action="store_true", help="show experiments and arms, then stop")
    args = p.parse_args(argv)
    known = ", ".join(EXPERIMENTS)
    if args.names == ["all"] or (args.list and not args.names):
        args.names = list(EXPERIMENTS)
    if unknown := [name for name in args.names if name not in EXPERIMENTS]:
        raise ValueError(f"no experiment {unknown[0]!r}: there are {known}")
    if not args.names:
        raise ValueError(f"name an experiment, or all: there are {known}")
    args.arms = args.arms and args.arms.split(",")
    arms = {arm for name in args.names for arm in EXPERIMENTS[name].arms}
    if args.arms and (unknown := [arm for arm in args.arms if arm not in arms]):
        raise ValueError(f"no arm {unknown[0]!r}: there are {', '.join(sorted(arms))}")
    args.out, args.results = Path(args.out).resolve(), Path(args.results)
    return args


def show(plans):
    for name, runs in plans.items():
        experiment = EXPERIMENTS[name]
        done = sum(run.finished for run in runs.values())
        print(f"{name}: {experiment.question} ({done} of {len(runs)} runs are there)")
        for arm in experiment.arms:
            print(f"    {arm}: {shlex.join(words_of(experiment, arm))}")


def make(plans, args, signals) -> dict:
    """Make the runs that are not there, and write the results of an experiment after each of its
    runs; returns {run: why} of those that failed."""
    wanted = dict.fromkeys(run for runs in plans.values() for run in runs.values())
    began = time.time()

    def ended(run):
        if not args.keep_checkpoints:
            discard_checkpoints(run)
        done = sum(run.finished for run in wanted)
        at = f"{done} of {len(wanted)} runs, {time.time() - began:.0f} s"
        print(f"{at}: {run.folder.parent.name} seed {run.seed}", flush=True)
        write_results({name: runs for name, runs in plans.items() if run in runs.values()}, args)

    with checkpoint.lock(args.out):
        wait_for_orphans(args.out, signals)
        for run in wanted:
            if run.finished and not args.keep_checkpoints:
                discard_checkpoints(run)  # what a kill left
        left = [run for run in wanted if not run.finished]
        return work(left, args.jobs, signals, ended)


def write_results(plans, args):
    for name, runs in plans.items():
        folders = {key: run.folder for key, run in runs.items() if run.finished}
        write(name, EXPERIMENTS[name], folders, args.results)


def main(argv=None):
    args = parse(argv)
    plans = {}
    for name in args.names:
        plans[name] = plan(EXPERIMENTS[name], args.out, args.seeds, args.arms)
    if args.list:
        show(plans)
        return
    signals, failed = [], {}
    if not args.rows_only:
        for number in ENDS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: signals.append(number))
        failed = make(plans, args, signals)
    write_results(plans, args)
    if signals:
        sys.exit(130 if signals[0] == signal.SIGINT else 75)
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
