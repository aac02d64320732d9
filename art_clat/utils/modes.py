"""Put modules in evaluation mode, or leave their modes and statistics as they were, also after an exception."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Put a network in evaluation mode, and every module back in its own mode on leaving.

    :param model: The network.
    """
    with restored_modes(model):
        model.eval()
        yield


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """
    Put every module back in the mode, training or evaluation, that it had.

    :param model: The network.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def kept_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    Leave running statistics, and whatever other buffers, of what is in training mode as they are.

    They are exchanged for copies meanwhile, not written over: autograd may still need what it saw.

    :param modules: The modules, with the norms in them.
    """
    kept = [
        (part, name, buffer)
        for part in dict.fromkeys(part for module in modules for part in module.modules())
        if part.training
        for name, buffer in part.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
