"""Wrong answers to chapter 7's exercises: (exercise, what its message must say, the answer)."""

import torch

from nanoem.lab.inductive_bias import (efficiency, hessian_vector_product, loss_on, noisy,
                                        random_writer)


def never_attached(model, adapter, examples, norms):
    return [loss_on(model, examples) for _ in norms]


def without_with(model, adapter, examples, norms):
    own, before, losses = adapter.effective_norm(), adapter.scale, []
    for norm in norms:
        adapter.attach()
        adapter.scale = before * norm / own
        losses.append(loss_on(model, examples))
        adapter.scale = before
        adapter.detach()
    return losses


def row_by_row(x, eps, generator):
    y = torch.randn(x.shape, generator=generator).to(x)
    y = y - (y * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp(min=1e-9) * x
    return (1 - eps**2) ** 0.5 * x + eps * y * x.norm() / y.norm()


def global_chance(x, eps, generator):
    return noisy(x, eps, None)


def in_place(x, eps, generator):
    return x.copy_(noisy(x, eps, generator))


def B_first(adapter, generator):
    n = len(adapter.A)
    found = random_writer(adapter, generator)
    return found[n:] + found[:n]


def with_graph(adapter, generator):
    n = len(adapter.A)
    return [*adapter.A.values(), *random_writer(adapter, generator)[n:]]


def freezing(adapter, generator):
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return random_writer(adapter, generator)


def whole_hessian(gradient, parameters, v):
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(
        gradient[i], parameters, retain_graph=True)]) for i in range(len(gradient))]
    return torch.stack(rows) @ v


def scaled_until_ctrl_c(model, adapter, examples, norms):
    own, losses, before = adapter.effective_norm(), [], adapter.scale
    for norm in norms:
        adapter.attach()
        adapter.scale = before * norm / own
        try:
            losses.append(loss_on(model, examples))
        except Exception:
            adapter.detach()
            adapter.scale = before
            raise
        adapter.detach()
        adapter.scale = before
    return losses


PLANTED = [
    ("efficiency", "after Ctrl-C", scaled_until_ctrl_c),
    ("random_writer", "can be trained no more", freezing),
    ("hessian_vector_product", "H is built", whole_hessian),
    ("efficiency", "not attached", never_attached),
    ("efficiency", "norm / own norm", lambda model, adapter, examples, norms: efficiency(
        model, adapter, examples, [n * adapter.effective_norm() for n in norms])),
    ("efficiency", "when the loss raises", without_with),
    ("noisy", "not orthogonal|each row", row_by_row),
    ("noisy", "global generator", global_chance),
    ("noisy", "in place", in_place),
    ("random_writer", "first every A", B_first),
    ("random_writer", "gradient would flow", with_graph),
    ("hessian_vector_product", "itself: differentiate it once more",
     lambda gradient, parameters, v: gradient.detach().clone()),
    ("hessian_vector_product", "v is not used", lambda gradient, parameters, v:
        hessian_vector_product(gradient, parameters, torch.ones_like(v))),
    ("hessian_vector_product", "v was normalised", lambda gradient, parameters, v:
        hessian_vector_product(gradient, parameters, v / v.norm())),
    ("hessian_vector_product", "still attached to its graph", lambda gradient, parameters, v:
        hessian_vector_product(gradient.detach(), parameters, v)),
]
