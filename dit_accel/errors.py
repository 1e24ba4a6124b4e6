"""The errors that a user can meet: each says what is wrong and what to do. One `except DitAccelError` catches them all.

Those that what was given can't be used are ValueErrors too; one that a disk refused is an OSError.
"""


class DitAccelError(Exception):
    """Base of the package's errors."""


class ArgumentError(DitAccelError, ValueError):
    """An argument of a function or an option of a command can't be used."""


class UnsupportedModelError(DitAccelError, ValueError):
    """The object contains no transformer of a supported family."""


class AlreadyAcceleratedError(DitAccelError, ValueError):
    """`accelerate` was called on something that is accelerated already."""


class NotAcceleratedError(DitAccelError, ValueError):
    """An operation that requires an accelerated pipeline was given another one."""


class BackendError(DitAccelError, ValueError):
    """The backend that was asked for can't run this call; the message says why."""


class FallbackError(DitAccelError, ValueError):
    """Under `strict=True`: a layer would have run its original attention; the message says why."""


class AdapterError(DitAccelError, ValueError):
    """An adapter on disk is damaged or belongs to another model."""


class DecodingError(DitAccelError, RuntimeError):
    """Another of the processes that share a picture could not decode its tiles; the message says which, and why."""


class StageError(DitAccelError, ValueError):
    """A finished stage of a high-resolution picture is damaged, or its folder belongs to other settings; the message says which."""


class DistillationError(DitAccelError, ValueError):
    """Distillation can't start or continue; the message says why."""


class PlanError(DitAccelError, ValueError):
    """A plan can't be made: the message says why, and which budget is reachable where the one asked for is not."""


class WriteError(DitAccelError, OSError):
    """A file can't be written: the disk is full, say, or the folder read-only. What was there before is there still."""
