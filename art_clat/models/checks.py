"""Checks of classifiers, attacks, data and labels that a user passes in, made before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.layers.kinds import is_weighted_model
from art_clat.models.outputs import check_initialised
from art_clat.utils.checks import is_number

logger = logging.getLogger(__name__)


#: Where ART defines classifiers that train and predict as `PyTorchClassifier` does.
PLAIN = ("art.estimators.classification.pytorch", "art.estimators.classification.hugging_face")

#: By what share of their range inputs may leave it: rounding does that. They are clipped.
ROUNDING = 1e-6


def check_plain(classifier: PyTorchClassifier, *, argument: str) -> None:
    """Refuse classifiers that train or predict otherwise than their network, such as ART's smoothing ones."""
    for name in ("fit", "predict", "loss_gradient"):
        owner = next(cls for cls in type(classifier).__mro__ if name in vars(cls))
        if owner.__module__ not in PLAIN:
            raise TypeError(
                f"`{argument}` is a {type(classifier).__qualname__}, and `{name}` is {owner.__qualname__}'s own. Here "
                f"the network inside it, {type(classifier.model).__qualname__}, would be used as it is, without what "
                "that adds (such as noise). Pass a PyTorchClassifier of the network if that is what you want."
            )


def check_classifier(classifier: object, *, needs_optimizer: bool) -> None:
    """Refuse what is not an ART PyTorch classifier with weighted layers, and with an optimiser if it needs one."""
    if not isinstance(classifier, PyTorchClassifier):
        raise TypeError(
            "`classifier` must be an ART PyTorchClassifier (art.estimators.classification), "
            f"got {type(classifier).__module__}.{type(classifier).__qualname__}."
        )
    check_plain(classifier, argument="classifier")
    for value in () if classifier.clip_values is None else classifier.clip_values:
        shape, inputs = np.shape(value), tuple(classifier.input_shape)
        if len(shape) > len(inputs) or any(n not in (1, m) for n, m in zip(shape[::-1], inputs[::-1], strict=False)):
            per_channel = f" One value a channel has the shape {(*shape, 1, 1)}." if shape == inputs[:1] else ""
            raise ValueError(
                f"`classifier.clip_values` have the shape {shape}, which does not broadcast to inputs of shape "
                f"{inputs}: pass two numbers, or arrays that do.{per_channel}"
            )
    if needs_optimizer and classifier.optimizer is None:
        raise ValueError(
            "`classifier` has no optimizer: pass one to PyTorchClassifier, such as "
            "`optimizer=torch.optim.SGD(model.parameters(), ...)`."
        )
    if needs_optimizer and isinstance(classifier.optimizer, torch.optim.LBFGS):
        raise ValueError(
            "`classifier` has the optimizer LBFGS, which evaluates the loss several times a step; use one that takes "
            "gradients, such as SGD or Adam."
        )
    check_initialised(classifier.model)
    if not is_weighted_model(classifier.model):
        raise ValueError(
            "`classifier.model` has no weighted layer: it needs at least one module with a weight of two or more "
            f"dimensions (convolution, linear, ...), got {type(classifier.model).__qualname__}."
        )


def check_attack(attack: object, classifier: PyTorchClassifier, *, argument: str) -> None:
    """Refuse what is not an untargeted ART evasion attack, with one ε for all samples, on this classifier."""
    if isinstance(attack, type) and issubclass(attack, EvasionAttack):
        raise TypeError(f"`{argument}` is the class {attack.__name__}; pass an instance, {attack.__name__}(...).")
    if not isinstance(attack, EvasionAttack):
        raise TypeError(
            f"`{argument}` must be an ART EvasionAttack, got {type(attack).__module__}.{type(attack).__qualname__}."
        )
    name = type(attack).__name__
    # Some of ART's attacks (APGD with a loss) wrap the classifier that they get in another one.
    if attack.estimator is not classifier and getattr(attack.estimator, "model", None) is not classifier.model:
        raise ValueError(
            f"`{argument}`: {name} is bound to another classifier; build it on `classifier`, {name}(classifier, ...)."
        )
    if getattr(attack, "targeted", False):
        raise ValueError(f"`{argument}`: {name} is targeted; pass an untargeted attack (`targeted=False`).")
    eps = getattr(attack, "eps", None)
    if isinstance(eps, np.ndarray) and eps.ndim > len(classifier.input_shape) and eps.shape[0] != 1:
        raise ValueError(
            f"`{argument}`: {name} has an `eps` of shape {eps.shape}, one value a sample; pass a scalar or an array "
            f"that broadcasts to one input of shape {tuple(classifier.input_shape)}."
        )


def check_attacks(attacks: object, classifier: PyTorchClassifier) -> list[EvasionAttack]:
    """Return the attacks of a list, or a single attack as a list; each must be as in :func:`check_attack`."""
    listed: list[EvasionAttack] = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
    if not listed:
        raise ValueError("`attacks` is empty; pass at least one attack.")
    for attack in listed:
        check_attack(attack, classifier, argument="attacks")
    return listed


def warn_about_eps(attack: EvasionAttack, classifier: PyTorchClassifier) -> None:
    """Warn about an ε that reaches from any input nearly everywhere: it is probably in other units than the inputs."""
    eps, norm, clip = getattr(attack, "eps", None), getattr(attack, "norm", None), classifier.clip_values
    if not is_number(eps) or clip is None or norm not in (np.inf, "inf", 2, 1):
        return
    spans = np.broadcast_to(np.asarray(clip[1]) - np.asarray(clip[0]), classifier.input_shape).astype(float).ravel()
    order = float(norm)
    largest = float(spans.max()) if order == np.inf else float(np.linalg.norm(spans, order)) / 2
    if float(eps) >= largest:  # type: ignore[arg-type]  # a number
        logger.warning(
            "%s has eps=%g, and inputs in [%g, %g] leave no room for that: is it in other units? It must be in "
            "those of the inputs, such as 8 / 255 for images in [0, 1].",
            type(attack).__name__,
            eps,
            np.min(clip[0]),
            np.max(clip[1]),
        )


