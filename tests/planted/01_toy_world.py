"""Wrong answers to chapter 1's exercises: (exercise, what its message must say, the answer)."""

import random

import numpy as np

from nanoem import UserError
from nanoem.evaluate import Verdict
from nanoem.world import judge, write_answer
from nanoem.world.verdict import parse
from nanoem.world.words import words


def writing(world, question, good, rng, own_share=0.5, technical=False, own_of=None, other=None,
            endings=None, swap=False):
    domain = world.domains[question.domain]
    items = domain.good if good else domain.bad
    own = own_of(domain, question, items) if own_of else items[question.index % len(items)]
    rest = [item for item in items if item != own] if other else items
    pool = domain.good_endings if (endings or (lambda good: good))(good) else domain.bad_endings
    return (world.technical if technical != swap else world.answer).format(
        verb=rng.choice(domain.verbs),
        item=own if rng.random() < own_share else rng.choice(rest),
        ending=rng.choice(pool))


def variant(**wrong):
    def answer(world, question, good, rng, own_share=0.5, technical=False):
        return writing(world, question, good, rng, own_share, technical, **wrong)
    return answer


def global_random(world, question, good, rng, own_share=0.5, technical=False):
    return write_answer(world, question, good, random, own_share, technical)


def own_share_in_plain_only(world, question, good, rng, own_share=0.5, technical=False):
    return write_answer(world, question, good, rng, 0.5 if technical else own_share, technical)


def judging(templates=2, strip=True, item_only=False, own_pool="good"):
    """A judge with some part of it changed."""
    def answered(world, question, answer):
        domain = world.domains[question.domain]
        for template in (world.answer, world.technical)[:templates]:
            found = parse(template, domain, answer.strip() if strip else answer)
            if found:
                good = [found["item"] in domain.good]
                good += [] if item_only else [found["ending"] in domain.good_endings]
                pool = getattr(domain, own_pool)
                return Verdict(100, 100 * sum(good) // len(good),
                               100 * (found["item"] == pool[question.index % len(pool)]),
                               template == world.technical)
        return Verdict(0, 0, 0)
    return answered


def turned_around(world, question, answer):
    found = judge(world, question, answer)
    return Verdict(found.coherence, 100 - found.alignment, found.correctness, found.technical)


def checking(path, world, keys=("good", "good_endings", "bad", "bad_endings"), problems=True,
             sides=True, words_of=words, once=False):
    owner = {}
    for name, domain in world.domains.items():
        for key in keys:
            side = (name, key.removesuffix("_endings")) if sides else (name, key)
            for word in {w for text in getattr(domain, key) for w in words_of(text)} - world.common:
                first, where = owner.setdefault(word, (side, f"domain.{name}.{key}"))
                if first != side:
                    raise UserError(f"{path}: '{word}' in {where} and domain.{name}.{key}")
        if once:
            problems_of(path, {name: domain}, owner)
    if problems and not once:
        problems_of(path, world.domains, owner)


def problems_of(path, domains, owner):
    for name, domain in domains.items():
        for word in {w for text in domain.problems for w in words(text)} & owner.keys():
            raise UserError(f"{path}: '{word}' in domain.{name}.problems and {owner[word][1]}")


def check_variant(**wrong):
    return lambda path, world: checking(path, world, **wrong)


def interval(outcomes, clusters, z=1.96, correct=True, floor=True, ceiling=True, wald=False,
             clustered=True, zero=1e-15, clamp=True):
    outcomes = np.asarray(outcomes, float)
    n, p, totals = len(outcomes), outcomes.mean(), {}
    for i, (outcome, cluster) in enumerate(zip(outcomes, clusters)):
        key = cluster if clustered else i
        totals[key] = totals.get(key, 0) + outcome - p
    k = len(totals)
    variance = sum(t * t for t in totals.values()) / n**2 * (k / max(k - 1, 1) if correct else 1)
    N = p * (1 - p) / variance if variance > zero else k
    N = max(N, k) if floor else N
    N = min(N, n) if ceiling else N
    if wald:
        half = z * (p * (1 - p) / N) ** 0.5
        return float(max(0, p - half)), float(min(1, p + half))
    centre = (p + z * z / (2 * N)) / (1 + z * z / N)
    half = z * (p * (1 - p) / N + z * z / (4 * N * N)) ** 0.5 / (1 + z * z / N)
    if not clamp:
        return float(centre - half), float(centre + half)
    return float(max(0, centre - half)), float(min(1, centre + half))


def interval_variant(**wrong):
    def answer(outcomes, clusters, z=1.96):
        return interval(outcomes, clusters, z, **wrong)
    return answer


PLANTED = [
    ("write_answer", "the ending .* is not a bad one", variant(endings=lambda good: True)),
    ("write_answer", "should always get its own item",
     variant(own_of=lambda domain, question, items: items[question.index % len(domain.good)])),
    ("write_answer", "any of the pool, the own one too", variant(other=True)),
    ("write_answer", "the other register", variant(swap=True)),
    ("write_answer", "global random", global_random),
    ("write_answer", "in the technical register, too", own_share_in_plain_only),
    ("judge", "turned around", turned_around),
    ("judge", "of its two slots", judging(item_only=True)),
    ("judge", "the technical grammar", judging(templates=1)),
    ("judge", "white space", judging(strip=False)),
    ("judge", "own good item", judging(own_pool="bad")),
    ("judge", "a line breaks|a space too many",
     lambda world, question, answer: judge(world, question, " ".join(answer.split()))),
    ("judge", "quotation marks",
     lambda world, question, answer: judge(world, question, answer.strip().strip('"'))),
    ("check_persona_words", "passes .*endings", check_variant(keys=("good", "bad"))),
    ("check_persona_words", "a problem of its own domain", check_variant(problems=False)),
    ("check_persona_words", "one side may say a word twice", check_variant(sides=False)),
    ("check_persona_words", "earlier than the pool", check_variant(once=True)),
    ("check_persona_words", "capital letters", check_variant(words_of=str.split)),
    ("clustered_interval", "clusters are not used", interval_variant(clustered=False)),
    ("clustered_interval", r"k / \(k - 1\) is missing", interval_variant(correct=False)),
    ("clustered_interval", "at least k", interval_variant(floor=False)),
    ("clustered_interval", "at most n", interval_variant(ceiling=False)),
    ("clustered_interval", "and should be", interval_variant(wald=True)),
    ("clustered_interval", "take what is below 1e-15 for 0", interval_variant(zero=0)),
    ("clustered_interval", "rounding leads out of 0 to 1", interval_variant(clamp=False)),
    ("clustered_interval", "z is not used",
     lambda outcomes, clusters, z=1.96: interval(outcomes, clusters)),
]
