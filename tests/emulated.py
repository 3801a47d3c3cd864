"""Two things only a GPU has, by their meaning, on a CPU: FlashAttention's kernel, CUDA graphs.

`flash_kernel` gives torch's operators for FlashAttention-2 over packed sequences an implementation
for CPU tensors, in float64, with the checks of the real one. `cuda_graphs` puts a recorder of
operators in the place of torch.cuda's streams and graphs. So the code that a GPU would run is run
here, line by line, and what it computes is compared. Speed and rounding stay a GPU's own.

Both are context managers and leave nothing behind.
"""

import math
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbing import kernels

# --------------------------------------------------------------------------------------------------
# FlashAttention-2 over sequences laid end to end

HALF = torch.bfloat16, torch.float16


class KernelError(RuntimeError):
    """The real kernel would refuse this call, or would read or write where it must not."""


def require(condition, message):
    if not condition:
        raise KernelError(message)


def serves(device, dtype, head_dim):
    """`kernels.has_flash` of a machine whose every device has the kernel."""
    return dtype in HALF and head_dim % 8 == 0 and head_dim <= 256


def check_tensors(q, k, v, q_starts, k_starts, used):
    """Types, layouts and shapes: q [T,H,E], k and v [T',K,E], offsets [n+1], used [n] or None."""
    require(q.dtype in HALF, f"queries are {q.dtype}: only float16 and bfloat16 are taken")
    require(k.dtype == v.dtype == q.dtype, "queries, keys and values are of different dtypes")
    require(
        q.dim() == k.dim() == v.dim() == 3, "queries, keys and values must have three dimensions"
    )
    require(k.shape == v.shape, "keys and values differ in shape")
    for t in (q, k, v):
        require(t.stride(-1) == 1, "the last dimension must be contiguous")
    H, K, E = q.shape[1], k.shape[1], q.shape[2]
    require(H % K == 0, f"{H} query heads cannot share {K} key heads")
    require(k.shape[2] == E and E % 8 == 0 and E <= 256, f"head_dim {E}")
    for starts in (q_starts, k_starts):
        require(starts.dtype == torch.int32, f"offsets are {starts.dtype}, want int32")
        require(starts.is_contiguous(), "offsets must be contiguous")
    n = q_starts.numel() - 1
    require(n > 0 and q_starts.shape == k_starts.shape == (n + 1,), "offsets of different lengths")
    if used is not None:
        require(
            used.dtype == torch.int32 and used.is_contiguous(), "live lengths: contiguous int32"
        )
        require(used.shape == (n,), f"{list(used.shape)} live lengths for {n} sequences")


def check_lengths(q, k, q_starts, k_starts, max_q, max_k, used):
    """What the real kernel takes on trust: it would compute a part only, or leave its memory."""
    queries, keys = q_starts.diff(), k_starts.diff()
    require(q_starts[0] == 0 and q_starts[-1] == len(q), "query offsets do not span the queries")
    require(k_starts[0] == 0 and k_starts[-1] <= len(k), "key offsets leave the keys")
    require((queries >= 0).all() and (keys >= 0).all(), "offsets must not fall")
    require(queries.max() <= max_q, f"max_q {max_q}: a sequence has {queries.max()} queries")
    require(keys.max() <= max_k, f"max_k {max_k}: a sequence has {keys.max()} keys")
    require(
        used is None or (0 <= used).all() and (used <= keys).all(), "live lengths leave their rows"
    )


def is_ordered(q, k, sequences, max_q, max_k, causal, left, right, swaps=True):
    """Whether the attention is causal, by the kernel's own rules.

    Where every sequence has one query, order means nothing, and the heads that share a key are made
    the queries of one sequence: for that the tokens must be as many as the sequences.
    """
    left, right = (-1 if side is None else side for side in (left, right))
    if max_q == 1:
        causal = False
        if swaps and left < 0 and right < 0 and q.shape[1] > k.shape[1]:
            require(
                len(q) == sequences, f"{len(q)} queries do not reshape to {sequences} sequences"
            )
    right = 0 if causal else right
    left, right = (-1 if side >= max_k else side for side in (left, right))
    require(left < 0 and right in (-1, 0), f"a window of {left}, {right} is not emulated")
    return right == 0


