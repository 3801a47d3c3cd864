"""Every figure, from the files that runs write: nothing is measured here, so that a figure can be redrawn and changed years later.

    python plot.py out/run                 # metrics.jsonl of train.py         -> training.png, training.svg
    python plot.py out/decompose-qwen3-4b  # entropy.jsonl and its companions  -> entropy_flow, entropy_change, rms, cosine, rank, lens, ...

One colour is one model (or one training step, dark to light), one panel is one kind of state. A line is a mean over response tokens (of
ranks, the median), a band the middle half of them. Colours are Okabe and Ito's, told apart by colour-blind readers.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
WIDTH = 9.0  # inches; at 100 dots an inch the column of a blog


def read_rows(path):
    """Rows of a JSONL file. A torn last line (a run that is writing, or was killed) is left out; ValueError for anything else."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if n < len(lines):
                raise ValueError(
                    f"{path}:{n}: not JSON; remove the line, or write the file again"
                ) from None
            row = None
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"{path}:{n}: a JSON object is expected")
        if row:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows in it yet")
    return rows


def new_figure(rows, columns, height, **options):
    """A figure of a blog column's width and its axes [rows, columns], drawn without a display and without touching global state."""
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
    """Title above, caption below, PNG and SVG; returns both paths. The same data gives the same bytes."""
    import matplotlib

    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8, color="0.35", x=0.01, ha="left")
    paths = [Path(path).with_suffix(kind) for kind in (".png", ".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "nanobupo", "svg.fonttype": "path"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def runs_of(rows):
    """{run: its rows}, in the order of the file."""
    out = {}
    for row in rows:
        out.setdefault(row.get("run", ""), []).append(row)
    return out


def styles(runs):
    """{run: (colour, dash)}: training steps from dark to light, other models by colour and dash."""
    stepped = [name for name, rows in runs.items() if rows[0].get("step") is not None]
    if len(stepped) < 3:
        return {
            name: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)])
            for i, name in enumerate(runs)
        }
    from matplotlib import colormaps

    shade = {
        name: colormaps["viridis"](0.9 * i / (len(stepped) - 1)) for i, name in enumerate(stepped)
    }
    return {name: (shade.get(name, "0.5"), "-" if name in shade else "--") for name in runs}


def settings(r):
    return f"norm: {r['norm']}, temperature {r['temperature']:g}, {r['dtype']}  |  ln V = {r['ln_vocab']:.2f} nats"


def caption_of(rows):
    """What an entropy must not be shown without: model, norm, positions, dtype, how many tokens, ln V."""
    r = rows[0]
    return (
        f"{', '.join(runs_of(rows))}  |  {settings(r)}\n"
        f"at the states that produced {r['tokens']:,} response tokens  |  line: mean (rank: median), band: middle half of the tokens"
    )


def draw(ax, rows, key, colour, dash, label=None, band=None, x="paper_layer"):
    """A line of rows' key over their layer, and the band of its quartiles `band` (a format with {} for 25 and 75)."""
    rows = [r for r in rows if r.get(key) is not None]
    xs = [r[x] for r in rows]
    ax.plot(
        xs,
        [r[key] for r in rows],
        dash,
        color=colour,
        linewidth=1.6,
        label=label,
        marker="o" if len(xs) < 13 else None,
        markersize=3,
    )
    if band and rows and band.format(25) in rows[0]:
        ax.fill_between(
            xs,
            [r[band.format(25)] for r in rows],
            [r[band.format(75)] for r in rows],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )


def note(ax, text, at, coordinates, shift, ha, va):
    ax.annotate(
        text,
        at,
        xycoords=coordinates,
        xytext=shift,
        textcoords="offset points",
        fontsize=8,
        color="0.35",
        ha=ha,
        va=va,
    )


def of(rows, *components):
    return [r for r in rows if r.get("component") in components]


