"""Score students' exercises with our tests: `python tutorial/grade.py FOLDER ...`

Each folder is a student's copy of the repository or of its tutorial/. Of it only the chapters'
exercise.py are read; tests and nanoem are ours. A chapter's exercises run in a process of their
own with a time limit: an endless loop or a crash costs that exercise only. This is no sandbox: it
runs what students wrote, with your rights.
"""

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorial")]
from classroom import CHAPTERS, first_failure, in_words, load_file  # noqa: E402

START_UP = 120  # seconds in which a process must have imported torch and the tests
LONGEST = 300  # letters of a reason
SAME_WORK = {"attend": "attend_by_hand", "lora_delta": "delta", "next_token_loss": "sft_loss"}


class GradeError(Exception):
    """A mistake of the one who grades, told in one sentence."""


# --- one chapter of one student, in a process of its own ------------------------------------------


def work(student, chapter, exercises, report):
    """Test the exercises one after the other; tell the report file what happens, line by line."""
    def tell(*what):
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")

    tests = load_file(ROOT / "tutorial" / chapter / "test_exercise.py")
    file = Path(student) / chapter / "exercise.py"
    tell("loading")
    try:
        answer = load_file(file)
    except BaseException as error:  # whatever a student's file raises, SystemExit too
        tell("broken", f"exercise.py cannot be imported: {in_words(error)}"[:LONGEST])
        return
    source = file.read_bytes()  # python knows its encoding
    for name in exercises:
        tell("start", name)
        tell("done", name, verdict(tests, name, answer, source))


def verdict(tests, name, answer, source):
    """None for a right answer, or in one line what is wrong with it."""
    if not callable(getattr(answer, name, None)):
        return f"there is no function {name}"
    if hands_over(source, name) or getattr(answer, name) is tests.EXERCISES[name]:
        return f"the work is handed to nanoem's own {name}"
    try:
        failure = first_failure(tests, name, answer)
    except BaseException as error:
        failure = error
    return in_words(failure, name)[:LONGEST] if failure else None


def hands_over(source, name):
    """Does the function `name` in this source use nanoem's, or another that does its work?"""
    tree, names = ast.parse(source), (name, SAME_WORK.get(name, name))
    theirs = {alias.asname or alias.name
              for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              and (node.module or "").startswith("nanoem")
              for alias in node.names if alias.name in names}
    functions = [node for node in tree.body if getattr(node, "name", None) == name]
    if not functions:
        return bool(theirs)
    if name in theirs and not any(isinstance(node, ast.ImportFrom)
                                  for node in ast.walk(functions[-1])):
        theirs.discard(name)  # the student's function has taken the imported one's place
    return any(isinstance(node, ast.Name) and node.id in theirs
               or isinstance(node, ast.Attribute) and node.attr in names
               for node in ast.walk(functions[-1]))


# --- watching that process ------------------------------------------------------------------------


def grade_chapter(student, chapter, exercises, seconds):
    """{exercise: None if right, else what is wrong} of one student's chapter."""
    found, left = {}, list(exercises)
    if not (student / chapter / "exercise.py").is_file():
        return dict.fromkeys(exercises, "there is no exercise.py")
    while left:
        with tempfile.TemporaryDirectory() as folder:
            lines, why = watch(student, chapter, left, seconds, Path(folder))
        broken = [line[1] for line in lines if line[0] == "broken"]
        started = [line[1] for line in lines if line[0] == "start"]
        found |= {line[1]: line[2] for line in lines if line[0] == "done"}
        if broken or not started:  # it is the file, or before: no exercise can be tested
            why = broken[0] if broken else f"exercise.py {why} while it is imported"
            return found | dict.fromkeys(left, why)
        if started[-1] not in found:
            found[started[-1]] = why
        left = [name for name in left if name not in found]
    return found


def watch(student, chapter, exercises, seconds, folder):
    """Run `work` in a process -> the lines it reported, and how it ended."""
    report = folder / "report"
    report.touch()
    command = [sys.executable, str(Path(__file__).resolve()), "--work", str(student), chapter,
               *exercises, str(report)]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True)
    n_seen, deadline = 0, time.monotonic() + START_UP
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            n_lines = report.read_text(encoding="utf-8").count("\n")
            if n_lines > n_seen:
                n_seen, deadline = n_lines, time.monotonic() + seconds
        timed_out = process.poll() is None
    finally:
        stop(process)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise GradeError(f"our own tests of {chapter} did not start; does `python -m pytest "
                         f"tutorial/{chapter} --solution` pass?")
    return lines, (f"takes longer than {seconds:g} seconds (an endless loop?)" if timed_out
                   else f"ends python (exit code {process.returncode})")


