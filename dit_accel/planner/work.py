"""The folder of a plan in the making: recorded runs, curves and verified errors, so that a stopped plan continues.

settings.json                  what all of it was made with; another model, size or list of prompts is refused
measured/, held-out/           recorded runs (`collect`); measured-<n>/ at further sizes
curves-<key>.safetensors       of one forward: what each candidate adds to the error, by layer; in the header the layers' layouts
times.json                     measured costs
errors-<key>.json              of one assignment: its error on every held-out forward
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dit_accel.errors import PlanError
from dit_accel.files import check_folder, create_json, write_json, write_tensors
from dit_accel.planner.curves import Measured, Shape


def digest(value: Any) -> str:
    """The SHA-256 of something JSON-ready."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Work:
    """A folder that was made with these settings."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path, settings: dict[str, Any]) -> "Work":
        """The folder, new or continued. Raises PlanError where it was made with other settings, and ValueError where nothing can be
        written."""
        check_folder(folder)
        path, settings = folder / "settings.json", json.loads(json.dumps(settings))
        create_json(path, settings) if not path.exists() else None
        found = json.loads(path.read_text())
        different = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if different:
            raise PlanError(f"{folder} contains the work on a plan with other {', '.join(different)}: name another folder")
        return cls(folder)

    def curves(self, key: Any, make: Callable[[], Measured]) -> Measured:
        """Of one forward: read, or made and kept."""
        path = self.folder / f"curves-{digest(key)[:24]}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                shapes = json.loads((file.metadata() or {})["shapes"])
                return Measured({name: file.get_tensor(name) for name in shapes}, {name: Shape.read(own) for name, own in shapes.items()})
        except FileNotFoundError:
            pass
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise PlanError(f"{path} is damaged: {error}; delete it, and it is made again") from error
        made = make()
        write_tensors(path, made.curves, {"shapes": json.dumps({name: shape.plain() for name, shape in made.shapes.items()})})
        return made

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """The contents of a JSON file: read, or made and kept."""
        path = self.folder / name
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise PlanError(f"{path} is damaged: {error}; delete it, and it is made again") from error
        made = make()
        write_json(path, made)
        return made
