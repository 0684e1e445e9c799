"""A picture of what a run learns: the accuracy of each type of question over the minutes of training.

    python train.py experiment=shapes_one_stage evaluators.answers.at=validation run_dir=RUN
    python -m benchmarks.skills RUN docs/skills.svg

Each color is a type of question; its flat line is the best that can be answered without the image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vlm.report.svg import COLORS, Series, lines

SCORE, WITHOUT_IMAGE = "val/accuracy/", "val/accuracy_no_image/"


def series(run: Path) -> list[Series]:
    """The curves of a run directory, with points in minutes and percent."""
    validations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = json.loads((run / "metrics.json").read_text())
    minutes = final["perf/step_seconds"] / 60
    found = []
    kinds = sorted(name.removeprefix(SCORE) for name in final if name.startswith(SCORE))
    for kind, color in zip(kinds, COLORS, strict=False):
        points = [(row["step"] * minutes, 100 * row[SCORE + kind]) for row in validations if SCORE + kind in row]
        blind = 100 * final[WITHOUT_IMAGE + kind]
        found.append(Series(points, color, kind))
        found.append(Series([(points[0][0], blind), (points[-1][0], blind)], color, opacity=0.35))
    return found


if __name__ == "__main__":
    picture = lines("Right answers by type", "minutes of training", "%", series(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(picture, encoding="utf-8")
