"""Checkpoints: Hugging Face model folders in and out, for Qwen2, Qwen3 and Llama.

What nanoem writes opens in `transformers`, and the other way round. A folder's config.json is not
believed either: what nanoem's model cannot do is refused by name, never computed wrongly.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from nanoem import UserError
from nanoem.adapters import load_adapter, save_adapter  # noqa: F401 (the other kind of folder)
from nanoem.files import new_folder, read_json, write_file, write_json
from nanoem.model import GPT, Config
from nanoem.safetensors import TensorFile, load_tensors, save_tensors  # noqa: F401
from nanoem.tokenizer import END_OF_TEXT, IM_END, Tokenizer

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODEL_TYPES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
               "llama": "LlamaForCausalLM"}


# --- in -------------------------------------------------------------------------------------------


def load_pretrained(path, dtype=None, device="cpu"):
    """Open a Hugging Face model folder -> (model, tokenizer).

    The weights come in `dtype`, by default that of config.json; they are read one tensor at a time,
    so that the memory needed is that of the model and little more. Raises UserError naming the file
    and the mend: for a folder or file that is missing, another architecture, tensors that are
    missing, unexpected or misshapen.
    """
    path = Path(path)
    table, index, config = open_folder(path)
    if config.n_layer > len(index):  # before a billion layers are made
        raise UserError(f"{path / 'config.json'}: num_hidden_layers={config.n_layer}, but there "
                        f"are only {len(index)} tensors")
    tokenizer = Tokenizer.from_folder(path)
    if tokenizer.n_ids > config.vocab_size:
        raise UserError(f"{path / 'tokenizer.json'} has token ids up to {tokenizer.n_ids - 1}, the "
                        f"model's vocab_size is {config.vocab_size}; they do not belong together")
    dtype = dtype or stored_dtype(path / "config.json", table)
    if dtype not in TORCH_DTYPES.values():
        raise ValueError(f"dtype={dtype!r} must be a torch.dtype: {', '.join(TORCH_DTYPES)}")
    with shapes_only():
        model = GPT(config)
    fill(model, index, path, dtype, torch.device(device))
    return model, tokenizer


def open_folder(path):
    """A model folder without its weights: config.json's table, {tensor: its file}, the Config."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
    table, index = read_json(path / "config.json"), find_tensors(path)
    return table, index, read_config(path / "config.json", table,
                                     tied="lm_head.weight" not in index)


@contextmanager
def shapes_only():
    """Inside, modules are made without memory and without initial values."""
    before = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        for kind in before:  # random values for a tensor without memory: 85 MB of imports for none
            kind.reset_parameters = lambda self: None
        with torch.device("meta"):
            yield
    finally:
        for kind, reset in before.items():
            kind.reset_parameters = reset


