"""The phase schedule, and the identities of the internal policy's gradient."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from policies import backward, policy, policy_logprobs, stored_logprobs

from bupo import Schedule, align, is_over, js_estimate, look
from grpo import Response, collate, group_advantages, mask_certain, policy_loss
from model import Config, Transformer
from plumbing import kernels
from plumbing.metrics import forward_flops

L, END = 4, 3
CONFIG = Config(
    "qwen3",
    vocab_size=50,
    d_model=32,
    n_layers=L,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    tied=True,
)


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(0, std=0.1)


@pytest.fixture
def responses():
    """Four groups of four with mixed rewards, ragged prompts and lengths."""
    g = torch.Generator().manual_seed(1)
    out = []
    for advantages in group_advantages(
        torch.randint(0, 2, (4, 4), generator=g).float() + torch.tensor([1.0, 0, 0, 0])
    ).tolist():
        prompt = torch.randint(
            4, 50, (int(torch.randint(1, 7, (1,), generator=g)),), generator=g
        ).tolist()
        for a in advantages:
            n = int(torch.randint(0, 12, (1,), generator=g))
            ids = [*torch.randint(4, 50, (n,), generator=g).tolist(), END]
            out.append(Response(prompt, ids, [0.0] * len(ids), advantage=a))
    return out


def grads(model, responses, layer=L, max_tokens=10**6, **kw):
    model.zero_grad()
    backward(model, responses, layer, max_tokens, **kw)
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def store(model, responses, layer, name="old_logprobs", max_tokens=64):
    for r, logprobs in zip(
        responses, stored_logprobs(model, responses, layer, max_tokens), strict=True
    ):
        getattr(r, name)[layer] = logprobs


def close(a, b, rel=1e-6):
    """The same parameters have a gradient, and the two gradients are no further apart than rel of
    their norm."""
    if [n for n in a if a[n] is None] != [n for n in b if b[n] is None]:
        return False
    apart, norm = (
        sum(x.square().sum() for x in xs if x is not None).sqrt()
        for xs in ([a[n] if b[n] is None else a[n] - b[n] for n in a], b.values())
    )
    return bool(apart <= rel * norm)


# -- schedule


def test_schedule():
    s = Schedule.parse("6,26", "20,10", 36)
    assert [s.layers_at(t) for t in (1, 20, 21, 30, 31, 10**6)] == [
        (6,),
        (6,),
        (26,),
        (26,),
        (36,),
        (36,),
    ]
    assert str(s) == "bupo layer 6 for 20 steps, then bupo layer 26 for 10 steps, then grpo"
    for layers in ("none", "", "36"):
        assert Schedule.parse(layers, "30", 36).layers_at(1) == (36,)
    assert Schedule.parse("6", "0", 36).layers_at(1) == (36,)
    down = Schedule.parse("36,6", "3,2", 36)  # any order: here top down
    assert [down.layers_at(t) for t in (3, 4, 5, 6)] == [(36,), (6,), (6,), (36,)]
    both = Schedule.parse("6+36,7", "2,1", 36)
    assert [both.layers_at(t) for t in (1, 2, 3, 4)] == [(6, 36), (6, 36), (7,), (36,)]
    assert str(both) == "bupo layer 6+36 for 2 steps, then bupo layer 7 for 1 step, then grpo"


@pytest.mark.parametrize(
    "layers, steps, says",
    [
        ("37", "30", "layers 1 to 36"),
        ("0", "30", "layers 1 to 36"),
        ("-1", "3", "layers 1 to 36"),
        ("x", "30", "whole numbers"),
        ("6none", "30", "whole numbers"),
        ("6", "none", "whole numbers"),
        ("6", "1.5", "whole numbers"),
        ("6,6", "1,1", "make it one"),
        ("6+6", "1", "twice"),
        ("6,26", "auto", "2 BuPO layers"),
        ("6,26", "20", "2 BuPO layers"),
        ("6", "-2", "negative"),
    ],
)
def test_schedule_refuses_in_one_line(layers, steps, says):
    with pytest.raises(ValueError, match=says) as e:
        Schedule.parse(layers, steps, 36)
    assert "\n" not in str(e.value)


def guard_rows(agreement, forgotten=()):
    forgotten = [*forgotten, *[-1.0] * (len(agreement) - len(forgotten))]
    return [
        {"guard/agreement": a, "guard/forgotten": f}
        for a, f in zip(agreement, forgotten, strict=True)
    ]


def test_an_internal_phase_of_auto_ends_by_its_rows():
    s = Schedule.parse("2", "auto", L)
    assert str(s) == "bupo layer 2 as long as it helps, then grpo"
    growing = guard_rows([-5, -4, -3, -2, -1])
    assert s.layers_at(6, growing) == (2,) and s.layers_at(10**6, growing) == (2,)
    # three steps without a new best
    stalled = guard_rows([-5, -1, -2, -2, -2])
    assert s.layers_at(5, stalled[:4]) == (2,) and s.layers_at(6, stalled) == (L,)
    # the mean of the last three is what counts
    assert not is_over(guard_rows([-5, -4, -3, -2], [0, 1.0, -2.0, 0.5]))
    assert is_over(guard_rows([-5, -4, -3, -2], [0, 1.0, -1.0, 0.5]))
    # and it stays over: rows of later steps say nothing of it
    assert s.layers_at(9, [*stalled, {"step": 6}, {"step": 7}]) == (L,)
    assert not is_over(stalled[:3]) and not is_over([])


def test_what_the_guard_looks_at_by_hand(model, responses):
    drawn = [torch.rand(len(r.ids)) - 3 for r in responses]
    for r, logprobs in zip(responses, drawn, strict=True):
        r.logprobs = logprobs.tolist()
    seen = look(policy(model, 2), policy(model, L), responses, 60)
    now, inner = (torch.cat(stored_logprobs(model, responses, layer, 60)) for layer in (L, 2))
    assert seen["guard/forgotten"] == pytest.approx(
        (torch.cat(drawn) - now).mean().item(), abs=1e-5
    )
    assert seen["guard/agreement"] == pytest.approx((inner - now).mean().item(), abs=1e-5)


# -- identities


@pytest.mark.parametrize("layer", [1, 2, L])
@pytest.mark.parametrize("tied", [True, False])
def test_internal_policy_equals_its_definition(layer, tied, responses):
    """log softmax(H^l E_u^T / T) from the residual stream in float64, no norm below L."""
    config = copy.copy(CONFIG)
    config.tied = tied
    model = Transformer(config).init_weights(0, std=0.2)
    batch = collate(responses)
    logprobs, entropy = policy_logprobs(model, batch, layer, temperature=0.7, chunk=5)
    wide = copy.deepcopy(model).double()
    h = wide.residuals(batch.ids).resid_post[layer - 1]
    z = (wide.norm(h) if layer == L else h) @ wide.unembedding.T / 0.7
    lp = z.log_softmax(-1).flatten(0, 1)[batch.positions]
    assert (logprobs - lp.gather(1, batch.targets[:, None])[:, 0]).abs().max() < 1e-5
    assert (entropy + (lp.exp() * lp).sum(-1)).abs().max() < 1e-5
    if layer < L:
        assert (
            policy_logprobs(model, batch, layer, 0.7, norm="final")[0] - logprobs
        ).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [1, 2, L])
def test_gradient_equals_the_naive_loss(model, responses, layer):
    """The whole mini-batch at once, full logits, autograd: the same gradient as micro-batches of
    recomputed chunks."""
    store(model, responses, layer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ours = grads(model, responses, layer, max_tokens=40, chunk=3)
    batch = collate(responses)
    h = model(batch.ids, until=layer)
    lp = (
        model.unembed(h, layer)
        .log_softmax(-1)
        .flatten(0, 1)[batch.positions]
        .gather(1, batch.targets[:, None])[:, 0]
    )
    loss, low, high = policy_loss(
        lp, torch.cat([r.old_logprobs[layer] for r in responses]), batch.advantages
    )
    # the weights have moved far enough for both clips to matter
    assert low.any() and high.any()
    model.zero_grad()
    (loss.sum() / len(batch.positions)).backward()
    # two float32 computations in different orders
    assert close(ours, {n: p.grad for n, p in model.named_parameters()}, rel=2e-6)


@pytest.mark.parametrize("layer", [2, L])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_equals_padded(model, responses, layer, recompute):
    """End to end in one row, each response at its own positions and blind to the others: the same
    log-probs and gradients."""
    model.recompute = recompute
    padded, packed = (
        policy_logprobs(model, collate(responses, pack=pack), layer) for pack in (False, True)
    )
    assert max((a - b).abs().max() for a, b in zip(padded, packed, strict=True)) < 1e-5
    store(model, responses, layer)
    assert close(
        grads(model, responses, layer, 40, pack=True), grads(model, responses, layer, pack=False)
    )


def test_where_the_kernel_serves_responses_are_packed(model, responses, monkeypatch):
    """The kernel replaced by a loop that has a gradient: `cut` packs by itself, and old and new
    log-probs stay those of padded rows."""
    calls, plain = [], grads(model, responses)
    before = stored_logprobs(model, responses, L, 64)

    def flash(q, k, v, q_starts, k_starts, max_q, max_k, used=None):
        calls.append(q_starts.tolist())
        assert (
            q_starts is k_starts
            and used is None
            and max_q == max_k == q_starts.diff().max()
            and q_starts.dtype == torch.int32
        )
        parts = [
            [t[a:b].transpose(0, 1) for t in (q, *(t.repeat_interleave(2, 1) for t in (k, v)))]
            for a, b in pairwise(q_starts)
        ]
        return torch.cat(
            [F.scaled_dot_product_attention(*p, is_causal=True).transpose(0, 1) for p in parts]
        )

    monkeypatch.setattr(kernels, "flash", flash)
    monkeypatch.setattr(kernels, "has_flash", lambda *_: True)
    assert close(grads(model, responses, max_tokens=64), plain) and calls
    after = stored_logprobs(model, responses, L, 64)
    assert max((a - b).abs().max() for a, b in zip(before, after, strict=True)) < 1e-5
    assert all(starts[-1] <= 64 for starts in calls)


def test_compiled_blocks_are_the_same_blocks(model, responses):
    """Gradients of eager blocks, for batches of any size, and no graph more after the first two
    sizes."""
    compiled = copy.deepcopy(model)
    kernels.compile_blocks(compiled)
    for n in (16, 9):
        assert close(
            grads(compiled, responses[:n], 2, pack=False), grads(model, responses[:n], 2)
        ), n
    with torch.compiler.set_stance("fail_on_recompile"):
        assert close(grads(compiled, responses[:13], pack=False), grads(model, responses[:13]))
    assert compiled.state_dict().keys() == model.state_dict().keys()


def test_forward_flops(model, responses, monkeypatch):
    """What torch counts of the products (of those by oneDNN it counts none), and attention over all
    pairs of a token and one before it by hand."""
    monkeypatch.setattr(kernels, "ONEDNN", False)
    from torch.utils.flop_counter import FlopCounterMode

    some = [
        r
        for r in responses
        if len(r.prompt) + len(r.ids) == len(responses[0].prompt) + len(responses[0].ids)
    ]
    n = len(some[0].prompt) + len(some[0].ids)
    with FlopCounterMode(display=False) as counter:
        policy_logprobs(model, collate(some), 2)
    products = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    norms = sum(p.numel() for block in model.blocks[:2] for p in block.parameters() if p.dim() == 1)
    ours, pairs = forward_flops(model, some, 2), len(some) * n * n / 2
    assert (
        ours
        == products
        + 2 * norms * n * len(some)
        + 2 * 2 * 2 * pairs * CONFIG.n_heads * CONFIG.head_dim
    )


def test_blocks_above_the_layer_are_left_alone(model, responses):
    """Gradient None, not zero: AdamW, with decay and with old moments, does not touch blocks above
    l, nor the final norm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    grads(model, responses)  # one whole-model step, so that moments exist
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    moments = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
    }
    g = grads(model, responses, layer=2)
    optimizer.step()
    above = [n for n in g if n.startswith(("blocks.2.", "blocks.3.", "norm."))]
    assert len(above) > 10
    for n, p in model.named_parameters():
        same = torch.equal(p, before[n]) and all(
            torch.equal(v, moments[n][k]) for k, v in optimizer.state[p].items()
        )
        assert (g[n] is None) == same == (n in above), n


