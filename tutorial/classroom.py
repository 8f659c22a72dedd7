"""What the chapters' tests, the grader and tests/test_tutorial.py share: whose answer is tested?

A chapter is a folder with README.md, exercise.py (stubs for the student) and test_exercise.py. The
tests take `answer`, an object with the chapter's functions: the student's, or nanoem's own, which
are the only solution there is. test_exercise.py says in EXERCISES which those are.
"""

import textwrap
from functools import wraps
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch

TUTORIAL = Path(__file__).parent
UNFINISHED = "not written yet"  # what every stub says, and what is told of it
CHAPTERS = sorted(path.parent for path in TUTORIAL.glob("[0-9][0-9]_*/test_exercise.py"))


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


def tensors_in(x):
    """All tensors in nested arguments."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def careful(tests, answer):
    """The answer, whose exercises fail, in words, where a call changes its tensors in place.

    Else the next comparison would be with changed numbers, and blame something else.
    """
    def watched(function):
        @wraps(function)
        def called(*args, **kwargs):
            inputs = tensors_in((args, kwargs))
            before = [x.detach().clone() for x in inputs]
            result = function(*args, **kwargs)
            for x, old in zip(inputs, before):
                same = x.shape == old.shape and torch.allclose(x, old, 0, 0, equal_nan=True)
                assert same, "the inputs were changed in place; work on new tensors"
            return result
        return called

    functions = {name: watched(function) for name in tests.EXERCISES
                 if callable(function := getattr(answer, name, None))}
    return SimpleNamespace(**{**vars(answer), **functions})


def exercise_of(tests, test):
    """The exercise that a test function is of: test_NAME_... for the longest NAME that fits."""
    return max((name for name in tests.EXERCISES if test.startswith(f"test_{name}_")), key=len)


def exercise_tests(tests, exercise):
    """The chapter's tests of one exercise."""
    return [test for name, test in vars(tests).items()
            if name.startswith("test_") and exercise_of(tests, name) == exercise]


def number_of(chapter, tests, exercise):
    """3.2 for the second exercise of 03_lora."""
    return f"{int(chapter[:2])}.{[*tests.EXERCISES].index(exercise) + 1}"


def first_failure(tests, exercise, answer):
    """Run the tests of one exercise until one fails -> what it raised, or None when all pass."""
    answer = careful(tests, answer)
    for test in exercise_tests(tests, exercise):
        try:
            test(answer)
        except Exception as failure:  # whatever a wrong answer raises is a failure
            return failure
    return None


def in_words(error, exercise=""):
    """What a test of an exercise raised, in words; an error in exercise.py with its line."""
    if error is None:
        return "right"
    text = (str(error).strip() or "failed without a message").splitlines()[0]
    if isinstance(error, NotImplementedError) and UNFINISHED in text:  # torch has such errors, too
        if text.startswith(f"{exercise} is"):
            return UNFINISHED
        return f"it calls another exercise: {text}; write that one first, or take nanoem's"
    if isinstance(error, AssertionError):
        return text
    lines, at = [], error.__traceback__
    while at:
        if Path(at.tb_frame.f_code.co_filename).name == "exercise.py":
            lines.append(at.tb_lineno)
        at = at.tb_next
    where = f" (exercise.py, line {lines[-1]})" if lines else ""
    if "NoneType" in text and not lines:  # our test stumbled over what it got
        where = "; is a return missing?"
    return f"{type(error).__name__}: {text}{where}"


def verdict_lines(failures, width=100):
    """{(number, exercise): what it raised, or None} -> aligned lines, one or more an exercise."""
    column = max(len(f"{number} {name}") for number, name in failures) + 2
    return [line for (number, name), error in failures.items() for line in textwrap.wrap(
        in_words(error, name), width, initial_indent=f"{f'{number} {name}':<{column}}",
        subsequent_indent=" " * column)]
