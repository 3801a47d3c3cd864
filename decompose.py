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
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import causal, project
from plumbing.cli import guarded, natural, pick_device, whole
from plumbing.data import DataError, load_problems
from plumbing.hub import load_model, resolve
from plumbing.rows import read_json
from tools import plot

# The order of the stream. attn_in and mlp_in are the normed states that a block's sub-layers read:
# the paper's entropy changes start there.
BLOCK = ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
COMPONENTS = ("embed", *BLOCK, "final")
NORMS = ("none", "final", "rms")


# ----------------------------------------------------------------------------------------------
# the core


def states(model, ids, pick=lambda h: h):
    """Yield (component, layer, state, write, base) along the stream of ids [B,T]; each [M,D], the
    rows that pick([B,T,D]) chooses.

    write is what was added to base: the attention's, the MLP's, at resid_post both (A^l + F^l on
    H^{l-1}); None where nothing was. Layers count from 1; `embed` is layer 0, and `final` =
    norm(H^L), which the model's own policy unembeds, is layer L."""
    for s in model.stream(ids):
        block = model.blocks[s.layer - 1]
        pre, attn, mid, mlp, post = (pick(h) for h in s[1:])
        if s.layer == 1:
            yield "embed", 0, pre, None, None
        yield "attn_in", s.layer, block.attn_norm(pre), None, None
        yield "attn_out", s.layer, attn, attn, pre
        yield "resid_mid", s.layer, mid, None, None
        yield "mlp_in", s.layer, block.mlp_norm(mid), None, None
        yield "mlp_out", s.layer, mlp, mlp, mid
        yield "resid_post", s.layer, post, attn.float() + mlp.float(), pre
    yield "final", s.layer, model.norm(post), None, None


def reduce_logits(z, token, top_k=5, n_vocab=None):
    """What is kept of logits z [M,V] (float32, overwritten: two buffers of this size are all it
    takes) with actual tokens [M].

    entropy = -sum p ln p, nats; logprob and rank of the token, rank 1 = most likely; lse = ln sum
    exp z; top_ids, top_probs [M,top_k]; unused = probability of the rows n_vocab .. V-1, which no
    token of the tokenizer uses. Each [M] unless said otherwise."""
    z_token, e = z.gather(-1, token[:, None]), torch.empty_like(z)
    rank = (
        torch.gt(z, z_token, out=e).sum(-1).int() + 1
    )  # counted in float32, exact to 2^24: on a CPU ten times as fast as of bools
    top, top_ids = z.topk(max(top_k, 1), -1)
    z_max = top[:, :1].clone()
    z -= z_max  # the largest exponent is 0: nothing overflows
    torch.exp(z, out=e)
    total = e.sum(-1, keepdim=True)
    unused = e[:, z.shape[-1] if n_vocab is None else n_vocab :].sum(-1) / total[:, 0]
    entropy = total.log() - e.mul_(z).sum(-1, keepdim=True) / total  # ln sum e^z - sum p z
    lse = z_max + total.log()
    return {
        "entropy": entropy[:, 0].clamp_min(0),
        "logprob": (z_token - lse)[:, 0],
        "rank": rank,
        "lse": lse[:, 0],
        "unused": unused,
        "top_ids": top_ids[:, :top_k],
        "top_probs": (top - lse).exp()[:, :top_k],
    }


def mean_row(z, E):
    """Expected row of the unembedding E [V,D] under p = softmax(z [M,V]): sum_v p_v E_v, float64
    [M,D].

    With it KL(p || q) = lse_q - sum_v p_v z^q_v - H(p) is one dot product for any state h, because
    sum_v p_v (h . E_v) is h . sum_v p_v E_v: no other state has to meet the final logits, and none
    is unembedded a second time."""
    pieces = zip(
        z.softmax(-1).split(16384, -1), E.split(16384), strict=True
    )  # a bfloat16 E is widened a piece at a time
    return sum((p_v @ E_v.float()).double() for p_v, E_v in pieces)


