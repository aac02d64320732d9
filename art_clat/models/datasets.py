"""Data sets to evaluate on, by name."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from art_clat.models.class_order import number_folders
from art_clat.utils.robustbench_import import robustbench_utils

#: Data sets that have a name. Anything else is an image folder or an ``.npz`` file.
DATASETS = ("cifar10", "cifar100", "imagenet", "digits")

#: RobustBench's name of how ImageNet's images are resized and cropped unless something else is asked for.
IMAGENET_PREPROCESSING = "Res256Crop224"


@dataclass(frozen=True)
class EvaluationData:
    """
    Examples to evaluate on.

    :param x: Images in [0, 1], float32, shape (n, channels, height, width).
    :param y: Index labels, shape (n,).
    :param nb_classes: Number of classes.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    nb_classes: int


def load_data(
    name: str,
    *,
    data_dir: str | os.PathLike[str] = "data",
    nb_examples: int | None = None,
    preprocessing: str | Callable[[Any], Any] | None = None,
    nb_classes: int | None = None,
    class_order: str | None = None,
    class_map: str | os.PathLike[str] | None = None,
) -> EvaluationData:
    """
    Load a data set to evaluate on.

    :param name: ``"cifar10"`` or ``"cifar100"``, torchvision's test sets; ``"imagenet"``, through RobustBench's loader;
           ``"digits"``, those of scikit-learn's that ``examples/quickstart.py`` holds out; an image folder with a
           folder for each class; or an ``.npz`` file with arrays ``x``, in [0, 1] or uint8, shape
           (n, channels, height, width), and ``y``.
    :param data_dir: The folder of the data sets that have a name. CIFAR is downloaded if it is not there.
    :param nb_examples: How many examples; `None` for all. An image folder's are evenly spaced, others are the first.
    :param preprocessing: How ImageNet's or a folder's images are resized and cropped: RobustBench's name of it, or a
           function of an image. `None` for ``"Res256Crop224"``, or for a folder's images as they are.
    :param nb_classes: Number of classes; `None` for what the data say.
    :param class_order: How an image folder's folders are numbered, ``"string"`` or ``"natural"``; see
           :func:`art_clat.models.class_order.number_folders`.
    :param class_map: A file that says which class a folder is, instead.
    :return: The examples.
    :raises ValueError: If the data do not have this form, or there are fewer examples than asked for.
    :raises OSError: If the data are not there; the message says where they were looked for.
    """
    if nb_examples is not None and nb_examples < 1:
        raise ValueError(f"`nb_examples` must be at least 1, got {nb_examples}.")
    if (class_order is not None or class_map is not None) and not Path(name).is_dir():
        raise ValueError(f"`class_order` and `class_map` are for an image folder, `dataset` is {name!r}.")
    if name in ("cifar10", "cifar100"):
        x, y, classes = *_cifar(name, Path(data_dir), nb_examples), {"cifar10": 10, "cifar100": 100}[name]
    elif name == "imagenet":
        x, y, classes = *_imagenet(Path(data_dir), nb_examples, preprocessing or IMAGENET_PREPROCESSING), 1000
    elif name == "digits":
        x, y, classes = *_digits(), 10
    elif Path(name).is_dir():
        number = partial(number_folders, order=class_order, class_map=class_map)
        x, y, classes = _image_folder(Path(name), nb_examples, preprocessing, number)
        if nb_classes not in (None, classes):
            raise ValueError(
                f"`nb_classes` is {nb_classes}, {name} has {classes} classes: without a `class_map` labels are the "
                "folders' numbers, so every class needs a folder."
            )
    elif Path(name).suffix == ".npz":
        x, y = _npz(Path(name))
        classes = int(y.max()) + 1
    else:
        raise FileNotFoundError(
            f"`dataset` must be one of {', '.join(DATASETS)}, an image folder or an .npz file, got {name!r}; there is "
            f"no such folder in {Path.cwd()}."
        )
    if len(x) < (nb_examples or 0):
        raise ValueError(f"`nb_examples` is {nb_examples}, {name} has {len(x)} examples.")
    return EvaluationData(x[:nb_examples], y[:nb_examples], nb_classes or classes)


def load_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """
    Load scikit-learn's handwritten digits.

    :return: 1,797 images in [0, 1], shape (n, 1, 8, 8), and their labels, in scikit-learn's order.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    return (digits.images[:, None] / 16).astype(np.float32), digits.target


def robustbench_data() -> ModuleType:
    """
    Import ``robustbench.data``.

    :return: The module.
    :raises ImportError: If RobustBench or what it needs is not installed.
    """
    robustbench_utils()
    import robustbench.data

    return robustbench.data  # type: ignore[no-any-return]


def _cifar(name: str, data_dir: Path, nb_examples: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load CIFAR's test set as RobustBench does, without asking for the files of the training set."""
    from torchvision import datasets

    published = getattr(datasets, name.upper())
    test_only = type(published.__name__, (published,), {"train_list": []})
    try:
        loaded = test_only(str(data_dir), train=False, download=True)
    except Exception as error:  # of torchvision, of the network, of the disk
        raise FileNotFoundError(
            f"`data_dir`: {name}'s test set was looked for in {(data_dir / published.base_folder).resolve()} "
            f"({', '.join(file for file, _ in published.test_list)} and {published.meta['filename']}, with their "
            f"published checksums) and could not be downloaded: {error}. Unpack {published.url} in "
            f"{data_dir.resolve()}, or pass the folder where it is."
        ) from error
    images = np.ascontiguousarray(loaded.data[:nb_examples].transpose(0, 3, 1, 2))
    return images.astype(np.float32) / np.float32(255), np.array(loaded.targets[:nb_examples])


