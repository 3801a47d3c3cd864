"""Every figure, from the files that runs write: nothing is measured here, so that
a figure can be redrawn and changed years later.

    python -m tools.plot out/run                  metrics.jsonl of train.py:
                                                  training.png, training.svg
    python -m tools.plot out/decompose-qwen3-4b   entropy.jsonl and its companions of
                                                  decompose.py: entropy_flow, rms, ...

One colour is one model (or one training step, dark to light), one panel is one
kind of state. A line is a mean over response tokens (of ranks, the median), a
band the middle half of them. Colours are Okabe and Ito's, told apart by
colour-blind readers.

A line of a file that is no row (torn by a full disk, or foreign) is left out
and counted.
"""

import argparse
import json
import sys
import textwrap
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from plumbing.figures import number, settings
from plumbing.rows import read_rows
from plumbing.runs import MOST_LAYERS, internal_phases, run_name, whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
LOOKS = [(COLOURS[i % 7], DASHES[i % 4]) for i in range(28)]
WIDTH = 9.0  # inches; at 100 dots an inch the column of a blog
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.color": "0.9",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "svg.hashsalt": "nanobupo",  # the same data gives the same bytes
}
MOST_RUNS = 50  # models or training steps in one figure
NOTE = dict(fontsize=8, color="0.35")
FLOW_LAYERS = 12  # up to here a line through the states in their order can be followed by eye
LENS_TOKENS = 14  # columns of a heat-map

matplotlib.rcParams.update(STYLE)

# ----------------------------------------------------------------------------------------------
# what the figures show

# what to look for, by the title of a figure
SEE = {
    "Entropy of every internal policy": "High is undecided, low is decided: see at which layer the "
    "model makes up its mind, and what the writes of each layer do to that.",
    "Entropy change by layer": "Above 0 a part makes the policy less certain, below 0 more "
    "certain. The paper trains the last layer whose MLP is above 0.",
    "Root mean square of residual and writes": "Without a norm the size of a state acts as an "
    "inverse temperature: where it grows, entropies fall for that reason alone.",
    "Cosine of what is written with what is there": "At 0 a write is new, above 0 it adds to what "
    "is there, below 0 it takes some away. The last panel: where H^l turns to its final direction.",
    "How far each layer is from the answer": "See from which layer on the token produced is among "
    "the first, and the layer's policy close to the model's own.",
    "What each layer would say": "Read a column from the bottom up: where the frames begin, the "
    "layers have settled on the token that was produced.",
    "Through training, on the same tokens": "See which layers training changes. A perplexity that "
    "rises while an internal layer is trained is the paper's collapse.",
    "Which writes carry the response": "The further below 0 a bar of the first row, the more the "
    "response needs that write. The last row is what the write says by itself.",
    "Training": "Reward and held-out accuracy should rise. The last panel says whether to trust "
    "them: both of its lines should stay where they begin, without jumps.",
}
KINDS = (
    ("H^l, the residual", "resid_post"),
    ("A^l, what attention writes", "attn_out"),
    ("F^l, what the MLP writes", "mlp_out"),
)
# panels over layers: heading, component or None, key, and that of the quartiles of a band
CHANGES = (
    ("attention: H(A^l) - H(norm H^{l-1})", None, "dH_attn", "dH_attn_q{}"),
    ("MLP: H(F^l) - H(norm resid_mid)", None, "dH_mlp", "dH_mlp_q{}"),
    ("layer: H(H^l) - H(H^{l-1})", None, "dH_layer", "dH_layer_q{}"),
)
RMS = tuple((heading, component, "rms", None) for heading, component in KINDS)
COSINES = (
    ("A^l with H^{l-1}", "attn_out", "cos_resid", None),
    ("F^l with resid_mid", "mlp_out", "cos_resid", None),
    ("A^l + F^l with H^{l-1}", "resid_post", "cos_resid", None),
    ("H^l with H^L", "resid_post", "cos_final", None),
)
RANKS = (
    ("rank of the token produced, 1 = most likely", "resid_post", "rank_q50", "rank_q{}"),
    ("KL(model's own policy || layer's), nats", "resid_post", "kl_to_final", None),
)
ATTRIBUTION = (
    (("zero_attn", "zero_mlp"), "left out:\nnats of log-prob a token"),
    (("mean_attn", "mean_mlp"), "its mean instead:\nnats of log-prob a token"),
    (("direct_attn", "direct_mlp"), "direct attribution:\nnats of the token's logit"),
)
# panels of training: heading, unit, and (key, label) of their lines
TRAINING = (
    ("reward and accuracy", "", (("reward", "reward"), ("eval/accuracy", "held-out accuracy"))),
    ("response length", "tokens", (("completions/mean_length", "mean"),)),
    (
        "entropy",
        "nats",
        (("entropy", "the model's own policy"), ("inter/entropy", "internal layer's policy")),
    ),
    (
        "stability",
        "log scale",
        (("grad_norm", "gradient norm"), ("sampler_diff/mean", "|sampler - trainer| log-prob")),
    ),
)
TRAINING_KEYS = [key for *_, lines in TRAINING for key, _ in lines]

