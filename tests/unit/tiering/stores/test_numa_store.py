import pytest
from byte_payloads import KEY, SIZE, only_node_store, payload

from lib.errors import InputError, PlacementError
from lib.tiering.stores import NumaStore, aligned_buffer, memory_nodes, numa
from lib.units import SECTOR_BYTES


def test_one_numa_node_is_no_far_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "memory_nodes", lambda: [0])
    with pytest.raises(InputError, match="needs a second NUMA node.*has 1.*emulate"):
        NumaStore()
    monkeypatch.setattr(numa, "memory_nodes", lambda: [0, 1])
    with pytest.raises(InputError, match=r"NUMA node 7 has no memory here.*\[0, 1\]"):
        NumaStore(7)
    monkeypatch.setattr(numa, "far_nodes", list)
    with pytest.raises(InputError, match="no NUMA node is without CPUs"):
        NumaStore()


def test_pages_on_another_node_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = only_node_store(monkeypatch)
    monkeypatch.setattr(numa, "page_nodes", lambda _: {store.node, 3})
    with pytest.raises(PlacementError, match=rf"bound to NUMA node {store.node}.*\[3\]"):
        store.put(KEY, SIZE, [payload()])
    assert not store.has(KEY)


def test_a_kernel_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlacementError, match="NUMA node 1000"):
        numa.bind_memory(aligned_buffer(SECTOR_BYTES), 1000)
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    with pytest.raises(PlacementError, match="not supported on vax"):
        numa.bind_memory(aligned_buffer(SECTOR_BYTES), 0)


@pytest.mark.numa
@pytest.mark.skipif(len(memory_nodes()) < 2, reason="one NUMA node: there is no far memory here")
def test_each_node_gets_its_pages() -> None:
    for node in memory_nodes():
        store = NumaStore(node)
        store.put(KEY, SIZE, [payload()])
        assert numa.page_nodes(store.view(KEY)) == {node}
        store.close()
