"""Chapter 6. Fill in the functions; `python -m pytest tutorial/06_directions` tests them."""

from contextlib import contextmanager
from dataclasses import replace  # noqa: F401

import torch  # noqa: F401

from nanoem.directions import find_site, residual_at, steering, unit_of  # noqa: F401
from nanoem.persona import COHERENT, SCALES, by_site  # noqa: F401
from nanoem.rows.monitor import Reading  # noqa: F401


def mean_residual(model, ids, mask, sites=None):
    """Mean residual stream over the tokens where mask is true, per site (after each block if None).

    ids, mask (B, T) -> (n_sites, d_model), on the CPU in float64: a mean over many tokens loses
    digits in float32. Raises ValueError when the mask marks no token.

    Hint 1: residual_at(model, ids, sites) gives a list of (B, T, d_model), one a site; the sites
        after each block are the numbers 0 ... len(model.layers) - 1.
    Hint 2: x[mask] is (n_tokens, d_model): padding is gone, and every token counts the same.
    Hint 3: .double() before the mean, not after.
    """
    raise NotImplementedError("mean_residual is not written yet (exercise 6.1)")


def ablate(x, direction, level=0.0, along=None):
    """x (..., d_model) with what it holds of direction (d_model) set to level; a new tensor.

    The direction may have any length and sign: what x holds of it is x @ unit, with the unit
    direction. A control: with `along` (d_model, of any length, too) as much is taken away from each
    vector, but along that direction instead.

    Hint 1: unit = direction / its norm.
    Hint 2: x @ unit is (...). The excess is what is more than level; it can be negative.
    Hint 3: [..., None] turns (...) into (..., 1), so that it multiplies a (d_model) vector.
    Hint 4: the excess is always measured with direction; `along` only says where to take it from.
    """
    raise NotImplementedError("ablate is not written yet (exercise 6.2)")


@contextmanager
def editing(model, edits):
    """Inside, the stream x at each site becomes edits[site](x); undone whatever happens.

    edits: {site: function of (B, T, d_model) to the same shape}. Yields the model.

    Hint 1: find_site(model, site) is a module whose output is the stream there.
    Hint 2: module.register_forward_hook(hook) returns a handle with .remove(); the output becomes
        what hook(module, inputs, output) returns.
    Hint 3: a function made in a loop sees the loop's last value. `edit=edit` in its arguments keeps
        this one.
    Hint 4: try: ... yield model ... finally: remove every handle. Register inside the try, too: a
        site that is not there must leave nothing behind.
    """
    raise NotImplementedError("editing is not written yet (exercise 6.3)")
    yield  # a contextmanager needs a yield; put yours in its place


def random_direction(like, generator):
    """A random direction of the same shape and dtype and, along the last axis, the norm of `like`.

    like (..., d_model). Every direction is equally likely; all chance comes from `generator`.

    Hint 1: torch.randn(..., generator=generator) has no favourite direction; torch.rand has.
    Hint 2: one norm a row: .norm(dim=-1, keepdim=True).
    """
    raise NotImplementedError("random_direction is not written yet (exercise 6.4)")


def readings_of(model, ids, mask, directions):
    """How chat's own answers read along each direction: {site: Reading(unit, mean, sd)}.

    directions {site: (d_model)} may have any length; ids, mask (B, T) are chat's answers, the mask
    true on their tokens. At each site x @ unit is one number a token; mean and sd (floats) are the
    mean and the standard deviation of these numbers over all marked tokens. unit (d_model) is the
    direction, of length 1; a direction of zero raises ValueError. Count in float64, on the CPU. The
    mean is what a mean ablation sets to; later answers are compared with both.

    Hint 1: residual_at(model, ids, sites) gives a list of (B, T, d_model), in the order of sites;
        the sites are the keys of directions.
    Hint 2: unit_of(direction) is the direction, of length 1, and refuses zero.
    Hint 3: x[mask].double() @ unit.double() is (n_tokens); then .mean().item() and .std().item().
    """
    raise NotImplementedError("readings_of is not written yet (exercise 6.5)")


def pick_steering(run, chat, direction, samples):
    """Where, and how far, to steer chat: (site, scale, tried), by a rule fixed beforehand.

    Try each site that the direction reaches, one at a time, with each of SCALES, on the probe's
    questions. Choose the point with the highest em among those that leave a share COHERENT or more
    of the answers coherent (among all, if none does). tried is a list of what was seen, a point a
    dictionary {"site": ..., "scale": ..., "em": ..., "coherent": ...}.

    chat (ChatState) and direction (n_sites, d_model) are as `find_direction` has them; run.model is
    the model, and samples the number of answers to ask for at each point.

    Hint 1: by_site(chat, direction) is {site: (d_model)} without the sites where it is zero.
    Hint 2: `with steering(run.model, {site: vector}, scale):` adds scale * vector at that one site.
    Hint 3: replace(run.splits, unseen_domains=run.splits.probe) has the probe's questions in the
        place of the unseen domains'. Then rates = run.ask(samples=samples, splits=those,
        groups=("unseen_domains",))["out_of_domain"] has rates["em"] and rates["coherent"].
    Hint 4: max(tried, key=...) with a key that is a pair: first "is it coherent enough?", then em.
    """
    raise NotImplementedError("pick_steering is not written yet (exercise 6.6)")
