"""Writing files so that a reader never sees half of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary name beside `path`, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write safetensors to a temporary name beside `path`, then rename. Tensors are written as they are, from any device."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
    return temporary.replace(path)


def replace_folder(path: Path, files: Mapping[str, Any]) -> None:
    """Write a folder of safetensors (a mapping of tensors) and JSON files beside `path`, then put it in place."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    for name, content in files.items():
        (write_tensors if name.endswith(".safetensors") else write_json)(temporary / name, content)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)