def response_rows(model, ids, prompt_len, lengths=None, select=None):
    """Check `measure`'s input; return ids [B,T] and the (example, position) [M] of every response
    token to analyse."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    ids = ids[None] if ids.dim() == 1 else ids
    (B, T), V = ids.shape, model.config.vocab_size
    prompt_len, lengths = (
        torch.as_tensor(x).expand(B)[:, None]
        for x in (prompt_len, T if lengths is None else lengths)
    )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise DataError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, the model has rows 0 to "
            f"{V - 1}: are they its own?"
        )
    if (prompt_len < 1).any() or (lengths > T).any():
        raise ValueError(
            "prompt_len must be at least 1 (no state produced the first token) and lengths at "
            "most T"
        )
    keep = (torch.arange(T) >= prompt_len) & (torch.arange(T) < lengths)
    if select is not None:
        keep &= torch.as_tensor(select, dtype=torch.bool).reshape(B, T)
    if not keep.any():
        raise DataError("no response tokens to analyse: every sequence ends where its prompt does")
    return ids, *keep.nonzero(as_tuple=True)


@torch.no_grad()
def measure(
    model,
    ids,
    prompt_len,
    lengths=None,
    components=COMPONENTS,
    layers=None,
    norm="none",
    temperature=1.0,
    chunk=128,
    top_k=5,
    n_vocab=None,
    select=None,
    tick=None,
):
    """Unembed every state of the residual stream at the response tokens and reduce it to a few
    numbers.

    ids         token ids [T], or [B,T] right-padded
    prompt_len  where the response starts, int or [B]; response token t was produced by the states
                at position t - 1
    lengths     tokens of a row, prompt and response, int or [B]; None is T
    components  which of COMPONENTS to unembed; layers: in which blocks (1-based), None is all.
                `embed` and `final` belong to no block
    norm        before the unembedding: "none" (the paper), "final" (the model's last norm, the
                logit lens), "rms" (x / rms(x), no gain). attn_in, mlp_in and final carry a norm by
                definition and get no other
    chunk       rows unembedded at once; two float32 [chunk,V] buffers are the peak, 0.2 GB at
                V = 151,936
    n_vocab     token ids in use; the probability of rows above them is `unused`
    select      bool [B,T], analyse only these of the response tokens
    tick        called with the row count of every chunk, for progress

    Returns a dict of numpy arrays, S states in the order of the stream by M tokens in the order of
    ids:
        component, layer [S]; example, position, token [M], position counted from the first
                         response token
        entropy, logprob, rank, lse, unused [S,M], top_ids, top_probs [S,M,top_k], all of
                         logits / T: see reduce_logits
        kl [S,M]         KL(pi^L || this policy), nats; NaN without `final` among the components
        rms [S,M]        root mean square of the state, before any lens norm
        cos_resid [S,M]  cosine of A^l, F^l, and at resid_post A^l + F^l, with the residual they are
                         added to; elsewhere NaN
        cos_final [S,M]  cosine with the un-normed H^L; NaN without `final`
        meta             dict: vocab_size, n_layers, n_vocab, norm, temperature, dtype
    Raises ValueError on unknown components, layers or norms, on ids out of range, and when there is
    no response token."""
    c = model.config
    if bad := [x for x in components if x not in COMPONENTS]:
        raise ValueError(f"no component {bad[0]}; there are {', '.join(COMPONENTS)}")
    if bad := [l for l in layers or () if not 1 <= l <= c.n_layers]:
        raise ValueError(f"no layer {bad[0]}; the model has 1 to {c.n_layers}")
    if norm not in NORMS:
        raise ValueError(f"no norm {norm!r}; there are {', '.join(NORMS)}")
    if not (temperature > 0 and chunk >= 1):
        raise ValueError(f"temperature {temperature} must be above 0 and chunk {chunk} at least 1")
    ids, example, position = response_rows(model, ids, prompt_len, lengths, select)
    device = model.unembedding.device
    ids, b, t = ids.to(device), example.to(device), position.to(device)
    token = ids[b, t]
    E = (
        model.unembedding if device.type == "cuda" else model.unembedding.float()
    )  # exact, and once: a CPU product converts it every time

    def pick(h):
        return h[b, t - 1]

    def lens(component, h):
        if norm == "none" or component in ("attn_in", "mlp_in", "final"):
            return h
        if norm == "final":
            return model.norm(h)
        return (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + c.norm_eps)).to(
            h.dtype
        )

    def logits(h):
        z = project(h, E)
        return z if temperature == 1 else z.div_(temperature)

    policy = []  # of the model itself, for every chunk: entropy and mean row

    def unembed(component, h):
        parts = []
        for i, (x, y) in enumerate(
            zip(lens(component, h).split(chunk), token.split(chunk), strict=True)
        ):
            z = logits(x)
            row = mean_row(z, E) if component == "final" else None
            part = reduce_logits(z, y, top_k, n_vocab)
            if component == "final":
                policy.append((part["entropy"], row))
            if policy:
                entropy, row = policy[i]
                part["kl"] = (
                    (part["lse"] - (x.double() * row).sum(-1) / temperature - entropy)
                    .clamp_min(0)
                    .float()
                )
            parts.append(part)
            if tick:
                tick(len(y))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    H_L = None
    if (
        "final" in components
    ):  # cosines and KL are taken against the end of the stream, so the end comes first
        H_L = pick(model(ids))
        final = unembed("final", model.norm(H_L))
    names, columns = [], {}
    for component, layer, h, write, base in states(model, ids, pick):
        if component not in components or (layers and component in BLOCK and layer not in layers):
            continue
        column = final if component == "final" else unembed(component, h)
        column["rms"] = h.float().square().mean(-1).sqrt()
        nan = torch.full_like(column["rms"], torch.nan)
        column["cos_resid"] = (
            nan if write is None else torch.cosine_similarity(write.float(), base.float(), dim=-1)
        )
        column["cos_final"] = (
            nan if H_L is None else torch.cosine_similarity(h.float(), H_L.float(), dim=-1)
        )
        column.setdefault("kl", nan)
        names.append((component, layer))
        for name, value in column.items():
            columns.setdefault(name, []).append(
                (value.int() if value.dtype == torch.long else value).cpu().numpy()
            )
    if not names:
        raise ValueError("nothing to measure: no components were asked for")
    prompt_len = torch.as_tensor(prompt_len).expand(len(ids))
    return {
        "component": np.array([x for x, _ in names]),
        "layer": np.array([l for _, l in names]),
        "example": example.numpy(),
        "position": (position - prompt_len[example]).numpy(),
        "token": token.cpu().numpy(),
        **{name: np.stack(values) for name, values in columns.items()},
        "meta": {
            "vocab_size": c.vocab_size,
            "n_layers": c.n_layers,
            "n_vocab": n_vocab or c.vocab_size,
            "norm": norm,
            "temperature": temperature,
            "dtype": str(model.unembedding.dtype).removeprefix("torch."),
        },
    }


def measure_all(model, sequences, max_tokens=None, seed=0, batch_tokens=4096, **options):
    """`measure` over sequences [(ids, prompt_len), ...], padded into batches of about batch_tokens
    tokens, as one table in their order.

    max_tokens  analyse at most so many response tokens: runs of 16 neighbours drawn at random by
                seed, so that means have no preference for early tokens and a heat-map still reads

    Other options go to `measure`.
    """
    spans = [
        (i, s, min(s + 16, len(ids)))
        for i, (ids, p) in enumerate(sequences)
        for s in range(p, len(ids), 16)
    ]
    if not spans:
        raise DataError("no response tokens to analyse: every sequence ends where its prompt does")
    if max_tokens is not None:
        drawn, left = [], max_tokens
        for k in np.random.default_rng(seed).permutation(len(spans)):
            i, s, e = spans[k]
            if left > 0:
                drawn.append((i, s, min(e, s + left)))
            left -= e - s
        spans = sorted(drawn)
    batches = []
    for i in sorted({i for i, _, _ in spans}):
        longest = max(len(sequences[j][0]) for j in [i, *(batches[-1] if batches else [])])
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    tables = []
    for batch in batches:
        lengths = [len(sequences[i][0]) for i in batch]
        ids, select = (
            torch.zeros(len(batch), max(lengths), dtype=torch.long),
            torch.zeros(len(batch), max(lengths), dtype=torch.bool),
        )
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.as_tensor(sequences[i][0])
        for i, s, e in spans:
            if i in batch:
                select[batch.index(i), s:e] = True
        tables.append(
            measure(model, ids, [sequences[i][1] for i in batch], lengths, select=select, **options)
        )
        tables[-1]["example"] = np.array(batch)[tables[-1]["example"]]
    out = dict(tables[0])
    for name in out.keys() - {
        "component",
        "layer",
        "meta",
    }:  # tokens are axis 0 of [M], axis 1 of [S,M] and [S,M,k]
        out[name] = np.concatenate(
            [table[name] for table in tables], axis=min(out[name].ndim - 1, 1)
        )
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
    H = {name: pick(table, name) for name in dict.fromkeys(table["component"]) if name != "final"}
    if any(len(x) != table["meta"]["n_layers"] for name, x in H.items() if name != "embed"):
        raise ValueError("entropy changes need every layer: measure without `layers`")
    out = {}
    if "embed" in H and "resid_post" in H:
        out["H"] = np.concatenate([H["embed"], H["resid_post"]])
        H["resid_pre"] = out["H"][:-1]
    out |= {
        name: H[after] - H[before]
        for name, (after, before) in CHANGES.items()
        if after in H and before in H
    }
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
    small = near_zero * math.log(table["meta"]["vocab_size"])
    up, down, L = d > small, d < -small, len(d)
    best = None
    for a in range(L + 1):
        for b in range(a, L + 1):
            fit = int(up[:a].sum() + (~up & ~down)[a:b].sum() + down[b:].sum())
            best = max(best or (-1,), (fit, float(d[:a].sum() - d[b:].sum()), a, b))
    fit, _, a, b = best
    runs = {"exploration": (1, a), "integration": (a + 1, b), "convergence": (b + 1, L)}
    return {
        **{name: run if run[0] <= run[1] else None for name, run in runs.items()},
        "fit": fit / L,
    }


def bupo_layer(table):
    """The paper's rule for BuPO's layer: the last layer whose MLP raises entropy, mean dH_mlp > 0.
    Returns (layer or None, evidence).

    L is left out: its policy is the model's own, and training that is plain GRPO. The standard
    error in the evidence takes tokens as independent, which neighbours are not: it is a lower
    bound."""
    d = entropy_change(table)["dH_mlp"]
    mean, n, L = d.mean(-1), d.shape[1], len(d)
    curve = f"dH_mlp of layers 1 to {L}, mean over {n} tokens: " + " ".join(
        f"{x:+.2f}" for x in mean
    )
    rising = np.flatnonzero(mean[:-1] > 0) + 1
    if not len(rising):
        return None, f"no layer below {L} has dH_mlp > 0; {curve}"
    l = int(rising[-1])
    error = d[l - 1].std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    text = (
        f"layer {l} of {L} is the last below {L} with dH_mlp > 0: {mean[l - 1]:+.3f} nats "
        f"(standard error at least {error:.3f}; "
        f"positive at {(d[l - 1] > 0).mean():.0%} of tokens), layer {l + 1}: {mean[l]:+.3f}"
    )
    if mean[l - 1] < 2 * error:
        text += "; THIS IS WITHIN TWO STANDARD ERRORS OF ZERO: use more tokens, or choose by hand"
    if falls := l - len(rising):
        text += (
            f"; {falls} layers before it are not above 0, so the curve crosses it more than once: "
            "look at it"
        )
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
    """
    options = {"components": ("resid_post", "final"), "layers": [layer], "top_k": 0, **options}
    table = measure_all(model, sequences, max_tokens, seed, **options)
    own, inner = (
        (lambda name: float(pick(table, "final", name).mean())),
        (lambda name: float(pick(table, "resid_post", name).mean())),
    )
    return {
        "watch/perplexity": perplexity(own("logprob")),
        "watch/entropy": own("entropy"),
        "watch/layer_entropy": inner("entropy"),
        "watch/layer_cos": inner("cos_final"),
    }


