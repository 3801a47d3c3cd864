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
from functools import cache
from pathlib import Path

import numpy as np

from plumbing.rows import parse_json, read_rows

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
WIDTH = 9.0  # inches; at 100 dots an inch the column of a blog
MOST_LAYERS = 1000  # no model has more; a foreign file may
MOST_RUNS = 50  # models or training steps in one figure


# ----------------------------------------------------------------------------------------------
# reading


def drawable(path, kind):
    """The rows of a file of a kind, a key of ROWS; of those of the same place the last. What is
    left out is counted on stderr.

    Texts become labels (see `plain`). Raises as `read_rows`, and ValueError when no row is left.
    """
    is_row, key, what = ROWS[kind]
    rows, skipped = read_rows(path, is_row)
    last = {key(row): row for row in rows}
    skipped += len(rows) - len(last)
    if not last:
        why = f"none of its {skipped} lines is {what}" if skipped else "no rows in it yet"
        raise ValueError(f"{path}: {why}")
    if skipped:
        print(
            f"{path}: {skipped} lines left out: torn, no rows, or written again further down",
            file=sys.stderr,
        )
    for row in last.values():
        row.update({word: plain(row[word]) for word in WORDS if word in row})
    return list(last.values())


def number(x):
    """Whether x can be drawn: a number, no NaN, no infinity, nothing that overflows an axis."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100


def whole(x, least, most):
    """Whether x is a whole number from `least` to `most`."""
    return type(x) is int and least <= x <= most


WORDS = ("run", "model", "norm", "dtype", "component")  # fields that hold text


def has(row, words, numbers):
    """Whether a row holds these texts and these numbers, and a number or null everywhere else."""
    return (
        all(isinstance(row.get(name), str) for name in words)
        and all(number(row.get(name)) for name in numbers)
        and all(isinstance(row[name], str) for name in WORDS if name in row)
        and all(x is None or number(x) for name, x in row.items() if name not in WORDS)
    )


def is_metrics(row):
    """Whether this is a row of metrics.jsonl."""
    return whole(row.get("step"), 0, 2**53)


def is_training(row):
    """Whether this is a row of metrics.jsonl that has something to draw."""
    return is_metrics(row) and any(number(row.get(key)) for key in training_keys())


def is_state(row):
    """Whether this is a row of entropy.jsonl."""
    L, layer = row.get("n_layers"), row.get("paper_layer")
    if not whole(L, 1, MOST_LAYERS) or not whole(layer, 0, L):
        return False
    numbers = ("temperature", "ln_vocab", "tokens", "entropy_nats")
    return has(row, ("run", "norm", "dtype", "component"), numbers)


def is_change(row):
    """Whether this is a row of entropy_change.jsonl."""
    return whole(row.get("paper_layer"), 1, MOST_LAYERS) and has(row, ("run",), ())


def is_attribution(row):
    """Whether this is a row of attribution.jsonl: a number for every layer under every key."""
    lists = [row.get(key) for keys, _ in ATTRIBUTION for key in keys]
    if not all(isinstance(values, list) for values in lists):
        return False
    L = len(lists[0])
    return (
        isinstance(row.get("run"), str)
        and whole(row.get("example_id"), 0, 10**9)
        and whole(row.get("tokens"), 1, 10**9)
        and 1 <= L <= MOST_LAYERS
        and all(len(values) == L and all(map(number, values)) for values in lists)
    )


def read_tokens(path):
    """The arrays of a tokens.npz of decompose.py, its meta as a dict; ValueError for all else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a regular file")
    try:
        with np.load(path, allow_pickle=False) as f:
            t = {name: f[name] for name in TOKENS}
        meta = json.loads(str(t["meta"]))
    except Exception as e:  # a damaged archive raises a dozen kinds, all of which mean the same
        why = " ".join(str(e).split())
        raise ValueError(f"{path}: not a readable tokens.npz ({why:.80})") from None
    sizes = {}
    for name, (axes, kinds) in TOKENS.items():
        shape = t[name].shape
        agree = all(sizes.setdefault(a, n) == n for a, n in zip(axes, shape, strict=False))
        if len(shape) != len(axes) or not agree or t[name].dtype.kind not in kinds:
            raise ValueError(f"{path}: {name} is {t[name].dtype} {list(shape)}")
    words, numbers = ("run", "norm", "dtype"), ("temperature", "vocab_size")
    if not isinstance(meta, dict) or not has(meta, words, numbers) or meta["vocab_size"] < 1:
        raise ValueError(f"{path}: its meta is not that of decompose.py")
    if not sizes["M"] or sizes["S"] > 10 * MOST_LAYERS:
        raise ValueError(f"{path}: {sizes['S']} states of {sizes['M']} tokens")
    t["meta"] = {k: plain(v) if isinstance(v, str) else v for k, v in meta.items()}
    return t


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


