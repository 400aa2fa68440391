"""Small files: read whole, or refused with their name."""

import subprocess
import sys
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


WRITER = """
import sys
from pathlib import Path
from qatlaw.files import write_atomic
path = Path(sys.argv[1])
print(flush=True)
for _ in range(100):
    write_atomic(path, 100_000 * sys.argv[2].encode())
    content = path.read_bytes()
    assert (len(content), len(set(content))) == (100_000, 1), "a piece of each"
"""


def test_two_processes_that_write_one_file_write_one_after_the_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "fit.json")]
    both = [subprocess.Popen([*command, letter], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for letter in "ab"]
    assert [one.communicate()[1] for one in both] == [b"", b""]
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]


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
