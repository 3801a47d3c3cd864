"""Checkpoints: bit-exact round trips, and what is left after a kill at any file operation, a full
disk, a power cut, a flipped bit."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import model as model_file
from model import Config, Transformer
from plumbing import checkpoint, hub
from plumbing.checkpoint import CheckpointError, NotSaved, RunLocked
from plumbing.hub import hf_tensors
from plumbing.rows import each_row, read_rows

IDS = torch.arange(24).reshape(2, 12) * 7 % 32


def make(
    family="qwen3",
    tied=True,
    dtype=torch.float32,
    seed=0,
    optimizer=torch.optim.AdamW,
    layers=3,
    **kw,
):
    model = (
        Transformer(Config(family, 32, 16, layers, 4, 2, 4, 24, tied=tied))
        .init_weights(seed)
        .to(dtype)
    )
    return model, optimizer(model.parameters(), **{"lr": 1e-2, **kw})


def train(model, optimizer, steps, until=None):
    """Steps on the internal policy of block `until`: blocks above it get no gradient and no
    moments. Draws noise, so RNG matters."""
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = model.unembed(model(IDS, until), until)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1) + torch.rand(32), IDS[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()


def bits_of(model, optimizer):
    """Everything a resume must bring back, comparable with ==, to the bit."""

    def exact(v):
        return (
            (v.dtype, v.shape, v.detach().clone().view(-1).view(torch.uint8).numpy().tobytes())
            if torch.is_tensor(v)
            else (type(v), v)
        )

    names = {id(p): n for n, p in model.named_parameters()}
    moments = {
        (names[id(p)], k): exact(v)
        for p, state in optimizer.state.items()
        for k, v in state.items()
    }
    return {n: exact(p) for n, p in model.named_parameters()}, moments, exact(torch.get_rng_state())


def loaded(folder):
    model, optimizer = make(seed=99)
    state = checkpoint.restore(folder, model, optimizer)
    return state, bits_of(model, optimizer)


@pytest.fixture(autouse=True)
def _same_rng():
    torch.manual_seed(1)


# --------------------------------------------------------------------------------------------------
# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_resume_is_bit_exact(tmp_path, family, tied, dtype):
    """Three internal steps, two full ones: moments of two ages. The interrupted run and the
    uninterrupted one end in the same bits."""
    model, optimizer = make(family, tied, dtype)
    train(model, optimizer, 3, until=1)
    train(model, optimizer, 2)
    folder = checkpoint.save(
        tmp_path, 5, model, optimizer, {"cursor": [1, 2], "best": None, "share": 0.1}
    )
    saved = bits_of(model, optimizer)
    train(model, optimizer, 2)
    straight = bits_of(model, optimizer)

    torch.manual_seed(77)
    again, optimizer = make(family, tied, dtype, seed=5)
    where = {n: p.data_ptr() for n, p in again.named_parameters()}
    assert checkpoint.restore(folder, again, optimizer) == {
        "cursor": [1, 2],
        "best": None,
        "share": 0.1,
        "step": 5,
    }
    assert bits_of(again, optimizer) == saved
    ages = {n: int(optimizer.state[p]["step"]) for n, p in again.named_parameters()}
    assert ages["blocks.0.o.weight"] == 5 and ages["blocks.1.o.weight"] == 2
    train(again, optimizer, 2)
    assert bits_of(again, optimizer) == straight
    # the sampler shares these
    assert {n: p.data_ptr() for n, p in again.named_parameters()} == where


def test_a_parameter_without_moments_has_none_after_the_round_trip(tmp_path):
    model, optimizer = make(tied=False)
    train(model, optimizer, 2, until=1)
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {})
    again, other = make(tied=False, seed=5)
    train(again, other, 1)  # has moments everywhere: those of the upper blocks must go
    checkpoint.restore(folder, again, other)
    have = {n for n, p in again.named_parameters() if p in other.state}
    assert have == {
        n
        for n, p in again.named_parameters()
        if p.grad is not None and n.startswith(("blocks.0.", "embed", "head"))
    }
    assert bits_of(again, other) == bits_of(model, optimizer)
    train(model, optimizer, 2)  # the switch to the whole model: new moments start at the same age
    rng = torch.get_rng_state()
    checkpoint.restore(folder, again, other)
    train(again, other, 2)
    assert bits_of(again, other) == bits_of(model, optimizer) and torch.equal(
        rng, torch.get_rng_state()
    )


def test_before_the_first_step_there_are_no_moments(tmp_path):
    model, optimizer = make()
    again, other = make(seed=5)
    checkpoint.restore(checkpoint.save(tmp_path, 0, model, optimizer, {}), again, other)
    assert not other.state and bits_of(again, other) == bits_of(model, optimizer)


class Count(torch.optim.Optimizer):
    """Keeps Python numbers and None, as some optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            state["n"], state["scale"], state["row"], state["nothing"] = (
                state.get("n", 0) + 1,
                0.1,
                p.grad[:1].clone(),
                None,
            )
            p.sub_(p.grad, alpha=0.01 / state["n"])