def whole_numbers(ax):
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def by_layer(rows, panels, path, title, columns, height, unit, log=False, sharey=True, zero=False):
    """Small multiples over layers: panels are (heading, components or None, key, band); panels without data are left out."""
    panels = [
        p
        for p in panels
        if any(r.get(p[2]) is not None for r in (of(rows, *p[1]) if p[1] else rows))
    ]
    if not panels:
        return []
    columns = min(columns, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = new_figure(n_rows, columns, height * n_rows + 0.8, sharey=sharey, sharex=True)
    runs = runs_of(rows)
    look = styles(runs)
    for ax, (heading, components, key, band) in zip(axes.flat, panels, strict=False):
        for name, mine in runs.items():
            draw(
                ax,
                of(mine, *components) if components else mine,
                key,
                *look[name],
                label=name,
                band=band,
            )
        ax.set_title(heading, fontsize=10, loc="left")
        if log:
            ax.set_yscale("log", nonpositive="mask")
        ax.set_xlim(0.5, max(r["paper_layer"] for r in rows) + 0.5)
        if zero:
            ax.axhline(0, color="0.3", linewidth=0.8)
        whole_numbers(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel(unit, fontsize=9)
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("layer", fontsize=9)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8, frameon=False)
    return finish(figure, path, title, caption_of(rows) if "norm" in rows[0] else "")


# ---------------------------------------------------------------------------------------------------------------------
# figures of decompose.py

KINDS = (
    ("H^l, the residual", "resid_post"),
    ("A^l, what attention writes", "attn_out"),
    ("F^l, what the MLP writes", "mlp_out"),
)


def entropy_flow(rows, path):
    """Mean entropy along the stream: embed, A^1, F^1, H^1, A^2, ..., final; one panel a model. Rows are those of entropy.jsonl."""
    runs = runs_of(rows)
    figure, axes = new_figure(
        len(runs), 1, (3.1 if len(runs) < 3 else 2.2) * len(runs) + 0.9, sharex=True, sharey=True
    )
    for ax, (name, mine) in zip(axes[:, 0], runs.items(), strict=True):
        place = {"attn_out": -2, "mlp_out": -1, "resid_post": 0}
        at = [{**r, "x": 3 * r["paper_layer"] + place[r["component"]]} for r in of(mine, *place)]
        path_of = sorted(((r["x"], r["entropy_nats"]) for r in at), key=lambda p: p[0])
        ax.plot(*zip(*path_of, strict=True), color="0.8", linewidth=0.7, zorder=1)
        L = mine[0]["n_layers"]
        for (label, component), colour, dash in zip(KINDS, COLOURS, DASHES, strict=False):
            own = of(at, component)
            if component == "resid_post":
                own = [{**r, "x": 0} for r in of(mine, "embed")] + own
            draw(ax, own, "entropy_nats", colour, dash, label, "entropy_nats_q{}", x="x")
        end = 3 * L + max(2, L // 4)
        for r in of(mine, "final"):
            ax.plot(
                [end] * 2,
                [r["entropy_nats_q25"], r["entropy_nats_q75"]],
                color="0.6",
                linewidth=5,
                solid_capstyle="butt",
            )
            ax.plot(
                end,
                r["entropy_nats"],
                "D",
                color="black",
                markersize=5,
                label="final: norm(H^L), the model's own policy",
            )
        ax.axhline(mine[0]["ln_vocab"], color="0.3", linestyle=":", linewidth=1)
        note(
            ax,
            "ln V, uniform",
            (1, mine[0]["ln_vocab"]),
            ("axes fraction", "data"),
            (-2, 3),
            "right",
            "bottom",
        )
        ax.set_ylim(bottom=0)
        ax.set_ylabel("entropy, nats", fontsize=9)
        if len(runs) > 1:
            ax.set_title(name, fontsize=10, loc="left")
        every = max(1, L // 12)
        shown = [l for l in range(every, L + 1, every) if l == L or L - l > every / 2]
        ax.set_xticks([0, *(3 * l for l in shown), end], ["embed", *shown, "final"], fontsize=8)
    axes[-1, 0].set_xlabel(
        "layer (its attention and MLP writes stand to the left of its residual)", fontsize=9
    )
    axes[0, 0].legend(fontsize=8, frameon=False, ncols=2, loc="best")
    return finish(figure, path, "Entropy of every internal policy", caption_of(rows))


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
    """Entropy change, RMS, cosines, and rank with KL, each by layer: rows of entropy.jsonl and entropy_change.jsonl."""
    told = {r["run"]: r for r in rows}
    changes = [{**told[r["run"]], **r} for r in changes if r.get("run") in told]  # for the caption
    out = by_layer(
        changes,
        [(heading, None, key, key + "_q{}") for heading, key in CHANGES],
        folder / "entropy_change",
        "Entropy change by layer",
        3,
        2.6,
        "nats",
        sharey=False,
        zero=True,
    )
    out += by_layer(
        rows,
        [(heading, (c,), "rms", None) for heading, c in KINDS],
        folder / "rms",
        "Root mean square of residual and writes",
        3,
        2.4,
        "RMS, log scale",
        log=True,
    )
    out += by_layer(
        rows,
        COSINES,
        folder / "cosine",
        "Cosine of what is written with what is there",
        2,
        2.2,
        "cosine",
        zero=True,
    )
    return out + by_layer(
        rows,
        RANKS,
        folder / "rank",
        "How far each layer is from the answer",
        2,
        2.6,
        "log scale",
        log=True,
        sharey=False,
    )


def lens(tokens_file, path, colour="entropy", most=14, component="resid_post"):
    """Logit-lens heat-map, layers by tokens: a cell's text is its top-1 token, framed where that is the token really produced.

    tokens_file: tokens.npz of decompose.py. colour: "entropy" (nats) or "probability" (of the top-1 token). Shown are the first
    neighbouring response tokens of the first response, at most `most`.
    """
    from matplotlib.patches import Rectangle

    with np.load(tokens_file, allow_pickle=False) as f:
        t = {name: f[name] for name in f.files}
    if t["top_ids"].shape[-1] == 0:
        return []
    meta = json.loads(str(t["meta"]))
    rows = [s for s, c in enumerate(t["component"]) if c in ("embed", component, "final")]
    run = [0]
    for m in range(1, len(t["token"])):
        if (
            len(run) == most
            or t["example"][m] != t["example"][run[-1]]
            or t["position"][m] != t["position"][run[-1]] + 1
        ):
            break
        run.append(m)
    text = dict(zip(t["text_ids"].tolist(), map(printable, t["text"].tolist()), strict=True))
    value = (t["entropy"] if colour == "entropy" else t["top_probs"][..., 0])[np.ix_(rows, run)]
    figure, axes = new_figure(1, 1, 1.5 + 0.24 * len(rows))
    ax = axes[0, 0]
    ax.grid(False)
    top = np.log(meta["vocab_size"]) if colour == "entropy" else 1
    image = ax.imshow(
        value,
        aspect="auto",
        origin="lower",
        cmap="viridis_r" if colour == "entropy" else "viridis",
        vmin=0,
        vmax=top,
    )
    for y, s in enumerate(rows):
        for x, m in enumerate(run):
            best = int(t["top_ids"][s, m, 0])
            bright = image.cmap(image.norm(value[y, x]))[:3] @ np.array([0.299, 0.587, 0.114])
            ink = "black" if bright > 0.5 else "white"
            ax.text(
                x,
                y,
                text[best],
                ha="center",
                va="center",
                fontsize=7,
                color=ink,
                parse_math=False,
                fontweight="bold" if best == t["token"][m] else "normal",
            )
            if best == t["token"][m]:
                ax.add_patch(
                    Rectangle(
                        (x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=ink, linewidth=1
                    )
                )
    names = [
        {"embed": "embed", "final": "final"}.get(c, f"{l}")
        for c, l in zip(t["component"][rows], t["layer"][rows], strict=True)
    ]
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    ax.set_xticks(
        range(len(run)), [text[int(i)] for i in t["token"][run]], fontsize=7, parse_math=False
    )
    ax.set_ylabel("layer", fontsize=9)
    ax.set_xlabel("token produced", fontsize=9)
    unit = "entropy, nats" if colour == "entropy" else "probability of the top-1 token"
    figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03).set_label(unit, fontsize=8)
    first, last = t["position"][run[0]] + 1, t["position"][run[-1]] + 1
    meta["ln_vocab"] = np.log(meta["vocab_size"])
    caption = (
        f"{meta['run']}  |  {settings(meta)}\ntokens {first} to {last} of one response  |  text: top-1 token of each layer's policy,"
        " framed and bold where it is the token produced"
    )
    return finish(figure, path, "What each layer would say", caption)


def printable(text, most=8):
    """A token's text for a cell: spaces and line ends visible, a box for what the figure's font lacks, cut to `most` characters."""
    from matplotlib.font_manager import findfont, get_font

    has = get_font(findfont("DejaVu Sans")).get_charmap()
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u00b7")
    text = "".join(c if ord(c) in has and c.isprintable() else "\u25a1" for c in text)
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def through_training(rows, changes, path):
    """Feature refinement over training steps: cosine of H^l with H^L and dH_mlp by layer, one line a step, and perplexity over steps."""
    runs = {name: mine for name, mine in runs_of(rows).items() if mine[0].get("step") is not None}
    if len(runs) < 2:
        return []
    figure, axes = new_figure(1, 3, 3.4)
    look = styles(runs)
    for name, mine in runs.items():
        draw(axes[0, 0], of(mine, "resid_post"), "cos_final", *look[name], label=name)
        draw(axes[0, 1], [r for r in changes if r.get("run") == name], "dH_mlp", *look[name])
    final = sorted(
        (r for mine in runs.values() for r in of(mine, "final")), key=lambda r: r["step"]
    )
    axes[0, 2].plot(
        [r["step"] for r in final],
        [np.exp(-r["logprob_token"]) for r in final],
        "o-",
        color=COLOURS[0],
        markersize=4,
    )
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
    return finish(
        figure,
        path,
        "Through training, on the same tokens",
        caption_of([r for mine in runs.values() for r in mine]),
    )


def attribution(rows, path):
    """Shares of the response's log-prob by layer (integrated gradients) above direct logit attribution; token-weighted over responses."""
    runs = runs_of(rows)
    figure, axes = new_figure(2, len(runs), 5.2, sharex=True, sharey="row")
    for column, (name, mine) in enumerate(runs.items()):
        weight = np.array([r["tokens"] for r in mine], float)
        for row, keys in enumerate((("attn", "mlp"), ("direct_attn", "direct_mlp"))):
            ax = axes[row, column]
            for shift, key, colour, label, hatch in zip(
                (-0.2, 0.2), keys, COLOURS, ("attention", "MLP"), ("///", ""), strict=False
            ):
                mean = weight @ np.array([r[key] for r in mine]) / weight.sum()
                ax.bar(
                    np.arange(1, len(mean) + 1) + shift,
                    mean,
                    0.4,
                    color=colour,
                    label=label,
                    hatch=hatch,
                    edgecolor="white",
                )
            ax.axhline(0, color="0.3", linewidth=0.8)
            ax.set_title(name if row == 0 else "", fontsize=10, loc="left")
            whole_numbers(ax)
        axes[1, column].set_xlabel("layer", fontsize=9)
    axes[0, 0].set_ylabel("integrated gradients,\nnats of log-prob a token", fontsize=9)
    axes[1, 0].set_ylabel("direct attribution,\nnats of the token's logit", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    gap = max(r["gap"] for r in rows)
    return finish(
        figure,
        path,
        "Which writes carry the response",
        f"means over {int(weight.sum()):,} response tokens  |  integrated gradients run from the embedding alone\n"
        f"to the whole model; their sum misses the difference by at most {gap:.2%}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# the figure of train.py


def internal_phases(rows, n_layers=None):
    """[(first step, last step, layer)] of the internal phases in metrics.jsonl rows: where `inter/layer` is below L.

    n_layers: L; without it and without `phase` in the rows, L is the highest layer of the rows: a run that has not left its internal
    phase then shows none.
    """
    rows = [
        r for r in rows if isinstance(r.get("inter/layer"), int) and isinstance(r.get("step"), int)
    ]
    L = n_layers or max((r["inter/layer"] for r in rows), default=0)
    phases = []
    for r in rows:
        layer, step, internal = (
            r["inter/layer"],
            r["step"],
            r.get("phase") == "internal" or r["inter/layer"] < L,
        )
        if phases and phases[-1][2:] == [layer, internal]:
            phases[-1][1] = step
        else:
            phases.append([step, step, layer, internal])
    return [tuple(p[:3]) for p in phases if p[3]]


def running_mean(y, width):
    """Centred mean of y over `width` values, of fewer at the ends."""
    ones = np.ones(min(width, len(y)))
    return np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")


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


def training(metrics, out, n_layers=None):
    """Reward, length, entropies and stability over the steps of metrics.jsonl, internal phases shaded; keys that no row has are skipped.

    metrics: path of metrics.jsonl; out: where to write, as PNG and SVG. n_layers: L, see internal_phases. Returns the paths written.
    """
    rows = [r for r in read_rows(metrics) if isinstance(r.get("step"), int)]
    number = lambda r, key: isinstance(r.get(key), (int, float)) and np.isfinite(r[key])  # noqa: E731
    panels = [
        (title, unit, here)
        for title, unit, keys in TRAINING
        if (here := [k for k in keys if any(number(r, k[0]) for r in rows)])
    ]
    if not panels:
        raise ValueError(
            f"{metrics}: no row has a step and one of {', '.join(k for *_, keys in TRAINING for k, _ in keys)}"
        )
    columns = min(2, len(panels))
    figure, axes = new_figure(
        -(-len(panels) // columns), columns, 2.6 * -(-len(panels) // columns) + 0.6, sharex=True
    )
    phases = internal_phases(rows, n_layers)
    for ax, (title, unit, keys) in zip(axes.flat, panels, strict=False):
        for first, last, layer in phases:
            ax.axvspan(first - 0.5, last + 0.5, color="0.92", zorder=0)
            note(
                ax,
                f"layer {layer}",
                ((first + last) / 2, 1),
                ("data", "axes fraction"),
                (0, -2),
                "center",
                "top",
            )
        for (key, label), colour, dash in zip(keys, COLOURS, DASHES, strict=False):
            here = [r for r in rows if number(r, key)]
            if (
                key == "inter/entropy"
            ):  # afterwards it is the model's own; a line for each phase, for they are of different layers
                for k, (first, last, _) in enumerate(phases):
                    x, y = zip(
                        *[(r["step"], r[key]) for r in here if first <= r["step"] <= last]
                        or [(np.nan, np.nan)],
                        strict=True,
                    )
                    ax.plot(
                        x, y, dash, color=colour, linewidth=1.6, label=label if k == 0 else None
                    )
                continue
            x, y = np.array([r["step"] for r in here]), np.array([r[key] for r in here], float)
            sparse = key.startswith("eval/")
            smooth = y if sparse or len(y) < 40 else running_mean(y, 2 * (len(y) // 50) + 1)
            if smooth is not y:
                ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(
                x,
                smooth,
                "o-" if sparse else dash,
                color=colour,
                linewidth=1.6,
                markersize=4,
                label=label,
            )
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_ylabel(unit, fontsize=9)
        whole_numbers(ax)
        if unit == "log scale":
            ax.set_yscale("log", nonpositive="mask")
        if len(keys) > 1:
            ax.legend(fontsize=8, frameon=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("step", fontsize=9)
    said = "; ".join(f"steps {a} to {b} train layer {l}" for a, b, l in phases)
    caption = f"{Path(metrics).resolve().parent.name}, {len(rows):,} steps" + (
        f"  |  shaded: {said}" if said else ""
    )
    return finish(figure, out, "Training", caption)


# ---------------------------------------------------------------------------------------------------------------------


def folder(path):
    """Draw all figures that the files of a folder allow, into it; returns their paths. FileNotFoundError when there is nothing to draw."""
    path, out = Path(path), []
    if (path / "metrics.jsonl").is_file():
        out += training(path / "metrics.jsonl", path / "training")
    if (path / "entropy.jsonl").is_file():
        rows = read_rows(path / "entropy.jsonl")
        changes = (
            read_rows(path / "entropy_change.jsonl")
            if (path / "entropy_change.jsonl").is_file()
            else []
        )
        if of(rows, "attn_out", "mlp_out", "resid_post"):
            out += entropy_flow(rows, path / "entropy_flow")
        out += layer_figures(rows, changes, path)
        out += through_training(rows, changes, path / "through_training")
    for file in sorted(path.glob("tokens*.npz")):
        for colour in ("entropy", "probability"):
            out += lens(file, path / f"lens_{colour}{file.stem.removeprefix('tokens')}", colour)
    if (path / "attribution.jsonl").is_file():
        out += attribution(read_rows(path / "attribution.jsonl"), path / "attribution")
    if not out:
        raise FileNotFoundError(
            f"{path}: nothing to draw; train.py writes metrics.jsonl, decompose.py entropy.jsonl"
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
