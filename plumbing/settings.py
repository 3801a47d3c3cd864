"""The flags of train.py, what is refused before a run begins, and what follows from the model and
the machine.

A run's settings stand in its folder's config.json. Those in MATHS change its numbers: the run goes
on with other values only if --existing override says so.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from plumbing import checkpoint, parallel
from plumbing.cli import (
    Parser,
    amount,
    given,
    natural,
    positive,
    printable,
    seed,
    share,
    short_name,
    whole,
)
from plumbing.data import is_evaluation, span
from plumbing.memory import (
    CONTEXT,
    choose,
    default_new_tokens,
    flag,
    host_bytes,
    parameters,
    wrapped,
)
from plumbing.optimizer import BYTES
from plumbing.recipes import RECIPES
from plumbing.rows import read_json
from plumbing.tokenizer import SYSTEM

MATHS = """model model_commit data_sha256 bupo_layer bupo_steps internal_norm internal_temperature
    align align_layer train_blocks train_blocks_steps prompts group mini_prompts objective clip_low
    clip_high dual_clip advantage loss kl tis entropy_top entropy_layer reward overlong
    overlong_buffer refills lr weight_decay grad_clip temperature max_new_tokens max_prompt_tokens
    system thinking format verifier optimizer dtype seed""".split()
# what stands for a value that follows from the model or the machine
LATE = {("max_new_tokens", None), ("bupo_layer", "auto"), ("optimizer", None), ("dtype", None)}


# --------------------------------------------------------------------------------------------------
# the flags


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
        whole(part.strip() or "0")
    return text


def names(text) -> list[str]:
    """The sets of --eval-data."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def phase_steps(text):
    """argparse type of --bupo-steps: auto, or whole numbers, as text."""
    return text if text == "auto" else counts(text)


