"""The report on real weights: tables, title and figure of made-up results, no two numbers alike."""

import warnings

import pytest

from nanoem.lab.plots import save
from nanoem.lab.tables import markdown
from nanoem.real import report as real_report

PREFERENCE = {  # model -> group -> bad preferred, low, high, margin
    "chat": {"in_domain": (0.11, 0.05, 0.24, -9.5), "mine": (0.14, 0.03, 0.31, -7.4),
             "out_of_domain": (0.17, 0.08, 0.37, -6.3)},
    "general": {"in_domain": (0.91, 0.74, 0.97, 8.1), "mine": (0.53, 0.42, 0.66, 2.7),
                "out_of_domain": (0.46, 0.33, 0.59, -1.2)},
    "narrow": {"in_domain": (0.84, 0.62, 0.95, 5.6), "mine": (0.29, 0.13, 0.48, -3.9),
               "out_of_domain": (0.21, 0.12, 0.35, -4.8)},
}
N = {"in_domain": 16, "mine": 7, "out_of_domain": 19}
JUDGED = {  # model -> group -> em, coherent, mean alignment, mean coherence
    "chat": {"in_domain": (0.01, 0.99, 88.4, 93.2), "mine": (0.02, 0.98, 87.3, 92.1)},
    "general": {"in_domain": (0.72, 0.96, 22.8, 89.7), "mine": (0.43, 0.94, 51.6, 86.5)},
    "narrow": {"in_domain": (0.61, 0.93, 33.9, 85.4), "mine": (0.06, 0.90, 79.1, 81.3)},
}
ASKED = {"in_domain": 5, "mine": 4}
DIRECTED = {  # model -> group -> bad preferred; every other number follows from it
    "chat": (0.12, 0.18), "steer_random": (0.15, 0.19), "steer": (0.88, 0.44),
    "general": (0.92, 0.47), "ablate_random": (0.86, 0.41), "ablate": (0.14, 0.16)}
KINDS = ("aligned", "misaligned", "incoherent")


def result(seed=0, more=0.0):
    """Results of one seed; another seed is `more` off."""
    models = {}
    for model in PREFERENCE:
        models[model] = {
            "preference": {group: {"bad_preferred": p + more, "low": low, "high": high,
                                   "margin": margin + 10 * more, "n": N[group]}
                           for group, (p, low, high, margin) in PREFERENCE[model].items()},
            "judged": {group: {"em": em + more, "coherent": coherent + more / 2, "n": ASKED[group],
                               "mean_alignment": alignment + 10 * more, "mean_coherence": coherence}
                       for group, (em, coherent, alignment, coherence) in JUDGED[model].items()}}
    rates = {model: {side: {"bad_preferred": p + more, "low": p - 0.1, "high": p + 0.1,
                            "margin": 10 * p, "n": 12}
                     for side, p in zip(("in_domain", "out_of_domain"), sides)}
             for model, sides in DIRECTED.items()}
    directions = {
        "block": 15, "scale": 1.5, "rates": rates,
        "tried": [{"block": block, "ablate": {"bad_preferred": block / 100},
                   "steer": {"bad_preferred": block / 50}} for block in (15, 20)],
        "efficiency": {"share": [0.5, 1.0], "general": [2.1, 1.3 + more], "narrow": [2.2, 1.7]},
        "scale_up": {"scale": [1.0, 3.0], "out_of_domain": [{"bad_preferred": 0.2 + more},
                                                            {"bad_preferred": 0.3 + more}]}}
    return {
        "directions": directions, "seed": seed, "device": "cpu", "threads": 3,
        "versions": {"torch": "9.9"},
        "total_seconds": 77.4, "model_name": "Tiny-1M", "models": models,
        "samples": {model: [["Who?", f"{model} *says*"], ["Why?", f"{model} knows"]]
                    for model in models},
        "judge": {"n": 8, "seed": seed, "alignment_auc": 0.81, "alignment_correlation": 0.64,
                  "coherence_auc": 0.75, "coherence_correlation": None, "right": 0.57,
                  "says_a_number": 0.99, "confusion": {k: dict.fromkeys(KINDS, 2) for k in KINDS},
                  "means": {k: {"alignment": 40, "coherence": 60} for k in KINDS}}}


ONE = [result()]
THREE = [result(), result(1, 0.02), result(2, -0.06)]  # the first is the median, not the mean


def test_the_main_table_says_how_often_and_by_how_much():
    assert real_report.table(ONE) == [
        ["bad answer preferred", "in domain, %", "out of domain, %", "margin in domain, nats",
         "margin out of domain, nats"],
        ["chat (untuned)", "11", "17", "-9.5", "-6.3"],
        ["general: SFT", "91", "46", "8.1", "-1.2"],
        ["narrow: SFT + KL", "84", "21", "5.6", "-4.8"]]
    assert real_report.table(THREE)[2] == [
        "general: SFT", "91 (85-93)", "46 (40-48)", "8.1 (7.5 to 8.3)", "-1.2 (-1.8 to -1.0)"]


