"""What must hold whatever the placement: right outputs, no trace, one offloader, clear refusals."""

import contextlib
import gc
import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_mixtral
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lib.blocks import partition_model, storage_bytes
from lib.errors import InputError, PlacementError
from lib.tiering import attach
from lib.tiering.residency.stand_ins import OffloadedParameter

pytestmark = pytest.mark.filterwarnings("ignore:flat hints")


class Twisted(nn.Module):
    """Runs its layers in another order than defined, one twice, one never, and takes a child's
    weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[2](x)
        x = self.layers[0](self.layers[2](x)) * self.scale + self.shift
        return self.norm(F.linear(x, self.layers[1].weight))


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
        )
    )


IDS = torch.arange(12).reshape(2, 6) % 10
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "twisted": (Twisted, torch.linspace(-1, 1, 12).reshape(2, 6)),
    "tied": (Tied, IDS),
    "gpt2": (tiny_gpt2, IDS),
    "llama": (llama, IDS),
    "mixtral": (tiny_mixtral, IDS),
    "single": (lambda: nn.Linear(6, 3), torch.ones(1, 6)),
}
PLACEMENTS = {
    "all on the disk": lambda index: "SSD",
    "all in memory": lambda index: "HBM",
    "mixed": lambda index: ("SSD", "HBM", "CPU")[index % 3],
}


def make(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, inputs = CASES[case]
    return build().eval(), inputs


def place(model: nn.Module, placement: str = "all on the disk") -> dict[str, str]:
    return {b.name: PLACEMENTS[placement](i) for i, b in enumerate(partition_model(model))}


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(inputs)
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", CASES)
class TestAnyModelAnyPlacement:
    def test_outputs_equal_the_untouched_models_bit_for_bit(
        self, case: str, placement: str, tmp_path: Path
    ) -> None:
        model, inputs = make(case)
        expected = output(model, inputs)
        with attach(model, place(model, placement), mode="real", spill_dir=tmp_path):
            for _ in range(2):
                assert torch.equal(output(model, inputs), expected)
            with torch.inference_mode():
                assert torch.equal(output(model, inputs), expected)
        assert torch.equal(output(model, inputs), expected)

    def test_detach_leaves_no_trace(self, case: str, placement: str, tmp_path: Path) -> None:
        model, inputs = make(case)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attributes = [set(module.__dict__) for module in model.modules()]
        signature = inspect.signature(model.forward)
        identities = [id(parameter) for parameter in model.parameters()]
        runtime = attach(model, place(model, placement), mode="real", spill_dir=tmp_path)
        assert inspect.signature(model.forward) == signature
        output(model, inputs)
        runtime.detach()
        runtime.detach()
        after = model.state_dict()
        assert list(after) == list(before)
        for name, value in before.items():
            assert torch.equal(after[name], value)
            assert after[name].dtype == value.dtype
            assert after[name].stride() == value.stride()
        assert [id(parameter) for parameter in model.parameters()] == identities
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        assert all(not vars(parameter) for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert [set(module.__dict__) for module in model.modules()] == attributes
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_always_called
        assert all(path.suffix == ".block" for path in tmp_path.iterdir())  # for the next run


@pytest.fixture
def attached(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> Any:
    """GPT-2 all on the disk: model, inputs, expected output, runtime, spill folder."""
    model, inputs = make("gpt2")
    expected = output(model, inputs)
    runtime = attach(model, place(model), mode="real", spill_dir=tmp_path)
    yield model, inputs, expected, runtime, tmp_path
    with contextlib.suppress(PlacementError):  # a test may have damaged what is stored
        runtime.detach()


def test_weights_really_leave_memory(attached: Any) -> None:
    model, inputs, _, runtime, folder = attached
    gc.collect()
    with torch._C.DisableTorchFunctionSubclass():
        assert storage_bytes([parameter.data for parameter in model.parameters()]) == 0
    on_disk = sum(path.stat().st_size for path in folder.rglob("*.block"))
    assert on_disk >= sum(block.num_bytes for block in partition_model(model)) > 0
    output(model, inputs)
    stats = runtime.stats()
    assert 0 < stats.resident_bytes <= runtime.plan.fast_bytes
    assert stats.peak_resident_bytes <= runtime.plan.fast_bytes


def test_stats_count_each_block_once_per_use(attached: Any) -> None:
    model, inputs, _, runtime, _ = attached
    output(model, inputs)
    output(model, inputs)
    stats = runtime.stats()
    assert stats.forwards == 2
    assert stats.blocks["transformer.h.0.attn"].calls == 2
    assert stats.blocks["transformer.wte"].calls == 4  # embedding and tied head
    for name, block in stats.blocks.items():
        if name not in ("transformer.wte", "transformer.wpe"):  # lookups move whole chunks
            assert block.bytes_moved == block.calls * block.num_bytes, name
        assert block.transfer_seconds > 0 and block.compute_seconds > 0
    assert stats.bytes_moved == sum(block.bytes_moved for block in stats.blocks.values())
    assert max(resident for _, resident in stats.timeline) == stats.peak_resident_bytes
    runtime.reset_stats()
    assert runtime.stats().bytes_moved == 0


def test_generate_works(attached: Any) -> None:
    model, inputs, _, runtime, _ = attached
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(inputs)}
    tokens = model.generate(inputs, **arguments)
    runtime.detach()
    assert torch.equal(tokens, model.generate(inputs, **arguments))


def test_a_second_attach_is_refused(attached: Any) -> None:
    model = attached[0]
    with pytest.raises(PlacementError, match="attached already"):
        attach(model, place(model), mode="emulated")
    with pytest.raises(PlacementError, match="attached already"):
        attach(nn.Sequential(model.transformer), {"0": "HBM"}, mode="real")


def test_moving_an_attached_model_is_refused_and_changes_nothing(attached: Any) -> None:
    model, inputs, expected, _, _ = attached
    with pytest.raises(PlacementError, match="detach"):
        model.to(torch.float16)
    with pytest.raises(PlacementError, match="detach"):
        model.transformer.h[0].half()
    assert torch.equal(output(model, inputs), expected)


def test_writing_to_an_offloaded_weight_is_refused(attached: Any) -> None:
    model = attached[0]
    weight = model.transformer.ln_f.weight
    for write in (
        lambda: weight.zero_(),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", torch.ones(16)),
        lambda: nn.init.ones_(weight),
    ):
        with pytest.raises(PlacementError, match="detach"):
            write()


def test_metadata_and_state_dict_of_offloaded_weights_are_right(attached: Any) -> None:
    model, _, _, runtime, _ = attached
    weight = model.transformer.wte.weight
    assert isinstance(weight, OffloadedParameter)
    assert weight.shape == (40, 16)
    assert weight.numel() == 640
    assert weight.dtype == torch.float32
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    runtime.detach()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


class Returning(nn.Module):
    """Returns its weight, and keeps a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self) -> Tensor:
        self.kept = self.weight[0]
        return self.weight


