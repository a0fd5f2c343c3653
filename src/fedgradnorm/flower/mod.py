"""A mod for users' own ClientApps: a private head, and the figures that FedGradNorm needs."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

import fedgradnorm.flower.messages as messages
from fedgradnorm.client import ClientState
from fedgradnorm.errors import ConfigError, MessageError, nearest
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.flower.client import client_key, lost_state, private_errors, state_dir
from fedgradnorm.flower.layout import Layout, arrays_of, encoder_of, tensors_of
from fedgradnorm.flower.records import ARRAYS, CONFIG, METRICS
from fedgradnorm.flower.reports import evaluation_reply, report_reply
from fedgradnorm.flower.roster import module_of
from fedgradnorm.flower.states import Beginning, StateFiles, States, begin
from fedgradnorm.messages import Report
from fedgradnorm.parameters import matches, norm_layer_slices, norm_over
from fedgradnorm.randomness import seeded


class FedGradNormMod:
    """For ``ClientApp(mods=[FedGradNormMod(...)])``.

    The app keeps its training code and sees whole models. The server sees encoders alone.

    Before the app is called, the mod adds the client's head to the encoder that came. Afterwards
    the head goes to the client's own files (``state-dir`` in the node's configuration), and the
    reply holds the encoder's update, F_i(k), F_i(0) and n_i. F_i(0) is the training loss of the
    client's first round, as an app gives no earlier one. Buffers, such as BatchNorm's statistics,
    stay with the head.

    The app's functions get a message with the records ``arrays`` and ``config``, and answer with
    the trained ``arrays`` and ``metrics``, as Flower's own examples do. ``lost-state`` in the
    node's configuration says what to do where the head is lost, as in `client_app`.

    Args:
        model: makes the client's model, without arguments or from the `Context`. The first head is
            taken from it.
        head: the parameters of the head: names, layers or patterns such as ``"fc3"``.
        task: the task's name; by default ``task`` of the node's configuration, or the client's key.
        norm_layer: which encoder parameters are the norm layer ω̃; None: the encoder's last layer.
        loss: the name of the training loss in the app's metrics.
        test_loss: the name of the test loss in the app's metrics.
        metric: the name of the main test metric in the app's metrics; empty for none.
        higher_is_better: whether higher values of that metric are better.
        seed: for the first head; each client draws another head from it.
        states: gives the place of the client's states; by default files under ``state-dir``.

    Raises:
        ConfigError: no head is named.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module] | Callable[[Context], nn.Module],
        head: str | Sequence[str],
        *,
        task: str | None = None,
        norm_layer: str | Sequence[str] | None = None,
        loss: str = "train_loss",
        test_loss: str = "eval_loss",
        metric: str = "eval_acc",
        higher_is_better: bool = True,
        seed: int = 0,
        states: Callable[[Context, str, str], States] | None = None,
    ) -> None:
        self.model, self.head = model, (head,) if isinstance(head, str) else tuple(head)
        self.task, self.norm_layer, self.seed = task, norm_layer, seed
        self.loss, self.test_loss = loss, test_loss
        self.metric, self.higher_is_better = metric, higher_is_better
        self.states = states or (
            lambda context, experiment, client: StateFiles(state_dir(context), experiment, client)
        )
        if not self.head:
            expected = "expected the names of the parameters that stay with the client"
            raise ConfigError(f"head: {expected}, found none")

    def __call__(self, message: Message, context: Context, app: ClientAppCallable) -> Message:
        """Answer a message with the app's help."""
        with private_errors():
            return self._answer(message, context, app)

    def _answer(self, message: Message, context: Context, app: ClientAppCallable) -> Message:
        control, client, lost = (
            messages.control_of(message),
            client_key(context),
            lost_state(context),
        )
        task = self.task or str(context.node_config.get("task", client))
        if control.kind == "hello":
            told = {
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                **messages.VERSIONS,
            }
            return messages.greeting_reply(
                messages.Greeting(client=client, task=task, **told), message
            )
        if control.client != client:
            return messages.wrong_client(message, control.client, client)
        start, states = perf_counter(), self.states(context, control.experiment, client)
        sent = tensors_of(encoder_of(message.content))

        def initial() -> ClientState:
            return ClientState(self._first_head(client, context, sent.keys()))

        begun = begin(states, control.base, lost, initial, control.initial_loss)
        config = message.content.config_records.get(CONFIG, ConfigRecord())
        whole = arrays_of({**sent, **begun.state.head})
        message.content = RecordDict({ARRAYS: whole, CONFIG: config})
        reply = app(message, context)
        if reply.has_error():
            return reply
        record = reply.content.metric_records.get(METRICS, MetricRecord())
        metrics = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if control.kind == "evaluate":
            evaluation = self._evaluation(metrics)
            return evaluation_reply(client, task, control.round, evaluation, message, begun.aside)
        came, layout = self._arrays(reply, whole), Layout.of(module_of(sent))
        report = self._report(control, task, begun, metrics, sent, came, start)
        own = {name: came[name] for name in came.keys() - sent.keys()}
        after = ClientState(own, report.initial_loss, round=control.round)
        states.save(after, begun.kept(control.keep))
        return report_reply(report, layout.arrays(report.gradient), message, begun.aside)

    def _evaluation(self, metrics: Mapping[str, float]) -> Evaluation:
        if self.metric:
            self._metric(metrics, self.metric, "metric")
        loss = self._metric(metrics, self.test_loss, "test_loss")
        return Evaluation(loss, metrics, int(metrics.get("num-examples", 0)))

    def _report(
        self,
        control: messages.Control,
        task: str,
        begun: Beginning,
        metrics: Mapping[str, float],
        sent: Mapping[str, Tensor],
        came: Mapping[str, Tensor],
        start: float,
    ) -> Report:
        """The report on a round: ``sent`` came from the server, ``came`` is the trained model."""
        loss, initial_loss = self._metric(metrics, self.loss, "loss"), begun.state.initial_loss
        encoder = module_of(dict(sent))
        names = Layout.of(encoder).shapes
        update = torch.cat([(sent[name] - came[name]).reshape(-1) for name in names])
        return Report(
            client=control.client,
            task=task,
            gradient=update,
            loss=loss,
            initial_loss=loss if initial_loss is None else initial_loss,
            grad_norm=norm_over(update, norm_layer_slices(encoder, self.norm_layer)).item(),
            num_examples=int(metrics.get("num-examples", 1)),
            seconds=perf_counter() - start,
            round=control.round,
        )

    def _first_head(
        self, client: str, context: Context, sent: Collection[str]
    ) -> dict[str, Tensor]:
        """The initial values of the part of the model's state that the server did not send."""
        with seeded(self.seed, 0, client, "head"):
            model = self._make(context)
        self._check_tied(model, sent)
        self._check_names(model, sent)
        state = model.state_dict().items()
        return {name: value.detach().clone() for name, value in state if name not in sent}

    def _check_names(self, model: nn.Module, sent: Collection[str]) -> None:
        """Raise an error if the head's patterns or the sent names do not fit the model."""
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        for pattern in self.head:
            if not any(matches(name, [pattern]) for name in parameters):
                layers = {name.rpartition(".")[0] for name in parameters} - {""}
                close = nearest(pattern, layers | parameters.keys())
                raise ConfigError(f"head: '{pattern}' names no parameter of the model; {close}")
        for name in sorted(sent):
            how = "both sides have to be told the same head"
            if name in buffers:
                what = "a buffer of its model"
                how = f"buffers stay with the client: expected FedGradNorm(head=[..., '{name}'])"
            elif matches(name, self.head):
                what = "in the client's head"
            elif name not in parameters:
                what = "no parameter of its model"
            else:
                continue
            raise MessageError(f"array '{name}': the server sent it, and it is {what}: {how}")

    @staticmethod
    def _check_tied(model: nn.Module, sent: Collection[str]) -> None:
        """Raise MessageError if one of a tied parameter's names is sent: the other would win."""
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            other = names.setdefault(id(parameter), name)
            if other != name and (name in sent or other in sent):
                raise MessageError(
                    f"array '{name}': it is tied to '{other}', and the server sends one of them or "
                    "both: expected parameters of their own in the encoder: untie them, or name "
                    "both in the head on both sides"
                )

    def _make(self, context: Context) -> nn.Module:
        try:
            inspect.signature(self.model).bind()
        except TypeError:  # it cannot be called without arguments
            return self.model(context)  # type: ignore[call-arg]
        return self.model()  # type: ignore[call-arg]

    def _arrays(self, reply: Message, whole: ArrayRecord) -> dict[str, Tensor]:
        came = tensors_of(reply.content.array_records.get(ARRAYS, ArrayRecord()))
        given = tensors_of(whole)
        if came.keys() != given.keys():
            expected = f"the record '{ARRAYS}' with the {len(given)} arrays that it was given"
            raise MessageError(f"the app's reply: expected {expected}, found {len(came)}")
        for name, value in given.items():
            if came[name].shape != value.shape or came[name].dtype != value.dtype:
                was, now = (f"{v.dtype} of {tuple(v.shape)}" for v in (value, came[name]))
                raise MessageError(f"the app's reply: array '{name}': expected {was}, found {now}")
        return came

    @staticmethod
    def _metric(metrics: Mapping[str, float], name: str, option: str) -> float:
        if name not in metrics:
            found = f"found {sorted(metrics)}: FedGradNormMod({option}=...) names it"
            raise MessageError(f"the app's metrics: expected '{name}', {found}")
        return float(metrics[name])
