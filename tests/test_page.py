"""page.html: its numbers are those of the model, its size is bounded, nothing in the data can act,
and in a real browser it can be used by mouse and by keyboard at any width."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import Browser, missing
from test_plot import metric_rows, save_tokens

import eval as evaluation
import train
from model import Config, Transformer
from plumbing.data import Problem
from plumbing.hub import load_model, save_model
from rollout import Response
from tiny import write_tokenizer
from tools import page
from verify import Verdict

SHAPE = dict(d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=48, max_len=128, tied=True)
QUESTIONS = ("7+8+5", "1+2", "9+9+9", "4+4")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def byte_model(folder, seed=0, **changes):
    """A random model over the 256 bytes, with its tokenizer."""
    config = Config("qwen3", 260, n_layers=3, **SHAPE)
    save_model(Transformer(config).init_weights(seed, 0.3), folder)
    write_tokenizer(folder)


def sample(step, question, text, reward, **more):
    row = {"step": step, "question": question, "answer": "20", "response": text}
    row |= {"extracted": text[-3:-1], "reward": reward, "finish_reason": "stop"}
    row["reason"] = "equal: string" if reward else "different"
    prompt, ids = (list(x.encode("utf-8", "replace")) for x in (question, text))
    row |= {"prompt_ids": prompt, "ids": [*ids, 256]}
    return {**row, **more}


def samples():
    """Two groups of three responses in each of two steps, as train.py writes them."""
    rows = []
    for i, question in enumerate(QUESTIONS):
        for reward, text in ((1, r"7+8=15. \boxed{20}"), (0, r"\boxed{23}"), (0, r"\boxed{2}")):
            scores = [-0.01 * k for k in range(len(text) + 1)]
            scored = {"advantage": 1.2 if reward else -0.6, "logprobs": scores}
            rows.append(sample(1 + i // 2, question, text, reward, **scored))
    return rows


def write_run(folder, rows=None):
    """A run folder with all three parts."""
    for i, name in enumerate(("warm-up", "step_000002")):
        byte_model(folder / name, seed=i)
    (folder / "config.json").write_text(json.dumps({"model": "tiny"}))
    jsonl(folder / "metrics.jsonl", metric_rows(6, 3))
    jsonl(folder / "samples.jsonl", samples() if rows is None else rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("page") / "seed1")
    page.main([str(folder)])
    return folder


class Parsed(HTMLParser):
    """Tags of a page, their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def data_of(path):
    """The JSON in a page."""
    return json.loads(Parsed(path.read_text("utf-8")).scripts[0])


# what is in it ----------------------------------------------------------------------------------


def test_one_file_that_needs_nothing_else(run):
    text = (run / "page.html").read_text("utf-8")
    parsed = Parsed(text)
    outside = [(tag, a) for tag, a in parsed.tags if {"src", "href", "data", "action"} & a.keys()]
    svg = "http://www.w3.org/2000/svg"  # a name, not an address
    assert not outside and "://" not in text.replace(svg, "") and len(parsed.scripts) == 2
    assert "@DATA@" not in text and "@POLICY@" not in text and text.endswith("</html>\n")
    data = json.loads(parsed.scripts[0])
    assert data["title"] == "tiny-seed1" and data["notes"] == {}
    assert data["lens"]["models"] == ["tiny-seed1-warm-up", "tiny-seed1-step_000002"]


