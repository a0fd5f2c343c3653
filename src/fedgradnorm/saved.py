"""The models of a finished run, loaded from its folder."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedgradnorm.build import build_federation
from fedgradnorm.client import Evaluation, evaluate
from fedgradnorm.errors import RunError
from fedgradnorm.federation import Federation
from fedgradnorm.history import Run
from fedgradnorm.parameters import load_buffers, load_flat

__all__ = ["evaluate_run", "joined", "load_model"]


def load_model(run: str | Path, client: str, federation: Federation | None = None) -> nn.Module:
    """The whole model of a client from a run's folder: the shared or its own encoder, with the client's own buffers, and its head.

    Args:
        run: the run's folder.
        client: the client's id.
        federation: what was trained; needed only where it was given in Python.

    Returns:
        An ``nn.Module`` in evaluation mode, with the children ``encoder`` and ``head``.

    Raises:
        RunError: the folder is no finished run, or its models do not fit the federation.
        FederationError: there is no such client.
    """
    opened = Run(Path(run))
    federation = federation or build_federation(opened.config)
    member = federation.client(client)
    seed = opened.config.train.seed
    encoder, head = federation.make_encoder(seed), federation.make_head(member, seed)
    saved = opened.tensors(f"heads/{client}.safetensors")
    try:
        shared = opened.tensors("encoder.safetensors")
        encoder.load_state_dict({name: value for name, value in shared.items() if name not in passing_buffers(encoder)})
        load_buffers(encoder, [(name, shared[name]) for name in passing_buffers(encoder)])
        if "encoder" in saved:
            load_flat(encoder, saved["encoder"])
        head.load_state_dict(_with_prefix(saved, "head."))
        load_buffers(encoder, _with_prefix(saved, "buffer.").items())
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{opened.folder}: the saved models do not fit the federation: {reason}") from error
    return joined(encoder, head)


def evaluate_run(run: str | Path, federation: Federation | None = None) -> dict[str, Evaluation]:
    """Test the saved models of a run on their clients' test data, by client id."""
    federation = federation or build_federation(Run(Path(run)).config)
    evaluations = {}
    for client in federation.clients:
        if client.test_data is not None:
            model = load_model(run, client.id, federation)
            evaluations[client.id] = evaluate(client.task, model.encoder, model.head, client.test_data)  # type: ignore[arg-type]
    return evaluations


def passing_buffers(module: nn.Module) -> set[str]:
    """The names of buffers that a state dict leaves out."""
    return {name for name, _ in module.named_buffers()} - module.state_dict().keys()


def joined(encoder: nn.Module, head: nn.Module) -> nn.Module:
    """Encoder and head as one module in evaluation mode, with these two children."""
    return nn.Sequential(OrderedDict(encoder=encoder, head=head)).eval()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
