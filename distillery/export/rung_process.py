"""The process that builds one rung of a ladder, `python -m distillery.export.rung_process JOB
RESULT PARENT`; `ladder.climb` starts it.

JOB holds a BuildingJob, RESULT a Built. The process is the rung's own, so that a form which takes
more memory or time than there is stops nothing else.
"""

import sys
from pathlib import Path

from distillery.export.build import export
from distillery.processes import process_main
from distillery.progress import ShowProgress
from distillery.recipe import ExportForm
from distillery.records import Record


class BuildingJob(Record):
    """A Transformers folder, with an adapter or without, and the folder that its form goes to."""

    model: str
    adapter: str | None
    remote_code: bool
    form: ExportForm
    calibration: str | None
    out: str


class Built(Record):
    """`bytes` of all files in the folder."""

    bytes: int


def build(job: BuildingJob, progress: ShowProgress) -> Built:
    """Build the form and return its size."""
    out = Path(job.out)
    adapter = Path(job.adapter) if job.adapter else None
    calibration = Path(job.calibration) if job.calibration else None
    export(Path(job.model), adapter, job.form, out, job.remote_code, calibration, progress)
    return Built(bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))


if __name__ == "__main__":
    sys.exit(process_main(sys.argv[1:], BuildingJob, build))
