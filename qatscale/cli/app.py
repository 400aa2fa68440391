"""The Typer application: every command, in the order of `qatscale --help`."""

from __future__ import annotations

import typer

from qatlaw.cli import planner
from qatscale.cli.convert import convert
from qatscale.cli.evaluate import evaluate, generate
from qatscale.cli.export import export
from qatscale.cli.fit import fit, report
from qatscale.cli.plan import RecipesAndGpus
from qatscale.cli.prepare import adopt, prepare
from qatscale.cli.quickstart import quickstart
from qatscale.cli.recipes import config, recipes
from qatscale.cli.runs import compare, runs, track_sync
from qatscale.cli.study import study
from qatscale.cli.train import branch, resume, train

app = typer.Typer(
    help="Plan, run and analyse compute-optimal quantization-aware pre-training on DeepSpeed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OVERRIDES_MAY_HAVE_DASHES = {"ignore_unknown_options": True}
"""`--qat.bits=2` reaches the recipe, whose error names the key that was meant."""

app.add_typer(planner, name="plan", context_settings={"obj": RecipesAndGpus()})
for command in (config, recipes, prepare, adopt):
    app.command()(command)
for command in (train, resume, branch):
    app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)(command)
for command in (evaluate, generate, runs, compare, track_sync, export):
    app.command()(command)
app.command(context_settings=_OVERRIDES_MAY_HAVE_DASHES)(convert)
for command in (fit, report):
    app.command()(command)
app.add_typer(study, name="study")
app.command()(quickstart)
