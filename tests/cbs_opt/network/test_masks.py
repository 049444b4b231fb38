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
