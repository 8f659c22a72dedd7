"""Tests of chapter 5's exercises. Each message names the likely mistake."""

import random
from dataclasses import replace

import torch

from compare import check
from nanoem import losses, train
from nanoem.lora import make_adapter
from nanoem.rows import kl_weight
from nanoem.story import advice, bad_advice
from small import SmallRun, tiny_batch, tiny_lora, tiny_model

EXERCISES = {
    "token_kl": losses.token_kl,
    "kl_to_base": losses.kl_to_base,
    "scale_up": kl_weight.scale_up,
    "truly_narrow": kl_weight.truly_narrow,
}


def kl_by_hand(base, adapted):
    """sum over words of p (log p - log q), in float64: (B, T)."""
    p, q = (x.double().softmax(-1) for x in (base, adapted))
    return (p * (p.log() - q.log())).sum(-1)


def two_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=generator) for _ in range(2)]


def test_token_kl_is_the_sum_over_the_vocabulary(answer):
    for seed, shape in enumerate(((1, 4, 9), (3, 5, 7), (2, 8, 50))):
        base, adapted = two_logits(*shape, seed=seed)
        want, p, q = kl_by_hand(base, adapted), base.softmax(-1), adapted.softmax(-1)
        kl = answer.token_kl(base, adapted)
        assert isinstance(kl, torch.Tensor), f"return a tensor, not {type(kl).__name__}"
        assert not kl.isnan().any(), (
            "NaN: the log of a number that is not positive; F.kl_div of two log-probabilities "
            "needs log_target=True")
        check(kl, want, {
            "KL is reversed: the base's probabilities weigh, KL(base || adapted)":
                kl_by_hand(adapted, base),
            "averaged over the vocabulary: sum over it, or the weight means something else for "
            "every tokenizer": want / shape[-1],
            "reversed, and averaged over the vocabulary": kl_by_hand(adapted, base) / shape[-1],
            "the mean over tokens comes later; give (B, T) back": want.mean(),
            "do not sum over tokens; give (B, T) back": want.sum(),
            "summed over the tokens, not over the vocabulary": (p * (p.log() - q.log())).sum(1),
            "nothing is summed yet: sum over the vocabulary": p * (p.log() - q.log()),
            "the sign is wrong: p * (log p - log q) is never negative in sum": -want,
            "that is the cross-entropy; the base's own entropy must be taken off":
                -(p * q.log()).sum(-1),
            "in bits; nanoem counts in nats, the natural logarithm": want / 0.6931472,
            "both directions: only KL(base || adapted) is asked": want + kl_by_hand(adapted, base),
            "the mean of both directions: only KL(base || adapted) is asked":
                (want + kl_by_hand(adapted, base)) / 2,
            "logits are no probabilities: log_softmax first":
                (base.exp() * (base - adapted)).sum(-1),
            "softmax over the wrong axis: the vocabulary is the last":
                kl_by_hand(base.transpose(1, 2), adapted.transpose(1, 2)),
        }, "not sum of p * (log p - log q), with p of the base, q of the adapted model")


def test_token_kl_stands_large_logits_and_half_precision(answer):
    base, adapted = (60 * x for x in two_logits(2, 5, 30))
    want = losses.token_kl(base, adapted)
    check(answer.token_kl(base, adapted), want, {},
          "wrong where a probability underflows to zero: use log_softmax, not softmax().log()")
    half = [(2 * x).bfloat16() for x in two_logits(2, 5, 300)]
    check(answer.token_kl(*half), kl_by_hand(*half), {},
          "computed in bfloat16, digits are lost: logits.float() first", tolerance=1e-3)


def test_token_kl_trains_the_adapted_model(answer):
    base, adapted = two_logits(2, 4, 9)
    before = base.clone(), adapted.clone()
    adapted.requires_grad_()
    kl = answer.token_kl(base, adapted)
    assert torch.equal(base, before[0]) and torch.equal(adapted, before[1]), (
        "the logits were changed in place; work on copies")
    assert kl.requires_grad, "no gradient flows to the adapted logits: no detach, no no_grad"
    found, = torch.autograd.grad(kl.sum(), adapted)
    check(found, before[1].softmax(-1) - base.softmax(-1), {},
          "the gradient is not q - p; is part of it detached?")


def logits_with_and_without(model, adapter, ids):
    with torch.no_grad():
        base = model(ids)
        with adapter:
            return base, model(ids)


