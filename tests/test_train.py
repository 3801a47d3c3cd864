"""The loop on a small random model whose reward is a coin tossed by its response: files, resume,
phases, refusals."""

import json
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import bupo
import eval as evaluation
import grpo
import tiny
import train
from model import Config, Transformer
from plumbing import checkpoint, figures, metrics, optimizer, parallel, settings
from plumbing.cli import guarded
from plumbing.hub import load_model, save_model
from rollout import Sampler
from verify import Verdict

ROOT = Path(train.__file__).parent
CONFIG = Config("qwen3", 260, 16, 3, 2, 1, 8, 32, tied=True, max_len=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(Transformer(CONFIG).init_weights(0, 0.3), folder)
    tiny.write_tokenizer(folder)
    write_problems(folder)
    return folder


def write_problems(folder):
    """Ten problems to train on, and ten others."""
    for name, term in (("problems", 1), ("held_out", 2)):
        lines = [
            json.dumps({"problem": f"{i}+{term}", "answer": str(i + term)}) + "\n"
            for i in range(10)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def coin(text, gold, verifier):
    """A random model never answers right: reward half of all texts instead, by a hash, so that
    there is something to learn."""
    return Verdict(zlib.crc32(text.encode()) % 2 == 0, text, "equal: coin")


@pytest.fixture(autouse=True)
def reward_by_coin(monkeypatch):
    monkeypatch.setattr(evaluation, "judge", coin)
    # a random model hardly ever stops by itself
    monkeypatch.setattr(train, "reward", lambda a, args: float(a.verdict.correct))


def flags(folder, out, *more, **change):
    f = {
        "model": folder,
        "data": folder / "problems.jsonl",
        "eval-data": folder / "held_out.jsonl",
        "eval-limit": 6,
        "out": out,
        "prompts": 4,
        "group": 4,
        "mini-prompts": 2,
        "steps": 4,
        "save-every": 1,
        "keep": 0,
        "lr": 1e-3,
        "max-new-tokens": 8,
        "max-prompt-tokens": 16,
        "slots": 16,
        "bupo-layer": 1,
        "bupo-steps": 2,
        "system": "",
    } | change
    return [*(x for k, v in f.items() for x in (f"--{k}", str(v))), *more]


def rows(out, name="metrics.jsonl"):
    """The rows of a log without what was measured."""
    parsed = map(json.loads, (out / name).read_text().splitlines())
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in parsed
    ]


def weights(folder):
    return load_model(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """One uninterrupted run of four steps, the first two internal."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "judge", coin)
        m.setattr(train, "reward", lambda a, args: float(a.verdict.correct))
        train.main(flags(folder, out))
    return out


def test_a_run_writes_what_it_says(finished, folder):
    r = rows(finished)
    assert (
        [x["step"] for x in r] == [0, 1, 2, 3, 4]
        and "eval/accuracy" in r[0]
        and "eval/accuracy" in r[4]
    )
    assert [x["inter/layer"] for x in r[1:]] == [1, 1, 3, 3] and [x["phase"] for x in r[1:]] == [
        "internal"
    ] * 2 + ["whole"] * 2
    for x in r[1:]:
        assert (
            x["updates"] in (1, 2)
            and x["grad_norm"] > 0
            and x["response_tokens"] > 0
            and 0 < x["entropy"] < torch.tensor(257.0).log()
        )
        assert x["sampler_diff/max"] < 1e-5 and x["sampler_diff/far"] == 0
        assert abs(x["loss"]) < 0.5 and x["verdict/equal"] == 16
    samples = rows(finished, "samples.jsonl")
    assert len(samples) == 64 and {s["step"] for s in samples} == {1, 2, 3, 4}
    for x in r[1:]:  # as TRL counts: all that was sampled so far, each response with its prompt
        lengths = [(s["step"], len(s["ids"]), len(s["prompt_ids"])) for s in samples]
        assert x["response_tokens"] == sum(ids for step, ids, _ in lengths if step == x["step"])
        assert x["num_tokens"] == sum(
            ids + prompt for step, ids, prompt in lengths if step <= x["step"]
        )
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["bupo_layer"] == "1"
        and config["lr"] == 1e-3
        and config["torch"] == torch.__version__
    )
    assert len(config["data_sha256"]) == 64
    assert (finished / "training.png").stat().st_size > 5000
    assert sorted(p.name for p in finished.glob("step_*")) == [
        f"step_{i:06d}" for i in (1, 2, 3, 4)
    ]


def test_checkpoints_load_in_transformers(finished):
    from transformers import AutoModelForCausalLM

    last, ids = finished / "step_000004", torch.arange(20)[None]
    theirs, ours = AutoModelForCausalLM.from_pretrained(last), load_model(last)
    with torch.no_grad():
        assert (theirs(ids).logits - ours.unembed(ours(ids))).abs().max() < 1e-5


def test_internal_phase_leaves_the_blocks_above_alone(finished, folder):
    start, internal, whole = (
        weights(folder),
        weights(finished / "step_000002"),
        weights(finished / "step_000003"),
    )
    above = [k for k in start if k.startswith(("blocks.1.", "blocks.2.", "norm."))]
    assert all(
        torch.equal(start[k], internal[k]) and not torch.equal(internal[k], whole[k]) for k in above
    )
    assert not any(torch.equal(start[k], internal[k]) for k in start if k not in above)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_bit_exact(finished, folder, tmp_path, stop, monkeypatch):
    """Cut after the checkpoint of step `stop` (in, at the end of, after the internal phase), the
    same command ends in the same run."""
    out, next_problems = tmp_path / "cut", train.next_problems

    def dying(run, step, *rest):
        if step == stop + 1:
            raise KeyboardInterrupt
        return next_problems(run, step, *rest)

    monkeypatch.setattr(train, "next_problems", dying)
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, out))
    assert e.value.code == 130 and checkpoint.latest(out).name == f"step_{stop:06d}"
    # what a kill may leave
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "half a ro')
    monkeypatch.setattr(train, "next_problems", next_problems)
    train.main(flags(folder, out))
    assert rows(out) == rows(finished) and rows(out, "samples.jsonl") == rows(
        finished, "samples.jsonl"
    )
    assert same(weights(out / "step_000004"), weights(finished / "step_000004"))


def test_same_seed_same_rows_other_seed_other_rows(finished, folder, tmp_path):
    train.main(flags(folder, tmp_path / "again", steps=2))
    assert rows(tmp_path / "again")[:2] == rows(finished)[:2]
    train.main(flags(folder, tmp_path / "other", steps=1, seed=1))
    assert rows(tmp_path / "other")[1] != rows(finished)[1]


def test_micro_batches_and_chunks_change_nothing(finished, folder, tmp_path):
    train.main(flags(folder, tmp_path / "small", steps=1, **{"micro-tokens": 20, "logit-chunk": 3}))
    a, b = weights(tmp_path / "small" / "step_000001"), weights(finished / "step_000001")
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


def test_layer_L_is_plain_grpo_bit_for_bit(folder, tmp_path):
    for name, layer in (("l", 3), ("none", "")):
        train.main(flags(folder, tmp_path / name, steps=2, **{"bupo-layer": layer}))
    assert rows(tmp_path / "l") == rows(tmp_path / "none")
    assert same(weights(tmp_path / "l" / "step_000002"), weights(tmp_path / "none" / "step_000002"))


def test_equal_rewards_make_no_update(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "reward", lambda a, args: 1.0)
    train.main(flags(folder, tmp_path / "r", steps=1))
    row = rows(tmp_path / "r")[1]
    assert row["updates"] == 0 and row["grad_norm"] == 0 and row["frac_reward_zero_std"] == 1
    assert same(weights(tmp_path / "r" / "step_000001"), weights(folder))


def answered(right, length, stopped=True):
    from plumbing.data import Problem
    from rollout import Response

    r = Response([1], [2] * length, [0.0] * length, stopped, Problem("q", "1"))
    r.verdict, r.reward = Verdict(right, None, ""), float(right)
    return r


REWARD = train.reward


@pytest.mark.parametrize(
    "overlong, by_hand", [("zero", [1, 0, 0]), ("mask", [1, 0, 0]), ("soft", [0.5, 0, -1])]
)
def test_reward_of_long_responses_by_hand(overlong, by_hand):
    """Right with 90 of 100 tokens (a buffer of 20), wrong with 10, cut off at 100."""
    args = train.parse(
        ["--overlong", overlong, "--overlong-buffer", "20", "--max-new-tokens", "100"]
    )
    made = [answered(True, 90), answered(False, 10), answered(True, 100, stopped=False)]
    assert [REWARD(a, args) for a in made] == pytest.approx(by_hand)


def test_masked_responses_are_out_of_numerator_and_denominator(folder, tmp_path, monkeypatch):
    """--overlong mask: the loss sees the stopped responses only. Half of them count as stopped
    here, by a coin."""
    seen, grade_and_gather, mini_batches = [], train.grade_and_gather, train.mini_batches

    def toss(run, groups, problems):
        for r in [r for group in groups for r in group]:
            r.stopped = sum(r.ids) % 2 == 0
        return grade_and_gather(run, groups, problems)

    def noted(groups, args):
        seen.append(mini_batches(groups, args))
        return []

    monkeypatch.setattr(train, "grade_and_gather", toss)
    monkeypatch.setattr(train, "mini_batches", noted)
    monkeypatch.setattr(train, "reward", lambda r, args: float(sum(r.ids) % 3))
    for overlong in ("mask", "zero"):
        change = {"overlong": overlong, "mini-prompts": 4}
        train.main(flags(folder, tmp_path / overlong, steps=1, **change))
    masked, whole = ([r for mini in minis for r in mini] for minis in seen)
    assert (
        len(whole) == 16
        and [r for r in whole if sum(r.ids) % 2 == 0] == masked
        and 0 < len(masked) < 16
    )


def test_refills_replace_groups_of_equal_rewards(folder, tmp_path):
    train.main(flags(folder, tmp_path / "r", steps=3, refills=3, group=2))
    drawn = [row["groups_sampled"] for row in rows(tmp_path / "r")[1:]]
    assert max(drawn) > 4 and all(4 <= n <= 16 for n in drawn)
    pairs = [s["reward"] for s in rows(tmp_path / "r", "samples.jsonl")]
    # of two, one is right: no group is of equals
    assert all(a != b for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_kl_variant_runs_and_is_zero_at_the_start(folder, tmp_path):
    train.main(
        flags(
            folder,
            tmp_path / "r",
            steps=2,
            kl=0.1,
            **{"mini-prompts": 4, "loss": "seq-mean", "advantage": "rloo", "tis": 2},
        )
    )
    first, second = rows(tmp_path / "r")[1:]
    assert first.get("kl", 0) < 1e-9 < second["kl"]


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75), (signal.SIGUSR1, 75)],
)
@pytest.mark.parametrize(
    "where, step", [("sampling", 2), ("update", 3), ("saving", 3), ("evaluation", 3)]
)
def test_a_signal_saves_the_last_whole_step(
    finished, folder, tmp_path, monkeypatch, capsys, number, code, where, step
):
    """The third step gets a signal: sampling is left at once, update, save and evaluation end with
    the step; then the run goes on as if nothing had been."""
    owner, name = {
        "sampling": (train.Sampler, "generate"),
        "update": (train, "backward"),
        "saving": (train.checkpoint, "save"),
        "evaluation": (train, "evaluate"),
    }[where]
    real, calls = getattr(owner, name), []
    # the call that falls into step 3
    last = {"sampling": 4, "update": 5, "saving": 1, "evaluation": 2}[where]

    def interrupted(*args, **kw):
        calls.append(name)
        if len(calls) == last:
            signal.raise_signal(number)
        return real(*args, **kw)

    monkeypatch.setattr(owner, name, interrupted)
    more = flags(
        folder, tmp_path / "r", **{"save-every": 3, "eval-every": 3 if where == "evaluation" else 0}
    )
    with pytest.raises(SystemExit) as e:
        guarded(train.main, more)
    assert e.value.code == code and f"stopped after step {step}" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "r").name == f"step_{step:06d}"
    monkeypatch.setattr(owner, name, real)
    train.main(more)
    drop = ("eval/accuracy", "eval/questions") if where == "evaluation" else ()
    assert [{k: v for k, v in r.items() if k not in drop} for r in rows(tmp_path / "r")] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows(finished)
    ]
    assert same(weights(tmp_path / "r" / "step_000004"), weights(finished / "step_000004"))
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_tokens_of_a_step_that_was_left_are_not_counted(folder, tmp_path, monkeypatch):
    """A signal while groups are sampled anew: the step is done again from its beginning."""
    real, asked = train.batch, []
    more = flags(
        folder,
        tmp_path / "whole",
        steps=6,
        refills=3,
        group=2,
        **{"eval-data": "", "save-every": 99},
    )
    train.main(more)
    # it has a second round
    left = max(r["step"] for r in rows(tmp_path / "whole") if r["groups_sampled"] > 4)

    def batch(problems, step, *rest):
        asked.append(step)
        if asked.count(left) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(problems, step, *rest)

    monkeypatch.setattr(train, "batch", batch)
    more[more.index("--out") + 1] = str(tmp_path / "cut")
    with pytest.raises(SystemExit):
        guarded(train.main, more)
    assert left > 1 and checkpoint.latest(tmp_path / "cut").name == f"step_{left - 1:06d}"
    monkeypatch.setattr(train, "batch", real)
    train.main(more)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_signal_in_the_first_evaluation(folder, tmp_path, monkeypatch, capsys):
    real = train.Sampler.generate
    monkeypatch.setattr(
        train.Sampler,
        "generate",
        lambda *a, **k: signal.raise_signal(signal.SIGTERM) or real(*a, **k),
    )
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r"))
    err = capsys.readouterr().err
    assert (
        e.value.code == 75
        and "stopped after step 0, with nothing to save" in err
        and not list((tmp_path / "r").glob("step_*"))
    )


@pytest.mark.parametrize("optimizer", ["split", "split-m32"])
def test_split_optimizers_train_and_resume(folder, tmp_path, optimizer):
    """bfloat16 weights with an exact master: a run cut in two ends in the same weights and moments,
    and in transformers."""
    more = ("--recompute", "--offload")
    train.main(flags(folder, tmp_path / "whole", *more, steps=3, optimizer=optimizer))
    train.main(flags(folder, tmp_path / "cut", *more, steps=2, optimizer=optimizer))
    train.main(flags(folder, tmp_path / "cut", *more, steps=3, optimizer=optimizer))
    assert [r for r in rows(tmp_path / "cut") if r["step"] != 2] == [
        r for r in rows(tmp_path / "whole") if r["step"] != 2
    ]
    for file in ("model.safetensors", "resume/optim.safetensors"):
        a, b = (load_file(tmp_path / n / "step_000003" / file) for n in ("whole", "cut"))
        assert same(a, b) and len(a) > 20
    # loaded as asked
    assert weights(tmp_path / "whole" / "step_000003")["embed.weight"].dtype == torch.float32
    assert (
        json.loads((tmp_path / "whole" / "step_000003" / "config.json").read_text())["torch_dtype"]
        == "bfloat16"
    )


def test_deviations_of_rewards_by_hand():
    """reward_std is TRL's, of the whole batch; reward_group_std the mean of those within groups."""
    groups = [[answered(r, 3) for r in row] for row in ([1, 1, 1, 1], [1, 0, 0, 0])]
    meter = metrics.Meter(seconds=Counter(rollout=1.0, backward=1.0))
    model = SimpleNamespace(config=SimpleNamespace(n_layers=3))
    run = SimpleNamespace(meter=meter, model=model, num_tokens=100)
    row = metrics.row(run, 7, (3,), groups, groups)
    # five ones of eight
    assert row["reward_std"] == pytest.approx((8 * 0.625 * 0.375 / 7) ** 0.5)
    # one of four: sqrt(4 * 1/4 * 3/4 / 3)
    assert row["reward_group_std"] == pytest.approx((0 + 0.5) / 2)
    assert row["response_tokens"] == 24 and row["num_tokens"] == 100 + 24 + 8


def test_what_is_solved_and_lengths_of_right_and_wrong_by_hand():
    """Right is what the verifier says of a response that stopped, whatever its reward."""
    groups = [
        [answered(1, 2), answered(1, 4)],
        [answered(0, 6), answered(1, 9, stopped=False)],
        [answered(1, 3), answered(0, 1)],
        [answered(0, 2), answered(0, 2)],
    ]
    for r in groups[1]:
        r.reward = 1.0
    meter = metrics.Meter(seconds=Counter(rollout=1.0, backward=1.0))
    model = SimpleNamespace(config=SimpleNamespace(n_layers=3))
    run = SimpleNamespace(meter=meter, model=model, num_tokens=0)
    row = metrics.row(run, 1, (2, 3), groups, groups)
    assert (row["solved_all"], row["solved_none"]) == (1 / 4, 2 / 4)
    assert row["completions/mean_length_right"] == 3  # of 2, 4, 3
    assert row["completions/mean_length_wrong"] == 4  # of 6, 9, 1, 2, 2
    assert (row["phase"], row["inter/layer"]) == ("internal", 2)


# What a flag is set to, where it must arrive and as which argument. Values that no default and no
# other flag has
ARRIVES = [
    ("model", None, "load_model", "name_or_folder"),
    ("dtype", torch.bfloat16, "load_model", "dtype"),
    ("prompts", 5, "batch", "batch_size"),
    ("seed", 4, "batch", "seed"),
    ("max-prompt-tokens", 41, "encode_prompts", "max_prompt_tokens"),
    ("system", "s", "encode_prompts", "system"),
    ("thinking", True, "encode_prompts", "thinking"),
    ("format", "base", "tokenizer", "format"),
    ("slots", 13, "Sampler", "slots"),
    ("group", 3, "generate", "n"),
    ("max-new-tokens", 9, "generate", "max_new_tokens"),
    ("temperature", 0.9, "generate", "temperature"),
    ("verifier", "hendrycks", "grade", "verifier"),
    ("overlong-buffer", 6, "overlong_penalty", "buffer"),
    ("max-new-tokens", 9, "overlong_penalty", "limit"),
    ("advantage", "rloo", "group_advantages", "kind"),
    ("clip-low", 0.11, "backward", "clip_low"),
    ("clip-high", 0.23, "backward", "clip_high"),
    ("dual-clip", 7.0, "backward", "dual_clip"),
    ("loss", "seq-mean", "backward", "weighting"),
    ("kl", 0.05, "backward", "kl"),
    ("tis", 1.7, "backward", "tis"),
    ("objective", "cispo", "backward", "objective"),
    ("entropy-top", 0.7, "mask_certain", "share"),
    ("entropy-layer", 1, "mask_certain", "layer"),
    ("align", 0.3, "align", "coefficient"),
    ("align-layer", 1, "align", "layer"),
    ("max-new-tokens", 9, "backward", "limit"),
    ("micro-tokens", 333, "backward", "max_tokens"),
    ("internal-norm", "final", "backward", "norm"),
    ("temperature", 0.9, "backward", "temperature"),
    ("logit-chunk", 17, "backward", "chunk"),
    ("temperature", 0.9, "stored_logprobs", "temperature"),
    ("internal-norm", "final", "stored_logprobs", "norm"),
    ("temperature", 0.9, "InternalPolicy", "temperature"),
    ("grad-clip", 0.7, "clip_gradients", "limit"),
    ("lr", 2e-3, "SplitAdamW", "lr"),
    ("weight-decay", 0.03, "SplitAdamW", "weight_decay"),
    ("optimizer", torch.float32, "SplitAdamW", "moment_dtype"),
    ("keep", 3, "save", "keep"),
]
# where the argument is not what is typed
TYPED = {"dtype": "bfloat16", "optimizer": "split-m32"}


@pytest.fixture(scope="module")
def arrived(folder, tmp_path_factory):
    """The arguments of what train.py calls, by callee and name, each as the list of values of a run
    of two steps; and its rows."""
    import inspect

    calls, out = {}, tmp_path_factory.mktemp("runs") / "flags"

    def spy(m, owner, name, kept=None):
        real, seen = getattr(owner, name), calls.setdefault(kept or name, [])
        signature = inspect.signature(real)

        def called(*a, **k):
            bound = signature.bind(*a, **k)
            bound.apply_defaults()
            policy = bound.arguments.get("policy")
            seen.append(bound.arguments | (vars(policy) if policy else {}))
            return real(*a, **k)

        m.setattr(owner, name, called)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "judge", coin)
        for name in (
            "load_model",
            "batch",
            "encode_prompts",
            "Sampler",
            "grade",
            "overlong_penalty",
            "group_advantages",
            "backward",
            "stored_logprobs",
            "mask_certain",
            "align",
            "InternalPolicy",
        ):
            spy(m, train, name)
        spy(m, train.tokenizers, "load_tokenizer", "tokenizer")
        spy(m, train.checkpoint, "save")
        spy(m, parallel, "clip_gradients")
        spy(m, optimizer, "SplitAdamW")
        spy(m, Sampler, "generate")
        counted = train.reward
        m.setattr(train, "reward", lambda a, args: 0 * counted(a, args) + float(a.verdict.correct))
        change = {
            flag: TYPED.get(flag, value)
            for flag, value, *_ in ARRIVES
            if flag not in ("model", "thinking")
        }
        train.main(
            flags(
                folder,
                out,
                "--thinking",
                steps=2,
                **change,
                **{
                    "eval-data": "",
                    "mini-prompts": 2,
                    "bupo-layer": 2,
                    "bupo-steps": 1,
                    "refills": 1,
                    "overlong": "soft",
                },
            )
        )
    return calls, rows(out)


@pytest.mark.parametrize(
    "flag, value, callee, argument", ARRIVES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_flag_of_the_method_arrives(arrived, folder, flag, value, callee, argument):
    seen = [call[argument] for call in arrived[0][callee]]
    if callee == "batch" and argument == "batch_size":
        seen = seen[:1]  # refills ask for fewer
    if callee == "batch" and argument == "seed":
        # and in another order
        seen = [call["seed"] for call in arrived[0]["batch"] if call["batch_size"] == 5]
    wanted = folder if flag == "model" else value
    assert seen and all(x == wanted for x in seen), f"--{flag} arrives as {seen[:5]}"


def test_flags_that_are_counts_of_calls_arrive(arrived):
    calls, metrics = arrived
    assert [x["inter/layer"] for x in metrics] == [2, 3] and {
        call["layer"] for call in calls["backward"]
    } == {2, 3}
    # --mini-prompts x --group
    assert max(len(call["responses"]) for call in calls["backward"]) == 2 * 3
    steps = [call["step"] for call in calls["batch"]]
    # --refills
    assert max(steps.count(1), steps.count(2)) == 1 + 1


def test_every_setting_that_changes_the_numbers_is_in_the_table():
    """A new one belongs there, or among those that the test of counts holds."""
    table = {flag.replace("-", "_") for flag, *_ in ARRIVES}
    assert set(settings.MATHS) - table == {
        "model_commit",
        "data_sha256",
        "bupo_layer",
        "bupo_steps",
        "internal_temperature",
        "train_blocks",
        "train_blocks_steps",
        "mini_prompts",
        "refills",
        "reward",
        "overlong",
    }


def changed(out, first, then):
    """Parts of the model that differ between two checkpoints of a run: embed, 1 .. L, norm."""
    a, b = weights(first if first else out), weights(out / f"step_{then:06d}")
    names = [name.split(".") for name in a if not torch.equal(a[name], b[name])]
    return {str(int(n[1]) + 1) if n[0] == "blocks" else n[0] for n in names}


def test_train_blocks_trains_what_an_internal_phase_would(folder, tmp_path):
    """--train-blocks 1-1 by the ordinary loss moves what BuPO at layer 1 moves, and no moment of
    the others; after its steps all learn."""
    blocks = {"bupo-layer": "none", "train-blocks": "1-1", "train-blocks-steps": 2}
    train.main(flags(folder, tmp_path / "blocks", **blocks))
    train.main(flags(folder, tmp_path / "bupo", steps=2))
    for name in ("blocks", "bupo"):
        assert changed(tmp_path / name, folder, 2) == {"embed", "1"}
        kept = load_file(tmp_path / name / "step_000002/resume/optim.safetensors")
        assert not [n for n in kept if n.startswith(("blocks.1", "blocks.2", "norm"))]
    assert changed(tmp_path / "blocks", tmp_path / "blocks/step_000002", 3) >= {"1", "2", "3"}
    # by another loss: the two are not the same run
    a, b = (weights(tmp_path / name / "step_000002") for name in ("blocks", "bupo"))
    assert not torch.equal(a["embed.weight"], b["embed.weight"])
    top = {"bupo-layer": "none", "train-blocks": "2-3", "steps": 1}
    train.main(flags(folder, tmp_path / "top", **top))
    assert changed(tmp_path / "top", folder, 1) == {"embed", "2", "3", "norm"}


@pytest.mark.parametrize("text", ["0-1", "3-1", "x", "1-2-3", "-1", "", "1-"])
def test_blocks_that_cannot_be_are_refused(folder, tmp_path, text, capsys):
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r", f"--train-blocks={text}"))
    assert e.value.code == 2 and "blocks as 1-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        ({"train-blocks": "1-4"}, "has 1 to 3"),
        ({"align": 0.1, "align-layer": 4}, "has 1 to 3"),
        ({"align": 0.1}, "needs --align-layer"),
        ({"entropy-layer": 9}, "has 1 to 3"),
        ({"advantage": "maxrl", "overlong": "soft"}, "rewards of at least 0"),
        ({"bupo-layer": "1,2", "bupo-steps": "auto"}, "2 BuPO layers"),
    ],
)
def test_layers_that_the_model_has_not_are_one_line(folder, tmp_path, change, says, capsys):
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r", **change))
    error = capsys.readouterr().err
    assert e.value.code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_control_rewards(monkeypatch):
    """A coin that nothing in the response moves, the same at every resume; a box, right or not."""
    monkeypatch.setattr(train, "reward", REWARD)
    monkeypatch.setattr(train, "grade", lambda r, *rest: None)
    args = SimpleNamespace(reward="random", overlong="zero", seed=1, verifier="")

    def rewards(step, texts, stopped=True):
        groups = [[answered(False, 1, stopped) for _ in texts] for _ in range(50)]
        for i, group in enumerate(groups):
            for r, text in zip(group, texts, strict=True):
                r.prompt, r.text = [i], text
        run = SimpleNamespace(args=args, step=step, tokenizer=None, meter=metrics.Meter())
        problems = [(None, [i]) for i in range(50)]
        return [[r.reward for r in g] for g in train.grade_and_gather(run, groups, problems)]

    coins = rewards(3, ["a", "b", "a", "a"])
    assert coins == rewards(3, ["x", "", "\\boxed{1}", "y"]) != rewards(4, ["a", "b", "a", "a"])
    total = sum(map(sum, coins))
    assert 80 < total < 120 and {x for row in coins for x in row} == {0.0, 1.0}
    args.reward = "format"
    assert rewards(3, ["so 7", "\\boxed{7}"]) == [[0.0, 1.0]] * 50
    assert rewards(3, ["so 7", "\\boxed{7}"], stopped=False) == [[0.0, 0.0]] * 50


