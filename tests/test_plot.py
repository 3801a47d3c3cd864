"""Figures from small made-up files: what is drawn is what the files say, missing keys are skipped, mistakes end in one line."""

import json
import math

import numpy as np
import pytest

import plot


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


def save_tokens(path, text=("a", " b", "\n", "\u4f60", "$x^2$"), S=5, M=20):
    g = np.random.default_rng(0)
    meta = {"run": "m", "norm": "none", "temperature": 1.0, "dtype": "float32", "vocab_size": 50}
    np.savez(
        path,
        component=np.array(["embed", "resid_post", "resid_post", "resid_post", "final"]),
        layer=np.array([0, 1, 2, 3, 3]),
        example=np.array([0] * 12 + [1] * 8)[:M],
        position=np.array([*range(12), *range(8)])[:M],
        token=g.integers(0, 5, M),
        entropy=g.uniform(0, 3, (S, M)),
        top_ids=g.integers(0, 5, (S, M, 2)),
        top_probs=g.uniform(0, 1, (S, M, 2)),
        text_ids=np.arange(5),
        text=np.array(text),
        meta=np.array(json.dumps(meta)),
    )


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
    """The drawn lines of the panel whose heading begins with `title`, as (label, x, y), of the last figure that has one."""
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
                "tokens": n,
                "attn": [1.0 * n] * 3,
                "mlp": [2.0] * 3,
                "direct_attn": [0.1] * 3,
                "direct_mlp": [0.2] * 3,
                "gap": 0.001,
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
    assert [bar.get_height() for bar in figures[-1].axes[0].patches][:3] == [
        2.5
    ] * 3  # (1*1 + 3*3) / 4, weighted by tokens
    caption = figures[0].get_supxlabel()
    for part in ("m ", "norm: none", "float32", "40 response tokens", "ln V = 3.91"):
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
    styles = plot.styles(plot.runs_of(plot.read_rows(tmp_path / "entropy.jsonl")))
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
        ("\u4f60\u597d", "\u25a1\u25a1"),
        ("internationally", "interna\u2026"),
        ("\x00", "\u25a1"),
        ("$x$", "$x$"),
        ("", ""),
    ],
)
def test_token_texts_can_be_drawn(text, want):
    assert plot.printable(text) == want


def test_the_same_data_gives_the_same_files(tmp_path):
    jsonl(tmp_path / "entropy.jsonl", [r for r in state_rows() if r["component"] == "mlp_out"])
    first = {p: p.read_bytes() for p in plot.folder(tmp_path)}
    assert all(p.read_bytes() == first[p] for p in plot.folder(tmp_path))


@pytest.mark.parametrize(
    "content, message, code",
    [
        (None, "nothing to draw", 2),
        ("", "no rows", 3),
        ("{}\n[1]\n", "metrics.jsonl:2", 3),
        ('x\n{"step": 1}\n', "metrics.jsonl:1", 3),
        ('{"step": 1, "loss": 2}\n', "one of reward", 3),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, content, message, code):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == code
        and len(said) == 1
        and said[0].startswith("plot.py: ")
        and message in said[0]
    )
