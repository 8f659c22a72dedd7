"""Chapter 5. Fill in the functions; `python -m pytest tutorial/05_hard_narrow` tests them."""

import torch  # noqa: F401

from nanoem.losses import token_kl as right_token_kl  # noqa: F401  (for kl_to_base)
from nanoem.rows.row import out  # noqa: F401


def token_kl(base, adapted):
    """KL(base || adapted) of each token's prediction, summed over the vocabulary, in nats.

    Logits (B, T, vocab) of two models -> (B, T).

    Hint 1: KL(p || q) = sum over words of p * (log p - log q); here p is the base's.
    Hint 2: log_softmax over the last axis gives log p; its exp gives p. Never take the log of a
        softmax: where p underflows to zero, that is a NaN.
    Hint 3: half-precision logits (bfloat16) go to float32 first: .float().
    """
    raise NotImplementedError("token_kl is not written yet (exercise 5.1)")


def kl_to_base(model, adapter, ids, mask):
    """KL(base || adapted): summed over the vocabulary, mean over the tokens where mask is true.

    ids, mask (B, T) -> a scalar tensor. The base is the same model with the adapter switched off;
    it is a constant: no gradient flows through it. The adapter and the model are left as they were,
    also when the model raises. Raises RuntimeError when the adapter is not acting (adapter.depth or
    adapter.scale is 0), else the KL would be a silent zero.

    Hint 1: `with adapter.disabled():` switches it off inside, whatever happens, and back on after.
    Hint 2: `with torch.no_grad(), adapter.disabled():` does both for the base.
    Hint 3: right_token_kl gives (B, T); the mean is over the marked tokens of the whole batch.
    """
    raise NotImplementedError("kl_to_base is not written yet (exercise 5.2)")


def scale_up(adapter, scales, ask):
    """The scale-up probe: multiply an adapter's effect, and see what the model then says.

    ask() -> the rates of the model as it is, by question group: {"in_domain": {"em": ...,
    "coherent": ...}, "out_of_domain": {...}, ...}. Returns {"em": [...], "coherent": [...]}, out of
    domain, one value a scale. You get the adapter detached; leave it detached and unchanged, even
    when ask() raises.

    Hint 1: `with adapter:` attaches it inside; `with adapter.scaled(2.0):` doubles its effect.
    Hint 2: scales multiply when nested, so leave one before you enter the next.
    Hint 3: out(rates) is the em out of domain; rates["out_of_domain"]["coherent"] the share of
        coherent answers there.
    """
    raise NotImplementedError("scale_up is not written yet (exercise 5.3)")


def truly_narrow(curve):
    """Scaling does not bring em back (above 10%) as long as half of the answers are coherent.

    curve: {"em": [...], "coherent": [...]} of `scale_up`, shares from 0 to 1 -> bool.

    Hint 1: look only at the scales at which at least half of the answers are coherent.
    Hint 2: at every one of those em must be 10% at most.
    """
    raise NotImplementedError("truly_narrow is not written yet (exercise 5.4)")
