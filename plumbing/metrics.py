"""A step's row of metrics.jsonl, in TRL's names for what TRL has, and what it is made of.

row(...)         the row
Meter            seconds of the step's parts, and what its updates saw
forward_flops    operations of the log-probs of responses
weights_sample, weights_change, peak_gb
summary(rows)    the last line of a run
"""

import resource
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from statistics import fmean

import torch

from plumbing import parallel
from plumbing.rows import each_row


@dataclass
class Meter:
    """What a step took and saw, filled in as it goes."""

    seconds: Counter = field(default_factory=Counter)  # of its parts
    sums: Counter = field(default_factory=Counter)  # over tokens, of all updates
    norms: list = field(default_factory=list)  # of the gradients of updates, before clipping
    flops: int = 0
    weights: dict | None = None  # some of them, before the updates: see weights_sample
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def clock(self, part):
        """Add the seconds spent in here to those of a part of the step."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def add(self, sums):
        for name, value in sums.items():
            self.sums[name] += value


def timed(part):
    """Of a function of a run: its seconds are those of a part of the step."""

    def decorate(f):
        @wraps(f)
        def run_timed(run, *args, **kw):
            with run.meter.clock(part):
                return f(run, *args, **kw)

        return run_timed

    return decorate


# --------------------------------------------------------------------------------------------------
# the row


def row(run, step, layers, groups, drawn) -> dict:
    """The row of a step. layers are those whose policies it trained; groups [N][G] the responses
    that it learned from, drawn all that it sampled: more with dynamic sampling."""
    meter, n_layers = run.meter, run.model.config.n_layers
    rewards = torch.tensor([[r.reward for r in group] for group in drawn])
    equal = (rewards == rewards[:, :1]).all(1)
    solved = torch.tensor([[is_right(r) for r in group] for group in drawn])  # [N,G]
    responses = [r for group in groups for r in group]
    lengths = torch.tensor([float(len(r.ids)) for r in responses])
    stopped = torch.tensor([r.stopped for r in responses])
    terminated = lengths[stopped].mean().item() if stopped.any() else None
    norms = meter.norms
    sums = meter.sums
    sampled = sum(r.total_length for group in drawn for r in group)
    out = {
        "step": step,
        "num_tokens": run.num_tokens + sampled,
        "phase": "internal" if min(layers) < n_layers else "whole",
        "inter/layer": min(layers),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "reward_group_std": rewards.std(1).mean().item(),
        "frac_reward_zero_std": equal.float().mean().item(),
        "solved_all": solved.all(1).float().mean().item(),
        "solved_none": (~solved.any(1)).float().mean().item(),
        "groups_sampled": len(rewards),
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - stopped.float().mean().item(),
        "completions/mean_terminated_length": terminated,
        "response_tokens": int(lengths.sum()),
        "updates": len(norms),
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
    }
    if norms:
        tokens = sums["tokens"]
        out["loss"] = sums["loss"] / len(norms)
        out["inter/entropy"] = sums["entropy"] / tokens
        out["clip_ratio/low_mean"] = sums["clip_low"] / tokens
        out["clip_ratio/high_mean"] = sums["clip_high"] / tokens
        if sums["kl"]:
            out["kl"] = sums["kl"] / tokens
    by_verdict = {"right": [], "wrong": []}
    for r in responses:
        by_verdict["right" if is_right(r) else "wrong"].append(len(r.ids))
    for name, some in by_verdict.items():
        if some:
            out[f"completions/mean_length_{name}"] = fmean(some)
    verdicts = Counter(r.verdict.reason.partition(":")[0] for r in responses)
    for reason, count in verdicts.items():
        out[f"verdict/{reason}"] = count
    return out | speed(meter, out["response_tokens"])


def is_right(response) -> bool:
    """Whether a response has solved its problem, whatever its reward is."""
    return response.verdict.correct and response.stopped


def speed(meter, response_tokens) -> dict:
    """Seconds of every part of the step, tokens sampled and operations done in a second."""
    seconds = dict(meter.seconds)
    total = time.perf_counter() - meter.start
    seconds["other"] = total - sum(seconds.values())
    sampling = meter.seconds["rollout"] + meter.seconds["grade"]
    training = sum(meter.seconds[part] for part in ("logprobs", "backward", "optimizer"))
    return {
        "perf/rollout_tok_s": response_tokens / sampling,
        "perf/train_tflop_s": meter.flops / parallel.world() / training / 1e12,
        "train_tflop": meter.flops / 1e12,
        "perf/peak_gb": peak_gb(),
        **{f"time/{part}": value for part, value in seconds.items()},
    }


def peak_gb() -> float:
    """Most memory held, in GB: on a GPU by tensors in this step, else by the process since its
    start."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forward_flops(model, responses, layer) -> int:
    """Floating-point operations of the log-probs of responses at a layer: two for every weight and
    the tokens it meets, and attention's two products over what each token sees, which is n^2 / 2
    pairs. A backward takes twice as many."""
    c = model.config
    tokens = sum(r.total_length for r in responses)
    response_tokens = sum(len(r.ids) for r in responses)
    pairs = sum(r.total_length**2 for r in responses)
    weights = [p.numel() for p in model.blocks[:layer].parameters()]
    body = sum(weights) * tokens
    head = c.vocab_size * c.d_model * response_tokens
    attention = layer * c.n_heads * c.head_dim * pairs
    return 2 * (body + head + attention)


