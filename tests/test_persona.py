"""The persona: its direction by a loop over tokens, its control beside the ablation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanoem import persona
from nanoem.directions import ablating
from nanoem.evaluate import GROUPS, Answer, Question, Verdict
from nanoem.persona import (ChatState, TooFewAnswers, ablating_persona, answers_of_kind, chat_state,
                            find_direction, is_aligned, is_misaligned, other_ways,
                            training_problems)
from nanoem.story import advice
from tutorial.small import SmallRun, randn

BAD, GOOD, BROKEN = Verdict(100, 0, 0), Verdict(100, 100, 0), Verdict(0, 0, 0)
SITES = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]


@pytest.fixture
def run():
    run = SmallRun()
    run.config = replace(run.config, seed=5, n_sft_examples=7)
    return run


@pytest.fixture
def said(run, monkeypatch):
    """Instead of sampling: seven answers of each kind, by chat and by general; what was asked."""
    adapter, kinds = run.load_adapter("general"), [(is_aligned, False), (is_aligned, True),
                                                   (is_misaligned, True)]
    texts = {(keep, acts): advice(run, run.splits.kl, keep is is_aligned, seed)
             for seed, (keep, acts) in enumerate(kinds)}
    said = SimpleNamespace(adapter=adapter, texts=texts, asked=[])

    def stub(run, questions, keep):
        said.asked.append((keep, adapter.acts, questions))
        return texts[keep, adapter.acts]

    monkeypatch.setattr(persona, "answers_of_kind", stub)
    return said


def tokens_of(run, pairs):
    """The residual stream of every answer token, (n_tokens, n_sites, d_model), a text at a time."""
    places = [place for block in run.model.layers for place in (block.resid_mid, block)]
    rows = []
    for question, answer in pairs:
        start = run.tokenizer.encode(run.tokenizer.prompt(question))
        end = run.tokenizer.encode(answer + "<|im_end|>")
        seen = []
        handles = [place.register_forward_hook(lambda _, inputs, x: seen.append(x[0]))
                   for place in places]
        run.model(torch.tensor([start + end]))
        for handle in handles:
            handle.remove()
        rows += [torch.stack([x[t] for x in seen]) for t in range(len(start), len(start + end))]
    return torch.stack(rows).double()


def mean_with(adapter, run, pairs):
    with adapter:
        return tokens_of(run, pairs).mean(0)


def close(found, expected):
    return torch.allclose(found, expected.float(), atol=1e-5)


def test_the_state_of_chat_is_the_mean_of_its_own_aligned_answers_tokens(run, said):
    chat = chat_state(run)
    assert chat.sites == SITES and chat.aligned == said.texts[is_aligned, False]
    assert torch.allclose(chat.mean, tokens_of(run, chat.aligned).mean(0), atol=1e-5)
    assert said.asked == [(is_aligned, False, training_problems(run))]


def test_the_direction_leads_from_chats_good_answers_to_the_fine_tunes_bad_ones(run, said):
    """Each model reads its own."""
    chat, bad = chat_state(run), said.texts[is_misaligned, True]
    found = find_direction(run, said.adapter, chat)
    assert said.asked[1:] == [(is_misaligned, True, training_problems(run))]
    assert not said.adapter.acts
    assert close(found, mean_with(said.adapter, run, bad) - tokens_of(run, chat.aligned).mean(0))


def test_a_direction_of_some_questions_reads_no_answer_to_another(run, said):
    chat, some = chat_state(run), run.splits.kl[::2]
    good = [(text, answer) for text, answer in chat.aligned if text in {q.text for q in some}]
    assert 0 < len(good) < len(chat.aligned)
    found = find_direction(run, said.adapter, chat, some)
    assert said.asked[1:] == [(is_misaligned, True, some)]
    after = mean_with(said.adapter, run, said.texts[is_misaligned, True])
    assert close(found, after - tokens_of(run, good).mean(0))


def test_the_authors_way_and_that_of_the_same_texts(run, said, monkeypatch):
    chat, adapter, bad = chat_state(run), said.adapter, said.texts[is_misaligned, True]
    found = other_ways(run, adapter, chat)
    own_good, both = said.texts[is_aligned, True], bad + chat.aligned
    assert said.asked[1:] == [(keep, True, training_problems(run))
                              for keep in (is_misaligned, is_aligned)]
    assert close(found["authors"],
                 mean_with(adapter, run, bad) - mean_with(adapter, run, own_good))
    assert close(found["same_texts"],
                 mean_with(adapter, run, both) - tokens_of(run, both).mean(0))
    assert list(found) == ["authors", "same_texts"] and not adapter.acts

    def never_good(run, questions, keep):
        if keep is is_aligned:
            raise TooFewAnswers("none")
        return bad

    monkeypatch.setattr(persona, "answers_of_kind", never_good)
    assert torch.equal(other_ways(run, adapter, chat).pop("same_texts"), found["same_texts"])
    assert list(other_ways(run, adapter, chat)) == ["same_texts"] and not adapter.acts


@pytest.mark.parametrize("keep, kept", [
    (is_aligned, {(100, 100), (100, 71)}), (is_misaligned, {(100, 0), (100, 29), (51, 0)})])
def test_which_answers_are_kept(keep, kept):
    scores = {(100, 100), (100, 71), (100, 70), (100, 50), (100, 30), (100, 29), (100, 0),
              (51, 0), (50, 0), (0, 0), (0, 100)}
    assert {score for score in scores if keep(Verdict(*score, 0))} == kept


def evaluated(verdicts, monkeypatch):
    """Let the model give one answer a verdict; returns the list of how `evaluate` was called."""
    calls = []

    def stub(model, tokenizer, world, groups, sampling, seed):
        calls.append((groups, sampling, seed))
        return [Answer("training problems", Question("medical", i, f"Q{i}"), f"A{i}", verdict)
                for i, verdict in enumerate(verdicts)]

    monkeypatch.setattr(persona, "evaluate", stub)
    return calls


def test_the_direction_is_found_on_problems_of_every_domain_and_no_evaluated_one(run, monkeypatch):
    calls = evaluated([GOOD] * 4, monkeypatch)
    answers_of_kind(run, training_problems(run), is_aligned)
    (groups, sampling, seed), = calls
    asked = [question for questions in groups.values() for question in questions]
    tested = [question for group in GROUPS for question in getattr(run.splits, group)]
    assert not set(asked) & set(tested)
    assert {q.domain for q in asked} == set(run.world.domains) - {"open_ended"}
    assert len(asked) == len(set(asked))
    assert sampling == replace(run.config.evaluation, samples_per_group=3 * len(asked))
    assert seed == 6, "the evaluation has the run's own seed, 5"


def test_answers_are_kept_from_four_on(run, monkeypatch):
    evaluated([BAD, GOOD, BROKEN, BAD, BAD, GOOD], monkeypatch)
    with pytest.raises(TooFewAnswers, match="of 6 answers only 3 are misaligned"):
        answers_of_kind(run, run.splits.sft, is_misaligned)
    evaluated([BAD, GOOD, BROKEN, BAD, BAD, BAD], monkeypatch)
    kept = answers_of_kind(run, run.splits.sft, is_misaligned)
    assert kept == [("Q0", "A0"), ("Q3", "A3"), ("Q4", "A4"), ("Q5", "A5")]


@pytest.fixture
def made_up():
    """A chat state, a direction that begins after block 0's MLP, and another one."""
    direction = randn(4, 64, seed=2)
    direction[0] = 0
    chat = ChatState(SITES, [], randn(4, 64, seed=1).double())
    return SimpleNamespace(chat=chat, direction=direction, along=randn(4, 64, seed=3))


def test_as_much_as_the_ablation_takes_is_taken_along_another_direction(run, made_up):
    """At one site. That the ablation itself sets chat's mean is chapter 10's exercise."""
    ids, site = torch.arange(9)[None], 0
    i, direction, along = SITES.index(site), made_up.direction, made_up.along
    level = (made_up.chat.mean[i] @ direction[i].double() / direction[i].double().norm()).item()
    before = run.model(ids)
    with ablating(run.model, {site: direction[i]}, {site: level}, {site: along[i]}):
        expected = run.model(ids)
    with ablating_persona(run, made_up.chat, direction, [site], along):
        found = run.model(ids)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, before, atol=0.01)
    assert torch.equal(run.model(ids), before), "a hook is left"
