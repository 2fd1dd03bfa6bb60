# SPDX-License-Identifier: Apache-2.0
"""Attention over the store: per-query lengths, hidden intervals, GQA, key splits, and slots that hold NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdllm.kernels.attention import reference

pytestmark = pytest.mark.pairwise

# (W, H, K, D, keys): a single query, ragged tiles, GQA 1, 4 and 7, head sizes that are no power of two.
SHAPES = [(1, 1, 1, 64, 1), (5, 4, 1, 60, 63), (33, 2, 1, 16, 111), (32, 2, 2, 128, 111), (8, 7, 1, 64, 130)]


def inputs(W: int, H: int, K: int, D: int, keys: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Two of three store rows, in reverse order, their numbers not side by side; limits ragged; slots past every limit hold
    NaN in the kernel's store."""
    q = torch.randn(2, W, H, D).to(dtype)
    k, v = (torch.randn(3, K, keys + 7, D).to(dtype) for _ in range(2))
    limit = torch.randint(1, keys + 1, (2, W))
    q, k, v, row, limit = (x.to(device) for x in (q, k, v, torch.tensor([2, 9, 0, 9]), limit))
    return [q, k, v, row[::2], limit]


def poisoned(store: Tensor, row: Tensor, limit: Tensor, hide: Tensor | None) -> Tensor:
    """NaN wherever no query may look."""
    store = store.clone()
    used = torch.zeros(store.shape[0], store.shape[2], dtype=torch.bool, device=store.device)
    for r, b in enumerate(row.tolist()):
        used[b, : limit[r].max()] = True
        if hide is not None:
            used[b, hide[r, 0] : hide[r, 1]] = False
    return store.masked_fill(~used[:, None, :, None], float("nan"))


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    limit: Tensor,
    hide: Tensor | None,
    scale: float,
    swap: Tensor | None = None,
) -> Tensor:
    """One query and head at a time, in float64."""
    R, W, H, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for r in range(R):
        for w in range(W):
            start, stop, instead = (0, 0, 0) if swap is None else swap[r, w].tolist()
            seen = {j for j in range(limit[r, w]) if not start <= j < stop} | set(range(instead, instead + stop - start))
            seen = sorted(j for j in seen if hide is None or not hide[r, 0] <= j < hide[r, 1])
            for h in range(H if seen else 0):
                kv = h // (H // k.shape[1])
                score = k[row[r], kv, seen].double() @ q[r, w, h].double() * scale
                out[r, w, h] = score.softmax(0) @ v[row[r], kv, seen].double()
    return out


@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_reference_against_float64(assert_close, hidden: bool) -> None:
    q, k, v, row, limit = inputs(5, 4, 2, 12, 20, torch.float32, torch.device("cpu"))
    hide = torch.tensor([[3, 9], [4, 4]]) if hidden else None
    assert_close(reference.attention(q, k, v, row, limit, 20, hide), naive(q, k, v, row, limit, hide, 12**-0.5), 1e-6)


def test_reference_dense_is_the_same_without_a_mask(assert_close) -> None:
    q, k, v, row, limit = inputs(5, 4, 2, 12, 20, torch.float32, torch.device("cpu"))
    limit = torch.full_like(limit, 20)
    want = reference.attention(q, k, v, row, limit, 20)
    assert_close(reference.attention(q, k, v, row, limit, 20, dense=True), want, 1e-6)


@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_reference_of_rows_that_see_alike_is_that_of_each_alone(assert_close, hidden: bool) -> None:
    """Rows of unequal length, each with one limit for all its queries, one of them with none of its slots in sight; NaN
    beyond each."""
    q, k, v, _, _ = inputs(5, 4, 2, 12, 20, torch.float32, torch.device("cpu"))
    q, row = torch.cat([q, q]), torch.tensor([2, 0, 1, 0])
    limit = torch.tensor([[20], [7], [1], [0]]).expand(4, 5).contiguous()
    hide = torch.tensor([[3, 9], [9, 12], [0, 1], [0, 0]]) if hidden else None
    want = naive(q, k, v, row, limit, hide, 12**-0.5)
    for r in range(4):
        here = slice(r, r + 1)
        alone = [x if x is None else x[here] for x in (row, limit, hide)]
        k1, v1 = (poisoned(x, *alone) for x in (k, v))
        assert_close(reference.attention(q[here], k1, v1, *alone[:2], 20, alone[2]), want[here], 1e-6)
    out = reference.attention(q, k, v, row, limit, 20, hide)
    assert_close(out, want, 1e-6)
    for r in range(4):
        here = slice(r, r + 1)
        alone = reference.attention(q[here], k, v, row[here], limit[here], 20, hide if hide is None else hide[here])
        assert torch.equal(out[here], alone)


