"""Payloads on one NUMA node: CXL memory and other far memory appear as a node without CPUs.

Pages are bound to the node before they are touched (``mbind``), and where they really lie is
verified afterwards (``move_pages`` without a target tells the node of each page). Both are raw
system calls: glibc has no wrappers, and libnuma is not installed everywhere.
"""

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ...errors import InputError, PlacementError
from ...units import SECTOR_BYTES
from ...vocabulary import Tier
from .base import aligned_buffer, register_store
from .host import MemoryStore
from .limits import available_memory, read_system_file

_NODES_FOLDER = Path("/sys/devices/system/node")
_SYSTEM_CALLS = {  # mbind, move_pages
    "x86_64": (237, 279),
    "aarch64": (235, 239),
}
_MPOL_BIND = 2
_MPOL_MF_STRICT, _MPOL_MF_MOVE = 1, 2
_MASK_BITS = 1024
_PAGES_PER_CALL = 65536


@register_store
class NumaStore(MemoryStore):
    """Memory of one node; by default the first one without CPUs.

    Raises InputError for a node without memory, and where there is only one node.
    """

    tier: ClassVar[Tier] = Tier.CXL

    def __init__(self, node: int | None = None, *, pinned: bool = False) -> None:
        nodes = memory_nodes()
        if len(nodes) < 2:
            raise InputError(
                "the CXL tier needs a second NUMA node with memory, and this machine has "
                f"{len(nodes)}: use another tier, or emulate this one (mode='emulated')"
            )
        far = far_nodes()
        if node is None and not far:
            raise InputError(
                f"no NUMA node is without CPUs (nodes with memory: {nodes}): name the node that is "
                "to be the CXL tier, or emulate it (mode='emulated')"
            )
        if node is not None and node not in nodes:
            raise InputError(f"NUMA node {node} has no memory here; nodes that have: {nodes}")
        self.node = far[0] if node is None else node
        super().__init__(pinned=pinned)

    def capacity_bytes(self) -> int:
        """Return the node's free memory, as far as this process may take it."""
        free = re.search(
            r"MemFree:\s+(\d+) kB", read_system_file(_node_folder(self.node) / "meminfo")
        )
        return min(int(free[1]) * 1024 if free else 0, available_memory())

    def _allocate(self, num_bytes: int) -> Tensor:
        buffer = aligned_buffer(num_bytes)
        bind_memory(buffer, self.node)
        return buffer

    def _verify(self, key: str, payload: Tensor) -> None:
        elsewhere = page_nodes(payload) - {self.node}
        if elsewhere:
            raise PlacementError(
                f"payload {key} was bound to NUMA node {self.node}, and pages of it lie on "
                f"{sorted(elsewhere)}: give the CXL tier a smaller budget"
            )


def memory_nodes() -> list[int]:
    """Return the NUMA nodes that have memory; empty where the kernel doesn't tell."""
    folders = _NODES_FOLDER.glob("node[0-9]*")
    nodes = {
        int(folder.name.removeprefix("node")): read_system_file(folder / "meminfo")
        for folder in folders
    }
    return sorted(node for node, text in nodes.items() if re.search(r"MemTotal:\s+[1-9]", text))


def far_nodes() -> list[int]:
    """Return the NUMA nodes that have memory and no CPUs."""
    return [
        node
        for node in memory_nodes()
        if not read_system_file(_node_folder(node) / "cpulist").strip()
    ]


def bind_memory(buffer: Tensor, node: int) -> None:
    """Make a page-aligned buffer's pages come from a node, and nowhere else; those that are there
    already move. Raises PlacementError where the kernel refuses.
    """
    mask = (ctypes.c_ulong * (_MASK_BITS // 8 // ctypes.sizeof(ctypes.c_ulong)))()
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // word_bits] = 1 << node % word_bits
    _call(
        0,
        f"bind memory to NUMA node {node}",
        ctypes.c_void_p(buffer.data_ptr()),
        ctypes.c_ulong(len(buffer)),
        ctypes.c_int(_MPOL_BIND),
        mask,
        ctypes.c_ulong(_MASK_BITS),
        ctypes.c_uint(_MPOL_MF_STRICT | _MPOL_MF_MOVE),
    )


def page_nodes(buffer: Tensor) -> set[int]:
    """Return the nodes on which a buffer's pages lie; negative numbers are errors, such as -ENOENT
    for pages that weren't touched yet. Raises PlacementError where the kernel refuses.
    """
    start = buffer.data_ptr()
    found: set[int] = set()
    for first in range(0, len(buffer), _PAGES_PER_CALL * SECTOR_BYTES):
        last = min(first + _PAGES_PER_CALL * SECTOR_BYTES, len(buffer))
        addresses = range(start + first, start + last, SECTOR_BYTES)
        status = (ctypes.c_int * len(addresses))()
        _call(
            1,
            "tell where pages lie",
            ctypes.c_int(0),  # this process
            ctypes.c_ulong(len(addresses)),
            (ctypes.c_void_p * len(addresses))(*addresses),
            None,  # to move nothing
            status,
            ctypes.c_int(0),
        )
        found.update(status)
    return found


def _call(which: int, purpose: str, *arguments: object) -> None:
    numbers = _SYSTEM_CALLS.get(platform.machine())
    if numbers is None:
        raise PlacementError(
            f"NUMA memory is not supported on {platform.machine()}, only on "
            f"{', '.join(_SYSTEM_CALLS)}: emulate the CXL tier (mode='emulated')"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(ctypes.c_long(numbers[which]), *arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise PlacementError(
            f"the kernel doesn't {purpose} ({reason}): a container needs the capability SYS_NICE, "
            "and the node must be among those that this process may use (Mems_allowed in "
            "/proc/self/status)"
        )


def _node_folder(node: int) -> Path:
    return _NODES_FOLDER / f"node{node}"