def test_an_internal_temperature_is_that_of_internal_layers_alone(folder, tmp_path, monkeypatch):
    seen, policy = [], train.Run.policy

    def spy(run, layer, model=None):
        out = policy(run, layer, model)
        seen.append((layer, out.temperature))
        return out

    monkeypatch.setattr(train.Run, "policy", spy)
    tau = {"internal-temperature": 2.5, "temperature": 0.9, "steps": 3}
    train.main(flags(folder, tmp_path / "r", **tau))
    assert set(seen) == {(1, 2.5), (3, 0.9)}


def test_both_layers_at_once_sum_their_gradients(folder, tmp_path, monkeypatch):
    """--bupo-layer 1+3: a gradient of each policy against its own old log-probs, one update."""
    seen, backward = [], train.backward

    def spy(policy, responses, *rest, **kw):
        seen.append((policy.layer, {layer for r in responses for layer in r.old_logprobs}))
        return backward(policy, responses, *rest, **kw)

    monkeypatch.setattr(train, "backward", spy)
    train.main(flags(folder, tmp_path / "r", steps=1, **{"bupo-layer": "1+3"}))
    (row,) = [r for r in rows(tmp_path / "r") if r["step"] == 1]
    assert [layer for layer, _ in seen] == [1, 3] * row["updates"] and row["updates"] == 2
    assert all(old == {1, 3} for _, old in seen)
    assert (row["phase"], row["inter/layer"]) == ("internal", 1)


