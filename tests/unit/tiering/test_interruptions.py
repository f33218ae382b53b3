"""What comes between forwards: interrupts at any moment, other threads, forks, parts of a model
called by themselves.
"""

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from own_process import run_apart
from smallest_budget import smallest
from tiny_models import tiny_gpt2
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from lib.errors import InputError, PlacementError
from lib.tiering import attach
from lib.tiering.hooks.forwards import Forwards
from lib.tiering.residency.away import AwayWeights
from lib.tiering.residency.weights import GroupWeights
from lib.tiering.transfer.transport import Arrival

IDS = torch.arange(1, 9).view(1, -1)


class Tied(nn.Module):
    """An embedding, layers, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4000, 256)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) for _ in range(6)
        )
        self.head = nn.Linear(256, 4000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupted_forwards(spill: str) -> None:
    """Interrupt many forwards at random moments; the next one must come, and be right."""
    torch.manual_seed(0)
    model = Tied().eval()
    want = model(IDS).detach()
    draw = random.Random(0)
    signal.signal(signal.SIGALRM, _interrupt)
    with attach(model, budget={"HBM": "5MiB", "SSD": None}, spill_dir=spill), torch.no_grad():
        assert torch.equal(model(IDS), want)
        begin = time.perf_counter()
        model(IDS)
        seconds = time.perf_counter() - begin
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.random() * seconds * 1.2 + 1e-5)
                model(IDS)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            assert torch.equal(model(IDS), want)
    assert torch.equal(model(IDS), want)


def test_forwards_interrupted_at_any_moment_neither_hang_nor_go_wrong(tmp_path: Path) -> None:
    run_apart(__file__, f"interrupted_forwards({str(tmp_path)!r})", seconds=120)


def _interrupt_once(patch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """Let a method's next call be interrupted as it begins."""
    own = getattr(owner, method)

    def interrupted(*args: object) -> None:
        patch.setattr(owner, method, own)
        raise KeyboardInterrupt

    patch.setattr(owner, method, interrupted)


def test_a_release_that_is_interrupted_keeps_no_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tied().eval()
    with (
        attach(model, budget={"HBM": "5MiB", "SSD": None}, spill_dir=tmp_path) as runtime,
        torch.no_grad(),
    ):
        want = model(IDS)
        plan = runtime.plan
        for _ in range(3):
            _interrupt_once(monkeypatch, GroupWeights, "hide")
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
            assert torch.equal(model(IDS), want)
        assert runtime.plan is plan  # no room had to be made


def test_a_read_error_keeps_no_slot_however_long_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        want = model(IDS).logits

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    errors = []
    budget = {"HBM": smallest(model), "SSD": None}
    with attach(model, budget=budget, spill_dir=tmp_path) as runtime, torch.no_grad():
        assert torch.equal(model(IDS).logits, want)
        plan = runtime.plan
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", fail)
                with pytest.raises(PlacementError, match=os.strerror(errno.EIO)) as raised:
                    model(IDS)
            errors.append(raised.value)
            assert torch.equal(model(IDS).logits, want)
        assert runtime.plan is plan  # no room had to be made


def test_a_change_of_plan_that_is_interrupted_at_its_end_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tied().eval()
    with (
        attach(model, budget={"HBM": "5MiB", "SSD": None}, spill_dir=tmp_path) as runtime,
        torch.no_grad(),
    ):
        want, plan = model(IDS), runtime.plan
        _interrupt_once(monkeypatch, Forwards, "follow_plan")
        with pytest.raises(KeyboardInterrupt):
            runtime.budget = {"HBM": None, "SSD": None}
        assert runtime.plan is plan
        assert torch.equal(model(IDS), want)
        runtime.budget = {"HBM": "4900KiB", "SSD": None}
        assert runtime.plan.fast_bytes <= 4900 * 1024
        assert torch.equal(model(IDS), want)


def test_an_arrival_is_waited_for_once_or_many_times() -> None:
    arrival = Arrival()
    threading.Timer(0.05, arrival.set).start()
    assert not arrival.is_set()
    for _ in range(3):
        arrival.wait()
        assert arrival.is_set()
    arrival.set()


