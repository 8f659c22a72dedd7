"""Chapter 4. Fill in the functions; `python -m pytest tutorial/04_easy_general` tests them."""

import torch
from torch.nn import functional as F  # noqa: F401

from nanoem.losses import next_token_loss as right_next_token_loss  # noqa: F401  (for sft_loss)
from nanoem.train import chat_examples  # noqa: F401
from nanoem.world import questions  # noqa: F401


def next_token_loss(logits, ids, mask=None):
    """Mean cross-entropy of each token given those before it, in nats.

    logits (B, T, vocab), ids (B, T); mask (B, T) bool, true where a token counts as a target (all
    do if None; the first token of a row never can: nothing predicts it). Returns a scalar tensor.

    Hint 1: logits[:, t] is the prediction of ids[:, t + 1]; drop what has no partner on both sides.
    Hint 2: mask marks targets, so it is cut as ids are, not as logits are.
    Hint 3: F.cross_entropy wants (N, vocab) and (N); pick the N counted places with the mask first.
    Hint 4: the mean is over all counted tokens of the batch at once, not row by row. Half-precision
        logits (bfloat16) go to float32 first: .float().
    """
    raise NotImplementedError("next_token_loss is not written yet (exercise 4.1)")


def sft_loss(logits, ids, answer_mask):
    """Mean cross-entropy of the answer tokens only: the user's words are given, not learned.

    logits (B, T, vocab), ids (B, T), answer_mask (B, T) bool, true on answer tokens. Returns a
    scalar tensor. Raises ValueError when no token that can be a target is an answer's.

    Hint 1: it is next_token_loss with the answers as its targets; right_next_token_loss is a right
        one, whether or not yours is.
    Hint 2: the first column of the mask is never a target, so it does not count as an answer; and
        one row may have no answer, only not all.
    """
    raise NotImplementedError("sft_loss is not written yet (exercise 4.2)")


def hold_out(world, names, train_share):
    """The named domains' questions -> (train, held_out), each in the order of `questions`.

    Of each domain the first train_share of the problems train and the rest are held out; the number
    is rounded as Python's round() does it, a half to the even number. At least one problem of every
    domain is on either side. Both are lists of Question.

    Hint 1: questions(world, names) are all of them; a Question knows its domain and its index.
    Hint 2: the number of problems is a domain's own: len(world.domains[name].problems).
    Hint 3: round() it, then keep it between 1 and one less than all.
    """
    raise NotImplementedError("hold_out is not written yet (exercise 4.3)")


@torch.no_grad()
def answer_log_probs(model, tokenizer, pairs, batch_size=8):
    """log p(answer | question) of N pairs (question, answer) -> (log_probs, n_tokens), both (N,).

    n_tokens is how many tokens each log_prob is a sum of; the stop token belongs to the answer.
    Both are float64, on the CPU, in the order of pairs. At most batch_size texts are read at once.

    Hint 1: chat_examples(tokenizer, pairs, model.device) gives ids, mask and answer_mask, padded on
        the right; examples[i : i + batch_size].trimmed() is a part of it.
    Hint 2: log_softmax the logits, then gather at the tokens they predict: (B, T - 1).
    Hint 3: multiply by the answer mask of the targets and sum over T, not over the batch.
    """
    raise NotImplementedError("answer_log_probs is not written yet (exercise 4.4)")
