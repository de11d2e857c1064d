"""Where a run can be watched besides its own files: TensorBoard, and if the recipe names them
Weights & Biases and MLflow (the extras `wandb` and `mlflow`). Used by rank 0 alone.

Nothing is sent anywhere unless the user has asked for it in the way of the tool itself: W&B writes
offline runs below the stage's folder until WANDB_MODE=online is set, MLflow a folder `mlruns` there
until MLFLOW_TRACKING_URI names a server. A tracker that fails is reported once and dropped: no
training ends because of it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segfleet.core.errors import InputError

TENSORBOARD = "tensorboard"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "segfleet"


class Tracker(Protocol):
    """What a tracker gets of one stage. Steps may go back by a resume."""

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, pixels_YXC: np.ndarray, step: int) -> None: ...

    def outcome(self, settings: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """What the run was, flat, and what it came to; again replaces."""

    def close(self) -> None: ...


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises InputError where the package of a tracker is not installed."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"trackers: {name} is not installed: pip install 'segfleet[{name}]', or leave it "
                "out"
            )


def open_trackers(
    names: tuple[str, ...], folder: Path, title: str, warn: Callable[[str], Any], step: int = 0
) -> Trackers:
    """The trackers of the stage in `folder`, opened at a step. Nothing is imported before there is
    something to say."""
    makers = {
        TENSORBOARD: lambda: TensorBoard(folder, step),
        "wandb": lambda: Wandb(folder, title),
        "mlflow": lambda: MLflow(folder, title),
    }
    return Trackers({name: makers[name] for name in names}, warn)


class Trackers:
    """Several as one; one that fails is left out from then on."""

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], Any]):
        self._makers, self._open, self._warn = dict(makers), {}, warn

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.numbers(values, step))

    def picture(self, name: str, pixels_YXC: np.ndarray, step: int) -> None:
        self._each(lambda tracker: tracker.picture(name, pixels_YXC, step))

    def outcome(self, settings: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.outcome(settings, scores, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close(), tuple(self._open))
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None], names: tuple[str, ...] | None = None) -> None:
        for name in tuple(self._makers) if names is None else names:
            try:
                if name not in self._open:
                    self._open[name] = self._makers[name]()
                call(self._open[name])
            except Exception as error:  # whatever such a tool may raise: a full disk, no network
                self._makers.pop(name, None)
                self._open.pop(name, None)
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._warn(f"{name} failed and is left out: {first}")


class TensorBoard:
    """tensorboard/ in the stage's folder; what it came to in tensorboard/final, a run of its own
    there, as hyperparameters need one."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._final = folder / TENSORBOARD / "final"
        self._writer = lambda: SummaryWriter(
            str(folder / TENSORBOARD),
            purge_step=step + 1,
            flush_secs=30,
            # the name has the second alone: a writer of the same second would empty the file
            filename_suffix=f".{time.monotonic_ns():020d}",
        )
        self._board: Any = None

    @property
    def board(self) -> Any:
        if self._board is None:
            self._board = self._writer()
        return self._board

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, name: str, pixels_YXC: np.ndarray, step: int) -> None:
        self.board.add_image(name, pixels_YXC, step, dataformats="HWC")

    def outcome(self, settings: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        shutil.rmtree(self._final, ignore_errors=True)
        with SummaryWriter(str(self._final)) as board:
            for summary in hparams(dict(settings), dict(scores)):
                board.file_writer.add_summary(summary)
            for name, value in scores.items():
                board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Wandb:
    """One run of Weights & Biases for a stage, by its uid."""

    def __init__(self, folder: Path, title: str):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        while list(folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-*")):
            time.sleep(0.1)  # its folders are named by the second
        self._picture = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=folder.name,
            name=f"{title} {folder.name[:8]}",
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own may not go back

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, pixels_YXC: np.ndarray, step: int) -> None:
        self._run.log({name: self._picture(pixels_YXC), "step": step})

    def outcome(self, settings: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.summary.update(dict(scores))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One run of MLflow for a stage, known by the tag segfleet.uid."""

    def __init__(self, folder: Path, title: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=where)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        own = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"segfleet.uid": folder.name, "mlflow.runName": f"{title} {folder.name[:8]}"}
        runs = self._client.search_runs(
            [own], f"tags.`segfleet.uid` = '{folder.name}'", max_results=1
        )
        self._id = (runs[0] if runs else self._client.create_run(own, tags=tags)).info.run_id

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain(k), float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, pixels_YXC: np.ndarray, step: int) -> None:
        self._client.log_image(self._id, pixels_YXC, key=_plain(name), step=step)

    def outcome(self, settings: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        logged = self._client.get_run(self._id).data.params  # which MLflow never changes
        new = {k: str(v) for k, v in settings.items() if k not in logged}
        params = [self._param(key, value[:500]) for key, value in new.items()]
        for first in range(0, len(params), 100):  # of a request, MLflow's own limit
            self._client.log_batch(self._id, params=params[first : first + 100])
        self.numbers(scores, step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _plain(name: str) -> str:
    """MLflow takes letters, digits and _-./ and blanks."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)


def flat(document: Any, before: str = "") -> dict[str, Any]:
    """{"a": [{"b": 1}]} -> {"a.0.b": 1}; what is neither number nor text stands as JSON."""
    if isinstance(document, list) and any(isinstance(item, dict) for item in document):
        document = {str(number): item for number, item in enumerate(document)}
    if not isinstance(document, dict):
        plain = isinstance(document, bool | int | float | str)
        return {before: document if plain else json.dumps(document)}
    flattened: dict[str, Any] = {}
    for key, value in document.items():
        flattened |= flat(value, f"{before}.{key}" if before else key)
    return flattened
