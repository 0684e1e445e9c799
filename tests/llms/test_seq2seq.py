"""An encoder-decoder LLM: picture and question reach its encoder, the answer its decoder, exactly as T5 has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.helpers.llms import t5
from tests.helpers.parts import IMAGE, make_batch, tiny_model
from vlm.llms.bytes import byte_tokenizer
from vlm.llms.seq2seq import Seq2SeqLM
from vlm.models.composed import Composed, scatter_visual_tokens
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import IGNORE, Batch

ROWS = (([11, IMAGE, 12, 13], [21, 1]), ([14, 15], [22, 23, 24, 1]), ([IMAGE, 16, IMAGE], [25]))


def model_of(llm: Seq2SeqLM) -> Composed:
    return tiny_model(llm=llm)  # type: ignore[arg-type]


def inputs_of(model: Composed, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encoder inputs, their mask and the labels of each row, padded on the right, as T5 takes them."""
    embeds = scatter_visual_tokens(
        model.connector(model.encoder(batch.pixel_values)), model.llm.embed(batch.input_ids), batch
    )
    lengths = [int((labels != IGNORE).nonzero()[0]) for labels in batch.labels]
    answers = [labels[labels != IGNORE] for labels in batch.labels]
    rows = [row[:length] for row, length in zip(embeds, lengths, strict=True)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(length) for length in lengths], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask, labels


@pytest.mark.parametrize("tied", [False, True])
def test_loss_logits_and_gradients_are_those_of_t5(tied: bool) -> None:
    model, batch = model_of(t5(facts={"tie_word_embeddings": tied})), make_batch(*ROWS)
    bare: T5ForConditionalGeneration = model.llm.model
    assert (bare.lm_head.weight is bare.shared.weight) == tied
    embeds, mask, labels = inputs_of(model, batch)
    assert mask.sum(1).tolist() == [7, 2, 9]
    theirs = bare(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    parameters = [*model.connector.parameters(), bare.shared.weight]
    expected = torch.autograd.grad(theirs.loss * len(batch.targets), parameters)
    logits = model(batch)
    torch.testing.assert_close(logits, theirs.logits[labels != IGNORE], rtol=1e-5, atol=1e-5)
    assert batch.targets.tolist() == labels[labels != IGNORE].tolist() == [21, 1, 22, 23, 24, 1, 25]
    loss = LanguageModeling()(model, batch).sums["lm_loss"]
    torch.testing.assert_close(loss, theirs.loss * len(batch.targets), rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_greedy_words_are_those_of_t5() -> None:
    model, batch = model_of(t5()).eval(), make_batch(*((prompt, []) for prompt, _ in ROWS), side="left")
    answers = model.generate(batch, stop_ids=[1], max_new_tokens=5)
    embeds, mask, _ = inputs_of(model, make_batch(*ROWS))
    theirs = model.llm.model.generate(
        inputs_embeds=embeds, attention_mask=mask, decoder_start_token_id=0, max_new_tokens=5, do_sample=False
    )
    assert answers.tolist() == theirs[:, 1:].tolist()
    assert len({tuple(answer) for answer in answers.tolist()}) == 3


def test_neither_half_reads_what_is_the_others() -> None:
    """Of prompt 11 12 13, answer 21 1 and an unsupervised 31 after it."""
    llm, batch = t5(), make_batch(([11, 12, 13], [21, 1, 31]))
    batch.labels[0, -1] = IGNORE
    before = model_of(llm)(batch)

    def moved(place: int) -> list[bool]:
        ids = batch.input_ids.clone()
        ids[0, place] = 99
        after = llm(llm.embed(ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
        return [not torch.equal(*pair) for pair in zip(after, before, strict=True)]

    assert len(before) == 2
    assert [moved(place) for place in range(6)] == [[True, True]] * 3 + [[False, True]] + [[False, False]] * 2


def test_two_answers_in_a_row_are_refused() -> None:
    model, batch = model_of(t5()), make_batch(([11, 12, 13, 14], [21, 1]))
    batch.labels[0, 1] = 12
    with pytest.raises(ValueError, match=r"a row has 2 answers, but an encoder-decoder llm takes 1.*num_questions=1"):
        model(batch)


def test_t5s_own_facts() -> None:
    assert not t5().model.config.scale_decoder_outputs
    assert t5(facts={"tie_word_embeddings": True}).model.config.scale_decoder_outputs
    assert t5().model.config.dropout_rate == 0.0 != T5Config().dropout_rate
    assert [type(layer).__name__ for layer in t5().layers()] == ["T5Block"] * 4


def test_a_folder_gives_back_the_same_model(tmp_path: Path) -> None:
    """Two matrices in the file stay two, though Transformers would tie them."""
    llm, batch = t5(), make_batch(([11, 12], [21, 1]))
    llm.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    read = Seq2SeqLM(pretrained=str(tmp_path), config=None)
    assert read.model.lm_head.weight is not read.model.shared.weight
    torch.testing.assert_close(model_of(read)(batch), model_of(llm)(batch), rtol=0, atol=0)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (read, llm)]
    assert sizes[0] == sizes[1]


def test_decoder_inputs_are_the_answer_shifted() -> None:
    """By hand: after the start token come all answer tokens but the last."""
    llm, batch = t5(), make_batch(*ROWS[1:2])
    seen: dict[str, Any] = {}
    llm.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model_of(llm)(batch)
    written = llm.embed(torch.tensor([[0, 22, 23, 24]]))
    torch.testing.assert_close(seen["decoder_inputs_embeds"], written, rtol=0, atol=0)
    assert seen["attention_mask"].tolist() == [[True, True, False, False, False, False]]
