"""Incremental tasks: terms are of the rank that is asked for, and what was learned stays bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import experiments.comparators.incremental as module
from experiments.comparators.incremental import Factors, forgetting, learn, orders, permuted
from experiments.comparators.subjects import Subject, copied, split, weight_counts
from experiments.ledger import Ledger
from experiments.networks import MLPNet, Network
from experiments.rivals_training import Training, magnitude_masks, one_shot, train
from formulations.errors import ArgumentError
from tests.experiments.comparators.tiny import images, tiny_network
from tests.experiments.tiny_data import write_mnist, write_network

NAMES = ("1.weight", "3.weight")


def model(seed: int = 0) -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = torch.nn.Linear(36, 12, bias=False), torch.nn.Linear(12, 3, bias=False)
        return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.ReLU(), second)


def pruned_subject() -> Subject:
    """A network of two linear layers, trained and half pruned on task 0."""
    data, held_out = split(images())
    network = Network(
        name="tiny",
        model=model(),
        dataset="none",
        target=NAMES,
        mean=(0.0,),
        std=(1.0,),
        dense_accuracy=0.0,
    )
    train(network, data, Training(rate=0.05, samples=600, batch_size=30), one_shot(0.5))
    return Subject(network=network, data=data, held_out=held_out)


@pytest.mark.parametrize("rank", [1, 3])
def test_each_task_adds_a_term_of_its_rank_and_starts_as_the_pruned_network(rank: int) -> None:
    factors = Factors(model(), NAMES, rank)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 36)
    plain = factors(x)
    for task in (1, 2):
        trained = factors.add_task(generator)
        assert factors.tasks == task + 1
        assert factors(x).equal(plain)
        assert {id(p) for p in factors.parameters() if p.requires_grad} == {id(p) for p in trained}
        assert sum(p.numel() for p in trained) == rank * (36 + 12 + 12 + 3) + 2 * (task + 1)
        for parameter in trained:
            torch.nn.init.normal_(parameter, generator=generator)
        for place, name in enumerate(NAMES):
            selector = factors.selectors[-2 + place]
            base = selector[0] * factors.model.get_parameter(name)
            extra = factors.weight(name, task) - base
            if task == 1:
                assert int(torch.linalg.matrix_rank(extra)) == min(rank, *extra.shape)
                expected = selector[1] * factors.left[place] @ factors.right[place].T
                torch.testing.assert_close(extra, expected)
    factors.task = 0
    assert factors(x).equal(plain)


def test_weights_of_convolutions_count_as_matrices() -> None:
    plain = tiny_network().model
    factors = Factors(plain, ("conv.weight", "fc1.weight"))
    trained = factors.add_task(torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 6, 6)
    assert factors.eval()(x).equal(plain(x))
    assert sum(p.numel() for p in trained) == (6 + 9) + (8 + 96) + 2 * 2
    torch.nn.init.ones_(factors.right[0])
    extra = factors.weight("conv.weight", 1) - plain.get_parameter("conv.weight")
    assert int(torch.linalg.matrix_rank(extra.flatten(1))) == 1
    assert not factors(x).equal(plain(x))


def test_what_was_learned_stays_bit_for_bit_and_all_tasks_are_learned() -> None:
    subject = pruned_subject()
    tasks = orders(36, 4, seed=3)
    training = Training(rate=0.05, samples=900, batch_size=30, weight_decay=0.0)
    says = learn(copied(subject), "factors", tasks, rank=3, training=training)
    table = says["table"]
    assert [len(row) for row in table] == [1, 2, 3, 4]
    for earlier, later in pairwise(table):
        assert later[: len(earlier)] == earlier
    assert forgetting(table) == 0.0
    assert min(table[-1]) > 60.0
    assert says["samples"] == 3 * 900
    assert says["added"] == sum(3 * (36 + 12 + 12 + 3) + 2 * (task + 1) for task in (1, 2, 3))


def test_retraining_all_weights_forgets_and_keeps_the_mask() -> None:
    subject = pruned_subject()
    own = copied(subject)
    training = Training(rate=0.1, samples=1_200, batch_size=30, weight_decay=0.0)
    says = learn(own, "retrained", orders(36, 3, seed=3), rank=0, training=training)
    assert says["added"] == 0
    assert forgetting(says["table"]) > 5.0
    assert weight_counts(own.network) == weight_counts(subject.network)
    for name in NAMES:
        zero = subject.network.model.get_parameter(name) == 0.0
        assert bool((own.network.model.get_parameter(name)[zero] == 0.0).all())


def test_a_copy_a_task_starts_from_the_pruned_network_each_time() -> None:
    tasks = orders(36, 3, seed=3)
    training = Training(rate=0.05, samples=300, batch_size=30, weight_decay=0.0)
    first, swapped = (
        learn(pruned_subject(), "alone", order, rank=0, training=training)["table"][-1]
        for order in (tasks, [tasks[0], tasks[2], tasks[1]])
    )
    assert first[0] == swapped[0]
    assert len(first) == len(swapped) == 3


def test_forgetting_is_the_mean_loss_from_the_best() -> None:
    assert forgetting([[90.0]]) == 0.0
    assert forgetting([[90.0], [80.0, 70.0], [60.0, 75.0, 88.0]]) == pytest.approx((30.0 + 0.0) / 2)


def test_orders_are_permutations_of_all_pixels_and_the_first_is_the_usual_one() -> None:
    found = orders(36, 5, seed=1)
    assert found[0].equal(torch.arange(36))
    assert all(order.sort().values.equal(torch.arange(36)) for order in found)
    assert len({tuple(order.tolist()) for order in found}) == 5
    data = images(12)
    moved = permuted(data, found[2])
    assert moved.train_x.shape == data.train_x.shape
    back: Tensor = found[2].argsort()
    assert permuted(moved, back).train_x.equal(data.train_x)


def test_a_bad_rank_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="rank"):
        Factors(model(), NAMES, 0)


def test_the_command_measures_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(model: torch.nn.Module, data: object, *, sparsity: float, **_: object) -> None:
        partition = module.Partition.from_model(model, target="fc?.weight", blocks="global")
        module.cbs_opt.apply_masks(model, magnitude_masks(model, partition, sparsity))

    monkeypatch.setattr("cbs_opt.prune", prune)
    torch.manual_seed(0)
    write_mnist(tmp_path, train=60, test=10)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify"]
    command += ["--tasks", "3", "--ranks", "1", "2"]
    assert module.main(command) == 0
    monkeypatch.setattr(module, "measure", None)
    assert module.main(command) == 0
    results = Ledger(tmp_path / "out" / "incremental.jsonl").results()
    assert [(entry["contender"], entry["rank"]) for entry in results] == [
        ("factors", 1),
        ("factors", 2),
        ("retrained", 0),
        ("alone", 0),
    ]
    assert all(len(entry["table"]) == 3 and entry["kept"] == round(0.1 * 32_360) for entry in results)
