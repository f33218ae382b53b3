"""From evaluated Kconfig symbols to the groups: numbers that are strings, checks over two."""

import re
from pathlib import Path

from ..errors import InputError
from ..kconfig import Symbols, check_effective, load_assignments, open_kconfig
from ..units import parse_thresholds
from .groups import (
    BenchConfig,
    Clock,
    Config,
    DataConfig,
    Device,
    DtypeName,
    FisherLabels,
    Mode,
    ModelConfig,
    MoeConfig,
    Parallel,
    PrecisionName,
    PruneConfig,
    PruneScoreName,
    ReportConfig,
    RunConfig,
    ServeConfig,
    Signal,
    Source,
    TieringConfig,
    TierNumbers,
    TrainConfig,
)

_DEVICES: dict[str, Device] = {
    "RUN_DEVICE_AUTO": "auto",
    "RUN_DEVICE_CPU": "cpu",
    "RUN_DEVICE_CUDA": "cuda",
}


_SOURCES: dict[str, Source] = {
    "DATA_STDLIB": "stdlib",
    "DATA_KINDS": "kinds",
    "DATA_FILES": "files",
    "DATA_WIKITEXT_2": "wikitext-2",
    "DATA_WIKITEXT_103": "wikitext-103",
    "DATA_TINY_SHAKESPEARE": "tiny-shakespeare",
    "DATA_TINY_STORIES": "tiny-stories",
    "DATA_OPENWEBTEXT": "openwebtext",
    "DATA_FINEWEB_EDU": "fineweb-edu",
}


_FAMILIES = {"MODEL_GPT2": False, "MODEL_QWEN3_MOE": True}
"""Whether the model has experts."""


_PARALLEL: dict[str, Parallel] = {"TRAIN_DDP": "ddp", "TRAIN_FSDP2": "fsdp2"}


_PRUNE_SCORES: dict[str, PruneScoreName] = {
    "TRAIN_PRUNE_ADAM": "adam",
    "TRAIN_PRUNE_SALIENCY": "saliency",
    "TRAIN_PRUNE_MAGNITUDE": "magnitude",
    "TRAIN_PRUNE_RANDOM": "random",
}


_SIGNALS: dict[str, Signal] = {
    "TIERING_ADAM_STATE": "adam_state",
    "TIERING_FIM_TRACE": "fim_trace",
    "TIERING_FIM_DIAG": "fim_diag",
}


_FISHER_LABELS: dict[str, FisherLabels] = {
    "HINTS_FISHER_SAMPLED_LABELS": "sampled",
    "HINTS_FISHER_DATA_LABELS": "data",
}


_MODES: dict[str, Mode] = {"TIERING_EMULATED": "emulated", "TIERING_REAL_OFFLOAD": "real"}


_CLOCKS: dict[str, Clock] = {"TIERING_CLOCK_VIRTUAL": "virtual", "TIERING_CLOCK_WALL": "wall"}


_DTYPES: dict[str, DtypeName] = {
    "BENCH_FLOAT32": "float32",
    "BENCH_BFLOAT16": "bfloat16",
    "BENCH_FLOAT16": "float16",
}


_PRECISIONS: dict[str, PrecisionName] = {
    "BENCH_PRECISION_NATIVE": "native",
    "BENCH_PRECISION_INT8": "int8",
    "BENCH_PRECISION_INT6": "int6",
    "BENCH_PRECISION_INT5": "int5",
    "BENCH_PRECISION_INT4": "int4",
    "BENCH_PRECISION_INT3": "int3",
    "BENCH_PRECISION_INT2": "int2",
}


def load_config(path: Path | str = ".config") -> Config:
    """Evaluate a .config file against the Kconfig files; raises InputError on anything amiss."""
    kconf = open_kconfig()
    assignments = load_assignments(kconf, path)
    check_effective(kconf, assignments)
    return build_config(Symbols(kconf, path, assignments))


