"""The code that only a GPU runs, run on a CPU: see emulated.py for the kernel and the graphs.

Everything is in bfloat16, as on a GPU, and measured against float32 or float64: the kernel's branch
must be no further from it than the plain branch is, which rounds as often.
"""

import copy
from itertools import pairwise

import pytest
import torch
from emulated import CaptureError, KernelError, cuda_graphs, flash_kernel
from policies import backward, policy_logprobs

from grpo import Response, collate, group_advantages
from model import Config, Transformer, causal, packed
from plumbing import kernels
from plumbing.kernels import flash, has_flash
from plumbing.optimizer import SplitAdamW
from rollout import Sampler

BF16, V, STOPS = torch.bfloat16, 96, (3, 5)
GROUPS = [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1)]  # query and key heads


@pytest.fixture
def kernel():
    """The kernel on a CPU; a Counter of its calls."""
    with flash_kernel() as calls:
        yield calls


@pytest.fixture(params=["public", "operator"])
def interface(request, monkeypatch):
    """The kernel as torch 2.12 offers it, and as the operator behind that, for older ones."""
    if request.param == "operator":
        monkeypatch.setattr(kernels, "public_kernel", lambda: None)
    elif not kernels.public_kernel():
        pytest.skip("varlen_attn of this torch takes no live lengths")


@pytest.fixture
def graphs():
    with cuda_graphs():
        yield


def make(heads=4, kv=2, layers=2, std=0.15, family="qwen3"):
    config = Config(family, V, 64, layers, heads, kv, 16, 96, tied=True)
    model = Transformer(config).init_weights(0, std).bfloat16()
    for p in model.parameters():
        p.grad_dtype = torch.float32  # gradients of micro-batches add up in float32
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(6, V - 6, (n,), generator=g).tolist() for n in lengths]


def distance(a, b):
    """How far a is from b, as a share of b's length where that is not next to nothing."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-2)).item()


def change(model, seed):
    """Other weights in place, as an optimizer leaves them."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_((0.05 * random(*p.shape, seed=seed + i)).to(p.dtype))


# --------------------------------------------------------------------------------------------------
# the emulations themselves


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(q=random(6, 4, 16)), "float32"),
        (dict(k=random(6, 2, 16).half()), "different dtypes"),
        (dict(q_starts=torch.tensor([0, 2, 6])), "int64"),
        (dict(k_starts=torch.tensor([0, 9, 2, 9, 6]).int()[::2]), "contiguous"),
        (dict(q=random(6, 16, 4).to(BF16).mT), "last dimension"),
        (dict(q=random(6, 3, 16).to(BF16)), "cannot share"),
        (dict(max_q=3), "max_q 3: a sequence has 4"),
        (dict(max_k=3), "max_k 3: a sequence has 4"),
        (dict(q_starts=torch.tensor([0, 2, 5]).int()), "do not span"),
        (dict(k_starts=torch.tensor([0, 2, 7]).int()), "leave the keys"),
        (dict(used=torch.tensor([1, 4, 4]).int()), "live lengths for 2"),
        (dict(used=torch.tensor([3, 4]).int()), "leave their rows"),
        (dict(used=torch.tensor([1, 4])), "int32"),
        (dict(q_starts=torch.tensor([0, 2, 4, 6]).int()), "different lengths"),
        ({x: random(6, 2, 12).to(BF16) for x in "qkv"}, "head_dim 12"),
        ({x: random(6, 2, 264).to(BF16) for x in "qkv"}, "head_dim 264"),
    ],
)
def test_the_kernel_refuses_what_the_real_one_refuses(kernel, wrong, says):
    starts = torch.tensor([0, 2, 6]).int()
    q, k, v = (random(6, heads, 16).to(BF16) for heads in (4, 2, 2))
    good = dict(q=q, k=k, v=v, q_starts=starts, k_starts=starts, max_q=4, max_k=4, used=None)
    assert flash(**good).shape == (6, 4, 16)
    *args, used = (good | wrong).values()
    with pytest.raises(KernelError, match=says):
        torch.ops.aten._flash_attention_forward(*args, 0.0, True, False, seqused_k=used)


