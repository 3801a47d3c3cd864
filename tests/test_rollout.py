"""The sampler against a forward without a cache: log-probs, greedy tokens, stops, limits, and independence of what shares the batch."""
import pytest
import torch

from model import Config, Transformer
from rollout import Sampler, fold, mix, race

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
    return (model.unembed(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1:-1, :n_vocab] / T).log_softmax(-1)


def worst(model, prompts, out, **kw):
    """Largest difference of the sampler's log-probs from the forward's, and the tokens compared."""
    diffs = [(forward(model, p, s.ids, **kw).gather(1, torch.tensor(s.ids)[:, None])[:, 0] - torch.tensor(s.logprobs)).abs().max().item()
             for p, group in zip(prompts, out, strict=True) for s in group if s.ids]
    return max(diffs), sum(len(s.ids) for group in out for s in group)


@pytest.mark.parametrize("T, n_vocab", [(1.0, V), (0.7, 90)])
@pytest.mark.parametrize("slots, sync", [(8, 16), (3, 1), (40, 7)])
def test_logprobs_equal_a_forward_without_cache(model, T, n_vocab, slots, sync):
    """Ragged prompts, groups, stops, and (with few slots) many refills."""
    prompts = ragged()
    out = Sampler(model, slots, 100, sync=sync).generate(prompts, 4, 40, T, STOPS, seed=7, n_vocab=n_vocab)
    diff, tokens = worst(model, prompts, out, T=T, n_vocab=n_vocab)
    assert tokens > 500 and diff < 1e-5
    assert any(s.stopped for g in out for s in g) and not all(s.stopped for g in out for s in g)
    for s in (s for g in out for s in g):
        assert max(s.ids) < n_vocab and not set(s.ids[:-1]) & set(STOPS) and s.stopped == (s.ids[-1] in STOPS)
        assert s.stopped or len(s.ids) == 40


@pytest.mark.parametrize("family, heads, kv", [("llama", 3, 1), ("qwen2", 8, 8), ("mistral", 5, 1), ("qwen3", 6, 2)])
def test_families_and_groups_of_heads(family, heads, kv):
    model, prompts = make(family, heads, kv), ragged()
    assert worst(model, prompts, Sampler(model, 8, 64).generate(prompts, 2, 20, seed=1))[0] < 1e-5


def test_greedy_is_the_argmax_of_a_forward(model):
    prompts = ragged()
    for p, (s,) in zip(prompts, Sampler(model, 4, 64).generate(prompts, 1, 25, temperature=0), strict=True):
        assert forward(model, p, s.ids).argmax(-1).tolist() == s.ids
    assert worst(model, prompts, Sampler(model, 4, 64).generate(prompts, 1, 25, temperature=0))[0] < 1e-5


def test_a_sample_does_not_depend_on_its_neighbours(model):
    """The same (seed, prompt index, sample index) draws the same tokens with other slots, look intervals, group sizes and neighbours."""
    prompts = ragged()
    full = Sampler(model, 16, 100).generate(prompts, 4, 40, 1.0, STOPS, seed=7)
    few = Sampler(model, 3, 64 + 7, sync=5).generate(prompts, 4, 40, 1.0, STOPS, seed=7)
    assert [[s.ids for s in g] for g in full] == [[s.ids for s in g] for g in few]
    fewer = Sampler(model, 16, 100).generate(prompts[:2], 2, 40, 1.0, STOPS, seed=7)
    assert [[s.ids for s in g[:2]] for g in full[:2]] == [[s.ids for s in g] for g in fewer]
    other = Sampler(model, 16, 100).generate(prompts, 4, 40, 1.0, STOPS, seed=8)
    assert sum(a.ids == b.ids for x, y in zip(full, other, strict=True) for a, b in zip(x, y, strict=True)) < 8
    assert len({tuple(s.ids) for s in full[3]}) == 4


