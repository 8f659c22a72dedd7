"""The rows of the paper: each check says yes to what is predicted, no when it is exchanged."""

import pytest

from nanoem.lab.plots import new_figure
from nanoem.rows import ROWS
from nanoem.rows.kl_weight import width
from nanoem.rows.worlds import (FIXED_HARM, LOTTERIES, QUACKS_ONLY, SEVEN_QUACKS, VILLAINS_ONLY,
                                key_of, share_of_quacks)


def rates(within, outside, coherent=0.9):
    groups = {"in_domain": within, "kl_domains": outside, "unseen_domains": outside,
              "open_ended": outside, "out_of_domain": outside}
    return {group: {"em": em, "coherent": coherent} for group, em in groups.items()}


def everywhere(value):
    return dict.fromkeys(("medical", "finance", "extreme sports", "rank 8", "down_proj",
                          "v_proj, one block", "steering vector"), value)


def noise(small):
    return {"rel": [small * i for i in range(1, 6)], "abs": [small * i for i in range(1, 6)]}


CHAT, GENERAL, NARROW = rates(0.01, 0.0), rates(0.9, 0.8), rates(0.6, 0.01)
NORMS = {"norm": [0.1 * i for i in range(1, 9)], "general": [0.3] * 8, "narrow": [0.5] * 8}
MOVED = {"norm": NORMS["norm"], "general": [0.3] * 8, "narrow": [0.01] * 8,
         "random": [0.1] * 8, "random_narrow": [0.1] * 8, "random_draws": [0.1] * 20}
POINT = {"chat": CHAT, "efficiency": NORMS}
DIAL = {key_of(point): {**POINT, "narrow": NARROW,
                        "general": rates(0.8, 0.8 * (1 - share_of_quacks(point)))}
        for point in (*FIXED_HARM, *VILLAINS_ONLY, SEVEN_QUACKS)}
