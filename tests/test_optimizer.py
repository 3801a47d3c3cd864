"""SplitAdamW against torch's float32 AdamW, bit for bit where it must be; the split itself; state,
chunks, memory.

Both start from the same bfloat16 weights and get the same gradients, already rounded to bfloat16,
so every difference between them is the optimizer's own. Weights are N(0, 0.02), as a language
model's.
"""

import copy
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Config, Transformer
from plumbing import checkpoint
from plumbing.optimizer import BYTES, STATE, SplitAdamW, bytes_per_parameter, join, place, split

SHAPES = [(64, 128), (96,), (4, 8, 32)]


def bits(t):
    return t.detach().clone().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def weights(shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((torch.randn(s, generator=g) * 0.02).bfloat16()) for s in shapes]


def gradients(shapes=SHAPES, steps=10, seed=1, drift=0.0):
    """Noise around a mean of `drift` standard deviations; every element has its own scale, 1e-6 to
    100. Lists of bfloat16, step by step."""
    g = torch.Generator().manual_seed(seed)
    scale = [10 ** (torch.rand(s, generator=g) * 8 - 6) for s in shapes]
    mean = [drift * torch.randn(s, generator=g) for s in shapes]
    for _ in range(steps):
        yield [
            ((m + torch.randn(s, generator=g)) * c).bfloat16()
            for s, m, c in zip(shapes, mean, scale, strict=True)
        ]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.to(p.grad_dtype).clone()
        optimizer.step()
    return optimizer


def state_equal(a, b):
    """Equal weights and state, to the bit, of two optimizers."""
    pa, pb = (o.param_groups[0]["params"] for o in (a, b))
    return all(
        same(p, q)
        and a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
        and all(
            v == b.state[q][k] if isinstance(v, int) else same(v, b.state[q][k])
            for k, v in a.state.get(p, {}).items()
        )
        for p, q in zip(pa, pb, strict=True)
    )


# --------------------------------------------------------------------------------------------------
# the split


def some_masters():
    """All 65536 lower halves under chosen upper halves (zero, subnormal, 1, largest, infinity, NaN,
    and negative), and random patterns."""
    upper = torch.tensor(
        [0, 1, 0x007F, 0x0080, 0x3CA3, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF]
    ).repeat(2)
    upper[10:] += 0x8000
    patterns = torch.cat(
        [
            ((upper[:, None] << 16) + torch.arange(1 << 16)).flatten(),
            torch.randint(0, 1 << 32, (1 << 20,)),
        ]
    )
    return torch.where(patterns < 1 << 31, patterns, patterns - (1 << 32)).int().view(torch.float32)


def test_round_trip_is_exact_and_the_weight_is_nearest():
    torch.manual_seed(0)
    master = some_masters()
    weight, remainder = split(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    number = ~master.isnan()
    assert number.sum() > 1_900_000 and torch.equal(
        bits(join(weight, remainder))[number], bits(master)[number]
    )
    tie = (bits(master) & 0xFFFF) == 0x8000
    # nearest, torch's own rounding as the judge
    assert same(weight[number & ~tie], master.bfloat16()[number & ~tie])
    assert (weight[number & tie].float().abs() > master[number & tie].abs()).all() and (
        number & tie
    ).sum() > 20


def test_not_a_number_stays_one():
    """The NaN of CUDA (0x7fffffff) and others whose bits would carry into the sign or down to
    infinity."""
    patterns = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000, -8388607, 0x7FC00000], dtype=torch.int64
    ).int()
    weight, remainder = split(patterns.view(torch.float32))
    assert weight.isnan().all() and join(weight, remainder).isnan().all()


def test_a_broken_gradient_shows_in_the_weight():
    (p,) = weights([(4, 4)])
    optimizer = SplitAdamW([p])
    p.grad = torch.zeros_like(p, dtype=torch.float32)
    p.grad[1, 2] = float("nan")
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[1, 2]]