def test_a_weight_that_a_module_returns_or_keeps_is_not_overwritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Returning() for _ in range(5)])
    expected = [child.weight.detach().clone() for child in model]
    with (
        attach(model, place(model), mode="real", spill_dir=tmp_path),
        torch.no_grad(),
    ):
        found = [child() for child in model]
        for child, values, weight in zip(model, found, expected, strict=True):
            assert torch.equal(values, weight)
            assert torch.equal(child.kept, weight[0])


def test_gradients_are_refused(attached: Any) -> None:
    model = attached[0]
    embeddings = torch.zeros(1, 3, 16, requires_grad=True)
    with pytest.raises(PlacementError, match="inference only"):
        model(inputs_embeds=embeddings)


def test_a_forward_that_raises_gives_its_weights_back(attached: Any) -> None:
    model, inputs, expected, runtime, _ = attached

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("user hook")

    handle = model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(fail)
    resident = runtime.stats().resident_bytes
    with pytest.raises(RuntimeError, match="user hook"):
        output(model, inputs)
    assert runtime.stats().resident_bytes == resident
    handle.remove()
    assert torch.equal(output(model, inputs), expected)


def test_an_interrupted_forward_is_recovered_by_the_next(attached: Any) -> None:
    model, inputs, expected, runtime, _ = attached

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(interrupt)
    resident = runtime.stats().resident_bytes
    with pytest.raises(KeyboardInterrupt):
        output(model, inputs)
    handle.remove()
    assert torch.equal(output(model, inputs), expected)
    assert runtime.stats().resident_bytes == resident


def test_damage_on_the_disk_is_an_error_and_never_a_number(attached: Any) -> None:
    model, inputs, _, runtime, folder = attached
    path = folder / f"{runtime._keeper.residency.groups['transformer.h.0.mlp'].stored[1]}.block"
    damaged = bytearray(path.read_bytes())
    damaged[-4096] ^= 255  # payloads here are a sector each
    path.write_bytes(damaged)
    with pytest.raises(PlacementError, match="checksum"):
        output(model, inputs)
    with pytest.raises(PlacementError, match="could not be restored"):
        runtime.detach()
    with pytest.raises(PlacementError):
        output(model, inputs)
    with torch.no_grad():  # what was stored soundly is back
        model.transformer.wte.weight.sum()


def test_attach_that_fails_half_way_restores_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.tiering.stores import FileStore

    model, inputs = make("mixtral")
    expected = output(model, inputs)
    put, calls = FileStore.put, []

    def fail_later(self: FileStore, key: str, num_bytes: int, parts: Any) -> None:
        calls.append(key)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        put(self, key, num_bytes, parts)

    monkeypatch.setattr(FileStore, "put", fail_later)
    with pytest.raises(OSError, match="No space left"):
        attach(model, place(model), mode="real", spill_dir=tmp_path)
    assert torch.equal(output(model, inputs), expected)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert not list(tmp_path.glob("*partial*"))
    attach(model, place(model, "all in memory"), mode="real").detach()


@pytest.mark.parametrize("attribute", ["_hf_hook", "_diffusers_hook"])
def test_other_offloaders_are_refused(attribute: str) -> None:
    model, _ = make("tied")
    model.body.__dict__[attribute] = object()
    with pytest.raises(PlacementError, match="'body'"):
        attach(model, place(model), mode="real")


