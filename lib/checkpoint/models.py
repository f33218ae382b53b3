"""Models as a user names them: a Hub id or a folder, perhaps with a file of other weights.

Whatever is wrong with what the user names raises InputError with one line. Models come back on the
CPU, in the checkpoint's own dtype, in evaluation mode (no dropout).
"""

from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Loaded = tuple[Any, dict[str, Any]]
"""A model, and the report of what did not match while it was loaded."""


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
        raise InputError(f"model {model!r} {problem}: {first_line(error)}") from error
    if checkpoint is None:
        report["unexpected_keys"] = ()  # published checkpoints carry spare heads and old buffers
    _check_report(report, str(checkpoint or model))
    own_memory(loaded)
    return cast("PreTrainedModel", loaded.eval())


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
    """Silence the warnings of transformers, and its progress bars unless ``progress``."""
    from transformers import utils

    logging: Any = utils.logging
    logging.set_verbosity_error()
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    # Where torchao is installed, transformers imports it, and it warns of other machines' kernels.
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)


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
            f"checkpoint {path} can't be read: {first_line(error)}; save it again"
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


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
