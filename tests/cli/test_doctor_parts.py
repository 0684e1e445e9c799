"""The doctor's parts: hashes and their neighbours, kinds of refusals, the filter, the page, the scores."""

from __future__ import annotations

import io
import json
import os
from array import array
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.text import Listed, byte_tokenizer, say
from vlm.cli.doctor_report import statistics, write
from vlm.cli.doctor_score import sample_losses, scores
from vlm.data.checkup import Checkup, Entry, EntryDataset, hash_answer, image_defect
from vlm.data.collate import collate, make_row
from vlm.data.datamodule import VLMDataModule
from vlm.data.duplicates import ImageHash, ImageHashes, closest, hash_image
from vlm.data.filter import Filtered, filtered
from vlm.data.findings import Finding, find
from vlm.data.reading import Reading, applied
from vlm.data.sample_reader import SampleReader
from vlm.data.sources.captions import Captions
from vlm.data.sources.instruct import Instruct
from vlm.schema import BadSample, Batch, Sample, Source, VisualSpec
from vlm.text.encode import TextEncoder
from vlm.text.language import identifier

RNG = np.random.default_rng(0)


def picture(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((90, 80), Image.Resampling.BICUBIC)


def hashes(steps: list[int], colors: list[int] | None = None) -> ImageHashes:
    made = ImageHashes()
    for number, each in enumerate(steps):
        made.append(ImageHash(number, each, bytes([colors[number] if colors else 0] * 48), bytes(288)))
    return made


def flipped(value: int, bits: int) -> int:
    for bit in RNG.choice(64, bits, replace=False):
        value ^= 1 << int(bit)
    return value


def test_the_closest_is_that_of_all_pairs() -> None:
    known = [int(v) for v in RNG.integers(0, 2**64, 40, dtype=np.uint64)]
    known += [flipped(known[i % 7], i % 6) for i in range(60)]
    wanted = [flipped(known[i], i % 5) for i in range(0, 100, 3)]

    def expected(value: int, references: list[int]) -> int:
        distances = [(bin(value ^ other).count("1"), place) for place, other in enumerate(references)]
        best = min(distances, default=(64, 0))
        return best[1] if best[0] <= 3 else -1

    found = closest(hashes(wanted), hashes(known))
    assert found.tolist() == [expected(value, known) for value in wanted]
    assert {-1} < set(found.tolist())
    earlier = closest(hashes(known), hashes(known), before=np.arange(100))
    assert earlier.tolist() == [expected(value, known[:place]) for place, value in enumerate(known)]
    assert closest(hashes([]), hashes(known)).tolist() == []
    assert closest(hashes([1]), hashes([])).tolist() == [-1]


def test_other_colors_are_another_picture() -> None:
    assert closest(hashes([5, 5], [16, 17]), hashes([5])).tolist() == [0, -1]


def test_a_copy_of_another_size_and_format_is_near_and_another_picture_is_not() -> None:
    originals, copies = ImageHashes(), ImageHashes()
    for seed in range(20):
        image, data = picture(seed), io.BytesIO()
        image.resize((60, 53)).save(data, "JPEG", quality=70)
        originals.append(hash_image(image))
        copies.append(hash_image(Image.open(data).convert("RGB")))
    assert closest(copies, originals).tolist() == list(range(20))
    assert (closest(originals, originals, before=np.arange(20)) == -1).all()
    assert not set(copies.pixels.tolist()) & set(originals.pixels.tolist())
    assert hash_image(picture(3)) == hash_image(picture(3))


def xray(number: int) -> Image.Image:
    """Pictures of one layout and little contrast: what tells them apart are a few gray levels here and there."""
    layout = np.random.default_rng(999).normal(size=(8, 9)) * 12
    own = np.random.default_rng(number).normal(size=(8, 9)) * 3
    cells = Image.fromarray(np.clip(120 + layout + own, 0, 255).astype(np.uint8))
    return cells.resize((180, 160), Image.Resampling.BICUBIC).convert("RGB")


def test_pictures_of_one_layout_take_a_second_look() -> None:
    originals, copies = ImageHashes(), ImageHashes()
    for number in range(40):
        data = io.BytesIO()
        xray(number).resize((120, 107)).save(data, "JPEG", quality=90)
        originals.append(hash_image(xray(number)))
        copies.append(hash_image(Image.open(data).convert("RGB")))
    by_hash = closest(originals, originals, before=np.arange(40), similarity=-1.0)
    assert (by_hash >= 0).sum() > 5
    assert (closest(originals, originals, before=np.arange(40)) >= 0).sum() == 0
    assert closest(copies, originals, similarity=0.99).tolist() == list(range(40))
    assert (closest(copies, originals, similarity=1.0) == -1).all()
    assert closest(originals, originals, similarity=1.0).tolist() == list(range(40))  # equal pixels


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("RGB", (40, 30), (200, 10, 90)), "is of nearly one color"),
        (Image.fromarray(np.asarray(picture(1)) // 16), "is very dark: nothing in it is brighter than 15 of 255"),
        (picture(1), ""),
        (Image.new("RGB", (2, 1), (0, 0, 0)), "is very dark: nothing in it is brighter than 0 of 255"),
    ],
)
def test_pictures_that_show_nothing(image: Image.Image, says: str) -> None:
    assert image_defect(image) == says


