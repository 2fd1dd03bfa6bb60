# SPDX-License-Identifier: Apache-2.0
"""Each rule against a loop that spells its formula out, and what is known about one rule from another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdllm import registry
from fastdllm.view import View
from tests.random_models import MASK

ROWS, WIDTH = 400, 16
Rule = Callable[[list[float], list[float]], set[int]]  # confidences and entropies of the masked positions -> chosen ones


def blocks(seed: int = 0) -> View:
    """Blocks as they occur: most tokens sure, some not, a random share masked, at least one."""
    g = torch.Generator().manual_seed(seed)
    sure, unsure = 1 - torch.rand(ROWS, WIDTH, generator=g) ** 3 * 0.3, torch.rand(ROWS, WIDTH, generator=g)
    conf = torch.where(torch.rand(ROWS, WIDTH, generator=g) < 0.7, sure, unsure)
    masked = torch.rand(ROWS, WIDTH, generator=g) < torch.rand(ROWS, 1, generator=g)
    masked[:, 3] = True
    ids = torch.where(masked, MASK, torch.zeros(ROWS, WIDTH, dtype=torch.long))
    entropy = torch.rand(ROWS, WIDTH, generator=g) * (1 - conf) * 3
    zero = torch.zeros(ROWS, dtype=torch.long)
    return View(ids, masked, ids + 1 - MASK * masked, conf, zero, zero + WIDTH, MASK, entropy, conf)


def chosen(name: str, view: View, **options: float) -> Tensor:
    return (registry.find("decoders", name)(**options).step(view) != MASK) & view.masked


def falling(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def frechet(conf: list[float], entropy: list[float], delta: float = 0.25) -> set[int]:
    order, n = falling(conf), 1
    for k in range(1, len(conf) + 1):
        together = sum(conf[i] for i in order[:k]) - (k - 1)
        if together - (1 - conf[order[k - 1]]) > delta:
            n = k
    return set(order[:n])


def entropy_bound(conf: list[float], entropy: list[float], gamma: float = 0.1) -> set[int]:
    order, n = falling(conf), 1
    for k in range(1, len(conf) + 1):
        values = [entropy[i] for i in order[:k]]
        if sum(values) - max(values) <= gamma:
            n = k
    return set(order[:n])


@pytest.mark.parametrize("name, rule", [("frechet", frechet), ("entropy_bound", entropy_bound)])
def test_prefix_rules_equal_their_loops(name: str, rule: Rule) -> None:
    view = blocks()
    got = chosen(name, view)
    for row in range(ROWS):
        open_slots = view.masked[row].nonzero()[:, 0].tolist()
        conf, entropy = view.conf[row, open_slots].double().tolist(), view.entropy[row, open_slots].double().tolist()
        assert {open_slots[i] for i in rule(conf, entropy)} == set(got[row].nonzero()[:, 0].tolist())


def test_local_leap_relaxes_next_to_anchors_only() -> None:
    view, radius = blocks(), 2
    got = chosen("local_leap", view, threshold=0.9, relaxed=0.6, radius=radius)
    for row in range(ROWS):
        conf = [c if m else -1.0 for c, m in zip(view.conf[row].tolist(), view.masked[row].tolist(), strict=True)]
        anchors = [i for i, c in enumerate(conf) if c >= 0.9]
        want = {i for i, c in enumerate(conf) if c >= 0.6 and any(abs(i - a) <= radius for a in anchors)}
        assert set(got[row].nonzero()[:, 0].tolist()) == want | {falling(conf)[0]}


def test_hierarchical_takes_the_best_of_every_run() -> None:
    view = blocks()
    got = chosen("hierarchical", view, threshold=0.95, low=0.5)
    for row in range(ROWS):
        conf, masked = view.conf[row].tolist(), view.masked[row].tolist()
        runs: list[list[int]] = []
        for i in range(WIDTH):
            if masked[i]:
                runs = [*runs[:-1], [*runs[-1], i]] if i and masked[i - 1] else [*runs, [i]]
        want = {i for i in range(WIDTH) if masked[i] and conf[i] >= 0.95}
        want |= {best for run in runs if conf[best := max(run, key=lambda i: conf[i])] > 0.5}
        want.add(max((i for run in runs for i in run), key=lambda i: conf[i]))
        assert set(got[row].nonzero()[:, 0].tolist()) == want


def test_progress_threshold_asks_less_as_the_block_fills() -> None:
    view = blocks()
    got = chosen("progress_threshold", view, threshold=0.9, alpha=0.5)
    for row in range(ROWS):
        level = 0.9 * (1 - 0.5 * (1 - int(view.masked[row].sum()) / WIDTH))
        want = view.masked[row] & (view.conf[row] >= level)
        want[torch.where(view.masked[row], view.conf[row], -1).argmax()] = True
        assert torch.equal(got[row], want)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta", [0.0, 0.25, 0.6])
def test_frechet_contains_the_factor_rule(delta: float, seed: int) -> None:
    view = blocks(seed)
    factor = chosen("factor", view, factor=1 - delta)
    assert not (factor & ~chosen("frechet", view, delta=delta)).any()


def test_frechet_equals_the_factor_rule_at_equal_confidences() -> None:
    view = blocks()
    for level in (0.5, 0.8, 0.9, 0.97):
        view.conf = torch.full((ROWS, WIDTH), level)
        assert torch.equal(chosen("frechet", view, delta=0.3), chosen("factor", view, factor=0.7))


def test_wino_takes_back_the_most_doubtful_and_fewer_than_it_commits() -> None:
    view, g = blocks(), torch.Generator().manual_seed(1)
    view.unaware = torch.rand(ROWS, WIDTH, generator=g).masked_fill(view.masked, torch.nan)
    view.unaware[:, 0] = torch.nan
    after = registry.find("decoders", "wino")(threshold=0.6, keep=0.7).step(view)
    remasked = 0
    for row in range(ROWS):
        conf = [c if m else -1.0 for c, m in zip(view.conf[row].tolist(), view.masked[row].tolist(), strict=True)]
        most = min(max(int(view.masked[row].sum()) * 7 // 10, 5), 20)
        commit = {falling(conf)[0]} | {i for i in falling(conf)[:most] if conf[i] > 0.6}
        doubted = sorted((c, i) for i, c in enumerate(view.unaware[row].tolist()) if c < 0.7)
        remask = {i for _, i in doubted[: len(commit) - 1]}
        want = [view.top[row, i] if i in commit else MASK if i in remask else view.ids[row, i] for i in range(WIDTH)]
        assert after[row].tolist() == [int(w) for w in want]
        remasked += len(remask)
    assert remasked > ROWS


def test_wino_commits_no_more_than_its_cap() -> None:
    rule, n = registry.find("decoders", "wino")(), torch.zeros(1, dtype=torch.long)
    for masks, cap in ((1, 1), (4, 4), (9, 6), (20, 14), (64, 20)):
        ids, conf = torch.full((1, masks), MASK), torch.full((1, masks), 0.95)
        view = View(ids, ids == MASK, ids - MASK, conf, n, n + masks, MASK, unaware=torch.full((1, masks), torch.nan))
        assert (rule.step(view) != MASK).sum() == cap


NEUTRAL = [
    ("local_leap", {"relaxed": 0.9}),
    ("local_leap", {"radius": 0}),
    ("hierarchical", {"threshold": 0.9, "low": 0.9}),
    ("progress_threshold", {"alpha": 0}),
    ("lopa", {"branches": 1}),
    ("psd", {"level": 0.9, "branches": 1}),
    ("credit", {"alpha": 0}),
]


@pytest.mark.parametrize("name, options", NEUTRAL)
def test_neutral_options_give_the_threshold_rule(name: str, options: dict[str, float]) -> None:
    view = blocks()
    assert torch.equal(chosen(name, view, **options), chosen("threshold", view))


def test_draft_verify_accepts_what_one_token_per_step_would_write() -> None:
    """Three branches of one row: the second is the first's next content, the third is not the second's. New drafts hold the
    best and the two best of what the second left open."""
    rule = registry.find("decoders", "draft_verify")(depth=3)
    m = MASK
    ids = torch.tensor([[m, m, m, m], [5, m, m, m], [5, 6, m, m]])
    top = torch.tensor([[5, 6, 7, 8], [1, 6, 9, 8], [1, 1, 3, 4]])
    conf = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.5, 0.6, 0.9, 0.7], [0.5, 0.6, 0.9, 0.7]])
    zero = torch.zeros(3, dtype=torch.long)
    view = View(ids, ids == m, top, conf, zero, zero + 4, m, slot=zero, state=rule.state(4, 40, torch.device("cpu"), 1))
    view.logprob = conf.log()
    assert rule.step(view).tolist() == [[5, m, 9, m], [5, m, 9, 8], [5, 6, 9, 8]]
    assert view.state["lossless.taken"].tolist() == [2]
    assert view.logprob[0].exp().tolist() == pytest.approx([0.9, 0.8, 0.9, 0.2])


def test_credit_grows_for_what_stays_on_top_and_starts_anew_with_the_block() -> None:
    rule = registry.find("decoders", "credit")(alpha=1.0, gamma=1.0, beta=0.5)
    state = rule.state(2, 4, torch.device("cpu"), 3)
    ids, masked = torch.tensor([[MASK, 7]]), torch.tensor([[True, False]])
    logits = torch.tensor([[[0.0, 2.0, 1.0, 0.0], [9.0, 0.0, 0.0, 0.0]]])
    for step, credit in ((0, 0.8), (1, 0.5 * 0.8 + 0.8), (0, 0.8)):
        view = View(ids, masked, logits.argmax(-1), torch.full((1, 2), 0.8), torch.tensor([step]), torch.tensor([2]), MASK)
        view.slot, view.state = torch.tensor([1]), state
        gain = rule.adjust(view, logits) - logits
        assert gain[0, 0].tolist() == pytest.approx([0, torch.tensor(1 + credit).log().item(), 0, 0], abs=1e-6)
        assert not gain[0, 1].any(), "a position that is not masked gains nothing"
    assert not state["credit"][[0, 2]].any(), "another row's share was written"


def test_adablock_goes_on_only_when_the_part_is_full() -> None:
    """Delimiters (id 9) stand at 1, 3 and 5; the surest one within reach that is likely enough ends a part."""
    rule = registry.find("decoders", "adablock")(delimiters=(9,), level=0.5, ahead=0.5)
    state, row = rule.state(8, 40, torch.device("cpu"), 1), torch.tensor([0])
    top = torch.tensor([[1, 9, 2, 9, 3, 9, 4, 5]])
    conf = torch.tensor([[0.4, 0.3, 0.9, 0.6, 0.9, 0.9, 0.9, 0.9]])
    ids, written = torch.full((1, 8), MASK), []
    for step in range(5):
        view = View(ids, ids == MASK, top, conf, torch.tensor([step]), torch.tensor([8]), MASK, slot=row, state=state)
        after = rule.step(view)
        written.append(((after != ids)[0]).nonzero()[:, 0].tolist())
        ids = after
    assert written == [[2, 3], [0], [1], [4, 5], [6, 7]]


def test_adablock_looks_for_an_end_once_the_block_is_predicted() -> None:
    """A shifted model's opening pass shows the first position alone; the delimiter at 3 is seen at the next step."""
    rule = registry.find("decoders", "adablock")(delimiters=(9,), level=0.5, ahead=0.5)
    state, row = rule.state(8, 40, torch.device("cpu"), 1), torch.tensor([0])
    top, conf, ids = torch.tensor([[1, 2, 3, 9, 4, 5, 6, 7]]), torch.full((1, 8), 0.9), torch.full((1, 8), MASK)
    shown = torch.arange(8)[None] == 0
    for step, written in enumerate(([0], [1, 2, 3], [4, 5, 6, 7])):
        masked = ids == MASK
        view = View(
            ids, masked & shown if step == 0 else masked, top, conf, torch.tensor([step]), torch.tensor([8]), MASK,
            slot=row, state=state,
        )  # fmt: skip
        after = rule.step(view)
        assert (after != ids)[0].nonzero()[:, 0].tolist() == written
        ids = after


