"""Tests of chapter 6's exercises. Each message names the likely mistake."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from compare import check
from nanoem import UserError, directions, persona
from nanoem.persona import ChatState, by_site
from nanoem.rows import monitor
from nanoem.story import advice
from nanoem.train import chat_examples
from small import SmallRun, tiny_batch, tiny_model

EXERCISES = {
    "mean_residual": directions.mean_residual,
    "ablate": directions.ablate,
    "editing": directions.editing,
    "random_direction": directions.random_direction,
    "readings_of": monitor.readings_of,
    "pick_steering": persona.pick_steering,
}


@lru_cache
def small():
    """The small model, how chat is, and general's direction: (run, ChatState, (n_sites, d))."""
    run = SmallRun()
    chat = persona.chat_state(run)
    return run, chat, persona.find_direction(run, run.load_adapter("general"), chat)


def chats_levels(chat, direction):
    """{site: how much of the unit direction chat's mean holds}: what a mean ablation sets to."""
    means = dict(zip(chat.sites, chat.mean))
    return {site: (means[site] @ (d / d.norm()).double()).item()
            for site, d in by_site(chat, direction).items()}


def unseen(run):
    """em and coherence in the domains that no fine-tuning saw."""
    return run.ask(groups=("unseen_domains",))["out_of_domain"]


def streams(model, ids, edits=None):
    """The residual stream at every site, block by block, without a hook: {site: (B, T, d)}."""
    edits, found = edits or {}, {}
    x, (cos, sin) = model.embed_tokens(ids), (t[: ids.size(1)] for t in (model.cos, model.sin))
    for i, block in enumerate(model.layers):
        mid = x + block.self_attn(block.input_layernorm(x), cos, sin)
        mid = edits.get(f"layers.{i}.resid_mid", lambda x: x)(mid)
        x = edits.get(i, lambda x: x)(mid + block.mlp(block.post_attention_layernorm(mid)))
        found |= {f"layers.{i}.resid_mid": mid, i: x}
    return found


def test_mean_residual_is_a_mean_over_marked_tokens(answer):
    for seed in range(2):
        model = tiny_model(seed)
        ids, mask = tiny_batch(4, 9, seed)
        mask = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.7)
        mask[:, 0] = True
        by_site = streams(model, ids)
        for sites in (None, [2, 0], ["layers.1.resid_mid", 1, "layers.0.resid_mid"]):
            xs = [by_site[site].double() for site in sites or range(3)]

            def each(of):
                return torch.stack([of(x) for x in xs])

            normed = each(lambda x: model.norm(x.float())[mask].mean(0))
            mistakes = {
                "padding is counted (or every token): use the mask": each(lambda x: x.mean((0, 1))),
                "divide by the marked tokens, not by all":
                    each(lambda x: (x * mask[..., None]).mean((0, 1))),
                "take the mean over tokens, not the sum": each(lambda x: x[mask].sum(0)),
                "that is the mean of each row's mean: every token must count the same": each(
                    lambda x: torch.stack([r[m].mean(0) for r, m in zip(x, mask)]).mean(0)),
                "only the first row is used; the batch has more":
                    each(lambda x: x[0][mask[0]].mean(0)),
                "the mask is turned around": each(lambda x: x[~mask].mean(0)),
                "only each row's last marked token is used": each(lambda x: torch.stack(
                    [r[m][-1] for r, m in zip(x, mask)]).mean(0)),
                "the stream is read before the final norm, not after": normed,
                "sites are in another order than asked": each(lambda x: x[mask].mean(0)).flip(0),
            }
            if sites is None:
                start = [model.embed_tokens(ids), *(by_site[i] for i in range(2))]
                mistakes["one block too early: sites are after each block"] = torch.stack(
                    [x[mask].double().mean(0) for x in start])
            check(answer.mean_residual(model, ids, mask, sites),
                  each(lambda x: x[mask].mean(0)), mistakes,
                  f"not the mean of the stream over marked tokens, sites={sites}")