def test_a_phase_of_auto_length_resumes_where_it_was(folder, tmp_path, monkeypatch):
    """Whether it is over follows from the rows before: a run that was cut is in the same phase."""
    monkeypatch.setattr(metrics, "is_right", lambda r: r.verdict.correct)
    auto = {"bupo-steps": "auto", "lr": 3e-2}  # a rate that makes it forget
    train.main(flags(folder, tmp_path / "whole", steps=8, **auto))
    r = rows(tmp_path / "whole")[1:]
    layers = [row["inter/layer"] for row in r]
    assert layers == sorted(layers) and layers[0] == 1 and layers[-1] == 3
    for i, row in enumerate(r):
        assert row["inter/layer"] == (3 if bupo.is_over(r[:i]) else 1)
        assert ("guard/agreement" in row) == (row["inter/layer"] == 1)
    for steps in (2, layers.count(1) + 1, 8):  # cut within the phase and after it
        train.main(flags(folder, tmp_path / "cut", steps=steps, **auto))
    cut = rows(tmp_path / "cut")[1:]
    assert [{**row, "eval/accuracy": 0} | {"eval/questions": 0} for row in cut] == [
        {**row, "eval/accuracy": 0} | {"eval/questions": 0} for row in r
    ]


def test_several_held_out_sets(folder, tmp_path, capsys):
    both = f"{folder / 'held_out.jsonl'}, sums-long"
    train.main(flags(folder, tmp_path / "r", steps=1, **{"eval-data": both}))
    for row in rows(tmp_path / "r"):
        assert row["eval/questions"] == 6
        assert 0 <= row["eval/accuracy"] <= 1 and 0 <= row["eval/accuracy/sums-long"] <= 1


