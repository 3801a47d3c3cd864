"""Llama and Qwen in plain PyTorch, with the residual stream as the thing the model exposes.

    H^0 = embedding               A^l = attention write of block l     F^l = MLP write of block l
    resid_mid = H^{l-1} + A^l     H^l = resid_mid + F^l                l = 1 .. L, as in the paper

    model(ids, until=l)        H^l, un-normed, having run blocks 1..l and no other
    model.unembed(h, layer=l)  logits of the internal layer policy pi^l; the final norm is applied
                               at l = L only
    model.stream(ids)          every attn_out, resid_mid, mlp_out, resid_post, one block at a time

Families: llama (with 3.x rope scaling), qwen2 (QKV bias), qwen3 (QK norm), mistral without a
sliding window. Folders are Hugging Face folders on the way in and on the way out.

Simplified on purpose: no dropout, no sliding window, no quantised weights. The query, key and value
matrices are one matrix, and so are gate and up: fewer, larger products. Attention is passed into
the block as a function `attend(layer, q, k, v)`, so that the trainer, the prefill and the decoder
run the same lines.
"""

import difflib
import inspect
import json
import re
import shutil
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import hub

# --------------------------------------------------------------------------------------------------
# names people type -> hub repositories

HUB = {
    **{f"qwen3-{s}": f"Qwen/Qwen3-{s.upper()}" for s in ("0.6b", "1.7b", "4b", "8b", "14b")},
    **{
        f"qwen3-{s}-base": f"Qwen/Qwen3-{s.upper()}-Base"
        for s in ("0.6b", "1.7b", "4b", "8b", "14b")
    },
    **{f"qwen2.5-{s}": f"Qwen/Qwen2.5-{s.upper()}" for s in ("0.5b", "1.5b", "3b", "7b")},
    **{
        f"qwen2.5-{s}-instruct": f"Qwen/Qwen2.5-{s.upper()}-Instruct"
        for s in ("0.5b", "1.5b", "3b", "7b")
    },
    **{f"qwen2.5-math-{s}": f"Qwen/Qwen2.5-Math-{s.upper()}" for s in ("1.5b", "7b")},
    **{
        f"qwen2.5-math-{s}-instruct": f"Qwen/Qwen2.5-Math-{s.upper()}-Instruct"
        for s in ("1.5b", "7b")
    },
    **{f"llama-3.2-{s}": f"meta-llama/Llama-3.2-{s.upper()}" for s in ("1b", "3b")},
    **{
        f"llama-3.2-{s}-instruct": f"meta-llama/Llama-3.2-{s.upper()}-Instruct"
        for s in ("1b", "3b")
    },
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    **{
        f"octothinker-{s}": f"OctoThinker/OctoThinker-{s.upper()}-Hybrid-Base" for s in ("3b", "8b")
    },
    **{
        f"deepseek-r1-distill-qwen-{s}": f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{s.upper()}"
        for s in ("1.5b", "7b")
    },
    **{f"smollm2-{s}": f"HuggingFaceTB/SmolLM2-{s.upper()}" for s in ("135m", "360m", "1.7b")},
    **{
        f"smollm2-{s}-instruct": f"HuggingFaceTB/SmolLM2-{s.upper()}-Instruct"
        for s in ("135m", "360m", "1.7b")
    },
    "mistral-nemo": "mistralai/Mistral-Nemo-Base-2407",
    "mistral-nemo-instruct": "mistralai/Mistral-Nemo-Instruct-2407",
}
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# copied byte for byte beside the weights, so that a saved folder is a whole model
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


# --------------------------------------------------------------------------------------------------
# shapes


