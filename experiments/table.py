"""What came of an experiment's runs: their rows, means and intervals over seeds, table and figure.

    NAME.jsonl   a row an arm and seed: accuracy, length, ... at the steps that were evaluated
    NAME.md      the table
    NAME.png     accuracy over the steps

Of a row every quantity is {step: value}: `accuracy` of the held-out problems, `accuracy/SET` of
further ones, `seconds`, `tflop` and `internal_steps` of all training until then, and what KEPT
names of that step's row of metrics.jsonl.
"""

import json
import math
import shlex
import textwrap
from collections import Counter
from itertools import chain

import numpy as np

from plumbing.intervals import bootstrap_mean, bootstrap_paired
from plumbing.rows import each_row, read_json
from tools.plot import LOOKS, NOTE, heading, new_figure, plain

# no training. Set-up holds the warm-up, which only the first run of a seed has to make
ASIDE = "time/setup", "time/eval", "time/watch"
KEPT = {
    "length": "completions/mean_length",
    "reward": "reward",
    "entropy": "entropy",
    "trained_entropy": "inter/entropy",
    "layer_entropy": "watch/layer_entropy",
    "layer_rms": "watch/layer_rms",
    "layer_kl": "watch/layer_kl",
    "layer_cos": "watch/layer_cos",
    "grad_norm": "grad_norm",
}
DIGITS = {
    "length": ".1f",
    "internal_steps": ".1f",
    "seconds": ".0f",
    "tflop": ".3g",
    "grad_norm": ".3g",
    "layer_kl": ".3g",
}  # of all else .2f

# --------------------------------------------------------------------------------------------------
# rows


def words_of(experiment, arm) -> tuple[str, ...]:
    """Program and flags of an arm, as after `python`. A flag given twice counts the last time."""
    program = shlex.split(experiment.command)
    own = shlex.split(experiment.arms[arm])
    if own[:1] == ["-m"]:
        program = []
        while own and not own[0].startswith("--"):
            program.append(own.pop(0))
    flags = {}
    name = None
    for word in shlex.split(experiment.common) + own:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags[name] = [name, value] if equals else [name]
        elif name:
            flags[name].append(word)
        else:
            raise ValueError(f"arm {arm}: {word!r} stands before any flag")
    return (*program, *chain(*flags.values()))


def command_of(name, experiment, arm, seed) -> str:
    """What a person types to make a run."""
    words = shlex.join(words_of(experiment, arm))
    return f"python {words} --seed {seed} --out out/{name}/{arm}/seed{seed}"


def curves_of(metrics) -> dict:
    """{quantity: {step: value}} at the steps of metrics.jsonl's rows that were evaluated, and at
    step 1."""
    curves = {}
    seconds = tflop = 0.0
    internal = 0  # steps of internal phases until then
    for row in filter(None, metrics):
        tflop += row.get("train_tflop", 0.0)
        internal += row.get("phase") == "internal"
        for key in row:
            if key.startswith("time/") and key not in ASIDE:
                seconds += row[key]
        if "eval/accuracy" not in row and row.get("step") != 1:
            continue
        here = {"seconds": seconds or None, "tflop": tflop or None, "internal_steps": internal}
        here |= {name: row.get(key) for name, key in KEPT.items()}
        for key in row:
            if key.startswith("eval/accuracy"):
                here[key.removeprefix("eval/")] = row[key]
        for quantity, value in here.items():
            if value is not None:
                curves.setdefault(quantity, {})[str(row["step"])] = round(value, 6)
    return curves


def row_of(folder) -> dict:
    """What a run folder says of its code and of what came of it."""
    config = folder / "config.json"
    settings = read_json(config) if config.exists() else {}
    out = {
        "commit": settings.get("commit"),
        "torch": settings.get("torch"),
    }
    return out | curves_of(each_row(folder / "metrics.jsonl"))