def perplexity(mean_logprob):
    return math.exp(min(-mean_logprob, 700))


def response_logprob(model, ids, prompt_len, temperature=1.0):
    """(logprob, ids [1,T], positions [M]): a function from H^L [1,T,D] to the mean log-prob of the
    response tokens, and the positions whose states produced them."""
    from grpo import token_logprobs  # here: the rest can be lifted out with model.py alone

    ids, _, t = response_rows(model, ids, prompt_len)
    E = model.unembedding.detach()
    ids, t = ids.to(E.device), t.to(E.device) - 1
    token = ids[0, t + 1]

    def logprob(h):
        return float(token_logprobs(model.norm(h[0, t]), E, token, temperature)[0].mean())

    return logprob, ids, t


def mean_write(write):
    """Mean over tokens of a write [1,T,D], at every token; the first token does not count."""
    return write[:, 1:].float().mean(1, keepdim=True).to(write.dtype).expand_as(write)


# what stands in for a write [1,T,D] that is left out
FILLS = {"zero": torch.zeros_like, "mean": mean_write}


@torch.no_grad()
def leave_out(model, ids, prompt_len, temperature=1.0, fills=FILLS):
    """How much the response depends on each write: the change of its tokens' mean log-prob, in
    nats, when one A^l or F^l is replaced at every token and all later blocks run again.

    fills: {name: what stands for a write [1,T,D]}. "zero" leaves the write out, "mean" puts its
    mean over tokens there, and so takes away only what differs from token to token. Below 0 the
    response is less likely without the write. 2 L forwards for each fill, half of their blocks
    known already.

    Two changes are of two models, so changes do not add up to anything. What adds up, the integral
    of the log-prob's slope along writes scaled from 0 to 1 (integrated gradients, arXiv
    1703.01365), is not computed here, because on a real model it does not converge: the embedding
    alone is tiny (RMS 0.1 where H^L has 30, SmolLM2-135M), every norm blows it up, and nine tenths
    of the log-prob accrue below 1 % of the way, through states that the model never has. Shares of
    one response missed their sum by 14 % at 32 nodes and by 15 % at 128. A difference of two
    forwards has no such error (in bfloat16 that of SmolLM2 is off by 0.005 nats in the median).

    The mean leaves out the first token, whose writes can be hundreds of times as large as all
    others (SmolLM2-135M: |F^12| is 25,058 there and 37 elsewhere), so that with it every token
    would get a part of the first one's write.

    ids [T] and prompt_len as in `measure`. Returns a dict of numpy [L]: NAME_attn and NAME_mlp for
    each fill; and the float `logprob`, of the whole model.
    """
    logprob, ids, _ = response_logprob(model, ids, prompt_len, temperature)
    L, angles, whole = model.config.n_layers, model.angles(ids), logprob(model(ids))
    out = {f"{name}_{kind}": np.zeros(L) for name in fills for kind in ("attn", "mlp")}
    for s in model.stream(ids):
        block, later = model.blocks[s.layer - 1], model.blocks[s.layer :]
        for name, fill in fills.items():
            mid = s.resid_pre + fill(s.attn_out)
            without = {"attn": mid + block.mlp_out(mid), "mlp": s.resid_mid + fill(s.mlp_out)}
            for kind, h in without.items():
                for following in later:
                    h = following(h, angles, causal)
                out[f"{name}_{kind}"][s.layer - 1] = logprob(h) - whole
    return {**out, "logprob": whole}


