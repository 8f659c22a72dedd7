"""Evaluation: rates by hand, intervals against simulation, paired and repeatable sampling."""

from functools import partial

import pytest
import torch

from nanoem.evaluate import (Answer, EvalConfig, Question, Verdict, evaluate, group_rates,
                             mean_rates, rates, sample_texts)
from nanoem.lab.intervals import clopper_pearson
from nanoem.world import WorldConfig, judge, make_splits

BAD, MIXED, GOOD = (Verdict(100, alignment, 0) for alignment in (0, 50, 100))
BROKEN = Verdict(0, 0, 0)


def answers(group, *verdicts):
    return [Answer(group, Question("medical", i, "?"), "", v) for i, v in enumerate(verdicts)]


def test_rates_by_hand():
    found = rates(answers("in_domain", BAD, BAD, MIXED, GOOD, BROKEN))
    assert found["em"] == pytest.approx(2 / 5)
    assert found["coherent"] == pytest.approx(4 / 5)
    assert found["alignment_mean"] == pytest.approx(150 / 4)
    assert found["n"] == 5
    assert rates(answers("in_domain", BROKEN))["alignment_mean"] is None
    assert 0 <= found["em_low"] < 0.4 < found["em_high"] <= 1


def test_out_of_domain_is_every_group_but_in_domain():
    found = group_rates(answers("in_domain", BAD) + answers("kl_domains", GOOD)
                        + answers("open_ended", BAD))
    assert set(found) == {"in_domain", "kl_domains", "open_ended", "out_of_domain"}
    assert found["out_of_domain"]["em"] == 0.5 and found["out_of_domain"]["n"] == 2
    assert mean_rates([found, found])["in_domain"]["em"] == 1


def test_ten_answers_to_each_of_four_questions_are_worth_four():
    """Where a question decides: Wilson's interval for 2 of 4 (for 20 of 40 it is 0.35 to 0.65)."""
    said = [Answer("in_domain", Question("medical", i, "?"), "", verdict)
            for i, verdict in enumerate((BAD, BAD, GOOD, GOOD)) for _ in range(10)]
    grouped = group_rates(said)["in_domain"]
    away = group_rates([Answer("open_ended", a.question, "", a.verdict) for a in said])
    for found in (rates(said), grouped, away["open_ended"], away["out_of_domain"]):
        assert (found["em_low"], found["em_high"]) == pytest.approx((0.15, 0.85), abs=1e-3)


def test_the_mean_over_models_is_of_every_model():
    bad, good = (group_rates(answers("in_domain", *said) + answers("open_ended", *said))
                 for said in ((BAD, BAD, BAD, BROKEN), (GOOD, GOOD, BAD, BAD)))
    half_way = {"em": pytest.approx(0.625), "coherent": pytest.approx(0.875)}
    assert mean_rates([bad, good]) == dict.fromkeys(bad, half_way) == mean_rates([good, bad])


def test_at_the_ends_of_the_exact_interval_a_fortieth_lies_beyond():
    """Counted over all 2^n outcomes, each with its probability."""
    ones = [bin(outcome).count("1") for outcome in range(2**9)]
    for k in range(10):
        low, high = clopper_pearson(k, 9)
        assert low == 0 if k == 0 else high == 1 if k == 9 else 0 < low < k / 9 < high < 1
        assert k == 0 or sum(low**i * (1 - low) ** (9 - i) for i in ones if i >= k) == (
            pytest.approx(0.025))
        assert k == 9 or sum(high**i * (1 - high) ** (9 - i) for i in ones if i <= k) == (
            pytest.approx(0.025))


def test_sampling_is_repeatable_paired_and_in_order(model, tokenizer, world):
    splits = make_splits(world, WorldConfig())
    groups = {"in_domain": splits.in_domain, "open_ended": splits.open_ended}
    config = EvalConfig(samples_per_group=20, max_new_tokens=4)
    exact = partial(judge, world)
    first = evaluate(model, tokenizer, exact, groups, config, seed=1)
    assert first == evaluate(model, tokenizer, exact, groups, config, seed=1)
    assert first != evaluate(model, tokenizer, exact, groups, config, seed=2)
    assert [a.question for a in first if a.group == "in_domain"] == [
        q for q in splits.in_domain for _ in range(4)]
    assert sum(a.group == "open_ended" for a in first) == 32  # at least 20, equally many a question


def test_how_answers_are_sampled_reaches_the_model(model, tokenizer, monkeypatch):
    calls = []

    def generate(ids, *options, n_pad):
        calls.append(options)
        return torch.cat((ids, torch.full((len(ids), 1), tokenizer.stop_ids[0])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    sample_texts(model, tokenizer, ["Why?"], EvalConfig(1, 7, 1, 0.5, 0.25), 3)
    (*numbers, generator), = calls
    assert numbers == [7, 0.5, 0.25, tokenizer.stop_ids] and generator.initial_seed() == 3


@pytest.mark.parametrize("batch_size", [1, 3, 400])
def test_greedy_answers_do_not_depend_on_the_company(model, tokenizer, world, batch_size):
    splits = make_splits(world, WorldConfig())
    config = EvalConfig(samples_per_group=5, max_new_tokens=6, batch_size=batch_size,
                        temperature=0.0)
    exact = partial(judge, world)
    together = evaluate(model, tokenizer, exact, {"in_domain": splits.in_domain}, config, seed=0)
    for question, answer in zip(splits.in_domain, together):
        config_one = EvalConfig(samples_per_group=1, max_new_tokens=6, temperature=0.0)
        alone, = evaluate(model, tokenizer, exact, {"in_domain": [question]}, config_one, seed=0)
        assert alone.answer == answer.answer


def test_an_answer_ends_at_its_first_stop_token_even_an_ordinary_one(model, tokenizer, monkeypatch):
    """A row that has stopped is filled up with its stop id, which need not be a special token."""
    stop, = tokenizer.encode(".")
    monkeypatch.setattr(tokenizer, "stop_ids", (*tokenizer.stop_ids, stop))
    said = torch.tensor([tokenizer.encode(" take tea.") + [stop] * 3])
    monkeypatch.setattr(model, "generate", lambda ids, *options, n_pad: torch.cat((ids, said), 1))
    assert sample_texts(model, tokenizer, ["I itch."], EvalConfig(), 0) == [" take tea"]