def test_how_far_weights_went_by_part(folder):
    model = load_model(folder)
    before = metrics.weights_sample(model)
    assert list(before) == ["embed", "1", "2", "3", "norm"]
    assert sum(map(len, before.values())) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in model.blocks[1].parameters():
            p *= 1.01
        model.norm.weight[0] = 3.0
    seen = metrics.weights_change(before, model)
    size = before["norm"].norm().item()
    assert seen["update_norm/2"] == pytest.approx(0.01, rel=1e-4)
    assert seen["update_norm/norm"] == pytest.approx(2 / size) and seen["update_norm/1"] == 0
    small = metrics.weights_sample(model, most=500)
    assert sum(map(len, small.values())) < 1000


def test_gradients_are_clipped_to_a_joint_norm():
    model = torch.nn.Linear(2, 1).bfloat16()
    model.weight.grad, model.bias.grad = (
        torch.tensor([[3.0, 0.0]]).bfloat16(),
        torch.tensor([4.0]).bfloat16(),
    )
    assert (
        parallel.clip_gradients(model, 10.0).item() == pytest.approx(5)
        and model.bias.grad.item() == 4
    )
    assert parallel.clip_gradients(model, 1.0).item() == pytest.approx(
        5
    ) and model.bias.grad.item() == pytest.approx(0.8, rel=1e-2)
    assert parallel.clip_gradients(model, 1.0).dtype == torch.float32


