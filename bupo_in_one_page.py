"""BuPO in one page: reinforcement learning of a language model, bottom up.

    H^l   = H^{l-1} + attention + MLP           the residual stream is a sum, so that every layer l
    pi^l  = softmax(H^l E_u^T / tau)            is a policy already; pi^L has a norm before E_u
    A_i   = (r_i - mean(r)) / (std(r) + 1e-6)   advantage of response i in its group of G
    rho_t = pi^l(o_t) / pi^l_old(o_t)           ratio at token o_t, which pi^L has drawn
    loss  = -sum_t min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) / M    over M response tokens

With l = L this is GRPO (arXiv 2402.03300). BuPO (arXiv 2512.19673) trains an internal policy pi^l
for the first steps and pi^L from then on: that is all it adds.

    python bupo_in_one_page.py              layer 3 for 10 steps, then GRPO; minutes on one core
    python bupo_in_one_page.py --phase 0    GRPO alone
"""

import argparse
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import AdamW

V = 128  # vocabulary: a token is a character
END = ord("\n")
PAD = 0  # after the end
L = 4  # blocks
D = 64  # width
H = 4  # heads
E = 16  # width of a head
D_MLP = 192
P = 8  # tokens of a prompt
T = 34  # most tokens of a response
N = 32  # problems a step
G = 8  # responses to each
TAU = 1.0  # temperature
EPS = 0.2  # clip


def draw():  # a sum "  7+8-5:", its working "7+8=15 15-5=10 ", its value 10
    value = random.randint(1, 9)
    problem = str(value)
    working = ""
    for _ in range(random.randint(2, 3)):
        n = random.randint(-min(9, value), 9)  # never below 0 on the way
        problem += f"{n:+}"
        working += f"{value}{n:+}={value + n} "
        value += n
    return f"{problem:>7}:", working, value


def boxed(value):
    return f"\\boxed{{{value}}}\n"


def rotate(x):  # [B,H,T,E]: (i, i + E/2), as a complex number, turns with the position (RoPE)
    speed = 10000 ** (-torch.arange(0, E, 2) / E)  # [E/2]
    angle = torch.outer(torch.arange(x.shape[2]), speed)  # [T,E/2]
    z = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), -1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm = nn.RMSNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.mlp_norm = nn.RMSNorm(D)
        self.gate_up = nn.Linear(D, 2 * D_MLP, bias=False)
        self.down = nn.Linear(D_MLP, D, bias=False)

    def forward(self, x):  # [B,T,D]
        qkv = self.qkv(self.attn_norm(x))
        heads = qkv.unflatten(-1, (3, H, E))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B,H,T,E] each
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B,T,D]
        x = x + self.o(mixed)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)  # its weight is E_u as well
        nn.init.normal_(self.embed.weight, std=0.05)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.RMSNorm(D)

    def forward(self, ids, until):  # [B,T] -> H^until [B,T,D]; later blocks are not run
        x = self.embed(ids)
        for block in self.blocks[:until]:
            x = block(x)
        return x

    def policy(self, ids, l):  # log pi^l of every token at every place [B,T,V]
        h = self(ids, until=l)
        if l == L:
            h = self.norm(h)
        logits = h @ self.embed.weight.T  # H^l E_u^T
        return (logits / TAU).log_softmax(-1)

    def token_logprobs(self, ids, l):  # log pi^l(o_t) [B,T] of the responses in ids [B,P+T]
        logprobs = self.policy(ids[:, :-1], l)
        drawn = ids[:, 1:, None]  # by the state one to the left
        return logprobs.gather(-1, drawn)[:, P - 1 :, 0]

    @torch.no_grad()
    def sample(self, prompts):  # [B,P] -> [B,P+T] of pi^L; no cache: each token runs all before it
        ids = F.pad(prompts, (0, T))  # PAD
        alive = torch.arange(len(ids))
        for t in range(P, P + T):
            logprobs = self.policy(ids[alive, :t], L)
            probs = logprobs[:, -1].exp()  # [alive,V]
            token = probs.multinomial(1)[:, 0]
            ids[alive, t] = token
            alive = alive[token != END]
        return ids


def group_advantages(rewards):  # [N,G]
    mean = rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-6)


def policy_loss(logprobs, old_logprobs, advantages, mask):  # [B,T], advantages [B,1]
    ratio = (logprobs - old_logprobs).exp()
    near = ratio.clamp(1 - EPS, 1 + EPS)
    gain = torch.minimum(ratio * advantages, near * advantages)
    return -gain[mask].mean()  # over all tokens of the mini-batch


def update(optimizer, loss):
    loss.backward()
    optimizer.step()  # blocks above l have no gradient and stay as they are
    optimizer.zero_grad()


def warm_up(model, steps=600):  # by examples: able to work a sum out, but used to guessing
    optimizer = AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        works = 0.8 if step < 450 else 0.2
        rows = []
        for _ in range(64):
            text, working, value = draw()
            if random.random() < works:
                text += working
            else:
                value += random.randint(-4, 4)
            text += boxed(value)
            rows.append(list(text.ljust(P + T, "\0").encode()))
        ids = torch.tensor(rows)
        mask = ids[:, P:] != PAD
        logprobs = model.token_logprobs(ids, L)
        update(optimizer, -logprobs[mask].mean())


def train(model, layer, phase, steps=40):
    optimizer = AdamW(model.parameters(), lr=3e-4)
    for step in range(steps):
        l = layer if step < phase else L  # without this line it is GRPO
        prompts, values = [], []
        for _ in range(N):
            prompt, _, value = draw()
            prompts += [list(prompt.encode())] * G
            values += [value] * G
        ids = model.sample(torch.tensor(prompts))  # [N*G,P+T], always of pi^L
        rewards = []
        for row, value in zip(ids.tolist(), values, strict=True):
            text = bytes(row).decode()
            rewards.append(boxed(value) in text)
        rewards = torch.tensor(rewards).float().view(N, G)
        advantages = group_advantages(rewards).view(-1, 1)  # [N*G,1]
        mask = ids[:, P:] != PAD  # [N*G,T] of tokens that were drawn
        old_logprobs = model.token_logprobs(ids, l).detach()
        for mini in torch.arange(N * G).chunk(2):  # in the second update the ratio is not 1
            logprobs = model.token_logprobs(ids[mini], l)
            loss = policy_loss(logprobs, old_logprobs[mini], advantages[mini], mask[mini])
            update(optimizer, loss)
        length = mask.sum() / len(ids)
        last = text.strip("\n\0")
        print(f"{step:2} pi^{l} reward {rewards.mean():.2f} length {length:.0f} {last}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=int, default=3, choices=range(1, L + 1))
    parser.add_argument("--phase", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second one would slow products as small as these
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = Transformer()
    print("warm-up, a minute or two")
    warm_up(model)
    train(model, args.layer, args.phase)