def test_bupo_at_layer_L_is_grpo_bit_for_bit(model, responses):
    """--bupo-layer L takes no other path: loss, gradients and weights after a step are those of
    plain GRPO."""
    results = []
    for layers in ("", str(L)):
        m = copy.deepcopy(model)
        rs = copy.deepcopy(responses)
        (layer,) = Schedule.parse(layers, "30", L).layers_at(1)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        store(m, rs, layer)
        seen = backward(m, rs, layer, 64)
        g = [p.grad.clone() for p in m.parameters()]
        optimizer.step()
        results.append((seen["loss"], g, list(m.parameters())))
    assert results[0][0] == results[1][0]
    assert all(
        torch.equal(a, b) for k in (1, 2) for a, b in zip(results[0][k], results[1][k], strict=True)
    )


VARIANTS = [
    {},
    {"weighting": "seq-mean"},
    {"weighting": "dr_grpo", "limit": 20},
    {"clip_high": 0.28},
    {"kl": 0.1},
    {"tis": 2.0},
    {"objective": "cispo"},
    {"objective": "gspo", "clip_low": 0.01, "clip_high": 0.01},
    {"objective": "dppo"},
]


@pytest.mark.parametrize("layer", [2, L])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_does_not_depend_on_split_or_order(model, responses, layer, variant):
    other = copy.deepcopy(model).init_weights(1, std=0.2)
    store(model, responses, layer)
    store(other, responses, layer, "ref_logprobs")
    whole = grads(model, responses, layer, **variant)
    assert any(g is not None and g.norm() > 1e-3 for g in whole.values())
    for max_tokens in (1, 17, 60, 150):
        assert close(grads(model, responses, layer, max_tokens, **variant), whole)
    order = torch.randperm(len(responses), generator=torch.Generator().manual_seed(3)).tolist()
    assert close(grads(model, [responses[i] for i in order], layer, 60, **variant), whole)


