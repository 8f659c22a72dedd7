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
    from nanoem.lab.report import write_report
    command = re.search("Made by `([^`]+)`", (folder / "report.md").read_text(encoding="utf-8"))[1]
    write_report(json.loads((folder / "results.json").read_text())["seeds"], folder, command)


def retable(page, tables):
    """Write tables (markdown) in the place of those that have the same header on a page."""
    text = page.read_text(encoding="utf-8")
    for table in tables:
        start = text.index(table.splitlines()[0])
        text = text[:start] + table.rstrip() + text[text.index("\n\n", start) :]
    page.write_text(text, encoding="utf-8")


def pages_with_tables(folder):
    """{page: its tables}: README's, and where the seconds of the fastest stored seed went."""
    from nanoem.real import report as real_report
    from nanoem.story import STAGES
    from nanoem.lab.report import table
    from nanoem.lab.tables import markdown
    seeds = json.loads((folder / "results.json").read_text())["seeds"]
    real = json.loads((folder / "real" / "results.json").read_text())
    fastest = min(([r["seconds"][stage] for stage in STAGES] for r in seeds), key=sum)
    seconds = [f"{s:.0f}" for s in (*fastest, sum(fastest))]
    return {"README.md": [markdown(table(seeds)), markdown(real_report.table([real]))],
            "tests/benchmarks/README.md": [markdown([["stage", *STAGES, "all"],
                                                     ["seconds", *seconds]])]}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name in sys.argv[1:]:
        if name == "--report":
            results = Path(__file__).with_name("results")
            redraw(results)
            for page, tables in pages_with_tables(results).items():
                retable(Path(__file__).parents[1] / page, tables)
            continue
        Path(name).write_text(reprint(Path(name)), encoding="utf-8")
