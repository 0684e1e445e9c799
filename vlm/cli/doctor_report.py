"""The report of vlm-doctor: tables on the terminal, report.json, report.html with thumbnails, and filter.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from rich.table import Table
from rich.text import Text

from vlm import files
from vlm.data.checkup import Checkup, Folder, text_of
from vlm.data.findings import KINDS, Finding, frequent_answers
from vlm.data.images import to_rgb
from vlm.quote import one_line
from vlm.report import html
from vlm.schema import Source, Split
from vlm.training.artifact import write_json
from vlm.training.run import CONSOLE

SHOWN = 24  # findings of a kind in report.html; report.json has all
BINS, ANSWERS, LANGUAGES = 12, 10, 12
HIGH = 99  # percentile at which a histogram ends if the largest values are far beyond it
LENGTHS = ("tokens", "visual_tokens", "characters")
HEADINGS = {  # with units
    "tokens": "tokens",
    "visual_tokens": "visual tokens",
    "characters": "characters",
    "score": "score (nats per token)",
}
STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .8rem }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere; font-size: 13px }
.card img { max-height: 130px; margin-right: .4rem; border: 1px solid #eee } .text { color: #555 }
.bar { display: inline-block; height: .7rem; background: #4a7ebb }
"""


def summary(
    parts: Mapping[str, str],
    num_tokens: int,
    checkups: Mapping[Split, Checkup],
    sources: Mapping[Split, Source],
    benchmark: Folder | None,
) -> dict[str, Any]:
    """The report without findings: lengths, languages and frequent answers of each split.

    `parts` has the name of each part's option.
    """
    return {
        "parts": dict(parts),
        "visual_tokens_per_image": num_tokens,
        "against": benchmark
        and {"folder": str(benchmark.root), "images": len(benchmark), "unreadable": benchmark.num_unreadable},
        "splits": {
            split: {
                "samples": len(checkup),
                **{name: statistics(_lengths(checkup, name)) for name in LENGTHS},
                "languages": dict(checkup.languages.most_common()),
                "answers": frequent_answers(checkup, sources[split], ANSWERS),
            }
            for split, checkup in checkups.items()
        },
    }


def statistics(values: ArrayLike) -> dict[str, Any]:
    """Mean, median, 95th percentile, minimum, maximum and a histogram of the values that are not NaN.

    Empty if there are no values. The histogram ends at a high percentile if the maximum is beyond twice that range, and
    `beyond` counts the larger values. Otherwise one text of 19,000 tokens would put all others into the first bar.
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return {}
    low, high = float(numbers.min()), float(numbers.max())
    last = float(np.percentile(numbers, HIGH, method="lower"))
    last = last if low < last and high - low > 2 * (last - low) else high
    shown = numbers[numbers <= last]
    counts, edges = np.histogram(shown, bins=BINS if low < last else 1, range=(low, last if low < last else low + 1))
    p50, p95 = np.percentile(numbers, [50, 95]).tolist()
    figures = {"mean": float(numbers.mean()), "p50": p50, "p95": p95}
    figures |= {"min": low, "max": high}
    histogram = {"edges": edges.tolist(), "counts": counts.tolist(), "beyond": len(numbers) - len(shown)}
    return {**figures, "histogram": histogram}


def filter_of(
    checkups: Mapping[Split, Checkup], findings: Sequence[Finding], kinds: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The content of filter.json: index and id of each sample with a finding of these kinds, for each split."""
    result = {}
    for split, checkup in checkups.items():
        indices = sorted({f.index for f in findings if f.split == split and f.kind in kinds})
        ids = [checkup.ids[index] for index in indices]
        result[str(split)] = {"num_samples": len(checkup), "indices": indices, "ids": ids}
    return result


def left_out(chosen: Mapping[str, Mapping[str, Any]], findings: Sequence[Finding], kinds: Collection[str]) -> list[str]:
    """One line per split: the samples that the filter leaves out, and the findings that cause it."""
    lines = []
    for split, part in chosen.items():
        if num := len(part["indices"]):
            counts = Counter(finding.kind for finding in findings if finding.split == split and finding.kind in kinds)
            why = ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())
            percent = f"{100 * num / part['num_samples']:.0f} %"
            lines.append(
                f"filter.json leaves out {percent} of {split}, {num:,} of {part['num_samples']:,} samples ({why})"
            )
    return lines


def print_tables(report: Mapping[str, Any], findings: Sequence[Finding], kinds: Collection[str]) -> None:
    """Findings by kind, then lengths, languages and answers."""
    splits = report["splits"]
    table = Table(title="Findings")
    table.add_column("kind")
    for split in splits:
        table.add_column(f"{split}, of {splits[split]['samples']:,} samples", justify="right")
    table.add_column("in filter.json")
    table.add_column("meaning")
    counts = Counter((finding.kind, finding.split) for finding in findings)
    for kind, what in KINDS.items():
        numbers = [counts[kind, split] for split in splits]
        if any(numbers):
            table.add_row(kind, *(f"{n:,}" for n in numbers), "yes" if kind in kinds else "no", what)
    if not findings:
        table.add_row("none", *("0" for _ in splits), "", "nothing was found")
    CONSOLE.print(table)
    for kind in KINDS:
        if first := next((finding for finding in findings if finding.kind == kind), None):
            CONSOLE.print(Text(one_line(f"First {kind}: {first.message}")), soft_wrap=True)
    table = Table(title=f"Lengths of samples, with {report['visual_tokens_per_image']} visual tokens per image")
    for heading in ("split", "length", "mean", "p50", "p95", "max"):
        table.add_column(heading, justify="left" if heading in ("split", "length") else "right")
    for split, part in splits.items():
        for name in (*LENGTHS, "score"):
            if part.get(name):
                digits = "+z,.3f" if name == "score" else ",.0f"
                figures = (format(part[name][figure], digits) for figure in ("mean", "p50", "p95", "max"))
                table.add_row(split, HEADINGS[name], *figures)
    if table.row_count:
        CONSOLE.print(table)
    for split, part in splits.items():
        for name, counted in _most_frequent(part).items():
            shown = ", ".join(f"{value} {count:,}" for value, count in counted)
            CONSOLE.print(Text(one_line(f"{split}, {name} (samples): {shown}")))


