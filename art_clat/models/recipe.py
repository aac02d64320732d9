"""How a network was made, as data: a network can be made from it again, and a file of Python can be written from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Call:
    """
    A call as data.

    Example::

        Call(replace_module, ("maxpool", Call(nn.Identity)))(model)

    :param function: A function or class at the top of a module.
    :param arguments: Its positional arguments. A :class:`Call` among them stands for what it returns.
    :param keywords: Its keyword arguments.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *first: Any) -> Any:
        """
        Make the call.

        :param first: Arguments that come before the recorded ones, e.g. the network to adapt.
        :return: What the function returns.
        """
        made = (argument() if isinstance(argument, Call) else argument for argument in self.arguments)
        return self.function(*first, *made, **self.keywords)


@dataclass(frozen=True)
class BackboneRecipe:
    """
    How a network was made. The weights are not part of it.

    :func:`art_clat.create_backbone` keeps it as ``network.recipe``, outside the ``state_dict``. Whoever changes such a
    network by hand makes the recipe one of another network;
    :func:`art_clat.leaderboard.definitions.model_definition` notices a changed structure and does not use it.

    :param create: Makes the network.
    :param adaptations: Calls that change the network, in this order. Each takes the network before its arguments.
    :param mean: The mean that the network subtracts from each channel; `None` if it does not normalise.
    :param std: The standard deviation that the network divides each channel by; `None` if it does not normalise.
    """

    create: Call
    adaptations: tuple[Call, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def make(self) -> nn.Module:
        """
        Make the network anew, without the normalisation.

        :return: The network with random weights.
        """
        model: nn.Module = self.create()
        for adapt in self.adaptations:
            adapt(model)
        return model


# The functions below are copied into model definitions as they are. They use nothing but `nn` and `Any`.


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one that a network has under a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_convolution(
    model: nn.Module, path: str, *, kernel_size: tuple[int, int], stride: tuple[int, int], padding: Any
) -> None:
    """Change the kernel, the stride and the padding of a convolution. A kernel of another size gets new weights."""
    conv: Any = model.get_submodule(path)
    conv.stride, conv.padding = stride, padding
    if conv.kernel_size != kernel_size:
        conv.kernel_size = kernel_size
        conv.weight = nn.Parameter(conv.weight.new_empty(*conv.weight.shape[:2], *kernel_size))
        conv.reset_parameters()
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def set_patches(model: nn.Module, path: str, *, img_size: tuple[int, int], patch_size: int) -> None:
    """Let a timm network cut images of another size into patches of another size."""
    embedding: Any = model.get_submodule(path)
    embedding.set_input_size(img_size=img_size, patch_size=patch_size)
