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
machine that does other work too. The last line printed is one JSON object; what stands above it is
the same, rounded, for a person.
"""

import argparse
import gc
import json
import math
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path
from statistics import median_high

import torch
from torch.nn.utils.rnn import pad_sequence

from bupo import InternalPolicy
from decompose import measure, pick
from grpo import backward, collate, micro_batches, token_logprobs
from model import Config, Transformer, project
from plumbing.cli import guarded, natural, pick_device
from plumbing.hub import TOKENIZER_FILES, hf_config, hf_tensors, save_model
from plumbing.kernels import compile_blocks
from plumbing.metrics import forward_flops
from plumbing.optimizer import SplitAdamW, bytes_per_parameter
from plumbing.shapes import preset_config
from plumbing.tokenizer import load_tokenizer
from rollout import Response, Sampler
from tools import bench_gpu

# --------------------------------------------------------------------------------------------------
# random models, prompts and responses


def shape(args):
    """The preset's shape, as deep as --layers says."""
    config = preset_config(args.like)
    config.n_layers = args.layers or config.n_layers
    return config


def meta(config):
    """The model without memory behind it."""
    with torch.device("meta"):
        return Transformer(config)


def empty(config, dtype, device):
    """The model with memory of this dtype and no values in it."""
    return meta(config).to(dtype).to_empty(device=device)


def build(args):
    """A model of the shape asked for, random weights."""
    dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return empty(shape(args), getattr(torch, dtype), args.device).init_weights(args.seed)


def random_prompts(config, lengths, seed):
    g = random.Random(seed)
    return [[g.randrange(config.vocab_size) for _ in range(n)] for n in lengths]


def random_response(ids, prompt_length, g):
    """A response to the first of these ids, good or bad by chance."""
    prompt, drawn = ids[:prompt_length], ids[prompt_length:]
    return Response(prompt, drawn, [0.0] * len(drawn), advantage=g.choice((-1.0, 1.0)))


def describe(args, model):
    """What a figure must not be read without."""
    weight = model.embed.weight
    name = f"cpu, {torch.get_num_threads()} threads"
    if weight.is_cuda:
        name = torch.cuda.get_device_name()
    return {
        "like": args.like,
        "layers": model.config.n_layers,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": name,
        "torch": torch.__version__,
        "compile": args.compile,
    }


def init(args):
    """Write a folder of random weights that loads like a download. A folder that holds anything is
    left alone."""
    config = shape(args)
    out = Path(args.out or f"out/random-{args.like}-{config.n_layers}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already: use it, delete it, or name another --out")
    used = load_tokenizer(args.tokenizer).n_vocab if args.tokenizer else 0
    if used > config.vocab_size:
        raise ValueError(
            f"{args.tokenizer} uses {used} ids, {args.like} has rows for {config.vocab_size}: they "
            f"do not belong together"
        )
    model = empty(config, torch.bfloat16, "cpu").init_weights(args.seed)
    try:
        save_model(model, out, tokenizer_from=args.tokenizer)
    except BaseException:  # half a model would be refused above the next time
        shutil.rmtree(out, ignore_errors=True)
        raise
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:,.1f} M random bfloat16 parameters of {args.like}'s shape, ", end="")
    print(f"{config.n_layers} layers")
    if not args.tokenizer:
        files = ", ".join(TOKENIZER_FILES[:2])
        print(f"put a tokenizer beside them ({files}) to use them with text")
    print(out)


# --------------------------------------------------------------------------------------------------
# clocks, memory, and what the machine gives a program here and now


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device, f):
    """Seconds of f, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(device, sides, repeats):
    """Seconds of every turn of each side: one after the other, so that what else the machine does
    falls on all of them."""
    seconds = {name: [] for name in sides}
    for turn in range(repeats):
        for name, f in sides.items():
            seconds[name].append(timed(device, f))
            print(f"turn {turn + 1}: {name:16} {seconds[name][-1]:.3g} s", flush=True)
    return seconds


def paired(device, sides, repeats):
    """Median seconds of each side, taken in turns."""
    turns = in_turns(device, sides, repeats)
    return {name: median_high(seconds) for name, seconds in turns.items()}


def peak_gb(device, f):
    """GB that f takes beyond what was held before it: of the GPU's allocator, on a CPU of the
    process (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here

    def held(field):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])

    before = held("VmRSS")
    f()
    return (held("VmHWM") - before) / 1e9