def build_config(symbols: Symbols) -> Config:
    """Make the dataclasses from evaluated symbols, reading every one; raises InputError."""
    config = Config(
        run=_run(symbols),
        model=_model(symbols),
        data=_data(symbols),
        train=_train(symbols),
        tiering=_tiering(symbols),
        bench=BenchConfig(
            batch_size=symbols.integer("BENCH_BATCH_SIZE"),
            seq_length=symbols.integer("BENCH_SEQ_LENGTH"),
            iterations=symbols.integer("BENCH_ITERATIONS"),
            warmup=symbols.integer("BENCH_WARMUP"),
            dtype=symbols.option(_DTYPES),
            budget=symbols.text("BENCH_BUDGET"),
            precision=symbols.option(_PRECISIONS),
            epsilon=symbols.text("BENCH_EPSILON"),
            both_modes=symbols.flag("BENCH_BOTH_MODES"),
            exact=symbols.flag("BENCH_EXACT"),
            frontier=symbols.flag("BENCH_FRONTIER"),
            allocations=symbols.flag("BENCH_ALLOCATIONS"),
            kv_cache=symbols.flag("BENCH_KV_CACHE"),
        ),
        serve=ServeConfig(
            model=symbols.text("SERVE_MODEL"),
            host=symbols.text("SERVE_HOST"),
            port=symbols.integer("SERVE_PORT"),
            kv_budget=symbols.text("SERVE_KV_BUDGET"),
            ladder=symbols.text("SERVE_LADDER"),
            default_bound=symbols.text("SERVE_DEFAULT_BOUND"),
            calibration=symbols.text("SERVE_CALIBRATION"),
            max_queue=symbols.integer("SERVE_MAX_QUEUE"),
            replicas=symbols.integer("SERVE_REPLICAS"),
        ),
        report=ReportConfig(html=symbols.flag("REPORT_HTML"), dpi=symbols.integer("REPORT_DPI")),
    )
    if not config.model.pretrained and config.bench.seq_length > config.model.context:
        raise InputError(
            f"{symbols.label('BENCH_SEQ_LENGTH')}={config.bench.seq_length} is more than the model "
            f"can read: give at most GPT2_CONTEXT, which is {config.model.context}"
        )
    return config


def _run(symbols: Symbols) -> RunConfig:
    name = symbols.text("RUN_NAME")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{symbols.label('RUN_NAME')} {name!r} is not a folder name: use letters, digits, "
            f"dots, dashes and underscores, the first a letter or digit"
        )
    return RunConfig(
        name=name,
        output_dir=symbols.text("RUN_OUTPUT_DIR"),
        seed=symbols.integer("RUN_SEED"),
        device=symbols.option(_DEVICES),
    )


def _model(symbols: Symbols) -> ModelConfig:
    config = ModelConfig(
        pretrained=symbols.text("GPT2_PRETRAINED"),
        layers=symbols.integer("GPT2_LAYERS"),
        heads=symbols.integer("GPT2_HEADS"),
        width=symbols.integer("GPT2_WIDTH"),
        context=symbols.integer("GPT2_CONTEXT"),
        vocab_size=symbols.integer("GPT2_VOCAB_SIZE"),
        dropout=symbols.integer("GPT2_DROPOUT_PCT") / 100,
        moe=_moe(symbols),
    )
    if config.width % config.heads:
        raise InputError(
            f"{symbols.label('GPT2_WIDTH')}={config.width} is not a multiple of GPT2_HEADS, "
            f"which is {config.heads}: change one of them (64 channels per head are usual)"
        )
    return config


def _moe(symbols: Symbols) -> MoeConfig | None:
    config = MoeConfig(
        experts=symbols.integer("MOE_EXPERTS"),
        top_k=symbols.integer("MOE_TOP_K"),
        expert_width=symbols.integer("MOE_EXPERT_WIDTH"),
        balance=symbols.number("MOE_BALANCE", "[0, 10]", example="0.01"),
    )
    if config.top_k > config.experts:
        raise InputError(
            f"{symbols.label('MOE_TOP_K')}={config.top_k} is more than MOE_EXPERTS, which is "
            f"{config.experts}: lower it"
        )
    return config if symbols.option(_FAMILIES) else None


def _data(symbols: Symbols) -> DataConfig:
    config = DataConfig(
        source=symbols.option(_SOURCES),
        files=symbols.text("DATA_FILES_GLOB"),
        max_mib=symbols.integer("DATA_MAX_MIB"),
        heldout_permille=symbols.integer("DATA_HELDOUT_PERMILLE"),
        tokenizer=symbols.text("DATA_TOKENIZER"),
        cache_dir=symbols.text("DATA_CACHE_DIR"),
    )
    if config.source == "files" and not config.files:
        raise InputError(
            f"{symbols.label('DATA_FILES_GLOB')} is empty: give a file, a folder or a glob, or "
            f"choose another corpus"
        )
    return config


