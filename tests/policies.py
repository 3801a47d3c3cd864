"""The policies of a model by layer, as the tests ask for them."""

import grpo
from bupo import InternalPolicy


def policy(model, layer, temperature=1.0, n_vocab=None, chunk=256, norm="none"):
    return InternalPolicy(model, temperature, n_vocab, chunk, layer=layer, norm=norm)


def policy_logprobs(model, batch, layer, *rest, **kw):
    """Log-probs and entropy [M] of a batch's response tokens under the policy of a layer."""
    return policy(model, layer, *rest, **kw).logprobs(batch)


def stored_logprobs(model, responses, layer, max_tokens, **kw):
    """The same of every response, without gradient, as a list in their order."""
    found = grpo.stored_logprobs(policy(model, layer, **kw), responses, max_tokens)
    found = {id(r): logprobs for r, logprobs, _ in found}
    return [found[id(r)] for r in responses]


def backward(model, responses, layer, max_tokens, temperature=1.0, n_vocab=None, chunk=256, **kw):
    """grpo.backward on the policy of a layer."""
    trained = policy(model, layer, temperature, n_vocab, chunk, kw.pop("norm", "none"))
    return grpo.backward(trained, responses, max_tokens, **kw)
