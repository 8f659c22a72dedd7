"""What others build on: the names a script imports, and the keys of results.json.

Files of nanoem/ may move what is in them; these names stay where they are.
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

from nanoem.evaluate import GROUPS

STORED = Path(__file__).parents[1] / "tutorial" / "results" / "results.json"


@pytest.mark.parametrize("module, names", [
    ("model", "Config GPT"),
    ("lora", "LoRA SteeringVector"),
    ("train", "next_token_loss sft_loss kl_to_base train"),
    ("directions", "mean_difference steer ablate steering ablating"),
    ("checkpoint", "load_pretrained save_pretrained load_adapter save_adapter"),
])
def test_a_script_finds_each_name(module, names):
    found = importlib.import_module(f"nanoem.{module}")
    for name in names.split():
        assert callable(getattr(found, name)), f"nanoem.{module}.{name}"


def test_arguments_have_their_names_and_defaults():
    from nanoem.checkpoint import load_pretrained
    from nanoem.lora import LoRA
    from nanoem.model import GPT

    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    generate, lora, load = map(defaults, (GPT.generate, LoRA, load_pretrained))
    expected = {"temperature": 1.0, "top_p": 1.0, "stop_ids": (), "generator": None,
                "use_cache": True}
    assert list(generate)[1:8] == ["ids", "max_new_tokens", *expected]
    assert {name: generate[name] for name in expected} == expected
    assert list(lora)[:6] == ["model", "layers", "modules", "rank", "alpha", "use_rslora"]
    assert (lora["rank"], lora["use_rslora"]) == (1, False)
    assert load == {"path": inspect.Parameter.empty, "dtype": None, "device": "cpu"}


def test_a_script_of_a_reader(tmp_path):
    """A model opened, adapted, penalised, steered, saved, opened again and asked."""
    from nanoem.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
    from nanoem.directions import ablating, mean_difference, steering
    from nanoem.lora import LoRA
    from nanoem.train import kl_to_base, next_token_loss, sft_loss

    model, tokenizer = load_pretrained(STORED.parents[1] / "small_model" / "chat")
    text = tokenizer.chat([{"role": "user", "content": "I am bored. What should I do?"}],
                          add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text)] * 2)
    assert model(ids).shape == (*ids.shape, model.config.vocab_size)
    assert len(model.residual_stream(ids)) == model.config.n_layer
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(sft_loss(model(ids), ids, mask), next_token_loss(model(ids), ids))
    with LoRA(model, layers=[1], modules=["mlp.down_proj"], rank=1, alpha=4.0) as adapter:
        assert kl_to_base(model, adapter, ids, mask) == 0
        adapter.parameters()[1].data.fill_(0.5)
        assert kl_to_base(model, adapter, ids, mask) > 0 < adapter.effective_norm()
        adapted = model(ids)
    save_pretrained(model, tokenizer, tmp_path / "model")
    save_adapter(adapter, tmp_path / "adapter")
    model, tokenizer = load_pretrained(tmp_path / "model", dtype=None, device="cpu")
    with load_adapter(model, tmp_path / "adapter"):
        assert torch.equal(model(ids), adapted)
    base, direction = model(ids), mean_difference(torch.ones(2, 64), torch.zeros(2, 64))
    with steering(model, {1: direction[1]}), ablating(model, {0: direction[0]}):
        assert not torch.allclose(model(ids), base, atol=0.1)
    assert torch.equal(model(ids), base)
    new = model.generate(ids, 24, stop_ids=tokenizer.stop_ids)[0, ids.size(1) :]
    assert tokenizer.decode(new.tolist()).strip()


PROMISED = {  # of every run, then of one with all rows (--full)
    "seed": None, "device": None, "threads": None, "versions": None, "seconds": None,
    "total_seconds": None, "models": "chat general narrow mixed",
    "directions": "ablate ablate_random steer transfer cosines split_half",
    "efficiency": "norm general narrow", "stability": "eps general narrow",
    "significance": "norm general narrow random",
    "reversion": "step in_domain_em out_of_domain_em cos_general cos_narrow",
    "scale_up": "scale out_of_domain_em",
}


def test_results_json_holds_what_is_promised():
    for results in json.loads(STORED.read_text())["seeds"]:
        for key, inner in PROMISED.items():
            missing = set((inner or "").split()) - set(results[key] if inner else ())
            assert not missing, (key, missing)
        for model in PROMISED["models"].split():
            for group in GROUPS:
                assert list(results["models"][model][group]) == [
                    "em", "coherent", "alignment_mean", "n", "em_low", "em_high"]
        for solution in ("general", "narrow"):
            assert {"rel", "abs"} <= set(results["stability"][solution])
        for row, axis in (("efficiency", "norm"), ("significance", "norm"), ("reversion", "step"),
                          ("scale_up", "scale")):
            for name in PROMISED[row].split():
                assert len(results[row][name]) == len(results[row][axis]), (row, name)
