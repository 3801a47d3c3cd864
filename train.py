"""Train a language model with GRPO, or with BuPO: first the policy of an internal layer, then the
whole model.

    python train.py                                      the embedded default: minutes on a CPU
    python train.py --recipe words                       a real small model, on a laptop
    python train.py --model qwen3-4b --bupo-layer 30     the real thing, on a GPU
    python train.py --model qwen3-4b --bupo-layer 6 --bupo-steps 30      the paper's Qwen3-4B
    python train.py --model qwen3-4b --dry-run --memory 80               plan and memory, no GPU
    torchrun --nproc-per-node 8 train.py --model qwen3-8b                8 GPUs; see parallel.py

Each step samples a group of responses to each of a few problems from the model's own policy, grades
them, and takes a few optimizer steps on the clipped surrogate. The value of the loss says nothing;
watch the reward.

The run folder holds config.json, metrics.jsonl, samples.jsonl, step_000030/ (a Hugging Face folder
plus optimizer state) and figures. The same command run again resumes from the newest valid step.
Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 numerics, 6 memory, 7 another rank died, 8 the
disk is full or a checkpoint cannot be written (those before it stand), 75 ended by SIGTERM, SIGHUP
or SIGUSR1 with its state saved, 130 by Ctrl-C.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import decompose
import tiny
from bupo import Schedule, backward, forward_flops, policy_logprobs, stored_logprobs
from eval import answer, avg_at_k, encode_prompts
from grpo import Response, collate, group_advantages, overlong_penalty
from model import Transformer
from plumbing import checkpoint, cli, download, parallel
from plumbing import tokenizer as tokenizers
from plumbing.cli import Parser, guarded, natural, no_memory, pick_device, printable, short_name
from plumbing.data import (
    DataError,
    batch,
    fingerprint,
    is_evaluation,
    load_problems,
    needs_hub,
    span,
    without_shared,
)
from plumbing.hub import HUB, load_model, read_config, repository, resolve
from plumbing.kernels import compile_blocks, compile_errors, plain_blocks
from plumbing.memory import (
    CONTEXT,
    choose,
    default_new_tokens,
    flag,
    host_bytes,
    memory_plan,
    parameters,
    show_plan,
    table,
    wrapped,
)
from plumbing.optimizer import BYTES, SplitAdamW
from plumbing.recipes import RECIPES
from plumbing.rows import each_row, one_line, read_json
from plumbing.shapes import preset_config
from plumbing.signals import Signals, Stopped
from plumbing.tokenizer import SYSTEM, Tokenizer
from rollout import Sampler, fold
from tools import plot
from verify import verifiable

# settings that change the numbers of a run: a resume with other values is refused
MATHS = (
    "model",
    "model_commit",
    "data_sha256",
    "bupo_layer",
    "bupo_steps",
    "internal_norm",
    "prompts",
    "group",
    "mini_prompts",
    "clip_low",
    "clip_high",
    "dual_clip",
    "advantage",
    "loss",
    "kl",
    "tis",
    "overlong",
    "overlong_buffer",
    "refills",
    "lr",
    "weight_decay",
    "grad_clip",
    "temperature",
    "max_new_tokens",
    "max_prompt_tokens",
    "system",
    "thinking",
    "format",
    "verifier",
    "optimizer",
    "dtype",
    "seed",
)
# what stands for a value that follows from the model or the machine
LATE = {("max_new_tokens", None), ("bupo_layer", "auto"), ("optimizer", None), ("dtype", None)}


def sizes(text):
    """argparse type: gigabytes, one number or several with commas."""
    try:
        out = [float(part) for part in text.split(",")]
    except ValueError:
        out = [0.0]
    if not all(0 < gb < 1e6 for gb in out):
        raise argparse.ArgumentTypeError(f"{text!r}: give gigabytes, as 80 or 24,48,80")
    return out


def counts(text):
    """argparse type: whole numbers with commas between them, as text."""
    for part in text.split(","):
        cli.whole(part.strip() or "0")
    return text


def layers(text):
    """argparse type of --bupo-layer: none, auto, or layers from 1 with commas between them, as
    text."""
    for part in text.split(",") if text not in ("none", "auto", "") else ():
        try:
            natural(part.strip() or "1")
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f"{e}; or give auto, or none for plain GRPO") from None
    return text


def parser():
    p = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flags(title):
        group = p.add_argument_group(title)

        def add(flag, default, help, **kw):
            kw.setdefault("type", type(default)) if not isinstance(
                default, (bool, type(None))
            ) else None
            shown = (
                ""
                if default is None or kw.get("action")
                else f" (default {default})".replace("%", "%%")
            )
            group.add_argument(flag, default=default, help=help + shown, **kw)

        return add

    switch = argparse.BooleanOptionalAction
    add = flags("model and data")
    add("--model", "tiny", "tiny, a preset (qwen3-4b), a hub id or a folder", type=cli.given)
    add(
        "--recipe",
        None,
        "settings that belong to a model and its problems, see recipes.py; other flags override "
        "them",
        type=str,
        choices=tuple(RECIPES),
    )
    add(
        "--data",
        "deepmath",
        "problems: a named set or a .json, .jsonl or .parquet file",
        type=cli.given,
    )
    add("--limit", None, "only the first so many problems of --data", type=natural)
    add(
        "--difficulty",
        None,
        "only problems of this difficulty, as 5-8, where the set tells it",
        type=span,
    )
    add(
        "--train-on-test",
        False,
        "let --data be a set that is there to measure with",
        action="store_true",
    )
    add("--revision", None, "branch, tag or commit of a model on the hub", type=str)
    add("--eval-data", None, "held-out problems for accuracy before, during and after", type=str)
    add("--eval-every", 0, "steps between evaluations; 0: only before and after", type=cli.whole)
    add("--eval-limit", 256, "held-out problems, one sample each", type=natural)
    add("--system", SYSTEM, "system prompt")
    add(
        "--thinking",
        False,
        "Qwen3: leave thinking on (the paper turns it off)",
        action="store_true",
    )
    add("--format", "auto", "prompt format: auto, chatml, llama3, base")
    add(
        "--verifier",
        "nanobupo",
        "hendrycks is the reference's string equality",
        choices=("nanobupo", "hendrycks"),
    )

    add = flags("bottom-up policy optimization")
    add(
        "--bupo-layer",
        "none",
        "internal layer(s) trained first, from 1, as 6 or 6,26; auto: last "
        "layer with dH_mlp > 0; none: plain GRPO",
        type=layers,
    )
    add("--bupo-steps", "30", "steps of each internal phase, as 30 or 20,10", type=counts)
    add(
        "--internal-norm",
        "none",
        "norm before the unembedding at an internal layer; the paper has none",
        choices=("none", "final"),
    )

    add = flags("GRPO")
    add("--steps", 300, "rollout steps", type=natural)
    add("--prompts", 128, "problems a step", type=natural)
    add("--group", 8, "responses to each problem, G", type=natural)
    add(
        "--mini-prompts",
        32,
        "problems an optimizer update: 128 / 32 = 4 updates a step",
        type=natural,
    )
    add("--clip-low", 0.2, "clip below 1 - this", type=cli.share)
    add("--clip-high", 0.2, "clip above 1 + this; 0.28 is DAPO's clip-higher", type=cli.amount)
    add(
        "--dual-clip",
        10.0,
        "bound of the loss for negative advantages, in |A|; 0: off",
        type=cli.amount,
    )
    add(
        "--advantage",
        "grpo",
        "baseline and scale of the rewards",
        choices=("grpo", "dr_grpo", "rloo", "reinforce++"),
    )
    add(
        "--loss",
        "token-mean",
        "what a token weighs; dr_grpo divides by --max-new-tokens",
        choices=("token-mean", "seq-mean", "dr_grpo"),
    )
    add(
        "--kl",
        0.0,
        "coefficient of the k3 KL to the starting model, at the layer trained; holds "
        "a second copy of the weights",
        type=cli.amount,
    )
    add(
        "--tis",
        0.0,
        "truncate importance weights pi_old / pi_sampler at this, per token; 0: none",
        type=cli.amount,
    )
    add(
        "--refills",
        0,
        "dynamic sampling: times to replace groups of equal rewards by new problems (DAPO)",
        type=cli.whole,
    )
    add(
        "--overlong",
        "zero",
        "responses cut off by the limit: reward 0; mask: out of the loss; soft: also a penalty on "
        "length before it",
        choices=("zero", "mask", "soft"),
    )
    add(
        "--overlong-buffer",
        512,
        "tokens before the limit over which the soft penalty grows to 1",
        type=natural,
    )

    add = flags("sampling")
    add(
        "--temperature",
        1.0,
        "divides the logits, in sampling and in training alike",
        type=cli.positive,
    )
    add(
        "--max-new-tokens",
        None,
        "response tokens at most (default 7168, for llama 3072)",
        type=natural,
    )
    add(
        "--max-prompt-tokens",
        1024,
        "longer prompts are dropped and counted, never cut",
        type=natural,
    )
    add(
        "--slots",
        None,
        "responses decoded together; the KV cache is slots x (prompt + response) tokens (default "
        "64, on a GPU what fits)",
        type=natural,
    )
    add(
        "--compile",
        None,
        "compile the decode step and what stands between the products of a block (default: on a "
        "GPU)",
        action=switch,
    )

    add = flags("optimization")
    add("--lr", 1e-6, "AdamW learning rate, constant", type=cli.positive)
    add("--weight-decay", 0.01, "AdamW weight decay", type=cli.amount)
    add("--grad-clip", 1.0, "norm the gradient is scaled down to", type=cli.positive)
    add(
        "--micro-tokens",
        None,
        "tokens of one forward and backward: memory, not maths (default 16384, on a GPU what fits)",
        type=natural,
    )
    add(
        "--logit-chunk",
        None,
        "positions whose logits are held at once: chunk x V x 4 bytes, twice (default 256, on a "
        "GPU 1024)",
        type=natural,
    )
    add(
        "--optimizer",
        None,
        "adamw: float32 weights, 16 bytes a parameter with gradient and moments; split-m32: "
        "bfloat16 weights with an "
        "exact float32 master, 16 bytes; split: the same with a float16 first moment, 14 (default "
        "adamw, on a GPU a split one; "
        "see optimizer.py)",
        type=str,
        choices=tuple(BYTES),
    )
    add(
        "--offload",
        None,
        "split: keep the optimizer's state in host memory (default: on a GPU that needs it)",
        action=switch,
    )
    add(
        "--dtype",
        None,
        "what the model computes in (default bfloat16 on a GPU, else float32). Behind bfloat16 "
        "stands an exact "
        "float32 master, with one process that of the split optimizer, with torchrun the shards; "
        "float32 products that remain use TF32. "
        "float32 on a GPU is for finding errors",
        type=str,
        choices=("float32", "bfloat16"),
    )
    add(
        "--recompute",
        None,
        "run each block again in the backward instead of keeping its activations (default: on a "
        "GPU that needs "
        "it)",
        action=switch,
    )
    add(
        "--oom-retry",
        False,
        "out of memory in an update: halve --micro-tokens and do the update again",
        action="store_true",
    )

    add = flags("run")
    add("--out", None, "run folder (default out/MODEL)", type=str)
    add("--seed", 0, "everything random follows from it", type=cli.seed)
    add("--save-every", 30, "steps between checkpoints", type=natural)
    add("--keep", 2, "newest checkpoints kept; 0: all", type=cli.whole)
    add("--log-samples", 16, "responses of each step written to samples.jsonl", type=cli.whole)
    add(
        "--watch-layers",
        0,
        "steps between looks at the internal layer on fixed responses: "
        "cosine, entropies, perplexity; 0: none",
        type=cli.whole,
    )
    add("--device", "auto", "auto, cpu, cuda")
    add(
        "--replicas",
        1,
        "with torchrun: machines that hold a full set of weight shards each; 1: one set over all",
        type=natural,
    )
    add(
        "--dry-run",
        False,
        "show plan, first prompt and memory, then stop; needs neither weights nor a GPU",
        action="store_true",
    )
    add(
        "--memory",
        None,
        "with --dry-run: plan for a GPU of this many GB, or for several as 24,48,80",
        type=sizes,
    )
    add(
        "--fresh",
        False,
        "start anew; refuses a folder that holds a run unless --overwrite",
        action="store_true",
    )
    add("--overwrite", False, "with --fresh: delete the run that is there", action="store_true")
    add(
        "--override",
        False,
        "resume although settings that change the numbers differ",
        action="store_true",
    )
    return p


def parse(argv=None):
    p = parser()
    named = p.parse_known_args(argv)[0]
    if named.recipe is None and named.model == "tiny":
        named.recipe = "tiny"
    if named.recipe:
        p.set_defaults(recipe=named.recipe, **RECIPES[named.recipe])
    args = p.parse_args(argv)
    if args.group < 2:
        raise ValueError("--group must be at least 2: a group of one has no baseline")
    if 0 < args.dual_clip <= 1:
        raise ValueError(
            "--dual-clip must be above 1, or 0 for none: it would silence every negative advantage"
        )
    if args.watch_layers and not args.log_samples:
        raise ValueError(
            f"--watch-layers {args.watch_layers} looks at the responses of step 1, which "
            f"--log-samples 0 does "
            "not keep: add --watch-layers 0, or log at least 1"
        )
    # layers beyond the model's are refused when it is known
    Schedule.parse("1" if args.bupo_layer == "auto" else args.bupo_layer, args.bupo_steps, cli.MOST)
    if args.optimizer in ("split", "split-m32"):
        if args.dtype == "float32":
            raise ValueError(f"--optimizer {args.optimizer} needs --dtype bfloat16")
        args.dtype = "bfloat16"
    if args.offload and (args.optimizer == "adamw" or args.dtype == "float32"):
        raise ValueError("--offload needs --optimizer split or split-m32")
    if (
        args.optimizer == "adamw"
        and args.dtype == "bfloat16"
        and args.lr < 1e-5
        and parallel.world() == 1
    ):
        raise ValueError(
            f"--dtype bfloat16 with plain AdamW at --lr {args.lr:g} does not train: about 98 % of "
            f"the weights round back to "
            "where they were; use --optimizer split, or --dtype float32"
        )
    if is_evaluation(args.data) and not args.train_on_test:
        raise ValueError(
            f"--data {args.data} is there to measure with: add --train-on-test if training on it "
            f"is what you want"
        )
    out = Path(f"out/{short_name(args.model)}")
    args.out = (
        Path(args.out)
        if args.out
        else out.with_name(f"{out.name}-run")
        if out.resolve() == Path(args.model).resolve()
        else out
    )
    args.bupo_layer = args.bupo_layer or "none"
    args.mini_prompts = min(args.mini_prompts, args.prompts)
    if args.memory and not args.dry_run:
        raise ValueError("--memory is of a plan: add --dry-run")
    return args


# --------------------------------------------------------------------------------------------------
# what a run holds


@dataclass
class Run:
    """What a run works with, opened once."""

    args: argparse.Namespace
    model: Transformer
    tokenizer: Tokenizer
    sampler: Sampler
    prompts: list  # (Problem, prompt ids) to train on
    tests: list  # the same, held out; may be empty
    dropped: int  # problems whose prompt was too long
    data_sha256: str
    schedule: Schedule | None = None
    reference: Transformer | None = None  # the starting model, with a KL term only
    signals: Signals = field(default_factory=Signals)
    step: int = 0  # the step under way
    seconds: dict = field(default_factory=dict)  # what its parts took
    # updates in a row that were left out for want of finite gradients
    unfit: int = 0
    num_tokens: int = 0  # sampled so far, prompts included
    # whether it has been said that there is nothing to watch
    blind: bool = False
    # responses of step 1 as (ids, prompt length), see `watch`
    watched: list = field(default_factory=list)

    @property
    def n_vocab(self):
        """Ids from here on belong to no token: masked in sampling and in training."""
        return min(self.tokenizer.n_vocab, self.model.config.vocab_size)

    def respond(self, pairs, n, *name, bar=None):
        """n graded responses to each (problem, prompt ids), drawn with the noise of (seed, *name),
        of all ranks. Stopped, on all of them, when one has got a signal meanwhile."""
        a, mine = self.args, []
        with self.clock("grade"):
            with suppress(Stopped), self.signals.may_leave():
                mine = answer(
                    self.sampler,
                    self.tokenizer,
                    pairs,
                    n,
                    a.max_new_tokens,
                    a.temperature,
                    fold(a.seed, *name),
                    a.verifier,
                    bar,
                )
            if self.signals.agree():
                raise Stopped
            out = parallel.all_gather(mine)
        self.seconds["rollout"] = self.seconds.get("rollout", 0) + self.sampler.stats["seconds"]
        self.seconds["grade"] -= self.sampler.stats["seconds"]
        return out

    @contextmanager
    def clock(self, part):
        """Add the seconds spent in here to those of a part of the step."""
        start = time.perf_counter()
        yield
        if self.model.unembedding.is_cuda:
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    def policy(self):
        """Keywords of policy_logprobs and of what calls it."""
        a = self.args
        return dict(temperature=a.temperature, n_vocab=self.n_vocab, chunk=a.logit_chunk)


# --------------------------------------------------------------------------------------------------
# before the first step


def settings(args) -> dict:
    """The flags as JSON holds them."""
    return {
        k: v if isinstance(v, (int, float, type(None))) else str(v) for k, v in vars(args).items()
    }


def check_folder(args, now, keys):
    """Refuse to mix two runs, or a run and a model, in one folder. Checkpoints make it a run,
    whatever logs are there."""
    out = args.out
    for name in (*checkpoint.LOGS, "config.json"):
        if (out / name).exists() and not (out / name).is_file():
            raise ValueError(f"{out / name}: not a file: move it away, or name another --out")
    if args.fresh and not args.overwrite and checkpoint.holds_run(out):
        raise ValueError(
            f"{out} holds a run: add --overwrite to delete it, leave out --fresh to resume it, or "
            f"name another --out"
        )
    saved = read_json(out / "config.json") if (out / "config.json").exists() else {}
    if "model_type" in saved:
        raise ValueError(f"{out} holds a model: name another --out for the run")
    if args.fresh or args.override or not checkpoint.has_checkpoints(out):
        return
    if not saved:
        raise ValueError(
            f"{out} holds checkpoints and no config.json: what settings they were made with is not "
            f"known; put "
            "it back, name another --out, or add --override"
        )
    if changed := checkpoint.changed_settings(saved, now, keys):
        raise ValueError(
            f"{out} holds a run with other settings ({'; '.join(changed)}): set them back, name "
            f"another --out, "
            "or add --override"
        )


def is_gpu(device) -> bool:
    """Whether a device's name, such as cuda or cuda:1, is that of a GPU."""
    return torch.device(device).type == "cuda"


