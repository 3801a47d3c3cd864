"""Feed damaged and hostile files to everything that reads files; each must end in a clear line or
in a correct load.

    python tests/fuzz.py                          2,000 cases
    python tests/fuzz.py --cases 10000 --seed 1   a longer look
    python tests/fuzz.py --case 1234              one again, with its traceback; its files are kept

A case takes one good file, damages it (JSON: values replaced by hostile ones, keys dropped,
renamed, repeated; bytes: flips, cuts, zeros, repeats), and reads it the way the commands do. It
passes if what is read is whole, or if the error is one that the commands turn into a line
(ValueError, OSError and the kinds of them that are raised on purpose), has no second line and names
the file. It fails on any other exception, a crash, more than 2 CPU seconds, or more than 256 MB of
memory asked for: no file here has more than 10 MB.

Cases follow from the seed and their number alone. They run in a process of their own, which is
started anew after a crash or a hang. Exit code 0: all passed; 1: some did not, each with its
number.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "tests")) if p not in sys.path]

SECONDS = 2  # of CPU, a case
HANG = 60  # of wall clock, until a case counts as hanging
MEMORY = 256 << 20  # bytes of address space above what the process has before the case


# --------------------------------------------------------------------------------------------------
# damage


class Raw:
    """A value that is put into JSON as it is written here: what json.dumps would not write."""

    def __init__(self, text):
        self.text = text


HOSTILE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**63,
    -(2**63),
    10**9,
    10**400,
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "a",
    "1",
    "null",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "..\\x",
    "model.safetensors",
    "a" * 5000 + ".safetensors",
    "\0",
    "\n",
    "a\nb",
    "\ud800",
    "\ufeff",
    "é",
    "日本",
    "F64",
    "I8",
    "{{ cycler.__init__.__globals__ }}",
    "(a+)+$",
    "a" * 100_000,
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    {"content": "a", "id": 0},
    {"rope_type": "yarn", "factor": 4},
    [0] * 100_000,
    ["x"] * 1000,
    Raw("[" * 100_000 + "]" * 100_000),
    Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 50_000 + "1" + "}" * 50_000),
    Raw("9" * 5000),
    Raw("1e999"),
    Raw("-"),
    Raw('"\\ud800"'),
    Raw('"\\u0000"'),
    Raw("NaN"),
    Raw("\ufeff1"),
    Raw('{"a": 1, "a": 2}'),
]


def damaged_json(rng, good) -> bytes:
    """A JSON document with one to three of its values made hostile; now and then damaged as bytes
    too."""
    value = copy.deepcopy(good)
    raw = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, last = value, None
        # a walk down: every key of a level is
        while isinstance(at, (dict, list)) and at and (last is None or rng.random() < 0.75):
            # as likely, however much lies below
            last = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = at[last[1]]
        if last is None:
            break
        parent, key = last
        how = rng.random()
        if how < 0.15:
            del parent[key]
        elif how < 0.25 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "é", "a\nb", "b" * 20_000, key + "s", key.upper()))] = (
                parent.pop(key)
            )
        elif how < 0.35 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent)), copy.deepcopy(rng.choice(parent)))
        elif how < 0.45:
            parent[key] = copy.deepcopy(
                rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)
            )
        elif how < 0.55 and type(at) is int:
            parent[key] = at * rng.choice((-1, 2, 1000, 10**6)) + 1
        else:
            new = rng.choice(HOSTILE)
            if isinstance(new, Raw):
                raw.append(new.text)
                new = f"RAW{len(raw) - 1}RAW"
            parent[key] = copy.deepcopy(new)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 1)))
    for i, new in enumerate(raw):
        text = text.replace(f'"RAW{i}RAW"', new)
    data = text.encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, data) if rng.random() < 0.15 else data


def damaged_bytes(rng, data: bytes) -> bytes:
    """Bytes with one to three pieces flipped, cut out, zeroed, repeated or added."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        n = len(data)
        at = min(rng.randrange(n + 1), rng.choice((n, n, 200)))  # headers are at the start
        end = min(n, at + rng.choice((1, 1, 4, 8, 50, 1000)))
        how = rng.randrange(9)
        if how == 0 and at < n:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:end]
        elif how == 2:
            del data[at:]
        elif how == 3:
            data[at:end] = bytes(end - at)
        elif how == 4:
            data[at:at] = data[at:end]
        elif how == 5:
            data[at:end] = rng.randbytes(end - at)
        elif how == 6:
            data[at:at] = rng.choice(
                (b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"]", b"\r\n", rng.randbytes(20))
            )
        elif how == 7:
            data[at:end] = b"\xff" * (end - at)
        else:
            data[:8] = rng.choice(
                (0, 1, 7, n, 2**31, 2**60, 2**63, 2**64 - 1, 100_000_001)
            ).to_bytes(8, "little")
    return bytes(data)


