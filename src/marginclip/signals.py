"""How a command ends after SIGTERM or Ctrl-C: in one sentence, with the exit status that shells and schedulers know."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


@contextmanager
def told_endings(advice: str) -> Iterator[None]:
    """Inside, SIGTERM ends the process like Ctrl-C does, by an exception that lets every open file be closed.

    Both are told in one sentence that closes with ``advice``; the exit status is 143 or 130. What handled SIGTERM before does again
    afterwards.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
    except KeyboardInterrupt:
        print(f"error: interrupted; {advice}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == TERMINATED:
            print(f"error: terminated; {advice}", file=sys.stderr)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> NoReturn:
    sys.exit(TERMINATED)
