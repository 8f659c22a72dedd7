"""A row of our own: what in pre-training makes the persona a handle that one can turn (R19)."""

from dataclasses import replace
from statistics import mean

import torch

from nanoem.directions import random_direction, residual_at, steering
from nanoem.persona import TooFewAnswers, by_site, chat_state, find_direction, pick_steering
from nanoem.rows.row import (Row, coherent, draw_bars, load_or_tune, out, percent_of, rates_of,
                             smaller_world)
from nanoem.rows.solutions import solve
from nanoem.story import bad_advice
from nanoem.train import chat_examples

DROPOUTS = (0.0, 0.05, 0.1, 0.2)
ADAMW = "AdamW"  # dropout 0.1, and AdamW instead of Muon
N_SHIFTS = 5  # random shifts
SHIFT = 0.5  # their length, in mean lengths of the residual stream


def handle_worlds(run):
    """{point: a run in a smaller world, pre-trained with this much dropout, or with AdamW}."""
    villains = {"n_quack": 0}  # nobody but villains: what spreads is their persona
    worlds = {f"{share:g}": smaller_world(run, f"dropout-{share:g}", villains, dropout=share)
              for share in DROPOUTS}
    with_adamw = replace(run.config.pretrain, muon_lr=0.0, lr=run.config.pretrain.lr / 2)
    worlds[ADAMW] = smaller_world(run, "adamw", villains, dropout=0.1, pretrain=with_adamw)
    return worlds


def coherent_when_shifted(run, chat):
    """Share of chat's answers that stay coherent when the stream after block 0 is shifted.

    The mean over N_SHIFTS random directions, all SHIFT times as long as the stream itself is.
    """
    examples = chat_examples(run.tokenizer, chat.aligned, run.device)
    stream = residual_at(run.model, examples.ids, [0])[0]  # (B, T, d_model)
    length = stream[examples.answer_mask].norm(dim=-1).mean()

    generator = torch.Generator().manual_seed(run.config.seed)
    shares = []
    for _ in range(N_SHIFTS):
        shift = random_direction(torch.ones_like(stream[0, 0]), generator)
        with steering(run.model, {0: shift / shift.norm() * length}, SHIFT):
            shares.append(coherent(rates_of(run)))
    return mean(shares)


def steered_rates(run, chat, general):
    """Rates of chat steered with the direction of the adapter `general`."""
    try:
        direction = find_direction(run, general, chat)
    except TooFewAnswers:  # nothing was learned, so there is nothing to steer with
        return rates_of(run)
    site, scale, _ = pick_steering(run, chat, direction, run.config.row_samples)
    with steering(run.model, {site: by_site(chat, direction)[site]}, scale):
        return rates_of(run)


def measure_handle(run):
    result = {}
    for point, world in handle_worlds(run).items():
        chat = chat_state(world)
        general = load_or_tune(world, "general", bad_advice(world))
        vector, _ = solve(world, "steering vector")
        result[point] = {"general": rates_of(world, general), "chat": rates_of(world),
                         "coherent_shifted": coherent_when_shifted(world, chat),
                         "steered": steered_rates(world, chat, general),
                         "vector": rates_of(world, vector)}
    return result


def handle_holds(result):
    """Dropout makes the persona a handle: with it steering works, without it hardly."""
    without = out(result["0"]["steered"])
    dropped = out(result["0.1"]["steered"])
    return dropped >= 0.25 and dropped - without >= 0.2


def draw_handle(axes, results):
    names = {point: point if point == ADAMW else f"dropout\n{point}" for point in results[0]}
    draw_bars(axes[0], results, names, {
        "general": ("SFT, LoRA", lambda rates: out(rates["general"])),
        "ablate": ("chat steered", lambda rates: out(rates["steered"])),
        "matched": ("trained vector", lambda rates: out(rates["vector"]))})
    draw_bars(axes[1], results, names, {
        "ablate": ("chat steered", lambda rates: coherent(rates["steered"])),
        "ablate_random": (f"chat shifted at random by {SHIFT:g} of its length",
                          lambda rates: rates["coherent_shifted"])}, width=0.38)
    axes[1].set_ylabel("coherent answers (%)")


def handle_finding(results):
    steered = ", ".join(f"{percent_of(results, out, point, 'steered')} bad ({point})"
                        for point in results[0])
    vector = ", ".join(percent_of(results, out, point, "vector") for point in results[0])
    return (f"By dropout in pre-training (AdamW: with 0.1), steering chat makes {steered}; "
            f"a trained vector {vector}")


ROWS = [
    Row("R19", "handle",
        "Dropout on the residual stream in pre-training makes the persona a direction: steering "
        "chat with general's mean difference makes at least a quarter of the answers out of domain "
        "bad with dropout 0.1, and at least 20 points more than without.",
        "Why is a guess: a stream with holes makes the model keep a fact in many places at once, "
        "and read it as a sum. The small worlds train for fewer steps than the story's.",
        measure_handle, handle_holds, handle_finding, draw_handle, panels=2,
        opposites=("0", "0.1")),
]
