"""TierHintsCallback in a real Hugging Face Trainer."""

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lib.blocks import parameter_digest, partition_model
from lib.errors import InputError
from lib.hints import Hints, load_hints, match_hints
from lib.signals import TierHintsCallback, collect_adam_signal
from lib.signals.meter import UpdateMeter

pytest.importorskip("accelerate", reason="the Trainer needs it")

CLIP = 0.3
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1))


def moe() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return Qwen3MoeForCausalLM(config)


def text() -> list[dict[str, torch.Tensor]]:
    """Sequences of 10 tokens, the first 1 to 4 of them without a label."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(32):
        ids = torch.randint(0, 32, (10,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index % 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trainer(
    model: PreTrainedModel, folder: Path, callback: TierHintsCallback | None, **options: Any
) -> Trainer:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": CLIP,
        "seed": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**given),
        train_dataset=text(),
        eval_dataset=text()[:2],
        callbacks=[callback] if callback else [],
    )


def without_time(hints: Hints) -> dict[str, Any]:
    return {key: value for key, value in hints.provenance.items() if key != "created"}


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("llama")
    run = trainer(llama(), folder, TierHintsCallback(folder / "tier_hints.json"))
    run.train()
    return folder, run


def test_a_llama_run_writes_hints_for_every_byte(llama_run: tuple[Path, Trainer]) -> None:
    folder, run = llama_run
    hints = load_hints(folder / "tier_hints.json")
    sizes = {block.name: block.num_bytes for block in partition_model(run.model)}
    assert {name: hint.num_bytes for name, hint in hints.blocks.items()} == sizes
    matched = match_hints(hints, sizes, identify=partial(parameter_digest, run.model))
    assert matched.keys() == sizes.keys()
    assert hints.model is not None
    assert (hints.model.class_name, hints.model.revision) == ("LlamaForCausalLM", "step-6")
    expected = collect_adam_signal(run.optimizer, run.model)
    for name, hint in hints.blocks.items():
        assert hint.signals["adam_exp_avg_sq"] == expected.density[name]


def test_tokens_and_clipping_are_those_of_the_trainer(llama_run: tuple[Path, Trainer]) -> None:
    folder, run = llama_run
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    clip_sq = [min(1.0, CLIP / (norm + 1e-6)) ** 2 for norm in norms]
    weights = [0.999**age for age in reversed(range(6))]
    mean = sum(w * c for w, c in zip(weights, clip_sq, strict=True)) / sum(weights)
    provenance = load_hints(folder / "tier_hints.json").provenance
    assert provenance["mean_clip_sq"] == pytest.approx(mean, rel=1e-5)
    assert provenance["mean_clip_sq"] < 0.9, "nothing was clipped: the test shows nothing"
    # Of the 10 tokens of a sequence 9 to 6 are predicted: 30 in an update of four, on average.
    assert provenance["tokens_per_update"] == pytest.approx(30, abs=3)
    assert provenance["scale_unknown"] is None
    assert (provenance["clip"], provenance["accumulation"], provenance["world_size"]) == (
        CLIP,
        2,
        1,
    )
    assert (provenance["step"], provenance["global_step"], provenance["weights_step"]) == (6, 6, 6)


def test_each_checkpoint_has_its_own_hints(llama_run: tuple[Path, Trainer]) -> None:
    folder, _ = llama_run
    hints = load_hints(folder / "checkpoint-3" / "tier_hints.json")
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint-3")
    assert hints.model is not None
    assert hints.model.parameter_digest == parameter_digest(model)
    assert hints.provenance["step"] == 3
    assert not list(folder.rglob("*.partial"))


def test_no_hook_stays_in_the_model(llama_run: tuple[Path, Trainer]) -> None:
    _, run = llama_run
    assert not any(module._forward_pre_hooks for module in run.model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in run.model.parameters())


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_hints_of_an_unbroken_one(
    llama_run: tuple[Path, Trainer], tmp_path: Path, restore: bool
) -> None:
    folder, _ = llama_run
    unbroken = load_hints(folder / "tier_hints.json")
    callback = TierHintsCallback(tmp_path / "resumed.json", model_id=str(folder))
    run = trainer(llama(), tmp_path, callback, restore_callback_states_from_checkpoint=restore)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    # Told to restore callbacks, the Trainer replaces ours by one with the stored arguments.
    path = folder / "tier_hints.json" if restore else tmp_path / "resumed.json"
    resumed = load_hints(path)
    assert resumed.blocks == unbroken.blocks
    assert without_time(resumed) == without_time(unbroken)


def test_a_callback_added_on_resume_knows_what_it_did_not_see(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, None, max_steps=3).train()
    callback = TierHintsCallback(tmp_path / "late.json")
    trainer(llama(), tmp_path, callback).train(resume_from_checkpoint=True)
    assert callback.hints is not None
    assert callback.hints.provenance["tokens_per_update"] is None
    assert "50.08% of their window" in callback.hints.provenance["scale_unknown"]
    for hint in callback.hints.blocks.values():
        assert hint.importance is not None and "fisher_trace" not in hint.signals


def test_each_packed_expert_is_a_block(tmp_path: Path) -> None:
    model = moe()
    callback = TierHintsCallback(tmp_path / "tier_hints.json", with_checkpoints=False)
    run = trainer(model, tmp_path, callback, save_strategy="no")
    run.train()
    hints = load_hints(tmp_path / "tier_hints.json")
    packed = model.model.layers[0].mlp.experts.down_proj
    assert packed.shape[0] == 4, "experts are packed into one parameter"
    names = [name for name in hints.blocks if "experts" in name]
    assert names == [f"model.layers.{n}.mlp.experts.{e}" for n in range(2) for e in range(4)]
    signals = [hints.blocks[name].signals["adam_exp_avg_sq"] for name in names]
    assert len(set(signals)) == 8, "each expert has a value of its own"
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(hint.num_bytes or 0 for hint in hints.blocks.values()) == total
    run.save_model(str(tmp_path / "saved"))
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "saved")
    sizes = {block.name: block.num_bytes for block in partition_model(loaded)}
    assert match_hints(hints, sizes, identify=partial(parameter_digest, loaded))


def test_experts_counts_cover_all_micro_batches_and_a_resumed_run(tmp_path: Path) -> None:
    trainer(moe(), tmp_path, TierHintsCallback(tmp_path / "first.json"), max_steps=3).train()
    callback = TierHintsCallback(tmp_path / "tier_hints.json")
    trainer(moe(), tmp_path, callback).train(resume_from_checkpoint=True)
    for path, steps in (("first.json", 3), ("tier_hints.json", 6)):
        hints = load_hints(tmp_path / path)
        counts = {n: b.signals["router_counts"] for n, b in hints.blocks.items() if "experts" in n}
        # Two micro-batches of two sequences of ten tokens, two experts for each, in two layers.
        assert sum(counts.values()) == steps * 2 * 2 * 10 * 2 * 2
        assert hints.provenance["router_counts"] == "while training"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"adam_beta2": 0.9, "max_grad_norm": 0.0}, None),
    ],
)
def test_the_scale_is_given_only_where_it_is_right(
    tmp_path: Path, options: dict[str, Any], reason: str | None
) -> None:
    callback = TierHintsCallback(tmp_path / "hints.json")
    trainer(llama(), tmp_path, callback, save_strategy="no", max_steps=2, **options).train()
    assert callback.hints is not None
    provenance = callback.hints.provenance
    if reason:
        assert reason in provenance["scale_unknown"] and provenance["mean_clip_sq"] is None
    else:
        assert (provenance["scale_unknown"], provenance["mean_clip_sq"]) == (None, 1.0)
        assert (provenance["clip"], provenance["beta2"]) == (0, 0.9)
    has_trace = ["fisher_trace" in hint.signals for hint in callback.hints.blocks.values()]
    assert set(has_trace) == {reason is None}


def test_the_best_weights_are_named_when_they_are_loaded_at_the_end(tmp_path: Path) -> None:
    callback = TierHintsCallback(tmp_path / "hints.json")
    run = trainer(
        llama(),
        tmp_path,
        callback,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls: the first checkpoint is "best"
    )
    run.train()
    hints = load_hints(tmp_path / "hints.json")
    assert run.state.best_global_step == hints.provenance["weights_step"] == 3
    assert hints.provenance["step"] == 6
    best = load_hints(tmp_path / "checkpoint-3" / "hints.json")
    assert hints.model is not None and best.model is not None
    assert hints.model.parameter_digest == best.model.parameter_digest


def test_a_measurement_that_disagrees_with_the_log_is_not_used(tmp_path: Path) -> None:
    class Rescaling(TierHintsCallback):
        """Multiplies gradients after clipping, as other callbacks might."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for parameter in kwargs["model"].parameters():
                parameter.grad.mul_(0.5)
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    callback = Rescaling(tmp_path / "hints.json")
    trainer(llama(), tmp_path, callback, save_strategy="no", max_steps=2).train()
    assert callback.hints is not None
    assert "disagrees with the logged" in callback.hints.provenance["scale_unknown"]


