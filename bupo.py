"""Bottom-up Policy Optimization (arXiv 2512.19673): GRPO on an internal layer policy for the first
steps, then on the whole model.

    pi^l = softmax(H^l E_u^T / T)              the internal layer policy: no norm for l < L
    pi^L = softmax(norm(H^L) E_u^T / T)        the model's own policy

Responses are always sampled from pi^L. In an internal phase the old and the new log-probs both come
from pi^l, the ratio is pi^l / pi^l_old, and the forward stops at block l: the blocks above are
never run, their gradients are None, and an optimizer leaves them and their moments alone. There is
one code path, and GRPO is that path at l = L.
"""

from dataclasses import dataclass

import torch

from grpo import (
    Batch,
    Response,
    collate,
    kl_to_reference,
    micro_batches,
    policy_loss,
    response_weights,
    token_logprobs,
)
from plumbing import kernels, parallel

# what a rank runs while others still have micro-batches: see parallel.in_step
IDLE = [Response([0], [0], [0.0])]


@dataclass(frozen=True)
class Schedule:
    """Which layer's policy is trained at which step: phases of (layer, last step), bottom up, then
    the whole model.

    A pure function of the step, so that a resumed run cannot be in another phase than the one that
    stopped.
    """

    phases: tuple[tuple[int, int], ...]  # (layer, last step), e.g. ((6, 20), (26, 30))
    n_layers: int

    @classmethod
    def parse(cls, layers: str, steps: str, n_layers: int) -> "Schedule":
        """`parse("6,26", "20,10", 36)`: layer 6 for steps 1-20, layer 26 for 21-30, layer 36 from
        31 on. "none" or "36" is plain GRPO.

        Layers are the paper's, from 1 (0 would be the embedding). Raises ValueError in one line.
        """
        try:
            ls, ns = (
                [int(x) for x in s.replace(" ", "").split(",") if x]
                for s in ("" if layers == "none" else str(layers), str(steps))
            )
        except ValueError:
            raise ValueError(
                f"BuPO layers {layers!r} and steps {steps!r} must be whole numbers, as in 6,26 and "
                f"20,10"
            ) from None
        if bad := [l for l in ls if not 1 <= l <= n_layers]:
            raise ValueError(
                f"BuPO layer {bad[0]} does not exist: this model has layers 1 to {n_layers} "
                f"({n_layers} is plain GRPO)"
            )
        if ls in ([], [n_layers]):
            return cls((), n_layers)
        if sorted(set(ls)) != ls:
            raise ValueError(f"BuPO layers {layers} must rise: the phases go bottom up")
        if len(ls) != len(ns):
            raise ValueError(
                f"{len(ls)} BuPO layers ({layers}) need as many step counts, not {len(ns)} "
                f"({steps})"
            )
        if bad := [n for n in ns if n < 0]:
            raise ValueError(f"BuPO steps must not be negative, not {bad[0]}")
        return cls(tuple((l, sum(ns[: i + 1])) for i, l in enumerate(ls)), n_layers)

    def layer_at(self, step: int) -> int:
        """Layer whose policy step `step` (from 1) trains; L once the internal phases are over."""
        return next((layer for layer, last in self.phases if step <= last), self.n_layers)

    def __str__(self):
        parts, start = [], 0
        for layer, last in self.phases:
            parts.append(f"bupo layer {layer} for {last - start} steps")
            start = last
        return ", then ".join([*parts, "grpo"])


def policy_logprobs(
    model, batch: Batch, layer: int, temperature=1.0, n_vocab=None, chunk=256, norm="none"
):
    """Log-probs and entropy [M] of a batch's response tokens under the internal policy of `layer`
    (L: the model's own).

    Response positions are selected before the unembedding, and at l = L before the final norm:
    prompts and padding never reach the head. norm="final" puts the final norm before the
    unembedding at an internal layer too; the paper and its code have none there.
    """
    h = model(batch.ids, until=layer, **batch.forward).flatten(0, -2)[batch.at]
    h = model.final(h, layer) if norm == "none" else model.norm(h)
    return token_logprobs(h, model.unembedding, batch.targets, temperature, n_vocab, chunk)


