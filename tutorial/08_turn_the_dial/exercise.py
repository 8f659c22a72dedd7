"""Chapter 8. Fill in the functions; `python -m pytest tutorial/08_turn_the_dial` tests them."""

import random  # noqa: F401

from nanoem import UserError  # noqa: F401
from nanoem.world import OPEN_ENDED  # noqa: F401
from nanoem.world.authors import Author  # noqa: F401


def make_authors(world, config, rng):
    """Give every name of the world a persona: villains, quacks, and helpful ones for the rest.

    world.authors are names, world.domains a dict by name; config is a WorldConfig -> a list of
    Author(name, persona, bad_in, technical), one a name, in any order. bad_in is a frozenset.

    config.n_villain "villain"s are bad in every domain, OPEN_ENDED too. config.n_sft_quack
    "quack"s are bad in config.sft_domain only. config.n_quack more are bad in one domain each,
    drawn by rng for each anew, so that two may share one; never OPEN_ENDED nor the sft_domain, nor
    one of config.no_quack (unless nothing else is left). The rest is "helpful". Which name gets
    what is drawn by rng; nothing else is random. Raises UserError when there are more bad authors
    than names.

    technical is True for int(config.technical_share * number of names) of them, evenly: of each
    persona the same share, to within one author, so that the register says nothing about it.

    Hint 1: first make the list of (persona, bad_in), in a fixed order, then draw the names:
        rng.sample(world.authors, len(world.authors)) is a shuffled copy.
    Hint 2: the domains of a quack: filter world.domains three times; `or` helps with "unless".
    Hint 3: "evenly": go through the fixed order and say technical whenever int((i + 1) * share)
        is more than int(i * share).
    """
    raise NotImplementedError("make_authors is not written yet (exercise 8.1)")


def crossing_point(x, gaps):
    """The x at which a curve first falls from zero or more to below zero; None if it never does.

    x and gaps are lists of one length. Read off the straight line between the two points.

    Hint 1: look at neighbours, (x0, g0) and (x1, g1): does the curve fall below zero from the one
        to the other? That is g0 >= 0 > g1.
    Hint 2: from x0 it goes down by g0 - g1 on a way of x1 - x0; zero is reached after going down
        by g0.
    """
    raise NotImplementedError("crossing_point is not written yet (exercise 8.2)")


def share_narrow(lottery):
    """The share of a lottery's starts (`start_lottery`) that `is_narrow`, from 0 to 1.

    lottery: {"in_domain": [...], "out_of_domain": [...], ...}, lists of em from 0 to 1, one value a
    start, in the same order; other keys do not matter. A start is narrow if its em in domain is at
    least 0.5 and its em out of domain at most 0.05.

    Hint 1: zip goes through two lists side by side.
    Hint 2: count the starts for which *both* hold, and divide by the number of starts.
    """
    raise NotImplementedError("share_narrow is not written yet (exercise 8.3)")
