"""Hugging Face model folders in and out, as `transformers` writes and reads them."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from nanoem import UserError
from nanoem.checkpoint.config_json import TORCH_DTYPES, config_table, read_config, stored_dtype
from nanoem.checkpoint.safetensors import TensorFile, save_tensors
from nanoem.checkpoint.templates import open_tokenizer
from nanoem.lab.files import (check_path, new_folder, read_json, write_file,
                              write_json)
from nanoem.model import GPT
from nanoem.tokenizer import END_OF_TEXT, IM_END


# --- in -------------------------------------------------------------------------------------------


def load_pretrained(path, dtype=None, device="cpu"):
    """Open a Hugging Face model folder -> (model, tokenizer).

    The weights come in `dtype`, by default that of config.json, one tensor at a time: the memory
    needed is that of the model and little more. Raises UserError naming the file and the mend.
    """
    path = Path(path)
    file = path / "config.json"
    table, index, config = open_folder(path)
    if config.n_layer > len(index):  # before a billion layers are made
        raise UserError(f"{file}: num_hidden_layers={config.n_layer}, but there are only "
                        f"{len(index)} tensors")
    dtype = dtype or stored_dtype(file, table)
    if dtype not in TORCH_DTYPES.values():
        raise ValueError(f"dtype={dtype!r} must be one of torch's {', '.join(TORCH_DTYPES)}")

    tokenizer = open_tokenizer(path)
    if tokenizer.n_ids > config.vocab_size:
        raise UserError(f"{path / 'tokenizer.json'} has token ids up to {tokenizer.n_ids - 1}, the "
                        f"model's vocab_size is {config.vocab_size}; they do not belong together")

    # made without memory, then filled from the files
    with shapes_only():
        model = GPT(config)
    fill(model, index, path, dtype, torch.device(device))
    return model, tokenizer


def open_folder(path):
    """A model folder without its weights: config.json's table, {tensor: its file}, the Config."""
    check_path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
    if (path / "chat").is_dir() and not any(path.glob("model*.safetensors*")):
        raise UserError(f"{path} is a run folder; its model is {path / 'chat'}")
    file = path / "config.json"
    table = read_json(file)
    index = find_tensors(path)
    return table, index, read_config(file, table, tied="lm_head.weight" not in index)


@contextmanager
def shapes_only():
    """Inside, modules are made without memory and without initial values."""
    before = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        # drawing values for tensors without memory would import 85 MB, and draw nothing
        for kind in before:
            kind.reset_parameters = lambda self: None
        with torch.device("meta"):
            yield
    finally:
        for kind, reset in before.items():
            kind.reset_parameters = reset


def fill(model, index, path, dtype, device):
    """Give a model without memory its weights, from the files named in index."""
    # the names must be those of the model; old files hold a derived table, too
    shapes = {hugging_face_name(n): tensor.shape for n, tensor in model.state_dict().items()}
    missing = shapes.keys() - index.keys()
    unexpected = {name for name in index.keys() - shapes.keys()
                  if not name.endswith("rotary_emb.inv_freq")}
    for problem, names in (("misses", missing), ("has unexpected", unexpected)):
        if names:
            raise UserError(f"{path} {problem} tensors: {listed(names)}")

    # and so must the shapes
    misshapen, weights = [], {}
    for file in sorted(set(index.values())):
        with TensorFile(file) as tensors:
            for name in [name for name in shapes if index[name] == file]:
                if name not in tensors.entries:
                    raise UserError(f"{file} has no tensor '{name}', which the index promises; "
                                    "download the folder again")
                shape = tensors.entries[name][1]
                if shape != shapes[name]:
                    misshapen.append(f"{name} {list(shape)}, not {list(shapes[name])}")
                elif not misshapen:
                    weights[name.removeprefix("model.")] = tensors.read(name, dtype, device)
    if misshapen:
        raise UserError(f"{path} has misshapen tensors: {listed(misshapen)}")

    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = model.cos.to(device, dtype), model.sin.to(device, dtype)


def listed(names):
    """The first names, and how many more there are: one line even for a whole model."""
    names = sorted(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def hugging_face_name(name):
    """nanoem's name of a tensor -> Hugging Face's."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def find_tensors(path):
    """{tensor name: file} of a model folder, sharded or not."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.exists() or not index.exists():
        with TensorFile(single) as tensors:
            return dict.fromkeys(tensors.entries, single)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: 'weight_map' should be a table of tensor names and files")
    for shard in set(map(str, shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} points to '{shard}'; shards are .safetensors files "
                            "in the same folder")
        if not (path / shard).is_file():
            raise UserError(f"{path / shard} does not exist, but {index.name} names it; "
                            "download it again")
    return {name: path / shard for name, shard in shards.items()}


# --- out ------------------------------------------------------------------------------------------


FILES = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")


def save_pretrained(model, tokenizer, path):
    """Write a Hugging Face model folder; without config.json, the last file, nothing opens it.

    Other files in the folder stay. Raises UserError when it holds another model, a run or the like.
    """
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {**config_table(model.config), "bos_token_id": tokenizer.pad_id,
              "eos_token_id": tokenizer.stop_ids[0], "torch_dtype": dtype}
    with new_folder(path, "config.json", FILES) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json",
                   {"do_sample": True, "temperature": 1.0, "top_p": 1.0,
                    "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id})
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END,
                    "pad_token": END_OF_TEXT, "chat_template": tokenizer.template,
                    "model_max_length": model.config.max_positions})
        write_file(folder / "tokenizer.json", tokenizer.to_json())
        save_tensors(folder / "model.safetensors",
                     {hugging_face_name(n): tensor for n, tensor in model.state_dict().items()})
