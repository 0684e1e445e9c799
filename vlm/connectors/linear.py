"""Linear projection of every patch: the connector of the first LLaVA (Liu et al., arXiv 2304.08485)."""

from __future__ import annotations

from vlm.connectors.mlp import MLP


class Linear(MLP):
    """features [N,P,Dv] -> visual [N,P,D]: an MLP of depth 1.

    Parameters: Dv·D + D, and 2·Dv for the norm, P·D for the position embeddings. Arguments as in MLP.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        norm: bool = True,
        position: bool = True,
    ) -> None:
        super().__init__(
            vision_width=vision_width,
            llm_width=llm_width,
            grid=grid,
            output_rms=output_rms,
            depth=1,
            norm=norm,
            position=position,
        )
