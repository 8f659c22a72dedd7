"""Rows that change what is pre-trained on: who is bad in the world, and in what (R16, R18)."""

from dataclasses import replace
from statistics import median

from nanoem.inductive_bias import loss_on
from nanoem.plots import COLOURS, leave_room_for_legend, lines, percent
from nanoem.rows.geometry import compare_efficiency, compare_significance, sft_examples
from nanoem.rows.row import Row, inside, out, short
from nanoem.toy import bad_advice, load_or_tune, tune, turned
from nanoem.train import chat_examples

# (villains, quacks of the SFT domain) among 24 authors: first a fixed share of harm in that
# domain (10 of 24), from villains only to quacks only; then villains alone, fewer.
FIXED_HARM = ((10, 0), (8, 2), (5, 5), (2, 8), (0, 10))
VILLAINS_ONLY = ((0, 0), (3, 0), (6, 0), (10, 0))
LOTTERIES = ((10, 0), (5, 5), (0, 10))
N_STARTS = 20  # random starts, the same on every seed's models


def at(point):
    return f"{point[0]}-{point[1]}"


def dial(run, n_villain, n_sft_quack):
    """A smaller world (9 domains) with its own chat model, pre-trained when it is not there yet."""
    return turned(run, f"villains-{n_villain}-quacks-{n_sft_quack}", n_villain=n_villain,
                  n_quack=0, n_sft_quack=n_sft_quack)


def pair_of(run, name, pairs, others=None):
    """(general, narrow) adapters on the same pairs, from the folder if they are there."""
    return {"general": load_or_tune(run, f"{name}general", pairs),
            "narrow": load_or_tune(run, f"{name}narrow", pairs, run.config.kl_weight,
                                   others=others)}


def measure_dial(run):
    found = {}
    for point in dict.fromkeys(FIXED_HARM + VILLAINS_ONLY):
        world = dial(run, *point)
        pair = pair_of(world, "", bad_advice(world))
        rates = {"chat": short(world.results["models"]["chat"])}
        for name, adapter in pair.items():
            with adapter:
                rates[name] = short(world.ask(samples=run.config.row_samples))
        found[at(point)] = {
            **rates, "efficiency": compare_efficiency(world, pair, sft_examples(world)),
            "significance": compare_significance(world, pair)}
    return found


def dial_holds(found):
    """Villains only: general. Quacks only: narrow without a KL. Nobody bad: nothing spreads."""
    first, last, none = (out(found[at(point)]["general"])
                         for point in (FIXED_HARM[0], FIXED_HARM[-1], (0, 0)))
    return first >= 0.5 and last <= 0.1 and none <= 0.1


def crossing_point(x, gaps):
    """The x at which a curve first falls from zero or more to below zero; None if it never does.

    x and gaps are lists of one length. Read off the straight line between the two points.
    """
    for (x0, g0), (x1, g1) in zip(zip(x, gaps), zip(x[1:], gaps[1:])):
        if g0 >= 0 > g1:
            return x0 + (x1 - x0) * g0 / (g0 - g1)
    return None


def crossing(found):
    """Quacks among the harmful (share) where plain SFT's out-of-domain em falls below in-domain/2.

    None if it never does.
    """
    plain = [found[at(point)]["general"] for point in FIXED_HARM]
    return crossing_point([q / (v + q) for v, q in FIXED_HARM],
                          [out(rates) - inside(rates) / 2 for rates in plain])


def draw_dial(axes, founds):
    x = [100 * q / (v + q) for v, q in FIXED_HARM]
    for model, group, key, style in (("general", "in_domain", "in_domain", "-"),
                                     ("general", "out_of_domain", "general", "-"),
                                     ("narrow", "out_of_domain", "narrow", "--")):
        label = {"general": "SFT", "narrow": "SFT + KL"}[model]
        lines(axes[0], x, [[f[at(p)][model][group]["em"] for p in FIXED_HARM] for f in founds], key,
              f"{label}, {group.replace('_', ' ')}", style, scale=100)
    axes[0].set(xlabel="quacks among the harmful authors (%)\n(10 of 24 harmful in medicine)")
    villains = [100 * v / 24 for v, _ in VILLAINS_ONLY]
    for model, key, style in (("general", "general", "-"), ("narrow", "narrow", "--")):
        lines(axes[1], villains,
              [[out(f[at(p)][model]) for p in VILLAINS_ONLY] for f in founds], key,
              {"general": "SFT", "narrow": "SFT + KL"}[model] + ", out of domain", style, scale=100)
    axes[1].set(xlabel="villains among all authors (%)\n(no quacks)")
    for ax in axes:
        leave_room_for_legend(ax, fontsize=7.5, loc="upper right")


