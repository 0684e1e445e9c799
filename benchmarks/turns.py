"""Ways of doing the same work, each in a process of its own, timed in turns (A B A B …)."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

# Does one piece of work at each `next` and yields what must agree between the ways, such as a loss.
Way = Callable[[], Iterator[Any]]


@dataclass
class Timing:
    """Seconds of each turn, values to compare, and peak memory in units of 10⁹ bytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    memory_gb: float = 0.0

    @property
    def seconds(self) -> float:
        return median(self.wall)


def in_turns(ways: dict[str, Way], *, turns: int, warm_up: int = 1, one_at_a_time: bool = False) -> dict[str, Timing]:
    """The timing of each way. The ways must be functions of a module, because each runs in a new process.

    With `one_at_a_time`, each turn has a process of its own, which is warmed up anew, and the memory of one way.
    """
    timings = {name: Timing() for name in ways}
    if one_at_a_time:
        for _ in range(turns):
            for name, way in ways.items():
                with _started(way) as pipe:
                    for turn in range(-warm_up, 1):
                        _take_turn(pipe, timings[name], is_timed=turn == 0)
        return timings
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(_started(way)) for name, way in ways.items()}
        for turn in range(-warm_up, turns):
            for name, pipe in pipes.items():
                _take_turn(pipe, timings[name], is_timed=turn >= 0)
    return timings


@contextmanager
def _started(way: Way) -> Iterator[Connection]:
    """Context with a process that has built what `way` needs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(way, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()
        process.join()


def _take_turn(pipe: Connection, timing: Timing, *, is_timed: bool) -> None:
    pipe.send("go")
    wall, cpu, value, memory_gb = pipe.recv()
    timing.values.append(value)
    timing.memory_gb = max(timing.memory_gb, memory_gb)
    if is_timed:
        timing.wall.append(wall)
        timing.cpu.append(cpu)


def print_table(name: str, timings: dict[str, Timing], *, pieces: int = 1) -> None:
    """A line for each way; seconds are of one of `pieces` equal pieces of a turn."""
    first = next(iter(timings.values()))
    for way, timing in timings.items():
        print(
            f"{name:<10}{way:<22}{timing.seconds / pieces:8.2f} s{timing.seconds / first.seconds:7.2f} x"
            f"{median(timing.cpu) / pieces:8.2f} s of CPU{timing.memory_gb:7.2f} GB"
        )


def _serve(way: Way, pipe: Connection) -> None:
    work = way()
    next(work)  # builds what it needs
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:
            os._exit(0)  # a trainer is in the middle of its run
        wall, cpu = time.perf_counter(), time.process_time()
        value = next(work)
        spent = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((*spent, value, peak_memory_gb()))


def peak_memory_gb() -> float:
    """Of this process: the peak of its tensors on a GPU if it uses one, else of all its memory, in 10⁹ bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_thread(run: Callable[[Callable[[float], None]], Any]) -> Iterator[float]:
    """The values that a trainer's run reports, one for each `next`: between two of them the run waits.

    `run` gets `report`, which it calls once before the first step and after every step.
    """
    import threading
    from queue import Queue

    go: Queue[None] = Queue()
    done: Queue[float] = Queue()

    def report(value: float) -> None:
        done.put(value)
        go.get()

    threading.Thread(target=run, args=(report,), daemon=True).start()
    yield done.get()
    while True:
        go.put(None)
        yield done.get()
