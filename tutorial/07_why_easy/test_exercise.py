"""Tests of chapter 7's exercises. Each message names the likely mistake."""

import time
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from compare import check, close
from nanoem.lora import LoRA
from nanoem.losses import sft_loss
from nanoem.lab import inductive_bias
from nanoem.lab.inductive_bias import loss_on, replaced, significance
from nanoem.story import advice, bad_advice
from nanoem.train import Examples, chat_examples
from small import SmallRun, tiny_batch, tiny_lora, tiny_model

EXERCISES = {
    "efficiency": inductive_bias.efficiency,
    "noisy": inductive_bias.noisy,
    "random_writer": inductive_bias.random_writer,
    "hessian_vector_product": inductive_bias.hessian_vector_product,
}


@lru_cache
def small():
    """The small run, its two adapters, and 40 training examples."""
    run = SmallRun()
    pair = {name: run.load_adapter(name) for name in ("general", "narrow")}
    return run, pair, chat_examples(run.tokenizer, bad_advice(run)[:40])


def tiny(seed=0):
    """A tiny model, an adapter of rank 2 in two modules (alpha 3), and examples with padding."""
    model = tiny_model(seed)
    ids, mask = tiny_batch(3 + seed, 9, seed + 2)
    return model, tiny_lora(model, seed + 1), Examples(
        ids, mask, mask & (torch.arange(9) >= 1 + seed % 2))


def values(adapter):
    return [x.detach().clone() for x in adapter.parameters()]


def unchanged(adapter, before):
    return all(torch.equal(a, b) for a, b in zip(before, adapter.parameters()))


# --- efficiency -----------------------------------------------------------------------------------


def merged_loss(model, adapter, examples, factor):
    """The loss with factor times the adapter's matrices added to the weights."""
    before = {name: linear.weight.clone() for name, linear in adapter.sites.items()}
    with torch.no_grad():
        for name, linear in adapter.sites.items():
            linear.weight += factor * adapter.alpha / adapter.rank * adapter.B[name] @ adapter.A[
                name]
        loss = sft_loss(model(examples.ids), examples.ids, examples.answer_mask).item()
        for name, linear in adapter.sites.items():
            linear.weight.copy_(before[name])
    return loss


def test_efficiency_is_the_loss_at_each_norm(answer):
    for seed in range(3):
        model, adapter, examples = tiny(seed)
        own, norms = adapter.effective_norm(), [0.7, 2.5, 1.3, 0.0, 4.0]
        parts = [(B.norm() * A.norm()).item() for A, B in zip(adapter.A.values(),
                                                             adapter.B.values())]

        def at(factors):
            return torch.tensor([merged_loss(model, adapter, examples, f) for f in factors])

        want = at([n / own for n in norms])
        running, nested = 1.0, []
        for norm in norms:
            running *= norm / own
            nested.append(running)
        whole = Examples(examples.ids, examples.mask, examples.mask)
        try:
            found = answer.efficiency(model, adapter, examples, list(norms))
        except ZeroDivisionError:
            raise AssertionError("divided by zero: take the adapter's own norm before it is "
                                 "scaled; scaled to 0 it has none") from None
        assert isinstance(found, list) and all(isinstance(x, float) for x in found), (
            f"give a list of floats back, one a norm, not {found!r}")
        assert len(found) == len(norms), f"{len(norms)} norms, but {len(found)} losses"
        check(torch.tensor(found), want, {
            "the adapter is not attached: that is chat's loss, at every norm": at([0.0] * 5),
            "the adapter is never rescaled: that is its loss at its own norm": at([1.0] * 5),
            "scaled by the norm; the scale must be norm / own norm": at(norms),
            "the scale is turned around: norm / own norm, not own / norm":
                at([own / n if n else 0 for n in norms]),
            "the scale is norm * own norm; divide": at([n * own for n in norms]),
            "the scales multiply up: leave one before you enter the next": at(nested),
            "the norm of A times the norm of B is not the norm of B A: adapter.effective_norm()":
                at([n / (1.5 * sum(parts) / 2) for n in norms]),
            "alpha / rank belongs to the norm: adapter.effective_norm() has it":
                at([1.5 * n / own for n in norms]),
            "the effective norm is a mean over the modules, not a sum":
                at([n / (2 * own) for n in norms]),
            "scale A or B, not both; better adapter.scaled": at([(n / own) ** 2 for n in norms]),
            "the norm's square root? the norm is proportional to the scale":
                at([(n / own) ** 0.5 for n in norms]),
            "the losses are in another order than the norms": want.sort().values,
            "minus the loss": -want,
            "the loss itself, not what it gained over chat": want[3] - want,
            "the loss per norm? give the loss itself": want / torch.tensor(norms),
            "the loss counts answer tokens only: loss_on(model, examples)": torch.tensor(
                [merged_loss(model, adapter, whole, n / own) for n in norms]),
        }, "not loss_on(model, examples) with the adapter rescaled to each norm", 1e-4)


