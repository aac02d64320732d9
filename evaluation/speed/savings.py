"""What takes each way of saving time away, to show what it brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import art_clat.utils.batch
from art_clat import TrainingLoop
from art_clat.layers.features import Features
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.modes import evaluation_mode


@contextlib.contextmanager
def weights_trainable(classifier: TensorClassifier) -> Iterator[None]:
    """Run the network as an attack of ART's does: in evaluation mode, its weights as trainable as they are."""
    with evaluation_mode(classifier.estimator._model):
        yield


def backward(loss: torch.Tensor, inputs: Any, grad: Any = torch.autograd.grad, **options: Any) -> Any:
    """Take an attack's gradient as ART does: with all weight gradients beside it. Others are taken as they are."""
    if not isinstance(inputs, torch.Tensor):
        return grad(loss, inputs, **options)
    loss.backward()
    return (inputs.grad,)


def nothing(*_: object) -> contextlib.AbstractContextManager[None]:
    """Return a context that does nothing."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a class or a module in this context."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def replacements() -> dict[str, list[contextlib.AbstractContextManager[None]]]:
    """Return, by the name of a saving, the contexts that take it away."""
    return {
        "the attack computes no weight gradients": [
            replaced(TensorClassifier, "attacked", weights_trainable),
            replaced(torch.autograd, "grad", backward),
        ],
        "the attack runs in chunks": [replaced(art_clat.utils.batch, "CHUNK_ELEMENTS", 10**12)],
        "a frozen BatchNorm's gradient is one multiplication": [replaced(TensorClassifier, "batch_norms", nothing)],
        "passes for features end at the deepest": [replaced(Features, "stops_early", False)],
        "the update computes no gradients of frozen layers": [replaced(TrainingLoop, "freeze", nothing)],
    }


#: The names of what saves time.
SAVINGS = tuple(replacements())


@contextlib.contextmanager
def without(saving: str | None) -> Iterator[None]:
    """Take a saving away in this context; `None` takes nothing away."""
    with contextlib.ExitStack() as stack:
        for context in replacements()[saving] if saving is not None else ():
            stack.enter_context(context)
        yield
