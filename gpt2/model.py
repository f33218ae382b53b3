"""The network: a GPT-2 or a Qwen3-MoE of any size from the configuration, or the weights of a hub
id or folder.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lib.config import ModelConfig, MoeConfig
from lib.errors import InputError

from .tokenizer import first_line


def build_model(model: ModelConfig, tokenizer: Any, *, seed: int) -> Any:
    """Return a float32 causal language model on the CPU: initialised from ``seed``, or loaded from
    GPT2_PRETRAINED.

    Raises InputError for sizes that don't fit together, a tokenizer with more tokens than the model
    has, and weights that are missing or of another architecture.
    """
    if model.pretrained:
        return _load_pretrained(model, tokenizer, _dropout(model.dropout))
    _check_vocabulary(tokenizer, model.vocab_size, "GPT2_VOCAB_SIZE")
    torch.manual_seed(seed)
    return make_network(model, end_of_text=tokenizer.eos_token_id)


def make_network(model: ModelConfig, *, end_of_text: int = 0) -> Any:
    """Return a GPT2LMHeadModel, or with experts a Qwen3MoeForCausalLM, of the sizes that are
    configured, with random weights.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    _check_heads(model)
    if model.moe is not None:
        return _make_moe(model, model.moe, end_of_text=end_of_text)
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.context,
        n_embd=model.width,
        n_layer=model.layers,
        n_head=model.heads,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        **_dropout(model.dropout),
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def _make_moe(model: ModelConfig, moe: MoeConfig, *, end_of_text: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config_class: Any = Qwen3MoeConfig  # whose stub does not know head_dim
    if model.width // model.heads % 2:
        raise InputError(
            f"GPT2_WIDTH={model.width} over GPT2_HEADS={model.heads} gives heads of "
            f"{model.width // model.heads} channels, and rotary positions need an even number: "
            "change one of them"
        )
    config = config_class(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.context,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        head_dim=model.width // model.heads,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.expert_width,
        norm_topk_prob=True,
        router_aux_loss_coef=moe.balance,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    config._attn_implementation = "sdpa"
    return Qwen3MoeForCausalLM(config)


def load_model(folder: Path, *, dropout: float, attention: str = "sdpa") -> Any:
    """Load the network of a checkpoint folder in float32; raises InputError if it is damaged."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would draw on logs too, for a load of milliseconds
    network_class: Any = AutoModelForCausalLM  # whose stub does not know output_loading_info
    try:
        gpt2 = AutoConfig.from_pretrained(folder).model_type == "gpt2"
        network, report = network_class.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            **(_dropout(dropout) if gpt2 else {}),
        )
        if report["missing_keys"]:
            raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
        return network
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {folder} is damaged ({first_line(error)}): delete it to train again from "
            "the start"
        ) from error


def _check_heads(model: ModelConfig) -> None:
    if model.width % model.heads:
        raise InputError(
            f"GPT2_WIDTH={model.width} is not a multiple of GPT2_HEADS={model.heads}: change one "
            "of them"
        )


def _dropout(probability: float) -> dict[str, Any]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), probability)


def _load_pretrained(model: ModelConfig, tokenizer: Any, dropout: dict[str, Any]) -> Any:
    from transformers import AutoConfig, GPT2LMHeadModel

    name = model.pretrained
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(name, error)) from error
    if config.model_type != "gpt2":
        raise InputError(
            f"GPT2_PRETRAINED={name!r} is a {config.model_type} model: give a GPT-2 (gpt2, "
            "gpt2-medium, a folder)"
        )
    if model.context > config.n_positions:
        raise InputError(
            f"GPT2_CONTEXT={model.context} is more than the {config.n_positions} positions of "
            f"{name!r}: lower it"
        )
    _check_vocabulary(tokenizer, config.vocab_size, f"the vocabulary of {name!r}")
    network_class: Any = GPT2LMHeadModel  # whose stub does not know output_loading_info
    try:
        network, report = network_class.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            **dropout,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(_not_loadable(name, error)) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(_not_loadable(name, KeyError(f"no weights for {missing[0]}")))
    return network


def _check_vocabulary(tokenizer: Any, vocab_size: int, what: str) -> None:
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, {what} only {vocab_size}: raise it to at "
            f"least {len(tokenizer)}, or choose another DATA_TOKENIZER"
        )


def _not_loadable(name: str, error: BaseException) -> str:
    return (
        f"GPT2_PRETRAINED={name!r} can't be loaded: give a hub id that can be reached or a folder "
        "with config.json and model.safetensors, or leave it empty to train from scratch "
        f"({first_line(error)})"
    )