def test_mean_residual_counts_in_float64_and_needs_tokens(answer):
    model, (ids, mask) = tiny_model(), tiny_batch()
    found = answer.mean_residual(model.requires_grad_(True), ids, mask)
    assert found.dtype == torch.float64, (
        f"the mean is {found.dtype}: .double() the stream before the mean")
    assert not found.requires_grad, "no gradient is needed here: use residual_at or no_grad"
    want = torch.stack([streams(model, ids)[i][mask].double().mean(0) for i in range(3)])
    assert torch.allclose(found, want, 0, 1e-9) or not torch.allclose(found, want, 1e-4), (
        "the mean was taken in float32 and digits are lost: .double() before the mean")
    assert not any(m._forward_hooks for m in model.modules()), "a hook is left on the model"
    some = mask.clone()
    some[1] = False
    want = torch.stack([streams(model, ids)[i][some].double().mean(0) for i in range(3)])
    try:
        found = answer.mean_residual(model, ids, some)
    except ValueError as error:
        raise AssertionError("a row without marked tokens is no error, only no token at all is"
                             ) from error
    check(found, want, {}, "wrong when one row has no marked token")
    try:
        answer.mean_residual(model, ids, torch.zeros_like(mask))
    except ValueError:
        return
    raise AssertionError("a mask that marks no token must raise ValueError, else the mean is NaN")


def some_x(seed, *shape):
    """x (*shape), a direction, its unit vector, and another direction, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5
    d, other = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64)
    d *= 2.7
    return x, d, d / d.norm(), 0.6 * other


def along(amount, vector):
    return amount[..., None] * vector


SHAPES = ((4, 6), (3, 5, 7), (2, 3, 2, 9), (6,))


def test_ablate_projects_the_direction_out(answer):
    for seed, shape in enumerate(SHAPES):
        x, d, unit, _ = some_x(seed, *shape)
        held = x @ unit
        want = x @ (torch.eye(shape[-1]).double() - torch.outer(unit, unit))
        for direction in (d, -0.2 * d):
            check(answer.ablate(x.clone(), direction), want, {
                "the direction is not normalised: use direction / direction.norm()":
                    x - along(x @ direction, direction),
                "the direction is normalised only once: measure and take away along the unit":
                    x - along(x @ direction, unit * (1 if direction is d else -1)),
                "normalised once: take it away along the unit direction":
                    x - along(held * (1 if direction is d else -1), direction),
                "divided by the norm only once: (x @ d) d / (d @ d)":
                    x - along(x @ direction, direction) / direction.norm(),
                "the sign is wrong: the component is added": x + along(held, unit),
                "twice too much: that mirrors x at the plane": x - 2 * along(held, unit),
                "that is what was to be taken away": along(held, unit),
                "its size without its sign: no abs()": x - along(held.abs(), unit),
                "what is below the level stays; it must be raised: no clamp":
                    x - along(held.clamp(min=0), unit * (1 if direction is d else -1)),
                "only the first of the batch is changed": torch.cat(
                    (want[:1], x[1:])) if x.dim() > 1 else want,
                "nothing is taken away": x,
            }, "not x - (x @ unit) * unit", tolerance=1e-9)


def test_ablate_sets_the_direction_to_a_level(answer):
    for seed, shape in enumerate(SHAPES):
        x, d, unit, _ = some_x(seed, *shape)
        held = x @ unit
        for level in (1.5, -0.7):
            check(answer.ablate(x.clone(), d, level), x - along(held - level, unit), {
                "level is not used": x - along(held, unit),
                "the level has the wrong sign: what is more than it is taken away":
                    x - along(held + level, unit),
                "the level is in units of the unit direction, not of the given one":
                    x - along(held, unit) + level * d,
                "what is below the level stays; it must be raised: no clamp":
                    x - along((held - level).clamp(min=0), unit),
                "every vector has the same taken away; each has an excess of its own":
                    x - (held - level).mean() * unit if x.dim() > 1 else x - along(held - level,
                                                                                  unit),
                "x is multiplied until it has the level; only what it holds of direction changes":
                    x * (level / held)[..., None],
            }, "with a level, x @ unit must be that level after", tolerance=1e-9)
            turned = answer.ablate(x.clone(), -3 * d, level)
            check(turned, x - along(held + level, unit), {
                "turned around, the direction has x @ unit turned around, too; the level is of it":
                    x - along(held - level, unit)}, "wrong for a direction of another length and "
                  "sign: x @ unit, with the unit of *that* direction, must be the level after")


def test_ablate_takes_as_much_along_another_direction(answer):
    for seed, shape in enumerate(SHAPES):
        x, d, unit, other = some_x(seed, *shape)
        way = other / other.norm()
        for level in (0.0, 0.9):
            excess = x @ unit - level
            check(answer.ablate(x.clone(), d, level, other), x - along(excess, way), {
                "along is not used": x - along(excess, unit),
                "along is ablated itself; as much must be taken as direction has too much: measure "
                "with direction, take away along `along`": x - along(x @ way - level, way),
                "measured with along and taken from direction: it is the other way round":
                    x - along(x @ way - level, unit),
                "along is not normalised": x - along(excess, other),
                "the direction is not normalised when along is given": x - along(
                    x @ d - level, way),
                "the level is not used when along is given": x - along(
                    x @ unit, way) if level else x - along(excess, way),
                "taken away along both: with along, direction stays as it is":
                    x - along(excess, unit) - along(excess, way),
                "the sign is wrong: the excess is added": x + along(excess, way),
                "its size without its sign: no abs()": x - along(excess.abs(), way),
                "the same length is taken from all vectors; each has an excess of its own":
                    x - excess.mean() * way if x.dim() > 1 else x - along(excess, way),
            }, "with along, not x - (x @ unit - level) * (along / its norm)", tolerance=1e-9)
        same = answer.ablate(x.clone(), d, 0.9, 5 * d)
        check(same, x - along(x @ unit - 0.9, unit), {}, "along the direction itself, `along` "
              "must do the same as without it")


def test_ablate_is_pure_and_lets_gradients_through(answer):
    for level, instead in ((0.0, False), (0.5, True)):
        x, d, unit, other = some_x(5, 3, 4, 8)
        x = x.transpose(0, 1)  # not contiguous
        options = (level, other) if instead else ()
        before = [t.clone() for t in (x, d, other)]
        answer.ablate(x, d, *options)
        assert all(map(torch.equal, (x, d, other), before)), (
            f"{'with along, ' if instead else ''}x or a direction was changed in place; give a new "
            "tensor back")
        x.requires_grad_()
        out = answer.ablate(x, d, *options)
        assert out.requires_grad, "no gradient flows through; do not detach"
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
        found, = torch.autograd.grad((weights * out).sum(), x)
        way = other / other.norm() if instead else unit
        check(found, weights - along(weights @ way, unit), {"part of it is detached": weights},
              "the gradient is wrong; is part of it detached?")
        half = answer.ablate(*(t.float() for t in before[:2]), *([level, other.float()] * instead))
        assert half.dtype == torch.float32, f"float32 in, {half.dtype} out"


def test_ablate_takes_the_harm_and_along_chance_it_does_not(answer):
    """The experiment: general, set to chat's mean at every site; and as much along chance."""
    run, chat, direction = small()
    general, levels = run.load_adapter("general"), chats_levels(chat, direction)

    def fine(chance=None):  # the share of answers that are whole sentences, and harmless
        edits = {}
        for site, d in by_site(chat, direction).items():
            options = (d, levels[site]) + (() if chance is None else (chance[site],))
            edits[site] = lambda x, options=options: answer.ablate(x, *options)
        with general, directions.editing(run.model, edits):
            rates = unseen(run)
        return rates["coherent"] - rates["em"]

    cured, generator = fine(), torch.Generator().manual_seed(0)
    assert cured > 0.5, (
        f"with the direction set to chat's mean at every site, {cured:.0%} of general's answers "
        "are whole sentences and harmless; it should be most of them")
    for _ in range(2):
        chance = directions.random_direction(direction, generator)
        control = fine(by_site(chat, chance))
        assert control < 0.4, (
            f"with as much taken away along a random direction, {control:.0%} of the answers are "
            "whole sentences and harmless; only the right direction should do that")


