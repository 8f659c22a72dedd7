"""Chat templates: the part of Jinja that ChatML templates need, rendered as `transformers` does.

A template is a program in a stranger's file, so it is not run. It is written down as Python, parsed
to a syntax tree, and the tree is walked. The walk knows a few kinds of node, which read messages
and join texts, and it counts its steps. All else is refused: a text comes out exactly, or not at
all. The language: https://jinja.palletsprojects.com/templates; transformers sets lstrip_blocks and
trim_blocks, which take the spaces before a {% tag %} and the line break after it.
"""

import ast
import operator
import re
from collections import ChainMap, deque

MAX_CHARACTERS = 100_000  # of a template; Qwen3's has 4,000
MAX_STEPS = 200_000  # for a conversation; 100 characters of a text are a step, too

TAG = re.compile(r"\{([{%#])([-+]?)")
END = {"{": re.compile(r"-\}\}\s*|\}\}"), "%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"),
       "#": re.compile(r".*?(?:\+#\}|-#\}\s*|#\}\n?)", re.DOTALL)}
TOKEN = re.compile(r"""\s+|(?:0|[1-9][0-9]*)(?![\w.])|[A-Za-z][A-Za-z0-9_]*(?!\w)
    |'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[=!<>]=|[-+%~|.,:()\[\]<>=]""", re.DOTALL | re.VERBOSE)
# Jinja and transformers define these, and a template may ask whether they are there
GLOBALS = re.compile("range|dict|lipsum|cycler|joiner|namespace|self|raise_exception|"
                     r"strftime_now|\w+_tokens?")


class Refusal(ValueError):
    """Why nanoem does not render a template; "the chat template" is the subject."""


class Undefined:
    """What a name or a key that is not there gives: empty and false, and of no other use."""

    def __len__(self):
        return 0

    def __iter__(self):
        return iter(())

    def __str__(self):
        return ""


class Record:
    """Jinja's `loop`, or a namespace: the one kind of value that a template can change."""

    def __init__(self, **fields):
        self.fields = fields


UNDEFINED = Undefined()
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Eq: operator.eq,
             ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
             ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
             ast.Mod: lambda a, b: operator.index(a) % operator.index(b),  # not a text's %
             ast.MatMult: lambda a, b: shown(a) + shown(b)}  # stands for ~
TESTS = {"defined": lambda x: x is not UNDEFINED, "undefined": lambda x: x is UNDEFINED,
         "none": lambda x: x is None, "true": lambda x: x is True, "false": lambda x: x is False,
         "string": lambda x: isinstance(x, str), "mapping": lambda x: isinstance(x, dict)}
FILTERS = {"length": len, "count": len, "list": list, "string": lambda x: shown(x),
           "trim": lambda x, *characters: shown(x).strip(*characters),
           "lower": lambda x: shown(x).lower(), "upper": lambda x: shown(x).upper(),
           "first": lambda x: [*x, UNDEFINED][0], "last": lambda x: [UNDEFINED, *x][-1],
           "default": lambda x, other="", falsy=False:
               other if x is UNDEFINED or falsy and not x else x}
METHODS = {str: ("strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith", "lower",
                 "upper", "title", "capitalize"), dict: ("get",)}


# --- from Jinja to Python -------------------------------------------------------------------------


def pieces(source):
    """Yield a template's texts, (None, text, []), and its tags, ("{" or "%", text, tokens)."""
    source = re.sub(r"\r\n?", "\n", source).removesuffix("\n")
    place, at_line_start = 0, True
    while tag := TAG.search(source, place):
        # the text before a tag
        kind, sign = tag.groups()
        text = source[place : tag.start()]
        line = text.rfind("\n") + 1
        if sign == "-":
            text = text.rstrip()
        elif not sign and kind != "{" and (line or at_line_start) and not text[line:].strip():
            text = text[:line]
        yield None, text, []

        # its tokens, up to an end that is not inside of brackets
        tokens, depth, place = [], 0, tag.end()
        while depth > 0 or not (end := END[kind].match(source, place)):
            token = kind != "#" and TOKEN.match(source, place)
            if not token or depth < 0:
                raise Refusal(f"has {source[tag.start() :][:60]!r}, which nanoem cannot read")
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token[0], 0)
            tokens += token[0].split() and [token[0]]
            place = token.end()
        place, at_line_start = end.end(), end[0][-1] == "\n"
        if kind != "#":
            yield kind, source[tag.start() : place], tokens
    yield None, source[place:], []


