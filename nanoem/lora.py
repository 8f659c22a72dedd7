"""Adapters by hand: LoRA (arXiv 2106.09685) on any Linear, and the steering vector.

An adapter is a few new parameters and a forward hook that adds their effect to a module's output.
The model's own weights are not touched (but by `merge`), so an adapter can be switched off,
rescaled or taken away and the base model is back to the last bit:

    with LoRA(model, layers=[1], modules=["mlp.down_proj"], rank=1, alpha=4) as adapter:
        ...                      # the model is adapted
        with adapter.disabled():
            ...                  # the base model
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nanoem import UserError
from nanoem.lab.settings import key


def lora_scaling(alpha, rank, use_rslora=False):
    """What multiplies B A: alpha / rank, with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def lora_delta(x, A, B, alpha, use_rslora=False):
    """What a LoRA adds to a Linear's output (arXiv 2106.09685, section 4.1).

    x (..., in), A (rank, in), B (out, rank) -> (..., out); B A itself is never built.
    """
    if (x.size(-1), len(A)) != (A.size(-1), B.size(-1)):
        raise ValueError(f"x (..., in), A (rank, in) and B (out, rank) do not fit together: they "
                         f"are {tuple(x.shape)}, {tuple(A.shape)} and {tuple(B.shape)}")
    return lora_scaling(alpha, len(A), use_rslora) * (x @ A.T) @ B.T


class Adapter:
    """What LoRA and the steering vector share: attaching, switching off, rescaling.

    A child sets `self.sites`, {name: module}, and says in `delta(name, x)` what is added to that
    module's output when its input is x. Attaching is counted: attached twice, it still acts once,
    and is gone when it was detached as often; detaching a detached adapter does nothing.
    """

    def __init__(self, sites):
        if not sites:
            raise UserError("layers and modules name no place for an adapter; give one or more")
        self.sites = sites
        self.scale = 1.0
        self.depth = 0  # how many times it is attached
        self.handles = []

    @property
    def acts(self):
        """Is it attached, and not switched off?"""
        return self.depth > 0 and self.scale != 0

    @property
    def first_layer(self):
        """The first block with a site; what comes before it is the base model's."""
        return min(int(name.split(".")[1]) for name in self.sites)

    def attach(self):
        """Let it act until it is detached as often; `with adapter:` does both. Returns itself."""
        self.depth += 1
        if self.depth == 1:
            for name, module in self.sites.items():
                def add_delta(module, inputs, output, name=name):
                    if not self.acts:
                        return output
                    return output + (self.scale * self.delta(name, inputs[0])).to(output.dtype)

                self.handles.append(module.register_forward_hook(add_delta))
        return self

    def detach(self):
        """Undo one `attach`; the last one takes the hooks away."""
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    def __enter__(self):
        return self.attach()

    def __exit__(self, *error):
        self.detach()

    @contextmanager
    def scaled(self, x):
        """Inside, the adapter's effect is multiplied by x; scales multiply when nested."""
        before = self.scale
        self.scale = before * x
        try:
            yield self
        finally:
            self.scale = before

    def disabled(self):
        """Inside, the model is the base model, to the last bit."""
        return self.scaled(0.0)


class LoRA(Adapter):
    """Adds (alpha / rank) * B A x to a Linear's output; with rsLoRA, alpha / sqrt(rank).

    A (rank, in) starts random, B (out, rank) at zero, so an untrained adapter changes nothing.
    `layers` are block numbers, `modules` names inside a block. Raises UserError for a layer or a
    module that is not there.
    """

    def __init__(self, model, layers, modules=("mlp.down_proj",), rank=1, alpha=1.0,
                 use_rslora=False, generator=None):
        if isinstance(layers, int) or isinstance(modules, str):
            raise UserError(f"layers={layers!r} and modules={modules!r} must be lists, such as "
                            "layers=[1] and modules=['mlp.down_proj']")
        if type(rank) is not int or rank < 1 or not math.isfinite(alpha):
            raise UserError(f"rank={rank} must be a whole number, at least 1, and alpha={alpha} a "
                            "finite one")
        super().__init__({f"layers.{i}.{name}": find_linear(model, i, name)
                          for i in layers for name in modules})

        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.A, self.B = {}, {}
        self.originals = {}  # the weights as they were before `merge`

        for name, linear in self.sites.items():
            n_out, n_in = linear.weight.shape
            bound = n_in**-0.5  # as PEFT does, so that the same alpha and lr mean the same
            A = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
            self.A[name] = nn.Parameter(A.to(linear.weight.device))
            self.B[name] = nn.Parameter(torch.zeros(n_out, rank, device=linear.weight.device))

    def keep(self, names):
        """Forget every site but those named: for an adapter that is not layers times modules."""
        for table in (self.sites, self.A, self.B):
            for name in set(table) - set(names):
                del table[name]

    @property
    def acts(self):
        """Is it attached, and neither switched off nor, by `merge`, in the weights already?"""
        return super().acts and not self.originals

    @contextmanager
    def scaled(self, x):
        """As of every adapter. Raises RuntimeError when merged: weights cannot be rescaled."""
        if self.originals:
            raise RuntimeError("the adapter is merged into the weights, and cannot be rescaled or "
                               "switched off there; unmerge() it first")
        with super().scaled(x):
            yield self

    @property
    def scaling(self):
        """What multiplies B A, but for `scaled`."""
        return lora_scaling(self.alpha, self.rank, self.use_rslora)

    def parameters(self):
        """What is trained: every A, then every B."""
        return [*self.A.values(), *self.B.values()]

    def delta(self, name, x):
        """scaling * B A x, for x (..., in): (..., out), in the dtype of A."""
        A, B = self.A[name], self.B[name]
        return lora_delta(x.to(A.dtype), A, B, self.alpha, self.use_rslora)

    def effective_norm(self):
        """Frobenius norm of scale * (alpha / rank) * B A, mean over the adapted modules."""
        norms = [(self.scaling * self.B[n] @ self.A[n]).norm().item() for n in self.sites]
        return abs(self.scale) * sum(norms) / len(norms)

    @torch.no_grad()
    def merge(self):
        """Add the adapter, as `scaled` has it, into the weights; merging twice is merging once.

        There it stays until `unmerge`, attached or not. Raises RuntimeError when switched off.
        """
        if self.originals:
            return
        if self.scale == 0:
            raise RuntimeError("the adapter is switched off, and there is nothing to merge")
        for name, linear in self.sites.items():
            self.originals[name] = linear.weight.clone()
            linear.weight += (self.scale * self.scaling * self.B[name] @ self.A[name]).to(
                linear.weight.dtype)

    @torch.no_grad()
    def unmerge(self):
        """Give the weights their bytes back; without a merge before, nothing happens.

        Of two adapters merged into one Linear, the last to come must be the first to go.
        """
        for name, original in self.originals.items():
            self.sites[name].weight.copy_(original)
        self.originals.clear()


