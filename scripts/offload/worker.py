"""One run of one system, in a process of its own: load, generate, write what was measured.

    python -m scripts.offload.worker REQUEST.json

The request's ``result`` names the JSON file to write, ``logits`` the file of fp32 logits of each
pass. Phases go to stdout, so that the log of a killed process says how far it came.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib.tiering.probe import FileProbe
from lib.units import GB, MIB

from .decode import Recorder, plan_passes
from .systems import SYSTEMS, Loaded, System, Task, anonymous_bytes

PROBE_UNIT_BYTES = 8 * MIB
PROBE_SECONDS = 0.3
SETTLE_SECONDS = 0.1
"""Before the link is measured: what is being prefetched should have arrived."""


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    system = next(system for system in SYSTEMS if system.name == request["system"])
    task = Task(
        checkpoint=Path(request["checkpoint"]),
        folder=Path(request["folder"]),
        limit_bytes=request["limit_bytes"],
        reserve_bytes=request["reserve_bytes"],
        budget_bytes=request["budget_bytes"],
        machine=None if request["machine"] is None else Path(request["machine"]),
    )
    task.folder.mkdir(parents=True, exist_ok=True)
    if request["prepare"]:
        print("phase: preparing", flush=True)
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - what every system imports

        result: dict[str, Any] = {"anonymous_bytes": anonymous_bytes()}
        if system.prepare is not None:
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
    probe = FileProbe(Path(request["probe_folder"]))
    probe.measure(PROBE_UNIT_BYTES, seconds=0)
    logits_SV = torch.full((num_passes, request["vocab_size"]), math.nan)
    bandwidths: list[float] = []
    memory = {"before_load": anonymous_bytes()}

    def measure_link() -> None:
        memory.setdefault("after_prefill", anonymous_bytes())
        time.sleep(SETTLE_SECONDS)
        spec = probe.measure(PROBE_UNIT_BYTES, seconds=PROBE_SECONDS)
        bandwidths.append(spec.bandwidth_gb_s * GB)

    start = time.perf_counter()
    loaded = system.load(task)
    load_seconds = time.perf_counter() - start
    memory["after_load"] = anonymous_bytes()
    recorder = Recorder(
        logits_SV,
        pauses=pauses,
        on_pause=measure_link,
        moved_bytes=loaded.moved_bytes or (lambda: 0),
    )
    print("phase: generating", flush=True)
    tokens = generate(loaded, request["prompt"], num_passes, recorder)
    measure_link()
    probe.close()
    recorder.logits_SV.numpy().tofile(request["logits"])
    return {
        "tokens": tokens,
        "load_seconds": load_seconds,
        "intervals": [asdict(interval) for interval in recorder.intervals],
        "says_moved": loaded.moved_bytes is not None,
        "link_bytes_per_s": bandwidths,
        "anonymous_bytes": {**memory, "at_end": anonymous_bytes()},
        **loaded.facts(),
    }


def generate(loaded: Loaded, prompt: list[int], num_passes: int, recorder: Recorder) -> list[int]:
    """Generate greedily, whatever the tokens are; returns the new ones."""
    from transformers import GenerationConfig

    prompt_1T = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=num_passes, do_sample=False, use_cache=True, pad_token_id=0
    )
    recorder.start()
    output_1T = loaded.model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        generation_config=config,
        logits_processor=[recorder],
    )
    return output_1T[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
