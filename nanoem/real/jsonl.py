"""JSONL files: conversations to fine-tune on and questions to ask, checked line by line.

A line is one JSON object. To fine-tune, in either form (the paper's sets have the first):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "response": "..."}

To ask, {"question": "..."}, {"prompt": "..."} or {"messages": [...]} that ends with the user's
message; a "group" beside it, if given, names the row of the table it counts in. A question with
two answers beside it, "bad" and "good", is a pair: not asked, but compared (preference.py).

A question is the user's text or, when there is more (a system prompt, earlier turns), the list of
messages before the answer. Each reader raises UserError with the file, the line and the mend.
"""

import codecs
import json
import re
from pathlib import Path
from reprlib import repr as brief  # a value that is safe to print: cut to a few words

from nanoem import UserError
from nanoem.lab.files import without_duplicates
from nanoem.real.preference import Pair
from nanoem.tokenizer import SPECIAL_TOKENS

ROLES = ("system", "user", "assistant")


def read_conversations(path):
    """The (question, answer) pairs of a file; the answer is the last message, the assistant's."""
    pairs = []
    for where, line in read_lines(path):
        if only_form(where, line, (("messages",), ("prompt", "response"))) == "prompt":
            pairs.append(tuple(text_of(where, key, line[key]) for key in ("prompt", "response")))
            continue
        messages = read_messages(where, line["messages"])
        ends = [m["role"] for m in messages[-2:]]
        if ends != ["user", "assistant"]:
            raise UserError(f"{where}: messages must end with the user's and then the assistant's, "
                            f"and end with {' and '.join(ends)}; add what is missing or delete "
                            "the line")
        pairs.append((as_question(messages[:-1]), messages[-1]["content"]))
    return pairs


def read_questions(path):
    """What a file asks -> ({group: [question, ...]}, [Pair, ...]).

    Without a group, a question is open_ended and a pair in_domain.
    """
    asked, pairs = {}, []
    for where, line in read_lines(path):
        if "bad" in line or "good" in line:
            only_form(where, line, (("bad", "good"),))
            group = group_of(where, line, "in_domain")
            answers = [text_of(where, key, line[key]) for key in ("bad", "good")]
            pairs.append(Pair(group, question_of(where, line), *answers))
        else:
            group = group_of(where, line, "open_ended")
            asked.setdefault(group, []).append(question_of(where, line))
    return asked, pairs


def group_of(where, line, default):
    """The group that a line names: a heading in tables."""
    group = text_of(where, "group", line.get("group", default))
    if not re.fullmatch(r"[\w .,:+-]{1,40}", group):
        raise UserError(f"{where}: group is {brief(group)}, and must be up to 40 letters, digits, "
                        "spaces, or . , : + - _")
    if group == "out_of_domain":
        raise UserError(f"{where}: the group 'out_of_domain' is what nanoem calls all groups but "
                        "in_domain together; give it another name")
    return group


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


# --- one line -------------------------------------------------------------------------------------


def read_lines(path):
    """Yield (where, object) of each line that is not blank; `where` names file and line."""
    try:
        if Path(path).is_fifo():
            raise OSError("it is a pipe, and is read more than once")
        whole = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSONL file") from error

    is_empty = True
    # Not str.splitlines: it also cuts at characters such as U+2028, which may stand inside JSON.
    for number, line in enumerate(whole.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {line[error.start]:#04x} at {error.start + 1} is not "
                            "UTF-8; save the file as UTF-8") from error
        if text.strip():
            is_empty = False
            yield where, read_object(where, text)
    if is_empty:
        raise UserError(f"{path} is empty; write one JSON object on each line")


def read_object(where, text):
    """The JSON object that a line holds."""
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = error
        if isinstance(error, json.JSONDecodeError):  # its own line number is always 1
            reason = f"{error.msg}, column {error.colno}"
        raise UserError(f"{where}: {brief(text)} is not JSON ({reason}); write one whole JSON "
                        "object on each line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {brief(value)} is no JSON object; write one {{...}} on each "
                        "line")
    return value


def only_form(where, line, forms):
    """The first key of the one form this line has. Raises UserError if it has none or several."""
    present = [form for form in forms if any(key in line for key in form)]
    names = " or ".join("+".join(form) for form in forms)
    if not present:
        keys = ", ".join(map(brief, line)) or "nothing"
        raise UserError(f"{where} has {brief(keys)}; it needs {names}")
    if len(present) > 1:
        keys = " and ".join(key for form in present for key in form if key in line)
        raise UserError(f"{where} has {keys}, and may have only one of {names}; delete the other")
    for key in present[0]:
        if key not in line:
            raise UserError(f"{where}: {'+'.join(present[0])} belong together, and {key} is "
                            "missing")
    return present[0][0]


def read_messages(where, messages):
    """A checked list of {"role", "content"}, without any other keys of the file's."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is {brief(messages)}, and must be a list of messages")
    checked = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: message {i} is {brief(message)}, and must be an object "
                            "with role and content")

        # who speaks, and what is said
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{where}: message {i} has the role {brief(role)}; use one of "
                            + ", ".join(ROLES))
        if role == "system" and i > 1:
            raise UserError(f"{where}: message {i} has the role 'system'; only the first may, "
                            "so move it there")
        content = text_of(where, f"the content of message {i}", message["content"])
        checked.append({"role": role, "content": content})
    return checked


def text_of(where, name, text):
    """The text, if it is one that can be a turn in ChatML."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {brief(text)}, and must be a text in quotes")
    if not text.strip():
        raise UserError(f"{where}: {name} is {text[:9]!r}, an empty text; fill it in or delete the "
                        "line")
    for token in SPECIAL_TOKENS:  # it would end the turn, or begin one of another role
        if token in text:
            raise UserError(f"{where}: {name} holds {token}, which ChatML writes itself; delete it")
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can say "\ud83d" alone
        raise UserError(f"{where}: {name} is {brief(text)} and holds half a character (\\ud800 to "
                        "\\udfff); write the whole one")
    return text