def write(out: Path, report: Mapping[str, Any], findings: Sequence[Finding], sources: Mapping[Split, Source]) -> None:
    """Write report.json and report.html. The samples that report.html shows are read again."""
    counts = Counter((finding.split, finding.kind) for finding in findings)
    by_kind = {split: {kind: counts[split, kind] for kind in KINDS} for split in sources}
    write_json(out / "report.json", {**report, "counts": by_kind, "findings": [asdict(f) for f in findings]})
    page = _page(report, findings, sources)
    with files.create(out / "report.html") as file:
        file.write(page)


def _lengths(checkup: Checkup, name: str) -> np.ndarray:
    """Lengths of the samples that could be read and tokenized."""
    tokens = np.array(checkup.tokens)
    return np.array(getattr(checkup, name))[tokens > 0]


def _most_frequent(part: Mapping[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """The most frequent languages and answers, each with its number of samples."""
    languages = [("too short to identify" if name == "short" else name, n) for name, n in part["languages"].items()]
    languages = languages[:LANGUAGES]
    answers = [(f"'{entry['answer'][:60]}'", entry["count"]) for entry in part["answers"]]
    return {name: counts for name, counts in (("languages", languages), ("most frequent answers", answers)) if counts}


def _page(report: Mapping[str, Any], findings: Sequence[Finding], sources: Mapping[Split, Source]) -> str:
    splits = report["splits"]
    counts = Counter((finding.kind, finding.split) for finding in findings)
    rows = [[kind, *(counts[kind, split] for split in splits)] for kind in KINDS]
    parts = [f"{part}: {name}" for part, name in report["parts"].items()]
    if against := report["against"]:
        parts.append(
            f"compared with {against['images']:,} images of {against['folder']} ({against['unreadable']} unreadable)"
        )
    body = [
        f"<h1>vlm-doctor</h1><p class=note>{escape(' · '.join(parts))}</p>",
        html.table(["kind", *(f"{split}, of {part['samples']:,} samples" for split, part in splits.items())], rows),
    ]
    for split, part in splits.items():
        charts = [_histogram(name, part[name]) for name in (*LENGTHS, "score") if part.get(name)]
        charts += [f"<div><h3>{name} (samples)</h3>{_bars(bars)}</div>" for name, bars in _most_frequent(part).items()]
        body.append(f"<h2>{escape(split)}</h2><div class=row>{''.join(charts)}</div>")
    for kind, what in KINDS.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            shown = of_kind[:SHOWN]
            more = f" (the first {len(shown)} are shown)" if len(shown) < len(of_kind) else ""
            cards = "".join(_card(finding, sources) for finding in shown)
            heading = f"<h2>{kind}: {len(of_kind):,}</h2><p class=note>{escape(what)}{more}</p>"
            body.append(f"{heading}<div class=cards>{cards}</div>")
    return html.document("vlm-doctor", body, style=STYLE)


def _histogram(name: str, figures: Mapping[str, Any]) -> str:
    digits = "+z.2f" if name == "score" else ",.0f"
    line = ", ".join(f"{key} {format(figures[key], digits)}" for key in ("mean", "p50", "p95", "max"))
    edges, counts = figures["histogram"]["edges"], figures["histogram"]["counts"]
    rows = [(format(edge, digits), count) for edge, count in zip(edges, counts, strict=False)]
    if beyond := figures["histogram"]["beyond"]:
        rows.append((f"beyond {format(edges[-1], digits)}", beyond))
    bars = _bars(rows)
    return f"<div><h3>{HEADINGS[name]}</h3><p class=note>{line}</p>{bars}</div>"


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max(1, *(count for _, count in rows))
    lines = (
        f"<tr><td>{escape(name)}</td><td>{count:,}</td>"
        f"<td style='text-align:left'><span class=bar style='width:{120 * count / most:.0f}px'></span></td></tr>"
        for name, count in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _card(finding: Finding, sources: Mapping[Split, Source]) -> str:
    """A finding with its images and its text, and the images of the sample that it repeats."""
    samples = [(finding.split, finding.index), *([finding.like] if finding.like else [])]
    images, text = "", ""
    for number, (split, index) in enumerate(samples):
        try:
            sample = sources[split][index]
            shown = [to_rgb(image, name="") for image in sample.images[:4] if isinstance(image, Image.Image)]
        except ValueError:  # the finding itself is about an unreadable sample
            continue
        images += "".join(map(html.thumbnail, shown))
        if not number:
            text = " ⏎ ".join(f"{message['role']}: {text_of(message)}" for message in sample.messages)
    text = text if len(text) <= 300 else text[:300] + "…"
    position = f"{finding.split} {finding.index}"
    return (
        f"<div class=card>{images}<div><b>{position}</b> {escape(finding.message)}</div>"
        f"<div class=text>{escape(text)}</div></div>"
    )