def test_edges(model):
    sampler, prompts = Sampler(model, 4, 32), ragged((3, 31, 1))
    assert [s.ids for g in sampler.generate(prompts, 2, 0) for s in g] == [[]] * 6   # nothing asked for
    assert sampler.generate([], 2, 5) == []
    out = sampler.generate(prompts, 2, 50)
    assert [len(s.ids) for s in out[1]] == [1, 1] and [len(s.ids) for s in out[0]] == [29, 29]        # the row is full
    every = sampler.generate(prompts, 9, 5, stop_ids=range(V))   # more samples than slots
    assert all(len(s.ids) == 1 and s.stopped for g in every for s in g)
    assert all(not s.stopped for g in sampler.generate(prompts[:1], 3, 5) for s in g)         # no stop ids


@pytest.mark.parametrize("prompts, kw, says", [([[1], []], {}, "prompt 1 is empty"), ([[1] * 32], {}, "leaves no room"),
                                               ([[1, V]], {}, "outside"), ([[-1]], {}, "outside"), ([[1]], {"n": 0}, "at least 1"),
                                               ([[1]], {"temperature": -1.0}, "at least 0")])
def test_what_cannot_be_sampled_is_refused_before_any_work(model, prompts, kw, says):
    sampler = Sampler(model, 4, 32)
    with pytest.raises(ValueError, match=says): sampler.generate(prompts, max_new_tokens=4, **kw)
    assert sampler.cache is None
    with pytest.raises(ValueError, match="slot"): Sampler(model, 0, 32)


def test_it_reads_the_trained_parameters_themselves():
    model, prompts = make(), ragged()
    sampler = Sampler(model, 8, 64)
    before = sampler.generate(prompts, 2, 10, seed=1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    after = sampler.generate(prompts, 2, 10, seed=1)
    assert worst(model, prompts, after)[0] < 1e-5 and worst(model, prompts, before)[0] > 1e-2
    sampler.stop()
    assert sampler.cache is None
    assert [s.ids for g in sampler.generate(prompts, 2, 10, seed=1) for s in g] == [s.ids for g in after for s in g]


def test_race_draws_from_the_softmax():
    """Chi-square of 200,000 draws, and of pairs of successive draws, each against its expectation; 4.5 standard deviations of slack."""
    n, z = 200_000, torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    p = z.double().softmax(-1)
    key = torch.tensor([fold(1, i) for i in range(1000)])
    draws = race(z.expand(n, 50), key.repeat_interleave(200), torch.arange(200).repeat(1000))
    count = torch.bincount(draws, minlength=50)
    chi = ((count - n * p) ** 2 / (n * p)).sum().item()
    assert abs(chi - 49) < 4.5 * (2 * 49) ** 0.5
    pairs = torch.zeros(50, 50).index_put_((draws[:-1], draws[1:]), torch.ones(n - 1), accumulate=True)
    expected = p[:, None] * p * (n - 1)
    cells = expected > 5
    chi = ((pairs - expected) ** 2 / expected)[cells].sum().item()
    assert abs(chi - cells.sum()) < 4.5 * (2 * cells.sum().item()) ** 0.5


def test_noise_reaches_improbable_tokens():
    """A token of probability 1e-6 must win a race now and then: float noise of 24 bits would already distort it."""
    z = torch.tensor([0.0, -11.0])                    # p = 1.67e-5
    wins = race(z.expand(400_000, 2), torch.arange(400_000) * 7919 + 1, torch.arange(400_000) % 13).sum().item()
    assert 2 <= wins <= 15                            # 6.7 expected


def test_mix_is_a_bijection():
    assert len(set(mix(torch.arange(100_000)).tolist())) == 100_000
    assert mix(12345) == mix(torch.tensor(12345)).item() and fold(1, 2) != fold(2, 1)


@pytest.mark.slow
def test_compiled_equals_eager(model):
    prompts = ragged()
    eager = Sampler(model, 8, 64).generate(prompts, 2, 20, 1.0, STOPS, seed=3)
    compiled = Sampler(model, 8, 64, compile=True).generate(prompts, 2, 20, 1.0, STOPS, seed=3)
    assert [[s.ids for s in g] for g in eager] == [[s.ids for s in g] for g in compiled]
    assert worst(model, prompts, compiled)[0] < 1e-5
