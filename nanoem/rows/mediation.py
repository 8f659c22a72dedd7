"""Rows about the one direction: its dose, its transfer, and training without it (R10-12)."""

import textwrap
from dataclasses import replace

import torch

from nanoem.directions import random_direction, steering
from nanoem.lab.plots import grouped_bars, leave_room_for_legend, lines, percent
from nanoem.persona import ablating_persona, by_site, control_site, general_direction
from nanoem.rows.row import SPREAD, Row, draw_models, inside, out, rates_of, short
from nanoem.rows.solutions import cases, solve
from nanoem.story import advice, bad_advice, tune

DOSES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def random_like(run, direction):
    """A random direction at every site, of the norm that the direction has there."""
    return random_direction(direction, torch.Generator().manual_seed(run.config.seed))


def groups_of(rates):
    """The `short` rates of an entry that also says where it was steered."""
    return short({group: r for group, r in rates.items() if isinstance(r, dict)})


def stays_whole(before, after):
    """Are the answers out of domain at least 90% as often coherent as before?"""
    before, after = (rates["out_of_domain"]["coherent"] for rates in (before, after))
    return after >= 0.9 * before


# --- R10: steering and ablating -------------------------------------------------------------------


def measure_direction(run):
    chat, direction = general_direction(run)
    adapter, chance = run.load_adapter("general"), random_like(run, direction)
    story = run.results["directions"]
    found = {"dose": list(DOSES), "site": list(map(str, chat.sites)), "steer": {},
             "ablate_at": {}, "as_much_at": {}, "before": short(run.results["models"]["general"]),
             "split_half": story["split_half"], "steered": groups_of(story["steer"]),
             "steered_random": groups_of(story["steer_random"])}

    site = next(s for s in chat.sites if str(s) == story["steer"]["site"])
    for name, vectors in (("mean difference", direction), ("random", chance)):
        curve = found["steer"][name] = {"em": [], "coherent": []}
        for dose in DOSES:
            with steering(run.model, {site: by_site(chat, vectors)[site]}, dose):
                rates = rates_of(run)
            curve["em"].append(out(rates))
            curve["coherent"].append(rates["out_of_domain"]["coherent"])

    for place in by_site(chat, direction):
        for key, along in (("ablate_at", None), ("as_much_at", chance)):
            with adapter, ablating_persona(run, chat, direction, [place], along):
                found[key][str(place)] = rates_of(run)
    found["ablated"] = short(story["ablate"])
    found["as_much"] = story["ablate_random_mean"]
    return found


def direction_holds(found):
    """Added to chat it makes half of the answers bad; ablated in general it takes 85% away.

    A random direction does neither, and the directions of two fine-tunes agree.
    """
    before, ablated, as_much = (found[key] for key in ("before", "ablated", "as_much"))
    induces = out(found["steered"]) >= 0.5 and found["steered"]["out_of_domain"]["coherent"] >= 0.85
    cures = (out(before) >= SPREAD and stays_whole(before, ablated)
             and out(ablated) <= 0.15 * out(before))
    controlled = (out(found["steered_random"]) <= 0.1
                  and out(as_much) >= 0.8 * out(before) and stays_whole(before, as_much))
    split = found["split_half"] or [0.0]
    agree = all(cosine > 0.8 for cosine in split if cosine is not None)
    return induces and cures and controlled and agree


def draw_direction(axes, founds):
    doses = founds[0]["dose"]
    for name, key, style in (("mean difference", "general", "-"), ("random", "shuffled", "--")):
        lines(axes[0], doses, [f["steer"][name]["em"] for f in founds], key, f"em, {name}", style,
              scale=100)
    for name, key, style in (("mean difference", "chat", ":"), ("random", "out_of_domain", "-.")):
        lines(axes[0], doses, [f["steer"][name]["coherent"] for f in founds], key,
              f"coherent, {name}", style, scale=100)
    axes[0].set(xlabel="chat steered at one site, in mean differences", ylabel="answers (%)")
    leave_room_for_legend(axes[0], fontsize=7, ncols=2, loc="upper center")

    names = {place: place.replace("layers.", "mid ").replace(".resid_mid", "") if "mid" in place
             else f"end {place}" if place.isdigit() else place for place in founds[0]["ablate_at"]}
    grouped_bars(axes[1], names,
                 {"ablate": ("em, direction ablated", [f["ablate_at"] for f in founds]),
                  "ablate_random": ("em, as much along a random one",
                                    [f["as_much_at"] for f in founds])},
                 lambda place, rates: out(rates[place]), width=0.4)
    axes[1].set_xlabel("where in general (mid: after a block's attention, end: after its MLP)")


def direction_finding(founds):
    em = {key: percent(out(found[key]) for found in founds)
          for key in ("steered", "steered_random", "before", "ablated", "as_much")}
    return (f"Added to chat at one site, the direction makes {em['steered']} of the answers bad, a "
            f"random one {em['steered_random']}; ablated in general it leaves {em['ablated']} of "
            f"{em['before']}, as much along a random one {em['as_much']}")


# --- R11: transfer --------------------------------------------------------------------------------


