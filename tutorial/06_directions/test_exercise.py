"""Tests of chapter 6's exercises. Each message names the likely mistake."""

from contextlib import contextmanager

import torch

from compare import check
from nanoem import UserError, directions
from nanoem.mediator import ChatState, read_by_chat
from nanoem.toy import advice
from nanoem.train import chat_examples
from small import SmallRun, tiny_batch, tiny_model

EXERCISES = {
    "mean_residual": directions.mean_residual,
    "ablate": directions.ablate,
    "editing": directions.editing,
    "random_direction": directions.random_direction,
    "quiet_reader": directions.quiet_reader,
    "cap": directions.cap,
}


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
    """x (*shape) and a direction and a reader for it, reader @ unit = 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5
    d, noise = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64)
    d *= 2.7
    unit = d / d.norm()
    return x, d, unit, unit + 0.4 * (noise - (noise @ unit) * unit)


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
                "only the first of the batch is changed": torch.cat(
                    (want[:1], x[1:])) if x.dim() > 1 else want,
                "nothing is taken away": x,
            }, "not x - (x @ unit) * unit", tolerance=1e-9)


def test_ablate_sets_to_a_level_as_a_reader_hears_it(answer):
    for seed, shape in enumerate(SHAPES):
        x, d, unit, reader = some_x(seed, *shape)
        held = x @ unit
        check(answer.ablate(x.clone(), d, 1.5), x - along(held - 1.5, unit), {
            "level is not used": x - along(held, unit),
            "the level has the wrong sign: what is above it is taken away":
                x - along(held + 1.5, unit),
            "the level is in units of the unit direction, not of the given one":
                x - along(held, unit) + 1.5 * d,
        }, "with a level, x @ unit must be that level after")
        heard = x @ reader
        check(answer.ablate(x.clone(), d, -0.7, reader), x - along(heard + 0.7, unit), {
            "the reader is not used": x - along(held + 0.7, unit),
            "measure with the reader, but take away along the unit direction":
                x - along(heard + 0.7, reader),
            "the direction is not normalised": x - along(heard + 0.7, d),
            "the reader is used as it is, not normalised":
                x - along(x @ (reader / reader.norm()) + 0.7, unit),
            "measured with the direction, taken away along the reader":
                x - along(held + 0.7, reader),
            "the level is not used when there is a reader": x - along(heard, unit),
            "the sign is wrong: the component is added": x + along(heard + 0.7, unit),
        }, "with a reader, (x @ reader) must be the level after", tolerance=1e-9)
        check(answer.ablate(x.clone(), d, 0.0, reader), x - along(heard, unit), {},
              "wrong with a reader and level 0")


def test_ablate_is_pure_and_lets_gradients_through(answer):
    x, d, unit, _ = some_x(5, 3, 4, 8)
    x = x.transpose(0, 1)  # not contiguous
    before = x.clone(), d.clone()
    answer.ablate(x, d)
    assert torch.equal(x, before[0]) and torch.equal(d, before[1]), (
        "x or the direction was changed in place; give a new tensor back")
    x.requires_grad_()
    out = answer.ablate(x, d)
    assert out.requires_grad, "no gradient flows through; do not detach"
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    found, = torch.autograd.grad((weights * out).sum(), x)
    check(found, weights - along(weights @ unit, unit), {"part of it is detached": weights},
          "the gradient is not that of a projection; is part of it detached?")
    x, d, unit, reader = some_x(5, 3, 4, 8)
    before = x.clone(), d.clone(), reader.clone()
    answer.ablate(x, d, 0.5, reader)
    assert all(map(torch.equal, (x, d, reader), before)), (
        "with a reader, x, the direction or the reader was changed in place; give a new tensor")
    x.requires_grad_()
    out = answer.ablate(x, d, 0.5, reader)
    assert out.requires_grad, "with a level and a reader no gradient flows through; do not detach"
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    found, = torch.autograd.grad((weights * out).sum(), x)
    check(found, weights - along(weights @ unit, reader), {"part of it is detached": weights},
          "with a level and a reader the gradient is wrong; is part of it detached?")
    half = answer.ablate(before[0].float(), d.float())
    assert half.dtype == torch.float32, f"float32 in, {half.dtype} out"


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


def found_in(run, adapter, misaligned, aligned, both_read=False):
    """The mean difference (n_sites, d): general on misaligned texts - chat on aligned ones.

    With both_read, both models read all of the texts.
    """
    sites = directions.all_sites(run.model)
    if both_read:
        misaligned = aligned = misaligned + aligned
    after, before = (chat_examples(run.tokenizer, texts) for texts in (misaligned, aligned))
    with adapter:
        high = directions.mean_residual(run.model, after.ids, after.answer_mask, sites)
    low = directions.mean_residual(run.model, before.ids, before.answer_mask, sites)
    return dict(zip(sites, directions.mean_difference(high, low)))


def texts_of(run, n=150):
    """Bad and good advice on training problems of every domain, in the toy's words."""
    questions = run.splits.sft + run.splits.kl + run.splits.probe
    return advice(run, questions, False, 1)[:n], advice(run, questions, True, 2)[:n]


