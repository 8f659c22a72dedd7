"""The pretended card refuses what a real one refuses; test_run and test_real use it."""

import pytest
import torch

from pretend_card import pretend_card


@pytest.fixture
def card(monkeypatch):
    with pretend_card(monkeypatch):
        yield


def test_a_tensor_left_behind_is_refused(card, model, ids):
    x = torch.ones(3, device="cuda")
    for refused in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x > 0],
                    lambda: torch.cat([x, torch.ones(3)]), lambda: model.to("cuda")(ids)):
        with pytest.raises(RuntimeError, match="on one device"):
            refused()
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number may stay where it is
    assert x[torch.tensor([0, 2])].shape == (2,)  # and so may an index
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator("cuda"))
