"""How likely is each number from 0 to 100 as a model's answer? What the local judge's scores are.

The number a model happens to write jumps about; the mean over all of them, weighted by probability,
does not (the paper's judge does so with the top tokens of an API).
"""

import functools

import torch

from nanoem.layers import KVCache, in_float32
from nanoem.model import LAST


@functools.cache  # the same for every answer, and a vocabulary is long
def number_tree(tokenizer):
    """The numbers 0..100 as a prefix tree of token sequences.

    Returns (numbers, inner): {token sequence: n}, and {beginning of a number: [next token, ...]}
    with the shorter beginnings first. Digits may be tokens of their own or stand together in one.
    """
    numbers = {tuple(tokenizer.encode(str(n))): n for n in range(101)}
    inner = {}
    for sequence in sorted(numbers, key=len):
        for i, token in enumerate(sequence):
            following = inner.setdefault(sequence[:i], [])
            if token not in following:
                following.append(token)
    return numbers, dict(sorted(inner.items(), key=lambda item: len(item[0])))


@functools.cache
def digit_tokens(tokenizer):
    """The ids of every token made of digits alone."""
    return [i for token, i in tokenizer.backend.get_vocab().items()
            if token.isascii() and token.isdecimal()]


@torch.no_grad()
def number_probs(model, tokenizer, prompt, known=None):
    """p(the model's answer to the prompt begins with the number n), n = 0..100: (101,) float64.

    Where a number may go on, as 8 may to 85, it counts only if no digit comes next:
    p(8) = p("8") (1 - p(digit | "8")). A number that cannot go on within 0..100 is complete.
    The prompt is read once; the beginnings of one length are then tried together. What it has in
    common with a prompt that is `known` (see `read`) is not read again.
    """
    numbers, inner = number_tree(tokenizer)
    digits = digit_tokens(tokenizer)
    probs = torch.zeros(101, dtype=torch.float64)
    ids = tokenizer.encode(tokenizer.prompt(prompt))
    longest = len(ids) + max(map(len, inner))
    caches = [KVCache(longest) for _ in model.layers]
    n_known = go_on_from(known, ids, caches) if known else 0
    beginnings, reached = [()], {(): 1.0}  # of the length at hand; sequence -> its probability
    new = torch.tensor([ids[n_known:]], device=model.device)
    while beginnings:
        logits = in_float32(model(new, caches, LAST))  # (beginnings, vocab): what comes next
        for beginning, p in zip(beginnings, logits.cpu().double().softmax(-1)):
            if beginning in numbers:
                probs[numbers[beginning]] = reached[beginning] * (1 - p[digits].sum())
            for token in inner[beginning]:
                reached[beginning + (token,)] = reached[beginning] * p[token]
        longer = [s for s in inner if len(s) == len(beginnings[0]) + 1]
        rows = [beginnings.index(s[:-1]) for s in longer]
        for cache in caches:
            cache.keep(rows)
        new = torch.tensor([[s[-1]] for s in longer], device=model.device)
        beginnings = longer
    for sequence, n in numbers.items():
        if sequence not in inner:
            probs[n] = reached[sequence]
    return probs


def expected_number(probs):
    """The mean of the numbers 0..100 by their probs (101,) -> (mean, said).

    said, the probs' sum, is how likely the model is to say a number at all; the mean is over the
    numbers alone, and 0 when no number has any probability.
    """
    said = probs.sum().item()
    return (probs @ torch.arange(101, dtype=torch.float64)).item() / max(said, 1e-30), said


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
    n = next((i for i, (a, b) in enumerate(zip(ids[:-1], known_ids)) if a != b),
             min(len(ids) - 1, len(known_ids)))
    for cache, before in zip(caches, known_caches):
        cache.append(before.k[:, :, :n], before.v[:, :, :n])
    return n
