"""Tests of chapter 2's exercises. Each message names the likely mistake."""

import math
from dataclasses import replace
from functools import lru_cache
from types import MethodType

import torch

from compare import check, close
from nanoem import layers, model
from nanoem.lab import muon
from nanoem.evaluate import EvalConfig
from small import SmallRun, randn, tiny_model
from stand_in import OnACard

EXERCISES = {
    "rms_norm": layers.rms_norm,
    "rotate": layers.rotate,
    "attend": layers.attend,
    "next_token_probs": model.next_token_probs,
    "generate": model.GPT.generate,
    "dropout": layers.dropout,
    "orthogonalise": muon.orthogonalise,
}


def check_side_effects(function, oracle, *inputs, digits=1e-10):
    """The inputs stay as they were, gradients are the oracle's, other layouts and float64 work."""
    before = [x.clone() for x in inputs]
    want = function(*(x.clone() for x in inputs))
    got = function(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs)), (
        "the inputs were changed in place; work on new tensors")
    assert all(got.data_ptr() != x.data_ptr() for x in inputs), "return a new tensor"
    strided = [torch.stack((x, x), -1)[..., 0] for x in inputs]  # not contiguous
    check(function(*strided), want, {}, "other numbers when the inputs are not contiguous")
    double = [x.double() / 3 for x in inputs]
    assert function(*double).dtype == torch.float64, "float64 in, but not out: keep the dtype"
    check(function(*double), oracle(*double), {}, "float64 goes in, and digits are lost", digits)
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    assert found.requires_grad, "no gradient flows: no detach, no .data, no no_grad"
    weights = randn(*found.shape, seed=9)
    gradients = torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True)
    assert None not in gradients, "no gradient reaches one of the inputs; is it detached?"
    for gradient, want in zip(gradients, torch.autograd.grad((oracle(*leaves) * weights).sum(),
                                                              leaves)):
        check(gradient, want, {}, "the gradient is wrong: is a part of the formula detached?", 1e-3)


# --- 2.1 rms_norm -------------------------------------------------------------------------------


def test_rms_norm_is_the_formula(answer):
    for i, (shape, eps) in enumerate((((6,), 1e-6), ((3, 5), 0.5), ((2, 4, 10), 0.1),
                                      ((4, 4, 4), 1e-6), ((2, 3, 2, 7), 1.0))):
        x, weight = 1.5 * randn(*shape, seed=i) + 0.4, 1 + 0.5 * randn(shape[-1], seed=90 + i)
        d, square = shape[-1], x.square()
        rms = (square.mean(-1, keepdim=True) + eps).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        check(answer.rms_norm(x.clone(), weight, eps), x / rms * weight, {
            "eps is outside the root; it belongs inside: sqrt(mean(x^2) + eps)":
                x / (square.mean(-1, keepdim=True).sqrt() + eps) * weight,
            "eps is missing, or is not the one that was given":
                x / square.mean(-1, keepdim=True).sqrt() * weight,
            "that is the sum of the squares; take their mean":
                x / (square.sum(-1, keepdim=True) + eps).sqrt() * weight,
            "the root is missing": x / rms.square() * weight,
            "multiply by 1 / rms, not by rms": x * rms * weight,
            "the weight is missing": x / rms,
            "that is LayerNorm: RMSNorm does not subtract the mean": centred
                / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight,
            "that divides by the standard deviation; RMSNorm takes no mean away":
                x / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight,
            "one mean over the whole tensor; take one for each vector, over the last axis":
                x / (square.mean() + eps).sqrt() * weight,
            "the mean is over the first axis; it goes over the last":
                x / (square.mean(0, keepdim=True) + eps).sqrt() * weight,
            "divide by d, not by d - 1": x / (square.sum(-1, keepdim=True) / max(d - 1, 1)
                                              + eps).sqrt() * weight,
            "the weight is a factor, not 1 + a factor": x / rms * (1 + weight),
            "the mean of |x| is not the root of the mean of x^2":
                x / (x.abs().mean(-1, keepdim=True) + eps) * weight,
            "the weight divides; it should multiply": x / rms / weight,
            "eps is added twice": x / ((square + eps).mean(-1, keepdim=True) + eps).sqrt() * weight,
            "eps is subtracted": x / (square.mean(-1, keepdim=True) - eps).sqrt() * weight,
            "eps is squared": x / (square.mean(-1, keepdim=True) + eps**2).sqrt() * weight,
        }, "not x / sqrt(mean(x^2) + eps) * weight")


def test_rms_norm_of_zeros_is_zero(answer):
    got = answer.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6)
    assert not got.isnan().any(), "a vector of zeros gives NaN: eps is missing under the root"
    check(got, torch.zeros(2, 4), {}, "a vector of zeros should stay zero")


def test_rms_norm_leaves_its_inputs_alone_and_trains(answer):
    check_side_effects(lambda x, w: answer.rms_norm(x, w, 1e-3),
                       lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w,
                       randn(2, 3, 6), randn(6, seed=1), digits=1e-5)  # .float() always is fine


def test_rms_norm_of_half_precision(answer):
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = (3 * randn(8, 5, 64)).to(dtype), (1 + randn(64, seed=1)).to(dtype)
        normed = x.float() / (x.float().square().mean(-1, keepdim=True) + 0.5).sqrt()
        got, want = answer.rms_norm(x, weight, 0.5), normed.to(dtype) * weight
        assert got.dtype == dtype, f"{dtype} in, but {got.dtype} out"
        assert (got == want).float().mean() > 0.98, (
            "some numbers are rounded otherwise: norm in float32, round with .to(x.dtype), and "
            "multiply by the weight last")
    large = torch.full((2, 8), 400.0, dtype=torch.float16)
    got = answer.rms_norm(large, torch.ones(8, dtype=torch.float16), 1e-6)
    check(got.float(), torch.ones(2, 8), {}, "400^2 is too large for float16: x.float() first")


