"""Recurrent layers whose gradients are taken in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: The functions that ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` call; cuDNN computes no others of the kind.
FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class WithoutCudnn(TorchFunctionMode):
    """
    Computes recurrent layers without cuDNN in this context, everything else, convolutions included, with it.

    cuDNN raises "cudnn RNN backward can only be called in training mode". torch's own kernels compute the same in both
    modes; the backward pass uses the kernels that the forward pass was computed with.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", None) not in FUNCTIONS:
            return func(*args, **(kwargs or {}))
        enabled = torch.backends.cudnn.enabled
        try:
            torch.backends.cudnn.enabled = False
            return func(*args, **(kwargs or {}))
        finally:
            torch.backends.cudnn.enabled = enabled
