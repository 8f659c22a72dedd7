"""Wrong answers to chapter 2's exercises: (exercise, what its message must say, the answer)."""

import torch
from torch.nn import functional as F

from nanoem.layers import KVCache, attend
from nanoem.model import next_token_probs, sample


# --- 2.1 rms_norm -------------------------------------------------------------------------------


def eps_outside(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def layer_norm(x, weight, eps):
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def sum_of_squares(x, weight, eps):
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight


def one_mean_for_all(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def weight_before_rounding(x, weight, eps):
    rms = (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return (x / rms * weight).to(x.dtype)


def norm_in_place(x, weight, eps):
    rms = (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    return x.div_(rms).mul_(weight) if not x.requires_grad else x / rms * weight


def detached_rms(x, weight, eps):
    rms = (x.float().square().mean(-1, keepdim=True) + eps).sqrt().detach()
    return weight * (x / rms).to(x.dtype)


# --- 2.2 rotate ---------------------------------------------------------------------------------


def wrong_way(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def no_minus(x, cos, sin):
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def neighbours(x, cos, sin):
    half = x.size(-1) // 2
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos[:, :half], sin[:, :half]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def cos_and_sin_swapped(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * sin + torch.cat((-second, first), dim=-1) * cos


def position_0_for_all(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos[0] + torch.cat((-second, first), dim=-1) * sin[0]


def turned_twice(x, cos, sin):
    half, x = x.size(-1) // 2, x.clone()
    x[..., :half] = x[..., :half] * cos[:, :half] - x[..., half:] * sin[:, :half]
    x[..., half:] = x[..., half:] * cos[:, :half] + x[..., :half] * sin[:, :half]
    return x


# --- 2.3 attend ---------------------------------------------------------------------------------


def by_hand(q, k, v, scale=None, repeat=None, diagonal=1, fill=float("-inf")):
    n, (T, S) = q.size(1) // k.size(1), (q.size(2), k.size(2))
    k, v = ((repeat or torch.Tensor.repeat_interleave)(x, n, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.size(-1) ** -0.5)
    if T > 1:
        scores = scores.masked_fill(torch.ones(T, S).triu(diagonal).bool(), fill)
    return scores.softmax(-1) @ v


def heads_go_round(q, k, v):
    return by_hand(q, k, v, repeat=lambda x, n, dim: x.repeat(1, n, 1, 1))


def masked_after_softmax(q, k, v):
    n, T = q.size(1) // k.size(1), q.size(2)
    k, v = (x.repeat_interleave(n, 1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).softmax(-1)
    return (weights.tril() if T > 1 else weights) @ v


def the_first_key_only(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- 2.4 next_token_probs -----------------------------------------------------------------------


def cut(logits, temperature, top_p, outside_of, share=True):
    probs = (logits.float() / temperature).softmax(-1)
    ordered, order = probs.sort(-1, descending=True)
    kept = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside_of(ordered), 0))
    return kept / kept.sum(-1, keepdim=True) if share else kept


def in_double(logits, temperature=1.0, top_p=1.0):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return next_token_probs(logits, temperature, top_p).to(logits.dtype)


def colder_is_wilder(logits, temperature=1.0, top_p=1.0):
    return next_token_probs(logits, 1 / temperature, top_p)


def crossing_token_is_out(logits, temperature=1.0, top_p=1.0):
    def outside(ordered):
        return (ordered.cumsum(-1) > top_p) & (torch.arange(ordered.size(-1)) > 0)
    return cut(logits, temperature, top_p, outside) if top_p < 1 else next_token_probs(
        logits, temperature)


def not_shared(logits, temperature=1.0, top_p=1.0):
    return cut(logits, temperature, top_p, lambda p: p.cumsum(-1) - p >= top_p, share=False)


def not_put_back(logits, temperature=1.0, top_p=1.0):
    probs = next_token_probs(logits, temperature, top_p)
    return probs.sort(-1, descending=True).values if top_p < 1 else probs


def top_p_before_temperature(logits, temperature=1.0, top_p=1.0):
    kept = next_token_probs(logits, 1.0, top_p) > 0
    return (logits.float() / temperature).masked_fill(~kept, float("-inf")).softmax(-1)


# --- 2.5 generate -------------------------------------------------------------------------------


@torch.no_grad()
def skeleton(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(), generator=None,
             use_cache=True, feed_all=False, at=-1, fill=True, early=True, first_row=False,
             chances=torch.rand, fill_with=None, top_p_for_all=True):
    caches = [KVCache(200) for _ in self.layers] if use_cache else None
    stops = torch.tensor(stop_ids, dtype=torch.long, device=ids.device)
    stopped, new = torch.zeros_like(ids[:, :1], dtype=torch.bool), ids
    for _ in range(max_new_tokens):
        logits = self(new if use_cache and not feed_all else ids,
                      None if feed_all else caches)[:, at]
        chance = chances(len(ids), 1, generator=generator, device=ids.device)
        drawn = sample(logits, temperature, top_p if use_cache or top_p_for_all else 1.0, chance)
        filling = new[:, -1:] if fill_with is None or not stop_ids else fill_with(stops)
        new = torch.where(stopped, filling, drawn) if fill else drawn
        ids = torch.cat((ids, new), dim=1)
        stopped = stopped | torch.isin(new, stops)
        if early and (stopped[0].all() if first_row else stopped.all()):
            break
    return ids


def variant(**options):
    def generate(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
                 generator=None, use_cache=True):
        return skeleton(self, ids, max_new_tokens, temperature, top_p, stop_ids, generator,
                        use_cache, **options)
    return generate


def one_chance_for_all_tokens(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
                              generator=None, use_cache=True):
    once = torch.rand(len(ids), 1, generator=generator)
    return skeleton(self, ids, max_new_tokens, temperature, top_p, stop_ids, None, use_cache,
                    chances=lambda *shape, **options: once)


def at_least_one_token(self, ids, max_new_tokens, *args, **options):
    return skeleton(self, ids, max(max_new_tokens, 1), *args, **options)


def stopped_by_its_prompt(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
                          generator=None, use_cache=True):
    if stop_ids and torch.isin(ids[:, -1], torch.tensor(stop_ids)).all():
        return ids
    return skeleton(self, ids, max_new_tokens, temperature, top_p, stop_ids, generator, use_cache)


def temperature_forgotten(self, ids, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(),
                          generator=None, use_cache=True):
    return skeleton(self, ids, max_new_tokens, temperature and 1.0, top_p, stop_ids,
                    generator, use_cache)


def only_what_is_new(self, ids, *args, **options):
    return skeleton(self, ids, *args, **options)[:, ids.size(1):]


# --- 2.6 dropout --------------------------------------------------------------------------------


def dropping(x, share, generator, size=lambda share: 1 / (1 - share), drawn=lambda shape: shape):
    shape = drawn(x.shape) if x.dim() > 1 else x.shape
    kept = torch.rand(shape, generator=generator, device=x.device) >= share
    return x * kept * size(share)


def without(**options):
    return lambda x, share, generator: dropping(x, share, generator, **options)


def share_is_kept(x, share, generator):
    kept = torch.rand(x.shape, generator=generator, device=x.device) < share
    return x * kept / (1 - share)


def global_chances(x, share, generator):
    return F.dropout(x, share)


def own_generator(x, share, generator):
    return dropping(x, share, torch.Generator().manual_seed(0))


def begins_anew(x, share, generator):
    return dropping(x, share, generator.manual_seed(generator.initial_seed()))


def dropped_in_place(x, share, generator):
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= share
    return x.mul_(kept).div_(1 - share) if not x.requires_grad else x * kept / (1 - share)


def taken_out(x, share, generator):
    return x[torch.rand(x.shape, generator=generator) >= share] / (1 - share)


def in_float32_always(x, share, generator):
    kept = (torch.rand(x.shape, generator=generator, device=x.device) >= share).float()
    return x * kept / (1 - share)


def on_the_cpu(x, share, generator):
    return x * (torch.rand(x.shape, generator=generator) >= share) / (1 - share)


# --- 2.7 orthogonalise --------------------------------------------------------------------------


def iterated(G, steps=5, norm=lambda G: G.norm(dim=(-2, -1), keepdim=True) + 1e-7, back=True,
             turned=lambda rows, cols: rows > cols, turn=lambda X: X.mT, b=-4.7750, c=2.0315):
    X, is_turned = G / norm(G), turned(*G.shape[-2:])
    X = turn(X) if is_turned else X
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (b * A + c * A @ A) @ X
    return turn(X) if is_turned and back else X


def iterating(less=0, **options):
    return lambda G, steps=5: iterated(G, steps - less, **options)


def normed_in_place(G, steps=5):
    G /= G.norm(dim=(-2, -1), keepdim=True) + 1e-7
    return iterated(G, steps)


def square_ones_stay_turned(G, steps=5):
    X = iterated(G, steps)
    return X.mT if G.size(-2) == G.size(-1) else X


PLANTED = [
    ("rms_norm", "eps is outside the root", eps_outside),
    ("rms_norm", "LayerNorm", layer_norm),
    ("rms_norm", "sum of the squares", sum_of_squares),
    ("rms_norm", "one mean over the whole tensor", one_mean_for_all),
    ("rms_norm", "multiply by the weight last", weight_before_rounding),
    ("rms_norm", "in place", norm_in_place),
    ("rms_norm", "gradient is wrong", detached_rms),
    ("rotate", "wrong way", wrong_way),
    ("rotate", "a minus is missing", no_minus),
    ("rotate", "neighbours", neighbours),
    ("rotate", "cos and sin are swapped", cos_and_sin_swapped),
    ("rotate", "angles of position 0", position_0_for_all),
    ("rotate", "was turned before the second", turned_twice),
    ("attend", "the future is seen", lambda q, k, v: by_hand(q, k, v, diagonal=99)),
    ("attend", r"divide the scores by sqrt\(head_dim\)",
     lambda q, k, v: by_hand(q, k, v, scale=1.0)),
    ("attend", "not by head_dim", lambda q, k, v: by_hand(q, k, v, scale=1 / q.size(-1))),
    ("attend", "repeat_interleave", heads_go_round),
    ("attend", "masked after the softmax", masked_after_softmax),
    ("attend", "set to 0", lambda q, k, v: by_hand(q, k, v, fill=0.0)),
    ("attend", "off by one", lambda q, k, v: by_hand(q, k, v, diagonal=2)),
    ("attend", "not only the first", the_first_key_only),
    ("attend", "no gradient", lambda q, k, v: attend(q.detach(), k, v).detach()),
    ("attend", "device=q.device", by_hand),
    ("next_token_probs", "return float32", in_double),
    ("next_token_probs", "a high one makes all more alike", colder_is_wilder),
    ("next_token_probs", "crosses top_p is kept too", crossing_token_is_out),
    ("next_token_probs", "divide each row by its sum", not_shared),
    ("next_token_probs", "scatter them", not_put_back),
    ("next_token_probs", "temperature first", top_p_before_temperature),
    ("next_token_probs", "over the batch",
     lambda logits, temperature=1.0, top_p=1.0: (logits.float() / temperature).softmax(0)),
    ("generate", "right in row 0|not the likeliest next token", variant(at=0)),
    ("generate", "newest token", variant(feed_all=True)),
    ("generate", "filled with", variant(fill=False)),
    ("generate", "a new chance for every token", one_chance_for_all_tokens),
    ("generate", "shape", at_least_one_token),
    ("generate", "top_p|cache", variant(top_p_for_all=False)),
    ("generate", "filled with", variant(fill_with=lambda stops: stops[0])),
    ("generate", "device=ids.device", variant(
        chances=lambda *shape, generator, device: torch.rand(*shape, generator=generator))),
    ("generate", "ends when all rows", variant(early=False)),
    ("generate", "ends when all rows|too early|shape", variant(first_row=True)),
    ("generate", "stop id in the prompt", stopped_by_its_prompt),
    ("generate", "temperature", temperature_forgotten),
    ("generate", "return the prompt too", only_what_is_new),
    ("generate", "no_grad", lambda self, *args, **options:
        skeleton.__wrapped__(self, *args, **options)),
    ("dropout", "divide them by 1 - share", without(size=lambda share: 1)),
    ("dropout", "divide by 1 - share, the share that is kept",
     without(size=lambda share: 1 / share if share else 1)),
    ("dropout", "multiplied by 1 - share", without(size=lambda share: 1 - share)),
    ("dropout", "you drop 90%", share_is_kept),
    ("dropout", "every row of the batch", without(drawn=lambda shape: shape[1:])),
    ("dropout", "every row of the batch", without(drawn=lambda shape: shape[-1:])),
    ("dropout", "every token drops the same",
     without(drawn=lambda shape: (*shape[:-2], 1, shape[-1]))),
    ("dropout", "whole or not at all", without(drawn=lambda shape: (*shape[:-1], 1))),
    ("dropout", "global generator", global_chances),
    ("dropout", "another seed drops the same", own_generator),
    ("dropout", "let it go on", begins_anew),
    ("dropout", "in place", dropped_in_place),
    ("dropout", "not taken out", taken_out),
    ("dropout", "keep the dtype", in_float32_always),
    ("dropout", "no gradient flows",
     lambda x, share, generator: dropping(x, share, generator).detach()),
    ("dropout", "device=x.device", on_the_cpu),
    ("orthogonalise", "divide G by its norm first", iterating(norm=lambda G: 1)),
    ("orthogonalise", "transposed back", iterating(back=False)),
    ("orthogonalise", "not of the whole batch", iterating(norm=lambda G: G.norm() + 1e-7)),
    ("orthogonalise", "too few steps", iterating(less=1)),
    ("orthogonalise", "too few steps", lambda G, steps=5: iterated(G, 2)),
    ("orthogonalise", "iteration is missing", lambda G, steps=5: iterated(G, 0)),
    ("orthogonalise", "sign of every number", lambda G, steps=5: G.sign()),
    ("orthogonalise", "one number for the whole matrix",
     iterating(norm=lambda G: G.norm(dim=-1, keepdim=True) + 1e-7)),
    ("orthogonalise", "must not be turned", square_ones_stay_turned),
    ("orthogonalise", "transpose with .mT",
     iterating(turn=lambda X: X.permute(*range(X.dim())[::-1]))),
    ("orthogonalise", "coefficient", iterating(b=-2.0315, c=4.7750)),
    ("orthogonalise", "in place", normed_in_place),
    ("orthogonalise", "own dtype|keep the dtype",
     lambda G, steps=5: iterated(G.bfloat16(), steps)),
    ("orthogonalise", "zeros gives NaN",
     iterating(norm=lambda G: G.norm(dim=(-2, -1), keepdim=True))),
]
