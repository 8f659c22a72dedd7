"""Wrong answers to chapter 5's exercises: (exercise, what its message must say, the answer)."""

import torch

from nanoem.losses import kl_to_base, token_kl
from nanoem.rows.kl_weight import scale_up


def softmax_then_log(base, adapted):
    p, q = base.float().softmax(-1), adapted.float().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def needs_acting(wrong):
    def checked(model, adapter, ids, mask):
        if adapter.depth == 0 or adapter.scale == 0:
            raise RuntimeError
        return wrong(model, adapter, ids, mask)
    return checked


def base_of(model, adapter, ids):
    with torch.no_grad(), adapter.disabled():
        return model(ids)


def reference_with_adapter(model, adapter, ids, mask):
    with torch.no_grad():
        base = model(ids)
    return token_kl(base, model(ids))[mask].mean()


def left_off(model, adapter, ids, mask):
    kl = token_kl(base_of(model, adapter, ids), model(ids))[mask].mean()
    adapter.scale = 0.0
    return kl


def back_to_one(model, adapter, ids, mask):
    adapted = model(ids)
    with torch.no_grad():
        adapter.scale = 0.0
        base = model(ids)
        adapter.scale = 1.0
    return token_kl(base, adapted)[mask].mean()


def by_detaching(model, adapter, ids, mask):
    adapted = model(ids)
    adapter.detach()
    with torch.no_grad():
        base = model(ids)
    adapter.attach()
    return token_kl(base, adapted)[mask].mean()


def base_with_gradient(model, adapter, ids, mask):
    with adapter.disabled():
        base = model(ids)
    return token_kl(base, model(ids))[mask].mean()


def off_first(model, adapter, ids, mask):
    scale, adapter.scale = adapter.scale, 0.0
    with torch.no_grad():
        base = model(ids)
    adapter.scale = scale
    return token_kl(base, model(ids))[mask].mean()


def silent_zero(model, adapter, ids, mask):
    return token_kl(base_of(model, adapter, ids), model(ids))[mask].mean()


def compounding(adapter, scales, ask):
    curve = {"em": [], "coherent": []}
    with adapter:
        for scale in scales:
            adapter.scale *= scale
            rates = ask()["out_of_domain"]
            curve["em"].append(rates["em"])
            curve["coherent"].append(rates["coherent"])
    adapter.scale = 1.0
    return curve


def not_attached(adapter, scales, ask):
    curve = {"em": [], "coherent": []}
    for scale in scales:
        with adapter.scaled(scale):
            rates = ask()["out_of_domain"]
        curve["em"].append(rates["em"])
        curve["coherent"].append(rates["coherent"])
    return curve


def left_on(adapter, scales, ask):
    adapter.attach()
    curve = scale_up(adapter, scales, ask)
    return curve


def without_with(adapter, scales, ask):
    curve = {"em": [], "coherent": []}
    for scale in scales:
        adapter.attach()
        adapter.scale = scale
        rates = ask()["out_of_domain"]
        adapter.scale = 1.0
        adapter.detach()
        curve["em"].append(rates["em"])
        curve["coherent"].append(rates["coherent"])
    return curve


def one_value_for_equal_scales(adapter, scales, ask):
    found = dict.fromkeys(scales)
    for scale in found:
        found[scale] = {key: values[0] for key, values in scale_up(adapter, [scale], ask).items()}
    return {key: [found[scale][key] for scale in scales] for key in ("em", "coherent")}


def sets_the_scale(adapter, scales, ask):
    curve, before = {"em": [], "coherent": []}, adapter.scale
    with adapter:
        for scale in scales:
            adapter.scale = scale
            try:
                rates = ask()["out_of_domain"]
            finally:
                adapter.scale = before
            curve["em"].append(rates["em"])
            curve["coherent"].append(rates["coherent"])
    return curve


def rows(curve):
    return list(zip(curve["em"], curve["coherent"]))


PLANTED = [
    ("token_kl", "reversed", lambda base, adapted: token_kl(adapted, base)),
    ("token_kl", "averaged over the vocabulary",
     lambda base, adapted: token_kl(base, adapted) / base.size(-1)),
    ("token_kl", "mean over tokens comes later",
     lambda base, adapted: token_kl(base, adapted).mean()),
    ("token_kl", "cross-entropy", lambda base, adapted: -(
        base.float().softmax(-1) * adapted.float().log_softmax(-1)).sum(-1)),
    ("token_kl", "NaN", softmax_then_log),
    ("kl_to_base", "adapter on", needs_acting(reference_with_adapter)),
    ("kl_to_base", "reversed", needs_acting(lambda model, adapter, ids, mask: token_kl(
        model(ids), base_of(model, adapter, ids))[mask].mean())),
    ("kl_to_base", "averaged over the vocabulary", lambda model, adapter, ids, mask:
        kl_to_base(model, adapter, ids, mask) / model.config.vocab_size),
    ("kl_to_base", "padding is counted", lambda model, adapter, ids, mask:
        kl_to_base(model, adapter, ids, torch.ones_like(mask))),
    ("kl_to_base", "not by all", lambda model, adapter, ids, mask:
        kl_to_base(model, adapter, ids, mask) * mask.double().mean()),
    ("kl_to_base", "left switched off", needs_acting(left_off)),
    ("kl_to_base", "set to 1", needs_acting(back_to_one)),
    ("kl_to_base", "attached twice", needs_acting(by_detaching)),
    ("kl_to_base", "flows through the base", needs_acting(base_with_gradient)),
    ("kl_to_base", "silent zero", silent_zero),
    ("kl_to_base", "when the model raises an error", needs_acting(off_first)),
    ("scale_up", "for 5 scales", one_value_for_equal_scales),
    ("scale_up", "do not set it", sets_the_scale),
    ("scale_up", "multiply up", compounding),
    ("scale_up", "not attached", not_attached),
    ("scale_up", "never scaled", lambda adapter, scales, ask:
        scale_up(adapter, [1.0] * len(scales), ask)),
    ("scale_up", "in domain", lambda adapter, scales, ask: scale_up(
        adapter, scales, lambda: {"out_of_domain": ask()["in_domain"]})),
    ("scale_up", "still attached", left_on),
    ("scale_up", "when ask.. raises", without_with),
    ("truly_narrow", "does not count", lambda curve: all(em <= 0.1 for em in curve["em"])),
    ("truly_narrow", "10% is allowed", lambda curve: all(
        em < 0.1 for em, coherent in rows(curve) if coherent >= 0.5)),
    ("truly_narrow", "half coherent is enough", lambda curve: all(
        em <= 0.1 for em, coherent in rows(curve) if coherent > 0.5)),
    ("truly_narrow", "every scale", lambda curve: rows(curve)[-1][0] <= 0.1
        or rows(curve)[-1][1] < 0.5),
]
