"""The models of a finished run, loaded from its folder."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedgradnorm.build import build_federation
from fedgradnorm.client import evaluate_client, load_head
from fedgradnorm.client import load_model as load_client
from fedgradnorm.errors import FederationError, RunError
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.federation import Federation
from fedgradnorm.identity import members_record, of_clients, of_data, of_encoder, of_models
from fedgradnorm.modules import load_held
from fedgradnorm.parameters import load_buffers, load_flat
from fedgradnorm.runs.checkpoint import load_newest
from fedgradnorm.runs.folder import CHECKPOINTS, Run

__all__ = ["check_client_id", "evaluate_run", "federation_of", "joined", "load_model"]


def load_model(run: str | Path, client: str, federation: Federation | None = None) -> nn.Module:
    """The model of a client from a run's folder: the encoder that it uses, and its head.

    The models of a run that was killed, and has none yet, come from its newest checkpoint.

    Args:
        run: the run's folder.
        client: the client's id.
        federation: what was trained; needed only where it was given in Python.

    Returns:
        An ``nn.Module`` in evaluation mode, with the children ``encoder`` and ``head``.

    Raises:
        RunError: the folder holds no models, or they do not fit the federation.
        FederationError: there is no such client.
    """
    opened = Run(run)
    check_client_id(client)
    federation = federation_of(opened, federation)
    _check_same(opened, federation, with_data=False)
    return _loaded(opened, client, federation)


def check_client_id(client: object) -> None:
    """Raise FederationError for what is no client's id."""
    if not isinstance(client, str):
        raise FederationError(f"client: expected a client's id, found {client!r:.100}")


def federation_of(opened: Run, federation: object) -> Federation:
    """The federation that was given, or that the run's settings describe. Raises FederationError for anything else."""
    if federation is None:
        return build_federation(opened.config)
    if not isinstance(federation, Federation):
        raise FederationError(
            f"federation: expected a Federation, found {type(federation).__name__}"
        )
    return federation


def _check_same(opened: Run, federation: Federation, *, with_data: bool) -> None:
    """Raise RunError where a federation is not the one that was trained, as far as models and tests depend on it."""
    before = opened.members()
    if before is not None:
        now = members_record(federation, opened.config.train.seed, with_data=with_data)
        why = of_encoder(before, now) or of_clients(before, now)
        if with_data:
            why = why or of_data(before, now, test_only=True) or of_models(before, now)
        if why is not None:
            raise RunError(
                f"{opened.folder}: the federation is not the one that was trained: {why}"
            )


def _loaded(opened: Run, client: str, federation: Federation) -> nn.Module:
    member = federation.client(client)
    seed = opened.config.train.seed
    encoder, head = federation.make_encoder(seed), federation.make_head(member, seed)
    if not (opened.folder / "models" / "encoder.safetensors").exists():
        checkpoint, _, _ = load_newest(opened.folder / CHECKPOINTS)
        if checkpoint is not None and client in checkpoint.clients:
            state, server = checkpoint.clients[client], checkpoint.server
            load_client(encoder, head, state, server.encoder, server.buffers)
            return joined(encoder, head)
    saved = opened.tensors(f"heads/{client}.safetensors")
    try:
        shared = opened.tensors("encoder.safetensors")
        _check_fits(encoder, shared)
        load_held(encoder, shared)
        if "encoder" in saved:
            load_flat(encoder, saved["encoder"])
        load_head(head, _with_prefix(saved, "head."))
        load_buffers(encoder, _with_prefix(saved, "buffer.").items())
    except (RuntimeError, KeyError, FederationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{opened.folder}: the saved models do not fit the federation: {reason}"
        ) from error
    return joined(encoder, head)


def evaluate_run(run: str | Path, federation: Federation | None = None) -> dict[str, Evaluation]:
    """Test the saved models of a run on their clients' test data, by client id.

    Raises:
        RunError: the folder holds no models, or the federation has other tasks, models or test data than when it was trained.
        ClientError: whatever the user's own code raises.
    """
    opened = Run(run)
    federation = federation_of(opened, federation)
    _check_same(opened, federation, with_data=True)
    training, evaluations = opened.config.train, {}
    for client in federation.clients:
        if client.test_data is not None:
            model = _loaded(opened, client.id, federation)
            encoder, head = model.get_submodule("encoder"), model.get_submodule("head")
            evaluations[client.id] = evaluate_client(
                client, encoder, head, training.seed, training.eval_batch_size
            )
    return evaluations


def _check_fits(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where saved tensors are not those of an encoder."""
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = f"one of {tuple(tensors[name].shape)}" if name in tensors else "none"
            raise RuntimeError(
                f"encoder: expected '{name}' of shape {tuple(tensor.shape)}, found {found}"
            )


def joined(encoder: nn.Module, head: nn.Module) -> nn.Module:
    """Encoder and head as one module in evaluation mode, with these two children."""
    return nn.Sequential(OrderedDict(encoder=encoder, head=head)).eval()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