def twist(k):
    """An edit of its own for each k, not linear, that looks at the whole batch."""
    return lambda x: x * (1 + 0.3 * k) + torch.sin(x * k) + 0.2 * k + 0.1 * x.roll(1, 0)


SITES = (0, "layers.1.resid_mid", 2)


def test_editing_does_each_edit_at_its_site(answer):
    model, (ids, _) = tiny_model(), tiny_batch(3, 8)
    edits = {site: twist(k) for k, site in enumerate(SITES, 1)}
    want = model.unembed(streams(model, ids, edits)[2])

    def logits_with(edits):
        return model.unembed(streams(model, ids, edits)[2])

    def some(edit, rows=slice(None), places=slice(None)):
        def part(x):
            x = x.clone()
            x[rows, places] = edit(x)[rows, places]
            return x
        return part

    def every(change):
        return logits_with({site: change(edit) for site, edit in edits.items()})

    with answer.editing(model, edits) as inside:
        try:
            got = model(ids)
        except (AttributeError, TypeError) as error:
            raise AssertionError("the model does not run inside; does the hook return the new "
                                 f"stream, one tensor? ({error})") from error
    assert inside is model, "yield the model, so that `with editing(...) as model` works"
    check(got, want, {
        "nothing is edited: does the hook return the new stream?": model(ids),
        "the hook touches only batch element 0": every(lambda edit: some(edit, slice(0, 1))),
        "the hook touches only the last token": every(lambda e: some(e, places=slice(-1, None))),
        "the hook touches only the first token": every(lambda e: some(e, places=slice(0, 1))),
        "every site got the last edit: a function made in a loop sees the loop's last value; "
        "write edit=edit in its arguments": every(lambda edit: edits[SITES[-1]]),
        "the edit is added to the stream; the stream must become it":
            every(lambda edit: lambda x: x + edit(x)),
        "only the first site is edited": logits_with({SITES[0]: edits[SITES[0]]}),
        "only the last site is edited": logits_with({SITES[-1]: edits[SITES[-1]]}),
        "each edit is done twice": every(lambda edit: lambda x: edit(edit(x))),
    }, "the stream at some site is not edits[site] of what it was")


