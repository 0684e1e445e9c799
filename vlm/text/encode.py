"""A conversation -> token ids, labels and image placeholders.

The chat template renders the whole conversation once, and the text is tokenized once. To locate the assistant turns in
the text, for any template, the conversation is also rendered with a sentinel in place of each text: this shows what the
template itself writes.

The supervised part of a turn begins after its generation prompt and ends with its end-of-turn token. The text is split
before it, because no token may contain both the end of the prompt and the start of the answer (two newlines, for
example, can be one token). Generation also starts after the tokens of the prompt alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

from vlm.schema import IGNORE, BadSample, Message, Sample
from vlm.text import jinja
from vlm.text.lengths import TooLong, check_length, kept_length
from vlm.text.pairs import pair_row
from vlm.text.row import Encoded
from vlm.text.spans import (
    Skeleton,
    Span,
    answer_spans,
    answers_at,
    crossed,
    cut_spaces,
    sentinels,
    skeleton_of,
    with_breaks,
)
from vlm.text.templates import ENDS, IMAGE_PLACEHOLDER, IMAGES_FIRST, OWN_OPTIONS, PLAIN_TEXTS, TEMPLATES, resolve
from vlm.text.tokenizer import BREAK, breaker, opens_with_space, private_tokenizer, splits_cleanly
from vlm.text.turns import as_list, as_string, check_turns, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Size = tuple[int, int]  # width and height in pixels
CHOOSE = f"set llm.chat_template= to one of {', '.join(sorted(TEMPLATES))}"
REPAIR = "repair or remove the sample, or set llm.chat_template="
PROBE: list[tuple[Literal["user", "assistant"], str]]
PROBE = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
# A chat template may write ten times the characters of the texts and these on top.
EXTRA, EXTRA_PER_TURN = 1_000_000, 1_000
# Starts of answers that a tokenizer may join with the end of the prompt.
ANSWER_STARTS = ["d", "2", " d", "\nd", "日", "🙂"]


class TextEncoder:
    """Tokenizes conversations for one tokenizer and one chat template. The tokenizer is not changed.

    Args:
        tokenizer: a fast tokenizer of Transformers.
        num_image_tokens: placeholders per image or tile. It is 0 where the LLM's layers attend to the visual tokens;
            then only `images_before` counts the images.
        max_length: maximum tokens of a conversation.
        chat_template: a name in `TEMPLATES`, or None for the tokenizer's own.
        tile_rows: (width, height) of an image -> number of tiles in each row; None without tiles.
        row_separator: the text between two rows of tiles.
        num_packed: (width, height) of an image -> number of its placeholders, where the tiles do not tell it.
        image_token: a special token that marks the place of each image, before its placeholders if it has any.
        train_on: supervise the tokens of every `assistant` turn, of the `last_assistant` turn only, or `all` tokens
            except visual ones (including what the template writes).
        system_prompt: the system message of each conversation that has none.
        too_long: `drop` refuses a conversation of more than `max_length` tokens, `truncate_text` and `truncate` cut it
            (see `kept_length`).

    The name of a special token in a message is tokenized as plain characters; only the template writes special tokens.

    Raises ValueError for a tokenizer with neither pad nor eos token, for an unknown or missing template, and for a
    template whose turns cannot be located, whose answers do not end with a special token of the tokenizer (unless
    `ENDS` names their end), or whose generation prompt is tokenized differently in training.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        max_length: int,
        chat_template: str | None,
        tile_rows: Callable[[Size], list[int]] | None = None,
        row_separator: str = "",
        num_packed: Callable[[Size], int] | None = None,
        image_token: str | None = None,
        train_on: Literal["assistant", "last_assistant", "all"] = "assistant",
        system_prompt: str | None = None,
        too_long: TooLong = "drop",
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of this LLM"
            )
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad_id is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token; set one of them")
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.tile_rows, self.num_packed = tile_rows, num_packed
        self.max_length, self.too_long = max_length, too_long
        self.train_on, self.system_prompt = train_on, system_prompt
        self.pad_id: int = pad_id
        self.template = resolve(chat_template, tokenizer)
        self._variables = {**tokenizer.special_tokens_map, **(OWN_OPTIONS if chat_template is None else {})}
        self._break_special_tokens = breaker(tokenizer)
        self._private = private_tokenizer(tokenizer)
        self._splits = splits_cleanly(self._private)
        self._plain_texts = chat_template in PLAIN_TEXTS and opens_with_space(self._private)
        self._bos_after_images = tokenizer.bos_token if chat_template in IMAGES_FIRST else None
        self._separator = self._private.encode(row_separator, add_special_tokens=False).ids
        added = self._private.get_added_tokens_decoder().items()
        ids = {token.content: index for index, token in added}
        self._image_id, self._break_id = ids[IMAGE_PLACEHOLDER], ids[BREAK]
        self._special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        if image_token is not None and image_token not in self._special:
            raise ValueError(
                f"connector.image_token={image_token!r} is not a special token of the llm's tokenizer; add it to "
                "llm.added_tokens, or set connector.image_token=null"
            )
        self._image_ids = [] if image_token is None else [self._special[image_token]]
        self._end_text = ENDS.get(chat_template or "")
        self._end_ids = self._ids_after_text(self._end_text) if self._end_text else []
        self._skeletons: dict[tuple[object, ...], Skeleton | None] = {}
        self._form, self._end_of_turn = self._probe()

    def encode(self, sample: Sample) -> Encoded:
        """The whole conversation, which must end with an answer, with labels as `train_on` says.

        The sample needs its images only where they are tiled. Raises BadSample where turns do not alternate, nothing is
        supervised, the conversation is longer than `max_length`, or the chat template refuses it.
        """
        return self._supervise(sample.id, *self._whole(sample))

    def encode_prompt(self, sample: Sample) -> Encoded:
        """The conversation before its last answer, with the generation prompt; it has no labels and is not truncated.

        A conversation that ends with a user message is taken as a whole. Raises as `encode` does, and for an image in
        the last answer.
        """
        messages = sample.messages
        kept = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        check_turns(sample.id, kept, last="user")
        roles, texts = self._turns(sample.id, kept, sample.num_images)
        try:
            row, _ = self._row(*self._prompt(roles, texts, self._form), sample.sizes)
        except ValueError as error:
            raise BadSample(f"sample '{sample.id}': {error}; {REPAIR}") from error
        row = replace(row, labels=[IGNORE] * len(row.labels))
        check_length(sample.id, row, self.max_length)
        return row

    def encode_pair(self, sample: Sample) -> Encoded:
        """The last answer alone, as `pair_row` makes it. The sample needs its images only where they are tiled."""
        return pair_row(
            sample,
            tokenizer=self.tokenizer,
            ids_of=self._ids_of_text,
            max_length=self.max_length,
            may_cut=self.too_long != "drop",
        )

    def answered(self, sample: Sample) -> Sample:
        """The sample up to the last answer that is not cut completely; the whole sample unless it is truncated.

        Its prompt fits into `max_length`. Raises as `encode` does.
        """
        if self.too_long == "drop":
            return sample
        row, answers, _ = self._whole(sample)
        if len(answers) <= self.max_length:
            return sample
        length = kept_length(row, answers, self.max_length, self.too_long)
        if length is None:
            check_length(sample.id, row, self.max_length)
        last = max((answer for answer in answers[:length] if answer is not None), default=0)
        indices = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
        return replace(sample, messages=sample.messages[: indices[last] + 1])

    @property
    def takes_strings(self) -> bool:
        """Whether the template takes the content of a message as a string, not as a list."""
        return self._form is as_string

    @property
    def separates_texts(self) -> bool:
        """Whether the texts between images are tokenized separately, each with a space before it."""
        return self._plain_texts

    @property
    def puts_images_first(self) -> bool:
        """Whether images that begin a conversation come before its bos token."""
        return self._bos_after_images is not None

    @property
    def num_cut_spaces(self) -> int:
        """How many spaces end the generation prompt of the template; a prompt leaves them out."""
        rendered = self._render(["user"], ["a"], self._form, prompt=True)
        return len(rendered) - len(cut_spaces(rendered))

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end-of-turn token, which is supervised, and the tokenizer's eos token.

        Of an end that is plain text of several tokens, it is the first.
        """
        return sorted({*(self._end_ids[:1] or [self._end_of_turn]), self.tokenizer.eos_token_id} - {None})

    def runs(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """The decoded tokens as runs of (text, is supervised); an image of K visual tokens is `<image×K>`."""
        runs: list[tuple[str, bool]] = []
        pending: list[int] = []
        seen = 0
        visual = Counter(compress(encoded.images_before, encoded.image_mask))  # tokens of each image
        for index, token in enumerate(encoded.input_ids):
            supervised = encoded.labels[index] != IGNORE
            new_images = encoded.images_before[index] - seen
            pending_supervised = index > 0 and encoded.labels[index - 1] != IGNORE
            if pending and (new_images or supervised != pending_supervised):
                runs.append((self._decode(pending), pending_supervised))
                pending = []
            runs.extend((f"<image×{visual[seen + new]}>", False) for new in range(1, new_images + 1))
            seen += new_images
            if not encoded.image_mask[index]:
                pending.append(token)
        if pending:
            runs.append((self._decode(pending), encoded.labels[-1] != IGNORE))
        return runs

    def supervised(self, encoded: Encoded) -> list[str]:
        """The decoded supervised runs, in order."""
        return [text for text, supervised in self.runs(encoded) if supervised]

    def display(self, encoded: Encoded) -> str:
        """The decoded tokens, every supervised run between ⟦ and ⟧."""
        return "".join(f"⟦{text}⟧" if supervised else text for text, supervised in self.runs(encoded))

    def _decode(self, ids: list[int]) -> str:
        """The text of ids inside a row, decoded after a pad token because SentencePiece drops a first space."""
        before, text = (
            self.tokenizer.decode(each, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for each in ([self.pad_id], [self.pad_id, *ids])
        )
        assert isinstance(before, str)
        assert isinstance(text, str)
        return text.removeprefix(before)

    def _turns(self, sample_id: str, messages: Sequence[Message], num_images: int) -> tuple[list[str], list[str]]:
        """Roles and texts for the template, with the system prompt."""
        if self.system_prompt is not None and messages[0]["role"] != "system":
            system = Message(role="system", content=[{"type": "text", "text": self.system_prompt}])
            messages = [system, *messages]
        texts = texts_of(sample_id, messages, num_images)
        return [message["role"] for message in messages], [self._break_special_tokens(text) for text in texts]

    def _whole(self, sample: Sample) -> tuple[Encoded, list[int | None], list[bool]]:
        """The tokens of a conversation, the answer of each token (or None), and which answers are supervised."""
        messages = sample.messages
        check_turns(sample.id, messages, last="assistant")
        roles, texts = self._turns(sample.id, messages, sample.num_images)
        answers = [text for role, text in zip(roles, texts, strict=True) if role == "assistant"]
        supervised = [message.get("supervised", True) for message in messages if message["role"] == "assistant"]
        first = len(answers) - 1 if self.train_on == "last_assistant" else 0
        learned = list(compress(answers[first:], supervised[first:]))
        if not any(answer.replace(IMAGE_PLACEHOLDER, "").strip() for answer in learned):
            why = "its assistant messages are empty" if learned else "its assistant messages have loss: false"
            raise BadSample(f"sample '{sample.id}' has no supervised token: {why}; remove it", "empty_text")
        try:
            return *self._row(*self._answered(roles, texts, self._form), sample.sizes), supervised
        except ValueError as error:
            raise BadSample(f"sample '{sample.id}': {error}; {REPAIR}") from error

    def _probe(self) -> tuple[Callable[[str], object], int]:
        """The form of content that the template takes, a string or a list of items, and the end-of-turn id.

        A string is tried first, because a template for strings prints a list in Python's syntax without an error.
        """
        try:
            return as_string, self._end_of(as_string)
        except ValueError as error:
            try:
                return as_list, self._end_of(as_list)
            except ValueError:
                raise ValueError(f"{error}; {CHOOSE}") from None

    def _end_of(self, form: Callable[[str], object]) -> int:
        """The end-of-turn id. Raises ValueError for a template that cannot be used for training."""
        turns = [Message(role=role, content=[{"type": "text", "text": text}]) for role, text in PROBE]
        roles, texts = self._turns("data.system_prompt", turns, 0)
        rendered = self._render(roles, texts, form)
        last = self._spans(roles, texts, rendered, form)[-1]
        opening, prompt = rendered[: last.start], self._render(roles[:-1], texts[:-1], form, prompt=True)
        if opening != cut_spaces(prompt):
            raise ValueError(
                f"the chat template writes {opening[-20:]!r} before an answer but its generation prompt ends with "
                f"{prompt[-20:]!r}, so generated answers would not start as in training"
            )
        start, _ = self._row(*self._prompt(roles[:-1], texts[:-1], form), ())
        for answer in ANSWER_STARTS:
            row, answers = self._row(*self._answered(roles, [*texts[:-1], answer], form), ())
            if row.input_ids[: answers.index(1)] != start.input_ids:
                raise ValueError(
                    f"the tokenizer splits the generation prompt {prompt[-20:]!r} differently before the answer "
                    f"{answer!r}, so generated answers would not start as in training"
                )
        return last.mark

    def _render(
        self, roles: Sequence[str], texts: Sequence[str], form: Callable[[str], object], prompt: bool = False
    ) -> str:
        chat: list[dict[str, Any]] = [
            {"role": role, "content": form(text)} for role, text in zip(roles, texts, strict=True)
        ]
        text = jinja.render(self.template, chat, add_generation_prompt=prompt, **self._variables)
        limit = EXTRA + EXTRA_PER_TURN * len(texts) + 10 * sum(map(len, texts))
        if len(text) > limit:
            raise ValueError(f"the chat template writes {len(text):,} characters, more than the limit of {limit:,}")
        return text

    def _answered(
        self, roles: Sequence[str], texts: Sequence[str], form: Callable[[str], object]
    ) -> tuple[str, list[int], list[int | None]]:
        """The conversation as text and ids, and the answer of each token (or None)."""
        text = self._render(roles, texts, form)
        text, ids, offsets, spans = self._tokenize(text, self._spans(roles, texts, text, form))
        return text, ids, answers_at(text, ids, offsets, spans)

    def _prompt(
        self, roles: Sequence[str], texts: Sequence[str], form: Callable[[str], object]
    ) -> tuple[str, list[int], list[int | None]]:
        """The conversation with the generation prompt, as text and ids; split at earlier answers as in training."""
        text = self._render(roles, texts, form, prompt=True)
        spans = self._spans(roles, texts, text, form, prompt=True)
        skeleton = self._skeleton(roles, form, prompt=True)
        assert skeleton is not None
        written = skeleton.pieces[-1]
        text = text[: len(text) - len(written)] + cut_spaces(written)
        text, ids, _, _ = self._tokenize(text, spans)
        return text, ids, [None] * len(ids)

    def _tokenize(
        self, text: str, spans: Sequence[Span]
    ) -> tuple[str, list[int], list[tuple[int, int]], Sequence[Span]]:
        """Ids and offsets of the text, with BREAK before each span, or only where a token would cross its start.

        An end of turn that is plain text is separated likewise. An image, itself a token, needs no BREAK after it.
        """
        text = self._images_first(text)
        positions = {span.start for span in spans if not text.endswith(IMAGE_PLACEHOLDER, 0, span.start)}
        if self._end_text:
            positions |= {span.end - len(self._end_text) for span in spans}
        breaks = sorted(positions)
        if not self._splits:
            breaks = crossed(self._ids(text)[1], breaks)
        text, spans = with_breaks(text, spans, breaks, BREAK)
        return text, *self._ids(text), spans

    def _images_first(self, text: str) -> str:
        """The text with its bos token after the images that follow it, if the template is one of IMAGES_FIRST."""
        bos = self._bos_after_images
        if not bos or not text.startswith(bos):
            return text
        text, num = text.removeprefix(bos), 0
        while text.startswith(IMAGE_PLACEHOLDER, num):
            num += len(IMAGE_PLACEHOLDER)
        return text[:num] + bos + text[num:]

    def _ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a rendered text and their character offsets.

        A text of a template in PLAIN_TEXTS is tokenized in parts, which are separated by the images. This matters only
        for a tokenizer that puts a space before each text.
        """
        if not self._plain_texts:
            tokens = self._private.encode(text, add_special_tokens=False)
            return tokens.ids, tokens.offsets
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            ids, offsets, at = [self._special[bos]], [(0, len(bos))], len(bos)
        for number, part in enumerate(text[at:].split(IMAGE_PLACEHOLDER)):
            if number:
                ids.append(self._image_id)
                offsets.append((at, at + len(IMAGE_PLACEHOLDER)))
                at += len(IMAGE_PLACEHOLDER)
            # SentencePiece puts a space before every text, even one that begins with a space.
            space = " " if part.startswith(" ") else ""
            tokens = self._private.encode(space + part, add_special_tokens=False)
            ids += tokens.ids
            offsets += [(at + max(start - len(space), 0), at + end - len(space)) for start, end in tokens.offsets]
            at += len(part)
        return ids, offsets

    def _ids_of_text(self, text: str) -> list[int]:
        """The ids of a text alone; the name of a special token in it is plain characters."""
        ids = self._private.encode(self._break_special_tokens(text), add_special_tokens=False).ids
        return [token for token in ids if token != self._break_id]

    def _ids_after_text(self, text: str) -> list[int]:
        """The ids of a text that follows another one."""
        ids, offsets = self._ids(f"x{text}")
        return [token for token, (start, _) in zip(ids, offsets, strict=True) if start]

    def _spans(
        self,
        roles: Sequence[str],
        texts: Sequence[str],
        rendered: str,
        form: Callable[[str], object],
        prompt: bool = False,
    ) -> list[Span]:
        """The spans of the answers in `rendered`."""
        marks = {self._end_text: self._end_ids[-1]} if self._end_text else self._special
        in_text = self._end_text is not None
        spans = partial(answer_spans, rendered, roles=roles, texts=texts, marks=marks, in_text=in_text)
        with suppress(ValueError):  # the cached skeleton may be outdated, if the template writes the date
            return spans(skeleton=self._skeleton(roles, form, prompt))
        self._skeletons.pop(self._key(roles, form, prompt), None)
        return spans(skeleton=self._skeleton(roles, form, prompt))

    def _skeleton(self, roles: Sequence[str], form: Callable[[str], object], prompt: bool) -> Skeleton | None:
        key = self._key(roles, form, prompt)
        if key not in self._skeletons:
            rendered = self._render(roles, sentinels(len(roles)), form, prompt)
            skeleton = skeleton_of(rendered, len(roles))
            if len(roles) > 100:  # too rare and too large to be cached
                return skeleton
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _key(self, roles: Sequence[str], form: Callable[[str], object], prompt: bool) -> tuple[object, ...]:
        return form, prompt, len(roles), roles[0]  # user and assistant alternate

    def _row(
        self, text: str, ids: Sequence[int], answers: Sequence[int | None], sizes: Sequence[Size]
    ) -> tuple[Encoded, list[int | None]]:
        """The tokens, with labels everywhere except at visual tokens, and the answer of each token (or None)."""
        row = Encoded([], [], [], [], text=text.replace(BREAK, ""))
        owners: list[int | None] = []
        num_images = start = 0
        private = [at for at, token in enumerate(ids) if token in (self._image_id, self._break_id)]
        for at in [*private, len(ids)]:  # whole runs, which is faster than one of 576 visual tokens after the other
            plain = ids[start:at]
            row.input_ids.extend(plain)
            row.labels.extend(plain)
            row.image_mask.extend([False] * len(plain))
            owners += answers[start:at]
            row.images_before.extend([num_images] * len(plain))
            if at < len(ids) and ids[at] == self._image_id:
                ids_of_image, visual = self._placeholders(num_images, sizes)
                num_images += 1
                row.input_ids.extend(ids_of_image)
                row.labels.extend([IGNORE] * len(visual))
                row.image_mask.extend(visual)
                row.images_before.extend([num_images] * len(visual))
                owners += [answers[at]] * len(visual)
            start = at + 1
        return row, owners

    def _supervise(
        self, sample_id: str, row: Encoded, answers: Sequence[int | None], supervised: Sequence[bool]
    ) -> Encoded:
        """The tokens, truncated if `too_long` says so, with labels at the `supervised` answers only.

        With `train_on=all`, the text between the answers keeps its labels too.
        """
        kept = None
        if len(answers) > self.max_length:
            how = "truncate_text" if self.too_long == "drop" else self.too_long
            kept = kept_length(row, answers, self.max_length, how)
        length = None if self.too_long == "drop" else kept
        answers = answers[:length]
        last = max((answer for answer in answers if answer is not None), default=0)
        first, outside = last if self.train_on == "last_assistant" else 0, self.train_on == "all"
        learned = [outside if answer is None else answer >= first and supervised[answer] for answer in answers]
        labels = [label if is_kept else IGNORE for label, is_kept in zip(row.labels, learned, strict=False)]
        row = Encoded(
            input_ids=row.input_ids[:length],
            image_mask=row.image_mask[:length],
            images_before=row.images_before[:length],
            labels=labels,
            text=row.text,
            num_cut=len(row.labels) - len(labels),
        )
        check_length(sample_id, row, self.max_length, may_cut=kept is not None)
        if all(label == IGNORE for label in labels):  # the supervised answers were cut
            raise BadSample(
                f"sample '{sample_id}' has no supervised token in its first {len(labels)} of "
                f"{len(labels) + row.num_cut} tokens; raise data.max_length",
                "too_long",
            )
        return row

    def _placeholders(self, image: int, sizes: Sequence[Size]) -> tuple[list[int], list[bool]]:
        """The ids of an image, with its token and separators between rows of tiles; which of them are placeholders."""
        if self.num_packed is not None:
            num = self.num_packed(sizes[image])
            return [*self._image_ids, *[self.pad_id] * num], [*[False] * len(self._image_ids), *[True] * num]
        rows = [1] if self.tile_rows is None else self.tile_rows(sizes[image])
        ids = list(self._image_ids)
        visual = [False] * len(ids)
        for number, num_tiles in enumerate(rows):
            separator = self._separator if number else []
            num_visual = num_tiles * self.num_image_tokens
            ids += separator + [self.pad_id] * num_visual
            visual += [False] * len(separator) + [True] * num_visual
        return ids, visual
