"""The losses of losses.py, fused with the output layer: the same numbers, faster and smaller.

A batch's logits are by far the largest tensor of a step. Here they are made a slice at a time, only
those that a loss needs, and each slice leaves its loss and its gradients. Tests compare each
function with its plain twin in losses.py.
"""

from itertools import islice

import torch
from torch.autograd.function import once_differentiable

from nanoem.layers import in_float32
from nanoem.losses import check_kl, check_targets

CE_ROWS, KL_ROWS = 1024, 256  # tokens whose logits are held at once


def pretrain_loss(model, ids, mask=None):
    """`next_token_loss` of a model, in half the time and a third of the memory (same arguments)."""
    check_targets(mask, ids)
    return loss_of(model, ids, mask)


def answer_loss(model, ids, answer_mask):
    """`sft_loss` of a model, without the logits that predict no answer token (same arguments)."""
    check_targets(answer_mask, ids, "answer_mask")
    return loss_of(model, ids, answer_mask)


def loss_of(model, ids, mask):
    """Cross-entropy of the masked tokens (None: of all); the caller has checked the mask."""
    x = model.final_stream(ids)[:, :-1]  # (B, T - 1, d_model): each position predicts the next
    targets = ids[:, 1:]
    if mask is not None:
        x, targets = x[mask[:, 1:]], targets[mask[:, 1:]]
    return CrossEntropy.apply(model.norm(x).flatten(0, -2), model.head, targets.flatten())


def kl_loss(model, adapter, ids, mask):
    """`kl_to_base` (same arguments). The model's own weights are constants here: freeze them.

    Before the adapter's first layer, base and adapted model are the same: computed once.
    """
    check_kl(adapter, ids, mask)
    with torch.no_grad(), adapter.disabled():
        streams = model.blocks(ids)
        below = list(islice(streams, adapter.first_layer))
        for base in streams:  # (B, T, d_model)
            pass
    adapted = model.final_stream(ids, below=below)
    return MeanKL.apply(model.norm(base[mask]), model.norm(adapted[mask]), model.head)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ head.T: x (N, d_model), head (vocab, d_model).

    targets (N). The gradient of a logit is softmax(logits) - onehot(target).
    """

    @staticmethod
    def forward(ctx, x, head, targets):
        loss, grad_x = 0.0, torch.empty_like(x)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        logits = x.new_empty(min(CE_ROWS, len(x)), len(head))  # memory is asked for once
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
            del log_probs, grad  # or the next slice is made beside this one

        ctx.save_for_backward(grad_x / len(x), None if grad_head is None else grad_head / len(x))
        return loss / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_head = ctx.saved_tensors
        return grad_loss * grad_x, None if grad_head is None else grad_loss * grad_head, None


class MeanKL(torch.autograd.Function):
    """The mean `token_kl` of the logits base @ head.T and adapted @ head.T, both x (N, d_model).

    Only `adapted` has a gradient; that of a logit is softmax(adapted) - softmax(base).
    """

    @staticmethod
    def forward(ctx, base, adapted, head):
        total, grad = 0.0, torch.empty_like(adapted) if ctx.needs_input_grad[1] else None
        for i in range(0, len(base), KL_ROWS):
            logits = both_logits(base[i : i + KL_ROWS], adapted[i : i + KL_ROWS], head)
            log_p, log_q = (torch.log_softmax(x, -1, out=x) for x in logits)  # (rows, vocab)
            gap = log_p - log_q
            p = log_p.exp_()  # in place: from here on log_p is p
            total += gap.mul_(p).sum()
            if grad is not None:
                grad[i : i + KL_ROWS] = log_q.exp_().sub_(p).to(head.dtype) @ head
            del logits, log_p, log_q, gap, p  # or the next slice is made beside this one
        ctx.save_for_backward(None if grad is None else grad / len(base))
        return total / len(base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean):
        return None, grad_mean * ctx.saved_tensors[0], None


def both_logits(base, adapted, head):
    """The logits base @ head.T and adapted @ head.T, both (N, vocab), in float32.

    In half precision a logit of 20 is off by 0.04, in each of the two by itself: more than what a
    narrow adapter changes. So there the change is computed, and added to one and the same rounding.
    """
    logits = in_float32(base @ head.T)
    if head.dtype == torch.float32:
        return logits, adapted @ head.T
    change = (adapted.float() - base.float()).to(head.dtype)
    return logits, logits + change @ head.T
