"""The plan against a trace: the model's own operators at true widths, on tensors without memory."""

import math
import pickle
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from policies import policy_logprobs
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
import tiny
from grpo import Batch
from model import Config, Transformer, packed
from plumbing import kernels
from plumbing import memory as plan
from plumbing.hub import HUB
from plumbing.memory import TooLarge, choose, memory_plan, with_
from plumbing.shapes import SHAPES, preset_config

CARDS = 24, 80, 141
FOUR = "qwen3-0.6b", "qwen3-4b", "llama-3.2-1b", "qwen2.5-1.5b"


def settings(config, **changes):
    """The flags of a GPU run that leaves open what can be left open."""
    args = SimpleNamespace(
        max_prompt_tokens=1024, max_new_tokens=plan.default_new_tokens(config, 1024),
        slots=None, micro_tokens=None, recompute=None, optimizer=None, offload=None,
        dtype="bfloat16", logit_chunk=1024, kl=0.0, prompts=128, group=8, replicas=1,
    )  # fmt: skip
    return with_(args, **changes)


def chosen(config, memory, host=1000, **changes):
    """The settings that `choose` finds on a GPU of so many GB."""
    args = settings(config, **changes)
    found = choose(config, args, memory * 1e9, host * 1e9, world=1)
    return with_(args, **{name: value for name, value, _ in found})


# --------------------------------------------------------------------------------------------------
# the trace