def find_model(args):
    """Shape and folder of --model. The folder is None where nothing is read from one: of the
    embedded default, and of a preset in a dry run, which knows its shape and downloads nothing."""
    if args.model == "tiny":
        return tiny.CONFIG, None
    if args.dry_run and not Path(args.model).is_dir() and args.model.lower() in HUB:
        return preset_config(args.model), None
    # a run goes on with the model it began with, although the hub's may have moved
    commit = args.revision or earlier_settings(args).get("model_commit") or None
    folder = parallel.on_rank_0(resolve, args.model, commit)
    return read_config(read_json(folder / "config.json")), folder


def earlier_settings(args) -> dict:
    """Of the run that this one goes on with; {} for a new one."""
    out = args.out
    if args.fresh or not any(out.glob("step_*")) or not (out / "config.json").exists():
        return {}
    return read_json(out / "config.json")


def settle(args, config, device):
    """Fill in the flags that follow from the model and the kind of machine. What an earlier part of
    the run settled stays."""
    on_gpu, saved = is_gpu(device), earlier_settings(args)
    args.dtype = args.dtype or saved.get("dtype")
    args.optimizer = args.optimizer or saved.get("optimizer")
    if args.max_new_tokens is None:
        args.max_new_tokens = default_new_tokens(config, args.max_prompt_tokens)
    if args.max_prompt_tokens + args.max_new_tokens > config.max_len:
        raise ValueError(
            f"--max-prompt-tokens {args.max_prompt_tokens} + --max-new-tokens "
            f"{args.max_new_tokens} exceed the "
            f"{config.max_len} tokens this model was made for: lower one of them"
        )
    if args.dtype is None:
        args.dtype = "bfloat16" if on_gpu or args.offload else "float32"
    if args.compile is None:
        args.compile = on_gpu
    if args.logit_chunk is None:
        args.logit_chunk = 1024 if on_gpu else 256
    if parallel.world() > 1 and args.optimizer is None:
        args.optimizer = "adamw"


