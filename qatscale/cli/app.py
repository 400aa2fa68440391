"""The commands. Their bodies say which function of which room does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qatlaw.cli import planner
from qatscale.cli.export import export
from qatscale.cli.fit import fit, report
from qatscale.cli.plan import RecipesAndGpus
from qatscale.cli.study import study
from qatscale.errors import EXIT_REQUEUE, UserError

app = typer.Typer(
    help="Plan, run and analyse compute-optimal quantization-aware pre-training on DeepSpeed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_OVERRIDES_MAY_HAVE_DASHES = {"ignore_unknown_options": True}
"""`--qat.bits=2` reaches the recipe, whose error names the key that was meant."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]…", help="Overrides, e.g. tokens=2.3B qat.bits=2 (`qatscale config` lists them)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


# --- plan ---


app.add_typer(planner, name="plan", context_settings={"obj": RecipesAndGpus()})


@app.command()
def config(
    what: Annotated[
        str, typer.Argument(metavar="[KEY|RECIPE]", help="Part of the keys (qat, qat.bits), or a recipe: name or file.")
    ] = "",
    overrides: Overrides = None,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema of a recipe.")] = False,
) -> None:
    """Every key of a recipe with its type, default and meaning; of a given recipe the keys and values, as YAML.

    `qatscale config quickstart > mine.yaml` writes a recipe to edit.
    """
    from qatscale.cli.show import print_config, print_json_schema

    if json_schema:
        print_json_schema()
    else:
        print_config(what, overrides or ())


@app.command()
def recipes() -> None:
    """The recipes that come with qatscale."""
    from qatscale.cli.show import print_recipes

    print_recipes()


# --- prepare ---


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs (JSON lines, also .gz .xz .zst; Parquet; text), a Hugging Face dataset "
            "(name or name:config), or `self`: text made of this machine's Python packages."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A SentencePiece .model, a Hugging Face tokenizer (folder or name). Default: train one."),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Pieces of the tokenizer to train. [default: 32000]")] = None,
    field: Annotated[str, typer.Option(help="The field that holds a document's text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    text_unit: Annotated[str, typer.Option(help="A document of a text file: file, paragraph or line.")] = "file",
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out, by their hash.")] = 0.01,
    max_tokens: Annotated[
        str | None, typer.Option(help="Stop after so many training tokens, the first ones of the sources: 10B.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove what an earlier start left in the folder, and start again.")
    ] = False,
) -> None:
    """Text to token shards (Megatron .bin/.idx), with tokenizer, held-out split and manifest. Killed, it goes on."""
    from qatscale.cli.terminal import console
    from qatscale.config.amounts import positive_amount
    from qatscale.data.prepare import prepare as prepare_data

    prepare_data(
        sources,
        out,
        field=field,
        split=split,
        text_unit=text_unit,  # type: ignore[arg-type]  # checked there
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        max_tokens=None if max_tokens is None else positive_amount("--max-tokens", max_tokens),
        workers=workers,
        restart=restart,
        console=console(),
    )


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="Folder with .bin/.idx shards of Megatron-LM, GPT-NeoX or NeMo.")],
    train: Annotated[list[str], typer.Option(help="Names of the training shards, without .bin.")],
    validation: Annotated[list[str] | None, typer.Option(help="Names of the held-out shards.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of their tokenizer; default: the largest id found.")] = None,
) -> None:
    """Make token shards from elsewhere usable as they are: write the manifest beside them."""
    from qatscale.data.adopt import adopt as adopt_shards

    adopt_shards(folder, train=train, validation=validation or [], vocab_size=vocab_size)


# --- train ---


@app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe by name (`qatscale recipes`) or the path of a YAML file.")],
    overrides: Overrides = None,
    branch_from: Annotated[
        str | None, typer.Option(help="Start from another run's checkpoint: RUN, RUN@STEP or a checkpoint folder.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the timeline, and what a process of the layout would need; train nothing."
        ),
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="With --dry-run: draw the timeline into this file.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: GPUs of the job. [default: WORLD_SIZE, or one model's]")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="With --dry-run: whether it fits into this device: H200, 'H100 80GB HBM3'.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="With --dry-run and --gpu: tokens/s at this share of the peak: 0.4.")
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(help="With --dry-run: GB/s a GPU sends (nccl-tests' busbw). [default: 50; 400 inside a node]"),
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(help="With --dry-run: whether it fits into so many GB of a node's host memory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON for programs.")] = False,
) -> None:
    """Train a run, or go on with it where it stopped. `deepspeed launch/train.py …` does the same on many processes."""
    from qatscale.config import load_run_config

    config = load_run_config(recipe, overrides or ())
    if dry_run:
        from qatscale.cli.scale import print_dry_run
        from qatscale.engine.estimate.fits import Given

        given = Given(gpu, mfu, network, host_memory)
        print_dry_run(config, branch_from, figure, processes, given, as_json)
    else:
        only_dry = {
            "--processes": processes, "--gpu": gpu, "--mfu": mfu, "--network": network, "--host-memory": host_memory,
            "--json": as_json or None,
        }  # fmt: skip
        for option, value in only_dry.items():
            if value is not None:
                raise UserError(option, None, "has no effect without --dry-run.", "Add it, or leave this out.")
        _train(config, branch_from)