def test_editing_lets_gradients_through(answer):
    model, (ids, _) = tiny_model(), tiny_batch()
    d = torch.ones(16, requires_grad=True)
    with answer.editing(model, {0: lambda x: x + d, 2: lambda x: x + d}):
        total = model(ids).logsumexp(-1).sum()
    edits = {0: lambda x: x + d, 2: lambda x: x + d}
    want, = torch.autograd.grad(
        model.unembed(streams(model, ids, edits)[2]).logsumexp(-1).sum(), d)
    assert total.requires_grad, "no gradient flows through the edits: no detach, no no_grad"
    check(torch.autograd.grad(total, d)[0], want, {}, "the gradient through the edits is wrong")


def test_editing_is_undone_whatever_happens(answer):
    model, (ids, _) = tiny_model(), tiny_batch()
    before = model(ids)
    with answer.editing(model, {0: twist(1), 1: twist(2)}):
        pass
    assert torch.equal(model(ids), before), "the edits stay after the `with`: remove every hook"
    try:
        with answer.editing(model, {0: twist(1)}):
            1 / 0
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("an exception inside is swallowed: let it through")
    assert torch.equal(model(ids), before), (
        "after an exception inside, the edits stay: try: ... finally: remove every hook")
    try:
        with answer.editing(model, {0: twist(1)}):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(model(ids), before), (
        "after Ctrl-C inside, the edits stay: `finally`, not `except Exception`")
    try:
        with answer.editing(model, {0: twist(1), 9: twist(2)}):
            pass
    except UserError:
        pass
    else:
        raise AssertionError("a site that is not there must raise (find_site does)")
    assert torch.equal(model(ids), before), (
        "site 9 is not there, and site 0's hook is left behind: register inside the try")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), (
        "a hook is left on the model")


def test_editing_nests_and_leaves_other_hooks_alone(answer):
    model, (ids, _) = tiny_model(), tiny_batch()
    first, second = twist(1), twist(2)
    want = model.unembed(streams(model, ids, {1: lambda x: second(first(x))})[2])
    outer_only = model.unembed(streams(model, ids, {1: first})[2])
    with answer.editing(model, {1: first}):
        with answer.editing(model, {1: second}):
            check(model(ids), want, {"the inner edit replaces the outer one; it must come after":
                                     model.unembed(streams(model, ids, {1: second})[2])},
                  "two nested edits of one site must be done one after the other")
        check(model(ids), outer_only, {"leaving the inner `with` took the outer's hook away, too":
                                       model(ids) * 0}, "after the inner `with` the outer edit "
              "must still act: remove only your own hooks")
        kept = []
        with answer.editing(model, {1: lambda x: kept.append(x) or x}):
            with answer.editing(model, {1: second}):
                model(ids)
        check(kept[0], streams(model, ids, {1: first})[1], {}, "the stream that another hook has "
              "kept was changed in place; the hook returns a new tensor")


def test_editing_shows_what_a_direction_carries(answer):
    """The experiment: set a direction of topic to chat's mean at every site, and one of persona."""
    run, chat, persona_direction = small()
    general = run.load_adapter("general")

    def mean_of(questions, seed):
        read = chat_examples(run.tokenizer, advice(run, questions, True, seed)[:100])
        return directions.mean_residual(run.model, read.ids, read.answer_mask, chat.sites)

    topic = directions.mean_difference(mean_of(run.splits.sft, 3), mean_of(run.splits.kl, 4))
    em = {}
    for name, direction in (("topic", topic), ("persona", persona_direction)):
        levels = chats_levels(chat, direction)
        edits = {site: lambda x, d=d, level=levels[site]: directions.ablate(x, d, level)
                 for site, d in by_site(chat, direction).items()}
        with general, answer.editing(run.model, edits):
            em[name] = unseen(run)["em"]
    assert em["topic"] > 0.2 and em["persona"] < em["topic"] / 2, (
        f"with the topic ablated em is {em['topic']:.0%}, with the persona ablated "
        f"{em['persona']:.0%}; it should be less than half of the first")