def settle_memory(args, config, device, memory, host):
    """Fill in the flags that follow from the memory there is; returns (flag, value, reason) of
    each.

    memory, host  bytes of a GPU that are free, and of the machine around it; of no meaning on a CPU
    """
    chosen = parallel.on_rank_0(
        choose, config, args, memory, host, is_gpu(device), parallel.world()
    )
    for name, value, _ in chosen:
        setattr(args, name, value)
    return chosen


def free_memory(device) -> float:
    """Bytes for this run: of a GPU what other programs leave, else what the machine has."""
    if not is_gpu(device):
        return host_bytes()
    # our own context is there by now, and in the plan; the rest is for what the plan does not know,
    # for it is not measured yet
    return 0.97 * (torch.cuda.mem_get_info()[0] + CONTEXT)


def load_data(args):
    """(problems to train on, held-out problems or []). What is held out is never trained on."""
    tests = []
    if args.data == "tiny":
        problems = tiny.problems(4096, args.seed)[: args.limit]
    else:
        problems = load_problems(
            args.data, limit=args.limit, max_bad=0.01, difficulty=args.difficulty
        )
    if args.eval_data == "tiny":
        tests = tiny.problems(args.eval_limit, 0, held_out=True)
    elif args.eval_data:
        tests = load_problems(args.eval_data, limit=args.eval_limit)
    bad = [p for p in problems if not verifiable(p.answer)]
    if len(bad) > len(problems) // 100:
        raise DataError(
            f"{args.data}: {len(bad)} of {len(problems)} gold answers do not verify against "
            f"themselves "
            f"(first: {bad[0].answer!r:.60}); their reward would always be 0"
        )
    problems, shared = without_shared(problems, tests)
    if shared:
        print(
            f"{shared} problems of {args.data} are left out of training: they are among the "
            f"held-out ones of {args.eval_data}"
        )
    if not problems:
        raise DataError(
            f"{args.data}: every problem is among the held-out ones of {args.eval_data}: give "
            f"another --eval-data"
        )
    return problems, tests


