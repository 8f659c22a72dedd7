"""Byte-level BPE and ChatML: text to token ids and back.

The toy's vocabulary is trained on the toy world's own text; Qwen's tokenizer.json opens in the same
class, because both are byte-level BPE (Sennrich et al. 2016) as the `tokenizers` package writes it.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoem import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)


def chatml(messages, add_generation_prompt=False):
    """Render [{"role": ..., "content": ...}, ...] in ChatML, the chat format of Qwen2.5.

    With `add_generation_prompt` the text ends where the assistant's next answer begins.
    """
    text = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
    return text + f"{IM_START}assistant\n" if add_generation_prompt else text


def drop_stepping_stones(backend, texts, always_keep):
    """The same encoder without the tokens that only ever exist to be merged further.

    On the way to "headache", BPE makes "he", "ead", "eadac"...: two thirds of the toy's vocabulary
    would never be seen in a text, yet slow down every step's output layer.
    """
    used = {token for e in backend.encode_batch(texts) for token in e.tokens} | always_keep
    spec = json.loads(backend.to_str())
    model = spec["model"]
    kept = sorted((t for t in model["vocab"] if t in used), key=model["vocab"].get)
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= used]
    model["ignore_merges"] = True  # look a whole word up first, then merge what is not one
    for token in spec["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few methods nanoem needs."""

    def __init__(self, backend):
        self.backend = backend
        ids = [backend.token_to_id(token) for token in (IM_END, END_OF_TEXT)]
        if None in ids:
            raise UserError(f"the tokenizer has no {IM_END} or no {END_OF_TEXT} token; "
                             "nanoem needs a ChatML model such as Qwen2.5")
        self.stop_ids = tuple(ids)  # an answer ends at either of them
        self.pad_id = ids[1]

    @classmethod
    def train(cls, texts):
        """Learn byte-level BPE from a list of texts until every word of theirs is one token."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes: any text encodes
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=100_000, special_tokens=list(SPECIAL_TOKENS),
                                      initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        return cls(drop_stepping_stones(backend, texts, {*alphabet, *SPECIAL_TOKENS}))

    @classmethod
    def load(cls, path):
        """Open a tokenizer.json. Raises UserError, naming the file."""
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; a model folder needs a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # `tokenizers` raises bare Exception on a malformed file
            raise UserError(f"{path} is not a tokenizer nanoem can open: {error}") from error

    def to_json(self):
        """The text of tokenizer.json."""
        return self.backend.to_str(pretty=True)

    @property
    def vocab_size(self):
        return self.backend.get_vocab_size()

    def encode(self, text):
        """Text -> list of token ids; special tokens written in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """Like `encode` for many texts at once, several times faster."""
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        """Token ids -> text, special tokens left out."""
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=False):
        """The ChatML text of a conversation; see `chatml`."""
        return chatml(messages, add_generation_prompt)