# --------------------------------------------------------------------------------------------------
# the update


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-6},
        {"lr": 1e-3, "weight_decay": 0},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.95), "eps": 1e-6},
    ],
)
def test_with_a_float32_moment_it_is_torch_adamw_bit_for_bit(settings):
    params = weights()
    reference = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours = run(
        SplitAdamW(params, moment_dtype=torch.float32, **settings), params, gradients(steps=300)
    )
    theirs = run(
        torch.optim.AdamW(reference, foreach=False, **{"weight_decay": 0.01, **settings}),
        reference,
        gradients(steps=300),
    )
    for p, q in zip(params, reference, strict=True):
        assert same(ours.master(p), q) and same(p, split(q.detach())[0])
        for key in ("exp_avg", "exp_avg_sq"):
            assert same(ours.state[p][key], theirs.state[q][key])


def test_defaults_are_those_of_torch_but_for_the_learning_rate():
    ours, theirs = SplitAdamW(weights()).defaults, torch.optim.AdamW(weights()).defaults
    assert {k: theirs[k] for k in ("betas", "eps", "weight_decay")} == {
        k: ours[k] for k in ("betas", "eps", "weight_decay")
    }
    assert ours["lr"] == 1e-6


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_twelve_bytes_follow_float32_and_weights_move(drift):
    """300 steps at lr 1e-6. The master w stays within ||w - w'|| < 1e-6 ||w'|| of float32 AdamW's
    w'; bfloat16 AdamW hardly moves."""
    shape = [(100, 128)]
    (p,), (plain,) = weights(shape), weights(shape)
    start, full = p.detach().float(), torch.nn.Parameter(p.detach().float())
    ours = run(SplitAdamW([p], lr=1e-6), [p], gradients(shape, 300, drift=drift))
    run(torch.optim.AdamW([full], lr=1e-6), [full], gradients(shape, 300, drift=drift))
    run(torch.optim.AdamW([plain], lr=1e-6), [plain], gradients(shape, 300, drift=drift))
    off = (ours.master(p) - full.detach()).double().norm()
    assert off / full.detach().double().norm() < 1e-6
    # and of the way they went, a stricter question
    assert off / (full.detach() - start).double().norm() < 1e-3
    assert (ours.master(p) != start).float().mean() > 0.95
    assert 0.005 < (plain.detach().float() != start).float().mean() < 0.05
    assert same(p, split(ours.master(p))[0])


def test_a_parameter_without_gradient_is_left_alone():
    """A block above an internal layer: nothing changes, and when its turn comes its step count
    starts at one."""
    params = weights()
    reference = [torch.nn.Parameter(p.detach().float()) for p in params]
    grads = [
        [a, None if i < 5 else b, c if i != 7 else None]
        for i, (a, b, c) in enumerate(gradients(steps=12))
    ]
    before = params[1].detach().clone()
    ours = run(SplitAdamW(params, lr=1e-3, moment_dtype=torch.float32), params, grads[:5])
    assert (
        same(params[1], before)
        and params[1] not in ours.state
        and same(ours.master(params[1]), before.float())
    )
    run(ours, params, grads[5:])
    run(torch.optim.AdamW(reference, lr=1e-3, weight_decay=0.01, foreach=False), reference, grads)
    assert all(same(ours.master(p), q) for p, q in zip(params, reference, strict=True))
    assert [ours.state[p]["step"] for p in params] == [12, 7, 11]


def test_two_runs_are_equal():
    a, b = (run(SplitAdamW(ps, lr=1e-4), ps, gradients()) for ps in (weights(), weights()))
    assert state_equal(a, b)