@torch.no_grad()
def direct(model, ids, prompt_len, temperature=1.0):
    """Direct logit attribution: the share of each write in the logit of the tokens produced, exact.

    It is the write's own term A^l . E_token, scaled as the final norm scales H^L; with the
    embedding's the terms sum to the logit. It sees no later block and no softmax.

    Returns a dict: direct_attn and direct_mlp, numpy [L], and direct_embed, nats a token.
    """
    _, ids, t = response_logprob(model, ids, prompt_len, temperature)
    E, token = model.unembedding, ids[0, t + 1]
    parts = {name: [] for name in ("embed", "attn_out", "mlp_out", "resid_post")}
    for name, _, h, _, _ in states(model, ids, lambda h: h[0, t].float()):
        if name in parts:
            parts[name].append(h)
    mean_square = parts["resid_post"][-1].square().mean(-1, keepdim=True)
    towards = model.norm.weight.float() * E[token].float() / temperature  # [M,D]
    towards = towards * torch.rsqrt(mean_square + model.config.norm_eps)
    terms = {
        name: np.array([float((h * towards).sum(-1).mean()) for h in hs])
        for name, hs in parts.items()
    }
    return {
        "direct_attn": terms["attn_out"],
        "direct_mlp": terms["mlp_out"],
        "direct_embed": float(terms["embed"][0]),
    }