def scores(q, k, scale, ordered):
    """Scaled scores [H,n,m] of one sequence, q [n,H,E] and k [m,H,E]. In order, the last query
    stands at the last key: the kernel aligns the two at their ends."""
    s = torch.einsum("nhe,mhe->hnm", q, k) * scale
    if ordered:
        n, m = s.shape[1:]
        s = s.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -math.inf)
    return s


def wide(t, heads):
    """Keys or values [m,K,E] in float64, one head for each query head."""
    return t.double().repeat_interleave(heads // t.shape[1], 1)


def forward(
    q,
    k,
    v,
    q_starts,
    k_starts,
    max_q,
    max_k,
    dropout,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    """aten::_flash_attention_forward: output like q, and log-sum-exp of the scores [H,T]."""
    require(
        not dropout and not debug and alibi_slopes is None and block_table is None, "not emulated"
    )
    check_tensors(q, k, v, q_starts, k_starts, seqused_k)
    check_lengths(q, k, q_starts, k_starts, max_q, max_k, seqused_k)
    window = window_size_left, window_size_right
    ordered = is_ordered(q, k, q_starts.numel() - 1, max_q, max_k, causal, *window)
    heads, scale = q.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(heads, len(q))
    spans = zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True)
    for i, ((a, b), (c, d)) in enumerate(spans):
        if seqused_k is not None:
            d = c + int(seqused_k[i])
        if a == b or c == d:
            continue
        s = scores(q[a:b].double(), wide(k[c:d], heads), scale, ordered)
        out[a:b] = torch.einsum("hnm,mhe->nhe", s.softmax(-1), wide(v[c:d], heads)).to(q.dtype)
        lse[:, a:b] = s.logsumexp(-1)
    random_state, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, lse, random_state, unused, q.new_empty(0)


def backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    q_starts,
    k_starts,
    max_q,
    max_k,
    dropout,
    causal,
    random_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    """aten::_flash_attention_backward: gradients of q, k and v, from what the forward kept.

    P = exp(S - lse); dV = P^T dO; dS = P (dO V^T - rowsum(dO O)); dQ = dS K; dK = dS^T Q.
    """
    require(not dropout, "not emulated")
    check_tensors(q, k, v, q_starts, k_starts, None)
    check_lengths(q, k, q_starts, k_starts, max_q, max_k, None)
    require(grad.dtype == out.dtype == q.dtype and grad.shape == out.shape == q.shape, "gradient")
    require(
        grad.stride(-1) == out.stride(-1) == 1, "the gradient's last dimension is not contiguous"
    )
    window = window_size_left, window_size_right
    sequences, heads = q_starts.numel() - 1, q.shape[1]
    ordered = is_ordered(q, k, sequences, max_q, max_k, causal, *window, swaps=False)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    spans = zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True)
    for (a, b), (c, d) in spans:
        Q, K, V, dO = q[a:b].double(), wide(k[c:d], heads), wide(v[c:d], heads), grad[a:b].double()
        P = (scores(Q, K, scale, ordered) - lse[:, a:b, None]).exp()
        own = (dO * out[a:b]).sum(-1).T[:, :, None]
        dS = P * (torch.einsum("nhe,mhe->hnm", dO, V) - own) * scale
        dq[a:b] = torch.einsum("hnm,mhe->nhe", dS, K).to(q.dtype)
        for target, each in (
            (dk, torch.einsum("hnm,nhe->mhe", dS, Q)),
            (dv, torch.einsum("hnm,nhe->mhe", P, dO)),
        ):
            target[c:d] = each.unflatten(1, (k.shape[1], -1)).sum(2).to(q.dtype)
    return dq, dk, dv


@contextmanager
def flash_kernel():
    """As long as this is open, CPU tensors have the kernel and the code knows it: `has_flash` is
    replaced wherever it is looked up. Yields a Counter of the operators' calls."""
    calls = Counter()

    def counted(name, f):
        def run(*args, **kwargs):
            calls[name] += 1
            return f(*args, **kwargs)

        return run

    real = kernels.has_flash
    users = [m for m in list(sys.modules.values()) if getattr(m, "has_flash", None) is real]
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, f in (("forward", forward), ("backward", backward)):
            library.impl(f"_flash_attention_{name}", counted(name, f), "CPU")
        for module in users:
            patch.setattr(module, "has_flash", serves)
        yield calls


