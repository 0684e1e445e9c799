"""Compare runs on one page: vlm-report DIR [DIR …], where DIR is a run, a sweep, or a folder of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.launch.entry import fail, mistake, quiet


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(
        prog="vlm-report",
        description="Write report.html (one page, with pictures) and report.md about runs, and print their tables.",
    )
    parsed.add_argument("dirs", nargs="+", metavar="DIR", type=Path, help="a run, a sweep, or a folder of them")
    parsed.add_argument(
        "--out", type=Path, help="folder of report.html and report.md (default: DIR, or this folder for several)"
    )
    parsed.add_argument("--no-images", action="store_true", help="do not read the images of the validation samples")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parser().parse_args(arguments)
    quiet()
    try:
        report(asked.dirs, asked.out or (asked.dirs[0] if len(asked.dirs) == 1 else Path()), images=not asked.no_images)
    except (ValueError, OSError) as error:
        fail(mistake(error) or str(error))


def report(folders: Sequence[Path], out: Path, *, images: bool = True) -> None:
    """Write and print the report of all runs in or below the folders. Raises ValueError where there is none."""
    from vlm import files
    from vlm.cli.report_images import images_of
    from vlm.report import page
    from vlm.report.runs import read_runs
    from vlm.report.tables import Comparison
    from vlm.training.run import CONSOLE

    comparison = Comparison(read_runs(folders))
    shown = page.shown_runs(comparison)
    thumbnails = images_of(shown[0], page.NUM_SAMPLES) if images and shown else ({}, "")
    title = ", ".join(map(str, folders))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "report.html": page.page(title, comparison, thumbnails),
        "report.md": page.markdown(title, comparison),
    }.items():
        with files.create(out / name) as file:
            file.write(text)
    page.show(comparison)
    CONSOLE.print(f"Report: {out / 'report.html'} and report.md", soft_wrap=True)


if __name__ == "__main__":
    main()
