"""AutoAttack on a classifier."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat._robustbench import autoattack
from art_clat.attacks import Ascent, L1Ball, L2Ball, LinfBall, in_chunks
from art_clat.distributed import Part
from art_clat.guest import evaluation_mode, own_randomness
from art_clat.layers import only_trainable
from art_clat.network import Network
from art_clat.validation import check_labels, check_seed, check_whole

logger = logging.getLogger(__name__)

#: RobustBench's names of the norms, what users write for them, and the balls.
NORMS: dict[str, tuple[tuple[object, ...], type[LinfBall | L2Ball | L1Ball]]] = {
    "Linf": (("Linf", "linf", "inf", np.inf), LinfBall),
    "L2": (("L2", "l2", 2), L2Ball),
    "L1": (("L1", "l1", 1), L1Ball),
}


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """
    How a classifier did. Accuracies are in [0, 1]; arrays have one entry an example.

    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: ε, in units of inputs in [0, 1].
    :param nb_examples: Number of examples.
    :param clean: Whether each example is classified correctly as it is.
    :param pgd: Whether it still is under PGD.
    :param pgd_max_iter: Number of PGD steps.
    :param autoattack: Whether it still is under AutoAttack; `None` if that was not run.
    :param autoattack_version: ``"standard"``, ``"plus"`` or ``"rand"``; `None` if AutoAttack was not run.
    :param warnings: What AutoAttack's own checks warned of.
    :param seconds: Time taken.
    :param seed: Seed of the attacks.
    """

    norm: str
    eps: float
    nb_examples: int
    clean: npt.NDArray[np.bool_]
    pgd: npt.NDArray[np.bool_]
    pgd_max_iter: int
    autoattack: npt.NDArray[np.bool_] | None
    autoattack_version: str | None
    warnings: tuple[str, ...]
    seconds: float
    seed: int

    @property
    def clean_accuracy(self) -> float:
        """Share of examples classified correctly."""
        return float(self.clean.mean())

    @property
    def pgd_accuracy(self) -> float:
        """Share of examples classified correctly as they are and under PGD."""
        return float(self.pgd.mean())

    @property
    def autoattack_accuracy(self) -> float | None:
        """Share of examples that AutoAttack could not get misclassified; `None` if it was not run."""
        return None if self.autoattack is None else float(self.autoattack.mean())

    def to_dict(self) -> dict[str, Any]:
        """
        Give the figures without the arrays, ready for JSON.

        :return: Every field that is no array, and the accuracies.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        figures = {name: value for name, value in fields.items() if name not in ("clean", "pgd", "autoattack")}
        return {
            **figures,
            "warnings": list(self.warnings),
            "clean_accuracy": self.clean_accuracy,
            "pgd_accuracy": self.pgd_accuracy,
            "autoattack_accuracy": self.autoattack_accuracy,
        }

    def __str__(self) -> str:
        rows = [("clean", self.clean_accuracy), (f"PGD-{self.pgd_max_iter}", self.pgd_accuracy)]
        if self.autoattack_accuracy is not None:
            rows.append((f"AutoAttack ({self.autoattack_version})", self.autoattack_accuracy))
        title = f"{self.norm}, ε = {self.eps:.4g}, {self.nb_examples} examples"
        return "\n".join([title, *(f"  {name:<22}{100 * value:6.2f} %" for name, value in rows)])


