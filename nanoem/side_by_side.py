"""Several seeds at once, each in a process of its own with its share of the cores.

A small model does not fill a machine: two processes with a thread each do more in an hour than one
with two threads. What a seed prints goes to seed-N.log beside its folder; one line here says where
all of them are.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from multiprocessing import get_context

import torch

from nanoem.experiment import STAGES, run_experiment
from nanoem.files import read_json
from nanoem.rows import ROWS


def run_side_by_side(configs, folders, device, rows, n_jobs):
    """Run every configuration in its folder, n_jobs at a time -> [results, ...] in that order.

    Raises what a run raises (the first in order), when the others have ended. When it is
    interrupted, so are the runs; finished stages stay.
    """
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
        keys = [row.key for row in rows]  # a row is code, and code does not travel
        runs = [pool.submit(run_to_log, config, folder, device, keys, n_threads)
                for config, folder in zip(configs, folders)]
        try:
            watch(runs, folders, len(STAGES) + len(rows))
            return [run.result() for run in runs]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_to_log(config, folder, device, keys, n_threads):
    """One run, in this process; what it prints goes to a log beside its folder."""
    torch.set_num_threads(n_threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder), "a", buffering=1) as log, redirect_stdout(log):
        return run_experiment(config, folder, device, [ROWS[key] for key in keys])


def log_of(folder):
    return folder.with_name(folder.name + ".log")


def watch(runs, folders, n_stages):
    """Until all runs have ended: one line with each one's stages and what it is at, and the ETA."""
    started, before = time.perf_counter(), None
    while wait(runs, timeout=1).not_done:
        done = [n_finished(folder) for folder in folders]
        before = sum(done) if before is None else before
        share = (sum(done) - before) / max(1, n_stages * len(runs) - before)
        passed = time.perf_counter() - started
        left = f"{passed * (1 / share - 1) / 60:.0f} min" if share else "?"
        at = "  ".join(f"{folder.name} {n}/{n_stages} {last_word(folder)}"
                       for run, folder, n in zip(runs, folders, done) if run.running())
        if sys.stdout.isatty():
            print(f"\r{at}  ETA {left}\033[K"[:160], end="", flush=True)
    print()


def n_finished(folder):
    """Stages that the folder holds."""
    file = folder / "results.json"
    return len(read_json(file)["seconds"]) if file.exists() else 0


def last_word(folder):
    """What the run is at, from its last line of progress: narrow 40%."""
    log = log_of(folder)
    if not log.exists():
        return "starts"
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        words = file.read().decode(errors="replace").rsplit("\n", 2)[-2:][0].split()
    return " ".join(word for word in (words[0], words[2]) if word) if len(words) > 2 else "..."