def rows_of(name, experiment, folders, old) -> list[dict]:
    """The rows of an experiment, by arm and seed.

    folders: {(arm, seed): folder} of runs that are finished
    old: rows of earlier, None for a torn one; those of other runs stay while their command is the
        experiment's
    """
    found = {}
    for row in filter(None, old):
        arm = row.get("arm")
        seed = row.get("seed")
        if arm not in experiment.arms:
            continue
        if row.get("command") == command_of(name, experiment, arm, seed):
            found[arm, seed] = row
    for (arm, seed), folder in folders.items():
        command = command_of(name, experiment, arm, seed)
        row = {"arm": arm, "seed": seed, "command": command}
        found[arm, seed] = row | row_of(folder)
    arms = list(experiment.arms)
    return sorted(found.values(), key=lambda row: (arms.index(row["arm"]), row["seed"]))


# --------------------------------------------------------------------------------------------------
# over seeds


def values(rows, arm, quantity, step) -> dict:
    """{seed: value} of an arm after a step, or after each run's last one for "end"."""
    out = {}
    for row in rows:
        curve = row.get(quantity, {})
        at = max(curve, key=int, default=None) if step == "end" else str(step)
        if row["arm"] == arm and at in curve:
            out[row["seed"]] = curve[at]
    return out


def interval(rows, arm, quantity, step, minus=None):
    """(mean, low, high) over the seeds of an arm; with `minus` of its differences to that arm, over
    the seeds that both have. None without any; low and high are None where the values do not tell,
    see plumbing/intervals.py."""
    within = (0, 1) if quantity.startswith("accuracy") else (0, math.inf)
    if quantity in ("reward", "layer_cos"):  # may be below 0
        within = None
    mine = values(rows, arm, quantity, step)
    if not minus:
        return bootstrap_mean(list(mine.values()), within=within) if mine else None
    other = values(rows, minus, quantity, step)
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    mine = [mine[seed] for seed in seeds]
    other = [other[seed] for seed in seeds]
    return bootstrap_paired(mine, other, within=within)


def text_of(triple, quantity, signed=False) -> str:
    """0.91 [0.89, 0.93]; 0.91 without an interval, see `interval`; "" for None."""
    if triple is None:
        return ""
    form = "+" if signed else ""
    form += DIGITS.get(quantity, ".2f")
    if signed and any(x and float(format(x, form)) == 0 for x in triple[1:]):
        form = "+.3f"  # on which side of 0 an end lies can be seen
    numbers = []
    for x in triple:
        text = format(x or 0.0, form)
        numbers.append(text if float(text) else text.lstrip("+-"))  # 0.00 has no sign
    mean, low, high = numbers
    return mean if triple[1] is None else f"{mean} [{low}, {high}]"


# --------------------------------------------------------------------------------------------------
# table and figure


def held_out(rows) -> list[str]:
    """The quantities that are accuracies, that of the first held-out problems first."""
    names = set()
    for row in rows:
        names |= {name for name in row if name.startswith("accuracy")}
    return sorted(names)


def cells_of(experiment, rows) -> list[list[str]]:
    """The columns that any run has, each with its heading and a cell an arm."""
    first = next(iter(experiment.arms))
    lasts = set()
    for row in rows:
        if row.get("accuracy"):
            lasts.add(max(map(int, row["accuracy"])))
    last = f"step {max(lasts)}" if len(lasts) == 1 else "end"
    steps = {f"step {step}": step for step in experiment.at}
    steps[last] = "end"
    columns = []

    def add(title, quantity, step="end", minus=None):
        column = [title, "---"]
        for arm in experiment.arms:
            triple = interval(rows, arm, quantity, step, minus)
            text = text_of(triple, quantity, signed=bool(minus))
            column.append("" if arm == minus else text)
        if any(column[2:]):
            columns.append(column)

    for label, step in steps.items():
        add(f"accuracy, {label}", "accuracy", step)
    for quantity in held_out(rows)[1:]:
        add(f"{quantity.removeprefix('accuracy/')}, {last}", quantity)
    for label, step in steps.items():
        add(f"minus {first}, {label}", "accuracy", step, first)
    for title in ("length", "seconds", "TFLOP"):
        add(title, title.lower())
    for words in experiment.more:
        quantity, step = words.split()
        add(f"{quantity.replace('_', ' ')}, step {step}", quantity, step)
    return columns