# ----------------------------------------------------------------------------------------------
# reading

WORDS = ("run", "model", "norm", "dtype", "component")  # fields that hold text


def has(row, *names):
    """Whether a row holds these fields, texts where text belongs, and numbers or null elsewhere."""
    for name, value in row.items():
        if name in WORDS:
            fits = isinstance(value, str)
        else:
            fits = number(value) or (value is None and name not in names)
        if not fits:
            return False
    return all(name in row for name in names)


def is_metrics(row):
    """Whether this is a row of metrics.jsonl that has something to draw."""
    return whole(row.get("step"), 0, 2**53) and any(number(row.get(key)) for key in TRAINING_KEYS)


def is_state(row):
    """Whether this is a row of entropy.jsonl."""
    L = row.get("n_layers")
    layer = row.get("paper_layer")
    names = ("run", "norm", "dtype", "component", "temperature", "ln_vocab", "tokens")
    return whole(L, 1, MOST_LAYERS) and whole(layer, 0, L) and has(row, *names, "entropy_nats")


def is_change(row):
    """Whether this is a row of entropy_change.jsonl."""
    return whole(row.get("paper_layer"), 1, MOST_LAYERS) and has(row, "run")


def is_attribution(row):
    """Whether this is a row of attribution.jsonl: a number for every layer under every key."""
    lists = [row.get(key) for keys, _ in ATTRIBUTION for key in keys]
    if not all(isinstance(x, list) and all(map(number, x)) for x in lists):
        return False
    known = isinstance(row.get("run"), str) and whole(row.get("example_id"), 0, 10**9)
    same_length = len(set(map(len, lists))) == 1 and 1 <= len(lists[0]) <= MOST_LAYERS
    return known and same_length and whole(row.get("tokens"), 1, 10**9)


# file: is this a row, where it belongs (two of one place are one written twice), what it should be
ROWS = {
    "metrics.jsonl": (
        is_metrics,
        ("step",),
        f"a row with a step and one of {', '.join(TRAINING_KEYS)}",
    ),
    "entropy.jsonl": (is_state, ("run", "component", "paper_layer"), "a row of decompose.py"),
    "entropy_change.jsonl": (is_change, ("run", "paper_layer"), "a row of decompose.py"),
    "attribution.jsonl": (
        is_attribution,
        ("run", "example_id"),
        "a row of decompose.py --attribute",
    ),
}


