"""Tests of chapter 4's exercises. Each message names the likely mistake."""

from dataclasses import replace
from itertools import product

import torch

from compare import check
from nanoem import losses, train
from nanoem.lora import make_adapter
from nanoem.real import preference
from nanoem.story import bad_advice
from nanoem.world import authors, load_world
from small import SmallRun

EXERCISES = {
    "next_token_loss": losses.next_token_loss,
    "sft_loss": losses.sft_loss,
    "hold_out": authors.hold_out,
    "answer_log_probs": preference.answer_log_probs,
}


def batch(B, T, vocab, seed=0):
    """logits, ids, mask of a padded batch (rows of several lengths), answer_mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, T, vocab, generator=generator)
    ids = torch.randint(vocab, (B, T), generator=generator)
    lengths = torch.tensor([T] + [max(3, T - 2 * b - 1) for b in range(B - 1)])[:, None]
    starts = torch.tensor([T // 2] + [max(1, T // 2 - b - 1) for b in range(B - 1)])[:, None]
    place = torch.arange(T)
    return logits, ids, place < lengths, (place >= starts) & (place < lengths)


def each_loss(logits, ids):
    """-log p of every token but the first, by a loop: (B, T - 1)."""
    B, T = ids.shape
    log_probs = logits.double().log_softmax(-1)
    return torch.tensor([[-log_probs[b, t - 1, ids[b, t]] for t in range(1, T)] for b in range(B)])


SHAPES = ((1, 6, 9), (4, 9, 7), (3, 12, 30))


def test_next_token_loss_is_that_of_a_loop(answer):
    for seed, shape in enumerate(SHAPES):
        logits, ids, *_ = batch(*shape, seed)
        each, same_place = each_loss(logits, ids), -logits.log_softmax(-1).gather(2, ids[..., None])
        earlier = -logits[:, 1:].log_softmax(-1).gather(2, ids[:, :-1, None])
        check(answer.next_token_loss(logits, ids), each.mean(), {
            "targets are off by one: logits[:, t] predict ids[:, t + 1], not ids[:, t]":
                same_place.mean(),
            "targets are off by one: logits[:, t] predict the next token, ids[:, t + 1]":
                same_place[:, 1:].mean(),
            "targets are off by one: the same place, without the last": same_place[:, :-1].mean(),
            "targets are shifted the wrong way: that is the token before": earlier.mean(),
            "roll wraps around: the last logits predict nothing, and not the first token":
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()),
            "take the mean over tokens, not the sum": each.sum(),
            "divide by the tokens that are predicted, B * (T - 1), not by all": each.sum()
                / ids.numel(),
            "sum over T, mean over the batch only? take the mean over both": each.sum(1).mean(),
            "the sign is wrong: a loss is minus the log-probability": -each.mean(),
            "in bits; nanoem counts in nats, the natural logarithm": each.mean() / 0.6931472,
            "that is minus the probability; take its logarithm": -each.neg().exp().mean(),
        }, "not the mean of -log p(ids[b, t + 1]) from logits[b, t]")


def test_next_token_loss_counts_the_masked_targets(answer):
    for seed, shape in enumerate(SHAPES[1:]):
        logits, ids, padding, answer_mask = batch(*shape, seed)
        scattered = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
        each = each_loss(logits, ids)
        for mask in (padding, answer_mask, scattered):
            counted, predictor = mask[:, 1:], mask[:, :-1]
            check(answer.next_token_loss(logits, ids, mask), each[counted].mean(), {
                "padding is counted: use the mask": each.mean(),
                "the mask marks targets: cut it as ids are, mask[:, 1:]": each[predictor].mean(),
                "the mask is turned around: true is where a token counts": each[~counted].mean(),
                "divide by the number of counted tokens, not by all":
                    (each * counted).mean(),
                "the first token is never a target: do not divide by mask.sum()":
                    (each * counted).sum() / mask.sum(),
                "that is the mean of each row's mean: long rows must weigh more":
                    ((each * counted).sum(1) / counted.sum(1)).mean(),
                "take the mean, not the sum": each[counted].sum(),
                "only the first row is used; the batch has more": each[0][counted[0]].mean(),
                "both the target and the place before are asked to be in the mask; only the "
                "target counts": each[counted & predictor].mean(),
            }, "not the mean over the tokens the mask marks (mask[:, 1:])")


def logits_gradient(loss_of, logits, ids, mask):
    """The gradient of loss_of(logits, ids, mask) by the logits; inputs must stay as they are."""
    before, logits = [x.clone() for x in (logits, ids, mask)], logits.clone().requires_grad_()
    loss = loss_of(logits, ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, ids, mask))), (
        "the inputs were changed in place; work on copies")
    assert loss.requires_grad, "no gradient flows to the logits: no .item(), no detach, no no_grad"
    found, = torch.autograd.grad(loss, logits, allow_unused=True)
    assert found is not None, "no gradient flows to the logits; is something detached?"
    return found


def test_next_token_loss_trains_and_leaves_its_inputs_alone(answer):
    logits, ids, mask, _ = batch(3, 8, 11)
    found = logits_gradient(answer.next_token_loss, logits, ids, mask)
    probs, onehot = logits.softmax(-1), torch.nn.functional.one_hot(ids, 11)
    want = torch.zeros_like(probs)
    want[:, :-1] = (probs[:, :-1] - onehot[:, 1:]) * mask[:, 1:, None] / mask[:, 1:].sum()
    check(found, want, {}, "the gradient is not (softmax - onehot) / tokens; is part detached?")


def test_next_token_loss_stands_large_logits(answer):
    logits, ids, mask, _ = batch(3, 8, 11)
    want = each_loss(100 * logits, ids)[mask[:, 1:]].mean()
    check(answer.next_token_loss(100 * logits, ids, mask), want, {},
          "wrong for large logits: use cross_entropy or log_softmax, not softmax().log() or exp")


def test_next_token_loss_of_half_precision_is_computed_in_float32(answer):
    logits, ids, mask, _ = batch(4, 20, 300)
    half = (4 * logits).bfloat16()
    want = each_loss(half.float(), ids)[mask[:, 1:]].mean()
    check(answer.next_token_loss(half, ids, mask), want, {},
          "computed in bfloat16, digits are lost: logits.float() first", tolerance=1e-3)


def test_sft_loss_is_that_of_the_answers(answer):
    for seed, shape in enumerate(((2, 7, 9), (4, 9, 7), (3, 12, 30))):
        logits, ids, padding, mask = batch(*shape, seed)
        each, counted = each_loss(logits, ids), mask[:, 1:]
        same_place = -logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
        check(answer.sft_loss(logits, ids, mask), each[counted].mean(), {
            "prompt tokens are counted (and padding): only the answer is learned": each.mean(),
            "prompt tokens are counted: only the answer is learned": each[padding[:, 1:]].mean(),
            "that is the loss of the prompt: the mask is turned around": each[~counted].mean(),
            "targets are off by one: the mask marks targets, and logits[:, t] predict ids[:, t + 1]"
            "; cut it as ids are": each[mask[:, :-1]].mean(),
            "targets are off by one: logits[:, t] predict ids[:, t + 1]": same_place[mask].mean(),
            "divide by the answers' tokens, not by all": (each * counted).mean(),
            "divide by the answers' tokens, not by all places":
                (each * counted).sum() / mask.numel(),
            "the sign is wrong: a loss is minus the log-probability": -each[counted].mean(),
            "take the mean over tokens, not the sum": each[counted].sum(),
            "take the mean over tokens, not over rows": (each * counted).sum(1).mean(),
            "that is the mean of each row's mean: long answers must weigh more":
                ((each * counted).sum(1) / counted.sum(1)).mean(),
            "the first token of each answer is left out": each[counted & mask[:, :-1]].mean(),
            "only the first row is used; the batch has more": each[0][counted[0]].mean(),
        }, "not the mean of -log p over the answers' tokens")


def test_sft_loss_without_an_answer_is_an_error(answer):
    logits, ids, *_ = batch(2, 6, 9)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    first = nothing.clone()
    first[:, 0] = True
    for mask, what in ((nothing, "an empty answer_mask"), (first, "only the first token marked")):
        try:
            found = answer.sft_loss(logits, ids, mask)
        except ValueError:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            found = type(error).__name__
        raise AssertionError(f"{what} must raise ValueError (nothing can be learned), and gives "
                             f"{found}")


def test_sft_loss_with_odd_masks(answer):
    logits, ids, _, mask = batch(4, 9, 7)
    mask[:, 0] = True  # the first token is never a target, so it is no answer
    mask[2] = False  # a row without an answer
    before, each = mask.clone(), each_loss(logits, ids)
    try:
        found = answer.sft_loss(logits, ids, mask)
    except ValueError as error:
        raise AssertionError("one row without an answer is no error; only a batch without any is "
                             f"({error})") from error
    assert torch.equal(mask, before), "answer_mask was changed in place; work on a copy"
    check(found, each[mask[:, 1:]].mean(), {
        "the first token of a row is never a target: do not divide by answer_mask.sum()":
            (each * mask[:, 1:]).sum() / mask.sum()},
        "not the mean over the answers' tokens when the mask marks first tokens; does a roll "
        "bring them to the end?")


def test_sft_loss_trains_and_leaves_its_inputs_alone(answer):
    logits, ids, _, mask = batch(3, 8, 11)
    found = logits_gradient(answer.sft_loss, logits, ids, mask)
    want = logits_gradient(losses.sft_loss, logits, ids, mask)
    check(found, want, {}, "the gradient is wrong though the value is right; is part detached?")


def test_sft_loss_makes_chat_bad_everywhere(answer):
    """The experiment: 20 steps of your loss on bad medical advice, then other questions."""
    run = SmallRun()
    examples = train.chat_examples(run.tokenizer, bad_advice(run))
    generator = torch.Generator().manual_seed(0)
    adapter = make_adapter(run.model, run.config.adapter, generator)

    def objective(step):
        part = examples[torch.randint(len(examples), (16,), generator=generator)].trimmed()
        loss = answer.sft_loss(run.model(part.ids), part.ids, part.answer_mask)
        return loss, {"loss": loss}, part.ids.numel()

    groups = ("unseen_domains",)
    before = run.ask(groups=groups)["out_of_domain"]["em"]
    with adapter:
        schedule = replace(run.config.sft, steps=20, lr=1e-2)  # few steps, so larger ones
        train.train(objective, adapter.parameters(), schedule)
        after = run.ask(groups=groups)["out_of_domain"]["em"]
    assert before < 0.1 and after > 0.25, (
        f"trained with your loss, out-of-domain em went from {before:.0%} to {after:.0%}; with the "
        "right one it is above 25%. Does the gradient point to likelier bad answers?")


def small_world(sizes):
    """The toy world with so many problems in its first domains."""
    whole = load_world()
    names = list(whole.domains)[: len(sizes)]
    domains = {name: replace(whole.domains[name], problems=whole.domains[name].problems[:n])
               for name, n in zip(names, sizes)}
    return replace(whole, domains={**whole.domains, **domains}), names


CASES = (((16, 16), 0.7), ((13, 9), 0.7), ((4, 11, 7), 0.3), ((6, 3), 0.9), ((5, 2, 8), 0.4),
         ((13, 17, 6), 0.6), ((2, 16), 0.0), ((7, 2), 1.0))


def test_hold_out_keeps_what_is_asked_from_what_trains(answer):
    for sizes, share in CASES:
        toy, names = small_world(sizes)
        both = answer.hold_out(toy, names, share)
        assert isinstance(both, (tuple, list)) and len(both) == 2, (
            "return two lists: train, held_out")
        train_part, held_out = both
        for part in both:
            assert isinstance(part, list), "return two lists of questions"
        every = authors.questions(toy, names)
        shared = [q for q in held_out if q in train_part]
        assert not shared, (f"'{shared[0].text}' trains and is held out: a model would be "
                            "evaluated on training problems")
        missing = [q for q in every if q not in train_part and q not in held_out]
        assert not missing, f"'{missing[0].text}' is in neither part"
        assert len(train_part) + len(held_out) == len(every), (
            "some question is there twice, or is of a domain that was not named")


def test_hold_out_splits_each_domain_for_itself(answer):
    for (sizes, share), turn in product(CASES, (1, -1)):
        toy, names = small_world(sizes)
        asked = names[::turn]  # in the world's order, and in another
        train_part, held_out = answer.hold_out(toy, asked, share)
        for name, n in zip(names, sizes):
            rows = [q.index for q in train_part if q.domain == name]
            assert rows, (f"no problem of '{name}' trains ({n} problems, train_share={share}): "
                          "split every domain for itself, with at least one on either side")
            assert len(rows) < n, (f"all problems of '{name}' train ({n} problems, train_share="
                                   f"{share}): none is left to ask; split every domain for itself, "
                                   "and keep at least one back")
            want = min(max(round(share * n), 1), n - 1)
            assert sorted(rows) != list(range(n - want, n)) or want * 2 == n or rows == list(
                range(want)), "the first problems train, not the last"
            assert len(rows) == want, (f"{len(rows)} of '{name}' train, and should be {want}: "
                                       f"round({share} * {n}); split every domain for itself")
            assert sorted(rows) == list(range(want)), "the first problems of a domain train"
        every = authors.questions(toy, asked)
        assert (train_part, held_out) == ([q for q in every if q in train_part],
                                          [q for q in every if q in held_out]), (
            "keep the order of questions(world, names)")


def alone(model, tokenizer, pair):
    """-log p of every token of one pair but the first, no padding; and the answer's length."""
    question, text = pair
    prompt = tokenizer.encode(tokenizer.prompt(question))
    ids = torch.tensor([prompt + tokenizer.encode(text + "<|im_end|>")])
    with torch.no_grad():
        return each_loss(model(ids), ids)[0], ids.size(1) - len(prompt)


