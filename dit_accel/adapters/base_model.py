"""Name and licence of a pipeline's weights, as far as this machine knows them: the hub is not asked."""

import re
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
CARD, PIPELINE = "README.md", "model_index.json"
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+")  # where the hub's cache keeps owner/name

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


def base_model_name(pipe_or_transformer: Any, transformer: Any) -> str:
    """The hub id or folder that a pipeline was loaded from, or its transformer where that was passed; empty where it was made here."""
    for loaded in (pipe_or_transformer, transformer):
        name = str(getattr(loaded, "config", {}).get("_name_or_path") or "")
        if name:
            cached = SNAPSHOT.search(name)
            return f"{cached[1]}/{cached[2]}" if cached else name
    return ""


def public_name(name: str) -> str:
    """The name that may be published: the hub id itself, or the last part of a local folder's path, the pipeline's where it is one of its
    parts'."""
    folder = Path(name)
    local = folder.is_dir() or not HUB_ID.fullmatch(name) or name.startswith(".")
    if not local:
        return name
    if not (folder / PIPELINE).exists() and (folder.parent / PIPELINE).exists():
        folder = folder.parent
    return re.split(r"[/\\]", str(folder).rstrip("/\\"))[-1].lstrip(".") if name else ""


def licence_of(name: str) -> str:
    """The licence that the model card of a hub id or a folder names, by the copy on this machine; "unknown" where none tells it."""
    import yaml  # type: ignore[import-untyped]  # huggingface_hub reads cards with it
    from huggingface_hub import metadata_load

    card = _card(name)
    if card is None:
        return UNKNOWN
    try:
        data = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card that can't be read tells nothing
        return UNKNOWN
    return str(data.get("license_name") or data.get("license") or UNKNOWN)


def _card(name: str) -> Path | None:
    """The model card of a pipeline's folder, of the pipeline that a part's folder belongs to, or of a hub id in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(name)
    if name and folder.is_dir():
        if not (folder / PIPELINE).exists() and (folder.parent / PIPELINE).exists():
            folder = folder.parent
        return folder / CARD if (folder / CARD).is_file() else None
    try:
        cached = try_to_load_from_cache(name, CARD)
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(cached) if isinstance(cached, str) else None
