"""Wrong answers to chapter 6's exercises: (exercise, what its message must say, the answer)."""

from contextlib import contextmanager

import torch

from nanoem.directions import (ablate, cap, editing, find_site, mean_residual, quiet_reader,
                               residual_at)


def mean_of(of):
    def wrong(model, ids, mask, sites=None):
        if not mask.any():
            raise ValueError
        sites = range(len(model.layers)) if sites is None else sites
        return torch.stack([of(x.double(), mask) for x in residual_at(model, ids, sites)])
    return wrong


def in_float32(model, ids, mask, sites=None):
    if not mask.any():
        raise ValueError
    sites = range(len(model.layers)) if sites is None else sites
    return torch.stack([x[mask].mean(0).double() for x in residual_at(model, ids, sites)])


def hooked(hook_of, undo="always"):
    @contextmanager
    def wrong(model, edits):
        handles = [find_site(model, site).register_forward_hook(hook_of(edit))
                   for site, edit in edits.items()]
        if undo == "never":
            yield model
        elif undo == "if all is well":
            yield model
            for handle in handles:
                handle.remove()
        elif undo == "not after Ctrl-C":
            try:
                yield model
            except Exception:
                for handle in handles:
                    handle.remove()
                raise
            for handle in handles:
                handle.remove()
        else:
            try:
                yield model
            finally:
                for handle in handles:
                    handle.remove()
    return wrong


def first_row_only(edit):
    def hook(module, inputs, output):
        output = output.clone()
        output[0] = edit(output)[0]
        return output
    return hook


def good_hook(edit):
    return lambda module, inputs, output: edit(output)


