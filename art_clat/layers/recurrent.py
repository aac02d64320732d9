"""Recurrent layers whose gradients are taken in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: The functions that ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` call. cuDNN computes no other recurrent layers.
FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class WithoutCudnn(TorchFunctionMode):
    """
    Computes recurrent layers without cuDNN in this context, and everything else with it.

    cuDNN raises "cudnn RNN backward can only be called in training mode". torch's kernels compute the same in both
    modes. The backward pass uses the kernels that computed the forward pass.
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
