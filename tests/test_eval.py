"""Avg@K and pass@k against counting, and the command on a small random model."""

import itertools
import json
import sys

import pytest
import torch

import eval as evaluation
import tiny
from cli import guarded, short_name
from eval import avg_at_k, pass_at_k, scores
from model import Config, Transformer, save


@pytest.mark.parametrize(
    "n, c, k",
    [
        (1, 0, 1),
        (1, 1, 1),
        (4, 1, 1),
        (4, 1, 2),
        (4, 2, 3),
        (5, 3, 4),
        (6, 0, 3),
        (6, 6, 3),
        (8, 1, 8),
    ],
)
def test_pass_at_k_by_counting(n, c, k):
    """The share of the k-subsets of n samples that hold one of the c correct ones."""
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_avg_at_k():
    assert avg_at_k([[1, 0], [1, 1], [0, 0]]) == pytest.approx(0.5)
    assert avg_at_k(torch.eye(4)) == pass_at_k(4, 1, 1)
    for bad in ([], [[]], [1, 0]):
        with pytest.raises(ValueError):
            avg_at_k(bad)


def test_scores_of_made_up_answers():
    from data import Problem
    from rollout import Sample
    from verify import Verdict

    def made(right, length):
        return evaluation.Answered(
            Problem("q", "1"),
            [1],
            Sample([2] * length, [0.0] * length, right),
            "t",
            Verdict(right, None, "equal: string" if right else "different"),
        )

    s = scores(
        [
            [made(True, 4), made(False, 8)],
            [made(True, 4), made(True, 4)],
            [made(False, 2), made(False, 2)],
        ]
    )
    assert (
        s["questions"],
        s["samples"],
        s["avg@k"],
        s["pass@1"],
        s["mean_length"],
        s["truncated"],
    ) == (3, 2, 0.5, 0.5, 4, 0.5)
    assert s["pass@2"] == pytest.approx(2 / 3) and s["reasons"] == {
        "equal: string": 3,
        "different": 3,
    }
    assert s["avg@k_stderr"] == pytest.approx(torch.tensor([0.5, 1, 0]).std().item() / 3**0.5)


def test_short_name():
    assert [
        short_name(x)
        for x in ("Qwen/Qwen3-4B", "a/b/math500.parquet", "x.jsonl", "out/run/", "qwen2.5-0.5b")
    ] == ["Qwen3-4B", "math500", "x", "run", "qwen2.5-0.5b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random byte-level model and three problems."""
    folder = tmp_path_factory.mktemp("model")
    save(
        Transformer(Config("qwen3", 260, 16, 2, 2, 1, 8, 32, tied=True, max_len=256)).init_weights(
            0, 0.3
        ),
        folder,
    )
    tiny.write_tokenizer(folder)
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({"problem": f"{i}+1", "answer": i + 1}) + "\n" for i in range(3))
    )
    return folder


def test_command(folder, tmp_path, capsys):
    data = folder / "problems.jsonl"
    argv = [
        "--model",
        str(folder),
        "--data",
        str(data),
        "--samples",
        "4",
        "--max-new-tokens",
        "12",
        "--slots",
        "8",
        "--system",
        "",
    ]
    argv += ["--out", str(tmp_path / "e")]
    guarded(evaluation.main, argv)
    out = capsys.readouterr().out
    assert "first prompt:\n0+1" in out and "Avg@4" in out
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    (score,) = results["sets"].values()
    assert set(score) >= {
        "avg@k",
        "avg@k_stderr",
        "pass@1",
        "pass@2",
        "pass@4",
        "mean_length",
        "truncated",
        "data_sha256",
    }
    rows = [
        json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 12
    assert set(rows[0]) >= {
        "question",
        "answer",
        "response",
        "extracted",
        "reward",
        "reason",
        "finish_reason",
        "prompt_ids",
        "ids",
    }
    for r in rows:
        assert (r["ids"][-1] == tiny.END) == (r["finish_reason"] == "stop") and len(r["ids"]) <= 12
    assert score["avg@k"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))


@pytest.mark.parametrize(
    "change, code, says",
    [
        ({"--model": "no-such-model"}, 2, "no preset of that name"),
        ({"--data": "nothing-here.parquet"}, (2, 3), "nothing-here"),
        ({"--device": "cuda:77"}, 2, "--device"),
        ({"--temperature": "-1"}, 2, "temperature"),
        ({"--max-prompt-tokens": "1"}, 3, "longer than 1"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, change, code, says):
    flags = {
        "--model": str(folder),
        "--data": str(folder / "problems.jsonl"),
        "--max-new-tokens": "4",
        "--out": str(tmp_path),
    } | change
    with pytest.raises(SystemExit) as e:
        guarded(evaluation.main, [x for kv in flags.items() for x in kv])
    err = capsys.readouterr().err
    assert (
        e.value.code in (code if isinstance(code, tuple) else (code,))
        and says in err
        and len(err.strip().splitlines()) == 1
    )


def test_interruption_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        guarded(main)
    assert (
        e.value.code == 130 and capsys.readouterr().err.strip().endswith("interrupted") and sys.argv
    )
