"""WALKTHROUGH.md is what the code does today, and what it names is there."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import tiny
import train
from grpo import policy_loss
from tools import walkthrough

PAGE = (walkthrough.HOME / "WALKTHROUGH.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])\d+\.(\d+)")
AGAIN = "python -m tools.walkthrough writes it again"


def differences(old, new) -> list[str]:
    """Where two pages differ, apart from where their lines break. Of numbers with a decimal point
    two units of the last digit are allowed, for another CPU rounds otherwise; texts, ids and whole
    numbers are equal."""
    words, found = (re.split(r"\s+", page.strip()) for page in (old, new)), []
    for a, b in zip(*words, strict=False):
        numbers = [list(NUMBER.finditer(word)) for word in (a, b)]
        same = NUMBER.sub("#", a) == NUMBER.sub("#", b)
        for x, y in zip(*numbers, strict=False):
            unit = 10.0 ** -len(x[1])
            same &= len(x[1]) == len(y[1]) and abs(float(x[0]) - float(y[0])) < 2.5 * unit
        if not same:
            found.append(f"{a} -> {b}")
    if len(old.split()) != len(new.split()):
        found.append(f"{len(old.split())} -> {len(new.split())} words")
    return found


def test_the_page_is_what_the_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "Transformer", None)  # no warm-up is trained: the committed one is it
    walkthrough.main(["--out", str(tmp_path / "page.md")])
    now = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert not differences(PAGE, now), AGAIN


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        ("-1.6176 | `7` 0.998", "-1.6178  |\n`7` 0.999", True),
        ("-1.6176", "-1.6179", False),
        ("-0.0001", "0.0001", False),
        ("0.5", "0.50", False),
        ("M = 1,720", "M = 1,721", False),
        ("`3+4=7, 7-7=0. \\boxed{0}`", "`3+4=7, 7-7=0. \\boxed{1}`", False),
        ("None", "0.000", False),
        ("a b", "a b c", False),
    ],
)
def test_what_counts_as_a_difference(old, new, equal):
    assert (not differences(old, new)) == equal


def test_every_function_it_names_is_there():
    named = set(re.findall(r"`([\w/]+)\.py: ([\w.]+)`", PAGE))
    assert len(named) > 25
    for file, name in named:
        thing = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)
        source = inspect.getsourcefile(inspect.unwrap(thing))  # and not imported from elsewhere
        assert Path(source) == walkthrough.HOME / f"{file}.py", name


def test_every_command_and_flag_parses():
    commands = re.findall(r"python train\.py([^\n`]*)", PAGE)
    flags = re.findall(r"`(--[a-z-]+ [^`]+)`", PAGE)
    assert len(commands) == 3 and len(flags) > 6
    for typed in (*commands, *flags):
        args = train.parse(shlex.split(typed))
        train.schedule(args, tiny.CONFIG)


def test_an_excerpt_whose_line_is_gone_says_where():
    with pytest.raises(ValueError, match="^grpo.py: policy_loss has no line with 'no such words'"):
        walkthrough.Page().code(policy_loss, "ratio =", "no such words")
