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

from grpo import Policy


@dataclass
class InternalPolicy(Policy):
    """The policy of an internal layer, from 1 to L.

    norm="final" puts the final norm before the unembedding at l < L too; the paper and its code
    have none there.
    """

    layer: int = 0  # always given: 0 would be the bare embedding's, which nobody trains
    norm: str = "none"

    def states(self, batch):  # [M,D]; `until` is what differs from GRPO, and the norm
        h = self.model(batch.ids, until=self.layer, **batch.forward)
        h = h.flatten(0, -2)[batch.positions]
        if self.norm == "final":
            return self.model.norm(h)
        return self.model.norm_at(h, self.layer)  # none below L


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
            ls = [int(x) for x in layers.split(",") if x.strip()] if layers != "none" else []
            ns = [int(x) for x in steps.split(",") if x.strip()]
        except ValueError:
            raise ValueError(
                f"BuPO layers {layers!r} and steps {steps!r} must be whole numbers, as in 6,26 and "
                "20,10"
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
        phases, last = [], 0
        for layer, n in zip(ls, ns, strict=True):
            last += n
            phases.append((layer, last))
        return cls(tuple(phases), n_layers)

    def layer_at(self, step: int) -> int:
        """Layer whose policy step `step` (from 1) trains; L once the internal phases are over."""
        for layer, last in self.phases:
            if step <= last:
                return layer
        return self.n_layers

    def __str__(self):
        parts, start = [], 0
        for layer, last in self.phases:
            parts.append(f"bupo layer {layer} for {last - start} steps")
            start = last
        return ", then ".join([*parts, "grpo"])
