"""Recipes name flags that there are, with values these take; estimates are shares of a whole."""

import sys

import pytest

import train
from plumbing.recipes import RECIPES
from plumbing.shapes import SHAPES
from tools import estimate


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_flags_typed_out_would_be(name):
    """A misspelt name would be a default of nothing, silently."""
    typed = []
    for flag, value in RECIPES[name].items():
        typed += [f"--{flag.replace('_', '-')}", str(value)]
    by_name, by_hand = vars(train.parse(["--recipe", name])), vars(train.parse(typed))
    for flag in RECIPES[name]:
        assert by_name[flag] == by_hand[flag], flag


def test_flags_override_a_recipe():
    args = train.parse(["--recipe", "words", "--steps", "3", "--model", "FOLDER"])
    assert (args.steps, args.model, args.lr) == (3, "FOLDER", RECIPES["words"]["lr"])


def test_estimates_are_shares_and_print_as_a_table(monkeypatch, capsys):
    for name in ("qwen3-0.6b", "qwen3-4b"):
        kept, recomputed = (
            estimate.update(SHAPES[name], 16384, 2048, again, 650e12, 4.3e12)
            for again in (False, True)
        )
        assert kept[0] < recomputed[0] and 0 < recomputed[1] < kept[1] < 1
        assert 0 < estimate.decode(SHAPES[name], 1, 2048, 4.3e12)[1] < 1
    monkeypatch.setattr(sys, "argv", ["estimate.py"])
    estimate.main()
    assert "0.85 (0.51)" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("qwen3-4b")
    )
