"""From a conversation to token ids, labels and the places of its images, by the characters of the rendered text.

The chat template renders the whole conversation once and the text is tokenised once. The same conversation rendered
with a sentinel in the place of each text shows what the template itself writes; that locates every assistant turn by
characters, whatever the template. A turn to learn is the assistant's text and the special token that ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from vlm.schema import IGNORE, BadSample, Message
from vlm.text.spans import Span, answer_spans, learnable, pieces_between
from vlm.text.templates import IMAGE_PLACEHOLDER, TEMPLATES
from vlm.text.turns import check_turns, count, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Encoded:
    """One row: T tokens, of which `num_image_tokens` in a row stand for each image or tile of one.

    `images_before[t]` counts the images that start before or at token t, i.e. how many the token may see: the visual
    tokens of image j (from 0) and the text after them, up to the next image, have j + 1; text before any image has 0.
    """

    input_ids: list[int]  # the pad id where visual tokens go
    image_mask: list[bool]  # True where visual tokens go
    images_before: list[int]
    labels: list[int]  # the token itself where it is supervised, else IGNORE
    text: str  # as rendered, with IMAGE_PLACEHOLDER for each image


class TextEncoder:
    """Conversations to rows for one tokenizer and chat template; the tokenizer itself is never changed.

    `chat_template` is a name in `TEMPLATES`, or None for the tokenizer's own. `num_image_tokens` is 0 where the LLM's
    layers attend to the visual tokens: an image then takes no place and only `images_before` tells of it. Where images
    are tiled, `tile_rows` gives the tiles in each row for an image's width and height, and `row_separator` is the text
    between these rows.

    Raises ValueError for an unknown or missing template, one that rewrites the turns so that they cannot be located, or
    one that ends no answer with a special token of the tokenizer; also for a tokenizer with neither pad nor eos token.
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
        self.tile_rows = tile_rows
        self.max_length = max_length
        self.pad_id: int = pad_id
        self.template = _resolve(chat_template, tokenizer)
        self._private = _with_placeholder(tokenizer)
        self._separator = self._private.encode(row_separator, add_special_tokens=False).ids
        self._image_id = self._private.token_to_id(IMAGE_PLACEHOLDER)
        self._marks = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._form = self._probe()

    def encode(
        self, sample_id: str, messages: Sequence[Message], num_images: int, sizes: Sequence[Size] = ()
    ) -> Encoded:
        """The whole conversation, every answer supervised; it must end with one.

        `sizes` are width and height of each image; only tiling asks for them.
        Raises BadSample where the sample is at fault (turns that do not alternate, images and placeholders that differ,
        nothing to learn, longer than `max_length`), ValueError where the template is.
        """
        check_turns(sample_id, messages, last="assistant")
        texts = texts_of(sample_id, messages, num_images)
        roles = [message["role"] for message in messages]
        answers = [text for role, text in zip(roles, texts, strict=True) if role == "assistant"]
        if not any(answer.replace(IMAGE_PLACEHOLDER, "").strip() for answer in answers):
            raise BadSample(
                f"sample '{sample_id}' has no supervised token: its assistant messages are empty; remove it"
            )
        try:
            text = self._render(roles, texts, self._form)
            tokens = self._private.encode(text, add_special_tokens=False)
            learn = learnable(text, tokens.ids, tokens.offsets, self._spans(roles, texts, text, self._form))
        except ValueError as error:
            raise ValueError(f"sample '{sample_id}': {error}") from error
        return self._row(sample_id, text, tokens.ids, learn, sizes)

    def encode_prompt(
        self, sample_id: str, messages: Sequence[Message], num_images: int, sizes: Sequence[Size] = ()
    ) -> Encoded:
        """What stands before the last answer, up to the generation prompt; no label is set.

        A conversation that ends with a user message is a prompt already. Raises as `encode` does.
        """
        kept = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        check_turns(sample_id, kept, last="user")
        texts = texts_of(sample_id, kept, num_images)
        try:
            text = self._render([message["role"] for message in kept], texts, self._form, prompt=True)
        except ValueError as error:
            raise ValueError(f"sample '{sample_id}': {error}") from error
        ids = self._private.encode(text, add_special_tokens=False).ids
        return self._row(sample_id, text, ids, [False] * len(ids), sizes)

    @property
    def stop_ids(self) -> list[int]:
        """Ids after which an answer is over: the end-of-turn mark that the labels hold, and the end of text."""
        turns = [Message(role=r, content=[{"type": "text", "text": "a"}]) for r in ("user", "assistant")]
        learnt = [label for label in self.encode("stop", turns, 0).labels if label != IGNORE]
        return sorted({learnt[-1], *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])})

    def runs(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """The row decoded in runs of one kind: (text, whether it is supervised); an image reads `<image×K>`."""
        runs: list[tuple[str, bool]] = []
        pending: list[int] = []
        seen = 0
        visual = Counter(compress(encoded.images_before, encoded.image_mask))  # how many tokens each image has
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
        """The decoded row, every supervised run between ⟦ and ⟧."""
        return "".join(f"⟦{text}⟧" if supervised else text for text, supervised in self.runs(encoded))

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _probe(self) -> Callable[[str], object]:
        """The form of a message's content that the template takes: a string, or a list of items.

        Strings come first: a template for strings would print a list's Python syntax without an error.
        """
        roles, texts = ["user", "assistant"] * 2, ["a", "b", "c", "d"]
        try:
            self._spans(roles, texts, self._render(roles, texts, _as_string), _as_string)
            return _as_string
        except ValueError as error:
            try:
                self._spans(roles, texts, self._render(roles, texts, _as_list), _as_list)
                return _as_list
            except ValueError:
                raise error from None

    def _render(
        self, roles: Sequence[str], texts: Sequence[str], form: Callable[[str], object], prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError  # slow to import, and Transformers imports it here anyway

        chat: list[dict[str, Any]] = [
            {"role": role, "content": form(text)} for role, text in zip(roles, texts, strict=True)
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation ({error}); set llm.chat_template=") from error
        assert isinstance(text, str)
        return text

    def _spans(
        self, roles: Sequence[str], texts: Sequence[str], rendered: str, form: Callable[[str], object]
    ) -> list[Span]:
        """Where the answers lie in `rendered`. Worked out for each sample anew: templates may write the date."""
        sentinels = [f"vlm-turn-{index}-vlm" for index in range(len(roles))]
        pieces = pieces_between(self._render(roles, sentinels, form), sentinels)
        try:
            return answer_spans(rendered, pieces=pieces, roles=roles, texts=texts, marks=self._marks)
        except ValueError as error:
            raise ValueError(f"{error}; set llm.chat_template= to one of {', '.join(sorted(TEMPLATES))}") from error

    def _row(
        self, sample_id: str, text: str, ids: Sequence[int], learn: Sequence[bool], sizes: Sequence[Size]
    ) -> Encoded:
        row = Encoded(input_ids=[], image_mask=[], images_before=[], labels=[], text=text)
        num_images = 0
        for token, supervised in zip(ids, learn, strict=True):
            is_image = token == self._image_id
            num_images += is_image
            places = self._places(num_images - 1, sizes) if is_image else [token]
            row.input_ids.extend(self.pad_id if place is None else place for place in places)
            row.image_mask.extend(place is None for place in places)
            row.images_before.extend([num_images] * len(places))
            row.labels.extend([token if supervised and not is_image else IGNORE] * len(places))
        self._check_length(sample_id, row)
        return row

    def _places(self, image: int, sizes: Sequence[Size]) -> list[int | None]:
        """What an image takes in a row: None for each visual token, and the separator's ids between rows of tiles."""
        rows = [1] if self.tile_rows is None else self.tile_rows(sizes[image])
        places: list[int | None] = []
        for number, num_tiles in enumerate(rows):
            places += self._separator if number else []
            places += [None] * (num_tiles * self.num_image_tokens)
        return places

    def _check_length(self, sample_id: str, row: Encoded) -> None:
        length = len(row.input_ids)
        if length <= self.max_length:
            return
        num_visual = sum(row.image_mask[self.max_length :])
        num_supervised = sum(label != IGNORE for label in row.labels[self.max_length :])
        raise BadSample(
            f"sample '{sample_id}' takes {length} tokens but data.max_length is {self.max_length}, which would cut "
            f"{count(num_visual, 'image token')} and {count(num_supervised, 'supervised token')}; "
            f"set data.max_length={length} or more"
        )


def _resolve(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    choices = ", ".join(sorted(TEMPLATES))
    if name is None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer has no chat template of its own; set llm.chat_template= to one of {choices}"
            )
        return tokenizer.get_chat_template()
    if name not in TEMPLATES:
        raise ValueError(f"llm.chat_template={name} is unknown; choose one of {choices}")
    return TEMPLATES[name]


def _with_placeholder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A private tokenizer with one more token, on the shared vocabulary: a deep copy of Gemma's takes 5 s, this 20 ms.

    The post-processor stays behind: it adds special tokens, which are the template's business, and some trim the spaces
    off the offsets.
    """
    shared = tokenizer.backend_tokenizer
    private = Tokenizer(shared.model)
    if shared.normalizer is not None:
        private.normalizer = shared.normalizer
    if shared.pre_tokenizer is not None:
        private.pre_tokenizer = shared.pre_tokenizer
    added = shared.get_added_tokens_decoder()
    private.add_tokens([added[index] for index in sorted(added)])
    moved = [token.content for index, token in added.items() if private.token_to_id(token.content) != index]
    if moved:  # ids with gaps among the added tokens cannot be had by adding them anew
        private = Tokenizer.from_str(shared.to_str())
        private.no_truncation()
        private.no_padding()
    private.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
    return private


def _as_string(text: str) -> str:
    return text


def _as_list(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
