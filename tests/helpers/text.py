"""Conversations and small tokenizers for the tests: one token a byte, with merges, and like SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlm.schema import Message, Sample, Source
from vlm.text.encode import TextEncoder
from vlm.text.row import Encoded
from vlm.text.templates import IMAGE_PLACEHOLDER

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
MORE_SPECIAL = [  # of other families; the last ids, so that those of the bytes stay
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endofchunk|>",
]
CORPUS = [
    "A red circle and two blue squares.\n\nWhere is the star?  In the top left corner.",
    "How many triangles are there?\n\n\nThere are three triangles, one of them green.",
    "赤い丸が二つあります。青い星はどこですか。",
    "緑の三角は左上にあります。\n\nいくつありますか。三つです。",
] * 4


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Also adds bos when asked to encode with special tokens, so that a doubled one would show."""
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in MORE_SPECIAL])
    bos = backend.token_to_id("<bos>")
    # Trims the spaces off the offsets, as GPT-2's and Llama 3's do.
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", additional_special_tokens=[]
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: special tokens 0 to 6, then the 256 letters of the byte alphabet in sorted order."""
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return _wrap(backend)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, over spaces and newlines and parts of Japanese letters too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


def sentencepiece_tokenizer(*, legacy: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE over "▁" for a space, byte fallback, "▁" before the text or, if `legacy`, before each part."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return _wrap(backend)


def sentencepiece_folder(folder: Path) -> Path:
    """A folder as Vicuna is published: a tokenizer.model of SentencePiece's own making, and no tokenizer.json."""
    import sentencepiece

    (folder / "corpus.txt").write_text("\n".join([*CORPUS * 8, *map(str, range(100))]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def border_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer with "▁yes", ":)" and a double newline as single tokens, and byte fallback."""
    words = ["<pad>", "<eos>", "▁", "y", "e", "s", "ye", "yes", "▁yes", ":", ")", ":)", "\n", "\n\n"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), (":", ")"), ("\n", "\n")]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def templated(template: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a chat template of its own."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def own_template(tokenizer: PreTrainedTokenizerFast, before: str, after: str) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template of its own that writes `before` and `after` around each answer."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{{ '" + before + "' + m.content + '" + after + "' }}{% endif %}{% endfor %}"
        "{{ '" + before + "' if add_generation_prompt }}"
    )
    return tokenizer


def say(role: str, *contents: str | None) -> Message:
    """A message of texts; None is an image."""
    items = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in contents]
    return Message(role=role, content=items)


def text_of(message: Message) -> str:
    return "".join(item.get("text", IMAGE_PLACEHOLDER) for item in message["content"])


def encoder(
    tokenizer, template: str | None, *, num_image_tokens: int = 3, max_length: int = 4096, **options
) -> TextEncoder:
    return TextEncoder(
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        max_length=max_length,
        chat_template=template,
        **options,
    )


def special_ids(subject: TextEncoder, row: Encoded) -> list[int]:
    """The special tokens of a row, in order, without what stands for images."""
    special = {index for index, token in subject.tokenizer.added_tokens_decoder.items() if token.special}
    pairs = zip(row.input_ids, row.image_mask, strict=True)
    return [token for token, is_image in pairs if token in special and not is_image]


ONE_TURN = [say("user", None, "Hi"), say("assistant", "no")]


class Listed(Source):
    """A split of these samples."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]
