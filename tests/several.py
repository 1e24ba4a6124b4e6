"""Checks in the processes of a launch: what each of them found, and that one that is lost ends the others."""

import json
import socket
from pathlib import Path
from typing import Any

from forked import start
from test_distill_processes import launch

CHILD = """
import sys
from pathlib import Path
import {module}
from parallel_checks import run_all
run_all(Path(sys.argv[1]), {names})
"""


def found(folder: Path, count: int, names: list[str], module: str = "parallel_checks") -> list[dict[str, Any]]:
    """What each of so many processes found, by a module's checks."""
    launch(folder, count, CHILD.format(module=module, names=names))
    results = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]
    for result in results:
        failed = [value for value in result.values() if isinstance(value, str)]
        assert failed == [], failed[0]
        assert list(result) == names
    return results


def assert_one_lost_ends_the_other(program: str, how: str, folder: Path) -> None:
    """Of two processes that run a program, given the folder and how the second is lost, the first ends with an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [start(program, folder, shared | {"RANK": str(rank)}, folder / f"stderr-{rank}", how) for rank in (0, 1)]
    try:
        children[0].join(120)
        assert children[0].exitcode == 1, (folder / "stderr-0").read_text()[-3000:]
        assert (folder / "error").read_text()
    finally:
        for child in children:
            child.kill()
