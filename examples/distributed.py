"""
CLAT on several processors, resumable: handwritten digits, on one process or as many as ``torchrun`` starts.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py

Both train the same network. The processes share each batch, and what is drawn at random does not depend on how many
there are. Sums are rounded differently, as with another number of threads, which the signs in PGD amplify as training
goes on. The run saves itself under ``runs/distributed/``. Killed, the same command continues it, also on another number
of processes. On GPUs every process needs its own: see the line with ``set_device``.
"""

import argparse
import logging
import os
from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, create_backbone
from art_clat.models.datasets import load_digits

EPS = 0.1  # ℓ∞, for pixels in [0, 1]


def main():
    """Train, or continue, and let the first process print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/distributed"), help="folder the run saves itself in")
    parser.add_argument("--epochs", type=int, default=10, help="epochs; the first half is PGD-AT")
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    is_first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("art").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    x, y = load_digits()
    torch.manual_seed(args.seed)
    model = create_backbone("resnet10t", num_classes=10, input_size=(1, 8, 8), channels=(16, 32, 64, 128), stem_width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=optimizer, clip_values=(0.0, 1.0)
    )
    attack = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=EPS / 4, max_iter=7, num_random_init=1, verbose=False
    )
    trainer = AdversarialTrainerCLATPyTorch(
        classifier, attack, warmup=args.epochs // 2, reselect_every=max(1, args.epochs // 4), seed=args.seed
    )
    trainer.fit(
        x[:1200],
        y[:1200],
        validation_data=(x[1200:1400], y[1200:1400]),
        batch_size=args.batch_size,
        nb_epochs=args.epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs),
        checkpoint=args.output,
    )
    if is_first:  # every process has the same weights and the same record
        trainer.history.to_json(args.output / "history.json")
        for record in trainer.history.epochs:
            print(
                f"epoch {record.epoch:2d}  {record.stage:<20}  loss {record.loss:.5f}  "
                f"clean {record.clean_accuracy:.1%}  robust {record.robust_accuracy:.1%}"
            )


if __name__ == "__main__":
    main()
