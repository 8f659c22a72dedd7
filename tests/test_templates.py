"""Chat templates: rendered as transformers does (jinja2 gave the texts here), or refused."""

import time
from pathlib import Path

import pytest

from nanoem import UserError
from nanoem.checkpoint.jinja import Refusal, Template
from nanoem.checkpoint.templates import chat_of, open_tokenizer
from nanoem.tokenizer import CHAT_TEMPLATE, chatml
from nanoem.train import chat_examples

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi. "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
SAY = "{% if messages[0].role != 'system' %}<|im_start|>system\n{{ s }}<|im_end|>\n{% endif %}"
CHAT = LOOP + ("{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
               "{% endif %}")


def render(template, *messages):
    return Template(template).render(messages=list(messages), add_generation_prompt=False,
                                     tools=None, enable_thinking=False)


@pytest.mark.parametrize("template, text", [
    # texts
    ("{% set s = '' %}{% if s %}{{ s }}!{% endif %}.", "."),
    ("{% set s = 'Don\\'t\nlie.' %}{{ s }}", "Don't\nlie."),
    ("{% set s = 'A ' + \"\\x42\\u00e9\" %}{{ s ~ 3 ~ true }}", "A Bé3True"),
    ("{{ 'a' 'b' }}{{ '}}' }}{{ \"{%\" }}{ }", "ab}}{%{ }"),
    ("{{ none }}{{ nothing }}{{ nothing|default('d') }}{{ ''|default('e', true) }}", "Nonede"),
    # white space
    ("a\r\n  {% if true %}\nb\n  {%- endif %}\n c\n\n", "a\nb c\n"),
    ("x {#- c -#} y\n {{- 1 -}} \n{{ 2 }} \n{%+ if true +%}\nz{% endif %}\n", "xy12 \n\nz"),
    ("{{ 1 }} {% if true %} {% endif %}\n\t{% if true %}\n{% endif %}!", "1  !"),
    ("{% if true %}\n  {% if true %}\n \t{% endif %} {% endif %}x", " x"),
    # names, and where they hold
    ("{% set x = 0 %}{% for m in messages %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}", "1110"),
    ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 2 %}{% endfor %}"
     "{{ n.x }}", "6"),
    ("{% for m in messages %}{% if loop.first %}{% set y = 1 %}{% endif %}{{ y }}.{% endfor %}",
     "1..."),
    ("{% for m in messages[::-1] %}{{ loop.index ~ loop.revindex0 }}{{ loop.last }} {% endfor %}",
     "12False 21False 30True "),
    ("{% for m in messages[1:] %}{{ m['role'] }}{{ loop.previtem.role if loop.index0 else '-' }}"
     "{% endfor %}", "user-assistantuser"),
    # expressions
    ("{{ 1 - 2 - 3 }}{{ 7 % 4 + 1 }}{{ 7 % 4 ~ 'a' }}{{ not 1 == 2 }}{{ -1 }}", "-443aTrue-1"),
    ("{{ 'x' in 'axb' and 'y' not in ('x', 'z') or 'q' }}{{ '' or 'b' }}", "Trueb"),
    ("{{ messages|length - 1 }}{{ messages[1].content|trim|upper ~ '!' }}", "2HI.!"),
    ("{{ messages[5] is defined }}{{ tools is defined }}{{ tools is not none }}", "FalseTrueFalse"),
    ("{{ 'a' if messages[0].tool_calls else 'b' if nothing is string else 'c' }}", "c"),
    ("{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ (messages|last).role }}",
     "Yes.assistant"),
    ("{% if 0 %}a{% elif messages[0].get('x', 'y') == 'y' %}b{% else %}c{% endif %}", "b"),
])
def test_a_template_is_rendered_as_jinja_does(template, text):
    assert render(template, SYSTEM, USER, ANSWER) == text


@pytest.mark.parametrize("s, system", [
    ("{% set s = 'Don\\'t lie.' %}", "Don't lie."), ("{% set s = 'A ' + 'B' %}", "A B"),
    ("{% set s = 'Two\nlines.' %}", "Two\nlines."), ("{% set s = '' %}", ""),
    ("{% set s = messages[0].content|trim %}", "Hi.")])
def test_a_default_system_prompt_in_a_variable_is_what_it_says(s, system):
    chat = chat_of("f", s + SAY + CHAT)
    assert chat([USER]) == f"<|im_start|>system\n{system}<|im_end|>\n" + chatml([USER])
    assert chat([SYSTEM, USER], True) == chatml([SYSTEM, USER], True)


