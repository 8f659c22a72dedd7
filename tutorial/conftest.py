"""`python -m pytest tutorial/03_lora` tests a student's exercise.py; `--solution` tests nanoem.

Bare `python -m pytest` leaves the tutorial out: on a fresh clone its exercises are unfinished.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from classroom import TUTORIAL, load_file, solutions  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--solution", action="store_true", help="test nanoem's own functions instead")


def pytest_configure(config):
    config.option.importmode = "importlib"  # every chapter has a file of the same name


def pytest_ignore_collect(collection_path, config):
    asked = [Path(config.invocation_params.dir, arg.split("::")[0]).resolve() for arg in config.args]
    if not any(path == TUTORIAL or TUTORIAL in path.parents for path in asked):
        return True


@pytest.fixture
def answer(request):
    """The functions under test: exercise.py's, or with --solution nanoem's."""
    if request.config.getoption("--solution"):
        return solutions(request.module)
    return load_file(request.path.with_name("exercise.py"))
