"""The one page: its log-probs, loss and gradient are the full code's; it stands alone, and is one
page."""

import ast
import random
import sys
from pathlib import Path

import pytest
import torch

import bupo_in_one_page as page
import grpo
from bupo import InternalPolicy
from grpo import Response
from model import Config, Transformer

PATH = Path(page.__file__)
B = 12  # three groups of four


@pytest.fixture
def model():
    torch.manual_seed(0)
    return page.Transformer()


def full_model(model):
    """The same weights in our Transformer."""
    c = Config("llama", page.V, page.D, page.L, page.H, page.H, page.E, page.D_MLP, tied=True)
    c.norm_eps = torch.finfo(torch.float32).eps  # nn.RMSNorm's own
    full = Transformer(c)
    full.load_state_dict(model.state_dict())
    return full


@pytest.fixture
def ids():
    """Prompts and responses [B,P+T]: of one token, of some, and two that were cut off."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(32, page.V, (B, page.P + page.T), generator=g)
    for row, length in zip(ids, (1, 2, 5, 8, 13, 20, 21, 30, 33, 34), strict=False):
        row[page.P + length - 1] = page.END
        row[page.P + length :] = page.PAD
    return ids


@pytest.fixture
def advantages():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]])
    return page.group_advantages(rewards).view(-1, 1)


def responses(ids, advantages, old=None):
    """The rows as the full code has them."""
    out = []
    for i, row in enumerate(ids.tolist()):
        drawn = [token for token in row[page.P :] if token != page.PAD]
        r = Response(row[: page.P], drawn, advantage=advantages[i].item())
        if old is not None:
            r.old_logprobs = dict.fromkeys(range(1, page.L + 1), old[i, : len(drawn)])
        out.append(r)
    return out


def grads(model):
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same_gradient(model, full):
    mine, theirs = grads(model), grads(full)
    assert mine.keys() == theirs.keys()
    for name, g in mine.items():
        if g is None or theirs[name] is None:
            assert g is None and theirs[name] is None, name
        else:
            assert (g - theirs[name]).norm() <= 1e-5 * g.norm(), name


def step_on(model, size):
    """A step of plain gradient descent."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= size * p.grad
    model.zero_grad()


# steps so large that tokens leave the clip, none by more than the full code's dual clip
@pytest.mark.parametrize("layer, size", [(1, 5.0), (3, 1.0), (page.L, 0.3)])
def test_logprobs_loss_and_gradient_are_the_full_codes(model, ids, advantages, layer, size):
    full = full_model(model)
    policy = InternalPolicy(full, layer=layer)
    mask = ids[:, page.P :] != page.PAD
    old = model.token_logprobs(ids, layer).detach()
    logprobs, _ = policy.logprobs(grpo.collate(responses(ids, advantages)))
    assert torch.allclose(old[mask], logprobs, rtol=0, atol=1e-5)

    for update in (1, 2):
        loss = page.policy_loss(model.token_logprobs(ids, layer), old, advantages, mask)
        loss.backward()
        sums = grpo.backward(policy, responses(ids, advantages, old), 300)
        assert sums["tokens"] == mask.sum() == 235
        assert loss.item() == pytest.approx(sums["loss"], rel=1e-5, abs=1e-6)
        clipped = sums["clip_low"], sums["clip_high"]
        assert min(clipped) > 0 if update == 2 else clipped == (0, 0)
        above = [n for n, g in grads(model).items() if g is None]
        expected = [n for n in grads(model) if layer < page.L and is_above(n, layer)]
        assert above == expected
        assert_same_gradient(model, full)
        step_on(model, size)
        full.load_state_dict(model.state_dict())
        full.zero_grad()


def is_above(name, layer):
    part, number, *_ = name.split(".")
    return part == "norm" or (part == "blocks" and int(number) >= layer)


def test_advantages_are_the_full_codes():
    g = torch.Generator().manual_seed(2)
    rewards = torch.randint(0, 2, (200, page.G), generator=g).float()
    rewards[:2] = torch.tensor([[0.0], [1.0]])
    assert torch.equal(page.group_advantages(rewards[:2]), torch.zeros(2, page.G))
    mine, theirs = page.group_advantages(rewards), grpo.group_advantages(rewards)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_equal_rewards_give_no_gradient(model, ids):
    zero = page.group_advantages(torch.ones(3, 4)).view(-1, 1)
    logprobs = model.token_logprobs(ids, page.L)
    page.policy_loss(logprobs, logprobs.detach(), zero, ids[:, page.P :] != page.PAD).backward()
    assert all((g == 0).all() for g in grads(model).values())


def prompts(n):
    random.seed(3)
    return torch.tensor([list(page.draw()[0].encode()) for _ in range(n)])


def test_sampling_stops_at_the_end_and_repeats_by_seed(model):
    def sample(seed):
        torch.manual_seed(seed)
        return model.sample(prompts(32))

    ids = sample(0)
    assert torch.equal(ids, sample(0)) and not torch.equal(ids, sample(1))
    assert torch.equal(ids[:, : page.P], prompts(32))
    ended = 0
    for row in ids[:, page.P :].tolist():
        if page.END in row:
            ended += 1
            assert set(row[row.index(page.END) + 1 :]) <= {page.PAD}
    assert 2 < ended < 30


def test_sampling_ends_when_every_response_has(model, monkeypatch):
    certain = torch.full((page.V,), -torch.inf)
    certain[page.END] = 0
    monkeypatch.setattr(model, "policy", lambda ids, l: certain.expand(*ids.shape, page.V))
    ids = model.sample(prompts(5))
    assert (ids[:, page.P] == page.END).all() and (ids[:, page.P + 1 :] == page.PAD).all()


def test_what_is_sampled_is_the_policy_of_the_whole_model(model, monkeypatch):
    """At a temperature near 0 every token is the likeliest of the full code's model."""
    full = full_model(model)
    monkeypatch.setattr(page, "TAU", 1e-6)
    ids = model.sample(prompts(8))
    best = full.unembed(full(ids)).argmax(-1)
    drawn = ids[:, page.P :]
    assert (drawn == best[:, page.P - 1 : -1])[drawn != page.PAD].all()


def test_problems_are_sums_that_fit():
    random.seed(4)
    for _ in range(2000):
        prompt, working, value = page.draw()
        assert len(prompt) == page.P and eval(prompt.strip(" :")) == value >= 0
        steps = [step.split("=") for step in working.split()]
        assert all(eval(left) == int(right) >= 0 for left, right in steps)
        assert int(steps[-1][1]) == value and len(working + page.boxed(value)) <= page.T


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_trains_the_blocks_up_to_its_layer(model, monkeypatch, capsys, phase):
    monkeypatch.setattr(page, "N", 2)
    monkeypatch.setattr(page, "boxed", lambda value: "e")  # which one response in four has
    before = {n: p.clone() for n, p in model.named_parameters()}
    random.seed(0)
    page.train(model, layer=2, phase=phase, steps=1)
    assert ("pi^2" if phase else "pi^4") in capsys.readouterr().out
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved != (phase == 1 and is_above(name, 2)), name


def test_warm_up_learns_to_end(model):
    before = model.policy(prompts(1), page.L)[0, -1, ord("7")].item()
    page.warm_up(model, 5)
    assert model.policy(prompts(1), page.L)[0, -1, ord("7")].item() > before + 0.1


def test_it_is_one_page_and_stands_alone():
    text = PATH.read_text()
    lines = text.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}
