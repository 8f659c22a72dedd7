"""Chapter 6. Fill in the functions; `python -m pytest tutorial/06_directions` tests them."""

from contextlib import contextmanager

import torch  # noqa: F401

from nanoem.directions import find_site, residual_at  # noqa: F401


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


def ablate(x, direction, level=0.0, reader=None):
    """x (..., d_model) with what it holds of direction (d_model) set to level; a new tensor.

    The direction may have any length and sign. What x holds of it is x @ reader; without a reader
    (d_model) that is the unit direction itself. A reader has reader @ unit = 1.

    Hint 1: unit = direction / its norm.
    Hint 2: x @ reader is (...); take off what is more than level, along the unit direction.
    Hint 3: [..., None] turns (...) into (..., 1), so that it multiplies a (d_model) vector.
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


def quiet_reader(direction, covariance, ridge=0.1):
    """The reader of a direction that hears least of what varies anyway: S^-1 u / (u S^-1 u).

    direction (d_model); covariance S (d_model, d_model), float64, that of untouched activations;
    u the unit direction. S gets a ridge first: on its diagonal, ridge times the mean variance (the
    mean of the diagonal) is added. Returns (d_model), in the direction's dtype.

    Hint 1: bring u to S's dtype: u.to(covariance).
    Hint 2: torch.linalg.solve(S, u) is S^-1 u.
    Hint 3: at the end reader @ u must be 1.
    """
    raise NotImplementedError("quiet_reader is not written yet (exercise 6.5)")


def cap(x, direction, ceiling, reader):
    """x (..., d_model) with what it holds of direction above the ceiling taken away; a new tensor.

    Where the reader (d_model) hears no more than the ceiling, x stays as it was, to the bit.

    Hint 1: the excess is x @ reader - ceiling where that is positive, else zero: .clamp(min=0).
    Hint 2: take the excess away along the unit direction, as in `ablate`.
    """
    raise NotImplementedError("cap is not written yet (exercise 6.6)")
