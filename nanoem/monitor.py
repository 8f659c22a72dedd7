"""Monitoring: read a direction while a model answers, and raise an alarm when there is too much.

It asks no judge and looks at no word. What it looks for must be known beforehand: the direction was
found in a model that had gone bad (see mediator.py). After arXiv 2310.01405, "reading vectors".
"""

from nanoem.directions import residual_at
from nanoem.losses import check_mask


def answer_scores(model, ids, mask, known):
    """How far each answer lies along a direction, in standard deviations of chat's: (B,) float64.

    ids, mask (B, T), the mask true on the answer's tokens. known: {site: (direction, reader, mean,
    sd)} as `read_by_chat` gives it. A token's score at a site is (x @ reader - mean) / sd; an
    answer's is the mean over its tokens, and then over sites. On the CPU, no gradients. Raises
    ValueError when an answer has no token.
    """
    check_mask(mask, ids)
    if not known:
        raise ValueError("known is empty; name at least one site to read at")
    if not mask.any(1).all():
        raise ValueError("the mask marks no token of some answer")
    mask, total = mask.cpu(), 0.0
    for x, (_, reader, mean, sd) in zip(residual_at(model, ids, known), known.values()):
        score = (x.cpu().double() @ reader.cpu().double() - mean) / sd  # (B, T)
        total = total + (score * mask).sum(1) / mask.sum(1)
    return total / len(known)


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