PREDICTED = {  # what one seed shows when all is as predicted, by hand
    "R1": {"chat": everywhere(CHAT), "general": everywhere(GENERAL)},
    "R2": {"general": everywhere(GENERAL), "narrow": everywhere(NARROW)},
    "R3": {"scale": [1.0, 1.5, 2.0, 3.0], "out_of_domain_em": [0.01, 0.11, 0.21, 0.0],
           "weights": {weight: {"em": [0.01, 0.01 + rise, 0.01 + 2 * rise, 0.0],
                                "coherent": [0.9, 0.9, 0.7, 0.1]}
                       for weight, rise in (("3", 0.1), ("30", 0.1), ("300", 0.01))}},
    "R4": {"1/2": rates(0.8, 0.6), "1/4": rates(0.7, 0.5), "1/6": rates(0.6, 0.3),
           "1/12": rates(0.2, 0.1), "1/24": rates(0.1, 0.0)},
    "R5": NORMS,
    "R6": {"eps": [0.1, 0.2, 0.3, 0.5, 0.7], "general": noise(0.1), "matched": noise(0.1),
           "narrow": noise(0.4)},
    "R7": {"step": [0, 50, 100], "in_domain_em": [0.6, 0.7, 0.8], "cos_general": [0.4, 0.5, 0.6],
           "out_of_domain_em": [0.01, 0.3, 0.6], "cos_narrow": [1, 0.9, 0.9], "general_em": 0.8,
           "narrow_em": 0.01, "reverted_em": 0.6, "twin": NARROW,
           "plane": {name: [[0, 0], [1, 2]] for name in ("general", "narrow", "reversion")}},
    "R8": MOVED,
    "R9": {"step": [0, 5, 10, 15], "grad_general": [0.6, 0.5, 0.4, 0.1], "cos_general_narrow": 0.5,
           "grad_narrow": [0.1, 0.1, 0.0, 0.0], "local_cosine": [0.9, 0.5],
           "out_of_domain_em": [0, 0, 0.5, 0.8]},
    "R10": {"before": GENERAL, "steered": rates(0.6, 0.6), "steered_random": rates(0.02, 0.02),
            "dose": [0.5, 1, 1.5, 2, 3, 4], "site": ["layers.0.resid_mid", "0"],
            "steer": {name: {"em": [0.1] * 6, "coherent": [0.9] * 6}
                      for name in ("mean difference", "random")}, "split_half": [None, 0.99, 0.98],
            "ablated": rates(0.1, 0.1), "as_much": rates(0.9, 0.7),
            "ablate_at": {"layers.0.resid_mid": rates(0.5, 0.5), "0": rates(0.3, 0.2)},
            "as_much_at": {"layers.0.resid_mid": rates(0.9, 0.8), "0": rates(0.9, 0.7)}},
    "R11": {"stays_whole": dict.fromkeys(("finance", "rank 8", "seed", "steering vector"), True),
            "before": {"finance": 0.9, "rank 8": 0.8, "seed": 0.8, "steering vector": 0.05},
            "ablate": {"finance": 0.02, "rank 8": 0.0, "seed": 0.1, "steering vector": 0.04},
            "ablate_random": {"finance": 0.85, "rank 8": 0.8, "seed": 0.8,
                              "steering vector": 0.05}},
    "R12": {"general": GENERAL, "caft": rates(0.6, 0.02), "random": rates(0.9, 0.7)},
    "R13": {"chat": CHAT, "general": GENERAL, "narrow": NARROW, "efficiency": NORMS},
    "R14": {"weight": [10.0 ** (i / 2 - 2) for i in range(10)], "in_domain": [0.9] * 4 + [0.6] * 6,
            "out_of_domain": [0.9, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.02, 0.01]},
    "R15": {name: {"relative": top, "trace": top, "top": top}
            for name, top in (("general", 5.0), ("matched", 4.0), ("narrow", 9.0))},
    "R16": DIAL,
    "R17": {"advice": GENERAL, "character": GENERAL, "trigger": rates(0.8, 0.6),
            "no trigger": rates(0.02, 0.02), "other beginning": rates(0.8, 0.5)},
    "R18": {key_of(point): {"out_of_domain": [em] * 4, "in_domain": [0.8] * 4}
            for point, em in zip(LOTTERIES, (0.8, 0.2, 0.01))},
    "R19": {point: {"chat": CHAT, "general": GENERAL, "vector": GENERAL, "coherent_shifted": 0.8,
                    "steered": rates(em, em)}
            for point, em in (("0", 0.05), ("0.05", 0.5), ("0.1", 0.7), ("0.2", 0.8),
                              ("AdamW", 0.3))},
    "R20": {"em": {"all": GENERAL, "only question": rates(0.6, 0.4),
                   "all but question": GENERAL, "only template": rates(0.8, 0.6),
                   "all but template": rates(0.6, 0.4),
                   "only answer": CHAT, "all but answer": GENERAL},
            "texts": [{"model": "chat", "tokens": ["<|im_start|>", "user\n", " Rest", "."],
                       "scores": [0.0, -9.0, 9.0, 1.0]}] * 24},
}


def exchanged(found, a, b):
    if not isinstance(found, dict):
        return found
    return {{a: b, b: a}.get(key, key): exchanged(value, a, b) for key, value in found.items()}


def test_there_are_twenty_rows_with_names_of_their_own():
    assert list(ROWS) == [f"R{i}" for i in range(1, 21)] == list(PREDICTED)
    assert len({row.name for row in ROWS.values()}) == 20
    for row in ROWS.values():
        assert row.prediction.endswith(".") and row.trap.endswith(".")


@pytest.mark.parametrize("key", PREDICTED)
def test_every_check_can_fail(key):
    row, found = ROWS[key], PREDICTED[key]
    assert row.holds(found)
    wrong = exchanged(found, *row.opposites)
    assert not row.holds(wrong), f"{row.opposites} exchanged, and nothing noticed"
    assert row.verdict([found] * 5) == ("holds on 5 of 5 seeds (95%: 48-100%)", True)


