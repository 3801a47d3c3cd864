"""Models of the Hugging Face hub: presets, config.json, and safetensors in and out.

    model = hub.load("qwen3-4b")             a preset, OWNER/NAME or a folder
    hub.save(model, "out/mine")              a folder that transformers reads

A folder of the hub is what comes in and what goes out: config.json, model.safetensors (or shards
and their index), the tokenizer's files.
"""

import difflib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Config, Transformer
from plumbing import download
from plumbing.rows import one_line, read_json

# --------------------------------------------------------------------------------------------------
# names people type -> hub repositories

HUB = {
    **{f"qwen3-{s}": f"Qwen/Qwen3-{s.upper()}" for s in ("0.6b", "1.7b", "4b", "8b", "14b")},
    **{
        f"qwen3-{s}-base": f"Qwen/Qwen3-{s.upper()}-Base"
        for s in ("0.6b", "1.7b", "4b", "8b", "14b")
    },
    **{f"qwen2.5-{s}": f"Qwen/Qwen2.5-{s.upper()}" for s in ("0.5b", "1.5b", "3b", "7b")},
    **{
        f"qwen2.5-{s}-instruct": f"Qwen/Qwen2.5-{s.upper()}-Instruct"
        for s in ("0.5b", "1.5b", "3b", "7b")
    },
    **{f"qwen2.5-math-{s}": f"Qwen/Qwen2.5-Math-{s.upper()}" for s in ("1.5b", "7b")},
    **{
        f"qwen2.5-math-{s}-instruct": f"Qwen/Qwen2.5-Math-{s.upper()}-Instruct"
        for s in ("1.5b", "7b")
    },
    **{f"llama-3.2-{s}": f"meta-llama/Llama-3.2-{s.upper()}" for s in ("1b", "3b")},
    **{
        f"llama-3.2-{s}-instruct": f"meta-llama/Llama-3.2-{s.upper()}-Instruct"
        for s in ("1b", "3b")
    },
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    **{
        f"octothinker-{s}": f"OctoThinker/OctoThinker-{s.upper()}-Hybrid-Base" for s in ("3b", "8b")
    },
    **{
        f"deepseek-r1-distill-qwen-{s}": f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{s.upper()}"
        for s in ("1.5b", "7b")
    },
    **{f"smollm2-{s}": f"HuggingFaceTB/SmolLM2-{s.upper()}" for s in ("135m", "360m", "1.7b")},
    **{
        f"smollm2-{s}-instruct": f"HuggingFaceTB/SmolLM2-{s.upper()}-Instruct"
        for s in ("135m", "360m", "1.7b")
    },
    "mistral-nemo": "mistralai/Mistral-Nemo-Base-2407",
    "mistral-nemo-instruct": "mistralai/Mistral-Nemo-Instruct-2407",
}


FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}


# copied byte for byte beside the weights, so that a saved folder is a whole model
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


# --------------------------------------------------------------------------------------------------
# config.json


