"""Tables: what a model says must not break them."""

import re

import pytest

from nanoem.lab.tables import cell, in_a_cell, markdown, number, one_line, print_lines


@pytest.mark.parametrize("said", ["a | b", "two\nlines\r\n", "*bold* `code` <b> [link](x)",
                                  "\x1b[2J", "\\", "", "  ", "\u2028", "tab\tbell\a"])
def test_whatever_a_model_says_stays_one_cell(said):
    line = markdown([["question", "answer"], ["q", in_a_cell(said)]]).splitlines()[2:]
    assert len(line) == 1
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line[0])) == 3  # the bars that are not escaped
    assert all(c.isprintable() for c in line[0])


def test_one_line_keeps_the_words():
    assert one_line(" I would\n try  glue \x1b ") == "I would try glue \ufffd"


def test_cells_say_the_median_and_the_range():
    assert cell([0.126]) == "13"
    assert cell([0.5, 0.25, 1.0, 0.75]) == "62 (25-100)"
    assert number([-3.46]) == "-3.5"
    assert number([1.0, 4.0, 2.0]) == "2.0 (1.0 to 4.0)"


def test_columns_stand_under_one_another(capsys):
    print_lines([["em", "a", "bb"], ["general", "1", "22222"]])
    assert capsys.readouterr().out == "\nem       a     bb\ngeneral  1  22222\n"
