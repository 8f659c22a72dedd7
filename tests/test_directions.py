"""Directions: the algebra of steering and ablation, means against loops, hooks without residue."""

import numpy as np
import pytest
import torch

from nanoem import UserError
from nanoem.directions import (ablate, ablating, all_sites, cap, cosine, cosines, mean_difference,
                               mean_residual, quiet_reader, random_direction, residual_at,
                               residual_covariance, steer, steering)


@pytest.fixture
def x():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def d():
    return 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))


def test_ablation_removes_exactly_the_component(x, d):
    out, unit = ablate(x, d), d / d.norm()
    assert (out @ unit).abs().max() < 1e-5
    projector = torch.eye(32) - torch.outer(unit, unit)
    assert torch.allclose(out, x @ projector, atol=1e-5)


def test_ablating_twice_is_once_and_its_length_and_sign_do_not_matter(x, d):
    assert torch.allclose(ablate(ablate(x, d), d), ablate(x, d), atol=1e-6)
    assert torch.allclose(ablate(x, -0.1 * d), ablate(x, d), atol=1e-5)


def test_ablation_to_a_level_leaves_that_component_and_the_rest_alone(x, d):
    out, unit = ablate(x, d, level=1.5), d / d.norm()
    assert torch.allclose(out @ unit, torch.full((3, 5), 1.5), atol=1e-5)
    assert torch.allclose(ablate(out, d), ablate(x, d), atol=1e-5)


def test_steering_is_undone_by_steering_back_and_both_are_pure(x, d):
    before = x.clone()
    assert torch.allclose(steer(steer(x, d, 2.0), d, -2.0), x, atol=1e-5)
    assert torch.allclose(ablate(steer(x, d, 7.0), d), ablate(x, d), atol=1e-4)
    assert torch.equal(x, before)


def test_mean_residual_is_a_mean_over_masked_tokens(model, ids):
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    found = mean_residual(model, ids, mask)
    for layer, stream in enumerate(model.residual_stream(ids)):
        tokens = [stream[b, t].double() for b in range(3) for t in range(17) if mask[b, t]]
        assert torch.allclose(found[layer], torch.stack(tokens).mean(0), atol=1e-9)
    with pytest.raises(ValueError, match="marks 0 tokens"):
        mean_residual(model, ids, torch.zeros_like(mask))


def test_mean_difference_points_from_aligned_to_misaligned(x, d):
    aligned = x.double().mean((0, 1))[None]
    misaligned = steer(x, d).double().mean((0, 1))[None]
    assert torch.allclose(mean_difference(misaligned, aligned)[0], d, atol=1e-5)


def test_a_random_direction_has_the_same_norm_and_another_way(d):
    generator = torch.Generator().manual_seed(3)
    many = [random_direction(d, generator) for _ in range(50)]
    assert all(r.norm().item() == pytest.approx(d.norm().item(), rel=1e-5) for r in many)
    assert max(abs(cosine(r, d)) for r in many) < 0.6
    assert cosine(d, 5 * d) == pytest.approx(1) and cosine(d, -d) == pytest.approx(-1)


def test_the_contexts_do_to_the_stream_what_the_functions_do(model, ids, d):
    first, _ = model.residual_stream(ids)
    with ablating(model, {0: d}):
        assert torch.allclose(model.residual_stream(ids)[0], ablate(first, d), atol=1e-5)
    with ablating(model, {0: d}, levels={0: 0.7}):
        assert torch.allclose(model.residual_stream(ids)[0], ablate(first, d, 0.7), atol=1e-5)
    with steering(model, {0: d}, 0.5):
        assert torch.allclose(model.residual_stream(ids)[0], first + 0.5 * d, atol=1e-5)


def test_ablating_at_all_layers_leaves_the_component_nowhere(model, ids, d):
    with ablating(model, {0: d, 1: d}):
        assert all((s @ d / d.norm()).abs().max() < 1e-4 for s in model.residual_stream(ids))


def test_cosines_at_each_site_and_none_where_a_direction_is_zero(d):
    assert cosines(torch.stack((d, d, 0 * d)), torch.stack((2 * d, -d, d))) == [
        pytest.approx(1), pytest.approx(-1), None]


def test_what_comes_out_has_the_dtype_of_the_stream(d):
    x = torch.randn(3, 32).bfloat16()
    for out in (steer(x, d), ablate(x, d), ablate(x, d, 0.5, d / d.norm()), cap(x, d, 0.0, d)):
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


def test_ablating_with_a_reader_sets_what_it_reads_and_twice_is_once(x, d):
    reader = d / d.norm() + 0.3 * ablate(torch.randn(32), d)  # reader @ unit = 1
    out = ablate(x, d, 0.4, reader)
    assert torch.allclose(out @ reader, torch.full((3, 5), 0.4), atol=1e-4)
    assert torch.allclose(ablate(out, d, 0.4, reader), out, atol=1e-4)
    assert torch.allclose(ablate(out, d), ablate(x, d), atol=1e-4)  # only along d was changed


def test_the_quiet_reader_hears_least_of_the_given_variance(d):
    """Among all readers with reader @ unit = 1 it has the least variance (Gauss-Markov)."""
    generator = torch.Generator().manual_seed(4)
    A = torch.randn(32, 32, dtype=torch.float64, generator=generator)
    covariance, unit = A @ A.T, (d / d.norm()).double()
    reader = quiet_reader(d, covariance, ridge=0.0).double()
    assert (reader @ unit).item() == pytest.approx(1, abs=1e-4)
    least = (reader @ covariance @ reader).item()
    for _ in range(20):
        other = reader + 0.05 * ablate(torch.randn(32, generator=generator).double(), d.double())
        assert (other @ covariance @ other).item() > least
    isotropic = quiet_reader(d, torch.eye(32, dtype=torch.float64))
    assert torch.allclose(isotropic, d / d.norm(), atol=1e-5)


def test_covariance_is_that_of_numpy(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = residual_covariance(model, ids, mask, sites=[0, 1])
    for layer, stream in enumerate(model.residual_stream(ids)):
        expected = np.cov(stream.reshape(-1, 32).double().numpy().T)
        assert np.allclose(found[layer].numpy(), expected, atol=1e-9)


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


def test_a_cap_takes_the_excess_and_leaves_the_rest_to_the_bit(x, d):
    unit = d / d.norm()
    reader = unit + 0.3 * ablate(torch.randn(32, generator=torch.Generator().manual_seed(5)), d)
    heard, out = x @ reader, cap(x, d, 0.5, reader)
    assert torch.allclose(out @ reader, heard.clamp(max=0.5), atol=1e-4)
    assert (heard > 0.5).any() and torch.equal(out[heard <= 0.5], x[heard <= 0.5])
    assert torch.allclose(ablate(out, d), ablate(x, d), atol=1e-4)  # only along d was changed
    assert torch.allclose(cap(out, d, 0.5, reader), out, atol=1e-4)


def test_a_direction_of_nothing_is_refused_and_not_divided_by(model, ids):
    zero = torch.zeros(model.config.d_model)
    with pytest.raises(ValueError, match="zero, and points nowhere"):
        quiet_reader(zero, torch.eye(len(zero)))
    with pytest.raises(ValueError, match=r"directions\[1\] is zero"):
        with ablating(model, {1: zero}):
            model(ids)
