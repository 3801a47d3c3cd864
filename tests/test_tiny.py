"""The embedded default's problems, tokenizer and warm-up."""

import json
import random

import torch

import tiny
from plumbing import arithmetic, tokenizer
from plumbing.hub import load_model
from verify import verify


def test_worked_answers_are_right_and_guesses_mostly_not():
    rng, right = random.Random(0), 0
    for _ in range(2000):
        numbers = arithmetic.draw_sum(rng)
        assert verify(tiny.worked(numbers), str(sum(numbers)))
        right += verify(tiny.blurted(numbers, rng), str(sum(numbers)))
    assert 120 < right < 250  # one in eleven
    assert tiny.worked([7, 8, -5]) == "7+8=15, 15-5=10. \\boxed{10}"


def test_held_out_problems_are_disjoint_and_reproducible():
    train = {p.question for s in (0, 1) for p in tiny.problems(5000, s)}
    test = {p.question for s in (0, 1) for p in tiny.problems(500, s, held_out=True)}
    assert not train & test and len(test) > 500
    assert tiny.problems(50, 3) == tiny.problems(50, 3) != tiny.problems(50, 4)
    assert all(eval(p.question) == int(p.answer) for p in tiny.problems(200, 5))


def test_tokenizer_is_bytes(tmp_path):
    tiny.write_tokenizer(tmp_path)
    t = tokenizer.load_tokenizer(tmp_path)
    for text in ("7+8=15. \\boxed{15}\n", "é漢🙂", "\x00 ~\x7f", "<|endoftext|>"):
        assert t.encode(text) == list(text.encode()) and t.decode(t.encode(text)) == text
    assert (t.stop_ids, t.n_vocab, t.format) == ((tiny.END,), tiny.END + 1, "base")
    assert t.chat("7+8", system="") == list(b"7+8\n")


def test_warm_up_is_cached_and_reproducible(tmp_path):
    a, b, c = (
        tiny.warm_up(tmp_path / n, s, steps=3, batch=8) for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    wa, wb, wc = (load_model(f).embed.weight for f in (a, b, c))
    assert torch.equal(wa, wb) and not torch.equal(wa, wc)
    stamp = (a / "model.safetensors").stat().st_mtime_ns
    tiny.warm_up(a, 1, steps=3, batch=8)
    assert (a / "model.safetensors").stat().st_mtime_ns == stamp  # kept
    tiny.warm_up(a, 2, steps=3, batch=8)
    assert torch.equal(load_model(a).embed.weight, wc)  # another seed: done again
    assert json.loads((a / "generation_config.json").read_text())["eos_token_id"] == tiny.END


def test_it_is_well_under_a_million_parameters():
    from plumbing import memory as plan

    assert 100_000 < plan.parameters(tiny.CONFIG) < 300_000