def copy_speed(device, megabytes=256, tries=8):
    """Bytes a second that a large copy reads and writes."""
    a = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() / min(timed(device, lambda: b.copy_(a)) for _ in range(tries))


def matmul_speed(device, dtype):
    """FLOP/s of a large square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    return 2 * n**3 / min(timed(device, lambda: a @ b) for _ in range(5))


# --------------------------------------------------------------------------------------------------
# decoding


def step_bytes(config, itemsize):
    """Bytes a decode step must read: of weights, once a step, and of keys and values, for each live
    token of each row."""
    weights = sum(p.numel() for p in meta(config).parameters())
    if not config.tied:  # of an embedding that is no unembedding some rows are read only
        weights -= config.vocab_size * config.d_model
    return weights * itemsize, 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize


def transformers_model(model):
    """The same weights (the same memory) in transformers' class; None, with a line that says so,
    where it is not installed."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: nothing to compare with")
        return None
    weight = model.embed.weight
    config = AutoConfig.for_model(**hf_config(model.config, weight.dtype))
    theirs = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).to(weight.device).eval()
    parameters, state = dict(model.named_parameters()), {}
    for name, (ours, row, rows) in hf_tensors(model.config).items():
        state[name] = parameters[ours].detach()[row : row + rows]
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
    left_padded = partial(pad_sequence, batch_first=True, padding_side="left")
    rows = [torch.tensor(prompt, device=theirs.device) for prompt in prompts]
    ids = left_padded(rows)
    out = theirs.generate(
        ids,
        attention_mask=left_padded([torch.ones_like(row) for row in rows]),
        do_sample=not greedy,
        top_k=None if greedy else 0,
        max_new_tokens=max(limits),
        min_new_tokens=max(limits),
        pad_token_id=0,
        eos_token_id=None,
        # transformers compiles the step of a static cache by itself, on a GPU
        cache_implementation="static" if static else None,
    )
    return out[:, ids.shape[1] :]


def transformers_speed(theirs, prompts, steps, static):
    """Tokens a second of its decode steps alone: what `steps` more tokens take."""

    def seconds(n):
        return timed(theirs.device, lambda: transformers_generate(theirs, prompts, [n], static))

    for _ in range(2 if static and theirs.device.type == "cuda" else 1):  # the first compiles
        first, all_steps = seconds(1), seconds(steps + 1)
    return len(prompts) * steps / max(all_steps - first, 1e-9)


def decode(args):
    """Rows of one length, decoded together; the share of the memory's speed that decoding
    reaches."""
    if args.context <= args.steps // 2:
        raise ValueError(
            f"--context {args.context} is the mean over --steps {args.steps}: make it longer"
        )
    model = build(args)
    length = args.context - args.steps // 2
    prompts = random_prompts(model.config, [length] * args.batch, args.seed)
    sampler = Sampler(model, args.batch, length + args.steps + 1, args.compile)
    # compiles, records, warms up
    first = timed(args.device, lambda: sampler.generate(prompts[:1], args.batch, 2))
    seconds_on_device = device_seconds(sampler) if sampler.capture else None
    sampler.generate(prompts, 1, args.steps)
    stats = sampler.stats
    seconds = stats["decode_seconds"]
    weights, kv = step_bytes(model.config, model.embed.weight.itemsize)
    speed = (weights + kv * args.batch * args.context) * args.steps / seconds
    copy = copy_speed(args.device)
    out = describe(args, model) | {
        "first_call_s": first,
        "tok_s": stats["tokens"] / seconds,
        "ms_step": 1e3 * seconds / args.steps,
        "GB_s": speed / 1e9,
        "copy_GB_s": copy / 1e9,
        "share_of_copy": speed / copy,
        "prefill_tok_s": stats["prompt_tokens"] / stats["prefill_seconds"],
        "recompiles": stats["recompiles"],
    }
    if seconds_on_device:
        out["host_overhead"] = seconds / seconds_on_device() - 1
    sampler.release()
    theirs = transformers_model(model) if args.versus else None
    if theirs:
        for cache in ("dynamic", "static"):
            speed = transformers_speed(theirs, prompts, args.steps, cache == "static")
            out[f"transformers_{cache}_tok_s"] = speed
            out[f"over_transformers_{cache}"] = out["tok_s"] / speed
    return out