def test_efficiency_of_an_adapter_that_was_scaled_before(answer):
    model, adapter, examples = tiny(1)
    want = [merged_loss(model, adapter, examples, n / adapter.effective_norm()) for n in (1.0, 3.0)]
    for scale in (2.0, 0.5):
        adapter.scale = scale
        found = torch.tensor(answer.efficiency(model, adapter, examples, (1.0, 3.0)))
        assert adapter.scale == scale, (
            f"the adapter came with scale {scale} and leaves with {adapter.scale}: use "
            "`with adapter.scaled(...)`, which is undone")
        check(found, torch.tensor(want), {},
              f"wrong when adapter.scale was {scale} before: norm / effective_norm(), and scaled() "
              "multiplies what is there")


def test_efficiency_leaves_everything_as_it_was(answer):
    model, adapter, examples = tiny()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    before, norms, alpha = values(adapter), [2.0, 0.5], adapter.alpha
    answer.efficiency(model, adapter, examples, norms)
    assert norms == [2.0, 0.5], "the list of norms was changed"
    assert adapter.depth == 0, "the adapter is still attached after: use `with adapter:`"
    assert not any(module._forward_hooks for module in model.modules()), "a hook is left behind"
    assert (adapter.scale, adapter.alpha) == (1.0, alpha), (
        f"the adapter is left scaled by {adapter.scale}, alpha {adapter.alpha}: use "
        "`with adapter.scaled(...)`, which is undone")
    assert unchanged(adapter, before), "A or B was changed: use adapter.scaled, which is undone"
    assert all(p.requires_grad for p in adapter.parameters()), (
        "the adapter's parameters are frozen after: it leaves unchanged")
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items()), (
        "the model's weights were changed")
    broken = Examples(examples.ids + 10_000, examples.mask, examples.answer_mask)
    try:
        answer.efficiency(model, adapter, broken, norms)
    except NotImplementedError:
        raise
    except Exception:  # no such words: the loss cannot be computed
        pass
    else:
        raise AssertionError("an error of the loss must not be swallowed")
    assert (adapter.depth, adapter.scale) == (0, 1.0) and unchanged(adapter, before), (
        "when the loss raises, the adapter is left on or scaled: a `with` undoes it in any case")

    def ctrl_c(*_):
        raise KeyboardInterrupt

    handle = model.layers[0].register_forward_hook(ctrl_c)
    try:
        answer.efficiency(model, adapter, examples, norms)
    except KeyboardInterrupt:
        pass
    handle.remove()
    assert (adapter.depth, adapter.scale) == (0, 1.0) and unchanged(adapter, before), (
        "after Ctrl-C the adapter is left on or scaled: `except Exception` does not see that, a "
        "`with` does")


