"""The report and its figures: a whisker is the interval; a row is shown when all seeds have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoem.evaluate import GROUPS
from nanoem.lab.plots import em_by_group
from nanoem.lab.report import rows_in
from nanoem.rows import ROWS


def test_the_whisker_of_one_seed_is_its_interval():
    rates = {group: {"em": 0.4, "em_low": 0.31, "em_high": 0.52}
             for group in (*GROUPS, "out_of_domain")}
    result = {"seed": 0, "models": dict.fromkeys(("chat", "general", "narrow"), rates),
              "directions": {"ablate": rates}}
    figure = em_by_group([result])
    (ax,) = figure.axes
    assert len(ax.lines) == len(ax.patches) == 16  # four models in four groups
    for bar, whisker in zip(ax.patches, ax.lines):
        assert bar.get_height() == pytest.approx(40)
        assert whisker.get_ydata() == pytest.approx([31, 52])
        assert whisker.get_xdata() == pytest.approx([bar.get_x() + bar.get_width() / 2] * 2)


def test_a_row_is_reported_when_every_seed_has_it():
    one, other = ROWS["R1"], ROWS["R4"]
    both, alone = {one.name: {}, other.name: {}}, {other.name: {}}
    assert rows_in([both]) == [one, other]
    assert rows_in([both, alone]) == rows_in([alone, both]) == [other]
    assert rows_in([both, {}]) == []


@pytest.mark.parametrize("mine, kept", [
    ("svg", "svg"), ("module://not_there.backend", "module://not_there.backend"),
    ("not_there", "")])  # matplotlib refuses to be imported; so, without it, a notebook's inline
def test_drawing_leaves_the_users_backend_alone(mine, kept):
    """A notebook's backend may not even be installed here; ours needs none, and sets none."""
    code = ("import nanoem.run, matplotlib; from nanoem.lab.plots import new_figure; "
            "new_figure(1, (2, 2))[0].canvas.draw(); print(matplotlib.get_backend())")
    drawn = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MPLBACKEND": mine},
                           capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert drawn.returncode == 0 and kept in drawn.stdout, drawn.stderr