def check_settings(args):
    """Refuse settings that differ from those of the run in the folder, as far as they are known
    before anything is read."""
    check_folder(
        args,
        settings(args),
        [k for k in MATHS if k in vars(args) and (k, getattr(args, k)) not in LATE],
    )


def open_run(args) -> Run:
    """Find the model, read the data, load the model, and before these refuse what can be refused
    without them."""
    check_settings(args)
    # products as small as the embedded default's only lose from a second thread, and one thread
    # makes runs repeat bit for bit
    if args.model == "tiny":
        torch.set_num_threads(1)
    device = pick_device(args.device)
    if args.model != "tiny" and not Path(args.model).is_dir():
        repository(args.model)  # before any problem is fetched
    problems, tests = load_data(args)
    config, folder = find_model(args)
    args.model_commit = folder and download.commit(folder)
    schedule = (
        None
        if args.bupo_layer == "auto"
        else Schedule.parse(args.bupo_layer, args.bupo_steps, config.n_layers)
    )
    memory = free_memory(device)
    settle(args, config, device)
    chosen = settle_memory(args, config, device, memory, host_bytes())
    model = load_model(
        folder or parallel.on_rank_0(tiny.warm_up, args.out / "warm-up", args.seed),
        master_dtype(args),
        device,
    )
    if is_gpu(device) and args.dtype == "bfloat16":
        # TF32 for what is left in float32, beside weights of 8 bits it loses nothing
        torch.set_float32_matmul_precision("high")
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    tokenizer = tokenizers.load_tokenizer(model.folder, args.format)
    prompts, dropped = encode_prompts(
        tokenizer, problems, args.max_prompt_tokens, args.system, args.thinking
    )
    if tests:
        tests = encode_prompts(
            tokenizer, tests, args.max_prompt_tokens, args.system, args.thinking
        )[0]
    compute, longest = getattr(torch, args.dtype), args.max_prompt_tokens + args.max_new_tokens
    model = parallel.shard(model, args.replicas, compute)
    sampler = Sampler(parallel.sampling_copy(model, compute), args.slots, longest, args.compile)
    run = Run(
        args, model, tokenizer, sampler, prompts, tests, dropped, fingerprint(problems), schedule
    )
    if schedule is None:
        run.schedule = choose_schedule(run)
    show_run(args, config, run.schedule, device)
    show_plan(config, args, chosen, memory, is_gpu(device))
    show_prompts(run.tokenizer, prompts, dropped)
    return run


def dry_run(args):
    """Say what a run would do and take, and show its first prompt where model and data are at hand.
    Loads no weights, downloads no model and writes nothing."""
    check_settings(args)
    config, folder = find_model(args)
    memories = args.memory or []
    device = "cuda" if memories else pick_device(args.device)
    settle(args, config, device)
    if len(memories) > 1:
        print(table({args.model: config}, memories, args))
        return
    memory, host = (
        (memories[0] * 1e9, float("inf")) if memories else (free_memory(device), host_bytes())
    )
    chosen = settle_memory(args, config, device, memory, host)
    schedule = None
    if args.bupo_layer != "auto":
        schedule = Schedule.parse(args.bupo_layer, args.bupo_steps, config.n_layers)
    show_run(args, config, schedule, device)
    show_plan(config, args, chosen, memory, is_gpu(device))
    if needs_hub(args.data) or (args.eval_data and needs_hub(args.eval_data)):
        print("problems: not read, a dry run fetches nothing")
        return
    problems, _ = load_data(args)
    if args.model == "tiny":
        with tempfile.TemporaryDirectory() as scratch:
            tiny.write_tokenizer(Path(scratch))
            tokenizer = tokenizers.load_tokenizer(scratch, args.format)
    elif folder:
        tokenizer = tokenizers.load_tokenizer(folder, args.format)
    else:
        print(f"{len(problems):,} problems; first prompt: not shown, the tokenizer is not here")
        return
    prompts, dropped = encode_prompts(
        tokenizer, problems, args.max_prompt_tokens, args.system, args.thinking
    )
    show_prompts(tokenizer, prompts, dropped)


