"""Bottom-up Policy Optimization (arXiv 2512.19673): GRPO on an internal layer policy for the first steps, then on the whole model.

    pi^l = softmax(H^l E_u^T / T)      the internal layer policy: no norm for l < L; pi^L is the model's own policy

Responses are always sampled from pi^L. In an internal phase the old and the new log-probs both come from pi^l, the ratio is
pi^l / pi^l_old, and the forward stops at block l: the blocks above are never run, their gradients are None, and an optimizer leaves
them and their moments alone. There is one code path, and GRPO is that path at l = L.
"""
from dataclasses import dataclass

import torch

from grpo import Batch, collate, micro_batches, policy_loss, token_logprobs


@dataclass(frozen=True)
class Schedule:
    """Which layer's policy is trained at which step: phases of (layer, last step), bottom up, then the whole model.

    A pure function of the step, so that a resumed run cannot be in another phase than the one that stopped.
    """
    phases: tuple[tuple[int, int], ...]   # (layer, last step), e.g. ((6, 20), (26, 30))
    n_layers: int

    @classmethod
    def parse(cls, layers: str, steps: str, n_layers: int) -> "Schedule":
        """`parse("6,26", "20,10", 36)`: layer 6 for steps 1-20, layer 26 for 21-30, layer 36 from 31 on. "" or "36" is plain GRPO.

        Layers are the paper's, from 1 (0 would be the embedding). Raises ValueError in one line.
        """
        try:
            ls, ns = ([int(x) for x in s.replace(" ", "").split(",") if x] for s in (str(layers), str(steps)))
        except ValueError:
            raise ValueError(f"BuPO layers {layers!r} and steps {steps!r} must be whole numbers, as in 6,26 and 20,10") from None
        if bad := [l for l in ls if not 1 <= l <= n_layers]:
            raise ValueError(f"BuPO layer {bad[0]} does not exist: this model has layers 1 to {n_layers} ({n_layers} is plain GRPO)")
        if ls in ([], [n_layers]): return cls((), n_layers)
        if sorted(set(ls)) != ls: raise ValueError(f"BuPO layers {layers} must rise: the phases go bottom up")
        if len(ls) != len(ns): raise ValueError(f"{len(ls)} BuPO layers ({layers}) need as many step counts, not {len(ns)} ({steps})")
        if bad := [n for n in ns if n < 0]: raise ValueError(f"BuPO steps must not be negative, not {bad[0]}")
        return cls(tuple((l, sum(ns[:i + 1])) for i, l in enumerate(ls)), n_layers)

    def layer_at(self, step: int) -> int:
        """Layer whose policy step `step` (from 1) trains; L once the internal phases are over."""
        return next((layer for layer, last in self.phases if step <= last), self.n_layers)

    def __str__(self):
        parts, start = [], 0
        for layer, last in self.phases:
            parts.append(f"bupo layer {layer} for {last - start} steps")
            start = last
        return ", then ".join([*parts, "grpo"])


def policy_logprobs(model, batch: Batch, layer: int, temperature=1.0, n_vocab=None, chunk=1024, norm="none"):
    """Log-probs and entropy [M] of a batch's response tokens under the internal policy of `layer` (L: the model's own).

    Response positions are selected before the unembedding, and at l = L before the final norm: prompts and padding never reach the head.
    norm="final" puts the final norm before the unembedding at an internal layer too; the paper and its code have none there.
    """
    h = model(batch.ids, until=layer).flatten(0, 1)[batch.at]
    h = model.final(h, layer) if norm == "none" else model.norm(h)
    return token_logprobs(h, model.unembedding, batch.targets, temperature, n_vocab, chunk)


@torch.no_grad()
def set_old_logprobs(model, responses, layer, max_tokens, **policy):
    """Store pi^l_old in every response, before the first of several updates on the same responses; `policy` as for policy_logprobs."""
    device = model.unembedding.device
    for micro in micro_batches(responses, max_tokens):
        logprobs, _ = policy_logprobs(model, collate(micro, device), layer, **policy)
        for r, lp in zip(micro, logprobs.split([len(r.ids) for r in micro]), strict=True): r.old_logprobs = lp


def backward(model, responses, layer, max_tokens, clip_low=0.2, clip_high=0.2, dual_clip=10.0, **policy):
    """Gradient of the clipped loss of one mini-batch, accumulated into .grad, and sums of what it saw.

    The loss is a sum over tokens divided by the mini-batch's token count, counted here before it is split: the gradient does not depend
    on `max_tokens` (the padded size of a micro-batch) nor on the order of the responses. Where no old log-probs are stored the ratio
    is 1 and its gradient that of log pi, which is right for the first update on a batch.

    returns tokens, and sums over them: loss (already divided), entropy, clip_low, clip_high
    """
    n = sum(len(r.ids) for r in responses)
    total = dict.fromkeys(("loss", "entropy", "clip_low", "clip_high"), 0.0)
    for micro in micro_batches([r for r in responses if r.ids], max_tokens):
        batch = collate(micro, model.unembedding.device)
        logprobs, entropy = policy_logprobs(model, batch, layer, **policy)
        old = logprobs.detach() if micro[0].old_logprobs is None else torch.cat([r.old_logprobs for r in micro])
        loss, low, high = policy_loss(logprobs, old, batch.advantages, clip_low, clip_high, dual_clip)
        loss = loss.sum() / n
        loss.backward()
        for key, value in zip(total, (loss, entropy, low, high), strict=True): total[key] += value.detach().sum().item()
    return {"tokens": n, **total}