def damaged_safetensors(rng, data: bytes) -> bytes:
    """As bytes, or with a hostile header whose length fits, or with hostile numbers in place of
    some weights."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15:
        at = 8 + size + 4 * rng.randrange((len(data) - 8 - size) // 4)
        return (
            data[:at]
            + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", rng.randbytes(4)))
            + data[at + 4 :]
        )
    header = damaged_json(rng, json.loads(data[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


# --------------------------------------------------------------------------------------------------
# what is read, and how: make(folder) writes good files once; each target damages a copy of them and
# reads it


def make(folder):
    """Good files of every kind in `folder`."""
    import pyarrow
    import pyarrow.parquet
    import torch

    import tiny
    from model import Config, Transformer
    from plumbing import checkpoint
    from plumbing.hub import save_model

    for name, family, tied, more in (
        ("qwen3", "qwen3", True, {}),
        (
            "llama",
            "llama",
            False,
            {
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ):
        model = Transformer(
            Config(family, 300, 16, 2, 4, 2, 4, 24, tied=tied, max_len=256, **more)
        ).init_weights(0)
        save_model(model, folder / name)
        save_model(model, folder / f"{name} shards", shard_bytes=10_000)
    tokenizers(folder, tiny)
    rows = [
        {"problem": f"What is {i} + {i}? é日本", "answer": str(2 * i), "id": i, "level": 1 + i % 5}
        for i in range(20)
    ]
    rows += [
        {"problem": "Solve $x^2 = 2$.", "answer": "$\\pm\\sqrt{2}$", "id": 20, "level": 3},
        {
            "problem": "An interval?",
            "answer": "\\left(0, \\frac{1}{2}\\right]",
            "id": 21,
            "level": 4,
        },
    ]
    verl = [
        {
            "prompt": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": r["problem"]},
            ],
            "reward_model": {"ground_truth": r["answer"], "style": "rule"},
            "extra_info": {"index": r["id"]},
        }
        for r in rows
    ]
    for name, content in (("rows", rows), ("verl", verl)):
        (folder / f"{name}.json").write_text(json.dumps(content))
        for zipped in ("snappy", "none"):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(content),
                folder / f"{name} {zipped}.parquet",
                compression=zipped,
            )
    torch.manual_seed(0)
    model, optimizer = trainable()
    for step in (1, 2):
        model.unembed(model(torch.arange(12)[None])).logsumexp(-1).sum().backward()
        optimizer.step()
        checkpoint.save(
            folder / "run", step, model, optimizer, {"which": step}, tokenizer_from=folder / "bytes"
        )
    (folder / "run/metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "reward": i / 3}) + "\n" for i in range(30))
    )


def tokenizers(folder, tiny):
    """Two tokenizer folders: bytes alone, and a small BPE in the manner of Qwen, with control
    tokens."""
    from plumbing import tokenizer

    tiny.write_tokenizer(folder / "bytes")
    shutil.copytree(folder / "bytes", folder / "bpe")
    path = folder / "bpe/tokenizer.json"
    file = json.loads(path.read_text())
    model = file["model"]
    for left, right in (
        "th",
        "in",
        "er",
        "an",
        ("th", "e"),
        ("in", "g"),
        "12",
        ("Ġ", "a"),
        ("Ġ", "the"),
        ("an", "d"),
    ):
        model["vocab"][left + right] = 300 + len(model["merges"])
        model["merges"].append([left, right])
    file["added_tokens"] = [
        {"id": 400 + i, "content": t, "special": True}
        for i, t in enumerate(
            ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
        )
    ]
    file["normalizer"] = {"type": "NFC"}
    file["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": tokenizer.QWEN},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    }
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
    path.write_text(json.dumps(file))


def trainable():
    """The model and optimizer that checkpoints here are of."""
    import torch

    from model import Config, Transformer

    model = Transformer(Config("qwen3", 32, 16, 2, 4, 2, 4, 24, tied=True)).init_weights(0)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def load_model(folder):
    """Load, and compute: a shape that was let through must work."""
    import torch

    from plumbing import hub

    m = hub.load_model(folder)
    assert all(p.isfinite().all() for p in m.parameters()), "NaN or Inf was loaded"
    with torch.no_grad():
        assert (
            m.unembed(m(torch.arange(min(5, m.config.vocab_size))[None])).shape[-1]
            == m.config.vocab_size
        )


def config(rng, good, folder):
    name = rng.choice(("qwen3", "llama"))
    shutil.copytree(good / name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_bytes(
        damaged_json(rng, json.loads((good / name / "config.json").read_text()))
    )
    load_model(folder)


def weights(rng, good, folder):
    name = rng.choice(("qwen3", "llama"))
    shutil.copytree(good / name, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(
        damaged_safetensors(rng, (good / name / "model.safetensors").read_bytes())
    )
    load_model(folder)


def index(rng, good, folder):
    shutil.copytree(good / rng.choice(("qwen3 shards", "llama shards")), folder, dirs_exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(damaged_json(rng, json.loads(path.read_text())))
    if rng.random() < 0.2:
        rng.choice(sorted(folder.glob("model-*"))).unlink()
    load_model(folder)


def tokenizer_json(rng, good, folder):
    from plumbing import tokenizer

    shutil.copytree(good / rng.choice(("bytes", "bpe", "bpe", "bpe")), folder, dirs_exist_ok=True)
    path = folder / rng.choice(
        (
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        )
    )
    path.write_bytes(damaged_json(rng, json.loads(path.read_text())))
    tok = tokenizer.load_tokenizer(folder)
    for text in ("the thing and 12 é日本\n", "<|im_end|>", "a" * 2000, " " * 2000):
        ids = tok.encode(text)
        text = text.encode().translate(None, tok.missing).decode("utf-8", "replace")
        assert tok.decode(ids) == text and all(0 <= i < tok.n_vocab for i in ids), (
            "text does not come back"
        )
        assert not set(ids) & set(tok.control.values()), "text became a control token"
    assert all(0 <= i < tok.n_vocab for i in tok.chat("12?", "s") + list(tok.stop_ids))


def rows(rng, good, folder):
    from plumbing import data
    from tools import problems as tool
    from verify import verifiable

    kind, name = rng.choice((".json", ".jsonl", ".parquet")), rng.choice(("rows", "verl"))
    if kind == ".parquet":
        content = damaged_bytes(
            rng, (good / f"{name} {rng.choice(('snappy', 'none'))}.parquet").read_bytes()
        )
    else:
        content = damaged_json(rng, json.loads((good / f"{name}.json").read_text()))
        if kind == ".jsonl":
            content = content.replace(b"}, {", b"}\n{").strip(b"[]")
    (folder / f"set{kind}").write_bytes(content)
    problems = data.load_problems(folder / f"set{kind}", max_bad=rng.choice((0, 0.01, 1)))
    assert problems and all(
        p.question.strip() and p.answer.strip() and isinstance(p.id, str) for p in problems
    )
    assert len({p.id for p in problems}) == len(problems)
    assert all(verifiable(p.answer) in (True, False) for p in problems)
    data.fingerprint(problems)
    for p in problems:
        tool.answer_class(p.answer)


def damaged_checkpoint(rng, step):
    path = rng.choice(
        [p for p in sorted(step.rglob("*")) if p.is_file() and p.name != "MANIFEST.json"]
        + [step / "MANIFEST.json"] * 2
    )
    if path.suffix == ".json":
        path.write_bytes(damaged_json(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(damaged_safetensors(rng, path.read_bytes()))
    return path


def checkpoints(rng, good, folder):
    """Damage alone: what loads is the checkpoint as it was saved, or the one before. With a
    manifest that a liar made to fit: anything that loads, as long as nothing but a clear line or a
    load comes of it."""
    from plumbing import checkpoint

    run = shutil.copytree(good / "run", folder / "run")
    liar = rng.random() < 0.5
    for step in rng.choice((["step_000002"], ["step_000002"], ["step_000001", "step_000002"])):
        path, manifest = damaged_checkpoint(rng, run / step), run / step / "MANIFEST.json"
        if liar and path != manifest:
            name, listed = path.relative_to(run / step).as_posix(), json.loads(manifest.read_text())
            listed["files"][name] = {
                "bytes": path.stat().st_size,
                "sha256": checkpoint._sha256(path),
            }
            manifest.write_text(json.dumps(listed))
    metrics = run / "metrics.jsonl"
    if rng.random() < 0.3:
        metrics.write_bytes(damaged_bytes(rng, metrics.read_bytes()))
    checkpoint.remove_leftovers(run)
    newest = checkpoint.latest(run)
    model, optimizer = trainable()
    state = checkpoint.restore(newest, model, optimizer, verify=False)
    checkpoint.rewind(metrics, 10)
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        assert json.loads(line)["step"] <= 10
    if not liar:
        wanted = checkpoint.restore(good / "run" / newest.name, *(reference := trainable()))
        assert state == wanted, "another state was loaded"
        assert all(
            (a == b).all()
            for a, b in zip(model.parameters(), reference[0].parameters(), strict=True)
        ), "other weights were loaded"


def logs(rng, good, folder):
    """Logs are never refused: what is no row is passed over, by all that train.py does with
    them."""
    from types import SimpleNamespace

    import train
    from plumbing import checkpoint, metrics
    from plumbing.rows import read_rows

    sample = {"step": 1, "prompt_ids": [1, 2, 3], "ids": [4, 5], "response": "é\x1b"}
    metric = {
        "step": 2,
        "eval/accuracy": 0.5,
        "eval/questions": 4,
        "time/eval": 0.1,
        "reward": 0.25,
    }
    for name, row in (("samples.jsonl", sample), ("metrics.jsonl", metric)):
        content = b"".join(
            damaged_json(rng, row) + rng.choice((b"\n", b"\n", b"")) for _ in range(5)
        )
        (folder / name).write_bytes(damaged_bytes(rng, content) if rng.random() < 0.5 else content)
    train.figures.draw = lambda folder: None  # other files' concern, and slow
    for _ in range(2):
        rows, _ = read_rows(folder / "metrics.jsonl")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.finish(SimpleNamespace(args=SimpleNamespace(out=folder), schedule="grpo"), rows)
        assert all(c == "\n" or c.isprintable() for c in said.getvalue()), (
            "a row steers the terminal"
        )
        for ids, length in metrics.responses_of_step_1(folder / "samples.jsonl", 6):
            assert 0 < length < len(ids) and set(ids) <= set(range(6))
        for name in ("samples.jsonl", "metrics.jsonl"):
            checkpoint.rewind(folder / name, 2)
    rows, skipped = read_rows(folder / "metrics.jsonl")
    assert not skipped and all(row["step"] <= 2 for row in rows)


TARGETS = {
    "config": config,
    "weights": weights,
    "index": index,
    "tokenizer": tokenizer_json,
    "rows": rows,
    "checkpoints": checkpoints,
    "logs": logs,
}


# --------------------------------------------------------------------------------------------------
# one case, and many


def clear(error, folder) -> str:
    """What is wrong with an error as a message to a person; "" if nothing is."""
    from plumbing.checkpoint import CheckpointError
    from plumbing.data import DataError

    if type(error) not in (ValueError, DataError, CheckpointError) and not isinstance(
        error, OSError
    ):
        return f"{type(error).__name__} is no error that is raised on purpose"
    text = str(error)
    if "\n" in text or "\r" in text:
        return "the message has more than one line"
    if len(text) > 5000:
        return f"the message has {len(text):,} characters"
    if str(folder) not in text and "config.json" not in text:
        return "the message names no file"
    return ""


def case(number, seed, good, folder) -> tuple[str, str]:
    """(target, what came of it): "loads", "refused", or "FAILED" and why."""
    rng = random.Random(f"{seed} {number}")
    name = list(TARGETS)[number % len(TARGETS)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began, outcome = time.process_time(), "loads"
    try:
        TARGETS[name](rng, good, folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the tokenizer library's panics are no Exceptions
        where = traceback.extract_tb(e.__traceback__)[-1]
        why = clear(e, folder)
        outcome = (
            f"FAILED: {why}: {type(e).__name__}: {str(e)[:200]!r} "
            f"({Path(where.filename).name}:{where.lineno})"
            if why
            else "refused"
        )
        if DEBUG:
            traceback.print_exc()
    spent = time.process_time() - began
    return name, outcome if spent < SECONDS or outcome.startswith(
        "FAILED"
    ) else f"FAILED: {spent:.1f} s of CPU"


DEBUG = False


def worker(first, last, seed, home):
    """Run cases first..last-1 and print, before each, its number, and after it what came of it."""
    import torch

    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = open("/dev/null", "w")
    good, mine = home / "good", home / "case"
    if not good.exists():
        make(home / "making")
        (home / "making").rename(good)
    # what is imported or started once is no case's fault
    for number in range(len(TARGETS)):
        case(number, "warm", good, mine)
    for number in range(first, last):
        print(f"case {number}", flush=True)
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        print("done", *case(number, seed, good, mine), flush=True)


def run(cases, seed, home, say=None) -> tuple[Counter, list[str]]:
    """Run cases 0..cases-1 in a process of their own. Returns {(target, outcome): cases} and a line
    for each failure."""
    import selectors

    outcomes, failures, number = Counter(), [], -1
    while number + 1 < cases:
        command = [
            sys.executable,
            __file__,
            "--worker",
            str(number + 1),
            str(cases),
            "--seed",
            str(seed),
            "--home",
            str(home),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
        with child, selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            started = number
            while ready.select(HANG):
                word, _, rest = child.stdout.readline().rstrip("\n").partition(" ")
                if not word:
                    break
                if word == "case":
                    number = int(rest)
                else:
                    target, _, outcome = rest.partition(" ")
                    outcomes[target, outcome.partition(":")[0]] += 1
                    if outcome.startswith("FAILED"):
                        failures.append(f"case {number} ({target}): {outcome}")
                    if say and number % 1000 == 999:
                        say(f"{number + 1} cases, {len(failures)} failed")
                    if number + 1 == cases:
                        break
            else:
                child.kill()
            code = child.wait()
        if code and number > started:
            failures.append(
                f"case {number} ({list(TARGETS)[number % len(TARGETS)]}): FAILED: the process "
                + (f"was silent for {HANG} s" if code == -9 else f"ended with {code}")
            )
        elif code:
            raise RuntimeError(f"the worker cannot start: exit code {code}")
    return outcomes, failures


def main():
    global DEBUG
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", type=int, default=2000, metavar="N")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--case", type=int, metavar="I", help="run this one alone, in this process")
    p.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        return worker(*args.worker, args.seed, args.home)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if args.case is not None:
        make(home / "good")
        DEBUG = True
        return print(
            *case(args.case, args.seed, home / "good", home / "case"),
            f"\nits files: {home / 'case'}",
        )
    began = time.time()
    outcomes, failures = run(args.cases, args.seed, home, lambda line: print(line, flush=True))
    shutil.rmtree(home)
    print(*failures, sep="\n")
    for target in TARGETS:
        print(
            f"{target:12}",
            "  ".join(f"{o} {n}" for (t, o), n in sorted(outcomes.items()) if t == target),
        )
    print(
        f"{args.cases} cases in {time.time() - began:.0f} s: {args.cases - len(failures)} passed, "
        f"{len(failures)} failed"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
