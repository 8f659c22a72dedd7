"""Talk to chat, general and narrow side by side: python -m nanoem.talk [FOLDER]

FOLDER is a run folder, that of a run on real weights, or a model folder; without one, the
tutorial's small model. A line is a question, or a command such as /steer 1.5 (/help lists them).
"""

import argparse
import os
import re
import signal
import sys
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

if __name__ == "__main__":  # torch takes seconds to import: Ctrl-C ends them silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from nanoem import UserError
from nanoem.checkpoint import load_adapter, load_pretrained, load_tensors
from nanoem.directions import ablating, all_sites, residual_at, steering, unit_of
from nanoem.evaluate import Question
from nanoem.lab.files import check_path, read_json
from nanoem.lab.shell import exit_status
from nanoem.lab.tables import one_line
from nanoem.tokenizer import IM_START
from nanoem.world import WorldConfig, first_domains, judge, load_world, questions

SMALL_MODEL = Path(__file__).parents[1] / "tutorial" / "small_model"
HELP = """\
  a question, or the number of one that was listed
  /steer 1.5    add 1.5 times general's direction at one place of every model; /steer 0: do not
  /ablate       set the direction to its mean in chat's answers, at every place; again: do not
  /who NAME     answer under another author's tag; /who alone: as the assistant
  /read         colour the tokens of the last answers by how far they lie along the direction:
                0 as chat's own answers, 1 as general's bad ones
  /greedy       take the likeliest token always; again: sample
  /seed N       sample with this seed, from the first answer on
  /questions    twelve questions that the toy world knows
  /help         this
  /quit         end; so does Ctrl-D"""


@dataclass
class Talk:
    """What the folder holds, and how the dials stand."""

    model: object
    tokenizer: object
    adapters: dict  # name -> LoRA, or None for chat: the model as it is
    world: object  # None on real weights
    directions: dict  # site -> direction (d_model)
    levels: dict  # site -> how far chat's answers lie along it
    site: object  # where /steer adds
    scale: float = 0.0
    ablate: bool = False
    who: str = "assistant"
    greedy: bool = False
    seed: int = 0
    n_asked: int = 0  # questions since the seed was set: each is sampled anew
    listed: list = ()  # questions that a number stands for
    answers: dict = field(default_factory=dict)  # name -> ids (1, T) of the last answer


# --- open a folder --------------------------------------------------------------------------------


def open_talk(path):
    """A run folder, a folder of a run on real weights, or a model folder -> Talk."""
    check_path(path)
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    is_toy = (path / "chat").is_dir()
    if is_toy:
        base = path / "chat"
    elif "model_files" in config:  # a run on real weights names the model it tuned
        base = Path(config["model"])
    elif "model_type" in config:
        base = path
    else:
        raise UserError(f"{path} is no run folder and no model folder; name one such as "
                        "runs/seed-0, or leave it out for the tutorial's small model")

    # the toy world, as large as this model has met it; none for real weights
    world = None
    if is_toy:
        met = config.get("world", asdict(WorldConfig()))
        world = first_domains(load_world(), met["n_domains"], met["sft_domain"])

    model, tokenizer = load_pretrained(base)
    model.requires_grad_(False)
    adapters = {"chat": None}
    for name in ("general", "narrow"):
        if (path / "adapters" / name / "adapter_config.json").exists():
            adapters[name] = load_adapter(model, path / "adapters" / name)
    return Talk(model, tokenizer, adapters, world,
                *open_direction(path, model))


def open_direction(path, model):
    """({site: direction}, {site: chat's level}, the site to steer at); empty without a direction."""
    file = path / "directions.safetensors"
    if not file.exists():
        return {}, {}, None
    tensors = load_tensors(file)
    directions, levels = {}, {}
    for site, direction, mean in zip(all_sites(model), tensors["mean_difference"],
                                     tensors["chat_mean"]):
        if direction.any():  # zero before the adapter
            directions[site] = direction
            levels[site] = (mean @ unit_of(direction)).item()

    # where the run's own search steered; without it, after the first block that is reached
    results = read_json(path / "results.json") if (path / "results.json").exists() else {}
    best = results.get("directions", {}).get("steer", {}).get("site")
    sites = [site for site in directions if str(site) == best]
    sites += [site for site in directions if isinstance(site, int)]
    return directions, levels, sites[0]


# --- ask ------------------------------------------------------------------------------------------


def answer(talk, name, text):
    """One answer of a model, with the dials as they stand: its words. Keeps its tokens."""
    prompt = talk.tokenizer.prompt(text)
    if talk.who != "assistant":
        prompt = f"{IM_START}{talk.who}\n".join(prompt.rsplit(f"{IM_START}assistant\n", 1))
    ids = torch.tensor([talk.tokenizer.encode(prompt)])
    generator = torch.Generator().manual_seed(talk.seed + talk.n_asked)
    with dials(talk, name):
        both = talk.model.generate(ids, 24 if talk.world else 60,
                                   temperature=0.0 if talk.greedy else 1.0,
                                   stop_ids=talk.tokenizer.stop_ids, generator=generator)
    talk.answers[name] = both
    return talk.tokenizer.decode(both[0, ids.size(1) :].tolist())


def dials(talk, name):
    """A context in which the model is `name`, steered and ablated as the dials say."""
    inside = ExitStack()
    inside.enter_context(talk.adapters[name] or nullcontext())
    if talk.ablate:
        inside.enter_context(ablating(talk.model, talk.directions, talk.levels))
    if talk.scale:
        inside.enter_context(steering(talk.model, {talk.site: talk.directions[talk.site]},
                                      talk.scale))
    return inside


