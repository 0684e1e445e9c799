"""Write a trained run as a folder that Transformers reads: vlm-export ckpt=<run dir> out=<folder>."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlm.cli.run_options import parse
from vlm.launch.entry import run_program
from vlm.ranges import Name, Range

USAGE = """Write a trained run as a folder that Transformers reads, with processor, chat template and generation config.

vlm-export ckpt=<run dir> out=<folder> [<option>=<value> ...]

The folder is loaded again in a fresh process and compared with the run on held-out samples of its own data: tokens,
logits and greedy answers. Where they differ, nothing is written.

Options:
  to=hf                  the only kind of folder
  lora=merge             or keep: a LoRA lies apart, in <folder>/adapter
  dtype=float32          or bfloat16: the type of the weights
  samples=4              held-out samples that are compared
  max_new_tokens=32      tokens of their greedy answers
  data.images=<dir>      any option of the run, such as where its data or the weights of its parts lie"""


@dataclass(frozen=True, kw_only=True)
class Options:
    ckpt: Name
    out: Name
    to: Literal["hf"] = "hf"
    lora: Literal["merge", "keep"] = "merge"
    dtype: Literal["float32", "bfloat16"] = "float32"
    samples: Annotated[int, Range(1, 10_000)] = 4
    max_new_tokens: Annotated[int, Range(1, 4_096)] = 32


def run_command(arguments: list[str]) -> None:
    """Export a run. Raises ValueError for options or a run that cannot be used, and for an export that differs."""
    options, given = parse("vlm-export", Options, arguments)
    from vlm.exchange.export import export  # imported here, because it takes seconds
    from vlm.launch.command_line import check_run_dir
    from vlm.launch.overrides import absolute_paths
    from vlm.training.run import CONSOLE

    ckpt, out = (Path(os.path.expanduser(path)) for path in (options.ckpt, options.out))
    check_run_dir("ckpt", ckpt.absolute())
    done = export(
        ckpt,
        out,
        lora=options.lora,
        dtype=options.dtype,
        num_samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        given=absolute_paths(given, ""),
    )
    agreement = done.agreement
    message = (
        f"{out}: {done.kind}, which answers as the run does on {agreement.num_samples} held-out samples: the same "
        f"tokens and greedy texts; its logits differ by up to {agreement.logits:.1e} of the largest, with the pixels "
        f"of its own image processor ({agreement.pixels:.2g} of 255 levels) by up to "
        f"{agreement.logits_of_own_pixels:.1e}."
    )
    if done.runs_code:
        message += (
            "\nIt has its own modeling file, so Transformers needs trust_remote_code=True. "
            f"{done.nearest} cannot hold it: {'; '.join(done.obstacles)}."
        )
    CONSOLE.print(message, soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    run_program(run_command, usage=USAGE)


if __name__ == "__main__":
    main()
