"""Directions: the algebra of steering and ablation, means against loops, hooks without residue."""

import pytest
import torch

from nanoem import UserError
from nanoem.directions import (ablate, ablating, all_sites, cosines, mean_difference, residual_at,
                               steer, steering)


@pytest.fixture
def x():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def d():
    return 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))


def test_steering_is_undone_by_steering_back_and_both_are_pure(x, d):
    before = x.clone()
    assert torch.allclose(steer(steer(x, d, 2.0), d, -2.0), x, atol=1e-5)
    assert torch.allclose(ablate(steer(x, d, 7.0), d), ablate(x, d), atol=1e-4)
    assert torch.equal(x, before)


def test_mean_difference_points_from_aligned_to_misaligned(x, d):
    aligned = x.double().mean((0, 1))[None]
    misaligned = steer(x, d).double().mean((0, 1))[None]
    assert torch.allclose(mean_difference(misaligned, aligned)[0], d, atol=1e-5)


def test_the_contexts_do_to_the_stream_what_the_functions_do(model, ids, d):
    first, _ = model.residual_stream(ids)
    with ablating(model, {0: d}):
        assert torch.allclose(model.residual_stream(ids)[0], ablate(first, d), atol=1e-5)
    with ablating(model, {0: d}, levels={0: 0.7}):
        assert torch.allclose(model.residual_stream(ids)[0], ablate(first, d, 0.7), atol=1e-5)
    both = {0: torch.arange(32.0), 1: d}  # of these, only that of the site is taken
    with ablating(model, {0: d}, {0: 0.7}, both):
        assert torch.allclose(model.residual_stream(ids)[0], ablate(first, d, 0.7, both[0]),
                              atol=1e-5)
    with steering(model, {0: d}, 0.5):
        assert torch.allclose(model.residual_stream(ids)[0], first + 0.5 * d, atol=1e-5)


def test_cosines_at_each_site_and_none_where_a_direction_is_zero(d):
    assert cosines(torch.stack((d, d, 0 * d)), torch.stack((2 * d, -d, d))) == [
        pytest.approx(1), pytest.approx(-1), None]


def test_what_comes_out_has_the_dtype_of_the_stream(d):
    x = torch.randn(3, 32).bfloat16()
    for out in (steer(x, d), ablate(x, d), ablate(x, d, 0.5, 2 * d)):
        assert out.dtype == torch.bfloat16
    assert torch.allclose(ablate(x, d).float(), ablate(x.float(), d), atol=0.05)


def test_contexts_nest_and_leave_nothing_after_an_exception(model, ids, d):
    base = model(ids)
    with pytest.raises(ZeroDivisionError):
        with steering(model, {0: d}), ablating(model, {1: d}), steering(model, {0: d}):
            1 / 0
    assert torch.equal(model(ids), base)
    with steering(model, {0: d}), steering(model, {0: d}, -1.0):
        assert torch.allclose(model(ids), base, atol=1e-3)
    with pytest.raises(UserError, match="layer 9"):
        with steering(model, {0: d, 9: d}):
            pass
    assert torch.equal(model(ids), base)
    assert not any(module._forward_hooks for module in model.modules())


def test_sites_are_between_the_sublayers(model, ids):
    """resid_mid is the stream before the block plus what its attention adds; nothing is left."""
    assert all_sites(model) == ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]
    mid, end = residual_at(model, ids, all_sites(model)[2:])
    before = model.residual_stream(ids)[0]
    block = model.layers[1]
    cos, sin = model.cos[: ids.size(1)], model.sin[: ids.size(1)]
    assert torch.allclose(mid, before + block.self_attn(block.input_layernorm(before), cos, sin),
                          atol=1e-5)
    assert torch.allclose(end, mid + block.mlp(block.post_attention_layernorm(mid)), atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_ablating_halfway_reaches_the_mlp(model, ids, d):
    with ablating(model, {"layers.1.resid_mid": d}):
        mid, end = residual_at(model, ids, ["layers.1.resid_mid", 1])
        # Hooks run in order: the reader's hook, set later, sees what the ablation left.
        assert (mid @ d / d.norm()).abs().max() < 1e-4
        block = model.layers[1]
        expected = mid + block.mlp(block.post_attention_layernorm(mid))
    assert torch.allclose(end, expected, atol=1e-4)


def test_a_direction_of_nothing_is_refused_and_not_divided_by(model, ids):
    zero = torch.zeros(model.config.d_model)
    with pytest.raises(ValueError, match=r"directions\[1\] is zero"):
        with ablating(model, {1: zero}):
            model(ids)