def drawable(path, kind):
    """The rows of a file of a kind, a key of ROWS; of those of the same place the last. What is
    left out is counted on stderr.

    Texts become labels (see `plain`). Raises as `read_rows`, and ValueError when no row is left.
    """
    is_row, place, what = ROWS[kind]
    rows, skipped = read_rows(path, is_row)
    last = {tuple(row[key] for key in place): row for row in rows}
    skipped += len(rows) - len(last)
    if not last:
        why = f"none of its {skipped} lines is {what}" if skipped else "no rows in it yet"
        raise ValueError(f"{path}: {why}")
    if skipped:
        why = "torn, no rows, or written again further down"
        print(f"{path}: {skipped} lines left out: {why}", file=sys.stderr)
    for row in last.values():
        row.update({word: plain(row[word]) for word in WORDS if isinstance(row.get(word), str)})
    return list(last.values())


# name: axes (S states, M tokens, k most likely ones) and kinds of values (i, u whole, f, U text)
TOKENS = {
    "meta": ("", "U"),
    "component": ("S", "U"),
    "layer": ("S", "iu"),
    "example": ("M", "iu"),
    "position": ("M", "iu"),
    "token": ("M", "iu"),
    "entropy": ("SM", "f"),
    "top_ids": ("SMk", "iu"),
    "top_probs": ("SMk", "f"),
    "text_ids": ("n", "iu"),
    "text": ("n", "U"),
}


def read_tokens(path, arrays=TOKENS):
    """These arrays of a tokens.npz of decompose.py, its meta as a dict; ValueError for all else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a regular file")
    try:
        with np.load(path, allow_pickle=False) as file:
            t = {name: file[name] for name in arrays}
        meta = json.loads(str(t["meta"]))
    except Exception as e:  # a damaged archive raises a dozen kinds, all of which mean the same
        why = " ".join(str(e).split())
        raise ValueError(f"{path}: not a readable tokens.npz ({why:.80})") from None
    sizes = {}
    for name, (axes, kinds) in arrays.items():
        shape = list(t[name].shape)
        dtype = t[name].dtype
        sizes = dict(zip(axes, shape, strict=False)) | sizes
        if shape != [sizes.get(axis) for axis in axes] or dtype.kind not in kinds:
            raise ValueError(f"{path}: {name} is {dtype} {shape}")
    names = ("run", "norm", "dtype", "temperature", "vocab_size")
    if not isinstance(meta, dict) or not has(meta, *names):
        raise ValueError(f"{path}: its meta is not that of decompose.py")
    t["meta"] = {key: plain(x) if isinstance(x, str) else x for key, x in meta.items()}
    t["meta"]["ln_vocab"] = np.log(meta["vocab_size"])
    return t


# ----------------------------------------------------------------------------------------------
# labels


@cache
def glyphs():
    """The characters that the font of the figures has."""
    font = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(font).get_charmap())


def shown(text, most=60):
    r"""Text as a label: escapes, \n, \x9f, \u200b or \U0001f600, for what cannot be seen and for
    what the font lacks; cut to `most` characters, but not inside an escape."""
    parts = []
    for c in text[: most + 1]:
        seen = c.isprintable() and ord(c) in glyphs()
        parts.append(c if seen else c.encode("unicode_escape").decode())
    if len("".join(parts)) <= most:
        return "".join(parts)
    kept = len(parts)
    while kept > 1 and len("".join(parts[:kept])) >= most:
        kept -= 1
    return "".join(parts[:kept]) + "\u2026" * (kept < len(parts))


def plain(text):
    """A name as a label, whatever it holds: `shown`, with dollars that are no mathematics."""
    return shown(text).replace("$", r"\$")


def printable(text, most=8):
    """A token's text for a cell, its spaces as dots."""
    return shown(text.replace(" ", "\u00b7"), most)


def runs_of(rows):
    """{run: its rows}, in the order of the file; ValueError for more than a figure can show."""
    out = {}
    for row in rows:
        out.setdefault(row["run"], []).append(row)
    if len(out) > MOST_RUNS:
        raise ValueError(f"{len(out)} models or steps are too many for one figure: {MOST_RUNS} fit")
    return out


