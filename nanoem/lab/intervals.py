"""Two 95% intervals: of a rate over clustered answers, and of "k of n seeds"."""

import math

import numpy as np


def clustered_interval(outcomes, clusters, z=1.96):
    """A 95% interval for the mean of 0/1 outcomes whose errors are shared within clusters.

    Wilson's interval, with the number of answers replaced by the effective number: p(1-p) over the
    cluster-robust variance, kept between the number of questions and the number of answers. Many
    answers to one question are worth less than as many answers to different questions.
    """
    outcomes = np.asarray(outcomes, dtype=float)
    if not 0 < len(outcomes) == len(clusters):
        raise ValueError(f"outcomes and clusters must be equally many, at least one; they are "
                         f"{len(outcomes)} and {len(clusters)}")

    # the variance of the mean, with each cluster as one draw
    n, p = len(outcomes), outcomes.mean()
    totals = {}  # cluster -> sum of deviations from the mean
    for outcome, cluster in zip(outcomes, clusters):
        totals[cluster] = totals.get(cluster, 0.0) + outcome - p
    k = len(totals)
    variance = sum(t * t for t in totals.values()) / n**2 * k / max(k - 1, 1)

    # as many answers as would give that variance if they were independent
    n_effective = min(max(p * (1 - p) / variance, k), n) if variance > 1e-15 else k  # rounding

    # Wilson's interval
    centre = (p + z * z / (2 * n_effective)) / (1 + z * z / n_effective)
    half = z * (p * (1 - p) / n_effective + z * z / (4 * n_effective**2)) ** 0.5
    half /= 1 + z * z / n_effective
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def clopper_pearson(k, n):
    """The exact 95% interval for a probability of which k of n trials came true: (low, high).

    low is the probability at which k or more of n would be seen 2.5% of the time, high that at
    which k or fewer would (Clopper and Pearson 1934). Found by halving.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k={k} must be from 0 to n={n}, and n at least 1")

    def tail(p, counts):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)

    def halve(is_below):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if is_below(middle) else (low, middle)
        return low

    low = halve(lambda p: tail(p, range(k, n + 1)) < 0.025) if k > 0 else 0.0
    high = halve(lambda p: tail(p, range(k + 1)) > 0.025) if k < n else 1.0
    return low, high
