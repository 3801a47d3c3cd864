"""Llama and Qwen in plain PyTorch, with the residual stream as the thing the model exposes.

    H^0 = embedding               A^l = attention write of block l     F^l = MLP write of block l
    resid_mid = H^{l-1} + A^l     H^l = resid_mid + F^l                l = 1 .. L (arXiv 2512.19673)

    model(ids, until=l)        H^l, un-normed, having run blocks 1..l and no other
    model.unembed(h, layer=l)  logits of the internal layer policy pi^l; the final norm is applied
                               at l = L only
    model.stream(ids)          every attn_out, resid_mid, mlp_out, resid_post, one block at a time

Shapes: B sequences of T tokens, D wide; H query heads and K key/value heads of E numbers each; V
tokens in the vocabulary; L blocks. E_u [V,D] is the unembedding, H^l a state, F^l an MLP's write.

Families: llama (with 3.x rope scaling), qwen2 (QKV bias), qwen3 (QK norm), mistral without a
sliding window; no dropout, no quantised weights. Query, key and value are one matrix, and so are
gate and up. Attention is a function handed to the block, `attend(layer, q, k, v)`, so that the
trainer, the prefill and the decoder run the same lines. Weights come and go by plumbing/hub.py.
"""

from collections import namedtuple
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing import kernels


