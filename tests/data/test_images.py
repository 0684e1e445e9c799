"""Image files nobody has vouched for: what is decoded, and the one sentence for what is not."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.data.images import START_OF_SCAN, ArrayImage, decode_image, load_image
from vlm.data.reading import Reading, applied
from vlm.encoders.transform import Transform
from vlm.schema import BadSample

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(size: tuple[int, int] = (6, 4)) -> Image.Image:
    """Green, with a red pixel at the top left."""
    image = Image.new("RGB", size, GREEN)
    image.putpixel((0, 0), RED)
    return image


def png(width: int, height: int, rows: bytes, *extra: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """An RGB PNG file by hand: what its header claims, the uncompressed rows that it holds, and chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def refusal(path: str | Path, root: Path, **limits: int) -> str:
    with pytest.raises(BadSample) as caught, applied(Reading(**limits)):
        load_image(path, root=root)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_bytes_from_anywhere_are_decoded_under_the_name_given() -> None:
    png = BytesIO()
    picture().save(png, "PNG")
    assert decode_image(png.getvalue(), name="row 7").getpixel((0, 0)) == RED
    message = r"^image 'row 7' has 24 pixels \(6 x 4\), more than the limit of 23; make"
    with applied(Reading(max_image_pixels=23)), pytest.raises(BadSample, match=message):
        decode_image(png.getvalue(), name="row 7")
    with pytest.raises(BadSample, match=r"^image 'row 8' is not one of JPEG, "):
        decode_image(b"hello", name="row 8")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_every_allowed_format_opens_as_rgb(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (6, 4), GREEN).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = load_image(f"a.{suffix}", root=tmp_path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert max(abs(a - b) for a, b in zip(image.getpixel((3, 2)), GREEN, strict=True)) <= (2 if suffix == "jpg" else 0)


def test_absolute_path_and_dots_inside_the_root_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    picture().save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), "x/../a.png", "link.png"):
        assert load_image(path, root=tmp_path).getpixel((0, 0)) == RED


def test_a_root_that_is_itself_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    picture().save(tmp_path / "real" / "a.png")
    (tmp_path / "root").symlink_to("real")
    assert load_image("a.png", root=tmp_path / "root").size == (6, 4)


def test_nothing_outside_the_root_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "root2").mkdir()  # shares the root's name as a prefix
    for place in (tmp_path, tmp_path / "root2"):
        picture().save(place / "secret.png")
    (root / "file.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    for path in (
        "../secret.png",
        "sub/../../secret.png",
        str(tmp_path / "secret.png"),
        "../root2/secret.png",
        "file.png",
        "folder/secret.png",
    ):
        assert refusal(path, root) == (
            f"image '{path}' is outside the folder '{root}'; put a copy of the file under that folder"
        )


def test_what_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert refusal("gone.png", tmp_path) == (
        f"image 'gone.png' does not exist under '{tmp_path}'; add the file or remove its sample"
    )
    for name in ("folder.png", "pipe.png"):
        assert "is not a regular file; replace it with an image file" in refusal(name, tmp_path)
    refusal("loop.png", tmp_path)
    with pytest.raises(BadSample, match="is not a usable path"):
        load_image("a\0.png", root=tmp_path)
    assert "File name too long" in refusal("a" * 300, tmp_path)


