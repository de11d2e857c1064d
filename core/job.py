"""What one process or a group of ranks is asked to do: plain data, which launchers carry as
JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """`do` says what kind of job it is. `root`: the folder of all runs, where it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: str
    root: Path | None = None

    def document(self) -> dict[str, Any]:
        """Plain JSON, from which `parse_job` makes this job again."""
        return self.model_dump(mode="json")
