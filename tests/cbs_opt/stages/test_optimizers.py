"""Steps of fine-tuning against those of `torch.optim`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cbs_opt.stages.optimizers import MOMENTUM, Adam, Nesterov, Optimizer

RATES = (0.01, 0.02, 0.005, 0.3, 0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_steps_are_those_of_torch_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(40, dtype=dtype, generator=generator)
    theirs = own.clone().requires_grad_()
    optimizer: Optimizer = Nesterov() if kind == "nesterov" else Adam()
    reference: torch.optim.Optimizer = (
        torch.optim.SGD([theirs], lr=1.0, momentum=MOMENTUM, nesterov=True)
        if kind == "nesterov"
        else torch.optim.Adam([theirs], lr=1.0)
    )
    for rate in RATES:
        gradient = torch.randn(40, dtype=dtype, generator=generator)
        optimizer.step(own, gradient, rate)
        theirs.grad = gradient.clone()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert own.equal(theirs.detach())


@pytest.mark.parametrize("kind", [Nesterov, Adam])
def test_weights_that_stay_go_on_as_if_the_others_had_never_been(kind: type[Nesterov] | type[Adam]) -> None:
    generator = torch.Generator().manual_seed(0)
    staying = torch.arange(30) % 3 > 0
    whole = torch.randn(30, generator=generator)
    part = whole[staying]
    first, second = kind(), kind()
    for number, rate in enumerate(RATES):
        gradient = torch.randn(30, generator=generator)
        if number == 2:
            whole = whole[staying]
            first.restrict(staying)
        first.step(whole, gradient[staying] if len(whole) < 30 else gradient, rate)
        second.step(part, gradient[staying], rate)
    assert whole.equal(part)


def test_fine_tuning_does_without_the_compiler_of_torch() -> None:
    """Which would take longer to import than a small network takes to prune."""
    program = (
        "import sys, torch, cbs_opt\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()\n"
        "x = torch.randn(64, 4)\n"
        "report = cbs_opt.prune(model, (x, x.argmax(1) % 3), sparsity=0.5, progress=False)\n"
        "assert any(record.rate_kind for record in report.stages)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
