"""Write WALKTHROUGH.md: one problem of the tiny default, followed through one step of training.

    python -m tools.walkthrough [--out WALKTHROUGH.md]

Opens a run as train.py does, takes the lines of train.train() one by one, and after each prints
what came of it. Prose, excerpts and numbers stand here in the order of the page: to change the
page, change this file. The weights are those of results/tiny/warm-up.
"""

import inspect
import re
import shutil
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import dedent, fill

import torch
import torch.nn.functional as F

import bupo
import train
from experiments import report
from grpo import (
    Policy,
    backward,
    group_advantages,
    plain_token_logprobs,
    policy_loss,
    stored_logprobs,
)
from model import Block, Transformer
from plumbing import metrics
from plumbing.cli import Parser, guarded
from plumbing.optimizer import make_optimizer
from plumbing.rows import each_row
from rollout import Sampler

HOME = Path(__file__).resolve().parents[1]
WARM_UP = HOME / "results/tiny/warm-up"
WATCHED = HOME / "results/tiny/seed1/metrics.jsonl"
# among the step's problems, and among its responses: one that is worked out and right
PROBLEM, RIGHT = 22, 6
TOKENS = 0, 2, 4  # of that response, for the loss by hand


class Page:
    """Markdown, put together from top to bottom."""

    def __init__(self):
        self.parts = []

    def say(self, text):
        """Paragraphs, wrapped anew; headings and what is indented stay as they are."""
        for part in dedent(text).strip("\n").split("\n\n"):
            if not part.startswith(("#", " ", "|")):
                part = " ".join(part.split())
                part = re.sub("`[^`]+`", lambda span: span[0].replace(" ", "\0"), part)
                part = fill(part, 100, break_long_words=False, break_on_hyphens=False)
                part = part.replace("\0", " ")
            self.parts.append(part)

    def code(self, thing, first, last=None):
        """An excerpt of a function: from the line that holds `first` to the next that holds `last`
        (None: to the end). ValueError where the source has no such line any more."""
        thing = inspect.unwrap(thing)
        name = f"{Path(inspect.getsourcefile(thing)).relative_to(HOME)}: {thing.__qualname__}"
        lines = inspect.getsource(thing).splitlines()
        start, end = line_with(lines, first, 0, name), len(lines) - 1
        if last:
            end = line_with(lines, last, start, name)
        text = dedent("\n".join(lines[start : end + 1]))
        self.parts.append(f"`{name}`\n\n```python\n{text}\n```")

    def table(self, head, rows):
        """Columns, with commas between them in `head`, and their values."""
        head = head.split(", ")
        lines = [head, ["---"] * len(head), *rows]
        self.parts.append("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    def __str__(self):
        return "\n\n".join(self.parts) + "\n"


def line_with(lines, words, start, name) -> int:
    for i in range(start, len(lines)):
        if words in lines[i]:
            return i
    raise ValueError(f"{name} has no line with {words!r} any more: mend tools/walkthrough.py")


def num(x, digits=3) -> str:
    """A number in fixed digits, never -0.000."""
    return f"{round(float(x), digits) + 0.0:.{digits}f}"


def token(run, id) -> str:
    """A token as code; a line end by its name."""
    text = run.tokenizer.decode([id])
    return "`\\n`" if text == "\n" else f"`{text}`"


def open_run(folder):
    """A run of the tiny default on a CPU, as train.main opens it, without what it prints."""
    shutil.copytree(WARM_UP, folder / "warm-up")
    args = train.parse(["--seed", "1", "--device", "cpu", "--out", str(folder)])
    with redirect_stdout(StringIO()):
        run = train.open_run(args)
    run.optimizer = make_optimizer(run.model, args)
    return run


# --------------------------------------------------------------------------------------------------
# the page


def beginning(page):
    page.say("""
        # A walkthrough: one problem through one step of training

        This page follows one problem through one step, from its text to what the step has changed.
        The run is `python train.py --seed 1 --out out/seed1`, the tiny default: sums of one-digit
        numbers, a model of four layers, and BuPO (Bottom-up Policy Optimization,
        [arXiv 2512.19673](https://arxiv.org/abs/2512.19673), "the paper") on layer 3. You should
        know transformers. You need not know this code.

        Excerpts are cut out of the source and numbers are printed by the running code:
        `python -m tools.walkthrough` writes this page, and a test compares the two. The weights are
        [`results/tiny/warm-up`](results/tiny/warm-up), which the warm-up of seed 1 has left,
        rounded to bfloat16 to keep the file small. A run of your own makes them again, unrounded,
        so its last digits differ.

        Words: `H^l` is the residual stream after block l. `E_u` is the unembedding. L = 4 is the
        last layer. Read through `E_u`, every `H^l` is a policy:

            pi^l = softmax(H^l E_u^T / tau)          l = 1, 2, 3: an internal layer policy
            pi^4 = softmax(norm(H^4) E_u^T / tau)    the model itself

        The temperature tau is 1 here. BuPO trains an internal policy for some steps, here `pi^3`,
        then `pi^4`. The method of both is GRPO.

        ## The step on one screen
        """)
    page.code(train.train, "layers = run.schedule", "log(metrics.row")
    page.say("""
        Stop 1 and stops 4 to 9 follow these lines. Stops 2 and 3, from ids to policies, come before
        4, for all the others use them. Refills, several policies and the memory of a GPU are left
        out: nothing of them happens here. The tiny default has `--bupo-layer 3` and
        `--bupo-steps 15` (`plumbing/recipes.py`), so at step 1 `layers` is `(3,)`, and there is one
        policy, that of layer 3.

        ## 1. Text to ids
        """)


def text_to_ids(page, run):
    problems = train.next_problems(run, 1, run.args.prompts)
    problem, prompt = problems[PROBLEM]
    page.code(train.next_problems, "return batch", "return batch")
    page.say(f"""
        The step takes {len(problems)} of {len(run.problems):,} problems. Their order is a hash of
        (seed, epoch, index), so a resumed run needs no stored state for it. We follow the
        {PROBLEM + 1}rd of these {len(problems)}, `{problem.question}`, whose answer is
        `{problem.answer}`. Its prompt was made when the run was opened, by
        `plumbing/tokenizer.py: Tokenizer.chat`. The tiny model's tokens are bytes, and its prompt
        is the question and a line end:
        """)
    page.table(f"text, {', '.join(token(run, id) for id in prompt)}", [["id", *prompt]])
    return problems, prompt


@torch.no_grad()
def ids_to_states(page, run, prompt):
    page.say("## 2. Ids to `H^l`")
    page.code(Transformer.forward, "x = self.embed(ids)")
    page.code(Block.forward, "x = x +")
    ids, model, c = torch.tensor([prompt]), run.model, run.model.config
    states = model.residuals(ids)
    equal = "equals" if torch.equal(model(ids, until=3), states.resid_post[2]) else "differs from"
    T = len(prompt)
    page.say(f"""
        `ids` is [1,{T}]; the embedding and every `H^l` are [1,{T},{c.d_model}]. Inside a block the
        queries are [1,{T},{c.n_heads},{c.head_dim}], keys and values
        [1,{T},{c.n_kv_heads},{c.head_dim}], gate and up together [1,{T},{2 * c.d_mlp}], and logits
        would be [1,{T},{c.vocab_size}]: 256 bytes, the end token, and three ids that are no token.
        A block adds to the stream twice,
        `A^l` by attention and `F^l` by its MLP: `H^l = H^(l-1) + A^l + F^l`.
        `model.py: Transformer.residuals` returns all of these.

        Remember `until`. With `until=3` the loop ends after block 3. What comes out {equal} the
        `H^3` of the full forward, bit for bit. At the last token of our prompt the root mean
        squares of writes and stream are
        """)
    stream = zip(states.attn_out, states.mlp_out, states.resid_post, strict=True)
    last, rows = states.resid_post[-1][0, -1], []
    for l, parts in enumerate(stream, 1):
        sizes = [num(x[0, -1].square().mean().sqrt()) for x in parts]
        rows.append([l, *sizes, num(F.cosine_similarity(parts[2][0, -1], last, dim=0))])
    page.table("l, `A^l`, `F^l`, `H^l`, cosine of `H^l` with `H^4`", rows)


@torch.no_grad()
def states_to_policies(page, run, prompt):
    page.say("""
        ## 3. `H^l` to `pi^l`

        **Here the internal policy is computed.** `states` fetches `H^l`, `logprobs` reads it
        through `E_u`:
        """)
    page.code(bupo.InternalPolicy.states, "h = self.model")
    page.code(Policy.logprobs, "h = self.states")
    page.say(f"""
        The first line of `states` runs blocks 1 to `self.layer`, here 3, and no block after them.
        The second picks the positions at which response tokens are drawn. The last applies the
        final norm at l = 4 only (`model.py: Transformer.norm_at`). For l < 4 the paper has no norm,
        so the length of `H^l` acts as an inverse temperature. The two `if` are `--internal-norm`,
        which is off.

        In `logprobs`, `E` is the same for every layer, and `n_vocab` is {run.n_vocab}: ids from
        there on are no tokens. `token_logprobs` takes care never to hold all logits at once. What
        it computes, as one would write it down:
        """)
    page.code(plain_token_logprobs, "logits =", "return")
    page.say("""
        All of GRPO works on such a policy, and `bupo.py: InternalPolicy` replaces `states` and
        nothing else: that is how BuPO's loss differs from GRPO's.

        What the four policies would say after the prompt and after `3+4=`, each with its first
        three tokens and its entropy in nats:
        """)
    ids = torch.tensor([prompt + run.tokenizer.encode("3+4=")])
    rows = []
    for l, h in enumerate(run.model.residuals(ids).resid_post, 1):
        row = [f"`pi^{l}`"]
        for at in len(prompt) - 1, -1:
            logprobs = run.model.unembed(h[0, at], l)[: run.n_vocab].log_softmax(-1)
            p = logprobs.exp()
            best = zip(*(x.tolist() for x in p.topk(3)), strict=True)
            row.append("  ".join(f"{token(run, id)} {num(x, 2)}" for x, id in best))
            row.append(num(-(p * logprobs).sum()))
        rows.append(row)
    page.table("policy, after the prompt, entropy, after `3+4=`, entropy", rows)
    page.say("""
        `\\` begins `\\boxed{}`, a guess. `3` begins to work the sum out. The model prefers to
        guess, layer 3 even more so. After `3+4=` the model is sure of `7`; layer 3 gives it half of
        its mass. Layers 1 and 2 spread theirs over many tokens: their states are made for the next
        block to read, not for `E_u`.
        """)


def draw(page, run, problems):
    groups = train.sample(run, problems, run.args.group, noise=(1, 0))
    groups = train.grade_and_gather(run, groups, problems)
    response = groups[PROBLEM][RIGHT]
    page.say("## 4. Responses, drawn from `pi^4`")
    page.code(Sampler.step, "h = self.net(", "token = torch.where")
    page.say(f"""
        `train.py: sample` draws {run.args.group} responses to each of the {len(groups)} problems.
        `self.net` is the whole model, and `unembed` without a layer is `pi^4`. `bias` is minus
        infinity for ids that are no token, `greedy` is off. **Responses are
        always drawn from the model itself**, whichever layer is trained. It is the model whose
        answers are to become right. `rollout.py: race` draws a
        token with probability in proportion to its weight. Its noise is a hash of (seed, step,
        problem, sample, token). Ids and log-probs stay together in one `rollout.py: Response`, and
        are never tokenised again.

        Response {RIGHT + 1} to our problem is `{response.text}`, {len(response.ids)} tokens with
        the end token, which is trained like any other. The sum of their log-probs is
        {num(sum(response.logprobs))}; the first token, at which the model could have guessed, has
        {num(response.logprobs[0])} of it.
        """)
    return groups, response


def judge(page, run, groups):
    group = groups[PROBLEM]
    page.say("## 5. Verdict, reward, advantage")
    page.code(train.reward, "right = response.verdict", "right = float")
    page.say(f"""
        `eval.py: grade` decodes a response and asks `verify.py: grade`. The last `\\boxed{{}}`
        counts, and what is in it must equal the answer, {group[0].problem.answer}.
        `train.py: reward` makes 1 or 0 of the verdict; its `if` is a control that is off, and
        `stopped` says that the response ended by itself and not at the limit.
        """)
    rewards = torch.tensor([[r.reward for r in group] for group in groups])
    advantages = group_advantages(rewards, run.args.advantage)  # [N,G]
    for responses, row in zip(groups, advantages.tolist(), strict=True):
        for response, advantage in zip(responses, row, strict=True):
            response.advantage = advantage
    page.code(group_advantages, "advantages = rewards - ", "(rewards.std")
    rows = []
    for i, r in enumerate(group, 1):
        said = f"`{r.text}`", len(r.ids), r.verdict.reason
        rows.append([i, *said, int(r.reward), num(r.advantage, 4)])
    page.table("response, text, tokens, verdict, reward, advantage A", rows)
    mean, deviation = num(rewards[PROBLEM].mean(), 2), num(rewards[PROBLEM].std(), 4)
    every = [response for group in groups for response in group]
    guessed = [r for r in every if r.text.startswith("\\boxed")]
    worked = [r for r in every if "=" in r.text]
    solved, lucky = (sum(map(metrics.is_right, some)) for some in (worked, guessed))
    page.say(f"""
        By hand: the mean reward of the group is {mean}, its sample deviation {deviation}. A right
        response gets (1 - {mean}) / {deviation} = {num(group[RIGHT].advantage, 4)}, a wrong one
        (0 - {mean}) / {deviation} = {num(group[0].advantage, 4)}. Every token of a response has
        this A. The lucky guess gets as much as the worked answer, because the steps of a sum earn
        nothing. But of the {len(every)} responses of this step {len(worked)} work the sum out, and
        {solved} of these are right; of the {len(guessed)} that guess it is {lucky}. So over many
        groups working wins. In a group of equal rewards A is 0: it teaches nothing.
        """)


def keep_old(page, run, policy, groups):
    minis, response = train.mini_batches(groups, run.args), groups[PROBLEM][RIGHT]
    seen, before = train.before_updates(run, groups), layers_on(run, response)
    train.keep_logprobs(run, policy, minis)
    page.say("## 6. Before any update: `pi^3_old`")
    page.code(train.keep_logprobs, "args, layer =", "response.old_logprobs")
    page.say(f"""
        The step makes {len(minis)} updates (`train.py: mini_batches`), each on the responses to
        {run.args.mini_prompts} problems. Ours is in the second. Both are measured against the
        policy as it is now, `pi^3_old`, so its log-probs are stored: those of layer 3, on tokens
        that `pi^4` has drawn. The first, third and fifth token of our response:
        """)
    old, rows = response.old_logprobs[3], []
    for t in TOKENS:
        drawn = response.logprobs[t]
        numbers = num(drawn, 4), num(old[t], 4), num((old[t] - drawn).exp(), 4)
        rows.append([token(run, response.ids[t]), *numbers])
    page.table("token, `log pi^4` as drawn, `log pi^3_old`, `pi^3_old / pi^4`", rows)
    every = [r for mini in minis for r in mini]
    ratio = torch.cat([r.old_logprobs[3] - torch.tensor(r.logprobs) for r in every]).exp()
    far = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    page.say(f"""
        **Why the ratio will be `pi^3 / pi^3_old` and not `pi^3 / pi^4`.** The ratio measures how
        far the updates have moved the policy that is trained. It must begin at 1, so that the clip
        acts on movement alone. `pi^3 / pi^4` does not: of the step's {len(ratio):,} tokens
        {num(100 * far, 1)} % would be outside [0.8, 1.2] before anything is learned. The price is
        that tokens drawn from `pi^4` are not what `pi^3` would draw. Nothing corrects for that,
        here as in the paper.

        As a check, `train.py: before_updates` computes `log pi^4` too. The sampler's and the
        trainer's differ by {"less" if seen["sampler_diff/max"] < 1e-5 else "more"} than 0.00001.
        """)
    return minis, before


def layers_on(run, response) -> list[tuple[float, float]]:
    """(mean log-prob, mean entropy) of a response under the policy of every layer."""
    out = []
    for l in range(1, run.model.config.n_layers + 1):
        [(_, logprobs, entropy)] = stored_logprobs(run.policy(l), [response], 4096)
        out.append((logprobs.mean().item(), entropy.mean().item()))
    return out


def parts_of(model) -> dict:
    """The model's parameters by part, from the bottom up."""
    blocks = {f"block {i}": list(block.parameters()) for i, block in enumerate(model.blocks, 1)}
    return {"embedding": [model.embed.weight], **blocks, "final norm": [model.norm.weight]}


def first_update(page, run, policy, mini):
    page.say("## 7. Update 1: which blocks get a gradient")
    train.gradient(run, policy, mini)
    sizes = {}
    for name, parameters in parts_of(run.model).items():
        norms = [p.grad.norm() for p in parameters if p.grad is not None]
        sizes[name] = num(torch.stack(norms).norm()) if norms else "None"
    norm = train.clip(run)
    train.optimizer_step(run, mini, norm)
    page.code(backward, "value = (", "value.backward()")
    page.say(f"""
        `train.py: gradient` calls this, first for the other {run.args.mini_prompts} problems. In
        the first update every ratio is 1, and the gradient is that of the mean of -A `log pi^3`
        over the tokens of this mini-batch. (`surrogate` is the loss of stop 8 and `weight` is 1 / M
        of there; `kl` is 0, there is no KL term.) What it leaves in `.grad`:
        """)
    rows = []
    for name, parameters in parts_of(run.model).items():
        held = "yes" if parameters[0] in run.optimizer.state else "none"
        rows.append([name, sizes[name], held])
    page.table("part, norm of `.grad`, moments in AdamW after the update", rows)
    page.say(f"""
        `train.py: clip` leaves it as it is, for its norm {num(norm)} is below
        {run.args.grad_clip}. `E_u` is a part of `pi^3` and learns in every phase. In this model it
        is the embedding too, as in many small ones, so that one matrix learns at both ends, and
        `pi^4` moves through it as well.

        **Why the blocks above have no gradient.** `pi^3` is a function of `H^3`, and `H^3` one of
        the embedding and blocks 1 to 3. Block 4 and the final norm come after it and are no part of
        that function: no path leads to them from the loss, so their `.grad` is None, and `until`
        saves running them. In the paper's code they are run and ignored, and the gradient that the
        optimizer sees is *zero*. To AdamW that is another thing:

            w = (1 - lr decay) w - lr m / (sqrt(v) + eps)      m, v: moments, bias corrected

        A parameter whose gradient is None is skipped. One with a gradient of zero still decays, and
        what earlier steps have left in m still moves it. At step 1 there is nothing in m. But let
        layers 2 and 3 take turns: with zeros, every step of layer 2 would push block 3 on along its
        old direction, by no reward of that step. `train.py: optimizer_step` sets gradients back to
        None for the same reason.
        """)


def second_update(page, run, policy, mini, response):
    now = {id(r): x for r, x, _ in stored_logprobs(policy, mini, run.args.micro_tokens)}
    new, old = now[id(response)], response.old_logprobs[3]
    ratio, A = (new - old).exp(), torch.full_like(old, response.advantage)
    loss, _, silenced = policy_loss(new, old, A)
    before = dict(run.meter.sums)
    train.gradient(run, policy, mini)
    sums = {name: run.meter.sums[name] - before[name] for name in before}
    train.optimizer_step(run, mini, train.clip(run))
    page.say("""
        ## 8. Update 2: ratio, clip and loss of three tokens

        Update 1 has moved the weights, though on other problems. Our response is in the second
        mini-batch, and now its ratios say something:
        """)
    page.code(policy_loss, "ratio = (logprobs", "plain = -advantages")
    page.code(policy_loss, "near = ratio.clamp", "loss = torch.maximum")
    page.say("""
        Between the two stand other objectives, which are off, and after them a bound for A < 0 and
        ratios above 10, of which there is none here.
        """)
    rows = []
    for t in TOKENS:
        slope = 0.0 if silenced[t] else -ratio[t] * A[t]
        values = old[t], new[t], ratio[t], ratio[t].clamp(0.8, 1.2), loss[t], slope
        rows.append([token(run, response.ids[t]), *(num(x, 4) for x in values)])
    page.table("token, `log pi^3_old`, `log pi^3`, ratio, clipped, loss, slope", rows)
    high, t, _ = TOKENS
    A, M, each = num(A[0], 4), sums["tokens"], num(loss[t], 4)
    far = 100 * (sums["clip_low"] + sums["clip_high"]) / M
    page.say(f"""
        By hand, with A = {A}. Token {token(run, response.ids[t])}: the ratio is
        exp({num(new[t], 4)} + {num(-old[t], 4)}) = {num(ratio[t], 4)}, inside [0.8, 1.2], so the
        loss is -{num(ratio[t], 4)} x {A} = {each}. The slope, d loss / d `log pi^3`, is -ratio x A,
        the same number. Token {token(run, response.ids[high])}: its ratio {num(ratio[high], 4)} is
        above 1.2, so the loss is -1.2 x {A} = {num(loss[high], 4)}, a constant, and the slope is 0.
        Update 1 has raised this token enough; the clip silences it until the next step. Where A < 0
        the same happens below 0.8.

        Each token weighs 1 / M, with M = {M:,} response tokens in this mini-batch: the second of
        the three adds {each} / {M:,} = {num(loss[t] / M, 6)}. All together the loss is
        {num(sums["loss"])}, and {num(far, 1)} % of the tokens are silenced. Do not read anything
        into its value ([why](docs/metrics.md)); its gradient does the work.
        """)


def changes(page, run, policy, groups, response, before):
    row = train.after_updates(run, [policy], groups)
    after, parts = layers_on(run, response), parts_of(run.model)
    page.say("""
        ## 9. dW, and what has changed

        `plumbing/metrics.py: weights_change` compares the weights with those before the step,
        |dW| / |W|:
        """)

    def size(part):
        """Root mean square of a part's weights."""
        weights = torch.cat([w.detach().flatten() for w in parts[part]])
        return num(weights.square().mean().sqrt(), 2)

    moved = [value for name, value in row.items() if name.startswith("update_norm")]
    page.table(f"{', '.join(parts)}", [[num(x, 5) if x else "0" for x in moved]])
    page.say(f"""
        At first AdamW moves every weight by about lr = {run.args.lr:g} an update, however large its
        gradient: two updates, over weights whose root mean square is {size("block 1")} in block
        1 and {size("embedding")} in the embedding. (The same way twice would be 0.0002 over these;
        the two updates do not go quite the same way.) Block 4 and the final norm are what they
        were, bit for bit. The sampler reads these same weights, so the next step draws from the new
        `pi^4`. Our response under all policies, means over its {len(response.ids)} tokens:
        """)
    rows = []
    for l, (old, new) in enumerate(zip(before, after, strict=True), 1):
        rows.append([f"`pi^{l}`", num(old[0]), num(new[0]), num(old[1]), num(new[1])])
    page.table("policy, log-prob before, after, entropy before, after", rows)
    page.say("""
        `pi^3` was trained and has changed most. `pi^4` has come along a little, for it is made of
        the same `H^3`. [This figure](results/tiny/entropy_flow.png) has the entropies before and
        after a whole run: 15 steps like this one, then 45 of GRPO on `pi^4`. (Its `H^4` is read
        without the norm; `pi^4` is the point called final.)
        """)


def phase(page, run, policy, groups):
    whole = run.policy(run.model.config.n_layers)
    right = [r for group in groups for r in group if metrics.is_right(r)][:64]
    seen = bupo.look(policy, whole, right, run.args.micro_tokens)
    page.say("""
        ## 10. Why the phase is short

        The loss of an internal phase holds `pi^3` and nothing of `pi^4`. But

            pi^4 = softmax(norm(H^3 + A^4 + F^4) E_u^T)

        Every step changes `H^3`, on which `A^4` and `F^4` depend too. Block 4 was made for the old
        `H^3`, and it cannot adapt: it has no gradient. At first what is good for `pi^3` may be good
        for `pi^4` too. But `H^3` is being made into a finished answer, which is not what block 4
        has learned to read, and nothing in the loss says when `pi^4` begins to lose. It is `pi^4`
        that draws the responses and that you keep. The paper sees it collapse in long phases. So
        the phase ends early, and GRPO on `pi^4` then trains all blocks together. That is the
        argument. On the tiny model, by 8 seeds with their intervals
        ([more](docs/results.md#how-long-should-the-phase-be)), no phase beats none, long ones cost
        something, and nothing collapses. Of 40 steps the first ones train layer 3, the rest the
        model; accuracy is that on 256 held-out problems at the end:
        """)
    lengths, made = ("0", "5", "15", "25", "40"), report.Report(HOME)
    accuracies = [made.number(f"length/{n}", None, "accuracy", "end") for n in lengths]
    paired = [made.number(f"length/{n}", "0", "accuracy", "end") for n in lengths[1:]]
    rows = ["accuracy", *accuracies], ["minus none, same seeds", "", *paired]
    page.table(f"steps of layer 3, {', '.join(lengths)}", rows)
    logged = {row["step"]: row for row in each_row(WATCHED)}
    perplexity = ", ".join(num(logged[step]["watch/perplexity"], 2) for step in (1, 5, 10, 15))
    before, after = (num(logged[step]["eval/accuracy"], 2) for step in (0, 10))
    page.say(f"""
        Two flags watch the phase. `--watch-layers 5`, on in the tiny default: every five steps
        `train.py: watch` measures layer and model on the responses of step 1. `watch/perplexity` is
        the model's. It also rises when the model learns to answer otherwise, so it alone says
        little: in [the whole run](results/tiny/seed1/metrics.jsonl) it is {perplexity} at steps 1,
        5, 10 and 15, while held-out accuracy goes from {before} to {after} in ten steps. Alarming
        is a rise while `reward` falls.

        `--bupo-steps auto`: the phase ends by itself. After each step `bupo.py: look` takes two
        means over the tokens of at most 64 right responses. After this step they are:
        """)
    forgotten = "`guard/forgotten`", "`log pi^4` before the step - `log pi^4` now"
    agreement = "`guard/agreement`", "`log pi^3` - `log pi^4`"
    rows = [[*row, num(seen[row[0].strip("`")], 4)] for row in (forgotten, agreement)]
    page.table("name, mean of, nats a token", rows)
    page.code(bupo.is_over, "rows = [row")
    page.say("""
        `guard/forgotten` below 0 says that the model itself has gained. `guard/agreement` is, on
        right responses, an estimate of -KL(pi^4 || pi^3): the higher, the closer. The phase is over
        when the model has lost on average over three steps (`patience`), or when `pi^3` has come no
        closer to it in three.
        """)


def schedule(page, run):
    page.say("""
        ## 11. The schedule, and two layers in turn

        A step asks in its first line which layers it trains. The answer follows from the step alone
        (of `auto`, from the logged rows too), so a resumed run is in the same phase:
        """)
    page.code(bupo.Schedule.layers_at, "def layers_at")
    page.say("""
        `--bupo-layer` names the layer of each phase and `--bupo-steps` its length in steps
        (`bupo.py: Schedule.parse`); the last step of `auto` is infinity. After the phases comes
        layer 4, the whole model. Which layer is trained at steps 1 to 6:
        """)
    rows = []
    for flags in ("3 15", "2,3,2,3 1,1,1,1", "2,3 3,2", "2+3 4", "none 30"):
        layers, steps = flags.split()
        plan = bupo.Schedule.parse(layers, steps, run.model.config.n_layers)
        each = ["+".join(map(str, plan.layers_at(step))) for step in range(1, 7)]
        rows.append([f"`--bupo-layer {layers} --bupo-steps {steps}`", *each])
    page.table("flags, 1, 2, 3, 4, 5, 6", rows)
    page.say("""
        Two layers in turn are phases of one step each. Look at the plan first, then train:

            python train.py --bupo-layer 2,3,2,3 --bupo-steps 1,1,1,1 --dry-run
            python train.py --bupo-layer 2,3,2,3 --bupo-steps 1,1,1,1 --seed 1 --out out/in-turn

        In `out/in-turn/metrics.jsonl`, `inter/layer` says which layer each step has trained. More
        turns are longer lists. Turns without end are one line, put before the loop of `layers_at`:

            return (3 - step % 2,)  # 2, 3, 2, 3, ...

        The loop in `train.py: train` needs no other change: it makes a policy of every layer it is
        told, and all that follows works on a policy. But flags and code now say different things.
        What is printed at the start, `config.json` and `--watch-layers` follow the flags, so give
        flags that come near (`--bupo-layer 2,3 --bupo-steps 1,1`); a resumed run does not notice,
        so give an `--out` of its own; block 4 never learns; and the tests of the schedule will say
        that it is another one. [An exercise](docs/solutions/README.md#in_turn) makes a flag of it.

        ## Where to change what

        | to change | look at |
        |---|---|
        | how a state becomes a policy | `bupo.py: InternalPolicy.states` |
        | which layer, and when | `bupo.py: Schedule.layers_at` |
        | when a phase ends by itself | `bupo.py: is_over` |
        | what an answer is worth | `train.py: reward` |
        | the baseline | `grpo.py: group_advantages` |
        | ratio and clip | `grpo.py: policy_loss` |
        | what a token weighs | `grpo.py: response_weights` |
        | how a token is drawn | `rollout.py: Sampler.step` |
        | how answers are compared | `verify.py: grade` |
        | what a step logs | `plumbing/metrics.py: row` |

        [Exercises](docs/exercises.md) has something to try in each file.
        [Metrics](docs/metrics.md) explains every number of a run, [decisions](docs/decisions.md)
        where the paper is silent or its code differs.
        """)


def walk() -> str:
    """The page."""
    page = Page()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(Path(folder) / "run")
        policy = run.policy(*run.schedule.layers_at(1))
        beginning(page)
        problems, prompt = text_to_ids(page, run)
        ids_to_states(page, run, prompt)
        states_to_policies(page, run, prompt)
        groups, response = draw(page, run, problems)
        judge(page, run, groups)
        minis, before = keep_old(page, run, policy, groups)
        first_update(page, run, policy, minis[0])
        second_update(page, run, policy, minis[1], response)
        changes(page, run, policy, groups, response, before)
        phase(page, run, policy, groups)
        schedule(page, run)
    return str(page)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("WALKTHROUGH.md"), help="file to write")
    args = parser.parse_args(argv)
    args.out.write_text(walk(), encoding="utf-8")


if __name__ == "__main__":
    guarded(main)
