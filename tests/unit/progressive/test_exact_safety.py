"""Exact output within its budget, and when things go wrong: never a wrong token."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from own_process import run_apart
from smallest_budget import named
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from torch import Tensor

from lib.blocks import partition_model
from lib.checkpoint.load import load
from lib.errors import InputError, PlacementError
from lib.hints import BlockHint, Hints
from lib.precision.perturb import CURVE_PRECISIONS, lossy_blocks
from lib.progressive.attach import attach
from lib.progressive.exact import ExactRuntime
from lib.tiering.stores import file
from lib.vocabulary import Precision, Tier

IDS = torch.arange(1, 9).view(1, -1)
PADDED = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 9, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
}
NEW_TOKENS = 16


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


def calibrated(model: Any) -> Hints:
    """Hints with a KL curve for each block; what they say is of no weight here."""
    curves: dict[str, dict[Precision, float]] = {block.name: {} for block in partition_model(model)}
    for number, precision in enumerate(CURVE_PRECISIONS):
        for block in lossy_blocks(model, precision):
            curves[block.name][precision] = 1e-6 * 8.0**number
    return Hints(
        blocks={name: BlockHint(tier=Tier.HBM, kl=curve) for name, curve in curves.items()},
        quality={"calibrated": True, "scale": {}, "band": [1.0, 1.0]},
    )


def write(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    written: Tensor = model.generate(
        ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    )
    return written


@contextmanager
def exact(model: Any, folder: Path | None, **kwargs: Any) -> Iterator[ExactRuntime]:
    kwargs = {"exact": True, "precision": "int8", "spill_dir": folder, **kwargs}
    kwargs.setdefault("budget", {"HBM": 130_000, "SSD": None})
    with attach(model, **kwargs) as runtime:
        assert isinstance(runtime, ExactRuntime)
        yield runtime


def measured_bytes(runtime: ExactRuntime) -> int:
    """Return the bytes of weights in fast memory, draft and full weights together."""
    both = (runtime, runtime.draft.runtime)
    return sum(each._keeper.residency.resident_bytes() for each in both)


@pytest.mark.parametrize("seed", range(20))
def test_no_random_plan_passes_its_budget(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    model = made(draw.choice(list(MODELS)))
    plain, batch = write(model), write(model, PADDED, attention_mask=MASK)
    options: dict[str, Any] = {
        "hints": draw.choice([None, calibrated(model)]),
        "precision": draw.choice([None, "int8", "int6", "int5", "int4", "int3", "int2"]),
        "exact": draw.choice([True, "strict"]),
    }
    with pytest.raises(InputError) as refusal:
        attach(model, budget={"HBM": 1, "SSD": None}, **options)
    least, total = int(named(refusal.value)), sum(each.nbytes for each in model.parameters())
    peaks: list[int] = []
    attached: list[ExactRuntime] = []

    def watch(*_: Any) -> None:
        if attached and draw.random() < 0.1:
            peaks.append(measured_bytes(attached[0]))

    for module in model.modules():
        module.register_forward_hook(watch)  # the draft, which is a copy, has them as well
    limit = draw.choice([least, draw.randrange(least, least + total)])
    with exact(model, tmp_path, budget={"HBM": limit, "SSD": None}, **options) as runtime:
        attached.append(runtime)
        assert torch.equal(write(model), plain)
        if options["exact"] is True:
            assert torch.equal(write(model, PADDED, attention_mask=MASK), batch)
        assert runtime.stats().drafting.windows and peaks
        assert max(*peaks, runtime.stats().peak_resident_bytes) <= limit == runtime.budget["HBM"]


@pytest.mark.parametrize("kept", ["spilled", "checkpoint"])
def test_a_read_error_ends_the_text_and_the_next_one_is_right(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama")
    plain = write(model)
    options: dict[str, Any] = {}
    if kept == "checkpoint":
        model.save_pretrained(tmp_path / "model")
        model, options = load(tmp_path / "model"), {"weights": tmp_path / "model"}
        model.generation_config.eos_token_id = None
    real, left = os.preadv, [0]

    def read(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    with exact(model, tmp_path / "spill", **options):
        assert torch.equal(write(model), plain)
        monkeypatch.setattr(os, "preadv", read)
        failed = 0
        for number in (1, 2, 3, 5, 8, 13, 21, 34):
            left[0] = number
            try:
                assert torch.equal(write(model), plain)
            except PlacementError as error:
                assert "Input/output error" in str(error)  # noqa: PT017
                failed += 1
            left[0] = 0
            with suppress(PlacementError):  # of what was asked for ahead, and not needed before
                write(model)
            assert torch.equal(write(model), plain)
        assert failed >= 4


def test_a_damaged_file_is_told_and_nothing_comes_of_it(tmp_path: Path) -> None:
    model = made("llama")
    plain = write(model)
    options: dict[str, Any] = {"exact": True, "precision": "int8", "spill_dir": tmp_path}
    runtime: Any = attach(model, budget={"HBM": 130_000, "SSD": None}, **options)
    assert torch.equal(write(model), plain)
    for path in tmp_path.glob("*.block"):
        data = bytearray(path.read_bytes())
        data[-1000:] = bytes(byte ^ 0xFF for byte in data[-1000:])
        path.write_bytes(data)
    streamer = Streamer()
    with pytest.raises(PlacementError, match="checksum"):
        write(model, streamer=streamer)
    assert streamer.tokens == plain[0, : len(streamer.tokens)].tolist()
    with pytest.raises(PlacementError, match="could not be restored"):
        runtime.detach()
    assert "generate" not in vars(model)
    with pytest.raises(PlacementError):
        write(model)
    with pytest.raises(PlacementError):  # the draft is gone all the same
        next(runtime.draft.model.parameters()).sum()


class Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, ids: Tensor) -> None:
        self.tokens += ids.flatten().tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_leaves_the_model_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = write(model)
    real = getattr(os, call)
    for number in (1, 2, 4, 8, 16):
        left = [number]

        def full(*arguments: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(file.os, call, full)
            try:
                with exact(model, tmp_path / str(number)):
                    assert torch.equal(write(model), plain)
                assert left[0] > 0, "the error was swallowed"
            except (PlacementError, InputError) as error:  # InputError: not even a first file
                assert "No space left" in str(error)  # noqa: PT017
        assert "generate" not in vars(model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with exact(model, tmp_path / "roomy"):
        assert torch.equal(write(model), plain)


class Failing:
    """Raises at its call of a number: a processor, a criterion, or a hook of a module."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left, self.error = number, error

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class FailingProcessor(transformers.LogitsProcessor, Failing):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick()
        return scores


