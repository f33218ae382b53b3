"""What every verb of tierhints keeps: exit codes, one-line errors, where its result goes, and that
Ctrl-C leaves nothing half-written.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_collect_fisher import byte_tokenizer
from test_verify_epsilon import save_model
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lib.commands.__main__ import VERBS
from lib.files import write_json
from lib.tiering import attach
from tests.integration.tiny_run import ROOT

ARGUMENTS: dict[str, str] = {
    "collect": "--model {model} --data {text} --samples 4 --sequence-length 16 "
    "--output {out}/h.json",
    "calibrate": "--model {model} --tier-hints {hints} --data {text} --samples 12 --draws 8 "
    "--sequence-length 16 --output {out}/h.json",
    "from-checkpoint": "{checkpoint} --model {model} --output {out}/h.json",
    "generate": "--model {model} --budget HBM=1MiB,SSD= --prompt abc --max-new-tokens 4",
    "serve": "--model {model} --port 0 --kv-budget 16MiB --check",
    "calibrate-requests": "--model {long} --requests {requests} --new-tokens 3 "
    "--ladder K4V4 --kv-budget 4MiB --output {out}/calibration.json",
    "doctor": "",
    "plan": "--model {model} --budget HBM=1MiB,SSD=",
    "what-if": "--model {model} --bandwidth 1,2 --budgets 50%",
    "evaluate": "--model {model} --budget HBM=,SSD= --precision int8 --data {text} --samples 4",
    "benchmark": "--model {model} --tier-hints {hints} --data {text} --samples 4 "
    "--sequence-length 16 --num-iterations 2 --warmup 0 --batch-size 2",
    "acceptance": "--model {model} --data {text} --samples 4 --sequence-length 8 --new-tokens 4",
    "frontier": "--model {model} --data {text} --samples 4 --budgets 250KiB",
    "export": "--to accelerate --tier-hints {hints} --model {model} --output {out}",
    "probe": "--quick --repeats 1 --size 32MiB --output {out}/machine.json",
    "rank-layers": "--model {model} --data {text} --samples 4 --output {out}/layers.json",
    "monitor": "{control} --once",
    "replay": "{log}",
    "report": "{run} --output {out}/report.html",
    "judge-policies": "{routes} --resident 0.25,0.5",
    "trace": "--model {mixture} --data {text} --samples 2 --sequence-length 4 --new-tokens 3 "
    "--output {out}/trace.csv.gz",
}
BAD: dict[str, dict[str, str]] = {
    "collect": {
        "--samples 0": "--samples: 0",
        "--seed -1": "--seed: -1",
        "--json {out}/h.json": "--json",
        "--save-diagonal {out}/h.json": "--save-diagonal",
    },
    "calibrate": {
        "--draws 1": "--draws: 1",
        "--seed 99999999999999999999999": "--seed: 9",
        "--json {out}/h.json": "--output",
        "--json {hints}": "--tier-hints",
    },
    "from-checkpoint": {"--hbm-threshold 2": "--hbm-threshold", "--json {out}/h.json": "--json"},
    "generate": {
        "--temperature -1": "--temperature -1.0",
        "--max-new-tokens 0": "--max-new-tokens 0",
        "--top-p 0.9": "--top-p has no effect at --temperature 0",
        "--temperature 1 --seed 99999999999999999999999": "--seed",
        "--system hi": "--system",
        "--chat": "no chat template",
        "--epsilon 0.02": "--tier-hints",
        "--budget SSD=": "budget SSD= has no HBM",
        "--budget HBM=1B": "HBM",
        "--budget HBM= --spill-dir {text}": "--spill-dir",
        "--exact often": "--exact",
        "--budget HBM=1KiB --exact": "HBM",
    },
    "serve": {
        "--kv-budget some": "'some'",
        "--kv-budget 1KiB": "1024",
        "--ladder K9V9": "K9V9",
        "--default-bound -1": "--default-bound '-1'",
        "--port 99999": "--port: 99999",
        "--host 192.0.2.1": "--host 192.0.2.1",
        "--epsilon 0.02": "--tier-hints",
        "--calibration {text}": "no calibration",
        "--calibration {text} --precision int4": "--precision int4",
        "--replicas 2": "--ray",
        "--ray --replicas 0": "--replicas: 0",
        "--ray --control {text}": "--control is of a single server",
    },
    "calibrate-requests": {
        "--requests {text}": "line 1",
        "--kv-budget 1KiB": "1024",
        "--new-tokens 0": "--new-tokens: 0",
        "--ladder K9V9": "K9V9",
    },
    "doctor": {"--speed": "--speed"},
    "plan": {"--budget HBM=many": "'many'", "--epsilon 0.02": "--tier-hints"},
    "what-if": {
        "--bandwidth fast": "--bandwidth 'fast'",
        "--budgets 0%": "--budgets '0%'",
        "--json x.png --plot x.png": "--plot",
    },
    "evaluate": {"--epsilon -1": "--epsilon '-1'", "--samples 1": "--samples 1"},
    "benchmark": {
        "--canary 1": "--canary",
        "--num-iterations 0": "--num-iterations 0",
        "--epsilon 0": "--epsilon '0'",
    },
    "acceptance": {
        "--new-tokens 1": "--new-tokens: 1",
        "--new-tokens 99": "--new-tokens 99",
        "--samples 0": "--samples: 0",
    },
    "frontier": {
        "--budgets some": "'some'",
        "--json x.png --plot x.png": "--plot",
        "--seed -1": "--seed: -1",
    },
    "export": {"--to nowhere": "--to"},
    "probe": {"--repeats none": "--repeats", "--json {out}/machine.json": "--json"},
    "rank-layers": {
        "--samples 0": "--samples: 0",
        "--seed 99999999999999999999999": "--seed",
        "--json {out}/layers.json": "--json",
    },
    "judge-policies": {
        "--resident 0": "--resident '0'",
        "--resident 0.01": "give 0.0625 or more",
        "--json {routes}": "trace",
    },
    "trace": {
        "--model {model}": "GPT2LMHeadModel has no module experts",
        "--new-tokens 99": "--new-tokens 99",
        "--samples 0": "--samples: 0",
        "--json {out}/trace.csv.gz": "--json",
    },
    "monitor": {"--budget some": "'some'", "--json {control}": "--json"},
    "replay": {
        "--budget some": "'some'",
        "--tier CXL": "--tier",
        "--policy worst": "--policy",
    },
    "report": {"--output {out}": "is a folder", "--json {out}/report.html": "--json"},
}
"""What is added to the arguments -> what the error names."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    save_model(folder / "model")
    save_mixture(folder / "mixture")
    save_long(folder / "long")
    requests = [{"prompt": f"{number} is " * 30} for number in range(2)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    save_optimizer(folder / "model", folder / "checkpoint-1")
    lines = [f"line {index}: {index**3 % 1009} jumps over {index**2}\n" for index in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    steps = [f"{step},{layer},{step % 8}\n" for step in range(40) for layer in range(2)]
    (folder / "routes.csv").write_text("step,layer,expert\n" + "".join(steps))
    write_json({"tiering": {"generate_json": False}, "run": {}}, folder / "run" / "config.json")
    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    with attach(model, budget={"HBM": "1GiB", "SSD": None}, spill_dir=folder) as runtime:
        runtime.control(log=folder / "control.jsonl", file=folder / "budget.json")
    return folder


def save_mixture(folder: Path) -> None:
    """Save a mixture of experts of the same tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "max_position_embeddings": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=258, num_local_experts=4, **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_long(folder: Path) -> None:
    """Save a model of the same tokens whose texts are long enough for compact pages."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes, **heads)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_optimizer(model_folder: Path, folder: Path) -> None:
    """Save the optimizer of one step, as the Hugging Face Trainer does."""
    model = GPT2LMHeadModel.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.named_parameters(), betas=(0.9, 0.99))
    ids = torch.arange(64).view(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    folder.mkdir()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


KINDS = ("help", "bad output", "pipe", "terminal", "json -", "writing", "early")


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """Run every verb in every way; a folder of each, with stdout, stderr, code and outputs."""
    jobs = []
    for verb in VERBS:
        for kind in (*KINDS, *BAD[verb]):
            own = folder_of(folder / "results", verb, kind)
            names = {
                "model": folder / "model",
                "mixture": folder / "mixture",
                "long": folder / "long",
                "requests": folder / "requests.jsonl",
                "hints": folder / "model" / "tier_hints.json",
                "text": folder / "text.txt",
                "checkpoint": folder / "checkpoint-1",
                "run": folder / "run",
                "routes": folder / "routes.csv",
                "log": folder / "control.jsonl",
                "control": folder / "budget.json",
                "out": own / "out",
            }
            words = [verb, *(word.format(**names) for word in ARGUMENTS[verb].split())]
            more = {
                "help": ["--help"],
                "bad output": ["--json", str(folder)],
                "json -": ["--json", "-"],
                "writing": ["--json", str(own / "out" / "document.json")],
            }
            if kind in BAD[verb]:
                (own / "out").mkdir(parents=True)
            more |= {bad: [word.format(**names) for word in bad.split()] for bad in BAD[verb]}
            jobs.append(
                {
                    "words": [*words, *more.get(kind, [])],
                    "folder": str(own),
                    "terminal": kind == "terminal",
                    "interrupt": kind if kind in ("writing", "early") else "",
                }
            )
    write_json(jobs, folder / "jobs.json")
    script = Path(__file__).with_name("fork_verbs.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder / "jobs.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "results"


def folder_of(results: Path, verb: str, kind: str) -> Path:
    """Where a verb was run in one way, or with a bad value."""
    return results / verb / kind.replace("/", "|")


def read(results: Path, verb: str, kind: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr; Ctrl-C's own echo and a terminal's line ends apart."""
    folder = folder_of(results, verb, kind)
    out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return int((folder / "code").read_text()), out.replace("\r\n", "\n"), err


@pytest.mark.parametrize("verb", VERBS)
class TestEveryVerb:
    def test_it_has_help(self, verb: str, results: Path) -> None:
        code, out, err = read(results, verb, "help")
        assert (code, err) == (0, "") and out.startswith(f"usage: tierhints {verb}")
        assert "--json" in out and "130" in out

    def test_a_bad_value_is_one_line_that_names_it_and_exit_code_2(
        self, verb: str, results: Path
    ) -> None:
        for bad, named in {"bad output": "", **BAD[verb]}.items():
            code, out, err = read(results, verb, bad)
            assert code == 2 and out == "", (bad, err)
            assert err.startswith("error: ") and err.count("\n") == 1 and named in err, (bad, err)
            written = folder_of(results, verb, bad) / "out"
            assert not [path for path in written.rglob("*") if path.is_file()]

    def test_in_a_pipe_the_last_line_is_the_document(self, verb: str, results: Path) -> None:
        code, out, err = read(results, verb, "pipe")
        *table, last = out.splitlines()
        assert code == 0, err
        assert table and isinstance(json.loads(last), dict)

    def test_on_a_terminal_there_is_a_table_alone(self, verb: str, results: Path) -> None:
        code, out, err = read(results, verb, "terminal")
        assert code == 0, err
        assert out.strip() and not any(line.startswith("{") for line in out.splitlines())

    def test_the_document_alone_goes_to_stdout(self, verb: str, results: Path) -> None:
        code, out, err = read(results, verb, "json -")
        assert code == 0, err
        assert isinstance(json.loads(out), dict) and err.strip()

    @pytest.mark.parametrize("kind", ["writing", "early"])
    def test_ctrl_c_ends_with_130_and_nothing_half_written(
        self, verb: str, kind: str, results: Path
    ) -> None:
        code, _, err = read(results, verb, kind)
        assert code == 130 or (kind == "early" and code == 0), err
        assert code == 0 or err.endswith("interrupted\n")
        written = [path for path in (results / verb / kind / "out").rglob("*") if path.is_file()]
        assert not [path for path in written if path.name.endswith(".partial")]
        for path in written:
            if path.suffix == ".json":
                json.loads(path.read_text())