def test_reference_reads_nothing_on_the_host_but_on_a_cpu() -> None:
    """A tensor on this device has no values to read."""
    given = inputs(5, 4, 2, 12, 20, torch.float32, torch.device("meta"))
    assert reference.attention(*given, 20, torch.zeros(2, 2, dtype=torch.long, device="meta")).shape == (2, 5, 4, 12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_kernel(
    device: torch.device, assert_close, shape: tuple[int, ...], hidden: bool, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.attention import triton

    keys = shape[-1]
    q, k, v, row, limit = inputs(*shape, dtype, device)
    hide = torch.tensor([[keys // 3, keys // 2], [0, 0]], device=device) if hidden else None
    want = reference.attention(q, k, v, row, limit, keys, hide)
    out = triton.attention(q, poisoned(k, row, limit, hide), poisoned(v, row, limit, hide), row, limit, keys, hide)
    assert out.dtype == dtype
    assert_close(out, want, ratio)


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
@pytest.mark.parametrize("few", [0, 8])
def test_splits_do_not_change_the_result(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, assert_close, splits: int, hidden: bool, few: int
) -> None:
    """Splits that get no key included: 3 visible keys over 8 splits."""
    from fastdllm.kernels.attention import triton

    monkeypatch.setattr(triton, "FEW_TILES", few)
    q, k, v, row, limit = inputs(5, 4, 2, 64, 100, torch.float32, device)
    limit[1] = 3
    hide = torch.tensor([[0, 40], [0, 0]], device=device) if hidden else None
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    out = triton.launch(q, k, v, row, limit, 100, hide, 0.3, **tile)
    assert_close(out, naive(q, k, v, row, limit, hide, 0.3), 2e-6)


def swaps(W: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Limits and swaps of a pass with shadows: the first half of the queries sees what lies before two thirds of the keys;
    each of the others has one to three of those slots replaced by slots of its own from there on, some as the very last."""
    common = max(1, 2 * keys // 3)
    swap = torch.zeros(2, W, 3, dtype=torch.long)
    for r in range(2):
        for w in range(W // 2, W):
            n = min(1 + (w + r) % 3, common, keys - common)
            start = (7 * w + r) % (common - n + 1)
            instead = keys - n if w % 4 == 3 else common + (5 * w) % (keys - common - n + 1)
            swap[r, w] = torch.tensor([start, start + n, instead])
    limit = torch.randint(1, common + 1, (2, W))
    limit[:, W // 2 :] = common
    return limit.to(device), swap.to(device)


def test_reference_with_swapped_slots_against_float64(assert_close) -> None:
    q, k, v, row, _ = inputs(9, 4, 2, 12, 20, torch.float32, torch.device("cpu"))
    limit, swap = swaps(9, 20, torch.device("cpu"))
    for hide in (None, torch.tensor([[3, 9], [4, 4]])):
        out = reference.attention(q, k, v, row, limit, 20, hide, swap=swap)
        assert_close(out, naive(q, k, v, row, limit, hide, 12**-0.5, swap), 1e-6)
    nothing = reference.attention(q, k, v, row, limit, 20, swap=torch.zeros_like(swap))
    assert_close(nothing, reference.attention(q, k, v, row, limit, 20), 1e-6)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 2], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
def test_kernel_with_swapped_slots(
    device: torch.device, assert_close, shape: tuple[int, ...], hidden: bool, dtype: torch.dtype, ratio: float
) -> None:
    from fastdllm.kernels.attention import triton

    keys = shape[-1]
    q, k, v, row, _ = inputs(*shape, dtype, device)
    limit, swap = swaps(shape[0], keys, device)
    hide = torch.tensor([[keys // 3, keys // 2], [0, 0]], device=device) if hidden else None
    want = reference.attention(q, k, v, row, limit, keys, hide, swap=swap)
    edge = torch.full_like(limit, keys)  # nothing beyond the keys is read
    out = triton.attention(q, poisoned(k, row, edge, hide), poisoned(v, row, edge, hide), row, limit, keys, hide, swap=swap)
    assert_close(out, want, ratio)


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("few", [0, 8])
def test_splits_with_swapped_slots(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, assert_close, splits: int, few: int
) -> None:
    """The own slots of a query lie in another split than all else it sees."""
    from fastdllm.kernels.attention import triton

    monkeypatch.setattr(triton, "FEW_TILES", few)
    q, k, v, row, _ = inputs(7, 4, 2, 64, 100, torch.float32, device)
    limit, swap = swaps(7, 100, device)
    limit[1] = 3
    swap[1, 3:] = torch.tensor([1, 3, 98], device=device)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    out = triton.launch(q, k, v, row, limit, 100, None, 0.3, swap, **tile)
    assert_close(out, naive(q, k, v, row, limit, None, 0.3, swap), 2e-6)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("few", [0, 8])
def test_a_query_that_sees_nothing_gives_zeros(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, splits: int, few: int
) -> None:
    from fastdllm.kernels.attention import triton

    monkeypatch.setattr(triton, "FEW_TILES", few)
    q, k, v, row, limit = inputs(5, 2, 1, 16, 40, torch.float32, device)
    hide = torch.tensor([[0, 40], [0, 10]], device=device)
    limit[1] = torch.tensor([40, 10, 11, 1, 40], device=device)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    outs = [reference.attention(q, k, v, row, limit, 40, hide), triton.launch(q, k, v, row, limit, 40, hide, None, **tile)]
    for out in outs:
        assert (out[0] == 0).all() and (out[1, [1, 3]] == 0).all()
        assert out.isfinite().all() and (out[1, [0, 2, 4]] != 0).any(-1).all()


def in_groups(counts: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Queries of rows with so many each, one after the other: the row of each, and groups of up to `size`; an empty one."""
    member = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    total, groups = len(member), []
    for row in range(len(counts)):
        own = (member == row).nonzero()[:, 0].tolist()
        groups += [own[i : i + size] for i in range(0, len(own), size)]
    return member, torch.tensor([[*group, *[total] * (size - len(group))] for group in [*groups, []]])


@pytest.mark.parametrize("counts", [[1], [5, 0, 13], [3, 8, 1, 7]], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["open", "hide"])
@pytest.mark.parametrize("H, K, D, keys", [(2, 1, 16, 40), (7, 1, 64, 130), (4, 4, 60, 63)])
def test_queries_in_groups_are_those_of_each_alone(
    device: torch.device, assert_close, counts: list[int], hidden: bool, H: int, K: int, D: int, keys: int
) -> None:
    from fastdllm.kernels.attention import triton

    member, together = in_groups(counts, 4)
    order = torch.randperm(len(counts))  # a row's place in the store is not its place among the queries
    q, limit = torch.randn(len(member), 1, H, D), torch.randint(0, keys + 1, (len(member), 1))
    k, v = (torch.randn(len(counts), K, keys + 7, D) for _ in range(2))
    hide = torch.tensor([[keys // 3, keys // 2], [0, 0], [0, 3], [0, keys]])[member] if hidden else None
    q, k, v, limit, together, row = (x.to(device) for x in (q, k, v, limit, together, order[member]))
    hide = hide if hide is None else hide.to(device)
    want = naive(q, k, v, row, limit, hide, D**-0.5)
    assert_close(reference.attention(q, k, v, row, limit, keys, hide, together=together), want, 1e-6)
    assert_close(triton.attention(q, k, v, row, limit, keys, hide, together=together), want, 2e-6)
    for splits in (1, 3):
        tile = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
        out = triton.launch(q, k, v, row, limit, keys, hide, None, together=together, **tile)
        assert_close(out, want, 2e-6)


def test_block_causal_limits(device: torch.device, assert_close) -> None:
    """A wide pass whose queries see up to the end of their own block: whole key tiles need no mask, others do."""
    from fastdllm.kernels.attention import triton

    q, k, v, row, _ = inputs(48, 2, 1, 32, 48, torch.float32, device)
    limit = ((torch.arange(48, device=device) // 16 + 1) * 16).expand(2, 48)
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
    out = triton.launch(q, k, v, row, limit, 48, None, None, **tile)
    assert_close(out, reference.attention(q, k, v, row, limit, 48), 2e-6)


def test_keys_bounds_what_is_read(device: torch.device, assert_close) -> None:
    """A limit above `keys` does not read past it."""
    from fastdllm.kernels.attention import triton

    q, k, v, row, limit = inputs(5, 2, 1, 16, 40, torch.float32, device)
    k[:, :, 24:], v[:, :, 24:] = float("nan"), float("nan")
    want = reference.attention(q, k, v, row, torch.full_like(limit, 24), 24)
    assert_close(triton.attention(q, k, v, row, torch.full_like(limit, 40), 24), want, 2e-6)


@pytest.mark.parametrize(
    "layout", ["plain", "overlapping", "slots_first", "heads_last", "slot_by_row", "one_row", "halves", "shared"]
)
def test_slots_of_stores_of_any_strides(layout: str) -> None:
    """Rows that overlap, slots further apart than rows, heads next to slots, every second number, one row for all."""
    numbers = torch.randn(4000)
    store = {
        "plain": numbers[8:1448].view(4, 3, 15, 8),
        "overlapping": numbers[5:].as_strided((4, 3, 15, 8), (5 * 8, 40 * 8, 8, 1)),
        "slots_first": numbers[:1440].view(15, 4, 3, 8).permute(1, 2, 0, 3),
        "heads_last": numbers[:1440].view(4, 15, 3, 8).transpose(1, 2),
        "slot_by_row": numbers.as_strided((4, 3, 15, 8), (3 * 8, 900, 2 * 8, 1)),
        "one_row": numbers[:360].view(1, 3, 15, 8),
        "halves": numbers[:2880].view(4, 3, 15, 16)[..., 8:],
        "shared": numbers[:360].view(1, 3, 15, 8).expand(4, 3, 15, 8),
    }[layout]
    row = torch.tensor([3, 0, 3]).clamp(max=len(store) - 1)
    slot = torch.randint(15, (3, 20))
    assert torch.equal(reference.slots_of(store, row, slot), store[row[:, None], :, slot].transpose(1, 2))


def test_tilings_cover_the_device() -> None:
    """A LLaDA or Dream block at batch 1 fills 132 multiprocessors; a batch that fills them alone is not split."""
    from fastdllm.kernels.attention import triton

    device = torch.device("cpu")  # taken for an H100
    for tiles, packed in ((32, 32), (4, 32 * 7), (16, 8 * 7), (8, 16)):
        for keys in (511, 1023, 1256):
            t = triton.tiling(tiles, packed, keys, 128, 2, device)
            assert tiles * -(-packed // t["BLOCK_M"]) * t["SPLITS"] >= (120 if keys > 511 else 64)
    assert triton.tiling(32 * 32, 32, 1256, 128, 2, device)["SPLITS"] == 1
    assert triton.tiling(32, 1256, 1256, 128, 2, device)["SPLITS"] == 1


def test_where_tiles_fill_a_part_of_the_device_only_long_keys_are_split() -> None:
    """A split that finds a few dozen keys costs more than it saves."""
    from fastdllm.kernels.attention import triton

    device = torch.device("cpu")  # taken for an H100
    splits = [triton.tiling(16 * 4, 8 * 7, keys, 128, 2, device)["SPLITS"] for keys in (160, 384, 1256)]
    assert splits == [1, 1, 2]


def test_tiles_have_the_rows_that_the_matrix_unit_takes() -> None:
    """In 16 bits, with heads that leave room for it in the registers."""
    from fastdllm.kernels.attention import triton

    device = torch.device("cpu")  # taken for an H100
    rows = [triton.tiling(32 * 32, 32, 1256, *of, device)["BLOCK_M"] for of in ((64, 2), (128, 2), (256, 2), (64, 4))]
    assert rows == [64, 64, 32, 32]


def test_pipelines_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of keys and values on their way take no more shared memory than there is, on a card with 100 KB too."""
    from fastdllm.kernels import device as devices
    from fastdllm.kernels.attention import triton

    device = torch.device("cpu")
    for room in (232448, 166912, 101376):
        monkeypatch.setattr(devices, "shared_memory", lambda _, room=room: room)
        for channels, itemsize in ((16, 2), (128, 2), (256, 2), (128, 4)):
            for tiles, packed in ((2, 32), (32, 32), (4, 224), (32, 1256)):
                t = triton.tiling(tiles, packed, 1256, channels, itemsize, device)
                used = 2 * t["BLOCK_N"] * channels * itemsize * t["num_stages"]
                assert used <= room or t["num_stages"] == 2


def test_tiles_go_from_the_end_where_all_keys_fit_the_cache() -> None:
    """The last queries of causal blocks see most."""
    from fastdllm.kernels.attention import hopper_wide

    store = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)  # only its heads and formats count
    assert hopper_wide.longest_first(store.expand(4, 4, 1024, 128), 4, 1024)
    assert not hopper_wide.longest_first(store.expand(4, 32, 1256, 128), 4, 1256)


@pytest.mark.gpu
def test_store_beyond_two_to_the_31_elements(assert_close) -> None:
    """Row offsets need 64 bits: 2 rows of 32 heads, 300,000 slots of 128 in bf16 are 2.5e9 elements."""
    from fastdllm.kernels.attention import triton

    device = torch.device("cuda")
    store = torch.zeros(2, 32, 300_000, 128, dtype=torch.bfloat16, device=device)
    q = torch.randn(1, 8, 32, 128, device=device).bfloat16()
    store[1, :, 299_900:] = torch.randn(32, 100, 128, device=device).bfloat16()
    row, limit = torch.tensor([1], device=device), torch.full((1, 8), 300_000, device=device)
    hide = torch.tensor([[0, 299_900]], device=device)
    out = triton.attention(q, store, store, row, limit, 300_000, hide)
    small = store[1:, :, 299_900:].clone()
    want = reference.attention(q, small, small, torch.zeros_like(row), torch.full_like(limit, 100), 100)
    assert_close(out, want, 8e-3)
