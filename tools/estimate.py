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

from model import Config
from plumbing.shapes import SHAPES

PEAK = 989e12  # bfloat16 FLOP/s on paper of an H100 or H200, what MFU is a share of
FLASH = 0.55  # rate of FlashAttention-2's products over that of large ones, forward and backward
WEIGHTS, CACHE = 0.85, 0.65  # of a copy's bandwidth: reading weights for few rows, and keys
KERNEL = 2e-6  # seconds that a kernel in a recorded graph takes beside its work
STEP_KERNELS = 12  # a block's kernels in a compiled decode step: 4 products, attention and its sum,
#                    2 writes to the cache, 2 norms, rotation, gate


def body(c: Config) -> int:
    """Parameters of all blocks' matrices."""
    heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    return c.n_layers * c.d_model * (heads + 3 * c.d_mlp)


def update(c: Config, tokens: int, length: int, recompute: bool, products: float, bandwidth: float):
    """Seconds of forward and backward of a micro-batch, and its MFU.

    Products: 2 FLOPs a weight and token forward, 4 backward; of the head 2 more, whose logits are
    computed twice.
    Traffic:  between products each value is read and written once forward and twice that backward;
              of logits 74 bytes each in all; of weight gradients 16 bytes each, of the
              unembedding's 8 for every 1,024 tokens.
    """
    D, H, K, E, M = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_mlp
    again = 1 if recompute else 0
    head = c.vocab_size * D
    attention = 2 * c.n_layers * H * E * length  # FLOPs a token, forward, causal

    flops = tokens * ((6 + 2 * again) * body(c) + 8 * head)
    flash = tokens * (3.5 + again) * attention / FLASH
    between = 2 * c.n_layers * (10 * D + (2 * H + 3 * K) * E + 3 * M)  # bytes a token, forward
    traffic = tokens * (3 + again) * between + tokens * 74 * c.vocab_size
    traffic += 16 * (body(c) + head) + tokens / 1024 * 8 * head

    seconds = (flops + flash) / products + traffic / bandwidth
    useful = tokens * (6 * (body(c) + head) + 3 * attention)
    return seconds, useful / seconds / PEAK


def decode(c: Config, batch: int, context: int, bandwidth: float):
    """Seconds of a decode step, and its share of the time that reading weights and keys and values
    takes."""
    weights = 2 * (body(c) + c.vocab_size * c.d_model)
    cache = batch * context * 4 * c.n_layers * c.n_kv_heads * c.head_dim
    logits = batch * c.vocab_size * 4 * 12  # written, scaled, maximum, exponentials, sums, the draw
    kernels = c.n_layers * STEP_KERNELS + 25
    seconds = (weights / WEIGHTS + cache / CACHE + logits) / bandwidth + kernels * KERNEL
    return seconds, (weights + cache) / bandwidth / seconds


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--products", type=float, default=650.0, help="TFLOP/s of large products (default 650)"
    )
    p.add_argument(
        "--bandwidth", type=float, default=4.3, help="TB/s of a large copy (default 4.3)"
    )
    p.add_argument("--tokens", type=int, default=16384, help="of a micro-batch (default 16384)")
    p.add_argument(
        "--length", type=int, default=2048, help="of a row in it, and of a context (default 2048)"
    )
    args = p.parse_args()
    products, bandwidth = args.products * 1e12, args.bandwidth * 1e12
    print("estimated      update, s (MFU)            decode at batch 1 / 64 / 256:")
    print("               kept         recomputed    share of the time of reading")
    for name in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"):
        c = SHAPES[name]
        cells = []
        for recompute in (False, True):
            seconds, mfu = update(c, args.tokens, args.length, recompute, products, bandwidth)
            cells.append(f"{seconds:.2f} ({mfu:.2f})")
        shares = [decode(c, batch, args.length, bandwidth)[1] for batch in (1, 64, 256)]
        steps = " / ".join(f"{share:.2f}" for share in shares)
        print(f"{name:14} {cells[0]:12} {cells[1]:13} {steps}")


if __name__ == "__main__":
    main()