def test_contradictions_are_of_one_image_and_one_question() -> None:
    def told(*samples: tuple[int, str, str]) -> list[tuple[int, tuple[str, int] | None]]:
        source = Listed(
            Sample(str(n), [picture(image)], [say("user", None, question), say("assistant", answer)])
            for n, (image, question, answer) in enumerate(samples)
        )
        splits = {"train": Checkup(reader(source)[n] for n in range(len(source))), "val": Checkup([])}
        found = find(splits, {"train": source, "val": Listed([])}, None)
        return [(finding.index, finding.like) for finding in found if finding.kind == "contradiction"]

    first = (1, "Is it a dog?", "Yes.")
    assert told(first, (1, "is it a dog", "no"), first) == [(1, ("train", 0))]
    assert told(first, (2, "Is it a dog?", "No."), (1, "Is it a cat?", "No."), (1, "Is it a dog?", "yes")) == []
    assert told((1, "What?", "One two three four"), (1, "What?", "Four three two one")) == []


def test_one_long_text_does_not_spoil_a_histogram() -> None:
    lengths = [*range(100, 364), 19_000]
    histogram = statistics(lengths)["histogram"]
    assert (histogram["edges"][0], histogram["edges"][-1], histogram["beyond"]) == (100, 361, 3)
    assert sum(histogram["counts"]) == 262
    assert min(histogram["counts"]) > 15
    assert statistics(lengths)["max"] == 19_000
    assert statistics(range(100, 364))["histogram"]["beyond"] == 0
    assert statistics([7, 7])["histogram"]["counts"] == [2]


def test_the_memory_holds_hashes_alone() -> None:
    entries = (Entry(f"s{n}", hashes=(hash_image(picture(n)),), answers=(n,), tokens=n) for n in range(8))
    checkup = Checkup(entries)
    kept = {**vars(checkup), **vars(checkup.hashes)}
    kinds = {name: type(value) for name, value in kept.items()}
    assert {kinds.pop(name) for name in ("ids", "problems", "image_defects", "languages", "hashes")} == {
        list, dict, type(checkup.languages), ImageHashes
    }  # fmt: skip
    assert set(kinds.values()) == {array}
    assert sum(value.itemsize * len(value) for value in kept.values() if isinstance(value, array)) == 8 * (
        64 + 288 + 9 * 8
    )


