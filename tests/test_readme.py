"""Every command of README is run here, made small by further flags; of one that needs a network or
a GPU only the plan is printed. The example in Python is run too."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import decompose
import eval as evaluation
import train
from experiments import sweep

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "--prompts 2 --group 2 --mini-prompts 2 --slots 4 --max-new-tokens 8 --eval-limit 4"
# program and flags, then what is added. In this order: the later need what the earlier leave
RUN = {
    "train.py": f"{SMALL} --save-every 60 --seed 1",  # whose warm-up is there
    "eval.py --model out/tiny/step_000060 --data sums-test,sums-long --system '' "
    "--max-new-tokens 64": "--limit 2",
    "decompose.py --model out/tiny/warm-up --compare out/tiny/step_000060 "
    "--samples-file out/tiny/samples.jsonl --limit 300": "--limit 4",
    "train.py --out out/grpo --bupo-layer none": f"{SMALL} --steps 1 --seed 1",
    "-m experiments.sweep layers": "--list",
    "-m experiments.sweep words": "--list",
    "train.py --model qwen3-4b --dry-run --memory 80": "",
    # needs the network, and the next three GPUs
    "train.py --recipe words": "--dry-run",
    "train.py --recipe gsm8k": "--dry-run --memory 24",
    "train.py --model qwen3-4b --bupo-layer 6 --bupo-steps 30": "--dry-run --memory 80",
    "train.py --model qwen3-8b --bupo-layer 6 --bupo-steps 20": "--dry-run --memory 80",
}
NOT_RUN = {
    "make": "installs",
    "make test": "is this",
    "-m tools.bench gpu": "needs a GPU; tests/test_bench.py runs its parts",
    "eval.py --model out/qwen3-4b/step_000300 --data math500,aime24,aime25,amc23 --paper": "needs "
    "that checkpoint; tests/test_eval.py has --paper",
}
MAIN = {
    "train.py": train.main,
    "eval.py": evaluation.main,
    "decompose.py": decompose.main,
    "-m": lambda words: sweep.main(words[1:]),
}


def commands(text) -> list[str]:
    """What a page says to type, from the program on: lines of its indented blocks without their
    comments, and `python ...` in a sentence."""
    lines = re.findall(r"`(python [^`]+)`", text)
    for block in re.findall(r"\n\n((?: {4}.*\n)+)", text):
        lines += block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            found.append(" ".join(words))
        elif words[:1] in (["python"], ["torchrun"]):
            words = shlex.split(" ".join(words))
            start = 3 if words[0] == "torchrun" else 1
            found.append(shlex.join(words[start:]))
    return found


def test_every_command_is_here():
    assert set(commands(README)) == RUN.keys() | NOT_RUN.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: it has the warm-ups that they would make."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tiny", "grpo"):
        shutil.copytree(ROOT / "results/tiny/warm-up", folder / "out" / name / "warm-up")
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    program, *words = shlex.split(f"{command} {RUN[command]}")
    MAIN[program](words)


def test_the_example_asks_every_layer(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    layers = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [number for number, token in layers] == ["1", "2", "3", "4"]
    assert layers[-1][1] == "\\"  # as README says: it wants to guess


def anchors(page) -> set[str]:
    """What `page#...` can name: its headings in lower case, without signs, with dashes."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    assert links or page.name in ("verifier.md", "memory.md")
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:", "{")):
            continue
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link
