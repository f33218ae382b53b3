"""Models and held-out text as a user names them on a command line.

A model is a Hub id or a folder, perhaps with a file of other weights. Whatever is wrong with what
the user names raises InputError with one line. Models come back on the CPU, in the checkpoint's own
dtype, in evaluation mode (no dropout).
"""

import platform
import re
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gpt2.sources import open_source
from lib.config import DataConfig
from lib.errors import InputError
from scripts.text import find_text_files, make_sequences, read_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELDOUT_FILE = "heldout.safetensors"
_STDLIB = DataConfig(
    source="stdlib", files="", max_mib=32, heldout_permille=5, tokenizer="", cache_dir=""
)
"""So few documents that a model trained with a larger held-out part has not seen them either."""
_STDLIB_TOKENS = 65_536
_SHARED_RUN = 32
"""Equal tokens in a row that make two texts the same; boilerplate is shorter."""
_DEFAULT_LENGTH = 512
_Loaded = tuple[Any, dict[str, Any]]
"""A model, and the report of what did not match while it was loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutText:
    """Tokens that the model was not trained on: int64, (sequences, length), on the CPU."""

    tokens: Tensor
    source: str


def parse_device(name: str) -> torch.device:
    """Return the device of ``--device``; ``auto`` is the GPU where there is one."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name!r} is unknown: give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    _, _, index = name.partition(":")
    if name != "cpu" and int(index or 0) >= count:
        raise InputError(f"--device {name!r} is not there ({count} CUDA devices): give cpu")
    return torch.device(name)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating parameters in place, a tied one once.

    Buffers stay as they are, as in a model that transformers loads in ``dtype``: rotary frequencies
    in 16 bits would make it another model.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def quiet_transformers(*, progress: bool) -> None:
    """Silence the warnings of transformers, and its progress bars unless ``progress``."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    # Where torchao is installed, transformers imports it, and it warns of other machines' kernels.
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)


def load_model(model: str, checkpoint: Path | None = None) -> "PreTrainedModel":
    """Load a causal language model; its weights from ``checkpoint`` if one is given.

    A weight that is missing or of another shape is an error, and in ``checkpoint`` so is one that
    the model does not know; a tied weight may be absent. The weights' memory is the process's own,
    no mapping of the file.
    """
    _check_model_name(model)
    try:
        loaded, report = _load(model, checkpoint)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        problem = (
            "can't be loaded" if Path(model).is_dir() else "is neither a folder nor on the Hub"
        )
        raise InputError(f"model {model!r} {problem}: {_first_line(error)}") from error
    if checkpoint is None:
        report["unexpected_keys"] = ()  # published checkpoints carry spare heads and old buffers
    _check_report(report, str(checkpoint or model))
    own_memory(loaded)
    return cast("PreTrainedModel", loaded.eval())


def build_empty_model(folder: str | Path) -> "PreTrainedModel":
    """Build a causal language model from a folder's config.json, without memory for its weights.

    ``lib.tiering.attach(model, weights=folder)`` gives them. InputError for a folder without one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.tiering import empty_weights

    if not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"model folder {str(folder)!r} has no config.json: give a checkpoint's folder"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        with empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model {str(folder)!r} can't be built: {_first_line(error)}") from error
    return cast("PreTrainedModel", model.eval())