@dataclass
class Config:
    """Shape of a model; plumbing/hub.py translates Hugging Face's config.json."""

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
    rope_scaling: dict | None = None  # of Llama 3.x, by its four names in config.json
    tied: bool = False  # the embedding is also the unembedding
    max_len: int = 2048  # tokens the positions were trained for
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as it was

    @property
    def qkv_bias(self):
        return self.family == "qwen2"

    @property
    def qk_norm(self):
        return self.family == "qwen3"


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32 for every dtype of x (arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        mean_square = x32.square().mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(mean_square + self.eps)
        x32 = x32 * inverse_rms
        return self.weight * x32.to(x.dtype)


class Linear(nn.Linear):
    """x W^T + b, as nn.Linear, but faster in float32 on a CPU, and gradients of half-precision
    weights come in float32."""

    def forward(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """As nn.Embedding, but a half-precision table's gradient comes in float32."""

    def forward(self, ids):
        return kernels.embedding(ids, self.weight)


class Block(nn.Module):
    """One transformer block. Leading dimensions are free ([B,T] in training, [slots] in decoding);
    `attend(layer, q, k, v)` gives them their meaning: queries [..., H, E], keys and values
    [..., K, E] -> [..., H, E]. See `causal`."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer  # counts from 1
        self.head_dim = c.head_dim
        self.head_counts = c.n_heads, c.n_kv_heads, c.n_kv_heads
        # in this order: a gradient's norm is summed in it, and runs repeat bit for bit
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = Linear(c.d_model, sum(self.head_counts) * c.head_dim, bias=c.qkv_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.gate_up = Linear(c.d_model, 2 * c.d_mlp, bias=False)
        self.down = Linear(c.d_mlp, c.d_model, bias=False)

    def forward(self, x, cos_sin, attend):
        x = x + self.attn_out(x, cos_sin, attend)
        return x + self.mlp_out(x)

    def attn_out(self, x, cos_sin, attend):
        """A^l: what attention adds to the residual stream x [..., D]."""
        q, k, v = self.split_heads(self.qkv(self.attn_norm(x)), cos_sin)
        mixed = attend(self.layer, q, k, v)
        return self.o(mixed.flatten(-2))

    def split_heads(self, qkv, cos_sin):
        """Queries [..., H, E], keys and values [..., K, E] out of one product, rotated to their
        positions."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.head_counts, -2)
        q = rotate(self.q_norm(q), *cos_sin)
        k = rotate(self.k_norm(k), *cos_sin)
        return q, k, v

    def mlp_out(self, x):
        """F^l: what the MLP adds to the residual stream x [..., D]."""
        # nested, for a name would keep [..., 2 d_mlp], the widest there is, in memory to the end
        return self.down(self.gated(self.gate_up(self.mlp_norm(x))))

    def gated(self, gate_up):
        """silu(gate) * up: what stands between the two products of a SwiGLU (arXiv 2002.05202)."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


def rope(config: Config, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cos_sin of positions [...]: (cos, sin), each float32 [..., 1, E/2], ready to broadcast
    over heads (arXiv 2104.09864).

    Computed from the configuration on every call, never stored: a buffer would follow the model
    into bfloat16 and lose the positions.
    """
    E = config.head_dim
    even = torch.arange(0, E, 2, device=position.device, dtype=torch.float32)
    freq = 1.0 / config.rope_theta ** (even / E)  # [E/2], radians a token
    # Llama 3.x: long wavelengths are stretched by `factor`, short ones kept, a ramp between
    if s := config.rope_scaling:
        wavelen = 2 * torch.pi / freq
        turns = s["original_max_position_embeddings"] / wavelen  # in the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        ramp = (turns - low) / (high - low)
        keep = ramp.clamp(0, 1)
        freq = (1 - keep) * freq / s["factor"] + keep * freq
    angle = position[..., None].float() * freq
    angle = angle.unsqueeze(-2)  # the same for all heads
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate x [..., heads, E]: component i pairs with component i + E/2, as Hugging Face
    checkpoints are laid out."""
    a, b = x.float().chunk(2, -1)
    both = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return both.to(x.dtype)


def causal(layer, q, k, v):
    """The plain `attend`: causal attention over whole sequences, q [B,T,H,E], k and v [B,T,K,E] ->
    [B,T,H,E].

    `layer` is for those that keep keys and values. Right padding needs no mask: no real token looks
    to its right.
    """
    q = q.transpose(-3, -2)
    k = k.transpose(-3, -2)
    v = v.transpose(-3, -2)
    grouped = q.shape[-3] != k.shape[-3]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(-3, -2)


def packed(lengths, device):
    """The `attend` of sequences of these lengths laid end to end, q [T,H,E], k and v [T,K,E]:
    causal inside each, blind to the others.

    By FlashAttention's kernel for just this where it can serve, elsewhere by `causal`, one sequence
    at a time.
    """
    # the kernel miscounts queries where some sequences are empty
    lengths = [n for n in lengths if n]
    starts = [0, *accumulate(lengths)]
    longest = max(lengths)
    offsets = torch.tensor(starts, dtype=torch.int32, device=device)

    def attend(layer, q, k, v):
        if kernels.has_flash(q.device, q.dtype, q.shape[-1]):
            return kernels.flash(q, k, v, offsets, offsets, longest, longest)
        parts = []
        for a, b in pairwise(starts):
            one = (t[None, a:b] for t in (q, k, v))
            parts.append(causal(layer, *one)[0])
        return torch.cat(parts)

    return attend


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
        self.config = config
        self.folder = None
        self.recompute = False
        self.embed = Embedding(config.vocab_size, config.d_model)
        layers = range(1, config.n_layers + 1)
        self.blocks = nn.ModuleList(Block(config, l) for l in layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            # its weight alone is used, see `project`
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def unembedding(self) -> torch.Tensor:
        """E_u [V,D]; the embedding itself when the two are tied."""
        if self.config.tied:
            return self.embed.weight
        return self.head.weight

    def forward(self, ids, until=None, position=None, attend=causal):
        """Residual stream after block `until`, un-normed.

        ids       token ids [B,T] (any leading shape with another `attend`)
        until     last block to run, 0 (the embedding) .. L; None is L. Later blocks are not run, so
                  they get no gradient (None, not zero)
        position  like ids; None counts 0, 1, ... along the last dimension
        returns   H^until [B,T,D] in the dtype of the weights
        """
        x = self.embed(ids)
        cos_sin = self.cos_sin(ids, position)
        for block in self.blocks[:until]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos_sin, attend, use_reentrant=False)
            else:
                x = block(x, cos_sin, attend)
        return x

    def cos_sin(self, ids, position=None):
        if position is None:
            position = torch.arange(ids.shape[-1], device=ids.device)
            position = position.expand(ids.shape)
        return rope(self.config, position)

    def stream(self, ids, until=None, position=None, attend=causal):
        """Run like `forward` and yield one BlockStates a block, so that the states of a model of
        any depth need the memory of one block."""
        x = self.embed(ids)
        cos_sin = self.cos_sin(ids, position)
        for block in self.blocks[:until]:
            attn = block.attn_out(x, cos_sin, attend)
            mid = x + attn
            mlp = block.mlp_out(mid)
            post = mid + mlp
            yield BlockStates(block.layer, x, attn, mid, mlp, post)
            x = post

    def residuals(self, ids) -> Residuals:
        """Every state of the residual stream at once, for small models and for reading: see
        `stream` for large ones."""
        blocks = list(self.stream(ids))
        return Residuals(
            self.embed(ids),
            [block.attn_out for block in blocks],
            [block.resid_mid for block in blocks],
            [block.mlp_out for block in blocks],
            [block.resid_post for block in blocks],
        )

    def norm_at(self, h, layer=None):
        """What the unembedding sees of H^layer: the final norm at layer L (None), the raw state
        below, as the paper defines pi^l."""
        if layer is None or layer == self.config.n_layers:
            return self.norm(h)
        return h

    def unembed(self, h, layer=None):
        """float32 logits [..., V] of the internal layer policy: H^l E_u^T for l < L, norm(H^L)
        E_u^T for l = L (also None)."""
        return project(self.norm_at(h, layer), self.unembedding)

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
    is_half = kernels.is_half(unembedding.dtype)
    if h.is_cuda and is_half and not torch.is_grad_enabled():  # one product, summed in float32
        rows = h.to(unembedding.dtype).flatten(0, -2)
        logits = kernels.mm32(rows, unembedding.t())
        return logits.unflatten(0, h.shape[:-1])
    return kernels.linear(h.float(), unembedding.float())
