"""MTFL: five landmarks, gender, smile, glasses and head pose of 12,995 faces."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgradnorm.errors import DataError
from fedgradnorm.federation import Client, Federation
from fedgradnorm.federations.mtfl_annotations import NUM_CLASSES, NUM_COORDINATES, read_faces
from fedgradnorm.federations.mtfl_images import Crop, face_arrays
from fedgradnorm.federations.partition import client_ids_of, partition
from fedgradnorm.federations.tasks import classification, with_loss_scale
from fedgradnorm.models import cnn
from fedgradnorm.task import Metric, Task

VARIABLE = "FEDGRADNORM_MTFL"
FAILURE_THRESHOLD = 0.1
DARKEST_SPREAD = 0.01
MEAN_FACE = ((-0.42, 0.42, 0.0, -0.36, 0.36), (-0.45, -0.45, 0.06, 0.46, 0.46))
"""MTFL's mean face, made symmetric: x and y of the eyes, the nose and the corners of the mouth.

They are in box sides from the middle of the landmarks' box.
"""
SPREAD = 0.06
"""The unit of the landmark loss: the standard deviation of a landmark's coordinate, rounded.

It is in crop sides.
"""


def face_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """The landmark error of each face: the mean distance of its points over that of the eyes.

    Args:
        outputs: predictions, shape ``(n, 10)``, x1..x5 then y1..y5.
        targets: the true landmarks, of the same shape. Points 0 and 1 are the eyes.

    Returns:
        Shape ``(n,)``, as a share of the true distance of the eyes.
    """
    predicted, true = outputs.double().view(-1, 2, 5), targets.double().view(-1, 2, 5)
    inter_ocular = torch.linalg.vector_norm(true[:, :, 0] - true[:, :, 1], dim=1)
    errors: Tensor = torch.linalg.vector_norm(predicted - true, dim=1).mean(dim=1) / inter_ocular
    return errors


def landmark_error(outputs: Tensor, targets: Tensor) -> float:
    """The mean of `face_errors`."""
    return float(face_errors(outputs, targets).mean())


def failure_rate(outputs: Tensor, targets: Tensor) -> float:
    """The share of faces with an error above 10 % of the distance of the eyes.

    Source: Zhang et al., ECCV 2014.
    """
    return float((face_errors(outputs, targets) > FAILURE_THRESHOLD).double().mean())


LANDMARK_ERROR = Metric("mean landmark error", landmark_error, higher_is_better=False, percent=True)
FAILURE_RATE = Metric("failure rate", failure_rate, higher_is_better=False, percent=True)


class LandmarkHead(nn.Module):
    """Landmarks as the mean face and an offset from a linear layer.

    Training starts from the mean face, so the loss shows what was learned.

    Args:
        in_features: the size of the encoder's output.
        margin: the margin of the crop, which determines the size of the mean face in it.
    """

    mean_face: Tensor

    def __init__(self, in_features: int, margin: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, NUM_COORDINATES)
        face = 0.5 + torch.tensor(MEAN_FACE).flatten() / (1 + 2 * margin)
        self.register_buffer("mean_face", face)

    def forward(self, features: Tensor) -> Tensor:
        """Features, ``(batch, in_features)``, to landmarks, ``(batch, 10)``, in crop sides."""
        landmarks: Tensor = self.mean_face + SPREAD * self.linear(features)
        return landmarks


def landmark_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error in units of `SPREAD`. It is about 1 for the mean face."""
    return functional.mse_loss(outputs, targets) / SPREAD**2


def tasks_for(margin: float) -> dict[str, Task]:
    """The five tasks by name, for crops with this margin."""
    head, metrics = partial(LandmarkHead, margin=margin), (LANDMARK_ERROR, FAILURE_RATE)
    return {
        "landmarks": Task("landmarks", head, landmark_loss, metrics),
        **{name: classification(name, count) for name, count in NUM_CLASSES.items()},
    }


Part = tuple[Tensor, dict[str, Tensor]]
"""Images, and the targets of every task."""


def standardised(images: np.ndarray) -> Tensor:
    """Each image scaled to [0, 1], less its mean, divided by its standard deviation; float32.

    It needs no statistics of other images, so a client learns nothing about other clients' data.
    A standard deviation below 0.01 counts as 0.01, so that an empty image does not become noise.
    """
    scaled = torch.from_numpy(images).float().div_(255)
    mean = scaled.mean(dim=(1, 2, 3), keepdim=True)
    spread = scaled.std(dim=(1, 2, 3), keepdim=True).clamp_min(DARKEST_SPREAD)
    return scaled.sub_(mean).div_(spread)


