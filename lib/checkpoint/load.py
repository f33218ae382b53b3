"""Building the model of a folder as transformers' from_pretrained does, without its weights.

``load`` takes each thing from where from_pretrained takes it: the class from config.json or the
caller, the dtype from config.json or the checkpoint, what stays in fp32 from the class, what is
tied from config and checkpoint, the settings of generate() from generation_config.json. Weights
come later, by ``attach(model, weights=folder)``; models that are loaded with them are in
``models``.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import InputError
from .empty import empty_weights
from .fit import check_weights, kept_in_fp32, refuse_quantized_config, separate_ties
from .source import CheckpointSource, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    folder: str | Path,
    model_class: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """Build the model that ``model_class.from_pretrained(folder)`` gives, without memory for its
    weights: ``attach(model, weights=folder, ...)`` reads them from the folder's safetensors files.

    ``model_class`` is a class of transformers or its name, AutoModelForCausalLM and the like
    included; by default the architecture that config.json names. ``dtype`` and
    ``attn_implementation`` are from_pretrained's.

    Raises InputError for a folder without config.json or safetensors files, a checkpoint that is
    quantized or of another model, and a class that can't be built from it.
    """
    source = CheckpointSource(folder)
    if (Path(folder) / "adapter_config.json").is_file():
        raise InputError(
            f"model folder {str(folder)!r} has an adapter beside its weights: merge it "
            "(merge_and_unload()), save the model to another folder, and give that one"
        )
    model = build_empty_model(
        folder,
        model_class,
        dtype=dtype,
        checkpoint_dtype=source.first_dtype(),
        attn_implementation=attn_implementation,
    )
    source = open_checkpoint(model, folder)
    check_weights(model, source)
    separate_ties(model, source)
    computed = "|".join(model._keys_to_ignore_on_load_missing or ()) or "$^"
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in source and re.search(computed, name):
            raise InputError(
                f"{name!r} is in no checkpoint of a {type(model).__name__}, transformers computes "
                "it: load this model with from_pretrained, and attach without weights="
            )
        shape = source.shape(name)
        if shape != tensor.shape:
            raise InputError(
                f"checkpoint {folder}: {name!r} is {tuple(shape)}, the model of config.json wants "
                f"{tuple(tensor.shape)}: give the folder of one model"
            )
    return model


def build_empty_model(
    folder: str | Path,
    model_class: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    checkpoint_dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """Build a model like ``load`` from config.json alone; ``checkpoint_dtype`` is the dtype where
    ``dtype`` and config.json say none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"model folder {str(folder)!r} has no config.json: give a checkpoint's folder"
        )
    from transformers import initialization

    refuse_quantized_config(folder)
    try:
        built, config = _find_class(folder, model_class)
        config.name_or_path = str(folder)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        chosen = _resolve_dtype(dtype, config, checkpoint_dtype)
        # Random weights would be computed for meta tensors, too, by Python code that imports
        # torch._dynamo: guarded functions leave parameters that are marked as they are.
        with empty_weights(), initialization.guard_torch_init_functions():
            model = built._from_config(config, dtype=chosen)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {str(folder)!r} can't be built: {first_line(error)}") from error
    for _, tensor in kept_in_fp32(model, model.config.dtype):
        tensor.data = tensor.data.to(torch.float32)
    for parameter in model.parameters():  # from_pretrained makes new ones, whatever flags they had
        parameter.requires_grad_(parameter.is_floating_point())
    if model.can_generate():
        model.generation_config = _read_generation_config(folder)
    return cast("PreTrainedModel", model.eval())


def read_config(model: str | Path, config_class: Any = None) -> Any:
    """Read a folder's or a Hub id's configuration; OSError, ValueError and KeyError are
    transformers' own, InputError is for a file whose values aren't valid.
    """
    from transformers import AutoConfig

    try:
        return (config_class or AutoConfig).from_pretrained(model)
    except (OSError, ValueError, KeyError):
        raise  # the caller says what is wrong with the name or the folder
    except Exception as error:  # what a field may raise is up to each model's configuration
        reason = " ".join(str(error).split())
        raise InputError(
            f"model {str(model)!r} has a config.json that is not valid, correct it: {reason}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _find_class(folder: str | Path, given: Any) -> tuple[Any, Any]:
    """Return the model's class and its configuration."""
    import transformers
    from transformers.models.auto import auto_factory

    factory: Any = auto_factory
    if isinstance(given, str):
        found: Any = getattr(transformers, given, None)
        if found is None:
            raise InputError(f"model_class {given!r} is not a class of transformers: give one")
        given = found
    if hasattr(given, "_from_config"):
        return given, read_config(folder, given.config_class)
    config = read_config(folder)
    if given is None:
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        given = getattr(transformers, names[0], None)
        if given is None:
            raise InputError(
                f"model {str(folder)!r} has the architecture {names[0]!r}, which transformers "
                "doesn't have: give a model_class, or build the model inside empty_weights()"
            )
        if hasattr(given, "_from_config"):
            return given, config
    mapping = given._model_mapping
    if type(config) not in mapping:
        raise InputError(
            f"model {str(folder)!r} ({config.model_type}) is not supported by {given.__name__}: "
            f"give another model_class, such as {(config.architectures or ['AutoModel'])[0]}"
        )
    built = factory._get_model_class(config, mapping)
    text = config.sub_configs.get("text_config")
    if text is not None and built.config_class == text:
        config = config.get_text_config()  # the language model of one that sees as well
    return built, config


def _resolve_dtype(dtype: str | torch.dtype, config: Any, fallback: torch.dtype) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or fallback
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise InputError(
            f"dtype {dtype!r} is unknown: give 'auto', or a dtype of torch such as 'bfloat16'"
        )
    return found


def _read_generation_config(folder: str | Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # older folders have these settings in config.json
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
