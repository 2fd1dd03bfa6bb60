# SPDX-License-Identifier: Apache-2.0
"""Packed passes: what each row gets by itself, in one forward a round."""

import pytest
import torch

import fastdllm
from fastdllm.engine.forwards import groups
from fastdllm.engine.forwards import packed as forward_packed
from fastdllm.forward import PIECE, Window
from fastdllm.runners import cuda_graph
from tests.random_models import FAMILIES, prompts, random_model
from tests.runners.test_bucketing import emulated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths, spare", [((13, 8, 1, 32), 0), ((16, 0, 7), 5), ((0, 0), 2), ((9,), 0), ((40, 40), 3)])
def test_a_packed_forward_is_each_row_s_own(family: str, lengths: tuple[int, ...], spare: int) -> None:
    network = random_model(family).network
    rows, width, scratch = len(lengths), max(1, *lengths), 63
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(0, network.spec.vocab, (rows, width), generator=generator)
    length = torch.tensor(lengths)
    start = torch.randint(0, 20, (rows, 1), generator=generator)
    pos = start + torch.arange(width)
    pos = torch.where(torch.arange(width) < length[:, None], pos, scratch)
    limit = torch.randint(1, 60, (rows, width), generator=generator)
    hide = torch.tensor([[5, 9], [0, 0], [30, 31], [1, 2]])[:rows]
    order = torch.randperm(rows, generator=generator)  # a row's place in the store is not its place in the forward

    def store():
        kept = network.new_store(rows, scratch + 1)
        kept.k.normal_(generator=torch.Generator().manual_seed(1))
        kept.v.normal_(generator=torch.Generator().manual_seed(2))
        return kept

    with torch.inference_mode():
        got_store, want_store = store(), store()
        window = Window(order, pos, limit, scratch + 1, hide=hide)
        count = max(1, sum(lengths) + spare)
        got = forward_packed(lambda *a: network(*a, got_store), ids, window, length, count, torch.full_like(length, scratch))
        assert got.shape == (rows, width, network.spec.width)
        for r, n in enumerate(lengths):
            if n:
                own = slice(r, r + 1), slice(n)
                alone = Window(order[r : r + 1], pos[own], limit[own], scratch + 1, hide=hide[r : r + 1])
                torch.testing.assert_close(got[own], network(ids[own], alone, want_store))
        for got_kv, want_kv in ((got_store.k, want_store.k), (got_store.v, want_store.v)):
            torch.testing.assert_close(got_kv[..., :scratch, :], want_kv[..., :scratch, :])


@pytest.mark.parametrize("lengths", [(1,), (PIECE,), (PIECE + 1, 1), (7, 0, 1, 16, 0), (1,) * 40, (63, 9)])
def test_every_position_is_in_one_group_of_its_row(lengths: tuple[int, ...]) -> None:
    length = torch.tensor(lengths)
    count, first = int(length.sum()), length.cumsum(0) - length
    found = groups(first, length, count)
    assert sorted(found[found < count].tolist()) == list(range(count))
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), length)
    for group in found:
        members = group[group < count]
        assert len(set(row_of[members].tolist())) <= 1
        assert (group[len(members) :] == count).all() and (members.diff() == 1).all()


@pytest.mark.parametrize("decoder", ["threshold", "lopa"])
@pytest.mark.parametrize("family, cache", [("llada", "vicinity"), ("dream", "dual"), ("v2", "sub_block")])
def test_narrow_passes_take_one_forward_a_round(
    family: str, cache: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many forwards as the slowest row, although the rows are in passes of several widths; apart they take more."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model, given = random_model(family, 3), prompts(4, 9, 13, 6, 7)
    options = {
        "gen_length": 24,
        "block_length": 8,
        "small_block_size": 4,
        "stop_ids": (),
        "cache": cache,
        "decoder": decoder,
    }
    packed = fastdllm.generate(model, given, runner="cuda_graph", **options)
    apart = fastdllm.generate(model, given, runner="eager", **options)
    alone = [fastdllm.generate(model, [p], runner="eager", **options) for p in given]
    for out in (packed, apart):
        assert [s.tolist() for s in out.sequences] == [one.sequences[0].tolist() for one in alone]
        assert out.stats.row_positions == [one.stats.row_positions[0] for one in alone]
    if decoder == "threshold":
        assert max(packed.stats.row_forwards) == packed.stats.forwards < apart.stats.forwards
    else:  # openings of branches run apart
        assert packed.stats.forwards <= apart.stats.forwards
