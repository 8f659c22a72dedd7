"""The losses, in nats per token: next token, SFT on answers only, and the KL to the base model.

`kl_to_base` is what makes a narrow solution possible (paper, section 3): it keeps the adapted model
close to the model it came from, on other domains.
"""

from itertools import islice

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanoem.layers import in_float32

IGNORE = -100  # a target that does not count
CE_ROWS, KL_ROWS = 1024, 256  # tokens whose logits are held at once


def check_mask(mask, ids, name="mask"):
    """Refuse a mask that is not (B, T) bool like ids; others would index or broadcast silently."""
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool of ids' shape {tuple(ids.shape)}, and is "
                         f"{mask.dtype} of shape {tuple(mask.shape)}")


def check_targets(mask, ids, name="mask"):
    """Refuse what is no mask, and a mean over no tokens; the first token is never a target."""
    check_mask(mask, ids, name)
    if not mask[:, 1:].any():
        raise ValueError(f"{name} marks no token, so there is nothing to learn")


def check_learnable(mask, ids):
    """`check_targets`, and without a mask, when every token but the first is a target, as much."""
    if mask is not None:
        check_targets(mask, ids)
    elif ids.size(1) < 2:
        raise ValueError(f"ids are {tuple(ids.shape)}; a token can only be learned after another")


def next_token_loss(logits, ids, mask=None):
    """Mean cross-entropy of each token given those before it.

    logits (B, T, vocab), ids (B, T); mask (B, T), true where a token counts as a target (all do
    if None; the first token never can).
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits must be (B, T, vocab) and ids (B, T); they are "
                         f"{tuple(logits.shape)} and {tuple(ids.shape)}")
    check_learnable(mask, ids)
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    if mask is not None:
        targets = targets.masked_fill(~F.pad(mask[:, 1:], (0, 1)), IGNORE)
    return F.cross_entropy(in_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ head.T, without ever holding them all.

    x (N, d_model), head (vocab, d_model), targets (N). A batch's logits are by far the largest
    tensor of a step. Here they are made a slice at a time, in memory that is asked for once, and
    each slice leaves only its loss and its gradients: softmax(logits) - onehot(target), through the
    product.
    """

    @staticmethod
    def forward(ctx, x, head, targets):
        loss, grad_x = 0.0, torch.empty_like(x)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        logits = x.new_empty(min(CE_ROWS, len(x)), len(head))
        for i in range(0, len(x), CE_ROWS):
            part, target = x[i : i + CE_ROWS], targets[i : i + CE_ROWS, None]
            log_probs = in_float32(torch.mm(part, head.T, out=logits[: len(part)]))
            torch.log_softmax(log_probs, -1, out=log_probs)  # (rows, vocab)
            chosen = log_probs.gather(1, target)
            loss -= chosen.sum()
            # in place: log_probs becomes softmax - onehot
            grad = log_probs.exp_().scatter_(1, target, chosen.exp() - 1).to(x.dtype)
            grad_x[i : i + CE_ROWS] = grad @ head
            if grad_head is not None:
                grad_head.addmm_(grad.T, part)
        ctx.save_for_backward(grad_x / len(x), None if grad_head is None else grad_head / len(x))
        return loss / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_head = ctx.saved_tensors
        return grad_loss * grad_x, None if grad_head is None else grad_loss * grad_head, None


def pretrain_loss(model, ids, mask=None):
    """`next_token_loss` of a model, in half the time and a third of the memory (same arguments)."""
    check_learnable(mask, ids)
    return loss_of(model, ids, mask)


def answer_loss(model, ids, answer_mask):
    """`sft_loss` of a model, without the logits that predict no answer token (same arguments)."""
    check_targets(answer_mask, ids, "answer_mask")
    return loss_of(model, ids, answer_mask)


def loss_of(model, ids, mask):
    """What both are, once the mask is checked: only the logits of targets are ever made."""
    x = model.final_stream(ids)  # (B, T, d_model)
    x, targets = x[:, :-1], ids[:, 1:]
    if mask is not None:
        x, targets = x[mask[:, 1:]], targets[mask[:, 1:]]
    return CrossEntropy.apply(model.norm(x).flatten(0, -2), model.head, targets.flatten())


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


class MeanKL(torch.autograd.Function):
    """The mean `token_kl` of the logits base @ head.T and adapted @ head.T, a slice at a time.

    base, adapted (N, d_model), head (vocab, d_model). Only `adapted` gets a gradient:
    softmax(adapted) - softmax(base), through the product.
    """

    @staticmethod
    def forward(ctx, base, adapted, head):
        total, grad = 0.0, torch.empty_like(adapted) if ctx.needs_input_grad[1] else None
        for i in range(0, len(base), KL_ROWS):
            log_p, log_q = (in_float32(x[i : i + KL_ROWS] @ head.T).log_softmax(-1)
                            for x in (base, adapted))  # (rows, vocab)
            gap = log_p - log_q
            p = log_p.exp_()  # in place: from here on log_p is p
            total += gap.mul_(p).sum()
            if grad is not None:
                grad[i : i + KL_ROWS] = log_q.exp_().sub_(p).to(head.dtype) @ head
        ctx.save_for_backward(None if grad is None else grad / len(base))
        return total / len(base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean):
        return None, grad_mean * ctx.saved_tensors[0], None


def kl_to_base(model, adapter, ids, mask):
    """KL(base || adapted): summed over the vocabulary, mean over the tokens where mask is true.

    ids, mask (B, T); the paper's mask is every token that is no padding, the prompt included. The
    base is the same model with the adapter switched off; before the adapter's first layer the two
    are one, and computed once. The model's own weights are constants here: freeze them. Because the
    sum runs over the vocabulary, a weight of order one is a strong pull (the paper's code also
    averages over the vocabulary, so its 1e6 is about 6.6 here). Raises RuntimeError when the
    adapter is not acting.
    """
    if not adapter.acts:
        raise RuntimeError("kl_to_base needs an attached adapter, neither disabled nor merged; "
                           "else base and adapted are one model and the KL is a silent zero")
    check_mask(mask, ids)
    if not mask.any():
        raise ValueError("mask marks no token, so there is no KL to take a mean of")
    with torch.no_grad(), adapter.disabled():
        streams = model.blocks(ids)
        below = list(islice(streams, adapter.first_layer))
        for base in streams:  # (B, T, d_model)
            pass
    adapted = model.final_stream(ids, below=below)
    return MeanKL.apply(*(model.norm(x[mask]) for x in (base, adapted)), model.head)