@app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)
def resume(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    overrides: Overrides = None,
) -> None:
    """Go on with a stopped run from its newest checkpoint. Only what does not change the result may be overridden."""
    from qatscale.config import load_run_config
    from qatscale.tracking.run_folder import RunFolder

    folder = RunFolder.open(run.resolve())
    where = [f"output={folder.path.parent}", f"name={folder.path.name}"]  # a run may have been moved or renamed
    _train(load_run_config(folder.path / "recipe.yaml", [*where, *(overrides or ())]), None)


@app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)
def branch(
    checkpoint: Annotated[str, typer.Argument(help="Where to start: RUN, RUN@STEP or a checkpoint folder.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="name=NAME KEY=VALUE…", help="What is other than in the parent's recipe.")
    ],
) -> None:
    """A new run from another run's checkpoint: another end of the schedule, other betas, QAT at some width."""
    from qatscale.cli.train import branch_config

    _train(branch_config(checkpoint, overrides), checkpoint)


def _train(config: object, branch_from: str | None) -> None:
    from qatscale.cli.train import run_training

    if run_training(config, branch_from) == "stopped":  # type: ignore[arg-type]
        sys.exit(EXIT_REQUEUE)


# --- results ---


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="RUN, RUN@STEP or a checkpoint folder; with --harness also an export.")
    ],
    ptq: Annotated[
        list[float] | None, typer.Option(help="Also after post-training quantization to so many bits.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data instead of the run's own.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Held-out tokens to use instead of the recipe's: 1M.")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Instead: tasks of lm-evaluation-harness: arc_easy,hellaswag.")
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --harness: a folder of task definitions. Python functions that they name are executed."
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="With --harness: worked examples. [default: the task's]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: questions of each task. [default: all]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --harness: texts at a time. [default: 8]")] = None,
    as_json: Json = False,
) -> None:
    """Validation loss and perplexity in full-precision, quantized and post-training-quantized view.

    With --harness the scores of EleutherAI's lm-evaluation-harness, of a checkpoint (in its quantized view once it has
    switched) or of an exported folder that transformers loads.
    """
    if harness is not None:
        from qatscale.cli.inference import print_harness

        for option, value in (("--ptq", ptq or None), ("--data", data), ("--tokens", tokens)):
            if value is not None:
                raise UserError(
                    option, None, "has no effect with --harness, whose tasks bring their data.", "Leave it out."
                )
        print_harness(checkpoint, harness, tasks_folder, shots, limit, batch or 8, as_json)
        return
    from qatscale.cli.results import print_evaluation

    for option, given in (("--tasks-folder", tasks_folder), ("--shots", shots), ("--limit", limit), ("--batch", batch)):
        if given is not None:
            raise UserError(option, None, "has no effect without --harness.", "Add it, or leave this out.")
    print_evaluation(checkpoint, ptq or [], data, tokens, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="RUN, RUN@STEP, a checkpoint folder, or an exported folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most; the model may end its text earlier.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among this many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws; equal seeds give equal text.")] = 0,
    view: Annotated[
        str | None,
        typer.Option(help="View of a checkpoint's weights: fp or quantized. [default: quantized once it has switched]"),
    ] = None,
) -> None:
    """Continue a prompt with text from a model, printed as it is generated."""
    from qatscale.cli.inference import print_text

    print_text(model, prompt, view, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


@app.command()
def runs(
    output: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"), as_json: Json = False
) -> None:
    """A table of runs."""
    from qatscale.cli.results import print_runs

    print_runs(output, as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    figure: Annotated[Path | None, typer.Option(help="Draw the loss curves into this file (PNG, SVG, PDF).")] = None,
    as_json: Json = False,
) -> None:
    """Runs side by side: losses in each view, switch, speeds; with --figure their loss curves."""
    from qatscale.cli.results import print_comparison

    print_comparison(folders, figure, as_json)


@app.command()
def track_sync(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow store than the run's recipe names.")] = None,
) -> None:
    """Upload to MLflow what an unreachable server missed."""
    from qatscale.cli.results import run_sync

    run_sync(run, uri)


app.command()(export)


@app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)
def convert(
    source: Annotated[
        str, typer.Argument(help="RUN, RUN@STEP or a checkpoint folder; a universal checkpoint; a Hugging Face folder.")
    ],
    overrides: Overrides = None,
    *,
    to: Annotated[str, typer.Option(help="checkpoint (a run's folder to branch from), universal or hf.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    recipe: Annotated[
        str | None, typer.Option(help="To a checkpoint from elsewhere: the recipe that it is to belong to.")
    ] = None,
    trained_tokens: Annotated[
        str | None, typer.Option(help="From Hugging Face: tokens that the model has seen, 90B. [default: count from 0]")
    ] = None,
) -> None:
    """Between a training checkpoint, DeepSpeed's universal layout and Hugging Face: from any of them to the others.

    DeepSpeed reads the universal layout under ZeRO-1 and 2, with `"checkpoint": {"load_universal": true}`. Under ZeRO-3
    it would give all parameter groups the settings of the first, without a word, so what it needs for that is not
    written and it stops. Runs of our own need no conversion: their checkpoints fit every layout.
    """
    from qatscale.cli.convert import run_convert

    run_convert(source, to, out, recipe, overrides or [], trained_tokens)


# --- law ---


app.command()(fit)
app.command()(report)
app.add_typer(study, name="study")


# --- first steps ---


@app.command()
def quickstart(
    out: Annotated[Path, typer.Argument(help="Where everything is written.")] = Path("outputs/quickstart"),
) -> None:
    """The main job on text that is already on this machine, in a few minutes on two cores."""
    from qatscale.cli.quickstart import run_quickstart

    run_quickstart(out)
