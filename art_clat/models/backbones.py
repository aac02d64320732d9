"""timm backbones ready for small images and for RobustBench."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

from art_clat.models import cifar  # noqa: F401  # registers its networks with timm
from art_clat.models.recipe import BackboneRecipe, Call, replace_module, set_convolution, set_patches
from art_clat.utils.modes import evaluation_mode

#: An image is small if its shorter side has at most this many pixels. A network made for 224 pixels would shrink it to
#: almost nothing.
SMALL_SIDE = 64

#: A network for large images shrinks small ones less, by at most this factor. A ResNet's stem shrinks by as much.
REDUCTION = 4

#: Arguments of ``timm.create_model`` that decide on weights, not on the architecture.
WEIGHTS = ("pretrained", "checkpoint_path")


class Normalize(nn.Module):
    """
    Standardise images channel by channel.

    :param mean: One value for each channel, in units of the input.
    :param std: One value for each channel, in units of the input.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Compute ``(x − mean) / std``.

        :param x: Images, shape (batch, channels, height, width).
        :return: Same shape.
        :raises ValueError: If the images have another number of channels.
        """
        if x.shape[-3] != len(self.mean):
            raise ValueError(f"The images have {x.shape[-3]} channels, the network is for {len(self.mean)}.")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the values in ``print(model)``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def create_backbone(
    name: str,
    *,
    num_classes: int,
    input_size: tuple[int, int, int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Sequential:
    """
    Make a timm network that takes images in [0, 1] of a given size and normalises them itself.

    A network made for large images begins by shrinking them. For images of up to 64 pixels this function undoes that
    by a factor of up to 4:

    - The convolution that reads the image becomes a 3×3 convolution of stride 1.
    - A first pooling is left out.
    - Other convolutions that halve a large resolution get stride 1.
    - A network that cuts images into patches and is made for one size gets patches smaller by as much. If nothing
      after the patches shrinks the image, a patch has an eighth of the image's shorter side.

    A network that timm makes for small images stays as it is. The parts are named as RobustBench names them:
    ``normalize``, then ``model``, the timm network itself. ``recipe`` says how the network was made, see
    :class:`art_clat.models.recipe.BackboneRecipe`.

    :param name: A timm model name, those of :mod:`art_clat.models.cifar` included.
    :param num_classes: Number of classes.
    :param input_size: Channels, height, width.
    :param mean: Mean of each channel, in [0, 1]; `None` for the one timm has for this network.
    :param std: Standard deviation of each channel; `None` for the one timm has for this network.
    :param kwargs: Passed on to ``timm.create_model``, e.g. ``channels=(16, 32, 64, 128)`` for a narrow ResNet. With
           ``img_size`` or ``patch_size`` the network stays as timm makes it with them. timm 1.0.9, which RobustBench
           1.1.1 pins, cannot download pretrained weights with ``huggingface_hub`` 2.
    :return: The network, in training mode.
    :raises ValueError: If timm does not know the name, a size cannot be used, or the network cannot be adapted to it.
    """
    _check_arguments(name, input_size)
    channels = input_size[0]
    model, recipe = _adapted(name, input_size, {"num_classes": num_classes, "in_chans": channels, **kwargs})
    _check_runs(model, name, tuple(input_size), num_classes)
    mean = _per_channel(mean, model.default_cfg["mean"], channels, "mean")
    std = _per_channel(std, model.default_cfg["std"], channels, "std")
    return _normalized(model, replace(recipe, mean=mean, std=std))


def remake(recipe: BackboneRecipe) -> nn.Module:
    """
    Make a network again as it was made.

    :param recipe: The ``recipe`` of a network of :func:`create_backbone`.
    :return: The network with random weights, in training mode.
    """
    return recipe.make() if recipe.mean is None else _normalized(recipe.make(), recipe)


def _normalized(model: nn.Module, recipe: BackboneRecipe) -> nn.Sequential:
    """Put the normalisation of a recipe before a network."""
    assert recipe.mean is not None and recipe.std is not None
    network: Any = nn.Sequential(OrderedDict(normalize=Normalize(recipe.mean, recipe.std), model=model))
    network.recipe = recipe
    return network  # type: ignore[no-any-return]


def _check_arguments(name: str, input_size: tuple[int, int, int]) -> None:
    """Refuse a name that timm does not know and a size that no image has."""
    if not isinstance(input_size, (tuple, list)) or len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"`input_size` must be (channels, height, width), each at least 1, got {input_size}.")
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.lower().replace("-", ""), timm.list_models(), n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise ValueError(f"`name` must be a model that timm knows (timm.list_models()), got {name!r}{hint}.")


def _adapted(name: str, input_size: tuple[int, int, int], kwargs: dict[str, Any]) -> tuple[Any, BackboneRecipe]:
    """Make a timm network for a size of images."""
    channels, *size = input_size
    config = timm.get_pretrained_cfg(name)
    made_for = (3, 224, 224) if config is None else config.input_size
    fixed = config is not None and config.fixed_input_size
    as_timm_makes_it = {"img_size", "patch_size"} & set(kwargs)
    if as_timm_makes_it or min(size) > SMALL_SIDE or min(made_for[1:]) <= SMALL_SIDE:
        return _create(name, {"img_size": tuple(size), **kwargs} if fixed else kwargs)
    if fixed:
        return _made_for_small_images(name, (size[0], size[1]), kwargs)
    model, recipe = _create(name, kwargs)
    return model, _keep_resolution(model, recipe, name, (channels, *made_for[1:]), kwargs["num_classes"])


def _create(name: str, kwargs: dict[str, Any]) -> tuple[Any, BackboneRecipe]:
    """Make a network with timm, and record it unless the network brings a recipe of its own."""
    size = kwargs.get("img_size")
    if isinstance(size, tuple) and size[0] == size[1]:
        kwargs = {**kwargs, "img_size": size[0]}  # some networks take nothing else
    try:
        model = timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"`name`: timm cannot make {name} with {kwargs}: {error}") from error
    own = getattr(model, "recipe", None)
    architecture = {key: value for key, value in kwargs.items() if key not in WEIGHTS}
    made = BackboneRecipe(Call(timm.create_model, (name,), architecture))
    return model, own if isinstance(own, BackboneRecipe) else made


def _check_runs(model: nn.Module, name: str, input_size: tuple[int, ...], num_classes: int) -> None:
    """Refuse a network that does not take the images, or does not return one row of logits for each."""
    try:
        with evaluation_mode(model), torch.no_grad():
            shape = tuple(model(torch.zeros(2, *input_size)).shape)
    except Exception as error:  # whatever the network raises
        raise ValueError(f"`name`: {name} does not take images of {input_size}: {error}") from error
    if shape != (2, num_classes):
        raise ValueError(f"`name`: {name} returns {shape} for 2 images of {input_size}, not {(2, num_classes)}.")


def _made_for_small_images(name: str, size: tuple[int, int], kwargs: dict[str, Any]) -> tuple[Any, BackboneRecipe]:
    """Make a network for one input size as if images were larger, and undo it in its patches or in its stem."""
    model, _ = _create(name, {key: value for key, value in kwargs.items() if key not in WEIGHTS})
    embeddings = [path for path, module in model.named_modules() if isinstance(module, PatchEmbed)]
    if len(embeddings) != 1:
        large = (size[0] * REDUCTION, size[1] * REDUCTION)
        model, recipe = _create(name, {**kwargs, "img_size": large})
        return model, _keep_resolution(model, recipe, name, (kwargs["in_chans"], *large), kwargs["num_classes"])
    patch = model.get_submodule(embeddings[0]).patch_size[0]
    reductions = [stage["reduction"] for stage in getattr(model, "feature_info", [])]
    shrinks_further = max(reductions, default=patch) > patch
    small = max(1, patch // REDUCTION if shrinks_further else min(size) // 8)
    if any(side % small for side in size):
        raise ValueError(f"`input_size`: {size} cannot be cut into patches of {small}×{small}, for {name}.")
    model, recipe = _create(name, {**kwargs, "img_size": tuple(side // small * patch for side in size)})
    adapt = Call(set_patches, (embeddings[0],), {"img_size": size, "patch_size": small})
    adapt(model)
    return model, replace(recipe, adaptations=(*recipe.adaptations, adapt))


def _keep_resolution(
    model: nn.Module, recipe: BackboneRecipe, name: str, input_size: tuple[int, ...], num_classes: int
) -> BackboneRecipe:
    """Undo the first halvings of a network's resolution, by a factor of up to `REDUCTION`, and record that."""
    shrinking: list[tuple[str, nn.Module, int, int, tuple[int, ...]]] = []
    side = min(input_size[1:])

    def hook_of(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not all(isinstance(t, torch.Tensor) and t.ndim == 4 for t in (args[0], output)):
                return
            before, after = (round(side / min(t.shape[-2:])) for t in (args[0], output))
            if before < REDUCTION and after > before:
                shrinking.append((path, module, before, after, tuple(args[0].shape)))

        return hook

    handles = [
        module.register_forward_hook(hook_of(path))
        for path, module in model.named_modules()
        if hasattr(module, "stride") and next(module.children(), None) is None
    ]
    try:
        _check_runs(model, name, input_size, num_classes)
    finally:
        for handle in handles:
            handle.remove()
    if not shrinking:
        raise ValueError(
            f"`name`: {name} ({type(model).__name__}) has no strided convolution or pooling near its input that could "
            "be adapted to small images."
        )
    adaptations = list(recipe.adaptations)
    for path, module, before, after, shape in shrinking:
        if isinstance(module, nn.Conv2d):
            adapt = _set_stride(model, path, max(1, after // REDUCTION), shape[1:], reads_image=before == 1)
        else:
            adapt = Call(replace_module, (path, Call(nn.Identity)))
            adapt(model)
        adaptations.append(adapt)
    return replace(recipe, adaptations=tuple(adaptations))


def _set_stride(model: nn.Module, path: str, stride: int, shape: tuple[int, ...], *, reads_image: bool) -> Call:
    """Change the stride of a convolution, with the kernel and padding that go with it, and return how."""
    conv: Any = model.get_submodule(path)
    kernel = conv.kernel_size[0]
    if stride > 1:
        kernel = stride
    elif kernel % 2 == 0 or (reads_image and kernel > 3):
        kernel = 3
    settings = {"kernel_size": (kernel, kernel), "stride": (stride, stride)}
    # timm's own convolutions pad by themselves, others as they are told.
    for padding in (conv.padding, ((kernel - 1) // 2 * conv.dilation[0],) * 2):
        adapt = Call(set_convolution, (path,), {**settings, "padding": padding})
        adapt(model)
        with torch.no_grad():
            if conv(conv.weight.new_zeros(1, *shape)).shape[-1] == -(-shape[-1] // stride):
                break
    return adapt


def _per_channel(
    values: Sequence[float] | None, of_timm: Sequence[float], channels: int, argument: str
) -> tuple[float, ...]:
    """Return one value for each channel: the given ones or timm's."""
    if values is None:  # timm's are for colour images
        values = list(of_timm) if len(of_timm) == channels else [sum(of_timm) / len(of_timm)] * channels
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"`{argument}` must have one value for each of {channels} channels, got {values!r}.")
    if len(values) != channels:
        raise ValueError(f"`{argument}` has {len(values)} values, one for each of {channels} channels is needed.")
    return tuple(map(float, values))
