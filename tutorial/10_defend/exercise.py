"""Chapter 10. Fill in the functions; `python -m pytest tutorial/10_defend` tests them."""

import torch  # noqa: F401

from nanoem.directions import ablating, quiet_reader, residual_at  # noqa: F401


def training_away(run, chat, direction):
    """Inside, the direction is set to chat's mean level at block 0's sites, for training only.

    run.model is the model; chat (a ChatState) has chat.sites, and at each of them a mean
    (n_sites, d_model) and a covariance (n_sites, d_model, d_model) in float64; direction
    (n_sites, d_model). Returns what stands after `with`. Block 0's sites are the first two of
    chat.sites. Not capped as in chapter 6, but set, from above and from below; measured by the
    quiet reader with a ridge of 3, louder than there.

    Hint 1: ablating(model, {site: direction}, levels, readers) is a `with` that sets what a reader
        hears to a level, and undoes it; levels is {site: float}, readers {site: (d_model)}.
    Hint 2: quiet_reader(direction[i], chat.covariance[i], ridge=3.0) is the reader at site i.
    Hint 3: chat's level at site i is what that same reader hears of chat.mean[i], in float64.
    """
    raise NotImplementedError("training_away is not written yet (exercise 10.1)")


def answer_scores(model, ids, mask, known):
    """How far each answer lies along a direction, in standard deviations of chat's: (B,) float64.

    ids, mask (B, T), the mask true on the answer's tokens. known: {site: (direction, reader, mean,
    sd)} as `read_by_chat` gives it. A token's score at a site is (x @ reader - mean) / sd; an
    answer's is the mean over its tokens, and then over sites. On the CPU, no gradients. Raises
    ValueError when an answer has no token.

    Hint 1: residual_at(model, ids, list(known)) gives a list of (B, T, d_model), one a site.
    Hint 2: .double() first; x @ reader is (B, T).
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