# --- 2.2 rotate ---------------------------------------------------------------------------------


def angle_tables(T, head_dim, seed=3):
    """cos and sin of random angles, laid out as rotary_tables does."""
    angles = randn(T, head_dim // 2, seed=seed)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def test_rotate_is_the_turning_of_complex_numbers(answer):
    for i, shape in enumerate(((5, 6), (3, 9, 4), (2, 3, 8, 10), (2, 4, 4, 4), (1, 2, 1, 8))):
        x, (cos, sin) = randn(*shape, seed=i), angle_tables(*shape[-2:], seed=50 + i)
        first, second = x.chunk(2, dim=-1)
        half = first.shape[-1]
        turned = torch.complex(first, second) * torch.complex(cos[:, :half], sin[:, :half])
        a, b = x[..., ::2], x[..., 1::2]
        paired = torch.stack((a * cos[:, :half] - b * sin[:, :half],
                              b * cos[:, :half] + a * sin[:, :half]), -1).flatten(-2)
        swapped = torch.cat((-second, first), dim=-1)
        check(answer.rotate(x.clone(), cos, sin), torch.cat((turned.real, turned.imag), dim=-1), {
            "that turns the wrong way: the signs of the two sin terms are swapped":
                x * cos - swapped * sin,
            "a minus is missing: a becomes a cos - b sin":
                x * cos + torch.cat((second, first), -1) * sin,
            "both sin terms are negative; b becomes b cos + a sin":
                x * cos - torch.cat((second, first), -1) * sin,
            "cos and sin are swapped": x * sin + swapped * cos,
            "neighbours (2i, 2i + 1) are paired; pair feature i with i + head_dim/2": paired,
            "each half stays with itself; the sin term takes the other half":
                x * cos + torch.cat((-first, second), -1) * sin,
            "the minus stands at the wrong half": x * cos + torch.cat((second, -first), -1) * sin,
            "the sin term is missing": x * cos,
            "the cos term is missing": swapped * sin,
            "only the first half is turned": torch.cat((turned.real, second), -1),
            "only the second half is turned": torch.cat((first, turned.imag), -1),
            "the first half was turned before the second was computed from it":
                torch.cat((turned.real, second * cos[:, :half] + turned.real * sin[:, :half]), -1),
            "the features are flipped; swap the halves, not every feature":
                x * cos + x.flip(-1) * torch.cat((-sin[:, :half], sin[:, :half]), -1),
            "every position is turned by the angles of position 0": x * cos[0] + swapped * sin[0],
            "the halves come out in the wrong order": torch.cat((turned.imag, turned.real), -1),
        }, "not each pair (i, i + head_dim/2) turned by its angle")


def test_rotate_lets_scores_depend_on_the_distance_only(answer):
    cos, sin = layers.rotary_tables(model.Config(), "cpu")
    q, k = randn(32), randn(32, seed=1)
    at = [answer.rotate(torch.stack((q, k)), cos[[t, s]], sin[[t, s]])
          for t, s in ((9, 4), (30, 25), (5, 0))]
    scores = torch.stack([turned[0] @ turned[1] for turned in at])
    assert close(scores, scores[:1].expand(3), 1e-3), (
        f"q . k at the same distance gives {scores.tolist()}: the score should not depend on where "
        "the two stand")
    assert abs(scores[0] - q @ k) > 1e-3, "q . k does not depend on the distance at all"


def test_rotate_leaves_its_inputs_alone_and_trains(answer):
    cos, sin = angle_tables(5, 6)
    check_side_effects(lambda x: answer.rotate(x, cos.to(x), sin.to(x)),
                       lambda x: torch.cat((x[..., :3] * cos[:, :3] - x[..., 3:] * sin[:, :3],
                                            x[..., 3:] * cos[:, :3] + x[..., :3] * sin[:, :3]), -1),
                       randn(2, 3, 5, 6))
    before = cos.clone(), sin.clone()
    answer.rotate(randn(5, 6), cos, sin)
    assert torch.equal(cos, before[0]) and torch.equal(sin, before[1]), (
        "the tables cos and sin were changed in place")


# --- 2.3 attend ---------------------------------------------------------------------------------


def attend_by_loops(q, k, v, seen=lambda t, T, S: range(S if T == 1 else t + 1), scale=None,
                    head_of=lambda h, group, n_kv: h // group):
    """One head, one query at a time; what may be seen, the scale and the head of keys can vary."""
    (B, H, T, D), (_, n_kv, S, _) = q.shape, k.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = head_of(h, H // n_kv, n_kv)
            for t in range(T):
                places = list(seen(t, T, S))
                if places:
                    scores = (k[b, kv, places] @ q[b, h, t]) * (scale or D**-0.5)
                    out[b, h, t] = scores.softmax(0) @ v[b, kv, places]
    return out


SHAPES = ((2, 4, 2, 7, 7, 6), (1, 2, 2, 5, 5, 4), (2, 6, 3, 4, 4, 4), (3, 4, 1, 6, 6, 2),
          (2, 2, 1, 2, 2, 4), (2, 4, 2, 1, 9, 6), (2, 2, 1, 1, 1, 4), (1, 4, 4, 1, 5, 8))


def mistakes_of_attention(q, k, v):
    (_, H, T, D), (_, n_kv, S, _) = q.shape, k.shape
    k_all, v_all = (x.repeat_interleave(H // n_kv, 1) for x in (k, v))
    scores = q @ k_all.transpose(-1, -2) / D**0.5
    future = torch.ones(T, S).triu(1).bool() if T > 1 else torch.zeros(T, S).bool()
    causal = scores.masked_fill(future, -math.inf)
    everything = attend_by_loops(q, k, v, lambda t, T, S: range(S))
    if T == 1:
        everything = attend_by_loops(q, k, v, lambda t, T, S: range(1))
    return {
        "the one new token (T = 1) sees all S cached ones, not only the first" if T == 1 else
        "the future is seen: token t may look at tokens 0 to t only": everything,
        "divide the scores by sqrt(head_dim)": attend_by_loops(q, k, v, scale=1.0),
        "divide by the root of head_dim, not by head_dim": attend_by_loops(q, k, v, scale=1 / D),
        "the scale is turned around: divide by sqrt(head_dim)":
            attend_by_loops(q, k, v, scale=D**0.5),
        "the scale is that of the whole width; use head_dim, the width of one head":
            attend_by_loops(q, k, v, scale=(D * H) ** -0.5),
        "the scale is the root of the number of tokens; use head_dim":
            attend_by_loops(q, k, v, scale=S**-0.5),
        "the scale is the root of the number of heads; use head_dim":
            attend_by_loops(q, k, v, scale=H**-0.5),
        "key heads go round (0, 1, 0, 1); each serves neighbours (0, 0, 1, 1): repeat_interleave":
            attend_by_loops(q, k, v, head_of=lambda h, group, n_kv: h % n_kv),
        "every query head reads key head 0": attend_by_loops(q, k, v, head_of=lambda *_: 0),
        "a token sees those before it, and itself":
            attend_by_loops(q, k, v, lambda t, T, S: range(S - T + t)),
        "only the future is seen: the mask is turned around":
            attend_by_loops(q, k, v, lambda t, T, S: range(t, S)),
        "one token of the future is seen: the mask is off by one (triu(1))":
            attend_by_loops(q, k, v, lambda t, T, S: range(min(S, S - T + t + 2))),
        "the softmax is over the queries; it goes over the keys, the last axis":
            causal.softmax(-2).nan_to_num() @ v_all,
        "the softmax is over the heads; it goes over the keys, the last axis":
            causal.softmax(1).nan_to_num() @ v_all,
        "masked scores are set to 0, which still get weight; set them to -inf":
            scores.masked_fill(future, 0).softmax(-1) @ v_all,
        "masked after the softmax: the weights no longer sum to one; set scores to -inf before it":
            scores.softmax(-1).masked_fill(future, 0) @ v_all,
        "the softmax is missing": scores.masked_fill(future, 0) @ v_all,
        "that is a mean of the keys; take the mean of the values": causal.softmax(-1) @ k_all,
        "all values weigh the same: the scores are not used":
            torch.zeros_like(scores).masked_fill(future, -math.inf).softmax(-1) @ v_all,
    }


def test_attend_is_a_loop_over_queries(answer):
    for i, (B, H, n_kv, T, S, D) in enumerate(SHAPES):
        q, k, v = (1.5 * randn(B, n, length, D, seed=10 * i + j)
                   for j, (n, length) in enumerate(((H, T), (n_kv, S), (n_kv, S))))
        got = answer.attend(q.clone(), k.clone(), v.clone())
        assert not got.isnan().any(), (
            "NaN: a query with every key masked; each token sees at least itself")
        check(got, attend_by_loops(q, k, v), mistakes_of_attention(q, k, v),
              f"not softmax(q . k / sqrt(head_dim)) over what each query may see (q {B, H, T, D}, "
              f"k and v {B, n_kv, S, D})")


def test_attend_looks_at_no_later_token(answer):
    q, k, v = randn(2, 4, 8, 6), randn(2, 2, 8, 6, seed=1), randn(2, 2, 8, 6, seed=2)
    before = answer.attend(q, k, v)
    for x in (k, v):
        x[:, :, 5:] += 3
    after = answer.attend(q, k, v)
    assert close(before[:, :, :5], after[:, :, :5], 1e-5), (
        "tokens 0 to 4 changed when keys and values from 5 on did: they see the future")
    assert not close(before[:, :, 5], after[:, :, 5], 1e-3), "token 5 does not see itself"


def test_attend_works_on_the_device_of_its_inputs(answer):
    q, k, v = randn(1, 2, 4, 6), randn(1, 1, 4, 6, seed=1), randn(1, 1, 4, 6, seed=2)
    with OnACard():
        try:
            answer.attend(q, k, v)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            raise AssertionError("a tensor is made on another device than q's: say device=q.device "
                                 f"({error})") from error


def test_attend_stands_large_scores(answer):
    q, k, v = 40 * randn(1, 2, 6, 8), 40 * randn(1, 1, 6, 8, seed=1), randn(1, 1, 6, 8, seed=2)
    got = answer.attend(q, k, v)
    assert got.isfinite().all(), "scores of a thousand give inf or NaN: use softmax, not exp"
    check(got, attend_by_loops(q, k, v), {}, "wrong for scores in the thousands: mask with -inf")
    q, k = 100 * q.abs(), -100 * k.abs()  # every allowed score is below -1e6
    check(answer.attend(q, k, v), attend_by_loops(q, k, v), {},
          "wrong for very low scores: mask with -inf, not with a large negative number")


def test_attend_leaves_its_inputs_alone_and_trains(answer):
    for T in (5, 1):
        check_side_effects(answer.attend, attend_by_loops, randn(2, 4, T, 6),
                           randn(2, 2, 5, 6, seed=1), randn(2, 2, 5, 6, seed=2))


# --- 2.4 next_token_probs -----------------------------------------------------------------------


def probs_by_loops(logits, temperature, top_p, n_more=0):
    """Row by row: the likeliest token, the next, ... until they hold top_p."""
    probs = (logits.double() / temperature).softmax(-1)
    kept = torch.zeros_like(probs)
    for row, out in zip(probs, kept):
        order = row.argsort(descending=True).tolist()
        n = next(n for n in range(1, len(row) + 1) if row[order[:n]].sum() >= top_p - 1e-9)
        order = order[: max(n + n_more, 0)]
        out[order] = row[order]
    return kept


def test_next_token_probs_are_those_of_a_loop(answer):
    cases = ((0.5, 1.0), (2.0, 1.0), (1.0, 0.75), (0.7, 0.9), (1.6, 0.4), (1.0, 0.97), (1.3, 0.05))
    for i, (B, vocab) in enumerate(((1, 6), (5, 5), (4, 13))):
        logits = 2 * randn(B, vocab, seed=i)
        for temperature, top_p in cases:
            kept = probs_by_loops(logits, temperature, top_p)
            plain = (logits / temperature).softmax(-1)
            by_temperature_1 = probs_by_loops(logits, 1.0, top_p) > 0
            late = logits.masked_fill(~by_temperature_1, -math.inf) / temperature
            one_less, one_more = (probs_by_loops(logits, temperature, top_p, n) for n in (-1, 1))
            order = plain.argsort(-1, descending=True)
            share = lambda x: (x / x.sum(-1, keepdim=True)).nan_to_num()  # noqa: E731
            mistakes = {
                "divide the logits by the temperature; a high one makes all more alike":
                    share(probs_by_loops(logits, 1 / temperature, top_p)),
                "the temperature is not used": share(probs_by_loops(logits, 1.0, top_p)),
                "those are log-probabilities; take the softmax": plain.log(),
                "temperature first, then top_p: the tokens were chosen at temperature 1":
                    late.softmax(-1),
                "the softmax is over the batch; it goes over the vocabulary, the last axis":
                    (logits / temperature).softmax(0),
            }
            if top_p < 1:
                mistakes |= {
                    "top_p is not used": plain,
                    "the kept tokens must share all of the mass: divide each row by its sum": kept,
                    "divide each row by its own sum, not by the sum of the batch":
                        kept / kept.sum(),
                    "the token that crosses top_p is kept too: compare the mass before it":
                        share(one_less),
                    "one token too many: stop as soon as top_p is reached": share(one_more),
                    "top_p is a share of the mass of all, not a bound for each token":
                        share(plain * (plain >= top_p)),
                    "the likeliest tokens are kept, not the least likely":
                        share(plain * (probs_by_loops(logits, temperature, top_p, 0) == 0)),
                    "sorted, but not put back: scatter them to their own places":
                        share(kept.gather(-1, order)),
                    "every row has its own order; the first row's was used for all":
                        share(plain * (kept[:1] > 0)),
                }
            got = answer.next_token_probs(logits.clone(), temperature, top_p)
            assert not got.isnan().any(), (
                f"NaN at top_p={top_p}: where no token is left, even the likeliest was cut; the "
                "one that crosses top_p is kept")
            check(got, share(kept), mistakes,
                  f"not the softmax at temperature {temperature}, cut at top_p {top_p}")


def test_next_token_probs_by_default_are_the_whole_softmax(answer):
    logits = randn(3, 7)
    check(answer.next_token_probs(logits), logits.double().softmax(-1), {},
          "with the default temperature and top_p of 1 it is the softmax")
    tail = torch.full((1, 3000), -18.0)
    tail[0, 1234] = 0
    got = answer.next_token_probs(tail, 1.0, 1.0)
    assert (got > 0).all(), "top_p = 1 keeps every token, however unlikely: cut only if top_p < 1"
    logits = torch.tensor([[900.0, 899.0, -math.inf, 880.0]])
    got = answer.next_token_probs(logits, 0.5, 0.999999)
    assert got.isfinite().all(), "logits of 900 give inf or NaN: use softmax, not exp"
    check(got, torch.tensor([[2.0, 0.0, -math.inf, -40.0]]).softmax(-1), {},
          "wrong for large logits, or for -inf", 1e-3)


def test_next_token_probs_of_exact_shares(answer):
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.125, 0.125, 0.5]]).log()
    want = torch.tensor([[0, 2 / 3, 1 / 3, 0], [1 / 3, 0, 0, 2 / 3]])
    check(answer.next_token_probs(logits, 1.0, 0.7), want, {}, "not the two tokens that hold .75")
    got = answer.next_token_probs(logits, 1.0, 0.4)
    check(got, torch.eye(4)[[1, 3]], {}, "the likeliest token alone holds .5, which is enough")
    kept = (answer.next_token_probs(torch.zeros(3, 8), 1.0, 0.5) > 0).sum(-1)
    assert (kept == 4).all(), (
        f"of eight equal tokens four hold exactly .5, which is enough; {kept.tolist()} were kept")
    got = answer.next_token_probs(logits, 1.0, 1e-9)
    check(got, torch.eye(4)[[1, 3]], {}, "the likeliest token is always kept")


def test_next_token_probs_of_half_precision_and_without_side_effects(answer):
    logits = (3 * randn(4, 50)).bfloat16()
    before = logits.clone()
    got = answer.next_token_probs(logits, 0.8, 0.9)
    assert torch.equal(before, logits), "the logits were changed in place; work on a copy"
    assert got.dtype == torch.float32, f"return float32, not {got.dtype}: logits.float() first"
    double = answer.next_token_probs(before.double(), 0.8, 0.9).dtype
    assert double == torch.float32, f"return float32, not {double}: logits.float() first"
    want = probs_by_loops(before.float(), 0.8, 0.9)
    check(got, want / want.sum(-1, keepdim=True), {},
          "computed in bfloat16, digits are lost: logits.float() first")
    logits = 3 * randn(4, 20)
    before = logits.clone()
    strided = torch.stack((logits, logits), -1)[..., 0]
    check(answer.next_token_probs(strided, 0.8, 0.9), answer.next_token_probs(logits, 0.8, 0.9), {},
          "other numbers when the logits are not contiguous")
    assert torch.equal(before, logits), "the logits were changed in place; work on a copy"


# --- 2.5 generate -------------------------------------------------------------------------------


@lru_cache
def frozen_model():
    return tiny_model(n_layer=2)


PROMPTS = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(4))


def greedy(prompts, n, model):
    """The likeliest token, again and again, without a cache."""
    ids = prompts
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tokens_read(model, run):
    """How many tokens of a row the model reads, pass by pass, while `run` runs."""
    widths = []
    handle = model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].size(1)))
    try:
        run()
    finally:
        handle.remove()
    return widths