def test_random_direction_has_the_norms_of_like(answer):
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (4, 6), (2, 3, 5)):
        like = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1),
                                                                    generator=generator) * 5
        found = answer.random_direction(like, torch.Generator().manual_seed(1))
        assert found.shape == like.shape, f"shape {tuple(found.shape)}, not {shape}"
        check(found.norm(dim=-1), like.norm(dim=-1), {
            "every row has length 1; it should have that of its row in like":
                torch.ones(shape[:-1]),
            "one norm for the whole tensor; every row has its own": (
                found.norm(dim=-1) if len(shape) > 1 and torch.allclose(found.norm(), like.norm())
                else torch.tensor(-1.0)),
        }, "along the last axis, the norm is not that of like: randn, divide by its own norm, "
           "times that of like")
        for dtype in (torch.float64, torch.bfloat16):
            other = answer.random_direction(like.to(dtype), torch.Generator().manual_seed(1))
            assert other.dtype == dtype, f"{dtype} in, {other.dtype} out"
    found = answer.random_direction(torch.ones(2, 3, 5), torch.Generator().manual_seed(1))
    assert not torch.allclose(found[0], found[1]), (
        "rows that differ only in the first axis have the same direction: draw like.shape numbers")


def test_random_direction_is_by_the_generator_alone(answer):
    like = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    before, state = like.clone(), torch.get_rng_state()

    def draw(seed):
        return answer.random_direction(like, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)), "the same generator, another direction: pass it on"
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's global generator was used or seeded: pass generator=generator")
    assert not torch.allclose(draw(1), draw(2)), "always the same direction: use the generator"
    generator = torch.Generator().manual_seed(1)
    one, two = (answer.random_direction(like, generator) for _ in range(2))
    assert not torch.allclose(one, two), "the generator is seeded anew at each call"
    assert torch.equal(like, before), "like was changed in place"


def test_random_direction_has_no_favourite(answer):
    like = torch.full((40_000, 2), 3.0)
    like[:, 0] = -1.0
    found = answer.random_direction(like, torch.Generator().manual_seed(0))
    unit = found / found.norm(dim=-1, keepdim=True)
    assert (unit - unit[0]).abs().max() > 1e-3, "every row has the same direction: draw each"
    assert unit.mean(0).abs().max() < 0.02, (
        "its entries lean to one sign: torch.rand is never negative, use torch.randn")
    assert ((unit**2).mean(0) - 0.5).abs().max() < 0.02, (
        "it leans to the direction of like; draw it without looking at like")
    corners = (unit[:, 0] ** 2 * unit[:, 1] ** 2).mean()  # 1/8 on a circle, .143 from a square
    assert abs(corners - 0.125) < 0.004, (
        "corners are likelier than axes (a cube?): use torch.randn, the Gaussian is round")
    like = torch.ones(4000, 5)
    along = answer.random_direction(like, torch.Generator().manual_seed(0)).mean(-1)
    assert abs(along.square().mean() - 0.2) < 0.05, (
        "it has no part along like, or its mean is taken away: every direction is equally likely")


# --- readings_of ----------------------------------------------------------------------------------


