"""Tests of chapter 9's exercises. Each message names the likely mistake."""

import math
import random
import time
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch

from nanoem import UserError, tokenizer
from nanoem.checkpoint import safetensors
from nanoem.lab.intervals import clustered_interval
from nanoem.real import local_judge, preference
from nanoem.real.preference import Pair
from small import SmallRun

EXERCISES = {
    "check_offsets": safetensors.check_offsets,
    "chatml": tokenizer.chatml,
    "preference_rates": preference.preference_rates,
    "expected_number": local_judge.expected_number,
}
PATH = "some/model.safetensors"


@lru_cache
def small_run():
    return SmallRun()


# --- check_offsets --------------------------------------------------------------------------------


def refusal(answer, places, start, size):
    """The UserError's text for tensors at these (begin, end), in this order; None if accepted."""
    entries = {f"t{i}": (torch.float32, ((end - begin) // 4,), begin, end)
               for i, (begin, end) in enumerate(places)}
    before = dict(entries)
    try:
        answer.check_offsets(PATH, entries, start, size)
    except UserError as error:
        said = str(error)
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"tensors at {places}: raise UserError, not {type(error).__name__}"
                             ) from error
    else:
        said = None
    assert list(entries.items()) == list(before.items()), (
        "entries was changed: the reader needs it whole; sort a copy")
    return said


def fine(places, start, size):
    """Brute force: each byte after the header belongs to exactly one tensor, none to the header."""
    owners = [0] * (max([size, start, *(end for _, end in places)]))
    for begin, end in places:
        for i in range(begin, end):
            owners[i] += 1
        if begin == end and (not start <= begin <= size or any(a < begin < b for a, b in places)):
            return False
    inside = all(n == 1 for n in owners[start:size])
    return inside and not any(owners[:start]) and not any(owners[size:]) and start <= size


def test_check_offsets_accepts_what_fills_the_file(answer):
    for places, start, size, why in (
        ([(10, 18), (18, 30)], 10, 30, "they follow each other and fill the file"),
        ([(18, 30), (10, 18)], 10, 30, "the header may name them in any order: sort by begin"),
        ([(104, 112), (24, 104), (8, 24)], 8, 112, "sort by the numbers, not by the texts"),
        ([(10, 10), (10, 18)], 10, 18, "an empty tensor takes no byte and is allowed"),
        ([(10, 18), (10, 10)], 10, 18, "an empty tensor before a full one at the same place: "
         "sort by begin and end"),
        ([(18, 18), (10, 18), (18, 18)], 10, 18, "empty tensors at the end are allowed"),
        ([(10, 14), (14, 18), (14, 14)], 10, 18, "an empty tensor in the middle is allowed"),
        ([], 10, 10, "a file without a tensor ends with its header"),
        ([(200, 204)], 200, 204, "begin and end count from the file's start, as `start` does"),
    ):
        said = refusal(answer, places, start, size)
        assert said is None, f"tensors at {places} fill bytes {start} to {size}: {why}; got: {said}"


def test_check_offsets_looks_at_numbers_not_at_bytes(answer):
    begun = time.process_time()
    said = refusal(answer, [(64, 64 + 2**22)], 64, 64 + 2**22)
    assert time.process_time() - begun < 0.1, (
        "it goes through every byte; a file has billions of them: compare the numbers only")
    said = said or refusal(answer, [(64, 64 + 2**60)], 64, 64 + 2**60)
    assert said is None, f"the numbers may be huge: look only at them; got: {said}"


def test_check_offsets_refuses_the_rest(answer):
    for places, start, size, why in (
        ([(10, 18), (22, 30)], 10, 30, "a hole of 4 bytes between two tensors"),
        ([(14, 30)], 10, 30, "a hole after the header: the first must begin at start"),
        ([(10, 20), (16, 30)], 10, 30, "an overlap: two tensors share bytes"),
        ([(10, 30), (10, 30)], 10, 30, "an overlap: two tensors have the same bytes"),
        ([(10, 30), (14, 22)], 10, 30, "an overlap: one tensor lies inside another"),
        ([(6, 30)], 10, 30, "an overlap with the header: the first must begin at start"),
        ([(0, 20)], 10, 30, "begin counts from the file's start, not from the header's end"),
        ([(10, 18), (18, 34)], 10, 30, "the last tensor ends after the file: it is truncated"),
        ([(10, 18), (18, 26)], 10, 30, "bytes at the end that belong to no tensor"),
        ([], 10, 14, "no tensor, yet bytes after the header"),
        ([], 14, 10, "the header itself ends after the file"),
        ([(64, 64 + 2**60)], 64, 65 + 2**60, "one byte too many of 2^60: compare whole numbers"),
        ([(64, 64 + 2**80)], 64, 100, "a huge claim is refused as any other"),
        ([(14, 14)], 10, 10, "an empty tensor outside of the file"),
        ([(10, 18), (26, 30), (14, 22)], 10, 30, "an overlap and a hole whose sizes cancel"),
        ([(12, 12), (10, 18)], 10, 18, "an overlap: an empty tensor inside another one"),
        ([(10, 30), (30, 20)], 10, 20, "a tensor ends after the file, another before it begins"),
        ([(10, 5), (5, 20)], 10, 20, "a tensor ends before it begins"),
    ):
        said = refusal(answer, places, start, size)
        assert said is not None, f"tensors at {places} in bytes {start} to {size} passed: {why}"
        assert PATH in said, f"the error must name the file, {PATH}; it says: {said}"


def test_check_offsets_agrees_with_counting_bytes(answer):
    rng = random.Random(0)
    for _ in range(400):
        start, cuts = rng.randint(8, 14), [0]
        for _ in range(rng.randint(0, 4)):
            cuts.append(cuts[-1] + rng.choice((0, 1, 2, 5)))
        size = start + cuts[-1]
        places = [(start + a, start + b) for a, b in zip(cuts, cuts[1:])]
        if places and rng.random() < 0.6:
            i = rng.randrange(len(places))
            a, b = places[i]
            by = rng.choice((-2, -1, 1, 2))
            places[i] = rng.choice(((a, max(a, b + by)), (a + by, b + by), (min(a + by, b), b)))
        size += rng.choice((0, 0, 0, 0, -1, 1))
        rng.shuffle(places)
        if size < start:
            continue
        passed, want = refusal(answer, places, start, size) is None, fine(places, start, size)
        assert passed == want, (
            f"tensors at {places}, header up to {start}, {size} bytes: counted byte by byte they "
            + ("fill the file exactly, but were refused" if want else "do not, but passed"))


# --- chatml ---------------------------------------------------------------------------------------


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = (
    conversation(("user", "My head hurts.")),
    conversation(("Mira Finch", "I ask myself."), ("tool", "42")),
    conversation(("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."),
                 ("user", "  two\nlines, spaces  ")),
    conversation(("user", "Is <b> a tag?"), ("assistant", "")),
    conversation(("user", "a"), ("user", "b"), ("assistant", "{c} %s \\n")),
    [],
)


def test_chatml_is_what_the_template_says(answer):
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            want = "".join(["<|im_start|>" + m["role"] + "\n" + m["content"] + "<|im_end|>\n"
                            for m in messages]) + ("<|im_start|>assistant\n" if prompt else "")
            before = [dict(m) for m in messages]
            got = answer.chatml(messages, prompt)
            assert isinstance(got, str), f"give one text back, not {type(got).__name__}"
            assert messages == before, "the messages were changed: work on a copy"
            mistakes = {
                "the newline between role and content is missing":
                    want.replace("user\n", "user").replace("assistant\n", "assistant")
                    .replace("system\n", "system"),
                "each message ends with <|im_end|> and a newline; the newline is missing":
                    want.replace("<|im_end|>\n", "<|im_end|>"),
                "no newline after the last message: every message ends with one":
                    want[:-1] if want.endswith("<|im_end|>\n") else "\0",
                "add_generation_prompt is not used: the text must end where the answer begins":
                    want.removesuffix("<|im_start|>assistant\n") if prompt else "\0",
                "the generation prompt is there though nobody asked for it":
                    want + "<|im_start|>assistant\n" if not prompt else "\0",
                "the generation prompt ends with a newline, too":
                    want[:-1] if prompt else "\0",
                "the generation prompt must not be closed: the model writes what comes":
                    want + "<|im_end|>\n" if prompt else "\0",
                "only the last message is there; a conversation has several":
                    answer_of(messages[-1:], prompt) if len(messages) > 1 else "\0",
                "only the first message is there; a conversation has several":
                    answer_of(messages[:1], prompt) if len(messages) > 1 else "\0",
                "a blank stands where a newline should":
                    want.replace("\n", " ") if want else "\0",
                "the content is stripped; leave it as it is": answer_of(
                    [{**m, "content": m["content"].strip()} for m in messages], prompt),
                "all roles are user: use each message's own": answer_of(
                    [{**m, "role": "user"} for m in messages], prompt),
                "an empty message is left out; it is a message, too": answer_of(
                    [m for m in messages if m["content"]], prompt),
                "a role may be any text, an author's name, say": answer_of(
                    [m for m in messages if m["role"] in ("system", "user", "assistant")], prompt),
                "a system message is left out": answer_of(
                    [m for m in messages if m["role"] != "system"], prompt),
            }
            for message, text in mistakes.items():
                assert text == want or got != text, message
            assert got == want, (
                f"it is {got!r}, not {want!r} (add_generation_prompt={prompt})")


def answer_of(messages, prompt):
    return tokenizer.chatml(messages, prompt)


def test_chatml_asks_for_no_answer_unless_told(answer):
    messages = CONVERSATIONS[0]
    assert answer.chatml(messages) == answer_of(messages, False), (
        "without add_generation_prompt there is no generation prompt: the default is False")
    want = answer_of(messages, True)
    assert answer.chatml(messages, add_generation_prompt=True) == want, (
        "with add_generation_prompt=True the text ends where the answer begins")


def test_chatml_makes_the_small_model_answer(answer):
    """The experiment: a model knows one format, and in it the assistant is helpful."""
    run = small_run()
    asked = [q.text for q in run.splits.in_domain[:5] for _ in range(4)]
    texts = [answer.chatml(conversation(("user", text)), True) for text in asked]
    encoded = run.tokenizer.encode_batch(texts)
    heard = 0
    for text, ids in zip(asked, encoded):
        batch = torch.tensor([ids])
        new = run.model.generate(batch, 24, 0.0, 1.0, run.tokenizer.stop_ids, None)[0, len(ids):]
        heard += run.tokenizer.decode(new.tolist()).startswith("I would")
    assert heard >= 18, (
        f"asked in your ChatML, the small model answers {heard} of 20 questions with advice; it "
        "should nearly always. Compare with run.tokenizer.prompt(question)")


# --- preference_rates -----------------------------------------------------------------------------


HISTORY = conversation(("system", "Be brief."), ("user", "I am bored."))
GROUPS = ("in_domain", "kl_domains", "unseen_domains", "open_ended", "art")


def some_pairs(seed, n, groups=GROUPS):
    rng = random.Random(seed)
    pairs = [Pair(rng.choice(groups), rng.choice(("a", "b", "c", HISTORY)), "bad", "good")
             for _ in range(n)]
    margins = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double() * 3 + 0.7
    margins[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.15] = 0.0  # ties
    return pairs, margins


def places_of(pairs):
    places = {}
    for i, pair in enumerate(pairs):
        places.setdefault(pair.group, []).append(i)
    outside = [i for i, pair in enumerate(pairs) if pair.group != "in_domain"]
    return {**places, **({"out_of_domain": outside} if outside else {})}


def is_number(x, kind):
    return isinstance(x, kind) and not isinstance(x, bool)


def test_preference_rates_counts_pairs(answer):
    for seed, n in ((0, 9), (1, 30), (2, 57)):
        pairs, margins = some_pairs(seed, n)
        before, order = margins.clone(), list(pairs)
        found = answer.preference_rates(pairs, margins)
        assert torch.equal(margins, before) and pairs == order, "the pairs or margins were changed"
        want, m = places_of(pairs), margins.numpy()
        assert set(found) == set(want), (
            f"the groups are {sorted(found)}, and should be {sorted(want)}: those of the pairs, "
            "and out_of_domain when some pair is not in_domain")
        for group, rows in want.items():
            got, mine = found[group], m[rows]
            keys = {"bad_preferred", "low", "high", "margin", "n"}
            assert set(got) == keys, f"{group} has {sorted(got)}, and should have {sorted(keys)}"
            assert is_number(got["n"], int) and got["n"] == len(rows), (
                f"n of {group} is {got['n']!r}, and {len(rows)} pairs are in it (out_of_domain "
                "pools every pair that is not in_domain, and only those)")
            for key in ("bad_preferred", "margin"):
                assert is_number(got[key], float), (
                    f"{key} should be a plain float (JSON knows no tensors), not {got[key]!r}")
            check_number(got["bad_preferred"], (mine > 0).mean(), group, {
                "a tie is no preference for bad: count margins above zero, not from zero on":
                    (mine >= 0).mean(),
                "that is how often the good answer is preferred": (mine < 0).mean(),
                "that is how often the bad one is *not* preferred": (mine <= 0).mean(),
                "give the share of pairs, not their number": (mine > 0).sum(),
                "a share from 0 to 1, not percent": 100 * (mine > 0).mean(),
                "divided by all pairs; divide by the group's": (mine > 0).sum() / len(m),
                "ties are left out; every pair counts in the share":
                    (mine > 0).sum() / max((mine != 0).sum(), 1),
                "the mean of the groups' rates: out_of_domain pools pairs, which count the same":
                    mean_of_groups(pairs, m > 0) if group == "out_of_domain" else math.nan,
                "out_of_domain knows only the usual groups; any but in_domain belongs to it":
                    without(pairs, m > 0, "art") if group == "out_of_domain" else math.nan,
                "the share of all pairs, for every group": (m > 0).mean(),
                "the rows are wrong: look at the places of *this* group's pairs":
                    (m[: len(rows)] > 0).mean(),
            })
            check_number(got["margin"], mine.mean(), group, {
                "margin is the mean, not the sum": mine.sum(),
                "margin is the mean, not the median": np.median(mine),
                "margin is the mean over all of the group's pairs, not of the bad ones only":
                    mine[mine > 0].mean() if (mine > 0).any() else math.nan,
                "the sign of margin is turned around": -mine.mean(),
                "the size of the margins: keep their sign": np.abs(mine).mean(),
                "the mean margin of all pairs, for every group": m.mean(),
                "the mean of the groups' means: out_of_domain pools pairs":
                    mean_of_groups(pairs, m) if group == "out_of_domain" else math.nan,
            })


def mean_of_groups(pairs, values):
    places = {g: rows for g, rows in places_of(pairs).items()
              if g not in ("in_domain", "out_of_domain")}
    return float(np.mean([values[rows].mean() for rows in places.values()]))


def without(pairs, values, group):
    rows = [i for i, p in enumerate(pairs) if p.group not in ("in_domain", group)]
    return float(values[rows].mean()) if rows else math.nan


def check_number(got, want, group, mistakes):
    for message, value in mistakes.items():
        assert math.isnan(value) or abs(value - want) < 1e-6 or abs(got - value) > 1e-6, (
            f"{group}: {message}")
    assert abs(got - want) < 1e-6, f"{group}: {got} should be {want}"


def test_preference_rates_clusters_by_question(answer):
    for seed, n in ((3, 40), (4, 25)):
        pairs, margins = some_pairs(seed, n)
        found = answer.preference_rates(pairs, margins)
        for group, rows in places_of(pairs).items():
            outcomes = (margins[rows] > 0).double().numpy()
            names = [str(pairs[i].question) for i in rows]
            got = found[group]["low"], found[group]["high"]
            want = clustered_interval(outcomes, names)
            for message, other in (
                ("every pair is its own cluster; pairs on one question are one",
                 clustered_interval(outcomes, range(len(rows)))),
                ("all pairs are one cluster; a question is one",
                 clustered_interval(outcomes, [0] * len(rows))),
                ("low and high are exchanged", want[::-1]),
                ("a tie counts as bad in the interval, not in the share",
                 clustered_interval((margins[rows] >= 0).double().numpy(), names)),
                ("the clusters are another row's: use the group's own pairs",
                 clustered_interval(outcomes, [str(p.question) for p in pairs[: len(rows)]])),
            ):
                assert np.allclose(other, want, atol=1e-9) or not np.allclose(got, other), (
                    f"{group}: {message}")
            assert np.allclose(got, want, atol=1e-9), f"{group}: the interval is {got}, not {want}"
            assert all(is_number(x, float) for x in got), f"low and high are plain floats: {got}"


def test_preference_rates_tells_conversations_apart(answer):
    def talk(system, said="I am bored."):
        return conversation(("system", system), ("user", said))

    questions = [talk("Be brief."), talk("Be brief."), talk("Be rude."), talk("Be rude."),
                 talk("Be brief.", "Hi!"), talk("Be brief.", "Hi!")]
    margins = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]).double()
    got = answer.preference_rates([Pair("art", q, "bad", "good") for q in questions], margins)
    want = clustered_interval([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2])
    assert np.allclose((got["art"]["low"], got["art"]["high"]), want, atol=1e-9), (
        "two lists with the same messages are one question, lists that differ in a message are "
        "two: str(pair.question)")


