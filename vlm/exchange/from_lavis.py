"""BLIP-2's Q-Former (Li et al., arXiv 2301.12597) from a checkpoint of LAVIS, the authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vlm.connectors.qformer_weights import our_name
from vlm.exchange.from_blip2 import qformer_options
from vlm.exchange.run_folder import Imported

HEAD_DIM = 64  # BERT's; the number of heads is in no tensor
# Of a checkpoint's tensors: the frozen encoder and LLM, and the heads of the first stage.
IGNORED = re.compile(
    r"(visual_encoder|opt_model|t5_model|llm_model|Qformer\.cls|vision_proj|text_proj|itm_head)\.|temp$|.*\.position_ids$"
)
RENAMED = (  # LAVIS -> Transformers' BLIP-2
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^(opt|t5|llm)_proj\.", "language_projection."),
)


def is_lavis(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a Q-Former of LAVIS."""
    return "query_tokens" in state and any(name.startswith("Qformer.bert.") for name in state)


def read_qformer(state: Mapping[str, Tensor]) -> Imported:
    """The tensors of a Q-Former; a checkpoint of the first stage has no projection, which keeps its first values.

    Raises ValueError for a tensor that a Q-Former does not have.
    """
    tensors = {}
    for name, tensor in state.items():
        if not IGNORED.match(name):
            ours = _name(name)
            tensors[f"connector.{ours}"] = (tensor[0] if name == "query_tokens" else tensor).float()
    width = tensors["connector.queries"].shape[1]
    options = qformer_options(tensors, num_heads=max(1, width // HEAD_DIM))
    projected = "connector.project.weight" in tensors
    return Imported(options, tensors, keeps_first=() if projected else ("connector.project.",))


def _name(name: str) -> str:
    """Our name of a tensor of LAVIS."""
    theirs = name
    for pattern, replacement in RENAMED:
        theirs = re.sub(pattern, replacement, theirs)
    ours = our_name(theirs)
    if ours is None:
        raise ValueError(f"{name!r:.80} is not a tensor of BLIP-2's Q-Former as LAVIS names it")
    return ours
