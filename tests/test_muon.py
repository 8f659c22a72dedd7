"""Muon: its polynomial against an SVD, its step by hand, and its place in the training loop."""

import pytest
import torch

from nanoem import train as training
from nanoem.lab.muon import Muon
from nanoem.train import TrainConfig, make_optimizers, train

SHAPES = ((6, 6), (9, 4), (3, 8), (9, 4))  # square, tall, wide, and one that comes twice


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def polynomial(s):
    """What Newton-Schulz makes of one singular value, in plain numbers."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def by_hand(weight, gradients, lr, decay):
    """Muon on one matrix, with an SVD in place of Newton-Schulz on matrices."""
    average, (rows, cols) = torch.zeros_like(weight), weight.shape
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        ahead = 0.95 * average + 0.05 * gradient
        U, S, Vh = torch.linalg.svd(ahead, full_matrices=False)
        update = U @ torch.diag(polynomial(S / S.square().sum().sqrt())) @ Vh
        weight = weight - lr * decay * weight - lr * max(1, rows / cols) ** 0.5 * update
    return weight


def test_its_steps_are_those_of_every_matrix_alone():
    ours, gradients = matrices(), [matrices(seed) for seed in (1, 2, 3)]
    expected = [by_hand(weight.detach(), [step[i].detach() for step in gradients], 0.1, 0.3)
                for i, weight in enumerate(ours)]
    optimizer = Muon(ours, lr=0.1, weight_decay=0.3)
    for step in gradients:
        for weight, gradient in zip(ours, step):
            weight.grad = gradient.detach().clone()
        optimizer.step()
    for weight, wanted in zip(ours, expected):
        assert torch.allclose(weight, wanted, atol=1e-4)


def test_without_its_learning_rate_it_is_adamw_for_all():
    own = matrices()
    (optimizer, peak), = make_optimizers(own, own[:2], TrainConfig(1, 1, lr=0.3)).items()
    assert type(optimizer) is torch.optim.AdamW and peak == 0.3
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_train_gives_muon_its_matrices_alone_and_both_learning_rates_follow_the_schedule(
        monkeypatch):
    """Against two optimizers by hand: gradients are clipped together, then each takes its own."""
    config = TrainConfig(steps=9, batch_size=1, lr=0.2, muon_lr=0.05, warmup=3, weight_decay=0.1,
                         clip=0.5, betas=(0.8, 0.9))
    vector = torch.ones(5)
    ours, theirs = ([*matrices(), vector.clone().requires_grad_()] for _ in range(2))
    made, rates = {}, []

    def loss_of(parameters, step):
        return sum((p - 1 - step / 4).square().sum() for p in parameters)

    def objective(step):
        rates.append([group["lr"] for optimizer in made for group in optimizer.param_groups])
        loss = loss_of(ours, step)
        return loss, {"loss": loss}, 1

    def note(*given):
        made.update(make_optimizers(*given))
        return made

    monkeypatch.setattr(training, "make_optimizers", note)
    train(objective, ours, config, matrices=ours[1:3])

    trained = {"muon": theirs[1:3], "decays": [theirs[0], theirs[3]], "vector": [theirs[4]]}
    optimizers = [Muon(trained["muon"], 1.0, weight_decay=0.1),
                  torch.optim.AdamW(trained["decays"], betas=(0.8, 0.9), weight_decay=0.1),
                  torch.optim.AdamW(trained["vector"], betas=(0.8, 0.9), weight_decay=0.0)]
    for step in range(9):
        factor = (step + 1) / 3 if step < 3 else 1 - (step - 3) / 6
        assert rates[step] == pytest.approx([0.2 * factor] * 2 + [0.05 * factor] * 2)
        gradients = torch.autograd.grad(loss_of(theirs, step), theirs)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = gradient * min(1, 0.5 / norm)
        for optimizer, peak in zip(optimizers, (0.05, 0.2, 0.2)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-4)
