"""The sampler against a forward without a cache: log-probs, greedy tokens, stops, limits, and
independence of what shares the batch.

What needs a GPU is tried here as far as a CPU goes: the kernel's arguments against a plain loop and
against torch's own shape functions, the recording of the step with a stand-in for the graph.
"""

import re
import signal

import pytest
import torch
import torch.nn.functional as F

import rollout
from model import Config, Transformer
from plumbing import kernels
from plumbing.noise import exponential, fold, mix
from rollout import Sampler, race

V, STOPS = 97, (3, 5)


def make(family="qwen3", heads=4, kv=2, std=0.15):
    return Transformer(Config(family, V, 64, 3, heads, kv, 16, 96, tied=True)).init_weights(0, std)


@pytest.fixture(scope="module")
def model():
    return make()


def ragged(lengths=(1, 2, 5, 17, 30, 9, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(6, V, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def forward(model, prompt, ids, T=1.0, n_vocab=V):
    """log softmax of every step, [len(ids), n_vocab], from one forward over the whole sequence."""
    return (
        model.unembed(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1 : -1, :n_vocab] / T
    ).log_softmax(-1)


def worst(model, prompts, out, **kw):
    """Largest difference of the sampler's log-probs from the forward's, and the tokens compared."""
    diffs = [
        (
            forward(model, p, s.ids, **kw).gather(1, torch.tensor(s.ids)[:, None])[:, 0]
            - torch.tensor(s.logprobs)
        )
        .abs()
        .max()
        .item()
        for p, group in zip(prompts, out, strict=True)
        for s in group
        if s.ids
    ]
    return max(diffs), sum(len(s.ids) for group in out for s in group)


@pytest.mark.parametrize("T, n_vocab", [(1.0, V), (0.7, 90)])
@pytest.mark.parametrize("slots, sync", [(8, 16), (3, 1), (40, 7)])
def test_logprobs_equal_a_forward_without_cache(model, T, n_vocab, slots, sync):
    """Ragged prompts, groups, stops, and (with few slots) many refills."""
    prompts = ragged()
    out = Sampler(model, slots, 100, sync=sync).generate(
        prompts, 4, 40, T, STOPS, seed=7, n_vocab=n_vocab
    )
    diff, tokens = worst(model, prompts, out, T=T, n_vocab=n_vocab)
    assert tokens > 500 and diff < 1e-5
    assert any(s.stopped for g in out for s in g) and not all(s.stopped for g in out for s in g)
    for s in (s for g in out for s in g):
        assert (
            max(s.ids) < n_vocab
            and not set(s.ids[:-1]) & set(STOPS)
            and s.stopped == (s.ids[-1] in STOPS)
        )
        assert s.stopped or len(s.ids) == 40


@pytest.mark.parametrize(
    "family, heads, kv", [("llama", 3, 1), ("qwen2", 8, 8), ("mistral", 5, 1), ("qwen3", 6, 2)]
)
def test_families_and_groups_of_heads(family, heads, kv):
    model, prompts = make(family, heads, kv), ragged()
    assert worst(model, prompts, Sampler(model, 8, 64).generate(prompts, 2, 20, seed=1))[0] < 1e-5


def test_greedy_is_the_argmax_of_a_forward(model):
    prompts = ragged()
    for p, (s,) in zip(
        prompts, Sampler(model, 4, 64).generate(prompts, 1, 25, temperature=0), strict=True
    ):
        assert forward(model, p, s.ids).argmax(-1).tolist() == s.ids
    assert (
        worst(model, prompts, Sampler(model, 4, 64).generate(prompts, 1, 25, temperature=0))[0]
        < 1e-5
    )


def test_a_sample_does_not_depend_on_its_neighbours(model):
    """The same (seed, prompt index, sample index) draws the same tokens with other slots, look
    intervals, group sizes and neighbours."""
    prompts = ragged()
    full = Sampler(model, 16, 100).generate(prompts, 4, 40, 1.0, STOPS, seed=7)
    few = Sampler(model, 3, 64 + 7, sync=5).generate(prompts, 4, 40, 1.0, STOPS, seed=7)
    assert [[s.ids for s in g] for g in full] == [[s.ids for s in g] for g in few]
    fewer = Sampler(model, 16, 100).generate(prompts[:2], 2, 40, 1.0, STOPS, seed=7)
    assert [[s.ids for s in g[:2]] for g in full[:2]] == [[s.ids for s in g] for g in fewer]
    # a share of the batch, elsewhere
    part = Sampler(model, 3, 100).generate(prompts[4:], 4, 40, 1.0, STOPS, seed=7, first=4)
    assert [[s.ids for s in g] for g in full[4:]] == [[s.ids for s in g] for g in part]
    wide = Sampler(model, 5, 100, sync=3)
    wide.shrink = False  # dead rows computed too, as on a GPU
    assert [[s.ids for s in g] for g in full] == [
        [s.ids for s in g] for g in wide.generate(prompts, 4, 40, 1.0, STOPS, seed=7)
    ]
    other = Sampler(model, 16, 100).generate(prompts, 4, 40, 1.0, STOPS, seed=8)
    assert (
        sum(
            a.ids == b.ids
            for x, y in zip(full, other, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        < 8
    )
    assert len({tuple(s.ids) for s in full[3]}) == 4


def test_edges(model):
    sampler, prompts = Sampler(model, 4, 32), ragged((3, 31, 1))
    # nothing asked for
    assert [s.ids for g in sampler.generate(prompts, 2, 0) for s in g] == [[]] * 6
    assert sampler.generate([], 2, 5) == []
    out = sampler.generate(prompts, 2, 50)
    # the row is full
    assert [len(s.ids) for s in out[1]] == [1, 1] and [len(s.ids) for s in out[0]] == [29, 29]
    every = sampler.generate(prompts, 9, 5, stop_ids=range(V))  # more samples than slots
    assert all(len(s.ids) == 1 and s.stopped for g in every for s in g)
    # no stop ids
    assert all(not s.stopped for g in sampler.generate(prompts[:1], 3, 5) for s in g)
    # one row, from one token
    assert [len(s.ids) for s in sampler.generate([[7]], 1, 3)[0]] == [3]


def test_every_prompt_has_its_own_limit(model):
    """And a prompt's limit does not change what it draws."""
    prompts, limits = ragged(), [3, 0, 40, 1, 17, 8, 25]
    for slots, sync in ((2, 16), (16, 1)):
        out = Sampler(model, slots, 100, sync=sync).generate(prompts, 2, limits, seed=5)
        assert [[len(s.ids) for s in g] for g in out] == [[n, n] for n in limits]
    whole = Sampler(model, 4, 100).generate(prompts, 2, 40, seed=5)
    assert all(
        a.ids == b.ids[:n]
        for x, y, n in zip(out, whole, limits, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("slots", [1, 3, 5, 64])
def test_a_prompt_is_computed_once_for_all_of_its_samples(model, slots, monkeypatch):
    """Whether they sit together or follow one another, and whatever the token budget of one
    prefill."""
    prompts = ragged()
    sampler = Sampler(model, slots, 100)
    out = sampler.generate(prompts, 5, 20, 1.0, STOPS, seed=2)
    assert sampler.stats["prompt_tokens"] == sum(len(p) - 1 for p in prompts)
    assert worst(model, prompts, out)[0] < 1e-5
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 20)
    calls, prefill = [], sampler.prefill
    sampler.prefill = lambda p, s: calls.append(sum(len(x) - 1 for x in p)) or prefill(p, s)
    assert [[s.ids for s in g] for g in sampler.generate(prompts, 5, 20, 1.0, STOPS, seed=2)] == [
        [s.ids for s in g] for g in out
    ]
    assert (
        sum(calls) == sum(len(p) - 1 for p in prompts)
        and max(calls) == 29
        and all(c <= 20 for c in calls if c != 29)
    )


def test_stats_count_what_was_done(model):
    prompts, limits = ragged(), [4, 8, 12, 16, 20, 24, 28]
    sampler = Sampler(model, 7, 64)
    out = sampler.generate(prompts, 4, limits, seed=1)
    stats = sampler.stats
    assert stats["tokens"] == sum(len(s.ids) for g in out for s in g) == 4 * sum(limits)
    # live rows only, looked at after every step
    assert stats["occupancy"] == 1.0 and stats["recompiles"] == 0
    assert stats["prefill_seconds"] > 0 and stats["decode_seconds"] > 0
    sampler.shrink = False
    sampler.generate(prompts, 4, limits, seed=1)
    assert sampler.stats["occupancy"] == 4 * sum(limits) / (7 * sampler.stats["steps"]) < 1
    sampler.generate(prompts, 4, [0] * 7)
    assert sampler.stats["tokens"] == sampler.stats["steps"] == 0


def test_slots_are_refilled_without_a_lost_step(model):
    """At a fixed width, with four samples a slot and lengths that differ by ten: as many steps as
    if each row were handed on at once, first come first served, though the host looks every 16
    steps at most."""
    limits = torch.randint(10, 100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = Sampler(model, 16, 128, sync=16)
    sampler.shrink = False
    sampler.generate([[7 + i] for i in range(64)], 1, limits)
    ends = [0] * 16
    for n in limits:
        ends[ends.index(min(ends))] += n
    assert sampler.stats["steps"] == max(ends) and sampler.stats["occupancy"] == sum(limits) / (
        16 * max(ends)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_within_one_block_of_steps_and_leaves_it_usable(model, number):
    def interrupt(*_):
        raise KeyboardInterrupt

    prompts, sampler, steps = ragged(), Sampler(model, 4, 100, sync=16), []
    before = sampler.generate(prompts, 2, 30, seed=1)
    step = sampler.run_step

    def counting(*args):
        steps.append(1)
        if len(steps) == 20:
            signal.raise_signal(number)
        step(*args)

    sampler.run_step, old = counting, signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(prompts, 2, 30, seed=1)
    finally:
        signal.signal(number, old)
    assert len(steps) <= 20 + 16
    sampler.run_step = step
    assert [[s.ids for s in g] for g in sampler.generate(prompts, 2, 30, seed=1)] == [
        [s.ids for s in g] for g in before
    ]


@pytest.mark.parametrize(
    "prompts, kw, says",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 32], {}, "leaves no room"),
        ([[1, V]], {}, "outside"),
        ([[-1]], {}, "outside"),
        ([[1]], {"n": 0}, "at least 1"),
        ([[1]], {"temperature": -1.0}, "at least 0"),
        ([[1]], {"n_vocab": V + 1}, "n_vocab"),
        ([[1]], {"max_new_tokens": [3, 4]}, "2 numbers for 1 prompts"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_work(model, prompts, kw, says):
    sampler = Sampler(model, 4, 32)
    with pytest.raises(ValueError, match=says):
        sampler.generate(prompts, **{"max_new_tokens": 4, **kw})
    assert sampler.cache is None
    with pytest.raises(ValueError, match="slot"):
        Sampler(model, 0, 32)


def test_it_reads_the_trained_parameters_themselves():
    model, prompts = make(), ragged()
    sampler = Sampler(model, 8, 64)
    before = sampler.generate(prompts, 2, 10, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    after = sampler.generate(prompts, 2, 10, seed=1)
    assert worst(model, prompts, after)[0] < 1e-5 and worst(model, prompts, before)[0] > 1e-2
    sampler.release()
    assert sampler.cache is None
    assert [s.ids for g in sampler.generate(prompts, 2, 10, seed=1) for s in g] == [
        s.ids for g in after for s in g
    ]


def test_a_broken_model_is_an_error():
    model = make()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match="a sample of prompt 0"):
        Sampler(model, 4, 32).generate([[7, 8]], 1, 5)


@pytest.mark.parametrize("vocab", [50, 97, 96])  # in blocks of 2 tokens, of 1, of 32
def test_race_draws_from_the_softmax(vocab):
    """Chi-square of 200,000 draws, and of pairs of successive draws, each against its expectation;
    4.5 standard deviations of slack."""
    n, z = 200_000, torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    p = z.double().softmax(-1)
    key = torch.tensor([fold(1, i) for i in range(1000)])
    draws = race(
        (z - z.max()).exp().expand(n, vocab),
        key.repeat_interleave(200),
        torch.arange(200).repeat(1000),
    )
    count, expected = torch.bincount(draws, minlength=vocab), n * p
    chi = ((count - expected) ** 2 / expected).sum().item()
    assert expected.min() > 3 and abs(chi - (vocab - 1)) < 4.5 * (2 * (vocab - 1)) ** 0.5
    pairs = torch.zeros(vocab, vocab).index_put_(
        (draws[:-1], draws[1:]), torch.ones(n - 1), accumulate=True
    )
    expected = p[:, None] * p * (n - 1)
    cells = expected > 5
    chi = ((pairs - expected) ** 2 / expected)[cells].sum().item()
    assert abs(chi - cells.sum()) < 4.5 * (2 * cells.sum().item()) ** 0.5


def test_a_sure_token_always_wins():
    """Also where the uniform number rounds to 1: this key scrambles to 0xFFFFFFFF at step 0, and
    another at step 1 of the second race."""
    for key in (2391755741, 140358062):
        weights = torch.zeros(1, 64)
        weights[0, 0] = 1.0
        noise = torch.stack(
            [exponential(64, torch.tensor([key]), torch.tensor([step])) for step in (0, 1)]
        )
        # it is the rare case that this test means to try
        assert noise[:, 0, 0].max() > 16 and noise.isfinite().all()
        # the first of the rest would win if the sure one were barred
        weights[0, 40] = 1e-38
        assert race(weights, torch.tensor([key]), torch.tensor([0])).item() == 0


def test_noise_reaches_improbable_tokens():
    """A token of probability 1e-6 must win a race now and then: float noise of 24 bits would
    already distort it."""
    z = torch.tensor([0.0, -11.0])  # p = 1.67e-5
    wins = (
        race(
            z.exp().repeat(400_000, 1), torch.arange(400_000) * 7919 + 1, torch.arange(400_000) % 13
        )
        .sum()
        .item()
    )
    assert 2 <= wins <= 15  # 6.7 expected


def test_mix_is_a_bijection():
    assert len(set(mix(torch.arange(100_000)).tolist())) == 100_000
    assert mix(12345) == mix(torch.tensor(12345)).item() and fold(1, 2) != fold(2, 1)


# --------------------------------------------------------------------------------------------------
# the GPU's paths, as far as a CPU goes


def packed_attention(q, k, v, q_starts, k_starts, causal, used):
    """What the kernel computes, as a loop over sequences."""
    out = []
    for i in range(len(q_starts) - 1):
        qs, (ks, vs) = (
            q[q_starts[i] : q_starts[i + 1]],
            (t[k_starts[i] : k_starts[i + 1]][: None if used is None else used[i]] for t in (k, v)),
        )
        ks, vs = (
            t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (ks, vs)
        )
        out.append(
            F.scaled_dot_product_attention(qs.transpose(0, 1), ks, vs, is_causal=causal).transpose(
                0, 1
            )
        )
    return torch.cat(out)


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("heads, kv", [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (8, 1)])
def test_the_kernels_arguments(monkeypatch, heads, kv, public):
    """Packed prefill and decoding through the interface of torch's FlashAttention, the kernel
    replaced by a loop."""

    def varlen(
        q, k, v, q_starts, k_starts, max_q, max_k, *, window_size, seqused_k, enable_gqa, num_splits
    ):
        assert num_splits is None or seqused_k is not None and num_splits >= 1
        assert (
            max_q >= q_starts.diff().max()
            and max_k >= k_starts.diff().max()
            and window_size == (-1, 0 if max_q > 1 else -1)
        )
        return packed_attention(q, k, v, q_starts, k_starts, max_q > 1, seqused_k)

    def operator(q, k, v, q_starts, k_starts, max_q, max_k, dropout, causal, debug, *, seqused_k):
        assert not dropout and not debug and causal == (max_q > 1)
        return (packed_attention(q, k, v, q_starts, k_starts, causal, seqused_k),)

    monkeypatch.setattr(kernels, "public_kernel", lambda: varlen if public else None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    monkeypatch.setattr(kernels, "has_flash", lambda *_: True)
    model, prompts = make("qwen3", heads, kv), ragged()
    sampler = Sampler(model, 5, 64, sync=4)
    sampler.shrink = False
    out = sampler.generate(prompts, 2, 20, 1.0, STOPS, seed=1)
    assert sampler.flash and worst(model, prompts, out)[0] < 1e-5


@pytest.mark.parametrize("public", [True, False])
def test_torch_takes_the_kernels_arguments(monkeypatch, public):
    """torch's own shape functions, on tensors that claim to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not public:
        monkeypatch.setattr(kernels, "public_kernel", lambda: None)
    elif not kernels.public_kernel():
        pytest.skip("varlen_attn of this torch takes no live lengths")
    with FakeTensorMode():

        def t(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        starts = t(4, dtype=torch.int32)
        decode = rollout.flash_decode(t(5, dtype=torch.long), 5, 33)
        assert decode(t(5, 6, 64), t(5, 33, 2, 64), t(5, 33, 2, 64)).shape == (5, 6, 64)
        assert kernels.flash(
            t(40, 6, 64), t(40, 2, 64), t(40, 2, 64), starts, starts, 20, 20
        ).shape == (40, 6, 64)


def test_the_step_is_recorded_while_every_row_is_dead(model, monkeypatch):
    """Once, again after `stop`; and replays give what plain steps give."""
    records = []

    class Graph:
        def __init__(self, sampler):
            self.replay = lambda: sampler.run_step(sampler.slots, sampler.max_len)

    def record(sampler):
        assert not sampler.state[5].any()
        before = [t.clone() for pair in sampler.cache for t in pair]
        for _ in range(3):
            sampler.run_step(sampler.slots, sampler.max_len)
        assert all(
            torch.equal(a[:, :-1], b[:, :-1])
            for a, b in zip(before, (t for pair in sampler.cache for t in pair), strict=True)
        )
        records.append(sampler)
        return Graph(sampler)

    monkeypatch.setattr(Sampler, "record", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    prompts, sampler = ragged(), Sampler(model, 4, 64, sync=16)
    sampler.capture, sampler.shrink = True, False
    for _ in range(2):
        out = sampler.generate(prompts, 3, 20, 1.0, STOPS, seed=3)
    plain = Sampler(model, 4, 64).generate(prompts, 3, 20, 1.0, STOPS, seed=3)
    assert [[s.ids for s in g] for g in plain] == [[s.ids for s in g] for g in out]
    sampler.generate(prompts, 1, 5, temperature=0)
    # temperature, stops and greed are data, not another graph
    assert len(records) == 1
    sampler.release()
    assert sampler.graph is None and sampler.cache is None and sampler.net is None
    sampler.generate(prompts, 1, 5)
    assert len(records) == 2
    sampler.state[5], sampler.graph = 1, None  # as an interrupted call leaves it
    sampler.generate(prompts, 1, 5)
    assert len(records) == 3


@pytest.mark.parametrize("fault", ["rows never end", "rows draw nothing"])
def test_a_sampler_that_makes_no_progress_ends(model, monkeypatch, fault):
    """A wrong step must not hang whoever changes it: the loop is bounded by the tokens that are
    possible."""
    real = Sampler.step

    def step(sampler, width, *rest):
        before = sampler.state.clone()
        real(sampler, width, *rest)
        if fault == "rows draw nothing":
            sampler.state.copy_(before)
        sampler.state[5, :width] = 1  # alive
        sampler.state[2, :width] = before[2, :width]

    monkeypatch.setattr(Sampler, "step", step)
    with pytest.raises(RuntimeError, match="does not come to an end"):
        Sampler(model, 3, 64).generate(ragged()[:3], 1, 5, 1.0, STOPS, seed=1)


def test_where_nothing_can_be_compiled_sampling_goes_on(model, monkeypatch, capsys):
    """A machine without a C compiler: one line, and the plain step's tokens."""
    from torch._inductor.exc import InductorError

    plain = Sampler(model, 3, 64).generate(ragged()[:3], 1, 5, 1.0, STOPS, seed=1)
    sampler = Sampler(model, 3, 64, compile=True)

    def no_compiler(*args):
        raise InductorError(RuntimeError("no C compiler\nfound"), None)

    sampler.allocate()
    sampler.run_step = no_compiler
    sampler.try_to_compile()
    err = capsys.readouterr().err
    assert "cannot be compiled here" in err and err.count("\n") == 1
    again = sampler.generate(ragged()[:3], 1, 5, 1.0, STOPS, seed=1)
    assert [[s.ids for s in g] for g in again] == [[s.ids for s in g] for g in plain]


@pytest.mark.slow
def test_compiled(model):
    """Equal to eager; one graph and no recompile whatever a call asks for; and the KV is written in
    place: the generated code takes no buffer of the size of a cache."""
    from torch._inductor.utils import run_and_get_code

    prompts, B, S = ragged(), 13, 77
    sampler, eager = Sampler(model, B, S, compile=True, sync=4), Sampler(model, 8, 100)
    out, code = run_and_get_code(lambda: sampler.generate(prompts, 3, 40, 1.0, STOPS, seed=3))
    assert worst(model, prompts, out)[0] < 1e-5
    assert [[s.ids for s in g] for g in out] == [
        [s.ids for s in g] for g in eager.generate(prompts, 3, 40, 1.0, STOPS, seed=3)
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        more = sampler.generate(prompts * 6, 2, 30, 0.8, (7, 8, 9), seed=4, n_vocab=90)
        greedy = sampler.generate(prompts[:2], 1, 9, temperature=0)
        sampler.release()
        sampler.generate(prompts[:1], 1, 3)
    assert (
        sum(len(s.ids) for g in more for s in g) > 500
        and worst(model, prompts * 6, more, T=0.8, n_vocab=90)[0] < 1e-5
    )
    assert all(
        forward(model, p, s.ids).argmax(-1).tolist() == s.ids
        for p, (s,) in zip(prompts, greedy, strict=False)
    )
    assert len(code) == 1 and sampler.stats["recompiles"] == 0
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code[0])
    sizes, c = (
        [torch.Size(int(d) for d in re.findall(r"\d+", shape)).numel() for shape in shapes],
        model.config,
    )
    assert len(sizes) > 5 and max(sizes) < B * S * c.n_kv_heads * c.head_dim
