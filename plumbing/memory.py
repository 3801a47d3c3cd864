"""What a run needs of memory, counted before it starts, and the settings that make it fit.

A step has two moments that matter. While sampling, the KV cache stands beside weights and optimizer
state; while training, gradients and activations do. The peak of a run is the larger of the two.
All of it is arithmetic on a model's shape and the flags: no weights, no network, no GPU. Gigabytes
are 10^9 bytes, those of a card too: one that is sold as 80 GB has 85.

What blocks keep for the backward is listed tensor by tensor in `block_bytes`, for eager blocks.
Compiled ones keep fewer copies in float32: for them the plan is an upper bound.
tests/test_plan.py holds these sums against a trace of the model's own operators at true widths.
"""

import os
import shlex
import shutil
import sys
import textwrap
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product
from math import ceil
from types import SimpleNamespace

from model import Config
from plumbing import parallel
from plumbing.optimizer import BYTES

# prompt tokens of one prefill: enough to keep a GPU busy, few enough for their activations to fit
PREFILL_TOKENS = 16384
# A CUDA context with torch's kernels, and cuBLAS's workspaces, 32 MiB a stream on a Hopper.
CONTEXT = 0.7e9  # an estimate
# Share of what comes and goes that the caching allocator holds in pieces of the wrong size. It
# rounds up to 2 MiB, which is nothing to tensors of tens of megabytes; what remains are places that
# one tensor left and no other fits.
ALLOWANCE = 0.04  # an estimate, for expandable segments
MICRO_TOKENS = 16384  # tokens of a micro-batch: more keep a GPU no busier
MOST_ROWS = 256  # rows sampled together: more gain little
# Rows of full length that are worth having: a decode step reads all weights, however few they are.
# Each number is tried with all settings before the next.
WANTED_ROWS = 24, 12, 6, 3, 1


# --------------------------------------------------------------------------------------------------
# one micro-batch


def parameter_sizes(c: Config) -> list[int]:
    """Elements of every parameter of a model of this shape."""
    D, H, K, E = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    block = [(H + 2 * K) * E * D, H * E * D, 2 * c.d_mlp * D, c.d_mlp * D, D, D]
    if c.qkv_bias:
        block.append((H + 2 * K) * E)
    if c.qk_norm:
        block += [E, E]
    tables = 1 if c.tied else 2
    return [c.vocab_size * D] * tables + [D] + block * c.n_layers


def parameters(c: Config) -> int:
    """Parameters of a model of this shape."""
    return sum(parameter_sizes(c))


def norm_bytes(width: int, size: int) -> int:
    """Bytes an RMSNorm keeps of a row: the row and 1 / rms in float32, the normed row, and that
    times the weight, both in `size` bytes an element."""
    return 4 * width + 4 + 2 * size * width


def block_bytes(c: Config, size: int) -> int:
    """Bytes a token that one eager block keeps for its backward; weights and residual stream have
    `size` bytes an element.

        kept                                   shape         dtype
        attn_norm: see norm_bytes              [D]           the last of them is a factor of qkv
        queries, keys, values                  [H + 2K, E]   weights'; whole, as values are a view
        q_norm and k_norm (qwen3): the row     [H + K, E]    float32; of float32 weights a view
                                   1 / rms     [H + K]       float32
                                   normed      [H + K, E]    weights'
        rotated queries and keys               [H + K, E]    weights'
        attention: its output, a factor of o   [H, E]        weights'
                   log-sum-exp                 [H]           float32
        mlp_norm: see norm_bytes               [D]           the last of them is a factor of gate_up
        gate and up                            [2 M]         weights'
        silu(gate)                             [M]           weights'
        silu(gate) * up, a factor of down      [M]           weights'

    The residual stream is not kept, for a sum needs neither of its terms; of float32 weights it is
    the row that the norms keep.
    """
    H, K, E = c.n_heads, c.n_kv_heads, c.head_dim
    norms = 2 * norm_bytes(c.d_model, size)
    heads = size * (H + 2 * K) * E
    if c.qk_norm:
        row = 4 * E if size < 4 else 0
        heads += (H + K) * (row + 4 + size * E)
    attention = size * (H + K) * E + size * H * E + 4 * H
    mlp = size * 4 * c.d_mlp
    return norms + heads + attention + mlp