# --------------------------------------------------------------------------------------------------
# CUDA graphs


class CaptureError(RuntimeError):
    """This cannot stand in a CUDA graph: the host would have to wait for the device, or feed it."""


# methods that hand values to Python without an operator; the operator behind torch.tensor([...])
LOOKS = {"tolist", "numpy", "cpu", "__array__"}
FEEDS = {"lift_fresh"}


def refuse_waiting(operator, args):
    """CaptureError for an operator whose result, or its shape, the host must wait for."""
    name = operator._schema.name.removeprefix("aten::")
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*operator.tags}
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # waits for a mask only
        indices = [t for t in args[1] if t is not None]
        waits = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
    if waits or name in FEEDS:
        raise CaptureError(f"{name} in a graph: the host would have to wait, or to bring data")


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def place(t):
    """The memory that a tensor, or a view of it, lies in."""
    return t.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Writes down every operator with the very tensors it reads and writes: `steps` holds the
    operator, its arguments, and those of its results that are no views of them.

    A real capture runs no kernel. Here the operators run, because shapes are needed, and `undo`
    puts back what they wrote to older tensors and makes their own results unusable until a replay.
    """

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.before, self.running = [], {}, {}, False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_waiting(operator, args)
        given = {
            argument.name: x for argument, x in zip(operator._schema.arguments, args, strict=False)
        }
        for argument in operator._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.keep((given | kwargs).get(argument.name))
        self.running = True
        try:
            out = operator(*args, **kwargs)
        finally:
            self.running = False
        old = {place(t) for t in tensors((args, kwargs))}
        pairs = enumerate(out) if isinstance(out, (tuple, list)) else [(None, out)]
        fresh = [(i, t) for i, t in pairs if isinstance(t, torch.Tensor) and place(t) not in old]
        self.made |= {place(t): t for _, t in fresh}
        self.steps.append((operator, args, kwargs, fresh))
        return out

    def keep(self, tree):
        for t in tensors(tree):
            if place(t) not in self.made and place(t) not in self.before:
                self.before[place(t)] = t.untyped_storage(), t.untyped_storage().clone()

    def undo(self):
        for storage, values in self.before.values():
            storage.copy_(values)
        for t in self.made.values():
            if t.is_floating_point():
                t.fill_(math.nan)


class NoLooking(TorchFunctionMode):
    """CaptureError for a look at values that no operator announces."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if getattr(f, "__name__", "") in LOOKS and not self.recorder.running:
            raise CaptureError(f"{f.__name__} in a graph: the host would have to wait")
        return f(*args, **(kwargs or {}))


class Graph:
    """torch.cuda.CUDAGraph: a list of operators on fixed tensors, run without the step's Python."""

    def __init__(self):
        self.steps, self.replays = None, 0

    @torch.no_grad()
    def replay(self):
        if self.steps is None:
            raise RuntimeError("a graph that was never captured")
        self.replays += 1
        for operator, args, kwargs, outputs in self.steps:
            new = operator(*args, **kwargs)
            for i, fixed in outputs:
                fixed.copy_(new if i is None else new[i])


class Capture:
    """torch.cuda.graph(graph)."""

    open = None

    def __init__(self, graph):
        self.graph, self.recorder = graph, Recorder()
        self.looking = NoLooking(self.recorder)

    def __enter__(self):
        Capture.open = self
        self.looking.__enter__()
        self.recorder.__enter__()

    def __exit__(self, kind, error, trace):
        self.recorder.__exit__(kind, error, trace)
        self.looking.__exit__(kind, error, trace)
        Capture.open = None
        self.recorder.undo()
        if kind is None:
            self.graph.steps = self.recorder.steps


class Stream:
    """torch.cuda.Stream: a CPU has one order of things anyway."""

    def wait_stream(self, other):
        pass


def synchronize(device=None):
    if Capture.open:
        raise CaptureError("synchronize in a graph")


@contextmanager
def cuda_graphs():
    """As long as this is open, torch.cuda's streams and graphs work on a CPU."""
    replacements = {
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "current_stream": lambda device=None: Stream(),
        "graph": Capture,
        "synchronize": synchronize,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in replacements.items():
            patch.setattr(torch.cuda, name, replacement)
        yield
