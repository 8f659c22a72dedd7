"""What the chapters' tests, the grader and tests/test_tutorial.py share: whose answer is tested?

A chapter is a folder with README.md, exercise.py (stubs for the student) and test_exercise.py. The
tests take `answer`, an object with the chapter's functions: the student's, or nanoem's own, which
are the only solution there is. test_exercise.py says in EXERCISES which those are.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

TUTORIAL = Path(__file__).parent
CHAPTERS = sorted(path.parent for path in TUTORIAL.glob("[0-9][0-9]_*/test_exercise.py"))
SMALL_MODEL = TUTORIAL / "small_model"  # chat/ and adapters/ of `python -m nanoem.run --seed 0`


def load_file(path):
    """A Python file as a module, freshly read, under a name of its own."""
    path = Path(path)
    spec = spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solutions(tests):
    """nanoem's own functions, as the answer to a chapter's tests (a module)."""
    return SimpleNamespace(**tests.EXERCISES)


def exercise_tests(tests, exercise):
    """The chapter's tests of one exercise: test_NAME_... for the longest NAME that fits."""
    def belongs_to(test):
        return max((name for name in tests.EXERCISES if test.startswith(f"test_{name}_")), key=len)

    return [test for name, test in vars(tests).items()
            if name.startswith("test_") and belongs_to(name) == exercise]


def first_failure(tests, exercise, answer):
    """Run the tests of one exercise until one fails -> what it raised, or None when all pass."""
    for test in exercise_tests(tests, exercise):
        try:
            test(answer)
        except Exception as failure:  # whatever a wrong answer raises is a failure
            return failure
    return None
