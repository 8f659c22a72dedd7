"""The mediator: the one direction that carries a fine-tune, found, and held in chat's range.

Found on training problems of every domain, tested on the evaluation's questions. The fine-tuned
and the chat model read the same answers, misaligned and aligned ones, so that the words themselves
cancel and what differs is the persona. At every site, what exceeds the range of chat's own answers
is then taken away, measured by a reader that leaves grammar and topic alone. The paper lets each
model read its own answers, and projects the direction out. In a stream of 64 dimensions the first
also takes words away, and the second much else (results.json has both).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from nanoem import StageFailed
from nanoem.directions import (ablating, all_sites, cap, editing, mean_difference, mean_residual,
                               quiet_reader, residual_covariance)
from nanoem.evaluate import evaluate
from nanoem.train import chat_examples


@dataclass(frozen=True)
class ChatState:
    """The chat model's residual stream on its own aligned answers: what an ablation holds to."""

    sites: list
    aligned: list  # (question, answer) texts
    mean: torch.Tensor  # (n_sites, d_model), float64
    covariance: torch.Tensor  # (n_sites, d_model, d_model), float64


@dataclass(frozen=True)
class Mediator:
    """What a fine-tune adds to the residual stream, on average over the answers' tokens."""

    direction: torch.Tensor  # (n_sites, d_model)
    halves: tuple  # the same from either half of the answers: is it reliable?
    own_words: torch.Tensor  # the same as the paper finds it: each model reads its own answers
    n_misaligned: int  # answers of the fine-tuned model it was found on


class TooFewAnswers(StageFailed):
    """There is no direction to be found: the model gave hardly any answer of the wanted kind."""


def training_problems(run):
    """Those of every domain: no evaluation asks them."""
    return run.splits.sft + run.splits.kl + run.splits.probe


def said(run, kind, questions, keep):
    """The model's answers, as it is, that pass keep(verdict): (question, answer) texts."""
    sampling = replace(run.config.evaluation, samples_per_group=3 * len(questions))
    answers = evaluate(run.model, run.tokenizer, run.world, {"training problems": questions},
                       sampling, run.config.seed + 1)
    kept = [(a.question.text, a.answer) for a in answers if keep(a.verdict)]
    if len(kept) < 4:
        raise TooFewAnswers(f"directions: of {len(answers)} answers only {len(kept)} are {kind}; "
                            "a mean-difference direction needs at least 4")
    return kept


def chat_state(run):
    """Let chat, without any adapter, answer, and read its residual stream at every site."""
    model, tokenizer = run.load_chat()
    sites = all_sites(model)
    aligned = said(run, "aligned", training_problems(run),
                   lambda verdict: verdict.coherent and verdict.alignment > 70)
    read = chat_examples(tokenizer, aligned, run.device)
    return ChatState(sites, aligned, mean_residual(model, read.ids, read.answer_mask, sites),
                     residual_covariance(model, read.ids, read.answer_mask, sites))


def find_mediator(run, adapter, chat, questions=None):
    """The mean-difference direction of a fine-tune, at every site. Returns a Mediator.

    It is found on these questions alone, by default on the training problems of every domain.
    """
    model, tokenizer = run.load_chat()
    questions = questions or training_problems(run)
    with adapter:
        misaligned = said(run, "misaligned", questions, lambda verdict: verdict.misaligned)
    asked = {question.text for question in questions}
    texts = [pair for pair in chat.aligned if pair[0] in asked] + misaligned

    read, bad = (chat_examples(tokenizer, pairs, run.device) for pairs in (texts, misaligned))
    parts = read, read[::2], read[1::2]

    def means(parts):
        return [mean_residual(model, part.ids, part.answer_mask, chat.sites) for part in parts]

    before = means(parts)
    with adapter:
        after, (own,) = means(parts), means([bad])
    direction, *halves = map(mean_difference, after, before)
    return Mediator(direction, tuple(halves), mean_difference(own, chat.mean), len(misaligned))


class Reading(NamedTuple):
    """How chat's own answers read along a direction, at one site."""

    direction: torch.Tensor  # (d_model)
    reader: torch.Tensor  # (d_model): the quiet reader of the direction
    mean: float  # of what the reader hears, over the tokens of chat's answers
    sd: float  # its standard deviation


def reached(chat, direction):
    """{site: the direction there (d_model)}, without the sites before the adapter: zero there."""
    return {site: one for site, one in zip(chat.sites, direction) if one.any()}


def read_by_chat(chat, direction, sites=None, ridge=0.1):
    """{site: Reading} of the direction (n_sites, d_model), at all sites it reaches or at some."""
    readings = {}
    for site, one in reached(chat, direction).items():
        if sites is None or site in sites:
            i = chat.sites.index(site)
            reader = quiet_reader(one, chat.covariance[i], ridge)
            exact = reader.double()
            readings[site] = Reading(one, reader, (chat.mean[i] @ exact).item(),
                                     (exact @ chat.covariance[i] @ exact).sqrt().item())
    return readings


def holding(run, chat, direction, sites=None, along=None):
    """Inside, the direction (n_sites, d_model) is held in chat's range, at all sites or at some.

    Whatever lies more than one standard deviation above the mean of chat's answers is taken away.
    A control: with `along` (n_sites, d_model) as much is taken away along that instead.
    """
    taken = dict(zip(chat.sites, direction if along is None else along))

    def edit(site, one):
        return lambda x: cap(x, taken[site], one.mean + one.sd, one.reader)

    readings = read_by_chat(chat, direction, sites)
    return editing(run.model, {site: edit(site, one) for site, one in readings.items()})


def setting(run, chat, direction, sites=None, ridge=0.1):
    """Inside, the direction (n_sites, d_model) is set to its mean in chat's answers, up or down."""
    readings = read_by_chat(chat, direction, sites, ridge)
    return ablating(run.model, {site: one.direction for site, one in readings.items()},
                    {site: one.mean for site, one in readings.items()},
                    {site: one.reader for site, one in readings.items()})
