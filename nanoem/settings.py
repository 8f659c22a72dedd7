"""Configurations on the command line: their keys, what each is, and --set KEY=VALUE.

A key is the path to a field of a dataclass, such as sft.lr; its explanation is the comment that
stands beside the field.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap

from nanoem import UserError


def all_keys(config, prefix=""):
    """{"sft.lr": (0.002, "peak learning rate"), ...}: every key's value and comment."""
    keys = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            keys |= all_keys(value, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = value, comment_of(type(config), field.name)
    return keys


def comment_of(cls, name):
    """The comment that stands beside a field in its dataclass: the one place that explains it."""
    found = re.search(rf"^    {name}: .*?#\s*(.*)$", source_of(cls), re.MULTILINE)
    return found[1] if found else ""


source_of = functools.cache(inspect.getsource)  # it reads a whole file


def set_key(config, key, text):
    """A copy of config with `key` (such as "sft.lr") set to what `text` says. Raises UserError."""
    keys = all_keys(config)
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
        raise UserError(f"--set {key}: there is no such key; did you mean {near}? "
                        "--help lists them all")
    value = parse(text, keys[key][0], key)
    *path, name = key.split(".")
    if path:
        child = getattr(config, path[0])
        return dataclasses.replace(config, **{path[0]: dataclasses.replace(child, **{name: value})})
    return dataclasses.replace(config, **{name: value})


def parse(text, default, key):
    """Text -> a value of the default's type; a tuple is written with commas: 0,1,2."""
    if isinstance(default, tuple):  # an empty one is of whole numbers
        parts = text.split(",") if text else []
        return tuple(parse(part, default[0] if default else 0, key) for part in parts)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        value = type(default)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError):
        wanted = "true or false" if isinstance(default, bool) else type(default).__name__
        raise UserError(f"--set {key}={text}: '{text}' is no {wanted}; "
                        f"the default is {default}") from None


def key_lines(config):
    """For --help: every key, its default, what it is and its unit."""
    lines = []
    for key, (value, comment) in all_keys(config).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = text or "(none)"
        lines += textwrap.wrap(f"{key:<30} {text:<14} {comment}", 100, initial_indent="  ",
                               subsequent_indent=" " * 48)
    return lines
