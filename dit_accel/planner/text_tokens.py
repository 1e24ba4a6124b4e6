"""What the text's tokens in a sequence are called, where that is certain."""

import inspect
from typing import Any

LENGTH = "max_sequence_length"


def labels_of_text(pipe: Any, prompt: str, count: int, call: dict[str, Any]) -> list[str] | None:
    """The pieces of the prompt that a sequence's `count` text tokens are, as its tokenizer cuts it, padding included.

    None where that is not certain: unless one text encoder alone has the width of the transformer's text states and the sequence has as
    many tokens as the call asks of it, other text may be among them.
    """
    asked = call.get(LENGTH)
    if asked is None:
        parameter = inspect.signature(type(pipe).__call__).parameters.get(LENGTH)
        asked = None if parameter is None else parameter.default
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    width = config.get("joint_attention_dim")
    if not count or asked != count or width is None:
        return None
    parts = getattr(pipe, "components", {})
    tokenizers = [
        parts.get(name.replace("text_encoder", "tokenizer"))
        for name, part in parts.items()
        if name.startswith("text_encoder") and _width(part) == width
    ]
    if len(tokenizers) != 1 or tokenizers[0] is None:
        return None
    tokens = tokenizers[0](prompt, padding="max_length", max_length=count, truncation=True).input_ids
    return [str(piece) for piece in tokenizers[0].convert_ids_to_tokens(tokens)] if len(tokens) == count else None


def _width(encoder: Any) -> int | None:
    config = getattr(encoder, "config", None)
    return getattr(config, "d_model", getattr(config, "hidden_size", None))