def device_seconds(sampler):
    """From here on, time what `sampler.decode` enqueues by the GPU's own clock; returns a function
    that gives the seconds so far."""
    decode, spans = sampler.decode, []

    def timed_decode(*a):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        decode(*a)
        end.record()
        spans.append((begin, end))

    def seconds():
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    sampler.decode = timed_decode
    return seconds


def fixed_batches(sampler, prompts, limits):
    """What an engine without refill does: a batch takes as long as its longest row, and all of its
    rows are computed."""
    shrink, sampler.shrink = sampler.shrink, False
    for start in range(0, len(prompts), sampler.slots):
        batch = slice(start, start + sampler.slots)
        sampler.generate(prompts[batch], 1, limits[batch])
    sampler.shrink = shrink


def transformers_batches(theirs, prompts, limits, size):
    """The requests in batches of transformers, sorted by length of prompt: so it pads least."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        transformers_generate(theirs, [prompts[i] for i in batch], [limits[i] for i in batch])


def workload(args):
    """Ragged requests, first come first served: refilled slots, the same engine in fixed batches,
    transformers at several batch sizes.

    A response's length stands for the place where a model would have stopped: no side sorts by it.
    """
    model, g = build(args), random.Random(args.seed)
    lengths = [g.randint(*args.prompt) for _ in range(args.requests)]
    limits = [g.randint(*args.output) for _ in range(args.requests)]
    tokens = sum(limits)
    prompts = random_prompts(model.config, lengths, args.seed)
    longest = args.prompt[1] + args.output[1]
    sampler = Sampler(model, args.slots, longest + 1, args.compile)
    sampler.generate(prompts[:1], 1, 2)  # compiles, records, warms up
    out = describe(args, model) | {"requests": args.requests, "slots": sampler.slots}

    def refilled():
        sampler.generate(prompts, 1, limits, seed=args.seed, progress="refilled slots")
        out.update(sampler.stats)

    sides = {"refilled": refilled}
    if args.fixed:
        sides["fixed"] = partial(fixed_batches, sampler, prompts, limits)
    theirs = transformers_model(model) if args.versus else None
    if theirs:
        for size in args.versus_batches.split(","):
            batches = partial(transformers_batches, theirs, prompts, limits, int(size))
            sides[f"transformers_{size}"] = batches
    turns = in_turns(args.device, sides, args.repeats)
    speeds = {name: tokens / min(seconds) for name, seconds in turns.items()}
    out |= {f"{name}_tok_s": speed for name, speed in speeds.items()}
    others = [speed for name, speed in speeds.items() if name.startswith("transformers")]

    # of reading alone: weights once a step, and the keys and values that each token sees
    weights, kv = step_bytes(model.config, model.embed.weight.itemsize)
    steps = max(max(limits), tokens / sampler.slots)
    seen = sum(n * p + n * (n + 1) // 2 for n, p in zip(limits, lengths, strict=True))
    bound = tokens / (weights * steps + kv * seen) * copy_speed(args.device)
    speed = speeds["refilled"]
    out |= {
        "bound_tok_s": bound,
        "share_of_bound": speed / bound,
        "over_fixed": speed / speeds["fixed"] if args.fixed else None,
        "over_transformers": speed / max(others) if others else None,
    }
    if args.profile:
        first = partial(sampler.generate, prompts[: sampler.slots], 1, 16)
        out["outside_matmul"] = outside_matmul(first)
    return out


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def outside_matmul(f):
    """Share of the operators' own CPU time that is not a matrix product, over one run of f."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    total = products = 0
    for event in profile.key_averages():
        if event.key.startswith(("aten::", "mkl")):
            total += event.self_cpu_time_total
        if event.key in PRODUCTS:
            products += event.self_cpu_time_total
    return 1 - products / total