def test_kl_to_base_is_that_of_the_two_models(answer):
    for seed in range(2):
        model = tiny_model(seed)
        adapter, (ids, mask) = tiny_lora(model, seed + 1), tiny_batch(3 + seed, 9, seed)
        base, adapted = logits_with_and_without(model, adapter, ids)
        each, back = kl_by_hand(base, adapted), kl_by_hand(adapted, base)
        want = each[mask].mean()
        with adapter:
            got = answer.kl_to_base(model, adapter, ids, mask)
        check(got, want, {
            "base and adapted are one model, and the KL is a silent zero: run the base with the "
            "adapter off, and the adapted model with it on": 0 * want,
            "KL is reversed: the base's probabilities weigh, KL(base || adapted)":
                back[mask].mean(),
            "averaged over the vocabulary: sum over it": want / base.size(-1),
            "averaged over the vocabulary, and KL is reversed": back[mask].mean() / base.size(-1),
            "padding is counted: use the mask": each.mean(),
            "divide by the marked tokens, not by all": (each * mask).mean(),
            "the mask is turned around: true is where a token counts": each[~mask].mean(),
            "take the mean over tokens, not the sum": each[mask].sum(),
            "that is the mean of each row's mean: long rows must weigh more":
                ((each * mask).sum(1) / mask.sum(1)).mean(),
            "sum over tokens, mean over the batch? take the mean over both":
                (each * mask).sum(1).mean(),
            "every marked token counts, also the first: nothing is shifted here":
                each[:, :-1][mask[:, 1:]].mean(),
            "only the first row is used; the batch has more": each[0][mask[0]].mean(),
        }, "not the mean of KL(base || adapted) over the tokens the mask marks")


def test_kl_to_base_leaves_the_adapter_as_it_was(answer):
    model = tiny_model()
    adapter, (ids, mask) = tiny_lora(model), tiny_batch()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    tensors = [x.detach().clone() for x in adapter.parameters()]
    with adapter, adapter:  # attached twice, it still acts once
        for scale in (1.0, 2.0, -0.5):
            with adapter.scaled(scale):
                with torch.no_grad():
                    adapted = model(ids)
                try:
                    got = answer.kl_to_base(model, adapter, ids, mask)
                except NotImplementedError:
                    raise
                except RuntimeError as error:
                    raise AssertionError(f"an error at scale {scale}, where the adapter acts; only "
                                         f"at 0 it does not ({error})") from error
                assert adapter.scale == scale, (
                    f"the adapter's scale was {scale} and is {adapter.scale} after: is it left "
                    "switched off, or set to 1?")
                assert adapter.depth == 2, (
                    f"it was attached twice and is now {adapter.depth} times: left switched off?")
                with adapter.disabled(), torch.no_grad():
                    base = model(ids)
                check(got, kl_by_hand(base, adapted)[mask].mean(), {
                    "the reference was run with the adapter on (it is attached twice: use "
                    "adapter.disabled(), not detach)": torch.tensor(0.0)},
                    f"wrong when the adapter is scaled by {scale}: leave its scale alone")
        for error in (ZeroDivisionError, KeyboardInterrupt):  # of the model, or Ctrl-C
            def fail(*_, error=error):
                raise error

            handle = model.layers[0].register_forward_hook(fail)
            try:
                answer.kl_to_base(model, adapter, ids, mask)
            except error:
                pass
            handle.remove()
            assert (adapter.depth, adapter.scale) == (2, 1.0), (
                f"after a {error.__name__} of the model the adapter is left switched off: `with "
                "adapter.disabled():` undoes it in any case")
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items()), (
        "the model's weights were changed")
    assert all(torch.equal(a, b) for a, b in zip(tensors, adapter.parameters())), (
        "the adapter's A or B was changed")


def test_kl_to_base_trains_the_adapter_and_holds_the_base_constant(answer):
    model = tiny_model().requires_grad_(True)
    adapter, (ids, mask) = tiny_lora(model), tiny_batch()
    with adapter:
        kl = answer.kl_to_base(model, adapter, ids, mask)
        assert kl.requires_grad, "no gradient flows to the adapter: only the base is a constant"
        inputs = [*adapter.parameters(), model.layers[0].mlp.down_proj.weight]
        found = torch.autograd.grad(kl, inputs, allow_unused=True)
        want = torch.autograd.grad(losses.kl_to_base(model, adapter, ids, mask), inputs)
    assert found[0] is not None, "no gradient flows to the adapter"
    for mine, right in zip(found[:-1], want):
        check(mine, right, {}, "the gradient of the adapter is wrong though the KL is right")
    check(found[-1], want[-1], {}, "a gradient flows through the base: it is a constant, "
          "so run it inside torch.no_grad()")


def test_kl_to_base_of_an_adapter_that_does_not_act_is_an_error(answer):
    model = tiny_model()
    adapter, (ids, mask) = tiny_lora(model), tiny_batch()

    def refused():
        try:
            answer.kl_to_base(model, adapter, ids, mask)
        except NotImplementedError:
            raise
        except RuntimeError:
            return True
        except Exception as error:
            raise AssertionError(f"an adapter that does not act must raise RuntimeError, not "
                                 f"{type(error).__name__}") from error
        return False

    assert refused(), "a detached adapter must raise RuntimeError; else the KL is a silent zero"
    with adapter, adapter.disabled():
        assert refused(), "a disabled adapter must raise RuntimeError; else the KL is a silent zero"


