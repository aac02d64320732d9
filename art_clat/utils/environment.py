"""The machine and the versions that a result was made with: the one record that every result carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import torch

#: Packages whose versions can change a result.
PACKAGES = (
    *("art_clat", "torch", "torchvision", "numpy", "adversarial-robustness-toolbox", "timm", "pyautoattack"),
    "robustbench",
)


def describe_environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """
    Describe the machine and the versions of the packages that can change a result.

    :param device: The device that computes; a GPU is named.
    :return: ``"machine"``, ``"date"`` and ``"versions"``, ready for JSON. Packages that are not installed are left out.
    """
    device = torch.device(device)
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"machine": machine, "date": datetime.date.today().isoformat(), "versions": versions}