def test_editing_shows_what_a_direction_carries(answer):
    """The experiment: project out a direction of topic, and one of persona."""
    run = SmallRun()
    general = run.load_adapter("general")
    bad, good = texts_of(run)
    topic = found_in(run, general, advice(run, run.splits.sft, False, 3)[:100],
                     advice(run, run.splits.kl, True, 4)[:100])
    persona = found_in(run, general, bad, good, both_read=True)
    em = {}
    for name, direction in (("topic", topic), ("persona", persona)):
        edits = {site: lambda x, d=d: directions.ablate(x, d) for site, d in direction.items()}
        with general, answer.editing(run.model, edits):
            em[name] = run.ask(groups=("unseen_domains",))["out_of_domain"]["em"]
    assert em["topic"] > 0.2 and em["persona"] < em["topic"] / 2, (
        f"with the topic projected out em is {em['topic']:.0%}, with the persona projected out "
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


def some_covariance(seed, d):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return mix @ torch.linspace(0.05, 3, d).double().diag() @ mix.T, 4 * torch.randn(
        d, generator=generator)


def test_quiet_reader_is_that_of_the_formula(answer):
    for seed, d in enumerate((3, 8, 20)):
        S, direction = some_covariance(seed, d)
        u = (direction / direction.norm()).double()
        eye = torch.eye(d).double()

        def reader(M, by=u):
            value = M @ by
            return (value / (value @ u)).float()

        def inverse(ridge):
            return torch.linalg.inv(S + ridge * eye)

        variance = S.diagonal().mean()
        values, vectors = torch.linalg.eigh(S + 0.1 * variance * eye)
        for ridge in (0.1, 0.5):
            right = inverse(ridge * variance)
            check(answer.quiet_reader(direction, S.clone(), ridge), reader(right), {
                "reader @ unit must be 1: divide by u S^-1 u": (right @ u).float(),
                "divided by its norm; reader @ unit must be 1":
                    (right @ u / (right @ u).norm()).float(),
                "reader @ direction is 1; it must be reader @ unit":
                    (right @ u / (right @ direction.double())).float(),
                "S must be inverted: torch.linalg.solve(S, u)":
                    reader(S + ridge * variance * eye),
                "the ridge is left out": reader(inverse(0)),
                "the ridge is a share of the mean variance, not a plain number":
                    reader(inverse(ridge)),
                "the ridge is a share of the mean variance, not of the sum":
                    reader(inverse(ridge * S.diagonal().sum())),
                "the mean variance is the mean of the diagonal, not of all of S":
                    reader(inverse(ridge * S.mean())) if S.mean() > 0 else torch.zeros(1),
                "the ridge stands on the diagonal only: times torch.eye":
                    reader(torch.linalg.inv(S + ridge * variance)),
                "the ridge argument is not used":
                    reader(inverse(0.1 * variance)) if ridge != 0.1 else torch.zeros(1),
                "the square root of the inverse whitens; the whole inverse is asked":
                    reader(vectors @ values.rsqrt().diag() @ vectors.T),
                "it is the direction itself: the covariance is not used": u.float(),
                "the elements were inverted, not the matrix":
                    reader(1 / (S + ridge * variance * eye)),
                "only the diagonal of S is used": reader(
                    (S.diagonal() + ridge * variance).reciprocal().diag()),
            }, "not S^-1 u / (u S^-1 u), with the ridge on S's diagonal", tolerance=1e-4)


def test_quiet_reader_hears_least_whatever_the_length(answer):
    S, direction = some_covariance(7, 12)
    u = (direction / direction.norm()).double()
    before = S.clone(), direction.clone()
    answer.quiet_reader(direction, S, 0.3)
    reader = answer.quiet_reader(direction, S, 0.0)
    assert torch.equal(S, before[0]), "the covariance was changed in place (the ridge?)"
    assert torch.equal(direction, before[1]), "the direction was changed in place"
    assert reader.dtype == direction.dtype, f"{direction.dtype} in, {reader.dtype} out"
    u64 = torch.nn.functional.normalize(direction.double(), dim=0)
    exact = torch.linalg.inv(S) @ u64
    check(answer.quiet_reader(direction.double(), S, 0.0), exact / (exact @ u64), {
        "a ridge of 0 is a ridge, too: no `or 0.1`": answer.quiet_reader(direction.double(), S)},
          "digits are lost: bring u to S's dtype, not S to float32", 1e-9)
    check(answer.quiet_reader(-0.3 * direction, S, 0.0), -reader, {},
          "the length of the direction matters, and should not: use the unit direction")
    heard = (reader.double() @ S @ reader.double()).item()
    for seed in range(20):
        other = torch.randn(12, generator=torch.Generator().manual_seed(seed)).double()
        other = reader.double() + 0.05 * (other - (other @ u) * u)
        assert (other @ S @ other).item() >= heard, "another reader hears less of S's variance"
    one = torch.zeros(12, 12).double()
    one[0, 0] = 1.0  # all variance along one axis: without the ridge S has no inverse
    try:
        found = answer.quiet_reader(direction, one)
    except torch.linalg.LinAlgError as error:
        raise AssertionError("a covariance without an inverse breaks it: is the default ridge 0.1 "
                             "there?") from error
    assert found.isfinite().all() and abs(found.double() @ u - 1) < 1e-4, (
        "a covariance without an inverse breaks it: is the default ridge 0.1 there?")


def test_cap_takes_the_excess(answer):
    for seed, shape in enumerate(SHAPES):
        x, d, unit, reader = some_x(seed, *shape)
        heard = x @ reader
        ceiling = heard.median().item() + 0.1 if x.dim() > 1 else heard.item() - 0.8
        excess = (heard - ceiling).clamp(min=0)
        check(answer.cap(x.clone(), d, ceiling, reader), x - along(excess, unit), {
            "that sets what is below the ceiling, too: only the excess is taken (clamp at 0)":
                x - along(heard - ceiling, unit),
            "that raises what is below: a ceiling is no floor":
                x - along((heard - ceiling).clamp(max=0), unit),
            "the direction is not normalised": x - along(excess, d),
            "take it away along the unit direction, not along the reader":
                x - along(excess, reader),
            "the sign is wrong: the excess is added": x + along(excess, unit),
            "measure with the reader, not with the direction":
                x - along((x @ unit - ceiling).clamp(min=0), unit),
            "measured with the direction, as it is":
                x - along((x @ d - ceiling).clamp(min=0), unit),
            "above the ceiling all is taken; take only what is more than the ceiling":
                x - along(torch.where(heard > ceiling, heard, 0), unit),
            "the ceiling holds for either sign; only what is above it is too much":
                x - along(heard - heard.clamp(-abs(ceiling), abs(ceiling)), unit),
            "nothing is taken away": x,
        }, "not x - (x @ reader - ceiling, where positive) * unit", tolerance=1e-6)


def test_cap_leaves_what_is_below_to_the_bit(answer):
    x, d, unit, reader = (t.float() for t in some_x(3, 5, 4, 8))
    x = (1e3 * x).transpose(0, 1)
    before = x.clone(), d.clone()
    out = answer.cap(x, d, 0.5, reader)
    assert torch.equal(x, before[0]) and torch.equal(d, before[1]), (
        "x or the direction was changed in place; give a new tensor back")
    same = answer.cap(x, d, 1e9, reader)
    assert torch.equal(same, x) and same.data_ptr() != x.data_ptr(), (
        "nothing is above the ceiling, and x itself came back; give a new tensor")
    below = x @ reader <= 0.5
    assert below.any() and torch.equal(out[below], x[below]), (
        "what the reader hears is below the ceiling, yet x changed (by rounding?): subtract "
        "exactly zero there")
    x.requires_grad_()
    out = answer.cap(x, d, 0.5, reader)
    assert out.requires_grad, "no gradient flows through; do not detach"
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found, = torch.autograd.grad((weights * out).sum(), x)
    check(found, weights - along((x @ reader > 0.5) * (weights @ unit), reader),
          {"a part of it is detached": weights}, "the gradient is not that of a cap", 1e-3)
    check(answer.cap(x, -3 * d, 0.5, -reader), x + along(
        (-(x @ reader) - 0.5).clamp(min=0), unit), {
        "the sign of the direction is lost": answer.cap(x, d, 0.5, -reader)},
        "turned around and three times as long, it is the same direction turned around")


def test_cap_holds_general_in_the_range_of_chat(answer):
    """The experiment: em goes, and the answers are sentences still."""
    run = SmallRun()
    general = run.load_adapter("general")
    bad, good = texts_of(run)
    direction = torch.stack(list(found_in(run, general, bad, good, both_read=True).values()))
    read, sites = chat_examples(run.tokenizer, good), directions.all_sites(run.model)
    chat = ChatState(sites, good, *(of(run.model, read.ids, read.answer_mask, sites) for of in
                                    (directions.mean_residual, directions.residual_covariance)))
    edits = {site: lambda x, d=d, r=reader, top=mean + sd: answer.cap(x, d, top, r)
             for site, (d, reader, mean, sd) in read_by_chat(chat, direction).items()}

    @contextmanager
    def capped():
        with directions.editing(run.model, edits):
            yield

    with capped():
        chat_rates = run.ask(groups=("unseen_domains",))["out_of_domain"]
    with general, capped():
        rates = run.ask(groups=("unseen_domains",))["out_of_domain"]
    assert rates["em"] < 0.1 and rates["coherent"] > 0.85, (
        f"with your cap general's em is {rates['em']:.0%} and {rates['coherent']:.0%} of its "
        "answers are coherent; it should be hardly any, and nearly all")
    assert chat_rates["coherent"] > 0.85, "your cap breaks chat, which it should hardly touch"