@dataclass
class Config:
    """Shape of a model. `from_hf` and `to_hf` translate a Hugging Face config.json; `raw` keeps
    what we do not read, for saving."""

    family: str  # llama | qwen2 | qwen3 | mistral
    vocab_size: int  # V, rows of the embedding; may exceed what the tokenizer uses
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key/value heads; H / K query heads share one
    head_dim: int  # E, independent of D / H
    d_mlp: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # None, or Llama 3.x: factor, low_freq_factor, high_freq_factor,
    # original_max_position_embeddings
    rope_scaling: dict | None = None
    tied: bool = False  # the embedding is also the unembedding
    max_len: int = 2048  # tokens the positions were trained for
    raw: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def qkv_bias(self):
        return self.family == "qwen2"

    @property
    def qk_norm(self):
        return self.family == "qwen3"

    @classmethod
    def from_hf(cls, raw: dict) -> "Config":
        """Read a config.json dict, older (`rope_theta`, `rope_scaling`) or newer
        (`rope_parameters`) style.

        Raises ValueError, in one line that lists everything unsupported or out of range: a setting
        that changes the maths is never ignored.
        """
        wrong = []

        def integer(key, default=None, most=10**7):
            value = raw.get(key, default)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
                wrong.append(f"{key}={value!r:.40} (want a whole number from 1 to {most})")
                return 1
            return value

        def number(source, key, default):
            value = source.get(key, default)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 < value < 1e12
            ):
                wrong.append(f"{key}={value!r:.40} (want a positive number)")
                return 1.0
            return float(value)

        if not isinstance(raw, dict):
            raise ValueError("config.json: not a JSON object")
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(
                f"config.json: model_type {family!r:.40} is not supported; this code reads "
                f"{', '.join(FAMILIES)}"
            )
        D, H = integer("hidden_size", most=65536), integer("num_attention_heads", most=1024)
        K = integer("num_key_value_heads", H, most=1024)
        E = integer("head_dim", 128 if family == "qwen3" else max(D // H, 1), most=1024)
        if H % K:
            wrong.append(f"num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
        if E % 2:
            wrong.append(f"head_dim={E} is odd, rotary positions need pairs")

        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            wrong.append(f"rope settings {rope!r:.40} are not an object")
            rope = {}
        if any(isinstance(v, dict) for v in rope.values()):
            wrong.append("rope settings per layer type")
        kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
        if kind == "llama3":
            keys = (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
            scaling = {key: number(rope, key, None) for key in keys}
            if not wrong and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                wrong.append("low_freq_factor is not below high_freq_factor")
        elif kind != "default":
            wrong.append(f"rope type {kind!r:.40} (supported: default, llama3)")
        theta = number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)

        if raw.get("hidden_act", "silu") != "silu":
            wrong.append(f"hidden_act={raw['hidden_act']!r:.40} (supported: silu)")
        if raw.get("attention_bias"):
            wrong.append("attention_bias=true")
        if raw.get("mlp_bias"):
            wrong.append("mlp_bias=true")
        if any(r.get("partial_rotary_factor", 1) != 1 for r in (raw, rope)):
            wrong.append("partial_rotary_factor")
        if raw.get("quantization_config"):
            wrong.append("quantization_config (load an unquantised checkpoint)")
        # left out, mistral means a window of 4096
        window = raw.get("sliding_window", 4096 if family == "mistral" else None)
        if window is not None and (family == "mistral" or raw.get("use_sliding_window")):
            wrong.append(f"sliding_window={window!r:.40}")
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            wrong.append(f"tie_word_embeddings={tied!r:.40} (want true or false)")
        config = cls(
            family,
            integer("vocab_size"),
            D,
            integer("num_hidden_layers", most=1000),
            H,
            K,
            E,
            integer("intermediate_size", most=10**6),
            number(raw, "rms_norm_eps", 1e-6),
            theta,
            scaling,
            tied,
            integer("max_position_embeddings", 2048, most=10**8),
            dict(raw),
        )
        if wrong:
            raise ValueError("config.json: not supported: " + "; ".join(wrong))
        return config

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict:
        """A config.json dict that stock transformers reads; keys of the original file that we do
        not use are kept."""
        name = str(dtype).removeprefix("torch.")
        out = {
            "architectures": [FAMILIES[self.family]],
            "hidden_act": "silu",
            **self.raw,
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_mlp,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_len,
            "dtype" if "dtype" in self.raw else "torch_dtype": name,
        }
        # both generations of readers understand the older keys
        if "rope_parameters" not in self.raw:
            out["rope_theta"] = self.rope_theta
            if self.rope_scaling:
                out["rope_scaling"] = {"rope_type": "llama3", **self.rope_scaling}
        # left out, its readers assume a window of 4096
        if self.family == "mistral":
            out["sliding_window"] = None
        if isinstance(out.get("layer_types"), list):
            out["layer_types"] = ["full_attention"] * self.n_layers
        return out


# --------------------------------------------------------------------------------------------------
# the model


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32 whatever the dtype of x (Zhang & Sennrich
    2019, arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


def rope(config: Config, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles of positions pos [...]: (cos, sin), each float32 [..., 1, E/2], ready to
    broadcast over heads (arXiv 2104.09864).

    Computed from the configuration on every call, never stored: a buffer would follow the model
    into bfloat16 and lose the positions.
    """
    E = config.head_dim
    # [E/2], radians a token
    freq = 1.0 / config.rope_theta ** (
        torch.arange(0, E, 2, device=pos.device, dtype=torch.float32) / E
    )
    # Llama 3.x: long wavelengths are stretched by `factor`, short ones kept, a ramp between
    if s := config.rope_scaling:
        wavelen = 2 * torch.pi / freq
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((s["original_max_position_embeddings"] / wavelen - low) / (high - low)).clamp(0, 1)
        freq = (1 - keep) * freq / s["factor"] + keep * freq
    angle = pos[..., None].float() * freq
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def rotate(x, cos, sin):
    """Rotate x [..., heads, E]: component i pairs with component i + E/2, as Hugging Face
    checkpoints are laid out."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


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
        rows = grad.reshape(-1, grad.shape[-1])
        dx = linear(grad, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        dw = (
            linear(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t().contiguous())
            if ctx.needs_input_grad[1]
            else None
        )
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, weight, bias=None):
    """F.linear, but in float32 on a CPU by oneDNN in place of MKL: 2 to 4 times faster where it was
    measured (an AMD EPYC), most of all on the few rows of a decode step. Products below a million
    multiplications stay where they are: a call of it takes 10 us. Half-precision weights that are
    trained get float32 gradients."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if half(weight.dtype) and torch.is_grad_enabled() and weight.requires_grad:
        return _HalfLinear.apply(x, weight, bias)
    if (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) > 1 << 20
    ):
        return _OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


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
        rows = grad.reshape(-1, grad.shape[-1])
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dw = mm32(rows.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None


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


def half(dtype) -> bool:
    """Whether a dtype has 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def mm32(a, b):
    """a [M,K] times b [K,N], both half precision, as float32 [M,N]: what the product is summed in.
    No gradient."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # a CPU has no such product; the factors are exact in float32


def add_mm32(total, a, b):
    """total [M,N] += a b, like `mm32` where the factors are half precision."""
    if a.is_cuda and half(a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def forward(self, ids):
        if half(self.weight.dtype) and torch.is_grad_enabled():
            return _HalfEmbedding.apply(ids, self.weight)
        return F.embedding(ids, self.weight)


def causal(layer, q, k, v):
    """The plain `attend`: causal attention over whole sequences, q [B,T,H,E], k and v [B,T,K,E] ->
    [B,T,H,E].

    `layer` is for those that keep keys and values. Right padding needs no mask: no real token looks
    to its right.
    """
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[-3] != k.shape[-3]
    ).transpose(-3, -2)


def has_flash(device, dtype, head_dim):
    """Whether FlashAttention-2 inside torch can serve: half precision on an Ampere GPU or later."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
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


def packed(lengths, device):
    """The `attend` of sequences of these lengths laid end to end, q [T,H,E], k and v [T,K,E]:
    causal inside each, blind to the others.

    By FlashAttention's kernel for just this where it can serve, elsewhere by `causal`, one sequence
    at a time.
    """
    # where all others have one token, the kernel counts an empty sequence among the queries
    lengths = [n for n in lengths if n]
    starts, longest = [0, *accumulate(lengths)], max(lengths)
    offsets = torch.tensor(starts, dtype=torch.int32, device=device)

    def attend(layer, q, k, v):
        if has_flash(q.device, q.dtype, q.shape[-1]):
            return flash(q, k, v, offsets, offsets, longest, longest)
        return torch.cat(
            [
                causal(layer, q[None, a:b], k[None, a:b], v[None, a:b])[0]
                for a, b in pairwise(starts)
            ]
        )

    return attend


class Block(nn.Module):
    """One transformer block. Leading dimensions are free ([B,T] in training, [slots] in decoding);
    `attend` gives them their meaning."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        # layer counts from 1
        self.layer, self.heads = layer, (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        self.E = c.head_dim
        self.attn_norm, self.mlp_norm = (
            RMSNorm(c.d_model, c.norm_eps),
            RMSNorm(c.d_model, c.norm_eps),
        )
        self.qkv = Linear(c.d_model, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity() for _ in range(2)
        )
        self.gate_up = Linear(c.d_model, 2 * c.d_mlp, bias=False)
        self.down = Linear(c.d_mlp, c.d_model, bias=False)

    def split_heads(self, qkv, angles):
        """Queries [..., H, E], keys and values [..., K, E] out of one product, rotated to their
        positions."""
        # of [..., H+2K, E]
        q, k, v = qkv.unflatten(-1, (-1, self.E)).split(self.heads, -2)
        return rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles), v

    def attn_out(self, x, angles, attend):
        """A^l: what attention adds to the residual stream x [..., D]."""
        q, k, v = self.split_heads(self.qkv(self.attn_norm(x)), angles)
        return self.o(attend(self.layer, q, k, v).flatten(-2))

    def gated(self, gate_up):
        """silu(gate) * up: what stands between the two products of a SwiGLU (arXiv 2002.05202)."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def mlp_out(self, x):
        """F^l: what the MLP adds to the residual stream x [..., D]."""
        return self.down(self.gated(self.gate_up(self.mlp_norm(x))))

    def forward(self, x, angles, attend):
        x = x + self.attn_out(x, angles, attend)
        return x + self.mlp_out(x)


def compile_blocks(model):
    """Compile what stands between the products of every block (norms, rotation, gate), once for all
    blocks and all sizes, in place; before `parallel.shard`.

    The products and attention stay as they are: each is one kernel already, and so the gradient of
    a weight keeps its float32.
    """

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
        block.__class__ = Block
        block.attn_norm.__class__ = block.mlp_norm.__class__ = RMSNorm


def compile_errors():
    """The errors that say that something cannot be compiled here, for want of a C compiler or in
    this version of torch."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


# one block's states, each [B,T,D]; a write is exactly what is added: resid_mid == resid_pre +
# attn_out, resid_post == resid_mid + mlp_out
BlockStates = namedtuple("BlockStates", "layer resid_pre attn_out resid_mid mlp_out resid_post")
# the same for all blocks: embed [B,T,D], then lists over blocks whose entry 0 is block 1
Residuals = namedtuple("Residuals", "embed attn_out resid_mid mlp_out resid_post")


class Transformer(nn.Module):
    """A decoder-only language model. `folder` is where its weights came from, or None; with
    `recompute` the backward runs each block again instead of keeping its activations (arXiv
    1604.06174): a third more work, the memory of one block."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.folder, self.recompute = config, None, False
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(1, config.n_layers + 1))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def unembedding(self) -> torch.Tensor:
        """E_u [V,D]; the embedding itself when the two are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def forward(self, ids, until=None, pos=None, attend=causal):
        """Residual stream after block `until`, un-normed.

        ids    token ids [B,T] (any leading shape with another `attend`)
        until  last block to run, 0 (the embedding) .. L; None is L. Later blocks are not run, so
               they get no gradient (None, not zero)
        pos    positions like ids; None counts 0, 1, ... along the last dimension
        returns H^until [B,T,D] in the dtype of the weights
        """
        x, angles = self.embed(ids), self.angles(ids, pos)
        for block in self.blocks[:until]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, attend, use_reentrant=False)
            else:
                x = block(x, angles, attend)
        return x

    def angles(self, ids, pos=None):
        return rope(
            self.config,
            torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
            if pos is None
            else pos,
        )

    def stream(self, ids, until=None, pos=None, attend=causal):
        """Run like `forward` and yield one BlockStates a block, so that the states of a model of
        any depth need the memory of one block."""
        x, angles = self.embed(ids), self.angles(ids, pos)
        for block in self.blocks[:until]:
            attn = block.attn_out(x, angles, attend)
            mid = x + attn
            mlp = block.mlp_out(mid)
            post = mid + mlp
            yield BlockStates(block.layer, x, attn, mid, mlp, post)
            x = post

    def residuals(self, ids) -> Residuals:
        """Every state of the residual stream at once, for small models and for reading: see
        `stream` for large ones."""
        states = list(self.stream(ids))
        return Residuals(
            self.embed(ids), *([getattr(s, name) for s in states] for name in Residuals._fields[1:])
        )

    def final(self, h, layer=None):
        """What the unembedding sees of H^layer: the final norm at layer L (None), the raw state
        below, as the paper defines pi^l."""
        return self.norm(h) if layer is None or layer == self.config.n_layers else h

    def unembed(self, h, layer=None):
        """float32 logits [..., V] of the internal layer policy: H^l E_u^T for l < L, norm(H^L)
        E_u^T for l = L (also None)."""
        return project(self.final(h, layer), self.unembedding)

    @torch.no_grad()
    def init_weights(self, seed=0, std=0.02):
        """Normal(0, std) matrices, biases zero, norms one: for tests, benchmarks and the embedded
        default."""
        g = torch.Generator(self.embed.weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                p.normal_(0, std, generator=g)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)
        return self


def project(h, unembedding):
    """h [..., D] times E_u^T [D, V] as float32 [..., V]: logits are never rounded to bfloat16,
    where a step near 20 is 0.125."""
    # mm32 has no gradient
    if h.is_cuda and half(unembedding.dtype) and not torch.is_grad_enabled():
        rows = h.to(unembedding.dtype).flatten(0, -2)
        return mm32(rows, unembedding.t()).unflatten(0, h.shape[:-1])
    return linear(h.float(), unembedding.float())


# --------------------------------------------------------------------------------------------------
# folders


class CheckpointError(ValueError):
    """Weights, or the state of a training run, are damaged, incomplete, or do not fit what they are
    loaded into. One line."""

    exit_code = 4


def one_line(parts) -> str:
    """What is wrong, in one line of bounded length: names come out of files, they may hold
    anything."""
    return " ".join("; ".join(parts).split())[:4000]


def hf_tensors(c: Config) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name -> (our parameter, first row, rows) for every tensor of a checkpoint; rows
    are along dimension 0."""
    HE, KE = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    out = {"model.embed_tokens.weight": ("embed.weight", 0, c.vocab_size)}
    for i in range(c.n_layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            for proj, row, rows in (("q", 0, HE), ("k", HE, KE), ("v", HE + KE, KE)):
                out[f"{theirs}self_attn.{proj}_proj.{kind}"] = (f"{ours}qkv.{kind}", row, rows)
        if c.qk_norm:
            for n in "qk":
                out[f"{theirs}self_attn.{n}_norm.weight"] = (
                    f"{ours}{n}_norm.weight",
                    0,
                    c.head_dim,
                )
        out[f"{theirs}self_attn.o_proj.weight"] = (f"{ours}o.weight", 0, c.d_model)
        out[f"{theirs}mlp.gate_proj.weight"] = (f"{ours}gate_up.weight", 0, c.d_mlp)
        out[f"{theirs}mlp.up_proj.weight"] = (f"{ours}gate_up.weight", c.d_mlp, c.d_mlp)
        out[f"{theirs}mlp.down_proj.weight"] = (f"{ours}down.weight", 0, c.d_model)
        out[f"{theirs}input_layernorm.weight"] = (f"{ours}attn_norm.weight", 0, c.d_model)
        out[f"{theirs}post_attention_layernorm.weight"] = (f"{ours}mlp_norm.weight", 0, c.d_model)
    out["model.norm.weight"] = ("norm.weight", 0, c.d_model)
    if not c.tied:
        out["lm_head.weight"] = ("head.weight", 0, c.vocab_size)
    return out


def repository(name: str) -> str:
    """OWNER/NAME on the hub, of a preset or of such a name itself; FileNotFoundError, in one line,
    for what is neither."""
    repo = HUB.get(name.lower(), name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) and not name.startswith((".", "/")):
        return repo
    near = difflib.get_close_matches(name.lower(), HUB, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(
        f"{name}: no such folder, and no preset of that name; {guess}A model of the hub is named "
        f"OWNER/NAME, and must be of the families {', '.join(FAMILIES)}; presets: {', '.join(HUB)}"
    )


def resolve(name_or_folder, revision=None) -> Path:
    """Folder of a model: a path as it is (no network), a preset of HUB or an `owner/name`, from the
    hub's cache if that has it, else downloaded.

    revision: a branch, tag or commit of the hub's repository; `hub.commit(folder)` says which
    commit came. Raises FileNotFoundError with one line: the repository, the cache and the ways out;
    CheckpointError for a damaged file in the cache. Weights are compared with their hash once, all
    other files every time.
    """
    path, name = Path(name_or_folder), str(name_or_folder)
    if path.is_dir():
        if revision:
            raise ValueError(f"{name} is a folder: only a model from the hub has revisions")
        return path
    repo = repository(name)
    patterns = ["config.json", "model*.safetensors*", *TOKENIZER_FILES]
    try:
        folder = hub.snapshot(repo, revision, patterns, _has_files)
    except hub.HubError as e:
        raise FileNotFoundError(f"{name}: {e}") from None
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    try:
        for file in files:
            hub.check(file, once=file.suffix == ".safetensors")
    except hub.HubError as e:
        raise CheckpointError(str(e)) from None
    return folder


def _has_files(folder: Path) -> bool:
    """Whether a folder of the hub's cache has the files that no model can do without."""
    try:
        files = _shard_files(folder)
    except ValueError:
        # a damaged list of weights: no reason to ask the hub, `hub.check` says what to do
        return True
    return all(f.exists() for f in [folder / "config.json", folder / "tokenizer.json", *files])


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError or FileNotFoundError with the path in one line."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")  # a pipe would keep us waiting for ever
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as JSON ({str(e)[:80]})") from None
    if not isinstance(out, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return out


def _shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    names = sorted({str(n) for n in names.values()}) if isinstance(names, dict) else []
    if not names:
        raise CheckpointError(f"{index}: no weight_map")
    # a name, not a path: an index from the internet must not reach outside its folder (links of the
    # hub's cache stay allowed)
    if bad := [n for n in names if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", n)]:
        raise CheckpointError(f"{index}: shard names must be plain file names, not {bad[0]!r:.80}")
    return [folder / n for n in names]


def _shards(folder: Path) -> list[Path]:
    files = _shard_files(folder)
    if missing := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(
            f"{folder}: missing weight files: {', '.join(missing):.4000}; {hub.again(folder)}"
        )
    return files


def load(name_or_folder, dtype=torch.float32, device="cpu") -> Transformer:
    """Build a Transformer from a folder, a preset name or a hub id.

    Headers are checked first: every name and shape must be the one the configuration implies, and
    one CheckpointError lists all that is wrong before any memory is taken. Then tensors are
    streamed, one at a time, into parameters already on `device`: the peak is the model plus its
    largest tensor. A tied checkpoint may carry an `lm_head.weight` if it equals the embedding.
    """
    folder = resolve(name_or_folder)
    config = Config.from_hf(read_json(folder / "config.json"))
    wanted, found, wrong = hf_tensors(config), {}, []
    with torch.device("meta"):
        model = Transformer(config)
    params = dict(model.named_parameters())
    handles = []
    for path in _shards(folder):
        try:
            handles.append(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({one_line([str(e)]):.100}); "
                f"{hub.again(path)}"
            ) from None
        for name in handles[-1].keys():
            view = handles[-1].get_slice(name)
            if name in found:
                wrong.append(f"{name} stands in two shards")
            found[name] = handles[-1]
            if view.get_dtype() not in ("F32", "F16", "BF16"):
                wrong.append(f"{name} is {view.get_dtype()}, want F32, F16 or BF16")
            if name in wanted or (name == "lm_head.weight" and config.tied):
                ours, _, rows = wanted.get(name, wanted["model.embed_tokens.weight"])
                shape = [rows, *params[ours].shape[1:]]
                if view.get_shape() != shape:
                    wrong.append(f"{name} is {view.get_shape()}, want {shape}")
            elif not name.endswith("rotary_emb.inv_freq"):
                wrong.append(f"{name} is not part of a {config.family} model")
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {one_line(wrong[:20])}{more}"
        )
    model = model.to(dtype).to_empty(device=device)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, (ours, row, rows) in wanted.items():
            tensor = found[name].get_tensor(name)
            # the extremes carry every NaN and Inf, and unlike isfinite() take no memory beside the
            # tensor
            if not all(x.isfinite() for x in tensor.aminmax()):
                wrong.append(f"{name} holds NaN or Inf")
            params[ours][row : row + rows].copy_(tensor)
            del tensor  # before the next is fetched
        if config.tied and "lm_head.weight" in found:
            head, embed = (
                found[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
            )
            if not torch.equal(head, embed):
                wrong.append(
                    "tie_word_embeddings is true but lm_head.weight differs from the embedding"
                )
    if wrong:
        raise CheckpointError(f"{folder}: " + "; ".join(wrong[:20]))
    model.folder = folder
    return model


@torch.no_grad()
def save(model: Transformer, folder, tokenizer_from=None, dtype=None, shard_bytes=4 << 30) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors (or shards and their index), the
    tokenizer's files of `tokenizer_from`.

    dtype        of the written weights; None keeps the model's
    shard_bytes  at most this much in a file, and in memory at once beside the model
    """
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    params, dtype = dict(model.named_parameters()), dtype or model.embed.weight.dtype
    pieces = {
        name: params[ours][row : row + rows] for name, (ours, row, rows) in hf_tensors(c).items()
    }
    size = {name: piece.numel() * dtype.itemsize for name, piece in pieces.items()}
    shards = [[]]
    for name in pieces:
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    files = (
        [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        if n > 1
        else ["model.safetensors"]
    )
    for file, names in zip(files, shards, strict=True):
        save_file(
            {n: pieces[n].to(dtype=dtype, device="cpu", copy=True) for n in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        files.append("model.safetensors.index.json")
        (folder / files[-1]).write_text(json.dumps(index, indent=1))
    # weights of an earlier save, split otherwise, would be read in place of these
    for old in folder.glob("model*.safetensors*"):
        if (
            re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
            and old.name not in files
        ):
            old.unlink()
    (folder / "config.json").write_text(json.dumps(c.to_hf(dtype), indent=2) + "\n")
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    return folder
