"""Figures from small made-up files: what is drawn is what the files say, rows that are none are
counted, mistakes end in one line."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from plumbing.figures import draw
from tools import plot


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def is_picture(path):
    head = path.read_bytes()
    return len(head) > 2000 and (
        head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in head[:1000]
    )


def state_rows(run="m", step=None, L=3, seed=0):
    g = np.random.default_rng(seed)
    same = dict(
        run=run,
        step=step,
        norm="none",
        temperature=1.0,
        dtype="float32",
        ln_vocab=math.log(50),
        n_layers=L,
        tokens=40,
    )
    names = [
        ("embed", 0),
        *(
            (c, l)
            for l in range(1, L + 1)
            for c in ("attn_out", "resid_mid", "mlp_out", "resid_post")
        ),
        ("final", L),
    ]
    rows = []
    for component, layer in names:
        e, write = float(g.uniform(1, 3)), component in ("attn_out", "mlp_out", "resid_post")
        rows.append(
            {
                **same,
                "component": component,
                "paper_layer": layer,
                "entropy_nats": e,
                "entropy_nats_q25": e - 0.5,
                "entropy_nats_q75": e + 0.4,
                "rms": e,
                "cos_resid": 0.1 if write else None,
                "cos_final": 0.5,
                "logprob_token": -1.0,
                "rank_q25": 1.0,
                "rank_q50": 2.0,
                "rank_q75": 9.0,
                "kl_to_final": 0.0 if component == "final" else 0.3,
            }
        )
    return rows


def change_rows(run="m", step=None, L=3):
    return [
        {
            "run": run,
            "step": step,
            "paper_layer": l,
            **{
                f"{k}{q}": x
                for k in ("dH_attn", "dH_mlp", "dH_layer")
                for q, x in (("", 0.1 * l), ("_q25", 0.0), ("_q75", 1.0))
            },
        }
        for l in range(1, L + 1)
    ]


def save_tokens(path, text=("a", " b", "\n", "\u4f60", "$x^2$"), M=20, **other):
    """A tokens.npz of 5 states: the first 12 tokens are of one response, the others of a second."""
    g, n, S = np.random.default_rng(0), len(text), 5
    meta = {"run": "m", "norm": "none", "temperature": 1.0, "dtype": "float32", "vocab_size": 50}
    arrays = dict(
        component=np.array(["embed", "resid_post", "resid_post", "resid_post", "final"]),
        layer=np.array([0, 1, 2, 3, 3]),
        example=np.array([0] * 12 + [1] * 8)[:M],
        position=np.array([*range(12), *range(8)])[:M],
        token=np.arange(M) % n,
        entropy=g.uniform(0, 3, (S, M)),
        top_ids=(np.arange(S * M * 2) % n).reshape(S, M, 2),
        top_probs=g.uniform(0, 1, (S, M, 2)),
        text_ids=np.arange(n),
        text=np.array(text),
        meta=np.array(json.dumps(meta)),
    )
    np.savez(path, **{**arrays, **other})


def metric_rows(n=60, phase=20):
    return [
        {
            "step": s,
            "reward": s / n,
            "completions/mean_length": 10 + s,
            "entropy": 1.0,
            "inter/layer": 2 if s <= phase else 4,
            "inter/entropy": 2.0,
            "grad_norm": 0.1,
            "sampler_diff/mean": 1e-6,
            **({"eval/accuracy": 0.5} if s % 20 == 0 else {}),
        }
        for s in range(1, n + 1)
    ]


def lines_of(figures, title):
    """The drawn lines of the panels whose heading begins with `title`, as (label, x, y)."""
    return [
        (line.get_label(), *map(list, line.get_data()))
        for figure in figures
        for ax in figure.axes
        if ax.get_title(loc="left").startswith(title)
        for line in ax.lines
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, kept on their way to the disk."""
    kept, finish = [], plot.finish
    monkeypatch.setattr(
        plot, "finish", lambda figure, *rest: kept.append(figure) or finish(figure, *rest)
    )
    return kept