# ----------------------------------------------------------------------------------------------
# labels


@cache
def glyphs():
    """The characters that the font of the figures has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def shown(text, most=60):
    r"""Text as a label: escapes, \n, \x9f, \u200b or \U0001f600, for what cannot be seen and for
    what the font lacks; cut to `most` characters, but not inside an escape."""
    parts = []
    for c in text[: most + 1]:
        seen = c.isprintable() and ord(c) in glyphs()
        parts.append(c if seen else c.encode("unicode_escape").decode())
    if len("".join(parts)) <= most:
        return "".join(parts)
    kept = parts.pop(0)
    while parts and len(kept + parts[0]) < most:
        kept += parts.pop(0)
    return kept + "\u2026" * bool(parts)


def plain(text, most=60):
    """A name as a label, whatever it holds: `shown`, with dollars that are no mathematics."""
    return shown(text, most).replace("$", r"\$")


def printable(text, most=8):
    """A token's text for a cell, its spaces as dots."""
    return shown(text.replace(" ", "\u00b7"), most)


def model_of(run):
    """The model that a run folder's config.json says it trains, a name or a path; None without."""
    path = Path(run) / "config.json"
    try:
        config = parse_json(path.read_bytes()) if path.is_file() else None
    except OSError:
        return None
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, str) and Path(model).name else None


def run_name(run):
    """What a run is called: its model, and its folder where that says something else."""
    folder, model = Path(run).resolve().name, Path(model_of(run) or "").name
    return folder if model.casefold() in folder.casefold() else f"{model}-{folder}"


# ----------------------------------------------------------------------------------------------
# drawing


def new_figure(rows, columns, height, **options):
    """A figure of a blog column's width and its axes [rows, columns], drawn without a display and
    without touching global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def finish(figure, path, title, caption):
    """Title above, caption below, PNG and SVG; returns both paths. The same data gives the same
    bytes."""
    import matplotlib

    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8, color="0.35", x=0.01, ha="left")
    paths = [Path(path).with_suffix(kind) for kind in (".png", ".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "nanobupo", "svg.fonttype": "path"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def runs_of(rows):
    """{run: its rows}, in the order of the file; ValueError for more than a figure can show."""
    out = {}
    for row in rows:
        out.setdefault(row["run"], []).append(row)
    if len(out) > MOST_RUNS:
        raise ValueError(f"{len(out)} models or steps are too many for one figure: {MOST_RUNS} fit")
    return out


def styles(runs):
    """{run: (colour, dash)}: training steps from dark to light, other models by colour and dash."""
    stepped = [name for name, rows in runs.items() if rows[0].get("step") is not None]
    if len(stepped) < 3:
        looks = [(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(len(runs))]
        return dict(zip(runs, looks, strict=True))
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 0.9, len(stepped)))
    shade = dict(zip(stepped, map(tuple, shades), strict=True))
    return {name: (shade.get(name, "0.5"), "-" if name in shade else "--") for name in runs}


def settings(r):
    """What a policy's numbers depend on, as a part of a caption."""
    return (
        f"norm: {r['norm']}, temperature {r['temperature']:g}, {r['dtype']}"
        f"  |  ln V = {r['ln_vocab']:.2f} nats"
    )


