"""The benchmarks end to end at toy sizes, what they compute by hand, and the sampler against
transformers' generate."""

import json
import sys
import time

import pytest
import torch
from emulated import flash_kernel

from model import Config, Transformer
from plumbing import shapes
from plumbing.hub import load_model
from rollout import Sampler
from tools import bench, bench_gpu

TINY = {
    "tiny": Config("qwen3", 300, 32, 2, 4, 2, 8, 48, tied=True),
    "tiny-untied": Config("llama", 300, 32, 2, 4, 4, 8, 48),
}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", dict(TINY))


def run(command):
    bench.main([*command.split(), "--device", "cpu", "--threads", "1"])


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_decode_prints_one_json_object(capsys):
    run("decode --like tiny --batch 3 --context 20 --steps 8")
    out = last_line(capsys)
    weights, kv = bench.step_bytes(TINY["tiny"], 4)
    assert out["dtype"] == "float32" and out["layers"] == 2 and out["recompiles"] == 0
    assert out["tok_s"] * out["ms_step"] == pytest.approx(3 * 1e3)
    assert out["share_of_copy"] == pytest.approx(out["GB_s"] / out["copy_GB_s"])
    assert out["GB_s"] * 1e9 == pytest.approx((weights + kv * 3 * 20) / out["ms_step"] * 1e3)


def test_bytes_of_a_step():
    """Weights that a step reads, by hand; an embedding that is no unembedding is not among them."""
    for name, c in TINY.items():
        model = Transformer(c)
        blocks, norm = sum(p.numel() for p in model.blocks.parameters()), c.d_model
        kv = 2 * c.n_layers * c.n_kv_heads * c.head_dim
        weights = blocks + norm + c.vocab_size * c.d_model
        assert bench.step_bytes(c, 2) == (2 * weights, 2 * kv), name


def test_workload_runs_every_side(capsys):
    sizes = "--requests 7 --prompt 2-9 --output 3-12 --slots 2 --repeats 2"
    run(f"workload --like tiny {sizes} --fixed --profile")
    out = last_line(capsys)
    assert out["occupancy"] == 1.0 and out["slots"] == 2 and 7 * 3 <= out["tokens"] <= 7 * 12
    assert out["over_fixed"] == pytest.approx(out["refilled_tok_s"] / out["fixed_tok_s"])
    assert out["over_transformers"] is None
    assert 0 < out["outside_matmul"] < 1


@pytest.mark.parametrize(
    "command, says",
    [
        ("decode --like nothing", "no such shape; there are tiny"),
        ("decode --like tiny --context 4", "--context 4"),
        ("decode --like tiny --device gpu9", "not usable here"),
    ],
)
def test_what_cannot_be_measured_is_one_line(command, says):
    with pytest.raises(ValueError, match=says):
        bench.main(command.split())


@pytest.mark.parametrize("text", ["5", "9-3", "0-4", "a-b", "3-4-5"])
def test_a_range_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(["workload", "--prompt", text])
    assert e.value.code == 2 and "want a range such as 32-256" in capsys.readouterr().err


def test_without_transformers_a_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run("workload --like tiny --requests 2 --prompt 2-3 --output 2-3 --versus")
    assert "transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(TINY))
def test_greedy_tokens_are_those_of_transformers(name):
    """Ragged prompts in one left-padded batch on their side, three slots for eleven rows on
    ours."""
    pytest.importorskip("transformers")
    model = Transformer(TINY[name]).init_weights(0, 0.15)
    theirs = bench.transformers_model(model)
    # one set of weights
    assert theirs.get_output_embeddings().weight.data_ptr() == model.unembedding.data_ptr()
    prompts = bench.random_prompts(model.config, [1, 4, 9, 17, 2, 30, 8, 5, 11, 3, 6], 1)
    ours = Sampler(model, 3, 64).generate(prompts, 1, 30, temperature=0)
    generated = bench.transformers_generate(theirs, prompts, [30] * 11, greedy=True)
    assert [s.ids for (s,) in ours] == generated.tolist()


def test_versus_transformers(capsys):
    pytest.importorskip("transformers")
    sizes = "--requests 4 --prompt 2-9 --output 3-12 --versus-batches 2,4"
    run(f"workload --like tiny {sizes} --versus")
    out = last_line(capsys)
    best = max(out["transformers_2_tok_s"], out["transformers_4_tok_s"])
    assert out["over_transformers"] == pytest.approx(out["refilled_tok_s"] / best)


