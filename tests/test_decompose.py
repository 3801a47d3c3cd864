"""The lens against naive computations: transformers with hooks and full logits, float64, and closed
forms."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import decompose
import tiny as embedded
from decompose import (
    attribute,
    auto_layer,
    bupo_layer,
    entropy_change,
    failure_signs,
    measure,
    measure_all,
    pattern,
    pick,
    reduce_logits,
)
from model import Config, Transformer
from plumbing.cli import guarded
from plumbing.data import Problem
from plumbing.hub import load_model, save_model
from tools import plot

SHAPE = dict(
    vocab_size=101,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    max_len=64,
)


def tiny(family="qwen3", tied=False, dtype=torch.float32, std=0.3, **changes):
    """A random model loud enough (std 0.3) that its internal policies are far from uniform, with
    gains that are not all 1."""
    model = Transformer(Config(family, tied=tied, **{**SHAPE, **changes})).init_weights(
        seed=1, std=std
    )
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.5 + torch.rand(p.shape, generator=g))
            elif name.endswith("bias"):
                p.normal_(0, 0.5, generator=g)
    return model.to(dtype)


def tokens(*shape, seed=0):
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol):
    np.testing.assert_allclose(
        np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tol, atol=tol
    )


# the oracle -------------------------------------------------------------------------------------


def hooked_states(hf, ids):
    """{(component, layer): (state, write, base)} [T,D] of a transformers model, every state caught
    by a hook of its own."""
    caught, handles = {}, []

    def keep(name, from_input=False):
        def hook(module, args, kwargs, output):
            x = (args[0] if args else kwargs["hidden_states"]) if from_input else output
            caught[name] = (x[0] if isinstance(x, tuple) else x).detach().squeeze(0)

        return hook

    for l, block in enumerate(hf.model.layers, 1):
        watched = {
            "resid_pre": (block, True),
            "attn_in": (block.input_layernorm, False),
            "attn_out": (block.self_attn, False),
            "resid_mid": (block.post_attention_layernorm, True),
            "mlp_in": (block.post_attention_layernorm, False),
            "mlp_out": (block.mlp, False),
            "resid_post": (block, False),
        }
        for name, (module, from_input) in watched.items():
            handles.append(
                module.register_forward_hook(keep((name, l), from_input), with_kwargs=True)
            )
    handles.append(
        hf.model.norm.register_forward_hook(keep(("final", len(hf.model.layers))), with_kwargs=True)
    )
    with torch.no_grad():
        logits = hf(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    caught["embed", 0] = caught["resid_pre", 1]
    return caught, logits


def naive(h, E, token, logits_L, norm=lambda h: h, T=1.0):
    """All columns of one state, the long way: full log-probabilities in float64."""
    logp = (norm(h).double() @ E.double().T / T).log_softmax(-1)
    logp_L = (logits_L.double() / T).log_softmax(-1)
    at = torch.arange(len(token))
    return {
        "entropy": -(logp.exp() * logp).sum(-1),
        "logprob": logp[at, token],
        "rank": (logp.argsort(-1, descending=True) == token[:, None]).nonzero()[:, 1] + 1,
        "lse": (norm(h).double() @ E.double().T / T).logsumexp(-1),
        "kl": (logp_L.exp() * (logp_L - logp)).sum(-1),
        "rms": h.double().square().mean(-1).sqrt(),
        "top_ids": logp.topk(3).indices,
        "top_probs": logp.topk(3).values.exp(),
        "unused": logp[:, 90:].exp().sum(-1),
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_number_is_that_of_transformers_with_hooks(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    scaling = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    save_model(
        tiny(family, tied=family == "qwen3", rope_scaling=scaling if family == "llama" else None),
        tmp_path,
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, P = tokens(17), 5
    table = measure(load_model(tmp_path), ids, P, top_k=3, n_vocab=90)
    caught, logits = hooked_states(hf, ids)
    rows, token, E = slice(P - 1, -1), ids[P:], hf.lm_head.weight.detach()
    assert list(table["token"]) == token.tolist() and list(table["position"]) == list(range(12))
    assert len(table["layer"]) == 6 * 3 + 2
    for s, key in enumerate(zip(table["component"].tolist(), table["layer"].tolist(), strict=True)):
        for name, want in naive(caught[key][rows], E, token, logits[rows]).items():
            close(table[name][s], want, 1e-5)
        close(
            table["cos_final"][s],
            torch.cosine_similarity(caught[key][rows], caught["resid_post", 3][rows], dim=-1),
            1e-5,
        )
        l = key[1]
        pair = {"attn_out": ("attn_out", "resid_pre"), "mlp_out": ("mlp_out", "resid_mid")}.get(
            key[0]
        )
        write, base = (caught[x, l][rows] for x in pair) if pair else (None, None)
        if key[0] == "resid_post":
            write, base = (
                (caught["attn_out", l] + caught["mlp_out", l])[rows],
                caught["resid_pre", l][rows],
            )
        if write is None:
            assert np.isnan(table["cos_resid"][s]).all()
        else:
            close(table["cos_resid"][s], torch.cosine_similarity(write, base, dim=-1), 1e-5)


@pytest.mark.parametrize("norm", ["final", "rms"])
@pytest.mark.parametrize("T", [1.0, 0.7])
def test_lens_norms_and_temperature(norm, T):
    model, ids, P = tiny(), tokens(12), 3
    r, weight = model.residuals(ids[None]), model.norm.weight

    def bare(h):
        return h / (h.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()

    apply = (lambda h: bare(h) * weight) if norm == "final" else bare
    table = measure(model, ids, P, norm=norm, temperature=T, top_k=3, n_vocab=90)
    logits = model.unembed(r.resid_post[-1])[0, P - 1 : -1].detach()
    for component in ("attn_out", "resid_mid", "mlp_out", "resid_post"):
        for l in range(3):
            want = naive(
                getattr(r, component)[l][0, P - 1 : -1].detach(),
                model.unembedding.detach(),
                ids[P:],
                logits,
                apply,
                T,
            )
            for name, value in want.items():
                close(pick(table, component, name)[l], value.detach(), 1e-5)
    plain = measure(
        model, ids, P, temperature=T
    )  # states that carry a norm of their own get no second one
    for component in ("attn_in", "mlp_in", "final"):
        close(pick(table, component), pick(plain, component), 1e-6)
    assert (np.abs(pick(table, "resid_post") - pick(plain, "resid_post")) > 1e-3).all()


# the stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_writes_are_what_is_added_bit_for_bit(family, dtype):
    seen = {
        (name, l): h
        for name, l, h, _, _ in decompose.states(tiny(family, dtype=dtype), tokens(2, 9))
    }
    for l in (1, 2, 3):
        pre = seen["embed", 0] if l == 1 else seen["resid_post", l - 1]
        assert torch.equal(seen["resid_mid", l], pre + seen["attn_out", l])
        assert torch.equal(seen["resid_post", l], seen["resid_mid", l] + seen["mlp_out", l])


def test_all_writes_sum_to_the_residual_in_float64():
    seen = {(name, l): h for name, l, h, _, _ in decompose.states(tiny().double(), tokens(2, 9))}
    total = seen["embed", 0] + sum(
        h for (name, _), h in seen.items() if name in ("attn_out", "mlp_out")
    )
    assert (total - seen["resid_post", 3]).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_policy_is_the_models_own(dtype):
    model, ids, P = tiny(dtype=dtype), tokens(14), 4
    with torch.no_grad():
        logp = model.unembed(model(ids[None]))[0, P - 1 : -1].log_softmax(-1)
    table = measure(model, ids, P)
    close(pick(table, "final", "logprob")[0], logp.gather(-1, ids[P:, None])[:, 0], 1e-5)
    close(pick(table, "final")[0], -(logp.exp() * logp).sum(-1), 1e-5)
    assert pick(table, "final", "kl").max() < 1e-5
    close(pick(table, "resid_post", "cos_final")[-1], 1, 1e-5)
    assert (
        np.abs(pick(table, "resid_post")[-1] - pick(table, "final")[0]) > 0.01
    ).all()  # H^L raw is another policy


def test_bfloat16_models_have_float32_statistics():
    model, ids, P = tiny(dtype=torch.bfloat16, vocab_size=4001), tokens(40), 4
    with torch.no_grad():
        r = model.residuals(ids[None])
    E, got = model.unembedding.double(), measure(model, ids, P)
    for component in ("attn_out", "resid_mid", "mlp_out", "resid_post"):
        for l in range(3):
            logp = (getattr(r, component)[l][0, P - 1 : -1].double() @ E.T).log_softmax(-1)
            assert (
                np.abs(
                    pick(got, component)[l] - (-(logp.exp() * logp).sum(-1)).detach().numpy()
                ).max()
                < 1e-4
            )


# entropies in closed form -----------------------------------------------------------------------


def test_uniform_and_one_hot():
    V, y = 1000, torch.tensor([3, 999])
    flat = reduce_logits(torch.full((2, V), 7.0), y, 4, n_vocab=900)
    close(flat["entropy"], [math.log(V)] * 2, 1e-6)
    close(flat["logprob"], [-math.log(V)] * 2, 1e-6)
    close(flat["lse"], [7 + math.log(V)] * 2, 1e-6)
    close(flat["unused"], [0.1] * 2, 1e-6)
    assert flat["rank"].tolist() == [1, 1]
    spike = torch.zeros(2, V)
    spike[:, 3] = 1e4
    out = reduce_logits(spike, y, 4)
    assert (
        out["entropy"].tolist() == [0, 0]
        and out["logprob"].tolist() == [0, -1e4]
        and out["rank"].tolist() == [1, 2]
    )
    assert (
        out["top_ids"][:, 0].tolist() == [3, 3]
        and out["top_probs"][:, 0].tolist() == [1, 1]
        and out["unused"].tolist() == [0, 0]
    )


@pytest.mark.parametrize("std", [0.01, 1, 5, 100])
def test_entropy_against_float64_and_its_bounds(std):
    z = std * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    logp = z.double().log_softmax(-1)
    got = reduce_logits(z.clone(), torch.arange(20))
    close(got["entropy"], -(logp.exp() * logp).sum(-1), 1e-5)
    assert (got["entropy"] >= 0).all() and (got["entropy"] <= math.log(5000) + 1e-5).all()


def test_a_zero_model_is_uniform_everywhere():
    table = measure(tiny(std=0.0), tokens(8), 2)
    close(table["entropy"], math.log(101), 1e-6)
    assert np.abs(table["kl"]).max() < 1e-5 and (table["rank"] == 1).all()


# independence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunk_size_changes_nothing(chunk):
    model, ids = tiny(), tokens(40)
    a, b = measure(model, ids, 4, chunk=chunk), measure(model, ids, 4, chunk=31)
    for name in a.keys() - {"component", "meta"}:
        close(a[name], b[name], 1e-5)


def test_the_prompt_length_changes_nothing():
    model, ids = tiny(), tokens(18)
    short, long = measure(model, ids, 3), measure(model, ids, 9)
    for name in ("entropy", "logprob", "kl", "cos_resid"):
        close(short[name][:, 6:], long[name], 1e-6)
    assert short["token"][6:].tolist() == long["token"].tolist() == ids[9:].tolist()
    assert long["position"].tolist() == list(range(9))


def test_many_sequences_are_one_table_in_their_order():
    model = tiny()
    sequences = [
        (tokens(n, seed=n).tolist(), p) for n, p in ((30, 4), (9, 3), (50, 20), (12, 12), (33, 1))
    ]
    table = measure_all(model, sequences)
    assert table["token"].tolist() == [i for ids, p in sequences for i in ids[p:]]
    assert table["example"].tolist() == [k for k, (ids, p) in enumerate(sequences) for _ in ids[p:]]
    alone = measure(model, sequences[2][0], 20)
    for name in ("entropy", "kl", "top_probs"):
        close(table[name][:, table["example"] == 2], alone[name], 1e-5)
    thin = measure_all(model, sequences, max_tokens=40, seed=1)
    assert len(thin["token"]) == 40
    where = {
        (e, t): m for m, (e, t) in enumerate(zip(table["example"], table["position"], strict=True))
    }
    kept = [where[e, t] for e, t in zip(thin["example"], thin["position"], strict=True)]
    assert len(set(kept)) == 40
    close(thin["entropy"], table["entropy"][:, kept], 1e-5)
    assert (
        thin["position"].tolist()
        != measure_all(model, sequences, max_tokens=40, seed=2)["position"].tolist()
    )


def test_fewer_components_are_the_same_numbers():
    model, ids = tiny(), tokens(15)
    full = measure(model, ids, 4)
    part = measure(model, ids, 4, components=("mlp_out", "final"), layers=[2], top_k=0)
    assert part["component"].tolist() == ["mlp_out", "final"] and part["layer"].tolist() == [2, 3]
    close(part["kl"][0], pick(full, "mlp_out", "kl")[1], 1e-6)
    alone = measure(model, ids, 4, components=("mlp_out",))
    close(alone["entropy"], pick(full, "mlp_out"), 1e-6)
    assert np.isnan(alone["kl"]).all() and np.isnan(alone["cos_final"]).all()


# the paper's quantities -------------------------------------------------------------------------


def entropy_of(h, E):
    logp = (h.double() @ E.double().T).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).detach()


def test_entropy_changes_are_the_papers():
    model, ids, P = tiny("llama"), tokens(16), 6
    r, E, change = (
        model.residuals(ids[None]),
        model.unembedding,
        entropy_change(measure(model, ids, P)),
    )
    H = [r.embed, *r.resid_post]
    for l, block in enumerate(model.blocks):
        S = {
            name: entropy_of(h[0, P - 1 : -1], E)
            for name, h in dict(
                pre=H[l],
                a=r.attn_out[l],
                mid=r.resid_mid[l],
                f=r.mlp_out[l],
                post=r.resid_post[l],
                a_in=block.attn_norm(H[l]),
                f_in=block.mlp_norm(r.resid_mid[l]),
            ).items()
        }
        want = {
            "dH_attn": S["a"] - S["a_in"],
            "dH_mlp": S["f"] - S["f_in"],
            "dH_layer": S["post"] - S["pre"],
            "dH_attn_raw": S["a"] - S["pre"],
            "dH_mlp_raw": S["f"] - S["mid"],
            "dH_attn_step": S["mid"] - S["pre"],
            "dH_mlp_step": S["post"] - S["mid"],
        }
        for name, value in want.items():
            close(change[name][l], value, 1e-5)
        close(change["H"][l], S["pre"], 1e-5)
    close(change["dH_attn_step"] + change["dH_mlp_step"], change["dH_layer"], 1e-5)
    with pytest.raises(ValueError, match="every layer"):
        entropy_change(measure(model, ids, P, layers=[1, 2]))
    with pytest.raises(ValueError, match="mlp_in and mlp_out"):
        entropy_change(measure(model, ids, P, components=("mlp_out", "final")))


def made_up(d_mlp, n=50, noise=0.01):
    """A table whose mean dH_mlp is the given list."""
    g, L = np.random.default_rng(0), len(d_mlp)
    before = np.full((L, n), 5.0)
    after = before + np.array(d_mlp)[:, None] + noise * g.standard_normal((L, n))
    return {
        "component": np.array(["mlp_in"] * L + ["mlp_out"] * L),
        "layer": np.array([*range(1, L + 1)] * 2),
        "entropy": np.concatenate([before, after]),
        "meta": {"n_layers": L, "vocab_size": 1000},
    }


@pytest.mark.parametrize(
    "d, want",
    [
        (
            [2, 1, 0.5, 0, 0.02, -0.01, -1, -3],
            {"exploration": (1, 3), "integration": (4, 6), "convergence": (7, 8), "fit": 1.0},
        ),
        (
            [2, 2, 1, 1, -4],
            {"exploration": (1, 4), "integration": None, "convergence": (5, 5), "fit": 1.0},
        ),
        (
            [-1, -1, -2],
            {"exploration": None, "integration": None, "convergence": (1, 3), "fit": 1.0},
        ),
        (
            [2, -1, 2, 0, 0, -1],
            {"exploration": (1, 3), "integration": (4, 5), "convergence": (6, 6), "fit": 5 / 6},
        ),
    ],
)
def test_pattern(d, want):
    assert pattern(made_up(d)) == want


def test_the_papers_rule_for_the_layer():
    layer, evidence = bupo_layer(made_up([2, 1, 0.5, 0.3, -0.2, -1, -3]))
    assert (
        layer == 4
        and "+0.3" in evidence
        and "-0.2" in evidence
        and "50 tokens" in evidence
        and "STANDARD" not in evidence
    )
    assert bupo_layer(made_up([1, 1, -1, 2]))[0] == 2  # the last layer itself would be plain GRPO
    layer, evidence = bupo_layer(made_up([1, -1, -1, 0.001, -1], noise=0.5))
    assert layer in (1, 4) and (layer == 1 or "STANDARD ERRORS" in evidence)
    layer, evidence = bupo_layer(made_up([1, -1, 0.5, -1]))
    assert layer == 3 and "more than once" in evidence
    assert bupo_layer(made_up([-1, -1, 5]))[0] is None


def test_auto_layer_is_the_rule_on_the_full_table():
    model = tiny(n_layers=6)
    with torch.no_grad():
        for l in (1, 3):
            model.blocks[l - 1].down.weight.mul_(
                1e-3
            )  # a write near zero unembeds to a near-uniform policy: dH_mlp > 0
    sequences = [(tokens(30, seed=s).tolist(), 5) for s in range(4)]
    layer, evidence = auto_layer(model, sequences)
    assert (
        (layer, evidence) == bupo_layer(measure_all(model, sequences))
        and layer == 3
        and "layer 3 of 6" in evidence
    )


def test_auto_layer_says_so_when_there_is_none(monkeypatch):
    monkeypatch.setattr(decompose, "measure_all", lambda *a, **k: made_up([-1, -1, 2]))
    with pytest.raises(ValueError, match="finds no BuPO layer.*-1.00"):
        auto_layer(None, [])


def test_watch_is_the_same_numbers():
    model, sequences = tiny(), [(tokens(30).tolist(), 5), (tokens(20, seed=3).tolist(), 2)]
    table, got = measure_all(model, sequences), decompose.watch(model, sequences, 2)
    close(got["watch/layer_entropy"], pick(table, "resid_post")[1].mean(), 1e-5)
    close(got["watch/layer_cos"], pick(table, "resid_post", "cos_final")[1].mean(), 1e-5)
    close(got["watch/entropy"], pick(table, "final").mean(), 1e-5)
    close(got["watch/perplexity"], math.exp(-pick(table, "final", "logprob").mean()), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direct_attributions_are_complete(dtype):
    model, ids, P = tiny(std=0.15, dtype=dtype), tokens(20), 5
    got = attribute(model, ids, P)
    with torch.no_grad():
        logits = model.unembed(model(ids[None]))[0, P - 1 : -1]
    close(got["logprob"], logits.log_softmax(-1).gather(-1, ids[P:, None]).mean(), 1e-5)
    close(
        got["direct_embed"] + got["direct_attn"].sum() + got["direct_mlp"].sum(),
        logits.gather(-1, ids[P:, None]).mean(),
        1e-5,
    )


def without(model, layer, kind, fill, ids, P):
    """Mean log-prob of the response when one write is another, by a whole forward of a model whose
    block returns it."""
    block = model.blocks[layer - 1]
    write = getattr(block, kind)
    setattr(block, kind, lambda *args: fill(write(*args)))
    with torch.no_grad():
        logp = model.unembed(model(ids[None]))[0, P - 1 : -1].log_softmax(-1)
    delattr(block, kind)
    return logp.gather(-1, ids[P:, None]).mean().item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_left_out_writes_are_those_of_a_changed_model(family):
    model, ids, P = tiny(family), tokens(15), 4
    got = attribute(model, ids, P)
    whole = without(model, 1, "mlp_out", lambda write: write, ids, P)
    close(got["logprob"], whole, 1e-6)
    fills = {"zero": lambda w: 0 * w, "mean": lambda w: w[:, 1:].mean(1, keepdim=True) + 0 * w}
    for name, fill in fills.items():
        for l in (1, 2, 3):
            for kind in ("attn", "mlp"):
                want = without(model, l, f"{kind}_out", fill, ids, P) - whole
                assert abs(want) > 1e-4
                assert abs(got[f"{name}_{kind}"][l - 1] - want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_nothing_out_changes_nothing(dtype):
    """Bit for bit; and a write that is zero, or the same at every token, can be left out."""
    model, ids = tiny(dtype=dtype), tokens(15)
    nothing = attribute(model, ids, 4, fills={"nothing": lambda write: write})
    assert not nothing["nothing_attn"].any() and not nothing["nothing_mlp"].any()
    with torch.no_grad():
        model.blocks[1].down.weight.zero_()
        model.blocks[2].o.weight.zero_()
    got = attribute(model, ids, 4)
    assert got["zero_mlp"][1] == got["mean_mlp"][1] == got["zero_attn"][2] == 0
    assert got["zero_mlp"][0] and got["mean_mlp"][0]
    same = attribute(tiny(dtype=dtype), torch.full((9,), 7), 4)
    assert np.abs([same["mean_attn"], same["mean_mlp"]]).max() < (
        0.05 if dtype.itemsize == 2 else 1e-5
    )


def test_a_left_out_write_by_hand():
    """One block of width 2 whose attention writes nothing; three tokens, of which the third is the
    response, produced at the second."""
    config = Config(
        "llama", vocab_size=3, d_model=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_mlp=1
    )
    model = Transformer(config).init_weights(0, 0.0).double()
    embed, head = [[1.0, 2.0], [3.0, -1.0], [3.0, -2.0]], [[1.0, 0.0], [-1.0, 2.0], [0.5, -0.5]]
    with torch.no_grad():
        model.embed.weight.copy_(torch.tensor(embed))
        model.head.weight.copy_(torch.tensor(head))
        model.blocks[0].gate_up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model.blocks[0].down.weight.copy_(torch.tensor([[2.0], [-1.0]]))

    def norm(x):
        rms = math.sqrt((x[0] ** 2 + x[1] ** 2) / 2 + config.norm_eps)
        return [x[0] / rms, x[1] / rms]

    def write(x):  # silu(first) * second, down to two numbers
        gate, up = norm(x)
        product = gate / (1 + math.exp(-gate)) * up
        return [2 * product, -product]

    def logprob(x, token):
        logits = [sum(a * b for a, b in zip(norm(x), row, strict=True)) for row in head]
        return logits[token] - math.log(sum(map(math.exp, logits)))

    def added(x, w):
        return [x[0] + w[0], x[1] + w[1]]

    ids = [0, 1, 2]
    writes, at = [write(embed[i]) for i in ids], embed[ids[1]]
    mean = [(writes[1][k] + writes[2][k]) / 2 for k in range(2)]  # without the first token's
    whole = logprob(added(at, writes[1]), ids[2])
    got = attribute(model, ids, 2)
    close(got["logprob"], whole, 1e-6)
    close(got["zero_mlp"], [logprob(at, ids[2]) - whole], 1e-6)
    close(got["mean_mlp"], [logprob(added(at, mean), ids[2]) - whole], 1e-6)
    assert got["zero_attn"] == got["mean_attn"] == [0]
    assert abs(got["zero_mlp"][0] - got["mean_mlp"][0]) > 0.01


def test_the_first_token_does_not_enter_the_mean():
    write = torch.tensor([[[1e6, 0.0], [1.0, 2.0], [3.0, 4.0]]])
    assert decompose.mean_write(write).tolist() == [[[2.0, 3.0]] * 3]


def test_failure_signs():
    def rows(step, entropy, logprob):
        both = dict(step=step, n_layers=4)
        return [
            dict(both, component="resid_post", paper_layer=l, entropy_nats=entropy)
            for l in (1, 2, 3, 4)
        ] + [dict(both, component="final", paper_layer=4, entropy_nats=1.0, logprob_token=logprob)]

    healthy = rows(0, 3.0, -1.0) + rows(10, 2.5, -0.9) + rows(20, 2.4, -0.8)
    assert failure_signs(healthy, 20) == []
    rising = rows(0, 3.0, -1.0) + rows(20, 2.5, -0.9) + rows(30, 2.4, -1.4) + rows(40, 2.4, -2)
    assert (
        len(failure_signs(rising, 30)) == 1
        and "step 20 to 4.055 at step 30" in failure_signs(rising, 30)[0]
    )
    assert failure_signs(rising, 20) == []  # after the phase it is not this failure
    assert "never falls" in failure_signs(rows(0, 3.0, -1.0) + rows(9, 3.1, -1.0))[0]


# input that cannot be used ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(components=("mlp",)), "no component mlp"),
        (dict(layers=[4]), "no layer 4"),
        (dict(norm="batch"), "no norm"),
        (dict(temperature=0), "temperature"),
        (dict(chunk=0), "chunk"),
        (dict(components=()), "no components"),
        (dict(prompt_len=0), "prompt_len"),
        (dict(prompt_len=9), "no response tokens"),
        (dict(ids=[1, 2, 101]), "rows 0 to 100"),
        (dict(ids=[1, -2, 3]), "rows 0 to 100"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as e:
        measure(tiny(), **{"ids": tokens(9), "prompt_len": 2, **options})
    assert "\n" not in str(e.value)


def test_the_command_on_stored_responses(tmp_path, capsys):
    save_model(tiny(), tmp_path / "model")
    save_model(tiny(std=0.2), tmp_path / "other")
    lines = [
        json.dumps({"prompt_ids": tokens(4).tolist(), "ids": tokens(n, seed=n).tolist()})
        for n in (20, 0, 8)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
    decompose.main(
        [
            "--model",
            str(tmp_path / "model"),
            "--samples-file",
            str(tmp_path / "s.jsonl"),
            "--compare",
            str(tmp_path / "other"),
            "--out",
            str(tmp_path / "out"),
            "--attribute",
            "1",
            "--no-figures",
        ]
    )
    said = capsys.readouterr().out
    assert (
        "the paper's rule" in said
        and "model: 28 response tokens" in said
        and "other: 28 response tokens" in said
    )
    rows = [json.loads(x) for x in (tmp_path / "out/entropy.jsonl").read_text().splitlines()]
    table = measure_all(
        load_model(tmp_path / "model"),
        [(json.loads(x)["prompt_ids"] + json.loads(x)["ids"], 4) for x in lines],
    )
    mine = [r for r in rows if r["run"] == "model"]
    assert [r["component"] for r in mine] == table["component"].tolist() and [
        r["paper_layer"] for r in mine
    ] == table["layer"].tolist()
    close([r["entropy_nats"] for r in mine], table["entropy"].mean(-1), 1e-5)
    close([r["rank_q50"] for r in mine], np.median(table["rank"], -1), 1e-5)
    assert all(
        r["ln_vocab"] == math.log(101)
        and r["tokens"] == 28
        and r["norm"] == "none"
        and r["dtype"] == "float32"
        for r in rows
    )
    weights = [json.loads(x) for x in (tmp_path / "out/weights.jsonl").read_text().splitlines()]
    assert {r["run"] for r in weights} == {"other"}
    a, b = (load_model(tmp_path / name).blocks[1] for name in ("model", "other"))
    a, b = (torch.cat([p.detach().flatten() for p in block.parameters()]) for block in (a, b))
    (second,) = [r["update_norm"] for r in weights if r["part"] == "2"]
    assert second == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-5)
    assert "weights, |dW| / |W| since the first model: embed" in said
    changes = [
        json.loads(x) for x in (tmp_path / "out/entropy_change.jsonl").read_text().splitlines()
    ]
    close(
        [r["dH_mlp"] for r in changes if r["run"] == "model"],
        entropy_change(table)["dH_mlp"].mean(-1),
        1e-5,
    )
    with np.load(tmp_path / "out/tokens.npz", allow_pickle=False) as saved:
        close(saved["logprob"], table["logprob"], 1e-5)
        assert (
            set(saved["token"]) <= set(saved["text_ids"])
            and json.loads(str(saved["meta"]))["run"] == "model"
        )
    found = [json.loads(x) for x in (tmp_path / "out/attribution.jsonl").read_text().splitlines()]
    assert [r["run"] for r in found] == ["model", "other"]
    assert all(map(plot.is_attribution, found)) and all(map(plot.is_state, rows))
    assert all(map(plot.is_change, changes)) and plot.read_tokens(tmp_path / "out/tokens-2.npz")


def test_the_command_through_training(tmp_path, capsys):
    run = tmp_path / "run"
    save_model(tiny(std=0.1), tmp_path / "start")
    for step, std in ((20, 0.1), (40, 0.3)):
        save_model(tiny(std=std), run / f"step_{step:06d}")
    (run / "config.json").write_text(json.dumps({"model": str(tmp_path / "start")}))
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "inter/layer": 1 if s <= 40 else 3}) + "\n" for s in range(1, 61)
        )
    )
    (tmp_path / "s.jsonl").write_text(
        json.dumps({"prompt_ids": tokens(4).tolist(), "ids": tokens(20, seed=1).tolist()})
    )
    args = [
        "--model",
        str(run),
        "--samples-file",
        str(tmp_path / "s.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--no-figures",
    ]
    decompose.main([*args, "--steps", "0,20,40"])
    said = (
        capsys.readouterr().out
    )  # from std 0.1 to 0.3 the same tokens become less likely: the failure that is looked for
    assert (
        "internal phase too long" in said
        and "at step 40, inside the internal phase, which ends after step 40" in said
    )
    rows = [json.loads(x) for x in (tmp_path / "out/entropy.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys((r["run"], r["step"]) for r in rows)) == [
        ("step 0", 0),
        ("step 20", 20),
        ("step 40", 40),
    ]
    assert rows[-1]["logprob_token"] < rows[0]["logprob_token"]
    assert {r["model"] for r in rows} == {"start-run"}
    for extra, message in (
        (["--steps", "0,30"], "--steps 30: "),
        ([], "follow it with --steps 0,40"),
    ):
        with pytest.raises(SystemExit) as stop:
            guarded(decompose.main, [*args, *extra])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_mistakes_end_in_one_line(tmp_path, capsys):
    save_model(tiny(), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt_ids": [1], "ids": [-2]}\n{"prompt_ids": "x"}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "big.jsonl").write_text('{"prompt_ids": [1], "ids": [5000]}\n')
    model = ["--model", tmp_path / "model", "--out", tmp_path / "out"]
    for args, code, message in [
        (["--model", tmp_path / "empty", "--text", "x"], 2, "config.json"),
        ([*model, "--components", "mlp"], 2, "no mlp"),
        ([*model, "--samples-file", tmp_path / "bad.jsonl"], 3, "bad.jsonl: no responses"),
        ([*model, "--samples-file", tmp_path / "none.jsonl"], 3, "no responses"),
        ([*model, "--samples-file", tmp_path / "nowhere.jsonl"], 2, "nowhere.jsonl"),
        ([*model, "--device", "cuda:77", "--text", "x"], 2, "cuda:77"),
        ([*model, "--samples-file", tmp_path / "big.jsonl"], 3, "rows 0 to 100"),
        ([*model, "--limit", "0"], 2, "'0'"),
        ([*model, "--text", "x"], 2, "tokenizer"),
        ([*model, "--steps", "3", "--text", "x"], 2, "no step_ folders"),
        ([*model, "--temperature", "inf"], 2, "--temperature: 'inf'"),
        ([*model, "--temperature", "nan"], 2, "--temperature: 'nan'"),
        ([*model, "--data", ""], 2, "--data"),
        ([*model, "--out", tmp_path / "big.jsonl"], 2, "is a file"),
    ]:
        with pytest.raises(SystemExit) as stop:
            guarded(decompose.main, [str(x) for x in args])
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == code and len(said) == 1 and message in said[0], (args, said)


def byte_model(folder, **changes):
    """A random model over the 256 bytes, with its tokenizer."""
    config = Config("qwen3", **{**SHAPE, "vocab_size": 260, "tied": True, **changes})
    save_model(Transformer(config).init_weights(0, 0.3), folder)
    embedded.write_tokenizer(folder)
    return folder


def refused(args, capsys):
    with pytest.raises(SystemExit) as stop:
        guarded(decompose.main, [str(x) for x in args])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return stop.value.code, said[0]


def test_another_vocabulary_is_refused(tmp_path, capsys, monkeypatch):
    """By the texts of the plain tokens, before any weights are read; control tokens may differ."""
    one, other, chat = (byte_model(tmp_path / name) for name in ("one", "other", "chat"))
    file = json.loads((other / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(file))
    file = json.loads((chat / "tokenizer.json").read_text())
    file["added_tokens"][0]["content"] = "<|im_end|>"
    (chat / "tokenizer.json").write_text(json.dumps(file))
    save_model(tiny(), tmp_path / "bare")
    (tmp_path / "s.jsonl").write_text('{"prompt_ids": [1, 2], "ids": [3, 4]}\n')
    args = ["--model", one, "--samples-file", tmp_path / "s.jsonl", "--out", tmp_path / "out"]
    with monkeypatch.context() as m:
        m.setattr(decompose, "load_model", None)
        for wrong in (other, tmp_path / "bare"):
            code, said = refused([*args, "--compare", wrong], capsys)
            assert code == 2 and f"--compare {wrong}: its vocabulary is not that of {one}" in said
        (chat / "model.safetensors").rename(chat / "weights")
        file = (chat / "tokenizer.json").read_text()
        (chat / "tokenizer.json").write_text('{"model": []}')
        assert "no vocabulary" in refused([*args, "--compare", chat], capsys)[1]
    (chat / "tokenizer.json").write_text(file)
    (chat / "weights").rename(chat / "model.safetensors")
    decompose.main([str(x) for x in (*args, "--compare", chat, "--no-figures")])
    assert "chat: 2 response tokens" in capsys.readouterr().out


def test_the_limit_reaches_the_reader(tmp_path, capsys, monkeypatch):
    """Of a large set the first problems alone are fetched."""
    asked = []

    def load_problems(name, limit=None):
        asked.append((name, limit))
        return [Problem("1+1", "2")] * limit

    monkeypatch.setattr(decompose, "load_problems", load_problems)
    model = byte_model(tmp_path / "m")
    args = ["--model", model, "--data", "deepmath", "--limit", 2, "--max-new-tokens", 3]
    args += ["--system", "", "--out", tmp_path / "out", "--no-figures"]
    decompose.main([str(x) for x in args])
    assert asked == [("deepmath", 2)] and "sampling 2 responses" in capsys.readouterr().out
    code, said = refused([*args, "--max-new-tokens", 64], capsys)
    assert code == 2 and "exceed the 64 tokens this model was made for" in said


def test_damaged_samples_are_counted(tmp_path, capsys):
    good = {"prompt_ids": [1, 2], "ids": [3, 4], "response": "a\u2028b"}
    bad = [
        "torn {",
        "[]",
        json.dumps({**good, "ids": [3, 2**70]}),
        json.dumps({**good, "ids": "x"}),
    ]
    bad += [json.dumps({**good, "prompt_ids": []}), json.dumps({**good, "ids": [True]})]
    empty = json.dumps({**good, "ids": []})
    lines = [json.dumps(good, ensure_ascii=False), *bad, empty, json.dumps(good)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines), "utf-8")
    assert decompose.sequences_from(tmp_path / "s.jsonl", 5) == [([1, 2, 3, 4], 2)] * 2
    assert f"{len(bad)} lines left out" in capsys.readouterr().out
    assert decompose.sequences_from(tmp_path / "s.jsonl", 1) == [([1, 2, 3, 4], 2)]


def test_labels_are_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, config in {
        "run2/step_000300": {"model_type": "qwen3"},
        "run10/step_000300": {"model_type": "qwen3"},
        "seed1/warm-up": {"model_type": "qwen3"},
        "seed1": {"model": "tiny"},
        "out/qwen3-4b": {"model": "Qwen/Qwen3-4B"},
        "out/qwen3-4b/step_000030": {"model_type": "qwen3"},
        "hub/models--Qwen--Qwen3-4B/snapshots/0123abcd": {"model_type": "qwen3"},
        "smollm": {"model_type": "llama"},
        "torn": "{",
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / folder / "config.json").write_text(text)
    for name, want in {
        "run2/step_000300": "run2-step_000300",
        "run10/step_000300/": "run10-step_000300",
        "seed1/warm-up": "tiny-seed1-warm-up",
        "seed1": "tiny-seed1",
        "out/qwen3-4b/step_000030": "qwen3-4b-step_000030",
        "hub/models--Qwen--Qwen3-4B/snapshots/0123abcd": "Qwen3-4B",
        "smollm": "smollm",
        "torn": "torn",
        "qwen3-4b": "qwen3-4b",
        "Qwen/Qwen3-4B": "Qwen3-4B",
        ".": tmp_path.name,
    }.items():
        assert decompose.label(name) == want, name
    assert decompose.folder_name("a/b c*") == "b-c-" and decompose.folder_name("/") == "model"


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/seed1/step_000300", "b/seed1/step_000300", "start"):
        (tmp_path / folder).mkdir(parents=True)
    args = SimpleNamespace(model="start", steps=None)
    args.compare = ["a/seed1/step_000300", "b/seed1/step_000300"]
    assert list(decompose.models_of(args)) == [
        "start",
        "seed1-step_000300 (a/seed1/step_000300)",
        "seed1-step_000300 (b/seed1/step_000300)",
    ]


def test_texts_of_tokens(tmp_path):
    """Bytes that are no character alone are escapes, in files and figures."""
    from plumbing import tokenizer

    tok = tokenizer.load_tokenizer(byte_model(tmp_path))
    texts = [decompose.token_text(tok, i) for i in (0, 10, 65, 0x9F, 0xFF, 256, 300)]
    assert texts == ["\\x00", "\n", "A", "\\x9f", "\\xff", "<|endoftext|>", "<300>"]
    assert decompose.token_text(None, 7) == "<7>"
    assert [plot.printable(t) for t in texts[:4]] == ["\\x00", "\\n", "A", "\\x9f"]


def test_files_of_an_earlier_analysis_do_not_stay(tmp_path, capsys):
    """An entropy_change.jsonl of other responses would be drawn beside the new figures."""
    model = byte_model(tmp_path / "m")
    args = [
        "--model",
        str(model),
        "--text",
        "abcdef",
        "--out",
        str(tmp_path / "out"),
        "--no-figures",
    ]
    decompose.main([*args, "--attribute", "1"])
    assert (tmp_path / "out/entropy_change.jsonl").exists()
    decompose.main([*args, "--components", "mlp_out"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"entropy.jsonl", "tokens.npz"}
