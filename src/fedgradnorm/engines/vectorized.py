"""The numbers of the reference engine, by whatever is fastest for the clients at hand."""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from pydantic import ByteSize
from torch import Tensor, nn

from fedgradnorm.client import ClientState, evaluate_client, initial_state, load_model, local_update
from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.data import size, tensors
from fedgradnorm.engine import Engine
from fedgradnorm.engines.failures import Attempt, is_an_answer, is_strict, unexpected
from fedgradnorm.engines.looped import WITHOUT_PROGRAMS, Programs, ProgramSteps, encoded_once
from fedgradnorm.engines.phases import WrongProgram
from fedgradnorm.engines.placement import (
    at_home,
    client_on,
    device_named,
    free_memory,
    instructions_on,
)
from fedgradnorm.engines.planning import Plan, batch_of, plan_for, programs_for
from fedgradnorm.engines.stacked import (
    Member,
    Stack,
    Trained,
    outcomes,
    stack_of,
    stacked_evaluations,
    stacked_order,
    stacked_update,
)
from fedgradnorm.engines.workspace import Workspace, can_be_arranged, holds_more_than_its_state
from fedgradnorm.errors import ClientError, described, require, warn
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation, evaluate
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of
from fedgradnorm.randomness import Generators, quick_generator
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training.steps import PlainSteps, Steps, encoded

__all__ = ["VectorizedEngine"]

log = logging.getLogger(__name__)

CACHE_BYTES = 8 * 2**20
"""The encoders of a stack are no larger than this together, so that they stay in the caches."""

WIDE, NARROW, QUARTER = 64, 16, 4
"""Widths of stacks: wide enough for calls to count for little; what is left over goes into narrow ones, the last of a multiple of 4."""

FEWEST_STACKED = 5
"""So many alike clients are worth a stack."""

THREADED_FLOPS = 5_000_000
"""From so many floating-point operations a step on, clients without programs gain from threads: these wait for one another's Python."""

LARGE_FLOPS = 100_000_000
"""From so many floating-point operations a step on, kernels gain from threads of their own."""

TESTED_TOGETHER = 200
"""Small clients whose test data pass through the encoder at once."""


TRIED = 0.25
"""In so many rounds a step of a kind of clients is held against autograd: the first of the round, or any of them."""


class Job(NamedTuple):
    """Clients that are trained together: one, by these programs, or as many as fit into a stack.

    ``tried`` chooses a step that is held against autograd; with None none is.
    """

    instructions: Sequence[Instruction]
    programs: Programs = WITHOUT_PROGRAMS
    stack: Stack | None = None
    tried: int | None = None


class Failed(NamedTuple):
    """A job that a shortcut has spoilt, and why."""

    job: Job
    reason: str


Kind: TypeAlias = tuple[object, ...]
"""What clients have in common that are trained in the same way."""

Item = TypeVar("Item")
Done = TypeVar("Done")


