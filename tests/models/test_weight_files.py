"""Somebody's weights in a network."""

import pickle
import shutil

import pytest
import torch
from conftest import Code, Normed, make_attack, make_classifier, make_data
from safetensors.torch import load_file, save_file

from art_clat import AdversarialTrainerCLATPyTorch, create_backbone
from art_clat.models.weight_files import load_state_dict, read_state_dict


@pytest.fixture
def model():
    return Normed()


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_tensors_are_found_under_any_usual_name(model, tmp_path, prefix, wrapped):
    torch.manual_seed(1)
    tensors = {f"{prefix}{name}": torch.randn(t.shape).to(t.dtype) for name, t in model.state_dict().items()}
    torch.save({wrapped: tensors, "epoch": 3} if wrapped else tensors, tmp_path / "x.pt")
    load_state_dict(model, tmp_path / "x.pt")
    assert all(torch.equal(t, tensors[f"{prefix}{name}"]) for name, t in model.state_dict().items())


def test_weights_without_normalisation_are_put_behind_the_networks_own(tmp_path):
    model = create_backbone("resnet10t", num_classes=5, mean=(0.1, 0.2, 0.3))
    save_file({name: t + 1 for name, t in model.model.state_dict().items()}, tmp_path / "x.safetensors")
    expected = {name: t.clone() + name.startswith("model.") for name, t in model.state_dict().items()}
    load_state_dict(model, tmp_path / "x.safetensors")
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_constants_in_robustbenchs_shape(tmp_path):
    model = create_backbone("resnet10t", num_classes=5, mean=(0.1, 0.2, 0.3))
    tensors = {name: t.view(1, 3, 1, 1) if name.startswith("normalize") else t + 1
               for name, t in model.state_dict().items()}  # fmt: skip
    torch.save(tensors, tmp_path / "x.pt")
    load_state_dict(model, tmp_path / "x.pt")
    assert all(torch.equal(t, tensors[name].view(t.shape)) for name, t in model.state_dict().items())


def test_averages_are_taken_if_a_trainers_file_has_both(data, tmp_path):
    classifier = make_classifier(Normed())
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, ema_decay=0.9, seed=0)
    trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False, checkpoint=tmp_path)
    assert any(name.startswith("average:") for name in load_file(tmp_path / "last.safetensors"))
    model = Normed()
    load_state_dict(model, tmp_path / "last.safetensors")  # the trainer ends on the average
    ended = classifier.model.state_dict()
    assert all(torch.equal(t, ended[name]) for name, t in model.state_dict().items())


