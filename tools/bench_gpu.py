"""`python -m tools.bench gpu`: what to run first on a GPU, what teaches most first, in ten minutes.

Right or wrong comes before fast or slow: kernels against float32, then whether an update sees the
weights that the one before it made, and whether a gradient depends on how its batch is cut. After
that speed, part by part, each beside what the card itself gives in the same run.

Every part runs in a process of its own, so that one that fails, hangs or breaks the device costs
only itself. It prints one JSON line and appends it to results/gpu.jsonl, with the card, torch's
version and the commit. Inside a part every measurement stands alone too: an error takes its place.
With `--device cpu` every part runs on tiny shapes in this process, to try the lines themselves.
"""

import copy
import gc
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import tiny
import train
from grpo import Policy, backward
from model import Config, Transformer
from plumbing import kernels, settings
from plumbing.cli import natural
from plumbing.hub import save_model
from plumbing.metrics import forward_flops, peak_gb
from plumbing.optimizer import SplitAdamW
from plumbing.rows import one_line
from plumbing.shapes import preset_config
from rollout import Sampler
from tools import bench

ROOT = Path(__file__).resolve().parents[1]
BF16, F32 = torch.bfloat16, torch.float32
TINY = Config("qwen3", 300, 64, 2, 4, 2, 16, 96, tied=True)
N_VOCAB = 151669  # ids that Qwen3's tokenizer uses, of the 151,936 rows of its embedding


# --------------------------------------------------------------------------------------------------
# what the parts share: models, responses, clocks


def smallest(device):
    """The smallest preset."""
    return TINY if device.type == "cpu" else preset_config("qwen3-0.6b")


def shapes(device):
    """The shapes to measure: the smallest, and that of the headline run."""
    if device.type == "cpu":
        return {"tiny": TINY}
    return {"qwen3-0.6b": smallest(device), "qwen3-4b": preset_config("qwen3-4b")}


def trainable(config, device, seed=0):
    """A model as it is trained on a GPU: bfloat16 weights, gradients that add up in float32."""
    model = bench.empty(config, BF16, device).init_weights(seed, std=0.8 * config.d_model**-0.5)
    for p in model.parameters():
        p.grad_dtype = F32
    return model