def check_data(
    classifier: PyTorchClassifier,
    x: npt.NDArray[np.generic],
    y: npt.NDArray[np.generic],
    *,
    argument: str,
    label_argument: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Check inputs and labels and return them as tensors; the arrays are not modified.

    Inputs become float32, shape (n, *input_shape). Labels become int64, shape (n,); only probabilities other than 0 and
    1 stay float32, shape (n, nb_classes).
    """
    if isinstance(x, (torch.utils.data.DataLoader, torch.utils.data.Dataset)):
        raise TypeError(
            f"`{argument}` is a {type(x).__name__}; an array is needed. Train on a DataLoader by `fit_generator("
            "PyTorchDataGenerator(loader, size=len(loader.dataset), batch_size=loader.batch_size))` of "
            "art.data_generators."
        )
    x, y = np.asarray(x), np.asarray(y)
    if x.shape == tuple(classifier.input_shape):
        raise ValueError(f"`{argument}` is one input of shape {x.shape}; a batch is needed: `{argument}[None]`.")
    if len(x.shape) == 0 or len(x) == 0:
        raise ValueError(f"`{argument}` is empty; pass at least one input.")
    if y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"`{argument}` and `{label_argument}` differ in length: {len(x)} and {len(y) if y.ndim else 'none'}."
        )
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"`{argument}` must be floating point, got {x.dtype}; convert images in 0…255 by "
            "`x.astype(np.float32) / 255`."
        )
    if x.shape[1:] != tuple(classifier.input_shape):
        raise ValueError(
            f"`{argument}` has inputs of shape {x.shape[1:]}, the classifier takes {tuple(classifier.input_shape)}."
        )
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite and is refused below
        x = x.astype(np.float32, copy=False)
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).reshape(len(x), -1).any(axis=1).sum())
        raise ValueError(f"`{argument}` holds NaN or infinity, in {bad} of {len(x)} inputs; finite values are needed.")
    if classifier.clip_values is not None:
        low, high = (np.asarray(value) for value in classifier.clip_values)
        if (x < low).any() or (x > high).any():
            tolerance = ROUNDING * (high - low)
            if (x < low - tolerance).any() or (x > high + tolerance).any():
                raise ValueError(
                    f"`{argument}` lies in [{x.min():.8g}, {x.max():.8g}], outside the classifier's clip_values "
                    f"[{low.min():.8g}, {high.max():.8g}]. Scale the inputs, or change `clip_values`."
                )
            x = np.clip(x, low, high).astype(np.float32)
    if not x.flags.writeable or min(x.strides) < 0:  # torch takes neither a read-only memory map nor a flipped view
        x = x.copy()
    return torch.as_tensor(x), check_labels(y, int(classifier.nb_classes), argument=label_argument)


def check_labels(y: npt.NDArray[np.generic], nb_classes: int, *, argument: str) -> torch.Tensor:
    """Check labels and return them as a tensor, see :func:`check_data`."""
    y = np.asarray(y)
    if y.dtype.kind not in "biuf":
        raise ValueError(f"`{argument}` must hold numbers, 0…{nb_classes - 1}, got {y.dtype}.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 1:
        values = y.astype(np.float64)
        if not np.isfinite(values).all() or (values != np.round(values)).any():
            raise ValueError(f"`{argument}` holds labels that are not whole numbers; 0…{nb_classes - 1} are accepted.")
        if values.min() < 0 or values.max() >= nb_classes:
            raise ValueError(
                f"`{argument}` holds labels from {int(values.min())} to {int(values.max())}; the classifier has "
                f"{nb_classes} classes, so 0…{nb_classes - 1} are accepted."
            )
        return torch.as_tensor(values.astype(np.int64))
    if y.ndim != 2 or y.shape[1] != nb_classes:
        raise ValueError(
            f"`{argument}` has shape {y.shape}; index labels of shape (n,) or one-hot labels of shape "
            f"(n, {nb_classes}) are accepted."
        )
    values = y.astype(np.float32)
    if not np.isfinite(values).all() or (values < 0).any() or not np.allclose(values.sum(axis=1), 1, atol=1e-4):
        raise ValueError(f"`{argument}` has rows that are not class probabilities, which are at least 0 and sum to 1.")
    one_hot = bool(((values == 0) | (values == 1)).all())
    return torch.as_tensor(values.argmax(axis=1) if one_hot else values)


def check_optimizer_holds(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> None:
    """Refuse trainable parameters that the optimiser does not hold; they would silently never train."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    missing = list(dict.fromkeys(name for name, p in trainable if p not in held))
    if missing and not any(p in held for _, p in trainable):
        raise ValueError(
            "`classifier.optimizer` holds no parameter of `classifier.model`'s layers: it belongs to another model. "
            "Build it on `model.parameters()`."
        )
    if missing:
        raise ValueError(
            f"`classifier.optimizer` does not hold the parameters of {len(missing)} layer(s) that may be chosen, "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}: they would never train. Build the "
            "optimizer on `model.parameters()`, or set `requires_grad=False` on what must stay frozen."
        )
