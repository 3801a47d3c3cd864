"""Train a language model with GRPO, or with BuPO: first the policy of an internal layer, then the
whole model.

    python train.py                                      the embedded default: minutes on a CPU
    python train.py --recipe words                       a real small model, on a laptop
    python train.py --model qwen3-4b --bupo-layer 30     the real thing, on a GPU
    python train.py --model qwen3-4b --bupo-layer 6 --bupo-steps 30      the paper's Qwen3-4B
    python train.py --model qwen3-4b --dry-run --memory 80               plan and memory, no GPU
    torchrun --nproc-per-node 8 train.py --model qwen3-8b                8 GPUs

A step, in `train`:

    problems -> responses of the whole model -> rewards -> advantages within each group
    -> log-probs of the layer's policy before any update
    -> for every mini-batch: gradient of the clipped loss, clip its norm, optimizer step

The flags are in plumbing/settings.py. The value of the loss says nothing; watch the reward. The
run folder holds config.json, metrics.jsonl, samples.jsonl, step_000030/ (a Hugging Face folder plus
optimizer state) and figures. The same command run again resumes from the newest valid step.
Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 numerics, 6 memory, 7 another rank died, 8 the
disk is full or a checkpoint cannot be written (those before it stand), 75 ended by SIGTERM, SIGHUP
or SIGUSR1 with its state saved, 130 by Ctrl-C.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch
from tqdm import tqdm

import decompose
import tiny
from bupo import InternalPolicy, Schedule, align, look
from eval import avg_at_k, encode_prompts, grade, sample_row
from grpo import (
    backward,
    collate,
    group_advantages,
    mask_certain,
    overlong_penalty,
    stored_logprobs,
)
from model import Config, Transformer
from plumbing import checkpoint, cli, download, figures, metrics, parallel, settings
from plumbing import tokenizer as tokenizers
from plumbing.cli import guarded, no_memory, pick_device, printable
from plumbing.data import DataError, batch, fingerprint, load_problems, needs_hub, without_shared
from plumbing.hub import HUB, load_model, read_config, repository, resolve
from plumbing.kernels import compile_blocks, compile_errors, plain_blocks
from plumbing.memory import host_bytes, memory_plan, show_plan, table
from plumbing.metrics import Meter, timed
from plumbing.noise import fold
from plumbing.optimizer import make_optimizer
from plumbing.rows import each_row, one_line, read_json
from plumbing.settings import is_gpu
from plumbing.shapes import preset_config
from plumbing.signals import Signals, Stopped
from plumbing.tokenizer import Tokenizer
from rollout import Response, Sampler
from verify import last_box, verifiable


@dataclass
class Run:
    """What a run works with, opened once."""

    args: argparse.Namespace
    model: Transformer
    tokenizer: Tokenizer
    sampler: Sampler
    problems: list  # (Problem, prompt ids) to train on
    tests: dict  # {name: the same, held out}; may be empty
    data_sha256: str
    schedule: Schedule | None = None
    optimizer: torch.optim.Optimizer | None = None
    reference: Transformer | None = None  # the starting model, with a KL term only
    signals: Signals = field(default_factory=Signals)
    meter: Meter = field(default_factory=Meter)  # of the step under way
    step: int = 0  # the last whole one
    num_tokens: int = 0  # sampled until then, prompts included
    unfit: int = 0  # updates in a row that were left out for want of finite gradients
    watched: list | None = None  # responses of step 1 as (ids, prompt length), see `watch`
    rows: list = field(default_factory=list)  # of metrics.jsonl

    @property
    def n_vocab(self) -> int:
        """Ids from here on belong to no token: masked in sampling and in training."""
        return min(self.tokenizer.n_vocab, self.model.config.vocab_size)

    def policy(self, layer, model=None) -> InternalPolicy:
        """The policy of a layer, of this run's model or of another."""
        a, model = self.args, model or self.model
        temperature = a.temperature
        if layer < model.config.n_layers and a.internal_temperature:
            temperature = a.internal_temperature
        rest = temperature, self.n_vocab, a.logit_chunk
        return InternalPolicy(model, *rest, layer=layer, norm=a.internal_norm)