@pytest.mark.parametrize(
    "kind, settings",
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (Count, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {}),
    ],
)
def test_any_optimizer_of_tensors_and_numbers(tmp_path, kind, settings):
    model, optimizer = make(optimizer=kind, **settings)
    train(model, optimizer, 2, until=2)
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {})
    again, other = make(optimizer=kind, seed=5, **settings)
    checkpoint.restore(folder, again, other)
    assert bits_of(again, other) == bits_of(model, optimizer)
    train(model, optimizer, 1)
    checkpoint.restore(folder, again, other)
    train(again, other, 1)
    assert bits_of(again, other) == bits_of(model, optimizer)


def test_state_that_is_neither_tensor_nor_number_is_refused(tmp_path):
    model, optimizer = make()
    optimizer.state[model.embed.weight]["who"] = "me"
    with pytest.raises(ValueError, match="a str as who"):
        checkpoint.save(tmp_path, 1, model, optimizer, {})


def test_shards_of_weights_and_of_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    monkeypatch.setattr(
        checkpoint, "save_model", functools.partial(hub.save_model, shard_bytes=4000)
    )
    model, optimizer = make()
    train(model, optimizer, 1)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {})
    assert (folder / "resume/optim-3.safetensors").exists() and len(
        list(folder.glob("model-*.safetensors"))
    ) > 2
    assert loaded(folder)[1] == bits_of(model, optimizer)


def test_what_was_loaded_does_not_hang_on_the_files(tmp_path):
    """safetensors hands out windows into the file: moments kept as such would change, or vanish,
    with it."""
    model, optimizer = make()
    train(model, optimizer, 1)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {})
    again, other = make(seed=5)
    checkpoint.restore(folder, again, other)
    for p in folder.rglob("*.safetensors"):
        size = p.stat().st_size
        with open(p, "r+b") as f:
            f.write(b"\xff" * size)
    assert bits_of(again, other) == bits_of(model, optimizer)


# --------------------------------------------------------------------------------------------------
# refusals


def test_load_names_all_that_does_not_fit_and_touches_nothing(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {})
    others = {
        "model.layers.3.mlp.up_proj.weight is missing": make(layers=4),
        "model.layers.2.mlp.up_proj.weight is not part": make(layers=2),
        "lm_head.weight is missing": make(tied=False),
        "is F32 .*, the model's is BF16": make(dtype=torch.bfloat16),
        "saved from optimizer AdamW, this one is SGD": make(optimizer=torch.optim.SGD),
    }
    wide = Transformer(Config("qwen3", 32, 16, 3, 4, 2, 4, 28, tied=True)).init_weights()
    others[r"up_proj.weight is F32 \[24, 16\], the model's is F32 \[28, 16\]"] = (
        wide,
        torch.optim.AdamW(wide.parameters()),
    )
    part, _ = make()
    others["holds no parameter for norm.weight/exp_avg"] = (
        part,
        torch.optim.AdamW(part.blocks.parameters()),
    )
    for message, (m, o) in others.items():
        before = bits_of(m, o)
        with pytest.raises(CheckpointError, match=message) as e:
            checkpoint.restore(folder, m, o)
        assert "\n" not in str(e.value) and bits_of(m, o) == before
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.restore(tmp_path / "step_000009", model, optimizer)
    # would broadcast, and train on
    optimizer.state[model.norm.weight]["exp_avg"] = torch.zeros(1, 16)
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {})
    with pytest.raises(
        CheckpointError, match="norm.weight/exp_avg has not the shape of its parameter"
    ):
        checkpoint.restore(folder, *make())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_never_written(tmp_path, value):
    model, optimizer = make()
    train(model, optimizer, 1)
    first = checkpoint.save(tmp_path, 1, model, optimizer, {})
    before = sorted(tmp_path.rglob("*"))
    weight = model.blocks[1].o.weight
    for tensor, name in (
        (weight.data, "blocks.1.o.weight"),
        (optimizer.state[weight]["exp_avg_sq"], "blocks.1.o.weight/exp_avg_sq"),
    ):
        was = tensor[3, 2].clone()
        tensor[3, 2] = value
        with pytest.raises(
            FloatingPointError, match=f"step_000002 not saved: {name} holds NaN or Inf"
        ):
            checkpoint.save(tmp_path, 2, model, optimizer, {})
        tensor[3, 2] = was
    optimizer.state[weight]["number"] = value
    with pytest.raises(FloatingPointError, match="blocks.1.o.weight/number"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert checkpoint.latest(tmp_path) == first and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "state",
    [{"a": {1, 2}}, {"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": torch.ones(1)}],
)
def test_state_that_json_would_change_is_refused(tmp_path, state):
    model, optimizer = make()
    with pytest.raises(ValueError, match="state"):
        checkpoint.save(tmp_path / "run", 1, model, optimizer, state)
    assert not (tmp_path / "run").exists()


