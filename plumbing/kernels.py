"""What makes a product or an attention fast on a machine: each behind a plain function, none of it
needed to understand the model.

    linear, embedding    F.linear and F.embedding; float32 on a CPU by oneDNN, and half-precision
                         weights with float32 gradients
    mm32, add_mm32       products of half-precision factors that stay in float32
    flash                FlashAttention-2 inside torch, over packed sequences, where `has_flash`
    compile_blocks       what stands between the products of a block, compiled in place
    regions              blocks that a compiled decode step compiles once for all layers
"""

import copy
import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def is_half(dtype) -> bool:
    """Whether a dtype has 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def flat(x):
    """x [..., D] as rows [N, D]."""
    return x.reshape(-1, x.shape[-1])


def mm32(a, b):
    """a [M,K] times b [K,N], both half precision, as float32 [M,N]: what the product is summed in.
    No gradient."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # a CPU has no such product; the factors are exact in float32


def add_mm32(total, a, b):
    """total [M,N] += a b, like `mm32` where the factors are half precision."""
    if a.is_cuda and is_half(a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, weight, bias=None):
    """F.linear, but in float32 on a CPU by oneDNN in place of MKL: 2 to 4 times faster where it was
    measured (an AMD EPYC), most of all on the few rows of a decode step. Products below a million
    multiplications stay where they are: a call of it takes 10 us. Half-precision weights that are
    trained get float32 gradients."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if is_half(weight.dtype) and torch.is_grad_enabled() and weight.requires_grad:
        return _HalfLinear.apply(x, weight, bias)
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if ONEDNN and float32_on_cpu and x.numel() * len(weight) > 1 << 20:
        return _OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _OneDNN(torch.autograd.Function):
    """x [..., D] times weight [N, D] transposed, plus bias, by an operator that torch has for its
    compiler and that has no gradient there. Both gradients are products of the same form, for which
    the operator wants its factors laid out row by row."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = flat(grad)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = linear(grad, weight.t().contiguous())
        if ctx.needs_input_grad[1]:
            dw = linear(rows.t().contiguous(), flat(x).t().contiguous())
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


class _HalfLinear(torch.autograd.Function):
    """F.linear of half-precision weights whose gradient is never rounded to half precision: a
    product of bfloat16 factors is summed in float32 anyway, and here the sum stays so. Where the
    parameter's `grad_dtype` is float32 (see SplitAdamW) the gradient of a mini-batch then does not
    depend on how it is split."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = flat(grad)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ weight
        if ctx.needs_input_grad[1]:
            dw = mm32(rows.t(), flat(x))
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=torch.float32)
        return dx, dw, db


def embedding(ids, table):
    """F.embedding; a half-precision table that is trained gets a float32 gradient."""
    if is_half(table.dtype) and torch.is_grad_enabled():
        return _HalfEmbedding.apply(ids, table)
    return F.embedding(ids, table)


class _HalfEmbedding(torch.autograd.Function):
    """F.embedding of a half-precision table with a float32 gradient: a token's occurrences are
    summed unrounded."""

    @staticmethod
    def forward(ctx, ids, table):
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grad.float(), ids, ctx.rows, -1, False)


def has_flash(device, dtype, head_dim):
    """Whether FlashAttention-2 inside torch can serve: half precision on an Ampere GPU or later."""
    return (
        device.type == "cuda"
        and is_half(dtype)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


@cache
def public_kernel():
    """torch's varlen_attn where it takes the live length of every row, from torch 2.12; None
    before, when only the operator behind it does. Imported when it is needed: it brings the whole
    compiler along, which takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in inspect.signature(varlen_attn).parameters else None


def splits(rows):
    """Into how many parts decoding cuts the keys of each of `rows` (sequences x key heads); None:
    the kernel decides.

    By itself the kernel cuts only where rows are fewer than a GPU's processors (132 on an H100 or
    H200). But the rows of a batch differ in length, and the longest end alone: some 16 pieces a
    processor spread better. Estimated, not measured.
    """
    return max(1, 2048 // rows) if rows >= 128 else None


def flash(q, k, v, q_starts, k_starts, max_q, max_k, used=None, parts=None):
    """FlashAttention-2 over sequences packed along dimension 0; causal, unless every sequence has
    one query.

    q [T,H,E], k and v [T',K,E]; *_starts int32 [n+1], where each sequence begins; used int32 [n],
    how many keys of each are live; parts, into how many the keys of each are cut, where the kernel
    lets its caller choose (from torch 2.12): see `splits`.
    """
    ordered = max_q > 1
    if varlen_attn := public_kernel():
        # tokens seen to the left and to the right, -1 is all
        window = -1, 0 if ordered else -1
        return varlen_attn(
            q,
            k,
            v,
            q_starts,
            k_starts,
            max_q,
            max_k,
            window_size=window,
            seqused_k=used,
            enable_gqa=True,
            num_splits=parts,
        )
    return torch.ops.aten._flash_attention_forward(
        q, k, v, q_starts, k_starts, max_q, max_k, 0.0, ordered, False, seqused_k=used
    )[0]


def compile_blocks(model):
    """Compile what stands between the products of every block (norms, rotation, gate), once for all
    blocks and all sizes, in place; before `parallel.shard`.

    The products and attention stay as they are: each is one kernel already, and so the gradient of
    a weight keeps its float32.
    """

    Block, RMSNorm = type(model.blocks[0]), type(model.norm)

    class CompiledNorm(RMSNorm):
        forward = torch.compile(RMSNorm.forward, dynamic=True)

    class CompiledBlock(Block):
        split_heads = torch.compile(Block.split_heads, dynamic=True)
        gated = torch.compile(Block.gated, dynamic=True)

    for block in model.blocks:
        block.__class__ = CompiledBlock
        block.attn_norm.__class__ = block.mlp_norm.__class__ = CompiledNorm


def plain_blocks(model):
    """Take back what `compile_blocks` did."""
    for block in model.blocks:
        block.__class__ = type(block).__base__
        block.attn_norm.__class__ = block.mlp_norm.__class__ = type(model.norm)


def compile_errors():
    """The errors that say that something cannot be compiled here, for want of a C compiler or in
    this version of torch."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


@cache
def region(Block):
    """A class of blocks that are compiled once for all layers: half the compile time of a deep
    model, and the same speed."""

    class Region(Block):
        @torch.compiler.nested_compile_region
        def forward(self, x, angles, attend):
            return Block.forward(self, x, angles, attend)

    return Region


def regions(model):
    """The same parameters in blocks that a compiled step compiles once for all layers."""
    # before torch 2.12 a region that writes into a cache is untried
    if not public_kernel():
        return model
    net = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in net.blocks:
        block.__class__ = region(type(block))
    return net


def compiled_graphs():
    """Graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def cuda_graph(step):
    """A recording of step(): a replay is one launch in place of some ten a layer. The plain twin is
    `step` itself."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # makes the libraries' handles before recording
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