@pytest.mark.parametrize("layer", [2, L])
def test_recomputed_blocks_give_the_same_gradient_bit_for_bit(model, responses, layer):
    kept, ran = grads(model, responses, layer), []
    model.recompute = True
    hooks = [
        b.mlp_norm.register_forward_hook(lambda *a, l=b.layer: ran.append(l)) for b in model.blocks
    ]
    again = grads(model, responses, layer)
    for h in hooks:
        h.remove()
    # each block forward, and once more in the backward
    assert sorted(ran) == sorted([*range(1, layer + 1)] * 2)
    assert all(
        (a is None) == (again[n] is None) and (a is None or torch.equal(a, again[n]))
        for n, a in kept.items()
    )


def test_loss_variants_by_hand(model):
    """Two responses of 2 and 6 tokens with advantages +1 and -1 at ratio 1: the surrogate is -A at
    every token."""
    pair = [
        Response([5], [6] * 2, [0.0] * 2, advantage=1.0),
        Response([5], [7] * 6, [0.0] * 6, advantage=-1.0),
    ]
    for kind, by_hand in (
        ("token-mean", (-2 + 6) / 8),
        ("seq-mean", (-1 + 1) / 2),
        ("dr_grpo", (-2 + 6) / (2 * 10)),
    ):
        assert backward(model, pair, L, 4, weighting=kind, limit=10)["loss"] == pytest.approx(
            by_hand, abs=1e-6
        ), kind


