"""One page to look inside a run with a browser: what each layer would say, what was answered, and
what the numbers of metrics.jsonl mean.

    python -m tools.page out/tiny                   page.html in the run folder; the lens shows the
                                                    first model and the newest checkpoint
    python -m tools.page out/decompose-qwen3-4b     the lens of what decompose.py has measured
    python -m tools.page out/eval-qwen3-0.6b --model qwen3-0.6b

The page needs no server and no network, and stays below MOST_BYTES. What files and models say is
inlined as JSON, and the template, tools/page.html, shows it as text and never as markup. Of its
three parts each needs other files; one that cannot be shown says why in its place.
"""

import argparse
import base64
import fnmatch
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from decompose import is_sample, measure_all, token_text, vocabulary
from plumbing import figures
from plumbing.cli import Parser, given, natural
from plumbing.figures import number
from plumbing.hub import load_model, resolve
from plumbing.rows import one_line, printable, read_rows
from plumbing.runs import checkpoints, internal_phases, label, run_name, whole
from plumbing.tokenizer import load_tokenizer

TEMPLATE = Path(__file__).with_suffix(".html")
METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
MOST_BYTES = 3_000_000  # of the page
ROLLOUT_BYTES = 600_000  # of the responses in it
MOST_WEIGHTS = 1_000_000_000  # bytes of models that are looked into without being asked for
LENS_TOKENS = 100  # of a response
TEXT = 2000  # characters of a question or a response
SCORED = 500  # tokens of a response with their log-probs
MOST_FIELDS = 150  # of metrics.jsonl
POINTS = 300  # of a curve
ERRORS = ValueError, OSError, RuntimeError, MemoryError, SafetensorError


class Texts:
    """The texts of tokens, each once: calling it with a token id gives its place in the list."""

    def __init__(self, text_of):
        self.text_of = text_of
        self.places = {}

    def __call__(self, token):
        return self.places.setdefault(int(token), len(self.places))

    def listed(self):
        return [shown(self.text_of(token), 40) for token in self.places]


def shown(text, most=TEXT):
    """Text of a file or a model as the page holds it: what hides or reorders text as escapes."""
    return printable(str(text)[:most])


