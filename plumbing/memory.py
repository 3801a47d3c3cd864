"""What a run needs of memory, counted before it starts, and the settings that make it fit.

A step has two moments that matter. While sampling, the KV cache stands beside weights and optimizer
state; while training, gradients and activations do. The peak of a run is the larger of the two.
All of it is arithmetic on a model's shape and the flags: no weights, no network, no GPU. Gigabytes
are 10^9 bytes, those of a card too: one that is sold as 80 GB has 85.

What blocks keep for the backward is listed tensor by tensor in `block_bytes`, for eager blocks.
Compiled ones keep fewer copies in float32: for them the plan is an upper bound.
tests/test_memory.py holds these sums against a trace of the model's own operators at true widths.
"""

import os
import shlex
import shutil
import sys
import textwrap
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil
from types import SimpleNamespace

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
# one micro-batch. Here c is a model's Config, and `size` the bytes of an element of the weights and
# of the residual stream


def parameter_sizes(c):
    """Elements of every parameter of a model of this shape."""
    D, M = c.d_model, c.d_mlp
    queries = c.n_heads * c.head_dim
    qkv = queries + 2 * c.n_kv_heads * c.head_dim
    block = [
        qkv * D,
        queries * D,  # o
        2 * M * D,  # gate and up
        M * D,  # down
        D,  # two norms
        D,
    ]
    if c.qkv_bias:
        block.append(qkv)
    if c.qk_norm:
        block += [c.head_dim, c.head_dim]
    tables = 1 if c.tied else 2
    return [c.vocab_size * D] * tables + [D] + block * c.n_layers


def parameters(c):
    """Parameters of a model of this shape."""
    return sum(parameter_sizes(c))


def norm_bytes(width, size):
    """Bytes an RMSNorm keeps of a row: the row and 1 / rms in float32, the normed row, and that
    times the weight."""
    return 4 * width + 4 + 2 * size * width


