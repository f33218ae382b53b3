"""The endpoint as `.config` says: `make serve`, and `make serve-demo`, which asks it three things.

The demo's requests declare different bounds; of each it shows the tier its keys and values ended
at, the bound, how that is known, and the bytes.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.config import Config, load_config
from lib.errors import InputError, PlacementError
from lib.units import format_bytes
from scripts.demo import prepare_model

START_SECONDS = 120.0
PROMPT = "Name three colours of the rainbow, and say in a sentence what each reminds you of."
NEW_TOKENS = 32
CONTEXT_LINES = 24
"""Of this file, before the question: a text that is long enough for compact pages."""
BOUNDS: dict[str, Any] = {
    "none": None,
    "0.05 nats per token": 0.05,
    "exact": {"metric": "exact"},
}
"""What the table calls a bound -> quality_bound of the request."""
CALIBRATED = {"0.05, delta 0.05": {"epsilon": 0.05, "delta": 0.05}}
"""One more, where there is a calibration."""
_HEADS = ("quality_bound", "tier", "bound (nats)", "known by", "climbed", "fast KV", "total KV")

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    config = load_config(args.config)
    if args.stage == "demo":
        prepare_model(Path(config.serve.model).parent)
    command = [sys.executable, "-m", "lib.commands", *serve_words(config)]
    if args.stage == "demo":
        bounds = BOUNDS | (CALIBRATED if config.serve.calibration else {})
        document = demonstrate(command, bounds)
        emit(demo_table(document), document, args.json)
        return 0
    print(f"$ {shlex.join(['tierhints', *command[3:]])}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(sys.executable, command)


def serve_words(config: Config) -> list[str]:
    """Return what tierhints is told."""
    serve = config.serve
    model = serve.model or str(config.run.directory / "checkpoint")
    if not Path(model).exists() and not serve.model:
        raise InputError(
            f"there is no {model}: train it with make train, or name another in SERVE_MODEL"
        )
    words = ["serve", "--model", model, "--host", serve.host, "--port", str(serve.port)]
    words += ["--kv-budget", serve.kv_budget, "--default-bound", serve.default_bound]
    words += ["--max-queue", str(serve.max_queue), "--device", config.run.device]
    for flag, value in {
        "--ladder": serve.ladder,
        "--calibration": serve.calibration,
        "--budget": config.bench.budget,
    }.items():
        words += [flag, value] if value else []
    if config.bench.precision != "native":
        words += ["--precision", config.bench.precision]
    if serve.replicas:
        words += ["--ray", "--replicas", str(serve.replicas)]
    return words


def demonstrate(command: Sequence[str], bounds: Mapping[str, Any]) -> Fields:
    """Start the endpoint, ask it with each bound, and stop it; returns its answers."""
    with tempfile.TemporaryDirectory() as folder:
        started = Path(folder) / "started.json"
        words = [*command, "--json", str(started)]
        print(f"$ {shlex.join(['tierhints', *command[3:]])}", file=sys.stderr, flush=True)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            served = wait_until_started(process, started)
            answers = {name: ask(served, bound) for name, bound in bounds.items()}
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code:
        raise PlacementError(f"the endpoint ended with {code}")
    return {**served, "prompt": PROMPT, "answers": answers}


def wait_until_started(process: "subprocess.Popen[bytes]", started: Path) -> Fields:
    """Return what the endpoint says of itself once it listens."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise PlacementError(f"the endpoint ended with {process.returncode}")
        if started.exists():
            return dict(json.loads(started.read_text()))
        time.sleep(0.1)
    raise PlacementError(f"the endpoint did not start within {START_SECONDS:.0f} s")


def ask(served: Mapping[str, Any], bound: Any) -> Fields:
    """Return the endpoint's reply to the prompt with a bound; raises InputError if it refuses."""
    text = "\n".join(Path(__file__).read_text().splitlines()[:CONTEXT_LINES])
    body = {
        "model": served["model"],
        "messages": [{"role": "user", "content": f"{text}\n\n{PROMPT}"}],
        "max_completion_tokens": NEW_TOKENS,
        "temperature": 0,
        **({} if bound is None else {"quality_bound": bound}),
    }
    if not served["chat"]:
        body["prompt"] = body.pop("messages")[0]["content"]
        body["max_tokens"] = body.pop("max_completion_tokens")
    request = urllib.request.Request(
        f"{served['url']}/{'chat/completions' if served['chat'] else 'completions'}",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('TIERHINTS_API_KEY', '')}",
        },
    )
    try:
        with urllib.request.urlopen(request) as reply:
            document = json.load(reply)
    except urllib.error.HTTPError as error:
        raise InputError(f"the endpoint says {error.code}: {error.read().decode()}") from error
    (choice,) = document["choices"]
    said = choice["message"]["content"] if served["chat"] else choice["text"]
    return {"text": said, "usage": document["usage"], "quality": document["quality"]}


def demo_table(document: Mapping[str, Any]) -> str:
    """Return what each bound led to."""
    rows = [_HEADS]
    for name, answer in document["answers"].items():
        quality = answer["quality"]
        rows.append(
            (
                name,
                quality["tier"],
                f"{quality['bound']:.2g}",
                quality["kind"],
                str(quality["escalations"]),
                format_bytes(quality["kv_bytes"]),
                format_bytes(quality["total_bytes"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for name, answer in document["answers"].items():
        lines += ["", f"{name}: {answer['text']!r}"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(str(__doc__))
    parser.add_argument(
        "stage",
        nargs="?",
        choices=["serve", "demo"],
        default="serve",
        help="demo: ask it, and stop it again (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        metavar="FILE",
        help="configuration (default: %(default)s)",
    )
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
