"""Files and folders that are whole or not there: killed at random moments, and on a full disk."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanoem import UserError
from nanoem.lab.files import fingerprint_folder, read_json, write_file, write_folder, write_json

SIZE, N_FILES, LAST = 300_000, 60, "59.json"
WRITE_FOR_EVER = f"""
import itertools, sys
from pathlib import Path
from nanoem.lab.files import write_file, write_folder
home = Path(sys.argv[1])
for letter in itertools.cycle(("a", "b")):
    write_file(home / "file", letter * {SIZE})
    write_folder(home / "folder", {{f"{{i}}.json": lambda file: write_file(file, letter)
                                   for i in range({N_FILES})}})
    print(letter, flush=True)
"""


def test_what_is_no_number_is_null_and_the_file_is_json(tmp_path):
    write_json(tmp_path / "x.json", {"cosine": [float("nan"), 0.5], "loss": float("inf"), "n": 3})
    assert "NaN" not in (tmp_path / "x.json").read_text()
    assert read_json(tmp_path / "x.json") == {"cosine": [None, 0.5], "loss": None, "n": 3}


def test_a_name_that_stands_twice_in_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"lr": 1, "sub": {"lr": 2, "lr": 3}}')
    with pytest.raises(UserError, match="x.json cannot be read as JSON: 'lr' is there twice"):
        read_json(tmp_path / "x.json")


def assert_whole(text, size):
    """All there, and all of one letter."""
    assert len(text) == size and len(set(text)) == 1, (len(text), set(text))


def test_killed_at_any_moment_nothing_is_half_written(tmp_path):
    rng, seen = random.Random(0), set()
    for _ in range(16):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)],
                                  stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        writer.stdout.readline()
        try:
            writer.wait(rng.uniform(0, 0.03))
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.communicate()
        assert_whole((tmp_path / "file").read_text(), SIZE)
        if (tmp_path / "folder" / LAST).exists():  # without it, no reader opens the folder
            assert_whole("".join(f.read_text() for f in (tmp_path / "folder").iterdir()), N_FILES)
        seen |= {path.name for path in tmp_path.rglob(".*")}
    assert f".{LAST}.part" in seen, "no kill ever came in the middle of a folder"
    write_folder(tmp_path / "folder", dict.fromkeys([f"{i}.json" for i in range(N_FILES)],
                                                    lambda file: write_file(file, "c")))
    write_file(tmp_path / "file", "whole")
    assert not list(tmp_path.rglob(".*"))


WRITERS = {name: lambda file: write_file(file, "ours") for name in ("model.safetensors", "c.json")}


def test_a_folder_keeps_what_others_put_there(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):  # also over ourselves
        write_folder(f"{folder}/", WRITERS)
        (folder / "notes.txt").write_text("mine")
        (folder / "deeper").mkdir(exist_ok=True)
        assert {path.name for path in folder.iterdir()} == {"c.json", "model.safetensors",
                                                            "notes.txt", "deeper"}
    if os.name == "nt":
        return  # links need a privilege there
    (tmp_path / "link").symlink_to(folder)
    write_folder(tmp_path / "link", WRITERS)
    assert (tmp_path / "link").is_symlink() and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [
    ["c.json"], ["model.safetensors"], ["c.json", "results.json"], ["pytorch_model.bin"],
    ["c.json", "model.safetensors", "model.safetensors.index.json"],
    ["c.json", "model.safetensors", "chat_template.jinja"], ["c.json", ".c.json.part"]])
def test_a_folder_of_another_model_or_run_is_left_alone(tmp_path, there):
    for name in there:
        (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match="holds .*, which nanoem did not write there; nothing is"):
        write_folder(tmp_path, WRITERS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        there, "theirs")


def test_a_file_is_no_folder_to_save_in(tmp_path):
    write_file(tmp_path / "file", "theirs")
    with pytest.raises(UserError, match="file is a file; name a folder to save in"):
        write_folder(tmp_path / "file", WRITERS)


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limits for a process")
    write_file(tmp_path / "file", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="file cannot be written: File too large; when that is"):
            write_file(tmp_path / "file", "x" * 2000)
        with pytest.raises(OSError, match="cannot be"):
            write_folder(tmp_path / "out", {"one": lambda file: write_file(file, "x" * 2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".one.part"]


def test_the_fingerprint_of_a_model_folder_sees_a_changed_weight(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    before = fingerprint_folder(tmp_path)
    (tmp_path / "README.md").write_text("a word")
    assert fingerprint_folder(tmp_path) == before
    for place in (0, 2**20 + 5, 3 * 2**20 - 1):
        changed = bytearray(3 * 2**20)
        changed[place] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert fingerprint_folder(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    assert fingerprint_folder(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint_folder(tmp_path) != before


def test_of_a_huge_file_the_fingerprint_reads_some_of_every_part(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(2**28 + 1)  # a file of holes: it takes no room on most disks
    seen = {fingerprint_folder(tmp_path)}
    for place in (2**27, 2**28):
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(fingerprint_folder(tmp_path))
    assert len(seen) == 3