def names_of(rows):
    """The models of a figure: "NAME", or of training steps "NAME: step 0, step 20"."""
    runs = {name: mine[0].get("model", name) for name, mine in runs_of(rows).items()}
    models = set(runs.values())
    if len(models) == 1 and models.isdisjoint(runs):
        return shown(f"{models.pop()}: {', '.join(runs)}", 120)
    return shown(", ".join(r if m == r else f"{m} {r}" for r, m in runs.items()), 120)


def caption_of(rows):
    """What an entropy must not be shown without: model, norm, positions, dtype, how many tokens,
    ln V."""
    r = rows[0]
    return (
        f"{names_of(rows)}  |  {settings(r)}\n"
        f"at the states that produced {r['tokens']:,} response tokens  |  "
        "line: mean (rank: median), band: middle half of the tokens"
    )


def draw(ax, rows, key, colour, dash, label=None, band=None, x="paper_layer"):
    """A line of rows' key over their layer, and the band of its quartiles `band` (a format with {}
    for 25 and 75)."""
    rows = sorted((r for r in rows if r.get(key) is not None), key=lambda r: r[x])
    xs, ys = [r[x] for r in rows], [r[key] for r in rows]
    marker = "o" if len(xs) < 13 else None
    ax.plot(xs, ys, dash, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)
    if not band:
        return
    low, high = band.format(25), band.format(75)
    rows = [r for r in rows if r.get(low) is not None and r.get(high) is not None]
    bounds = [r[low] for r in rows], [r[high] for r in rows]
    ax.fill_between([r[x] for r in rows], *bounds, color=colour, alpha=0.15, linewidth=0)


def note(ax, text, at, coordinates, shift, ha, va):
    """A small grey text, `shift` points from a place."""
    place = dict(xycoords=coordinates, xytext=shift, textcoords="offset points", ha=ha, va=va)
    ax.annotate(text, at, fontsize=8, color="0.35", **place)


def of(rows, *components):
    return [r for r in rows if r.get("component") in components]


def whole_numbers(ax):
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def by_layer(rows, panels, path, title, columns, height, unit, log=False, sharey=True, zero=False):
    """Small multiples over layers: panels are (heading, components or None, key, band); panels
    without data are left out."""

    def in_panel(rows, components):
        return of(rows, *components) if components else rows

    panels = [p for p in panels if any(r.get(p[2]) is not None for r in in_panel(rows, p[1]))]
    if not panels:
        return []
    columns = min(columns, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = new_figure(n_rows, columns, height * n_rows + 0.8, sharey=sharey, sharex=True)
    runs = runs_of(rows)
    look = styles(runs)
    for ax, (heading, components, key, band) in zip(axes.flat, panels, strict=False):
        for name, mine in runs.items():
            draw(ax, in_panel(mine, components), key, *look[name], label=name, band=band)
        ax.set_title(heading, fontsize=10, loc="left")
        if log:
            ax.set_yscale("log", nonpositive="mask")
        ax.set_xlim(0.5, max(r["paper_layer"] for r in rows) + 0.5)
        if zero:
            ax.axhline(0, color="0.3", linewidth=0.8)
        whole_numbers(ax)
    label_panels(axes, len(panels), columns, "layer")
    for ax in axes[:, 0]:
        ax.set_ylabel(unit, fontsize=9)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8, frameon=False)
    return finish(figure, path, title, caption_of(rows))


def label_panels(axes, n, columns, xlabel):
    """Name what the lowest of n panels count, and hide the places that no panel fills."""
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, n - columns) : n]:
        ax.set_xlabel(xlabel, fontsize=9)