def sample(*turns: str, images: int = 0, marks: int = 0) -> Sample:
    messages = [say("user" if n % 2 == 0 else "assistant", *[None] * (marks if n == 0 else 0), t)
                for n, t in enumerate(turns)]  # fmt: skip
    return Sample("x", [picture(n) for n in range(images)], messages)


def read(source: Source, max_length: int = 999) -> Entry:
    return reader(source, max_length)[0]


def reader(source: Source, max_length: int = 999) -> EntryDataset:
    text = TextEncoder(tokenizer=byte_tokenizer(), num_image_tokens=2, max_length=max_length, chat_template="chatml")
    spec = VisualSpec(num_tokens=2, image_size=(2, 2), transform=lambda image: torch.zeros(3, 2, 2))
    return EntryDataset(source=source, reader=SampleReader(text=text, spec=spec), language=None)


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (sample("q", "a", images=1), "placeholder_mismatch"),
        (sample("q", "a", marks=1), "placeholder_mismatch"),
        (sample("q", " "), "empty_text"),
        (sample("q", "a", "q", " "), "empty_text"),
        (sample("q", "a" * 999), "too_long"),
        (sample("q"), "other_defect"),
        (sample("q", "\ud83d"), "other_defect"),
        (sample("q", "a", images=1, marks=1), ""),
    ],
)
def test_what_the_text_gives_away(made: Sample, kind: str) -> None:
    entry = read(Listed([made]))
    assert entry.kind == kind
    assert bool(entry.message) == bool(kind)
    assert entry.id == "x"


def test_a_sample_that_is_too_long_still_has_its_length() -> None:
    entry = read(Listed([sample("q", "a" * 999, images=1, marks=1)]), max_length=64)
    assert entry.tokens > 999
    assert entry.visual_tokens == 2
    assert "data.max_length is 64" in entry.message


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"image": "none.png", "caption": "x"}, "unreadable_image"),
        ({"image": "broken.png", "caption": "x"}, "unreadable_image"),
        ({"image": "../a.png", "caption": "x"}, "unreadable_image"),
        ({"image": "good.png", "caption": ""}, "empty_text"),
        ({"image": "good.png", "caption": []}, "empty_text"),
        ({"caption": "x"}, "other_defect"),
        ({"image": "good.png", "messages": [{"role": "user", "content": "q"}]}, "other_defect"),
        ({"image": "good.png", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}]},
         "empty_text"),
        ({"image": "good.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         "placeholder_mismatch"),
    ],
)  # fmt: skip
def test_what_a_source_refuses(tmp_path: Path, record: dict, kind: str) -> None:
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    made = Captions if "caption" in record else Instruct
    source = made(split="train", annotations=tmp_path / "data.jsonl", images=tmp_path, val_fraction=0.0)
    if "caption" not in record and "conversations" not in record:
        assert "ends with a user turn" in read(source).message
    assert (read(source).kind, read(source).id) == (kind, None)


def test_answers_and_their_spelling() -> None:
    assert hash_answer("A red Circle.") == hash_answer("a red circle") != hash_answer("a red square")
    assert hash_answer("?") != hash_answer("!")


def told(answers: list[str]) -> set[int]:
    """The samples whose answer repeats."""
    source = Listed(sample("q", answer) for answer in answers)
    entries = [Entry(str(n), answers=(hash_answer(answer),)) for n, answer in enumerate(answers)]
    splits = {"train": Checkup(entries), "val": Checkup([])}
    found = find(splits, {"train": source, "val": Listed([])}, None)
    return {finding.index for finding in found if finding.kind == "repeated_answer"}


@pytest.mark.parametrize(
    ("answer", "num", "others", "is_told"),
    [
        ("I cannot tell", 5, 0, True),
        ("I cannot tell", 4, 0, False),
        ("I cannot tell", 5, 95, True),
        ("I cannot tell", 5, 96, False),
        ("Two circles", 9, 0, False),
        ("赤い丸です。", 5, 0, True),
        ("はい", 5, 0, False),
    ],
)
def test_an_answer_machine(answer: str, num: int, others: int, is_told: bool) -> None:
    found = told([f"something else {n}" for n in range(others)] + [answer] * num)
    assert found == (set(range(others, others + num)) if is_told else set())


