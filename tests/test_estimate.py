"""The estimate against the model itself: its parameters, and PyTorch's own count of operations."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

from nanoem.layers import attend
from nanoem.lora import AdapterConfig, make_adapter
from nanoem.lab.fused import kl_loss
from nanoem.losses import sft_loss
from nanoem.model import GPT, Config
from nanoem.real import estimate
from nanoem.real.estimate import activation_bytes, n_parameters, step_flops

FIXTURES = Path(__file__).parent / "fixtures"
PAGE = Path(__file__).parents[1] / "tutorial" / "scale_up.md"
SMALL = Config(vocab_size=300, n_layer=6, d_model=64, n_head=4, n_kv_head=2, d_ff=160,
               qkv_bias=True, qk_norm=False)
aten = torch.ops.aten
ON_CPU = {  # the counter knows attention by its names on cuda only
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, **options: sdpa_backward_flop_count(grad, q, k, v),
}


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-sharded", "qwen3", "llama"])
def test_parameters_are_those_of_the_model(name):
    config = estimate.open_folder(FIXTURES / name)[2]
    assert n_parameters(config) == sum(p.numel() for p in GPT(config).parameters())


def test_the_published_sizes():
    sizes = [n_parameters(c) / 1e9 for c in estimate.SHAPES.values()]
    assert sizes == pytest.approx([0.494, 7.616, 14.770], abs=5e-4)


def small_model(checkpointing, config=SMALL):
    """A model, the adapter at its half depth, and three sequences."""
    model = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    model.activation_checkpointing = checkpointing
    adapter = make_adapter(model, AdapterConfig(layers=(), modules=("mlp.down_proj",)))
    return model, adapter, torch.zeros(3, 32, dtype=torch.long)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_pytorch_counts(kl, checkpointing):
    model, adapter, ids = small_model(checkpointing)
    with adapter, FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        loss = sft_loss(model(ids), ids, ids == 0)
        if kl:
            loss = loss + kl_loss(model, adapter, ids, ids == 0)
        loss.backward()
    expected = step_flops(SMALL, 32, kl, checkpointing, batch=3)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # plus the adapter


def attention_is_flash():
    """Before torch 2.8 or so, grouped-query attention on a CPU is not, and keeps more."""
    q, kv = torch.zeros(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 2, 8, 8)
    return "Flash" in type(attend(q, kv, kv).grad_fn).__name__


@pytest.mark.skipif(not attention_is_flash(), reason="this torch's attention is not flash here")
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, qkv_bias=False, qk_norm=True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(checkpointing, dtype, config):
    """Every storage kept for the backward pass, once, without the weights and the rotary tables."""
    model, adapter, ids = small_model(checkpointing, config)
    model.to(dtype)
    lasting = {t.untyped_storage().data_ptr()
               for t in (*model.parameters(), *model.buffers(), *adapter.parameters())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with adapter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.residual_stream(ids)
    found = sum(tensor.untyped_storage().nbytes()
                for place, tensor in kept.items() if place not in lasting) / ids.numel()
    if checkpointing:  # the one block in full is made again only in the backward pass
        found += ((activation_bytes(config, size=dtype.itemsize) - 4 * config.d_ff)
                  / estimate.blocks_above(config))
    assert found == pytest.approx(activation_bytes(config, checkpointing, dtype.itemsize), rel=0.02)


def test_the_command(capsys):
    assert estimate.main([]) == 0
    assert capsys.readouterr().out.count("Qwen2.5-") == 3
    assert estimate.main([str(FIXTURES / "llama")]) == 0
    assert "llama |" in capsys.readouterr().out
    assert estimate.main(["no/such"]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert estimate.main(["--device", "cpu"]) == 0
    on_cpu = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert on_cpu[2] == "2.0"  # 0.494e9 numbers of 4 bytes
    assert float(on_cpu[3]) - 2.0 > estimate.PROCESS / 1e9  # and the process beside them
    assert estimate.main(["--cards", "0"]) == 2
    assert "--cards must be" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["python -m nanoem.real.estimate",
                                     "python -m nanoem.real.estimate --cards 4"])
def test_the_pages_tables_are_what_its_commands_print(command, capsys):
    assert estimate.main(command.split()[3:]) == 0
    assert f"```sh\n{command}\n```\n\n{capsys.readouterr().out}\n" in PAGE.read_text()


@pytest.fixture
def card(monkeypatch):
    """The benchmark of a card, as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module("card")


def test_what_a_card_will_be_measured_with_works_on_a_cpu(card, tmp_path, capsys):
    assert card.main(["--device", "cpu", "--tiny", "--out", f"{tmp_path}/card.json"]) == 0
    found = json.loads((tmp_path / "card.json").read_text())
    printed = capsys.readouterr().out
    assert found["rows"] and all(row["what"] in printed for row in found["rows"])
    compared = {row["what"]: row for row in found["rows"] if row["at most"] is not None}
    assert len(compared) == 10  # four losses, logits, weights, memory and time of two fine-tunes
    memory = compared["SFT + KL: memory, GB"]
    assert memory["measured"] == pytest.approx(memory["computed"], rel=0.15)


def test_each_comparison_of_a_card_can_fail_and_hides_no_other(card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "short_run", lambda device, tiny: {
        "pretrain": torch.tensor([1.0 if device == "cpu" else float("nan")])})
    for limit in ("LOGITS", "MEMORY", "TIME"):
        monkeypatch.setattr(card, limit, -1.0)
    monkeypatch.setitem(card.TINY, "wrong", None)
    assert card.main(["--device", "cpu", "--tiny", "--out", f"{tmp_path}/card.json"]) == 1
    failed = json.loads((tmp_path / "card.json").read_text())["failed"]
    assert [line.split(":")[0] for line in failed] == [
        "toy, pretrain", "tiny, logits", "tiny, SFT", "tiny, SFT", "tiny, SFT + KL",
        "tiny, SFT + KL", "wrong"]
