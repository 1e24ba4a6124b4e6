"""The model card of an adapter: what it is, how to use it, what it was trained on and what was measured, all from its config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dit_accel.adapters.base_model import UNKNOWN, licence_of
from dit_accel.files import write_text
from dit_accel.method.assignment import Assignment

CARD = "README.md"
MARK = "<!-- written by dit_accel from the adapter's config; without this line, your own words stay -->"
PICTURES = (".png", ".jpg", ".gif")


def model_card(config: Mapping[str, Any], pictures: list[str], licence: str | None = None) -> str:
    """The card's text. `config`: the fields of an adapter's config; `pictures`: names of files next to it; `licence`: of the base model,
    unless its record or its name tells it."""
    assignment, name, record = Assignment.from_dict(config["assignment"]), config["base_model_name"], config["training"] or {}
    licence = str(record.get("licence") or licence or licence_of(name))
    on_hub = name.count("/") == 1 and not name.startswith((".", "/"))
    data = ModelCardData(
        base_model=name if on_hub else None,
        license=None if licence == UNKNOWN else licence,
        library_name="diffusers",
        tags=["dit_accel", "attention", "lora"] if "pytorch_lora_weights.safetensors" in config["files"] else ["dit_accel", "attention"],
    )
    base = f"`{name}`" if name else "A model without a name"
    under = "its licence unknown where this was saved" if licence == UNKNOWN else f"under the licence `{licence}`"
    shown = "".join(f"![{picture}]({picture})\n\n" for picture in pictures)
    rows = "".join(f"| {what} | {value} |\n" for what, value in _flat(record))
    title = str(assignment.spec or f"{len(assignment.specs)} methods by layer, head, step or size")
    rules = "" if assignment.spec and not assignment.dense_steps else f"## Which method where\n\n{_rules(assignment)}\n"
    training = f"| | |\n| --- | --- |\n{rows}" if rows else "Nothing was trained: the method's own start values.\n"
    return f"""---
{data.to_yaml()}
---
{MARK}

# {title}

An adapter of dit_accel for a {config["base_model_class"]}: it replaces the self-attention of
{len(config["layers"])} layers by a sparse one and contains what a distillation from the original attention learned.

```python
import dit_accel
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name or "the base model"}")
dit_accel.load_adapter(pipe, "this repository's owner/name")
```

{shown}{rules}## Base model and licence

{base}, {under}, weights with SHA-256 `{config["base_model_hash"][:16]}`.
What is learned here derives from them: the base model's licence applies.

## Training and what was measured

{training}"""


def _rules(assignment: Assignment) -> str:
    """The rules as a list, in which the last that fits wins."""
    rules = "".join(f"- `{rule}`\n" for rule in assignment.rules)
    return f"{rules}\nThe last line that fits a layer, head, step and size applies; where none does, the original attention runs.\n"


def _flat(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a nested record, in words."""
    for key, value in record.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def write_card(folder: Path, config: Mapping[str, Any], licence: str | None = None) -> None:
    """Write or renew the card in an adapter's folder; one that a person made their own stays as it is. Raises OSError."""
    path = folder / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return
    pictures = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    write_text(path, model_card(config, pictures, licence))