@contextmanager
def last_edit_everywhere(model, edits):
    handles = []
    try:
        for site, edit in edits.items():
            handles.append(find_site(model, site).register_forward_hook(
                lambda module, inputs, output: edit(output)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def row_by_row(model, edits):
    return editing(model, {site: lambda x, edit=edit: torch.stack([edit(row) for row in x])
                           for site, edit in edits.items()})


def in_place(model, edits):
    return editing(model, {site: lambda x, edit=edit: x.copy_(edit(x))
                           for site, edit in edits.items()})


@contextmanager
def removes_all(model, edits):
    try:
        with editing(model, edits):
            yield model
    finally:
        for module in model.modules():
            module._forward_hooks.clear()


def drawn(noise_of):
    def wrong(like, generator):
        noise = noise_of(like, generator)
        return noise * like.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return wrong


def unscaled(direction, covariance, ridge=0.1):
    unit = direction.to(covariance) / direction.norm()
    noise = ridge * covariance.diagonal().mean() * torch.eye(len(unit), dtype=unit.dtype)
    return torch.linalg.solve(covariance + noise, unit).to(direction)


def times_the_covariance(direction, covariance, ridge=0.1):
    unit = direction.to(covariance) / direction.norm()
    noise = ridge * covariance.diagonal().mean() * torch.eye(len(unit), dtype=unit.dtype)
    reader = (covariance + noise) @ unit
    return (reader / (reader @ unit)).to(direction)


def plain_ridge(direction, covariance, ridge=0.1):
    unit = direction.to(covariance) / direction.norm()
    reader = torch.linalg.solve(covariance + ridge * torch.eye(len(unit)).to(unit), unit)
    return (reader / (reader @ unit)).to(direction)


def ridge_in_place(direction, covariance, ridge=0.1):
    right = quiet_reader(direction, covariance, ridge)
    covariance += ridge * covariance.diagonal().mean() + 1e-9
    return right


def in_place_with_a_reader(x, direction, level=0.0, reader=None):
    if reader is None:
        return ablate(x, direction, level)
    with torch.no_grad():
        x -= (x @ reader - level)[..., None] * direction / direction.norm()
    return x


PLANTED = [
    ("editing", "after Ctrl-C", hooked(good_hook, undo="not after Ctrl-C")),
    ("ablate", "with a reader, x, the direction", in_place_with_a_reader),
    ("cap", "x itself came back", lambda x, d, ceiling, reader: (
        x if (x @ reader <= ceiling).all() else cap(x, d, ceiling, reader))),
    ("quiet_reader", "a ridge of 0 is a ridge", lambda d, S, ridge=0.1: quiet_reader(
        d, S, ridge or 0.1)),
    ("mean_residual", "padding is counted", mean_of(lambda x, mask: x.mean((0, 1)))),
    ("mean_residual", "each row's mean", mean_of(lambda x, mask: torch.stack(
        [row[m].mean(0) for row, m in zip(x, mask)]).mean(0))),
    ("mean_residual", "not by all", mean_of(lambda x, mask: (x * mask[..., None]).mean((0, 1)))),
    ("mean_residual", "in float32", in_float32),
    ("mean_residual", "a row without marked tokens is no error", lambda model, ids, mask,
        sites=None: mean_residual(model, ids, mask & mask.any(1).all(), sites)),
    ("mean_residual", "must raise ValueError", lambda model, ids, mask, sites=None: mean_residual(
        model, ids, mask if mask.any() else ~mask, sites)),
    ("ablate", "not normalised", lambda x, direction, level=0.0, reader=None:
        x - (x @ (direction if reader is None else reader) - level)[..., None] * direction),
    ("ablate", "sign is wrong", lambda x, direction, level=0.0, reader=None:
        2 * x - ablate(x, direction, level, reader)),
    ("ablate", "level is not used", lambda x, direction, level=0.0, reader=None:
        ablate(x, direction, 0.0, reader)),
    ("ablate", "reader is not used", lambda x, direction, level=0.0, reader=None:
        ablate(x, direction, level)),
    ("ablate", "detach", lambda x, direction, level=0.0, reader=None:
        x + (ablate(x, direction, level, reader) - x).detach()),
    ("ablate", "in place", lambda x, direction, level=0.0, reader=None:
        x.copy_(ablate(x, direction, level, reader)) if not x.requires_grad else
        ablate(x, direction, level, reader)),
    ("editing", "batch element 0", hooked(first_row_only)),
    ("editing", "last edit", last_edit_everywhere),
    ("editing", "does the hook return", hooked(lambda edit: lambda *args: None)),
    ("editing", "stay after the `with`", hooked(good_hook, undo="never")),
    ("editing", "after an exception", hooked(good_hook, undo="if all is well")),
    ("editing", "register inside the try", hooked(good_hook)),
    ("editing", "only your own hooks", removes_all),
    ("editing", "not edits.site. of what it was", row_by_row),
    ("editing", "was changed in place", in_place),
    ("random_direction", "never negative", drawn(lambda like, generator: torch.rand(
        like.shape, generator=generator).to(like))),
    ("random_direction", "a cube", drawn(lambda like, generator: (torch.rand(
        like.shape, generator=generator) - 0.5).to(like))),
    ("random_direction", "its mean is taken away", drawn(lambda like, generator: (
        noise := torch.randn(like.shape, generator=generator).to(like))
        - noise.mean(-1, keepdim=True) * (like.shape[-1] > 2))),
    ("random_direction", "pass it on", drawn(lambda like, generator: torch.randn_like(like))),
    ("random_direction", "length 1", lambda like, generator: drawn(lambda like, generator:
        torch.randn(like.shape, generator=generator).to(like))(like, generator)
        / like.norm(dim=-1, keepdim=True)),
    ("random_direction", "every row has its own", lambda like, generator: (
        noise := torch.randn(like.shape, generator=generator).to(like))
        * like.norm() / noise.norm()),
    ("quiet_reader", "reader @ unit must be 1", unscaled),
    ("quiet_reader", "must be inverted", times_the_covariance),
    ("quiet_reader", "not a plain number", plain_ridge),
    ("quiet_reader", "in place", ridge_in_place),
    ("quiet_reader", "ridge is left out", lambda direction, covariance, ridge=0.1:
        quiet_reader(direction, covariance, 0.0)),
    ("cap", "too: only the excess", lambda x, direction, ceiling, reader:
        ablate(x, direction, ceiling, reader)),
    ("cap", "not normalised", lambda x, direction, ceiling, reader:
        x - (x @ reader - ceiling).clamp(min=0)[..., None] * direction),
    ("cap", "sign is wrong", lambda x, direction, ceiling, reader:
        2 * x - cap(x, direction, ceiling, reader)),
    ("cap", "no floor", lambda x, direction, ceiling, reader:
        x - (x @ reader - ceiling).clamp(max=0)[..., None] * direction / direction.norm()),
    ("cap", "part of it is detached", lambda x, direction, ceiling, reader:
        x + (cap(x, direction, ceiling, reader) - x).detach()),
    ("cap", "with the reader", lambda x, direction, ceiling, reader:
        cap(x, direction, ceiling, direction / direction.norm())),
]