def test_efficiency_of_general_is_better_than_of_narrow(answer):
    """The experiment: the same norm buys general more than narrow."""
    run, pair, examples = small()
    norms = (0.4, 0.8, 1.2, 1.6, 2.0)
    general, narrow = (answer.efficiency(run.model, pair[name], examples, norms)
                       for name in ("general", "narrow"))
    assert all(g < n for g, n in zip(general, narrow)), (
        f"losses at norms {norms}: general {general}, narrow {narrow}; general should have less at "
        "every one")


# --- noisy ----------------------------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


SHAPES = ((7,), (5, 3), (64, 1), (2, 3, 4))


def test_noisy_has_the_right_share_along_x(answer):
    for seed, shape in enumerate(SHAPES):
        x = (seed + 0.5) * torch.randn(shape, generator=seeded(100 + seed)) + 0.3
        for eps in (0.1, 0.5, 0.8):
            out = answer.noisy(x.clone(), eps, seeded(10 + seed))
            assert out.shape == x.shape, f"the shape is {tuple(out.shape)}, not {tuple(x.shape)}"
            along = (out * x).sum() / (x * x).sum()
            check(along, torch.tensor((1 - eps**2) ** 0.5), {
                "x keeps all of its length, so the sum grows: it must shrink to sqrt(1 - eps^2)":
                    torch.tensor(1.0),
                "that is (1 - eps) x: the root of 1 - eps^2 keeps the norm": torch.tensor(1 - eps),
                "the root is missing: sqrt(1 - eps^2), not 1 - eps^2": torch.tensor(1 - eps**2),
                "eps must be squared under the root": torch.tensor((1 - eps) ** 0.5),
                "eps and sqrt(1 - eps^2) are swapped: eps belongs to the noise": torch.tensor(eps),
            }, "the noise is not orthogonal to x (or x's own share is not sqrt(1 - eps^2)): take "
               "y's part along x away, (y . x) / (x . x) x, all elements taken as one vector", 1e-4)


def test_noisy_adds_noise_of_the_right_size(answer):
    for seed, shape in enumerate(SHAPES):
        x = (seed + 0.5) * torch.randn(shape, generator=seeded(100 + seed))
        for eps in (0.0, 0.1, 0.5, 0.8, 1.0):
            out = answer.noisy(x.clone(), eps, seeded(20 + seed))
            noise = (out - (1 - eps**2) ** 0.5 * x).norm() / x.norm()
            check(noise, torch.tensor(eps), {
                "the noise has size 1, not that of x": eps / x.norm(),
                "the noise has eps^2 for eps": torch.tensor(eps**2),
                "the noise has the square root of eps for eps": torch.tensor(eps**0.5),
                "there is no noise in it": torch.tensor(0.0),
            }, f"at eps={eps} the noise should be {eps} times as long as x, and is {noise:.3f} "
               "times: give y the norm of x *after* its part along x is taken away", 1e-4)
            check(out.norm(), x.norm(), {}, "the norm of x is not kept", 1e-4)


def test_noisy_is_gaussian_in_every_direction_but_x(answer):
    x = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    generator = seeded(0)
    draws = torch.stack([answer.noisy(x.clone(), 0.6, generator) - 0.8 * x for _ in range(1500)])
    assert not draws.isnan().any(), (
        "NaN where a row of x is zero: take all elements as one vector, not each row")
    assert not close(draws[0], draws[1], 1e-6), (
        "two draws from one generator are the same: pass the generator on, and do not seed it")
    free = draws[:, x == 0]  # ten numbers a draw; |noise|^2 is 9, in eleven directions
    assert free.mean(0).abs().max() < 0.12, (
        "the noise has a favourite side: randn is symmetric around 0, rand is not")
    assert free.square().mean() > 0.1, (
        "no noise where x is zero: y must be independent of x, do not multiply it by x")
    check(free.square().mean(0), torch.full((10,), 9 / 11), {},
          "the noise is not equally large in every direction orthogonal to x", 0.15)
    assert (draws[:, 0, 0]).abs().mean() > 0.2, (
        "each row is orthogonal to x's row: take the whole tensor as one vector")
    assert abs((free[:, 0] * free[:, 5]).mean()) < 0.12, "two elements of the noise move together"
    kurtosis = free.pow(4).mean() / free.square().mean() ** 2
    assert 2.3 < kurtosis < 2.9, "the noise is not Gaussian: torch.randn"