# --------------------------------------------------------------------------------------------------
# the algorithm


def train(run, log):
    """Every step of a run. log(row, groups) is told what came of each."""
    args = run.args
    for step in range(run.step + 1, args.steps + 1):
        run.meter = Meter()
        # GRPO: always that of L, the model's. BuPO: an internal layer's first
        layers = run.schedule.layers_at(step, run.rows)
        policies = [run.policy(layer) for layer in layers]
        problems = next_problems(run, step, args.prompts)
        groups = sample(run, problems, args.group, noise=(step, 0))  # [N][G] responses, of pi^L
        groups = drawn = grade_and_gather(run, groups, problems)
        if args.refills:
            groups, drawn = replace_equal_groups(run, step, drawn)

        rewards = torch.tensor([[r.reward for r in group] for group in groups])
        advantages = group_advantages(rewards, args.advantage)  # [N,G]
        for group, row in zip(groups, advantages.tolist(), strict=True):
            for response, advantage in zip(group, row, strict=True):
                response.advantage = advantage
        minis = mini_batches(groups, args)
        if run.model.unembedding.is_cuda:
            run.sampler.release()  # the KV cache's memory is the trainer's now
        seen = before_updates(run, groups)
        for policy in policies:
            keep_logprobs(run, policy, minis)

        for mini in minis:
            for policy in policies:  # more than one: their losses are summed
                gradient(run, policy, mini)
            norm = clip(run)
            optimizer_step(run, mini, norm)
        after = after_updates(run, policies, groups)
        run.step = step
        log(metrics.row(run, step, layers, groups, drawn) | seen | after, groups)


def next_problems(run, step, count, refill=0):
    """The problems of a step: a walk through all of them. A refill walks in an order of its own,
    which is a function of the step like the first."""
    seed = run.args.seed
    return batch(run.problems, step, count, fold(seed, refill) if refill else seed)


def replace_equal_groups(run, step, drawn):
    """Dynamic sampling (arXiv 2503.14476): groups of equal rewards, from which there is nothing to
    learn, give way to groups of other problems, up to --refills times. Returns (groups, all that
    was drawn)."""
    args, groups, new = run.args, [], drawn
    for refill in range(1, 2 + args.refills):
        groups += [group for group in new if len({r.reward for r in group}) > 1]
        missing = args.prompts - len(groups)
        if not missing or refill > args.refills:
            break
        problems = next_problems(run, step, missing, refill)
        new = sample(run, problems, args.group, noise=(step, refill))
        new = grade_and_gather(run, new, problems)
        drawn = drawn + new
    return groups or new, drawn  # without anything to learn from it is still a step


def mini_batches(groups, args) -> list[list[Response]]:
    """The responses of --mini-prompts problems for every update. One without any advantage makes no
    update at all: an optimizer step on zero gradients would still move weights, by decay and by old
    moments."""
    minis = []
    for i in range(0, len(groups), args.mini_prompts):
        mini = [r for group in groups[i : i + args.mini_prompts] for r in group if r.ids]
        if args.overlong == "mask":
            mini = [r for r in mini if r.stopped]
        if any(r.advantage != 0 for r in mini):
            minis.append(mini)
    return minis


# --------------------------------------------------------------------------------------------------
# its lines


@timed("rollout")
def sample(run, problems, n, noise, progress=None) -> list[list[Response]]:
    """n responses to each (problem, prompt ids) of this rank's share, drawn with the noise that
    (seed, *noise) names. Stopped, on all ranks, when one has got a signal meanwhile."""
    args, local, groups = run.args, parallel.local_slice(len(problems)), []
    with suppress(Stopped), run.signals.may_leave():
        groups = run.sampler.generate(
            [ids for _, ids in problems[local]],
            n,
            args.max_new_tokens,
            args.temperature,
            run.tokenizer.stop_ids,
            seed=fold(args.seed, *noise),
            n_vocab=run.n_vocab,
            progress=None if parallel.rank() else progress,
            first=local.start,
        )
    if run.signals.agree():
        raise Stopped
    return groups