def test_init_writes_a_folder_that_loads(tmp_path, capsys):
    bench.main(["init", "--like", "tiny", "--layers", "1", "--out", str(tmp_path / "m")])
    model = load_model(tmp_path / "m", torch.bfloat16)
    assert model.config.n_layers == 1
    assert model.embed.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "command, keys",
    [
        ("logprobs --like toy --tokens 40 --chunk 16", "time_over_naive memory_over_naive peak_GB"),
        (
            "step --like toy --tokens 60 --longest 30 --layer 3 --recompute",
            "share_of_matmul peak_GB",
        ),
        ("bupo --tokens 512 --width 16", "faster_than_reference over_flop_fraction"),
        ("optimizer --tokens 4", "ns_per_parameter bytes_per_parameter"),
        ("lens --like toy --tokens 20 --layers 2", "faster memory"),
    ],
)
def test_training_commands_measure_equal_things(command, keys, capsys, monkeypatch):
    """Both sides of a comparison compute the same numbers, and the last line is one JSON object."""
    for name in ("toy", "qwen3-0.6b"):
        monkeypatch.setitem(shapes.SHAPES, name, Config("qwen3", 97, 16, 8, 2, 1, 8, 32, tied=True))
    bench.main([*command.split(), "--repeats", "1"])
    out, name = last_line(capsys), command.split()[0]
    assert out["command"] == name and set(keys.split()) <= out.keys()
    if name == "bupo":
        assert out["same_parameters"] and out["gradients_apart"] < 1e-5
    if name == "lens":
        assert out["entropies_apart"] < 1e-4


def test_a_first_session_on_a_gpu_in_miniature(tmp_path, capsys):
    """Every part and every line of it, the kernel emulated, on tiny shapes; a row for each part."""
    out = tmp_path / "gpu.jsonl"
    with flash_kernel() as kernel:
        bench.main(["gpu", "--device", "cpu", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == [*bench_gpu.PARTS]
    assert all(row["torch"] == torch.__version__ and "commit" in row for row in rows)
    assert "error" not in out.read_text() and "left_out" not in out.read_text()
    seen = {row["part"]: row for row in rows}
    assert "pytest" in seen["tests"]["pytest"]["tail"]
    assert (bench_gpu.ROOT / "tests/test_gpu.py").exists()
    assert seen["weights"]["several_updates"]["apart_over_way"] < 1e-6
    assert seen["split"]["1 micro-batches"] == 0 and seen["split"]["8 micro-batches"] < 0.01
    assert len([key for key in seen["head"] if "logits" in key]) == 6
    assert seen["attention"]["tail of 3, 8 splits"]["apart"] == 0 and kernel["backward"]
    assert seen["decode"]["tiny B=2"]["share_of_copy"] > 0
    assert 0 < seen["update"]["tiny recompute"]["mfu"] < 1
    assert seen["optimizer"]["split"]["ns_per_parameter"] > 0
    assert all(len(seen["profile"][key]) == 15 for key in ("4 decode steps", "update"))
    assert seen["runs"]["sparing"]["updates"] > 0


def test_a_part_that_fails_or_takes_too_long_costs_only_itself(tmp_path, monkeypatch):
    """A measurement, a whole part, a part out of time, and one whose process dies."""

    def part(device, left):
        yield "first", lambda: 1 / 3
        yield "broken", lambda: 1 / 0
        yield "slow", lambda: time.sleep(60)
        yield "last", lambda: 1

    def broken(device, left):
        raise ValueError("no such\nthing")
        yield

    monkeypatch.setattr(bench_gpu, "PARTS", {"part": (part, 30), "broken": (broken, 30)})
    out = tmp_path / "gpu.jsonl"
    bench.main(["gpu", "--device", "cpu", "--seconds", "1", "--out", str(out)])
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["first"] == 0.3333 and "ZeroDivisionError" in first["broken"]["error"]
    assert "time is up" in first["slow"]["error"] and first["left_out"] == ["last"]
    assert second["error"] == "ValueError: no such thing"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    bench_gpu.apart("part", 30, out)
    assert json.loads(out.read_text().splitlines()[-1])["error"] == "ended with exit code 1"
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    bench_gpu.apart("part", 1, out)
    assert json.loads(out.read_text().splitlines()[-1])["error"] == "killed after 1 s"


def test_on_a_gpu_every_part_is_a_process_of_its_own_while_time_is_left(tmp_path, monkeypatch):
    """In order, each with what is left; then rows that say why there is nothing."""
    started, clock, out = [], iter(range(0, 10**6, 65)), tmp_path / "gpu.jsonl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu, "apart", lambda name, left, out: started.append((name, left)))
    monkeypatch.setattr(bench_gpu.time, "perf_counter", lambda: next(clock))
    bench.main(["gpu", "--seconds", "500", "--out", str(out)])
    names = [*bench_gpu.PARTS]
    assert started == [(name, 500 - 65 * (i + 1)) for i, name in enumerate(names[:7])]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"part": name, "skipped": "no time left"} for name in names[7:]]


def test_a_session_without_a_gpu_or_of_unknown_parts_is_one_line():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here: --device cpu"):
            bench.main(["gpu"])
    with pytest.raises(ValueError, match="heads: no such part; there are tests"):
        bench.main(["gpu", "--device", "cpu", "--parts", "head,heads"])