def test_an_empty_sequence_among_single_tokens_breaks_the_kernels_reshape(kernel):
    """Two tokens, three sequences. Harmless beside longer ones, and where no keys are shared."""
    q, k, v = (random(2, heads, 16).to(BF16) for heads in (4, 2, 2))
    starts = torch.tensor([0, 1, 1, 2]).int()
    with pytest.raises(KernelError, match="2 queries do not reshape to 3"):
        flash(q, k, v, starts, starts, 1, 1)
    assert flash(q, k, v, starts, starts, 2, 2).isfinite().all()
    assert flash(q, q, q, starts, starts, 1, 1).isfinite().all()


def test_nothing_of_the_emulation_is_left():
    q, starts = random(3, 2, 16).to(BF16), torch.tensor([0, 3]).int()
    names = "Stream", "stream", "current_stream", "CUDAGraph", "graph", "synchronize"
    real = [getattr(torch.cuda, name) for name in names]
    with flash_kernel() as calls, cuda_graphs():
        assert kernels.has_flash(q.device, BF16, 16)
        assert not kernels.has_flash(q.device, torch.float32, 16)
        packed([3], q.device)(1, q, q, q)
        assert calls["forward"] == 1
    assert kernels.has_flash is has_flash and not has_flash(q.device, BF16, 16)
    assert all(getattr(torch.cuda, name) is x for name, x in zip(names, real, strict=True))
    with pytest.raises(NotImplementedError):
        torch.ops.aten._flash_attention_forward(q, q, q, starts, starts, 3, 3, 0.0, True, False)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x),
        lambda x: x.add_(torch.tensor([1.0, 2.0, 3.0])),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.cpu(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_a_graph_refuses_what_makes_the_host_wait(graphs, step):
    with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(torch.ones(3))


def test_a_graph_is_operators_on_fixed_tensors(graphs):
    """Capture computes nothing, a replay uses what the tensors hold then, Python is over."""
    x, at, total, runs = torch.arange(3.0), torch.tensor([2, 0]), torch.zeros(2), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs.append(1)
        y = x[at] * 2
        total += y
        x[at] = y + 1
    assert x.tolist() == [0, 1, 2] and total.tolist() == [0, 0] and y.isnan().all()
    graph.replay()
    assert y.tolist() == [4, 0] and total.tolist() == [4, 0] and x.tolist() == [1, 1, 5]
    at.copy_(torch.tensor([1, 1]))
    x[1] = 7
    graph.replay()
    assert (
        y.tolist() == [14, 14]
        and total.tolist() == [18, 14]
        and x.tolist() == [1, 15, 5]
        and runs == [1]
    )


# --------------------------------------------------------------------------------------------------
# attention


def one_by_one(q, k, v, lengths):
    """Causal attention of each sequence by itself."""
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return torch.cat(
        [causal(1, q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in pairwise(ends) if a < b]
    )


@pytest.mark.parametrize("heads, kv", GROUPS)
@pytest.mark.parametrize(
    "lengths", [[1, 127, 128, 129, 2], [1, 1, 1], [0, 3, 0, 0, 2], [0, 1, 0, 1]]
)
def test_packed_attention_and_its_gradients(kernel, interface, heads, kv, lengths):
    """Against float64, and the plain branch in bfloat16 beside it."""
    T, device = sum(lengths), torch.device("cpu")
    inputs = [
        random(T, h, 16, seed=i).to(BF16).requires_grad_() for i, h in enumerate((heads, kv, kv))
    ]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grad = random(T, heads, 16, seed=9).to(BF16)
    results = []
    for tensors, attend in ((inputs, packed(lengths, device)), (inputs, None), (exact, None)):
        out = attend(1, *tensors) if attend else one_by_one(*tensors, lengths)
        assert out.shape == (T, heads, 16)
        results.append([out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))])
    assert kernel == {"forward": 1, "backward": 1}
    for ours, plain, truth in zip(*results, strict=True):
        assert distance(ours, truth) < max(1.2 * distance(plain, truth), 0.004)


