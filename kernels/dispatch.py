"""Which implementation runs a call. The eager reference is the only one so far; "auto" chooses it everywhere."""

from dit_accel.errors import BackendError

BACKENDS = ("auto", "reference")


def choose(backend: str) -> tuple[str, str]:
    """The implementation for a backend's name, and why. Raises BackendError at an unknown name."""
    if backend not in BACKENDS:
        raise BackendError(f"backend is one of {BACKENDS}, got {backend!r}")
    return "reference", "asked for" if backend == "reference" else "the only implementation so far"