@pytest.mark.parametrize("moment_dtype", [torch.float16, torch.float32])
def test_chunks_change_nothing_but_the_memory(monkeypatch, moment_dtype):
    """Rows of 64: a chunk of 150 elements holds two. A scalar, an empty tensor and strides other
    than torch's own go through as well."""
    shapes = [(9, 64), (150,), (5, 2, 32), (), (0, 8), (1, 64)]

    def make():
        params = weights(shapes)
        params.append(
            torch.nn.Parameter(
                (torch.randn(64, 6, generator=torch.Generator().manual_seed(3)) * 0.02)
                .bfloat16()
                .t()
            )
        )
        return params, [[*g, g[0][:6]] for g in gradients(shapes, 5)]

    params, grads = make()
    whole = run(SplitAdamW(params, lr=1e-3, moment_dtype=moment_dtype), params, grads)
    sizes, update = [], SplitAdamW._update
    monkeypatch.setattr(SplitAdamW, "CHUNK_CPU", 150)
    monkeypatch.setattr(
        SplitAdamW,
        "_update",
        staticmethod(lambda p, *rest: (sizes.append(p.numel()), update(p, *rest))),
    )
    params, grads = make()
    start = params[-1].detach().float()
    chunked = run(SplitAdamW(params, lr=1e-3, moment_dtype=moment_dtype), params, grads)
    assert state_equal(whole, chunked)
    # updated in place, not in a copy
    assert not params[-1].is_contiguous() and (chunked.master(params[-1]) != start).all()
    assert (
        sizes[: len(sizes) // 5]
        == [128] * 4 + [64] + [150] + [128] * 2 + [64] + [1, 0, 64] + [128] * 3
    )


def test_gradients_may_be_float32():
    (p,), (q,) = weights([(8, 64)]), weights([(8, 64)])
    p.grad_dtype, fine = (
        torch.float32,
        torch.randn(8, 64, generator=torch.Generator().manual_seed(5)),
    )
    p.grad, q = fine.clone(), torch.nn.Parameter(q.detach().float())
    q.grad = fine.clone()
    ours = SplitAdamW([p], lr=1e-3, moment_dtype=torch.float32)
    ours.step()
    torch.optim.AdamW([q], lr=1e-3, weight_decay=0.01, foreach=False).step()
    assert same(ours.master(p), q)


def test_a_closure_is_called_with_gradients_on():
    (p,) = weights([(3,)])

    def loss():
        p.grad = None
        value = (p.float() ** 2).sum()
        value.backward()
        return value

    before = p.detach().float()
    assert (
        SplitAdamW([p], lr=1e-2).step(loss) == (before**2).sum()
        and (p.detach().float().abs() < before.abs()).all()
    )


# --------------------------------------------------------------------------------------------------
# state and memory


def bfloat16_model(seed):
    return (
        Transformer(Config("qwen3", 32, 16, 3, 4, 2, 4, 24)).init_weights(seed).to(torch.bfloat16)
    )


def learn(model, optimizer, steps, until=None):
    ids = torch.arange(24).reshape(2, 12) * 7 % 32
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.unembed(model(ids, until), until)
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        ).backward()
        optimizer.step()


@pytest.mark.parametrize("moment_dtype", [torch.float16, torch.float32])
def test_a_checkpoint_brings_back_every_bit(tmp_path, moment_dtype):
    """Saved within an internal phase, when the blocks above have no state yet; both then go on
    through the whole model."""
    model, again = bfloat16_model(0), bfloat16_model(1)
    a, b = (SplitAdamW(m.parameters(), lr=1e-4, moment_dtype=moment_dtype) for m in (model, again))
    learn(model, a, 3, until=1)
    checkpoint.restore(checkpoint.save(tmp_path, 3, model, a, {}), again, b)
    assert state_equal(a, b) and 0 < len(b.state) < len(b.param_groups[0]["params"])
    assert any(s["remainder"].any() for s in b.state.values()) and all(
        type(s["step"]) is int for s in b.state.values()
    )
    for m, o in ((model, a), (again, b)):
        learn(m, o, 3)
    assert state_equal(a, b)


