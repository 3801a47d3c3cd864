"""GRPO: how a policy learns from graded responses. Advantages, log-probs, loss, batches, gradient.

    advantage   A_i = (r_i - mean(r)) / (std(r) + 1e-6)      over the G responses of one prompt
    ratio       rho_t = pi(o_t) / pi_old(o_t)
    loss        - sum_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) / M
                M = response tokens of the whole mini-batch

GRPO is arXiv 2402.03300, the token mean and the asymmetric clip arXiv 2503.14476 (DAPO), the dual
clip arXiv 1912.09729. Which policy it is that learns is one class, `Policy`: here that of the
model, in bupo.py that of an internal layer.

The value of the loss says nothing, its gradient does. While the ratio is 1 the token mean is -
sum_i len_i A_i / sum_i len_i over the responses i of a mini-batch: 0 only where length does not go
with reward. Watch the reward.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from model import Transformer, packed, project
from plumbing import kernels, parallel
from rollout import Response

# --------------------------------------------------------------------------------------------------
# rewards -> advantages


def group_advantages(rewards: torch.Tensor, kind="grpo", eps=1e-6) -> torch.Tensor:
    """Advantages [N,G] of rewards [N,G], G responses to each of N problems.

    grpo         (r - mean) / (std + eps) over the group, sample deviation (arXiv 2402.03300)
    dr_grpo      r - mean: the division weighs easy and hard problems up (arXiv 2503.20783)
    rloo         r - mean of the other G - 1 responses (arXiv 2402.14740)
    reinforce++  (r - mean) / (std + eps) over the whole batch (arXiv 2501.03262)
    maxrl        (r - mean) / (mean + eps): climbs log P(right), hard problems weigh more; of
                 rewards that are not negative (arXiv 2602.02710)

    Where all rewards compared are equal the advantage is exactly 0: in float32 the mean of seven
    0.7 is not 0.7, and eps would not hide it. Raises ValueError for groups of one, which would have
    no baseline.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [prompts, group] with groups of at least 2, not {list(rewards.shape)}"
        )
    if kind == "reinforce++":
        return group_advantages(rewards.reshape(1, -1), "grpo", eps).view_as(rewards)
    G = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages *= 1 / (rewards.std(1, keepdim=True) + eps)
    elif kind == "rloo":
        advantages *= G / (G - 1)
    elif kind == "maxrl":
        advantages /= rewards.mean(1, keepdim=True) + eps
    first = rewards[:, :1]
    equal = (rewards == first).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """What DAPO (arXiv 2503.14476) adds to the reward of a long response: 0 up to limit - buffer
    tokens, then down to -1 at the limit."""
    penalty = (limit - buffer - length) / buffer
    return min(0.0, max(-1.0, penalty))


# --------------------------------------------------------------------------------------------------
# responses -> batches


@dataclass
class Batch:
    """Right-padded responses [B,T], or packed ones: end to end [T].

    A response token stands one to the right of the state that produced it:

        prompt p p p, response r r      ids        p p p r r
                                        positions      ^ ^
    """

    # [B,T] or [T]; what stands right of a padded response is never looked at
    ids: torch.Tensor
    positions: torch.Tensor  # [M], in ids laid flat, of states whose policy drew a response token
    targets: torch.Tensor  # [M] the response tokens
    advantages: torch.Tensor  # [M]
    lengths: list[int]  # response tokens of each row, sum = M
    # what Transformer.forward needs beside the ids: nothing, or of packed ones position and attend
    forward: dict


def collate(responses: list[Response], device="cpu", pack=False) -> Batch:
    """Pad or pack responses to one Batch. Positions come from lengths, never from comparing ids, so
    a stop or pad id in the text is harmless."""
    rows = [torch.tensor(r.prompt + r.ids) for r in responses]
    lengths = [len(r.ids) for r in responses]
    ids = torch.cat(rows) if pack else pad_sequence(rows, batch_first=True)
    positions, start = [], 0  # start: of a row, in ids laid flat
    for r, row in zip(responses, rows, strict=True):
        first = start + len(r.prompt) - 1
        positions.append(torch.arange(first, first + len(r.ids)))
        start += len(row) if pack else ids.shape[1]
    positions = torch.cat(positions)
    targets = ids.flatten()[positions + 1]
    advantages = per_token([r.advantage for r in responses], lengths)
    forward = {}
    if pack:
        position = torch.cat([torch.arange(len(row)) for row in rows])
        forward["position"] = position.to(device)
        forward["attend"] = packed([len(row) for row in rows], device)
    return Batch(
        ids.to(device),
        positions.to(device),
        targets.to(device),
        advantages.to(device),
        lengths,
        forward,
    )


def per_token(values: list[float], lengths: list[int]) -> torch.Tensor:
    """[M]: the value of each response, at each of its tokens."""
    return torch.tensor(values).repeat_interleave(torch.tensor(lengths))


