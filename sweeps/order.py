"""What a trial is handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from segfleet.pipeline.launch.job import Train


class Order(BaseModel):
    """What a trial needs to train one node of the tree. Ray carries it as JSON."""

    model_config = ConfigDict(frozen=True)

    job: Train  # what the ranks do
    node: str  # its uid
    path: Path  # its folder
    sweep: Path  # the sweep's folder
    begin: int  # epochs along the path before it
    steps: int  # optimizer steps of an epoch
    start: int = 0  # epoch of the stage where a trunk ended
    trunk: Path | None = None  # its folder
    pause: int | None = None  # epochs along the path after which it pauses; job.pause_at: the step
    measure: str = "dice"  # key of a validation that counts: dice or dice_<structure>
    ranks: int = 1
    threads: int = 1
    on: str = "local"  # which back end
    options: dict[str, Any] = {}  # the back end's own

    def of_job(self, **changes: Any) -> Order:
        """The same with other fields of the job."""
        return self.model_copy(update={"job": self.job.model_copy(update=changes)})
