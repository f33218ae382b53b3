"""One run of one system, in a process of its own: load, generate, write what was measured.

    python -m scripts.experiments.offload.worker REQUEST.json

The request's ``result`` names the JSON file to write, ``logits`` the file of fp32 logits of each
pass. Phases go to stdout, so that the log of a killed process says how far it came.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from scripts.experiments.offload.decode import Recorder, TokenTimes, plan_passes
from scripts.experiments.offload.meters import CopyMeter, DiskMeter, Meter, describe_gpu
from scripts.experiments.offload.peers import Loaded, System, Task, anonymous_bytes
from scripts.experiments.offload.settings import SETTINGS


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    systems = SETTINGS[request["device"]].systems
    system = next(system for system in systems if system.name == request["system"])
    task = Task(
        checkpoint=Path(request["checkpoint"]),
        folder=Path(request["folder"]),
        limit_bytes=request["limit_bytes"],
        reserve_bytes=request["reserve_bytes"],
        budget_bytes=request["budget_bytes"],
        machine=None if request["machine"] is None else Path(request["machine"]),
        device=request["device"],
        hints=None if request["hints"] is None else Path(request["hints"]),
    )
    task.folder.mkdir(parents=True, exist_ok=True)
    if request["prepare"]:
        print("phase: preparing", flush=True)
        family = request["family"]
        import_module(f"transformers.models.{family}.modeling_{family}")  # as every system does
        result: dict[str, Any] = {"anonymous_bytes": anonymous_bytes()}
        if task.device == "cuda":
            result["gpu"] = describe_gpu()
        if system.needs_preparing:
            system.prepare(task)
    else:
        result = measure(system, task, request)
    Path(request["result"]).write_text(json.dumps(result))


@torch.no_grad()
def measure(system: System, task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """Run a system; returns the measurements, and writes the logits."""
    print("phase: loading", flush=True)
    num_passes, pauses = plan_passes(request["num_tokens"])
    # What the benchmark itself needs is in memory before the system looks how much is left.
    meter: Meter = (
        CopyMeter(limit_bytes=task.limit_bytes)
        if task.device == "cuda"
        else DiskMeter(
            Path(request["probe_folder"]),
            weight_bytes=sum(f.stat().st_size for f in task.checkpoint.glob("*.safetensors")),
        )
    )
    logits_SV = torch.full((num_passes, request["vocab_size"]), math.nan)
    bandwidths: list[float] = []
    memory = {"before_load": anonymous_bytes()}

    def measure_link() -> None:
        memory.setdefault("after_prefill", anonymous_bytes())
        bandwidths.append(meter.measure_link())

    start = time.perf_counter()
    loaded = system.load(task)
    load_seconds = time.perf_counter() - start
    memory["after_load"] = anonymous_bytes()
    meter.use_units(loaded.unit_bytes)
    if loaded.warm_up_passes:
        print("phase: warming up", flush=True)
        generate(loaded, request["prompt"], loaded.warm_up_passes, None, task.device)
        loaded.after_warm_up()
    moved_bytes = loaded.moved_bytes or (lambda: 0)
    recorder: Recorder | TokenTimes = (
        TokenTimes(logits_SV, moved_bytes=moved_bytes)
        if system.drafts
        else Recorder(
            logits_SV,
            pauses=pauses,
            on_pause=measure_link,
            moved_bytes=moved_bytes,
            synchronize=meter.synchronize,
        )
    )
    if system.drafts:
        measure_link()
    print("phase: generating", flush=True)
    recorder.start()
    tokens = generate(loaded, request["prompt"], num_passes, recorder, task.device)
    measure_link()
    contention = None
    if request["contention"]:
        print("phase: measuring contention", flush=True)
        token_11 = torch.tensor([request["prompt"][:1]], device=task.device)
        contention = meter.measure_contention(lambda: loaded.model(token_11, use_cache=False))
    device_memory = meter.memory()
    meter.close()
    recorder.logits_SV.numpy().tofile(request["logits"])
    return {
        "tokens": tokens,
        "load_seconds": load_seconds,
        "intervals": [asdict(interval) for interval in recorder.intervals],
        "counted_by": _count_by(loaded, task.device),
        "bytes_per_pass": loaded.bytes_per_pass,
        "link_bytes_per_s": bandwidths,
        "contention": contention,
        "anonymous_bytes": {**memory, "at_end": anonymous_bytes()},
        "device_memory": device_memory,
        **loaded.facts(),
    }


def generate(
    loaded: Loaded,
    prompt: list[int],
    num_passes: int,
    recorder: Recorder | TokenTimes | None,
    device: str,
) -> list[int]:
    """Generate greedily, whatever the tokens are; returns the new ones."""
    from transformers import GenerationConfig

    prompt_1T = torch.tensor([prompt], device=device)
    config = GenerationConfig(
        max_new_tokens=num_passes, do_sample=False, use_cache=True, pad_token_id=0
    )
    given: dict[str, Any] = {}
    if isinstance(recorder, Recorder):
        given = {"logits_processor": [recorder]}
    elif recorder is not None:
        given = {"streamer": recorder, "return_dict_in_generate": True, "output_logits": True}
    output = loaded.model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), generation_config=config, **given
    )
    if isinstance(recorder, TokenTimes):
        for logits_V, logits_1V in zip(recorder.logits_SV, output.logits, strict=True):
            logits_V[:] = logits_1V[0]
        output = output.sequences
    return output[0, len(prompt) :].tolist()


def _count_by(loaded: Loaded, device: str) -> str | None:
    """Say where the bytes that moved for a token are known from; None: they are not."""
    if loaded.moved_bytes is not None:
        return "runtime"
    if loaded.bytes_per_pass is not None:
        return "weights per pass"
    return "disk reads" if device == "cpu" else None


if __name__ == "__main__":
    main()
