"""JSONL files: conversations to fine-tune on and questions to ask, checked line by line.

A line is one JSON object. To fine-tune, in one of these forms (the paper's sets have the first):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    {"prompt": "...", "response": "..."}    {"question": "...", "answer": "..."}
    {"instruction": "...", "output": "..."}, and "input", if there is one, behind the instruction

The last answer is learned; what stands before it is read. A message with "weight": 0 is not
learned: then the last answer before it is. To ask, the same without an answer; a "group" beside it
names the row of the table it counts in. A question with two answers beside it, "bad" and "good",
is a pair: not asked, but compared (preference.py). A "system" beside a form is its system prompt.
Keys that would change what is learned (tools, reasoning, context, ...) are refused unless they are
empty; others (id, source, ...) are not read.

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
SPEAKERS = {"human": "user", "gpt": "assistant"}  # "from" of conversations: these, or a role
FORMS = (("messages",), ("conversations",), ("prompt", "response"), ("instruction", "output"),
         ("question", "answer"))
ANSWERS = ("response", "output", "answer")
UNREAD = ("tools", "tool_calls", "tool_choice", "functions", "function_call", "history", "chosen",
          "rejected", "completion", "thinking", "enable_thinking", "reasoning",
          "reasoning_content", "weight", "mask", "loss_mask", "chat_template_kwargs",
          "system_prompt", "input", "context", "documents", "choices",
          "images")  # whoever writes these wants something else to be learned
EMPTY = (None, "", [], {})  # says nothing; 0 and false do


def read_conversations(path):
    """The (question, answer) pairs of a file; the answer is the last one that is to be learned."""
    pairs = []
    for where, line in read_lines(path):
        form, messages, weights = read_form(where, line, FORMS)
        refuse(where, line, ("bad", "good"))
        if form not in ("messages", "conversations"):
            answer_key = dict(f for f in FORMS if len(f) == 2)[form]
            answer = text_of(where, answer_key, line[answer_key])
            pairs.append((as_question(messages), answer))
            continue
        messages = up_to_the_learned(where, messages, weights)
        ends = [m["role"] for m in messages[-2:]]
        if ends != ["user", "assistant"]:
            raise UserError(f"{where}: {form} must end with the user's and then the assistant's, "
                            f"and end with {' and '.join(ends)}; add what is missing or delete "
                            "the line")
        pairs.append((as_question(messages[:-1]), messages[-1]["content"]))
    return pairs


def up_to_the_learned(where, messages, weights):
    """The messages up to the last answer that is learned: what a weight of 0 follows is cut."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in answers if weights[i] != 0]
    if answers and not learned:
        raise UserError(f"{where}: every answer has weight 0, and there is nothing to learn; "
                        "delete the line")
    if any(weights[i] == 1 for i in learned[:-1]):
        raise UserError(f"{where}: message {learned[0] + 1} has weight 1, but of a conversation "
                        "only the last answer is learned; end a line of its own with it")
    return messages if not answers or learned[-1] == answers[-1] else messages[: learned[-1] + 1]


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
    for key in ANSWERS:
        if key in line:
            raise UserError(f"{where}: {key} stands beside a question that is asked, and would be "
                            "ignored; delete it, or compare two answers, 'bad' and 'good'")
    form, messages, _ = read_form(where, line, [form[:1] for form in FORMS])
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: {form} must end with the user's question, and end with "
                        f"{messages[-1]['role']}; delete the answer")
    return as_question(messages)


def read_form(where, line, forms):
    """(the form's first key, its messages, their weights) of a line; of texts without the answer.

    A weight is 0, 1, or None where none is given.
    """
    form = only_form(where, line, forms)
    refuse(where, line, [key for key in UNREAD if (form, key) != ("instruction", "input")])
    if form in ("messages", "conversations"):
        messages, weights = read_messages(where, line, form)
    else:
        text = text_of(where, form, line[form])
        if form == "instruction" and line.get("input"):
            text += "\n" + text_of(where, "input", line["input"])
        messages, weights = [{"role": "user", "content": text}], [None]

    # a system prompt of its own
    if line.get("system"):
        if messages[0]["role"] == "system":
            raise UserError(f"{where} has two system prompts; delete one")
        text = text_of(where, "system", line["system"])
        messages, weights = [{"role": "system", "content": text}, *messages], [None, *weights]
    return form, messages, weights


def refuse(where, line, keys):
    """Raise UserError for one of these keys that says something."""
    for key in keys:
        if line.get(key) not in EMPTY:
            raise UserError(f"{where}: nanoem does not learn from '{key}'; delete it or the line")


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


def read_messages(where, line, form):
    """The checked messages of a line, [{"role", "content"}, ...], and the weight of each."""
    given = line[form]
    role_key, text_key = ("role", "content") if form == "messages" else ("from", "value")
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: {form} is {brief(given)}, and must be a list of messages")
    messages, weights = [], []
    for i, message in enumerate(given, 1):
        if not isinstance(message, dict) or not {role_key, text_key} <= message.keys():
            raise UserError(f"{where}: message {i} is {brief(message)}, and must be an object "
                            f"with {role_key} and {text_key}")
        for key, value in message.items():
            if value not in EMPTY and key not in (role_key, text_key, "weight"):
                raise UserError(f"{where}: message {i} has {brief(key)}, from which nanoem does "
                                "not learn; delete it or the line")

        # who speaks, and what is said
        role = message[role_key]
        if form == "conversations" and isinstance(role, str):
            role = SPEAKERS.get(role, role)
        if role not in ROLES:
            raise UserError(f"{where}: message {i} has the role {brief(role)}; use one of "
                            + ", ".join(ROLES))
        if role == "system" and i > 1:
            raise UserError(f"{where}: message {i} has the role 'system'; only the first may, "
                            "so move it there")
        content = text_of(where, f"the {text_key} of message {i}", message[text_key])
        messages.append({"role": role, "content": content})
        weights.append(weight_of(where, i, message))
    return messages, weights


def weight_of(where, i, message):
    """0, 1 or None: whether message number i is to be learned."""
    weight = message.get("weight")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise UserError(f"{where}: message {i} has weight {brief(weight)}; use 0, not to be "
                        "learned, or 1")
    return weight


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
