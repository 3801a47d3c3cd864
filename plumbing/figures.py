"""Figures, drawn by another process: one that cannot be drawn harms nothing that was measured."""

import subprocess
import sys
from pathlib import Path


def draw(folder):
    """Draw every figure of a folder by tools/plot.py, or say in a line why not."""
    command = [sys.executable, "-m", "tools.plot", str(Path(folder).resolve())]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"{folder}: figures are not drawn ({why[:300]})", file=sys.stderr)
