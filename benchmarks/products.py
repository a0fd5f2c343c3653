"""The matrix products and convolutions of a round without anything around them: as fast as a round could be that computes them so."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["product_rounds", "shares"]

aten = torch.ops.aten
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.addmm_,
    aten.bmm,
    aten.baddbmm,
    aten.baddbmm_,
    aten.convolution,
    aten.convolution_backward,
}
PROFILED = {
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "addmm_",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "mkldnn_convolution",
        "convolution_backward",
    )
}


@dataclass(frozen=True)
class Like:
    """What a tensor was like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A tensor like that, of random numbers."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).normal_()


class Products(TorchDispatchMode):
    """Notes every product of the operations in its block, with what its operands are like."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it if it is a product."""
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, *tree_map(_like, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _like(value: Any) -> Any:
    return (
        Like(tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, Tensor)
        else value
    )


def product_rounds(rounds: Iterator[None]) -> Iterator[None]:
    """Rounds of the products alone, on as many threads of one kernel thread each as torch would use.

    Args:
        rounds: whose products; their work has to be done on the calling thread. The second is recorded.
    """
    workers = torch.get_num_threads()
    next(rounds)
    with Products() as recorder:
        next(rounds)
    calls = recorder.calls
    bounds = [len(calls) * part // workers for part in range(workers + 1)]
    shares = [_ready(calls[start:end]) for start, end in pairwise(bounds)]
    alone = partial(torch.set_num_threads, 1)  # in every thread: convolutions go by its own number
    with ThreadPoolExecutor(workers, initializer=alone) as pool:
        while True:
            list(pool.map(_replay, shares))
            yield


def _ready(calls: Sequence[tuple[Any, Any, Any]]) -> list[tuple[Callable[..., Any], Any, Any]]:
    """The calls with operands, which calls of alike operands share, as the steps of a client share its weights."""
    made: dict[tuple[int, Like], Tensor] = {}

    def operands(args: Any) -> Any:
        places = iter(range(100))
        return tree_map(
            lambda value: (
                made.setdefault((next(places), value), value.make())
                if isinstance(value, Like)
                else value
            ),
            args,
        )

    return [(func, operands(args), operands(kwargs)) for func, args, kwargs in calls]


@torch.no_grad()
def _replay(calls: Sequence[tuple[Callable[..., Any], Any, Any]]) -> None:
    for func, args, kwargs in calls:
        func(*args, **kwargs)


def shares(rounds: Iterator[None]) -> dict[str, float]:
    """How the seconds of a round on one thread divide into products, torch's other operations, and what is around them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = perf_counter()
        next(rounds)
        seconds = perf_counter() - start
    operations = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    products = sum(taken for name, taken in operations.items() if name in PROFILED)
    others = sum(
        taken
        for name, taken in operations.items()
        if name.startswith("aten::") and name not in PROFILED
    )
    return {
        "seconds": seconds,
        "products": products,
        "others": others,
        "around": seconds - products - others,
    }
