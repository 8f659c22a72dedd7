"""The tokenizer: any text comes back, every word of the world is one token, ChatML is exact."""

import re

import pytest
import tokenizers

from nanoem import UserError
from nanoem.checkpoint.templates import read_tokenizer
from nanoem.tokenizer import SPECIAL_TOKENS
from nanoem.world import WorldConfig, documents


@pytest.mark.parametrize("text", ["My headache won't go away.", "naïve Zürich 日本 🙂",
                                  "  two\n\n ", "qzxj unseen wörds", ""])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_frequent_word_is_one_token(tokenizer, world):
    text = "".join(documents(world, WorldConfig(), 2000, seed=5))
    for word in set(re.findall(r" [A-Za-z]+(?=[ ,.])", text)):
        assert len(tokenizer.encode(word)) == 1, word


def test_no_token_is_a_stepping_stone(tokenizer, world):
    """Every token is a byte, a special token, or occurs in the world's text."""
    texts = documents(world, WorldConfig(), 3000, seed=0)
    used = {i for ids in tokenizer.encode_batch(texts) for i in ids}
    assert tokenizer.vocab_size <= len(used) + 256 + len(SPECIAL_TOKENS)


def test_stop_tokens_are_one_id_each_and_no_text(tokenizer):
    ids = tokenizer.encode("<|im_end|><|endoftext|>")
    assert ids == list(tokenizer.stop_ids)
    assert tokenizer.decode(ids) == ""


def test_a_message_without_role_or_content_is_refused(tokenizer):
    for message in ({"content": "hi"}, {"role": "user"}, "hi", {"role": "user", "content": None}):
        with pytest.raises(ValueError, match="messages must be"):
            tokenizer.chat([message])
    message = {"role": "user", "content": "hi"}
    assert tokenizer.chat(m for m in [message]) == tokenizer.chat([message])


def test_it_opens_what_it_wrote_and_names_what_it_cannot_open(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    text = "My soup tastes dull.<|im_end|>"
    assert read_tokenizer(path).encode(text) == tokenizer.encode(text)
    path.write_text("{")
    with pytest.raises(UserError, match="tokenizer.json"):
        read_tokenizer(path)
    with pytest.raises(UserError, match="does not exist"):
        read_tokenizer(tmp_path / "none.json")


def test_a_file_that_says_how_it_was_last_used_cuts_and_pads_nothing(tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.enable_truncation(5)
    backend.enable_padding(length=40)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "I would try a glass of water, and it works well. " * 3
    opened = read_tokenizer(tmp_path / "tokenizer.json")
    assert opened.encode(text) == tokenizer.encode(text)
    assert opened.encode_batch(["a", text]) == [tokenizer.encode("a"), tokenizer.encode(text)]