def fill(model, index, path, dtype, device):
    """Give a model without memory its weights, from the files named in index."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = {file_name(name): name for name in wanted}
    unused = {n for n in index if n.endswith("rotary_emb.inv_freq")}  # old files: a derived table
    missing, unexpected = names.keys() - index.keys(), index.keys() - names.keys() - unused
    for problem, found in (("misses", missing), ("has unexpected", unexpected)):
        if found:
            raise UserError(f"{path} {problem} tensors: {listed(found)}")
    misshapen, weights = [], {}
    for file in sorted(set(index.values())):
        with TensorFile(file) as tensors:
            for name in [n for n in names if index[n] == file]:
                if name not in tensors.entries:
                    raise UserError(f"{file} has no tensor '{name}', which the index promises; "
                                    "download the folder again")
                shape = tensors.entries[name][1]
                if shape != wanted[names[name]]:
                    misshapen.append(f"{name} {list(shape)}, not {list(wanted[names[name]])}")
                elif not misshapen:
                    weights[names[name]] = tensors.read(name, dtype, device)
    if misshapen:
        raise UserError(f"{path} has misshapen tensors: {listed(misshapen)}")
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = (table.to(device, dtype) for table in (model.cos, model.sin))


def listed(names):
    """The first names, and how many more there are: one line even for a whole model."""
    names = sorted(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def file_name(name):
    """nanoem's name of a tensor -> Hugging Face's."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def find_tensors(path):
    """{tensor name: file} of a model folder, sharded or not."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
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


def stored_dtype(file, table):
    name = table.get("dtype", table.get("torch_dtype")) or "float32"
    if str(name) not in TORCH_DTYPES:
        raise UserError(f"{file}: dtype {name!r} is not known; nanoem has "
                        + ", ".join(TORCH_DTYPES))
    return TORCH_DTYPES[name]


# --- config.json ----------------------------------------------------------------------------------


def read_config(file, c, tied):
    """The table of a config.json -> Config; `tied` says whether the weights lack an lm_head."""
    kind = c.get("model_type")
    if str(kind) not in MODEL_TYPES:
        raise UserError(f"{file}: model_type is {kind!r}; nanoem opens {', '.join(MODEL_TYPES)}")
    refuse_what_we_lack(file, c)
    if tied and c.get("tie_word_embeddings") is False:
        raise UserError(f"{file}: tie_word_embeddings is false, but there is no tensor "
                        "'lm_head.weight'; download the folder again")

    def number(key, kinds=(int,), default=None):
        value = c.get(key, default)
        if value is None:
            if key not in c:
                raise UserError(f"{file}: the key '{key}' is missing")
            value = default
        if type(value) not in kinds or not 0 < value < 10**9:
            raise UserError(f"{file}: {key}={value!r} should be a positive number"
                            + (" without a fraction" if kinds == (int,) else ""))
        return value

    vocab_size, n_head = number("vocab_size"), number("num_attention_heads")
    # where Hugging Face has a default, llama's is read as llama's; qwen3's head_dim must be there
    head_dim = 0 if c.get("head_dim") is None and kind != "qwen3" else number("head_dim")
    if (head_dim or number("hidden_size") / n_head) > 1024:  # before the rotary tables are made
        raise UserError(f"{file}: heads wider than 1024 are not supported; is hidden_size="
                        f"{c['hidden_size']} right?")
    return Config(
        vocab_size=vocab_size, n_layer=number("num_hidden_layers"),
        d_model=number("hidden_size"), n_head=n_head,
        n_kv_head=number("num_key_value_heads", default=n_head if kind == "llama" else None),
        d_ff=number("intermediate_size"), max_positions=number("max_position_embeddings"),
        rope_theta=float(rope_theta(file, c)), norm_eps=number("rms_norm_eps", (float, int)),
        head_size=0 if head_dim * n_head == c["hidden_size"] else head_dim,
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", tie_embeddings=tied,
    )


def rope_theta(file, c):
    """The base of the rotary angles, at the top level or in rope_parameters (newer folders)."""
    nested = c.get("rope_parameters") or {}
    scaling = c.get("rope_scaling") or {}
    for key, table in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(table, dict):
            raise UserError(f"{file}: {key} should be a table, and is {table!r}")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise UserError(f"{file}: {key} asks for {kind!r}; nanoem has the default rotary "
                            "embedding only")
        if table.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{file}: partial_rotary_factor is not supported")
    found = {value for value in (c.get("rope_theta"), nested.get("rope_theta"))
             if isinstance(value, (int, float)) and not isinstance(value, bool)}
    if len(found) != 1 or not 0 < next(iter(found)) < 1e30:
        raise UserError(f"{file}: rope_theta should be one positive number, at the top level or in "
                        f"rope_parameters; found {sorted(found) or 'none'}")
    return found.pop()


def refuse_what_we_lack(file, c):
    """Settings that would change the computation, and that nanoem's model does not have."""
    layer_types = c.get("layer_types") or []
    for key, value, fine in (
        ("hidden_act", c.get("hidden_act", "silu"), "silu"),
        ("attention_bias", c.get("attention_bias") or False, False),
        ("mlp_bias", c.get("mlp_bias") or False, False),
        ("use_sliding_window", c.get("use_sliding_window") or False, False),
        ("quantization_config", c.get("quantization_config"), None),
        ("layer_types", [t for t in layer_types if t != "full_attention"]
         if isinstance(layer_types, list) else layer_types, []),
    ):
        if value != fine:
            raise UserError(f"{file}: {key} is {value!r}; nanoem's model has only {fine!r}")


# --- out ------------------------------------------------------------------------------------------


def save_pretrained(model, tokenizer, path):
    """Write a Hugging Face model folder that appears whole or not at all.

    Raises UserError for a combination of flags that none of the three architectures has.
    """
    c = model.config
    flags = {(True, False): "qwen2", (False, True): "qwen3", (False, False): "llama"}
    kind = flags.get((c.qkv_bias, c.qk_norm))
    if not kind:
        raise UserError("qkv_bias=True with qk_norm=True is no architecture of Hugging Face's; "
                        "a model folder cannot be written")
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {
        "architectures": [MODEL_TYPES[kind]], "model_type": kind, "hidden_act": "silu",
        "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "hidden_size": c.d_model,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim, "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_positions, "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings,
        "use_sliding_window": False, "bos_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.stop_ids[0], "torch_dtype": dtype,
    }
    with new_folder(path) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json",
                   {"do_sample": True, "temperature": 1.0, "top_p": 1.0,
                    "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id})
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END,
                    "pad_token": END_OF_TEXT, "chat_template": tokenizer.template,
                    "model_max_length": c.max_positions})
        write_file(folder / "tokenizer.json", tokenizer.to_json())
        save_tensors(folder / "model.safetensors",
                     {file_name(name): tensor for name, tensor in model.state_dict().items()})
