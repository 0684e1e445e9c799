"""Checks some samples of each split before the first step: supervised tokens, image placeholders, lengths."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from vlm.data.rows import Rows
from vlm.schema import IGNORE, BadSample
from vlm.text.row import Encoded
from vlm.text.turns import count


@dataclass(frozen=True)
class PreflightReport:
    """Token counts of some samples of a split, each in its row; `tokens` includes visual and unsupervised ones."""

    name: str
    num_bad: int  # the loader names and counts them
    tokens: list[int]  # of each good sample
    visual: list[int]
    supervised: list[int]
    shown: list[str]  # the first rows decoded, the supervised part between ⟦ and ⟧
    left_out: dict[str, int]  # `Source.left_out`, without zeros


def preflight(rows: Rows, *, num_samples: int, show: int) -> PreflightReport:
    """Encode `num_samples` samples, evenly spread over a split, as training does.

    Raises ValueError where more of them are bad than `rows` allows, or all are.
    """
    source, name = rows.source, rows.split
    taken = min(num_samples, len(source))
    if taken < 1:
        raise ValueError(f"preflight of '{name}' has {len(source)} samples; set data.root= or preflight.samples=")
    encoded: list[Encoded] = []
    shown: list[str] = []
    bad: list[BadSample] = []
    for number in range(taken):
        try:
            row = rows.reader.encoded(rows.reader.sample(source, number * len(source) // taken))
        except BadSample as error:
            bad.append(error)
            continue
        encoded.append(row)
        if len(shown) < show:
            shown.append(rows.reader.text.display(row))
    if not encoded:
        raise ValueError(
            f"preflight of '{name}' can use none of {count(taken, 'sample')}; repair the data, first: {bad[0]}"
        ) from bad[0]
    if bad:
        rows.check(len(bad), bad[-1])
    return PreflightReport(
        name=name,
        num_bad=len(bad),
        tokens=[len(row.input_ids) for row in encoded],
        visual=[sum(row.image_mask) for row in encoded],
        supervised=[sum(label != IGNORE for label in row.labels) for row in encoded],
        shown=shown,
        left_out={what: num for what, num in source.left_out.items() if num},
    )


def render(reports: Sequence[PreflightReport]) -> str:
    """A text table of the splits, followed by the rows that each report shows."""
    from rich.console import Console  # only the main process draws tables
    from rich.table import Table

    table = Table(title="Preflight: tokens per sample, before the first step", title_justify="left")
    table.add_column("split")
    for heading in (
        "samples read",
        "bad",
        "median",
        "longest",
        "median visual",
        "median supervised",
        "supervised / all",
    ):
        table.add_column(heading, justify="right")
    for report in reports:
        numbers = (len(report.tokens) + report.num_bad, report.num_bad, median(report.tokens), max(report.tokens))
        medians = (median(report.visual), median(report.supervised))
        ratio = f"{sum(report.supervised) / sum(report.tokens):.1%}"
        table.add_row(report.name, *(f"{number:,.0f}" for number in (*numbers, *medians)), ratio)
    text = io.StringIO()
    Console(file=text, width=120, markup=False, emoji=False).print(table)
    lines = [text.getvalue().rstrip()]
    lines += _left_out(reports)
    lines += [f"{report.name} {index}: {row}" for report in reports for index, row in enumerate(report.shown)]
    return "\n".join(lines) + "\n"


def _left_out(reports: Sequence[PreflightReport]) -> Iterator[str]:
    """A line per split; splits that left out the same share a line, because most sources count over the whole data."""
    splits: dict[str, list[str]] = {}
    for report in reports:
        counts = ", ".join(f"{num:,} {_singular(what) if num == 1 else what}" for what, num in report.left_out.items())
        splits.setdefault(counts, []).append(report.name)
    return (f"{' and '.join(names)} left out: {counts}" for counts, names in splits.items() if counts)


def _singular(what: str) -> str:
    """The phrase with its first plural as a singular: a text file without an image."""
    return re.sub(r"ie\b", "y", re.sub(r"^(.*?\w)s\b", r"\1", what, count=1), count=1)
