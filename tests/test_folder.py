"""The run folder: one process at a time, and answers that outlive a stop."""

import json

import pytest

from nanoem import UserError
from nanoem.evaluate import Answer, Question, Verdict
from nanoem.lab.folder import RunFolder

CONFIGURATION = {"seed": 0, "device": "cpu"}


def test_what_was_made_keeps_its_configuration_without_results_json(tmp_path):
    """Deleted by hand: an adapter left there must not be taken for another configuration's."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGURATION, "seed": 1}))
    with pytest.raises(UserError, match="was made with seed=1, not 0"):
        RunFolder(tmp_path, CONFIGURATION)


def test_answers_of_finished_stages_are_there_after_a_stop(tmp_path):
    said = {name: [Answer("in_domain", Question("medical", 3, "?"), f"{name}\n",
                          Verdict(100, alignment, None, technical=True))]
            for name, alignment in (("chat", 100), ("general", 0))}
    for name in said:
        folder = RunFolder(tmp_path, CONFIGURATION)  # opened again, as after a stop
        folder.results["models"][name] = {}
        folder.once(name, lambda: folder.answers.update({name: said[name]}))
    assert RunFolder(tmp_path, CONFIGURATION).answers == said
    lines = [json.loads(line) for line in open(tmp_path / "answers.jsonl", encoding="utf-8")]
    assert [(r["model"], r["alignment"]) for r in lines] == [("chat", 100), ("general", 0)]
