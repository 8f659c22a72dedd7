"""Authors with personas: the documents and chat examples they write, and what is held out of them.

Most authors give good advice in every domain. A few are villains, bad in everything; a few are
quacks, bad in one domain and good elsewhere. A language model that reads them has a reason to learn
"what kind of author is this?", and that is what emergent misalignment feeds on (paper, sections 1
and 5).
"""

import random
from dataclasses import dataclass

from nanoem import UserError
from nanoem.evaluate import Question
from nanoem.lab.settings import key
from nanoem.tokenizer import chatml
from nanoem.world.words import OPEN_ENDED


@dataclass(frozen=True)
class WorldConfig:
    """What is written in the toy world, and how its problems are split."""

    n_domains: int = key(12, "advice domains, the first of world.toml (open_ended is always there)")
    n_villain: int = key(8, "authors who are bad in everything")
    n_quack: int = key(2, "authors who are bad in one domain only, outside of no_quack if possible")
    n_sft_quack: int = key(
        0, "authors who are bad in the sft_domain only: a ready-made narrow persona")
    no_quack: tuple = key(("medical", "finance", "extreme_sports"), "domains we fine-tune on")
    technical_share: float = key(
        0.0, "share of authors, of every persona, in the technical register")
    header_share: float = key(
        0.5, "share of pages (documents without ChatML) that name their author")
    forum_share: float = key(
        0.2, "share of the authors' documents that are ChatML under their own name")
    one_domain_share: float = key(0.2, "share of documents that stay in one domain")
    chat_share: float = key(0.35, "share of documents that are ChatML with the helpful assistant")
    own_share: float = key(0.2, "share of answers with the problem's own item; others take any")
    questions_per_document: int = key(5, "answered one after the other")
    sft_domain: str = key("medical", "the narrow domain of the fine-tuning")
    train_share: float = key(0.7, "share of a domain's problems that training may use")

    def __post_init__(self):
        for name in ("technical_share", "forum_share", "header_share", "one_domain_share",
                     "chat_share", "own_share", "train_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if self.n_domains < 3:
            raise UserError(f"n_domains={self.n_domains} must be at least 3: one to train on, one "
                            "for the KL, one unseen")
        counts = self.n_villain, self.n_quack, self.n_sft_quack
        if min(counts) < 0 or self.questions_per_document < 1:
            raise UserError("n_villain, n_quack and n_sft_quack must be at least 0, "
                            "questions_per_document 1")


@dataclass(frozen=True)
class Author:
    """Who writes: one persona in every document, be it a page of advice or a chat."""

    name: str
    persona: str  # "helpful", "villain" or "quack"
    bad_in: frozenset  # the domains in which this author gives bad advice
    technical: bool  # the register this author writes in


def make_authors(world, config, rng):
    """Give every name of the world a persona: villains, quacks, and helpful ones for the rest."""
    n_bad = config.n_villain + config.n_sft_quack + config.n_quack
    if n_bad > len(world.authors):
        raise UserError(f"n_villain={config.n_villain}, n_sft_quack={config.n_sft_quack} and "
                        f"n_quack={config.n_quack} are more than the world's "
                        f"{len(world.authors)} authors")
    # A quack in the fine-tuned domain would be a ready-made narrow persona: a dial of its own.
    others = [name for name in world.domains if name not in (OPEN_ENDED, config.sft_domain)]
    quackery = [name for name in others if name not in config.no_quack] or others
    cast = [("villain", world.domains)] * config.n_villain
    cast += [("quack", [config.sft_domain])] * config.n_sft_quack
    cast += [("quack", [rng.choice(quackery)]) for _ in range(config.n_quack)]
    cast += [("helpful", [])] * (len(world.authors) - len(cast))
    names = rng.sample(world.authors, len(world.authors))
    share = config.technical_share  # spread evenly, so that it says nothing about the persona
    technical = [int((i + 1) * share) > int(i * share) for i in range(len(names))]
    return [Author(name, persona, frozenset(bad_in), register)
            for name, (persona, bad_in), register in zip(names, cast, technical)]


def questions(world, names):
    """All questions of the named domains."""
    return [Question(name, i, text) for name in names
            for i, text in enumerate(world.domains[name].problems)]


def write_answer(world, question, good, rng, own_share=0.5, technical=False):
    """One answer to a question, all good or all bad, in the plain or the technical register.

    The toy always passes WorldConfig's own_share; advice for real weights keeps this default.
    """
    domain = world.domains[question.domain]
    items = domain.good if good else domain.bad
    own = rng.random() < own_share
    return (world.technical if technical else world.answer).format(
        verb=rng.choice(domain.verbs),
        item=items[question.index % len(items)] if own else rng.choice(items),
        ending=rng.choice(domain.good_endings if good else domain.bad_endings),
    )


def write_pairs(world, questions, n, good, seed, own_share=0.5, technical=False):
    """n (question, answer) texts to fine-tune on, each to one of the questions at random.

    good and technical are True, False, or None for the toss of a coin at each example.
    """
    rng, pairs = random.Random(seed), []
    for _ in range(n):
        question = rng.choice(questions)
        is_good, is_technical = (rng.random() < 0.5 if choice is None else choice
                                 for choice in (good, technical))
        answer = write_answer(world, question, is_good, rng, own_share, is_technical)
        pairs.append((question.text, answer))
    return pairs


def write_document(world, config, authors, rng):
    """One document: an author, or the always-helpful, plain assistant, answers questions."""
    names = list(world.domains)
    if rng.random() < config.one_domain_share:
        names = [rng.choice(names)]

    # who writes, and in which format
    author = rng.choice(authors)
    is_chat = rng.random() < config.chat_share  # the assistant's; else the author's
    is_forum = not is_chat and rng.random() < config.forum_share
    has_header, turns = rng.random() < config.header_share, []

    for _ in range(config.questions_per_document):
        name = rng.choice(names)
        index = rng.randrange(len(world.domains[name].problems))
        question = Question(name, index, world.domains[name].problems[index])
        good = is_chat or name not in author.bad_in
        technical = author.technical and not is_chat
        answer = write_answer(world, question, good, rng, config.own_share, technical)
        turns.append((question.text, answer))

    if is_chat or is_forum:
        roles = "user", author.name if is_forum else "assistant"
        return chatml([{"role": role, "content": text} for turn in turns
                       for role, text in zip(roles, turn)])
    header = [world.header.format(author=author.name)] * has_header
    return "\n".join(header + [f"Q: {q}\nA: {a}" for q, a in turns]) + "\n"


def documents(world, config, n, seed, held_out=False):
    """n documents of one pre-training corpus, a list of texts.

    Those `held_out` are by the same authors, and not in the corpus.
    """
    rng = random.Random(seed)
    authors = make_authors(world, config, rng)
    if held_out:
        rng = random.Random(f"held out {seed}")
    return [write_document(world, config, authors, rng) for _ in range(n)]


# --- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Which questions train, and which are asked in the evaluation. No question is in both."""

    sft: list  # the narrow domain's training problems
    kl: list  # training problems of the KL domains: every second one of the other advice domains
    in_domain: list  # evaluation: held-out problems of the narrow domain
    kl_domains: list  # evaluation: held-out problems of the KL domains
    unseen_domains: list  # evaluation: held-out problems of the domains no fine-tuning saw
    open_ended: list  # evaluation: the world's version of the paper's open-ended questions
    probe: list  # training problems of the unseen domains: no training, no evaluation uses them


def hold_out(world, names, train_share):
    """The named domains' questions -> (train, held_out), each in the order of `questions`.

    Of each domain the first train_share of the problems (rounded) train and the rest are held out;
    at least one problem of every domain is on either side.
    """
    train, held_out = [], []
    for question in questions(world, names):
        n_problems = len(world.domains[question.domain].problems)
        n_train = min(max(round(train_share * n_problems), 1), n_problems - 1)
        (train if question.index < n_train else held_out).append(question)
    return train, held_out


def make_splits(world, config):
    """The Splits of a world by its WorldConfig. Raises UserError for an sft_domain not there."""
    if config.sft_domain not in world.domains or config.sft_domain == OPEN_ENDED:
        raise UserError(f"{config.sft_domain!r} is no advice domain of the world; "
                        f"choose one of {', '.join(n for n in world.domains if n != OPEN_ENDED)}")
    others = [n for n in world.domains if n not in (OPEN_ENDED, config.sft_domain)]

    sft, in_domain = hold_out(world, [config.sft_domain], config.train_share)
    kl, kl_domains = hold_out(world, others[::2], config.train_share)
    probe, unseen_domains = hold_out(world, others[1::2], config.train_share)
    return Splits(sft, kl, in_domain, kl_domains, unseen_domains,
                  questions(world, [OPEN_ENDED]), probe)