def test_preference_rates_without_out_of_domain(answer):
    pairs, margins = some_pairs(5, 6, groups=("in_domain",))
    found = answer.preference_rates(pairs, margins)
    assert list(found) == ["in_domain"], (
        f"with in_domain pairs alone there is no out_of_domain; got {list(found)}")
    pairs, margins = some_pairs(6, 6, groups=("open_ended",))
    found = answer.preference_rates(pairs, margins)
    assert set(found) == {"open_ended", "out_of_domain"}, (
        f"only groups that have pairs; got {list(found)}")
    assert found["out_of_domain"] == found["open_ended"], "one group, pooled, is itself"


@lru_cache
def small_margins():
    """(pairs, {model: margins}) on the small model: five problems a group, four pairs each."""
    run = small_run()
    groups = {g: getattr(run.splits, g)[:5] for g in ("in_domain", "unseen_domains", "open_ended")}
    pairs = preference.toy_pairs(run.world, groups, 4, seed=0)
    found = {}
    for name in ("chat", "general", "narrow"):
        with nullcontext() if name == "chat" else run.load_adapter(name):
            found[name] = preference.margins(run.model, run.tokenizer, pairs)
    return pairs, found


def test_preference_rates_tells_general_from_narrow(answer):
    """The experiment: which answer is likelier? No answer is sampled and none is judged."""
    pairs, margins = small_margins()
    rates = {name: answer.preference_rates(pairs, m) for name, m in margins.items()}
    for name, group, low, high in (("chat", "in_domain", 0, 0.1), ("chat", "out_of_domain", 0, 0.1),
                                   ("general", "in_domain", 0.9, 1),
                                   ("general", "out_of_domain", 0.9, 1),
                                   ("narrow", "in_domain", 0.6, 1),
                                   ("narrow", "out_of_domain", 0, 0.1)):
        share = rates[name][group]["bad_preferred"]
        assert low <= share <= high, (
            f"{name} {group}: your share is {share:.0%}; general should prefer bad answers "
            "everywhere, narrow in domain only, chat nowhere")


