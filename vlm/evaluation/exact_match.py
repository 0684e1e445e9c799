"""Right or wrong: the answer is one of the references, blanks at the ends and repeated ones aside."""

from __future__ import annotations

import json

from vlm.schema import Sample


def references(sample: Sample) -> list[str]:
    """What may be answered: `meta["references"]` (a JSON list) if the source gives it, else the last message."""
    if "references" in sample.meta:
        return json.loads(sample.meta["references"])
    return ["".join(piece.get("text", "") for piece in sample.messages[-1]["content"])]


def exact_match(prediction: str, sample: Sample) -> bool:
    return " ".join(prediction.split()) in {" ".join(reference.split()) for reference in references(sample)}
