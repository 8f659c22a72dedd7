"""Write files atomically, under another name, then renamed; folders with what opens them last."""

import json
import os
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from nanoem import UserError

# what opens a model or an adapter also reads these, whoever wrote them
MODEL_FILES = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".model", ".gguf")


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


def write_folder(path, writers):
    """Write the files {name: write(file)} into a folder, and leave whatever else it holds.

    Readers need the last of the files. It goes first and comes last, so a folder whose writer was
    killed opens nowhere, and the next call goes on. Raises UserError for a path that is a file, and
    for a folder with a model's files that are not ours: nothing of others is replaced.
    """
    path, last = Path(path), list(writers)[-1]
    begun = path / f".{last}.part"  # marks a folder of ours in which `last` is yet to come
    with refusals_named(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; name a folder to save in")
        path.mkdir(parents=True, exist_ok=True)

        # ours is a folder with all the files, or with the mark in place of the last
        names = {entry.name for entry in path.iterdir()}
        is_ours = begun.name in names if last not in names else writers.keys() <= names
        others = [name for name in sorted(names - (writers.keys() if is_ours else set()))
                  if name in writers or name.lower().endswith(MODEL_FILES)]
        if others:
            raise UserError(f"{path} holds {others[0]}, which nanoem did not write there; nothing "
                            "is replaced, so save in another folder")
        os.replace(path / last, begun) if last in names else begun.touch()

    for name, write in writers.items():
        write(begun if name == last else path / name)
    with refusals_named(path):
        os.replace(begun, path / last)