def block_bytes(c, size):
    """Bytes a token that one eager block keeps for its backward.

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
    E = c.head_dim
    heads = c.n_heads + c.n_kv_heads
    norms = 2 * norm_bytes(c.d_model, size)
    attention = 3 * size * heads * E + 4 * c.n_heads
    if c.qk_norm:
        row = 4 * E if size < 4 else 0
        attention += heads * (row + 4 + size * E)
    mlp = 4 * size * c.d_mlp
    return norms + attention + mlp


def backward_moments(c, tokens, chunk, size, recompute):
    """Bytes beside weights, gradients and optimizer state, by part, at each moment of a micro-batch
    that can be its largest. All tokens count as response tokens, for prompts can be short.

    Activations are what blocks keep, with `recompute` only what enters each of them, and what they
    share: positions, and float32 cosines and sines [E/2].

    head forward    two chunks of float32 logits: themselves and their exponentials
    head backward   one, its copy in half precision, and gradients of states and unembedding
    last norm       its row in float32, and five more in its backward: two products, a power, a
                    quotient, and a mean spread out
    last block      what its MLP adds while all that it keeps is alive still: the gradient of
                    silu(gate) * up and both that follow from it, or beside the first down's float32
                    weight gradient. With recompute this block is whole
    embedding       its float32 gradient, and that of the states in float32 too

    These are half precision's. float32, whose products oneDNN makes, is within 2 % of them.
    Where they are tied, the unembedding's float32 gradient [V, D] waits for the embedding's.
    """
    T, D = tokens, c.d_model
    states = size * T * D  # the residual stream
    block = T * block_bytes(c, size)
    kept = c.n_layers * (states if recompute else block) + T * (8 + 4 * c.head_dim)
    normed = kept + T * norm_bytes(D, size)
    logits = 4 * min(chunk, T) * c.vocab_size
    head = 4 * c.vocab_size * D
    waits = head if c.tied else 0
    product = size * T * c.d_mlp  # silu(gate) * up
    mlp = states + product + max(product, 4 * D * c.d_mlp)
    return {
        "head forward": {"activations": normed, "logits": 2 * logits},
        "head backward": {
            "activations": normed,
            "logits": logits * 3 // 2,
            "head gradient": head,
            "backward": states,
        },
        "last norm": {
            "activations": kept,
            "head gradient": waits,
            "backward": 24 * T * D,
        },
        "last block": {
            "activations": kept + block if recompute else kept,
            "head gradient": waits,
            "backward": mlp,
        },
        "embedding": {
            "head gradient": head + waits,
            "backward": states + 4 * T * D,
        },
    }


# --------------------------------------------------------------------------------------------------
# a step


@dataclass
class Plan:
    """What a run takes at most, in GB, on each GPU (on a CPU: by the process)."""

    moments: dict  # sampling, training, under torchrun loading: {part: GB}
    host: float  # pinned host memory, with --offload
    checkpoint: float  # on disk: weights and optimizer state, of all ranks

    def total(self, moment):
        return sum(self.moments[moment].values())

    @property
    def peak(self):
        return max(map(self.total, self.moments))

    def parts(self, moment):
        """For people: weights 8.04, optimizer state 32.18, ..."""
        return ", ".join(f"{name} {gb:.2f}" for name, gb in self.moments[moment].items())


def memory_plan(config, args, cuda, world=None):
    """What a run with these settings takes at most: a Plan.

    args   max_prompt_tokens, max_new_tokens, slots, micro_tokens, recompute, optimizer, offload,
           dtype, logit_chunk, kl, replicas: none of them open
    cuda   on a GPU, which has a context and an allocator
    world  processes that torchrun started, None: as many as there are. Weights, gradients and
           optimizer state are float32 shards then, and each GPU has a copy to sample from. What
           FSDP gathers is counted by its design, no trace has seen it
    """
    world = world or parallel.world()
    size = 2 if args.dtype == "bfloat16" else 4  # what the model computes in
    # bytes a parameter
    weights, gradients, remainder, moments = BYTES[args.optimizer].values()
    if args.optimizer == "adamw" and size == 2 and world == 1:
        gradients, weights, moments = 2, 2, 4  # plain bfloat16
    state = remainder + moments

    n = parameters(config)
    shard = n / max(1, world // args.replicas)
    held = {
        "weights": shard * weights,
        "optimizer state": 0 if args.offload else shard * state,
        "reference": shard * weights if args.kl else 0,
        "copy to sample from": n * size if world > 1 else 0,
    }
    tokens = max(args.micro_tokens, row_tokens(args))
    passes = backward_moments(config, tokens, args.logit_chunk, size, args.recompute)
    largest = max(passes.values(), key=lambda parts: sum(parts.values()))
    training = {"gradients": shard * gradients, **largest}
    if world > 1:
        training["gathered by FSDP"] = gathered_bytes(config, size)
    plan = {
        "sampling": in_gb(held, sampling_bytes(config, args, size, cuda), cuda),
        "training": in_gb(held, training, cuda),
    }
    if world > 1:
        plan["loading"] = in_gb({"weights, whole": n * weights}, {}, cuda)
    host = pinned_bytes(config, args.optimizer) / 1e9 if args.offload else 0
    return Plan(plan, host, n * (weights + state) / 1e9)


def row_tokens(args):
    """Tokens of a row of full length."""
    return args.max_prompt_tokens + args.max_new_tokens


def in_gb(held, passing, cuda):
    """{part: GB} of what is held and what comes and goes, without empty parts; on a GPU with its
    context and what the allocator loses of the passing parts."""
    parts = held | passing
    if cuda:
        parts["CUDA context"] = CONTEXT
        parts["allocator"] = ALLOWANCE * sum(passing.values())
    return {name: size / 1e9 for name, size in parts.items() if size}


def sampling_bytes(c, args, size, cuda):
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
    queries = c.n_heads * c.head_dim
    keys = c.n_kv_heads * c.head_dim
    position = 2 * c.n_layers * keys * size + 12
    positions = args.slots * (row_tokens(args) + 1)
    draw = args.slots * c.vocab_size * 4 * 2 * 17 // 16
    packed = max(PREFILL_TOKENS, args.max_prompt_tokens)
    prompts = min(packed, args.slots * args.max_prompt_tokens)
    mlp = size * (2 * c.d_model + 4 * c.d_mlp)
    rotation = size * (c.d_model + 2 * queries + 2 * keys) + 12 * queries
    return {
        "KV cache": positions * position,
        "sampler": draw * (2 if cuda else 1),
        "prefill": prompts * max(mlp, rotation),
    }


def gathered_bytes(c, size):
    """Bytes that FSDP holds of unsharded parameters at once: those outside of blocks all along, of
    blocks two and the buffer they arrive in; and gradients on their way, in the dtype of the copies
    and in float32, in which they are summed over ranks."""
    outside = c.vocab_size * c.d_model * (1 if c.tied else 2)
    block = (parameters(c) - outside) // c.n_layers
    return outside * (2 * size + 4) + block * (3 * size + 2 * (size + 4))


def pinned_bytes(c, kind):
    """Bytes of pinned host memory that --offload takes: remainder and both moments of every
    parameter, each a tensor that torch rounds up to a power of two bytes."""
    remainder, moments = BYTES[kind]["remainder"], BYTES[kind]["moments"]
    total = 0
    for n in parameter_sizes(c):
        for size in (remainder, moments - 4, 4):
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


def choose(config, args, memory_bytes, host_bytes, cuda=True, world=None):
    """Values for those of SETTINGS that are open (None), as [(name, value, reason)].

    args          as for memory_plan, and prompts and group
    memory_bytes  of the GPU, without what other programs hold
    host_bytes    of the machine, for --offload

    `ways` has the order of preference. The first one wins that training fits and that leaves room
    to sample 24 full rows together; if none does, the first with 12, and so on down to one. On a
    CPU nothing is searched. Raises TooLarge where nothing fits.
    """
    world = world or parallel.world()
    open_ = [name for name in SETTINGS if getattr(args, name) is None]
    if not cuda:
        values = ways(args, world)[0] | {"slots": 64}
        return [(name, values[name], "") for name in open_]
    plan_of = partial(memory_plan, config, cuda=True, world=world)
    memory, host = memory_bytes / 1e9, host_bytes / 1e9
    # rows that can be of use: a step has no more responses
    useful = min(MOST_ROWS, ceil(args.prompts * args.group / world))
    rows = named_or(args.slots, range(1, useful + 1))
    for wanted in WANTED_ROWS:
        refused = []
        for way in ways(args, world):
            tried = with_(args, **way)
            obstacle = fit(plan_of, tried, rows, min(wanted, rows[-1]), memory, host)
            if not obstacle:
                why = reasons(tried, refused, useful)
                return [(name, getattr(tried, name), why[name]) for name in open_]
            refused.append((tried, obstacle))
    raise too_large(plan_of, tried, memory, host)


def ways(args, world):
    """Settings to try in turn, slots apart; named ones are in all of them. An exact first moment
    before a float16 one, and both before a state that an update must fetch from the host. Then,
    keeping activations before a third more work, and large micro-batches before small ones, down
    to one full row."""
    plain = world > 1 or args.dtype == "float32"
    kinds = named_or(args.optimizer, ["adamw"] if plain else ["split-m32", "split"])
    states = list(product(kinds, named_or(args.offload, [False])))
    if args.offload is None and kinds != ["adamw"]:
        states.append((kinds[-1], True))
    row = row_tokens(args)
    sizes = [max(MICRO_TOKENS, row)]
    while sizes[-1] > row:
        sizes.append(max(sizes[-1] // 2, row))
    sizes = named_or(args.micro_tokens, sizes)
    recompute = named_or(args.recompute, [False, True])
    return [
        dict(optimizer=kind, offload=offload, recompute=again, micro_tokens=tokens)
        for (kind, offload), again, tokens in product(states, recompute, sizes)
    ]


def named_or(value, values):
    """What to try of a setting: its value where it is named, else all of these."""
    return values if value is None else [value]


def with_(args, **changes):
    """The settings with some of them changed."""
    return SimpleNamespace(**vars(args) | changes)


def fit(plan_of, args, rows, wanted, memory, host):
    """Set args.slots to the most of `rows` that fit while sampling, or the fewest there are; and
    say why these settings will not do, "" where they do.

    wanted        rows
    memory, host  GB of the GPU, and of the machine. Pinned memory is never swapped, so a tenth of
                  the machine's is left alone
    """

    def sampling(slots):
        return plan_of(with_(args, slots=slots)).total("sampling")

    fitting = bisect_right(rows, memory, key=sampling)
    args.slots = rows[max(fitting - 1, 0)]
    plan = plan_of(args)
    for moment in reversed(plan.moments):
        gb = plan.total(moment)
        if gb > memory:
            return f"{moment} would take {gb:.1f} GB"
    if plan.host > 0.9 * host:
        return f"it would pin {plan.host:.1f} GB of the host's {host:.0f}"
    if args.slots < wanted:
        return f"{args.slots} full rows would fit, {wanted} are wanted"
    return ""


def reasons(best, refused, useful):
    """{setting: why it is what it is}: what stood against the last value that is preferred to it,
    the settings before it being alike.

    refused  settings that were tried before, and why they would not do
    useful   rows at most
    """
    enough = "are of use" if best.slots == useful else "fit"
    why = {
        "optimizer": "an exact float32 master stands behind the weights",
        "offload": "the optimizer's state fits",
        "recompute": "the activations of all blocks fit",
        "micro_tokens": "more keep a GPU no busier",
        "slots": f"as many rows of {row_tokens(best):,} tokens as {enough}",
    }
    for other, obstacle in refused:
        differs = next(name for name in SETTINGS if getattr(other, name) != getattr(best, name))
        why[differs] = f"else {obstacle}"
    return why


def too_large(plan_of, args, memory, host):
    """The error that says what the last settings tried, those of least memory, take, and what would
    save how much."""
    row, half = row_tokens(args), args.max_new_tokens // 2
    changes = [
        dict(recompute=True),
        dict(micro_tokens=row),
        dict(slots=1),
        dict(max_new_tokens=half, micro_tokens=min(args.micro_tokens, row - half)),
        dict(logit_chunk=128),
        dict(kl=0),
    ]
    if args.optimizer != "adamw":
        changes += [dict(optimizer="split"), dict(offload=True)]
    plan = plan_of(args)
    saved = []
    for change in changes:
        name, value = next(iter(change.items()))
        gb = plan.peak - plan_of(with_(args, **change)).peak
        if gb >= 0.05:
            saved.append(f"{flag(name, value)} {gb:.1f}")

    moment = max(plan.moments, key=plan.total)
    flags = " ".join(flag(name, getattr(args, name)) for name in SETTINGS)
    text = f"{memory:.0f} GB of GPU memory do not do: {moment} with {flags} takes "
    text += f"{plan.peak:.1f} GB ({plan.parts(moment)})"
    if plan.host > 0.9 * host:
        text += f" and {plan.host:.1f} GB of the host's {host:.0f}"
    if saved:
        text += f"; GB saved by {', '.join(saved)}"
    text += "; else take a larger GPU, or several with torchrun"
    return TooLarge(text, plan.peak)


# --------------------------------------------------------------------------------------------------
# what a run says before it starts


def default_new_tokens(c, max_prompt_tokens):
    """Response tokens at most where nothing else is said: the paper's, as far as positions go."""
    papers = 3072 if c.family == "llama" else 7168
    return max(1, min(papers, c.max_len - max_prompt_tokens))


