"""What offloaders do when something is unusual, or wrong: the right answer, an error, or neither.

    python scripts/experiments/safety/safety_table.py --json safety.json

Each case is a small model, offloaded to a folder and compared with its resident self: ours, and
Accelerate disk_offload and Diffusers group offloading to disk where they are installed. Each cell
is a process of its own. ``correct``: the resident output, of ours bit for bit. ``refused``: ours
raised one of its named errors. Anything else of ours makes the exit code 1. The last line of
stdout is one JSON document.
"""

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.files import check_writable
from lib.tiering.stores import default_spill_folder
from scripts.experiments.safety.cases import CASES, SafetyCase
from scripts.experiments.safety.offloaders import OFFLOADERS, Offloader

GOOD = ("correct", "refused")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    torch.set_num_threads(1)  # before the processes are forked: threads don't survive it
    for offloader in OFFLOADERS:
        if offloader.is_installed():
            import_module(offloader.module)  # once, not in each process
    rows = []
    for case in CASES:
        row = {"case": case.name}
        for offloader in OFFLOADERS:
            row[offloader.name] = run_cell(case, offloader)
            print(f"{case.name}: {offloader.name}: {row[offloader.name]}", file=sys.stderr)
        rows.append(row)
    wrong = [row["case"] for row in rows if row["ours"] not in GOOD]
    print(_table(rows), end="\n\n")
    names = ("torch", "accelerate", "diffusers")
    emit_json({"rows": rows, "versions": {name: _version(name) for name in names}}, args.json)
    if wrong:
        print(f"failed: ours is neither correct nor refused: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def run_cell(case: SafetyCase, offloader: Offloader) -> str:
    """Run one case in a forked process, whatever becomes of it; returns the cell's text."""
    if not offloader.is_installed():
        return "not installed"
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(case, offloader, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"crashed: {signal.Signals(os.WTERMSIG(status)).name}"
    return text or "crashed"


def judge(case: SafetyCase, offloader: Offloader, folder: Path) -> str:
    """Offload the case's model into ``folder`` and compare it with the resident one."""
    model = case.make_model(seed=0)
    given = case.make_input()
    with torch.no_grad():
        expected = [model(given, **call) for call in case.calls]
        try:
            if case.reused:
                _run_once(case, offloader, folder, seed=1)
            if case.between_runs:
                _run_once(case, offloader, folder, seed=0)
                _damage(case, offloader, folder)
            if case.from_checkpoint:
                if offloader.load is None:
                    return "not applicable"
                file = folder / "model.safetensors"
                save_file(model.state_dict(), file)
                model, detach = offloader.load(case.build, file, folder / "weights")
            else:
                detach = offloader.offload(model, folder)
            if case.damage is not None and not case.between_runs:
                _damage(case, offloader, folder)
            differences = [
                _difference(model(given, **call), answer, exact=offloader.exact)
                for call, answer in zip(case.calls, expected, strict=True)
            ]
            detach()
        except offloader.refusals as error:
            print(f"  ({type(error).__name__}: {error})", file=sys.stderr)
            return "refused"
        except Exception as error:
            message = " ".join(str(error).split())
            return f"error: {type(error).__name__}: {message[:90]}"
    worst = max(differences, key=lambda value: (value != value, value))  # NaN is the worst
    if worst == 0:
        return "correct"
    return "wrong (NaN)" if worst != worst else f"wrong (off by {worst:.3g})"


def _answer(case: SafetyCase, offloader: Offloader, writer: int) -> None:
    """Be the child: write the cell's text and end without the parent's clean-up."""
    try:
        with tempfile.TemporaryDirectory(dir=default_spill_folder()) as folder:
            os.write(writer, judge(case, offloader, Path(folder)).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run_once(case: SafetyCase, offloader: Offloader, folder: Path, *, seed: int) -> None:
    model = case.make_model(seed)
    detach = offloader.offload(model, folder)
    for call in case.calls:
        model(case.make_input(), **call)
    detach()


def _damage(case: SafetyCase, offloader: Offloader, folder: Path) -> None:
    files = sorted(folder.rglob(offloader.weight_files))
    if not files or case.damage is None:
        raise RuntimeError(f"{offloader.name} left no {offloader.weight_files} to damage")
    for path in files:
        case.damage(path)


def _difference(output: Tensor, expected: Tensor, *, exact: bool) -> float:
    """Return 0 for the same answer, else the largest difference."""
    same = torch.equal(output, expected) if exact else torch.allclose(output, expected, atol=1e-5)
    return 0.0 if same else (output - expected).abs().max().item()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(rows: Sequence[dict[str, str]]) -> str:
    names = ("case", *(offloader.name for offloader in OFFLOADERS))
    lines = [names, *(tuple(row[name] for name in names) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    texts = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare offloaders on what is unusual or wrong: reused folders, damaged "
        "files, functional use, tied weights, buffers, skipped and repeated modules.",
        epilog="Exit codes: 0 ours is correct or refuses everywhere, 1 it does not, 2 wrong input. "
        "The last line of stdout is JSON.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document here too")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
