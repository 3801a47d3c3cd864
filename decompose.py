"""Every internal policy of a model, measured: what each state of the residual
stream would say if it were unembedded.

    internal layer policy     pi^l      = softmax(H^l E_u^T / T)    no norm
    internal modular policy   pi^l_attn = softmax(A^l E_u^T / T)
                              pi^l_mlp  = softmax(F^l E_u^T / T)
    the model's own policy    pi^L      = softmax(norm(H^L) E_u^T / T)

    python decompose.py --model qwen3-4b      sample answers, analyse them
    python decompose.py --model qwen3-0.6b --text "The capital of France is"
    python decompose.py --model out/run --steps 30,300 \\
        --samples-file out/run/samples.jsonl  one model through its training
    python decompose.py --model qwen3-4b --compare out/run/step_000300
                                              two models on the same tokens

The core is `measure`: blocks run one at a time, each state is unembedded once,
a chunk of rows at a time, reduced in float32 to a few numbers a token, and
dropped. Kept logits would be 67 MB a token for 36 layers; this needs one block
and one chunk. Entropies are in nats. Without a norm the scale of a state acts
as an inverse temperature: read an entropy beside its RMS.

Definitions: "Bottom-up Policy Optimization", arXiv 2512.19673. Component names
are those of TransformerLens.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from grpo import token_logprobs
from model import Transformer, causal, project
from plumbing import figures, metrics
from plumbing.cli import Parser, given, guarded, natural, pick_device, positive, whole
from plumbing.data import DataError, load_problems
from plumbing.hub import load_model, resolve
from plumbing.rows import read_json, read_rows
from plumbing.runs import checkpoints, folder_name, internal_steps, label
from plumbing.tokenizer import SYSTEM, load_tokenizer
from rollout import Sampler

# The order of the stream. attn_in and mlp_in are the normed states that a block's sub-layers read:
# the paper's entropy changes start there.
BLOCK = ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
COMPONENTS = ("embed", *BLOCK, "final")
NORMS = ("none", "final", "rms")
DTYPES = ("float32", "bfloat16", "float16")
NOTHING = "no response tokens to analyse: every sequence ends where its prompt does"


# ----------------------------------------------------------------------------------------------
# one state: its policy, in a few numbers


def states(model, ids, pick=lambda h: h):
    """Yield (component, layer, state, write, base) along the stream of ids [B,T]; each [M,D], the
    rows that pick([B,T,D]) chooses.

    write is what was added to base: the attention's, the MLP's, at resid_post both (A^l + F^l on
    H^{l-1}); None where nothing was. Layers count from 1; `embed` is layer 0, and `final` =
    norm(H^L), which the model's own policy unembeds, is layer L."""
    for layer, *stream in model.stream(ids):
        block = model.blocks[layer - 1]
        pre, attn, mid, mlp, post = map(pick, stream)
        if layer == 1:
            yield "embed", 0, pre, None, None
        yield "attn_in", layer, block.attn_norm(pre), None, None
        yield "attn_out", layer, attn, attn, pre
        yield "resid_mid", layer, mid, None, None
        yield "mlp_in", layer, block.mlp_norm(mid), None, None
        yield "mlp_out", layer, mlp, mlp, mid
        yield "resid_post", layer, post, attn.float() + mlp.float(), pre
    yield "final", layer, model.norm(post), None, None


def reduce_logits(z, token, top_k=5, n_vocab=None):
    """What is kept of logits z [M,V] (float32, overwritten: two buffers of this size are all it
    takes) with actual tokens [M].

    entropy = -sum p ln p, nats; logprob and rank of the token, rank 1 = most likely; lse = ln sum
    exp z; top_ids, top_probs [M,top_k]; unused = probability of the rows n_vocab .. V-1, which no
    token of the tokenizer uses. Each [M] unless said otherwise."""
    own = z.gather(-1, token[:, None])
    e = torch.empty_like(z)
    # counted in float32, exact to 2^24: on a CPU ten times as fast as of bools
    rank = torch.gt(z, own, out=e).sum(-1).int() + 1
    top, top_ids = z.topk(max(top_k, 1), -1)
    largest = top[:, :1].clone()
    z -= largest  # the largest exponent is 0: nothing overflows
    torch.exp(z, out=e)
    total = e.sum(-1, keepdim=True)
    unused = e[:, n_vocab or z.shape[-1] :].sum(-1)
    e *= z
    entropy = total.log() - e.sum(-1, keepdim=True) / total  # ln sum e^z - sum p z
    lse = largest + total.log()
    return {
        "entropy": entropy[:, 0].clamp_min(0),
        "logprob": (own - lse)[:, 0],
        "rank": rank,
        "lse": lse[:, 0],
        "unused": unused / total[:, 0],
        "top_ids": top_ids[:, :top_k].int(),
        "top_probs": (top - lse).exp()[:, :top_k],
    }


def mean_row(z, E):
    """Expected row of the unembedding E [V,D] under p = softmax(z [M,V]): sum_v p_v E_v, float64
    [M,D].

    With it KL(p || q) = lse_q - sum_v p_v z^q_v - H(p) is one dot product for any state h, because
    sum_v p_v (h . E_v) is h . sum_v p_v E_v: no other state has to meet the final logits, and none
    is unembedded a second time."""
    total = 0.0
    # a bfloat16 E is widened a piece at a time
    for p_v, E_v in zip(z.softmax(-1).split(16384, -1), E.split(16384), strict=True):
        total = total + (p_v @ E_v.float()).double()
    return total


