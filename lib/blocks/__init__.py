"""Blocks: the managed units of a model, and the names, bytes and identity of its parameters.

A block is an attention or MLP submodule, an embedding, a norm, a head, or one expert (a slice of a
packed 3-D parameter). Every parameter element belongs to exactly one block; a tied parameter
belongs to the block that names it first, and the other modules that compute with it are listed in
``Block.modules``.
"""

from .experts import (
    EXPERTS_IMPLEMENTATION,
    is_listed_expert,
    routed_experts,
    takes_single_experts,
)
from .identity import Run, digest_samples, parameter_digest
from .parameters import (
    is_sharded,
    storage_bytes,
    unique_parameters,
    unwrap_model,
    whole_tensor,
)
from .partition import Block, BlockKind, Piece, partition_model, select_piece, tied_modules

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "Block",
    "BlockKind",
    "Piece",
    "Run",
    "digest_samples",
    "is_listed_expert",
    "is_sharded",
    "parameter_digest",
    "partition_model",
    "routed_experts",
    "select_piece",
    "storage_bytes",
    "takes_single_experts",
    "tied_modules",
    "unique_parameters",
    "unwrap_model",
    "whole_tensor",
]