def responses(config, lengths, seed=0):
    """Responses of these lengths, an eighth of each its prompt, good and bad ones."""
    g = random.Random(seed)
    rows = []
    for ids in bench.random_prompts(config, lengths, seed):
        rows.append(bench.random_response(ids, max(1, len(ids) // 8), g))
    return rows


def gradient(model, rows, micro_tokens):
    """The gradient of one mini-batch at the model's own policy, accumulated into .grad."""
    used = min(N_VOCAB, model.config.vocab_size)
    backward(Policy(model, n_vocab=used), rows, micro_tokens)


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors])


def repeat(f, times):
    for _ in range(times):
        f()


def milliseconds(device, f, times=20):
    """Mean of some calls enqueued together, after one that warms up."""
    f()
    if device.type == "cpu":
        times = 1
    return 1e3 * bench.timed(device, partial(repeat, f, times)) / times


def recorded_milliseconds(device, f, times=20):
    """The same from a CUDA graph, for kernels shorter than the host takes to launch one."""
    if device.type == "cpu":
        return milliseconds(device, f)
    graph = kernels.cuda_graph(partial(repeat, f, times))
    return milliseconds(device, graph.replay, 3) / times


def command(argv, seconds):
    """A command's exit code, where it is not 0, and the end of what it printed."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired as e:
        return {"error": f"not done after {seconds:.0f} s", "tail": str(e.stdout or "")[-2000:]}
    out = {"tail": (done.stdout + done.stderr)[-3000:]}
    if done.returncode:
        out["error"] = f"exit code {done.returncode}"
    return out


# --------------------------------------------------------------------------------------------------
# right or wrong


def tests(device, seconds):
    """Kernels, recorded steps, sampler against trainer: tests/test_gpu.py without what compiles."""
    chosen = ["-k", "not True and not default_run"]
    if device.type == "cpu":
        chosen = ["--version"]
    argv = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    argv += ["tests/test_gpu.py", *chosen]
    yield "pytest", lambda: command(argv, seconds - 1)


def weights(device, seconds):
    """Does every update of a step see the weights that the one before it made?"""
    yield "several_updates", partial(several_updates, device)


def several_updates(device):
    """Four updates in one step against the same four, each gradient by a new copy of the model.

    The difference as a share of the way the weights went: 0 but for the order of atomic additions.
    Weights cached over a step show as 0.3 of the blocks' way at this learning rate.
    """
    _, together = four_updates(device, copies=False)
    before, one_by_one = four_updates(device, copies=True)
    apart = together - one_by_one
    way = one_by_one - before
    return {"apart_over_way": (apart.norm() / way.norm()).item()}


def four_updates(device, copies):
    """The blocks' weights before and after a step of four updates, as train.py makes it."""
    config = Config("qwen3", 512, 128, 4, 4, 2, 32, 256, tied=True)
    run = trainer(config, device)
    before = flat(run.model.blocks.parameters())
    rows = responses(config, [40] * 16)
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    minis = train.mini_batches(groups, run.args)
    policy = run.policy(config.n_layers)
    for response, logprobs, _ in train.all_logprobs(
        run, policy, minis
    ):  # those before the first update
        response.old_logprobs[config.n_layers] = logprobs
    for mini in minis:
        if copies:
            policy = run.policy(config.n_layers, copy.deepcopy(run.model))
        both = list(zip(run.model.parameters(), policy.model.parameters(), strict=True))
        for p, q in both:
            q.grad_dtype = p.grad_dtype
        train.gradient(run, policy, mini)
        for p, q in both:
            p.grad = q.grad
        train.optimizer_step(run, mini, train.clip(run))
    return before, flat(run.model.blocks.parameters())


def trainer(config, device):
    """A train.Run of a small random model, without data."""
    flags = "--model tiny --optimizer split-m32 --mini-prompts 2 --lr 1e-3".split()
    args = train.parse([*flags, "--device", device.type])
    settings.settle(args, config, device.type)
    model = trainable(config, device)
    tokenizer = SimpleNamespace(n_vocab=config.vocab_size)
    sampler = SimpleNamespace(model=model)
    run = train.Run(args, model, tokenizer, sampler, [], [], "")
    run.optimizer = train.make_optimizer(model, args)
    return run


def split(device, seconds):
    """Does the gradient depend on how a mini-batch is cut into micro-batches?"""
    model = trainable(smallest(device), device)
    longest = 64 if device.type == "cpu" else 512
    rows = responses(model.config, [longest - 5 * i for i in range(8)])
    gradients = []

    def apart(parts):
        model.zero_grad()
        gradient(model, rows, 8 * longest // parts)
        gradients.append(flat(p.grad for p in model.parameters()))
        whole = gradients[0]
        return ((gradients[-1] - whole).norm() / whole.norm()).item()

    for parts in (1, 2, 8):
        yield f"{parts} micro-batches", partial(apart, parts)


# --------------------------------------------------------------------------------------------------
# speed of the pieces


def head(device, seconds):
    """Products with the unembedding, ms: logits, their gradient to states, and to the weights."""
    n, D, V, used = 256, 2560, 151936, N_VOCAB
    if device.type == "cpu":
        n, D, V, used = 8, 64, 304, 299
    kinds = ("float32", F32, False), ("tf32", F32, True), ("bf16", BF16, True)
    for columns in (V, used):
        for name, dtype, fast in kinds:
            for product, f in head_products(device, n, D, columns, dtype):
                yield f"{name} {columns} {product}", partial(in_tf32, fast, device, f)


def head_products(device, n, D, columns, dtype):
    """(name, function) of each product; of bfloat16 to float32 where the device has that."""
    h = torch.randn(n, D, device=device, dtype=dtype)
    dz = torch.randn(n, columns, device=device, dtype=dtype)
    E = torch.randn(columns, D, device=device, dtype=dtype)
    dE = torch.zeros(columns, D, device=device)
    if dtype == F32 or device.type == "cpu":
        yield "logits", lambda: h @ E.t()
    else:
        yield "logits", lambda: torch.mm(h, E.t(), out_dtype=F32)
        add = partial(torch.addmm, dE, dz.t(), h, out_dtype=F32)
        yield "to weights, out_dtype", add
        yield "to weights, in place", partial(add, out=dE)
    yield "to states", lambda: dz @ E
    yield "to weights", lambda: dE.addmm_(dz.t().float(), h.float())


def in_tf32(on, device, f):
    """Milliseconds of f, its float32 products in TF32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        return milliseconds(device, f)
    finally:
        torch.set_float32_matmul_precision(before)


def attention(device, seconds):
    """Decode attention of 64 rows: GB/s of live keys and values, by lengths and by splits."""
    B, S, H, K, E = 64, 8193, 32, 8, 128
    if device.type == "cpu":
        B, S, H, K, E = 4, 33, 4, 2, 16
    if not kernels.has_flash(device, BF16, E):
        yield "kernel", lambda: "FlashAttention does not run here"
        return
    q = torch.randn(B, H, E, device=device, dtype=BF16)
    k = torch.randn(B * S, K, E, device=device, dtype=BF16)
    v = torch.randn(B * S, K, E, device=device, dtype=BF16)
    starts = torch.arange(B + 1, device=device, dtype=torch.int32)
    spread = torch.rand(B, generator=torch.Generator().manual_seed(0)) ** 2.5
    tail = torch.ones(B)
    tail[:3] = 0.85 * S
    cases = {
        "uniform": torch.full((B,), S / 8),
        "ragged": 1 + spread * (S - 2),
        "tail of 3": tail,
    }
    for name, lengths in cases.items():
        used = lengths.to(device, torch.int32)
        call = partial(kernels.flash, q, k, v, starts, starts * S, 1, S, used)
        live = 2 * int(used.sum()) * K * E * BF16.itemsize  # bytes
        yield name, partial(attention_speed, device, call, live)
        # where the caller may choose into how many parts keys are cut
        for n in (1, 2, 4, 8, 16) if kernels.public_kernel() else ():
            cut = partial(call, parts=n)
            yield f"{name}, {n} splits", partial(attention_speed, device, cut, live, same_as=call)


@torch.no_grad()
def attention_speed(device, call, live, same_as=None):
    ms = recorded_milliseconds(device, call)
    out = {"ms": ms, "GB_s": live / ms / 1e6}
    if same_as:
        out["apart"] = (call() - same_as()).abs().max().item()
    return out


def decode(device, seconds):
    """Whole decode steps at 1,024 tokens a row, as a share of the card's copy bandwidth."""
    megabytes, compiling, batches = 1024, (False, True), (64, 1, 256)
    if device.type == "cpu":
        megabytes, compiling, batches = 4, (False,), (2,)
    copy = bench.copy_speed(device, megabytes)
    yield "copy_GB_s", lambda: copy / 1e9
    for compiled in compiling:
        for batch in batches:
            for like, config in shapes(device).items():
                name = f"{like} B={batch}" + " compiled" * compiled
                yield name, partial(decode_speed, config, device, batch, compiled, copy)


def decode_speed(config, device, batch, compiled, copy):
    """One prompt, sampled `batch` times, so that the prefill costs no time of the measurement's."""
    context, steps = (16, 8) if device.type == "cpu" else (1024, 64)
    model = trainable(config, device)
    sampler = Sampler(model, batch, context + steps, compile=compiled)
    prompts = bench.random_prompts(config, [context - steps // 2], 0)
    first = bench.timed(device, lambda: sampler.generate(prompts, batch, 2))
    sampler.generate(prompts, batch, steps)
    seconds = sampler.stats["decode_seconds"] / sampler.stats["steps"]
    sampler.release()
    weights, kv = bench.step_bytes(config, BF16.itemsize)
    speed = (weights + kv * batch * context) / seconds
    return {
        "ms_step": 1e3 * seconds,
        "tok_s": batch / seconds,
        "GB_s": speed / 1e9,
        "share_of_copy": speed / copy,
        "first_call_s": first,
    }


# --------------------------------------------------------------------------------------------------
# speed of training


def update(device, seconds):
    """Forward and backward of one micro-batch as the trainer does them; MFU is the share of a
    matrix product's speed in the same run, by the operations of the model, recomputed ones not."""
    rate = bench.matmul_speed(device, BF16)
    yield "matmul_tflop_s", lambda: rate / 1e12
    for like, config in shapes(device).items():
        for compiled in (False,) if device.type == "cpu" else (False, True):
            for recompute in (False, True):
                name = like + " compiled" * compiled + " recompute" * recompute
                yield name, partial(update_speed, config, device, recompute, compiled, rate)


def update_speed(config, device, recompute, compiled, rate):
    """Eight responses of 2,048 tokens; four where the activations of all of them are kept at 4B."""
    model = trainable(config, device)
    model.recompute = recompute
    if compiled:
        kernels.compile_blocks(model)
    longest = 32 if device.type == "cpu" else 2048
    count = 4 if config.d_model > 2048 and not recompute else 8
    rows = responses(config, [longest] * count)

    def once():
        gradient(model, rows, count * longest)
        model.zero_grad()

    once()  # compiles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(bench.timed(device, once) for _ in range(3))
    speed = 3 * forward_flops(model, rows, config.n_layers) / seconds
    return {
        "tokens": count * longest,
        "ms": 1e3 * seconds,
        "tflop_s": speed / 1e12,
        "mfu": speed / rate,
        "peak_GB": peak_gb(),
    }


def optimizer(device, seconds):
    """One optimizer step of the smaller shape, its state on the device and on the host (ms)."""
    config = smallest(device)
    yield "split-m32", partial(optimizer_speed, config, device, moment_dtype=F32)
    yield "split", partial(optimizer_speed, config, device)
    yield "split offloaded", partial(optimizer_speed, config, device, offload=True)


def optimizer_speed(config, device, **settings):
    model = trainable(config, device)
    made = SplitAdamW(model.parameters(), **settings)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    step = milliseconds(device, made.step, 5)
    return {"step": step, "ns_per_parameter": 1e6 * step / parameters}


def profile(device, seconds):
    """The kernels that take most time: [name, calls, ms]."""
    config = smallest(device)
    batch, longest, steps = (2, 16, 4) if device.type == "cpu" else (64, 1024, 16)
    model = trainable(config, device)
    prompts = bench.random_prompts(config, [longest], 0)
    sampler = Sampler(model, batch, longest + 20)
    sampler.generate(prompts, batch, 2)
    yield f"{steps} decode steps", lambda: top(device, sampler.generate, prompts, batch, steps)
    sampler.release()
    rows = responses(config, [longest] * 8)
    gradient(model, rows, 8 * longest)
    yield "update", lambda: top(device, gradient, model, rows, 8 * longest)


def top(device, f, *args):
    kinds = torch.profiler.ProfilerActivity
    kind, field = kinds.CUDA, "self_device_time_total"
    if device.type == "cpu":
        kind, field = kinds.CPU, "self_cpu_time_total"
    with torch.profiler.profile(activities=[kind]) as seen:
        f(*args)
    events = sorted(seen.key_averages(), key=lambda e: -getattr(e, field))
    return [[e.key[:90], e.count, getattr(e, field) / 1e3] for e in events[:15]]


# --------------------------------------------------------------------------------------------------
# whole runs


def runs(device, seconds):
    """train.py from start to checkpoint on a small random model: by its defaults, and sparingly."""
    sparing = ["--optimizer", "split", "--offload", "--recompute"]
    if device.type == "cuda":
        yield "default", partial(small_run, device, [])
    yield "sparing", partial(small_run, device, sparing)


SMALL_RUN = """--data=tiny --system= --bupo-layer=3 --bupo-steps=1 --steps=2 --prompts=4 --group=8
    --mini-prompts=1 --slots=16 --lr=1e-4 --max-prompt-tokens=32 --max-new-tokens=48
    --overlong=soft --overlong-buffer=47""".split()


def small_run(device, more):
    """Two steps, one of them internal, in which length is all that is rewarded: a random model
    never answers right. Returns what the last row of metrics.jsonl says."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        model = Path(folder, "model")
        out = Path(folder, "run")
        tiny.write_tokenizer(model)
        weights = Transformer(tiny.CONFIG).init_weights(0, 0.05)
        weights.embed.weight.data[tiny.END] *= 4  # so that about half of the responses end
        save_model(weights, model, tokenizer_from=model)
        where = [f"--model={model}", f"--out={out}", f"--device={device.type}"]
        train.main([*SMALL_RUN, *where, *more])
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        if not (out / "step_000002/MANIFEST.json").exists():
            raise FileNotFoundError("the run has left no checkpoint")
    keys = ("updates", "grad_norm", "sampler_diff/mean", "sampler_diff/max", "perf/peak_gb")
    return {key: row[key] for key in keys if key in row}


# --------------------------------------------------------------------------------------------------
# the session

# name: the part, and the seconds it may take at most
PARTS = {
    "tests": (tests, 110),
    "weights": (weights, 40),
    "split": (split, 40),
    "head": (head, 40),
    "attention": (attention, 40),
    "decode": (decode, 150),
    "update": (update, 120),
    "optimizer": (optimizer, 40),
    "profile": (profile, 40),
    "runs": (runs, 80),
}
LEAST, START = 40, 20  # seconds: no part is started with less; what it does not measure in


def describe(device):
    """What a figure must not be read without."""
    return {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": settings.commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def rounded(x):
    """Four digits of every number are enough."""
    text = json.dumps(x)
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))


def failure(e):
    return {"error": f"{type(e).__name__}: {one_line([str(e)]):.600}"}


def late(signum, frame):
    raise TimeoutError("the part's time is up")


def measure(name, device, seconds):
    """All measurements of a part that its time allows, as one row. Nothing in it is raised.

    A measurement under way when the time is up is broken off, so that those before it are kept.
    """
    begin = time.perf_counter()
    row = {"part": name}
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        row |= describe(device)
        for label, f in PARTS[name][0](device, seconds):
            if time.perf_counter() - begin >= seconds:
                row.setdefault("left_out", []).append(label)
                continue
            try:
                row[label] = rounded(f())
            except Exception as e:
                row[label] = failure(e)
            print(f"  {label}: {json.dumps(row[label])}", file=sys.stderr, flush=True)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    except Exception as e:
        row |= failure(e)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def write(row, out):
    line = json.dumps(row)
    print(line, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as f:
            f.write(line + "\n")


def apart(name, seconds, out):
    """A part in a process of its own; its row is written by it, or here if it could not."""
    limit = min(PARTS[name][1], seconds)
    argv = [sys.executable, "-m", "tools.bench", "gpu", "--parts", name]
    argv += ["--seconds", str(int(limit - START)), "--out", str(out)]
    try:
        code = subprocess.run(argv, timeout=limit).returncode
        why = f"ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        why = f"killed after {limit:.0f} s"
    if why:
        write({"part": name, "commit": settings.commit(), "error": why}, out)


def gpu(args):
    """What to run first on a GPU: correctness, then speed; one JSON line a part."""
    begin = time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU here: --device cpu tries every part on tiny shapes")
    if wrong := set(args.parts or ()) - {*PARTS}:
        raise ValueError(f"--parts: {', '.join(wrong)}: no such part; there are {', '.join(PARTS)}")
    out = args.out
    if device.type == "cuda" and not out:
        out = ROOT / "results/gpu.jsonl"
    for name in args.parts or PARTS:
        left = args.seconds - (time.perf_counter() - begin)
        if device.type == "cpu" or args.parts:
            write(measure(name, device, left), out)
        elif left > LEAST:
            apart(name, left, out.resolve())
        else:
            write({"part": name, "skipped": "no time left"}, out)


def add_parser(sub):
    """The command's flags, for tools.bench."""
    text = "what to run first on a GPU"
    q = sub.add_parser("gpu", help=text, description=__doc__, allow_abbrev=False)
    q.set_defaults(run=gpu)
    q.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    q.add_argument("--seconds", type=natural, default=600, help="for all parts (default 600)")
    q.add_argument("--parts", type=lambda text: text.split(","), help="only these, in this process")
    q.add_argument("--out", type=Path, help="file of rows (default on a GPU results/gpu.jsonl)")
