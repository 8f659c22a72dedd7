"""Real checkpoints: nanoem against what `transformers` and `peft` computed (fixtures/make.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nanoem import UserError
from nanoem.checkpoint import (load_adapter, load_pretrained, load_tensors, save_pretrained,
                               save_tensors)
from nanoem.lab.files import read_json
from nanoem.lora import LoRA
from nanoem.losses import sft_loss
from nanoem.tokenizer import IM_END, NO_THOUGHT
from nanoem.train import TrainConfig, chat_examples, train

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ["qwen2-tied", "qwen2-sharded", "qwen2-bf16", "qwen3", "llama"]
ADAPTERS = ["peft-r1", "peft-r1-rslora", "peft-r4", "peft-r4-rslora"]


def expected(name):
    facts = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    return facts, load_tensors(FIXTURES / name / "expected.safetensors")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_every_layer_are_those_of_transformers(name):
    model, _ = load_pretrained(FIXTURES / name, dtype=torch.float32)
    facts, tensors = expected(name)
    close = dict(atol=1e-4, rtol=0)
    for i, x in enumerate(model.residual_stream(torch.tensor([facts["ids"][1]]))):
        torch.testing.assert_close(x[0], tensors[f"residual_{i}"], **close,
                                   msg=f"layer {i} is the first that differs")
    for ids in facts["ids"]:
        logits = model(torch.tensor([ids]))[0]
        torch.testing.assert_close(logits[-1], tensors[f"last_{len(ids)}"], **close)
        torch.testing.assert_close(logits[:, facts["columns"]], tensors[f"logits_{len(ids)}"],
                                   **close)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_greedy_tokens_are_those_of_transformers(name):
    model, _ = load_pretrained(FIXTURES / name, dtype=torch.float32)
    facts, _ = expected(name)
    for ids, greedy in zip(facts["ids"], facts["greedy"]):
        for use_cache in (True, False):
            out = model.generate(torch.tensor([ids]), 20, temperature=0, use_cache=use_cache)
            assert out[0, len(ids):].tolist() == greedy


def test_dtype_is_the_folders_or_the_asked_one():
    assert load_pretrained(FIXTURES / "qwen2-bf16")[0].norm.weight.dtype == torch.bfloat16
    model, _ = load_pretrained(FIXTURES / "qwen2-bf16", dtype=torch.float16)
    assert {t.dtype for t in [*model.parameters(), model.cos, model.sin]} == {torch.float16}


@pytest.mark.parametrize("name", MODELS)
def test_the_writer_gives_the_readers_bytes_back(name, tmp_path):
    """What the reference library wrote, read and written again, is the same to the byte."""
    for file in (FIXTURES / name).glob("model*.safetensors"):
        save_tensors(tmp_path / "again", load_tensors(file))
        assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_written_again_is_the_same_model(name, tmp_path):
    model, tokenizer = load_pretrained(FIXTURES / name)
    save_pretrained(model, tokenizer, tmp_path / "m")
    again, its_tokenizer = load_pretrained(tmp_path / "m")
    assert again.config == model.config and its_tokenizer.stop_ids == tokenizer.stop_ids
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    chat = [{"role": "user", "content": "Hi."}]
    assert its_tokenizer.chat(chat, True) == tokenizer.chat(chat, True)


@pytest.mark.parametrize("name", MODELS)
def test_chats_are_rendered_as_the_folders_template_does(name):
    _, tokenizer = load_pretrained(FIXTURES / name)
    for messages, generation_prompt, text in expected(name)[0]["chats"]:
        assert tokenizer.chat(messages, generation_prompt) == text


def copy_of(name, folder):
    return Path(shutil.copytree(FIXTURES / name, folder / name))


def edit(file, **changes):
    """Change keys of a JSON file; None takes a key away."""
    table = {**read_json(file), **changes}
    file.write_text(json.dumps({k: v for k, v in table.items() if v is not None}))


def test_templates_stand_in_either_file_and_must_be_chatml(tmp_path):
    folder = copy_of("qwen2-tied", tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    for value in (template, [{"name": "tool", "template": "x"},
                             {"name": "default", "template": template}]):
        edit(folder / "tokenizer_config.json", chat_template=value)
        assert "created by Alibaba Cloud" in load_pretrained(folder)[1].prompt("Hi.")
    edit(folder / "tokenizer_config.json", chat_template="[INST] {{ messages }} [/INST]")
    with pytest.raises(UserError, match="tokenizer_config.json: the chat template is not ChatML"):
        load_pretrained(folder)


def test_a_tokenizer_that_cuts_an_answer_otherwise_after_a_prompt_is_refused(tmp_path):
    folder = copy_of("qwen2-tied", tmp_path)
    table = read_json(folder / "tokenizer.json")
    edit(folder / "tokenizer.json", normalizer={"type": "Prepend", "prepend": "a"},
         pre_tokenizer=table["pre_tokenizer"])
    with pytest.raises(UserError, match="other tokens after a prompt than alone"):
        load_pretrained(folder)


def test_all_stop_ids_stop_and_strange_ones_are_refused(tmp_path):
    folder = copy_of("llama", tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[257, 258])
    assert load_pretrained(folder)[1].stop_ids == (258, 256, 257)
    edit(folder / "generation_config.json", eos_token_id=9999)
    with pytest.raises(UserError, match="eos_token_id 9999 is no token"):
        load_pretrained(folder)


def test_rope_theta_is_read_from_either_place_and_never_guessed(tmp_path):
    folder = copy_of("llama", tmp_path)
    edit(folder / "config.json", rope_parameters=None, rope_theta=100000)
    assert load_pretrained(folder)[0].config == load_pretrained(FIXTURES / "llama")[0].config
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(UserError, match="rope_theta should be one positive number"):
        load_pretrained(folder)
    edit(folder / "config.json", rope_parameters=None, rope_theta=None)
    with pytest.raises(UserError, match="rope_theta should be.*found none"):
        load_pretrained(folder)


@pytest.mark.parametrize("name, changes, message", [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ("qwen2-tied", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'linear'"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters should be a table"),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("qwen2-tied", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types is .'sliding"),
    ("qwen2-tied", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen2-tied", {"quantization_config": {"bits": 4}}, "quantization_config is"),
    ("qwen2-tied", {"model_type": "gemma"}, "model_type is 'gemma'.*qwen2, qwen3, llama"),
    ("qwen3", {"head_dim": None}, "'head_dim' is missing"),
    ("qwen2-tied", {"hidden_size": "32"}, "hidden_size='32' should be a positive number"),
    ("qwen2-tied", {"vocab_size": -3}, "vocab_size=-3"),
    ("qwen2-tied", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
    ("qwen2-tied", {"num_attention_heads": True}, "num_attention_heads=True"),
    ("qwen2-tied", {"rms_norm_eps": [1]}, "rms_norm_eps=.1.*positive number"),
    ("qwen2-tied", {"num_key_value_heads": 3}, "n_kv_head=3"),
    ("qwen2-tied", {"vocab_size": 200}, "token ids up to 258.*do not belong together"),
    ("qwen2-tied", {"vocab_size": 300}, "misshapen tensors: model.embed_tokens.weight .272, 32."),
    ("qwen2-tied", {"num_hidden_layers": 5}, "misses tensors: model.layers.3.*more"),
    ("qwen2-tied", {"num_hidden_layers": 10**8}, "only 38 tensors"),
    ("qwen2-tied", {"hidden_size": 10**8}, "heads wider than 1024"),
    ("qwen2-tied", {"max_position_embeddings": 10**12}, "max_position_embeddings=10"),
    ("qwen2-tied", {"model_type": ["qwen2"]}, "model_type is .'qwen2'."),
    ("qwen2-tied", {"num_hidden_layers": 2}, "unexpected tensors: model.layers.2"),
    ("qwen2-tied", {"model_type": "llama"}, "unexpected tensors: .*q_proj.bias"),
    ("qwen2-tied", {"dtype": "float8"}, "dtype 'float8' is not known"),
    ("qwen2-tied", {"dtype": ["float32"]}, "dtype .'float32'. is not known"),
])
def test_what_nanoem_lacks_is_refused_by_name(name, changes, message, tmp_path):
    folder = copy_of(name, tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) or "n_kv" in message


def test_a_stored_head_counts_even_if_the_config_says_tied(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    edit(folder / "config.json", tie_word_embeddings=True)
    ids = torch.arange(20)[None]
    assert torch.equal(load_pretrained(folder)[0](ids), load_pretrained(FIXTURES / "qwen3")[0](ids))


def test_a_head_that_the_config_promises_must_be_there(tmp_path):
    folder = copy_of("qwen2-tied", tmp_path)
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="no tensor 'lm_head.weight'"):
        load_pretrained(folder)


def test_broken_shards_are_named(tmp_path):
    folder = copy_of("qwen2-sharded", tmp_path)
    index, shard = folder / "model.safetensors.index.json", "model-00002-of-00003.safetensors"
    whole = read_json(index)["weight_map"]
    for target in ("../../secret.safetensors", "/etc/passwd", "model.bin"):
        edit(index, weight_map={**whole, "model.norm.weight": target})
        with pytest.raises(UserError, match="index.json points to"):
            load_pretrained(folder)
    edit(index, weight_map={**whole, "model.norm.weight": shard})
    with pytest.raises(UserError, match="which the index promises"):
        load_pretrained(folder)
    edit(index, weight_map=whole)
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[:-8])
    with pytest.raises(UserError, match=f"{shard} is truncated"):
        load_pretrained(folder)
    (folder / shard).unlink()
    with pytest.raises(UserError, match=f"{shard} does not exist"):
        load_pretrained(folder)
    edit(index, weight_map=[])
    with pytest.raises(UserError, match="weight_map"):
        load_pretrained(folder)


def test_a_pickle_is_never_opened(tmp_path):
    folder = copy_of("qwen2-tied", tmp_path)
    torch.save({"x": 1}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_pretrained(folder)


def opened(name):
    model, _ = load_pretrained(FIXTURES / "qwen2-tied")
    model.requires_grad_(False)
    return model, load_adapter(model, FIXTURES / name), json.loads(
        (FIXTURES / name / "trajectory.json").read_text())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_computes_the_same_here(name):
    model, adapter, facts = opened(name)
    with adapter, torch.no_grad():
        logits = model(torch.tensor(facts["batches"][0]))[:, -1]
    torch.testing.assert_close(logits, torch.tensor(facts["last_logits"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_five_steps_of_training_are_those_of_peft(name):
    """Losses, A and B after five AdamW steps, from the same start, through nanoem's own loop."""
    model, end, facts = opened(name)
    adapter = LoRA(model, [0, 2], ["mlp.down_proj", "self_attn.q_proj"], end.rank, 8,
                   end.use_rslora)
    start = load_tensors(FIXTURES / name / "start.safetensors")
    for letter, matrices in (("A", adapter.A), ("B", adapter.B)):
        for site, matrix in matrices.items():
            matrix.data.copy_(start[f"base_model.model.model.{site}.lora_{letter}.weight"])
    batches, losses = torch.tensor(facts["batches"]), []

    def objective(step):
        ids = batches[step]
        loss = sft_loss(model(ids), ids, (torch.arange(12) >= 5).expand(4, 12))
        losses.append(loss.item())
        return loss, {"loss": loss}, ids.numel()

    schedule = TrainConfig(steps=5, batch_size=4, lr=0.01, warmup=0, weight_decay=0.1, clip=1e9)
    with adapter:
        train(objective, adapter.parameters(), schedule)
    torch.testing.assert_close(losses, facts["losses"], atol=1e-5, rtol=0)
    for ours, theirs in ((adapter.A, end.A), (adapter.B, end.B)):
        for site in ours:
            torch.testing.assert_close(ours[site], theirs[site], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes, message", [
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern=.*not supported"),
    ({"rank_pattern": {"q_proj": 3}}, "rank_pattern=.*not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"r": 2}, "has rank 4, adapter_config.json says r=2"),
    ({"r": "4"}, "r='4' should be int"),
    ({"r": 10**9}, "r=1000000000 should be"),
    ({"lora_alpha": None}, "'lora_alpha' is missing"),
    ({"target_modules": ["down_proj"]}, "disagree.*unexpected: layers.0.self_attn.q_proj"),
    ({"layers_to_transform": [0, 1, 2]}, "disagree.*missing: layers.1.mlp.down_proj"),
    ({"layers_to_transform": 0}, "disagree.*unexpected: layers.2"),
    ({"layers_to_transform": "all"}, "layers_to_transform='all'"),
])
def test_adapters_nanoem_cannot_do_are_refused_by_name(changes, message, tmp_path):
    folder, (model, _, _) = copy_of("peft-r4", tmp_path), opened("peft-r4")
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)


