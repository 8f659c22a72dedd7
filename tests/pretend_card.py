"""A pretend card: `--device cuda` where there is none, to see that no tensor is left behind.

What is "on the card" is a CPU tensor of the class Card. What a real one refuses is refused: an
operation over two places, numpy, the other place's generator. So a forgotten `device=` shows here
as it would there; speed, memory and the card's own kernels do not.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

from nanoem.lab import command

CARD = torch.device("cuda", 0)
PlainGenerator = torch.Generator
MAY_CROSS = {torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__}


def tensors_in(x):
    """All tensors in nested arguments."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


class Card(torch.Tensor):
    """A tensor on the pretend card; what is computed from it is one, too."""

    device = CARD

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        left = [x for x in tensors_in((args, kwargs)) if not isinstance(x, Card) and x.dim()]
        crosses = func in MAY_CROSS and isinstance(args[0], Card)
        if left and not crosses:
            raise RuntimeError(f"{func.__name__}: expected all tensors on one device; a tensor of "
                               f"shape {tuple(left[0].shape)} is on the cpu")
        if func.__name__ in ("numpy", "__array__"):
            raise TypeError("can't convert a cuda tensor to numpy; use .cpu() first")
        found = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.grad.__get__ and found is not None:
            return found.as_subclass(Card)  # the engine makes it plain
        return found


class CardGenerator(PlainGenerator):
    """A generator on the pretend card."""

    device = CARD


class Generator:
    """In the place of torch.Generator: makes either kind."""

    def __new__(cls, device="cpu"):
        return CardGenerator() if torch.device(device).type == "cuda" else PlainGenerator(device)


class Moves(TorchFunctionMode):
    """Makes tensors on the card when a call says so, and takes them from there and to it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_card = any(isinstance(x, Card) for x in tensors_in((args, kwargs)))
        if func.__name__ == "_has_compatible_shallow_copy_type":
            return False  # Module.to then makes new parameters, as on its way to a real card
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return move(func, args, kwargs)
        if "device" in kwargs and kwargs["device"] is not None:
            on_card = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu" if on_card else kwargs["device"]
        if kwargs.get("generator") is not None:
            if on_card != isinstance(kwargs["generator"], CardGenerator):
                raise RuntimeError(f"{func.__name__}: the generator is on another device")
        found = func(*args, **kwargs)
        return found.as_subclass(Card) if on_card and type(found) is torch.Tensor else found


def move(func, args, kwargs):
    """x.to(...) or x.cpu(): plain, or a Card."""
    x, *given = args
    places = [x.device] + [a.device if isinstance(a, torch.Tensor) else torch.device(a)
                           for a in (*given, kwargs.pop("device", None))
                           if isinstance(a, (str, torch.device, torch.Tensor))]
    place = torch.device("cpu") if func is torch.Tensor.cpu else places[-1]
    dtypes = [x.dtype] + [a.dtype if isinstance(a, torch.Tensor) else a
                          for a in (*given, kwargs.pop("dtype", None))
                          if isinstance(a, (torch.dtype, torch.Tensor))]
    if (place.type, dtypes[-1]) == (x.device.type, x.dtype):
        return x
    if place.type not in ("cpu", "cuda"):
        return func(*args, **kwargs)
    plain = x.as_subclass(torch.Tensor).to(dtypes[-1], copy=True)
    return plain.as_subclass(Card) if place.type == "cuda" else plain


@contextlib.contextmanager
def pretend_card(monkeypatch):
    """Inside, "cuda" is a place where tensors are. (torch.cuda itself still says what is there.)"""
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(command, "pick_device", lambda name: name)
    with Moves():
        yield
