"""Numbers in the prose, and the figures, of README and chapters are those of the stored results.

What a page prints is compared in test_tutorial.py, README's tables in test_readme.py; here is what
is said in words. A sentence and what makes it true stand side by side: change the one, and the
other complains.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from nanoem.lab import plots, report
from nanoem.lab.plots import percent
from nanoem.lab.toy import ExperimentConfig
from nanoem.real import report as real_report
from nanoem.rows import ROWS, handle, kl_weight, trajectory, worlds
from nanoem.rows.geometry import NORMS, N_DRAWS
from nanoem.rows.row import SPREAD
from nanoem.world import first_domains, load_world, make_splits

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "tutorial/results/results.json").read_text())["seeds"]
NUMBERS = "no one two three four five six seven eight nine ten".split()
CONFIG = ExperimentConfig()


def outside(rates):
    return rates["out_of_domain"]


def given(sentence, truth):
    """The sentence, if what it rests on is true."""
    return sentence if truth else f"(no longer true) {sentence}"


def count(condition):
    """On how many of the seeds it holds, as a word."""
    return NUMBERS[sum(map(bool, map(condition, RESULTS)))]


def of_readme():
    domains = CONFIG.world.n_domains
    yield f"Authors answer questions in {domains} domains"
    villains, quacks = NUMBERS[CONFIG.world.n_villain], NUMBERS[CONFIG.world.n_quack]
    yield f"{villains} are villains, bad in everything; {quacks} are quacks"
    yield f"median over {NUMBERS[len(RESULTS)]} seeds with the range"
    general = [outside(r["models"]["general"])["em"] for r in RESULTS]
    narrow = [outside(r["models"]["narrow"])["em"] for r in RESULTS]
    yield (f"{percent(general)} of the answers are bad after plain fine-tuning (SFT) on bad medical "
           f"advice ({percent([min(general)])} to {percent([max(general)])}, by seed), and "
           f"{percent(narrow)} with a KL penalty that keeps the model as it was on other domains "
           f"(at most {percent([max(narrow)])})")

    steered = sorted(outside(r["directions"]["steer"])["em"] for r in RESULTS)
    low = [em for em in steered if em < 0.5]
    yield (f"half of the answers or more bad on {NUMBERS[len(steered) - len(low)]} of ten seeds, "
           f"{percent(low[:1])} and {percent(low[1:])} on the two others")
    yield given("Ablated in general, it takes the harm away on all ten", all(
        outside(r["directions"]["ablate"])["em"] < 0.1 for r in RESULTS))
    broken = count(lambda r: r["directions"]["ablate"]["in_domain"]["coherent"] < 0.5)
    yield f"on {broken}, the medical answers lose their grammar"

    scaled = count(lambda r: ROWS["R3"].holds({**r["scale_up"]}))
    yield f"Scaled up threefold, it stays narrow on {scaled} of ten seeds (R3)"
    with_it, without = (percent(outside(r["handle"][point]["steered"])["em"] for r in RESULTS)
                        for point in ("0.1", "0"))
    yield f"steering makes {with_it} of the answers bad with it, and {without} without"
    down = [outside(r["sft"]["general"]["down_proj"])["em"] for r in RESULTS]
    yield (f"the harm spreads to {percent([min(down)])} of the answers on one seed and to "
           f"{percent([max(down)])} on another")
    borne_out = sum(sum(row.holds(r[row.name]) for r in RESULTS) >= 8 for row in ROWS.values())
    yield (f"{NUMBERS[borne_out]} of the twenty predictions hold on eight or more of the ten seeds")


def of_chapter_4():
    asked = make_splits(first_domains(load_world(), CONFIG.world.n_domains), CONFIG.world)
    n = len({question.domain for question in asked.kl_domains})
    yield f"The KL domains are {NUMBERS[n]} of the others"
    yield f"The reporting run has {CONFIG.evaluation.samples_per_group} answers per group"
    yield given("With half of the cause there is less of the effect, on every seed", all(
        outside(r["models"]["shuffled"])["em"] < outside(r["models"]["general"])["em"]
        for r in RESULTS))


def of_chapter_5():
    plain, with_kl = CONFIG.sft, CONFIG.sft_kl
    yield rf"trained with $\lambda = {CONFIG.kl_weight:.0f}$"
    yield given("the same adapter, optimizer, learning rate and batch; narrow has the KL, and half "
                "as many steps again", with_kl == replace(plain, steps=plain.steps * 3 // 2))
    yield f"steps again ({with_kl.steps}, general {plain.steps})"
    yield f"about {1e6 / 152_000:.1f} in our units"
    yield (f"scales up {NUMBERS[len(kl_weight.PROBED)]} weights, from {kl_weight.PROBED[0]:g} to "
           f"{kl_weight.PROBED[-1]:g}")
    yield f"sweeps {NUMBERS[len(kl_weight.WEIGHTS)]} weights"


def of_chapter_6():
    yield given("Projecting it out does less", all(
        outside(r["directions"]["ablate_to_zero"])["em"]
        >= outside(r["directions"]["ablate"])["em"] for r in RESULTS))


def of_chapter_7():
    yield given("there are twenty, R1 to R20", [*ROWS] == [f"R{i}" for i in range(1, 21)])
    yield given("up to twice the mean", "up to twice the mean" in ROWS["R5"].prediction)
    yield given("# at the mean norm", NORMS[4] == 1)
    yield given("row R8 draws twenty", N_DRAWS == 20)
    yield given("at least 19 of 20", "19 of 20" in ROWS["R8"].prediction)
    yield f"after the same {trajectory.STEPS} steps"
    yield given("at twice the learning rate", trajectory.LR == 2)
    yield given("more than half of general's", "more than half of general's"
                in ROWS["R7"].prediction)


def of_teaching():
    yield given("one author in three", 3 * CONFIG.world.n_villain == len(load_world().authors))


def of_chapter_8():
    yield f"has {len(load_world().authors)} authors and {NUMBERS[CONFIG.dial_domains]} domains."
    yield given("Ten of the authors are bad in medicine, always ten",
                all(point[0] + point[1] == 10 for point in worlds.FIXED_HARM))
    yield given("with quacks only, the other fourteen are quacks of other domains",
                worlds.QUACKS_ONLY == worlds.FIXED_HARM[-1] == (0, 10, 14))
    villains = NUMBERS[CONFIG.world.n_villain]
    yield f"has met {villains} villains among its authors, and no quack in medicine"
    yield f"how often it meets one, in {CONFIG.dial_steps} steps"
    yield f"{NUMBERS[worlds.N_STARTS]} adapters from random starts"

    first, last = ([r["dial"][worlds.key_of(point)] for r in RESULTS]
                   for point in (worlds.FIXED_HARM[0], worlds.QUACKS_ONLY))
    yield given("with villains harm spreads, with quacks it stays",
                min(outside(found["general"])["em"] for found in first) >= SPREAD
                and np.median([outside(found["general"])["em"] for found in last]) <= 0.1)
    yield given("Asked about medicine, chat is bad at times before any fine-tuning",
                np.median([found["chat"]["in_domain"]["em"] for found in last]) > 0.05)

    shares = [f"{share:g}" for share in handle.DROPOUTS]
    yield (f"all with {villains} villains and no quack: four with Muon and a dropout of "
           f"{', '.join(shares[:-1])} and {shares[-1]}, and one with a dropout of 0.1 and AdamW")
    yield given("half as long as the stream itself", handle.SHIFT == 0.5)
    yield given("at least a quarter of the answers bad with a dropout of 0.1, and at least 20 "
                "points more than without", "at least a quarter of the answers out of domain bad "
                "with dropout 0.1, and at least 20 points more than without"
                in ROWS["R19"].prediction)


def of_chapter_10():
    yield given("at least 80% less harm out of domain, and at least half of it in domain",
                "at least 80% less em out of domain, and keeps at least half of it in domain"
                in ROWS["R12"].prediction)
    yield given("half as many steps again", CONFIG.sft_kl.steps == CONFIG.sft.steps * 3 // 2)
    yield given("The toy has 64 dimensions and two blocks",
                (CONFIG.model.d_model, CONFIG.model.n_layer) == (64, 2))


PROSE = {"README.md": of_readme, "tutorial/04_easy_general/README.md": of_chapter_4,
         "tutorial/05_hard_narrow/README.md": of_chapter_5,
         "tutorial/06_directions/README.md": of_chapter_6,
         "tutorial/07_why_easy/README.md": of_chapter_7,
         "tutorial/08_turn_the_dial/README.md": of_chapter_8,
         "tutorial/10_defend/README.md": of_chapter_10, "tutorial/TEACHING.md": of_teaching}


@pytest.mark.parametrize("page", PROSE)
def test_what_the_prose_says_is_what_was_found(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    for sentence in PROSE[page]():
        assert sentence.lower() in text.lower(), f"{page} should say: {sentence}"


# --- figures --------------------------------------------------------------------------------------

STORED = ROOT / "tutorial/results"
REPORT, REAL_REPORT = ((folder / "report.md").read_text(encoding="utf-8")
                       for folder in (STORED, STORED / "real"))
FIGURES = re.findall(r"\(figures/(\w+)\.png\)", REPORT)
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorial").glob("*/README.md"))]


def command_of(text):
    return re.search("Made by `([^`]+)`", text)[1]


def compare_figures(mine, stored):
    """Pixel by pixel, to 1e-5 on average; with another matplotlib's margins, to 0.07."""
    same = f"version{matplotlib.__version__}".encode() in stored.read_bytes()
    mine, theirs = imread(mine), imread(stored)
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).mean() < (1e-5 if same else 0.08), (
        f"{stored} is drawn anew by python tutorial/reprint.py --report")