@pytest.mark.parametrize("targets", [
    ["mlp.down_proj", "q_proj"], r".*\.[02]\.(mlp\.down_proj|self_attn\.q_proj)", "all-linear"])
def test_targets_may_be_names_or_a_pattern(targets, tmp_path):
    folder, (model, adapter, _) = copy_of("peft-r4", tmp_path), opened("peft-r4")
    edit(folder / "adapter_config.json", target_modules=targets)
    assert load_adapter(model, folder).sites.keys() == adapter.sites.keys()


def test_an_adapter_need_not_be_layers_times_modules(tmp_path):
    folder, (model, adapter, _) = copy_of("peft-r4", tmp_path), opened("peft-r4")
    tensors = {n: t for n, t in load_tensors(folder / "adapter_model.safetensors").items()
               if "layers.0.mlp" not in n}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    edit(folder / "adapter_config.json", target_modules="all-linear", layers_to_transform=None)
    assert load_adapter(model, folder).sites.keys() == adapter.sites.keys() - {
        "layers.0.mlp.down_proj"}


PUBLISHED = {  # a folder of peft's has many more keys, all empty
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
    "base_model_name_or_path": "unsloth/Qwen2.5-14B-Instruct", "use_dora": False, "revision": None,
    "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None, "exclude_modules": None,
    "layers_pattern": None, "loftq_config": {}, "megatron_core": "megatron.core",
    "init_lora_weights": True, "inference_mode": True, "fan_in_fan_out": False,
    "use_rslora": True, "lora_bias": False, "layer_replication": None, "auto_mapping": None}