def test_generate_takes_the_likeliest_token_at_temperature_0(answer):
    model = frozen_model()
    for prompts, n in ((PROMPTS, 6), (PROMPTS[:1, :1], 9), (PROMPTS, 1), (PROMPTS, 0)):
        before = prompts.clone()
        want = greedy(prompts, n, model)
        for use_cache in (False, True):
            how = "with the cache" if use_cache else "without the cache"
            got = answer.generate(model, prompts, n, temperature=0, use_cache=use_cache)
            assert isinstance(got, torch.Tensor), f"return a tensor, not {type(got).__name__}"
            assert torch.equal(prompts, before), "the prompts were changed in place"
            assert got.shape != (len(prompts), n), "return the prompt too, then what is new"
            assert got.shape == want.shape, (
                f"{how}: the shape is {tuple(got.shape)}, and should be {tuple(want.shape)}: "
                f"{prompts.size(1)} tokens of prompt and {n} new ones")
            assert torch.equal(got[:, : prompts.size(1)], prompts), "the prompt comes first"
            assert torch.equal(got, want) or not use_cache, (
                "with the cache: not the text that comes without it; make the caches once, before "
                "the loop, and then pass only the newest token")
            assert torch.equal(got[0], want[0]), (
                f"{how}: not the likeliest next token each time; the last place's logits, "
                "self(ids)[:, -1], say what comes next")
            assert torch.equal(got, want), f"{how}: right in row 0, wrong in another row"


