"""`python -m pytest tutorial/03_lora` tests a student's exercise.py; `--solution` tests nanoem.

It ends with one line an exercise: right, not written yet, or the likely mistake in words;
`--tb=short` shows where as well. Bare `python -m pytest` leaves the tutorial out: on a fresh clone
its exercises are unfinished.
"""

import sys
from pathlib import Path

import pytest

# nanoem and the tutorial's own modules are found from any folder that pytest starts in
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from classroom import (TUTORIAL, careful, exercise_of, load_file, number_of, solutions,  # noqa: E402
                       verdict_lines)

FIRST_FAILURES = pytest.StashKey[dict]()  # {(number, exercise): what it raised, or None}


def pytest_addoption(parser):
    parser.addoption("--solution", action="store_true", help="test nanoem's own functions instead")


def is_asked(config):
    """Was the tutorial, or a part of it, named on the command line?"""
    here = config.invocation_params.dir
    asked = [Path(here, arg.split("::")[0]).resolve() for arg in config.args]
    return any(path == TUTORIAL or TUTORIAL in path.parents for path in asked)


def pytest_configure(config):
    config.option.importmode = "importlib"  # every chapter has a file of the same name
    config.stash[FIRST_FAILURES] = {}
    if is_asked(config) and config.option.tbstyle == "auto":
        config.option.tbstyle, config.option.reportchars = "no", ""  # the lines below say it


def pytest_ignore_collect(collection_path, config):
    if not is_asked(config):
        return True


@pytest.fixture(scope="module")  # read once: what an answer keeps from call to call shows
def answer(request):
    """The functions under test: exercise.py's, or with --solution nanoem's."""
    if request.config.getoption("--solution"):
        return careful(request.module, solutions(request.module))
    return careful(request.module, load_file(request.path.with_name("exercise.py")))


def pytest_runtest_makereport(item, call):
    failures, error = item.config.stash[FIRST_FAILURES], call.excinfo and call.excinfo.value
    name = exercise_of(item.module, item.originalname)
    key = number_of(item.path.parent.name, item.module, name), name
    if call.when == "call" or error:
        failures[key] = failures.get(key) or error


def pytest_terminal_summary(terminalreporter, config):
    if not is_asked(config):
        return
    for report in terminalreporter.stats.get("error", []):
        if isinstance(report, pytest.CollectReport):  # not even our own file could be read
            terminalreporter.write_line(str(report.longrepr))
    if config.stash[FIRST_FAILURES]:
        terminalreporter.write_line("")
        for line in verdict_lines(config.stash[FIRST_FAILURES]):
            terminalreporter.write_line(line)
