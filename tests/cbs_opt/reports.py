"""Reports of imaginary runs whose parts fit together, for tests of tables, files and pictures."""

from __future__ import annotations

import torch

from cbs_opt.network.evaluation import Evaluation
from cbs_opt.recipe.records import Recipe, Request, absolute
from cbs_opt.report.parts import BlockSummary, LayerSummary
from cbs_opt.report.record import PruneReport

SHAPES = {"0.weight": (16, 12), "2.weight": (8, 16), "4.weight": (4, 8)}


def made_report(
    method: str = "swap_search",
    *,
    sparsity: float = 0.8,
    update: bool = True,
    evaluated: bool = True,
    seed: int = 0,
    loss: float = 0.1,
) -> PruneReport:
    """A report of random layers pruned by magnitude; `loss` scales every loss increase."""
    generator = torch.Generator().manual_seed(seed)
    layers, masks, blocks = [], {}, []
    for name, shape in SHAPES.items():
        before = torch.randn(shape, generator=generator)
        order = before.abs().flatten().argsort()
        keep = torch.ones(before.numel(), dtype=torch.bool)
        keep[order[: round(sparsity * before.numel())]] = False
        keep = keep.view(shape)
        after = torch.where(keep, 1.1 * before, 0.0)
        layers.append(LayerSummary.from_weights(name, before, after, keep))
        masks[name] = keep
        blocks.append(
            BlockSummary(
                name=name,
                n=before.numel(),
                n_prune=layers[-1].n_prune,
                selection_loss=loss,
                updated_loss=loss / 2 if update else None,
                initial_loss=2 * loss,
                iterations=7,
                locally_optimal=True,
                seconds=0.01,
                bound=loss / 4,
                gap=0.5,
                status="local optimum",
            )
        )
    dense = Evaluation(loss=0.05, accuracy=0.97, samples=300)
    pruned = Evaluation(loss=0.05 + 2 * loss, accuracy=max(0.1, 0.97 - loss), samples=300)
    return PruneReport(
        method=method,
        kind="search" if method == "swap_search" else "saliency",
        program="selection",
        update=update,
        curvature="empirical_fisher",
        partition="layer",
        budget="global",
        requested_sparsity=sparsity,
        n=sum(layer.n for layer in layers),
        n_prune=sum(layer.n_prune for layer in layers),
        layers=tuple(layers),
        blocks=tuple(blocks),
        predicted_selection_loss=3 * loss,
        predicted_loss_increase=1.5 * loss,
        train_before=dense,
        train_after=pruned,
        before=dense if evaluated else None,
        after=pruned if evaluated else None,
        seconds={"curvature": 0.4, "selection": 0.2, "update": 0.1},
        peak_memory_bytes=300 * 2**20,
        samples=300,
        rows=300,
        damping=1e-3,
        update_scale=1.0 if update else None,
        seed=seed,
        masks=masks,
        request=Request(sparsity=sparsity, recipes=(Recipe(damping=absolute(1e-3)),), seed=seed),
        versions={"python": "3.11", "torch": "2.13.0"},
    )
