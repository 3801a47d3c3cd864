"""The arithmetic of a GPU run, on a CPU: bfloat16 weights, float32 gradients, an optimizer that
owns the exact master."""

import copy
from contextlib import nullcontext

import pytest
import torch
from policies import backward, stored_logprobs

import train
from bupo import Schedule
from grpo import Response
from model import Config, Transformer
from plumbing import parallel
from plumbing.optimizer import SplitAdamW

CONFIG = Config("qwen3", 512, 128, 4, 4, 2, 32, 256, tied=True)
N_VOCAB = 501


def groups(n=8, size=4):
    """Random responses with advantages of both signs."""
    g = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(6, 500, (count,), generator=g).tolist()

    out = []
    for i in range(n):
        prompt = ids(6 + i)
        out.append(
            [Response(prompt, ids(20 + 5 * j), [], advantage=(-1.0) ** j) for j in range(size)]
        )
    return out


def build(mode, lr):
    """A model and its optimizer, float32 as on a CPU or bfloat16 as on a GPU, both from the same
    checkpoint in bfloat16."""
    model = Transformer(CONFIG).init_weights(0, 0.05).bfloat16()
    if mode == "float32":
        model = model.float()
        return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    return model, SplitAdamW(model.parameters(), lr=lr, moment_dtype=torch.float32)


def make_run(model, lr, mini_prompts):
    """What an update needs of a run."""
    args = train.parse(["--lr", str(lr), "--mini-prompts", str(mini_prompts)])
    args.max_new_tokens, args.logit_chunk, args.micro_tokens = 64, 64, 400
    tokenizer = type("", (), {"n_vocab": N_VOCAB})
    sampler = type("", (), {"model": model})
    schedule = Schedule((), CONFIG.n_layers)
    return train.Run(args, model, tokenizer, sampler, [], [], "", schedule)


def master(model, optimizer):
    """The blocks' float32 matrices."""
    exact = optimizer.master if isinstance(optimizer, SplitAdamW) else torch.Tensor.detach
    matrices = [exact(p).flatten() for p in model.blocks.parameters() if p.dim() == 2]
    return torch.cat(matrices)


def together(mode, lr, context=nullcontext):
    """A step of four updates as train.py makes it."""
    model, optimizer = build(mode, lr)
    run = make_run(model, lr, 2)
    run.optimizer, policy = optimizer, run.policy(CONFIG.n_layers)
    with context():
        minis = train.mini_batches(groups(), run.args)
        for response, logprobs, _ in train.all_logprobs(run, policy, minis):
            response.old_logprobs[CONFIG.n_layers] = logprobs
        for mini in minis:
            train.gradient(run, policy, mini)
            train.optimizer_step(run, mini, train.clip(run))
    return master(model, optimizer)


def one_at_a_time(mode, lr):
    """The same four updates, each by a model that is built anew from the last one's weights."""
    model, optimizer = build(mode, lr)
    all_groups = groups()
    run = make_run(model, lr, 2)
    policy = dict(n_vocab=N_VOCAB, chunk=run.args.logit_chunk)
    everything = [r for group in all_groups for r in group]
    old = stored_logprobs(model, everything, CONFIG.n_layers, 400, **policy)
    for response, logprobs in zip(everything, old, strict=True):
        response.old_logprobs[CONFIG.n_layers] = logprobs
    for i in range(0, 8, 2):
        weights, state = model.state_dict(), optimizer.state_dict()
        model, optimizer = build(mode, lr)
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        mini = [r for group in all_groups[i : i + 2] for r in group]
        backward(model, mini, CONFIG.n_layers, 400, **policy)
        parallel.clip_gradients(model, 1.0)
        optimizer.step()
    return master(model, optimizer)


def start(mode):
    return torch.cat(
        [
            p.detach().float().flatten()
            for p in build(mode, 1.0)[0].blocks.parameters()
            if p.dim() == 2
        ]
    )


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_a_step_of_several_updates_is_the_updates_made_one_at_a_time(mode):
    """No update may see weights from before the last one."""
    a, b = together(mode, 1e-3), one_at_a_time(mode, 1e-3)
    way = (b - start(mode)).norm()
    assert way > 1 and (a - b).norm() / way < 1e-6


def test_the_measure_sees_stale_weights():
    """What an autocast that spans the updates does: it keeps its first casts of the weights, and
    the test above fails."""

    def stale():
        return torch.autocast("cpu", torch.bfloat16)

    def fresh():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    a, b = together("float32", 1e-3, stale), together("float32", 1e-3, fresh)
    assert (a - b).norm() / (b - start("float32")).norm() > 0.1


def test_an_update_is_that_of_float32_masters_computing_in_bfloat16():
    """The reference keeps float32 weights, and casts them for every product. A step of four updates
    at Adam's usual size of steps: what the two differ by, over the length of the update, beside
    what bfloat16 costs the reference itself."""
    lr = 1e-4
    ours = together("bfloat16", lr) - start("bfloat16")

    def cast():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    reference = together("float32", lr, cast) - start("float32")
    exact = together("float32", lr) - start("float32")
    apart = (ours - reference).norm() / reference.norm()
    noise = (reference - exact).norm() / exact.norm()
    print(
        f"against the reference {apart:.3f}, it against float32 {noise:.3f}, ours "
        f"{(ours - exact).norm() / exact.norm():.3f}"
    )
    assert apart < 2 * noise < 0.2


def joint_norm(tensors):
    return torch.stack([t.norm() for t in tensors]).norm()


def gradients(model, responses, micro_tokens, pack):
    model.zero_grad()
    backward(model, responses, CONFIG.n_layers, micro_tokens, n_vocab=N_VOCAB, pack=pack)
    return [p.grad.clone() for p in model.parameters()]


def test_the_gradient_does_not_depend_on_the_split():
    """bfloat16 compute, packed as on a GPU: micro-batches of one response to all responses."""
    model, _ = build("bfloat16", 1e-4)
    responses = [r for group in groups() for r in group]
    whole = gradients(model, responses, 10**6, True)
    length = joint_norm(whole)
    for micro_tokens in (40, 150, 600):
        parts = gradients(model, responses, micro_tokens, True)
        assert all(p.dtype == torch.float32 for p in parts)
        assert joint_norm([a - b for a, b in zip(parts, whole, strict=True)]) < 2e-4 * length
