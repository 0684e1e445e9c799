"""A look at some samples of a split before step 0: is there something to learn, and does every image have its place?"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlm.schema import IGNORE, BadSample, Source
from vlm.text.encode import TextEncoder
from vlm.text.row import Encoded


@dataclass(frozen=True)
class PreflightReport:
    """What some rows of one split hold, in tokens; `num_tokens` counts all, visual ones included."""

    name: str
    num_samples: int  # read and encoded
    num_unreadable: int  # left to the loader's quarantine
    num_tokens: int
    num_supervised_tokens: int
    num_visual_tokens: int
    longest_row: int
    shown: list[str]  # the first rows decoded, the supervised part between ⟦ and ⟧
    left_out: dict[str, int]  # what the source passes over in its data, and how much of it


def preflight(
    *,
    name: str,
    source: Source,
    encoder: TextEncoder,
    num_samples: int,
    show: int,
    max_answers: int | None = None,
) -> PreflightReport:
    """Takes `num_samples` samples, evenly spread over the split `name`, through tokenizer and chat template.

    Raises ValueError on the first sample that `TextEncoder.encode` refuses (no supervised token, a missing end of turn,
    cut image tokens, images and placeholders that differ) or that has more than `max_answers` to learn, and where no
    sample can be had at all. A sample that cannot be read is counted only.
    """
    taken = min(num_samples, len(source))
    if taken < 1:
        raise ValueError(
            f"preflight of '{name}' has {len(source)} samples to look at; set data.root= or preflight.samples="
        )
    rows: list[Encoded] = []
    shown: list[str] = []
    unreadable: list[BadSample] = []
    for index in range(taken):
        try:
            sample = source[index * len(source) // taken]
        except BadSample as error:
            unreadable.append(error)
            continue
        try:
            row = encoder.encode(sample.id, sample.messages, len(sample.images), sample.sizes)
            _check_answers(sample.id, len(encoder.supervised(row)), max_answers)
        except ValueError as error:
            raise ValueError(f"preflight of '{name}': {error}") from error
        rows.append(row)
        if len(shown) < show:
            shown.append(encoder.display(row))
    if not rows:
        raise ValueError(
            f"preflight of '{name}' could read none of {taken} samples; repair the data, first: {unreadable[0]}"
        ) from unreadable[0]
    return PreflightReport(
        name=name,
        num_samples=len(rows),
        num_unreadable=len(unreadable),
        num_tokens=sum(len(row.input_ids) for row in rows),
        num_supervised_tokens=sum(label != IGNORE for row in rows for label in row.labels),
        num_visual_tokens=sum(sum(row.image_mask) for row in rows),
        longest_row=max(len(row.input_ids) for row in rows),
        shown=shown,
        left_out={what: num for what, num in getattr(source, "left_out", {}).items() if num},
    )


def _check_answers(sample_id: str, num_answers: int, most: int | None) -> None:
    if most is not None and num_answers > most:
        raise ValueError(
            f"sample '{sample_id}' has {num_answers} answers, but an encoder-decoder llm learns {most} a row; "
            "set data.train_on=last_assistant or choose data with one answer a sample (of shapes, data.num_questions=1)"
        )


def render(reports: Sequence[PreflightReport]) -> str:
    """A text table of the splits, followed by the rows that each report shows."""
    from rich.console import Console  # only the main process draws tables
    from rich.table import Table

    table = Table(title="Preflight", title_justify="left")
    table.add_column("split")
    for heading in ("samples", "unreadable", "supervised", "total", "share", "visual", "longest row"):
        table.add_column(heading, justify="right")
    for report in reports:
        counts = (report.num_samples, report.num_unreadable, report.num_supervised_tokens, report.num_tokens)
        share = f"{report.num_supervised_tokens / report.num_tokens:.1%}"
        tail = (share, f"{report.num_visual_tokens:,}", f"{report.longest_row:,}")
        table.add_row(report.name, *(f"{count:,}" for count in counts), *tail)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    lines = [text.getvalue().rstrip()]
    lines += _left_out(reports)
    lines += [f"{report.name} {index}: {row}" for report in reports for index, row in enumerate(report.shown)]
    return "\n".join(lines) + "\n"


def _left_out(reports: Sequence[PreflightReport]) -> Iterator[str]:
    """A line a split; one for all that have left out the same, as most count over the whole of the data."""
    splits: dict[str, list[str]] = {}
    for report in reports:
        counts = ", ".join(f"{num:,} {what}" for what, num in report.left_out.items())
        splits.setdefault(counts, []).append(report.name)
    return (f"{' and '.join(names)} left out: {counts}" for counts, names in splits.items() if counts)
