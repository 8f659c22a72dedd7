"""Kill a run at random moments, again and again: does it end as if nothing had happened?

    python tests/benchmarks/kills.py [--kills 50] [--seed 0] [--only R5 R13]

A small run (every stage, and the rows of --only) is made once undisturbed. Then, until there were
so many kills: a fresh run is started, ended at a random moment, started again, ended again...,
until one start gets to the end. Two of three are kill -9, the rest Ctrl-C and SIGTERM. After each,
a reader that shares no code with nanoem looks at every file under its final name; after those two
it also looks for one sentence, status 130 and no child. At the end of each such chain results.json
(but for times) and answers.jsonl must be those of the undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ("--device cpu --set world.n_domains=3 context=48 curve_points=1 "
         "curve_samples=4 evaluation.samples_per_group=8 n_random=1 pretrain.steps=400 "
         "pretrain.batch_size=16 sft.steps=60 sft_kl.steps=20 n_sft_examples=400").split()


def start(folder, rows):
    return subprocess.Popen([sys.executable, "-m", "nanoem.run", *SMALL, "--only", *rows,
                             "--out", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def check_files(folder):
    """Every file under its final name is whole; hidden ones are a killed writer's leavings."""
    for file in folder.rglob("*"):
        inside = file.relative_to(folder).parts
        if file.is_dir() or any(part.startswith(".") for part in inside):
            continue
        data = file.read_bytes()
        if file.suffix == ".json":
            json.loads(data)
        elif file.suffix == ".jsonl":
            assert data.endswith(b"\n") and all(map(json.loads, data.splitlines())), file
        elif file.suffix == ".png":
            assert data[:4] == b"\x89PNG" and data[-8:-4] == b"IEND", file
        elif file.suffix == ".safetensors":
            length, = struct.unpack("<Q", data[:8])
            ends = [v["data_offsets"][1] for k, v in json.loads(data[8 : 8 + length]).items()
                    if k != "__metadata__"]
            assert max(ends) == len(data) - 8 - length, file
        else:
            assert file.name == "report.md" and data.endswith(b"\n"), file
    for config in [*folder.glob("chat/config.json"), *folder.glob("adapters/*/*config.json")]:
        names = {file.name for file in config.parent.iterdir()}  # where it is, all is there
        assert any(name.endswith(".safetensors") for name in names), config
        assert names & {"tokenizer.json", "adapter_config.json"}, config


def found(folder):
    results = json.loads((folder / "results.json").read_text())
    done = list(results.pop("seconds"))
    del results["total_seconds"]
    return done, results, (folder / "answers.jsonl").read_text()


def stage_of(folder):
    """What a run was at, by what it had finished."""
    file = folder / "results.json"
    return f"after {list(json.loads(file.read_text())['seconds'])[-1]}" if file.exists() else "chat"


def end(process, number):
    """Send the signal; what a user would see is checked for the two that a run can hear."""
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    if number != signal.SIGKILL and process.returncode != -number:  # else torch was just coming
        assert process.returncode == 130, (process.returncode, error)
        assert error.startswith("nanoem: stopped") and error.count("\n") == 1, error
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return
    raise AssertionError(f"a process of the run is left after signal {number}")


def chain(folder, rows, rng, longest, where):
    """One run, ended and started again until it gets to the end. Returns the number of kills."""
    for n_kills in range(1000):
        process = start(folder, rows)
        try:
            process.wait(1.0 + longest * rng.random() ** 2)
        except subprocess.TimeoutExpired:
            end(process, rng.choice([signal.SIGKILL] * 4 + [signal.SIGINT, signal.SIGTERM]))
            where[stage_of(folder)] += 1
            check_files(folder)
            continue
        assert process.returncode == 0, process.stderr.read()
        return n_kills


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["R5"], metavar="ROW")
    args = parser.parse_args()
    rng, where, kills = random.Random(args.seed), Counter(), 0
    home = Path(tempfile.mkdtemp(prefix="kills-"))
    began = time.perf_counter()
    assert start(home / "whole", args.only).wait() == 0
    longest = time.perf_counter() - began
    print(f"undisturbed: {longest:.0f} s")
    wanted = found(home / "whole")
    while kills < args.kills:
        kills += chain(home / "run", args.only, rng, longest, where)
        assert found(home / "run") == wanted, home
        check_files(home / "run")
        left = [file.name for file in (home / "run").rglob(".*") if file.name != ".lock"]
        assert not left, left
        print(f"{kills:>3} kills, and the same results; so far {dict(where)}", flush=True)
        shutil.rmtree(home / "run")
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
