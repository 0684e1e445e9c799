"""BLIP-2's first stage: image-text contrast, matching and generation (Li et al., arXiv 2301.12597).

Axes: B rows of this rank, C rows of all ranks, K embeddings per image, E their width, M supervised tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.base import DescribesImages, EmbedsPairs, MatchesPairs
from vlm.objectives.base import Objective
from vlm.objectives.gather import from_rank_zero, joined, num_ranks, of_all_ranks
from vlm.ranges import Positive, RatioBelowOne
from vlm.schema import Batch, Form, LossOutput, Sample


class RepresentationLearning(Objective):
    """The sum of three losses on pairs of an image and a text, in float32 and nats.

    - `contrastive_loss`: cross-entropy of each image against the texts of all ranks and the reverse, averaged. The
      similarity is the largest cosine of the image's K embeddings with the text's, divided by a learnable temperature.
      Pairs of the same image share the target.
    - `matching_loss`: whether image and text belong together: each pair, and with each of its two sides another one of
      any rank, drawn by its contrastive probability, never of the same image.
    - `generation_loss`: next-token prediction of the text from the image.

    Each is summed over its own rows or tokens. Gradients reach the embeddings of all ranks, so several ranks learn as
    one with all rows. In validation the hard negatives are drawn with a fixed seed.

    Args:
        temperature: at the start.
        label_smoothing: of contrast and generation.
    """

    needs: ClassVar[tuple[type, ...]] = (EmbedsPairs, MatchesPairs, DescribesImages)
    form: ClassVar[Form] = "pair"

    def __init__(self, *, temperature: Positive = 0.07, label_smoothing: RatioBelowOne = 0.1) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([float(temperature)]))  # a vector, because FSDP shards no scalar
        self.label_smoothing = label_smoothing

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        features = batch.of_each_image(model.features(batch))  # B P Dv
        image_embeds, logits = model.describe(features, batch)  # B K E, M V
        text_embeds = model.embed_texts(batch.input_ids, batch.attention_mask)  # B E
        generation = F.cross_entropy(
            logits.float(), batch.targets, label_smoothing=self.label_smoothing, reduction="sum"
        )
        same_image = self._same_image(batch)  # B C
        to_texts, to_images = self._similarities(image_embeds, text_embeds)  # B C, B C
        contrast = (self._contrast(to_texts, same_image) + self._contrast(to_images, same_image)) / 2
        matching, is_right = self._matching(model, features, batch, to_texts.detach(), to_images.detach(), same_image)
        num = len(features)
        return LossOutput(
            sums={
                "contrastive_loss": contrast,
                "matching_loss": matching,
                "generation_loss": generation,
                "matching_accuracy": is_right.float().sum(),
                "temperature": self.temperature.detach().sum() * num,
            },
            counts={
                "contrastive_loss": num,
                "matching_loss": len(is_right),
                "generation_loss": len(batch.targets),
                "matching_accuracy": len(is_right),
                "temperature": num,
            },
        )

    def _similarities(
        self, image_embeds: Float[Tensor, "b k e"], text_embeds: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
        """This rank's images with all texts, and its texts with all images."""
        all_texts = torch.cat(of_all_ranks(text_embeds))  # C E
        all_images = torch.cat(of_all_ranks(image_embeds))  # C K E
        to_texts = torch.einsum("bke,ce->bck", image_embeds, all_texts).amax(-1)  # B C
        to_images = torch.einsum("be,cke->bck", text_embeds, all_images).amax(-1)  # B C
        return to_texts / self.temperature, to_images / self.temperature

    def _contrast(self, similarity: Float[Tensor, "b c"], same_image: Bool[Tensor, "b c"]) -> Float[Tensor, ""]:
        targets = same_image.float() / same_image.sum(1, keepdim=True)  # B C
        targets = (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[1]  # B C
        return -(targets * similarity.log_softmax(1)).sum()

    def _matching(
        self,
        model: Any,
        features: Float[Tensor, "b p dv"],
        batch: Batch,
        to_texts: Float[Tensor, "b c"],
        to_images: Float[Tensor, "b c"],
        same_image: Bool[Tensor, "b c"],
    ) -> tuple[Float[Tensor, ""], Bool[Tensor, " r"]]:
        """The summed loss of up to three rows per pair, and whether each row is classified correctly."""
        all_features = torch.cat(of_all_ranks(features))  # C P Dv
        all_ids = joined(of_all_ranks(batch.input_ids))  # C T
        all_lengths = torch.cat(of_all_ranks(batch.attention_mask.sum(1)))  # C
        ids = F.pad(batch.input_ids, (0, all_ids.shape[1] - batch.input_ids.shape[1]))  # B T
        lengths = batch.attention_mask.sum(1)  # B
        has_other = ~same_image.all(1)  # B
        image, text = (
            draw_one(similarity.masked_fill(same_image, -torch.inf)[has_other].softmax(1), uniform[has_other])  # R
            for similarity, uniform in zip((to_images, to_texts), self._uniform(len(features), features), strict=True)
        )
        lengths = torch.cat([lengths, lengths[has_other], all_lengths[text]])  # B+2R
        logits = model.match(
            torch.cat([features, all_features[image], features[has_other]]),
            torch.cat([ids, ids[has_other], all_ids[text]]),
            torch.arange(ids.shape[1], device=ids.device) < lengths[:, None],
        ).float()  # B+2R 2
        target = torch.arange(len(logits), device=logits.device) < len(features)  # B+2R
        return F.cross_entropy(logits, target.long(), reduction="sum"), logits.argmax(1) == target

    def _same_image(self, batch: Batch) -> Bool[Tensor, "b c"]:
        mine = torch.tensor([image_number(sample) for sample in batch.samples], device=batch.input_ids.device)  # B
        same = mine[:, None] == torch.cat(of_all_ranks(mine))  # B C
        if self.training and bool(same.all()):
            raise ValueError(
                f"a step has {len(same)} pairs of one image, so there are no negatives; set data.batch_size=2 or more"
            )
        return same

    def _uniform(self, num: int, like: Tensor) -> Float[Tensor, "2 b"]:
        """Two random numbers in [0, 1) per row, the same for a row whatever the number of ranks."""
        sizes = [len(each) for each in of_all_ranks(torch.zeros(num, device=like.device))]
        generator = None if self.training else torch.Generator().manual_seed(0)
        drawn = from_rank_zero(torch.rand(2, sum(sizes), dtype=torch.float64, generator=generator).to(like.device))
        rank = torch.distributed.get_rank() if num_ranks() > 1 else 0
        return drawn.split(sizes, dim=1)[rank]  # 2 B


def image_number(sample: Sample) -> int:
    """A number for the image of a sample; samples whose source names the same image have the same number."""
    name = sample.meta.get("image", f"id {sample.id}")
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)


def draw_one(weights: Float[Tensor, "r c"], uniform: Float[Tensor, " r"]) -> Int[Tensor, " r"]:
    """One column of each row, with probability proportional to its weight; `uniform` are numbers in [0, 1)."""
    cumulative = weights.double().cumsum(1)  # R C
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]  # R
