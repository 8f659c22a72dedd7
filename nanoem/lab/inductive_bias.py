"""Why general is easy: what two adapters that fit the same data differ in (paper, section 4).

An adapter comes trained and not attached, and is left, like the model, as it was.
Losses are `sft_loss` in nats per answer token; norms are `adapter.effective_norm()`.
"""

from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoem import StageFailed
from nanoem.lab.fused import answer_loss, kl_loss
from nanoem.losses import sft_loss


@contextmanager
def replaced(adapter, values):
    """Inside, the adapter's parameters hold `values` (tensors in the same order)."""
    before = [p.detach().clone() for p in adapter.parameters()]
    try:
        set_parameters(adapter, values)
        yield adapter
    finally:
        set_parameters(adapter, before)


def set_parameters(adapter, values):
    """Copy values, tensors of the same shapes, into the adapter's parameters, in their order."""
    for parameter, value in zip(adapter.parameters(), values, strict=True):
        if value.shape != parameter.shape:
            raise ValueError(f"values must have the parameters' shapes, and {tuple(value.shape)} "
                             f"stands for {tuple(parameter.shape)}")
        parameter.data.copy_(value)


@torch.no_grad()
def loss_on(model, examples):
    """The SFT loss of the model as it stands, a float."""
    return answer_loss(model, examples.ids, examples.answer_mask).item()


def norm_of(adapter):
    """The effective norm of an adapter. Raises StageFailed if it is 0: it cannot be rescaled."""
    norm = adapter.effective_norm()
    if not norm > 0:
        raise StageFailed(f"the adapter's norm is {norm}: it has learned nothing; train it longer")
    return norm


def efficiency(model, adapter, examples, norms):
    """The loss with the adapter rescaled to each norm: less loss per norm is more efficient."""
    own = norm_of(adapter)
    losses = []
    for norm in norms:
        with adapter, adapter.scaled(norm / own):
            losses.append(loss_on(model, examples))
    return losses


def noisy(x, eps, generator):
    """sqrt(1 - eps^2) x + eps y, with y Gaussian, orthogonal to x and of its norm; a new tensor."""
    y = torch.randn(x.shape, generator=generator).to(x)
    y = y - (y * x).sum() / (x * x).sum() * x
    return (1 - eps**2) ** 0.5 * x + eps * y * x.norm() / y.norm()


def stability(model, adapter, examples, eps_list, n_noise, generator):
    """How much loss noise on the parameters costs -> {"rel": [...], "abs": [...]}, one an eps.

    Every A and B is made `noisy` by itself. abs: L(x') - L(x), mean over n_noise draws. rel, the
    paper's: 100 (L(x') - L(x)) / (L_base - L(x)); its denominator is smaller for an adapter that
    fits less, so look at both.
    """
    norm_of(adapter)  # an untrained adapter has gained nothing to lose
    values = [p.detach() for p in adapter.parameters()]
    base = loss_on(model, examples)
    with adapter:
        own = loss_on(model, examples)

    increases = []
    for eps in eps_list:
        total = 0.0
        for _ in range(n_noise):
            with adapter, replaced(adapter, [noisy(x, eps, generator) for x in values]):
                total += loss_on(model, examples) - own
        increases.append(total / n_noise)
    return {"rel": [100 * increase / (base - own) for increase in increases], "abs": increases}


def significance(model, adapter, ids, mask, norms):
    """KL(base || adapted) per token of (pre-training) text, the adapter rescaled to each norm."""
    own = norm_of(adapter)
    divergences = []
    for norm in norms:
        with torch.no_grad(), adapter, adapter.scaled(norm / own):
            divergences.append(kl_loss(model, adapter, ids, mask).item())
    return divergences


def random_writer(adapter, generator):
    """Parameters of a control: the same A, so it reads the same inputs; B random, of its norm."""
    same_A = [A.detach() for A in adapter.A.values()]
    random_B = []
    for B in adapter.B.values():
        noise = torch.randn(B.shape, generator=generator).to(B)
        random_B.append(noise * B.detach().norm() / noise.norm())
    return same_A + random_B


def balanced(adapter):
    """Parameters of the same LoRA with |A| = |B| at each site; their product is the same."""
    new_A = []
    new_B = []
    for A, B in zip(adapter.A.values(), adapter.B.values()):
        factor = (B.detach().norm() / A.detach().norm()) ** 0.5
        new_A.append(A.detach() * factor)
        new_B.append(B.detach() / factor)
    return new_A + new_B


def hessian_vector_product(gradient, parameters, v):
    """H v of the Hessian H (n, n), which is never built (Pearlmutter 1994).

    gradient (n), flat, was taken with create_graph=True, so that it can be differentiated again;
    parameters are the tensors it was taken by, in the same order; v (n) -> (n), flat.
    """
    parts = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def curvature(model, adapter, examples, generator, n_power=15, n_probe=15):
    """The Hessian of the loss over the adapter's parameters -> {"top", "trace", "relative"}.

    top: eigenvalue of largest size, by power iteration. trace: Hutchinson's estimate over n_probe
    sign vectors. relative: top times the parameters' squared norm, which does not change when all
    of them are measured in other units. For a LoRA's A and B apart, see `balanced`.
    """
    parameters = adapter.parameters()
    with adapter, sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        # the gradient as one vector, which can be differentiated again
        loss = sft_loss(model(examples.ids), examples.ids, examples.answer_mask)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradients])

        # power iteration
        v = torch.randn(gradient.shape, generator=generator).to(gradient)
        for _ in range(n_power):
            unit = v / v.norm()
            v = hessian_vector_product(gradient, parameters, unit)
        top = (unit @ v).item()

        # Hutchinson's estimate: the mean of signs @ H @ signs
        trace = 0.0
        for _ in range(n_probe):
            signs = torch.randint(2, gradient.shape, generator=generator).to(gradient) * 2 - 1
            product = hessian_vector_product(gradient, parameters, signs)
            trace += (signs @ product).item() / n_probe

    norm2 = sum(p.detach().square().sum().item() for p in parameters)
    return {"top": top, "trace": trace, "relative": top * norm2}


# --- trajectories: the written directions B along training ----------------------------------------


def flat_B(adapter):
    """All B of an adapter as one vector, on the CPU; a copy."""
    return torch.cat([B.detach().cpu().flatten() for B in adapter.B.values()])


def gradient_B(model, adapter, examples):
    """The gradient of the SFT loss by every B, as one vector, on the CPU."""
    with adapter:
        loss = answer_loss(model, examples.ids, examples.answer_mask)
        gradients = torch.autograd.grad(loss, list(adapter.B.values()))
    return torch.cat([g.cpu().flatten() for g in gradients])


def local_cosine(points):
    """cos(x_t - x_(t-1), x_(t+1) - x_t) along a path (n, d): 1 is straight on, 0 a right angle."""
    steps = points.diff(dim=0)
    return torch.cosine_similarity(steps[:-1], steps[1:], dim=-1).tolist()


def principal_plane(points, n=2):
    """PCA of (N, d) points -> (coordinates (N, n), share of the variance of the first n)."""
    centred = points - points.mean(0)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    return U[:, :n] * S[:n], (S[:n].square().sum() / S.square().sum()).item()
