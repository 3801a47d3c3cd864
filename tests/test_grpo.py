"""Advantages, token log-probs and the clipped loss, against hand-computed tables and float64."""

import pytest
import torch

from grpo import (
    Response,
    collate,
    group_advantages,
    kl_to_reference,
    micro_batches,
    overlong_penalty,
    plain_token_logprobs,
    policy_loss,
    response_weights,
    token_logprobs,
)


def test_advantages_by_hand():
    r = torch.tensor([[1.0] + [0.0] * 7])
    # sample deviation; the population's gives 2.6458
    assert group_advantages(r)[0, 0].item() == pytest.approx(2.4749, abs=1e-4)
    assert group_advantages(r)[0, 1].item() == pytest.approx(-0.3536, abs=1e-4)


# rewards [[3, 1, 2], [5, 5, 5]]: group means 2 and 5, deviation of the first 1; mean of all 3.5,
# deviation of all sqrt(15.5 / 5) = 1.7607
@pytest.mark.parametrize(
    "kind, by_hand",
    [
        ("grpo", [[1, -1, 0], [0, 0, 0]]),
        ("dr_grpo", [[1, -1, 0], [0, 0, 0]]),
        ("rloo", [[1.5, -1.5, 0], [0, 0, 0]]),
        ("reinforce++", [[-0.28398, -1.41990, -0.85194], [0.85194, 0.85194, 0.85194]]),
        ("maxrl", [[0.5, -0.5, 0], [0, 0, 0]]),
    ],
)
def test_advantage_variants_by_hand(kind, by_hand):
    r = torch.tensor([[3.0, 1, 2], [5, 5, 5]])
    assert torch.allclose(group_advantages(r, kind), torch.tensor(by_hand).float(), atol=1e-4)
    if kind == "rloo":
        assert group_advantages(r, kind)[0, 0].item() == pytest.approx(3 - (1 + 2) / 2)
    # they differ by the deviation alone
    if kind in ("grpo", "dr_grpo"):
        assert group_advantages(10 * r, kind)[0].tolist() == pytest.approx(
            [10, -10, 0] if kind == "dr_grpo" else [1, -1, 0], abs=1e-4
        )


def test_reinforce_plus_plus_on_equal_rewards_is_zero():
    assert (group_advantages(torch.full((3, 7), 0.7), "reinforce++") == 0).all()


# three responses of 1, 2 and 5 tokens, limit 10
@pytest.mark.parametrize(
    "kind, by_hand",
    [("token-mean", [1 / 8] * 3), ("seq-mean", [1 / 3, 1 / 6, 1 / 15]), ("dr_grpo", [1 / 30] * 3)],
)
def test_response_weights_by_hand(kind, by_hand):
    assert response_weights([1, 2, 5], kind, limit=10) == pytest.approx(by_hand)
    assert response_weights([], kind, 10) == [] and len(response_weights([0], kind, 10)) == 1


def test_kl_by_hand_and_in_the_mean():
    d = torch.tensor([0.5, 0.0, -0.5])
    assert kl_to_reference(torch.zeros(3), d).tolist() == pytest.approx(
        [0.14872, 0, 0.10653], abs=1e-5
    )
    p, q = torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.2, 0.6]])
    exact = (p * (p / q).log()).sum()
    # unbiased: E[q/p] = 1
    assert (p * kl_to_reference(p.log(), q.log())).sum().item() == pytest.approx(
        exact.item(), abs=1e-6
    )
    far = torch.tensor([-100.0], requires_grad=True)
    kl_to_reference(far, torch.zeros(1)).sum().backward()
    assert far.grad.item() == 0


