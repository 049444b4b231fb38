"""Nodes bounded by clusters: valid whatever is decided, exact trees, and splits that follow a reduction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.linalg import LinAlgError

from formulations import BlockProblem, Limit, Limits, verify
from formulations.branch_and_bound import branch_and_bound, cluster_nodes, race, root, subproblems
from formulations.branch_and_bound.cluster_nodes import CLUSTER, ClusterNode, NodeClusters
from formulations.branch_and_bound.outcomes import BRANCH, CLOSED, LEAF
from formulations.dense_forms import joint_form
from formulations.enumeration import enumerate_optimum
from formulations.reduction import FREE, KEPT, PRUNED, reduce_joint
from formulations.relaxations.cluster_path import ClusterPath
from tests.formulations.blocks import slack


def correlated(n: int, share: float, seed: int) -> BlockProblem:
    """A block of full rank whose second moments are far from diagonal."""
    rng = np.random.default_rng([seed, n, 7])
    inputs = rng.normal(size=(4 * n, n // 3)) @ rng.normal(size=(n // 3, n))
    inputs += 0.8 * rng.normal(size=(4 * n, n))
    hessian = inputs.T @ inputs / (4 * n)
    return BlockProblem(weights=rng.normal(size=n), hessian=hessian, damping=0.01, n_prune=round(share * n))


def clusters_of(problem: BlockProblem, rng: np.random.Generator) -> NodeClusters:
    """Clusters at random, the last one not full, and blocks that leave a definite matrix."""
    form = joint_form(problem)
    places = -(-problem.n // CLUSTER) * CLUSTER
    order = np.append(rng.permutation(problem.n), np.full(places - problem.n, -1))
    least = float(np.linalg.eigvalsh(form.matrix)[0])
    blocks = 0.7 * least * np.broadcast_to(np.eye(CLUSTER), (places // CLUSTER, CLUSTER, CLUSTER))
    order = order.reshape(-1, CLUSTER)
    return NodeClusters(order, np.array(blocks))


def best_inside(problem: BlockProblem, status: np.ndarray) -> float:
    """The least form value, without the constant, of sets that a node holds, by enumeration."""
    form = joint_form(problem)
    kept, free = np.flatnonzero(status == KEPT), np.flatnonzero(status == FREE)
    best = np.inf
    for chosen in itertools.combinations(free, problem.n_keep - kept.size):
        index = np.concatenate((kept, np.array(chosen, dtype=np.int64)))
        linear = form.linear[index]
        best = min(best, -0.5 * linear @ np.linalg.solve(form.matrix[np.ix_(index, index)], linear))
    return best


def node_of(problem: BlockProblem, *, bound: float, cutoff: float, **given) -> ClusterNode:
    """A node with nothing decided, at random clusters, but for what is given."""
    form = joint_form(problem)
    fields = {
        "status": np.zeros(problem.n, dtype=np.int64),
        "point": np.zeros(problem.n),
        "clusters": clusters_of(problem, np.random.default_rng(0)),
    } | given
    sizes = {"matrix": form.matrix, "linear": form.linear, "count": problem.n_keep}
    return ClusterNode(**sizes, **fields, bound=bound, cutoff=cutoff)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_and_fixings_hold_in_any_node(seed):
    """With a cutoff at what the node holds, just above it, and out of reach."""
    rng = np.random.default_rng(seed)
    problem = correlated(13, (0.4, 0.6, 0.8)[seed % 3], seed)
    given = np.zeros(13, dtype=np.int64)
    decided = rng.permutation(13)[: seed % 5]
    given[decided] = np.where(np.arange(decided.size) % 2, PRUNED, KEPT)
    clusters = clusters_of(problem, rng).without(given)
    best = best_inside(problem, given)
    for above in (0.0, 1e-6, 0.3, 30.0):
        status = given.copy()
        node = node_of(
            problem,
            status=status,
            point=rng.normal(size=13),
            clusters=clusters,
            bound=best - 5.0,
            cutoff=best + above * abs(best),
        )
        outcome, index, _ = node.evaluate()
        assert (status[decided] == given[decided]).all()
        tiny = 1e-12 * abs(best)
        if outcome == CLOSED:
            assert above <= 1e-6
        elif outcome == LEAF:
            assert best_inside(problem, status) <= best + tiny
        else:
            assert outcome == BRANCH
            assert status[index] == FREE
            assert node.bound <= best + tiny
        if above > 1e-6:
            # What fixing has dropped holds nothing as good.
            assert best_inside(problem, status) == pytest.approx(best, rel=1e-9)


def test_a_good_cutoff_closes_a_node():
    problem = correlated(16, 0.5, seed=1)
    best = best_inside(problem, np.zeros(16, dtype=np.int64))
    node = node_of(problem, bound=1.5 * best, cutoff=1.3 * best)
    outcome, _, _ = node.evaluate()
    assert outcome == CLOSED
    assert 1.3 * best <= node.bound <= best


@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_of_a_split_is_a_split_of_what_is_left(seed):
    """Also once clusters are merged, and as a diagonal."""
    rng = np.random.default_rng([seed, 1])
    problem = correlated(18, 0.5, seed)
    matrix = joint_form(problem).matrix
    given = clusters_of(problem, rng)
    shape = rng.normal(size=given.blocks.shape)
    shape = 0.2 * shape @ shape.transpose(0, 2, 1) + np.eye(CLUSTER)
    shape /= np.linalg.norm(shape, axis=(1, 2))[:, None, None]
    given = NodeClusters(given.order, 0.2 * given.blocks * shape)
    status = rng.choice([FREE, FREE, KEPT, PRUNED], size=18).astype(np.int64)
    kept, free = np.flatnonzero(status == KEPT), np.flatnonzero(status == FREE)
    _, left, _, _ = reduce_joint(matrix, np.zeros(18), kept, free)
    place = np.full(18, -1)
    place[free] = np.arange(free.size)
    own = given.without(status)
    fewer = own.merged(left, place)
    assert len(fewer.order) <= len(own.order)
    for found in (own, fewer):
        assert sorted(found.order[found.order >= 0]) == list(free)
        assert (found.order[:, 0] >= 0).all()
        split = np.zeros((free.size, free.size))
        for order, block in zip(found.order, found.blocks, strict=True):
            used = order >= 0
            split[np.ix_(place[order[used]], place[order[used]])] = block[np.ix_(used, used)]
        assert np.linalg.eigvalsh(split)[0] > 0.0
        assert np.linalg.eigvalsh(left - split)[0] > 0.0
        diagonal = found.diagonal(np.full(18, -1.0))
        assert (diagonal[status != FREE] == -1.0).all()
        assert np.linalg.eigvalsh(split - np.diag(diagonal[free]))[0] > -1e-12


@pytest.fixture
def clusters_at_once(monkeypatch):
    """Have trees of clusters from four weights down to four, after one plain node."""
    monkeypatch.setattr(root, "CLUSTERS_FROM", 4)
    monkeypatch.setattr(subproblems, "SMALLEST", 4)
    monkeypatch.setattr(race, "TURN", 0.1)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("rest", [0.1, np.inf])
def test_trees_of_clusters_are_exact(share, rest, monkeypatch, clusters_at_once):
    """From the root down to nodes of four weights; with fixing and without, in turns and alone."""
    monkeypatch.setattr(race, "REST", rest)
    for seed in range(2):
        problem = correlated(14, share, seed)
        best = enumerate_optimum(problem, "joint")
        for fixing in (True, False):
            found = branch_and_bound(problem, "joint", fixing=fixing, swaps=False)
            assert found.termination.value == "optimal"
            assert found.objective == pytest.approx(best.objective, rel=1e-6)
            assert found.bound <= best.objective + slack(problem)
            assert not verify(problem, found).wrong


def test_two_searches_in_turn_end_as_one_whenever_they_are_stopped(clusters_at_once):
    """Nodes of both count for a limit, bounds never fall, and no run differs from another."""
    problem = correlated(20, 0.6, seed=4)
    whole = branch_and_bound(problem, "joint")
    assert whole.termination.value == "optimal"
    bounds = []
    for limit in range(0, whole.stats.nodes, max(whole.stats.nodes // 6, 1)):
        found = branch_and_bound(problem, "joint", limits=Limits(node_limit=limit))
        again = branch_and_bound(problem, "joint", limits=Limits(node_limit=limit))
        assert (found.stats.nodes, found.bound) == (again.stats.nodes, again.bound)
        assert found.stats.nodes <= limit
        assert found.bound <= whole.objective + slack(problem)
        traced = [point.bound for point in found.trace if point.bound is not None]
        assert all(earlier <= later for earlier, later in itertools.pairwise(traced))
        bounds.append(found.bound)
    assert len(bounds) > 3
    assert (np.diff(bounds) >= -1e-9 * whole.objective).all()


@pytest.mark.parametrize("when", ["root", "node"])
def test_an_interrupt_in_a_turn_of_clusters_keeps_set_and_bound(when, monkeypatch, clusters_at_once):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    problem = correlated(26, 0.6, seed=4)
    before = branch_and_bound(problem, "joint", limits=Limits(node_limit=1))
    if when == "root":
        monkeypatch.setattr(subproblems.Subproblems, "in_clusters", interrupt)
    else:
        monkeypatch.setattr(ClusterNode, "evaluate", interrupt)
    found = branch_and_bound(problem, "joint")
    assert found.limit is Limit.INTERRUPTED
    assert np.array_equal(found.keep, before.keep)
    assert found.bound > 0.0
    assert not verify(problem, found).wrong


def test_clusters_begin_at_a_number_of_weights_and_end_at_another(monkeypatch):
    """Nodes of either kind in one tree, as many as there are."""
    sizes = []

    class Counted(ClusterNode):
        def evaluate(self):
            sizes.append(int((self.status == FREE).sum()))
            return super().evaluate()

    problem = correlated(20, 0.6, seed=3)
    monkeypatch.setattr(subproblems, "ClusterNode", Counted)
    plain = branch_and_bound(problem, "joint")
    assert sizes == []
    monkeypatch.setattr(root, "CLUSTERS_FROM", 20)
    monkeypatch.setattr(race, "TURN", 0.1)
    monkeypatch.setattr(subproblems, "SMALLEST", 12)
    found = branch_and_bound(problem, "joint")
    assert max(sizes) <= 20
    assert min(sizes) >= 12
    assert len(sizes) < found.stats.nodes
    assert found.termination.value == plain.termination.value == "optimal"
    assert found.objective == pytest.approx(plain.objective, rel=1e-6)


def test_where_the_path_fails_the_parents_bound_holds(monkeypatch):
    def fail(*_, **__):
        raise LinAlgError("no factor")

    problem = correlated(13, 0.5, seed=2)
    monkeypatch.setattr(cluster_nodes, "ClusterPath", fail)
    node = node_of(problem, point=np.arange(13.0), bound=-9.0, cutoff=0.0)
    assert node.evaluate() == (BRANCH, 12, True)
    assert node.bound == -9.0
    given = clusters_of(problem, np.random.default_rng(0))
    assert (node.clusters.blocks < given.blocks)[given.blocks > 0.0].all()


def test_rises_are_those_of_the_relaxation_held_at_either_end():
    """The order of size of what holding a share costs, against the relaxation solved anew."""
    problem = correlated(16, 0.5, seed=5)
    form = joint_form(problem)
    order = np.arange(16).reshape(4, 4)
    least = float(np.linalg.eigvalsh(form.matrix)[0])
    blocks = 0.7 * least * np.array([np.eye(4)] * 4)

    def path() -> ClusterPath:
        return ClusterPath(form.matrix, form.linear, 8, blocks.copy(), np.zeros(16), 1e-4)

    whole = path()
    for _ in range(8):
        whole.relax()
    down, up = whole.rises()
    shares = whole.kept_shares()
    assert order.shape == (4, 4)
    assert down.shape == up.shape == (16,)
    assert (down >= 0.0).all()
    assert (up >= 0.0).all()
    undecided = (shares > 0.05) & (shares < 0.95)
    assert undecided.any()
    ratio = np.sqrt(down[undecided] / up[undecided])
    assert ratio == pytest.approx(shares[undecided] / (1.0 - shares[undecided]), rel=1e-6)
