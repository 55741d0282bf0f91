"""What is going on, and for how long: compilers say nothing of their own."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def reported(what: str, quiet: bool = False) -> Iterator[None]:
    """Says on standard error what is done in the block, and how long it has taken so far.

    On a terminal one line counts the seconds; elsewhere a line appears every 15 seconds.
    """
    if quiet:
        yield
        return
    done = threading.Event()
    started = time.monotonic()
    terminal = sys.stderr.isatty()

    def say(end: str) -> None:
        start = "\r" if terminal else ""
        seconds = time.monotonic() - started
        print(f"{start}{what} … {seconds:.0f} s", end=end, file=sys.stderr, flush=True)

    def count() -> None:
        while not done.wait(1.0 if terminal else _SECONDS_BETWEEN_LINES):
            say(end="" if terminal else "\n")

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        say(end="\n")
