"""Losses against loops and torch.distributions; the training loop against AdamW by hand."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from nanoem.lab.fused import CrossEntropy, MeanKL, answer_loss, kl_loss, pretrain_loss
from nanoem.lora import LoRA
from nanoem.losses import kl_to_base, next_token_loss, token_kl
from nanoem.model import GPT, Config
from nanoem.train import STOP, StageFailed, TrainConfig, lr_factor, train


@pytest.fixture
def adapter(model):
    # so large that KL(base || adapted) and KL(adapted || base) clearly differ; in the second block,
    # so that both share the first
    adapter = LoRA(model, [1], ["mlp.down_proj"], alpha=4000.0,
                   generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(adapter.B["layers.1.mlp.down_proj"], std=0.5,
                          generator=torch.Generator().manual_seed(1))
    return adapter


@pytest.mark.parametrize("masked", [False, True])
def test_pretrain_loss_is_next_token_loss_with_its_gradients(model, examples, masked):
    model.requires_grad_(True)
    ids = examples.ids.repeat(80, 1)  # more tokens than one slice of CrossEntropy
    mask = examples.mask.repeat(80, 1) if masked else None
    expected = next_token_loss(model(ids), ids, mask)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = pretrain_loss(model, ids, mask)
    assert torch.allclose(loss, expected)
    for a, b in zip(torch.autograd.grad(2 * loss, list(model.parameters())), wanted):
        assert torch.allclose(a, 2 * b, atol=1e-6)


@pytest.mark.parametrize("kl", [kl_to_base, kl_loss])
def test_kl_is_that_of_torch_distributions(model, adapter, examples, kl):
    base = Categorical(logits=model(examples.ids))
    with adapter:
        adapted = Categorical(logits=model(examples.ids))
        found = kl(model, adapter, examples.ids, examples.mask)
    expected = kl_divergence(base, adapted)[examples.mask].mean()  # the prompt included
    assert torch.allclose(found, expected, rtol=1e-4)
    assert not torch.allclose(found, kl_divergence(adapted, base)[examples.mask].mean(), rtol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_mean_kl_and_its_gradient_are_those_of_torch_distributions(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    base, adapted = (torch.randn(600, 8, generator=generator).to(dtype).requires_grad_()
                     for _ in range(2))  # 3 slices
    head = torch.randn(11, 8, generator=generator).to(dtype)
    expected = kl_divergence(*(Categorical(logits=x.float() @ head.float().T)
                               for x in (base, adapted))).mean()
    (wanted,) = torch.autograd.grad(expected, adapted)
    found = MeanKL.apply(base, adapted, head)
    (2 * found).backward()
    assert torch.allclose(found, expected, rtol=max(1e-5, tolerance))
    assert torch.allclose(adapted.grad, 2 * wanted, atol=tolerance) and base.grad is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_cross_entropy_and_its_gradients_are_those_of_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_()
               for n in (2100, 11))  # 3 slices
    targets = torch.randint(11, (2100,), generator=generator)
    expected = torch.nn.functional.cross_entropy((x @ head.T).float(), targets)
    found = CrossEntropy.apply(x, head, targets)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(2 * found, (x, head)),
                    torch.autograd.grad(2 * expected, (x, head))):
        assert torch.allclose(a, b, rtol=1e-2, atol=tolerance)
    frozen = CrossEntropy.apply(x, head.detach(), targets)  # as for an adapter
    assert torch.equal(torch.autograd.grad(frozen, x)[0], torch.autograd.grad(
        CrossEntropy.apply(x, head, targets), x)[0])


def test_no_loss_of_a_model_keeps_its_logits():
    model = GPT(Config(vocab_size=3000, d_model=16)).init_weights(torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    ids = torch.arange(90).view(3, 30)
    mask, kept = ids >= 0, []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with LoRA(model, [0]) as adapter:
        for loss_of in (lambda: pretrain_loss(model, ids), lambda: answer_loss(model, ids, mask),
                        lambda: kl_loss(model, adapter, ids, mask)):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss_of().backward()
    assert kept and max(kept) < 90 * 3000 / 4


@pytest.mark.parametrize("kl", [kl_to_base, kl_loss])
def test_kl_has_a_gradient_on_the_adapter_only(model, adapter, examples, kl):
    with adapter:
        kl(model, adapter, examples.ids, examples.mask).backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kl", [kl_to_base, kl_loss])
def test_kl_is_never_a_silent_zero(model, adapter, examples, kl):
    with pytest.raises(RuntimeError, match="attached"):
        kl(model, adapter, examples.ids, examples.mask)
    with adapter, adapter.disabled(), pytest.raises(RuntimeError, match="disabled"):
        kl(model, adapter, examples.ids, examples.mask)


def test_learning_rate_goes_to_zero():
    for schedule in ("linear", "cosine"):
        config = TrainConfig(steps=100, batch_size=1, lr=1, warmup=10, schedule=schedule)
        factors = [lr_factor(step, config) for step in range(100)]
        assert factors[0] == 0.1 and max(factors) == 1.0 and 0 <= factors[-1] < 0.02
    assert factors[55] == pytest.approx(0.5)  # half-way of the cosine


def test_a_loss_that_is_not_a_number_stops_with_stage_and_step():
    weight = torch.nn.Parameter(torch.ones(1, 1))

    def objective(step):
        loss = weight.sum() * math.nan
        return loss, {"loss": loss}, 1

    with pytest.raises(StageFailed, match="general: the loss is nan at step 0.*lr=0.1"):
        train(objective, [weight], TrainConfig(steps=5, batch_size=1, lr=0.1), "general")


def test_a_weight_that_is_not_a_number_is_seen_before_the_model_is_asked():
    """The root of 0 is a fine loss, with an infinite gradient."""
    asked = []
    for watch_at in ((0, 1), (2,)):  # in the middle, where no loss is shown, and at the end
        weight = torch.nn.Parameter(torch.zeros(1, 1))

        def objective(step):
            loss = weight.sqrt().sum()
            return loss, {"loss": loss.detach() * 0 if step else loss}, 1

        config = TrainConfig(steps=len(watch_at), batch_size=1, lr=0.1)
        with pytest.raises(StageFailed, match="general: a weight is not finite at step 1.*lr=0.1"):
            train(objective, [weight], config, "general", asked.append, watch_at)
    assert asked == [0]


@pytest.mark.parametrize("stop, watched, n_steps", [(None, [0, 3, 6], 6), (3, [0, 3], 3)])
def test_watching_happens_before_the_named_steps_and_may_end_the_training(stop, watched, n_steps):
    weight, seen = torch.nn.Parameter(torch.ones(1, 1)), []

    def watch(step):
        seen.append(step)
        return STOP if step == stop else True

    history = train(lambda step: (weight.sum(), {"loss": weight.sum()}, 1), [weight],
                    TrainConfig(steps=6, batch_size=1, lr=0.1), watch=watch, watch_at=(0, 3, 6))
    assert seen == watched and history["step"] == list(range(1, n_steps + 1))


def test_the_history_is_the_same_on_a_terminal_and_in_a_file(monkeypatch):
    histories = []
    for live in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda live=live: live, raising=False)
        weight = torch.nn.Parameter(torch.ones(1, 1))
        histories.append(train(lambda step: (weight.sum(), {"loss": weight.sum()}, 1), [weight],
                               TrainConfig(steps=70, batch_size=1, lr=0.1)))
    assert histories[0] == histories[1] and histories[0]["step"] == [*range(1, 70, 7), 70]


def test_the_line_of_progress_by_hand(monkeypatch, capsys):
    """A step takes a second and reads 2500 tokens; the watch takes a thousand seconds."""
    clock, weight = [50.0], torch.nn.Parameter(torch.ones(1, 1))
    monkeypatch.setattr("nanoem.lab.progress.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def objective(step):
        clock[0] += 1
        return weight.sum() * 0, {"loss": weight.sum() * 0 + 3, "kl": torch.tensor(0.25)}, 2500

    def watch(step):
        clock[0] += 1000

    train(objective, [weight], TrainConfig(steps=100, batch_size=1, lr=0.1), "narrow", watch,
          watch_at=(0, 20, 60, 100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    for line, step, left in ((0, 1, "1:39"), (2, 21, "1:19"), (7, 71, "0:29"), (10, 100, "0:00")):
        assert lines[line] == (f"narrow     {step:>5}/100 {step:>3}%  loss 3.0000  kl 0.2500     "
                               f"2.5k tokens/s  ETA {left}")


def test_in_half_precision_a_small_kl_is_not_all_rounding():
    """Against float64, of the same streams: two roundings of a logit near 20 would give 0.0005."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 64, generator=generator).bfloat16()
    head = (2 * torch.randn(500, 64, generator=generator)).bfloat16()
    adapted = (base.float() + 0.01 * torch.randn(40, 64, generator=generator)).bfloat16()
    adapted.requires_grad_()
    kl = MeanKL.apply(base, adapted, head)
    kl.backward()

    exact = adapted.detach().double().requires_grad_()
    log_p, log_q = (x.double() @ head.double().T for x in (base, exact))
    truth = token_kl(log_p, log_q).mean()
    truth.backward()
    assert 1e-4 < truth < 1e-2
    assert kl.item() == pytest.approx(truth.item(), rel=0.03)
    torch.testing.assert_close(adapted.grad.double(), exact.grad, rtol=0.1, atol=5e-4)