def test_languages() -> None:
    identify = identifier()
    assert identify("A dog runs over the meadow with a stick.") == "en"
    assert identify("赤い丸の左に青い四角があります。") == "ja"
    assert identify("Un chien court dans le pré avec un bâton.") == "fr"
    assert identify("yes") == identify(" " * 99) == "short"


class Named(Source):
    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if self.ids[index] == "bad":
            raise BadSample("sample 'bad' is broken")
        return Sample(self.ids[index], [], [])


class Ordered(Named):
    """A source that overrides everything."""

    names = ("one", "other")
    left_out = MappingProxyType({"drawings": 7})

    def outline(self, index: int) -> Sample:
        return Sample(f"outline of {self[index].id}", [], [])

    def order(self, epoch: int, *, seed: int) -> list[int]:
        return [4, 0, 1, 4, epoch, seed]


def test_a_filtered_source_has_what_its_source_has() -> None:
    source = Filtered(Ordered(*"abcde"), split="train", left_out=[0, 3])
    assert source.left_out == {"drawings": 7, "samples by data.filter (40 % of train)": 2}
    assert [source[index].id for index in range(len(source))] == ["b", "c", "e"]
    assert source.names == ("one", "other")
    assert source.outline(2).id == "outline of e"
    assert source.order(1, seed=3) == [2, 0, 2, 0]
    plain = Filtered(Named("a", "b"), split="train", left_out=[])
    assert plain.names == ()
    assert plain.outline(1) == Sample("b", [], [])
    assert plain.order(1, seed=3) is None


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["a", "b", "bad"], ""),
        (["a", "b"], "was made for 3 samples of train, which has 2; run vlm-doctor again"),
        (["b", "a", "bad"], "has the id 'b' for sample 1 of train, whose id is now 'a'; run vlm-doctor again"),
        (["a", "b", "mended"], "has the id None for sample 2 of train, whose id is now 'mended'; run vlm-doctor again"),
    ],
)
def test_a_filter_of_other_data_is_refused(tmp_path: Path, ids: list[str], said: str) -> None:
    file = tmp_path / "filter.json"
    file.write_text(json.dumps({"train": {"num_samples": 3, "indices": [1, 2], "ids": ["b", None]}}))
    if not said:
        kept = filtered({"train": Named(*ids)}, str(file))["train"]
        assert [kept[index].id for index in range(len(kept))] == ["a"]
        return
    with pytest.raises(ValueError, match=said):
        filtered({"train": Named(*ids)}, str(file))


PART = '"num_samples": 2, "ids": [null], "indices"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", "it has no 'train' with num_samples, indices and ids"),
        ("{}", "it has no 'train'"),
        ('{"train": {"num_samples": 1, "indices": [0]}}', "it has no 'train'"),
        ('{"train": {"num_samples": "2", "indices": {}, "ids": null}}', "it has no 'train'"),
        ('{"train": {"num_samples": 2, "indices": [0, 1], "ids": ["a"]}}', "train has 2 indices and 1 ids"),
        (f'{{"train": {{{PART}: [-1]}}}}', "train has 2 samples, so index -1 does not exist"),
        (f'{{"train": {{{PART}: [2]}}}}', "train has 2 samples, so index 2 does not exist"),
        (f'{{"train": {{{PART}: [true]}}}}', "so index True does not exist"),
        (f'{{"train": {{{PART}: ["0"]}}}}', "so index '0' does not exist"),
        ("[" * 99999, "recursion"),
        ("\xff", "can't decode byte 0xff|Expecting value"),
    ],
)
def test_a_file_that_is_no_filter(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"is not a filter\.json \(.*{says}.* run vlm-doctor again"):
        filtered({"train": Named("a", "b")}, str(tmp_path / "x.json"))


