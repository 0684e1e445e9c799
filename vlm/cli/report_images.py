"""Thumbnails of the validation samples whose answers a report shows, read again from the data of the run."""

from __future__ import annotations

import os
from contextlib import chdir

from PIL import Image

from vlm import build, config
from vlm.data.images import to_rgb
from vlm.data.reading import applied
from vlm.report import html
from vlm.report.runs import Run
from vlm.schema import BadSample
from vlm.training import trust


def images_of(run: Run, num: int) -> tuple[dict[str, str], str]:
    """Up to `num` thumbnails by the id of the sample, as HTML, and one sentence where they cannot be had.

    A config that another user has written is not followed to its data.
    """
    if not trust.stored_config(run.folder)[1]:
        return {}, f"The images are not shown, because the config.yaml of {run.name} was not written by you."
    wanted = {str(sample.get("id")) for sample in run.samples[:num]}
    found = {}
    try:
        settings, _, _ = config.stored_config(run.folder)
        with chdir(os.curdir):
            config.enter_folder_of(run.folder)
            data = build.build_data(settings, None, splits=("val",))
            source = data.splits["val"]
            with applied(data.reading):
                # Answers are to samples that are spread over the split, in this order; some more may be unreadable.
                for index in data.val_indices(settings["evaluators"]["answers"]["num_samples"])[: 2 * num]:
                    try:
                        sample = source[index]
                        images = [image for image in sample.images[:2] if isinstance(image, Image.Image)]
                        shown = "".join(html.thumbnail(to_rgb(image, name="")) for image in images)
                    except BadSample:
                        continue
                    if sample.id in wanted:
                        found[sample.id] = shown
    except (ValueError, OSError, KeyError) as error:
        return {}, f"The images are not shown, because the data of {run.name} cannot be read: {error}."
    return found, ""