@timed("grade")
def grade_and_gather(run, groups, problems) -> list[list[Response]]:
    """Grade this rank's responses, give each its reward, and gather those of all ranks."""
    args, local = run.args, parallel.local_slice(len(problems))
    for group, (problem, _) in zip(groups, problems[local], strict=True):
        for k, r in enumerate(group):
            grade(r, problem, run.tokenizer, args.verifier)
            r.reward = reward(r, args)
            if args.reward == "random":  # a coin, whatever the response is
                coin = fold(args.seed, run.step, k, *r.prompt)
                r.reward = float(coin % 2)
    return parallel.all_gather(groups)


def reward(response, args) -> float:
    """1 for a right answer (--reward format: for any box, a control of arXiv 2506.10947), else 0;
    of a response cut off by the limit 0; --overlong soft takes off up to 1 for length."""
    right = response.verdict.correct
    if args.reward == "format":
        right = last_box(response.text, len(response.text)) >= 0
    right = float(right and response.stopped)
    if args.overlong != "soft":
        return right
    return right + overlong_penalty(len(response.ids), args.max_new_tokens, args.overlong_buffer)


@timed("logprobs")
def before_updates(run, groups) -> dict:
    """Entropy of the model's own policy, and its log-probs as the trainer computes them against the
    sampler's, on one micro-batch of evenly spaced responses.

    The cheapest bug detector there is: wrong positions, stale weights and a forgotten temperature
    all show here at once.
    """
    run.meter.weights = metrics.weights_sample(run.model)
    responses = [r for group in groups for r in group if r.ids]
    if not responses:
        return {}
    longest = max(r.total_length for r in responses)
    stride = ceil(len(responses) * longest / run.args.micro_tokens)
    some = responses[::stride]
    policy = run.policy(run.model.config.n_layers)
    with torch.no_grad():
        logprobs, entropy = policy.logprobs(collate(some, run.model.unembedding.device))
    drawn = torch.tensor([x for r in some for x in r.logprobs], device=logprobs.device)
    diff = logprobs - drawn
    ratio = diff.exp()
    return {
        "entropy": entropy.mean().item(),
        "sampler_diff/mean": diff.abs().mean().item(),
        "sampler_diff/max": diff.abs().max().item(),
        "sampler_diff/far": ((ratio - 1).abs() > 0.1).float().mean().item(),
        "sampler_diff/kl": (diff.expm1() - diff).mean().item(),  # k3 of KL(sampler || trainer)
        "sampler_diff/ess": (ratio.mean().square() / ratio.square().mean()).item(),
    }


@timed("logprobs")
def keep_logprobs(run, policy, minis):
    """What an update on the responses needs from before it: old and reference log-probs, and which
    tokens learn."""
    args, layer = run.args, policy.layer
    if len(minis) > 1:  # with one update the old policy is the one that is trained
        for response, logprobs, _ in all_logprobs(run, policy, minis):
            response.old_logprobs[layer] = logprobs
    if run.reference:
        for response, logprobs, _ in all_logprobs(run, run.policy(layer, run.reference), minis):
            response.ref_logprobs[layer] = logprobs
    if args.entropy_top < 1:
        uncertain = run.policy(args.entropy_layer or layer)
        for mini in minis:
            mask_certain(uncertain, mini, args.entropy_top, args.micro_tokens)


def all_logprobs(run, policy, minis) -> list:
    """(response, log-probs, entropies) of this rank's responses, under a policy as it is now."""
    # `backward` deals them to the same ranks
    local = [r for mini in minis for r in parallel.local_responses(mini)]
    count_flops(run, policy, minis)
    return list(stored_logprobs(policy, local, run.args.micro_tokens))


def count_flops(run, policy, minis, times=1):
    for mini in minis:
        run.meter.flops += times * metrics.forward_flops(run.model, mini, policy.layer)


