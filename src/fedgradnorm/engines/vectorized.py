"""The numbers of the reference engine, by whatever is fastest for the clients at hand."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from pydantic import ByteSize
from torch import Tensor

from fedgradnorm.client import ClientState, initial_state, local_update
from fedgradnorm.config import TrainConfig
from fedgradnorm.data import tensors
from fedgradnorm.engine import Engine
from fedgradnorm.engines import placement
from fedgradnorm.engines.failures import is_an_answer, is_strict, unexpected
from fedgradnorm.engines.jobs import (
    FEWEST_STACKED,
    Failed,
    Job,
    Outcome,
    Result,
    each,
    stack_widths,
)
from fedgradnorm.engines.looped import WITHOUT_PROGRAMS, ProgramSteps, encoded_once
from fedgradnorm.engines.phases import WrongProgram
from fedgradnorm.engines.placement import GradientStore
from fedgradnorm.engines.shortcuts import Kind, Shortcuts
from fedgradnorm.engines.stacked import Member, Trained, outcomes, stacked_order, stacked_update
from fedgradnorm.engines.testing import Tested, Tests
from fedgradnorm.engines.workspace import Workspace
from fedgradnorm.errors import ClientError, described, require
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.federation import Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of
from fedgradnorm.randomness import Generators, quick_generator
from fedgradnorm.training.round import Steps
from fedgradnorm.training.steps import PlainSteps, encoded

CACHE_BYTES = 8 * 2**20
"""The encoders of a stack take at most this together, so that they stay in the caches."""

THREADED_FLOPS = 5_000_000
"""Minimum floating-point operations of a step for which clients that run in Python gain from
threads: with smaller steps threads wait for the interpreter."""

LARGE_FLOPS = 100_000_000
"""Minimum floating-point operations of a step for which kernels gain from several threads."""

TRIED = 0.25
"""The share of rounds in which a step of each kind of clients is compared with autograd."""


class VectorizedEngine(Engine):
    """Stacks small clients, spreads others over threads, and encodes once for all head steps.

    How a client is trained is found by trying it on its first batch. The logger ``fedgradnorm``
    says what was chosen, and why. The choice depends on the models and the data alone, so a run
    that is repeated or resumed on the same machine gives the same numbers.

    A shortcut is for code that draws no random numbers and whose Python values do not change. In
    every round these values (`Watch`) and the states of the global generators are compared, and in
    some rounds a step is compared with autograd. Where anything differs, the clients of that kind
    train without shortcuts from then on, that round included, and a warning says so.

    Args:
        federation: the clients.
        seed: of the heads' initialisation.
        threads: number of workers, each with kernels of a single thread; by default as many as
            torch would use.
        memory_limit: working memory in bytes, or a text such as "2GB"; by default half of the
            memory that is free when the run begins. Gradients that would take more than half of
            it lie in a temporary file, mapped into memory.
        device: ``"cpu"``, or ``"cuda"`` for a GPU, where the data of clients that have trained
            stay.

    Raises:
        ConfigError: an option is out of range, or there is no such device.
    """

    def __init__(
        self,
        federation: Federation,
        seed: int,
        threads: int | None = None,
        memory_limit: ByteSize | None = None,
        device: str = "cpu",
    ) -> None:
        in_range = threads is None or 1 <= threads <= 1024
        require(in_range, "threads", "a number from 1 to 1024", threads)
        enough = memory_limit is None or memory_limit > 0
        require(enough, "memory_limit", "a number of bytes above 0", memory_limit)
        self.federation, self.seed, self.device = federation, seed, placement.device_named(device)
        self.threads = 1 if self.device.type == "cuda" else threads or torch.get_num_threads()
        self.memory_limit = memory_limit or placement.free_memory(self.device) // 2
        buffers = buffers_of(federation.make_encoder(seed))
        clients = federation.clients
        self._states = {own.id: initial_state(federation, own, seed, buffers) for own in clients}
        self.shortcuts = Shortcuts(federation, seed, self.device)
        self._tests = Tests(self.shortcuts)

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
        sent = placement.instructions_on(self.device, instructions)
        self.shortcuts.plan(sent[0].training)
        self.shortcuts.drop_changed()
        clients = [instruction.client for instruction in sent]
        store = GradientStore(clients, sent[0].encoder, self.memory_limit // 2)
        before = Generators.now(self.device)
        done: dict[str, Outcome] = {}
        spoilt: dict[Kind, str] = {}
        for outcome in self._round(sent, store):
            if isinstance(outcome, Failed):
                spoilt[self.shortcuts.kind_of[outcome.job.client]] = outcome.reason
            else:
                done[outcome[0].client] = outcome
        spoilt |= self.shortcuts.changed()
        if Generators.now(self.device) != before:
            before.put_back(self.device)
            spoilt |= dict.fromkeys(self.shortcuts.watched(), "its code draws random numbers")
        if spoilt:
            done |= self._again(sent, spoilt, store)
        self._states |= {client: state for client, (_, state) in done.items()}
        return [done[client][0] for client in clients]

    def _again(
        self, sent: Sequence[Instruction], spoilt: Mapping[Kind, str], store: GradientStore
    ) -> dict[str, Outcome]:
        """Repeat the round for the kinds whose shortcuts failed, without shortcuts."""
        kind_of = self.shortcuts.kind_of
        self.shortcuts.put_back(spoilt)
        self.shortcuts.drop(spoilt)
        jobs = [Job([instruction]) for instruction in sent if kind_of[instruction.client] in spoilt]
        repeated = list(self._trained(jobs, store, workers=1))
        self.shortcuts.say(spoilt)
        return {pair[0].client: pair for pair in repeated if not isinstance(pair, Failed)}

    def _round(self, sent: Sequence[Instruction], store: GradientStore) -> Iterator[Result]:
        """The outcomes of the instructions, those of clients that train alone first."""
        jobs = self.jobs(sent)
        in_turn = [job for job in jobs if self._waits(job)]
        at_once = [job for job in jobs if not self._waits(job)]
        yield from self._trained(in_turn, store, workers=1)
        # The last jobs are fewer than there are threads: their kernels may share the idle cores.
        last = len(at_once) - len(at_once) % self.threads
        parts = [at_once[:last], at_once[last:]]
        for part in parts if self.kernels(parts[1]) > 1 else [at_once]:
            yield from self._trained(part, store, self.threads, self.kernels(part))

    def jobs(self, instructions: Sequence[Instruction]) -> list[Job]:
        """Which clients are trained together: identical ones in stacks, if there are enough."""
        shortcuts, training = self.shortcuts, instructions[0].training
        alike: dict[Kind, list[Instruction]] = {}
        for instruction in instructions:
            if shortcuts.plan_of[instruction.client].way == "stacked":
                kind = id(instruction.encoder), *shortcuts.kind_of[instruction.client]
                alike.setdefault(kind, []).append(instruction)
        jobs, stacked = [], set[str]()
        for group in alike.values():
            stacks = self._stacks(group, training)
            jobs += stacks
            stacked |= {sent.client for stack in stacks for sent in stack.instructions}
        for instruction in instructions:
            if instruction.client not in stacked:
                client = shortcuts.client(instruction.client)
                jobs.append(Job([instruction], shortcuts.programs(client, training)))
        return self._with_trials(jobs)

    def _stacks(self, group: Sequence[Instruction], training: TrainConfig) -> list[Job]:
        """The stacks of some identical clients. None where they are too few or too large."""
        num_bytes = max(self.shortcuts.plan_of[sent.client].num_bytes for sent in group)
        in_memory = self.memory_limit // (2 * self.threads * num_bytes)
        most = min(in_memory, CACHE_BYTES // group[0].encoder.nbytes)
        if len(group) < FEWEST_STACKED or most < 2:
            return []
        client, left = self.shortcuts.client(group[0].client), iter(group)
        return [
            Job(list(islice(left, width)), stack=self.shortcuts.stack(client, training, width))
            for width in stack_widths(len(group), most, self.threads)
        ]

    def _with_trials(self, jobs: list[Job]) -> list[Job]:
        """The jobs. In some rounds one job of each kind compares a step with autograd.

        It is the first step, or any other.
        """
        by_kind: dict[Kind, list[int]] = {}
        for place, job in enumerate(jobs):
            encode_once = self.shortcuts.plan_of[job.client].encode_once
            if job.stack or job.programs != WITHOUT_PROGRAMS or encode_once:
                by_kind.setdefault(self.shortcuts.kind_of[job.client], []).append(place)
        sent = jobs[0].instructions[0]
        rng = quick_generator(sent.training.seed, sent.round, "", f"trials {sent.step}")
        for places in by_kind.values():
            if rng.random() < TRIED:
                place = places[int(rng.integers(len(places)))]
                tried = int(rng.integers(2**31)) if rng.random() < 0.5 else 0
                jobs[place] = jobs[place]._replace(tried=tried)
        return jobs

    def _waits(self, job: Job) -> bool:
        """Whether a job is done while no other is."""
        plan, phase = self.shortcuts.plan_of[job.client], job.programs.encoder
        if plan.way == "alone":
            return True
        in_python = phase is None or phase.program.in_python
        return in_python and job.stack is None and plan.flops < THREADED_FLOPS

    def kernels(self, jobs: Sequence[Job]) -> int:
        """Threads of a kernel: one, unless cores are idle and the kernels are large."""
        large = [self.shortcuts.plan_of[job.client].flops >= LARGE_FLOPS for job in jobs]
        return max(1, self.threads // len(jobs)) if jobs and all(large) else 1

    def _trained(
        self, jobs: Sequence[Job], store: GradientStore, workers: int, kernels: int = 1
    ) -> Iterator[Result]:
        """The outcomes of these jobs.

        The part of a stack's work that is mostly Python is done here, not in the threads, which
        would wait for each other.
        """
        members = [self._members(job) for job in jobs]
        pairs = zip(members, jobs, strict=True)
        orders = [
            stacked_order(group, job.stack.width) if job.stack else None for group, job in pairs
        ]
        results = each(self._train, workers, kernels, jobs, members, orders)
        for group, result in zip(members, results, strict=True):
            if isinstance(result, Failed):
                yield result
                continue
            for outcome in outcomes(group, result) if isinstance(result, Trained) else [result]:
                report, state = placement.at_home(*outcome)
                yield store.keep(report), state

    def _train(
        self, job: Job, members: Sequence[Member], order: tuple[Tensor, Tensor] | None
    ) -> Trained | Outcome | Failed:
        if self.shortcuts.plan_of[job.client].way == "alone":
            return self._trained_single(job, self.shortcuts.own)
        try:
            with self.shortcuts.workspace() as workspace:
                if job.stack is None or order is None:
                    return self._trained_single(job, workspace)
                return stacked_update(members, order, workspace, job.stack, job.tried)
        except Exception as error:
            # A shortcut is wrong; or the user's own code fails, which then raises its error again.
            cause = (error.__cause__ if isinstance(error, ClientError) else None) or error
            if isinstance(cause, WrongProgram):
                return Failed(job, f"{cause}, perhaps since some rounds ago")
            if is_strict() and not is_an_answer(cause):
                raise
            return Failed(job, described(cause) if is_an_answer(cause) else unexpected(cause))

    def _members(self, job: Job) -> list[Member]:
        """The clients of a stack. None for a job without one."""
        members = []
        for sent in job.instructions if job.stack else ():
            client = self.shortcuts.client(sent.client)
            data, state = tensors(client.train_data), self._states[client.id]
            members.append(Member(client, data, state, sent))
        return members

    def _trained_single(self, job: Job, workspace: Workspace) -> Outcome:
        """Train one client: with its shortcuts, or as the reference does in the main models."""
        client, plan = self.shortcuts.client(job.client), self.shortcuts.plan_of[job.client]
        alone = plan.way == "alone"
        steps: Steps = PlainSteps()
        head = self.shortcuts.head_alone(client) if alone else workspace.head(client)
        if not alone:
            once = partial(encoded_once, tried=job.tried) if plan.encode_once else encoded
            steps = ProgramSteps(job.programs, PlainSteps(once), job.tried)
        models = workspace.encoder, head, workspace.norm_layer
        given = self._states[client.id], job.instructions[0]
        report, state = local_update(client, *models, *given, steps=steps, random_model=alone)
        _ = report.length  # computed in this thread: the server, which needs it, has only one
        return report, state

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> dict[str, Evaluation]:
        """Test every client that has test data."""
        self.shortcuts.drop_changed()
        return self._tests.run(Tested(self._states, encoder, buffers, batch_size), self.threads)
