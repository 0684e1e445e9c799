"""Features of a frozen encoder on disk, so that an image is encoded once, for all jobs of a sweep and all ranks.

    <folder>/<writer>.features   the features of one image after another, in bfloat16
    <folder>/<writer>.keys       a header (the type of the encoder's output), then the key of each of these images

A folder belongs to one encoder with its options. Each process that encodes adds two files of its own, and reads those
of all others. A key is written after its features have reached the disk (fsync), so a key without features is never
found, whatever kills the process or the machine; what has no key yet is encoded again.

Files are read, not mapped: the page cache is shared all the same, and a truncated file gives no features, where a
memory map would end the process with SIGBUS.

Axes: N images, U different images, P patches per image, Dv encoder width.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.training.run import CONSOLE

KEY = HEADER = 16  # bytes
UNFLUSHED = 64 * 2**20  # bytes
CHUNK = 8  # images that a GPU encodes together


class Costs(NamedTuple):
    """Seconds per image."""

    encode: float
    store: float
    load: float


class FeatureStore:
    """The features of images by their keys; an image without features is encoded and stored.

    The features are rounded to bfloat16 before their first use too, so it does not matter who has encoded an image, and
    when. For the same reason an image is encoded in a batch of a fixed size, in which the others do not change it: a
    batch of one on a CPU, of `CHUNK` elsewhere, filled up with blank images.

    Attributes:
        num_encoded: images that this process has encoded.
        image_bytes: bytes of an image's features.
        max_unflushed: bytes of features that a killed process may lose.
    """

    def __init__(self, *, folder: Path, encoder: Any) -> None:
        self.folder, self.encoder = folder, encoder
        num_patches = encoder.grid[0] * encoder.grid[1] + getattr(encoder, "num_kept_tokens", 0)
        self.shape = (num_patches, encoder.width)  # P Dv
        self.image_bytes = 2 * self.shape[0] * self.shape[1]
        self.num_encoded, self.max_unflushed = 0, UNFLUSHED
        self._places: dict[bytes, tuple[Path, int]] = {}  # of the features of a key: the file, and their number in it
        self._num_read: dict[str, int] = {}  # keys that are in `_places`, of each other process's file
        self._dtype: torch.dtype | None = None  # of the encoder's output
        self._files: tuple[IO[bytes], IO[bytes]] | None = None  # of this process: features and keys
        self._num_written = 0
        self._without_key: list[bytes] = []  # keys of the last features in the file
        self._can_write = True
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @torch.no_grad()
    def __call__(self, pixel_values: Float[Tensor, "n 3 h w"], keys: Sequence[bytes]) -> Float[Tensor, "n p dv"]:
        """The features of images with these keys, on their device and in the type of the encoder's output."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        features = torch.empty(
            len(numbers), *self.shape, dtype=torch.bfloat16, pin_memory=pixel_values.is_cuda
        )  # U P Dv
        missing = [key for key, number in numbers.items() if not self._read(key, features[number])]
        if missing and self.refresh():
            missing = [key for key in missing if not self._read(key, features[numbers[key]])]
        if missing:
            encoded = self._encode(pixel_values[[keys.index(key) for key in missing]])
            self._dtype, self.num_encoded = encoded.dtype, self.num_encoded + len(missing)
            encoded = encoded.bfloat16().cpu().contiguous()
            features[[numbers[key] for key in missing]] = encoded
            self._append(missing, encoded)
        features = features.to(pixel_values.device, non_blocking=True).to(self._dtype)
        return features if len(numbers) == len(keys) else features[[numbers[key] for key in keys]]  # N P Dv

    @torch.no_grad()
    def measure(self, device: torch.device) -> Costs:
        """The costs of an image on this machine. Raises OSError where the folder cannot be written."""
        blank = torch.zeros(self._chunk(device), 3, *self.encoder.image_size, device=device)
        times = []
        for _ in range(3):  # the first is slower
            start = time.perf_counter()
            features = self._encode(blank).bfloat16().cpu()
            times.append((time.perf_counter() - start) / len(blank))
        self.folder.mkdir(parents=True, exist_ok=True)
        content = _buffer(features[:1].expand(CHUNK, -1, -1).contiguous())
        file = self.folder / f"{secrets.token_hex(8)}.tmp"
        try:
            start = time.perf_counter()
            with open(file, "xb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            store = (time.perf_counter() - start) / CHUNK
            start = time.perf_counter()
            with open(file, "rb", buffering=0) as opened:
                opened.readinto(content)
            load = (time.perf_counter() - start) / CHUNK
        finally:
            file.unlink(missing_ok=True)
        return Costs(min(times), store, load)

    def refresh(self) -> bool:
        """Find the features that other processes have stored since; whether there are new ones."""
        before = len(self._places)
        own = self._files and Path(self._files[1].name)
        for file in self.folder.glob("*.keys"):
            if file != own:
                with suppress(FileNotFoundError):  # removed meanwhile
                    self._read_keys(file)
        return len(self._places) > before

    def _read_keys(self, file: Path) -> None:
        """Read the keys that were added to a file. A killed process may have left half a header, or half a key."""
        num = self._num_read.get(file.name, 0)
        if (file.stat().st_size - HEADER) // KEY <= num:
            return
        with open(file, "rb") as opened:
            self._dtype = getattr(torch, opened.read(HEADER).decode("ascii").strip())
            opened.seek(HEADER + num * KEY)
            content = opened.read()
        found = [content[start : start + KEY] for start in range(0, len(content) - KEY + 1, KEY)]
        self._num_read[file.name] = num + len(found)
        features = file.with_suffix(".features")
        complete = features.stat().st_size // self.image_bytes  # fewer than keys if the file was truncated
        self._places |= {key: (features, at) for at, key in enumerate(found, start=num) if at < complete}

    def flush(self) -> None:
        """Write the stored features to disk, then their keys, which lets other processes find them."""
        if self._files is not None and self._without_key and self._can_write:
            features, keys = self._files
            try:
                os.fsync(features.fileno())
                keys.write(b"".join(self._without_key))
                keys.flush()
            except OSError as error:
                self._stop_writing(error)
            self._without_key = []

    def _encode(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p dv"]:
        size, encoded = self._chunk(pixel_values.device), []
        for images in pixel_values.split(size):
            # One memory layout: the rounding of a convolution depends on it.
            batch = images.new_zeros(size, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
            batch[: len(images)] = images
            encoded.append(self.encoder(batch)[: len(images)])
        return torch.cat(encoded)

    @staticmethod
    def _chunk(device: torch.device) -> int:
        return 1 if device.type == "cpu" else CHUNK

    def _read(self, key: bytes, target: Tensor) -> bool:
        """Read the features of a key into `target`; False if they are not there."""
        file, number = self._places.get(key, (None, 0))
        if file is None:
            return False
        try:
            with open(file, "rb", buffering=0) as opened:
                opened.seek(number * self.image_bytes)
                found = opened.readinto(_buffer(target))
        except FileNotFoundError:
            found = 0
        if found != self.image_bytes:  # the file was removed or truncated
            del self._places[key]
        return found == self.image_bytes

    def _append(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Store the features of new images at the end of this process's file."""
        if not self._can_write:
            return
        try:
            if self._files is None:
                self._files = self._create()
            self._files[0].write(_buffer(features))
            self._files[0].flush()
        except OSError as error:
            self._stop_writing(error)
            return
        name = Path(self._files[0].name)
        self._places |= {key: (name, number) for number, key in enumerate(keys, start=self._num_written)}
        self._num_written += len(keys)
        self._without_key += keys
        if len(self._without_key) * self.image_bytes >= self.max_unflushed:
            self.flush()

    def _create(self) -> tuple[IO[bytes], IO[bytes]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.folder / secrets.token_hex(8)
        features, keys = (open(name.with_suffix(end), "xb") for end in (".features", ".keys"))  # noqa: SIM115
        keys.write(str(self._dtype).removeprefix("torch.").ljust(HEADER).encode())
        keys.flush()
        return features, keys

    def _stop_writing(self, error: OSError) -> None:
        self._can_write = False
        CONSOLE.print(
            f"The feature cache cannot be written ({error.strerror}): {self.folder}; the run goes on without storing "
            "further features",
            soft_wrap=True,
        )


def _buffer(features: Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return features.view(torch.uint8).numpy()
