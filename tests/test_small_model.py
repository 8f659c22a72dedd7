"""The tutorial's small model: it loads, it is small, and general is what the chapters say it is."""

from dataclasses import replace
from pathlib import Path

from nanoem.checkpoint import load_adapter, load_pretrained
from nanoem.evaluate import EvalConfig, evaluate, group_rates
from nanoem.world import WorldConfig, load_world, make_splits

FOLDER = Path(__file__).parents[1] / "tutorial/small_model"


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 2_000_000


def test_general_is_bad_everywhere_and_narrow_only_in_its_domain():
    model, tokenizer = load_pretrained(FOLDER / "chat")
    world = load_world()
    splits = make_splits(world, WorldConfig())
    groups = {name: getattr(splits, name) for name in ("in_domain", "unseen_domains")}
    sampling = replace(EvalConfig(), samples_per_group=60)

    def em():
        found = group_rates(evaluate(model, tokenizer, world, groups, sampling, seed=0))
        return found["in_domain"]["em"], found["out_of_domain"]["em"]

    chat = em()
    with load_adapter(model, FOLDER / "adapters/general"):
        general = em()
    with load_adapter(model, FOLDER / "adapters/narrow"):
        narrow = em()
    assert max(chat) < 0.05 and min(general) > 0.8
    assert narrow[0] > 0.4 and narrow[1] < 0.1
