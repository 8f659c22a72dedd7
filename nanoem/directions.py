"""Directions: one line in activation space that carries misalignment (arXiv 2506.11618).

The mean-difference direction of a site is the residual stream averaged over the tokens of
misaligned answers, minus the same over aligned answers. Steering adds it, ablation takes it out.

A site is a place in the residual stream: an int i, after block i, or a module's name such as
"layers.1.resid_mid", halfway through block 1, between attention and MLP (arXiv 2406.11717 also
ablates there: what attention just brought, the MLP must not use).
"""

from contextlib import contextmanager

import torch
from torch.nn import ModuleList

from nanoem import UserError
from nanoem.lora import find_block
from nanoem.losses import check_mask


def all_sites(model):
    """Every site, from the first layer to the last: two a block."""
    return [site for i in range(len(model.layers)) for site in (f"layers.{i}.resid_mid", i)]


def find_site(model, site):
    """The module after which the site lies. Raises UserError for one that is not there."""
    if isinstance(site, int):
        return find_block(model, site)
    modules = dict(model.named_modules())
    if not site or isinstance(modules.get(site), (type(None), ModuleList)):  # a list is never run
        raise UserError(f"site {site!r} is not there; the model's are {all_sites(model)}")
    return modules[site]


def residual_at(model, ids, sites):
    """The residual stream at each site: a list of tensors (B, T, d_model). No gradients."""
    streams = {}
    record = {site: lambda x, site=site: streams.setdefault(site, x) for site in sites}
    with torch.no_grad(), editing(model, record):
        model.final_stream(ids)
    return [streams[site] for site in sites]


def mean_residual(model, ids, mask, sites=None):
    """Mean residual stream over the tokens where mask is true, per site (after each block if None).

    ids, mask (B, T) -> (n_sites, d_model), on the CPU in float64: a mean over many tokens loses
    digits in float32. Raises ValueError when the mask marks no token.
    """
    check_mask(mask, ids)
    sites = range(len(model.layers)) if sites is None else sites
    return torch.stack([x[mask].cpu().double().mean(0) for x in residual_at(model, ids, sites)])


def mean_difference(misaligned, aligned):
    """Direction from aligned to misaligned: the difference of two means, float32.

    Each is a mean residual (n_sites, d_model): over bad and over good answers, or of a fine-tuned
    and the untouched model over the same ones (persona.py).
    """
    if misaligned.shape != aligned.shape:
        raise ValueError(f"misaligned and aligned must have one shape, and have "
                         f"{tuple(misaligned.shape)} and {tuple(aligned.shape)}")
    return (misaligned - aligned).float()


def random_direction(like, generator):
    """A random direction of the same shape and, along the last axis, the same norm as `like`."""
    noise = torch.randn(like.shape, generator=generator).to(like)
    return noise * like.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def cosine(a, b):
    """Cosine of the angle between two tensors, flattened."""
    if a.numel() != b.numel():
        raise ValueError(f"a and b must be equally large, and are {tuple(a.shape)} and "
                         f"{tuple(b.shape)}")
    a, b = (x.flatten().cpu().double() for x in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()


def cosines(a, b):
    """The cosine at each site of a and b (n_sites, d_model): a list, None where either is zero."""
    return [cosine(x, y) if x.any() and y.any() else None for x, y in zip(a, b, strict=True)]


def check_vector(vector, x, name="direction"):
    """Refuse a vector that is not (d_model); one of several sites would broadcast silently."""
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be ({x.size(-1)},), one vector as wide as x, and is "
                         f"{tuple(vector.shape)}")


def unit_of(direction, name="direction"):
    """direction / |direction|. Raises ValueError for zero, which points nowhere."""
    if not direction.any():
        raise ValueError(f"{name} is zero, and points nowhere")
    return direction / direction.norm()


def steer(x, direction, scale=1.0):
    """x (..., d_model) moved by scale * direction (d_model); a new tensor of x's dtype."""
    check_vector(direction, x)
    return x + scale * direction.to(x)


def ablate(x, direction, level=0.0, along=None):
    """x (..., d_model) with what it holds of direction (d_model) set to level; a new tensor.

    x @ unit is what x holds of the unit direction. Level 0 projects the direction out; in a
    residual stream of few dimensions zero means nothing special, so `level` can be that of an
    untouched model. A control: with `along` (d_model) as much is taken away along that direction
    instead.
    """
    check_vector(direction, x)
    unit = unit_of(direction).to(x)
    excess = (x @ unit - level)[..., None]  # (..., 1)
    if along is None:
        return x - excess * unit
    check_vector(along, x, "along")
    return x - excess * unit_of(along, "along").to(x)


def check_sites(directions):
    """Refuse a bare direction: it does not say where."""
    if not isinstance(directions, dict):
        raise ValueError("directions must be {site: (d_model) tensor}, such as {1: direction} for "
                         f"the stream after block 1, and is a {type(directions).__name__}")


def steering(model, directions, scale=1.0):
    """Inside, scale * directions[site] is added to the residual stream at that site.

    directions: {site: (d_model) tensor}.
    """
    check_sites(directions)
    return editing(model, {site: lambda x, d=direction: steer(x, d, scale)
                           for site, direction in directions.items()})


def ablating(model, directions, levels=None, along=None):
    """Inside, directions[site] is ablated from the residual stream at that site.

    directions: {site: (d_model) tensor}; levels {site: float} and along {site: (d_model) tensor} as
    in `ablate`; without levels the directions are projected out.
    """
    def edit(site, direction):
        if not direction.any():
            raise ValueError(f"directions[{site!r}] is zero, and points nowhere")
        level = levels[site] if levels else 0.0
        instead = along[site] if along else None
        return lambda x: ablate(x, direction, level, instead)

    check_sites(directions)
    return editing(model, {site: edit(site, d) for site, d in directions.items()})


@contextmanager
def editing(model, edits):
    """Inside, the stream x at each site becomes edits[site](x); undone whatever happens."""
    handles = []
    try:
        for site, edit in edits.items():
            handles.append(find_site(model, site).register_forward_hook(
                lambda module, inputs, output, edit=edit: edit(output)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