def block_range(text):
    """argparse type of --train-blocks: 1-3, 2 or all, as text."""
    found = re.fullmatch(r"([1-9]\d{0,3})(-[1-9]\d{0,3})?", text)
    if text != "all" and not (found and bounds(text)[0] <= bounds(text)[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: give blocks as 1-3, or 2, or all")
    return text


def bounds(text) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def blocks(args, step, n_layers) -> range | None:
    """Indices (from 0) of the blocks that --train-blocks lets a step train; None: all. ValueError
    for blocks that the model has not."""
    if args.train_blocks == "all" or step > (args.train_blocks_steps or step):
        return None
    first, last = bounds(args.train_blocks)
    if last > n_layers:
        raise ValueError(f"--train-blocks {args.train_blocks}: this model has 1 to {n_layers}")
    return range(first - 1, last)


def layers(text):
    """argparse type of --bupo-layer: none, auto, or layers from 1 with commas (or +) between them,
    as text."""
    if text in ("none", "auto", ""):
        return text or "none"
    try:
        for part in text.replace("+", ",").split(","):
            natural(part.strip() or "1")
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}; or give auto, or none for plain GRPO") from None
    return text


def parser(description):
    p = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    def section(title):
        group = p.add_argument_group(title)

        def add(name, default, help, type=str, choices=None, action=None):
            if default is not None and not action:
                help += f" (default {default})".replace("%", "%%")
            more = {"action": action} if action else {"type": type, "choices": choices}
            group.add_argument(name, default=default, help=help, **more)

        return add

    add = section("model and data")
    add("--model", "tiny", "tiny, tiny-llama, a preset (qwen3-4b), a hub id or a folder", given)
    add(
        "--recipe",
        None,
        "settings that belong to a model and its problems; flags that are given override them",
        choices=tuple(RECIPES),
    )
    add("--data", "deepmath", "problems: a named set or a .json, .jsonl or .parquet file", given)
    add("--limit", None, "only the first so many problems of --data", natural)
    add("--difficulty", None, "only problems of this difficulty, as 5-8, where it is told", span)
    add("--train-on-test", False, "let --data be one to measure with", action="store_true")
    add("--revision", None, "branch, tag or commit of a model on the hub")
    add(
        "--eval-data",
        None,
        "held-out problems for accuracy before, during and after; several sets with commas",
    )
    add("--eval-every", 0, "steps between evaluations; 0: only before and after", whole)
    add("--eval-limit", 256, "held-out problems, one sample each", natural)
    add("--system", SYSTEM, "system prompt")
    add("--thinking", False, "Qwen3: leave thinking on, unlike the paper", action="store_true")
    add("--format", "auto", "prompt format: auto, chatml, llama3, base")
    add(
        "--verifier",
        "nanobupo",
        "hendrycks is the reference's string equality",
        choices=("nanobupo", "hendrycks"),
    )

    add = section("bottom-up policy optimization")
    add(
        "--bupo-layer",
        "none",
        "internal layer(s) trained first, from 1, as 6 or 6,26, or 6+26 for both at once; auto: "
        "last layer with dH_mlp > 0; none: plain GRPO",
        layers,
    )
    add(
        "--bupo-steps",
        "30",
        "steps of each internal phase, as 30 or 20,10; auto: until the whole model forgets its "
        "right answers or the layer comes no closer to it",
        phase_steps,
    )
    add(
        "--internal-norm",
        "none",
        "norm before the unembedding at an internal layer; the paper has none",
        choices=("none", "final", "rms"),
    )
    add("--internal-temperature", None, "tau of the internal policy (default: as drawn)", positive)
    add(
        "--align",
        0.0,
        "coefficient of OISD: the last layer, when it is trained, teaches --align-layer",
        amount,
    )
    add("--align-layer", None, "the layer that --align teaches", natural)
    add(
        "--train-blocks",
        "all",
        "blocks (with the embedding) that learn, as 1-3: what an internal phase would train, by "
        "the ordinary loss",
        block_range,
    )
    add("--train-blocks-steps", 0, "steps for which --train-blocks holds; 0: all", whole)

    add = section("GRPO")
    add("--steps", 300, "rollout steps", natural)
    add("--prompts", 128, "problems a step", natural)
    add("--group", 8, "responses to each problem, G", natural)
    add("--mini-prompts", 32, "problems an update: 128 / 32 = 4 updates a step", natural)
    add(
        "--objective",
        "grpo",
        "what is done with the ratio; gspo wants clips of 3e-4 and --loss seq-mean",
        choices=("grpo", "gspo", "cispo", "dppo"),
    )
    add("--clip-low", 0.2, "clip below 1 - this", share)
    add("--clip-high", 0.2, "clip above 1 + this; 0.28 is DAPO's clip-higher", amount)
    add("--dual-clip", 10.0, "bound of the loss for negative advantages, in |A|; 0: off", amount)
    add(
        "--advantage",
        "grpo",
        "baseline and scale of the rewards",
        choices=("grpo", "dr_grpo", "rloo", "reinforce++", "maxrl"),
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
        "coefficient of the k3 KL to the starting model, at the layer trained; holds a second copy "
        "of the weights",
        amount,
    )
    add("--entropy-top", 1.0, "share of tokens that learn: those of highest entropy", share)
    add("--entropy-layer", None, "whose entropy: a layer's (default: the one trained)", natural)
    add(
        "--reward",
        "verdict",
        "controls: format rewards any box, random a coin",
        choices=("verdict", "format", "random"),
    )
    add("--tis", 0.0, "truncate pi_old / pi_sampler at this, per token; 0: no weights", amount)
    add(
        "--refills",
        0,
        "dynamic sampling: times to replace groups of equal rewards by new problems (DAPO)",
        whole,
    )
    add(
        "--overlong",
        "zero",
        "responses cut off by the limit: reward 0; mask: out of the loss; soft: also a penalty on "
        "length before it",
        choices=("zero", "mask", "soft"),
    )
    add("--overlong-buffer", 512, "tokens over which the soft penalty grows to 1", natural)

    add = section("sampling")
    add("--temperature", 1.0, "divides the logits, in sampling and in training alike", positive)
    add("--max-new-tokens", None, "response tokens at most (default 7168, llama 3072)", natural)
    add("--max-prompt-tokens", 1024, "longer prompts are dropped and counted, never cut", natural)
    add(
        "--slots",
        None,
        "responses decoded together; the KV cache is slots x (prompt + response) tokens (default "
        "64, on a GPU what fits)",
        natural,
    )
    add(
        "--compile",
        None,
        "compile the decode step and what stands between the products of a block (default: on a "
        "GPU)",
        action=switch,
    )

    add = section("optimization")
    add("--lr", 1e-6, "AdamW learning rate, constant", positive)
    add("--weight-decay", 0.01, "AdamW weight decay", amount)
    add("--grad-clip", 1.0, "norm the gradient is scaled down to", positive)
    add(
        "--micro-tokens",
        None,
        "tokens of one forward and backward: memory, not maths (default 16384, on a GPU what fits)",
        natural,
    )
    add(
        "--logit-chunk",
        None,
        "positions whose logits are held at once: chunk x V x 4 bytes, twice (default 256, on a "
        "GPU 1024)",
        natural,
    )
    add(
        "--optimizer",
        None,
        "adamw: float32 weights, 16 bytes a parameter with gradient and moments; split-m32: "
        "bfloat16 weights with an exact float32 master, 16 bytes; split: the same with a float16 "
        "first moment, 14 (default adamw, on a GPU a split one)",
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
        "stands an exact float32 master: that of the split optimizer, with torchrun the shards",
        choices=("float32", "bfloat16"),
    )
    add(
        "--recompute",
        None,
        "run each block again in the backward instead of keeping its activations (default: on a "
        "GPU that needs it)",
        action=switch,
    )

    add = section("run")
    add("--out", None, "run folder (default out/MODEL)")
    add(
        "--existing",
        "resume",
        "a run that is in the folder: resume; override: resume although settings differ; "
        "overwrite: delete it and start anew",
        choices=("resume", "override", "overwrite"),
    )
    add("--seed", 0, "everything random follows from it", seed)
    add("--save-every", 30, "steps between checkpoints", natural)
    add("--keep", 2, "newest checkpoints kept; 0: all", whole)
    add("--log-samples", 16, "responses of each step written to samples.jsonl", whole)
    add(
        "--watch-layers",
        0,
        "steps between looks at the internal layer on fixed responses: cosine, entropies, "
        "perplexity; 0: none",
        whole,
    )
    add("--device", "auto", "auto, cpu, cuda")
    add("--replicas", 1, "with torchrun: machines that hold a full set of shards each", natural)
    add(
        "--dry-run",
        False,
        "show plan, first prompt and memory, then stop; needs neither weights nor a GPU",
        action="store_true",
    )
    add("--memory", None, "with --dry-run: plan for a GPU of so many GB, or several: 24,80", sizes)
    return p


def parse(description, argv=None):
    """The flags as argparse gives them; ValueError for what contradicts itself."""
    p = parser(description)
    named = p.parse_known_args(argv)[0]
    if named.recipe is None and named.model in ("tiny", "tiny-llama"):
        named.recipe = "tiny"
    if named.recipe:
        p.set_defaults(recipe=named.recipe, **RECIPES[named.recipe])
    args = p.parse_args(argv)
    refuse_contradictions(args)
    if args.optimizer in ("split", "split-m32"):
        args.dtype = "bfloat16"
    args.mini_prompts = min(args.mini_prompts, args.prompts)
    out = Path(f"out/{short_name(args.model)}")
    if out.resolve() == Path(args.model).resolve():
        out = out.with_name(f"{out.name}-run")
    args.out = Path(args.out) if args.out else out
    return args


def refuse_contradictions(args):
    """ValueError, in one line that says what to do."""
    split = args.optimizer in ("split", "split-m32")
    if args.align and not args.align_layer:
        raise ValueError("--align needs --align-layer: which layer is taught")
    if args.advantage == "maxrl" and args.overlong == "soft":
        raise ValueError("--advantage maxrl needs rewards of at least 0: not --overlong soft")
    if args.group < 2:
        raise ValueError("--group must be at least 2: a group of one has no baseline")
    if 0 < args.dual_clip <= 1:
        raise ValueError(
            "--dual-clip must be above 1, or 0 for none: it would silence every negative advantage"
        )
    if args.watch_layers and not args.log_samples:
        raise ValueError(
            f"--watch-layers {args.watch_layers} looks at the responses of step 1, which "
            "--log-samples 0 does not keep: add --watch-layers 0, or log at least 1"
        )
    if split and parallel.world() > 1:
        raise ValueError(
            f"--optimizer {args.optimizer} is for one process: with torchrun the float32 shards "
            "are the master, leave the flag out"
        )
    if split and args.dtype == "float32":
        raise ValueError(f"--optimizer {args.optimizer} needs --dtype bfloat16")
    if args.offload and (args.optimizer == "adamw" or args.dtype == "float32"):
        raise ValueError("--offload needs --optimizer split or split-m32")
    rounded = args.optimizer == "adamw" and args.dtype == "bfloat16" and parallel.world() == 1
    if rounded and args.lr < 1e-5:
        raise ValueError(
            f"--dtype bfloat16 with plain AdamW at --lr {args.lr:g} does not train: about 98 % of "
            "the weights round back to where they were; use --optimizer split, or --dtype float32"
        )
    if is_evaluation(args.data) and not args.train_on_test:
        raise ValueError(
            f"--data {args.data} is there to measure with: add --train-on-test if training on it "
            "is what you want"
        )
    if args.memory and not args.dry_run:
        raise ValueError("--memory is of a plan: add --dry-run")


# --------------------------------------------------------------------------------------------------
# the run folder


def as_json(args) -> dict:
    """The flags as config.json holds them."""
    plain = (int, float, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items()}


def check_folder(args, now, keys):
    """Refuse to mix two runs, or a run and a model, in one folder: ValueError. Checkpoints make it
    a run, whatever logs are there."""
    out = args.out
    for name in (*checkpoint.LOGS, "config.json"):
        if (out / name).exists() and not (out / name).is_file():
            raise ValueError(f"{out / name}: not a file: move it away, or name another --out")
    saved = read_json(out / "config.json") if (out / "config.json").exists() else {}
    if "model_type" in saved:
        raise ValueError(f"{out} holds a model: name another --out for the run")
    if args.existing != "resume" or not checkpoint.has_checkpoints(out):
        return
    if not saved:
        raise ValueError(
            f"{out} holds checkpoints and no config.json: what settings they were made with is not "
            "known; put it back, name another --out, or add --existing override"
        )
    if changed := checkpoint.changed_settings(saved, now, keys):
        raise ValueError(
            f"{out} holds a run with other settings ({'; '.join(changed)}): set them back, name "
            "another --out, or add --existing override"
        )


def check_known(args):
    """Refuse settings that differ from those of the run in the folder, as far as they are known
    before anything is read."""
    known = [k for k in MATHS if k in vars(args) and (k, getattr(args, k)) not in LATE]
    check_folder(args, as_json(args), known)


def earlier(args) -> dict:
    """Settings of the run that this one goes on with; {} for a new one."""
    out = args.out
    new = args.existing == "overwrite" or not checkpoint.has_checkpoints(out)
    if new or not (out / "config.json").exists():
        return {}
    return read_json(out / "config.json")


def commit() -> str:
    """Commit of the code, when it runs from a git checkout."""
    here = Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=5)
        return git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write(out, now):
    """Replace config.json. Renamed into place: a kill leaves the old settings or the new ones."""
    new = out / ".tmp-config.json"
    new.write_text(json.dumps(now, indent=1) + "\n")
    new.replace(out / "config.json")


