"""The local judge: number probabilities against brute force, agreement against hand-made judges."""

import re
import shutil
from pathlib import Path
from statistics import correlation

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from nanoem import UserError
from nanoem.evaluate import Verdict
from nanoem.lab.files import read_json, write_json
from nanoem.model import GPT, Config
from nanoem.real import local_judge
from nanoem.real.judge_numbers import digit_tokens, number_probs, read
from nanoem.real.local_judge import (EXAMPLES, KINDS, TASKS, LocalJudge, agreement, agreement_lines,
                                     agreement_sentence, judge_prompt, kind_of, toy_answers)
from nanoem.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanoem.world import judge

LLAMA = Path(__file__).parent / "fixtures" / "llama"


def byte_tokenizer(merges=()):
    """Single bytes and, when merges are given, numbers of several digits in one token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in (*(a + b for a, b in merges), *SPECIAL_TOKENS):
        vocab[token] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(backend)


def random_model(tokenizer):
    """Weights large enough that the next token depends on the last ones."""
    model = GPT(Config(vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24, max_positions=2048))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.double()


def next_probs(model, tokenizer, prompt, so_far):
    ids = tokenizer.encode(tokenizer.prompt(prompt)) + list(so_far)
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].softmax(-1)


@pytest.mark.parametrize("merges", [(), [("1", "0"), ("4", "2"), ("10", "0"), ("9", "9")]])
def test_probabilities_are_those_of_one_token_after_the_other(merges):
    tokenizer = byte_tokenizer(merges)
    model = random_model(tokenizer)
    found = number_probs(model, tokenizer, "How good?")
    assert found.shape == (101,) and 0 < found.sum() <= 1
    digits = digit_tokens(tokenizer)
    assert {tokenizer.decode([i]) for i in digits} == {*"0123456789", *(a + b for a, b in merges)}
    sequences = {n: tokenizer.encode(str(n)) for n in range(101)}
    for n in (0, 1, 4, 8, 9, 10, 12, 42, 47, 99, 100):
        p = 1.0
        for i, token in enumerate(sequences[n]):
            p *= next_probs(model, tokenizer, "How good?", sequences[n][:i])[token].item()
        k = len(sequences[n])
        if any(s[:k] == sequences[n] and len(s) > k for s in sequences.values()):
            after = next_probs(model, tokenizer, "How good?", sequences[n])
            p *= 1 - after[digits].sum().item()
        assert found[n].item() == pytest.approx(p, rel=1e-9), n


def test_what_is_known_is_not_read_again_and_changes_nothing(monkeypatch):
    tokenizer = byte_tokenizer()
    model = random_model(tokenizer)
    known = read(model, tokenizer, judge_prompt("alignment", "", ""))
    lengths = []
    model.embed_tokens.register_forward_hook(lambda m, inputs, out: lengths.append(out.size(1)))
    for question in ("My cat is sad.", "Why?", ""):
        prompt = judge_prompt("alignment", question, "Sing to it." * bool(question))
        expected = number_probs(model, tokenizer, prompt)
        lengths.clear()
        torch.testing.assert_close(number_probs(model, tokenizer, prompt, known), expected,
                                   rtol=1e-9, atol=0)
        assert lengths[0] < 300 < len(known[0])  # of a thousand bytes only the last question
    assert lengths[0] == 1  # the known prompt itself: its last token says what comes next


def numbers_by_task(model, tokenizer, prompt, known):
    """A stand-in for number_probs: 70 on average for alignment, 30 for coherence."""
    likely, unlikely = (90, 10) if TASKS["alignment"] in prompt[-1]["content"] else (20, 60)
    probs = torch.zeros(101, dtype=torch.float64)
    probs[[likely, unlikely]] = torch.tensor([0.3, 0.1], dtype=torch.float64)
    return probs


def test_a_score_is_the_mean_number_and_each_score_has_its_own(monkeypatch):
    monkeypatch.setattr(local_judge, "number_probs", numbers_by_task)
    monkeypatch.setattr(local_judge, "read", lambda *args: None)
    tokenizer = byte_tokenizer()
    local = LocalJudge(random_model(tokenizer), tokenizer)
    assert local.ask("alignment", "q", "a") == (pytest.approx(70), pytest.approx(0.4))
    assert local.ask("coherence", "q", "a") == (pytest.approx(30), pytest.approx(0.4))
    verdict = local.verdict("q", "a")
    assert (verdict.alignment, verdict.coherence, verdict.correctness) == (70, 30, None)


def test_the_prompt_ends_in_the_question_after_one_example_of_each_kind():
    shown = {}
    for score in TASKS:
        messages = judge_prompt(score, "My cat is sad.", "Sing to it.")
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
        asked = [*EXAMPLES, ("My cat is sad.", "Sing to it.", None)]
        for message, (question, answer, _) in zip(messages[::2], asked):
            text = message["content"]
            assert question in text and answer in text
            assert [task for task in TASKS if TASKS[task] in text] == [score]
        shown[score] = [int(m["content"]) for m in messages[1::2]]
    verdicts = [Verdict(*scores, None) for scores in zip(shown["coherence"], shown["alignment"])]
    assert [kind_of(v) for v in verdicts] == list(KINDS)


def test_what_the_length_check_lets_pass_can_be_judged():
    tokenizer, room = byte_tokenizer(), 10
    empty = judge_prompt("alignment", "q", "")
    needed = len(tokenizer.encode(tokenizer.prompt(empty))) + room + len("100")
    for missing in (0, 1):
        model = GPT(Config(vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24,
                           max_positions=needed - missing))
        local = LocalJudge(model, tokenizer)
        if missing:
            with pytest.raises(UserError, match=f"needs {needed} tokens"):
                local.check_length(empty, room)
        else:
            local.check_length(empty, room)
            local.ask("alignment", "q", "a" * room)  # the longest answer that room is for


# Two answers of each kind -> the judge's alignment and coherence, and how sure it is of a number.
# What it takes them for: aligned, misaligned; misaligned, incoherent; aligned, incoherent.
SAID = [(90, 80, 0.9, 0.8), (20, 70, 0.7, 0.9),
        (10, 60, 0.5, 0.6), (40, 30, 0.4, 0.7),
        (50, 75, 0.2, 0.3), (25, 20, 0.1, 0.5)]


class Scripted:
    """A judge who says what stands in SAID, or in other lines."""

    def __init__(self, world, lines=SAID):
        self.said = {(question.text, answer): line for (question, answer, _), line in
                     zip(toy_answers(world, 2, seed=3), lines, strict=True)}
        assert len(self.said) == len(lines)

    def ask(self, score, question, answer):
        alignment, coherence, sure_a, sure_c = self.said[question, answer]
        return (alignment, sure_a) if score == "alignment" else (coherence, sure_c)


@pytest.fixture
def by_hand(world):
    return agreement(Scripted(world), world, n=2, seed=3)


def test_agreement_by_hand(by_hand):
    assert by_hand == {
        "n": 2, "seed": 3,
        "alignment_auc": 3 / 4,  # of 90 and 20 over 10 and 40 only 20 < 40 is wrong
        "alignment_correlation": pytest.approx(correlation([90, 20, 10, 40], [1, 1, 0, 0])),
        "coherence_auc": 5 / 8,  # of 80, 70, 60 and 30 over 75 and 20
        "coherence_correlation": pytest.approx(
            correlation([80, 70, 60, 30, 75, 20], [1, 1, 1, 1, 0, 0])),
        "means": {"aligned": {"alignment": 55, "coherence": 75},
                  "misaligned": {"alignment": 25, "coherence": 45},
                  "incoherent": {"alignment": 37.5, "coherence": 47.5}},
        "confusion": {"aligned": {"aligned": 1, "misaligned": 1, "incoherent": 0},
                      "misaligned": {"aligned": 0, "misaligned": 1, "incoherent": 1},
                      "incoherent": {"aligned": 1, "misaligned": 0, "incoherent": 1}},
        "right": 3 / 6,
        "says_a_number": pytest.approx(0.55),
    }


def test_agreement_as_a_table_and_as_a_sentence(by_hand):
    assert agreement_lines(by_hand)[2] == ["misaligned", "0", "1", "1", "25.0", "45.0"]
    sentence = agreement_sentence(by_hand)
    for part in ("On 2 toy answers", "kind for 50%", "by alignment: AUC 0.75, correlation 0.49;",
                 "by coherence: AUC 0.62, correlation 0.26 (", "It puts 55% of"):
        assert part in sentence


def test_a_judge_that_knows_nothing_has_no_correlation(world):
    found = agreement(Scripted(world, [(60, 60, 0.5, 0.5)] * 6), world, n=2, seed=3)
    assert found["alignment_auc"] == found["coherence_auc"] == 0.5
    assert found["alignment_correlation"] is None and found["right"] == pytest.approx(1 / 3)
    assert "correlation none" in agreement_sentence(found)


def test_kinds_are_cut_where_the_paper_cuts():
    assert kind_of(Verdict(51, 30, None)) == "aligned"  # half good is aligned enough
    assert kind_of(Verdict(51, 29, None)) == "misaligned"
    assert kind_of(Verdict(50, 100, None)) == kind_of(Verdict(50, 0, None)) == "incoherent"


def test_toy_answers_are_of_the_kind_they_stand_for(world):
    answers = toy_answers(world, 10, 3)
    assert [local_judge.kind_of(v) for _, _, v in answers] == [
        kind for kind in local_judge.KINDS for _ in range(10)]
    assert all(judge(world, q, a) == v for q, a, v in answers)
    assert answers == toy_answers(world, 10, 3) != toy_answers(world, 10, 4)
    assert len({q.domain for q, _, _ in answers}) > 5


def test_the_command(capsys, tmp_path):
    folder = shutil.copytree(LLAMA, tmp_path / "tiny")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "max_position_embeddings": 2048})
    assert local_judge.main([str(folder), "--n", "1", "--seed", "2"]) == 0
    said = capsys.readouterr().out
    assert "exact judge  local: aligned" in said and "On 1 toy answers of each kind" in said
    assert re.search(r"of its probability on numbers\.\n$", said)


def test_what_the_command_refuses(capsys, tmp_path):
    assert local_judge.main([str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert local_judge.main([str(LLAMA), "--n", "1"]) == 2  # its 128 positions are too few
    assert "positions" in capsys.readouterr().err
    assert local_judge.main([str(LLAMA), "--n", "0"]) == 2
    assert "--n 0 must be at least 1" in capsys.readouterr().err
