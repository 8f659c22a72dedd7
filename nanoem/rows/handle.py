"""A row of our own: what in pre-training makes the persona a handle that one can turn (R19)."""

from dataclasses import replace
from statistics import mean

import torch

from nanoem.directions import random_direction, residual_at, steering
from nanoem.lab.plots import grouped_bars, percent
from nanoem.persona import TooFewAnswers, by_site, chat_state, find_direction, pick_steering
from nanoem.rows.row import Row, load_or_tune, out, rates_of, short, turned
from nanoem.rows.solutions import other_places, vector_schedule
from nanoem.story import bad_advice, tune
from nanoem.train import chat_examples

DROPOUTS = (0.0, 0.05, 0.1, 0.2)
ADAMW = "AdamW"  # dropout 0.1, and AdamW instead of Muon
N_SHIFTS = 5  # random shifts
SHIFT = 0.5  # their length, in mean lengths of the residual stream


def handle_worlds(run):
    """{point: a run in a smaller world, pre-trained with this much dropout, or with AdamW}."""
    villains = {"n_quack": 0}  # nobody but villains: what spreads is their persona
    worlds = {f"{share:g}": turned(run, f"dropout-{share:g}", villains, dropout=share)
              for share in DROPOUTS}
    with_adamw = replace(run.config.pretrain, muon_lr=0.0, lr=run.config.pretrain.lr / 2)
    worlds[ADAMW] = turned(run, "adamw", villains, dropout=0.1, pretrain=with_adamw)
    return worlds


def shifted(run, chat):
    """Share of chat's answers that stay coherent when the stream after block 0 is shifted.

    The mean over N_SHIFTS random directions, all SHIFT times as long as the stream itself is.
    """
    read = chat_examples(run.tokenizer, chat.aligned, run.device)
    stream, = residual_at(run.model, read.ids, [0])  # (B, T, d_model)
    length = stream[read.answer_mask].norm(dim=-1).mean()
    generator, shares = torch.Generator().manual_seed(run.config.seed), []
    for _ in range(N_SHIFTS):
        shift = random_direction(torch.ones_like(stream[0, 0]), generator)
        with steering(run.model, {0: shift / shift.norm() * length}, SHIFT):
            shares.append(rates_of(run)["out_of_domain"]["coherent"])
    return mean(shares)


def measure_handle(run):
    found = {}
    for point, world in handle_worlds(run).items():
        chat = chat_state(world)
        general = load_or_tune(world, "general", bad_advice(world))
        with general:
            rates = {"general": rates_of(world)}
        rates["chat"], rates["coherent_shifted"] = rates_of(world), shifted(world, chat)
        try:
            direction = find_direction(world, general, chat)
            site, scale, _ = pick_steering(world, chat, direction, run.config.row_samples)
            with steering(world.model, {site: by_site(chat, direction)[site]}, scale):
                rates["steered"] = rates_of(world)
        except TooFewAnswers:  # nothing was learned, so there is nothing to steer with
            rates["steered"] = short(rates["chat"])
        vector = other_places(world)["steering vector"]
        adapter, _ = tune(world, "vector", bad_advice(world), adapter=vector,
                          schedule=vector_schedule(world.config.sft))
        with adapter:
            rates["vector"] = rates_of(world)
        found[point] = rates
    return found


def handle_holds(found):
    """Dropout makes the persona a handle: with it steering works, without it hardly."""
    without, with_it = (out(found[point]["steered"]) for point in ("0", "0.1"))
    return with_it >= 0.25 and with_it - without >= 0.2


def draw_handle(axes, founds):
    names = {point: point if point == ADAMW else f"dropout\n{point}" for point in founds[0]}

    def bars(read):
        return [{point: read(found[point]) for point in names} for found in founds]

    def share(point, shares):
        return shares[point]

    grouped_bars(axes[0], names, {
        "general": ("SFT, LoRA", bars(lambda rates: out(rates["general"]))),
        "ablate": ("chat steered", bars(lambda rates: out(rates["steered"]))),
        "matched": ("trained vector", bars(lambda rates: out(rates["vector"])))}, share)
    grouped_bars(axes[1], names, {
        "ablate": ("chat steered",
                   bars(lambda rates: rates["steered"]["out_of_domain"]["coherent"])),
        "ablate_random": (f"chat shifted at random by {SHIFT:g} of its length",
                          bars(lambda rates: rates["coherent_shifted"]))}, share, width=0.38)
    axes[1].set_ylabel("coherent answers (%)")


def handle_finding(founds):
    steered = {point: percent(out(f[point]["steered"]) for f in founds) for point in founds[0]}
    vector = {point: percent(out(f[point]["vector"]) for f in founds) for point in founds[0]}
    return ("Dropout makes the persona a handle: steering chat makes "
            + ", ".join(f"{steered[point]} bad ({point})" for point in steered)
            + "; a trained vector " + ", ".join(vector.values()))


ROWS = [
    Row("R19", "handle",
        "Dropout on the residual stream in pre-training makes the persona a direction: steering "
        "chat with general's mean difference makes at least a quarter of the answers out of domain "
        "bad with dropout 0.1, and at least 20 points more than without.",
        "Why is a guess: a stream with holes makes the model keep a fact in many places at once, "
        "and read it as a sum. The small worlds train for fewer steps than the story's.",
        measure_handle, handle_holds, handle_finding, draw_handle, panels=2, swap=("0", "0.1")),
]