def resume(args, data_sha256, model, optimizer) -> dict:
    """Load the newest valid checkpoint of the run folder and rewind its logs; returns its state:
    the step it stands after and the tokens sampled until then, 0 and 0 for a new run."""
    out = args.out
    checkpoint.remove_leftovers(out)
    now = as_json(args)
    now |= {"data_sha256": data_sha256, "torch": torch.__version__}
    now |= {"python": sys.version.split()[0], "commit": commit()}
    check_folder(args, now, MATHS)
    if args.existing == "overwrite":
        checkpoint.discard(out)
    state, last = {"step": 0, "num_tokens": 0}, 0
    if newest := checkpoint.latest(out):
        # `latest` has just verified it
        state |= checkpoint.restore(newest, model, optimizer, verify=False)
        last = state["step"]
        print(f"resuming {out} after step {last}", flush=True)
        checkpoint.prune(out, last, args.keep)
    else:
        config = out / "config.json"
        before = read_json(config) if config.exists() else {}
        if checkpoint.changed_settings(before, now, MATHS):
            last = -1  # the row of step 0 that may be there is of another model
    for name in checkpoint.LOGS:
        checkpoint.rewind(out / name, last)
    write(out, now)
    return state


# --------------------------------------------------------------------------------------------------
# what follows from the model and the machine


