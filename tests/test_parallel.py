"""Two processes against one: gradients, weights, metrics, samples, checkpoints; and one of the two
dying.

Everything here runs on CPUs through gloo. What one process does is computed in the test; two ranks
do the same in processes of their own, side by side, and leave their results in files. The model is
random and its reward a coin, as in test_train.py.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from policies import backward, stored_logprobs
from test_train import CONFIG, coin, flags, rows, write_problems

import eval as evaluation
import grpo
import tiny
import train
from grpo import Response, micro_batches
from model import Transformer
from plumbing import checkpoint, parallel
from plumbing.cli import guarded
from plumbing.hub import load_model, save_model
from plumbing.optimizer import SplitAdamW

# several micro-batches an update, and not equally many on both ranks
SLACK = ("--micro-tokens", "40")


def launch(job, folder, timeout=300, kill=True, **env):
    """Run `job(folder)` of this file on two ranks; returns the two exit codes and what each said on
    stderr. kill: end rank 1 when rank 0 has failed, as torchrun does; it may be hanging on
    purpose."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        **env,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(train.__file__).parent), str(Path(__file__).parent)]
        ),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, job, str(folder)],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        said = [ranks[0].communicate(timeout=timeout)[1]]
        if kill and ranks[0].returncode:
            ranks[1].kill()
        said.append(ranks[1].communicate(timeout=timeout)[1])
    finally:
        for p in ranks:
            p.kill()
    return [p.returncode for p in ranks], said


@contextmanager
def tossing():
    """The coin in place of the verifier, in this process."""
    with (
        mock.patch.object(evaluation, "judge", coin),
        mock.patch.object(train, "reward", lambda a, args: float(a.verdict.correct)),
    ):
        yield


def toss():
    """The coin in place of the verifier, for good: in a process of its own there is nothing to
    restore."""
    evaluation.judge, train.reward = coin, lambda a, args: float(a.verdict.correct)


def arguments(folder, name, *more, **change):
    change = {"lr": 1e-4, "steps": 3, "prompts": 5, "mini-prompts": 3, "eval-every": 1} | change
    f = flags(folder / "model", folder / name, *SLACK, *more, **change)
    return [str(x) for x in f]


def batch_of(n=9):
    """Responses of unequal length whose advantages do not cancel."""
    g = torch.Generator().manual_seed(0)
    return [
        Response(
            [1, 2, 3],
            torch.randint(0, 260, (3 + i % 5,), generator=g).tolist(),
            [],
            advantage=(-1.0) ** i + 0.3 * i,
        )
        for i in range(n)
    ]


def gradients(folder, tied, replicas=1, compute=torch.float32):
    """Loss and gradients of an internal and of the whole policy by `backward`, and the modules
    that ranks gather for it."""
    dtype = compute if parallel.world() == 1 else torch.float32
    model = parallel.shard(
        load_model(folder / ("model" if tied else "untied"), dtype), replicas, compute
    )
    if dtype == torch.bfloat16:
        SplitAdamW(model.parameters())  # makes gradients float32
    names = {id(m): n for n, m in model.named_modules()}
    out = {}
    for layer in (1, CONFIG.n_layers):
        gathered = set()
        with watching(model, lambda m, into=gathered: into.add(names[id(m)])):
            seen = backward(model, batch_of(), layer, 20)
        norm = parallel.clip_gradients(model, 1.0)
        grads = {
            n: None if p.grad is None else parallel.full_tensor(p.grad).clone()
            for n, p in model.named_parameters()
        }
        out[layer] = {"seen": seen, "norm": norm, "grads": grads, "gathered": gathered}
        model.zero_grad()
    return out


def watching(model, note):
    """Note every module whose parameters are gathered while this is on."""
    if parallel.world() == 1:
        return mock.patch.object(model, "folder", None)
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    real = FSDPParamGroup.unshard

    def unshard(self, *a, **k):
        for m in self.modules:
            note(m)
        return real(self, *a, **k)

    return mock.patch.object(FSDPParamGroup, "unshard", unshard)