def test_the_lens_shows_what_the_model_says(run):
    """Every number of it, against the logits of `unembed`."""
    data = data_of(run / "page.html")
    tokenizer = page.load_tokenizer(run / "warm-up")
    rows = samples()[::3]  # the first of each group
    lens, texts = data["lens"], data["texts"]
    assert [r["title"] for r in lens["responses"]] == [
        f"step {r['step']}: {r['question']}" for r in rows
    ]
    assert lens["layers"] == [0, 1, 2, 3] and lens["vocab_size"] == 260
    for name, m in (("warm-up", 0), ("step_000002", 1)):
        model = load_model(run / name)
        for row, response in zip(rows, lens["responses"], strict=True):
            n = len(row["prompt_ids"])
            ids = torch.tensor(row["prompt_ids"] + row["ids"])
            assert (
                "".join(texts[i] for i in response["tokens"]) == row["response"] + "<|endoftext|>"
            )
            with torch.no_grad():
                states = model.residuals(ids[None])
            cells = response["models"][m]
            last = logprobs_of(model, states.resid_post[-1], 3, n)
            for s, h in enumerate([states.embed, *states.resid_post]):
                logp = logprobs_of(model, h, s, n)
                check_cells({k: v[s] for k, v in cells.items() if k != "k"}, logp, last, ids[n:])
                best = logp.topk(5).indices.tolist()
                best = [page.shown(page.token_text(tokenizer, i)) for five in best for i in five]
                assert [texts[i] for i in cells["top"][s]] == best


def logprobs_of(model, h, layer, n):
    with torch.no_grad():
        return model.unembed(h[0, n - 1 : -1], layer).double().log_softmax(-1)


def check_cells(cells, logp, last, tokens):
    """A layer's cells, against its log-probs [M,V] and those of the last layer."""
    p = logp.exp()
    own = logp.gather(1, tokens[:, None])
    want = {
        "entropy": 100 * -(p * logp).sum(1),
        "logprob": 100 * own[:, 0],
        "rank": (logp > own).sum(1) + 1,
        "kl": 100 * (last.exp() * (last - logp)).sum(1),
        "top_probs": 1000 * p.topk(5).values.flatten(),
    }
    for name, value in want.items():
        # whole numbers, and float32 near a half
        np.testing.assert_allclose(cells[name], value, atol=0.51, err_msg=name)


def test_two_tables_of_a_decomposition(tmp_path):
    """The first and the last are compared, each response as far as its tokens follow each other."""
    g = np.random.default_rng(0)
    more = dict(logprob=g.normal(-3, 1, (5, 20)), rank=g.integers(1, 50, (5, 20)))
    more["kl"] = np.where(np.arange(5)[:, None] == 1, np.nan, g.uniform(0, 9, (5, 20)))
    position = np.array([*range(6), *range(9, 15), *range(8)])
    for name in ("tokens", "tokens-2", "tokens-10"):
        more["entropy"] = np.full((5, 20), len(name) / 100)
        save_tokens(tmp_path / f"{name}.npz", position=position, **more)
    page.main([str(tmp_path)])
    data = data_of(tmp_path / "page.html")
    lens = data["lens"]
    assert lens["layers"] == [0, 1, 2, 3]  # of H^3 and norm(H^3) the latter
    assert [r["title"] for r in lens["responses"]] == ["response 1", "response 2"]
    first = lens["responses"][0]
    assert len(first["tokens"]) == 6 and [data["texts"][i] for i in first["tokens"]][:4] == [
        "a",
        " b",
        "\n",
        "\u4f60",
    ]
    assert [m["entropy"][0][0] for m in first["models"]] == [6, 9]  # tokens and tokens-10
    assert set(first["models"][0]["kl"][1]) == {-1}  # not measured
    assert data["notes"].keys() == {"rollouts", "curves"}
    save_tokens(tmp_path / "tokens-10.npz", position=position + 1, **more)
    with pytest.raises(ValueError, match="tokens-10.npz: other tokens than tokens.npz"):
        page.from_tables(tmp_path, 8)
    one = dict(component=np.array(["mlp_out"] * 5))
    save_tokens(tmp_path / "tokens.npz", position=position, **more, **one)
    (tmp_path / "tokens-10.npz").unlink()
    (tmp_path / "tokens-2.npz").unlink()
    with pytest.raises(FileNotFoundError, match="no states of the residual stream"):
        page.from_tables(tmp_path, 8)


