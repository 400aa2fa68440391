from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from tests.data.data_corpora import documents


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(documents(200, seed=99), 700)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    tokenizer.save(folder)
    return folder
