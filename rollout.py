"""Sampling with a static KV cache: slots, prompts prefilled once a group, a slot refilled when its
row ends.

One decode step takes every row from its last token to its next one, on the device, in place:

    token [B] -> blocks (KV written at position, attention over 0..position) -> logits fp32
              -> next token and its log-prob -> token, position, drawn, alive

The host looks at the rows every `sync` steps only, takes finished ones out and puts waiting ones
in. Waiting prompts are packed into one stream of tokens for their prefill; a prompt's KV is
computed once and copied to the slots of its group. Its last token is then decoded like any other,
so there is one place where tokens are drawn.

The step is the same code three times: eager, compiled as one graph, and on a GPU recorded as a
CUDA graph. Eager on a CPU it runs on the live rows alone, which are kept in front. On a GPU
attention reads the live part of a row through the FlashAttention kernel inside torch; anywhere else
it is SDPA under a mask. The GPU paths are written to torch's documentation and NOT YET MEASURED on
a GPU.

With one process the sampler reads the trained parameters themselves: an optimizer step is seen by
the next `generate` and there is nothing to sync. Under torchrun it has a copy.

Noise is a hash of (seed, prompt index, sample index, step, token), not a stream of a generator: a
sample does not depend on what else is in the batch, on the number of slots, or on when its slot was
free.
"""

import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import Transformer, packed
from plumbing import kernels
from plumbing.data import Problem
from plumbing.memory import PREFILL_TOKENS
from plumbing.noise import exponential, fold
from verify import Verdict


@dataclass
class Response:
    """One response, from the draw to the gradient, in one record: no reward can ever meet another
    prompt's tokens. Each stage fills in its own fields."""

    prompt: list[int]  # token ids
    # by the sampler: token ids, the stop token included, which is trained like any other
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of ids, under the policy that drew them
    stopped: bool = False  # by itself, or cut off
    # by the verifier
    problem: Problem | None = None  # what was asked
    text: str = ""  # decoded, without the stop token
    verdict: Verdict | None = None
    reward: float = 0.0
    # by GRPO
    advantage: float = 0.0  # over its group
    # by layer: [len(ids)] of the policy before the first update, and of the frozen reference
    old_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    ref_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)  # for a KL term
    weight: float = 0.0  # of each of its tokens in the loss of the mini-batch
    mask: torch.Tensor | None = None  # [len(ids)] 1 or 0: tokens that learn; None: all

    @property
    def total_length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.ids)


