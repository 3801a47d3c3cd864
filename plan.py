"""What a run will do and the memory it takes, said before it starts: `--dry-run` stops there."""
import os
import shutil
import sys

import torch

import parallel
from model import Config, Transformer
from optimizer import BYTES


def memory_plan(config: Config, args, on_cuda: bool) -> dict[str, float]:
    """Gigabytes a step needs on each GPU, by part.

    Activations kept for the backward are counted as 6 D + 3 (H + 2K) E + 4 d_mlp values a token and block, an estimate; with --recompute
    as D a token and block, and one block's worth of the rest.
    """
    c, n, size = config, parameters(config), getattr(torch, args.dtype).itemsize
    row = args.max_prompt_tokens + args.max_new_tokens
    tokens, compute = max(args.micro_tokens, row), 2 if on_cuda else size
    kept = 6 * c.d_model + 3 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + 4 * c.d_mlp
    per = {"weights": size, "gradients": size, "remainder": 0, "moments": 2 * size} if args.optimizer == "adamw" else BYTES[args.optimizer]
    shards, whole = parallel.world() // args.replicas, n * compute + (2 - c.tied) * c.vocab_size * c.d_model * (size - compute)
    plan = {"weights": n * per["weights"] / shards, "gradients": n * per["gradients"] / shards,
            "optimizer state": n * (per["moments"] + per["remainder"]) / shards,
            **({"copy to sample from": whole} if parallel.world() > 1 else {}),
            "KV cache (sampling)": 2 * c.n_layers * args.slots * row * c.n_kv_heads * c.head_dim * compute,
            "activations (training)": tokens * (c.n_layers * c.d_model + kept if args.recompute else c.n_layers * kept) * compute,
            "logit chunks (training)": 2 * min(args.logit_chunk, tokens) * c.vocab_size * 4 + c.vocab_size * c.d_model * 4}
    return {k: v / 1e9 for k, v in plan.items()}


def parameters(c: Config) -> int:
    """Parameters of a model of this shape."""
    with torch.device("meta"): return sum(p.numel() for p in Transformer(c).parameters())


def show_plan(run):
    """What will be done, the memory it takes, and the first prompt decoded."""
    args, c, device = run.args, run.model.config, run.model.unembedding.device
    print(f"{args.model}: {parameters(c) / 1e6:,.1f} M parameters, {c.n_layers} layers, V = {c.vocab_size:,} ({run.n_vocab:,} used), "
          f"{args.dtype} with {args.optimizer} on {device}, prompt format {run.tokenizer.format}, stop ids {list(run.tokenizer.stop_ids)}")
    print(f"{run.schedule}; {args.steps} steps x {args.prompts} problems x {args.group} responses, "
          f"{-(-args.prompts // args.mini_prompts)} updates a step; {len(run.prompts):,} problems"
          + (f" ({run.dropped} more dropped: prompt too long)" if run.dropped else ""))
    for layer, _ in run.schedule.phases:
        print(f"layer {layer} is hidden_states[{layer}] in transformers and blocks.{layer - 1}.hook_resid_post in TransformerLens")
    plan = memory_plan(c, args, device.type == "cuda")
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print("memory, GB: " + ", ".join(f"{k} {v:.2f}" for k, v in plan.items()) + f"; together at most {sum(plan.values()):.2f} of the "
          f"{there / 1e9:.0f} there are")
    size = (plan["weights"] + plan["optimizer state"]) * parallel.world() / args.replicas
    free = shutil.disk_usage(next(p for p in (args.out.resolve(), *args.out.resolve().parents) if p.exists())).free / 1e9
    if free < 2 * size:
        print(f"warning: checkpoints take {size:.1f} GB each, two stand side by side at times, and {free:.1f} GB are free for {args.out}",
              file=sys.stderr)
    print("the value of the loss says nothing (it is about -mean(length x advantage) / mean(length)): watch the reward")
    print(f"first prompt:\n{run.tokenizer.decode(run.prompts[0][1])}", flush=True)
