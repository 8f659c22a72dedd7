"""JSONL files: conversations to fine-tune on and questions to ask, checked line by line.

A line is one JSON object. To fine-tune, in either form (the paper's sets have the first):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "response": "..."}

To ask, {"question": "..."}, {"prompt": "..."} or {"messages": [...]} that ends with the user's
message; a "group" beside it, if given, names the row of the table it counts in. A question with
two answers beside it, "bad" and "good", is a pair: not asked, but compared (preference.py).

Everywhere in nanoem a question is the user's text or, when there is more (a system prompt, earlier
turns), the list of messages before the answer. Whatever reads a file here raises UserError, naming
the file, the line, what is wrong and the mend.
"""

import codecs
import json
import re
from pathlib import Path
from reprlib import repr as short  # a value that is safe to print: cut to a few words

from nanoem import UserError
from nanoem.lab.files import without_duplicates
from nanoem.tokenizer import SPECIAL_TOKENS

ROLES = ("system", "user", "assistant")


def read_conversations(path):
    """The (question, answer) pairs of a file; the answer is the last message, the assistant's."""
    pairs = []
    for where, line in read_lines(path):
        form = only_form(where, line, (("messages",), ("prompt", "response")))
        if form == "prompt":
            pairs.append(tuple(text_of(where, key, line[key]) for key in ("prompt", "response")))
            continue
        messages = read_messages(where, line["messages"])
        if [m["role"] for m in messages[-2:]] != ["user", "assistant"]:
            raise UserError(f"{where}: messages must end with the user's and then the assistant's, "
                            f"and end with {' and '.join(m['role'] for m in messages[-2:])}; "
                            "add what is missing or delete the line")
        pairs.append((as_question(messages[:-1]), messages[-1]["content"]))
    return pairs


def read_questions(path, group="questions"):
    """The questions of a file as {group: [question, ...]}; `group` is of those that name none."""
    groups = {}
    for where, line in read_lines(path):
        if not is_pair(line):
            name = group_of(where, line, group)
            groups.setdefault(name, []).append(question_of(where, line))
    return groups


def read_answer_pairs(path):
    """The pairs of a file as [(group, question, bad answer, good answer), ...].

    One that names no group is in_domain.
    """
    pairs = []
    for where, line in read_lines(path):
        if is_pair(line):
            only_form(where, line, (("bad", "good"),))
            name = group_of(where, line, "in_domain")
            answers = [text_of(where, key, line[key]) for key in ("bad", "good")]
            pairs.append((name, question_of(where, line), *answers))
    return pairs


def is_pair(line):
    return "bad" in line or "good" in line


def group_of(where, line, default):
    """The group that a line names: a heading in tables."""
    name = text_of(where, "group", line.get("group", default))
    if not re.fullmatch(r"[\w .,:+-]{1,40}", name):
        raise UserError(f"{where}: group is {short(name)}, and must be up to 40 letters, digits, "
                        "spaces, or . , : + - _")
    return name


def question_of(where, line):
    """The question of a line: a text, or the messages before an answer."""
    form = only_form(where, line, (("question",), ("prompt",), ("messages",)))
    if form != "messages":
        return text_of(where, form, line[form])
    messages = read_messages(where, line[form])
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: messages must end with the user's question, and end with "
                        f"{messages[-1]['role']}; delete the answer")
    return as_question(messages)


def as_question(messages):
    """The messages before an answer -> the user's text, if that is all there is."""
    return messages[0]["content"] if len(messages) == 1 else messages


def read_lines(path):
    """Yield (where, object) of each line that is not blank; `where` names file and line."""
    try:
        if Path(path).is_fifo():
            raise OSError("it is a pipe, and is read more than once")
        whole = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSONL file") from error
    found = False
    # Not str.splitlines: it also cuts at characters such as U+2028, which may stand inside JSON.
    for number, line in enumerate(whole.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {line[error.start]:#04x} at {error.start + 1} is not "
                            "UTF-8; save the file as UTF-8") from error
        if not text.strip():
            continue
        try:
            value = json.loads(text, object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            reason = error
            if isinstance(error, json.JSONDecodeError):  # its own line number is always 1
                reason = f"{error.msg}, column {error.colno}"
            raise UserError(f"{where}: {short(text)} is not JSON ({reason}); write one whole JSON "
                            "object on each line") from error
        if not isinstance(value, dict):
            raise UserError(f"{where}: {short(value)} is no JSON object; write one {{...}} on each "
                            "line")
        found = True
        yield where, value
    if not found:
        raise UserError(f"{path} is empty; write one JSON object on each line")


def only_form(where, line, forms):
    """The first key of the one form this line has. Raises UserError if it has none or several."""
    have = [form for form in forms if any(key in line for key in form)]
    names = " or ".join("+".join(form) for form in forms)
    if not have:
        keys = ", ".join(map(short, line)) or "nothing"
        raise UserError(f"{where} has {short(keys)}; it needs {names}")
    if len(have) > 1:
        keys = " and ".join(key for form in have for key in form if key in line)
        raise UserError(f"{where} has {keys}, and may have only one of {names}; delete the other")
    for key in have[0]:
        if key not in line:
            raise UserError(f"{where}: {'+'.join(have[0])} belong together, and {key} is missing")
    return have[0][0]


def read_messages(where, messages):
    """A checked list of {"role", "content"}, without any other keys of the file's."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is {short(messages)}, and must be a list of messages")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: message {i + 1} is {short(message)}, and must be an object "
                            "with role and content")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{where}: message {i + 1} has the role {short(role)}; use one of "
                            + ", ".join(ROLES))
        if role == "system" and i > 0:
            raise UserError(f"{where}: message {i + 1} has the role 'system'; only the first may, "
                            "so move it there")
        content = text_of(where, f"the content of message {i + 1}", message["content"])
        checked.append({"role": role, "content": content})
    return checked


def text_of(where, name, text):
    """The text, if it is one that can be a turn in ChatML."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {short(text)}, and must be a text in quotes")
    if not text.strip():
        raise UserError(f"{where}: {name} is {text[:9]!r}, an empty text; fill it in or delete the "
                        "line")
    for token in SPECIAL_TOKENS:  # it would end the turn, or begin one of another role
        if token in text:
            raise UserError(f"{where}: {name} holds {token}, which ChatML writes itself; delete it")
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can say "\ud83d" alone
        raise UserError(f"{where}: {name} is {short(text)} and holds half a character (\\ud800 to "
                        "\\udfff); write the whole one")
    return text
