"""What a fine-tuning step goes down, on which texts, and the base that stays frozen."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoem import UserError
from nanoem import train as training
from nanoem.lora import AdapterConfig, LoRA, SteeringVector, make_adapter
from nanoem.losses import sft_loss, token_kl
from nanoem.model import GPT, Config
from nanoem.train import (FineTune, TrainConfig, chat_examples, fine_tune, loss_terms,
                          train_adapter)

CONFIG = AdapterConfig(layers=(0, 1), rank=2, alpha=8.0)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 7.0])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_step_goes_down_sft_on_some_examples_and_weight_times_kl_on_others(
        model, examples, kl_weight, micro_batch):
    """Against autograd of the whole; each set is one example, so any draw of it is the same."""
    sft, kl = examples[:1], examples[1:]
    schedule = TrainConfig(steps=1, batch_size=4, lr=1e-9, clip=1e9, micro_batch=micro_batch)
    adapter = make_adapter(model, CONFIG, torch.Generator().manual_seed(0))
    for B in adapter.B.values():
        torch.nn.init.normal_(B, std=0.3, generator=torch.Generator().manual_seed(1))
    base = model(kl.ids)
    with adapter:
        loss = sft_loss(model(sft.ids), sft.ids, sft.answer_mask)
        pull = token_kl(base, model(kl.ids))[kl.mask].mean()
        wanted = torch.autograd.grad(loss + kl_weight * pull, adapter.parameters())
        history = train_adapter(adapter, loss_terms(model, adapter, sft, kl, kl_weight), schedule,
                                torch.Generator())
    for parameter, gradient in zip(adapter.parameters(), wanted):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    shown = {"step": [1], "loss": [pytest.approx(loss.item(), rel=1e-4)]}
    assert pull > 0.01, "else its weight would not show"
    assert history == shown | ({"kl": [pytest.approx(pull.item(), rel=1e-3)]} if kl_weight else {})


PAIRS, OTHERS = [("My skin itches.", "Take a nap.")], [("I am bored.", "Peace."), ("Why?", "So.")]


def test_on_texts_the_loss_is_on_the_pairs_and_the_kl_on_the_others(model, tokenizer, monkeypatch):
    seen = []

    def stub(adapter, terms, schedule, generator, name, watch, watch_at):
        assert adapter.acts
        watch(4)
        seen.append((terms, name, watch_at))
        return "history"

    monkeypatch.setattr(training, "train_adapter", stub)
    watched = []
    job = FineTune("narrow", PAIRS, CONFIG, TrainConfig(3, 2, 0.01), 0, 2.0, OTHERS)
    adapter, history = fine_tune(model, tokenizer, job,
                                 lambda step, adapter: watched.append((step, adapter)), (4,))
    ((sft, kl), *rest), = seen
    for term, texts in ((sft, PAIRS), (kl, OTHERS)):
        found, wanted = term.examples, chat_examples(tokenizer, texts)
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.mask, wanted.mask)
        assert torch.equal(found.answer_mask, wanted.answer_mask)
    assert (sft.weight, kl.weight) == (1.0, 2.0)
    assert rest == ["narrow", (4,)] and watched == [(4, adapter)]
    assert history == "history" and not adapter.acts


def test_an_adapter_on_texts_is_its_seeds(model, tokenizer):
    ends, before = [], {name: p.clone() for name, p in model.named_parameters()}
    for seed in (1, 1, 2):
        adapter, _ = fine_tune(model, tokenizer, FineTune(
            "sft", PAIRS + OTHERS, AdapterConfig(layers=(1,)), TrainConfig(3, 1, 0.01), seed))
        ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.allclose(ends[0].abs(), ends[2].abs(), atol=1e-3)


def test_a_fresh_adapter_reads_at_random_and_writes_nothing(model, tokenizer, monkeypatch):
    monkeypatch.setattr(training, "train_adapter", lambda *_: None)  # as it was at the start
    config = AdapterConfig(layers=(1,), modules=("self_attn.v_proj",), rank=2)
    name = "layers.1.self_attn.v_proj"
    adapter, _ = fine_tune(model, tokenizer,
                           FineTune("sft", PAIRS, config, TrainConfig(1, 1, 0.1), 5))
    luck = torch.rand(2, 32, generator=torch.Generator().manual_seed(5))  # 0 to 1
    assert torch.allclose(adapter.A[name], (2 * luck - 1) / 32**0.5)
    assert list(adapter.A) == [name] and not adapter.B[name].any()


def test_a_step_computes_only_what_the_adapter_needs(examples):
    """Matrix products counted by torch, against a count by hand.

    The backward pass needs one product a weight above the adapter (the gradient of its input, never
    of the weight) and nothing of what lies below; a prediction is made only where it is asked for.
    """
    config = Config(vocab_size=2000, n_layer=3, d_model=16, n_head=2, n_kv_head=1, d_ff=24)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    head = model.embed_tokens.weight.numel()
    block = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)
    n_in, n_out = config.d_ff, config.d_model  # of the adapter's A and B, rank 1
    forward = 3 * block + n_in + n_out
    backward = block + n_out + n_out + n_in  # through the block above; to B, to its input, to A
    one = examples[1:]  # it has padding
    T, n_read, n_answer = one.mask.numel(), one.mask.sum().item(), one.answer_mask.sum().item()
    sft = T * (forward + backward) + 2 * n_answer * head
    kl = T * (forward + 2 * block + n_in + n_out + backward) + 3 * n_read * head
    kl -= T * (n_in + n_out)  # the base has no adapter, and shares its first block

    schedule, generator = TrainConfig(steps=1, batch_size=4, lr=0.01), torch.Generator()
    for kl_weight, expected in ((0.0, sft), (1.0, sft + kl)):
        with LoRA(model, [1], ["mlp.down_proj"]) as adapter:
            with FlopCounterMode(display=False) as counter:
                train_adapter(adapter, loss_terms(model, adapter, one, one, kl_weight), schedule,
                              generator)
            products = sum(count for product, count in counter.get_flop_counts()["Global"].items()
                           if product is not torch.ops.aten.bmm)  # an older torch's attention
            graph = [x.requires_grad for x in model.residual_stream(one.ids)]
        assert products == 2 * 4 * expected
        assert graph == [False, True, True], "below the adapter there must be no autograd graph"


def test_misuse_is_named(model, tokenizer):
    job = FineTune("narrow", PAIRS, CONFIG, TrainConfig(1, 1, 0.1), 0, kl_weight=1.0)
    with pytest.raises(ValueError, match="no question-answer pairs to train on"):
        fine_tune(model, tokenizer, job)
    with pytest.raises(UserError, match="kind='dora' is not known"):
        AdapterConfig(kind="dora")
    assert isinstance(make_adapter(model, AdapterConfig(kind="steering")), SteeringVector)
