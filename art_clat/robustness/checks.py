"""Checks against a false robust accuracy: wrong units of inputs, ε or outputs; a network that is not as trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

#: The p of each ℓp norm.
ORDERS = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}

#: By how much images may leave [0, 1]: rounding does that. They are clipped.
ROUNDING = 1e-6

#: Fewest examples of a class, on average, to look for another order of the labels.
EXAMPLES_A_CLASS = 10

#: Number of examples on which the range of the inputs is checked.
SAMPLE = 512


def check_images(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> torch.Tensor:
    """
    Refuse anything but images in [0, 1].

    :param x: What the user passed as ``x``.
    :param y: What the user passed as ``y``; its length.
    :return: The images, float32, on the CPU.
    :raises ValueError: If they are not of shape (n, channels, height, width), or not floating point in [0, 1].
    """
    x = np.asarray(x)
    if x.ndim != 4 or len(x) == 0 or len(x) != len(y):
        raise ValueError(
            "`x` and `y` must be images of shape (n, channels, height, width) and as many labels, "
            f"got shape {x.shape} and {len(y)} labels."
        )
    is_float = np.issubdtype(x.dtype, np.floating)
    if not is_float or not np.isfinite(x).all() or x.min() < -ROUNDING or x.max() > 1 + ROUNDING:
        raise ValueError(f"`x` must be floating point in [0, 1], got {x.dtype} in [{x.min():.8g}, {x.max():.8g}].")
    return torch.as_tensor(np.clip(x.astype(np.float32), 0, 1))


def check_eps(eps: float, norm: str, size: int) -> list[str]:
    """
    Refuse an ε that is not positive, or that seems to be in units of 0…255.

    :param eps: What the user passed.
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param size: Number of values in an input.
    :return: A warning if no network can be robust: an unbounded attack is a common check, and accepted.
    :raises ValueError: If it is not positive, or larger still.
    """
    # Half the diagonal of [0, 1]^size reaches the centre from everywhere: no network can be robust. In ℓ∞ this is 1/2,
    # but up to 1 is accepted, since an unbounded attack is a common check of an evaluation.
    largest = 1.0 if norm == "Linf" else size ** (1 / ORDERS[norm]) / 2
    is_number = isinstance(eps, (int, float, np.number)) and not isinstance(eps, bool)
    if not (is_number and 0 < eps <= largest):
        raise ValueError(
            f"`eps` must be positive, and at most {largest:g} for {norm} on inputs of {size} values in [0, 1], in "
            f"their units: 8 / 255, not 8. Got {eps}."
        )
    if eps < largest:
        return []
    return [
        f"`eps` is {eps:g}, which reaches {'the range' if norm == 'Linf' else 'half of the whole range'} of inputs in "
        "[0, 1]: no network can be robust. It is in units of the inputs, such as 8 / 255."
    ]


def count_classes(model: nn.Module, x: torch.Tensor, argument: str) -> int:
    """
    Return the number of classes. Refuse inputs that do not fit, and outputs that are no logits.

    :param model: Returns logits.
    :param x: A batch of inputs, on the network's device.
    :param argument: Name of the argument, for messages.
    :return: The number of classes.
    :raises ValueError: If the network fails on the inputs, or its outputs are probabilities, or not finite.
    """
    try:
        output = model(x)
    except Exception as error:
        raise ValueError(
            f"`{argument}` does not take images of {x.shape[1]} channels and {x.shape[2]}×{x.shape[3]} pixels: {error}"
        ) from error
    if isinstance(output, torch.Tensor) and tuple(output.shape) in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"`{argument}` returns one logit, and must return those of both classes: wrap it, "
            "`art_clat.TwoLogits(model)`."
        )
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise ValueError(
            f"`{argument}` must return logits of shape (n, nb_classes), "
            f"got {tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__}."
        )
    if not output.isfinite().all():
        raise ValueError(f"`{argument}` returns NaN or infinite logits, for which no attack means anything.")
    one = torch.ones(len(output), device=output.device)
    if (output >= 0).all() and torch.allclose(output.sum(dim=1), one, atol=1e-4):
        raise ValueError(
            f"`{argument}` returns probabilities. AutoAttack's DLR loss needs logits, and its result would be "
            "false. Remove the final softmax."
        )
    if (output <= 0).all() and torch.allclose(output.exp().sum(dim=1), one, atol=1e-4):
        raise ValueError(
            f"`{argument}` returns log-probabilities. AutoAttack needs logits. Remove the final log-softmax, which "
            "changes no prediction."
        )
    return int(output.shape[1])


def check_norms(model: nn.Module, argument: str) -> None:
    """
    Refuse a network whose outputs for an image depend on the other images of the batch, by the name of the norm.

    :param model: The network.
    :param argument: Name of the argument, for messages.
    :raises ValueError: If a BatchNorm has no running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"`{argument}`: {name} has no running statistics, so that the outputs for an image depend on the other "
                "images of the batch, and a robust accuracy means nothing: use `track_running_stats=True`."
            )


