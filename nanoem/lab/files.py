"""Write files and folders atomically: under another name, then renamed."""

import json
import os
import shutil
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from nanoem import UserError


def check_path(path, flag=""):
    """Raise UserError for a path that cannot be: too long, below a file, with a NUL, not UTF-8."""
    try:
        os.stat(str(path).encode())
    except FileNotFoundError:
        pass  # it may come to be
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}{path!s:.80} cannot be used as a path: "
                        f"{getattr(error, 'strerror', '') or error}") from error


def write_file(path, data):
    """Write text, bytes, or an iterable of bytes: never a half-written file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    data = data.encode() if isinstance(data, str) else data
    chunks = [data] if isinstance(data, bytes) else data
    with refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def refusals_named(path):
    """Inside, an OSError (the disk is full, the folder read-only) comes out naming the path."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; when that is mended, "
                      "the same command goes on") from error


def write_json(path, value):
    """Write a value as JSON. NaN and infinity, such as the cosine with zeros, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The dictionary in a JSON file. Raises UserError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(value).__name__}")
    return value


def without_duplicates(pairs):
    """For json's object_pairs_hook: refuse a name that is there twice; python takes the last."""
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"'{name}' is there twice")
        table[name] = value
    return table


def fingerprint(path):
    """The hash of a file's bytes; None for no file."""
    return sha256(Path(path).read_bytes()).hexdigest() if path else None


def fingerprint_folder(path):
    """A hash of a model folder: of each file the name, the size and the bytes. None for no folder.

    Of a file of more than 256 MB it reads 64 kB in every 4 MB: what changes a model changes more.
    """
    if not path:
        return None
    digest, step = sha256(), 2**22
    kinds = ".json", ".jinja", ".safetensors"
    for path in sorted(path for path in Path(path).iterdir() if path.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(step if size <= 2**28 else 2**16))
    return digest.hexdigest()


@contextmanager
def new_folder(path, last, ours=()):
    """Yield a temporary folder; if all goes well, `path` holds its files.

    What else `path` holds stays there. Raises UserError when that is no folder, or when it holds
    data of another kind: a folder, or a file such as other weights, that is not among `ours`, the
    names to be written. The file named `last` goes first and comes last: a folder that was killed
    in the middle lacks it, and is read by nobody.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    temporary = path.with_name(f".{path.name}.part")
    check_others(path, {*ours, last})
    if (path / last).exists() and not all((path / name).exists() for name in ours):
        raise UserError(f"{path} holds a {last} of something else; choose another folder")
    with refusals_named(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    try:
        yield temporary
        with refusals_named(path):
            if path.is_dir():
                (path / last).unlink(missing_ok=True)
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                    os.replace(file, path / file.name)
            else:
                os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_others(path, ours):
    """Refuse to write into a file, or into a folder with another model, a run or the like."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    for other in sorted(path.iterdir()) if path.exists() else ():
        data = other.is_dir() or other.suffix in (".json", ".jinja", ".safetensors", ".bin", ".pt")
        if data and other.name not in ours and not other.name.startswith("."):
            raise UserError(f"{path} holds {other.name}, which does not belong to what is to be "
                            "saved there; choose another folder")