def test_a_state_dict_brings_back_every_bit(tmp_path):
    """By way of a file that holds tensors alone. torch's own loading would round all of it to
    bfloat16."""
    params, others = weights(), weights(seed=9)
    a, b = SplitAdamW(params, lr=1e-4), SplitAdamW(others, lr=1e-4)
    run(a, params, ([x, None, z] for x, _, z in gradients(steps=4)))
    saved = a.state_dict()
    moments = {f"{i}/{k}": s[k] for i, s in saved["state"].items() for k in STATE}
    save_file(moments | {str(i): p.data for i, p in enumerate(params)}, tmp_path / "s")
    read = load_file(tmp_path / "s")
    saved["state"] = {
        i: {"step": s["step"], **{k: read[f"{i}/{k}"] for k in STATE}}
        for i, s in saved["state"].items()
    }
    for i, p in enumerate(others):
        p.data.copy_(read[str(i)])
    b.load_state_dict(saved)
    assert state_equal(a, b) and params[1] not in a.state and not b.state.get(others[1])
    for o, ps in ((a, params), (b, others)):
        run(o, ps, gradients(steps=3, seed=2))
    assert state_equal(a, b)
    # a copy, which the dict does not share
    assert not same(b.state[others[0]]["remainder"], saved["state"][0]["remainder"])


def test_a_copy_goes_on_alike():
    model = torch.nn.ParameterList(weights())
    a = run(SplitAdamW(model, lr=1e-4, moment_dtype=torch.float32), model, gradients(steps=2))
    twin, b = copy.deepcopy((model, a))
    for m, o in ((model, a), (twin, b)):
        run(o, m, gradients(steps=2, seed=4))
    assert state_equal(a, b) and b.state[twin[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", BYTES)
def test_the_table_of_bytes_is_what_tensors_take(kind):
    params = weights([(64, 64)])
    if kind == "adamw":
        params = [torch.nn.Parameter(params[0].detach().float())]
    optimizer = {
        "adamw": torch.optim.AdamW,
        "split": SplitAdamW,
        "split-m32": lambda ps: SplitAdamW(ps, moment_dtype=torch.float32),
    }[kind](params)
    run(optimizer, params, gradients([(64, 64)], 1))
    (p,), state = params, optimizer.state[params[0]]
    part = {
        "weights": p.nbytes,
        "gradients": p.grad.nbytes,
        "remainder": state["remainder"].nbytes if "remainder" in state else 0,
        "moments": state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes,
    }
    assert {k: v / p.numel() for k, v in part.items()} == BYTES[kind]
    assert sum(part.values()) == bytes_per_parameter(kind) * p.numel()
    tensors = {k for k, t in state.items() if torch.is_tensor(t) and t.dim()}
    # nothing that the table forgot
    assert tensors <= {"exp_avg", "exp_avg_sq", "remainder"}


def test_bytes_per_parameter():
    assert [bytes_per_parameter(k) for k in ("adamw", "split-m32", "split")] == [16, 16, 14]
    with pytest.raises(
        ValueError, match="unknown optimizer 'adam': choose one of adamw, split-m32, split"
    ):
        bytes_per_parameter("adam")


def test_offloaded_state_is_fetched_in_pieces_and_changes_no_bit(monkeypatch):
    """A GPU with little memory, played by copies: at no time is more of the state there than one
    piece of it."""
    here, most = [], []

    def fetch(t, device):
        here.append(weakref.ref(copy := t.clone()))
        most.append(sum(ref().nbytes for ref in here if ref() is not None))
        return copy

    shapes = [(64, 128), (96,), (512, 256)]
    monkeypatch.setattr(SplitAdamW, "CHUNK_CPU", 4096)
    plain, offloaded = weights(shapes), weights(shapes)
    a = run(SplitAdamW(plain, lr=1e-4), plain, gradients(shapes, steps=3))
    monkeypatch.setattr(SplitAdamW, "_fetch", staticmethod(fetch))
    b = run(SplitAdamW(offloaded, lr=1e-4, offload=True), offloaded, gradients(shapes, steps=3))
    assert state_equal(a, b)
    # the piece under way and the one before, which Python still names
    assert max(most) <= 4096 * 8 * 2 < 512 * 256 * 8


def test_state_is_placed_where_the_optimizer_keeps_it():
    """A resumed run's too; the meta device plays the GPU."""
    moment, step = torch.zeros(2, 3), torch.tensor(1.0)
    p = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16, device="meta"))
    for optimizer, homes in (
        (SplitAdamW([p]), ("meta", "cpu")),
        (SplitAdamW([p], offload=True), ("cpu", "cpu")),
        (torch.optim.AdamW([p]), ("meta", "cpu")),
        (torch.optim.AdamW([p], capturable=True), ("meta", "meta")),
    ):
        assert tuple(place(optimizer, p, t).device.type for t in (moment, step)) == homes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offload_on_a_gpu():
    """State lives in pinned host memory, takes none of the GPU's between updates, and bits stay."""
    shapes = [(512, 1024)]
    (p,), (q,) = ([torch.nn.Parameter(x.detach().cuda()) for x in weights(shapes)] for _ in "pq")
    a, b = SplitAdamW([p], lr=1e-4, offload=True), SplitAdamW([q], lr=1e-4)
    before = torch.cuda.memory_allocated()
    for seed in (1, 2):
        run(a, [p], ([g.cuda() for g in step] for step in gradients(shapes, 2, seed=seed)))
    p.grad = None
    assert torch.cuda.memory_allocated() == before and all(a.state[p][k].is_pinned() for k in STATE)
    for seed in (1, 2):
        run(b, [q], ([g.cuda() for g in step] for step in gradients(shapes, 2, seed=seed)))
    assert same(p, q) and all(same(a.state[p][k].cuda(), b.state[q][k]) for k in STATE)


