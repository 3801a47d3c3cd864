"""AdamW that owns an exact float32 master of bfloat16 weights: `SplitAdamW`, the optimizer of every
run on one GPU.

Reinforcement learning takes steps of about 1e-6. Half the spacing of bfloat16 numbers near a weight
of 0.02 is 6e-5, so AdamW on plain bfloat16 weights rounds nearly every step away. Here a weight
also keeps the 16 bits that bfloat16 drops:

    float32 master  =  bfloat16 weight (upper 16 bits, nearest)  +  int16 remainder (lower 16)

The model computes with the weight. The update is made in float32 on the master, which is put
together again bit for bit (Apex and Megatron-LM know this as storing parameter remainders). AdamW
is Loshchilov & Hutter's, arXiv 1711.05101, at step t:

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

v stays in float32: with b2 = 0.999 it moves by a thousandth a step, which bfloat16's three digits
would round away. m is what gets 16 bits, and not as it is but as m / (sqrt(v) + eps), the step
itself but for lr and bias corrections. However gradients are scaled that is of order 1 (at most 7.3
for the usual betas, by Cauchy-Schwarz), so it fits float16, whose rounding is 8 times finer than
bfloat16's. What rounding remains: after 300 steps on noisy gradients the weights are off float32
AdamW's by about 5e-4 of the way they went. The worst case is a gradient that never changes: m stops
up to 0.5 % short of it. With `moment_dtype=torch.float32` (16 bytes) nothing is rounded: given the
same gradients the master is float32 AdamW's, bit for bit.

Gradients are float32 too (`grad_dtype` of the parameters): micro-batches are added up unrounded, so
that the gradient of a mini-batch does not depend on how it is split. That costs 2 bytes a parameter
more than bfloat16 gradients while training, none while sampling.

With `offload` the remainder and the moments live in host memory, and an update streams them through
the GPU piece by piece.
"""

import math

import torch

# Bytes a parameter, by part. Gradients are freed while the model samples; remainder and moments can
# live on the host.
BYTES = {
    # all float32
    "adamw": {"weights": 4, "gradients": 4, "remainder": 0, "moments": 8},
    # bfloat16 weights
    "split-m32": {"weights": 2, "gradients": 4, "remainder": 2, "moments": 8},
    # and a float16 first moment
    "split": {"weights": 2, "gradients": 4, "remainder": 2, "moments": 6},
}
STATE = ("remainder", "exp_avg", "exp_avg_sq")  # the tensors among a parameter's state


