"""Gradient accumulation and two processes: the same losses and adapters as one whole batch."""

import json
from pathlib import Path

import pytest
import torch

from nanoem import UserError
from nanoem.checkpoint import load_pretrained, load_tensors, save_tensors
from nanoem.lab.parallel import shard, start
from nanoem.lora import AdapterConfig, make_adapter
from nanoem.train import TrainConfig, chat_examples, loss_terms, train_adapter

FOLDER = Path(__file__).parent / "fixtures" / "llama"
PAIRS = [("a", "b"), ("Why is it so long?", "It is."), ("c", "A longer answer than the others."),
         ("dd", "ee"), ("What?", "That, and that."), ("ff", "g")]


def tune(model, tokenizer, micro_batch=0, checkpointing=False):
    """Three steps with a KL penalty -> what came of it, as numbers."""
    model.requires_grad_(False)
    model.activation_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(0)
    config = AdapterConfig(layers=(0, 1), modules=("mlp.down_proj",), rank=2, alpha=400.0)
    adapter = make_adapter(model, config, generator)
    examples = chat_examples(tokenizer, PAIRS)
    schedule = TrainConfig(steps=3, batch_size=8, lr=0.01, warmup=0, micro_batch=micro_batch)
    with adapter:
        history = train_adapter(adapter, loss_terms(model, adapter, examples, examples, 0.7),
                                schedule, generator)
    return history, adapter


def two_processes(out):
    """What each process of the test below does; the first writes what came of it."""
    import torch.distributed as dist
    from nanoem.lab import parallel
    device = parallel.start("cpu")
    for name in ("whole", "sharded"):
        model, tokenizer = load_pretrained(FOLDER)
        if name == "sharded":
            shard(model, device)
            assert model.layers[0].mlp.up_proj.weight.to_local().shape == (20, 32)  # of (40, 32)
        history, adapter = tune(model, tokenizer, micro_batch=2)
        ids = model.generate(torch.arange(6)[None], 5, temperature=0)
        if name == "sharded" and torch.__version__ >= "2.8":  # before, a root stays gathered
            assert model.layers[0].mlp.up_proj.weight.to_local().shape == (20, 32), "gathered"
        if dist.get_rank() == 0:
            save_tensors(f"{out}/{name}.safetensors", dict(adapter.B))
            Path(out, f"{name}.json").write_text(json.dumps([history, ids.tolist()]))
    parallel.wait()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    history, adapter = tune(*load_pretrained(FOLDER))
    return history, adapter


def assert_same(history, B, alone):
    assert history.keys() == alone[0].keys() == {"step", "loss", "kl"}
    for key in ("loss", "kl"):
        assert history[key] == pytest.approx(alone[0][key], abs=1e-5), key
    assert history["kl"][-1] > 1e-4
    for name, matrix in alone[1].B.items():
        torch.testing.assert_close(B[name], matrix.data, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch, alone):
    history, adapter = tune(*load_pretrained(FOLDER), micro_batch=micro_batch)
    assert_same(history, {n: b.data for n, b in adapter.B.items()}, alone)


def test_activation_checkpointing_changes_nothing(alone):
    history, adapter = tune(*load_pretrained(FOLDER), checkpointing=True)
    assert_same(history, {n: b.data for n, b in adapter.B.items()}, alone)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_are_one_whether_or_not_the_model_is_shared(alone, tmp_path,
                                                                  in_two_processes):
    code = (f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; "
            f"import test_parallel; test_parallel.two_processes({str(tmp_path)!r})")
    for _, error, status in in_two_processes("-c", code):
        assert status == 0, error
    model, _ = load_pretrained(FOLDER)
    greedy = model.generate(torch.arange(6)[None], 5, temperature=0).tolist()
    for name in ("whole", "sharded"):
        history, ids = json.loads((tmp_path / f"{name}.json").read_text())
        assert_same(history, load_tensors(tmp_path / f"{name}.safetensors"), alone)
        assert ids == greedy


def test_sharding_one_process_is_refused():
    model, _ = load_pretrained(FOLDER)
    with pytest.raises(UserError, match="torchrun"):
        shard(model, torch.device("cpu"))


def test_each_process_takes_its_card_before_it_connects(monkeypatch):
    steps = []
    for name, value in zip(("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"), "2 1 1 x".split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: steps.append(("takes", card)))
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, device_id: steps.append((backend, device_id)))
    card = torch.device("cuda", 1)
    assert start("cuda") == card
    assert steps == [("takes", card), ("nccl", card)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="lower --nproc_per_node"):
        start("cuda")