def names_of(rows):
    """The models of a figure: "NAME", or of training steps "NAME: step 0, step 20"."""
    runs = {run: mine[0].get("model", run) for run, mine in runs_of(rows).items()}
    models = set(runs.values())
    if len(models) == 1 and models.isdisjoint(runs):
        return shown(f"{models.pop()}: {', '.join(runs)}", 120)
    names = [run if run == model else f"{model} {run}" for run, model in runs.items()]
    return shown(", ".join(names), 120)


def caption_of(rows):
    """What an entropy must not be shown without: model, norm, positions, dtype, how many tokens,
    ln V."""
    return (
        f"{names_of(rows)}\n"
        f"{settings(rows[0])}\n"
        f"at the states that produced {rows[0]['tokens']:,} response tokens  |  "
        "line: mean (rank: median), band: middle half of the tokens"
    )


# ----------------------------------------------------------------------------------------------
# drawing


def new_figure(rows, columns, height, **options):
    """A figure of a blog column's width and its axes [rows, columns], drawn without a display."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panel_grid(n, columns, **options):
    """A figure of n panels in rows of at most `columns`, and their axes."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure, axes = new_figure(rows, columns, 2.5 * rows + 0.7, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, axes.flat[:n]


def finish(figure, path, title, caption):
    """Title above; below what to see here, large, and the caption, small. PNG and SVG; returns both
    paths."""
    see = textwrap.fill(SEE[title], 110)
    strip = 0.1 + 0.2 * len(see.splitlines())  # inches that the sentence takes
    height = figure.get_figheight() + strip
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, strip / height, 1, 1 - strip / height))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, x=0.01, ha="left", **NOTE)
    bottom = 0.1 + 0.14 * len(caption.splitlines())  # of the sentence, above the caption
    figure.text(0.01, bottom / height, see, fontsize=11, va="bottom")
    png, svg = (Path(path).with_suffix(kind) for kind in (".png", ".svg"))
    figure.savefig(png)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def styles(runs):
    """{run: (colour, dash)}: training steps from dark to light, other models by colour and dash."""
    stepped = [name for name, rows in runs.items() if rows[0].get("step") is not None]
    if len(stepped) < 3:
        return dict(zip(runs, 2 * LOOKS, strict=False))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(stepped)))
    shades = {name: (tuple(shade), "-") for name, shade in zip(stepped, shades, strict=True)}
    return dict.fromkeys(runs, ("0.5", "--")) | shades


def draw(ax, rows, key, look, label=None, band=None, x="paper_layer"):
    """A line of rows' key over their layer, and the band of its quartiles `band` (a format with {}
    for 25 and 75)."""
    rows = sorted((row for row in rows if row.get(key) is not None), key=lambda row: row[x])

    def column(key):
        return np.array([row.get(key) for row in rows], float)  # null is NaN

    colour, dash = look
    ax.plot(
        column(x),
        column(key),
        dash,
        color=colour,
        label=label,
        marker="o" if len(rows) < 13 else None,
    )
    if band:
        low = column(band.format(25))
        high = column(band.format(75))
        ax.fill_between(column(x), low, high, color=colour, alpha=0.15, linewidth=0)


def heading(ax, title, xlabel="", zero=False):
    """Title of a panel whose x counts; with `zero` a line there."""
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if zero:
        ax.axhline(0, color="0.3", linewidth=0.8)


def of(rows, *components):
    return [row for row in rows if row.get("component") in components]


# ----------------------------------------------------------------------------------------------
# figures of decompose.py


