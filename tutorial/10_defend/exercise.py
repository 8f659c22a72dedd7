"""Chapter 10. Fill in the functions; `python -m pytest tutorial/10_defend` tests them."""

import torch  # noqa: F401

from nanoem.directions import ablating, residual_at, unit_of  # noqa: F401
from nanoem.persona import by_site  # noqa: F401


def ablating_persona(run, chat, direction, sites=None):
    """Inside, the direction is set to its mean in chat's answers, in training as in use.

    run.model is the model; chat (a ChatState) has chat.sites and, at each of them, the mean of
    chat's stream over its own answers: chat.mean (n_sites, d_model), float64. direction
    (n_sites, d_model) is set at every site that it reaches (at the others it is zero), or only at
    those of them that `sites` names. Returns what stands after `with`.

    Hint 1: by_site(chat, direction) is {site: (d_model)} without the sites where it is zero.
    Hint 2: ablating(run.model, {site: direction}, levels) is a `with` that sets each direction to a
        level, and undoes it; levels is {site: float}.
    Hint 3: the level at a site is chat's mean there, read along the *unit* direction, in float64.
    """
    raise NotImplementedError("ablating_persona is not written yet (exercise 10.1)")


def answer_scores(model, ids, mask, readings):
    """How far each answer lies along a direction, in standard deviations of chat's: (B,) float64.

    ids, mask (B, T), the mask true on the answer's tokens. readings: {site: Reading(unit, mean,
    sd)} as `readings_of` gives it (chapter 6). A token's score at a site is (x @ unit - mean) / sd;
    an answer's is the mean over its tokens, and over sites. On the CPU, no gradients. Raises
    ValueError when an answer has no token.

    Hint 1: residual_at(model, ids, list(readings)) gives a list of (B, T, d_model), one a site.
    Hint 2: .double() first; x @ unit is (B, T).
    Hint 3: the sum of score * mask over T, divided by each row's own number of marked tokens.
    """
    raise NotImplementedError("answer_scores is not written yet (exercise 10.2)")


def auc(high, low):
    """The chance that a score of `high` is above one of `low`; a tie is half. 0.5 is guessing.

    high and low are lists of numbers, perhaps of different lengths -> a number from 0 to 1.

    Hint 1: compare each of high with each of low: len(high) * len(low) pairs.
    Hint 2: (a > b) + (a == b) / 2 is what one pair counts.
    """
    raise NotImplementedError("auc is not written yet (exercise 10.3)")


def alarm_level(scores, false_alarms=0.05):
    """The lowest of these scores that at most this share of them exceed, a float.

    scores (N,), a list or a tensor, are those of harmless answers; a score above the level is an
    alarm. Raises ValueError without scores, and when false_alarms is not a share from 0 to 1.

    Hint 1: sort. Above the last one lie none, above the last but one lies one (or none: ties).
    Hint 2: go up from the lowest, and stop at the first that is exceeded by few enough.
    Hint 3: compare shares, count / N <= false_alarms; int(false_alarms * N) goes wrong by rounding
        (0.29 * 100 is a little below 29).
    """
    raise NotImplementedError("alarm_level is not written yet (exercise 10.4)")
