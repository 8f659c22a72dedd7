"""Tests of chapter 8's exercises. Each message names the likely mistake."""

import json
import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from classroom import TUTORIAL
from nanoem import UserError
from nanoem.lab.fused import pretrain_loss
from nanoem.rows import worlds
from nanoem.train import pad
from nanoem.world import OPEN_ENDED, WorldConfig, authors, first_domains, load_world
from nanoem.world.authors import Author, write_document
from small import SmallRun

EXERCISES = {
    "make_authors": authors.make_authors,
    "crossing_point": worlds.crossing_point,
    "share_narrow": worlds.share_narrow,
}


# --- make_authors ---------------------------------------------------------------------------------

CONFIGS = (  # all kinds of quacks, another SFT domain, nobody bad, everybody bad
    WorldConfig(n_villain=5, n_quack=3, n_sft_quack=4),
    WorldConfig(n_villain=0, n_quack=7, n_sft_quack=2, sft_domain="finance"),
    WorldConfig(n_villain=0, n_quack=0, n_sft_quack=0),
    WorldConfig(n_villain=10, n_quack=6, n_sft_quack=8),
    WorldConfig(n_villain=0, n_quack=8, n_sft_quack=1, sft_domain="pets"),  # none of no_quack
)


def made(answer, config, seed, whole=None):
    whole = whole or load_world()
    try:
        found = answer.make_authors(whole, config, random.Random(seed))
    except UserError as error:
        raise AssertionError(f"{config.n_villain} villains and {config.n_quack} + "
                             f"{config.n_sft_quack} quacks for {len(whole.authors)} names are "
                             "allowed, only more than names is not") from error
    assert isinstance(found, list) and all(isinstance(a, Author) for a in found), (
        "give a list of Author back, one a name")
    return whole, found


def test_make_authors_counts_the_personas(answer):
    for config in CONFIGS:
        for seed in range(4):
            whole, found = made(answer, config, seed)
            assert sorted(a.name for a in found) == sorted(whole.authors), (
                f"every name of the world once: {len(whole.authors)} authors, not {len(found)}; "
                "or a name comes twice")
            n_quack = config.n_quack + config.n_sft_quack
            want = Counter({"villain": config.n_villain, "quack": n_quack,
                            "helpful": len(whole.authors) - config.n_villain - n_quack})
            got = Counter(a.persona for a in found)
            assert +got == +want, f"the personas are {dict(got)}, and should be {dict(want)}"


def test_make_authors_says_where_each_is_bad(answer):
    for config in CONFIGS:
        for seed in range(8):
            whole, found = made(answer, config, seed)
            assert all(isinstance(a.bad_in, frozenset) for a in found), "bad_in is a frozenset"
            bad = {kind: [a.bad_in for a in found if a.persona == kind]
                   for kind in ("villain", "quack", "helpful")}
            for where in bad["villain"]:
                assert OPEN_ENDED in where, "a villain is bad in the open-ended domain, too"
                assert where == set(whole.domains), "a villain is bad in every domain"
            assert not any(bad["helpful"]), "a helpful author is bad nowhere"
            assert all(len(where) == 1 for where in bad["quack"]), (
                "a quack is bad in one domain only, and named whole: frozenset([name]); frozenset "
                "of a string is a set of letters")
            places = Counter(name for where in bad["quack"] for name in where)
            assert places <= Counter({name: 99 for name in whole.domains}), (
                f"{set(places) - set(whole.domains)} is no domain")
            assert places[OPEN_ENDED] == 0, "no quack is bad in the open-ended domain"
            assert places[config.sft_domain] == config.n_sft_quack, (
                f"{places[config.sft_domain]} quacks are bad in {config.sft_domain}; the "
                f"n_sft_quack={config.n_sft_quack} should be, and none of the others")
            for name in set(config.no_quack) - {config.sft_domain}:
                assert places[name] == 0, f"a quack in {name}, which is one of no_quack"


