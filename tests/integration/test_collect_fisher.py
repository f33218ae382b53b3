"""tierhints collect from the command line to the files it writes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lib.blocks import parameter_digest, partition_model
from lib.commands import collect as collect_fisher
from lib.commands.cli import run_main
from lib.hints import load_hints, match_hints
from lib.text.files import find_text_files, make_sequences, read_chunks

ROOT = Path(__file__).parents[2]
CONTEXT = 32


def byte_tokenizer(*, start: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, an end-of-text token, and a start token if asked."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*names, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if start else None, eos_token="</s>"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_positions=CONTEXT,
        vocab_size=258,
        bos_token_id=257,
        eos_token_id=257,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "one.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "two.txt").write_text(
        "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 20
    )
    return folder


def run(*arguments: Any) -> int:
    return run_main(lambda: collect_fisher.main([str(argument) for argument in arguments]))


def test_a_checkpoint_gets_hints_without_training(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "lib.commands", "collect"),
        *("--model", checkpoint, "--data", text, "--samples", "6", "--batch-size", "2"),
        *("--output", tmp_path / "hints.json", "--save-diagonal", tmp_path / "f.safetensors"),
        *("--json", tmp_path / "result.json", "--device", "cpu"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")

    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["tokens"], result["sequences"], result["draws"]) == (6 * CONTEXT, 6, 3)
    assert done.stdout.startswith("tier") and "HBM" in done.stdout

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    hints = load_hints(tmp_path / "hints.json")
    sizes = {block.name: block.num_bytes for block in partition_model(model)}
    assert (
        match_hints(hints, sizes, identify=partial(parameter_digest, model)).keys() == sizes.keys()
    )
    assert sum(tier["bytes"] for tier in result["tiers"].values()) == sum(sizes.values())
    assert hints.provenance["signal"] == "fisher_diag"
    assert (hints.provenance["labels"], hints.provenance["data"]) == ("sampled", str(text))
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        total = sum(file.get_tensor(name).sum().item() for name in file.keys())
    assert total == pytest.approx(result["fisher_trace"], rel=1e-5)


def test_the_same_seed_gives_the_same_hints(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", checkpoint, "--data", text, "--samples", 2)
    shown = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*common, "--seed", seed, "--output", tmp_path / name) == 0
        shown.append(load_hints(tmp_path / name))
    assert shown[0].blocks == shown[1].blocks != shown[2].blocks
    assert run(*common, "--labels", "data", "--output", tmp_path / "d") == 0
    provenance = load_hints(tmp_path / "d").provenance
    assert (provenance["labels"], provenance["tokens"]) == ("data", 2 * (CONTEXT - 1))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere.txt"], "names no file"),
        (["--data", "EMPTY"], "is empty"),
        (["--data", "BINARY"], "not UTF-8 text"),
        (["--samples", 0], "--samples: 0 is out of range: give 1 or more"),
        (["--samples", 5000], "not 5000: give more text"),
        (["--batch-size", -1], "--batch-size: -1 is out of range"),
        (["--sequence-length", CONTEXT + 1], f"2 to the model's context of {CONTEXT}"),
        (["--model", "/nowhere"], "does not exist"),
        (["--model", "NO_TOKENIZER"], "no usable tokenizer"),
        (["--output", "/proc/hints.json"], "can't be written"),
        (["--save-diagonal", "FOLDER"], "is a folder"),
        (["--hbm-threshold", "abc"], "--hbm-threshold 'abc'"),
        (["--cpu-threshold", "1.5"], "--cpu-threshold"),
        (["--hbm-threshold", "0.9"], "is above --cpu-threshold"),
        (["--device", "abacus"], "--device 'abacus' is unknown"),
        (["--device", "cpu:3"], "--device 'cpu:3' is unknown"),
        (["--seed", -1], "--seed: -1 is out of range"),
        (["--seed", 2**63], "is out of range: give 0 to 9223372036854775807"),
        (["--model", "BAD_CONFIG"], "config.json that is not valid"),
    ],
)
def test_bad_input_is_one_clear_line(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[Any],
    message: str,
) -> None:
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "BINARY").write_bytes(bytes(range(256)))
    (tmp_path / "FOLDER").mkdir()
    config = json.loads((checkpoint / "config.json").read_text()) | {"n_embd": "x"}
    (tmp_path / "BAD_CONFIG").mkdir()
    (tmp_path / "BAD_CONFIG" / "config.json").write_text(json.dumps(config))
    bare = tmp_path / "NO_TOKENIZER"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(bare)
    capsys.readouterr()
    given = [tmp_path / a if isinstance(a, str) and a.isupper() else a for a in arguments]
    defaults = ["--model", checkpoint, "--data", text, "--samples", 2]
    assert run(*defaults, "--output", tmp_path / "hints.json", *given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "hints.json").exists()


def test_corrupt_weights_fail_with_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
    model.save_pretrained(tmp_path / "bad")
    byte_tokenizer().save_pretrained(tmp_path / "bad")
    capsys.readouterr()
    common = ("--data", text, "--samples", 2, "--output", tmp_path / "hints.json")
    assert run("--model", tmp_path / "bad", *common) == 1
    assert "FloatingPointError" in capsys.readouterr().err
    assert not (tmp_path / "hints.json").exists()


def test_a_start_token_begins_each_sequence_if_the_tokenizer_adds_one(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer(start=True)
    files = find_text_files(str(text))
    tokens = make_sequences(tokenizer, read_chunks(files, seed=0), length=8, count=5, data="text")
    assert tokens.shape == (5, 8)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not (tokens[:, 1:] == tokenizer.bos_token_id).any()

    folder = tmp_path / "llama"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = ("--data", text, "--samples", 2, "--sequence-length", 16)
    assert run("--model", folder, *common, "--output", tmp_path / "hints.json") == 0
    assert "lm_head" in load_hints(tmp_path / "hints.json").blocks
    capsys.readouterr()


def test_text_is_read_once_in_chunks_that_cut_no_character(tmp_path: Path) -> None:
    content = "".join(chr(0x100 + n % 500) for n in range(40_000)) + "end"
    (tmp_path / "long.txt").write_text(content, encoding="utf-8")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.txt").write_text("more")
    files = find_text_files(str(tmp_path))
    assert [file.name for file in files] == ["more.txt", "long.txt"]
    assert find_text_files(f"{tmp_path}/**/*.txt") == files
    chunks = list(read_chunks(files, seed=0))
    assert len(chunks) == 6 and chunks != list(read_chunks(files, seed=1))
    assert sorted(chunks) == sorted(read_chunks(files, seed=1))
    long = [chunk for chunk in chunks if chunk != "more"]
    assert all(chunk in content for chunk in long)
    assert len(content) - 4 <= sum(map(len, long)) <= len(content)


def test_other_files_in_a_folder_are_skipped_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    assert list(read_chunks(find_text_files(str(tmp_path)), seed=0)) == ["words"]
    assert "b.bin" in capsys.readouterr().err