def test_kl_as_the_reference_bounds_it():
    """(log pi, log pi_ref) against the estimate: at most 10, where the gradient ends; no token
    pulls with more than e^2.6 - 1."""
    table = [
        (-1, -1, 0.0),
        (-1, -0.5, 0.148721),
        (-1, -1.5, 0.106531),
        (-3, -1, 4.389056),
        (-4, -1, 10.0),
        (-10, -1, 10.0),
        (-30, -1, 10.0),
        (-1, -9, 7.000335),
    ]
    logprobs, reference, expected = torch.tensor(table).T
    assert kl_to_reference(logprobs, reference).tolist() == pytest.approx(
        expected.tolist(), abs=2e-5
    )
    logprobs = torch.linspace(-40, 0, 4001, requires_grad=True)
    kl_to_reference(logprobs, torch.full((4001,), -1.0)).sum().backward()
    assert -12.6 < logprobs.grad.min() < -12 and (logprobs.grad[:3600] == 0).all()


def test_the_estimate_is_never_negative_for_small_differences():
    d = torch.logspace(-9, -1, 20000)
    for sign in (1, -1):
        assert (kl_to_reference(torch.zeros(20000), sign * d) >= 0).all()


# log pi, log pi_old, advantage; loss with clip 0.2 / 0.28 and dual clip 3, and with none
LOSSES = [
    (-1.0, -1.0, 1.0, -1.0, -1.0),
    (-0.9, -1.2, 1.0, -1.28, -1.28),
    (-1.5, -1.0, 1.0, -0.606531, -0.606531),
    (-0.9, -1.2, -1.0, 1.349859, 1.349859),
    (-1.5, -1.0, -0.5, 0.4, 0.4),
    (-0.2, -3.0, -1.0, 3.0, 16.444647),
    (-0.1, -30.0, -0.5, 1.5, 242582597.7),
    (-0.1, -30.0, 0.5, -0.64, -0.64),
    (-9.0, -1.0, 2.0, -0.000671, -0.000671),
    (-1.0, -1.1, 0.0, 0.0, 0.0),
]


def test_losses_of_the_reference_and_of_trl_as_a_table():
    """Worked out from their formulas: the reference's with its dual clip and a log-ratio within 20,
    TRL's without one."""
    new, old, advantage, dual, plain = torch.tensor(LOSSES, dtype=torch.float64).T
    for bound, expected in ((3.0, dual), (None, plain)):
        loss, low, high = policy_loss(new, old, advantage, 0.2, 0.28, bound)
        assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)
    assert low.nonzero().flatten().tolist() == [4] and high.nonzero().flatten().tolist() == [1, 7]


def test_the_loss_at_ratio_one_is_the_mean_of_length_times_advantage():
    """-sum(len A) / sum(len): 0 only where length does not go with reward."""
    lengths, advantages = [2, 6, 4], torch.tensor([1.0, -1.5, 0.5])
    weight = response_weights(lengths)
    tokens = torch.tensor([w for w, n in zip(weight, lengths, strict=True) for _ in range(n)])
    loss, *_ = policy_loss(
        torch.full((12,), -2.0),
        torch.full((12,), -2.0),
        advantages.repeat_interleave(torch.tensor(lengths)),
    )
    assert (loss * tokens).sum().item() == pytest.approx(-(2 * 1.0 - 6 * 1.5 + 4 * 0.5) / 12)


