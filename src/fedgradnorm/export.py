"""A client's model as a file that is used without this package."""

import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fedgradnorm.atomic import write_atomically
from fedgradnorm.errors import ConfigError, RunError, described
from fedgradnorm.federation import Federation
from fedgradnorm.runs.models import federation_of, load_model
from fedgradnorm.runs.reader import Run

BATCHES = ({0: torch.export.Dim("batch")},)
"""The first dimension of the input may have any size."""


def export_model(
    run: str | Path,
    client: str,
    output: str | Path | None = None,
    federation: Federation | None = None,
    *,
    onnx: bool = False,
) -> Path:
    """Write a client's model, encoder and head, as one program for any batch size.

    Args:
        run: the run's folder.
        client: the client's id.
        output: the file; None: ``CLIENT.pt2``, or ``CLIENT.onnx``, in the run's folder ``models/``.
        federation: what was trained; needed only where it was given in Python.
        onnx: whether the file is ONNX; else it is a program of `torch.export`.

    Returns:
        The file. `torch.export.load` reads a program, onnxruntime and others read ONNX.

    Raises:
        RunError: the folder holds no models, or the model cannot be exported.
        FederationError: there is no such client, or the federation cannot be built.
        ConfigError: onnx is asked for and its packages are not installed.
    """
    opened = Run(run)
    federation = federation_of(opened, federation)
    model = load_model(run, client, federation)
    suffix = ".onnx" if onnx else ".pt2"
    path = opened.folder / "models" / f"{client}{suffix}" if output is None else Path(output)
    if not path.parent.is_dir():
        raise RunError(f"{path}: cannot be written: there is no folder {path.parent}")
    example = federation.example_of(federation.client(client))
    # two examples: a batch of one would be taken for a constant
    inputs = torch.cat([example, example])
    content = _onnx(model, inputs) if onnx else _program(model, inputs)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _program(model: nn.Module, inputs: Tensor) -> bytes:
    try:
        program = torch.export.export(model, (inputs,), dynamic_shapes=BATCHES)
    except Exception as error:  # the user's own model may do anything
        raise RunError(f"the model cannot be exported: {described(error)}") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, inputs: Tensor) -> bytes:
    if find_spec("onnxscript") is None:
        raise ConfigError('--onnx: its packages are not installed: pip install "fedgradnorm[onnx]"')
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision's operations, which are not needed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of old names
            program = torch.onnx.export(
                model, (inputs,), dynamo=True, dynamic_shapes=BATCHES, verbose=False
            )
    except Exception as error:  # the user's own model may do anything
        raise RunError(f"the model cannot be exported to ONNX: {described(error)}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise RunError("the model cannot be exported to ONNX: torch gave no program")
    content: bytes = program.model_proto.SerializeToString()
    return content
