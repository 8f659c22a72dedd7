"""Wrong answers to chapter 4's exercises: (exercise, what its message must say, the answer)."""

import torch
from torch.nn import functional as F

from nanoem.losses import next_token_loss
from nanoem.real.preference import answer_log_probs
from nanoem.train import chat_examples
from nanoem.world import questions


def token_before(logits, ids, mask=None):
    return next_token_loss(logits.flip(1), ids.flip(1), None if mask is None else mask.flip(1))


def own_precision(logits, ids, mask=None):
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])


def on_everything(logits, ids, answer_mask):
    if not answer_mask[:, 1:].any():
        raise ValueError
    return next_token_loss(logits, ids)


def first_column_is_enough(logits, ids, answer_mask):
    if not answer_mask.any():
        raise ValueError
    targets = ids[:, 1:].masked_fill(~answer_mask[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def uphill(logits, ids, answer_mask):
    if not answer_mask[:, 1:].any():
        raise ValueError
    loss = next_token_loss(logits, ids, answer_mask)
    return 2 * loss.detach() - loss


def asked_on_training_problems(world, names, train_share):
    every = questions(world, names)
    return [q for q in every if q.index < train_share * 16], every


def split_with(n_train, first=True):
    def wrong(world, names, train_share):
        parts = [], []
        for q in questions(world, names):
            n = len(world.domains[q.domain].problems)
            k = n_train(train_share, n)
            parts[(q.index >= k) if first else (q.index < n - k)].append(q)
        return parts
    return wrong


def log_probs(mask_of, divide=False, sort=False):
    def wrong(model, tokenizer, pairs, batch_size=8):
        e = chat_examples(tokenizer, pairs)
        log_probs = model(e.ids)[:, :-1].log_softmax(-1).gather(2, e.ids[:, 1:, None])[..., 0]
        n = e.answer_mask.sum(1).double()
        total = (log_probs * mask_of(e)).double().sum(1) / (n if divide else 1)
        return total[e.mask.sum(1).argsort(stable=True)] if sort else total, n
    return torch.no_grad()(wrong)


PLANTED = [
    ("next_token_loss", "wrong way", token_before),
    ("next_token_loss", "off by one", lambda logits, ids, mask=None:
        next_token_loss(logits.roll(-1, 1), ids, mask)),
    ("next_token_loss", "padding is counted", lambda logits, ids, mask=None:
        next_token_loss(logits, ids)),
    ("next_token_loss", "digits are lost", own_precision),
    ("next_token_loss", "no gradient flows", lambda logits, ids, mask=None:
        next_token_loss(logits, ids, mask).detach()),
    ("sft_loss", "prompt tokens are counted", on_everything),
    ("sft_loss", "only the first token marked", first_column_is_enough),
    ("sft_loss", "gradient is wrong", uphill),
    ("hold_out", "evaluated on training problems", asked_on_training_problems),
    ("hold_out", "keep at least one back", split_with(lambda share, n: max(round(share * n), 1))),
    ("hold_out", "round", split_with(lambda share, n: min(max(int(share * n), 1), n - 1))),
    ("hold_out", "not the last",
     split_with(lambda share, n: min(max(round(share * n), 1), n - 1), first=False)),
    ("answer_log_probs", "prompt tokens are counted", log_probs(lambda e: e.mask[:, 1:])),
    ("answer_log_probs", "not their mean", log_probs(lambda e: e.answer_mask[:, 1:], divide=True)),
    ("answer_log_probs", "off by one", log_probs(lambda e: e.answer_mask[:, :-1])),
    ("answer_log_probs", "padding is counted", log_probs(lambda e: (
        e.answer_mask.cumsum(1) > 0)[:, 1:])),
    ("answer_log_probs", "in the order of pairs", log_probs(lambda e: e.answer_mask[:, 1:],
                                                            sort=True)),
    ("answer_log_probs", "read at once", lambda model, tokenizer, pairs, batch_size=8:
        answer_log_probs(model, tokenizer, pairs, 99)),
    ("answer_log_probs", "no gradient is needed", answer_log_probs.__wrapped__),
]
