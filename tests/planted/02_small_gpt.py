"""Wrong answers to chapter 2's exercises: (exercise, what its message must say, the answer)."""

import torch

from nanoem.layers import KVCache, attend
from nanoem.model import next_token_probs, sample


def eps_outside(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def weight_before_rounding(x, weight, eps):
    rms = (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return (x / rms * weight).to(x.dtype)


def norm_in_place(x, weight, eps):
    rms = (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    return x.div_(rms).mul_(weight) if not x.requires_grad else x / rms * weight


def wrong_way(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1) * sin


def no_minus(x, cos, sin):
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def cos_and_sin_swapped(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * sin + torch.cat((-second, first), dim=-1) * cos


def by_hand(q, k, v, scale=None, repeat=None, diagonal=1, fill=float("-inf")):
    n, (T, S) = q.size(1) // k.size(1), (q.size(2), k.size(2))
    k, v = ((repeat or torch.Tensor.repeat_interleave)(x, n, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.size(-1) ** -0.5)
    if T > 1:
        scores = scores.masked_fill(torch.ones(T, S).triu(diagonal).bool(), fill)
    return scores.softmax(-1) @ v


def colder_is_wilder(logits, temperature=1.0, top_p=1.0):
    return next_token_probs(logits, 1 / temperature, top_p)


def not_put_back(logits, temperature=1.0, top_p=1.0):
    probs = next_token_probs(logits, temperature, top_p)
    return probs.sort(-1, descending=True).values if top_p < 1 else probs


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


def only_what_is_new(self, ids, *args, **options):
    return skeleton(self, ids, *args, **options)[:, ids.size(1):]


def dropping(x, share, generator, size=lambda share: 1 / (1 - share), drawn=lambda shape: shape):
    shape = drawn(x.shape) if x.dim() > 1 else x.shape
    kept = torch.rand(shape, generator=generator, device=x.device) >= share
    return x * kept * size(share)


def without(**options):
    return lambda x, share, generator: dropping(x, share, generator, **options)


def share_is_kept(x, share, generator):
    kept = torch.rand(x.shape, generator=generator, device=x.device) < share
    return x * kept / (1 - share)


def own_generator(x, share, generator):
    return dropping(x, share, torch.Generator().manual_seed(0))


def on_the_cpu(x, share, generator):
    return x * (torch.rand(x.shape, generator=generator) >= share) / (1 - share)


def iterated(G, steps=5, norm=lambda G: G.norm(dim=(-2, -1), keepdim=True) + 1e-7, back=True,
             turn=lambda X: X.mT, b=-4.7750, c=2.0315):
    X, is_turned = G / norm(G), G.size(-2) > G.size(-1)
    X = turn(X) if is_turned else X
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (b * A + c * A @ A) @ X
    return turn(X) if is_turned and back else X


def iterating(less=0, **options):
    return lambda G, steps=5: iterated(G, steps - less, **options)


def mask_left_on_the_cpu(q, k, v):
    n, (T, S) = q.size(1) // k.size(1), (q.size(2), k.size(2))
    k, v = (x.repeat_interleave(n, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    if T > 1:
        scores = scores.masked_fill(torch.ones(T, S).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


PLANTED = [
    ("attend", "made on another device", mask_left_on_the_cpu),
    ("rms_norm", "eps is outside the root", eps_outside),
    ("rms_norm", "multiply by the weight last", weight_before_rounding),
    ("rms_norm", "in place", norm_in_place),
    ("rotate", "wrong way", wrong_way),
    ("rotate", "a minus is missing", no_minus),
    ("rotate", "cos and sin are swapped", cos_and_sin_swapped),
    ("attend", "the future is seen", lambda q, k, v: by_hand(q, k, v, diagonal=99)),
    ("attend", "repeat_interleave", lambda q, k, v: by_hand(
        q, k, v, repeat=lambda x, n, dim: x.repeat(1, n, 1, 1))),
    ("attend", r"divide the scores by sqrt\(head_dim\)",
     lambda q, k, v: by_hand(q, k, v, scale=1.0)),
    ("attend", "not by head_dim", lambda q, k, v: by_hand(q, k, v, scale=1 / q.size(-1))),
    ("attend", "set to 0", lambda q, k, v: by_hand(q, k, v, fill=0.0)),
    ("attend", "off by one", lambda q, k, v: by_hand(q, k, v, diagonal=2)),
    ("attend", "no gradient", lambda q, k, v: attend(q.detach(), k, v).detach()),
    ("attend", "device=q.device", by_hand),
    ("next_token_probs", "a high one makes all more alike", colder_is_wilder),
    ("next_token_probs", "scatter them", not_put_back),
    ("next_token_probs", "over the batch",
     lambda logits, temperature=1.0, top_p=1.0: (logits.float() / temperature).softmax(0)),
    ("generate", "right in row 0|not the likeliest next token", variant(at=0)),
    ("generate", "newest token", variant(feed_all=True)),
    ("generate", "filled with", variant(fill=False)),
    ("generate", "filled with", variant(fill_with=lambda stops: stops[0])),
    ("generate", "ends when all rows", variant(early=False)),
    ("generate", "ends when all rows|too early|shape", variant(first_row=True)),
    ("generate", "top_p|cache", variant(top_p_for_all=False)),
    ("generate", "device=ids.device", variant(
        chances=lambda *shape, generator, device: torch.rand(*shape, generator=generator))),
    ("generate", "return the prompt too", only_what_is_new),
    ("generate", "no_grad", lambda self, *args, **options:
        skeleton.__wrapped__(self, *args, **options)),
    ("dropout", "divide them by 1 - share", without(size=lambda share: 1)),
    ("dropout", "divide by 1 - share, the share that is kept",
     without(size=lambda share: 1 / share if share else 1)),
    ("dropout", "you drop 90%", share_is_kept),
    ("dropout", "every row of the batch", without(drawn=lambda shape: shape[1:])),
    ("dropout", "every token drops the same",
     without(drawn=lambda shape: (*shape[:-2], 1, shape[-1]))),
    ("dropout", "whole or not at all", without(drawn=lambda shape: (*shape[:-1], 1))),
    ("dropout", "another seed drops the same", own_generator),
    ("dropout", "no gradient flows",
     lambda x, share, generator: dropping(x, share, generator).detach()),
    ("dropout", "device=x.device", on_the_cpu),
    ("orthogonalise", "divide G by its norm first", iterating(norm=lambda G: 1)),
    ("orthogonalise", "transposed back", iterating(back=False)),
    ("orthogonalise", "not of the whole batch", iterating(norm=lambda G: G.norm() + 1e-7)),
    ("orthogonalise", "too few steps", iterating(less=1)),
    ("orthogonalise", "iteration is missing", lambda G, steps=5: iterated(G, 0)),
    ("orthogonalise", "sign of every number", lambda G, steps=5: G.sign()),
    ("orthogonalise", "one number for the whole matrix",
     iterating(norm=lambda G: G.norm(dim=-1, keepdim=True) + 1e-7)),
    ("orthogonalise", "transpose with .mT",
     iterating(turn=lambda X: X.permute(*range(X.dim())[::-1]))),
    ("orthogonalise", "coefficient", iterating(b=-2.0315, c=4.7750)),
    ("orthogonalise", "own dtype|keep the dtype",
     lambda G, steps=5: iterated(G.bfloat16(), steps)),
    ("orthogonalise", "zeros gives NaN",
     iterating(norm=lambda G: G.norm(dim=(-2, -1), keepdim=True))),
]