class AtStep(TrainerCallback):
    """Does something to the run just before a step."""

    def __init__(self, step: int, act: Callable[[Any, Any], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(kwargs["model"], kwargs["optimizer"])


def spoil_a_weight(model: Any, optimizer: Any) -> None:
    model.lm_head.weight.data[0, 0] = float("nan")


def spoil_a_moment(model: Any, optimizer: Any) -> None:
    optimizer.state[model.lm_head.weight]["exp_avg_sq"][0, 0] = float("inf")


def lose_a_moment(model: Any, optimizer: Any) -> None:
    def drop(*_: Any) -> None:
        del optimizer.state[model.lm_head.weight]["exp_avg_sq"]

    optimizer.optimizer.register_step_post_hook(drop)
    optimizer.optimizer.register_step_pre_hook(lambda *_: optimizer.state.clear())


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (spoil_a_weight, "isn't finite"),
        (spoil_a_moment, "isn't finite"),
        (lose_a_moment, "no exp_avg_sq"),
    ],
)
@pytest.mark.parametrize("best", [False, True])
def test_a_run_whose_moments_are_lost_goes_on_without_hints(
    tmp_path: Path, act: Callable[[Any, Any], None], reason: str, best: bool
) -> None:
    path = tmp_path / "hints.json"
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": best}
    run = trainer(llama(), tmp_path, TierHintsCallback(path), save_steps=2, **options)
    run.add_callback(AtStep(3, act))
    with pytest.warns(UserWarning, match=f"no tier hints of step 6 are written: .*{reason}"):
        run.train()
    assert run.state.global_step == 6 and not path.exists()
    assert (tmp_path / "checkpoint-2" / "hints.json").exists()
    assert not (tmp_path / "checkpoint-4" / "hints.json").exists()
    assert not any(module._forward_pre_hooks for module in run.model.model.modules())


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("strict", [False, True], ids=["warnings", "errors"])
@pytest.mark.parametrize(
    ("target", "message", "written"),
    [
        ("lib.signals.callback.save_hints", "no tier hints of step 6.*No space left", False),
        ("lib.signals.callback.adam_hints", "no tier hints of step 6.*No space left", False),
        ("lib.signals.meter.UpdateMeter.measure", "scale .* unknown.*No space left", True),
        ("lib.signals.meter.UpdateMeter._inverse_tokens", "could not be measured.*left", True),
        ("lib.signals.scale.MomentScale.update", "scale .* unknown.*No space left", True),
    ],
)
def test_no_failure_after_the_first_step_ends_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    message: str,
    written: bool,
    strict: bool,
) -> None:
    callback = TierHintsCallback(tmp_path / "hints.json")
    monkeypatch.setattr(target, fail)
    run = trainer(llama(), tmp_path, callback)
    if strict:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*No space left", category=UserWarning)
            run.train()
        assert re.search(message, capsys.readouterr().err)
    else:
        with pytest.warns(UserWarning, match=message):
            run.train()
    assert run.state.global_step == 6
    assert (tmp_path / "hints.json").exists() == written
    if written:
        assert callback.hints is not None and callback.hints.provenance["scale_unknown"]
        assert all("fisher_trace" not in hint.signals for hint in callback.hints.blocks.values())


