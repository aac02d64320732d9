"""One look at a network and its output before any work: everything else takes logits for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def check_network(model: nn.Module) -> None:
    """
    Refuse networks whose layers cannot be followed, or whose weights are not float32.

    :param model: The network.
    :raises ValueError: If it is compiled or TorchScript, or recomputes its activations.
    """
    for name, module in model.named_modules():
        where = name or "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"`classifier.model`: {where} is TorchScript, whose layers cannot be followed: pass ART the network "
                "that it was made from."
            )
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise ValueError(
                f"`classifier.model`: {where} has been through `torch.compile`, which hides its layers: "
                "pass ART the original network, and `performance=PerformanceOptions(compile=True)` to the trainer."
            )
        if getattr(module, "grad_checkpointing", False):
            raise ValueError(
                f"`classifier.model`: {where} recomputes its activations, so attacks get no input gradient: "
                "call `set_grad_checkpointing(False)`."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"`classifier.model`: {name} is {parameter.dtype}; weights must be float32: call `model.float()`. The "
                "trainer has mixed precision, `performance=PerformanceOptions(amp=True)`."
            )


def check_initialised(model: nn.Module) -> None:
    """Refuse a network with a parameter that has no values yet."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"`classifier.model`: {name} has no values yet, as in a lazy module: run the network on an input once, "
                "before the optimiser and the classifier are made."
            )


def check_output(
    run: Callable[[torch.Tensor], object], x: torch.Tensor, nb_classes: int, *, mode: str, dtype: torch.dtype | None
) -> None:
    """
    Refuse a network that does not return logits.

    :param run: The network, in the mode to check.
    :param x: Inputs after preprocessing, shape (n, *input_shape).
    :param nb_classes: Number of classes that the classifier was made for.
    :param mode: ``"evaluation"`` or ``"training"``, for the message.
    :param dtype: The type that the output must have, or `None`.
    :raises ValueError: If the output is no tensor of this type and of shape (n, nb_classes).
    """
    output = run(x)
    wanted = f"it must return one tensor of logits, shape (n, {nb_classes})"
    where = f"`classifier.model` in {mode} mode"
    if isinstance(output, Mapping):  # Hugging Face's ModelOutput, too
        names = ", ".join(map(str, output))
        raise ValueError(
            f"{where} returns {type(output).__name__} of {names}; {wanted}: wrap it, `return out['logits']`."
        )
    if isinstance(output, (tuple, list)):
        auxiliary = " Auxiliary or distilled outputs can often be turned off (`aux_logits=False`)."
        raise ValueError(
            f"{where} returns {type(output).__name__} of {len(output)}; {wanted}: wrap it, `return out[0]`.{auxiliary}"
        )
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{where} returns {type(output).__name__}; {wanted}.")
    if tuple(output.shape) in ((len(x), 1), (len(x),)) and nb_classes == 2:
        raise ValueError(
            f"{where} returns one logit; {wanted}: wrap it, `art_clat.TwoLogits(model)`, and use CrossEntropyLoss."
        )
    if tuple(output.shape) != (len(x), nb_classes):
        raise ValueError(
            f"{where} returns shape {tuple(output.shape)} for {len(x)} inputs; {wanted}. The classifier was made with "
            f"`nb_classes={nb_classes}`."
        )
    if dtype is not None and output.dtype != dtype:
        raise ValueError(f"{where} returns {output.dtype}; {wanted}, float32: wrap it, `return out.float()`.")


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put a network's buffers back on leaving, such as the statistics that a pass in training mode moves."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
