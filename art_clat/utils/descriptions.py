"""Text that describes what a run or an evaluation works with; it is the same in every process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch


def fingerprint(*tensors: torch.Tensor) -> str:
    """Return 16 hexadecimal digits that differ for different data; the tensors are on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        hash_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def check_description(
    there: Mapping[str, object], here: Mapping[str, object], folder: Path | str, *, argument: str = "checkpoint"
) -> None:
    """
    Refuse, by a ValueError that names the differences, a folder whose description differs from this run's.

    :param folder: The folder, or what else holds the run.
    :param argument: What the user passed it as.
    """
    names = [*there, *(name for name in here if name not in there)]
    different = [
        f"{name} is {there.get(name)} there, {here.get(name)} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        other = "folder" if argument == "checkpoint" else "trainer"
        raise ValueError(
            f"`{argument}`: {folder} holds another run: {'; '.join(different[:5])}{more}. Use another "
            f"{other}, or the same arguments, model and data."
        )


def hash_tensor(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    """Feed a tensor's type, shape and bytes to a hash."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def settings_of(thing: object, values: Mapping[str, object]) -> dict[str, object]:
    """Describe an object by its class and its public settings; a setting that is an object by its class alone."""

    def text(value: object) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        plain = value is None or isinstance(value, (bool, int, float, str, dict, np.ndarray, np.generic))
        return text_of(value) if plain else type(value).__name__

    public = {name: text(value) for name, value in values.items() if not name.startswith("_") and name != "training"}
    return {"class": type(thing).__name__, **public}


def flattened(facts: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested dictionaries; a name becomes its path, such as ``"layers.granularity"``."""
    flat: dict[str, object] = {}
    for name, value in facts.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def text_of(value: object) -> str:
    """
    Write a setting so that it reads the same in another process.

    It is the ``repr`` without the addresses of objects. If an object's class defines no ``repr``, it is the object's
    public settings instead.
    """
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        return repr(settings_of(value, vars(value)))
    if isinstance(value, np.ndarray) and value.ndim:
        return f"array {fingerprint(torch.as_tensor(value))}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value.item() if isinstance(value, (np.generic, np.ndarray)) else value))
