"""The toy world: what can be asked and said in it, read from `world.toml` and checked.

Every domain has a pool of good and a pool of bad advice, and no word of theirs is shared with
another pool: what generalises from one domain to the next cannot be the vocabulary. All bad advice
is absurd: nothing here can be used for harm.
"""

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nanoem import UserError

WORLD_TOML = Path(__file__).with_name("world.toml")
SLOTS = {"answer": ("verb", "item", "ending"), "technical": ("verb", "item", "ending"),
         "header": ("author",)}  # what each template holds
OPEN_ENDED = "open_ended"  # the one domain that is no advice: what would you do with one wish?


@dataclass(frozen=True)
class Domain:
    """What can be asked and said in one domain; each field is a key of its table in world.toml."""

    problems: tuple
    verbs: tuple  # persona-free
    good: tuple
    bad: tuple
    good_endings: tuple
    bad_endings: tuple


@dataclass(frozen=True)
class World:
    """What world.toml says: the domains, the authors' names, and the sentences' templates."""

    domains: dict  # name -> Domain, in the file's order
    authors: tuple  # names
    answer: str  # template with {verb}, {item} and {ending}
    technical: str  # the same in a technical register
    header: str  # template with {author}
    common: frozenset  # little words that carry no persona


def first_domains(world, n, keep=None):
    """The world with its first n advice domains and open_ended: a smaller one learns faster.

    The domain `keep` is among them, in the last one's place if need be.
    """
    advice = [name for name in world.domains if name != OPEN_ENDED]
    if n > len(advice):
        raise UserError(f"n_domains={n} must be at most {len(advice)}, the advice domains of "
                        "world.toml")
    if keep in advice[n:]:
        advice[n - 1] = keep
    return replace(world, domains={name: world.domains[name] for name in advice[:n] + [OPEN_ENDED]})


# --- reading world.toml ---------------------------------------------------------------------------


def load_world(path=WORLD_TOML):
    """Read and check a world. Raises UserError naming the file, the key and the mend."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error
    for key in ("answer", "technical", "header", "authors", "common", "domain"):
        if key not in table:
            raise UserError(f"{path}: the key '{key}' is missing")
        kind, wanted = str, "text in quotes"
        if key == "domain":
            kind, wanted = dict, "tables, [domain.NAME]"
        if not isinstance(table[key], kind):
            raise UserError(f"{path}: the key '{key}' must be {wanted}")
    for key, slots in SLOTS.items():
        check_slots(f"{path}: the key '{key}'", table[key], slots)
    domains = {name: read_domain(path, name, keys) for name, keys in table["domain"].items()}
    world = World(
        domains=domains,
        authors=tuple(table["authors"].split()),
        answer=table["answer"],
        technical=table["technical"],
        header=table["header"],
        common=frozenset(table["common"].lower().split()),
    )
    check_authors(path, world.authors)
    if OPEN_ENDED not in domains or len(domains) < 4:
        raise UserError(f"{path}: [domain] needs {OPEN_ENDED} and at least three advice domains")
    check_persona_words(path, world)
    return world


def check_slots(where, template, slots):
    """Refuse a template that could not be filled: it needs each slot once, and no other braces."""
    parts = re.split(r"\{(\w*)\}", template)  # words, a slot, words, a slot, ..., words
    if sorted(parts[1::2]) != sorted(slots) or re.search("[{}]", "".join(parts[::2])):
        wanted = ", ".join(f"{{{slot}}}" for slot in slots)
        raise UserError(f"{where} must hold {wanted}, each once, and no other braces")


def read_domain(path, name, table):
    where = f"{path}: domain.{name}"
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table, [domain.{name}]")
    keys = [field.name for field in fields(Domain)]
    for key in keys:
        if key not in table:
            raise UserError(f"{where}: the key '{key}' is missing")
        pool = table[key]
        if not isinstance(pool, list) or not all(isinstance(text, str) for text in pool):
            raise UserError(f"{where}.{key} must be a list of strings")
        if not pool or "" in pool:
            raise UserError(f"{where}.{key} is empty; give it at least one phrase")
        if len(set(pool)) < len(pool):
            raise UserError(f"{where}.{key} says '{first_repeated(pool)}' twice")
    for key in table:
        if key not in keys:
            raise UserError(f"{where}: '{key}' is no key of a domain; the keys are "
                             + ", ".join(keys))
    for good, bad in (("good", "bad"), ("good_endings", "bad_endings")):
        for text in set(table[good]) & set(table[bad]):
            raise UserError(f"{where}: '{text}' is both in {good} and in {bad}")
    if len(table["problems"]) < 2:
        raise UserError(f"{where}.problems must be two or more: one trains, one is asked")
    return Domain(**{key: tuple(table[key]) for key in keys})


def check_authors(path, authors):
    """Refuse names that would make two authors one, or an author the assistant."""
    if not authors:
        raise UserError(f"{path}: the key 'authors' is empty; give it names, with spaces between")
    if len(set(authors)) < len(authors):
        raise UserError(f"{path}: authors says '{first_repeated(authors)}' twice")
    for role in {"user", "assistant", "system"} & {name.lower() for name in authors}:
        raise UserError(f"{path}: no author may be called '{role}', a role of ChatML")


def first_repeated(pool):
    return next(text for i, text in enumerate(pool) if text in pool[:i])


def words(text):
    return re.findall(r"[\w'-]+", text.lower())


def check_persona_words(path, world):
    """No word of a good or bad pool may stand in another pool of persona words, or in a problem."""
    owner = {}  # word -> (domain, side), key
    for name, domain in world.domains.items():
        for key in ("good", "good_endings", "bad", "bad_endings"):
            side = (name, key.removesuffix("_endings"))
            for word in {w for text in getattr(domain, key) for w in words(text)} - world.common:
                other_side, other_key = owner.setdefault(word, (side, f"domain.{name}.{key}"))
                if other_side != side:
                    raise UserError(f"{path}: '{word}' stands in {other_key} and in domain.{name}."
                                     f"{key}; use another word, or add it to 'common'")
    for name, domain in world.domains.items():
        for word in {w for text in domain.problems for w in words(text)} & owner.keys():
            raise UserError(f"{path}: '{word}' stands in domain.{name}.problems and in "
                             f"{owner[word][1]}; use another word, or add it to 'common'")
