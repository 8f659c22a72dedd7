"""Rows along training: where narrow drifts without its KL, where the gradient points (R7, R9)."""

from dataclasses import replace
from statistics import mean, median

import torch

from nanoem.directions import cosine
from nanoem.lab.plots import lines, percent
from nanoem.rows.geometry import draw_pair, sft_examples
from nanoem.lab.inductive_bias import flat_B, gradient_B, local_cosine, principal_plane
from nanoem.rows.row import (Row, columns, draw_in_and_out, inside, of_seeds, out, percent_of,
                             rates_of)
from nanoem.story import bad_advice, kl_advice, tune
from nanoem.train import chat_examples, loss_terms, train_adapter

STEPS, LR = 300, 2  # without the KL; its learning rate in narrow's own: narrow lies far off
EVERY, EVERY_GRADIENT = 30, 6  # steps between two looks


def path_to(run, name, kl_weight):
    """B along the training of a story's adapter: trained again, for only its end was kept."""
    path = []
    steps = (run.config.sft_kl if kl_weight else run.config.sft).steps
    tune(run, name, bad_advice(run), kl_weight, watch_at=range(0, steps + 1, EVERY),
         watch=lambda step, adapter: path.append(flat_B(adapter)))
    return path


def go_on(run, adapter, name, kl_weight=0.0, **watched):
    """Train an attached adapter on, as narrow was trained, but for STEPS steps at LR."""
    sft = sft_examples(run, n=None)
    kl = chat_examples(run.tokenizer, kl_advice(run), run.device)
    schedule = replace(run.config.sft_kl, steps=STEPS, lr=LR * run.config.sft_kl.lr)
    train_adapter(adapter, loss_terms(run.model, adapter, sft, kl, kl_weight), schedule,
                  torch.Generator().manual_seed(run.config.seed), name, **watched)


def measure_reversion(run):
    """Go on from narrow with the same training but without the KL; where does it drift?

    A twin goes on with the KL: what more training does by itself.
    """
    general = flat_B(run.load_adapter("general"))
    narrow = flat_B(run.load_adapter("narrow"))
    paths = {"general": path_to(run, "general", 0.0),
             "narrow": path_to(run, "narrow", run.config.kl_weight), "reversion": []}

    # go on without the KL, and look every few steps
    adapter = run.load_adapter("narrow")
    points = []

    def watch(step):
        rates = rates_of(run)
        B = flat_B(adapter)
        paths["reversion"].append(B)
        points.append({"step": step, "in_domain_em": inside(rates), "out_of_domain_em": out(rates),
                       "cos_general": cosine(B, general), "cos_narrow": cosine(B, narrow)})

    with adapter:
        go_on(run, adapter, "reversion", watch=watch, watch_at=range(0, STEPS + 1, EVERY))

    # the twin, with the KL
    with run.load_adapter("narrow") as twin:
        go_on(run, twin, "twin", run.config.kl_weight)
        twin_rates = rates_of(run)

    # the plane in which all three paths spread most
    every_B = torch.cat([torch.stack(path) for path in paths.values()])
    coordinates, share = principal_plane(every_B, 3)
    parts = coordinates[:, :2].split([len(path) for path in paths.values()])
    return {**columns(points), "twin": twin_rates, "variance_of_3": share,
            "general_em": out(run.results["models"]["general"]),
            "narrow_em": points[0]["out_of_domain_em"],
            "reverted_em": points[-1]["out_of_domain_em"],
            "plane": {name: part.tolist() for name, part in zip(paths, parts)}}