def test_rollouts_by_group(run):
    rollouts = data_of(run / "page.html")["rollouts"]
    groups = rollouts["groups"]
    assert rollouts["all"] == 4 and [g["place"] for g in groups] == ["step 1"] * 2 + ["step 2"] * 2
    assert [g["question"] for g in groups] == list(QUESTIONS) and groups[0]["answer"] == "20"
    first = groups[0]["rows"][0]
    assert first["reward"] == 1 and first["advantage"] == 1.2 and first["length"] == 19
    assert first["reason"] == "equal: string" and first["finish_reason"] == "stop"
    assert first["logprobs"] == list(range(0, -19, -1)) and len(first["tokens"]) == 19


def test_rows_of_train_py_and_of_eval_py():
    """What they write is what is read; rows without scores are shown without."""
    response = Response([1, 2], [3, 4, 256], [-0.123456, -2.0, -1e-7], stopped=True)
    response.problem, response.text = Problem("1+1", "2"), "ab"
    response.verdict, response.reward = Verdict(True, "2", "equal: string"), 1.0
    response.advantage = 1.23456789
    row = train.scored_row(response, 7)
    assert row["advantage"] == 1.2346 and row["logprobs"] == [-0.1235, -2.0, -0.0]
    assert {"step": 7, **evaluation.sample_row(response)}.items() <= row.items()
    texts = page.Texts(str)
    assert page.rollout(row, texts)["logprobs"] == [-12, -200, 0]
    old = evaluation.sample_row(response, set="s", id="s row 1", sample=0)
    shown = page.rollout(old, texts)
    assert shown["reward"] == 1.0 and not {"advantage", "logprobs", "tokens"} & shown.keys()
    assert page.place(old) == "s row 1" and page.place(row) == "step 7"


@pytest.mark.parametrize("scores", [None, [], [-1.0], ["a"] * 4, [math.nan] * 4, "abcd", {"a": 1}])
def test_scores_that_are_none_are_left_out(scores):
    row = sample(1, "q", "abc", 1, logprobs=scores)
    assert "tokens" not in page.rollout(row, page.Texts(str))


def test_curves(run):
    curves = data_of(run / "page.html")["curves"]
    rows = metric_rows(6, 3)
    steps, reward = curves["series"]["reward"]
    assert steps == [r["step"] for r in rows] and np.allclose(
        reward, [r["reward"] for r in rows], 1e-4
    )
    assert "step" not in curves["series"] and curves["phases"] == [[1, 3, 2]]


def test_what_the_numbers_mean():
    """By docs/metrics.md: every field of a real run stands once, under the heading it has there,
    with the sentence that explains it."""
    curves = page.curves(page.METRICS.parents[1] / "results" / "tiny" / "seed1")
    cards = {}
    for heading, found in curves["sections"]:
        for names, text in found:
            for name in names:
                assert name not in cards and (name in text or "update_norm/*" in text)
                cards[name] = heading, text
    assert cards.keys() == curves["series"].keys()
    assert cards["reward"][0] == "Rewards" and cards["loss"][0] == "Updates"
    assert cards["reward_group_std"][1].startswith("reward_std: deviation over the batch. reward_")
    assert cards["loss"][1].endswith("Its value says nothing, see above.")
    assert not any(mark in text for _, text in cards.values() for mark in ("`", "**"))
    assert page.sections(["reward", "new/field"])[-1] == ("Others", [(["new/field"], "")])


def test_verdicts_that_are_not_written_are_0(tmp_path):
    rows = [{"step": s, "reward": 0.5} for s in (2, 1, 3)]
    rows[0]["verdict/unparsed"] = 4
    rows += [{"step": 0, "eval/accuracy": 0.25}, {"step": 3, "eval/accuracy": 0.5, "lr": math.nan}]
    jsonl(tmp_path / "metrics.jsonl", rows)
    series = page.curves(tmp_path)["series"]
    assert series["verdict/unparsed"] == [(1, 2, 3), (0, 4.0, 0)]
    assert series["eval/accuracy"] == [(0, 3), (0.25, 0.5)] and "lr" not in series


def test_thinned():
    assert page.thinned([], 3) == [] and page.thinned([1, 2, 3], 3) == [1, 2, 3]
    assert page.thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert page.thinned(list(range(9)), 2) == [3, 8] and page.thinned([1, 2], 1) == [2]


