"""Documents of images and text in turn: MMC4 (arXiv 2304.06939) and OBELICS (arXiv 2306.16527)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from vlm.data.conversations import Conversation
from vlm.data.record_keys import Malformed
from vlm.data.sources.instruct import Conversations
from vlm.data.split import digest
from vlm.quote import quoted
from vlm.ranges import Number, Range, Ratio, RatioBelowOne
from vlm.schema import Content, Message, Split

Images = Annotated[int, Range(1, 1_000)]
Similarity = Annotated[Number, Range(-1, 1)]


class Interleaved(Conversations):
    """One sample per document with an image. Each text after an image is an answer, and is supervised:

        (text) image text image image text   ->   user: (text) image   assistant: text   user: image image   …

    So Flamingo's loss (OpenFlamingo, arXiv 2308.01390) has no term for the text before the first image. With the chat
    template `caption`, a text ends with a newline; other templates end it with their end of turn.

    `left_out` counts the documents without an image, and those with one image that `keep_single_image` drops.

    Args:
        annotations, images, val_annotations, val_fraction: see `Conversations`.
        max_images: the number of images of a document that are kept, the first ones.
        min_similarity: MMC4's similarity (CLIP) of an image and its sentence below which the image is left out.
        keep_single_image: the ratio of the documents with one image that are kept, chosen by a hash of their id.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path,
        val_annotations: str | Path | None = None,
        val_fraction: RatioBelowOne = 0.05,
        max_images: Images = 5,
        min_similarity: Similarity = 0.24,
        keep_single_image: Ratio = 0.5,
    ) -> None:
        super().__init__(
            split=split,
            reader=DocumentReader(max_images=max_images, min_similarity=min_similarity),
            annotations=annotations,
            images=images,
            val_annotations=val_annotations,
            val_fraction=val_fraction,
        )
        named = [self._names[index] for index in self._indices.tolist()]
        numbers = np.array([-1 if names is None else len(names) for names in named])  # -1: malformed
        is_kept = [digest(f"single image {index}") < keep_single_image * 2**64 for index in self._indices.tolist()]
        dropped = (numbers == 1) & ~np.array(is_kept)
        self.left_out = {
            "documents without an image": int((numbers == 0).sum()),
            "documents with a single image": int(dropped.sum()),
        }
        self._indices = self._indices[(numbers != 0) & ~dropped]
        if not len(self._indices):
            raise ValueError(
                f"no document of the {split} split in '{annotations}' has an image that is kept; set "
                "data.min_similarity= lower, data.keep_single_image=1 or data.val_fraction= to another ratio"
            )


@dataclass(frozen=True, kw_only=True)
class DocumentReader:
    """Reads a document as a conversation in which each text after images is an answer to them.

    A document is MMC4's `{"text_list": [sentences], "image_info": [{"image_name", "matched_text_index",
    "matched_sim"}]}`, where an image comes before its sentence, or OBELICS' `{"texts": [text or null], "images": [name
    or null]}`. Images after the last text are left out. Raises `Malformed` for any other record.
    """

    max_images: int
    min_similarity: float

    def images(self, record: Mapping[str, Any]) -> list[str]:
        return self.conversation(record).images

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        if "text_list" in record:
            pieces = list(self._of_mmc4(record))
        elif "texts" in record:
            pieces = list(_of_obelics(record))
        else:
            raise Malformed("has neither 'text_list' (MMC4) nor 'texts' (OBELICS); write one of them")
        runs = [(kind, [value for _, value in run]) for kind, run in groupby(pieces, key=lambda piece: piece[0])]
        messages: list[Message] = []
        names: list[str] = []
        question: list[Content] = []
        for kind, values in runs:
            if kind == "image":
                kept = values[: self.max_images - len(names)]
                names += kept
                question += [Content(type="image") for _ in kept]
                continue
            text = Content(type="text", text=" ".join(values))
            if not names:
                question.append(text)
            elif any(piece["type"] == "image" for piece in question):
                messages += [Message(role="user", content=question), Message(role="assistant", content=[text])]
                question = []
            else:  # the images before it were too many
                answer = messages[-1]["content"][0]
                answer["text"] = f"{answer['text']} {text['text']}"
        unread = sum(piece["type"] == "image" for piece in question)  # no text comes after them
        return Conversation(messages, names[: len(names) - unread])

    def _of_mmc4(self, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        sentences, infos = record["text_list"], record.get("image_info")
        if not isinstance(sentences, list) or not isinstance(infos, list):
            raise Malformed("has a 'text_list' or 'image_info' that is not a list; write both as lists")
        before: dict[int, list[str]] = {}
        for info in infos:
            place, similarity = (info.get(key) for key in ("matched_text_index", "matched_sim"))
            name = info.get("image_name")
            if not isinstance(name, str) or type(place) is not int or not 0 <= place < len(sentences):
                raise Malformed(
                    f"has an image {quoted(name)} of sentence {quoted(place)} of {len(sentences)}; name an image and "
                    "one of the sentences"
                )
            if isinstance(similarity, int | float) and similarity >= self.min_similarity:
                before.setdefault(place, []).append(name)
        for number, sentence in enumerate(sentences):
            yield from (("image", name) for name in before.get(number, ()))
            yield from _text(sentence)


def _of_obelics(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    texts, images = record["texts"], record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise Malformed("has 'texts' and 'images' that are not lists of one length; write a null beside each value")
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise Malformed("has a place with both a text and an image, or with neither; write one of them")
        if image is None:
            yield from _text(text)
        elif isinstance(image, str):
            yield "image", image
        else:
            raise Malformed(f"has an image {quoted(image)}; write the name of a file")


def _text(value: Any) -> Iterator[tuple[str, str]]:
    """The piece of a text, without the spaces around it; none if it is blank."""
    if not isinstance(value, str):
        raise Malformed(f"has a text {quoted(value)}; write it as a string")
    if text := value.strip():
        yield "text", text