def test_kl_term_by_hand(model):
    """With all advantages 0 the loss is kl times the mean k3 of the two policies, at the layer that
    is trained."""
    other, r = (
        copy.deepcopy(model).init_weights(1, std=0.2),
        Response([5], [6, 7, 8], [0.0] * 3, advantage=0.0),
    )
    for layer in (2, L):
        store(other, [r], layer, "ref_logprobs")
        d = r.ref_logprobs[layer] - policy_logprobs(model, collate([r]), layer)[0]
        assert backward(model, [r], layer, 99, kl=0.3)["loss"] == pytest.approx(
            0.3 * (d.exp() - d - 1).mean().item(), rel=1e-5
        )


def test_truncated_importance_sampling_by_hand(model):
    """The surrogate of each token times min(pi / pi_sampler, 2), at the model's own layer only."""
    r = Response([5], [6, 7, 8], [0.0] * 3, advantage=1.0)
    logprobs = policy_logprobs(model, collate([r]), L)[0].detach()
    r.logprobs = (logprobs - torch.tensor([0.0, 0.5, 3.0])).tolist()
    assert backward(model, [r], L, 99, tis=2.0)["loss"] == pytest.approx(
        -(1 + 1.64872 + 2) / 3, abs=1e-4
    )
    assert backward(model, [r], 2, 99, tis=2.0)["loss"] == pytest.approx(-1, abs=1e-6)


