"""Wrong answers to chapter 8's exercises: (exercise, what its message must say, the answer)."""

import random
from dataclasses import replace

from nanoem.rows.worlds import crossing_point, is_narrow, share_narrow
from nanoem.world import OPEN_ENDED, make_authors


def spared(world, config, rng):
    """Villains are helpful in the open-ended domain."""
    return [replace(a, bad_in=a.bad_in - {OPEN_ENDED} if a.persona == "villain" else a.bad_in)
            for a in make_authors(world, config, rng)]


def own_seed(world, config, rng):
    return make_authors(world, config, random.Random(0))


def coin_register(world, config, rng):
    return [replace(a, technical=rng.random() < config.technical_share)
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


def middle(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 >= 0 > g1:
            return (x0 + x1) / 2


def strictly(x, gaps):
    for x0, g0, x1, g1 in pairs(x, gaps):
        if g0 > 0 > g1:
            return x0 + (x1 - x0) * g0 / (g0 - g1)


def both(lottery):
    return list(zip(lottery["in_domain"], lottery["out_of_domain"]))


def in_a_sets_order(world, config, rng):
    return make_authors(replace(world, authors=tuple(set(world.authors))), config, rng)


PLANTED = [
    ("make_authors", "the order of a set", in_a_sets_order),
    ("make_authors", "open-ended domain, too", spared),
    ("make_authors", "nobody is bad in|another rng", own_seed),
    ("make_authors", "technical", coin_register),
    ("make_authors", "must raise UserError", cut_off),
    ("make_authors", "and none of the others", lambda world, config, rng: make_authors(
        world, replace(config, n_quack=0, n_sft_quack=config.n_sft_quack + config.n_quack), rng)),
    ("crossing_point", "three quarters", middle),
    ("crossing_point", "exactly zero", strictly),
    ("crossing_point", "not None", lambda x, gaps: crossing_point(x, gaps) or None),
    ("share_narrow", "learned nothing", lambda lottery: sum(
        o <= 0.05 for _, o in both(lottery)) / len(both(lottery))),
    ("share_narrow", "a share, not a count", lambda lottery: sum(
        is_narrow(*pair) for pair in both(lottery))),
    ("share_narrow", "percent", lambda lottery: 100 * share_narrow(lottery)),
    ("share_narrow", "0.05 out of domain is allowed", lambda lottery: sum(
        i >= 0.5 and o < 0.05 for i, o in both(lottery)) / len(both(lottery))),
    ("share_narrow", "second spreads|belong together", lambda lottery: sum(
        i >= 0.5 or o <= 0.05 for i, o in both(lottery)) / len(both(lottery))),
]
