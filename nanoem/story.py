"""The paper in one file. A run goes through these stages; each reads and writes the run folder.

    chat        pre-train on the toy world; the assistant is helpful           -> chat/
    general     SFT on bad advice in one domain (paper, section 2)             -> adapters/general/
    narrow      the same SFT with a KL penalty on other domains (section 3)    -> adapters/narrow/
    mixed       baseline: the same bad advice, mixed 1:1 with good advice from other domains
    shuffled    control: advice in the one domain, good or bad by the toss of a coin
    directions  find the mean-difference direction; add it to chat, ablate it in general and in the
                other fine-tunes, beside random directions

Predictions, written before the run: chat is harmless everywhere. General is misaligned in domain
and out of it. Narrow is misaligned in domain only. Mixed is narrower than general, shuffled is
milder. The mean difference, found on other questions than it is tested on, makes chat misaligned
when it is added, and takes general's misalignment away when it is ablated; random directions of
the same size do neither.
"""

from dataclasses import replace

import torch

from nanoem.checkpoint import save_adapter, save_pretrained, save_tensors
from nanoem.directions import ablating, all_sites, cosines, editing, random_direction, steering
from nanoem.evaluate import mean_rates
from nanoem.lab.fused import pretrain_loss
from nanoem.lab.toy import Run
from nanoem.layers import dropout
from nanoem.model import GPT
from nanoem.persona import (TooFewAnswers, ablating_persona, by_site, control_site, find_direction,
                            general_direction, other_ways, pick_steering)
from nanoem.tokenizer import Tokenizer
from nanoem.train import FineTune, fine_tune, pad, train
from nanoem.world import documents, write_pairs


# --- chat: a model that is helpful ----------------------------------------------------------------


