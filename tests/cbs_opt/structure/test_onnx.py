"""A shrunk network is written as ONNX, and a runtime that knows no torch computes the same with it."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from tests.cbs_opt.structure.networks import NETWORKS, built, random_keep, relative


def exported(model: nn.Module, example: Tensor) -> onnxruntime.InferenceSession:
    """Return a session on what the exporter makes of a network, for batches of any size."""
    program = torch.onnx.export(
        model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    content = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["residual", "depthwise", "packed", "transformer"])
def test_a_runtime_without_torch_computes_what_a_shrunk_network_does(name: str) -> None:
    model, example = built(name)
    keep = random_keep(cbs.groups(model, example))
    small, record = cbs.shrink(model, example, keep=keep)
    assert record.parameters[1] < record.parameters[0]
    session = exported(small, example)
    (only,) = session.get_inputs()
    assert only.shape == ["batch", *example.shape[1:]]
    for batch in (1, 7):
        inputs = NETWORKS[name][1](batch)
        with torch.no_grad():
            wanted, whole = small(inputs), model(inputs)
        (found,) = session.run(None, {only.name: inputs.numpy()})
        assert relative(wanted, torch.from_numpy(found)) < 1e-4
        assert relative(wanted, whole) > 1e-3
