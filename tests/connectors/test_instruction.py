"""InstructBLIP: a question that enters the Q-Former, against Transformers', and where the rows of a batch have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from tests.helpers.blip2 import SIZES, THEIRS, TINY, shaken, start
from tests.helpers.pairs import PACKAGE
from tests.helpers.parts import SPEC, tiny_encoder, tiny_llm
from vlm.connectors.bert_tokenizer import Instructions
from vlm.connectors.qformer import QFormer
from vlm.data.collate import collate, join, make_row
from vlm.evaluation.visual_gain import select
from vlm.models.composed import Composed
from vlm.schema import Batch, Content, Message, Sample
from vlm.text.encode import TextEncoder


def test_queries_are_those_of_instructblip(tmp_path: Path) -> None:
    """Their Q-Former has embeddings for text of its own; all else is named as BLIP-2's."""
    theirs = shaken(InstructBlipQFormerModel(InstructBlipQFormerConfig(**THEIRS)))
    ours = start_from(theirs, tmp_path)
    features, ids = torch.randn(2, 5, 24), torch.randint(0, THEIRS["vocab_size"], (2, 6))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = theirs(
        input_ids=ids,
        query_embeds=ours.queries.expand(2, -1, -1),
        attention_mask=torch.nn.functional.pad(mask, (4, 0), value=True).long(),
        encoder_hidden_states=features,
    ).last_hidden_state[:, :4]
    torch.testing.assert_close(ours(features, ids, mask), ours.project(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(ours(features, ids, mask), ours(features, ids.flip(0), mask), atol=1e-3)


def start_from(theirs: Any, folder: Path) -> Any:
    """Ours with their weights, under the names of a BLIP-2."""
    state = {"query_tokens": torch.randn(1, 4, 16)}
    for name, tensor in theirs.state_dict().items():
        owner, _, rest = name.partition(".")
        found = (
            f"qformer.{rest}" if rest.startswith("layernorm") else name if owner == "embeddings" else f"qformer.{name}"
        )
        state[found] = tensor.contiguous()
    save_file(state, folder / "model.safetensors")
    return start(folder, text=True, norm=False).eval()


def test_instructions_are_cut_from_the_left() -> None:
    instructions = Instructions("x", PACKAGE)
    assert instructions(" What is this? ") == [101, 2054, 2003, 2023, 1029, 102]
    long = instructions("red " * 200 + "star")
    assert (len(long), long[0], long[-2:]) == (128, 101, [2732, 102])


def test_a_text_path_is_needed() -> None:
    with pytest.raises(ValueError, match=r"^connector.instruction=true needs the text path; set connector.text=true$"):
        QFormer(**TINY, instruction=True)


def model(**options: Any) -> Composed:
    encoder, llm = tiny_encoder(), tiny_llm()
    sizes = {**SIZES, "grid": tuple(encoder.grid)}
    shape = {"num_queries": 4, "depth": 2, "width": 16, "num_heads": 2, "text": True, "package": PACKAGE}
    return shaken(Composed(encoder=encoder, connector=QFormer(**{**sizes, **shape, **options}), llm=llm))


def rows(ours: Composed, *questions: str) -> Batch:
    """Rows with one image each, all alike, and the answer "yes"."""
    spec = replace(ours.visual_spec(), transform=SPEC.transform)
    text = TextEncoder(
        tokenizer=ours.tokenizer, num_image_tokens=spec.num_tokens, max_length=200, chat_template="chatml"
    )
    made = []
    for number, question in enumerate(questions):
        content: list[Content] = [{"type": "image"}, {"type": "text", "text": question}]
        answer: list[Content] = [{"type": "text", "text": "yes"}]
        messages: list[Message] = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        sample = Sample(f"a/{number}", [Image.new("RGB", (8, 8))], messages)
        made.append(make_row(sample, text.encode(sample), spec))
    return collate(made, spec=spec, pad_id=0)


def test_the_visual_tokens_depend_on_the_question_of_their_image() -> None:
    ours = model(instruction=True)
    batch = rows(ours, "Is it red?", "Is it a very large star?", "Is it red?")
    assert batch.instruction_mask is not None
    assert batch.instruction_mask.sum(1).tolist() == [6, 9, 6]
    visual = ours.visual(batch)
    torch.testing.assert_close(visual[0], visual[2])
    assert (visual[0] - visual[1]).abs().max() > 1e-3
    torch.testing.assert_close(ours.visual(rows(ours, "Is it red?"))[0], visual[0])
    two = ours.visual(select(batch, [1, 2]))
    torch.testing.assert_close(two, visual[1:])
    logits = ours(batch)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.connector.parameters()), "as DDP needs"


def test_the_ablation_has_no_instruction() -> None:
    batch = rows(model(), "Is it red?", "Is it a star?")
    assert batch.instruction_ids is None
    visual = model().visual(batch)
    torch.testing.assert_close(visual[0], visual[1])


def test_rows_without_an_image_keep_all_parameters() -> None:
    ours = model(instruction=True)
    assert ours.connector(torch.zeros(0, 4, 24)).shape == (0, 4, 32)


def test_answers_share_a_beginning_only_with_the_same_question() -> None:
    ours = model(instruction=True)
    batch = rows(ours, "Is it red?", "Is it blue?")
    shared = replace(batch, image_index=torch.tensor([0, 0]), pixel_values=batch.pixel_values[:1])
    assert shared.num_shared_tokens == 0
    same = rows(ours, "Is it red?", "Is it red?")
    assert replace(same, image_index=torch.tensor([0, 0]), pixel_values=same.pixel_values[:1]).num_shared_tokens > 4


def test_packed_rows_keep_the_instruction_of_each_image() -> None:
    ours = model(instruction=True)
    spec = replace(ours.visual_spec(), transform=SPEC.transform)
    text = TextEncoder(tokenizer=ours.tokenizer, num_image_tokens=4, max_length=200, chat_template="chatml")
    content: list[Content] = [{"type": "image"}, {"type": "text", "text": "Red?"}, {"type": "image"}]
    answer: list[Content] = [{"type": "text", "text": "yes"}]
    messages: list[Message] = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    sample = Sample("a/1", [Image.new("RGB", (8, 8))] * 2, messages)
    row = make_row(sample, text.encode(sample), spec)
    assert row.instructions == [[101, 2417, 1029, 102]] * 2
    assert len(join([row, row]).instructions) == 4
