"""The folder of a run: its configuration, the versions that computed it, its metrics, and the rule
for continuing it.

``runs/<name>/`` holds .config, config.json, versions.json, metrics.jsonl, loss.png, checkpoint/,
steps/<step>/ where every checkpoint is kept, and the hints; the benchmark and the report add
theirs. One process at a time trains in it.
"""

import fcntl
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from lib.config import Config
from lib.errors import InputError
from lib.files import check_writable, write_json, write_text
from lib.hints import load_hints

ROOT = Path(__file__).resolve().parent.parent
_ANY_TIME = {
    "train.eval_every",
    "train.eval_sequences",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.compile",
    "train.parallel",
    "data.cache_dir",
}
"""Settings that may change between the parts of one run: they don't change what is learned
(beyond rounding).
"""

_OWN_FILES = (
    ".config",
    ".lock",
    "config.json",
    "versions.json",
    "metrics.jsonl",
    "loss.png",
    "fisher_diag.safetensors",
    "report.html",
)
_HINT_FIELDS = (
    "generate_json",
    "signal",
    "fisher_labels",
    "fisher_sequences",
    "attention_sequences",
    "hbm_threshold",
    "cpu_threshold",
    "json_output",
)


class RunDirectory:
    """Paths and small files of a run. Only the main process opens it for writing."""

    def __init__(self, config: Config) -> None:
        self.path = config.run.directory
        self.checkpoint = self.path / "checkpoint"
        self.steps = self.path / "steps"
        self.metrics_path = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.fisher_diagonal = self.path / "fisher_diag.safetensors"
        self.hints = config.hints_path
        self._config = config
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    def open(self) -> None:
        """Make the folder and lock it; raises InputError if it can't be written or another
        process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(
                f"run folder {self.path} can't be written ({error.strerror}): give a writable "
                "RUN_OUTPUT_DIR"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process trains in {self.path}: wait for it, or give this run another "
                "RUN_NAME"
            ) from error

    def close(self) -> None:
        """Close the metrics and give the lock back."""
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._lock = None

    def earlier_config(self) -> dict[str, Any]:
        """Return the config.json that is there, {} if none is."""
        path = self.path / "config.json"
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} can't be read ({error}): delete {self.path} to train again, or choose "
                "another RUN_NAME"
            ) from error
        return dict(document)

    def check_hints_path(self) -> None:
        """Refuse, before the training, a hints file that the run would write over, or that can't
        be written.
        """
        hints, folder = self.hints.resolve(), self.path.resolve()
        taken = {folder / name for name in _OWN_FILES}
        inside = any(
            hints.is_relative_to(folder / path.name) for path in (self.checkpoint, self.steps)
        )
        if hints in taken or inside:
            raise InputError(
                f"TIERING_JSON_OUTPUT puts the hints at {self.hints}, which the run itself writes: "
                "give another name, such as tier_hints.json"
            )
        check_writable(self.hints)

    def check_same_training(self) -> None:
        """Refuse to continue a run whose settings were others; raises InputError naming the
        first that differs.
        """
        earlier = training_settings(self.earlier_config())
        for name, value in training_settings(asdict(self._config)).items():
            if earlier.get(name) != value:  # what an older run didn't know is off, None, in both
                raise InputError(
                    f"{self.path} holds a run with {name}={earlier.get(name)!r}, now it is "
                    f"{value!r}: choose another RUN_NAME, restore the setting, or delete "
                    f"{self.path}"
                )

    def hints_are_current(self) -> bool:
        """Say whether the hints file is there and was asked for with the same settings."""
        earlier = self.earlier_config().get("tiering", {})
        now = asdict(self._config.tiering)
        if any(earlier.get(field) != now[field] for field in _HINT_FIELDS):
            return False
        try:
            load_hints(self.hints)
        except InputError:  # missing or damaged: they are made again
            return False
        return True

    def write_config(self, config_path: Path) -> None:
        """Write .config and config.json."""
        copy = self.path / ".config"
        if not copy.exists() or not copy.samefile(config_path):
            shutil.copyfile(config_path, copy)
        write_json(asdict(self._config), self.path / "config.json")

    def write_versions(self) -> None:
        """Write versions.json, of what trains now."""
        write_json(collect_versions(), self.path / "versions.json")

    def start_metrics(self, step: int) -> None:
        """Open metrics.jsonl for lines after ``step``; lines of steps that will be taken again
        are dropped.
        """
        kept = []
        if step and self.metrics_path.exists():
            for line in self.metrics_path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash
        write_text("".join(f"{line}\n" for line in kept), self.metrics_path)
        self._metrics = self.metrics_path.open("a")

    def write_metrics(self, **values: float) -> None:
        """Append one line."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(values, allow_nan=False) + "\n")
            self._metrics.flush()

    def discard_results(self) -> None:
        """Remove the hints and plots of a run that is trained anew, so that they can't be taken
        for the new one's.
        """
        inside = self.hints.resolve().is_relative_to(self.path.resolve())
        own_hints = [self.hints] if inside else []  # elsewhere they may be another run's
        for path in (*own_hints, self.loss_plot, self.fisher_diagonal):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.steps, ignore_errors=True)


def training_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, as ``group.name`` -> value, that decide what a run learns."""
    settings = {
        f"{group}.{name}": value
        for group in ("model", "data", "train")
        for name, value in config.get(group, {}).items()
    }
    settings["run.seed"] = config.get("run", {}).get("seed")
    return {name: value for name, value in settings.items() if name not in _ANY_TIME}


def collect_versions() -> dict[str, Any]:
    """Return what computed a run: interpreter, libraries, device and the revision of this
    repository.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "torch": str(torch.__version__),  # with the build, which PyPI's metadata lacks
        **{
            name: version(name)
            for name in ("transformers", "tokenizers", "datasets", "safetensors", "numpy")
        },
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    """Ask git about this repository; None outside one."""
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
