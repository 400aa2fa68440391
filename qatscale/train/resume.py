"""Where a run begins: fresh, resumed, or branched from another run's checkpoint. Decided before any process group."""

from __future__ import annotations

import math
from pathlib import Path

from qatscale.config.places import absolute_places
from qatscale.config.recipe import config_differences, load_run_config
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest as DataManifest
from qatscale.data.open import mixture_of
from qatscale.engine.checkpoints.files import newest_checkpoint, read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import UserError
from qatscale.new_folder import check_place
from qatscale.schedule.build import build_timeline
from qatscale.schedule.difference import first_difference
from qatscale.schedule.timeline import Timeline
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import ResumePlan

MAY_CHANGE = (
    "engine.", "checkpoint.", "evaluation.", "tracking.", "batch.micro_batch", "log_interval", "output", "data.path",
    "name", "optimizer.on_spike", "optimizer.spike_",
)  # fmt: skip
"""Keys that a resume may change. None of them changes what is computed, except for the order of sums. `name` is the
folder's, which may have been renamed."""


def as_begun(config: RunConfig, folder: RunFolder) -> RunConfig:
    """`init` and `qat.lr_ratio` as numbers where they say `auto`: those that the folder's run began with, or a new
    run's. A run keeps them when a later version has others.
    """
    begun = folder.run_file.exists()
    if config.init == "auto":  # versions that did not record it had 1
        recorded = folder.recipe.get("init", 1) if begun else "auto"
        config = config.model_copy(update={"init": 2 if recorded == "auto" else recorded})
    if config.qat.scheme == "fp" or config.qat.lr_ratio != "auto" or config.qat.learning_rate is not None:
        return config
    # Versions that did not record the ratio used 1. A full-precision run recorded null.
    ratio = (folder.timeline.get("qat_lr_ratio", 1.0) if begun else None) or build_timeline(config).qat_lr_ratio
    return config.model_copy(update={"qat": config.qat.model_copy(update={"lr_ratio": ratio})})