def test_other_threads_are_refused_and_break_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    want, weight = model(IDS).detach(), model.head.weight.detach().clone()
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(torch.cat([model.embedding.weight.detach()]), weight):
                    wrong.append("another weight")
            except PlacementError as error:
                assert "another thread" in str(error)  # noqa: PT017

    with attach(model, budget={"HBM": "5MiB", "SSD": None}, spill_dir=tmp_path):
        thread = threading.Thread(target=read)
        thread.start()
        try:
            with torch.no_grad():
                for _ in range(100):
                    try:
                        if not torch.equal(model(IDS), want):
                            wrong.append("another output")
                    except PlacementError as error:
                        assert "another thread" in str(error)  # noqa: PT017
        finally:
            stop.set()
            thread.join()
    assert not wrong
    assert torch.equal(model(IDS), want)


def test_a_forked_child_may_not_move_weights(tmp_path: Path) -> None:
    model = Tied().eval()
    runtime = attach(model, budget={"HBM": "5MiB", "SSD": None}, spill_dir=tmp_path)
    with torch.no_grad():
        want = model(IDS)
    child = os.fork()
    if child == 0:
        refused = 0
        for action in (
            lambda: [weight.sum() for weight in model.parameters()],
            lambda: setattr(runtime, "budget", {"HBM": None}),
            runtime.detach,
        ):
            try:
                action()
            except PlacementError as error:
                refused += "forked" in str(error)
        os._exit(refused)
    deadline = time.monotonic() + 30
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if found[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(found[1]) == 3
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
    runtime.detach()


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_another_offloader_afterwards_is_refused(offload: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_gpt2().eval()
    total = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        want = model(IDS).logits
    arguments = {"offload_dir": str(tmp_path / "other")} if offload == "disk_offload" else {}
    with attach(model, budget={"HBM": total * 2 // 3, "SSD": None}, spill_dir=tmp_path):
        with pytest.raises(PlacementError, match="offloaded"):
            getattr(accelerate, offload)(model, execution_device="cpu", **arguments)
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want)


def test_a_base_model_called_by_itself_is_one_forward(tmp_path: Path) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        want = model.transformer(IDS).last_hidden_state
    total = sum(parameter.nbytes for parameter in model.parameters())
    with (
        attach(model, budget={"HBM": total * 2 // 3, "SSD": None}, spill_dir=tmp_path) as runtime,
        torch.no_grad(),
    ):
        model(IDS)
        runtime.reset_stats()
        for _ in range(3):
            assert torch.equal(model.transformer(IDS).last_hidden_state, want)
        assert runtime.stats().forwards == 3
        placed = runtime.plan.placements.keys()
        runtime.budget = {"HBM": total * 3 // 4, "SSD": None}
        assert runtime.plan.placements.keys() == placed
        assert runtime.plan.predicted.compute_seconds > 0
        assert torch.equal(model.transformer(IDS).last_hidden_state, want)


@pytest.mark.parametrize("part", ["", "transformer"])
def test_torch_compile_of_a_model_whose_weights_move_is_refused_when_it_runs(
    part: str, tmp_path: Path
) -> None:
    model = tiny_gpt2().eval()
    with torch.no_grad():
        want = model(IDS).logits
        total = sum(parameter.nbytes for parameter in model.parameters())
        with attach(model, budget={"HBM": total * 2 // 3, "SSD": None}, spill_dir=tmp_path):
            compiled = torch.compile(model.get_submodule(part), backend="eager")
            with pytest.raises(PlacementError, match="can't trace a model whose weights"):
                compiled(IDS)
            assert torch.equal(model(IDS).logits, want)


def test_a_model_whose_embedding_is_no_plain_one_gets_another_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        want = model(IDS).logits
    with (
        attach(model, budget={"HBM": None, "SSD": None}, spill_dir=tmp_path) as runtime,
        torch.no_grad(),
    ):
        assert torch.equal(model(IDS).logits, want)
        runtime.budget = {"HBM": runtime.plan.fast_bytes * 3 // 4, "SSD": None}
        assert torch.equal(model(IDS).logits, want)


def test_a_compressed_weight_is_not_expanded_by_being_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expand(*args: object) -> None:
        raise AssertionError("a whole weight was expanded")

    monkeypatch.setattr(AwayWeights, "fetch", expand)
    model = tiny_gpt2().eval()
    attach(model, budget={"HBM": None, "SSD": None}, precision="int8", spill_dir=tmp_path)


@pytest.mark.parametrize("budget", [5, "6MiB"])
def test_a_budget_that_names_no_tier_is_refused(budget: object) -> None:
    with pytest.raises(InputError, match="names no tiers"):
        attach(Tied(), budget=budget)  # type: ignore[arg-type]
