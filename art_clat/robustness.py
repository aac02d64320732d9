"""AutoAttack on a classifier."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.attacks import Ascent, L1Ball, L2Ball, LinfBall, in_chunks
from art_clat.autoattack import VERSIONS, Attack, Ensemble, heard
from art_clat.checkpoint import describe_inputs, fingerprint, text_of, weights
from art_clat.distributed import Part, Ranks
from art_clat.evaluation import Evaluation, Folder, Outcome
from art_clat.guest import evaluation_mode, own_randomness, reseed
from art_clat.layers import only_trainable
from art_clat.network import Network
from art_clat.plots import new_axes
from art_clat.plots import save as save_figure
from art_clat.sanity import (
    ORDERS,
    check_eps,
    check_images,
    count_classes,
    doubts_of_gradients,
    doubts_of_inputs,
    doubts_of_randomness,
)
from art_clat.validation import check_labels, check_seed, check_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

#: Whether each example is classified correctly, shape (n,).
Verdicts = npt.NDArray[np.bool_]

#: How long a process that is done with its batches waits for one that is not; one that dies is noticed at once.
PATIENCE = timedelta(days=7)

#: Version of what :meth:`RobustnessReport.save` writes; another one is refused.
FORMAT = 1

#: RobustBench's names of the norms, what users write for them, and the balls.
NORMS: dict[str, tuple[tuple[object, ...], type[LinfBall | L2Ball | L1Ball]]] = {
    "Linf": (("Linf", "linf", "inf", np.inf), LinfBall),
    "L2": (("L2", "l2", 2), L2Ball),
    "L1": (("L1", "l1", 1), L1Ball),
}


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """
    How a classifier did. Accuracies are in [0, 1]; verdicts have one entry an example.

    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: ε, in units of inputs in [0, 1].
    :param nb_examples: Number of examples.
    :param clean: Whether each example is classified correctly as it is.
    :param pgd: Whether it still is under PGD.
    :param pgd_max_iter: Number of PGD steps.
    :param autoattack: Whether it still is under AutoAttack; `None` if that was not run.
    :param autoattack_version: ``"standard"``, ``"plus"`` or ``"rand"``; `None` if AutoAttack was not run.
    :param warnings: What makes the figures doubtful, AutoAttack's own warnings included, in plain words.
    :param seconds: Time taken, that of all processes and of interrupted calls together.
    :param seed: Seed of the attacks.
    :param pgd_restarts: Number of random starts of PGD.
    :param transfer: Whether it still is on the adversarial examples of another network; `None` if that was not tried.
    :param attacks: Whether it still is after each of AutoAttack's attacks and those before it, in their order.
    :param adversarial: AutoAttack's adversarial examples (PGD's, if AutoAttack was not run), float32, shape
           (n, channels, height, width); an example that withstood, or was misclassified anyway, is there as it is.
    """

    norm: str
    eps: float
    nb_examples: int
    clean: Verdicts
    pgd: Verdicts
    pgd_max_iter: int
    autoattack: Verdicts | None
    autoattack_version: str | None
    warnings: tuple[str, ...]
    seconds: float
    seed: int
    pgd_restarts: int = 1
    transfer: Verdicts | None = None
    attacks: dict[str, Verdicts] = dataclasses.field(default_factory=dict)
    adversarial: npt.NDArray[np.float32] | None = dataclasses.field(default=None, repr=False)

    @property
    def clean_accuracy(self) -> float:
        """Share of examples classified correctly."""
        return float(self.clean.mean())

    @property
    def pgd_accuracy(self) -> float:
        """Share of examples classified correctly as they are and under PGD."""
        return float(self.pgd.mean())

    @property
    def transfer_accuracy(self) -> float | None:
        """Share of examples classified correctly as they are and as another network's adversarial examples."""
        return None if self.transfer is None else float(self.transfer.mean())

    @property
    def autoattack_accuracy(self) -> float | None:
        """Share of examples that AutoAttack could not get misclassified; `None` if it was not run."""
        return None if self.autoattack is None else float(self.autoattack.mean())

    def to_dict(self) -> dict[str, Any]:
        """
        Give the figures without the arrays, ready for JSON.

        :return: Every field that is no array, the accuracies, and under ``"attacks"`` the accuracy after each of
                 AutoAttack's attacks.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = ("clean", "pgd", "autoattack", "transfer", "attacks", "adversarial")
        return {
            **{name: value for name, value in fields.items() if name not in arrays},
            "warnings": list(self.warnings),
            "clean_accuracy": self.clean_accuracy,
            "pgd_accuracy": self.pgd_accuracy,
            "transfer_accuracy": self.transfer_accuracy,
            "autoattack_accuracy": self.autoattack_accuracy,
            "attacks": {name: float(verdicts.mean()) for name, verdicts in self.attacks.items()},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """
        Draw what each of AutoAttack's attacks takes from the clean accuracy, as a waterfall.

        :param ax: Where to draw, or `None` for a new figure.
        :return: The axes.
        :raises ValueError: If AutoAttack was not run.
        """
        if not self.attacks:
            raise ValueError("There is no waterfall to draw: AutoAttack was not run.")
        ax = ax if ax is not None else new_axes(width=2.5 + 1.1 * len(self.attacks), height=3.6)
        left = [100 * self.clean_accuracy, *(100 * float(verdicts.mean()) for verdicts in self.attacks.values())]
        names = ["clean", *self.attacks, "robust"]
        steps = [before - after for before, after in itertools.pairwise(left)]
        heights, bottoms = [left[0], *steps, left[-1]], [0.0, *left[1:], 0.0]
        ax.bar(names, heights, bottom=bottoms, color=["C0", *["C3"] * len(steps), "C2"])
        for position, (height, bottom) in enumerate(zip(heights, bottoms, strict=True)):
            sign = "−" if height and 0 < position < len(names) - 1 else ""
            ax.annotate(
                f"{sign}{height:.1f}",
                (position, height + bottom),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
            )
        for position, height in enumerate(left):
            ax.plot([position, position + 1], [height, height], color="grey", linewidth=0.7)
        ax.set_ylim(0, 105)
        ax.set_ylabel("accuracy [%]")
        ax.set_title(f"AutoAttack ({self.autoattack_version}), {self._title()}", fontsize=9)
        return ax

    def save(self, folder: str | os.PathLike[str], **about: object) -> None:
        """
        Write ``report.json``, ``verdicts.npz``, ``adversarial.pt`` and, where AutoAttack was run, ``waterfall.png``.

        The figures are :meth:`to_dict`'s. Verdicts are boolean arrays ``clean``, ``pgd``, ``transfer`` and
        ``autoattack/<attack>``; the adversarial examples are one tensor for ``torch.load(path, weights_only=True)``.

        :param folder: Created if missing; files of these names are replaced.
        :param about: What else belongs in ``report.json``, such as model, data, command and date.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        verdicts = {"clean": self.clean, "pgd": self.pgd}
        if self.transfer is not None:
            verdicts["transfer"] = self.transfer
        verdicts |= {f"autoattack/{name}": robust for name, robust in self.attacks.items()}
        with (folder / "verdicts.npz").open("wb") as file:
            np.savez_compressed(file, **verdicts)  # type: ignore[arg-type]  # a keyword of it
        if self.adversarial is not None:
            torch.save(torch.as_tensor(self.adversarial), folder / "adversarial.pt")
        if self.attacks:
            save_figure(self.plot(), folder / "waterfall.png")
        text = json.dumps({"format": FORMAT, **self.to_dict(), **about}, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> tuple[RobustnessReport, dict[str, Any]]:
        """
        Read what :meth:`save` wrote, without the adversarial examples. Nothing in the files is ever executed.

        :param folder: The folder.
        :return: The report, and what else was said in ``report.json``.
        :raises ValueError: If it is no such folder, of another format, or its files are damaged or not of one report.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise ValueError(f"`folder`: {folder} holds no evaluation: there is no report.json.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')}, this version of art_clat reads {FORMAT}")
            with np.load(path.with_name("verdicts.npz"), allow_pickle=False) as file:
                verdicts: dict[str, Any] = {name: file[name] for name in ("clean", "pgd")}
                verdicts["transfer"] = file["transfer"] if "transfer" in file.files else None
                attacks = {name: file[f"autoattack/{name}"] for name in content["attacks"]}
            fields = {field.name for field in dataclasses.fields(cls)} & content.keys()
            report = cls(
                **{name: content[name] for name in fields - {"attacks", "warnings"}},
                **verdicts,
                autoattack=next(reversed(attacks.values()), None),
                attacks=attacks,
                warnings=tuple(content["warnings"]),
            )
            figures = report.to_dict()
            if len(report.clean) != report.nb_examples or any(content[name] != figures[name] for name in figures):
                raise ValueError("its figures are not those of the verdicts in verdicts.npz")
        except KeyError as error:
            raise ValueError(f"`folder`: the evaluation in {folder} cannot be read: it lacks {error}.") from error
        except (OSError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"`folder`: the evaluation in {folder} cannot be read: {error}.") from error
        return report, {name: value for name, value in content.items() if name not in {"format", *figures}}

    def __str__(self) -> str:
        restarts = f", {self.pgd_restarts} restarts" if self.pgd_restarts > 1 else ""
        rows = [("clean", self.clean_accuracy), (f"PGD-{self.pgd_max_iter}{restarts}", self.pgd_accuracy)]
        if self.transfer_accuracy is not None:
            rows.append(("transfer", self.transfer_accuracy))
        rows += [(f"  after {name}", float(verdicts.mean())) for name, verdicts in self.attacks.items()]
        if self.autoattack_accuracy is not None:
            rows.append((f"AutoAttack ({self.autoattack_version})", self.autoattack_accuracy))
        lines = [f"  {name:<24}{100 * value:6.2f} %" for name, value in rows]
        return "\n".join([self._title(), *lines, *(f"  ! {message}" for message in self.warnings)])

    def _title(self) -> str:
        return f"{self.norm}, ε = {self.eps:.4g}, {self.nb_examples} examples"


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
    pgd_restarts: int = 1,
    transfer_from: PyTorchClassifier | nn.Module | None = None,
    batch_size: int = 128,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> RobustnessReport:
    """
    Measure clean accuracy, accuracy under PGD and under AutoAttack (Croce and Hein, arXiv 2003.01690).

    AutoAttack is its authors' own package, run attack by attack on the examples that the attacks before have left, as
    its ``run_standard_evaluation`` does: with the same seed and batches the adversarial examples are the same. The
    network runs in evaluation mode and comes back as it was, the global random generators included. An example counts
    as robust only if it is also classified correctly as it is. PGD's accuracy is an upper bound that AutoAttack
    tightens; where the two are far apart, suspect masked gradients.

    In a process group, or launched by ``torchrun``, the processes share the batches, and each gets the whole report:
    all of them must make the same call. What is drawn at random in a batch depends on neither their number nor kills.

    :param classifier_or_model: An ART classifier with ``clip_values=(0, 1)``, or a network that takes inputs in [0, 1],
           with its normalisation inside; either gives logits. A network is evaluated on the device it is on.
    :param x: Inputs in [0, 1], shape (n, channels, height, width).
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"`` (also ``np.inf``, 2, 1).
    :param eps: Radius of the ball, in units of inputs in [0, 1]: 8 / 255, not 8. At most 1 for ℓ∞.
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"``, or `None` to leave AutoAttack out.
    :param pgd_max_iter: Number of PGD steps.
    :param pgd_eps_step: Size of a PGD step; `None` for ε / 4 (2 / 255 at 8 / 255, as in the paper).
    :param pgd_restarts: Number of random starts of PGD. Only what withstood one is attacked from the next.
    :param transfer_from: Another classifier or network of the same classes, whose adversarial examples (the same PGD,
           from one random start) are tried on this one, or `None`.
    :param batch_size: Examples in a batch.
    :param seed: Seed of the attacks.
    :param checkpoint: A folder in which every batch is saved when an attack is done with it, or `None`. Killed at any
           instant, the same call continues and ends with the same report. One that holds anything else is refused.
    :param verbose: Show the progress and the time left, at most.
    :return: The accuracies and the verdict on every example.
    :raises TypeError: If `classifier_or_model` is neither.
    :raises ValueError: If an argument is out of its range, inputs lie outside [0, 1] or are not of the classifier's
            ``input_shape``, the outputs are no logits, or normalisation seems to be missing or to be there twice: the
            figures would be false. If `checkpoint` holds something else.
    :raises ImportError: If AutoAttack is not installed.
    :raises ConnectionError: If another process is lost.
    """
    norm = _norm_name(norm)
    for argument, number in (
        ("pgd_max_iter", pgd_max_iter),
        ("pgd_restarts", pgd_restarts),
        ("batch_size", batch_size),
    ):
        check_whole(number, 1, argument=argument)
    if pgd_eps_step is not None and not pgd_eps_step > 0:
        raise ValueError(f"`pgd_eps_step` must be positive, got {pgd_eps_step}.")
    if autoattack_version not in (None, *VERSIONS):
        raise ValueError(f"`autoattack_version` must be one of {(None, *VERSIONS)}, got {autoattack_version!r}.")
    check_seed(seed)
    model, device = _as_model(classifier_or_model, "classifier_or_model")
    source, source_device = (None, device) if transfer_from is None else _as_model(transfer_from, "transfer_from")
    inputs = check_images(x, y)
    _check_size(inputs, "classifier_or_model", classifier_or_model)
    _check_size(inputs, "transfer_from", transfer_from)
    check_eps(eps, norm, inputs[0].numel())
    step = eps / 4 if pgd_eps_step is None else float(pgd_eps_step)
    ranks = Ranks.join(device, PATIENCE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.together())
        stack.enter_context(own_randomness(seed, device))
        for network in (model,) if source is None else (model, source):
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(only_trainable(network, []))
        stack.enter_context(torch.no_grad())
        sample = inputs[:batch_size].to(device)
        nb_classes = count_classes(model, sample, "classifier_or_model")
        if source is not None and count_classes(source, sample.to(source_device), "transfer_from") != nb_classes:
            raise ValueError(f"`transfer_from` must have the {nb_classes} classes of `classifier_or_model`.")
        labels = check_labels(y, nb_classes, argument="y")
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        attacks: dict[str, Attack | None] = {
            "clean": None,
            "pgd": _pgd(model, device, norm=norm, eps=eps, step=step, nb_steps=pgd_max_iter, nb_restarts=pgd_restarts),
        }
        costs: dict[str, float] = {"clean": 1, "pgd": 3 * pgd_max_iter * pgd_restarts}
        if source is not None:
            attacks["transfer"] = _pgd(source, source_device, norm=norm, eps=eps, step=step, nb_steps=pgd_max_iter)
            costs["transfer"] = 3 * pgd_max_iter
        ensemble = None
        if autoattack_version is not None:
            ensemble = Ensemble(
                model,
                norm=norm,
                eps=eps,
                version=autoattack_version,
                nb_classes=nb_classes,
                seed=seed,
                device=device,
            )
            costs |= {name: ensemble.forward_passes(name) for name in ensemble.names}
        facts: dict[str, object] = {
            **_describe("classifier_or_model", classifier_or_model),
            **({} if transfer_from is None else _describe("transfer_from", transfer_from)),
            "x": fingerprint(inputs),
            "y": fingerprint(labels),
            "norm": norm,
            "eps": float(eps),
            "autoattack_version": autoattack_version,
            "pgd_max_iter": pgd_max_iter,
            "pgd_eps_step": step,
            "pgd_restarts": pgd_restarts,
            "batch_size": batch_size,
            "seed": seed,
        }
        ranks.check_same({**facts, "checkpoint": str(checkpoint)}, device)
        doubts = doubts_of_inputs(model, inputs, labels, nb_classes=nb_classes, device=device, batch_size=batch_size)
        if autoattack_version != "rand":
            doubts += doubts_of_randomness(model, sample)
        doubts += doubts_of_gradients(model, sample, labels[: len(sample)].to(device))
        folder = None
        if checkpoint is not None:
            reseed(device, seed)
            folder = Folder(Path(checkpoint), facts, model(sample[:16]).float().cpu())
            folder.check()
            ranks.gather(None)  # all have looked before one writes
            folder.open()
        evaluation = Evaluation(
            model,
            inputs,
            labels,
            costs=costs,
            device=device,
            batch_size=batch_size,
            seed=seed,
            ranks=ranks,
            folder=folder,
            verbose=verbose,
        )
        stack.enter_context(evaluation)
        outcomes: dict[str, Outcome] = {}
        among = torch.ones(len(inputs), dtype=torch.bool)
        for name, attack in attacks.items():
            outcomes[name] = evaluation.run(name, attack, outcomes["clean"].robust if outcomes else among)
        verdicts, adversarial = {}, inputs.clone()
        if ensemble is None:
            adversarial[outcomes["pgd"].fooled] = outcomes["pgd"].adversarial
        else:
            with heard() as warned:
                ensemble.check_dynamic(sample)
            doubts += warned
            _log(ranks, f"using {autoattack_version} version including {', '.join(ensemble.names)}.")
            left = outcomes["clean"].robust
            _log(ranks, f"initial accuracy: {left.float().mean():.2%}")
            for name in ensemble.names:
                outcome = outcomes[name] = evaluation.run(name, ensemble.attack(name), left)
                left = outcome.robust
                adversarial[outcome.fooled] = outcome.adversarial
                verdicts[name] = left.numpy()
                _log(
                    ranks,
                    f"robust accuracy after {name.upper()}: {left.float().mean():.2%} "
                    f"(total time {sum(outcomes[done].seconds for done in verdicts):.1f} s)",
                )
            with heard() as warned:
                ensemble.check_square(
                    {"clean": float(outcomes["clean"].robust.float().mean())}
                    | {name: float(robust.mean()) for name, robust in verdicts.items()}
                )
            doubts += [*(message for outcome in outcomes.values() for message in outcome.warnings), *warned]
            size = torch.linalg.vector_norm((adversarial - inputs).flatten(1), ord=ORDERS[norm], dim=1).max()
            _log(
                ranks,
                f"max {norm} perturbation: {size:.5f}, nan in tensor: {int(adversarial.isnan().sum())}, "
                f"max: {adversarial.max():.5f}, min: {adversarial.min():.5f}",
            )
            _log(ranks, f"robust accuracy: {left.float().mean():.2%}")
    doubts = list(dict.fromkeys(doubts))
    for message in doubts:
        _log(ranks, message, level=logging.WARNING)
    return RobustnessReport(
        norm=norm,
        eps=float(eps),
        nb_examples=len(inputs),
        clean=outcomes["clean"].robust.numpy(),
        pgd=outcomes["pgd"].robust.numpy(),
        pgd_max_iter=pgd_max_iter,
        pgd_restarts=pgd_restarts,
        transfer=outcomes["transfer"].robust.numpy() if "transfer" in outcomes else None,
        autoattack=None if ensemble is None else left.numpy(),
        autoattack_version=autoattack_version,
        attacks=verdicts,
        adversarial=adversarial.numpy(),
        warnings=tuple(doubts),
        seconds=sum(outcome.seconds for outcome in outcomes.values()),
        seed=seed,
    )


def _norm_name(norm: object) -> str:
    for name, (spellings, _) in NORMS.items():
        if norm in spellings:
            return name
    raise ValueError(f"`norm` must be 'Linf', 'L2' or 'L1' (or np.inf, 2, 1), got {norm!r}.")


def _as_model(classifier_or_model: object, argument: str) -> tuple[nn.Module, torch.device]:
    if isinstance(classifier_or_model, PyTorchClassifier):
        classifier = classifier_or_model
        clip = classifier.clip_values
        if clip is None or not (np.allclose(clip[0], 0) and np.allclose(clip[1], 1)):
            raise ValueError(
                f"`{argument}`: AutoAttack perturbs within [0, 1], so the classifier's clip_values must be "
                f"(0, 1), got {classifier.clip_values}."
            )
        network = Network(classifier)
        if not network.is_differentiable:
            raise ValueError(
                f"`{argument}`: its preprocessing is not PyTorch's, no gradient passes through it, and "
                "AutoAttack's result would be false."
            )
        return _Logits(network), network.device
    if isinstance(classifier_or_model, nn.Module):
        tensor = next(classifier_or_model.parameters(), None)
        return classifier_or_model, torch.device("cpu") if tensor is None else tensor.device
    raise TypeError(
        f"`{argument}` must be an ART PyTorchClassifier or a torch.nn.Module, "
        f"got {type(classifier_or_model).__module__}.{type(classifier_or_model).__qualname__}."
    )


def _check_size(inputs: torch.Tensor, argument: str, classifier_or_model: object) -> None:
    """Refuse images that are not of the size a classifier was declared for; convolutions would take them."""
    shape = tuple(inputs.shape[1:])
    if isinstance(classifier_or_model, PyTorchClassifier) and shape != tuple(classifier_or_model.input_shape):
        raise ValueError(f"`x` has images of shape {shape}, `{argument}` takes {classifier_or_model.input_shape}.")


def _describe(argument: str, classifier_or_model: PyTorchClassifier | nn.Module) -> dict[str, object]:
    """Say what a network is, so that an evaluation of another one is told apart."""
    facts: dict[str, object] = {}
    model: nn.Module = classifier_or_model
    if isinstance(classifier_or_model, PyTorchClassifier):
        model, facts = classifier_or_model.model, describe_inputs(classifier_or_model)
    facts["weights"] = fingerprint(*weights(model).values())
    facts["architecture"] = hashlib.sha256(text_of(model).encode()).hexdigest()[:16]
    return {f"{argument}, {name}": fact for name, fact in facts.items()}


def _pgd(
    model: nn.Module,
    device: torch.device,
    *,
    norm: str,
    eps: float,
    step: float,
    nb_steps: int,
    nb_restarts: int = 1,
) -> Attack:
    """Give projected gradient ascent on the cross-entropy, from random starts (Madry et al., arXiv 1706.06083)."""
    bounds = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    ball = NORMS[norm][1](torch.tensor(eps, device=device), bounds)
    ascent = Ascent(ball=ball, step=torch.tensor(step, device=device), nb_steps=nb_steps, random_start=True)

    def climb(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return ascent(lambda z: nn.functional.cross_entropy(model(z), y, reduction="sum"), x, start)

    def attack(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        back, x, y = x.device, x.to(device), y.to(device)
        x_adv, left = x.clone(), torch.arange(len(x), device=device)
        for _ in range(nb_restarts):
            if len(left):
                x_adv[left] = in_chunks(climb, x[left], y[left], ascent.start(x[left], Part(len(left))))
                left = left[model(x_adv[left]).argmax(dim=1) == y[left]]
        return x_adv.to(back)

    return attack


def _log(ranks: Ranks, message: str, *, level: int = logging.INFO) -> None:
    """Log once, whatever the number of processes; AutoAttack's figures in its own words."""
    if ranks.rank == 0:
        logger.log(level, "%s", message)
