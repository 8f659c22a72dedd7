"""Checkpoints: the format byte by byte, round trips, and files that are broken in every way."""


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
    with pytest.raises(UserError, match="SteeringVector cannot be kept as a PEFT adapter"):
        save_adapter(SteeringVector(model, [0]), tmp_path / "v")


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
