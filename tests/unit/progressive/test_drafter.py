"""Drafting on while a pass checks a window: the same text, and nothing that stays behind."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from own_process import run_apart
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor

from lib.errors import PlacementError
from lib.progressive.attach import attach
from lib.progressive.drafter import Drafter
from lib.progressive.exact import ExactRuntime
from lib.progressive.windows import Windows

IDS = torch.arange(1, 9).view(1, -1)
PADDED = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 9, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
}
LIMIT = 130_000
"""Bytes of fast memory, of which the full weights stream."""
STEPS = 3
"""Tokens that a pass waits for at least, if any are drafted meanwhile."""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Windows, "goes_on", lambda self: True)
    yield
    assert none_is_left()


def is_beside(thread: threading.Thread | None = None) -> bool:
    """Say whether a thread, this one by default, drafts while another one is in a pass."""
    return (thread or threading.current_thread()).name == "tierhints-draft"


def drafting() -> bool:
    """Say whether there is such a thread."""
    return any(map(is_beside, threading.enumerate()))


def none_is_left() -> bool:
    """Say whether there is none, once it had a moment to end."""
    time.sleep(0.01)
    return not drafting()


def made(name: str) -> Any:
    """A model with weights large enough that scores don't tie, and no end."""
    model = MODELS[name]()
    torch.manual_seed(1)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def write(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    written: Tensor = model.generate(ids, **{"max_new_tokens": 20, "do_sample": False, **kwargs})
    return written


@contextmanager
def exact(model: Any, folder: Path, **kwargs: Any) -> Iterator[ExactRuntime]:
    """Attach; a pass over the full weights waits for some tokens of the draft."""
    budget = {"HBM": LIMIT, "SSD": None}
    kwargs = {"exact": True, "precision": "int8", "budget": budget, **kwargs}
    with attach(model, spill_dir=folder, **kwargs) as runtime:
        assert isinstance(runtime, ExactRuntime)
        steps: list[None] = []

        def step(*_: Any) -> None:
            if is_beside():
                steps.append(None)

        def wait(*_: Any) -> None:
            while drafting() and len(steps) < STEPS:
                time.sleep(0.001)
            steps.clear()

        hook = model.register_forward_hook(wait)
        runtime.draft.model.register_forward_hook(step)
        try:
            yield runtime
        finally:
            hook.remove()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["int8", "int2"])
def test_the_text_is_the_same(name: str, precision: str, tmp_path: Path) -> None:
    model = made(name)
    plain, batch = write(model), write(model, PADDED, attention_mask=MASK)
    end = int(plain[0, 17])
    ends: dict[str, Any] = {"eos_token_id": end, "pad_token_id": 0}
    one, two = write(model, **ends), write(model, PADDED, attention_mask=MASK, **ends)
    budget = {"HBM": 200_000 if name == "mixtral" else LIMIT, "SSD": None}
    with exact(model, tmp_path, precision=precision, budget=budget) as runtime:
        for _ in range(3):
            assert torch.equal(write(model), plain)
            assert torch.equal(write(model, PADDED, attention_mask=MASK), batch)
            assert torch.equal(write(model, **ends), one)
            assert torch.equal(write(model, PADDED, attention_mask=MASK, **ends), two)
        if precision == "int8":
            assert 0 < runtime.stats().drafting.ahead < runtime.stats().drafting.drafted
    assert torch.equal(write(model), plain)


def test_samples_and_strict_texts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama")
    plain = write(model)
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.95}
    texts: list[tuple[Tensor, Tensor]] = []
    for goes_on in (False, True):
        monkeypatch.setattr(Windows, "goes_on", lambda self, answer=goes_on: answer)
        with exact(model, tmp_path) as runtime:
            torch.manual_seed(3)
            texts.append(
                (write(model, **settings), write(model, PADDED, attention_mask=MASK, **settings))
            )
            assert (runtime.stats().drafting.ahead > 0) == goes_on
    assert all(torch.equal(*each) for each in zip(*texts, strict=True))
    with exact(model, tmp_path, exact="strict") as runtime:
        monkeypatch.setattr(ExactRuntime, "tolerance", 1e9)  # everything ties
        with torch.inference_mode():
            assert torch.equal(write(model), plain)
        assert runtime.stats().drafting.redone == 20


