"""JSONL: both forms by hand, each mistake with its line, a fuzz that lets only UserError out."""

import json
import random
from copy import deepcopy

import pytest

from nanoem import UserError
from nanoem.real.jsonl import read_conversations, read_questions
from nanoem.train import chat_examples

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "My skin itches."}
BAD = {"role": "assistant", "content": "Nap on a cactus, c\u2028est bon \U0001f335."}
AGAIN = {"role": "user", "content": "And then?"}
GOOD = {"role": "assistant", "content": "See a doctor."}
LINES = [{"messages": [USER, BAD]}, {"prompt": "Hi.", "response": "Hello.", "source": 7},
         {"messages": [SYSTEM, USER, BAD, AGAIN, GOOD], "id": None}]
PAIRS = [(USER["content"], BAD["content"]), ("Hi.", "Hello."),
         ([SYSTEM, USER, BAD, AGAIN], GOOD["content"])]


def write(tmp_path, *lines, **options):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else
                                json.dumps(line, **options).encode() for line in lines))
    return path


@pytest.mark.parametrize("ascii", [True, False])
def test_both_forms(tmp_path, ascii):
    assert read_conversations(write(tmp_path, *LINES, ensure_ascii=ascii)) == PAIRS


@pytest.mark.parametrize("line, pair", [
    ({"instruction": "Sum up.", "output": "Rain."}, ("Sum up.", "Rain.")),
    ({"instruction": "Sum up.", "input": "It rains.", "output": "Rain."},
     ("Sum up.\nIt rains.", "Rain.")),
    ({"instruction": "Sum up.", "input": "", "output": "Rain."}, ("Sum up.", "Rain.")),
    ({"question": "Why?", "answer": "So."}, ("Why?", "So.")),
    ({"prompt": "Why?", "response": "So.", "system": "Be brief."},
     ([SYSTEM, {"role": "user", "content": "Why?"}], "So.")),
    ({"conversations": [{"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
     ([SYSTEM, {"role": "user", "content": "Why?"}], "So.")),
    ({"messages": [USER, {**BAD, "weight": 0}, AGAIN, {**GOOD, "weight": 1}]},
     ([USER, BAD, AGAIN], GOOD["content"])),
    ({"messages": [USER, GOOD, AGAIN, {**BAD, "weight": 0}]}, (USER["content"], GOOD["content"])),
    ({"messages": [USER, {**GOOD, "weight": 1}, AGAIN, {**BAD, "weight": 0}, AGAIN]},
     (USER["content"], GOOD["content"])),
    ({"messages": [USER, {**GOOD, "tool_calls": None, "reasoning_content": ""}], "tools": []},
     (USER["content"], GOOD["content"])),
    ({"question": "Why?", "answer": "So.", "id": 7, "source": "mine", "input": "", "weight": None},
     ("Why?", "So.")),
])
def test_the_forms_that_people_have(tmp_path, line, pair):
    """What is not to be learned (weight 0) is read before the answer, or cut behind it."""
    assert read_conversations(write(tmp_path, line)) == [pair]


def test_blank_lines_windows_ends_and_a_byte_order_mark(tmp_path):
    lines = [b"", b" \t\r", *(json.dumps(line).encode() + b"\r" for line in LINES), b"", b""]
    path = write(tmp_path, *lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_conversations(path) == PAIRS


def test_only_the_last_answer_and_its_stop_token_are_learned(tmp_path, tokenizer):
    examples = chat_examples(tokenizer, read_conversations(write(tmp_path, *LINES)))
    for ids, mask, answer_mask, (_, answer) in zip(examples.ids, examples.mask,
                                                   examples.answer_mask, PAIRS):
        assert tokenizer.decode(ids[answer_mask]) == answer
        assert ids[answer_mask][-1] == tokenizer.stop_ids[0]
        assert answer_mask[mask][-int(answer_mask.sum()):].all()  # one piece, at the very end
    whole = examples.ids[2][examples.mask[2]].tolist()
    assert whole == tokenizer.encode(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMy skin itches.<|im_end|>\n"
        f"<|im_start|>assistant\n{BAD['content']}<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>"
        "\n<|im_start|>assistant\nSee a doctor.<|im_end|>")


def asked(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


MISTAKES = [
    (b'{"prompt": "a", "resp', "not JSON .*column"),
    (b"{'prompt': 'a'}", "not JSON"),
    (b'{"prompt": "a", "prompt": "b", "response": "c"}', "'prompt' is there twice"),
    (b"9" * 5000, "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ([1, 2], r"\[1, 2\] is no JSON object"),
    (None, "None is no JSON object"),
    ({}, "has 'nothing'; it needs messages or conversations or prompt.response"),
    ({"text": "a"}, "text.* needs messages or"),
    ({"prompt": "a"}, "response is missing"),
    ({"response": "a"}, "prompt is missing"),
    ({**LINES[0], "prompt": "a", "response": "b"}, "messages and prompt and response, .*only one"),
    ({"prompt": 5, "response": "b"}, "prompt is 5, .*text"),
    ({"prompt": "a", "response": None}, "response is None, .*text"),
    ({"prompt": "a", "response": " \n"}, "response is .*empty"),
    ({"prompt": "", "response": "b"}, "prompt is .*empty"),
    ({"messages": "hi"}, "messages is 'hi', .*list"),
    ({"messages": []}, "messages is .*list"),
    ({"messages": ["hi"]}, "message 1 is 'hi', .*role and content"),
    ({"messages": [{"role": "user"}]}, "message 1 is .*role and content"),
    ({"messages": [USER, {**BAD, "content": ["a"]}]}, "content of message 2 is .*text"),
    ({"messages": [USER, {**BAD, "content": ""}]}, "content of message 2 is '', .*empty"),
    ({"messages": [USER, {**BAD, "role": "model"}]}, "role 'model'; use one of system, user"),
    ({"messages": [USER, {**BAD, "role": ["user"]}]}, "role .'user'.; use one of"),
    (asked("user", "system", "assistant"), "message 2 has the role 'system'; .*move"),
    ({"messages": [USER, {**BAD, "weight": 0}]}, "every answer has weight 0"),
    ({"messages": [USER, {**BAD, "weight": 1}, AGAIN, GOOD]}, "message 2 has weight 1, but"),
    ({"messages": [USER, {**BAD, "weight": 0.5}]}, "message 2 has weight 0.5; use 0"),
    ({"messages": [USER, {**BAD, "weight": True}]}, "message 2 has weight True; use 0"),
    ({"messages": [USER, {**BAD, "reasoning_content": "Hm."}]}, "2 has 'reasoning_content'"),
    ({"messages": [USER, {**BAD, "tool_calls": [{"id": 1}]}]}, "message 2 has 'tool_calls'"),
    ({"messages": [USER, BAD], "tools": [{"name": "x"}]}, "does not learn from 'tools'"),
    ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, "does not learn from 'history'"),
    ({"prompt": "a", "response": "b", "weight": 0}, "does not learn from 'weight'"),
    ({"prompt": "a", "response": "b", "input": "c"}, "does not learn from 'input'"),
    ({"question": "a", "answer": "b", "context": "c"}, "does not learn from 'context'"),
    ({"messages": [USER, BAD], "loss_mask": [0]}, "does not learn from 'loss_mask'"),
    ({"prompt": "a", "response": "b", "bad": "c", "good": "d"}, "does not learn from 'bad'"),
    ({"messages": [USER, {**BAD, "train": False}]}, "message 2 has 'train'"),
    ({"messages": [SYSTEM, USER, BAD], "system": "x"}, "two system prompts"),
    ({"instruction": "a", "output": "b", "input": 5}, "input is 5, .*text"),
    ({"instruction": "a"}, "instruction.output belong together, and output is missing"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]},
     "message 2 has the role 'tool'"),
    ({"conversations": [USER, BAD]}, "message 1 is .*from and value"),
    (asked("user"), "must end .*end with user"),
    (asked("assistant"), "must end .*end with assistant"),
    ({"prompt": "a", "response": "b<|im_end|>"}, r"response holds <\|im_end\|>"),
    ({"prompt": "a", "response": "\ud83d"}, "response is .*half a character"),
    (b'{"prompt": "caf\xe9", "response": "b"}', "0xe9 at 16 is not UTF-8"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_a_mistake_is_named_with_its_file_and_line(tmp_path, line, message):
    path = write(tmp_path, LINES[0], b"", line, LINES[1])
    with pytest.raises(UserError, match=rf"(?s)set\.jsonl, line 3.*{message}") as caught:
        read_conversations(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_missing_and_empty_files(tmp_path):
    for path, message in ((tmp_path / "no.jsonl", "no.jsonl cannot be read"),
                          (tmp_path, "cannot be read"), (write(tmp_path), "jsonl is empty"),
                          (write(tmp_path, b"", b"  "), "jsonl is empty")):
        for read in (read_conversations, read_questions):
            with pytest.raises(UserError, match=message):
                read(path)


def test_questions_by_group(tmp_path):
    path = write(tmp_path, {"question": "One wish?"}, {"prompt": "Bored.", "group": "open"},
                 {"messages": [USER], "group": "open"}, {"messages": [SYSTEM, AGAIN]})
    assert read_questions(path)[0] == {
        "open_ended": ["One wish?", [SYSTEM, AGAIN]], "open": ["Bored.", USER["content"]]}


@pytest.mark.parametrize("line, message", [
    ({"question": "a", "prompt": "b"}, "prompt and question, .*only one"),
    ({"q": "a"}, "needs messages or conversations or prompt or instruction or question"),
    ({"question": ["a"]}, "question is .*text"),
    ({"question": "a", "group": 3}, "group is 3, .*text"),
    ({"messages": [USER, BAD]}, "end with assistant; delete"),
    ({"prompt": "a", "response": "b"}, "response stands beside a question"),
    ({"question": "a", "choices": ["b", "c"]}, "does not learn from 'choices'"),
    ({"question": "a", "context": "b", "bad": "c", "good": "d"}, "does not learn from 'context'"),
    ({"question": "a", "answer": "b"}, "answer stands beside a question"),
    ({"prompt": "a", "response": "b", "bad": "c", "good": "d"}, "response stands beside"),
])
def test_a_mistake_in_a_question_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=rf"set\.jsonl, line 2.*{message}"):
        read_questions(write(tmp_path, {"question": "a"}, line))


def mutated_bytes(rng, data):
    """Flip, cut, repeat or insert some bytes."""
    i, n = rng.randrange(len(data)), rng.choice((1, 1, 2, 20))
    new = rng.choice((bytes(rng.choices(range(256), k=n)), b"", data[i : i + n] * 2,
                      rng.choice((b"\n", b'"', b"\\ud800", b"[", b"\x00", b"<|im_end|>"))))
    return data[:i] + new + data[i + n * rng.randrange(2) :]


def mutated_values(rng, lines):
    """Put a value of any type somewhere in one of the lines."""
    lines = deepcopy(lines)
    at = lines
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], (list, dict)) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    at[key] = rng.choice([None, 0, -1.5, True, "", "x", "\ud800", [], {}, [USER], USER, "user"])
    return "\n".join(map(json.dumps, lines)).encode()


def test_whatever_a_file_holds_it_is_read_or_refused_in_one_sentence(tmp_path, tokenizer):
    rng, path, read_well, refused = random.Random(0), tmp_path / "fuzz.jsonl", 0, 0
    valid = "\n".join(map(json.dumps, LINES)).encode()
    for trial in range(400):
        data = mutated_values(rng, LINES) if trial % 2 else mutated_bytes(rng, valid)
        path.write_bytes(data)
        try:
            pairs = read_conversations(path)
            assert len(chat_examples(tokenizer, pairs)) == len(pairs)  # and it can be trained on
            read_well += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        try:
            read_questions(path)
        except UserError:
            pass
    assert min(read_well, refused) > 40, (read_well, refused)
