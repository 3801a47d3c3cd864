"""What the commands that measure share with tools/plot.py and tools/page.py, which show it: how to
have a folder drawn, what an axis can show, what a caption must say."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from plumbing.rows import one_line, printable

# what is run on a folder, and what is said when it fails
TOOLS = {"tools.plot": "figures not drawn", "tools.page": "page.html not written"}
MOST_SECONDS = 600  # that they may take


def draw(folder):
    """Draw the figures that a folder's files allow, write its page.html, and print their paths.

    Each in a process of its own, `python -m tools.plot FOLDER` and `python -m tools.page FOLDER`:
    what goes wrong there, be it a foreign row, a missing font or a full disk, costs a line on
    stderr and nothing that was measured.
    """
    folder = Path(folder)
    with ThreadPoolExecutor() as pool:  # side by side: each spends seconds on its libraries alone
        for tool, done in zip(TOOLS, pool.map(partial(run, folder), TOOLS), strict=True):
            for path in done.stdout.splitlines():
                print(f"wrote {folder / Path(path).name}")
            *notes, last = done.stderr.splitlines() or [""]
            if done.returncode:  # of a traceback, too, the last line says what happened
                why = printable(one_line([last]), keep="")[:300]
                why = why or f"exit code {done.returncode}"
                print(f"{folder}: {TOOLS[tool]} ({why})", file=sys.stderr)
            elif last:  # lines left out
                print(*notes, last, sep="\n", file=sys.stderr)


def run(folder, tool):
    """What became of a tool on a folder, as subprocess.run says it."""
    command = [sys.executable, "-m", tool, str(folder.resolve())]
    home = Path(__file__).resolve().parents[1]
    text = dict(capture_output=True, encoding="utf-8", errors="replace")
    try:
        return subprocess.run(command, cwd=home, timeout=MOST_SECONDS, **text)
    except (OSError, subprocess.SubprocessError) as e:
        return subprocess.CompletedProcess(command, 1, "", str(e))


def number(x):
    """Whether x can be drawn: a number, no NaN, no infinity, nothing that overflows an axis."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100


def settings(r):
    """What a policy's numbers depend on, as a part of a caption."""
    return (
        f"norm: {r['norm']}, temperature {r['temperature']:g}, {r['dtype']}"
        f"  |  ln V = {r['ln_vocab']:.2f} nats"
    )