def test_a_compiled_model_is_refused() -> None:
    model, _ = make("tied")
    with pytest.raises(InputError, match=r"torch\.compile"):
        attach(torch.compile(model), place(model), mode="real")


def test_settings_without_effect_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    from lib.tiering import EmulationSpec

    model, _ = make("tied")
    hints = place(model)
    for arguments, message in (
        ({"mode": "magic"}, "mode 'magic'"),
        ({"mode": "real", "emulation": EmulationSpec()}, "no effect in real mode"),
        ({"mode": "emulated", "spill_dir": tmp_path}, "no effect in emulated mode"),
        ({"mode": "real", "device": "abacus"}, "device 'abacus'"),
        ({"mode": "real", "precision": "int7"}, "precision 'int7'"),
    ):
        with pytest.raises(InputError, match=message):
            attach(model, hints, **arguments)
    with pytest.raises(InputError, match="no PEER tier"):
        attach(model, {**hints, "body": "PEER"}, mode="real")
    with pytest.raises(InputError, match="meta device"):
        attach(nn.Linear(2, 2, device="meta"), {"weight": "SSD", "bias": "SSD"}, mode="real")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_slow_tiers_leave_the_device_and_outputs_are_equal(
    case: str, tmp_path: Path
) -> None:
    model, inputs = make(case)
    model.cuda()
    expected = output(model, inputs.cuda())
    with attach(model, place(model, "mixed"), mode="real", spill_dir=tmp_path) as runtime:
        total = sum(runtime.stats().bytes_per_tier.values())
        assert runtime.stats().resident_bytes < total
        assert torch.equal(output(model, inputs.cuda()), expected)
    assert all(parameter.is_cuda for parameter in model.parameters())
    model.cpu()
    with attach(model, place(model, "mixed"), mode="real", device="cuda", spill_dir=tmp_path):
        assert torch.equal(output(model, inputs.cuda()), expected)
    assert not any(value.is_cuda for value in model.state_dict().values())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("inside", ["attach", "detach", "both"])
def test_inference_mode_around_attach_or_detach_leaves_a_trainable_model(
    inside: str, placement: str, tmp_path: Path
) -> None:
    model, inputs = make("gpt2")
    with torch.inference_mode(mode=inside in ("attach", "both")):
        runtime = attach(model, place(model, placement), mode="real", spill_dir=tmp_path)
    with torch.inference_mode(mode=inside in ("detach", "both")):
        output(model, inputs)
        runtime.detach()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(inputs).logits.sum().backward()


def test_detach_that_ran_out_of_memory_can_be_repeated(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.tiering.residency import weights as group_weights

    model, inputs, expected, runtime, _ = attached
    set_weights, calls = group_weights.set_weights, []

    def fail_once(parameter: nn.Parameter, weights: Tensor) -> None:
        calls.append(parameter)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("simulated")
        set_weights(parameter, weights)

    monkeypatch.setattr(group_weights, "set_weights", fail_once)
    with pytest.raises(PlacementError, match="detach again"):
        runtime.detach()
    runtime.detach()
    assert torch.equal(output(model, inputs), expected)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


def num_readers() -> int:
    return sum(thread.name == "tierhints-reader" for thread in threading.enumerate())


def test_a_forgotten_model_is_freed_with_its_files_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model, inputs = make("tied")
    before = num_readers()
    runtime = attach(model, place(model), mode="real")
    output(model, inputs)
    assert list(tmp_path.rglob("*.block"))
    del model, runtime
    gc.collect()
    assert not list(tmp_path.rglob("*.block"))
    deadline = time.monotonic() + 5
    while num_readers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_readers() == before


def test_one_forward_at_a_time(attached: Any) -> None:
    model, inputs, _, _, _ = attached
    inside, refused = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        inside.set()
        refused.wait(10)

    handle = model.transformer.h[0].register_forward_pre_hook(wait)
    thread = threading.Thread(target=output, args=(model, inputs))
    thread.start()
    inside.wait(10)
    with pytest.raises(PlacementError, match="one forward at a time"):
        output(model, inputs)
    refused.set()
    thread.join()
    handle.remove()
    output(model, inputs)


def test_weights_used_without_their_module_are_counted(tmp_path: Path) -> None:
    model, inputs = make("twisted")
    with attach(model, place(model), mode="real", spill_dir=tmp_path) as runtime:
        output(model, inputs)
        stats = runtime.stats()
    assert stats.blocks["layers.1"].bytes_moved == stats.blocks["layers.1"].num_bytes


def test_a_flat_hint_may_name_the_tied_head(tmp_path: Path) -> None:
    model, _ = make("tied")
    names = {"embed": "SSD", "body": "HBM", "head": "SSD"}
    attach(model, names, mode="real", spill_dir=tmp_path).detach()


def test_parameters_tied_by_memory_alone_are_refused() -> None:
    model, _ = make("tied")
    model.head.weight = nn.Parameter(model.embed.weight.data)
    with pytest.raises(InputError, match="share memory"):
        attach(model, place(model), mode="real")