# how large it is --------------------------------------------------------------------------------


def word(i):
    return f" word{i}"[:9]


def deep_table(layers=36, examples=4, tokens=100, seed=0, vocabulary=5000):
    """A table of decompose.py of random numbers, as large as they come: KL to hundreds of nats, any
    token of 5,000 among the likely ones."""
    g = np.random.default_rng(seed)
    shape = layers + 2, examples * tokens
    names = ["embed", *["resid_post"] * layers, "final"]
    return {
        "component": np.array(names),
        "layer": np.array([0, *range(1, layers + 1), layers]),
        "example": np.repeat(np.arange(examples), tokens),
        "position": np.tile(np.arange(tokens), examples),
        "token": g.integers(0, vocabulary, shape[1]),
        "entropy": g.uniform(0, 12, shape),
        "logprob": g.uniform(-99, 0, shape),
        "rank": g.integers(1, 150_000, shape),
        "kl": g.uniform(0, 999, shape),
        "top_ids": g.integers(0, vocabulary, (*shape, 5)),
        "top_probs": g.dirichlet(np.ones(9), shape)[..., :5],
        "meta": dict(vocab_size=151_936, norm="none", temperature=1.0, dtype="float32", run="m"),
    }


def test_two_deep_models_fit(tmp_path, monkeypatch):
    """36 layers, 4 responses of 100 tokens, before and after: below 3 MB, with room for 600 KB of
    responses. Where the page would be larger, responses leave the lens."""
    titles = {i: f"response {i}" for i in range(4)}
    made = page.Measured(["a", "b"], [deep_table(seed=seed) for seed in (0, 1)], titles, word)
    monkeypatch.setattr(page, "look", lambda *_: made)
    jsonl(tmp_path / "metrics.jsonl", metric_rows(700, 100))
    out = page.page(tmp_path)
    (tmp_path / "page.html").write_bytes(out)
    data = data_of(tmp_path / "page.html")
    assert page.MOST_BYTES == 3_000_000 and len(data["lens"]["responses"]) == 4
    assert 1_500_000 < len(out) < page.MOST_BYTES - page.ROLLOUT_BYTES
    series = data["curves"]["series"]
    assert len(series["reward"][0]) == 234 and len(series["eval/accuracy"][0]) == 35
    monkeypatch.setattr(page, "MOST_BYTES", 1_700_000)
    out = page.page(tmp_path)
    (tmp_path / "page.html").write_bytes(out)
    assert len(out) < 1_700_000 and len(data_of(tmp_path / "page.html")["lens"]["responses"]) == 3


