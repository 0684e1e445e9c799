"""Findings of the doctor: samples to inspect, each with the reason in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.data.checkup import Checkup, Folder, answers_of, hash_answer, words
from vlm.data.duplicates import SIMILARITY, ImageHashes, closest
from vlm.schema import Source, Split

# The meaning of each kind. Training refuses the first five too.
KINDS = {
    "unreadable_image": "an image is missing, broken or refused",
    "placeholder_mismatch": "more or fewer image placeholders than images",
    "empty_text": "a text is empty",
    "too_long": "more tokens than data.max_length",
    "other_defect": "refused for another reason",
    "duplicate": "the image of an earlier sample, with the same text or under another name",
    "near_duplicate": "almost the same image as an earlier sample",
    "shared_with_val": "a training image that is also in val, the same or almost the same",
    "in_benchmark": "a training image that is also in the benchmark, the same or almost the same",
    "contradiction": "a short answer that differs from an earlier one to the same question about the same image",
    "plain_image": "an image that is nearly one color, or very dark",
    "long_text": "more characters than 1,000 and than 20 times the median",
    "repeated_answer": "an answer of 3 words or more that at least 5 samples and 5 % of the split give",
    "low_score": "the answer fits another image nearly as well, or better",
}
LONG, TIMES_MEDIAN = 1000, 20
REPEATS, REPEATED_RATIO, REPEATED_WORDS = 5, 0.05, 3


@dataclass(frozen=True)
class Finding:
    """A sample and its defect; `like` is the sample (split, index) that it repeats or contradicts."""

    split: Split
    index: int
    id: str | None  # None where the source could not read it
    kind: str
    message: str
    like: tuple[Split, int] | None = None


def find(
    checkups: Mapping[Split, Checkup],
    sources: Mapping[Split, Source],
    benchmark: Folder | None,
    *,
    similarity: float = SIMILARITY,
) -> list[Finding]:
    """All findings except low scores, in the order of split, kind and index; see `closest` for `similarity`.

    Reads one sample of each repeated answer again, to quote it.
    """
    found: list[Finding] = []
    for split, checkup in checkups.items():
        found += _bad(split, checkup)
        repeats = list(_duplicates(split, checkup))
        found += repeats
        found += _near_duplicates(split, checkup, {finding.index for finding in repeats}, similarity)
        if split == "train":
            found += _shared(checkup, checkups["val"], similarity)
            if benchmark is not None:
                found += _in_benchmark(checkup, benchmark, similarity)
        found += _contradictions(split, checkup)
        found += _plain_images(split, checkup)
        found += _long_text(split, checkup)
        found += _repeated_answers(split, checkup, sources[split])
    return found


def frequent_answers(checkup: Checkup, source: Source, num: int) -> list[dict[str, Any]]:
    """The `num` most frequent answers, ignoring case and punctuation, each spelled as in its first sample."""
    top = _answer_counts(checkup)[:num]
    return [
        {"answer": _answer(source, first, answer), "count": count, "ratio": count / len(checkup)}
        for answer, first, count in top
    ]


def lowest_scores(split: Split, checkup: Checkup, scores: NDArray[np.float64], num: int) -> list[Finding]:
    """The `num` samples with the lowest scores, in nats per token; samples without a score have NaN."""
    order = [int(index) for index in np.argsort(scores, kind="stable") if not np.isnan(scores[index])]
    return [
        _finding(
            split, checkup, index, "low_score",
            f"has a loss that rises by {scores[index]:+z.3f} nats per token with another sample's image; check that "
            "image and answer belong together",
        )
        for index in order[:num]
    ]  # fmt: skip


def _finding(
    split: Split, checkup: Checkup, index: int, kind: str, says: str, like: tuple[Split, int] | None = None
) -> Finding:
    return Finding(split, index, checkup.ids[index], kind, f"sample '{checkup.ids[index]}' {says}", like)


def _bad(split: Split, checkup: Checkup) -> Iterator[Finding]:
    for index, (kind, message) in checkup.problems.items():
        yield Finding(split, index, checkup.ids[index], kind, message)


def _duplicates(split: Split, checkup: Checkup) -> Iterator[Finding]:
    """Same image and text, or copies of an image file.

    Several texts for one file are no finding: COCO has five captions per image.
    """
    by_text: dict[tuple[int, int], int] = {}
    by_image: dict[int, int] = {}
    for index in checkup.good:
        image, text = checkup.image_digests[index], checkup.text_digests[index]
        same = by_text.setdefault((image, text), index)
        first = by_image.setdefault(image, index)
        if same < index:
            says = f"has the same images and text as sample '{checkup.ids[same]}'; remove one"
            yield _finding(split, checkup, index, "duplicate", says, like=(split, same))
        elif image and first < index and checkup.name_digests[first] != checkup.name_digests[index]:
            says = f"has the same images as sample '{checkup.ids[first]}' under another name; remove one"
            yield _finding(split, checkup, index, "duplicate", says, like=(split, first))


def _near_duplicates(split: Split, checkup: Checkup, skipped: set[int], similarity: float) -> Iterator[Finding]:
    """Compares the first occurrence of each image with the images of earlier samples."""
    first = np.sort(np.unique(checkup.hashes.pixels, return_index=True)[1])
    owners = np.array(checkup.hash_owners, dtype=np.int64)[first]
    hashes = checkup.hashes.take(first)
    near = closest(hashes, hashes, before=np.searchsorted(owners, owners), similarity=similarity)
    reported = set(skipped)
    for owner, match in zip(owners.tolist(), near.tolist(), strict=True):
        if match >= 0 and owner not in reported:
            reported.add(owner)
            other = int(owners[match])
            says = f"has almost the same image as sample '{checkup.ids[other]}'; compare the two"
            yield _finding(split, checkup, owner, "near_duplicate", says, like=(split, other))


def _shared(train: Checkup, val: Checkup, similarity: float) -> Iterator[Finding]:
    for index, match, word in _matches(train, val.hashes, similarity):
        other = val.hash_owners[match]
        says = f"has {word} image as val sample '{val.ids[other]}'; remove it, or validation measures memorized images"
        yield _finding("train", train, index, "shared_with_val", says, like=("val", other))


def _in_benchmark(train: Checkup, benchmark: Folder, similarity: float) -> Iterator[Finding]:
    for index, match, word in _matches(train, benchmark.hashes, similarity):
        says = f"has {word} image as '{benchmark.kept[match]}' in the benchmark; remove it"
        yield _finding("train", train, index, "in_benchmark", says)


def _matches(checkup: Checkup, references: ImageHashes, similarity: float) -> Iterator[tuple[int, int, str]]:
    """Samples with an image among the references: index, the first such reference, and how equal they are."""
    pixels, first, inverse = np.unique(checkup.hashes.pixels, return_index=True, return_inverse=True)
    near = closest(checkup.hashes.take(first), references, similarity=similarity)
    known = references.pixels
    last = -1
    for owner, number in zip(checkup.hash_owners, inverse.tolist(), strict=True):
        match = int(near[number])
        if match >= 0 and owner != last:
            yield owner, match, "the same" if known[match] == pixels[number] else "almost the same"
            last = owner


def _contradictions(split: Split, checkup: Checkup) -> Iterator[Finding]:
    first: dict[int, tuple[int, int]] = {}  # of a question, the answer and the sample that gives it
    reported: set[int] = set()
    answers = zip(checkup.questions, checkup.short_answers, checkup.short_answer_owners, strict=True)
    for question, answer, owner in answers:
        other, earlier = first.setdefault(question, (answer, owner))
        if answer != other and owner not in reported:
            reported.add(owner)
            whose = "itself" if earlier == owner else f"sample '{checkup.ids[earlier]}'"
            says = f"answers a question about its image differently from {whose}; keep the right answer"
            like = None if earlier == owner else (split, earlier)
            yield _finding(split, checkup, owner, "contradiction", says, like=like)


def _plain_images(split: Split, checkup: Checkup) -> Iterator[Finding]:
    for index, defect in checkup.image_defects.items():
        remedy = "for 16-bit files set data.reading.image_range=found" if "dark" in defect else "check the file"
        yield _finding(split, checkup, index, "plain_image", f"has an image that {defect}; {remedy}")


def _long_text(split: Split, checkup: Checkup) -> Iterator[Finding]:
    lengths = np.array(checkup.characters, dtype=np.int64)
    read = lengths[lengths > 0]
    limit = max(LONG, TIMES_MEDIAN * float(np.median(read))) if len(read) else LONG
    for index in np.flatnonzero(lengths > limit).tolist():
        says = f"has {lengths[index]:,} characters, more than {limit:,.0f}; shorten or remove it"
        yield _finding(split, checkup, index, "long_text", says)


def _repeated_answers(split: Split, checkup: Checkup, source: Source) -> Iterator[Finding]:
    answers, owners = np.array(checkup.answers, dtype=np.uint64), np.array(checkup.answer_owners, dtype=np.int64)
    for answer, first, count in _answer_counts(checkup):
        if count < max(REPEATS, REPEATED_RATIO * len(checkup)):
            return
        text = _answer(source, first, answer)
        if len(words(text)) < REPEATED_WORDS:
            continue
        says = f"answers '{text[:80]}', as {count} of {len(checkup)} samples do; check where these answers come from"
        for index in owners[answers == answer].tolist():
            yield _finding(split, checkup, index, "repeated_answer", says)


def _answer_counts(checkup: Checkup) -> list[tuple[int, int, int]]:
    """Each answer's hash, first sample and number of samples; the most frequent first."""
    hashes, first, counts = np.unique(np.array(checkup.answers, dtype=np.uint64), return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return [(int(hashes[i]), checkup.answer_owners[int(first[i])], int(counts[i])) for i in order]


def _answer(source: Source, index: int, answer_hash: int) -> str:
    return next(answer.strip() for answer in answers_of(source[index]) if hash_answer(answer) == answer_hash)