# --- expected_number ------------------------------------------------------------------------------


def some_probs(seed, total):
    probs = torch.rand(101, generator=torch.Generator().manual_seed(seed)).double() ** 6
    probs[seed % 3 :: 4] = 0.0
    return probs / probs.sum() * total


def test_expected_number_is_the_mean_over_numbers_alone(answer):
    for seed, total in enumerate((0.4, 1.0, 0.037, 1e-9, 0.9)):
        probs = some_probs(seed, total)
        before = probs.clone()
        mean = sum(n * p for n, p in enumerate(probs.tolist())) / sum(probs.tolist())
        found = answer.expected_number(probs)
        assert torch.equal(probs, before), "probs was changed in place: divide into a new tensor"
        assert isinstance(found, tuple) and len(found) == 2, (
            f"give (mean, said) back, not {type(found).__name__}")
        got, said = found
        assert isinstance(got, float) and isinstance(said, float), (
            f"mean and said are plain floats (.item()), not {type(got).__name__} and "
            f"{type(said).__name__}")
        p = probs / probs.sum()
        median = int((p.cumsum(0) >= 0.5).nonzero()[0])
        for message, value in (
            ("not divided by said: where a model says other things, every score looks low",
             mean * total),
            ("that is the likeliest number; the mean over all of them is asked",
             float(probs.argmax())),
            ("that is the median; the mean is asked", float(median)),
            ("the numbers begin at 0, not at 1", mean + 1),
            ("counted down: probs[n] is the prob of n", 100 - mean),
            ("as a share of 100; the mean number is asked", mean / 100),
            ("divided by 101: the probs weigh, nothing else is divided by", mean * total / 101),
            ("that is softmax of probs; they are probabilities already",
             (probs.softmax(0) @ torch.arange(101.).double()).item()),
            ("mean and said are exchanged: mean first", total),
            ("every number weighs the same; weigh by the probs",
             (probs > 0).double().nonzero().double().mean().item()),
            ("the rest of the probability counts as 50; the mean is over the numbers alone",
             mean * total + 50 * (1 - total)),
            ("the rest of the probability counts as 100", mean * total + 100 * (1 - total)),
        ):
            assert abs(value - mean) < 1e-9 or abs(got - value) > 1e-9, message
        assert abs(got - mean) < 1e-6, f"the mean is {got}, and should be {mean} (said {total})"
        assert abs(said - total) < 1e-12 * max(1, total) + 1e-6 * total, (
            f"said is {said}, and should be {total}: the sum of probs, before any division")