@dataclass
class Lens:
    """Turns states [M,D] into numbers: those of `reduce_logits`, all of logits / T, and kl [M] =
    KL(pi^L || this policy) in nats, NaN until the state `final` has been through."""

    model: Transformer
    # before the unembedding: "none" (the paper), "final" (the model's last norm, the logit lens),
    # "rms" (x / rms(x), no gain); not of attn_in, mlp_in and final, which carry one by definition
    norm: str = "none"
    temperature: float = 1.0
    chunk: int = 128  # rows at once; two float32 [chunk,V] are the peak, 0.16 GB at V = 151,936
    top_k: int = 5
    n_vocab: int | None = None  # token ids in use; the probability of rows above is `unused`
    own: tuple = (torch.nan, torch.nan)  # of pi^L: entropy [M], mean row [M,D]

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"no norm {self.norm!r}; there are {', '.join(NORMS)}")
        if not (self.temperature > 0 and self.chunk >= 1):
            raise ValueError("temperature must be above 0 and chunk at least 1")
        self.unembedding = self.model.unembedding
        if not self.unembedding.is_cuda:  # once: a CPU's product would convert it every time
            self.unembedding = self.unembedding.float()

    def normed(self, component, h):
        """What the unembedding sees of a state."""
        if self.norm == "none" or component in ("attn_in", "mlp_in", "final"):
            return h
        if self.norm == "final":
            return self.model.norm(h)
        return F.rms_norm(h.float(), h.shape[-1:], eps=self.model.config.norm_eps).to(h.dtype)

    def __call__(self, component, h, token):
        """The numbers of a state, a dict of tensors [M] and [M,top_k]."""
        h = self.normed(component, h)
        E = self.unembedding
        parts = []
        for rows, tokens in zip(h.split(self.chunk), token.split(self.chunk), strict=True):
            z = project(rows, E).div_(self.temperature)  # [chunk,V]
            row = mean_row(z, E) if component == "final" else None
            parts.append(reduce_logits(z, tokens, self.top_k, self.n_vocab))
            del z  # before the next chunk takes its memory
            if component == "final":
                parts[-1]["mean_row"] = row
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if component == "final":
            self.own = out["entropy"], out.pop("mean_row")
        entropy, row = self.own
        mean_logit = (h.double() * row).sum(-1) / self.temperature  # under pi^L
        out["kl"] = (out["lse"] - mean_logit - entropy).clamp_min(0).float()
        return out


# ----------------------------------------------------------------------------------------------
# every state: the table, a dict of numpy arrays, S states in the order of the stream by M tokens
#
#   component, layer [S]    see `states`
#   example, position, token [M]    position counts from the first response token
#   entropy, logprob, rank, lse, unused, kl [S,M], top_ids, top_probs [S,M,top_k]    see `Lens`
#   rms [S,M]        root mean square of the state, before any lens norm
#   cos_resid [S,M]  cosine of A^l, F^l, and at resid_post A^l + F^l, with the residual they are
#                    added to; elsewhere NaN
#   cos_final [S,M]  cosine with the un-normed H^L; NaN where `final` was not measured, as is kl
#   meta             dict: vocab_size, n_layers, n_vocab, norm, temperature, dtype


def response_tokens(model, ids, prompt_len, position=None):
    """Check `measure`'s input; return ids and the positions in them to analyse, as tensors."""
    ids = torch.as_tensor(ids)
    V = model.config.vocab_size
    if position is None:
        position = range(prompt_len, len(ids))
    if not len(position):
        raise DataError(NOTHING)
    if prompt_len < 1:
        raise ValueError("prompt_len must be at least 1: no state produced the first token")
    if ids.min() < 0 or ids.max() >= V:
        raise DataError(
            f"token ids run from {ids.min()} to {ids.max()}, the model has rows 0 to {V - 1}: "
            "are they its own?"
        )
    device = model.unembedding.device
    return ids.to(device), torch.tensor(position, device=device)


