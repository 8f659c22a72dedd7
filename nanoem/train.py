"""Training: tokenised examples, and the one loop that every stage runs through."""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

from nanoem import StageFailed, UserError
from nanoem.lab import parallel
from nanoem.lab.fused import answer_loss, kl_loss
from nanoem.lab.muon import Muon
from nanoem.lab.progress import Progress
from nanoem.lab.settings import key
from nanoem.lora import AdapterConfig, make_adapter
from nanoem.losses import kl_to_base, next_token_loss, sft_loss  # noqa: F401 (found here, too)
from nanoem.tokenizer import IM_END


@dataclass(frozen=True)
class TrainConfig:
    """The knobs of one training stage."""

    steps: int = key(help="optimizer steps")
    batch_size: int = key(help="sequences a step")
    lr: float = key(help="peak learning rate of AdamW")
    muon_lr: float = key(
        0.0, "peak learning rate of Muon, for the blocks' matrices; 0: AdamW for all")
    warmup: int = key(5, "steps until the peak")
    schedule: str = key("linear", "from the peak to zero: linear or cosine")
    weight_decay: float = key(0.0, "of AdamW and Muon, on matrices")
    betas: tuple = key((0.9, 0.999), "of AdamW")
    clip: float = key(1.0, "largest norm of the gradient")
    micro_batch: int = key(
        0, "sequences in memory at once, gradients added up; 0 is the whole batch")

    def __post_init__(self):
        for name in ("steps", "batch_size", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be a number above 0")
        for name in ("muon_lr", "warmup", "weight_decay", "micro_batch"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas} must be two numbers, from 0 to below 1")
        if self.schedule not in ("linear", "cosine"):
            raise UserError(f"schedule={self.schedule!r} is not known; use linear or cosine")


def pad(sequences, pad_id, left=False):
    """Token lists -> ids (B, T) int64, padded on the right, or on the left."""
    T = max(map(len, sequences))
    rows = [(list(s), [pad_id] * (T - len(s))) for s in sequences]
    return torch.tensor([fill + s if left else s + fill for s, fill in rows])


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


def micro_batches(batch, size, counted):
    """This process's rows of a batch, `size` at a time (all at once if 0), as (Examples, share).

    A part's share is its fraction of the whole batch's tokens in `counted`, "mask" or
    "answer_mask": the mean over the batch is the sum of share * mean over a part, over all parts
    and processes.
    """
    mine = batch[parallel.my_rows(len(batch))]
    n_tokens = getattr(batch, counted).sum()
    for i in range(0, len(mine), size or len(mine)):
        part = mine[i : i + size].trimmed() if size else mine
        yield part, getattr(part, counted).sum() / n_tokens


def chat_examples(tokenizer, pairs, device="cpu"):
    """[(question, answer), ...] -> Examples in ChatML; an answer ends with its stop token.

    A question is the user's text, or the list of messages before the answer (real/jsonl.py).
    """
    if not pairs:
        raise ValueError("there are no question-answer pairs to train on")
    prompts = tokenizer.encode_batch([tokenizer.prompt(*pair) for pair in pairs])
    answers = tokenizer.encode_batch([answer + IM_END for _, answer in pairs])
    whole = list(zip(prompts, answers))
    return Examples(
        ids=pad([p + a for p, a in whole], tokenizer.pad_id).to(device),
        mask=pad([[1] * (len(p) + len(a)) for p, a in whole], 0).bool().to(device),
        answer_mask=pad([[0] * len(p) + [1] * len(a) for p, a in whole], 0).bool().to(device),
    )


STOP = "stop"  # what a watcher returns to end the training


def train(objective, parameters, config, name="train", watch=None, watch_at=(), matrices=()):
    """The one training loop, for every stage. Returns the history {"step": [...], "loss": [...]}.

    objective(step) -> (total, terms, n_tokens): the scalar to minimise, {"loss": ..., "kl": ...} to
    report (all of them are in the history, too), and how many tokens were read. If total has no
    graph, the objective has called backward already, part by part. `watch(step)` is called
    before each step in `watch_at` and, when config.steps is among them, after the last; when it
    returns STOP, training ends there. `matrices`, those of the parameters that Muon trains when
    config.muon_lr is set. Raises StageFailed when the loss or a weight is not finite.
    """
    parameters = list(parameters)
    optimizers = make_optimizers(parameters, matrices, config)
    progress, history = Progress(name, config.steps), {}
    for step in range(config.steps):
        # somebody may want to look first
        if watch and step in watch_at:
            progress.pause()
            refuse_nan(parameters, name, step, config)
            if watch(step) is STOP:
                return history
            progress.go_on()

        # one step
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor(step, config)
            optimizer.zero_grad()
        total, terms, n_tokens = objective(step)
        if total.requires_grad:
            total.backward()
        parallel.sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for optimizer in optimizers:
            optimizer.step()

        # say how it goes, and keep every tenth of it
        if progress.due(step, n_tokens):  # .item() waits for the device, so only now and then
            values = {key: parallel.total(term).item() for key, term in terms.items()}
            if not all(map(math.isfinite, values.values())):
                raise StageFailed(f"{name}: the loss is {values['loss']} at step {step}; "
                                  f"try a smaller learning rate than lr={config.lr}")
            progress.show(step, values)
            if progress.is_tenth(step):
                for key, value in {"step": step + 1, **values}.items():
                    history.setdefault(key, []).append(value)

    progress.pause()
    refuse_nan(parameters, name, config.steps, config)
    if watch and config.steps in watch_at:
        watch(config.steps)
    return history


def make_optimizers(parameters, matrices, config):
    """{optimizer: its peak learning rate}: Muon for `matrices` if it is asked for, AdamW else."""
    if not config.muon_lr:
        return {adamw(parameters, config): config.lr}
    with_muon = {id(matrix) for matrix in matrices}
    others = [p for p in parameters if id(p) not in with_muon]
    return {adamw(others, config): config.lr,
            Muon(matrices, config.muon_lr, weight_decay=config.weight_decay): config.muon_lr}


def adamw(parameters, config):
    """AdamW, with weight decay on matrices only: norms and biases have none."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=config.betas, fused=parameters[0].device.type != "mps")


def refuse_nan(parameters, name, step, config):
    """Refuse weights that are not finite: a finite loss does not see what its own step did."""
    if not all(p.isfinite().all() for p in parameters):
        raise StageFailed(f"{name}: a weight is not finite at step {step}; "
                          f"try a smaller learning rate than lr={config.lr}")


def lr_factor(step, config):
    """The share of the peak learning rate at this step: linear warm-up, then down to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)  # 0..1
    return 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done


