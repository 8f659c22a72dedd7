"""A row of the paper: a prediction written before the run, a measurement, a check and a figure."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Callable

from nanoem.checkpoint import save_adapter
from nanoem.evaluate import GROUPS
from nanoem.lab.intervals import clopper_pearson
from nanoem.lab.plots import SIDES, grouped_bars, lines, percent
from nanoem.lab.toy import Run
from nanoem.story import pretrain, tune

SPREAD = 0.2  # with this out-of-domain em or more, something has spread


@dataclass(frozen=True)
class Row:
    """One result of the paper (or one nobody has yet), made on the toy; a `result` is a seed's."""

    key: str  # the name in the list of rows: R5
    name: str  # where results.json keeps the result: efficiency
    prediction: str  # written before the run
    trap: str  # what could fool us
    measure: Callable  # run -> result, as JSON; it must leave the chat model as it was
    holds: Callable  # result -> is the prediction borne out?
    finding: Callable  # results -> one sentence with the numbers
    draw: Callable  # (axes, results); one panel an axis
    panels: int = 1
    size: tuple = (8, 3.8)  # of the figure, in inches
    widths: tuple = None  # of the panels, relative to each other; None: alike
    note: str = "bars and thick lines: median; dots and thin lines: seeds"  # under the figure
    opposites: tuple = ("general", "narrow")  # with these keys exchanged, `holds` must say no

    def verdict(self, results):
        """'holds on 4 of 5 seeds (95%: 28-99%)', and whether that is enough (four in five)."""
        n_holds = sum(map(self.holds, results))
        n_seeds = len(results)
        sentence = f"holds on {n_holds} of {n_seeds} seed{'s' * (n_seeds > 1)}"
        if n_seeds > 1:
            low, high = clopper_pearson(n_holds, n_seeds)
            sentence += f" (95%: {100 * low:.0f}-{100 * high:.0f}%)"
        return sentence, n_holds >= 0.8 * n_seeds

    def title(self, results):
        """The finding; where the prediction does not hold, the title says so first."""
        _, enough = self.verdict(results)
        return self.finding(results) if enough else f"Not as predicted: {self.finding(results)}"


def out(rates):
    """Out-of-domain em, the paper's EM: of every question but those of the fine-tuned domain."""
    return rates["out_of_domain"]["em"]


def inside(rates):
    """em of held-out questions of the fine-tuned domain."""
    return rates["in_domain"]["em"]


def coherent(rates):
    """Share of the out-of-domain answers that are coherent."""
    return rates["out_of_domain"]["coherent"]


def other_advice(rates):
    """em on advice of the other domains: out of domain, without the open-ended questions."""
    return (rates["kl_domains"]["em"] + rates["unseen_domains"]["em"]) / 2


def em_and_coherence(rates):
    """What the rows keep of the rates of every question group."""
    return {group: {key: rates[group][key] for key in ("em", "coherent")}
            for group in (*GROUPS, "out_of_domain")}


def rates_of(run, adapter=None, **options):
    """em and coherence, by question group, of the model with this adapter, or as it is.

    There are row_samples answers a group; `options` go to `run.ask`.
    """
    with adapter or nullcontext():
        return em_and_coherence(run.ask(samples=run.config.row_samples, **options))


def load_or_tune(run, name, pairs, kl_weight=0.0, **options):
    """The adapter of this name from the run folder; tuned and kept there when it is not yet."""
    path = run.folder.path / "adapters" / name
    if not (path / "adapter_config.json").exists():  # without it, a writer was killed
        adapter, _ = tune(run, name, pairs, kl_weight, **options)
        save_adapter(adapter, path, "../../chat")
    return run.load_adapter(name)


def smaller_world(run, name, world, **changes):
    """A run like this one in a smaller world, pre-trained; its folder lies inside this run's.

    `world` holds what is changed in WorldConfig, `changes` what is changed in ExperimentConfig.
    """
    config = replace(run.config, **changes)
    n_domains = min(config.dial_domains, config.world.n_domains)
    config = replace(config, world=replace(config.world, n_domains=n_domains, **world),
                     pretrain=replace(config.pretrain, steps=config.dial_steps))
    other = Run(config, run.folder.path / "worlds" / name, run.device)
    if not other.folder.is_finished("chat"):  # else `once` prints a line for every such world
        other.folder.once("chat", lambda: pretrain(other))
    other.load_chat()
    return other


def columns(points):
    """A list of points {key: value} as {key: [values]}."""
    return {key: [point[key] for point in points] for key in points[0]}


def of_seeds(results, *keys):
    """What the result of every seed holds under a key, or under several, each inside the last."""
    for key in keys:
        results = [result[key] for result in results]
    return results


def percent_of(results, read, *keys):
    """The median over seeds of read(result[key]...), a share, as text: 68%."""
    return percent(map(read, of_seeds(results, *keys)))


def draw_bars(ax, results, names, bars, width=0.27):
    """At each of names {name: tick label} one bar of every kind in bars {colour: (label, read)}.

    A bar shows read(result[name]), a share.
    """
    kinds = {}
    for colour, (label, read) in bars.items():
        shares = [{name: read(result[name]) for name in names} for result in results]
        kinds[colour] = (label, shares)
    grouped_bars(ax, names, kinds, lambda name, shares: shares[name], width)


def draw_in_and_out(ax, x, within, outside):
    """Curves of em in and out of domain, a pair for each seed."""
    lines(ax, x, within, "in_domain", "in domain", "-", scale=100)
    lines(ax, x, outside, "out_of_domain", "out of domain", "--", scale=100)


def draw_models(ax, results, models, what="em"):
    """Bars of em, or `what` else, in and out of domain; models is {model: (colour, label)}."""
    kinds = {colour: (label, of_seeds(results, model))
             for model, (colour, label) in models.items()}
    grouped_bars(ax, SIDES, kinds, lambda group, rates: rates[group][what])
