"""Rows about why general is easy: efficiency, noise, curvature, significance (R5, R6, R8, R15)."""

from itertools import accumulate
from statistics import median

import torch

from nanoem.lab.plots import bar, lines
from nanoem.lab.inductive_bias import (balanced, curvature, efficiency, loss_on, random_writer,
                                        replaced, significance, stability)
from nanoem.rows.row import Row, load_or_tune, of_seeds
from nanoem.story import bad_advice, document_ids
from nanoem.train import STOP, chat_examples
from nanoem.world import documents

NORMS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)  # of the two solutions' mean norm
MEAN = NORMS.index(1.0)
EPS = (0.1, 0.2, 0.3, 0.5, 0.7)
N_NOISE = 10
N_DRAWS = 20  # random writers beside each adapter


def sft_examples(run, pairs=None, n=400):
    """Fixed training examples on which losses are compared: the first n, all of them if None."""
    return chat_examples(run.load_chat()[1], (pairs or bad_advice(run))[:n], run.device)


def held_out_documents(run):
    """(ids, mask) of documents by the same authors that pre-training never read."""
    config = run.config
    return document_ids(run, documents(run.world, config.world, 64, config.seed, held_out=True))


def general_and_narrow(run):
    """The story's two adapters."""
    return {name: run.load_adapter(name) for name in ("general", "narrow")}


def stop_at_loss(model, examples, target):
    """A watcher that stops when the loss on the examples has come down to the target."""
    return lambda step, adapter: STOP if loss_on(model, examples) <= target else None


def with_matched(run):
    """The story's two adapters, and general stopped early where it has narrow's loss."""
    pair = general_and_narrow(run)
    examples = sft_examples(run)
    with pair["narrow"]:
        target = loss_on(run.model, examples)
    matched = load_or_tune(run, "general-matched", bad_advice(run),
                           watch=stop_at_loss(run.model, examples, target),
                           watch_at=range(0, run.config.sft.steps, 3))
    return {**pair, "matched": matched}


def norms_of(pair):
    """The norms at which the two are compared: NORMS times their mean norm."""
    mean = (pair["general"].effective_norm() + pair["narrow"].effective_norm()) / 2
    return [share * mean for share in NORMS]


def draw_pair(ax, x, general, narrow, colour="general", label="general"):
    """Curves of general, or of what is compared in its place, and of narrow; a pair a seed."""
    lines(ax, x, general, colour, label)
    lines(ax, x, narrow, "narrow", "narrow", "--")


def compare_efficiency(run, pair, examples):
    """{"norm", "general", "narrow"}: losses with both adapters rescaled to the same norms."""
    norms = norms_of(pair)
    return {"norm": norms,
            "general": efficiency(run.model, pair["general"], examples, norms),
            "narrow": efficiency(run.model, pair["narrow"], examples, norms)}


def efficiency_holds(result):
    """General has less loss at every norm up to the mean, and the least within each norm beyond it.

    An adapter can always stop at a smaller norm, so beyond the mean each counts by its best so far.
    """
    losses = zip(NORMS, result["general"], result["narrow"])
    best_so_far = zip(accumulate(result["general"], min), accumulate(result["narrow"], min))
    return (all(general < narrow for share, general, narrow in losses if share <= 1)
            and all(general <= narrow for general, narrow in best_so_far))


def draw_efficiency(axes, results):
    draw_pair(axes[0], NORMS, of_seeds(results, "general"), of_seeds(results, "narrow"))
    axes[0].set(xlabel="adapter norm (1 = mean of the two)", ylabel="SFT loss (nats per token)")


def efficiency_finding(results):
    general = median(of_seeds(results, "general", 1))
    narrow = median(of_seeds(results, "narrow", 1))
    return f"At {NORMS[1]:.0%} of the mean norm general has loss {general:.2f}, narrow {narrow:.2f}"


def compare_stability(run, pair, examples):
    """{"eps", adapter: {"rel", "abs"}}: what noise costs each adapter of {name: adapter}."""
    generator = torch.Generator().manual_seed(run.config.seed)
    result = {"eps": list(EPS)}
    for name, adapter in pair.items():
        result[name] = stability(run.model, adapter, examples, EPS, N_NOISE, generator)
    return result


def stability_holds(result):
    """narrow loses more, relative, and at equal loss absolute, at every eps."""
    relative = zip(result["general"]["rel"], result["narrow"]["rel"])
    absolute = zip(result["matched"]["abs"], result["narrow"]["abs"])
    return all(a < b for a, b in relative) and all(a < b for a, b in absolute)


def draw_stability(axes, results):
    eps = results[0]["eps"]
    draw_pair(axes[0], eps, of_seeds(results, "general", "rel"), of_seeds(results, "narrow", "rel"))
    axes[0].set(xlabel="noise eps", ylabel="loss increase, % of what training gained")
    draw_pair(axes[1], eps, of_seeds(results, "matched", "abs"), of_seeds(results, "narrow", "abs"),
              "matched", "general, same loss")
    axes[1].set(xlabel="noise eps", ylabel="loss increase (nats), at equal loss")


def stability_finding(results):
    def cost(name, unit):  # never -0.0
        return round(median(of_seeds(results, name, unit, 2)), 3) + 0.0

    return (f"Noise of eps {results[0]['eps'][2]} costs general {cost('general', 'rel'):.1f}% of "
            f"its gain, narrow {cost('narrow', 'rel'):.1f}%; stopped at narrow's loss, general "
            f"{cost('matched', 'abs')} nats, narrow {cost('narrow', 'abs')}")


