"""Data sets by name."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Code
from PIL import Image
from torchvision import datasets

from art_clat.models.datasets import load_data, robustbench_data

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def test_digits_are_those_the_quickstart_holds_out():
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import quickstart
    finally:
        sys.path.pop(0)
    _, _, (x, y) = quickstart.load_data()
    data = load_data("digits", nb_examples=50)
    np.testing.assert_array_equal(data.x, x[:50])
    np.testing.assert_array_equal(data.y, y[:50])


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
def test_cifar10_needs_its_test_set_only(tmp_path):
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path), "test_batch"], check=True)
    data = load_data("cifar10", data_dir=tmp_path, nb_examples=7)
    assert data.x.shape == (7, 3, 32, 32) and data.y.tolist() == [3, 8, 8, 0, 6, 6, 1] and data.nb_classes == 10
    with pytest.raises(ValueError, match="`nb_examples` is 10001, cifar10 has 10000"):
        load_data("cifar10", data_dir=tmp_path, nb_examples=10_001)


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
def test_cifar10_is_what_robustbenchs_loader_returns(tmp_path, monkeypatch):
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path), "test_batch"], check=True)
    data = load_data("cifar10", data_dir=tmp_path, nb_examples=250)
    assert len(datasets.CIFAR10.train_list) == 5  # torchvision's class stays as it is
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    x, y = robustbench_data().load_cifar10(250, str(tmp_path))
    np.testing.assert_array_equal(data.x, x.numpy())
    np.testing.assert_array_equal(data.y, y.numpy())
    assert data.x.dtype == np.float32 and data.y.dtype == np.int64


def test_cifar_that_is_not_there_and_no_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError) as refused:
        load_data("cifar10", data_dir=tmp_path)
    for part in (str(tmp_path / "cifar-10-batches-py"), "test_batch", "Name or service", "cifar-10-python.tar.gz"):
        assert part in str(refused.value)


def test_image_folder(tmp_path):
    for label, name in enumerate(("cat", "dog", "fox")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (6, 5), (51 * label, 0, 255)).save(tmp_path / name / f"{number}.png")
    data = load_data(str(tmp_path), nb_examples=3)
    assert data.x.shape == (3, 3, 5, 6) and data.y.tolist() == [0, 1, 2]
    np.testing.assert_allclose(data.x[:, 0, 0, 0], 0.2 * data.y)
    assert len(load_data(str(tmp_path)).x) == 12 and data.nb_classes == 3
    Image.new("RGB", (7, 5)).save(tmp_path / "fox" / "9.png")
    with pytest.raises(ValueError, match="9.png has 5×7 pixels, .*0.png has 5×6"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), preprocessing="Res224").x.shape == (13, 3, 224, 224)
    with pytest.raises(ValueError, match="has 3 classes: without a `class_map` labels are the folders' numbers"):
        load_data(str(tmp_path), nb_classes=4, preprocessing="Res224")
    (tmp_path / "fox" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png cannot be read as an image"):
        load_data(str(tmp_path))


def test_damaged_contents_are_named(tmp_path):
    """At any place of an .npz file, and within a PNG file."""
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).random((4, 3, 8, 8)), y=np.arange(4))
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(0, len(whole) - 60, 97):
        (tmp_path / "x.npz").write_bytes(whole[:place] + bytes(60) + whole[place + 60 :])
        try:
            load_data(str(tmp_path / "x.npz"))
        except ValueError as error:
            assert "x.npz" in str(error)
    (tmp_path / "cat").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / "0.png")
    whole = bytearray((tmp_path / "cat" / "0.png").read_bytes())
    second = whole.find(b"IDAT", whole.find(b"IDAT") + 4)
    whole[second : second + 4] = b"\0\0\0\0"
    (tmp_path / "cat" / "0.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        load_data(str(tmp_path))


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_data(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_data(str(tmp_path))


def test_npz(tmp_path):
    x, y = np.full((4, 3, 5, 5), 51, np.uint8), np.arange(4)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    data = load_data(str(tmp_path / "x.npz"), nb_classes=10)
    np.testing.assert_allclose(data.x, 0.2)
    assert data.y.tolist() == [0, 1, 2, 3] and data.nb_classes == 10


def test_one_array_is_no_npz(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"one array without a name.*np\.savez"):
        load_data(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": np.zeros(3)}, "`x` and `y` are needed, it has images"),
        ({"x": np.zeros((4, 5, 5, 3)), "y": np.arange(4)}, "with the channels last"),
        ({"x": np.zeros((4, 75)), "y": np.arange(4)}, "must hold images"),
        ({"x": np.zeros((4, 3, 5, 5)), "y": np.zeros(4)}, "got .* and float64"),
        ({"x": np.array([Code()], dtype=object), "y": np.arange(1)}, "cannot be read: Object arrays"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, match):
    Code.path = str(tmp_path / "executed")
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load_data(str(tmp_path / "x.npz"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["cifar11", "there/is/no.npz"])
def test_data_that_are_not_there(name):
    with pytest.raises(FileNotFoundError, match="there is no such folder|there is no file"):
        load_data(name)
