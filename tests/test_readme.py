"""README says what the stored results say, and every link of it leads somewhere."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanoem
from nanoem.lab.plots import percent
from nanoem.lab.report import LIMITS, table
from nanoem.lab.tables import markdown
from nanoem.real import report as real_report
from nanoem.real.local_judge import agreement_sentence
from nanoem.story import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "tutorial/results/results.json").read_text())["seeds"]
REAL = ROOT / "tutorial/results/real"


def test_the_table_is_that_of_the_stored_results():
    assert markdown(table(RESULTS)) in README


def test_the_reporting_seeds_are_all_there():
    seeds = " ".join(str(r["seed"]) for r in RESULTS)
    assert f"`python -m nanoem.run --full --seeds {seeds}`" in README


def test_real_weights_are_told_as_they_came_out():
    result = json.loads((REAL / "results.json").read_text())
    report = (REAL / "report.md").read_text(encoding="utf-8")
    assert markdown(real_report.table([result])) in README
    assert agreement_sentence(result["judge"]) in report.replace("\n> ", " ")
    assert f"{result['total_seconds'] / 60:.0f} minutes on {result['threads']}" in README
    for model, group in (("general", "kl_domains"), ("general", "unseen_domains"),
                         ("chat", "open_ended"), ("general", "open_ended")):
        found = result["models"][model]["preference"][group]["bad_preferred"]
        assert f"{100 * found:.0f}%" in README.split("## Real weights")[1], (model, group)
    command = re.search(r"`(python -m nanoem.run --model .*?)`", report)[1]
    assert command in README and f"(seed {result['seed']};" in report


def test_numbers_in_the_text_are_those_of_the_results():
    first = " ".join(README.split("##")[0].split())
    general, narrow = (percent([r["models"][name]["out_of_domain"]["em"] for r in RESULTS])
                       for name in ("general", "narrow"))
    assert f"{general} of the answers are bad after plain fine-tuning" in first
    assert f"and {narrow} with a KL penalty" in first


def test_where_the_seconds_go_is_told_of_the_fastest_seed():
    page = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    seconds = min(([r["seconds"][stage] for stage in STAGES] for r in RESULTS), key=sum)
    row = ["seconds", *(f"{s:.0f}" for s in seconds), f"{sum(seconds):.0f}"]
    assert markdown([["stage", *STAGES, "all"], row]) in page


def test_every_file_is_on_the_map():
    top = {path.name for path in (ROOT / "nanoem").iterdir() if not path.name.startswith("_")}
    told = set(re.findall(r"^(\w+(?:\.py|/)) ", nanoem.__doc__, re.M))
    assert {name.rstrip("/") for name in told} == top


def test_the_first_hour_is_a_path_of_at_most_700_lines():
    path = nanoem.__doc__.split("The first hour:")[1]
    n_lines = len((ROOT / "nanoem" / "story.py").read_text().splitlines())
    for names, file in re.findall(r"((?:`\w+`[, and\n]*)+) in (\w+\.py)", path):
        parts = {part.name: part for part in
                 ast.parse((ROOT / "nanoem" / file).read_text()).body if hasattr(part, "name")}
        for name in re.findall(r"`(\w+)`", names):
            n_lines += parts[name].end_lineno - parts[name].lineno + 1
    assert 300 < n_lines <= 700


CORE = {path.stem for path in (ROOT / "nanoem").glob("*.py")} - {"run"}


def test_the_walls_between_core_and_rooms():
    """Core takes world and checkpoint by their door; rows and real are strangers; none takes run.

    world and checkpoint stand alone: they need neither the story nor these two.
    """
    for file in (ROOT / "nanoem").rglob("*.py"):
        room = file.parent.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("nanoem"):
                continue
            names = [name for name in node.module.split(".")[1:]]
            first = names[0] if names else next((alias.name for alias in node.names), "")
            assert first != "run", f"{file} imports run"
            assert {room, first} != {"rows", "real"}, f"{file} imports {node.module}"
            if room == "nanoem" and file.stem in CORE and first in ("world", "checkpoint"):
                assert len(names) == 1, f"{file} goes behind the door of {first}"
            if room in ("world", "checkpoint"):
                assert first not in ("story", "rows", "real"), f"{file} imports {node.module}"


def test_the_toys_limits_stand_beside_the_claims():
    assert LIMITS in README.replace("\n", " ")


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not listed:  # not a git checkout: nothing to say about what is committed
        return
    assert {line.split("/")[0] for line in listed.splitlines()} <= {
        "README.md", "nanoem", "tests", "tutorial", "requirements.txt", ".ci", ".gitignore"}


@pytest.mark.parametrize("folder, words", [
    (".", ["tests/test_muon.py"]), ("tests", ["test_muon.py"]),
    (".", ["tutorial/03_lora", "--solution"]), ("tutorial/03_lora", ["--solution"])])
def test_pytest_collects_from_any_folder(folder, words):
    """`pytest` alone, unlike `python -m pytest`, does not look into the folder it starts in."""
    start = "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", start, "-q", "--collect-only", *words],
                          cwd=ROOT / folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
