"""What the commands that measure share with tools/plot.py, which draws: how to have a folder drawn,
what a run is called, what an axis can show."""

import re
import subprocess
import sys
from pathlib import Path

from plumbing.rows import one_line, printable, read_json


def draw(folder):
    """Draw the figures that a folder's files allow, into it, and print their paths.

    In a process of its own, `python -m tools.plot FOLDER`: what goes wrong there, be it a foreign
    row, a missing font or a full disk, costs a line on stderr and nothing that was measured.
    """
    folder = Path(folder)
    command = [sys.executable, "-m", "tools.plot", str(folder.resolve())]
    home = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            command, cwd=home, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as e:
        print(f"{folder}: figures not drawn ({e})", file=sys.stderr)
        return
    for path in done.stdout.splitlines():
        print(f"wrote {folder / Path(path).name}")
    *notes, last = done.stderr.splitlines() or [""]
    if done.returncode:  # of a traceback, too, the last line says what happened
        why = printable(one_line([last]), keep="")[:300] or f"exit code {done.returncode}"
        print(f"{folder}: figures not drawn ({why})", file=sys.stderr)
    elif last:  # lines left out
        print(*notes, last, sep="\n", file=sys.stderr)


def number(x):
    """Whether x can be drawn: a number, no NaN, no infinity, nothing that overflows an axis."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100


def run_name(run):
    """What a run is called: the model that its config.json names, a name or a path, and its folder
    where that says something else."""
    run = Path(run).resolve()
    try:
        model = read_json(run / "config.json").get("model")
    except (ValueError, OSError):
        model = None
    model = Path(model).name if isinstance(model, str) else ""
    return run.name if model.casefold() in run.name.casefold() else f"{model}-{run.name}"


def label(name):
    """A model's name for captions and folders: of a path its last part, but a hub cache's
    repository, a run's model, and for a checkpoint (step_000300, warm-up) its run before it."""
    path = Path(name)
    if not path.is_dir():
        return path.name or str(name)
    path = path.resolve()
    if path.parent.name == "snapshots":  # models--Qwen--Qwen3-4B/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2]
    if path.name == "warm-up" or path.name.startswith("step_"):
        return f"{run_name(path.parent)}-{path.name}"
    return run_name(path)


def folder_name(name):
    """`label` as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", label(name)).strip(".") or "model"


def settings(r):
    """What a policy's numbers depend on, as a part of a caption."""
    return (
        f"norm: {r['norm']}, temperature {r['temperature']:g}, {r['dtype']}"
        f"  |  ln V = {r['ln_vocab']:.2f} nats"
    )
