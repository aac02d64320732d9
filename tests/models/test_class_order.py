"""Class maps that would number the folders of an image folder silently otherwise than they were meant to."""

import pickle

import pytest
from conftest import Code

from art_clat.models.class_order import number_folders


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("map.txt", b"cat\n\ndog\n", "entry 2 of .* is empty"),  # timm numbers dog 2
        ("map.json", b'["cat", "", "dog"]', "entry 2 of .* is empty"),
        ("map.json", b'{"cat": 1, "dog": 0, "cat": 0, "eel": 1}', "it has cat more than once"),
        ("map.json", b'{"cat": 1, "dog": 2}', "0…1, each once; it has 1 to 2"),
        ("map.txt", b"Cat\nDog\n", r"lacks the folder\(s\) cat, dog\. Names differ in upper and lower case"),
    ],
)
def test_doubtful_maps_are_refused(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        number_folders(["cat", "dog"], class_map=tmp_path / name)


def test_a_pickle_is_not_opened(tmp_path):
    Code.path = str(tmp_path / "executed")
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"map\.pkl is no text"):
        number_folders(["cat"], class_map=tmp_path / "map.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_text_of_another_editor(tmp_path):
    (tmp_path / "map.txt").write_bytes(b"\xef\xbb\xbfdog\r\ncat\r\n\r\n")
    assert number_folders(["cat", "dog"], class_map=tmp_path / "map.txt") == {"dog": 0, "cat": 1}


def test_parts_of_a_data_set_are_not_classes():
    with pytest.raises(ValueError, match="the folders train, val are parts of a data set"):
        number_folders(["train", "val"])
    assert number_folders(["test", "train_station"]) == {"test": 0, "train_station": 1}
