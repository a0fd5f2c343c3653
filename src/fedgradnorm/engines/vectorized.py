"""The numbers of the reference engine, by whatever is fastest for the clients at hand."""

import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from pydantic import ByteSize
from torch import Tensor

from fedgradnorm.client import EVALUATION_BATCH, ClientState, Evaluation, evaluate, initial_state, load_model, local_update
from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.data import size, take, tensors
from fedgradnorm.engines.looped import encoded_once
from fedgradnorm.engines.placement import at_home, client_on, device_named, instructions_on, total_memory
from fedgradnorm.engines.planning import Plan, plan_for
from fedgradnorm.engines.stacked import Member, stacked_evaluations, stacked_update
from fedgradnorm.engines.workspace import Workspace, can_be_arranged, head_kind
from fedgradnorm.errors import require
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training.steps import encoded

__all__ = ["VectorizedEngine"]

log = logging.getLogger(__name__)

CACHE_BYTES = 8 * 2**20
"""A chunk of stacked clients has parameters of about this size: enough clients for calls to count little, few enough for caches."""

FEWEST_STACKED = 5
"""So many clients with the same kind of head are worth a stack."""

THREADED_FLOPS = 5_000_000
"""From so many floating-point operations a step on, threads wait less for one another's Python code than they gain."""

LARGE_FLOPS = 100_000_000
"""From so many floating-point operations a step on, kernels gain from threads of their own."""

TESTED_TOGETHER = 200
"""Small clients whose test data pass through the encoder at once."""

Job = TypeVar("Job")
Done = TypeVar("Done")


