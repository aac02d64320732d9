"""Files of tensors and JSON that are whole at any instant, and that no code is read from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    pass
from art_clat.utils.descriptions import hash_tensor

#: Version of the files' format; a file of a larger one is refused.
FORMAT = 1


def prepare(folder: Path) -> None:
    """
    Make sure that a folder can be written to, and clear what a kill has left there.

    :param folder: Created if missing.
    :raises OSError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.safetensors.*.tmp"):
            left.unlink(missing_ok=True)  # another process may be clearing, too
        probe = folder / f"probe.safetensors.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write(path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
    """
    Write tensors and JSON to a file that is either the old one or the new one, whole, whenever the process is killed.

    :param path: The file; its folder is created.
    :param tensors: By name, on the CPU.
    :param content: What JSON can hold; NaN and infinity included.
    :raises OSError: If that fails.
    """
    text = json.dumps(content)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of two jobs, neither writes into the other's
    metadata = {"format": str(FORMAT), "content": text, "sha256": _digest(tensors, text, FORMAT)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, metadata=metadata)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"`checkpoint`: cannot write to {folder}: {error}. A folder that can be written to, or that can be created, is "
        "needed."
    )


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read what :func:`write` wrote. Nothing in the file is ever executed.

    :param path: The file.
    :return: The tensors, on the CPU, and the JSON.
    :raises ValueError: If the file is damaged, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").isdecimal():
                raise ValueError("it is no checkpoint of this package")
            if int(metadata["format"]) > FORMAT:
                raise ValueError(
                    f"its format is {metadata['format']}, newer than {FORMAT}, which this version of art_clat reads"
                )
            # Copies, which do not hold on to the file, which is going to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("sha256") != _digest(tensors, metadata.get("content", ""), int(metadata["format"])):
            raise ValueError("it is damaged: its content does not have the checksum it should have")
        return tensors, json.loads(metadata.get("content", ""))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read: {error}. It stays as it is; move it away to begin anew."
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], text: str, version: int) -> str:
    digest = hashlib.sha256(f"{version}{text}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        hash_tensor(digest, tensors[name])
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of files."""
    if os.name == "nt" and path.is_dir():  # Windows has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
