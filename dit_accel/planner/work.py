"""The folder of a plan in the making: recorded runs, curves and verified errors, so that a stopped plan continues.

settings.json                  what all of it was made with; another model, size or list of prompts is refused
measured/, held-out/           recorded runs (`collect`); measured-<n>/ at further sizes
curves-<key>.safetensors       of one forward: what each candidate adds to the error, by layer; in the header the layers' layouts
times-<key>.json               measured costs of one list of candidates on one machine, device and number of threads
errors-<key>.json              of one assignment: its error on every held-out forward

Keys are digests of the settings too, so that nothing is reused with others after settings.json is deleted.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dit_accel.errors import PlanError
from dit_accel.files import check_folder, create_json, write_json, write_tensors
from dit_accel.method.checks import is_real
from dit_accel.planner.curves import Measured, Shape


def digest(value: Any) -> str:
    """The SHA-256 of something JSON-ready."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Work:
    """A folder that was made with these settings."""

    folder: Path
    settings: str  # their digest

    @classmethod
    def begin(cls, folder: Path, settings: dict[str, Any]) -> "Work":
        """The folder, new or continued. Raises PlanError where it was made with other settings, and ValueError where nothing can be
        written."""
        check_folder(folder)
        path, settings = folder / "settings.json", json.loads(json.dumps(settings))
        if not path.exists():
            create_json(path, settings)
        found = _read(path, lambda data: isinstance(data, dict))
        different = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if different:
            raise PlanError(f"{folder} contains the work on a plan with other {', '.join(different)}: name another folder")
        return cls(folder, digest(settings))

    def curves(self, key: Any, make: Callable[[], Measured]) -> Measured:
        """Of one forward: read, or made and kept."""
        path = self.folder / f"curves-{digest([self.settings, key])[:24]}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                shapes = json.loads((file.metadata() or {})["shapes"])
                return Measured({name: file.get_tensor(name) for name in shapes}, {name: Shape.read(own) for name, own in shapes.items()})
        except FileNotFoundError:
            pass
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise _damaged(path, error) from error
        made = make()
        write_tensors(path, made.curves, {"shapes": json.dumps({name: shape.plain() for name, shape in made.shapes.items()})})
        return made

    def json(self, kind: str, key: Any, make: Callable[[], Any], legal: Callable[[Any], bool]) -> Any:
        """The contents of a JSON file of one kind: read, or made and kept. `legal`: whether they are what `make` makes."""
        path = self.folder / f"{kind}-{digest([self.settings, key])[:24]}.json"
        if path.exists():
            return _read(path, legal)
        made = make()
        write_json(path, made)
        return made


def is_errors(data: Any, count: int) -> bool:
    """Whether it is a list of so many finite errors."""
    return isinstance(data, list) and len(data) == count and all(is_real(error) and error >= 0 for error in data)


def is_times(data: Any, layers: Sequence[str], count: int) -> bool:
    """Whether it has the times of these layers with so many candidates, in the form of `Costs.plain`."""

    def of_layer(own: Any) -> bool:
        return isinstance(own, list) and len(own) == 3 and is_errors(own[0], count) and is_errors(own[1], count) and is_errors(own[2:], 1)

    return isinstance(data, dict) and all(of_layer(data.get(layer)) for layer in layers)


def _read(path: Path, legal: Callable[[Any], bool]) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not legal(found):
        raise _damaged(path, "its contents are not those that were written")
    return found


def _damaged(path: Path, why: object) -> PlanError:
    return PlanError(f"{path} is damaged: delete it and run again ({why})")