# ----------------------------------------------------------------------------------------------
# figures of decompose.py

KINDS = (
    ("H^l, the residual", "resid_post"),
    ("A^l, what attention writes", "attn_out"),
    ("F^l, what the MLP writes", "mlp_out"),
)
FLOW_LAYERS = 12  # up to here a line through the states in their order can be followed by eye


def entropy_flow(rows, path):
    """Mean entropy along the stream: embed, A^1, F^1, H^1, A^2, ..., final; one panel a model. Rows
    are those of entropy.jsonl. Of a deep model the three kinds of state have a line each and the
    grey one, which goes from state to state, is left out: it would cross out the others."""
    runs = runs_of(rows)
    height = (3.1 if len(runs) < 3 else 2.2) * len(runs) + 0.9
    figure, axes = new_figure(len(runs), 1, height, sharex=True, sharey=True)
    for ax, (name, mine) in zip(axes[:, 0], runs.items(), strict=True):
        flow_panel(ax, mine)
        if len(runs) > 1:
            ax.set_title(name, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel(
        "layer (its attention and MLP writes stand to the left of its residual)", fontsize=9
    )
    axes[0, 0].legend(fontsize=8, frameon=False, ncols=2, loc="best")
    return finish(figure, path, "Entropy of every internal policy", caption_of(rows))


def flow_panel(ax, rows):
    """The panel of one model in `entropy_flow`: x counts states, A^1 1, F^1 2, H^1 3, A^2 4, ..."""
    place = {"attn_out": -2, "mlp_out": -1, "resid_post": 0}
    at = [{**r, "x": 3 * r["paper_layer"] + place[r["component"]]} for r in of(rows, *place)]
    at += [{**r, "x": 0} for r in of(rows, "embed")]
    L, ln_vocab = rows[0]["n_layers"], rows[0]["ln_vocab"]
    if L <= FLOW_LAYERS:
        way = sorted((r["x"], r["entropy_nats"]) for r in at)
        ax.plot(*zip(*way, strict=True), color="0.8", linewidth=0.7, zorder=1)
    for (label, component), colour, dash in zip(KINDS, COLOURS, DASHES, strict=False):
        own = of(at, *(("embed", component) if component == "resid_post" else (component,)))
        draw(ax, own, "entropy_nats", colour, dash, label, "entropy_nats_q{}", x="x")
    end = 3 * L + max(2, L // 4)
    for r in of(rows, "final"):
        quartiles = [r.get("entropy_nats_q25"), r.get("entropy_nats_q75")]
        if None not in quartiles:
            ax.plot([end] * 2, quartiles, color="0.6", linewidth=5, solid_capstyle="butt")
        label = "final: norm(H^L), the model's own policy"
        ax.plot(end, r["entropy_nats"], "D", color="black", markersize=5, label=label)
    ax.axhline(ln_vocab, color="0.3", linestyle=":", linewidth=1)
    note(ax, "ln V, uniform", (1, ln_vocab), ("axes fraction", "data"), (-2, 3), "right", "bottom")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("entropy, nats", fontsize=9)
    every = max(1, L // 12)
    ticks = [l for l in range(every, L + 1, every) if l == L or L - l > every / 2]
    ax.set_xticks([0, *(3 * l for l in ticks), end], ["embed", *ticks, "final"], fontsize=8)


CHANGES = (
    ("attention: H(A^l) - H(norm H^{l-1})", "dH_attn"),
    ("MLP: H(F^l) - H(norm resid_mid)", "dH_mlp"),
    ("layer: H(H^l) - H(H^{l-1})", "dH_layer"),
)
COSINES = (
    ("A^l with H^{l-1}", ("attn_out",), "cos_resid", None),
    ("F^l with resid_mid", ("mlp_out",), "cos_resid", None),
    ("A^l + F^l with H^{l-1}", ("resid_post",), "cos_resid", None),
    ("H^l with H^L", ("resid_post",), "cos_final", None),
)
RANKS = (
    ("rank of the token produced, 1 = most likely", ("resid_post",), "rank_q50", "rank_q{}"),
    ("KL(model's own policy || layer's), nats", ("resid_post",), "kl_to_final", None),
)


def layer_figures(rows, changes, folder):
    """Entropy change, RMS, cosines, and rank with KL, each by layer: rows of entropy.jsonl and
    entropy_change.jsonl."""
    told = {r["run"]: r for r in rows}
    changes = [{**told[r["run"]], **r} for r in changes if r["run"] in told]  # for the caption
    panels = [(heading, None, key, key + "_q{}") for heading, key in CHANGES]
    path, title = folder / "entropy_change", "Entropy change by layer"
    out = by_layer(changes, panels, path, title, 3, 2.6, "nats", sharey=False, zero=True)
    panels = [(heading, (component,), "rms", None) for heading, component in KINDS]
    path, title = folder / "rms", "Root mean square of residual and writes"
    out += by_layer(rows, panels, path, title, 3, 2.4, "RMS, log scale", log=True)
    path, title = folder / "cosine", "Cosine of what is written with what is there"
    out += by_layer(rows, COSINES, path, title, 2, 2.2, "cosine", zero=True)
    path, title = folder / "rank", "How far each layer is from the answer"
    return out + by_layer(rows, RANKS, path, title, 2, 2.6, "log scale", log=True, sharey=False)


def lens(tokens_file, path, colour="entropy", most=14, component="resid_post"):
    """Logit-lens heat-map, layers by tokens: a cell's text is its top-1 token, framed where that is
    the token really produced.

    tokens_file: tokens.npz of decompose.py. colour: "entropy" (nats) or "probability" (of the top-1
    token). Shown are the first neighbouring response tokens of the first response, at most `most`.
    """
    t = read_tokens(tokens_file)
    rows = [s for s, c in enumerate(t["component"]) if c in ("embed", component, "final")]
    if not rows or not t["top_ids"].shape[-1]:
        return []
    run = neighbours(t, most)
    place = np.ix_(rows, run)
    texts = dict(zip(t["text_ids"].tolist(), t["text"].tolist(), strict=True))
    best, token = t["top_ids"][..., 0][place], t["token"][run]
    value = t["entropy"][place] if colour == "entropy" else t["top_probs"][..., 0][place]
    figure, axes = new_figure(1, 1, 1.5 + 0.24 * len(rows))
    ax, ln_vocab = axes[0, 0], np.log(t["meta"]["vocab_size"])
    cells(ax, value, ln_vocab, colour, best, token, texts)
    layers = zip(t["component"][rows], t["layer"][rows], strict=True)
    names = [str(c) if c in ("embed", "final") else f"{l}" for c, l in layers]
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    produced = [printable(texts.get(i, f"<{i}>")) for i in token.tolist()]
    ax.set_xticks(range(len(run)), produced, fontsize=7, parse_math=False)
    ax.set_ylabel("layer", fontsize=9)
    ax.set_xlabel("token produced", fontsize=9)
    first, last = t["position"][run[0]] + 1, t["position"][run[-1]] + 1
    caption = (
        f"{t['meta']['run']}  |  {settings({**t['meta'], 'ln_vocab': ln_vocab})}\n"
        f"tokens {first} to {last} of one response  |  "
        "text: top-1 token of each layer's policy, framed and bold where it is the token produced"
    )
    return finish(figure, path, "What each layer would say", caption)


def neighbours(t, most):
    """Indices of the first tokens of a table that follow each other in one response."""
    run = [0]
    for m in range(1, min(most, len(t["token"]))):
        together = t["example"][m] == t["example"][0]
        if not together or t["position"][m] != t["position"][m - 1] + 1:
            break
        run.append(m)
    return run


def cells(ax, value, ln_vocab, colour, best, token, texts):
    """The heat-map of `lens`: value and the ids `best`, both [layers, tokens], the tokens produced,
    and {id: text}."""
    from matplotlib.patches import Rectangle

    ax.grid(False)
    options = dict(cmap="viridis_r", vmax=ln_vocab) if colour == "entropy" else dict(vmax=1)
    image = ax.imshow(value, aspect="auto", origin="lower", vmin=0, **options)
    for (y, x), i in np.ndenumerate(best):
        bright = image.cmap(image.norm(value[y, x]))[:3] @ np.array([0.299, 0.587, 0.114])
        ink = "black" if bright > 0.5 else "white"
        text = printable(texts.get(int(i), f"<{i}>"))
        style = dict(fontsize=min(7, 56 / max(len(text), 1)), color=ink, parse_math=False)
        if i == token[x]:
            style["fontweight"] = "bold"
            frame = dict(fill=False, edgecolor=ink, linewidth=1)
            ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **frame))
        ax.text(x, y, text, ha="center", va="center", **style)
    unit = "entropy, nats" if colour == "entropy" else "probability of the top-1 token"
    ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03).set_label(unit, fontsize=8)


