"""The tutorial keeps its word: stubs fail as unfinished, nanoem passes, wrong answers are caught.

Every chapter's README is a doctest too: what it prints is what a reader sees.
"""

import doctest
import functools
import inspect
import re
import shlex
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tutorial"))
from classroom import (CHAPTERS, exercise_tests, first_failure, in_words, load_file,  # noqa: E402
                       number_of, verdict_lines)

TESTS = {path.name: load_file(path / "test_exercise.py") for path in CHAPTERS}
STUBS = {path.name: load_file(path / "exercise.py") for path in CHAPTERS}
PLANTED = {name: load_file(ROOT / "tests/planted" / f"{name}.py").PLANTED for name in TESTS}
EXERCISES = [(chapter, name) for chapter, tests in TESTS.items() for name in tests.EXERCISES]
PAGES = sorted((ROOT / "tutorial").glob("**/*.md"))


@pytest.mark.parametrize("chapter, name", EXERCISES)
def test_a_stub_fails_as_unfinished_and_has_the_signature_of_the_solution(chapter, name):
    failure = first_failure(TESTS[chapter], name, STUBS[chapter])
    assert isinstance(failure, NotImplementedError) and name in str(failure), failure
    stub, solution = getattr(STUBS[chapter], name), TESTS[chapter].EXERCISES[name]
    asked, offered = (list(inspect.signature(f).parameters.values()) for f in (stub, solution))
    assert asked == offered[: len(asked)]
    # nanoem's own may do more than the exercise, when it is asked to
    assert all(more.default is not more.empty for more in offered[len(asked) :])
    assert "Hint 1" in stub.__doc__


def as_asked(stub, solution):
    """nanoem's function with the arguments of the stub alone: what a student can hand in."""
    if isinstance(solution, type):
        return solution

    @functools.wraps(solution)
    def handed_in(*args, **options):
        inspect.signature(stub).bind(*args, **options)
        return solution(*args, **options)
    return handed_in


@pytest.mark.parametrize("chapter, name", EXERCISES)
def test_nanoem_passes(chapter, name):
    assert exercise_tests(TESTS[chapter], name)
    answer = SimpleNamespace(**{other: as_asked(getattr(STUBS[chapter], other), solution)
                                for other, solution in TESTS[chapter].EXERCISES.items()})
    failure = first_failure(TESTS[chapter], name, answer)
    if failure:
        raise failure


@pytest.mark.parametrize("chapter, number", [
    (chapter, i) for chapter, planted in PLANTED.items() for i in range(len(planted))])
def test_a_wrong_answer_is_rejected_for_the_right_reason(chapter, number):
    name, reason, wrong = PLANTED[chapter][number]
    answer = SimpleNamespace(**{**TESTS[chapter].EXERCISES, name: wrong})
    failure = first_failure(TESTS[chapter], name, answer)
    assert isinstance(failure, AssertionError), failure
    assert re.search(reason, str(failure)), f"expected {reason!r}, got: {failure}"