def test_wrong_arguments_are_one_line(tmp_path):
    model, optimizer = make()
    with pytest.raises(ValueError, match="negative"):
        checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=-1)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        checkpoint.save(tmp_path, 1, model, optimizer, {}, tmp_path / "no")
    with pytest.raises(ValueError, match="not a parameter of the model"):
        stranger, other = make()
        train(stranger, other, 1)
        checkpoint.save(tmp_path, 1, model, other, {})
    model.norm.bfloat16()
    with pytest.raises(ValueError, match="several dtypes"):
        checkpoint.save(tmp_path, 1, model, optimizer, {})
    (tmp_path / "file").write_text("x")
    for call in (
        lambda: checkpoint.save(tmp_path / "file", 1, *make(), {}),
        lambda: checkpoint.lock(tmp_path / "file").__enter__(),
    ):
        with pytest.raises(OSError, match="file") as e:
            call()
        assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# killed at every file operation

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def child(work) -> int:
    """Run work() in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as e:
            print("in the child:", repr(e), file=sys.__stderr__)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(n, run, power_cut):
    """From here on, SIGKILL ourselves just before the n-th operation that changes the file system,
    counting from 1.

    Python's own are seen by an audit hook and os.fsync; safetensors writes out of its sight, so
    that before each of its writes there are three moments more: nothing yet, half the file (older
    versions write in place), a full-sized orphan with an empty second half. power_cut: what was not
    synced by then loses its second half to zeros, its length stays.
    """
    left, synced = [n], {p.stat().st_ino for p in run.rglob("*")} if run.exists() else set()

    def tick():
        left[0] -= 1
        if left[0] == 0:
            for p in run.rglob("*") if power_cut else ():
                if p.is_file() and p.stat().st_ino not in synced:
                    with open(p, "r+b") as f:
                        half_empty(f, p.stat().st_size)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if left[0] > 0 and (
            event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            tick()
            # it empties a file: then, too, we may die
            if event == "open" and args[2] & os.O_TRUNC and os.path.isfile(args[0]):
                os.truncate(args[0], 0)
                tick()

    def fsync(fd):  # noted, not done: the disk of whoever runs the tests is no part of them
        tick()
        synced.add(os.fstat(fd).st_ino)

    def save_file(tensors, path, metadata=None, really=checkpoint.save_file):
        tick()
        really(tensors, path, metadata=metadata)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        tick()
        path.unlink()
        orphan = path.with_name(".tmpAbCdEf")
        orphan.write_bytes(data)
        with open(orphan, "r+b") as f:
            half_empty(f, len(data))
        tick()
        orphan.unlink()
        really(tensors, path, metadata=metadata)

    os.fsync = fsync
    checkpoint.save_file = model_file.save_file = save_file
    sys.addaudithook(audit)


def half_empty(f, size):
    f.seek(size // 2)
    f.write(b"\0" * (size - size // 2))


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("situation", ["first", "next", "again"])
def test_killed_at_every_file_operation_old_or_new_loads_never_neither(
    tmp_path, capsys, situation, power_cut
):
    """first: no checkpoint before. next: the one before is retired (keep=1). again: the same step
    is written anew."""
    run, seed, base = tmp_path / "run", tmp_path / "seed", tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    model, optimizer = make()
    train(model, optimizer, 2, until=1)
    old, new_step = bits_of(model, optimizer), 20 if situation == "next" else 10
    if situation == "first":
        seed.mkdir()
    else:
        checkpoint.save(seed, 10, model, optimizer, {"which": "old"})
    train(model, optimizer, 1)
    new, rng = bits_of(model, optimizer), torch.get_rng_state()

    def save():
        torch.set_rng_state(rng)  # looking at what was saved, below, changes it
        return checkpoint.save(
            run, new_step, model, optimizer, {"which": "new"}, tokenizer_from=base, keep=1
        )

    def killed(n):
        die_at(n, run, power_cut)
        save()

    seen = []
    for n in range(1, 1000):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(seed, run)
        code = child(lambda n=n: killed(n))
        assert code in (0, -signal.SIGKILL), f"operation {n}: exit code {code}"
        if found := checkpoint.latest(run):
            state, got = loaded(found)
            assert got == {"old": old, "new": new}[state["which"]], (
                f"operation {n}: not the bits of {state['which']}"
            )
        else:
            assert situation == "first" and code, f"operation {n}: nothing is left"
        checkpoint.remove_leftovers(run)
        assert names(run) in (
            [],
            ["step_000010"],
            ["step_000020"],
            ["step_000010", "step_000020"],
        ), f"operation {n}: not clean"
        after = checkpoint.latest(run)
        assert (
            after and json.loads((after / "state.json").read_text()) == state
            if found
            else after is None
        )
        seen.append(state["which"] if found else None)
        if code == 0:
            break
    assert code == 0 and len(seen) > 30, "the shim did not see the operations of a save"
    assert seen == sorted(seen, key=[None, "old", "new"].index)  # one instant separates the two
    assert (
        seen[0] != "new"
        and seen[-1] == "new"
        and [p.name for p in run.iterdir()] == [f"step_{new_step:06d}"]
    )
    shutil.rmtree(run)
    shutil.copytree(seed, run)
    child(lambda: killed(len(seen) // 2))  # and a run goes on after its kill
    checkpoint.remove_leftovers(run)
    assert (
        loaded(save())[1] == new
        and "removed what an interrupted save left" in capsys.readouterr().err
    )


def test_the_order_that_outlives_a_power_cut(tmp_path, monkeypatch):
    """Every file, then the manifest, then the folders are synced, then renamed; the old one goes
    only once the rename is on the disk."""
    model, optimizer = make()
    run, events = tmp_path / "run", []

    def fsync(fd):
        at = os.fstat(fd).st_ino
        events.append(next(p for p in [tmp_path, *tmp_path.rglob("*")] if p.stat().st_ino == at))

    def rename(a, b, really=os.rename):
        really(a, b)
        events.append((Path(a).name, Path(b).name))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    checkpoint.save(run, 1, model, optimizer, {})
    assert events[0] == tmp_path  # the new run folder itself
    events.clear()
    final = checkpoint.save(run, 2, model, optimizer, {}, keep=1)
    tmp = run / f".tmp-step_000002-{os.getpid()}"
    files = {tmp / p.relative_to(final) for p in final.rglob("*") if p.is_file()}
    n = len(files)
    assert set(events[:n]) == files and events[n - 1] == tmp / "MANIFEST.json"
    assert events[n:] == [
        tmp / "resume",
        tmp,
        (tmp.name, final.name),
        run,
        ("step_000001", f".trash-step_000001-{os.getpid()}"),
    ]


def no_file_beyond(n, deadly):
    """From here on, the kernel lets no file of this process grow beyond n bytes: an error, or death
    in the middle of the write."""
    sys.stderr = open(os.devnull, "w")  # what collects our log lines is a file too
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))


def limits(folder):
    sizes = sorted({p.stat().st_size for p in folder.rglob("*") if p.is_file()})
    return sorted(
        {0, 1, *sizes, *(s - 1 for s in sizes), *range(0, sizes[-1], max(sizes[-1] // 8, 1))}
    ), sizes[-1]


@pytest.mark.parametrize("deadly", [False, True], ids=["disk full", "killed"])
def test_writing_stops_at_any_byte(tmp_path, deadly):
    """For many n: an error as on a full disk, or a kill in the middle of a write, safetensors' own
    included."""
    run = tmp_path / "run"
    model, optimizer = make()
    train(model, optimizer, 1)
    old = checkpoint.save(run, 1, model, optimizer, {})
    checkpoint.save(tmp_path / "whole", 2, model, optimizer, {})
    steps, most = limits(tmp_path / "whole")

    def save(n):
        no_file_beyond(n, deadly)
        try:
            checkpoint.save(run, 2, model, optimizer, {}, keep=1)
        except NotSaved as e:
            assert (
                "not saved" in str(e)
                and "bytes" in str(e)
                and "\n" not in str(e)
                and e.exit_code == 8
            ), str(e)
            os._exit(9)

    for n in steps:
        code = child(lambda n=n: save(n))
        if n >= most:
            break
        assert code == (-signal.SIGXFSZ if deadly else 9), f"limit {n}: exit code {code}"
        if not deadly:
            assert list(run.iterdir()) == [old], f"limit {n}: something was left"
        assert checkpoint.latest(run) == old
    assert code == 0 and checkpoint.latest(run).name == "step_000002"


@pytest.mark.parametrize("where", ["before", "in safetensors", "in the manifest", "in the rename"])
def test_disk_full_is_one_line_and_nothing_lost(tmp_path, monkeypatch, where):
    model, optimizer = make()
    train(model, optimizer, 1)
    old = checkpoint.save(tmp_path, 1, model, optimizer, {})
    full = OSError(errno.ENOSPC, "No space left on device", "/some/file")

    def raises(*args, error=full, **kw):
        raise error

    if where == "before":
        monkeypatch.setattr(
            shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1234)
        )
        monkeypatch.setattr(
            checkpoint,
            "save_model",
            functools.partial(raises, error=AssertionError("it was tried all the same")),
        )
    elif where == "in safetensors":
        lib = checkpoint.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
        monkeypatch.setattr(checkpoint, "save_file", functools.partial(raises, error=lib))
    elif where == "in the manifest":
        write = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda p, *a, **kw: (raises if p.name == "MANIFEST.json" else write)(p, *a, **kw),
        )
    else:
        monkeypatch.setattr(Path, "rename", raises)
    with pytest.raises(
        OSError,
        match="step_000002: not saved .*No space left on device.*takes about [0-9]+ bytes, [0-9]+ were free",  # noqa: E501
    ) as e:
        checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1)
    assert (
        "\n" not in str(e.value)
        and list(tmp_path.iterdir()) == [old]
        and checkpoint.latest(tmp_path) == old
    )
    if where == "before":
        assert "1234 were free" in str(e.value)


def test_bytes_needed_is_about_what_is_taken(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {})
    taken = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert taken <= checkpoint.bytes_needed(model, optimizer) <= taken + 150_000


# --------------------------------------------------------------------------------------------------
# damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run folder with two checkpoints, 1 and 2; tests copy it."""
    run = tmp_path_factory.mktemp("two") / "run"
    model, optimizer = make()
    train(model, optimizer, 1)
    checkpoint.save(run, 1, model, optimizer, {"which": 1})
    train(model, optimizer, 1)
    checkpoint.save(run, 2, model, optimizer, {"which": 2})
    return run


