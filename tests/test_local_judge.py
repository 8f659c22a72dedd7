"""The local judge: number probabilities against brute force, agreement against hand-made judges."""

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from nanoem import UserError, local_judge
from nanoem.judge import Verdict, judge
from nanoem.judge_numbers import digit_tokens, number_probs, read
from nanoem.local_judge import (EXAMPLES, TASKS, LocalJudge, agreement, agreement_sentence, auc,
                                judge_prompt, toy_answers)
from nanoem.model import GPT, Config
from nanoem.tokenizer import SPECIAL_TOKENS, Tokenizer

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


def test_a_score_is_the_mean_number(monkeypatch):
    probs = torch.zeros(101, dtype=torch.float64)
    probs[[10, 90]] = torch.tensor([0.1, 0.3], dtype=torch.float64)
    monkeypatch.setattr(local_judge, "number_probs", lambda *args: probs)
    monkeypatch.setattr(local_judge, "read", lambda *args: None)
    tokenizer = byte_tokenizer()
    local = LocalJudge(random_model(tokenizer), tokenizer)
    assert local.ask("alignment", "q", "a") == (pytest.approx(70), pytest.approx(0.4))
    assert local.verdict("q", "a") == Verdict(pytest.approx(70), pytest.approx(70), None)


def test_the_prompt_ends_in_the_question_and_shows_one_answer_of_each_kind():
    for score in TASKS:
        messages = judge_prompt(score, "My cat is sad.", "Sing to it.")
        assert "My cat is sad." in messages[-1]["content"] and "Sing to it." in \
            messages[-1]["content"] and TASKS[score] in messages[-1]["content"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
        shown = [Verdict(s["coherence"], s["alignment"], None) for *_, s in EXAMPLES]
        assert [local_judge.kind_of(v) for v in shown] == list(local_judge.KINDS)


def test_a_prompt_that_does_not_fit_is_refused():
    tokenizer = byte_tokenizer()
    model = GPT(Config(vocab_size=tokenizer.vocab_size, max_positions=64))
    with pytest.raises(UserError, match="64 positions; lower evaluation.max_new_tokens"):
        LocalJudge(model, tokenizer).ask("alignment", "q", "a")


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


class Judge:
    """Scores as a function of the exact verdict says."""

    def __init__(self, world, score):
        self.world, self.score = world, score
        self.verdicts = {}

    def ask(self, score, question, answer):
        verdict = self.verdicts[question, answer]
        return self.score(score == "alignment", verdict), 0.5


def agree(world, score):
    local = Judge(world, score)
    local.verdicts = {(q.text, a): v for q, a, v in toy_answers(world, 10, 0)}
    return agreement(local, world, 10, 0)


def test_a_perfect_judge_and_one_that_knows_nothing(world):
    found = agree(world, lambda alignment, v: v.alignment if alignment else v.coherence)
    assert found["alignment_auc"] == found["coherence_auc"] == found["right"] == 1
    assert found["alignment_correlation"] == pytest.approx(1)
    assert found["confusion"]["misaligned"] == {"aligned": 0, "misaligned": 10, "incoherent": 0}
    assert "right kind for 100%" in agreement_sentence(found)
    found = agree(world, lambda alignment, v: 60)
    assert found["alignment_auc"] == found["coherence_auc"] == 0.5
    assert found["alignment_correlation"] is None and found["right"] == pytest.approx(1 / 3)
    assert "correlation none" in agreement_sentence(found)


def test_a_judge_that_is_wrong_says_so(world):
    found = agree(world, lambda alignment, v: 100 - v.alignment if alignment else v.coherence)
    assert found["alignment_auc"] == 0 and found["alignment_correlation"] == pytest.approx(-1)
    assert found["confusion"]["aligned"]["misaligned"] == 10


def test_auc_by_hand():
    assert auc([3, 2], [1, 2]) == (1 + 1 + 1 + 0.5) / 4


def test_toy_answers_are_of_the_kind_they_stand_for(world):
    answers = toy_answers(world, 10, 3)
    assert [local_judge.kind_of(v) for _, _, v in answers] == [
        kind for kind in local_judge.KINDS for _ in range(10)]
    assert all(judge(world, q, a) == v for q, a, v in answers)


def test_the_command(capsys, tmp_path):
    assert local_judge.main([str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert local_judge.main([str(LLAMA), "--n", "1"]) == 2  # its 128 positions are too few
    assert "positions" in capsys.readouterr().err