def table(name, experiment, rows) -> str:
    """A row an arm, as markdown; below it the seeds, the commits and the command."""
    count = Counter(row["arm"] for row in rows)
    n = max(experiment.seeds, *count.values())
    arms = ["arm", "---"]
    for arm in experiment.arms:
        short = f" ({count[arm]} of {n} seeds)" if count[arm] < n else ""
        arms.append(arm + short)
    cells = cells_of(experiment, rows)
    lines = [f"| {' | '.join(line)} |" for line in zip(arms, *cells, strict=True)]
    commits = {row["commit"][:7] for row in rows if row["commit"]}
    brackets = "in brackets 95 % intervals by bootstrap over seeds"
    if n < 3:
        brackets = "too few for intervals"
    note = (
        f"Means over {n} seeds, {brackets}. Differences "
        "are of runs of the same seed. Seconds and TFLOP are of training, without evaluation. "
        f"Commit {', '.join(sorted(commits)) or 'unknown'}."
    )
    more = f" --seeds 1-{n}" if n > experiment.seeds else ""
    lines += ["", textwrap.fill(note, 100)]
    lines += ["", f"    python -m experiments.sweep {name}{more}"]
    return "\n".join(lines)


def page(name, experiment, rows) -> str:
    """NAME.md: the question, the table, and what each arm is."""
    lines = [textwrap.fill(experiment.question, 100), ""]
    lines += [table(name, experiment, rows), ""]
    for arm in experiment.arms:
        words = shlex.join(words_of(experiment, arm))
        lines.append(f"- {arm}: `python {words}`")
    lines += ["", f"![accuracy over the steps]({name}.png)", ""]
    return "\n".join(lines)


def draw(experiment, rows, path):
    """Accuracy over the steps, a panel a held-out set; a line is the mean over seeds, a band its 95
    % interval."""
    sets = held_out(rows) or ["accuracy"]
    figure, axes = new_figure(1, len(sets), 3.8)
    for ax, quantity in zip(axes[0], sets, strict=True):
        heading(ax, quantity.replace("/", ", "), "step")
        for arm, look in zip(experiment.arms, LOOKS, strict=False):
            band(ax, rows, arm, quantity, look)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel("line: mean over seeds, band: 95 % interval of it", x=0.01, ha="left", **NOTE)
    figure.savefig(path, format="png")


def band(ax, rows, arm, quantity, look):
    """An arm's line and band, where it has values."""
    mine = [row.get(quantity, {}) for row in rows if row["arm"] == arm]
    steps = sorted(map(int, set(chain(*mine))))
    if not steps:
        return
    triples = [interval(rows, arm, quantity, step) for step in steps]
    mean, low, high = np.array(triples, float).T  # None is NaN
    colour, dash = look
    ax.plot(steps, mean, dash, color=colour, label=plain(arm))
    ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def write(name, experiment, folders, results):
    """NAME.jsonl, NAME.md and NAME.png in the folder `results`, each replaced as a whole: from runs
    that are finished and the rows that are there, see `rows_of`. Nothing where there are none."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.jsonl"
    rows = rows_of(name, experiment, folders, each_row(path))
    if not rows:
        return
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))
    replace(path.with_suffix(".md"), page(name, experiment, rows))
    drawn = results / f".new-{name}.png"
    draw(experiment, rows, drawn)
    drawn.replace(path.with_suffix(".png"))


def replace(path, text):
    """Write a file so that a kill leaves the old one or the new one."""
    new = path.with_name(f".new-{path.name}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
