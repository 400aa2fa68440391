"""`qatscale prepare` and `adopt`: token shards from text, or from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
        typer.Option(
            help="A SentencePiece .model, a tokenizer.json, or a Hugging Face tokenizer (folder or name). "
            "[default: train a tokenizer]"
        ),
    ] = None,
    eos: Annotated[
        str | None, typer.Option(help="The token that ends a document, or its id. [default: the tokenizer's]")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(max=2**31 - 1, help="Vocabulary size of the tokenizer to train. [default: 32000]")
    ] = None,
    field: Annotated[str, typer.Option(help="The field that holds a document's text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    text_unit: Annotated[
        str, typer.Option(help="What a document of a text file is: file, paragraph or line.")
    ] = "file",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is held out, chosen by their hash.")
    ] = 0.01,
    max_tokens: Annotated[
        str | None, typer.Option(help="Stop soon after this many training tokens, the first ones of the sources: 10B.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: one per core]")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove what an earlier start left in the folder, and start again.")
    ] = False,
) -> None:
    """Turn text into token shards (Megatron .bin/.idx) with tokenizer, held-out split and manifest.

    If it is stopped, the same command continues.
    """
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
        eos=eos,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        max_tokens=None if max_tokens is None else positive_amount("--max-tokens", max_tokens),
        workers=workers,
        restart=restart,
        console=console(),
    )


def adopt(
    folder: Annotated[Path, typer.Argument(help="Folder with .bin/.idx shards of Megatron-LM, GPT-NeoX or NeMo.")],
    train: Annotated[list[str], typer.Option(help="Names of the training shards, without .bin.")],
    validation: Annotated[list[str] | None, typer.Option(help="Names of the held-out shards.")] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the training shards' documents that is held out. [default: 0.01, none with --validation]"
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(max=2**31 - 1, help="Vocabulary size of their tokenizer. [default: from the largest token id]"),
    ] = None,
    eos: Annotated[
        int | None, typer.Option(help="Id of the token that ends a document, for data.document_mask.")
    ] = None,
) -> None:
    """Make token shards of other programs usable as they are: write a manifest beside them.

    No file is copied. Held-out documents stay where they are, and training skips them.
    """
    from qatscale.data.adopt import adopt as adopt_shards

    named = {"train": train, "validation": validation or []}
    for names in named.values():
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            print(f"note: named more than once, read once: {', '.join(repeated)}")
    manifest = adopt_shards(
        folder,
        **{split: list(dict.fromkeys(names)) for split, names in named.items()},
        validation_fraction=validation_fraction,
        vocab_size=vocab_size,
        eos_id=eos,
    )
    print(f"{folder}: {manifest.summary()}")