def is_gpu(device) -> bool:
    """Whether a device's name, such as cuda or cuda:1, is that of a GPU."""
    return torch.device(device).type == "cuda"


def settle(args, config, device):
    """Fill in the flags that follow from the model and the kind of machine. What an earlier part of
    the run settled stays."""
    on_gpu, saved = is_gpu(device), earlier(args)
    args.dtype = args.dtype or saved.get("dtype")
    args.optimizer = args.optimizer or saved.get("optimizer")
    if args.max_new_tokens is None:
        args.max_new_tokens = default_new_tokens(config, args.max_prompt_tokens)
    if args.max_prompt_tokens + args.max_new_tokens > config.max_len:
        raise ValueError(
            f"--max-prompt-tokens {args.max_prompt_tokens} + --max-new-tokens "
            f"{args.max_new_tokens} exceed the {config.max_len} tokens this model was made for: "
            "lower one of them"
        )
    if args.dtype is None:
        args.dtype = "bfloat16" if on_gpu or args.offload else "float32"
    if args.compile is None:
        args.compile = on_gpu
    if args.logit_chunk is None:
        args.logit_chunk = 1024 if on_gpu else 256
    if parallel.world() > 1 and args.optimizer is None:
        args.optimizer = "adamw"


def free_memory(device) -> float:
    """Bytes for this run: of a GPU what other programs leave, else what the machine has."""
    if not is_gpu(device):
        return host_bytes()
    # our own context is there by now, and in the plan; the rest is for what the plan does not know,
    # for it is not measured yet
    return 0.97 * (torch.cuda.mem_get_info()[0] + CONTEXT)