def test_too_many_bytes(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.bmp")
    size = (tmp_path / "a.bmp").stat().st_size
    with applied(Reading(max_image_bytes=size)):
        assert load_image("a.bmp", root=tmp_path).size == (6, 4)
    assert refusal("a.bmp", tmp_path, max_image_bytes=size - 1) == (
        f"image 'a.bmp' has {size} bytes, more than the limit of {size - 1}; make it smaller, or set "
        f"data.reading.max_image_bytes={size}"
    )


@pytest.mark.parametrize("pillow_limit", [None, 10**12])
def test_a_bomb_is_refused_from_its_header_whatever_pillow_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded before the size was checked"))
    (tmp_path / "bomb.png").write_bytes(png(50_000, 40_000, b"\0" * 99))
    assert refusal("bomb.png", tmp_path) == (
        "image 'bomb.png' has 2,000,000,000 pixels (50000 x 40000), more than the limit of 67,108,864; make it "
        "smaller, or set data.reading.max_image_pixels=2000000000"
    )


def test_a_bomb_past_pillows_own_limit(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(50_000, 40_000, b"\0" * 99))
    message = refusal("bomb.png", tmp_path)
    assert message.startswith("image 'bomb.png' has too many pixels (Image size (2000000000 pixels) exceeds limit")
    assert message.endswith("; make it smaller, or set data.reading.max_image_pixels= higher")


def test_the_pixel_limit_itself_is_allowed(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with applied(Reading(max_image_pixels=24)):
        assert load_image("a.png", root=tmp_path).size == (6, 4)
    assert "has 24 pixels (6 x 4), more than the limit of 23;" in refusal("a.png", tmp_path, max_image_pixels=23)


def test_a_limit_that_is_raised_goes_beyond_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # which refuses twice as many
    picture().save(tmp_path / "a.png")
    with applied(Reading(max_image_pixels=24)):
        assert load_image("a.png", root=tmp_path).size == (6, 4)


def test_scans_of_a_progressive_jpeg_are_limited() -> None:
    data = BytesIO()
    picture((64, 64)).save(data, "JPEG", progressive=True)
    plain = data.getvalue()
    scans = plain.count(START_OF_SCAN)
    assert 5 < scans < 20
    last = plain.rindex(START_OF_SCAN)
    many = plain[:-2] + plain[last:-2] * 400 + plain[-2:]
    message = rf"^image 'x' has {scans + 400} scans, more than the limit of 64; .* data\.reading\.max_image_scans="
    with pytest.raises(BadSample, match=message):
        decode_image(many, name="x")
    with applied(Reading(max_image_scans=scans + 400)):
        assert decode_image(many, name="x").size == (64, 64)


def test_deep_pictures_can_be_scaled_by_the_range_that_they_hold() -> None:
    data = BytesIO()
    Image.fromarray(np.array([[100, 1100, 4095]], dtype=np.uint16)).save(data, "PNG")  # 12 bits, as X-rays have them
    plain = BytesIO()
    Image.fromarray(np.array([[4095, 4095]], dtype=np.uint16)).save(plain, "PNG")
    seen = np.asarray(decode_image(data.getvalue(), name="x"))[0, :, 0]
    assert seen.tolist() == [0, 4, 15]
    with applied(Reading(image_range="found")):
        seen = np.asarray(decode_image(data.getvalue(), name="x"))[0, :, 0]
        assert seen.tolist() == [0, 64, 255]  # 64 = 1000 / 3995 of 255
        assert np.asarray(decode_image(plain.getvalue(), name="x"))[0, :, 0].tolist() == [15, 15]


ONE_RED = b"\0" + bytes(RED)  # the row of a PNG of one pixel
ZEROS = zlib.compress(b"\0" * 2**21)  # of Pillow's limit of 2**20 bytes for a chunk that unpacks


@pytest.mark.parametrize(
    "chunk", [(b"zTXt", b"a\0\0" + ZEROS), (b"iTXt", b"a\0\1\0\0\0" + ZEROS), (b"iCCP", b"a\0\0" + ZEROS)]
)
def test_what_a_png_says_about_itself_is_no_way_in_for_a_bomb(chunk: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadSample, match=r"^image 'a' cannot be decoded \(ValueError: Decompressed data too large "):
        decode_image(png(1, 1, ONE_RED, chunk), name="a")


def test_rows_past_the_last_are_not_unpacked() -> None:
    assert decode_image(png(1, 1, ONE_RED + b"\0" * 2**21), name="a").getpixel((0, 0)) == RED


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tiff"])
def test_later_frames_are_never_reached(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    file, later = BytesIO(), Image.new("RGB", (8, 8) if suffix != "tiff" else (900, 900), GREEN)
    Image.new("RGB", (8, 8), RED).save(file, suffix, save_all=True, append_images=[later] * 3)
    for reader in ("Png", "Gif", "WebP", "Tiff"):
        monkeypatch.setattr(f"PIL.{reader}ImagePlugin.{reader}ImageFile.seek", lambda *_: pytest.fail("moved on"))
    with applied(Reading(max_image_pixels=64)):
        assert decode_image(file.getvalue(), name="a").size == (8, 8)


def test_a_gif_whose_frame_is_larger_than_its_screen() -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0) + b"\x02\x02\x4c\x01\x00;"
    with pytest.raises(BadSample, match=r"^image 'a' has 81,000,000 pixels \(9000 x 9000\), more than the limit of"):
        decode_image(screen + frame, name="a")


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_exif_that_claims_more_than_the_file_holds_still_turns_the_picture() -> None:
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x9286, 7, 2**31 - 1, 8)
    file = BytesIO()
    picture((8, 4)).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4))
    assert decode_image(file.getvalue(), name="a").size == (4, 8)


