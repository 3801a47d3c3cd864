"""Many GPUs and machines: every process runs the same lines of train.py, and this file holds what
differs.

    torchrun --nproc-per-node 8 train.py --model qwen3-8b
        one machine, 8 GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py
        on each of 4 machines
    torchrun (the same) train.py --replicas 4 ...
        weights sharded inside each machine, copied to all four (HSDP)
    torchrun --nproc-per-node 8 eval.py --model qwen3-8b --data aime24 --samples 32
        questions shared out

Sampling      each process ("rank") holds a whole copy of the model to sample from, and answers a
              contiguous share of the step's problems. Noise is named by the problem's place in the
              whole batch, so any number of ranks draws the same samples.
Exchange      the graded answers go to every rank: rewards, advantages, metrics and every decision
              are computed alike everywhere.
Training      weights, gradients and moments are float32 shards (FSDP2, `fully_shard` of every
              block); on cuda the model computes in bfloat16, and gradients are summed in float32.
              The responses of a mini-batch are dealt out by length. A token's weight in the loss
              follows from the whole mini-batch, so gradients are summed, not averaged, and equal
              those of one process.
Files         rank 0 alone prints, logs and writes. A checkpoint is gathered to it, one parameter at
              a time, before anything is written; the format is that of one process, so a run
              resumes with any number of ranks. Only rank 0 needs to see the run folder.

All ranks must meet in the same collectives in the same order. Hence: decisions depend on exchanged
data only, what one rank decides alone goes through `on_rank_0`, and a rank that runs out of
micro-batches runs idle ones (`in_step`). In an internal phase no rank runs the blocks above l, so
these are never gathered and their gradients stay None.

A rank that dies ends the others with exit code 7: at once where its connection closes, else after
NANOBUPO_TIMEOUT seconds (default 1800: the longest that ranks may wait for each other, be it for a
long response or for the disk). The last checkpoint stands.

With one process there is no process group and no FSDP, and every function here is the identity.

Simplified on purpose: data parallel only. One GPU must hold a copy in bfloat16 to sample from, and
while loading the float32 weights.
"""

import copy
import os
import sys
import time
from collections import defaultdict
from datetime import timedelta
from itertools import repeat

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.optimizer import place

LOST = 7  # exit code: another rank died or does not answer


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 unless torchrun started them and `start` was called."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --------------------------------------------------------------------------------------------------
# the group of processes


def start():
    """Meet the other ranks, take this rank's GPU, and leave printing to rank 0. Errors of any rank
    still reach stderr.

    Raises ValueError for a NANOBUPO_TIMEOUT that is no number of seconds, and when torchrun starts
    more processes than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    seconds = os.environ.get("NANOBUPO_TIMEOUT", "1800")
    if not seconds.isdigit() or int(seconds) < 1:
        raise ValueError(f"NANOBUPO_TIMEOUT is {seconds!r:.40}: give whole seconds, at least 1")
    backend = "gloo"
    if torch.cuda.is_available():
        # answers and metrics travel through gloo as bytes on the CPU, weights and gradients of GPUs
        # through nccl
        backend = "cpu:gloo,cuda:nccl"
        gpu, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if gpu >= count:
            raise ValueError(
                f"this machine has {count} GPUs: start at most that many processes "
                f"(--nproc-per-node {count})"
            )
        torch.cuda.set_device(gpu)  # from here on "cuda" means this one
    dist.init_process_group(backend, timeout=timedelta(seconds=int(seconds)))
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop():
    """Say goodbye to the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code):
    """Say goodbye to the other ranks and end this process."""
    alone = world() == 1
    stop()
    _exit(code, alone)


def _exit(code, alone):
    """End this process: under torchrun without taking Python down in order, for threads of the
    group may still be at work, and would abort it with another code."""
    if alone:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(error) -> bool:
    """Whether an error says that another rank is gone or silent; gloo's are plain RuntimeErrors."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def leave(line, code):
    """Say a last line on stderr and exit, without waiting for collectives that will never end.

    The other ranks leave rank 0 a second's start: what all would say it says alone, for torchrun
    ends them as soon as it is gone.
    """
    if rank():
        time.sleep(1)
    print(f"rank {rank()}: {line}" if rank() else line, file=sys.stderr, flush=True)
    _exit(code, world() == 1)


# --------------------------------------------------------------------------------------------------
# work and its results


def local_slice(n: int) -> slice:
    """This rank's piece of n things in a row: contiguous, and none longer by more than one than
    another's."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def local_responses(responses: list) -> list:
    """This rank's part of responses, dealt out from the longest to the shortest, so that all ranks
    have about equally much to do."""
    if world() == 1:
        return responses
    return sorted(responses, key=lambda r: -(len(r.prompt) + len(r.ids)))[rank() :: world()]


def all_gather(items: list) -> list:
    """The lists of all ranks, joined in the order of ranks."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks, name by name."""
    parts = all_gather([sums])
    return {name: sum(part[name] for part in parts) for name in sums}


def all_reduce_max(n: int) -> int:
    """The largest of all ranks' numbers."""
    return max(all_gather([n]))


