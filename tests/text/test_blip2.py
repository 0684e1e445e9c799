"""Rows of BLIP-2's second stage and of InstructBLIP: what comes first, and what is learned."""

from __future__ import annotations

from tests.helpers.text import encoder, merging_tokenizer
from vlm.data.conversations import caption_messages
from vlm.schema import IGNORE, Content, Message, Sample

K = 3


def test_a_caption_comes_after_the_image_and_the_bos_token() -> None:
    """As LAVIS: the visual tokens, then <bos> caption newline; without a prompt, and the caption alone is learned."""
    tokenizer = merging_tokenizer()
    subject = encoder(tokenizer, "blip2", num_image_tokens=K)
    sample = Sample("a/1", [], caption_messages("", "a red circle"))
    row = subject.encode(sample)
    caption, end = (tokenizer.encode(text, add_special_tokens=False) for text in ("a red circle", "\n"))
    prompt = [subject.pad_id] * K + [tokenizer.bos_token_id]
    assert row.input_ids == [*prompt, *caption, *end]
    assert row.labels == [IGNORE] * (K + 1) + [*caption, *end]
    assert row.image_mask == [True] * K + [False] * (len(row.input_ids) - K)
    assert subject.encode_prompt(sample).input_ids == prompt
    assert set(end) <= set(subject.stop_ids)


def test_a_long_caption_is_cut_as_a_tokenizer_does() -> None:
    subject = encoder(merging_tokenizer(), "blip2", num_image_tokens=K, max_length=8, too_long="truncate")
    whole = encoder(merging_tokenizer(), "blip2", num_image_tokens=K)
    sample = Sample("a/1", [], caption_messages("", "a red circle and two blue squares"))
    assert subject.encode(sample).input_ids == whole.encode(sample).input_ids[:8]


def test_instructblip_writes_no_roles_and_the_image_before_the_bos_token() -> None:
    tokenizer = merging_tokenizer()
    subject = encoder(tokenizer, "instructblip", num_image_tokens=K)
    row = subject.encode(Sample("a/1", [], caption_messages("What is this?", "a star")))
    assert subject.display(row) == "<image×3><bos>What is this?⟦ a star<eos>⟧"
    two: list[Content] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Alike?"}, {"type": "image"}]
    messages: list[Message] = [{"role": "user", "content": two}]
    prompt = subject.encode_prompt(Sample("a/2", [], messages))
    assert subject.display(prompt) == "<image×3><image×3><bos>Alike?<image×3>"
