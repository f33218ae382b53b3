"""tierhints generate on tiny models, from the command line to the text, the line and the JSON."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collect_fisher import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lib.blocks import parameter_digest, partition_model
from lib.commands import generate as verb
from lib.commands.cli import printable, run_main
from lib.errors import InputError
from lib.evaluation.generate import GenerationInterrupted, encode_prompt, generate
from lib.hints import ModelInfo, build_hints, save_hints
from lib.tiering import attach, load
from lib.vocabulary import Precision

ROOT = Path(__file__).parents[2]
VOCABULARY = 256
PROMPT = "def f(x):"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def tiny_llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mixtral": tiny_mixtral,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind with a tokenizer: tied fp32, sharded bf16, and experts."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folder = found[name] = tmp_path_factory.mktemp(name)
        model = make()
        for parameter in model.parameters():  # far enough apart that a text is not one byte
            if parameter.dim() > 1:
                parameter.data.mul_(8)
        model.generation_config.do_sample = True  # as many chat models say
        model.save_pretrained(folder, max_shard_size="60KB" if name == "llama" else "1GB")
        byte_tokenizer().save_pretrained(folder)
    return found


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where spill folders are made."""
    folder = tmp_path / "spill"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, Any, str]:
    """Exit code, stdout without its last line, the document, stderr."""
    code = run_main(lambda: verb.main([str(flag) for flag in flags]))
    printed, errors = capsys.readouterr()
    *text, last = printed.splitlines() or [""]
    return code, "\n".join(text), json.loads(last) if code in (0, 130) and last else None, errors


def expected_text(folder: Path, new_tokens: int) -> str:
    """What from_pretrained writes, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_the_full_model_s_within_a_fraction_of_its_memory(
    name: str,
    folders: dict[str, Path],
    temporary_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--model", folders[name], "--prompt", PROMPT, "--max-new-tokens", "12"]
    code, text, full, _ = run(capsys, *model)
    assert code == 0
    written = full["text"]
    assert written == expected_text(folders[name], 12)
    assert len(set(written)) > 2
    assert text.startswith(f"{written}\n")
    assert full["budget_bytes"] is None and full["bytes_per_token"] == 0
    assert full["tokens_per_second"] > 0 and full["first_token_seconds"] > 0

    budget = full["peak_weight_bytes"] * 3 // 4
    path = tmp_path / "out.json"
    flags = [*model, "--budget", f"HBM={budget},SSD=", "--json", path]
    code, text, document, _ = run(capsys, *flags)
    assert code == 0
    assert json.loads(path.read_text()) == document
    assert document["text"] == written
    assert document["peak_weight_bytes"] <= document["budget_bytes"] == budget
    assert document["bytes_per_token"] > 0 and document["lossless"]
    line = text.splitlines()[-1]
    for words in (f"{document['new_tokens']} tokens at", "moved per token", "bit for bit"):
        assert words in line
    assert not list(temporary_folder.iterdir())


def test_compressed_weights_have_no_bound_unless_hints_give_one(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["gpt2"], "--prompt", PROMPT, "--max-new-tokens", "4"]
    code, text, int4, _ = run(capsys, *flags, "--precision", "int4")
    assert code == 0 and not int4["lossless"]
    assert "no bound: int4 everywhere" in text.splitlines()[-1]
    hints = tmp_path / "hints.json"
    write_hints(folders["gpt2"], hints)
    flags += ["--tier-hints", hints]
    _, text, _, _ = run(capsys, *flags, "--precision", "int4")
    assert "no bound: int4 everywhere, KL predicted" in text.splitlines()[-1]
    code, text, bounded, _ = run(capsys, *flags, "--epsilon", "0.02", "--budget", "HBM=,SSD=")
    assert code == 0
    assert 0 < bounded["predicted_nats"] < bounded["bound_nats"] <= 0.02
    assert "(epsilon 0.02, predicted 0.0" in text.splitlines()[-1]


def write_hints(folder: Path, path: Path) -> None:
    """Hints by which 8 bits of a block cost 1e-4 nats, and each bit less 4.5 times as much."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks = {block.name: block for block in partition_model(model)}
    hints = build_hints(
        model=ModelInfo(
            id="tiny",
            revision="",
            class_name=type(model).__name__,
            parameter_digest=parameter_digest(model),
        ),
        provenance={"signal": "fisher_trace", "created": "2026-01-01T00:00:00+00:00"},
        num_bytes={name: block.num_bytes for name, block in blocks.items()},
        num_params={name: block.num_params for name, block in blocks.items()},
        density=dict.fromkeys(blocks, 1.0),
        signals={name: {} for name in blocks},
        reasons={},
        hbm_threshold=0.3,
        cpu_threshold=0.6,
    )
    kl = {Precision(f"int{bits}"): 1e-4 * 4.5 ** (8 - bits) for bits in (8, 6, 5, 4, 3)}
    quality = {
        "epsilon_kl": 0.02,
        "calibrated": True,
        "conformal_factor": 1.3,
        "conformal_probes": 60,
        "kernels": {"name": "any", "nats": 1e-5},
    }
    held = {name: replace(hint, kl=kl) for name, hint in hints.blocks.items()}
    save_hints(replace(hints, blocks=held, quality=quality), path)


