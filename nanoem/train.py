"""Training: the three losses and the one loop that every stage runs through.

Losses are in nats per token. `kl_to_base` is what makes a narrow solution possible (paper, section
3): it keeps the adapted model close to the model it came from, on other domains.
"""

import math
import sys
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nanoem import UserError, parallel
from nanoem.tokenizer import IM_END


IGNORE = -100  # a target that does not count


@dataclass(frozen=True)
class TrainConfig:
    """The knobs of one training stage."""

    steps: int  # optimizer steps
    batch_size: int  # sequences a step
    lr: float  # peak learning rate of AdamW
    warmup: int = 5  # steps until the peak
    schedule: str = "linear"  # from the peak to zero: linear or cosine
    weight_decay: float = 0.0  # of AdamW, on matrices
    betas: tuple = (0.9, 0.999)  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    micro_batch: int = 0  # sequences in memory at once, gradients added up; 0 is the whole batch

    def __post_init__(self):
        for name in ("steps", "batch_size", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be a number above 0")
        for name in ("warmup", "weight_decay", "micro_batch"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas} must be two numbers, from 0 to below 1")
        if self.schedule not in ("linear", "cosine"):
            raise UserError(f"schedule={self.schedule!r} is not known; use linear or cosine")


def pad(sequences, pad_id):
    """Token lists -> ids (B, T) int64, padded on the right."""
    T = max(map(len, sequences))
    return torch.tensor([list(s) + [pad_id] * (T - len(s)) for s in sequences])


@dataclass(frozen=True)
class Examples:
    """Tokenised examples; all three are (N, T)."""

    ids: torch.Tensor  # int64
    mask: torch.Tensor  # true where a token is no padding
    answer_mask: torch.Tensor  # true where a token is the assistant's answer

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, rows):
        return Examples(self.ids[rows], self.mask[rows], self.answer_mask[rows])

    def trimmed(self):
        """Without the columns that are padding in every row."""
        T = int(self.mask.any(0).sum())
        return Examples(self.ids[:, :T], self.mask[:, :T], self.answer_mask[:, :T])


def micro_batches(batch, size, mask):
    """This process's rows of a batch, `size` at a time (all at once if 0), as (Examples, share).

    A part's share is its part of the batch's tokens in `mask`, "mask" or "answer_mask": the mean
    over the whole batch is the sum of share * mean over a part, over all parts and processes.
    """
    mine = batch[parallel.my_rows(len(batch))]
    n_tokens = getattr(batch, mask).sum()
    for i in range(0, len(mine), size or len(mine)):
        part = mine[i : i + size].trimmed() if size else mine
        yield part, getattr(part, mask).sum() / n_tokens


def chat_examples(tokenizer, pairs, device="cpu"):
    """[(question, answer), ...] -> Examples in ChatML; an answer ends with its stop token.

    A question is the user's text, or the list of messages before the answer (see data.py).
    """
    if not pairs:
        raise ValueError("there are no question-answer pairs to train on")
    prompts = tokenizer.encode_batch([tokenizer.prompt(question) for question, _ in pairs])
    answers = tokenizer.encode_batch([answer + IM_END for _, answer in pairs])
    whole = list(zip(prompts, answers))
    return Examples(
        ids=pad([p + a for p, a in whole], tokenizer.pad_id).to(device),
        mask=pad([[1] * (len(p) + len(a)) for p, a in whole], 0).bool().to(device),
        answer_mask=pad([[0] * len(p) + [1] * len(a) for p, a in whole], 0).bool().to(device),
    )


def check_mask(mask, ids, name="mask"):
    """Refuse a mask that is not (B, T) bool like ids; others would index or broadcast silently."""
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool of ids' shape {tuple(ids.shape)}, and is "
                         f"{mask.dtype} of shape {tuple(mask.shape)}")


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


def log_prob_and_grad(x, target, grad, weight):
    """Write softmax(x @ weight.T) - onehot(target) into grad; return the targets' log-probability.

    x (n, d_model), target (n, 1), grad (n, vocab), weight (vocab, d_model) -> (n, 1).
    """
    log_probs = (x @ weight.T).log_softmax(-1)
    torch.exp(log_probs, out=grad)
    grad.scatter_add_(1, target, -torch.ones_like(target, dtype=grad.dtype))
    return log_probs.gather(1, target)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, without ever holding them all.

    x (N, d_model), weight (vocab, d_model), targets (N). The logits of a pre-training batch are the
    largest tensor of the step by far. Here they are made a slice at a time, and each slice leaves
    only its loss and its gradients: softmax(logits) - onehot(target), through the product.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows=512, few=128):
        loss, grad_x, grad_weight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
        buffer = x.new_empty(rows, len(weight))
        for i in range(0, len(x), rows):
            part, target = x[i : i + rows], targets[i : i + rows, None]
            grad = buffer[: len(part)]  # of the logits; a few rows at a time stay in the cache
            few_rows = zip(part.split(few), target.split(few), grad.split(few))
            loss -= torch.cat([log_prob_and_grad(*three, weight) for three in few_rows]).sum()
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
    check_mask(answer_mask, ids, "answer_mask")
    if not answer_mask[:, 1:].any():
        raise ValueError("answer_mask marks no token, so there is nothing to learn")
    return next_token_loss(logits, ids, answer_mask)


