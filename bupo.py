"""Bottom-up Policy Optimization (arXiv 2512.19673): GRPO on an internal layer policy for the first
steps, then on the whole model.

    pi^l = softmax(H^l E_u^T / tau)            the internal layer policy: no norm for l < L
    pi^L = softmax(norm(H^L) E_u^T / tau)      the model's own policy; tau is the temperature

Responses are always sampled from pi^L. In an internal phase the old and the new log-probs both come
from pi^l, and the ratio is pi^l / pi^l_old. The forward stops at block l, so a step trains blocks
1..l, the embedding and E_u. The blocks above and the final norm are never run, their gradients are
None, and an optimizer leaves them and their moments alone. All else is GRPO, and GRPO is this at
l = L.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from statistics import fmean

import torch
import torch.nn.functional as F

from grpo import IDLE, Policy, batches, stored_logprobs
from plumbing import parallel


@dataclass
class InternalPolicy(Policy):
    """The policy of an internal layer, from 1 to L.

    norm    before the unembedding at l < L. "final": the norm of the last layer; "rms": division by
            the root mean square alone, so that no logit depends on how long H^l is; the paper and
            its code have "none"
    """

    layer: int = 0  # always given: 0 would be the bare embedding's, which nobody trains
    norm: str = "none"

    def states(self, batch):  # [M,D]; `until` is what differs from GRPO, and the norm
        h = self.model(batch.ids, until=self.layer, **batch.forward)
        h = h.flatten(0, -2)[batch.positions]
        if self.norm == "final":
            return self.model.norm(h)
        if self.norm == "rms" and self.layer < self.model.config.n_layers:
            return F.rms_norm(h, h.shape[-1:], eps=self.model.config.norm_eps)
        return self.model.norm_at(h, self.layer)  # none below L


@dataclass(frozen=True)
class Schedule:
    """Which layers' policies are trained at which step: phases of (layers, last step), then the
    whole model.

    A pure function of the step (and, of --bupo-steps auto, of the rows of the steps before), so
    that a resumed run cannot be in another phase than the one that stopped.
    """

    phases: tuple  # of (layers, last step), e.g. (((6,), 20), ((26,), 30))
    n_layers: int

    @classmethod
    def parse(cls, layers: str, steps: str, n_layers: int) -> "Schedule":
        """`parse("6,26", "20,10", 36)`: layer 6 for steps 1-20, layer 26 for 21-30, layer 36 from
        31 on. "6+36" is a phase of both at once: the sum of their losses. "none" or "36" is plain
        GRPO. Steps "auto" end the one phase when `is_over` says so.

        Layers are the paper's, from 1 (0 would be the embedding). Raises ValueError in one line.
        """
        layers = "" if layers == "none" else layers
        try:
            phases = [tuple(map(int, part.split("+"))) for part in layers.split(",") if part]
            if steps == "auto":
                counts = [inf]
            else:
                counts = [int(part) for part in steps.split(",") if part]
        except ValueError:
            raise ValueError(
                f"BuPO layers {layers!r} and steps {steps!r} must be whole numbers, as in 6,26 and "
                "20,10"
            ) from None
        if bad := [l for phase in phases for l in phase if not 1 <= l <= n_layers]:
            raise ValueError(
                f"BuPO layer {bad[0]} does not exist: this model has layers 1 to {n_layers} "
                f"({n_layers} is plain GRPO)"
            )
        if phases in ([], [(n_layers,)]):
            return cls((), n_layers)
        if len(phases) != len(counts):
            raise ValueError(
                f"{len(phases)} BuPO layers ({layers}) need as many step counts, not {len(counts)} "
                f"({steps})"
            )
        if any(len(set(phase)) < len(phase) for phase in phases):
            raise ValueError(f"BuPO layers {layers}: a layer stands twice in one phase")
        if any(a == b for a, b in pairwise(phases)):
            raise ValueError(f"BuPO layers {layers}: two phases in a row are the same, make it one")
        if min(counts) < 0:
            raise ValueError(f"BuPO steps must not be negative, not {min(counts)}")
        last_steps = accumulate(counts)
        return cls(tuple(zip(phases, last_steps, strict=True)), n_layers)

    def layers_at(self, step: int, rows=()) -> tuple[int, ...]:
        """Layers whose policies step `step` (from 1) trains, rows being those of the steps before;
        (L,) once the internal phases are over."""
        for layers, last in self.phases:
            if step <= last and not (last == inf and is_over(rows)):
                return layers
        return (self.n_layers,)

    def __str__(self):
        parts, start = [], 0
        for layers, last in self.phases:
            names = "+".join(str(layer) for layer in layers)
            length = "for 1 step" if last == start + 1 else f"for {last - start} steps"
            if last == inf:
                length = "as long as it helps"
            parts.append(f"bupo layer {names} {length}")
            start = last
        return ", then ".join([*parts, "grpo"])


# --------------------------------------------------------------------------------------------------
# --bupo-steps auto: how long an internal phase helps


def look(policy: InternalPolicy, whole: Policy, responses, max_tokens) -> dict:
    """After an internal step's updates, on its right responses, in nats a token:

    guard/forgotten   mean of log pi^L before - log pi^L now: above 0 the model itself has
                      become less likely to give its own right answers
    guard/agreement   mean of log pi^l - log pi^L, an estimate of -KL(pi^L || pi^l)
    """
    local = parallel.local_responses(responses)
    sums = dict.fromkeys(("tokens", "before", "now", "inner"), 0.0)
    for response, logprobs, _ in stored_logprobs(whole, local, max_tokens):
        sums["tokens"] += len(response.ids)
        sums["before"] += sum(response.logprobs)
        sums["now"] += logprobs.sum().item()
    for _, logprobs, _ in stored_logprobs(policy, local, max_tokens):
        sums["inner"] += logprobs.sum().item()
    sums = parallel.all_reduce(sums)
    return {
        "guard/forgotten": (sums["before"] - sums["now"]) / sums["tokens"],
        "guard/agreement": (sums["inner"] - sums["now"]) / sums["tokens"],
    }


def is_over(rows, patience=3) -> bool:
    """Whether an internal phase has had its time, by what `look` said in the rows of its steps:
    over the last `patience` of them the model forgot, or agreement stopped growing."""
    rows = [row for row in rows if "guard/agreement" in row]
    if len(rows) <= patience:
        return False
    forgotten = [row["guard/forgotten"] for row in rows]
    agreement = [row["guard/agreement"] for row in rows]
    before, late = agreement[:-patience], agreement[-patience:]
    return fmean(forgotten[-patience:]) > 0 or max(late) <= max(before)


# --------------------------------------------------------------------------------------------------
# --align: the last layer teaches an internal one


def js_estimate(log_rho):
    """The Jensen-Shannon divergence of two policies p and q, in nats, estimated at a token drawn
    from p: (-log m + rho (log rho - log m)) / 2 with rho = q / p and m = (1 + rho) / 2. Never
    negative; its mean over p is the divergence."""
    log_rho = log_rho.clamp(-20, 5)
    rho = log_rho.exp()
    log_m = ((1 + rho) / 2).log()
    return (rho * (log_rho - log_m) - log_m) / 2


def align(policy: InternalPolicy, responses, max_tokens, coefficient):
    """Gradient of on-policy internal self-distillation (OISD, arXiv 2605.29089), added to .grad:
    what a response did right draws pi^l towards pi^L, what it did wrong drives them apart.

        loss   coefficient * sum_t A_t d_t / M,    d_t = js_estimate(log pi^l - log pi^L)

    The teacher is pi^L as it drew the response. The paper sums over the vocabulary and aligns
    attention too; this does not.
    """
    M = sum(len(r.ids) for r in responses)
    local = parallel.local_responses(responses)
    for micro, batch in batches(policy.model, local, max_tokens):
        logprobs, _ = policy.logprobs(batch)
        # a batch that only keeps in step with other ranks has advantage 0
        teacher = [x for r in micro or IDLE for x in r.logprobs]
        teacher = torch.tensor(teacher, device=logprobs.device)
        d = js_estimate(logprobs - teacher)
        loss = coefficient * (batch.advantages * d).sum() / M
        loss.backward()
