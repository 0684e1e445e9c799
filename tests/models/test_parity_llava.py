"""Encoder, MLP and LLM in a row are Transformers' LLaVA: same weights, same logits, loss, gradients and words.

LLaVA (arXiv 2304.08485) writes its placeholders as an id of the vocabulary, we as the pad id and a mask; both kinds of
batch are built here from one description of the rows. Tolerances are absolute, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.helpers.parts import FACTS, IMAGE, NUM_TOKENS, SIDE, VOCABULARY, make_batch, pictures, tiny_llm
from vlm.connectors.mlp import MLP
from vlm.encoders.hf import HFEncoder
from vlm.models.composed import Composed
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import IGNORE

ATOL = 1e-5
IMAGE_ID, PAD_ID = VOCABULARY - 1, 0
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
# The model type of the tower, and how many of its tokens are no patches.
ENCODERS = {"clip": ("clip_vision_model", 1), "siglip": ("siglip_vision_model", 0)}
LLMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
RENAMED = {  # theirs -> ours
    r"^model\.vision_tower\.": "encoder.tower.",
    r"^model\.multi_modal_projector\.linear_1\.": "connector.layers.0.",
    r"^model\.multi_modal_projector\.linear_2\.": "connector.layers.1.",
    r"^model\.language_model\.": "llm.model.model.",
    r"^lm_head\.": "llm.model.lm_head.",
}
UNREAD = re.compile(r"encoder\.tower\.(encoder\.layers\.2|post_layernorm|head)\.")  # after the features of layer -2

Rows = Sequence[tuple[list[int | None], list[int]]]
ROWS: dict[str, Rows] = {
    "an image a row": (([11, IMAGE, 12], [21, 22]), ([IMAGE, 13, 14, 15, 16, 17], [23, 24, 25, 26])),
    "two images in a row": (([IMAGE, IMAGE, 11], [21, 22, 23]), ([12, IMAGE, 13, IMAGE, 14, 15], [24])),
    "a row of text alone": (([11, 12, 13, 14, 15], [21, 22]), ([IMAGE, 16], [23]), ([17, IMAGE, 18, IMAGE], [24, 25])),
}
every_pair = pytest.mark.parametrize(("encoder", "llm"), [(e, m) for e in ENCODERS for m in LLMS])
every_batch = pytest.mark.parametrize("rows", ROWS.values(), ids=list(ROWS))


def build_pair(encoder: str, llm: str) -> tuple[LlavaForConditionalGeneration, Composed]:
    """Theirs with random weights, biases and norms included, and ours with the same."""
    tower, drop_tokens = ENCODERS[encoder]
    eye = {**TOWER, "image_size": SIDE, "patch_size": SIDE // 2}
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=AutoConfig.for_model(tower, **eye),
            text_config=AutoConfig.for_model(llm, **FACTS, **LLMS[llm]),
            image_token_index=IMAGE_ID,
            image_seq_length=NUM_TOKENS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default" if drop_tokens else "full",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # many start at 0 or 1, where a mix-up would not show
            parameter += 0.1 * torch.randn_like(parameter)

    eyes = HFEncoder(
        pretrained="none",
        config={"model_type": tower, **eye},
        weights="random",
        drop_tokens=drop_tokens,
        interpolation="bicubic",
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    brain = tiny_llm(llm, **LLMS[llm])
    facts = {"vision_width": eyes.width, "llm_width": brain.width, "grid": eyes.grid, "output_rms": brain.embed_rms}
    ours = Composed(encoder=eyes, connector=MLP(**facts, norm=False, position=False), llm=brain)
    weights = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor for name, tensor in weights.items() if not UNREAD.match(name)})
    return theirs, ours.eval()


def our_name(name: str) -> str:
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def their_batch(rows: Rows, *, side: str = "right") -> dict[str, Tensor]:
    """The arguments of their `forward` for rows as `make_batch` takes them."""
    ids, labels = [], []
    for prompt, answer in rows:
        before = [i for token in prompt for i in ([IMAGE_ID] * NUM_TOKENS if token is IMAGE else [token])]
        ids.append(torch.tensor(before + answer))
        labels.append(torch.tensor([IGNORE] * len(before) + answer))

    def pad(values: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)

    return {
        "input_ids": pad(ids, PAD_ID),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad(labels, IGNORE),
        "pixel_values": torch.stack(pictures(sum(prompt.count(IMAGE) for prompt, _ in rows))),
    }


@every_batch
@every_pair
def test_logits_and_loss(encoder: str, llm: str, rows: Rows) -> None:
    theirs, ours = build_pair(encoder, llm)
    batch = make_batch(*rows)
    expected = theirs(**their_batch(rows))
    logits = ours(batch)
    assert len(logits) == sum(len(answer) for _, answer in rows)
    torch.testing.assert_close(logits, expected.logits[batch.logits_mask], atol=ATOL, rtol=0)
    output = LanguageModeling()(ours, batch)
    loss = output.sums["lm_loss"] / output.counts["lm_loss"]
    torch.testing.assert_close(loss, expected.loss, atol=ATOL, rtol=0)


@pytest.mark.slow
@every_batch
@every_pair
def test_gradients_of_every_parameter(encoder: str, llm: str, rows: Rows) -> None:
    theirs, ours = build_pair(encoder, llm)
    theirs(**their_batch(rows)).loss.backward()
    output = LanguageModeling()(ours, make_batch(*rows))
    (output.sums["lm_loss"] / output.counts["lm_loss"]).backward()
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=ATOL, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    assert min(expected[f"connector.layers.{i}.weight"].abs().max() for i in (0, 1)) > 1e3 * ATOL


@every_pair
def test_greedy_words_from_prompts_of_different_lengths(encoder: str, llm: str) -> None:
    """Rows end at their own stop, and every word after the first is decoded alone, from the cache."""
    theirs, ours = build_pair(encoder, llm)
    rows: Rows = (([11, IMAGE, 12, IMAGE, 13], []), ([14, 15], []), ([IMAGE, 16, 17], []))
    inputs, batch = their_batch(rows, side="left"), make_batch(*rows, side="left")
    prompt = inputs["input_ids"].shape[1]
    del inputs["labels"]
    widths: list[int] = []
    ours.llm.layers()[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))

    def words(stop: int) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        expected = theirs.generate(**inputs, **options, eos_token_id=[stop], pad_token_id=PAD_ID)[:, prompt:]
        return ours.generate(batch, stop_ids=[stop], max_new_tokens=8), expected

    answers, expected = words(stop=1)
    assert answers.tolist() == expected.tolist()
    assert len({tuple(answer) for answer in answers.tolist()}) == 3
    assert widths == [prompt, *[1] * 7]
    stopped, expected = words(stop=int(answers[1, 2]))
    assert stopped.tolist() == expected.tolist() != answers.tolist()


@every_pair
def test_the_pictures_and_their_order_matter_at_this_tolerance(encoder: str, llm: str) -> None:
    """What the equalities above could not see if the features hardly reached the logits."""
    _, ours = build_pair(encoder, llm)
    row, (first, second) = ROWS["two images in a row"][0], pictures(2)
    logits, swapped = (ours(make_batch(row, images=images)) for images in ([first, second], [second, first]))
    assert (logits - swapped).abs().max() > 1e3 * ATOL