# --------------------------------------------------------------------------------------------------
# drawing a token


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
    C = min(V & -V, 512)  # tokens in a block: V & -V is the largest power of two that divides V
    blocks = weights.unflatten(-1, (V // C, C))
    noise = exponential(V // C, key, 2 * step)  # two draws a step, with noise of their own
    block = (blocks.sum(-1) / noise).argmax(-1)
    rows = torch.arange(B, device=block.device)
    inside = blocks[rows, block]  # [B,C]
    noise = exponential(C, key, 2 * step + 1)
    return block * C + (inside / noise).argmax(-1)


# --------------------------------------------------------------------------------------------------
# attention over a cache


def flash_decode(position, width, length):
    """Attention of one query in each of `width` rows of `length` keys over keys 0..position: a
    function of q [B,H,E], k and v [B,S,K,E] that gives [B,H,E]. It reads live keys only, and splits
    rows where they are few; what all layers share is made once, here."""
    starts = torch.arange(width + 1, dtype=torch.int32, device=position.device)
    used, key_starts = (position + 1).int(), starts * length

    def attend(q, k, v):
        parts = kernels.splits(width * k.shape[2])
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        return kernels.flash(q, k, v, starts, key_starts, 1, length, used, parts)

    return attend


def masked_decode(position, columns, dtype):
    """The same by SDPA over the first `columns` keys of every row. The query heads that share a key
    stand as its query rows, so that keys and values are not repeated for each of them."""
    key_position = torch.arange(columns, device=position.device)
    seen = key_position <= position[:, None]
    mask = torch.where(seen, 0.0, -math.inf).to(dtype)
    mask = mask[:, None, None]  # [B,1,1,columns]

    def attend(q, k, v):
        q = q.unflatten(1, (k.shape[2], -1))  # [B,K,H/K,E]
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B,K,columns,E]
        return F.scaled_dot_product_attention(q, k, v, mask).flatten(1, 2)

    return attend


# --------------------------------------------------------------------------------------------------
# the sampler


class Request(NamedTuple):
    """A response that is to be drawn, or is being drawn."""

    prompt_index: int
    response: Response
    limit: int  # tokens allowed
    key: int  # names its noise


# what a row of the sampler's state is of each slot: the last token, its position, how many tokens
# were drawn, how many are allowed, the key of the noise, whether it goes on
TOKEN, POSITION, DRAWN, LIMIT, KEY, ALIVE = range(6)


NOTHING_DONE = {
    "tokens": 0,
    "prompt_tokens": 0,
    "steps": 0,
    "recompiles": 0,
    "occupancy": 1.0,
    "seconds": 0.0,
    "prefill_seconds": 0.0,
    "decode_seconds": 0.0,
}


class Sampler:
    """Generate from a model with a fixed number of slots.

    model    a Transformer, read in place
    slots    rows decoded together, B; None: 64, on a GPU what the free memory holds, at most 256
    max_len  tokens a row can hold, prompt and response
    compile  compile the decode step as one graph
    sync     decode steps between two looks of the host at the rows; None: 16 on a GPU, where a look
             waits for it, else 1

    How a step runs:       its rows are          attention reads
        eager, on a CPU    the live ones         the fullest row's keys, rounded up
        compiled           all, one shape        all keys, under a mask
        CUDA graph         all, one shape        live keys, by the kernel; else all under a mask

    KV memory is 2 * L * slots * (max_len + 1) * K * E elements, taken by `allocate` (or the first
    `generate`), given back by `release`. `stats` describes the last `generate`: tokens (generated),
    prompt_tokens (prefilled), steps, seconds, of these prefill_seconds and decode_seconds,
    occupancy (tokens kept / rows computed), recompiles (graphs compiled, but for a sampler's
    first).
    """

    def __init__(self, model: Transformer, slots=None, max_len=2048, compile=False, sync=None):
        for asked in (slots, max_len - 1, sync):
            if asked is not None and asked < 1:
                raise ValueError(
                    f"a sampler needs at least 1 slot, 2 tokens a row and 1 step, not {slots}, "
                    f"{max_len} and {sync}"
                )
        self.model = model
        self.slots = slots
        self.max_len = max_len
        self.device = model.unembedding.device
        self.compile = compile
        self.capture = self.device.type == "cuda"
        self.sync = sync or (16 if self.capture else 1)
        self.shrink = not (self.compile or self.capture)  # a graph has one width
        self.run_step = self.step
        if compile:
            self.run_step = torch.compile(self.step, fullgraph=True, dynamic=False)
        self.cache = None
        self.stats = {}
        self.warm = False

    def allocate(self):
        """Take the memory of the KV cache and of the per-row state; harmless if taken already.
        OutOfMemoryError for want of it."""
        if self.cache is not None:
            return
        c, device = self.model.config, self.device
        dtype = self.model.unembedding.dtype
        # column max_len is no part of a row: a dead row writes there, so that its prompt stays
        # intact for the rest of its group
        S = self.max_len + 1
        self.net = kernels.regions(self.model) if self.compile else self.model
        if device.type == "cuda":
            kv_bytes = 2 * c.n_layers * c.n_kv_heads * c.head_dim * dtype.itemsize
            row_bytes = S * (kv_bytes + 12)
            self.slots = self.slots_that_fit(row_bytes)
        B = self.slots = self.slots or 64
        self.flash = kernels.has_flash(device, dtype, c.head_dim)
        # one tensor a layer: written through an index, a stacked cache would be copied whole at
        # every step by a compiled graph
        self.cache = []
        for _ in range(c.n_layers):
            keys = torch.zeros(B, S, c.n_kv_heads, c.head_dim, dtype=dtype, device=device)
            values = torch.zeros_like(keys)
            self.cache.append((keys, values))
        self.rows = torch.arange(B, device=device)
        self.state = torch.zeros(6, B, dtype=torch.long, device=device)  # one tensor is one look
        self.ids = torch.zeros(B, S, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B, S, device=device)
        # what a call asks for stands in tensors too, so that no call needs another graph
        self.graph = None
        self.temperature = torch.ones((), device=device)
        self.greedy = torch.zeros((), dtype=torch.bool, device=device)
        self.bias = torch.zeros(c.vocab_size, device=device)  # -inf where no token is
        self.is_stop = torch.zeros(c.vocab_size, dtype=torch.bool, device=device)

    def slots_that_fit(self, row_bytes):
        """How many rows the free memory of the GPU holds, or those asked for if they fit."""
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device)
        free -= torch.cuda.memory_allocated(self.device)
        # logits, activations of a prefill, the allocator's gaps; whoever names the slots has
        # counted these: see plumbing/memory.py
        room = int((0.85 * free - 2**30) / row_bytes)
        most = int(0.97 * free / row_bytes) if self.slots else room
        least = self.slots or 1
        if least > most:
            raise torch.OutOfMemoryError(
                f"the keys and values of {least} rows of {self.max_len} tokens take "
                f"{least * row_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on the GPU: take "
                "fewer slots (--slots) or shorter rows (--max-new-tokens)"
            )
        return self.slots or min(room, 256)

    def release(self):
        """Give the memory back, the recorded graph's included, so that training can have it."""
        self.cache = self.state = self.ids = self.logprobs = None
        self.bias = self.net = self.graph = None

    # ----------------------------------------------------------------------------------------------
    # one step

    def step(self, width: int, columns: int):
        """One token for each of the first `width` rows. columns: how much of a row SDPA may attend
        to, an upper bound of position + 1."""
        rows = self.rows[:width]
        state = self.state[:, :width]
        token, position, drawn, limit, key, alive = state
        alive = alive > 0
        trash = self.max_len  # the column where dead rows write
        at = torch.where(alive, position, trash)
        if self.flash:
            columns = self.max_len + 1
            over_cache = flash_decode(position, width, columns)
        else:
            over_cache = masked_decode(position, columns, self.cache[0][0].dtype)

        def attend(layer, q, k, v):  # q [B,H,E], k and v [B,K,E]
            keys, values = self.cache[layer - 1]
            keys[rows, at] = k
            values[rows, at] = v
            return over_cache(q, keys[:width, :columns], values[:width, :columns])

        h = self.net(token, position=position, attend=attend)
        # z = bias + logits / T, [B,V] float32. Logits have no name: it would keep them in memory
        z = torch.addcdiv(self.bias, self.net.unembed(h), self.temperature)
        top, best = z.max(-1, keepdim=True)
        weights = (z - top).exp_()
        sampled = race(weights, key, drawn)
        token = torch.where(self.greedy, best[:, 0], sampled)
        chosen = z.gather(1, token[:, None]) - top
        logprob = chosen[:, 0] - weights.sum(-1).log()

        column = torch.where(alive, drawn, trash)
        self.ids[rows, column] = token
        self.logprobs[rows, column] = logprob
        has_room = drawn + 1 < limit
        goes_on = alive & has_room & ~self.is_stop[token]
        position = torch.where(goes_on, position + 1, 0)  # a dead row looks at one token
        drawn = drawn + alive
        after = torch.stack((token, position, drawn, limit, key, goes_on))
        self.state[:, :width] = after

    def decode(self, width, fullest, steps):
        """Some steps, enqueued without waiting for any. fullest: tokens in the fullest row."""
        for i in range(steps):
            if self.capture:
                self.graph.replay()
            elif self.compile:  # one shape
                self.run_step(width, self.max_len)
            else:  # the live columns only, rounded up
                columns = (fullest + i + 63) // 64 * 64
                self.run_step(width, min(columns, self.max_len))

    def record(self):
        """The step as a CUDA graph, recorded while every row is dead."""
        if self.compile:
            self.try_to_compile()
        return kernels.cuda_graph(lambda: self.run_step(self.slots, self.max_len))

    def try_to_compile(self):
        """The first compiled step; where this machine cannot compile, the plain one takes its
        place, with one line that says so."""
        try:
            self.run_step(self.slots, self.max_len)
        except kernels.compile_errors() as e:
            why = " ".join(str(e).split())[:200]
            print(
                f"the decode step cannot be compiled here, sampling goes on without ({why})",
                file=sys.stderr,
            )
            self.compile = False
            self.run_step, self.net = self.step, self.model

    def prefill(self, prompts, slots):
        """Fill the KV of prompts[i][:-1] into the slots slots[i] of its group: one forward over all
        of them, packed end to end."""
        S = self.max_len + 1
        ids, position, lengths = [], [], []
        source, target = [], []  # a token's place in the packed stream, and in the cache
        for prompt, group in zip(prompts, slots, strict=True):
            n, start = len(prompt) - 1, len(ids)
            ids += prompt[:-1]
            lengths.append(n)
            position.append(torch.arange(n))
            for slot in group:
                source.append(torch.arange(n) + start)
                target.append(torch.arange(n) + slot * S)
        if not ids:
            return
        ids = torch.tensor(ids, device=self.device)
        position = torch.cat(position).to(self.device)
        source = torch.cat(source).to(self.device)
        target = torch.cat(target).to(self.device)
        apart = packed(lengths, self.device)

        def attend(layer, q, k, v):  # q [T,H,E], k and v [T,K,E]
            keys, values = self.cache[layer - 1]
            keys.flatten(0, 1)[target] = k[source]
            values.flatten(0, 1)[target] = v[source]
            return apart(layer, q, k, v)

        self.net(ids, position=position, attend=attend)

    # ----------------------------------------------------------------------------------------------
    # all of them

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
        first=0,
    ) -> list[list[Response]]:
        """Sample n responses to each prompt: [[Response] * n for each prompt].

        prompts         lists of token ids, none empty, each shorter than max_len
        max_new_tokens  per response, one number or one a prompt; a row also ends when its max_len
                        is full
        temperature     divides the logits; 0 is greedy, with log-probs at temperature 1
        stop_ids        a response ends with the first of these it draws, which is part of it
        seed            names the noise; the same (seed, prompt index, sample index) draws alike
                        whatever shares the batch
        n_vocab         ids from here on belong to no token and are never drawn
        progress        a word for the progress bar on a terminal; None: no bar
        first           index that names the first prompt: a part of a batch, sampled elsewhere,
                        draws as in the whole one
        Raises ValueError for an empty prompt or one that leaves no room for a response, before any
        work; FloatingPointError for a model whose logits are NaN.
        """
        limits = max_new_tokens
        if not isinstance(limits, (list, tuple)):
            limits = [limits] * len(prompts)
        self.check(prompts, n, limits, temperature, n_vocab)
        groups, waiting = [], deque()
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            groups.append([Response(prompt) for _ in range(n)])
            limit = min(limit, self.max_len - len(prompt))
            for j, response in enumerate(groups[-1]):
                if limit > 0:
                    key = fold(seed, first + i, j)
                    waiting.append(Request(i, response, limit, key))
        self.stats = dict(NOTHING_DONE)
        if waiting:
            self.set_up(temperature, set(stop_ids), n_vocab)
            hidden = None if progress else True  # None: shown on a terminal
            bar = tqdm(
                total=len(waiting),
                desc=progress,
                disable=hidden,
                leave=False,
                unit="response",
            )
            with bar:
                self.serve(waiting, bar)
        return groups

    def check(self, prompts, n, limits, temperature, n_vocab):
        """Refuse, in one line and before any work, what could not be sampled."""
        V = self.model.config.vocab_size
        if n < 1 or not 0 <= temperature < math.inf:
            raise ValueError(
                f"n must be at least 1 and temperature at least 0, not {n} and {temperature}"
            )
        if len(limits) != len(prompts):
            raise ValueError(f"max_new_tokens: {len(limits)} numbers for {len(prompts)} prompts")
        if n_vocab is not None and not 1 <= n_vocab <= V:
            raise ValueError(f"n_vocab must be from 1 to the model's {V}, not {n_vocab}")
        for i, p in enumerate(prompts):
            if not p:
                raise ValueError(f"prompt {i} is empty: there is no state to sample from")
            if len(p) >= self.max_len:
                raise ValueError(
                    f"prompt {i} has {len(p)} tokens and leaves no room in rows of {self.max_len}: "
                    "drop it or raise max_len"
                )
            if min(p) < 0 or max(p) >= V:
                raise ValueError(f"prompt {i} has ids outside 0..{V - 1}")

    def all_caches(self):
        """Keys and values of every layer, each [B,S,K,E]."""
        return [kv for pair in self.cache for kv in pair]

    def set_up(self, temperature, stop_ids, n_vocab):
        """Memory, and what this call asks for, written where the step reads it."""
        self.allocate()
        V = self.model.config.vocab_size
        self.state.zero_()
        self.temperature.fill_(temperature or 1.0)
        self.greedy.fill_(temperature == 0)
        self.bias.zero_()
        self.bias[n_vocab or V :] = -math.inf
        self.stop_ids = stop_ids
        self.is_stop.zero_()
        for token in stop_ids:
            if 0 <= token < V:
                self.is_stop[token] = True

    def serve(self, waiting, bar):
        """Decode until none waits and no row is live."""
        begin, stats = time.perf_counter(), self.stats
        graphs_before = kernels.compiled_graphs() if self.compile else 0
        # slot -> the request it serves; slot -> the prompt whose KV it holds, also after its row
        # has ended
        serving, held = {}, {}
        rows_computed = 0
        turns_left = sum(request.limit for request in waiting)  # each turn draws a token at least
        backends = nullcontext()
        if self.capture:  # cuDNN's attention has drawn wrong tokens on some cards (pytorch#193893)
            backends = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with backends:
            if self.capture and self.graph is None:
                self.graph = self.record()
            while waiting or serving:
                turns_left -= 1
                if turns_left < 0:
                    raise RuntimeError(
                        "the sampler does not come to an end: rows neither draw tokens nor finish"
                    )
                start = time.perf_counter()
                if waiting and len(serving) < self.slots:
                    stats["prompt_tokens"] += self.refill(waiting, serving, held)
                if self.shrink and not waiting:
                    self.close_ranks(serving)
                now = time.perf_counter()
                stats["prefill_seconds"] += now - start

                state = self.state.tolist()
                tokens_left = []
                fullest = 0
                for slot in serving:
                    tokens_left.append(state[LIMIT][slot] - state[DRAWN][slot])
                    fullest = max(fullest, state[POSITION][slot] + 1)
                width = max(serving) + 1 if self.shrink else self.slots
                # never past the end of a row that another waits for
                end = min(tokens_left) if waiting else max(tokens_left)
                steps = min(self.sync, end)
                self.decode(width, fullest, steps)
                self.take_out(serving, bar)  # the host waits here
                stats["decode_seconds"] += time.perf_counter() - now
                stats["steps"] += steps
                rows_computed += width * steps
        stats["occupancy"] = stats["tokens"] / rows_computed
        stats["seconds"] = time.perf_counter() - begin
        if self.compile:
            compiled = kernels.compiled_graphs() - graphs_before
            first = 0 if self.warm else 1
            stats["recompiles"] = compiled - first
            self.warm = True

    def refill(self, waiting, serving, held):
        """Give free slots to waiting requests, in order, and fill their KV. Returns the prompt
        tokens that went through the model."""
        groups = {}  # index of a prompt -> its new slots
        for slot in range(self.slots):
            if waiting and slot not in serving:
                request = serving[slot] = waiting.popleft()
                groups.setdefault(request.prompt_index, []).append(slot)
        new = [slot for slots in groups.values() for slot in slots]
        state = []
        for slot in new:
            _, response, limit, key = serving[slot]
            last, position = response.prompt[-1], len(response.prompt) - 1
            state.append((last, position, 0, limit, key, 1))
        prompts = {}
        for i, slots in groups.items():
            request = serving[slots[0]]
            prompts[i] = request.response.prompt
        fresh = deque(groups)
        computed = 0
        # Requests go in order, so only the first prompt can have been prefilled before. Its KV is
        # still whole: slots are overwritten below, and rows are moved only when nobody waits
        sources = [slot for slot, i in held.items() if i == fresh[0]]
        if sources:
            i = fresh.popleft()
            end = len(prompts[i]) - 1
            for kv in self.all_caches():
                kv[groups[i], :end] = kv[sources[0], :end].clone()
        while fresh:
            batch, size = [], 0  # prompts of one prefill, its tokens
            while fresh:
                length = len(prompts[fresh[0]])
                if batch and size + length > PREFILL_TOKENS:
                    break
                batch.append(fresh.popleft())
                size += length - 1
            self.prefill([prompts[i] for i in batch], [groups[i] for i in batch])
            computed += size
        for slot in new:
            held[slot] = serving[slot].prompt_index
        self.state[:, new] = torch.tensor(state, device=self.device).T
        if self.capture:
            torch.cuda.synchronize()  # so that the seconds of prefill are its own
        return computed

    def close_ranks(self, serving):
        """Move the last live rows into the gaps before them, so that the next steps run on live
        rows alone."""
        for gap in range(len(serving)):
            if gap in serving:
                continue
            last = max(serving)
            _, position, drawn, *_ = self.state[:, last].tolist()
            for kv in self.all_caches():
                kv[gap, :position] = kv[last, :position]
            self.ids[gap, :drawn] = self.ids[last, :drawn]
            self.logprobs[gap, :drawn] = self.logprobs[last, :drawn]
            self.state[:, gap] = self.state[:, last]
            serving[gap] = serving.pop(last)

    def take_out(self, serving, bar):
        """Read finished rows and free their slots. FloatingPointError where the model has ceased to
        compute numbers."""
        state, stats = self.state.tolist(), self.stats
        done = [slot for slot in serving if not state[ALIVE][slot]]
        if done:
            longest = max(state[DRAWN][slot] for slot in done)
            ids, logprobs = (
                self.ids[done, :longest].tolist(),
                self.logprobs[done, :longest].tolist(),
            )
        for row, slot in enumerate(done):
            request = serving.pop(slot)
            response, drawn = request.response, state[DRAWN][slot]
            response.ids = ids[row][:drawn]
            response.logprobs = logprobs[row][:drawn]
            response.stopped = response.ids[-1] in self.stop_ids
            if math.isnan(response.logprobs[-1]):
                raise FloatingPointError(
                    f"a sample of prompt {request.prompt_index}: the model's logits are not numbers"
                )
            stats["tokens"] += drawn
        bar.update(len(done))
        bar.set_postfix_str(f"{len(serving)} live", refresh=False)
