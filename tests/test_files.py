"""Laws of writing aside: whole or not at all, whatever was in the place, and nothing left behind."""

import os
import pathlib
import stat
import subprocess
import sys
import threading

import pytest

from ldm_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_as_text_or_bytes(tmp_path):
    for content in ("é漢\n", b"\0\xff"):
        files.write(tmp_path / "file", content)
        expected = content.encode() if isinstance(content, str) else content
        assert (tmp_path / "file").read_bytes() == expected
    assert names(tmp_path) == ["file"]


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize("error", [FullDiskError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path, error, folder):
    if not folder:
        files.write(tmp_path / "place", "old")
    with pytest.raises(error), files.replacing(tmp_path / "place") as aside:
        if folder:
            (aside / "inner").mkdir(parents=True)
            (aside / "inner" / "half").write_text("half")
        else:
            aside.write_text("half")
        raise error
    assert names(tmp_path) == ([] if folder else ["place"])
    assert folder or (tmp_path / "place").read_text() == "old"


def test_a_folder_takes_its_place_with_all_that_is_in_it(tmp_path):
    with files.replacing(tmp_path / "place") as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("whole")
        assert names(tmp_path) == [aside.name]
    assert names(tmp_path) == ["place"] and (tmp_path / "place" / "inner" / "file").read_text() == "whole"


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "place" / "old").mkdir(parents=True)
    with pytest.raises(OSError), files.replacing(tmp_path / "place") as aside:
        aside.mkdir()
        (aside / "new").mkdir()
    assert names(tmp_path) == ["place"] and names(tmp_path / "place") == ["old"]


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    files.write(tmp_path / "elsewhere" / "run7", "old")
    (tmp_path / "latest").symlink_to(pathlib.Path("elsewhere") / "run7")
    files.write(tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "elsewhere" / "run7").read_text() == "new"
    assert names(tmp_path) == ["elsewhere", "latest"] and names(tmp_path / "elsewhere") == ["run7"]


def test_a_place_that_does_not_exist_is_an_error_and_nothing_is_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "missing" / "file", "content")
    assert names(tmp_path) == []


def test_a_new_file_is_as_readable_as_any_other(tmp_path):
    files.write(tmp_path / "file", "content")
    (tmp_path / "other").write_text("content")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes[0] == modes[1]


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    contents = [str(i) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=files.write, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() in contents


KILLED = """
import os, signal, sys
from ldm_jax import files
with files.replacing(sys.argv[1]) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_was_there(tmp_path):
    files.write(tmp_path / "file", "old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], env=environment, check=False)
    assert (tmp_path / "file").read_text() == "old"
    assert all(name == "file" or (name.startswith(".file.") and name.endswith(".aside")) for name in names(tmp_path))
