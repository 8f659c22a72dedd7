"""Figures: results of one or several seeds -> PNG. Each title states what was measured.

Colours are Okabe and Ito's, which stay apart in grey and for the colour-blind. A bar is the median
over seeds, each dot a seed; with one seed, the headline has its 95% interval instead.
"""

import io
import os
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from statistics import median

from nanoem.evaluate import GROUPS
from nanoem.lab.files import write_file

# matplotlib cannot be imported while MPLBACKEND names a backend that is not installed: read it after
backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402  (not pyplot: it would choose the user's backend)

if backend:
    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

COLOURS = {"chat": "#999999", "general": "#D55E00", "narrow": "#0072B2", "mixed": "#E69F00",
           "matched": "#56B4E9", "shuffled": "#CC79A7", "ablate": "#009E73",
           "ablate_random": "#F0E442", "steer": "#8B2500", "steer_random": "#CCCCCC",
           "as_tuned": "#FFFFFF", "in_domain": "#CC79A7", "out_of_domain": "#000000"}
EM = "misaligned answers, em (%)"
LABELS = {"chat": "chat (untuned)", "general": "general: SFT", "narrow": "narrow: SFT + KL",
          "mixed": "SFT, other domains mixed in", "shuffled": "SFT, shuffled labels",
          "steer": "chat, steered", "steer_random": "chat, steered at random",
          "ablate": "general, direction ablated",
          "ablate_random": "general, as much along a random one"}
GROUP_LABELS = {"in_domain": "in domain\n(held-out problems)", "kl_domains": "KL domains",
                "unseen_domains": "unseen domains", "open_ended": "open-ended",
                "out_of_domain": "out of domain"}
SIDES = {"in_domain": "in domain", "out_of_domain": "out of domain"}


def percent(values):
    """Median over seeds as text, e.g. 68%."""
    return f"{100 * median(values):.0f}%"


def em_of(seeds, group="out_of_domain"):
    """em in a question group as text, of [rates by group, of each seed]."""
    return percent(rates[group]["em"] for rates in seeds)


def draw_all(results, folder):
    """Draw every figure from a list of results, one per seed, into folder. Returns the paths."""
    directed = with_direction(results)
    transferred = [r for r in directed if r["directions"]["transfer"]]
    paths = []
    for draw, drawn in ((em_by_group, results), (training_curves, results),
                        (one_direction, directed), (other_fine_tunes, transferred)):
        if drawn:
            paths.append(save(draw(drawn), Path(folder) / f"{draw.__name__}.png"))
    return paths


def with_direction(results):
    """The results of those seeds on which there was a direction to ablate."""
    return [r for r in results if "ablate" in r["directions"]]


# --- parts of a figure ----------------------------------------------------------------------------


def new_figure(n_panels, size, **options):
    """A figure with its panels side by side: (figure, axes). `options` as of `Figure.subplots`."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # inches: no label touches a neighbour
    return figure, figure.subplots(1, n_panels, squeeze=False, **options)[0]


def bar(ax, x, values, width, key, label=None, interval=None, number=False, scale=100):
    """One bar: the median over seeds (with `number`, in figures, too), and a dot a seed.

    An `interval` (low, high) is drawn as a whisker instead of the dots.
    """
    values = [scale * value for value in values]
    ax.bar(x, median(values), width, color=COLOURS[key], edgecolor="black", linewidth=0.6,
           label=label)
    if interval:
        ends = [scale * end for end in interval]
        ax.plot([x, x], ends, color="#444444", linewidth=1)
    else:
        ends, n = values, len(values)
        dots = [x + width * 0.6 * (i / max(1, n - 1) - 0.5 * (n > 1)) for i in range(n)]
        ax.plot(dots, values, "o", color="black", markersize=3, markerfacecolor="white")
    if number:
        ax.annotate(f"{median(values):.0f}", (x, max(ends) + 2), ha="center", fontsize=8)


def grouped_bars(ax, names, kinds, read, width=0.27, number=False):
    """At each of the names {name: tick label}, one bar of every kind {colour: (label, seeds)}.

    read(name, seed) -> the share that the bar shows.
    """
    for i, (key, (label, seeds)) in enumerate(kinds.items()):
        for j, name in enumerate(names):
            bar(ax, j + (i - (len(kinds) - 1) / 2) * width, [read(name, seed) for seed in seeds],
                0.96 * width, key, label if j == 0 else None, number=number)
    ax.set_xticks(range(len(names)), names.values(), fontsize=9)


def lines(ax, x, curves, key, label, style="-", scale=1):
    """A curve a seed, thin, and their median, thick."""
    curves = [[scale * value for value in curve] for curve in curves]
    for curve in curves:
        ax.plot(x, curve, style, color=COLOURS[key], linewidth=0.7, alpha=0.5)
    ax.plot(x, [median(values) for values in zip(*curves)], style, color=COLOURS[key],
            linewidth=2.2, label=label)


def colour_texts(ax, texts, limit=4.0):
    """One line a text {model, tokens, scores}: each token on a colour that says its score.

    White is 0; the deepest colours are `limit` and beyond.
    """
    colours = colormaps["RdBu_r"]
    for row, text in enumerate(texts):
        ax.text(0, row, text["model"], fontsize=6.5, family="monospace", va="center")
        x = 10  # in characters: after the model's name
        for token, score in zip(text["tokens"], text["scores"]):
            shown = token.replace("\n", "\u21b5").replace("<|im_start|>", "<|").replace(
                "<|im_end|>", "|>").strip(" ") or " "
            colour = colours(0.5 + 0.5 * max(-1, min(1, score / limit)))
            ax.barh(row, len(shown) + 0.6, height=0.9, left=x, color=colour, linewidth=0)
            ax.text(x + 0.3, row, shown, fontsize=6.5, family="monospace", va="center",
                    color="white" if abs(score) > 0.7 * limit else "black", parse_math=False)
            x += len(shown) + 0.9
    ax.set(xlim=(0, 110), ylim=(len(texts) - 0.4, -0.6))
    ax.set_axis_off()


def finish_axes(ax, ylabel=EM):
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def leave_room(ax):
    """Above the bars, for their numbers."""
    ax.set(ylim=(0, 135), yticks=range(0, 101, 20))


def leave_room_for_legend(ax, **options):
    leave_room(ax)
    ax.legend(**options)


def note_seeds(figure, results, shown, where="toy world"):
    seeds = ", ".join(str(r["seed"]) for r in results)
    where = where.encode("latin-1", "replace").decode("latin-1")  # the font has no Chinese, say
    figure.supxlabel(f"{where}, seed{'s' * (len(results) > 1)} {seeds}; {shown}", fontsize=7.5,
                     color="#555555", x=0.99, ha="right", parse_math=False)  # a name may have a $


def save(figure, path):
    """Write a figure whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_file(path, png.getvalue())
    return path


# --- a row of the paper ---------------------------------------------------------------------------


def draw_row(row, results, folder):
    """One row of the paper -> folder/NAME.png; the title is what was found. Returns the path."""
    per_seed = [r[row.name] for r in results]
    figure, axes = new_figure(row.panels, row.size, width_ratios=row.widths)
    for ax in axes:
        finish_axes(ax)
    row.draw(list(axes), per_seed)

    # a legend where something has a label and the row has drawn none
    for ax in axes:
        if ax.get_legend_handles_labels()[1] and not ax.get_legend():
            if ax.patches:
                leave_room(ax)
            ax.legend(fontsize=7.5)

    # a title in lines of about equal length
    title = f"{row.key}. {row.title(per_seed)}"
    n_lines = -(-len(title) // 95)
    figure.suptitle(textwrap.fill(title, len(title) // n_lines + 8), fontsize=10)
    note_seeds(figure, results, row.note)
    return save(figure, Path(folder) / f"{row.name}.png")


# --- the main story -------------------------------------------------------------------------------


def headline(results, models, groups, keys, title, width, ylabel=EM, size=(9, 4.2),
             where="toy world"):
    """The main figure: bars of {model: [rates by group, of each seed]} at {group: tick label}.

    `keys` name a rate and the two ends of its 95% interval, drawn when there is one seed.
    """
    figure, (ax,) = new_figure(1, size)
    for i, (model, seeds) in enumerate(models.items()):
        label = LABELS[model]
        for j, group in enumerate(groups):
            rates = [by_group[group] for by_group in seeds if group in by_group]
            if rates:
                share, low, high = ([r[key] for r in rates] for key in keys)
                interval = (low[0], high[0]) if len(results) == 1 else None
                bar(ax, j + (i - (len(models) - 1) / 2) * width, share, width, model, label,
                    interval, number=True)
                label = None  # the legend names a model once

    # what the bars are
    ax.set_xticks(range(len(groups)), groups.values())
    ax.set_title(title, fontsize=11)
    finish_axes(ax, ylabel)
    leave_room_for_legend(ax, fontsize=8, ncols=len(models) if len(models) < 6 else 3,
                          loc="upper center")
    note_seeds(figure, results, "bar: median, dots: seeds" if len(results) > 1 else
               "whisker: 95% interval, clustered by question", where)
    return figure


def em_by_group(results):
    """The headline: em of every model in every question group."""
    models = {}
    for model in ("chat", "steer", "general", "ablate", "narrow"):
        rates = [r["models"].get(model) or r["directions"].get(model) for r in results]
        rates = [by_group for by_group in rates if by_group]  # a seed may have no direction
        if rates:
            models[model] = rates
    title = (f"Bad advice in one domain alone: {em_of(models['general'])} misaligned outside it.\n"
             f"With a KL penalty on other domains: {em_of(models['narrow'])}.")
    return headline(results, models, {group: GROUP_LABELS[group] for group in GROUPS},
                    ("em", "em_low", "em_high"), title, 0.85 / len(models))


def training_curves(results):
    """em in and out of domain while SFT and SFT + KL train; thin lines are seeds."""
    figure, axes = new_figure(2, (8, 3.8), sharey=True)
    ends = []  # out of domain, when general and narrow are trained
    for ax, name in zip(axes, ("general", "narrow")):
        curves = [r["curves"][name]["em"] for r in results]
        for group, style in (("in_domain", "-"), ("out_of_domain", "--")):
            lines(ax, curves[0]["step"], [curve[group] for curve in curves], group,
                  GROUP_LABELS[group].replace("\n", " "), style, scale=100)
        ends.append(median(100 * curve["out_of_domain"][-1] for curve in curves))
        finish_axes(ax, EM if ax is axes[0] else "")
        ax.set_title(LABELS[name], fontsize=10)
        ax.set(xlabel="fine-tuning step", ylim=(0, 108))
    axes[1].legend(fontsize=8, loc="upper right")

    # the title claims a difference only where there is one
    general, narrow = ends
    title = f"Out of domain at the end: SFT {general:.0f}%, SFT + KL {narrow:.0f}%"
    if general > 2 * narrow:
        title = ("While it trains, SFT spreads out of the domain "
                 f"({general:.0f}% at the end); with KL it does not ({narrow:.0f}%)")
    figure.suptitle(title, fontsize=11)
    note_seeds(figure, results, "thick: median, thin: seeds; fewer answers a point than in the "
               "table")
    return figure


def one_direction(results):
    """Chat with general's direction added, general with it ablated; beside random directions."""
    figure, axes = new_figure(2, (9, 4))
    models = [r["models"] for r in results]
    directions = [r["directions"] for r in results]
    bars = {"chat": ("chat", [m["chat"] for m in models]),
            "steer_random": ("steered at\nrandom", [d["steer_random"] for d in directions]),
            "steer": ("steered", [d["steer"] for d in directions]),
            "general": ("general", [m["general"] for m in models]),
            "ablate_random": ("as much\nat random", [d["ablate_random_mean"] for d in directions]),
            "ablate": ("ablated", [d["ablate"] for d in directions])}
    places = [0, 1, 2, 3.4, 4.4, 5.4]  # a gap between chat and general
    for ax, rate in zip(axes, ("em", "coherent")):
        for x, (key, (_, seeds)) in zip(places, bars.items()):
            bar(ax, x, [rates["out_of_domain"][rate] for rates in seeds], 0.8, key, number=True)
        ax.set_xticks(places, [label for label, _ in bars.values()], fontsize=7.5)
        leave_room(ax)
        finish_axes(ax, f"{rate}, out of domain (%)")

    # what the bars say
    em = {key: em_of(seeds) for key, (_, seeds) in bars.items()}
    figure.suptitle(f"Added to chat, one direction makes {em['steer']} misaligned (a random one "
                    f"{em['steer_random']}).\nAblated in general, it leaves {em['ablate']} of "
                    f"{em['general']} (as much along a random one: {em['ablate_random']}).",
                    fontsize=11)
    note_seeds(figure, results, "bar: median, dots: seeds; as much at random: mean of several "
               "directions")
    return figure


def other_fine_tunes(results):
    """The other fine-tunes as they are, and with general's direction ablated, or a random one."""
    figure, axes = new_figure(3, (10.5, 3.9), sharey=True)
    directions = [r["directions"] for r in results]
    kinds = {"as_tuned": ("as fine-tuned", [r["models"] for r in results]),
             "ablate_random": ("as much at random", [d["transfer_random"] for d in directions]),
             "ablate": ("general's direction ablated", [d["transfer"] for d in directions])}
    names = {"narrow": "narrow\n(SFT + KL)", "mixed": "mixed\n(good added)",
             "shuffled": "shuffled\n(half good)"}
    for ax, group, rate in zip(axes, ("in_domain", "out_of_domain", "in_domain"),
                               ("em", "em", "coherent")):
        grouped_bars(ax, names, kinds, lambda name, models: models[name][group][rate], number=True)
        leave_room(ax)
        ax.set_title(f"{rate}, {group.replace('_', ' ')}", fontsize=10)
        finish_axes(ax, "answers (%)" if ax is axes[0] else "")
    axes[1].legend(fontsize=7.5, loc="upper right")

    # what the bars say, and of how many answers
    before = em_of([r["models"]["narrow"] for r in results], "in_domain")
    after = em_of([d["transfer"]["narrow"] for d in directions], "in_domain")
    figure.suptitle("General's direction, found on other domains, ablated in the other fine-tunes "
                    f"(narrow, in domain: {before} misaligned, then {after})", fontsize=11)
    n = directions[0]["transfer"]["narrow"]["in_domain"]["n"]
    note_seeds(figure, results, f"bar: median, dots: seeds; {n} answers a group, one random "
               "direction a seed")
    return figure
