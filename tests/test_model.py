"""model.py against transformers (the oracle: eager attention, random models of a few thousand
weights), against the identities of the residual stream, and against broken folders. Without
transformers everything but the oracle's own tests still runs."""

import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from test_hub import COMMIT, damage, empty_cache, fill

import model
from model import Config, RMSNorm, Transformer
from plumbing import download, hub, kernels
from plumbing.hub import hf_config, read_config

DTYPES = (torch.float32, torch.bfloat16)
V, D, L = 101, 48, 3
# below T
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32.0,
}
# family, H, K, E: groups of 1, 2, 3 and 4 query heads on one key/value head; E = D / H and not
SHAPES = {
    "llama": ("llama", 4, 4, 12),
    "llama3": ("llama", 4, 2, 12),
    "qwen2": ("qwen2", 6, 2, 8),
    "qwen3": ("qwen3", 4, 1, 16),
    "qwen3-tied": ("qwen3", 4, 2, 16),
    "mistral": ("mistral", 4, 2, 16),
}
TIED, SHARDED, OLDER = (
    {"llama3", "qwen3-tied"},
    {"llama3", "qwen3", "mistral"},
    {"llama", "mistral", "qwen3-tied"},
)


def shape(name, **changes) -> Config:
    family, *heads = SHAPES[name]
    return replace(
        Config(
            family,
            V,
            D,
            L,
            *heads,
            80,
            1e-5,
            5000.0,
            LLAMA3 if name == "llama3" else None,
            name in TIED,
            256,
        ),
        **changes,
    )


