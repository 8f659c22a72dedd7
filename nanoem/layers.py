"""The parts of a block: norm, rotary position, attention, MLP, and the cache of keys and values.

Parameters carry the names of Hugging Face's Qwen2. Rotary embedding: arXiv 2104.09864.
"""

import torch
from torch import nn
from torch.nn import functional as F


def in_float32(x):
    """Half precision in float32, where squares do not overflow and long sums keep their digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis (arXiv 1910.07467).

    x (..., d), weight (d) -> (..., d). Half precision is normed in float32, rounded to the dtype of
    x, and then multiplied by the weight.
    """
    wide = in_float32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def dropout(x, share, generator):
    """x with a share of its numbers set to 0 and the others enlarged in return; a new tensor.

    `generator` draws which: the same seed drops the same ones (arXiv 1207.0580).
    """
    kept = torch.empty_like(x).bernoulli_(1 - share, generator=generator)
    return x * kept / (1 - share)


class RMSNorm(nn.Module):
    """Scale each vector to root-mean-square 1, then by a learned weight."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


LONGEST = 32_768  # rows of the tables: some models claim a million positions, no run needs them


def rotary_tables(config, device):
    """cos and sin of every position's rotation angles, each (positions, head_dim)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    positions = torch.arange(min(config.max_positions, LONGEST), device=device).float()
    angles = positions[:, None] * config.rope_theta**-exponents  # (max_positions, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)  # feature i turns together with i + head_dim / 2
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the feature pairs (i, i + head_dim/2) of x (..., T, head_dim) by its angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q, k, v, mask=None):
    """Causal grouped-query attention: for each query, a mean of the values it may see.

    q (B, n_head, T, head_dim), k and v (B, n_kv, S, head_dim) -> (B, n_head, T, head_dim). Query
    head h reads key and value head h // (n_head / n_kv). The weights are the softmax of
    q . k / sqrt(head_dim) over the keys a query may see: with T = S, token t sees tokens 0 to t;
    with T = 1, the one new token sees all S (the others are in a cache); in between, the T new
    tokens see what is in the cache and those of themselves that came before. A `mask`, true where
    a query sees a key, (B, 1, T, S), takes the place of all that (see `sees`).
    """
    T, S = q.size(2), k.size(2)
    if T > S:
        raise ValueError(f"q has {T} tokens and k {S}; k must have q's, and may have more before")
    if q.device.type == "mps":  # its fused kernels can be silently wrong (pytorch issue 181133)
        return attend_by_hand(q, k, v, mask)
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


def causal_mask(T, S, device):
    """Which of S keys each of the last T queries sees: those up to itself, (T, S) bool."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attend_by_hand(q, k, v, mask=None):
    """`attend` as it is written in books; slower, and it holds all the weights at once."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5  # (B, n_head, T, S)
    mask = causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask
    weights = in_float32(scores.masked_fill(~mask, float("-inf"))).softmax(-1)
    return weights.to(v.dtype) @ v


def sees(n_pad, T, S):
    """Which keys a query sees when row b begins with n_pad[b] tokens of padding: (B, 1, T, S) bool.

    Text up to itself; a token of padding sees only itself, so that its softmax has a sum. Rotary
    angles count only by their differences, so padding on the left does not change the text.
    """
    query = torch.arange(S - T, S, device=n_pad.device)[:, None]  # (T, 1)
    key = torch.arange(S, device=n_pad.device)  # (S)
    text = key >= n_pad[:, None, None, None]  # (B, 1, 1, S)
    return (causal_mask(T, S, n_pad.device) & text) | (key == query)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions.

    Biases on q, k and v as in Qwen2, or a norm on q and k as in Qwen3, or neither as in Llama.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = (n * config.head_dim for n in (config.n_head, config.n_kv_head))
        self.q_proj = nn.Linear(config.d_model, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, mask=None):
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, n_kv, T, head_dim)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv, past + T, head_dim)
        y = attend(q, k, v, mask)  # (B, n_head, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): a gated hidden layer; down_proj writes to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KVCache:
    """Keys and values of one layer for the tokens seen so far, in buffers made once.

    Raises ValueError when more than max_tokens come.
    """

    def __init__(self, max_tokens):
        self.max_tokens, self.length = max_tokens, 0

    def append(self, k, v):
        """Add k, v (B, n_kv, T, head_dim); returns all there are, (B, n_kv, length, head_dim)."""
        B, n_kv, T, head_dim = k.shape
        if self.length == 0:
            self.k = k.new_empty(B, n_kv, self.max_tokens, head_dim)
            self.v = torch.empty_like(self.k)
        end = self.length + T
        if end > self.max_tokens:
            raise ValueError(f"the cache has room for {self.max_tokens} tokens, and {end} came; "
                             "make it larger, or pass only the tokens it has not seen")
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows):
        """Go on with these rows of the batch alone: a mask, or numbers, which may repeat."""
        self.k, self.v = self.k[rows], self.v[rows]
