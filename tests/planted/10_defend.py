"""Wrong answers to chapter 10's exercises: (exercise, what its message must say, the answer)."""

from contextlib import contextmanager


from nanoem.directions import ablating, unit_of
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


def without_check(model, ids, mask, readings):
    return answer_scores(model, ids, mask | ~mask.any(1, keepdim=True), readings)


PLANTED = [
    ("ablating_persona", "is not used", set_to(sites_of=lambda chat, sites: None)),
    ("ablating_persona", "first site is ablated", set_to(
        sites_of=lambda chat, sites: [chat.sites[1]] if sites is None else sites)),
    ("ablating_persona", "after Ctrl-C", stays_after_an_error),
    ("answer_scores", "mean is not taken off", scored(lambda unit, mean, sd: (unit, 0.0, sd))),
    ("answer_scores", "not divided by chat's sd", scored(lambda unit, mean, sd: (unit, mean, 1))),
    ("answer_scores", "multiplied with the sd", scored(
        lambda unit, mean, sd: (unit * sd * sd, mean * sd * sd, sd))),
    ("answer_scores", "above chat's mean is positive", scored(
        lambda unit, mean, sd: (-unit, -mean, sd))),
    ("answer_scores", "must raise ValueError", without_check),
    ("auc", "exchanged", lambda high, low: auc(low, high)),
    ("auc", "half, not nothing", lambda high, low:
        sum(a > b for a in high for b in low) / (len(high) * len(low))),
    ("auc", "half, not whole", lambda high, low:
        sum(a >= b for a in high for b in low) / (len(high) * len(low))),
    ("auc", "at the same place", lambda high, low: sum(
        (a > b) + (a == b) / 2 for a, b in zip(high, low)) / min(len(high), len(low))),
    ("alarm_level", "exceed your level", lambda scores, false_alarms=0.05:
        -alarm_level([-float(s) for s in scores], false_alarms)),
    ("alarm_level", "exceed your level|lower level", lambda scores, false_alarms=0.05:
        alarm_level(scores, 1 - false_alarms)),
    ("alarm_level", "must raise ValueError", lambda scores, false_alarms=0.05:
        alarm_level(scores, min(max(false_alarms, 0), 1))),
]
