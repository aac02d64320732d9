"""Files of tensors and JSON: complete at any instant, and read without executing anything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from art_clat.utils.descriptions import hash_tensor

#: Version of the files' format; newer ones are refused.
FORMAT = 1


def prepare(folder: Path) -> None:
    """
    Check that a folder can be written to, and delete unfinished files of processes that were killed.

    :param folder: Created if missing.
    :raises OSError: If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.safetensors.*.tmp"):
            left.unlink(missing_ok=True)  # another process may delete it, too
        probe = folder / f"probe.safetensors.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write(path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
    """
    Write tensors and JSON to a file. If the process is killed, the file is either the old or the new one, complete.

    It gets the permissions that the user's umask asks for, as any file does.

    :param path: The file; its folder is created.
    :param tensors: By name, on the CPU.
    :param content: What JSON can hold; NaN and infinity included.
    :raises OSError: If the file cannot be written.
    """
    text = json.dumps(content)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # each process has its own
    metadata = {"format": str(FORMAT), "content": text, "sha256": _digest(tensors, text, FORMAT)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not with `save_file`: its files are readable by their owner only, and a kill leaves one of any name.
        beside.write_bytes(save(dict(tensors), metadata=metadata))
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"`checkpoint`: cannot write to {folder}: {error}. A folder that can be written to or created is needed."
    )


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read what :func:`write` wrote. Nothing in the file is ever executed.

    :param path: The file.
    :return: The tensors, on the CPU, and the JSON.
    :raises ValueError: If the file is damaged or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").isdecimal():
                raise ValueError("it is not a checkpoint of this package")
            if int(metadata["format"]) > FORMAT:
                raise ValueError(
                    f"its format is {metadata['format']}, newer than {FORMAT}, which this version of art_clat reads"
                )
            # Copies do not keep the file open, which is going to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("sha256") != _digest(tensors, metadata.get("content", ""), int(metadata["format"])):
            raise ValueError("it is damaged: its content does not have the checksum it should have")
        return tensors, json.loads(metadata.get("content", ""))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read: {error}. The file is left unchanged; move it away to start again."
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], text: str, version: int) -> str:
    digest = hashlib.sha256(f"{version}{text}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        hash_tensor(digest, tensors[name])
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
