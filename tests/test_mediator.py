"""The mediator: found by a loop over tokens, on questions that no evaluation asks."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoem import mediator
from nanoem.authors import Question
from nanoem.evaluate import GROUPS, Answer
from nanoem.judge import Verdict
from nanoem.mediator import (ChatState, TooFewAnswers, chat_state, find_mediator, holding,
                             read_by_chat, said, setting, training_problems)
from nanoem.toy import advice

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorial"))
from small import SmallRun, randn  # noqa: E402

BAD, GOOD, BROKEN = Verdict(100, 0, 0), Verdict(100, 100, 0), Verdict(0, 0, 0)


@pytest.fixture
def run():
    run = SmallRun()
    run.config = replace(run.config, seed=5, n_sft_examples=7)
    return run


@pytest.fixture
def heard(run, monkeypatch):
    """Instead of sampling: seven good answers, seven bad ones; and what `said` was asked."""
    texts = {"aligned": advice(run, run.splits.kl, True, 1),
             "misaligned": advice(run, run.splits.sft, False, 2)}
    heard = {"texts": texts, "keep": {}, "acts": {}, "asked": {},
             "adapter": run.load_adapter("general")}

    def stub(run, kind, questions, keep):
        heard["keep"][kind], heard["acts"][kind] = keep, heard["adapter"].acts
        heard["asked"][kind] = questions
        return texts[kind]

    monkeypatch.setattr(mediator, "said", stub)
    return heard


def answer_tokens(run, pairs):
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


def test_the_state_of_chat_is_that_of_its_own_answers_tokens(run, heard):
    chat = chat_state(run)
    assert chat.sites == ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]
    assert chat.aligned == heard["texts"]["aligned"] and not heard["acts"]["aligned"]
    tokens = answer_tokens(run, chat.aligned)
    assert torch.allclose(chat.mean, tokens.mean(0), atol=1e-5)
    for i, covariance in enumerate(chat.covariance):
        apart = tokens[:, i] - tokens[:, i].mean(0)
        assert torch.allclose(covariance, apart.T @ apart / (len(apart) - 1), atol=1e-4)


def test_the_mediator_is_what_the_adapter_adds_to_the_same_answers(run, heard):
    """Good and bad answers, read by both models; halves are every second text."""
    chat, adapter = chat_state(run), heard["adapter"]
    found = find_mediator(run, adapter, chat)
    assert heard["acts"]["misaligned"] and not adapter.acts
    assert heard["asked"]["misaligned"] == heard["asked"]["aligned"] == training_problems(run)
    bad = heard["texts"]["misaligned"]
    assert found.n_misaligned == len(bad) == 7

    def added(pairs):
        before = answer_tokens(run, pairs).mean(0)
        with adapter:
            return (answer_tokens(run, pairs).mean(0) - before).float()

    texts = heard["texts"]["aligned"] + bad
    assert torch.allclose(found.direction, added(texts), atol=1e-5)
    assert torch.allclose(found.halves[0], added(texts[0::2]), atol=1e-5)
    assert torch.allclose(found.halves[1], added(texts[1::2]), atol=1e-5)
    with adapter:
        own = answer_tokens(run, bad).mean(0)
    own -= answer_tokens(run, chat.aligned).mean(0)
    assert torch.allclose(found.own_words, own.float(), atol=1e-5)


def test_a_mediator_of_some_questions_reads_no_answer_to_another(run, heard):
    """Of chat's good answers only those to these questions; of the model's it asks for no more."""
    chat, adapter, bad = chat_state(run), heard["adapter"], heard["texts"]["misaligned"]
    some = run.splits.kl[::2]
    good = [(text, answer) for text, answer in chat.aligned if text in {q.text for q in some}]
    assert 0 < len(good) < len(chat.aligned)
    found = find_mediator(run, adapter, chat, some)
    assert heard["asked"]["misaligned"] == some
    before = answer_tokens(run, good + bad).mean(0)
    with adapter:
        added = (answer_tokens(run, good + bad).mean(0) - before).float()
    assert torch.allclose(found.direction, added, atol=1e-5)


@pytest.mark.parametrize("kind, kept", [
    ("aligned", {(100, 100), (100, 71)}), ("misaligned", {(100, 0), (100, 29), (51, 0)})])
def test_which_answers_are_kept(kind, kept, run, heard):
    find_mediator(run, heard["adapter"], chat_state(run))
    scores = {(100, 100), (100, 71), (100, 70), (100, 50), (100, 30), (100, 29), (100, 0),
              (51, 0), (50, 0), (0, 0), (0, 100)}
    keep = heard["keep"][kind]
    assert {score for score in scores if keep(Verdict(*score, 0))} == kept


def evaluated(run, verdicts, monkeypatch):
    """Let the model give one answer a verdict; returns the list of how `evaluate` was called."""
    calls = []

    def stub(model, tokenizer, world, groups, sampling, seed):
        calls.append((groups, sampling, seed))
        return [Answer("training problems", Question("medical", i, f"Q{i}"), f"A{i}", verdict)
                for i, verdict in enumerate(verdicts)]

    monkeypatch.setattr(mediator, "evaluate", stub)
    return calls


def test_the_direction_is_found_on_problems_of_every_domain_and_no_evaluated_one(run, monkeypatch):
    calls = evaluated(run, [GOOD] * 4, monkeypatch)
    said(run, "good", training_problems(run), lambda verdict: True)
    (groups, sampling, seed), = calls
    asked = [question for questions in groups.values() for question in questions]
    tested = [question for group in GROUPS for question in getattr(run.splits, group)]
    assert not set(asked) & set(tested)
    assert {q.domain for q in asked} == set(run.world.domains) - {"open_ended"}
    assert len(asked) == len(set(asked)) == 176
    assert sampling == replace(run.config.evaluation, samples_per_group=3 * 176)
    assert seed == 6, "the evaluation has the run's own seed, 5"


def test_what_was_said_is_kept_from_four_answers_on(run, monkeypatch):
    evaluated(run, [BAD, GOOD, BROKEN, BAD, BAD, GOOD], monkeypatch)
    with pytest.raises(TooFewAnswers, match="of 6 answers only 3 are misaligned"):
        said(run, "misaligned", run.splits.sft, lambda verdict: verdict.misaligned)
    evaluated(run, [BAD, GOOD, BROKEN, BAD, BAD, BAD], monkeypatch)
    kept = said(run, "misaligned", run.splits.sft, lambda verdict: verdict.misaligned)
    assert kept == [("Q0", "A0"), ("Q3", "A3"), ("Q4", "A4"), ("Q5", "A5")]


def test_a_reading_is_of_chats_tokens_with_a_tenth_of_their_variance_as_ridge(run):
    tokens = randn(50, 4, 64).double() @ randn(64, 64, seed=1).double() + 1
    sites = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]
    covariance = torch.stack([x.T.cov() for x in tokens.unbind(1)])
    chat, direction = ChatState(sites, [], tokens.mean(0), covariance), randn(4, 64, seed=2)
    readings = read_by_chat(chat, direction)
    assert list(readings) == sites and list(read_by_chat(chat, direction, [0])) == [0]
    for i, one in enumerate(readings.values()):
        u = (direction[i] / direction[i].norm()).double()
        loaded = covariance[i] + 0.1 * covariance[i].trace() / 64 * torch.eye(64)
        reader = loaded.inverse() @ u
        reader /= reader @ u
        heard = tokens[:, i] @ reader
        assert torch.allclose(one.reader.double(), reader, atol=1e-4)
        assert one.mean == pytest.approx(heard.mean().item(), abs=1e-3)
        assert one.sd == pytest.approx(heard.std().item(), rel=1e-3)
    after = []  # of the hook that `setting` leaves
    with setting(run, chat, direction):
        handle = run.model.layers[1].register_forward_hook(lambda _, ins, x: after.append(x[0]))
        run.model(torch.arange(9)[None])
        handle.remove()
    assert torch.allclose(after[0].double() @ reader, torch.tensor(one.mean).double(), atol=1e-3)


def test_the_control_takes_as_much_away_along_another_direction(run):
    tokens = randn(50, 64).double()
    chat = ChatState([0], [], tokens.mean(0)[None], tokens.T.cov()[None])
    direction, along, ids = randn(1, 64, seed=2), randn(1, 64, seed=3), torch.arange(9)[None]
    before = run.model.residual_stream(ids)[0]
    with holding(run, chat, direction):
        taken = before - run.model.residual_stream(ids)[0]
    with holding(run, chat, direction, along=along):
        instead = before - run.model.residual_stream(ids)[0]
    u, v = (torch.nn.functional.normalize(one[0], dim=0) for one in (direction, along))
    assert (taken @ u > 1e-3).any()
    assert torch.allclose(instead, (taken @ u)[..., None] * v, atol=1e-5)
