"""Files of weights. Nothing in a file is executed, and an error names what does not fit a network."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from art_clat.models.backbones import Normalize
from art_clat.utils.checks import check_choice
from art_clat.utils.weights import named_tensors

logger = logging.getLogger(__name__)

#: Which weights of a file that has both are read: those of the last step, or their average (`ema_decay`).
WEIGHTS = ("average", "raw")

#: Files that hold other things as well keep a network's tensors under one of these names.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")

#: Names of averaged weights, in timm's and torchvision's files and others.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model_state_dict", "model_state_dict_ema")

#: The name of the raw weights in files whose ``model_state_dict`` is the average.
UNAVERAGED = "unaveraged_model_state_dict"


def load_state_dict(model: nn.Module, path: str | os.PathLike[str], weights: str | None = None) -> None:
    """
    Load the weights of a file into a network.

    - Names in the file may begin with ``module.`` or ``_orig_mod.``, and may have or lack ``model.``.
    - The file may lack the normalisation that :func:`~art_clat.create_backbone` puts before a network. The network then
      keeps its own. The constants may have RobustBench's shape.
    - If the file has averaged weights (`ema_decay`) as well, those are loaded, unless `weights` is ``"raw"``.

    :param model: A network of the same architecture. It stays as it is if an error is raised.
    :param path: A ``.safetensors`` file, one that ``torch.save`` wrote, or the folder of a run, of which
           ``best.safetensors`` is read, or ``last.safetensors`` if there is no best one.
    :param weights: ``"average"``, ``"raw"``, or `None` for the average if there is one.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If the file is damaged, holds code, is of another network, or lacks the `weights` asked for.
    """
    expected = model.state_dict()
    own = named_tensors(model)
    constants = {
        f"{name}.{constant}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, Normalize)
        for constant in ("mean", "std")
    }
    tensors = _with_names_of(expected, read_state_dict(path, weights))
    tensors = {
        name: tensor.reshape(expected[name].shape)
        if name in constants and tensor.numel() == expected[name].numel()
        else tensor
        for name, tensor in tensors.items()
    }
    optional = constants | {name for name in expected if name.endswith("num_batches_tracked") or name not in own}
    difference = _difference(
        tensors,
        expected,
        missing=[name for name in expected if name not in tensors and name not in optional],
        surplus=[name for name in tensors if name not in expected and name not in own],
    )
    if difference:
        raise ValueError(f"`checkpoint`: {path} is of another network: {difference}")
    if constants - tensors.keys():
        logger.info("%s has no normalisation; the network keeps its own: %s", path, ", ".join(sorted(constants)))
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in expected}, strict=False)


def _with_names_of(expected: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add ``model.`` to the tensors' names or take it off, whichever makes more of them the expected ones."""
    variants = (
        tensors,
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        {f"model.{name}": tensor for name, tensor in tensors.items()},
    )
    return max(variants, key=lambda variant: len(_signature(variant) & _signature(expected)))


def _difference(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    missing: list[str],
    surplus: list[str],
) -> str:
    """Say in what the tensors of a file differ from a network's; an empty text if they do not."""
    different = [name for name in tensors if name in expected and tensors[name].shape != expected[name].shape]
    shapes = [
        f"{name} has shape {tuple(tensors[name].shape)} there, {tuple(expected[name].shape)} here" for name in different
    ]
    found = [_first(shapes), _first(missing, "missing there: "), _first(surplus, "unknown here: ")]
    if not any(found):
        return ""
    as_wide = all(tensors[name].shape[1:] == expected[name].shape[1:] for name in different)
    only_the_head = not missing and not surplus and len(different) <= 2 and as_wide  # its weight and its bias
    return f"{'; '.join(filter(None, found))}.{' Another number of classes?' if only_the_head else ''}"