@torch.no_grad()
def measure(model, ids, prompt_len, components=COMPONENTS, layers=None, position=None, **options):
    """Unembed every state of the residual stream at the response tokens and reduce it to a few
    numbers: the table above.

    ids         token ids [T] of a prompt and a response
    prompt_len  where the response starts; response token t was produced by the states at position
                t - 1
    components  which of COMPONENTS to unembed; layers: in which blocks (1-based), None is all.
                `embed` and `final` belong to no block
    position    [M] analyse only these response tokens, counted in ids
    options     norm, temperature, chunk, top_k, n_vocab: see `Lens`

    Raises ValueError on unknown components, layers or norms, on ids out of range, and when there is
    no response token."""
    lens = Lens(model, **options)
    L = model.config.n_layers
    if not components:
        raise ValueError("nothing to measure: no components were asked for")
    if bad := set(components) - set(COMPONENTS):
        raise ValueError(f"no component {min(bad)}; there are {', '.join(COMPONENTS)}")
    if bad := set(layers or ()) - set(range(1, L + 1)):
        raise ValueError(f"no layer {min(bad)}; the model has 1 to {L}")
    ids, position = response_tokens(model, ids, prompt_len, position)
    token = ids[position]

    def pick(h):
        return h[0, position - 1]

    nan = torch.full(token.shape, torch.nan)
    own = None
    H_L = None
    if "final" in components:
        H_L = pick(model(ids[None]))  # the end comes first: cosines and KL are taken against it
        own = lens("final", model.norm(H_L), token)
    columns = defaultdict(list)
    for component, layer, h, write, base in states(model, ids[None], pick):
        if component not in components or (layers and component in BLOCK and layer not in layers):
            continue
        column = own if component == "final" else lens(component, h, token)
        column["rms"] = h.float().square().mean(-1).sqrt()
        column["cos_resid"] = nan if write is None else cosine(write, base)
        column["cos_final"] = nan if H_L is None else cosine(h, H_L)
        columns["component"].append(component)
        columns["layer"].append(layer)
        for name, value in column.items():
            columns[name].append(value.cpu().numpy())
    return {
        **{name: np.stack(values) for name, values in columns.items()},
        "example": np.zeros(len(token), int),
        "position": (position - prompt_len).cpu().numpy(),
        "token": token.cpu().numpy(),
        "meta": meta(lens),
    }


def cosine(a, b):
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def meta(lens):
    """What a table's numbers depend on."""
    c = lens.model.config
    return {
        "vocab_size": c.vocab_size,
        "n_layers": c.n_layers,
        "n_vocab": lens.n_vocab or c.vocab_size,
        "norm": lens.norm,
        "temperature": lens.temperature,
        "dtype": str(lens.model.unembedding.dtype).removeprefix("torch."),
    }


def measure_all(model, sequences, max_tokens=None, seed=0, progress=None, **options):
    """`measure` of each of the sequences [(ids, prompt_len), ...], as one table in their order.

    max_tokens  analyse at most so many response tokens: runs of 16 neighbours drawn at random by
                seed, so that means have no preference for early tokens and a heat-map still reads
    progress    label of a progress bar; None shows none
    """
    runs = []
    drawn = []
    for i, (ids, prompt_len) in enumerate(sequences):
        runs += [(i, s, min(s + 16, len(ids))) for s in range(prompt_len, len(ids), 16)]
    for k in np.random.default_rng(seed).permutation(len(runs))[:max_tokens]:
        i, start, end = runs[k]
        drawn += [(i, t) for t in range(start, end)]
    positions = defaultdict(list)
    for i, t in sorted(drawn[:max_tokens]):
        positions[i].append(t)
    if not drawn:
        raise DataError(NOTHING)
    tables = []
    for i, position in tqdm(positions.items(), progress, disable=None if progress else True):
        tables.append(measure(model, *sequences[i], position=position, **options))
        tables[-1]["example"] += i
    out = dict(tables[0])
    for name in out.keys() - {"component", "layer", "meta"}:
        axis = min(out[name].ndim - 1, 1)  # of tokens in [M], [S,M] and [S,M,k]
        out[name] = np.concatenate([table[name] for table in tables], axis)
    return out


# ----------------------------------------------------------------------------------------------
# the paper's quantities


def pick(table, component, value="entropy"):
    """A column of one component: [layers, M] in order of layers, one row for embed and final.
    ValueError when it was not measured."""
    rows = table["component"] == component
    if not rows.any():
        raise ValueError(f"the table has no {component}; measure it too (components=)")
    return table[value][rows]


CHANGES = {
    "dH_attn": ("attn_out", "attn_in"),
    "dH_mlp": ("mlp_out", "mlp_in"),
    "dH_layer": ("resid_post", "resid_pre"),
    "dH_attn_raw": ("attn_out", "resid_pre"),
    "dH_mlp_raw": ("mlp_out", "resid_mid"),
    "dH_attn_step": ("resid_mid", "resid_pre"),
    "dH_mlp_step": ("resid_post", "resid_mid"),
}


def entropy_change(table):
    """Entropy changes of each block, nats: a dict of arrays [L,M], and H [L+1,M], the entropy of
    H^0 .. H^L, all un-normed.

    dH_attn  = H(A^l) - H(attn_norm(H^{l-1}))       the paper's two, as its code has them: each
    dH_mlp   = H(F^l) - H(mlp_norm(resid_mid))      write against what its own sub-layer read
    dH_layer = H(H^l) - H(H^{l-1})                  un-normed on both sides
    dH_attn_raw, dH_mlp_raw     the write against the residual it is added to:
                                H(A^l) - H(H^{l-1}), H(F^l) - H(resid_mid)
    dH_attn_step, dH_mlp_step   what adding it did to the residual:
                                H(resid_mid) - H(H^{l-1}), H(H^l) - H(resid_mid)

    The paper's three are on different scales and do not add up; the steps do: dH_attn_step +
    dH_mlp_step = dH_layer. Returns what the measured components allow. Raises ValueError when that
    is nothing, or when layers were left out."""
    L = table["meta"]["n_layers"]
    out = {}
    H = {name: pick(table, name) for name in set(table["component"])}
    if any(name in BLOCK and len(rows) < L for name, rows in H.items()):
        raise ValueError("entropy changes need every layer: measure without `layers`")
    if "embed" in H and "resid_post" in H:
        out["H"] = np.concatenate([H["embed"], H["resid_post"]])
        H["resid_pre"] = out["H"][:-1]
    for name, (after, before) in CHANGES.items():
        if after in H and before in H:
            out[name] = H[after] - H[before]
    if not out:
        raise ValueError("these components give no entropy change; mlp_in and mlp_out give dH_mlp")
    return out