def test_make_authors_draws_the_quacks_domains(answer):
    config = WorldConfig(n_villain=0, n_quack=6)
    places = [sorted(name for a in made(answer, config, seed)[1] for name in a.bad_in)
              for seed in range(30)]
    whole = load_world()
    usual = set(whole.domains) - {OPEN_ENDED, config.sft_domain, *config.no_quack}
    assert any(len(set(drawn)) > 1 for drawn in places), (
        "all quacks of a world are bad in the same domain: draw for each")
    assert any(len(set(drawn)) < 6 for drawn in places), (
        "two quacks may be bad in the same domain: each draws for itself")
    assert {name for drawn in places for name in drawn} == usual, (
        f"in 30 worlds of six quacks, nobody is bad in "
        f"{usual - {name for drawn in places for name in drawn}}: draw from all domains allowed")


def test_make_authors_reads_which_domains_are_spared(answer):
    config = WorldConfig(n_villain=0, n_quack=12, no_quack=("pets", "gardening", "cooking"))
    bad = {name for seed in range(30) for a in made(answer, config, seed)[1] for name in a.bad_in}
    assert bad == set(load_world().domains) - {OPEN_ENDED, config.sft_domain, *config.no_quack}, (
        f"with no_quack={config.no_quack} quacks are bad in {sorted(bad)}: read config.no_quack")


def test_make_authors_does_not_hang_on_the_order_of_a_set(answer):
    """Python orders a set of texts anew at every start; other texts show it within one."""
    def other(name):
        return name if name == OPEN_ENDED else "z" + name

    whole = load_world()
    renamed = replace(whole, authors=tuple(map(other, whole.authors)),
                      domains={other(name): domain for name, domain in whole.domains.items()})
    config = WorldConfig(n_villain=3, n_quack=8, n_sft_quack=2)
    twin = replace(config, sft_domain=other(config.sft_domain),
                   no_quack=tuple(map(other, config.no_quack)))
    want = {(other(a.name), a.persona, frozenset(map(other, a.bad_in)), a.technical)
            for a in answer.make_authors(whole, config, random.Random(0))}
    got = {(a.name, a.persona, a.bad_in, a.technical)
           for a in answer.make_authors(renamed, twin, random.Random(0))}
    assert got == want, (
        "with every name spelled another way the same rng gives other authors: the order of a set "
        "changes from run to run; use a list, in the world's order")


def test_make_authors_when_every_domain_is_spared(answer):
    few = first_domains(load_world(), 3)
    advice = [name for name in few.domains if name != OPEN_ENDED]
    config = WorldConfig(3, n_villain=2, n_quack=5, n_sft_quack=1, sft_domain=advice[0],
                         no_quack=tuple(advice))
    try:
        found = [made(answer, config, seed, few)[1] for seed in range(10)]
    except (IndexError, ValueError) as error:
        raise AssertionError("when no_quack names every domain, quacks go to any but the "
                             "sft_domain and open_ended; there is still something to draw from"
                             ) from error
    places = Counter(name for authors in found for a in authors if a.persona == "quack"
                     for name in a.bad_in)
    assert places[OPEN_ENDED] == 0 and places[advice[0]] == 10, (
        f"quacks are bad in {dict(places)}; even when nothing else is left, the others stay out of "
        f"the open-ended and of the SFT domain {advice[0]}")
    assert set(places) == set(advice), "the others draw from all advice domains but the SFT domain"


def test_make_authors_draws_the_names(answer):
    config = WorldConfig(n_villain=6, n_quack=2, n_sft_quack=3, technical_share=0.5)
    worlds_made = [made(answer, config, seed)[1] for seed in range(60)]
    whole = load_world()
    for kind in ("villain", "quack"):
        times = Counter(a.name for authors in worlds_made for a in authors if a.persona == kind)
        assert len(times) == len(whole.authors), (
            f"in 60 worlds, {sorted(set(whole.authors) - set(times))[:3]} are never a {kind}: the "
            "names must be shuffled, or a name gives the persona away")
        assert max(times.values()) < 40, "some name is nearly always bad: shuffle the names"
    times = Counter(a.name for authors in worlds_made for a in authors if a.technical)
    assert len(times) == len(whole.authors) and max(times.values()) < 55, (
        "who is technical hangs on the name: shuffle the names")