def kept_bytes(c: Config, tokens: int, size: int, recompute: bool) -> int:
    """Bytes that all blocks keep of a micro-batch, with `recompute` only what enters each of them;
    and what they share: positions, and float32 cosines and sines [E/2]."""
    block = size * c.d_model if recompute else block_bytes(c, size)
    return tokens * (c.n_layers * block + 8 + 4 * c.head_dim)


def backward_moments(c: Config, tokens: int, chunk: int, size: int, recompute: bool) -> dict:
    """Bytes beside weights, gradients and optimizer state, by part, at each moment of a micro-batch
    that can be its largest. All tokens count as response tokens, for prompts can be short.

    head forward    two chunks of float32 logits: themselves and their exponentials
    head backward   one, its copy in the weights' dtype, and gradients of states and unembedding
    last norm       its row in float32, and five more in its backward: two products, a power, a
                    quotient, and a mean spread out
    last block      what its MLP adds while all that it keeps is alive still. Half precision: the
                    gradient of silu(gate) * up and both that follow from it, or beside the first
                    down's float32 weight gradient. float32, by oneDNN: the first, down's weight
                    gradient, and transposed copies of the two factors of that.
                    With recompute this block is whole, of the others there is what enters them
    embedding       its float32 gradient

    Where they are tied, the unembedding's float32 gradient [V, D] waits for the embedding's.
    """
    T, D, M, V = tokens, c.d_model, c.d_mlp, c.vocab_size
    half = size < 4
    kept = kept_bytes(c, T, size, recompute)
    normed = kept + T * norm_bytes(D, size)
    block = kept + (T * block_bytes(c, size) if recompute else 0)
    logits = 4 * min(chunk, T) * V
    head = 4 * V * D
    waits = head if c.tied else 0
    states = size * T * D
    if half:
        mlp = states + max(2 * size * T * M, size * T * M + 4 * D * M)
        logits_back, embed = logits * 3 // 2, states + 4 * T * D
    else:
        mlp = 2 * states + 2 * size * T * M + 4 * D * M
        logits_back, embed = logits, states

    def parts(activations, logits, head_gradient, backward):
        names = "activations", "logits", "head gradient", "backward"
        values = activations, logits, head_gradient, backward
        return dict(zip(names, values, strict=True))

    return {
        "head forward": parts(normed, 2 * logits, 0, 0),
        "head backward": parts(normed, logits_back, head, states),
        "last norm": parts(kept, 0, waits, 24 * T * D),
        "last block": parts(block, 0, waits, mlp),
        "embedding": parts(0, 0, head + waits, embed),
    }


# --------------------------------------------------------------------------------------------------
# a step


@dataclass
class Plan:
    """What a run takes at most, in GB, on each GPU (on a CPU: by the process)."""

    moments: dict[str, dict[str, float]]  # sampling, training, under torchrun loading: by part
    host: float  # pinned host memory, with --offload
    checkpoint: float  # on disk: weights and optimizer state, of all ranks

    def total(self, moment: str) -> float:
        return sum(self.moments[moment].values())

    @property
    def peak(self) -> float:
        return max(map(self.total, self.moments))


