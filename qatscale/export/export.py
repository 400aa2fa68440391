"""From a checkpoint to a folder that a client loads: open, lay out, write, verify, describe. Errors leave no folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatlaw.files import write_atomic
from qatscale.data.open import open_validation
from qatscale.data.tokenizer import tokenizer_folder
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.errors import FailedError, UserError
from qatscale.export.encoding import ExportLayout
from qatscale.export.formats.base import Format, get_format
from qatscale.export.plugin_source import PluginFolder
from qatscale.export.report import FILE, card, contents, provenance
from qatscale.export.source import ExportSource, open_source
from qatscale.export.verify import Verification, materialised
from qatscale.files import sealed, write_json
from qatscale.new_folder import appearing, check_new
from qatscale.train.validation import open_view

NO_TOKENIZER = "none"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DEFAULT_TOKENS = 65_536
"""Held-out tokens that a verification uses at most, unless asked for more."""


class VerificationError(FailedError):
    """A client computes something other than the trained model. The export is removed."""

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        problems = [*verification.problems]
        problems += [f"{client.client}: {problem}" for client in verification.clients for problem in client.problems]
        shown = "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if problems[4:] else "")
        super().__init__(f"the export differs from the trained model and was removed: {shown}")


def export(
    checkpoint: str,
    out: Path,
    *,
    format: str = "hf",
    ptq_bits: float | None = None,
    fallback: bool = False,
    q1_0: bool = False,
    tokenizer: str | None = None,
    data: Path | None = None,
    unfinished: bool = False,
    tokens: int | None = None,
    verify: bool = True,
    license: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the folder `out` and return its export.json.

    checkpoint: RUN, RUN@STEP or a checkpoint folder. tokenizer: its folder, or "none"; None: that of the run's data.
    tokens: held-out ones to verify on. license: the Hub's identifier, for the model card. Other settings as in
    `open_source`, `Format.layout` and `Format.with_q1_0`. progress: called with the current activity.
    Everything but the verification streams, so that the largest tensor bounds its memory. UserError for wrong input,
    before anything is written; VerificationError and OSError leave no folder.
    """
    chosen = get_format(format)
    if q1_0:
        chosen = chosen.with_q1_0()
    check_new(out)
    source = open_source(checkpoint, ptq_bits=ptq_bits, unfinished=unfinished, data=data)
    chosen = chosen.fitting(source.config.model)
    layout = chosen.layout(source, fallback)
    origin = provenance(source)
    tokenizer_files = find_tokenizer(source, tokenizer)
    held_out = _held_out(source, tokens) if verify else []  # missing data are reported before any file is written
    with appearing(out) as folder, torch.no_grad():
        progress(f"writing {len(layout.entries)} tensors")
        chosen.write(layout, folder, tokenizer_files)
        progress("comparing what its clients compute with the trained model (fewer --tokens are quicker)")
        verification = _verify(layout, chosen, folder, held_out) if verify else None
        if verification and not verification.passed:
            raise VerificationError(verification)
        described = contents(layout, chosen, origin, folder, verification)
        page = card(described, chosen, source.config, tokenizer_files is not None, license)
        write_atomic(folder / "README.md", page.encode())
        write_json(folder / FILE, sealed(described))
    return described


def find_tokenizer(source: ExportSource, given: str | None) -> Path | None:
    """The folder with the tokenizer's files; None = exported without. UserError where it is missing."""
    if given == NO_TOKENIZER:
        return None
    if given is not None:
        if not Path(given).is_dir():
            fix = f"Give one with tokenizer.model or tokenizer.json, or {NO_TOKENIZER}."
            raise UserError("--tokenizer", given, "is not a folder.", fix)
        return Path(given)
    if isinstance(source.reader, PluginFolder) and any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        return source.folder
    data = source.config.data.folder
    fix = f"Give one, --tokenizer FOLDER, or the prepared data, --data FOLDER, or add --tokenizer {NO_TOKENIZER}."
    if data is None or not data.is_dir():
        gone = "the run's data, which hold the tokenizer, no longer exist."
        raise UserError("data.path", str(data) if data else None, gone, fix)
    folder = tokenizer_folder(data, source.manifest.tokenizer)
    if folder is None or not folder.is_dir():
        raise UserError("tokenizer", None, f"{data} holds none.", fix)
    for file in folder.iterdir():
        file.open("rb").close()  # an unreadable file is reported before anything is written
    return folder


def _verify(layout: ExportLayout, format: Format, folder: Path, held_out: Sequence[Tensor]) -> Verification:
    source = layout.source
    if isinstance(source.reader, PluginFolder):
        trained = source.reader.plain_model()
    else:
        model, _ = load_checkpointed_model(source.reader, source.config, torch.device("cpu"))
        with open_view(model, source.view):
            trained = materialised(model)
        del model
    return Verification(layout, format.path(folder), format.clients, trained, held_out)


def _held_out(source: ExportSource, tokens: int | None) -> Sequence[Tensor]:
    """Sequences of token ids, [sequence_length + 1] each."""
    limit = min(source.config.evaluation.tokens, DEFAULT_TOKENS) if tokens is None else tokens
    evaluation = source.config.evaluation.model_copy(update={"tokens": limit})
    try:
        reader = open_validation(source.config.model_copy(update={"evaluation": evaluation}))
    except UserError as error:
        fix = f"{error.fix} Or name the data, --data FOLDER, or do without, --no-verify.".strip()
        raise UserError(error.key, error.value, error.problem, fix) from None
    reader.stream.manifest.check_tokenizer(source.manifest.tokenizer)
    return [torch.from_numpy(row) for batch in reader.batches() for row in batch.tokens]