@pytest.fixture
def sketch(monkeypatch):
    """Figures are laid out and drawn, coarsely and not to the disk: ten times as fast."""

    def finish(figure, path, title, caption):
        figure.suptitle(title)
        figure.supxlabel(caption)
        figure.set_dpi(20)
        figure.canvas.draw()
        kept.append(figure)
        return [path]

    kept = []
    monkeypatch.setattr(plot, "finish", finish)
    return kept


def test_every_figure_of_a_decomposition(tmp_path, figures):
    rows = state_rows()
    jsonl(tmp_path / "entropy.jsonl", rows)
    jsonl(tmp_path / "entropy_change.jsonl", change_rows())
    save_tokens(tmp_path / "tokens.npz")
    jsonl(
        tmp_path / "attribution.jsonl",
        [
            {
                "run": "m",
                "example_id": n,
                "tokens": n,
                "zero_attn": [-1.0 * n] * 3,
                "zero_mlp": [-2.0] * 3,
                "mean_attn": [-0.5] * 3,
                "mean_mlp": [-0.4] * 3,
                "direct_attn": [0.1] * 3,
                "direct_mlp": [0.2] * 3,
            }
            for n in (1, 3)
        ],
    )
    written = plot.folder(tmp_path)
    names = (
        "entropy_flow",
        "entropy_change",
        "rms",
        "cosine",
        "rank",
        "lens_entropy",
        "lens_probability",
        "attribution",
    )
    assert {p.name for p in written} == {
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    } and all(map(is_picture, written))
    drawn = {label: (x, y) for label, x, y in lines_of(figures, "")}
    want = [r["entropy_nats"] for r in rows if r["component"] in ("embed", "resid_post")]
    assert drawn["H^l, the residual"] == (
        [0, 3, 6, 9],
        want,
    )  # x counts states: A^1 1, F^1 2, H^1 3, A^2 4, ...
    assert drawn["A^l, what attention writes"][0] == [1, 4, 7] and drawn[
        "F^l, what the MLP writes"
    ][0] == [2, 5, 8]
    assert lines_of(figures, "MLP: ")[0][1:] == ([1, 2, 3], [0.1, 0.2, 0.30000000000000004])
    heights = [[bar.get_height() for bar in ax.patches] for ax in figures[-1].axes]
    assert heights[0] == [-2.5] * 3 + [-2.0] * 3  # -(1*1 + 3*3) / 4, weighted by tokens
    assert heights[1] == pytest.approx([-0.5] * 3 + [-0.4] * 3)
    assert heights[2] == pytest.approx([0.1] * 3 + [0.2] * 3)
    caption = figures[0].get_supxlabel()
    for part in ("m\n", "norm: none", "float32", "40 response tokens", "ln V = 3.91"):
        assert part in caption


def test_models_and_steps_side_by_side(tmp_path, figures):
    jsonl(
        tmp_path / "entropy.jsonl",
        [r for s in (0, 30, 60) for r in state_rows(f"step {s}", s, seed=s)] + state_rows("other"),
    )
    jsonl(
        tmp_path / "entropy_change.jsonl",
        [r for s in (0, 30, 60) for r in change_rows(f"step {s}", s)] + change_rows("other"),
    )
    for k in ("", "-2"):
        save_tokens(tmp_path / f"tokens{k}.npz", M=4 + len(k))
    written = plot.folder(tmp_path)
    assert {"lens_entropy.png", "lens_entropy-2.png", "through_training.svg"} <= {
        p.name for p in written
    }
    widths = [
        len(ax.get_xticks())
        for f in figures
        for ax in f.axes
        if ax.get_xlabel() == "token produced"
    ]
    order = [p.name for p in written if "lens_entropy" in p.name]
    assert (
        widths == [6, 6, 4, 4] and order[0] == "lens_entropy-2.png"
    )  # a file's figures carry its number
    assert [label for label, *_ in lines_of(figures, "cosine of H^l with H^L")] == [
        "step 0",
        "step 30",
        "step 60",
    ]
    assert lines_of(figures, "perplexity")[0][1:] == ([0, 30, 60], [pytest.approx(math.e)] * 3)
    styles = plot.styles(plot.runs_of(plot.read_rows(tmp_path / "entropy.jsonl")[0]))
    assert len({str(colour) for colour, _ in styles.values()}) == 4


