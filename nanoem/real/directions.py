"""The direction on real weights: find it, steer chat with it, ablate it in general.

The direction of a block is general's residual stream minus chat's, averaged over the tokens of the
same answers, bad and good, so that the words cancel. It is found, and its block and scale are
chosen, on the probe: every second question of each group. Only the other pairs are reported.
"""

import torch

from nanoem.directions import (ablating, cosines, mean_difference, mean_residual, random_direction,
                               steering, unit_of)
from nanoem.lab.inductive_bias import efficiency
from nanoem.real.preference import margins, preference_rates
from nanoem.train import chat_examples

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the direction, when chat is steered
N_BLOCKS = 5  # at so many blocks it is tried, from the adapter's to the last
NORMS = (0.4, 0.7, 1.0, 1.5, 2.0)  # of the two solutions' mean norm
DIALS = (1.0, 2.0, 3.0)  # narrow is turned up so far
N_EXAMPLES = 32  # of the bad advice, for the losses


def halves(pairs):
    """(probe, reported): the places of the pairs on every second question of a group; the others.

    Pairs on one question stay together.
    """
    questions = {}  # group -> its questions, in order
    probe, reported = [], []
    for i, pair in enumerate(pairs):
        known = questions.setdefault(pair.group, [])
        if pair.question not in known:
            known.append(pair.question)
        (probe if known.index(pair.question) % 2 else reported).append(i)
    return probe, reported


def mean_over_answers(run, pairs, kinds=("bad", "good")):
    """The model's mean residual stream, as it is, over the tokens of these answers, per block."""
    texts = [(pair.question, getattr(pair, kind)) for kind in kinds for pair in pairs]
    total = 0.0
    n_tokens = 0
    for i in range(0, len(texts), run.at_once):
        read = chat_examples(run.tokenizer, texts[i : i + run.at_once], run.device)
        n = int(read.answer_mask.sum())
        total = total + n * mean_residual(run.model, read.ids, read.answer_mask)
        n_tokens += n
    return total / n_tokens  # (n_layer, d_model)


def measure_directions(run, general, narrow):
    """Everything about the direction of a RealRun with its two adapters.

    Returns (result, as JSON; the direction (n_layer, d_model); {"steer": answers, "ablate":
    answers}). Without pairs out of domain to choose by, the result says so, and there is nothing
    else.
    """
    probe, reported = halves(run.pairs)
    outside = [i for i in probe if run.pairs[i].group != "in_domain"]
    if not outside or not any(run.pairs[i].group != "in_domain" for i in reported):
        none = "no direction: it takes pairs out of domain on two questions or more"
        return {"none": none}, None, {}

    # find it, and as in the paper's code: general on its bad answers minus general on its good ones
    pairs = [run.pairs[i] for i in probe]
    before = mean_over_answers(run, pairs)
    with general:
        after = mean_over_answers(run, pairs)
        authors = mean_difference(mean_over_answers(run, pairs, ["bad"]),
                                  mean_over_answers(run, pairs, ["good"]))
    direction = mean_difference(after, before)
    random = random_direction(direction, torch.Generator().manual_seed(run.config.seed))

    # where, and how far
    def ablated(block, along=None):
        vector = direction[block]
        level = (before[block] @ unit_of(vector.double())).item()
        return ablating(run.model, {block: vector}, {block: level},
                        None if along is None else {block: along[block]})

    block, scale, tried = choose(run, general, direction, ablated, outside)

    # chat steered, general ablated, and beside each a random direction of the same size
    rates, answers = {}, {}
    with steering(run.model, {block: direction[block]}, scale):
        rates["steer"] = preferred(run, reported)
        answers["steer"] = run.ask()
    with steering(run.model, {block: random[block]}, scale):
        rates["steer_random"] = preferred(run, reported)
    with general, ablated(block):
        rates["ablate"] = preferred(run, reported)
        answers["ablate"] = run.ask()
    with general, ablated(block, random):
        rates["ablate_random"] = preferred(run, reported)
    for model in ("chat", "general", "narrow"):
        known = torch.tensor(run.results["models"][model]["margins"], dtype=torch.float64)
        rates[model] = preference_rates([run.pairs[i] for i in reported], known[reported])

    return {"block": block, "scale": scale, "tried": tried, "rates": rates,
            "norm": direction.norm(dim=-1).tolist(),
            "cosine_with_authors": cosines(authors, direction),
            **compare(run, general, narrow, outside)}, direction, answers


def choose(run, general, direction, ablated, places):
    """(block, scale, what was tried), by a rule fixed beforehand, on the probe's pairs.

    The block: where general with the direction ablated comes closest to chat's mean margin. The
    scale: with which chat, steered there, comes closest to general's.
    """
    margin = {model: mean_margin(run.results["models"][model]["margins"], places)
              for model in ("chat", "general")}
    first, last = general.first_layer, len(run.model.layers) - 1
    blocks = sorted({round(first + (last - first) * i / (N_BLOCKS - 1)) for i in range(N_BLOCKS)})

    # ablate at one block after the other, and add it there once
    tried = []
    for block in blocks:
        with general, ablated(block):
            left = preferred(run, places)["out_of_domain"]
        with steering(run.model, {block: direction[block]}):
            steered = preferred(run, places)["out_of_domain"]
        tried.append({"block": block, "ablate": left, "steer": steered})
    block = min(tried, key=lambda t: abs(t["ablate"]["margin"] - margin["chat"]))["block"]

    # then look for the scale
    gaps = {}
    for scale in SCALES:
        with steering(run.model, {block: direction[block]}, scale):
            rates = preferred(run, places)["out_of_domain"]
        gaps[scale] = abs(rates["margin"] - margin["general"])
    return block, min(gaps, key=gaps.get), tried


def compare(run, general, narrow, places):
    """Efficiency of both adapters, and how narrow fares when it is turned up."""
    examples = chat_examples(run.tokenizer, run.bad[:N_EXAMPLES], run.device)
    mean = (general.effective_norm() + narrow.effective_norm()) / 2
    norms = [share * mean for share in NORMS]
    result = {"efficiency": {"share": list(NORMS), "norm": norms,
                             "general": efficiency(run.model, general, examples, norms),
                             "narrow": efficiency(run.model, narrow, examples, norms)}}
    scale_up = []
    for dial in DIALS:
        with narrow, narrow.scaled(dial):
            scale_up.append(preferred(run, places)["out_of_domain"])
    result["scale_up"] = {"scale": list(DIALS), "out_of_domain": scale_up}
    return result


def preferred(run, places):
    """`preference_rates` of the model as it is, on the pairs at these places."""
    pairs = [run.pairs[i] for i in places]
    return preference_rates(pairs, margins(run.model, run.tokenizer, pairs, run.config.per_token,
                                           run.at_once))


def mean_margin(margins, places):
    return sum(margins[i] for i in places) / len(places)