def host_bytes():
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def show_plan(config, args, chosen, memory_bytes, cuda=True):
    """Print what a run takes by part, what was chosen for it and why, and what a checkpoint costs.

    chosen  what `choose` returned; memory_bytes is that of the GPU, or of the machine
    """
    plan, memory = memory_plan(config, args, cuda), memory_bytes / 1e9
    print(f"memory, GB, at most {plan.peak:.1f} of the {memory:.1f} there are:")
    if plan.peak > memory:
        print("warning: that is more than there is; --dry-run --memory 80 plans for a GPU")
    for moment in plan.moments:
        wrapped(f"{moment} {plan.total(moment):.2f}: {plan.parts(moment)}", "  ")
    if plan.host:
        wrapped(
            f"pinned host memory {plan.host:.2f}: optimizer state, each tensor a power of two", "  "
        )
    for name, value, reason in chosen:
        if reason:
            wrapped(f"{flag(name, value)}: {reason}", "  ")

    size, out = plan.checkpoint, args.out.resolve()
    existing = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    print(f"a checkpoint: {size:.2f} GB, {size:.0f} s at 1 GB/s; {free:.1f} GB are free")
    if free < 2 * size:
        need = f"checkpoints take {size:.1f} GB each, two stand side by side at times"
        print(f"warning: {need}, and {free:.1f} GB are free for {args.out}", file=sys.stderr)