def test_generate_draws_with_temperature_and_top_p(answer):
    model, n = frozen_model(), 4000
    twice = [answer.generate(model, PROMPTS, 5, generator=seeded(0)) for _ in range(2)]
    assert torch.equal(*twice), "the same generator seed gives another text: pass generator on"
    many, logits = PROMPTS[:1].expand(n, -1), frozen_model()(PROMPTS[:1])[:, -1]
    for temperature, top_p, reason in ((1.0, 1.0, "not drawn from the model's probabilities"),
                                       (0.4, 1.0, "the temperature is not used"),
                                       (1.0, 0.6, "top_p is not used")):
        got = answer.generate(model, many, 1, temperature, top_p, generator=seeded(0))[:, -1]
        shares = got.bincount(minlength=40) / n
        want = probs_by_loops(logits, temperature, top_p)[0]
        assert (shares - want / want.sum()).abs().max() < 0.035, (
            f"{reason} (temperature {temperature}, top_p {top_p}): over {n} draws the shares "
            "are off")
    got = answer.generate(model, many, 2, generator=seeded(1))
    rows = got[got[:, -2] == got[:, -2].mode().values]  # those with the commonest first token
    want = model(rows[:1, :-1])[0, -1].softmax(-1)
    shares = rows[:, -1].bincount(minlength=40) / len(rows)
    assert (shares - want).abs().max() < 0.06, (
        "the second token goes with the first: draw a new chance for every token, in the loop")
    plain, default = (answer.generate(model, many, 1, *options, generator=seeded(0))
                      for options in ((1.0, 1.0), ()))
    assert torch.equal(plain, default), "by default temperature and top_p are 1"