def thinned(items, most):
    """At most so many of the items of a list, evenly spaced, the last among them."""
    step = -(-len(items) // most) or 1
    return items[::-step][::-1]


# ----------------------------------------------------------------------------------------------
# the lens


@dataclass
class Measured:
    """What decompose.py says of one model or two on the same tokens."""

    names: list  # of the models
    tables: list  # of decompose.py, one a model
    titles: dict  # {example of the tables: what it answers}
    text_of: Callable  # the text of a token id


def from_models(folders, groups, text_of, limit):
    """Measure models [(name, folder)] on the first response of some groups of samples."""
    firsts = [group[0] for group in groups]
    rows = thinned([row for row in firsts if is_sample(row) and row["ids"]], limit)
    if not rows:
        raise FileNotFoundError("no responses with token ids: samples.jsonl holds them")
    names, paths = zip(*folders, strict=True)
    if vocabulary(paths[0]) != vocabulary(paths[-1]):
        raise ValueError("the vocabularies of the two models differ: the same ids are other texts")
    sequences = []
    for row in rows:
        prompt = row["prompt_ids"]
        sequences.append((prompt + row["ids"][:LENS_TOKENS], len(prompt)))
    tables = []
    for path in paths:
        components = ("embed", "resid_post", "final")
        tables.append(measure_all(load_model(path), sequences, components=components))
    titles = [f"{place(row)}: {shown(row['question'], 300)}" for row in rows]
    return Measured(names, tables, dict(enumerate(titles)), text_of)


# more of a table than the figures draw, and what two of them must have in common
ARRAYS = {
    "logprob": ("SM", "f"),
    "rank": ("SM", "iu"),
    "kl": ("SM", "f"),
}
SAME = "example", "position", "token", "component", "layer"


def from_tables(folder, limit):
    """The first and the last tokens.npz of decompose.py in a folder."""
    from tools.plot import TOKENS, read_tokens  # loads matplotlib, which a run's page does not need

    files = sorted(folder.glob("tokens*.npz"), key=lambda file: (len(file.name), file.name))
    first = read_tokens(files[0], TOKENS | ARRAYS)
    tables = [first]
    if len(files) > 1:
        tables.append(read_tokens(files[-1], TOKENS | ARRAYS))
    if not policies(first):
        raise FileNotFoundError("no states of the residual stream: see decompose.py --components")
    texts = {}
    for table in tables:
        texts |= zip(table["text_ids"].tolist(), table["text"].tolist(), strict=True)
        if not all(np.array_equal(table[name], first[name]) for name in SAME):
            raise ValueError(f"{files[-1]}: other tokens than {files[0].name}; measure both again")
    examples = thinned(np.unique(first["example"]).tolist(), limit)
    titles = {i: f"response {i + 1}" for i in examples}
    names = [table["meta"]["run"] for table in tables]
    return Measured(names, tables, titles, lambda i: texts.get(i, f"<{i}>"))


def policies(table):
    """{row of a table: layer} of the states that are policies of the stream: the embedding, 0, and
    1 .. L. Layer L is the model's own policy, norm(H^L), where that was measured."""
    names = table["component"].tolist()
    layers = table["layer"].tolist()
    last = max(layers) if "final" in names else None
    found = {}
    for s, (name, layer) in enumerate(zip(names, layers, strict=True)):
        if name in ("embed", "final") or (name == "resid_post" and layer != last):
            found[s] = layer
    return found


def columns(table, example):
    """Indices of the first tokens of an example that follow each other."""
    index = np.flatnonzero(table["example"] == example)[:LENS_TOKENS]
    position = table["position"][index]
    follows = position == position[0] + np.arange(len(index))
    return index[np.logical_and.accumulate(follows)]


# numbers of a table that the page holds, as whole ones: 100 is hundredths of a nat
SCALES = {"entropy": 100, "logprob": 100, "rank": 1, "kl": 100, "top_probs": 1000}


def cells(table, index, texts):
    """What a model says at M tokens, as lists [S][M]: the numbers of SCALES, -1 where one was not
    measured; of the k most likely tokens [S][M k], their places in `texts` too."""
    at = np.ix_(list(policies(table)), index)
    k = table["top_ids"].shape[-1]
    out = {"k": k, "top": [[texts(i) for i in row.flat] for row in table["top_ids"][at]]}
    for name, scale in SCALES.items():
        x = np.nan_to_num(scale * table[name][at], nan=-1).round().astype(int)
        out[name] = x.reshape(len(x), -1).tolist()
    return out


def lens(measured, examples, texts):
    """The first tab: every model at some examples of its table."""
    table = measured.tables[0]
    meta = table["meta"]
    responses = []
    for example in examples:
        index = columns(table, example)
        response = {
            "title": measured.titles[example],
            "first": int(table["position"][index[0]]) + 1,
            "tokens": [texts(i) for i in table["token"][index]],
            "models": [cells(one, index, texts) for one in measured.tables],
        }
        responses.append(response)
    return {
        "models": [shown(name, 120) for name in measured.names],
        "layers": list(policies(table).values()),  # 0 is the embedding
        "vocab_size": int(meta["vocab_size"]),
        "settings": figures.settings({**meta, "ln_vocab": np.log(meta["vocab_size"])}),
        "responses": responses,
    }


# ----------------------------------------------------------------------------------------------
# the rollouts


def read_samples(folder):
    """Responses of one step to one question, or to one question of a set, as lists of rows of
    samples.jsonl, in its order."""

    def is_rollout(row):
        return isinstance(row.get("question"), str) and isinstance(row.get("response"), str)

    rows, _ = read_rows(folder / "samples.jsonl", is_rollout)
    groups = {}
    for row in rows:
        groups.setdefault((place(row), row["question"]), []).append(row)
    if not groups:
        raise ValueError(f"{folder}/samples.jsonl: no responses in it")
    return list(groups.values())


def place(row):
    """Where a response comes from: a step of training, or a question of eval.py."""
    if whole(row.get("step"), 0, 2**53):
        return f"step {row['step']}"
    return shown(row.get("id", "response"), 80)


def rollout(row, texts):
    """A response. Its log-probs, in hundredths of a nat, are those of the policy that drew it;
    files of older runs hold none, and no advantage."""
    ids = row["ids"] if is_sample(row) else []
    out = {"text": shown(row["response"]), "length": len(ids)}
    for name in ("reason", "extracted", "finish_reason"):
        out[name] = shown(row.get(name) or "", 80)
    for name in ("reward", "advantage"):
        if number(row.get(name)):
            out[name] = row[name]
    logprobs = row.get("logprobs")
    known = isinstance(logprobs, list) and all(map(number, logprobs))
    if texts and known and len(logprobs) == len(ids) > 0:
        out["tokens"] = [texts(i) for i in ids[:SCORED]]
        out["logprobs"] = [round(100 * x) for x in logprobs[:SCORED]]
    return out


def rollouts(groups, texts):
    """The second tab: groups evenly spaced through the file, as many as ROLLOUT_BYTES hold."""

    def card(group, texts):
        about = {name: shown(group[0].get(name) or "") for name in ("question", "answer")}
        rows = [rollout(row, texts) for row in group]
        return {"place": place(group[0]), **about, "rows": rows}

    draft = texts and Texts(None)
    kept = [(len(json.dumps(card(group, draft))), group) for group in groups]
    while len(kept) > 1 and sum(size for size, _ in kept) > ROLLOUT_BYTES:
        kept = thinned(kept, len(kept) // 2)
    return {"all": len(groups), "groups": [card(group, texts) for _, group in kept]}


# ----------------------------------------------------------------------------------------------
# the curves


def curves(folder):
    """The third tab: {field: [steps, values]} of metrics.jsonl's numbers, what they mean, and the
    internal phases."""
    rows, _ = read_rows(folder / "metrics.jsonl", lambda row: whole(row.get("step"), 0, 2**53))
    if not rows:
        raise ValueError(f"{folder}/metrics.jsonl: no rows with a step")
    rows.sort(key=lambda row: row["step"])
    fields = {}  # {field: {step: value}}
    for row in rows:
        for name, value in row.items():
            if number(value) and name != "step":
                fields.setdefault(shown(name, 60), {})[row["step"]] = float(f"{value:.5g}")
    zeros = dict.fromkeys(fields.get("reward", ()), 0)
    series = {}
    for name, values in list(fields.items())[:MOST_FIELDS]:
        if name.startswith("verdict/"):  # not written where it is 0
            values = zeros | values
        points = thinned(sorted(values.items()), POINTS)
        series[name] = list(zip(*points, strict=True))
    return {
        "series": series,
        "sections": sections(series),
        "phases": internal_phases(rows),
    }


def sections(fields):
    """[(heading, [(fields, what they mean)])] by docs/metrics.md, whose bullets name their fields
    in backticks; what it does not name comes last."""
    text = METRICS.read_text("utf-8") if METRICS.is_file() else ""
    left = dict.fromkeys(fields, True)
    out = []
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        cards = []
        for bullet in re.findall(r"^- (.+(?:\n  .+)*)", body, re.MULTILINE):
            named = re.findall("`([^`]+)`", bullet)
            names = []
            for pattern in named:  # such as update_norm/*
                for name in fnmatch.filter(left, pattern):
                    names.append(name)
                    del left[name]
            if names:
                cards.append((names, re.sub(r"`|\*\*", "", " ".join(bullet.split()))))
        if cards:
            out.append((heading, cards))
    if left:
        out.append(("Others", [([name], "") for name in left]))
    return out


# ----------------------------------------------------------------------------------------------
# the models


def find_models(folder, model, before):
    """[(name, folder)] of the models to look into, the earlier one first: those that are asked for,
    or a run's first model and newest checkpoint, as far as they are here."""
    found = [before, model]
    if not any(found):
        saved = checkpoints(folder)
        found = [saved.get(0), saved.get(max(saved, default=0))]
        found = [path for path in found if path and Path(path).is_dir()]
    names = dict.fromkeys(str(name) for name in found if name)
    return [(label(name), resolve(name)) for name in names]


def look(folder, folders, asked, groups, text_of, limit):
    """The measurements that the lens shows."""
    if not asked and any(folder.glob("tokens*.npz")):
        return from_tables(folder, limit)
    if not folders:
        raise FileNotFoundError("no model here; the folder of a run or of decompose.py has one")
    files = [file for _, path in folders for file in path.glob("model*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    if size > MOST_WEIGHTS and not asked:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights are read when they are asked for: name the model, "
            f"--model {folders[-1][1]}"
        )
    return from_models(folders, groups, text_of or "<{}>".format, limit)


def token_texts(folder):
    """The text of a token id as a function, by a model's tokenizer; None without one."""
    try:
        tokenizer = load_tokenizer(folder)
    except ERRORS:
        return None
    return lambda i: token_text(tokenizer, i)


# ----------------------------------------------------------------------------------------------
# the page


def page(folder, model=None, before=None, limit=8):
    """The page of a folder, as bytes.

    model, before: what the lens looks into; limit: responses in it, fewer where they do not fit.
    Raises FileNotFoundError when there is nothing to show, and what is wrong with a model that was
    asked for.
    """
    folder = Path(folder)
    asked = bool(model or before)
    notes = {}  # {part: why it is not there}

    def attempt(part, f, *args):
        try:
            return f(*args)
        except ERRORS as e:
            if asked and part == "lens":
                raise
            notes.setdefault(part, told(e))

    groups = attempt("rollouts", read_samples, folder)
    series = attempt("curves", curves, folder)
    folders = attempt("lens", find_models, folder, model, before)
    text_of = folders and token_texts(folders[-1][1])
    measured = attempt("lens", look, folder, folders, asked, groups or [], text_of, limit)
    if not (groups or series or measured):
        raise FileNotFoundError(f"{folder}: nothing to show ({'; '.join(notes.values())})")
    data = {"title": shown(run_name(folder), 120), "notes": notes, "curves": series}
    examples = list(measured.titles) if measured else []
    while True:
        texts = Texts(text_of or (measured and measured.text_of))
        data["rollouts"] = groups and rollouts(groups, text_of and texts)
        data["lens"] = measured and lens(measured, examples, texts)
        data["texts"] = texts.listed()
        out = filled(data)
        if len(out) <= MOST_BYTES or len(examples) < 2:
            return out
        examples.pop()


def told(error):
    """An error in one line, which may stand anywhere."""
    return printable(one_line([str(error)])[:400], keep="")


def filled(data):
    """The template with the data in it, as bytes. Its policy lets its own script and style run, and
    nothing else, whatever the data hold."""
    out = TEMPLATE.read_text("utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII, halves of pairs too
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    policy = "default-src 'none'"
    for tag in ("script", "style"):
        source = out.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = hashlib.sha256(source.encode()).digest()
        policy += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return out.replace("@POLICY@", policy).replace("@DATA@", text).encode()


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="page.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folder", type=given, help="what train.py, eval.py or decompose.py wrote")
    add("--model", type=given, help="model of the lens: a folder, preset or hub id")
    add("--before", type=given, help="another one to compare it with, on the same tokens")
    add("--limit", type=natural, default=8, help="responses in the lens (default 8)")
    add("--out", type=given, help="file to write (default FOLDER/page.html)")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.folder) / "page.html")
    try:
        out.write_bytes(page(args.folder, args.model, args.before, args.limit))
    except ERRORS as e:
        print(f"page.py: {told(e)}", file=sys.stderr)
        sys.exit(2 if isinstance(e, FileNotFoundError) else 3)
    print(out)


if __name__ == "__main__":
    main()
