"""Training checkpoints that survive being killed at any moment, and that never load damaged.

    run/LOCK                           held by the one process that writes here
    run/step_000120/                   a Hugging Face folder (config.json, model.safetensors,
                                       tokenizer files), and beside it
        state.json                     the step and whatever the trainer wants back
        resume/optim.safetensors       the optimizer's moments, named "<parameter>/<moment>";
                                       further shards are optim-2, optim-3, ...
        resume/rng.safetensors         torch's CPU generator, as bytes
        MANIFEST.json                  size and SHA-256 of every file above, written last
    run/.tmp-step_000120-<pid>         a save under way, or what a killed one left
    run/.trash-step_000110-<pid>       a deletion under way, or what a killed one left

A save writes the .tmp folder, syncs it to the disk, and renames it: the rename is the commit. There
is no pointer to the latest checkpoint that could itself be damaged; `latest` looks at the folders.
Size and header are no proof of content: safetensors sizes its file before it fills it, and a power
cut leaves zeros behind a good header. So hashes decide, every time.

Pickle is never written or read. The moments sit in a folder of their own because inference servers
load every *.safetensors they find beside the weights. What is a setting (learning rate, betas, ...)
is not saved here: it comes from the resuming command, and `changed_settings` tells where that
differs from the saved one.

Needs a POSIX file system: renames are atomic, folders can be synced, files can be flock'ed.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from plumbing.hub import CheckpointError, hf_tensors, save_model
from plumbing.optimizer import place
from plumbing.rows import one_line, parse_json, read_json

FORMAT = "nanobupo checkpoint 1"
# of a run folder: rows that carry their step
LOGS = "metrics.jsonl", "samples.jsonl", "bad_batches.jsonl"
# .old: what `save` replaces, for the instant between its two renames
STEP = re.compile(r"step_(\d{6,})(\.old)?")
LEFTOVER = re.compile(r"\.(tmp|trash)-(step_\d{6,}.*|.+\.jsonl)")
# a manifest must not reach outside its folder
FILE = re.compile(r"(resume/)?\w[\w.-]{0,200}")
OPTIM, RNG = "resume/optim.safetensors", "resume/rng.safetensors"
NEEDED = {"config.json", "state.json", OPTIM, RNG}
# of moments in a file but for its last, and in memory at once beside the optimizer
SHARD_BYTES = 4 << 30
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# moments that have their parameter's shape
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "remainder")
NUMBER = (int, float, type(None))  # what else an optimizer keeps


class RunLocked(OSError):
    """Another process holds the run folder. One line that names it."""


class NotSaved(OSError):
    """A checkpoint could not be written: the disk is full, mostly. One line; the checkpoints before
    it stand."""

    exit_code = 8


def log(line):
    print(f"checkpoint: {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# files


def _sync(path):
    """Have the disk hold what `path` holds now. For a folder that is its list of names: without it
    a rename can be lost."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        # some network file systems know no fsync of a folder: then they offer no more than they do
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _make(run):
    if not run.is_dir():
        run.mkdir(parents=True, exist_ok=True)
        _sync(run.parent)  # a power cut must not take the whole run folder along


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _delete(path):
    """Remove a folder or file if it is there. A checkpoint goes out of sight first, so that one
    deleted halfway is never found. That this fails is worth a line, never a run."""
    try:
        if STEP.fullmatch(path.name) and path.exists():
            path = path.rename(path.with_name(f".trash-{path.name}-{os.getpid()}"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        log(f"{path}: could not be removed ({e.strerror or e}); remove it by hand")


# --------------------------------------------------------------------------------------------------
# what counts as a checkpoint


def _manifest(folder) -> dict:
    """{file name: (bytes, SHA-256)} of a checkpoint; CheckpointError, FileNotFoundError or
    ValueError if there is no sound one."""
    path = folder / "MANIFEST.json"
    manifest = read_json(path)
    try:
        files = {n: (e["bytes"], e["sha256"]) for n, e in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError):
        files = {}
    named_well = NEEDED <= files.keys() and all(map(FILE.fullmatch, files))
    if manifest.get("format") != FORMAT or not named_well:
        raise CheckpointError(f"{path}: not a {FORMAT!r} manifest")
    return files


def damage(folder, hashes=True) -> str:
    """What is wrong with a checkpoint folder, in one line; "" if nothing is. hashes=False looks at
    names and sizes only, and is instant."""
    folder, wrong = Path(folder), []
    try:
        files = _manifest(folder)
    except (OSError, ValueError) as e:
        return str(e)
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size or hashes and _sha256(path) != sha256:
                written = f"{size!r:.20}"
                wrong.append(f"{name} is damaged ({found} bytes, not the {written} written)")
        except OSError as e:
            wrong.append(f"{name} cannot be read ({e.strerror or e})")
    return f"{folder}: " + "; ".join(wrong[:20]) if wrong else ""


def _steps(run) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, newest first; a replacement
    before what it replaces."""
    run, found = Path(run), []
    for folder in run.iterdir() if run.exists() else ():
        match = STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), not match[2], folder))
    return [(step, folder) for step, _, folder in sorted(found, reverse=True)]


def latest(run, verify=True) -> Path | None:
    """The newest whole checkpoint of a run folder; None if it holds no step folder at all.

    verify  compare every SHA-256 (reads the checkpoint once); False compares names and sizes only
    Damaged ones are passed over with one line each. If all are damaged: CheckpointError, never a
    silent start from scratch.
    """
    bad = []
    for _, folder in _steps(run):
        why = damage(folder, verify)
        if not why:
            return folder
        log(f"skipped: {why}")
        bad.append(why)
    if bad:
        raise CheckpointError(
            f"{run}: none of {len(bad)} checkpoints is whole (newest: {bad[0]}); restore one, or "
            "move the step_ folders away to start again"
        )
    return None


# --------------------------------------------------------------------------------------------------
# save


def _moments(model, optimizer) -> dict:
    """The optimizer's state by name: {"<parameter>/<moment>": tensor or number}. What it does not
    hold is not there: AdamW has no state for a block that never had a gradient, and zeros would not
    be the same (its step count starts later)."""
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for p, moments in optimizer.state.items():
        if p not in names:
            raise ValueError("the optimizer has state of what is not a parameter of the model")
        for key, value in moments.items():
            if not isinstance(value, (torch.Tensor, *NUMBER)):
                kind = type(value).__name__
                raise ValueError(f"cannot save a {kind} as {key}: it is no tensor and no number")
            found[f"{names[p]}/{key}"] = value
    return found


def _finite(value) -> bool:
    t = torch.as_tensor(0 if value is None else value).detach()
    # NaN wins in both extremes, and unlike isfinite(t).all() they take no memory
    return not t.numel() or all(extreme.isfinite() for extreme in t.aminmax())


def bytes_needed(model, optimizer) -> int:
    """Bytes a checkpoint takes on disk now, about. Adam's moments exist only after the first step;
    then it is three times the weights."""
    values = [*model.parameters(), *_moments(model, optimizer).values()]
    # headers and the small files too
    return sum(getattr(t, "nbytes", 0) + 512 for t in values) + (1 << 16)


def _check(name, model, moments):
    """Raise for weights and moments that must not, or cannot, be saved as they are."""
    params = dict(model.named_parameters())
    if len({p.dtype for p in params.values()}) > 1:
        raise ValueError("the weights have several dtypes: a checkpoint would round some")
    for n, value in (params | moments).items():
        if not _finite(value):
            raise FloatingPointError(
                f"{name} not saved: {n} holds NaN or Inf; earlier checkpoints are untouched"
            )


def _save_moments(folder, moments, optimizer):
    shards, size, numbers = defaultdict(dict), 0, {}
    for name, value in moments.items():
        if isinstance(value, torch.Tensor):
            shards[size // SHARD_BYTES][name] = value
            size += value.nbytes
        else:
            numbers[name] = value
    about = {"optimizer": type(optimizer).__name__, "numbers": json.dumps(numbers)}
    for i, shard in enumerate(shards.values() or [{}], 1):
        path = folder / (f"optim-{i}.safetensors" if i > 1 else "optim.safetensors")
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in shard.items()}
        save_file(on_cpu, path, metadata=about)


def _write(tmp, model, optimizer, moments, state, tokenizer_from):
    """Write a whole checkpoint into a new folder, and have the disk hold it."""
    (tmp / "resume").mkdir(parents=True)
    save_model(model, tmp, tokenizer_from)
    _save_moments(tmp / "resume", moments, optimizer)
    save_file({"torch_cpu": torch.get_rng_state()}, tmp / RNG)
    (tmp / "state.json").write_text(state, encoding="utf-8")
    files = {}
    for path in sorted(tmp.rglob("*")):
        if path.is_file():
            _sync(path)
            entry = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            files[path.relative_to(tmp).as_posix()] = entry
    manifest = tmp / "MANIFEST.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    for path in (manifest, tmp / "resume", tmp):
        _sync(path)


def _commit(tmp, final):
    """Rename tmp to final. An older final steps aside under a name that `latest` knows, so that at
    every instant one of them is found."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        if why := damage(final):
            aside = final.with_name(f"{final.name}.bad-{time.time_ns()}")
            log(f"{why}; kept as {aside.name}, delete it when you like")
            final.rename(aside)
        else:
            _delete(old)
            final.rename(old)
    tmp.rename(final)
    _sync(final.parent)
    _delete(old)


def save(run, step: int, model, optimizer, state: dict, tokenizer_from=None, keep=2) -> Path:
    """Write run/step_<step>, or change nothing. Returns the folder once the disk holds it.

    state           what the trainer wants back from `restore`; must come through JSON unchanged.
                    "step" is added
    tokenizer_from  folder whose tokenizer files are copied, so that the checkpoint is a whole
                    Hugging Face model
    keep            whole checkpoints to keep, this one included; older ones are deleted once this
                    one is safe. 0 keeps all
    Checkpoints of later steps are left alone, and stay the newest: a run that is set back on
    purpose moves them away first. Raises FloatingPointError (NaN or Inf in weights or moments, the
    first is named), NotSaved (disk full, unwritable; with the bytes needed and free), ValueError (a
    state that JSON cannot hold). Every time, the checkpoints that were there before are still
    there.
    """
    run, name, state = Path(run), f"step_{step:06d}", {**state, "step": step}
    if step < 0 or keep < 0:
        raise ValueError(f"step {step}, keep {keep}: neither may be negative")
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise FileNotFoundError(f"{tokenizer_from}: no such folder to copy the tokenizer from")
    try:
        text = json.dumps(state, allow_nan=False, indent=1)
        if json.loads(text) != state:
            raise ValueError("it would come back changed: a tuple? a key that is not a string?")
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name}: the state cannot be written as JSON ({e})") from None
    moments = _moments(model, optimizer)
    _check(name, model, moments)

    final, tmp = run / name, run / f".tmp-{name}-{os.getpid()}"
    need, free = bytes_needed(model, optimizer), "unknown"
    try:
        _make(run)
        free = shutil.disk_usage(run).free
        if free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _delete(tmp)
        _write(tmp, model, optimizer, moments, text, tokenizer_from)
        _commit(tmp, final)
    except BaseException as e:  # Ctrl-C too
        _delete(tmp)
        if not isinstance(e, (OSError, SafetensorError)):
            raise
        raise NotSaved(
            f"{final}: not saved ({getattr(e, 'strerror', None) or e}): it takes about {need} "
            f"bytes, {free} were free; earlier checkpoints are untouched"
        ) from None
    prune(run, step, keep)
    return final


def prune(run, step, keep):
    """Delete whole checkpoints before that of `step`, which is safe, but for the newest keep - 1;
    keep 0 keeps all. On resume too: a kill may have come between a save and this."""
    older = [p for s, p in _steps(run) if s < step and not damage(p, hashes=False)]
    for p in older[keep - 1 :] if keep else ():
        _delete(p)


# --------------------------------------------------------------------------------------------------
# load


def _tensors(folder, names) -> dict:
    """{name: tensor} of safetensors files: windows into them, read only where they are copied."""
    found = {}
    for name in names:
        try:
            found |= load_file(folder / name)
        except (SafetensorError, OSError) as e:
            why = f"not a readable safetensors file ({one_line([str(e)]):.100})"
            raise CheckpointError(f"{folder / name}: {why}") from None
    return found


def _kind(t) -> str:
    return f"{DTYPES.get(t.dtype, t.dtype)} {list(t.shape)}"


def _misfits(saved, targets, params, optimizer) -> list[str]:
    """What keeps saved weights from going into their targets, and saved moments into the
    optimizer."""
    wrong = [f"{n} is missing" for n in targets if n not in saved]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for n, value in saved.items():
        name, slash, key = n.rpartition("/")
        p = params.get(name)
        if n in targets:
            have, want = _kind(value), _kind(targets[n])
            if have != want:
                wrong.append(f"{n} is {have}, the model's is {want}")
        elif not slash:
            wrong.append(f"{n} is not part of this model")
        elif p not in held:
            wrong.append(f"the optimizer holds no parameter for {n}")
        elif key in LIKE_PARAMETER and getattr(value, "shape", None) != p.shape:
            wrong.append(f"{n} has not the shape of its parameter, {list(p.shape)}")
    return wrong


def _is_generator_state(t) -> bool:
    """Whether torch's generator can be set to this, tried on one of our own."""
    try:
        torch.Generator().set_state(t)
    except (TypeError, RuntimeError):
        return False
    return True


def _are_numbers(numbers) -> bool:
    """Whether this is what an optimizer keeps as numbers, "<parameter>/<moment>" by name."""
    return isinstance(numbers, dict) and all(
        "/" in name and isinstance(value, NUMBER) for name, value in numbers.items()
    )


@torch.no_grad()
def restore(folder, model, optimizer, verify=True) -> dict:
    """Put a checkpoint back, bit for bit: weights, moments, torch's CPU generator. Returns the
    state given to `save`, and its "step".

    Weights are copied into the existing parameters, so whoever shares them (the sampler, the
    optimizer) sees the new values. The optimizer ends with state for exactly the parameters that
    had some when saved. Its settings (lr, betas, ...) stay its own.
    verify  compare every SHA-256 first; False if `latest` has just done so
    Raises CheckpointError, in one line with all that does not fit, before anything is touched.
    """
    folder = Path(folder)
    if why := damage(folder, verify):
        raise CheckpointError(f"cannot load: {why}")
    state = read_json(folder / "state.json")
    saved = _tensors(folder, [n for n in _manifest(folder) if n.endswith(".safetensors")])
    generator = saved.pop("torch_cpu", None)
    with safe_open(folder / OPTIM, framework="pt") as f:
        about = f.metadata() or {}
    numbers, saved_by = parse_json(about.get("numbers", "").encode()), about.get("optimizer")
    params, targets = dict(model.named_parameters()), {}
    for name, (ours, row, rows) in hf_tensors(model.config).items():
        targets[name] = params[ours][row : row + rows]

    wrong, kind = [], type(optimizer).__name__
    if saved_by != kind:
        wrong.append(f"saved from optimizer {saved_by}, this one is {kind}")
    if type(state.get("step")) is not int:
        wrong.append("state.json: no step in it")
    if not _is_generator_state(generator):
        wrong.append(f"{RNG}: no state of torch's generator")
    if _are_numbers(numbers):
        saved |= numbers
    else:
        wrong.append(f"{OPTIM}: its metadata hold no numbers of an optimizer")
    wrong += _misfits(saved, targets, params, optimizer)
    if wrong:
        lines = one_line(wrong[:20])
        raise CheckpointError(f"{folder}: {len(wrong)} things do not fit: {lines}")

    optimizer.state.clear()
    for name, value in saved.items():
        parameter, _, key = name.rpartition("/")
        if name in targets:
            targets[name].copy_(value)
            continue
        if isinstance(value, torch.Tensor):
            # a copy, for a window into the file would change with it
            value = place(optimizer, params[parameter], value.clone())
        optimizer.state[params[parameter]][key] = value
    torch.set_rng_state(generator)
    return state


# --------------------------------------------------------------------------------------------------
# the run folder


def has_checkpoints(run) -> bool:
    """Whether anything in a folder is named like a checkpoint: then it is a run, whatever logs are
    there or not."""
    return bool(_steps(run))


def remove_leftovers(run):
    """Remove what a killed save, deletion or rewind left behind, with one line. Call it while
    holding the lock."""
    run, gone = Path(run), []
    for _, folder in _steps(run):
        final = folder.with_suffix("")
        if folder == final:
            continue
        if not final.exists():  # killed between the two renames: the old one is still the one
            folder.rename(final)
            log(f"{final}: put back, the save that was to replace it did not finish")
        elif not damage(final):
            gone.append(folder)
    gone += sorted(path for path in run.glob(".*") if LEFTOVER.fullmatch(path.name))
    for path in gone:
        _delete(path)
    if gone:
        names = ", ".join(path.name for path in gone)
        log(f"{run}: removed what an interrupted save left: {names}")


def discard(run):
    """Delete every checkpoint of a run, and its logs: for starting anew, while holding the lock."""
    for _, folder in _steps(run):
        _delete(folder)
    for name in LOGS:
        for file in (name, name + ".bak"):
            _delete(Path(run) / file)


@contextmanager
def lock(run):
    """`with lock(run):` this process is the only one that writes into the run folder; a second one
    gets RunLocked, which names us.

    The lock is the kernel's (flock): it ends with the process however that dies. Across machines
    that share a network disk it is advisory at best. Raises OSError if the folder cannot be made or
    written.
    """
    run = Path(run)
    ours = not run.exists()
    try:
        _make(run)
        f = open(run / "LOCK", "a+", encoding="utf-8", errors="replace")
    except OSError as e:
        raise OSError(
            f"{run}: cannot be a run folder ({e.strerror or e}); choose another one"
        ) from None
    with f:
        f.seek(0)
        before = f.read(300).strip()
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(
                f"{run}: in use by {before or 'another process'}; wait for it, or choose another "
                "folder"
            ) from None
        except OSError as e:
            log(
                f"{run}: this file system cannot lock ({e.strerror}): one process at a time, please"
            )
        if before:
            log(f"{run}: taken over from {before}, which ended without a goodbye")
        f.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        f.write(f"pid {os.getpid()} on {socket.gethostname()} since {now}\n")
        f.flush()
        try:
            yield
        finally:
            f.truncate(0)
            # a command that was refused leaves nothing behind
            if ours and os.listdir(run) == ["LOCK"]:
                (run / "LOCK").unlink()
                run.rmdir()


def _missing_newline(f) -> bytes:
    """The newline that the end of a file lacks, if any: the torn row of a process that was killed
    must not swallow the next."""
    size = f.seek(0, os.SEEK_END)
    f.seek(max(size - 1, 0))
    return b"\n" if size and f.read(1) != b"\n" else b""


class Log:
    """A JSONL file that grows by whole rows, for as long as a run lasts.

    A disk that is full costs no row and no run: a kernel writes what there is room for and says how
    much that was, and the rest stands in memory until the next `write`, which begins with it. What
    is left at the end is lost, with a line.
    """

    def __init__(self, path):
        self.path, self.told = Path(path), False
        self.file = open(path, "a+b", buffering=0)
        self.waiting = _missing_newline(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write([])
        if self.waiting.strip():
            rows = self.waiting.count(b"\n")
            log(
                f"{self.path}: still cannot be written; its last {rows} rows are lost, the last of "
                "them may be torn"
            )
        self.file.close()

    def write(self, rows):
        """Append rows, dicts; what cannot be written now is kept for the next time, and the first
        time said in a line."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.waiting += lines.encode(errors="replace")
        try:
            while self.waiting:
                done = self.file.write(self.waiting)
                self.waiting = self.waiting[done:]
        except OSError as e:
            if not self.told:
                log(
                    f"{self.path}: cannot be written ({e.strerror or e}); training goes on, the "
                    "rows wait in memory"
                )
            self.told = True


def rewind(path, step: int) -> int:
    """Cut a JSONL file back to its rows with row["step"] <= step, so that a resumed run repeats
    none. Returns the lines removed.

    Removed lines go to the end of <file>.bak, and so do lines that are no rows (the torn last line
    of a killed run). A whole last row without its newline gets it. Killed halfway, the file is as
    before or as after. A missing file is an empty one.
    """
    path, cut = Path(path), []
    if not path.exists():
        return 0
    tmp, bak = path.with_name(f".tmp-{path.name}"), path.with_name(path.name + ".bak")
    with open(path, "rb") as rows, open(tmp, "wb") as kept:
        for line in rows:
            try:
                keep = parse_json(line)["step"] <= step
            except (KeyError, TypeError):
                keep = False  # not a row: torn by a crash, or zeros after a power cut
            whole = line.rstrip(b"\n") + b"\n"
            if keep:
                kept.write(whole)
            else:
                cut.append(whole)
    if not cut and tmp.stat().st_size == path.stat().st_size:
        tmp.unlink()
        return 0
    if cut:
        with open(bak, "a+b") as f:
            f.writelines([_missing_newline(f), *cut])
        _sync(bak)
        log(f"{path}: {len(cut)} lines after step {step} moved to {bak.name}")
    _sync(tmp)
    tmp.replace(path)
    _sync(path.parent)
    return len(cut)


def changed_settings(saved: dict, now: dict, keys) -> list[str]:
    """Settings that differ between a checkpoint and the command that resumes it, as "key: saved ->
    now" lines; [] means it may go on.

    Values are compared as JSON returns them, so (6, 26) is [6, 26]. What is missing is as None: a
    setting that there was not yet.
    """
    changed = []
    for key in keys:
        before, after = (json.dumps(d.get(key), default=str) for d in (saved, now))
        if before != after:
            changed.append(f"{key}: {before} -> {after}")
    return changed