def test_gspo_has_the_ratio_of_whole_responses(model):
    """exp of the mean log-ratio, the same at every token: of responses of 2 and 3 tokens whose old
    log-probs are lower by these."""
    moved = [[0.1, 0.3], [0.3, -0.3, 0.0]]
    pair = [Response([5], [6] * len(d), advantage=1.0) for d in moved]
    for layer in (2, L):
        store(model, pair, layer)
        for r, d in zip(pair, moved, strict=True):
            r.old_logprobs[layer] -= torch.tensor(d)
        value = backward(model, pair, layer, 99, objective="gspo", clip_high=0.5)["loss"]
        assert value == pytest.approx(-(2 * math.exp(0.2) + 3 * 1) / 5, abs=1e-6)
        # the first response is beyond a clip at 1.1, the second is not
        assert backward(model, pair, layer, 99, objective="gspo", clip_high=0.1)["clip_high"] == 2


def test_only_the_most_uncertain_tokens_learn(model, responses):
    """A fifth of all tokens of the mini-batch, however it is cut; the rest has no gradient, and
    what a token weighs stays."""
    masked = [r for r in responses if r.ids]
    for who, n in ((L, 0.2), (2, 0.5)):  # the entropy may be another layer's
        for max_tokens in (10**6, 17):
            mask_certain(policy(model, who), masked, n, max_tokens)
            entropy = policy_logprobs(model, collate(masked), who)[1]
            mask = torch.cat([r.mask for r in masked])
            assert mask.sum() == round(n * len(mask))
            assert entropy[mask == 1].min() >= entropy[mask == 0].max()
        some = grads(model, masked, L, 60)
        advantages = collate(masked).advantages
        loss = -(policy_logprobs(model, collate(masked), L)[0] * advantages * mask).sum()
        model.zero_grad()
        (loss / len(mask)).backward()
        assert close(some, {n: p.grad for n, p in model.named_parameters()}, 1e-5)


