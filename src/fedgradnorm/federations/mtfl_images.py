"""MTFL's faces, decoded and cropped."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedgradnorm.errors import ConfigError, DataError, require
from fedgradnorm.federations.cache import cached_arrays
from fedgradnorm.federations.mtfl_annotations import Face
from fedgradnorm.federations.mtfl_archive import ANNOTATIONS, DAMAGED, Archive, opened
from fedgradnorm.randomness import generator

MAX_PIXELS = 25_000_000
CACHE_VERSION = 3
EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"}
"""Pillow's modes with 8 bits or 1 bit a channel."""

MOST_OF_16_BITS, MOST_OF_12_BITS = 2**16 - 1, 2**12 - 1


@dataclass(frozen=True)
class Crop:
    """How a face is cropped: a square around the box of its landmarks, with a fixed random jitter.

    The crop is made from the landmarks, so without the jitter it would reveal them.

    Args:
        image_size: the side of the crop in pixels, 16 to 256.
        colour: three channels instead of one.
        margin: what is added on each side of the box, in box sides. The box side is the longer one.
        jitter: the square's centre moves by at most this many box sides along x and along y. Its
            side is multiplied by a factor between 1 / (1 + jitter) and 1 + jitter.

    Raises:
        ConfigError: a value out of range, or a jitter that could move a landmark out of the square.
    """

    image_size: int
    colour: bool
    margin: float
    jitter: float

    def __post_init__(self) -> None:
        size = self.image_size
        require(16 <= size <= 256, "image_size", "16 to 256 pixels", size)
        for name, value in (("margin", self.margin), ("jitter", self.jitter)):
            require(0 <= value <= 2, name, "a number from 0 to 2", value)
        needed = ((0.5 + self.jitter) * 2 * (1 + self.jitter) - 1) / 2
        if self.margin < needed - 1e-9:
            raise ConfigError(
                f"margin: a jitter of {self.jitter} needs at least {needed:.3f} "
                f"to keep the face inside, found {self.margin}"
            )


def face_square(face: Face, crop: Crop) -> tuple[np.ndarray, float]:
    """The square of a crop: its left and top edge, shape ``(2,)``, and its side, in pixels.

    The jitter depends on the image's path alone, so a face has the same crop in every run and at
    every client.
    """
    low, high = face.landmarks.min(axis=0), face.landmarks.max(axis=0)
    box = float((high - low).max())
    rng = generator(0, 0, face.image, "crop jitter")
    side = box * (1 + 2 * crop.margin) * (1 + crop.jitter) ** rng.uniform(-1, 1)
    centre = (low + high) / 2 + rng.uniform(-crop.jitter, crop.jitter, size=2) * box
    return centre - side / 2, side


def face_arrays(
    path: Path, faces: Mapping[str, Sequence[Face]], crop: Crop
) -> dict[str, np.ndarray]:
    """Crops, landmarks and labels of both splits. The images are decoded once and then cached.

    Args:
        path: the zip or the folder.
        faces: the result of `read_faces`.
        crop: how the faces are cropped.

    Returns:
        For each split: ``{split}_images``, uint8 ``(n, 1 or 3, image_size, image_size)``;
        ``{split}_landmarks``, float32 ``(n, 10)``, x1..x5 then y1..y5 from the crop's left and top
        edge in crop sides; ``{split}_labels``, uint8 ``(n, 4)``.

    Raises:
        DataError: an image that is missing, damaged, too large, or far from its landmarks; or
            Pillow is not installed.
    """
    with opened(path) as archive:
        everyone = [face for split in ANNOTATIONS for face in faces[split]]
        key = {
            "version": CACHE_VERSION,
            "files": archive.fingerprint((face.image, face.where) for face in everyone),
            **asdict(crop),
        }
        return cached_arrays("mtfl", key, lambda: _decoded(archive, faces, crop))


