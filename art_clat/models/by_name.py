"""Models by name, as the command line takes them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.models.backbones import create_backbone
from art_clat.models.datasets import IMAGENET_PREPROCESSING, robustbench_data
from art_clat.models.weight_files import load_state_dict
from art_clat.utils.robustbench_import import robustbench_utils


def load_model(
    name: str,
    *,
    dataset: str,
    norm: str,
    nb_classes: int,
    input_size: tuple[int, int, int],
    checkpoint: str | os.PathLike[str] | None = None,
    model_dir: str | os.PathLike[str] = "models",
    weights: str | None = None,
) -> nn.Module | PyTorchClassifier:
    """
    Load a network in evaluation mode.

    :param name: A timm name, which needs a `checkpoint` and becomes a :func:`~art_clat.create_backbone`; RobustBench's
           identifier of a model; or ``module:function`` or ``path/to/file.py:function``, which is called without
           arguments and returns a network or an ART classifier.
    :param dataset: RobustBench's name of the data set, for its models.
    :param norm: ``"Linf"`` or ``"L2"``, the threat model, for RobustBench's models.
    :param nb_classes: Number of classes, for timm's models.
    :param input_size: Channels, height and width of the images, for timm's models.
    :param checkpoint: A file of weights, see :func:`art_clat.models.weight_files.load_state_dict`.
    :param model_dir: Where RobustBench keeps the weights of its models, and downloads them to.
    :param weights: Which of the checkpoint's weights to read, ``"average"`` or ``"raw"``; `None` for the average if
           there is one.
    :return: The network or classifier.
    :raises ValueError: If there is no such model, or the weights are of another one.
    :raises OSError: If a file is missing and cannot be downloaded.
    """
    if ":" in name:
        loaded = _from_function(name)
    elif timm.is_model(name):
        if checkpoint is None:
            raise ValueError(f"`model`: {name} is a timm network without weights; name a `checkpoint`.")
        loaded = create_backbone(name, num_classes=nb_classes, input_size=input_size)
    else:
        loaded = _from_robustbench(name, dataset, norm, None if checkpoint is not None else Path(model_dir))
    network: nn.Module = loaded.model if isinstance(loaded, PyTorchClassifier) else loaded
    if checkpoint is not None:
        load_state_dict(network, checkpoint, weights)
    network.eval()
    return loaded


def imagenet_preprocessing(model: str, norm: str) -> str | Callable[[Any], Any]:
    """
    Find out how ImageNet's images are resized and cropped for a model.

    :param model: A model's name, as for :func:`load_model`.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: For RobustBench's models what RobustBench does: its name of that, or a function of an image if it has no
            name. For other models ``"Res256Crop224"``.
    """
    data = robustbench_data()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if ":" in model or timm.is_model(model) or norm not in ("Linf", "L2"):
        return IMAGENET_PREPROCESSING
    try:
        found: Callable[[Any], Any] = data.get_preprocessing(BenchmarkDataset.imagenet, ThreatModel(norm), model, None)
    except KeyError:  # not one of its models
        return IMAGENET_PREPROCESSING
    names: list[str] = [name for name, known in data.PREPROCESSINGS.items() if name and repr(known) == repr(found)]
    return names[0] if names else found


def load_function(name: str) -> Callable[..., Any]:
    """
    Import a function or class by its name. The module is executed.

    :param name: ``module:function`` or ``path/to/file.py:function``.
    :return: The function or class.
    :raises ValueError: If there is none.
    """
    where, _, function = name.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # whatever the user's code does
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"`model`: {where} of {name} cannot be imported: {reason}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"`model`: {where} has no function {function}.")
    return getattr(module, function)  # type: ignore[no-any-return]


def _import_file(path: Path) -> ModuleType:
    """Execute a user's file as a module; dataclasses, for one, look it up in ``sys.modules``."""
    name = f"{path.stem}@{path.resolve()}"  # no other module's
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_function(name: str) -> nn.Module | PyTorchClassifier:
    """Call a user's function, and check what it returns."""
    function = load_function(name)
    try:
        loaded = function()
    except Exception as error:  # whatever the user's code does
        raise ValueError(f"`model`: {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, (nn.Module, PyTorchClassifier)):
        raise ValueError(f"`model`: {name} must return a torch.nn.Module or an ART PyTorchClassifier, got {loaded!r}.")
    return loaded


def _from_robustbench(name: str, dataset: str, norm: str, model_dir: Path | None) -> nn.Module:
    """Load one of RobustBench's models with its weights, or without weights if `model_dir` is `None`."""
    utils = robustbench_utils()
    zoo = _zoo(dataset, norm)
    registered = f"{name.lower().replace('-', '_')}_{dataset}_{norm.lower()}"  # as RobustBench looks for timm's models
    if name not in zoo and not timm.is_model(registered):
        similar = difflib.get_close_matches(name, [*zoo, *timm.list_models()], n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise ValueError(
            f"`model` must be a timm name, one of RobustBench's {len(zoo)} models for {dataset} and {norm}, or "
            f"module:function, got {name!r}{hint}."
        )
    if model_dir is None:
        model: nn.Module = zoo[name]["model"]() if name in zoo else timm.create_model(registered)
        return model
    try:
        with _only_weights():
            return utils.load_model(name, model_dir=model_dir, dataset=dataset, threat_model=norm)  # type: ignore[no-any-return]
    except Exception as error:
        raise OSError(
            f"`model`: RobustBench's {name} could not be loaded: {error}. Its weights were looked for in "
            f"{model_dir / dataset / norm / f'{name}.pt'}, then on Google Drive; put the file there, or name it as "
            "`checkpoint`."
        ) from error


def _zoo(dataset: str, norm: str) -> dict[str, Any]:
    """Return RobustBench's models for a data set and a threat model, by name."""
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if dataset not in {member.value for member in BenchmarkDataset} or norm not in ("Linf", "L2"):
        return {}
    return model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(norm), {})  # type: ignore[no-any-return]


@contextmanager
def _only_weights() -> Iterator[None]:
    """Let ``torch.load`` execute nothing, which older versions of torch do unless this variable says otherwise."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
