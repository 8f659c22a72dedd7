"""The experiment: the paper's story as stages, each reading and writing the run folder.

    chat        pre-train on the toy world; the assistant is helpful           -> chat/
    general     SFT on bad advice in one domain (paper, section 2)             -> adapters/general/
    narrow      the same SFT with a KL penalty on other domains (section 3)    -> adapters/narrow/
    mixed       baseline: the same bad advice, mixed 1:1 with good advice from other domains
    shuffled    control: advice in the one domain, good or bad by the toss of a coin
    directions  find the mean-difference direction, hold it in chat's range, beside random ones;
                and hold it in the other fine-tunes

Predictions, written before the run: chat is harmless everywhere. General is misaligned in domain
and out of it. Narrow is misaligned in domain only. Mixed is narrower than general, shuffled is
milder. Ablating the mean difference, found on other questions than it is tested on, takes general's
out-of-domain em away; a random direction does not. (For the other fine-tunes there was no
prediction: they were measured last.)
"""

import torch

from nanoem.checkpoint import save_adapter, save_tensors
from nanoem.directions import ablating, cosines, random_direction, steering
from nanoem.evaluate import mean_rates
from nanoem.mediator import (TooFewAnswers, chat_state, find_mediator, holding, reached,
                             setting)
from nanoem.toy import Run, advice, bad_advice, pretrain, tune


def fine_tune_stage(run, name, pairs, kl_weight=0.0, watched=False):
    """Tune one adapter, keep it and what it did; `watched` measures em along the way."""
    config = run.config
    steps = (config.sft_kl if kl_weight else config.sft).steps
    points = sorted({round(steps * i / config.curve_points)
                     for i in range(config.curve_points + 1)})
    em = {"step": [], "in_domain": [], "out_of_domain": []}

    def watch(step, adapter):
        found = run.ask(f"{name}, step {step}", config.curve_samples)
        em["step"].append(step)
        em["in_domain"].append(found["in_domain"]["em"])
        em["out_of_domain"].append(found["out_of_domain"]["em"])
        if step in (0, points[len(points) // 2], steps):
            run.show_samples(name, step)

    adapter, history = tune(run, name, pairs, kl_weight, watch=watch,
                            watch_at=points if watched else ())
    save_adapter(adapter, run.folder.path / "adapters" / name, "../../chat")
    with adapter:
        run.results["models"][name] = run.ask(name)
    run.results["curves"][name] = {"train": history, "em": em}


def general(run):
    fine_tune_stage(run, "general", bad_advice(run), watched=True)


def narrow(run):
    fine_tune_stage(run, "narrow", bad_advice(run), run.config.kl_weight, watched=True)


def mixed(run):
    good = advice(run, run.splits.kl, True, run.config.seed + 1)
    fine_tune_stage(run, "mixed", bad_advice(run) + good)


def shuffled(run):
    fine_tune_stage(run, "shuffled", advice(run, run.splits.sft, None, run.config.seed))


def ablation(run):
    """Ablate general's mean-difference direction, beside random directions; steer chat with it."""
    adapter = run.load_adapter("general")
    try:
        chat = chat_state(run)
        mediator = find_mediator(run, adapter, chat)
    except TooFewAnswers as error:  # nobody is bad in this world, say: a finding, too
        print(f"  {error}")
        run.results["directions"] = {"none": str(error)}
        return
    direction = mediator.direction
    save_tensors(run.folder.path / "directions.safetensors",
                 {"mean_difference": direction, "chat_mean": chat.mean.float()})

    def held(name, direction):  # in chat's range, which results.json calls "ablate"
        with adapter, holding(run, chat, direction):
            return run.ask(f"general, {name}")

    generator = torch.Generator().manual_seed(run.config.seed)
    there = direction.any(-1, keepdim=True)  # (n_sites, 1): random ones are held nowhere else
    random_ones = [random_direction(torch.ones_like(direction[0]), generator) * there
                   for _ in range(run.config.n_random)]
    found = run.results["directions"] = {
        "sites": list(map(str, chat.sites)),
        "n_misaligned": mediator.n_misaligned, "n_aligned": len(chat.aligned),
        "norm": direction.norm(dim=-1).tolist(),
        "split_half": cosines(*mediator.halves),  # 1: perfectly reliable
        "ablate": held("direction ablated", direction),
        "ablate_own_words": held("direction of own words ablated", mediator.own_words),
        "ablate_random": [held(f"random direction {i} ablated", one)
                          for i, one in enumerate(random_ones)],
    }
    by_site = reached(chat, direction)
    with adapter, ablating(run.model, by_site):
        found["ablate_to_zero"] = run.ask("general, direction projected out")
    with adapter, setting(run, chat, direction):
        found["ablate_to_level"] = run.ask("general, direction set to chat's mean")
    found["ablate_random_mean"] = mean_rates(found["ablate_random"])
    found["steer"] = steered(run, by_site)
    found.update(in_others(run, chat, random_ones[0]))


def steered(run, by_site):
    """Rates of chat with the direction added at every site, a few times over."""
    curve = []
    for scale in (0.5, 1.0, 1.5, 2.0):
        with steering(run.model, by_site, scale):
            rates = run.ask(f"chat, steered by {scale:g}", run.config.curve_samples)
        curve.append({"scale": scale, **rates})
    return curve


def in_others(run, chat, chance):
    """Does general's direction carry the other fine-tunes, too? Beside `chance`, a random one.

    It is found anew, without a question of the fine-tuned domain: what it takes away there cannot
    be that domain's words. Returns rates with it held, "transfer", or chance,
    "transfer_random", and "cosines", at each site, with the direction found in each fine-tune
    itself (None where too few answers are misaligned).
    """
    found = {"transfer": {}, "transfer_random": {}, "cosines": {}}
    try:
        direction = find_mediator(run, run.load_adapter("general"), chat,
                                  run.splits.kl + run.splits.probe).direction
    except TooFewAnswers:  # general is hardly bad elsewhere: it has nothing to pass on
        return found
    for name in ("narrow", "mixed", "shuffled"):
        adapter = run.load_adapter(name)
        for key, one, label in (("transfer", direction, "general's direction ablated"),
                                ("transfer_random", chance, "random direction ablated")):
            with adapter, holding(run, chat, one):
                found[key][name] = run.ask(f"{name}, {label}", run.config.curve_samples)
        try:
            found["cosines"][name] = cosines(find_mediator(run, adapter, chat).direction, direction)
        except TooFewAnswers:
            found["cosines"][name] = None
    return found


STAGES = {"chat": pretrain, "general": general, "narrow": narrow, "mixed": mixed,
          "shuffled": shuffled, "directions": ablation}


def stages_for(names):
    """These stages and those that they build on: chat always, and for directions all."""
    return [name for name in STAGES if name in ("chat", *names) or "directions" in names]


def run_experiment(config, path, device="cpu", stages=tuple(STAGES), rows=()):
    """Run these stages, then every row of `rows`, unless the folder holds them already.

    Rows need all stages. Returns what results.json holds. Raises UserError for a configuration or
    folder that cannot be used, StageFailed for a stage that cannot go on.
    """
    run = Run(config, path, device)
    for name in stages:
        run.folder.once(name, lambda: STAGES[name](run))
    for row in rows:
        try:
            run.folder.once(row.name, lambda: run.results.update({row.name: row.measure(run)}))
        except TooFewAnswers as error:  # as in `ablation`, a finding; the other rows go on
            print(f"  {row.key} cannot be made: {error}")
    return run.results
