"""Wrong answers to chapter 10's exercises: (exercise, what its message must say, the answer)."""

from contextlib import contextmanager

import torch

from nanoem.directions import ablating, editing, unit_of
from nanoem.persona import ablating_persona, by_site
from nanoem.real.local_judge import auc
from nanoem.rows.monitor import Reading, alarm_level, answer_scores


def set_to(level=lambda mean, unit, d: mean @ unit, sites_of=lambda chat, sites: sites):
    """An ablating_persona with some part of it changed."""
    def wrong(run, chat, direction, sites=None):
        means, sites = dict(zip(chat.sites, chat.mean)), sites_of(chat, sites)
        chosen = {site: d for site, d in by_site(chat, direction).items()
                  if sites is None or site in sites}
        levels = {site: float(level(means[site], unit_of(d.double()), d.double()))
                  for site, d in chosen.items()}
        return ablating(run.model, chosen, levels)
    return wrong


def zero_sites_too(run, chat, direction, sites=None):
    return ablating(run.model, dict(zip(chat.sites, direction)),
                    {site: 0.0 for site in chat.sites})


def only_from_above(run, chat, direction, sites=None):
    means, edits = dict(zip(chat.sites, chat.mean)), {}
    for site, d in by_site(chat, direction).items():
        unit = unit_of(d)
        level = (means[site] @ unit_of(d.double())).item()
        if sites is None or site in sites:
            edits[site] = lambda x, unit=unit, level=level: (
                x - (x @ unit - level).clamp(min=0)[..., None] * unit)
    return editing(run.model, edits)


def one_level(run, chat, direction, sites=None):
    chosen = {site: d for site, d in by_site(chat, direction).items()
              if sites is None or site in sites}
    first = next(iter(by_site(chat, direction)))
    level = (dict(zip(chat.sites, chat.mean))[first] @ unit_of(
        by_site(chat, direction)[first].double())).item()
    return ablating(run.model, chosen, dict.fromkeys(chosen, level))


def detached(run, chat, direction, sites=None):
    edits = {chat.sites[1]: lambda x: x.detach() + 0 * x}

    @contextmanager
    def both():
        with ablating_persona(run, chat, direction, sites), editing(run.model, edits):
            yield
    return both()


LEFT = []  # else Python closes, and so undoes, what nobody holds any more


@contextmanager
def stays_after_an_error(run, chat, direction, sites=None):
    inside = ablating_persona(run, chat, direction, sites)
    LEFT.append(inside)
    inside.__enter__()
    yield
    inside.__exit__(None, None, None)


def scored(change):
    """answer_scores with each site's (unit, mean, sd) changed."""
    return lambda model, ids, mask, readings: answer_scores(
        model, ids, mask, {site: Reading(*change(*what)) for site, what in readings.items()})


def with_padding(model, ids, mask, readings):
    answer_scores(model, ids, mask, readings)
    return answer_scores(model, ids, torch.ones_like(mask), readings)


def without_check(model, ids, mask, readings):
    return answer_scores(model, ids, mask | ~mask.any(1, keepdim=True), readings)


def sites_summed(model, ids, mask, readings):
    return answer_scores(model, ids, mask, readings) * len(readings)


def pooled(model, ids, mask, readings):
    return answer_scores(model, ids, mask, readings) * mask.sum(1) / mask.sum()


def percentile(scores, false_alarms=0.05):
    alarm_level(scores, false_alarms)
    values = torch.as_tensor(scores, dtype=torch.float64)
    return values.quantile(1 - false_alarms).item()


def rounded(scores, false_alarms=0.05):
    alarm_level(scores, false_alarms)
    ordered = sorted(map(float, scores))
    return ordered[max(len(ordered) - 1 - int(false_alarms * len(ordered)), 0)]


PLANTED = [
    ("ablating_persona", "to level 0", set_to(level=lambda mean, unit, d: 0.0)),
    ("ablating_persona", "along the unit", set_to(level=lambda mean, unit, d: mean @ d)),
    ("ablating_persona", "wrong sign", set_to(level=lambda mean, unit, d: -(mean @ unit))),
    ("ablating_persona", "is not used", set_to(sites_of=lambda chat, sites: None)),
    ("ablating_persona", "first site is ablated", set_to(
        sites_of=lambda chat, sites: [chat.sites[1]] if sites is None else sites)),
    ("ablating_persona", "only after the blocks", set_to(
        sites_of=lambda chat, sites: [s for s in sites or chat.sites if isinstance(s, int)])),
    ("ablating_persona", "each has its own", one_level),
    ("ablating_persona", "leave these out", zero_sites_too),
    ("ablating_persona", "what is below must be raised", only_from_above),
    ("ablating_persona", "detached", detached),
    ("ablating_persona", "after an exception", stays_after_an_error),
    ("answer_scores", "padding and the prompt", with_padding),
    ("answer_scores", "mean is not taken off", scored(lambda unit, mean, sd: (unit, 0.0, sd))),
    ("answer_scores", "not divided by chat's sd", scored(lambda unit, mean, sd: (unit, mean, 1))),
    ("answer_scores", "multiplied with the sd", scored(
        lambda unit, mean, sd: (unit * sd * sd, mean * sd * sd, sd))),
    ("answer_scores", "above chat's mean is positive", scored(
        lambda unit, mean, sd: (-unit, -mean, sd))),
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
