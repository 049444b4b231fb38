"""Masks: what is written is read, what does not fit is refused, zeros are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cbs_opt.errors import MaskFileError, MaskMismatchError
from cbs_opt.network.masks import (
    apply_masks,
    load_mask_metadata,
    load_masks,
    masked,
    save_masks,
)
from cbs_opt.network.partition import Partition
from formulations.errors import ArgumentError, InstanceFormatError


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def masks(model):
    partition = Partition.from_model(model)
    keep = torch.rand(partition.n, generator=torch.Generator().manual_seed(1)) > 0.7
    return partition.keep_by_parameter(keep)  # views of one vector


def test_round_trip(tmp_path, model, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks, metadata={"method": "swap_search"})
    loaded = load_masks(path, model)
    assert loaded.keys() == masks.keys()
    assert all(keep.dtype == torch.bool and torch.equal(keep, masks[name]) for name, keep in loaded.items())
    metadata = load_mask_metadata(path)
    assert metadata["method"] == "swap_search"
    assert metadata["sense"] == "true = kept"
    pruned = sum(int((~keep).sum()) for keep in masks.values())
    assert float(metadata["sparsity"]) == pruned / 42
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, masks, monkeypatch):
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_masks(path, {name: ~keep for name, keep in masks.items()})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_and_foreign_files(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks)
    content = path.read_bytes()
    broken = {
        "empty": b"",
        "truncated": content[:-5],
        "header": content[:20],
        "noise": b"\xff" * 64,
        "version": content.replace(b'"version":"2"', b'"version":"7"'),
        "older": content.replace(b'"version":"2"', b'"version":"1"'),
        "no truth value": content[:-1] + b"\x02",
        "one weight more": content[:-1] + bytes([1 - content[-1]]),
        "sense": content.replace(b"true = kept", b"true = gone"),
    }
    for name, damaged in broken.items():
        assert damaged != content
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(MaskFileError, match="path"):
            load_masks(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "weights")
    metadata = load_mask_metadata(path)
    save_file({"a": torch.ones(2)}, tmp_path / "floats", metadata=metadata)
    for name in ("weights", "floats", "absent"):
        with pytest.raises(InstanceFormatError):
            load_masks(tmp_path / name)


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_file_without_a_checksum_is_refused(tmp_path, masks, version):
    metadata = {"format": "cbs-opt masks", "version": version, "sense": "true = kept", "sparsity": "0.5"}
    bare = {name: keep.clone() for name, keep in masks.items()}
    save_file(bare, tmp_path / "bare", metadata=metadata)
    with pytest.raises(MaskFileError, match="no checksum"):
        load_masks(tmp_path / "bare")


def test_masks_of_another_network_are_listed(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks)
    other = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten())
    before = copy.deepcopy(other.state_dict())
    for act in (lambda: load_masks(path, other), lambda: apply_masks(other, masks)):
        with pytest.raises(MaskMismatchError) as caught:
            act()
        assert "2 of 2" in str(caught.value)
        assert "no parameter 2.weight" in str(caught.value)
        assert "0.weight is (2, 1, 5, 5), its mask (2, 1, 3, 3)" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_nothing_is_zeroed_unless_every_mask_fits(model, masks):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskMismatchError):
        apply_masks(model, {**masks, "9.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ArgumentError, match=r"masks\['2\.weight'\]"):
        apply_masks(model, {**masks, "2.weight": torch.ones(3, 8)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_apply_writes_exact_zeros_in_place(model, masks):
    with torch.no_grad():
        model[2].weight[~masks["2.weight"]] = float("nan")
    before = copy.deepcopy(model.state_dict())
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    apply_masks(model, masks)
    for name, parameter in model.named_parameters():
        assert identities[name] == (id(parameter), parameter.data_ptr())
        keep = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[keep], before[name][keep])
        assert torch.equal(parameter[~keep], torch.zeros(int((~keep).sum())))
        assert not parameter[~keep].signbit().any()


def test_applied_masks_survive_a_training_step(model, masks):
    apply_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    assert (model[2].weight[~masks["2.weight"]] != 0).any()
    apply_masks(model, masks)
    assert (model[2].weight[~masks["2.weight"]] == 0).all()


@pytest.mark.parametrize("metadata", [{"sense": "x"}, {"a": 1}, {1: "a"}])
def test_unusable_metadata(tmp_path, masks, metadata):
    with pytest.raises(ArgumentError, match="metadata"):
        save_masks(tmp_path / "m", masks, metadata=metadata)


def test_unusable_masks(tmp_path):
    for masks in ({}, {"a": torch.ones(2)}, {"a": [True]}):
        with pytest.raises(ArgumentError, match="masks"):
            save_masks(tmp_path / "m", masks)
    assert not (tmp_path / "m").exists()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(list(p), lr=0.1),
}


def train(model, *optimizers, steps=3):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))

    def loss():
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = model(x).square().sum()
        value.backward()
        return value

    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.step(loss)


def at_zero(model, masks):
    return all(not model.get_parameter(name)[~keep].any() for name, keep in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_masked_optimizer_keeps_zeros(model, masks, name):
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model.parameters())
    assert masked(optimizer, masks, model) is optimizer
    assert at_zero(model, masks)
    for key, keep in masks.items():
        assert torch.equal(model.get_parameter(key)[keep], before[key][keep])
    train(model, optimizer)
    assert at_zero(model, masks)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model[0].bias, before["0.bias"])
    if name != "lbfgs":  # its state is one flat vector for all
        for key, keep in masks.items():
            state = optimizer.state[model.get_parameter(key)]
            assert all(
                not v[~keep].any() for v in state.values() if torch.is_tensor(v) and v.shape == keep.shape
            )
    train(other, OPTIMIZERS[name](other.parameters()))
    assert not at_zero(other, masks)


def test_the_first_masked_step_is_that_of_masked_gradients(model, masks):
    apply_masks(model, masks)
    other = copy.deepcopy(model)
    train(model, masked(torch.optim.SGD(model.named_parameters(), lr=0.1), masks), steps=1)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
    apply_masks(other, masks)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_masks_of_names_several_optimizers_and_later_groups(model, masks):
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam([model[2].bias], lr=0.1)
    masked(first, masks, torch.nn.DataParallel(model))
    with pytest.raises(ArgumentError, match="none of the 2 parameters"):
        masked(second, masks, model)
    second.add_param_group({"params": [model[2].weight], "lr": 0.2})
    masked(second, masks, model)
    train(model, first, second)
    assert at_zero(model, masks)
    late = torch.optim.SGD(model[0].parameters(), lr=0.1)
    masked(late, masks, model).add_param_group({"params": model[2].parameters()})
    train(model, late)
    assert at_zero(model, masks)


def test_a_second_call_replaces_the_masks(model, masks):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        masked(optimizer, masks, model)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    everything = {name: torch.ones_like(keep) for name, keep in masks.items()}
    masked(optimizer, everything, model)
    train(model, optimizer)
    assert not at_zero(model, masks)


def test_tied_weights_are_masked_under_both_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    first, second = torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    first[0], second[:, 1] = False, False
    masked(torch.optim.SGD(model.parameters(), lr=0.1), {"0.weight": first, "1.weight": second}, model)
    assert torch.equal(model[0].weight != 0.0, first & second)


def test_the_optimizer_inside_of_another_is_masked(model, masks):
    class Wrapping(torch.optim.Optimizer):
        """As accelerate does it."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

    optimizer = Wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    assert masked(optimizer, masks, model) is optimizer
    train(model, optimizer)
    assert at_zero(model, masks)


def test_what_cannot_be_masked_is_refused_before_anything_is_written(model, masks):
    before = copy.deepcopy(model.state_dict())
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    part = torch.optim.SGD(model[0].named_parameters(prefix="0"), lr=0.1)
    with pytest.raises(ArgumentError, match="named_parameters"):
        masked(plain, masks)
    with pytest.raises(MaskMismatchError, match=r"no parameter 2\.weight.*pass it as model"):
        masked(part, masks)
    with pytest.raises(MaskMismatchError, match="no parameter other"):
        masked(plain, masks | {"other": torch.ones(2, dtype=torch.bool)}, model)
    with pytest.raises(ArgumentError, match="boolean"):
        masked(plain, {"0.weight": torch.ones(2, 1, 3, 3)}, model)
    with pytest.raises(ArgumentError, match=r"optimizer of torch\.optim"):
        masked(model, masks, model)
    with pytest.raises(ArgumentError, match="network that was pruned"):
        masked(plain, masks, copy.deepcopy(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not plain._optimizer_step_post_hooks
    assert masked(part, masks, model) is part
