"""The figures and tables of README and docs, from the rows in results/experiments.

    python -m experiments.report            writes docs/results.md and what is marked elsewhere
    python -m experiments.report --check    exit code 1 if a file would change

docs/results.md is docs/results.in.md with its placeholders filled in:

    {table layers}                             the table of an experiment
    {figure layers}                            its figure
    {layers/grpo accuracy 60}                  an arm's mean after a step, 0.91 [0.89, 0.93]
    {layers/bupo3 - grpo accuracy end}         difference of two arms over the same seeds
    {layers/bupo3 - grpo accuracy 10 verdict}  "higher" or "lower" where its interval is without 0,
                                               "no difference seen" where 0 is in it
    {lines grpo.py}                            how long a file is

`accuracy` can be any quantity of a row: accuracy/SET, length, reward, seconds, tflop; `end` is the
last step. README and the other pages hold the same words in a mark, and what stands behind it is
replaced: <!-- layers/grpo accuracy 60 -->0.91 [0.89, 0.93]<!-- end -->
Exit codes: 0, 1 a file would change, 2 usage, 3 a placeholder or its rows are not there: then
nothing is written.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from experiments import table
from experiments.arms import EXPERIMENTS
from plumbing.cli import Parser, guarded
from plumbing.data import DataError
from plumbing.rows import each_row

HOME = Path(__file__).resolve().parents[1]
RESULTS = "results/experiments"
# a letter first, and more than one word: \boxed{20} is none
PLACEHOLDER = re.compile(r"\{([A-Za-z][^{}]*[\s/][^{}]*)\}")
MARK = re.compile(r"<!-- ([^<>]+) -->((?!<!--).)*<!-- end -->", re.DOTALL)


class Report:
    """What placeholders stand for, in a checkout at `root`."""

    def __init__(self, root):
        self.root = root
        self.rows = {}  # of each experiment

    def rows_of(self, name) -> list[dict]:
        """The committed rows of an experiment, but for those whose commands are no longer its."""
        if name not in EXPERIMENTS:
            raise DataError(f"no experiment {name!r}: there are {', '.join(EXPERIMENTS)}")
        if name not in self.rows:
            old = each_row(self.root / RESULTS / f"{name}.jsonl")
            self.rows[name] = table.rows_of(name, EXPERIMENTS[name], {}, old)
        if not self.rows[name]:
            raise DataError(f"no rows: python -m experiments.sweep {name} makes them")
        return self.rows[name]

    def text_of(self, words, page) -> str:
        """What a placeholder stands for on a page; DataError for what is none."""
        match words.split():
            case ["table", name]:
                return table.table(name, EXPERIMENTS.get(name), self.rows_of(name))
            case ["figure", name]:
                return self.figure(name, page)
            case ["lines", path] if (self.root / path).is_file():
                return str(len((self.root / path).read_text().splitlines()))
            case [arm, quantity, step]:
                return self.number(arm, None, quantity, step)
            case [arm, "-", other, quantity, step]:
                return self.number(arm, other, quantity, step)
            case [arm, "-", other, quantity, step, "verdict"]:
                return self.number(arm, other, quantity, step, verdict=True)
        raise DataError("no such placeholder; python -m experiments.report --help lists them")

    def figure(self, name, page) -> str:
        self.rows_of(name)
        path = self.root / RESULTS / f"{name}.png"
        if not path.exists():
            raise DataError(f"no {path}: python -m experiments.sweep {name} --rows-only draws it")
        link = Path(os.path.relpath(path, page.parent)).as_posix()
        return f"![{name}: accuracy over the steps]({link})"

    def number(self, arm, minus, quantity, step, verdict=False) -> str:
        """An arm's mean with its interval, a difference, or what the difference says."""
        name, _, arm = arm.partition("/")
        rows = self.rows_of(name)
        for wanted in (arm, minus or arm):
            if wanted not in EXPERIMENTS[name].arms:
                there = ", ".join(EXPERIMENTS[name].arms)
                raise DataError(f"no arm {wanted!r} in {name}: there are {there}")
        triple = table.interval(rows, arm, quantity, step, minus)
        if triple is None:
            raise DataError(f"no run has {quantity!r} at step {step!r}")
        return verdict_of(triple) if verdict else table.text_of(triple, quantity, bool(minus))

    def fill(self, text, page, pattern) -> str:
        """A page's text with its placeholders, or marks, filled in."""

        def found(match):
            words = " ".join(match[1].split())
            try:
                out = self.text_of(words, page)
            except DataError as e:
                raise DataError(f"{page.relative_to(self.root)}: {{{words}}}: {e}") from None
            if pattern is PLACEHOLDER:
                return out
            if words.startswith(("table ", "figure ")):
                out = f"\n{out}\n"
            return f"<!-- {words} -->{out}<!-- end -->"

        return pattern.sub(found, text)

    def pages(self) -> dict:
        """{path: text} of every page that is made, or holds what is made, here."""
        docs = self.root / "docs"
        source = docs / "results.in.md"
        text = source.read_text(encoding="utf-8")
        out = {docs / "results.md": self.fill(text, source, PLACEHOLDER)}
        for page in (self.root / "README.md", *sorted(docs.glob("*.md"))):
            if page.name not in ("results.md", "results.in.md"):
                out[page] = self.fill(page.read_text(encoding="utf-8"), page, MARK)
        for name, experiment in EXPERIMENTS.items():
            path = self.root / RESULTS / f"{name}.md"
            if path.with_suffix(".jsonl").exists():
                out[path] = table.page(name, experiment, self.rows_of(name))
        return out


def verdict_of(triple) -> str:
    """What the interval of a difference says."""
    mean, low, high = triple
    if low is None:  # too few values, or all equal
        return "not known" if mean else "no difference seen"
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "no difference seen"


def main(argv=None, root=HOME):
    p = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file differs")
    args = p.parse_args(argv)
    changed = 0
    for path, text in Report(root).pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        changed += 1
        print(f"{'would change' if args.check else 'written'}: {path.relative_to(root)}")
        if not args.check:
            table.replace(path, text)
    if args.check and changed:
        print("python -m experiments.report writes them", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