@torch.no_grad()
def randomize(net, std=0.1, seed=0):
    """Norm weights and biases too: left at one and zero, they could be forgotten without a test
    noticing. Logits come out near 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.normal_(
            float(name.endswith("norm.weight")),
            2 * std if p.dim() == 1 else D**-0.5 if len(p) == V else std,
            generator=g,
        )
    return net


def build(name="qwen3", dtype=torch.float32, seed=0, **changes):
    return randomize(Transformer(shape(name, **changes)), seed=seed).to(dtype)


def some_ids(B=2, T=64, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


def parameters_equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def edit_json(path, **changes):
    """Set keys of a JSON file; a value of `...` removes the key."""
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def complaint(kind, call, *args, **kw):
    """The message of the error that `call` raises, which has to be one line."""
    with pytest.raises(kind) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2500
    return str(e.value)


# --------------------------------------------------------------------------------------------------
# transformers


def older_keys(path, c):
    """Rewrite config.json as transformers 4 wrote it, without what its families could leave out."""
    scaling = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None
    optional = {"head_dim": ...} if c.head_dim * c.n_heads == c.d_model else {}
    optional |= (
        {"num_key_value_heads": ...} if c.n_kv_heads == c.n_heads and c.family == "llama" else {}
    )
    edit_json(
        path,
        rope_parameters=...,
        rope_theta=c.rope_theta,
        rope_scaling=scaling,
        dtype=...,
        torch_dtype="float32",
        **optional,
    )


def oracle_load(folder):
    """What stock transformers makes of a folder, and that every tensor of the folder and of the
    model found its place."""
    hf, info = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return hf


@pytest.fixture(scope="module", params=SHAPES)
def oracle(request, tmp_path_factory):
    """A random model that transformers made and saved: .hf, .folder, .ids, .c (what its config must
    be read as)."""
    transformers, c = pytest.importorskip("transformers"), shape(request.param)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hf_config = transformers.AutoConfig.for_model(
        c.family,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=c.d_mlp,
        num_hidden_layers=L,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_len,
        tie_word_embeddings=c.tied,
        rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"}
        | ({"rope_type": "llama3", **LLAMA3} if c.rope_scaling else {}),
        **({"sliding_window": None} if c.family == "mistral" else {}),
    )
    hf = randomize(
        transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    ).eval()
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder, max_shard_size="40KB" if request.param in SHARDED else "5GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or request.param not in SHARDED
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    if request.param in OLDER:
        older_keys(folder / "config.json", c)
    return SimpleNamespace(hf=hf, folder=folder, c=c, ids=some_ids())


def oracle_states(hf, ids):
    """Logits and, a block, what attention and MLP write and what the block returns (hidden_states
    would end with a normed one)."""
    seen = {"attn_out": [], "mlp_out": [], "resid_post": []}

    def keep(kind):
        return lambda module, args, out: seen[kind].append(
            out[0] if isinstance(out, tuple) else out
        )

    hooks = [
        m.register_forward_hook(keep(kind))
        for layer in hf.model.layers
        for m, kind in (
            (layer.self_attn, "attn_out"),
            (layer.mlp, "mlp_out"),
            (layer, "resid_post"),
        )
    ]
    with torch.no_grad():
        logits = hf(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_states_and_logits_agree_with_transformers(oracle):
    m = hub.load_model(oracle.folder)
    assert m.config == oracle.c and m.folder == oracle.folder
    logits, theirs = oracle_states(oracle.hf, oracle.ids)
    with torch.no_grad():
        ours, mine = m.residuals(oracle.ids), m.unembed(m(oracle.ids))
    for kind, states in theirs.items():
        assert len(states) == len(getattr(ours, kind)) == L
        for l, state in enumerate(states):
            assert gap(getattr(ours, kind)[l], state) <= 1e-5, (kind, l + 1)
    assert 0.8 < logits.std() < 1.5 and gap(mine, logits) <= 1e-5


def test_bfloat16_agrees_with_transformers(oracle, tmp_path):
    """To 2e-2 of the largest value: a bfloat16 step is 0.8 % of a value, and the two sides round in
    different places."""
    hub.save_model(
        randomize(hub.load_model(oracle.folder), std=0.05), tmp_path, dtype=torch.bfloat16
    )
    m, hf = hub.load_model(tmp_path, torch.bfloat16), oracle_load(tmp_path)
    assert {
        t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()
    } == {torch.bfloat16}
    assert hf.dtype == torch.bfloat16 == m(oracle.ids).dtype
    logits, theirs = oracle_states(hf, oracle.ids)
    with torch.no_grad():
        ours, mine = m.residuals(oracle.ids), m.unembed(m(oracle.ids))
    for kind, states in theirs.items():
        for a, b in zip(getattr(ours, kind), states, strict=True):
            assert gap(a, b) <= 2e-2 * b.abs().max(), kind
    assert mine.dtype == torch.float32 and gap(mine, logits) <= 2e-2 * logits.abs().max()


def test_both_generations_of_config_keys_mean_the_same(oracle, tmp_path):
    shutil.copytree(oracle.folder, tmp_path, dirs_exist_ok=True)
    path, c = tmp_path / "config.json", oracle.c
    older_keys(path, c)
    older = hub.load_model(tmp_path)
    theirs = oracle_load(tmp_path)
    edit_json(
        path,
        rope_theta=...,
        rope_scaling=...,
        head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_heads,
        rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"}
        | ({"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else {}),
    )
    newer = hub.load_model(tmp_path)
    assert older.config == newer.config == c
    with torch.no_grad():
        assert torch.equal(older(oracle.ids), newer(oracle.ids))
        assert gap(theirs(oracle.ids).logits, oracle.hf(oracle.ids).logits) <= 1e-6


@pytest.mark.parametrize("shard_bytes", [4 << 30, 30_000], ids=["single", "shards"])
def test_transformers_loads_what_we_save(oracle, tmp_path, shard_bytes):
    m = hub.load_model(oracle.folder)
    # byte for byte, odd bytes too
    (oracle.folder / "generation_config.json").write_bytes(
        b'{"eos_token_id": [7, 8],\r\n "top_k": 5}'
    )
    hub.save_model(m, tmp_path, tokenizer_from=oracle.folder, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 30_000 else len(files) > 3
    names = [n for f in files for n in safetensors.torch.load_file(f)]
    assert len(names) == len(set(names)) and ("lm_head.weight" in names) != oracle.c.tied
    assert (tmp_path / "generation_config.json").read_bytes() == (
        oracle.folder / "generation_config.json"
    ).read_bytes()
    # keys we have no use for survive
    assert json.loads((tmp_path / "config.json").read_text())["transformers_version"]

    hf, again = oracle_load(tmp_path), hub.load_model(tmp_path)
    assert again.config == oracle.c and parameters_equal(again, m)
    assert hf.dtype == torch.float32 and parameters_equal(hf, oracle.hf)
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) == oracle.c.tied
    with torch.no_grad():
        assert gap(hf(oracle.ids).logits, oracle.hf(oracle.ids).logits) <= 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_a_model_made_here(name, tmp_path):
    """No config.json to start from (`raw` is empty), as the embedded default has none."""
    m, ids = build(name), some_ids()
    hub.save_model(m, tmp_path)
    assert read_config(hf_config(m.config)) == m.config and parameters_equal(
        hub.load_model(tmp_path), m
    )
    with torch.no_grad():
        assert gap(oracle_load(tmp_path)(ids).logits, m.unembed(m(ids))) <= 1e-5
    m.init_weights()
    hub.save_model(m, tmp_path)
    with torch.no_grad():
        assert gap(oracle_load(tmp_path)(ids).logits, m.unembed(m(ids))) <= 1e-6


# --------------------------------------------------------------------------------------------------
# identities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_stream_residuals_and_forward_are_one_computation(name, dtype):
    """resid_mid == resid_pre + attn_out, resid_post == resid_mid + mlp_out, and a forward stopped
    at l gives H^l: all bit for bit."""
    m, ids = build(name, dtype), some_ids()
    pre, all_states = m.embed(ids), m.residuals(ids)
    assert torch.equal(m(ids, until=0), pre) and torch.equal(all_states.embed, pre)
    for l, s in enumerate(m.stream(ids), 1):
        assert s.layer == l and s.resid_post.dtype == dtype and torch.equal(s.resid_pre, pre)
        assert torch.equal(s.resid_mid, s.resid_pre + s.attn_out) and torch.equal(
            s.resid_post, s.resid_mid + s.mlp_out
        )
        for kind in all_states._fields[1:]:
            assert torch.equal(getattr(all_states, kind)[l - 1], getattr(s, kind))
        assert torch.equal(m(ids, until=l), s.resid_post)
        pre = s.resid_post
    assert l == L == len(all_states.resid_post) == len(list(m.stream(ids, until=L)))
    assert torch.equal(m(ids), pre) and [s.layer for s in m.stream(ids, until=1)] == [1]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_global_sum_in_float64(name):
    m, ids = build(name, torch.float64), some_ids()
    s = m.residuals(ids)
    assert (
        gap(s.embed + sum(s.attn_out) + sum(s.mlp_out), m(ids)) <= 1e-10
        and gap(s.embed, m(ids)) > 1
    )


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@torch.no_grad()
def test_the_final_norm_is_applied_at_the_last_layer_only(name):
    m, ids = build(name), some_ids()
    Eu, H = m.embed.weight if name == "llama3" else m.head.weight, [m(ids, l) for l in range(L + 1)]
    for l in range(L):
        assert (
            torch.equal(m.unembed(H[l], l), F.linear(H[l], Eu))
            and gap(m.unembed(H[l], l), F.linear(m.norm(H[l]), Eu)) > 0.1
        )
    assert torch.equal(m.unembed(H[L], L), F.linear(m.norm(H[L]), Eu)) and torch.equal(
        m.unembed(H[L]), m.unembed(H[L], layer=L)
    )
    assert gap(m.unembed(H[L]), F.linear(H[L], Eu)) > 0.1


@pytest.mark.parametrize("until", range(L + 1))
def test_blocks_above_the_stop_get_no_gradient(until):
    m = build("qwen2", tied=True)
    m.unembed(m(some_ids(), until), until).logsumexp(-1).sum().backward()
    for name, p in m.named_parameters():
        reached = (
            int(name.split(".")[1]) < until
            if name.startswith("blocks.")
            else name == "embed.weight" or until == L
        )
        assert p.grad.abs().sum() > 0 if reached else p.grad is None, name


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_or_its_padding(name):
    m, ids = build(name), some_ids(B=3, T=40)
    H = m(ids)
    for row in range(3):
        # [1,T], and [T] without a batch
        assert (
            gap(m(ids[row : row + 1]), H[row : row + 1]) <= 1e-5
            and gap(m(ids[row]), H[row]) <= 1e-5
        )
    other = ids.clone()
    other[:, 25:] = some_ids(B=3, T=15, seed=9)
    # what the padding holds: not a bit
    assert torch.equal(m(other)[:, :25], H[:, :25]) and gap(m(other), H) > 0.1
    # that it is there: rounding alone
    assert gap(m(ids[:, :25]), H[:, :25]) <= 1e-5


@torch.no_grad()
def test_positions_and_attention_are_the_callers_to_give():
    m, ids, seen = build("llama3"), some_ids(T=20), []

    def attend(layer, q, k, v):
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return model.causal(layer, q, k, v)

    pos = torch.arange(20).expand(2, 20)
    assert torch.equal(m(ids, 2, position=pos, attend=attend), m(ids, 2))
    assert seen == [(l, (2, 20, 4, 12), (2, 20, 2, 12), (2, 20, 2, 12)) for l in (1, 2)]
    # only distances count
    assert (
        gap(m(ids, position=pos + 100), m(ids)) <= 1e-4
        and gap(m(ids, position=3 * pos), m(ids)) > 0.01
    )
    assert (
        torch.equal(
            list(m.stream(ids, position=3 * pos, attend=attend))[-1].resid_post,
            m(ids, position=3 * pos),
        )
        and len(seen) == 2 + L
    )


@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wanted", ["xwb", "x", "w", ""])
def test_products_and_their_gradients(rows, bias, wanted):
    """By oneDNN where there is one and the product is large (3 and 200 rows), in float64 to
    compare. Bias, strides, leading dimensions."""
    g = torch.Generator().manual_seed(rows)
    x, W, b = (torch.randn(*shape, generator=g) for shape in ((rows, 3, 512), (640, 256), (640,)))
    inputs = {"x": x[..., ::2], "w": W, **({"b": b} if bias else {})}
    narrow, wide = (
        {k: t.detach().to(d).requires_grad_(k in wanted) for k, t in inputs.items()}
        for d in (torch.float32, torch.float64)
    )
    if kernels.ONEDNN and rows == 200:
        assert "OneDNN" in str(kernels.linear(x[..., ::2], W.clone().requires_grad_()).grad_fn)
    ours, theirs = kernels.linear(*narrow.values()), F.linear(*wide.values())
    assert (
        ours.shape == theirs.shape
        and ours.dtype == torch.float32
        and ours.requires_grad == theirs.requires_grad
    )

    def close(a, b):
        return (
            a.dtype == torch.float32
            and a.shape == b.shape
            and bool((a - b).norm() <= 1e-6 * b.norm())
        )

    assert close(ours, theirs)
    if not theirs.requires_grad:
        return
    slope = torch.randn(*theirs.shape, generator=g)
    for a, b in zip(
        *(
            torch.autograd.grad(y, [t for t in ins.values() if t.requires_grad], slope.to(y.dtype))
            for y, ins in ((ours, narrow), (theirs, wide))
        ),
        strict=True,
    ):
        assert close(a, b)


def test_init_weights_is_a_function_of_the_seed():
    a, b, c = (
        Transformer(shape("qwen2", vocab_size=5000)).init_weights(seed) for seed in (3, 3, 4)
    )
    assert parameters_equal(a, b) and not torch.equal(a.embed.weight, c.embed.weight)
    assert (
        abs(a.embed.weight.std() - 0.02) < 2e-4
        and a.blocks[0].attn_norm.weight.eq(1).all()
        and a.blocks[0].qkv.bias.eq(0).all()
    )


@torch.no_grad()
def test_precision_where_half_the_bits_would_show():
    g = torch.Generator().manual_seed(0)
    h, Eu = (torch.randn(n, 256, generator=g).to(torch.bfloat16) for n in (7, 500))
    logits = model.project(h, Eu)  # beyond 32 bfloat16 would round them to steps of 1/4
    assert (
        logits.dtype == torch.float32
        and logits.abs().max() > 40
        and gap(logits, h.double() @ Eu.double().T) <= 1e-4
    )

    x = 300 * torch.randn(5, 64, generator=g)  # squares beyond float16
    norm = RMSNorm(64, 1e-6).half()
    assert gap(norm(x.half()), x / x.square().mean(-1, keepdim=True).sqrt()) <= 5e-3

    pos = torch.tensor([0, 1, 31, 8191])
    angle = pos[:, None, None] * 5000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    cos, sin = build("llama", torch.bfloat16).cos_sin(pos, pos)
    assert (
        gap(cos, angle.cos()) <= 1e-3
        and gap(sin, angle.sin()) <= 1e-3
        and cos.dtype == torch.float32
    )


# --------------------------------------------------------------------------------------------------
# folders that are wrong


@pytest.fixture
def folder(tmp_path):
    return hub.save_model(build(), tmp_path / "model")


def edit_weights(folder, **tensors):
    """Rewrite the single weight file with these tensors added or replaced; None removes one."""
    path = folder / "model.safetensors"
    out = {**safetensors.torch.load_file(path), **tensors}
    safetensors.torch.save_file({n: t for n, t in out.items() if t is not None}, path)


class Watched:
    """safe_open that notes every tensor handed out and refuses to hand out one while another is
    alive."""

    def __init__(self, path, **kw):
        self.inner = safetensors.safe_open(path, **kw)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def get_tensor(self, name):
        assert not self.alive, f"{name} is fetched while {self.alive} is held"
        tensor = self.inner.get_tensor(name)
        self.fetched.append(name)
        self.alive.add(name)
        weakref.finalize(tensor, self.alive.discard, name)
        return tensor


@pytest.fixture
def watched(monkeypatch):
    Watched.fetched, Watched.alive = [], set()
    monkeypatch.setattr(hub, "safe_open", Watched)
    return Watched


@pytest.mark.parametrize("shard_bytes", [4 << 30, 30_000])
def test_each_tensor_is_fetched_once_and_let_go_before_the_next(tmp_path, watched, shard_bytes):
    hub.save_model(build("qwen2"), tmp_path, shard_bytes=shard_bytes)
    m = hub.load_model(tmp_path)
    assert sorted(watched.fetched) == sorted(hub.hf_tensors(m.config)) and not watched.alive


def test_everything_wrong_with_the_weights_is_one_message_before_any_is_read(folder, watched):
    edit_weights(
        folder,
        **{
            "model.norm.weight": None,
            "model.layers.0.self_attn.k_norm.weight": None,
            "surplus": torch.zeros(3),
            "model.layers.2.mlp.up_proj.weight": torch.zeros(80, 47),
            "model.embed_tokens.weight": torch.zeros(V, D, dtype=torch.int64),
            "lm_head.weight": torch.zeros(V, D, dtype=torch.float64),
        },
    )
    message = complaint(ValueError, hub.load_model, folder)
    for part in (
        str(folder),
        "model.norm.weight is missing",
        "model.layers.0.self_attn.k_norm.weight is missing",
        "surplus is not part of a qwen3",
        "model.layers.2.mlp.up_proj.weight is [80, 47], want [80, 48]",
        "model.embed_tokens.weight is I64, want F32",
        "lm_head.weight is F64",
    ):
        assert part in message
    assert message.count(";") == 5 and not watched.fetched
    # hundreds missing: the first of them and how many more
    edit_json(folder / "config.json", num_hidden_layers=40)
    assert "more" in complaint(ValueError, hub.load_model, folder)


def test_rotary_buffers_of_old_checkpoints_are_no_weights(folder):
    edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert parameters_equal(hub.load_model(folder), build())


def test_shards_missing_twice_or_outside_the_folder(tmp_path):
    sharded = hub.save_model(build(), tmp_path / "model", shard_bytes=30_000)
    index = sharded / "model.safetensors.index.json"
    files = sorted({f.name for f in sharded.glob("*.safetensors")})
    weight_map = json.loads(index.read_text())["weight_map"]
    assert parameters_equal(hub.load_model(sharded), build()) and set(weight_map.values()) == set(
        files
    )
    # it exists: only the rule refuses it
    shutil.copy(sharded / files[0], tmp_path / "x.safetensors")
    for name in (
        "../x.safetensors",
        str(tmp_path / "x.safetensors"),
        "..",
        "a/../../x.safetensors",
        "x.bin",
        5,
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
        assert str(name)[:50] in complaint(
            ValueError, hub.load_model, sharded
        ) and "plain file names" in complaint(ValueError, hub.load_model, sharded)
    for broken in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        index.write_text(json.dumps(broken))
        assert "no weight_map" in complaint(ValueError, hub.load_model, sharded)
    index.write_text(json.dumps({"weight_map": weight_map | {"extra": "model-twice.safetensors"}}))
    shutil.copy(sharded / files[0], sharded / "model-twice.safetensors")
    assert "model.embed_tokens.weight stands in two shards" in complaint(
        ValueError, hub.load_model, sharded
    )
    (sharded / "model-twice.safetensors").unlink()
    (sharded / files[1]).unlink()
    message = complaint(ValueError, hub.load_model, sharded)
    assert files[1] in message and "model-twice.safetensors" in message and files[0] not in message


def test_files_that_are_not_what_their_names_say(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (
        whole[:-1],
        whole[:100],
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02}q\x00.",
    ):
        path.write_bytes(content)
        assert (
            str(path) in (message := complaint(ValueError, hub.load_model, folder))
            and "not a readable safetensors file" in message
        )
    path.unlink()
    assert "model.safetensors" in complaint(ValueError, hub.load_model, folder)
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in complaint(ValueError, hub.load_model, folder)
    (folder / "config.json").unlink()
    assert "config.json" in complaint(FileNotFoundError, hub.load_model, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_numbers(folder, value, dtype):
    bad = torch.ones(80, D, dtype=dtype)
    bad[79, 5] = value
    edit_weights(folder, **{"model.layers.1.mlp.gate_proj.weight": bad})
    assert "model.layers.1.mlp.gate_proj.weight holds NaN or Inf" in complaint(
        ValueError, hub.load_model, folder
    )


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    m = build("qwen3-tied")
    hub.save_model(m, tmp_path)
    edit_weights(tmp_path, **{"lm_head.weight": m.embed.weight.detach().clone()})
    assert parameters_equal(hub.load_model(tmp_path), m)
    edit_weights(tmp_path, **{"lm_head.weight": m.embed.weight.detach() + 1e-3 * torch.eye(V, D)})
    assert "lm_head.weight differs from the embedding" in complaint(
        ValueError, hub.load_model, tmp_path
    )
    # said to be untied, both are read
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert gap(hub.load_model(tmp_path).unembedding, m.embed.weight) > 5e-4


def test_saving_again_replaces_the_weights_however_they_are_split(tmp_path):
    """A file left of the earlier save would be read in place of the new one, here or in
    transformers."""
    a, b, c = (build(seed=seed) for seed in range(3))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model_card.safetensors").write_text("not ours")
    for m, shard_bytes in ((a, 20_000), (b, 4 << 30), (c, 50_000)):
        # the tokenizer is already where it belongs
        hub.save_model(m, tmp_path, tokenizer_from=tmp_path, shard_bytes=shard_bytes)
        assert parameters_equal(hub.load_model(tmp_path), m)
        assert len(list(tmp_path.glob("model*.safetensors"))) == 1 + len(hub._shards(tmp_path))
    assert (tmp_path / "tokenizer.json").read_text() == "{}" and (
        tmp_path / "model_card.safetensors"
    ).exists()


# --------------------------------------------------------------------------------------------------
# settings and names

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


@pytest.mark.parametrize(
    "changes, said",
    [
        *(({key: value}, key) for key in SIZES for value in (-1, 0, 1.5, "64", True, [64], 10**30)),
        *(
            ({key: ...}, key)
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
            )
        ),
        *(
            ({key: value}, key)
            for key in ("rms_norm_eps", "rope_theta")
            for value in (-1, 0, "x", float("nan"), None, True)
        ),
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; this code reads llama, qwen2, qwen3, mistral",
        ),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_scaling": "linear"}, "not an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "per layer type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor=None"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "low_freq_factor is not below",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window=4096"),
        # left out, it means 4096
        *(
            ({"model_type": "mistral", "sliding_window": value}, "sliding_window=4096")
            for value in (4096, ...)
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_settings_that_would_change_the_maths_are_refused(changes, said):
    raw = {k: v for k, v in {**hf_config(shape("qwen3")), **changes}.items() if v is not ...}
    assert said in complaint(ValueError, read_config, raw)


def test_all_wrong_settings_are_listed_and_harmless_ones_pass():
    raw = hf_config(shape("qwen3"))
    message = complaint(
        ValueError,
        read_config,
        {**raw, "vocab_size": -5, "hidden_act": "relu", "attention_bias": True},
    )
    assert all(part in message for part in ("vocab_size=-5", "hidden_act='relu'", "attention_bias"))
    assert "not a JSON object" in complaint(ValueError, read_config, [raw])
    harmless = {
        "use_sliding_window": False,
        "sliding_window": 32768,
        "attention_bias": False,
        "rope_scaling": None,
    }
    assert read_config({**raw, **harmless}) == shape("qwen3")
    # what qwen3 means by nothing
    assert read_config({**raw, "head_dim": None}).head_dim == 128


def test_names_that_are_nowhere(tmp_path):
    for name in ("qwen3-5b", "./nowhere/at-all", str(tmp_path / "nowhere"), "a/b/c", "../x"):
        message = complaint(FileNotFoundError, hub.resolve, name)
        assert (
            message.startswith(name)
            and "no such folder" in message
            and "qwen3-4b" in message
            and "octothinker-3b" in message
        )


def test_an_unreachable_hub_names_the_repository_and_the_ways_out(monkeypatch):
    def ways_out(name, repo):
        message = complaint(FileNotFoundError, hub.load_model, name)
        assert all(
            part in message for part in (name, repo, f"`hf download {repo}`", "HF_HOME", "folder")
        )

    # set before the hub library was imported: what a machine without network meets
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    ways_out("nanobupo-tests/no-such-model", "nanobupo-tests/no-such-model")

    def fail(repo, **kw):
        raise ConnectionError("[Errno -2] Name or service not known\nsecond line\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    ways_out("qwen3-4b", "Qwen/Qwen3-4B")
    ways_out("Octothinker-3B", "OctoThinker/OctoThinker-3B-Hybrid-Base")


def test_presets_and_the_hub_give_folders(monkeypatch, folder):
    asked = []
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **kw: asked.append((repo, kw["allow_patterns"])) or str(folder),
    )
    assert (
        hub.load_model("qwen3-0.6b-base").folder == folder == hub.resolve("Some-one/some.model")
        and hub.resolve(folder) == folder
    )
    # a folder asks nobody
    assert [repo for repo, _ in asked] == ["Qwen/Qwen3-0.6B-Base", "Some-one/some.model"]
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    others = [
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
    ]
    assert (
        sorted(
            huggingface_hub.utils.filter_repo_objects(wanted + others, allow_patterns=asked[0][1])
        )
        == wanted
    )


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """A model's folder in a cache laid out as the hub's library does it; no network."""
    (folder / "tokenizer.json").write_text("{}")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return fill(empty_cache(tmp_path, monkeypatch), "model", "Qwen/Qwen3-4B", files)


def test_cached_model_is_taken_as_it_is_and_its_commit_is_known(cached, monkeypatch):
    for revision in (None, "main", COMMIT):
        assert hub.resolve("qwen3-4b", revision) == hub.resolve("Qwen/Qwen3-4B", revision) == cached
    assert download.commit(cached) == COMMIT and hub.load_model("qwen3-4b").folder == cached
    with pytest.raises(
        FileNotFoundError, match="qwen3-4b: .* at revision v2: it is not in the cache"
    ):
        hub.resolve("qwen3-4b", "v2")
    with pytest.raises(ValueError, match="only a model from the hub has revisions"):
        hub.resolve(cached, COMMIT)
    # the branch moves on: the commit that a run began with stays what it was
    newer = fill(
        Path(huggingface_hub.constants.HF_HUB_CACHE),
        "model",
        "Qwen/Qwen3-4B",
        {p.name: p.read_bytes() for p in cached.iterdir()},
        commit="d" * 40,
    )
    assert hub.resolve("qwen3-4b") == newer and hub.resolve("qwen3-4b", COMMIT) == cached


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_model_that_is_not_whole_in_the_cache_is_asked_for(cached, name):
    (cached / name).unlink()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set") as e:
        hub.resolve("qwen3-4b")
    assert "`hf download Qwen/Qwen3-4B`" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["zeros", "short", "a portal's page", 3, 300_001])
def test_damaged_model_in_the_cache_is_not_loaded(cached, name, how):
    path = cached / name
    if isinstance(how, int):
        how %= 8 * path.stat().st_size
    damage(path, how)
    with pytest.raises(hub.CheckpointError, match=f"{name}: the file is damaged") as e:
        hub.load_model("qwen3-4b")
    assert f"`hf download Qwen/Qwen3-4B {name} --force-download --revision {COMMIT}`" in str(
        e.value
    ) and "\n" not in str(e.value)
    # the same where the cache has no links: what can be seen to be damaged says so too
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    if name == "model.safetensors" and isinstance(how, str):
        with pytest.raises(
            hub.CheckpointError,
            match="hf download Qwen/Qwen3-4B model.safetensors --force-download",
        ):
            hub.load_model("qwen3-4b")


def test_damaged_list_of_shards_in_the_cache(folder, tmp_path, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    files = {
        p.name: p.read_bytes()
        for p in hub.save_model(hub.load_model(folder), folder, shard_bytes=9000).iterdir()
    }
    assert len(files) > 4 and "model.safetensors" not in files
    snapshot = fill(empty_cache(tmp_path, monkeypatch), "model", "Qwen/Qwen3-4B", files)
    assert hub.load_model("qwen3-4b").folder == snapshot
    (snapshot / sorted(name for name in files if name.endswith(".safetensors"))[1]).unlink()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        hub.resolve("qwen3-4b")
    damage(snapshot / "model.safetensors.index.json", "zeros")
    with pytest.raises(hub.CheckpointError, match="index.json: the file is damaged"):
        hub.resolve("qwen3-4b")


def test_parameters_stand_in_the_order_that_runs_depend_on():
    """A gradient's norm is summed in it, so another order changes the last bits of every run."""
    names = [name.partition(".")[0] for name, _ in build("qwen3").blocks[0].named_parameters()]
    wanted = ["attn_norm", "mlp_norm", "qkv", "o", "q_norm", "k_norm", "gate_up", "down"]
    assert list(dict.fromkeys(names)) == wanted
