"""Data workers that ignore stop signals, which Ctrl-C and schedulers send to every process of a run.

Only the main process handles a signal: it finishes the step, for which it needs its workers, and then stops them.
Workers also stop by themselves within seconds after the main process has ended.
"""

from __future__ import annotations

import signal
from multiprocessing import context, popen_fork
from typing import Any

# Sent by Ctrl-C; by a scheduler that preempts a job; by SLURM with --signal=USR1@….
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()  # SIGTERM is blocked


class _Process(context.ForkProcess):
    """A process in which `SIGNALS` are blocked from its first instruction."""

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        # Blocked, not ignored: PyTorch installs a SIGTERM handler in its workers, which would end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return _Popen(process_obj)  # the new process inherits the mask, and does not return from here
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerContext(context.ForkContext):
    """The context that `DataLoader(multiprocessing_context=…)` starts its workers from."""

    Process = _Process