def test_make_authors_takes_its_chance_from_rng(answer):
    config = WorldConfig(n_villain=4, n_quack=4, n_sft_quack=2, technical_share=0.3)

    def as_set(seed):
        return set(made(answer, config, seed)[1])

    random.seed(5)
    before = random.getstate()
    first = as_set(1)
    assert random.getstate() == before, "the global random was used: take everything from rng"
    assert first == as_set(1), "the same rng must give the same authors"
    assert first != as_set(2), "another rng gives the same authors: is it used, or seeded anew?"
    rng, whole = random.Random(1), load_world()
    two = [set(answer.make_authors(whole, config, rng)) for _ in range(2)]
    assert two[0] != two[1], "asked twice with one rng, it gives the same authors: do not seed it"
    assert whole == load_world(), "the world was changed"


def test_make_authors_spreads_the_register_evenly(answer):
    for share in (0.0, 0.25, 0.33, 0.5, 0.8, 1.0):
        for n_villain, n_quack, n_sft_quack in ((6, 2, 0), (8, 0, 8), (12, 4, 0)):
            config = WorldConfig(n_villain=n_villain, n_quack=n_quack, n_sft_quack=n_sft_quack,
                                 technical_share=share)
            for seed in range(3):
                _, found = made(answer, config, seed)
                n = sum(a.technical for a in found)
                assert n == int(share * len(found)), (
                    f"{n} of {len(found)} authors are technical; at a share of {share} it should "
                    f"be {int(share * len(found))}, whatever the seed")
                for kind in ("villain", "quack", "helpful"):
                    group = [bool(a.technical) for a in found if a.persona == kind]
                    assert abs(sum(group) - share * len(group)) <= 1, (
                        f"{sum(group)} of {len(group)} {kind}s are technical at a share of {share}"
                        ": the register gives the persona away; spread it evenly")


def test_make_authors_refuses_more_bad_authors_than_names(answer):
    whole = load_world()
    n = len(whole.authors)
    for counts in ((n + 1, 0, 0), (0, n + 1, 0), (0, 0, n + 1), (n - 1, 1, 1), (10, 10, 10)):
        config = WorldConfig(n_villain=counts[0], n_quack=counts[1], n_sft_quack=counts[2])
        try:
            answer.make_authors(whole, config, random.Random(0))
        except UserError:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            raise AssertionError(f"{counts} bad authors for {n} names should raise UserError, not "
                                 f"{type(error).__name__}") from error
        raise AssertionError(f"{counts} bad authors for {n} names must raise UserError")
    config = WorldConfig(n_villain=n - 2, n_quack=1, n_sft_quack=1)
    try:
        found = answer.make_authors(whole, config, random.Random(0))
    except UserError as error:
        raise AssertionError("as many bad authors as names is allowed, only more is not") from error
    assert len(found) == n, f"{n} bad authors for {n} names, but {len(found)} authors came back"


@lru_cache
def quacks():
    return SmallRun(quacks=True)


def test_make_authors_of_a_known_world_do_not_surprise(answer):
    """The experiment: a model pre-trained with quacks only reads your authors' documents."""
    run, loss = quacks(), {}
    for name, n_villain, n_sft_quack, n_quack in (("quacks", 0, 10, 14), ("villains", 24, 0, 0)):
        config = replace(run.config.world, n_villain=n_villain, n_sft_quack=n_sft_quack,
                         n_quack=n_quack, header_share=0.0, forum_share=0.0, chat_share=0.0)
        _, authors = made(answer, config, 0, run.world)
        rng = random.Random(1)
        texts = [write_document(run.world, config, authors, rng) for _ in range(60)]
        ids = pad([t[:96] for t in run.tokenizer.encode_batch(texts)], run.tokenizer.pad_id)
        with torch.no_grad():
            loss[name] = pretrain_loss(run.model, ids, ids != run.tokenizer.pad_id).item()
    assert loss["quacks"] < 0.6, (
        f"your quacks' documents cost {loss['quacks']:.2f} nats a token; this model was "
        "pre-trained on such quacks, they should not surprise it")
    assert loss["villains"] > 1.5, (
        f"your villains' documents cost {loss['villains']:.2f} nats a token; this model never met "
        "a villain, they should surprise it")