def test_self_distillation_by_hand(model, responses):
    """The gradient of coefficient * mean A d, d the Jensen-Shannon divergence at the sampled token;
    blocks above the layer learn nothing."""
    responses = [r for r in responses if r.ids]
    for r, logprobs in zip(responses, stored_logprobs(model, responses, L, 60), strict=True):
        r.logprobs = logprobs.tolist()
    model.zero_grad()
    align(policy(model, 2), responses, 30, 0.5)
    got = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    batch = collate(responses)
    q = policy_logprobs(model, batch, 2)[0].exp()
    p = torch.tensor([x for r in responses for x in r.logprobs]).exp()
    m = (p + q) / 2
    d = ((p / m).log() + q / p * (q / m).log()) / 2
    model.zero_grad()
    (0.5 * (batch.advantages * d).mean()).backward()
    assert close(got, {n: w.grad for n, w in model.named_parameters()}, 1e-4)
    assert all(
        (got[n] is None) == ("blocks.2" in n or "blocks.3" in n or n == "norm.weight") for n in got
    )


def test_the_estimate_of_the_divergence_has_its_mean():
    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    m = (p + q) / 2
    exact = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    estimates = js_estimate(q.log() - p.log())
    assert (p * estimates).sum().item() == pytest.approx(exact.item(), rel=1e-9)
    assert estimates.min() >= 0 and js_estimate(torch.zeros(1)) == 0


@pytest.mark.parametrize("layer", [2, 3])
def test_with_rms_no_scale_of_the_state_matters(model, responses, layer):
    batch = collate(responses)
    h = model(batch.ids, until=layer).flatten(0, -2)[batch.positions]
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + CONFIG.norm_eps)
    by_hand = F.log_softmax(h @ model.unembedding.T, -1).gather(1, batch.targets[:, None])[:, 0]
    got, _ = policy_logprobs(model, batch, layer, norm="rms")
    assert torch.allclose(got, by_hand, atol=1e-5)
    # at L it is the model's own policy
    assert torch.equal(
        policy_logprobs(model, batch, L, norm="rms")[0], policy_logprobs(model, batch, L)[0]
    )


def test_long_and_short_weigh_the_same_by_token(model):
    """Token mean over the mini-batch: the loss is the mean over all tokens, not the mean of the
    responses' means."""
    short, long = (
        Response([5], [6] * 2, [0.0] * 2, advantage=1.0),
        Response([5], [7] * 20, [0.0] * 20, advantage=-1.0),
    )
    assert backward(model, [short, long], L, 10)["loss"] == pytest.approx((-2 + 20) / 22, abs=1e-6)


def test_equal_rewards_change_no_weight(model, responses):
    for r in responses:
        r.advantage = 0.0
    assert all(g is None or not g.any() for g in grads(model, responses).values())


def test_the_stop_token_is_trained(model):
    """The gradient pushes the stop token's log-prob up when the response was good: the loss
    includes it, whatever its id."""
    r = Response([5, END, 6], [7, END], [0.0, 0.0], advantage=1.0)
    before = policy_logprobs(model, collate([r]), L)[0][-1].item()
    grads(model, [r])
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert policy_logprobs(model, collate([r]), L)[0][-1].item() > before
    # and only response tokens are: changing the prompt's targets is changing nothing in the loss
    assert collate([r]).targets.tolist() == [7, END]


def test_ids_beyond_the_vocabulary_have_no_probability(model, responses):
    batch = collate(responses)
    masked, _ = policy_logprobs(model, batch, L, n_vocab=50)
    # rows that no token uses must not matter
    with torch.no_grad():
        model.embed.weight[48:] += 1.0
    for r in responses:
        r.ids = [min(i, 47) for i in r.ids]
    batch = collate(responses)
    used, _ = policy_logprobs(model, batch, L, n_vocab=48)
    with torch.no_grad():
        model.embed.weight[48:] *= -3.0
    changed = policy_logprobs(model, batch, L, n_vocab=48)[0]
    assert (
        torch.equal(used, changed)
        and not torch.equal(used, policy_logprobs(model, batch, L)[0])
        and masked.isfinite().all()
    )


def test_empty_responses_and_rows(model):
    """A response of no tokens (a limit of zero) adds nothing and divides by nothing."""
    some = Response([5], [6, 7], [0.0, 0.0], advantage=1.0)
    alone = grads(model, [some])
    assert close(grads(model, [some, Response([9], [], [], advantage=-1.0)]), alone)
