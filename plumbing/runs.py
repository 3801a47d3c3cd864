"""A run folder as those see it who did not write it: what it is called, its checkpoints, its
internal phases."""

import re
from itertools import groupby
from pathlib import Path

from plumbing.rows import each_row, read_json

MOST_LAYERS = 1000  # no model has more; a foreign file may


def run_name(run):
    """What a run is called: the model that its config.json names, a name or a path, and its folder
    where that says something else."""
    folder = Path(run).resolve()
    try:
        model = read_json(folder / "config.json").get("model")
    except (ValueError, OSError):
        return folder.name
    if not isinstance(model, str):
        return folder.name
    model = Path(model).name
    if model.casefold() in folder.name.casefold():
        return folder.name
    return f"{model}-{folder.name}"


def label(name):
    """A model's name for captions and folders: of a path its last part, but a hub cache's
    repository, a run's model, and for a checkpoint (step_000300, warm-up) its run before it."""
    path = Path(name)
    if not path.is_dir():
        return path.name or str(name)
    path = path.resolve()
    if path.parent.name == "snapshots":  # models--Qwen--Qwen3-4B/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2]
    if path.name == "warm-up" or path.name.startswith("step_"):
        return f"{run_name(path.parent)}-{path.name}"
    return run_name(path)


def folder_name(name):
    """`label` as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", label(name)).strip(".") or "model"


def checkpoints(run):
    """{step: folder} of a run's checkpoints; 0 is the model that it started from."""
    run = Path(run)
    saved = {}
    for config in run.glob("step_" + 6 * "[0-9]" + "/config.json"):
        folder = config.parent
        saved[int(folder.name.removeprefix("step_"))] = folder
    config = run / "config.json"
    if (run / "warm-up").is_dir():  # where the embedded default starts
        saved[0] = run / "warm-up"
    elif saved and config.is_file():
        saved[0] = read_json(config).get("model")
    return saved


def whole(x, least, most):
    """Whether x is a whole number from `least` to `most`."""
    return type(x) is int and least <= x <= most


def internal_phases(rows, n_layers=None):
    """[(first step, last step, layer)] of the internal phases in metrics.jsonl rows: where
    `inter/layer` is below L.

    n_layers: L; without it and without `phase` in the rows, L is the highest layer of the rows: a
    run that has not left its internal phase then shows none.
    """
    known = []
    for row in rows:
        if whole(row.get("step"), 0, 2**53) and whole(row.get("inter/layer"), 1, MOST_LAYERS):
            known.append(row)
    L = n_layers or max((row["inter/layer"] for row in known), default=0)

    def phase(row):
        layer = row["inter/layer"]
        return layer, layer < L or row.get("phase") == "internal"

    phases = []
    for (layer, internal), group in groupby(known, phase):
        steps = [row["step"] for row in group]
        if internal:
            phases.append((steps[0], steps[-1], layer))
    return phases


def internal_steps(run, n_layers):
    """The last step of a run's internal phases, by its metrics.jsonl; 0 without."""
    rows = [row for row in each_row(Path(run) / "metrics.jsonl") if row]
    phases = internal_phases(rows, n_layers)
    return phases[-1][1] if phases else 0