class FailingCriterion(transformers.StoppingCriteria, Failing):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [ValueError("of a user"), KeyboardInterrupt("of a user")])
def test_a_users_error_ends_the_text_and_the_next_one_is_right(
    error: BaseException, tmp_path: Path
) -> None:
    model = made("llama")
    plain = write(model)
    with exact(model, tmp_path, exact="strict") as runtime:
        for number in (1, 7):
            for name, kind, lists in (
                ("logits_processor", FailingProcessor, transformers.LogitsProcessorList),
                ("stopping_criteria", FailingCriterion, transformers.StoppingCriteriaList),
            ):
                with pytest.raises(type(error), match="of a user"):
                    write(model, **{name: lists([kind(number, error)])})
                assert torch.equal(write(model), plain)
        for part in (model, runtime.draft.model):
            for number in (1, 2):
                failing = Failing(number, error)
                layer = part.model.layers[1]
                hook = layer.register_forward_pre_hook(lambda *_, each=failing: each.tick())
                with pytest.raises(type(error), match="of a user"):
                    write(model)
                hook.remove()
                assert torch.equal(write(model), plain)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupted_texts(spill: str) -> None:
    """Interrupt many texts at random moments; the next one must come, and be right."""
    model = made("llama")
    draw = random.Random(0)
    plain, batch = write(model), write(model, PADDED, attention_mask=MASK)
    signal.signal(signal.SIGALRM, _interrupt)
    with exact(model, Path(spill)):
        write(model)
        begin = time.perf_counter()
        write(model)
        seconds = time.perf_counter() - begin
        for number in range(10):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.random() * seconds * 1.2 + 1e-5)
                write(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            assert torch.equal(write(model), plain)
            if number % 10 == 0:
                assert torch.equal(write(model, PADDED, attention_mask=MASK), batch)
    assert torch.equal(write(model), plain)


def test_texts_interrupted_at_any_moment_neither_hang_nor_go_wrong(tmp_path: Path) -> None:
    run_apart(__file__, f"interrupted_texts({str(tmp_path)!r})", seconds=240)