def test_a_command_gives_the_same_text_again_unless_a_temperature_says_otherwise(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["gpt2"], "--prompt", PROMPT, "--max-new-tokens", "12"]
    greedy, again = (run(capsys, *flags)[2]["text"] for _ in range(2))
    assert greedy == again
    warm = [*flags, "--temperature", "50", "--top-p", "0.99", "--top-k", "100"]
    state = torch.random.get_rng_state()
    drawn, same = (run(capsys, *warm)[2]["text"] for _ in range(2))
    other = run(capsys, *warm, "--seed", "1")[2]["text"]
    assert drawn == same and len({greedy, drawn, other}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_chat_is_asked_in_the_tokenizer_s_template(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["gpt2"], "--prompt", "hello", "--chat", "--max-new-tokens", "2"]
    code, text, _, error = run(capsys, *flags)
    assert code == 2 and text == "" and "no chat template" in error

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = encode_prompt(tokenizer, "hello", chat=True, system="be kind")
    assert tokenizer.decode(chat[0]) == "system: be kind\nuser: hello\nassistant: "
    with pytest.raises(InputError, match="no effect without chat"):
        encode_prompt(tokenizer, "hello", system="be kind")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match="no system role"):
        encode_prompt(tokenizer, "hello", chat=True, system="be kind")

    folder = copy_folder(folders["gpt2"], tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    code, _, document, _ = run(capsys, *flags, "--model", folder, "--system", "be kind")
    assert code == 0 and document["prompt_tokens"] == chat.shape[1]


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_the_model_s_configuration_says_what_ends_the_text(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_folder(folders["llama"], tmp_path / "model")
    flags = ["--model", folder, "--prompt", PROMPT, "--max-new-tokens", "30"]
    text = run(capsys, *flags)[2]["text"]
    stop = next(char for char in text[2:] if char.isascii() and char.isalnum())
    ended = text[: text.index(stop) + 1]
    config = json.loads((folder / "generation_config.json").read_text())
    token = byte_tokenizer()(stop)["input_ids"][0]
    for ending in ({"stop_strings": [stop]}, {"eos_token_id": [255, token]}):
        (folder / "generation_config.json").write_text(json.dumps({**config, **ending}))
        _, _, document, _ = run(capsys, *flags)
        assert document["text"] == ended and document["new_tokens"] < 30


def test_a_prompt_may_come_from_stdin(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["gpt2"], "--max-new-tokens", "2", "--prompt", "-"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    code, _, document, _ = run(capsys, *flags)
    assert code == 0 and document["prompt_tokens"] == len(PROMPT)
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    code, _, _, error = run(capsys, *flags)
    assert code == 2 and "prompt of stdin is empty" in error
    for errors in ("strict", "surrogateescape"):  # what Python reads stdin with, by the locale
        bad = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", bad)
        code, _, _, error = run(capsys, *flags)
        assert code == 2 and "prompt of stdin is not UTF-8" in error


def test_a_terminal_gets_no_control_characters_of_a_text(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, document = Terminal(), {}
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr(verb, "emit", lambda table, found, path: document.update(found))
    flags = ["--model", str(folders["gpt2"]), "--prompt", PROMPT, "--max-new-tokens", "40"]
    assert verb.main([*flags, "--temperature", "50"]) == 0
    written = document["text"]
    assert written != printable(written) == shown.getvalue()


def test_one_token_is_no_tokens(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["gpt2"], "--prompt", PROMPT, "--max-new-tokens", "1"]
    code, text, _, _ = run(capsys, *flags)
    assert code == 0 and text.splitlines()[-1].startswith("1 token, ")


def test_a_text_ends_with_the_model_s_context(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folders["llama"], "--max-new-tokens", "1000", "--prompt"]
    code, _, document, _ = run(capsys, *flags, "x" * 60)
    assert code == 0 and document["new_tokens"] == 4
    code, _, _, error = run(capsys, *flags, "x" * 64)
    assert code == 2 and "64 tokens and the model a context of 64" in error


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "scripts"], "no config.json"),
        (["--budget", "HBM=1KiB,SSD="], "the smallest that works is HBM="),
        (["--budget", "SSD="], "no HBM"),
        (["--budget", "NVME=3"], "unknown tier 'NVME'"),
        (["--epsilon", "0.02"], "--epsilon needs --tier-hints"),
        (["--epsilon", "much"], "much"),
        (["--tier-hints", "nowhere.json"], "nowhere.json"),
        (["--top-p", "0.9"], "--top-p has no effect at --temperature 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p 1.5"),
        (["--temperature", "1", "--top-k", "0"], "--top-k 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--prompt", ""], "empty"),
        (["--system", "be kind"], "--system has no effect without --chat"),
        (["--seed", "-1"], "--seed: -1 is out of range: give 0 to 9223372036854775807"),
        (["--spill-dir", "README.md"], "--spill-dir README.md is no folder"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_input_is_one_line(
    flags: list[str],
    problem: str,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text, _, errors = run(
        capsys, "--model", folders["gpt2"], "--prompt", PROMPT, "--max-new-tokens", "2", *flags
    )
    *notes, error = errors.splitlines()
    assert code == 2 and text == "" and problem in error
    assert all(note.startswith("loading ") for note in notes)


def test_a_folder_without_a_tokenizer_or_weights_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_folder(folders["gpt2"], tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    flags = ["--model", folder, "--prompt", PROMPT]
    code, _, _, error = run(capsys, *flags)
    assert code == 2 and "no usable tokenizer" in error
    code, _, _, error = run(capsys, *flags, "--budget", "NVME=3")
    assert code == 2 and "unknown tier 'NVME'" in error  # what is cheap to see comes first
    (folder / "model.safetensors").unlink()
    code, _, _, error = run(capsys, *flags)
    assert code == 2 and "safetensors" in error


def test_a_hub_id_is_found_in_the_hub_s_cache(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    copy_folder(folders["gpt2"], repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--prompt", PROMPT, "--max-new-tokens", "2"]
    code, _, document, error = run(capsys, "--model", "someone/tiny", *flags)
    assert code == 0, error
    assert document["model"] == "someone/tiny" and document["new_tokens"] == 2
    code, _, _, error = run(capsys, "--model", "someone/other", *flags)
    assert code == 2 and "'someone/other' is neither a folder nor on the Hub" in error


def test_an_interrupted_text_stands_and_the_model_goes_on(folders: dict[str, Path]) -> None:
    folder = folders["gpt2"]
    model, tokenizer, pieces = load(folder), byte_tokenizer(), []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with attach(model, weights=folder, budget={"HBM": "1GiB"}) as runtime:
        whole = generate(model, tokenizer, PROMPT, runtime=runtime, max_new_tokens=60)
        with pytest.raises(GenerationInterrupted) as caught:
            generate(model, tokenizer, PROMPT, max_new_tokens=60, on_text=interrupt)
        again = generate(model, tokenizer, PROMPT, max_new_tokens=60)
    partial = caught.value.generation
    assert partial.interrupted and 0 < partial.new_tokens < 60
    assert partial.text == "".join(pieces) and whole.text.startswith(partial.text)
    assert again.text == whole.text


def test_ctrl_c_ends_with_the_line_and_leaves_no_file(
    folders: dict[str, Path], temporary_folder: Path
) -> None:
    command = [sys.executable, "-m", "lib.commands", "generate", "--model", str(folders["gpt2"])]
    command += ["--prompt", PROMPT, "--max-new-tokens", "4000", "--budget", "HBM=700KiB,SSD="]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary_folder)},
        # A job in a shell's background ignores it, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    assert first and list(temporary_folder.iterdir())
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate()
    *_, line, last = (first + rest).splitlines()
    assert process.returncode == 130, error
    assert line.startswith("interrupted after ")
    document = json.loads(last)
    assert document["interrupted"] and (first + rest).startswith(document["text"])
    assert not list(temporary_folder.iterdir())
    assert "Traceback" not in error


def test_models_that_write_no_text_are_refused() -> None:
    with pytest.raises(InputError, match="doesn't generate text"):
        generate(torch.nn.Linear(2, 2), byte_tokenizer(), "x")
    with pytest.raises(InputError, match="the tokenizer is another model's"):
        generate(tiny_llama(), byte_tokenizer(), torch.tensor([[256]]))