def plan_resume(config: RunConfig, timeline: Timeline, branch_from: str | None = None) -> ResumePlan | None:
    """Where the run that `config` describes begins; None if it is done.

    A folder of this name with the same configuration is resumed from its newest checkpoint. UserError where its
    configuration differs, naming every key with its old and new value, and where the checkpoint to branch from does
    not fit the run.
    """
    folder = RunFolder(config.folder)
    if not folder.run_file.exists():
        check_place("output", config.output)
        return _branch(config, timeline, branch_from) if branch_from else ResumePlan(None, None, False, None)
    if folder.imported:
        problem = f"{folder.path} was imported from {folder.imported}; it is branched from, not trained."
        raise UserError("name", config.name, problem, f"qatscale branch {folder.path} name=NAME KEY=VALUE…")
    notices = _check_same_run(config, folder, branch_from)
    if folder.is_done:
        return None
    if _reads_a_former_order(folder):
        problem = f"{folder.path} was begun by a version that read the training data in another order."
        fix = "Finish it with that version, or branch from its checkpoint, which continues in this version's order."
        raise UserError("name", config.name, problem, fix)
    _ = folder.timeline  # a damaged one is refused now, not by who draws the figures of the finished run
    parent = folder.run["parent"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest:
        return ResumePlan(newest, read_manifest(newest), True, parent, notices)
    if parent:  # stopped before its first own checkpoint: from the branch point again
        trunk = folder.parent  # it may have moved together with this run
        origin = find_checkpoint(f"{trunk.path if trunk else parent['folder']}@{parent['step']}")
        return ResumePlan(origin, read_manifest(origin), True, parent, notices)
    return ResumePlan(None, None, True, None, notices)


def _check_same_run(config: RunConfig, folder: RunFolder, branch_from: str | None) -> tuple[str, ...]:
    old = as_begun(load_run_config(folder.path / "recipe.yaml"), folder)
    notices: list[str] = []
    wrong: list[str] = []
    now = RunConfig.model_validate(absolute_places(as_begun(config, folder).model_dump(mode="json")))
    for difference in config_differences(old, now):
        line = f"{difference.key} was {difference.old!r} and is now {difference.new!r}"
        (notices if difference.key.startswith(MAY_CHANGE) else wrong).append(line)
    if wrong:
        problem = f"{folder.path} holds a run of another configuration: {'; '.join(wrong)}."
        raise UserError("name", config.name, problem, "Give this run another name, or branch from that one.")
    parent = folder.run["parent"]
    if branch_from is not None:
        origin = find_checkpoint(branch_from)
        step = read_manifest(origin).step
        if parent is None or Path(parent["folder"]).resolve() != _run_of(origin).resolve() or parent["step"] != step:
            began = f"was branched from {parent['folder']}@{parent['step']}" if parent else "began fresh"
            fix = "Give this run another name."
            raise UserError("branch", branch_from, f"{folder.path} holds a run already, which {began}.", fix)
    return tuple(f"changed for the rest of the run: {line}" for line in notices)


def _reads_a_former_order(folder: RunFolder) -> bool:
    """Whether a run was begun when sequences were shuffled within blocks: its recipe then has the blocks' size."""
    return "shuffle_block" in folder.recipe["data"]


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _branch(config: RunConfig, timeline: Timeline, branch_from: str) -> ResumePlan:
    checkpoint = find_checkpoint(branch_from)
    manifest = read_manifest(checkpoint)
    run = _run_of(checkpoint)
    parent = as_begun(load_run_config(run / "recipe.yaml"), RunFolder(run))
    for key in ("model", "data.sequence_length", "batch.sequences"):
        for difference in config_differences(parent, config):
            if difference.key == key or difference.key.startswith(f"{key}."):
                problem = f"a branch keeps its parent's {key}, which is {difference.old!r}."
                fix = f"`qatscale branch {branch_from} name=NAME` begins with its recipe."
                raise UserError(difference.key, difference.new, problem, fix)
    if manifest.step >= timeline.steps:
        problem = f"its step {manifest.step} is not before the end of this run, {timeline.steps} steps."
        raise UserError("branch", branch_from, problem, "Train on more tokens, or branch from an earlier checkpoint.")
    switched_at, switch = manifest.switched_at, timeline.switch_step
    if switched_at is not None and switch != switched_at:
        here = "never switches" if switch is None else f"switches at step {switch}"
        problem = f"its run had switched to QAT at step {switched_at}, and this run {here}."
        fraction = "" if switch is None else f", or set qat.fraction={1 - switched_at / timeline.steps:.8g}"
        raise UserError("branch", branch_from, problem, f"Branch from a checkpoint before the switch{fraction}.")
    if switched_at is None and switch is not None and switch < manifest.step:
        problem = f"step {manifest.step} lies after this run's switch at step {switch}."
        share = math.floor((1 - manifest.step / timeline.steps) * 1e10 + 1e-3) / 1e10  # as many digits as are needed
        fix = f"Branch from a checkpoint at or before step {switch}, or set"
        fix = "Set qat.scheme=sequential and" if config.qat.scheme == "scratch" else fix
        raise UserError("branch", branch_from, problem, f"{fix} qat.fraction <= {share:.10g}.")
    if switched_at is not None:
        for difference in config_differences(parent, config):
            if difference.key in ("qat.bits", "qat.group_size", "qat.embedding_bits"):
                problem = f"the checkpoint's scales are for {difference.old!r}; after the switch a branch keeps them."
                raise UserError(difference.key, difference.new, problem, "Branch from a checkpoint before the switch.")
    notices = [f"the parent failed: {failure}"] if (failure := RunFolder(run).failure) else []
    difference_before = first_difference(build_timeline(parent), timeline, manifest.step)
    if difference_before is not None:
        notices.append(f"this run's schedule is not its parent's up to the branch: {difference_before}")
    cooled = build_timeline(parent).last_cooldown
    begun = cooled is not None and cooled < manifest.step
    other = [
        key for key in ("seed", *["cooldown_seed"] * begun) if getattr(parent.data, key) != getattr(config.data, key)
    ]
    if other:
        notices.append(
            f"another data.{other[0]}: the tail may show sequences again that the trunk has seen in this epoch"
        )
    elif places(parent, build_timeline(parent), manifest.step) != places(config, timeline, manifest.step):
        notices.append("another mixture up to the branch: the tail may show sequences again that the trunk has seen")
    if _reads_a_former_order(RunFolder(run)):
        notices.append("the parent is a former version's, with another order of data: the tail may repeat sequences")
    origin = {"name": run.name, "folder": str(run), "step": manifest.step}
    return ResumePlan(checkpoint, manifest, False, origin, tuple(notices))


def places(config: RunConfig, timeline: Timeline, step: int) -> dict[str, int]:
    """By source how many sequences a run has read in its first steps: where its orders continue."""
    sequences = step * config.batch.sequences
    mixture = mixture_of(config, timeline)
    counts = zip(mixture.names, mixture.count(sequences), strict=True)
    return {name: int(count) for name, count in counts if count}


def check_data(config: RunConfig, resume: ResumePlan, data: DataManifest) -> tuple[str, ...]:
    """Notices about the data of a run that starts from a checkpoint.

    UserError where a resume would use other data, and where their ids are another tokenizer's than the checkpoint's.
    """
    if resume.manifest is None:
        return ()
    data.check_tokenizer(resume.manifest.tokenizer)
    if resume.manifest.data == data.fingerprint:
        return ()
    if not resume.manifest.data:
        return ("what the branch's parent was trained on is not known",)
    assert resume.checkpoint is not None
    if _run_of(resume.checkpoint) == config.folder.resolve():
        problem = "holds other tokens than the run was trained on up to its checkpoint."
        raise UserError(
            "data.path", None, problem, "Give the folder of the same data, or branch to continue on other data."
        )
    return ("the branch continues on other data than its parent was trained on",)
