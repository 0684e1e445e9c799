"""What the text encoder refuses, and the words in which it does."""

from __future__ import annotations

import pytest

from tests.helpers.text import encoder, say, templated
from vlm.schema import IGNORE, BadSample, Sample
from vlm.text.row import Encoded
from vlm.text.templates import IMAGE_PLACEHOLDER


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (
            [say("user", IMAGE_PLACEHOLDER[:5], IMAGE_PLACEHOLDER[5:]), say("assistant", "no")],
            "sample 'coco/000123' has the reserved <|vlm:image|> in its text; remove it",
        ),
        (
            [say("user", "a"), say("user", "b"), say("assistant", "no")],
            "sample 'coco/000123' has 'user' as message 2 where 'assistant' is expected; after an optional system "
            "message, user and assistant must alternate",
        ),
        (
            [say("user", "a"), say("system", "b"), say("assistant", "no")],
            "sample 'coco/000123' has 'system' as message 2 where 'assistant' is expected; after an optional system "
            "message, user and assistant must alternate",
        ),
        (
            [say("user", "a")],
            "sample 'coco/000123' ends with 'user' but must end with 'assistant'; add or remove a message",
        ),
        ([], "sample 'coco/000123' has no message but must end with 'assistant'; add or remove a message"),
        (
            [say("user", "a"), say("assistant", " \n")],
            "sample 'coco/000123' has no supervised token: its assistant messages are empty; remove it",
        ),
        (
            [say("user", None, "a" * 40), say("assistant", "no")],
            "sample 'coco/000123' takes 48 tokens but data.max_length is 20, which would cut 0 image tokens and "
            "3 supervised tokens; set data.max_length=48 or more",
        ),
        (
            [say("user", "a" * 18, None), say("assistant", "no")],
            "sample 'coco/000123' takes 26 tokens but data.max_length is 20, which would cut 2 image tokens and "
            "3 supervised tokens; set data.max_length=26 or more",
        ),
        (
            [say("user", "a"), say("assistant", "no" * 20)],
            "sample 'coco/000123' takes 44 tokens but data.max_length is 20, which would cut 0 image tokens and "
            "24 supervised tokens; set data.max_length=44 or more, or data.too_long=truncate_text",
        ),
    ],
)
def test_bad_sample(bytes_only, messages, error):
    subject = encoder(bytes_only, "plain", max_length=20)
    with pytest.raises(BadSample) as caught:
        subject.encode(Sample("coco/000123", [], messages))
    assert str(caught.value) == error


def test_half_a_surrogate_pair_is_a_bad_sample(bytes_only):
    with pytest.raises(BadSample, match="sample 'a/1' has text that is not valid Unicode"):
        encoder(bytes_only, "plain").encode(Sample("a/1", [], [say("user", "\ud83d"), say("assistant", "no")]))


def test_an_image_in_a_dropped_answer_is_missed_by_the_prompt(bytes_only):
    messages = [say("user", "draw"), say("assistant", None, "done")]
    subject = encoder(bytes_only, "plain")
    row = subject.encode(Sample("a/1", [], messages))
    assert subject.supervised(row) == ["done<eos>"]
    assert row.labels[row.image_mask.index(True) :][:3] == [IGNORE] * 3
    with pytest.raises(BadSample, match="holds 1 image but its text has 0 image placeholders"):
        subject.encode_prompt(Sample("a/1", [], messages))


def test_unknown_or_missing_template(bytes_only):
    with pytest.raises(ValueError, match=r"chat_template=gema is unknown; choose one of blip2, caption, chatml, "):
        encoder(bytes_only, "gema")
    with pytest.raises(ValueError, match=r"no chat template of its own; set llm\.chat_template= to one of blip2"):
        encoder(bytes_only, None)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        # Turns are dropped, texts doubled or changed; the end of turn is no special token; nothing ends the turn.
        ("{{ messages[-1].content }}<eos>", "rewrites the turns"),
        ("{% for m in messages %}{{ m.content * 2 }}<eos>{% endfor %}", "rewrites the turns"),
        ("{% for m in messages %}{{ m.content | title }}<eos>{% endfor %}", "rewrites the turns"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", "followed by '</s>'"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", r"followed by '\\n'"),
        ("{{ raise_exception('no chat') }}", "refuses the conversation .no chat."),
    ],
)
def test_template_that_cannot_be_used(template, error):
    tokenizer = templated(template)
    with pytest.raises(ValueError, match=f"{error}.*set llm.chat_template="):
        encoder(tokenizer, None)


def test_template_that_fails_on_one_sample_names_it():
    tokenizer = templated(
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}"
        "{% if m.content != 'stop' %}<eos>{% endif %}{% endfor %}"
    )
    subject = encoder(tokenizer, None)
    assert isinstance(subject.encode(Sample("a/1", [], [say("user", "a"), say("assistant", "b")])), Encoded)
    for answer in ("x</think>b", "stop"):
        with pytest.raises(BadSample, match=r"^sample 'a/2': the chat template rewrites the turns.*; repair or remove"):
            subject.encode(Sample("a/2", [], [say("user", "a"), say("assistant", answer)]))