def round_trip(folder):
    """Weights and moments through `gather` and `scatter`, after looks that leave the embedding
    gathered; 1 is added on the way."""
    model = parallel.shard(load_model(folder / "model"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    backward(model, batch_of(), 1, 20)
    optimizer.step()
    optimizer.zero_grad()

    def look():
        return [x.sum().item() for x in stored_logprobs(model, batch_of(2), CONFIG.n_layers, 100)]

    looks = [look()]
    plain, flat = parallel.gather(model, optimizer)
    held = len(flat.state) if flat else None
    if plain:
        with torch.no_grad():
            plain.blocks[0].o.weight.add_(1)
            flat.state[plain.embed.weight]["exp_avg"].add_(1)
    looks.append(look())
    parallel.scatter(plain, flat, model, optimizer)
    looks.append(look())
    again, flat = parallel.gather(model, optimizer)
    if plain:
        looks.append(
            [torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True)]
        )
    moment = flat.state[again.embed.weight]["exp_avg"].mean().item() if flat else None
    return {"looks": looks, "held": (held, flat and len(flat.state)), "moment": moment}


# --------------------------------------------------------------------------------------------------
# what the ranks do


def do_everything(folder):
    """One start for all that ends well: starting Python twice takes longer than the rest."""
    parallel.start()
    found = {
        "tied": gradients(folder, True),
        "untied": gradients(folder, False),
        "replicas": gradients(folder, True, 2),
    }
    found["half"] = gradients(folder, True, compute=torch.bfloat16)
    try:
        parallel.on_rank_0(lambda: [] if parallel.rank() else int("disk full"))
    except ValueError as e:
        found["error"] = str(e)
    found["round_trip"] = round_trip(folder)
    found["counts"] = [
        len(micro_batches(parallel.local_responses(batch_of()), 20)),
        parallel.all_reduce({"x": 1.5, "y": parallel.rank()}),
    ]
    torch.save(found, folder / f"found-{parallel.rank()}.pt")
    train.main(arguments(folder, "two"))
    # resumes what one process left after step 2
    train.main(arguments(folder, "one-then-two"))
    train.main(arguments(folder, "variants-two", *VARIANTS, steps=2))
    train.main(arguments(folder, "narrow-two", *NARROW))
    train.main(arguments(folder, "half-two", *HALF))
    evaluation.main(evaluate(folder, "eval-two"))
    parallel.stop()


def do_die(folder):
    """Rank 1 is killed at the start of its second checkpoint, when rank 0 waits for its shards."""
    real, calls = parallel.gather, []

    def gather(*a):
        calls.append(a)
        # the first is before the first step
        if parallel.rank() and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a)

    with mock.patch.object(parallel, "gather", gather):
        guarded(train.main, arguments(folder, "died"))


def do_hang(folder):
    """Rank 1 falls silent in its second update."""
    real, calls = grpo.backward, []

    def backward(*a, **k):
        calls.append(a)
        if parallel.rank() and len(calls) == 2:
            time.sleep(600)
        return real(*a, **k)

    with mock.patch.object(train, "backward", backward):
        guarded(train.main, arguments(folder, "hung"))


def signalled(folder, name, owner, attribute, call):
    """Rank 1 alone gets SIGTERM, twice as torchrun would pass it on, in the n-th call of a
    function."""
    real, calls = getattr(owner, attribute), []

    def interrupted(*a, **k):
        calls.append(a)
        if parallel.rank() and len(calls) == call:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
        return real(*a, **k)

    with mock.patch.object(owner, attribute, interrupted):
        guarded(train.main, arguments(folder, name))


# two a step: training, evaluation
def do_signal_rollout(folder):
    signalled(folder, "signal_rollout", train.Sampler, "generate", 4)


# two a step
def do_signal_update(folder):
    signalled(folder, "signal_update", train, "backward", 3)


def do_mistake(folder):
    guarded(train.main, arguments(folder, "mistake", **{"bupo-layer": 9}))