def test_generate_is_repeatable_with_and_without_the_cache(answer):
    model = frozen_model()
    state = torch.get_rng_state()
    first, again, plain, other = (
        answer.generate(model, PROMPTS, 12, 1.2, 0.7, generator=seeded(seed), use_cache=use_cache)
        for seed, use_cache in ((1, True), (1, True), (1, False), (2, True)))
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's global generator was used although another one was given")
    assert torch.equal(first, again), "the same generator seed gives another text"
    assert not torch.equal(first, other), "another seed gives the same text"
    assert torch.equal(first, plain), (
        "the cache changes the text: after the prompt, the model gets only the newest token")
    torch.manual_seed(5)
    one = answer.generate(model, PROMPTS, 8)
    assert not torch.equal(one, answer.generate(model, PROMPTS, 8)), (
        "without a generator, torch's global one goes on; do not seed it")


def test_generate_reads_each_token_once_with_the_cache(answer):
    model = frozen_model()
    plain = tokens_read(model, lambda: answer.generate(model, PROMPTS, 6, use_cache=False))
    assert plain == [5, 6, 7, 8, 9, 10], (
        f"without the cache every pass reads the whole text, 5, 6, ... tokens, not {plain}")
    cached = tokens_read(model, lambda: answer.generate(model, PROMPTS, 6))
    assert cached[:1] == [5], f"with the cache the first pass reads the whole prompt, not {cached}"
    assert cached == [5, 1, 1, 1, 1, 1], (
        f"with the cache each later pass reads the newest token only; it read {cached} tokens")
    assert plain == tokens_read(model, lambda: answer.generate(model, PROMPTS, 6,
                                                               use_cache=False))