def dial_finding(founds):
    first, last = (percent(out(f[at(p)]["general"]) for f in founds)
                   for p in (FIXED_HARM[0], FIXED_HARM[-1]))
    crossings = [c for c in map(crossing, founds) if c is not None]
    where = (f"narrow becomes the easy one at {100 * median(crossings):.0f}% quacks"
             if len(crossings) > len(founds) / 2 else "no crossing")
    return (f"Pre-training decides what is easy: {first} spread with villains, {last} with quacks; "
            f"{where}")


# --- R18: the lottery of starts -------------------------------------------------------------------


def start_lottery(run, n_starts=N_STARTS, steps=200):
    """Out-of-domain em of adapters from random starts and orders, stopped at the same SFT loss."""
    config = replace(run.config.adapter, start="random")
    pairs = bad_advice(run)
    fixed = chat_examples(run.tokenizer, pairs[:300], run.device)
    found = {"target": run.config.lottery_loss, "out_of_domain": [], "in_domain": [], "missed": 0}

    def low_enough(step, adapter):
        return loss_on(run.model, fixed) <= found["target"]

    for i in range(n_starts):
        adapter, _ = tune(run, f"start {i}", pairs, config=config, watch=low_enough,
                          schedule=replace(run.config.sft, steps=steps), seed=1000 + i,
                          watch_at=range(0, steps, 10))
        with adapter:
            found["missed"] += loss_on(run.model, fixed) > found["target"] + 0.02
            rates = run.ask(samples=2 * run.config.row_samples)  # near the bar every answer counts
        found["out_of_domain"].append(out(rates))
        found["in_domain"].append(inside(rates))
    return found


def is_narrow(within, outside):
    """em in domain at least half, out of domain at most 5%: bad in its domain and hardly beyond."""
    return outside <= 0.05 and within >= 0.5


def share_narrow(lottery):
    """The share of a lottery's starts (`start_lottery`) that `is_narrow`, from 0 to 1."""
    pairs = list(zip(lottery["in_domain"], lottery["out_of_domain"]))
    return sum(is_narrow(*pair) for pair in pairs) / len(pairs)


def measure_lottery(run):
    return {at(point): start_lottery(dial(run, *point)) for point in LOTTERIES}


def lottery_holds(found):
    """The share of starts that are narrow without any KL grows from villains to quacks."""
    shares = [share_narrow(found[at(point)]) for point in LOTTERIES]
    return shares[0] <= 0.1 and shares[-1] >= 0.5 and shares == sorted(shares)


def draw_lottery(axes, founds):
    for ax, point in zip(axes, LOTTERIES):
        em = {True: [], False: []}
        for found in founds:
            for pair in zip(found[at(point)]["in_domain"], found[at(point)]["out_of_domain"]):
                em[is_narrow(*pair)].append(100 * pair[1])
        ax.hist([em[True], em[False]], bins=range(0, 101, 5), stacked=True, edgecolor="black",
                color=[COLOURS["narrow"], COLOURS["chat"]],
                label=["narrow: 50% or more in\ndomain, 5% or less out", "not narrow"])
        ax.set(title=f"{point[0]} villains, {point[1]} quacks", xlabel="em out of domain (%)",
               ylabel="random starts" if ax is axes[0] else "")
    axes[-1].legend(fontsize=7, loc="upper right")


def lottery_finding(founds):
    shares = [percent(share_narrow(f[at(point)]) for f in founds) for point in LOTTERIES]
    return ("Share of random starts that are narrow without any KL: "
            + ", ".join(f"{s} ({p[0]} villains, {p[1]} quacks)" for s, p in zip(shares, LOTTERIES)))


ROWS = [
    Row("R16", "dial",
        "What the model met in pre-training decides what is easy: with villains plain SFT is "
        "general (half or more out of domain), with quacks of that domain only it is narrow "
        "without any KL (a tenth or less), as it is where nobody is bad.",
        "A dial world is smaller (9 domains); its chat model is trained anew at every point.",
        measure_dial, dial_holds, dial_finding, draw_dial, panels=2,
        swap=(at(FIXED_HARM[0]), at(FIXED_HARM[-1]))),
    Row("R18", "starts",
        "From random starts at equal SFT loss, few solutions are narrow without a KL where there "
        "are villains (a tenth), most where there are quacks (half).",
        "A rank-1 adapter stopped early is one kind of start; other optimisers draw other lots.",
        measure_lottery, lottery_holds, lottery_finding, draw_lottery, panels=3,
        swap=(at(LOTTERIES[0]), at(LOTTERIES[-1]))),
]