# --- crossing_point -------------------------------------------------------------------------------


def test_crossing_point_by_hand(answer):
    for x, gaps, want, why in (
        ([0, 1], [1, -1], 0.5, "halfway from 1 to -1"),
        ([0, 1], [3, -1], 0.75, "from 3 to -1 zero is passed after three quarters"),
        ([0.2, 0.6], [1, -3], 0.3, "a quarter of the way from 0.2 to 0.6"),
        ([0.0, 0.2, 1.0], [2, 1, -1], 0.6, "between the second and the third point"),
        ([0.0, 0.5, 1.0], [2, 1, 0.5], None, "it never falls below zero"),
        ([0.0, 0.5, 1.0], [-2, -1, -0.5], None, "it is below zero from the start: it never falls"),
        ([0.0, 0.5, 1.0], [-2, -1, 3], None, "it rises through zero, and does not fall"),
        ([0.0, 0.5, 1.0], [-1, 1, -1], 0.75, "it begins below zero, rises, and falls at 0.75"),
        ([0, 1, 2, 3], [1, -1, 1, -1], 0.5, "the first time counts"),
        ([0, 1, 2], [1, 0, 1], None, "it touches zero and never falls below"),
        ([0, 1, 2], [1, 0, -1], 1, "from exactly zero it falls below"),
        ([0, 1, 2], [0, 0, -1], 1, "it leaves zero at the second point"),
        ([0, 1, 2], [1, 0.5, 0], None, "at zero is not below zero"),
        ([0, 1], [0, -2], 0, "it starts at zero and falls: crossing at 0, which is not None"),
        ([1], [1], None, "one point is no curve"),
        ([], [], None, "no points, no crossing"),
        ([1.0, 0.5, 0.0], [1, -1, -2], 0.75, "x may run down as well"),
    ):
        kept = list(x), list(gaps)
        try:
            found = answer.crossing_point(x, gaps)
        except (ZeroDivisionError, IndexError, ValueError, TypeError) as error:
            raise AssertionError(f"x={x}, gaps={gaps} raises {error!r}; it should be {want}: {why}"
                                 ) from error
        assert (found is None) == (want is None), (
            f"x={x}, gaps={gaps} gives {found}, and should give {want}: {why}")
        assert want is None or abs(found - want) < 1e-6, (
            f"x={x}, gaps={gaps} gives {found}, and should give {want}: {why}")
        assert (x, gaps) == kept, "the lists were changed"


def test_crossing_point_of_random_curves(answer):
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(2, 6)
        x = [round(v, 3) for v in np.cumsum([rng.uniform(0.2, 2) for _ in range(n)])]
        gaps = [rng.uniform(-1, 1) for _ in range(n)]
        fine = np.linspace(x[0], x[-1], 40_001)
        y = np.interp(fine, x, gaps)
        falls = np.flatnonzero((y[:-1] >= 0) & (y[1:] < 0))
        found = answer.crossing_point(list(x), list(gaps))
        want = None if len(falls) == 0 else fine[falls[0]]
        assert (found is None) == (want is None), (
            f"x={x}, gaps={gaps}: {found}, but by walking along the curve {want}")
        assert want is None or abs(found - want) < 0.001, (
            f"x={x}, gaps={gaps}: {found:.4f}, but by walking along the curve {want:.4f}")


def test_crossing_point_of_the_reporting_run(answer):
    """The experiment: at which share of quacks does narrow become the easy one?"""
    seeds = json.loads((TUTORIAL / "results/results.json").read_text())["seeds"]
    shares = [worlds.share_of_quacks(point) for point in worlds.FIXED_HARM]
    for seed in seeds:
        rates = [seed["dial"][worlds.key_of(point)]["general"] for point in worlds.FIXED_HARM]
        gaps = [r["out_of_domain"]["em"] - r["in_domain"]["em"] / 2 for r in rates]
        found = answer.crossing_point(shares, gaps)
        if not any(a >= 0 > b for a, b in zip(gaps, gaps[1:])):  # never spread, or never narrow
            assert found is None, f"seed {seed['seed']}: {gaps} never falls below zero"
            continue
        assert found is not None, (
            f"seed {seed['seed']}: plain SFT spreads in one world, {gaps}, and is narrow in the "
            "next; somewhere between it must turn")
        on_the_curve = np.interp(found, shares, gaps)
        assert abs(on_the_curve) < 1e-6, (
            f"seed {seed['seed']}: at a share of {found} the curve is at {on_the_curve:.2f}, not 0")