def entropy_flow(rows, path):
    """Mean entropy along the stream: embed, A^1, F^1, H^1, A^2, ..., final; one panel a model. Rows
    are those of entropy.jsonl. Of a deep model the three kinds of state have a line each and the
    grey one, which goes from state to state, is left out: it would cross out the others."""
    runs = runs_of(rows)
    figure, axes = new_figure(len(runs), 1, 2.4 * len(runs) + 1.8, sharex=True, sharey=True)
    for ax, (name, mine) in zip(axes[:, 0], runs.items(), strict=True):
        flow_panel(ax, mine)
        ax.set_title(name)
    xlabel = "layer (its attention and MLP writes stand to the left of its residual)"
    axes[-1, 0].set_xlabel(xlabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return finish(figure, path, "Entropy of every internal policy", caption_of(rows))


def flow_panel(ax, rows):
    """The panel of one model in `entropy_flow`: x counts states, A^1 1, F^1 2, H^1 3, A^2 4, ..."""
    L = rows[0]["n_layers"]
    ln_vocab = rows[0]["ln_vocab"]
    end = 3 * L + max(2, L // 4)
    way = []
    for (label, kind), shift, look in zip(KINDS, (0, -2, -1), LOOKS, strict=False):
        own = of(rows, kind, "embed") if kind == "resid_post" else of(rows, kind)
        own = [{**row, "x": 3 * row["paper_layer"] + shift} for row in own]
        draw(ax, own, "entropy_nats", look, label, "entropy_nats_q{}", x="x")
        way += [(row["x"], row["entropy_nats"]) for row in own]
    if L <= FLOW_LAYERS:
        ax.plot(*zip(*sorted(way), strict=True), color="0.8", linewidth=0.7, zorder=1)
    for row in of(rows, "final"):
        quartiles = [row.get(f"entropy_nats_q{q}") for q in (25, 75)]
        ax.plot([end] * 2, quartiles, color="0.6", linewidth=5, solid_capstyle="butt")
        label = "final: norm(H^L), the model's own policy"
        ax.plot(end, row["entropy_nats"], "D", color="black", markersize=5, label=label)
    ax.axhline(ln_vocab, color="0.3", linestyle=":")
    place = dict(transform=ax.get_yaxis_transform(), ha="right", va="bottom")
    ax.text(0.99, 1.01 * ln_vocab, "ln V, uniform", **place, **NOTE)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("entropy, nats")
    every = max(1, L // 12)
    ticks = range(every, L + 1, every)
    ax.set_xticks([0, *(3 * l for l in ticks), end], ["embed", *ticks, "final"])


def layer_figures(rows, changes, folder):
    """Entropy change, RMS, cosines, and rank with KL, each by layer: rows of entropy.jsonl and
    entropy_change.jsonl."""
    told = {row["run"]: row for row in rows}
    # what the caption needs
    changes = [{**told[row["run"]], **row} for row in changes if row["run"] in told]
    out = by_layer(changes, CHANGES, folder / "entropy_change", "Entropy change by layer", "nats")
    title = "Root mean square of residual and writes"
    out += by_layer(rows, RMS, folder / "rms", title, "RMS, log scale", sharey=True)
    title = "Cosine of what is written with what is there"
    out += by_layer(rows, COSINES, folder / "cosine", title, "cosine", columns=2, sharey=True)
    title = "How far each layer is from the answer"
    return out + by_layer(rows, RANKS, folder / "rank", title, "log scale", columns=2)


def by_layer(rows, panels, path, title, unit, columns=3, sharey=False):
    """Small multiples over layers, panels as CHANGES; those without data are left out."""
    filled = []
    for name, component, key, band in panels:
        mine = of(rows, component) if component else rows
        if any(row.get(key) is not None for row in mine):
            filled.append((name, runs_of(mine), key, band))
    if not filled:
        return []
    figure, axes = panel_grid(len(filled), columns, sharey=sharey)
    look = styles(runs_of(rows))
    log = unit.endswith("log scale")
    for ax, (name, runs, key, band) in zip(axes, filled, strict=True):
        for run, mine in runs.items():
            draw(ax, mine, key, look[run], run, band=band)
        heading(ax, name, "layer", zero=not log)
        if log:
            ax.set_yscale("log", nonpositive="mask")
    figure.supylabel(unit, fontsize=9)
    if len(look) > 1:
        axes[0].legend()
    return finish(figure, path, title, caption_of(rows))


def lenses(file):
    """Two logit-lens heat-maps of a tokens.npz, layers by tokens: a cell's text is its top-1 token,
    framed where that is the token really produced, its colour the entropy (nats) or the probability
    of the top-1 token. Those of tokens-2.npz carry its number."""
    t = read_tokens(file)
    rows = np.flatnonzero(np.isin(t["component"], ["embed", "resid_post", "final"]))
    if not t["top_ids"][rows].size:
        return []
    columns = neighbours(t)
    place = np.ix_(rows, columns)
    ln_vocab = t["meta"]["ln_vocab"]
    first, last = t["position"][columns[[0, -1]]] + 1
    caption = (
        f"{t['meta']['run']}  |  {settings(t['meta'])}\n"
        f"tokens {first} to {last} of one response  |  "
        "text: top-1 token of each layer's policy, framed and bold where it is the token produced"
    )
    out = []
    for name, values, unit, scale in (
        ("entropy", t["entropy"], "entropy, nats", dict(cmap="viridis_r", vmax=ln_vocab)),
        ("probability", t["top_probs"][..., 0], "probability of the top-1 token", dict(vmax=1)),
    ):
        figure, axes = new_figure(1, 1, 1.5 + 0.24 * len(rows))
        image = axes[0, 0].imshow(values[place], aspect="auto", origin="lower", vmin=0, **scale)
        bar = figure.colorbar(image, ax=axes[0, 0], pad=0.01, fraction=0.03)
        bar.set_label(unit)
        fill_cells(image, t, rows, columns)
        path = file.with_name(file.stem.replace("tokens", f"lens_{name}"))
        out += finish(figure, path, "What each layer would say", caption)
    return out


def neighbours(t):
    """Indices of the first tokens of a table that follow each other in one response."""
    index = np.arange(len(t["token"]))[:LENS_TOKENS]
    example = t["example"][index]
    position = t["position"][index]
    follows = (example == example[0]) & (position == position[0] + index)
    return index[np.logical_and.accumulate(follows)]


def fill_cells(image, t, rows, columns):
    """The texts of a heat-map: its axes, and its cells in ink that can be read on their colour."""
    ax = image.axes
    texts = dict(zip(t["text_ids"], t["text"], strict=True))
    text_of = np.vectorize(lambda i: printable(texts.get(i, f"<{i}>")), otypes=[object])
    top = t["top_ids"][..., 0][np.ix_(rows, columns)]
    token = t["token"][columns]
    bright = image.to_rgba(image.get_array())[..., :3] @ [0.299, 0.587, 0.114]
    for (y, x), text in np.ndenumerate(text_of(top)):
        ink = "black" if bright[y, x] > 0.5 else "white"
        produced = top[y, x] == token[x]
        if produced:
            frame = dict(fill=False, edgecolor=ink)
            ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **frame))
        ax.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            color=ink,
            fontsize=min(7, 56 / max(len(text), 1)),
            fontweight="bold" if produced else "normal",
            parse_math=False,
        )
    ax.grid(False)
    layers = np.where(t["component"] == "resid_post", t["layer"], t["component"])
    ax.set_yticks(range(len(rows)), layers[rows], fontsize=7)
    ax.set_xticks(range(len(columns)), text_of(token), fontsize=7, parse_math=False)
    ax.set_ylabel("layer")
    ax.set_xlabel("token produced")


