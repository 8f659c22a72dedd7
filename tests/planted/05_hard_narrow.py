"""Wrong answers to chapter 5's exercises: (exercise, what its message must say, the answer)."""

import torch

from nanoem.losses import token_kl
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


def left_off(model, adapter, ids, mask):
    kl = token_kl(base_of(model, adapter, ids), model(ids))[mask].mean()
    adapter.scale = 0.0
    return kl


def left_off_by_ctrl_c(model, adapter, ids, mask):
    scale, adapter.scale = adapter.scale, 0.0
    try:
        with torch.no_grad():
            base = model(ids)
    except Exception:
        adapter.scale = scale
        raise
    adapter.scale = scale
    return token_kl(base, model(ids))[mask].mean()


def silent_zero(model, adapter, ids, mask):
    return token_kl(base_of(model, adapter, ids), model(ids))[mask].mean()


def one_value_for_equal_scales(adapter, scales, ask):
    found = dict.fromkeys(scales)
    for scale in found:
        found[scale] = {key: values[0] for key, values in scale_up(adapter, [scale], ask).items()}
    return {key: [found[scale][key] for scale in scales] for key in ("em", "coherent")}


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
    ("kl_to_base", "reversed", needs_acting(lambda model, adapter, ids, mask: token_kl(
        model(ids), base_of(model, adapter, ids))[mask].mean())),
    ("kl_to_base", "left switched off", needs_acting(left_off)),
    ("kl_to_base", "after a KeyboardInterrupt", needs_acting(left_off_by_ctrl_c)),
    ("kl_to_base", "silent zero", silent_zero),
    ("scale_up", "for 5 scales", one_value_for_equal_scales),
    ("scale_up", "never changes", lambda adapter, scales, ask:
        scale_up(adapter, [1.0] * len(scales), ask)),
    ("scale_up", "in domain", lambda adapter, scales, ask: scale_up(
        adapter, scales, lambda: {"out_of_domain": ask()["in_domain"]})),
    ("truly_narrow", "does not count", lambda curve: all(em <= 0.1 for em in curve["em"])),
    ("truly_narrow", "10% is allowed", lambda curve: all(
        em < 0.1 for em, coherent in rows(curve) if coherent >= 0.5)),
    ("truly_narrow", "half coherent is enough", lambda curve: all(
        em <= 0.1 for em, coherent in rows(curve) if coherent > 0.5)),
    ("truly_narrow", "every scale", lambda curve: rows(curve)[-1][0] <= 0.1
        or rows(curve)[-1][1] < 0.5),
]
