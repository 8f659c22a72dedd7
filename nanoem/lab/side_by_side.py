"""Several seeds at once, each in a process of its own with one thread.

A small model does not fill a machine: two processes with a thread each do more in an hour than one
with two threads. What a seed prints goes to seed-N.log beside its folder.
"""

import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from nanoem import StageFailed
from nanoem.lab.files import read_json
from nanoem.rows import ROWS
from nanoem.story import run_experiment


def run_side_by_side(configs, folders, device, stages, rows, n_jobs):
    """Run every configuration in its folder, n_jobs at a time -> [results, ...] in that order.

    Raises what a run raises, when the others have ended. Ctrl-C ends all; finished stages stay.
    """
    n_jobs = min(n_jobs, len(configs))
    keys = [row.key for row in rows]  # rows hold functions, which cannot be pickled
    with ProcessPoolExecutor(n_jobs, get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            # children ignore Ctrl-C, as they inherit it: the parent hears it, and ends them
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            runs = [pool.submit(run_to_log, config, folder, device, stages, keys)
                    for config, folder in zip(configs, folders)]
            signal.signal(signal.SIGINT, handler)

            watch(runs, folders, {*stages, *(row.name for row in rows)})
            return [run.result() for run in runs]
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        except BrokenProcessPool as error:
            raise StageFailed("one of the runs was ended from outside, perhaps because memory was "
                              "short; the same command goes on, fewer --jobs need less") from error


def toy_threads():
    """Let torch work with one thread, or with OMP_NUM_THREADS if that is set; returns the number.

    Two save a fifth of the time on a free machine. On a busy one they cost up to four times as
    much, because they wait for each other at every small operation. And they round differently.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    return torch.get_num_threads()


def end_with_parent():
    """In a child: end when the parent ends, even by kill -9."""
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def run_to_log(config, folder, device, stages, keys):
    """One run, in this process; what it prints goes to a log beside its folder."""
    toy_threads()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", buffering=1, encoding="utf-8") as log, redirect_stdout(log):
        return run_experiment(config, folder, device, stages, [ROWS[key] for key in keys])


def watch(runs, folders, names):
    """On a terminal, show how far each run is, and the ETA, in one line until all have ended."""
    if not sys.stdout.isatty():
        wait(runs)
        return
    started = time.perf_counter()
    n_all = len(names) * len(runs)
    n_before = sum(n_finished(folder, names) for folder in folders)
    while wait(runs, timeout=1).not_done:
        n_done = [n_finished(folder, names) for folder in folders]
        share = (sum(n_done) - n_before) / max(1, n_all - n_before)
        seconds = time.perf_counter() - started
        left = f"{seconds * (1 / share - 1) / 60:.0f} min" if share else "?"
        at = "  ".join(f"{folder.name} {n}/{len(names)} {last_progress(folder)}"
                       for run, folder, n in zip(runs, folders, n_done) if run.running())
        print(f"\r{at}  ETA {left}\033[K"[:160], end="", flush=True)
    print()


def n_finished(folder, names):
    """How many of these stages the folder holds."""
    file = folder / "results.json"
    return len(names & read_json(file).get("seconds", {}).keys()) if file.exists() else 0


def last_progress(folder):
    """What the run is at, from its last line of progress: narrow 40%."""
    log = Path(f"{folder}.log")
    if not log.exists():
        return "starts"
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        lines = file.read().decode(errors="replace").splitlines()
    words = lines[-1].split() if lines else []
    return f"{words[0]} {words[2]}" if len(words) > 2 else "..."
