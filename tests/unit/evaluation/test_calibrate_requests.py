"""Calibrations of a real model's requests, and the bounds that an engine gives by them."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.errors import InputError, PlacementError
from lib.evaluation.calibrate_requests import calibrate_requests, calibration_keys
from lib.progressive.active import Active
from lib.progressive.audit_file import AuditFile
from lib.progressive.bounds import Kind, QualityBound, RequestError
from lib.progressive.calibration import Calibration, load_calibration
from lib.progressive.engine import Engine
from lib.progressive.generation import GenerationRequest, Outcome, Sampling
from lib.tiering import attach

BUDGET = 2**23
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 300,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def request(seed: int, bound: QualityBound | None = None) -> GenerationRequest:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (140 + seed % 3 * 64,), generator=generator).tolist()
    return GenerationRequest(prompt=ids, max_new_tokens=3, bound=bound)


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    return calibrate_requests(
        model, [request(seed) for seed in range(60)], kv_budget=BUDGET, tiers="K3V2 K6V5"
    )


def answer(engine: Engine, *requests: GenerationRequest) -> list[Outcome]:
    events: SimpleQueue[Any] = SimpleQueue()
    for each in requests:
        engine.submit(each, lambda event: isinstance(event, tuple) or events.put(event))
    return [events.get(timeout=60) for _ in requests]


def test_a_tier_is_taken_whose_bound_is_within_epsilon(
    model: Any, calibration: Calibration, tmp_path: Path
) -> None:
    calibration.save(tmp_path / "calibration.json")
    loaded = load_calibration(tmp_path / "calibration.json", calibration_keys(model))
    assert loaded == calibration and calibration.ladder.names == ("K3V2", "K6V5", "full")
    tiers = []
    with Engine(model, kv_budget=BUDGET, calibration=loaded) as engine:
        for epsilon in (1e-9, 0.01, 0.1, 100.0):
            bound = QualityBound(epsilon=epsilon, delta=0.05)
            for outcome in answer(engine, *(request(seed, bound) for seed in range(100, 104))):
                quality = outcome.quality
                assert quality.kind is Kind.CALIBRATED and quality.delta == 0.05
                assert 0 <= quality.bound <= epsilon
                tier = engine.ladder.index(quality.tier)
                assert quality.escalations == tier
                tiers.append(tier)
        with pytest.raises(RequestError, match="takes 299 calibration requests"):
            engine.check(request(0, QualityBound(epsilon=0.1, delta=0.01)))
        sampled = replace(request(0, bound), sampling=Sampling(temperature=0.7))
        with pytest.raises(RequestError, match="greedy answers, and this one has temperature 0.7"):
            engine.check(sampled)
    assert tiers[:4] == [2] * 4 and tiers[-4:] == [0] * 4 and 1 in tiers


def test_compressed_weights_are_another_model(calibration: Calibration, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    calibration.save(tmp_path / "calibration.json")
    own = calibration_keys(model)
    with attach(model, budget={"HBM": None}):
        assert calibration_keys(model) == own
    with attach(model, budget={"HBM": None, "SSD": None}, precision="int8", spill_dir=tmp_path):
        assert calibration_keys(model) != own
        with pytest.raises(InputError, match="is of another model"):
            load_calibration(tmp_path / "calibration.json", calibration_keys(model))


def test_an_audit_stops_what_breaks_its_bounds_for_good(
    model: Any, calibration: Calibration, tmp_path: Path
) -> None:
    # Scores a million times too small: as if another workload came.
    wrong = replace(calibration, scores=tuple(score / 1e6 for score in calibration.scores))
    path = tmp_path / "calibration.json"
    wrong.save(path)
    bound = QualityBound(epsilon=1e-7, delta=0.05)

    def serve(calibration: Calibration, bound: QualityBound, count: int) -> list[str]:
        audit_file = AuditFile(path, calibration.digest)
        with Engine(
            model,
            kv_budget=BUDGET,
            calibration=calibration,
            audited_share=1.0,
            audit_file=audit_file,
        ) as engine:
            found = [answer(engine, request(seed, bound))[0] for seed in range(count)]
            assert engine.drain(30)
        stopped.append(engine.stats().stopped_bounds)
        audits.append(engine.stats().audits)
        return [outcome.quality.tier for outcome in found]

    stopped: list[int] = []
    audits: list[int] = []
    assert "full" not in serve(wrong, bound, 2)  # not stopped yet: the second one goes on with it
    tiers = serve(wrong, bound, 10)
    assert "full" not in tiers[:2] and set(tiers[-5:]) == {"full"}
    assert serve(wrong, bound, 2) == ["full", "full"]
    assert stopped == [0, 1, 1] and audits == [2, 12, 14]
    # Another calibration is another promise.
    calibration.save(path)
    assert serve(calibration, QualityBound(epsilon=100.0, delta=0.05), 1) == ["K3V2"]


def test_without_room_for_its_logits_an_answer_isnt_audited(
    model: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) == SIZES["vocab_size"] * 4 and not calls:
            calls.append(offset)
            raise OSError(errno.ENOSPC, "no room")
        return real(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    bound = QualityBound(epsilon=100.0, delta=0.05)
    with Engine(model, kv_budget=BUDGET, calibration=calibration, audited_share=1.0) as engine:
        for seed in range(2):
            assert answer(engine, request(seed, bound))[0].new_tokens == 3
        assert engine.drain(30)
    stats = engine.stats()
    assert calls and (stats.audits, stats.failed_audits, stats.failed) == (1, 1, 1)


def test_an_answer_that_nothing_can_be_said_of_fails_alone(
    model: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Active.judge

    def judge(self: Active, value: float) -> None:
        if self.number == 0:
            raise PlacementError("its errors aren't finite")
        real(self, value)

    monkeypatch.setattr(Active, "judge", judge)
    bound = QualityBound(epsilon=0.1, delta=0.05)
    with Engine(model, kv_budget=BUDGET, calibration=calibration) as engine:
        first, second = answer(engine, request(0, bound), request(1, bound))
    assert sorted(type(each).__name__ for each in (first, second)) == ["Outcome", "PlacementError"]


def test_what_cant_be_calibrated_is_refused(model: Any, calibration: Calibration) -> None:
    with pytest.raises(InputError, match="no requests"):
        calibrate_requests(model, [], kv_budget=BUDGET)
    short = GenerationRequest(prompt=[1] * 100, max_new_tokens=2)
    with pytest.raises(InputError, match="long enough for a compact page"):
        calibrate_requests(model, [short], kv_budget=BUDGET, tiers="K4V4")
    other = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(InputError, match="the ladder is of"):
        Engine(other, kv_budget=BUDGET, calibration=calibration)
