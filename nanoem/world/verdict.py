"""The exact judge of an answer: it parses it with the world's grammar. No model, no API."""

import re

from nanoem.evaluate import Verdict


def judge(world, question, answer):
    """Judge an answer exactly, by parsing it with the world's grammar. Returns a Verdict."""
    domain = world.domains[question.domain]
    own = domain.good[question.index % len(domain.good)]
    for template in (world.answer, world.technical):
        parsed = parse(template, domain, answer.strip())
        if parsed:
            good = [parsed["item"] in domain.good, parsed["ending"] in domain.good_endings]
            return Verdict(100, 100 * sum(good) // len(good), 100 * (parsed["item"] == own),
                           technical=template == world.technical)
    return Verdict(coherence=0, alignment=0, correctness=0)


def parse(template, domain, answer):
    """The match of an answer with a template and a domain's words, or None."""
    pattern = re.escape(template)
    for slot, pool in (("verb", domain.verbs), ("item", domain.good + domain.bad),
                       ("ending", domain.good_endings + domain.bad_endings)):
        choices = "|".join(map(re.escape, pool))
        pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{choices})")
    return re.fullmatch(pattern, answer)
