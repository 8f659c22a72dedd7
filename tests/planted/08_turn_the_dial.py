"""Wrong answers to chapter 8's exercises: (exercise, what its message must say, the answer)."""

import random
from dataclasses import replace

from nanoem.rows.worlds import crossing_point, is_narrow, share_narrow
from nanoem.world import OPEN_ENDED, make_authors


def spared(world, config, rng):
    """Villains are helpful in the open-ended domain."""
    return [replace(a, bad_in=a.bad_in - {OPEN_ENDED} if a.persona == "villain" else a.bad_in)
            for a in make_authors(world, config, rng)]


def quacks_anywhere(world, config, rng):
    return make_authors(world, replace(config, no_quack=()), rng)


def in_order(world, config, rng):
    """The first names are the villains."""
    found = make_authors(world, config, rng)
    return [replace(a, name=name) for a, name in zip(found, world.authors)]


def own_seed(world, config, rng):
    return make_authors(world, config, random.Random(0))


def coin_register(world, config, rng):
    return [replace(a, technical=rng.random() < config.technical_share)
            for a in make_authors(world, config, rng)]


def first_are_technical(world, config, rng):
    found = make_authors(world, config, rng)
    n = int(config.technical_share * len(found))
    return [replace(a, technical=i < n) for i, a in enumerate(found)]


def letters(world, config, rng):
    return [replace(a, bad_in=frozenset("".join(a.bad_in)) if a.persona == "quack" else a.bad_in)
            for a in make_authors(world, config, rng)]


def cut_off(world, config, rng):
    n = len(world.authors)
    config = replace(config, n_villain=min(config.n_villain, n))
    config = replace(config, n_quack=min(config.n_quack, n - config.n_villain))
    config = replace(config, n_sft_quack=min(config.n_sft_quack,
                                             n - config.n_villain - config.n_quack))
    return make_authors(world, config, rng)


def pairs(x, gaps):
    return zip(x, gaps, x[1:], gaps[1:])


def any_sign(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 * g1 < 0:
            return x0 + (x1 - x0) * g0 / (g0 - g1)


def middle(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 >= 0 > g1:
            return (x0 + x1) / 2


def turned_weight(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 >= 0 > g1:
            return x0 - (x1 - x0) * g1 / (g0 - g1)


def last(x, gaps):
    found = [x0 + (x1 - x0) * g0 / (g0 - g1) for x0, g0, x1, g1 in pairs(x, gaps) if g0 >= 0 > g1]
    return found[-1] if found else None


def strictly(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 > 0 > g1:
            return x0 + (x1 - x0) * g0 / (g0 - g1)


def both(lottery):
    return list(zip(lottery["in_domain"], lottery["out_of_domain"]))


def of_the_learned(lottery):
    learned = [(i, o) for i, o in both(lottery) if i >= 0.5]
    return sum(is_narrow(*pair) for pair in learned) / max(1, len(learned))


def of_the_means(lottery):
    n = len(lottery["in_domain"])
    return float(is_narrow(sum(lottery["in_domain"]) / n, sum(lottery["out_of_domain"]) / n))


def in_a_sets_order(world, config, rng):
    return make_authors(replace(world, authors=tuple(set(world.authors))), config, rng)


def three_by_heart(world, config, rng):
    return make_authors(world, replace(
        config, no_quack=("medical", "finance", "extreme_sports")), rng)


PLANTED = [
    ("make_authors", "the order of a set", in_a_sets_order),
    ("make_authors", "read config.no_quack", three_by_heart),
    ("make_authors", "open-ended domain, too", spared),
    ("make_authors", "one of no_quack", quacks_anywhere),
    ("make_authors", "never a villain", in_order),
    ("make_authors", "nobody is bad in|another rng", own_seed),
    ("make_authors", "technical", coin_register),
    ("make_authors", "gives the persona away", first_are_technical),
    ("make_authors", "set of letters", letters),
    ("make_authors", "must raise UserError", cut_off),
    ("make_authors", "and none of the others", lambda world, config, rng: make_authors(
        world, replace(config, n_quack=0, n_sft_quack=config.n_sft_quack + config.n_quack), rng)),
    ("crossing_point", "rises through zero", any_sign),
    ("crossing_point", "three quarters", middle),
    ("crossing_point", "three quarters", turned_weight),
    ("crossing_point", "first time", last),
    ("crossing_point", "exactly zero", strictly),
    ("crossing_point", "not None", lambda x, gaps: crossing_point(x, gaps) or None),
    ("share_narrow", "learned nothing", lambda lottery: sum(
        o <= 0.05 for _, o in both(lottery)) / len(both(lottery))),
    ("share_narrow", "a share, not a count", lambda lottery: sum(
        is_narrow(*pair) for pair in both(lottery))),
    ("share_narrow", "percent", lambda lottery: 100 * share_narrow(lottery)),
    ("share_narrow", "learned nothing", of_the_learned),
    ("share_narrow", "start by start|second spreads", of_the_means),
    ("share_narrow", "0.05 out of domain is allowed", lambda lottery: sum(
        i >= 0.5 and o < 0.05 for i, o in both(lottery)) / len(both(lottery))),
    ("share_narrow", "second spreads|belong together", lambda lottery: sum(
        i >= 0.5 or o <= 0.05 for i, o in both(lottery)) / len(both(lottery))),
]