class Live(TorchDispatchMode):
    """Bytes of the storages that were made in here and are still alive, and the most there were:
    up to the embedding's backward, which is the last, and in it."""

    def __init__(self, own):
        super().__init__()
        self.live, self.peak, self.last_peak, self.backward = 0, 0, 0, False
        self.known = {storage(t) for t in own}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.add.Tensor and self.backward and not torch.is_grad_enabled():
            return args[0].add_(args[1])  # so the engine adds gradients when no mode watches
        out = operator(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and storage(t) not in self.known:
                self.add(t.untyped_storage())
        return out

    def add(self, memory):
        key, size = memory._cdata, memory.nbytes()
        self.known.add(key)
        self.live += size
        node = torch._C._current_autograd_node()
        if node is not None and "Embedding" in node.name():
            self.last_peak = max(self.last_peak, self.live)
        else:
            self.peak = max(self.peak, self.live)

        def freed():
            self.known.discard(key)
            self.live -= size

        weakref.finalize(memory, freed)


def storage(t):
    return t.untyped_storage()._cdata


class Kernel(torch.autograd.Function):
    """FlashAttention-2 as far as memory goes: what its varlen forward saves, and what its backward
    takes for itself."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        T, H, E = q.shape
        padded = T + 128 * 2  # of two sequences
        work = [q.new_empty(H, padded, dtype=torch.float32)]
        work.append(q.new_empty(padded, H, math.ceil(E / 32) * 32, dtype=torch.float32))
        grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
        if k.shape[1] != H:  # gradients of keys and values for every query head, summed afterwards
            work += [torch.empty_like(q), torch.empty_like(q)]
        return grads


@contextmanager
def as_on_a_gpu(monkeypatch, dtype):
    """Tensors without memory; those of a bfloat16 model pass for a GPU's, float32 is a CPU's."""
    gpu = dtype == torch.bfloat16
    with monkeypatch.context() as patch, FakeTensorMode():
        if gpu:
            patch.setattr(FakeTensor, "is_cuda", True)
            patch.setattr(kernels, "has_flash", lambda device, dtype, head_dim: True)
            patch.setattr(kernels, "flash", lambda q, k, v, *rest: Kernel.apply(q, k, v))
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)
        patch.setattr(torch.nn.Embedding, "reset_parameters", lambda layer: None)
        yield


def build(config, dtype):
    torch.set_default_dtype(dtype)
    try:
        return Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)


def micro_batch(tokens, pack):
    """Two sequences that are responses but for a token."""
    ids = torch.empty(tokens if pack else (2, tokens // 2), dtype=torch.long)
    at = torch.empty(tokens, dtype=torch.long)
    half = tokens // 2
    forward = (
        {"position": torch.empty_like(ids), "attend": packed([half, half], "cpu")} if pack else {}
    )
    return Batch(ids, at, torch.empty_like(at), torch.empty(tokens), [half, half], forward)


def trace(monkeypatch, config, dtype, tokens, recompute, chunk=1024):
    """Bytes beside weights and float32 gradients: alive when a micro-batch's loss is there, most
    until the embedding's backward, and most in it."""
    with as_on_a_gpu(monkeypatch, dtype):
        model = build(config, dtype)
        model.recompute = recompute
        for p in model.parameters():
            p.grad_dtype = torch.float32
            p.grad = torch.empty_like(p, dtype=torch.float32)
        batch = micro_batch(tokens, dtype == torch.bfloat16)
        live = Live([t for p in model.parameters() for t in (p, p.grad)])
        with live:
            logprobs, _ = policy_logprobs(model, batch, config.n_layers, chunk=chunk)
            kept, live.backward = live.live, True
            logprobs.sum().backward()
        return kept, live.peak, live.last_peak


def full_depth(monkeypatch, config, *rest):
    """(bytes kept, most bytes) of all layers: the numbers of a trace rise alike with each layer."""
    few = [trace(monkeypatch, replace(config, n_layers=n), *rest) for n in (1, 2)]
    more = config.n_layers - 1
    kept, *peaks = [a + more * (b - a) for a, b in zip(*few, strict=True)]
    return kept, max(peaks)


def test_layers_add_alike(monkeypatch):
    """What `full_depth` rests on, and the trace's own sums: a block keeps what block_bytes says."""
    config = replace(preset_config("qwen3-0.6b"), n_layers=4)
    for recompute in (False, True):
        rest = torch.bfloat16, 4096, recompute
        kept, *peaks = trace(monkeypatch, config, *rest)
        assert full_depth(monkeypatch, config, *rest) == (kept, max(peaks))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", FOUR)
def test_activations_and_peak_are_those_of_a_trace(name, dtype, recompute, monkeypatch):
    """The peak beside weights, gradients and optimizer state, which are mere sums."""
    c = preset_config(name)
    kept, peak = full_depth(monkeypatch, c, dtype, 16384, recompute)
    moments = plan.backward_moments(c, 16384, 1024, dtype.itemsize, recompute)
    assert moments["head backward"]["activations"] == pytest.approx(kept, rel=0.01)
    largest = max(sum(parts.values()) for parts in moments.values())
    # of a CPU's float32 a little is freed that is counted
    assert largest == pytest.approx(peak, rel=0.01 if dtype == torch.bfloat16 else 0.04)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_accepted_fits_by_the_trace(name, monkeypatch, traced={}):  # noqa: B006
    """For every preset and card: weights, gradients and state, and the traced peak beside them."""
    c = preset_config(name)
    sizes = c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.d_mlp, c.qk_norm
    for memory in CARDS:
        try:
            args = chosen(c, memory)
        except TooLarge as e:
            assert e.peak > memory
            continue
        key = *sizes, c.tied, args.micro_tokens, args.recompute
        if key not in traced:  # presets share shapes, and cards what is found for them
            traced[key] = full_depth(monkeypatch, c, torch.bfloat16, *key[-2:])[1] / 1e9
        its = memory_plan(c, args, True, 1)
        parts = its.moments["training"]
        held = sum(parts.get(x, 0) for x in ("weights", "gradients", "optimizer state"))
        passing = "activations", "logits", "head gradient", "backward"
        assert held + traced[key] + parts["CUDA context"] <= memory
        assert sum(parts.get(x, 0) for x in passing) == pytest.approx(traced[key], rel=0.01)
        assert its.peak <= memory


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b"])  # wide heads, a wide MLP
def test_sampling_takes_what_a_trace_takes(name, monkeypatch):
    c, slots = replace(preset_config(name), n_layers=2), 64
    args = with_(chosen(c, 141), slots=slots)
    parts = plan.sampling_bytes(c, args, 2, cuda=True)
    with as_on_a_gpu(monkeypatch, torch.bfloat16), torch.no_grad():
        sampler = rollout.Sampler(build(c, torch.bfloat16), slots, 8192)
        cache = Live([])
        with cache:
            sampler.allocate()
        held = [t for pair in sampler.cache for t in pair] + list(sampler.model.parameters())
        held += [v for v in vars(sampler).values() if isinstance(v, torch.Tensor)]
        step, prefill = Live(held), Live(held)
        with step:
            sampler.step(slots, 8192)
        with prefill:
            sampler.prefill([[1] * 1025] * 16, [[i] for i in range(16)])
    assert parts["KV cache"] == pytest.approx(cache.live, rel=0.01)
    assert parts["sampler"] / 2 == pytest.approx(step.peak, rel=0.1)
    assert parts["prefill"] == pytest.approx(prefill.peak, rel=0.1)


# --------------------------------------------------------------------------------------------------
# arithmetic


@pytest.mark.parametrize("name", [*SHAPES, "tiny"])
def test_parameters_are_those_of_the_model(name):
    c = tiny.CONFIG if name == "tiny" else replace(preset_config(name), n_layers=2)
    with torch.device("meta"):
        sizes = [p.numel() for p in Transformer(c).parameters()]
    assert sorted(plan.parameter_sizes(c)) == sorted(sizes) and plan.parameters(c) == sum(sizes)


def test_held_parts_are_bytes_a_parameter():
    c = preset_config("qwen3-4b")
    n = plan.parameters(c) / 1e9
    args = with_(chosen(c, 141), optimizer="split", slots=24)
    parts = memory_plan(c, args, True, 1).moments
    assert parts["training"]["weights"] == parts["sampling"]["weights"] == pytest.approx(2 * n)
    assert parts["training"]["gradients"] == pytest.approx(4 * n)
    assert "gradients" not in parts["sampling"] and "KV cache" not in parts["training"]
    assert parts["training"]["optimizer state"] == pytest.approx(8 * n)
    assert parts["sampling"]["KV cache"] == pytest.approx(24 * 8193 * (147456 + 12) / 1e9)
    offloaded = memory_plan(c, with_(args, offload=True), True, 1)
    assert all("optimizer state" not in moment for moment in offloaded.moments.values())
    assert 8 * n < offloaded.host < 16 * n
    assert offloaded.checkpoint == pytest.approx(10 * n)
    against_start = memory_plan(c, with_(args, kl=0.01), True, 1).moments
    assert against_start["training"]["reference"] == pytest.approx(2 * n)


def test_shards_divide_what_is_held():
    c = preset_config("qwen3-8b")
    args = with_(chosen(c, 141), optimizer="adamw", slots=8)
    one, eight, two_by_four = (
        memory_plan(c, with_(args, replicas=replicas), True, world).moments["training"]
        for world, replicas in ((2, 2), (8, 1), (8, 2))
    )
    for name in ("weights", "gradients", "optimizer state"):
        assert one[name] == pytest.approx(8 * eight[name]) == pytest.approx(4 * two_by_four[name])
    whole = plan.parameters(c) / 1e9
    assert eight["copy to sample from"] == pytest.approx(2 * whole)
    assert memory_plan(c, args, True, 8).moments["loading"]["weights, whole"] == 4 * whole


def test_pinned_tensors_are_powers_of_two():
    """Of 300 and 512 elements: 2, 2 and 4 bytes each of them, rounded up."""
    c = Config("llama", 30, 10, 1, 1, 1, 2, 5, tied=False)
    embed, norms, qkv, o, gate_up, down = 300, 10, 60, 20, 100, 50
    expected = 2 * (1024 + 1024 + 2048) + 3 * (32 + 32 + 64) + (128 + 128 + 256) + (64 + 64 + 128)
    expected += (256 + 256 + 512) + (128 + 128 + 256)
    assert sorted(plan.parameter_sizes(c)) == sorted(
        [*[embed] * 2, *[norms] * 3, qkv, o, gate_up, down]
    )
    assert plan.pinned_bytes(c, "split") == expected


# --------------------------------------------------------------------------------------------------
# the choice


def test_the_headline_run_fits_80_gb():
    c = preset_config("qwen3-4b")
    args = chosen(c, 80)
    assert args.max_prompt_tokens + args.max_new_tokens == 8192 and args.slots >= 24
    assert args.recompute and not args.offload and memory_plan(c, args, True, 1).peak <= 80
    assert chosen(c, 85).optimizer == "split-m32"  # what such a card really has


def test_small_models_fit_24_gb():
    assert chosen(preset_config("qwen3-0.6b"), 24).offload is False
    args = chosen(preset_config("qwen3-1.7b"), 24)
    assert args.offload and args.recompute and args.slots >= 12
    with pytest.raises(TooLarge, match="18.4 GB of the host's 16"):
        chosen(preset_config("qwen3-1.7b"), 24, host=16)


def test_ways_in_order_of_preference():
    args = settings(preset_config("qwen3-4b"))
    found = [tuple(way.values()) for way in plan.ways(args, 1)]
    states = ("split-m32", False), ("split", False), ("split", True)
    rest = (False, 16384), (False, 8192), (True, 16384), (True, 8192)
    assert found == [(*state, *other) for state in states for other in rest]

    def sizes(**changes):
        return [way["micro_tokens"] for way in plan.ways(with_(args, recompute=True, **changes), 2)]

    assert sizes(max_new_tokens=3072) == [16384, 8192, 4096]
    assert sizes(max_new_tokens=4000) == [16384, 8192, 5024]
    assert sizes(max_new_tokens=20000) == [21024]
    assert sizes(micro_tokens=6000) == [6000]
    assert {way["optimizer"] for way in plan.ways(args, 2)} == {"adamw"}
    assert [way["offload"] for way in plan.ways(with_(args, offload=True), 1)] == [True] * 8


def test_what_is_named_stands():
    c = preset_config("qwen3-4b")
    named = dict(slots=7, micro_tokens=8192, recompute=True, optimizer="split", offload=True)
    assert choose(c, settings(c, **named), 80e9, 1e12, world=1) == []
    for name, value in named.items():
        args = chosen(c, 141, **{name: value})
        assert getattr(args, name) == value and memory_plan(c, args, True, 1).peak <= 141


def test_rows_are_no_more_than_fit_or_are_of_use():
    c = preset_config("qwen3-4b")
    args = chosen(c, 80)
    one_more = memory_plan(c, with_(args, slots=args.slots + 1), True, 1)
    assert one_more.total("sampling") > 80
    assert chosen(c, 80, prompts=2, group=5).slots == 10
    assert chosen(preset_config("qwen2.5-0.5b"), 141).slots == 256


def test_reasons_name_what_stood_against_the_better():
    c = preset_config("qwen3-4b")
    args = settings(c)
    found = {name: why for name, _, why in choose(c, args, 80e9, 1e12, world=1)}
    better = with_(chosen(c, 80), optimizer="split-m32", slots=24)
    assert memory_plan(c, better, True, 1).total("sampling") > 80
    assert found["optimizer"] == "else 23 full rows would fit, 24 are wanted"
    kept = memory_plan(c, with_(chosen(c, 80), recompute=False, micro_tokens=8192), True, 1)
    assert found["recompute"] == f"else training would take {kept.total('training'):.1f} GB"


def test_too_large_is_one_line_that_says_what_would_help():
    c = preset_config("qwen3-4b")
    with pytest.raises(TooLarge) as e:
        chosen(c, 80, recompute=False, offload=False, slots=64, kl=0.01, logit_chunk=4096)
    line = str(e.value)
    assert "\n" not in line and f"takes {e.value.peak:.1f} GB" in line
    for flag in ("--slots 1 ", "--offload 32.2", "--max-new-tokens 3584 ", "--kl 0 8.0"):
        assert flag in line
    again = pickle.loads(pickle.dumps(e.value))  # as rank 0 tells the others
    assert str(again) == line and again.peak == e.value.peak and again.exit_code == 6
    with pytest.raises(TooLarge, match="--recompute 53.8.*--logit-chunk 128 3.6"):
        chosen(c, 80, recompute=False, logit_chunk=4096, slots=2)


def test_a_cpu_keeps_its_defaults():
    args = settings(tiny.CONFIG, dtype="float32")
    values = {name: value for name, value, _ in choose(tiny.CONFIG, args, 1e9, 1e9, cuda=False)}
    assert values == dict(
        optimizer="adamw", offload=False, recompute=False, micro_tokens=16384, slots=64
    )
    parts = memory_plan(tiny.CONFIG, with_(args, **values), False).moments["sampling"]
    assert "CUDA context" not in parts and "allocator" not in parts


# --------------------------------------------------------------------------------------------------
# what is printed


def test_table_is_narrow_and_says_what_fits():
    sizes = {name: preset_config(name) for name in SHAPES if len(name) < 16}
    lines = plan.table(sizes, [16, 24, 48, 80, 141], settings(tiny.CONFIG, max_new_tokens=None))
    lines = lines.splitlines()
    assert len(lines) == 2 + 5 * len(sizes) and max(map(len, lines)) <= 80
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines[2:]}
    cells = {
        (name.strip(), int(gb)): [x.strip() for x in rest] for (name, gb), rest in cells.items()
    }
    args = chosen(preset_config("qwen3-4b"), 80)
    peak = f"{memory_plan(preset_config('qwen3-4b'), args, True, 1).peak:.1f}"
    assert cells["qwen3-4b", 80] == ["split", "no", "yes", "16384", f"{args.slots}", peak]
    assert cells["qwen3-14b", 48][0] == "too small" and float(cells["qwen3-14b", 48][-1]) > 48
    one = plan.table(
        {"qwen3-4b": preset_config("qwen3-4b")}, [80], settings(preset_config("qwen3-4b"))
    )
    assert one.splitlines()[0].startswith("GB") and len(one.splitlines()) == 3


