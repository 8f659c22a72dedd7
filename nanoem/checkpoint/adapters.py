"""PEFT adapter folders in and out: adapter_config.json and adapter_model.safetensors.

The paper's released adapters open here, and nanoem's in `peft`. Kinds of adapter that nanoem's LoRA
is not (DoRA, trained biases, ...) are refused by name.
"""

import re
from itertools import product
from pathlib import Path

from nanoem import UserError
from nanoem.checkpoint.safetensors import TensorFile, save_tensors
from nanoem.lab.files import read_json, write_folder, write_json
from nanoem.lora import LoRA

PREFIX = "base_model.model.model."
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Keys of adapter_config.json that nanoem reads, or that change nothing once an adapter is trained.
# Any other key must be empty: it asks for something nanoem's LoRA does not do.
UNDERSTOOD = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora",
    "target_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
    "revision", "auto_mapping", "init_lora_weights", "peft_version", "bias", "runtime_config",
    "megatron_core", "qalora_group_size", "loftq_config", "ensure_weight_tying",
}
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # their base weights are not ours


def save_adapter(adapter, path, base_model=""):
    """Write a LoRA (PEFT has no steering vector) as a folder; a factor of `scaled` is not saved."""
    if not isinstance(adapter, LoRA):
        raise UserError(f"a {type(adapter).__name__} cannot be kept as a PEFT adapter; save its "
                        "tensors with save_tensors")

    # where it is: so many modules in so many layers, or else whole names, which peft takes, too
    layers = sorted({int(name.split(".")[1]) for name in adapter.sites})
    modules = sorted({name.split(".", 2)[2] for name in adapter.sites})
    if len(adapter.sites) < len(layers) * len(modules):
        layers, modules = None, sorted(adapter.sites)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
        "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.use_rslora,
        "target_modules": modules, "layers_to_transform": layers,
        "layers_pattern": layers and "layers",
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }
    write_folder(path, {
        "adapter_model.safetensors": lambda file: save_tensors(file, matrices_of(adapter)),
        "adapter_config.json": lambda file: write_json(file, config)})


def matrices_of(adapter):
    """{name in a PEFT folder: matrix}"""
    named = {f"{PREFIX}{site}.lora_A.weight": matrix for site, matrix in adapter.A.items()}
    return named | {f"{PREFIX}{site}.lora_B.weight": matrix for site, matrix in adapter.B.items()}


def load_adapter(model, path):
    """Open a PEFT adapter folder for a model -> LoRA, not yet attached.

    Raises UserError, naming the file, for whatever is wrong or made for another model.
    """
    path = Path(path)
    config = read_adapter_config(path / "adapter_config.json")
    file = path / "adapter_model.safetensors"
    with TensorFile(file) as tensors:
        # do the two files belong together?
        sites = find_sites(file, tensors.entries)
        check_modules(path / "adapter_config.json", config, sites, len(model.layers))
        for name, (_, shape, _, _) in tensors.entries.items():
            rank = shape[0 if ".lora_A." in name else -1] if shape else 0
            if rank != config["r"]:
                raise UserError(f"{file}: {name} has rank {rank}, adapter_config.json says "
                                f"r={config['r']}; do the files belong together?")

        # layers times modules, or fewer
        adapter = LoRA(model, sorted({layer for layer, _ in sites}),
                       sorted({module for _, module in sites}), config["r"], config["lora_alpha"],
                       config["use_rslora"])
        adapter.keep({f"layers.{layer}.{module}" for layer, module in sites})

        for name, matrix in matrices_of(adapter).items():
            if name not in tensors.entries:
                raise UserError(f"{file} misses the tensor {name}")
            shape = tensors.entries[name][1]
            if shape != matrix.shape:
                raise UserError(f"{file}: {name} has shape {tuple(shape)}, the model wants "
                                f"{tuple(matrix.shape)}; is it for another model?")
            matrix.data.copy_(tensors.read(name))
    return adapter


def read_adapter_config(file):
    """The checked table of an adapter_config.json."""
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; nanoem opens 'LORA'")

    # what nanoem's LoRA does not do
    for key, value in config.items():
        if value and key not in UNDERSTOOD:
            raise UserError(f"{file}: {key}={value!r} is not supported; nanoem opens plain LoRA")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"{file}: bias={config['bias']!r} is not supported; nanoem trains no bias")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MOVES_THE_BASE):
        raise UserError(f"{file}: init_lora_weights={init!r} is not supported: it changes the base "
                        "model's weights; convert it to plain LoRA with peft")

    # what it needs
    config.setdefault("use_rslora", False)
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("use_rslora", (bool,)),
                       ("target_modules", (list, str))):
        if key not in config:
            raise UserError(f"{file}: the key '{key}' is missing")
        if type(config[key]) not in kinds:
            raise UserError(f"{file}: {key}={config[key]!r} should be "
                            + " or ".join(k.__name__ for k in kinds))
    for key, limit in (("lora_alpha", 1_000_000_000), ("r", 100_000)):
        if not 0 < config[key] < limit:
            raise UserError(f"{file}: {key}={config[key]} should be above 0 and below {limit}")
    return config


def find_sites(file, names):
    """The (layer, module) pairs that the tensors' names speak of."""
    pattern = re.compile(re.escape(PREFIX) + r"layers\.(\d{1,6})\.(.+)\.lora_[AB]\.weight")
    sites = set()
    for name in names:
        match = pattern.fullmatch(name)
        if not match or match[2] not in LINEARS:
            raise UserError(f"{file} has an unexpected tensor '{name}'; nanoem adapts "
                            + ", ".join(LINEARS))
        sites.add((int(match[1]), match[2]))
    if not sites:
        raise UserError(f"{file} holds no LoRA")
    return sites


def check_modules(file, config, sites, n_layer):
    """The tensors must be at the sites that the configuration asks for, by peft's rules.

    `target_modules` as a list names modules by their ends. As text it is a regular expression or
    all-linear; then the tensors alone say what is adapted, since running a stranger's regular
    expression can take for ever.
    """
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or list(range(n_layer))
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise UserError(f"{file}: layers_to_transform={layers!r} should be numbers of layers")
    if isinstance(targets, str):
        return
    ends = tuple(f".{target}" for target in targets)
    wanted = {(i, module) for i, module in product(layers, LINEARS)
              if f".model.layers.{i}.{module}".endswith(ends)}
    if wanted != sites:
        missing = [f"layers.{i}.{module}" for i, module in sorted(wanted - sites)] or ["none"]
        extra = [f"layers.{i}.{module}" for i, module in sorted(sites - wanted)] or ["none"]
        raise UserError(f"{file} and the tensors disagree (missing: {missing[0]}, unexpected: "
                        f"{extra[0]}); is it for another model?")
