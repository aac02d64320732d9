"""CLAT on a CIFAR-10 subset: train, draw the heat map, evaluate, and let RobustBench's own benchmark check it."""

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torchvision.datasets import CIFAR10

from art_clat import AdversarialTrainerCLATPyTorch, Budget, create_backbone, evaluate_robustness

# isort: split
from robustbench.eval import benchmark  # after art_clat, which lets RobustBench use the installed pyautoattack

EPS, N_TRAIN, N_TEST, EPOCHS = 8 / 255, 1500, 50, 20
data = {train: CIFAR10("data", train=train, download=True) for train in (True, False)}
x, x_test = (data[train].data.transpose(0, 3, 1, 2).astype(np.float32) / 255 for train in (True, False))
y, y_test = (np.array(data[train].targets) for train in (True, False))

torch.manual_seed(0)
model = create_backbone("resnet10t", num_classes=10, input_size=(3, 32, 32), channels=(16, 32, 64, 128), stem_width=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
loss = torch.nn.CrossEntropyLoss()
classifier = PyTorchClassifier(model, loss, (3, 32, 32), 10, optimizer=optimizer, clip_values=(0.0, 1.0))

attack = ProjectedGradientDescent(classifier, eps=EPS, eps_step=2 / 255, max_iter=5, num_random_init=1, verbose=False)
budget = Budget(parameter_share=0.05)
trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=EPOCHS // 2, reselect_every=5, budget=budget, seed=0)
trainer.fit(x[:N_TRAIN], y[:N_TRAIN], batch_size=64, nb_epochs=EPOCHS, scheduler=scheduler)
trainer.history.plot_heat_map().figure.savefig("heat-map.png", bbox_inches="tight")

print(evaluate_robustness(classifier, x_test[:N_TEST], y_test[:N_TEST], norm="Linf", eps=EPS))
benchmark(model.eval(), n_examples=N_TEST, dataset="cifar10", threat_model="Linf", eps=EPS, device=classifier.device)
