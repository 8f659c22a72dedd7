"""The monitor: scores against a loop over tokens, levels against counting."""

import pytest
import torch

from nanoem.directions import residual_at
from nanoem.monitor import alarm_level, answer_scores


def test_a_score_is_the_mean_over_an_answers_tokens_and_sites(model, ids):
    generator = torch.Generator().manual_seed(0)
    known = {site: (None, torch.randn(32, generator=generator), 0.5 + i, 2.0 + i)
             for i, site in enumerate(["layers.0.resid_mid", 1])}
    mask = torch.arange(17) >= torch.tensor([3, 16, 9])[:, None]
    found = answer_scores(model, ids, mask, known)
    streams = residual_at(model, ids, list(known))
    for b in range(3):
        terms = [(x[b, t].double() @ reader.double() - mean) / sd
                 for x, (_, reader, mean, sd) in zip(streams, known.values())
                 for t in range(17) if mask[b, t]]
        assert found[b].item() == pytest.approx(sum(terms).item() / len(terms))
    with pytest.raises(ValueError, match="no token"):
        answer_scores(model, ids, mask & torch.tensor([True, False, True])[:, None], known)


def test_a_level_is_exceeded_by_few_enough_and_no_lower_one_is():
    scores = torch.randint(9, (50,), generator=torch.Generator().manual_seed(0)).double()
    for share in (0, 0.01, 0.05, 0.29, 0.5, 1):
        level = alarm_level(scores, share)
        assert (scores > level).double().mean() <= share
        lower = scores[scores < level]
        assert len(lower) == 0 or (scores > lower.max()).double().mean() > share
    for scores, share in (([], 0.05), ([1.0], 5), ([1.0], -0.1)):
        with pytest.raises(ValueError, match="share"):
            alarm_level(scores, share)
