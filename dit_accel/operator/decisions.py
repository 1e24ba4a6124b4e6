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

VARIABLE = "DIT_ACCEL_GUARD"  # "off": nothing is measured and nothing read; "on", as without it
FORMAT = 1
WAIT = 60.0  # seconds to wait for another process that is measuring
Question = dict[str, Any]  # all that a decision depends on, ready for JSON
Seconds = tuple[float, ...]  # of what was compared
NAMES = ("accelerated", "original")  # of the method, of the original attention


def enabled() -> bool:
    """Whether the environment lets anything be measured. Raises ValueError where it is neither on nor off."""
    setting = os.environ.get(VARIABLE, "on")
    if setting not in ("on", "off"):
        raise ValueError(f"the environment variable {VARIABLE} must be 'on' or 'off', not {setting!r}")
    return setting == "on"


def cpu_name() -> str:
    """The processor's name; Python itself knows it on some systems only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def folder(kind: str = "guard") -> Path | None:
    """dit_accel/`kind` in XDG_CACHE_HOME or, where that is no absolute path, in ~/.cache; None where the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    return Path(cache) / "dit_accel" / kind if os.path.isabs(cache) else None


def decided(
    question: Question, measure: Callable[[], Seconds], *, kind: str = "guard", names: tuple[str, ...] = NAMES
) -> tuple[Seconds, Path | None]:
    """The times, by `names`, that were measured first for a question, by this process or another, and the file in `folder` that keeps them.

    None in place of the file where none can be written: then the times are for this process alone.
    """
    place = folder(kind)
    if place is None:
        return measure(), None
    path = place / f"{hashlib.sha256(_text(question).encode()).hexdigest()[:32]}.json"
    found = read(path, question, names)
    if found is not None:
        return found, path
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    with _exclusively(place):  # whoever waited finds what the first one measured, and no two processes measure at once
        found = read(path, question, names)
        if found is not None:
            return found, path
        made = measure()
        kept = _keep(path, question, made, names)
    return (made, None) if kept is None else (kept, path)


def read(path: Path, question: Question, names: tuple[str, ...] = NAMES) -> Seconds | None:
    """The times in a file; None where there is none, or where it is damaged or answers another question."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.keys() != {"format", "question", *names} or data["format"] != FORMAT:
        return None
    times = tuple(data[name] for name in names)
    if data["question"] != json.loads(_text(question)) or not all(type(x) is float and 0 < x < math.inf for x in times):
        return None
    return times


def _text(question: Question) -> str:
    return json.dumps(question, sort_keys=True)


def _keep(path: Path, question: Question, times: Seconds, names: tuple[str, ...]) -> Seconds | None:
    """Write the file unless another process was first, and read what it then contains; None where it can't be written."""
    try:
        if read(path, question, names) is None:
            path.unlink(missing_ok=True)  # it is damaged
        create_json(path, {"format": FORMAT, "question": question, **dict(zip(names, times, strict=True))})
    except (OSError, WriteError):
        return None
    return read(path, question, names)


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
