"""Models of the Hugging Face hub: presets, config.json, and safetensors in and out.

    model = hub.load_model("qwen3-4b")       a preset, OWNER/NAME or a folder
    hub.save_model(model, "out/mine")        a folder that transformers reads

A folder of the hub is what comes in and what goes out: config.json, model.safetensors (or shards
and their index), the tokenizer's files.
"""

import json
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Config, Transformer
from plumbing import download
from plumbing.rows import one_line, read_json

# --------------------------------------------------------------------------------------------------
# names people type -> hub repositories

HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-0.6b-base": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b-base": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-8b-base": "Qwen/Qwen3-8B-Base",
    "qwen3-14b-base": "Qwen/Qwen3-14B-Base",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B",
    "qwen2.5-math-1.5b-instruct": "Qwen/Qwen2.5-Math-1.5B-Instruct",
    "qwen2.5-math-7b-instruct": "Qwen/Qwen2.5-Math-7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "octothinker-3b": "OctoThinker/OctoThinker-3B-Hybrid-Base",
    "octothinker-8b": "OctoThinker/OctoThinker-8B-Hybrid-Base",
    "deepseek-r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "mistral-nemo": "mistralai/Mistral-Nemo-Base-2407",
    "mistral-nemo-instruct": "mistralai/Mistral-Nemo-Instruct-2407",
}

FAMILIES = "llama", "qwen2", "qwen3", "mistral"  # model_type of config.json

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

# settings of the scaling of rotary angles in Llama 3
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
# settings that are supported at one value only: what it means to leave them out
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}