def response_mean(values, lengths):
    """[M]: the mean of each response's values, at each of its tokens."""
    means = []
    for part in values.split(lengths):
        means.append(part.mean().expand(len(part)))
    return torch.cat(means)


def micro_batches(responses: list[Response], max_tokens: int, pack=False) -> list[list[Response]]:
    """Cut responses into lists of at most max_tokens tokens, counted padded (rows x longest) or
    packed; longest first, so that padding is small and an out-of-memory shows at the first one. A
    response longer than max_tokens gets a list of its own."""
    out, room = [], 0
    for r in sorted(responses, key=lambda r: -r.total_length):
        width = r.total_length
        if out and not pack:
            width = out[-1][0].total_length  # padded to the first of its list
        if width > room:
            out.append([])
            width, room = r.total_length, max_tokens
        out[-1].append(r)
        room -= width
    return out


# what a rank runs while others still have micro-batches, for every forward is a meeting of all
IDLE = [Response(prompt=[0], ids=[0], logprobs=[0.0])]


def batches(model, responses, max_tokens, pack=None):
    """(responses, their Batch) for every micro-batch of this rank; (None, a batch to keep in step
    with) while others have more.

    pack  sequences end to end, or padded; None: packed where there is a kernel that keeps them
          apart
    """
    E = model.unembedding
    if pack is None:
        pack = kernels.has_flash(E.device, E.dtype, model.config.head_dim)
    for micro in parallel.in_step(micro_batches(responses, max_tokens, pack)):
        yield micro, collate(micro or IDLE, E.device, pack)


# --------------------------------------------------------------------------------------------------
# log-probs


def plain_token_logprobs(h, unembedding, targets, temperature=1.0, n_vocab=None):
    """What `token_logprobs` computes, as one would write it down: [M,V] logits and their gradient
    are held, 5 GB each for 8,192 tokens of a vocabulary of 150,000."""
    logits = project(h, unembedding[:n_vocab]) / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    own = logprobs.gather(1, targets[:, None])
    return own[:, 0], entropy.detach()


def token_logprobs(
    h,  # [M,D] states, after the final norm if the policy has one
    unembedding,  # E_u [V,D]
    targets,  # [M] token ids
    temperature=1.0,
    n_vocab=None,  # ids from here on are no tokens and get no probability, as in sampling
    chunk=256,  # rows of logits held at once: chunk * V * 4 bytes, twice
):
    """Log-probs [M] of target tokens, and the entropy [M] of the policy softmax(h E_u^T / tau) they
    come from, float32, in nats, without [M,V]. The entropy carries no gradient."""
    n_vocab = n_vocab or len(unembedding)
    return _TokenLogprobs.apply(h, unembedding, targets, temperature, n_vocab, chunk)


class _TokenLogprobs(torch.autograd.Function):
    """Logits of one chunk at a time, forward and again backward: peak memory is a chunk, not [M,V],
    for a third more head FLOPs.

        log p_t = z_t - log Z        H = log Z - sum_v e^z_v z_v / Z        Z = sum_v e^z_v
        d log p_t / d z = one-hot(t) - softmax(z)
    """

    @staticmethod
    def forward(ctx, h, E, targets, temperature, n_vocab, chunk):
        logp = torch.empty(len(h), device=h.device)
        entropy = torch.empty_like(logp)
        lse = torch.empty_like(logp)
        rows = _rows(E, n_vocab)
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = _logits(h[part], rows, temperature, n_vocab)  # [chunk, V] float32
            top = z.amax(-1, keepdim=True)
            z -= top  # so that no exponential overflows
            own = z.gather(1, targets[part, None])
            e = z.exp()
            total = e.sum(-1)
            lse[part] = top[:, 0] + total.log()
            logp[part] = own[:, 0] - total.log()
            e *= z
            entropy[part] = total.log() - e.sum(-1) / total
            del z, e  # before the next chunk takes its memory
        ctx.save_for_backward(h, E, targets, lse)
        ctx.rest = temperature, n_vocab, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, E, targets, lse = ctx.saved_tensors
        temperature, n_vocab, chunk = ctx.rest
        rows = _rows(E, n_vocab)
        dh = torch.empty_like(h)
        # float32 for half-precision weights too, see kernels.mm32
        dE = torch.zeros_like(E, dtype=torch.float32)
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            slope = grad[part, None] / temperature
            dz = _logits(h[part], rows, temperature, n_vocab)
            dz -= lse[part, None]
            dz.exp_()  # softmax
            dz *= -slope
            dz.scatter_add_(1, targets[part, None], slope)  # one-hot - softmax
            dz = dz.to(E.dtype)
            dh[part] = dz @ rows
            kernels.add_mm32(dE[: len(rows)], dz.t(), h[part])
            del dz
        return dh, dE, None, None, None, None


