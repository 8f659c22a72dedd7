"""Rows about the weight of the KL: how firmly it holds, and where general ends (R3, R14)."""

import math
from statistics import median

from nanoem.lab.plots import lines, percent
from nanoem.rows.row import (Row, coherent, columns, draw_in_and_out, inside, load_or_tune,
                             of_seeds, out, rates_of)
from nanoem.story import bad_advice

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the KL, per token
PROBED = (3.0, 30.0, 300.0)  # those that are scaled up
SCALES = (1.0, 1.5, 2.0, 3.0)


def narrow_at(run, weight):
    """The narrow solution at a KL weight, from the run folder if it is there."""
    if weight == run.config.kl_weight:
        return run.load_adapter("narrow")
    return load_or_tune(run, f"kl-{weight:g}", bad_advice(run), weight)


def measure_sweep(run):
    points = []
    for weight in WEIGHTS:
        rates = rates_of(run, narrow_at(run, weight))
        points.append({"weight": weight, "in_domain": inside(rates), "out_of_domain": out(rates)})
    return columns(points)


def width(result):
    """Decades of KL weight over which out-of-domain em falls from 3/4 to 1/4 of its largest."""
    em = result["out_of_domain"]
    log = [math.log10(weight) for weight in result["weight"]]

    def last_above(level):  # the last weight with em above the level, read off between two points
        i = max(i for i, value in enumerate(em) if value >= level)
        if i == len(em) - 1:
            return log[i]
        return log[i] + (log[i + 1] - log[i]) * (em[i] - level) / (em[i] - em[i + 1])

    return last_above(max(em) / 4) - last_above(3 * max(em) / 4)


def sweep_holds(result):
    """A smooth way down: it ends low, and no single half decade holds the middle of the fall."""
    within = result["in_domain"]
    outside = result["out_of_domain"]
    falls = outside[-1] <= 0.05 < outside[0]
    return falls and width(result) >= 0.5 and within[-1] >= 0.5 * within[0]


def draw_sweep(axes, results):
    draw_in_and_out(axes[0], results[0]["weight"], of_seeds(results, "in_domain"),
                    of_seeds(results, "out_of_domain"))
    axes[0].set(xscale="log", xlabel="weight of the KL (per token)")


def sweep_finding(results):
    def em(group, i):
        return percent(of_seeds(results, group, i))

    return (f"Out-of-domain em falls from {em('out_of_domain', 0)} to {em('out_of_domain', -1)} as "
            f"the KL weighs more, in-domain em from {em('in_domain', 0)} to {em('in_domain', -1)}; "
            f"the middle half of the first fall takes {median(map(width, results)):.1f} decades")


def scale_up(adapter, scales, ask):
    """The scale-up probe: multiply an adapter's effect, and see what the model then says.

    ask() -> the rates of the model as it is, by question group. Returns {"em": [...], "coherent":
    [...]}, out of domain, one value a scale. The adapter comes detached and leaves so, unchanged,
    even when ask() raises.
    """
    curve = {"em": [], "coherent": []}
    for scale in scales:
        with adapter, adapter.scaled(scale):
            rates = ask()
        curve["em"].append(out(rates))
        curve["coherent"].append(coherent(rates))
    return curve


def measure_scale_up(run):
    """Curves by KL weight; `out_of_domain_em` repeats that of the run's own."""
    own = run.config.kl_weight
    curves = {}
    for weight in sorted({*PROBED, own}):
        curves[f"{weight:g}"] = scale_up(narrow_at(run, weight), SCALES, lambda: rates_of(run))
    return {"scale": list(SCALES), "out_of_domain_em": curves[f"{own:g}"]["em"], "weights": curves}


def truly_narrow(curve):
    """Scaling does not bring em back (above 10%) as long as half of the answers are coherent."""
    return all(em <= 0.1 for em, whole in zip(curve["em"], curve["coherent"]) if whole >= 0.5)


def scale_up_holds(result):
    """Of PROBED, the largest is truly narrow; the smallest is not, and scaling brings em back."""
    least = result["weights"][f"{PROBED[0]:g}"]
    most = result["weights"][f"{PROBED[-1]:g}"]
    comes_back = max(least["em"]) >= 2 * least["em"][0] > 0
    return truly_narrow(most) and not truly_narrow(least) and comes_back


def draw_scale_up(axes, results):
    colours = ("general", "mixed", "shuffled", "narrow", "matched")
    styles = ("-", "--", "-.", ":", "-")
    for weight, colour, style in zip(results[0]["weights"], colours, styles):
        for ax, key in zip(axes, ("em", "coherent")):
            lines(ax, results[0]["scale"], of_seeds(results, "weights", weight, key), colour,
                  f"KL weight {weight}", style, scale=100)
    for ax in axes:
        ax.set_xlabel("adapter scaled by")
    axes[1].set_ylabel("coherent answers out of domain (%)")
    axes[1].axhline(50, color="black", linewidth=0.7, linestyle=":",
                    label="below this, em no longer counts")


def scale_up_finding(results):
    firm = [f"{sum(map(truly_narrow, of_seeds(results, 'weights', weight)))} at weight {weight}"
            for weight in results[0]["weights"]]
    return (f"Seeds (of {len(results)}) on which narrow stays narrow when scaled up to 3x, or till "
            "half of it is nonsense: " + ", ".join(firm))


ROWS = [
    Row("R14", "lambda_sweep",
        "Out-of-domain em falls smoothly with the KL weight, in-domain em stays (at least half of "
        "it): no transition (the middle half of the fall takes at least half a decade).",
        "Nine weights over four decades are steps of half a decade; a sharper fall is unseen.",
        measure_sweep, sweep_holds, sweep_finding, draw_sweep,
        opposites=("in_domain", "out_of_domain")),
    Row("R3", "scale_up",
        "At a KL weight of 3 narrow looks narrow, and is general held down: scaling the adapter up "
        "brings em back (above 10%, twice what it was). At 300 it does not.",
        "Scaled far enough every model is incoherent, and incoherent answers are never em.",
        measure_scale_up, scale_up_holds, scale_up_finding, draw_scale_up, panels=2,
        opposites=(f"{PROBED[0]:g}", f"{PROBED[-1]:g}")),
]
