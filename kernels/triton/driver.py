"""The graphics driver's version. Needs torch alone, so that it can be asked where Triton is missing."""

import functools
import re
from pathlib import Path

import torch

NVIDIA = Path("/proc/driver/nvidia/version")
AMD = Path("/sys/module/amdgpu/version")
_KERNEL_MODULE = re.compile(r"Kernel Module\D.*?\s(\d+\.\d+(?:\.\d+)*)\s")


@functools.cache
def version() -> str:
    """As the kernel module reports it ("580.65.06"); without one (Windows, WSL) the newest CUDA or ROCm version that it serves."""
    if torch.version.hip:
        return _read(AMD).strip() or f"ROCm {torch.version.hip}"
    if found := _KERNEL_MODULE.search(_read(NVIDIA)):
        return found[1]
    served = torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else 0  # type: ignore[attr-defined]
    return f"CUDA {served // 1000}.{served % 1000 // 10}" if served else "none"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
