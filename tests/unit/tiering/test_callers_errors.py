"""Only an exception that a forward itself raised counts, not one that its caller is handling."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2
from torch import Tensor, nn

from lib.errors import PlacementError
from lib.tiering import Runtime, attach

IDS = torch.arange(8).reshape(2, 4)
MEMORY_ERRORS = {
    "python": MemoryError("no memory"),
    "device": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
}


def _generate(model: Any) -> None:
    model.generate(IDS, max_new_tokens=3, do_sample=False)


def _in_a_generator(model: nn.Module) -> None:
    def run() -> Iterator[Tensor]:
        yield model(IDS)

    list(run())


def _in_a_task(model: nn.Module) -> None:
    async def run() -> None:
        try:
            raise MemoryError
        except MemoryError:
            await asyncio.sleep(0)
            model(IDS)

    asyncio.run(run())


def _with_another_error_caught(model: nn.Module) -> None:
    try:
        raise KeyError("chained: its context is the caller's")
    except KeyError:
        model(IDS)


CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: model(IDS),
    "generate": _generate,
    "a part by itself": lambda model: model.transformer(IDS),
    "a leaf by itself": lambda model: model.transformer.h[0].ln_1(torch.zeros(1, 16)),
    "a generator": _in_a_generator,
    "a task": _in_a_task,
    "another error caught": _with_another_error_caught,
}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[tuple[Any, Runtime]]:
    model = tiny_gpt2().eval()
    budget = {"HBM": "200KiB", "SSD": None}
    with torch.no_grad(), attach(model, budget=budget, spill_dir=tmp_path) as attached:
        model(IDS)
        yield model, attached


@pytest.mark.filterwarnings("error:out of memory")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_a_retry_where_the_caller_handles_an_error_keeps_the_budget(
    runtime: tuple[Any, Runtime], call: str, error: str
) -> None:
    model, attached = runtime
    before = attached.plan
    for _ in range(2):
        try:
            raise MEMORY_ERRORS[error]
        except Exception:
            CALLS[call](model)
    assert attached.plan is before


class Fragile(nn.Module):
    """Fails as it is told to; ``catches``: it recovers from it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
        self.error: BaseException | None = None
        self.catches = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.inner(x)
            if self.error is not None:
                raise self.error
        except Exception:
            if not self.catches:
                raise
            x = self.inner(x)
        return x


@pytest.mark.parametrize("handles", [None, *MEMORY_ERRORS])
@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_memory_that_runs_out_in_a_forward_counts_whatever_its_caller_handles(
    error: str, handles: str | None, tmp_path: Path
) -> None:
    model, x = Fragile().eval(), torch.zeros(1, 64)
    budget = {"HBM": "70KiB", "SSD": None}
    with torch.no_grad(), attach(model, budget=budget, spill_dir=tmp_path) as attached:
        model(x)
        before = attached.plan.fast_bytes
        model.error = type(MEMORY_ERRORS[error])(*MEMORY_ERRORS[error].args)
        try:
            raise KeyError if handles is None else MEMORY_ERRORS[handles]
        except Exception:
            with (
                pytest.warns(RuntimeWarning, match="out of memory"),
                pytest.raises(type(model.error)),
            ):
                model(x)
        assert attached.plan.fast_bytes < before


@pytest.mark.filterwarnings("error:out of memory")
@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_what_a_model_recovers_from_by_itself_keeps_the_budget(error: str, tmp_path: Path) -> None:
    model, x = Fragile().eval(), torch.zeros(1, 64)
    budget = {"HBM": "70KiB", "SSD": None}
    with torch.no_grad(), attach(model, budget=budget, spill_dir=tmp_path) as attached:
        model(x)
        before = attached.plan
        model.error, model.catches = MEMORY_ERRORS[error], True
        model(x)
        assert attached.plan is before


@pytest.mark.filterwarnings("error:out of memory")
def test_another_error_keeps_the_budget_though_its_context_is_the_caller_s(tmp_path: Path) -> None:
    model, x = Fragile().eval(), torch.zeros(1, 64)
    budget = {"HBM": "70KiB", "SSD": None}
    with torch.no_grad(), attach(model, budget=budget, spill_dir=tmp_path) as attached:
        model(x)
        before = attached.plan
        model.error = PlacementError("of the model's own")
        try:
            raise MemoryError
        except MemoryError as handled:
            with pytest.raises(PlacementError) as raised:
                model(x)
            assert raised.value.__context__ is handled
        assert attached.plan is before
