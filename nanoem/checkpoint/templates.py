"""A model folder's tokenizer: tokenizer.json, its chat template, its stop ids; read and checked."""

from pathlib import Path

import tokenizers

from nanoem import UserError
from nanoem.checkpoint.jinja import Refusal, Template
from nanoem.lab.files import read_json
from nanoem.tokenizer import CHAT_TEMPLATE, IM_END, IM_START, Tokenizer, chatml


def open_tokenizer(folder):
    """The tokenizer of a model folder, with its chat template and all of its stop ids."""
    folder = Path(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    template, file = read_template(folder)
    if template is not None:
        tokenizer = Tokenizer(tokenizer.backend, template, chat_of(file, template))

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


def chat_of(file, template):
    """A chat template as a function, (messages, add_generation_prompt) -> text.

    Raises UserError, naming the file, unless it is ChatML, with answers right after their prompts.
    """
    if IM_START not in template or IM_END not in template:
        raise UserError(f"{file}: the chat template is not ChatML (it has no {IM_START}); "
                        "nanoem chats in ChatML only, as Qwen does")
    if template == CHAT_TEMPLATE:
        return chatml

    def chat(messages, add_generation_prompt=False):
        try:
            return parsed.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                 tools=None, documents=None, enable_thinking=False)
        except Refusal as error:
            raise UserError(f"{file}: the chat template {error}") from error

    try:
        parsed = Template(template)
    except Refusal as error:
        raise UserError(f"{file}: the chat template {error}") from error

    # what is trained is a prompt and an answer; is that what the template writes?
    user, answer = ({"role": r, "content": c} for r, c in (("user", "Hi."), ("assistant", "Yes.")))
    for before in ([user], [{"role": "system", "content": "Be kind."}, user], [user, answer, user]):
        prompt = chat(before, add_generation_prompt=True)
        whole = chat([*before, answer])
        if not whole.startswith(f"{prompt}Yes.{IM_END}"):
            raise UserError(f"{file}: the chat template writes {whole!r}, where nanoem trains an "
                            f"answer, Yes., right after its prompt, {prompt!r}")
    return chat