def test_noisy_takes_its_chance_from_the_generator(answer):
    x = torch.randn(6, 4, generator=seeded(1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = answer.noisy(x.clone(), 0.5, seeded(3))
    assert torch.equal(torch.get_rng_state(), state), (
        "the global generator was used: pass generator=generator")
    assert torch.equal(first, answer.noisy(x.clone(), 0.5, seeded(3))), (
        "the same generator must give the same noise")
    assert not close(first, answer.noisy(x.clone(), 0.5, seeded(4)), 1e-6), (
        "another seed gives the same noise: the generator is not used")


def test_noisy_gives_a_new_tensor_of_the_same_dtype(answer):
    for x in (torch.randn(6, 4, generator=seeded(1)).T,
              torch.randn(5, generator=seeded(2)).bfloat16(),
              torch.randn(5, generator=seeded(2)).double()):
        before = x.clone()
        for eps in (0.5, 0.0):
            out = answer.noisy(x, eps, seeded(3))
            assert torch.equal(x, before), "x was changed in place"
            assert out.data_ptr() != x.data_ptr(), "give a new tensor back, not x itself"
            assert out.dtype == x.dtype, f"x is {x.dtype}, the answer {out.dtype}: y.to(x)"
        check(answer.noisy(x, 0.0, seeded(3)), before, {}, "with eps=0 it should be x",
              0.02 if x.dtype == torch.bfloat16 else 1e-4)


def test_noisy_adapters_show_that_general_is_the_stable_one(answer):
    """The experiment: the same share of noise costs narrow more than general."""
    run, pair, examples = small()
    cost = {}
    for name, adapter in pair.items():
        generator = seeded(0)
        with adapter:
            own = loss_on(run.model, examples)
            losses = []
            for _ in range(6):
                noise = [answer.noisy(x, 0.5, generator) for x in values(adapter)]
                with replaced(adapter, noise):
                    losses.append(loss_on(run.model, examples))
        cost[name] = sum(losses) / len(losses) - own
    assert cost["general"] < 0.06 and cost["narrow"] > 2 * cost["general"], (
        f"noise of eps 0.5 costs general {cost['general']:.3f} nats, narrow {cost['narrow']:.3f}; "
        "narrow should lose far more")


# --- random_writer --------------------------------------------------------------------------------


def writer(seed=0):
    """An adapter in three modules of unlike shapes and sizes."""
    model = tiny_model(seed)
    adapter = LoRA(model, [0, 1], ["self_attn.v_proj", "mlp.down_proj"], rank=2, alpha=3.0,
                   generator=seeded(seed))
    for i, B in enumerate(adapter.B.values()):
        B.data.normal_(generator=seeded(seed + 1)).mul_(i + 1).add_(0.5)
    return adapter


def test_random_writer_reads_the_same_and_is_as_large(answer):
    for seed in range(3):
        adapter = writer(seed)
        A, B = list(adapter.A.values()), list(adapter.B.values())
        before = values(adapter)
        found = answer.random_writer(adapter, seeded(seed + 5))
        assert unchanged(adapter, before), "the adapter was changed; give its control back instead"
        assert isinstance(found, list) and len(found) == len(A) + len(B), (
            "give a list back, as long as adapter.parameters(): every A, then every B")
        shapes = [tuple(x.shape) for x in found]
        assert shapes == [tuple(x.shape) for x in adapter.parameters()], (
            f"the shapes are {shapes}: they must be those of adapter.parameters(), in its order, "
            "first every A, then every B")
        for mine, right in zip(found, A):
            assert torch.equal(mine, right), (
                "A must stay as it is, so that the control reads the same inputs")
        sizes = torch.stack([x.norm() for x in found[len(A):]])
        want = torch.stack([x.detach().norm() for x in B])
        drawn = torch.stack([x.shape.numel() ** 0.5 * torch.ones(()) for x in B])
        check(sizes, want, {
            "B has norm 1, not that of the adapter's B": torch.ones(len(B)),
            "every B has its own norm; one norm was used for all": want.mean().expand(len(B)),
            "every B has its own norm; the first B's was used for all": want[0].expand(len(B)),
            "the norms are in another order than the modules": want.flip(0),
            "all B together have the right norm; each must have its own": drawn * (
                want.norm() / drawn.norm()),
        }, "each B must have the norm of the adapter's B: times B.norm(), divided by its own norm")
        for mine, right in zip(found[len(A):], B):
            cos = torch.cosine_similarity(mine.flatten(), right.flatten(), dim=0)
            assert cos.abs() < 0.9, "that is B itself (or minus B), not a random direction"
            assert not close(mine.norm(dim=0), right.detach().norm(dim=0), 1e-4), (
                "every column was given its own norm: rescale B as a whole")
            assert not close(mine.norm(dim=1), right.detach().norm(dim=1), 1e-4), (
                "the rows have the norms of B's rows: is it B with other signs?")
            columns = torch.cosine_similarity(mine[:, 0], mine[:, 1], dim=0)
            assert columns.abs() < 0.999, "all columns of a B are the same: draw B as a whole"


def test_random_writer_has_no_favourite_direction(answer):
    adapter, generator = writer(), seeded(0)
    names = list(adapter.B)
    draws = [answer.random_writer(adapter, generator)[len(names):] for _ in range(500)]
    assert not close(draws[0][0], draws[1][0], 1e-6), (
        "two draws from one generator are the same: pass the generator on, and do not seed it")
    for i, name in enumerate(names):
        x = torch.stack([draw[i].flatten() for draw in draws])
        x = x * x.size(1) ** 0.5 / x[0].norm()  # every number is 1 in size, root mean square
        assert x.mean(0).abs().max() < 0.3, (
            "the directions have a favourite side: randn is symmetric around 0, rand is not; and "
            "nothing of B itself may be left in it")
        check(x.square().mean(0), torch.ones(x.size(1)), {},
              "not equally large in every direction: Gaussian numbers, all of one size", 0.4)
        unit = torch.nn.functional.normalize(adapter.B[name].detach().flatten(), dim=0)
        assert (x @ unit).square().mean() > 0.5, (
            "nothing points along B: draw without looking at it, every direction is as likely")
        kurtosis = x.pow(4).mean().item()
        assert kurtosis > 2.3, "the directions are not those of Gaussian numbers: torch.randn"
    a, b = (torch.stack([draw[i].flatten()[0] for draw in draws]) for i in (0, 2))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.25, (
        "two modules got the same random numbers: draw anew for each")


def test_random_writer_leaves_the_adapter_alone(answer):
    adapter = writer()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = answer.random_writer(adapter, seeded(3))
    assert torch.equal(torch.get_rng_state(), state), (
        "the global generator was used: pass generator=generator")
    assert all(p.requires_grad for p in adapter.parameters()), (
        "the adapter can be trained no more: .detach() gives a plain tensor, requires_grad_(False) "
        "changes the parameter itself")
    assert not any(x.requires_grad for x in first), (
        "a gradient would flow to the adapter: detach A and the norm of B")
    assert all(map(torch.equal, first, answer.random_writer(adapter, seeded(3)))), (
        "the same generator must give the same control")
    for table in (adapter.A, adapter.B):
        for parameter in table.values():
            parameter.data = parameter.data.double()
    assert all(x.dtype == torch.float64 for x in answer.random_writer(adapter, seeded(3))), (
        "the control must have the adapter's dtype: .to(B)")


def test_random_writer_moves_other_texts_less_than_general(answer):
    """The experiment: at one norm, general moves chat's predictions more than chance does."""
    run, pair, _ = small()
    general = pair["general"]
    other = chat_examples(run.tokenizer, advice(run, run.splits.probe, True, 0)[:60])
    norm = [general.effective_norm()]
    own, = significance(run.model, general, other.ids, other.mask, norm)
    generator, chance = seeded(0), []
    for _ in range(4):
        with replaced(general, answer.random_writer(general, generator)):
            chance += significance(run.model, general, other.ids, other.mask, norm)
    assert sum(chance) / 4 < own / 2, (
        f"general moves predictions by {own:.3f} nats a token, your controls by {chance}; chance "
        "should move them far less")
    assert min(chance) > 1e-4, f"the control does nothing at all: {chance} nats a token"


# --- hessian_vector_product -----------------------------------------------------------------------


def curved(seed, double=True):
    """A loss that bends, its parameters of several shapes, its gradient, its Hessian (n, n)."""
    generator = seeded(seed)
    dtype = torch.float64 if double else torch.float32
    shapes = ((3, 2), (2, 4), (5,))[seed % 2 :]
    parameters = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    n = sum(p.numel() for p in parameters)
    mix = torch.randn(6, n, generator=generator).to(dtype)

    def loss_of(flat):
        z = mix @ flat
        return (z.tanh() * z.roll(1)).sum() + (0.1 * z).pow(4).sum() + z.sin().prod()

    loss = loss_of(torch.cat([p.flatten() for p in parameters]))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters,
                                                                    create_graph=True)])
    hessian = torch.autograd.functional.hessian(
        loss_of, torch.cat([p.detach().flatten() for p in parameters]))
    return parameters, gradient, hessian


