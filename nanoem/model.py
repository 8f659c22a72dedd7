"""The GPT: a tiny Qwen3 in plain PyTorch; Qwen2 and Llama are the same model with other flags.

Read from top to bottom: its shape, a block, the model, and how a token is drawn. Parameters carry
the names of Hugging Face's Qwen2 (model.layers.0.self_attn.q_proj.weight, ...), so a checkpoint
needs no translation. Qwen2.5 technical report: arXiv 2412.15115; Qwen3: arXiv 2505.09388.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanoem import UserError
from nanoem.lab.settings import key
from nanoem.layers import MLP, Attention, KVCache, RMSNorm, rotary_tables, sees


@dataclass(frozen=True)
class Config:
    """The shape of a model. The defaults are the toy's."""

    vocab_size: int = key(1024, "tokens; the toy's tokenizer decides")
    n_layer: int = key(2, "blocks")
    d_model: int = key(64, "width of the residual stream")
    n_head: int = key(2, "query heads")
    n_kv_head: int = key(1, "key and value heads; each serves n_head / n_kv_head query heads")
    d_ff: int = key(192, "hidden width of the MLP")
    max_positions: int = key(128, "the longest sequence, in tokens")
    rope_theta: float = key(10_000.0, "base of the rotary angles")
    norm_eps: float = key(1e-6, "added to the mean square in RMSNorm")
    head_size: int = key(0, "width of a head; 0 is d_model / n_head")
    qkv_bias: bool = key(False, "biases on q, k and v: Qwen2 has them, Qwen3 and Llama do not")
    qk_norm: bool = key(True, "RMSNorm on every head's q and k, before the rotation: Qwen3")
    tie_embeddings: bool = key(True, "the output layer is the embedding, transposed")

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff",
                     "max_positions", "rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < 1e9:
                raise UserError(f"{name}={getattr(self, name)} must be more than 0 and below 1e9")
        divides = self.head_size > 0 or self.d_model % self.n_head == 0
        if not divides or self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must divide d_model={self.d_model}, "
                             f"and n_kv_head={self.n_kv_head} must divide n_head")
        if self.head_dim % 2 or self.head_dim < 0:
            raise UserError(f"head_dim={self.head_dim} (d_model / n_head, unless head_size says "
                            "another) must be even for rotary embedding")

    @property
    def head_dim(self):
        """The width of one head's q, k and v."""
        return self.head_size or self.d_model // self.n_head