def stop(process):
    """End a process and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows, or ended before
        process.kill()
    process.wait()


# --- the table ------------------------------------------------------------------------------------


def find_chapters(folder):
    """The folder that holds a student's chapters."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise GradeError(f"{folder} is not a folder")
    for place in (folder / "tutorial", folder):
        if any((place / chapter.name).is_dir() for chapter in CHAPTERS):
            return place
    raise GradeError(f"{folder} holds no chapter; name a copy of the repository or of tutorial/")


def names_of(folders):
    """A short name for each folder: its own, or what is above a tutorial/; no two are equal."""
    paths = [Path(folder).resolve() for folder in folders]
    short = [path.parent.name if path.name == "tutorial" else path.name for path in paths]
    return [name if Counter(short)[name] == 1 else str(path) for name, path in zip(short, paths)]


def numbers(text):
    """"4,5" -> [4, 5], for the command line."""
    return [int(part) for part in text.split(",")]


def pick_chapters(wanted):
    picked = [c for c in CHAPTERS if not wanted or int(c.name[:2]) in wanted]
    missing = set(wanted or ()) - {int(c.name[:2]) for c in picked}
    if missing:
        raise GradeError(f"there is no chapter {min(missing)} with exercises")
    return picked


def print_table(scores, exercises):
    """scores: {student: {chapter: {exercise: None or what is wrong}}}."""
    width = max(map(len, [*scores, "student"]))
    print(f"{'student':<{width}}", *(f"{chapter[:2]:>5}" for chapter in exercises), "  total")
    n = sum(map(len, exercises.values()))
    for student, chapters in scores.items():
        right = {c: list(found.values()).count(None) for c, found in chapters.items()}
        cells = [f"{f'{right[c]}/{len(exercises[c])}':>5}" for c in exercises]
        total = sum(right.values())
        print(f"{student:<{width}}", *cells, f"{f'{total}/{n}':>7} {total / n:5.0%}")


def print_reasons(scores, exercises):
    width = max([18, *(len(name) for names in exercises.values() for name in names)])
    for student, chapters in scores.items():
        print(f"\n{student}")
        for chapter, found in chapters.items():
            for i, name in enumerate(exercises[chapter], 1):
                print(f"  {int(chapter[:2])}.{i} {name:<{width}} {found[name] or 'right'}")


def grade(folders, chapters=None, seconds=60):
    """{student: {chapter: {exercise: None or what is wrong}}}, and {chapter: [exercise, ...]}."""
    places = [find_chapters(folder) for folder in folders]  # all of them before the long work
    exercises = {path.name: list(load_file(path / "test_exercise.py").EXERCISES)
                 for path in pick_chapters(chapters)}
    scores = {}
    for name, place in zip(names_of(folders), places):
        print(f"grading {name} ...", file=sys.stderr, flush=True)
        scores[name] = {chapter: grade_chapter(place, chapter, names, seconds)
                        for chapter, names in exercises.items()}
    return scores, exercises


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--work"]:
        work(argv[1], argv[2], argv[3:-1], argv[-1])
        return 0
    parser = argparse.ArgumentParser(description="Score students' exercises with our tests.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER",
                        help="a student's copy of the repository or of its tutorial/")
    parser.add_argument("--chapters", type=numbers, metavar="N,N,...", help="only these chapters")
    parser.add_argument("--why", action="store_true",
                        help="also print, exercise by exercise, what is wrong")
    parser.add_argument("--seconds", type=float, default=60,
                        help="time for one exercise (default 60; the tests need less than 5)")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g} must be above 0")
    try:
        scores, exercises = grade(args.folders, args.chapters, args.seconds)
    except GradeError as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    print_table(scores, exercises)
    if args.why:
        print_reasons(scores, exercises)
    return 0


if __name__ == "__main__":
    sys.exit(main())
