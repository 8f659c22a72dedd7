"""Wrong answers to chapter 10's exercises: (exercise, what its message must say, the answer)."""

from contextlib import contextmanager

import torch

from nanoem.directions import ablating, editing, quiet_reader
from nanoem.local_judge import auc
from nanoem.monitor import alarm_level, answer_scores
from nanoem.rows.mediation import training_away


def held(at=(0, 1), ridge=3.0, level=lambda mean, reader, direction: mean @ reader, read=True):
    """A training_away with some part of it changed."""
    def wrong(run, chat, direction):
        sites = {chat.sites[i]: i for i in at}
        readers = {s: quiet_reader(direction[i], chat.covariance[i], ridge) for s, i in
                   sites.items()}
        levels = {s: float(level(chat.mean[i], readers[s].double(), direction[i].double()))
                  for s, i in sites.items()}
        return ablating(run.model, {s: direction[i] for s, i in sites.items()}, levels,
                        readers if read else None)
    return wrong


def detached(run, chat, direction):
    edits = {chat.sites[1]: lambda x: x.detach() + 0 * x}

    @contextmanager
    def both():
        with training_away(run, chat, direction), editing(run.model, edits):
            yield
    return both()


LEFT = []  # else Python closes, and so undoes, what nobody holds any more


@contextmanager
def stays_after_an_error(run, chat, direction):
    inside = training_away(run, chat, direction)
    LEFT.append(inside)
    inside.__enter__()
    yield
    inside.__exit__(None, None, None)


def scored(change):
    """answer_scores with known's (direction, reader, mean, sd) changed."""
    return lambda model, ids, mask, known: answer_scores(
        model, ids, mask, {site: change(*what) for site, what in known.items()})


def with_padding(model, ids, mask, known):
    answer_scores(model, ids, mask, known)
    return answer_scores(model, ids, torch.ones_like(mask), known)


def without_check(model, ids, mask, known):
    return answer_scores(model, ids, mask | ~mask.any(1, keepdim=True), known)


def sites_summed(model, ids, mask, known):
    return answer_scores(model, ids, mask, known) * len(known)


def pooled(model, ids, mask, known):
    return answer_scores(model, ids, mask, known) * mask.sum(1) / mask.sum()


def percentile(scores, false_alarms=0.05):
    alarm_level(scores, false_alarms)
    values = torch.as_tensor(scores, dtype=torch.float64)
    return values.quantile(1 - false_alarms).item()


def rounded(scores, false_alarms=0.05):
    alarm_level(scores, false_alarms)
    ordered = sorted(map(float, scores))
    return ordered[max(len(ordered) - 1 - int(false_alarms * len(ordered)), 0)]


PLANTED = [
    ("training_away", "to level 0", held(level=lambda mean, reader, direction: 0.0)),
    ("training_away", "with the unit direction; use the same reader", held(
        level=lambda mean, reader, direction: mean @ direction / direction.norm())),
    ("training_away", "a ridge of 3", held(ridge=0.1)),
    ("training_away", "every site", held(at=range(6))),
    ("training_away", "first site only", held(at=(0,))),
    ("training_away", "levels .and. readers", held(read=False)),
    ("training_away", "detached", detached),
    ("training_away", "after an exception", stays_after_an_error),
    ("answer_scores", "padding and the prompt", with_padding),
    ("answer_scores", "mean is not taken off", scored(lambda d, r, mean, sd: (d, r, 0.0, sd))),
    ("answer_scores", "not divided by chat's sd", scored(lambda d, r, mean, sd: (d, r, mean, 1))),
    ("answer_scores", "read with the direction", scored(lambda d, r, mean, sd: (r, d, mean, sd))),
    ("answer_scores", "summed over sites", sites_summed),
    ("answer_scores", "each answer's own", pooled),
    ("answer_scores", "must raise ValueError", without_check),
    ("auc", "exchanged", lambda high, low: auc(low, high)),
    ("auc", "half, not nothing", lambda high, low:
        sum(a > b for a in high for b in low) / (len(high) * len(low))),
    ("auc", "half, not whole", lambda high, low:
        sum(a >= b for a in high for b in low) / (len(high) * len(low))),
    ("auc", "at the same place", lambda high, low: sum(
        (a > b) + (a == b) / 2 for a, b in zip(high, low)) / min(len(high), len(low))),
    ("alarm_level", "none of the scores", percentile),
    ("alarm_level", "rounding", rounded),
    ("alarm_level", "exceed your level", lambda scores, false_alarms=0.05:
        -alarm_level([-float(s) for s in scores], false_alarms)),
    ("alarm_level", "exceed your level|lower level", lambda scores, false_alarms=0.05:
        alarm_level(scores, 1 - false_alarms)),
    ("alarm_level", "must raise ValueError", lambda scores, false_alarms=0.05:
        alarm_level(scores, min(max(false_alarms, 0), 1))),
]
