"""Tests of chapter 3's exercises. Each message names the likely mistake."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compare import check
from nanoem import lora
from nanoem.lora import LoRA
from small import randn, tiny_batch, tiny_model

EXERCISES = {
    "lora_delta": lora.lora_delta,
    "effective_norm": LoRA.effective_norm,
    "merge": LoRA.merge,
}


def trained_lora(model, rank=3, alpha=5.0, use_rslora=False, seed=0):
    """A LoRA as if it had been trained, on Linears square and not; not attached."""
    generator = torch.Generator().manual_seed(seed)
    adapter = LoRA(model, [0, 1], ["self_attn.o_proj", "mlp.down_proj"], rank, alpha, use_rslora,
                   generator)
    for i, B in enumerate(adapter.B.values()):
        B.data.normal_(std=0.3 * (i + 1), generator=generator)
    return adapter


# --- 3.1 lora_delta -----------------------------------------------------------------------------


# x, A and B: (rank, in, out, alpha, and what stands before x's last axis)
DELTAS = ((4, 6, 5, 8.0, (2, 3)), (3, 3, 3, 5.0, (4,)), (1, 7, 4, 6.0, (2, 5)),
          (2, 4, 9, 0.5, ()), (5, 3, 8, 7.0, (3, 2, 2)), (4, 6, 6, -3.0, (1, 5)))


def test_lora_delta_is_that_of_the_whole_matrix(answer):
    for i, (rank, n_in, n_out, alpha, before) in enumerate(DELTAS):
        x, A, B = (randn(*shape, seed=10 * i + j) for j, shape in
                   enumerate(((*before, n_in), (rank, n_in), (n_out, rank))))
        plain = x @ (B @ A).T
        scales = {False: alpha / rank, True: alpha / rank**0.5}
        for use_rslora, scale in scales.items():
            mistakes = {
                "divide alpha by the rank" if not use_rslora else
                "with rsLoRA, divide alpha by sqrt(rank)": alpha * plain,
                "with rsLoRA divide by sqrt(rank), without it by the rank itself":
                    scales[not use_rslora] * plain,
                "alpha is missing": scale / alpha * plain,
                "the scaling alpha / rank is missing": plain,
                "multiply by alpha / rank: the division is upside down": plain / scale,
                "alpha is multiplied by the rank; divide": alpha * rank * plain,
                "the rank is the number of rows of A, not of B": plain * (
                    alpha / (n_out**0.5 if use_rslora else n_out)),
                "the rank is the number of rows of A, not its columns": plain * (
                    alpha / (n_in**0.5 if use_rslora else n_in)),
                "the scaling comes in twice": scale**2 * plain,
                "the sign is wrong": -scale * plain,
            }
            if rank == n_in == n_out:  # nothing of this mistake shows in the shapes
                mistakes |= {"A and B are swapped: A reads x first, then B writes":
                             scale * x @ B.T @ A.T,
                             "transpose A and B: a Linear computes x @ W.T": scale * x @ A @ B,
                             "transpose A too": scale * x @ A @ B.T,
                             "transpose B too": scale * x @ A.T @ B}
            try:
                got = answer.lora_delta(x.clone(), A.clone(), B.clone(), alpha, use_rslora)
            except NotImplementedError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                assert x.dim() == 3, (
                    f"x {tuple(x.shape)}: {error}. x may have any number of axes; only its last "
                    "one is read")
                raise AssertionError(f"x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}: "
                                     f"{error}. Are A and B swapped, or not transposed?") from error
            check(got, scale * plain, mistakes,
                  "not (alpha / rank) * B A x; are A and B swapped?")
    x, A, B = randn(2, 6), randn(4, 6, seed=1), randn(5, 4, seed=2)
    check(answer.lora_delta(x, A, B, 8.0), 2 * x @ A.T @ B.T, {
        "by default there is no rsLoRA: alpha / rank": 4 * x @ A.T @ B.T}, "not 8 / 4 * B A x")


def test_lora_delta_leaves_its_inputs_alone_and_trains(answer):
    x, A, B = randn(2, 3, 6), randn(4, 6, seed=1), randn(5, 4, seed=2)
    kept = [t.clone() for t in (x, A, B)]
    want = answer.lora_delta(x, A, B, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, A, B))), (
        "the inputs were changed in place; work on new tensors")
    strided = (torch.stack((t, t), -1)[..., 0] for t in (x, A, B))  # not contiguous
    check(answer.lora_delta(*strided, 3.0), want, {}, "other numbers if not contiguous")
    assert answer.lora_delta(*(t.double() for t in (x, A, B)), 3.0).dtype == torch.float64, (
        "float64 in, but not out: keep the dtype")
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    found = answer.lora_delta(*leaves, 3.0)
    assert found.requires_grad, "no gradient flows: no detach, no .data, no no_grad"
    gradients = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
    want = torch.autograd.grad((0.75 * leaves[0] @ (leaves[2] @ leaves[1]).T).square().sum(),
                               leaves)
    for name, got, expected in zip(("x", "A", "B"), gradients, want):
        assert got is not None, f"no gradient reaches {name}; is it detached?"
        check(got, expected, {}, f"the gradient of {name} is wrong; is something detached?")


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made inside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_lora_delta_goes_through_the_rank(answer):
    with Largest() as made:
        answer.lora_delta(torch.ones(2, 300), torch.ones(1, 300), torch.ones(400, 1), 1.0)
    assert made.numel < 300 * 400, (
        "the whole (out, in) matrix B A was built: that is what LoRA saves. First x @ A.T")


# --- 3.2 effective_norm -------------------------------------------------------------------------


def test_effective_norm_is_that_of_the_products(answer):
    for i, (rank, alpha, use_rslora, scale) in enumerate((
            (3, 5.0, False, 1.0), (1, 4.0, False, 1.0), (2, 7.0, True, 1.0), (3, 5.0, False, 2.5),
            (2, 3.0, False, -1.5), (4, 6.0, True, 0.5), (2, 3.0, False, 0.0))):
        adapter = trained_lora(tiny_model(n_layer=2), rank, alpha, use_rslora, seed=i)
        scaling = alpha / (rank**0.5 if use_rslora else rank)
        A, B = ([t.detach() for t in table.values()] for table in (adapter.A, adapter.B))
        norms = torch.stack([scaling * (b @ a).norm() for a, b in zip(A, B)])
        factor, n = abs(scale), len(norms)
        with adapter.scaled(scale):
            got = answer.effective_norm(adapter)
        assert isinstance(got, float), f"return a float (.item()), not {type(got).__name__}"

        def over_sites(norm):
            return factor * scaling * torch.stack([norm(a, b) for a, b in zip(A, B)]).mean()

        check(torch.tensor(got), factor * norms.mean(), {
            "that is the norm of A times the norm of B; take the norm of the product B A":
                over_sites(lambda a, b: a.norm() * b.norm()),
            "that is the norm of all of A and B together; take the norm of the product B A":
                over_sites(lambda a, b: (a.square().sum() + b.square().sum()).sqrt()),
            "that is the norm of B alone": over_sites(lambda a, b: b.norm()),
            "that is the norm of A alone": over_sites(lambda a, b: a.norm()),
            "that is the spectral norm (the largest singular value); take the Frobenius norm":
                over_sites(lambda a, b: torch.linalg.matrix_norm(b @ a, 2)),
            "that is the nuclear norm (the sum of the singular values); take the Frobenius norm":
                over_sites(lambda a, b: torch.linalg.matrix_norm(b @ a, "nuc")),
            "that is the sum of absolute values; take the Frobenius norm":
                over_sites(lambda a, b: (b @ a).abs().sum()),
            "the root is missing": over_sites(lambda a, b: scaling * (b @ a).square().sum()),
            "the scaling alpha / rank is missing": factor * norms.mean() / scaling,
            "divide alpha by the rank": factor * norms.mean() / scaling * alpha,
            "with rsLoRA divide by sqrt(rank), without it by the rank itself: use self.scaling":
                factor * norms.mean() / scaling * alpha / (rank if use_rslora else rank**0.5),
            "self.scale is missing": norms.mean(),
            "a norm is never negative: abs(self.scale)": scale * norms.mean(),
            "take the mean over the modules, not the sum": factor * norms.sum(),
            "take the mean over the modules, not the norm of all of them":
                factor * norms.norm(),
            "take the mean over the modules, not the root of the mean square":
                factor * norms.norm() / n**0.5,
            "only the first module is used": factor * norms[0],
            "only the last module is used": factor * norms[-1],
            "take the mean over the modules, not the largest": factor * norms.max(),
            "the scale comes in twice": scale**2 * norms.mean(),
            "the scaling alpha / rank comes in twice": factor * scaling * norms.mean(),
        }, "not the mean over the modules of ||scale * (alpha / rank) * B A||")


def test_effective_norm_only_looks(answer):
    model = tiny_model(n_layer=2)
    adapter = trained_lora(model)
    before = [p.detach().clone() for p in (*adapter.parameters(), *model.parameters())]
    with adapter.scaled(2.0):
        one = answer.effective_norm(adapter)
        assert adapter.scale == 2, "self.scale was changed; a norm only looks"
    now = (*adapter.parameters(), *model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, now)), "the adapter or model was changed"
    assert adapter.depth == 0, "the adapter was attached; a norm only looks"
    with adapter.scaled(2.0), adapter:
        assert answer.effective_norm(adapter) == one, "other numbers when the adapter is attached"


# --- 3.3 merge ----------------------------------------------------------------------------------


IDS, _ = tiny_batch()


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def merged_example(seed=0, rank=3, alpha=5.0, use_rslora=False, scale=1.0):
    model = tiny_model(seed, n_layer=2)
    adapter = trained_lora(model, rank, alpha, use_rslora, seed)
    adapter.scale = scale
    with adapter:
        adapted = model(IDS)
    return model, adapter, model(IDS), adapted


def test_merge_is_the_adapter(answer):
    for i, (rank, alpha, use_rslora, scale) in enumerate((
            (3, 5.0, False, 1.0), (1, 4.0, False, 1.0), (2, 7.0, True, 1.0), (3, 5.0, False, 1.7),
            (2, 3.0, False, -0.6))):
        model, adapter, base, adapted = merged_example(i, rank, alpha, use_rslora, scale)
        before = {name: linear.weight.clone() for name, linear in adapter.sites.items()}
        adapter.attach().attach().attach()
        hooks = n_hooks(model)
        try:
            answer.merge(adapter)
        except RuntimeError as error:
            if "size" in str(error):
                raise AssertionError("the change does not fit the weight, (out, in): it is B @ A "
                                     f"({error})") from error
            raise
        except ValueError as error:
            raise AssertionError("a weight is changed while gradients are on: keep the line "
                                 f"@torch.no_grad() ({error})") from error
        assert adapter.scale == scale, f"self.scale was {scale} and is {adapter.scale} afterwards"
        assert adapter.depth == 3 and n_hooks(model) == hooks, (
            "the adapter was detached: leave that to whoever attached it")
        assert not adapter.acts, "self.originals is empty, so the hooks add everything once more"
        full = scale * adapter.scaling
        for name, linear in adapter.sites.items():
            product = (adapter.B[name] @ adapter.A[name]).detach()
            check(linear.weight.detach() - before[name], full * product, {
                "the change is transposed: it is B @ A, (out, in)": full * product.T,
                f"{name}: the weight was not changed": torch.zeros_like(product),
                "the scaling alpha / rank is missing": scale * product,
                "self.scale is missing": adapter.scaling * product,
                "divide alpha by the rank: use self.scaling": scale * alpha * product,
                "with rsLoRA the scaling is alpha / sqrt(rank): use self.scaling":
                    scale * alpha / rank * product,
                "the sign is wrong: add it": -full * product,
                "it was added twice": 2 * full * product,
                "the weight was replaced by the change; add to it": full * product - before[name],
                "the scale comes in twice": scale * full * product,
            }, f"{name}: the weight is not W + scale * (alpha / rank) * B A")
        check(model(IDS), adapted, {"the model is as it was before": base},
              "the merged model is not the adapted one", 1e-3)
    assert model.layers[0].mlp.up_proj.weight.equal(
        tiny_model(i, n_layer=2).layers[0].mlp.up_proj.weight), "another weight was changed too"


def test_merge_twice_is_once(answer):
    model, adapter, _, adapted = merged_example()
    answer.merge(adapter)
    weights = [linear.weight.clone() for linear in adapter.sites.values()]
    originals = {name: w.clone() for name, w in adapter.originals.items()}
    assert originals, "self.originals is empty: nobody can know that the LoRA is merged"
    answer.merge(adapter)
    assert all(torch.equal(a, linear.weight) for a, linear in zip(weights, adapter.sites.values())
               ), "merging twice adds twice: while self.originals is not empty, do nothing"
    assert all(torch.equal(w, adapter.originals[n]) for n, w in originals.items()), (
        "the second merge has overwritten self.originals with merged weights")


def test_merge_can_be_undone_to_the_last_bit(answer):
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter, base, adapted = merged_example()
        model.to(dtype)
        parameters = {name: p for name, p in model.named_parameters()}
        before = {name: p.clone() for name, p in parameters.items()}
        answer.merge(adapter)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype, f"a weight of {dtype} became {parameter.dtype}"
            assert parameter is parameters[name], (
                "linear.weight is another object now; change the parameter in place")
            assert parameter.grad_fn is None and not parameter.requires_grad, (
                "a merged weight carries a graph: keep the line @torch.no_grad()")
        for name, linear in adapter.sites.items():
            original = adapter.originals.get(name)
            assert original is not None, f"self.originals has no '{name}'"
            assert not torch.equal(original, linear.weight), (
                "self.originals holds the merged weight itself: clone() it before you add")
        adapter.unmerge()
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), (
            "unmerge did not give the weights back to the last bit: keep a clone of the weight, "
            "do not subtract")
        assert adapter.scale == 1, "self.scale was changed"
        answer.merge(adapter)
        assert adapter.originals, "after unmerge, merging works again"
        assert not torch.equal(before["layers.0.mlp.down_proj.weight"],
                               model.layers[0].mlp.down_proj.weight), (
            "after unmerge, merging works again")


def test_merge_keeps_trainable_weights_trainable(answer):
    model = tiny_model(n_layer=2).requires_grad_(True)
    adapter = trained_lora(model)
    A = {name: A.detach().clone() for name, A in adapter.A.items()}
    with torch.enable_grad():
        try:
            answer.merge(adapter)
        except RuntimeError as error:
            raise AssertionError(f"a trainable weight is changed in place: keep the line "
                                 f"@torch.no_grad() ({error})") from error
    weight = model.layers[0].mlp.down_proj.weight
    assert weight.requires_grad and weight.is_leaf, "the weight can no longer be trained"
    assert all(w.grad_fn is None for w in adapter.originals.values()), (
        "self.originals carries a graph: keep the line @torch.no_grad()")
    assert all(torch.equal(A[n], adapter.A[n]) for n in A), "A and B stay as they are"