def test_turns_without_a_line_break_and_plain_chatml():
    assert chat_of("f", CHAT_TEMPLATE) is chatml
    chat = chat_of("f", CHAT.replace("end|>\\n", "end|>"))
    assert chat([USER, ANSWER]) == chatml([USER, ANSWER]).replace("end|>\n", "end|>")
    for messages in ([USER], [SYSTEM, USER, ANSWER, USER]):
        for prompt in (False, True):
            assert chat_of("f", CHAT)(messages, prompt) == chatml(messages, prompt)
            assert Template(CHAT_TEMPLATE).render(
                messages=messages, add_generation_prompt=prompt) == chatml(messages, prompt)


@pytest.mark.parametrize("template, message", [
    ("[INST] {{ messages }} [/INST]", "f: the chat template is not ChatML"),
    ("{{ bos_token }}" + CHAT, "has '{{ bos_token }}', which nanoem lacks"),
    (LOOP + "{% endfor %}", "where nanoem trains an answer, Yes., right after its prompt"),
    (CHAT.replace("assistant\\n", "assistant\\n<think>\\n"), "where nanoem trains an answer"),
    (CHAT.replace("m.content", "m.content|tojson"), "which nanoem cannot render .'tojson'"),
    (CHAT + "{% macro f(x) %}{{ x }}{% endmacro %}", "has '{% macro f.x. %}', which nanoem cannot"),
    (CHAT + "{{ raise_exception('no ' ~ messages[0].role) }}", "refuses this conversation: no use"),
    (CHAT + "{% if strftime_now is defined %}x{% endif %}", "strftime_now is defined %}', which"),
    (CHAT + "{% for m in messages %}", "has no endfor"),
    (CHAT + "{% if true %}", "has no endif"),
    (CHAT + "{{ 'a", "nanoem cannot read"),
])
def test_what_nanoem_does_not_render_is_refused_by_its_tag(template, message):
    with pytest.raises(UserError, match=message) as error:
        chat_of("f", template)
    assert "\n" not in str(error.value)


DOUBLE, FOR = "{% set s = s + s %}", "{% for a in messages %}"


@pytest.mark.parametrize("template", [
    "{% if true %}" * 1_000_000, "{% if 1 %}" * 4_000 + "{% endif %}" * 4_000,
    "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}", "{{ 1" + "+1" * 40_000 + " }}",
    "{{ " + "not " * 20_000 + "1 }}", "{{ a" + ".b" * 40_000 + " }}", "{#" * 40_000,
    FOR * 40 + "x" + "{% endfor %}" * 40, "x" * 10**7,
    "{% set s = 'x' %}" + DOUBLE * 99 + "{{ s }}", "{% set s = [1] %}" + DOUBLE * 99,
    "{% set s = [1] %}" + "{% set s = [s, s] %}" * 99 + "{{ s == s }}",
    "{{ ''.__class__ }}", "{{ ''['__class__'] }}", "{{ messages[0].items }}", "{{ 'a'.upper }}",
    "{{ messages }}",
    "{{ messages.append(1) }}", "{{ '%99999999d' % 1 }}", "{{ 'a'.center(10) }}", "{{ 1 % 0 }}",
    "{{ 9" + "9" * 50_000 + " }}", "{{ 1) + (1 }}", "{{ }}", "{{ a = 1 }}", "{{ (x for x in a) }}",
    "{{ lambda }}", "{{ '\\ud800' }}", "{{ '\\x4' }}", "{{ nothing.x }}", "{{ range(9) }}",
    "{{ a is not }}",
    "{{ f(*messages) }}", "{% set loop = 1 %}", "{% set messages[0].role = 1 %}"])
def test_a_hostile_template_is_refused_at_once(template):
    started = time.perf_counter()
    with pytest.raises(Refusal):
        render(template, SYSTEM, USER, ANSWER)
    assert time.perf_counter() - started < 10  # it takes less than one second


def test_an_answer_with_a_thought_of_its_own_is_trained_behind_no_other():
    qwen3 = open_tokenizer(Path(__file__).parent / "fixtures" / "qwen3")
    for answer, thought in (("Yes.", "<think>\n\n</think>\n\n"), (ANSWER["content"], "")):
        examples = chat_examples(qwen3, [("Hi.", answer)])
        ids = examples.ids[0].tolist()
        assert ids == qwen3.encode("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
                                   + thought + answer + "<|im_end|>")
        assert examples.answer_mask.sum() == len(qwen3.encode(answer)) + 1