def read_config(raw: dict) -> Config:
    """Read a config.json dict, older (`rope_theta`, `rope_scaling`) or newer
    (`rope_parameters`) style.

    Raises ValueError, in one line that lists everything unsupported or out of range: a setting
    that changes the maths is never ignored.
    """
    wrong = []

    def integer(key, default=None, most=10**7):
        value = raw.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            wrong.append(f"{key}={value!r:.40} (want a whole number from 1 to {most})")
            return 1
        return value

    def number(source, key, default):
        value = source.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            wrong.append(f"{key}={value!r:.40} (want a positive number)")
            return 1.0
        return float(value)

    if not isinstance(raw, dict):
        raise ValueError("config.json: not a JSON object")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {family!r:.40} is not supported; this code reads "
            f"{', '.join(FAMILIES)}"
        )
    D, H = integer("hidden_size", most=65536), integer("num_attention_heads", most=1024)
    K = integer("num_key_value_heads", H, most=1024)
    E = integer("head_dim", 128 if family == "qwen3" else max(D // H, 1), most=1024)
    if H % K:
        wrong.append(f"num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
    if E % 2:
        wrong.append(f"head_dim={E} is odd, rotary positions need pairs")

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        wrong.append(f"rope settings {rope!r:.40} are not an object")
        rope = {}
    if any(isinstance(v, dict) for v in rope.values()):
        wrong.append("rope settings per layer type")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        keys = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        scaling = {key: number(rope, key, None) for key in keys}
        if not wrong and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            wrong.append("low_freq_factor is not below high_freq_factor")
    elif kind != "default":
        wrong.append(f"rope type {kind!r:.40} (supported: default, llama3)")
    theta = number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)

    if raw.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act={raw['hidden_act']!r:.40} (supported: silu)")
    if raw.get("attention_bias"):
        wrong.append("attention_bias=true")
    if raw.get("mlp_bias"):
        wrong.append("mlp_bias=true")
    if any(r.get("partial_rotary_factor", 1) != 1 for r in (raw, rope)):
        wrong.append("partial_rotary_factor")
    if raw.get("quantization_config"):
        wrong.append("quantization_config (load an unquantised checkpoint)")
    # left out, mistral means a window of 4096
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and (family == "mistral" or raw.get("use_sliding_window")):
        wrong.append(f"sliding_window={window!r:.40}")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        wrong.append(f"tie_word_embeddings={tied!r:.40} (want true or false)")
    config = Config(
        family,
        integer("vocab_size"),
        D,
        integer("num_hidden_layers", most=1000),
        H,
        K,
        E,
        integer("intermediate_size", most=10**6),
        number(raw, "rms_norm_eps", 1e-6),
        theta,
        scaling,
        tied,
        integer("max_position_embeddings", 2048, most=10**8),
        dict(raw),
    )
    if wrong:
        raise ValueError("config.json: not supported: " + "; ".join(wrong))
    return config


def hf_config(c: Config, dtype: torch.dtype = torch.float32) -> dict:
    """A config.json dict that stock transformers reads; keys of the original file that we do
    not use are kept."""
    name = str(dtype).removeprefix("torch.")
    out = {
        "architectures": [FAMILIES[c.family]],
        "hidden_act": "silu",
        **c.raw,
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_mlp,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_len,
        "dtype" if "dtype" in c.raw else "torch_dtype": name,
    }
    # both generations of readers understand the older keys
    if "rope_parameters" not in c.raw:
        out["rope_theta"] = c.rope_theta
        if c.rope_scaling:
            out["rope_scaling"] = {"rope_type": "llama3", **c.rope_scaling}
    # left out, its readers assume a window of 4096
    if c.family == "mistral":
        out["sliding_window"] = None
    if isinstance(out.get("layer_types"), list):
        out["layer_types"] = ["full_attention"] * c.n_layers
    return out


# --------------------------------------------------------------------------------------------------
# folders


class CheckpointError(ValueError):
    """Weights, or the state of a training run, are damaged, incomplete, or do not fit what they are
    loaded into. One line."""

    exit_code = 4


def hf_tensors(c: Config) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name -> (our parameter, first row, rows) for every tensor of a checkpoint; rows
    are along dimension 0."""
    HE, KE = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    out = {"model.embed_tokens.weight": ("embed.weight", 0, c.vocab_size)}
    for i in range(c.n_layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            for proj, row, rows in (("q", 0, HE), ("k", HE, KE), ("v", HE + KE, KE)):
                out[f"{theirs}self_attn.{proj}_proj.{kind}"] = (f"{ours}qkv.{kind}", row, rows)
        if c.qk_norm:
            for n in "qk":
                out[f"{theirs}self_attn.{n}_norm.weight"] = (
                    f"{ours}{n}_norm.weight",
                    0,
                    c.head_dim,
                )
        out[f"{theirs}self_attn.o_proj.weight"] = (f"{ours}o.weight", 0, c.d_model)
        out[f"{theirs}mlp.gate_proj.weight"] = (f"{ours}gate_up.weight", 0, c.d_mlp)
        out[f"{theirs}mlp.up_proj.weight"] = (f"{ours}gate_up.weight", c.d_mlp, c.d_mlp)
        out[f"{theirs}mlp.down_proj.weight"] = (f"{ours}down.weight", 0, c.d_model)
        out[f"{theirs}input_layernorm.weight"] = (f"{ours}attn_norm.weight", 0, c.d_model)
        out[f"{theirs}post_attention_layernorm.weight"] = (f"{ours}mlp_norm.weight", 0, c.d_model)
    out["model.norm.weight"] = ("norm.weight", 0, c.d_model)
    if not c.tied:
        out["lm_head.weight"] = ("head.weight", 0, c.vocab_size)
    return out


def repository(name: str) -> str:
    """OWNER/NAME on the hub, of a preset or of such a name itself; FileNotFoundError, in one line,
    for what is neither."""
    repo = HUB.get(name.lower(), name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) and not name.startswith((".", "/")):
        return repo
    near = difflib.get_close_matches(name.lower(), HUB, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(
        f"{name}: no such folder, and no preset of that name; {guess}A model of the hub is named "
        f"OWNER/NAME, and must be of the families {', '.join(FAMILIES)}; presets: {', '.join(HUB)}"
    )


def resolve(name_or_folder, revision=None) -> Path:
    """Folder of a model: a path as it is (no network), a preset of HUB or an `owner/name`, from the
    hub's cache if that has it, else downloaded.

    revision: a branch, tag or commit of the hub's repository; `download.commit(folder)` says which
    commit came. Raises FileNotFoundError with one line: the repository, the cache and the ways out;
    CheckpointError for a damaged file in the cache. Weights are compared with their hash once, all
    other files every time.
    """
    path, name = Path(name_or_folder), str(name_or_folder)
    if path.is_dir():
        if revision:
            raise ValueError(f"{name} is a folder: only a model from the hub has revisions")
        return path
    repo = repository(name)
    patterns = ["config.json", "model*.safetensors*", *TOKENIZER_FILES]
    try:
        folder = download.snapshot(repo, revision, patterns, _has_files)
    except download.HubError as e:
        raise FileNotFoundError(f"{name}: {e}") from None
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    try:
        for file in files:
            download.check(file, once=file.suffix == ".safetensors")
    except download.HubError as e:
        raise CheckpointError(str(e)) from None
    return folder


def _has_files(folder: Path) -> bool:
    """Whether a folder of the hub's cache has the files that no model can do without."""
    try:
        files = _shard_files(folder)
    except ValueError:
        # a damaged list of weights: no reason to ask the hub, `download.check` says what to do
        return True
    return all(f.exists() for f in [folder / "config.json", folder / "tokenizer.json", *files])


def _shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    names = sorted({str(n) for n in names.values()}) if isinstance(names, dict) else []
    if not names:
        raise CheckpointError(f"{index}: no weight_map")
    # a name, not a path: an index from the internet must not reach outside its folder (links of the
    # hub's cache stay allowed)
    if bad := [n for n in names if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", n)]:
        raise CheckpointError(f"{index}: shard names must be plain file names, not {bad[0]!r:.80}")
    return [folder / n for n in names]


def _shards(folder: Path) -> list[Path]:
    files = _shard_files(folder)
    if missing := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(
            f"{folder}: missing weight files: {', '.join(missing):.4000}; {download.again(folder)}"
        )
    return files


def load_model(name_or_folder, dtype=torch.float32, device="cpu") -> Transformer:
    """Build a Transformer from a folder, a preset name or a hub id.

    Headers are checked first: every name and shape must be the one the configuration implies, and
    one CheckpointError lists all that is wrong before any memory is taken. Then tensors are
    streamed, one at a time, into parameters already on `device`: the peak is the model plus its
    largest tensor. A tied checkpoint may carry an `lm_head.weight` if it equals the embedding.
    """
    folder = resolve(name_or_folder)
    config = read_config(read_json(folder / "config.json"))
    wanted, found, wrong = hf_tensors(config), {}, []
    with torch.device("meta"):
        model = Transformer(config)
    params = dict(model.named_parameters())
    handles = []
    for path in _shards(folder):
        try:
            handles.append(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({one_line([str(e)]):.100}); "
                f"{download.again(path)}"
            ) from None
        for name in handles[-1].keys():
            view = handles[-1].get_slice(name)
            if name in found:
                wrong.append(f"{name} stands in two shards")
            found[name] = handles[-1]
            if view.get_dtype() not in ("F32", "F16", "BF16"):
                wrong.append(f"{name} is {view.get_dtype()}, want F32, F16 or BF16")
            if name in wanted or (name == "lm_head.weight" and config.tied):
                ours, _, rows = wanted.get(name, wanted["model.embed_tokens.weight"])
                shape = [rows, *params[ours].shape[1:]]
                if view.get_shape() != shape:
                    wrong.append(f"{name} is {view.get_shape()}, want {shape}")
            elif not name.endswith("rotary_emb.inv_freq"):
                wrong.append(f"{name} is not part of a {config.family} model")
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {one_line(wrong[:20])}{more}"
        )
    model = model.to(dtype).to_empty(device=device)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, (ours, row, rows) in wanted.items():
            tensor = found[name].get_tensor(name)
            # the extremes carry every NaN and Inf, and unlike isfinite() take no memory beside the
            # tensor
            if not all(x.isfinite() for x in tensor.aminmax()):
                wrong.append(f"{name} holds NaN or Inf")
            params[ours][row : row + rows].copy_(tensor)
            del tensor  # before the next is fetched
        if config.tied and "lm_head.weight" in found:
            head, embed = (
                found[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
            )
            if not torch.equal(head, embed):
                wrong.append(
                    "tie_word_embeddings is true but lm_head.weight differs from the embedding"
                )
    if wrong:
        raise CheckpointError(f"{folder}: " + "; ".join(wrong[:20]))
    model.folder = folder
    return model


@torch.no_grad()
def save_model(
    model: Transformer, folder, tokenizer_from=None, dtype=None, shard_bytes=4 << 30
) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors (or shards and their index), the
    tokenizer's files of `tokenizer_from`.

    dtype        of the written weights; None keeps the model's
    shard_bytes  at most this much in a file, and in memory at once beside the model
    """
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    params, dtype = dict(model.named_parameters()), dtype or model.embed.weight.dtype
    pieces = {
        name: params[ours][row : row + rows] for name, (ours, row, rows) in hf_tensors(c).items()
    }
    size = {name: piece.numel() * dtype.itemsize for name, piece in pieces.items()}
    shards = [[]]
    for name in pieces:
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    files = (
        [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        if n > 1
        else ["model.safetensors"]
    )
    for file, names in zip(files, shards, strict=True):
        save_file(
            {n: pieces[n].to(dtype=dtype, device="cpu", copy=True) for n in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        files.append("model.safetensors.index.json")
        (folder / files[-1]).write_text(json.dumps(index, indent=1))
    # weights of an earlier save, split otherwise, would be read in place of these
    for old in folder.glob("model*.safetensors*"):
        if (
            re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
            and old.name not in files
        ):
            old.unlink()
    (folder / "config.json").write_text(json.dumps(hf_config(c, dtype), indent=2) + "\n")
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    return folder