def test_overlong_penalty_by_hand():
    assert [overlong_penalty(n, 100, 20) for n in (10, 80, 85, 90, 100, 130)] == pytest.approx(
        [0, 0, -0.25, -0.5, -1, -1]
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("G", [2, 5, 7, 8])
def test_equal_rewards_give_exactly_zero(reward, G):
    assert (group_advantages(torch.full((3, G), reward)) == 0).all()


def test_advantages_follow_their_rows():
    r = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(6)
    assert torch.equal(group_advantages(r)[order], group_advantages(r[order]))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_group_of_one_is_refused(shape):
    with pytest.raises(ValueError, match="groups of at least 2"):
        group_advantages(torch.ones(shape))


def naive(h, E, targets, T, n_vocab):
    z = (h @ E.T)[:, :n_vocab] / T
    lp = z.log_softmax(-1)
    return lp.gather(1, targets[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


@pytest.mark.parametrize("T", [1.0, 0.6])
@pytest.mark.parametrize("n_vocab", [None, 90])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_token_logprobs_against_float64(T, n_vocab, chunk):
    g = torch.Generator().manual_seed(1)
    h, E = torch.randn(23, 16, generator=g), torch.randn(97, 16, generator=g)
    targets, weight = torch.randint(0, 90, (23,), generator=g), torch.randn(23, generator=g)
    ours, theirs = (
        [x.clone().requires_grad_() for x in (h, E)],
        [x.double().requires_grad_() for x in (h, E)],
    )
    lp, entropy = token_logprobs(*ours, targets, T, n_vocab, chunk)
    lp64, entropy64 = naive(*theirs, targets, T, n_vocab)
    assert (lp - lp64).abs().max() < 1e-5 and (entropy - entropy64).abs().max() < 1e-5
    assert not entropy.requires_grad
    (lp * weight).sum().backward()
    (lp64 * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert ((a.grad - b.grad).norm() / b.grad.norm()).item() < 1e-6


def test_chunks_give_what_the_plain_form_gives():
    g = torch.Generator().manual_seed(3)
    h, E = torch.randn(9, 16, generator=g), torch.randn(40, 16, generator=g)
    targets = torch.randint(0, 30, (9,), generator=g)
    plain = plain_token_logprobs(h, E, targets, 0.7, 30)
    for a, b in zip(token_logprobs(h, E, targets, 0.7, 30, chunk=4), plain, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_entropy_of_uniform_and_of_certain():
    E = torch.eye(10)
    _, flat = token_logprobs(torch.zeros(1, 10), E, torch.tensor([3]))
    _, sharp = token_logprobs(100 * torch.eye(10)[:1], E, torch.tensor([0]))
    assert flat.item() == pytest.approx(
        torch.tensor(10.0).log().item(), abs=1e-6
    ) and sharp.item() == pytest.approx(0, abs=1e-6)


# d loss / d log pi at a ratio, for A = +1 and A = -1: the surrogate pushes until the ratio has left
# the trust region on the good side
@pytest.mark.parametrize(
    "A, ratio, slope",
    [(1, 0.5, -0.5), (1, 1.0, -1.0), (1, 1.5, 0.0), (-1, 0.5, 0.0), (-1, 1.0, 1.0), (-1, 1.5, 1.5)],
)
def test_sign_of_the_clipped_loss_in_all_six_cells(A, ratio, slope):
    logp = torch.tensor([ratio]).log().requires_grad_()
    loss, low, high = policy_loss(logp, torch.zeros(1), torch.tensor([float(A)]))
    loss.sum().backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-6)
    assert (low.item(), high.item()) == (A < 0 and slope == 0, A > 0 and slope == 0)


# the same of CISPO: the weight is held at 1.2, no token is silenced; the slope is -A times it
@pytest.mark.parametrize(
    "A, ratio, slope",
    [(1, 0.5, -0.5), (1, 1.1, -1.1), (1, 3.0, -1.2), (-1, 0.5, 0.5), (-1, 1.0, 1.0), (-1, 3, 1.2)],
)
def test_cispo_clips_the_weight_and_never_the_gradient(A, ratio, slope):
    logp = torch.tensor([float(ratio)]).log().requires_grad_()
    loss, low, high = policy_loss(logp, torch.zeros(1), torch.tensor([float(A)]), objective="cispo")
    loss.sum().backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-6)
    assert (low.item(), high.item()) == (False, ratio > 1.2)


# probabilities before and after: a rare token that grew fivefold still learns, a sure one that
# moved by 0.3 does not; the way back is open
@pytest.mark.parametrize(
    "A, old, new, slope",
    [
        (1, 0.01, 0.05, -5),
        (1, 0.5, 0.8, 0),
        (-1, 0.5, 0.8, 1.6),
        (-1, 0.8, 0.5, 0),
        (1, 0.8, 0.5, -0.625),
        (-1, 0.01, 0.001, 0.1),
    ],
)
def test_dppo_masks_by_probability_and_not_by_ratio(A, old, new, slope):
    logp = torch.tensor([new]).log().requires_grad_()
    loss, low, high = policy_loss(
        logp, torch.tensor([old]).log(), torch.tensor([float(A)]), objective="dppo"
    )
    loss.sum().backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-5)
    assert (low.item(), high.item()) == (A < 0 and slope == 0, A > 0 and slope == 0)


def test_asymmetric_clip_and_dual_clip():
    old, up, down = torch.zeros(1), torch.tensor([1.0]), torch.tensor([-1.0])
    assert policy_loss(torch.tensor([1.25]).log(), old, up, clip_high=0.28)[
        0
    ].item() == pytest.approx(-1.25)
    assert policy_loss(torch.tensor([1.25]).log(), old, up, clip_high=0.2)[
        0
    ].item() == pytest.approx(-1.2)
    exploded = torch.tensor([50.0]).log().requires_grad_()
    loss, *_ = policy_loss(exploded, old, down, dual_clip=10)
    loss.sum().backward()
    assert loss.item() == pytest.approx(10) and exploded.grad.item() == 0
    assert policy_loss(exploded.detach(), old, down, dual_clip=None)[0].item() == pytest.approx(50)


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_a_huge_log_ratio_stays_finite(gap, A):
    logp = torch.tensor([gap], requires_grad=True)
    loss, *_ = policy_loss(logp, torch.zeros(1), torch.tensor([A]))
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()


def test_collate_positions_by_hand():
    batch = collate(
        [
            Response([5, 6, 7], [8, 9], [], advantage=1.0),
            Response([1], [2, 3, 2], [], advantage=-1.0),
        ]
    )
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 2, 0]]
    # the state before each response token, in the flattened batch
    assert batch.positions.tolist() == [2, 3, 5, 6, 7]
    assert batch.targets.tolist() == [8, 9, 2, 3, 2]
    assert batch.advantages.tolist() == [1, 1, -1, -1, -1] and batch.lengths == [2, 3]


