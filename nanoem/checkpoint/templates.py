"""A model folder's tokenizer: tokenizer.json, its chat template, its stop ids; read and checked."""

import re
from pathlib import Path

import tokenizers

from nanoem import UserError
from nanoem.lab.files import read_json
from nanoem.tokenizer import IM_END, IM_START, Tokenizer


def open_tokenizer(folder):
    """The tokenizer of a model folder, with its chat template and all of its stop ids."""
    folder = Path(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    template, file = read_template(folder)
    if template is not None:
        check_template(file, template)
        tokenizer = Tokenizer(tokenizer.backend, template, default_system(template))

    # an answer may end at more tokens than ChatML's two
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if type(i) is not int or not 0 <= i < tokenizer.n_ids:
            raise UserError(f"{file}: eos_token_id {i!r} is no token of tokenizer.json")
        if i not in tokenizer.stop_ids:
            tokenizer.stop_ids += (i,)
    return tokenizer


def read_tokenizer(path):
    """Open a tokenizer.json. Raises UserError, naming the file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; a model folder needs a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()  # a file may say how it was last used; nothing is cut here
        backend.no_padding()
        tokenizer = Tokenizer(backend)
    except Exception as error:  # `tokenizers` raises bare Exception on a malformed file
        raise UserError(f"{path} is not a tokenizer nanoem can open: {error}") from error
    prompt, answer = f"{IM_START}assistant\n", "Try it."
    if tokenizer.encode(prompt + answer) != tokenizer.encode(prompt) + tokenizer.encode(answer):
        raise UserError(f"{path} gives an answer other tokens after a prompt than alone; "
                        "nanoem needs byte-level BPE, as Qwen has it")
    return tokenizer


def read_template(folder):
    """The chat template of a model folder (None if it has none) and the file it stands in."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file}: chat_template should be text, and is {template!r}")
    return template, file


def check_template(file, template):
    """Refuse a template that writes what `chat` does not."""
    if IM_START not in template or IM_END not in template:
        raise UserError(f"{file}: the chat template is not ChatML (it has no {IM_START}); "
                        "nanoem chats in ChatML only, as Qwen does")
    always_thinks = "enable_thinking" not in template and re.search(r"assistant(\n|\\n)<think>",
                                                                    template)
    for written, what in (("bos_token" in template, "a token before the first message"),
                          (always_thinks, "<think> itself")):
        if written:
            raise UserError(f"{file}: the chat template writes {what}; nanoem's ChatML does not")


def default_system(template):
    """The system prompt a ChatML template adds when a conversation has none; None if it adds none.

    nanoem does not run templates (they are programs): it looks for the text of such a message,
    written out in one piece, or for a name that a literal text is set to.
    """
    template = re.sub(r"\{%-? *if tools\b.*?\{%-? *(?:else|endif)", "", template, flags=re.DOTALL)
    named = re.search(r"system\\n['\"] *\+ *(\w+)\b(?![.\[])", template)
    literal = named and re.search(rf"set {named[1]} *= *(['\"])(.+?)\1", template)
    if literal:
        return literal[2]

    # the texts: those outside of tags, and those in quotes inside
    pieces = re.split(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", template, flags=re.DOTALL)
    texts = pieces[::2]
    escapes = {r"\n": "\n", r"\'": "'", r"\"": '"', r"\\": "\\"}
    for tag in pieces[1::2]:
        quoted = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", tag, re.DOTALL)
        texts += [re.sub(r"\\.", lambda m: escapes.get(m[0], m[0]), single or double)
                  for single, double in quoted if not tag.startswith("{#")]

    message = re.compile(f"{re.escape(IM_START)}system\n(.+?){re.escape(IM_END)}", re.DOTALL)
    for text in texts:
        match = message.search(text)
        if match:
            return match[1]
    return None