FILES = [
    "model.safetensors",
    "config.json",
    "state.json",
    "resume/optim.safetensors",
    "resume/rng.safetensors",
    "MANIFEST.json",
]
DAMAGE = {
    "zeroed tail": lambda b: b[: len(b) // 2] + b"\0" * (len(b) - len(b) // 2),
    "flipped bit": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "truncated": lambda b: b[:-1],
    "one byte more": lambda b: b + b"x",
    "empty": lambda b: b"",
    "missing": None,
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_falls_back_to_the_checkpoint_before(tmp_path, capsys, two, name, how):
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "step_000002" / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert checkpoint.latest(run) == run / "step_000001"
    lines = capsys.readouterr().err.splitlines()
    # a flipped bit there accuses the file whose entry it hit
    if name == "MANIFEST.json":
        name = "step_000002"
    assert len(lines) == 1 and "skipped" in lines[0] and name in lines[0]
    with pytest.raises(CheckpointError, match=name) as e:
        loaded(run / "step_000002")
    assert "\n" not in str(e.value)
    assert loaded(run / "step_000001")[0]["which"] == 1


def test_no_bit_of_any_file_can_flip_unnoticed(tmp_path, two):
    """Either it is noticed, or (spaces in the manifest) what loads is the same. All of the small
    files, a stride through the large."""
    run = shutil.copytree(two, tmp_path / "run")
    folder, good = run / "step_000002", loaded(two / "step_000002")
    accepted = 0
    for name in FILES:
        data = bytearray((folder / name).read_bytes())
        for at in range(0, 8 * len(data), 13 if len(data) < 3000 else 8 * len(data) // 40):
            data[at // 8] ^= 1 << at % 8
            (folder / name).write_bytes(data)
            if not checkpoint.damage(folder):
                accepted += 1
                assert name == "MANIFEST.json" and loaded(folder) == good, f"{name}, bit {at}"
            data[at // 8] ^= 1 << at % 8
        (folder / name).write_bytes(data)
    assert not checkpoint.damage(folder) and accepted < 20


def test_sizes_alone_are_a_quicker_and_weaker_look(tmp_path, two):
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "step_000002/model.safetensors"
    data = path.read_bytes()
    path.write_bytes(DAMAGE["flipped bit"](data))
    assert (
        checkpoint.latest(run, verify=False).name == "step_000002"
        and checkpoint.latest(run).name == "step_000001"
    )
    path.write_bytes(data[:-1])
    assert checkpoint.latest(run, verify=False).name == "step_000001"


def test_none_at_all_is_none_and_none_whole_is_an_error(tmp_path, two):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    (tmp_path / "step_000003").write_text("a file is not a checkpoint")
    (tmp_path / "step_12").mkdir()
    assert checkpoint.latest(tmp_path) is None
    run = shutil.copytree(two, tmp_path / "run")
    for step in run.iterdir():
        (step / "MANIFEST.json").unlink()
    with pytest.raises(
        CheckpointError, match="none of 2 checkpoints is whole .*step_000002.*no such file.*restore"
    ) as e:
        checkpoint.latest(run)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update(
            {"../step_000001/model.safetensors": {"bytes": 1, "sha256": "0"}}
        ),
        lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": "0"}}),
        lambda m: m["files"].update({"a": []}),
        lambda m: m["files"].update({"a": {"bytes": 1}}),
        lambda m: m.update(files=[]),
        lambda m: m.pop("files"),
        lambda m: m.update(format="x"),
        lambda m: m["files"].clear(),
        lambda m: m["files"].pop("resume/optim.safetensors"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, two, change):
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "step_000002/MANIFEST.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert (
        "MANIFEST.json" in checkpoint.damage(run / "step_000002")
        and checkpoint.latest(run).name == "step_000001"
    )


# --------------------------------------------------------------------------------------------------
# retention, replacement, leftovers


def names(run):
    return sorted(p.name for p in run.iterdir())


def test_retention_keeps_the_newest_and_touches_nothing_else(tmp_path):
    model, optimizer = make()
    save = functools.partial(checkpoint.save, tmp_path, model=model, optimizer=optimizer, state={})
    for other in ("step_000001x", "step_1", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_000000").mkdir()  # our name, but no manifest of ours
    (tmp_path / "step_000000/thesis.tex").write_text("x")
    foreign = names(tmp_path)
    for step in (1, 2, 3):
        save(step=step)
    assert names(tmp_path) == sorted([*foreign, "step_000002", "step_000003"])
    for step in (4, 5):
        save(step=step, keep=0)
    assert names(tmp_path) == sorted([*foreign, *(f"step_{s:06d}" for s in (2, 3, 4, 5))])
    # not whole: does not count, and is not ours to judge
    (tmp_path / "step_000005/state.json").unlink()
    save(step=6, keep=2)
    assert names(tmp_path) == sorted([*foreign, *(f"step_{s:06d}" for s in (4, 5, 6))])
    save(step=5, keep=1)  # a run set back: what lies after it stays, what it wrote stays
    assert [n for n in names(tmp_path) if n not in foreign and ".bad-" not in n] == [
        "step_000005",
        "step_000006",
    ]
    save(step=1_000_000, keep=1)
    assert checkpoint.latest(tmp_path).name == "step_1000000"


def test_a_failed_deletion_is_a_line_and_no_failed_save(tmp_path, monkeypatch, capsys):
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, model, optimizer, {})

    def stuck(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", stuck)
    assert checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1) == checkpoint.latest(tmp_path)
    assert "could not be removed (Permission denied)" in capsys.readouterr().err


def test_a_step_is_replaced_and_a_damaged_one_set_aside(tmp_path, capsys):
    model, optimizer = make()
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {"try": 1})
    assert checkpoint.save(tmp_path, 1, model, optimizer, {"try": 2}) == folder
    assert loaded(folder)[0]["try"] == 2 and names(tmp_path) == ["step_000001"]
    (folder / "model.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 1, model, optimizer, {"try": 3})
    kept = [n for n in names(tmp_path) if n != "step_000001"]
    assert (
        loaded(folder)[0]["try"] == 3 and len(kept) == 1 and kept[0].startswith("step_000001.bad-")
    )
    assert f"kept as {kept[0]}" in capsys.readouterr().err and checkpoint.latest(tmp_path) == folder


def test_leftovers_go_and_the_rest_stays(tmp_path, capsys, two):
    run = shutil.copytree(two, tmp_path / "run")
    for gone in (".tmp-step_000003-41", ".trash-step_000001-41"):
        (run / gone / "resume").mkdir(parents=True)
        (run / gone / "resume/.tmpXyZaBc").write_bytes(b"\0" * 100)
    (run / ".tmp-metrics.jsonl").write_text("")
    for stays in ("metrics.jsonl", "LOCK", ".tmp-mine", "step_000009.bad-1"):
        (run / stays).write_text("")
    checkpoint.remove_leftovers(run)
    assert names(run) == sorted(
        ["metrics.jsonl", "LOCK", ".tmp-mine", "step_000001", "step_000002", "step_000009.bad-1"]
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert all(
        n in line for n in (".tmp-step_000003-41", ".trash-step_000001-41", ".tmp-metrics.jsonl")
    )
    checkpoint.remove_leftovers(run)
    checkpoint.remove_leftovers(tmp_path / "nowhere")
    assert capsys.readouterr().err == ""


def test_killed_between_the_two_renames_of_a_replacement(tmp_path, two):
    run = shutil.copytree(two, tmp_path / "run")
    (run / "step_000002").rename(run / "step_000002.old")
    assert checkpoint.latest(run).name == "step_000002.old"
    checkpoint.remove_leftovers(run)
    assert checkpoint.latest(run).name == "step_000002"
    shutil.copytree(run / "step_000002", run / "step_000002.old")
    # the new one is damaged: the old one is not for deletion
    (run / "step_000002/state.json").write_text("{}")
    checkpoint.remove_leftovers(run)
    assert checkpoint.latest(run).name == "step_000002.old"


# --------------------------------------------------------------------------------------------------
# lock, rewind, compare


def test_a_second_process_is_told_who_holds_the_run(tmp_path, capsys):
    def second():
        try:
            with checkpoint.lock(tmp_path / "run"):
                os._exit(4)
        except RunLocked as e:
            ok = (
                isinstance(e, OSError)
                and f"in use by pid {os.getppid()} on " in str(e)
                and "\n" not in str(e)
            )
            os._exit(5 if ok else 6)

    with checkpoint.lock(tmp_path / "run"):
        assert child(second) == 5
    # set free, and the child that then ends without a goodbye frees it too
    assert child(second) == 4
    with checkpoint.lock(tmp_path / "run"):
        pass
    assert "taken over from pid" in capsys.readouterr().err
    with pytest.raises(RuntimeError), checkpoint.lock(tmp_path / "run"):
        raise RuntimeError
    with checkpoint.lock(tmp_path / "run"):
        pass
    assert capsys.readouterr().err == ""


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def none(f, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", none)
    with checkpoint.lock(tmp_path):
        pass
    assert "cannot lock (No locks available)" in capsys.readouterr().err


ROWS = [
    b'{"step": 1, "reward": 0.5}\n',
    b'{"step": 2, "reward": NaN}\n',
    b'{"step": 2, "reward": "\xc3\xa9"}\n',
    b'{"step": 3}\n',
]


@pytest.mark.parametrize(
    "before, step, after, bak",
    [
        (b"".join(ROWS), 2, b"".join(ROWS[:3]), ROWS[3]),
        (b"".join(ROWS), 3, b"".join(ROWS), None),
        (b"".join(ROWS), 0, b"", b"".join(ROWS)),
        # torn last row
        (b"".join(ROWS)[:-3], 3, b"".join(ROWS[:3]), b'{"step": \n'),
        # whole, only its newline is missing
        (b"".join(ROWS)[:-1], 3, b"".join(ROWS), None),
        # zeros of a power cut
        (ROWS[0] + b"\0" * 50, 3, ROWS[0], b"\0" * 50 + b"\n"),
        (
            ROWS[3] + ROWS[0] + b"[1]\n" + b'{"reward": 1}\n',
            2,
            ROWS[0],
            ROWS[3] + b"[1]\n" + b'{"reward": 1}\n',
        ),
        (b"", 3, b"", None),
    ],
)
def test_rewind(tmp_path, before, step, after, bak):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    removed = checkpoint.rewind(path, step)
    saved = tmp_path / "metrics.jsonl.bak"
    assert path.read_bytes() == after and removed == (bak or b"").count(b"\n")
    assert (saved.read_bytes() if saved.exists() else None) == bak
    assert checkpoint.rewind(path, step) == 0 and path.read_bytes() == after  # twice is once
    assert set(names(tmp_path)) <= {"metrics.jsonl", "metrics.jsonl.bak"}


def test_rewind_twice_appends_to_the_backup_and_a_missing_file_is_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert checkpoint.rewind(path, 1) == 0 and not path.exists()
    for _ in range(2):
        path.write_bytes(b"".join(ROWS))
        assert checkpoint.rewind(path, 2) == 1
    assert (tmp_path / "metrics.jsonl.bak").read_bytes() == ROWS[3] * 2


@pytest.mark.parametrize("how", ["kill", "power cut", "in a write"])
def test_rewind_killed_anywhere_loses_no_row(tmp_path, how):
    path = tmp_path / "metrics.jsonl"

    def killed(n):
        if how == "in a write":
            no_file_beyond(10 * n, deadly=True)
        else:
            die_at(n, tmp_path, how == "power cut")
        checkpoint.rewind(path, 2)

    for n in range(1, 100):
        for p in tmp_path.iterdir():
            p.unlink()
        path.write_bytes(b"".join(ROWS))
        code = child(lambda n=n: killed(n))
        assert path.read_bytes() in (b"".join(ROWS), b"".join(ROWS[:3]))
        checkpoint.rewind(path, 2)
        assert path.read_bytes() == b"".join(ROWS[:3])
        assert ROWS[3] in (tmp_path / "metrics.jsonl.bak").read_bytes().splitlines(keepends=True)
        if code == 0:
            break
    assert code == 0 and n > 5


class Short:
    """A raw file on a disk with room for so many bytes: a kernel writes what fits, says how much,
    and then refuses."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self.file.write(data[: self.room])
        self.room -= done
        return done


def test_a_log_loses_no_row_to_a_disk_that_is_full_for_a_while(tmp_path, capsys):
    rows = [{"step": i, "text": "é" * i} for i in range(6)]
    sizes = [len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows]
    for room in range(sum(sizes)):
        path = tmp_path / f"{room}.jsonl"
        with checkpoint.Log(path) as log:
            log.file = Short(log.file, room)
            for i, row in enumerate(rows):
                if i == 4:
                    log.file.room = 10**6
                log.write([row])
        assert read_rows(path) == (rows, 0)
        assert capsys.readouterr().err.count("No space left on device") == (room < sum(sizes[:4]))


def test_a_log_on_a_disk_that_stays_full_says_what_is_lost(tmp_path, capsys):
    with checkpoint.Log(tmp_path / "log") as log:
        log.file = Short(log.file, 25)
        log.write([{"step": 1, "a": 1}, {"step": 2, "a": 1}, {"step": 3, "a": 1}])
    assert read_rows(tmp_path / "log") == ([{"step": 1, "a": 1}], 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "its last 2 rows are lost" in said[1]
    # begins on a line of its own
    with checkpoint.Log(tmp_path / "log") as log:
        log.write([{"step": 4}])
    assert read_rows(tmp_path / "log") == ([{"step": 1, "a": 1}, {"step": 4}], 1)


@pytest.mark.parametrize(
    "content, steps, skipped",
    [
        (b"", [], 0),
        (b'{"step": 1}\n{"step": 2}', [1, 2], 0),
        (b'\n{"step": 1}\n\n \n', [1], 0),
        (b'{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n', [1, 3], 1),
        (b'{"step": 1}\n' + b"\0" * 99, [1], 1),
        (b'[1]\n3\n"a"\nnull\n{"step": 4}\n', [4], 4),
        (b'\xff\xfe\n{"step": "\xc3\xa9"}\n', ["é"], 1),
        (b"[" * 99_999 + b'\n{"step": ' + b"9" * 5000 + b'}\n{"step": 5}\n', [5], 2),
        (b'\xef\xbb\xbf{"step": 1}\n', [1], 0),
    ],
)
def test_rows_are_read_and_the_rest_is_counted(tmp_path, content, steps, skipped):
    (tmp_path / "log").write_bytes(content)
    rows, left_out = read_rows(tmp_path / "log")
    assert [r["step"] for r in rows] == steps and left_out == skipped
    assert list(each_row(tmp_path / "none")) == []


def test_checkpoints_make_a_run(tmp_path, two):
    run = shutil.copytree(two, tmp_path / "run")
    assert checkpoint.has_checkpoints(run)
    for step in list(run.iterdir()):
        shutil.rmtree(step)
    (run / "step_000003.bad-1").mkdir()
    (run / "samples.jsonl").write_text("")
    assert not checkpoint.has_checkpoints(run)
    assert not checkpoint.has_checkpoints(tmp_path / "nowhere")


def test_compare_names_what_changed():
    saved = json.loads(json.dumps({"lr": 1e-6, "layers": (6, 26), "name": "a", "clip": None}))
    now = {"lr": 2e-6, "layers": (6, 26), "name": "b", "new": True}
    assert checkpoint.changed_settings(saved, now, ["lr", "layers", "clip", "new"]) == [
        "lr: 1e-06 -> 2e-06",
        "new: null -> true",
    ]  # what is missing is as None
    assert (
        checkpoint.changed_settings(saved, saved, saved) == []
        and checkpoint.changed_settings({}, {}, ["lr"]) == []
    )


def test_every_parameter_is_in_the_saved_names():
    """load() writes parameters through this table: a parameter it forgot would keep its initial
    value, silently."""
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        model, _ = make(family, tied=False)
        rows = {}
        for ours, row, n in hf_tensors(model.config).values():
            assert row == rows.get(ours, 0)
            rows[ours] = row + n
        assert rows == {n: p.shape[0] for n, p in model.named_parameters()} and not list(
            model.buffers()
        )


# last: transformers is large, and every fork above would carry it along
def test_a_step_folder_is_a_hugging_face_folder(tmp_path):
    """The oracle: stock transformers loads it and gives our logits; model.load does too; tokenizer
    files come along byte for byte."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (base / "notes.txt").write_text("not a tokenizer file")
    for tied in (True, False):
        model, optimizer = make(tied=tied)
        train(model, optimizer, 2)
        folder = checkpoint.save(
            tmp_path / f"run {tied}", 2, model, optimizer, {}, tokenizer_from=base
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            ours = model.unembed(model(IDS))
            torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-5, atol=1e-5)
            assert torch.equal(hub.load_model(folder)(IDS), model(IDS))
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        # servers load every *.safetensors of the folder itself: the moments must not be among them
        assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
        assert not [
            p
            for p in folder.rglob("*")
            if p.suffix in (".pt", ".pth", ".bin", ".pkl") or p.name == "notes.txt"
        ]
