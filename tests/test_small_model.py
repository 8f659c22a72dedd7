"""The tutorial's small models are small; what they say is compared in the chapters."""

from pathlib import Path


TUTORIAL = Path(__file__).parents[1] / "tutorial"


def test_it_is_small():
    files = [file for file in (TUTORIAL / "small_model").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000
