"""Shapes of the presets, known without network or weights: for plans, benchmarks, random models.

They are those of the presets' config.json files; variants (-base, -instruct) share the shape of
their size.
"""

from dataclasses import replace

from model import Config
from plumbing.hub import HUB

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def qwen3(D, L, H, K, M, tied):
    return Config("qwen3", 151936, D, L, H, K, 128, M, 1e-6, 1e6, None, tied, 40960)


def qwen2(D, L, H, K, M, tied, V=151936, theta=1e6, max_len=32768):
    return Config("qwen2", V, D, L, H, K, D // H, M, 1e-6, theta, None, tied, max_len)


def llama(D, L, H, K, M, tied, factor):
    scaling = {"factor": factor, **LLAMA3}
    return Config("llama", 128256, D, L, H, K, D // H, M, 1e-5, 5e5, scaling, tied, 131072)


def smollm2(D, L, H, K, M, theta):
    return Config("llama", 49152, D, L, H, K, 64, M, 1e-5, theta, None, True, 8192)


SHAPES = {
    "qwen3-0.6b": qwen3(1024, 28, 16, 8, 3072, True),
    "qwen3-1.7b": qwen3(2048, 28, 16, 8, 6144, True),
    "qwen3-4b": qwen3(2560, 36, 32, 8, 9728, True),
    "qwen3-8b": qwen3(4096, 36, 32, 8, 12288, False),
    "qwen3-14b": qwen3(5120, 40, 40, 8, 17408, False),
    "qwen2.5-0.5b": qwen2(896, 24, 14, 2, 4864, True),
    "qwen2.5-1.5b": qwen2(1536, 28, 12, 2, 8960, True),
    "qwen2.5-3b": qwen2(2048, 36, 16, 2, 11008, True),
    "qwen2.5-7b": qwen2(3584, 28, 28, 4, 18944, False, 152064, max_len=131072),
    "qwen2.5-math-1.5b": qwen2(1536, 28, 12, 2, 8960, True, theta=1e4, max_len=4096),
    "qwen2.5-math-7b": qwen2(3584, 28, 28, 4, 18944, False, 152064, theta=1e4, max_len=4096),
    "deepseek-r1-distill-qwen-1.5b": qwen2(1536, 28, 12, 2, 8960, False, theta=1e4, max_len=131072),
    "deepseek-r1-distill-qwen-7b": qwen2(
        3584, 28, 28, 4, 18944, False, 152064, theta=1e4, max_len=131072
    ),
    "llama-3.2-1b": llama(2048, 16, 32, 8, 8192, True, 32.0),
    "llama-3.2-3b": llama(3072, 28, 24, 8, 8192, True, 32.0),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 14336, False, 8.0),
    "octothinker-3b": llama(3072, 28, 24, 8, 8192, True, 32.0),
    "octothinker-8b": llama(4096, 32, 32, 8, 14336, False, 8.0),
    "smollm2-135m": smollm2(576, 30, 9, 3, 1536, 1e5),
    "smollm2-360m": smollm2(960, 32, 15, 5, 2560, 1e5),
    "smollm2-1.7b": smollm2(2048, 24, 32, 32, 8192, 1.3e5),
    "mistral-nemo": Config(
        "mistral", 131072, 5120, 40, 32, 8, 128, 14336, 1e-5, 1e6, None, False, 131072
    ),
}


def preset_config(name: str) -> Config:
    """The true shape of a preset or its hub id; ValueError naming those there are."""
    preset = name.lower()
    for known, repository in HUB.items():
        if preset == repository.lower():
            preset = known
    size = preset.removesuffix("-base").removesuffix("-instruct")
    if size not in SHAPES:
        raise ValueError(f"{name}: no such shape; there are {', '.join(SHAPES)}")
    return replace(SHAPES[size])  # a copy: callers change its depth