@pytest.mark.parametrize("rule, level", [("threshold", 0.8), ("factor", 0.9), ("frechet", 0.3)])
def test_adablock_without_delimiters_is_its_rule(rule: str, level: float) -> None:
    view = blocks()
    adablock = registry.find("decoders", "adablock")((), level, rule)
    view.slot, view.state = torch.arange(ROWS), adablock.state(WIDTH, 40, torch.device("cpu"), ROWS)
    assert torch.equal(adablock.step(view), registry.find("decoders", rule)(level).step(view))


BAD = [
    ("credit", "rule", "nothing"),
    ("credit", "beta", 2),
    ("credit", "threshold", 2),
    ("frechet", "delta", 2),
    ("entropy_bound", "gamma", -1),
    ("local_leap", "relaxed", 1.5),
    ("local_leap", "radius", -1),
    ("hierarchical", "low", -0.1),
    ("progress_threshold", "alpha", 2),
    ("draft_verify", "depth", -1),
    ("lopa", "branches", 0),
    ("psd", "branches", 0),
    ("psd", "rule", "nothing"),
    ("wino", "keep", 1.1),
    ("wino", "threshold", -0.1),
]


@pytest.mark.parametrize("name, option, value", BAD)
def test_bad_options_are_named(name: str, option: str, value: float) -> None:
    given = "level" if (name, option) == ("credit", "threshold") else option  # the wrapped rule names its own
    with pytest.raises(ValueError, match=f"{option}="):
        registry.find("decoders", name)(**{given: value})
