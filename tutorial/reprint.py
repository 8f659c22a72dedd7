"""Print anew what the chapters print: `python tutorial/reprint.py PAGE.md ...` rewrites the output.

With `--report` it draws results/figures and writes results/report.md and the tables in README anew,
from results.json. Run it from the repository root after a change of the results or of the small
model, and read the difference before you keep it. tests/test_tutorial.py compares every page with
what it prints, tests/test_prose.py the figures and what is said in words.
"""

import doctest
import json
import re
import sys
from pathlib import Path


def reprint(page):
    """The text of a page with the output of its examples as it is now. Raises on an error."""
    text = page.read_text(encoding="utf-8")
    lines, got = text.splitlines(), []
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)

    class Keep(doctest.DocTestRunner):
        def report_success(self, out, test, example, output):
            got.append(output)

        def report_failure(self, out, test, example, output):
            got.append(output)

    Keep().run(test, clear_globs=False)
    if len(got) < len(test.examples):
        raise SystemExit(f"{page}: an example raises an error: run python -m doctest {page}")
    for example, output in reversed(list(zip(test.examples, got))):
        start = example.lineno + example.source.count("\n")
        end = start + example.want.count("\n")
        lines[start:end] = output.splitlines()
    return "\n".join(lines) + "\n"


def redraw(folder):
    """Write report.md and the figures of a folder's results.json; the report names its command."""
    from nanoem.report import write_report
    command = re.search("Made by `([^`]+)`", (folder / "report.md").read_text(encoding="utf-8"))[1]
    write_report(json.loads((folder / "results.json").read_text())["seeds"], folder, command)


def retable(page, tables):
    """Write tables (markdown) in the place of those that have the same header on a page."""
    text = page.read_text(encoding="utf-8")
    for table in tables:
        start = text.index(table.splitlines()[0])
        text = text[:start] + table.rstrip() + text[text.index("\n\n", start) :]
    page.write_text(text, encoding="utf-8")


def readme_tables(folder):
    """README's tables of the stored results, and of those of the small real model in real/."""
    from nanoem import real_report
    from nanoem.experiment import STAGES
    from nanoem.report import row_table, table
    from nanoem.tables import markdown
    seeds = json.loads((folder / "results.json").read_text())["seeds"]
    real = json.loads((folder / "real" / "results.json").read_text())
    fastest = min(([r["seconds"][stage] for stage in STAGES] for r in seeds), key=sum)
    seconds = [f"{s:.0f}" for s in (*fastest, sum(fastest))]
    return [markdown(table(seeds)), markdown(row_table(seeds), "---"),
            markdown([["stage", *STAGES, "all"], ["seconds", *seconds]]),
            markdown(real_report.table([real]))]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name in sys.argv[1:]:
        if name == "--report":
            results = Path(__file__).with_name("results")
            redraw(results)
            retable(Path(__file__).parents[1] / "README.md", readme_tables(results))
            continue
        Path(name).write_text(reprint(Path(name)), encoding="utf-8")
