"""MTFL's annotations: every line is checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgradnorm.errors import DataError
from fedgradnorm.federations.mtfl_archive import ANNOTATIONS, inside, opened

NUM_CLASSES = {"gender": 2, "smile": 2, "glasses": 2, "pose": 5}
NUM_COORDINATES = 10
LIMIT = 1_000_000


@dataclass(frozen=True)
class Face:
    """One line of an annotation file.

    Attributes:
        image: the path of its image inside the archive, with ``/``.
        landmarks: shape ``(5, 2)``, x and y in pixels from the image's left and top edge: the eyes,
            the nose, the corners of the mouth.
        labels: gender, smile, glasses and pose, from zero.
        where: the annotation file and the line, for messages.
    """

    image: str
    landmarks: np.ndarray
    labels: tuple[int, ...]
    where: str


def read_faces(path: Path) -> dict[str, list[Face]]:
    r"""The annotations of the two splits, ``train`` and ``test``. No image is read.

    A line holds the image's path (with ``/`` or ``\``), x1..x5, y1..y5, and gender, smile, glasses
    and pose from one. Blank lines, and spaces around a line, are ignored.

    Args:
        path: MTFL.zip, or the folder that it unpacks to. The files may be in one top folder.

    Raises:
        DataError: a path that is missing or not a zip, an annotation file that is missing or empty,
            or a line of another form.

    Source: Zhang, Luo, Loy and Tang, "Facial landmark detection by deep multi-task learning", ECCV
    2014; the data set's readme.txt.
    """
    faces = {}
    with opened(path) as archive:
        for split, name in ANNOTATIONS.items():
            try:
                text = archive.read(name, str(path)).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                message = f"{path}: {name}: expected text, found other bytes: {error}"
                raise DataError(message) from error
            faces[split] = [
                _face(line.split(), f"{path}: {name} line {number}")
                for number, line in enumerate(text.splitlines(), start=1)
                if line.strip()
            ]
            if not faces[split]:
                raise DataError(f"{path}: {name}: expected one line a face, found none")
    return faces


def _face(fields: Sequence[str], where: str) -> Face:
    expected = 1 + NUM_COORDINATES + len(NUM_CLASSES)
    if len(fields) != expected:
        names = f"path, x1..x5, y1..y5, {', '.join(NUM_CLASSES)}"
        raise DataError(f"{where}: expected {expected} fields ({names}), found {len(fields)}")
    numbers = [_number(field, where) for field in fields[1:]]
    landmarks = np.array(numbers[:NUM_COORDINATES]).reshape(2, 5).T
    span = float(np.ptp(landmarks, axis=0).max())
    eyes = math.dist(landmarks[0], landmarks[1])
    if min(span, eyes) < 1:
        raise DataError(
            f"{where}: expected eyes at least one pixel apart, found {eyes:g} "
            f"(all landmarks span {span:g} pixels)"
        )
    labels = []
    for (name, most), label in zip(NUM_CLASSES.items(), numbers[NUM_COORDINATES:], strict=True):
        if label not in range(1, most + 1):
            reason = f"expected a whole number from 1 to {most}, found {label:g}"
            raise DataError(f"{where}: {name}: {reason}")
        labels.append(int(label) - 1)
    return Face(inside(fields[0], f"{where}: path"), landmarks, tuple(labels), where)


def _number(field: str, where: str) -> float:
    try:
        number = float(field)
    except ValueError:
        number = math.nan
    if not abs(number) < LIMIT:
        raise DataError(f"{where}: expected a finite number below {LIMIT}, found {field[:40]!r}")
    return number
