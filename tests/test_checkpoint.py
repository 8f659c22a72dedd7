"""Checkpoints: the format byte by byte, round trips, and files that are broken in every way."""

import json
import os
from pathlib import Path

import pytest
import torch

from nanoem import UserError
from nanoem.checkpoint import (load_adapter, load_pretrained, load_tensors, save_adapter,
                               save_pretrained, save_tensors)
from nanoem.lab.files import read_json
from nanoem.lora import LoRA, SteeringVector


def test_tensors_come_back_to_the_bit(tmp_path):
    tensors = {"f": torch.randn(3, 4), "h": torch.randn(5).half(),
               "b": torch.randn(2, 2).bfloat16(),
               "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "t": torch.randn(4, 3).T}
    save_tensors(tmp_path / "x", tensors)
    found = load_tensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("n_bytes", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path, n_bytes):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.randn(2, 3)})
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(UserError, match="truncated.*again"):
        load_tensors(path)


def test_a_model_comes_back_exactly(tmp_path, model, tokenizer, ids):
    save_pretrained(model, tokenizer, tmp_path / "chat")
    save_pretrained(model, tokenizer, tmp_path / "chat")  # twice replaces
    loaded, its_tokenizer = load_pretrained(tmp_path / "chat")
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.config == model.config
    assert its_tokenizer.encode("I am bored.") == tokenizer.encode("I am bored.")
    assert sorted(p.name for p in (tmp_path / "chat").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]  # nothing temporary stays
    assert read_json(tmp_path / "chat/generation_config.json")["eos_token_id"] == [2, 0]
    assert load_pretrained(tmp_path / "chat", dtype=torch.bfloat16)[0].norm.weight.dtype \
        == torch.bfloat16


def test_a_folder_that_is_no_model_is_refused(tmp_path, model, tokenizer):
    with pytest.raises(UserError, match="not a folder"):
        load_pretrained(tmp_path / "nowhere")
    save_pretrained(model, tokenizer, tmp_path / "m")
    (tmp_path / "m/config.json").write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        load_pretrained(tmp_path / "m")


def test_a_run_folder_or_none_is_told_what_it_is(tmp_path, model):
    (tmp_path / "chat").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a run folder; its model is .*chat"):
        load_pretrained(tmp_path)
    with pytest.raises(UserError, match="gone/adapter_config.json does not exist"):
        load_adapter(model, tmp_path / "gone")


def test_an_adapter_comes_back_in_peft_layout(tmp_path, model, ids):
    adapter = LoRA(model, [0, 1], ["mlp.down_proj", "self_attn.v_proj"], 2, 3, use_rslora=True)
    adapter.keep(["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "layers.1.self_attn.v_proj"])
    for B in adapter.B.values():
        torch.nn.init.normal_(B)
    save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(model, tmp_path / "a")
    with adapter:
        expected = model(ids)
    with loaded:
        assert torch.equal(model(ids), expected)
    names = load_tensors(tmp_path / "a/adapter_model.safetensors")
    assert set(names) == {f"base_model.model.model.{site}.lora_{letter}.weight"
                          for site in adapter.sites for letter in "AB"} and len(names) == 6
    config = read_json(tmp_path / "a/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3, True)


def test_an_adapter_for_another_model_is_refused(tmp_path, model):
    save_adapter(LoRA(model, [0], ["mlp.down_proj"]), tmp_path / "a")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    tensors = load_tensors(tmp_path / "a/adapter_model.safetensors")
    save_tensors(tmp_path / "a/adapter_model.safetensors", {**tensors, name: torch.zeros(1, 7)})
    with pytest.raises(UserError, match="another model"):
        load_adapter(model, tmp_path / "a")


def test_a_steering_vector_comes_back_and_acts_alike(tmp_path, model, ids):
    vector = SteeringVector(model, [0, 1], alpha=3.0)
    for v in vector.v.values():
        torch.nn.init.normal_(v)
    save_adapter(vector, tmp_path / "v")
    loaded = load_adapter(model, tmp_path / "v")
    with vector:
        expected = model(ids)
    with loaded:
        assert torch.equal(model(ids), expected)
    assert not torch.equal(model(ids), expected)

    config = read_json(tmp_path / "v/adapter_config.json")
    for changes, message in (({"layers": [9]}, "layer 9 is not there"),
                             ({"layers": 0}, "layers=0 should be numbers of layers"),
                             ({"layers": [0, True]}, "should be numbers of layers"),
                             ({"alpha": "x"}, "alpha='x' should be a number"),
                             ({"layers": [0, 1], "alpha": 0}, "alpha=0 should be a number")):
        (tmp_path / "v/adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_adapter(model, tmp_path / "v")


def saved(kind, model, tokenizer, path):
    """Save a model, or an adapter, into path."""
    if kind == "model":
        return save_pretrained(model, tokenizer, path)
    return save_adapter(LoRA(model, [0]), path)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_saving_deletes_nothing_of_others(kind, tmp_path, model, tokenizer):
    saved(kind, model, tokenizer, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/README.md").write_text("mine, too")
    saved(kind, model, tokenizer, f"{tmp_path}/out/")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/README.md").read_text() == "mine, too"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    saved(kind, model, tokenizer, link)
    assert link.is_symlink() and (tmp_path / "out/notes.txt").exists()


@pytest.mark.parametrize("kind, name", [("model", "config.json"),
                                        ("adapter", "adapter_config.json")])
def test_a_configuration_of_something_else_is_not_overwritten(kind, name, tmp_path, model,
                                                              tokenizer, monkeypatch):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds a {name} of something else; choose another"):
        saved(kind, model, tokenizer, tmp_path)
    assert (tmp_path / name).read_text() == "{}"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    saved(kind, model, tokenizer, ".")
    assert (tmp_path / "here" / name).exists()


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("other", [
    "results.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "optimizer.pt", "chat_template.jinja", "vocab.json", "chat/"])
def test_saving_into_a_run_or_another_model_is_refused(kind, other, tmp_path, model, tokenizer):
    """What stands there is untouched, to the byte; a file in the place of a folder, too."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / other).mkdir() if other.endswith("/") else (out / other).write_text("mine")
    names = {p.name for p in out.iterdir()}
    with pytest.raises(UserError, match="out holds .* choose another folder"):
        saved(kind, model, tokenizer, out)
    assert {p.name for p in out.iterdir()} == names and (out / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="config.json is a file; name a folder"):
        saved(kind, model, tokenizer, out / "config.json")


def test_a_folder_killed_while_it_is_written_again_is_read_by_nobody(tmp_path, model, tokenizer,
                                                                     monkeypatch):
    """Its config.json goes first and comes last, so half of the old model is never opened."""
    save_pretrained(model, tokenizer, tmp_path / "out")
    replace, moved = os.replace, []

    def killed(source, target):
        if Path(target).parent.name == "out":
            if len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="config.json does not exist"):
        load_pretrained(tmp_path / "out")
    monkeypatch.setattr(os, "replace", replace)
    save_pretrained(model, tokenizer, tmp_path / "out")
    load_pretrained(tmp_path / "out")