def through_training(rows, changes, path):
    """Feature refinement over training steps: cosine of H^l with H^L and dH_mlp by layer, one line
    a step, and perplexity over steps."""
    runs = {name: mine for name, mine in runs_of(rows).items() if mine[0].get("step") is not None}
    if len(runs) < 2:
        return []
    figure, axes = new_figure(1, 3, 3.4)
    look = styles(runs)
    for name, mine in runs.items():
        draw(axes[0, 0], of(mine, "resid_post"), "cos_final", *look[name], label=name)
        draw(axes[0, 1], [r for r in changes if r["run"] == name], "dH_mlp", *look[name])
    final = [r for mine in runs.values() for r in of(mine, "final")]
    final = sorted(
        (r for r in final if r.get("logprob_token") is not None), key=lambda r: r["step"]
    )
    perplexity = [np.exp(min(-r["logprob_token"], 200)) for r in final]
    axes[0, 2].plot([r["step"] for r in final], perplexity, "o-", color=COLOURS[0], markersize=4)
    axes[0, 1].axhline(0, color="0.3", linewidth=0.8)
    headings = (
        ("cosine of H^l with H^L", "layer"),
        ("dH_mlp, nats", "layer"),
        ("perplexity of these responses", "step"),
    )
    for ax, (heading, x) in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=10, loc="left")
        ax.set_xlabel(x, fontsize=9)
        whole_numbers(ax)
    axes[0, 0].legend(fontsize=8, frameon=False)
    caption = caption_of([r for mine in runs.values() for r in mine])
    return finish(figure, path, "Through training, on the same tokens", caption)