class TestFilesThatHoldAnAverage:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        """The folder of a run with averaged weights, and the weights that the network ended with."""
        folder, data = tmp_path_factory.mktemp("run"), make_data()
        classifier = make_classifier(Normed())
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, ema_decay=0.9, seed=0)
        trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False, checkpoint=folder, validation_data=data)
        return folder, {name: t.clone() for name, t in classifier.model.state_dict().items()}

    @staticmethod
    def loaded(path, weights=None):
        model = Normed()
        load_state_dict(model, path, weights)
        return model.state_dict()

    @staticmethod
    def same(tensors, others):
        return tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())

    def test_the_best_epochs_weights_are_the_average(self, run):
        folder, _ = run
        best = load_file(folder / "best.safetensors")
        assert self.same(self.loaded(folder / "best.safetensors", "average"), best)
        with pytest.raises(ValueError, match=r"best.safetensors has the average .* only.* in its last\.safetensors"):
            self.loaded(folder / "best.safetensors", "raw")

    def test_a_runs_folder(self, run, tmp_path):
        folder, ended = run
        assert self.same(self.loaded(folder), load_file(folder / "best.safetensors"))
        shutil.copy(folder / "last.safetensors", tmp_path)
        assert self.same(self.loaded(tmp_path), ended)
        with pytest.raises(FileNotFoundError, match=r"neither best\.safetensors nor last\.safetensors"):
            self.loaded(tmp_path.parent)

    def test_of_a_network_in_data_parallel(self, run, tmp_path):
        folder, ended = run
        within = {}
        for name, tensor in load_file(folder / "last.safetensors").items():
            prefix = "average:" if name.startswith("average:") else ""
            if not name.startswith("optimizer:"):
                within[f"{prefix}module.{name.removeprefix(prefix)}"] = tensor
        save_file(within, tmp_path / "x.safetensors")
        assert self.same(self.loaded(tmp_path / "x.safetensors"), ended)
        assert not self.same(self.loaded(tmp_path / "x.safetensors", "raw"), ended)

    @pytest.mark.parametrize(
        ("average", "raw", "prefix"),
        [
            ("state_dict_ema", "state_dict", "module."),  # timm, with DataParallel
            ("model_ema", "model", "module."),  # torchvision's references, with torch's AveragedModel
            ("ema_state_dict", "state_dict", ""),
            ("model_state_dict", "unaveraged_model_state_dict", ""),
        ],
    )
    def test_of_other_programs(self, tmp_path, average, raw, prefix):
        one, other = Normed().state_dict(), Normed().state_dict()
        averaged = {f"{prefix}{name}": t for name, t in one.items()}
        if average == "model_ema":
            averaged["n_averaged"] = torch.tensor(7)
        torch.save({raw: other, average: averaged, "epoch": 3}, tmp_path / "x.pt")
        for weights, expected in ((None, one), ("average", one), ("raw", other)):
            assert self.same(self.loaded(tmp_path / "x.pt", weights), expected)

    def test_alone(self, tmp_path):
        torch.save({"state_dict_ema": Normed().state_dict()}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x\.pt has the average of the weights only\.$"):
            self.loaded(tmp_path / "x.pt", "raw")


def test_the_last_good_weights_of_single_step_training_are_not_the_networks(data, tmp_path):
    classifier = make_classifier(Normed())
    attack = make_attack(classifier)
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, first_stage="fgsm_rs", seed=0)
    trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False, checkpoint=tmp_path)
    assert any(name.startswith("good:") for name in load_file(tmp_path / "last.safetensors"))
    model = Normed()
    load_state_dict(model, tmp_path / "last.safetensors")
    ended = classifier.model.state_dict()
    assert all(torch.equal(t, ended[name]) for name, t in model.state_dict().items())


def test_another_networks_weights_are_named_and_change_nothing(tmp_path):
    model = create_backbone("resnet10t", num_classes=5)
    there = create_backbone("resnet18", num_classes=5).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in there.items()}, tmp_path / "x")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    said = r"of another network: .*there, .* here; missing there: .* more; unknown here: .* more\.$"
    with pytest.raises(ValueError, match=said):
        load_state_dict(model, tmp_path / "x")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_missing_and_surplus_tensors_are_named(model, tmp_path):
    there = model.state_dict()
    more = {**there, "conv9.weight": torch.zeros(3)}
    less = {name: tensor for name, tensor in there.items() if name != "conv2.weight"}
    for tensors, match in ((more, "unknown here: conv9.weight"), (less, "missing there: conv2.weight")):
        torch.save(tensors, tmp_path / "x")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"of another network: {match}\.$"):
            load_state_dict(model, tmp_path / "x")
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_another_number_of_classes(tmp_path):
    there = create_backbone("resnet10t", num_classes=4).state_dict()
    torch.save(there, tmp_path / "x")
    with pytest.raises(ValueError, match=r"fc.weight has shape \(4, 512\) there, .* Another number of classes\?"):
        load_state_dict(create_backbone("resnet10t", num_classes=5), tmp_path / "x")


def test_another_width_is_not_taken_for_other_classes(model, tmp_path):
    torch.save({**model.state_dict(), "conv1.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"conv1.weight has shape \(6, 3, 3, 3\) there, \(6, 2, 3, 3\) here\.$"):
        load_state_dict(model, tmp_path / "x")


def test_code_in_a_file_is_not_executed(model, tmp_path):
    code = Code()
    code.path = str(tmp_path / "executed")
    torch.save({"state_dict": model.state_dict(), "more": code}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(code))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or holds more than tensors"):
            load_state_dict(model, tmp_path / name)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "old.pt").read_bytes())  # which is what would have happened
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_files_that_are_cut_off(model, tmp_path, name, share):
    (torch.save if name == "x.pt" else save_file)(model.state_dict(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut off or damaged|is damaged"):
        load_state_dict(model, tmp_path / name)


def test_files_without_a_networks_tensors(model, tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no network's tensors"):
        read_state_dict(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state_dict(tmp_path / "y.pt")
