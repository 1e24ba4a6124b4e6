"""Which calls of the attention primitive are accelerated: those of a forward's image self-attention, by their lengths and mask."""

from dit_accel.patch import masks
from dit_accel.patch.forward import Forward


def route(forward: Forward, image_only: bool, q_len: int, kv_len: int, mask: object, special: str | None) -> tuple[bool, str | None]:
    """Whether a call within a forward is accelerated, and if it should be but can't, why.

    `image_only`: the module sees the drawn image only. `q_len`, `kv_len`: tokens of the call's queries and keys. `special`: why the
    call can't be accelerated whatever its shapes.
    """
    if not forward.active:
        return False, None
    _, image, text = forward.images(image_only, kv_len)
    if kv_len == image and text:  # an IP-Adapter's call, with as many keys as the image has tokens
        return False, None
    if forward.family.keys_only:
        if q_len == kv_len and text:  # the text's own
            return False, None
    elif q_len != kv_len:  # cross-attention, unless the sequence is complete and more keys come with it
        cached = text is not None and q_len == image + text < kv_len
        return False, "more keys than the sequence has tokens, as of a cache" if cached else None
    special = special or masks.refusal(mask, forward.family.mask, kv_len, kv_len - image)
    fits = kv_len >= image + forward.history if text is None else kv_len == image + text
    if special is None and fits and q_len == kv_len - _absent(forward, kv_len - image):
        return True, None
    return False, special or f"a sequence of {kv_len} tokens where the grid makes {image} and the text {text or 'any number'}"


def _absent(forward: Forward, text: int) -> int:
    """How many of the tokens in addition to the image have keys but no queries."""
    return (forward.history or text) if forward.family.keys_only else 0
