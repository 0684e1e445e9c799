"""The model `vlm` of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), in the process of lmms-eval.

python -m lmms_eval --model vlm --model_args ckpt=<run dir> --tasks pope
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

import vlm

MANIFEST = ModelManifest(model_id="vlm", simple_class_path="vlm.evaluation.lmms.VLM")  # an entry point names it
DEFAULT_NEW_TOKENS = 256


class VLM(lmms):
    """A run of train.py, which gets the images before the text, each in a place of its own, as in `benchmark.prompt`.

    Args:
        ckpt: the run directory.
        device, dtype: as in `vlm.load`.
        batch_size: questions that are answered together.
        max_batch_size: lmms-eval passes it to every model; not used.
    """

    def __init__(
        self, *, ckpt: str, device: str = "auto", dtype: str = "auto", batch_size: Any = 1, max_batch_size: Any = None
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError("the model vlm asks in one process; start lmms-eval without accelerate or torchrun")
        self.model, self.batch_size = vlm.load(ckpt, device=device, dtype=dtype), int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, each cut before the first of its stop strings. Requests with the same options share batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Answers") as progress:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    asked = [self._asked(requests[number]) for number in batch]
                    options = requests[batch[0]].args[1]
                    found = self.model.answer(
                        [images for images, _ in asked], [text for _, text in asked], **generation(options)
                    )
                    answers |= {
                        number: cut(text, options.get("until")) for number, text in zip(batch, found, strict=True)
                    }
                    progress.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each continuation, its log-likelihood with the end of the turn, and whether greedy decoding gives it.

        The pair is inside a GenerationResult, because lmms-eval 0.7.3 makes a text of any other.
        """
        found = []
        for request in tqdm(requests, desc="Log-likelihoods"):
            images, text = self._asked(request)
            nats, _, greedy = self.model.log_likelihood(images, text, self._continuation(request))
            found.append(GenerationResult(text=(nats, greedy)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise ValueError("the model vlm does not answer tasks of several rounds; leave them out of --tasks")

    def _asked(self, request: Any) -> tuple[list[Image.Image], str]:
        """The images of a request, and its text with their places before it."""
        context, _, doc_to_visual, index, task, split = request.args
        images = list(doc_to_visual(self.task_dict[task][split][index]) or ()) if doc_to_visual else []
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"task {task} shows a {type(image).__name__}, and the model vlm takes images alone")
        text = context.replace("<image>", r"\<image>")
        return images, "<image>" * len(images) + "\n" * bool(images) + text

    def _continuation(self, request: Any) -> str:
        _, target, _, index, task, split = request.args
        return str(target if isinstance(target, str) else target(self.task_dict[task][split][index])).strip()


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `answer` for those of a task: greedy decoding unless it has a temperature."""
    found: dict[str, Any] = {"max_new_tokens": options.get("max_new_tokens") or DEFAULT_NEW_TOKENS}
    if options.get("temperature"):
        found |= {"do_sample": True, "temperature": options["temperature"]}
        found |= {"top_p": options["top_p"]} if options.get("top_p") else {}
    if (options.get("num_beams") or 1) > 1:
        found["num_beams"] = options["num_beams"]
    return found


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0]
    return text
