"""What SGLang's tree kernels do, in plain loops and our own words, on Python lists.

Only inputs for which their kernels are well defined: no read or write out of bounds.
"""

from typing import NamedTuple

INVALID = -7  # stands for what they leave to chance


class Built(NamedTuple):
    """Of one request: who sees whom, positions, and the lists."""

    sees: list[list[bool]]
    positions: list[int]
    first_child: list[int]
    next_sibling: list[int]


def build_tree(parent_list: list[int], selected: list[int], seq_len: int, topk: int) -> Built:
    """A node whose parent was not selected goes into no list; where it lies is undefined."""
    T = len(selected) + 1
    parents = [-1]
    for entry in selected:
        bucket = entry // topk
        above = 0 if bucket == 0 else None
        if bucket > 0 and parent_list[bucket] in selected:
            above = selected.index(parent_list[bucket]) + 1
        parents.append(INVALID if above is None else above)
    sees = [[i == j for j in range(T)] for i in range(T)]
    positions = []
    for i in range(T):
        steps, at = 0, i
        while at > 0:
            at = parents[at]
            steps += 1
            if at >= 0:
                sees[i][at] = True
        positions.append(seq_len + steps if at == 0 else INVALID)
    return Built(sees, positions, *lists(parents))


def lists(parents: list[int]) -> tuple[list[int], list[int]]:
    """Scanned from the last node down, each put at the head of its parent's list."""
    first, following = [-1] * len(parents), [-1] * len(parents)
    for i in range(len(parents) - 1, 0, -1):
        if parents[i] >= 0:
            following[i] = first[parents[i]]
            first[parents[i]] = i
    return first, following


class Walk(NamedTuple):
    """What one request writes."""

    accepted: list[int]  # nodes, root first
    predicts: dict[int, int]  # row -> token


def children(first: list[int], following: list[int], node: int) -> list[int]:
    found, at = [], first[node]
    while at != -1:
        found.append(at)
        at = following[at]
    return found


def verify_greedy(
    S: int,
    tokens: list[int],
    rows: list[int],
    first: list[int],
    following: list[int],
    target_predict: list[int],
) -> Walk:
    """target_predict is the whole batch's, by row."""
    path, predicts = [0], {}
    while len(path) < S:
        wanted = target_predict[rows[path[-1]]]
        matches = [c for c in children(first, following, path[-1]) if tokens[c] == wanted]
        if not matches:
            break
        predicts[rows[path[-1]]] = wanted
        path.append(matches[0])
    predicts[rows[path[-1]]] = target_predict[rows[path[-1]]]
    return Walk(path, predicts)


def sample(weights: list[float], u: float) -> int:
    """The first token with cumulative weight above u * sum; else the last one of any weight."""
    total, below = sum(weights), 0.0
    for v, w in enumerate(weights):
        below += w
        if below > u * total:
            return v
    return max((v for v, w in enumerate(weights) if w > 0), default=len(weights) - 1)


def target_only(
    S: int,
    tokens: list[int],
    rows: list[int],
    first: list[int],
    following: list[int],
    coins: list[float],
    final: float,
    p: list[list[float]],
    single: float = 1.0,
    acc: float = 1.0,
    *,
    theirs: bool,
) -> Walk:
    """``theirs``: with their two faults, <= for < and the double count of repeated tokens."""
    path, predicts = [0], {}
    tried: list[int] = []
    while len(path) < S:
        node, mass, taken, tried = path[-1], 0.0, -1, []
        for child in children(first, following, node):
            p_x = p[node][tokens[child]]
            mass += p_x if theirs or tokens[child] not in tried else 0.0
            ratio = mass / max(acc, 1e-9)
            if coins[node] < ratio or (theirs and coins[node] == ratio) or p_x >= single:
                taken = child
                break
            tried.append(tokens[child])
        if taken < 0:
            break
        predicts[rows[node]] = tokens[taken]
        path.append(taken)
        tried = []
    left = [0.0 if v in tried else w for v, w in enumerate(p[path[-1]])]
    predicts[rows[path[-1]]] = sample(left, final)
    return Walk(path, predicts)


def chain(
    tokens: list[int],
    rows: list[int],
    coins: list[float],
    final: float,
    p: list[list[float]],
    q: list[list[float]],
) -> Walk:
    path, predicts = [0], {}
    for step in range(1, len(tokens)):
        x = tokens[step]
        if not coins[step - 1] * q[step - 1][x] < p[step - 1][x]:
            left = [max(a - b, 0.0) for a, b in zip(p[step - 1], q[step - 1])]
            break
        predicts[rows[step - 1]] = x
        path.append(step)
    else:
        left = p[len(tokens) - 1]
    predicts[rows[path[-1]]] = sample(left, final)
    return Walk(path, predicts)


def compact(accept_index: list[list[int]]) -> list[int]:
    return [row for request in accept_index for row in request if row != -1]


def source_and_target(
    out_cache_loc: list[int], accept_index: list[list[int]], num: list[int], ndt: int
) -> tuple[list[int], list[int]]:
    """The two slot lists that their pool's move gets: accepted rows, and each request's first."""
    src = [out_cache_loc[row] for row in compact(accept_index)]
    tgt = [out_cache_loc[b * ndt + j] for b, n in enumerate(num) for j in range(n + 1)]
    return src, tgt


def slots_to_free(seq_len: int, num: int, ndt: int, page: int) -> int:
    pages = -(-(seq_len + num + 1) // page)
    return seq_len + ndt - min(pages * page, seq_len + ndt)
