"""The grader: our tests, a student's file, and nothing a student writes can stop it."""

import os
import select
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "tutorial"
sys.path.insert(0, str(TUTORIAL))
import grade  # noqa: E402

RIGHT = '''
def next_token_loss(logits, ids, mask=None):
    each = -logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return each.mean() if mask is None else each[mask[:, 1:]].mean()

'''
HOSTILE = '''
import os, sys
from nanoem.real.preference import answer_log_probs as borrowed
print("noise on stdout")


def next_token_loss(logits, ids, mask=None):
    while True:
        pass


def sft_loss(logits, ids, answer_mask):
    os._exit(7)


def hold_out(world, names, train_share):
    sys.exit("bye")


def answer_log_probs(model, tokenizer, pairs, batch_size=8):
    return borrowed(model, tokenizer, pairs, batch_size)
'''


OURS = "from nanoem import losses\n\nsft_loss = losses.sft_loss\n"
LINGERING = """
import subprocess

pipe = open({pipe!r}, "w")
pipe.write("started")
pipe.flush()
subprocess.Popen(["sleep", "20"], stdout=pipe)
"""


def student(folder, text, whole_repository=False, encoding="utf-8"):
    chapter = folder / ("tutorial/" if whole_repository else "") / "04_easy_general"
    chapter.mkdir(parents=True)
    (chapter / "exercise.py").write_text(text, encoding=encoding)
    return str(folder)


def test_each_student_gets_what_they_wrote(tmp_path, capsys):
    folders = [student(tmp_path / "anna", RIGHT, True, "utf-8-sig"),  # as Windows may save it
               student(tmp_path / "cleopatra", "def sft_loss(:\n")]
    fake = tmp_path / "anna/nanoem"  # a student's own nanoem is not used
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit")
    assert grade.main(["--chapters", "4", "--why", *folders]) == 0
    table, anna, cleopatra = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert [line.split() for line in lines] == [
        ["student", "04", "total"], ["anna", "1/4", "1/4", "25%"],
        ["cleopatra", "0/4", "0/4", "0%"]]
    assert lines[1].index("/") == lines[2].index("/")  # aligned
    assert anna.count("right") == 1 and "4.3 hold_out           there is no function" in anna
    assert cleopatra.count("cannot be imported: SyntaxError") == 4


def test_nothing_a_student_writes_stops_the_grader(tmp_path, capsys):
    assert grade.main(["--chapters", "4", "--why", "--seconds", "2",
                       student(tmp_path / "bo", HOSTILE)]) == 0
    said = capsys.readouterr().out
    for what in ("4.1 next_token_loss    takes longer than 2 seconds", "exit code 7",
                 "SystemExit: bye", "handed to nanoem's own answer_log_probs"):
        assert what in said


def test_a_file_that_never_ends_costs_its_chapter_once(tmp_path, capsys):
    folder = student(tmp_path / "dan", "while True: pass\n")
    assert grade.main(["--chapters", "4", "--why", "--seconds", "1", folder]) == 0
    out = capsys.readouterr().out
    assert out.count("takes longer than 1 seconds (an endless loop?) while it is imported") == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_a_student_starts_ends_with_the_grading(tmp_path):
    """A pipe is closed when the last process that holds its other end is gone."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        folder = student(tmp_path / "fay", LINGERING.format(pipe=str(tmp_path / "pipe")))
        grade.grade([folder], [4], seconds=60)
        assert os.read(pipe, 100) == b"started"
        assert select.select([pipe], [], [], 3)[0], "its sleep goes on"
        assert os.read(pipe, 100) == b""
    finally:
        os.close(pipe)


def test_our_own_function_under_its_own_name_is_no_answer(tmp_path):
    chapter = Path(student(tmp_path / "gil", OURS)) / "04_easy_general"
    tests = grade.load_file(TUTORIAL / chapter.name / "test_exercise.py")
    answer = grade.load_file(chapter / "exercise.py")
    assert not grade.hands_over(OURS, "sft_loss")  # its text does not tell
    assert grade.verdict(tests, "sft_loss", answer, OURS) == (
        "the work is handed to nanoem's own sft_loss")


def test_stubs_score_nothing():
    chapter = TUTORIAL / "06_directions"
    tests, stubs = (grade.load_file(chapter / file) for file in ("test_exercise.py", "exercise.py"))
    source = (chapter / "exercise.py").read_text()
    assert {grade.verdict(tests, name, stubs, source) for name in tests.EXERCISES} == {
        "not written yet"}


@pytest.mark.parametrize("argv, message", [
    (["nobody"], "is not a folder"),
    (["."], "holds no chapter"),
    (["--chapters", "77", str(TUTORIAL)], "there is no chapter 77"),
])
def test_mistakes_are_told_in_one_sentence(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert grade.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("grade: ") and said.count("\n") == 1


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_a_time_limit_that_nobody_could_keep_is_refused(capsys, seconds):
    with pytest.raises(SystemExit) as ended:
        grade.main(["--seconds", seconds, str(TUTORIAL)])
    assert ended.value.code == 2 and "must be above 0" in capsys.readouterr().err


def test_folders_of_one_name_are_told_apart(tmp_path):
    paths = [str(tmp_path / a / "work") for a in "ab"]
    assert grade.names_of([*paths, "x/carl/tutorial"]) == [*paths, "carl"]


@pytest.mark.parametrize("name, before, body, handed_over", [
    ("sft_loss", "from nanoem import losses", "return losses.sft_loss(x)", True),
    ("sft_loss", "from nanoem.losses import sft_loss as s", "return s(x)", True),
    ("sft_loss", "", "from nanoem.losses import sft_loss\n    return sft_loss(x)", True),
    ("sft_loss", "from nanoem.losses import next_token_loss", "return next_token_loss(x)", False),
    ("sft_loss", "from nanoem.losses import sft_loss", "return x", False),
    ("attend", "from nanoem.layers import attend_by_hand", "return attend_by_hand(x)", True),
    ("lora_delta", "", "return adapter(A).delta('q', x)", True),
    ("next_token_loss", "from nanoem.losses import sft_loss as s", "return s(x)", True),
])
def test_a_copied_answer_is_seen_under_another_name_too(name, before, body, handed_over):
    assert grade.hands_over(f"{before}\ndef {name}(x):\n    {body}", name) == handed_over
    assert grade.hands_over("from nanoem.losses import sft_loss", "sft_loss")