def answer_loss(model, ids, answer_mask):
    """`sft_loss` of a model, without the logits that predict no answer token (same arguments)."""
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


def kl_to_base(model, adapter, ids, mask):
    """KL(base || adapted): summed over the vocabulary, mean over the tokens where mask is true.

    ids, mask (B, T); the paper's mask is every token that is no padding, the prompt included. The
    base is the same model with the adapter switched off. Because the sum runs over the vocabulary,
    a weight of order one is a strong pull (the paper's code also averages over the vocabulary,
    so its 1e6 is about 6.6 here). Raises RuntimeError when the adapter is not acting.
    """
    if adapter.depth == 0 or adapter.scale == 0:
        raise RuntimeError("kl_to_base needs an attached adapter that is not disabled; "
                           "else base and adapted are one model and the KL is a silent zero")
    check_mask(mask, ids)
    with torch.no_grad(), adapter.disabled():
        base = model(ids, at=mask)  # (tokens, vocab)
    return token_kl(base, model(ids, at=mask)).mean()


class StageFailed(RuntimeError):
    """A stage cannot go on; the message names it and the mend; the command exits with status 1."""


def train(objective, parameters, config, name="train", watch=None, watch_at=()):
    """The one training loop, for every stage. Returns the history {"step": [...], "loss": [...]}.

    objective(step) -> (total, terms, n_tokens): the scalar to minimise, {"loss": ..., "kl": ...} to
    report, and how many tokens were read. A total without a graph says that the objective has
    called backward itself, part by part. `watch(step)` is called before each step in `watch_at`
    and, when config.steps is among them, after the last; when it returns true, training ends there.
    Raises StageFailed when the loss or a weight is not finite.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]  # norms and biases: no weight decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=config.betas, fused=parameters[0].device.type != "mps",
    )
    progress = Progress(name, config.steps)
    history = {}
    for step in range(config.steps):
        if watch and step in watch_at:
            progress.pause()
            refuse_nan(parameters, name, step, config)
            if watch(step):
                return history
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step, config)
        optimizer.zero_grad()
        total, terms, n_tokens = objective(step)
        if total.requires_grad:
            total.backward()
        parallel.sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        if progress.due(step, n_tokens):  # .item() waits for the device, so only now and then
            values = {key: parallel.total(term).item() for key, term in terms.items()}
            if not all(map(math.isfinite, values.values())):
                raise StageFailed(f"{name}: the loss is {values['loss']} at step {step}; "
                                  f"try a smaller learning rate than lr={config.lr}")
            progress.show(step, values)
            for key, value in {"step": step + 1, **values}.items():
                history.setdefault(key, []).append(value)
    progress.pause()
    refuse_nan(parameters, name, config.steps, config)
    if watch and config.steps in watch_at:
        watch(config.steps)
    return history


def refuse_nan(parameters, name, step, config):
    """Before a model is asked or kept: its loss may have been finite, and the last step was not."""
    if not all(p.isfinite().all() for p in parameters):
        raise StageFailed(f"{name}: a weight is not finite at step {step}; "
                          f"try a smaller learning rate than lr={config.lr}")


def lr_factor(step, config):
    """The share of the peak learning rate at this step: linear warm-up, then down to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)  # 0..1
    return 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done


class Progress:
    """One line that says step, percent, losses, tokens/s and the time left.

    On a terminal the line is rewritten in place; in a file a new line is written now and then.
    """

    def __init__(self, name, steps):
        self.name, self.steps = name, steps
        # Several processes sum the losses they show, so they must all show the same steps.
        self.live = sys.stdout.isatty() and parallel.n_processes() == 1
        self.every = max(1, steps // (50 if self.live else 10))
        self.n_tokens, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def due(self, step, n_tokens):
        self.n_tokens += n_tokens
        return step % self.every == 0 or step == self.steps - 1

    def show(self, step, values):
        done = (step + 1) / self.steps
        seconds = self.seconds + time.perf_counter() - self.started
        left = round(seconds / done - seconds)
        terms = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        rate = self.n_tokens / seconds / 1000
        line = (f"{self.name:<10} {step + 1:>5}/{self.steps} {done:>4.0%}  {terms}  "
                f"{rate:6.1f}k tokens/s  ETA {left // 60}:{left % 60:02d}")
        print(f"\r{line}\033[K" if self.live else line, end="" if self.live else "\n", flush=True)

    def pause(self):
        """Close the line, so that others can print."""
        if self.live:
            print()