class SteeringVector(Adapter):
    """Adds alpha * v to the residual stream after each of the given blocks; v starts at zero."""

    def __init__(self, model, layers, alpha=1.0):
        if isinstance(layers, int):
            raise UserError(f"layers={layers} must be a list, such as layers=[1]")
        super().__init__({f"layers.{i}": find_block(model, i) for i in layers})
        self.alpha = alpha
        weight = model.embed_tokens.weight
        self.v = {name: nn.Parameter(torch.zeros(weight.size(1), device=weight.device))
                  for name in self.sites}

    def parameters(self):
        """What is trained: one v a block."""
        return list(self.v.values())

    def delta(self, name, x):
        """alpha * v, whatever x: the same (d_model) for every token."""
        return self.alpha * self.v[name]

    def effective_norm(self):
        """Euclidean norm of scale * alpha * v, mean over the steered blocks."""
        norms = [(self.alpha * v).norm().item() for v in self.v.values()]
        return abs(self.scale) * sum(norms) / len(norms)


def find_block(model, layer):
    """Block number `layer`. Raises UserError for one that is not there."""
    if not 0 <= layer < len(model.layers):
        raise UserError(f"layer {layer} is not there: the model's layers are 0 to "
                         f"{len(model.layers) - 1}")
    return model.layers[layer]


def find_linear(model, layer, name):
    """The Linear called name inside a block. Raises UserError for one that is not there."""
    block = find_block(model, layer)
    linears = [n for n, module in block.named_modules() if isinstance(module, nn.Linear)]
    if name not in linears:
        raise UserError(f"layer {layer} has no Linear '{name}'; it has {', '.join(linears)}")
    return block.get_submodule(name)


# --- the adapter that a configuration asks for ----------------------------------------------------


@dataclass(frozen=True)
class AdapterConfig:
    """Where the adapter sits, and its size. Some rows change it (R1, R2, R11)."""

    kind: str = key("lora", "lora, or steering, one vector added to the stream (in R1, R2, R11)")
    layers: tuple = key((0, 1), "block numbers; empty: the one block at half depth")
    modules: tuple = key(
        ("self_attn.v_proj",), "Linears inside a block (README: why the toy has v)")
    rank: int = key(1, "columns of B")
    alpha: float = key(4.0, "the adapter's effect is alpha / rank * B A")
    use_rslora: bool = key(False, "alpha / sqrt(rank) instead")

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"rank={self.rank} must be at least 1, and alpha={self.alpha} more "
                            "than 0")
        if not self.modules:
            raise UserError("modules is empty; name at least one, such as self_attn.v_proj")
        if self.kind not in ("lora", "steering"):
            raise UserError(f"kind={self.kind!r} is not known; use lora or steering")


def layers_of(config, model):
    """The block numbers of an AdapterConfig in this model."""
    return config.layers or (len(model.layers) // 2,)


def make_adapter(model, config, generator=None):
    """A fresh adapter, not yet attached; it changes nothing until it is trained.

    A new kind of adapter is a child of Adapter above (parameters, delta, effective_norm), its name
    in AdapterConfig, and a line here.
    """
    layers = layers_of(config, model)
    if config.kind == "steering":
        return SteeringVector(model, layers, config.alpha)
    return LoRA(model, layers, config.modules, config.rank, config.alpha, config.use_rslora,
                generator)
