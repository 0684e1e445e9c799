"""Allowed values of options, as annotations of the constructors: `Annotated[int, Range(1, 64)]`.

`vlm.options` checks them before a part is created. Bounds are wide: they refuse impossible values (a width of 0, 5,000
data workers), not unusual ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Number = int | float  # `float` alone would refuse an int at run time


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; `above` and `below` are exclusive bounds."""

    least: Number | None = None
    most: Number | None = None
    above: Number | None = None
    below: Number | None = None

    def __contains__(self, value: Number) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {_number(self.least)} to {_number(self.most)}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class Length:
    """Number of entries of a list or mapping, or of characters of a text."""

    least: int
    most: int | None = None

    def __contains__(self, value: Any) -> bool:
        return self.least <= len(value) and (self.most is None or len(value) <= self.most)

    def __str__(self) -> str:
        if self == Length(1):
            return "that is not empty"
        entries = "entry" if (self.most or self.least) == 1 else "entries"
        if self.most is None:
            return f"with at least {self.least} {entries}"
        return f"with {self.least if self.least == self.most else f'{self.least} to {self.most}'} {entries}"


@dataclass(frozen=True)
class Pattern:
    """Texts that match a regular expression in full, with an example for errors."""

    pattern: str
    example: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f"such as {self.example}"


@dataclass(frozen=True, eq=False)
class Known:
    """Hints for some keys of a mapping; other keys may have any value."""

    hints: dict[str, Any]


def _number(value: Number) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# Sizes of parts
Width = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, 1_000)]
Heads = Annotated[int, Range(1, 1_024)]
Grid = Annotated[Sequence[Annotated[int, Range(1, 1_024)]], Length(2, 2)]  # rows and columns
Layer = Annotated[int, Range(-1_000, 1_000)]
Layers = Layer | Annotated[list[Layer], Length(1)]
ImageSize = Annotated[int, Range(1, 8_192)]  # side in pixels
Interpolation = Literal["bilinear", "bicubic"]
Mean = Annotated[Sequence[Annotated[Number, Range(-1_000, 1_000)]], Length(3, 3)]  # one per channel
Std = Annotated[Sequence[Annotated[Number, Range(above=0, most=1_000)]], Length(3, 3)]

# Counts
BatchSize = Annotated[int, Range(1, 65_536)]
Tokens = Annotated[int, Range(1, 2**24)]  # per row or batch
Steps = Annotated[int, Range(1, 10**9)]
NUM_STEPS = 240  # optimizer steps of a run whose options do not say how many
Epochs = Annotated[Number, Range(above=0, most=10**6)]
Samples = Annotated[int, Range(1, 10**8)]  # their permutation is in memory
Workers = Annotated[int, Range(0, 512)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # as in NumPy

# Ratios
Ratio = Annotated[Number, Range(0, 1)]
RatioBelowOne = Annotated[Number, Range(least=0, below=1)]
RatioAboveZero = Annotated[Number, Range(above=0, most=1)]
Decay = Annotated[Number, Range(above=0, below=1)]

LearningRate = Annotated[Number, Range(0, 100)]

Name = Annotated[str, Length(1)]

# Architecture options with the names of Transformers and timm; other names are allowed too.
Positive = Annotated[Number, Range(above=0, most=10**9)]
Factors = Annotated[list[Positive], Length(1)]
Epsilon = Annotated[Number, Range(above=0, below=1)]
Position = Annotated[int, Range(0, 10**7)]  # of a token in a text or in the vocabulary
RopeParameters = Annotated[
    dict[str, Any],
    Known(
        {
            "rope_type": Name,
            **dict.fromkeys(("short_factor", "long_factor"), Factors),
            **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), Positive),
            "partial_rotary_factor": RatioAboveZero,
            "original_max_position_embeddings": Annotated[int, Range(1, 10**7)],
        }
    ),
]
Facts = Annotated[
    dict[str, Any],
    Known(
        {
            **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "feed_forward_proj"), Name),
            **dict.fromkeys(("hidden_size", "d_model", "d_kv", "embed_dim", "head_dim"), Width),
            **dict.fromkeys(("word_embed_proj_dim", "projection_dim"), Width),
            **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), Annotated[int, Range(1, 10**6)]),
            **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), Depth),
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), Heads),
            **dict.fromkeys(("vocab_size", "max_position_embeddings"), Annotated[int, Range(1, 10**7)]),
            "sliding_window": Annotated[int, Range(1, 10**7)] | None,
            **dict.fromkeys(("image_size", "patch_size"), ImageSize),
            **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Epsilon),
            "query_pre_attn_scalar": Positive,
            "rope_parameters": RopeParameters | None,
            "pad_token_id": Position | None,
            "decoder_start_token_id": Position,
            "tie_word_embeddings": bool,
        }
    ),
]

# Arguments of libraries' constructors whose own annotations are too wide.
Devices = (
    Literal["auto", -1]
    | Annotated[int, Range(1, 1_024)]
    | Annotated[str, Pattern(r"-1|\d{1,4}(,\d{1,4})*", "'0,1'")]
    | Annotated[list[Annotated[int, Range(0, 1_023)]], Length(1)]
)
Duration = (
    Annotated[str, Pattern(r"\d{1,4}:\d\d:\d\d:\d\d", "00:04:30:00 (days, hours, minutes, seconds)")]
    | Annotated[
        dict[Literal["days", "hours", "minutes", "seconds", "weeks"], Annotated[Number, Range(0, 10**6)]], Length(1)
    ]
)
Batches = Annotated[int, Range(0, 10**9)] | Annotated[Number, Range(0, 1)]  # a number of batches, or a ratio
LIBRARIES: dict[str, dict[str, Any]] = {
    "lightning.pytorch.trainer.trainer.Trainer": {
        "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
        "devices": Devices,
        "num_nodes": Annotated[int, Range(1, 65_536)],
        "max_steps": Steps | Literal["auto"],
        **dict.fromkeys(("min_steps", "max_epochs", "min_epochs"), Steps | None),
        "fast_dev_run": bool | Steps,
        "profiler": Literal["simple", "advanced", "pytorch"] | None,
        "max_time": Duration | None,
        "limit_train_batches": Batches | None,
        **dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), Batches | None),
        "overfit_batches": Batches,
        "val_check_interval": Steps,
        "log_every_n_steps": Steps,
        "accumulate_grad_batches": Annotated[int, Range(1, 10**6)],
        "gradient_clip_val": Annotated[Number, Range(0, 10**6)] | None,
        "gradient_clip_algorithm": Literal["norm", "value"] | None,
        "reload_dataloaders_every_n_epochs": Annotated[int, Range(0, 10**6)],
    },
    "lightning.pytorch.loggers.wandb.WandbLogger": {"experiment": type(None)},
    "lightning.pytorch.loggers.csv_logs.CSVLogger": {"flush_logs_every_n_steps": Steps},
}
