"""`cbs-opt prune`: the user's own network and data."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cbs_opt.cli.errors import GOES_ON, NOTHING_WRITTEN, reported
from cbs_opt.cli.row_options import DryRun, RowDir, RowMemory, parse_size, state_plan

Model = Annotated[
    str, typer.Option(help="FILE.py:factory; the factory takes no argument and returns a torch.nn.Module.")
]
Source = Annotated[
    str,
    typer.Option(
        help="FILE.npz with arrays x and y, or FILE.py:factory that returns a DataLoader or (X, y). "
        "Curvature and every choice come from these samples."
    ),
]
Out = Annotated[Path, typer.Option(help="Directory for the pruned weights, masks and report.")]
Sparsity = Annotated[float, typer.Option(help="Share of the weights to set to zero, in [0, 1).")]
Weights = Annotated[Path | None, typer.Option(help="safetensors state dict to load into the network.")]
Evaluate = Annotated[
    str | None, typer.Option(help="Like --data: samples that loss and accuracy are reported on, and no more.")
]
Loss = Annotated[str, typer.Option(help="cross_entropy, mse_loss, or FILE.py:function of (output, y).")]
Method = Annotated[
    str | None,
    typer.Option(
        help="How weights are selected; `cbs-opt methods` lists the names. By default swap_search, and "
        "greedy_obs in stages."
    ),
]
MethodOption = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE for the method, VALUE as JSON. Repeatable.")
]
Program = Annotated[
    str, typer.Option(help="What is minimised: joint, which accounts for the update, or selection.")
]
Update = Annotated[bool, typer.Option(help="Adjust the kept weights after the selection.")]
UpdateScale = Annotated[
    list[float] | None,
    typer.Option(help="Step length of the update, 1 by default. Repeatable: the best by training loss."),
]
Curvature = Annotated[
    str, typer.Option(help="empirical_fisher, exact_fisher, monte_carlo_fisher or sketched_fisher.")
]
Samples = Annotated[int, typer.Option(help="Samples that the curvature is taken from.")]
SamplesPerRow = Annotated[int, typer.Option(help="Samples averaged in one gradient row.")]
Damping = Annotated[
    list[float] | None,
    typer.Option(
        help="Added to the diagonal of the Fisher matrix; by default a tenth of the mean of that diagonal. "
        "Repeatable: the best by training loss."
    ),
]
RelativeDamping = Annotated[
    bool, typer.Option("--relative-damping", help="Damping in units of the mean Fisher diagonal.")
]
LayerInputs = Annotated[
    list[float] | None,
    typer.Option(
        help="Weight of the layer-input term of the curvature, 1 by default; 0 is without. Repeatable: the "
        "best by training loss."
    ),
]
GradientTerm = Annotated[
    bool, typer.Option("--gradient-term", help="Keep the gradient in the model while selecting.")
]
Stages = Annotated[int, typer.Option(help="Prune little by little, with fresh curvature at every stage.")]
Schedule = Annotated[
    str,
    typer.Option(
        help="How sparsity grows over stages: geometric, polynomial or linear, or one sparsity a stage, "
        "such as 0.5,0.8,0.9."
    ),
]
StartSparsity = Annotated[float | None, typer.Option(help="Sparsity of the first stage.")]
UpdatesPerStage = Annotated[int | None, typer.Option(help="Updates of every stage; 2 by default.")]
FinalUpdates = Annotated[int | None, typer.Option(help="Updates after the last stage; 4 by default.")]
GradientSamples = Annotated[int | None, typer.Option(help="Samples of the gradient of every update.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep what is found in OUT/state, as it is found: the same command goes on where it was stopped "
        "or killed, and ends with the same weights.",
    ),
]
RunDir = Annotated[Path | None, typer.Option(help="Keep it there instead, for example on a faster disk.")]
Workers = Annotated[
    int | None, typer.Option(help="Processes that solve blocks, for methods that take one at a time.")
]
Restarts = Annotated[int, typer.Option(help="Runs of a randomised method; the best by training loss.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds for each run of the method.")]
Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        help="Bound every block from below and report how far from optimal the chosen set can be.",
    ),
]
CertifyTimeLimit = Annotated[float | None, typer.Option(help="Seconds for all certificates together.")]
SaveBlocks = Annotated[
    bool,
    typer.Option(
        "--save-blocks",
        help="With --certify: keep the data of every block, as large as the gradient rows in float64, "
        "so that `cbs-opt verify OUT` can check the certificates.",
    ),
]
Partition = Annotated[str, typer.Option(help="Blocks: global, layer, row, or a number of weights.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(help="global, uniform, or GLOB=SPARSITY of parameter names (repeatable)."),
]
Target = Annotated[list[str] | None, typer.Option(help="Glob of parameter names to prune. Repeatable.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Glob of parameter names to leave. Repeatable.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="Where the network runs, such as cpu or cuda.")]
Force = Annotated[bool, typer.Option("--force", help="Write into --out even if it is not empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def run(
    model: Model,
    data: Source,
    sparsity: Sparsity,
    out: Out,
    weights: Weights = None,
    evaluate: Evaluate = None,
    loss: Loss = "cross_entropy",
    method: Method = None,
    method_option: MethodOption = None,
    program: Program = "joint",
    update: Update = True,
    update_scale: UpdateScale = None,
    curvature: Curvature = "empirical_fisher",
    samples: Samples = 1000,
    samples_per_row: SamplesPerRow = 1,
    damping: Damping = None,
    relative_damping: RelativeDamping = False,
    layer_inputs: LayerInputs = None,
    gradient_term: GradientTerm = False,
    partition: Partition = "global",
    budget: Budget = None,
    target: Target = None,
    ignore: Ignore = None,
    stages: Stages = 1,
    schedule: Schedule = "geometric",
    start_sparsity: StartSparsity = None,
    updates_per_stage: UpdatesPerStage = None,
    final_updates: FinalUpdates = None,
    gradient_samples: GradientSamples = None,
    resume: Resume = False,
    run_dir: RunDir = None,
    workers: Workers = None,
    row_memory: RowMemory = None,
    row_dir: RowDir = None,
    dry_run: DryRun = False,
    restarts: Restarts = 1,
    time_limit: TimeLimit = None,
    certify: Certify = False,
    certify_time_limit: CertifyTimeLimit = None,
    save_blocks: SaveBlocks = False,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a network and write weights.safetensors, masks.safetensors and a report.

    The network is put in evaluation mode. The files are code that runs: name only those you trust.
    """
    goes_on = resume or run_dir is not None
    with reported(debug, stopped=GOES_ON if goes_on else NOTHING_WRITTEN):
        from cbs_opt.cli.loading import dtype_of, load_data, load_loss, load_network
        from cbs_opt.cli.outputs import block_directory, require_free, state_directory, write_outputs
        from cbs_opt.pruning import prune

        require_free(out, force, resume)
        state = state_directory(out, run_dir, resume)
        if save_blocks and not certify:
            raise typer.BadParameter("it needs --certify", param_hint="--save-blocks")
        network = load_network(model, weights, device)
        dtype = dtype_of(network)
        with block_directory(out, state, save_blocks) as block_dir:
            report = prune(
                network,
                load_data(data, "--data", dtype),
                sparsity=sparsity,
                loss_fn=load_loss(loss),
                program=program,
                method=method,
                method_options=parse_options(method_option or []) or None,
                update=update,
                update_scale=update_scale or 1.0,
                curvature=curvature,
                samples=samples,
                samples_per_row=samples_per_row,
                damping=damping or None,
                relative_damping=relative_damping,
                layer_inputs=layer_inputs or None,
                gradient_term=gradient_term,
                partition=int(partition) if partition.isdecimal() else partition,
                budget=parse_budget(budget or ["global"]),
                target=target or None,
                ignore=tuple(ignore or ()),
                evaluate=None if evaluate is None else load_data(evaluate, "--evaluate", dtype),
                stages=stages,
                schedule=parse_schedule(schedule),
                start_sparsity=start_sparsity,
                updates_per_stage=updates_per_stage,
                final_updates=final_updates,
                gradient_samples=gradient_samples,
                run_dir=state,
                executor=workers,
                row_memory=parse_size(row_memory, "--row-memory"),
                row_dir=row_dir,
                on_plan=partial(state_plan, dry_run=dry_run, wanted=row_memory is not None, as_json=as_json),
                restarts=restarts,
                time_limit=time_limit,
                certify=certify,
                certify_time_limit=certify_time_limit,
                block_dir=block_dir,
                seed=seed,
            )
            write_outputs(network, report, out, block_dir)
        typer.echo(json.dumps(report.to_dict(), allow_nan=False) if as_json else report.summary())
        typer.echo(f"written to {out}", err=True)


def parse_options(pairs: list[str], hint: str = "--method-option") -> dict[str, Any]:
    """``NAME=VALUE`` pairs as a dict; a value that is not JSON is a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r}; write NAME=VALUE", param_hint=hint)
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def parse_schedule(text: str) -> str | list[float]:
    """The name of a schedule, or sparsities separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def parse_budget(entries: list[str]) -> str | dict[str, float]:
    """The name of a rule, or sparsities by glob."""
    if len(entries) == 1 and "=" not in entries[0]:
        return entries[0]
    budget: dict[str, float] = {}
    for entry in entries:
        glob, _, text = entry.rpartition("=")
        try:
            budget[glob] = float(text)
        except ValueError as error:
            raise typer.BadParameter(f"{entry!r}; write GLOB=SPARSITY", param_hint="--budget") from error
        if not glob:
            raise typer.BadParameter(f"{entry!r}; write GLOB=SPARSITY", param_hint="--budget")
    return budget
