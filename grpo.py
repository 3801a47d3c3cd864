"""GRPO: group advantages, token log-probs that never hold [tokens, V], the clipped surrogate loss.

    advantage   A_i = (r_i - mean(r)) / (std(r) + 1e-6)      over the G responses of one prompt
    ratio       rho_t = pi(o_t) / pi_old(o_t)
    loss        - sum_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) / N
                N = response tokens of the whole mini-batch

GRPO is arXiv 2402.03300, the token mean and the asymmetric clip arXiv 2503.14476 (DAPO), the dual
clip arXiv 1912.09729. Nothing here knows which policy the log-probs come from: that of the model,
or that of an internal layer (bupo.py).

The value of the loss says nothing, its gradient does. While the ratio is 1 the token mean is -
sum_i len_i A_i / sum_i len_i over the responses i of a mini-batch: 0 only where length does not go
with reward. Watch the reward.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from model import packed, project
from plumbing.kernels import add_mm32, half


def group_advantages(rewards: torch.Tensor, kind="grpo", eps=1e-6) -> torch.Tensor:
    """Advantages [N,G] of rewards [N,G], G responses to each of N problems.

    grpo         (r - mean) / (std + eps) over the group, sample deviation (arXiv 2402.03300)
    dr_grpo      r - mean: the division weighs easy and hard problems up (arXiv 2503.20783)
    rloo         r - mean of the other G - 1 responses (arXiv 2402.14740)
    reinforce++  (r - mean) / (std + eps) over the whole batch (arXiv 2501.03262)

    Where all rewards compared are equal the advantage is exactly 0: in float32 the mean of seven
    0.7 is not 0.7, and eps would not hide it. Raises ValueError for groups of one, which would have
    no baseline.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [prompts, group] with groups of at least 2, not {list(rewards.shape)}"
        )
    if kind == "reinforce++":
        return group_advantages(rewards.reshape(1, -1), "grpo", eps).view_as(rewards)
    centred, G = rewards - rewards.mean(1, keepdim=True), rewards.shape[1]
    scales = {
        "grpo": 1 / (rewards.std(1, keepdim=True) + eps),
        "dr_grpo": 1.0,
        "rloo": G / (G - 1),
    }
    return (centred * scales[kind]).masked_fill(
        (rewards == rewards[:, :1]).all(1, keepdim=True), 0.0
    )


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """What DAPO (arXiv 2503.14476) adds to the reward of a long response: 0 up to limit - buffer
    tokens, then down to -1 at the limit."""
    return min(0.0, max(-1.0, (limit - buffer - length) / buffer))


# the logit of an id that is no token: its probability is 0, and 0 times it is a number
NOWHERE = -1e30


def _rows(E, n_vocab):
    """The rows of E_u whose logits are computed. In half precision all of them, for fast kernels
    refuse an odd number such as the 151,669 tokens of Qwen3; `_logits` masks the rest."""
    return E if half(E.dtype) else E[:n_vocab]


def _logits(h, E, temperature, n_vocab):
    """float32 logits / T of the rows of E, those from n_vocab on masked."""
    z = project(h, E)
    z[:, n_vocab:] = NOWHERE
    return z if temperature == 1 else z.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Logits of one chunk at a time, forward and again backward: peak memory is a chunk, not [M,V],
    for a third more head FLOPs."""

    @staticmethod
    def forward(ctx, h, E, targets, temperature, n_vocab, chunk):
        logp, entropy, lse = (torch.empty(len(h), device=h.device) for _ in range(3))
        rows = _rows(E, n_vocab)
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            # [chunk, V] float32
            z = _logits(h[part], rows, temperature, n_vocab)
            top = z.amax(-1, keepdim=True)
            own = (z.gather(1, targets[part, None]) - top)[:, 0]
            e = z.sub_(top).exp()
            total = e.sum(-1)
            lse[part] = top[:, 0] + total.log()
            logp[part] = own - total.log()
            # - sum p ln p, nothing large subtracted
            entropy[part] = total.log() - e.mul_(z).sum(-1) / total
            # before the next chunk takes its memory
            del z, e
        ctx.save_for_backward(h, E, targets, lse)
        ctx.rest = temperature, n_vocab, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, E, targets, lse = ctx.saved_tensors
        temperature, n_vocab, chunk = ctx.rest
        dh = torch.empty_like(h)
        rows = _rows(E, n_vocab)
        # float32 for half-precision weights too, see model.mm32
        dE = torch.zeros_like(E, dtype=torch.float32)
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            slope = grad[part, None] / temperature
            dz = _logits(h[part], rows, temperature, n_vocab)
            # - softmax
            dz.sub_(lse[part, None]).exp_().mul_(-slope)
            # + one-hot
            dz.scatter_add_(1, targets[part, None], slope)
            dz = dz.to(E.dtype)
            dh[part] = dz @ rows
            add_mm32(dE[: len(rows)], dz.t(), h[part])
            del dz
        return dh, dE, None, None, None, None


def token_logprobs(h, unembedding, targets, temperature=1.0, n_vocab=None, chunk=256):
    """log softmax(h E_u^T / T)[target] and the entropy of that softmax, without ever holding [M,V].

    h            [M,D] states at the positions that produced the targets, selected (and at layer L
                 normed) by the caller
    unembedding  [V,D]
    targets      [M] token ids
    temperature  divides the logits, as in sampling
    n_vocab      rows from here on belong to no token and are left out of the softmax, as in
                 sampling; None keeps all V
    chunk        rows of logits held at once: chunk * V * 4 bytes, twice
    returns      (logprobs [M], entropy [M]), float32, in nats; the entropy carries no gradient
    """
    return _TokenLogprobs.apply(
        h, unembedding, targets, temperature, n_vocab or len(unembedding), chunk
    )


def policy_loss(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=10.0):
    """The clipped surrogate, one value a token (a loss: minimise it): -min(rho A, clip(rho, 1 -
    low, 1 + high) A).

    logprobs, old_logprobs, advantages   [M], the advantage of a token being that of its response
    dual_clip    for A < 0 the loss is also at most dual_clip * |A|: no token whose ratio exploded
                 owns the step; None: off
    returns      (loss [M], low [M], high [M]): low and high mark the tokens the clip has silenced
                 below and above
    The log-ratio is held within +-20, so that exp never overflows.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    silenced = clipped > plain
    return loss, silenced & (advantages < 0), silenced & (advantages > 0)