def bytes_per_parameter(kind: str) -> int:
    """Bytes a trained parameter takes with gradient and optimizer state: adamw 16, split-m32 16,
    split 14. BYTES[kind] has the parts.

    SplitAdamW's temporaries come on top, once: below 32 bytes x SplitAdamW.CHUNK, 256 MiB. Raises
    ValueError for a kind not in BYTES.
    """
    if kind not in BYTES:
        raise ValueError(f"unknown optimizer {kind!r}: choose one of {', '.join(BYTES)}")
    return sum(BYTES[kind].values())


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bfloat16 weight, int16 remainder) of a float32 master of any shape. `join` returns the same
    32 bits.

    Ties round away from zero, not to even, so that the remainder is in [-2^15, 2^15). Beyond the
    largest bfloat16 the weight is infinite though the master is not, as in any cast. Every NaN
    becomes the standard one: rounding up the bits of CUDA's, 0x7fffffff, would carry into the sign
    and make -0 of it, and a broken run would look sound.
    """
    bits = master.view(torch.int32).masked_fill(master.isnan(), 0x7FC00000)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder, a new tensor of their
    shape."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def place(optimizer, p, t):
    """A tensor of the state of parameter p, put where the optimizer looks for it: beside p; with
    SplitAdamW's `offload` in host memory, pinned so that a GPU reads and writes it by itself (torch
    rounds each tensor up to a power of two bytes). Step counts of torch's optimizers are on the CPU
    unless told otherwise."""
    settings = optimizer.defaults
    if settings.get("offload"):
        return t.cpu().pin_memory() if torch.cuda.is_available() else t.cpu()
    beside = t.dim() or settings.get("fused") or settings.get("capturable")
    return t.to(p.device if beside else "cpu")


class SplitAdamW(torch.optim.Optimizer):
    """AdamW in float32 on bfloat16 parameters: 14 bytes a parameter, its gradient included (the
    file's head says how).

    lr, betas, eps, weight_decay   as in torch.optim.AdamW; the decay is decoupled
    moment_dtype                   of the first moment: torch.float16 (14 bytes a parameter) or
                                   torch.float32 (16)
    offload                        keep the state in host memory: 6 bytes a parameter are left on
                                   the GPU. An update moves 8 or 10 bytes a parameter each way,
                                   about two seconds for 4B over PCIe 5 (by its bandwidth, not yet
                                   measured)

    From here on the parameters' gradients are float32. A parameter's state begins with its first
    gradient: step (int), remainder (int16), exp_avg (float16: m / (sqrt(v) + eps), float32: m),
    exp_avg_sq (float32). A parameter without a gradient is left alone: no decay, no change of
    moments, no step counted. Whoever writes other weights into the parameters should clear `state`:
    an old remainder is an error of up to half a bfloat16 spacing.

    Raises ValueError for settings out of range, and for parameters that are not plain bfloat16
    tensors. For float32 ones torch.optim.AdamW does the same; ones sharded over ranks (DTensor)
    would be updated in copies.
    """

    # Elements updated at a time, in whole rows: float32 temporaries of a whole embedding would take
    # gigabytes. A GPU wants few, large kernels; a CPU is five times faster on chunks that stay in
    # its cache and in pages that malloc need not fetch anew.
    CHUNK, CHUNK_CPU = 1 << 23, 1 << 17

    def __init__(
        self,
        params,
        lr=1e-6,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        moment_dtype=torch.float16,
        offload=False,
    ):
        settings = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            moment_dtype=moment_dtype,
            offload=offload,
        )
        super().__init__(params, settings)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if wrong := self._wrong(group):
            self.param_groups.pop()
            raise ValueError(f"SplitAdamW: {wrong}")
        for p in group["params"]:
            grad, p.grad = p.grad, None
            p.grad_dtype = torch.float32
            p.grad = None if grad is None else grad.float()

    @staticmethod
    def _wrong(group) -> str:
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                return f"{name} {group[name]}: give a number from 0 up"
        betas = group["betas"]
        # b1 <= b2 bounds m / sqrt(v)
        if len(betas) != 2 or not 0 <= betas[0] <= betas[1] < 1:
            return f"betas {betas}: give two with 0 <= b1 <= b2 < 1"
        if group["moment_dtype"] not in (torch.float16, torch.float32):
            return "moment_dtype: give torch.float16 or torch.float32"
        for p in group["params"]:
            kind = "sharded" if hasattr(p, "to_local") else p.dtype
            if kind != torch.bfloat16:
                return (
                    f"a parameter of shape {list(p.shape)} is {kind}: load the model in "
                    "torch.bfloat16, or use torch.optim.AdamW"
                )
        return ""

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient.

        closure  computes the loss and the gradients anew; its loss is returned. None: the gradients
                 are there
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_parameter(p, group)
        if self.defaults["offload"] and torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever reads the state from the host must find it whole
        return loss

    def _update_parameter(self, p, group):
        """The update of one parameter, a few rows at a time."""
        state = self.state[p]
        if not state:
            home = "cpu" if self.defaults["offload"] else p.device
            dtypes = torch.int16, group["moment_dtype"], torch.float32
            for key, dtype in zip(STATE, dtypes, strict=True):
                state[key] = place(self, p, torch.zeros_like(p, dtype=dtype, device=home))
            state["step"] = 0
        state["step"] += 1
        tensors = [torch.atleast_1d(t) for t in (p, p.grad, *map(state.get, STATE))]
        chunk = self.CHUNK_CPU if p.device.type == "cpu" else self.CHUNK
        rows = max(1, chunk * len(tensors[0]) // max(1, p.numel()))
        pieces = [t.split(rows) for t in tensors]
        for weight, grad, *kept in zip(*pieces, strict=True):
            here = [self._fetch(t, p.device) for t in kept]
            self._update(weight, grad, *here, state["step"], group)
            for old, new in zip(kept, here, strict=True):
                old.copy_(new, non_blocking=True)  # nothing to do where it is one tensor

    @staticmethod
    def _fetch(t, device):
        """A piece of state on the parameter's device: itself, or a copy of what lives on the
        host."""
        return t.to(device, non_blocking=True)

    @staticmethod
    def _update(p, grad, remainder, exp_avg, v, t, group):
        """AdamW at step t, in place. The operations and their order are those of torch.optim.AdamW,
        hence equal bits."""
        b1, b2 = group["betas"]
        lr, eps = group["lr"], group["eps"]
        half = exp_avg.dtype == torch.float16  # then it holds m / (sqrt(v) + eps)
        w = join(p, remainder)
        g = grad.float()  # a deep copy of a parameter forgets its grad_dtype
        m = exp_avg.float()
        if half:
            m.mul_(v.sqrt().add_(eps))
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        w.mul_(1 - lr * group["weight_decay"])
        root = v.sqrt() / (1 - b2**t) ** 0.5
        w.addcdiv_(m, root.add_(eps), value=-lr / (1 - b1**t))
        if half:
            exp_avg.copy_(m.div_(v.sqrt().add_(eps)))
        weight, rest = split(w)
        p.copy_(weight)
        remainder.copy_(rest)

    def master(self, p: torch.Tensor) -> torch.Tensor:
        """The float32 weights that training knows behind a parameter, a new tensor of its shape."""
        state = self.state.get(p)
        if not state:
            return p.detach().float()
        return join(p.detach(), state["remainder"].to(p.device))

    def load_state_dict(self, state_dict):
        """As in torch, but every state tensor keeps its dtype. torch would cast all to the
        parameter's, bfloat16, the remainder too.

        Raises ValueError for the state of another optimizer.
        """
        saved = state_dict["state"]
        if not all({*STATE} <= state.keys() for state in saved.values()):
            raise ValueError(
                f"SplitAdamW: the state to load lacks {', '.join(STATE)}; it is another "
                "optimizer's: start without it"
            )
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            if i in saved:
                tensors = {key: place(self, p, saved[i][key].clone()) for key in STATE}
                self.state[p] = saved[i] | tensors


def make_optimizer(model, args):
    """--optimizer over all parameters; decay applies to all, as in the reference."""
    common = dict(params=model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(**common, fused=True)
    moment_dtype = torch.float32 if args.optimizer == "split-m32" else torch.float16
    return SplitAdamW(**common, moment_dtype=moment_dtype, offload=args.offload)
