"""Ask the model of a trained run about images: `vlm.load`, `TrainedModel.answer`, and `Chat` for several turns.

No training data is read. The prompt has the chat template, the system prompt and the image transform of the run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, overload

import torch
from PIL import Image
from torch import Tensor

from vlm import build, config
from vlm.data.collate import collate
from vlm.data.conversations import question_content
from vlm.data.images import load_image, opened_image
from vlm.data.reading import applied
from vlm.data.record_keys import Malformed
from vlm.data.sample_reader import SampleReader
from vlm.evaluation.answers import few_questions
from vlm.launch.command_line import check_run_dir
from vlm.launch.overrides import absolute_paths
from vlm.models.base import Generates, Model, check_capabilities
from vlm.schema import Batch, Form, Message, Sample
from vlm.text.turns import count
from vlm.training import artifact

OneImage = Image.Image | str | Path
Images = OneImage | Sequence[OneImage] | None  # of one question
PRECISIONS = {"auto": "auto", "float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
NAME = "question"  # of the sample, in errors
UNLIMITED = 2**40  # tokens; `TrainedModel` compares a prompt with the positions of the LLM instead


def load(
    run_dir: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    overrides: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """The model of a run directory (also of a merged one), ready to answer. Its training data is not needed.

    Args:
        run_dir: of train.py, or of `vlm-artifact merge`.
        device: such as `cpu` or `cuda:1`; `auto` is the accelerator of this machine if it has one.
        dtype: `float32`; `bfloat16` for the frozen weights and the computation; `float16` for the computation alone.
            Trained tensors stay in float32. `auto` is what eval.py uses: bfloat16 where the hardware supports it.
        overrides: options of the run by their full key. The config of a run from elsewhere does not decide where
            weights lie: {"llm.pretrained": "weights/gemma"}.

    Raises ValueError, in one sentence, if the run cannot be used here.
    """
    path = Path(run_dir).expanduser().absolute()
    chosen = _device(device)
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ValueError(f"dtype={name} is not supported; choose one of {', '.join(PRECISIONS)}")
    check_run_dir("ckpt", path)
    artifact.read_manifest(path)
    given = absolute_paths(overrides or {}, "")
    with contextlib.chdir("."):  # returns to this folder at the end
        settings, _ = config.read_config(path, given=given)
        config.enter_folder_of(path)
        settings["trainer"] = {"accelerator": chosen.type, "precision": PRECISIONS[name]}
        config.check_model(settings)
        check_capabilities("vlm.load", (Generates,), config.model_class(settings))
        model, manifest = build.build_model(settings)
        artifact.load(path, model=model, manifest=manifest, run_id=config.run_id(path))
        settings["data"] = {**settings["data"], "max_length": UNLIMITED}
        reader = build.build_reader(settings, model)
    return TrainedModel(
        model=model,
        reader=reader,
        device=chosen,
        precision=config.precision(settings),
        questions=_questions(path, settings["data"].get("prompt")),
    )


def _questions(run_dir: Path, prompt: Any) -> list[str]:
    """The few questions of a run's validation answers; `data.prompt`, where it is asked, has the place of the image."""
    found = few_questions(run_dir / "samples.jsonl")
    return [prompt] if isinstance(prompt, str) and found == [prompt.replace("<image>", "")] else found


class LogLikelihood(NamedTuple):
    """Of an answer: in nats, its tokens with the end of the turn, and whether each is the most likely one."""

    nats: float
    num_tokens: int
    is_greedy: bool