VARIANTS = (
    "--bupo-steps",
    "1",
    "--refills",
    "2",
    "--kl",
    "0.1",
    "--advantage",
    "reinforce++",
    "--loss",
    "seq-mean",
    "--recompute",
    "--watch-layers",
    "1",
)
HALF = ("--dtype", "bfloat16", "--steps", "2")
NARROW = ("--prompts", "1", "--bupo-steps", "1")  # one of the ranks has nothing to sample


def evaluate(folder, name):
    return [
        str(x)
        for x in (
            "--model",
            folder / "model",
            "--data",
            folder / "model/problems.jsonl",
            "--samples",
            3,
            "--limit",
            5,
            "--max-new-tokens",
            8,
            "--system",
            "",
            "--out",
            folder / name,
            "--max-prompt-tokens",
            16,
        )
    ]


# --------------------------------------------------------------------------------------------------
# what one process does, and the comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same work by two ranks and by one process, all in one folder."""
    folder = tmp_path_factory.mktemp("parallel")
    save_model(Transformer(CONFIG).init_weights(0, 0.3), folder / "model")
    # an odd number of rows for two ranks
    untied = type(CONFIG)(**{**CONFIG.__dict__, "tied": False, "vocab_size": 261})
    save_model(Transformer(untied).init_weights(1, 0.3), folder / "untied")
    tiny.write_tokenizer(folder / "model")
    write_problems(folder / "model")
    with tossing():
        train.main(arguments(folder, "one"))
        train.main(arguments(folder, "one-then-two", steps=2))
        train.main(arguments(folder, "variants-one", *VARIANTS, steps=2))
        train.main(arguments(folder, "narrow-one", *NARROW))
        train.main(arguments(folder, "half-one", *HALF))
        evaluation.main(evaluate(folder, "eval-one"))
        codes, said = launch("everything", folder)
        assert codes == [0, 0], "\n".join(said)
        shutil.copytree(folder / "two", folder / "two-then-one")
        shutil.rmtree(folder / "two-then-one/step_000003")
        train.main(arguments(folder, "two-then-one"))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found-{r}.pt") for r in range(2)]


@pytest.mark.parametrize("layout", ["tied", "untied", "replicas"])
@pytest.mark.parametrize("layer", [1, CONFIG.n_layers])
def test_loss_and_gradients_are_those_of_one_process(folder, found, layout, layer):
    one = gradients(folder, layout != "untied")[layer]
    for two in (f[layout][layer] for f in found):
        assert (
            two["seen"] == pytest.approx(one["seen"], abs=1e-6, rel=1e-6)
            and abs(two["norm"] - one["norm"]) < 1e-6 * one["norm"]
        )
        for name, mine in one["grads"].items():
            if mine is None:
                assert two["grads"][name] is None, name
            else:
                assert (two["grads"][name] - mine).abs().max() < 1e-6, name


@pytest.mark.parametrize("layer", [1, CONFIG.n_layers])
def test_shards_compute_in_bfloat16_as_one_process_does(folder, found, layer):
    """The arithmetic of a GPU: float32 shards behind bfloat16 products, against bfloat16 weights
    with a master."""
    one = gradients(folder, True, compute=torch.bfloat16)[layer]
    for two in (f["half"][layer] for f in found):
        for name, mine in one["grads"].items():
            if mine is None:
                assert two["grads"][name] is None, name
            else:
                assert two["grads"][name].dtype == mine.dtype == torch.float32
                assert (two["grads"][name] - mine).norm() < 0.02 * mine.norm(), name


def test_ranks_sample_in_bfloat16_what_one_process_samples(folder):
    """The first step's responses are equal, and its gradients but for roundings."""
    one, two = (rows(folder / f"half-{n}", "samples.jsonl") for n in ("one", "two"))
    one, two = ([r for r in some if r["step"] == 1] for some in (one, two))
    for a, b in zip(one, two, strict=True):
        assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=0.1)  # bfloat16
        assert a == b
    settings = [json.loads((folder / f"half-{n}/config.json").read_text()) for n in ("one", "two")]
    assert [s["optimizer"] for s in settings] == ["split-m32", "adamw"]
    norms = [
        next(r["grad_norm"] for r in rows(folder / f"half-{n}") if r["step"] == 1)
        for n in ("one", "two")
    ]
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=0.02)


