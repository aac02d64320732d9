import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Code, Normed, make_attack, make_classifier
from PIL import Image
from safetensors.torch import load_file, save_file

from art_clat import AdversarialTrainerCLATPyTorch, create_backbone
from art_clat.models.by_name import imagenet_preprocessing, load_model
from art_clat.models.datasets import load_data
from art_clat.models.weight_files import load_state_dict, read_state_dict

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
TIMM = {"dataset": "cifar10", "norm": "Linf", "nb_classes": 5, "input_size": (3, 32, 32)}


class TestWeights:
    @pytest.fixture
    def model(self):
        return Normed()

    @pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "net"])
    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
    def test_are_found_under_any_usual_name(self, model, tmp_path, prefix, wrapped):
        torch.manual_seed(1)
        tensors = {f"{prefix}{name}": torch.randn(t.shape).to(t.dtype) for name, t in model.state_dict().items()}
        torch.save({wrapped: tensors, "epoch": 3} if wrapped else tensors, tmp_path / "x.pt")
        load_state_dict(model, tmp_path / "x.pt")
        assert all(torch.equal(t, tensors[f"{prefix}{name}"]) for name, t in model.state_dict().items())

    def test_a_network_without_normalisation_is_put_behind_one(self, tmp_path):
        model = create_backbone("resnet10t", num_classes=5, mean=(0.1, 0.2, 0.3))
        save_file({name: t + 1 for name, t in model.model.state_dict().items()}, tmp_path / "x.safetensors")
        expected = {name: t.clone() + name.startswith("model.") for name, t in model.state_dict().items()}
        load_state_dict(model, tmp_path / "x.safetensors")
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())

    def test_in_robustbenchs_shape(self, tmp_path):
        model = create_backbone("resnet10t", num_classes=5, mean=(0.1, 0.2, 0.3))
        tensors = {name: t.view(1, 3, 1, 1) if name.startswith("normalize") else t + 1
                   for name, t in model.state_dict().items()}  # fmt: skip
        torch.save(tensors, tmp_path / "x.pt")
        load_state_dict(model, tmp_path / "x.pt")
        assert all(torch.equal(t, tensors[name].view(t.shape)) for name, t in model.state_dict().items())

    def test_averages_are_taken_where_a_trainers_file_has_both(self, data, tmp_path):
        classifier = make_classifier(Normed())
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=1, ema_decay=0.9, seed=0)
        trainer.fit(*data, batch_size=16, nb_epochs=1, verbose=False, checkpoint=tmp_path)
        assert any(name.startswith("average:") for name in load_file(tmp_path / "last.safetensors"))
        model = Normed()
        load_state_dict(model, tmp_path / "last.safetensors")  # the trainer ends on the average
        ended = classifier.model.state_dict()
        assert all(torch.equal(t, ended[name]) for name, t in model.state_dict().items())

    def test_of_another_network_are_named_and_change_nothing(self, tmp_path, monkeypatch):
        models = ["resnet10t", "resnet18", "resnet34", "vgg11", "densenet121"]  # not all thousand
        monkeypatch.setattr("timm.list_models", lambda: models)
        model = create_backbone("resnet10t", num_classes=5)
        there = create_backbone("resnet18", num_classes=5).state_dict()
        torch.save({f"module.{name}": tensor for name, tensor in there.items()}, tmp_path / "x")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"of another network: .*there, .* here.*It looks like timm's resnet18\."):
            load_state_dict(model, tmp_path / "x")
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_of_another_network_by_what_is_missing_or_more(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("timm.list_models", lambda: ["resnet10t"])
        there = model.state_dict()
        more = {**there, "conv9.weight": torch.zeros(3)}
        less = {name: tensor for name, tensor in there.items() if name != "conv2.weight"}
        for tensors, match in ((more, "unknown here: conv9.weight"), (less, "missing there: conv2.weight")):
            torch.save(tensors, tmp_path / "x")
            before = {name: t.clone() for name, t in model.state_dict().items()}
            with pytest.raises(ValueError, match=f"of another network: {match}"):
                load_state_dict(model, tmp_path / "x")
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_of_other_classes(self, tmp_path, monkeypatch):
        monkeypatch.setattr("timm.list_models", lambda: pytest.fail("looked for another network"))
        there = create_backbone("resnet10t", num_classes=4).state_dict()
        torch.save(there, tmp_path / "x")
        with pytest.raises(ValueError, match=r"fc.weight has shape \(4, 512\) there, .* Another number of classes\?"):
            load_state_dict(create_backbone("resnet10t", num_classes=5), tmp_path / "x")

    def test_of_another_width_are_not_taken_for_other_classes(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("timm.list_models", lambda: ["resnet10t"])
        torch.save({**model.state_dict(), "conv1.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "x")
        with pytest.raises(ValueError, match=r"conv1.weight has shape \(6, 3, 3, 3\) there, \(6, 2, 3, 3\) here\.$"):
            load_state_dict(model, tmp_path / "x")

    def test_with_code_are_not_executed(self, model, tmp_path):
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
    def test_that_are_cut_off(self, model, tmp_path, name, share):
        (torch.save if name == "x.pt" else save_file)(model.state_dict(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"cut off or damaged|is damaged"):
            load_state_dict(model, tmp_path / name)

    def test_that_are_none(self, model, tmp_path):
        torch.save([1, 2], tmp_path / "x.pt")
        with pytest.raises(ValueError, match="holds no network's tensors"):
            read_state_dict(tmp_path / "x.pt")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_state_dict(tmp_path / "y.pt")


class TestModels:
    def test_timm(self, tmp_path):
        torch.save(create_backbone("resnet10t", num_classes=5).state_dict(), tmp_path / "x.pt")
        model = load_model("resnet10t", checkpoint=tmp_path / "x.pt", **TIMM)
        assert not model.training and model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
        with pytest.raises(ValueError, match="resnet10t is a timm network without weights"):
            load_model("resnet10t", **TIMM)

    def test_function_of_a_module_or_a_file(self, tmp_path):
        assert isinstance(load_model("conftest:Normed", **TIMM), Normed)
        (tmp_path / "mine.py").write_text("from conftest import Normed\ndef make():\n    return Normed().train()\n")
        model = load_model(f"{tmp_path}/mine.py:make", **TIMM)
        assert isinstance(model, Normed) and not model.training

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("conftest:Nothing", "has no function Nothing"),
            ("nowhere.at_all:make", "nowhere.at_all of nowhere.at_all:make cannot be imported"),
            ("nowhere.py:make", "cannot be imported"),
            ("conftest:make_data", "must give a torch.nn.Module"),
            ("resnet-18", "or module:function, got 'resnet-18'; similar names: .*resnet18"),
            ("Carmon2019Unlabelled", "similar names: Carmon2019Unlabeled"),
        ],
    )
    def test_that_are_none(self, name, match):
        with pytest.raises(ValueError, match=match):
            load_model(name, **TIMM)


class TestData:
    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("Salman2020Do_R18", "Res256Crop224"),
            ("Liu2023Comprehensive_Swin-L", "BicubicRes256Crop224"),
            ("resnet18", "Res256Crop224"),
            ("conftest:Normed", "Res256Crop224"),
            ("of_no_such_model", "Res256Crop224"),
        ],
    )
    def test_imagenet_as_robustbench_resizes_it_for_its_models(self, model, expected):
        assert imagenet_preprocessing(model, "Linf") == expected

    def test_imagenet_as_robustbench_derives_it_from_timm(self):
        made = imagenet_preprocessing("Debenedetti2022Light_XCiT-S12", "Linf")
        image = Image.fromarray(np.zeros((300, 400, 3), np.uint8))
        assert made(image).shape == (3, 224, 224) and "size=224, interpolation=bicubic" in repr(made)

    def test_digits_are_those_the_quickstart_holds_out(self):
        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        try:
            import quickstart
        finally:
            sys.path.pop(0)
        _, _, (x, y) = quickstart.load_data()
        data = load_data("digits", nb_examples=50)
        np.testing.assert_array_equal(data.x, x[:50])
        np.testing.assert_array_equal(data.y, y[:50])

    @pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
    def test_cifar10_needs_its_test_set_only(self, tmp_path):
        subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path), "test_batch"], check=True)
        data = load_data("cifar10", data_dir=tmp_path, nb_examples=7)
        assert data.x.shape == (7, 3, 32, 32) and data.y.tolist() == [3, 8, 8, 0, 6, 6, 1] and data.nb_classes == 10
        with pytest.raises(ValueError, match="`nb_examples` is 10001, cifar10 has 10000"):
            load_data("cifar10", data_dir=tmp_path, nb_examples=10_001)

    def test_cifar_that_is_not_there_and_no_network(self, tmp_path, monkeypatch):
        def no_network(*args, **kwargs):
            raise OSError("Name or service not known")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
        with pytest.raises(FileNotFoundError) as refused:
            load_data("cifar10", data_dir=tmp_path)
        for part in (str(tmp_path / "cifar-10-batches-py"), "test_batch", "Name or service", "cifar-10-python.tar.gz"):
            assert part in str(refused.value)

    def test_image_folder(self, tmp_path):
        for label, name in enumerate(("cat", "dog", "fox")):
            (tmp_path / name).mkdir()
            for number in range(4):
                Image.new("RGB", (6, 5), (51 * label, 0, 255)).save(tmp_path / name / f"{number}.png")
        data = load_data(str(tmp_path), nb_examples=3)
        assert (data.x.shape == (3, 3, 5, 6) and data.y.tolist() == [0, 1, 2]) or data.y.tolist() == [0, 2, 2]
        np.testing.assert_allclose(data.x[:, 0, 0, 0], 0.2 * data.y)
        assert len(load_data(str(tmp_path)).x) == 12 and data.nb_classes == 3
        Image.new("RGB", (7, 5)).save(tmp_path / "fox" / "9.png")
        with pytest.raises(ValueError, match="9.png has 5×7 pixels, .*0.png has 5×6"):
            load_data(str(tmp_path))
        assert load_data(str(tmp_path), preprocessing="Res224").x.shape == (13, 3, 224, 224)
        with pytest.raises(ValueError, match="has 3 folders: labels are the folders' numbers"):
            load_data(str(tmp_path), nb_classes=4, preprocessing="Res224")
        (tmp_path / "fox" / "9.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"9\.png cannot be read as an image"):
            load_data(str(tmp_path))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no images"):
            load_data(str(tmp_path))
        (tmp_path / "cat").mkdir()
        with pytest.raises(FileNotFoundError, match="has no images"):
            load_data(str(tmp_path))

    def test_npz(self, tmp_path):
        x, y = np.full((4, 3, 5, 5), 51, np.uint8), np.arange(4)
        np.savez(tmp_path / "x.npz", x=x, y=y)
        data = load_data(str(tmp_path / "x.npz"), nb_classes=10)
        np.testing.assert_allclose(data.x, 0.2)
        assert data.y.tolist() == [0, 1, 2, 3] and data.nb_classes == 10

    def test_one_array_is_no_npz(self, tmp_path):
        with open(tmp_path / "x.npz", "wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(ValueError, match=r"one array without a name.*np\.savez"):
            load_data(str(tmp_path / "x.npz"))

    @pytest.mark.parametrize(
        ("arrays", "match"),
        [
            ({"images": np.zeros(3)}, "`x` and `y` are needed, it has images"),
            ({"x": np.zeros((4, 5, 5, 3)), "y": np.arange(4)}, "with the channels last"),
            ({"x": np.zeros((4, 75)), "y": np.arange(4)}, "must hold images"),
            ({"x": np.zeros((4, 3, 5, 5)), "y": np.zeros(4)}, "got .* and float64"),
            ({"x": np.array([Code()], dtype=object), "y": np.arange(1)}, "cannot be read: Object arrays"),
        ],
    )
    def test_npz_of_something_else(self, tmp_path, arrays, match):
        Code.path = str(tmp_path / "executed")
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=match):
            load_data(str(tmp_path / "x.npz"))
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("name", ["cifar11", "there/is/no.npz"])
    def test_that_are_not_there(self, name):
        with pytest.raises(FileNotFoundError, match="is none|there is no file"):
            load_data(name)