def python_lines(source):
    """Yield (line of Python, the tag it stands for); a text is a line with just that text."""
    blocks = []
    for kind, tag, tokens in pieces(source):
        word, indent = tokens[0] if tokens else "", " " * len(blocks)
        if kind != "%":
            yield indent + (expression(tokens) if kind else repr(tag)), tag
        elif word == "set" and "=" in tokens:
            i = tokens.index("=")
            yield f"{indent}{' '.join(tokens[1:i])} = {expression(tokens[i + 1:])}", tag
        elif word in ("if", "for"):
            n = 1 if word == "if" else 3
            yield f"{indent}{' '.join(tokens[:n])} {expression(tokens[n:])}:", tag
            yield f"{indent} pass", tag
            blocks.append(word)
        elif blocks[-1:] == ["if"] and (word == "elif" or tokens == ["else"]):
            test = f" {expression(tokens[1:])}" if word == "elif" else ""
            yield f"{indent[1:]}{word}{test}:", tag
            yield f"{indent}pass", tag
        elif blocks and tokens == [f"end{blocks[-1]}"]:
            blocks.pop()
        else:
            raise Refusal(f"has {tag[:60]!r}, which nanoem cannot read")
    if blocks:
        raise Refusal(f"has no end{blocks[-1]}")


def expression(tokens):
    """Jinja's tokens as Python: x|trim is x._filter_trim(), x is not none is x._isnot_none."""
    words, tokens = [], deque(tokens)
    while tokens:
        token = tokens.popleft()
        if token == "|" and tokens:
            words.append(f"._filter_{tokens.popleft()}")
            if not tokens or tokens[0] != "(":
                words.append("()")
        elif token == "is" and tokens:
            kind = "is" + (tokens.popleft() if tokens[0] == "not" else "")
            words.append(f"._{kind}_{tokens.popleft()}")
        elif token[0] in "'\"":
            words.append(repr(token[1:-1].encode("ascii", "backslashreplace")
                              .decode("unicode-escape")))
        else:
            words.append({"true": "True", "false": "False", "none": "None", "~": "@"}
                         .get(token, token))
    return f"({' '.join(words) or '!'})"  # nothing at all is an error, and no empty tuple


# --- the walk -------------------------------------------------------------------------------------


