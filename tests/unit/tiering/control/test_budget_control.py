"""A budget that changes while the model runs: from other threads, and through a control file."""

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lib.blocks import partition_model
from lib.commands.__main__ import main
from lib.errors import InputError, PlacementError
from lib.policy.control import Settings
from lib.tiering import attach
from lib.tiering.control.budget_control import BudgetControl
from lib.tiering.control.file import status_path, write_request
from lib.tiering.runtime import Runtime
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral

IDS = torch.arange(1, 9)[None]
EAGER = Settings(dwell_us=1, refill_us=1, step_bytes=2**20)
LARGE = {"HBM": "10MiB", "SSD": None}
DEADLINE_SECONDS = 60.0


def generate(model: nn.Module) -> torch.Tensor:
    generated: torch.Tensor = model.generate(IDS, max_new_tokens=8, do_sample=False)
    return generated


class Background:
    """Generates in another thread until told to stop; says whether all outputs were right."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._want = generate(model)
        self._stop = threading.Event()
        self.wrong: list[object] = []
        self.count = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not torch.equal(generate(self._model), self._want):
                    self.wrong.append("another output")
            except Exception as error:
                self.wrong.append(error)
                return
            self.count += 1

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "the run hangs"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.005)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_mixtral])
def test_the_budget_shrinks_and_grows_under_a_running_model(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make().eval()
    background = Background(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=EAGER)
        floor = control.controller.floor_bytes
        largest = runtime.plan.fast_bytes
        with background:
            for limit in [floor, (floor + largest) // 2, None, floor] * 2:
                control.request(limit)
                if limit is None:
                    wait_until(lambda: runtime.plan.fast_bytes == largest)
                else:
                    assert runtime.plan.fast_bytes <= limit
                    assert runtime.stats().resident_bytes <= limit
            wait_until(lambda: background.count > 2)
        assert not background.wrong
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name])
    assert torch.equal(generate(model), background._want)


def test_a_plain_budget_is_carried_out_under_a_running_model(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    background = Background(model)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        largest = runtime.plan.fast_bytes
        with background:
            for _ in range(5):
                runtime.budget = {"HBM": "20KiB", "SSD": None}
                assert runtime.plan.fast_bytes <= 20 * 1024
                with pytest.raises(InputError, match="smallest"):
                    runtime.budget = {"HBM": "1KiB", "SSD": None}
                runtime.budget = LARGE
                assert runtime.plan.fast_bytes == largest
        assert not background.wrong


def inside(model: nn.Module, action: Callable[[], None]) -> None:
    """Run the model, and an action in another thread while it is inside a layer."""
    done = threading.Event()

    def hook(module: nn.Module, args: object) -> None:
        if not done.is_set():
            thread = threading.Thread(target=lambda: (action(), done.set()))
            thread.start()
            time.sleep(0.05)  # it waits for the next module now
            threads.append(thread)

    threads: list[threading.Thread] = []
    handle = model.transformer.h[0].register_forward_pre_hook(hook)
    with torch.no_grad():
        model(IDS)
    handle.remove()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert done.is_set()


def test_memory_is_given_back_before_the_next_module(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        want = model(IDS).logits
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control()
        taken: list[int] = []
        handle = model.transformer.h[1].ln_1.register_forward_pre_hook(
            lambda module, args: taken.append(runtime.plan.fast_bytes)
        )
        before, floor = runtime.plan.fast_bytes, control.controller.floor_bytes
        inside(model, lambda: control.request(floor))
        handle.remove()
        assert floor >= taken[0] < before  # in the same forward
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, want)


def test_below_the_floor_is_an_error_where_it_was_asked_for(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    background = Background(model)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control, plan = runtime.control(), runtime.plan
        with background:
            for _ in range(3):
                with pytest.raises(InputError, match="smallest that works is HBM="):
                    control.request(control.controller.floor_bytes - 1)
        assert runtime.plan is plan
        assert not background.wrong
        with pytest.raises(InputError, match="'much'"):
            control.request("much")


def test_what_cannot_be_carried_out_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt2().eval()
    background = Background(model)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control, plan = runtime.control(), runtime.plan

        def fail(*_: object, **__: object) -> None:
            raise OSError("no space left")

        with background, monkeypatch.context() as patch:
            patch.setattr("lib.tiering.residency.held.HeldGroup.send_off", fail)
            with pytest.raises(OSError, match="no space left"):
                control.request(control.controller.floor_bytes)
        assert runtime.plan is plan
        assert control.controller.limit_bytes == control.controller.asked_bytes
        assert not background.wrong
        control.request(control.controller.floor_bytes)
        assert torch.equal(generate(model), background._want)


def test_growth_waits_for_its_dwell_and_transitions_are_bounded(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    settings = Settings(dwell_us=50_000, refill_us=10_000_000, tokens=4)
    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        control = runtime.control(settings=settings)
        floor = control.controller.floor_bytes
        for _ in range(4):
            control.request(floor)
            control.request(None)
            time.sleep(0.2)
        changes = list(control.changes)
    counts: Counter[str] = Counter()
    shrunk_at = None
    for change in changes:
        counts.update(change.demoted + change.promoted)
        if change.promoted and shrunk_at is not None:
            assert change.ended_at - shrunk_at >= 0.05
        if change.demoted:
            shrunk_at = change.began_at
    assert 3 <= max(counts.values()) <= 4


def test_another_process_asks_through_the_control_file(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    path = tmp_path / "budget.json"
    write_request(path, "11KiB")  # of an earlier run: not looked at

    def answer() -> dict[str, object]:
        status = status_path(path)
        return dict(json.loads(status.read_text())) if status.exists() else {}

    with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
        plan = runtime.plan
        runtime.control(file=path)
        script = f"""echo '{{"HBM": "20KiB"}}' > {path}.new && mv {path}.new {path}"""
        subprocess.run(["sh", "-c", script], check=True)
        wait_until(lambda: answer().get("request") == "20KiB")
        assert answer()["error"] is None
        assert runtime.plan.fast_bytes <= 20 * 1024 < plan.fast_bytes
        write_request(path, 5)
        wait_until(lambda: answer().get("request") == 5)
        assert "smallest that works" in str(answer()["error"])
        path.write_text("{")
        wait_until(lambda: "isn't JSON" in str(answer()["error"]))
        write_request(path, None)
        wait_until(lambda: answer().get("asked_bytes", 0) is None)
    with pytest.raises(PlacementError, match="after detach"):
        runtime.control()
    with (
        attach(model, budget=LARGE, spill_dir=tmp_path) as runtime,
        pytest.raises(InputError, match="isn't there"),
    ):
        runtime.control(file=tmp_path / "no" / "budget.json")


@pytest.mark.filterwarnings("ignore:.*stay as they are")
def test_compressed_weights_stay_compressed(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with attach(model, budget=LARGE, precision="int8", spill_dir=tmp_path) as runtime:
        before = {name: place.precision for name, place in runtime.plan.placements.items()}
        control = runtime.control()
        control.request(control.controller.floor_bytes)
        assert {name: p.precision for name, p in runtime.plan.placements.items()} == before
        generate(model)


def test_a_runtime_without_a_budget_has_nothing_to_control(tmp_path: Path) -> None:
    model = tiny_gpt2()
    hints = {block.name: "HBM" for block in partition_model(model)}
    with (
        pytest.warns(UserWarning, match="flat hints"),
        attach(model, hints, spill_dir=tmp_path) as runtime,
        pytest.raises(InputError, match="no budget to control"),
    ):
        runtime.control()


def test_the_thread_ends_with_its_runtime(tmp_path: Path) -> None:
    def threads() -> int:
        return sum(each.name == "tierhints-control" for each in threading.enumerate())

    before = threads()
    runtime: Runtime = attach(tiny_gpt2().eval(), budget=LARGE, spill_dir=tmp_path)
    first = runtime.control()
    assert isinstance(first, BudgetControl)
    runtime.control()
    assert threads() == before + 1
    runtime.detach()
    assert threads() == before


def test_a_log_of_a_real_run_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_gpt2().eval()
    log = tmp_path / "control.jsonl"
    for _ in range(2):  # the second run is appended
        with attach(model, budget=LARGE, spill_dir=tmp_path) as runtime:
            control = runtime.control(settings=EAGER, log=log)
            floor, largest = control.controller.floor_bytes, runtime.plan.fast_bytes
            for _ in range(8):
                control.request(floor)
                control.request(None)
                wait_until(lambda: runtime.plan.fast_bytes == largest)  # noqa: B023
    assert main(["replay", str(log), "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["identical"] is True
    assert document["runs"] == 2
    assert document["decisions"] >= 32
    assert '"digest"' in log.read_text()
    lines = log.read_text().replace('"promote":["', '"promote":["no","', 1)
    log.write_text(lines[:-30])
    assert main(["replay", str(log), "--json", "-"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["first_difference"]["what"] == "decision"
    assert len(document["torn_lines"]) == 1
    assert main(["replay", str(log), "--policy", "never-grow", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True
    assert main(["replay", str(tmp_path / "nothing.jsonl")]) == 2
