"""Services that show the metrics of a run: TensorBoard, Weights & Biases."""

import dataclasses
import pathlib
import re
import secrets
import time
from typing import Any

from train.config.run_config import RunConfig
from train.system import console, files

WANDB_ID_FILE = "wandb-id.txt"


class _TensorBoard:
    """TensorBoard events in the run's directory, written synchronously.

    The writer of tensorboardX uses a thread, which dies on a full disk; the program
    then waits for it forever.
    """

    def __init__(self, config: RunConfig, last_step: int):
        # Slow to import, and optional.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._directory = config.output_dir / "tensorboard"
        with files.errors_name(self._directory):
            self._directory.mkdir(exist_ok=True)
            # The suffix avoids the file of an earlier process in the same second.
            self._writer = event_file_writer.EventsWriter(
                str(self._directory / "events"), f".{last_step}"
            )
        # A session start hides later steps of an earlier process.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(last_step + 1, session_log=start)
        self._flush()

    def write(self, step: int, row: dict[str, Any]) -> None:
        numbers = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        self._write(step, summary=self._summary(value=numbers))
        if time.monotonic() > self._flushed + 10:
            self._flush()

    def close(self) -> None:
        with files.errors_name(self._directory):
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        with files.errors_name(self._directory):
            self._writer.write_event(event)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        with files.errors_name(self._directory):
            self._writer.flush()


class _WeightsAndBiases:
    """Run of Weights & Biases, resumed by the id in the run's directory."""

    def __init__(self, config: RunConfig, last_step: int):
        import wandb  # optional package

        run_id = _wandb_id(config.output_dir, last_step)
        try:
            self._run = wandb.init(
                project=config.report.wandb_project,
                id=run_id,
                resume="allow",
                allow_val_change=True,  # settings may change at a resume
                name=config.output_dir.name,
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:  # not logged in, or no network
            raise OSError(f"--wandb: {error}") from error

    def write(self, step: int, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(directory: pathlib.Path, last_step: int) -> str:
    """Reads the run's id from its directory, or writes a new one."""
    path = directory / WANDB_ID_FILE
    if not path.exists():
        if last_step > 0:
            console.warn(
                f"{directory} has no {WANDB_ID_FILE}: the steps after {last_step:,} go "
                "to a new run of Weights & Biases"
            )
        files.write_whole(path, secrets.token_hex(8))
    run_id = path.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", run_id):
        raise OSError(
            f"{path} holds no id of a run of Weights & Biases: delete it to report to "
            "a new one, or write the id into it"
        )
    return run_id


def check_packages(config: RunConfig) -> None:
    """Raises a ValueError if the config requires a package that is missing."""
    if not config.report.wandb:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--wandb needs the package wandb: pip install -e '.[wandb]'"
        ) from error


def open_services(config: RunConfig, last_step: int) -> list[Any]:
    """The services that the config chooses, each with `write` and `close`."""
    chosen = [
        (config.report.tensorboard, _TensorBoard),
        (config.report.wandb, _WeightsAndBiases),
    ]
    return [service(config, last_step) for is_on, service in chosen if is_on]