def pattern(table, near_zero=0.02):
    """Split the layers into the paper's three stages by the mean dH_mlp of each.

    Exploration is where the MLP raises entropy, integration where it hardly moves it, convergence
    where it lowers it. `near_zero` is how much counts as hardly, as a share of ln V (our choice:
    the paper gives no number). Of all ways to cut 1..L into three runs in this order, the one that
    fits most layers is taken; among equals, the one with the largest rise in the first run and fall
    in the last.

    Returns {"exploration": (first, last) or None, "integration": ..., "convergence": ..., "fit":
    share of layers that agree}. With a low fit the model does not show the pattern, whatever the
    ranges say."""
    d = entropy_change(table)["dH_mlp"].mean(-1)
    moved = abs(d) > near_zero * math.log(table["meta"]["vocab_size"])
    # 0, 1, 2: exploration, integration, convergence
    stage = 1 - np.sign(d) * moved
    L = len(d)
    cuts = []
    for a in range(L + 1):
        for b in range(a, L + 1):
            agree = stage == np.repeat([0, 1, 2], [a, b - a, L - b])
            cuts.append((agree.mean(), d[:a].sum() - d[b:].sum(), a, b))
    fit, _, a, b = max(cuts)
    runs = {"exploration": (1, a), "integration": (a + 1, b), "convergence": (b + 1, L)}
    for name, (first, last) in runs.items():
        if first > last:
            runs[name] = None
    return {**runs, "fit": float(fit)}


def bupo_layer(table):
    """The paper's rule for BuPO's layer: the last layer whose MLP raises entropy, mean dH_mlp > 0.
    Returns (layer or None, evidence).

    L is left out: its policy is the model's own, and training that is plain GRPO. The standard
    error in the evidence takes tokens as independent, which neighbours are not: it is a lower
    bound."""
    d = entropy_change(table)["dH_mlp"]
    mean, (L, n) = d.mean(-1), d.shape
    curve = " ".join(f"{x:+.2f}" for x in mean)
    curve = f"dH_mlp of layers 1 to {L}, mean over {n} tokens: {curve}"
    rising = np.flatnonzero(mean[:-1] > 0) + 1
    if not len(rising):
        return None, f"no layer below {L} has dH_mlp > 0; {curve}"
    l = int(rising[-1])
    own = mean[l - 1]
    error = d[l - 1].std() / math.sqrt(max(n - 1, 1))
    text = (
        f"layer {l} of {L} is the last below {L} with dH_mlp > 0: {own:+.3f} nats (standard error "
        f"at least {error:.3f}), layer {l + 1}: {mean[l]:+.3f}"
    )
    if own < 2 * error or n == 1:
        text += "; THIS IS WITHIN TWO STANDARD ERRORS OF ZERO: use more tokens, or choose by hand"
    if falls := l - len(rising):
        text += f"; {falls} layers before it are not above 0: the curve crosses 0 more than once"
    if mean[-1] > 0:
        text += f"; layer {L} does not converge either, so the rule says little about this model"
    return l, f"{text}; {curve}"


def auto_layer(model, sequences, max_tokens=1024, seed=0, **options):
    """BuPO's layer for a model by the paper's rule, measured on sequences [(ids, prompt_len), ...]:
    (layer, evidence to print).

    Costs two unembeddings a block. Raises ValueError when no layer below L has dH_mlp > 0. Options
    go to `measure`."""
    options = {"components": ("mlp_in", "mlp_out"), "top_k": 0, **options}
    layer, evidence = bupo_layer(measure_all(model, sequences, max_tokens, seed, **options))
    if layer is None:
        raise ValueError(f"the rule finds no BuPO layer, give one by number: {evidence}")
    return layer, evidence


def watch(model, sequences, layer, max_tokens=512, seed=0, **options):
    """A few scalars on fixed sequences, for training to log every n steps: three unembeddings a
    token, whatever the depth.

    watch/perplexity      exp of minus the mean log-prob of the fixed responses under the model's
                          own policy
    watch/entropy, watch/layer_entropy    mean entropy of pi^L and of pi^layer, nats
    watch/layer_cos       mean cosine of H^layer with H^L: the paper's feature refinement
    watch/layer_rms, watch/layer_kl    mean root mean square of H^layer; KL(pi^L || pi^layer), nats
    """
    options = {"components": ("resid_post", "final"), "layers": [layer], "top_k": 0, **options}
    table = measure_all(model, sequences, max_tokens, seed, **options)

    def mean(component, value):
        return float(pick(table, component, value).mean())

    return {
        "watch/perplexity": perplexity(mean("final", "logprob")),
        "watch/entropy": mean("final", "entropy"),
        "watch/layer_entropy": mean("resid_post", "entropy"),
        "watch/layer_cos": mean("resid_post", "cos_final"),
        "watch/layer_rms": mean("resid_post", "rms"),
        "watch/layer_kl": mean("resid_post", "kl"),
    }


def perplexity(mean_logprob):
    return math.exp(min(-mean_logprob, 700))