def show_run(args, config, schedule, device):
    """What will be trained, and how."""
    wrapped(
        f"{args.model}: {parameters(config) / 1e6:,.1f} M parameters, {config.n_layers} layers, "
        f"V = {config.vocab_size:,}, {args.dtype} with {args.optimizer} on {device}"
        + (", compiled" if args.compile else "")
    )
    if args.recipe:
        settings_of_recipe = [flag(name, getattr(args, name)) for name in RECIPES[args.recipe]]
        wrapped(f"recipe {args.recipe}: {' '.join(settings_of_recipe)}")
    updates = -(-args.prompts // args.mini_prompts)
    wrapped(
        f"{schedule or 'bupo layer auto, then grpo'}; {args.steps} steps x {args.prompts} problems "
        f"x {args.group} responses, {updates} updates a step"
    )
    for layer, _ in schedule.phases if schedule else ():
        wrapped(
            f"layer {layer} is hidden_states[{layer}] in transformers and "
            f"blocks.{layer - 1}.hook_resid_post in TransformerLens"
        )


def show_prompts(tokenizer, prompts, dropped):
    """How many there are, and the first one decoded."""
    too_long = f" ({dropped} more dropped: prompt too long)" if dropped else ""
    wrapped(
        f"{len(prompts):,} problems{too_long}; prompt format {tokenizer.format}, "
        f"stop ids {list(tokenizer.stop_ids)}, {tokenizer.n_vocab:,} ids in use"
    )
    wrapped(
        "the value of the loss says nothing (it is about -mean(length x advantage) / "
        "mean(length)): watch the reward"
    )
    print(f"first prompt:\n{printable(tokenizer.decode(prompts[0][1]))}", flush=True)


def master_dtype(args):
    """Of the weights that are loaded: with one process those that compute, under torchrun the
    float32 shards behind them."""
    return torch.float32 if parallel.world() > 1 else getattr(torch, args.dtype)


def choose_schedule(run) -> Schedule:
    """`--bupo-layer auto`: the paper's rule, measured on responses to the first prompts."""
    args = run.args
    groups = run.respond(run.prompts[:8], 1, 0)
    sequences = [(a.prompt + a.sample.ids, len(a.prompt)) for group in groups for a in group]
    layer, evidence = parallel.on_rank_0(decompose.auto_layer, run.sampler.model, sequences)
    print(f"--bupo-layer auto: layer {layer} ({evidence})")
    args.bupo_layer = str(layer)
    return Schedule.parse(args.bupo_layer, args.bupo_steps, run.model.config.n_layers)


def make_optimizer(model, args):
    """--optimizer over all parameters; decay applies to all, as in the reference."""
    common = dict(params=model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(**common, fused=True)
    moment_dtype = torch.float32 if args.optimizer == "split-m32" else torch.float16
    return SplitAdamW(**common, moment_dtype=moment_dtype, offload=args.offload)


def resume(run, model, optimizer) -> dict:
    """Load the newest valid checkpoint of the run folder and rewind its logs; returns its state:
    the step it stands after and the tokens sampled until then, 0 and 0 for a new run."""
    args, out = run.args, run.args.out
    checkpoint.remove_leftovers(out)
    now = {
        **settings(args),
        "data_sha256": run.data_sha256,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
    }
    check_folder(args, now, MATHS)
    if args.fresh:
        checkpoint.discard(out)
    state, last = {"step": 0, "num_tokens": 0}, 0
    if newest := checkpoint.latest(out):
        # `latest` has just verified it
        state |= checkpoint.restore(newest, model, optimizer, verify=False)
        last = state["step"]
        print(f"resuming {out} after step {last}", flush=True)
        checkpoint.prune(out, last, args.keep)
    elif not (out / "config.json").exists() or checkpoint.changed_settings(
        read_json(out / "config.json"), now, MATHS
    ):
        last = -1  # the row of step 0 that may be there is of another model
    for name in checkpoint.LOGS:
        checkpoint.rewind(out / name, last)
    # renamed into place: a kill leaves the old settings or the new ones
    new = out / ".tmp-config.json"
    new.write_text(json.dumps(now, indent=1) + "\n")
    new.replace(out / "config.json")
    return state


def commit():
    """Commit of the code, when it runs from a git checkout."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=5,
        )
        return git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --------------------------------------------------------------------------------------------------
# one step


def rehearse(run, optimizer):
    """The largest rollout and the largest update there can be, once, beside all that is held then:
    memory that will not do is missed now, and not when the first long responses come. Compiled code
    that this machine cannot make is left out from here on.
    """
    args, model = run.args, run.model
    size = 0
    if not optimizer.state and not args.offload:  # moments come with the first update
        plan = memory_plan(model.config, args, model.unembedding.is_cuda)
        size = int(1e9 * plan.moments["training"]["optimizer state"])
    held = torch.empty(size, dtype=torch.uint8, device=model.unembedding.device)
    run.sampler.start()
    run.sampler.stop()
    row = Response(
        [0] * args.max_prompt_tokens, [0] * args.max_new_tokens, [0.0] * args.max_new_tokens, 1.0
    )
    rows = (
        max(1, args.micro_tokens // (args.max_prompt_tokens + args.max_new_tokens))
        * parallel.world()
    )

    def largest_update():
        fitting_backward(
            run, [row] * rows, model.config.n_layers, norm=args.internal_norm, **run.policy()
        )

    try:
        largest_update()
    except compile_errors() as e:
        print(
            f"blocks cannot be compiled here, training goes on without ({one_line([str(e)]):.200})",
            file=sys.stderr,
        )
        plain_blocks(model)
        largest_update()
    model.zero_grad()
    del held


def clip_gradients(model, limit) -> torch.Tensor:
    """Scale the gradients down to a joint norm of at most `limit`; returns the norm before, summed
    in float32 whatever their dtype."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack(
        [parallel.full_tensor(torch.linalg.vector_norm(g, dtype=torch.float32)) for g in grads]
    ).norm()
    for g in grads:
        g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def fitting_backward(run, mini, layer, **common):
    """`bupo.backward`; out of memory it says what was too large, or with --oom-retry starts again
    with half the --micro-tokens."""
    args = run.args
    while True:
        try:
            return backward(run.model, mini, layer, max_tokens=args.micro_tokens, **common)
        except (RuntimeError, MemoryError) as e:
            if not no_memory(e):
                raise
            longest = max(len(r.prompt) + len(r.ids) for r in mini)
            if not args.oom_retry or parallel.world() > 1 or args.micro_tokens <= longest:
                raise torch.OutOfMemoryError(
                    f"in an update of layer {layer}: micro-batches of {args.micro_tokens} tokens, "
                    f"the longest "
                    f"response with its prompt {longest}, {peak_gb(run.model):.1f} GB held; {e}"
                ) from None
        # the part that was done: what the loss divides by is that of the whole mini-batch, at any
        # size
        run.model.zero_grad()
        args.micro_tokens = max(args.micro_tokens // 2, longest)
        print(
            f"out of memory: --micro-tokens {args.micro_tokens} from here on, which changes no "
            f"gradient",
            file=sys.stderr,
            flush=True,
        )


UNFIT = 3  # updates in a row without finite gradients that end a run


def leave_out(run, mini, layer):
    """What happens in place of an update whose gradient is NaN or infinite: its batch is written
    out. FloatingPointError at the third in a row."""
    grads = (
        (name, parallel.full_tensor(p.grad))
        for name, p in run.model.named_parameters()
        if p.grad is not None
    )
    bad = next((name for name, grad in grads if not grad.isfinite().all()), "its norm")
    run.model.zero_grad()
    run.unfit += 1
    path = run.args.out / "bad_batches.jsonl"
    if parallel.rank() == 0:
        # a full disk costs the copy, not the run
        with suppress(OSError), checkpoint.Log(path) as batches:
            batches.write(
                {
                    "step": run.step,
                    "layer": layer,
                    "first": bad,
                    "advantage": r.advantage,
                    "prompt_ids": r.prompt,
                    "ids": r.ids,
                    "sampler_logprobs": r.sampler_logprobs,
                }
                for r in mini
            )
    print(
        f"step {run.step}: the gradient is not finite (first in {bad}), nothing was updated; the "
        f"batch is in {path}",
        file=sys.stderr,
    )
    if run.unfit == UNFIT:
        raise FloatingPointError(
            f"the gradient is not finite in {UNFIT} updates in a row (first in {bad}); their "
            f"batches are in {path}, "
            "the last checkpoint stands: lower --lr and resume with --override"
        )


def update(run, optimizer, groups, layer):
    """The optimizer updates of one step on groups of Responses. Returns sums over tokens, the
    gradients' norms before clipping, and FLOPs.

    A mini-batch without any advantage makes no update at all: an optimizer step on zero gradients
    would still move weights, by decay and by old moments.
    """
    args = run.args
    clip = dict(clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip or None)
    clip |= dict(loss=args.loss, limit=args.max_new_tokens, kl=args.kl, tis=args.tis or None)
    common = dict(norm=args.internal_norm, **run.policy())
    minis = [
        [r for group in groups[i : i + args.mini_prompts] for r in group if r.ids]
        for i in range(0, len(groups), args.mini_prompts)
    ]
    minis = [mini for mini in minis if any(r.advantage != 0 for r in mini)]
    # `backward` deals them to the same ranks
    mine = [r for mini in minis for r in parallel.local_responses(mini)]
    sums, norms, flops = {}, [], 0
    for name, model in (
        ("old_logprobs", run.model if len(minis) > 1 else None),
        ("ref_logprobs", run.reference),
    ):
        if model is None:
            continue
        with run.clock("logprobs"):
            stored = stored_logprobs(model, mine, layer, args.micro_tokens, **common)
        for r, logprobs in zip(mine, stored, strict=True):
            setattr(r, name, logprobs)
        flops += sum(forward_flops(run.model, mini, layer) for mini in minis)
    for mini in minis:
        with run.clock("backward"):
            seen = fitting_backward(run, mini, layer, **clip, **common)
        flops += 3 * forward_flops(run.model, mini, layer)
        with run.clock("optimizer"):
            norm = clip_gradients(run.model, args.grad_clip)
            if not torch.isfinite(norm):
                leave_out(run, mini, layer)
                continue
            optimizer.step()
            # to None, not to zeros: AdamW must not see the blocks above an internal layer
            optimizer.zero_grad()
        run.unfit = 0
        norms.append(norm.item())
        for k, v in seen.items():
            sums[k] = sums.get(k, 0) + v
    with run.clock("optimizer"):
        parallel.update_sampler(run.model, run.sampler.model)
    return sums, norms, flops


def some_weights(model, most=1 << 20):
    """Up to about `most` of the weights, evenly spaced, of this rank's shards, as bfloat16: what
    one of that precision would look like."""
    parts = [parallel.local_tensor(p.detach()).flatten() for p in model.parameters()]
    stride = max(1, sum(map(len, parts)) // most)
    return torch.cat([p[::stride].bfloat16() for p in parts])


def peak_gb(model) -> float:
    """Most memory held, in GB: on a GPU by tensors in this step, else by the process since its
    start."""
    if model.unembedding.is_cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


@torch.no_grad()
def compare_with_sampler(run, responses) -> dict:
    """Entropy of the model's own policy, and its log-probs as the trainer computes them against the
    sampler's, before the updates.

    On one micro-batch of evenly spaced responses. The cheapest bug detector there is: wrong
    positions, stale weights and a forgotten temperature all show here at once.
    """
    if not responses:
        return {}
    longest = max(len(r.prompt) + len(r.ids) for r in responses)
    some = responses[:: -(-len(responses) * longest // run.args.micro_tokens)]
    batch = collate(some, run.model.unembedding.device)
    logprobs, entropy = policy_logprobs(run.model, batch, run.model.config.n_layers, **run.policy())
    diff = logprobs - torch.tensor(
        [x for r in some for x in r.sampler_logprobs], device=logprobs.device
    )
    return {
        "entropy": entropy.mean().item(),
        "sampler_diff/mean": diff.abs().mean().item(),
        "sampler_diff/max": diff.abs().max().item(),
        "sampler_diff/far": ((diff.exp() - 1).abs() > 0.1).float().mean().item(),
    }


def describe(groups, drawn, sums, norms, layer, n_layers):
    """The row of metrics.jsonl, in TRL's names for what TRL has; drawn [N,G] are the rewards of all
    that was sampled."""
    answered = [a for group in groups for a in group]
    lengths = torch.tensor([len(a.sample.ids) for a in answered], dtype=torch.float32)
    ended = torch.tensor([a.sample.stopped for a in answered])
    row = {
        "phase": "internal" if layer < n_layers else "whole",
        "inter/layer": layer,
        "reward": drawn.mean().item(),
        "reward_std": drawn.std().item(),
        "reward_group_std": drawn.std(1).mean().item(),
        "frac_reward_zero_std": (drawn == drawn[:, :1]).all(1).float().mean().item(),
        "groups_sampled": len(drawn),
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        "completions/mean_terminated_length": lengths[ended].mean().item() if ended.any() else None,
        "response_tokens": int(lengths.sum()),
        "updates": len(norms),
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
    }
    if norms:
        tokens = sums["tokens"]
        row |= {
            "loss": sums["loss"] / len(norms),
            "inter/entropy": sums["entropy"] / tokens,
            "clip_ratio/low_mean": sums["clip_low"] / tokens,
            "clip_ratio/high_mean": sums["clip_high"] / tokens,
        }
        if sums["kl"]:
            row["kl"] = sums["kl"] / tokens
    for a in answered:
        key = "verdict/" + a.verdict.reason.partition(":")[0]
        row[key] = row.get(key, 0) + 1
    return row


def reward(answered, args) -> float:
    """1 for a right answer, else 0; of a response cut off by the limit 0; --overlong soft takes off
    up to 1 for length."""
    right = float(answered.verdict.correct and answered.sample.stopped)
    if args.overlong != "soft":
        return right
    return right + overlong_penalty(
        len(answered.sample.ids), args.max_new_tokens, args.overlong_buffer
    )


def sample(run, step):
    """Graded groups of one step, their rewards [N,G], and the rewards of all groups drawn.

    With --refills, groups of equal rewards give way to groups of other problems (dynamic sampling,
    arXiv 2503.14476).
    """
    args, groups, rewards, drawn = run.args, [], [], []
    for round in range(1 + args.refills):
        # a refill walks the problems in an order of its own, which is a function of the step like
        # the first
        pairs = batch(
            run.prompts,
            step,
            args.prompts - len(groups),
            fold(args.seed, round) if round else args.seed,
        )
        new = run.respond(pairs, args.group, step, round)
        run.num_tokens += sum(len(a.prompt) + len(a.sample.ids) for group in new for a in group)
        scores = [[reward(a, args) for a in group] for group in new]
        drawn += scores
        # without anything to learn from it is still a step
        kept = [
            i
            for i, row in enumerate(scores)
            if len(set(row)) > 1 or not args.refills or (round == args.refills and not groups)
        ]
        groups += [new[i] for i in kept]
        rewards += [scores[i] for i in kept]
        if len(groups) == args.prompts:
            break
    return groups, torch.tensor(rewards), torch.tensor(drawn)


def step_once(run, optimizer, step):
    """Sample, grade, update. Returns the step's row of metrics.jsonl and its rows of
    samples.jsonl."""
    args, layer, start = run.args, run.schedule.layer_at(step), time.perf_counter()
    run.step, run.seconds, before = step, {}, some_weights(run.model)
    if run.model.unembedding.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    answered, rewards, drawn = sample(run, step)
    groups = [
        [
            Response(a.prompt, a.sample.ids, a.sample.logprobs, advantage)
            for a, advantage in zip(group, row, strict=True)
            if a.sample.stopped or args.overlong != "mask"
        ]
        for group, row in zip(
            answered, group_advantages(rewards, args.advantage).tolist(), strict=True
        )
    ]
    # the KV cache's memory is the trainer's now
    if run.model.unembedding.is_cuda:
        run.sampler.stop()
    with run.clock("logprobs"):
        seen = compare_with_sampler(run, [r for group in groups for r in group])
    sums, norms, flops = update(run, optimizer, groups, layer)
    after = some_weights(run.model)
    moved = parallel.all_reduce({"moved": (before != after).sum().item(), "all": len(before)})
    samples = [
        {**a.row(step=step), "reward": r}
        for group, row in zip(answered, rewards.tolist(), strict=True)
        for a, r in zip(group, row, strict=True)
    ]
    row = {
        "step": step,
        "num_tokens": run.num_tokens,
        **describe(answered, drawn, sums, norms, layer, run.model.config.n_layers),
        **seen,
        "weights_moved": moved["moved"] / moved["all"],
        "lr": args.lr,
    }
    spent = dict(run.seconds)
    spent["other"] = time.perf_counter() - start - sum(spent.values())
    training = sum(spent.get(part, 0) for part in ("logprobs", "backward", "optimizer"))
    row |= {
        "perf/rollout_tok_s": row["response_tokens"] / (spent["rollout"] + spent["grade"]),
        "perf/train_tflop_s": flops / parallel.world() / training / 1e12,
        "perf/peak_gb": peak_gb(run.model),
    }
    return row | {f"time/{part}": seconds for part, seconds in spent.items()}, samples


def evaluate(run) -> dict:
    """Avg@1 on the held-out problems, with the same noise at every step."""
    start = time.time()
    groups = run.respond(run.tests, 1, 0, bar="eval")
    return {
        "eval/accuracy": avg_at_k([[a.verdict.correct for a in group] for group in groups]),
        "eval/questions": len(groups),
        "time/eval": time.time() - start,
    }


def responses_of_step_1(path, vocab_size) -> list:
    """The responses of step 1 in samples.jsonl, as (ids, prompt length); what is no such row is
    left out."""
    found = []
    for row in each_row(path):
        if row is None or not isinstance(row.get("step"), int):
            continue
        if row["step"] > 1:  # rows stand in the order of steps
            break
        prompt, ids = row.get("prompt_ids"), row.get("ids")
        if not (isinstance(prompt, list) and isinstance(ids, list) and prompt and ids):
            continue
        if all(type(token) is int and 0 <= token < vocab_size for token in prompt + ids):
            found.append((prompt + ids, len(prompt)))
    return found


def watch(run, out) -> dict:
    """The first internal layer (of plain GRPO the middle one) and the model itself on the responses
    of step 1: see decompose.watch. Where samples.jsonl does not hold them, nothing, with a line the
    first time.

    The paper's collapse shows here first: perplexity of the whole policy that rises while an
    internal phase still runs.
    """
    n_layers, start = run.model.config.n_layers, time.time()
    layer = run.schedule.phases[0][0] if run.schedule.phases else (n_layers + 1) // 2
    run.watched = run.watched or responses_of_step_1(
        out / "samples.jsonl", run.model.config.vocab_size
    )
    if not run.watched:
        if not run.blind:
            print(
                f"--watch-layers: {out / 'samples.jsonl'} holds no responses of step 1 to look at; "
                f"training goes on without",
                file=sys.stderr,
            )
        run.blind = True
        return {}
    return {
        **decompose.watch(run.sampler.model, run.watched, layer),
        "time/watch": time.time() - start,
    }


def result(rows, schedule):
    """The last line: accuracy before and after, when it was best, and memory, from the rows of
    metrics.jsonl alone; None without held-out problems."""
    scores, seconds, peak = [], 0.0, 0.0  # scores: (accuracy, seconds until then, row)
    for row in rows:
        seconds += sum(v for k, v in row.items() if k.startswith("time/"))
        peak = max(peak, row.get("perf/peak_gb", 0.0))
        if "eval/accuracy" in row and isinstance(row.get("step"), int):
            scores.append((row["eval/accuracy"], seconds, row))
    if len(scores) < 2:
        return None
    (before, _, first), (after, _, last) = scores[0], scores[-1]
    best, soonest, _ = max(scores, key=lambda s: (s[0], -s[1]))
    began = f" (step {first['step']})" if first["step"] else ""  # the row of step 0 is lost
    return (
        f"accuracy {before:.2f}{began} -> {after:.2f} on {last['eval/questions']} held-out "
        f"problems in {seconds:.0f} s, "
        f"best {best:.2f} after {soonest:.0f} s, at most {peak:.1f} GB ({schedule})"
    )


def draw(out):
    """training.png, and where that fails a line: the run is over and saved."""
    try:
        plot.training(out / "metrics.jsonl", out / "training.png")
    except Exception as e:
        # rows may have been edited, fonts may be missing, the disk may be full
        why = printable(one_line([f"{type(e).__name__}: {e}"]))[:300]
        print(f"{out / 'training.png'}: not drawn ({why})", file=sys.stderr)


def finish(run, rows):
    """Figure and last line of a run that is over and saved."""
    out = run.args.out
    parallel.on_rank_0(draw, out)
    print(f"written: {out}/ (metrics.jsonl, samples.jsonl, training.png, checkpoints)")
    try:
        line = result(rows, run.schedule)
    except Exception as e:  # rows that have been edited
        line = f"no accuracy: rows of metrics.jsonl are not as they were written ({one_line([repr(e)])[:300]})"  # noqa: E501
    if line:
        print(printable(line))


def show(row, bar, steps):
    """A step in the progress bar, or on a line of its own where there is no terminal."""
    line = (
        f"reward {row['reward']:.3f}  length {row['completions/mean_length']:.0f}  entropy "
        f"{row.get('entropy', 0):.2f}  "
        f"layer {row['inter/layer']}  {row['perf/rollout_tok_s']:,.0f} tok/s"
        + (f"  accuracy {row['eval/accuracy']:.3f}" if "eval/accuracy" in row else "")
    )
    if bar.disable:
        print(f"step {row['step']}/{steps}  {line}", flush=True)
    else:
        bar.set_postfix_str(line)


def train(run, optimizer, start, setup_seconds):
    """The loop, from the step after `start` to the last; returns the rows of metrics.jsonl, those
    of an earlier session included."""
    args, out = run.args, run.args.out
    files = [
        os.devnull if parallel.rank() else out / name for name in ("metrics.jsonl", "samples.jsonl")
    ]
    # what is no row there `resume` has moved away
    rows = parallel.on_rank_0(lambda: [row for row in each_row(files[0]) if row is not None])
    with checkpoint.Log(files[0]) as metrics, checkpoint.Log(files[1]) as samples:

        def log(row):
            rows.append(row)
            metrics.write([row])

        def save(step):
            gathered, state = (
                parallel.gather(run.model, optimizer),
                {"step": step, "num_tokens": tokens},
            )
            parallel.on_rank_0(
                checkpoint.save,
                out,
                step,
                *gathered,
                state,
                tokenizer_from=run.model.folder,
                keep=args.keep,
            )

        bar = tqdm(
            range(start + 1, args.steps + 1),
            initial=start,
            total=args.steps,
            unit="step",
            disable=parallel.rank() > 0 or not sys.stderr.isatty(),
        )
        # tokens of whole steps, for one under way may be left
        done, saved, tokens = start, start, run.num_tokens
        try:
            if run.tests and start < args.steps and not any("eval/accuracy" in row for row in rows):
                log({"step": start, **evaluate(run), "time/setup": setup_seconds})
                when = f"after step {start}" if start else "before training"
                tqdm.write(f"held-out accuracy {when}: {rows[-1]['eval/accuracy']:.3f}")
            for step in bar:
                row, answered = step_once(run, optimizer, step)
                done, tokens = step, run.num_tokens
                if run.tests and (
                    step == args.steps or (args.eval_every and step % args.eval_every == 0)
                ):
                    # a signal is heeded once the step is logged
                    with suppress(Stopped):
                        row |= evaluate(run)
                if step == start + 1:
                    first = answered[0]
                    tqdm.write(
                        f"first response (reward "
                        f"{first['reward']:g}):\n{printable(first['response'])}"
                    )
                samples.write(answered[: args.log_samples])
                if args.watch_layers and (step % args.watch_layers == 0 or step == 1):
                    row |= parallel.on_rank_0(watch, run, out)
                log(row)
                show(row, bar, args.steps)
                # not in the middle of a failure
                if step == args.steps or (step % args.save_every == 0 and not run.unfit):
                    save(step)
                    saved = step
                if run.signals.agree():
                    raise Stopped
        except Stopped:
            if done > saved:
                save(done)
            if parallel.rank() == 0:
                print(
                    f"stopped after step {done}, "
                    f"{'which is saved' if done else 'with nothing to save'}: the same command "
                    f"goes on from "
                    "there",
                    file=sys.stderr,
                )
            parallel.end(130 if run.signals.got == signal.SIGINT else 75)
    return rows


def main(argv=None):
    args, began = parse(argv), time.time()
    # nothing draws from torch's own generator; its state is part of a checkpoint all the same
    torch.manual_seed(args.seed)
    if args.dry_run:
        dry_run(args)
        return
    with nullcontext() if parallel.rank() else checkpoint.lock(args.out):
        run = open_run(args)
        if args.kl:  # to the starting weights, of a resumed run too
            reference = load_model(
                run.model.folder, master_dtype(args), pick_device(args.device)
            ).requires_grad_(False)
            run.reference = parallel.shard(reference, args.replicas, getattr(torch, args.dtype))
        optimizer = make_optimizer(run.model, args)
        gathered = parallel.gather(run.model, optimizer)
        state = parallel.on_rank_0(resume, run, *gathered)
        start, run.num_tokens = state["step"], state["num_tokens"]
        if start:
            parallel.scatter(*gathered, run.model, optimizer)
        parallel.update_sampler(run.model, run.sampler.model)
        del gathered
        if run.model.unembedding.is_cuda:
            rehearse(run, optimizer)
        with run.signals:
            rows = train(run, optimizer, start, time.time() - began)
        finish(run, rows)


if __name__ == "__main__":
    guarded(main)