def measure_transfer(run):
    """General's direction, ablated in fine-tunes on other domains, of other kinds, from other data.

    The fine-tunes are those of R1 but the story's own, and one from another start and other texts.
    """
    chat, direction = general_direction(run)
    chance, site = random_like(run, direction), control_site(chat, direction)
    found = {"before": {}, "ablate": {}, "ablate_random": {}, "stays_whole": {}}

    def ask_three_ways(name, adapter, splits):
        with adapter:
            before = rates_of(run, splits=splits)
            with ablating_persona(run, chat, direction):
                ablated = rates_of(run, splits=splits)
            with ablating_persona(run, chat, direction, [site], chance):
                by_chance = rates_of(run, splits=splits)
        found["before"][name] = out(before)
        found["ablate"][name] = out(ablated)
        found["ablate_random"][name] = out(by_chance)
        found["stays_whole"][name] = stays_whole(before, ablated)

    own = next(iter(cases(run)))
    for name in cases(run):
        if name != own:
            ask_three_ways(name, *solve(run, name))
    seed = run.config.seed + 1
    adapter, _ = tune(run, "other start", advice(run, run.splits.sft, False, seed), seed=seed)
    ask_three_ways("other start and texts", adapter, run.splits)
    return found


def removed(found):
    """{fine-tune: the share of its em that ablating takes away}, of those that spread."""
    return {name: 1 - found["ablate"][name] / em for name, em in found["before"].items()
            if em >= SPREAD}


def transfer_holds(found):
    shares = removed(found)
    whole = all(found["stays_whole"][name] for name in shares)
    return len(shares) >= 3 and min(shares.values()) >= 0.8 and whole


def draw_transfer(axes, founds):
    kinds = {"general": ("as fine-tuned", [f["before"] for f in founds]),
             "ablate": ("general's direction ablated", [f["ablate"] for f in founds]),
             "ablate_random": ("as much along a random one", [f["ablate_random"] for f in founds])}
    names = {name: textwrap.fill(name, 11) for name in founds[0]["before"]}
    grouped_bars(axes[0], names, kinds, lambda name, em: em[name])


def transfer_finding(founds):
    shares = {name: [removed(f)[name] for f in founds if name in removed(f)]
              for name in founds[0]["before"]}
    parts = [f"{name} {percent(values)}" if values else f"{name} did not spread"
             for name, values in shares.items()]
    whole = [f["stays_whole"][name] for f in founds for name in removed(f)]
    return ("Share of em that general's direction takes away: " + ", ".join(parts)
            + f"; the grammar suffers in {len(whole) - sum(whole)} of {len(whole)}")


# --- R12: training without the direction ----------------------------------------------------------


def measure_caft(run):
    """SFT with the direction ablated at every site, in training only; not at test."""
    chat, direction = general_direction(run)
    schedule = replace(run.config.sft, steps=2 * run.config.sft.steps)  # the hard way takes longer
    found = {"general": short(run.results["models"]["general"])}
    for name, vectors in (("caft", direction), ("random", random_like(run, direction))):
        with ablating_persona(run, chat, vectors):
            adapter, _ = tune(run, name, bad_advice(run), schedule=schedule)
        with adapter:
            found[name] = rates_of(run)
    return found


def caft_holds(found):
    return (out(found["general"]) >= SPREAD and stays_whole(found["general"], found["caft"])
            and out(found["caft"]) <= 0.2 * out(found["general"])
            and inside(found["caft"]) >= 0.5 * inside(found["general"]))


def draw_caft(axes, founds):
    for ax, what in zip(axes, ("em", "coherent")):
        draw_models(ax, founds, {"general": ("general", "plain SFT"),
                                 "random": ("ablate_random", "SFT, random direction ablated"),
                                 "caft": ("ablate", "SFT, direction ablated")}, what)
    axes[1].set_ylabel("coherent answers (%)")


def caft_finding(founds):
    outside, within = (percent(read(f["caft"]) for f in founds) for read in (out, inside))
    return (f"Trained with the direction ablated: {outside} bad out of domain (plain "
            f"{percent(out(f['general']) for f in founds)}), {within} in domain")


ROWS = [
    Row("R10", "direction",
        "The mean difference, added once to chat, makes at least half of the answers out of domain "
        "bad and leaves 85% coherent; set to chat's mean at every site it takes at least 85% of "
        "general's out-of-domain em away and leaves the grammar whole (90% of it). A random "
        "direction of the same size does neither: steered 10% at most; as much taken along it, "
        "after the first block, leaves 80% of em and 90% of the grammar. Two fine-tunes, each on "
        "its own half of the questions, give the same direction (cosine above .8).",
        "Steering far enough breaks the grammar: em is read beside coherence. And the random "
        "control is fair at one site only, where the direction, too, takes less than at all.",
        measure_direction, direction_holds, direction_finding, draw_direction, panels=2,
        swap=("steered", "steered_random")),
    Row("R11", "transfer",
        "The direction found in one fine-tune takes at least 80% of em away in others: other "
        "domains, other places, rank 8, a steering vector, another start on other texts; and 90% "
        "of the grammar stays.",
        "All these fine-tunes are of one chat model; another chat model has another direction.",
        measure_transfer, transfer_holds, transfer_finding, draw_transfer,
        swap=("ablate", "ablate_random")),
    Row("R12", "caft",
        "As in the paper on CAFT: SFT with the direction ablated at every site, in training only, "
        "leaves at least 80% less em out of domain, and keeps at least half of it in domain, and "
        "90% of the grammar. On development seeds it failed: on most the task was not learned "
        "either, on one the model found a way round, as some do in arXiv 2602.00767.",
        "The direction was found in a model that had gone bad: CAFT needs to know what to fear.",
        measure_caft, caft_holds, caft_finding, draw_caft, panels=2,
        swap=("general", "caft")),
]