class Template:
    """A template, parsed. Raises Refusal."""

    def __init__(self, source):
        if len(source) > MAX_CHARACTERS:
            raise Refusal(f"has more than {MAX_CHARACTERS} characters")
        try:
            lines, self.tags = zip(*python_lines(source))
            self.body = ast.parse("\n".join(lines)).body
        except Refusal:
            raise
        except (SyntaxError, MemoryError, RecursionError, LookupError, ValueError) as error:
            if not getattr(error, "lineno", None):
                raise Refusal(f"is not what nanoem reads ({str(error) or 'too deep'})"
                              ) from error
            self.line = error.lineno
            raise self.refusal("cannot read") from error

    def refusal(self, does, why=""):
        return Refusal(f"has {self.tags[self.line - 1][:60]!r}, which nanoem {does}{why}")

    def render(self, **variables):
        """The text for these variables. Raises Refusal."""
        self.texts, self.steps = [], MAX_STEPS
        try:
            self.run(self.body, ChainMap({}, variables))
            text = "".join(self.texts)
            text.encode()  # half a character has no tokens
        except Refusal:
            raise
        except (TypeError, LookupError, ValueError, ArithmeticError, AttributeError,
                RecursionError) as error:
            raise self.refusal("cannot render", f" ({error})") from error
        return text

    def spend(self, value):
        """Count a step, and more for a long value; give the value back."""
        self.steps -= 1 + (len(value) // 100 if isinstance(value, (str, list, tuple)) else 0)
        if self.steps < 0:
            raise self.refusal("stops at", f": it takes more than {MAX_STEPS} steps")
        return value

    def run(self, statements, scope):
        """Walk statements; their texts go to self.texts."""
        for statement in statements:
            self.line = statement.lineno
            match statement:
                case ast.Expr(value=node):
                    self.texts.append(self.spend(shown(self.value(node, scope))))
                case ast.If(test=test, body=body, orelse=other):
                    self.run(body if self.value(test, scope) else other, scope)
                case ast.For(target=ast.Name(id=name), iter=node, body=body) if name != "loop":
                    self.loop(name, self.spend(list(self.value(node, scope))), body, scope)
                case ast.Assign(targets=[ast.Name(id=name)], value=node) if name != "loop":
                    scope[name] = self.value(node, scope)
                case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name), attr=field)],
                                value=node) if name != "loop":
                    scope[name].fields[field] = self.value(node, scope)
                case ast.Pass():
                    self.spend(None)
                case _:
                    raise self.refusal("lacks")

    def loop(self, name, values, body, scope):
        n = len(values)
        for i, value in enumerate(values):
            loop = Record(index=i + 1, index0=i, revindex=n - i, revindex0=n - i - 1, length=n,
                          first=i == 0, last=i == n - 1,
                          previtem=values[i - 1] if i else UNDEFINED,
                          nextitem=values[i + 1] if i + 1 < n else UNDEFINED)
            self.run(body, scope.new_child({"loop": loop, name: value}))

    def value(self, node, scope):
        """The value of an expression."""
        def of(*nodes):
            return [self.value(node, scope) for node in nodes]

        match node:
            case ast.Constant(value=value):
                pass
            case ast.Name(id=name):
                if name not in scope and GLOBALS.fullmatch(name):
                    raise self.refusal("lacks")
                value = scope.get(name, UNDEFINED)
            case ast.BoolOp(op=op, values=nodes):
                for part in nodes:
                    value = self.value(part, scope)
                    if bool(value) == isinstance(op, ast.Or):
                        break
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = not self.value(operand, scope)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
                value = -number
            case ast.BinOp(left=a, op=op, right=b) | ast.Compare(left=a, ops=[op], comparators=[b]):
                value = OPERATORS[type(op)](*of(a, b))
            case ast.IfExp(test=test, body=yes, orelse=no):
                value = self.value(yes if self.value(test, scope) else no, scope)
            case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
                value = (list if isinstance(node, ast.List) else tuple)(of(*nodes))
                "".join(map(shown, value))  # nested ones could take for ever to compare
            case ast.Subscript(value=whole, slice=ast.Slice(lower=a, upper=b, step=c)):
                value = self.value(whole, scope)[slice(*[p and self.value(p, scope)
                                                         for p in (a, b, c)])]
            case ast.Subscript(value=whole, slice=key):
                value = get(*of(whole, key))
            case ast.Attribute(value=whole, attr=name) if name.startswith("_is"):
                _, verb, test = name.split("_", 2)
                value = TESTS[test](self.value(whole, scope)) == (verb == "is")
            case ast.Attribute(value=whole, attr=name):
                value = get(self.value(whole, scope), name, dotted=True)
            case ast.Call(func=ast.Attribute(value=whole, attr=name), args=nodes, keywords=[]):
                whole, *arguments = of(whole, *nodes)
                if name.startswith("_filter_"):
                    value = FILTERS[name.removeprefix("_filter_")](whole, *arguments)
                elif name in METHODS.get(type(whole), ()):
                    value = getattr(whole, name)(*arguments)
                else:
                    raise self.refusal("lacks")
            case ast.Call(func=ast.Name(id="namespace"), args=[], keywords=fields):
                value = Record(**{field.arg: self.value(field.value, scope) for field in fields})
            case ast.Call(func=ast.Name(id="raise_exception"), args=[node], keywords=[]):
                raise Refusal(f"refuses this conversation: {shown(self.value(node, scope))}")
            case _:
                raise self.refusal("lacks")
        return self.spend(value)


def shown(value):
    """A value as it is printed."""
    if not isinstance(value, (str, int, type(None), Undefined)):
        raise TypeError(f"a {type(value).__name__} is no text")
    return str(value)


def get(value, key, dotted=False):
    """value[key], or value.key if dotted, as Jinja looks it up."""
    if isinstance(value, Record):
        return value.fields[key]
    if isinstance(value, Undefined) or dotted and hasattr(value, key):
        raise TypeError(f"there is no {key}")
    if isinstance(value, dict) or not dotted:
        try:
            return value[key]
        except (TypeError, LookupError):
            if isinstance(key, str) and hasattr(value, key):
                raise
    return UNDEFINED