def mask_sent_to_the_inputs(q, k, v):
    """A right `attend` that makes its mask first and sends it after."""
    n, (T, S) = q.size(1) // k.size(1), (q.size(2), k.size(2))
    scores = q @ k.repeat_interleave(n, 1).transpose(-1, -2) / q.size(-1) ** 0.5
    future = torch.ones(T, S).to(q.device).triu(1).bool() & (T > 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v.repeat_interleave(n, 1)


@torch.no_grad()
def merge_with_deepcopies(self):
    """A right `merge` that keeps copies of the parameters themselves."""
    if not self.originals:
        for name, linear in self.sites.items():
            self.originals[name] = deepcopy(linear.weight)
            linear.weight += (self.scale * self.scaling * self.B[name] @ self.A[name]).to(
                linear.weight.dtype)


@pytest.mark.parametrize("chapter, name, right", [
    ("02_small_gpt", "attend", mask_sent_to_the_inputs),
    ("03_lora", "merge", merge_with_deepcopies)])
def test_an_unusual_right_answer_is_accepted(chapter, name, right):
    failure = first_failure(TESTS[chapter], name, SimpleNamespace(**{name: right}))
    assert failure is None, failure


def test_every_exercise_has_three_planted_wrong_answers():
    n = Counter(name for planted in PLANTED.values() for name, _, _ in planted)
    assert {name for _, name in EXERCISES if n[name] < 3} == set()


def test_the_way_to_the_tutorial_stands_in_readme():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "(tutorial/README.md), ten chapters" in text and len(CHAPTERS) == 10
    assert f"write {len(EXERCISES)} small functions" in text
    assert "(tutorial/TEACHING.md)" in text


def test_a_student_reads_what_the_tutorials_page_shows():
    chapter = "01_toy_world"
    tests, written = TESTS[chapter], {**vars(STUBS[chapter])}
    written["write_answer"] = tests.EXERCISES["write_answer"]
    written["judge"] = next(w for _, reason, w in PLANTED[chapter] if reason == "white space")
    failures = {(number_of(chapter, tests, name), name):
                first_failure(tests, name, SimpleNamespace(**written)) for name in tests.EXERCISES}
    page = (ROOT / "tutorial/README.md").read_text(encoding="utf-8")
    assert "```\n" + "\n".join(verdict_lines(failures)) + "\n```" in page


def test_an_error_in_a_students_code_comes_with_its_line(tmp_path):
    (tmp_path / "exercise.py").write_text("def judge(world, question, answer):\n    return wrold\n")
    failure = first_failure(TESTS["01_toy_world"], "judge", load_file(tmp_path / "exercise.py"))
    assert in_words(failure) == "NameError: name 'wrold' is not defined (exercise.py, line 2)"


def test_a_forgotten_return_is_named():
    nothing = SimpleNamespace(attend=lambda q, k, v: None)
    said = in_words(first_failure(TESTS["02_small_gpt"], "attend", nothing), "attend")
    assert said.endswith("'isnan'; is a return missing?")


def test_torchs_own_not_implemented_error_is_no_unfinished_exercise(tmp_path):
    (tmp_path / "exercise.py").write_text(
        "def mean_residual(model, ids, mask, sites=None):\n    return mask @ mask.T\n")
    failure = first_failure(TESTS["06_directions"], "mean_residual",
                            load_file(tmp_path / "exercise.py"))
    assert isinstance(failure, (NotImplementedError, RuntimeError))
    assert "(exercise.py, line 2)" in in_words(failure)


def test_an_unfinished_exercise_is_told_from_one_that_calls_it():
    error = NotImplementedError("token_kl is not written yet (exercise 5.1)")
    assert in_words(error, "token_kl") == "not written yet"
    assert in_words(error, "kl_to_base") == (
        "it calls another exercise: token_kl is not written yet (exercise 5.1); write that one "
        "first, or take nanoem's")


def exercise_table(chapter):
    """[(number, name, minutes)] of the exercises in a chapter's page."""
    page = (ROOT / "tutorial" / chapter / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+\.\d+) `(\w+)` \|[^|]+\| (\d+) \|", page, re.M)
    return [(number, name, int(minutes)) for number, name, minutes in rows]


@pytest.mark.parametrize("chapter", TESTS)
def test_a_chapters_page_lists_its_exercises(chapter):
    table = exercise_table(chapter)
    numbers = [f"{int(chapter[:2])}.{i + 1}" for i in range(len(table))]
    assert [row[:2] for row in table] == list(zip(numbers, TESTS[chapter].EXERCISES))
    for number, name, _ in table:
        with pytest.raises(NotImplementedError, match=re.escape(f"(exercise {number})")):
            raise first_failure(TESTS[chapter], name, STUBS[chapter])


@pytest.mark.parametrize("chapter", TESTS)
def test_the_path_says_what_a_chapter_takes(chapter):
    path = (ROOT / "tutorial/README.md").read_text(encoding="utf-8")
    row = re.search(rf"\({chapter}/README.md\) \|[^|]+\| (\d+) \+ (\d+) \| (\d+) \|", path)
    assert row, f"tutorial/README.md has no full row for {chapter}"
    assert f"`python -m pytest tutorial/{chapter}`" in path
    page = (ROOT / "tutorial" / chapter / "README.md").read_text(encoding="utf-8")
    said = re.search(r"Reading\s+and\s+running:\s+(\d+)\s+minutes.\s+Exercises:\s+(\d+)\s", page)
    table = exercise_table(chapter)
    assert row.groups() == (*said.groups(), str(len(table)))
    assert int(said[2]) == sum(minutes for _, _, minutes in table), "the minutes do not add up"


def test_a_lesson_plan_takes_as_long_as_it_says():
    text = (ROOT / "tutorial/TEACHING.md").read_text(encoding="utf-8")
    plans = re.split(r"^\*\*(\d+) minutes: ", text.split("## Grading")[0], flags=re.M)[1:]
    assert plans[::2] == ["50", "90", "180"]
    for minutes, plan in zip(plans[::2], plans[1::2]):
        rows = sum(map(int, re.findall(r"^\| (\d+) \|", plan, re.M)))
        before = re.search(r"without the exercises \((\d+)\)", plan)
        assert rows + int(before[1] if before else 0) == int(minutes), plan[:40]
    n = sum(len(tests.EXERCISES) for tests in TESTS.values())
    assert f"in each of the ten chapters, the total of {n}," in " ".join(text.split())


def test_the_glossary_has_every_term_once_and_in_order():
    glossary = (ROOT / "tutorial/README.md").read_text(encoding="utf-8").split("## Glossary")[1]
    chapter_of = dict(re.findall(r"^- \*\*([^*]+)\*\* \((\d+)\)", glossary, re.M))
    terms = re.findall(r"^- \*\*([^*]+)\*\*", glossary, re.M)
    assert terms == sorted(set(terms), key=str.lower) and terms == [*chapter_of]
    bold = {}  # a term is bold once, where it is explained -> the chapter
    for chapter in TESTS:
        page = (ROOT / "tutorial" / chapter / "README.md").read_text(encoding="utf-8")
        for text in re.findall(r"\*\*([^*]+)\*\*", page):
            term = " ".join(text.lower().split())
            if term.endswith((".", "?", ":")) or term == "experiment":
                continue  # a small headline; a mark in the table of exercises
            assert term not in bold, f"'{term}' is explained in {bold[term]} and in {chapter}"
            bold[term] = chapter
            assert term.removesuffix("s") in " ".join(glossary.lower().split()), (chapter, term)
    for term, number in chapter_of.items():
        for word in (term.lower(), term.lower() + "s"):
            assert word not in bold or int(bold[word][:2]) == int(number), (term, bold[word])


class Close(doctest.OutputChecker):
    """Printed numbers may differ by 2%: another machine rounds otherwise."""

    NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")

    def check_output(self, want, got, flags):
        if super().check_output(self.NUMBER.sub("0", want), self.NUMBER.sub("0", got), flags):
            pairs = zip(self.NUMBER.findall(want), self.NUMBER.findall(got))
            return all(abs(float(a) - float(b)) <= 0.02 * abs(float(a)) + 1e-6 for a, b in pairs)
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_prints_is_what_a_reader_sees(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    examples = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    said = []
    doctest.DocTestRunner(Close(), optionflags=flags).run(examples, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_typed(page):
    """Those that take long are only read: the command line must accept every flag and key."""
    from nanoem.lab.command import read_command
    text = page.read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S)
             for line in filter(None, block.replace("\\\n", " ").splitlines())]
    lines += [" ".join(line.split()) for line in re.findall(r"`(python -m [^`]*)`", text)]
    for line in lines:
        words = shlex.split(line, comments=True)
        if "nanoem.run" in words:  # behind python -m, or behind torchrun's own flags
            read_command(words[words.index("nanoem.run") + 1 :])
        for word in words:
            if word.startswith("tutorial/"):
                assert (ROOT / word.split("::")[0]).exists(), line
