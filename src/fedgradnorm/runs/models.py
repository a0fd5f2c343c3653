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
from fedgradnorm.runs.checkpoint import load_newest, with_prefix
from fedgradnorm.runs.entries import CHECKPOINTS
from fedgradnorm.runs.reader import Run


def load_model(run: str | Path, client: str, federation: Federation | None = None) -> nn.Module:
    """Load a client's model from a run's folder: the encoder that the client uses, and its head.

    If a run was killed before it saved its models, they come from its newest checkpoint.

    Args:
        run: the run's folder.
        client: the client's id.
        federation: what was trained; needed only if it was given in Python.

    Returns:
        An ``nn.Module`` in evaluation mode, with the children ``encoder`` and ``head``.

    Raises:
        RunError: the folder holds no models, or they do not fit the federation.
        FederationError: there is no such client.
    """
    saved_run = Run(run)
    check_client_id(client)
    federation = federation_of(saved_run, federation)
    _check_same(saved_run, federation, with_data=False)
    return _loaded(saved_run, client, federation)


def check_client_id(client: object) -> None:
    """Raise FederationError unless a client's id is a text."""
    if not isinstance(client, str):
        raise FederationError(f"client: expected a client's id, found {client!r:.100}")


def federation_of(run: Run, federation: object) -> Federation:
    """The federation that was given, or, for None, the one that the run's settings describe."""
    if federation is None:
        return build_federation(run.config)
    if not isinstance(federation, Federation):
        kind = type(federation).__name__
        raise FederationError(f"federation: expected a Federation, found {kind}")
    return federation


def _check_same(run: Run, federation: Federation, *, with_data: bool) -> None:
    """Raise RunError unless the models, and with data the tests, are those of this federation."""
    before = run.members()
    if before is not None:
        now = members_record(federation, run.config.train.seed, with_data=with_data)
        why = of_encoder(before, now) or of_clients(before, now)
        if with_data:
            why = why or of_data(before, now, test_only=True) or of_models(before, now)
        if why is not None:
            raise RunError(f"{run.folder}: the federation is not the one that was trained: {why}")


def _loaded(run: Run, client: str, federation: Federation) -> nn.Module:
    member = federation.client(client)
    seed = run.config.train.seed
    encoder, head = federation.make_encoder(seed), federation.make_head(member, seed)
    if not (run.folder / "models" / "encoder.safetensors").exists():
        checkpoint, _, _ = load_newest(run.folder / CHECKPOINTS)
        if checkpoint is not None and client in checkpoint.clients:
            state, server = checkpoint.clients[client], checkpoint.server
            load_client(encoder, head, state, server.encoder, server.buffers)
            return joined(encoder, head)
    saved = run.tensors(f"heads/{client}.safetensors")
    try:
        shared = run.tensors("encoder.safetensors")
        _check_fits(encoder, shared)
        load_held(encoder, shared)
        if "encoder" in saved:
            load_flat(encoder, saved["encoder"])
        load_head(head, with_prefix("head.", saved))
        load_buffers(encoder, with_prefix("buffer.", saved).items())
    except (RuntimeError, KeyError, FederationError) as error:
        reason = " ".join(str(error).split())[:300]
        text = f"the saved models do not fit the federation: {reason}"
        raise RunError(f"{run.folder}: {text}") from error
    return joined(encoder, head)


def evaluate_run(run: str | Path, federation: Federation | None = None) -> dict[str, Evaluation]:
    """Test the saved models of a run on their clients' test data, by client id.

    Args:
        run: the run's folder.
        federation: what was trained; needed only if it was given in Python.

    Raises:
        RunError: the folder holds no models, or the federation has other tasks, models or test data
            than when it was trained.
        ClientError: the user's own code raised an error.
    """
    saved_run = Run(run)
    federation = federation_of(saved_run, federation)
    _check_same(saved_run, federation, with_data=True)
    training, evaluations = saved_run.config.train, {}
    for client in federation.clients:
        if client.test_data is not None:
            model = _loaded(saved_run, client.id, federation)
            parts = model.get_submodule("encoder"), model.get_submodule("head")
            settings = training.seed, training.eval_batch_size
            evaluations[client.id] = evaluate_client(client, *parts, *settings)
    return evaluations


def _check_fits(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless saved tensors have the names and shapes of an encoder's."""
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = f"one of {tuple(tensors[name].shape)}" if name in tensors else "none"
            expected = f"expected '{name}' of shape {tuple(tensor.shape)}"
            raise RuntimeError(f"encoder: {expected}, found {found}")


def joined(encoder: nn.Module, head: nn.Module) -> nn.Module:
    """Encoder and head as one module in evaluation mode, with these two children."""
    return nn.Sequential(OrderedDict(encoder=encoder, head=head)).eval()
