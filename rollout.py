"""Sampling with a static KV cache: slots, prompts prefilled once a group, a slot refilled when its
row ends.

One decode step takes every row from its last token to its next one, on the device, in place:

    tok [B] -> blocks (KV written at pos, attention over 0..pos) -> logits fp32 -> token and its
    log-prob -> tok, pos, n, alive

The host looks at the rows every `sync` steps only, takes finished ones out and puts waiting ones
in. Waiting prompts are packed into one stream of tokens for their prefill; a prompt's KV is
computed once and copied to the slots of its group. Its last token is then decoded like any other,
so there is one place where tokens are drawn.

The step is the same code three times: eager, compiled as one graph, and on a GPU recorded by hand
as a CUDA graph. Eager on a CPU it runs on the live rows alone, which are kept in front. On a GPU
attention reads the live part of a row through the FlashAttention kernel inside torch; anywhere else
it is SDPA under a mask. The GPU paths are written to torch's documentation and NOT YET MEASURED on
a GPU.

The sampler reads the trained parameters themselves: an optimizer step is seen by the next
`generate` and there is nothing to sync.

Noise is a hash of (seed, prompt index, sample index, step, token), not a stream of a generator: a
sample does not depend on what else is in the batch, on the number of slots, or on when its slot was
free.
"""

import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import Transformer, packed
from plumbing import kernels
from plumbing.kernels import compile_errors, compiled_graphs, flash, regions, splits
from plumbing.memory import PREFILL_TOKENS


@dataclass
class Sample:
    """One response: token ids as drawn (stop token included), log-probs under the policy that drew
    them, whether it stopped by itself."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool


# --------------------------------------------------------------------------------------------------
# drawing a token


def mix(x):
    """Scramble 32-bit integers (Python ints, or held in an int64 tensor): a bijection of xor-shifts
    and multiplications in which every input bit moves every output bit; no product exceeds 63
    bits."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def fold(*parts: int) -> int:
    """One 32-bit key for a tuple of integers such as (seed, step) or (seed, prompt, sample)."""
    key = 0
    for part in parts:
        key = mix((key * 31 + 0x9E3779B9 + part) & 0xFFFFFFFF)
    return key


def exponential(count, key, step):
    """Exp(1) noise, float32 [B,count], in (0, 17): row b holds the numbers named (key[b], step[b],
    0..count-1)."""
    item = torch.arange(count, device=key.device)
    # uniform, 32 bits: small ones, which win, are exact
    u = (mix(item ^ mix(key ^ mix(step))[:, None]).float() + 0.5) * 2.0**-32
    # a u rounded up to 1 would bar even a sure token
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))