def test_a_large_color_profile_costs_no_more_than_its_bytes() -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8), RED).save(file, "JPEG", icc_profile=b"x" * 2**20)
    assert decode_image(file.getvalue(), name="a").getpixel((4, 4))[0] > 250


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_files_are_errors(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(data[: len(data) * 2 // 3])
    message = refusal(f"a.{suffix}", tmp_path)
    assert message.endswith(("; replace the file", "; convert it to one of them"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.png", b""),
        ("text.png", b"hello"),
        ("page.ps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("old.ppm", b"P6 1 1 255\n\0\0\0"),
        ("drawing.svg", b"<svg/>"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(name, tmp_path) == (
        f"image '{name}' is not one of JPEG, PNG, WEBP, GIF, BMP, TIFF; convert it to one of them"
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize(
    ("orientation", "corner"),  # where the red corner of the stored pixels is meant to be seen; from the EXIF standard
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (32, 16), GREEN)
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    seen = load_image(f"a.{suffix}", root=tmp_path)
    assert seen.size == ((16, 32) if orientation >= 5 else (32, 16))
    red, green, _ = seen.getpixel((corner[0] * (seen.width - 1), corner[1] * (seen.height - 1)))
    assert red > 200 > 100 > green


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert load_image("a.png", root=tmp_path).getpixel((0, 0)) == RED


def test_transparency_goes_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    assert list(load_image("rgba.png", root=tmp_path).get_flattened_data()) == [WHITE, (255, 127, 127)]

    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "key.png", transparency=GREEN)
    assert load_image("la.png", root=tmp_path).getpixel((0, 0)) == WHITE
    assert load_image("key.png", root=tmp_path).getpixel((0, 0)) == WHITE
    for name in ("palette.png", "palette.gif"):
        assert list(load_image(name, root=tmp_path).get_flattened_data()) == [WHITE, GREEN]


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    values = Image.fromarray(np.array([[0, 0x8001, 0xFFFF]], dtype=np.uint16))
    for name in ("a.png", "a.tiff"):
        values.save(tmp_path / name)
        assert [pixel[0] for pixel in load_image(name, root=tmp_path).get_flattened_data()] == [0, 128, 255]
    colors = decode_image(png(2, 1, b"\0" + struct.pack(">6H", 0, 0x8001, 0xFFFF, *[0x7FFF] * 3), depth=16), name="a")
    assert list(colors.get_flattened_data()) == [(0, 128, 255), (127, 127, 127)]
    values.save(tmp_path / "key.png", transparency=0)
    assert [pixel[0] for pixel in load_image("key.png", root=tmp_path).get_flattened_data()] == [255, 128, 255]


def test_other_modes(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert b"Adobe" in (tmp_path / "cmyk.jpg").read_bytes()  # and so its values are inverted
    red, green, blue = load_image("cmyk.jpg", root=tmp_path).getpixel((4, 4))
    assert red > 250 > 5 > max(green, blue)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert load_image("cmyk.tiff", root=tmp_path).getpixel((4, 4)) == RED
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "lab.tiff")
    assert min(load_image("lab.tiff", root=tmp_path).getpixel((4, 4))) > 250
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert load_image("bit.png", root=tmp_path).getpixel((0, 0)) == WHITE
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tiff")
    assert refusal("float.tiff", tmp_path) == (
        "image 'float.tiff' holds 32-bit values (mode F), whose range is unknown; save it with 8 or 16 bits"
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_what_moves(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, green, _ = load_image(f"a.{suffix}", root=tmp_path).getpixel((4, 4))
    assert red > 240 > 10 > green


def photograph(size: tuple[int, int]) -> tuple[Image.Image, bytes]:
    """Slow waves with sharp edges in them, and its JPEG."""
    x, y = np.meshgrid(np.linspace(0, 20, size[0]), np.linspace(0, 15, size[1]))
    waves = np.stack([np.sin(x), np.cos(x + y), np.sign(np.sin(3 * y))], axis=2)
    image = Image.fromarray((127.5 + 100 * waves).astype(np.uint8))
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return image, file.getvalue()


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    see = Transform(size=(336, 336), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic")
    for size, decoded in (((2800, 2700), (1400, 1350)), ((2687, 2800), (2687, 2800))):
        image, file = photograph(size)
        seen = decode_image(file, name="it")
        assert seen.size == decoded
        difference = (see(seen) - see(image)).abs()
        assert difference.mean() < 1 / 255, size
        assert difference.max() < 24 / 255, size


def as_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"restart_marker_rows": 1}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_jpeg_read_by_torchvision_is_the_same_picture(options: dict[str, int]) -> None:
    file = BytesIO()
    photograph((123, 77))[0].save(file, "JPEG", quality=80, **options)
    image = decode_image(file.getvalue(), name="a")
    assert isinstance(image, ArrayImage)
    np.testing.assert_array_equal(np.asarray(image), as_pillow(file.getvalue()))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_are_left_to_pillow(mode: str) -> None:
    file = BytesIO()
    photograph((123, 77))[0].convert(mode).save(file, "JPEG")
    image = decode_image(file.getvalue(), name="a")
    assert not isinstance(image, ArrayImage)
    np.testing.assert_array_equal(np.asarray(image), as_pillow(file.getvalue()))


def test_a_damaged_jpeg_is_what_pillow_makes_of_it() -> None:
    sound = photograph((48, 32))[1]
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(sound[: rng.integers(1, len(sound))] if rng.random() < 0.2 else sound)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            expected = as_pillow(bytes(data))
        except Exception:  # Pillow's readers raise whatever a broken file made them trip over
            expected = None
        try:
            image = decode_image(bytes(data), name="a")
        except BadSample:
            assert expected is None
            outcomes.add("refused")
        else:
            np.testing.assert_array_equal(np.asarray(image), expected)
            outcomes.add(type(image))
    assert outcomes >= {"refused", ArrayImage}


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resize": lambda image: image.resize((20, 30)),
    "crop": lambda image: image.crop((3, 4, 30, 40)),
    "transpose": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "convert": lambda image: image.convert("L"),
    "copy": lambda image: image.copy(),
    "deepcopy": deepcopy,
    "pickle": lambda image: pickle.loads(pickle.dumps(image)),
    "draw": lambda image: (ImageDraw.Draw(image).line((0, 0, 50, 50), fill=RED), image)[1],
    "paste": lambda image: (image.paste(GREEN, (5, 5, 9, 9)), image)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_in_an_array_is_pillows_own_in_all_else(change: str) -> None:
    data = photograph((96, 80))[1]
    image = decode_image(data, name="a")
    before = np.asarray(image)
    expected = Image.open(BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(CHANGES[change](image)), np.asarray(CHANGES[change](expected)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))  # drawn on, where it was
    np.testing.assert_array_equal(before, as_pillow(data))  # and what was read before stays
