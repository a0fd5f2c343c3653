"""The client's side of a Federation on Flower.

Each node runs one client, loads that client's data alone, and keeps its head in its own files.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

import fedgradnorm.flower.messages as messages
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.client import evaluate_client, initial_state, load_model, local_update
from fedgradnorm.config import TrainConfig, load_config, parse_override
from fedgradnorm.data import size
from fedgradnorm.errors import (
    ConfigError,
    FederationError,
    FedGradNormError,
    MessageError,
    described,
    require,
)
from fedgradnorm.federation import Client, Federation
from fedgradnorm.flower.layout import Layout, buffers_in, encoder_of
from fedgradnorm.flower.reports import evaluation_reply, report_reply
from fedgradnorm.flower.states import LOST_STATE, Beginning, LostState, StateFiles, States, begin
from fedgradnorm.identity import data_record, same_data
from fedgradnorm.members import CLIENT_ID
from fedgradnorm.parameters import buffers_of, norm_layer_slices
from fedgradnorm.threads import kernel_threads

SHARED, LOCAL = ("federation", "model"), ("federation",)
"""The tables of settings that server and clients share, and those in which a client may differ."""
CLIENT_KEY, STATE_DIR, SETTINGS = "client-key", "state-dir", "settings"
THREADS, LOST = "threads", "lost-state"


class Node:
    """One client of a federation that answers messages.

    Args:
        federation: the federation.
        client: the client.
        seed: for the initialisation of the encoder and the head.
        states: gives the place of the client's states in an experiment.
        lost_state: what to do where a state is lost, as in `begin`.
        watch_data: whether to say when the training data differ from those of the state that a
            round begins with.
    """

    def __init__(
        self,
        federation: Federation,
        client: Client,
        seed: int,
        states: Callable[[str], States],
        lost_state: LostState = "refuse",
        watch_data: bool = False,
    ) -> None:
        self.federation, self.client, self.seed, self.states = federation, client, seed, states
        self.lost_state, self.watch_data = lost_state, watch_data
        self.encoder, self.head = federation.make_encoder(seed), federation.make_head(client, seed)
        self.layout = Layout.of(self.encoder)
        self.norm_layer = norm_layer_slices(self.encoder, federation.norm_layer)
        self.initial = initial_state(federation, client, seed, buffers_of(self.encoder))

    def answer(self, message: Message) -> Message:
        """The reply to a message; a refusal where the message is for another client.

        Raises:
            FedGradNormError: a message that is not from FedGradNorm, or a state that is lost.
        """
        control = messages.control_of(message)
        if control.kind == "hello":
            return messages.greeting_reply(self._greeting(), message)
        if control.client != self.client.id:
            return messages.wrong_client(message, control.client, self.client.id)
        if control.kind == "train":
            return self._train(message, control)
        return self._evaluate(message, control)

    def _greeting(self) -> messages.Greeting:
        return messages.Greeting(
            client=self.client.id,
            task=self.client.task.name,
            num_examples=_known_examples(self.client),
            tests=self.client.test is not None,
            **messages.VERSIONS,
        )

    def _train(self, message: Message, control: messages.Control) -> Message:
        instruction = messages.read_instruction(message, control, self.layout)
        states = self.states(control.experiment)
        self._check(instruction.buffers)
        begun = self._begun(states, control)
        report, after = local_update(
            self.client, self.encoder, self.head, self.norm_layer, begun.state, instruction
        )
        data = data_record(self.client.id, self.client.train_data) if self.watch_data else None
        told = begun.aside
        before = states.data(begun.round) if data is not None and begun.round else None
        if data is not None and before is not None and not same_data(before, data):
            told |= {"data_since": begun.round, "data_before": before["examples"]}
        states.save(after, begun.kept(control.keep), data)
        return report_reply(report, self.layout.arrays(report.gradient), message, told)

    def _evaluate(self, message: Message, control: messages.Control) -> Message:
        if self.client.test_data is None:
            raise MessageError(f"client '{self.client.id}' has no test data")
        records = message.content
        vector, buffers = self.layout.vector(encoder_of(records)), buffers_in(records)
        self._check(buffers)
        begun = self._begun(self.states(control.experiment), control)
        load_model(self.encoder, self.head, begun.state, vector, buffers)
        training = messages.training_of(control) if control.training else TrainConfig()
        evaluation = evaluate_client(
            self.client, self.encoder, self.head, self.seed, training.eval_batch_size
        )
        id, task = self.client.id, self.client.task.name
        return evaluation_reply(id, task, control.round, evaluation, message, begun.aside)

    def _begun(self, states: States, control: messages.Control) -> Beginning:
        return begin(
            states, control.base, self.lost_state, lambda: self.initial, control.initial_loss
        )

    def _check(self, buffers: Mapping[str, Tensor]) -> None:
        own = buffers_of(self.encoder) if self.federation.buffers == "averaged" else {}
        shapes = {name: value.shape for name, value in own.items()}
        if {name: value.shape for name, value in buffers.items()} != shapes:
            expected = f"expected {sorted(own)} as the encoder has them"
            raise MessageError(f"buffers: {expected}, found {sorted(buffers)}")


def _known_examples(client: Client) -> int:
    """How many training examples a client has; 0 where they are not loaded yet.

    To load them may take longer than the server waits for a greeting.
    """
    given = isinstance(client.train, tuple) or not callable(client.train)
    return size(client.train_data) if given or "train_data" in client.__dict__ else 0


def client_app(config: str | Path) -> ClientApp:
    """A ClientApp that runs one client of the federation that a configuration file describes.

    The node's own configuration (``flower-supernode --node-config``) says which client, and how:

    - ``client-key``: the client's id; or ``partition-id``, its place in the federation.
    - ``state-dir``: the folder for its head and its F(0). It has to outlive the process.
    - ``settings``: overrides such as ``federation.path=/data/MTFL.zip``, separated by spaces. At
      this site they take precedence over the file and over the server's overrides.
    - ``threads``: kernel threads while it works; by default as many as torch would use.
    - ``lost-state``: what to do where the requested state is not in ``state-dir`` or is damaged.
      ``refuse`` (the default) answers with an error. ``newest`` continues from the newest state
      before it. ``fresh`` continues with a fresh head and the F(0) that the server knows.

    Args:
        config: the file, such as ``Path(__file__).with_name("federation.toml")``.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        threads = context.node_config.get(THREADS)
        if threads is not None and (type(threads) is not int or threads < 1):
            expected = "expected a whole number from 1"
            raise ConfigError(f"node config: {THREADS}: {expected}, found {threads!r}")
        lost = lost_state(context)
        with private_errors(), kernel_threads(threads) if threads is not None else nullcontext():
            control = messages.control_of(message)
            words = words_on(SHARED, control.settings, "message")
            words += words_on(LOCAL, str(context.node_config.get(SETTINGS, "")), "node config")
            settings = resolve_config(load_config(Path(config), words))
            if control.training:  # the server says how to train, and the seed too
                settings = settings.model_copy(update={"train": messages.training_of(control)})
            federation = build_federation(settings)
            client = federation.client(client_key(context, federation.client_ids))
            folder, seed = state_dir(context), settings.train.seed

            def states(experiment: str) -> StateFiles:
                return StateFiles(folder, experiment, client.id)

            return Node(federation, client, seed, states, lost, watch_data=True).answer(message)

    app.train()(handle)
    app.evaluate()(handle)
    return app