def test_tables_without_some_components_lose_only_their_figures(tmp_path):
    jsonl(
        tmp_path / "entropy.jsonl",
        [
            {k: v for k, v in r.items() if k != "rms"}
            for r in state_rows()
            if r["component"] == "mlp_out"
        ],
    )
    assert {p.stem for p in plot.folder(tmp_path)} == {"entropy_flow", "cosine"}


def test_training(tmp_path, figures):
    jsonl(tmp_path / "metrics.jsonl", metric_rows())
    written = plot.training(tmp_path / "metrics.jsonl", tmp_path / "t.png")
    assert [p.name for p in written] == ["t.png", "t.svg"] and all(map(is_picture, written))
    drawn = {label: (x, y) for label, x, y in lines_of(figures, "")}
    assert drawn["held-out accuracy"] == ([20, 40, 60], [0.5] * 3)
    assert drawn["internal layer's policy"][0] == [*range(1, 21)]  # in its phase alone
    assert "steps 1 to 20 train layer 2" in figures[0].get_supxlabel()
    assert all([t.get_text() for t in ax.texts] == ["layer 2"] for ax in figures[0].axes)


@pytest.mark.parametrize(
    "gone",
    ["eval/accuracy", "inter/entropy", "inter/layer", "grad_norm", "completions/mean_length"],
)
def test_training_without_a_key(tmp_path, gone):
    jsonl(
        tmp_path / "metrics.jsonl",
        [{k: v for k, v in r.items() if k != gone} for r in metric_rows(5, 2)],
    )
    assert all(map(is_picture, plot.training(tmp_path / "metrics.jsonl", tmp_path / "t")))