def warn_about_labels(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, nb_classes: int, device: torch.device, batch_size: int
) -> list[str]:
    """
    Check whether another order of the classes fits the predictions far better than the labels do.

    A one-to-one relabelling is fitted on one half of some examples, and tried on the other half. With fewer than ten
    examples of each class that has labels nothing is said.

    :param model: Returns logits.
    :param x: Inputs in [0, 1], on the CPU.
    :param y: Index labels, on the CPU.
    :param nb_classes: Number of classes.
    :param device: Where the network runs.
    :param batch_size: Examples in a batch.
    :return: A warning if there is one.
    """
    from scipy.optimize import linear_sum_assignment

    labelled = len(y.unique())  # ten classes of ImageNet's thousand, say
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: max(SAMPLE, 20 * labelled)]
    if labelled < 2 or len(chosen) < EXAMPLES_A_CLASS * labelled:
        return []
    x, y = x[chosen], y[chosen]
    predicted = torch.cat([model(part.to(device)).argmax(dim=1).cpu() for part in x.split(batch_size)])
    half = len(x) // 2
    counts = torch.zeros(nb_classes, nb_classes, dtype=torch.int64)
    counts.index_put_((predicted[:half], y[:half]), torch.ones(half, dtype=torch.int64), accumulate=True)
    # Of equal fits the one that changes nothing.
    rows, columns = linear_sum_assignment((len(x) * counts + torch.eye(nb_classes)).numpy(), maximize=True)
    renamed = torch.as_tensor(columns)[predicted[half:]]
    before, after = predicted[half:] == y[half:], renamed == y[half:]
    better, worse = int((after & ~before).sum()), int((before & ~after).sum())
    if better - worse < max(0.1 * len(before), 4 * (better + worse) ** 0.5):  # four standard deviations of chance
        return []
    labels = set(y.tolist())
    moved = [
        f"{row} is {column}" for row, column in zip(rows, columns, strict=True) if row != column and column in labels
    ]
    return [
        f"Labels seem to be in another order than the network's: with its classes renamed ({', '.join(moved[:4])}"
        f"{', …' if len(moved) > 4 else ''}) {after.float().mean():.1%} of {len(after)} examples are classified "
        f"correctly, {before.float().mean():.1%} as they are. Robust accuracy would be false."
    ]


