"""Every error that a user can meet beyond a plain ValueError for one bad argument; each says what was wanted and what came."""


class DitAccelError(ValueError):
    """Base of the package's errors, so that one `except` can catch them all."""


class UnsupportedModelError(DitAccelError):
    """The object holds no transformer of a supported family."""


class AlreadyAcceleratedError(DitAccelError):
    """`accelerate` was called on something that is accelerated already."""


class NotAcceleratedError(DitAccelError):
    """An operation that needs an accelerated pipeline got another one."""


class BackendError(DitAccelError):
    """The backend that was asked for can't run this call; the message says why."""


class FallbackError(DitAccelError):
    """Under `strict=True`: a layer would have run its original attention; the message says why."""


class AdapterError(DitAccelError):
    """An adapter on disk is damaged or belongs to another model."""


class StageError(DitAccelError):
    """A finished stage of a high-resolution picture is damaged, or its folder belongs to other settings; the message says which."""


class DistillationError(DitAccelError):
    """Distillation can't start or continue; the message says why."""


class WriteError(DitAccelError):
    """A file can't be written: the disk is full, say, or the folder read-only. What was there before is there still."""