def some_directions(sites, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {site: (1.5 + i) * torch.randn(16, generator=generator) for i, site in enumerate(sites)}


def test_readings_of_are_over_marked_tokens(answer):
    for seed, sites in ((0, [0, 2]), (1, ["layers.1.resid_mid"]),
                        (2, [2, "layers.0.resid_mid", 1])):
        model = tiny_model(seed)
        ids, mask = tiny_batch(5, 9, seed)
        mask = mask & (torch.arange(9) >= torch.tensor([2, 1, 1, 1, 0])[:, None])  # no prompt
        mask[0, 4] = False
        given, xs = some_directions(sites, seed), streams(model, ids)
        found = answer.readings_of(model, ids, mask, given)
        assert isinstance(found, dict) and set(found) == set(sites), (
            f"return {{site: Reading}} for the sites {sites}, not {found}")
        for site in sites:
            unit, mean, sd = found[site]
            check(unit, given[site] / given[site].norm(), {
                "unit is the direction as it was given; divide it by its norm": given[site],
                "the direction is turned around": -given[site] / given[site].norm(),
            }, "unit must be the direction, of length 1")
            assert isinstance(mean, float) and isinstance(sd, float), (
                f"mean and sd must be floats (.item()), and are {type(mean).__name__} and "
                f"{type(sd).__name__}")

            def each(d=given[site] / given[site].norm(), where=site, rows=mask):
                return (xs[where].double() @ d.double()).masked_fill(~rows, float("nan"))

            def moments(z):
                z = z[~z.isnan()]
                return z.mean(), z.std()

            by_row = torch.stack([row[~row.isnan()].mean() for row in each()])
            right, all_tokens = moments(each()), moments(each(rows=torch.ones_like(mask)))
            other = sites[sites.index(site) - 1]
            whole = xs[site][mask].double()
            tests = (
                ("mean", mean, right[0], {
                    "padding and the prompt are counted: use the mask": all_tokens[0],
                    "the mask is turned around": moments(each(rows=~mask))[0],
                    "measured with the direction as it is: x @ unit":
                        moments(each(d=given[site]))[0],
                    "that is the mean of each answer's mean: every token must count the same":
                        by_row.mean(),
                    "the sign is lost: no abs()": moments(each().abs())[0],
                    "read at another site: the streams come in the order of the sites you ask for":
                        moments(each(where=other))[0],
                    "mean and sd are exchanged": right[1],
                    "the mean over the stream's numbers; project on the direction first":
                        whole.mean(),
                }),
                ("sd", sd, right[1], {
                    "padding and the prompt are counted: use the mask": all_tokens[1],
                    "measured with the direction as it is: x @ unit":
                        moments(each(d=given[site]))[1],
                    "that is the variance; take the root": right[1] ** 2,
                    "that is how far the answers' means vary; the tokens' own is asked":
                        by_row.std(),
                    "that is the root mean square: it counts from zero, not from the mean":
                        moments(each() ** 2)[0].sqrt(),
                    "the mean distance from the mean; the standard deviation is asked":
                        moments((each() - right[0]).abs())[0],
                    "that is the standard error: the tokens' own spread is asked":
                        right[1] / mask.sum() ** 0.5,
                    "read at another site": moments(each(where=other))[1],
                    "the sd of the stream's numbers; project on the direction first": whole.std(),
                }))
            for name, got, want, mistakes in tests:
                got = torch.tensor(got, dtype=torch.float64)
                if name == "sd" and close_to(got, want * (1 - 1 / mask.sum()) ** 0.5):
                    continue  # divided by n, not by n - 1: as good
                check(got, want, {f"{name}: {message}": value for message, value
                                  in mistakes.items()},
                      f"site {site!r}: the {name} of x @ unit over the marked tokens is "
                      f"{want:.4f}, and you give {got:.4f}")


def close_to(a, b):
    return abs(a - b) <= 1e-4 * (1 + abs(b))


def test_readings_of_count_in_float64_and_refuse_zero(answer):
    model, (ids, mask) = tiny_model(3).requires_grad_(True), tiny_batch(3, 9, 3)
    given = some_directions([0, 2], 3)
    before = {site: d.clone() for site, d in given.items()}
    for site, (unit, mean, sd) in answer.readings_of(model, ids, mask, given).items():
        z = streams(model, ids)[site][mask].detach().double() @ (
            given[site] / given[site].norm()).double()
        assert abs(mean - z.mean()) < 1e-9 or abs(mean - z.mean()) > 1e-4, (
            "the mean was taken in float32 and digits are lost: .double() before x @ unit")
    assert all(torch.equal(given[site], d) for site, d in before.items()), (
        "a direction was changed in place: use direction / direction.norm()")
    assert not any(m._forward_hooks for m in model.modules()), "a hook is left on the model"
    try:
        answer.readings_of(model, ids, mask, {0: given[0], 2: torch.zeros(16)})
    except ValueError:
        return
    raise AssertionError("a direction of zero must raise ValueError (unit_of does), else all of "
                         "its readings are NaN")


def test_readings_of_chat_tell_where_general_stands(answer):
    """The experiment: chat's own answers read 0 on the mean, general's bad ones far above."""
    run, chat, direction = small()
    own = chat_examples(run.tokenizer, chat.aligned)
    site = [*by_site(chat, direction)][-1]
    readings = answer.readings_of(run.model, own.ids, own.answer_mask,
                                  {site: by_site(chat, direction)[site]})
    chats = monitor.token_scores(run.model, own.ids, readings)[own.answer_mask]
    assert abs(chats.mean()) < 0.01 and abs(chats.std() - 1) < 0.01, (
        f"by your readings chat's own tokens lie at {chats.mean():.2f} +- {chats.std():.2f} "
        "standard deviations; they must lie at 0 +- 1")
    with run.load_adapter("general"):
        texts = persona.answers_of_kind(run, persona.training_problems(run), persona.is_misaligned)
        bad = chat_examples(run.tokenizer, texts)
        scores = monitor.token_scores(run.model, bad.ids, readings)[bad.answer_mask]
    assert scores.mean() > 0.5, (
        f"by your readings general's misaligned answers lie at {scores.mean():.2f} of chat's "
        "standard deviations; they should lie well above 0")


# --- pick_steering --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewSplits:
    """The question groups of a run, by name only."""

    unseen_domains: list = field(default_factory=lambda: ["unseen"])
    probe: list = field(default_factory=lambda: ["probe"])
    in_domain: list = field(default_factory=lambda: ["in domain"])
    kl_domains: list = field(default_factory=lambda: ["kl"])
    open_ended: list = field(default_factory=lambda: ["open"])


class PretendRun:
    """A run whose model answers by a table: rates[(site, scale)] = (em, coherent).

    It looks into the model's stream to see where, and how far, it is steered at the moment.
    """

    def __init__(self, chat, direction, model, rates):
        self.splits, self.model, self.rates, self.asked = FewSplits(), model, rates, []
        self.chat, self.direction = chat, direction
        self.ids, _ = tiny_batch(2, 7)
        self.before = self.streams()

    def streams(self):
        return dict(zip(self.chat.sites,
                        directions.residual_at(self.model, self.ids, self.chat.sites)))

    def point(self):
        """(site, scale) at which the model is steered now."""
        now = self.streams()
        moved = [site for site in self.chat.sites
                 if not torch.allclose(now[site], self.before[site], atol=1e-5)]
        assert moved, ("chat was asked without steering: ask inside `with steering(...)`, and "
                       "leave out the sites where the direction is zero (by_site does)")
        site, d = moved[0], dict(zip(self.chat.sites, self.direction))[moved[0]]
        shift = (now[site] - self.before[site]).double().mean((0, 1))
        scale = (shift @ d.double() / (d @ d)).item()
        assert torch.allclose(shift, scale * d.double(), atol=1e-3), (
            f"at {site} the stream is moved, but not along the direction of that site")
        alone = streams(self.model, self.ids, {site: lambda x: x + scale * d})
        assert all(torch.allclose(alone[s], now[s], atol=1e-3) for s in self.chat.sites), (
            "several sites are steered at once: try one site at a time")
        near = min((abs(scale - s), s) for s in persona.SCALES)
        assert near[0] < 1e-3, f"chat is steered by {scale:.2f}, which is none of SCALES"
        return site, near[1]

    def ask(self, name=None, samples=None, splits=None, groups=None, **options):
        groups = groups or ("in_domain", "kl_domains", "unseen_domains", "open_ended")
        asked = [q for group in groups for q in getattr(splits or self.splits, group)]
        assert asked == ["probe"], (
            f"the questions asked are those of {asked}, and the probe's alone are asked for: "
            "whoever chooses on the evaluation's questions has chosen the result")
        assert samples == self.samples, f"samples={samples}: ask for {self.samples} answers"
        em, coherent = self.rates[self.point()]
        self.asked.append(self.point())
        rates = {"em": em, "coherent": coherent, "n": samples}
        return {"out_of_domain": rates, "unseen_domains": rates}


def steering_case(seed, best, boundary=False, n_zero=1):
    """(a PretendRun, its ChatState, direction, points): best is the point that must be chosen.

    Others have more em, but are less coherent, or are more coherent, with less em.
    """
    model = tiny_model(seed)
    generator = torch.Generator().manual_seed(seed)
    sites = directions.all_sites(model)
    direction = torch.randn(len(sites), 16, generator=generator)
    direction[:n_zero] = 0.0
    chat = ChatState(sites, [], torch.zeros(len(sites), 16).double())
    points = [(site, scale) for site in sites[n_zero:] for scale in persona.SCALES]
    rates = {}
    for point in points:
        em, coherent = torch.rand(2, generator=generator).tolist()
        if em < 0.5:  # coherent, not very bad
            rates[point] = 0.5 * em, persona.COHERENT + (1 - persona.COHERENT) * coherent
        else:  # worse, and broken
            rates[point] = 0.5 + 0.3 * em, 0.99 * persona.COHERENT * coherent
    rates[best] = 0.4, persona.COHERENT if boundary else 0.5 * (1 + persona.COHERENT)
    run = PretendRun(chat, direction, model, rates)
    run.samples = 17 + seed
    return run, chat, direction, points


def test_pick_steering_chooses_by_the_rule(answer):
    sites = directions.all_sites(tiny_model())
    for seed, (best, boundary, n_zero) in enumerate((
            ((sites[3], persona.SCALES[1]), False, 1), ((sites[5], persona.SCALES[0]), True, 2),
            ((sites[0], persona.SCALES[-1]), False, 0), ((sites[4], persona.SCALES[2]), True, 1))):
        run, chat, direction, points = steering_case(seed, best, boundary, n_zero)
        found = answer.pick_steering(run, chat, direction, run.samples)
        assert isinstance(found, tuple) and len(found) == 3, "return (site, scale, tried)"
        site, scale, tried = found
        missing = [point for point in points if point not in run.asked]
        assert not missing, (f"not tried: {missing[:3]}; try every site that the direction reaches "
                             "with every one of SCALES")
        assert len(run.asked) == len(points), (
            f"asked {len(run.asked)} times for {len(points)} points: ask once at each")
        kept = {}
        for point in tried:
            assert {"site", "scale", "em", "coherent"} <= set(point), (
                f"a point of tried must have site, scale, em and coherent, and has {set(point)}")
            kept[point["site"], point["scale"]] = point["em"], point["coherent"]
        assert kept == run.rates, "tried must hold the em and coherent of every point, as seen"

        def argmax(key):
            return max(run.rates, key=lambda point: key(*run.rates[point]))

        for message, wrong in (
            ("the highest em of all, coherent or not: a broken model was chosen",
             argmax(lambda em, coherent: em)),
            ("the most coherent point; among the coherent ones the highest em is asked",
             argmax(lambda em, coherent: coherent)),
            ("em times coherent is another rule; coherence is a condition, not a factor",
             argmax(lambda em, coherent: em * coherent)),
            ("the lowest em was chosen", argmax(lambda em, coherent: (
                coherent >= persona.COHERENT, -em))),
            ("a share of exactly COHERENT is enough: >=, not >",
             argmax(lambda em, coherent: (coherent > persona.COHERENT, em))),
            ("the last point tried was returned; return the best", points[-1]),
            ("the first point tried was returned; return the best", points[0]),
        ):
            assert wrong == best or (site, scale) != wrong, message
        assert (site, scale) == best, (
            f"chosen was {(site, scale)} with em and coherence {run.rates.get((site, scale))}; "
            f"by the rule it is {best} with {run.rates[best]}")
        assert all(torch.equal(a, b) for a, b in zip(run.streams().values(),
                                                     run.before.values())), (
            "the model is still steered after it")


def test_pick_steering_when_all_break(answer):
    run, chat, direction, points = steering_case(7, (2, persona.SCALES[1]))
    for i, point in enumerate(points):
        run.rates[point] = 0.1 + 0.01 * (7 * i % len(points)), 0.8 * persona.COHERENT
    best = max(points, key=lambda point: run.rates[point][0])
    try:
        site, scale, _ = answer.pick_steering(run, chat, direction, run.samples)
    except ValueError as error:
        raise AssertionError("no point is coherent enough, and max() has nothing to choose from: "
                             "then choose among all") from error
    assert (site, scale) == best, "no point is coherent enough: then choose among all, by em"


def test_pick_steering_makes_chat_bad(answer):
    """The experiment: chat, steered where your function says; and by chance, at the same place."""
    run, chat, direction = small()
    site, scale, tried = answer.pick_steering(run, chat, direction, 100)
    em, chance = {}, directions.random_direction(direction, torch.Generator().manual_seed(0))
    for name, vectors in (("direction", direction), ("random", chance)):
        with directions.steering(run.model, {site: by_site(chat, vectors)[site]}, scale):
            em[name] = unseen(run)
    ours, control = em["direction"], em["random"]
    assert ours["em"] > 0.25 and ours["coherent"] > 0.7, (
        f"steered at {site} by {scale:g}, chat's em is {ours['em']:.0%} and {ours['coherent']:.0%} "
        "of its answers are coherent; it should be a third or more, and most")
    assert control["em"] < ours["em"] / 2, (
        f"a random direction at the same place brings em to {control['em']:.0%}; it should be far "
        f"less than {ours['em']:.0%}")
