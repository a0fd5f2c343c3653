"""A mod that gives a user's own Flower ClientApp a private head, and the server what FedGradNorm weights clients by."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fedgradnorm.client import ClientState
from fedgradnorm.errors import ConfigError, MessageError, nearest
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.flower.client import (
    WRONG_CLIENT,
    aside,
    client_key,
    kept,
    lost_state,
    private_errors,
    state_dir,
)
from fedgradnorm.flower.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    VERSIONS,
    Greeting,
    Layout,
    arrays_of,
    control_of,
    encoder_of,
    evaluation_reply,
    greeting_reply,
    report_reply,
    tensors_of,
)
from fedgradnorm.flower.roster import module_of
from fedgradnorm.flower.states import StateFiles, States, begin
from fedgradnorm.messages import Report
from fedgradnorm.parameters import matches, norm_layer_slices, norm_over
from fedgradnorm.randomness import seeded

__all__ = ["FedGradNormMod"]


class FedGradNormMod:
    """For ``ClientApp(mods=[FedGradNormMod(...)])``: the app keeps its training code and sees whole models, the server sees encoders alone.

    Before the app is called, the client's head is put beside the encoder that came; afterwards the head goes to the client's own files
    (``state-dir`` in the node's configuration), and the reply holds the encoder's update, F_i(k), F_i(0) and n_i. F_i(0) is the training
    loss of the client's first round, as an app gives no earlier one. Buffers, such as BatchNorm's statistics, stay with the head.

    The app's functions get a message with the records ``arrays`` and ``config``, and answer with the trained ``arrays`` and ``metrics``, as
    Flower's own examples do. ``lost-state`` in the node's configuration says what to do where the head is lost, as in `client_app`.

    Args:
        model: makes the client's model, without arguments or from the `Context`: where its head is from at first.
        head: which of its parameters are the head: names, layers or patterns such as ``"fc3"``.
        task: the task's name; by default ``task`` of the node's configuration, or the client's key.
        norm_layer: which encoder parameters are the norm layer ω̃; None: the encoder's last layer.
        loss: the name of the training loss in the app's metrics.
        test_loss: the name of the test loss in the app's metrics.
        metric: the name of the main test metric in the app's metrics; empty for none.
        higher_is_better: of that metric.
        seed: of the first head, which no two clients share.
        states: gives the place of the client's states; by default files under ``state-dir``.

    Raises:
        ConfigError: no head.
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
        self.task, self.norm_layer, self.loss, self.test_loss, self.metric = (
            task,
            norm_layer,
            loss,
            test_loss,
            metric,
        )
        self.higher_is_better, self.seed = higher_is_better, seed
        self.states = states or (
            lambda context, experiment, client: StateFiles(state_dir(context), experiment, client)
        )
        if not self.head:
            raise ConfigError(
                "head: expected the names of the parameters that stay with the client, found none"
            )

    def __call__(self, message: Message, context: Context, app: ClientAppCallable) -> Message:
        """Answer a message with the app's help."""
        with private_errors():
            return self._answer(message, context, app)

    def _answer(self, message: Message, context: Context, app: ClientAppCallable) -> Message:
        control, client, lost = control_of(message), client_key(context), lost_state(context)
        task = self.task or str(context.node_config.get("task", client))
        if control.kind == "hello":
            greeting = Greeting(
                client=client,
                task=task,
                metric=self.metric,
                higher_is_better=self.higher_is_better,
                **VERSIONS,
            )
            return greeting_reply(greeting, message)
        if control.client != client:
            raise MessageError(f"a message for client '{control.client}' {WRONG_CLIENT} '{client}'")
        start, states, sent = (
            perf_counter(),
            self.states(context, control.experiment, client),
            tensors_of(encoder_of(message.content)),
        )
        begun = begin(
            states,
            control.base,
            lost,
            lambda: ClientState(self._first_head(client, context, sent.keys())),
            control.initial_loss,
        )
        state = begun.state
        whole = RecordDict(
            {
                ARRAYS: arrays_of({**sent, **state.head}),
                CONFIG: message.content.config_records.get(CONFIG, ConfigRecord()),
            }
        )
        message.content = whole
        reply = app(message, context)
        if reply.has_error():
            return reply
        record = reply.content.metric_records.get(METRICS, MetricRecord())
        metrics = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if control.kind == "evaluate":
            if self.metric:
                self._metric(metrics, self.metric, "metric")
            evaluation = Evaluation(
                self._metric(metrics, self.test_loss, "test_loss"),
                metrics,
                int(metrics.get("num-examples", 0)),
            )
            return evaluation_reply(client, task, control.round, evaluation, message, aside(begun))
        came = self._arrays(reply, whole)
        loss = self._metric(metrics, self.loss, "loss")
        initial_loss = loss if state.initial_loss is None else state.initial_loss
        update = {name: sent[name] - came[name] for name in sent}
        layout = Layout.of(module_of(sent))
        flat = torch.cat([update[name].reshape(-1) for name in layout.shapes])
        norm = norm_over(flat, norm_layer_slices(module_of(sent), self.norm_layer)).item()
        after = ClientState(
            {name: came[name] for name in came.keys() - sent.keys()},
            initial_loss,
            round=control.round,
        )
        states.save(after, kept(control, begun))
        report = Report(
            client=client,
            task=task,
            gradient=flat,
            loss=loss,
            initial_loss=initial_loss,
            grad_norm=norm,
            num_examples=int(metrics.get("num-examples", 1)),
            seconds=perf_counter() - start,
            round=control.round,
        )
        return report_reply(report, layout.arrays(flat), message, aside(begun))

    def _first_head(
        self, client: str, context: Context, sent: Collection[str]
    ) -> dict[str, Tensor]:
        """What of the model's state the server did not send, as initialised."""
        with seeded(self.seed, 0, client, "head"):
            model = self._make(context)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._check_tied(model, sent)
        for pattern in self.head:
            if not any(matches(name, [pattern]) for name in parameters):
                layers = {name.rpartition(".")[0] for name in parameters} - {""}
                raise ConfigError(
                    f"head: '{pattern}' names no parameter of the model; {nearest(pattern, layers | parameters.keys())}"
                )
        for name in sorted(sent):
            if matches(name, self.head) or name not in parameters:
                what = (
                    "in the client's head"
                    if matches(name, self.head)
                    else "no parameter of its model"
                )
                how = "both sides have to be told the same head"
                if name in buffers:
                    what, how = (
                        "a buffer of its model",
                        f"buffers stay with the client: expected FedGradNorm(head=[..., '{name}'])",
                    )
                raise MessageError(f"array '{name}': the server sent it, and it is {what}: {how}")
        return {
            name: value.detach().clone()
            for name, value in model.state_dict().items()
            if name not in sent
        }

    @staticmethod
    def _check_tied(model: nn.Module, sent: Collection[str]) -> None:
        """Raise MessageError for a parameter with two names of which one is sent: the client's values would replace the server's."""
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            other = names.setdefault(id(parameter), name)
            if other != name and (name in sent or other in sent):
                raise MessageError(
                    f"array '{name}': it is tied to '{other}', and the server sends one of them or both: expected parameters of their own "
                    "in the encoder: untie them, or name both in the head on both sides"
                )

    def _make(self, context: Context) -> nn.Module:
        try:
            inspect.signature(self.model).bind()
        except TypeError:  # it cannot be called without arguments
            return self.model(context)  # type: ignore[call-arg]
        return self.model()  # type: ignore[call-arg]

    def _arrays(self, reply: Message, whole: RecordDict) -> dict[str, Tensor]:
        came, expected = (
            tensors_of(reply.content.array_records.get(ARRAYS, ArrayRecord())),
            tensors_of(whole.array_records[ARRAYS]),
        )
        if came.keys() != expected.keys():
            raise MessageError(
                f"the app's reply: expected the record '{ARRAYS}' with the {len(expected)} arrays that it was given, found {len(came)}"
            )
        for name, value in expected.items():
            if came[name].shape != value.shape or came[name].dtype != value.dtype:
                was, now = (f"{one.dtype} of {tuple(one.shape)}" for one in (value, came[name]))
                raise MessageError(f"the app's reply: array '{name}': expected {was}, found {now}")
        return came

    @staticmethod
    def _metric(metrics: Mapping[str, float], name: str, option: str) -> float:
        if name not in metrics:
            raise MessageError(
                f"the app's metrics: expected '{name}', found {sorted(metrics)}: FedGradNormMod({option}=...) names it"
            )
        return float(metrics[name])
