"""scripts/benchmark_tiered_inference.py on a tiny GPT-2, end to end."""

import json
import math
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.blocks import parameter_digest, partition_model
from lib.checkpoint.models import cast_weights, load_model
from lib.commands import benchmark as verb
from lib.commands.cli import run_main
from lib.errors import InputError
from lib.evaluation.forwards import ForwardBench, peak_rss, reset_peak_rss
from lib.hints import ModelInfo, build_hints, load_hints, save_hints
from lib.vocabulary import Precision
from scripts.benchmark_tiered_inference import main

CONTEXT, VOCABULARY = 16, 64
SCRIPT = Path("scripts/benchmark_tiered_inference.py")
FEW = ["--num-iterations", "4", "--warmup", "1", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads waiting for each other on a busy machine slow a tiny model a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    hints: Path
    weight_bytes: int

    def arguments(self, *more: str) -> list[str]:
        return ["--model", str(self.folder), "--tier-hints", str(self.hints), *FEW, *more]


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=3,
        n_head=2,
        n_embd=16,
        n_positions=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    model = make_model()
    model.save_pretrained(folder)
    tokens = torch.randint(0, VOCABULARY, (6, CONTEXT))
    save_file({"tokens": tokens}, folder / "heldout.safetensors", metadata={"corpus": "dice"})
    blocks = {block.name: block for block in partition_model(model)}
    hints = build_hints(
        model=ModelInfo(
            id="tiny",
            revision="",
            class_name="GPT2LMHeadModel",
            parameter_digest=parameter_digest(model),
        ),
        provenance={"signal": "adam_exp_avg_sq", "created": "2026-01-01T00:00:00+00:00"},
        num_bytes={name: block.num_bytes for name, block in blocks.items()},
        num_params={name: block.num_params for name, block in blocks.items()},
        density={name: 1 / rank for rank, name in enumerate(blocks, start=1)},
        signals={name: {} for name in blocks},
        reasons={},
        hbm_threshold=0.3,
        cpu_threshold=0.6,
    )
    path = folder.parent / "tier_hints.json"
    save_hints(hints, path)
    weight_bytes = sum(block.num_bytes for block in blocks.values())
    return Checkpoint(folder, path, weight_bytes)


@pytest.fixture(scope="module")
def calibrated(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same with curves that say 1e-4 nats at 8 bits, and 4.5 times as much with each bit less.

    More than these tiny weights really cost.
    """
    hints = load_hints(checkpoint.hints)
    ladder = {"int8": 8.0, "int6": 6.5, "int5": 5.5, "int4": 4.5, "int3": 3.5}
    kl = {Precision(name): 1e-4 * 4.5 ** (8 - bits) for name, bits in ladder.items()}
    blocks = {name: replace(hint, kl=kl) for name, hint in hints.blocks.items()}
    quality = {
        "epsilon_kl": 0.02,
        "calibrated": True,
        "conformal_factor": 1.3,
        "conformal_probes": 60,
        "kernels": {"name": "any", "nats": 1e-5},
    }
    path = tmp_path_factory.mktemp("calibrated") / "tier_hints.json"
    save_hints(replace(hints, blocks=blocks, quality=quality), path)
    return replace(checkpoint, hints=path)


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any], str, str]:
    """Run the command in this process; return exit code, JSON document, stdout and stderr."""
    code = run_main(lambda: main(arguments))
    output = capsys.readouterr()
    document = json.loads(output.out.splitlines()[-1]) if code == 0 else {}
    return code, document, output.out, output.err


def test_exact_output_is_timed_beside_streaming(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    real = checkpoint.arguments("--mode", "real", "--exact", "--baseline")
    budget = ["--budget", f"HBM={2 * checkpoint.weight_bytes},SSD="]
    assert run_main(lambda: main([*real, *budget])) == 0
    text, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    part = json.loads(last)["exact"]
    assert part["equal_tokens"] == part["tokens"] == 2 * part["new_tokens"] == CONTEXT
    assert part["exact"]["windows"] > 0
    assert part["exact"]["peak_weight_bytes"] <= 2 * checkpoint.weight_bytes
    for way in ("resident", "streamed", "exact"):
        assert part[way]["tokens_per_s"] > 0
        assert any(line.startswith(way) for line in text.splitlines())
    assert f"{CONTEXT} of {CONTEXT} tokens are the resident model's" in text
    for flags, message in (
        (real, "divides a real budget"),
        ([*real, "--mode", "emulated", *budget], "divides a real budget"),
        ([*real, *budget, "--precision", "int8"], "leave precision and epsilon out"),
        ([*real, "--budget", "HBM=1000,SSD="], "the smallest that works is HBM="),
    ):
        assert run_main(lambda flags=flags: main(flags)) == 2  # type: ignore[misc]
        assert message in capsys.readouterr().err


def test_real_mode_saves_memory_and_changes_no_bit(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "out.json"
    arguments = checkpoint.arguments("--mode", "real", "--baseline", "--json", str(path))
    code, document, text, progress = run(arguments, capsys)
    assert code == 0 and progress == ""
    assert json.loads(path.read_text()) == document
    baseline, tiered, impact = (document[name] for name in ("baseline", "tiered", "impact"))
    assert document["measured"] == "wall-clock" and document["mode"] == "real"
    assert document["tokens_source"] == "held-out split of dice"
    assert document["seq_length"] == CONTEXT
    assert document["perplexity_tokens"] == 6 * (CONTEXT - 1)
    assert baseline["peak_fast_memory_bytes"] == checkpoint.weight_bytes
    assert tiered["peak_fast_memory_bytes"] < checkpoint.weight_bytes
    assert impact["memory_saved_pct"] > 0
    assert impact["logits_bit_identical"] and impact["max_abs_logit_difference"] == 0
    assert impact["logits_compared"] == 2 * CONTEXT * VOCABULARY
    assert tiered["perplexity"] == baseline["perplexity"] and impact["perplexity_delta"] == 0
    stats = tiered["stats"]
    assert stats["forwards"] == 4  # the warm-up, the perplexity and the comparison don't count
    moved = stats["bytes_per_tier"]["SSD"]
    assert moved > 0 and tiered["bytes_moved_per_forward"] == moved
    waited = sum(b["transfer_seconds"] for b in stats["blocks"].values() if b["bytes_moved"])
    assert tiered["transfer_ms_per_forward"] == pytest.approx(waited / 4 * 1e3)
    assert baseline["bytes_moved_per_forward"] == 0
    for part in (baseline, tiered):
        latency = part["latency_ms"]
        assert latency["n"] == 4 and 0 < latency["median"] <= latency["p95"]
        assert part["tokens_per_s"] == pytest.approx(2 * CONTEXT / latency["mean"] * 1e3)
        assert part["peak_rss_bytes"] is None or part["peak_rss_bytes"] > checkpoint.weight_bytes
    for title in ("baseline: all weights", "tiered: real (measured)", "impact: "):
        assert title in text


def test_the_verb_measures_the_same_by_default_really_and_against_the_baseline(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    _, script, _, _ = run(checkpoint.arguments("--mode", "real", "--baseline"), capsys)
    code = run_main(lambda: verb.main(checkpoint.arguments()))
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert code == 0 and document.keys() == script.keys()
    same = [name for name in document if name not in ("baseline", "tiered", "impact")]
    assert {name: document[name] for name in same} == {name: script[name] for name in same}
    assert any("fast memory saved" in line for line in table)

    budget = f"HBM={document['baseline']['peak_weight_bytes'] * 9 // 10},SSD="
    flags = ["--model", str(checkpoint.folder), *FEW, "--no-baseline", "--budget", budget]
    code = run_main(lambda: verb.main([*flags, "--precision", "lossless"]))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and document["tier_hints"] is None and document["baseline"] is None
    code = run_main(lambda: verb.main(flags[:-2]))
    assert code == 2 and "--tier-hints, or --budget" in capsys.readouterr().err


def test_emulation_does_not_say_that_it_saves_memory(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, text, _ = run(checkpoint.arguments("--baseline"), capsys)
    assert code == 0 and document["impact"]["memory_saved_pct"] is None
    (line,) = [line for line in text.splitlines() if "fast memory saved" in line]
    assert line.split("saved")[1].split(None, 1) == ["-", "emulation moves nothing"]


def test_virtual_clock_charges_what_the_specs_say(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    slow = {"setup_us": 1e8, "bandwidth_gb_s": 1.0}  # 100 s: real time of a busy machine is little
    free = {"setup_us": 0, "bandwidth_gb_s": 1e6}
    tiers = {"HBM": free, "CPU": free, "SSD": slow}
    spec.write_text(json.dumps({"clock": "virtual", "tiers": tiers}))
    arguments = checkpoint.arguments("--mode", "emulated", "--spec", str(spec), "--baseline")
    code, document, text, _ = run(arguments, capsys)
    assert code == 0
    tiered = document["tiered"]
    assert document["measured"] == "emulated (virtual clock)" and "virtual clock" in text
    blocks = tiered["stats"]["blocks"].values()
    uses = sum(block["calls"] for block in blocks if block["tier"] == "SSD") / 4
    assert uses >= 1
    assert tiered["transfer_ms_per_forward"] == pytest.approx(uses * 1e5, rel=1e-3)
    assert tiered["latency_ms"]["median"] > uses * 1e5
    assert document["impact"]["logits_bit_identical"]
    assert document["impact"]["latency_overhead_pct"] > 1000
    assert document["spec"]["tiers"]["SSD"]["setup_us"] == 1e8


def test_wall_clock_waits_and_reports_its_error(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    slow = {"setup_us": 2000, "bandwidth_gb_s": 10}
    spec.write_text(json.dumps({"clock": "wall", "tiers": {"SSD": slow}}))
    code, document, text, _ = run(checkpoint.arguments("--spec", str(spec)), capsys)
    assert code == 0
    assert document["measured"] == "wall-clock" and "emulated waits" in text
    assert document["baseline"] is None and document["impact"] is None
    assert document["tiered"]["latency_ms"]["median"] > 2
    assert document["tiered"]["stats"]["wait_error"]["n"] > 0
    assert "error of a wait" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hints_of_a_float32_run_serve_a_cast_model(
    checkpoint: Checkpoint, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = checkpoint.arguments("--mode", "real", "--baseline", "--dtype", dtype)
    code, document, _, error = run(arguments, capsys)
    assert code == 0, error
    assert document["dtype"] == dtype
    assert document["weight_bytes"] == checkpoint.weight_bytes // 2
    assert document["impact"]["logits_bit_identical"]


def test_a_cast_leaves_buffers_and_ties_as_transformers_does(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    cast_weights(model, torch.bfloat16)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, buffer in expected.named_buffers():
        assert model.get_buffer(name).dtype == buffer.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert parameter_digest(model) == parameter_digest(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some text", "is not a file of plain tensors"),
        (b"hello", "is not a file of plain tensors"),
        (b'{"a": 1}', "is not a file of plain tensors"),
        (b"<html>\n</html>", "is not a file of plain tensors"),
        (b"", "is not a file of plain tensors"),
        ({1: torch.zeros(1)}, "must map parameter names to tensors"),
        ("hello", "must map parameter names to tensors"),
    ],
)
def test_a_bad_checkpoint_is_named(
    checkpoint: Checkpoint,
    tmp_path: Path,
    content: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    code, _, _, error = run(checkpoint.arguments("--checkpoint", str(path)), capsys)
    assert code == 2 and error.count("\n") == 1 and "weights_only" not in error
    assert f"checkpoint {path} {message}" in error and "save model.state_dict()" in error


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoint_replaces_the_weights(
    checkpoint: Checkpoint, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(checkpoint.folder / "model.safetensors")
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    same = run(checkpoint.arguments("--checkpoint", str(path)), capsys)
    assert same[0] == 0, same[3]
    state["transformer.ln_f.weight"] += 1.0
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    code, _, _, error = run(checkpoint.arguments("--checkpoint", str(path)), capsys)
    assert code == 2 and "other weights" in error


def test_without_held_out_tokens_the_standard_library_is_read(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((checkpoint.folder / name).read_bytes())
    bare = replace(checkpoint, folder=folder)
    code, _, _, error = run(bare.arguments(), capsys)
    assert code == 2 and "no text to measure on" in error

    words = {"<unk>": 0, **{chr(96 + index): index for index in range(1, 27)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    code, document, text, error = run(bare.arguments(), capsys)
    assert code == 0, error
    assert "standard library" in document["tokens_source"] and "standard library" in text


Edit = Callable[[Any], None]


def edited_hints(checkpoint: Checkpoint, path: Path, edit: Edit) -> str:
    document = json.loads(checkpoint.hints.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return str(path)


def test_bad_hints(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hints.json"
    text = checkpoint.hints.read_text()
    nan: Edit = lambda doc: doc["blocks"]["transformer.wte"].update(importance=math.nan)  # noqa: E731
    other: Edit = lambda doc: doc["model"].update(parameter_digest=f"sha256:{'0' * 64}")  # noqa: E731
    lost: Edit = lambda doc: doc["blocks"].pop("transformer.wpe")  # noqa: E731
    contents = {
        "truncated": text[: len(text) // 2],
        "GPU": '{"transformer": "GPU"}',
        "finite": Path(edited_hints(checkpoint, path, nan)).read_text(),
        "other weights": Path(edited_hints(checkpoint, path, other)).read_text(),
        "have no hint": Path(edited_hints(checkpoint, path, lost)).read_text(),
    }
    for word, content in contents.items():
        path.write_text(content)
        bad = replace(checkpoint, hints=path)
        assert_refused(run(bad.arguments(), capsys), word)
    absent = replace(checkpoint, hints=tmp_path / "absent.json")
    assert_refused(run(absent.arguments(), capsys), "does not exist")


def test_flat_hints_are_taken_with_a_warning(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hints.json"
    path.write_text('{"transformer": "SSD"}')
    flat = replace(checkpoint, hints=path)
    code, _, _, error = run(flat.arguments("--mode", "real"), capsys)
    assert code == 0
    assert error.startswith("warning: flat hints") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seq-length", "17"], "longer than the model's context"),
        (["--seq-length", "1"], "--seq-length 1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--num-iterations", "0"], "--num-iterations 0"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "scripts"], "no config.json"),
        (["--checkpoint", "nowhere.pt"], "does not exist"),
        (["--checkpoint", "README"], "does not exist"),
        (["--spec", "nowhere.json"], "spec file"),
        (["--json", "/proc/none/out.json"], "can't be written"),
        (["--json", "/"], "is a folder"),
    ],
)
def test_bad_flags(
    checkpoint: Checkpoint, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(run(checkpoint.arguments(*arguments), capsys), word)


def test_bad_checkpoints(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(checkpoint.folder / "model.safetensors")
    lacking = {name: value for name, value in state.items() if name != "transformer.ln_f.bias"}
    reshaped = {**state, "transformer.ln_f.bias": torch.zeros(3)}
    path = tmp_path / "weights.pt"
    for content, word in (
        (lacking, "transformer.ln_f.bias"),
        ({**state, "transformer.extra": torch.zeros(1)}, "transformer.extra"),
        (reshaped, "another shape"),
        ({"model": state}, "save model.state_dict()"),
        (make_model(), "not a file of plain tensors"),
    ):
        torch.save(content, path)
        assert_refused(run(checkpoint.arguments("--checkpoint", str(path)), capsys), word)
    path.write_bytes(b"PK")
    assert_refused(run(checkpoint.arguments("--checkpoint", str(path)), capsys), "truncated")
    path = path.with_suffix(".safetensors")
    path.write_bytes((checkpoint.folder / "model.safetensors").read_bytes()[:1000])
    assert_refused(run(checkpoint.arguments("--checkpoint", str(path)), capsys), "can't be read")
    path = path.with_suffix(".onnx")
    path.touch()
    assert_refused(run(checkpoint.arguments("--checkpoint", str(path)), capsys), "unknown kind")


def test_broken_weights_fail_without_numbers(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(checkpoint.folder / "model.safetensors")
    state["transformer.wte.weight"] *= math.nan
    save_file(state, tmp_path / "nan.safetensors")
    flat = tmp_path / "flat.json"
    flat.write_text('{"transformer": "HBM"}')
    broken = replace(checkpoint, hints=flat)
    arguments = broken.arguments("--checkpoint", str(tmp_path / "nan.safetensors"), "--baseline")
    code, _, out, error = run(arguments, capsys)
    assert code == 1 and out == "" and "held-out loss is nan" in error


def assert_refused(result: tuple[int, dict[str, Any], str, str], word: str) -> None:
    """One line on stderr that names the trouble, nothing on stdout, exit code 2."""
    code, _, out, error = result
    assert code == 2 and out == "", (result, word)
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], lines


def test_the_command_itself_exits_2_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "none"), "--tier-hints"]
    result = subprocess.run([*command, str(tmp_path / "no.json")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: hints file")


def test_weights_are_the_process_s_own_memory(checkpoint: Checkpoint) -> None:
    model = load_model(str(checkpoint.folder))
    mapped = Path("/proc/self/maps").read_text()
    assert str(checkpoint.folder) not in mapped
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training


def test_a_published_model_may_carry_spare_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    state = load_file(checkpoint.folder / "model.safetensors")
    spare = {**state, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(spare, tmp_path / "model.safetensors")
    load_model(str(tmp_path))
    del state["transformer.ln_f.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lacks weights that the model needs"):
        load_model(str(tmp_path))


def test_peak_memory_is_that_of_the_run_alone() -> None:
    if not reset_peak_rss():
        pytest.skip("this system does not reset VmHWM")
    before = peak_rss()
    with mmap.mmap(-1, 64 * 2**20) as memory:  # an allocator might keep it
        memory.write(bytes(64 * 2**20))
    assert peak_rss() - before > 48 * 2**20
    reset_peak_rss()
    assert peak_rss() - before < 48 * 2**20


def test_perplexity_is_exp_of_the_mean_loss(checkpoint: Checkpoint) -> None:
    model = make_model()
    tokens = load_file(checkpoint.folder / "heldout.safetensors")["tokens"]
    with torch.no_grad():
        expected = math.exp(model(input_ids=tokens, labels=tokens).loss.item())
    device = torch.device("cpu")
    bench = ForwardBench(model, tokens, batch_size=4, warmup=0, device=device)
    assert bench.perplexity("baseline") == pytest.approx(expected, rel=1e-5)


def test_under_epsilon_predicted_and_measured_quality_are_shown(
    calibrated: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--mode", "real", "--baseline", "--epsilon", "0.02", "--budget", "HBM=1GiB,SSD=")
    code, document, text, _ = run(calibrated.arguments(*flags), capsys)
    assert code == 0
    quality = document["quality"]
    veto, measured = quality["veto"], quality["measured"]
    assert veto["epsilon_nats"] == 0.02
    assert 0 < veto["predicted_nats"] < veto["bound_nats"] <= 0.02
    assert 0 < measured["kl_nats"] <= 0.02
    assert measured["tokens"] == 6 * CONTEXT
    ratio = quality["perplexity"]["predicted"] / document["baseline"]["perplexity"]
    assert ratio == pytest.approx(math.exp(veto["predicted_nats"]))
    assert quality["perplexity"]["measured"] == document["tiered"]["perplexity"]
    assert set(quality["precisions"]) & {"int8", "int6", "int5", "int4", "int3"}
    section = text.partition("quality: precision against the full model")[2]
    for name in ("epsilon", "KL, upper bound", "KL, predicted", "KL, measured", "perplexity"):
        assert name in section


def test_a_canary_finds_out_hints_that_promise_too_much(
    calibrated: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hints = load_hints(calibrated.hints)
    blocks = {
        name: replace(hint, kl={p: kl * 1e-5 for p, kl in hint.kl.items()})
        for name, hint in hints.blocks.items()
    }
    save_hints(replace(hints, blocks=blocks), tmp_path / "hints.json")
    flags = ("--mode", "real", "--epsilon", "2e-5", "--canary", "1", "--budget", "HBM=1GiB,SSD=")
    hopeful = replace(calibrated, hints=tmp_path / "hints.json")
    code, document, text, _ = run(hopeful.arguments(*flags), capsys)
    assert code == 0
    canary, measured = document["quality"]["canary"], document["quality"]["measured"]
    assert canary["floors_raised"] > 0
    # The joint check, each time that floors were raised, and after each timed pass.
    assert len(canary["measured"]) == 1 + canary["floors_raised"] + document["num_iterations"]
    assert canary["measured"][0][1] > 2e-5 >= canary["measured"][-1][0]
    assert measured["kl_nats"] <= 2e-5
    assert "floors raised" in text

    code, _, _, error = run(calibrated.arguments("--canary", "1"), capsys)
    assert code == 2 and "--canary has no effect without --epsilon" in error


def test_epsilon_without_calibration_is_refused_and_implies_the_baseline(
    checkpoint: Checkpoint, calibrated: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _, error = run(checkpoint.arguments("--epsilon", "0.02"), capsys)
    assert code == 2 and "tierhints calibrate" in error
    code, _, _, error = run(calibrated.arguments("--epsilon", "ppl=0.9"), capsys)
    assert code == 2 and "ppl=1.02" in error
    code, document, text, _ = run(calibrated.arguments("--epsilon", "ppl=1.02"), capsys)
    assert code == 0 and document["quality"]["measured"]["kl_nats"] < 0.02
    assert "give --baseline" not in text