def warn_about_randomness(model: nn.Module, x: torch.Tensor) -> list[str]:
    """
    Check whether outputs differ from one forward pass to the next, by AutoAttack's own measure.

    :param model: Returns logits.
    :param x: A batch of inputs, on the network's device.
    :return: A warning if they do.
    :raises ValueError: If they do not, but the outputs for an image depend on the other images of the batch.
    """

    def outputs(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(model(x), eps=1e-10)

    first, *others = (outputs(x) for _ in range(5))
    if max(float((first - other).norm(dim=1).max()) for other in others) <= 1e-4:
        parts = torch.cat([outputs(part) for part in x.split(max(2, len(x) // 2))])
        if float((first - parts).norm(dim=1).max()) > 1e-2:  # far above what rounding does
            raise ValueError(
                "`classifier_or_model`: its outputs for an image depend on the other images of the batch, as with a "
                "BatchNorm in training mode. The network was put into evaluation mode and must stay in it."
            )
        return []
    return [
        "The network returns different outputs for the same inputs, as a randomized defense does, or dropout that is "
        'left on: AutoAttack\'s version "rand" is made for those, the others overestimate robust accuracy.'
    ]


def warn_about_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """
    Check whether there are gradients for attacks to follow.

    :param model: Returns logits.
    :param x: A batch of inputs, on the network's device.
    :param y: Their index labels, on the network's device.
    :return: Warnings if the gradient vanishes for some inputs, or the outputs look like those of a sigmoid.
    :raises ValueError: If torch has no gradient of the outputs with respect to the inputs.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        output = model(x)
        if not output.requires_grad:
            raise ValueError(
                "`classifier_or_model` returns outputs without a gradient: attacks have nothing to follow. Does its "
                "forward pass run under `torch.no_grad()`, or on NumPy arrays?"
            )
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(output, y, reduction="sum"), x)
    found = []
    without = (gradient.flatten(1) == 0).all(dim=1).float().mean().item()
    if without >= 0.05:
        found.append(
            f"The gradient of the cross-entropy is exactly 0 for {without:.0%} of the first {len(x)} inputs (rounding "
            "within the network, or logits so large that the softmax is exact): PGD cannot fool those, and "
            "overestimates robust accuracy."
        )
    if output.min() >= 0 and output.max() <= 1:
        found.append("The outputs all lie in [0, 1], as after a sigmoid: attacks on the cross-entropy expect logits.")
    return found


def warn_about_inputs(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, nb_classes: int, device: torch.device, batch_size: int
) -> list[str]:
    """
    Check whether inputs are in the range that the network was trained on.

    :param model: Returns logits.
    :param x: Inputs in [0, 1], on the CPU.
    :param y: Index labels, on the CPU.
    :param device: Where the network runs.
    :param batch_size: Examples in a batch.
    :return: A warning if clean accuracy is that of guessing.
    :raises ValueError: If the network does far better on the same inputs standardised, scaled back, or in 0…255.
    """
    x, y = x[:SAMPLE], y[:SAMPLE]

    def correct(x: torch.Tensor) -> int:
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return sum(int((model(x.to(device)).argmax(dim=1).cpu() == y).sum()) for x, y in batches)

    chance = 1 / nb_classes
    mean, std = x.mean((0, 2, 3)).view(1, -1, 1, 1), x.std((0, 2, 3), correction=0).view(1, -1, 1, 1) + 1e-6
    found = correct(x)
    for changed, reason in (
        ((x - mean) / std, "standardised; its normalisation seems to be missing: put it inside, before the network"),
        (x * std + mean, "scaled back; its normalisation seems to be applied twice: take one away"),
        (255 * x, "in 0…255; it seems to expect those: put the factor of 255 inside, before the network"),
    ):
        better = correct(changed)
        # Guessing is no sign of the right inputs, even if the network does worse than that, as with swapped labels.
        if better - found > max(10, 0.2 * len(x)) and better / len(x) > chance + 0.2 * (1 - chance):
            raise ValueError(
                f"`classifier_or_model` classifies {found / len(x):.1%} of the first {len(x)} inputs correctly as they "
                f"are, and {better / len(x):.1%} of them {reason}. Robust accuracy would be false."
            )
    if len(x) < 20 or found / len(x) >= chance + 2.33 * (chance * (1 - chance) / len(x)) ** 0.5:
        return []
    return [
        f"Clean accuracy, {found / len(x):.1%} of the first {len(x)} examples, is at chance ({chance:.1%}): suspect "
        "labels in another order, other weights than were trained, or inputs that are not what the network expects "
        "(normalisation, size, order of the channels)."
    ]
