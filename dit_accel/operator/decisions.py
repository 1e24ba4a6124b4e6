"""Decisions of this machine, made once for all processes: a small JSON file for each question, in the user's cache folder."""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dit_accel.errors import WriteError
from dit_accel.files import create_json

FORMAT = 1
WAIT = 60.0  # seconds to wait for another process that is measuring
Question = dict[str, Any]  # all that a decision depends on, ready for JSON
Seconds = tuple[float, float]  # of the method, of the original attention


def cpu_name() -> str:
    """The processor's name; Python itself knows it on some systems only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def folder() -> Path | None:
    """dit_accel/guard in XDG_CACHE_HOME or, where that is no absolute path, in ~/.cache; None where the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    return Path(cache) / "dit_accel" / "guard" if os.path.isabs(cache) else None


def decided(question: Question, measure: Callable[[], Seconds]) -> tuple[Seconds, Path | None]:
    """The times that were measured first for a question, by this process or another, and the file that keeps them.

    None in place of the file where none can be written: then the times are for this process alone.
    """
    place = folder()
    if place is None:
        return measure(), None
    path = place / f"{hashlib.sha256(_text(question).encode()).hexdigest()[:32]}.json"
    found = read(path, question)
    if found is not None:
        return found, path
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    with _exclusively(place):  # whoever waited finds what the first one measured, and no two processes measure at once
        found = read(path, question)
        if found is not None:
            return found, path
        made = measure()
        kept = _keep(path, question, made)
    return (made, None) if kept is None else (kept, path)


def read(path: Path, question: Question) -> Seconds | None:
    """The times in a file; None where there is none, or where it is damaged or answers another question."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.keys() != {"format", "question", "accelerated", "original"} or data["format"] != FORMAT:
        return None
    times = data["accelerated"], data["original"]
    if data["question"] != json.loads(_text(question)) or not all(type(x) is float and 0 < x < math.inf for x in times):
        return None
    return times


def _text(question: Question) -> str:
    return json.dumps(question, sort_keys=True)


def _keep(path: Path, question: Question, times: Seconds) -> Seconds | None:
    """Write the file unless another process was first, and read what it then contains; None where it can't be written."""
    try:
        if read(path, question) is None:
            path.unlink(missing_ok=True)  # it is damaged
        create_json(path, {"format": FORMAT, "question": question, "accelerated": times[0], "original": times[1]})
    except (OSError, WriteError):
        return None
    return read(path, question)


@contextlib.contextmanager
def _exclusively(place: Path) -> Iterator[None]:
    """One process or thread at a time; not where the file system has no locks, nor after `WAIT`: the file is still made once."""
    try:
        import fcntl  # Windows has none

        file = (place / ".lock").open("a")
    except (ImportError, OSError):
        yield
        return
    with file:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