def test_an_older_file_is_called_so_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hints.json"
    path.write_text("{}")
    run = trainer(llama(), tmp_path, TierHintsCallback(path), save_strategy="no")
    run.add_callback(AtStep(3, spoil_a_weight))
    with pytest.warns(UserWarning, match=r"hints\.json is an older file"):
        run.train()
    assert path.read_text() == "{}"


def test_a_folder_that_vanishes_or_closes_costs_the_hints_alone(tmp_path: Path) -> None:
    folder = tmp_path / "hints"
    callback = TierHintsCallback(folder / "hints.json", with_checkpoints=False)
    run = trainer(llama(), tmp_path / "run", callback, save_strategy="no")

    def replace_folder(*_: Any) -> None:
        folder.rmdir()
        folder.write_text("")

    run.add_callback(AtStep(3, replace_folder))
    with pytest.warns(UserWarning, match="no tier hints of step 6 are written: .*can't be written"):
        run.train()
    assert run.state.global_step == 6


@pytest.mark.parametrize("labels", [{"a": 1}, object(), "labels"])
def test_labels_that_cannot_be_counted_are_unknown(labels: Any) -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x, labels: x  # type: ignore[method-assign]
    meter = UpdateMeter(model, world_size=1, global_items=True, clips=False)
    with pytest.warns(UserWarning, match="can't be counted"):
        model(torch.ones(1, 2), labels=labels)
    meter.micro_batches = 1
    assert meter.measure() == (None, 1.0)


def test_errors_come_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="HBM threshold 0.9 is above"):
        TierHintsCallback(hbm_threshold=0.9, cpu_threshold=0.5)
    unwritable = TierHintsCallback(tmp_path / "file" / "hints.json")
    with pytest.raises(InputError, match="can't be written"):
        trainer(llama(), tmp_path, unwritable).train()
    with pytest.raises(InputError, match="is a folder"):
        trainer(llama(), tmp_path, TierHintsCallback(tmp_path)).train()
    for optim, reason in (("sgd", "no second moment"), ("adafactor", "factored")):
        callback = TierHintsCallback(tmp_path / "hints.json")
        run = trainer(llama(), tmp_path, callback, optim=optim)
        with pytest.raises(InputError, match=reason):
            run.train()
        assert run.state.global_step == 0
    assert not (tmp_path / "hints.json").exists()


def test_the_state_is_plain_json() -> None:
    state = TierHintsCallback("hints.json", model_id="mine").state()
    again = TierHintsCallback.from_state(json.loads(json.dumps(state)))
    assert again.state() == state
