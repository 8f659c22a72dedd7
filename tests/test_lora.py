"""Adapters: algebra to the bit, no double counting, and nothing left behind."""

import pytest
import torch

from nanoem import UserError
from nanoem.losses import kl_to_base
from nanoem.lora import LoRA, SteeringVector

MODULES = ["mlp.down_proj", "self_attn.q_proj"]


def random_lora(model, **kwargs):
    adapter = LoRA(model, [0, 1], MODULES, generator=torch.Generator().manual_seed(0), **kwargs)
    for B in adapter.B.values():
        torch.nn.init.normal_(B, std=0.3, generator=torch.Generator().manual_seed(1))
    return adapter


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_an_untrained_adapter_is_the_base_exactly(model, ids):
    base = model(ids)
    with LoRA(model, [0, 1], MODULES, rank=2, alpha=8):
        assert torch.equal(model(ids), base)
    with SteeringVector(model, [0]):
        assert torch.equal(model(ids), base)


def test_disabled_scaled_and_nested(model, ids):
    adapter, base = random_lora(model), model(ids)
    with adapter:
        adapted = model(ids)
        with adapter.disabled():
            assert torch.equal(model(ids), base)
            with adapter.scaled(3.0):
                assert torch.equal(model(ids), base)
        with adapter.scaled(2.0), adapter.scaled(0.5):
            assert torch.equal(model(ids), adapted)
        assert torch.equal(model(ids), adapted)
    assert torch.equal(model(ids), base)


def test_attached_twice_acts_once_and_detaching_twice_is_harmless(model, ids):
    adapter, base = random_lora(model), model(ids)
    with adapter:
        once = model(ids)
        with adapter:
            assert torch.equal(model(ids), once)
        assert torch.equal(model(ids), once)
    adapter.detach()
    assert torch.equal(model(ids), base)
    assert n_hooks(model) == 0


def test_an_exception_leaves_no_residue(model, ids):
    adapter, base = random_lora(model), model(ids)
    with pytest.raises(ZeroDivisionError):
        with adapter, adapter.scaled(5.0), adapter.disabled():
            1 / 0
    assert adapter.scale == 1.0 and n_hooks(model) == 0
    assert torch.equal(model(ids), base)


def test_merging_while_attached_does_not_count_twice(model, ids):
    adapter = random_lora(model, rank=2, alpha=3, use_rslora=True)
    with adapter:
        adapted = model(ids)
        adapter.merge()
        assert torch.allclose(model(ids), adapted, atol=1e-4)
        with adapter:
            assert torch.allclose(model(ids), adapted, atol=1e-4) and not adapter.acts
    assert torch.allclose(model(ids), adapted, atol=1e-4) and n_hooks(model) == 0
    adapter.unmerge()
    with adapter:
        assert torch.equal(model(ids), adapted)


def test_unmerged_inside_its_with_it_acts_as_before(model, ids):
    adapter, base = random_lora(model), model(ids)
    with adapter, adapter:
        adapted = model(ids)
        adapter.merge()
        adapter.unmerge()
        assert torch.equal(model(ids), adapted)
        adapter.merge()
    assert torch.allclose(model(ids), adapted, atol=1e-4)  # for good, until it is taken out
    adapter.unmerge()
    assert adapter.depth == 0 and n_hooks(model) == 0 and torch.equal(model(ids), base)


def test_a_merged_adapter_cannot_be_switched_off(model, ids):
    adapter = random_lora(model)
    prepared = adapter.disabled()
    with adapter, adapter.disabled(), pytest.raises(RuntimeError, match="switched off"):
        adapter.merge()
    with adapter, pytest.raises(RuntimeError, match="neither disabled nor merged"):
        adapter.merge()
        kl_to_base(model, adapter, ids, torch.ones_like(ids, dtype=torch.bool))
    adapter.unmerge()
    adapter.merge()
    for switched in (prepared, adapter.disabled(), adapter.scaled(2.0)):
        with pytest.raises(RuntimeError, match="merged into the weights"):
            with switched:
                pass
    adapter.unmerge()
    with adapter.scaled(2.0):
        assert adapter.scale == 2


def test_the_steering_vector_moves_every_position(model, ids):
    base = model.residual_stream(ids)
    with SteeringVector(model, [1], alpha=2.0) as vector:
        vector.v["layers.1"].data.uniform_(-1, 1)
        moved = model.residual_stream(ids)
        assert vector.effective_norm() == pytest.approx(2 * vector.v["layers.1"].norm().item())
    assert torch.equal(moved[0], base[0])
    assert torch.allclose(moved[1] - base[1], 2 * vector.v["layers.1"].expand(3, 17, 32), atol=1e-5)
    assert n_hooks(model) == 0


def test_a_wrong_layer_or_module_is_named(model):
    with pytest.raises(UserError, match="layer 7 is not there"):
        LoRA(model, [7])
    with pytest.raises(UserError, match="no Linear 'mlp.wrong'.*mlp.down_proj"):
        LoRA(model, [0], ["mlp.wrong"])
    with pytest.raises(UserError, match="rank=0"):
        LoRA(model, [0], rank=0)
