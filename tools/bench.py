"""Models of any preset's true shape with random weights: everything can be tried, and timed,
without downloading anything.

    python -m tools.bench init --like qwen3-0.6b --layers 4 --tokenizer FOLDER
    python train.py --model out/random-qwen3-0.6b-4 --data problems.jsonl ...

    python -m tools.bench decode --batch 64 --context 1024  decoding, beside the memory's own speed
    python -m tools.bench workload --requests 256    ragged requests through refilled slots
    python -m tools.bench step                       an update: packed, padded, a matrix product
    python -m tools.bench logprobs                   without [tokens, V], against full logits
    python -m tools.bench bupo                       an update at layer l against full depth
    python -m tools.bench optimizer                  AdamW against AdamW of fewer bytes
    python -m tools.bench lens                       every internal policy, against hooks
    python -m tools.bench gpu                        all that a first session on a GPU should run

decode and workload take --versus: transformers' generate on the same weights, prompts and lengths.
Both sides of every comparison run in turns in one process: only such ratios mean something on a
machine that does other work too. The last line printed is one JSON object.
"""

import argparse
import gc
import json
import random
import re
import shutil
import time
from pathlib import Path

import torch

from bupo import InternalPolicy
from decompose import measure, pick
from grpo import backward, collate, micro_batches, token_logprobs
from model import Config, Transformer
from plumbing.cli import guarded, natural, pick_device
from plumbing.hub import HUB, TOKENIZER_FILES, hf_config, hf_tensors, save_model
from plumbing.kernels import compile_blocks
from plumbing.metrics import forward_flops
from plumbing.optimizer import SplitAdamW, bytes_per_parameter
from plumbing.shapes import SHAPES, preset_config
from plumbing.tokenizer import load_tokenizer
from rollout import Response, Sampler
from tools import bench_gpu


def init(args):
    """Write a folder of random weights that loads like a download. A folder that holds anything is
    left alone."""
    config = preset_config(args.like)
    if args.layers:
        config.n_layers = args.layers
    out = Path(args.out or f"out/random-{args.like}-{config.n_layers}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already: use it, delete it, or name another --out")
    used = load_tokenizer(args.tokenizer).n_vocab if args.tokenizer else 0
    if used > config.vocab_size:
        raise ValueError(
            f"{args.tokenizer} uses {used} ids, {args.like} has rows for {config.vocab_size}: they "
            f"do not belong together"
        )
    need, free = (
        sum(p.numel() for p in meta(config).parameters()) * 2,
        shutil.disk_usage(Path.cwd()).free,
    )
    if need > free:
        raise OSError(
            f"{out}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer --layers"
        )
    model = empty(config, torch.bfloat16, "cpu").init_weights(args.seed)
    try:
        save_model(model, out, tokenizer_from=args.tokenizer)
    except BaseException:  # half a model would be refused above the next time
        shutil.rmtree(out, ignore_errors=True)
        raise
    n = sum(p.numel() for p in model.parameters())
    print(
        f"{n / 1e6:,.1f} M random bfloat16 parameters of {args.like}'s shape, {config.n_layers} "
        f"layers"
        + (
            ""
            if args.tokenizer
            else f"; put a tokenizer beside them ({', '.join(TOKENIZER_FILES[:2])}) to use them "
            f"with text"
        )
    )
    print(out)


def meta(config):
    """The model without memory behind it."""
    with torch.device("meta"):
        return Transformer(config)


def empty(config, dtype, device):
    """The model with memory of this dtype and no values in it."""
    return meta(config).to(dtype).to_empty(device=device)


# --------------------------------------------------------------------------------------------------
# speed


def build(args):
    """A model of the shape asked for, random weights. Returns model, device, bytes of an
    element."""
    config, device = preset_config(args.like), torch.device(pick_device(args.device))
    if args.layers:
        config.n_layers = args.layers
    if args.compile is None:
        args.compile = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    return empty(config, dtype, device).init_weights(args.seed), device, dtype.itemsize


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device, f):
    """Seconds of f, the device's work included, and what it returned."""
    synchronize(device)
    start, out = time.perf_counter(), f()
    synchronize(device)
    return time.perf_counter() - start, out


