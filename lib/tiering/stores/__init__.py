"""Places outside fast memory that keep payloads by key: one file per kind, ``base`` says what a
store is. What the bytes mean is in ``payload``.
"""

from .base import (
    CHUNK_BYTES,
    NUM_READERS,
    PIECE_BYTES,
    STORES,
    Store,
    StoreOptions,
    aligned_buffer,
    byte_view,
    register_store,
    served_tiers,
)
from .device import DeviceStore
from .file import FileStore
from .folders import MEMORY_FILESYSTEMS, default_spill_folder, filesystem_type
from .host import HostStore, MemoryStore
from .limits import available_memory, memory_limit, total_memory
from .numa import NumaStore, far_nodes, memory_nodes
from .records import KeptRecords
from .residuals import STAGING_BYTES, ResidualStore

__all__ = [
    "CHUNK_BYTES",
    "MEMORY_FILESYSTEMS",
    "NUM_READERS",
    "PIECE_BYTES",
    "STAGING_BYTES",
    "STORES",
    "DeviceStore",
    "FileStore",
    "HostStore",
    "KeptRecords",
    "MemoryStore",
    "NumaStore",
    "ResidualStore",
    "Store",
    "StoreOptions",
    "aligned_buffer",
    "available_memory",
    "byte_view",
    "default_spill_folder",
    "far_nodes",
    "filesystem_type",
    "memory_limit",
    "memory_nodes",
    "register_store",
    "served_tiers",
    "total_memory",
]
