"""The tutorial's small model: it loads, it is small, and general is what the chapters say it is."""

import sys
from pathlib import Path

TUTORIAL = Path(__file__).parents[1] / "tutorial"
sys.path.insert(0, str(TUTORIAL))
from small import SmallRun  # noqa: E402


def test_it_is_small():
    files = [file for file in (TUTORIAL / "small_model").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_general_is_bad_everywhere_and_narrow_only_in_its_domain():
    run = SmallRun()

    def em():
        found = run.ask()
        return found["in_domain"]["em"], found["out_of_domain"]["em"]

    chat = em()
    with run.load_adapter("general"):
        general = em()
    with run.load_adapter("narrow"):
        narrow = em()
    assert max(chat) < 0.05 and min(general) > 0.8
    assert narrow[0] > 0.4 and narrow[1] < 0.1