# --------------------------------------------------------------------------------------------------
# training and analysis


def layer_of(args, n_layers):
    """--layer, or the last; ValueError where there is no such layer."""
    if args.layer and args.layer > n_layers:
        raise ValueError(f"--layer {args.layer}: there are {n_layers}")
    return args.layer or n_layers


def ragged_responses(config, args):
    """Responses of 2 x --tokens tokens or a little more: one of the --longest, the others' lengths
    of mean 0.4 of it, an eighth of the longest their prompt."""
    g, longest = random.Random(args.seed), args.longest
    prompt = math.ceil(longest / 8)
    lengths = [longest]
    while sum(lengths) < 2 * args.tokens:
        lengths.append(max(prompt + 1, int(longest * g.random() ** 1.5)))
    rows = random_prompts(config, lengths, args.seed)
    return [random_response(ids, prompt, g) for ids in rows]


def step(args):
    """One update on ragged responses (mean length 0.4 of the longest): packed against padded,
    tokens and FLOP/s, peak memory."""
    model, device = build(args), args.device
    dtype = model.embed.weight.dtype
    layer = layer_of(args, model.config.n_layers)
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    responses = ragged_responses(model.config, args)
    if dtype == torch.float32:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    else:
        optimizer = SplitAdamW(model.parameters())

    def update(pack):
        backward(InternalPolicy(model, layer=layer), responses, args.tokens, pack=pack)
        optimizer.step()
        optimizer.zero_grad()

    sides = {"packed": partial(update, True), "padded": partial(update, False)}
    for f in sides.values():
        f()  # compiles, and makes the moments
    rate = matmul_speed(device, dtype)
    seconds = paired(device, sides, args.repeats)
    lengths = [r.total_length for r in responses]
    tokens = sum(lengths)
    flops = 3 * forward_flops(model, responses, layer)
    out = describe(args, model) | {
        "layer": layer,
        "tokens": tokens,
        "mean_over_max": tokens / len(lengths) / max(lengths),
        "seconds": seconds,
        "tok_s": {name: tokens / s for name, s in seconds.items()},
        "matmul_tflop_s": rate / 1e12,
        "share_of_matmul": {name: flops / s / rate for name, s in seconds.items()},
        "packed_over_padded": seconds["padded"] / seconds["packed"],
        "peak_GB": {name: peak_gb(device, f) for name, f in sides.items()},
    }
    if device.type == "cuda":
        out["held_GB"] = torch.cuda.memory_allocated() / 1e9
    return out


