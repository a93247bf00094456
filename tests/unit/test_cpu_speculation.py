"""Torch forms of the kernels for drafted trees, against a walk over the trees."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from sglang_elora.platforms.speculative import (
    assign_request_rows,
    fill_accepted_slots,
    fill_first_slots,
    links_of_trees,
    slots_of_drafts,
    verify_trees,
)

NUM_NODES, NUM_REQUESTS, NUM_TOKENS = 7, 5, 3
POSITIONS = [4, 0, 9, 2, 30]


@dataclass(frozen=True, slots=True)
class Tree:
    """A drafted tree: the parent of each node (-1 for the first), and the nodes' tokens."""

    parents: list[int]
    tokens: list[int]

    def children(self, node: int) -> list[int]:
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def ancestors(self, node: int) -> list[int]:
        """From the node's parent up to node 0."""
        found = []
        while (node := self.parents[node]) >= 0:
            found.append(node)
        return found


def make_trees(seed: int) -> list[Tree]:
    rng = random.Random(seed)
    return [
        Tree(
            [-1, *(rng.randrange(node) for node in range(1, NUM_NODES))],
            [rng.randrange(NUM_TOKENS) for _ in range(NUM_NODES)],
        )
        for _ in range(NUM_REQUESTS)
    ]


def links(trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.zeros(NUM_REQUESTS, NUM_NODES, NUM_NODES, dtype=torch.bool)
    for i, tree in enumerate(trees):
        for node in range(NUM_NODES):
            mask[i, node, [node, *tree.ancestors(node)]] = True
    shape = NUM_REQUESTS, NUM_NODES
    index, child, sibling = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
    positions = torch.empty(NUM_REQUESTS * NUM_NODES, dtype=torch.int64)
    lengths = torch.tensor(POSITIONS)
    links_of_trees(mask.view(-1), lengths, positions, index, child, sibling, *shape)
    return positions, index, child, sibling


@pytest.mark.parametrize("seed", range(20))
def test_links_lead_to_the_first_child_and_the_next_sibling(seed: int) -> None:
    trees = make_trees(seed)
    positions, index, child, sibling = links(trees)
    assert index.view(-1).tolist() == list(range(NUM_REQUESTS * NUM_NODES))
    for i, tree in enumerate(trees):
        for node in range(NUM_NODES):
            depth = len(tree.ancestors(node))
            assert positions.view(NUM_REQUESTS, -1)[i, node] == POSITIONS[i] + depth
            assert child[i, node] == min(tree.children(node), default=-1)
            later = [k for k in tree.children(tree.parents[node]) if k > node and node > 0]
            assert sibling[i, node] == min(later, default=-1)


@pytest.mark.parametrize("seed", range(20))
def test_most_probable_path_of_a_tree_is_accepted(seed: int) -> None:
    trees, rng = make_trees(seed), random.Random(-seed)
    _, index, child, sibling = links(trees)
    best = torch.tensor(
        [[rng.randrange(NUM_TOKENS) for _ in range(NUM_NODES)] for _ in range(NUM_REQUESTS)]
    )
    predicts = torch.full((NUM_REQUESTS * NUM_NODES,), -7, dtype=torch.int32)
    accepted = torch.full((NUM_REQUESTS, NUM_NODES), -1, dtype=torch.int32)
    counts = torch.empty(NUM_REQUESTS, dtype=torch.int32)
    tokens = torch.tensor([tree.tokens for tree in trees])
    verify_trees(predicts, accepted, counts, tokens, index, child, sibling, best)
    for i, tree in enumerate(trees):
        path, node = [0], 0
        while True:
            wanted = int(best[i, node])
            matching = [k for k in tree.children(node) if tree.tokens[k] == wanted]
            if not matching:
                break
            node = matching[0]
            path.append(node)
        rows = [i * NUM_NODES + k for k in path]
        assert accepted[i].tolist() == rows + [-1] * (NUM_NODES - len(rows))
        assert counts[i] == len(path) - 1
        assert predicts[rows].tolist() == best[i, path].tolist()


def test_slots_of_accepted_tokens_are_moved_to_the_first_ones() -> None:
    slots = torch.tensor([10, 11, 12, 20, 21, 22])
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    targets, sources = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    fill_first_slots(torch.tensor([2, 1]), slots, targets)
    fill_accepted_slots(accepted, slots, sources, 6)
    assert targets.tolist() == [10, 11, 20, 0, 0, 0]
    assert sources.tolist() == [10, 12, 20, 0, 0, 0]


def test_rows_of_requests_get_their_drafted_slots() -> None:
    rows = torch.zeros(4, 8, dtype=torch.int32)
    requests = torch.tensor([3, 1])
    starts, ends = torch.tensor([2, 0]), torch.tensor([5, 1])
    assign_request_rows(requests, rows, starts, ends, torch.tensor([7, 8, 9, 5]), 2)
    assert rows[3].tolist() == [0, 0, 7, 8, 9, 0, 0, 0]
    assert rows[1].tolist() == [5, 0, 0, 0, 0, 0, 0, 0]
    found = slots_of_drafts(requests, rows, starts, ends, batch_size=2)
    assert found.tolist() == [7, 8, 9, 5] and found.dtype == torch.int64