def _decoded(
    archive: Archive, faces: Mapping[str, Sequence[Face]], crop: Crop
) -> dict[str, np.ndarray]:
    pillow = _pillow()
    arrays = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        for split in ANNOTATIONS:
            contents = ((archive.read(face.image, face.where), face) for face in faces[split])
            pairs = [_cropped(pillow, content, face, crop) for content, face in contents]
            images, landmarks = zip(*pairs, strict=True)
            labels = [face.labels for face in faces[split]]
            arrays[f"{split}_images"] = np.stack(images)
            arrays[f"{split}_landmarks"] = np.stack(landmarks)
            arrays[f"{split}_labels"] = np.array(labels, dtype=np.uint8)
    return arrays


def _cropped(
    pillow: ModuleType, content: bytes, face: Face, crop: Crop
) -> tuple[np.ndarray, np.ndarray]:
    pixels = _pixels(pillow, content, face, crop.colour)
    height, width = pixels.shape[:2]
    size = np.array([width, height])
    corner, side = face_square(face, crop)
    outside = np.any(face.landmarks < -size / 2) or np.any(face.landmarks > size * 3 / 2)
    if outside or side**2 > MAX_PIXELS:
        raise DataError(
            f"{face.where}: the landmarks lie far outside the image {face.image!r} "
            f"of {width} x {height} pixels"
        )
    start, end = np.floor(corner).astype(int), np.ceil(corner + side).astype(int)
    # Indices are clipped to the edges, which repeats the edge's pixels.
    columns, rows = (
        np.clip(np.arange(start[axis], end[axis]), 0, size[axis] - 1) for axis in (0, 1)
    )
    left, top = corner - start
    patch = pillow.fromarray(pixels[np.ix_(rows, columns)])
    box, target = (left, top, left + side, top + side), (crop.image_size, crop.image_size)
    shrunk = patch.resize(target, pillow.Resampling.BILINEAR, box=box)
    image = np.asarray(shrunk).reshape(*target, -1).transpose(2, 0, 1)
    return image, ((face.landmarks - corner) / side).T.reshape(-1).astype(np.float32)


def _pixels(pillow: ModuleType, content: bytes, face: Face, colour: bool) -> np.ndarray:
    """The image as uint8, ``(height, width)`` or ``(height, width, 3)``.

    Its size is checked before it is decoded.
    """
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    try:
        with pillow.open(BytesIO(content), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{face.where}: {face.image!r} has {width} x {height} pixels, "
                    f"expected at most {MAX_PIXELS}"
                )
            return np.asarray(_in_eight_bits(pillow, image, face).convert("RGB" if colour else "L"))
    except DataError:
        raise
    except (*DAMAGED, SyntaxError, LookupError, *bombs) as error:
        message = f"{face.where}: {face.image!r} is no image that Pillow can read: {error}"
        raise DataError(message) from error


def _in_eight_bits(pillow: ModuleType, image: Any, face: Face) -> Any:
    """The image with 8 bits a channel. Pillow's own conversion would clip 16 bits to white.

    Raises:
        DataError: the range of the pixels is unknown, such as that of 16 bits with values of 12.
    """
    if image.mode in EIGHT_BITS:
        return image
    pixels = np.asarray(image)
    if not image.mode.startswith("I") or pixels.min() < 0 or pixels.max() > MOST_OF_16_BITS:
        raise DataError(
            f"{face.where}: {face.image!r} has pixels of mode {image.mode!r}, "
            "expected 8 or 16 bits a channel"
        )
    if 0 < pixels.max() <= MOST_OF_12_BITS:
        raise DataError(
            f"{face.where}: {face.image!r} has 16 bits a channel, but its largest value is "
            f"{pixels.max()}, which would be nearly black: it seems to hold values of 8 or 12 "
            "bits; scale them to the range of 0 to 65535, or save it with 8 bits"
        )
    return pillow.fromarray(((pixels.astype(np.int64) + 128) // 257).astype(np.uint8))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('the faces of MTFL need Pillow: pip install "fedgradnorm[mtfl]"') from error
    return Image
