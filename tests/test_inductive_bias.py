"""Efficiency, noise, curvature, significance: against merged weights and finite differences."""

import numpy as np
import pytest
import torch

from nanoem.lora import LoRA
from nanoem.losses import kl_to_base, sft_loss
from nanoem.lab.inductive_bias import (balanced, curvature, efficiency, flat_B, gradient_B,
                                        local_cosine, loss_on, principal_plane, replaced,
                                        significance, stability)
from nanoem.train import Examples, StageFailed

NAME = "layers.0.self_attn.v_proj"


@pytest.fixture
def adapter(model):
    generator = torch.Generator().manual_seed(0)
    adapter = LoRA(model, [0], ["self_attn.v_proj"], alpha=4.0, generator=generator)
    torch.nn.init.normal_(adapter.B[NAME], std=0.5, generator=generator)
    return adapter


@pytest.fixture
def examples(ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    answer = mask.clone()
    answer[:, :5] = False
    return Examples(ids, mask, answer)


def test_replaced_is_undone_after_an_exception(adapter):
    before = [p.clone() for p in adapter.parameters()]
    with pytest.raises(ZeroDivisionError):
        with replaced(adapter, [torch.zeros_like(p) for p in before]):
            assert all((p == 0).all() for p in adapter.parameters())
            1 / 0
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


def test_balanced_is_the_same_model_and_its_curvature_no_matter_of_units(model, adapter, examples):
    def relative():
        generator = torch.Generator().manual_seed(0)
        with replaced(adapter, balanced(adapter)):
            assert adapter.A[NAME].norm().item() == pytest.approx(adapter.B[NAME].norm().item())
            with torch.no_grad(), adapter:
                logits = model(examples.ids)
            return logits, curvature(model, adapter, examples, generator)["relative"]

    with torch.no_grad(), adapter:
        before = model(examples.ids)
    logits, found = relative()
    assert torch.allclose(logits, before, atol=1e-4)
    with replaced(adapter, [2 * adapter.A[NAME].detach(), adapter.B[NAME].detach() / 2]):
        assert relative()[1] == pytest.approx(found, rel=1e-3)  # unbalanced it is another number


def test_an_adapter_that_learned_nothing_is_told(model, examples):
    untrained = LoRA(model, [0], ["self_attn.v_proj"])
    for measure in (lambda: efficiency(model, untrained, examples, [1.0]),
                    lambda: significance(model, untrained, examples.ids, examples.mask, [1.0]),
                    lambda: stability(model, untrained, examples, [0.1], 1, None)):
        with pytest.raises(StageFailed, match="norm is 0.0: it has learned nothing"):
            measure()


def test_stability_is_zero_without_noise_and_relative_to_the_gain(model, adapter, examples):
    generator = torch.Generator().manual_seed(5)
    found = stability(model, adapter, examples, [0.0, 0.5], 3, generator)
    assert found["abs"][0] == pytest.approx(0, abs=1e-6)
    base = loss_on(model, examples)
    with adapter:
        own = loss_on(model, examples)
    assert found["rel"][1] == pytest.approx(100 * found["abs"][1] / (base - own), rel=1e-4)
    again = stability(model, adapter, examples, [0.0, 0.5], 3, torch.Generator().manual_seed(5))
    assert again == found


def test_significance_is_kl_to_base_at_that_norm(model, adapter, ids, examples):
    norm = 2 * adapter.effective_norm()
    (found,) = significance(model, adapter, ids, examples.mask, [norm])
    with torch.no_grad(), adapter, adapter.scaled(2.0):
        assert found == pytest.approx(kl_to_base(model, adapter, ids, examples.mask).item())


def test_curvature_is_that_of_the_hessian_by_finite_differences(model, adapter, examples):
    model.double()
    examples = examples[:1]
    for p in adapter.parameters():
        p.data = p.data.double()
    parameters = adapter.parameters()
    start = torch.cat([p.detach().flatten() for p in parameters])
    sizes = [p.numel() for p in parameters]

    def gradient(x):
        values = [part.view_as(p) for part, p in zip(x.split(sizes), parameters)]
        with adapter, replaced(adapter, values):
            loss = sft_loss(model(examples.ids), examples.ids, examples.answer_mask)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    step = 1e-5 * torch.eye(len(start), dtype=torch.float64)
    hessian = torch.stack([(gradient(start + e) - gradient(start - e)) / 2e-5 for e in step])
    eigenvalues = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    largest = eigenvalues[eigenvalues.abs().argmax()].item()
    found = curvature(model, adapter, examples, torch.Generator().manual_seed(0), 100, 200)
    assert found["top"] == pytest.approx(largest, rel=0.02)
    spread = (hessian.square().sum() - hessian.diagonal().square().sum()).item()
    assert abs(found["trace"] - hessian.trace().item()) < 4 * (2 * spread / 200) ** 0.5
    assert found["relative"] == pytest.approx(found["top"] * start.square().sum().item(), rel=1e-6)


def test_gradient_of_B_is_autograd_s_and_the_flat_B_a_copy(model, adapter, examples):
    with adapter:
        loss = sft_loss(model(examples.ids), examples.ids, examples.answer_mask)
        loss.backward()
    assert torch.allclose(gradient_B(model, adapter, examples), adapter.B[NAME].grad.flatten())
    copy = flat_B(adapter)
    adapter.B[NAME].data.zero_()
    assert copy.norm() > 0


def test_local_cosine_of_a_straight_line_and_of_a_corner():
    line = torch.arange(5.0)[:, None] * torch.tensor([[3.0, 4.0]])
    assert local_cosine(line) == pytest.approx([1.0] * 3)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert local_cosine(corner) == pytest.approx([0.0, 1.0])


def test_the_principal_plane_is_that_of_the_covariance():
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    xy, share = principal_plane(points)
    eigenvalues = np.linalg.eigvalsh(np.cov(points.numpy().T))[::-1]
    assert share == pytest.approx(eigenvalues[:2].sum() / eigenvalues.sum(), rel=1e-4)
    assert xy.var(0).tolist() == pytest.approx(eigenvalues[:2].tolist(), rel=1e-4)