class Block(nn.Module):
    """Attention, then MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.resid_mid = nn.Identity()  # does nothing: a name, for hooks, of the stream halfway
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, mask=None):
        x = self.resid_mid(x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask))
        return x + self.mlp(self.post_attention_layernorm(x))


def check_ids(ids):
    """Refuse what is no batch of token ids."""
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.size(1) < 1:
        raise ValueError(f"ids must be (B, T) int64 with a token or more a row, and are "
                         f"{tuple(ids.shape)} {ids.dtype}")


LAST = (slice(None), -1)  # an index into (B, T): every row's last token


class GPT(nn.Module):
    """A decoder-only language model. Its output layer is its embedding transposed, if tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cos, sin = rotary_tables(config, device="cpu")
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # true: recompute activations in the backward pass

    def init_weights(self, generator):
        """Normal weights of standard deviation .02, smaller where a block writes (GPT-2)."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, 0, residual_std if writes else 0.02, generator=generator)
        return self

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def head(self):
        """The weight of the output layer, (vocab, d_model)."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def blocks(self, ids, caches=None, n_pad=None, below=()):
        """Yield the residual stream after each block, (B, T, d_model).

        n_pad (B) int64: how many tokens of padding each row of the whole text begins with. `below`
        holds the streams after the first blocks when they are known; what follows is yielded.
        """
        check_ids(ids)
        if n_pad is not None and (n_pad.shape != ids.shape[:1] or n_pad.dtype != torch.int64):
            raise ValueError(f"n_pad must be ({len(ids)},) int64, and is {tuple(n_pad.shape)} "
                             f"{n_pad.dtype}")

        # where in the whole text these tokens stand
        start = caches[0].length if caches else 0
        end = start + ids.size(1)
        if end > len(self.cos):
            raise UserError(f"{end} tokens do not fit the model's max_positions={len(self.cos)}; "
                            "shorten the text, or lower max_new_tokens")
        cos, sin = self.cos[start:end], self.sin[start:end]
        mask = None if n_pad is None else sees(n_pad, ids.size(1), end)  # (B, 1, T, end)

        try:
            x = below[-1] if below else self.embed_tokens(ids)  # (B, T, d_model)
        except IndexError:
            raise ValueError(f"ids must be 0 to {self.config.vocab_size - 1}, and reach from "
                             f"{ids.min()} to {ids.max()}") from None

        for i, layer in list(enumerate(self.layers))[len(below) :]:
            if self.activation_checkpointing and x.requires_grad:
                x = checkpoint(layer, x, cos, sin, None, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, caches[i] if caches else None, mask)
            yield x

    def final_stream(self, ids, caches=None, n_pad=None, below=()):
        """The residual stream after the last block, (B, T, d_model); arguments as of `blocks`."""
        for x in self.blocks(ids, caches, n_pad, below):
            pass
        return x

    def unembed(self, x):
        """Final norm and output layer: (B, T, d_model) -> logits (B, T, vocab)."""
        return F.linear(self.norm(x), self.head)

    def forward(self, ids, caches=None, at=None, n_pad=None):
        """ids (B, T) int64 -> logits (B, T, vocab).

        With `at`, an index into (B, T) such as a mask, only the logits of those tokens: few losses
        and no sampler need every token's prediction, and a vocabulary is wide.
        """
        x = self.final_stream(ids, caches, n_pad)
        return self.unembed(x if at is None else x[at])

    def residual_stream(self, ids):
        """The residual stream after each block: a tuple of n_layer tensors (B, T, d_model)."""
        return tuple(self.blocks(ids))

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
                 generator=None, use_cache=True, n_pad=None):
        """Continue prompts: ids (B, T) -> (B, T + new), on the model's device.

        Prompts of several lengths are padded on the left; n_pad (B) int64 says how much each is.
        Sampling is by `generator` (torch's global one if None); temperature 0 is greedy. After a
        row's first stop id the row is filled with that id; generation ends early when all have
        stopped. The same seed gives the same text with and without the cache.
        """
        check_ids(ids)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
        B, T = ids.shape
        text = torch.cat((ids, ids.new_empty(B, max_new_tokens)), dim=1)
        caches = [KVCache(T + max_new_tokens) for _ in self.layers] if use_cache else None
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=ids.device)
        rows, start = torch.arange(B, device=ids.device), 0  # the rows of text that go on

        for end in range(T, T + max_new_tokens):
            logits = self(text[rows, start:end], caches, LAST, n_pad)  # (rows, vocab)
            draws = torch.rand(B, 1, generator=generator, device=ids.device)  # also of idle rows
            new = sample(logits, temperature, top_p, draws[rows])  # (rows, 1)
            text[rows, end:] = new

            # a row that has stopped needs no more computing
            going = ~(new == stops).any(-1)  # (rows)
            if not going.any():
                return text[:, : end + 1]
            if not going.all():
                rows, n_pad = rows[going], None if n_pad is None else n_pad[going]
                for cache in caches or ():
                    cache.keep(going)

            start = end if use_cache else 0
        return text


def next_token_probs(logits, temperature=1.0, top_p=1.0):
    """What the next token is drawn from: logits (B, vocab) -> probabilities (B, vocab), float32.

    softmax(logits / temperature); with top_p < 1 only the fewest likeliest tokens that hold top_p
    of the mass keep any, and they share all of it (nucleus sampling, arXiv 1904.09751).
    """
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature} must be above 0, top_p={top_p} above 0 and at "
                         "most 1")
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the tokens before hold enough
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(logits, temperature, top_p, draws):
    """The next token of each row: logits (B, vocab) -> (B, 1); temperature 0 takes the likeliest.

    draws (B, 1), uniform in [0, 1): each picks the token in whose part of the cumulated
    probabilities it falls. (torch.multinomial draws a number for every word of the vocabulary, and
    asking took twice as long.)
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    below = next_token_probs(logits, temperature, top_p).cumsum(-1)  # (B, vocab)
    return torch.searchsorted(below, draws * below[:, -1:], right=True).clamp(
        max=below.size(-1) - 1)