def through_training(rows, changes, path):
    """Feature refinement over training steps: cosine of H^l with H^L and dH_mlp by layer, one line
    a step, and perplexity over steps."""
    looks = styles(runs_of(rows))
    rows = [row for row in rows if row.get("step") is not None]
    runs = runs_of(rows)
    if len(runs) < 2:
        return []
    figure, axes = new_figure(1, 3, 3.4)
    cosines, entropies, perplexities = axes[0]
    for run, mine in runs.items():
        draw(cosines, of(mine, "resid_post"), "cos_final", looks[run], run)
        draw(entropies, [row for row in changes if row["run"] == run], "dH_mlp", looks[run])
    final = []
    for row in of(rows, "final"):
        if row.get("logprob_token") is not None:
            final.append({**row, "perplexity": np.exp(min(-row["logprob_token"], 200))})
    draw(perplexities, final, "perplexity", LOOKS[0], x="step")
    heading(cosines, "cosine of H^l with H^L", "layer")
    heading(entropies, "dH_mlp, nats", "layer", zero=True)
    heading(perplexities, "perplexity of these responses", "step")
    cosines.legend()
    return finish(figure, path, "Through training, on the same tokens", caption_of(rows))


def attribution(rows, path):
    """Change of the response's log-prob when a write is left out or replaced by its mean, by layer,
    above direct logit attribution; means over responses, weighted by their tokens."""
    runs = runs_of(rows)
    figure, axes = new_figure(len(ATTRIBUTION), len(runs), 7.2, sharex=True, sharey="row")
    for column, (name, mine) in zip(axes.T, runs.items(), strict=True):
        for ax, (keys, _) in zip(column, ATTRIBUTION, strict=True):
            attribution_panel(ax, mine, keys)
        column[0].set_title(name)
        column[-1].set_xlabel("layer")
    for ax, (_, unit) in zip(axes[:, 0], ATTRIBUTION, strict=True):
        ax.set_ylabel(unit)
    axes[0, 0].legend()
    caption = (
        f"means over {sum(row['tokens'] for row in mine):,} response tokens  |  "
        "below 0: the response is less likely without this write\n"
        "one write at a time, so that the bars do not add up to the whole  |  between -0.1 and 0.1 "
        "the first two scales are linear, beyond logarithmic"
    )
    return finish(figure, path, "Which writes carry the response", caption)


