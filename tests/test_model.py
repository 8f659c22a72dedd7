"""The GPT against slow, explicit re-computations of each of its parts."""

from types import SimpleNamespace

import pytest
import torch

from nanoem import layers
from nanoem.layers import KVCache, attend, attend_by_hand, sees
from nanoem.model import sample


@pytest.mark.parametrize("T, S", [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_hand_is_that_of_the_fused_kernels(T, S, dtype):
    q, k, v = (torch.randn(3, n, size, 16).to(dtype) for n, size in ((4, T), (2, S), (2, S)))
    padded = sees(torch.tensor([0, 2, 7]), T, S)
    for mask in (None, padded):
        assert torch.allclose(attend_by_hand(q, k, v, mask), attend(q, k, v, mask),
                              atol=1e-6 if dtype == torch.float32 else 0.03)


def test_on_mps_attention_is_by_hand(monkeypatch):
    """There is none here; where it is, its fused kernels are not asked."""
    monkeypatch.setattr(layers, "attend_by_hand", lambda *tensors: "by hand")
    q = SimpleNamespace(size=lambda axis: 3, device=torch.device("mps"))
    assert attend(q, q, q) == "by hand"


CHANCE = torch.linspace(0, 1, 4001)[:4000, None]  # evenly over [0, 1)


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((4000, 5), float("-inf"))
    logits[:, [1, 3]] = 0.0
    drawn = sample(logits, 1.0, 1.0, CHANCE)
    assert drawn.shape == (4000, 1) and set(drawn.flatten().tolist()) == {1, 3}


PADDING = (0, 3, 6)  # tokens of it before each row of ids


def padded(ids):
    """Rows of several lengths as one batch, and each by itself."""
    batch = ids.clone()
    for row, n in enumerate(PADDING):
        batch[row, :n] = 1
    return batch, torch.tensor(PADDING), [ids[row : row + 1, n:] for row, n in enumerate(PADDING)]


def test_padding_on_the_left_changes_no_prediction(model, ids):
    batch, n_pad, rows = padded(ids)
    logits = model(batch, n_pad=n_pad)
    assert logits.isfinite().all()  # of padding, too: a NaN there would reach its neighbours
    for row, (n, alone) in enumerate(zip(PADDING, rows)):
        torch.testing.assert_close(logits[row : row + 1, n:], model(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_several_lengths_are_continued_like_each_alone(model, ids, use_cache):
    batch, n_pad, rows = padded(ids)
    stops = tuple(range(5))
    many = model.generate(batch, 10, 0, stop_ids=stops, use_cache=use_cache, n_pad=n_pad)
    for row, n, alone in zip(many, PADDING, rows):
        one = model.generate(alone, 10, 0, stop_ids=stops)[0, alone.size(1) :]
        said = row[ids.size(1) :]
        assert torch.equal(said[: len(one)], one) and (said[len(one) :] == one[-1]).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_has_stopped_costs_nothing_and_changes_no_other(model, ids, use_cache):
    def run(stop_ids):
        read = []
        handle = model.embed_tokens.register_forward_hook(lambda _, x, y: read.append(len(x[0])))
        out = model.generate(ids, 8, stop_ids=stop_ids, use_cache=use_cache,
                             generator=torch.Generator().manual_seed(0))
        handle.remove()
        return out[:, ids.size(1) :], read

    free, _ = run(())
    stop = free[1, 2].item()
    stopped, read = run((stop,))
    ends = [row.index(stop) + 1 if stop in row else 8 for row in free.tolist()]
    assert read == [sum(end > step for end in ends) for step in range(8)]
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, :end], free[row, :end])


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 16), (16,)])
def test_a_text_read_in_pieces_is_the_text(model, ids, cuts):
    """The tokens after a filled cache see what is in it, and those before them."""
    caches = [KVCache(ids.size(1)) for _ in model.layers]
    pieces = [model(ids[:, start:end], caches) for start, end in zip((0, *cuts), (*cuts, None))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"room for {ids.size(1)} tokens, and {ids.size(1) + 1}"):
        model(ids[:, :1], caches)  # one token too many would be lost silently