def read_state_dict(path: str | os.PathLike[str], weights: str | None = None) -> dict[str, torch.Tensor]:
    """
    Read the tensors of a network from a file. Nothing in the file is executed.

    :param path: As for :func:`load_state_dict`.
    :param weights: As for :func:`load_state_dict`.
    :return: The tensors by name, on the CPU, without an optimiser's.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If the file is damaged, or holds something else, or lacks the `weights` asked for.
    """
    if weights is not None:
        check_choice(weights, WEIGHTS, argument="weights")
    file = _find_file(Path(path))
    found = _split(_read(file), file)
    if weights == "average" and weights not in found:
        raise ValueError(f"`weights`: {file} has no average of the weights; the run that wrote it had no `ema_decay`.")
    if weights == "raw" and weights not in found:
        hint = " Those of the last step of a run are in its last.safetensors." * (file.name == "best.safetensors")
        raise ValueError(f"`weights`: {file} has the average of the weights only.{hint}")
    which = weights or ("average" if "average" in found else "raw")
    if len(found) > 1:
        read = "the weights of the last step" if which == "raw" else "their average"
        logger.info("%s has weights and their average: %s is read (`weights`).", file, read)
    elif file != Path(path):
        logger.info("%s is read.", file)
    return found[which]


def _find_file(path: Path) -> Path:
    """Return a file, or that of a run's folder."""
    if path.is_dir():
        there = [file for file in (path / "best.safetensors", path / "last.safetensors") if file.is_file()]
        if not there:
            raise FileNotFoundError(f"`checkpoint`: {path} holds neither best.safetensors nor last.safetensors.")
        return there[0]
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint`: there is no file {path}.")
    return path


def _read(path: Path) -> Any:
    """Read a file's content. The best weights of a run with an average are that; they get the name of one."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            return {AVERAGED[0]: tensors} if _is_best_of_average(path, tensors) else tensors
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`checkpoint`: {path} is damaged, or holds more than tensors, e.g. a whole network. Nothing in it was "
            "executed. Save `model.state_dict()` instead."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read, it seems to be empty, cut off or damaged: {error}"
        ) from error


def _is_best_of_average(path: Path, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a file is the trainer's of the best epoch of a run with `ema_decay`."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("content", "{}")
    try:
        decay = json.loads(text)["description"]["ema_decay"]
    except (ValueError, KeyError, TypeError):  # another program's file
        return False
    return decay is not None and not any(name.startswith("average:") for name in tensors)


def _split(content: Any, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return a file's averaged and raw weights, whichever there are, with a network's names."""
    found: dict[str, Any] = {}
    if isinstance(content, dict):
        averaged = ("model_state_dict", *AVERAGED) if UNAVERAGED in content else AVERAGED
        for which, names in (("average", averaged), ("raw", (UNAVERAGED, *ENTRIES))):
            entry = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
            found |= {} if entry is None else {which: entry}
    found = found or {"raw": content}
    for tensors in found.values():
        if not isinstance(tensors, dict) or not tensors or not all(map(torch.is_tensor, tensors.values())):
            raise ValueError(
                f"`checkpoint`: {path} holds no network's tensors by their names. Accepted is `model.state_dict()`, by "
                f"itself or under one of {', '.join((*AVERAGED, *ENTRIES))}."
            )
    averages = {n.removeprefix("average:"): t for n, t in found.get("raw", {}).items() if n.startswith("average:")}
    found = {
        which: {n: t for n, t in tensors.items() if not n.startswith(("optimizer:", "average:", "good:"))}
        for which, tensors in found.items()
    }
    if averages:
        found["average"] = found["raw"] | averages
    if "average" in found:
        found["average"].pop("n_averaged", None)  # torch's `AveragedModel` counts
    return {which: clean_state_dict(tensors) for which, tensors in found.items()}


def _signature(tensors: Mapping[str, torch.Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """Return the tensors' names and shapes."""
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _first(names: list[str], title: str = "") -> str:
    """List the first three of some names, and count the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}{', '.join(names[:3])}{more}" if names else ""