class VectorizedEngine:
    """Stacks small clients, spreads others over threads, encodes once for all head steps: the same numbers, sooner.

    Which way a client goes is found out by trying it on its first batch; the logger ``fedgradnorm`` says what was chosen, and why. It
    depends on the models and the data alone, so that a run that is repeated or resumed on the same machine gives the same numbers.

    Args:
        federation: whose clients it runs.
        seed: of the heads' initialisation.
        threads: how many workers there are, each with kernels of a single thread; by default as many as torch would use.
        memory_limit: bytes, or a text such as "2GB", for what it works with; by default a quarter of the machine's memory. Gradients
            that would take more than half of it lie in a temporary file, mapped into memory.
        device: ``"cpu"``, or ``"cuda"`` for a GPU, where the data of clients that have trained stay.
    """

    def __init__(
        self, federation: Federation, seed: int, threads: int | None = None, memory_limit: ByteSize | None = None, device: str = "cpu"
    ) -> None:
        require(threads is None or 1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads)
        require(memory_limit is None or memory_limit > 0, "memory_limit", "a number of bytes above 0", memory_limit)
        self.federation, self.seed, self.device = federation, seed, device_named(device)
        self.threads = 1 if self.device.type == "cuda" else threads or torch.get_num_threads()
        self.memory_limit = memory_limit or total_memory(self.device) // 4
        buffers = buffers_of(federation.make_encoder(seed))
        self._states = {client.id: initial_state(federation, client, seed, buffers) for client in federation.clients}
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        self._arranged = False
        self._clients: dict[str, Client] = {}
        self._planned_for: tuple[int, MethodConfig] | None = None
        self._plans: dict[object, Plan] = {}
        self._plan_of: dict[str, Plan] = {}

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
        in_turn = [job for job in jobs if len(job) == 1 and self._stays_on_one_thread(job[0].client)]
        at_once = [job for job in jobs if len(job) > 1 or not self._stays_on_one_thread(job[0].client)]
        store = _GradientStore([instruction.client for instruction in instructions], instructions[0].encoder, self.memory_limit // 2)
        train, reports = partial(self._train, store), []
        drawn = torch.get_rng_state()
        done = self._each(train, in_turn, workers=1) + self._each(train, at_once, self.threads, self._kernels(at_once))
        if not torch.equal(drawn, torch.get_rng_state()):  # models draw for some examples, and did not for those of the plan
            torch.set_rng_state(drawn)
            for instruction in instructions:
                self._plan_of[instruction.client] = replace(self._plan_of[instruction.client], way="alone", encode_once=False)
            done = self._each(train, [[instruction] for job in jobs for instruction in job], workers=1)
        for report, state in chain.from_iterable(done):
            self._states[report.client] = state
            reports.append(report)
        return reports

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
        for done in self._each(test, in_turn, workers=1) + self._each(test, at_once, self.threads):
            evaluations |= done
        return {client.id: evaluations[client.id] for client in clients}

    def _jobs(self, instructions: Sequence[Instruction]) -> list[list[Instruction]]:
        """Who is trained together: clients that can be stacked and are many, in chunks; everyone else by himself."""
        self._make_plans(instructions[0].training)
        kinds = Counter(head_kind(self._client(instruction.client)) for instruction in instructions)
        stacks: dict[object, list[Instruction]] = {}
        jobs = []
        for instruction in instructions:
            client, plan = self._client(instruction.client), self._plan_of[instruction.client]
            if plan.way == "stacked" and kinds[head_kind(client)] >= FEWEST_STACKED:
                stacks.setdefault((id(instruction.encoder), plan.stack), []).append(instruction)
            else:
                jobs.append([instruction])
        order = {kind: place for place, kind in enumerate(kinds)}
        for stack in stacks.values():
            stack.sort(key=lambda instruction: order[head_kind(self._client(instruction.client))])
            largest = max(self._plan_of[instruction.client].num_bytes for instruction in stack)
            most = min(self.memory_limit // (2 * self.threads * largest), CACHE_BYTES // stack[0].encoder.nbytes)
            chunks = _chunks(stack, max(1, most), self.threads)
            log.debug("round %d: %d clients stacked, %d at a time", stack[0].round, len(stack), len(chunks[0]))
            jobs += chunks
        return jobs

    def _make_plans(self, training: TrainConfig) -> None:
        """A plan for every client, so that a run that is resumed with other participants goes the same ways."""
        if self._planned_for == (training.batch_size, training.method):
            return
        clients = sorted(self.federation.clients, key=lambda client: client.id)
        inputs = take(clients[0].train_data, np.arange(min(training.batch_size, size(clients[0].train_data))))[0]
        with kernel_threads(1):
            self._arranged = can_be_arranged(self.federation, self.seed, self.device, inputs.to(self.device))
            self._workspaces, self._plans = SimpleQueue(), {}
            self._plan_of = {client.id: self._plan(client, training) for client in clients}
        self._planned_for = training.batch_size, training.method

    def _client(self, id: str) -> Client:
        if id not in self._clients:
            self._clients[id] = client_on(self.device, self.federation.client(id))
        return self._clients[id]

    def _plan(self, client: Client, training: TrainConfig) -> Plan:
        data = client.train_data
        shapes = [(part.shape[1:], part.dtype) for part in data] if isinstance(data, tuple) else []
        key = (head_kind(client), *shapes, min(training.batch_size, size(data)), size(data) > EVALUATION_BATCH)
        if key not in self._plans:
            with self._workspace() as workspace:
                self._plans[key] = plan = plan_for(client, workspace, training)
            once = "encoded once for all head steps" if plan.encode_once else "encoded in every head step"
            log.info("%s, and clients like it: %s, %s: %s", client.id, self._said(plan), once, plan.why)
        return self._plans[key]

    def _said(self, plan: Plan) -> str:
        if plan.way == "stacked":
            return f"stacked where {FEWEST_STACKED} or more are alike"
        threads = 1 if plan.way == "alone" or plan.flops < THREADED_FLOPS else self.threads
        return f"one at a time, on {threads} thread{'s' if threads > 1 else ''}"

    def _stays_on_one_thread(self, client: str) -> bool:
        plan = self._plan_of[client]
        return plan.way == "alone" or plan.flops < THREADED_FLOPS

    def _kernels(self, jobs: Sequence[Sequence[Instruction]]) -> int:
        """Threads of a kernel: one, unless there are cores without a client and kernels large enough to share."""
        if any(self._plan_of[job[0].client].flops < LARGE_FLOPS for job in jobs):
            return 1
        return max(1, self.threads // max(1, len(jobs)))

    def _train(self, store: "_GradientStore", job: Sequence[Instruction]) -> list[tuple[Report, ClientState]]:
        with self._workspace() as workspace:
            if len(job) > 1:
                clients = [self._client(instruction.client) for instruction in job]
                pairs = zip(clients, job, strict=True)
                members = [Member(client, tensors(client.train_data), self._states[client.id], sent) for client, sent in pairs]
                outcomes = stacked_update(members, workspace)
            else:
                client, plan = self._client(job[0].client), self._plan_of[job[0].client]
                outcome = local_update(
                    client,
                    workspace.encoder,
                    workspace.head(client),
                    workspace.norm_layer,
                    self._states[client.id],
                    job[0],
                    encoded=encoded_once if plan.encode_once else encoded,
                    random_model=plan.way == "alone",
                )
                outcomes = [outcome]
        return [store.keep(*at_home(*outcome)) for outcome in outcomes]

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
    def _each(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int, kernels: int = 1) -> list[Done]:
        """What the work makes of each job, in their order."""
        with kernel_threads(kernels):
            if min(workers, len(jobs)) <= 1:
                return [work(job) for job in jobs]
            with ThreadPoolExecutor(min(workers, len(jobs)), thread_name_prefix="fedgradnorm") as pool:
                return list(pool.map(work, jobs))


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


def _chunks(items: Sequence[Job], most: int, multiple: int = 1) -> list[list[Job]]:
    """Items in neighbouring lists of about equal length, none longer than ``most``; if in more than one, in a multiple of some number."""
    count = math.ceil(len(items) / most)
    if count > 1:
        count = min(len(items), math.ceil(count / multiple) * multiple)
    bounds = [len(items) * index // count for index in range(count + 1)] if count else []
    return [list(items[start:end]) for start, end in pairwise(bounds)]
