"""`data.filter=`: leaves out the samples that vlm-doctor lists in its filter.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.files import read_inside
from vlm.data.reading import current
from vlm.data.sample_reader import read
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed

NUM_CHECKED = 32  # samples whose ids are compared with the file; each has to be read
BYTES_PER_SAMPLE = 1024  # maximum size of the file


class Filtered(Source):
    """A source without the samples `left_out`; the others keep their order.

    The attribute `left_out` counts them, together with those that the source itself leaves out.
    """

    def __init__(self, source: Source, *, split: Split, left_out: Sequence[int]) -> None:
        self.source, self.names = source, source.names
        removed = set(left_out)
        self.kept = [index for index in range(len(source)) if index not in removed]
        ratio = f"{len(removed) / max(1, len(source)):.0%}".replace("%", " %")
        self.left_out = {**source.left_out, f"samples by data.filter ({ratio} of {split})": len(removed)}

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.kept[index]]

    def outline(self, index: int) -> Sample:
        return self.source.outline(self.kept[index])

    def order(self, epoch: int, *, seed: int) -> list[int] | None:
        order = self.source.order(epoch, seed=seed)
        if order is None:
            return None
        new = {index: number for number, index in enumerate(self.kept)}
        return [new[index] for index in order if index in new]

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        return self.source.stored_images(self.kept if indices is None else [self.kept[index] for index in indices])

    def fingerprint(self) -> str:
        """A hash of the source's fingerprint and of the remaining indices."""
        return hashed(self.source.fingerprint(), *self.kept)


def filtered(sources: Mapping[Split, Source], file: str) -> dict[Split, Source]:
    """The splits without the samples that the file lists.

    Raises ValueError where the file does not exist, or was made for other data (another number of samples or other
    ids).
    """
    path = Path(file).expanduser().resolve()
    if not path.exists():
        raise ValueError(f"there is no file '{file}'; set data.filter= to a filter.json of vlm-doctor")
    limit = current().max_text_bytes + BYTES_PER_SAMPLE * sum(map(len, sources.values()))
    data = read_inside(path.name, root=path.parent, what="filter", option="max_text_bytes", limit=limit)
    try:
        document = json.loads(data)
        listed = {split: _listed(split, document) for split in sources}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is not a filter.json ({error}); run vlm-doctor again") from error
    kept: dict[Split, Source] = {}
    for split, source in sources.items():
        num_samples, ids = listed[split]
        _check(file, split, source, num_samples, ids)
        kept[split] = Filtered(source, split=split, left_out=list(ids))
    return kept


def _listed(split: Split, document: Any) -> tuple[int, dict[int, Any]]:
    """The number of samples of a split, and index and id of each sample to leave out."""
    part = document.get(split) if isinstance(document, dict) else None
    kinds = {"num_samples": int, "indices": list, "ids": list}
    if not isinstance(part, dict) or any(type(part.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(f"it has no {split!r} with num_samples, indices and ids")
    num_samples, indices, ids = (part[key] for key in kinds)
    for index in indices:
        if type(index) is not int or not 0 <= index < num_samples:
            raise ValueError(f"{split} has {num_samples} samples, so index {index!r} does not exist")
    if len(indices) != len(ids):
        raise ValueError(f"{split} has {len(indices)} indices and {len(ids)} ids")
    return num_samples, dict(zip(indices, ids, strict=True))


def _check(file: str, split: Split, source: Source, num_samples: int, ids: Mapping[int, str | None]) -> None:
    if num_samples != len(source):
        raise ValueError(
            f"data.filter={file} was made for {num_samples} samples of {split}, which has {len(source)}; "
            "run vlm-doctor again"
        )
    step = -(-len(ids) // NUM_CHECKED) or 1
    for index in list(ids)[::step]:
        now = _id(source, index)
        if now != ids[index]:
            raise ValueError(
                f"data.filter={file} has the id {ids[index]!r} for sample {index} of {split}, whose id is now {now!r}; "
                "run vlm-doctor again"
            )


def _id(source: Any, index: int) -> str | None:
    """The sample's id; None for one that cannot be read."""
    try:
        return read(source, index, reading=current()).id
    except BadSample:
        return None