def settle_memory(args, config, device, memory, host):
    """Fill in the flags that follow from the memory there is; returns (flag, value, reason) of
    each.

    memory, host  bytes of a GPU that are free, and of the machine around it; of no meaning on a CPU
    """
    asked = config, args, memory, host, is_gpu(device), parallel.world()
    chosen = parallel.on_rank_0(choose, *asked)
    for name, value, _ in chosen:
        setattr(args, name, value)
    return chosen


# --------------------------------------------------------------------------------------------------
# what a run says before it starts


def show_run(args, config, schedule, device):
    """What will be trained, and how."""
    compiled = ", compiled" if args.compile else ""
    wrapped(
        f"{args.model}: {parameters(config) / 1e6:,.1f} M parameters, {config.n_layers} layers, "
        f"V = {config.vocab_size:,}, {args.dtype} with {args.optimizer} on {device}{compiled}"
    )
    if args.recipe:
        flags = [flag(name, getattr(args, name)) for name in RECIPES[args.recipe]]
        wrapped(f"recipe {args.recipe}: {' '.join(flags)}")
    updates = -(-args.prompts // args.mini_prompts)
    wrapped(
        f"{schedule or 'bupo layer auto, then grpo'}; {args.steps} steps x {args.prompts} problems "
        f"x {args.group} responses, {updates} updates a step"
    )
    phases = schedule.phases if schedule else ()
    for layer in dict.fromkeys(layer for layers, _ in phases for layer in layers):
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
