"""The losses, in nats per token: next token, SFT on answers only, and the KL to the base model.

`kl_to_base` is what makes a narrow solution possible (paper, section 3): it keeps the adapted model
close to the model it came from, on other domains.
"""

import torch
from torch.nn import functional as F

IGNORE = -100  # a target that does not count


def check_mask(mask, ids, name="mask"):
    """Refuse a mask that is not (B, T) bool like ids; others would index or broadcast silently."""
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool of ids' shape {tuple(ids.shape)}, and is "
                         f"{mask.dtype} of shape {tuple(mask.shape)}")


def check_answers(answer_mask, ids):
    """Refuse what is no mask, and a mean over no tokens."""
    check_mask(answer_mask, ids, "answer_mask")
    if not answer_mask[:, 1:].any():
        raise ValueError("answer_mask marks no token, so there is nothing to learn")


def in_float32(logits):
    """Half-precision logits in float32, where a sum over 150,000 words of them is safe."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def next_token_loss(logits, ids, mask=None):
    """Mean cross-entropy of each token given those before it.

    logits (B, T, vocab), ids (B, T); mask (B, T), true where a token counts as a target (all do
    if None; the first token never can).
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits must be (B, T, vocab) and ids (B, T); they are "
                         f"{tuple(logits.shape)} and {tuple(ids.shape)}")
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    if mask is not None:
        check_mask(mask, ids)
        targets = targets.masked_fill(~F.pad(mask[:, 1:], (0, 1)), IGNORE)
    return F.cross_entropy(in_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, without ever holding them all.

    x (N, d_model), weight (vocab, d_model), targets (N). The logits of a pre-training batch are the
    largest tensor of the step by far. Here they are made a slice at a time, and each slice leaves
    only its loss and its gradients: softmax(logits) - onehot(target), through the product.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows=512):
        loss, grad_x, grad_weight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), rows):
            part, target = x[i : i + rows], targets[i : i + rows, None]
            log_probs = (part @ weight.T).log_softmax(-1)  # (rows, vocab)
            loss -= log_probs.gather(1, target).sum()
            grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=x.dtype))
            grad_x[i : i + rows] = grad @ weight
            grad_weight.addmm_(grad.T, part)
        ctx.save_for_backward(grad_x / len(x), grad_weight / len(x))
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_loss * grad_x, grad_loss * grad_weight, None, None


def pretrain_loss(model, ids, mask=None):
    """`next_token_loss` of a model with tied embeddings, in a third less time (same arguments)."""
    if mask is not None:
        check_mask(mask, ids)
    *_, x = model.blocks(ids)  # (B, T, d_model)
    predicts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    predicts = predicts[:, 1:].flatten()  # (B * (T - 1))
    x = model.norm(x[:, :-1]).flatten(0, 1)[predicts]
    return TiedCrossEntropy.apply(x, model.embed_tokens.weight, ids[:, 1:].flatten()[predicts])


def sft_loss(logits, ids, answer_mask):
    """Mean cross-entropy of the answer tokens only: the user's words are given, not learned.

    logits (B, T, vocab), ids (B, T), answer_mask (B, T) true on answer tokens. Raises ValueError
    when no token is an answer's.
    """
    check_answers(answer_mask, ids)
    return next_token_loss(logits, ids, answer_mask)


def answer_loss(model, ids, answer_mask):
    """`sft_loss` of a model, without the logits that predict no answer token (same arguments)."""
    check_answers(answer_mask, ids)
    predicts = F.pad(answer_mask[:, 1:], (0, 1))  # (B, T): the next token is an answer's
    logits = model(ids, at=predicts)  # (answer tokens, vocab)
    return F.cross_entropy(in_float32(logits), ids[:, 1:][answer_mask[:, 1:]])


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
    """`token_kl(base, adapted).mean()` of logits (N, vocab); only `adapted` gets a gradient.

    A few tokens at a time, so that of all the tensors this wide that autograd would keep only one
    is ever whole: the gradient, softmax(adapted) - softmax(base).
    """

    @staticmethod
    def forward(ctx, base, adapted, rows=128):
        total, grad = 0.0, torch.empty_like(adapted)
        for i in range(0, len(base), rows):
            p, q = (in_float32(logits[i : i + rows]).log_softmax(-1) for logits in (base, adapted))
            gap, p = p - q, p.exp_()
            total += gap.mul_(p).sum()
            grad[i : i + rows] = q.exp_().sub_(p).div_(len(base))
        ctx.save_for_backward(grad)
        return total / len(base)

    @staticmethod
    def backward(ctx, grad_mean):
        return None, grad_mean * ctx.saved_tensors[0], None


def kl_to_base(model, adapter, ids, mask):
    """KL(base || adapted): summed over the vocabulary, mean over the tokens where mask is true.

    ids, mask (B, T); the paper's mask is every token that is no padding, the prompt included. The
    base is the same model with the adapter switched off. Because the sum runs over the vocabulary,
    a weight of order one is a strong pull (the paper's code also averages over the vocabulary,
    so its 1e6 is about 6.6 here). Raises RuntimeError when the adapter is not acting.
    """
    if not adapter.acts:
        raise RuntimeError("kl_to_base needs an attached adapter that is not disabled; "
                           "else base and adapted are one model and the KL is a silent zero")
    check_mask(mask, ids)
    with torch.no_grad(), adapter.disabled():
        base = model(ids, at=mask)  # (tokens, vocab)
    return MeanKL.apply(base, model(ids, at=mask))
