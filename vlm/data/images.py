"""Image files, which nobody has vouched for, to plain RGB pictures: every way to fail ends in one `BadImage`."""

from __future__ import annotations

import os
import stat
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vlm.schema import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow also reads EPS (runs Ghostscript), FITS, PSD, ...
MAX_BYTES = 2**26  # 64 MiB
MAX_PIXELS = 2**26  # 8192 x 8192, which is 192 MiB as RGB
DRAFT_SIDE = 1344  # pixels a side that a JPEG keeps at least: twice what tiles of 336 pixels, two by two, make of it
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


def load_image(
    path: str | Path, *, root: Path, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The file's picture as RGB: upright (EXIF), on white where it is transparent, the first frame where it moves.

    `path` is relative to `root`, or absolute; either way it must lie under `root` once symlinks are followed. The
    number of pixels is read from the header and checked before anything is decoded, whatever `Image.MAX_IMAGE_PIXELS`.
    Raises `BadImage`, naming the file, what is wrong and the remedy.
    """
    return decode_image(_read(path, root=root, max_bytes=max_bytes), name=str(path), max_pixels=max_pixels)


def decode_image(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that a file of these bytes holds, as `load_image` gives it; errors call it `name`.

    A JPEG of twice `DRAFT_SIDE` or more on both sides is decoded at a half, a quarter or an eighth of its size, which
    leaves out most of the work, and nothing that an encoder sees that reads up to `DRAFT_SIDE` pixels a side.

    Raises `BadImage`, naming what is wrong and the remedy.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(
                    f"image '{name}' has {width * height:,} pixels ({width} x {height}), more than the limit of "
                    f"{max_pixels:,}; make it smaller"
                )
            image.draft(None, (DRAFT_SIDE, DRAFT_SIDE))  # of JPEG alone
            decoded = _by_torchvision(image, data) if image.size == (width, height) else None
            if decoded is None:
                image.load()
            return _to_rgb(_upright(decoded or image, image), name)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # past Pillow's own limit: no size
        raise BadImage(f"image '{name}' has too many pixels ({str(error).rstrip('.')}); make it smaller") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"image '{name}' is none of {', '.join(FORMATS)}; convert it to one of them") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file made them trip over
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadImage(f"image '{name}' cannot be decoded ({reason}); replace the file") from error


def pad_to_square(image: Image.Image, *, fill: tuple[int, int, int] = WHITE) -> Image.Image:
    """The image in the middle of a square of colour `fill`.

    Raises `ValueError` where the square would hold more than `MAX_PIXELS`: a strip of 1 x 60,000 pixels passes for a
    small image until it is padded.
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if side * side > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels padded to a square are {side * side:,} pixels, more than the limit of "
            f"{MAX_PIXELS:,}; make the image smaller"
        )
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@cache
def _resolved(root: Path) -> str:
    return os.path.realpath(root)


def _read(path: str | Path, *, root: Path, max_bytes: int) -> bytes:
    try:
        home = _resolved(root)
        file = os.path.realpath(os.path.join(home, path))  # in half the time that pathlib takes
        if not os.path.join(file, "").startswith(os.path.join(home, "")):
            raise BadImage(f"image '{path}' lies outside the folder '{root}'; put a copy of the file under that folder")
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever, a device never end
            raise BadImage(f"image '{path}' under '{root}' is not a regular file; replace it with an image file")
        if status.st_size > max_bytes:
            raise BadImage(
                f"image '{path}' has {status.st_size:,} bytes, more than the limit of {max_bytes:,}; make it smaller"
            )
        with open(file, "rb") as handle:
            return handle.read(status.st_size)  # told more, Python would make room for all of it
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"image '{path}' does not exist under '{root}'; add the file or remove its sample") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadImage(f"image '{path}' cannot be read ({reason}); replace the file") from error
    except ValueError as error:  # a null byte or half a surrogate pair in the name
        raise BadImage(f"image {str(path)!r} is not a usable path ({error}); rename the file") from error


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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadImage(
            f"image '{name}' holds 32-bit values (mode {image.mode}), of which none is known to be white; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255, which makes most of the picture white
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.new("RGB", seen.size, WHITE)
        image.paste(seen, mask=seen.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