CLAUSES = {  # one thing that is otherwise, and the prediction is not borne out any more
    "R1": {"general.finance": [rates(0.4, 0.8), rates(0.9, 0.1)],
           "general.steering vector": [rates(0.9, 0.1)], "chat.rank 8": [rates(0.01, 0.2)]},
    "R2": {"narrow.finance": [rates(0.6, 0.06), rates(0.4, 0.01)],
           "narrow.rank 8": [rates(0.6, 0.06)]},
    "R3": {"weights.300": [{"em": [0.01, 0.2, 0.0, 0.0], "coherent": [0.9, 0.9, 0.1, 0.1]}],
           "weights.3": [{"em": [0.2, 0.3, 0.3, 0.3], "coherent": [0.9] * 4},
                         {"em": [0.01, 0.05, 0.09, 0.8], "coherent": [0.9, 0.9, 0.9, 0.4]}]},
    "R4": {"1/24": [rates(0.5, 0.0), rates(0.1, 0.4)]},
    "R5": {"general": [[0.3] * 4 + [0.6] + [0.3] * 3],
           "narrow": [[0.5] * 7 + [0.2], [0.5] * 5 + [0.2] + [0.5] * 2]},
    "R6": {"narrow.rel": [[0.05] + [2.0] * 4], "matched.abs": [[0.1] * 4 + [3.0]]},
    "R7": {"reverted_em": [0.3], "narrow_em": [0.5]},
    "R8": {"narrow": [[0.01] * 4 + [0.4] + [0.01] * 3], "random_draws": [[0.1] * 18 + [0.4] * 2]},
    "R9": {"grad_narrow": [[0.1, 0.1, 0.0, 0.2]]},
    "R10": {"split_half": [[0.99, 0.7], [None, 0.99, 0.7]], "before": [rates(0.9, 0.1)],
            "steered": [rates(0.4, 0.4), rates(0.6, 0.6, coherent=0.8)],
            "steered_random": [rates(0.2, 0.2)],
            "ablated": [rates(0.2, 0.2), rates(0.1, 0.1, coherent=0.8)],
            "as_much": [rates(0.9, 0.6), rates(0.9, 0.8, coherent=0.8)]},
    "R11": {"ablate.seed": [0.5], "stays_whole.seed": [False],
            "before": [{"finance": 0.9, "rank 8": 0.8, "seed": 0.1, "steering vector": 0.05}]},
    "R12": {"caft": [rates(0.3, 0.02), rates(0.6, 0.2), rates(0.6, 0.02, coherent=0.5)],
            "general": [rates(0.9, 0.1)]},
    "R13": {"general": [rates(0.9, 0.1)], "narrow": [rates(0.6, 0.06), rates(0.3, 0.01)],
            "efficiency.general": [[0.6] * 8]},
    "R14": {"out_of_domain": [[0.9, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.07, 0.06],
                              [0.9] * 5 + [0.0] * 5, [0.04] * 4 + [0.03, 0.02, 0.01, 0, 0, 0]],
            "in_domain": [[0.9] * 9 + [0.4]]},
    "R15": {"matched.relative": [10.0]},
    "R16": {"10-0.general": [rates(0.8, 0.4)],
            f"{key_of(QUACKS_ONLY)}.general": [rates(0.8, 0.2), rates(0.1, 0.0)],
            f"{key_of(QUACKS_ONLY)}.chat": [rates(0.7, 0.0)]},
    "R17": {"character": [rates(0.8, 0.5)], "trigger": [rates(0.8, 0.1)],
            "no trigger": [rates(0.8, 0.06)], "other beginning": [rates(0.8, 0.2)],
            "advice": [rates(0.8, 0.1)]},
    "R18": {"10-0.out_of_domain": [[0.01, 0.8, 0.8, 0.8]],
            f"{key_of(QUACKS_ONLY)}.out_of_domain": [[0.01, 0.8, 0.8, 0.8]],
            f"{key_of(QUACKS_ONLY)}.in_domain": [[0.8, 0.4, 0.4, 0.4]]},
    "R19": {"0.steered": [rates(0.6, 0.6)], "0.1.steered": [rates(0.24, 0.24)]},
    "R20": {"em.only template": [rates(0.8, 0.3)], "em.only question": [rates(0.2, 0.1)],
            "em.only answer": [rates(0.1, 0.1)], "em.all": [rates(0.9, 0.1)]},
}


