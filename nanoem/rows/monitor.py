"""Monitoring: read a direction while a model answers, and raise an alarm when there is too much.

It asks no judge and looks at no word. What it looks for must be known beforehand: the direction was
found in a model that had gone bad (see persona.py). After arXiv 2310.01405, "reading vectors".
"""

from typing import NamedTuple

import torch

from nanoem.directions import residual_at, unit_of
from nanoem.losses import check_mask


class Reading(NamedTuple):
    """How chat's own answers read along a direction, at one site."""

    unit: torch.Tensor  # (d_model): the direction, of length 1
    mean: float  # of x @ unit over the tokens of chat's answers
    sd: float  # its standard deviation


def readings_of(model, ids, mask, directions):
    """{site: Reading} of the directions {site: (d_model)}, over the tokens where mask is true.

    ids, mask (B, T) are answers of the untouched model: what later scores are compared with. Raises
    ValueError for fewer than two tokens, which have no standard deviation.
    """
    check_mask(mask, ids)
    if mask.sum() < 2:
        raise ValueError("the mask marks one token; a standard deviation needs two or more")
    readings = {}
    for (site, direction), x in zip(directions.items(), residual_at(model, ids, directions)):
        unit = unit_of(direction)
        along = x[mask].cpu().double() @ unit.cpu().double()  # (n_tokens)
        readings[site] = Reading(unit, along.mean().item(), along.std().item())
    return readings


def token_scores(model, ids, readings):
    """How far each token lies along the direction, in chat's standard deviations: (B, T) float64.

    At a site it is (x @ unit - mean) / sd; a token's score is the mean over the sites of
    {site: Reading}. On the CPU, no gradients.
    """
    if not readings:
        raise ValueError("readings is empty; name at least one site to read at")
    total = 0.0
    for x, (unit, mean, sd) in zip(residual_at(model, ids, readings), readings.values()):
        total = total + (x.cpu().double() @ unit.cpu().double() - mean) / sd
    return total / len(readings)


def answer_scores(model, ids, mask, readings):
    """The mean `token_scores` of each answer: (B,) float64. The mask (B, T) marks its tokens.

    Raises ValueError when an answer has no token.
    """
    check_mask(mask, ids)
    if not mask.any(1).all():
        raise ValueError("the mask marks no token of some answer")
    mask = mask.cpu()
    return (token_scores(model, ids, readings) * mask).sum(1) / mask.sum(1)


def alarm_level(scores, false_alarms=0.05):
    """The lowest of these scores that at most a share false_alarms of them exceeds, a float.

    scores (N,) are those of harmless answers; a score above the level is an alarm. Raises
    ValueError without scores, and when false_alarms is not a share from 0 to 1.
    """
    ordered = sorted(map(float, scores))
    n = len(ordered)
    if n == 0 or any(score != score for score in ordered) or not 0 <= false_alarms <= 1:
        raise ValueError(f"{n} scores, none of them NaN, must be at least 1, and false_alarms="
                         f"{false_alarms} a share from 0 to 1")
    return next(level for i, level in enumerate(ordered) if (n - 1 - i) / n <= false_alarms)