def in_step(batches: list) -> list:
    """Batches, followed by a None for each that another rank has more: every forward and backward
    is a meeting of all ranks."""
    return batches + [None] * (all_reduce_max(len(batches)) - len(batches))


def on_rank_0(f, *args, **kw):
    """f(*args, **kw), run by rank 0 alone. Every rank returns its result, or raises its
    exception."""
    if world() == 1:
        return f(*args, **kw)
    out = [None, None]
    if rank() == 0:
        try:
            out[0] = f(*args, **kw)
        except Exception as e:
            out[1] = e
    dist.broadcast_object_list(out, src=0)
    value, error = out
    if error is not None:
        raise error
    return value


# --------------------------------------------------------------------------------------------------
# weights


def shard(model, replicas=1, compute=torch.float32):
    """Shard a model's float32 parameters over the ranks, in place, and return it. Each rank must
    bring the same weights.

    Blocks are gathered one by one, and then embedding, last norm and unembedding together, as
    copies of dtype `compute`: the arithmetic of one process, whose weights have that dtype. Their
    gradients are summed over ranks and micro-batches in float32.
    replicas  machines (or parts of the world) that hold a full set of shards each: less traffic
              between them, more memory
    """
    if replicas < 1 or world() % replicas:
        raise ValueError(f"--replicas {replicas} must divide the number of processes, {world()}")
    if world() == 1:
        return model
    shape, names = (replicas, world() // replicas), ("replica", "shard")
    if replicas == 1:
        shape, names = shape[1:], names[1:]
    mesh = init_device_mesh(model.unembedding.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # a sum: the loss has been divided by all ranks' tokens already
        module.set_gradient_divide_factor(1.0)
        # a plain one, which gloo knows too
        module.set_force_sum_reduction_for_comms(True)
    return model


def full_tensor(t):
    """A sharded tensor gathered, on every rank; any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def plain(model, device, dtype=None):
    """A model of the same shape in ordinary tensors, its weights not yet filled in; dtype None is
    the model's."""
    with torch.device("meta"):
        out = type(model)(model.config)
    out.folder = model.folder
    return out.to(dtype or model.unembedding.dtype).to_empty(device=device).requires_grad_(False)


def clip_gradients(model, limit) -> torch.Tensor:
    """Scale the gradients down to a joint norm of at most `limit`; returns the norm before, summed
    in float32 whatever their dtype."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    norm = torch.stack([full_tensor(n) for n in norms]).norm()
    for g in grads:
        g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local_tensor(t):
    """This rank's shard of a tensor; all of one that is not sharded."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def sampling_copy(model, compute):
    """The model to sample from: whole, on this rank's device, in the dtype it computes in. One
    process: the model itself."""
    if world() == 1:
        return model
    out = plain(model, model.unembedding.device, compute)
    update_sampler(model, out)
    return out


@torch.no_grad()
def update_sampler(model, out):
    """Copy the weights into the model to sample from, in place, one parameter at a time. Cast
    first: half the bytes on the wire."""
    if model is out:
        return
    model.reshard()
    for p, q in zip(model.parameters(), out.parameters(), strict=True):
        q.copy_(full_tensor(p.detach().to(q.dtype)))


# --------------------------------------------------------------------------------------------------
# checkpoints


@torch.no_grad()
def gather(model, optimizer):
    """Model and optimizer in ordinary tensors on the CPU of rank 0; (None, None) on the others. One
    process: what came in.

    A parameter or moment at a time is whole on the GPUs; all of them are so on the host of rank 0
    only.
    """
    if world() == 1:
        return model, optimizer
    model.reshard()
    device = "meta" if rank() else "cpu"  # the other ranks take part, and keep nothing
    out, flat = plain(model, device), copy.copy(optimizer)
    twins = dict(zip(model.parameters(), out.parameters(), strict=True))
    groups = optimizer.param_groups
    flat.param_groups = [{**g, "params": [twins[p] for p in g["params"]]} for g in groups]
    flat.state = defaultdict(dict)
    for p, twin in twins.items():
        twin.copy_(full_tensor(p))
        for key, moment in optimizer.state.get(p, {}).items():
            flat.state[twin][key] = full_tensor(moment).to(device)
    return (None, None) if rank() else (out, flat)


@torch.no_grad()
def scatter(out, flat, model, optimizer):
    """The way back: from rank 0's ordinary model and optimizer each rank takes its shards. One
    process: nothing to do."""
    if world() == 1:
        return
    model.reshard()

    def steps_of(twin):
        """Rank 0's step counts; and None for a moment, which has its parameter's shape and
        follows."""
        return {key: None if t.dim() else t for key, t in flat.state.get(twin, {}).items()}

    def shards(p, full):
        empty = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        full = empty if rank() else full.to(p.device, p.dtype)
        return distribute_tensor(full, p.device_mesh, p.placements)

    optimizer.state.clear()
    twins = repeat(None) if rank() else out.parameters()
    for p, twin in zip(model.parameters(), twins, strict=False):
        p.copy_(shards(p, twin))
        for key, step in on_rank_0(steps_of, twin).items():
            if step is None:
                step = shards(p, flat and flat.state[twin][key])
            optimizer.state[p][key] = place(optimizer, p, step)
