"""What training gives back."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedgradnorm import client as client_side
from fedgradnorm.build import versions
from fedgradnorm.client import ClientState, evaluate_client
from fedgradnorm.config import RunConfig
from fedgradnorm.data import Data
from fedgradnorm.errors import ConfigError, FederationError, RunError
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.federation import Federation, Members
from fedgradnorm.identity import members_record
from fedgradnorm.parameters import load_buffers, load_flat
from fedgradnorm.runs.folder import create_run, remove_replaced
from fedgradnorm.runs.lock import alone_in
from fedgradnorm.runs.models import check_client_id, joined
from fedgradnorm.runs.records import Row, Summary
from fedgradnorm.runs.writer import RunWriter
from fedgradnorm.server import ServerState

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Result:
    """What training gives back.

    Attributes:
        config: the resolved settings.
        federation: what was trained.
        state: the server's last state.
        client_states: every client's last state, by client id.
        rows: a mapping for each round and client, as in metrics.jsonl.
        summary: figures by task and by client, as in summary.json.
        stopped: why training ended before its last round; None where it did not.
    """

    config: RunConfig
    federation: Members
    state: ServerState
    client_states: Mapping[str, ClientState]
    rows: Sequence[Row]
    summary: Summary
    stopped: str | None = None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.train.seed

    @property
    def weights(self) -> dict[str, float]:
        """The last weights, by client id."""
        return dict(self.state.weighting.weights)

    def encoder(self) -> nn.Module:
        """The shared encoder after the last round.

        Where the method gives every client an encoder of its own, it is the initial encoder.
        """
        encoder = self.federation.make_encoder(self.seed)
        load_flat(encoder, self.state.encoder)
        load_buffers(encoder, self.state.buffers.items())
        return encoder.eval()

    def model(self, client: str) -> nn.Module:
        """The model of a client: the encoder that it uses, with its buffers, and its head.

        Returns:
            A module in evaluation mode, with the children ``encoder`` and ``head``.

        Raises:
            FederationError: there is no such client.
            RunError: the client's head is on another machine.
        """
        check_client_id(client)
        federation = self._federation_here()
        encoder, state = self.encoder(), self.client_states[federation.client(client).id]
        head = federation.make_head(federation.client(client), self.seed)
        client_side.load_model(encoder, head, state, self.state.encoder, self.state.buffers)
        return joined(encoder, head)

    def evaluate(self, data: Mapping[str, Data] | None = None) -> dict[str, Evaluation]:
        """Test the clients' models.

        Args:
            data: the data to test on, by client id; None: the clients' own test data.

        Returns:
            The evaluations, by client id.

        Raises:
            FederationError: there is no such client, or its data cannot be used.
            ClientError: the client's own code raised an error.
            RunError: the heads are on other machines.
        """
        federation = self._federation_here()
        if data is None:
            tested = [client for client in federation.clients if client.test is not None]
        elif isinstance(data, Mapping):
            tested = [replace(federation.client(id), test=given) for id, given in data.items()]
        else:
            raise FederationError(
                f"data: expected a mapping from client ids to data, found {type(data).__name__}"
            )
        batch_size, evaluations = self.config.train.eval_batch_size, {}
        for client in tested:
            model = self.model(client.id)
            encoder, head = model.get_submodule("encoder"), model.get_submodule("head")
            evaluations[client.id] = evaluate_client(client, encoder, head, self.seed, batch_size)
        return evaluations

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas data frame, with one column for each further metric.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigError("to_frame() needs pandas: pip install pandas") from error
        flat: list[dict[str, Any]] = [
            {**row, **{f"metrics.{name}": value for name, value in row["metrics"].items()}}
            for row in self.rows
        ]
        return pd.DataFrame(flat).drop(columns=["metrics"])

    def plot(self) -> "Figure":
        """The curves of the run's page, as a matplotlib figure.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from fedgradnorm.report.figure import curves

        figure = curves(self.rows, self.summary)
        _show_in_notebooks(type(figure))
        return figure

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a run's folder: settings, metrics, summary, models and a checkpoint.

        Args:
            folder: the folder to make.
            overwrite: whether a run that is in this folder is replaced.

        Returns:
            The folder. `load_model`, `resume` and ``fedgradnorm report`` read it.

        Raises:
            RunError: the folder exists, or cannot be written.
        """
        path = Path(folder).expanduser()
        run = self.config.run.model_copy(update={"dir": str(path)})
        config = self.config.model_copy(update={"run": run, "versions": versions()})
        with alone_in(path):
            create_run(path, config, overwrite=overwrite)
            with RunWriter(path, config) as writer:
                members = members_record(self.federation, self.seed)
                writer.write_members(members)
                writer.write_round(self.rows)
                seconds, costs = self.summary["seconds"], self.summary["costs"]
                writer.write_checkpoint(self.state, self.client_states, members, seconds, costs)
                writer.write_models(self.encoder(), self.client_states)
                writer.write_summary(self.summary)
            remove_replaced(path)
        return path

    def _federation_here(self) -> Federation:
        if not isinstance(self.federation, Federation):
            raise RunError("the clients' heads and data are with the clients, on other machines")
        return self.federation

    def __repr__(self) -> str:
        rounds, planned = self.summary["rounds"], self.config.train.num_rounds
        done = f"{rounds} rounds" if rounds == planned else f"{rounds} of {planned} rounds"
        tasks = ", ".join(f"{task} {_last_figure(self, task)}" for task in self.summary["tasks"])
        return f"<Result: {self.config.weighting.name}, {done}; {tasks}>"

    def _repr_html_(self) -> str:
        """A table of the tasks, for a notebook."""
        heads = ("task", "clients", "loss / initial loss", "metric", "weight")
        lines = []
        for task, summary in self.summary["tasks"].items():
            ratio, weight = _number(summary["loss_ratio"]), _number(summary["weight"])
            metric = _last_figure(self, task) if summary["metric"] else "-"
            cells = task, str(summary["clients"]), ratio, metric, weight
            lines.append(_cells("td", cells))
        caption = escape(repr(self).strip("<>").partition(";")[0])
        head = f"<caption>{caption}</caption><thead>{_cells('th', heads)}</thead>"
        return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _show_in_notebooks(kind: "type[Figure]") -> None:
    """Let a notebook show figures as pictures, as it does once `matplotlib.pyplot` is imported."""
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    shell = get_ipython()
    if shell is not None and kind not in shell.display_formatter.formatters["image/png"]:
        select_figure_formats(shell, {"png"})


def _last_figure(result: Result, task: str) -> str:
    """The last main metric of a task, or where it has none its share of the initial loss."""
    summary = result.summary["tasks"][task]
    metric = summary["metric"]
    if metric is None:
        return f"{_number(summary['loss_ratio'])} of F(0)"
    if metric["percent"] and metric["last"] is not None:
        return f"{metric['name']} {metric['last']:.1%}"
    return f"{metric['name']} {_number(metric['last'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"