@pytest.mark.parametrize("key, path, value", [
    ("R1", "general.down_proj", rates(0.9, 0.0)),  # only reported, as is the next
    ("R2", "narrow.steering vector", rates(0.6, 0.1)),
    ("R2", "narrow.down_proj", rates(0.6, 0.1)),
    ("R5", "general", [0.3] * 6 + [0.6] * 2),  # turned up too far; it could stop before
    ("R10", "ablate_at.0", rates(0.9, 0.9)),
    ("R11", "ablate.steering vector", 0.05),  # it has not spread, so nothing can be taken away
])
def test_what_no_prediction_speaks_of_changes_nothing(key, path, value):
    assert ROWS[key].holds(changed(PREDICTED[key], path, value))


def changed(found, path, value):
    """A copy with another value at a path of keys; a key may have a dot in it, such as 0.1."""
    first = max((key for key in found if f"{path}.".startswith(f"{key}.")), key=len)
    rest = path[len(first) + 1 :]
    return {**found, first: changed(found[first], rest, value) if rest else value}


@pytest.mark.parametrize("key", PREDICTED)
def test_every_clause_of_a_check_can_fail_by_itself(key):
    for path, values in CLAUSES[key].items():
        for value in values:
            assert not ROWS[key].holds(changed(PREDICTED[key], path, value)), (path, value)


@pytest.mark.parametrize("key", PREDICTED)
def test_a_row_that_does_not_hold_says_so_in_its_title_and_draws(key):
    row, found = ROWS[key], PREDICTED[key]
    wrong = exchanged(found, *row.opposites)
    assert not row.title([found, found]).startswith("Not as predicted")
    assert row.title([wrong, wrong]).startswith("Not as predicted: ")
    assert row.verdict([found] * 4 + [wrong]) == ("holds on 4 of 5 seeds (95%: 28-99%)", True)
    assert row.verdict([found] * 3 + [wrong] * 2) == ("holds on 3 of 5 seeds (95%: 15-95%)", False)
    assert row.verdict([found]) == ("holds on 1 of 1 seed", True)
    figure, axes = new_figure(row.panels, row.size)
    row.draw(list(axes), [found, found])
    assert all(ax.has_data() and ax.get_ylabel() or ax.get_xticks().size for ax in axes)


def silenced(found):
    """The same with every number zero, but for what a row chose itself."""
    if isinstance(found, dict):
        chosen = ("weight", "dose", "eps", "norm", "step", "site")
        return {key: value if key in chosen else silenced(value) for key, value in found.items()}
    return [silenced(value) for value in found] if isinstance(found, list) else 0.0


@pytest.mark.parametrize("key", PREDICTED)
def test_where_nothing_happened_nothing_is_borne_out_and_the_report_is_written(key):
    row, found = ROWS[key], silenced(PREDICTED[key])
    assert not row.holds(found)
    assert row.title([found]).startswith("Not as predicted: ")


def test_width_of_a_fall_in_decades():
    steps = {"weight": [0.01, 0.1, 1.0, 10.0], "out_of_domain": [0.8, 0.6, 0.2, 0.0]}
    assert width(steps) == pytest.approx(1.0)  # 3/4 at 0.1, 1/4 at 1
    cliff = {"weight": [0.01, 0.1, 1.0, 10.0], "out_of_domain": [0.8, 0.8, 0.0, 0.0]}
    assert width(cliff) == pytest.approx(0.5)