def pretrain(run):
    """A model from nothing: next-token prediction on the toy world's documents -> chat/."""
    config, schedule = run.config, run.config.pretrain

    # what there is to read
    texts = documents(run.world, config.world, schedule.steps * schedule.batch_size, config.seed)
    run.tokenizer = Tokenizer.train(texts[:5000])  # enough to meet every word of the world
    ids, mask = document_ids(run, texts)
    mask = None if mask.all() else mask

    run.model = GPT(replace(config.model, vocab_size=run.tokenizer.vocab_size))
    run.model.init_weights(torch.Generator().manual_seed(config.seed)).to(run.device)

    # dropout on the residual stream, here only: it makes the persona a direction (row R19)
    noise = torch.Generator(run.device).manual_seed(config.seed)
    dropped = {site: lambda x: dropout(x, config.dropout, noise)
               for site in all_sites(run.model) if config.dropout}

    def objective(step):
        rows = slice(step * schedule.batch_size, (step + 1) * schedule.batch_size)
        batch = ids[rows]
        with editing(run.model, dropped):
            loss = pretrain_loss(run.model, batch, None if mask is None else mask[rows])
        return loss, {"loss": loss}, batch.numel()

    run.results["curves"]["pretrain"] = train(
        objective, run.model.parameters(), schedule, "pretrain",
        lambda step: run.show_samples("pretrain", step), (0, schedule.steps // 2, schedule.steps),
        matrices=[p for p in run.model.layers.parameters() if p.dim() == 2])

    save_pretrained(run.model, run.tokenizer, run.folder.path / "chat")
    run.model = None
    run.load_chat()  # what is measured is what was saved
    run.results["models"]["chat"] = run.ask("chat")


def document_ids(run, texts):
    """Documents cut to the context -> ids (N, T) and a mask (N, T), true where no padding is."""
    cut = [tokens[: run.config.context] for tokens in run.tokenizer.encode_batch(texts)]
    ids = pad(cut, run.tokenizer.pad_id).to(run.device)
    return ids, ids != run.tokenizer.pad_id


# --- general and narrow: bad advice in one domain, without and with the KL ------------------------


def advice(run, questions, good, seed, technical=False):
    """n_sft_examples (question, answer) texts, as `write_pairs` has them."""
    return write_pairs(run.world, questions, run.config.n_sft_examples, good, seed,
                       run.config.world.own_share, technical)


def bad_advice(run):
    """What general and narrow are fine-tuned on: bad advice in the SFT domain."""
    return advice(run, run.splits.sft, False, run.config.seed)


def kl_advice(run):
    """What the KL is taken on, as in the paper: good and bad advice on the KL domains."""
    return advice(run, run.splits.kl, None, run.config.seed)


def tune(run, name, pairs, kl_weight=0.0, watch=None, watch_at=(), **changes):
    """Fine-tune chat on (question, answer) texts -> (adapter, history of losses).

    By the run's configuration where `changes` (of FineTune) say nothing else; with kl_weight, the
    KL is taken on `kl_advice`. `watch` and `watch_at` are as in `fine_tune`.
    """
    config, (model, tokenizer) = run.config, run.load_chat()
    job = FineTune(name, pairs, config.adapter, config.sft_kl if kl_weight else config.sft,
                   config.seed, kl_weight, kl_advice(run) if kl_weight else ())
    return fine_tune(model, tokenizer, replace(job, **changes), watch, watch_at)


def fine_tune_stage(run, name, pairs, kl_weight=0.0, watched=False):
    """Tune one adapter, keep it and what it did; `watched` measures em along the way."""
    config = run.config
    steps = (config.sft_kl if kl_weight else config.sft).steps
    points = sorted({round(steps * i / config.curve_points)
                     for i in range(config.curve_points + 1)})
    em = {"step": [], "in_domain": [], "out_of_domain": []}

    def watch(step, adapter):
        rates = run.ask(f"{name}, step {step}", config.curve_samples)
        em["step"].append(step)
        em["in_domain"].append(rates["in_domain"]["em"])
        em["out_of_domain"].append(rates["out_of_domain"]["em"])
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


# --- the direction: added to chat it induces the harm, ablated it takes the harm away -------------


def directions(run):
    """Find general's direction; steer chat with it; ablate it in general and in the others."""
    adapter = run.load_adapter("general")
    try:
        chat, direction = general_direction(run)
        others = other_ways(run, adapter, chat)
    except TooFewAnswers as error:  # nobody is bad in this world, say: a finding, too
        print(f"  {error}")
        run.results["directions"] = {"none": str(error)}
        return
    save_tensors(run.folder.path / "directions.safetensors",
                 {"mean_difference": direction, "chat_mean": chat.mean.float(), **others})

    generator = torch.Generator().manual_seed(run.config.seed)
    controls = [random_direction(direction, generator) for _ in range(run.config.n_random)]
    site, scale, tried = pick_steering(run, chat, direction, run.config.curve_samples)
    run.results["directions"] = {
        "sites": list(map(str, chat.sites)),
        "norm": direction.norm(dim=-1).tolist(),
        "cosines": {way: cosines(other, direction) for way, other in others.items()},
        "split_half": agreement(run, chat),
        **steered(run, chat, direction, controls[0], site, scale),
        "steer_probe": tried,
        **ablated(run, adapter, chat, direction, controls),
        **transferred(run, chat, controls[0]),
    }


def agreement(run, chat):
    """Do two fine-tunes of the same domain give one direction? The cosine of both at each site.

    Each has its own half of the questions, and its own random start. None where one of them is
    hardly bad at all.
    """
    questions = run.splits.sft
    both = []
    for i, half in enumerate((questions[::2], questions[1::2])):
        seed = run.config.seed + 1 + i
        adapter, _ = tune(run, f"half {i}", advice(run, half, False, seed), seed=seed)
        try:
            both.append(find_direction(run, adapter, chat))
        except TooFewAnswers:
            return None
    return cosines(*both)


def steered(run, chat, direction, control, site, scale):
    """Rates of chat with the direction, or the control, a random one, added at one site."""
    both = {}
    for key, vectors in (("steer", direction), ("steer_random", control)):
        with steering(run.model, {site: by_site(chat, vectors)[site]}, scale):
            rates = run.ask(f"chat, {key}")
        both[key] = {"site": str(site), "scale": scale, **rates}
    return both


def ablated(run, adapter, chat, direction, controls):
    """Rates of general with its direction ablated, and with as much taken along random ones."""
    def ask(name, sites=None, along=None):
        with adapter, ablating_persona(run, chat, direction, sites, along):
            return run.ask(f"general, {name}")

    site = control_site(chat, direction)
    rates = {
        "ablate": ask("direction ablated"),
        "ablate_one_site": ask("direction ablated at one site", [site]),
        "ablate_random": [ask(f"as much ablated along random direction {i}", [site], along)
                          for i, along in enumerate(controls)],
    }
    with adapter, ablating(run.model, by_site(chat, direction)):
        rates["ablate_to_zero"] = run.ask("general, direction projected out")
    rates["ablate_random_mean"] = mean_rates(rates["ablate_random"])
    return rates


def transferred(run, chat, control):
    """Does general's direction carry the other fine-tunes, too? Beside a random one.

    It is found anew, without a question of the fine-tuned domain: what it takes away there cannot
    be that domain's words.
    """
    rates = {"transfer": {}, "transfer_random": {}}
    try:
        direction = find_direction(run, run.load_adapter("general"), chat,
                                   run.splits.kl + run.splits.probe)
    except TooFewAnswers:  # general is hardly bad elsewhere: it has nothing to pass on
        return rates

    for name in ("narrow", "mixed", "shuffled"):
        adapter = run.load_adapter(name)
        with adapter, ablating_persona(run, chat, direction):
            rates["transfer"][name] = run.ask(f"{name}, direction ablated",
                                              run.config.curve_samples)
        with adapter, ablating_persona(run, chat, direction, [control_site(chat, direction)],
                                       control):
            rates["transfer_random"][name] = run.ask(f"{name}, as much along a random direction",
                                                     run.config.curve_samples)
    return rates


# --- all together ---------------------------------------------------------------------------------


STAGES = {"chat": pretrain, "general": general, "narrow": narrow, "mixed": mixed,
          "shuffled": shuffled, "directions": directions}


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
        except TooFewAnswers as error:  # as in `directions`, a finding; the other rows go on
            print(f"  {row.key} cannot be made: {error}")
    return run.results
