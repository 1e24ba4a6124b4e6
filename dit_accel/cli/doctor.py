"""`dit-accel doctor`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from dit_accel import files
from dit_accel.errors import ArgumentError

EPILOG = "Example: dit-accel doctor --json doctor.json"


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="One size for each method, two methods compiled, no times: less than a minute on two cores.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="Compile the GPU kernels for sm_80, sm_90, sm_100, sm_120 or gfx942.", show_default="the card's"),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found here, for a bug report: without paths, user or machine names.")
    ] = None,
) -> None:
    """Check what is installed here: versions, kernels, every method against the reference. Exit code 1 where something is wrong."""
    if report_file is not None:
        if report_file.is_dir():
            raise ArgumentError(f"--json must name a file, not the folder {report_file}")
        files.check_folder(report_file.parent)
    from dit_accel.console import console
    from dit_accel.measure.doctor import examine

    report = examine(arch, quick=quick)
    report.show(console())
    if report_file is not None:
        report.write(report_file)
        typer.echo(f"wrote {report_file}")
    if report.faults:
        raise typer.Exit(1)