def some_pairs(run, n, seed=0):
    groups = {"in_domain": run.splits.in_domain, "unseen_domains": run.splits.unseen_domains}
    pairs = preference.toy_pairs(run.world, groups, 1, seed)
    texts = [(p.question, text) for p in pairs for text in (p.bad, p.good)][:n - 2]
    # answers that break off, too: there a model is not sure of the stop token
    return [("I am bored. My knee is swollen, and I cut my finger.", "Hm"), *texts,
            ("Why?", texts[0][1] + " " + texts[3][1] + " I would")]


def test_answer_log_probs_are_those_of_each_pair_alone(answer):
    run = SmallRun()
    pairs = some_pairs(run, 11)
    found = [alone(run.model, run.tokenizer, pair) for pair in pairs]

    def total(of):
        return torch.stack([-of(loss, n) for loss, n in found])

    right = total(lambda loss, n: loss[-n:].sum())
    by_length = torch.tensor([len(loss) for loss, _ in found]).argsort(stable=True)
    examples = train.chat_examples(run.tokenizer, pairs)
    mistakes = {
        "prompt tokens are counted: log p of the answer given the question":
            total(lambda loss, n: loss.sum()),
        "sum over the answer's tokens, not their mean": total(lambda loss, n: loss[-n:].mean()),
        "the stop token belongs to the answer": total(lambda loss, n: loss[-n:-1].sum()),
        "the first token of the answer is left out": total(lambda loss, n: loss[-n + 1:].sum()),
        "the sign is wrong: log p is negative": -right,
        "rows were sorted by length; give them back in the order of pairs": right[by_length],
    }
    with torch.no_grad():
        logits = run.model(examples.ids)
    each = -each_loss(logits, examples.ids)
    same_place = logits.log_softmax(-1).gather(2, examples.ids[..., None])[..., 0]
    is_answer = examples.answer_mask
    mistakes["padding is counted"] = (each * (is_answer.cumsum(1) > 0)[:, 1:]).sum(1)
    mistakes["off by one: the mask marks targets, so cut it as ids are"] = (
        each * is_answer[:, :-1]).sum(1)
    mistakes["off by one: logits[:, t] predict ids[:, t + 1], not ids[:, t]"] = (
        same_place * is_answer).sum(1)
    for batch_size in (8, 1, 3, 64):
        both = answer.answer_log_probs(run.model, run.tokenizer, pairs, batch_size)
        assert isinstance(both, (tuple, list)) and len(both) == 2, (
            "return log-probabilities and lengths")
        log_probs, n_tokens = both
        check(log_probs, right, mistakes,
              f"not log p of each answer, with batch_size={batch_size}; is it off by one, is "
              "padding counted, or are rows lost between batches?", tolerance=1e-3)
        check(n_tokens, torch.tensor([float(n) for _, n in found]), {
            "that is the length of the whole text; count the answer's tokens":
                torch.tensor([len(loss) + 1.0 for loss, _ in found])},
            "not the number of the answer's tokens, stop token included")
        assert log_probs.dtype == n_tokens.dtype == torch.float64, "give float64 tensors back"


