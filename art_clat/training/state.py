"""The state of an optimiser or scheduler as JSON and tensors, without pickle."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from art_clat.utils.descriptions import fingerprint


def fingerprint_of_state(optimizer: torch.optim.Optimizer) -> str:
    """Return 16 hexadecimal digits that differ for different optimiser states, such as the momentum."""
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(optimizer.state_dict()["state"], tensors, "state")
    return hashlib.sha256(f"{packed}{fingerprint(*tensors.values())}".encode()).hexdigest()[:16]


def pack(value: object, tensors: dict[str, torch.Tensor], name: str) -> object:
    """Turn the state of an optimiser or scheduler into JSON; its tensors go into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):  # JSON turns numeric keys into text; MultiStepLR has a Counter
        return {
            "counter" if isinstance(value, Counter) else "items": [
                [pack(key, tensors, f"{name}.key"), pack(item, tensors, f"{name}.{key}")] for key, item in value.items()
            ]
        }
    raise TypeError(
        f"`checkpoint`: {name.removeprefix('optimizer:')} is a {type(value).__qualname__}, which cannot be saved "
        "without pickle; numbers, texts, tensors, and lists and dictionaries of them can."
    )


def unpack(value: object, tensors: Mapping[str, torch.Tensor]) -> object:
    """Turn what :func:`pack` made back into a state."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unpack(item, tensors) for item in value["tuple"])
    items = value["counter"] if "counter" in value else value["items"]
    unpacked = {unpack(key, tensors): unpack(item, tensors) for key, item in items}
    return Counter(unpacked) if "counter" in value else unpacked