def test_responses_that_do_not_fit_are_left_out_evenly(monkeypatch):
    groups = [[sample(step, "q", "a" * 50, 1)] * 4 for step in range(1, 41)]
    all_of_them = page.rollouts(groups, None)
    monkeypatch.setattr(page, "ROLLOUT_BYTES", len(json.dumps(all_of_them)) // 3)
    some = page.rollouts(groups, None)
    assert len(all_of_them["groups"]) == 40 == some["all"]
    assert [group["place"] for group in some["groups"]] == [f"step {k}" for k in range(4, 41, 4)]


# in a browser -----------------------------------------------------------------------------------

HACK = "window.hacked = 1"
HOSTILE = [
    f"</script><script>{HACK}</script>",
    f'<img src=x onerror="{HACK}">',
    f"\"'><svg onload='{HACK}'><style>*{{display:none}}</style>",
    "<!-- <script> \u202egnp.exe \u2066 \u200b \x00\x1b[2J \ud800 \udfff \u2028 &lt;b&gt; \ufeff",
    "a" * 300 + " \u0645\u0631\u062d\u0628\u0627 \U0001f92f e" + "\u0301" * 60,
    "{{7*7}} ${7*7} @DATA@ javascript:alert(1) \\u003c/script>",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if missing():
        pytest.skip(f"needs a browser: no {missing()} on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose every text is meant to break out of the page, or out of its lines."""
    rows = []
    for i, text in enumerate(HOSTILE):
        more = {"logprobs": [-0.7 * k for k in range(9)], "advantage": 1e6}
        row = sample(1, text, text, i % 2, **more)
        row |= {"extracted": text, "reason": text, "answer": text, "finish_reason": text}
        ids = [60, 47, 115, 99, 114, 105, 112, 116, 62]  # </script>
        rows += [
            {**row, "prompt_ids": [1], "ids": ids},
            {**row, "step": None, "id": text, "ids": []},
        ]
    folder = write_run(tmp_path_factory.mktemp("hostile") / "run", rows)
    (folder / "config.json").write_text(json.dumps({"model": HOSTILE[1]}))
    metrics = metric_rows(40, 3)
    for row in metrics:
        step = row["step"]
        row |= dict.fromkeys(HOSTILE, step) | {"__proto__": step, "constructor": -step}
        row |= {"num_tokens": 25_000_000 * step, "sampler_diff/max": -1.5e-7 * step}
    jsonl(folder / "metrics.jsonl", metrics)
    page.main([str(folder)])
    return folder / "page.html"


def test_hostile_texts_stay_in_their_place(hostile):
    """Without a browser: the page has its own tags and no others, and no character that hides."""
    own = Parsed(page.TEMPLATE.read_text("utf-8"))
    text = hostile.read_text("utf-8")
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in own.tags]
    assert parsed.scripts[1] == own.scripts[1]
    data = json.loads(parsed.scripts[0])
    assert any(HACK in group["question"] for group in data["rollouts"]["groups"])
    assert not any(page.printable(c) != c for c in json.dumps(data, ensure_ascii=False))


def test_hostile_texts_in_a_browser(hostile, browser, tmp_path):
    """They are shown, and nothing in them runs; what is put in later is held by the policy."""
    for part in ("lens", "rollouts", "curves"):
        browser.open(hostile, part)
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.run("document.querySelectorAll('td').forEach((one) => one.click())")
        assert browser.errors() == []
        found = browser.run(
            "return [window.hacked, document.querySelectorAll('img, iframe, style, script').length,"
            " document.getElementById('panel-' + arguments[0]).innerText]",
            part,
        )
        assert found[:2] == [None, 3] and "\u202e" not in found[2]
        if part != "lens":
            assert all(text in found[2] for text in HOSTILE[:2])
    code = f"const s = document.createElement('script'); s.textContent = '{HACK}';"
    browser.run(code + "document.body.append(s)")
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in said for said in browser.errors())


# Every line of text in sight: where it is, and whether it leaves the window, its box or a figure,
# or lies on another one. What scrolls in a box of its own is left out.
LAYOUT = """
const lines = [];
const wrong = [];
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width) wrong.push("the page scrolls sideways");
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walk.nextNode(); node; node = walk.nextNode()) {
  const owner = node.parentElement;
  if (!node.data.trim() || !owner.checkVisibility()) continue;
  if (owner.closest(".scroll, select")) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const box = owner.closest("svg, .card, .group, .cell, body").getBoundingClientRect();
  for (const r of range.getClientRects()) {
    const out = r.left < box.left - 1 || r.right > box.right + 1 || r.right > width + 1;
    if (out || r.left < -1) wrong.push(`outside: ${node.data.slice(0, 60)}`);
    if (r.width > 1) lines.push([r, node.data.trim().slice(0, 60), node]);
  }
}
for (const box of document.querySelectorAll("body *:not(svg *)")) {
  const style = getComputedStyle(box);
  if (!box.checkVisibility() || box.closest(".scroll, select")) continue;
  const cut = style.overflowX !== "visible" && box.scrollWidth > box.clientWidth + 1;
  if (cut) wrong.push(`cut: ${box.textContent.slice(0, 60)}`);
}
lines.forEach(([a, text, node], i) => {
  for (const [b, other, second] of lines.slice(i + 1)) {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 4 && node !== second) wrong.push(`overlap: ${text} | ${other}`);
  }
});
return [lines.length, wrong.slice(0, 5)];
"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["run", "hostile"])
def test_nothing_overlaps_or_is_cut(browser, request, which, width):
    path = request.getfixturevalue(which)
    for part in ("lens", "rollouts", "curves"):
        browser.open(path if which == "hostile" else path / "page.html", part, width)
        count, wrong = browser.run(LAYOUT)
        assert count > 20 and wrong == [], part


def text_of(browser, selector):
    return browser.run("return document.querySelector(arguments[0]).innerText", selector)


def nats(cells):
    """The entropy of layer 1 at token 3 as the page says it."""
    x = cells["entropy"][1][2] / 100
    return f"entropy\n{x:.3f} nats" if x < 1 else f"entropy\n{x:.2f} nats"


def test_by_mouse(run, browser):
    """Point at a cell for its five most likely tokens; a click pins its token; switches."""
    data = data_of(run / "page.html")
    response, texts = data["lens"]["responses"][-1], data["texts"]
    browser.open(run / "page.html", "lens")
    cell = "tbody tr:nth-child(3) td:nth-child(4)"  # layer 1, token 3
    browser.pointer(cell)
    own, after = response["models"][1], texts[response["tokens"][2]]
    said = text_of(browser, "#cell")
    assert f"Layer 1, token 3: {after}" in said and "step_000002" in said
    for i in own["top"][1][10:15]:
        assert page.shown(texts[i]).strip() in said
    assert f"rank\n{own['rank'][1][2]}\n" in said and nats(own) in said
    assert text_of(browser, "#pinned").startswith("Token 1,")
    browser.pointer(cell, click=True)
    assert text_of(browser, "#pinned") == f"Token 3, {after}, through the layers"
    lines = browser.run(
        "return [...document.querySelectorAll('#trajectory polyline')]"
        ".map((one) => one.getAttribute('points').split(' ').length)"
    )
    assert lines == [4] * 8  # four quantities of two models at four layers

    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    seen = [browser.run(colour, cell)]
    for i in (2, 3, 4):
        browser.pointer(f"#colours label:nth-of-type({i}) input", click=True)
        seen.append(browser.run(colour, cell))
    assert len(set(seen)) == 4 and "KL" in text_of(browser, "#low")
    browser.pointer("#models label:nth-of-type(1) input", click=True)
    browser.pointer(cell)
    before = response["models"][0]
    said = text_of(browser, "#cell")
    assert "warm-up" in said and nats(before) in said and nats(before) != nats(own)
    assert browser.errors() == []


def active(browser, what="id"):
    return browser.run(f"return document.activeElement.{what}")


def test_by_keyboard(run, browser):
    """Everything without a mouse: tabs, cells, pinning, tokens of a response, steps."""
    browser.open(run / "page.html")
    browser.press("Tab", "Tab")
    assert active(browser) == "tab-lens"
    browser.press("Right", "Right")
    assert active(browser) == "tab-curves" and "mean reward of all" in text_of(browser, "main")
    browser.press("Right")
    for _ in range(6):
        browser.press("Tab")
        if active(browser, "tagName") == "TD":
            break
    browser.press("Right", "Right", "Down")
    assert text_of(browser, "#cell").startswith("Layer 2, token 3:")
    outline = "return getComputedStyle(document.activeElement).outlineWidth"
    assert browser.run(outline) == "3px"
    browser.press("Enter", "End", "Up", "Up")
    assert text_of(browser, "#pinned").startswith("Token 3,")
    last = len(data_of(run / "page.html")["lens"]["responses"][-1]["tokens"])
    assert text_of(browser, "#cell").startswith(f"Layer 3, token {last}:")
    browser.press("Home", "Left", "Down", " ")
    assert text_of(browser, "#pinned").startswith("Token 1,")

    browser.open(run / "page.html", "rollouts")
    browser.run("document.querySelector('.text').focus()")
    browser.press("Right", "Right", "Left")
    assert "token 1, 7: p = 1.000, log-prob 0" in text_of(browser, ".facts")
    browser.open(run / "page.html", "curves")
    browser.run("document.getElementById('step').focus()")
    browser.press("Home", "Right")
    assert text_of(browser, "#stepnow") == "2 of 6"
    assert text_of(browser, "#cards output") == "0.333"


def test_search_and_choices_of_rollouts(run, browser):
    browser.open(run / "page.html", "rollouts")
    found = "#found"
    assert text_of(browser, found) == "12 responses in 4 groups."
    assert text_of(browser, "details[open]").count("advantage +1.20") == 1
    assert text_of(browser, "details[open]").count("advantage \u22120.600") == 2
    browser.run("document.getElementById('search').focus()")
    browser.press(*"boxed{23")
    assert text_of(browser, found) == "4 responses in 4 groups."
    browser.press(*"<")
    assert text_of(browser, found) == "0 responses in 0 groups."
    choose = (
        "const [id, value] = arguments; const one = document.getElementById(id); one.value = value;"
        "one.dispatchEvent(new Event(id === 'search' ? 'input' : 'change'))"
    )
    browser.run(choose, "search", "9+9")
    assert text_of(browser, found) == "3 responses in 1 group."
    browser.run(choose, "verdict", "right")
    assert text_of(browser, found) == "1 response in 1 group."
    browser.run(choose, "search", "")
    browser.run(choose, "from", "step 1")
    assert text_of(browser, found) == "2 responses in 2 groups."


def test_light_and_dark(run, browser):
    """By what the system prefers, until the button is asked; ink that can be read on either."""
    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    browser.open(run / "page.html", dark=True)
    dark = browser.run(colours)
    browser.open(run / "page.html")
    light = browser.run(colours)
    assert light == ["rgb(255, 255, 255)", "rgb(27, 31, 35)"] and dark[0] == "rgb(20, 23, 26)"
    browser.pointer("#theme", click=True)
    assert browser.run(colours) == light and text_of(browser, "#theme") == "Theme: light"
    browser.pointer("#theme", click=True)
    assert browser.run(colours) == dark


# what cannot be shown ---------------------------------------------------------------------------


def ends(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        page.main([str(x) for x in argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "Traceback" not in said[0], said
    return stop.value.code, said[0]


def test_mistakes_end_in_one_line(run, tmp_path, capsys):
    code, said = ends([tmp_path], capsys)
    assert code == 2 and f"page.py: {tmp_path}: nothing to show" in said
    assert ends([run, "--model", tmp_path], capsys)[0] == 2
    assert ends([run, "--limit", "0"], capsys)[0] == 2
    assert ends([run, "--out", tmp_path], capsys)[0] == 3
    byte_model(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A2"'))
    code, said = ends([run, "--model", run / "warm-up", "--before", tmp_path / "other"], capsys)
    assert code == 3 and "vocabularies of the two models differ" in said


def test_each_part_alone(tmp_path, capsys):
    """What is torn or missing costs its own part, which says why; a large model is not read unless
    it is asked for."""
    whole = write_run(tmp_path / "run")
    for torn, lost in (("metrics.jsonl", {"curves"}), ("samples.jsonl", {"rollouts", "lens"})):
        good = (whole / torn).read_bytes()
        (whole / torn).write_bytes(b"\xfftorn {")
        page.main([str(whole)])
        data = data_of(whole / "page.html")
        assert data["notes"].keys() == lost and all(data[part] is None for part in lost)
        (whole / torn).write_bytes(good)
    (whole / "step_000002" / "model.safetensors").write_bytes(b"torn")
    page.main([str(whole)])
    assert data_of(whole / "page.html")["notes"].keys() == {"lens"}


def test_a_large_model_is_read_when_it_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_WEIGHTS", 1000)
    out = tmp_path / "page.html"
    page.main([str(run), "--out", str(out)])
    data = data_of(out)
    assert f"--model {run / 'step_000002'}" in data["notes"]["lens"]
    assert data["rollouts"]["groups"][0]["rows"][0]["tokens"]  # its tokenizer was at hand
    page.main([str(run), "--model", str(run / "step_000002"), "--limit", "2", "--out", str(out)])
    lens = data_of(out)["lens"]
    assert lens["models"] == ["tiny-seed1-step_000002"] and len(lens["responses"]) == 2