@timed("backward")
def gradient(run, policy, mini):
    """`grpo.backward` by the flags. Out of memory it starts again with half the --micro-tokens,
    which changes no gradient, or says what was too large."""
    args = run.args
    clips = dict(clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip or None)
    terms = dict(weighting=args.loss, limit=args.max_new_tokens, kl=args.kl, tis=args.tis or None)
    terms["objective"] = args.objective
    while True:
        try:
            sums = backward(policy, mini, args.micro_tokens, **clips, **terms)
            if args.align and policy.layer == run.model.config.n_layers:
                align(run.policy(args.align_layer), mini, args.micro_tokens, args.align)
            break
        except (RuntimeError, MemoryError) as e:
            if not no_memory(e):
                raise
            longest = max(r.total_length for r in mini)
            if parallel.world() > 1 or args.micro_tokens <= longest:
                raise torch.OutOfMemoryError(
                    f"in an update of layer {policy.layer}: micro-batches of {args.micro_tokens} "
                    f"tokens, the longest response with its prompt {longest}, "
                    f"{metrics.peak_gb():.1f} GB held; {e}"
                ) from None
        run.model.zero_grad()  # of the part that was done
        args.micro_tokens = max(args.micro_tokens // 2, longest)
        say(f"out of memory: --micro-tokens {args.micro_tokens} from here on")
    run.meter.add(sums)
    count_flops(run, policy, [mini], times=3)
    learning = settings.blocks(args, run.step + 1, run.model.config.n_layers)
    if learning is not None:
        freeze_others(run.model, learning)


def freeze_others(model, learning):
    """Drop the gradient of the blocks that are not learning, and of the final norm unless the last
    block is: what an internal phase leaves untouched."""
    for i, block in enumerate(model.blocks):
        if i not in learning:
            block.zero_grad()
    if model.config.n_layers - 1 not in learning:
        model.norm.zero_grad()


@timed("optimizer")
def clip(run) -> torch.Tensor:
    return parallel.clip_gradients(run.model, run.args.grad_clip)


@timed("optimizer")
def optimizer_step(run, mini, norm):
    """The update, unless its gradient is not finite."""
    if not torch.isfinite(norm):
        leave_out(run, mini)
        return
    run.optimizer.step()
    # to None, not to zeros: AdamW must not see the blocks above an internal layer
    run.optimizer.zero_grad()
    run.unfit = 0
    run.meter.norms.append(norm.item())


UNFIT = 3  # updates in a row without finite gradients that end a run


def leave_out(run, mini):
    """What happens in place of an update whose gradient is NaN or infinite: its batch is written
    out. FloatingPointError at the third in a row."""
    step, first = run.step + 1, "its norm"
    for name, p in run.model.named_parameters():
        if p.grad is not None and not parallel.full_tensor(p.grad).isfinite().all():
            first = name
            break
    run.model.zero_grad()
    run.unfit += 1
    path = run.args.out / "bad_batches.jsonl"
    if parallel.rank() == 0:
        # a full disk costs the copy, not the run
        with suppress(OSError), checkpoint.Log(path) as bad_batches:
            for r in mini:
                layers = run.schedule.layers_at(step, run.rows)
                row = {"step": step, "layer": min(layers), "first": first}
                row |= {"advantage": r.advantage, "prompt_ids": r.prompt, "ids": r.ids}
                bad_batches.write([row | {"sampler_logprobs": r.logprobs}])
    say(
        f"step {step}: the gradient is not finite (first in {first}), nothing was updated; the "
        f"batch is in {path}"
    )
    if run.unfit == UNFIT:
        raise FloatingPointError(
            f"the gradient is not finite in {UNFIT} updates in a row (first in {first}); their "
            f"batches are in {path}, the last checkpoint stands: lower --lr and resume with "
            "--existing override"
        )


@timed("optimizer")
def after_updates(run, policies, groups) -> dict:
    """Show the sampler the new weights; what the row says of them."""
    args, trained = run.args, policies[0]
    whole = run.policy(run.model.config.n_layers)
    parallel.update_sampler(run.model, run.sampler.model)
    seen = {"lr": args.lr}
    seen |= metrics.weights_change(run.meter.weights, run.model)
    if args.bupo_steps != "auto" or trained.layer == whole.layer:
        return seen
    right = [r for group in groups for r in group if metrics.is_right(r)]
    if right:
        seen |= look(trained, whole, right[:64], args.micro_tokens)
    return seen


def say(text):
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# around it: logs, evaluation, checkpoints, signals


class Keeper:
    """Writes what comes of every step: its row, some of its responses, checkpoints."""

    def __init__(self, run, stack: ExitStack):
        self.run, out = run, run.args.out
        paths = [out / name for name in ("metrics.jsonl", "samples.jsonl")]
        # what is no row there `resume` has moved away
        run.rows = parallel.on_rank_0(lambda: [row for row in each_row(paths[0]) if row])
        self.rows = run.rows
        files = [os.devnull] * 2 if parallel.rank() else paths
        self.metrics, self.samples = (stack.enter_context(checkpoint.Log(f)) for f in files)
        hidden = parallel.rank() > 0 or not sys.stderr.isatty()
        last = run.args.steps
        bar = tqdm(initial=run.step, total=last, unit="step", disable=hidden)
        self.bar, self.first, self.saved = stack.enter_context(bar), run.step + 1, run.step

    def write(self, row):
        self.rows.append(row)
        self.metrics.write([row])

    def before_training(self, seconds):
        """Accuracy of the model as it is."""
        run, step = self.run, self.run.step
        known = any("eval/accuracy" in row for row in self.rows)
        if run.tests and step < run.args.steps and not known:
            self.write({"step": step, **evaluate(run), "time/setup": seconds})
            when = f"after step {step}" if step else "before training"
            tqdm.write(f"held-out accuracy {when}: {self.rows[-1]['eval/accuracy']:.3f}")

    def after_step(self, row, groups):
        run, args, step = self.run, self.run.args, row["step"]
        responses = [r for group in groups for r in group]
        run.num_tokens = row["num_tokens"]
        if run.tests and due(step, args.eval_every, args.steps):
            with suppress(Stopped):  # a signal is heeded once the step is logged
                row |= evaluate(run)
        if step == self.first:
            text = printable(responses[0].text)
            tqdm.write(f"first response (reward {responses[0].reward:g}):\n{text}")
        logged = responses[: args.log_samples]
        self.samples.write([scored_row(r, step) for r in logged])
        if args.watch_layers and (step == 1 or due(step, args.watch_layers)):
            row |= parallel.on_rank_0(watch, run, args.out)
        self.write(row)
        line = metrics.line(row)
        if self.bar.disable:
            print(f"step {step}/{args.steps}  {line}", flush=True)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()
        # not in the middle of a failure
        if step == args.steps or (due(step, args.save_every) and not run.unfit):
            self.save()
        if run.signals.agree():
            raise Stopped

    def save(self):
        """A checkpoint after the last whole step."""
        run = self.run
        if run.step == self.saved:
            return
        gathered = parallel.gather(run.model, run.optimizer)
        state = {"step": run.step, "num_tokens": run.num_tokens}
        what = run.args.out, run.step, *gathered, state, run.model.folder, run.args.keep
        parallel.on_rank_0(checkpoint.save, *what)
        self.saved = run.step


def scored_row(response, step) -> dict:
    """The line of samples.jsonl, with what the update saw of a response: its advantage, and the
    log-prob of each token under the policy that drew it."""
    logprobs = [round(x, 4) for x in response.logprobs]
    advantage = round(response.advantage, 4)
    return {**sample_row(response, step=step), "advantage": advantage, "logprobs": logprobs}


def due(step, every, last=None) -> bool:
    """Whether something that is done every so many steps, and after the last one, is due."""
    return step == last or (every > 0 and step % every == 0)


def evaluate(run) -> dict:
    """Avg@1 on the held-out problems, with the same noise at every step: of the first set as
    eval/accuracy, of others with their name behind it."""
    start, seen = time.time(), {}
    for name, tests in run.tests.items():
        groups = sample(run, tests, 1, noise=(0,), progress="eval")
        groups = grade_and_gather(run, groups, tests)
        correct = [[r.verdict.correct for r in group] for group in groups]
        accuracy = avg_at_k(correct)
        if seen:
            seen[f"eval/accuracy/{Path(name).stem}"] = accuracy
        else:
            seen = {"eval/accuracy": accuracy, "eval/questions": len(groups)}
    return {**seen, "time/eval": time.time() - start}


def watch(run, out) -> dict:
    """The first internal layer (of plain GRPO the middle one) and the model itself on the responses
    of step 1: see decompose.watch. Where samples.jsonl does not hold them, nothing, with a line the
    first time.

    In the paper a phase that is too long shows here: perplexity of the whole policy rises. It also
    rises where the model has learned to answer otherwise; then the reward does not fall.
    """
    c, start = run.model.config, time.time()
    phases = run.schedule.phases
    layer = min(phases[0][0]) if phases else (c.n_layers + 1) // 2
    if run.watched is None:
        run.watched = metrics.responses_of_step_1(out / "samples.jsonl", c.vocab_size)
        if not run.watched:
            say(
                f"--watch-layers: {out / 'samples.jsonl'} holds no responses of step 1 to look at; "
                "training goes on without"
            )
    if not run.watched:
        return {}
    seen = decompose.watch(run.sampler.model, run.watched, layer)
    return {**seen, "time/watch": time.time() - start}


def supervise(run, setup_seconds) -> list[dict]:
    """Train, with logs, checkpoints and signals around it; returns the rows of metrics.jsonl, those
    of an earlier session included."""
    with run.signals, ExitStack() as stack:
        keeper = Keeper(run, stack)
        try:
            keeper.before_training(setup_seconds)
            train(run, keeper.after_step)
        except Stopped:
            keeper.save()
            if parallel.rank() == 0:
                saved = "which is saved" if run.step else "with nothing to save"
                say(f"stopped after step {run.step}, {saved}: the same command goes on from there")
            parallel.end(130 if run.signals.got == signal.SIGINT else 75)
        return keeper.rows


def finish(run, rows):
    """Figure and last line of a run that is over and saved."""
    out = run.args.out
    parallel.on_rank_0(figures.draw, out)
    print(f"written: {out}/ (metrics.jsonl, samples.jsonl, training.png, checkpoints)")
    try:
        last = metrics.summary(rows, run.schedule)
    except Exception as e:  # rows that have been edited
        why = one_line([repr(e)])[:300]
        last = f"no accuracy: rows of metrics.jsonl are not as they were written ({why})"
    if last:
        print(printable(last))


# --------------------------------------------------------------------------------------------------
# before the first step


def parse(argv=None):
    args = settings.parse(__doc__, argv)
    # layers beyond the model's are refused when it is known
    layer = "1" if args.bupo_layer == "auto" else args.bupo_layer
    Schedule.parse(layer, args.bupo_steps, cli.MOST)
    settings.blocks(args, 1, cli.MOST)
    return args


def find_model(args) -> tuple[Config, Path | None]:
    """Shape and folder of --model. The folder is None where nothing is read from one: of the
    embedded default, and of a preset in a dry run, which knows its shape and downloads nothing."""
    if args.model in tiny.MODELS:
        return tiny.MODELS[args.model], None
    if args.dry_run and not Path(args.model).is_dir() and args.model.lower() in HUB:
        return preset_config(args.model), None
    # a run goes on with the model it began with, although the hub's may have moved
    commit = args.revision or settings.earlier(args).get("model_commit") or None
    folder = parallel.on_rank_0(resolve, args.model, commit)
    return read_config(read_json(folder / "config.json")), folder


def load_tests(args) -> dict:
    """{name: held-out problems} of --eval-data."""
    tests = {}
    for name in settings.names(args.eval_data):
        if name in ("tiny", "tiny-long"):
            lengths = (5,) if name == "tiny-long" else (3, 4)
            tests[name] = tiny.problems(args.eval_limit, 0, held_out=True, lengths=lengths)
        else:
            tests[name] = load_problems(name, limit=args.eval_limit)
    return tests


def load_data(args):
    """(problems to train on, {name: held-out problems}). What is held out is never trained on."""
    if args.data == "tiny":
        problems = tiny.problems(4096, args.seed)[: args.limit]
    else:
        limits = dict(limit=args.limit, max_bad=0.01, difficulty=args.difficulty)
        problems = load_problems(args.data, **limits)
    tests = load_tests(args)
    bad = [p for p in problems if not verifiable(p.answer)]
    if len(bad) > len(problems) // 100:
        raise DataError(
            f"{args.data}: {len(bad)} of {len(problems)} gold answers do not verify against "
            f"themselves (first: {bad[0].answer!r:.60}); their reward would always be 0"
        )
    problems, shared = without_shared(problems, sum(tests.values(), []))
    if shared:
        print(
            f"{shared} problems of {args.data} are left out of training: they are among the "
            f"held-out ones of {args.eval_data}"
        )
    if not problems:
        raise DataError(
            f"{args.data}: every problem is among the held-out ones of {args.eval_data}: give "
            "another --eval-data"
        )
    return problems, tests


def master_dtype(args):
    """Of the weights that are loaded: with one process those that compute, under torchrun the
    float32 shards behind them."""
    return torch.float32 if parallel.world() > 1 else getattr(torch, args.dtype)


def show_start(args, config, phases, chosen, device, memory):
    """What the run will do and take."""
    settings.show_run(args, config, phases, device)
    show_plan(config, args, chosen, memory, is_gpu(device))


def schedule(args, config) -> Schedule | None:
    """The phases by the flags; None where they have to be measured first. ValueError for layers
    that the model has not."""
    settings.blocks(args, 1, config.n_layers)
    for layer in (args.align_layer, args.entropy_layer):
        if layer and layer > config.n_layers:
            raise ValueError(
                f"--align-layer or --entropy-layer {layer}: this model has 1 to {config.n_layers}"
            )
    if args.bupo_layer == "auto":
        return None
    return Schedule.parse(args.bupo_layer, args.bupo_steps, config.n_layers)


def prompts_of(args, tokenizer, problems):
    """(Problem, prompt ids) of every problem whose prompt fits, and how many did not."""
    return encode_prompts(tokenizer, problems, args.max_prompt_tokens, args.system, args.thinking)


def open_run(args) -> Run:
    """Read the data, find the model, load it, and before these refuse what can be refused without
    them."""
    settings.check_known(args)
    # products as small as the embedded default's only lose from a second thread, and one thread
    # makes runs repeat bit for bit
    if args.model in tiny.MODELS:
        torch.set_num_threads(1)
    elif not Path(args.model).is_dir():
        repository(args.model)  # before any problem is fetched
    device = pick_device(args.device)
    problems, tests = load_data(args)
    memory = settings.free_memory(device)
    config, folder = find_model(args)
    args.model_commit = folder and download.commit(folder)
    phases = schedule(args, config)  # a layer that the model has not is refused before it is loaded
    settings.settle(args, config, device)
    chosen = settings.settle_memory(args, config, device, memory, host_bytes())

    if not folder:
        warm_up = args.out / "warm-up"
        folder = parallel.on_rank_0(tiny.warm_up, warm_up, args.seed, model=args.model)
    model = load_model(folder, master_dtype(args), device)
    if is_gpu(device) and args.dtype == "bfloat16":
        # TF32 for what is left in float32, beside weights of 8 bits it loses nothing
        torch.set_float32_matmul_precision("high")
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    tokenizer = tokenizers.load_tokenizer(folder, args.format)
    prompts, dropped = prompts_of(args, tokenizer, problems)
    show_start(args, config, phases, chosen, device, memory)
    settings.show_prompts(tokenizer, prompts, dropped)
    tests = {name: prompts_of(args, tokenizer, tests[name])[0] for name in tests}
    compute, longest = getattr(torch, args.dtype), args.max_prompt_tokens + args.max_new_tokens
    model = parallel.shard(model, args.replicas, compute)
    sampler = Sampler(parallel.sampling_copy(model, compute), args.slots, longest, args.compile)
    run = Run(args, model, tokenizer, sampler, prompts, tests, fingerprint(problems), phases)
    if phases is None:
        choose_layer(run)
        run.schedule = schedule(args, config)
    return run


def choose_layer(run):
    """`--bupo-layer auto`: the paper's rule, measured on responses to the first prompts."""
    groups = parallel.all_gather(sample(run, run.problems[:8], 1, noise=(0,)))
    sequences = [(r.prompt + r.ids, len(r.prompt)) for group in groups for r in group]
    layer, evidence = parallel.on_rank_0(decompose.auto_layer, run.sampler.model, sequences)
    print(f"--bupo-layer auto: layer {layer} ({evidence})")
    run.args.bupo_layer = str(layer)


def dry_run(args):
    """Say what a run would do and take, and show its first prompt where model and data are at hand.
    Loads no weights, downloads no model and writes nothing."""
    settings.check_known(args)
    sizes = args.memory or []
    device = "cuda" if sizes else pick_device(args.device)
    config, folder = find_model(args)
    phases = schedule(args, config)
    settings.settle(args, config, device)
    if len(sizes) > 1:
        print(table({args.model: config}, sizes, args))
        return
    memory = sizes[0] * 1e9 if sizes else settings.free_memory(device)
    host = float("inf") if sizes else host_bytes()
    chosen = settings.settle_memory(args, config, device, memory, host)
    show_start(args, config, phases, chosen, device, memory)
    if any(needs_hub(name) for name in (args.data, *settings.names(args.eval_data))):
        print("problems: not read, a dry run fetches nothing")
        return
    problems, _ = load_data(args)
    if not folder and args.model not in tiny.MODELS:
        print(f"{len(problems):,} problems; first prompt: not shown, the tokenizer is not here")
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.model in tiny.MODELS:
            tiny.write_tokenizer(Path(scratch))
        tokenizer = tokenizers.load_tokenizer(folder or scratch, args.format)
    settings.show_prompts(tokenizer, *prompts_of(args, tokenizer, problems))


def rehearse(run):
    """The largest rollout and the largest update there can be, once, beside all that is held then:
    memory that will not do is missed now, and not when the first long responses come. Compiled code
    that this machine cannot make is left out from here on.
    """
    args, model = run.args, run.model
    size = 0
    if not run.optimizer.state and not args.offload:  # moments come with the first update
        plan = memory_plan(model.config, args, model.unembedding.is_cuda)
        size = int(1e9 * plan.moments["training"]["optimizer state"])
    held = torch.empty(size, dtype=torch.uint8, device=model.unembedding.device)
    run.sampler.allocate()
    run.sampler.release()
    P, N = args.max_prompt_tokens, args.max_new_tokens
    longest = Response([0] * P, [0] * N, [0.0] * N, advantage=1.0)
    policy = run.policy(model.config.n_layers)
    # for a KL term
    longest.ref_logprobs[policy.layer] = torch.zeros(N, device=model.unembedding.device)
    rows = max(1, args.micro_tokens // (P + N)) * parallel.world()
    try:
        gradient(run, policy, [longest] * rows)
    except compile_errors() as e:
        why = f"{one_line([str(e)]):.200}"
        say(f"blocks cannot be compiled here, training goes on without ({why})")
        plain_blocks(model)
        gradient(run, policy, [longest] * rows)
    model.zero_grad()
    del held


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
            weights = load_model(run.model.folder, master_dtype(args), pick_device(args.device))
            weights.requires_grad_(False)
            run.reference = parallel.shard(weights, args.replicas, getattr(torch, args.dtype))
        run.optimizer = make_optimizer(run.model, args)
        gathered = parallel.gather(run.model, run.optimizer)
        state = parallel.on_rank_0(settings.resume, args, run.data_sha256, *gathered)
        run.step, run.num_tokens = state["step"], state["num_tokens"]
        if run.step:
            parallel.scatter(*gathered, run.model, run.optimizer)
        parallel.update_sampler(run.model, run.sampler.model)
        del gathered
        if run.model.unembedding.is_cuda:
            rehearse(run)
        rows = supervise(run, time.time() - began)
        finish(run, rows)


if __name__ == "__main__":
    guarded(main)
