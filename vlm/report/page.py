"""A report as one self-contained HTML page, as Markdown, and on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vlm.files import escape_controls
from vlm.quote import one_line
from vlm.report import html, pictures
from vlm.report.runs import Run
from vlm.report.tables import NUM_COLUMNS, Comparison, tables
from vlm.training import results, run

NUM_SAMPLES = 12  # in the table of answers
LONGEST = 300  # characters of a text in a cell
STYLE = """
body { max-width: 94rem } .scroll { overflow-x: auto }
table { font-size: 13px } th { vertical-align: bottom; border-bottom: 1px solid #bbb } td, th { padding-right: 1.1rem }
td { border-bottom: 1px solid #eee; white-space: nowrap } td + td { font-variant-numeric: tabular-nums }
.answers td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; min-width: 7rem }
.answers th { text-align: left } .answers img { max-height: 110px; border: 1px solid #eee }
.correct { color: #00703c } .wrong { color: #b3261e }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem } .key { margin-right: 1.4rem; white-space: nowrap }
"""
# Thumbnails by the id of a sample, as HTML, and why there are none where that is so.
Images = tuple[Mapping[str, str], str]


def page(title: str, comparison: Comparison, images: Images) -> str:
    """The page."""
    body = [f"<h1>{escape(_clean(title))}</h1>"]
    for table in tables(comparison):
        rows = [[_clean(cell) for cell in row] for row in table.rows]
        note = f"<p class=note>{escape(_clean(table.note))}</p>"
        cells = html.table([_clean(heading) for heading in table.headings], rows)
        body.append(f"<h2>{escape(_clean(table.title))}</h2>{note}<div class=scroll>{cells}</div>")
    if missing := no_comparison(comparison):
        body.append(f"<p class=note>{escape(missing)}</p>")
    if errors := _errors(comparison):
        body.append("<h2>Failed jobs</h2>" + html.table(["run", "error"], errors))
    for heading, draw in _PICTURES.items():
        if drawn := draw(comparison):
            body.append(f"<h2>{heading}</h2>{drawn}")
    body += _answers(comparison, images)
    return html.document(_clean(title), body, style=STYLE)


_PICTURES: dict[str, Callable[[Comparison], str]] = {
    "Curves": pictures.curves,
    "Quality and cost": pictures.trade_offs,
    "Search": pictures.search,
}


def markdown(title: str, comparison: Comparison) -> str:
    """The tables, and answers."""
    parts = [f"# {_cell(title)}"]
    for table in tables(comparison):
        parts += [f"## {_cell(table.title)}", _cell(table.note), _markdown_table(table.headings, table.rows)]
    if missing := no_comparison(comparison):
        parts.append(missing)
    if errors := _errors(comparison):
        parts += ["## Failed jobs", _markdown_table(["run", "error"], errors)]
    headings, rows = _answer_rows(comparison)
    if rows:
        parts += ["## Answers", _markdown_table(headings, [[text for text, _ in row] for row in rows])]
    return "\n\n".join(parts) + "\n"


def show(comparison: Comparison) -> None:
    """Print the tables."""
    for table in tables(comparison):
        results.print_table(table.title, table.headings, table.rows)
        run.CONSOLE.print(table.note, soft_wrap=True)
    if missing := no_comparison(comparison):
        run.CONSOLE.print(missing, soft_wrap=True)


def no_comparison(comparison: Comparison) -> str:
    """Why choices are not compared; empty where they are, or where there is one."""
    if len(comparison.choices) < 2 or comparison.has_spread:
        return ""
    return (
        f"The best {comparison.metric} has {comparison.best}. Each choice has one finished run, so that nothing is "
        "known about the spread; add seed=0,1,2 to compare."
    )


def _errors(comparison: Comparison) -> list[list[str]]:
    return [[_clean(run.name), _clean(run.error)] for run in comparison.runs if run.error]


def _answers(comparison: Comparison, images: Images) -> list[str]:
    """The table of answers with images."""
    headings, rows = _answer_rows(comparison)
    if not rows:
        return []
    thumbnails, why_none = images
    lines = []
    for row in rows:
        picture = thumbnails.get(row[0][0], "")
        cells = "".join(f"<td class='{kind}'>{escape(_clean(text))}</td>" for text, kind in row)
        lines.append(f"<tr><td>{picture}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(_clean(heading))}</th>" for heading in ("image", *headings))
    note = f"The first {len(rows)} validation samples of samples.jsonl. {why_none}"
    return [
        f"<h2>Answers</h2><p class=note>{escape(_clean(note))}</p>",
        f"<div class='scroll answers'><table><tr>{head}</tr>{''.join(lines)}</table></div>",
    ]


def shown_runs(comparison: Comparison) -> list[Run]:
    """The runs whose answers are shown: the first one of each of the first choices."""
    firsts = [runs[0] for runs in comparison.choices.values()] or list(comparison.runs)
    return [run for run in firsts if run.samples][:NUM_COLUMNS]


def _answer_rows(comparison: Comparison) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Headings, and for each sample its id, question, reference and the answers of the runs.

    A cell is a text and the kind of the answer, `correct` or `wrong`, empty for other texts.
    """
    shown = shown_runs(comparison)
    if not shown:
        return [], []
    answers: list[dict[Any, Mapping[str, Any]]] = [
        {(sample.get("id"), sample.get("prompt")): sample for sample in run.samples} for run in shown
    ]
    rows = []
    for sample in shown[0].samples[:NUM_SAMPLES]:
        row = [(_text(sample.get(key)), "") for key in ("id", "prompt", "reference")]
        for of_run in answers:
            answer = of_run.get((sample.get("id"), sample.get("prompt")))
            kind = "" if answer is None else "correct" if answer.get("correct") else "wrong"
            row.append(("-" if answer is None else _text(answer.get("prediction")) or "(empty)", kind))
        rows.append(row)
    return ["sample", "question", "reference", *(run.name for run in shown)], rows


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _clean(text: Any) -> str:
    return escape_controls(str(text))


def _cell(text: str) -> str:
    """A text from data as plain text in Markdown."""
    for character in "\\`*_<>[]|&":
        text = text.replace(character, f"\\{character}")
    return one_line(text)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [[_cell(heading) for heading in headings], rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
