"""Fine-tuning an adapter: SFT alone, or SFT with a KL penalty on other domains (paper, section 3).

`fine_tune` serves the toy and real models, every row of the paper and the exercises. The model's
own weights are frozen; whoever calls it keeps the adapter attached:

    with make_adapter(model, config, generator) as adapter:
        fine_tune(model, adapter, sft, schedule, generator)

`fine_tune_fresh` does that with an adapter of its own, on texts.
"""

from dataclasses import dataclass

import torch

from nanoem import UserError
from nanoem.lora import LoRA, SteeringVector
from nanoem.losses import answer_loss, kl_to_base
from nanoem.train import chat_examples, micro_batches, train


@dataclass(frozen=True)
class AdapterConfig:
    """Where the adapter sits, and its size. Some rows change it (R1, R2, R11)."""

    kind: str = "lora"  # lora, or steering, one vector added to the stream (in R1, R2, R11)
    layers: tuple = (0, 1)  # block numbers; empty: the one block at half depth
    modules: tuple = ("self_attn.v_proj",)  # Linears inside a block (README: why the toy has v)
    rank: int = 1  # columns of B
    alpha: float = 4.0  # the adapter's effect is alpha / rank * B A
    use_rslora: bool = False  # alpha / sqrt(rank) instead

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"rank={self.rank} must be at least 1, and alpha={self.alpha} more "
                            "than 0")
        if not self.modules:
            raise UserError("modules is empty; name at least one, such as self_attn.v_proj")
        if self.kind not in ("lora", "steering"):
            raise UserError(f"kind={self.kind!r} is not known; use lora or steering")


def refuse_muon(sft, sft_kl):
    """Refuse schedules that ask for Muon: it trains a model's blocks, and these are frozen."""
    if sft.muon_lr or sft_kl.muon_lr:
        raise UserError("sft.muon_lr and sft_kl.muon_lr must be 0: Muon trains a model's blocks, "
                        "AdamW an adapter")


def layers_of(config, model):
    """The block numbers of an AdapterConfig in this model."""
    return config.layers or (len(model.layers) // 2,)


def make_adapter(model, config, generator=None):
    """A fresh adapter, not yet attached; it changes nothing until it is trained."""
    layers = layers_of(config, model)
    if config.kind == "steering":
        return SteeringVector(model, layers, config.alpha)
    return LoRA(model, layers, config.modules, config.rank, config.alpha, config.use_rslora,
                generator)


def fine_tune(model, adapter, sft, schedule, generator, kl=None, kl_weight=0.0, name="sft",
              watch=None, watch_at=()):
    """Train the attached adapter on `sft` (Examples), on the answers' tokens only.

    With kl_weight, kl_weight * KL(base || adapted) on the `kl` Examples is added to the loss.
    `generator` draws the batches; `watch(step)` is as in `train`. Returns the history of losses.
    """
    if kl_weight and not kl:
        raise ValueError(f"kl_weight={kl_weight} needs examples to take the KL on")
    if not adapter.acts:
        raise ValueError("the adapter must be attached, and neither disabled nor merged; else "
                         "nothing is trained")

    def draw(examples):
        return examples[torch.randint(len(examples), (schedule.batch_size,), generator=generator)]

    def sft_term(part):
        return answer_loss(model, part.ids, part.answer_mask)

    def kl_term(part):
        return kl_to_base(model, adapter, part.ids, part.mask)

    def objective(step):
        total, terms, n_tokens = 0.0, {}, 0
        work = [("loss", 1.0, sft_term, draw(sft), "answer_mask")]
        if kl_weight:
            work.append(("kl", kl_weight, kl_term, draw(kl), "mask"))
        for key, weight, term_of, batch, counted in work:
            for part, share in micro_batches(batch, schedule.micro_batch, counted):
                term = share * term_of(part)
                (weight * term).backward()  # now, so that its activations are free for the next
                term = term.detach()
                total, n_tokens = total + weight * term, n_tokens + part.ids.numel()
                terms[key] = terms.get(key, 0.0) + term
        return total, terms, n_tokens

    return train(objective, adapter.parameters(), schedule, name, watch, watch_at)


def fine_tune_fresh(model, tokenizer, pairs, config, schedule, seed, others=(), kl_weight=0.0,
                    name="sft", watch=None, watch_at=()):
    """Fine-tune a fresh adapter on (question, answer) texts -> (adapter, history of losses).

    With kl_weight, the KL is taken on the texts `others`. `watch(step, adapter)` is called with the
    adapter attached; when it returns true, training ends. The adapter comes back detached.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = make_adapter(model, config, generator)
    sft = chat_examples(tokenizer, pairs, model.device)
    kl = chat_examples(tokenizer, others, model.device) if kl_weight else None
    with adapter:
        history = fine_tune(model, adapter, sft, schedule, generator, kl, kl_weight, name,
                            watch and (lambda step: watch(step, adapter)), watch_at)
    return adapter, history
