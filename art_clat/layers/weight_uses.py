"""Weights that a function takes without their module being called, as in the attention of BEiT and Swin-v2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Functions by their names in torch, without underscores.

#: What a layer is made of: a product of data with a weight.
PRODUCTS = {
    *("linear", "bilinear", "embedding", "multi_head_attention_forward"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "einsum", "tensordot"),
}

#: What leaves a weight, or several, the same numbers in another arrangement.
_ARRANGEMENTS = {
    *("t", "transpose", "permute", "movedim", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("expand", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type_as", "get", "getitem"),
    *("cat", "concat", "concatenate", "stack", "chunk", "split", "unbind", "narrow", "select"),
}

#: What makes no more of a weight than a table of biases or a scale; of what has the weight's own shape, a weight.
ELEMENTWISE = {"add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rdiv", "addcmul"}

#: Called with the function's name, the parameters it takes, the first tensor of data among its arguments, if any, and
#: what it returns.
OnUse = Callable[[str, "list[nn.Parameter]", "torch.Tensor | None", object], None]


class WeightUses(TorchFunctionMode):
    """
    Shows every use of some parameters in a function of torch's, while a forward pass runs in this context.

    Parameters that are only rearranged or rescaled first (transposed, joined, cast, masked ...) are recognised all the
    same.

    :param parameters: The parameters.
    :param on_use: Called after each function that takes one of them, unless it makes another weight of them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_use: OnUse) -> None:
        super().__init__()
        self._on_use = on_use
        # By the identity of a tensor, which is held so that no other can take it: the parameters it is made of.
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
            elif tensor.is_floating_point():  # and no index
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
                self._on_use(name, used, data[0] if data else None, output)
        return output


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """
    Find the tensors in what a function takes or returns, in order, within tuples, lists and mappings.

    :param value: A tensor, a container of tensors and other things, or anything else.
    :return: The tensors.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
