"""Kill a training run at random moments, again and again; the same command must still end where an
uninterrupted run ends.

    python tests/kill_many.py                      200 kills, a few minutes
    python tests/kill_many.py --kills 20 --exec    each life a new interpreter, as when the command
                                                   is typed again: slower

A life is train.main with the same flags, on a small random model whose verdicts are a coin's, ended
by SIGKILL. Half of the moments are uniform over the time of training; a quarter waits for a save to
begin first, since that is where a kill could do harm; a quarter for the last checkpoint, and falls
into the figure and the last line. A life that gets to its end is compared with the reference, and
the next one starts a new run; so is the last one, which is left in peace. Compared are weights and
moments (by SHA-256), the rows of metrics.jsonl but for those under time/ and perf/, all samples,
the line of the accuracy but for its seconds, and that the figures are whole.

Lives are forked from a server that has imported train.py and done nothing else, so that the moments
fall into the run and not into the imports. Exit code 0: all runs ended alike; 1: one did not, and
its folder is kept.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
# also where it is imported by a life
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]


class Coin:
    """A random model never answers right. The grader reads its answers all the same, and then half
    of all texts are right, by a hash, so that there is something to learn."""

    def __init__(self, judge):
        self.judge = judge

    def __call__(self, text, gold, verifier):
        from verify import Verdict

        verdict = self.judge(text, gold, verifier)
        return Verdict(zlib.crc32(text.encode()) % 2 == 0, verdict.extracted, verdict.reason)


def live(argv, log, prepare=None, draws=False):
    """One life: the command, its verdicts a coin's, its output appended to `log`. prepare() is
    called before it, in its process. draws: the figure too, which takes longer than the run."""
    import threading

    import torch
    from tqdm import tqdm

    import eval as evaluation
    import train
    from plumbing import figures
    from plumbing.cli import guarded

    torch.set_num_threads(1)
    # its own is a semaphore between processes, which a killed one leaves behind
    tqdm.set_lock(threading.RLock())
    if not draws:
        figures.draw = lambda folder: None
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    evaluation.judge = Coin(evaluation.judge)
    # it hardly ever stops by itself, which would be reward 0
    train.reward = lambda answered, args: float(answered.verdict.correct)
    if prepare:
        prepare()
    guarded(train.main, argv)


# slow to import
DRAWING = "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.ticker"


class Server:
    """Starts lives. exec: as new interpreters; else forked from a process where everything is
    imported and nothing has run. (Not forked from this one: threads that torch may have started
    here would not be there.)"""

    def __init__(self, exec=False, preload=()):
        self.exec, self.context = exec, multiprocessing.get_context("forkserver")
        if not exec:
            before = os.environ.get("PYTHONPATH")
            # for the preload; lives get sys.path
            os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
            self.context.set_forkserver_preload(["train", "kill_many", *DRAWING, *preload])
            multiprocessing.forkserver.ensure_running()
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before

    def start(self, argv, log, prepare=None, draws=False):
        """A running life. It has kill(), pid, and what `ended` asks."""
        if self.exec:
            code = (
                "import sys; sys.path[:0] = sys.argv[1:3]; import kill_many; "
                f"kill_many.live(sys.argv[4:], sys.argv[3], draws={draws})"
            )
            return subprocess.Popen(
                [sys.executable, "-c", code, str(HERE), str(HERE.parent), str(log), *argv]
            )
        life = self.context.Process(target=live, args=(argv, log, prepare, draws))
        life.start()
        return life


def ended(life, seconds):
    """Exit code of a life, minus the signal that ended it; None if it still runs after so many
    seconds."""
    if isinstance(life, subprocess.Popen):
        try:
            return life.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
    life.join(seconds)
    return life.exitcode


def model_folder(folder) -> Path:
    """A random byte-level model of 4,000 parameters and ten problems, with ten others held out."""
    import tiny
    from model import Config, Transformer
    from plumbing.hub import save_model

    save_model(
        Transformer(Config("qwen3", 260, 16, 3, 2, 1, 8, 32, tied=True, max_len=256)).init_weights(
            0, 0.3
        ),
        folder,
    )
    tiny.write_tokenizer(folder)
    for name, term in (("problems", 1), ("held_out", 2)):
        lines = [
            json.dumps({"problem": f"{i}+{term}", "answer": str(i + term)}) + "\n"
            for i in range(10)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def command(folder, out, **change) -> list[str]:
    """Flags of a run of ten steps, three of them internal, saved at every second, evaluated at
    every third; two checkpoints are kept."""
    f = {
        "model": folder,
        "data": folder / "problems.jsonl",
        "eval-data": folder / "held_out.jsonl",
        "eval-limit": 4,
        "eval-every": 3,
        "out": out,
        "device": "cpu",
        "steps": LAST,
        "save-every": 2,
        "keep": 2,
        "prompts": 4,
        "group": 4,
        "mini-prompts": 2,
        "lr": 1e-3,
        "max-new-tokens": 8,
        "max-prompt-tokens": 16,
        "slots": 16,
        "bupo-layer": 1,
        "bupo-steps": 3,
        "system": "",
    } | change
    return [x for k, v in f.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def rows(path) -> list[dict]:
    """The rows of a log without their timings."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in path.read_text().splitlines()
    ]


