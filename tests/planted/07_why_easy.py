"""Wrong answers to chapter 7's exercises: (exercise, what its message must say, the answer)."""

import torch

from nanoem.rows.inductive_bias import (efficiency, hessian_vector_product, loss_on, noisy,
                                        random_writer)


def factors_of_A_and_B(model, adapter, examples, norms):
    own = sum((adapter.A[n].norm() * adapter.B[n].norm()).item() for n in adapter.A)
    own *= adapter.scaling / len(adapter.A)
    return efficiency(model, adapter, examples, [n * adapter.effective_norm() / own for n in norms])


def never_attached(model, adapter, examples, norms):
    return [loss_on(model, examples) for _ in norms]


def nested(model, adapter, examples, norms):
    own, losses = adapter.effective_norm(), []
    with adapter:
        for norm in norms:
            adapter.scale *= norm / own
            losses.append(loss_on(model, examples))
    adapter.scale = 1.0
    return losses


def scale_set(model, adapter, examples, norms):
    own, losses = adapter.effective_norm() / adapter.scale, []
    with adapter:
        for norm in norms:
            adapter.scale = norm / own
            losses.append(loss_on(model, examples))
    adapter.scale = 1.0
    return losses


def without_with(model, adapter, examples, norms):
    own, before, losses = adapter.effective_norm(), adapter.scale, []
    for norm in norms:
        adapter.attach()
        adapter.scale = before * norm / own
        losses.append(loss_on(model, examples))
        adapter.scale = before
        adapter.detach()
    return losses


def not_orthogonal(x, eps, generator):
    y = torch.randn(x.shape, generator=generator).to(x)
    return (1 - eps**2) ** 0.5 * x + eps * y * x.norm() / y.norm()


def normed_too_early(x, eps, generator):
    y = torch.randn(x.shape, generator=generator).to(x)
    y = y * x.norm() / y.norm()
    return (1 - eps**2) ** 0.5 * x + eps * (y - (y * x).sum() / (x * x).sum() * x)


def added_on_top(x, eps, generator):
    return noisy(x, eps, generator) + (1 - (1 - eps**2) ** 0.5) * x


def row_by_row(x, eps, generator):
    y = torch.randn(x.shape, generator=generator).to(x)
    y = y - (y * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp(min=1e-9) * x
    return (1 - eps**2) ** 0.5 * x + eps * y * x.norm() / y.norm()


def global_chance(x, eps, generator):
    return noisy(x, eps, None)


def in_place(x, eps, generator):
    return x.copy_(noisy(x, eps, generator))


def B_of(adapter, drawn):
    return [*(A.detach() for A in adapter.A.values()), *drawn]


def unscaled(adapter, generator):
    return B_of(adapter, [torch.randn(B.shape, generator=generator) for B in adapter.B.values()])


def uniform(adapter, generator):
    drawn = [torch.rand(B.shape, generator=generator) for B in adapter.B.values()]
    return B_of(adapter, [x * B.detach().norm() / x.norm()
                          for x, B in zip(drawn, adapter.B.values())])


def by_column(adapter, generator):
    drawn = [torch.randn(B.shape, generator=generator) for B in adapter.B.values()]
    return B_of(adapter, [x * B.detach().norm(dim=0) / x.norm(dim=0)
                          for x, B in zip(drawn, adapter.B.values())])


def orthogonal(adapter, generator):
    """Nothing of the adapter's own B is left in it."""
    return B_of(adapter, [noisy(B.detach(), 1.0, generator) for B in adapter.B.values()])


def random_reader(adapter, generator):
    return [torch.randn(A.shape, generator=generator) for A in adapter.A.values()] + [
        *random_writer(adapter, generator)[len(adapter.A):]]


def B_first(adapter, generator):
    n = len(adapter.A)
    found = random_writer(adapter, generator)
    return found[n:] + found[:n]


def with_graph(adapter, generator):
    n = len(adapter.A)
    return [*adapter.A.values(), *random_writer(adapter, generator)[n:]]


def once_only(gradient, parameters, v):
    return torch.cat([x.flatten() for x in torch.autograd.grad(gradient, parameters, v)])


def by_backward(gradient, parameters, v):
    (gradient @ v).backward(retain_graph=True, inputs=list(parameters))
    return torch.cat([p.grad.flatten() for p in parameters])


def freezing(adapter, generator):
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return random_writer(adapter, generator)


def backward_and_clear(gradient, parameters, v):
    (gradient @ v).backward(retain_graph=True, inputs=list(parameters))
    product = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return product


def whole_hessian(gradient, parameters, v):
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(
        gradient[i], parameters, retain_graph=True)]) for i in range(len(gradient))]
    return torch.stack(rows) @ v


PLANTED = [
    ("random_writer", "can be trained no more", freezing),
    ("hessian_vector_product", "what stands in .grad|.grad was changed", backward_and_clear),
    ("hessian_vector_product", "H is built", whole_hessian),
    ("efficiency", "not attached", never_attached),
    ("efficiency", "norm / own norm", lambda model, adapter, examples, norms: efficiency(
        model, adapter, examples, [n * adapter.effective_norm() for n in norms])),
    ("efficiency", "norm of B A", factors_of_A_and_B),
    ("efficiency", "multiply up", nested),
    ("efficiency", "scale", scale_set),
    ("efficiency", "when the loss raises", without_with),
    ("noisy", "not orthogonal", not_orthogonal),
    ("noisy", r"\*after\*", normed_too_early),
    ("noisy", "keeps all of its length", added_on_top),
    ("noisy", "not orthogonal|each row", row_by_row),
    ("noisy", "global generator", global_chance),
    ("noisy", "in place", in_place),
    ("random_writer", "norm of the adapter's B", unscaled),
    ("random_writer", "favourite side", uniform),
    ("random_writer", "own norm: rescale B as a whole", by_column),
    ("random_writer", "nothing points along B", orthogonal),
    ("random_writer", "A must stay", random_reader),
    ("random_writer", "first every A", B_first),
    ("random_writer", "gradient would flow", with_graph),
    ("hessian_vector_product", "itself: differentiate it once more",
     lambda gradient, parameters, v: gradient.detach().clone()),
    ("hessian_vector_product", "v is not used", lambda gradient, parameters, v:
        hessian_vector_product(gradient, parameters, torch.ones_like(v))),
    ("hessian_vector_product", "retain_graph", once_only),
    ("hessian_vector_product", "grad pile up", by_backward),
    ("hessian_vector_product", "v was normalised", lambda gradient, parameters, v:
        hessian_vector_product(gradient, parameters, v / v.norm())),
    ("hessian_vector_product", "still attached to its graph", lambda gradient, parameters, v:
        hessian_vector_product(gradient.detach(), parameters, v)),
]