def test_shown_are_parts_peak_reasons_and_disk(capsys, monkeypatch):
    c = preset_config("qwen3-4b")
    args = settings(c, out=Path("not/there/yet"))
    found = choose(c, args, 80e9, 1e12, world=1)
    args = with_(args, **{name: value for name, value, _ in found})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=50e9))
    plan.show_plan(c, args, found, 80e9)
    out, err = capsys.readouterr()
    its = memory_plan(c, args, True, 1)
    assert f"at most {its.peak:.1f} of the 80.0" in out
    for moment in ("sampling", "training"):
        assert f"{moment} {its.total(moment):.2f}: weights 8.04" in out
    assert "--optimizer split: else" in out and f"--slots {args.slots}: as many" in out
    assert "a checkpoint: 40.22 GB, 40 s at 1 GB/s; 50.0 GB are free" in out
    assert "warning: checkpoints take 40.2 GB each" in err
    assert max(map(len, out.splitlines())) <= 80


def test_every_preset_has_a_shape():
    assert all(preset_config(name) == preset_config(repository) for name, repository in HUB.items())
    with pytest.raises(ValueError, match="qwen9-4b: no such shape; there are qwen3-0.6b"):
        preset_config("qwen9-4b")


def test_response_lengths_stay_inside_the_positions():
    lengths = {name: plan.default_new_tokens(preset_config(name), 1024) for name in SHAPES}
    assert lengths["qwen3-4b"] == 7168 and lengths["llama-3.2-1b"] == 3072
    assert lengths["qwen2.5-math-7b"] == 3072
