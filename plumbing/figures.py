"""What the commands that measure share with tools/plot.py, which draws: how to have a folder drawn,
what an axis can show, what a caption must say."""

import subprocess
import sys
from pathlib import Path

from plumbing.rows import one_line, printable


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


def settings(r):
    """What a policy's numbers depend on, as a part of a caption."""
    return (
        f"norm: {r['norm']}, temperature {r['temperature']:g}, {r['dtype']}"
        f"  |  ln V = {r['ln_vocab']:.2f} nats"
    )
