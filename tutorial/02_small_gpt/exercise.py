"""Chapter 2. Fill in the functions; `python -m pytest tutorial/02_small_gpt` tests them."""

import torch
from torch.nn import functional as F  # noqa: F401

from nanoem.layers import KVCache  # noqa: F401
from nanoem.model import sample  # noqa: F401


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis (arXiv 1910.07467).

    x (..., d), weight (d) -> (..., d), a new tensor. Half precision (float16, bfloat16) is normed
    in float32, rounded to the dtype of x, and then multiplied by the weight.

    Hint 1: x.square().mean(-1, keepdim=True) has one number for each vector.
    Hint 2: eps is under the root, so that a vector of zeros is not divided by zero.
    Hint 3: for half precision: x.float(), norm, .to(x.dtype), and only then the weight.
    """
    raise NotImplementedError("rms_norm is not written yet (exercise 2.1)")


def rotate(x, cos, sin):
    """Turn the feature pairs (i, i + head_dim/2) of x (..., T, head_dim) by its angles.

    cos and sin (T, head_dim) are those of every position's angles; columns i and i + head_dim/2
    are equal. Returns a new tensor of x's shape.

    Hint 1: a point (a, b) turned by an angle is (a cos - b sin, b cos + a sin).
    Hint 2: x.chunk(2, dim=-1) are all the a and all the b.
    Hint 3: the a are turned with -b, the b with +a: put (-b, a) side by side, and multiply by sin.
    """
    raise NotImplementedError("rotate is not written yet (exercise 2.2)")


def attend(q, k, v):
    """Causal grouped-query attention: for each query, a mean of the values it may see.

    q (B, n_head, T, head_dim), k and v (B, n_kv, S, head_dim) -> (B, n_head, T, head_dim). Query
    head h reads key and value head h // (n_head / n_kv). The weights are the softmax of
    q . k / sqrt(head_dim) over the keys a query may see: with T = S, token t sees tokens 0 to t;
    with T = 1, the one new token sees all S (the others are in a cache).

    Hint 1: k.repeat_interleave(n_head // n_kv, dim=1) gives each query head its key head.
    Hint 2: scores = q @ k.transpose(-1, -2) / head_dim**0.5 are (B, n_head, T, S).
    Hint 3: torch.ones(T, S, device=q.device).triu(1).bool() is true where a key is in the future of
        a query; set those scores to -inf, before the softmax. With T = 1 nothing is in the future.
    """
    raise NotImplementedError("attend is not written yet (exercise 2.3)")


def next_token_probs(logits, temperature=1.0, top_p=1.0):
    """What the next token is drawn from: logits (B, vocab) -> probabilities (B, vocab), float32.

    softmax(logits / temperature); with top_p < 1 only the fewest likeliest tokens that hold top_p
    of the mass keep any, and they share all of it (nucleus sampling, arXiv 1904.09751).

    Hint 1: probs.sort(-1, descending=True) gives the sorted values and where each one came from.
    Hint 2: a token is out when those before it, without itself, already hold top_p:
        ordered.cumsum(-1) - ordered >= top_p.
    Hint 3: torch.zeros_like(probs).scatter(-1, order, kept) puts them back in their places.
    Hint 4: divide each row by its sum, so that it is a probability again.
    """
    raise NotImplementedError("next_token_probs is not written yet (exercise 2.4)")


@torch.no_grad()
def generate(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
             generator=None, use_cache=True):
    """Continue prompts of one length: ids (B, T) -> (B, T + new), on the model's device.

    `self` is the model, since in nanoem this is a method of GPT: self(ids) are logits
    (B, T, vocab), self.layers its blocks. Sampling is by `generator` (torch's global one if None);
    temperature 0 is greedy (sample knows it). At each step one number is drawn for every row, also
    for those that have stopped. After a row's first stop id the row is filled with that id;
    generation ends early when all have stopped. A stop id in the prompt stops nothing. The same
    seed gives the same text with and without the cache.

    Hint 1: first without a cache: draws = torch.rand(B, 1, generator=generator,
        device=ids.device) picks the next token of every row, (B, 1):
        sample(self(ids)[:, -1], temperature, top_p, draws); torch.cat it to ids, max_new_tokens
        times.
    Hint 2: keep a (B, 1) tensor `stopped`, on ids.device, too; where it is true, take the row's
        last token again (torch.where). A row has stopped when its new token is in stop_ids
        (torch.isin).
    Hint 3: with the cache, caches = [KVCache(T + max_new_tokens) for _ in self.layers], and
        self(new, caches) reads the whole prompt once and then only the newest token.
    """
    raise NotImplementedError("generate is not written yet (exercise 2.5)")


def dropout(x, share, generator):
    """x with a share of its numbers set to 0 and the others enlarged to the same mean.

    Returns a new tensor. Each number of x, of any shape, is dropped by itself, with a chance of
    `share` (0 <= share < 1). `generator`, on x's device, draws which, and torch's global one is not
    used: the same seed drops the same ones, the next call drops others (arXiv 1207.0580).

    Hint 1: torch.rand(x.shape, generator=generator, device=x.device) has a chance for each number
        of x, uniform in [0, 1). Where is it below share?
    Hint 2: a kept number becomes x / (1 - share), so that the mean over many draws is x.
    Hint 3: torch.where(dropped, 0, ...) makes a new tensor, in x's dtype; a gradient goes through.
    """
    raise NotImplementedError("dropout is not written yet (exercise 2.6)")


def orthogonalise(G, steps=5):
    """G (..., rows, cols) with all of its singular values brought near 1 (0.7 to 1.2).

    With G = U S V^T this is close to U V^T. Newton-Schulz iteration: an odd polynomial of X works
    on the singular values alone, and this one drives them to 1 without computing them. Returns a
    new tensor, in G's dtype; each matrix of a batch comes out as if it were alone.

    Hint 1: X = G / (||G|| + 1e-7), with a norm for each matrix, the root of the sum of its squares:
        G.norm(dim=(-2, -1), keepdim=True). Now no singular value is above 1, and a matrix of zeros
        gives no NaN.
    Hint 2: then `steps` times: X = 3.4445 X - 4.7750 A X + 2.0315 A A X, with A = X X^T. (X X^T X
        has X's directions, and each singular value to the power of 3.)
    Hint 3: .mT transposes the last two axes; .T would turn around all axes of a batch.
    Hint 4: if G is tall (rows > cols), iterate on its transpose, where X X^T is smaller, and
        transpose back in the end.
    """
    raise NotImplementedError("orthogonalise is not written yet (exercise 2.7)")