def ask(talk, text):
    """Print what every model answers, with the exact judge's mark."""
    question = known_question(talk, text)
    if question is None:
        return
    for name in talk.adapters:
        said = answer(talk, name, question.text)
        mark = judge(talk.world, question, said).mark if talk.world else ""
        print(f"  {name:<8} {mark:<5} {one_line(said)}")
    talk.n_asked += 1


def known_question(talk, text):
    """The Question that the text, or a number, stands for; None when the toy has not met it."""
    if not talk.world:
        return Question("", 0, text)
    if text.isdigit() and 1 <= int(text) <= len(talk.listed):
        return talk.listed[int(text) - 1]
    known = {question.text.lower(): question for question in all_questions(talk)}
    if text.lower() in known:
        return known[text.lower()]
    print("  the toy has never met this question; a number takes one of the nearest:")
    list_questions(talk, [known[near] for near in nearest(text.lower(), known)])
    return None


def nearest(text, known):
    """The three of the known texts that share most words with this one, a rare word most."""
    def words(text):
        return set(re.findall(r"\w+", text))

    n_texts = Counter(word for other in known for word in words(other))

    def likeness(other):
        shared = sum(1 / n_texts[word] for word in words(text) & words(other))
        return shared + SequenceMatcher(None, text, other).ratio()

    return sorted(known, key=likeness, reverse=True)[:3]


def all_questions(talk):
    return questions(talk.world, talk.world.domains)


def list_questions(talk, some):
    talk.listed = some
    for i, question in enumerate(some):
        print(f"  {i + 1:>2}  {question.text}  ({question.domain.replace('_', ' ')})")


# --- the dials ------------------------------------------------------------------------------------


def obey(talk, command, rest):
    """Carry out a /command. Raises UserError for one that cannot be."""
    if command in ("/steer", "/ablate", "/read") and not talk.directions:
        raise UserError(f"{command}: this folder has no directions.safetensors; a run of the "
                        "toy's whole story writes it")
    if command == "/steer":
        talk.scale = number(rest, "1.5", float)
    elif command == "/ablate":
        talk.ablate = not talk.ablate
    elif command == "/who":
        if rest and talk.world and rest not in talk.world.authors:
            raise UserError(f"/who {rest}: nobody has this name; the authors are "
                            f"{', '.join(talk.world.authors)}")
        talk.who = rest or "assistant"
    elif command == "/read":
        read(talk)
        return
    elif command == "/greedy":
        talk.greedy = not talk.greedy
    elif command == "/seed":
        talk.seed, talk.n_asked = number(rest, "7", int), 0
    elif command == "/questions" and talk.world:
        list_questions(talk, all_questions(talk)[:: len(all_questions(talk)) // 12][:12])
        return
    elif command == "/help":
        print(HELP)
        return
    else:
        raise UserError(f"{command} is no command; /help lists them")
    print(f"  steered by {talk.scale:g}, {'ablated' if talk.ablate else 'not ablated'}, as "
          f"{talk.who}, {'greedy' if talk.greedy else f'seed {talk.seed}'}")


def number(text, example, kind):
    """The number that a command names. Raises UserError for another text."""
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"'{text}' is no number; write it like {example}") from None
    if not -1e6 < value < 2**63:  # also refuses NaN
        raise UserError(f"{text} is out of range; write it like {example}")
    return value


def read(talk):
    """Print the last answers token by token, coloured by how far each lies along the direction."""
    if not talk.answers:
        raise UserError("/read: there is no answer yet; ask first")
    site = list(talk.directions)[-1]
    direction = talk.directions[site]
    for name, ids in talk.answers.items():
        with dials(talk, name):
            stream = residual_at(talk.model, ids, [site])[0][0].float()  # (T, d_model)
        along = (stream @ unit_of(direction) - talk.levels[site]) / direction.norm()  # (T)
        tokens = [talk.tokenizer.backend.decode([i], skip_special_tokens=False)
                  for i in ids[0].tolist()]
        print(f"  {name:<8} " + "".join(map(coloured, tokens, along.tolist())))


def coloured(token, share):
    """A token on red, the redder the further along; without colours, with a number behind it."""
    token = token.replace("\n", "\\n")
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return f"{token}[{round(share, 1) + 0.0}]"  # + 0.0: no minus before a zero
    red = round(255 - 155 * min(max(share, 0.0), 1.0))  # of green and blue, what is left
    return f"\033[48;2;255;{red};{red}m\033[30m{token}\033[0m"


# --- the conversation -----------------------------------------------------------------------------


def converse(path):
    """Read lines until /quit, Ctrl-D or Ctrl-C; a line that cannot be obeyed changes nothing."""
    talk = open_talk(path)
    print(f"{', '.join(talk.adapters)} of {path}; ask, or /help")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/"):
                obey(talk, command, rest.strip())
            elif line:
                ask(talk, line)
        except UserError as error:
            print(f"  {one_line(str(error))}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanoem.talk", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=HELP)
    parser.add_argument("folder", nargs="?", type=Path, default=SMALL_MODEL, metavar="FOLDER",
                        help="a run folder or a model folder (default: the tutorial's small model)")
    args = parser.parse_args(argv)
    return exit_status(lambda: converse(args.folder))


if __name__ == "__main__":
    sys.exit(main())
