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
    out = []
    for _ in range(n):
        length = int(torch.randint(1, longest, (1,), generator=g))
        out.append(torch.randint(6, 1000, (length,), generator=g).tolist())
    return out


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def largest(a, b):
    """The largest difference."""
    return (a.float() - b).abs().max()


def share(a, b):
    """Length of a - b as a share of b's."""
    return (a.float() - b).norm() / b.float().norm()


@pytest.mark.parametrize("heads, kv", [(2, 2), (4, 2), (6, 2), (8, 2), (10, 2), (16, 2)])
@pytest.mark.parametrize("E", [64, 128])
def test_decoding_reads_the_live_part_of_each_row(heads, kv, E):
    """Against SDPA in float32; groups 1, 2, 3, 4, 5, 8. What stands behind the live part is NaN,
    and must not be read."""
    S = 513
    live = torch.tensor([1, 127, 128, 129, 512], device=DEVICE)
    q = random(5, heads, E).to(BF16)
    k = random(5, S, kv, E, seed=1).to(BF16)
    v = random(5, S, kv, E, seed=2).to(BF16)
    plain = masked_decode(live - 1, S, torch.float32)
    wide = plain(q.float(), k.float(), v.float())
    unseen = torch.arange(S, device=DEVICE) >= live[:, None]
    k, v = (t.masked_fill(unseen[:, :, None, None], torch.nan) for t in (k, v))
    out = flash_decode(live - 1, 5, S)(q, k, v)
    assert largest(out, wide) < 2e-2


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (6, 2), (10, 2), (16, 2)])
def test_packed_sequences_do_not_see_each_other(heads, kv):
    """Forward and gradients of the kernel against one sequence at a time in float32."""
    lengths = [1, 127, 128, 129, 300]
    T = sum(lengths)
    inputs = []
    for i, h in enumerate((heads, kv, kv)):
        inputs.append(random(T, h, 64, seed=i).to(BF16).requires_grad_())
    assert has_flash(DEVICE, BF16, 64)
    out = packed(lengths, DEVICE)(1, *inputs)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    parts = []
    for q, k, v in zip(*(t.split(lengths) for t in wide), strict=True):
        parts.append(causal(1, q[None], k[None], v[None])[0])
    apart = torch.cat(parts)
    assert largest(out, apart) < 2e-2
    grad = random(T, heads, 64, seed=9)
    ours = torch.autograd.grad(out, inputs, grad.to(BF16))
    theirs = torch.autograd.grad(apart, wide, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert share(a, b) < 2e-2


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
            noise = random(*model.embed.weight.shape).to(dtype)
            model.embed.weight.add_(change * noise)
        a = sampler.generate(prompts(), 3, 40, 1.0, STOPS, seed=1)
        b = plain.generate(prompts(), 3, 40, 1.0, STOPS, seed=1)
        diff = []
        for x, y in zip(sum(a, []), sum(b, []), strict=True):
            assert compile or x.ids == y.ids
            n = len(os.path.commonprefix([x.ids, y.ids]))
            diff.append(torch.tensor(x.logprobs[:n]) - torch.tensor(y.logprobs[:n]))
        diff = torch.cat(diff)
        most = 0.05 if dtype == BF16 else 1e-4
        assert len(diff) > 200 and diff.abs().mean() < most
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
    out = Sampler(model, 5, 300).generate(prompts(), 4, 100, 1.0, STOPS, seed=1)
    rs = [r for group in out for r in group]
    trained = torch.cat(stored_logprobs(model, rs, 4, 4096)).cpu()
    drawn = torch.tensor([x for r in rs for x in r.logprobs])
    diff = trained - drawn
    assert len(diff) > 500 and diff.abs().mean() < most


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("compile", [False, True])
def test_packed_and_padded_updates_agree(layer, compile):
    """bfloat16 gradients of both, no further from float32's than bfloat16 is."""
    model, g = make(), torch.Generator().manual_seed(1)
    rs = []
    for i, prompt in enumerate(prompts()):
        ids = torch.randint(6, 1000, (20 + 9 * i,), generator=g).tolist()
        rs.append(Response(prompt, ids, advantage=(-1.0) ** i))
    wide = copy.deepcopy(model).float()
    if compile:
        compile_blocks(model)

    def gradient(model, **kw):
        model.zero_grad()
        backward(model, rs, layer, 600, **kw)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.cat([grad.flatten().float() for grad in grads])

    truth = gradient(wide, pack=False)
    for pack in (True, False):
        assert share(gradient(model, pack=pack), truth) < 0.05


def test_log_probs_of_bfloat16_states_are_float32():
    h = random(300, 256).to(BF16).requires_grad_()
    E = (random(5000, 256, seed=1) / 16).to(BF16).requires_grad_()
    targets = torch.arange(300, device=DEVICE)
    logprobs, entropy = token_logprobs(h, E, targets, temperature=0.8, chunk=128)
    wide = (h.double() @ E.double().T / 0.8).log_softmax(-1)
    own = wide[targets, targets]
    assert largest(logprobs, own) < 1e-4
    assert largest(entropy, -(wide.exp() * wide).sum(-1)) < 1e-4
    ours = torch.autograd.grad(logprobs.sum(), (h, E))
    theirs = torch.autograd.grad(own.sum(), (h, E))
    for a, b in zip(ours, theirs, strict=True):
        assert share(a, b) < 1e-2


@pytest.mark.parametrize(
    "more", ["", "--optimizer split --offload --recompute", "--no-compile", "--dtype float32"]
)
def test_the_default_run_on_a_gpu(tmp_path, more):
    out = tmp_path / "run"
    flags = "--device cuda --steps 2 --eval-limit 16 --bupo-steps 1".split()
    train.main([*flags, "--out", str(out), *more.split()])
    assert (out / "step_000002/MANIFEST.json").exists()
