"""Sampling with a static KV cache: slots, prompts prefilled once a group, a slot refilled when its row ends.

One decode step takes every slot from its last token to its next one, on the device, in place:

    tok [B] -> blocks (KV written at pos, attention over 0..pos) -> logits fp32 -> token and its log-prob -> tok, pos, n, alive

The host looks at `alive` every `sync` steps only, takes finished rows out and puts waiting ones in. A prompt's KV is computed once
and copied to the slots of its group; its last token is then decoded like any other, so there is one place where tokens are drawn.

The sampler reads the trained parameters themselves: an optimizer step is seen by the next `generate` and there is nothing to sync.

Noise is a hash of (seed, prompt index, sample index, step, token), not a stream of a generator: a sample does not depend on what
else is in the batch, on the number of slots, or on when its slot was free.
"""
import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Transformer, causal


@dataclass
class Sample:
    """One response: token ids as drawn (stop token included), log-probs under the policy that drew them, whether it stopped by itself."""
    ids: list[int]
    logprobs: list[float]
    stopped: bool


def mix(x):
    """Scramble 32-bit integers (Python ints, or held in an int64 tensor): a bijection of xor-shifts and multiplications in which every
    input bit moves every output bit; no product exceeds 63 bits."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def fold(*parts: int) -> int:
    """One 32-bit key for a tuple of integers such as (seed, step) or (seed, prompt, sample)."""
    key = 0
    for part in parts: key = mix((key * 31 + 0x9E3779B9 + part) & 0xFFFFFFFF)
    return key


def race(logits, key, step):
    """Draw a token from softmax(logits) by an exponential race: argmin_v e_v / p_v with e_v ~ Exp(1) is distributed as p.

    logits [B,V] float32; key [B] and step [B] are integers that name the draw. No sort, no cumulative sum, one pass.
    """
    vocab = mix(torch.arange(logits.shape[-1], device=logits.device))
    u = (mix(vocab ^ mix(key ^ mix(step))[:, None]).float() + 0.5) * 2.0**-32      # uniform, 32 bits
    return (logits - (-torch.log1p(-u)).log()).argmax(-1)                          # argmin e / p = argmax log p - log e


class Sampler:
    """Generate from a model with a fixed number of slots.

    model    a Transformer, read in place
    slots    rows decoded together, B
    max_len  tokens a row can hold, prompt and response
    compile  compile the decode step as one graph
    sync     decode steps between two looks of the host at the rows

    KV memory is 2 * L * slots * max_len * K * E elements, taken by `start` (or the first `generate`) and given back by `stop`.
    """

    def __init__(self, model: Transformer, slots=64, max_len=2048, compile=False, sync=16):
        if slots < 1 or max_len < 2: raise ValueError(f"a sampler needs at least 1 slot and 2 tokens a row, not {slots} and {max_len}")
        self.model, self.slots, self.max_len, self.sync, self.cache = model, slots, max_len, sync, None
        self.compile, self.run_step = compile, torch.compile(self.step, fullgraph=True) if compile else self.step

    def start(self):
        """Take the memory of the KV cache and of the per-row state; harmless when already taken."""
        if self.cache is not None: return
        c, B, S, device = self.model.config, self.slots, self.max_len, self.model.unembedding.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.model.unembedding.dtype
        # one tensor a layer: written through an index, a stacked cache would be copied whole at every step by a compiled graph
        self.cache = [torch.zeros(2, B, S, c.n_kv_heads, c.head_dim, dtype=dtype, device=device).unbind() for _ in range(c.n_layers)]
        self.rows = torch.arange(B, device=device)
        # last token, its position, tokens drawn, tokens allowed, key of the noise
        self.tok, self.pos, self.n, self.limit, self.key = (torch.zeros(B, dtype=torch.long, device=device) for _ in range(5))
        self.alive = torch.zeros(B, dtype=torch.bool, device=device)
        self.ids = torch.zeros(B, S, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B, S, device=device)
        self.temperature = torch.ones((), device=device)

    def stop(self):
        """Give the memory back, so that training can have it."""
        self.cache = self.ids = self.logprobs = None

    def step(self, live: int, stop_ids: torch.Tensor, n_vocab: int, greedy: bool):
        """One token for every slot. live: how much of each row may be attended to, an upper bound of pos + 1."""
        rows, pos = self.rows, self.pos
        # row b attends to its tokens 0..pos[b]
        mask = (torch.arange(live, device=pos.device) <= pos[:, None])[:, None, None]                       # [B,1,1,live]

        def attend(layer, q, k, v):   # q [B,H,E], k and v [B,K,E]
            ks, vs = self.cache[layer - 1]
            ks[rows, pos], vs[rows, pos] = k.to(ks.dtype), v.to(vs.dtype)
            ks, vs = (t[:, :live].transpose(1, 2) for t in (ks, vs))                                        # [B,K,live,E]
            return F.scaled_dot_product_attention(q[:, :, None].to(ks.dtype), ks, vs, mask, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]

        h = self.model(self.tok, pos=pos, attend=attend)
        z = self.model.unembed(h)[:, :n_vocab] / self.temperature                                           # [B,V] float32
        token = z.argmax(-1) if greedy else race(z, self.key, self.n)
        logprob = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)

        alive = self.alive
        at = self.n.clamp(max=self.max_len - 1)
        self.ids[rows, at] = torch.where(alive, token, self.ids[rows, at])
        self.logprobs[rows, at] = torch.where(alive, logprob, self.logprobs[rows, at])
        self.n += alive
        self.tok.copy_(torch.where(alive, token, self.tok))
        alive &= (self.n < self.limit) & ~torch.isin(token, stop_ids)
        self.pos.copy_(torch.where(alive, pos + 1, 0))                                                      # a dead row looks at one token

    def prefill(self, prompts, slots):
        """Fill the KV of prompts[i][:-1] into the slots slots[i] of its group: one forward for all of them, right-padded."""
        device, T = self.model.unembedding.device, max(len(p) for p in prompts) - 1
        if T == 0: return
        ids = torch.zeros(len(prompts), T, dtype=torch.long)
        for i, p in enumerate(prompts): ids[i, :len(p) - 1] = torch.tensor(p[:-1])
        source = torch.tensor([i for i, group in enumerate(slots) for _ in group], device=device)
        target = torch.tensor([s for group in slots for s in group], device=device)

        def attend(layer, q, k, v):   # what padding leaves in a row is overwritten before that row can look at it
            for cache, new in zip(self.cache[layer - 1], (k, v), strict=True): cache[target, :T] = new.to(cache.dtype)[source]
            return causal(layer, q, k, v)

        self.model(ids.to(device), attend=attend)

    @torch.no_grad()
    def generate(self, prompts, n=1, max_new_tokens=256, temperature=1.0, stop_ids=(), seed=0, n_vocab=None, progress=None):
        """Sample n responses to each prompt.

        prompts         lists of token ids, none empty, each shorter than max_len
        max_new_tokens  per response; a row also ends when its max_len is full
        temperature     divides the logits; 0 is greedy, with log-probs at temperature 1
        stop_ids        a response ends with the first of these it draws, which is part of it
        seed            names the noise; the same (seed, prompt index, sample index) draws alike whatever shares the batch
        n_vocab         ids from here on belong to no token and are never drawn
        progress        a word for the progress bar on a terminal; None: no bar
        returns         [[Sample] * n for each prompt]
        Raises ValueError for an empty prompt or one that leaves no room for a response, before any work.
        """
        self.check(prompts, n, temperature)
        if max_new_tokens < 1: return [[Sample([], [], False) for _ in range(n)] for _ in prompts]
        self.start()
        self.alive.zero_()
        self.temperature.fill_(temperature or 1.0)
        stops = torch.tensor(sorted(stop_ids) or [-1], device=self.tok.device)
        out = [[None] * n for _ in prompts]
        waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
        owner, longest, tokens = {}, 0, 0     # slot -> (prompt, sample) it serves; tokens in the fullest row; tokens drawn
        bar, start = tqdm(total=len(waiting), desc=progress, disable=None if progress else True, leave=False, unit="response"), time.time()
        while waiting or owner:
            longest = max(longest, self.refill(prompts, waiting, owner, max_new_tokens, seed))
            for _ in range(self.sync):
                longest += 1
                # eager attention reads the live columns only, rounded up; a compiled step has one shape
                live = self.max_len if self.compile else min(-(-longest // 64) * 64, self.max_len)
                self.run_step(live, stops, n_vocab or self.model.config.vocab_size, temperature == 0)
            alive, drawn, pos = torch.stack((self.alive, self.n, self.pos)).tolist()     # the only look at the device
            longest = max(pos)
            done = [s for s in owner if not alive[s]]
            if done:
                for s, ids, logprobs in zip(done, self.ids[done].tolist(), self.logprobs[done].tolist(), strict=True):
                    i, j = owner.pop(s)
                    out[i][j] = Sample(ids[:drawn[s]], logprobs[:drawn[s]], ids[drawn[s] - 1] in stop_ids)
                    tokens += drawn[s]
                bar.update(len(done))
                bar.set_postfix_str(f"{tokens / (time.time() - start):,.0f} tok/s, {len(owner)} live")
        bar.close()
        return out

    def check(self, prompts, n, temperature):
        """Refuse, in one line and before any work, what could not be sampled."""
        V = self.model.config.vocab_size
        if n < 1 or temperature < 0: raise ValueError(f"n must be at least 1 and temperature at least 0, not {n} and {temperature}")
        for i, p in enumerate(prompts):
            if not p: raise ValueError(f"prompt {i} is empty: there is no state to sample from")
            if len(p) >= self.max_len:
                raise ValueError(f"prompt {i} has {len(p)} tokens and leaves no room in rows of {self.max_len}: drop it or raise max_len")
            if min(p) < 0 or max(p) >= V: raise ValueError(f"prompt {i} has ids outside 0..{V - 1}")

    def refill(self, prompts, waiting, owner, max_new_tokens, seed):
        """Give free slots to waiting samples, in order; samples of one prompt that are seated together share its prefill.

        returns the tokens in the fullest of the new rows
        """
        free, longest = [s for s in range(self.slots) if s not in owner], 0
        while free and waiting:
            groups, width = {}, 0             # prompt -> its slots; prompts are prefilled together up to a token budget
            while free and waiting:
                i, j = waiting[0]
                width = max(width, len(prompts[i]))
                if i not in groups and groups and (len(groups) + 1) * width > 16384: break
                waiting.popleft()
                groups.setdefault(i, []).append(free.pop())
                owner[groups[i][-1]] = i, j
            self.prefill([prompts[i] for i in groups], list(groups.values()))
            new = [s for slots in groups.values() for s in slots]
            state = [(prompts[i][-1], len(prompts[i]) - 1, 0, min(max_new_tokens, self.max_len - len(prompts[i])), fold(seed, i, j))
                     for i, j in (owner[s] for s in new)]
            self.tok[new], self.pos[new], self.n[new], self.limit[new], self.key[new] = torch.tensor(state, device=self.tok.device).T
            self.alive[new] = True
            longest = max(longest, width - 1)
        return longest