def test_training_of_one_step_with_one_key_and_a_torn_line(tmp_path, figures):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n{"step": 2, "rew')
    assert all(map(is_picture, plot.folder(tmp_path)))
    assert [ax.get_title(loc="left") for ax in figures[0].axes] == ["reward and accuracy"]


def test_internal_phases():
    rows = [{"step": s, "inter/layer": l} for s, l in enumerate([2, 2, 2, 3, 3, 4, 4], 1)]
    assert plot.internal_phases(rows) == [(1, 3, 2), (4, 5, 3)]
    assert plot.internal_phases(rows[:3]) == [] and plot.internal_phases(rows[:3], n_layers=4) == [
        (1, 3, 2)
    ]
    assert plot.internal_phases([{**r, "phase": "internal"} for r in rows[:3]]) == [(1, 3, 2)]
    assert (
        plot.internal_phases([{"step": 1, "inter/layer": 4}]) == []
        and plot.internal_phases([{"step": 1, "reward": 0}]) == []
    )


def test_running_mean():
    assert plot.running_mean(np.array([0.0, 3, 6, 9]), 3).tolist() == [1.5, 3, 6, 7.5]
    assert plot.running_mean(np.array([1.0, 1]), 5).tolist() == [1, 1]


@pytest.mark.parametrize(
    "text, want",
    [
        (" the", "\u00b7the"),
        ("a\nb", "a\\nb"),
        ("\t\r", "\\t\\r"),
        ("\x9f", "\\x9f"),
        ("\u200b", "\\u200b"),
        ("\u4f60", "\\u4f60"),
        ("\u4f60\u597d", "\\u4f60\u2026"),  # cut, but not inside an escape
        ("\U0001f92f", "\\U0001f92f"),
        ("\U0001f92f!", "\\U0001f92f\u2026"),
        ("\ud800", "\\ud800"),
        ("internationally", "interna\u2026"),
        ("exactly8", "exactly8"),
        ("\x00", "\\x00"),
        ("\u00e9\u03b1", "\u00e9\u03b1"),  # the font has them
        ("$x$", "$x$"),
        ("", ""),
    ],
)
def test_token_texts_can_be_drawn(text, want):
    assert plot.printable(text) == want


ODD = ["\n\n", "\t", "\x9f", "\u200b", "\u4f60\u597d", "\U0001f92f", "\ufeff", "\ud83d", "\\x9f"]
ODD += ["\x1b[31m", "\u0e01\u0e33", "\u202e", "\u3000", "\ue000", "$x^2$", "$\\frac{", "a" * 300]


def test_odd_tokens_and_names_raise_no_warning_of_a_missing_glyph(tmp_path, sketch):
    """Every odd text in turn as a token, and all of them as names of models."""
    n = len(ODD)
    save_tokens(tmp_path / "tokens.npz", ODD, M=n)
    name = "".join(ODD[:-1])
    rows = [{**r, "run": f"{name}{k}"} for k in range(2) for r in state_rows()]
    jsonl(tmp_path / "entropy.jsonl", rows)
    (tmp_path / "config.json").write_text(json.dumps({"model": name}))
    jsonl(tmp_path / "metrics.jsonl", metric_rows(3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.folder(tmp_path)
    heat_map = next(f.axes[0] for f in sketch if f.axes[0].get_xlabel() == "token produced")
    cells = {t.get_text() for t in heat_map.texts}
    assert {"\\n\\n", "\\t", "\\x9f", "\\u200b", "\\u4f60\u2026", "$x^2$"} <= cells
    assert not any("\u25a1" in text for text in cells)


def test_what_to_see_stands_under_each_figure(tmp_path, monkeypatch):
    """One large sentence, inside the figure, below the axes and above the caption."""
    seen = []

    def savefig(figure, path, **options):
        if str(path).endswith(".png"):
            figure.canvas.draw()
            box = {"axes": [ax.get_tightbbox() for ax in figure.axes if ax.get_visible()]}
            box["caption"] = figure._supxlabel.get_window_extent()
            see = figure.texts[-1]
            seen.append((see, see.get_window_extent(), box, figure.bbox))

    monkeypatch.setattr(plot.Figure, "savefig", savefig)
    rows = [row for step in (0, 20) for row in state_rows(f"step {step}", step)]
    jsonl(tmp_path / "entropy.jsonl", rows)
    jsonl(tmp_path / "entropy_change.jsonl", change_rows("step 0", 0))
    jsonl(tmp_path / "attribution.jsonl", attribution_rows())
    jsonl(tmp_path / "metrics.jsonl", metric_rows(6, 3))
    save_tokens(tmp_path / "tokens.npz")
    plot.folder(tmp_path)
    assert {" ".join(see.get_text().split()) for see, *_ in seen} == set(plot.SEE.values())
    for see, at, box, figure in seen:
        assert see.get_fontsize() == 11 and at.x1 < figure.x1 and at.x0 >= 0
        assert box["caption"].y0 >= 0 and box["caption"].y1 < at.y0
        assert all(at.y1 < ax.y0 for ax in box["axes"]), see.get_text()


def test_a_deep_model_has_no_line_through_all_states(tmp_path, sketch):
    """The grey line from state to state is drawn for at most 12 layers."""
    for L, lines in ((12, 4), (13, 3)):
        plot.entropy_flow(state_rows(L=L), tmp_path / f"flow{L}")
        drawn = [line for line in sketch[-1].axes[0].lines if len(line.get_xdata()) > 2]
        assert len(drawn) == lines, L


def test_names_in_captions(tmp_path, sketch):
    """A model's name stands beside its steps, and a run is called by its model, not by its folder
    alone."""
    rows = [r for s in (0, 20) for r in state_rows(f"step {s}", s)]
    assert plot.names_of([{**r, "model": "qwen"} for r in rows]) == "qwen: step 0, step 20"
    mixed = [{**r, "model": "qwen"} for r in rows] + [{**r, "model": "m"} for r in state_rows()]
    assert plot.names_of(mixed) == "qwen step 0, qwen step 20, m"
    assert plot.names_of(state_rows()) == "m"
    for folder, model, want in (
        ("seed2", "tiny", "tiny-seed2"),
        ("qwen3-4b", "Qwen/Qwen3-4B", "qwen3-4b"),
        ("other", None, "other"),
        ("torn", 3, "torn"),
    ):
        (tmp_path / folder).mkdir()
        if model:
            (tmp_path / folder / "config.json").write_text(json.dumps({"model": model}))
        assert plot.run_name(tmp_path / folder) == want
    jsonl(tmp_path / "seed2" / "metrics.jsonl", metric_rows(3, 1))
    plot.folder(tmp_path / "seed2")
    assert sketch[-1].get_supxlabel().startswith("tiny-seed2, 3 steps")


def test_the_same_data_gives_the_same_files(tmp_path):
    jsonl(tmp_path / "entropy.jsonl", [r for r in state_rows() if r["component"] == "mlp_out"])
    first = {p: p.read_bytes() for p in plot.folder(tmp_path)}
    assert all(p.read_bytes() == first[p] for p in plot.folder(tmp_path))


def attribution_rows():
    keys = [key for keys, _ in plot.ATTRIBUTION for key in keys]
    same = dict.fromkeys(keys, [0.5, -1.0, 2.0])
    return [{"run": "m", "example_id": i, "tokens": 4, **same} for i in range(3)]


FILES = {
    "metrics.jsonl": [{**r, "completions/mean_length": 12.5} for r in metric_rows(6, 3)],
    "entropy.jsonl": state_rows(),
    "entropy_change.jsonl": change_rows(),
    "attribution.jsonl": attribution_rows(),
}


def each(change, kind=object):
    """A row whose values of a kind, those in lists too, are changed."""

    def changed(v):
        if isinstance(v, list):
            return [changed(x) for x in v]
        return change(v) if isinstance(v, kind) else v

    return lambda row: {key: changed(v) for key, v in row.items()}


HOSTILE = {  # what makes a good row a bad one
    "strings for numbers": each(str),
    "NaN": each(lambda v: math.nan, float),
    "infinite": each(lambda v: -math.inf, float),
    "huge floats": each(lambda v: 1e308, float),
    "huge integers": each(lambda v: 10**400, int),
    "beyond 64 bits": each(lambda v: 2**70, int),
    "negative": each(lambda v: -1, int),
    "lists": each(lambda v: [v]),
    "objects": each(lambda v: {"a": v}),
    "booleans": each(lambda v: True, (int, float)),
    "nothing": lambda row: {},
    "null": dict.fromkeys,
    "other keys": lambda row: {key + "s": v for key, v in row.items()},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_rows_that_are_none_are_counted(tmp_path, capsys, name, kind):
    """Alone they end in one line; beside good rows they are left out."""
    good, bad = FILES[name], [HOSTILE[kind](row) for row in FILES[name]]
    if name == "entropy_change.jsonl":  # drawn beside the other
        jsonl(tmp_path / "entropy.jsonl", FILES["entropy.jsonl"])
    jsonl(tmp_path / name, bad)
    assert "none of its" in ends_in_one_line(tmp_path, capsys, 3)
    jsonl(tmp_path / name, [row for pair in zip(bad, good, strict=True) for row in pair])
    assert plot.drawable(tmp_path / name, name) == good
    assert f"{name}: {len(bad)} lines left out" in capsys.readouterr().err


def ends_in_one_line(folder, capsys, code):
    with pytest.raises(SystemExit) as stop:
        plot.main([str(folder)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(said) == 1 and said[0].startswith("plot.py: "), said
    return said[0]


FOREIGN = {  # bytes in place of a file
    "empty": b"",
    "blank": b"\n\n  \n",
    "binary": bytes(range(256)) * 40,
    "zeros": bytes(5000),
    "html": b"<!doctype html>\n<html><body>Sign in to the network</body></html>\n",
    "a number": b"17\n",
    "a list": b"[1, 2]\n[]\n",
    "text": b'"step"\nnull\ntrue\n',
    "nested": b'{"step": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "utf-16": '{"step": 1, "reward": 0.5}\n'.encode("utf-16"),
    "torn": b'{"step": 1, "rew',
    "one array": b'[{"step": 1, "reward": 0.5}]',
}


@pytest.mark.parametrize("name", [*FILES, "tokens.npz"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_end_in_one_line(tmp_path, capsys, name, kind):
    if name == "entropy_change.jsonl":
        jsonl(tmp_path / "entropy.jsonl", FILES["entropy.jsonl"])
    (tmp_path / name).write_bytes(FOREIGN[kind])
    assert str(tmp_path / name) in ends_in_one_line(tmp_path, capsys, 3)


def test_other_files_are_drawn_all_the_same(tmp_path, capsys, sketch):
    jsonl(tmp_path / "attribution.jsonl", attribution_rows())
    (tmp_path / "metrics.jsonl").write_text("torn")
    (tmp_path / "tokens.npz").write_text("torn")
    assert "metrics.jsonl" in ends_in_one_line(tmp_path, capsys, 3)
    assert len(sketch) == 1


@pytest.mark.parametrize("name", [*FILES, "tokens.npz"])
def test_what_is_no_file_ends_in_one_line(tmp_path, capsys, name):
    """A folder, a FIFO that nobody writes to, and a file that cannot be read."""
    if name == "entropy_change.jsonl":
        jsonl(tmp_path / "entropy.jsonl", FILES["entropy.jsonl"])
    path = tmp_path / name
    path.mkdir()
    assert "not a regular file" in ends_in_one_line(tmp_path, capsys, 3)
    path.rmdir()
    os.mkfifo(path)
    assert "not a regular file" in ends_in_one_line(tmp_path, capsys, 3)
    path.unlink()
    if os.path.isfile("/proc/self/mem"):  # reading its first bytes fails, for root too
        path.symlink_to("/proc/self/mem")
        assert "read" in ends_in_one_line(tmp_path, capsys, 3)


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(entropy=np.zeros((5, 3))), "entropy is float64 [5, 3]"),
        (dict(entropy=np.array([["a"] * 20] * 5)), "entropy is"),
        (dict(top_ids=np.zeros((5, 20))), "top_ids is float64"),
        (dict(token=np.zeros((0,), int)), "token is"),
        (dict(component=np.array(3)), "component is"),
        (dict(meta=np.array("[1]")), "meta"),
        (dict(meta=np.array("{}")), "meta"),
        (dict(meta=np.array("not JSON")), "not a readable"),
        (dict(meta=np.array([{}], object)), "not a readable"),
        (dict(text_ids=np.arange(3)), "text is"),
    ],
)
def test_damaged_tables_end_in_one_line(tmp_path, capsys, sketch, other, says):
    save_tokens(tmp_path / "tokens.npz", **other)
    assert says in ends_in_one_line(tmp_path, capsys, 3)


def test_half_a_table_and_one_without_an_array(tmp_path, capsys, sketch):
    save_tokens(tmp_path / "tokens.npz")
    whole = (tmp_path / "tokens.npz").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:1000] + bytes(500) + whole[1500:]):
        (tmp_path / "tokens.npz").write_bytes(part)
        assert "not a readable tokens.npz" in ends_in_one_line(tmp_path, capsys, 3)
    np.savez(tmp_path / "tokens.npz", token=np.arange(3))
    assert "not a readable tokens.npz" in ends_in_one_line(tmp_path, capsys, 3)


def test_tokens_without_a_text_show_their_number(tmp_path, sketch):
    save_tokens(tmp_path / "tokens.npz", text_ids=np.arange(5) + 100)
    plot.folder(tmp_path)
    assert {t.get_text() for t in sketch[0].axes[0].texts} == {f"<{i}>" for i in range(5)}


def test_rows_out_of_order_and_written_again(tmp_path, capsys, sketch):
    """Lines go from left to right, and of two rows of one step the later one stands."""
    rows = metric_rows(6, 3)
    again = [{**rows[2], "reward": 9.0}, {**rows[2], "reward": 0.25}]
    jsonl(
        tmp_path / "metrics.jsonl", [rows[4], *again[:1], *reversed(rows[:4]), rows[5], *again[1:]]
    )
    states = [*reversed(state_rows()), {**state_rows()[0], "entropy_nats": 0.125}]
    jsonl(tmp_path / "entropy.jsonl", states)
    plot.folder(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split()[0] for line in said] == ["2", "1"]
    drawn = {label: (x, y) for label, x, y in lines_of(sketch, "reward and accuracy")}
    assert drawn["reward"] == ([1, 2, 3, 4, 5, 6], [1 / 6, 2 / 6, 0.25, 4 / 6, 5 / 6, 1.0])
    flow = {label: (x, y) for label, x, y in lines_of(sketch[1:2], "")}
    assert flow["H^l, the residual"][0] == [0, 3, 6, 9] and flow["H^l, the residual"][1][0] == 0.125


def test_texts_with_line_separators_are_one_row(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, and stand unescaped in a JSON text."""
    texts = ["a\u2028b\u0085c\u000bd", "e"]
    path = tmp_path / "samples.jsonl"
    path.write_text(
        "".join(json.dumps({"t": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert plot.read_rows(path) == ([{"t": t} for t in texts], 0)
    assert plot.read_rows(path, lambda row: row["t"] == "e") == ([{"t": "e"}], 1)


def test_too_many_models_for_a_figure(tmp_path, capsys, sketch):
    rows = [{**r, "run": str(k)} for k in range(plot.MOST_RUNS + 1) for r in state_rows()[-1:]]
    jsonl(tmp_path / "entropy.jsonl", rows)
    assert "too many" in ends_in_one_line(tmp_path, capsys, 3)


@pytest.mark.parametrize(
    "content, message, code",
    [
        (None, "nothing to draw", 2),
        ("", "no rows", 3),
        ("{}\n[1]\n", "none of its 2 lines is a row with a step and one of reward", 3),
        ('x\n{"step": 1}\n', "none of its 2 lines", 3),
        ('{"step": 1, "loss": 2}\n', "one of reward", 3),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, content, message, code):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert message in ends_in_one_line(tmp_path, capsys, code)


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
    jsonl(tmp_path / "metrics.jsonl", metric_rows(3, 1))
    assert "give a folder" in ends_in_one_line(tmp_path / "metrics.jsonl", capsys, 2)
    assert "give a folder" in ends_in_one_line(tmp_path / "nowhere", capsys, 2)


def test_a_folder_is_drawn_by_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    """From any working directory; what fails there is a line, and never an error here."""
    (tmp_path / "run").mkdir()
    jsonl(tmp_path / "run" / "metrics.jsonl", metric_rows(3, 1))
    monkeypatch.chdir(tmp_path)
    draw("run")
    said = capsys.readouterr()
    files = ["training.png", "training.svg", "page.html"]
    assert said.out.splitlines() == [f"wrote run/{name}" for name in files] and not said.err
    assert is_picture(tmp_path / "run" / "training.png")
    assert (tmp_path / "run" / "page.html").read_text("utf-8").endswith("</html>\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("torn")
    draw(tmp_path / "run")
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 2
    assert "figures not drawn (plot.py: " in said.err and "none of its 1 lines" in said.err
    assert "page.html not written (page.py: " in said.err and "nothing to show" in said.err
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    draw("run")
    said = capsys.readouterr().err
    assert "run: figures not drawn (" in said and "run: page.html not written (" in said
    monkeypatch.undo()
    monkeypatch.setattr("plumbing.figures.MOST_SECONDS", 0.01)
    draw(tmp_path / "run")
    assert capsys.readouterr().err.count("timed out after") == 2


def test_drawing_needs_no_torch():
    code = "import sys, tools.plot; sys.exit('torch' in sys.modules)"
    root = Path(plot.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
