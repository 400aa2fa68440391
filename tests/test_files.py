"""Small files: read whole, or refused with their name."""

from pathlib import Path

import pytest

from qatlaw.files import read_small, write_atomic
from qatscale.errors import UserError
from qatscale.new_folder import appearing


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


def test_two_processes_that_make_one_folder_do_not_share_its_parts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with appearing(out) as first:
        (first / "model").write_text("one")
        with pytest.raises(UserError, match="another process is writing there"), appearing(out):
            raise AssertionError
    assert (out / "model").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"), appearing(out) as late:  # made by another host, say
        (late / "model").write_text("two")
    assert (out / "model").read_text() == "one"