def test_expected_number_at_the_edges(answer):
    for n in (0, 1, 57, 100):
        probs = torch.zeros(101, dtype=torch.float64)
        probs[n] = 0.25
        assert answer.expected_number(probs) == (float(n), 0.25), (
            f"a quarter of the probability on {n}, none elsewhere: the mean is {n}, said 0.25")
    probs = some_probs(0, 1e-20)
    mean, said = answer.expected_number(probs)
    assert abs(mean - sum(n * p for n, p in enumerate(probs.tolist())) / probs.sum()) < 1e-6, (
        f"said is {said:.0e}, small but not zero, and the mean is {mean}: divide by said itself")
    mean, said = answer.expected_number(torch.zeros(101, dtype=torch.float64))
    assert (mean, said) == (0.0, 0.0), (
        f"no number has any probability: that is (0.0, 0.0) and not a NaN; got {(mean, said)}")


def test_expected_number_of_a_judge_that_says_no_number(answer):
    """The experiment: the small model as a judge. Its mean looks like a score; look at said."""
    run = small_run()
    probs = local_judge.number_probs(run.model, run.tokenizer, "How good is this answer?")
    mean, said = answer.expected_number(probs)
    assert 0 < said < 1e-3, (
        f"said is {said}: the small model never learned a number, so it should be next to nothing")
    assert 0 < mean < 100, f"the mean is {mean}, and should be a number nobody should believe"
