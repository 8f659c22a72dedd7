"""Configurations on the command line: their keys, what each is, and --set KEY=VALUE.

A key is the path to a field of a dataclass, such as sft.lr.
"""

import dataclasses
import difflib
import math
import textwrap

from nanoem import UserError


def key(default=dataclasses.MISSING, help=""):
    """A field of a configuration, with what --help says about it."""
    return dataclasses.field(default=default, metadata={"help": help})


def all_keys(config, prefix=""):
    """{"sft.lr": (0.002, "peak learning rate"), ...}: every key's value and explanation."""
    keys = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            keys |= all_keys(value, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = value, field.metadata.get("help", "")
    return keys


def set_keys(config, texts):
    """A copy of config with all `texts`, {"sft.lr": "0.002"}, parsed and set. Raises UserError."""
    keys = all_keys(config)
    own, parts = {}, {}  # values of config itself; {"sft": values of that part}
    for key, text in texts.items():
        if key not in keys:
            raise UserError(f"--set {key}: there is no such key; did you mean "
                            f"{nearest(key, keys)}? --help lists them all")
        part, _, name = key.rpartition(".")
        values = parts.setdefault(part, {}) if part else own
        values[name] = parse(text, keys[key][0], key)

    # all values of a part at once: two may be right only together
    for part, values in parts.items():
        try:
            own[part] = dataclasses.replace(getattr(config, part), **values)
        except UserError as error:
            raise UserError(f"{part}.{error}") from None
    return dataclasses.replace(config, **own)


def nearest(name, names):
    """The one of the names that is most like a mistyped one."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def parse(text, default, key):
    """Text -> a value of the default's type; a tuple is written with commas: 0,1,2."""
    if isinstance(default, tuple):  # an empty one is of whole numbers
        parts = text.split(",") if text else []
        return tuple(parse(part, default[0] if default else 0, key) for part in parts)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        value = type(default)(text)
        if not isinstance(value, float) or math.isfinite(value):
            return value
    except (ValueError, KeyError):
        pass
    wanted = "true or false" if isinstance(default, bool) else type(default).__name__
    raise UserError(f"--set {key}={text}: '{text}' is no {wanted}; the default is {default}")


def key_lines(config):
    """For --help: every key, its default, what it is and its unit."""
    lines = []
    for key, (value, comment) in all_keys(config).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines += textwrap.wrap(f"{key:<30} {text or '(none)':<14} {comment}", 100,
                               initial_indent="  ", subsequent_indent=" " * 48)
    return lines


def check_config(config, counts, sizes):
    """What every run's configuration must obey, the toy's and that of real weights."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be 0 to 2**32 - 1")
    for name in counts:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")
    for name in sizes:
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{name}={getattr(config, name)} must be a number above 0")
    if config.sft.muon_lr or config.sft_kl.muon_lr:
        raise UserError("sft.muon_lr and sft_kl.muon_lr must be 0: Muon trains a model's blocks, "
                        "AdamW an adapter")
