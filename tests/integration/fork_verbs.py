"""Run verbs of tierhints, each in a process of its own, forked from one that has imported what is
slow to import. For test_verbs.py; called as

    python fork_verbs.py JOBS.json

where a job is {"words", "folder", "terminal", "interrupt"}: the command line; where its stdout,
stderr and exit code go as files; whether stdout is a terminal; and when Ctrl-C comes: "" never,
"writing" while an output file is half-written, "early" a fifth of a second after the start.
"""

import importlib
import json
import os
import pty
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lib.commands.__main__ import VERBS
from lib.commands.__main__ import main as run_verb


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for slow in ("torch._dynamo", "torch.distributed.fsdp", "torch.onnx", "transformers"):
        importlib.import_module(slow)
    for model in ("GPT2LMHeadModel", "AutoModelForCausalLM", "AutoTokenizer"):
        getattr(importlib.import_module("transformers"), model)
    for verb in VERBS:
        importlib.import_module(f"lib.commands.{verb.replace('-', '_')}")
    for job in jobs:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        read, write = pty.openpty() if job["terminal"] else os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            run(job, write)
        os.close(write)
        (folder / "stdout").write_bytes(read_all(read))
        _, status = os.waitpid(child, 0)
        (folder / "code").write_text(str(os.waitstatus_to_exitcode(status)))


def run(job: dict[str, Any], stdout: int) -> None:
    """Become the command; doesn't return."""
    os.dup2(stdout, 1)
    os.dup2(os.open(Path(job["folder"]) / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if job["interrupt"] == "writing":
        sync = os.fsync

        def interrupted(descriptor: int) -> None:
            if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".partial"):
                return sync(descriptor)  # a journal's
            os.fsync = sync
            os.kill(os.getpid(), signal.SIGINT)

        os.fsync = interrupted  # type: ignore[assignment]
    elif job["interrupt"] == "early":

        def interrupt(number: int, frame: FrameType | None) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    code = 1
    try:
        code = run_verb(job["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
        os._exit(code)


def read_all(descriptor: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # a terminal whose other end was closed
            part = b""
        if not part:
            os.close(descriptor)
            return data
        data += part


if __name__ == "__main__":
    main()
