"""Commands of the project as programs of their own, without waiting for a new Python to import everything each time.

One process imports what every command needs and does nothing else; a command is a fork of it, with a folder, an environment, files for
what it prints, and an exit status of its own. ``python programs.py`` is that process.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

TIMEOUT = 240  # seconds


class Programs:
    """The process that commands are forks of; it starts with the first command and ends with :meth:`close`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """``python WORDS`` for ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``, as ``subprocess.run`` would do it."""
        if self.process is None or self.process.poll() is not None:
            own = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            asked = {"words": list(words), "cwd": str(cwd), "env": dict(os.environ if env is None else env), "out": str(out)}
            self.process.stdin.write(json.dumps(asked | {"err": str(err)}) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(list(words), status, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Do one command for every line that comes in; its exit status goes out."""
    import lightning  # noqa: F401
    import torchvision  # noqa: F401

    import marginclip.experiment.command
    import marginclip.experiment.run  # noqa: F401

    for line in requests:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            do(asked)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def do(asked: Mapping[str, object]) -> None:
    """Be the program that is asked for, to its end."""
    signal.alarm(TIMEOUT)
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["env"])  # type: ignore[call-overload]
    flags = os.O_WRONLY | os.O_CREAT
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, asked["out"], flags), (2, asked["err"], flags)):
        os.dup2(os.open(str(name), mode), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    status = _status_of(lambda: _execute(list(asked["words"])))  # type: ignore[call-overload]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _execute(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(first).parent))
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def _status_of(program: Callable[[], None]) -> int:
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Python ends by the signal, so that whoever started it knows
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.stdin, os.fdopen(os.dup(1), "w"))
