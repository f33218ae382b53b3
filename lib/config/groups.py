"""The groups of the configuration, frozen: functions take the one that they need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Device = Literal["auto", "cpu", "cuda"]


Source = Literal[
    "stdlib",
    "kinds",
    "files",
    "wikitext-2",
    "wikitext-103",
    "tiny-shakespeare",
    "tiny-stories",
    "openwebtext",
    "fineweb-edu",
]


Parallel = Literal["ddp", "fsdp2"]


PruneScoreName = Literal["adam", "saliency", "magnitude", "random"]


Signal = Literal["adam_state", "fim_trace", "fim_diag"]


FisherLabels = Literal["sampled", "data"]


Mode = Literal["emulated", "real"]


Clock = Literal["virtual", "wall"]


DtypeName = Literal["float32", "bfloat16", "float16"]


PrecisionName = Literal["native", "int8", "int6", "int5", "int4", "int3", "int2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lies, what computes it, and its seed."""

    name: str
    output_dir: str
    seed: int
    device: Device

    @property
    def directory(self) -> Path:
        """The folder of this run."""
        return Path(self.output_dir) / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The experts of each layer, and what keeps them all in use."""

    experts: int
    top_k: int  # experts per token
    expert_width: int
    balance: float  # weight of the load-balance loss; 0: off


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model; with ``pretrained``, layers, heads, width and vocabulary mean nothing."""

    pretrained: str
    layers: int
    heads: int
    width: int
    context: int  # tokens
    vocab_size: int
    dropout: float  # in [0, 0.9]
    moe: MoeConfig | None  # None: a GPT-2; else a Qwen3-MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The corpus and its tokenizer."""

    source: Source
    files: str  # path or glob, only for the source "files"
    max_mib: int
    heldout_permille: int  # of the documents
    tokenizer: str  # empty: the pretrained model's own, or a new BPE
    cache_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Gradual pruning: what goes, how much of it, and between which steps."""

    score: PruneScoreName
    scope: Literal["matrix", "global"]
    sparsity: float  # share of the prunable weights, in the end
    start_step: int
    end_step: int
    every: int  # steps between two rises of the sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimizer, its schedule, and what happens every so many steps."""

    steps: int
    batch_size: int  # sequences per micro-batch, over all processes
    accumulation: int  # micro-batches per step
    learning_rate: float  # peak
    min_lr_ratio: float  # of the peak, where the cosine ends
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    clip: float  # largest gradient norm; 0: off
    eval_every: int
    eval_sequences: int
    checkpoint_every: int  # 0: only at the end
    keep_checkpoints: bool  # a copy of each, in steps/<step>
    compile: bool
    parallel: Parallel
    prune: PruneConfig | None


class TierNumbers(NamedTuple):
    """What emulation charges one tier."""

    tier: str
    label: str
    setup_us: float
    bandwidth_gb_s: float  # 10^9 bytes per second


@dataclass(frozen=True, slots=True, kw_only=True)
class TieringConfig:
    """Signal, thresholds and execution of tiering; the flags are all off where ``enabled`` is."""

    enabled: bool
    signal: Signal
    fisher_labels: FisherLabels
    fisher_sequences: int
    attention_sequences: int  # 0: off
    hbm_threshold: float  # cumulative fraction of the weight bytes, most important first
    cpu_threshold: float  # the same, HBM's share included
    mode: Mode
    spill_dir: str  # empty: the system's folder for temporary files
    generate_json: bool
    json_output: str  # relative to the run's folder, or absolute
    inference_benchmark: bool
    look_ahead: bool  # of experts
    dwell_ms: int | None  # of the controller; None: there is none
    clock: Clock
    specs: tuple[TierNumbers, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """The inference benchmark."""

    batch_size: int
    seq_length: int
    iterations: int
    warmup: int
    dtype: DtypeName
    budget: str  # TIER=SIZE,...; empty: the hints place
    precision: PrecisionName
    epsilon: str  # nats per token, or ppl=RATIO; empty: no bound
    both_modes: bool
    exact: bool  # also write text within the budget, exactly and by streaming
    frontier: bool  # of memory, speed and quality
    allocations: bool  # compared at equal bytes
    kv_cache: bool  # compared by the precision of its layers, which are ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The endpoint."""

    model: str  # empty: the checkpoint of the run
    host: str
    port: int
    kv_budget: str
    ladder: str  # empty: all tiers
    default_bound: str
    calibration: str  # empty: none
    max_queue: int
    replicas: int  # 0: one process, without Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """The report."""

    html: bool
    dpi: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration; functions take the group they need."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tiering: TieringConfig
    bench: BenchConfig
    serve: ServeConfig
    report: ReportConfig

    @property
    def hints_path(self) -> Path:
        """Where training writes the hints and the benchmark reads them."""
        return self.run.directory / self.tiering.json_output
