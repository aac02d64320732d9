"""Reading somebody's weights into a network: nothing in the file is executed, and what does not fit is named."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn
from torch.overrides import TorchFunctionMode

from art_clat.models.backbones import Normalize
from art_clat.utils.weights import named_tensors

logger = logging.getLogger(__name__)

#: Under which names files keep a network's tensors beside other things, averaged weights first, as timm does.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")

#: The share of tensors of the same name and shape from which on a file is said to look like a model's.
LIKENESS = 0.8


def load_state_dict(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """
    Put the weights of a file into a network.

    Names may carry ``module.`` or ``_orig_mod.`` in front, and have or lack ``model.``. Where a file is of the network
    without the normalisation that :func:`art_clat.create_backbone` puts before it, that keeps its constants; they may
    have RobustBench's shape. Averaged weights (`ema_decay`) are taken where a file has both.

    :param model: The network.
    :param path: A ``.safetensors`` file, or one that ``torch.save`` wrote; of this package's trainer, too.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is damaged, holds code, or is of another network; that is left as it was then.
    """
    expected = model.state_dict()
    there = read_state_dict(path)
    variants = (
        there,
        {name.removeprefix("model."): tensor for name, tensor in there.items()},
        {f"model.{name}": tensor for name, tensor in there.items()},
    )
    tensors = max(variants, key=lambda variant: len(_signature(variant) & _signature(expected)))
    own = named_tensors(model)
    constants = {
        f"{name}.{constant}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, Normalize)
        for constant in ("mean", "std")
    }
    tensors = {
        name: tensor.reshape(expected[name].shape)
        if name in constants and tensor.numel() == expected[name].numel()
        else tensor
        for name, tensor in tensors.items()
    }
    optional = constants | {name for name in expected if name.endswith("num_batches_tracked") or name not in own}
    different = [name for name in tensors if name in expected and tensors[name].shape != expected[name].shape]
    shapes = [
        f"{name} has shape {tuple(tensors[name].shape)} there, {tuple(expected[name].shape)} here" for name in different
    ]
    missing = [name for name in expected if name not in tensors and name not in optional]
    surplus = [name for name in tensors if name not in expected and name not in own]
    if shapes or missing or surplus:
        found = [_first(shapes), _first(missing, "missing there: "), _first(surplus, "unknown here: ")]
        as_wide = all(tensors[name].shape[1:] == expected[name].shape[1:] for name in different)
        other_classes = not missing and not surplus and len(different) <= 2 and as_wide  # weight and bias of the head
        names = [] if other_classes else likely_models(tensors)
        likely = f" It looks like timm's {' or '.join(names)}." if names else ""
        if other_classes:
            likely = " Another number of classes?"
        raise ValueError(f"`checkpoint`: {path} is of another network: {'; '.join(filter(None, found))}.{likely}")
    if constants - tensors.keys():
        logger.info("%s has no normalisation; the network keeps its own: %s", path, ", ".join(sorted(constants)))
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in expected}, strict=False)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """
    Read the tensors of a network from a file. Nothing in it is ever executed.

    :param path: As for :func:`load_state_dict`.
    :return: By name, on the CPU; an optimiser's left out.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is damaged, or holds something else.
    """
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
            f"`checkpoint`: {path} is damaged, or holds more than tensors (a whole network, say), which would have to "
            "be executed and is not. Save `model.state_dict()`."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read, it seems to be empty, cut off or damaged: {error}"
        ) from error
    if isinstance(content, dict):
        content = next((content[name] for name in ENTRIES if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(
            f"`checkpoint`: {path} holds no network's tensors by their names; `model.state_dict()`, by itself or under "
            f"one of {', '.join(ENTRIES)}, is accepted."
        )
    tensors: dict[str, torch.Tensor] = clean_state_dict(content)
    averages = {name.removeprefix("average:"): t for name, t in tensors.items() if name.startswith("average:")}
    if averages:
        logger.info("%s has averaged weights; those are taken.", path)
    of_network = {name: t for name, t in tensors.items() if not name.startswith(("optimizer:", "average:"))}
    return of_network | averages


def likely_models(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """
    Find the timm models that tensors look like.

    :param tensors: By name.
    :return: Up to three names, those with the largest share of tensors of the same name and shape, if it is large.
    """
    signature = _signature({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    names = {name for name, _ in signature}
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)

    def likeness(one: set[Any], other: set[Any]) -> float:
        return len(one & other) / max(1, len(one | other))

    resembling = {
        family: likeness(names, {name for name, _ in _signature_of(members[0])}) for family, members in families.items()
    }
    nearest = sorted(resembling, key=lambda family: resembling[family])[-2:]
    scores = {
        name: likeness(signature, _signature_of(name)) for family in reversed(nearest) for name in families[family]
    }
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best >= LIKENESS][:3]


class _Sizes(TorchFunctionMode):
    """Compute what timm derives sizes from, where tensors otherwise have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "cpu"} if func is torch.linspace else {})})


def _signature_of(name: str) -> set[tuple[str, tuple[int, ...]]]:
    """Give the names and shapes of a timm model's tensors, without their memory."""
    try:
        with torch.device("meta"), _Sizes():
            return _signature(timm.create_model(name).state_dict())
    except Exception:  # whatever a model cannot do without values: it is only not suggested
        logger.debug("%s cannot be made without its weights", name, exc_info=True)
        return set()


def _signature(tensors: Mapping[str, torch.Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _first(names: list[str], title: str = "") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}{', '.join(names[:3])}{more}" if names else ""
