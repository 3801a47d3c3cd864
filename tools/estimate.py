"""What a GPU should reach, by counting: FLOPs of products, bytes of everything else, kernels of a
decode step.

    python -m tools.estimate       sizes that people train, on a card of an H200's rates
    python -m tools.estimate --bandwidth 3.0 --products 620

No figure of this file was measured. Rates are what large products and copies attain on such a card,
the counts are those of the code as it runs by default: bfloat16, products in cuBLAS, what stands
between them compiled. Whatever `tools.bench gpu` finds replaces it; until then it says what to be
surprised by.
"""

import argparse

from plumbing.shapes import SHAPES

SIZES = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")
PEAK = 989e12  # bfloat16 FLOP/s on paper of an H100 or H200, what MFU is a share of
FLASH = 0.55  # rate of FlashAttention-2's products over that of large ones, forward and backward
WEIGHTS = 0.85  # of a copy's bandwidth: reading weights for few rows
CACHE = 0.65  # and reading keys and values
KERNEL = 2e-6  # seconds that a kernel in a recorded graph takes beside its work
STEP_KERNELS = 12  # a block's kernels in a compiled decode step: 4 products, attention and its sum,
#                    2 writes to the cache, 2 norms, rotation, gate


def body(c):
    """Parameters of all blocks' matrices."""
    heads = 2 * c.n_heads + 2 * c.n_kv_heads  # of queries, keys, values and the output
    width = heads * c.head_dim + 3 * c.d_mlp
    return c.n_layers * c.d_model * width


def update(c, tokens, length, recompute, products, bandwidth):
    """Seconds of forward and backward of a micro-batch, and its MFU.

    Products: 2 FLOPs a weight and token forward, 4 backward; of the head 2 more, whose logits are
    computed twice.
    Traffic:  between products each value is read and written once forward and twice that backward;
              of logits 74 bytes each in all; of weight gradients 16 bytes each, of the
              unembedding's 8 for every 1,024 tokens.
    """
    again = 1 if recompute else 0
    blocks = body(c)
    head = c.vocab_size * c.d_model
    queries = c.n_heads * c.head_dim
    keys = c.n_kv_heads * c.head_dim

    # FLOPs; of attention a token's, forward, causal
    attention = 2 * c.n_layers * queries * length
    per_token = (6 + 2 * again) * blocks
    per_token += 8 * head
    per_token += (3.5 + again) * attention / FLASH
    seconds = tokens * per_token / products

    # bytes; between products a token's, forward
    values = 10 * c.d_model + 2 * queries + 3 * keys + 3 * c.d_mlp
    between = 2 * c.n_layers * values
    traffic = tokens * (3 + again) * between
    traffic += tokens * 74 * c.vocab_size
    traffic += 16 * (blocks + head)
    traffic += tokens / 1024 * 8 * head
    seconds += traffic / bandwidth

    useful = 6 * (blocks + head) + 3 * attention
    return seconds, tokens * useful / seconds / PEAK


def decode(c, batch, context, bandwidth):
    """Seconds of a decode step, and its share of the time that reading weights and keys and values
    takes."""
    weights = 2 * (body(c) + c.vocab_size * c.d_model)
    keys = 4 * c.n_layers * c.n_kv_heads * c.head_dim  # bytes of keys and values of a token
    cache = batch * context * keys
    logits = batch * c.vocab_size * 4 * 12  # written, scaled, maximum, exponentials, sums, the draw
    kernels = c.n_layers * STEP_KERNELS + 25

    seconds = weights / bandwidth / WEIGHTS
    seconds += cache / bandwidth / CACHE
    seconds += logits / bandwidth
    seconds += kernels * KERNEL
    reading = (weights + cache) / bandwidth
    return seconds, reading / seconds


def table(tokens, length, products, bandwidth):
    """A line for each size: updates with activations kept and recomputed, decoding by batch."""
    yield "estimated      update, s (MFU)            decode at batch 1 / 64 / 256:"
    yield "               kept         recomputed    share of the time of reading"
    for name in SIZES:
        c = SHAPES[name]
        updates, shares = [], []
        for recompute in (False, True):
            seconds, mfu = update(c, tokens, length, recompute, products, bandwidth)
            updates.append(f"{seconds:.2f} ({mfu:.2f})")
        for batch in (1, 64, 256):
            _, share = decode(c, batch, length, bandwidth)
            shares.append(f"{share:.2f}")
        kept, recomputed = updates
        yield f"{name:14} {kept:12} {recomputed:13} {' / '.join(shares)}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags = (
        ("--products", 650.0, "TFLOP/s of large products"),
        ("--bandwidth", 4.3, "TB/s of a large copy"),
        ("--tokens", 16384, "of a micro-batch"),
        ("--length", 2048, "of a row in it, and of a context"),
    )
    for flag, default, text in flags:
        text += f" (default {default})"
        p.add_argument(flag, type=type(default), default=default, help=text)
    args = p.parse_args()
    products = args.products * 1e12
    bandwidth = args.bandwidth * 1e12
    for line in table(args.tokens, args.length, products, bandwidth):
        print(line)


if __name__ == "__main__":
    main()
