"""Small files: read whole, or refused with their name."""

import os
from pathlib import Path

import pytest

from qatlaw.files import read_small, write_atomic
from qatscale.errors import UserError
from qatscale.new_folder import appearing, check_new
from tests.permissions import as_ordinary_user


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


def test_two_that_write_one_file_at_once_share_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, late = tmp_path / "fit.json", [b"late"]

    def meanwhile(_: int) -> None:
        while late:
            write_atomic(path, late.pop())

    monkeypatch.setattr("qatlaw.files.os.fsync", meanwhile)
    write_atomic(path, b"first")
    assert path.read_bytes() == b"first", "the last one to finish"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_stays_a_device() -> None:
    with as_ordinary_user():  # who may make no file in /dev
        write_atomic(Path(os.devnull), b"content")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("place", [".", "..", "new/.."])
def test_a_folder_to_make_has_a_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not the name of a new folder"):
        check_new(Path(place))


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
