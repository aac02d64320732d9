"""Find the classifier heads of a network."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from art_clat.layers.weight_uses import PRODUCTS, WeightUses

logger = logging.getLogger(__name__)


def find_heads(
    model: nn.Module, forward: Callable[[int], torch.Tensor], modules: Mapping[nn.Module, nn.Parameter | None]
) -> set[nn.Module]:
    """
    Find the modules whose output reaches the logits through none of the others.

    The output of every module is cut off from what made it. The logits then have a gradient with respect to the outputs
    that reach them directly, and to no others.

    :param model: The network.
    :param forward: A function that runs the network on the number of samples it is given and returns the logits.
    :param modules: The weighted modules; each with the weight that a function takes if the module is not called.
    :return: The heads; empty if the network's graph cannot be followed.
    """
    outputs: list[tuple[nn.Module, torch.Tensor]] = []

    def cut(module: nn.Module, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs.append((module, value.detach().requires_grad_()))
            return outputs[-1][1] * 1  # what follows may write to it
        if type(value) in (tuple, list):
            return type(value)(cut(module, item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(module, item) for item in value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, cut(module, item)) for key, item in value.items())
        return value

    owners = {weight: module for module, weight in modules.items() if weight is not None}

    def used(name: str, parameters: list[nn.Parameter], data: torch.Tensor | None, output: object) -> object:
        owner = next((owners[p] for p in parameters if p in owners), None)
        return output if owner is None or data is None or name not in PRODUCTS else cut(owner, output)

    handles = [
        module.register_forward_hook(lambda module, args, output: cut(module, output))
        for module, weight in modules.items()
        if weight is None
    ]
    try:
        with torch.enable_grad(), WeightUses(owners, used):
            logits = forward(2)
            gradients = torch.autograd.grad(logits.sum(), [start for _, start in outputs], allow_unused=True)
    except RuntimeError as error:
        logger.debug("The graph of %s cannot be followed: %s", type(model).__name__, error)
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return {module for (module, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