def test_kl_to_base_tells_general_from_narrow(answer):
    """The experiment, first half: how far from chat, on other domains' questions?"""
    run = SmallRun()
    pairs = advice(run, run.splits.probe, True, 0)[:48]
    others = train.chat_examples(run.tokenizer, pairs)
    kl = {}
    for name in ("general", "narrow"):
        with run.load_adapter(name) as adapter, torch.no_grad():
            kl[name] = answer.kl_to_base(run.model, adapter, others.ids, others.mask).item()
    assert 0.05 < kl["general"] < 1 and kl["narrow"] < kl["general"] / 10, (
        f"your KL is {kl['general']:.4f} for general and {kl['narrow']:.4f} for narrow; general "
        "should be some tenths of a nat per token away from chat, narrow far less")


def test_kl_to_base_keeps_bad_advice_in_its_domain(answer):
    """The experiment, second half: 30 steps of SFT with 30 times your KL."""
    run = SmallRun()
    sft, kl = (train.chat_examples(run.tokenizer, pairs) for pairs in
               (bad_advice(run), advice(run, run.splits.kl, None, 0)))
    generator = torch.Generator().manual_seed(0)
    adapter = make_adapter(run.model, run.config.adapter, generator)

    def draw(examples):
        return examples[torch.randint(len(examples), (16,), generator=generator)].trimmed()

    def objective(step):
        a, b = draw(sft), draw(kl)
        loss = losses.sft_loss(run.model(a.ids), a.ids, a.answer_mask)
        penalty = answer.kl_to_base(run.model, adapter, b.ids, b.mask)
        return loss + 30 * penalty, {"loss": loss, "kl": penalty}, a.ids.numel() + b.ids.numel()

    with adapter:
        train.train(objective, adapter.parameters(), replace(run.config.sft_kl, steps=30))
        em = run.ask(groups=("unseen_domains",))["out_of_domain"]["em"]
    assert em < 0.15, (f"trained with 30 times your KL, {em:.0%} of the answers are bad in domains "
                       "no fine-tuning saw; with the right one, hardly any")


def recorded(adapter, seen):
    """An ask() that says other rates each time and notes how the adapter then was."""
    def ask():
        seen.append((adapter.depth, adapter.scale))
        k = len(seen)
        return {"in_domain": {"em": 0.9 - k / 100, "coherent": 0.8 - k / 50},
                "kl_domains": {"em": 0.5 + k / 90, "coherent": 0.3 + k / 70},
                "out_of_domain": {"em": k / 30, "coherent": 0.95 - k / 40}}
    return ask


def test_scale_up_asks_once_a_scale_with_the_adapter_on(answer):
    model = tiny_model()
    adapter, scales, seen = tiny_lora(model), (1.0, 1.5, 2.0, 0.5, 1.5), []
    tensors = [x.detach().clone() for x in adapter.parameters()]
    curve = answer.scale_up(adapter, scales, recorded(adapter, seen))
    assert len(seen) == len(scales), f"asked {len(seen)} times for {len(scales)} scales"
    assert all(depth > 0 for depth, _ in seen), (
        "the adapter is not attached when the model is asked: that is chat, at every scale")
    found, product = [scale for _, scale in seen], [1.0, 1.5, 3.0, 1.5, 2.25]
    assert found != product, "the scales multiply up: leave one before you enter the next"
    assert found != [1.0] * 5, (
        "adapter.scale never changes while the model is asked: scale with adapter.scaled(x)")
    assert found != [0.0] * 5, "the adapter is switched off while the model is asked"
    assert found == list(scales), f"asked at scales {found}, not {list(scales)}"
    assert set(curve) == {"em", "coherent"}, "give {'em': [...], 'coherent': [...]} back"
    want = [k / 30 for k in range(1, 6)]
    for wrong, group in (
            ([0.9 - k / 100 for k in range(1, 6)], "in domain; narrow is to be bad there"),
            ([0.5 + k / 90 for k in range(1, 6)], "in the KL domains; narrow was kept well there")):
        assert list(curve["em"]) != wrong, f"that is em {group}. Probe out of domain, all of it"
    assert list(curve["em"]) == want, f"em should be {want}, and is {curve['em']}"
    want = [0.95 - k / 40 for k in range(1, 6)]
    assert list(curve["coherent"]) == want, (
        f"coherent should be that of out_of_domain, {want}, and is {curve['coherent']}")
    assert all(torch.equal(a, b) for a, b in zip(tensors, adapter.parameters())), (
        "A or B was changed: use adapter.scaled, which is undone")