ATTRIBUTION = (
    (("zero_attn", "zero_mlp"), "left out:\nnats of log-prob a token"),
    (("mean_attn", "mean_mlp"), "its mean instead:\nnats of log-prob a token"),
    (("direct_attn", "direct_mlp"), "direct attribution:\nnats of the token's logit"),
)


def attribution(rows, path):
    """Change of the response's log-prob when a write is left out or replaced by its mean, by layer,
    above direct logit attribution; means over responses, weighted by their tokens."""
    runs = runs_of(rows)
    figure, axes = new_figure(len(ATTRIBUTION), len(runs), 7.2, sharex=True, sharey="row")
    for column, (name, mine) in enumerate(runs.items()):
        L = len(mine[0]["zero_attn"])
        mine = [r for r in mine if len(r["zero_attn"]) == L]
        weight = np.array([r["tokens"] for r in mine], float)
        for ax, (keys, _) in zip(axes[:, column], ATTRIBUTION, strict=True):
            looks = zip((-0.2, 0.2), keys, COLOURS, ("attention", "MLP"), ("///", ""), strict=False)
            for shift, key, colour, label, hatch in looks:
                mean = weight @ np.array([r[key] for r in mine]) / weight.sum()
                style = dict(color=colour, label=label, hatch=hatch, edgecolor="white")
                ax.bar(np.arange(1, L + 1) + shift, mean, 0.4, **style)
            ax.axhline(0, color="0.3", linewidth=0.8)
            whole_numbers(ax)
            if keys[0] != "direct_attn":  # one layer outweighs the others a hundred times
                ax.set_yscale("symlog", linthresh=0.1)
        axes[0, column].set_title(name, fontsize=10, loc="left")
        axes[-1, column].set_xlabel("layer", fontsize=9)
    for ax, (_, label) in zip(axes[:, 0], ATTRIBUTION, strict=True):
        ax.set_ylabel(label, fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    caption = (
        f"means over {int(weight.sum()):,} response tokens  |  "
        "below 0: the response is less likely without this write\n"
        "one write at a time, so that the bars do not add up to the whole  |  between -0.1 and 0.1 "
        "the first two scales are linear, beyond logarithmic"
    )
    return finish(figure, path, "Which writes carry the response", caption)


# ----------------------------------------------------------------------------------------------
# the figure of train.py


def internal_phases(rows, n_layers=None):
    """[(first step, last step, layer)] of the internal phases in metrics.jsonl rows: where
    `inter/layer` is below L.

    n_layers: L; without it and without `phase` in the rows, L is the highest layer of the rows: a
    run that has not left its internal phase then shows none.
    """
    rows = [r for r in rows if whole(r.get("inter/layer"), 1, MOST_LAYERS) and is_metrics(r)]
    L = n_layers or max((r["inter/layer"] for r in rows), default=0)
    phases = []
    for r in rows:
        layer, step = r["inter/layer"], r["step"]
        internal = r.get("phase") == "internal" or layer < L
        if phases and phases[-1][2:] == [layer, internal]:
            phases[-1][1] = step
        else:
            phases.append([step, step, layer, internal])
    return [tuple(p[:3]) for p in phases if p[3]]


def running_mean(y, width):
    """Centred mean of y over `width` values, of fewer at the ends."""
    ones = np.ones(min(width, len(y)))
    return np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")


# panels: heading, unit, and (key, label) of their lines
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


def training_keys():
    """What is drawn of metrics.jsonl."""
    return [key for *_, keys in TRAINING for key, _ in keys]


def training(metrics, out, n_layers=None):
    """Reward, length, entropies and stability over the steps of metrics.jsonl, internal phases
    shaded; keys that no row has are left out.

    metrics: path of metrics.jsonl; out: where to write, as PNG and SVG. n_layers: L, see
    internal_phases. Returns the paths written. Raises as `drawable`.
    """
    rows = sorted(drawable(metrics, "metrics.jsonl"), key=lambda row: row["step"])
    panels = []
    for title, unit, keys in TRAINING:
        here = [(key, label) for key, label in keys if any(number(r.get(key)) for r in rows)]
        if here:
            panels.append((title, unit, here))
    columns = min(2, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = new_figure(n_rows, columns, 2.6 * n_rows + 0.6, sharex=True)
    phases = internal_phases(rows, n_layers)
    for ax, (title, unit, keys) in zip(axes.flat, panels, strict=False):
        for first, last, layer in phases:
            ax.axvspan(first - 0.5, last + 0.5, color="0.92", zorder=0)
            middle, coordinates = ((first + last) / 2, 1), ("data", "axes fraction")
            note(ax, f"layer {layer}", middle, coordinates, (0, -2), "center", "top")
        for (key, label), colour, dash in zip(keys, COLOURS, DASHES, strict=False):
            training_line(ax, rows, phases, key, label, colour, dash)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_ylabel(unit, fontsize=9)
        whole_numbers(ax)
        if unit == "log scale":
            ax.set_yscale("log", nonpositive="mask")
        if len(keys) > 1:
            ax.legend(fontsize=8, frameon=False)
    label_panels(axes, len(panels), columns, "step")
    said = "; ".join(f"steps {a} to {b} train layer {l}" for a, b, l in phases)
    caption = f"{plain(run_name(Path(metrics).parent))}, {len(rows):,} steps"
    return finish(
        figure, out, "Training", caption + (f"  |  shaded: {shown(said, 200)}" if said else "")
    )


def training_line(ax, rows, phases, key, label, colour, dash):
    """The values of one key over the steps that have it; many of them are smoothed."""
    rows = [r for r in rows if number(r.get(key))]
    style = dict(color=colour, linewidth=1.6)
    if key == "inter/entropy":  # a line for each phase, for they are of different layers;
        for first, last, _ in phases:  # afterwards it is the model's own
            mine = [r for r in rows if first <= r["step"] <= last]
            ax.plot([r["step"] for r in mine], [r[key] for r in mine], dash, label=label, **style)
            label = None
        return
    x, y = np.array([r["step"] for r in rows]), np.array([r[key] for r in rows], float)
    if key.startswith("eval/"):  # few, so that each is marked
        ax.plot(x, y, "o-", markersize=4, label=label, **style)
        return
    smooth = y if len(y) < 40 else running_mean(y, 2 * (len(y) // 50) + 1)
    if smooth is not y:
        ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(x, smooth, dash, label=label, **style)


# ----------------------------------------------------------------------------------------------


# file: is this a row, where it belongs (two of one place are one written twice), what it should be
ROWS = {
    "metrics.jsonl": (
        is_training,
        lambda row: row["step"],
        f"a row with a step and one of {', '.join(training_keys())}",
    ),
    "entropy.jsonl": (
        is_state,
        lambda row: (row["run"], row["component"], row["paper_layer"]),
        "a row of decompose.py",
    ),
    "entropy_change.jsonl": (
        is_change,
        lambda row: (row["run"], row["paper_layer"]),
        "a row of decompose.py",
    ),
    "attribution.jsonl": (
        is_attribution,
        lambda row: (row["run"], row["example_id"]),
        "a row of decompose.py --attribute",
    ),
}


def decomposition(path):
    """The figures of entropy.jsonl and entropy_change.jsonl in a folder."""
    rows = drawable(path / "entropy.jsonl", "entropy.jsonl")
    file, changes, out = path / "entropy_change.jsonl", [], []
    if file.exists():
        changes = drawable(file, file.name)
    if of(rows, "attn_out", "mlp_out", "resid_post"):
        out += entropy_flow(rows, path / "entropy_flow")
    out += layer_figures(rows, changes, path)
    return out + through_training(rows, changes, path / "through_training")


def both_lenses(file):
    """The two heat-maps of a tokens.npz, of tokens-2.npz with the number 2."""
    number, out = file.stem.removeprefix("tokens"), []
    for colour in ("entropy", "probability"):
        out += lens(file, file.parent / f"lens_{colour}{number}", colour)
    return out


def folder(path):
    """Draw all figures that the files of a folder allow, into it; returns their paths.

    Raises FileNotFoundError when there is nothing to draw, and ValueError or OSError when a file
    cannot be read or drawn; the other files' figures are there all the same.
    """
    path, out, wrong = Path(path), [], []
    drawers = {
        path / "metrics.jsonl": lambda file: training(file, path / "training"),
        path / "entropy.jsonl": lambda file: decomposition(path),
        **dict.fromkeys(sorted(path.glob("tokens*.npz")), both_lenses),
        path / "attribution.jsonl": lambda file: attribution(
            drawable(file, file.name), path / "attribution"
        ),
    }
    for file, drawer in drawers.items():
        try:
            out += drawer(file) if file.exists() else []
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