def _located(path: str | None) -> Path:
    location = path or os.environ.get(VARIABLE)
    if not location:
        raise DataError(
            "path: expected MTFL.zip or its unpacked folder, as federation.path=... "
            f"or in ${VARIABLE}; found neither"
        )
    return Path(location).expanduser().absolute()


def _parts(
    path: str | None, crop: Crop, deal: Callable[[int], dict[str, np.ndarray]]
) -> dict[str, Part]:
    """The training part of each client by its id, and the test part under ``""``."""
    archive = _located(path)
    faces = read_faces(archive)
    train = deal(len(faces["train"]))
    arrays = face_arrays(archive, faces, crop)
    chosen = {"": ("test", np.arange(len(faces["test"])))}
    chosen |= {client: ("train", part) for client, part in train.items()}
    parts = {}
    for client, (split, rows) in chosen.items():
        labels = torch.from_numpy(arrays[f"{split}_labels"][rows]).long()
        targets = {name: labels[:, column].contiguous() for column, name in enumerate(NUM_CLASSES)}
        targets["landmarks"] = torch.from_numpy(arrays[f"{split}_landmarks"][rows])
        parts[client] = (standardised(arrays[f"{split}_images"][rows]), targets)
    return parts


def _data(parts: Callable[[], dict[str, Part]], client: str, task: str) -> tuple[Tensor, Tensor]:
    images, targets = parts()[client]
    return images, targets[task]


def make(
    seed: int,
    path: str | None = None,
    tasks: Sequence[str] = ("landmarks", "gender", "smile", "glasses", "pose"),
    image_size: int = 40,
    colour: bool = False,
    margin: float = 0.5,
    jitter: float = 0.15,
    clients_per_task: int = 1,
    sizes: str | Mapping[str, int | float] = "equal",
    alpha: float = 0.5,
    loss_scale: Mapping[str, float] = {},
) -> Federation:
    """The faces of MTFL: landmarks, gender, smile, glasses and head pose.

    Landmarks are 10 numbers from 0 to 1, in crop sides; see `LandmarkHead` and `landmark_loss`.
    Classes are the annotation's, from zero: gender 0 is male, smile 0 is smiling, glasses 0 is
    wearing glasses, pose 0 to 4 is left profile to right profile. The images are standardised one
    by one, shape ``(n, 1 or 3, image_size, image_size)``. They are read on first use, and the crops
    are kept in the cache folder.

    Args:
        seed: seed of the split into clients. The crops are the same for every seed.
        path: the official MTFL.zip, or the folder that it unpacks to. None: ``$FEDGRADNORM_MTFL``.
        tasks: which of ``landmarks``, ``gender``, ``smile``, ``glasses``, ``pose``.
        image_size: the side of a face crop in pixels.
        colour: three channels instead of one.
        margin: what the crop adds on each side of the landmarks' box, in box sides; see `Crop`.
        jitter: how far the crop is moved, in box sides, and scaled; see `Crop`.
        clients_per_task: the number of clients of each task.
        sizes: how the training images are divided among the clients; see `partition`. Every client
            has all test images.
        alpha: the concentration for ``sizes="dirichlet"``.
        loss_scale: by task, a factor on its loss, and so on its gradients.

    Raises:
        ConfigError: an unknown task, or a value out of range.
        DataError: on first use, a missing or malformed path, annotation or image.

    Source: Zhang, Luo, Loy and Tang, "Facial landmark detection by deep multi-task learning", ECCV
    2014.
    """
    crop = Crop(image_size, colour, margin, jitter)
    known = with_loss_scale(tasks_for(margin), loss_scale)
    clients = client_ids_of(tasks, clients_per_task, known)
    deal = partial(partition, clients=clients, sizes=sizes, alpha=alpha, seed=seed)
    parts = cache(partial(_parts, path, crop, deal))
    shape = (3 if colour else 1, image_size, image_size)
    encoder, data = partial(cnn, input_shape=shape, batch_norm=True), partial(_data, parts)
    members = [
        Client(id, known[task], partial(data, id, task), partial(data, "", task))
        for id, task in clients.items()
    ]
    return Federation(members, encoder=encoder, example=torch.zeros(1, *shape))
