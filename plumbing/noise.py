"""Noise without a generator: a number is a hash of what it is for, such as (seed, step, prompt), so
that nothing depends on what else was drawn before."""

import torch


def mix(x):
    """Scramble 32-bit integers (Python ints, or held in an int64 tensor): a bijection of xor-shifts
    and multiplications in which every input bit moves every output bit; no product exceeds 63
    bits."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def fold(*parts: int) -> int:
    """One 32-bit key for a tuple of integers such as (seed, step) or (seed, prompt, sample)."""
    key = 0
    for part in parts:
        key = key * 31 + 0x9E3779B9 + part
        key = mix(key & 0xFFFFFFFF)
    return key


def exponential(count, key, step):
    """Exp(1) noise, float32 [B,count], in (0, 17): row b holds the numbers named (key[b], step[b],
    0..count-1). -log(1 - u) of a uniform u."""
    item = torch.arange(count, device=key.device)
    row = mix(key ^ mix(step))
    bits = mix(item ^ row[:, None])
    # uniform, 32 bits: small ones, which win, are exact
    u = (bits.float() + 0.5) * 2.0**-32
    u = u.clamp(max=1 - 2.0**-24)  # rounded up to 1 it would bar even a sure token
    return -torch.log1p(-u)