def own_memory(model: torch.nn.Module) -> None:
    """Copy the weights out of the mapped file that transformers leaves them in.

    There they would be page cache, which the system may drop and read again: neither the time nor
    the memory of a forward pass would be that of a model held in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def load_heldout(model: str, *, vocab_size: int, length: int) -> HeldOutText:
    """Return sequences of ``length``: the model folder's own held-out tokens, else library text."""
    path = Path(model) / HELDOUT_FILE
    tokens, source = _read_heldout(path) if path.exists() else _tokenize_stdlib(model)
    per_row = tokens.shape[1] // length
    if not per_row or not len(tokens):
        raise InputError(
            f"held-out text ({source}) has rows of {tokens.shape[1]} tokens: "
            f"--seq-length {length} must not be longer"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if not 0 <= low <= high < vocab_size:
        raise InputError(
            f"held-out tokens ({source}) lie in {low}..{high}, the model's vocabulary in "
            f"0..{vocab_size - 1}: they were made by another tokenizer"
        )
    tokens = tokens[:, : per_row * length].reshape(-1, length).contiguous()
    return HeldOutText(tokens=tokens, source=source)


def load_library_text(model: str, *, length: int) -> HeldOutText:
    """Return sequences of held-out documents of the standard library, by the model's tokenizer.

    Those that share a run of ``_SHARED_RUN`` tokens with the model folder's own held-out tokens are
    left out: what those were used for has not seen these.
    """
    tokens, source = _tokenize_stdlib(model)
    rows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    path = Path(model) / HELDOUT_FILE
    if path.exists():
        seen = {run for row in _read_heldout(path)[0].tolist() for run in _runs(row)}
        new = [seen.isdisjoint(_runs(row)) for row in rows.tolist()]
        rows, source = rows[torch.tensor(new)], f"{source}, without the model's held-out text"
    return HeldOutText(tokens=rows, source=source)


def _runs(row: list[int]) -> set[tuple[int, ...]]:
    """Return all runs of ``_SHARED_RUN`` tokens of a row."""
    return {tuple(row[start : start + _SHARED_RUN]) for start in range(len(row) - _SHARED_RUN + 1)}


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a hub id or folder; InputError for one that knows no words."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        # A folder without tokenizer files gives one of the model type that knows no words.
        usable = bool(tokenizer("text", add_special_tokens=False)["input_ids"])
        reason = "its vocabulary is empty"
    except (OSError, ValueError, KeyError) as error:
        usable, reason = False, " ".join(str(error).split())[:200]
    if not usable:
        raise InputError(
            f"--model {model!r} has no usable tokenizer ({reason}): add its tokenizer files"
        )
    return tokenizer


def sequence_length(config: Any, asked: int | None) -> int:
    """Return the sequence length to use, within the model's context; raises InputError."""
    context = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if asked < 2 or (context is not None and asked > context):
        raise InputError(
            f"--sequence-length {asked} must be from 2 to the model's context of {context} tokens"
        )
    return asked


def read_text(
    model: str, data: str | None, *, vocab_size: int, length: int, count: int, seed: int
) -> HeldOutText:
    """Return at most ``count`` sequences of the user's text, or of ``load_heldout`` without one.

    The user's text is drawn from all over its files by ``seed``. What a short one lacks is said on
    stdout; how few are too few is for the caller to say.
    """
    if data is None:
        text = load_heldout(model, vocab_size=vocab_size, length=length)
        return HeldOutText(tokens=text.tokens[:count], source=text.source)
    chunks = read_chunks(find_text_files(data), seed=seed)
    tokenizer = load_tokenizer(model)
    tokens = make_sequences(tokenizer, chunks, length=length, count=count, data=data)
    if len(tokens) < count:
        print(f"{data} holds {len(tokens)} sequences of {length} tokens, not {count}: all are used")
    return HeldOutText(tokens=tokens, source=data)


def _check_model_name(model: str) -> None:
    """Refuse what transformers would look for on the network, or answer with a page of text."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model folder {model!r} has no config.json: give the folder of a checkpoint, or a "
                "Hub id with its owner, such as openai-community/gpt2"
            )
        return
    local = not model or folder.is_file() or folder.is_absolute() or model.startswith(".")
    beside = folder.parent != Path(".") and folder.parent.is_dir()
    if local or beside or model.count("/") > 1:
        raise InputError(
            f"model folder {model!r} does not exist: give a folder with config.json, or a Hub id"
        )


def _load(model: str, checkpoint: Path | None) -> _Loaded:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    # Other shapes are listed instead of raised, so that one place words all that is wrong.
    report: Any = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    state = None if checkpoint is None else _read_state(checkpoint)
    config = _load_config(model)
    if state is None:
        model_class: Any = AutoModelForCausalLM
        loaded = model_class.from_pretrained(model, config=config, dtype="auto", **report)
        return cast(_Loaded, loaded)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model {model!r} ({config.model_type}) is no causal language model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtype = _main_dtype(state)
    return cast(
        _Loaded,
        model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **report),
    )


def _load_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        raise  # load_model says what is wrong with the name or the folder
    except Exception as error:  # what a field may raise is up to each model's configuration
        reason = " ".join(str(error).split())
        raise InputError(
            f"model {model!r} has a config.json that is not valid, correct it: {reason}"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: give a .safetensors or .pt file")
    if path.suffix not in {".safetensors", ".pt"}:
        raise InputError(
            f"checkpoint {path}: unknown kind {path.suffix!r}; allowed: .safetensors, .pt"
        )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    named = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named or not state:
        raise InputError(
            f"checkpoint {path} must map parameter names to tensors: save model.state_dict()"
        )
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"checkpoint {path} can't be read: {_first_line(error)}; save it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the unpickler do
        raise InputError(
            f"checkpoint {path} is no file of plain tensors (truncated, or pickled objects): "
            "save model.state_dict()"
        ) from error


def _main_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Return the floating dtype that holds most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _check_report(report: dict[str, Any], origin: str) -> None:
    """Refuse a load in which transformers made up, dropped or replaced a weight."""
    problems = {
        "lacks weights that the model needs": report["missing_keys"],
        "has weights that the model does not know": report["unexpected_keys"],
        "has weights of another shape": [entry[0] for entry in report["mismatched_keys"]],
        "has weights that can't be converted": report["error_msgs"],
    }
    for problem, names in problems.items():
        if names:
            some = ", ".join(sorted(map(str, names))[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(
                f"{origin} {problem} ({len(names)}: {some}): give a checkpoint of this model"
            )


def _read_heldout(path: Path) -> tuple[Tensor, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tokens = file.get_tensor("tokens").clone()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"held-out tokens {path} can't be read: {_first_line(error)}; train again"
        ) from error
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        shape = tuple(tokens.shape)
        raise InputError(
            f"held-out tokens {path} are {tokens.dtype} {shape}, expected int64 (sequences, length)"
        )
    return tokens, f"held-out split of {metadata.get('corpus', 'the training corpus')}"


def _tokenize_stdlib(model: str) -> tuple[Tensor, str]:
    """Tokenize documents of the standard library with the model's own tokenizer, as one row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{_no_text(model)} ({_first_line(error)})") from error
    ids: list[int] = []
    for document in open_source(_STDLIB).documents():
        if document.heldout:
            ids += tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= _STDLIB_TOKENS:
            break
    if not ids:  # transformers makes an empty tokenizer of a folder without a tokenizer's files
        raise InputError(_no_text(model))
    source = f"part of the Python {platform.python_version()} standard library"
    return torch.tensor([ids], dtype=torch.int64), source


def _no_text(model: str) -> str:
    return (
        f"model {model!r} has neither {HELDOUT_FILE} nor a tokenizer, so there is no text to "
        "measure on: add its tokenizer's files"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