def race(weights, key, step):
    """Draw an index with probability proportional to its weight, by exponential races: argmin_v e_v
    / w_v, e_v ~ Exp(1), is such an index.

    weights [B,V] float32, not negative, of any sum, some positive; key [B] and step [B] are
    integers that name the draw.

    Two races in place of one: between blocks of the vocabulary by their weight, then inside the
    winner. P(block) P(token | block) is P(token), and the noise is about V / C + C numbers a row,
    not V: on a CPU the hash would cost as much as some transformer blocks.
    """
    B, V = weights.shape
    # tokens in a block: a power of two that divides V
    C = min(V & -V, 512)
    blocks = weights.unflatten(-1, (V // C, C))
    block = (blocks.sum(-1) / exponential(V // C, key, 2 * step)).argmax(-1)
    inside = blocks[torch.arange(B, device=block.device), block]  # [B,C]
    return block * C + (inside / exponential(C, key, 2 * step + 1)).argmax(-1)


def restrict(z, top_k, top_p, min_p):
    """Logits z [B,V] with what top-k, then nucleus, then min-p sampling leave out at -inf; 0, 1 and
    0 leave everything in."""
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = z.softmax(-1).sort(-1, descending=True)
        # those before it already hold the mass
        out = p.cumsum(-1) - p >= top_p
        z = z.masked_fill(torch.zeros_like(out).scatter(1, order, out), -math.inf)
    if min_p:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return z


# --------------------------------------------------------------------------------------------------
# attention over a cache


def flash_decode(pos, width, length):
    """The attention of one query a row over its keys 0..pos, for rows of `length` keys: a function
    of q [B,H,E], k and v [B,S,K,E] that gives [B,H,E]. It reads live keys only, and splits rows
    where they are few; what all layers share is made once, here."""
    starts = torch.arange(width + 1, dtype=torch.int32, device=pos.device)
    used, key_starts = (pos + 1).int(), starts * length

    def attend(q, k, v):
        parts = splits(width * k.shape[2])
        return flash(
            q, k.flatten(0, 1), v.flatten(0, 1), starts, key_starts, 1, length, used, parts
        )

    return attend


def masked_decode(pos, live, dtype):
    """The same by SDPA over the first `live` keys of every row. The query heads that share a key
    stand as its query rows, so that keys and values are not repeated for each of them."""
    seen = torch.arange(live, device=pos.device) <= pos[:, None]
    # [B,1,1,live], added to the scores
    mask = torch.where(seen, 0.0, -math.inf).to(dtype)[:, None, None]

    def attend(q, k, v):
        q = q.unflatten(1, (k.shape[2], -1))  # [B,K,H/K,E]
        return F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), mask
        ).flatten(1, 2)

    return attend


# --------------------------------------------------------------------------------------------------


class Sampler:
    """Generate from a model with a fixed number of slots.

    model    a Transformer, read in place
    slots    rows decoded together, B; None: 64, on a GPU what the free memory holds, at most 256
    max_len  tokens a row can hold, prompt and response
    compile  compile the decode step as one graph; eager, a CPU runs the live rows only
    sync     decode steps between two looks of the host at the rows; None: 16 on a GPU, where a look
             waits for it, else 1

    KV memory is 2 * L * slots * (max_len + 1) * K * E elements, taken by `start` (or the first
    `generate`) and given back by `stop`. `stats` describes the last `generate`: tokens (generated),
    prompt_tokens (prefilled), steps, seconds, of these prefill_seconds and decode_seconds,
    occupancy (tokens kept / rows computed), recompiles (graphs compiled, but for a sampler's
    first).
    """

    def __init__(self, model: Transformer, slots=None, max_len=2048, compile=False, sync=None):
        if (slots is not None and slots < 1) or max_len < 2 or (sync is not None and sync < 1):
            raise ValueError(
                f"a sampler needs at least 1 slot, 2 tokens a row and 1 step, not {slots}, "
                f"{max_len} and {sync}"
            )
        device = model.unembedding.device
        self.model, self.slots, self.max_len, self.cache = model, slots, max_len, None
        self.compile, self.capture = compile, device.type == "cuda"
        self.sync = sync or (16 if self.capture else 1)
        self.shrink = not (self.compile or self.capture)  # a graph has one width
        self.run_step = (
            torch.compile(self.step, fullgraph=True, dynamic=False) if compile else self.step
        )
        self.stats, self.warm = {}, False

    def start(self):
        """Take the memory of the KV cache and of the per-row state; harmless if taken already.
        OutOfMemoryError for want of it."""
        if self.cache is not None:
            return
        c, S, device, dtype = (
            self.model.config,
            self.max_len + 1,
            self.model.unembedding.device,
            self.model.unembedding.dtype,
        )
        self.net = regions(self.model) if self.compile else self.model
        row = S * (2 * c.n_layers * c.n_kv_heads * c.head_dim * dtype.itemsize + 12)
        if device.type == "cuda":
            free = (
                torch.cuda.mem_get_info(device)[0]
                + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device)
            )
            # logits, activations of a prefill, the allocator's gaps
            room = int((0.85 * free - 2**30) / row)
            # whoever names the slots has counted these: see plan.py
            most = int(0.97 * free / row) if self.slots else room
            if (least := self.slots or 1) > most:
                raise torch.OutOfMemoryError(
                    f"the keys and values of {least} rows of {self.max_len} tokens take "
                    f"{least * row / 1e9:.1f} "
                    f"GB, {free / 1e9:.1f} GB are free on the GPU: take fewer slots (--slots) or "
                    f"shorter "
                    "rows (--max-new-tokens)"
                )
            self.slots = self.slots or min(room, 256)
        B = self.slots = self.slots or 64
        self.flash = kernels.has_flash(device, dtype, c.head_dim)
        # one tensor a layer: written through an index, a stacked cache would be copied whole at
        # every step by a compiled graph. Column max_len is no part of a row: a dead row writes
        # there, so that its prompt stays intact for the rest of its group
        shape = B, S, c.n_kv_heads, c.head_dim
        self.cache = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
            for _ in range(c.n_layers)
        ]
        self.rows, self.graphs = torch.arange(B, device=device), {}
        # of each row: last token, its position, tokens drawn, tokens allowed, key of the noise,
        # alive; one tensor is one look
        self.state = torch.zeros(6, B, dtype=torch.long, device=device)
        self.ids, self.logprobs = (
            torch.zeros(B, S, dtype=torch.long, device=device),
            torch.zeros(B, S, device=device),
        )
        # what a call asks for stands in tensors too, so that no call needs another graph
        self.temperature, self.greedy = (
            torch.ones((), device=device),
            torch.zeros((), dtype=torch.bool, device=device),
        )
        self.bias = torch.zeros(c.vocab_size, device=device)  # -inf where no token is
        self.stops = torch.zeros(c.vocab_size, dtype=torch.bool, device=device)

    def stop(self):
        """Give the memory back, the recorded graphs' included, so that training can have it."""
        self.cache = self.ids = self.logprobs = self.state = self.bias = self.net = None
        self.graphs = {}

    def step(self, width: int, live: int, filters=None):
        """One token for each of the first `width` rows. live: how much of a row SDPA may attend to,
        an upper bound of pos + 1."""
        rows = self.rows[:width]
        tok, pos, n, limit, key, alive = self.state[:, :width]
        alive = alive > 0
        at = torch.where(alive, pos, self.max_len)
        if self.flash:
            over_cache, seen = flash_decode(pos, width, self.max_len + 1), self.max_len + 1
        else:
            over_cache, seen = masked_decode(pos, live, self.cache[0][0].dtype), live

        def attend(layer, q, k, v):  # q [B,H,E], k and v [B,K,E]
            ks, vs = self.cache[layer - 1]
            ks[rows, at], vs[rows, at] = k, v
            return over_cache(q, ks[:width, :seen], vs[:width, :seen])

        h = self.net(tok, position=pos, attend=attend)
        # [B,V] float32, logits / T
        z = torch.addcdiv(self.bias, self.net.unembed(h), self.temperature)
        if filters:
            z = restrict(z, *filters)
        top, best = z.max(-1, keepdim=True)
        weights = (z - top).exp_()
        token = torch.where(self.greedy, best[:, 0], race(weights, key, n))
        logprob = (z.gather(1, token[:, None]) - top)[:, 0] - weights.sum(-1).log()

        slot = torch.where(alive, n, self.max_len)
        self.ids[rows, slot], self.logprobs[rows, slot] = token, logprob
        going = alive & (n + 1 < limit) & ~self.stops[token]
        # a dead row looks at one token
        pos = torch.where(going, pos + 1, 0)
        self.state[:, :width] = torch.stack((token, pos, n + alive, limit, key, going))

    def record(self, filters):
        """The step as a CUDA graph: a replay is one launch in place of some ten a layer. Called
        while every row is dead."""
        args, side = (self.slots, self.max_len, filters), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if self.compile:
                self.try_to_compile(args)
            # makes the libraries' handles before recording
            for _ in range(3):
                self.run_step(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run_step(*args)
        return graph

    def try_to_compile(self, args):
        """The first compiled step; where this machine cannot compile, the plain one takes its
        place, with one line that says so."""
        try:
            self.run_step(*args)
        except compile_errors() as e:
            why = " ".join(str(e).split())[:200]
            print(
                f"the decode step cannot be compiled here, sampling goes on without ({why})",
                file=sys.stderr,
            )
            self.compile, self.run_step, self.net = False, self.step, self.model

    def prefill(self, prompts, slots):
        """Fill the KV of prompts[i][:-1] into the slots slots[i] of its group: one forward over all
        of them, packed end to end."""
        device, S, lengths = (
            self.model.unembedding.device,
            self.max_len + 1,
            [len(p) - 1 for p in prompts],
        )
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        if not starts[-1]:
            return
        ids = torch.tensor([t for p in prompts for t in p[:-1]], device=device)
        pos = torch.cat([torch.arange(n) for n in lengths]).to(device)
        source = torch.cat(
            [
                torch.arange(a, a + n)
                for a, n, group in zip(starts, lengths, slots, strict=False)
                for _ in group
            ]
        ).to(device)
        target = torch.cat(
            [
                torch.arange(s * S, s * S + n)
                for n, group in zip(lengths, slots, strict=True)
                for s in group
            ]
        ).to(device)
        apart = packed(lengths, device)

        def attend(layer, q, k, v):  # q [T,H,E], k and v [T,K,E]
            for old, new in zip(self.cache[layer - 1], (k, v), strict=True):
                old.flatten(0, 1)[target] = new[source]
            return apart(layer, q, k, v)

        self.net(ids, position=pos, attend=attend)

    @torch.no_grad()
    def generate(
        self,
        prompts,
        n=1,
        max_new_tokens=256,
        temperature=1.0,
        stop_ids=(),
        seed=0,
        n_vocab=None,
        progress=None,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        first=0,
    ):
        """Sample n responses to each prompt.

        prompts         lists of token ids, none empty, each shorter than max_len
        max_new_tokens  per response, one number or one a prompt; a row also ends when its max_len
                        is full
        temperature     divides the logits; 0 is greedy, with log-probs at temperature 1
        stop_ids        a response ends with the first of these it draws, which is part of it
        seed            names the noise; the same (seed, prompt index, sample index) draws alike
                        whatever shares the batch
        first           index that names the first prompt: a part of a batch, sampled elsewhere,
                        draws as in the whole one
        n_vocab         ids from here on belong to no token and are never drawn
        progress        a word for the progress bar on a terminal; None: no bar
        top_k, top_p, min_p   for evaluation, never in training: the policy that is trained has no
                        such cuts. Log-probs are then those of the cut and renormalised policy
        returns         [[Sample] * n for each prompt]
        Raises ValueError for an empty prompt or one that leaves no room for a response, before any
        work; FloatingPointError for a model whose logits are NaN.
        """
        stop_ids = set(stop_ids)
        limits = (
            list(max_new_tokens)
            if isinstance(max_new_tokens, (list, tuple))
            else [max_new_tokens] * len(prompts)
        )
        self.check(prompts, n, limits, temperature, n_vocab, (top_k, top_p, min_p))
        out = [[Sample([], [], False) for _ in range(n)] for _ in prompts]
        waiting = deque((i, j) for i in range(len(prompts)) for j in range(n) if limits[i] > 0)
        begin = time.perf_counter()
        self.stats = stats = dict(
            tokens=0,
            prompt_tokens=0,
            steps=0,
            recompiles=0,
            occupancy=1.0,
            seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
        )
        if not waiting:
            return out
        filters, graphs, rows = (
            (top_k, top_p, min_p) if top_k or top_p < 1 or min_p else None,
            compiled_graphs() if self.compile else 0,
            0,
        )
        self.set_up(temperature, stop_ids, n_vocab)
        if self.capture and filters not in self.graphs:
            self.graphs[filters] = self.record(filters)
        # slot -> (prompt, sample) it serves; slot -> prompt whose KV it holds, also after its row
        # has ended
        owner, held = {}, {}
        keep_cudnn_out = (
            sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
            if self.capture
            else nullcontext()
        )
        bar = tqdm(
            total=len(waiting),
            desc=progress,
            disable=None if progress else True,
            leave=False,
            unit="response",
        )
        with keep_cudnn_out, bar:
            turns_left = n * sum(limits)  # each turn draws a token at least
            while waiting or owner:
                turns_left -= 1
                if turns_left < 0:
                    raise RuntimeError(
                        "the sampler does not come to an end: rows neither draw tokens nor finish"
                    )
                start = time.perf_counter()
                if waiting and len(owner) < self.slots:
                    stats["prompt_tokens"] += self.refill(
                        prompts, limits, waiting, owner, held, seed, first
                    )
                if self.shrink and not waiting:
                    self.close_ranks(owner)
                now = time.perf_counter()
                stats["prefill_seconds"] += now - start
                width, state = (max(owner) + 1 if self.shrink else self.slots), self.state.tolist()
                left = [state[3][s] - state[2][s] for s in owner]
                # never past the end of a row that another waits for
                steps = min(self.sync, min(left) if waiting else max(left))
                self.decode(width, max(state[1][s] for s in owner) + 1, steps, filters)
                # the host waits here
                _, _, drawn, _, _, alive = self.state.tolist()
                stats["decode_seconds"] += time.perf_counter() - now
                stats["steps"], rows = stats["steps"] + steps, rows + width * steps
                done = [s for s in owner if not alive[s]]
                if done:
                    self.take_out(done, drawn, owner, out, stop_ids, bar, stats)
                tokens = stats["tokens"] + sum(drawn[s] for s in owner)
                seconds = stats["prefill_seconds"] + stats["decode_seconds"]
                bar.set_postfix_str(
                    f"{tokens / seconds:,.0f} tok/s, {len(owner)} live", refresh=False
                )
        stats["occupancy"], stats["seconds"] = stats["tokens"] / rows, time.perf_counter() - begin
        if self.compile:
            stats["recompiles"], self.warm = compiled_graphs() - graphs - (not self.warm), True
        return out

    def check(self, prompts, n, limits, temperature, n_vocab, filters):
        """Refuse, in one line and before any work, what could not be sampled."""
        V, (top_k, top_p, min_p) = self.model.config.vocab_size, filters
        if n < 1 or not 0 <= temperature < math.inf:
            raise ValueError(
                f"n must be at least 1 and temperature at least 0, not {n} and {temperature}"
            )
        if len(limits) != len(prompts):
            raise ValueError(f"max_new_tokens: {len(limits)} numbers for {len(prompts)} prompts")
        if n_vocab is not None and not 1 <= n_vocab <= V:
            raise ValueError(f"n_vocab must be from 1 to the model's {V}, not {n_vocab}")
        if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
            raise ValueError(
                f"top_k is 0 or more, top_p above 0 up to 1, min_p from 0 to 1, not {top_k}, "
                f"{top_p} and {min_p}"
            )
        for i, p in enumerate(prompts):
            if not p:
                raise ValueError(f"prompt {i} is empty: there is no state to sample from")
            if len(p) >= self.max_len:
                raise ValueError(
                    f"prompt {i} has {len(p)} tokens and leaves no room in rows of {self.max_len}: "
                    f"drop it or raise max_len"
                )
            if min(p) < 0 or max(p) >= V:
                raise ValueError(f"prompt {i} has ids outside 0..{V - 1}")

    def set_up(self, temperature, stop_ids, n_vocab):
        """Memory, and what this call asks for, written where the step reads it."""
        self.start()
        self.state.zero_()
        self.temperature.fill_(temperature or 1.0)
        self.greedy.fill_(temperature == 0)
        self.bias.zero_()[n_vocab or self.bias.numel() :] = -math.inf
        self.stops.zero_()[[i for i in stop_ids if 0 <= i < self.stops.numel()]] = True

    def decode(self, width, live, steps, filters):
        """Some steps, enqueued without waiting for any. live: tokens in the fullest row."""
        for i in range(steps):
            if self.capture:
                self.graphs[filters].replay()
            # eager attention reads the live columns only, rounded up; a compiled step has one shape
            else:
                self.run_step(
                    width,
                    self.max_len if self.compile else min(-(-(live + i) // 64) * 64, self.max_len),
                    filters,
                )

    def refill(self, prompts, limits, waiting, owner, held, seed, first=0):
        """Give free slots to waiting samples, in order, and fill their KV. Returns the prompt
        tokens that went through the model."""
        groups, state = {}, []  # prompt -> its new slots
        for s in (s for s in range(self.slots) if s not in owner):
            if not waiting:
                break
            i, j = owner[s] = waiting.popleft()
            groups.setdefault(i, []).append(s)
            limit = min(limits[i], self.max_len - len(prompts[i]))
            state.append(
                (prompts[i][-1], len(prompts[i]) - 1, 0, limit, fold(seed, first + i, j), 1)
            )
        fresh, computed = deque(groups), 0
        source = next((s for s, i in held.items() if i == fresh[0]), None)
        # samples go in order, so only the first prompt can have been prefilled before
        if source is not None:
            end, slots = len(prompts[fresh[0]]) - 1, groups[fresh.popleft()]
            for kv in (c for pair in self.cache for c in pair):
                kv[slots, :end] = kv[source, :end].clone()
        while fresh:
            batch, size = [], 0
            while fresh and (not batch or size + len(prompts[fresh[0]]) <= PREFILL_TOKENS):
                batch.append(fresh.popleft())
                size += len(prompts[batch[-1]]) - 1
            self.prefill([prompts[i] for i in batch], [groups[i] for i in batch])
            computed += size
        held.update({s: i for i, slots in groups.items() for s in slots})
        self.state[:, [s for slots in groups.values() for s in slots]] = torch.tensor(
            state, device=self.state.device
        ).T
        if self.capture:
            torch.cuda.synchronize()  # so that the seconds of prefill are its own
        return computed

    def close_ranks(self, owner):
        """Move the last live rows into the gaps before them, so that the next steps run on live
        rows alone."""
        for gap in (s for s in range(len(owner)) if s not in owner):
            last = max(owner)
            _, pos, n, *_ = self.state[:, last].tolist()
            for kv in (c for pair in self.cache for c in pair):
                kv[gap, :pos] = kv[last, :pos]
            self.ids[gap, :n], self.logprobs[gap, :n] = self.ids[last, :n], self.logprobs[last, :n]
            self.state[:, gap] = self.state[:, last]
            owner[gap] = owner.pop(last)

    def take_out(self, done, drawn, owner, out, stop_ids, bar, stats):
        """Read finished rows and free their slots. FloatingPointError where the model has ceased to
        compute numbers."""
        longest = max(drawn[s] for s in done)
        for s, ids, logprobs in zip(
            done,
            self.ids[done, :longest].tolist(),
            self.logprobs[done, :longest].tolist(),
            strict=True,
        ):
            i, j = owner.pop(s)
            if math.isnan(logprobs[drawn[s] - 1]):
                raise FloatingPointError(
                    f"sample {j} of prompt {i}: the model's logits are not numbers"
                )
            out[i][j] = Sample(ids[: drawn[s]], logprobs[: drawn[s]], ids[drawn[s] - 1] in stop_ids)
            stats["tokens"] += drawn[s]
        bar.update(len(done))