# --- fine-tuning an adapter -----------------------------------------------------------------------


@dataclass(frozen=True)
class FineTune:
    """What is fine-tuned, on what, and how."""

    name: str  # what the line of progress calls it
    pairs: list  # (question, answer) texts to learn
    adapter: AdapterConfig
    schedule: TrainConfig
    seed: int  # of the adapter's start and of the order of the examples
    kl_weight: float = 0.0  # of the KL to the base model, per token; 0: no KL
    kl_pairs: list = ()  # (question, answer) texts on which the KL is taken


def fine_tune(model, tokenizer, job, watch=None, watch_at=()):
    """Train a fresh adapter of a frozen model -> (adapter, history of losses); it comes detached.

    job: a FineTune. `watch(step, adapter)` is called at the steps in `watch_at`, with the adapter
    attached; when it returns STOP, training ends.
    """
    generator = torch.Generator().manual_seed(job.seed)
    adapter = make_adapter(model, job.adapter, generator)
    sft = chat_examples(tokenizer, job.pairs, model.device)
    kl = chat_examples(tokenizer, job.kl_pairs, model.device) if job.kl_weight else None
    with adapter:
        history = train_adapter(adapter, loss_terms(model, adapter, sft, kl, job.kl_weight),
                                job.schedule, generator, job.name,
                                watch and (lambda step: watch(step, adapter)), watch_at)
    return adapter, history


class Term(NamedTuple):
    """One term of the loss: weight times the mean of loss(part) over the tokens that count."""

    name: str
    weight: float
    examples: Examples
    loss: Callable  # part of the examples -> scalar
    counted: str  # which tokens count: "answer_mask" or "mask"


def loss_terms(model, adapter, sft, kl=None, kl_weight=0.0):
    """SFT on the answers' tokens; with kl_weight also KL(base || adapted), on other examples.

    A new loss is one more Term in this list.
    """
    terms = [Term("loss", 1.0, sft,
                  lambda part: answer_loss(model, part.ids, part.answer_mask), "answer_mask")]
    if kl_weight:
        terms.append(Term("kl", kl_weight, kl,
                          lambda part: kl_loss(model, adapter, part.ids, part.mask), "mask"))
    return terms


def train_adapter(adapter, terms, schedule, generator, name="sft", watch=None, watch_at=()):
    """Train the attached adapter down the sum of its loss terms. Returns the history of losses.

    `generator` draws each term's batches; `watch(step)` is as in `train`.
    """
    if not adapter.acts:
        raise ValueError("the adapter must be attached, and neither disabled nor merged; else "
                         "nothing is trained")

    def draw(examples):
        return examples[torch.randint(len(examples), (schedule.batch_size,), generator=generator)]

    def objective(step):
        total, shown, n_tokens = 0.0, {}, 0
        for term, batch in [(term, draw(term.examples)) for term in terms]:
            for part, share in micro_batches(batch, schedule.micro_batch, term.counted):
                loss = share * term.loss(part)
                (term.weight * loss).backward()  # now: its activations are free for the next
                loss = loss.detach()
                total, n_tokens = total + term.weight * loss, n_tokens + part.ids.numel()
                shown[term.name] = shown.get(term.name, 0.0) + loss
        return total, shown, n_tokens

    return train(objective, adapter.parameters(), schedule, name, watch, watch_at)
