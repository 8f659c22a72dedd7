"""A stand-in for a card: what an answer makes without device= cannot meet its inputs.

    with OnACard():
        answer.attend(q, k, v)  # raises RuntimeError, as on a card, where a device= is missing
"""

import torch
from torch.overrides import TorchFunctionMode

from classroom import tensors_in


class Elsewhere(torch.Tensor):
    """A tensor that was made without device=; on a card it would lie on the CPU still."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("to", "type_as") and any(
                not isinstance(x, torch.dtype) for x in (*args[1:], *(kwargs or {}).values())):
            args = args[0].as_subclass(torch.Tensor), *args[1:]
            return func(*args, **(kwargs or {}))  # moved: from now on a tensor like the others
        others = [x for x in tensors_in((args, kwargs)) if not isinstance(x, Elsewhere) and x.dim()]
        if others and func.__name__ != "__getitem__":  # an index may lie on the CPU
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs)


class OnACard(TorchFunctionMode):
    """Inside, what is made without device= meets the inputs only after a `.to`, as on a card."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or tensors_in((args, kwargs)) or kwargs.get("device"):
            return out
        return out.as_subclass(Elsewhere)
