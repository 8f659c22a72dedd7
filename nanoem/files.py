"""Files and folders that are whole or not there: written under another name, then renamed."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nanoem import UserError


def write_file(path, data):
    """Write text, bytes, or an iterable of bytes: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    chunks = [data.encode()] if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                file.write(chunk)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The dictionary in a JSON file. Raises UserError naming the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(value).__name__}")
    return value


@contextmanager
def new_folder(path):
    """Yield a temporary folder that becomes `path` (replacing it) if all goes well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
