"""Files of weights. Nothing in a file is executed, and an error names what does not fit a network."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from art_clat.models.backbones import Normalize
from art_clat.utils.checks import check_choice
from art_clat.utils.weights import named_tensors

logger = logging.getLogger(__name__)

#: Files that hold other things as well keep a network's tensors under one of these names. Averaged weights come first,
#: as in timm.
AVERAGED = ("state_dict_ema", "model_ema")
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")


#: Which weights of a file that has both are read: those of the last step, or their average (`ema_decay`).
WEIGHTS = ("average", "raw")


def load_state_dict(model: nn.Module, path: str | os.PathLike[str], weights: str | None = None) -> None:
    """
    Load the weights of a file into a network.

    - Names in the file may begin with ``module.`` or ``_orig_mod.``, and may have or lack ``model.``.
    - The file may lack the normalisation that :func:`~art_clat.create_backbone` puts before a network. The network then
      keeps its own. The constants may have RobustBench's shape.
    - If the file has averaged weights (`ema_decay`) as well, those are loaded, unless `weights` is ``"raw"``.

    :param model: A network of the same architecture. It stays as it is if an error is raised.
    :param path: A ``.safetensors`` file, or one that ``torch.save`` or this package's trainer wrote.
    :param weights: ``"average"``, ``"raw"``, or `None` for the average if there is one.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If the file is damaged, holds code, or is of another network.
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
    :raises ValueError: If the file is damaged, or holds something else, or no average although one is asked for.
    """
    if weights is not None:
        check_choice(weights, WEIGHTS, argument="weights")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint`: there is no file {path}.")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`checkpoint`: {path} is damaged, or holds more than tensors, e.g. a whole network. Nothing in it was "
            "executed. Save `model.state_dict()` instead."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read, it seems to be empty, cut off or damaged: {error}"
        ) from error
    entries = [n for n in ENTRIES if isinstance(content.get(n), dict)] if isinstance(content, dict) else []
    averaged, plain = ([n for n in entries if (n in AVERAGED) is wanted] for wanted in (True, False))
    entry = next(iter([*plain, *averaged] if weights == "raw" else [*averaged, *plain]), None)
    content = content if entry is None else content[entry]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(
            f"`checkpoint`: {path} holds no network's tensors by their names. Accepted is `model.state_dict()`, by "
            f"itself or under one of {', '.join(ENTRIES)}."
        )
    tensors: dict[str, torch.Tensor] = clean_state_dict(content)
    averages = {name.removeprefix("average:"): t for name, t in tensors.items() if name.startswith("average:")}
    if weights == "average" and not averages and not averaged:
        raise ValueError(f"`weights`: {path} has no average of the weights; the run that wrote it had no `ema_decay`.")
    if averages or (averaged and plain):
        read = "the weights of the last step" if weights == "raw" else "their average"
        logger.info("%s has weights and their average: %s is read (`weights`).", path, read)
    of_network = {name: t for name, t in tensors.items() if not name.startswith(("optimizer:", "average:", "good:"))}
    return of_network if weights == "raw" else of_network | averages


def _signature(tensors: Mapping[str, torch.Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """Return the tensors' names and shapes."""
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _first(names: list[str], title: str = "") -> str:
    """List the first three of some names, and count the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}{', '.join(names[:3])}{more}" if names else ""