def tensors(folder) -> dict:
    """SHA-256 of each weight and moment of a whole checkpoint; ValueError for one that is damaged.
    Not of the files: the order of a header's metadata is chance. Not torch's generator: each
    process gets another, and no number of a run is drawn from it."""
    from safetensors.numpy import load_file

    from plumbing import checkpoint

    if why := checkpoint.damage(folder):
        raise ValueError(why)
    return {
        f"{p.relative_to(folder)} {name}": hashlib.sha256(
            f"{t.dtype} {t.shape}".encode() + t.tobytes()
        ).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
        if p.name != "rng.safetensors"
        for name, t in sorted(load_file(p).items())
    }


LAST = 10  # step of the command


def saved(out) -> list[int]:
    """Steps of the checkpoints in a run folder."""
    return sorted(int(p.name[5:]) for p in out.glob("step_*") if p.name[5:].isdigit())


# what is drawn and written at the end of a run, and how each file ends
FIGURES = {
    "training.png": b"IEND\xaeB`\x82",
    "training.svg": b"</svg>\n",
    "page.html": b"</html>\n",
}


def result(out) -> dict:
    """What two runs that are the same have the same: every tensor of every checkpoint (by hash),
    metrics, samples, whether figures are whole, and no leftovers."""
    steps = {f"step_{step:06d}": tensors(out / f"step_{step:06d}") for step in saved(out)}
    return {
        "checkpoints": steps,
        "metrics": rows(out / "metrics.jsonl"),
        "samples": rows(out / "samples.jsonl"),
        "figures": [
            name
            for name, end in FIGURES.items()
            if (out / name).exists() and (out / name).read_bytes().endswith(end)
        ],
        "names": sorted(p.name for p in out.iterdir() if not p.name.endswith(".bak")),
    }


def difference(a, b) -> str:
    """The first thing that differs between two results, in a line; "" if nothing does."""
    for part in a:
        if a[part] == b[part]:
            continue
        if isinstance(a[part], dict) and a[part].keys() == b[part].keys():
            return f"{part}: " + "; ".join(
                f"{k} {n}"
                for k in a[part]
                for n in a[part][k]
                if a[part][k][n] != b[part][k].get(n)
            )
        pairs = list(zip(a[part], b[part], strict=False))
        i = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        here, there = (f"{list(r[part])[i : i + 1]!s:.300}" for r in (a, b))
        return f"{part} {i + 1} of {len(a[part])} and {len(b[part])}: {here} and {there}"
    return ""


def where(out) -> str:
    """What a killed run was doing, from what it left."""
    left = [p.name for p in out.iterdir()] if out.is_dir() else []
    for start, place in (
        (".tmp-step", "in a save"),
        (".trash", "in retention"),
        (".tmp-", "in a rewind"),
    ):
        if any(name.startswith(start) for name in left):
            return place
    logs = [out / n for n in ("metrics.jsonl", "samples.jsonl")]
    if any(p.exists() and p.read_bytes()[-1:] not in (b"", b"\n") for p in logs):
        return "in a row of a log"
    if out.is_dir() and LAST in saved(out):
        return "at the end"
    return (
        "between saves"
        if any(name.startswith("step_") for name in left)
        else "before the first save"
    )


