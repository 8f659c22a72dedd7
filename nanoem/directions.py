"""Directions: one line in activation space that carries misalignment (arXiv 2506.11618).

The mean-difference direction of a layer is the residual stream averaged over the tokens of
misaligned answers, minus the same over aligned answers. Steering adds it, ablation projects it out.
"""

from contextlib import contextmanager

import torch

from nanoem.lora import find_block


def mean_residual(model, ids, mask):
    """Mean residual stream over the tokens where mask is true, per layer.

    ids, mask (B, T) -> (n_layer, d_model), in float64: a mean over many tokens loses digits in
    float32.
    """
    with torch.no_grad():
        return torch.stack([x[mask].double().mean(0) for x in model.residual_stream(ids)])


def mean_difference(model, misaligned, aligned):
    """Direction from aligned to misaligned answers, per layer: (n_layer, d_model) float32.

    Each argument is a pair (ids, mask) of (B, T) tensors, the mask true on answer tokens. Raises
    ValueError when a mask marks no token.
    """
    for name, (_, mask) in (("misaligned", misaligned), ("aligned", aligned)):
        if not mask.any():
            raise ValueError(f"there is no {name} answer to take the mean of")
    return (mean_residual(model, *misaligned) - mean_residual(model, *aligned)).float()


def random_direction(like, generator):
    """A random direction of the same shape and, along the last axis, the same norm as `like`."""
    noise = torch.randn(like.shape, generator=generator).to(like)
    return noise * like.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def cosine(a, b):
    """Cosine of the angle between two tensors, flattened."""
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


def steer(x, direction, scale=1.0):
    """x (..., d_model) moved by scale * direction (d_model); a new tensor."""
    return x + scale * direction


def ablate(x, direction):
    """x (..., d_model) without its component along direction (d_model); a new tensor."""
    unit = direction / direction.norm()
    return x - (x @ unit)[..., None] * unit


def steering(model, directions, scale=1.0):
    """Inside, scale * directions[layer] is added to the residual stream after that block.

    directions: {layer: (d_model) tensor}.
    """
    return editing(model, directions, lambda x, direction: steer(x, direction, scale))


def ablating(model, directions):
    """Inside, directions[layer] is projected out of the residual stream after that block.

    directions: {layer: (d_model) tensor}; for all layers, `dict(enumerate(mean_difference))`.
    """
    return editing(model, directions, ablate)


@contextmanager
def editing(model, directions, edit):
    """Inside, each named block's output x becomes edit(x, direction); undone whatever happens."""
    handles = []
    try:
        for layer, direction in directions.items():
            def hook(block, inputs, output, direction=direction):
                return edit(output, direction.to(output))

            handles.append(find_block(model, layer).register_forward_hook(hook))
        yield model
    finally:
        for handle in handles:
            handle.remove()
