"""What is refused on a disk."""

import os
import re
from pathlib import Path

import pytest

from sinkformer_pl.data.reading import cause, files_below, files_ending, is_folder, list_folder, open_file
from sinkformer_pl.errors import UserError


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: not a regular file; replace or remove it"):
            open_file(tmp_path / name)


def test_other_files_that_cannot_be_opened_are_named(here, refused):
    write(here, "file")
    with pytest.raises(UserError, match=r"absent: no such file; put it there"):
        open_file(here / "absent")
    with pytest.raises(UserError, match=r"file/below: can't be read \(Not a directory\)"):
        open_file(here / "file" / "below")
    with pytest.raises(UserError, match=r"a folder, not a file"):
        open_file(here)
    with refused(here / "file"), pytest.raises(UserError, match=r"file: can't be read \(Permission denied\)"):
        open_file(here / "file")
    with open_file(here / "file") as file:
        assert file.read() == b"file"


def test_files_are_listed_sorted_at_any_depth_through_links_and_hidden_ones_left_out(tmp_path):
    write(tmp_path / "a", "z.txt", "b/c/deep.txt", "b/a.txt", ".hidden/x.txt", "b/.hidden")
    write(tmp_path / "other", "linked.txt")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    found = [path.relative_to(tmp_path / "a").as_posix() for path in files_below(tmp_path / "a")]
    assert found == ["z.txt", "b/a.txt", "b/c/deep.txt", "link/linked.txt"]
    (tmp_path / "a" / "y.txt").mkdir()
    write(tmp_path / "a", "x.TXT")
    assert [path.name for path in files_ending(tmp_path / "a", ".txt")] == ["x.TXT", "y.txt", "z.txt"]
    (tmp_path / "a" / "x.TXT").unlink()
    folders, files = list_folder(tmp_path / "a")
    assert ([path.name for path in folders], [path.name for path in files]) == (["b", "link", "y.txt"], ["z.txt"])


def test_a_link_that_leads_up_is_refused(tmp_path):
    write(tmp_path, "a/b/file")
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    with pytest.raises(UserError, match=r"a/b/up: a link to a folder that it lies in; remove it"):
        list(files_below(tmp_path / "a"))


def test_a_name_that_no_prediction_file_could_hold_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/caf\\xe9: a name that isn't UTF-8; rename it")) as error:
        list_folder(tmp_path)
    str(error.value).encode()


def test_a_folder_that_cannot_be_read_is_named(here, refused):
    write(here, "a/b/file")
    assert is_folder(here / "a" / "b")
    assert not is_folder(here / "a" / "b" / "file")
    assert not is_folder(here / "a" / "b" / "file" / "below")
    assert not is_folder(here / "absent")
    with refused(here / "a" / "b"), pytest.raises(UserError, match=r"^a/b: can't be read \(Permission denied\)"):
        list(files_below(here / "a"))
    with refused(here / "a"), pytest.raises(UserError, match=r"^a/b: can't be read \(Permission denied\)"):
        is_folder(here / "a" / "b")


def test_causes_are_one_line_without_the_path():
    assert cause(FileNotFoundError(2, "No such file or directory", "/some/path")) == "No such file or directory"
    assert cause(OSError("image file\n is truncated")) == "image file is truncated"
    assert cause(MemoryError()) == "MemoryError"
