"""Directions: one line in activation space that carries misalignment (arXiv 2506.11618).

The mean-difference direction of a layer is the residual stream averaged over the tokens of
misaligned answers, minus the same over aligned answers. Steering adds it, ablation projects it out.
"""

from contextlib import contextmanager

import torch

from nanoem.lora import find_block


def mean_residual(model, ids, mask):
    """Mean residual stream over the tokens where mask is true, per layer.

    ids, mask (B, T) -> (n_layer, d_model), on the CPU in float64: a mean over many tokens loses
    digits in float32. Raises ValueError when the mask marks no token.
    """
    if not mask.any():
        raise ValueError("the mask marks no token to take the mean of")
    with torch.no_grad():
        return torch.stack([x[mask].cpu().double().mean(0) for x in model.residual_stream(ids)])


def mean_difference(misaligned, aligned):
    """Direction from aligned to misaligned: the difference of two means, float32.

    Each is a mean residual (n_layer, d_model), of the model that gave those answers.
    """
    return (misaligned - aligned).float()


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


def ablate(x, direction, level=0.0):
    """x (..., d_model) with its component along direction (d_model) set to level; a new tensor.

    Level 0 projects the direction out. In a residual stream of few dimensions zero means nothing
    special, and the level of an untouched model is the cleaner "switch it off" (mean ablation).
    """
    unit = direction / direction.norm()
    return x - (x @ unit - level)[..., None] * unit


def steering(model, directions, scale=1.0):
    """Inside, scale * directions[layer] is added to the residual stream after that block.

    directions: {layer: (d_model) tensor}.
    """
    return editing(model, {layer: lambda x, d=direction: steer(x, d.to(x), scale)
                           for layer, direction in directions.items()})


def ablating(model, directions, levels=None):
    """Inside, the component along directions[layer] after that block is held at levels[layer].

    directions: {layer: (d_model) tensor}; levels: {layer: float}, 0 for all if None, so that the
    direction is projected out.
    """
    return editing(model, {layer: lambda x, d=direction, level=(levels or {}).get(layer, 0.0):
                           ablate(x, d.to(x), level) for layer, direction in directions.items()})


def levels_of(mean, directions):
    """{layer: component of mean (n_layer, d_model) along directions[layer]}"""
    return {layer: (mean[layer].to(d) @ d / d.norm()).item() for layer, d in directions.items()}


@contextmanager
def editing(model, edits):
    """Inside, each layer's block output x becomes edits[layer](x); undone whatever happens."""
    handles = []
    try:
        for layer, edit in edits.items():
            handles.append(find_block(model, layer).register_forward_hook(
                lambda block, inputs, output, edit=edit: edit(output)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