def test_packed_positions_by_hand():
    batch = collate(
        [
            Response([5, 6, 7], [8, 9], [], advantage=1.0),
            Response([1], [2, 3, 2], [], advantage=-1.0),
        ],
        pack=True,
    )
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 2] and batch.forward[
        "position"
    ].tolist() == [
        0,
        1,
        2,
        3,
        4,
        0,
        1,
        2,
        3,
    ]
    assert batch.positions.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [8, 9, 2, 3, 2]
    assert batch.advantages.tolist() == [1, 1, -1, -1, -1] and batch.lengths == [2, 3]


def test_micro_batches_keep_all_within_the_budget():
    g = torch.Generator().manual_seed(2)
    rs = [
        Response([1] * int(p), [2] * int(n), [])
        for p, n in torch.randint(1, 30, (40, 2), generator=g)
    ]
    parts = micro_batches(rs, 100)
    assert sorted(map(id, rs)) == sorted(id(r) for part in parts for r in part)
    for part in parts:
        longest = max(len(r.prompt) + len(r.ids) for r in part)
        assert len(part) * longest <= 100 and longest == len(part[0].prompt) + len(part[0].ids)
    # longer than the budget: alone, never cut
    assert [len(part) for part in micro_batches(rs, 1)] == [1] * 40
    whole = micro_batches(rs, 100, pack=True)
    sizes = [sum(len(r.prompt) + len(r.ids) for r in part) for part in whole]
    assert [id(r) for part in whole for r in part] == [
        id(r) for part in parts for r in part
    ] and max(sizes) <= 100
    # none had room
    assert all(
        size + len(b[0].prompt) + len(b[0].ids) > 100
        for size, b in zip(sizes, whole[1:], strict=False)
    )
    assert [len(part) for part in micro_batches(rs, 1, pack=True)] == [1] * 40