class _Logits(nn.Module):
    """An ART classifier as the function from inputs to logits that AutoAttack takes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.wrapped = network.classifier._model
        self._network = [network]  # not a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._network[0].logits(x)


def evaluate_robustness(
    classifier_or_model: PyTorchClassifier | nn.Module,
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.generic],
    *,
    norm: str | float,
    eps: float,
    autoattack_version: str | None = "standard",
    pgd_max_iter: int = 20,
    pgd_eps_step: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> RobustnessReport:
    """
    Measure clean accuracy, accuracy under PGD and under AutoAttack (Croce and Hein, arXiv 2003.01690).

    AutoAttack is its authors' own package. The network runs in evaluation mode and comes back as it was, the global
    random generators included. An example counts as robust only if it is also classified correctly as it is. PGD's
    accuracy is an upper bound that AutoAttack tightens; where the two are far apart, suspect masked
    gradients.

    :param classifier_or_model: An ART classifier with ``clip_values=(0, 1)``, or a network that takes inputs in [0, 1],
           with its normalisation inside; either gives logits. A network is evaluated on the device it is on.
    :param x: Inputs in [0, 1], shape (n, channels, height, width).
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"`` (also ``np.inf``, 2, 1).
    :param eps: Radius of the ball, in units of inputs in [0, 1]: 8 / 255, not 8. At most 1 for ℓ∞.
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"``, or `None` to leave AutoAttack out.
    :param pgd_max_iter: Number of PGD steps, from one random start.
    :param pgd_eps_step: Size of a PGD step; `None` for ε / 4 (2 / 255 at 8 / 255, as in the paper).
    :param batch_size: Examples in a batch.
    :param seed: Seed of the attacks.
    :return: The accuracies and the verdict on every example.
    :raises TypeError: If `classifier_or_model` is neither.
    :raises ValueError: If an argument is out of its range, inputs lie outside [0, 1], or the outputs are no logits:
            AutoAttack would give a false number.
    :raises ImportError: If AutoAttack is not installed.
    """
    norm = _norm_name(norm)
    if not 0 < eps <= (1 if norm == "Linf" else np.inf):
        raise ValueError(f"`eps` must be positive, and at most 1 for Linf on inputs in [0, 1] (8 / 255), got {eps}.")
    if pgd_eps_step is not None and not pgd_eps_step > 0:
        raise ValueError(f"`pgd_eps_step` must be positive, got {pgd_eps_step}.")
    check_whole(pgd_max_iter, 1, argument="pgd_max_iter")
    check_whole(batch_size, 1, argument="batch_size")
    versions = (None, "standard", "plus", "rand")
    if autoattack_version not in versions:
        raise ValueError(f"`autoattack_version` must be one of {versions}, got {autoattack_version!r}.")
    make_autoattack = None if autoattack_version is None else autoattack().AutoAttack
    model, device = _as_model(classifier_or_model)
    inputs = _check_images(x, y)
    check_seed(seed)
    start = time.perf_counter()
    with own_randomness(seed, device), evaluation_mode(model), only_trainable(model, []):
        nb_classes = _count_classes(model, inputs[:batch_size].to(device))
        labels = check_labels(y, nb_classes, argument="y")
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        needed = 3 if autoattack_version == "rand" else 4  # the DLR loss is of three logits, its targeted form of four
        if make_autoattack is not None and nb_classes < needed:
            raise ValueError(
                f"AutoAttack's DLR loss needs at least {needed} classes in version {autoattack_version!r}, the network "
                f"has {nb_classes}. Pass `autoattack_version=None`."
            )
        clean = _is_correct(model, inputs, labels, device, batch_size)
        pgd = Ascent(
            ball=NORMS[norm][1](
                torch.tensor(eps, device=device), (torch.tensor(0.0).to(device), torch.tensor(1.0).to(device))
            ),
            step=torch.tensor(eps / 4 if pgd_eps_step is None else pgd_eps_step, device=device),
            nb_steps=pgd_max_iter,
            random_start=True,
        )
        x_adv = _perturb(pgd, model, inputs, labels, device, batch_size)
        robust = clean & _is_correct(model, x_adv, labels, device, batch_size)
        survivors, warned = None, []
        if make_autoattack is not None:
            with _collected_warnings() as warned:
                adversary = make_autoattack(
                    model, norm=norm, eps=eps, seed=seed, version=autoattack_version, device=device, verbose=False
                )
                for attack in (adversary.apgd_targeted, adversary.fab):  # nine target classes, unless there are fewer
                    attack.n_target_classes = min(attack.n_target_classes, nb_classes - 1)
                x_adv = adversary.run_standard_evaluation(inputs, labels, bs=batch_size)
            survivors = _is_correct(model, x_adv, labels, device, batch_size)
    for message in dict.fromkeys(warned):
        logger.warning("AutoAttack: %s", message)
    return RobustnessReport(
        norm=norm,
        eps=float(eps),
        nb_examples=len(inputs),
        clean=clean,
        pgd=robust,
        pgd_max_iter=pgd_max_iter,
        autoattack=survivors,
        autoattack_version=autoattack_version,
        warnings=tuple(dict.fromkeys(warned)),
        seconds=time.perf_counter() - start,
        seed=seed,
    )


def _norm_name(norm: object) -> str:
    for name, (spellings, _) in NORMS.items():
        if norm in spellings:
            return name
    raise ValueError(f"`norm` must be 'Linf', 'L2' or 'L1' (or np.inf, 2, 1), got {norm!r}.")


def _as_model(classifier_or_model: object) -> tuple[nn.Module, torch.device]:
    if isinstance(classifier_or_model, PyTorchClassifier):
        classifier = classifier_or_model
        clip = classifier.clip_values
        if clip is None or not (np.allclose(clip[0], 0) and np.allclose(clip[1], 1)):
            raise ValueError(
                f"`classifier_or_model`: AutoAttack perturbs within [0, 1], so the classifier's clip_values must be "
                f"(0, 1), got {classifier.clip_values}."
            )
        network = Network(classifier)
        if not network.is_differentiable:
            raise ValueError(
                "`classifier_or_model`: its preprocessing is not PyTorch's, no gradient passes through it, and "
                "AutoAttack's result would be false."
            )
        return _Logits(network), network.device
    if isinstance(classifier_or_model, nn.Module):
        tensor = next(classifier_or_model.parameters(), None)
        return classifier_or_model, torch.device("cpu") if tensor is None else tensor.device
    raise TypeError(
        "`classifier_or_model` must be an ART PyTorchClassifier or a torch.nn.Module, "
        f"got {type(classifier_or_model).__module__}.{type(classifier_or_model).__qualname__}."
    )


def _check_images(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> torch.Tensor:
    x = np.asarray(x)
    if x.ndim != 4 or len(x) == 0 or len(x) != len(y):
        raise ValueError(
            "`x` and `y` must be images of shape (n, channels, height, width) and as many labels, "
            f"got shape {x.shape} and {len(y)} labels."
        )
    if not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        raise ValueError(f"`x` must be floating point in [0, 1], got {x.dtype} in [{x.min():.6g}, {x.max():.6g}].")
    return torch.as_tensor(x.astype(np.float32))


def _count_classes(model: nn.Module, x: torch.Tensor) -> int:
    """Give the number of classes, and refuse outputs that are no logits."""
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise ValueError(
            "`classifier_or_model` must give logits of shape (n, nb_classes), "
            f"got {tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__}."
        )
    if (output >= 0).all() and torch.allclose(output.sum(dim=1), torch.ones(len(output), device=x.device), atol=1e-4):
        raise ValueError(
            "`classifier_or_model` gives probabilities; AutoAttack's DLR loss needs logits, and its result would be "
            "false. Remove the final softmax."
        )
    return int(output.shape[1])


def _is_correct(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: torch.device, batch_size: int
) -> npt.NDArray[np.bool_]:
    with torch.no_grad():
        predicted = [model(batch.to(device)).argmax(dim=1).cpu() for batch in x.split(batch_size)]
    return (torch.cat(predicted) == y.cpu()).numpy()


def _perturb(
    attack: Ascent, model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: torch.device, batch_size: int
) -> torch.Tensor:
    def perturbed(batch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        def climb(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            return attack(lambda z: nn.functional.cross_entropy(model(z), y, reduction="sum"), x, start)

        return in_chunks(climb, batch, target, attack.start(batch, Part(len(batch))))

    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([perturbed(batch.to(device), target.to(device)).cpu() for batch, target in pairs])


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """
    Collect what AutoAttack's checks warn of in the logger it uses, or through `warnings`.

    One of the checks also takes away the trace function that a debugger or a coverage tool has set; it is put back.
    """
    trace = sys.gettrace()
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    source = logging.getLogger("auto-attack")
    source.addHandler(handler)
    propagate, source.propagate = source.propagate, False  # they are logged again, once each, with what they are of
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
        messages += [str(w.message) for w in caught if "autoattack" in w.filename]
        for other in caught:
            if "autoattack" not in other.filename:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    finally:
        sys.settrace(trace)
        source.removeHandler(handler)
        source.propagate = propagate