def logprobs(args):
    """token_logprobs against full logits and autograd: time of forward and backward, and memory
    beside h, E and their gradients."""
    config, device, n = preset_config(args.like), args.device, args.tokens
    V, D = config.vocab_size, config.d_model
    g = torch.Generator(device).manual_seed(args.seed)
    h = torch.randn(n, D, generator=g, device=device).requires_grad_()
    E = torch.randn(V, D, generator=g, device=device).mul_(D**-0.5).requires_grad_()
    targets = torch.randint(V, (n,), generator=g, device=device)

    def forward(n):
        return token_logprobs(h[:n], E, targets[:n], chunk=args.chunk)[0]

    def ours():  # gradients are given back at once: none is held when the next side starts
        torch.autograd.grad(forward(n).sum(), (h, E))

    def naive():
        logprobs = (h @ E.T).log_softmax(-1).gather(1, targets[:, None])
        torch.autograd.grad(logprobs.sum(), (h, E))

    ours()
    seconds = paired(device, {"ours": ours, "naive": naive}, args.repeats)
    memory = {"ours": peak_gb(device, ours), "naive": peak_gb(device, naive)}
    with torch.no_grad():
        memory["forward"] = peak_gb(device, lambda: forward(n))
        memory["forward of half"] = peak_gb(device, lambda: forward(n // 2))
    return {
        "tokens": n,
        "V": V,
        "D": D,
        "chunk": args.chunk,
        "device": str(device),
        "seconds": seconds,
        "peak_GB": memory,
        "time_over_naive": seconds["ours"] / seconds["naive"],
        "memory_over_naive": memory["ours"] / max(memory["naive"], 1e-9),
    }


PROMPT, LENGTH = 64, 256  # tokens of a prompt, and with its response, in `bupo`


def narrow_model(args):
    """28 blocks as narrow as --width, all else in qwen3-0.6b's proportions, random weights."""
    wide, D = preset_config("qwen3-0.6b"), args.width
    scale = D / wide.d_model
    V, d_mlp = int(wide.vocab_size * scale), int(wide.d_mlp * scale)
    config = Config("qwen3", V, D, wide.n_layers, 4, 2, D // 2, d_mlp, tied=True)
    return empty(config, torch.float32, args.device).init_weights(args.seed)


def update_by_all_blocks(model, responses, layer):
    """Gradient of pi^l by the reference's way: every block and both heads in the forward; the loss
    is that of H^l."""
    tokens = sum(len(r.ids) for r in responses)
    for micro in micro_batches(responses, 2048):
        batch = collate(micro, model.unembedding.device)
        states = [s.resid_post for s in model.stream(batch.ids)]
        with torch.no_grad():
            model.unembed(states[-1].flatten(0, 1)[batch.positions])
        h = states[layer - 1].flatten(0, 1)[batch.positions]
        logprobs = model.unembed(h, layer).log_softmax(-1)
        own = logprobs.gather(1, batch.targets[:, None])[:, 0]
        (-(own * batch.advantages).sum() / tokens).backward()


def bupo(args):
    """An update at an internal layer against the same at full depth, and against running all blocks
    to read H^l, as the reference does."""
    model = narrow_model(args)
    g = random.Random(args.seed)
    c = model.config
    layer = layer_of(args, c.n_layers)
    prompts = random_prompts(c, [LENGTH] * (args.tokens // LENGTH), args.seed)
    responses = [random_response(ids, PROMPT, g) for ids in prompts]

    def update(l):
        model.zero_grad()
        backward(InternalPolicy(model, layer=l), responses, 2048)

    def reference():
        model.zero_grad()
        update_by_all_blocks(model, responses, layer)

    def gradients():
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    reference()
    theirs = gradients()
    update(layer)
    own = gradients()
    apart = [((own[name] - grad).norm() / grad.norm()).item() for name, grad in theirs.items()]
    sides = {"internal": partial(update, layer), "full": partial(update, c.n_layers)}
    seconds = paired(args.device, sides | {"reference": reference}, args.repeats)
    body = sum(p.numel() for p in model.blocks.parameters())
    # response positions only, and a fourth product: recomputed logits
    head = c.vocab_size * c.d_model * (1 - PROMPT / LENGTH) * 4 / 3
    flops = (body * layer / c.n_layers + head) / (body + head)
    time_fraction = seconds["internal"] / seconds["full"]
    return {
        "layer": layer,
        "layers": c.n_layers,
        "gradients_apart": max(apart),
        "same_parameters": own.keys() == theirs.keys(),
        "seconds": seconds,
        "flop_fraction": flops,
        "time_fraction": time_fraction,
        "over_flop_fraction": time_fraction / flops,
        "faster_than_reference": seconds["reference"] / seconds["internal"],
    }


def optimizer(args):
    """Nanoseconds a parameter of one optimizer step: torch's fused AdamW on float32, SplitAdamW on
    bfloat16."""

    def weights(dtype):
        p = torch.randn(args.tokens, 1024, device=args.device).mul_(0.02).to(dtype)
        p = torch.nn.Parameter(p)
        p.grad = torch.randn_like(p)
        return [p]

    made = {
        "adamw": torch.optim.AdamW(weights(torch.float32), lr=1e-6, fused=True),
        "split-m32": SplitAdamW(weights(torch.bfloat16), moment_dtype=torch.float32),
        "split": SplitAdamW(weights(torch.bfloat16)),
    }
    sides = {name: optimizer.step for name, optimizer in made.items()}
    for f in sides.values():
        f()  # makes the moments
    seconds = paired(args.device, sides, args.repeats)
    n = args.tokens * 1024
    return {
        "parameters": n,
        "ns_per_parameter": {name: 1e9 * s / n for name, s in seconds.items()},
        "bytes_per_parameter": {name: bytes_per_parameter(name) for name in sides},
        "device": str(args.device),
    }


def quantities(logp, final, token):
    """Of log-probs [T,V]: entropy, rank of the token, best five, KL of the final policy to them."""
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    rank = (logp > logp.gather(1, token)).sum(-1)
    kl = (final.exp() * (final - logp)).sum(-1)
    return entropy, rank, p.topk(5, -1), kl


def entropy_by_hooks(model, ids):
    """The final policy's entropy [T], after all that hooks on attention, MLP and block would give:
    input and output of each unembedded, every quantity from its own full log-softmax."""
    ids = ids.to(model.unembedding.device)
    token, kept = ids[1:, None], []
    for s in model.stream(ids[None, :-1]):
        block = model.blocks[s.layer - 1]
        kept += [s.resid_pre, block.attn_norm(s.resid_pre), s.attn_out, s.resid_mid]
        kept += [s.resid_mid, block.mlp_norm(s.resid_mid), s.mlp_out, s.resid_post]
    final = model.unembed(kept[-1][0]).log_softmax(-1)
    for h in kept:
        quantities(project(h[0], model.unembedding).log_softmax(-1), final, token)
    return quantities(final, final, token)[0]


@torch.no_grad()
def lens(args):
    """decompose.measure against hooks that keep every state and unembed the input and the output of
    each block, as the reference does."""
    model, device = build(args), args.device
    c = model.config
    ids = torch.tensor(random_prompts(c, [args.tokens + 1], args.seed)[0])

    def ours():
        return pick(measure(model, ids, 1, chunk=args.chunk), "final")

    def reference():
        return entropy_by_hooks(model, ids)

    apart = (torch.as_tensor(ours()) - reference().cpu()).abs().max().item()
    seconds = paired(device, {"ours": ours, "reference": reference}, args.repeats)
    memory = {"ours": peak_gb(device, ours), "reference": peak_gb(device, reference)}
    return {
        "tokens": args.tokens,
        "layers": c.n_layers,
        "V": c.vocab_size,
        "entropies_apart": apart,
        "seconds": seconds,
        "peak_GB": memory,
        "faster": seconds["reference"] / seconds["ours"],
        "memory": memory["ours"] / max(memory["reference"], 1e-9),
    }


# --------------------------------------------------------------------------------------------------
# the commands and their flags


def span(text):
    """ "32-256" as (32, 256)."""
    low, _, high = text.partition("-")
    if low.isdigit() and high.isdigit() and 0 < int(low) <= int(high):
        return int(low), int(high)
    raise argparse.ArgumentTypeError(f"{text}: want a range such as 32-256")


# flag: its type, or the values it may have, and what it is
FLAGS = {
    "like": (str, "preset whose shape the model has"),
    "layers": (natural, "blocks; none given: the preset's"),
    "tokenizer": (Path, "folder whose tokenizer files are copied beside the weights"),
    "out": (Path, "folder to write; none given: out/random-LIKE-LAYERS"),
    "dtype": (("float32", "bfloat16"), "of weights; none given: bfloat16 on a GPU, else float32"),
    "device": (str, "cpu or cuda; auto: a GPU when there is one"),
    "threads": (natural, "CPU threads; none given: torch's"),
    "compile": (bool, "compile the decode step, or a step's blocks; neither given: on a GPU"),
    "seed": (int, "of weights, prompts and lengths"),
    "versus": (bool, "time transformers' generate too, when it is installed"),
    "batch": (natural, "rows decoded together"),
    "context": (natural, "tokens a row holds, mean over the run"),
    "steps": (natural, "tokens decoded a row"),
    "requests": (natural, "how many"),
    "prompt": (span, "tokens in, uniform over a range"),
    "output": (span, "tokens out, uniform over a range"),
    "slots": (natural, "rows decoded together; none given: 64, on a GPU what fits, at most 256"),
    "fixed": (bool, "time the same engine in fixed batches too"),
    "versus-batches": (str, "batch sizes for transformers, the best counts"),
    "profile": (bool, "also the share of CPU time outside matrix products"),
    "repeats": (natural, "turns of every side; of a workload the best counts, else the median"),
    "tokens": (natural, "in a micro-batch or in all; of an optimizer: rows of 1,024 parameters"),
    "layer": (natural, "internal layer whose policy is trained; none given: the last"),
    "longest": (natural, "tokens of the longest response with its prompt"),
    "recompute": (bool, "as in train.py"),
    "chunk": (natural, "rows of logits held at once"),
    "width": (natural, "D; all else keeps qwen3-0.6b's proportions"),
}
REQUIRED = object()
MACHINE = {"device": "auto", "threads": None, "seed": 0}
MODEL = {"like": "qwen3-0.6b", "layers": None, "dtype": None, **MACHINE}
DECODING = {**MODEL, "compile": None, "versus": False}
# command: its flags and their defaults
COMMANDS = {
    init: {"like": REQUIRED, "layers": None, "tokenizer": None, "out": None, "seed": 0},
    decode: {**DECODING, "batch": 16, "context": 1024, "steps": 64},
    workload: {
        **DECODING,
        "requests": 256,
        "prompt": "100-1024",
        "output": "100-1024",
        "slots": None,
        "fixed": False,
        "versus-batches": "16,32,64",
        "repeats": 1,
        "profile": False,
    },
    step: {
        **MODEL,
        "compile": None,
        "recompute": False,
        "layer": None,
        "tokens": 2048,
        "longest": 512,
        "repeats": 3,
    },
    logprobs: {**MACHINE, "like": "qwen3-0.6b", "tokens": 1024, "chunk": 256, "repeats": 3},
    bupo: {**MACHINE, "layer": 7, "width": 128, "tokens": 2048, "repeats": 3},
    optimizer: {**MACHINE, "tokens": 4096, "repeats": 3},
    lens: {**MODEL, "layers": 4, "dtype": "float32", "tokens": 512, "chunk": 128, "repeats": 3},
}


def add_flag(parser, name, default):
    """A flag of FLAGS, with the default that a command gives it."""
    kind, text = FLAGS[name]
    how = {"type": kind}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif isinstance(kind, tuple):
        how = {"choices": kind}
    needed = default is REQUIRED
    if default and not needed:
        text += f" (default {default})"
    parser.add_argument(f"--{name}", default=default, required=needed, help=text, **how)


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub = p.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for run, flags in COMMANDS.items():
        text = run.__doc__
        short = text.partition(". ")[0]
        q = sub.add_parser(run.__name__, help=short, description=text, allow_abbrev=False)
        q.set_defaults(run=run)
        for name, default in flags.items():
            add_flag(q, name, default)
    bench_gpu.add_parser(sub)
    args = p.parse_args(argv)
    if args.command in ("init", "gpu"):
        args.run(args)
        return
    args.device = torch.device(pick_device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    if "compile" in args and args.compile is None:
        args.compile = args.device.type == "cuda"
    out = {"command": args.command, **args.run(args)}
    for name, value in bench_gpu.rounded(out).items():
        print(f"{name:26} {value}")
    print(json.dumps(out))


if __name__ == "__main__":
    guarded(main)
