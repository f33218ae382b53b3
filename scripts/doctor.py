"""What `tierhints doctor` says, and what only a checkout has: its pinned packages, its
configuration, and what training needs.
"""

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.commands.doctor import describe, examine, feature, table_rows
from lib.config import load_config
from lib.errors import InputError
from lib.kconfig import ROOT
from lib.tiering.stores import default_spill_folder


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    document: dict[str, Any] = {
        **examine(configured_folders(args.config)),
        "packages": probe_packages(),
        "configuration": probe_configuration(args.config),
    }
    document["features"] += training_features(document)
    configuration = document["configuration"]
    state = configuration["state"]
    document["next"] = {
        "missing": "make quickstart",
        "invalid": "make menuconfig",
        "valid": "make",
    }[state]
    rows = [
        *table_rows(document),
        ("pins", describe_packages(document["packages"])),
        ("configuration", f"{configuration['path']}: {configuration['error'] or state}"),
    ]
    emit(describe(document, rows), document, args.json)
    return 0


def configured_folders(config: Path) -> dict[str, Path]:
    """Return where runs and the SSD tier lie, by the configuration where it loads."""
    folders = {"runs": Path("runs"), "SSD tier": default_spill_folder()}
    try:
        configuration = load_config(config)
    except InputError:
        return folders  # probe_configuration reports it
    folders["runs"] = Path(configuration.run.output_dir)
    if configuration.tiering.spill_dir:
        folders["SSD tier"] = Path(configuration.tiering.spill_dir)
    return folders


def probe_packages() -> dict[str, Any]:
    """Return how many packages constraints.txt pins, and which of them are missing or differ."""
    pins = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    different = []
    for name, pinned in pins:
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        # A local version (+cpu, +cu130) is a build of the same release.
        if installed is None or installed.partition("+")[0] != pinned:
            different.append({"name": name, "pinned": pinned, "installed": installed})
    return {"num_pinned": len(pins), "different": different}


def probe_configuration(path: Path) -> dict[str, Any]:
    """Return whether the configuration loads, and the reason if it doesn't."""
    if not path.exists():
        return {"path": str(path), "state": "missing", "error": None}
    try:
        load_config(path)
    except InputError as error:
        return {"path": str(path), "state": "invalid", "error": " ".join(str(error).split())}
    return {"path": str(path), "state": "valid", "error": None}


def training_features(document: dict[str, Any]) -> list[dict[str, Any]]:
    devices, compiler = document["torch"]["devices"], document["cpu"]["compiler"]
    return [
        feature("several GPUs (torchrun, FSDP2)", len(devices) > 1, f"{len(devices)} devices"),
        feature("torch.compile", bool(compiler), compiler or "no C++ compiler"),
    ]


def describe_packages(packages: dict[str, Any]) -> str:
    different = [
        f"{package['name']} {package['installed'] or 'missing'} (pinned {package['pinned']})"
        for package in packages["different"]
    ]
    if different:
        return f"not as constraints.txt pins them: {', '.join(different)}"
    return f"{packages['num_pinned']}, all as constraints.txt pins them"


def _parser() -> Parser:
    parser = Parser(str(__doc__))
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        metavar="FILE",
        help="configuration to check (default: %(default)s)",
    )
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