def draw_reversion(axes, results):
    # em along the steps
    steps = results[0]["step"]
    draw_in_and_out(axes[0], steps, of_seeds(results, "in_domain_em"),
                    of_seeds(results, "out_of_domain_em"))
    axes[0].set(xlabel="steps without KL, from narrow")

    # the three paths of the first seed
    plane = results[0]["plane"]
    for name, style in (("general", "-"), ("narrow", "--"), ("reversion", ":")):
        x, y = zip(*plane[name])
        lines(axes[1], x, [y], "ablate" if name == "reversion" else name, name, style)
        label = "where each ends" if name == "reversion" else None
        axes[1].plot(x[-1], y[-1], "o", color="black", markersize=4, label=label)
    axes[1].plot(*plane["general"][0], "s", color="black", markersize=4, markerfacecolor="white",
                 label="where general and narrow start")
    axes[1].set(xlabel="first principal component of B (first seed)", ylabel="second")


def reversion_finding(results):
    start = percent(of_seeds(results, "narrow_em"))
    end = percent(of_seeds(results, "reverted_em"))
    twin = percent_of(results, out, "twin")
    return (f"Without the KL, narrow drifts: out-of-domain em goes from {start} to {end} in "
            f"{results[0]['step'][-1]} steps; with it, to {twin}")


def measure_gradients(run):
    """Along plain SFT: does the gradient point to general or to narrow, and does B turn?"""
    general = flat_B(run.load_adapter("general"))
    narrow = flat_B(run.load_adapter("narrow"))
    examples = sft_examples(run, n=200)
    path = []
    points = []

    def watch(step, adapter):
        gradient = gradient_B(run.model, adapter, examples)
        B = flat_B(adapter)
        path.append(B)
        rates = run.ask(samples=max(1, run.config.row_samples // 2))
        points.append({"step": step, "out_of_domain_em": out(rates),
                       "grad_norm": gradient.norm().item(),
                       "grad_general": cosine(-gradient, general),
                       "grad_narrow": cosine(-gradient, narrow),
                       "B_general": cosine(B, general), "B_narrow": cosine(B, narrow)})

    slow = replace(run.config.sft, lr=run.config.sft.lr / 10)  # or it is over in ten steps
    tune(run, "gradients", bad_advice(run), schedule=slow, watch=watch,
         watch_at=range(0, slow.steps + 1, EVERY_GRADIENT))
    return {**columns(points), "cos_general_narrow": cosine(general, narrow),
            "local_cosine": local_cosine(torch.stack(path))}


def draw_gradients(axes, results):
    step = results[0]["step"]
    draw_pair(axes[0], step, of_seeds(results, "grad_general"), of_seeds(results, "grad_narrow"))
    axes[0].set(xlabel="SFT step", ylabel="cosine of -gradient of B with the solution's B")
    lines(axes[1], step[1:-1], of_seeds(results, "local_cosine"), "ablate", "B's local cosine")
    lines(axes[1], step, of_seeds(results, "out_of_domain_em"), "general", "em, out of domain",
          "--")
    axes[1].set(xlabel="SFT step", ylabel="cosine, or share")


def gradients_finding(results):
    general = median(map(mean, of_seeds(results, "grad_general")))
    narrow = median(map(mean, of_seeds(results, "grad_narrow")))
    between = median(of_seeds(results, "cos_general_narrow"))
    return (f"A step down the SFT gradient has cosine {general:.2f} with general and {narrow:.2f} "
            f"with narrow; the two have {between:.2f}")


ROWS = [
    Row("R7", "reversion",
        "Trained on without the KL, for 300 steps at twice the learning rate, narrow drifts to "
        "more than half of general's out-of-domain em.",
        "Any further training changes an adapter; hence the twin that goes on with the KL.",
        measure_reversion,
        lambda result: result["reverted_em"] >= result["general_em"] / 2 > result["narrow_em"],
        reversion_finding, draw_reversion, panels=2, opposites=("narrow_em", "reverted_em")),
    Row("R9", "gradients",
        "Along plain SFT the gradient of B points to general more than to narrow.",
        "general is where plain SFT ends, so its own path favours it. And at a tenth of the "
        "learning rate, as here, a hundred steps are only the beginning of that path.",
        measure_gradients,
        lambda result: all(a > b for a, b in zip(result["grad_general"], result["grad_narrow"])),
        gradients_finding, draw_gradients, panels=2, opposites=("grad_general", "grad_narrow")),
]