def weights_sample(model, most=1 << 20) -> dict:
    """Up to about `most` of the weights, evenly spaced, of this rank's shards, float32, by part of
    the model: embed, 1 to L, norm, and unembed where it is a matrix of its own."""
    count = sum(parallel.local_tensor(p).numel() for p in model.parameters())
    stride = max(1, count // most)
    parts = defaultdict(list)
    for name, p in model.named_parameters():
        part, index, *_ = name.split(".")
        if part == "blocks":
            part = str(int(index) + 1)
        w = parallel.local_tensor(p.detach())
        sample = w.flatten()[::stride]
        parts[part].append(sample.float().clone())
    return {part: torch.cat(samples) for part, samples in parts.items()}


def weights_change(before, model) -> dict:
    """What the updates since weights_sample did to the sampled weights, on all ranks:

    weights_moved      share of them whose value in bfloat16 is another
    update_norm/PART   |W - W before| / |W before|
    """
    sums = Counter()
    for part, now in weights_sample(model).items():
        old = before[part]
        moved = now.bfloat16() != old.bfloat16()
        change = now - old
        sums["moved"] += moved.sum().item()
        sums["all"] += len(now)
        sums[part, "change"] = change.square().sum().item()
        sums[part, "size"] = old.square().sum().item()
    sums = parallel.all_reduce(sums)
    out = {"weights_moved": sums["moved"] / sums["all"]}
    for part in before:
        size = max(sums[part, "size"], 1e-30)
        relative = sums[part, "change"] / size
        out[f"update_norm/{part}"] = relative**0.5
    return out


# --------------------------------------------------------------------------------------------------
# for a person


def line(row) -> str:
    """A step, in a line."""
    parts = [
        f"reward {row['reward']:.3f}",
        f"length {row['completions/mean_length']:.0f}",
        f"entropy {row.get('entropy', 0):.2f}",
        f"layer {row['inter/layer']}",
        f"{row['perf/rollout_tok_s']:,.0f} tok/s",
    ]
    if "eval/accuracy" in row:
        parts.append(f"accuracy {row['eval/accuracy']:.3f}")
    return "  ".join(parts)


def summary(rows, schedule):
    """The last line: accuracy before and after, when it was best, and memory, from the rows of
    metrics.jsonl alone; None without held-out problems."""
    scores = []  # (accuracy, seconds until then, row)
    seconds = peak = 0.0
    for row in rows:
        seconds += sum(v for k, v in row.items() if k.startswith("time/"))
        peak = max(peak, row.get("perf/peak_gb", 0.0))
        if "eval/accuracy" in row and isinstance(row.get("step"), int):
            scores.append((row["eval/accuracy"], seconds, row))
    if len(scores) < 2:
        return None
    before, _, first = scores[0]
    after, _, last = scores[-1]
    best, soonest, _ = max(scores, key=lambda s: (s[0], -s[1]))
    began = f" (step {first['step']})" if first["step"] else ""  # the row of step 0 is lost
    return (
        f"accuracy {before:.2f}{began} -> {after:.2f} on {last['eval/questions']} held-out "
        f"problems in {seconds:.0f} s, best {best:.2f} after {soonest:.0f} s, at most "
        f"{peak:.1f} GB ({schedule})"
    )


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
        if are_tokens(prompt, vocab_size) and are_tokens(ids, vocab_size):
            found.append((prompt + ids, len(prompt)))
    return found


def are_tokens(ids, vocab_size) -> bool:
    """Whether this, out of a file, is a list of token ids that is not empty."""
    if not isinstance(ids, list) or not ids:
        return False
    return all(type(token) is int and 0 <= token < vocab_size for token in ids)
