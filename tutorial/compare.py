"""Comparing an answer with an oracle, and naming the mistake when it is a known one."""

import torch


def close(a, b, tolerance):
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), tolerance, tolerance)


def check(got, want, mistakes, otherwise, tolerance=1e-4):
    """got, a tensor, must be want. mistakes: {message: the tensor that this mistake leads to}."""
    assert isinstance(got, torch.Tensor), f"return a tensor, not {type(got).__name__}"
    for message, value in mistakes.items():
        assert close(value, want, tolerance) or not close(got, value, tolerance), message
    assert got.shape == want.shape, (
        f"the shape is {tuple(got.shape)}, and should be {tuple(want.shape)}: {otherwise}")
    assert not got.isnan().any(), "there are NaNs in it; is something divided by zero?"
    assert close(got, want, tolerance), otherwise