def _rows(E, n_vocab):
    """The rows of E_u whose logits are computed. In half precision all of them, for fast kernels
    refuse an odd number such as the 151,669 tokens of Qwen3; `_logits` masks the rest."""
    return E if kernels.is_half(E.dtype) else E[:n_vocab]


def _logits(h, E, temperature, n_vocab):
    """float32 logits / T of the rows of E. Those from n_vocab on are so low that their probability
    is 0, and finite, so that 0 times them is 0."""
    z = project(h, E)
    z[:, n_vocab:] = -1e30
    return z if temperature == 1 else z.div_(temperature)


@dataclass
class Policy:
    """The model's own policy, pi^L = softmax(norm(H^L) E_u^T / tau) over the ids below n_vocab."""

    model: Transformer
    temperature: float = 1.0
    n_vocab: int | None = None
    chunk: int = 256  # rows of logits held at once

    @property
    def layer(self) -> int:
        return self.model.config.n_layers

    def states(self, batch: Batch) -> torch.Tensor:
        """[M,D]: what the unembedding sees where response tokens are drawn. They are picked before
        the final norm: prompts and padding never reach it."""
        h = self.model(batch.ids, **batch.forward)
        h = h.flatten(0, -2)[batch.positions]
        return self.model.norm(h)

    def logprobs(self, batch: Batch):
        """Log-probs [M] of a batch's response tokens, with gradient, and entropy [M]."""
        h = self.states(batch)
        E = self.model.unembedding  # after the forward, which gathers it where it is sharded
        rest = self.temperature, self.n_vocab, self.chunk
        return token_logprobs(h, E, batch.targets, *rest)


def mask_certain(policy: Policy, responses, share, max_tokens):
    """Let only the `share` of a mini-batch's tokens learn at which the policy's entropy is highest:
    the forks, where a response could have gone on otherwise (arXiv 2506.01939, with 0.2). Sets the
    mask of every response of this rank; M, which a token's weight follows from, stays."""
    mine, entropies = [], []  # of this rank
    local = parallel.local_responses(responses)
    for response, _, entropy in stored_logprobs(policy, local, max_tokens):
        mine.append(response)
        entropies.append(entropy.cpu())
    everything = parallel.all_gather(entropies)
    everything = torch.cat(everything)
    count = max(1, round(share * len(everything)))
    threshold = everything.topk(count).values[-1]
    for response, entropy in zip(mine, entropies, strict=True):
        certain = entropy < threshold
        response.mask = 1 - certain.float()


@torch.no_grad()
def stored_logprobs(policy: Policy, responses, max_tokens):
    """Yield (response, its log-probs [len(ids)] under the policy, the policy's entropies there
    [len(ids)]), without gradient."""
    for micro, batch in batches(policy.model, responses, max_tokens):
        found = policy.logprobs(batch)
        if micro:
            parts = (values.split(batch.lengths) for values in found)
            yield from zip(micro, *parts, strict=True)


# --------------------------------------------------------------------------------------------------
# the loss