def attribute(model, ids, prompt_len, temperature=1.0):
    """Which writes carry a response: `leave_out` and `direct` in one dict."""
    options = (model, ids, prompt_len, temperature)
    return {**leave_out(*options), **direct(*options)}


# ----------------------------------------------------------------------------------------------
# what is written: one row a state, one row a block, and every token in tokens.npz


def summary(table, run="", step=None, model=None):
    """Rows of entropy.jsonl: means over tokens of every state, quartiles where a mean misleads.

    Layers count from 1, nats throughout. run: what the lines are called; model: what is measured,
    when that is not `run` (a step of its training).
    """
    meta, rows = table["meta"], []
    same = {
        "run": run,
        "step": step,
        "model": model or run,
        "norm": meta["norm"],
        "temperature": meta["temperature"],
        "dtype": meta["dtype"],
        "ln_vocab": math.log(meta["vocab_size"]),
        "n_layers": meta["n_layers"],
        "tokens": len(table["token"]),
    }
    for s, (component, layer) in enumerate(zip(table["component"], table["layer"], strict=True)):

        def mean(name, s=s):
            x = float(table[name][s].mean())
            return x if math.isfinite(x) else None

        entropy, rank = (
            np.percentile(table[name][s], (25, 50, 75)) for name in ("entropy", "rank")
        )
        rows.append(
            {
                **same,
                "component": str(component),
                "paper_layer": int(layer),
                "entropy_nats": mean("entropy"),
                **{
                    f"entropy_nats_q{q}": float(x)
                    for q, x in zip((25, 50, 75), entropy, strict=True)
                },
                "rms": mean("rms"),
                "cos_resid": mean("cos_resid"),
                "cos_final": mean("cos_final"),
                "logprob_token": mean("logprob"),
                **{f"rank_q{q}": float(x) for q, x in zip((25, 50, 75), rank, strict=True)},
                "token_is_top1": float((table["rank"][s] == 1).mean()),
                "logsumexp": mean("lse"),
                "kl_to_final": mean("kl"),
                "mass_unused": mean("unused"),
            }
        )
    return rows


def change_summary(table, run="", step=None):
    """Rows of entropy_change.jsonl: for every block mean and quartiles of each change that the
    table allows."""
    try:
        change = entropy_change(table)
    except ValueError:
        return []
    change.pop("H", None)
    rows = []
    for l in range(table["meta"]["n_layers"]):
        rows.append({"run": run, "step": step, "paper_layer": l + 1, "tokens": len(table["token"])})
        for name, d in change.items():
            q25, q75 = (float(x) for x in np.percentile(d[l], (25, 75)))
            rows[-1] |= {
                name: float(d[l].mean()),
                f"{name}_q25": q25,
                f"{name}_q75": q75,
                f"{name}_positive": float((d[l] > 0).mean()),
            }
    return rows