@contextmanager
def private_errors() -> Iterator[None]:
    """Reduce foreign errors to their type, also where an error of this package quotes them.

    The words of a foreign error may quote data. They stay in the node's log.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, FedGradNormError) else described(error)
        left_out = said
        cause: BaseException | None = error
        while cause is not None:
            if not isinstance(cause, FedGradNormError):
                instead = f"{type(cause).__name__}: what it says is in the log of the node"
                left_out = left_out.replace(described(cause), instead)
            cause = cause.__cause__
        if left_out == said and isinstance(error, FedGradNormError):
            raise
        raise FedGradNormError(left_out) from error


def client_key(context: Context, known: list[str] | None = None) -> str:
    """The key of a node's client.

    It is ``client-key`` of the node's configuration, or the known key at ``partition-id``.

    Raises:
        ConfigError: neither is there, or no client can have this key.
        FederationError: there is no such partition.
    """
    node = context.node_config
    if CLIENT_KEY in node:
        key = str(node[CLIENT_KEY])
        sound, expected = CLIENT_ID.fullmatch(key) is not None, "letters, digits, '.', '_', '-'"
        require(sound, f"node config: {CLIENT_KEY}", expected, key)
        return key
    partition = node.get("partition-id")
    if type(partition) is not int:
        found = f"found {sorted(node)}: --node-config 'client-key=\"...\"'"
        raise ConfigError(f"node config: expected a '{CLIENT_KEY}', {found}")
    if known is None:
        return f"client-{partition}"
    if not 0 <= partition < len(known):
        expected = f"expected 0 to {len(known) - 1}, found {partition}"
        raise FederationError(f"node config: partition-id: {expected}")
    return known[partition]


def state_dir(context: Context) -> Path:
    """The folder for a node's states: from its own configuration, or else from the app's.

    Raises ConfigError where neither names a folder.
    """
    folder = context.node_config.get(STATE_DIR, context.run_config.get(STATE_DIR))
    if not isinstance(folder, str) or not folder:
        expected = f"a '{STATE_DIR}', the folder that keeps the client's head when its process ends"
        how = "--node-config 'state-dir=\"/var/lib/fedgradnorm\"'"
        raise ConfigError(f"node config: expected {expected}: {how}")
    return Path(folder).expanduser()


def lost_state(context: Context) -> LostState:
    """What a node does where a state is lost. Raises ConfigError if it is not in `LOST_STATE`."""
    word = context.node_config.get(LOST, "refuse")
    known = next((name for name in LOST_STATE if name == word), None)
    if known is None:
        expected = f"expected {', '.join(LOST_STATE[:-1])} or {LOST_STATE[-1]}"
        raise ConfigError(f"node config: {LOST}: {expected}, found {word!r:.100}")
    return known


def words_on(tables: Collection[str], words: str, source: str) -> list[str]:
    """Settings as single words. Raises ConfigError for a word on another table."""
    for word in words.split():
        if table_of(word) not in tables:
            expected = " or ".join(f"{table}.KEY=VALUE" for table in tables)
            raise ConfigError(
                f"{source}: {SETTINGS}: expected words like {expected}, found '{word}': "
                "the server decides all other settings"
            )
    return words.split()


def table_of(word: str) -> str:
    """The table of a setting such as ``federation.alpha=0.2``. Raises ConfigError otherwise."""
    return parse_override(word)[0].partition(".")[0]
