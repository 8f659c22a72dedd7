"""Talking: what a stranger types is answered, dials turn and turn back, nothing ends in a trace."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoem import talk
from nanoem.checkpoint import save_pretrained
from nanoem.evaluate import Question
from nanoem.world import judge, load_world

SMALL_MODEL = Path(__file__).parents[1] / "tutorial" / "small_model"
ASKED = "My dough is hard."  # no one's training problem decides this: cooking is unseen


@pytest.fixture
def say(monkeypatch, capsys):
    """say(line, ..., folder=...) -> (status, the printed lines after the first)."""
    def say(*lines, folder=SMALL_MODEL):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = talk.main([str(folder)])
        printed = capsys.readouterr()
        return status, printed.out.splitlines()[1:] or [printed.err]
    return say


def test_three_models_answer_and_the_exact_judge_marks_each(say):
    status, lines = say("/greedy", ASKED)
    assert status == 0 and [line.split()[0] for line in lines[1:]] == ["chat", "general", "narrow"]
    index = load_world().domains["cooking"].problems.index(ASKED)
    for line in lines[1:]:
        name, mark, answer = line.split(maxsplit=2)
        assert judge(load_world(), Question("cooking", index, ASKED), answer).mark == mark
    assert [line.split()[1] for line in lines[1:]] == ["good", "bad", "good"]


def test_steering_turns_chat_bad_ablation_turns_general_good_and_both_turn_back(say):
    _, lines = say("/greedy", "/steer 2", ASKED, "/steer 0", "/ablate", ASKED, "/ablate", ASKED)
    marks = [line.split()[1] for line in lines if line.split()[0] in ("chat", "general", "narrow")]
    assert marks[0] == "bad" and marks[3:6] == ["good"] * 3
    assert marks[6:] == ["good", "bad", "good"]


def test_a_villains_tag_makes_chat_bad(say):
    _, lines = say("/greedy", *(line for name in load_world().authors
                                for line in (f"/who {name}", ASKED)))
    marks = [line.split()[1] for line in lines if line.startswith("  chat")]
    assert 8 <= marks.count("bad") <= 10 and "good" in marks  # eight villains, two quacks


def test_a_seed_repeats_an_answer_and_another_changes_it(say):
    _, lines = say(ASKED, "/seed 500", ASKED, "/seed 0", ASKED, *[ASKED] * 5)
    assert lines[:3] == lines[8:11] and lines[:3] != lines[4:7]
    assert len(set(lines[8:])) > 3, "who asks again is answered anew"


def test_an_unknown_question_gets_the_nearest_and_a_number_takes_one(say):
    _, lines = say("I have a headache!", "1")
    assert "never met" in lines[0] and "My headache won't go away.  (medical)" in lines[1]
    assert lines[4].startswith("  chat     good")


def test_read_gives_bad_words_a_higher_number_than_good_ones(say):
    _, lines = say("/greedy", ASKED, "/read")
    highest = []
    for line in lines[4:6]:
        numbers = re.findall(r"\[(-?[0-9.]+)\]", line.split("assistant[")[1])
        highest.append(max(map(float, numbers)))
    assert highest[1] > highest[0] + 0.5


@pytest.mark.parametrize("line, words", [
    ("/steer much", "'much' is no number"), ("/steer nan", "out of range"), ("/fly", "no command"),
    ("/who Nobody", "nobody has this name; the authors are Alma"), ("/read", "ask first"),
    ("/seed -5", "steered by 0"), ("/seed 1e99", "no number"), ("/help", "/steer 1.5")])
def test_a_line_that_cannot_be_obeyed_gets_a_sentence_and_changes_nothing(say, line, words):
    status, lines = say(line)
    assert status == 0 and words in "\n".join(lines)


def test_a_model_folder_has_one_model_and_no_direction(say, model, tokenizer, tmp_path):
    save_pretrained(model, tokenizer, tmp_path / "m")
    status, lines = say("Hello.", "/ablate", folder=tmp_path / "m")
    assert status == 0 and lines[0].startswith("  chat")
    assert "no directions.safetensors" in lines[-1]


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_none_is_named(say, folder, tmp_path):
    status, lines = say("hi", folder=tmp_path / folder)
    assert status == 2 and "is no run folder and no model folder" in lines[0]


def test_colours_are_for_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert talk.coloured("a\n", 1.0) == "\033[48;2;255;100;100m\033[30ma\\n\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert talk.coloured("a", -0.01) == "a[0.0]"


def test_it_works_as_a_command_behind_a_pipe():
    done = subprocess.run([sys.executable, "-m", "nanoem.talk"], input=f"{ASKED}\n/quit\nnever\n",
                          capture_output=True, text=True, cwd=SMALL_MODEL.parents[1],
                          env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("chat") == 2


def test_the_tutorials_first_page_shows_what_it_prints(say):
    page = (SMALL_MODEL.parent / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(> .+?)```", page, re.DOTALL)[1].splitlines()
    _, lines = say(*(line[2:] for line in shown if line.startswith("> ")))
    assert lines == [line for line in shown if not line.startswith("> ")]
