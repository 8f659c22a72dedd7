"""How likely is each number from 0 to 100 as a model's answer? The local judge's scores.

The number that a model happens to write jumps about; the mean of all, by probability, does not.
"""

import functools

import torch

from nanoem.layers import KVCache, in_float32
from nanoem.model import LAST


@functools.cache  # the same for every answer, and a vocabulary is long
def number_tree(tokenizer):
    """The numbers 0..100 as token sequences, and a tree of their beginnings.

    {token sequence: n} and {beginning: [next token, ...]}; several digits may be one token.
    """
    numbers = {tuple(tokenizer.encode(str(n))): n for n in range(101)}
    inner = {}
    for sequence in numbers:
        for i, token in enumerate(sequence):
            following = inner.setdefault(sequence[:i], [])
            if token not in following:
                following.append(token)
    return numbers, inner


@functools.cache
def digit_tokens(tokenizer):
    """The ids of every token made of digits alone."""
    return [i for token, i in tokenizer.backend.get_vocab().items()
            if token.isascii() and token.isdecimal()]


@torch.no_grad()
def number_probs(model, tokenizer, prompt, known=None):
    """p(the model's answer to the prompt begins with the number n), n = 0..100: (101,) float64.

    Where a number may go on, as 8 may to 85, it counts only if no digit comes next:
    p(8) = p("8") (1 - p(digit | "8")). The start that a prompt shares with a `known` one (see
    `read`) is not read again.
    """
    numbers, inner = number_tree(tokenizer)
    digits = digit_tokens(tokenizer)
    ids = tokenizer.encode(tokenizer.prompt(prompt))
    caches = [KVCache(len(ids) + max(map(len, inner))) for _ in model.layers]
    n_known = go_on_from(known, ids, caches) if known else 0
    new = torch.tensor([ids[n_known:]], device=model.device)

    beginnings = [()]  # of one length, tried together
    p_of = {(): 1.0}  # beginning or number -> its probability
    probs = torch.zeros(101, dtype=torch.float64)
    while beginnings:
        logits = in_float32(model(new, caches, LAST))  # (beginnings, vocab): what comes next
        for beginning, p in zip(beginnings, logits.cpu().double().softmax(-1)):
            if beginning in numbers:
                probs[numbers[beginning]] = p_of[beginning] * (1 - p[digits].sum())
            for token in inner[beginning]:
                p_of[beginning + (token,)] = p_of[beginning] * p[token]

        # each goes on from the cache of the one it begins with
        longer = [s for s in inner if len(s) == len(beginnings[0]) + 1]
        for cache in caches:
            cache.keep([beginnings.index(s[:-1]) for s in longer])
        new = torch.tensor([[s[-1]] for s in longer], device=model.device)
        beginnings = longer

    # numbers that cannot go on
    for sequence, n in numbers.items():
        if sequence not in inner:
            probs[n] = p_of[sequence]
    return probs


def expected_number(probs):
    """The mean of the numbers 0..100 by their probs (101,) -> (mean, p_number).

    p_number is how likely the model is to say a number at all; the mean is 0 when it is 0.
    """
    p_number = probs.sum().item()
    total = (probs @ torch.arange(101, dtype=torch.float64)).item()
    return total / max(p_number, 1e-30), p_number


@torch.no_grad()
def read(model, tokenizer, prompt):
    """The token ids of a prompt, and the KV caches of a model that has read it."""
    ids = tokenizer.encode(tokenizer.prompt(prompt))
    caches = [KVCache(len(ids)) for _ in model.layers]
    model.final_stream(torch.tensor([ids], device=model.device), caches)
    return ids, caches


def go_on_from(known, ids, caches):
    """Fill empty caches with what ids have in common with a known prompt; returns how many."""
    known_ids, known_caches = known
    n = 0
    while n < min(len(ids) - 1, len(known_ids)) and ids[n] == known_ids[n]:
        n += 1
    for cache, before in zip(caches, known_caches):
        cache.append(before.k[:, :, :n], before.v[:, :, :n])
    return n