def copy_speed(device, megabytes=256, tries=8):
    """Bytes a second that a large copy reads and writes: what this memory gives a program here and
    now."""
    a = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() / min(timed(device, lambda: b.copy_(a))[0] for _ in range(tries))


def step_bytes(config, itemsize):
    """Bytes a decode step must read: of weights, once a step, and of keys and values, for each live
    token of each row."""
    # of an embedding that is no unembedding: some rows only
    unread = 0 if config.tied else config.vocab_size * config.d_model
    weights = sum(p.numel() for p in meta(config).parameters()) - unread
    return weights * itemsize, 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize


def random_prompts(config, lengths, seed):
    g = random.Random(seed)
    return [[g.randrange(config.vocab_size) for _ in range(n)] for n in lengths]


def transformers_model(model):
    """The same weights (the same memory) in transformers' class; None, with a line that says so,
    where it is not installed."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: nothing to compare with")
        return None
    raw, dtype, device = (
        hf_config(model.config, model.embed.weight.dtype),
        model.embed.weight.dtype,
        model.embed.weight.device,
    )
    params = dict(model.named_parameters())
    theirs = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype).to(device).eval()
    )
    state = {
        name: params[ours].detach()[row : row + rows]
        for name, (ours, row, rows) in hf_tensors(model.config).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    wrong = [*unexpected, *(set(missing) - {"lm_head.weight"})]
    if wrong:
        raise ValueError(f"this transformers names weights otherwise: {wrong[:3]}")
    return theirs


@torch.no_grad()
def transformers_generate(theirs, prompts, limits, static=False, greedy=False):
    """One left-padded batch until its longest response is done, as generate does it. Returns the
    new tokens, [batch, longest]."""
    width, device = max(map(len, prompts)), theirs.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # transformers compiles the step of a static cache by itself, on a GPU
    kind = {"cache_implementation": "static"} if static else {}
    return theirs.generate(
        ids,
        attention_mask=mask,
        do_sample=not greedy,
        top_k=0 if not greedy else None,
        max_new_tokens=max(limits),
        min_new_tokens=max(limits),
        pad_token_id=0,
        eos_token_id=None,
        **kind,
    )[:, width:]


def decode(args):
    """Rows of one length, decoded together; the share of the memory's speed that decoding
    reaches."""
    model, device, itemsize = build(args)
    if args.context <= args.steps // 2:
        raise ValueError(
            f"--context {args.context} is the mean over --steps {args.steps}: make it longer"
        )
    prompts = random_prompts(model.config, [args.context - args.steps // 2] * args.batch, args.seed)
    sampler = Sampler(model, args.batch, len(prompts[0]) + args.steps + 1, args.compile)
    # compiles, records, warms up
    first = timed(device, lambda: sampler.generate(prompts[:1], args.batch, 2))[0]
    out = {"command": "decode", "first_call_s": first, **describe(args, model)}
    seconds_on_device = device_seconds(sampler) if sampler.capture else None
    sampler.generate(prompts, 1, args.steps)
    seconds, tokens = sampler.stats["decode_seconds"], sampler.stats["tokens"]
    weights, kv = step_bytes(model.config, itemsize)
    read, copy = weights + kv * args.batch * args.context, copy_speed(device)
    speed = read * args.steps / seconds
    out |= {
        "tok_s": tokens / seconds,
        "ms_step": 1e3 * seconds / args.steps,
        "GB_s": speed / 1e9,
        "copy_GB_s": copy / 1e9,
        "share_of_copy": speed / copy,
        "prefill_tok_s": sampler.stats["prompt_tokens"] / sampler.stats["prefill_seconds"],
        "recompiles": sampler.stats["recompiles"],
    }
    if seconds_on_device:
        out["host_overhead"] = seconds / seconds_on_device() - 1
    print(
        f"{tokens} tokens in {seconds:.2f} s: {out['tok_s']:,.1f} tok/s, {out['ms_step']:.2f} ms a "
        f"step, {out['GB_s']:.1f} GB/s of the "
        f"{out['copy_GB_s']:.1f} GB/s of a copy ({out['share_of_copy']:.2f})"
    )
    sampler.release()
    if args.versus and (theirs := transformers_model(model)):
        for name, static in (("dynamic", False), ("static", True)):
            # the first call of a compiled step compiles it
            for _ in range(2 if static and device.type == "cuda" else 1):
                short = timed(
                    device,
                    lambda static=static: transformers_generate(theirs, prompts, [1], static),
                )[0]
                long = timed(
                    device,
                    lambda static=static: transformers_generate(
                        theirs, prompts, [args.steps + 1], static
                    ),
                )[0]
            out[f"transformers_{name}_tok_s"] = speed = (
                args.batch * args.steps / max(long - short, 1e-9)
            )
            print(
                f"transformers, {name} cache: {speed:,.1f} tok/s; this sampler "
                f"{out['tok_s'] / speed:.2f}x"
            )
    print(json.dumps(out))


def device_seconds(sampler):
    """From here on, time what `sampler.decode` enqueues by the GPU's own clock; returns a function
    that gives the seconds so far."""
    decode, spans = sampler.decode, []

    def timed_decode(*a):
        span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        span[0].record()
        decode(*a)
        span[1].record()
        spans.append(span)

    def seconds():
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in spans) / 1e3

    sampler.decode = timed_decode
    return seconds


def workload(args):
    """Ragged requests, first come first served: refilled slots, the same engine in fixed batches,
    transformers at several batch sizes.

    A response's length stands for the place where a model would have stopped: no side sorts by it.
    Transformers gets its prompts sorted by length, so that it pads least.
    """
    model, device, itemsize = build(args)
    g = random.Random(args.seed)
    lengths, limits = (
        [g.randint(*span) for _ in range(args.requests)] for span in (args.prompt, args.output)
    )
    prompts, tokens = random_prompts(model.config, lengths, args.seed), sum(limits)
    sampler = Sampler(model, args.slots, args.prompt[1] + args.output[1] + 1, args.compile)
    # compiles, records, warms up
    sampler.generate(prompts[:1], 1, 2)
    out, turns = (
        {
            "command": "workload",
            "requests": args.requests,
            "tokens": tokens,
            **describe(args, model),
        },
        {},
    )
    narrow = sampler.shrink
    theirs = transformers_model(model) if args.versus else None
    by_length = sorted(range(args.requests), key=lambda i: lengths[i])
    batches = [int(b) for b in args.versus_batches.split(",")] if theirs else []

    def ours():
        sampler.generate(prompts, 1, limits, seed=args.seed, progress="refilled slots")
        turns.setdefault("stats", sampler.stats)

    # what an engine without refill does: a batch takes as long as its longest row, all of its rows
    # are computed
    def fixed():
        sampler.shrink = False
        for a in range(0, args.requests, sampler.slots):
            sampler.generate(prompts[a : a + sampler.slots], 1, limits[a : a + sampler.slots])
        sampler.shrink = narrow

    def other(size):
        for a in range(0, args.requests, size):
            some = by_length[a : a + size]
            transformers_generate(theirs, [prompts[i] for i in some], [limits[i] for i in some])

    sides = (
        {"refilled": ours}
        | ({"fixed": fixed} if args.fixed else {})
        | {f"transformers_{b}": lambda b=b: other(b) for b in batches}
    )
    # in turns, so that what else the machine does falls on every side
    for turn in range(args.repeats):
        for name, side in sides.items():
            turns.setdefault(name, []).append(tokens / timed(device, side)[0])
            print(f"turn {turn + 1}: {name:16} {turns[name][-1]:,.1f} tok/s", flush=True)
    stats = turns.pop("stats")
    weights, kv = step_bytes(model.config, itemsize)
    attended = sum(n * p + n * (n + 1) // 2 for n, p in zip(limits, lengths, strict=True))
    # seconds of reading alone
    bound = (weights * max(max(limits), tokens / sampler.slots) + kv * attended) / copy_speed(
        device
    )
    out |= {
        "slots": sampler.slots,
        "bound_tok_s": tokens / bound,
        **stats,
        **{f"{k}_tok_s": max(v) for k, v in turns.items()},
    }
    out["share_of_bound"] = out["refilled_tok_s"] / out["bound_tok_s"]
    best = max((out[f"transformers_{b}_tok_s"] for b in batches), default=None)
    out |= {
        "over_fixed": out["refilled_tok_s"] / out["fixed_tok_s"] if args.fixed else None,
        "over_transformers": out["refilled_tok_s"] / best if best else None,
    }
    if args.profile:
        out["outside_matmul"] = outside_matmul(
            lambda: sampler.generate(prompts[: sampler.slots], 1, 16)
        )
    for key in (
        "refilled_tok_s",
        "occupancy",
        "share_of_bound",
        "over_fixed",
        "over_transformers",
        "outside_matmul",
    ):
        if out.get(key) is not None:
            print(f"{key:20} {out[key]:,.2f}")
    print(json.dumps(out))


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def outside_matmul(f):
    """Share of the operators' own CPU time that is not a matrix product, over one run of f."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    times = {
        e.key: e.self_cpu_time_total
        for e in profile.key_averages()
        if e.key.startswith(("aten::", "mkldnn", "mkl"))
    }
    return 1 - sum(t for key, t in times.items() if key in PRODUCTS) / sum(times.values())