@pytest.mark.parametrize("heads, kv", GROUPS)
def test_decoding_reads_the_live_part_of_each_row(kernel, interface, heads, kv):
    """One query a row of a cache whose dead part is NaN, against float64."""
    S, live = 160, [1, 127, 128, 129, 159, 160]
    q, k, v = (random(len(live), n, 16, seed=n).to(BF16) for n in (heads, S * kv, S * kv + 1))
    k, v = k.unflatten(1, (S, kv)), v[:, 1:].unflatten(1, (S, kv))
    truth = []
    for row, n in enumerate(live):
        scores = (
            torch.einsum(
                "hge,mhe->hgm", q[row].double().unflatten(0, (kv, -1)), k[row, :n].double()
            )
            / 4
        )
        truth.append(
            torch.einsum("hgm,mhe->hge", scores.softmax(-1), v[row, :n].double()).flatten(0, 1)
        )
    dead = (torch.arange(S) >= torch.tensor(live)[:, None])[:, :, None, None]
    k, v = (t.masked_fill(dead, torch.nan).flatten(0, 1) for t in (k, v))
    starts = torch.arange(len(live) + 1).int()
    out = flash(q, k, v, starts, starts * S, 1, S, torch.tensor(live).int())
    assert distance(out, torch.stack(truth)) < 0.003


# --------------------------------------------------------------------------------------------------
# rollout


@torch.no_grad()
def logprobs_of(model, prompt, ids, temperature=1.0):
    """Log-probs of a response from one forward over the whole sequence, by the plain branch."""
    z = model.unembed(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1 : -1] / temperature
    return z.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def errors(model, prompts, out):
    """|log-prob - float32's| of each prompt's samples: the sampler's, and the plain branch's."""
    exact, pairs = copy.deepcopy(model).float(), []
    for prompt, group in zip(prompts, out, strict=True):
        truth, plain = (
            torch.cat([logprobs_of(m, prompt, s.ids) for s in group]) for m in (exact, model)
        )
        ours = torch.tensor([x for s in group for x in s.logprobs])
        pairs.append(((ours - truth).abs(), (plain - truth).abs()))
    return pairs


@pytest.mark.parametrize("heads, kv", GROUPS)
def test_prefill_and_decoding_by_the_kernel(kernel, heads, kv):
    """Ragged prompts, refilled slots, rows as long as they can be, all at one width as on a GPU."""
    model, prompts = make(heads, kv), ragged([1, 127, 128, 129, 159, 2, 40])
    sampler = Sampler(model, 4, 160, sync=4)
    sampler.shrink = False
    out = sampler.generate(prompts, 2, 12, seed=1)
    assert sampler.flash and kernel["forward"] > 2 * sampler.stats["steps"]
    assert [len(s.ids) for group in out for s in group] == [12] * 8 + [1] * 2 + [12] * 4
    pairs = errors(model, prompts, out)
    usual = torch.cat([plain for _, plain in pairs]).mean()
    for ours, _ in pairs:
        assert ours.mean() < 3 * usual
    assert torch.cat([ours for ours, _ in pairs]).mean() < 1.3 * usual


@pytest.mark.parametrize("lengths", [[2, 2, 2], [1, 2, 1, 2], [1, 2], [2], [1, 1], [1, 3, 1, 2]])
@pytest.mark.parametrize("heads, kv", [(4, 2), (2, 2)])
def test_prompts_of_one_and_two_tokens(kernel, interface, heads, kv, lengths):
    """All but the last token is prefilled: of these prompts one token each, or none."""
    model, prompts = make(heads, kv), ragged(lengths)
    out = Sampler(model, 16, 32).generate(prompts, 3, 8, seed=2)
    ours, plain = (torch.cat(x).mean() for x in zip(*errors(model, prompts, out), strict=True))
    assert kernel["forward"] and ours < 1.5 * plain


# --------------------------------------------------------------------------------------------------
# the recorded step


