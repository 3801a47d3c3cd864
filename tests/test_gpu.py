"""What only a GPU can show: the kernels against float32, recorded steps against plain ones, sampler
against trainer in bfloat16.

Skipped without CUDA. Nothing here has run yet: see "What is not done" in README.
"""

import copy
import os

import pytest
import torch
from policies import backward, stored_logprobs

import train
from grpo import Response, token_logprobs
from model import Config, Transformer, causal, packed
from plumbing.kernels import compile_blocks, has_flash
from rollout import Sampler, flash_decode, masked_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE, BF16, STOPS = torch.device("cuda"), torch.bfloat16, (3, 5)


def make(dtype=BF16, heads=4, kv=2, layers=4):
    c = Config("qwen3", 1024, 256, layers, heads, kv, 64, 512, tied=True)
    return Transformer(c).init_weights(0, 0.1).to(dtype).to(DEVICE)


def prompts(n=7, longest=150, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(
            6, 1000, (int(torch.randint(1, longest, (1,), generator=g)),), generator=g
        ).tolist()
        for _ in range(n)
    ]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


@pytest.mark.parametrize("heads, kv", [(2, 2), (4, 2), (6, 2), (8, 2), (10, 2), (16, 2)])
@pytest.mark.parametrize("E", [64, 128])
def test_decoding_reads_the_live_part_of_each_row(heads, kv, E):
    """Against SDPA in float32; groups 1, 2, 3, 4, 5, 8. What stands behind the live part is NaN,
    and must not be read."""
    S, live = 513, torch.tensor([1, 127, 128, 129, 512], device=DEVICE)
    q, k, v = random(5, heads, E), random(5, S, kv, E, seed=1), random(5, S, kv, E, seed=2)
    seen = torch.arange(S, device=DEVICE) < live[:, None]
    mask = torch.where(seen, 0.0, -torch.inf)[:, None, None]
    wide = masked_decode(*(t.to(BF16).float() for t in (q, k, v)), mask)
    k, v = (t.to(BF16).masked_fill(~seen[:, :, None, None], torch.nan) for t in (k, v))
    assert (flash_decode(q.to(BF16), k, v, live - 1).float() - wide).abs().max() < 2e-2


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (6, 2), (10, 2), (16, 2)])
def test_packed_sequences_do_not_see_each_other(heads, kv):
    """Forward and gradients of the kernel against one sequence at a time in float32."""
    lengths = [1, 127, 128, 129, 300]
    inputs = [
        random(sum(lengths), h, 64, seed=i).to(BF16).requires_grad_()
        for i, h in enumerate((heads, kv, kv))
    ]
    assert has_flash(DEVICE, BF16, 64)
    out, grad = packed(lengths, DEVICE)(1, *inputs), random(sum(lengths), heads, 64, seed=9)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    apart = torch.cat(
        [
            causal(1, *(t[None] for t in row))[0]
            for row in zip(*(t.split(lengths) for t in wide), strict=True)
        ]
    )
    assert (out.float() - apart).abs().max() < 2e-2
    for a, b in zip(
        torch.autograd.grad(out, inputs, grad.to(BF16)),
        torch.autograd.grad(apart, wide, grad),
        strict=True,
    ):
        assert (a.float() - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("compile", [False, True])
def test_recorded_steps_are_the_plain_ones(dtype, compile):
    """The same tokens; compiled, which rounds otherwise, the same log-probs until a draw tips over.
    Again after the memory was given back and taken anew, and after the weights have changed."""
    model = make(dtype)
    sampler, plain = Sampler(model, 5, 200, compile), Sampler(model, 5, 200)
    plain.capture = False
    for change in (0, 0.01):
        with torch.no_grad():
            model.embed.weight.add_(change * random(*model.embed.weight.shape).to(dtype))
        a, b = (s.generate(prompts(), 3, 40, 1.0, STOPS, seed=1) for s in (sampler, plain))
        pairs = [pair for p, q in zip(a, b, strict=True) for pair in zip(p, q, strict=True)]
        if not compile:
            assert all(x.ids == y.ids for x, y in pairs)
        common = [(x, y, len(os.path.commonprefix([x.ids, y.ids]))) for x, y in pairs]
        diff = torch.tensor(
            [
                abs(s - t)
                for x, y, n in common
                for s, t in zip(x.logprobs[:n], y.logprobs[:n], strict=True)
            ]
        )
        assert len(diff) > 200 and diff.mean() < (0.05 if dtype == BF16 else 1e-4)
        assert sampler.stats["recompiles"] == 0
        held = torch.cuda.memory_allocated()
        sampler.release()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() < held and sampler.graph is None


def test_rows_that_do_not_fit_are_refused_before_they_are_taken():
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match="take fewer slots"):
        Sampler(make(), 10**6, 10**5).start()
    assert torch.cuda.memory_allocated() - before < 1 << 26


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (BF16, 0.02)])
def test_the_sampler_draws_from_the_policy_that_is_trained(dtype, most):
    """Mean difference of log-probs between sampler and trainer, ragged prompts, groups, refills."""
    model = make(dtype)
    some = prompts()
    out = Sampler(model, 5, 300).generate(some, 4, 100, 1.0, STOPS, seed=1)
    rs = [Response(p, s.ids, s.logprobs) for p, group in zip(some, out, strict=True) for s in group]
    diff = torch.cat(stored_logprobs(model, rs, 4, 4096)).cpu() - torch.tensor(
        [x for r in rs for x in r.logprobs]
    )
    assert len(diff) > 500 and diff.abs().mean() < most


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("compile", [False, True])
def test_packed_and_padded_updates_agree(layer, compile):
    """bfloat16 gradients of both, no further from float32's than bfloat16 is."""
    model, g = make(), torch.Generator().manual_seed(1)
    rs = [
        Response(
            p,
            torch.randint(6, 1000, (20 + 9 * i,), generator=g).tolist(),
            [],
            advantage=(-1.0) ** i,
        )
        for i, p in enumerate(prompts())
    ]
    wide = copy.deepcopy(model).float()
    if compile:
        compile_blocks(model)

    def gradient(model, **kw):
        model.zero_grad()
        backward(model, rs, layer, 600, **kw)
        return torch.cat(
            [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        )

    truth = gradient(wide, pack=False)
    for pack in (True, False):
        assert (gradient(model, pack=pack) - truth).norm() < 0.05 * truth.norm()


def test_log_probs_of_bfloat16_states_are_float32():
    h, E = (
        random(300, 256).to(BF16).requires_grad_(),
        (random(5000, 256, seed=1) / 16).to(BF16).requires_grad_(),
    )
    targets = torch.arange(300, device=DEVICE)
    logprobs, entropy = token_logprobs(h, E, targets, temperature=0.8, chunk=128)
    wide = (h.double() @ E.double().T / 0.8).log_softmax(-1)
    assert (logprobs - wide[targets, targets]).abs().max() < 1e-4 and (
        entropy + (wide.exp() * wide).sum(-1)
    ).abs().max() < 1e-4
    ours = torch.autograd.grad(logprobs.sum(), (h, E))
    for a, b in zip(ours, torch.autograd.grad(wide[targets, targets].sum(), (h, E)), strict=True):
        assert (a - b).float().norm() < 1e-2 * b.float().norm()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--optimizer", "split", "--offload", "--recompute"],
        ["--no-compile"],
        ["--dtype", "float32"],
    ],
)
def test_the_default_run_on_a_gpu(tmp_path, more):
    out = tmp_path / "run"
    train.main(
        [
            "--device",
            "cuda",
            "--out",
            str(out),
            "--steps",
            "2",
            "--eval-limit",
            "16",
            "--bupo-steps",
            "1",
            *more,
        ]
    )
    assert (out / "step_000002/MANIFEST.json").exists()
