"""A fresh interpreter that has loaded gradsync, and forks whoever a test would start: seconds of imports less a start.

Run as a program it reads requests, a JSON object a line, and answers each with a process number. What it forks is the
child of the one that asks, in a session of its own. It differs from a started one in ``/proc``, which shows the command
line and environment of this program, and in its end: what was loaded is not taken apart.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_START = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG", "OMP_NUM_THREADS")


class Preloaded:
    """The program, started by pytest's process."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def knows(self, env: dict[str, str]) -> bool:
        """Whether an interpreter that starts with ``env`` would do what this one has done."""
        return all(env.get(name) == self._environment.get(name) for name in _READ_AT_START)

    def start(self, arguments: list[str], cwd: Path, env: dict[str, str], output: int) -> Started:
        """As ``python ARGUMENTS``, where these are ``-m gradsync ...`` or ``-c CODE ...``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "output": f"/proc/{os.getpid()}/fd/{output}"}
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            print(json.dumps(request), file=self._process.stdin)
            return Started(int(self._process.stdout.readline()))
        finally:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


class Started:
    """What of ``subprocess.Popen`` is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _serve() -> dict[str, Any]:
    """Return in forked processes only."""
    for line in sys.stdin:
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            return json.loads(line)
        os.waitpid(between, 0)
    os._exit(0)


def _become(cwd: str, env: dict[str, str], output: str, arguments: list[str]) -> None:
    os.setsid()
    written = os.open(output, os.O_WRONLY)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, 1, closefd=False) for n, mode in enumerate("rww"))
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.stdout.reconfigure(write_through=True)
    sys.path[0] = ""
    sys.path[1:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(answer, f"{os.getpid()}\n".encode())
    for descriptor in (answer, nothing, written):
        os.close(descriptor)
    with suppress(ImportError):
        import numpy

        numpy.random.seed()


def _run(kind: str, what: str, *rest: str) -> None:
    main = sys.modules["__main__"]
    if kind == "-c":
        sys.argv = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        from gradsync.cli import main as command

        main.__spec__ = find_spec(f"{what}.__main__")
        assert main.__spec__ is not None
        sys.argv = [str(main.__spec__.origin), *rest]
        command()


def _code_of(run: Callable[[], None]) -> int:
    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> None:
    """As the interpreter does, but without taking apart what was loaded: it takes seconds, most of them for copies."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import gradsync.lightning_cli  # noqa: F401 (loaded, for all)

    gc.freeze()
    arguments = (request := _serve())["arguments"]
    _become(**request)
    _leave(_code_of(lambda: _run(*arguments)))