def read_config(raw):
    """The Config of a config.json dict, older (`rope_theta`, `rope_scaling`) or newer
    (`rope_parameters`) style.

    Raises ValueError, in one line that lists everything unsupported or out of range: a setting
    that changes the maths is never ignored.
    """
    if not isinstance(raw, dict):
        raise ValueError("config.json: not a JSON object")
    family = raw.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"config.json: model_type {family!r:.40} is not supported; this code reads {known}"
        )
    wrong = []
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        wrong.append(f"rope settings {rope!r:.40} are not an object, or per layer type")
        rope = {}
    integer = partial(_positive, wrong, raw, int)
    D = integer("hidden_size", most=65536)
    H = integer("num_attention_heads", most=1024)
    K = integer("num_key_value_heads", H, most=1024)
    E = integer("head_dim", 128 if family == "qwen3" else D // H, most=1024)
    if H % K:
        wrong.append(f"num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
    if E % 2:
        wrong.append(f"head_dim={E} is odd, rotary positions need pairs")
    config = Config(
        family,
        vocab_size=integer("vocab_size"),
        d_model=D,
        n_layers=integer("num_hidden_layers", most=1000),
        n_heads=H,
        n_kv_heads=K,
        head_dim=E,
        d_mlp=integer("intermediate_size", most=10**6),
        norm_eps=_positive(wrong, raw, float, "rms_norm_eps", 1e-6),
        rope_theta=_positive(wrong, raw | rope, float, "rope_theta", 10000.0),
        rope_scaling=_llama3_scaling(wrong, rope),
        tied=raw.get("tie_word_embeddings", False),
        max_len=integer("max_position_embeddings", 2048),
        raw=dict(raw),
    )
    if not isinstance(config.tied, bool):
        wrong.append(f"tie_word_embeddings={config.tied!r:.40} (want true or false)")
    for key, only in FIXED.items():
        for value in (raw.get(key), rope.get(key)):
            if value not in (None, only):
                wrong.append(f"{key}={value!r:.40} (supported: {only})")
    window = raw.get("sliding_window", 4096)  # what it means to leave it out
    if window is not None and (family == "mistral" or raw.get("use_sliding_window")):
        wrong.append(f"sliding_window={window!r:.40}")
    if wrong:
        raise ValueError("config.json: not supported: " + "; ".join(wrong))
    return config


def _positive(wrong, source, kind, key, default=None, most=10**9):
    """An int or float of `source` that is above 0; anything else is noted in `wrong`, and is 1."""
    value = source.get(key, default)
    if value is None and kind is int:
        value = default  # null is as good as left out
    if type(value) in (int, kind) and 0 < value <= most:
        return kind(value)
    wrong.append(f"{key}={value!r:.40} (want {kind.__name__}, above 0, at most {most})")
    return kind(1)


def _llama3_scaling(wrong, rope):
    """Settings of the scaling of rotary angles, None where they are not scaled."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        wrong.append(f"rope type {kind!r:.40} (supported: default, llama3)")
        return None
    scaling = {key: _positive(wrong, rope, float, key) for key in LLAMA3}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        wrong.append("low_freq_factor is not below high_freq_factor")
    return scaling


def hf_config(c, dtype=torch.float32):
    """A config.json dict that stock transformers reads; keys of the original file that we do
    not use are kept."""
    name = str(dtype).removeprefix("torch.")
    out = {
        "architectures": [c.family.title() + "ForCausalLM"],
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
    out.pop("layer_types", None)  # one for each layer there was, all of full attention
    return out


# --------------------------------------------------------------------------------------------------
# folders


class CheckpointError(ValueError):
    """Weights, or the state of a training run, are damaged, incomplete, or do not fit what they are
    loaded into. One line."""

    exit_code = 4


def hf_tensors(c):
    """Hugging Face name -> (our parameter, first row, rows) for every tensor of a checkpoint; rows
    are along dimension 0."""
    D, M, E = c.d_model, c.d_mlp, c.head_dim
    queries, keys = c.n_heads * E, c.n_kv_heads * E
    block = {
        "self_attn.q_proj": ("qkv", 0, queries),
        "self_attn.k_proj": ("qkv", queries, keys),
        "self_attn.v_proj": ("qkv", queries + keys, keys),
        "self_attn.o_proj": ("o", 0, D),
        "mlp.gate_proj": ("gate_up", 0, M),
        "mlp.up_proj": ("gate_up", M, M),
        "mlp.down_proj": ("down", 0, D),
        "input_layernorm": ("attn_norm", 0, D),
        "post_attention_layernorm": ("mlp_norm", 0, D),
    }
    if c.qk_norm:
        block["self_attn.q_norm"] = "q_norm", 0, E
        block["self_attn.k_norm"] = "k_norm", 0, E
    out = {"model.embed_tokens.weight": ("embed.weight", 0, c.vocab_size)}
    for i in range(c.n_layers):
        for theirs, (ours, row, rows) in block.items():
            theirs, ours = f"model.layers.{i}.{theirs}", f"blocks.{i}.{ours}"
            out[f"{theirs}.weight"] = f"{ours}.weight", row, rows
            if c.qkv_bias and ours.endswith("qkv"):
                out[f"{theirs}.bias"] = f"{ours}.bias", row, rows
    out["model.norm.weight"] = ("norm.weight", 0, D)
    if not c.tied:
        out["lm_head.weight"] = ("head.weight", 0, c.vocab_size)
    return out


def repository(name):
    """OWNER/NAME on the hub, of a preset or of such a name itself; FileNotFoundError, in one line,
    for what is neither."""
    repo = HUB.get(name.lower(), name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) and not name.startswith((".", "/")):
        return repo
    raise FileNotFoundError(
        f"{name}: no such folder, and no preset of that name. A model of the hub is named "
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
    try:
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                download.check(file, once=file.suffix == ".safetensors")
    except download.HubError as e:
        raise CheckpointError(str(e)) from None
    return folder


def _has_files(folder):
    """Whether a folder of the hub's cache has the files that no model can do without."""
    try:
        files = _shards(folder)
    except ValueError:
        # a damaged list of weights: no reason to ask the hub, `download.check` says what to do
        return True
    files += [folder / "config.json", folder / "tokenizer.json"]
    return all(file.exists() for file in files)


def _shards(folder):
    """The files that hold the weights, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    # names, not paths: an index from the internet must not reach outside its folder (links of the
    # hub's cache stay allowed)
    if bad := [name for name in names if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)]:
        raise CheckpointError(f"{index}: shard names must be plain file names, not {bad[0]!r:.80}")
    return [folder / name for name in names]


def load_model(name_or_folder, dtype=torch.float32, device="cpu") -> Transformer:
    """Build a Transformer from a folder, a preset name or a hub id.

    Headers are checked first: every name and shape must be the one the configuration implies, and
    one CheckpointError lists all that is wrong before any memory is taken. Then tensors are
    streamed, one at a time, into parameters already on `device`: the peak is the model plus its
    largest tensor. A tied checkpoint may carry an `lm_head.weight` if it equals the embedding.
    """
    folder = resolve(name_or_folder)
    config = read_config(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    found = _open_weights(folder, model)
    model = model.to(dtype).to_empty(device=device)
    params, wrong = dict(model.named_parameters()), []
    with torch.no_grad():
        for name, (ours, row, rows) in hf_tensors(config).items():
            tensor = found[name].get_tensor(name)
            # the extremes carry every NaN and Inf, and unlike isfinite() take no memory beside the
            # tensor
            if not all(x.isfinite() for x in tensor.aminmax()):
                wrong.append(f"{name} holds NaN or Inf")
            params[ours][row : row + rows].copy_(tensor)
            del tensor  # before the next is fetched
    if config.tied and "lm_head.weight" in found:
        names = "lm_head.weight", "model.embed_tokens.weight"
        head, embed = (found[name].get_tensor(name) for name in names)
        if not torch.equal(head, embed):
            wrong.append("tie_word_embeddings is true, lm_head.weight differs from the embedding")
    if wrong:
        raise CheckpointError(f"{folder}: {one_line(wrong[:20])}")
    model.folder = folder
    return model


def _open_weights(folder, model):
    """{name: open file that has the tensor}, for all tensors in the weight files of a folder.
    CheckpointError with all that does not fit the model, as far as headers tell."""
    files = _shards(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{folder}: missing weight files: {', '.join(missing):.4000}; {download.again(folder)}"
        )
    params, shapes = dict(model.named_parameters()), {}
    for name, (ours, _, rows) in hf_tensors(model.config).items():
        shapes[name] = [rows, *params[ours].shape[1:]]
    wanted, found, wrong = [*shapes], {}, []
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]  # tied ones may repeat it
    for path in files:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as e:
            why = one_line([str(e)])[:100]
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({why}); {download.again(path)}"
            ) from None
        for name in file.keys():
            header = file.get_slice(name)
            dtype, shape = header.get_dtype(), header.get_shape()
            if name in found:
                wrong.append(f"{name} stands in two shards")
            found[name] = file
            if dtype not in ("F32", "F16", "BF16"):
                wrong.append(f"{name} is {dtype}, want F32, F16 or BF16")
            if name not in shapes and not name.endswith("rotary_emb.inv_freq"):
                wrong.append(f"{name} is not part of a {model.config.family} model")
            if shape != shapes.get(name, shape):
                wrong.append(f"{name} is {shape}, want {shapes[name]}")
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {one_line(wrong[:20])}{more}"
        )
    return found


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
    pieces, shapes = {}, {}
    for name, (ours, row, rows) in hf_tensors(c).items():
        pieces[name] = params[ours][row : row + rows]
        shapes[name] = pieces[name].to("meta", dtype)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file(
            {name: pieces[name].to("cpu", dtype, copy=True) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    files = [*split.filename_to_tensors]
    if split.is_sharded:
        files.append("model.safetensors.index.json")
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / files[-1]).write_text(json.dumps(index, indent=1))
    # weights of an earlier save, split otherwise, would be read in place of these
    for old in folder.glob("model*.safetensors*"):
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
        if ours and old.name not in files:
            old.unlink()
    (folder / "config.json").write_text(json.dumps(hf_config(c, dtype), indent=2) + "\n")
    for name in TOKENIZER_FILES if tokenizer_from else ():
        source = Path(tokenizer_from) / name
        if source.is_file():
            with suppress(shutil.SameFileError):
                shutil.copyfile(source, folder / name)
    return folder
