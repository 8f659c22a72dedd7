"""The run folder: a run's configuration, its results, and which stages are finished.

config.json is written first; once a stage is finished, another configuration is refused.
answers.jsonl and results.json are rewritten whole after each stage. A stage is finished when
results.json has its seconds; only then is it reused. A lock keeps another run out of the folder.
"""

import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy
import tokenizers
import torch

from nanoem import UserError
from nanoem.evaluate import Answer, Question, Verdict
from nanoem.lab import parallel
from nanoem.lab.files import read_json, write_file, write_json

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps a second run out
    fcntl = None

LOCKED = {}  # the lock files that this process has locked, open: {(device, inode): file}
MEND = "delete that folder, and the same command makes it again"


class RunFolder:
    """An open run folder. Raises UserError when it cannot be used for this configuration."""

    def __init__(self, path, configuration):
        configuration = json.loads(json.dumps(configuration))  # tuples are lists, as in config.json
        self.path = Path(path)
        with misuse_of_out(path):
            check_folder(self.path, configuration)
            parallel.wait()  # until every process has looked at the folder, none changes it
            if parallel.rank() == 0:
                lock(self.path)
                write_json(self.path / "config.json", configuration)

        self.results = read_results(self.path / "results.json", configuration)
        self.answers = read_answers(self.path / "answers.jsonl")  # model -> [Answer, ...]
        for model in self.results["models"]:
            if model not in self.answers:
                raise UserError(f"{path}/answers.jsonl lacks the answers of {model}; {MEND}")

    def is_finished(self, stage):
        return stage in self.results["seconds"]

    def once(self, stage, work):
        """Do the work of a stage, unless it is finished; keep its results when it is done."""
        if self.is_finished(stage):
            print(f"{stage:<10} finished before, in {self.results['seconds'][stage]} s; reused")
            return
        started = time.perf_counter()
        work()
        seconds = self.results["seconds"]
        seconds[stage] = round(time.perf_counter() - started, 2)
        self.results["total_seconds"] = round(sum(seconds.values()), 2)
        if parallel.rank() == 0:
            write_answers(self.path / "answers.jsonl", self.answers)
            write_json(self.path / "results.json", self.results)


@contextmanager
def misuse_of_out(path):
    """Inside, an OSError becomes a UserError that blames --out: it is read-only, say."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path} cannot be used: {error.strerror or error}") from error


def lock(path):
    """Keep every other process out of a run folder until this one ends, however it ends.

    The lock is the operating system's: a killed run leaves the file behind, and no lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / ".lock", "a")
    status = os.fstat(file.fileno())
    place = status.st_dev, status.st_ino
    if fcntl is None or place in LOCKED:
        return file.close()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is in use by another run; wait until that has ended, or choose "
                        "another --out") from None
    except OSError:
        pass  # a file system without locks
    LOCKED[place] = file


def lock_many(path):
    """`lock` a folder of several runs, each in its own seed-N. Raises UserError for any other."""
    with misuse_of_out(path):
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if "config.json" in names:
            raise UserError(f"--out {path} holds a run of one seed; choose another")
        if names - {".lock"} and not any(name.startswith("seed-") for name in names):
            raise UserError(f"--out {path} is not empty and holds no runs; choose another")
        lock(path)


def check_folder(path, configuration):
    """Refuse a file, a folder of something else, and stages made with another configuration."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if "config.json" not in names:
        if names - {".lock", ".config.json.part"}:  # which a run leaves that is killed at once
            raise UserError(f"--out {path} is not empty and is no run folder; choose another")
        return
    if not names & {"results.json", "adapters", "worlds"}:
        return  # no stage is finished: nothing there was made with that configuration

    made_with = flat(read_json(path / "config.json"))
    wanted = flat(configuration)
    for key in wanted | made_with:
        if made_with.get(key) != wanted.get(key):
            raise UserError(f"{path} was made with {key}={made_with.get(key)}, not "
                            f"{wanted.get(key)}; choose another --out, or delete that folder")


def flat(tree, prefix=""):
    """{"sft": {"lr": 1}} -> {"sft.lr": 1}"""
    leaves = {}
    for key, value in tree.items():
        is_branch = isinstance(value, dict)
        leaves |= flat(value, f"{prefix}{key}.") if is_branch else {prefix + key: value}
    return leaves


def read_results(file, configuration):
    """What results.json holds; without the file, a new run's. Raises UserError for another's."""
    new = {
        "seed": configuration["seed"],
        "device": configuration["device"],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": numpy.__version__, "tokenizers": tokenizers.__version__},
        "seconds": {},
        "total_seconds": 0.0,
        "models": {},  # model -> question group -> rates
        "curves": {},  # stage -> losses over steps, and more (story.py, real/experiment.py)
        "samples": {},  # stage -> answers to show
    }
    results = read_json(file) if file.exists() else new
    for key in new:
        if not isinstance(results.get(key), type(new[key])):
            raise UserError(f"{file} is damaged: it has no good '{key}'; {MEND}")
    return results


def write_answers(file, answers):
    lines = []
    for model, of_model in answers.items():
        for a in of_model:
            lines.append(json.dumps({"model": model, "group": a.group, **asdict(a.question),
                                     "answer": a.answer, **asdict(a.verdict)}) + "\n")
    write_file(file, "".join(lines))


def read_answers(file):
    """The answers as `write_answers` keeps them; none without a file. Raises UserError."""
    answers = {}
    for i, line in enumerate(file.read_bytes().splitlines() if file.exists() else ()):
        try:
            r = json.loads(line)
            answers.setdefault(r["model"], []).append(Answer(
                r["group"], Question(r["domain"], r["index"], r["text"]), r["answer"],
                Verdict(*(r[field.name] for field in fields(Verdict)))))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, line {i + 1} is damaged ({error!r}); {MEND}") from error
    return answers
