"""What the commands share: errors that end in one line and an exit code, types of arguments, the device."""
import argparse
import os
import re
import sys
from pathlib import Path

import torch

import parallel
from model import one_line

OUT_OF_MEMORY = ("out of memory: lower --slots or shorten --max-new-tokens; in training also lower --micro-tokens or --logit-chunk, or "
                 "take --recompute, --optimizer split or --offload")


def no_memory(error) -> bool:
    """Whether an error says that memory has run out; a CPU's shortage has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def guarded(main, argv=None):
    """Run a command; what goes wrong ends in one line and an exit code: 2 usage, 3 data, 4 checkpoint, 5 numerics, 6 memory, 7 another
    rank died, 130 Ctrl-C. (75, a signal heeded in training, is train.py's own.)"""
    # pieces of GPU memory that can grow: what a KV cache leaves would else not fit the optimizer's state, nor the other way round
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        parallel.start()
        out = main(argv)
        parallel.stop()
        return out
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except FloatingPointError as e: message, code = e, 5
    except (ValueError, OSError) as e: message, code = e, getattr(e, "exit_code", 2)
    except (RuntimeError, MemoryError) as e:
        if no_memory(e): message, code = OUT_OF_MEMORY, 6
        elif parallel.lost(e):
            message = "another rank ended or does not answer: see what it printed; checkpoints stand, run again to resume"
            code = parallel.LOST
        else: raise
        message = f"{message} ({one_line([str(e)]):.300})"
    parallel.leave(f"{Path(sys.argv[0]).name}: {message}", code)


def whole(text, least=0):
    """argparse type: a whole number from `least` on."""
    if not text.isdigit() or int(text) < least: raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def natural(text): return whole(text, 1)


def pick_device(name):
    """auto: cuda where there is one, else cpu. Raises ValueError for a device this machine does not have."""
    if name == "auto": return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not usable here ({str(e).splitlines()[0][:80]}); use cpu, or leave the flag out") from None
    return name


def short_name(name_or_path) -> str:
    """A word for folder names: the last part of a path or hub id, without its ending."""
    return re.sub(r"[^\w.-]|\.(parquet|jsonl?)$", "", Path(name_or_path).name)