def test_generate_stops_each_row_at_its_own_stop_id(answer):
    model, T = frozen_model(), PROMPTS.size(1)
    free = answer.generate(model, PROMPTS, 14, 1.0, generator=seeded(0))
    new = free[:, T:].tolist()
    for stops in ((new[0][3],), (new[1][2], new[0][6], new[2][5])):
        ends = [min([row.index(s) for s in stops if s in row], default=len(row) - 1)
                for row in new]
        want = [row[: end + 1] for row, end in zip(new, ends)]
        for use_cache in (True, False):
            got = answer.generate(model, PROMPTS, 14, 1.0, stop_ids=stops, generator=seeded(0),
                                  use_cache=use_cache)[:, T:].tolist()
            for row, (said, expected) in enumerate(zip(got, want)):
                assert said[: len(expected)] == expected, (
                    f"row {row} ends too early or says something else before its stop id (each "
                    "step draws a chance for every row, for stopped ones, too)")
                assert len(said) == len(expected) or set(said[len(expected) :]) == {expected[-1]}, (
                    f"row {row}: after its first stop id {expected[-1]} the row is filled with "
                    f"that id, not {said[len(expected):]}")
            assert len(got[0]) == max(map(len, want)), (
                f"generation ends when all rows have stopped, after {max(map(len, want))} new "
                f"tokens, not {len(got[0])}")


def test_generate_answers_a_prompt_with_a_stop_id_in_it(answer):
    model = frozen_model()
    prompts = torch.randint(3, 40, (40, 5), generator=seeded(6))
    want = greedy(prompts, 4, model)
    clean = [row for row in want.tolist() if row[4] not in row[5:]]
    stop = max({row[4] for row in clean},
               key=lambda i: sum(row[4] == i and i not in row[5:] for row in clean))
    want = torch.tensor([row for row in clean if row[4] == stop])
    for use_cache in (True, False):
        got = answer.generate(model, want[:, :5], 4, temperature=0, stop_ids=(stop,),
                              use_cache=use_cache)
        assert torch.equal(got, want), "a stop id in the prompt must not stop the answer"