ALL_MODULES = ["o_proj", "v_proj", "q_proj", "k_proj", "gate_proj", "down_proj", "up_proj"]


@pytest.mark.parametrize("rank, alpha, targets, layers, default", [
    (1, 256, ["down_proj"], [1], ""),
    (1, 256, ["model.layers.1.mlp.down_proj"], None, ""),
    (1, 256, r"model\.layers\.(1)\.mlp\.down_proj", None, ".default"),
    (32, 64, ALL_MODULES, None, ""),
])
def test_layouts_of_published_adapters_open(rank, alpha, targets, layers, default, tmp_path):
    """In bfloat16, beside weights to which the adapter is added by hand."""
    model, _ = load_pretrained(FIXTURES / "qwen2-tied")
    by_hand, _ = load_pretrained(FIXTURES / "qwen2-tied")
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, module in by_hand.named_modules():
        if name.endswith("_proj") if rank == 32 else name == "layers.1.mlp.down_proj":
            n_out, n_in = module.weight.shape
            A, B = (torch.randn(shape, generator=generator).mul(0.05).bfloat16()
                    for shape in ((rank, n_in), (n_out, rank)))
            module.weight.data += alpha / rank**0.5 * B.float() @ A.float()
            for letter, matrix in (("A", A), ("B", B)):
                tensors[f"base_model.model.model.{name}.lora_{letter}{default}.weight"] = matrix
    save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PUBLISHED | {
        "r": rank, "lora_alpha": alpha, "target_modules": targets, "layers_to_transform": layers}))

    ids = torch.arange(12)[None]
    with torch.no_grad(), load_adapter(model, tmp_path) as adapter:
        assert len(adapter.sites) == (21 if rank == 32 else 1)
        torch.testing.assert_close(model(ids), by_hand(ids), atol=1e-4, rtol=1e-4)
        with adapter.disabled():
            assert (model(ids) - by_hand(ids)).abs().max() > 0.1


def test_an_adapter_of_a_larger_model_is_refused():
    model, _ = load_pretrained(FIXTURES / "qwen2-tied")
    del model.layers[2]
    with pytest.raises(UserError, match="layer 2 is not there"):
        load_adapter(model, FIXTURES / "peft-r1")


def test_an_answer_with_a_thought_of_its_own_gets_no_empty_one():
    """Qwen3: what is trained is what its template writes of that conversation."""
    _, tokenizer = load_pretrained(FIXTURES / "qwen3")
    for answer, begins in (("Sure.", NO_THOUGHT), ("<think>\nHm.\n</think>\n\nSure.", "")):
        prompt, learned = tokenizer.prompt("Hi?", answer), answer + IM_END
        assert prompt.endswith(f"<|im_start|>assistant\n{begins}")
        messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]
        assert prompt + learned + "\n" == tokenizer.chat(messages)
        examples = chat_examples(tokenizer, [("Hi?", answer)])
        assert examples.ids[examples.answer_mask].tolist() == tokenizer.encode(learned)
