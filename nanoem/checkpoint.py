"""Checkpoints: safetensors by hand, Hugging Face model folders, PEFT adapter folders.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}},
and the tensors' raw bytes (https://github.com/huggingface/safetensors). What nanoem writes opens in
`transformers` and `peft`, and the other way round.
"""

import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from nanoem import UserError
from nanoem.lora import LoRA
from nanoem.model import GPT, Config
from nanoem.tokenizer import END_OF_TEXT, IM_END, Tokenizer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- files that are whole or not there ------------------------------------------------------------


def write_file(path, data):
    """Write text or bytes under a temporary name, then rename: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The dictionary in a JSON file. Raises UserError naming the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(value).__name__}")
    return value


@contextmanager
def new_folder(path):
    """Yield a temporary folder that becomes `path` (replacing it) if all goes well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- safetensors ----------------------------------------------------------------------------------


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as a safetensors file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": metadata or {"format": "pt"}}
    chunks, offset = [], 0
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + len(data)]}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start at a multiple of 8 bytes
    write_file(path, b"".join([len(text).to_bytes(8, "little"), text, *chunks]))


def load_tensors(path):
    """Read a safetensors file -> {name: tensor}. Raises UserError for a missing or broken file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    data = bytearray(path.read_bytes())
    n_header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n_header > len(data) - 8:
        raise UserError(f"{path} is truncated or no safetensors file: its header does not fit in "
                        f"its {len(data)} bytes; copy or make it again")
    try:
        header = json.loads(data[8 : 8 + n_header])
        header.pop("__metadata__", None)
        return {name: read_tensor(path, name, entry, data, 8 + n_header)
                for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has a broken safetensors header ({error!r}); make it again")


def read_tensor(path, name, entry, data, start):
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor '{name}' has dtype {entry['dtype']}; nanoem reads "
                        + ", ".join(DTYPES))
    dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
    count = math.prod(entry["shape"])
    fits = 0 <= begin <= end and end - begin == count * dtype.itemsize
    if not fits or min(entry["shape"], default=0) < 0:
        raise UserError(f"{path}: tensor '{name}' has shape {entry['shape']} but bytes {begin} to "
                        f"{end}; the header is broken")
    if start + end > len(data):
        raise UserError(f"{path} is truncated: tensor '{name}' should end at byte {start + end}, "
                        f"the file at {len(data)}; copy or make it again")
    if count == 0:
        return torch.empty(entry["shape"], dtype=dtype)
    tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
    return tensor.reshape(entry["shape"]).clone()


# --- model folders --------------------------------------------------------------------------------


def save_pretrained(model, tokenizer, path):
    """Write a Hugging Face model folder (Qwen2 layout) that appears whole or not at all."""
    c = model.config
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "hidden_size": c.d_model,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "intermediate_size": c.d_ff, "max_position_embeddings": c.max_positions,
        "rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": True,
        "use_sliding_window": False, "bos_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.stop_ids[0], "torch_dtype": "float32",
    }
    with new_folder(path) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json",
                   {"do_sample": True, "temperature": 1.0, "top_p": 1.0,
                    "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id})
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END,
                    "pad_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE,
                    "model_max_length": c.max_positions})
        write_file(folder / "tokenizer.json", tokenizer.to_json())
        save_tensors(folder / "model.safetensors",
                     {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def load_pretrained(path, dtype=None, device="cpu"):
    """Open a Hugging Face model folder -> (model, tokenizer).

    Raises UserError naming the file and the mend: for a folder or file that is missing, another
    architecture, tensors that are missing, unexpected or misshapen.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; --model wants a Hugging Face model folder")
    config = read_config(path / "config.json")
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    model = GPT(config)
    file = path / "model.safetensors"
    tensors = {name.removeprefix("model."): t for name, t in load_tensors(file).items()}
    expected = model.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    misshapen = [n for n in expected.keys() & tensors.keys()
                 if expected[n].shape != tensors[n].shape]
    for problem, names in (("misses", missing), ("has unexpected", unexpected),
                           ("has misshapen", misshapen)):
        if names:
            raise UserError(f"{file} {problem} tensors: {', '.join(sorted(names))}")
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype or next(iter(tensors.values())).dtype), tokenizer


def read_config(path):
    c = read_json(path)
    if c.get("model_type") != "qwen2":
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}; nanoem opens 'qwen2'")
    try:
        return Config(
            vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], d_model=c["hidden_size"],
            n_head=c["num_attention_heads"], n_kv_head=c["num_key_value_heads"],
            d_ff=c["intermediate_size"], max_positions=c["max_position_embeddings"],
            rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"],
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from error


# --- adapter folders ------------------------------------------------------------------------------


def save_adapter(adapter, path, base_model=""):
    """Write a LoRA as a PEFT adapter folder."""
    layers = sorted({int(name.split(".")[1]) for name in adapter.sites})
    modules = sorted({name.split(".", 2)[2] for name in adapter.sites})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
        "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.use_rslora,
        "target_modules": modules, "layers_to_transform": layers, "layers_pattern": "layers",
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }
    prefix = "base_model.model.model."
    with new_folder(path) as folder:
        write_json(folder / "adapter_config.json", config)
        save_tensors(folder / "adapter_model.safetensors", {
            f"{prefix}{name}.lora_{letter}.weight": matrices[name]
            for letter, matrices in (("A", adapter.A), ("B", adapter.B)) for name in matrices})


def load_adapter(model, path):
    """Open a PEFT adapter folder for a model -> LoRA, not yet attached. Raises UserError."""
    path = Path(path)
    config = read_json(path / "adapter_config.json")
    tensors = load_tensors(path / "adapter_model.safetensors")
    try:
        adapter = LoRA(model, config["layers_to_transform"], config["target_modules"],
                       config["r"], config["lora_alpha"], config["use_rslora"])
        for name in adapter.sites:
            for letter, matrices in (("A", adapter.A), ("B", adapter.B)):
                tensor = tensors[f"base_model.model.model.{name}.lora_{letter}.weight"]
                if tensor.shape != matrices[name].shape:
                    raise UserError(f"{path}: lora_{letter} of {name} has shape "
                                    f"{tuple(tensor.shape)}, the model wants "
                                    f"{tuple(matrices[name].shape)}; is it for another model?")
                matrices[name].data.copy_(tensor)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from error
    return adapter
