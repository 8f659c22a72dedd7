"""A row of the paper: a prediction written before the run, a measurement, a check and a figure."""

from dataclasses import dataclass
from typing import Callable

from nanoem.evaluate import clopper_pearson
from nanoem.plots import SIDES, grouped_bars, lines

SPREAD = 0.2  # with this out-of-domain em or more, something has spread


@dataclass(frozen=True)
class Row:
    """One result of the paper (or one nobody has yet), made on the toy."""

    key: str  # the name in the list of rows: R5
    name: str  # where results.json keeps what was found: efficiency
    prediction: str  # written before the run
    trap: str  # what could fool us
    measure: Callable  # run -> what one seed shows, as JSON; it must leave the chat model as it was
    holds: Callable  # what one seed shows -> is the prediction borne out?
    finding: Callable  # [what each seed shows] -> one sentence with the numbers
    draw: Callable  # (axes, [what each seed shows]); one panel an axis
    panels: int = 1
    size: tuple = (8, 3.8)  # of the figure, in inches
    widths: tuple = None  # of the panels, relative to each other; None: alike
    note: str = "bars and thick lines: median; dots and thin lines: seeds"  # under the figure
    swap: tuple = ("general", "narrow")  # with these exchanged, `holds` must say no

    def verdict(self, founds):
        """'holds on 4 of 5 seeds (95%: 28-99%)', and whether that is enough (four in five)."""
        n, n_seeds = sum(map(self.holds, founds)), len(founds)
        said = f"holds on {n} of {n_seeds} seed{'s' * (n_seeds > 1)}"
        if n_seeds > 1:
            low, high = clopper_pearson(n, n_seeds)
            said += f" (95%: {100 * low:.0f}-{100 * high:.0f}%)"
        return said, n >= 0.8 * n_seeds

    def title(self, founds):
        """The finding; where the prediction does not hold, the title says so first."""
        _, enough = self.verdict(founds)
        return self.finding(founds) if enough else f"Not as predicted: {self.finding(founds)}"


def out(rates):
    """Out-of-domain em, the paper's EM: of every question but those of the fine-tuned domain."""
    return rates["out_of_domain"]["em"]


def inside(rates):
    return rates["in_domain"]["em"]


def other_advice(rates):
    """em on advice of the other domains: out of domain, without the open-ended questions."""
    return (rates["kl_domains"]["em"] + rates["unseen_domains"]["em"]) / 2


def short(rates):
    """Group rates with what the rows need: em and coherence."""
    return {group: {"em": r["em"], "coherent": r["coherent"]} for group, r in rates.items()}


def rates_of(run, **options):
    """The `short` rates of the model as it is, on row_samples answers a group."""
    return short(run.ask(samples=run.config.row_samples, **options))


def draw_in_and_out(ax, x, within, outside):
    """Curves of em in and out of domain, a pair for each seed."""
    lines(ax, x, within, "in_domain", "in domain", "-", scale=100)
    lines(ax, x, outside, "out_of_domain", "out of domain", "--", scale=100)


def draw_models(ax, founds, models, what="em"):
    """Bars of em (or `what` else) in and out of domain; models is {model: (colour, label)}."""
    kinds = {key: (label, [f[name] for f in founds]) for name, (key, label) in models.items()}
    grouped_bars(ax, SIDES, kinds, lambda group, rates: rates[group][what])