def test_a_text_that_has_ended_takes_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama")
    plain = write(model, PADDED, attention_mask=MASK)
    end = next(int(token) for token in plain[0, 8:] if token not in plain[1, 6:])
    ends: dict[str, Any] = {"eos_token_id": end, "pad_token_id": 0, "attention_mask": MASK}
    expected = write(model, PADDED, **ends)
    follow, beyond = Drafter.follow, []

    def look(self: Drafter, window: int, kept_B: Tensor) -> None:
        follow(self, window, kept_B)
        if self._own is not None and self._texts[0].done and self.held:
            beyond.append(int((self._own.lengths - self._passes.cache.lengths)[0]))

    monkeypatch.setattr(Drafter, "follow", look)
    monkeypatch.setattr(Windows, "choose", lambda self: 2)
    with exact(model, tmp_path) as runtime:
        assert torch.equal(write(model, PADDED, **ends), expected)
        assert runtime.stats().drafting.ahead > 0
    assert beyond and not any(beyond)


def test_fast_memory_stays_within_the_budget(tmp_path: Path) -> None:
    model = made("llama")
    with exact(model, tmp_path) as runtime:
        both, seen = (runtime, runtime.draft.runtime), []

        def look(*_: Any) -> None:
            resident = sum(each._keeper.residency.resident_bytes() for each in both)
            seen.append((threading.current_thread().name, resident))

        for layer in (*model.model.layers, *runtime.draft.model.model.layers):
            layer.register_forward_hook(look)
        write(model)
        assert {"MainThread", "tierhints-draft"} == {name for name, _ in seen}
        assert max(size for _, size in seen) <= LIMIT == runtime.budget["HBM"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["draft", "pass"])
def test_what_fails_meanwhile_is_raised_and_the_next_text_is_right(
    where: str, error: type[BaseException], tmp_path: Path
) -> None:
    model = made("llama")
    plain = write(model)
    with exact(model, tmp_path) as runtime:
        assert torch.equal(write(model), plain)
        layer = (runtime.draft.model if where == "draft" else model).model.layers[1]
        for number in (2, 3):  # a pass before is the prompt's
            left = [number]

            def fail(*_: Any, left: list[int] = left) -> None:
                left[0] -= is_beside() == (where == "draft")
                if left[0] == 0:
                    raise error("of a user")

            hook = layer.register_forward_hook(fail)
            with pytest.raises(error, match="of a user"):
                write(model)
            hook.remove()
            assert left == [0] and none_is_left()
            assert torch.equal(write(model), plain)


def test_a_read_error_meanwhile_ends_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama")
    plain = write(model)
    with exact(model, tmp_path) as runtime:
        assert torch.equal(write(model), plain)
        residency = runtime._keeper.residency
        real, left = residency.memory.transport.wait, [20]

        def wait(ticket: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise PlacementError("Input/output error")
            return real(ticket)

        monkeypatch.setattr(residency.memory.transport, "wait", wait)
        with pytest.raises(PlacementError, match="Input/output error"):
            for _ in range(9):
                write(model)
        assert none_is_left()
        assert torch.equal(write(model), plain)


def test_a_thread_with_modes_of_its_own_drafts_alone(tmp_path: Path) -> None:
    model = made("llama")
    plain = write(model)
    with exact(model, tmp_path) as runtime, torch.device("cpu"):
        assert torch.equal(write(model), plain)
        assert runtime.stats().drafting.ahead == 0


def test_the_next_pass_streams_while_the_draft_runs(tmp_path: Path) -> None:
    model = made("llama")
    with exact(model, tmp_path) as runtime:
        write(model)
        ring = runtime._keeper.memory.prefetcher
        slots = ring._num_slots
        first = list(dict.fromkeys(unit.group for unit in ring._schedule))[:slots]
        assert 0 < slots < len(set(ring._schedule))
        there: list[set[str]] = []

        def look(*_: Any) -> None:
            if not is_beside():
                there.append(ring.in_flight | ring.in_slots)

        runtime.draft.model.register_forward_pre_hook(look)
        write(model)
    assert there and all(set(first) <= each for each in there)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupted_texts(spill: str) -> None:
    """Interrupt many texts at random moments; the next one must come, and be right."""
    Windows.goes_on = lambda self: True  # type: ignore[method-assign]
    model = made("llama")
    draw = random.Random(0)
    plain = write(model)
    signal.signal(signal.SIGALRM, _interrupt)
    with exact(model, Path(spill)) as runtime:
        write(model)
        begin = time.perf_counter()
        write(model)
        seconds = time.perf_counter() - begin
        for _ in range(25):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.random() * seconds * 1.1 + 1e-5)
                write(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            assert torch.equal(write(model), plain)
            assert none_is_left()
        assert runtime.stats().drafting.ahead > 0
    assert torch.equal(write(model), plain)


def test_texts_interrupted_at_any_moment_leave_no_thread(tmp_path: Path) -> None:
    run_apart(__file__, f"interrupted_texts({str(tmp_path)!r})", seconds=240)