def product(answer, *arguments):
    try:
        found = answer.hessian_vector_product(*arguments)
    except RuntimeError as error:
        if isinstance(error, NotImplementedError):
            raise
        raise AssertionError(
            f"autograd says: {str(error)[:150]}... The gradient is still attached to its graph: "
            "differentiate it by the parameters once more; do not detach it, do not differentiate "
            "v, and mind that a vector is no scalar: give v as well") from error
    assert isinstance(found, torch.Tensor), (
        "one flat tensor (n) back: flatten what autograd.grad gives, and torch.cat it")
    return found


def test_hessian_vector_product_differentiates_once(answer):
    for n in (10, 3000):  # the first one only to warm up
        p = torch.randn(n, generator=seeded(0)).requires_grad_()
        gradient, = torch.autograd.grad(p.sin().sum(), p, create_graph=True)
        begun = time.process_time()
        product(answer, gradient, [p], torch.ones(n))
    assert time.process_time() - begun < 0.1, (
        "H is built, row by row: differentiating gradient . v once is enough")


def test_hessian_vector_product_is_h_times_v(answer):
    for seed in range(4):
        parameters, gradient, H = curved(seed)
        v = 2 * torch.randn(len(gradient), generator=seeded(9 + seed)).double()
        g, want = gradient.detach(), H @ v
        kept = v.clone()
        flipped = torch.cat([x.flatten() for x in reversed(want.split(
            [p.numel() for p in parameters]))])
        found = product(answer, gradient, parameters, v)
        assert torch.equal(v, kept), "v was changed in place"
        assert found.dtype == v.dtype, f"float64 goes in, {found.dtype} comes out"
        check(found, want, {
            "v is not used: that is H times a vector of ones": H.sum(1),
            "that is the gradient itself: differentiate it once more": g,
            "that is the gradient times v: differentiate it by the parameters": g * v,
            "that is the gradient's part along v: differentiate it": (g @ v) * v,
            "gradient times gradient is not the Hessian: differentiate twice": (g @ v) * g,
            "only the diagonal of H is used": H.diagonal() * v,
            "v was normalised: H v of the v that is given": want / v.norm(),
            "the answer was normalised: H v itself": want / want.norm(),
            "that is v . H v, a number: H v itself": v @ want,
            "v . H v / |v|^2 v? H v itself": (v @ want) / (v @ v) * v,
            "the sign is wrong": -want,
            "twice too large": 2 * want,
            "half of it is missing": want / 2,
            "that is the mean over the elements: gradient . v is a sum": want / len(v),
            "H was applied twice": H @ want,
            "v was added or taken away: H v alone": want + v,
            "the parameters are in reverse order": flipped,
            "v was replaced by its sign": H @ v.sign(),
            "v was replaced by its absolute value": H @ v.abs(),
            "v was squared: is v in it twice?": H @ (v * v),
            "v was turned around": H @ v.flip(0),
        }, "not the Hessian times v: differentiate gradient . v by the parameters", 1e-6)


