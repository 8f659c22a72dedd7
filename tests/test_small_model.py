"""The tutorial's small models: they load, are small, and are what the chapters say they are."""

from pathlib import Path

from tutorial.small import SmallRun

TUTORIAL = Path(__file__).parents[1] / "tutorial"


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


def test_where_only_quacks_were_bad_plain_fine_tuning_stays_in_its_domain():
    run = SmallRun(quacks=True)
    with run.load_adapter("general"):
        found = run.ask()
    assert found["in_domain"]["em"] > 0.5 and found["out_of_domain"]["em"] < 0.05