def describe(args, model):
    """What a figure must not be read without."""
    weight = model.embed.weight
    name = (
        torch.cuda.get_device_name()
        if weight.is_cuda
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "like": args.like,
        "layers": model.config.n_layers,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": name,
        "torch": torch.__version__,
        "compile": args.compile,
    }


# --------------------------------------------------------------------------------------------------
# training and analysis


def peak(device, f):
    """Bytes that f takes beyond what was held before it: of the GPU's allocator, on a CPU of the
    process (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here

    def held(field):
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = held("VmRSS")
    f()
    return held("VmHWM") - before


def paired(device, sides, repeats):
    """Median seconds of each side, taken in turns so that what else the machine does falls on all
    of them."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, f in sides.items():
            seconds[name].append(timed(device, f)[0])
    return {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}


def matmul_speed(device, dtype):
    """FLOP/s of a large square product: what this device gives a program here and now."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    return 2 * n**3 / min(timed(device, lambda: a @ b)[0] for _ in range(5))


def step(args):
    """One update on ragged responses (mean length 0.4 of the longest): packed against padded,
    tokens and FLOP/s, peak memory."""
    model, device, _ = build(args)
    config, dtype, g = model.config, model.embed.weight.dtype, random.Random(args.seed)
    layer = args.layer or config.n_layers
    if layer > config.n_layers:
        raise ValueError(f"--layer {layer}: there are {config.n_layers}")
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    prompt, lengths = -(-args.longest // 8), [args.longest]
    # of mean 0.4
    while sum(lengths) < 2 * args.tokens:
        lengths.append(max(prompt + 1, int(args.longest * g.random() ** 1.5)))
    responses = []
    for n in lengths:
        ids = random_prompts(config, [n], len(responses))[0]
        responses.append(
            Response(
                ids[:prompt], ids[prompt:], [0.0] * (n - prompt), advantage=g.choice((-1.0, 1.0))
            )
        )
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        if dtype == torch.float32
        else SplitAdamW(model.parameters())
    )

    def side(pack):
        def run():
            backward(InternalPolicy(model, layer=layer), responses, args.tokens, pack=pack)
            optimizer.step()
            optimizer.zero_grad()

        return run

    sides = {"packed": side(True), "padded": side(False)}
    for f in sides.values():
        f()  # compiles, and makes the moments
    rate = matmul_speed(device, dtype)
    seconds = paired(device, sides, args.repeats)
    flops = 3 * forward_flops(model, responses, layer)
    memory = {"peak_GB": {k: peak(device, f) / 1e9 for k, f in sides.items()}}
    if device.type == "cuda":
        memory["held_GB"] = torch.cuda.memory_allocated() / 1e9
    out = {
        "command": "step",
        **describe(args, model),
        "layer": layer,
        "tokens": sum(lengths),
        "mean_over_max": sum(lengths) / len(lengths) / max(lengths),
        "seconds": seconds,
        "tok_s": {k: sum(lengths) / s for k, s in seconds.items()},
        "matmul_tflop_s": rate / 1e12,
        "share_of_matmul": {k: flops / s / rate for k, s in seconds.items()},
        **memory,
        "packed_over_padded": seconds["padded"] / seconds["packed"],
    }
    print(
        f"layer {layer} of {config.n_layers}: {out['tok_s']['packed']:,.0f} tok/s packed, "
        f"{out['tok_s']['padded']:,.0f} padded; "
        f"{out['share_of_matmul']['packed']:.2f} of the {rate / 1e12:.1f} TFLOP/s of a matrix "
        f"product; {memory}"
    )
    print(json.dumps(out))


def logprobs(args):
    """token_logprobs against full logits and autograd: time of forward and backward, and memory
    beside h, E and their gradients."""
    config, device = preset_config(args.like), torch.device(pick_device(args.device))
    g = torch.Generator(device).manual_seed(args.seed)
    V, D = config.vocab_size, config.d_model
    h, E = (
        torch.randn(n, D, generator=g, device=device).mul_(s).requires_grad_()
        for n, s in ((args.tokens, 1), (V, D**-0.5))
    )
    targets = torch.randint(V, (args.tokens,), generator=g, device=device)

    def side(f, backward=True):
        def run():
            with torch.set_grad_enabled(backward):
                out = f().sum()
            # given back at once: nothing of it is held when the next side starts
            if backward:
                torch.autograd.grad(out, (h, E))

        return run

    def ours(n=args.tokens):
        return token_logprobs(h[:n], E, targets[:n], chunk=args.chunk)[0]

    def naive():
        return (h @ E.T).log_softmax(-1).gather(1, targets[:, None])

    side(ours)()
    out = {
        "command": "logprobs",
        "tokens": args.tokens,
        "V": V,
        "D": D,
        "chunk": args.chunk,
        "device": str(device),
    }
    seconds = paired(device, {"ours": side(ours), "naive": side(naive)}, args.repeats)
    memory = {
        "ours": peak(device, side(ours)),
        "naive": peak(device, side(naive)),
        "forward": peak(device, side(ours, False)),
        "forward of half": peak(device, side(lambda: ours(args.tokens // 2), False)),
    }
    out |= {
        "seconds": seconds,
        "peak_GB": {k: v / 1e9 for k, v in memory.items()},
        "time_over_naive": seconds["ours"] / seconds["naive"],
        "memory_over_naive": memory["ours"] / max(memory["naive"], 1),
    }
    print(
        f"{args.tokens} tokens, V = {V:,}: time {out['time_over_naive']:.2f} of naive, memory "
        f"{out['memory_over_naive']:.2f}; forward "
        f"alone {memory['forward'] / 1e9:.2f} GB, of half the tokens "
        f"{memory['forward of half'] / 1e9:.2f}"
    )
    print(json.dumps(out))


def stack(args):
    """28 blocks as narrow as --width, all else in qwen3-0.6b's proportions, random weights, and
    responses that fill --tokens."""
    device, wide = torch.device(pick_device(args.device)), SHAPES["qwen3-0.6b"]
    scale = args.width / wide.d_model
    V, d_mlp = int(wide.vocab_size * scale), int(wide.d_mlp * scale)
    config = Config("qwen3", V, args.width, wide.n_layers, 4, 2, args.width // 2, d_mlp, tied=True)
    model, g = (
        empty(config, torch.float32, device).init_weights(args.seed),
        random.Random(args.seed),
    )
    rows = [[g.randrange(config.vocab_size) for _ in range(256)] for _ in range(args.tokens // 256)]
    return model, [
        Response(r[:64], r[64:], [0.0] * 192, advantage=g.choice((-1.0, 1.0))) for r in rows
    ]


def bupo(args):
    """An update at an internal layer against the same at full depth, and against running all blocks
    to read H^l, as the reference does."""
    model, responses = stack(args)
    c, device, l = model.config, model.unembedding.device, args.layer
    if l > c.n_layers:
        raise ValueError(f"--layer {l}: there are {c.n_layers}")

    def ours(layer):
        def run():
            model.zero_grad()
            backward(InternalPolicy(model, layer=layer), responses, 2048)

        return run

    def reference():
        """Every block and both heads in the forward; the loss is that of H^l."""
        model.zero_grad()
        n = sum(len(r.ids) for r in responses)
        for micro in micro_batches(responses, 2048):
            b = collate(micro, device)
            states = [s.resid_post for s in model.stream(b.ids)]
            with torch.no_grad():
                model.unembed(states[-1].flatten(0, 1)[b.positions])
            z = model.unembed(states[l - 1].flatten(0, 1)[b.at], l)
            (
                (-z.log_softmax(-1).gather(1, b.targets[:, None])[:, 0] * b.advantages).sum() / n
            ).backward()

    reference()
    theirs = {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    ours(l)()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    apart = max(((own[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)
    seconds = paired(
        device,
        {"internal": ours(l), "full": ours(c.n_layers), "reference": reference},
        args.repeats,
    )
    body = sum(p.numel() for p in model.blocks.parameters())
    # response positions only, and a fourth product: recomputed logits
    head = c.vocab_size * c.d_model * (1 - 64 / 256) * 4 / 3
    fraction = (body * l / c.n_layers + head) / (body + head)
    out = {
        "command": "bupo",
        "layer": l,
        "layers": c.n_layers,
        "gradients_apart": apart,
        "same_parameters": own.keys() == theirs.keys(),
        "seconds": seconds,
        "flop_fraction": fraction,
        "time_fraction": seconds["internal"] / seconds["full"],
        "over_flop_fraction": seconds["internal"] / seconds["full"] / fraction,
        "faster_than_reference": seconds["reference"] / seconds["internal"],
    }
    print(
        f"layer {l} of {c.n_layers}: {out['time_fraction']:.2f} of the full update's time "
        f"({out['over_flop_fraction']:.2f} of its share "
        f"of FLOPs), {out['faster_than_reference']:.2f}x faster than the reference's way; "
        f"gradients apart by {apart:.1e}"
    )
    print(json.dumps(out))


def optimizer(args):
    """Nanoseconds a parameter of one optimizer step: torch's fused AdamW on float32, SplitAdamW on
    bfloat16."""
    device, n = torch.device(pick_device(args.device)), args.tokens * 1024
    sides = {}
    for name, dtype in (
        ("adamw", torch.float32),
        ("split-m32", torch.bfloat16),
        ("split", torch.bfloat16),
    ):
        p = torch.nn.Parameter(torch.randn(n // 1024, 1024, device=device).mul_(0.02).to(dtype))
        p.grad = torch.randn_like(p)
        moment = torch.float32 if name == "split-m32" else torch.float16
        sides[name] = (
            torch.optim.AdamW([p], lr=1e-6, fused=True)
            if name == "adamw"
            else SplitAdamW([p], moment_dtype=moment)
        ).step
        sides[name]()
    seconds = paired(device, sides, args.repeats)
    out = {
        "command": "optimizer",
        "parameters": n,
        "ns_per_parameter": {k: 1e9 * s / n for k, s in seconds.items()},
        "bytes_per_parameter": {k: bytes_per_parameter(k) for k in sides},
        "device": str(device),
    }
    print(
        "ns a parameter: " + ", ".join(f"{k} {v:.2f}" for k, v in out["ns_per_parameter"].items())
    )
    print(json.dumps(out))


@torch.no_grad()
def lens(args):
    """decompose.measure against hooks that keep every state and unembed the input and the output of
    each block, as the reference does."""
    config, device = preset_config(args.like), torch.device(pick_device(args.device))
    config.n_layers = args.layers or 4
    model = empty(config, torch.float32, device).init_weights(args.seed)
    ids = torch.tensor(random_prompts(config, [args.tokens + 1], args.seed)[0])

    def ours():
        return pick(measure(model, ids, 1, chunk=args.chunk), "final")

    def reference():
        """What hooks on attention, MLP and block give, input and output each unembedded, every
        quantity from its own full log-softmax."""
        token, kept = ids[1:].to(device)[:, None], []
        for s in model.stream(ids[None, :-1].to(device)):
            block = model.blocks[s.layer - 1]
            kept += [s.resid_pre, block.attn_norm(s.resid_pre), s.attn_out, s.resid_mid]
            kept += [s.resid_mid, block.mlp_norm(s.resid_mid), s.mlp_out, s.resid_post]
        final = model.unembed(model.norm(kept[-1])[0], 1).log_softmax(-1)
        for h in [*kept, None]:
            logp = final if h is None else model.unembed(h[0], 1).log_softmax(-1)
            p = logp.exp()
            entropy, own = -(p * logp).sum(-1), logp.gather(1, token)
            _ = (logp > own).sum(-1), p.topk(5, -1), (final.exp() * (final - logp)).sum(-1)
        return entropy

    close = (torch.as_tensor(ours()) - reference().cpu()).abs().max().item()
    seconds = paired(device, {"ours": ours, "reference": reference}, args.repeats)
    memory = {"ours": peak(device, ours), "reference": peak(device, reference)}
    out = {
        "command": "lens",
        "tokens": args.tokens,
        "layers": config.n_layers,
        "V": config.vocab_size,
        "entropies_apart": close,
        "seconds": seconds,
        "peak_GB": {k: v / 1e9 for k, v in memory.items()},
        "faster": seconds["reference"] / seconds["ours"],
        "memory": memory["ours"] / max(memory["reference"], 1),
    }
    print(
        f"{args.tokens} tokens, {config.n_layers} layers: {out['faster']:.2f}x faster than the "
        f"reference's way, "
        f"{out['memory']:.2f} of its memory"
    )
    print(json.dumps(out))


def span(text):
    """ "32-256" as (32, 256)."""
    low, _, high = text.partition("-")
    if low.isdigit() and high.isdigit() and 0 < int(low) <= int(high):
        return int(low), int(high)
    raise argparse.ArgumentTypeError(f"{text}: want a range such as 32-256")


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    sub = p.add_subparsers(required=True, metavar="COMMAND")
    q = sub.add_parser("init", help="write a folder of random weights in a preset's shape")
    q.set_defaults(run=init)
    q.add_argument("--like", required=True, help=f"preset: {', '.join(HUB)}")
    q.add_argument("--layers", type=natural, help="blocks (default: the preset's)")
    q.add_argument(
        "--tokenizer", type=Path, help="folder whose tokenizer files are copied beside the weights"
    )
    q.add_argument("--out", help="folder to write (default out/random-LIKE-LAYERS)")
    q.add_argument("--seed", type=int, default=0)
    for run, text in (
        (decode, "speed of decoding rows of one length"),
        (workload, "speed on ragged requests"),
    ):
        q = sub.add_parser(run.__name__, help=text, description=run.__doc__, allow_abbrev=False)
        q.set_defaults(run=run)
        q.add_argument(
            "--like", default="qwen3-0.6b", help=f"shape: {', '.join(SHAPES)} (default qwen3-0.6b)"
        )
        q.add_argument("--layers", type=natural, help="blocks (default: the preset's)")
        q.add_argument(
            "--dtype",
            choices=("float32", "bfloat16"),
            help="of weights and cache (default bfloat16 on a GPU, else float32)",
        )
        q.add_argument(
            "--device", default="auto", help="cpu or cuda (default: a GPU when there is one)"
        )
        q.add_argument("--threads", type=natural, help="CPU threads (default torch's)")
        q.add_argument(
            "--compile", action=switch, help="compile the decode step (default: on a GPU)"
        )
        q.add_argument(
            "--versus",
            action="store_true",
            help="time transformers' generate too, when it is installed",
        )
        q.add_argument("--seed", type=int, default=0)
        if run is decode:
            q.add_argument(
                "--batch", type=natural, default=16, help="rows decoded together (default 16)"
            )
            q.add_argument(
                "--context",
                type=natural,
                default=1024,
                help="tokens a row holds, mean over the run (default 1024)",
            )
            q.add_argument(
                "--steps", type=natural, default=64, help="tokens decoded a row (default 64)"
            )
        else:
            q.add_argument("--requests", type=natural, default=256, help="(default 256)")
            q.add_argument(
                "--prompt",
                type=span,
                default=(100, 1024),
                help="tokens in, uniform over a range (default 100-1024)",
            )
            q.add_argument(
                "--output",
                type=span,
                default=(100, 1024),
                help="tokens out, uniform over a range (default 100-1024)",
            )
            q.add_argument(
                "--slots",
                type=natural,
                help="rows decoded together (default: 64, on a GPU what fits, at most 256)",
            )
            q.add_argument(
                "--fixed", action="store_true", help="time the same engine in fixed batches too"
            )
            q.add_argument(
                "--versus-batches",
                default="16,32,64",
                help="batch sizes for transformers, the best counts (default 16,32,64)",
            )
            q.add_argument(
                "--repeats",
                type=natural,
                default=1,
                help="turns of every side, the best counts (default 1)",
            )
            q.add_argument(
                "--profile",
                action="store_true",
                help="also the share of CPU time outside matrix products",
            )
    for run, text, tokens in (
        (step, "an update: packed and padded, against the speed of a matrix product", 2048),
        (logprobs, "log-probs in chunks against full logits", 1024),
        (bupo, "an internal update against a full one", 2048),
        (optimizer, "optimizer steps, n x 1024 parameters", 4096),
        (lens, "decompose.measure against hooks", 512),
    ):
        q = sub.add_parser(run.__name__, help=text, description=run.__doc__, allow_abbrev=False)
        q.set_defaults(run=run)
        q.add_argument("--tokens", type=natural, default=tokens, help=f"(default {tokens})")
        q.add_argument(
            "--repeats",
            type=natural,
            default=3,
            help="turns of every side, the median counts (default 3)",
        )
        q.add_argument(
            "--device", default="auto", help="cpu or cuda (default: a GPU when there is one)"
        )
        q.add_argument("--threads", type=natural, help="CPU threads (default torch's)")
        q.add_argument("--seed", type=int, default=0)
        if run is step:
            q.add_argument("--like", default="qwen3-0.6b", help="shape (default qwen3-0.6b)")
            q.add_argument("--layers", type=natural, help="blocks (default: the preset's)")
            q.add_argument(
                "--layer",
                type=natural,
                help="internal layer whose policy is trained (default: the last)",
            )
            q.add_argument(
                "--longest",
                type=natural,
                default=512,
                help="tokens of the longest response with its prompt (default 512)",
            )
            q.add_argument("--recompute", action="store_true", help="as in train.py")
            q.add_argument(
                "--compile", action=switch, help="the blocks, as train.py does (default: on a GPU)"
            )
            q.set_defaults(dtype=None)
        if run in (logprobs, lens):
            q.add_argument(
                "--like",
                default="qwen3-0.6b",
                help="shape whose width and vocabulary are taken (default qwen3-0.6b)",
            )
            q.add_argument(
                "--chunk",
                type=natural,
                default=256 if run is logprobs else 128,
                help="rows of logits (default %(default)s)",
            )
        if run is lens:
            q.add_argument("--layers", type=natural, default=4, help="blocks (default 4)")
        if run is bupo:
            q.add_argument(
                "--layer", type=natural, default=7, help="internal layer, of 28 (default 7)"
            )
            q.add_argument(
                "--width",
                type=natural,
                default=128,
                help="D; all else keeps qwen3-0.6b's proportions (default 128)",
            )
    bench_gpu.add_parser(sub)
    args = p.parse_args(argv)
    # init has no use for them
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    guarded(main)
