"""`cbs-opt prune`: the user's own network and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.cli.errors import GOES_ON, NOTHING_WRITTEN, Debug, field_option, reported
from cbs_opt.cli.tables import show

if TYPE_CHECKING:
    from cbs_opt.recipe.named import Named
    from cbs_opt.recipe.records import Recipe
    from cbs_opt.system.resources import Resources

STAGES = "stages.count"
FLAGGED = ("select.method", "select.program", "curvature.samples", "damping", STAGES)
"""Fields that have an option of their own."""
WHAT = ("weights.", "recalibrate=", "seed=", "sparsity=")
"""What fields begin with that say what is pruned, not how."""

Model = Annotated[
    str,
    typer.Option(
        help="FILE.py:factory or package.module:factory; it takes no argument and returns a torch.nn.Module."
    ),
]
Source = Annotated[
    str,
    typer.Option(
        help="FILE.npz with arrays x and y, or like --model a factory of a DataLoader or (X, y). "
        "Curvature and every choice come from these samples."
    ),
]
Out = Annotated[Path, typer.Option(help="Directory for the pruned weights, masks and report.")]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help="Share of the weights to set to zero, in [0, 1), or a pattern such as 2:4, which keeps 2 of "
        "every 4 inputs; a recipe file may have it."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="State dict to load: safetensors, or .pt by torch.save, of which tensors alone are read."
    ),
]
Evaluate = Annotated[
    str | None, typer.Option(help="Like --data: samples that loss and accuracy are reported on, and no more.")
]
Loss = Annotated[
    str | None,
    typer.Option(
        help="cross_entropy, mse_loss, or like --model a function of (output, labels); by default what "
        "output and labels stand for."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="fast, balanced (the default), best, or FILE.toml such as the recipe.toml of a saved run. "
        "Without one, options that say how start from a plain recipe of one stage.",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="FIELD=VALUE of the recipe, such as curvature.kind=sketched_fisher, layer_inputs=0, "
        "weights.blocks=layer, select.drops=12, update.scale=0.5, stages.final_updates=2 or "
        "resources.row_memory=2GB. Repeatable.",
    ),
]
Method = Annotated[
    str | None, typer.Option(help="How weights are selected; `cbs-opt methods` lists the names.")
]
Program = Annotated[
    str | None, typer.Option(help="What is minimised: joint, which accounts for the update, or selection.")
]
Samples = Annotated[int | None, typer.Option(help="Samples that the curvature is taken from.")]
Damping = Annotated[
    float | None,
    typer.Option(help="Added to the diagonal, in units of the mean diagonal of the Fisher matrix."),
]
Stages = Annotated[
    int | None, typer.Option(help="Prune little by little, with fresh curvature at every stage.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep what was computed in OUT/state: the same command goes on where it was stopped or "
        "killed, and ends with the same weights.",
    ),
]
RunDir = Annotated[Path | None, typer.Option(help="Keep it there instead, for example on a faster disk.")]
Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        help="Bound every block from below and report how far from optimal the chosen set can be.",
    ),
]
SaveBlocks = Annotated[
    bool,
    typer.Option(
        "--save-blocks",
        help="With --certify: keep the data of every block, as large as the gradient rows in float64, "
        "so that `cbs-opt verify OUT` can check the certificates.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="State sizes, disk space and peak memory, and stop there.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice; 0 by default.")]
Device = Annotated[str, typer.Option(help="Where the network runs, such as cpu or cuda.")]
Force = Annotated[bool, typer.Option("--force", help="Write into --out even if it is not empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


def run(
    model: Model,
    data: Source,
    out: Out,
    sparsity: Sparsity = None,
    weights: Weights = None,
    evaluate: Evaluate = None,
    loss: Loss = None,
    recipe: RecipeName = None,
    fields: Fields = None,
    method: Method = None,
    program: Program = None,
    samples: Samples = None,
    damping: Damping = None,
    stages: Stages = None,
    certify: Certify = False,
    save_blocks: SaveBlocks = False,
    resume: Resume = False,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    seed: Seed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a network and write weights.safetensors, masks.safetensors, recipe.toml and a report.

    The network is put in evaluation mode. The files are code that runs: name only those you trust.
    """
    goes_on = resume or run_dir is not None
    with reported(debug, field_option, stopped=GOES_ON if goes_on else NOTHING_WRITTEN):
        from cbs_opt.cli import loading
        from cbs_opt.cli.loading import load_data
        from cbs_opt.pruning import plan, prune
        from cbs_opt.recipe.records import Certify as CertifyRecord

        values = (method, program, samples, damping, stages)
        typed = [f"{name}={value}" for name, value in zip(FLAGGED, values, strict=True) if value is not None]
        asked = requested(recipe, target(sparsity), seed, typed + (fields or []))
        loading.require_free(out, force, resume)
        state = out / loading.STATE if resume and run_dir is None else run_dir
        if save_blocks and not (certify or asked.certify):
            raise typer.BadParameter("it needs --certify", param_hint="--save-blocks")
        network = loading.load_network(model, weights, device)
        dtype = loading.dtype_of(network)
        what: dict[str, Any] = {"sparsity": asked.sparsity, "recipe": asked.recipe}
        what |= {"stages": asked.stages, "resources": asked.resources}
        what |= {"loss_fn": None if loss is None else loading.load_loss(loss), "seed": asked.seed}
        if dry_run:
            size = plan(network, load_data(data, "--data", dtype), **what)
            show(size.to_dict(), [size.summary()], as_json)
            return
        with loading.block_directory(out, state, save_blocks) as block_dir:
            record = asked.certify or (CertifyRecord() if certify else None)
            report = prune(
                network,
                load_data(data, "--data", dtype),
                **what,
                certify=False if record is None else replace(record, block_dir=block_dir),
                evaluate=None if evaluate is None else load_data(evaluate, "--evaluate", dtype),
                run_dir=state,
            )
            loading.write_outputs(network, report, out, block_dir)
        show(report.to_dict(), [report.summary()], as_json)
        typer.echo(f"written to {out}", err=True)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options ask for, as `cbs_opt.prune` takes it."""

    sparsity: float | str
    recipe: Named | tuple[Recipe, ...]
    stages: Any
    certify: Any
    seed: int
    resources: Resources


def target(text: str | None) -> float | str | None:
    """Return a share as a number, and anything else as it is: a pattern, or what will be refused."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def requested(
    recipe: str | None, sparsity: float | str | None, seed: int | None, assignments: list[str]
) -> Asked:
    """Return what the options ask for: a recipe, and the fields that were set over it.

    A name stays one; without a name or file, fields that say how are set over a plain recipe.
    """
    from cbs_opt.errors import RecipeFileError
    from cbs_opt.recipe.files import load_request, with_fields
    from cbs_opt.recipe.named import Named
    from cbs_opt.recipe.records import Request

    ours = [entry for entry in assignments if not entry.startswith("resources.")]
    resources = resources_of([entry for entry in assignments if entry not in ours])
    how = [entry for entry in ours if not entry.startswith((*WHAT, f"{STAGES}="))]
    if recipe is not None and recipe.endswith(".toml"):
        try:
            request = load_request(recipe, sparsity=sparsity)
        except RecipeFileError as error:
            message = f"{error.argument}: {error.found}; {error.remedy}"
            raise typer.BadParameter(message, param_hint="--recipe") from error
    elif sparsity is None:
        raise typer.BadParameter("give one, or a recipe file that has one", param_hint="--sparsity")
    elif recipe is not None or not how:
        counts = [entry for entry in ours if entry.startswith(f"{STAGES}=")]
        stages = with_fields(Request(sparsity=sparsity), counts).stages  # type: ignore[arg-type]
        changes = tuple(entry for entry in ours if entry not in counts)
        return Asked(
            sparsity=sparsity,
            recipe=Named(name=recipe or "balanced", changes=changes),
            stages=None if stages is None else stages.count,
            certify=None,
            seed=seed or 0,
            resources=resources,
        )
    else:
        request = Request(sparsity=sparsity)  # type: ignore[arg-type]
    request = with_fields(request, ours)
    return Asked(
        sparsity=request.sparsity if request.pattern is None else str(request.pattern),
        recipe=request.recipes,
        stages=request.stages,
        certify=request.certify,
        seed=request.seed if seed is None else seed,
        resources=resources,
    )


def resources_of(assignments: list[str]) -> Resources:
    """Return the resources that ``resources.FIELD=VALUE`` set; sizes may have units, such as 2GB."""
    from cbs_opt.system.memory import parsed
    from cbs_opt.system.resources import Resources

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.removeprefix("resources.").partition("=")
        if name not in Resources.__dataclass_fields__:
            known = ", ".join(Resources.__dataclass_fields__)
            raise typer.BadParameter(f"no field {name!r}; choose among {known}", param_hint="--set resources")
        try:
            values[name] = text if name == "row_dir" else parsed(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=f"--set resources.{name}") from error
    return Resources(**values)