def flag(name, value):
    """A setting as one types it: --slots 24, --recompute, --no-recompute."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def wrapped(text, indent=""):
    """Print a text in lines of at most 80 columns, its later ones indented."""
    later = indent + "  "
    print(
        textwrap.fill(
            text, 80, initial_indent=indent, subsequent_indent=later, break_on_hyphens=False
        )
    )


HEAD = """\
model           | GB  | optimizer | offload | recompute | tokens | slots | peak
--------------- | --- | --------- | ------- | --------- | ------ | ----- | ----
"""


def table(configs, memories, args):
    """What `choose` finds for models of these shapes, {name: Config}, on GPUs of these many GB, as
    Markdown, a line each, in 80 columns. `args` as for `choose`; max_new_tokens may be open. The
    host is taken to have the memory that --offload wants. A GPU that is too small has the smallest
    settings' peak.
    """
    lines = HEAD.splitlines()
    for name, config in configs.items():
        new_tokens = args.max_new_tokens or default_new_tokens(config, args.max_prompt_tokens)
        asked = with_(args, max_new_tokens=new_tokens)
        lines += [f"{name:15} | {gb:<3g} | {table_cells(config, asked, gb)}" for gb in memories]
    if len(configs) == 1:
        lines = [line.partition(" | ")[2] for line in lines]
    return "\n".join(lines)


def table_cells(config, args, memory):
    """The settings in a line of `table`, for one model on one GPU."""
    try:
        chosen = choose(config, args, memory * 1e9, float("inf"))
    except TooLarge as e:
        return f"too small | -       | -         | -      | -     | {e.peak:.1f}"
    a = with_(args, **{name: value for name, value, _ in chosen})
    offload = "yes" if a.offload else "no"
    recompute = "yes" if a.recompute else "no"
    peak = memory_plan(config, a, True).peak
    cells = f"{a.optimizer:9} | {offload:7} | {recompute:9} | {a.micro_tokens:<6} | {a.slots:<5}"
    return f"{cells} | {peak:.1f}"