def in_a_save(life, out) -> bool:
    """Whether a life is writing a checkpoint."""
    return out.is_dir() and any(
        n.startswith(".tmp-step") and n.endswith(f"-{life.pid}") for n in os.listdir(out)
    )


def over(life, out) -> bool:
    """Whether the last checkpoint stands: what is left is the figure and the last line."""
    return (out / f"step_{LAST:06d}").exists()


def wait(life, out, until, sign=None):
    """Sleep, up to the moment of the kill; the exit code if the life ended before. sign: the
    seconds count from there."""
    stop = time.monotonic() + 20 * until + 10
    while sign and not sign(life, out) and time.monotonic() < stop:
        if (code := ended(life, 0.001)) is not None:
            return code
    return ended(life, until)


def last_line(log) -> str:
    """The accuracy that a life printed last, without the seconds it took."""
    line = log.read_text().splitlines()[-1]
    return (
        line.partition(" held-out problems in ")[0]
        if line.startswith("accuracy ")
        else f"no accuracy: {line}"
    )


def kill_many(folder, kills, seed=0, exec=False, say=print) -> tuple[Counter, int]:
    """Kill `kills` lives in `folder`. Returns how many were hit where, and how many runs reached
    their end. RuntimeError if one ended otherwise than the uninterrupted run."""
    rng, server, log = random.Random(seed), Server(exec), folder / "log"
    source, hit, finished = model_folder(folder / "model"), Counter(), 0

    def finish(life, out):
        if code := ended(life, 120):
            raise RuntimeError(
                f"{out}: exit code {code}: {log.read_text().splitlines()[-1:]}; the whole output "
                f"is in {log}"
            )

    def launch(out):
        return server.start(command(source, out), log, draws=True)

    finish(launch(folder / "warm"), folder / "warm")  # the first life of a server is slower
    began, life = time.monotonic(), launch(folder / "whole")
    while not over(life, folder / "whole") and ended(life, 0.005) is None:
        pass
    trained = time.monotonic() - began
    finish(life, folder / "whole")
    end = time.monotonic() - began - trained
    reference, line = result(folder / "whole"), last_line(log)

    def compare(out):
        if diff := difference(reference, result(out)):
            raise RuntimeError(f"{out} differs from the uninterrupted run: {diff}")
        if last_line(log) != line:
            raise RuntimeError(
                f"{out} ends with {last_line(log)!r}, the uninterrupted run with {line!r}"
            )
        shutil.rmtree(out)

    say(f"an uninterrupted run trains for {trained:.2f} s and draws for {end:.2f} s")
    moments = itertools.cycle(
        (
            (0.8 * trained, None),
            (0.03, in_a_save),
            (0.8 * trained, None),
            (end + 0.2 * trained, over),
        )
    )
    out = folder / "run 1"
    while hit.total() < kills:
        life, (longest, sign) = launch(out), next(moments)
        code = wait(life, out, rng.uniform(0, longest), sign)
        if code is None:
            life.kill()
            code = ended(life, 30)
        if code == -9:
            hit[where(out)] += 1
            if hit.total() % 10 == 0:
                say(f"{hit.total()} kills, {finished} runs finished alike")
            continue
        finish(life, out)
        compare(out)
        finished += 1
        out = folder / f"run {finished + 1}"
    finish(launch(out), out)
    compare(out)
    return hit, finished + 1


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--kills", type=int, default=200, metavar="N", help="lives to end early (default 200)"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the moments; where they fall also depends on the machine (default 0)",
    )
    p.add_argument("--exec", action="store_true", help="start a new interpreter for each life")
    args = p.parse_args()
    if args.kills < 1:
        p.error("--kills is a whole number from 1 on")
    folder, began = Path(tempfile.mkdtemp(prefix="kill_many-")), time.time()
    try:
        hit, runs = kill_many(
            folder, args.kills, args.seed, args.exec, lambda line: print(line, flush=True)
        )
    except (RuntimeError, ValueError, OSError) as e:
        sys.exit(f"kill_many.py: {e}")
    shutil.rmtree(folder)
    places = ", ".join(f"{n} {place}" for place, n in hit.most_common())
    print(
        f"{hit.total()} kills ({places}), {hit.total()} resumes; {runs} of {runs} runs ended as "
        f"the uninterrupted one, "
        f"in {time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
