"""Tables and pages of results: for the terminal and for Markdown, of one or several seeds.

A table is a list of lines, each a list of texts, header first.
"""

from statistics import median

from nanoem.lab.files import write_file


def seed_table(corner, columns, rows):
    """A table of rows [(label, [record of each seed]), ...] and columns {heading: (keys, show)}.

    `keys` lead to a value in a record, such as ("in_domain", "em"). `show` makes one text of the
    seeds' values: `cell`, `number` or `count`. Where no record has the value, the text is empty.
    """
    lines = [[corner, *columns]]
    for label, records in rows:
        line = [label]
        for keys, show in columns.values():
            values = [value_at(record, keys) for record in records]
            values = [value for value in values if value is not None]
            line.append(show(values) if values else "")
        lines.append(line)
    return lines


def value_at(record, keys):
    """The value that keys lead to in nested tables; None when one of them is not there."""
    for key in keys:
        record = record and record.get(key)
    return record


def sample_table(samples):
    """Markdown of {model: [(question, answer, mark), ...]}: each question with all answers.

    The mark is the judge's word for the answer; an empty one is not shown.
    """
    lines = [["question", *samples]]
    for row in zip(*samples.values()):
        question, _, _ = row[0]
        answers = [in_a_cell(answer) + f" *[{mark}]*" * bool(mark) for _, answer, mark in row]
        lines.append([in_a_cell(question), *answers])
    return markdown(lines, "---")


def markdown(lines, align="---:"):
    """A table as Markdown; the columns after the first are aligned to the right by default."""
    header, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|---|" + f"{align}|" * (len(lines[0]) - 1), *rows])


def print_lines(lines):
    """A table as aligned text, after an empty line."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        first, *others = [f"{text:>{width}}" for text, width in zip(line, widths)]
        print("  ".join([f"{line[0]:<{len(first)}}", *others]))


def cell(shares):
    """The median over seeds in percent, with the range when there are several: 71 (48-84)."""
    shares = [100 * share for share in shares]
    text = f"{median(shares):.0f}"
    return text if len(shares) == 1 else f"{text} ({min(shares):.0f}-{max(shares):.0f})"


def number(values):
    """The median over seeds, with the range when there are several: -3.5 (-4.0 to -2.9)."""
    text = f"{median(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def count(values):
    """A count, which is the same for every seed."""
    return str(values[0])


def one_line(text):
    """Whatever a model says, without line ends and what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def in_a_cell(text):
    """Whatever a model says, as one cell of a Markdown table."""
    text = one_line(text) or "(nothing)"
    for character in "\\|`<>*_[]":
        text = text.replace(character, f"\\{character}")
    return text


def write_page(path, title, results, command, parts, limits):
    """Write a report: the title, what made it from which seeds, the parts, the limits."""
    first = results[0]
    seeds = ", ".join(str(r["seed"]) for r in results)
    seconds = ", ".join(f"{r['total_seconds']:.0f}" for r in results)
    made_by = (f"Made by `{command}` (seed {seeds}; {seconds} seconds on {first['device']}, "
               f"{first['threads']} threads, torch {first['versions']['torch']}).")
    page = [f"# {title}", made_by, *parts, "## Limits", limits]
    write_file(path, "\n\n".join(page) + "\n")
