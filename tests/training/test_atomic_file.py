"""Files that are there whole or not at all."""

import pytest

from sinkformer_pl.training.atomic_file import replacing


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "new/a.json"
    for text in ("first", "second"):
        with replacing(path) as file:
            file.write(text)
    assert path.read_text() == "second"
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines(["a part", None])
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(FileExistsError), replacing(tmp_path / "new/deeper/a.json"):
        (tmp_path / "new/b").mkdir(exist_ok=(tmp_path / "new/b").touch())
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new/b"]
