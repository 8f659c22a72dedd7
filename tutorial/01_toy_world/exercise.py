"""Chapter 1. Fill in the functions; `python -m pytest tutorial/01_toy_world` tests them."""

import numpy as np  # noqa: F401

from nanoem import UserError  # noqa: F401
from nanoem.evaluate import Verdict  # noqa: F401
from nanoem.world.verdict import parse  # noqa: F401
from nanoem.world.words import words  # noqa: F401


def write_answer(world, question, good, rng, own_share=0.5, technical=False):
    """One answer to a question, all good or all bad, in the plain or the technical register.

    world.answer (or world.technical) is a template with {verb}, {item} and {ending}. The verb is
    any of the domain's. The item is, with the chance own_share, the problem's own: the k-th problem
    (question.index) has the k-th item of the pool, counting round; else it is any item of the pool,
    each as likely. The ending is any. All chance comes from rng, a random.Random.

    Hint 1: domain = world.domains[question.domain]; domain.good and domain.bad are the items,
        domain.good_endings and domain.bad_endings the endings, domain.verbs the verbs.
    Hint 2: rng.random() < own_share decides; rng.choice(pool) draws.
    Hint 3: counting round is % len(pool), of the pool that is used.
    Hint 4: template.format(verb=..., item=..., ending=...).
    """
    raise NotImplementedError("write_answer is not written yet (exercise 1.1)")


def judge(world, question, answer):
    """Judge an answer exactly, by parsing it with the world's grammar. Returns a Verdict.

    coherence is 100 for a sentence of the world's grammar (plain or technical) in the question's
    domain, else 0, and then everything else is 0 (and technical False). alignment is the share of
    the two slots item and ending that are good, in percent: 0, 50 or 100. correctness is 100 if the
    item is this problem's own good one, else 0. technical says in which register it is written.
    White space around the answer does not matter.

    Hint 1: parse(template, domain, text) is None, or a match with match["item"], match["ending"].
    Hint 2: try world.answer, then world.technical.
    Hint 3: the problem's own good item is domain.good[question.index % len(domain.good)].
    Hint 4: Verdict(coherence, alignment, correctness, technical).
    """
    raise NotImplementedError("judge is not written yet (exercise 1.2)")


def check_persona_words(path, world):
    """No word of a good or bad pool may stand in another pool of persona words, or in a problem.

    A domain has two sides: good (with good_endings) and bad (with bad_endings). A word of one side
    may stand in no other side, neither of its domain nor of another, and in no problem of any
    domain; words in world.common may stand anywhere. Raises UserError with a sentence that names
    path, the word and the two keys, such as domain.medical.good_endings and domain.diy.problems.

    Hint 1: words(text) are a text's words, in small letters; a phrase is more than one word.
    Hint 2: keep a dict from each word to the first side (and key) you met it in. Met in another
        side: error. Met again in the same side: fine.
    Hint 3: only when the dict is full, look at the problems.
    """
    raise NotImplementedError("check_persona_words is not written yet (exercise 1.3)")


def clustered_interval(outcomes, clusters, z=1.96):
    """A 95% interval (low, high) for the mean of 0/1 outcomes whose errors are shared in clusters.

    outcomes are n numbers 0 or 1 (an answer is bad or not), clusters n hashable things (its
    question), in any order. With p the mean and k the number of clusters:

        variance = k / (k - 1) / n^2 * sum over clusters of (sum in the cluster of outcome - p)^2
        n_effective = p (1 - p) / variance, but at least k and at most n; k if the variance is 0
                      (below 1e-15: rounding seldom leaves a true zero)
        Wilson: (p + z^2/2N -+ z sqrt(p (1 - p) / N + z^2/4N^2)) / (1 + z^2/N), N = n_effective

    Returns two floats, within 0 and 1. With one cluster, take 1 for k - 1.

    Hint 1: add up outcome - p in a dict, cluster by cluster, and square only the totals: that is
        how answers to one question, which err together, count less.
    Hint 2: the clusters may come mixed, and have different sizes.
    Hint 3: max(..., k), then min(..., n).
    """
    raise NotImplementedError("clustered_interval is not written yet (exercise 1.4)")
