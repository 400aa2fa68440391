"""Small files: read whole, or refused with their name."""

from pathlib import Path

import pytest

from qatlaw.files import read_small, write_atomic


def test_a_file_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatlaw.files.LARGEST", 1 << 20)
    with pytest.raises(OSError, match="larger than 1 MB: '/dev/zero'"):
        read_small(Path("/dev/zero"))


def test_a_place_that_holds_no_file_is_named_and_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "a.png"
    folder.mkdir()
    for place in (folder, Path("/proc/a.png"), Path(__file__) / "a.png"):
        with pytest.raises(OSError, match=rf"'{place}'$"):
            write_atomic(place, b"content")
    assert list(tmp_path.iterdir()) == [folder]
