"""config.json of a Hugging Face model folder <-> Config, for Qwen2, Qwen3 and Llama.

The file is not believed: what nanoem's model cannot do is refused by name, never computed wrongly.
"""

import torch

from nanoem import UserError
from nanoem.model import Config

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FAMILIES = {  # model_type: (architecture, qkv_bias, qk_norm); a new family is one more line
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", False, True),
    "llama": ("LlamaForCausalLM", False, False),
}


def read_config(file, c, tied):
    """The table of a config.json -> Config; `tied` says whether the weights lack an lm_head."""
    kind = c.get("model_type")
    if str(kind) not in FAMILIES:
        raise UserError(f"{file}: model_type is {kind!r}; nanoem opens {', '.join(FAMILIES)}")
    refuse_what_we_lack(file, c)
    if tied and c.get("tie_word_embeddings") is False:
        raise UserError(f"{file}: tie_word_embeddings is false, but there is no tensor "
                        "'lm_head.weight'; download the folder again")

    def number(key, kinds=(int,), default=None):
        value = default if c.get(key) is None else c[key]
        if value is None and key not in c:
            raise UserError(f"{file}: the key '{key}' is missing")
        if type(value) not in kinds or not 0 < value < 10**9:
            raise UserError(f"{file}: {key}={value!r} should be a positive number"
                            + (" without a fraction" if kinds == (int,) else ""))
        return value

    # only qwen3 must say its head_dim (else it is d_model / n_head); only llama may leave
    # num_key_value_heads out
    vocab_size = number("vocab_size")
    n_head = number("num_attention_heads")
    d_model = number("hidden_size")
    head_dim = 0 if c.get("head_dim") is None and kind != "qwen3" else number("head_dim")
    n_kv_head = number("num_key_value_heads", default=n_head if kind == "llama" else None)
    if (head_dim or d_model / n_head) > 1024:  # before the rotary tables are made
        raise UserError(f"{file}: heads wider than 1024 are not supported; is hidden_size="
                        f"{d_model} right?")

    _, qkv_bias, qk_norm = FAMILIES[kind]
    shape = dict(
        vocab_size=vocab_size, n_layer=number("num_hidden_layers"), d_model=d_model,
        n_head=n_head, n_kv_head=n_kv_head, d_ff=number("intermediate_size"),
        max_positions=number("max_position_embeddings"), rope_theta=rope_theta(file, c),
        norm_eps=number("rms_norm_eps", (float, int)),
        head_size=0 if head_dim * n_head == d_model else head_dim,
        qkv_bias=qkv_bias, qk_norm=qk_norm, tie_embeddings=tied,
    )
    try:
        return Config(**shape)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def rope_theta(file, c):
    """The base of the rotary angles, at the top level or in rope_parameters (newer folders)."""
    thetas = [c.get("rope_theta")]
    for key in ("rope_parameters", "rope_scaling"):
        table = c.get(key) or {}
        if not isinstance(table, dict):
            raise UserError(f"{file}: {key} should be a table, and is {table!r}")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise UserError(f"{file}: {key} asks for {kind!r}; nanoem has the default rotary "
                            "embedding only")
        if table.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{file}: partial_rotary_factor is not supported")
        if key == "rope_parameters":
            thetas.append(table.get("rope_theta"))

    # one of the two must say it, and they must agree
    thetas = {theta for theta in thetas if type(theta) in (int, float)}
    if len(thetas) != 1 or not 0 < min(thetas) < 1e30:
        raise UserError(f"{file}: rope_theta should be one positive number, at the top level or in "
                        f"rope_parameters; found {sorted(thetas) or 'none'}")
    return float(thetas.pop())


def refuse_what_we_lack(file, c):
    """Settings that would change the computation, and that nanoem's model does not have."""
    layer_types = c.get("layer_types") or []
    if isinstance(layer_types, list):
        layer_types = [kind for kind in layer_types if kind != "full_attention"]
    for key, value, fine in (
        ("hidden_act", c.get("hidden_act", "silu"), "silu"),
        ("attention_bias", c.get("attention_bias") or False, False),
        ("mlp_bias", c.get("mlp_bias") or False, False),
        ("use_sliding_window", c.get("use_sliding_window") or False, False),
        ("quantization_config", c.get("quantization_config"), None),
        ("layer_types", layer_types, []),
    ):
        if value != fine:
            raise UserError(f"{file}: {key} is {value!r}; nanoem's model has only {fine!r}")


def stored_dtype(file, c):
    """The dtype that a config.json names; float32 when it names none."""
    name = c.get("dtype", c.get("torch_dtype")) or "float32"
    if str(name) not in TORCH_DTYPES:
        raise UserError(f"{file}: dtype {name!r} is not known; nanoem has "
                        + ", ".join(TORCH_DTYPES))
    return TORCH_DTYPES[name]


def config_table(c):
    """A Config -> the table of its config.json, as `read_config` reads it.

    Raises UserError for a combination of flags that none of the three architectures has.
    """
    flags = c.qkv_bias, c.qk_norm
    kind = next((kind for kind, family in FAMILIES.items() if family[1:] == flags), None)
    if kind is None:
        raise UserError("qkv_bias=True with qk_norm=True is no architecture of Hugging Face's; "
                        "a model folder cannot be written")
    return {
        "architectures": [FAMILIES[kind][0]], "model_type": kind, "hidden_act": "silu",
        "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "hidden_size": c.d_model,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim, "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_positions, "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings,
        "use_sliding_window": False,
    }