class VectorizedEngine(Engine):
    """Stacks small clients, spreads others over threads, encodes once for all head steps: the same numbers, sooner.

    Which way a client goes is found out by trying it on its first batch; the logger ``fedgradnorm`` says what was chosen, and why. It
    depends on the models and the data alone, so that a run that is repeated or resumed on the same machine gives the same numbers.

    A shortcut is for a user's code that draws no random numbers, and whose Python values stay as they are. In every round these values are
    compared (`Watch`), as are the states of the global generators, and now and then a step is held against autograd. Where something is
    not as it was, the clients of that kind train without shortcuts from then on, that round included, and a warning says so.

    Args:
        federation: whose clients it runs.
        seed: of the heads' initialisation.
        threads: how many workers there are, each with kernels of a single thread; by default as many as torch would use.
        memory_limit: bytes, or a text such as "2GB", for what it works with; by default half of the memory that
            is free when the run begins. Gradients that would take more than half of it lie in a temporary file, mapped into memory.
        device: ``"cpu"``, or ``"cuda"`` for a GPU, where the data of clients that have trained stay.
    """

    def __init__(
        self,
        federation: Federation,
        seed: int,
        threads: int | None = None,
        memory_limit: ByteSize | None = None,
        device: str = "cpu",
    ) -> None:
        require(
            threads is None or 1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads
        )
        require(
            memory_limit is None or memory_limit > 0,
            "memory_limit",
            "a number of bytes above 0",
            memory_limit,
        )
        self.federation, self.seed, self.device = federation, seed, device_named(device)
        self.threads = 1 if self.device.type == "cuda" else threads or torch.get_num_threads()
        self.memory_limit = memory_limit or free_memory(self.device) // 2
        buffers = buffers_of(federation.make_encoder(seed))
        self._states = {
            client.id: initial_state(federation, client, seed, buffers)
            for client in federation.clients
        }
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        self._own = Workspace(federation, seed, self.device)
        self._with_own_head: set[str] = set()
        self._tests_draw = False
        self._arranged = False
        self._clients: dict[str, Client] = {}
        self._planned_for: tuple[int, MethodConfig] | None = None
        self._plans: dict[Kind, Plan] = {}
        self._plan_of: dict[str, Plan] = {}
        self._kind_of: dict[str, Kind] = {}
        self._programs_of: dict[Kind, Programs] = {}
        self._stacks: dict[Kind, Stack] = {}

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The state of every client, by id."""
        return dict(self._states)

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        self._states = dict(states)

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train."""
        if not instructions:
            return []
        sent = instructions_on(self.device, instructions)
        self._make_plans(sent[0].training)
        self._own.follow()
        self._drop_changed()
        store = _GradientStore(
            [instruction.client for instruction in sent], sent[0].encoder, self.memory_limit // 2
        )
        before = Generators.now(self.device)
        done: dict[str, tuple[Report, ClientState]] = {}
        failed: list[Failed] = []
        for outcome in self._round(sent, store):
            if isinstance(outcome, Failed):
                failed.append(outcome)
            else:
                done[outcome[0].client] = outcome
        spoilt = {
            self._kind_of[failure.job.instructions[0].client]: failure.reason for failure in failed
        }
        spoilt |= self._changed()
        if Generators.now(self.device) != before:
            before.put_back(self.device)
            spoilt |= {
                kind: "its code draws random numbers"
                for kind, plan in self._plans.items()
                if plan.watch is not None
            }
        if spoilt:
            self._put_back(spoilt)
            again = [
                Job([instruction])
                for instruction in sent
                if self._kind_of[instruction.client] in spoilt
            ]
            self._do_without(spoilt)
            done |= {
                outcome[0].client: outcome
                for outcome in self._trained(again, store, workers=1)
                if not isinstance(outcome, Failed)
            }
            self._say(spoilt)
        self._states |= {client: state for client, (_, state) in done.items()}
        return [done[instruction.client][0] for instruction in sent]

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> dict[str, Evaluation]:
        """Test every client that has test data."""
        clients = [
            self._client(client.id)
            for client in self.federation.clients
            if client.test_data is not None
        ]
        self._own.follow()
        self._drop_changed()
        small: dict[object, list[Client]] = {}
        in_turn: list[Client] = []
        at_once: list[list[Client]] = []
        for client in clients:
            if self._tests_small(client, batch_size) and isinstance(client.test_data, tuple):
                inputs, _ = client.test_data
                small.setdefault((inputs.shape[1:], inputs.dtype), []).append(client)
            elif self._tests_alone(client):
                in_turn.append(client)
            else:
                at_once.append([client])
        at_once += [chunk for alike in small.values() for chunk in chunks(alike, TESTED_TOGETHER)]
        test, before = (
            partial(self._test, encoder, buffers, batch_size),
            Generators.now(self.device),
        )
        evaluations: dict[str, Evaluation] = {}
        for some, done in zip(at_once, self._each(test, self.threads, 1, at_once), strict=True):
            evaluations |= done
            in_turn += [] if done else some
        if (
            Generators.now(self.device) != before
        ):  # a metric does, for one: each gets a seed then, one after another
            before.put_back(self.device)
            self._tests_draw, in_turn = True, clients
        with kernel_threads(1):
            for client in in_turn:
                head = self._head_alone(client)
                load_model(self._own.encoder, head, self._states[client.id], encoder, buffers)
                evaluations[client.id] = evaluate_client(
                    client, self._own.encoder, head, self.seed, batch_size
                )
        return {client.id: evaluations[client.id] for client in clients}

    def _tests_alone(self, client: Client) -> bool:
        """Whether no other client may be tested beside a client: a data set, or a model that draws random numbers, may not bear it."""
        plan = self._plan_of.get(client.id)
        return (
            self._tests_draw
            or plan is None
            or plan.way == "alone"
            or not isinstance(client.test_data, tuple)
        )

    def _head_alone(self, client: Client) -> nn.Module:
        """The head that a client has in a model without shortcuts."""
        return (
            self._own.own_head(client)
            if client.id in self._with_own_head
            else self._own.head(client)
        )

    def _drop_changed(self) -> None:
        """Do without shortcuts for those whose Python values have changed between rounds."""
        changed = self._changed()
        self._do_without(changed)
        self._say(changed)

    def _changed(self) -> dict[Kind, str]:
        """By kind of client, what of its Python has another value than when it was planned."""
        places = {
            kind: plan.watch.changed()
            for kind, plan in self._plans.items()
            if plan.watch is not None
        }
        return {
            kind: f"{place} has another value than when training began"
            for kind, place in places.items()
            if place is not None
        }

    def _put_back(self, kinds: Iterable[Kind]) -> None:
        """Set what calls of their code have changed in Python back to what it was."""
        for kind in kinds:
            if (watch := self._plans[kind].watch) is not None:
                watch.put_back()

    def _do_without(self, reasons: Mapping[Kind, str]) -> None:
        """Let these kinds of clients train without shortcuts from now on."""
        for kind, reason in reasons.items():
            self._plans[kind] = Plan("alone", False, reason)
            self._plan_of |= dict.fromkeys(self._clients_of(kind), self._plans[kind])

    def _say(self, reasons: Mapping[Kind, str]) -> None:
        for kind, reason in reasons.items():
            first, *others = self._clients_of(kind)
            whom = f"client '{first}'" + (f" and {len(others)} like it" if others else "")
            warn(
                f"{whom}: {reason}: from now on trained without shortcuts, which takes longer and gives the numbers of the code as it is"
            )

    def _clients_of(self, kind: Kind) -> list[str]:
        return [client for client, own in self._kind_of.items() if own == kind]

    def _round(
        self, sent: Sequence[Instruction], store: "_GradientStore"
    ) -> Iterator[tuple[Report, ClientState] | Failed]:
        """What comes of the instructions, those who train alone first."""
        jobs = self._jobs(sent)
        in_turn, at_once = (
            [job for job in jobs if self._waits(job)],
            [job for job in jobs if not self._waits(job)],
        )
        last = (
            len(at_once) - len(at_once) % self.threads
        )  # the last ones are fewer than there are threads
        yield from self._trained(in_turn, store, workers=1)
        for some in (
            (at_once[:last], at_once[last:]) if self._kernels(at_once[last:]) > 1 else (at_once,)
        ):
            yield from self._trained(some, store, self.threads, self._kernels(some))

    def _jobs(self, instructions: Sequence[Instruction]) -> list[Job]:
        """Who is trained together: alike clients in stacks, where there are enough of them; everyone else by himself."""
        training = instructions[0].training
        alike: dict[Kind, list[Instruction]] = {}
        for instruction in instructions:
            if self._plan_of[instruction.client].way == "stacked":
                alike.setdefault(
                    (id(instruction.encoder), *self._kind_of[instruction.client]), []
                ).append(instruction)
        jobs, stacked = [], set[str]()
        for some in alike.values():
            client, num_bytes = (
                self._client(some[0].client),
                max(self._plan_of[instruction.client].num_bytes for instruction in some),
            )
            most = min(
                self.memory_limit // (2 * self.threads * num_bytes),
                CACHE_BYTES // some[0].encoder.nbytes,
            )
            if len(some) < FEWEST_STACKED or most < 2:
                continue
            taken, widths = iter(some), stack_widths(len(some), most, self.threads)
            jobs += [
                Job(list(islice(taken, width)), stack=self._stack(client, training, width))
                for width in widths
            ]
            stacked |= {instruction.client for instruction in some}
        single = [instruction for instruction in instructions if instruction.client not in stacked]
        jobs += [
            Job([instruction], self._programs(self._client(instruction.client), training))
            for instruction in single
        ]
        return self._with_trials(jobs)

    def _with_trials(self, jobs: list[Job]) -> list[Job]:
        """The jobs, of which in some rounds one of each kind has a step held against autograd: the first, or any."""
        by_kind: dict[Kind, list[int]] = {}
        for place, job in enumerate(jobs):
            of_kind = self._plan_of[job.instructions[0].client]
            if job.stack is not None or job.programs != WITHOUT_PROGRAMS or of_kind.encode_once:
                by_kind.setdefault(self._kind_of[job.instructions[0].client], []).append(place)
        instruction = jobs[0].instructions[0]
        rng = quick_generator(
            instruction.training.seed, instruction.round, "", f"trials {instruction.step}"
        )
        for places in by_kind.values():
            if rng.random() < TRIED:
                place = places[int(rng.integers(len(places)))]
                jobs[place] = jobs[place]._replace(
                    tried=int(rng.integers(2**31)) if rng.random() < 0.5 else 0
                )
        return jobs

    def _programs(self, client: Client, training: TrainConfig) -> Programs:
        """The programs of a client that is trained by itself, though perhaps others like it are in stacks."""
        plan, kind = self._plan_of[client.id], self._kind_of[client.id]
        if not plan.traceable:
            return WITHOUT_PROGRAMS
        if kind not in self._programs_of:
            with self._workspace() as workspace, kernel_threads(1):
                self._programs_of[kind] = programs_for(client, workspace, training)
                found = [
                    name
                    for name, phase in self._programs_of[kind]._asdict().items()
                    if phase is not None
                ]
                log.info(
                    "%s, and clients like it: programs of the steps on %s",
                    client.id,
                    " and ".join(found) or "nothing",
                )
        return self._programs_of[kind]

    def _stack(self, client: Client, training: TrainConfig, width: int) -> Stack:
        key = (*self._kind_of[client.id], width)
        if key not in self._stacks:
            with self._workspace() as workspace, kernel_threads(1):
                self._stacks[key] = stack_of(
                    client, workspace, batch_of(client, training, self.device), width
                )
        return self._stacks[key]

    def _make_plans(self, training: TrainConfig) -> None:
        """A plan for every client, so that a run that is resumed with other participants goes the same ways."""
        if self._planned_for == (training.batch_size, training.method):
            return
        clients = sorted(self.federation.clients, key=lambda client: client.id)
        with_tensors = next(
            (client for client in clients if isinstance(client.train_data, tuple)), None
        )  # data sets are not read twice
        with kernel_threads(1):
            if with_tensors is not None:
                inputs, _ = batch_of(with_tensors, training, self.device)
                self._arranged = can_be_arranged(self.federation, self.seed, self.device, inputs)
            self._workspaces, self._plans, self._programs_of, self._stacks = (
                SimpleQueue(),
                {},
                {},
                {},
            )
            self._kind_of = {client.id: self._kind(client, training) for client in clients}
            self._plan_of = {client.id: self._plan(client, training) for client in clients}
            for client in clients:
                if self._plan_of[client.id].way == "alone" or holds_more_than_its_state(
                    self._own.head(client)
                ):
                    self._with_own_head.add(client.id)
                    self._own.own_head(client)
        self._planned_for = training.batch_size, training.method

    def _client(self, id: str) -> Client:
        if id not in self._clients:
            self._clients[id] = client_on(self.device, self.federation.client(id))
        return self._clients[id]

    def _plan(self, client: Client, training: TrainConfig) -> Plan:
        key = self._kind_of[client.id]
        if key not in self._plans:
            self._plans[key] = plan = plan_for(client, self._own, training)
            once = (
                "encoded once for all head steps"
                if plan.encode_once
                else "encoded in every head step"
            )
            log.info(
                "%s, and clients like it: %s, %s: %s", client.id, self._said(plan), once, plan.why
            )
        return self._plans[key]

    def _kind(self, client: Client, training: TrainConfig) -> Kind:
        """What clients have in common that are trained in the same way."""
        data = client.train_data
        shapes = [(part.shape[1:], part.dtype) for part in data] if isinstance(data, tuple) else []
        return (
            self.federation.head_kind(client, self.seed),
            *shapes,
            min(training.batch_size, size(data)),
            size(data) > EVALUATION_BATCH,
        )

    def _said(self, plan: Plan) -> str:
        if plan.way == "stacked":
            return f"stacked where {FEWEST_STACKED} or more are alike"
        return (
            "one at a time" if plan.way == "looped" else "one at a time, while no other is trained"
        )

    def _waits(self, job: Job) -> bool:
        """Whether a job is not to be done while others are."""
        plan = self._plan_of[job.instructions[0].client]
        if job.stack is not None or plan.flops >= THREADED_FLOPS:
            return plan.way == "alone"
        phase = job.programs.encoder
        return plan.way == "alone" or phase is None or phase.program.in_python

    def _kernels(self, jobs: Sequence[Job]) -> int:
        """Threads of a kernel: one, unless there are cores without a client and kernels large enough to share."""
        if not jobs or any(
            self._plan_of[job.instructions[0].client].flops < LARGE_FLOPS for job in jobs
        ):
            return 1
        return max(1, self.threads // len(jobs))

    def _trained(
        self, jobs: Sequence[Job], store: "_GradientStore", workers: int, kernels: int = 1
    ) -> Iterator[tuple[Report, ClientState] | Failed]:
        """What comes of these jobs. What of a stack's work is Python for the most part is done here, and not by threads that would wait."""
        members = [self._members(job) for job in jobs]

        def train(
            job: Job, some: Sequence[Member], order: tuple[Tensor, Tensor] | None
        ) -> Trained | tuple[Report, ClientState] | Failed:
            if self._plan_of[job.instructions[0].client].way == "alone":
                return self._trained_alone(job)
            try:
                with self._workspace() as workspace:
                    if job.stack is None or order is None:
                        return self._trained_single(job, workspace)
                    return stacked_update(some, order, workspace, job.stack, job.tried)
            except Exception as error:
                # A shortcut is spoilt; or the user's own code is, which then raises it again.
                cause = (error.__cause__ if isinstance(error, ClientError) else None) or error
                if isinstance(cause, WrongProgram):
                    return Failed(job, f"{cause}, perhaps since some rounds ago")
                if is_an_answer(cause):
                    return Failed(job, described(cause))
                if is_strict():
                    raise
                return Failed(job, unexpected(cause))

        orders = [
            stacked_order(some, job.stack.width) if job.stack is not None else None
            for some, job in zip(members, jobs, strict=True)
        ]
        for some, done in zip(
            members, self._each(train, workers, kernels, jobs, members, orders), strict=True
        ):
            if isinstance(done, Failed):
                yield done
                continue
            for report, state in outcomes(some, done) if isinstance(done, Trained) else [done]:
                yield store.keep(*at_home(report, state))

    def _members(self, job: Job) -> list[Member]:
        """The clients of a stack."""
        if job.stack is None:
            return []
        pairs = [
            (self._client(instruction.client), instruction) for instruction in job.instructions
        ]
        return [
            Member(client, tensors(client.train_data), self._states[client.id], sent)
            for client, sent in pairs
        ]

    def _trained_single(self, job: Job, workspace: Workspace) -> tuple[Report, ClientState]:
        """One client, with what shortcuts there are."""
        client, plan = (
            self._client(job.instructions[0].client),
            self._plan_of[job.instructions[0].client],
        )
        plain = PlainSteps(partial(encoded_once, tried=job.tried) if plan.encode_once else encoded)
        steps = ProgramSteps(job.programs, workspace.norm_layer, plain, job.tried)
        return self._updated(
            job.instructions[0], workspace, workspace.head(client), steps, random_model=False
        )

    def _trained_alone(self, job: Job) -> tuple[Report, ClientState]:
        """One client as the reference trains it, while no other is trained."""
        (instruction,) = job.instructions
        head = self._head_alone(self._client(instruction.client))
        return self._updated(instruction, self._own, head, PlainSteps(), random_model=True)

    def _updated(
        self,
        instruction: Instruction,
        workspace: Workspace,
        head: nn.Module,
        steps: Steps,
        *,
        random_model: bool,
    ) -> tuple[Report, ClientState]:
        client, state = self._client(instruction.client), self._states[instruction.client]
        report, after = local_update(
            client,
            workspace.encoder,
            head,
            workspace.norm_layer,
            state,
            instruction,
            steps=steps,
            random_model=random_model,
        )
        _ = report.length  # the server will ask for it, and has one thread
        return report, after

    def _tests_small(self, client: Client, batch_size: int) -> bool:
        plan, data = self._plan_of.get(client.id), client.test_data
        small = isinstance(data, tuple) and size(data) <= min(EVALUATION_BATCH, batch_size)
        return small and plan is not None and plan.way == "stacked" and not self._tests_draw

    def _test(
        self,
        encoder: Tensor,
        buffers: Mapping[str, Tensor],
        batch_size: int,
        clients: Sequence[Client],
    ) -> dict[str, Evaluation]:
        """The evaluations of clients that can be tested beside others; none where that raises, and they have to be tested alone."""
        with Attempt("clients are tested one at a time"), self._workspace() as workspace:
            if self._tests_small(clients[0], batch_size):
                return stacked_evaluations(clients, self._states, encoder, workspace)
            evaluations = {}
            for client in clients:
                head = workspace.head(client)
                load_model(workspace.encoder, head, self._states[client.id], encoder, buffers)
                if client.test_data is not None:
                    evaluations[client.id] = evaluate(
                        client.task, workspace.encoder, head, client.test_data, batch_size
                    )
            return evaluations
        return {}

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """One of the workspaces that no other worker is using."""
        try:
            workspace = self._workspaces.get_nowait()
        except Empty:
            workspace = Workspace(self.federation, self.seed, self.device, self._arranged)
        yield workspace
        self._workspaces.put(workspace)

    @staticmethod
    def _each(
        work: Callable[..., Done],
        workers: int,
        kernels: int,
        tasks: Sequence[object],
        *more: Iterable[object],
    ) -> Iterator[Done]:
        """What the work makes of each task and what goes with it, in their order, as soon as it is there."""
        with kernel_threads(kernels):
            if min(workers, len(tasks)) <= 1:
                yield from map(work, tasks, *more)
            else:
                with ThreadPoolExecutor(
                    min(workers, len(tasks)), thread_name_prefix="fedgradnorm"
                ) as pool:
                    yield from pool.map(work, tasks, *more)


class _GradientStore:
    """Where a round's gradients are: in memory, or in a temporary file mapped into it where they would take more than a limit.

    Args:
        clients: who reports.
        encoder: what a gradient is like.
        limit: bytes.
    """

    def __init__(self, clients: Sequence[str], encoder: Tensor, limit: int) -> None:
        self.rows: dict[str, Tensor] = {}
        if len(clients) * encoder.nbytes > limit:
            with tempfile.NamedTemporaryFile(prefix="fedgradnorm-") as file:
                allocate = getattr(
                    os,
                    "posix_fallocate",
                    lambda number, start, length: os.truncate(number, start + length),
                )
                allocate(
                    file.fileno(), 0, len(clients) * encoder.nbytes
                )  # a full disk is an error here, and not later
                mapped = torch.from_file(
                    file.name, shared=True, size=len(clients) * len(encoder), dtype=encoder.dtype
                )
            self.rows = dict(zip(clients, mapped.view(len(clients), -1).unbind(), strict=True))

    def keep(self, report: Report, state: ClientState) -> tuple[Report, ClientState]:
        """The same report, its gradient where it is to be."""
        if self.rows:
            report = replace(report, gradient=self.rows[report.client].copy_(report.gradient))
        return report, state


def stack_widths(count: int, most: int, workers: int) -> list[int]:
    """The widths of stacks that so many alike clients fill, the last one perhaps not to its end.

    >>> stack_widths(1000, most=640, workers=2)[-8:]
    [64, 16, 16, 16, 16, 16, 16, 8]
    """
    wide, narrow = min(WIDE, most), min(NARROW, most)
    wides = [wide] * (count // (wide * workers) * workers)
    left = count - sum(wides)
    narrows = [narrow] * (left // narrow)
    rest = left - sum(narrows)
    return [*wides, *narrows, *([min(narrow, math.ceil(rest / QUARTER) * QUARTER)] if rest else [])]


def chunks(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Items in neighbouring lists of about equal length, none longer than ``most``."""
    count = math.ceil(len(items) / most)
    bounds = [len(items) * index // count for index in range(count + 1)] if count else []
    return [list(items[start:end]) for start, end in pairwise(bounds)]
