"""Hints from optimizer states on disk are those of the live optimizer."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import WRITERS, save_own, save_trainer, train
from torch import nn

from lib.blocks import partition_model
from lib.errors import InputError
from lib.hints import Hints, hints_to_json, load_hints, save_hints
from lib.signals import MomentScale, adam_hints, hints_from_checkpoint

THRESHOLDS: Any = {"hbm_threshold": 0.3, "cpu_threshold": 0.8}
pytestmark = pytest.mark.filterwarnings("ignore:.*doesn't say how many tokens")


def blocks(hints: Hints) -> Any:
    return hints_to_json(hints)["blocks"]


@pytest.mark.parametrize("kind", ["Trainer", "torchtitan", "ZeRO 2, three ranks", "own"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_the_hints_are_those_of_the_live_optimizer(kind: str, name: str, tmp_path: Path) -> None:
    model, optimizer = train(name)
    model.save_pretrained(tmp_path / "model")
    path = WRITERS[kind](tmp_path, model, optimizer)
    hints = hints_from_checkpoint(path, tmp_path / "model")
    expected = adam_hints(optimizer, model, model_id="live", **THRESHOLDS)
    assert blocks(hints) == blocks(expected)
    assert hints.model is not None and expected.model is not None
    assert hints.model.parameter_digest == expected.model.parameter_digest
    assert hints.model.class_name == expected.model.class_name
    assert hints.model.revision == "step-3"
    save_hints(hints, tmp_path / "tier_hints.json")
    assert blocks(load_hints(tmp_path / "tier_hints.json")) == blocks(expected)


def test_what_the_files_do_not_say_is_recorded_as_unknown(tmp_path: Path) -> None:
    model, optimizer = train()
    model.save_pretrained(tmp_path)
    save_trainer(tmp_path, model, optimizer)
    with pytest.warns(UserWarning, match="order is right, the size of the signal is unknown"):
        hints = hints_from_checkpoint(tmp_path)
    found = hints.provenance
    assert found["tokens_per_update"] is None and found["mean_clip_sq"] is None
    assert found["fisher_trace"] == "left out: tokens per update unknown"
    assert (found["optimizer"], found["beta2"], found["step"]) == ("AdamW", 0.95, 3)
    assert found["source"] == str(tmp_path / "optimizer.pt")
    assert found["format"] == "torch state_dict" and found["bias_corrected"]
    assert not any("fisher_trace" in hint.signals for hint in hints.blocks.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = hints_from_checkpoint(tmp_path, tokens_per_update=48, mean_clip_sq=0.25)
    head = told.blocks["transformer.wpe"].signals
    assert head["fisher_trace"] == pytest.approx(head["adam_exp_avg_sq_sum"] * 48 / 0.25)


def test_a_checkpoint_of_this_project_has_the_scale(tmp_path: Path) -> None:
    model, optimizer = train()
    model.save_pretrained(tmp_path)
    save_own(tmp_path, model, optimizer)
    scale = MomentScale(0.95)
    for _ in range(3):
        scale.update(tokens=44.0, clip_coefficient=0.5)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"scale": scale.state_dict()}))
    hints = hints_from_checkpoint(tmp_path)
    live = adam_hints(
        optimizer, model, model_id="live", **THRESHOLDS, tokens_per_update=44.0, mean_clip_sq=0.25
    )
    assert blocks(hints) == blocks(live)
    assert any("fisher_trace" in hint.signals for hint in hints.blocks.values())


def test_a_model_in_memory_will_do(tmp_path: Path) -> None:
    model, optimizer = train()
    path = save_trainer(tmp_path, model, optimizer)
    hints = hints_from_checkpoint(path, model, model_id="mine", revision="")
    assert hints.model is not None and (hints.model.id, hints.model.revision) == ("mine", "")
    assert blocks(hints) == blocks(adam_hints(optimizer, model, model_id="mine", **THRESHOLDS))
    with pytest.raises(InputError, match="no weights in memory: give its folder"):
        hints_from_checkpoint(path, model.to("meta"))


def test_frozen_parameters_have_no_signal(tmp_path: Path) -> None:
    model, _ = train()
    frozen = ("transformer.wte.weight", "transformer.h.0.ln_1.bias")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    rest = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(rest, betas=(0.9, 0.95))
    for _, parameter in rest:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    document = {name: optimizer.state[each] for name, each in rest}
    groups = [{"params": list(document), "betas": (0.9, 0.95)}]
    torch.save({"state": document, "param_groups": groups}, tmp_path / "optimizer.bin")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"no moment of 2 of 28 parameters \(transformer.wte.weigh"
    ):
        hints_from_checkpoint(tmp_path)
    given = hints_from_checkpoint(tmp_path, model)
    assert given.blocks["transformer.wte"].reason.startswith("frozen")
    assert given.provenance["missing_moments"] == 0
    with pytest.warns(UserWarning) as caught:
        hints = hints_from_checkpoint(tmp_path, allow_missing=True)
    told = "\n".join(str(each.message) for each in caught)
    assert "no moment of 2 of 28 parameters (transformer.wte.weight, ...)" in told
    assert "order is right" not in told
    assert hints.provenance["missing_moments"] == 2
    embedding, norm = hints.blocks["transformer.wte"], hints.blocks["transformer.h.0.ln_1"]
    assert embedding.importance is None
    assert embedding.reason.startswith("without a moment in the checkpoint: frozen, or")
    assert norm.importance is not None
    assert norm.reason.startswith("mean over the 16 trained of 32 weights")


def test_a_checkpoint_without_some_moments_is_refused(tmp_path: Path) -> None:
    model, optimizer = train()
    universal = WRITERS["DeepSpeed universal"](tmp_path, model, optimizer)
    shutil.rmtree(universal / "zero" / "transformer.wpe.weight")
    with pytest.raises(InputError, match=r"no moment of 1 of 28 parameters \(transformer.wpe.weig"):
        hints_from_checkpoint(universal, model)
    document = optimizer.state_dict()
    document["state"] = {number: document["state"][number] for number in range(3)}
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="no moment of 25 of 28 parameters .*--allow-missing"):
        hints_from_checkpoint(tmp_path / "optimizer.pt", model)


def test_a_clip_coefficient_needs_the_tokens(tmp_path: Path) -> None:
    model, optimizer = train()
    path = save_trainer(tmp_path, model, optimizer)
    with pytest.raises(InputError, match="mean_clip_sq 0.5 says nothing without the tokens"):
        hints_from_checkpoint(path, model, mean_clip_sq=0.5)
    with pytest.warns(UserWarning, match="doesn't say how gradients were clipped"):
        hints = hints_from_checkpoint(path, model, tokens_per_update=48)
    assert hints.provenance["fisher_trace"].startswith("left out: mean squared clip")
    assert not any("fisher_trace" in hint.signals for hint in hints.blocks.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "isn't finite"), (float("inf"), "isn't finite"), (-1e-9, "negative numbers")],
)
def test_numbers_that_no_mean_square_has_are_refused(
    value: float, message: str, tmp_path: Path
) -> None:
    model, optimizer = train()
    optimizer.state[model.transformer.wpe.weight]["exp_avg_sq"][3, 4] = value
    with pytest.raises(InputError, match=message):
        hints_from_checkpoint(save_trainer(tmp_path, model, optimizer), model)


def test_the_model_must_be_found(tmp_path: Path) -> None:
    model, optimizer = train()
    path = save_trainer(tmp_path, model, optimizer)
    with pytest.raises(InputError, match="no config.json: give the folder of the model"):
        hints_from_checkpoint(path)
    with pytest.raises(InputError, match="no config.json: give a model's folder"):
        hints_from_checkpoint(path, tmp_path / "none")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no safetensors weights, by which"):
        hints_from_checkpoint(path)


def test_one_moment_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read once, when its turn comes, and only the sums are kept."""
    import weakref

    from lib.checkpoint.optimizer.dcp import DistributedCheckpoint

    alive: list[weakref.ref[torch.Tensor]] = []
    read = DistributedCheckpoint._tensor

    def counted(self: Any, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if name.endswith("exp_avg_sq"):
            # The one before is let go of as soon as the next is there.
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DistributedCheckpoint, "_tensor", counted)
    model, optimizer = train()
    seen: list[tuple[int, int]] = []
    hints_from_checkpoint(
        WRITERS["torchtitan"](tmp_path, model, optimizer),
        model,
        progress=lambda done, total: seen.append((done, total)),
    )
    count = sum(len(block.pieces) for block in partition_model(model))
    assert len(alive) == count == len(list(model.parameters()))
    assert seen == [(done, count) for done in range(1, count + 1)]
    assert isinstance(model, nn.Module)