def test_a_filter_is_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"filter 'pipe\.json' under .* is not a regular file"):
        filtered({"train": Named("a", "b")}, str(tmp_path / "pipe.json"))
    (tmp_path / "x.json").write_text(" " * 4000)
    with (
        applied(Reading(max_text_bytes=1000)),
        pytest.raises(ValueError, match=r"has 4,000 bytes, .* 3,048;"),
    ):
        filtered({"train": Named("a", "b")}, str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=r"there is no file '.*none\.json'; set data\.filter="):
        filtered({"train": Named("a", "b")}, str(tmp_path / "none.json"))


def test_the_page_escapes_what_others_wrote(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    source = Listed([Sample(attack, [picture(0)], [say("user", None, attack), say("assistant", "\ud83d")])])
    finding = Finding("train", 0, attack, "duplicate", f"sample '{attack}' is one", like=("train", 0))
    lengths = statistics([1.0, 2.0, float("nan")])
    assert (lengths["mean"], lengths["max"], sum(lengths["histogram"]["counts"])) == (1.5, 2.0, 2)
    part = {"samples": 1, "tokens": lengths, "languages": {attack: 1}, "answers": [{"answer": attack, "count": 1}]}
    report = {"parts": {"llm": attack}, "visual_tokens_per_image": 1, "against": None, "splits": {"train": part}}
    write(tmp_path, report, [finding] * 30, {"train": source})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<div class=card>") == 24
    assert page.count('src="data:image/jpeg;base64,') == 48
    assert len(json.loads((tmp_path / "report.json").read_text())["findings"]) == 30


def test_scores_find_the_answer_of_another_image(tmp_path: Path) -> None:
    """A stand-in for a model: it expects the letter that the picture's red tells."""
    letters = "abcdefgh"
    for number in range(8):
        Image.new("RGB", (32, 32), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
    told = letters[:6] + "hg"  # the last two have each other's
    source = Listed(
        Sample(str(n), [Image.open(tmp_path / f"{n}.png")], [say("user", None, "?"), say("assistant", told[n])])
        for n in range(8)
    )

    def transform(image: Image.Image) -> Tensor:
        return torch.full((3, 2, 2), float(image.getpixel((0, 0))[0] // 30))

    data = VLMDataModule(source=lambda split: source, batch_size=4)
    spec = VisualSpec(num_tokens=1, image_size=(2, 2), transform=transform)
    tokenizer = byte_tokenizer()
    data.connect(spec=spec, tokenizer=tokenizer, chat_template="chatml")
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(letters)))

    class Expects(torch.nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            logits = torch.zeros(*batch.input_ids.shape, len(tokenizer))
            logits[torch.arange(len(logits)), :, ids[batch.pixel_values[:, 0, 0, 0].long()]] = 5.0
            return logits[batch.logits_mask]

    settings = {"trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "precision": "32-true"}}
    done: list[int] = []
    found = scores(settings, Expects(), data, "train", [0, 1, 2, 3, 4, 6, 7], done.append)
    assert sum(done) == 7
    assert np.isnan(found[5])
    assert (found[[0, 1, 2, 3, 4]] > 1.0).all()
    # Two tokens are supervised, the letter and the end of turn; a mismatched letter costs as much with another image,
    # or, where that image is by chance the right one, less.
    assert (found[[6, 7]] < 1e-5).all()
    batch = collate([make_row(source[0], data.text.encode(source[0]), spec)], spec=spec, pad_id=0)
    all_letters = torch.logsumexp(torch.tensor([5.0] + [0.0] * (len(tokenizer) - 1)), 0)
    assert sample_losses(Expects(), batch).item() == pytest.approx(((all_letters - 5) + all_letters).item() / 2)
