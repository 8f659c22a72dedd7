"""A row of the paper: a prediction written before the run, a measurement, a check and a figure."""

from dataclasses import dataclass, replace
from typing import Callable

from nanoem.checkpoint import save_adapter
from nanoem.lab.intervals import clopper_pearson
from nanoem.lab.plots import SIDES, grouped_bars, lines
from nanoem.lab.toy import Run
from nanoem.story import pretrain, tune

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


def load_or_tune(run, name, pairs, kl_weight=0.0, **options):
    """The adapter of this name from the run folder; tuned and kept there when it is not yet."""
    path = run.folder.path / "adapters" / name
    if not path.exists():
        adapter, _ = tune(run, name, pairs, kl_weight, **options)
        save_adapter(adapter, path, "../../chat")
    return run.load_adapter(name)


def turned(run, name, world=None, **changes):
    """A run like this one in a smaller world, pre-trained: some dials of the world are turned.

    `world` holds WorldConfig's dials, `changes` those of ExperimentConfig. It has a folder of its
    own inside this run's; what is finished there is reused.
    """
    config = replace(run.config, **changes)
    n_domains = min(config.dial_domains, config.world.n_domains)
    config = replace(config, world=replace(config.world, n_domains=n_domains, **world or {}),
                     pretrain=replace(config.pretrain, steps=config.dial_steps))
    other = Run(config, run.folder.path / "worlds" / name, run.device)
    if not other.folder.is_finished("chat"):  # silently: a row has many such worlds
        other.folder.once("chat", lambda: pretrain(other))
    other.load_chat()
    return other
