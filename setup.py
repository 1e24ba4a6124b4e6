"""The CPU kernels, which are told the fingerprint of their own sources; all else is in pyproject.toml.

Plain C functions behind ctypes: no torch headers. Where they do not compile, the package installs without them.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("dit_accel", "kernels", "cpu")  # in a checkout by the link, in a source distribution a folder
if not CPU.is_dir():
    sys.exit(
        "this checkout of dit_accel has text files in the place of its symbolic links (dit_accel/kernels and others): "
        "run `git config core.symlinks true` and `git checkout -- dit_accel`"
    )
fingerprint = runpy.run_path(str(CPU / "sources.py"))["fingerprint"](CPU)


class Library(build_ext):
    """A file that is named after no version of Python: nothing of Python is in it. As many compilers run at once as there are processors: a
    source is one instruction set's code, and takes half a minute."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **how: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for one in pool.map(lambda source: compile_in_turn([source], **how), sources) for made in one]

        self.compiler.compile = compile_at_once
        super().build_extension(ext)


commands: dict[str, type] = {"build_ext": Library}
try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError:  # of an environment's own, older setuptools, which compiles in a checkout (build_ext) and makes no wheel
    pass
else:

    class Wheel(bdist_wheel):
        """One wheel of a platform for all versions of Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    commands["bdist_wheel"] = Wheel

setup(
    cmdclass=commands,
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
    ],
)