class TrainedModel:
    """A trained model that answers questions about images, one generation at a time.

    Args:
        model: with its trained tensors.
        reader: encodes conversations as the data of its run did.
        device: to compute on.
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        questions: those of its validation, where they are few, as of captions; the first is the default of `answer`.
    """

    def __init__(
        self,
        *,
        model: Model,
        reader: SampleReader,
        device: torch.device,
        precision: str,
        questions: Sequence[str] = (),
    ) -> None:
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.device, self.precision, self.reading = device, precision, reader.reading
        self.questions = questions
        self._reader = reader
        self._lock = threading.Lock()

    @overload
    def answer(self, images: Images, question: str | None = None, **options: Any) -> str: ...

    @overload
    def answer(
        self, images: OneImage | Sequence[Images] | None, question: Sequence[str], **options: Any
    ) -> list[str]: ...

    def answer(
        self,
        images: OneImage | Sequence[Images] | None,
        question: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        **options: Any,
    ) -> str | list[str]:
        """The answer to a question about an image, a list of images, or none (None).

        An image is one of Pillow's or the path of a file. Images come before the text, unless `<image>` in the question
        marks the place of each; what suits a model best is the form of the data that it was trained on. With a list of
        questions, `images` has what belongs to each of them, or is one image for all.

        Args:
            question: None is the most frequent one of the validation, for a run that has few, such as one on captions.
            max_new_tokens: an answer is cut after so many tokens.
            batch_size: questions that are answered together.
            options: of Transformers' `generate`, such as `do_sample=True, temperature=0.7`. The default is greedy
                decoding, or what `llm.generation` of the run says.

        Raises ValueError, in one sentence, for a question or an image that cannot be used.
        """
        if question is None:
            if not self.questions:
                raise ValueError("the validation of this run had many questions or none; give a question")
            question = self.questions[0]
        questions = [question] if isinstance(question, str) else list(question)
        if isinstance(question, str):
            of_each: list[Any] = [images]
        elif images is None or isinstance(images, OneImage):
            of_each = [images] * len(questions)
        else:
            of_each = list(images)
        if len(of_each) != len(questions):
            raise ValueError(
                f"there are {count(len(questions), 'question')}, but images for {len(of_each)}; give the images of "
                "each question as one entry of the list (None for none)"
            )
        samples = [self._sample(text, theirs) for text, theirs in zip(questions, of_each, strict=True)]
        answers: list[str] = []
        for first in range(0, len(samples), batch_size):
            batch = self._batch(samples[first : first + batch_size])
            answers += map(self._decoded, self._generate(batch, max_new_tokens, options).tolist())
        return answers[0] if isinstance(question, str) else answers

    def stream(self, images: Images, question: str, *, max_new_tokens: int = 256, **options: Any) -> Iterator[str]:
        """The pieces of `answer`, each as soon as it is generated; joined, they are the answer."""
        return self._pieces(self._batch([self._sample(question, images)]), max_new_tokens, options)

    @torch.inference_mode()
    def log_likelihood(self, images: Images, question: str, answer: str) -> LogLikelihood:
        """How likely an answer to a question about images is; `answer` describes the first two."""
        sample = self._sample(question, images)
        turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        batch = self._batch([replace(sample, messages=[*sample.messages, turn])], form="conversation")
        with self._lock, self._autocast():
            logits = self.model(batch).float()  # M V
        log_p = logits.log_softmax(1).gather(1, batch.targets[:, None])  # M 1
        greedy = bool((logits.argmax(1) == batch.targets).all())
        return LogLikelihood(float(log_p.sum()), len(batch.targets), greedy)

    def chat(self) -> Chat:
        """A new conversation of several turns."""
        return Chat(self)

    def read_image(self, image: OneImage) -> Image.Image:
        """The image as training reads it: RGB, upright, within the limits of `data.reading`.

        Raises ValueError for a file that is missing, too large or no image.
        """
        with applied(self.reading):
            if isinstance(image, Image.Image):
                return opened_image(image, name=str(getattr(image, "filename", "") or "from Pillow"))
            if not isinstance(image, str | Path):
                raise ValueError(f"an image of type {type(image).__name__} cannot be read; give a path or a PIL.Image")
            path = Path(image).expanduser()
            if not path.is_file():
                why = "is not a file" if path.exists() else "does not exist"
                raise ValueError(f"image '{path}' {why}; give the path of an image file")
            return load_image(path.absolute(), root=Path(path.absolute().anchor))

    def encode(self, images: Images, question: str) -> Batch:
        """The row that `answer` generates from: its tokens and images."""
        return self._batch([self._sample(question, images)])

    def _sample(self, question: str, images: Images, before: Sample | None = None) -> Sample:
        """A conversation that ends with a question; `before` has the turns before it."""
        given: list[Any] = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        loaded = [self.read_image(image) for image in given]
        try:
            content = question_content(question, num_images=len(loaded), where="in it")
        except Malformed as error:
            raise ValueError(f"the question {error}") from error
        num_placeholders = sum(piece["type"] == "image" for piece in content)
        if num_placeholders != len(loaded):
            raise ValueError(
                f"the question has {num_placeholders} <image> and {count(len(loaded), 'image')}; give an image for "
                r"each, or write \<image> for the word"
            )
        turn: Message = {"role": "user", "content": content}
        earlier = before or Sample(id=NAME, images=[], messages=[])
        return Sample(id=NAME, images=[*earlier.images, *loaded], messages=[*earlier.messages, turn])

    def _batch(self, samples: Sequence[Sample], *, form: Form = "prompt") -> Batch:
        """Left-padded rows on the device. Raises ValueError for one longer than the LLM's positions."""
        text, rows = self._reader.text, []
        for sample in samples:
            self._reader.check(sample)
            encoded = text.encode_prompt(sample) if form == "prompt" else text.encode(sample)
            rows.append(self._reader.row(sample, encoded))
        batch = collate(rows, spec=self._reader.spec, pad_id=text.pad_id, side="left")
        length, positions = batch.input_ids.shape[1], self.model.num_positions
        if positions is not None and length >= positions:
            raise ValueError(
                f"the prompt has {length:,} tokens, and the llm has {positions:,} positions for prompt and answer; ask "
                "with less text or fewer images, or start a new conversation"
            )
        return batch.to(self.device)

    def _generate(self, batch: Batch, max_new_tokens: int, options: Mapping[str, Any]) -> Tensor:
        if (positions := self.model.num_positions) is not None:
            max_new_tokens = min(max_new_tokens, positions - batch.input_ids.shape[1])
        stop_ids = self._reader.text.stop_ids
        with self._lock, self._autocast():
            return self.model.generate(batch, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **options)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "32-true":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._reader.text.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _pieces(self, batch: Batch, max_new_tokens: int, options: Mapping[str, Any]) -> Generator[str, None, None]:
        """The text of a row's answer in pieces, while another thread generates it.

        Closing the iterator stops the thread at its next token.
        """
        received: SimpleQueue[list[int] | Tensor | Exception] = SimpleQueue()
        streamer = _Streamer(received)

        def generate() -> None:
            try:
                received.put(self._generate(batch, max_new_tokens, {**options, "streamer": streamer}))
            except Exception as error:  # raised again in the thread that reads
                received.put(error)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        ids: list[int] = []
        sent = ""
        try:
            while True:
                item = received.get()
                if isinstance(item, Exception):
                    raise item
                is_all = isinstance(item, Tensor)
                ids = item[0].tolist() if isinstance(item, Tensor) else [*ids, *item]
                text = self._decoded(ids)
                # A character of several tokens is decoded as U+FFFD until it is complete.
                if len(text) > len(sent) and text.startswith(sent) and (is_all or not text.endswith("\ufffd")):
                    yield text[len(sent) :]
                    sent = text
                if is_all:
                    return
        finally:
            streamer.stopped = True
            thread.join()


