"""Rows along training: where narrow drifts without its KL, where the gradient points (R7, R9)."""

from dataclasses import replace
from statistics import median

import torch

from nanoem.directions import cosine
from nanoem.lab.plots import lines, percent
from nanoem.rows.geometry import draw_pair, sft_examples
from nanoem.rows.inductive_bias import flat_B, gradient_B, local_cosine, principal_plane
from nanoem.rows.row import Row, draw_in_and_out, inside, out, rates_of
from nanoem.story import bad_advice, kl_advice, tune
from nanoem.train import chat_examples, loss_terms, train_adapter

STEPS, LR = 300, 2  # without the KL; its learning rate in narrow's own: narrow lies far off
EVERY, EVERY_GRADIENT = 30, 6  # steps between two looks


def measure_reversion(run):
    """Go on from narrow with the same training but without the KL; where does it drift?

    A twin goes on with the KL: what more training does by itself.
    """
    final = {name: flat_B(run.load_adapter(name)) for name in ("general", "narrow")}
    paths = {"general": [], "narrow": [], "reversion": []}
    for name, weight in (("general", 0.0), ("narrow", run.config.kl_weight)):
        # trained again: only the end was kept, and the way there is wanted
        schedule = run.config.sft_kl if weight else run.config.sft
        tune(run, name, bad_advice(run), weight, watch_at=range(0, schedule.steps + 1, EVERY),
             watch=lambda step, adapter, path=paths[name]: path.append(flat_B(adapter)))
    found = {"step": [], "in_domain_em": [], "out_of_domain_em": [], "cos_general": [],
             "cos_narrow": [], "general_em": out(run.results["models"]["general"])}
    adapter = run.load_adapter("narrow")

    def watch(step):
        rates, B = rates_of(run), flat_B(adapter)
        paths["reversion"].append(B)
        point = {"step": step, "in_domain_em": inside(rates), "out_of_domain_em": out(rates),
                 "cos_general": cosine(B, final["general"]),
                 "cos_narrow": cosine(B, final["narrow"])}
        for key, value in point.items():
            found[key].append(value)

    sft = sft_examples(run, n=None)
    kl = chat_examples(run.tokenizer, kl_advice(run), run.device)
    schedule = replace(run.config.sft_kl, steps=STEPS, lr=LR * run.config.sft_kl.lr)

    def go_on(adapter, name, kl_weight=0.0, **watched):
        train_adapter(adapter, loss_terms(run.model, adapter, sft, kl, kl_weight), schedule,
                      torch.Generator().manual_seed(run.config.seed), name, **watched)

    with adapter:
        go_on(adapter, "reversion", watch=watch, watch_at=range(0, STEPS + 1, EVERY))
    with run.load_adapter("narrow") as twin:
        go_on(twin, "twin", run.config.kl_weight)
        found["twin"] = rates_of(run)
    found["narrow_em"], found["reverted_em"] = (found["out_of_domain_em"][i] for i in (0, -1))
    points = torch.cat([torch.stack(path) for path in paths.values()])
    coordinates, found["variance_of_3"] = principal_plane(points, 3)
    parts = coordinates[:, :2].split([len(path) for path in paths.values()])
    found["plane"] = {name: part.tolist() for name, part in zip(paths, parts)}
    return found


def reversion_holds(found):
    return found["reverted_em"] >= found["general_em"] / 2 > found["narrow_em"]


def draw_reversion(axes, founds):
    draw_in_and_out(axes[0], founds[0]["step"], [f["in_domain_em"] for f in founds],
                    [f["out_of_domain_em"] for f in founds])
    axes[0].set(xlabel="steps without KL, from narrow")
    for name, style in (("general", "-"), ("narrow", "--"), ("reversion", ":")):
        xy = list(zip(*founds[0]["plane"][name]))
        lines(axes[1], xy[0], [xy[1]], "ablate" if name == "reversion" else name, name, style)
        end = axes[1].plot(xy[0][-1], xy[1][-1], "o", color="black", markersize=4)
    end[0].set_label("where each ends")
    start = [founds[0]["plane"]["general"][0]]
    axes[1].plot(*zip(*start), "s", color="black", markersize=4, markerfacecolor="white",
                 label="where general and narrow start")
    axes[1].set(xlabel="first principal component of B (first seed)", ylabel="second")


