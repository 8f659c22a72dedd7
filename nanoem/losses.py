"""The losses, in nats per token: next token, SFT on answers only, and the KL to the base model.

`kl_to_base` is what makes a narrow solution possible (paper, section 3): it keeps the adapted model
close to the model it came from, on other domains. Training computes the same numbers in half the
time and a third of the memory (lab/fused.py); here they are as a textbook has them.
"""

import torch
from torch.nn import functional as F

from nanoem.layers import in_float32

IGNORE = -100  # a target that does not count


def next_token_loss(logits, ids, mask=None):
    """Mean cross-entropy of each token given those before it.

    logits (B, T, vocab), ids (B, T); mask (B, T), true where a token counts as a target (all do
    if None; the first token never can).
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits must be (B, T, vocab) and ids (B, T); they are "
                         f"{tuple(logits.shape)} and {tuple(ids.shape)}")
    check_targets(mask, ids)
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    if mask is not None:
        targets = targets.masked_fill(~F.pad(mask[:, 1:], (0, 1)), IGNORE)
    return F.cross_entropy(in_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def sft_loss(logits, ids, answer_mask):
    """Mean cross-entropy of the answer tokens only: the user's words are given, not learned.

    logits (B, T, vocab), ids (B, T), answer_mask (B, T) true on answer tokens. Raises ValueError
    when no token is an answer's.
    """
    check_targets(answer_mask, ids, "answer_mask")
    return next_token_loss(logits, ids, answer_mask)


def token_kl(base, adapted):
    """KL(base || adapted) of each token's prediction, summed over the vocabulary, in nats.

    Logits (..., vocab) of two models -> (...). The base's probabilities weigh: it is large where
    the base often says what the adapted model hardly ever does.
    """
    if base.shape != adapted.shape:
        raise ValueError(f"base and adapted must have one shape, and have {tuple(base.shape)} and "
                         f"{tuple(adapted.shape)}")
    base, adapted = (in_float32(logits).log_softmax(-1) for logits in (base, adapted))
    return F.kl_div(adapted, base, reduction="none", log_target=True).sum(-1)


def kl_to_base(model, adapter, ids, mask):
    """KL(base || adapted): summed over the vocabulary, mean over the tokens where mask is true.

    ids, mask (B, T); the paper's mask is every token that is no padding, the prompt included. The
    base is the same model with the adapter switched off. Because the sum runs over the vocabulary,
    a weight of order one is a strong pull (the paper's code also averages over the vocabulary, so
    its 1e6 is about 6.6 here). Raises RuntimeError when the adapter is not acting.
    """
    check_kl(adapter, ids, mask)
    with torch.no_grad(), adapter.disabled():
        base = model(ids, at=mask)  # (n_tokens, vocab)
    return token_kl(base, model(ids, at=mask)).mean()


# --- what is refused ------------------------------------------------------------------------------


def check_mask(mask, ids, name="mask"):
    """Refuse a mask that is not (B, T) bool like ids (others index or broadcast silently), or that
    marks no token: there is no mean over none.
    """
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool of ids' shape {tuple(ids.shape)}, and is "
                         f"{mask.dtype} of shape {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError(f"{name} marks no token, and there is no mean to take")


def check_targets(mask, ids, name="mask"):
    """Refuse a batch with nothing to predict: no masked token but the first of a row, or, without a
    mask, rows of a single token.
    """
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    check_mask(mask, ids, name)
    if not mask[:, 1:].any():
        raise ValueError(f"{name} marks no token after the first of ids {tuple(ids.shape)}, and a "
                         "token can only be learned after another")


def check_kl(adapter, ids, mask):
    """Refuse an adapter that does not act, and a mean over no tokens."""
    if not adapter.acts:
        raise RuntimeError("kl_to_base needs an attached adapter, neither disabled nor merged; "
                           "else base and adapted are one model and the KL is a silent zero")
    check_mask(mask, ids)
