"""Chapter 7. Fill in the functions; `python -m pytest tutorial/07_why_easy` tests them."""

import torch  # noqa: F401

from nanoem.lab.inductive_bias import loss_on  # noqa: F401  (for efficiency)


def efficiency(model, adapter, examples, norms):
    """The loss with the adapter rescaled to each norm: less loss per norm is more efficient.

    norms: effective norms (`adapter.effective_norm()`) to rescale to -> a list of losses, floats,
    one a norm: `loss_on(model, examples)` with the adapter acting at that norm. The adapter comes
    detached and leaves so, unchanged, even when the loss cannot be computed.

    Hint 1: the effective norm is proportional to the scale. What must the effect be multiplied by
        to go from the adapter's own norm to another?
    Hint 2: measure the own norm once, before anything is scaled.
    Hint 3: `with adapter, adapter.scaled(x):` attaches it and multiplies its effect by x.
    """
    raise NotImplementedError("efficiency is not written yet (exercise 7.1)")


def noisy(x, eps, generator):
    """sqrt(1 - eps^2) x + eps y, with y Gaussian, orthogonal to x and of its norm; a new tensor.

    x of any shape, taken as one long vector; eps from 0 to 1 -> the shape and dtype of x. All that
    is random comes from the generator.

    Hint 1: draw y with torch.randn(x.shape, generator=generator), then .to(x) for the dtype.
    Hint 2: take the part of y along x away: y - (y . x) / (x . x) x. The dot of two tensors of any
        shape is (y * x).sum().
    Hint 3: only then give it the norm of x: projecting has made it shorter.
    """
    raise NotImplementedError("noisy is not written yet (exercise 7.2)")


def random_writer(adapter, generator):
    """Parameters of a control: the same A, so it reads the same inputs; B random, of its norm.

    A list in the order of adapter.parameters(): first every A of adapter.A, as it is, then for
    every B of adapter.B a Gaussian tensor, as a whole rescaled to the norm of that B. The adapter
    is not changed, and no gradient flows to it. All that is random comes from the generator.

    Hint 1: adapter.A and adapter.B are {name: parameter}; their values() are in the right order.
    Hint 2: torch.randn(B.shape, generator=generator).to(B) has B's shape and dtype.
    Hint 3: `.detach()` of a parameter is a plain tensor.
    """
    raise NotImplementedError("random_writer is not written yet (exercise 7.3)")


def hessian_vector_product(gradient, parameters, v):
    """H v of the Hessian H (n, n), which is never built (Pearlmutter 1994).

    gradient (n), flat, was taken with create_graph=True, so that it can be differentiated again;
    parameters are the tensors it was taken by, in the same order; v (n) -> (n), flat.

    Hint 1: H v is the gradient, by the parameters, of the number gradient . v (v is a constant).
    Hint 2: torch.autograd.grad(gradient, parameters, v) is just that: a list, one tensor a
        parameter. Flatten and concatenate them.
    Hint 3: you will be asked again with another v: retain_graph=True keeps the graph.
    """
    raise NotImplementedError("hessian_vector_product is not written yet (exercise 7.4)")