def test_an_internal_phase_gathers_no_block_above(found):
    for f in found:
        assert f["tied"][1]["gathered"] == {"", "blocks.0"} and f["tied"][3]["gathered"] == {
            "",
            "blocks.0",
            "blocks.1",
            "blocks.2",
        }
        assert [
            n
            for n, g in f["tied"][1]["grads"].items()
            if g is None and not n.startswith(("blocks.1.", "blocks.2.", "norm."))
        ] == []


def test_ranks_had_unequal_work_and_exchange_sums_and_errors(found):
    # so that idle micro-batches were part of the test above
    assert found[0]["counts"][0] != found[1]["counts"][0]
    for f in found:
        assert f["counts"][1] == {"x": 3.0, "y": 1.0} and "disk full" in f["error"]


def test_what_is_gathered_and_changed_comes_back_to_the_shards(found):
    looks, held, moment = (found[0]["round_trip"][k] for k in ("looks", "held", "moment"))
    assert (
        looks[0] == looks[1]
        and all(abs(a - b) > 0.1 for a, b in zip(looks[1], looks[2], strict=True))
        and all(looks[3])
    )
    assert held[0] == held[1] > 5 and moment == pytest.approx(1, abs=0.1)
    assert found[1]["round_trip"]["looks"] == looks[:3]


def differences(a, b, drop=()):
    """(step, name, value, value) of whatever is not the same in the rows of two runs, but for
    rounding."""

    def near(name, x, y):
        if name == "sampler_diff/ess":
            return x == pytest.approx(1, abs=1e-5) and y == pytest.approx(1, abs=1e-5)
        if name.startswith("sampler_diff"):
            return x < 1e-5 > y  # is itself rounding
        return x == pytest.approx(y, rel=1e-4, abs=1e-6) if isinstance(x, float) else x == y

    assert [r.keys() - {*drop} for r in a] == [r.keys() - {*drop} for r in b]
    return [
        (x["step"], k, v, y[k])
        for x, y in zip(a, b, strict=True)
        for k, v in x.items()
        if k not in drop and not near(k, v, y[k])
    ]


@pytest.mark.parametrize(
    "one, two",
    [
        ("one", "two"),
        ("one", "one-then-two"),
        ("one", "two-then-one"),
        ("variants-one", "variants-two"),
        ("narrow-one", "narrow-two"),
    ],
)
def test_runs_are_those_of_one_process(folder, one, two):
    """Metrics, samples, weights and moments after two internal steps and a whole one; resumed with
    more and with fewer ranks, too."""
    a, b = rows(folder / one), rows(folder / two)
    assert not differences(a, b) and a[-1]["step"] >= 2 and all(r["updates"] for r in a[1:])
    a, b = (
        [{k: v for k, v in r.items() if k != "logprobs"} for r in rows(folder / n, "samples.jsonl")]
        for n in (one, two)
    )
    assert len(a) >= 12 and a == b
    last = f"step_{rows(folder / one)[-1]['step']:06d}"
    optimizer = {}
    for name in (one, two):
        model = Transformer(CONFIG)
        optimizer[name] = torch.optim.AdamW(model.parameters(), fused=True)
        checkpoint.restore(folder / name / last, model, optimizer[name])
    ours, theirs = (optimizer[n].param_groups[0]["params"] for n in (one, two))
    start = list(load_model(folder / "model").parameters())
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).abs().max() < 1e-6 and (p - before).abs().max() > 5e-5
        x, y = (optimizer[n].state[t] for n, t in ((one, p), (two, q)))
        assert x.keys() == y.keys() == {"step", "exp_avg", "exp_avg_sq"} and x["step"] == y["step"]
        assert all((x[k] - y[k]).abs().max() < 1e-6 for k in ("exp_avg", "exp_avg_sq"))


