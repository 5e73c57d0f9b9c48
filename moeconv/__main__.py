"""python -m moeconv: the command line.

A signal that comes while Python is still importing has its exit code too.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # docs/cli.md: nothing is lost


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_CODES[signal.Signals(number)])


def run() -> None:
    """Run the command line and exit with its code."""
    for number in EXIT_CODES:
        signal.signal(number, _leave)
    from moeconv.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except SystemExit as stop:
        # What is durable is durable: taking modules and buffers apart would take 0.1 s.
        os._exit(stop.code if isinstance(stop.code, int) else 1)


if __name__ == "__main__":
    run()
