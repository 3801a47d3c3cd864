"""What the commands share: errors in one line and an exit code, output that may be lost, types of
arguments, the device."""

import argparse
import errno
import math
import os
import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from plumbing import parallel
from plumbing.rows import one_line, printable

OUT_OF_MEMORY = (
    "out of memory: lower --slots or shorten --max-new-tokens; in training also lower "
    "--micro-tokens or --logit-chunk, or take --recompute, --optimizer split or --offload"
)
RANK_LOST = (
    "another rank ended or does not answer: see what it printed; "
    "checkpoints stand, run again to resume"
)
# exit code: the disk is full, or a checkpoint cannot be written for another reason
DISK_FULL = 8
# the disk, a quota on it, the limit of a file
NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


# --------------------------------------------------------------------------------------------------
# errors


def no_memory(error) -> bool:
    """Whether an error says that memory has run out; a CPU's shortage has no class of its own."""
    shortage = torch.OutOfMemoryError, MemoryError
    return isinstance(error, shortage) or "DefaultCPUAllocator" in str(error)


def disk_full(error) -> bool:
    """Whether an error says that the disk, or a quota on it, is full; safetensors' errors say it in
    their text alone."""
    told = any(f"(os error {n})" in str(error) for n in NO_ROOM)
    return told or getattr(error, "errno", None) in NO_ROOM


def guarded(main, argv=None):
    """Run a command; what goes wrong ends in one line and an exit code: 2 usage, 3 data, 4
    checkpoint, 5 numerics, 6 memory, 7 another rank died, 8 the disk is full or a checkpoint cannot
    be written, 130 Ctrl-C. (75, a signal heeded in training, is train.py's own.)

    That nobody reads what it prints, be it a closed pipe or terminal or a full disk, is no error:
    see `output_may_be_lost`.
    """
    # pieces of GPU memory that can grow: what a KV cache leaves would else not fit the optimizer's
    # state, nor the other way round
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with output_may_be_lost():
        try:
            parallel.start()
            out = main(argv)
            parallel.stop()
            return out
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        except FloatingPointError as e:
            message, code = e, 5
        except (ValueError, OSError, SafetensorError) as e:
            message, code = e, DISK_FULL if disk_full(e) else getattr(e, "exit_code", 2)
        except (RuntimeError, MemoryError) as e:
            if no_memory(e):
                message, code = OUT_OF_MEMORY, 6
            elif parallel.lost(e):
                message, code = RANK_LOST, parallel.LOST
            else:
                raise
            message = f"{message} ({one_line([str(e)]):.300})"
        # names out of files stand in messages: they must not move the cursor
        message = printable(" ".join(str(message).splitlines()))
        parallel.leave(f"{Path(sys.argv[0]).name}: {message}", code)


# --------------------------------------------------------------------------------------------------
# output


class Output:
    """A standard stream whose loss costs output and nothing else: once a write fails, /dev/null
    takes its place.

    What its encoding lacks is written as an escape. All else is the stream's own.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError as e:
            self.write(text.encode(e.encoding, "backslashreplace").decode(e.encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            self.lose()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.lose()

    def lose(self):
        """Have the file descriptor lead nowhere: what is still buffered goes there too, and what
        libraries print."""
        null = open(os.devnull, "w", encoding="utf-8")
        try:
            os.dup2(null.fileno(), self.stream.fileno())
            null.close()
        except (OSError, ValueError):  # closed already, or no file
            self.stream = null


@contextmanager
def output_may_be_lost():
    """In here it costs output, not the work, that a reader of stdout or stderr goes away (`| head`,
    a closed terminal), that a disk behind them is full, that they were closed before the start, or
    that a terminal knows few letters."""
    # a free descriptor would be that of the next file that is opened, and what libraries print
    # would go into that file
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(s or open(os.devnull, "w", encoding="utf-8")) for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


# --------------------------------------------------------------------------------------------------
# types of arguments: each knows its range, so that what cannot be is refused before anything is
# opened


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line: dozens of flags above it would hide it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}; {self.prog} --help lists the flags\n")


# of things to count: more than any machine holds, and far from where integers overflow
MOST = 10**9


def whole(text, least=0, most=MOST):
    """argparse type: a whole number from `least` to `most`."""
    value = int(text) if re.fullmatch("[0-9]{1,30}", text) else -1
    if least <= value <= most:
        return value
    raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {least} to {most:,}")


def number(text, least=-3e38, most=3e38, said="a number that float32 holds"):
    """argparse type: a number from `least` to `most` that float32 holds; `said` names the range."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if least <= value <= most and not 0 < abs(value) < 1e-37:
        return value
    raise argparse.ArgumentTypeError(f"{text!r:.40} is not {said}")


natural = partial(whole, least=1)
seed = partial(whole, most=2**63 - 1)
positive = partial(number, least=1e-37, said="a number above 0")
amount = partial(number, least=0, said="a number from 0 on")
share = partial(number, least=0, most=1, said="a number from 0 to 1")


def given(text):
    """argparse type: a text that is not empty. An empty path would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("nothing is given")
    return text


# --------------------------------------------------------------------------------------------------


def pick_device(name):
    """auto: cuda where there is one, else cpu. Raises ValueError for a device this machine does not
    have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # meta has no values
    except Exception as e:  # torch has many for this
        raise ValueError(
            f"--device {name}: not usable here ({one_line([str(e)]):.80}); use cpu, or leave the "
            "flag out"
        ) from None
    return name


def short_name(name_or_path) -> str:
    """A word for folder names: the last part of a path or hub id, without its ending."""
    return re.sub(r"[^\w.-]|\.(parquet|jsonl?)$", "", Path(name_or_path).name)