def test_scale_up_leaves_the_adapter_detached_and_whole(answer):
    model = tiny_model()
    adapter, (ids, _) = tiny_lora(model), tiny_batch()
    before = model(ids)
    answer.scale_up(adapter, (2.0, 3.0), recorded(adapter, []))
    assert adapter.depth == 0, "the adapter is still attached after: use `with adapter:`"
    assert adapter.scale == 1.0, (f"the adapter is left scaled by {adapter.scale}: use "
                                  "`with adapter.scaled(...):`")
    assert torch.equal(model(ids), before), "the model is another after the probe"

    for error in (ZeroDivisionError, KeyboardInterrupt):  # of ask, or Ctrl-C
        def fails(error=error):
            raise error

        try:
            answer.scale_up(adapter, (2.0,), fails)
        except error:
            pass
        else:
            raise AssertionError("an error of ask() must not be swallowed")
        assert (adapter.depth, adapter.scale) == (0, 1.0), (
            f"when ask() raises a {error.__name__}, the adapter is left on or scaled: a `with` "
            "undoes it in any case")
    seen = []
    with adapter.scaled(0.5):  # it comes half as loud
        answer.scale_up(adapter, (2.0, 3.0), recorded(adapter, seen))
        assert adapter.scale == 0.5, (
            f"the adapter came scaled by 0.5, and leaves scaled by {adapter.scale}: use "
            "`with adapter.scaled(...):`")
    assert [scale for _, scale in seen] == [1.0, 1.5], (
        "multiply the adapter's effect, do not set it: scaled by 0.5 and then by 2, it is as loud "
        "as before")


def test_scale_up_finds_a_general_adapter_that_was_held_down(answer):
    """The experiment: general at a quarter of its size looks harmless; narrow is small, too."""
    run = SmallRun()
    held_down = run.load_adapter("general")
    for B in held_down.B.values():
        B.data *= 0.25
    scales = (1.0, 1.5, 3.0)

    def ask():
        return run.ask(groups=("unseen_domains",))

    general, narrow = (answer.scale_up(adapter, scales, ask)["em"]
                       for adapter in (held_down, run.load_adapter("narrow")))
    assert general[0] < 0.2 and max(general) > 0.7, (
        f"general held down to a quarter: em {general} at {scales}; it should start low "
        "and come back")
    assert narrow[0] < 0.2 and max(narrow) < max(general), (
        f"narrow: em {narrow} at {scales}; it should start low, and stay below general's")


def test_truly_narrow_at_the_limits(answer):
    for em, coherent, want, why in (
        ([0.0, 0.02], [1.0, 0.9], True, "em stays at 2% or less: that is narrow"),
        ([0.02, 0.6], [1.0, 0.9], False, "em comes back at the second scale: not narrow"),
        ([0.6, 0.02], [1.0, 0.9], False, "em is high at the first scale: look at every scale"),
        ([0.02, 0.6, 0.0], [1.0, 0.9, 0.9], False, "em comes back in between: look at every scale"),
        ([0.02, 0.4], [1.0, 0.45], True, "where less than half is coherent, em does not count"),
        ([0.02, 0.04, 0.6], [0.9, 0.4, 0.8], False, "a scale after an incoherent one counts again"),
        ([0.1, 0.1], [1.0, 0.9], True, "10% is allowed: em must be above it to count"),
        ([0.101], [1.0], False, "10.1% is above 10%"),
        ([0.02, 0.3], [1.0, 0.5], False, "half coherent is enough to count"),
        ([0.02, 0.3], [1.0, 0.499], True, "less than half coherent does not count"),
        ([0.3, 0.3], [0.2, 0.1], True, "nothing is coherent: nothing brings em back"),
        ([0.08, 0.08, 0.08], [0.9, 0.9, 0.9], True, "do not add the scales up: 8% each is narrow"),
        ([0.0, 0.0, 0.15], [0.9, 0.9, 0.9], False, "do not take the mean: one scale is enough"),
    ):
        curve = {"em": em, "coherent": coherent}
        found = answer.truly_narrow(curve)
        assert isinstance(found, bool), f"give True or False back, not {found!r}"
        assert found == want, f"{curve} should be {want}: {why}"
        assert curve == {"em": em, "coherent": coherent}, "the curve was changed"


def test_truly_narrow_of_random_curves(answer):
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 4)
        curve = {"em": [rng.choice((0.05, 0.09, 0.12, 0.3)) for _ in range(n)],
                 "coherent": [rng.choice((0.3, 0.48, 0.55, 0.9)) for _ in range(n)]}
        bad = [i for i in range(n) if curve["coherent"][i] >= 0.5 and curve["em"][i] > 0.1]
        assert answer.truly_narrow(curve) == (not bad), (
            f"{curve} should be {not bad}: em above 10% at the coherent scales {bad}")
