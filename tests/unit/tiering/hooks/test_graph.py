"""What the graph of a compiled decoding step becomes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lib.codecs import ops
from lib.codecs.records import Codec, encode
from lib.tiering.hooks.graph import DecodingPass
from lib.vocabulary import Precision

CODEC = Codec(Precision.INT4, 64)


def rewrite(function: Callable[..., Any], *inputs: Any) -> tuple[list[str], Any]:
    """Return the operators of the rewritten graph of a function, and what it computes."""
    with torch.no_grad():
        traced = make_fx(function, tracing_mode="fake")(*inputs)
        DecodingPass()(traced.graph)
        traced.graph.lint()
        traced.graph.eliminate_dead_code()
        traced.recompile()
        names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
        return names, traced(*inputs)


def count(names: list[str], name: str) -> int:
    return sum(each.startswith(name) for each in names)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    batch, groups, length, size = key.shape
    times = query.shape[1] // groups
    repeated = (
        each[:, :, None].expand(batch, groups, times, length, size).reshape(batch, -1, length, size)
        for each in (key, value)
    )
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *repeated, attn_mask=mask
    )[0]
    return attended


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [8, 32])
def test_heads_that_share_keys_attend_without_copies_of_them(batch: int, size: int) -> None:
    query, mask = torch.randn(batch, 6, 1, size), torch.randn(batch, 1, 1, 16)
    key, value = torch.randn(2, batch, 2, 16, size)
    names, attended = rewrite(attend, query, key, value, mask)
    ours = size == 32 and ops.prepare("cpu") == "native"
    assert count(names, "tierhints.attend" if ours else "aten._scaled_dot") == 1
    assert not count(names, "aten.expand") and not count(names, "aten.clone")
    torch.testing.assert_close(attended, attend(query, key, value, mask))
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(attended, expected)


def test_heads_with_keys_of_their_own_attend_with_our_kernel() -> None:
    query, (key, value) = torch.randn(2, 6, 1, 64), torch.randn(2, 2, 6, 40, 64)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, scale=0.3
        )[0]
        return attended

    names, attended = rewrite(plain, query, key, value)
    assert count(names, "tierhints.attend") == (ops.prepare("cpu") == "native")
    torch.testing.assert_close(attended, plain(query, key, value))


def test_a_mask_of_one_element_is_left_to_torch() -> None:
    query, (key, value) = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 2, 9, 32)
    names, attended = rewrite(attend, query, key, value, torch.zeros(2, 1, 1, 1))
    assert not count(names, "tierhints.attend")
    torch.testing.assert_close(attended, attend(query, key, value, torch.zeros(2, 1, 1, 1)))


@pytest.mark.parametrize("case", ["a mask for each head", "two queries"])
def test_other_attention_stays_as_it_is(case: str) -> None:
    heads, length = 6, 2 if case == "two queries" else 1
    query = torch.randn(1, heads, length, 8)
    key, value = torch.randn(2, 1, 2, 16, 8)
    mask = torch.randn(1, heads if case == "a mask for each head" else 1, length, 16)
    names, attended = rewrite(attend, query, key, value, mask)
    assert torch.equal(attended, attend(query, key, value, mask))
    assert names[-1] == "<built-in function getitem>"


def test_matrices_with_the_same_activations_are_one_call() -> None:
    ops.prepare("cpu")
    rows = [64, 32, 32, 48, 80, 24]
    records = [encode(torch.randn(n, 64), CODEC) for n in rows]
    bias = torch.randn(32)
    layout = ops.layout_arguments(CODEC.layout(1, 64))[1:]

    def linear(x: Tensor, record: Tensor, bias: Tensor | None, n: int) -> Tensor:
        y: Tensor = torch.ops.tierhints.linear(x, record, bias, n, *layout, 1 << 16)
        return y

    def step(x: Tensor, records: list[Tensor], bias: Tensor) -> Tensor:
        a, b, c = records[:3]
        down = linear(x, a, None, 64)
        others = linear(x, b, bias, 32), linear(x, c, None, 32)
        ups = linear(down, records[3], None, 48), linear(down, records[4], None, 80)
        return torch.cat([*others, *ups, linear(down * 2, records[5], None, 24)], -1)

    x = torch.randn(2, 1, 64)
    names, found = rewrite(step, x, records, bias)
    assert count(names, "tierhints.linears") == 2 and count(names, "tierhints.linear.") == 1
    assert torch.equal(found, step(x, records, bias))