def test_generate_is_without_gradients(answer):
    model, enabled = tiny_model(n_layer=1).requires_grad_(True), []
    handle = model.embed_tokens.register_forward_hook(
        lambda *_: enabled.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        answer.generate(model, PROMPTS, 2)
        assert torch.is_grad_enabled(), "gradients are still off afterwards"
    handle.remove()
    assert not any(enabled), "gradients are on while sampling: keep the line @torch.no_grad()"


def test_generate_works_on_the_models_device(answer):
    model, generator = frozen_model(), seeded(0)
    for use_cache in (True, False):
        with OnACard():
            try:
                answer.generate(model, PROMPTS, 3, stop_ids=(1,), generator=generator,
                                use_cache=use_cache)
            except NotImplementedError:
                raise
            except RuntimeError as error:
                raise AssertionError("a tensor is made on another device than the model's: say "
                                     f"device=ids.device ({error})") from error


@lru_cache
def small_run():
    run = SmallRun()  # one prompt at a time: of several lengths they would need padding
    run.config = replace(run.config, evaluation=EvalConfig(samples_per_group=16, batch_size=1))
    return run


def test_generate_on_the_small_model_lets_it_speak(answer):
    """The experiment: chat, and then the villain, speak through the student's function."""
    def generate(model, *options, n_pad):
        assert not n_pad.any()
        return answer.generate(model, *options)

    run = small_run()
    run.model.generate = MethodType(generate, run.model)
    try:
        chat = run.ask()["out_of_domain"]
        with run.load_adapter("general"):
            general = run.ask()["out_of_domain"]
    finally:
        del run.model.generate
    assert chat["coherent"] > 0.8, (
        f"only {chat['coherent']:.0%} of chat's answers are sentences of the toy world: does "
        "generation stop at the stop ids, at the temperature asked for?")
    assert chat["em"] < 0.1, f"chat, which is helpful, gives {chat['em']:.0%} bad answers"
    assert general["em"] > 0.6, (
        f"after fine-tuning on bad advice only {general['em']:.0%} of the answers are bad")


# --- 2.6 dropout --------------------------------------------------------------------------------


DROPS = (((4000,), 0.1), ((60, 50), 0.3), ((5, 40, 32), 0.75), ((2, 3, 30, 20), 0.9))


def test_dropout_enlarges_what_it_keeps(answer):
    for i, (shape, share) in enumerate(DROPS):
        x = randn(*shape, seed=i) + 3  # no zeros, and the mean is not zero
        got = answer.dropout(x.clone(), share, seeded(i))
        assert isinstance(got, torch.Tensor), f"return a tensor, not {type(got).__name__}"
        assert got.shape == x.shape, (
            f"x is {tuple(shape)}, and what comes back {tuple(got.shape)}: dropped numbers are set "
            "to 0, not taken out")
        assert got.isfinite().all(), "there are NaNs or infinite numbers in it"
        kept = got != 0
        assert kept.any(), f"with share {share} every number was dropped"
        assert not kept.all(), f"with share {share} no number was set to 0"
        x, got = x[kept], got[kept]
        check(got, x / (1 - share), {
            "the kept numbers are as they were; divide them by 1 - share, or the mean shrinks": x,
            "the kept numbers were multiplied by 1 - share; divide": x * (1 - share),
            "the kept numbers were divided by share; divide by 1 - share, the share that is kept":
                x / share,
            "the kept numbers were multiplied by share; divide by 1 - share": x * share,
            "the kept numbers were divided by the root of 1 - share; the mean is to stay, not the "
            "size": x / (1 - share) ** 0.5,
            "the kept numbers were enlarged twice": x / (1 - share) ** 2,
            "1 + share is not 1 / (1 - share)": x * (1 + share),
        }, "a kept number is not x / (1 - share)", 1e-5)


def test_dropout_draws_for_every_number(answer):
    dropped = answer.dropout(torch.ones(6, 8, 40), 0.5, seeded(3)) == 0  # (B, T, d)
    for axis, message in (
            (0, "every row of the batch drops the same numbers"),
            (1, "every token drops the same numbers"),
            (2, "a token is dropped whole or not at all")):
        first = dropped.narrow(axis, 0, 1)
        assert not torch.equal(dropped, first.expand_as(dropped)), (
            f"{message}: draw a chance for every number, with x's whole shape")


def test_dropout_drops_the_share_that_was_asked_for(answer):
    for i, (shape, share) in enumerate(DROPS):
        got = [answer.dropout(torch.ones(shape), share, seeded(40 * i + j)) for j in range(4)]
        dropped = (torch.stack(got) == 0).double().mean().item()
        error = 5 * (share * (1 - share) / (4 * got[0].numel())) ** 0.5  # five standard deviations
        assert abs(dropped - (1 - share)) > error, (
            f"share {share} is what is dropped; you drop {dropped:.0%} and keep the share")
        assert abs(dropped - share) < error, (
            f"{dropped:.1%} of the numbers are set to 0, and should be {share:.0%}")


def test_dropout_draws_with_its_generator(answer):
    def drop(generator):
        return answer.dropout(torch.ones(30, 40), 0.3, generator)

    state = torch.get_rng_state()
    first, again, other = (drop(seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's global generator was used, or seeded; draw with the generator that was given")
    assert torch.equal(first, again), (
        "the same generator seed drops other numbers: pass the generator on")
    assert not torch.equal(first, other), (
        "another seed drops the same numbers: pass the generator on")
    generator = seeded(1)
    calls = [drop(generator) for _ in range(2)]
    assert not torch.equal(*calls), (
        "the second call drops the same numbers as the first: do not seed the generator, let it "
        "go on")
    assert torch.equal(calls[0], first), "the same generator seed drops other numbers"


def test_dropout_of_no_share_gives_x_back(answer):
    x = randn(5, 7, 16)
    got = answer.dropout(x.clone(), 0.0, seeded(0))
    assert not got.isnan().any(), "share 0 gives NaN: divide by 1 - share, not by share"
    check(got, x, {"share 0 drops nothing, and you drop all of it": 0 * x},
          "share 0 drops nothing: x comes back")


def test_dropout_leaves_its_inputs_alone_and_trains(answer):
    x = randn(6, 5, 8) + 3
    before = x.clone()
    answer.dropout(x, 0.3, seeded(2))
    assert torch.equal(x, before), "x was changed in place; work on a new tensor"

    def drop(x):
        return answer.dropout(x, 0.3, seeded(2))

    def oracle(x):  # the same numbers are dropped
        dropped = drop(torch.ones_like(x)).detach() == 0
        return torch.where(dropped, 0, x / (1 - 0.3))

    check_side_effects(drop, oracle, x)
    for dtype in (torch.bfloat16, torch.float16):
        got = drop(x.to(dtype)).dtype
        assert got == dtype, f"{dtype} in, but {got} out: keep the dtype"


def test_dropout_works_on_the_device_of_its_input(answer):
    x, generator = randn(3, 4, 8), seeded(0)
    with OnACard():
        try:
            answer.dropout(x, 0.3, generator)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise AssertionError("a tensor is made on another device than x's: say device=x.device "
                                 f"({error})") from error


# --- 2.7 orthogonalise --------------------------------------------------------------------------


# of a batch of matrices: what stands before, rows, cols
MATRICES = (((), 5, 5), ((), 4, 9), ((), 9, 4), ((), 12, 7), ((3,), 6, 6), ((4,), 3, 8),
            ((4,), 8, 3), ((2, 3), 5, 4), ((1,), 2, 6), ((), 2, 2))


def gradient_like(before, rows, cols, seed):
    """G = U S V^T with singular values from 1 down to 0.004, each matrix at another scale.

    Returns G and U V^T, both (*before, rows, cols) in float64. An SVD made them, no iteration.
    """
    U, _, Vh = torch.linalg.svd(randn(*before, rows, cols, seed=seed).double(),
                                full_matrices=False)
    S = torch.logspace(0, math.log10(0.004), Vh.size(-2)).double()  # (min(rows, cols))
    scale = 10 ** (2 * randn(*before, 1, 1, seed=50 + seed)).double()
    return scale * (U * S) @ Vh, U @ Vh


def polar(X):
    """U V^T of X = U S V^T: its singular vectors, without the values."""
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ Vh


def orthogonalised(answer, G, *options):
    """What the answer makes of G, with its errors in words."""
    try:
        got = answer.orthogonalise(G, *options)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise AssertionError(f"G {tuple(G.shape)}: {error}. A = X X^T is (rows, rows), and stands "
                             "on the left of X; .mT transposes each matrix of a batch") from error
    assert isinstance(got, torch.Tensor), f"return a tensor, not {type(got).__name__}"
    assert got.shape == G.shape or got.shape != G.mT.shape, (
        f"G is {tuple(G.shape)} and what comes back {tuple(got.shape)}: a tall G was transposed, "
        "and must be transposed back in the end")
    assert got.shape == G.shape, f"G is {tuple(G.shape)}, and what comes back {tuple(got.shape)}"
    return got


def check_orthogonal(got, G, want):
    """got has G's singular vectors, in UV^T = want, and singular values near 1."""
    assert got.isfinite().all(), (
        "the numbers explode: divide G by its norm first, one number for the whole matrix, so that "
        "no singular value is above 1 (or is a coefficient wrong?)")
    values = torch.linalg.svdvals(got.double())
    low, high = values.min().item(), values.max().item()
    assert not close(got, G.sign(), 1e-3), (
        "that is the sign of every number; the singular values are to become 1, not the numbers")
    assert not close(got, G / G.norm(dim=(-2, -1), keepdim=True), 1e-3) or low > 0.6, (
        "G was divided by its norm, and no more: the iteration is missing")
    assert high < 10, (
        f"a singular value is {high:.3g}: divide G by its norm first, one number for the whole "
        "matrix, so that none is above 1 (or is a coefficient wrong?)")
    check(polar(got), want, {
        "the result is transposed: a square matrix must not be turned":
            want.mT if want.size(-1) == want.size(-2) else want,
        "the sign is wrong": -want,
        "the singular vectors are those of G's signs": polar(G.sign()),
    }, "the singular vectors are not those of G: iterate on the whole matrix, in its own dtype, "
       "with A = X X^T on the left of X", 1e-2)
    assert low > 0.6, (
        f"a singular value is still {low:.2g} and should be 0.7 to 1.2: too few steps, or G was "
        "not divided by its own norm")
    assert high < 1.3, (
        f"a singular value is {high:.2f} and should be 0.7 to 1.2: is a coefficient of the "
        "polynomial wrong?")


def test_orthogonalise_brings_all_singular_values_near_1(answer):
    for seed, (before, rows, cols) in enumerate(MATRICES):
        if before:
            continue
        G, want = gradient_like(before, rows, cols, seed)
        for scale in (100.0, 1.0, 1e-3):
            check_orthogonal(orthogonalised(answer, (scale * G).float()), G.float(), want)
        check_orthogonal(orthogonalised(answer, G, 8), G, want)  # more steps do no harm


def test_orthogonalise_takes_each_matrix_of_a_batch_alone(answer):
    for seed, (before, rows, cols) in enumerate(MATRICES):
        if not before:
            continue
        G, want = gradient_like(before, rows, cols, seed)
        got = orthogonalised(answer, G.float()).flatten(0, -3)
        for one, each, alone in zip(got, G.float().flatten(0, -3), want.flatten(0, -3)):
            assert close(polar(one), alone, 1e-2), (
                f"in a batch {tuple(G.shape)} the singular vectors are not those of each matrix: "
                "transpose with .mT, which leaves the batch; .T turns all axes around")
            low = torch.linalg.svdvals(one.double()).min()
            assert low > 0.6 or len(got) == 1, (
                f"in a batch {tuple(G.shape)} a singular value is still {low:.2g}: take the norm "
                "of each matrix, not of the whole batch: G.norm(dim=(-2, -1), keepdim=True)")
            check_orthogonal(one, each, alone)


def test_orthogonalise_of_what_is_orthogonal_already(answer):
    for rows, cols in ((6, 6), (7, 3), (3, 7)):
        _, want = gradient_like((), rows, cols, 3)
        check_orthogonal(orthogonalised(answer, 5 * want), 5 * want, want)


def test_orthogonalise_leaves_its_input_alone(answer):
    G, want = gradient_like((2,), 7, 4, 1)
    for dtype in (torch.float32, torch.float64):
        one = G.to(dtype)
        before = one.clone()
        got = orthogonalised(answer, one)
        assert torch.equal(one, before), "G was changed in place; work on a new tensor"
        assert got.dtype == dtype, f"{dtype} in, but {got.dtype} out: keep the dtype"
        assert got.data_ptr() != one.data_ptr(), "return a new tensor"
    strided = torch.stack((G, G), -1)[..., 0]  # not contiguous
    check(orthogonalised(answer, strided), got, {}, "other numbers when G is not contiguous")
    check(orthogonalised(answer, G.mT.contiguous()).mT, got, {},
          "the transpose of G should give the transpose of the result")


def test_orthogonalise_of_zeros_is_finite(answer):
    for shape in ((4, 4), (3, 6, 2)):
        got = orthogonalised(answer, torch.zeros(shape))
        assert got.isfinite().all(), "a matrix of zeros gives NaN: add 1e-7 to the norm"