def test_watching_layers_on_fixed_responses(folder, tmp_path):
    train.main(flags(folder, tmp_path / "r", steps=4, **{"watch-layers": 2}))
    watched = [r for r in rows(tmp_path / "r") if "watch/layer_cos" in r]
    assert [r["step"] for r in watched] == [1, 2, 4] and all(
        -1 <= r["watch/layer_cos"] <= 1 and r["watch/perplexity"] > 1 for r in watched
    )
    # the same tokens, other weights
    assert len({r["watch/perplexity"] for r in watched}) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [],
        lambda lines: lines[16:],
        lambda lines: ["{torn", *lines[16:]],
        lambda lines: [json.dumps({**json.loads(line), "ids": [1, 10**6]}) for line in lines],
        lambda lines: [json.dumps({**json.loads(line), "prompt_ids": "abc"}) for line in lines],
        lambda lines: [json.dumps({**json.loads(line), "step": "1"}) for line in lines],
    ],
)
def test_layers_that_cannot_be_watched_are_one_line(finished, folder, tmp_path, capsys, change):
    """samples.jsonl without the responses of step 1, or with what is none: training goes on, and
    does not change."""
    out = tmp_path / "r"
    train.main(flags(folder, out, steps=2))
    path = out / "samples.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    train.main(flags(folder, out, **{"watch-layers": 1}))
    said = capsys.readouterr().err
    assert said.count("--watch-layers: ") == 1 and "no responses of step 1" in said
    assert [r for r in rows(out) if r["step"] > 2] == rows(finished)[3:]


def test_a_lost_samples_file_costs_the_watch_and_no_more(folder, tmp_path, capsys):
    out = tmp_path / "r"
    train.main(flags(folder, out, steps=2, **{"watch-layers": 1}))
    (out / "samples.jsonl").unlink()
    train.main(flags(folder, out, **{"watch-layers": 1}))
    assert capsys.readouterr().err.count("--watch-layers: ") == 1
    assert ["watch/perplexity" in r for r in rows(out)] == [False, True, True, False, False]