def forward_flops(model, responses, layer) -> int:
    """Floating-point operations of the log-probs of responses at a layer: two for every weight and
    the tokens it meets, and attention's two products over what each token sees, which is n^2 / 2
    pairs. A backward takes twice as many."""
    c, lengths = model.config, [len(r.prompt) + len(r.ids) for r in responses]
    body = sum(p.numel() for block in model.blocks[:layer] for p in block.parameters())
    head = c.vocab_size * c.d_model * sum(len(r.ids) for r in responses)
    return 2 * (
        body * sum(lengths) + head + layer * c.n_heads * c.head_dim * sum(n * n for n in lengths)
    )


def cut(model, responses, max_tokens, pack=None):
    """(responses, their Batch) for every micro-batch of this rank; (None, a batch to keep in step
    with) while others have more.

    pack  sequences end to end, or padded; None: packed where there is a kernel that keeps them
          apart
    """
    E = model.unembedding
    if pack is None:
        pack = kernels.has_flash(E.device, E.dtype, model.config.head_dim)
    for micro in parallel.in_step(micro_batches(responses, max_tokens, pack)):
        yield micro, collate(micro or IDLE, E.device, pack)


@torch.no_grad()
def stored_logprobs(model, responses, layer, max_tokens, **policy):
    """Log-probs of every response under the policy of `layer`, without gradient: a list of
    [len(ids)]; `policy` as for policy_logprobs."""
    out = {}
    for micro, batch in cut(model, responses, max_tokens):
        logprobs, _ = policy_logprobs(model, batch, layer, **policy)
        if micro:
            out |= zip(map(id, micro), logprobs.split([len(r.ids) for r in micro]), strict=True)
    return [out[id(r)] for r in responses]


def backward(
    model,
    responses,
    layer,
    max_tokens,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=10.0,
    loss="token-mean",
    limit=None,
    kl=0.0,
    tis=None,
    pack=None,
    **policy,
):
    """Gradient of the clipped loss of one mini-batch, accumulated into .grad, and sums of what it
    saw.

    A token's weight in the loss follows from the whole mini-batch, counted here before it is split:
    the gradient does not depend on `max_tokens` (of a micro-batch), on padding or packing (`pack`,
    see `cut`), on the order of the responses, nor on the number of ranks they are dealt to. Where
    no old log-probs are stored the ratio is 1 and its gradient that of log pi, which is right for
    the first update on a batch.

    loss, limit  how tokens are weighed: see grpo.response_weights
    kl           adds kl * k3 against each response's ref_logprobs
    tis          token-level truncated importance sampling: the surrogate times min(pi_old /
                 pi_sampler, tis), for the numerical distance between trainer and sampler. At l = L
                 only: below it the two are different policies on purpose
    returns      tokens, and sums over them: loss (weighted), entropy, clip_low, clip_high, kl
    """
    responses = [r for r in responses if r.ids]
    weights = dict(
        zip(
            map(id, responses),
            response_weights([len(r.ids) for r in responses], loss, limit),
            strict=True,
        )
    )
    total = dict.fromkeys(("loss", "entropy", "clip_low", "clip_high", "kl"), 0.0)
    for micro, batch in cut(model, parallel.local_responses(responses), max_tokens, pack):
        logprobs, entropy = policy_logprobs(model, batch, layer, **policy)
        if not micro:
            (0 * logprobs.sum()).backward()
            continue
        old = (
            logprobs.detach()
            if micro[0].old_logprobs is None
            else torch.cat([r.old_logprobs for r in micro])
        )
        surrogate, low, high = policy_loss(
            logprobs, old, batch.advantages, clip_low, clip_high, dual_clip
        )
        if tis and layer == model.config.n_layers:
            sampler = torch.tensor(
                [x for r in micro for x in r.sampler_logprobs], device=old.device
            )
            surrogate = surrogate * (old - sampler).exp().clamp(max=tis)
        k3 = (
            kl_to_reference(logprobs, torch.cat([r.ref_logprobs for r in micro]))
            if kl
            else torch.zeros_like(logprobs)
        )
        weight = torch.tensor(
            [weights[id(r)] for r in micro for _ in r.ids], device=logprobs.device
        )
        value = ((surrogate + kl * k3) * weight).sum()
        value.backward()
        for key, x in zip(total, (value, entropy, low, high, k3), strict=True):
            total[key] += x.detach().sum().item()
    return {"tokens": sum(len(r.ids) for r in responses), **parallel.all_reduce(total)}
