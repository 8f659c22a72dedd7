"""Tables for the terminal and for Markdown: lists of lines, each a list of texts, header first."""

from statistics import median


def markdown(lines, align="---:"):
    """A table as Markdown; the columns after the first are aligned to the right by default."""
    header, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|---|" + f"{align}|" * (len(lines[0]) - 1), *rows])


def print_lines(lines):
    """A table as aligned text, after an empty line."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(f"{text:<{width}}" if i == 0 else f"{text:>{width}}"
                        for i, (text, width) in enumerate(zip(line, widths))))


def cell(shares):
    """The median over seeds in percent, with the range when there are several: 71 (48-84)."""
    shares = [100 * share for share in shares]
    text = f"{median(shares):.0f}"
    return text if len(shares) == 1 else f"{text} ({min(shares):.0f}-{max(shares):.0f})"


def number(values):
    """The median over seeds, with the range when there are several: -3.5 (-4.0 to -2.9)."""
    text = f"{median(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def one_line(text):
    """Whatever a model says, without line ends and what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def in_a_cell(text):
    """Whatever a model says, as one cell of a Markdown table."""
    text = one_line(text) or "(nothing)"
    for character in "\\|`<>*_[]":
        text = text.replace(character, f"\\{character}")
    return text


def made_by(results, command):
    """The sentence under a report's title: what made it, from which seeds, where, how long."""
    first, seeds = results[0], ", ".join(str(r["seed"]) for r in results)
    seconds = ", ".join(f"{r['total_seconds']:.0f}" for r in results)
    return (f"Made by `{command}` (seed {seeds}; {seconds} seconds on {first['device']}, "
            f"{first['threads']} threads, torch {first['versions']['torch']}).")
