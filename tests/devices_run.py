"""What the processes of test_devices.py run, all on one device; the first writes what came out as JSON."""

import json
import sys

import torch
from conftest import Normed, make_attack, make_classifier, make_data

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions


def train(device):
    torch.manual_seed(0)
    classifier = make_classifier(Normed(), device_type="gpu" if device == "cuda" else "cpu")
    classifier.model.dropout.p = 0.0  # another one in every process
    attack = make_attack(classifier, num_random_init=1)
    layers = LayerOptions(freeze_norms=False)
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, reselect_every=1, layers=layers, seed=0)
    trainer.fit(*make_data(50), validation_data=make_data(50), batch_size=16, nb_epochs=3, verbose=False)
    return {
        "losses": [record.loss for record in trainer.history.epochs],
        "accuracies": [[record.clean_accuracy, record.robust_accuracy] for record in trainer.history.epochs],
        "chosen": [list(selection.chosen) for selection in trainer.history.selections],
        "weakness": [[layer.weakness for layer in selection.measured] for selection in trainer.history.selections],
        "state": {name: value.tolist() for name, value in classifier.model.state_dict().items()},
    }


def main():
    device, output = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # NCCL refuses two processes on one GPU
    result = train(device)
    rank = torch.distributed.get_rank()
    with open(f"{output}-{rank}.json", "w") as file:
        json.dump(result, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