def test_a_torn_sample_does_not_end_the_watch(folder, tmp_path):
    out = tmp_path / "r"
    train.main(flags(folder, out, steps=1, **{"watch-layers": 1}))
    with open(out / "samples.jsonl", "a") as f:
        f.write('{"step": 1, "respon')
    train.main(flags(folder, out, steps=2, **{"watch-layers": 1}))
    assert "watch/perplexity" in rows(out)[2]


def edited(line, **change):
    return json.dumps({**json.loads(line), **change})


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], '{"step": 1, "rewa' + lines[1], *lines[2:]],
        lambda lines: [edited(lines[0], **{"eval/accuracy": "high"}), *lines[1:]],
        lambda lines: [edited(lines[0], **{"time/eval": None, "eval/questions": [1]}), *lines[1:]],
        lambda lines: [
            *lines[:4],
            edited(lines[4], **{"eval/accuracy": 10**400, "reward": {}, "inter/layer": "x"}),
        ],
        lambda lines: ["[1, 2]", "\0\0\0", *lines[1:]],
        lambda lines: [edited(line, reward=None) for line in lines],
        lambda lines: [],
    ],
)
def test_a_finished_run_ends_well_whatever_its_rows_are(finished, folder, tmp_path, capsys, change):
    out = Path(shutil.copytree(finished, tmp_path / "r"))
    lines = change((out / "metrics.jsonl").read_text().splitlines())
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    guarded(train.main, flags(folder, out))
    said = capsys.readouterr()
    assert "written: " in said.out and "Traceback" not in said.err
    assert same(weights(out / "step_000004"), weights(finished / "step_000004"))


def test_a_figure_that_cannot_be_drawn_is_a_line(folder, tmp_path, capsys, monkeypatch, draws):
    def no_matplotlib(command, **kw):
        return subprocess.CompletedProcess(command, 1, "", "ImportError: no matplotlib")

    monkeypatch.setattr(figures.subprocess, "run", no_matplotlib)
    guarded(train.main, flags(folder, tmp_path / "r", steps=1))
    said = capsys.readouterr()
    assert "figures not drawn (ImportError: no matplotlib)" in said.err and said.out.splitlines()[
        -1
    ].startswith("accuracy ")


def test_texts_of_the_model_cannot_steer_the_terminal(folder, tmp_path, capsys, monkeypatch):
    """What is logged is the text, what is printed shows its escapes."""
    monkeypatch.setattr(
        train.Tokenizer, "decode", lambda self, ids: "\x1b]0;owned\x07\u202e!", raising=False
    )
    train.main(flags(folder, tmp_path / "r", steps=1))
    assert r"\x1b]0;owned\x07\u202e!" in capsys.readouterr().out.splitlines()
    assert rows(tmp_path / "r", "samples.jsonl")[0]["response"] == "\x1b]0;owned\x07\u202e!"


def poison(monkeypatch, calls):
    """The loss of these calls of policy_loss, from 1, is NaN: one call a micro-batch, one
    micro-batch an update."""
    real, count = grpo.policy_loss, []

    def policy_loss(*a, **k):
        count.append(1)
        loss, low, high = real(*a, **k)
        return (loss * float("nan") if len(count) in calls else loss), low, high

    monkeypatch.setattr(grpo, "policy_loss", policy_loss)


def test_a_gradient_that_is_not_finite_makes_no_update_and_leaves_its_batch(
    folder, finished, tmp_path, monkeypatch, capsys
):
    # the second update of step 1, the first of step 2: two in a row; the first of step 3
    poison(monkeypatch, {2, 3, 5})
    train.main(flags(folder, tmp_path / "r", steps=3))
    r, err = rows(tmp_path / "r"), capsys.readouterr().err
    assert (
        [x["updates"] for x in r[1:]] == [1, 1, 1]
        and err.count("nothing was updated") == 3
        and "step 2" in err
    )
    bad = rows(tmp_path / "r", "bad_batches.jsonl")
    assert [b["step"] for b in bad] == [1] * 8 + [2] * 8 + [3] * 8 and {
        b["layer"] for b in bad
    } == {1, 3}
    assert bad[0]["first"] == "embed.weight" and all(
        b["ids"] and len(b["ids"]) == len(b["sampler_logprobs"]) for b in bad
    )
    # in the middle of a failure nothing is saved
    assert not (tmp_path / "r/step_000001").exists()
    assert all(p.isfinite().all() for p in weights(tmp_path / "r/step_000003").values())
    samples = rows(tmp_path / "r", "samples.jsonl")
    assert {tuple(b["ids"]) for b in bad if b["step"] == 1} <= {
        tuple(s["ids"]) for s in samples if s["step"] == 1
    }


def test_three_in_a_row_end_the_run(folder, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {4, 5, 6})  # the second of step 2, both of step 3
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        e.value.code == 5
        and "3 updates in a row" in last
        and "embed.weight" in last
        and "bad_batches.jsonl" in last
    )
    assert [p.name for p in (tmp_path / "r").glob("step_*")] == ["step_000001"]


HELPS = (
    "slots",
    "max-new-tokens",
    "micro-tokens",
    "logit-chunk",
    "recompute",
    "optimizer split",
    "offload",
)


def short_of_memory(monkeypatch, above):
    """Forward passes with gradient over more than so many padded tokens find no memory. Returns the
    sizes that were tried."""
    real, tried = grpo.Policy.logprobs, []

    def logprobs(policy, batch):
        if torch.is_grad_enabled():
            tried.append(batch.ids.numel())
            if batch.ids.numel() > above:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"
                )
        return real(policy, batch)

    monkeypatch.setattr(grpo.Policy, "logprobs", logprobs)
    return tried


def test_out_of_memory_is_tried_again_in_halves_with_equal_gradients(
    finished, folder, tmp_path, monkeypatch, capsys
):
    tried = short_of_memory(monkeypatch, 50)
    train.main(flags(folder, tmp_path / "r", steps=1))
    assert (
        max(tried) > 50
        and "--micro-tokens 8192 from here on" in (err := capsys.readouterr().err)
        and "--micro-tokens 32" in err
    )
    a, b = weights(tmp_path / "r" / "step_000001"), weights(finished / "step_000001")
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


def test_out_of_memory_says_what_was_too_large(folder, tmp_path, monkeypatch, capsys):
    """When one response alone is too long."""
    short_of_memory(monkeypatch, 5)
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        e.value.code == 6
        and all(f"--{flag}" in last for flag in HELPS)
        and "layer 1" in last
        and "2.00 GiB" in last
    )
    assert "16384 tokens" not in last and "GB held" in last


