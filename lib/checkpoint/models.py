"""Models as a user names them: a Hub id or a folder, perhaps with a file of other weights.

Whatever is wrong with what the user names raises InputError with one line. Models come back on the
CPU, in the checkpoint's own dtype, in evaluation mode (no dropout).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError
from .files import PLAIN_DTYPES
from .fit import quantization_kind, refuse_codes
from .load import first_line, read_config
from .source import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Loaded = tuple[Any, dict[str, Any]]
"""A model, and the report of what did not match while it was loaded."""


def load_model(model: str, checkpoint: Path | None = None) -> "PreTrainedModel":
    """Load a causal language model; its weights from ``checkpoint`` if one is given.

    A weight that is missing or of another shape is an error, and in ``checkpoint`` so is one that
    the model does not know; a tied weight may be absent. Quantized weights and encoders are
    refused. The weights' memory is the process's own, no mapping of the file.
    """
    check_model_name(model)
    try:
        with _held_log() as held:
            loaded, report = _load(model, checkpoint)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        problem = (
            "can't be loaded" if Path(model).is_dir() else "is neither a folder nor on the Hub"
        )
        raise InputError(f"model {model!r} {problem}: {first_line(error)}") from error
    if checkpoint is None:
        report["unexpected_keys"] = ()  # published checkpoints carry spare heads and old buffers
    _check_report(report, str(checkpoint or model))
    _refuse_quantized(loaded, model, checkpoint)
    own_memory(loaded)
    loaded.eval()
    _refuse_encoder(loaded, model)
    for record in held:
        getLogger(record.name).handle(record)
    return cast("PreTrainedModel", loaded)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating parameters in place, a tied one once.

    Buffers stay as they are, as in a model that transformers loads in ``dtype``: rotary frequencies
    in 16 bits would make it another model.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def own_memory(model: torch.nn.Module) -> None:
    """Copy the weights out of the mapped file that transformers leaves them in.

    There they would be page cache, which the system may drop and read again: neither the time nor
    the memory of a forward pass would be that of a model held in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def quiet_transformers(*, progress: bool) -> None:
    """Silence the progress bars of transformers unless ``progress``, and torchao's warnings."""
    from transformers import utils

    logging: Any = utils.logging
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    # Where torchao is installed, transformers imports it, and it warns of other machines' kernels.
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)


@contextmanager
def _held_log() -> Iterator[list[LogRecord]]:
    """Keep what transformers logs back: where loading fails, one error says why."""
    from transformers import utils

    utils.logging.get_logger()  # makes the handler
    held: list[LogRecord] = []

    def keep(record: LogRecord) -> bool:
        held.append(record)
        return False

    handlers = [*getLogger("transformers").handlers, *getLogger().handlers]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield held
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def check_model_name(model: str) -> None:
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
    config = read_config(model)
    if state is None:
        model_class: Any = AutoModelForCausalLM
        loaded = model_class.from_pretrained(model, config=config, dtype="auto", **report)
        return cast(_Loaded, loaded)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model {model!r} ({config.model_type}) is not a causal language model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtype = _main_dtype(state)
    return cast(
        _Loaded,
        model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **report),
    )


def _refuse_quantized(loaded: Any, model: str, checkpoint: Path | None) -> None:
    """Refuse what transformers has not dequantized, and codes that it took for weights."""
    kinds = {parameter.dtype for parameter in loaded.parameters()} - PLAIN_DTYPES
    if kinds or getattr(loaded, "hf_quantizer", None) is not None:
        raise InputError(
            f"model {model!r} is quantized ({quantization_kind(model)}): dequantize() it with "
            "transformers, save it to another folder, and give that one"
        )
    saved = checkpoint or Path(model)
    if quantization_kind(model) is None and (
        saved.suffix == ".safetensors" or any(saved.glob("*.safetensors*"))
    ):
        refuse_codes(loaded, open_checkpoint(loaded, saved))


def _refuse_encoder(loaded: Any, model: str) -> None:
    """Refuse a model whose outputs depend on later tokens: it predicts what it has seen."""
    count = loaded.get_input_embeddings().num_embeddings
    ids = torch.arange(count - 1, count - 9, -1)[None] % count  # padding is at the other end
    other = ids.clone()
    other[0, -1] = (count - 9) % count
    with torch.inference_mode():
        first, second = (loaded(input_ids=each).logits[:, :-1].float() for each in (ids, other))
    moved = float((first - second).abs().max() / first.std())
    # Experts that get one token more may round otherwise; attention to it does more than that.
    noise = 1e-4 if loaded.dtype == torch.float32 else 0.05
    if moved > (0.0 if getattr(loaded.config, "is_decoder", True) is False else noise):
        raise InputError(
            f"model {model!r} ({type(loaded).__name__}) is not a causal language model: its "
            "outputs change with later tokens, as an encoder's do; give a decoder (one of "
            "an encoder's class has is_decoder in its config.json)"
        )


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
            f"checkpoint {path} can't be read: {first_line(error)}; save it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the unpickler do
        raise InputError(
            f"checkpoint {path} is not a file of plain tensors (truncated, or pickled objects): "
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