def attribution_panel(ax, rows, keys):
    """Bars of attention's and the MLP's writes by layer; rows of one model."""
    L = len(rows[0]["zero_attn"])
    weight = np.array([row["tokens"] for row in rows], float)
    looks = (-0.2, "attention", "///"), (0.2, "MLP", "")
    for key, colour, (shift, label, hatch) in zip(keys, COLOURS, looks, strict=False):
        mean = np.average([row[key] for row in rows], 0, weight)
        ax.bar(
            np.arange(1, L + 1) + shift,
            mean,
            width=0.4,
            color=colour,
            label=label,
            hatch=hatch,
            edgecolor="white",
        )
    heading(ax, "", zero=True)
    if keys[0] != "direct_attn":  # one layer outweighs the others a hundred times
        ax.set_yscale("symlog", linthresh=0.1)


# ----------------------------------------------------------------------------------------------
# the figure of train.py


def training(metrics, out):
    """Reward, length, entropies and stability over the steps of metrics.jsonl, internal phases
    shaded; keys that no row has are left out.

    metrics: path of metrics.jsonl; out: where to write, as PNG and SVG. Returns the paths written.
    Raises as `drawable`.
    """
    rows = sorted(drawable(metrics, "metrics.jsonl"), key=lambda row: row["step"])
    present = {key for row in rows for key in TRAINING_KEYS if number(row.get(key))}
    phases = internal_phases(rows)
    panels = []
    for title, unit, lines in TRAINING:
        if lines := [line for line in lines if line[0] in present]:
            panels.append((title, unit, lines))
    figure, axes = panel_grid(len(panels), 2)
    for ax, (title, unit, lines) in zip(axes, panels, strict=True):
        heading(ax, title, "step")
        ax.set_ylabel(unit)
        if unit == "log scale":
            ax.set_yscale("log", nonpositive="mask")
        for first, last, layer in phases:
            ax.axvspan(first - 0.5, last + 0.5, color="0.92", zorder=0)
            middle = (first + last) / 2
            place = dict(transform=ax.get_xaxis_transform(), ha="center", va="top")
            ax.text(middle, 0.99, f"layer {layer}", **place, **NOTE)
        for (key, label), look in zip(lines, LOOKS, strict=False):
            training_line(ax, rows, phases, key, label, *look)
        if len(lines) > 1:
            ax.legend()
    caption = f"{plain(run_name(Path(metrics).parent))}, {len(rows):,} steps"
    if phases:
        said = "; ".join(f"steps {a} to {b} train layer {l}" for a, b, l in phases)
        caption += f"  |  shaded: {shown(said, 200)}"
    return finish(figure, out, "Training", caption)