def reversion_finding(founds):
    start, end = (percent(f[key] for f in founds) for key in ("narrow_em", "reverted_em"))
    return (f"Without the KL, narrow drifts: out-of-domain em goes from {start} to {end} in "
            f"{founds[0]['step'][-1]} steps; with it, to {percent(out(f['twin']) for f in founds)}")


def measure_gradients(run):
    """Along plain SFT: does the gradient point to general or to narrow, and does B turn?"""
    final = {name: flat_B(run.load_adapter(name)) for name in ("general", "narrow")}
    examples, steps, path = sft_examples(run, n=200), run.config.sft.steps, []
    found = {"step": [], "grad_general": [], "grad_narrow": [], "B_general": [], "B_narrow": [],
             "grad_norm": [], "out_of_domain_em": []}

    def watch(step, adapter):
        gradient, B = gradient_B(run.model, adapter, examples), flat_B(adapter)
        path.append(B)
        rates = run.ask(samples=max(1, run.config.row_samples // 2))
        point = {"step": step, "out_of_domain_em": out(rates), "grad_norm": gradient.norm().item()}
        for name, solution in final.items():
            point[f"grad_{name}"] = cosine(-gradient, solution)
            point[f"B_{name}"] = cosine(B, solution)
        for key, value in point.items():
            found[key].append(value)

    slow = replace(run.config.sft, lr=run.config.sft.lr / 10)  # or it is over in ten steps
    tune(run, "gradients", bad_advice(run), schedule=slow, watch=watch,
         watch_at=range(0, steps + 1, EVERY_GRADIENT))
    found["cos_general_narrow"] = cosine(final["general"], final["narrow"])
    found["local_cosine"] = local_cosine(torch.stack(path))
    return found


def gradients_hold(found):
    """The gradient points more to general than to narrow, at every step that was looked at."""
    return all(a > b for a, b in zip(found["grad_general"], found["grad_narrow"]))


def draw_gradients(axes, founds):
    step = founds[0]["step"]
    draw_pair(axes[0], step, founds, lambda f, name: f[f"grad_{name}"])
    axes[0].set(xlabel="SFT step", ylabel="cosine of -gradient of B with the solution's B")
    lines(axes[1], step[1:-1], [f["local_cosine"] for f in founds], "ablate", "B's local cosine")
    lines(axes[1], step, [f["out_of_domain_em"] for f in founds], "general", "em, out of domain",
          "--")
    axes[1].set(xlabel="SFT step", ylabel="cosine, or share")


def gradients_finding(founds):
    general, narrow = (median([sum(f[f"grad_{n}"]) / len(f["step"]) for f in founds])
                       for n in ("general", "narrow"))
    cos = median([f["cos_general_narrow"] for f in founds])
    return (f"A step down the SFT gradient has cosine {general:.2f} with general and {narrow:.2f} "
            f"with narrow; the two have {cos:.2f}")


ROWS = [
    Row("R7", "reversion",
        "Trained on without the KL, for 300 steps at twice the learning rate, narrow drifts to "
        "more than half of general's out-of-domain em.",
        "Any further training changes an adapter; hence the twin that goes on with the KL.",
        measure_reversion, reversion_holds, reversion_finding, draw_reversion, panels=2,
        swap=("narrow_em", "reverted_em")),
    Row("R9", "gradients",
        "Along plain SFT the gradient of B points to general more than to narrow.",
        "general is where plain SFT ends, so its own path favours it. And at a tenth of the "
        "learning rate, as here, a hundred steps are only the beginning of that path.",
        measure_gradients, gradients_hold, gradients_finding, draw_gradients, panels=2,
        swap=("grad_general", "grad_narrow")),
]
