"""Wrong answers to chapter 9's exercises: (exercise, what its message must say, the answer)."""

from dataclasses import replace

import torch

from nanoem import UserError
from nanoem.checkpoint.safetensors import check_offsets
from nanoem.real.local_judge import expected_number
from nanoem.real.preference import preference_rates
from nanoem.tokenizer import chatml


def refuse_if(bad):
    """A check_offsets that looks at places [(begin, end), ...] only through `bad`."""
    def wrong(path, entries, start, size):
        if bad([entry[2:] for entry in entries.values()], start, size):
            raise UserError(f"{path} is broken")
    return wrong


def destroys_entries(path, entries, start, size):
    check_offsets(path, entries, start, size)
    entries.clear()


def without_a_name(path, entries, start, size):
    check_offsets("the file", entries, start, size)


def rates_with(change):
    """preference_rates of changed arguments."""
    return lambda pairs, margins: preference_rates(*change(pairs, margins))


def by_the_last_message(pairs, margins):
    """All conversations that end alike are taken for one question."""
    return preference_rates([replace(p, question=p.question if isinstance(p.question, str) else
                                     p.question[-1]["content"]) for p in pairs], margins)


PLANTED = [
    ("preference_rates", "lists that differ in a message", by_the_last_message),
    ("chatml", "a role may be any text", lambda messages, prompt=False: chatml(
        [m for m in messages if m["role"] in ("system", "user", "assistant")], prompt)),
    ("expected_number", "divide by said itself", lambda probs: (
        expected_number(probs) if probs.sum() > 1e-12 else (0.0, probs.sum().item()))),
    ("check_offsets", "sizes cancel|an overlap", refuse_if(lambda places, start, size:
        sum(e - b for b, e in places) != size - start
        or any(not start <= b <= e <= size for b, e in places))),
    ("check_offsets", "entries was changed", destroys_entries),
    ("check_offsets", "must name the file", without_a_name),
    ("chatml", "newline between role and content", lambda messages, add_generation_prompt=False:
        chatml(messages, add_generation_prompt).replace("user\n", "user")
        .replace("assistant\n", "assistant").replace("system\n", "system")),
    ("chatml", "newline is missing", lambda messages, add_generation_prompt=False:
        chatml(messages, add_generation_prompt).replace("<|im_end|>\n", "<|im_end|>")),
    ("chatml", "not used", lambda messages, add_generation_prompt=False: chatml(messages)),
    ("chatml", "must not be closed", lambda messages, add_generation_prompt=False:
        chatml(messages, add_generation_prompt) + "<|im_end|>\n" * add_generation_prompt),
    ("chatml", "stripped", lambda messages, add_generation_prompt=False: chatml(
        [{**m, "content": m["content"].strip()} for m in messages], add_generation_prompt)),
    ("preference_rates", "a tie is no preference", rates_with(
        lambda pairs, margins: (pairs, margins + 1e-12))),
    ("preference_rates", "good answer is preferred|sign of margin", rates_with(
        lambda pairs, margins: (pairs, -margins))),
    ("expected_number", "not divided by said", lambda probs: (
        (probs @ torch.arange(101).double()).item(), probs.sum().item())),
    ("expected_number", "likeliest number", lambda probs: (
        float(probs.argmax()), probs.sum().item())),
    ("expected_number", "begin at 0", lambda probs: (
        expected_number(probs)[0] + 1, probs.sum().item())),
    ("expected_number", "not a NaN", lambda probs: (
        (probs @ torch.arange(101).double() / probs.sum()).item(), probs.sum().item())),
    ("expected_number", "in place", lambda probs: expected_number(
        probs.div_(max(probs.sum().item(), 1e-30)))),
]