def failure_signs(rows, internal_steps=0):
    """Known ways for BuPO to go wrong, in words ([] when none shows), from entropy.jsonl rows of
    one run, step by step.

    internal_steps: length of the internal phase. Perplexity is that of the fixed responses under
    the model's own policy; neighbouring measured steps are compared, so that sparse steps see less.
    """
    signs = []
    final = []
    early = defaultdict(list)
    for row in rows:
        layer = row["paper_layer"]
        if row["component"] == "final":
            final.append((row["step"], perplexity(row["logprob_token"])))
        elif row["component"] == "resid_post" and layer <= max(1, row["n_layers"] // 4):
            early[layer].append(row["entropy_nats"])
    for (a, before), (b, after) in pairwise(final):
        if b <= internal_steps and after > 1.05 * before:
            signs.append(
                "internal phase too long, if accuracy falls with it: the whole policy's perplexity "
                f"on these responses rises from {before:.4g} at step {a} to {after:.4g} at step "
                f"{b}, inside the internal phase, which ends after step {internal_steps}; compare "
                "with fewer --bupo-steps"
            )
    lowest = [min(later, default=-math.inf) - first for first, *later in early.values()]
    if lowest and min(lowest) > -0.01:
        signs.append(
            f"early layers do not sharpen: the entropy of layers 1 to {len(early)} never falls "
            "below its first value"
        )
    return signs


# ----------------------------------------------------------------------------------------------
# which writes carry a response


def mean_write(write):
    """Mean over tokens of a write [1,T,D], at every token; the first token does not count."""
    return write[:, 1:].float().mean(1, keepdim=True).to(write.dtype).expand_as(write)


# what stands in for a write [1,T,D] that is left out
FILLS = {"zero": torch.zeros_like, "mean": mean_write}


@torch.no_grad()
def attribute(model, ids, prompt_len, temperature=1.0, fills=FILLS):
    """Which writes carry a response: what happens to its tokens without each, and the share of each
    in their logits. ids [T] and prompt_len as in `measure`; a dict of numpy [L] and of two floats.

    NAME_attn, NAME_mlp  change of the mean log-prob, nats, when one A^l or F^l is replaced at every
                         token by fills[NAME](write [1,T,D]) and all later blocks run again. "zero"
                         leaves it out; "mean" takes away only what differs from token to token.
                         Below 0 the response is less likely without the write. 2 L forwards for
                         each fill, half of their blocks known already
    direct_attn, direct_mlp, direct_embed    direct logit attribution, exact: the write's own term
                         A^l . E_token, scaled as the final norm scales H^L. The terms and the
                         embedding's sum to the logit; they see no later block and no softmax
    logprob              mean log-prob of the whole model

    Two changes are of two models, so changes do not add up to anything. What adds up, the integral
    of the log-prob's slope along writes scaled from 0 to 1 (integrated gradients, arXiv
    1703.01365), is not computed here, because on a real model it does not converge: nine tenths of
    the log-prob accrue below 1 % of the way, through states that the model never has.

    The mean leaves out the first token, whose writes can be hundreds of times as large as all
    others (SmolLM2-135M: |F^12| is 25,058 there and 37 elsewhere), so that with it every token
    would get a part of the first one's write.
    """
    E = model.unembedding
    ids = torch.as_tensor(ids, device=E.device)[None]
    token = ids[0, prompt_len:]
    at = slice(prompt_len - 1, -1)
    H_L = model(ids)
    cos_sin = model.cos_sin(ids)
    scale = torch.rsqrt(H_L[0, at].float().square().mean(-1, keepdim=True) + model.config.norm_eps)
    towards = model.norm.weight.float() * E[token].float() * scale / temperature  # [M,D]

    def logprob(h, layer):
        """Of the response, from H^layer."""
        for block in model.blocks[layer:]:
            h = block(h, cos_sin, causal)
        logprobs, _ = token_logprobs(model.norm(h[0, at]), E, token, temperature)
        return float(logprobs.mean())

    def share(write):
        return float((write[0, at].float() * towards).sum(-1).mean())

    out = defaultdict(list)
    whole_model = logprob(H_L, model.config.n_layers)
    for layer, pre, attn, mid, mlp, _ in model.stream(ids):
        out["direct_attn"].append(share(attn))
        out["direct_mlp"].append(share(mlp))
        for name, fill in fills.items():
            h = pre + fill(attn)
            h = h + model.blocks[layer - 1].mlp_out(h)
            out[f"{name}_attn"].append(logprob(h, layer) - whole_model)
            h = mid + fill(mlp)
            out[f"{name}_mlp"].append(logprob(h, layer) - whole_model)
    out = {name: np.array(values) for name, values in out.items()}
    return {**out, "direct_embed": share(model.embed(ids)), "logprob": whole_model}


# ----------------------------------------------------------------------------------------------
# where responses come from


def sample(model, tokenizer, args):
    """Responses of the model to the first problems of --data: [(ids, prompt_len)]."""
    problems = load_problems(args.data, limit=args.limit)
    prompts = [list(tokenizer.chat(p.question, args.system)) for p in problems]
    longest = max(map(len, prompts))
    room = model.config.max_len
    if longest + args.max_new_tokens > room:
        raise ValueError(
            f"prompts of up to {longest} tokens and --max-new-tokens {args.max_new_tokens} exceed "
            f"the {room} tokens this model was made for: lower --max-new-tokens"
        )
    print(f"sampling {len(prompts)} responses of at most {args.max_new_tokens} tokens")
    sampler = Sampler(model, min(16, len(prompts)), longest + args.max_new_tokens)
    groups = sampler.generate(
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop_ids=tokenizer.stop_ids,
        seed=args.seed,
        n_vocab=min(tokenizer.n_vocab, model.config.vocab_size),
    )
    print(f"first prompt: {tokenizer.decode(prompts[0])!r}")
    print(f"first response: {tokenizer.decode(groups[0][0].ids)[:500]!r}")
    return [(p + list(one.ids), len(p)) for p, (one,) in zip(prompts, groups, strict=True)]


def is_sample(row):
    """Whether a row of a samples.jsonl has token ids to analyse."""
    prompt = row.get("prompt_ids")
    ids = row.get("ids")
    if not (isinstance(prompt, list) and isinstance(ids, list) and prompt):
        return False
    return all(type(i) is int and 0 <= i < 2**31 for i in prompt + ids)


def sequences_from(path, limit):
    """[(ids, prompt_len)] of a samples.jsonl: its first `limit` responses that are not empty.

    Lines that are no rows are left out and counted. DataError when there is no response at all.
    """
    rows, skipped = read_rows(path, is_sample)
    if skipped:
        print(f"{path}: {skipped} lines left out, without token ids 'prompt_ids' and 'ids'")
    out = [(r["prompt_ids"] + r["ids"], len(r["prompt_ids"])) for r in rows if r["ids"]]
    if not out:
        raise DataError(f"{path}: no responses in it")
    return out[:limit]


# ----------------------------------------------------------------------------------------------
# what is written: one row a state, one row a block, and every token in tokens.npz

# column of the table: what its mean over tokens is called in entropy.jsonl
MEANS = {
    "entropy": "entropy_nats",
    "rms": "rms",
    "cos_resid": "cos_resid",
    "cos_final": "cos_final",
    "logprob": "logprob_token",
    "lse": "logsumexp",
    "kl": "kl_to_final",
    "unused": "mass_unused",
}


def quartiles(name, values, percents=(25, 50, 75)):
    return {f"{name}_q{q}": float(np.percentile(values, q)) for q in percents}


def state_rows(table, about):
    """Rows of entropy.jsonl: means over tokens of every state, quartiles where a mean misleads.

    Layers count from 1, nats throughout. about: what all rows hold.
    """
    rows = []
    meta = table["meta"]
    about = {**about, **meta, "ln_vocab": math.log(meta["vocab_size"])}
    for s, component in enumerate(table["component"]):
        row = {**about, "component": str(component), "paper_layer": int(table["layer"][s])}
        for column, name in MEANS.items():
            mean = float(table[column][s].mean())
            row[name] = mean if math.isfinite(mean) else None
        row |= quartiles("entropy_nats", table["entropy"][s])
        row |= quartiles("rank", table["rank"][s])
        row["token_is_top1"] = float((table["rank"][s] == 1).mean())
        rows.append(row)
    return rows


def change_rows(table, about):
    """Rows of entropy_change.jsonl: for every block mean and quartiles of each change that the
    table allows."""
    try:
        changes = entropy_change(table)
    except ValueError:
        return []
    rows = []
    for l in range(table["meta"]["n_layers"]):
        row = {**about, "paper_layer": l + 1}
        for name in CHANGES:
            if name not in changes:
                continue
            d = changes[name][l]
            row[name] = float(d.mean())
            row[f"{name}_positive"] = float((d > 0).mean())
            row |= quartiles(name, d, (25, 75))
        rows.append(row)
    return rows


def attribution_rows(model, sequences, about, temperature):
    """Rows of attribution.jsonl: `attribute` of each sequence that has a response."""
    rows = []
    for i, (ids, prompt_len) in enumerate(tqdm(sequences, "attribution", disable=None)):
        if len(ids) > prompt_len:
            row = {**about, "example_id": i, "tokens": len(ids) - prompt_len}
            for name, values in attribute(model, ids, prompt_len, temperature).items():
                row[name] = np.asarray(values).tolist()
            rows.append(row)
    return rows


def write(out, files, tables, tokenizer):
    """Rows {"entropy.jsonl": rows, ...} and tables {run: table} as tokens.npz, tokens-2.npz, ...,
    with the texts of their token ids. What an earlier analysis left goes."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("tokens*.npz"), *(out / name for name in files)]:
        stale.unlink(missing_ok=True)
    for name, rows in files.items():
        if rows:
            (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k, (run, table) in enumerate(tables.items(), 1):
        ids = np.unique([*table["token"], *table["top_ids"].flat])
        texts = [token_text(tokenizer, int(i)) for i in ids]
        meta = json.dumps({**table["meta"], "run": run})
        table = {**table, "meta": meta, "text_ids": ids, "text": texts}
        np.savez_compressed(out / ("tokens.npz" if k == 1 else f"tokens-{k}.npz"), **table)


def token_text(tokenizer, i):
    """The text of a token for tokens.npz. Bytes that are no character alone, as in half a Chinese
    one, are escapes, and so is NUL, which numpy drops at the end of a text; <17> without a text."""
    if not tokenizer or i >= tokenizer.n_vocab:
        return f"<{i}>"
    text = tokenizer.token_bytes(i).decode("utf-8", "backslashreplace")
    return text.replace("\0", "\\x00")


# ----------------------------------------------------------------------------------------------
# what is printed: a line a block, then what the paper's rules make of it

# heading, component ("change": of entropy_change.jsonl), key and format
CELLS = (
    ("H(H^l)", "resid_post", "entropy_nats", ".3f"),
    ("H(A^l)", "attn_out", "entropy_nats", ".3f"),
    ("H(F^l)", "mlp_out", "entropy_nats", ".3f"),
    ("dH_attn", "change", "dH_attn", "+.3f"),
    ("dH_mlp", "change", "dH_mlp", "+.3f"),
    ("dH_layer", "change", "dH_layer", "+.3f"),
    ("RMS", "resid_post", "rms", ".3g"),
    ("cos(H^L)", "resid_post", "cos_final", ".3f"),
    ("KL", "resid_post", "kl_to_final", ".3f"),
    ("rank", "resid_post", "rank_q50", ".0f"),
    ("top-1", "resid_post", "token_is_top1", ".1%"),
)


def print_table(rows, changes):
    """entropy.jsonl and entropy_change.jsonl of one model for a terminal."""
    lines = defaultdict(dict)  # {"embed", 1 .. L, "final": {component: row}}
    for row in rows:
        if row["component"] in ("embed", "final"):
            lines[row["component"]]["resid_post"] = row
        else:
            lines[row["paper_layer"]][row["component"]] = row
    for row in changes:
        lines[row["paper_layer"]]["change"] = row
    print(" layer" + "".join(f"{heading:>9}" for heading, *_ in CELLS))
    for name, cells in lines.items():
        line = f"{name:>6}"
        for _, component, key, form in CELLS:
            value = cells.get(component, {}).get(key)
            line += f"{'' if value is None else format(value, form):>9}"
        print(line)


def report(table, rows, changes):
    """Print what a person wants first: the table, the pattern, the layer that the paper's rule
    picks."""
    about = rows[0]
    print(f"\n{about['run']}: {about['tokens']} response tokens, {figures.settings(about)}")
    print_table(rows, changes)
    print("final is normed, the model's own policy; the paper's code ends with the un-normed H^L")
    if changes and "dH_mlp" in changes[0]:
        stages = pattern(table)
        fit = stages.pop("fit")
        said = ", ".join(f"{stage} {run or 'none'}" for stage, run in stages.items())
        print(f"pattern of dH_mlp: {said}; {fit:.0%} of the layers agree")
        layer, evidence = bupo_layer(table)
        print(f"the paper's rule for BuPO's layer: {evidence}")
        if layer:
            print(
                f"  layer {layer} = Hugging Face hidden_states[{layer}] = "
                f"TransformerLens blocks.{layer - 1}.hook_resid_post"
            )


def weight_rows(first, model, about):
    """How far the weights of a model are from those of the first one measured, part by part:
    |W - W'| / |W'| of up to a million of them, evenly spaced. [] for another shape of model.

    first: metrics.weights_sample of that model. Prints them in a line.
    """
    now = metrics.weights_sample(model)
    sizes = [{part: len(w) for part, w in weights.items()} for weights in (first, now)]
    if sizes[0] != sizes[1]:
        return []
    rows = []
    for part, was in first.items():
        norm = max(was.norm().item(), 1e-30)
        rows.append({**about, "part": part, "update_norm": (now[part] - was).norm().item() / norm})
    line = "  ".join(f"{row['part']} {row['update_norm']:.2g}" for row in rows)
    print(f"weights, |dW| / |W| since the first model: {line}")
    return rows


# ----------------------------------------------------------------------------------------------
# the command


def components(text):
    """argparse type: some of COMPONENTS."""
    if bad := set(text.split(",")) - set(COMPONENTS):
        raise argparse.ArgumentTypeError(f"no {min(bad)}; there are {', '.join(COMPONENTS)}")
    return text.split(",")


def steps(text):
    """argparse type: steps of a run."""
    return sorted(whole(step) for step in text.split(","))


FLAGS = {  # name, type or choices, default, metavar, help
    "what to analyse": (
        ("--model", str, None, "MODEL", "model folder, preset or hub id; with --steps a run"),
        ("--steps", steps, None, "N,N", "checkpoints of the run, on the same tokens; 0: its start"),
        ("--samples-file", str, None, "FILE", "responses to analyse: a samples.jsonl"),
        ("--text", str, None, "TEXT", "analyse this text instead, every token after the first"),
        ("--data", given, "math500", "DATA", "else sample responses to these problems"),
        ("--limit", natural, 8, "N", "problems, or rows of --samples-file"),
        ("--system", str, SYSTEM, "TEXT", "instruction before the question; '' for the tiny model"),
        ("--max-new-tokens", natural, 256, "N", "tokens a sampled response may have"),
        ("--max-tokens", natural, 1024, "N", "response tokens to analyse, drawn if there are more"),
    ),
    "how": (
        ("--components", components, COMPONENTS, "C,C", "states to unembed"),
        ("--norm", NORMS, "none", None, "of internal states: none is the paper, final the lens"),
        ("--temperature", positive, 1.0, "T", "divides logits, here and in sampling"),
        ("--attribute", whole, 0, "N", "responses to leave writes out of, 4 L forwards each"),
        ("--device", str, "auto", "NAME", "cpu, cuda, cuda:1; auto: a GPU if there is one"),
        ("--dtype", DTYPES, None, None, "of the weights: bfloat16 on a GPU, else float32"),
        ("--seed", whole, 0, "N", "of sampling and thinning"),
    ),
    "output": (
        ("--out", str, None, "DIR", "folder of rows and figures, if not out/decompose-MODEL"),
    ),
}


def parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, metavar, help in flags:
            group.add_argument(
                name,
                type=str if isinstance(kind, tuple) else kind,
                choices=kind if isinstance(kind, tuple) else None,
                default=default,
                metavar=metavar,
                help=help + (" (default: %(default)s)" if default else ""),
                required=name == "--model",
            )
    p.add_argument("--compare", nargs="+", default=[], help="more models, on the same tokens")
    p.add_argument("--no-figures", dest="figures", action="store_false", help="draw none")
    return p


def models_of(args):
    """{label: (step or None, folder)} of the models to measure; the first is the one that
    samples."""
    saved = checkpoints(args.model)
    found = [(label(args.model), None, args.model)]
    if args.steps:
        if bad := set(args.steps) - set(saved):
            there = ", ".join(map(str, sorted(saved))) or "no step_ folders"
            raise ValueError(f"--steps {min(bad)}: {args.model} has {there}")
        found = [(f"step {step}", step, saved[step]) for step in args.steps]
    elif last := max(saved, default=0):
        raise ValueError(
            f"{args.model} is a run, not a model: follow it with --steps 0,{last}, or give --model "
            f"{saved[last]}"
        )
    found += [(label(model), None, model) for model in args.compare]
    count = Counter(name for name, _, _ in found)
    out = {}
    for name, step, folder in found:
        out[f"{name} ({folder})" if count[name] > 1 else name] = step, folder
    return out


def vocabulary(folder):
    """What token ids mean: the plain tokens of tokenizer.json, for control tokens may differ, as
    they do between a base model and its chat model; without that file how many ids there are."""
    path = resolve(folder) / "tokenizer.json"
    if not path.is_file():
        return read_json(path.with_name("config.json")).get("vocab_size")
    model = read_json(path).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(f"{path}: no vocabulary in it")
    return model["vocab"]


def check(args):
    """Refuse what can be refused before anything is loaded; returns {label: (step or None, folder)}
    of the models and the folder to write into."""
    out = Path(args.out or f"out/decompose-{folder_name(args.model)}")
    if out.is_file():
        raise ValueError(f"--out {out} is a file; name a folder")
    models = models_of(args)
    _, first = next(iter(models.values()))
    for other in args.compare:
        if vocabulary(other) != vocabulary(first):
            raise ValueError(
                f"--compare {other}: its vocabulary is not that of {first}, the same ids would be "
                "other texts; compare models of one tokenizer"
            )
    return models, out


def responses(args, model):
    """The sequences to analyse, and the tokenizer: None where stored ids do without."""
    try:
        tokenizer = load_tokenizer(model.folder)
    except (ValueError, OSError) as e:
        if not args.samples_file:
            raise
        print(f"figures will show token ids, not texts: {e}")
        tokenizer = None
    if args.samples_file:
        sequences = sequences_from(args.samples_file, args.limit)
    elif args.text is not None:
        sequences = [(list(tokenizer.encode(args.text)), 1)]
    else:
        sequences = sample(model, tokenizer, args)
    return sequences, tokenizer


def main(argv=None):
    """Models, responses, then measurement and report of each model, files and figures of all."""
    args = parser().parse_args(argv)
    models, out = check(args)
    device = torch.device(pick_device(args.device))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tables = {}
    files = defaultdict(list)
    for name, (step, folder) in models.items():
        model = None  # room for the next one
        model = load_model(folder, dtype, device)
        if not tables:
            sequences, tokenizer = responses(args, model)
            first_weights = metrics.weights_sample(model)
        tables[name] = table = measure_all(
            model,
            sequences,
            args.max_tokens,
            args.seed,
            progress=name,
            components=args.components,
            norm=args.norm,
            temperature=args.temperature,
            n_vocab=tokenizer and tokenizer.n_vocab,
        )
        measured = name if step is None else label(args.model)
        about = {"run": name, "step": step, "model": measured, "tokens": len(table["token"])}
        rows = state_rows(table, about)
        changes = change_rows(table, about)
        report(table, rows, changes)
        if len(tables) > 1:
            files["weights.jsonl"] += weight_rows(first_weights, model, about)
        files["entropy.jsonl"] += rows
        files["entropy_change.jsonl"] += changes
        some = sequences[: args.attribute]
        files["attribution.jsonl"] += attribution_rows(model, some, about, args.temperature)
    if args.steps:
        followed = [row for row in files["entropy.jsonl"] if row["step"] is not None]
        last = internal_steps(args.model, model.config.n_layers)
        for sign in failure_signs(followed, last):
            print(f"WARNING: {sign}")
    write(out, files, tables, tokenizer)
    if args.figures:
        figures.draw(out)


if __name__ == "__main__":
    guarded(main)
