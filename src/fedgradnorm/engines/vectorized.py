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
from itertools import chain, islice, pairwise
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from pydantic import ByteSize
from torch import Tensor

from fedgradnorm.client import EVALUATION_BATCH, ClientState, Evaluation, evaluate, initial_state, load_model, local_update
from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.data import size, tensors
from fedgradnorm.engines.looped import WITHOUT_PROGRAMS, Programs, ProgramSteps, encoded_once
from fedgradnorm.engines.placement import at_home, client_on, device_named, free_memory, instructions_on
from fedgradnorm.engines.planning import Plan, batch_of, plan_for, programs_for
from fedgradnorm.engines.stacked import Member, Stack, Trained, outcomes, stack_of, stacked_evaluations, stacked_order, stacked_update
from fedgradnorm.engines.workspace import Workspace, can_be_arranged, head_kind
from fedgradnorm.errors import require
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training.steps import PlainSteps, encoded

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


class Job(NamedTuple):
    """Clients that are trained together: one, by these programs, or as many as fit into a stack."""

    instructions: Sequence[Instruction]
    programs: Programs = WITHOUT_PROGRAMS
    stack: Stack | None = None


Task = TypeVar("Task")
Done = TypeVar("Done")


class VectorizedEngine:
    """Stacks small clients, spreads others over threads, encodes once for all head steps: the same numbers, sooner.

    Which way a client goes is found out by trying it on its first batch; the logger ``fedgradnorm`` says what was chosen, and why. It
    depends on the models and the data alone, so that a run that is repeated or resumed on the same machine gives the same numbers.

    Args:
        federation: whose clients it runs.
        seed: of the heads' initialisation.
        threads: how many workers there are, each with kernels of a single thread; by default as many as torch would use.
        memory_limit: bytes, or a text such as "2GB", for what it works with; by default half of the memory that
            is free when the run begins. Gradients that would take more than half of it lie in a temporary file, mapped into memory.
        device: ``"cpu"``, or ``"cuda"`` for a GPU, where the data of clients that have trained stay.
    """

    def __init__(
        self, federation: Federation, seed: int, threads: int | None = None, memory_limit: ByteSize | None = None, device: str = "cpu"
    ) -> None:
        require(threads is None or 1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads)
        require(memory_limit is None or memory_limit > 0, "memory_limit", "a number of bytes above 0", memory_limit)
        self.federation, self.seed, self.device = federation, seed, device_named(device)
        self.threads = 1 if self.device.type == "cuda" else threads or torch.get_num_threads()
        self.memory_limit = memory_limit or free_memory(self.device) // 2
        buffers = buffers_of(federation.make_encoder(seed))
        self._states = {client.id: initial_state(federation, client, seed, buffers) for client in federation.clients}
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        self._arranged = False
        self._clients: dict[str, Client] = {}
        self._planned_for: tuple[int, MethodConfig] | None = None
        self._plans: dict[object, Plan] = {}
        self._plan_of: dict[str, Plan] = {}
        self._kind_of: dict[str, tuple[object, ...]] = {}
        self._programs_of: dict[tuple[object, ...], Programs] = {}
        self._stacks: dict[tuple[object, ...], Stack] = {}

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
        jobs = self._jobs(instructions_on(self.device, instructions))
        in_turn, at_once = [job for job in jobs if self._waits(job)], [job for job in jobs if not self._waits(job)]
        store = _GradientStore([instruction.client for instruction in instructions], instructions[0].encoder, self.memory_limit // 2)
        drawn = torch.get_rng_state()
        last = len(at_once) - len(at_once) % self.threads  # the last ones are fewer than there are threads
        done = list(self._trained(in_turn, store, workers=1))
        for some in (at_once[:last], at_once[last:]) if self._kernels(at_once[last:]) > 1 else (at_once,):
            done += self._trained(some, store, self.threads, self._kernels(some))
        if not torch.equal(drawn, torch.get_rng_state()):  # models draw for some examples, and did not for those of the plan
            torch.set_rng_state(drawn)
            for instruction in instructions:
                self._plan_of[instruction.client] = replace(self._plan_of[instruction.client], way="alone", encode_once=False)
            done = list(self._trained([Job([instruction]) for job in jobs for instruction in job.instructions], store, workers=1))
        self._states |= {report.client: state for report, state in done}
        return [report for report, _ in done]

    def evaluate(self, encoder: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Evaluation]:
        """Test every client that has test data."""
        clients = [self._client(client.id) for client in self.federation.clients if client.test_data is not None]
        small: dict[object, list[Client]] = {}
        in_turn: list[list[Client]] = []
        at_once: list[list[Client]] = []
        for client in clients:
            if self._tests_small(client) and isinstance(client.test_data, tuple):
                inputs, _ = client.test_data
                small.setdefault((inputs.shape[1:], inputs.dtype), []).append(client)
            else:  # a data set, or a model that draws random numbers, may bear no other thread beside it
                plan = self._plan_of.get(client.id)
                alone = plan is None or plan.way == "alone" or not isinstance(client.test_data, tuple)
                (in_turn if alone else at_once).append([client])
        at_once += [chunk for alike in small.values() for chunk in _chunks(alike, TESTED_TOGETHER)]
        test = partial(self._test, encoder, buffers)
        evaluations: dict[str, Evaluation] = {}
        for done in chain(self._each(test, 1, 1, in_turn), self._each(test, self.threads, 1, at_once)):
            evaluations |= done
        return {client.id: evaluations[client.id] for client in clients}

    def _jobs(self, instructions: Sequence[Instruction]) -> list[Job]:
        """Who is trained together: alike clients in stacks, where there are enough of them; everyone else by himself."""
        training = instructions[0].training
        self._make_plans(training)
        alike: dict[tuple[object, ...], list[Instruction]] = {}
        for instruction in instructions:
            if self._plan_of[instruction.client].way == "stacked":
                alike.setdefault((id(instruction.encoder), *self._kind_of[instruction.client]), []).append(instruction)
        jobs, stacked = [], set[str]()
        for some in alike.values():
            client, num_bytes = self._client(some[0].client), max(self._plan_of[instruction.client].num_bytes for instruction in some)
            most = min(self.memory_limit // (2 * self.threads * num_bytes), CACHE_BYTES // some[0].encoder.nbytes)
            if len(some) < FEWEST_STACKED or most < 2:
                continue
            taken, widths = iter(some), stack_widths(len(some), most, self.threads)
            jobs += [Job(list(islice(taken, width)), stack=self._stack(client, training, width)) for width in widths]
            stacked |= {instruction.client for instruction in some}
        alone = [instruction for instruction in instructions if instruction.client not in stacked]
        return jobs + [Job([instruction], self._programs(self._client(instruction.client), training)) for instruction in alone]

    def _programs(self, client: Client, training: TrainConfig) -> Programs:
        """The programs of a client that is trained by itself, though perhaps others like it are in stacks."""
        plan, kind = self._plan_of[client.id], self._kind_of[client.id]
        if not plan.traceable:
            return WITHOUT_PROGRAMS
        if kind not in self._programs_of:
            with self._workspace() as workspace, kernel_threads(1):
                self._programs_of[kind] = programs_for(client, workspace, training)
                found = [name for name, phase in self._programs_of[kind]._asdict().items() if phase is not None]
                log.info("%s, and clients like it: programs of the steps on %s", client.id, " and ".join(found) or "nothing")
        return self._programs_of[kind]

    def _stack(self, client: Client, training: TrainConfig, width: int) -> Stack:
        key = (*self._kind_of[client.id], width)
        if key not in self._stacks:
            with self._workspace() as workspace, kernel_threads(1):
                self._stacks[key] = stack_of(client, workspace, batch_of(client, training, self.device), width)
        return self._stacks[key]

    def _make_plans(self, training: TrainConfig) -> None:
        """A plan for every client, so that a run that is resumed with other participants goes the same ways."""
        if self._planned_for == (training.batch_size, training.method):
            return
        clients = sorted(self.federation.clients, key=lambda client: client.id)
        inputs, _ = batch_of(clients[0], training, self.device)
        with kernel_threads(1):
            self._arranged = can_be_arranged(self.federation, self.seed, self.device, inputs)
            self._workspaces, self._plans, self._programs_of, self._stacks = SimpleQueue(), {}, {}, {}
            self._kind_of = {client.id: self._kind(client, training) for client in clients}
            self._plan_of = {client.id: self._plan(client, training) for client in clients}
        self._planned_for = training.batch_size, training.method

    def _client(self, id: str) -> Client:
        if id not in self._clients:
            self._clients[id] = client_on(self.device, self.federation.client(id))
        return self._clients[id]

    def _plan(self, client: Client, training: TrainConfig) -> Plan:
        key = self._kind_of[client.id]
        if key not in self._plans:
            with self._workspace() as workspace:
                self._plans[key] = plan = plan_for(client, workspace, training)
            once = "encoded once for all head steps" if plan.encode_once else "encoded in every head step"
            log.info("%s, and clients like it: %s, %s: %s", client.id, self._said(plan), once, plan.why)
        return self._plans[key]

    @staticmethod
    def _kind(client: Client, training: TrainConfig) -> tuple[object, ...]:
        """What clients have in common that are trained in the same way."""
        data = client.train_data
        shapes = [(part.shape[1:], part.dtype) for part in data] if isinstance(data, tuple) else []
        return (*head_kind(client), *shapes, min(training.batch_size, size(data)), size(data) > EVALUATION_BATCH)

    def _said(self, plan: Plan) -> str:
        if plan.way == "stacked":
            return f"stacked where {FEWEST_STACKED} or more are alike"
        return "one at a time" if plan.way == "looped" else "one at a time, while no other is trained"

    def _waits(self, job: Job) -> bool:
        """Whether a job is not to be done while others are."""
        plan = self._plan_of[job.instructions[0].client]
        return plan.way == "alone" or (job.stack is None and job.programs.encoder is None and plan.flops < THREADED_FLOPS)

    def _kernels(self, jobs: Sequence[Job]) -> int:
        """Threads of a kernel: one, unless there are cores without a client and kernels large enough to share."""
        if not jobs or any(self._plan_of[job.instructions[0].client].flops < LARGE_FLOPS for job in jobs):
            return 1
        return max(1, self.threads // len(jobs))

    def _trained(
        self, jobs: Sequence[Job], store: "_GradientStore", workers: int, kernels: int = 1
    ) -> Iterator[tuple[Report, ClientState]]:
        """What comes of these jobs. What of a stack's work is Python for the most part is done here, and not by threads that would wait."""
        members = [self._members(job) for job in jobs]

        def train(job: Job, some: Sequence[Member], order: tuple[Tensor, Tensor] | None) -> Trained | tuple[Report, ClientState]:
            with self._workspace() as workspace:
                if job.stack is None or order is None:
                    return self._trained_alone(job, workspace)
                return stacked_update(some, order, workspace, job.stack)

        # One after another, so that the first stacks are trained while the batches of the others are drawn.
        orders = (stacked_order(some, job.stack.width) if job.stack is not None else None for some, job in zip(members, jobs, strict=True))
        for some, done in zip(members, self._each(train, workers, kernels, jobs, members, orders), strict=True):
            for report, state in outcomes(some, done) if isinstance(done, Trained) else [done]:
                yield store.keep(*at_home(report, state))

    def _members(self, job: Job) -> list[Member]:
        """The clients of a stack."""
        if job.stack is None:
            return []
        pairs = [(self._client(instruction.client), instruction) for instruction in job.instructions]
        return [Member(client, tensors(client.train_data), self._states[client.id], sent) for client, sent in pairs]

    def _trained_alone(self, job: Job, workspace: Workspace) -> tuple[Report, ClientState]:
        (instruction,) = job.instructions
        client, plan = self._client(instruction.client), self._plan_of[instruction.client]
        report, state = local_update(
            client,
            workspace.encoder,
            workspace.head(client),
            workspace.norm_layer,
            self._states[client.id],
            instruction,
            steps=ProgramSteps(job.programs, workspace.norm_layer, PlainSteps(encoded_once if plan.encode_once else encoded)),
            random_model=plan.way == "alone",
        )
        _ = report.length  # the server will ask for it, and has one thread
        return report, state

    def _tests_small(self, client: Client) -> bool:
        plan, data = self._plan_of.get(client.id), client.test_data
        return plan is not None and plan.way == "stacked" and isinstance(data, tuple) and size(data) <= EVALUATION_BATCH

    def _test(self, encoder: Tensor, buffers: Mapping[str, Tensor], clients: Sequence[Client]) -> dict[str, Evaluation]:
        with self._workspace() as workspace:
            if self._tests_small(clients[0]):
                return stacked_evaluations(clients, self._states, encoder, workspace)
            evaluations = {}
            for client in clients:
                head = workspace.head(client)
                load_model(workspace.encoder, head, self._states[client.id], encoder, buffers)
                if client.test_data is not None:
                    evaluations[client.id] = evaluate(client.task, workspace.encoder, head, client.test_data)
            return evaluations

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
    def _each(work: Callable[..., Done], workers: int, kernels: int, tasks: Sequence[object], *more: Iterable[object]) -> Iterator[Done]:
        """What the work makes of each task and what goes with it, in their order, as soon as it is there."""
        with kernel_threads(kernels):
            if min(workers, len(tasks)) <= 1:
                yield from map(work, tasks, *more)
            else:
                with ThreadPoolExecutor(min(workers, len(tasks)), thread_name_prefix="fedgradnorm") as pool:
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
                allocate = getattr(os, "posix_fallocate", lambda number, start, length: os.truncate(number, start + length))
                allocate(file.fileno(), 0, len(clients) * encoder.nbytes)  # a full disk is an error here, and not later
                mapped = torch.from_file(file.name, shared=True, size=len(clients) * len(encoder), dtype=encoder.dtype)
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


def _chunks(items: Sequence[Task], most: int) -> list[list[Task]]:
    """Items in neighbouring lists of about equal length, none longer than ``most``."""
    count = math.ceil(len(items) / most)
    bounds = [len(items) * index // count for index in range(count + 1)] if count else []
    return [list(items[start:end]) for start, end in pairwise(bounds)]
