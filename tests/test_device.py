"""The pretended card refuses what a real one refuses; test_run and test_real use it."""

import pytest
import torch

from pretend_card import Card, pretend_card


@pytest.fixture
def card(monkeypatch):
    with pretend_card(monkeypatch):
        yield


def test_what_is_computed_on_the_card_stays_there_and_can_be_trained(card, model, ids):
    want = model(ids)
    there = model.to("cuda").requires_grad_(True)
    logits = there(ids.to("cuda"))
    assert isinstance(logits, Card) and logits.device.type == there.device.type == "cuda"
    torch.testing.assert_close(logits.cpu(), want, rtol=0, atol=0)
    assert type(logits.cpu()) is torch.Tensor
    logits.sum().backward()
    assert isinstance(there.embed_tokens.weight.grad, Card)
    assert not torch.zeros(3).to(logits).requires_grad and isinstance(torch.ones(2, device="cuda"),
                                                                      Card)


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