def memory_plan(config: Config, args, cuda: bool, world: int | None = None) -> Plan:
    """What a run with these settings takes at most.

    args   max_prompt_tokens, max_new_tokens, slots, micro_tokens, recompute, optimizer, offload,
           dtype, logit_chunk, kl, replicas: none of them open
    cuda   on a GPU, which has a context and an allocator
    world  processes that torchrun started, None: as many as there are. Weights, gradients and
           optimizer state are float32 shards then, and each GPU has a copy to sample from. What
           FSDP gathers is counted by its design, no trace has seen it
    """
    c, n = config, parameters(config)
    world = parallel.world() if world is None else world
    shards = max(1, world // args.replicas)
    size = 2 if args.dtype == "bfloat16" else 4  # what the model computes in
    each = bytes_of(args, world)
    state = each["remainder"] + each["moments"]
    held = {"weights": n * each["weights"] / shards}
    if not args.offload:
        held["optimizer state"] = n * state / shards
    if args.kl:
        held["reference"] = n * each["weights"] / shards
    if world > 1:
        held["copy to sample from"] = n * size

    tokens = max(args.micro_tokens, args.max_prompt_tokens + args.max_new_tokens)
    moments = backward_moments(c, tokens, args.logit_chunk, size, args.recompute)
    largest = max(moments.values(), key=lambda parts: sum(parts.values()))
    training = {"gradients": n * each["gradients"] / shards, **largest}
    if world > 1:
        training["gathered by FSDP"] = gathered_bytes(c, size)
    plan = {"sampling": sampling_bytes(c, args, size, cuda), "training": training}
    plan = {name: in_gb(held, passing, cuda) for name, passing in plan.items()}
    if world > 1:
        plan["loading"] = in_gb({"weights, whole": n * each["weights"]}, {}, cuda)
    host = pinned_bytes(c, args.optimizer) / 1e9 if args.offload else 0.0
    return Plan(plan, host, n * (each["weights"] + state) / 1e9)


def bytes_of(args, world: int) -> dict[str, int]:
    """Bytes a parameter, by part: optimizer.BYTES, but AdamW on plain bfloat16 weights has its
    gradients and moments in bfloat16 too."""
    if args.optimizer == "adamw" and args.dtype == "bfloat16" and world == 1:
        return {"weights": 2, "gradients": 2, "remainder": 0, "moments": 4}
    return BYTES[args.optimizer]


def in_gb(held: dict, passing: dict, cuda: bool) -> dict[str, float]:
    """What is held and what comes and goes, in GB, without empty parts; on a GPU with its context
    and what the allocator loses of the passing parts."""
    parts = held | passing
    if cuda:
        lost = ALLOWANCE * sum(passing.values())
        parts = parts | {"CUDA context": CONTEXT, "allocator": lost}
    return {name: value / 1e9 for name, value in parts.items() if value}


def sampling_bytes(c: Config, args, size: int, cuda: bool) -> dict[str, float]:
    """Bytes that come with sampling, by part.

    KV cache  keys and values of every slot, one position more than a row has, and 12 bytes a
              position for token and log-prob
    sampler   logits and weights, float32 [slots, V], and a sixteenth for the draw; on a GPU twice,
              in the recorded graph and in what the runs before it left behind
    prefill   of packed prompts, one block without gradient. In its MLP: the residual stream before
              and after attention, gate and up, silu(gate), the product. Where heads are wide,
              in the rotation of queries: the residual stream, all heads, normed queries, and
              float32 queries with as much again for the products and half for their sums, twice
    """
    D, H, K, E = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    length = args.max_prompt_tokens + args.max_new_tokens + 1
    position = 2 * c.n_layers * K * E * size + 12
    draw = args.slots * c.vocab_size * 4 * 2 * 17 // 16
    packed = max(PREFILL_TOKENS, args.max_prompt_tokens)
    prompts = min(packed, args.slots * args.max_prompt_tokens)
    mlp = size * (2 * D + 4 * c.d_mlp)
    normed = H * E if c.qk_norm else 0
    rotation = size * (D + (H + 2 * K) * E + normed) + 3 * 4 * H * E
    return {
        "KV cache": args.slots * length * position,
        "sampler": draw * (2 if cuda else 1),
        "prefill": prompts * max(mlp, rotation),
    }


def gathered_bytes(c: Config, size: int) -> int:
    """Bytes that FSDP holds of unsharded parameters at once: those outside of blocks all along, of
    blocks two and the buffer they arrive in; and gradients on their way, in the dtype of the copies
    and in float32, in which they are summed over ranks."""
    outside = c.vocab_size * c.d_model * (1 if c.tied else 2)
    block = (parameters(c) - outside) // c.n_layers
    return outside * (2 * size + 4) + block * (3 * size + 2 * (size + 4))


def pinned_bytes(c: Config, kind: str) -> int:
    """Bytes of pinned host memory that --offload takes: remainder and both moments of every
    parameter, each a tensor that torch rounds up to a power of two bytes."""
    first = BYTES[kind]["moments"] - 4
    total = 0
    for n in parameter_sizes(c):
        for size in (BYTES[kind]["remainder"], first, 4):
            total += 1 << (n * size - 1).bit_length()
    return total


# --------------------------------------------------------------------------------------------------
# settings that fit

SETTINGS = "optimizer", "offload", "recompute", "micro_tokens", "slots"  # that `choose` fills in


class TooLarge(ValueError):
    """No settings fit. One line; `peak` is what the smallest ones take, in GB."""

    exit_code = 6

    def __init__(self, line, peak=0.0):
        super().__init__(line)
        self.peak = peak


@dataclass
class Way:
    """Settings that were tried on a GPU, with as many slots as fit, or one."""

    args: SimpleNamespace
    rows: int  # full rows that fit while sampling
    peak: float  # GB
    obstacle: str  # why they would not do for training; "" where they do

    def same(self, other, names) -> bool:
        return all(getattr(self.args, name) == getattr(other.args, name) for name in names)

    def why_not(self, wanted: int) -> str:
        return self.obstacle or f"{self.rows} full rows would fit, {wanted} are wanted"


def choose(config: Config, args, memory_bytes, host_bytes, cuda=True, world=None) -> list[tuple]:
    """Values for those of SETTINGS that are open (None), as (name, value, reason).

    args          as for memory_plan, and prompts and group
    memory_bytes  of the GPU, without what other programs hold
    host_bytes    of the machine, for --offload

    `ways` has the order of preference. The first one wins that training fits and that leaves room
    to sample 24 full rows together; if none does, the first with 12, and so on down to one. On a
    CPU nothing is searched. Raises TooLarge where nothing fits.
    """
    open_ = [name for name in SETTINGS if getattr(args, name) is None]
    if not cuda:
        kind = "adamw" if args.dtype == "float32" else "split-m32"
        values = dict(zip(SETTINGS, (kind, False, False, MICRO_TOKENS, 64), strict=True))
        return [(name, values[name], "") for name in open_]
    world = parallel.world() if world is None else world
    machine = memory_bytes / 1e9, host_bytes / 1e9, world
    tried = [attempt(config, with_(args, **way), *machine) for way in ways(args, world)]
    for wanted in WANTED_ROWS:
        wanted = min(wanted, args.slots or most_rows(args, world))
        if best := next((w for w in tried if not w.obstacle and w.rows >= wanted), None):
            why = reasons(best, tried, wanted, world)
            return [(name, getattr(best.args, name), why[name]) for name in open_]
    raise TooLarge(what_it_takes(config, tried[-1], *machine), tried[-1].peak)


def ways(args, world: int) -> list[dict]:
    """Settings to try in turn, slots apart; named ones are in all of them. An exact first moment
    before a float16 one, and both before a state that an update must fetch from the host. Then,
    keeping activations before a third more work, and large micro-batches before small ones, down
    to one full row."""
    if args.optimizer:
        kinds = [args.optimizer]
    elif world > 1 or args.dtype == "float32":
        kinds = ["adamw"]
    else:
        kinds = ["split-m32", "split"]
    if kinds == ["adamw"]:
        states = [("adamw", False)]
    elif args.offload is None:
        states = [(kind, False) for kind in kinds] + [(kinds[-1], True)]
    else:
        states = [(kind, args.offload) for kind in kinds]
    recompute = [False, True] if args.recompute is None else [args.recompute]
    row = args.max_prompt_tokens + args.max_new_tokens
    sizes = [args.micro_tokens or max(MICRO_TOKENS, row)]
    while args.micro_tokens is None and sizes[-1] > row:
        sizes.append(max(sizes[-1] // 2, row))
    out = []
    for (kind, offload), again, tokens in product(states, recompute, sizes):
        settings = kind, offload, again, tokens
        out.append(dict(zip(SETTINGS[:-1], settings, strict=True)))
    return out


def with_(args, **changes) -> SimpleNamespace:
    """The settings with some of them changed."""
    return SimpleNamespace(**vars(args) | changes)


def most_rows(args, world: int) -> int:
    """Rows that can be of use: a step has no more responses."""
    return min(MOST_ROWS, ceil(args.prompts * args.group / world))


def attempt(config: Config, args, memory: float, host: float, world: int) -> Way:
    """Settings on a GPU of `memory` GB in a machine of `host` GB. Pinned memory is never swapped,
    so a tenth of the machine's is left alone."""

    def plan(slots):
        return memory_plan(config, with_(args, slots=slots), True, world)

    def sampling(slots):
        return plan(slots).total("sampling")

    if args.slots:
        rows = args.slots if sampling(args.slots) <= memory else 0
    else:
        rows = bisect_right(range(1, most_rows(args, world) + 1), memory, key=sampling)
    slots = args.slots or max(rows, 1)
    its = plan(slots)
    obstacle = ""
    if its.host > 0.9 * host:
        obstacle = f"it would pin {its.host:.1f} GB of the host's {host:.0f}"
    for moment in ("training", "loading"):
        if moment in its.moments and its.total(moment) > memory:
            obstacle = f"{moment} would take {its.total(moment):.1f} GB"
    return Way(with_(args, slots=slots), rows, its.peak, obstacle)


def reasons(best: Way, tried: list[Way], wanted: int, world: int) -> dict[str, str]:
    """Of each setting: why not another that is preferred to it, those before it being alike."""
    out = {
        "optimizer": "an exact float32 master stands behind the weights",
        "offload": "the optimizer's state fits",
        "recompute": "the activations of all blocks fit",
        "micro_tokens": "more keep a GPU no busier",
    }
    earlier = tried[: tried.index(best)]
    for i, name in enumerate(SETTINGS[:-1]):
        alike = [way for way in earlier if way.same(best, SETTINGS[:i])]
        if better := [way for way in alike if not way.same(best, [name])]:
            out[name] = "else " + better[-1].why_not(wanted)
    row = best.args.max_prompt_tokens + best.args.max_new_tokens
    enough = best.args.slots == most_rows(best.args, world)
    out["slots"] = f"as many rows of {row:,} tokens as {'are of use' if enough else 'fit'}"
    return out


def what_it_takes(config: Config, way: Way, memory: float, host: float, world: int) -> str:
    """The line that says what the last way tried, the one of least memory, takes, and what would
    save how much."""

    def changed(**changes):
        return memory_plan(config, with_(way.args, **changes), True, world)

    a, plan = way.args, changed()
    moment = max(plan.moments, key=plan.total)
    row, half = a.max_prompt_tokens + a.max_new_tokens, a.max_new_tokens // 2
    changes = {
        "--recompute": dict(recompute=True),
        f"--micro-tokens {row}": dict(micro_tokens=row),
        "--slots 1": dict(slots=1),
        f"--max-new-tokens {half}": dict(
            max_new_tokens=half, micro_tokens=min(a.micro_tokens, row - half)
        ),
        "--logit-chunk 128": dict(logit_chunk=min(128, a.logit_chunk)),
        "--kl 0": dict(kl=0.0),
    }
    if world == 1:
        changes["--optimizer split"] = dict(optimizer="split", dtype="bfloat16")
    if world == 1 and a.optimizer != "adamw":
        changes["--offload"] = dict(offload=True)
    saved = {flags: plan.peak - changed(**change).peak for flags, change in changes.items()}
    saved = ", ".join(f"{flags} {gb:.1f}" for flags, gb in saved.items() if gb >= 0.05)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in plan.moments[moment].items())
    flags = " ".join(flag(name, getattr(a, name)) for name in SETTINGS)
    text = f"{memory:.0f} GB of GPU memory do not do: {moment} with {flags} takes "
    text += f"{plan.peak:.1f} GB ({parts})"
    if plan.host > 0.9 * host:
        text += f" and {plan.host:.1f} GB of the host's {host:.0f}"
    if saved:
        text += f"; GB saved by {saved}"
    return text + "; else take a larger GPU, or several with torchrun"


# --------------------------------------------------------------------------------------------------
# what a run says before it starts

DISK = 1e9  # bytes a second that a checkpoint is written with, for a guess at the time it takes


def default_new_tokens(c: Config, max_prompt_tokens: int) -> int:
    """Response tokens at most where nothing else is said: the paper's, as far as positions go."""
    papers = 3072 if c.family == "llama" else 7168
    return max(1, min(papers, c.max_len - max_prompt_tokens))


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def show_plan(config: Config, args, chosen, memory_bytes, cuda=True):
    """Print what a run takes by part, what was chosen for it and why, and what a checkpoint costs.

    chosen  what `choose` returned; memory_bytes is that of the GPU, or of the machine
    """
    plan = memory_plan(config, args, cuda)
    print(f"memory, GB, at most {plan.peak:.1f} of the {memory_bytes / 1e9:.1f} there are:")
    if plan.peak * 1e9 > memory_bytes:
        print("warning: that is more than there is; --dry-run --memory 80 plans for a GPU")
    for moment, parts in plan.moments.items():
        parts = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
        wrapped(f"{moment} {plan.total(moment):.2f}: {parts}", "  ")
    if plan.host:
        wrapped(
            f"pinned host memory {plan.host:.2f}: optimizer state, each tensor a power of two", "  "
        )
    for name, value, reason in chosen:
        if reason:
            wrapped(f"{flag(name, value)}: {reason}", "  ")
    existing = next(p for p in (args.out.resolve(), *args.out.resolve().parents) if p.exists())
    size, free = plan.checkpoint, shutil.disk_usage(existing).free / 1e9
    seconds = size * 1e9 / DISK
    print(f"a checkpoint: {size:.2f} GB, {seconds:.0f} s at 1 GB/s; {free:.1f} GB are free")
    if free < 2 * size:
        need = f"checkpoints take {size:.1f} GB each, two stand side by side at times"
        print(f"warning: {need}, and {free:.1f} GB are free for {args.out}", file=sys.stderr)


def flag(name: str, value) -> str:
    """A setting as one types it: --slots 24, --recompute, --no-recompute."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def wrapped(text, indent=""):
    """Print a text in lines of at most 80 columns, its later ones indented."""
    rest = indent + "  "
    print(
        textwrap.fill(
            text, 80, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False
        )
    )


def table(configs: dict[str, Config], memories: list[float], args) -> str:
    """What `choose` finds for models of these shapes on GPUs of these many GB, as Markdown, a line
    each, in 80 columns. `args` as for `choose`; max_new_tokens may be open. The host is taken to
    have the memory that --offload wants. A GPU that is too small has the smallest settings' peak.
    """
    head = "GB", "optimizer", "offload", "recompute", "tokens", "slots", "peak"
    rows = [("model", *head)]
    for name, config in configs.items():
        new_tokens = args.max_new_tokens or default_new_tokens(config, args.max_prompt_tokens)
        asked = with_(args, max_new_tokens=new_tokens)
        for memory in memories:
            try:
                chosen = choose(config, asked, memory * 1e9, float("inf"))
            except TooLarge as e:
                rows.append((name, f"{memory:g}", "too small", *"----", f"{e.peak:.1f}"))
                continue
            a = with_(asked, **{setting: value for setting, value, _ in chosen})
            yes = ["yes" if on else "no" for on in (a.offload, a.recompute)]
            peak = memory_plan(config, a, True).peak
            numbers = f"{a.micro_tokens}", f"{a.slots}", f"{peak:.1f}"
            rows.append((name, f"{memory:g}", a.optimizer, *yes, *numbers))
    if len(configs) == 1:
        rows = [row[1:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(" | ".join(cells).rstrip())
    return "\n".join(lines)