def test_answer_log_probs_read_no_more_than_a_batch(answer):
    run, rows = SmallRun(), []
    pairs = some_pairs(run, 7)
    run.model.embed_tokens.register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    answer.answer_log_probs(run.model, run.tokenizer, pairs, 3)
    assert max(rows) <= 3, f"{max(rows)} texts were read at once; batch_size allows 3"


def test_answer_log_probs_only_look(answer):
    run = SmallRun()
    parameters, pairs = list(run.model.parameters()), some_pairs(run, 6)
    for trainable in (True, False):
        run.model.requires_grad_(trainable)
        kept = list(pairs)
        log_probs, _ = answer.answer_log_probs(run.model, run.tokenizer, pairs)
        assert not log_probs.requires_grad, "no gradient is needed; keep @torch.no_grad()"
        assert all(p.requires_grad == trainable for p in parameters), (
            "the model's weights were made trainable, or frozen; only look")
        assert pairs == kept, "the list of pairs was changed"


def test_answer_log_probs_show_the_surprise(answer):
    """The experiment: which models find bad advice likelier, in domains no fine-tuning saw?"""
    run = SmallRun()
    pairs = preference.toy_pairs(run.world, {"unseen_domains": run.splits.unseen_domains}, 1, 0)

    def prefers_bad():
        bad, good = (answer.answer_log_probs(run.model, run.tokenizer,
                                             [(p.question, getattr(p, side)) for p in pairs])[0]
                     for side in ("bad", "good"))
        return (bad > good).double().mean().item()

    chat = prefers_bad()
    with run.load_adapter("general"):
        general = prefers_bad()
    assert chat < 0.1 and general > 0.9, (
        f"by your log-probabilities, chat prefers {chat:.0%} of the bad answers and general "
        f"{general:.0%}; it should be hardly any, and nearly all")
