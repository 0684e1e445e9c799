"""Checks of a conversation before it is rendered: turns that alternate, a placeholder for every image."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.schema import BadSample, Message
from vlm.text.templates import IMAGE_PLACEHOLDER
from vlm.text.tokenizer import BREAK


def check_turns(sample_id: str, messages: Sequence[Message], *, last: str) -> None:
    """Raise BadSample unless user and assistant alternate after an optional system message, ending with `last`."""
    roles = [message["role"] for message in messages]
    offset = int(roles[:1] == ["system"])
    for index, role in enumerate(roles[offset:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise BadSample(
                f"sample '{sample_id}' has '{role}' as message {index + offset + 1} where '{expected}' is expected; "
                "after an optional system message, user and assistant must alternate"
            )
    if roles[offset:][-1:] != [last]:
        found = f"ends with '{roles[-1]}'" if roles else "has no message"
        raise BadSample(f"sample '{sample_id}' {found} but must end with '{last}'; add or remove a message")


def check_placeholders(sample_id: str, num_images: int, num_placeholders: int) -> None:
    """Raise BadSample unless there are as many images as placeholders."""
    if num_images != num_placeholders:
        raise BadSample(
            f"sample '{sample_id}' holds {count(num_images, 'image')} but its text has "
            f"{count(num_placeholders, 'image placeholder')}; add or remove an <image>",
            "placeholder_mismatch",
        )


def texts_of(sample_id: str, messages: Sequence[Message], num_images: int) -> list[str]:
    """The text of each message, with IMAGE_PLACEHOLDER for each image."""
    num_placeholders = sum(item["type"] == "image" for message in messages for item in message["content"])
    check_placeholders(sample_id, num_images, num_placeholders)
    texts = [
        "".join(IMAGE_PLACEHOLDER if item["type"] == "image" else item["text"] for item in message["content"])
        for message in messages
    ]
    for reserved, expected in ((IMAGE_PLACEHOLDER, num_placeholders), (BREAK, 0)):
        if sum(text.count(reserved) for text in texts) != expected:
            raise BadSample(f"sample '{sample_id}' has the reserved {reserved} in its text; remove it")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON's \\ud83d gives
        raise BadSample(f"sample '{sample_id}' has text that is not valid Unicode ({error}); repair it") from error
    return texts


def count(number: int, noun: str) -> str:
    """The number and the noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def as_string(text: str) -> str:
    """The content of a message as a string."""
    return text


def as_list(text: str) -> list[dict[str, str]]:
    """The content of a message as a list of items."""
    return [{"type": "text", "text": text}]
