"""Files of tensors and JSON. A kill never leaves a file half written, and reading one executes nothing."""

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

#: Version of the file format. Files of a newer version are refused.
FORMAT = 1


def prepare(folder: Path) -> None:
    """Create a folder if needed, check that it can be written to, and delete what killed processes left unfinished."""
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

    The file gets the permissions that the user's umask asks for.

    :param path: The file; its folder is created.
    :param tensors: Tensors by name, on the CPU.
    :param content: Anything that JSON can hold; NaN and infinity are allowed.
    :raises OSError: If the file cannot be written.
    """
    text = json.dumps(content)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # no two processes write to the same file
    metadata = {"format": str(FORMAT), "content": text, "sha256": _digest(tensors, text, FORMAT)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # `save_file` would make files that only their owner can read, and a kill would leave one of an unknown name.
        beside.write_bytes(save(dict(tensors), metadata=metadata))
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: Exception) -> OSError:
    return OSError(f"`checkpoint`: cannot write to {folder}: {error}. Pass a folder that can be written to or created.")


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read a file that :func:`write` wrote. Nothing in it is executed.

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
            # Copies, because tensors of the file would keep it open, and it is replaced later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("sha256") != _digest(tensors, metadata.get("content", ""), int(metadata["format"])):
            raise ValueError("it is damaged: its content does not match its checksum")
        return tensors, json.loads(metadata.get("content", ""))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read: {error}. The file is left unchanged. Move it away to start again."
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], text: str, version: int) -> str:
    digest = hashlib.sha256(f"{version}{text}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        hash_tensor(digest, tensors[name])
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
