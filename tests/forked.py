"""Processes that are forked from one server, which imports PyTorch, diffusers and this package once for all of them."""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
TESTS = Path(__file__).parent


def prepare() -> None:
    """Start the server, unless it runs: it finds these tests and imports what they use."""
    SERVER.set_forkserver_preload(["distill_fixtures", "hires_fixtures", "dit_accel.finetune.data.pictures"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()


def _run(code: str, arguments: list[str], environment: dict[str, str], errors: str) -> None:
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
    except KeyboardInterrupt:  # end by the signal, as a program of its own does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def start(code: str, folder: Path, environment: dict[str, str], errors: Path, *arguments: str) -> BaseProcess:
    """Run a program as `python -c code folder arguments` does, its stderr in a file."""
    prepare()
    process = SERVER.Process(target=_run, args=(code, [str(folder), *arguments], os.environ | environment, str(errors)))
    process.start()
    return process
