"""Models of any preset's true shape with random weights: everything can be tried, and timed, without downloading anything.

    python bench.py init --like qwen3-0.6b --layers 4 --tokenizer FOLDER      writes out/random-qwen3-0.6b-4
    python train.py --model out/random-qwen3-0.6b-4 --data problems.jsonl ...
"""
import argparse
import shutil
from pathlib import Path

import torch

from eval import guarded, natural
from model import HUB, TOKENIZER_FILES, Config, Transformer, save
from tokenizer import load as load_tokenizer

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def qwen3(D, L, H, K, M, tied):
    return Config("qwen3", 151936, D, L, H, K, 128, M, 1e-6, 1e6, None, tied, 40960)


def qwen2(D, L, H, K, M, tied, V=151936, theta=1e6, max_len=32768):
    return Config("qwen2", V, D, L, H, K, D // H, M, 1e-6, theta, None, tied, max_len)


def llama(D, L, H, K, E, M, tied, factor):
    return Config("llama", 128256, D, L, H, K, E, M, 1e-5, 5e5, {"factor": factor, **LLAMA3}, tied, 131072)


# the shapes behind the presets; variants (-base, -instruct) share that of their size
SHAPES = {
    "qwen3-0.6b": qwen3(1024, 28, 16, 8, 3072, True), "qwen3-1.7b": qwen3(2048, 28, 16, 8, 6144, True),
    "qwen3-4b": qwen3(2560, 36, 32, 8, 9728, True), "qwen3-8b": qwen3(4096, 36, 32, 8, 12288, False),
    "qwen3-14b": qwen3(5120, 40, 40, 8, 17408, False),
    "qwen2.5-0.5b": qwen2(896, 24, 14, 2, 4864, True), "qwen2.5-1.5b": qwen2(1536, 28, 12, 2, 8960, True),
    "qwen2.5-3b": qwen2(2048, 36, 16, 2, 11008, True), "qwen2.5-7b": qwen2(3584, 28, 28, 4, 18944, False, 152064, max_len=131072),
    "qwen2.5-math-1.5b": qwen2(1536, 28, 12, 2, 8960, True, theta=1e4, max_len=4096),
    "qwen2.5-math-7b": qwen2(3584, 28, 28, 4, 18944, False, 152064, theta=1e4, max_len=4096),
    "deepseek-r1-distill-qwen-1.5b": qwen2(1536, 28, 12, 2, 8960, False, theta=1e4, max_len=131072),
    "deepseek-r1-distill-qwen-7b": qwen2(3584, 28, 28, 4, 18944, False, 152064, theta=1e4, max_len=131072),
    "llama-3.2-1b": llama(2048, 16, 32, 8, 64, 8192, True, 32.0), "llama-3.2-3b": llama(3072, 28, 24, 8, 128, 8192, True, 32.0),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 128, 14336, False, 8.0),
    "octothinker-3b": llama(3072, 28, 24, 8, 128, 8192, True, 32.0), "octothinker-8b": llama(4096, 32, 32, 8, 128, 14336, False, 8.0),
    "mistral-nemo": Config("mistral", 131072, 5120, 40, 32, 8, 128, 14336, 1e-5, 1e6, None, False, 131072),
}


def shape(name: str) -> Config:
    """The true shape of a preset, with or without -base and -instruct; ValueError naming those there are."""
    if config := SHAPES.get(name.removesuffix("-base").removesuffix("-instruct")): return config
    raise ValueError(f"{name}: no such shape; there are {', '.join(SHAPES)}")


def init(args):
    """Write a folder of random weights that loads like a download."""
    config = shape(args.like)
    if args.layers: config.n_layers = args.layers
    out = Path(args.out or f"out/random-{args.like}-{config.n_layers}")
    used = load_tokenizer(args.tokenizer).n_vocab if args.tokenizer else 0
    if used > config.vocab_size:
        raise ValueError(f"{args.tokenizer} uses {used} ids, {args.like} has rows for {config.vocab_size}: they do not belong together")
    need, free = sum(p.numel() for p in meta(config).parameters()) * 2, shutil.disk_usage(Path.cwd()).free
    if need > free: raise OSError(f"{out}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer --layers")
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(config).init_weights(args.seed)
    save(model, out, tokenizer_from=args.tokenizer)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:,.1f} M random bfloat16 parameters of {args.like}'s shape, {config.n_layers} layers"
          + ("" if args.tokenizer else f"; put a tokenizer beside them ({', '.join(TOKENIZER_FILES[:2])}) to use them with text"))
    print(out)


def meta(config):
    """The model without memory behind it."""
    with torch.device("meta"): return Transformer(config)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(required=True, metavar="COMMAND")
    q = sub.add_parser("init", help="write a folder of random weights in a preset's shape")
    q.set_defaults(run=init)
    q.add_argument("--like", required=True, help=f"preset: {', '.join(HUB)}")
    q.add_argument("--layers", type=natural, help="blocks (default: the preset's)")
    q.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied beside the weights")
    q.add_argument("--out", help="folder to write (default out/random-LIKE-LAYERS)")
    q.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    guarded(main)