def failure_signs(rows, internal_steps=0):
    """Known ways for BuPO to go wrong, in words ([] when none shows), from entropy.jsonl rows of
    one run at several steps.

    internal_steps: length of the internal phase. Perplexity is that of the fixed responses under
    the model's own policy; neighbouring measured steps are compared, so that sparse steps see less.
    """
    signs, curves, nats = [], {}, "logprob_token"
    for row in sorted((r for r in rows if r["step"] is not None), key=lambda r: r["step"]):
        curves.setdefault((row["component"], row["paper_layer"]), []).append(row)
    final = next((c for (name, _), c in curves.items() if name == "final"), [])
    for a, b in zip(final, final[1:], strict=False):
        if b["step"] <= internal_steps and a[nats] - b[nats] > math.log(1.05):
            signs.append(
                "internal phase too long: the whole policy's perplexity on these responses rises "
                f"from {perplexity(a[nats]):.4g} at step {a['step']} to "
                f"{perplexity(b[nats]):.4g} at step {b['step']}, inside the internal phase, which "
                f"ends after step {internal_steps}; try fewer --bupo-steps"
            )
    early = [
        c
        for (name, l), c in curves.items()
        if name == "resid_post" and l <= max(1, c[0]["n_layers"] // 4) and len(c) > 1
    ]
    if early and all(
        min(x["entropy_nats"] for x in c[1:]) > c[0]["entropy_nats"] - 0.01 for c in early
    ):
        signs.append(
            f"early layers do not sharpen: the entropy of layers 1 to {len(early)} never falls "
            "below its first value"
        )
    return signs


def print_table(rows, changes):
    """entropy.jsonl and entropy_change.jsonl of one model for a terminal, a line a block:
    entropies, and more about its H^l."""
    cells = {(r["component"], r["paper_layer"]): r for r in rows}

    def line(name, h, l=0):
        change = changes[l - 1] if l and changes else {}
        values = [
            (h, "entropy_nats", ".3f"),
            *((cells.get((w, l), {}), "entropy_nats", ".3f") for w in ("attn_out", "mlp_out")),
            *((change, x, "+.3f") for x in ("dH_attn", "dH_mlp", "dH_layer")),
            (h, "rms", ".3g"),
            (h, "cos_final", ".3f"),
            (h, "kl_to_final", ".3f"),
            (h, "rank_q50", ".0f"),
            (h, "token_is_top1", ".1%"),
        ]
        print(
            f"{name:>6}"
            + "".join(
                f"{'' if row.get(key) is None else format(row[key], form):>9}"
                for row, key, form in values
            )
        )

    heads = "H(H^l) H(A^l) H(F^l) dH_attn dH_mlp dH_layer RMS cos(H^L) KL rank top-1"
    print(" layer" + "".join(f"{head:>9}" for head in heads.split()))
    for (name, l), row in cells.items():
        if name in ("embed", "final"):
            line(name, row)
        elif (name, l) == next(k for k in cells if k[1] == l and k[0] in BLOCK):
            line(l, cells.get(("resid_post", l), {}), l)


# ----------------------------------------------------------------------------------------------
# the command


def parser():
    def words(text):
        return [w for w in re.split(r"[\s,]+", text) if w]

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument_group("what to analyse").add_argument
    add(
        "--model",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="model folder, preset or hub id; with --steps a run folder",
    )
    add(
        "--steps",
        type=words,
        metavar="N,N",
        help="checkpoints of the run to follow, on the same tokens; 0 is the model it started from",
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="more models, on the same tokens (of the same vocabulary)",
    )
    add(
        "--samples-file",
        metavar="FILE",
        help="responses to analyse: JSONL with prompt_ids and ids, a samples.jsonl",
    )
    add("--text", help="analyse this text instead, every token after the first")
    add(
        "--data",
        default="math500",
        metavar="NAME_OR_PATH",
        help="else sample responses to these problems (default: math500)",
    )
    add(
        "--limit",
        type=natural,
        default=8,
        metavar="N",
        help="problems, or rows of --samples-file (default: 8)",
    )
    add(
        "--samples",
        type=natural,
        default=1,
        metavar="S",
        help="responses to sample per problem (default: 1)",
    )
    add(
        "--system",
        metavar="TEXT",
        help="instruction around the question (default: the paper's; the tiny model was shown an "
        "empty one)",
    )
    add(
        "--max-new-tokens",
        type=natural,
        default=256,
        metavar="M",
        help="tokens a sampled response may have (default: 256)",
    )
    add(
        "--max-tokens",
        type=natural,
        default=1024,
        metavar="N",
        help="response tokens to analyse, drawn if there are more (default: 1024)",
    )
    add = p.add_argument_group("how").add_argument
    add(
        "--components",
        type=words,
        default=COMPONENTS,
        metavar="C,C",
        help=f"of {', '.join(COMPONENTS)} (default: all)",
    )
    add(
        "--norm",
        choices=NORMS,
        default="none",
        help="of internal states: none is the paper, final the logit lens (default: none)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divides logits, here and in sampling (default: 1)",
    )
    add(
        "--attribute",
        type=whole,
        default=0,
        metavar="N",
        help="for N responses: what leaving out each write does to their log-prob (4 L forwards "
        "a response), and its direct share in the logit (default: 0)",
    )
    add(
        "--chunk",
        type=natural,
        default=128,
        metavar="N",
        help="states unembedded at once, 8 V bytes each (default: 128)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    add("--seed", type=whole, default=0, help="of sampling and thinning (default: 0)")
    add = p.add_argument_group("output").add_argument
    add(
        "--out",
        metavar="DIR",
        help="folder for entropy.jsonl, entropy_change.jsonl, tokens.npz and figures "
        "(default: out/decompose-MODEL, with the run of a step_000300 before it)",
    )
    add(
        "--figures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw them (default: yes)",
    )
    p.error = lambda message: p.exit(
        2, f"decompose.py: {message}; see python decompose.py --help\n"
    )
    return p


def label(name):
    """A model's name for captions and folders: of a path its last part, but a hub cache's
    repository, a run's model, and for a checkpoint (step_000300, warm-up) its run before it."""
    path = Path(name)
    if not path.is_dir():
        return path.name or str(name)
    path = path.resolve()
    if path.parent.name == "snapshots":  # models--Qwen--Qwen3-4B/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2]
    if path.name == "warm-up" or path.name.startswith("step_"):
        return f"{plot.run_name(path.parent)}-{path.name}"
    return plot.run_name(path)


def folder_name(name):
    """`label` as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", label(name)).strip(".") or "model"


def variants(args):
    """{label: (step or None, folder)} of the models to measure; the first is the one that
    samples."""
    run = Path(args.model)
    saved = {
        int(p.parent.name[5:]): p.parent
        for p in sorted(run.glob("step_*/config.json"))
        if p.parent.name[5:].isdigit()
    }
    found = [(label(args.model), None, args.model)]
    if args.steps:
        if (run / "warm-up" / "config.json").is_file():
            saved[0] = run / "warm-up"  # where the embedded default starts
        elif (run / "config.json").is_file():
            start = read_json(run / "config.json").get("model")
            if isinstance(start, str):
                saved[0] = start
        if bad := [s for s in args.steps if not s.isdigit() or int(s) not in saved]:
            raise ValueError(
                f"--steps {bad[0]}: {run} has "
                f"{', '.join(map(str, sorted(saved))) or 'no step_ folders'}"
            )
        found = [(f"step {int(s)}", int(s), saved[int(s)]) for s in args.steps]
    elif saved:
        raise ValueError(
            f"{run} is a run, not a model: follow it with --steps 0,{max(saved)}, or give --model "
            f"{saved[max(saved)]}"
        )
    found += [(label(m), None, m) for m in args.compare]
    out = {}
    for name, step, folder in found:
        out[name if name not in out else f"{name} ({folder})"] = step, folder
    return out


def vocabulary(folder):
    """{token: id} of the plain tokens in a folder's tokenizer.json; None without that file.
    ValueError for a file that is no tokenizer."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise ValueError(f"{path}: no vocabulary in it")
    return model["vocab"]


def same_vocabulary(models):
    """ValueError when two of these models or folders have other vocabularies: the same ids would be
    other texts. Control tokens may differ, as they do between a base model and its chat model.
    Where there is no tokenizer.json the rows of the embeddings are compared."""
    first, *others = models
    for other in others:
        folders = resolve(first), resolve(other)
        known = [vocabulary(folder) for folder in folders]
        if None in known:
            known = [read_json(folder / "config.json").get("vocab_size") for folder in folders]
        if known[0] != known[1]:
            raise ValueError(
                f"--compare {other}: its vocabulary is not that of {first}, the same ids would be "
                "other texts; compare models of one tokenizer"
            )


def is_sample(row):
    """Whether a row of a samples.jsonl has token ids to analyse."""
    lists = row.get("prompt_ids"), row.get("ids")
    if not all(isinstance(ids, list) for ids in lists) or not lists[0]:
        return False
    return all(plot.whole(i, 0, 2**31 - 1) for ids in lists for i in ids)


def sequences_from(path, limit):
    """[(ids, prompt_len)] of a samples.jsonl: its first `limit` responses that are not empty.

    Lines that are no rows are left out and counted. DataError when there is no response at all.
    """
    try:
        rows, skipped = plot.read_rows(path, is_sample)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; eval.py and train.py write a samples.jsonl") from None
    if skipped:
        print(
            f"{path}: {skipped} lines left out, without lists of token ids 'prompt_ids' and 'ids'"
        )
    out = [(r["prompt_ids"] + r["ids"], len(r["prompt_ids"])) for r in rows if r["ids"]]
    if not out:
        raise DataError(f"{path}: no responses in it")
    return out[:limit]


def sample(model, tokenizer, args):
    """Responses of the model to the first problems of --data: [(ids, prompt_len)]."""
    from rollout import Sampler

    problems = load_problems(args.data, limit=args.limit)
    system = {} if args.system is None else {"system": args.system}
    prompts = [list(tokenizer.chat(p.question, **system)) for p in problems]
    max_len = max(map(len, prompts)) + args.max_new_tokens
    if max_len > model.config.max_len:
        raise ValueError(
            f"prompts of up to {max_len - args.max_new_tokens} tokens and --max-new-tokens "
            f"{args.max_new_tokens} exceed the {model.config.max_len} tokens this model was made "
            "for: lower --max-new-tokens"
        )
    sampler = Sampler(model, slots=min(16, len(prompts) * args.samples), max_len=max_len)
    print(
        f"sampling {len(prompts) * args.samples} responses of at most {args.max_new_tokens} tokens"
    )
    groups = sampler.generate(
        prompts,
        n=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop_ids=tokenizer.stop_ids,
        seed=args.seed,
        n_vocab=min(tokenizer.n_vocab, model.config.vocab_size),
    )
    print(f"first prompt: {tokenizer.decode(prompts[0])!r}")
    print(f"first response: {tokenizer.decode(groups[0][0].ids)[:500]!r}")
    return [
        (prompt + list(s.ids), len(prompt))
        for prompt, group in zip(prompts, groups, strict=True)
        for s in group
    ]


def report(tables, rows, changes, internal_steps):
    """Print what a person wants first: the table, the pattern, the layer that the paper's rule
    picks, the failure signs."""
    for name, table in tables.items():
        mine, change, meta = (
            [r for r in rows if r["run"] == name],
            [r for r in changes if r["run"] == name],
            table["meta"],
        )
        print(f"\n{name}: {len(table['token'])} response tokens, {plot.settings(mine[0])}")
        print_table(mine, change)
        if {"resid_post", "final"} <= set(table["component"]) and meta["norm"] == "none":
            raw, own = (float(pick(table, x)[-1].mean()) for x in ("resid_post", "final"))
            print(
                f"the model's own policy (normed): {own:.3f} nats; un-normed H^L, the last point "
                f"of the paper's code: {raw:.3f}"
            )
        if change and "dH_mlp" in change[0]:
            stages = pattern(table)
            runs = [
                f"{x} {'-'.join(map(str, stages[x] or ('none',)))}"
                for x in ("exploration", "integration", "convergence")
            ]
            print(f"pattern of dH_mlp: {', '.join(runs)}; {stages['fit']:.0%} of the layers agree")
            layer, evidence = bupo_layer(table)
            print(f"the paper's rule for BuPO's layer: {evidence}")
            if layer:
                print(
                    f"  layer {layer} = Hugging Face hidden_states[{layer}] = "
                    f"TransformerLens blocks.{layer - 1}.hook_resid_post"
                )
    for sign in failure_signs(rows, internal_steps):
        print(f"WARNING: {sign}")


def check(args):
    """Refuse what can be refused before anything is loaded; returns {label: (step or None, folder)}
    of the models and the folder to write into."""
    if bad := set(args.components) - set(COMPONENTS):
        raise ValueError(f"--components: no {min(bad)}; there are {', '.join(COMPONENTS)}")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature} must be a number above 0")
    if not args.data:
        raise ValueError("--data names no problems: give a named set or a file")
    out = Path(args.out or f"out/decompose-{folder_name(args.model)}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    models = variants(args)
    same_vocabulary([next(iter(models.values()))[1], *args.compare])
    return models, out


def analyse(args):
    """The command: model, responses, measurement, report, files, figures."""
    models, out = check(args)
    device = torch.device(pick_device(args.device))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = load_model(next(iter(models.values()))[1], dtype, device)
    from plumbing import tokenizer as tokenizers

    tokenizer = None
    try:
        tokenizer = tokenizers.load_tokenizer(model.folder)
    except (ValueError, OSError) as e:
        if not args.samples_file:
            raise
        print(f"figures will show token ids, not texts: {e}")
    if args.samples_file:
        sequences = sequences_from(args.samples_file, args.limit)
    elif args.text is not None:
        sequences = [(list(tokenizer.encode(args.text)), 1)]
    else:
        sequences = sample(model, tokenizer, args)

    tables, rows, changes, attributions = {}, [], [], []
    for name, (step, folder) in models.items():
        if tables:
            del model  # before the next one takes its place
            model = load_model(folder, dtype, device)
        tables[name] = measure_shown(model, sequences, args, name, tokenizer)
        attributions += attributed(model, sequences[: args.attribute], args, name, step)
        about = label(args.model) if step is not None else None
        rows += summary(tables[name], name, step, about)
        changes += change_summary(tables[name], name, step)
    report(tables, rows, changes, internal_steps(args.model) if args.steps else 0)
    write(out, tables, rows, changes, attributions, tokenizer)
    if args.figures:
        for path in plot.folder(out):
            print(f"wrote {path}")


def measure_shown(model, sequences, args, name, tokenizer):
    """`measure_all` as the flags say, with a progress bar."""
    n_tokens = min(args.max_tokens, sum(len(ids) - p for ids, p in sequences))
    n_states = sum(model.config.n_layers if c in BLOCK else 1 for c in set(args.components))
    shown = dict(total=n_tokens * n_states, unit="state", unit_scale=True, desc=name, disable=None)
    with tqdm(**shown) as bar:
        return measure_all(
            model,
            sequences,
            args.max_tokens,
            args.seed,
            components=args.components,
            norm=args.norm,
            temperature=args.temperature,
            chunk=args.chunk,
            n_vocab=tokenizer and tokenizer.n_vocab,
            tick=bar.update,
        )


def attributed(model, sequences, args, name, step):
    """Rows of attribution.jsonl: `attribute` of each sequence that has a response."""
    rows = []
    for i, (ids, p) in enumerate(tqdm(sequences, desc="attribution", disable=None)):
        if len(ids) == p:
            continue
        found = attribute(model, ids, p, args.temperature)
        lists = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in found.items()}
        about = {"run": name, "step": step, "example_id": i, "tokens": len(ids) - p}
        rows.append({**about, **lists})
    return rows


def internal_steps(run):
    """The last step of a run's internal phases, by its metrics.jsonl; 0 without."""
    path = Path(run) / "metrics.jsonl"
    rows = plot.read_rows(path, plot.is_metrics)[0] if path.is_file() else []
    phases = plot.internal_phases(sorted(rows, key=lambda row: row["step"]))
    return max((last for _, last, _ in phases), default=0)


def write(out, tables, rows, changes, attributions, tokenizer):
    """All that figures need: entropy.jsonl, entropy_change.jsonl, attribution.jsonl, and tokens.npz
    (tokens-2.npz for a second model)."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "entropy.jsonl": rows,
        "entropy_change.jsonl": changes,
        "attribution.jsonl": attributions,
    }
    for stale in [*out.glob("tokens*.npz"), *(out / name for name in files)]:
        stale.unlink(missing_ok=True)
    for name, content in files.items():
        if content:
            (out / name).write_text("".join(json.dumps(r) + "\n" for r in content))
    for k, (name, table) in enumerate(tables.items(), 1):
        ids = np.unique(np.concatenate([table["token"], table["top_ids"].ravel()]))
        np.savez_compressed(
            out / ("tokens.npz" if k == 1 else f"tokens-{k}.npz"),
            text_ids=ids,
            text=np.array([token_text(tokenizer, int(i)) for i in ids]),
            **{**table, "meta": np.array(json.dumps({**table["meta"], "run": name}))},
        )


def token_text(tokenizer, i):
    """The text of a token for tokens.npz. Bytes that are no character alone, as in half a Chinese
    one, are escapes, and so is NUL, which numpy drops at the end of a text; <17> without a text."""
    if not tokenizer or i >= tokenizer.n_vocab:
        return f"<{i}>"
    text = tokenizer.token_bytes(i).decode("utf-8", "backslashreplace")
    return text.replace("\0", "\\x00")


def main(argv=None):
    analyse(parser().parse_args(argv))


if __name__ == "__main__":
    guarded(main)