def samplers(model, slots=5, max_len=80):
    """A sampler that records its step as one on a GPU does, and a plain one of the same width."""
    recorded, plain = (Sampler(model, slots, max_len, sync=sync) for sync in (16, 1))
    recorded.capture, recorded.shrink, plain.shrink = True, False, False
    return recorded, plain


def drawn(sampler, prompts, **kw):
    """Two samples a prompt, of limits that refill slots at odd moments."""
    return sampler.generate(prompts, 2, [6 + 3 * i for i in range(len(prompts))], **kw)


CALLS = [
    dict(seed=1, stop_ids=STOPS),
    dict(temperature=0.0),
    dict(seed=2, temperature=0.7, n_vocab=90, stop_ids=(7,)),
    dict(seed=3, temperature=1.3),
]


def test_recorded_steps_are_the_plain_ones(kernel, graphs):
    """Bit for bit: with changed weights and other temperatures at every call, greedily, and after
    `stop`."""
    model, prompts = make(), ragged([1, 2, 17, 40, 5])
    recorded, plain = samplers(model)
    results = []
    for calls in (CALLS, CALLS[:1] + CALLS[3:4]):
        python = counted(recorded)
        for i, kw in enumerate(calls):
            results.append(drawn(recorded, prompts, **kw))
            assert results[-1] == drawn(plain, prompts, **kw), kw
            change(model, 100 * i)
        # three warm-ups and a recording
        assert len(python) == 4 and recorded.graph.replays > 15
        recorded.release()
        assert recorded.graph is None and recorded.cache is None
        recorded.allocate()
    assert results[0] != results[len(CALLS)]
    assert any(s.stopped for group in results[0] for s in group) and kernel["forward"]


def test_a_recorded_step_computes_with_the_weights_as_they_are(kernel, graphs):
    """Not with those it was recorded with, and not with a copy: log-probs against a forward."""
    model, prompts = make(), ragged([1, 2, 17, 40, 5])
    recorded, _ = samplers(model)
    python = counted(recorded)
    for turn in range(3):
        change(model, 100 * turn)
        out = drawn(recorded, prompts, seed=turn)
        ours, plain = (torch.cat(x).mean() for x in zip(*errors(model, prompts, out), strict=True))
        assert ours < 1.5 * plain
    assert len(python) == 4


def counted(sampler):
    """From here on, a list that grows with every step that Python runs."""
    step, calls = sampler.run_step, []

    def run(*args):
        calls.append(1)
        step(*args)

    sampler.run_step = run
    return calls


