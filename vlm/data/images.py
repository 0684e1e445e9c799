"""Image files, which nobody has vouched for, to plain RGB pictures: every way to fail ends in one `BadImage`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vlm.data.files import check_bytes, read_inside
from vlm.data.reading import current
from vlm.file_kinds import kind_of
from vlm.schema import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow also reads EPS (runs Ghostscript), FITS, PSD, ...
DRAFT_SIDE = 1344  # pixels a side that a JPEG keeps at least: twice what tiles of 336 pixels, two by two, make of it
START_OF_SCAN = b"\xff\xda"  # inside a scan, which holds most of a JPEG, no such pair occurs
WHITE = (255, 255, 255)

_ORIENTATION = 0x0112  # the EXIF tag; its values and the turns that undo them are those of ImageOps.exif_transpose
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ArrayImage(Image.Image):
    """An RGB picture in an array [height, width, 3], which Pillow gets a copy of once it is asked to change or save it.

    An encoder's transform only reads the array, so that most pictures are never copied.
    """

    _array: np.ndarray | None = None  # also in what is unpickled, which is Pillow's

    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        array.setflags(write=False)
        self._mode, self._size, self._array = "RGB", (array.shape[1], array.shape[0]), array

    def load(self) -> Any:
        if self._array is not None:
            self.im, self._array = Image.fromarray(self._array).im, None
        return super().load()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self._array is None:
            return super().__array_interface__
        # The array itself and not its address: whoever reads it keeps it alive, whatever becomes of the picture.
        return {"version": 3, "shape": self._array.shape, "typestr": "|u1", "data": self._array}


class BadImage(BadSample):
    """An image that cannot be used; the message names it, what is wrong and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "unreadable_image")


def load_image(path: str | Path, *, root: Path) -> Image.Image:
    """The file's picture as RGB: upright (EXIF), on white where it is transparent, the first frame where it moves.

    `path` is relative to `root`, or absolute; either way it must lie under `root` once symlinks are followed. The
    number of pixels is read from the header and checked before anything is decoded, whatever `Image.MAX_IMAGE_PIXELS`.
    The limits are those of data.reading. Raises `BadSample`, naming the file, what is wrong and the remedy.
    """
    return decode_image(read_inside(path, root=root, what="image", option="max_image_bytes"), name=str(path))


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """The picture that a file of these bytes holds, as `load_image` gives it; errors call it `name`.

    A JPEG of twice `DRAFT_SIDE` or more on both sides is decoded at a half, a quarter or an eighth of its size, which
    leaves out most of the work, and nothing that an encoder sees that reads up to `DRAFT_SIDE` pixels a side.

    Raises `BadImage`, naming what is wrong and the remedy.
    """
    reading = current()
    check_bytes(f"image '{name}'", len(data), option="max_image_bytes")
    if Image.MAX_IMAGE_PIXELS is not None:  # else Pillow would refuse what data.reading allows
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, reading.max_image_pixels)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > reading.max_image_pixels:
                raise BadImage(
                    f"image '{name}' has {width * height:,} pixels ({width} x {height}), more than the limit of "
                    f"{reading.max_image_pixels:,}; make it smaller, or set "
                    f"data.reading.max_image_pixels={width * height}"
                )
            if image.format == "JPEG" and (scans := data.count(START_OF_SCAN)) > reading.max_image_scans:
                raise BadImage(
                    f"image '{name}' has {scans} scans, more than the limit of {reading.max_image_scans}; save it "
                    f"anew, or set data.reading.max_image_scans={scans}"
                )
            image.draft(None, (DRAFT_SIDE, DRAFT_SIDE))  # of JPEG alone
            decoded = _by_torchvision(image, data) if image.size == (width, height) else None
            if decoded is None:
                image.load()
            return to_rgb(_upright(decoded or image, image), name=name)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # past Pillow's own limit: no size
        says = f"image '{name}' has too many pixels ({str(error).rstrip('.')}); make it smaller, or set data.reading."
        raise BadImage(f"{says}max_image_pixels= higher") from error
    except UnidentifiedImageError as error:
        kind = kind_of(data) or f"is none of {', '.join(FORMATS)}; convert it to one of them"
        raise BadImage(f"image '{name}' {kind}") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file made them trip over
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadImage(f"image '{name}' cannot be decoded ({reason}); replace the file") from error


def pad_to_square(image: Image.Image, *, fill: tuple[int, int, int] = WHITE) -> Image.Image:
    """The image in the middle of a square of color `fill`.

    Raises `ValueError` where the square would hold more pixels than data.reading allows: a strip of 1 x 60,000 pixels
    passes for a small image until it is padded.
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if side * side > (limit := current().max_image_pixels):
        raise ValueError(
            f"{width} x {height} pixels padded to a square are {side * side:,} pixels, more than the limit of "
            f"{limit:,}; make the image smaller, or set data.reading.max_image_pixels={side * side}"
        )
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _by_torchvision(image: Image.Image, data: bytes) -> ArrayImage | None:
    """A plain JPEG's picture, the same as Pillow makes of it in three quarters of the time; None for all else.

    What torchvision cannot read is left to Pillow, and to its account of what is wrong.
    """
    if (image.format, image.mode) != ("JPEG", "RGB"):
        return None
    from torchvision.io import ImageReadMode, decode_jpeg  # takes a second, which only JPEG is worth

    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)  # 3 h w
    except RuntimeError:
        return None
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return ArrayImage(array) if array.shape[1::-1] == image.size else None


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """The image turned as its file says."""
    try:
        turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF around sound pixels is common, and then nothing says that they need turning
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """The picture as RGB with 8 bits a channel, on white where it is transparent; errors call it `name`.

    Of 16 bits, the brightest value is white, or with `data.reading.image_range=found` the brightest that it holds, and
    the darkest that it holds black.
    """
    if image.mode in ("I", "F"):
        raise BadImage(
            f"image '{name}' holds 32-bit values (mode {image.mode}), of which none is known to be white; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255, which makes most of the picture white
        values = np.asarray(image)
        gray = (values >> 8).astype(np.uint8) if current().image_range == "full" else _stretched(values)
        gray[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.new("RGB", seen.size, WHITE)
        image.paste(seen, mask=seen.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _stretched(values: np.ndarray) -> np.ndarray:
    """The values from their least to their largest as 0 to 255; one value alone stays what it is of 16 bits."""
    low, high = int(values.min()), int(values.max())
    if low == high:
        return (values >> 8).astype(np.uint8)
    return np.rint((values.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