def policy_loss(
    logprobs,  # [M]
    old_logprobs,  # [M]
    advantages,  # [M], of a token that of its response
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=10.0,  # for A < 0 the loss is at most this times |A|; None: off
    objective="grpo",
):
    """One value a token (a loss: minimise it), rho being the ratio pi / pi_old:

    grpo, gspo   -min(rho A, clip(rho, 1 - low, 1 + high) A), the clipped surrogate. With the dual
                 clip no token whose ratio exploded owns the step. Of gspo rho is that of whole
                 responses, see `backward`
    cispo        -sg(min(rho, 1 + high)) A log pi: the weight is clipped, never the gradient, so
                 that every token learns (arXiv 2506.13585)
    dppo         -rho A, but 0 where the probability itself has gone more than `high` up (A > 0) or
                 `low` down (A < 0): a rare token may grow manyfold, a sure one may not jump
                 (arXiv 2602.04879, with the total variation of one token)

    Returns (loss [M], clipped_low [M], clipped_high [M]): masks of the tokens that the clip has
    silenced below and above (of cispo: held). The log-ratio is within +-20, so that exp never
    overflows.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    plain = -advantages * ratio
    if objective == "cispo":
        weight = ratio.detach().clamp(max=1 + clip_high)
        held = ratio > 1 + clip_high
        return -advantages * weight * logprobs, torch.zeros_like(held), held
    if objective == "dppo":
        moved = logprobs.exp() - old_logprobs.exp()
        fallen = (advantages < 0) & (moved < -clip_low)
        risen = (advantages > 0) & (moved > clip_high)
        return plain.masked_fill(fallen | risen, 0.0), fallen, risen
    near = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = -advantages * near
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, bounded, loss)
    silenced = clipped > plain
    clipped_low = silenced & (advantages < 0)
    clipped_high = silenced & (advantages > 0)
    return loss, clipped_low, clipped_high


def kl_to_reference(logprobs, reference):
    """The k3 estimate of KL(pi || pi_ref) at sampled tokens, nats: exp(d) - 1 - d with d = log
    pi_ref - log pi; never negative.

    Schulman's "Approximating KL divergence". As in the paper's code the estimate is at most 10,
    where its gradient ends: no token pulls with more than exp(2.6) - 1 = 12.5.
    """
    d = (reference - logprobs).clamp(-20, 20)
    estimate = d.expm1() - d  # exp(d) - 1 would round a small d's estimate below 0
    return estimate.clamp(max=10)


def response_weights(lengths: list[int], kind="token-mean", limit=None) -> list[float]:
    """Weight of each token of each response in the loss of a mini-batch of R responses with these
    many tokens.

    token-mean  1 / sum(lengths): every token counts the same (DAPO, arXiv 2503.14476)
    seq-mean    1 / (R length): every response counts the same, tokens of long ones less (GRPO as
                published, arXiv 2402.03300)
    dr_grpo     1 / (R limit), a constant: no length decides what a token counts (arXiv 2503.20783)
    """
    R = len(lengths)
    if kind == "token-mean":
        return [1 / max(sum(lengths), 1)] * R
    if kind == "dr_grpo":
        return [1 / (R * limit) for _ in lengths]
    return [1 / (R * max(n, 1)) for n in lengths]


def sampler_weights(responses, old_logprobs):
    """pi_old / pi_sampler [M] of the responses' tokens."""
    drawn = []
    for r in responses:
        drawn += r.logprobs
    drawn = torch.tensor(drawn, device=old_logprobs.device)
    return (old_logprobs - drawn).exp()


def backward(
    policy: Policy,
    responses: list[Response],
    max_tokens: int,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=10.0,
    weighting="token-mean",
    limit=None,
    kl=0.0,
    tis=None,
    pack=None,
    objective="grpo",
) -> dict:
    """Gradient of the clipped loss of a mini-batch, added to .grad, and sums of what it saw.

    A token's weight follows from the whole mini-batch: the gradient does not depend on `max_tokens`
    (of a micro-batch), padding or packing (`pack`, see `batches`), the order of responses, or how
    many ranks they are dealt to. Without stored old log-probs the ratio is 1 and its gradient that
    of log pi: right for the first update on a batch.

    weighting, limit   how much a token counts: see response_weights; objective: see policy_loss
    kl     adds kl * k3 against each response's ref_logprobs
    tis    the surrogate times min(pi_old / pi_sampler, tis), for how trainer and sampler differ
           by numerics; at l = L only: below it they are two policies on purpose
    returns    tokens, and sums over them: loss (weighted), entropy, clip_low, clip_high, kl
    """
    responses = [r for r in responses if r.ids]
    weights = response_weights([len(r.ids) for r in responses], weighting, limit)
    for r, weight in zip(responses, weights, strict=True):
        r.weight = weight
    sums = dict.fromkeys(("loss", "entropy", "clip_low", "clip_high", "kl"), 0.0)
    local = parallel.local_responses(responses)
    for micro, batch in batches(policy.model, local, max_tokens, pack):
        logprobs, entropy = policy.logprobs(batch)
        if not micro:  # nothing is left here, but other ranks wait for this one
            (0 * logprobs.sum()).backward()
            continue
        old = logprobs.detach()  # none are stored for a step of one update: the ratio is 1
        if micro[0].old_logprobs:
            old = torch.cat([r.old_logprobs[policy.layer] for r in micro])
        new, clips = logprobs, (clip_low, clip_high, dual_clip)
        if objective == "gspo":  # every token has the ratio of its response (arXiv 2507.18071)
            new = old + response_mean(logprobs - old, batch.lengths)
        surrogate, *clipped = policy_loss(new, old, batch.advantages, *clips, objective)
        if tis and policy.layer == policy.model.config.n_layers:
            surrogate = surrogate * sampler_weights(micro, old).clamp(max=tis)
        k3 = torch.zeros_like(logprobs)
        if kl:
            ref = torch.cat([r.ref_logprobs[policy.layer] for r in micro])
            k3 = kl_to_reference(logprobs, ref)
        weight = per_token([r.weight for r in micro], batch.lengths)  # 1 / M each, by default
        if micro[0].mask is not None:
            weight = weight * torch.cat([r.mask for r in micro])
        value = ((surrogate + kl * k3) * weight.to(old.device)).sum()
        value.backward()
        for name, x in zip(sums, (value, entropy, *clipped, k3), strict=True):
            sums[name] += x.detach().sum().item()
    tokens = sum(len(r.ids) for r in responses)
    return parallel.all_reduce(sums) | {"tokens": tokens}