def test_hessian_vector_product_can_be_asked_again(answer):
    parameters, gradient, H = curved(0)
    a, b = torch.randn(2, len(gradient), generator=seeded(1)).double()
    product(answer, gradient, parameters, a)
    try:
        second = answer.hessian_vector_product(gradient, parameters, b)
    except RuntimeError as error:
        raise AssertionError("the second call fails, the graph is gone: retain_graph=True"
                             ) from error
    check(second, H @ b, {"the second call gives the sum of both: does .grad pile up?":
                          H @ (a + b)}, "the second call is wrong")
    check(product(answer, gradient, parameters, torch.zeros_like(a)), 0 * a, {},
          "H times zero is zero; is something divided by |v|?")


def test_hessian_vector_product_changes_nothing(answer):
    parameters, gradient, _ = curved(1)
    v = torch.randn(len(gradient), generator=seeded(1)).double()
    kept = [p.detach().clone() for p in parameters], v.clone(), gradient.detach().clone()
    product(answer, gradient, parameters, v)
    assert torch.equal(v, kept[1]), "v was changed in place"
    assert not v.requires_grad, "v is a constant: do not set requires_grad on it"
    assert torch.equal(gradient, kept[2]), "the gradient was changed in place"
    assert all(torch.equal(p, before) for p, before in zip(parameters, kept[0])), (
        "the parameters were changed")
    assert all(p.grad is None for p in parameters), (
        "the parameters' .grad was filled: use torch.autograd.grad, not backward()")
    parameters, gradient, H = curved(0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    v = torch.randn(len(gradient), generator=seeded(1)).double()
    check(product(answer, gradient, parameters, v), H @ v, {}, "what stands in .grad is counted "
          "in: use torch.autograd.grad, not backward()", 1e-6)
    assert all(p.grad is not None and (p.grad == 1).all() for p in parameters), (
        "the parameters' .grad was changed: use torch.autograd.grad, not backward()")


def test_hessian_vector_product_of_odd_layouts(answer):
    parameters, gradient, H = curved(2, double=False)
    v = torch.randn(len(gradient), 2, generator=seeded(3))[:, 0]  # not contiguous
    found = product(answer, gradient, parameters, v)
    assert found.dtype == torch.float32, f"float32 goes in, {found.dtype} comes out"
    check(found, H @ v, {}, "wrong for float32 and a v that is not contiguous", 1e-3)
    check(product(answer, gradient, tuple(parameters), v), H @ v, {},
          "wrong when the parameters are a tuple", 1e-3)


def test_hessian_vector_product_measures_the_valley(answer):
    """The experiment: power iteration with your product, on general and on narrow."""
    run, pair, examples = small()
    top = {}
    for name, adapter in pair.items():
        parameters = adapter.parameters()
        with adapter, sdpa_kernel(SDPBackend.MATH):
            some = examples[:20]
            loss = sft_loss(run.model(some.ids), some.ids, some.answer_mask)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(
                loss, parameters, create_graph=True)])
            v = torch.randn(gradient.shape, generator=seeded(0))
            for _ in range(8):
                v = v / v.norm()
                Hv = product(answer, gradient, parameters, v).detach()  # or graphs pile up
                v, top[name] = Hv, (v @ Hv).item()
    assert 0 < 1.3 * top["general"] < top["narrow"], (
        f"largest eigenvalues {top}: narrow's valley should be steeper than general's")