def test_a_checkpoint_of_two_ranks_has_the_files_of_one_process(folder):
    files = [
        sorted(str(p.relative_to(folder / n)) for p in (folder / n).rglob("*") if p.is_file())
        for n in ("one", "two")
    ]
    assert files[0] == files[1] and any("optim" in f for f in files[0])
    internal = [
        checkpoint.restore(
            folder / n / "step_000002",
            model := Transformer(CONFIG),
            optimizer := torch.optim.AdamW(model.parameters()),
        )
        and len(optimizer.state)
        for n in ("one", "two")
    ]
    # blocks above the layer had no state yet
    assert internal[0] == internal[1] < len(list(Transformer(CONFIG).parameters()))


def test_eval_shares_its_questions(folder):
    one, two = (
        json.loads((folder / n / "results.json").read_text())["sets"].popitem()[1]
        for n in ("eval-one", "eval-two")
    )
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in two.items() if k != "seconds"
    } and one["questions"] == 5
    one, two = ((folder / n / "samples.jsonl").read_text() for n in ("eval-one", "eval-two"))
    assert one == two and len(one.splitlines()) == 15


@pytest.mark.parametrize("n, world", [(5, 2), (1, 4), (128, 8), (7, 3), (0, 2)])
def test_shares_are_whole_and_even(n, world, monkeypatch):
    shares = []
    monkeypatch.setattr(parallel, "world", lambda: world)
    for r in range(world):
        monkeypatch.setattr(parallel, "rank", lambda r=r: r)
        shares.append(list(range(n))[parallel.local_slice(n)])
    assert sum(shares, []) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# --------------------------------------------------------------------------------------------------
# one of two dies


@pytest.mark.parametrize(
    "job, name, kept", [("die", "died", ["step_000001"]), ("hang", "hung", [])]
)
def test_a_lost_rank_ends_the_other_and_leaves_nothing_half_written(folder, job, name, kept):
    """Killed while its shards are gathered for a checkpoint; or alive and silent, which the timeout
    ends."""
    start = time.time()
    codes, said = launch(job, folder, **({"NANOBUPO_TIMEOUT": "5"} if job == "hang" else {}))
    assert codes == [parallel.LOST, -signal.SIGKILL], said
    (line,) = (line for line in said[0].splitlines() if "another rank" in line)
    assert "run again" in line and "Traceback" not in said[0] and time.time() - start < 60
    assert (
        sorted(p.name for p in (folder / name).iterdir() if p.name.startswith(("step", ".")))
        == kept
    )
    assert all(checkpoint.damage(folder / name / k) == "" for k in kept)


@pytest.mark.parametrize("where, step", [("rollout", 1), ("update", 2)])
def test_F07_a_signal_to_one_rank_stops_all_at_the_same_step(folder, where, step):
    """A rollout is left at once by the rank that was told, and after it by the other; an update is
    finished by both. Then one process goes on, and ends where an undisturbed run does."""
    name = f"signal_{where}"
    codes, said = launch(name, folder, kill=False)
    assert (
        codes == [75, 75]
        and f"stopped after step {step}, which is saved" in said[0]
        and "Traceback" not in "".join(said)
    ), said
    assert checkpoint.latest(folder / name).name == f"step_{step:06d}"
    with tossing():
        train.main(arguments(folder, name))
    # the evaluation of the step that was stopped was left, too
    drop = ("eval/accuracy", "eval/questions")
    assert not differences(rows(folder / "one"), rows(folder / name), drop)


def test_a_mistake_is_one_line_of_rank_0(folder):
    codes, said = launch("mistake", folder)
    assert (
        codes[0] == 2
        and "layers 1 to 3" in said[0]
        and len(said[0].strip().splitlines()) == 1
        and said[1] == ""
    )


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_do_not_divide_the_ranks_are_refused(replicas):
    with pytest.raises(ValueError, match="number of processes, 1"):
        parallel.shard(Transformer(CONFIG), replicas)


@pytest.mark.parametrize("seconds", ["soon", "0", "-1"])
def test_a_bad_timeout_is_refused(monkeypatch, seconds):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("NANOBUPO_TIMEOUT", seconds)
    with pytest.raises(ValueError, match="NANOBUPO_TIMEOUT"):
        parallel.start()


if __name__ == "__main__":
    torch.set_num_threads(1)
    toss()
    globals()[f"do_{sys.argv[1]}"](Path(sys.argv[2]))