def training_line(ax, rows, phases, key, label, colour, dash):
    """The values of one key over the steps that have it; many of them are smoothed."""
    rows = [row for row in rows if number(row.get(key))]
    if key == "inter/entropy":  # afterwards it is the model's own
        rows = [row for row in rows if any(a <= row["step"] <= b for a, b, _ in phases)]
    x, y = (np.array([row[name] for row in rows], float) for name in ("step", key))
    if key.startswith("eval/"):  # few, so that each is marked
        ax.plot(x, y, "o-", label=label, color=colour)
        return
    if len(y) >= 40:
        ax.plot(x, y, color=colour, alpha=0.25)
        y = running_mean(y, 2 * (len(y) // 50) + 1)
    ax.plot(x, y, dash, label=label, color=colour)


def running_mean(y, width):
    """Centred mean of y over `width` values, of fewer at the ends."""
    ones = np.ones(min(width, len(y)))
    return np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")


# ----------------------------------------------------------------------------------------------


def decomposition(file):
    """The figures of an entropy.jsonl and of the entropy_change.jsonl beside it."""
    rows = drawable(file, "entropy.jsonl")
    folder = file.parent
    changes = []
    if (folder / "entropy_change.jsonl").exists():
        changes = drawable(folder / "entropy_change.jsonl", "entropy_change.jsonl")
    out = []
    if of(rows, "attn_out", "mlp_out", "resid_post"):
        out = entropy_flow(rows, folder / "entropy_flow")
    out += layer_figures(rows, changes, folder)
    return out + through_training(rows, changes, folder / "through_training")


DRAWERS = (  # which files a figure is drawn from
    ("metrics.jsonl", lambda file: training(file, file.with_name("training"))),
    ("entropy.jsonl", decomposition),
    ("tokens*.npz", lenses),
    (
        "attribution.jsonl",
        lambda file: attribution(drawable(file, file.name), file.with_suffix("")),
    ),
)


def folder(path):
    """Draw all figures that the files of a folder allow, into it; returns their paths.

    Raises FileNotFoundError when there is nothing to draw, and ValueError or OSError when a file
    cannot be read or drawn; the other files' figures are there all the same.
    """
    out = []
    wrong = []
    for pattern, drawer in DRAWERS:
        for file in sorted(Path(path).glob(pattern)):
            try:
                out += drawer(file)
            except (ValueError, OSError) as e:
                wrong.append(e)
    if wrong:
        raise wrong[0]
    if not out:
        raise FileNotFoundError(
            f"{path}: nothing to draw; give a folder that holds metrics.jsonl (train.py writes it) "
            "or entropy.jsonl (decompose.py)"
        )
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what train.py or decompose.py wrote; figures go into it")
    args = parser.parse_args(argv)
    try:
        for path in folder(args.folder):
            print(path)
    except (ValueError, OSError) as e:
        print(f"plot.py: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, FileNotFoundError) else 3)


if __name__ == "__main__":
    main()
