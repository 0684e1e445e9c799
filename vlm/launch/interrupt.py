"""Ctrl-C while a program still imports its libraries ends it without a trace; later it is a KeyboardInterrupt.

Some libraries make an error of their own of an interrupt in the middle of an import, so none is raised there.
"""

import signal


def end_at_once() -> None:
    """From here on Ctrl-C ends the process, unless it is ignored, as it is in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """The imports are done: undo `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
