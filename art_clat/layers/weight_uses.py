"""Weights that a function takes without their module being called, as in the attention of BEiT and Swin-v2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Functions are known by their names in torch, without leading and trailing underscores.

#: Products of data with a weight: what a layer computes.
PRODUCTS = {
    *("linear", "bilinear", "embedding", "multi_head_attention_forward"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "einsum", "tensordot"),
}

#: Functions that only rearrange the numbers of one or several weights.
_ARRANGEMENTS = {
    *("t", "transpose", "permute", "movedim", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("expand", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type_as", "get", "getitem"),
    *("cat", "concat", "concatenate", "stack", "chunk", "split", "unbind", "narrow", "select"),
}

#: Functions that use a weight as a table of biases or as a scale. If the result has the weight's shape, it is still a
#: weight.
ELEMENTWISE = {"add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rdiv", "addcmul"}
ELEMENTWISE |= {"normalize"}

#: Called with the function's name, the parameters it takes, the first tensor of data among its arguments (or `None`),
#: and its result. What it returns takes the result's place, unless it is `None`.
OnUse = Callable[[str, "list[nn.Parameter]", "torch.Tensor | None", object], object]


class WeightUses(TorchFunctionMode):
    """
    Reports every use of some parameters in a torch function during the forward pass in this context.

    A parameter is still recognised after it was rearranged or rescaled (transposed, joined, cast, masked ...).

    :param parameters: The parameters.
    :param on_use: Called after each function that takes one of them, unless the function only rearranges or rescales
           it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_use: OnUse) -> None:
        super().__init__()
        self._on_use = on_use
        # The parameters a tensor is made of, by its `id`. The tensor is held so that no other can get the same `id`.
        self._made_of: dict[int, tuple[torch.Tensor, list[nn.Parameter]]] = {id(p): (p, [p]) for p in parameters}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        used: list[nn.Parameter] = []
        shapes, data = [], []
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self._made_of:
                used += self._made_of[id(tensor)][1]
                shapes.append(tensor.shape)
            elif tensor.is_floating_point():  # an index is no data
                data.append(tensor)
        if used:
            name = str(getattr(func, "__name__", "")).strip("_")
            made = list(tensors_in(output))
            arranged = name in _ARRANGEMENTS and all(tensor.ndim < 2 for tensor in data)  # a bias may be joined
            rescaled = name in ELEMENTWISE and [tensor.shape for tensor in made] == shapes[:1]
            if arranged or rescaled:
                for tensor in made:
                    self._made_of.setdefault(id(tensor), (tensor, used))
            else:
                replacement = self._on_use(name, used, data[0] if data else None, output)
                output = output if replacement is None else replacement
        return output


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a function's arguments or result, in order, within tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
