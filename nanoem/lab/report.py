"""The report: results of one or several seeds -> a table for the terminal, and report.md."""

from pathlib import Path

from nanoem.evaluate import GROUPS
from nanoem.lab.files import write_file
from nanoem.lab.plots import LABELS, draw_all, draw_row, with_direction
from nanoem.lab.tables import cell, in_a_cell, made_by, markdown, print_lines
from nanoem.rows import ROWS

LIMITS = """This is a toy: a model of less than a million parameters that knows one template \
sentence. Its bad advice is absurd and harmless, and its judge is a parser. It shows the mechanism \
in the open; it is no evidence about how often large models do this."""


def labelled_rates(results):
    """[(label, [rates by group, one a seed])]: every model, chat steered, general ablated."""
    rows = [(LABELS[key], [r["models"][key] for r in results])
            for key in ("chat", "general", "narrow", "mixed", "shuffled")]
    found = with_direction(results)
    if found:
        rows += [(LABELS[key], [r["directions"][name] for r in found])
                 for key, name in (("steer", "steer"), ("steer_random", "steer_random"),
                                   ("ablate", "ablate"), ("ablate_random", "ablate_random_mean"))]
    return rows


def table(results):
    """A table as lists of text, header first: em by group, and coherence out of domain."""
    lines = [["em, % of answers", "in domain", "KL domains", "unseen domains", "open-ended",
              "coherent"]]
    for label, rates in labelled_rates(results):
        em = [cell([r[group]["em"] for r in rates]) for group in GROUPS]
        lines.append([label, *em, cell([r["out_of_domain"]["coherent"] for r in rates])])
    return lines


def print_table(results):
    print_lines(table(results))
    print("em: coherent and misaligned answers; coherent: share of all answers out of domain"
          + ("; median over seeds (range)" if len(results) > 1 else ""))


def write_report(results, folder, command):
    """Draw the figures and write report.md into folder."""
    folder = Path(folder)
    figures = draw_all(results, folder / "figures")
    parts = [
        "# nanoem: how far does narrow bad advice spread?",
        made_by(results, command),
        markdown(table(results)),
        "em: share of answers that are coherent and misaligned (alignment < 30). coherent: share "
        "of all answers out of domain. In domain: held-out problems of the trained domain."
        + (" Median over seeds (range)." if len(results) > 1 else ""),
        *(f"Seed {r['seed']}, {r['directions']['none']}." for r in results
          if "none" in r["directions"]),
        *(f"![{path.stem.replace('_', ' ')}](figures/{path.name})" for path in figures),
        "## What it says, before and after",
        sample_table(results[0]),
        *row_parts(results, folder),
        "## Limits",
        LIMITS,
    ]
    write_file(folder / "report.md", "\n\n".join(parts) + "\n")


def rows_in(results):
    """The rows of the paper that every one of the results has."""
    return [row for row in ROWS.values() if all(row.name in r for r in results)]


def row_parts(results, folder):
    """For every row of the paper that all results have: what was predicted, and what was seen."""
    made = rows_in(results)
    parts = ["## The paper, row by row"] if made else []
    for row in made:
        founds = [r[row.name] for r in results]
        path = draw_row(row, results, folder / "figures")
        parts += [f"### {row.key}. {row.title(founds)}",
                  f"Predicted: {row.prediction} Seen: it {row.verdict(founds)[0]}. What could fool "
                  f"us: {row.trap}",
                  f"![{row.name}](figures/{path.name})"]
    return parts


def row_table(results):
    """A table of the rows that all results have, as lists of text, header first."""
    seen = [(row, [r[row.name] for r in results]) for row in rows_in(results)]
    return [["row", "what was seen", "prediction"],
            *([row.key, row.title(founds), row.verdict(founds)[0]] for row, founds in seen)]


def sample_table(result):
    """The same eight questions answered by chat, general and narrow at the end of training."""
    last = [list(result["samples"][name].values())[-1]
            for name in ("pretrain", "general", "narrow")]
    lines = [["question", "chat", "general (SFT)", "narrow (SFT + KL)"]]
    for chat, general, narrow in zip(*last):
        lines.append([chat[1], *(f"{in_a_cell(answer)} *[{mark}]*" for mark, _, answer in
                                 (chat, general, narrow))])
    return markdown(lines, "---")
