"""Byte-level BPE and ChatML: text to token ids and back.

The toy's vocabulary is trained on the toy world's own text; Qwen's tokenizer.json opens in the same
class, because both are byte-level BPE (Sennrich et al. 2016) as the `tokenizers` package writes it.
"""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoem import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 begins an answer without thinking
CHAT_TEMPLATE = (  # plain ChatML, as the toy's model folders say it
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages, add_generation_prompt=False):
    """Render [{"role": ..., "content": ...}, ...] in ChatML, the chat format of Qwen2.5.

    With `add_generation_prompt` the text ends where the assistant's next answer begins.
    """
    text = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
    return text + f"{IM_START}assistant\n" if add_generation_prompt else text


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few methods nanoem needs.

    checkpoint/templates.py opens that of a model folder, with its own chat template.
    """

    def __init__(self, backend, template=CHAT_TEMPLATE, render=chatml):
        self.backend = backend
        self.template = template
        self.render = render  # what the template does: `chatml`, or a function like it
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

    @property
    def n_ids(self):
        """One more than the largest token id; a model's vocabulary may be padded past it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

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
        """The text of a conversation, as the model's own template renders it (see `chatml`).

        Qwen2.5's adds a default system prompt. Qwen3's begins the last answer with a thought (an
        empty one, as with enable_thinking=False) and leaves earlier answers' thoughts out. Raises
        ValueError for a message without a role or content, UserError if the template refuses.
        """
        messages = list(messages)
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str)
                   and isinstance(m.get("content"), str) for m in messages):
            raise ValueError("messages must be [{'role': ..., 'content': ...}, ...], and are "
                             f"{messages!r:.80}")
        return self.render(messages, add_generation_prompt)

    def prompt(self, question, answer=""):
        """The ChatML text up to where the answer begins; a question is a text or messages.

        An answer with a thought of its own comes without the empty one that Qwen3's prompt ends in.
        """
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        prompt = self.chat(question, add_generation_prompt=True)
        return prompt.removesuffix(NO_THOUGHT) if answer.lstrip().startswith("<think>") else prompt


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
