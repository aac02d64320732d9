"""Contexts that put training modes and running statistics back on leaving, after an exception too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and every module back in its former mode on leaving."""
    with restored_modes(model):
        model.eval()
        yield


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Put every module of a network back in its former mode, training or evaluation, on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def kept_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    Keep the running statistics, and all other buffers, of the modules that are in training mode.

    In this context the modules work on copies. The buffers themselves are not written to, because autograd may still
    need their values.

    :param modules: The modules; those within them are included.
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
