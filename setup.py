"""The CPU kernels, which are told the fingerprint of their own sources; all else is in pyproject.toml.

Plain C functions behind ctypes: no torch headers. Where they do not compile, the package installs without them.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

CPU = Path("kernels", "cpu")
fingerprint = runpy.run_path(str(CPU / "sources.py"))["fingerprint"](CPU)

setup(
    ext_modules=[
        Extension(
            "dit_accel.kernels.cpu._native",
            sources=sorted(str(file) for file in CPU.glob("*.cpp")),
            depends=sorted(str(file) for file in CPU.glob("*.h")),
            define_macros=[("DIT_ACCEL_SOURCES", f'"{fingerprint}"')],
            extra_compile_args=["-std=c++17", "-O3", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
