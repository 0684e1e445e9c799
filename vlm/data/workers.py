"""Data workers that ignore signals to the process group: Ctrl-C and schedulers send one to every process of a run.

The main process handles the signal: it finishes the step, for which it needs its workers, and then stops them. Workers
also stop by themselves within seconds once the main process is gone.
"""

from __future__ import annotations

import signal
from multiprocessing import context, popen_fork
from typing import Any

# From the keyboard; from a scheduler that wants the machine back; from SLURM where --signal=USR1@… asks for it.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()  # SIGTERM would wait behind the mask


class _Process(context.ForkProcess):
    """A process in which `SIGNALS` are blocked from its first instruction on."""

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        # Blocked rather than ignored: PyTorch gives its workers a handler of SIGTERM, after which a worker ends.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return _Popen(process_obj)  # the new process has the mask, and does not return from here
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerContext(context.ForkContext):
    """The context that `DataLoader(multiprocessing_context=…)` starts its workers from."""

    Process = _Process