def _train(symbols: Symbols) -> TrainConfig:
    config = TrainConfig(
        steps=symbols.integer("TRAIN_STEPS"),
        batch_size=symbols.integer("TRAIN_BATCH_SIZE"),
        accumulation=symbols.integer("TRAIN_ACCUMULATION"),
        learning_rate=symbols.number("TRAIN_LEARNING_RATE", "(0, 1]", example="0.001"),
        min_lr_ratio=symbols.integer("TRAIN_MIN_LR_PCT") / 100,
        warmup_steps=symbols.integer("TRAIN_WARMUP_STEPS"),
        weight_decay=symbols.number("TRAIN_WEIGHT_DECAY", "[0, 10]", example="0.1"),
        beta1=symbols.number("TRAIN_BETA1", "[0, 1)", example="0.9"),
        beta2=symbols.number("TRAIN_BETA2", "[0, 1)", example="0.99"),
        clip=symbols.number("TRAIN_CLIP", "[0, inf)", example="1.0"),
        eval_every=symbols.integer("TRAIN_EVAL_EVERY"),
        eval_sequences=symbols.integer("TRAIN_EVAL_SEQUENCES"),
        checkpoint_every=symbols.integer("TRAIN_CHECKPOINT_EVERY"),
        keep_checkpoints=symbols.flag("TRAIN_KEEP_CHECKPOINTS"),
        compile=symbols.flag("TRAIN_COMPILE"),
        parallel=symbols.option(_PARALLEL),
        prune=_prune(symbols),
    )
    if config.warmup_steps > config.steps:
        raise InputError(
            f"{symbols.label('TRAIN_WARMUP_STEPS')}={config.warmup_steps} is more than "
            f"TRAIN_STEPS, which is {config.steps}: a tenth of it is usual"
        )
    return config


def _prune(symbols: Symbols) -> PruneConfig | None:
    steps = symbols.integer("TRAIN_STEPS")
    start_step = steps * symbols.integer("TRAIN_PRUNE_START_PCT") // 100
    config = PruneConfig(
        score=symbols.option(_PRUNE_SCORES),
        scope="global" if symbols.flag("TRAIN_PRUNE_GLOBAL") else "matrix",
        sparsity=symbols.integer("TRAIN_PRUNE_SPARSITY_PCT") / 100,
        start_step=start_step,
        end_step=max(start_step + 1, steps * symbols.integer("TRAIN_PRUNE_END_PCT") // 100),
        every=symbols.integer("TRAIN_PRUNE_EVERY"),
    )
    if not symbols.flag("TRAIN_PRUNE"):
        return None
    start, end = (symbols.integer(f"TRAIN_PRUNE_{name}_PCT") for name in ("START", "END"))
    if start >= end:
        raise InputError(
            f"{symbols.label('TRAIN_PRUNE_START_PCT')}={start} is not below TRAIN_PRUNE_END_PCT, "
            f"which is {end}: 20 and 70 are usual"
        )
    return config


def _tiering(symbols: Symbols) -> TieringConfig:
    hbm_threshold, cpu_threshold = parse_thresholds(
        symbols.text("TIERING_HBM_THRESHOLD"),
        symbols.text("TIERING_CPU_THRESHOLD"),
        names=(symbols.label("TIERING_HBM_THRESHOLD"), symbols.label("TIERING_CPU_THRESHOLD")),
    )
    cpu_numbers = "CXL" if symbols.flag("TIERING_CPU_IS_CXL") else "CPU"
    json_output = symbols.text("TIERING_JSON_OUTPUT")
    if not json_output:
        raise InputError(
            f"{symbols.label('TIERING_JSON_OUTPUT')} is empty: give a path, for example "
            f"tier_hints.json"
        )
    dwell_ms = symbols.integer("TIERING_DWELL_MS")
    return TieringConfig(
        enabled=symbols.flag("ENABLE_HIERARCHICAL_TIERING"),
        signal=symbols.option(_SIGNALS),
        fisher_labels=symbols.option(_FISHER_LABELS),
        fisher_sequences=symbols.integer("HINTS_FISHER_SEQUENCES"),
        attention_sequences=symbols.integer("HINTS_ATTENTION_SEQUENCES"),
        hbm_threshold=hbm_threshold,
        cpu_threshold=cpu_threshold,
        mode=symbols.option(_MODES),
        spill_dir=symbols.text("TIERING_SPILL_DIR"),
        generate_json=symbols.flag("TIERING_GENERATE_JSON"),
        json_output=json_output,
        inference_benchmark=symbols.flag("TIERING_INFERENCE_BENCHMARK"),
        look_ahead=symbols.flag("TIERING_LOOK_AHEAD"),
        dwell_ms=dwell_ms if symbols.flag("TIERING_CONTROLLER") else None,
        clock=symbols.option(_CLOCKS),
        specs=tuple(
            TierNumbers(
                tier=tier,
                label=numbers,
                setup_us=float(symbols.integer(f"TIERING_{numbers}_SETUP_US")),
                bandwidth_gb_s=symbols.integer(f"TIERING_{numbers}_BANDWIDTH_MB_S") / 1000,
            )
            for tier, numbers in (
                ("HBM", "HBM"),
                ("CPU", cpu_numbers),
                ("SSD", "SSD"),
                ("CXL", "CXL"),
            )
        ),
    )