def _imagenet(
    data_dir: Path, nb_examples: int | None, preprocessing: str | Callable[[Any], Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load ImageNet's validation images with RobustBench's loader, which chooses and orders them."""
    robustbench = robustbench_data()
    try:
        x, y = robustbench.load_imagenet(nb_examples or 5000, str(data_dir), _transform(preprocessing))
    except OSError as error:
        raise FileNotFoundError(
            f"`data_dir`: ImageNet's validation set was looked for in {(data_dir / 'val').resolve()}, with a folder a "
            f"class (n01440764, ...): {error}. It cannot be downloaded freely; see image-net.org."
        ) from error
    return x.numpy(), y.numpy()


def _digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load the digits that ``examples/quickstart.py`` holds out: 1,200 train, 200 validate, the others test."""
    from sklearn.model_selection import train_test_split

    x, y = load_digits()
    _, x, _, y = train_test_split(x, y, train_size=1200, stratify=y, random_state=0)
    _, x, _, y = train_test_split(x, y, train_size=200, stratify=y, random_state=0)
    return x, y


def _image_folder(
    folder: Path,
    nb_examples: int | None,
    preprocessing: str | Callable[[Any], Any] | None,
    number: Callable[[list[str]], dict[str, int]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int]:
    """Load images that lie in a folder for each class, and count the classes."""
    from torchvision.datasets import ImageFolder

    class NumberedFolder(ImageFolder):  # type: ignore[misc]
        """An image folder whose classes are numbered by us."""

        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            names, _ = super().find_classes(str(directory))
            self.numbers = number(names)
            return names, {name: self.numbers[name] for name in names}

    try:
        images = NumberedFolder(str(folder), _transform(preprocessing))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`dataset`: {folder.resolve()} has no images; a folder for every class, with images in it, is needed: "
            f"{error}"
        ) from error
    if len(images) < (nb_examples or 0):
        raise ValueError(f"`nb_examples` is {nb_examples}, {folder} has {len(images)} images.")
    # They are sorted by class. Evenly spaced ones are of every class.
    chosen = np.linspace(0, len(images) - 1, nb_examples or len(images)).round().astype(int)
    x = [_image(images, index) for index in chosen]
    for index, image in zip(chosen, x, strict=True):
        if image.shape != x[0].shape:
            raise ValueError(
                f"`dataset`: {images.samples[index][0]} has {image.shape[1]}×{image.shape[2]} pixels, "
                f"{images.samples[chosen[0]][0]} has {x[0].shape[1]}×{x[0].shape[2]}; all must have the same, or a "
                "`preprocessing` is needed."
            )
    return np.stack(x), np.array([images.targets[index] for index in chosen]), len(images.numbers)


def _image(images: Any, index: int) -> npt.NDArray[np.float32]:
    """Read one image of a folder."""
    try:
        return images[index][0].numpy()  # type: ignore[no-any-return]
    except (OSError, ValueError, SyntaxError) as error:  # PIL's, of files that are cut off or damaged
        raise ValueError(f"`dataset`: {images.samples[index][0]} cannot be read as an image: {error}") from error


def _transform(preprocessing: str | Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """Return what resizes and crops an image and makes it a tensor."""
    if callable(preprocessing):
        return preprocessing
    known = robustbench_data().PREPROCESSINGS
    if preprocessing not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"`preprocessing` must be one of RobustBench's: {names}; got {preprocessing!r}.")
    return known[preprocessing]  # type: ignore[no-any-return]


def _npz(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Load images and labels from a file of NumPy's. Pickled objects in it are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"`dataset`: there is no file {path.resolve()}.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError(
                "it holds one array without a name, as np.save writes it; np.savez(path, x=x, y=y) is needed"
            )
        with loaded as arrays:
            if not {"x", "y"} <= set(arrays.files):
                raise ValueError(f"arrays `x` and `y` are needed, it has {', '.join(arrays.files) or 'none'}")
            x, y = arrays["x"], arrays["y"]
    except (ValueError, OSError, EOFError, SyntaxError, KeyError, zipfile.BadZipFile, zlib.error, TokenError) as error:
        raise ValueError(f"`dataset`: {path} cannot be read: {error}.") from error
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(
            f"`dataset`: {path} must hold images `x` of shape (n, channels, height, width) and whole numbers `y` of "
            f"shape (n,), got {x.shape} and {y.dtype} of shape {y.shape}."
        )
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"`dataset`: {path} has images of shape {x.shape[1:]}, with the channels last; x.transpose(0, 3, 1, 2) has "
            "them first."
        )
    return x, y.astype(np.int64)