def test_the_stored_report_is_that_of_the_stored_results(tmp_path, monkeypatch):
    """Its figures are redrawn below; `python tutorial/reprint.py --report` writes all anew."""
    monkeypatch.setattr(report, "draw_all", lambda results, folder: [
        folder / f"{name}.png"
        for name in ("em_by_group", "training_curves", "one_direction", "other_fine_tunes")])
    monkeypatch.setattr(report, "draw_row", lambda row, results, folder: folder / f"{row.name}.png")
    report.write_report(RESULTS, tmp_path, command_of(REPORT))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == REPORT


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_the_stored_report_is_drawn_from_the_stored_results(name, tmp_path):
    rows = {row.name: row for row in ROWS.values()}
    path = (plots.draw_row(rows[name], RESULTS, tmp_path) if name in rows else
            plots.save(getattr(plots, name)(RESULTS), tmp_path / f"{name}.png"))
    compare_figures(path, STORED / "figures" / f"{name}.png")


def test_the_stored_report_on_real_weights_is_that_of_its_results(tmp_path):
    results = [json.loads((STORED / "real/results.json").read_text())]
    real_report.write_report(results, tmp_path, command_of(REAL_REPORT))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == REAL_REPORT
    compare_figures(*(at / "figures/preference.png" for at in (tmp_path, STORED / "real")))


def test_no_figure_is_stored_or_shown_that_is_not_in_the_report():
    stored = {path.stem for path in (STORED / "figures").iterdir()}
    shown = {name for page in PAGES for name in
             re.findall(r"results/figures/(\w+)\.png", page.read_text(encoding="utf-8"))}
    assert len(FIGURES) == 24 and shown < set(FIGURES) == stored