def kl_to_reference(logprobs, reference):
    """The k3 estimate of KL(pi || pi_ref) at sampled tokens, nats: exp(d) - 1 - d with d = log
    pi_ref - log pi; never negative.

    Schulman's "Approximating KL divergence". As in the reference the estimate is at most 10, where
    its gradient ends: no token pulls with more than exp(2.6) - 1 = 12.5.
    """
    d = (reference - logprobs).clamp(-20, 20)
    # expm1: exp(d) - 1 would round a small d's estimate below 0
    return (d.expm1() - d).clamp(max=10)


def response_weights(lengths: list[int], kind="token-mean", limit=None) -> list[float]:
    """Weight of each token of each response in the loss of a mini-batch of R responses with these
    many tokens.

    token-mean  1 / sum(lengths): every token counts the same (DAPO, arXiv 2503.14476)
    seq-mean    1 / (R length): every response counts the same, tokens of long ones less (GRPO as
                published, arXiv 2402.03300)
    dr_grpo     1 / (R limit), a constant: no length decides what a token counts (arXiv 2503.20783)
    """
    R = len(lengths)
    if kind == "token-mean":
        return [1 / max(sum(lengths), 1)] * R
    return [1 / (R * (limit if kind == "dr_grpo" else max(n, 1))) for n in lengths]


# --------------------------------------------------------------------------------------------------
# batches


@dataclass
class Response:
    """One sampled response and all that belongs to it, in one record, so that no reward ever meets
    another prompt's tokens."""

    prompt: list[int]  # token ids
    # response token ids as sampled, the stop token included: it is trained like any other
    ids: list[int]
    sampler_logprobs: list[float]  # of the model's own policy, when sampled
    advantage: float = 0.0
    # [len(ids)], of the policy that is trained, before the step's first update
    old_logprobs: torch.Tensor | None = None
    # [len(ids)], of the same layer's policy of the frozen reference, with a KL term only
    ref_logprobs: torch.Tensor | None = None


@dataclass
class Batch:
    """Right-padded responses [B,T], or packed ones: end to end [T]. `at` picks, from all positions,
    those whose policy produced the response tokens, in order."""

    # [B,T] or [T]; what stands right of a padded response is never looked at
    ids: torch.Tensor
    # [M] flat positions: a response token sits one to the right of the state that produced it
    at: torch.Tensor
    targets: torch.Tensor  # [M] the response tokens
    advantages: torch.Tensor  # [M]
    lengths: list[int]  # response tokens of each row, sum = M
    # what Transformer.forward needs beside the ids: nothing, or of packed ones `pos` and `attend`
    forward: dict


def collate(responses: list[Response], device="cpu", pack=False) -> Batch:
    """Pad or pack responses to one Batch. Positions come from lengths, never from comparing ids, so
    a stop or pad id in the text is harmless."""
    rows, lengths = (
        [torch.tensor(r.prompt + r.ids) for r in responses],
        [len(r.ids) for r in responses],
    )
    ids = torch.cat(rows) if pack else pad_sequence(rows, batch_first=True)
    # of the rows, in all positions
    starts = [0, *accumulate(map(len, rows[:-1]))] if pack else range(0, ids.numel(), ids.shape[1])
    at = torch.cat(
        [
            torch.arange(n) + start + len(r.prompt) - 1
            for r, n, start in zip(responses, lengths, starts, strict=True)
        ]
    )
    advantages = torch.tensor([r.advantage for r in responses]).repeat_interleave(
        torch.tensor(lengths)
    )
    forward = {}
    if pack:
        forward = {
            "position": torch.cat([torch.arange(len(row)) for row in rows]).to(device),
            "attend": packed([*map(len, rows)], device),
        }
    return Batch(
        *(t.to(device) for t in (ids, at, ids.flatten()[at + 1], advantages)), lengths, forward
    )


def micro_batches(responses: list[Response], max_tokens: int, pack=False) -> list[list[Response]]:
    """Cut responses into lists of at most max_tokens tokens, counted padded (rows x longest) or
    packed; longest first, so that padding is small and an out-of-memory shows at the first one. A
    response longer than max_tokens gets a list of its own."""
    out, room = [], 0
    for r in sorted(responses, key=lambda r: -(len(r.prompt) + len(r.ids))):
        n = len(r.prompt) + len(r.ids)
        if pack or not out:
            size = n  # padded: as wide as the first of its list
        if size > room:
            out.append([])
            size, room = n, max_tokens
        out[-1].append(r)
        room -= size
    return out