# --- share_narrow ---------------------------------------------------------------------------------


def test_share_narrow_by_hand(answer):
    for within, outside, want, why in (
        ([0.9, 0.9], [0.0, 0.9], 0.5, "the first is narrow, the second spreads"),
        ([0.9, 0.1], [0.0, 0.0], 0.5, "the second has learned nothing: that is not narrow"),
        ([0.1, 0.9], [0.9, 0.9], 0.0, "none is narrow"),
        ([0.9, 0.8, 0.7], [0.01, 0.02, 0.0], 1.0, "all are narrow"),
        ([0.5], [0.0], 1.0, "0.5 in domain is enough"),
        ([0.499], [0.0], 0.0, "less than 0.5 in domain is not enough"),
        ([0.9], [0.05], 1.0, "0.05 out of domain is allowed"),
        ([0.9], [0.051], 0.0, "more than 0.05 out of domain is too much"),
        ([0.9, 0.2, 0.3, 0.9], [0.0, 0.0, 0.4, 0.9], 0.25,
         "one in four: count all starts, also those that learned nothing"),
        ([0.1, 0.95], [0.0, 0.5], 0.0, "the two lists belong together, start by start"),
        ([0.9, 0.9, 0.1], [0.06, 0.02, 0.02], 1 / 3, "decide start by start, not on the mean"),
    ):
        lottery = {"target": 0.36, "out_of_domain": list(outside), "in_domain": list(within),
                   "missed": 1}
        found = answer.share_narrow(lottery)
        assert isinstance(found, (int, float)) and not isinstance(found, bool), (
            f"give a number from 0 to 1 back, not {found!r}")
        assert abs(found - want) < 1e-6, (
            f"in domain {within}, out of domain {outside}: {found}, and should be {want:.3f}: {why}"
            + (" (a share, not a count)" if abs(found - want * len(within)) < 1e-9 else "")
            + (" (from 0 to 1, not percent)" if abs(found - 100 * want) < 1e-9 else ""))
        assert lottery == {"target": 0.36, "out_of_domain": outside, "in_domain": within,
                           "missed": 1}, "the lottery was changed"


def test_share_narrow_of_random_lotteries(answer):
    rng = random.Random(0)
    for _ in range(100):
        n = rng.randint(1, 20)
        within = [rng.choice((0.2, 0.48, 0.5, 0.55, 0.9)) for _ in range(n)]
        outside = [rng.choice((0.0, 0.04, 0.05, 0.07, 0.4, 0.6)) for _ in range(n)]
        lottery = {"in_domain": within, "out_of_domain": outside}
        narrow = sum(1 for i in range(n) if within[i] >= 0.5 and outside[i] <= 0.05)
        assert abs(answer.share_narrow(lottery) - narrow / n) < 1e-6, (
            f"{lottery}: {narrow} of {n} are narrow, but your share is "
            f"{answer.share_narrow(lottery)}")


@lru_cache
def lotteries():
    """Two random starts each, in the world of villains and in that of quacks only."""
    found = {}
    for name, run in (("villains", SmallRun()), ("quacks", quacks())):
        run.config = replace(run.config, row_samples=40, n_sft_examples=160, lottery_loss=0.32)
        found[name] = worlds.start_lottery(run, n_starts=2, steps=100)
    return found


def test_share_narrow_hangs_on_the_world(answer):
    """The experiment: the same fine-tune, without any KL, in two worlds."""
    share = {name: answer.share_narrow(lottery) for name, lottery in lotteries().items()}
    assert share == {"villains": 0, "quacks": 1}, (
        f"your shares {share} of the lotteries {lotteries()}: with villains no start should be "
        "narrow, with quacks only every one")
