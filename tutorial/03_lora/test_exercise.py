"""Tests of chapter 3's exercises. Each message names the likely mistake."""

import torch

from nanoem import lora

EXERCISES = {"lora_delta": lora.lora_delta}


def example(rank=4, n_in=6, n_out=5):
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*shape, generator=generator)
               for shape in ((2, 3, n_in), (rank, n_in), (n_out, rank)))
    return x, A, B


def test_lora_delta_is_that_of_the_whole_matrix(answer):
    x, A, B = example()
    got, want = answer.lora_delta(x, A, B, 8.0), x @ (8.0 / 4 * B @ A).T
    assert got.shape == want.shape, (
        f"shape {tuple(got.shape)}, not {tuple(want.shape)}: are A and B swapped?")
    assert not torch.allclose(got, want * 4, atol=1e-5), "divide alpha by the rank"
    assert torch.allclose(got, want, atol=1e-5), "not (alpha / rank) * B A x"