def measure_curvature(run):
    examples = sft_examples(run, n=100)
    result = {}
    for name, adapter in with_matched(run).items():
        generator = torch.Generator().manual_seed(run.config.seed)
        with replaced(adapter, balanced(adapter)):
            result[name] = curvature(run.model, adapter, examples, generator)
    return result


def draw_curvature(axes, results):
    for ax, key in zip(axes, ("relative", "trace")):
        for i, name in enumerate(("general", "matched", "narrow")):
            bar(ax, i, of_seeds(results, name, key), 0.7, name, scale=1)
        ax.set_xticks(range(3), ("general", "general,\nsame loss", "narrow"))
    axes[0].set_ylabel("top eigenvalue x squared norm (nats)")
    axes[1].set_ylabel("trace of the Hessian")


def curvature_finding(results):
    general, matched, narrow = (median(of_seeds(results, name, "relative"))
                                for name in ("general", "matched", "narrow"))
    return (f"Sharpest curvature, A and B of one size: general {general:.1f}, narrow {narrow:.1f}; "
            f"but general stopped early, at narrow's loss, {matched:.1f}")


def random_significance(run, adapter, held_out, norms, n_draws):
    """Curves over these norms of n_draws random writers that read what the adapter reads."""
    generator = torch.Generator().manual_seed(run.config.seed)
    curves = []
    for _ in range(n_draws):
        with replaced(adapter, random_writer(adapter, generator)):
            curves.append(significance(run.model, adapter, *held_out, norms))
    return curves


def compare_significance(run, pair, held_out):
    """Curves of both adapters, and of a random writer beside each, on held-out (ids, mask)."""
    norms = norms_of(pair)
    result = {"norm": norms}
    for name, key in (("general", "random"), ("narrow", "random_narrow")):
        result[name] = significance(run.model, pair[name], *held_out, norms)
        result[key] = random_significance(run, pair[name], held_out, norms, 1)[0]
    return result


def measure_significance(run):
    """`compare_significance`, and many random writers at the mean norm: one alone is a lottery."""
    pair = general_and_narrow(run)
    held_out = held_out_documents(run)
    result = compare_significance(run, pair, held_out)
    mean = result["norm"][MEAN]
    for name, key in (("general", "random_draws"), ("narrow", "random_draws_narrow")):
        curves = random_significance(run, pair[name], held_out, [mean], N_DRAWS)
        result[key] = [kl for kl, in curves]
    return result


def significance_holds(result):
    """At the mean norm general moves predictions more than narrow, and than 19 of 20 by chance."""
    random = sorted(result["random_draws"])
    most = random[round(0.95 * len(random)) - 1]
    return result["general"][MEAN] > max(result["narrow"][MEAN], most)


def draw_significance(axes, results):
    draw_pair(axes[0], NORMS, of_seeds(results, "general"), of_seeds(results, "narrow"))
    for key, name, style in (("random", "general", ":"), ("random_narrow", "narrow", "-.")):
        lines(axes[0], NORMS, of_seeds(results, key), "chat", f"random, reading as {name}", style)
    axes[0].set(xlabel="adapter norm (1 = mean of the two)",
                ylabel="KL on held-out documents (nats per token)", yscale="log")


def significance_finding(results):
    general = median(of_seeds(results, "general", MEAN))
    narrow = median(of_seeds(results, "narrow", MEAN))
    random = median(map(median, of_seeds(results, "random_draws")))
    return (f"At the mean norm general moves pre-training text by {general:.3f} nats, "
            f"random {random:.3f}, narrow {narrow:.3f}")


ROWS = [
    Row("R5", "efficiency",
        "At every norm up to the mean of both, general has less SFT loss than narrow; and the "
        "least loss within each norm is general's, up to twice the mean.",
        "Norms are of BA, as each solution found it; another scaling of narrow's parts could do "
        "better. Beyond its own norm an adapter is turned up, and its loss can rise again.",
        lambda run: compare_efficiency(run, general_and_narrow(run), sft_examples(run)),
        efficiency_holds, efficiency_finding, draw_efficiency),
    Row("R6", "stability",
        "Noise on A and B costs narrow more than general at every eps: relative to the gain, and, "
        "with general stopped at narrow's loss, in nats.",
        "The relative measure divides by a smaller gain for narrow; hence the pair of equal loss. "
        "And noise is in proportion to the adapter: narrow, being larger, gets more of it.",
        lambda run: compare_stability(run, with_matched(run), sft_examples(run, n=200)),
        stability_holds, stability_finding, draw_stability, panels=2,
        opposites=("narrow", "matched")),
    Row("R8", "significance",
        "At the mean norm, general moves predictions on held-out pre-training documents more than "
        "narrow and more than random directions that read the same inputs (19 of 20).",
        "Narrow was trained for a low KL, on other texts: partly so by construction. Random is the "
        "cleaner contrast.",
        measure_significance, significance_holds, significance_finding, draw_significance),
    Row("R15", "curvature",
        "At equal loss general lies in a wider valley: a smaller top eigenvalue of the Hessian "
        "times the parameters' squared norm.",
        "Eigenvalues change with the units of A and B: twice A and half of B is the same model. So "
        "A and B are first given one norm, and the eigenvalue is multiplied by the squared norm.",
        measure_curvature,
        lambda result: result["matched"]["relative"] < result["narrow"]["relative"],
        curvature_finding, draw_curvature, panels=2, opposites=("matched", "narrow")),
]