def test_recorded_steps_without_the_kernel(graphs):
    """float32, for debugging on a GPU: attention under a mask, whose width rounds otherwise."""
    model, prompts = make().float(), ragged([1, 2, 17, 40, 5])
    recorded, plain = samplers(model)
    for kw in CALLS[:3]:
        ours, theirs = ([s for g in drawn(x, prompts, **kw) for s in g] for x in (recorded, plain))
        assert not recorded.flash
        for a, b in zip(ours, theirs, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        change(model, 7)


def test_a_step_that_waits_is_caught(kernel, graphs):
    """What this file is for: the same step with one look at a value in it cannot be recorded."""
    model = make()
    recorded, _ = samplers(model)
    step = recorded.run_step

    def looking(*args):
        step(*args)
        recorded.state.max().item()

    recorded.run_step = looking
    with pytest.raises(CaptureError, match="in a graph"):
        recorded.generate([[7, 8]], 1, 3)


# --------------------------------------------------------------------------------------------------
# training


def responses(seed=1):
    """Ragged ones: a single token after a single token, and lengths around the kernel's blocks."""
    g = torch.Generator().manual_seed(seed)
    prompts = ragged([1, 1, 20, 27, 28, 29, 60, 3], seed)
    ids = ragged([1, 30, 1, 100, 100, 100, 7, 14], seed + 1)
    advantages = torch.randn(len(ids), generator=g).tolist()
    rows = zip(prompts, ids, advantages, strict=True)
    return [
        Response(prompt, r, [-4.0] * len(r), advantage=advantage) for prompt, r, advantage in rows
    ]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def flat(grads):
    return torch.cat([g.float().flatten() for g in grads.values()])


@pytest.mark.parametrize("heads, kv", [(4, 2), (2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("layer", [1, 2])
def test_packed_log_probs_and_gradients_are_those_of_padded_ones(
    kernel, interface, heads, kv, layer
):
    model, rs, seen = make(heads, kv), responses(), []
    for m, pack in ((model, True), (model, False), (copy.deepcopy(model).float(), False)):
        m.zero_grad()
        batch = collate(rs, pack=pack)
        logprobs, entropy = policy_logprobs(m, batch, layer)
        (logprobs * batch.advantages).sum().backward()
        seen.append([logprobs.detach(), entropy, flat(gradients(m))])
    assert kernel == {"forward": layer, "backward": layer}
    for ours, plain, truth in zip(*seen, strict=True):
        assert distance(ours, truth) < max(1.2 * distance(plain, truth), 1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_packed_micro_batches(kernel, recompute):
    """As train.py takes it on a GPU: packed without being told, in micro-batches, each parameter's
    gradient no further from float32's than the padded one."""
    model, rs = make(), responses()
    model.recompute = recompute
    exact, grads, sums = copy.deepcopy(model).float(), [], []
    for m, pack in ((model, None), (model, False), (exact, False)):
        m.zero_grad()
        sums.append(backward(m, rs, 2, max_tokens=140, n_vocab=90, chunk=64, pack=pack))
        grads.append(gradients(m))
    # two blocks, four micro-batches
    assert kernel == {"forward": 8 * (1 + recompute), "backward": 8}
    for key in ("loss", "entropy"):
        assert abs(sums[0][key] - sums[2][key]) < 0.02 * abs(sums[2][key])
    assert grads[0].keys() == grads[2].keys() == dict(model.named_parameters()).keys()
    assert distance(flat(grads[0]), flat(grads[2])) < 1.2 * distance(flat(grads[1]), flat(grads[2]))
    for name, truth in grads[2].items():
        ours, plain = (distance(g[name], truth) for g in grads[:2])
        assert ours < max(1.5 * plain, 0.03), name


def rewarded(prompts, out):
    """Responses with the advantages of a reward: the share of ids below 48."""
    rewards = torch.tensor([[sum(i < 48 for i in s.ids) / len(s.ids) for s in g] for g in out])
    advantages, rs = group_advantages(rewards).tolist(), []
    for prompt, group, row in zip(prompts, out, advantages, strict=True):
        rs += [
            Response(prompt, s.ids, s.logprobs, advantage=a)
            for s, a in zip(group, row, strict=True)
        ]
    return rs


def test_whole_steps(kernel, graphs):
    """Sample by recorded steps, reward, update by packed micro-batches; internally, then wholly.

    The sampler draws from the policy that is trained, after each update too, and an internal step
    leaves the blocks above it alone.
    """
    model, prompts = make(), ragged([1, 2, 17])
    recorded, plain = samplers(model, slots=8)
    optimizer = SplitAdamW(model.parameters(), lr=1e-2)
    above = model.blocks[1].down.weight.clone()
    for step, layer in enumerate((1, 2)):
        out = recorded.generate(prompts, 4, 16, stop_ids=STOPS, seed=step)
        assert out == plain.generate(prompts, 4, 16, stop_ids=STOPS, seed=step)
        rs = rewarded(prompts, out)
        with torch.no_grad():
            logprobs, _ = policy_logprobs(model, collate(rs, pack=True), 2)
        diff = (logprobs - torch.tensor([x for r in rs for x in r.logprobs])).abs()
        assert diff.mean() < 0.02 and diff.max() < 0.2
        recorded.release()  # its memory is the trainer's
        exact = copy.deepcopy(model).float()
        for m, pack in ((model, None), (exact, False)):
            backward(m, rs, layer, max_tokens=100, pack=pack)
        assert gradients(model).keys() == gradients(exact).keys()
        assert distance(flat(gradients(model)), flat(gradients(exact))) < 0.05
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(above, model.blocks[1].down.weight) == (layer == 1)
    assert kernel["backward"]