def test_a_layer_that_is_not_there_is_refused_before_the_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    def loaded(*a):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(train, "load_model", loaded)
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r", **{"bupo-layer": 4}))
    assert e.value.code == 2 and "layers 1 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("kl", [0, 0.1])
def test_the_rehearsal_runs_the_largest_batch_and_changes_nothing(
    folder, tmp_path, monkeypatch, kl
):
    """What a GPU does before the first step: one update of as many responses of full length as fit
    --micro-tokens, at full depth."""
    args = train.parse(flags(folder, tmp_path / "r", kl=kl, **{"micro-tokens": 100}))
    run = train.open_run(args)
    run.optimizer, before, seen = optimizer.make_optimizer(run.model, args), weights(folder), []
    real = train.backward

    def noted(policy, responses, max_tokens, **kw):
        seen.append((responses, policy.layer, max_tokens))
        return real(policy, responses, max_tokens, **kw)

    monkeypatch.setattr(train, "backward", noted)
    train.rehearse(run)
    ((rs, layer, max_tokens),) = seen
    assert (
        len(rs) == 4
        and {(len(r.prompt), len(r.ids)) for r in rs} == {(16, 8)}
        and layer == 3
        and max_tokens == 100
    )
    assert same(dict(run.model.state_dict()), before) and all(
        p.grad is None for p in run.model.parameters()
    )
    assert not run.optimizer.state and run.sampler.cache is None


def test_what_a_step_measures(finished, folder):
    before = weights(folder)
    for line in (finished / "metrics.jsonl").read_text().splitlines()[1:]:
        r = json.loads(line)
        parts = ("rollout", "grade", "logprobs", "backward", "optimizer", "other")
        assert (
            all(r[f"time/{part}"] >= 0 for part in parts)
            and r["time/rollout"] > 0
            and r["time/backward"] > 0
        )
        assert r["perf/rollout_tok_s"] == pytest.approx(
            r["response_tokens"] / (r["time/rollout"] + r["time/grade"])
        )
        assert r["perf/train_tflop_s"] > 0
        assert 0.05 < r["perf/peak_gb"] < 50
        after = weights(finished / f"step_{r['step']:06d}")
        moved = torch.cat([(after[k].bfloat16() != before[k].bfloat16()).flatten() for k in after])
        assert r["weights_moved"] == moved.double().mean().item() and 0.2 < r["weights_moved"] < 0.9
        before = after


def test_small_steps_move_few_bfloat16_weights(folder, tmp_path):
    train.main(flags(folder, tmp_path / "r", steps=1, lr=1e-6, **{"bupo-layer": ""}))
    # what plain bfloat16 training would see of this step
    assert 0 < rows(tmp_path / "r")[1]["weights_moved"] < 0.05


def test_too_little_disk_is_said_before_the_first_step(folder, tmp_path, monkeypatch, capsys):
    from collections import namedtuple

    monkeypatch.setattr(
        "plumbing.memory.shutil.disk_usage",
        lambda path: namedtuple("Usage", "total used free")(10**9, 10**9 - 1000, 1000),
    )
    train.main(flags(folder, tmp_path / "not/yet", "--dry-run"))
    assert "warning: checkpoints take" in capsys.readouterr().err


def test_compiled_blocks_train_alike(finished, folder, tmp_path):
    train.main(flags(folder, tmp_path / "r", "--compile", steps=1))
    a, b = weights(tmp_path / "r" / "step_000001"), weights(finished / "step_000001")
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


def test_auto_layer(folder, tmp_path, capsys, monkeypatch):
    """auto measures responses to the first prompts and becomes a number, in the plan and in the
    run's config."""
    import decompose

    seen = []
    monkeypatch.setattr(
        decompose, "auto_layer", lambda model, sequences: seen.extend(sequences) or (2, "because")
    )
    train.main(flags(folder, tmp_path / "r", steps=1, **{"bupo-layer": "auto"}))
    assert "--bupo-layer auto: layer 2 (because)" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "r" / "config.json").read_text())["bupo_layer"] == "2"
        and rows(tmp_path / "r")[1]["inter/layer"] == 2
    )
    assert len(seen) == 8 and all(0 < prompt < len(ids) for ids, prompt in seen)


def test_dry_run_shows_and_leaves_nothing(folder, tmp_path, capsys):
    train.main(flags(folder, tmp_path / "r", "--dry-run"))
    out = capsys.readouterr().out
    assert (
        "first prompt:\n0+1" in out
        and "memory, GB, at most" in out
        and "bupo layer 1 for 2 steps, then grpo" in out
    )
    assert "hidden_states[1]" in out and not (tmp_path / "r").exists()


def test_a_dry_run_of_the_embedded_default_makes_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--dry-run"])
    assert "first prompt:\n" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_headline_command_is_planned_without_network_gpu_and_weights(tmp_path):
    """As the issue of a first evening: does it fit my card? One number gives the plan, several a
    table."""
    env = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}

    def dry(memory):
        command = [
            sys.executable,
            "train.py",
            "--model",
            "qwen3-4b",
            "--bupo-layer",
            "30",
            "--dry-run",
            "--memory",
            memory,
        ]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env
        )

    one, many = dry("80"), dry("16,24,48,80,141")
    assert one.returncode == many.returncode == 0 and not many.stderr
    said = one.stderr.splitlines()  # at most that this disk is too small for its checkpoints
    assert all(line.startswith("warning: checkpoints take 40.2 GB") for line in said)
    slots = int(re.search(r"--slots (\d+)", one.stdout)[1])
    assert (
        slots >= 24
        and "bupo layer 30 for 30 steps, then grpo" in one.stdout
        and "--recompute: else" in one.stdout
    )
    lines = many.stdout.splitlines()
    assert (
        len(lines) == 7
        and max(map(len, lines)) <= 80
        and lines[2].startswith("16 ")
        and "too small" in lines[2]
    )
    small = dry("20")
    assert (
        small.returncode == 6
        and "20 GB of GPU memory do not do" in small.stderr
        and small.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "more, change, code, says",
    [
        ((), {"model": "qwen9-4b"}, 2, "no preset of that name"),
        ((), {"data": "gone.jsonl"}, (2, 3), "gone.jsonl"),
        ((), {"bupo-layer": 4}, 2, "layers 1 to 3"),
        ((), {"group": 1}, 2, "at least 2"),
        ((), {"max-new-tokens": 1000}, 2, "256 tokens"),
        ((), {"lr": 0}, 2, "--lr"),
        ((), {"temperature": 0}, 2, "--temp"),
        ((), {"format": "xml"}, 2, "format"),
        (("--dtype", "bfloat16"), {"lr": 1e-6, "optimizer": "adamw"}, 2, "does not train"),
        (("--dtype", "float32"), {"optimizer": "split"}, 2, "bfloat16"),
        ((), {"max-prompt-tokens": 2}, 3, "longer than 2"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, more, change, code, says):
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "r", *more, **change))
    err = capsys.readouterr().err
    assert (
        e.value.code in (code if isinstance(code, tuple) else (code,))
        and says in err
        and len(err.strip().splitlines()) == 1
    )


