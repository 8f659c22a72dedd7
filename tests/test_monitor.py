"""The monitor: readings and scores against a loop over tokens, levels against counting."""


import pytest
import torch

from nanoem.directions import residual_at
from nanoem.rows.monitor import Reading, answer_scores, token_scores

SITES = ["layers.0.resid_mid", 1]
MASK = torch.arange(17) >= torch.tensor([3, 16, 9])[:, None]


@pytest.fixture
def directions():
    generator = torch.Generator().manual_seed(0)
    return {site: 3 * torch.randn(32, generator=generator) for site in SITES}


def test_scores_are_in_deviations_from_chat_a_mean_over_sites_and_over_an_answers_tokens(
        model, ids, directions):
    readings = {site: Reading(directions[site], 0.5 + i, 2.0 + i) for i, site in enumerate(SITES)}
    tokens, answers = token_scores(model, ids, readings), answer_scores(model, ids, MASK, readings)
    streams = residual_at(model, ids, SITES)
    for b in range(3):
        by_hand = [sum(((x[b, t].double() @ d.double()).item() - mean) / sd
                       for x, (d, mean, sd) in zip(streams, readings.values())) / 2
                   for t in range(17)]
        assert tokens[b].tolist() == pytest.approx(by_hand)
        marked = [score for score, kept in zip(by_hand, MASK[b]) if kept]
        assert answers[b].item() == pytest.approx(sum(marked) / len(marked))
    with pytest.raises(ValueError, match="no token of some answer"):
        answer_scores(model, ids, MASK & torch.tensor([True, False, True])[:, None], readings)