class Chat:
    """A conversation with a trained model, which reads all turns and images of it at each question.

    Attributes:
        messages: the turns so far.
        images: those of the messages, in their order.
    """

    def __init__(self, model: TrainedModel) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []

    def add(self, question: str, answer: str, images: Images = None) -> None:
        """Add a turn that the model does not generate, such as one of an earlier conversation."""
        self._keep(self._asked(question, images), answer)

    def ask(self, question: str, images: Images = None, **options: Any) -> str:
        """The answer in this conversation; arguments as those of `TrainedModel.answer`."""
        return "".join(self.stream(question, images, **options))

    def stream(
        self, question: str, images: Images = None, *, max_new_tokens: int = 256, **options: Any
    ) -> Iterator[str]:
        """The pieces of `ask`. If the iterator is closed early, the conversation has the answer up to there."""
        sample = self._asked(question, images)
        batch = self._model._batch([sample])
        return self._kept(sample, self._model._pieces(batch, max_new_tokens, options))

    def _asked(self, question: str, images: Images) -> Sample:
        return self._model._sample(question, images, Sample(id=NAME, images=self.images, messages=self.messages))

    def _kept(self, sample: Sample, pieces: Generator[str, None, None]) -> Iterator[str]:
        answer = ""
        with contextlib.closing(pieces):
            for piece in pieces:
                answer += piece
                self._keep(sample, answer)
                yield piece
        self._keep(sample, answer)

    def _keep(self, sample: Sample, answer: str) -> None:
        turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.images, self.messages = sample.images, [*sample.messages, turn]


class _Stopped(Exception):
    """Nobody reads the answer any more."""


class _Streamer:
    """What Transformers' `generate` calls with the prompt, then with each token; it passes the tokens on."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue, self._has_prompt = queue, False
        self.stopped = False

    def put(self, tokens: Tensor) -> None:
        if self.stopped:
            raise _Stopped
        if self._has_prompt:
            self._queue.put(tokens.tolist())
        self._has_prompt = True

    def end(self) -> None:
        """The ids that `generate` returns are the end."""


def _device(asked: str | torch.device) -> torch.device:
    """The device of this machine. Raises ValueError, with the choices, if there is no such device."""
    choices = ["cpu"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        choices = [kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count())), "cpu"]
    name = choices[0] if str(asked) == "auto" else str(asked)
    if name not in choices:
        raise ValueError(f"device={name} is not a device of this machine; choose one of auto, {', '.join(choices)}")
    return torch.device(name)
