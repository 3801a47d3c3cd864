"""The embedded default: arithmetic, a byte-level tokenizer, and a one-minute supervised warm-up
that leaves a model able but unfocused.

The problems add and subtract three or four one-digit numbers. The warm-up shows two ways of
answering, and which one a problem gets is chance:

    7+8-5   worked    7+8=15, 15-5=10. \\boxed{10}    mostly right: it has learned to add
    7+8-5   blurted   \\boxed{13}                     a guess, right one time in eleven

So the model starts like a base model before RL: it can solve the problems, but mostly does not
bother to. Nothing tells it later that working is better, only the reward of the final answer; that
accuracy and length rise together is RL's own finding. Problems of five numbers are held out whole:
neither the warm-up nor RL ever shows so long a one.

    python train.py
    python train.py --model tiny-llama     the same without qk-norm: Llama's shape, not Qwen3's
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from grpo import Policy, collate, micro_batches
from model import Config, Transformer
from plumbing import arithmetic
from plumbing.data import Problem
from plumbing.hub import save_model
from plumbing.tokenizer import byte_alphabet, load_tokenizer
from rollout import Response

CONFIG = Config(
    "qwen3",
    vocab_size=260,
    d_model=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_mlp=192,
    tied=True,
    max_len=128,
)
MODELS = {"tiny": CONFIG, "tiny-llama": replace(CONFIG, family="llama")}
END = 256  # <|endoftext|>; ids 0..255 are the bytes


def worked(numbers):
    """The answer with its steps, as a string."""
    total, steps = numbers[0], []
    for n in numbers[1:]:
        steps.append(f"{total}{n:+d}={total + n}")
        total += n
    return f"{', '.join(steps)}. \\boxed{{{total}}}"


def blurted(numbers, rng):
    """A guess: off by up to six, right one time in eleven."""
    return f"\\boxed{{{max(0, sum(numbers) + rng.choice((-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6)))}}}"


def problems(n: int, seed: int, held_out=False, lengths=(3, 4)) -> list[Problem]:
    """n problems with their answers; the held-out ones are disjoint from all others, whatever the
    seeds.

    `load_problems("sums")` are those of seed 0, for any model.
    """
    pairs = arithmetic.sums(n, seed, held_out, lengths)
    return [Problem(text, answer) for text, answer in pairs]


def write_tokenizer(folder: Path):
    """A tokenizer.json with the 256 bytes as its vocabulary, no merges and one control token."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    end = {
        "id": END,
        "content": "<|endoftext|>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {letter: byte for byte, letter in enumerate(byte_alphabet())},
        "merges": [],
    }
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": bpe,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|endoftext|>",
        },
        "generation_config.json": {"eos_token_id": END},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def warm_up(folder: Path, seed: int, steps=600, batch=64, lr=3e-3, model="tiny") -> Path:
    """Train from scratch on worked and blurted answers and write a Hugging Face folder; an
    existing one of the same seed is kept.

    Most examples are worked while the additions are learned; in the last quarter four in five are
    blurted, which is the habit that RL then has to break. Returns the folder.
    """
    done = folder / "warm_up.json"
    settings = {"model": model, "seed": seed, "steps": steps, "batch": batch, "lr": lr}
    if done.exists() and done.read_text() == json.dumps(settings) + "\n":
        return folder
    print(f"first a model: a warm-up of about a minute, kept in {folder}", flush=True)
    write_tokenizer(folder)
    tokenizer, rng = load_tokenizer(folder), random.Random(seed)
    model = Transformer(MODELS[model]).init_weights(seed, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(steps), desc="warm-up", unit="step", leave=False, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * max(0.02, 1 - step / steps)
        examples = []
        for _ in range(batch):
            numbers = arithmetic.draw_sum(rng)
            answer = (
                worked(numbers)
                if rng.random() < (0.8 if step < 0.75 * steps else 0.2)
                else blurted(numbers, rng)
            )
            examples.append(
                Response(
                    tokenizer.chat(arithmetic.sum_text(numbers), system=""),
                    [*tokenizer.encode(answer), END],
                )
            )
        tokens, loss = sum(len(e.ids) for e in examples), 0.0
        for micro in micro_batches(examples, 4096):
            logprobs, _ = Policy(model).logprobs(collate(micro))
            part = -logprobs.sum() / tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss:.3f}")
    save_model(model, folder, tokenizer_from=folder)
    done.write_text(json.dumps(settings) + "\n")  # last: a warm-up cut short is done again
    return folder
