"""Decodes untrusted image files to RGB; every failure is a `BadImage`."""

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

# Other formats of Pillow are refused: EPS, for example, runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DRAFT_SIDE = 1344  # pixels that each side of a JPEG keeps at least: twice the side of 2 x 2 tiles of 336 pixels
START_OF_SCAN = b"\xff\xda"  # a marker that cannot occur inside the data of a scan
WHITE = (255, 255, 255)

_ORIENTATION = 0x0112  # the EXIF tag; the transposes below are those of ImageOps.exif_transpose
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
    """An RGB image in an array [height, width, 3], copied into Pillow's memory only when it is changed or saved.

    An encoder's transform only reads the array, so that most images are never copied.
    """

    _array: np.ndarray | None = None  # None after unpickling: then Pillow holds the pixels

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
        # The array itself, not its address: a reader then keeps it alive.
        return {"version": 3, "shape": self._array.shape, "typestr": "|u1", "data": self._array}


class BadImage(BadSample):
    """An image that cannot be used; the message has its name, the defect and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "unreadable_image")


def load_image(path: str | Path, *, root: Path) -> Image.Image:
    """The file's image as RGB: upright (EXIF), transparency on white, the first frame of an animation.

    `path` is relative to `root`, or absolute; either way it must be under `root` once symlinks are followed. The number
    of pixels is read from the header and checked before anything is decoded. The limits are those of data.reading;
    `Image.MAX_IMAGE_PIXELS` has no effect. Raises `BadSample` with the file's name, the defect and the remedy.
    """
    return decode_image(read_inside(path, root=root, what="image", option="max_image_bytes"), name=str(path))


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """The image of a file with these bytes, as `load_image` returns it; errors call it `name`.

    A JPEG of twice `DRAFT_SIDE` or more on both sides is decoded at a half, a quarter or an eighth of its size, which
    is much faster and loses nothing for an encoder that reads up to `DRAFT_SIDE` pixels a side.

    Raises `BadImage` with the defect and the remedy.
    """
    reading = current()
    check_bytes(f"image '{name}'", len(data), option="max_image_bytes")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow must not refuse what data.reading allows
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, reading.max_image_pixels)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_pixels(width, height, name=name)
            if image.format == "JPEG" and (scans := data.count(START_OF_SCAN)) > reading.max_image_scans:
                raise BadImage(
                    f"image '{name}' has {scans} scans, more than the limit of {reading.max_image_scans}; save it "
                    f"again, or set data.reading.max_image_scans={scans}"
                )
            image.draft(None, (DRAFT_SIDE, DRAFT_SIDE))  # has an effect on JPEG only
            decoded = _by_torchvision(image, data) if image.size == (width, height) else None
            if decoded is None:
                image.load()
            return to_rgb(_upright(decoded or image, image), name=name)
    except BadImage:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # Pillow's own limit comes before the size is known
        says = f"image '{name}' has too many pixels ({str(error).rstrip('.')}); make it smaller, or set data.reading."
        raise BadImage(f"{says}max_image_pixels= higher") from error
    except UnidentifiedImageError as error:
        kind = kind_of(data) or f"is not one of {', '.join(FORMATS)}; convert it to one of them"
        raise BadImage(f"image '{name}' {kind}") from error
    except Exception as error:  # Pillow may raise any exception for a broken file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadImage(f"image '{name}' cannot be decoded ({reason}); replace the file") from error


def opened_image(image: Image.Image, *, name: str) -> Image.Image:
    """An image of Pillow's as `load_image` returns that of a file: within the limit of pixels, upright, RGB.

    Raises `BadImage`, naming what is wrong and the remedy.
    """
    _check_pixels(*image.size, name=name)
    try:
        return to_rgb(_upright(image, image), name=name)
    except OSError as error:  # a file that is decoded only now
        raise BadImage(f"image '{name}' cannot be decoded ({error}); replace the file") from error


def _check_pixels(width: int, height: int, *, name: str) -> None:
    """Raise `BadImage` for more pixels than data.reading allows."""
    if width * height > (limit := current().max_image_pixels):
        raise BadImage(
            f"image '{name}' has {width * height:,} pixels ({width} x {height}), more than the limit of {limit:,}; "
            f"make it smaller, or set data.reading.max_image_pixels={width * height}"
        )


def _by_torchvision(image: Image.Image, data: bytes) -> ArrayImage | None:
    """The image of an RGB JPEG, equal to Pillow's and decoded in three quarters of the time.

    None for any other image, and for one that torchvision cannot decode: Pillow then decodes it or reports its defect.
    """
    if (image.format, image.mode) != ("JPEG", "RGB"):
        return None
    from torchvision.io import ImageReadMode, decode_jpeg  # importing takes a second

    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)  # 3 h w
    except RuntimeError:
        return None
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return ArrayImage(array) if array.shape[1::-1] == image.size else None


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """The image transposed as the EXIF orientation of its file says."""
    try:
        turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF is common, and the image can still be used
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """The image as RGB with 8 bits a channel, transparency on white; errors call it `name`.

    A 16-bit image is divided by 256, or with `data.reading.image_range=found` scaled from its own range to 0 to 255.
    """
    if image.mode in ("I", "F"):
        raise BadImage(
            f"image '{name}' holds 32-bit values (mode {image.mode}), whose range is unknown; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow clips at 255, so most of the image would be white
        values = np.asarray(image)
        gray = (values >> 8).astype(np.uint8) if current().image_range == "full" else _stretched(values)
        gray[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGB", transparent.size, WHITE)
        image.paste(transparent, mask=transparent.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image too


def _stretched(values: np.ndarray) -> np.ndarray:
    """The values scaled from their minimum and maximum to 0 to 255; a constant image keeps its 16-bit level."""
    low, high = int(values.min()), int(values.max())
    if low == high:
        return (values >> 8).astype(np.uint8)
    return np.rint((values.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
