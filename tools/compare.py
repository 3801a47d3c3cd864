"""Evaluations side by side, as markdown: a folder of eval.py is a row, a set is a column.

    python -m tools.compare out/eval-qwen3-4b out/eval-qwen3-4b-step_000300

Avg@K and pass@k with their 95 % intervals, and of every further folder the difference to the first.
Differences are paired: taken question by question, so how hard the questions are is no noise. Sets
of one name that do not hold the same questions are refused.
"""

from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

from eval import SETTINGS, by_question, kept_rows, light, pass_at_each_k, read_results, with_error
from plumbing.cli import Parser, guarded, natural
from plumbing.intervals import bootstrap_mean, bootstrap_paired
from plumbing.rows import printable
from plumbing.runs import label

AVERAGE = "pass@1"  # of a question: the share of its samples that are right


def read(folder) -> SimpleNamespace:
    """A folder of eval.py: its path, model, settings, sets (their scores), and
    questions = {set: {id: {"pass@k": that question's}}}.

    ValueError where samples.jsonl and results.json do not belong together.
    """
    folder = Path(folder)
    results = read_results(folder)
    sets = results.pop("sets")
    rows = {name: [] for name in sets}
    for row in kept_rows(folder):
        rows.setdefault(row["set"], []).append(light(row))
    questions = {}
    for name, score in sets.items():
        groups = by_question(folder, name, score, rows[name])
        questions[name] = {group[0]["id"]: pass_at_each_k(group) for group in groups}
        average = fmean(question[AVERAGE] for question in questions[name].values())
        if abs(average - score["avg@k"]) > 1e-9:
            raise ValueError(
                f"{folder}: the average of {name} is {average:.4f} by samples.jsonl and "
                f"{score['avg@k']:.4f} by results.json; eval.py --regrade makes them one"
            )
    return SimpleNamespace(
        folder=folder,
        name=label(str(results.get("model"))),
        settings=results,
        sets=sets,
        questions=questions,
    )


def read_all(folders) -> list[SimpleNamespace]:
    """Each folder; where two are of one model, the folders are the names."""
    runs = [read(folder) for folder in folders]
    names = {run.name for run in runs}
    for run in runs:
        if len(names) < len(runs):
            run.name = str(run.folder)
    return runs


def same_questions(a, b, name):
    """ValueError unless both runs answered the same questions of a set."""
    if a.sets[name].get("data_sha256") != b.sets[name].get("data_sha256"):
        what = "other questions or answers"
    elif a.questions[name].keys() != b.questions[name].keys():
        what = "other prompts that were too long (--max-prompt-tokens)"
    else:
        return
    raise ValueError(f"{name}: {b.folder} has {what} than {a.folder}")


def values(run, name, metric) -> dict:
    """{id: value} of the questions of a set; empty where the run has none."""
    questions = run.questions.get(name, {})
    return {id: each[metric] for id, each in questions.items() if metric in each}


def cell(run, name, metric) -> str:
    """A score of a set with its interval."""
    own = values(run, name, metric)
    if not own:
        return ""
    mean, *ends = bootstrap_mean(list(own.values()), within=(0, 1))
    score = with_error(mean, None if None in ends else ends)
    K = run.sets[name]["samples"]
    return f"{score}, K = {K}"


def difference(first, run, name, metric) -> str:
    """What the score of a set is more in a run than in the first one, question by question."""
    own = values(run, name, metric)
    theirs = values(first, name, metric)
    if not own or not theirs:
        return ""
    a = list(own.values())
    b = [theirs[id] for id in own]
    mean, low, high = bootstrap_paired(a, b, within=(0, 1))
    if low is None:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown(corner, runs, cells) -> str:
    """A table: a row a run, a column a set, in each place cells(run, set)."""
    sets = []
    for run in runs:
        sets += [name for name in run.sets if name not in sets]
    lines = [[corner, *sets], ["---"] * (len(sets) + 1)]
    for run in runs:
        lines.append([run.name, *(cells(run, name) for name in sets)])
    text = ""
    for line in lines:
        line = [printable(part, keep="").replace("|", "\\|") for part in line]
        text += f"| {' | '.join(line)} |\n"
    return text


def table(folders) -> str:
    """Avg@K of several folders."""
    return markdown("Avg@K", read_all(folders), partial(cell, metric=AVERAGE))


def other_settings(first, run) -> str:
    """The settings in which a run differs from the first, for a person; "" for none."""
    said = []
    for name in SETTINGS:
        there, here = first.settings.get(name), run.settings.get(name)
        if name != "model" and there != here:
            said.append(f"{name} {here!r:.60}, not {there!r:.60}")
    return "; ".join(said)


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="a folder of eval.py")
    add("--k", type=natural, help="of pass@k, a power of two (default: the largest that all have)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    runs = read_all(args.folders)
    first, *others = runs
    samples = [score["samples"] for run in runs for score in run.sets.values()]
    if not samples:
        raise ValueError(f"{first.folder} holds no set yet")
    for run in others:
        for name in run.sets:
            if name in first.sets:
                same_questions(first, run, name)
    k = args.k or 2 ** (min(samples).bit_length() - 1)
    if k.bit_count() != 1 or k > max(samples):
        raise ValueError(f"--k {k}: pass@k is there for powers of two up to {max(samples)}")
    metrics = {"Avg@K": AVERAGE}
    if k > 1:
        metrics[f"pass@{k}"] = f"pass@{k}"
    for title, metric in metrics.items():
        print(markdown(title, runs, partial(cell, metric=metric)))
        if others:
            against = f"{title} minus that of {first.name}"
            print(markdown(against, others, partial(difference, first, metric=metric)))
    for run in others:
        if different := other_settings(first, run):
            print(printable(f"{run.folder} was sampled or judged otherwise: {different}"))


if __name__ == "__main__":
    guarded(main)