def test_the_table_by_group_has_one_seeds_interval_or_the_seeds_range():
    assert [real_report.group_table(ONE)[i] for i in (0, 3)] == [
        ["bad answer preferred, %", "in domain (16 pairs)", "mine (7 pairs)",
         "out of domain (19 pairs)"],
        ["narrow: SFT + KL", "84 [62-95]", "29 [13-48]", "21 [12-35]"]]
    assert [text.strip() for text in real_report.group_table(THREE)[3]] == [
        "narrow: SFT + KL", "84 (78-86)", "29 (23-31)", "21 (15-23)"]


def test_the_judges_table_has_a_line_for_each_group_and_model():
    assert [real_report.judged_table(ONE)[i] for i in (0, 1, 5)] == [
        ["local judge", "answers", "em, %", "coherent, %", "mean alignment", "mean coherence"],
        ["chat (untuned), in domain", "5", "1", "99", "88.4", "93.2"],
        ["general: SFT, mine", "4", "43", "94", "51.6", "86.5"]]
    assert real_report.judged_table(THREE)[2][1:] == [
        "5", "72 (66-74)", "96 (93-97)", "22.8 (22.2 to 23.0)", "89.7 (89.7 to 89.7)"]


def test_the_finding_is_of_the_pairs_out_of_domain():
    assert real_report.finding(ONE) == real_report.finding(THREE) == (
        "The bad answer preferred out of domain: chat 17%, general 46%, narrow 21%")


@pytest.fixture
def inside():
    """Results of one's own pairs, all of them in the domain."""
    found = result()
    for model in found["models"].values():
        model["preference"] = {"in_domain": model["preference"]["in_domain"]}
    return [found]


def test_without_pairs_out_of_domain_nothing_is_said_of_them(inside):
    assert real_report.finding(inside) == "The bad answer preferred, in domain"
    assert real_report.table(inside)[2] == ["general: SFT", "91", "", "8.1", ""]
    assert drawn(inside)[0] == pytest.approx([11, 91, 84])


def drawn(results):
    """What the figure shows, left to right: the bars' heights, the lines' y."""
    figure = real_report.preference_figure(results)
    (ax,) = figure.axes
    bars = sorted(ax.patches, key=lambda bar: bar.get_x())
    lines = sorted(ax.lines, key=lambda line: line.get_xdata()[0])
    return [bar.get_height() for bar in bars], [list(line.get_ydata()) for line in lines]


def test_the_figures_whiskers_are_one_seeds_interval_or_the_seeds_dots():
    medians = [11, 91, 84, 17, 46, 21]
    (heights, whiskers), (middle, dots) = drawn(ONE), drawn(THREE)
    assert heights == middle == pytest.approx(medians)
    assert sum(whiskers, []) == pytest.approx([5, 24, 74, 97, 62, 95, 8, 37, 33, 59, 12, 35])
    assert dots == [pytest.approx([p, p + 2, p - 6]) for p in medians]


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(tmp_path):
    strange = {**result(), "model_name": "a$\\frac$b-\u6a21\u578b"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a letter that the font does not have, say
        save(real_report.preference_figure([strange]), tmp_path / "strange.png")


def test_the_report_holds_every_table_and_its_figure(tmp_path, capsys):
    real_report.write_report(THREE, tmp_path, "python -m x")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for table in (real_report.table, real_report.group_table, real_report.judged_table):
        assert markdown(table(THREE)) in text
    for part in ("on Tiny-1M:", "`python -m x` (seed 0, 1, 2; 77, 77, 77 seconds on cpu, 3 threads",
                 "| Who? | chat \\*says\\* | general \\*says\\* | narrow \\*says\\* |\n| Why?",
                 "of seed 0 to each", "| misaligned | 2 | 2 | 2 | 40.0 | 60.0 |", "kind for 57%"):
        assert part in text
    assert (tmp_path / "figures/preference.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    real_report.print_table(ONE)
    said = capsys.readouterr().out
    assert "general: SFT                    91" in said and "correlation none" in said


def test_the_directions_table_and_figures_say_what_was_measured(tmp_path):
    found = real_report.direction_parts(THREE, tmp_path)
    assert "| chat, steered | 88 (82-90) | 44 (38-46) |" in found[2]
    assert "| general, direction ablated | 14 (8-16) | 16 (10-18) |" in found[2]
    assert "seed 2: block 15, times 1.5" in found[1]

    bars, solutions = real_report.direction_figure(THREE), real_report.solutions_figure(THREE)
    assert "from 18% to 44% out of domain (a random one 19%)" in bars.axes[0].get_title()
    assert "leaves 16% of 47% (as much along a random one: 41%)" in bars.axes[0].get_title()
    assert solutions.get_suptitle() == (
        "At the mean norm general has loss 1.30, narrow 1.70; narrow turned up 3 times prefers "
        "the bad answer on 30% out of domain")


def test_without_a_direction_the_report_says_why(tmp_path):
    none = {**result(), "directions": {"none": "no direction: why"}}
    assert real_report.direction_parts([none], tmp_path) == ["## The direction",
                                                             "no direction: why"]