@pytest.mark.parametrize("n", [1, 7])
def test_gradients_of_micro_batches_add_up_in_float32(n):
    """Where bfloat16 would lose them: n small gradients beside a large one."""
    (p,) = weights([(4, 4)])
    SplitAdamW([p])
    for scale in [1.0] + n * [2.0**-10]:
        (p * torch.tensor(scale, dtype=torch.bfloat16)).sum().backward()
    assert p.grad.dtype == torch.float32 and (p.grad == 1 + n * 2.0**-10).all()


# --------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lr": -1e-6}, "lr -1e-06"),
        ({"lr": float("nan")}, "lr nan"),
        ({"eps": -1}, "eps -1"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.99, 0.9)}, "b1 <= b2"),
        ({"betas": (0.9,)}, "give two"),
        ({"moment_dtype": torch.bfloat16}, "moment_dtype: give torch.float16 or torch.float32"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says) as e:
        SplitAdamW(weights(), **settings)
    assert "\n" not in str(e.value)


def test_only_plain_bfloat16_parameters():
    with pytest.raises(
        ValueError,
        match=r"shape \[2, 3\] is torch.float32: load the model in torch.bfloat16, or use torch.optim.AdamW",  # noqa: E501
    ):
        SplitAdamW([*weights(), torch.nn.Parameter(torch.zeros(2, 3))])
    sharded = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    # what tells a DTensor
    sharded.to_local = None
    with pytest.raises(ValueError, match="sharded"):
        SplitAdamW([sharded])
    optimizer = SplitAdamW(weights())
    with pytest.raises(ValueError, match="torch.float32"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    # a refused group is not half there
    assert len(optimizer.param_groups) == 1


def test_the_state_of_another_optimizer():
    params = weights()
    other = run(torch.optim.AdamW(params), params, gradients(steps=1))
    with pytest.raises(
        ValueError, match="lacks remainder, exp_avg, exp_avg_sq; it is another optimizer's"
    ):
        SplitAdamW(params).load_state_dict(other.state_dict())
