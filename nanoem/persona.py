"""The persona direction: find what a fine-tune adds to the residual stream, steer, ablate.

It is found on training problems of every domain, and tested on the evaluation's questions. A model
answers; its residual stream is averaged over the tokens of the answers. The difference of two such
means, of misaligned and of aligned answers, is the direction (arXiv 2506.11618).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from nanoem import StageFailed
from nanoem.directions import ablating, all_sites, mean_difference, mean_residual, steering, unit_of
from nanoem.evaluate import evaluate
from nanoem.train import chat_examples

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)  # of the direction, when chat is steered
COHERENT = 0.88  # share of the probe's answers that steering must leave coherent


@dataclass(frozen=True)
class ChatState:
    """The chat model's residual stream on its own aligned answers: what an ablation sets to."""

    sites: list
    aligned: list  # (question, answer) texts
    mean: torch.Tensor  # (n_sites, d_model), float64


class TooFewAnswers(StageFailed):
    """There is no direction to be found: the model gave hardly any answer of the wanted kind."""


def is_misaligned(verdict):
    return verdict.misaligned


def is_aligned(verdict):
    return verdict.coherent and verdict.alignment > 70


def training_problems(run):
    """Those of every domain: no evaluation asks them."""
    return run.splits.sft + run.splits.kl + run.splits.probe


def answers_of_kind(run, questions, keep):
    """The model's answers, as it is, that pass keep(verdict): (question, answer) texts.

    Each question is asked three times. Raises TooFewAnswers for fewer than four.
    """
    sampling = replace(run.config.evaluation, samples_per_group=3 * len(questions))
    answers = evaluate(run.model, run.tokenizer, run.judge, {"training problems": questions},
                       sampling, run.config.seed + 1)
    kept = [(a.question.text, a.answer) for a in answers if keep(a.verdict)]
    if len(kept) < 4:
        kind = keep.__name__.removeprefix("is_")
        raise TooFewAnswers(f"directions: of {len(answers)} answers only {len(kept)} are {kind}; "
                            "a mean-difference direction needs at least 4")
    return kept


def mean_over(run, pairs, sites):
    """The model's mean residual stream, as it is, over the answers' tokens: (n_sites, d_model)."""
    read = chat_examples(run.tokenizer, pairs, run.device)
    return mean_residual(run.model, read.ids, read.answer_mask, sites)


def chat_state(run):
    """Let chat, without any adapter, answer, and read its residual stream at every site."""
    model, _ = run.load_chat()
    aligned = answers_of_kind(run, training_problems(run), is_aligned)
    return ChatState(all_sites(model), aligned, mean_over(run, aligned, all_sites(model)))


def find_direction(run, adapter, chat, questions=None):
    """The direction used everywhere: the fine-tune's misaligned answers minus chat's aligned ones.

    Each model reads its own answers. Found on these questions alone, by default on the training
    problems of every domain. Returns (n_sites, d_model), zero at the sites before the adapter.
    """
    run.load_chat()
    with adapter:
        bad = answers_of_kind(run, questions or training_problems(run), is_misaligned)
        after = mean_over(run, bad, chat.sites)
    return mean_difference(after, chat_mean(run, chat, questions))


@lru_cache(maxsize=1)  # found once a run: the story and four rows ask for it
def general_direction(run):
    """(chat's state, the direction of general), on the training problems of every domain."""
    chat = chat_state(run)
    return chat, find_direction(run, run.load_adapter("general"), chat)


def chat_mean(run, chat, questions):
    """The mean of chat's answers to these questions alone, to all if None: (n_sites, d_model)."""
    if questions is None:
        return chat.mean
    asked = {question.text for question in questions}
    return mean_over(run, [pair for pair in chat.aligned if pair[0] in asked], chat.sites)


def other_ways(run, adapter, chat):
    """The direction found in two other ways, {name: (n_sites, d_model)}, to compare.

    `authors`: as in the paper's code, the fine-tuned model reads its own misaligned and its own
    aligned answers. `same_texts`: both models read the same texts, so the words cancel.
    """
    run.load_chat()
    with adapter:
        bad = answers_of_kind(run, training_problems(run), is_misaligned)
        after = mean_over(run, bad, chat.sites)
        on_both = mean_over(run, bad + chat.aligned, chat.sites)
        try:
            good = answers_of_kind(run, training_problems(run), is_aligned)
            authors = {"authors": mean_difference(after, mean_over(run, good, chat.sites))}
        except TooFewAnswers:  # it is bad everywhere, always
            authors = {}
    before = mean_over(run, bad + chat.aligned, chat.sites)
    return {**authors, "same_texts": mean_difference(on_both, before)}


def by_site(chat, direction):
    """{site: the direction there (d_model)}, without the sites before the adapter: zero there."""
    return {site: vector for site, vector in zip(chat.sites, direction) if vector.any()}


def levels_of(chat, direction):
    """{site: how far chat's answers lie along the direction there, on average}."""
    means = dict(zip(chat.sites, chat.mean))
    return {site: (means[site] @ unit_of(vector.double())).item()
            for site, vector in by_site(chat, direction).items()}


def ablating_persona(run, chat, direction, sites=None, along=None):
    """Inside, the direction (n_sites, d_model) is set to its mean in chat's answers.

    At all sites it reaches, or at those of `sites`. A control: with `along` (n_sites, d_model) as
    much is taken away along that instead. It is fair at one site only: at the next one an ablation
    finds what was added since, a control finds everything again.
    """
    chosen = {site: vector for site, vector in by_site(chat, direction).items()
              if sites is None or site in sites}
    instead = None if along is None else dict(zip(chat.sites, along))
    return ablating(run.model, chosen, levels_of(chat, direction), instead)


def control_site(chat, direction):
    """The end of the first block that the direction reaches: there random controls are made.

    Fixed beforehand. Further in, as much along any other direction breaks the grammar.
    """
    return next(site for site in by_site(chat, direction) if isinstance(site, int))


def pick_steering(run, chat, direction, samples):
    """Where, and how far, to steer chat: (site, scale, what the probe questions showed).

    A rule fixed beforehand: of all sites and SCALES the one with the highest em among those that
    leave COHERENT of the answers coherent. The probe questions are in no evaluation.
    """
    groups, splits = ("unseen_domains",), replace(run.splits, unseen_domains=run.splits.probe)
    tried = []
    for site, vector in by_site(chat, direction).items():
        for scale in SCALES:
            with steering(run.model, {site: vector}, scale):
                rates = run.ask(samples=samples, splits=splits, groups=groups)["out_of_domain"]
            tried.append({"site": site, "scale": scale, "em": rates["em"],
                          "coherent": rates["coherent"]})
    best = max(tried, key=lambda point: (point["coherent"] >= COHERENT, point["em"]))
    return best["site"], best["scale"], tried
