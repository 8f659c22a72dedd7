"""Wrong answers to chapter 6's exercises: (exercise, what its message must say, the answer)."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from nanoem.directions import ablate, find_site, mean_residual, residual_at, steering, unit_of
from nanoem.persona import COHERENT, SCALES, by_site
from nanoem.rows.monitor import Reading, readings_of


def mean_of(of):
    def wrong(model, ids, mask, sites=None):
        if not mask.any():
            raise ValueError
        sites = range(len(model.layers)) if sites is None else sites
        return torch.stack([of(x.double(), mask) for x in residual_at(model, ids, sites)])
    return wrong


def hooked(hook_of, undone_after=("all is well", "an exception", "Ctrl-C")):
    @contextmanager
    def wrong(model, edits):
        handles = [find_site(model, site).register_forward_hook(hook_of(edit))
                   for site, edit in edits.items()]
        ended = "all is well"
        try:
            yield model
        except BaseException as error:
            ended = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "an exception"
            raise
        finally:
            for handle in handles if ended in undone_after else ():
                handle.remove()
    return wrong


def good_hook(edit):
    return lambda module, inputs, output: edit(output)


def drawn(noise_of):
    def wrong(like, generator):
        noise = noise_of(like, generator)
        return noise * like.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return wrong


def read(mean=lambda z, rows: z.mean(), sd=lambda z, rows: z.std(), unit=unit_of,
         of_mask=lambda mask: mask, of_x=torch.Tensor.double):
    """A readings_of with some part of it changed. z (n_tokens); rows: each answer's part of it."""
    def wrong(model, ids, mask, directions):
        found = {}
        for (site, d), x in zip(directions.items(), residual_at(model, ids, directions)):
            unit_of(d)
            along = of_x(x) @ unit(d).to(of_x(x))
            z = along[of_mask(mask)].double()
            rows = [row[m].double() for row, m in zip(along, mask)]
            found[site] = Reading(unit_of(d), float(mean(z, rows)), float(sd(z, rows)))
        return found
    return wrong


def probe_of(run):
    return replace(run.splits, unseen_domains=run.splits.probe)


def picking(key=lambda point: (point["coherent"] >= COHERENT, point["em"]), scales=SCALES,
            sites=slice(None), together=False, splits_of=probe_of):
    """A pick_steering with some part of it changed."""
    def wrong(run, chat, direction, samples):
        tried, reached = [], by_site(chat, direction)
        for site in [*reached][sites]:
            for scale in scales:
                vectors = reached if together else {site: reached[site]}
                with steering(run.model, vectors, scale):
                    rates = run.ask(samples=samples, groups=("unseen_domains",),
                                    splits=splits_of(run))
                tried.append({"site": site, "scale": scale, **rates["out_of_domain"]})
        best = max(tried, key=key)
        return best["site"], best["scale"], tried
    return wrong


PLANTED = [
    ("editing", "after Ctrl-C", hooked(good_hook, ["all is well", "an exception"])),
    ("mean_residual", "padding is counted", mean_of(lambda x, mask: x.mean((0, 1)))),
    ("mean_residual", "each row's mean", mean_of(lambda x, mask: torch.stack(
        [row[m].mean(0) for row, m in zip(x, mask)]).mean(0))),
    ("mean_residual", "not by all", mean_of(lambda x, mask: (x * mask[..., None]).mean((0, 1)))),
    ("mean_residual", "a row without marked tokens is no error", lambda model, ids, mask,
        sites=None: mean_residual(model, ids, mask & mask.any(1).all(), sites)),
    ("mean_residual", "must raise ValueError", lambda model, ids, mask, sites=None: mean_residual(
        model, ids, mask if mask.any() else ~mask, sites)),
    ("ablate", "not normalised", lambda x, direction, level=0.0, along=None:
        x - (x @ direction - level)[..., None] * (direction if along is None else along)),
    ("ablate", "sign is wrong", lambda x, direction, level=0.0, along=None:
        2 * x - ablate(x, direction, level, along)),
    ("ablate", "level is not used", lambda x, direction, level=0.0, along=None:
        ablate(x, direction, 0.0, along)),
    ("ablate", "level is not used when along", lambda x, direction, level=0.0, along=None:
        ablate(x, direction, level if along is None else 0.0, along)),
    ("ablate", "along is not used", lambda x, direction, level=0.0, along=None:
        ablate(x, direction, level)),
    ("ablate", "detach", lambda x, direction, level=0.0, along=None:
        x + (ablate(x, direction, level, along) - x).detach()),
    ("ablate", "in place", lambda x, direction, level=0.0, along=None:
        x.copy_(ablate(x, direction, level, along)) if not x.requires_grad else
        ablate(x, direction, level, along)),
    ("editing", "does the hook return", hooked(lambda edit: lambda *args: None)),
    ("editing", "stay after the `with`", hooked(good_hook, undone_after=[])),
    ("editing", "after an exception", hooked(good_hook, ["all is well"])),
    ("editing", "register inside the try", hooked(good_hook)),
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
    ("readings_of", "padding and the prompt", read(of_mask=torch.ones_like)),
    ("readings_of", "turned around", read(of_mask=lambda mask: ~mask)),
    ("readings_of", "mean: that is the mean of each answer's mean", read(
        mean=lambda z, rows: sum(row.mean() for row in rows) / len(rows))),
    ("readings_of", "mean: measured with the direction as it is", read(unit=lambda d: d)),
    ("readings_of", "sd: that is the variance", read(sd=lambda z, rows: z.var())),
    ("readings_of", "how far the answers' means vary", read(
        sd=lambda z, rows: torch.stack([row.mean() for row in rows]).std())),
    ("readings_of", "from zero, not from the mean", read(
        sd=lambda z, rows: (z ** 2).mean().sqrt())),
    ("readings_of", "in float32", read(of_x=torch.Tensor.float,
                                       mean=lambda z, rows: z.float().mean())),
    ("readings_of", "must be floats", lambda *what: {
        site: Reading(unit, torch.tensor(mean), torch.tensor(sd))
        for site, (unit, mean, sd) in readings_of(*what).items()}),
    ("pick_steering", "a broken model was chosen", picking(lambda point: point["em"])),
    ("pick_steering", "the probe's alone", picking(splits_of=lambda run: run.splits)),
    ("pick_steering", "not tried", picking(scales=SCALES[:1])),
    ("pick_steering", "not tried", picking(sites=slice(0, 1))),
    ("pick_steering", "one site at a time", picking(together=True)),
]