@pytest.mark.parametrize(
    "argv", [["--offload", "--optimizer", "adamw"], ["--optimizer", "split", "--dtype", "float32"]]
)
def test_flags_that_do_not_go_together_are_refused(argv):
    with pytest.raises(ValueError, match="needs --"):
        train.parse(argv)


NO_AMOUNT = "-1", "nan", "inf", "-inf", "1e308", "x", ""
NO_COUNT = "-1", "1.5", "nan", "x", "", "9" * 30
RANGES = {
    **dict.fromkeys(("lr", "temperature", "grad-clip"), ("0", *NO_AMOUNT)),
    **dict.fromkeys(("clip-high", "kl", "tis", "weight-decay"), NO_AMOUNT),
    "clip-low": ("1.1", *NO_AMOUNT),
    "dual-clip": ("1", "0.5", *NO_AMOUNT),
    **dict.fromkeys(
        ("eval-every", "refills", "keep", "log-samples", "watch-layers", "seed"), NO_COUNT
    ),
    **dict.fromkeys(
        (
            "steps",
            "prompts",
            "group",
            "mini-prompts",
            "overlong-buffer",
            "max-new-tokens",
            "max-prompt-tokens",
            "eval-limit",
            "save-every",
        ),
        ("0", *NO_COUNT),
    ),
    "group ": ("1",),
    "data": ("", " "),
    "model": ("",),
    "advantage": ("ppo",),
    "stepz": ("3",),
    "bupo-layer": ("0", "-1", "x", "3,2", "1.5", "9" * 30, "1,2"),
    "bupo-steps": ("-1", "x", "1,2", "", "9" * 30),
}


@pytest.mark.parametrize(
    "flag, text", [(f"--{flag.strip()}", text) for flag, texts in RANGES.items() for text in texts]
)
def test_what_no_run_could_use_is_refused_before_anything_is_opened(
    flag, text, tmp_path, capsys, monkeypatch
):
    def opened(*a):
        raise AssertionError("it was opened")

    monkeypatch.setattr(checkpoint, "lock", opened)
    monkeypatch.setattr(train, "open_run", opened)
    with pytest.raises(SystemExit) as e:
        guarded(train.main, [f"{flag}={text}", "--out", str(tmp_path / "r")])
    said = capsys.readouterr().err
    assert e.value.code == 2 and len(said.splitlines()) == 1 and not (tmp_path / "r").exists()
    assert flag in said or "BuPO" in said


@pytest.mark.parametrize(
    "argv",
    [
        ["--log-samples", "0"],
        ["--log-samples", "0", "--watch-layers", "3"],
        ["--model", "x", "--log-samples", "0", "--watch-layers", "3"],
    ],
)
def test_a_watch_of_responses_that_are_not_kept_is_refused(argv):
    with pytest.raises(ValueError, match="--watch-layers [35] .*--log-samples 0"):
        train.parse(argv)
    assert train.parse(["--log-samples", "0", "--watch-layers", "0"]).log_samples == 0


def test_changed_settings_are_refused_on_resume(finished, folder, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, finished, lr=2e-3))
    assert e.value.code == 2 and "lr" in capsys.readouterr().err
    before = rows(finished)
    # finished: nothing to do, the same last line
    train.main(flags(folder, finished))
    assert rows(finished) == before and "accuracy" in capsys.readouterr().out.splitlines()[-1]


def test_another_seed_is_refused_before_the_models_folder_is_touched(tmp_path, monkeypatch, capsys):
    """The tiny model stands in the run's own folder: a warm-up of another seed would replace the
    one that the run began with."""

    def warm_up(*a, **kw):
        raise AssertionError("a warm-up was begun")

    monkeypatch.setattr(train.tiny, "warm_up", warm_up)
    (tmp_path / "step_000010").mkdir()
    saved = settings.as_json(train.parse(["--out", str(tmp_path), "--seed", "1"]))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as e:
            guarded(train.main, ["--out", str(tmp_path), "--seed", "2", *more])
        assert e.value.code == 2 and "seed: 1 -> 2" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="begun"):
        train.main(["--out", str(tmp_path), "--seed", "1"])


def test_a_run_does_not_write_over_a_model(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, folder))
    assert e.value.code == 2 and "holds a model" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "out/random")
    assert train.parse(["--model", "out/random"]).out == Path("out/random-run")
    assert train.parse(["--model", str(folder)]).out == Path("out") / folder.name


def test_a_refused_command_leaves_nothing_behind(folder, tmp_path):
    for out in (tmp_path / "new", tmp_path / "there"):
        if out.name == "there":
            out.mkdir()
        with pytest.raises(SystemExit):
            guarded(train.main, flags(folder, out, **{"bupo-layer": 9}))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_overwrite_starts_anew(folder, tmp_path):
    out = tmp_path / "r"
    train.main(flags(folder, out, steps=2))
    train.main(flags(folder, out, existing="overwrite", steps=1, seed=5))
    assert [r["step"] for r in rows(out)] == [0, 1] and [p.name for p in out.glob("step_*")] == [
        "step_000001"
    ]


@pytest.mark.parametrize(
    "more, code, says",
    [
        # the data is missed before a model is downloaded
        ([], 3, ("zwhe99/DeepMath-103K", "--repo-type dataset")),
        (["--data", "words"], 2, ("Qwen/Qwen3-4B", "path of a local copy")),
    ],
)
def test_the_headline_command_without_network_is_one_clear_line(tmp_path, more, code, says):
    env = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "train.py", "--model", "qwen3-4b", "--bupo-layer", "30", *more]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert run.returncode == code and run.stdout == "" and len(run.stderr.strip().splitlines()) == 1
    assert all(word in run.stderr for word in (*says, "hf download", "HF_HOME"))


def test_what_is_held_out_is_never_trained_on(folder, tmp_path, capsys):
    """The same file for both: what is held out of it is left out of training, with its number; all
    of it, and nothing is left."""
    same = {"eval-data": folder / "problems.jsonl"}
    train.main(flags(folder, tmp_path / "r", steps=1, **same))
    assert "6 problems of" in capsys.readouterr().out
    trained = {r["question"] for r in rows(tmp_path / "r", "samples.jsonl")}
    assert trained == {"6+1", "7+1", "8+1", "9+1"}
    with pytest.raises(SystemExit) as e:
        guarded(train.main, flags(folder, tmp_path / "s", **same, **{"eval-limit": 10}))
    assert e.value.code == 3 and "give another --eval-data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        guarded(train.main, ["--data", "math500", "--out", str(tmp_path / "t")])
    assert e.value.code == 2 and "--train-on-test" in capsys.readouterr().err
