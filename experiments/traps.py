"""Faults on purpose, for the experiment `traps`: train.py with one line of the method wrong.

    python -m experiments.traps clip-sign --bupo-layer none --out out/wrong

Each has been seen in code that people use, and none ends in an error: what it costs is all there
is to see.
"""

import sys

import torch

import grpo
import train
from plumbing.cli import guarded


def clip_sign():
    """The larger of the two surrogates in place of the smaller: what has moved too far is pushed
    on."""

    def wrong(logprobs, old, advantages, clip_low, clip_high, *rest):
        ratio = (logprobs - old).clamp(-20, 20).exp()
        near = ratio.clamp(1 - clip_low, 1 + clip_high)
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return torch.minimum(-advantages * ratio, -advantages * near), none, none

    grpo.policy_loss = wrong


def stop_token():
    """The token that ends a response has no part in the loss."""
    backward = train.backward

    def wrong(policy, responses, *rest, **kw):
        for r in responses:
            r.mask = torch.ones(len(r.ids))
            r.mask[-1] = 1.0 - r.stopped
        return backward(policy, responses, *rest, **kw)

    train.backward = wrong


def micro_mean():
    """Every micro-batch is averaged over its own tokens: those of a micro-batch of few tokens weigh
    more. (Micro-batches of 1,024 tokens, so that there are several.)"""
    batches = grpo.batches

    def wrong(model, responses, max_tokens, pack=None):
        found = list(batches(model, responses, 1024, pack))
        for micro, batch in found:
            for r in micro or ():
                r.weight = 1 / (len(found) * sum(batch.lengths))
            yield micro, batch

    grpo.batches = wrong


def temperature():
    """The trainer computes log-probs at temperature 1, whatever they were drawn at."""
    policy = train.Run.policy

    def wrong(run, layer, model=None):
        out = policy(run, layer, model)
        out.temperature = 1.0
        return out

    train.Run.policy = wrong


TRAPS = {
    "clip-sign": clip_sign,
    "stop-token": stop_token,
    "micro-mean": micro_mean,
    "temperature": temperature,
}


def main(argv=None):
    name, *flags = argv or sys.argv[1:] or [""]
    if name not in TRAPS:
        raise ValueError(f"no trap {name!r}: there are {', '.join(TRAPS)}")
    TRAPS[name]()
    train.main(flags)


if __name__ == "__main__":
    guarded(main)
