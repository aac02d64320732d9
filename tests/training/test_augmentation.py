import numpy as np
import pytest
import torch
from conftest import Chain, make_attack, make_classifier, make_data, observe
from torchvision.transforms.v2 import functional as F

from art_clat import AdversarialTrainerCLATPyTorch, Batch, CropAndFlip
from art_clat.training.augmentation import augment
from art_clat.utils.processes import Part
from art_clat.utils.randomness import drawn_by_image


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_flips_are_torchvisions(device, padding, flip):
    images = torch.rand(64, 3, 5, 7, device=device)
    moves = CropAndFlip(padding, flip).moves(torch.arange(64, device=device), 5, 7, 0, 1)
    moved = moves.apply(images)
    for image, one, rows, columns in zip(images, moved, moves.rows, moves.columns, strict=True):
        expected = F.crop(F.pad(image, [padding] * 4), int(rows[0]), int(columns.min()), 5, 7)
        assert torch.equal(one, F.horizontal_flip(expected) if columns[0] > columns[-1] else expected)
    mirrored = (moves.columns[:, 0] > moves.columns[:, -1]).sum()
    assert 16 < mirrored < 48 if flip else mirrored == 0
    assert len(set(moves.rows[:, 0].tolist())) == 2 * padding + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_what_is_moved_comes_back_where_it_was(device, dtype):
    before = torch.randint(-100, 100, (32, 2, 6, 4), device=device).to(dtype)
    moves = CropAndFlip(2).moves(torch.arange(32, device=device), 6, 4, 3)
    assert torch.equal(moves.undo(moves.apply(before), before), before)
    found = moves.undo(torch.full_like(before, 101), before)
    here = moves.apply(torch.ones_like(before)).flatten(1).sum(1)  # pixels that the crop has kept
    assert torch.equal((found == 101).flatten(1).sum(1).to(dtype), here)
    assert torch.equal(found[found != 101], before[found != 101])


@pytest.mark.parametrize("augmentation", [CropAndFlip(2), lambda image: image * torch.rand(()) * np.random.rand()])
def test_an_image_moves_by_seed_epoch_and_index(augmentation):
    x, index = torch.rand(10, 1, 6, 6), torch.arange(100, 110)
    whole = augment(augmentation, Batch(x, index, Part(10), index), 5, 2, 0).x
    order = torch.tensor([7, 0, 3])
    some = augment(augmentation, Batch(x[order], index[order], Part(9, slice(3, 6)), index[order]), 5, 2, 8).x
    assert torch.equal(some, whole[order])
    for counters in ((6, 2, 0), (5, 3, 0)):
        assert not torch.equal(augment(augmentation, Batch(x, index, Part(10), index), *counters).x, whole)


def test_numbers_of_images_are_uniform_and_independent():
    """Each statistic is a sum of many; five standard deviations are rare enough over the hundreds of them."""
    index, n = torch.arange(20_000), 20_000
    draws = [drawn_by_image(index, 3, seed, epoch) for seed in (0, 1, 12345) for epoch in (0, 1, 29)]
    for numbers in draws:
        assert numbers.min() >= 0 and numbers.max() < 2**31
        for modulus in (2, 9, 17):
            counts = torch.bincount((numbers % modulus).flatten(), minlength=modulus).double()
            mean = 3 * n / modulus
            assert ((counts - mean).abs() < 5 * mean**0.5).all()
    streams = torch.stack([stream for numbers in draws for stream in numbers.unbind(1)]).double()
    shifted = torch.cat([streams, streams.roll(1, 1)[:6], streams.roll(2, 1)[:6]])
    correlations = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert correlations.abs().max() < 5 / n**0.5
    equal = [(a % 9 == b % 9).double().mean() for a in streams[:6] for b in streams[6:12]]
    assert all(abs(share - 1 / 9) < 5 * (8 / 81 / n) ** 0.5 for share in equal)


def test_trains_as_a_function_of_one_image_would(chain):
    """The batch goes through at once: the images that reach the attack are those moved one by one."""
    x, y = make_data(40)
    classifier = make_classifier(chain)
    crop = CropAndFlip(2)
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), augmentation=crop, seed=9)
    seen = []
    observe(trainer, perturb=lambda loop, perturb, batch, number: seen.append(batch) or perturb(batch, number))
    trainer.fit(x, y, batch_size=16, nb_epochs=2, verbose=False)
    for epoch, batches in enumerate((seen[:3], seen[3:])):
        assert sorted(int(i) for batch in batches for i in batch.index) == list(range(40))
        for batch in batches:
            for place, i in enumerate(batch.index):
                one = crop.moves(i[None], 6, 6, 9, epoch).apply(torch.from_numpy(x[int(i)])[None])[0]
                assert torch.equal(batch.x[place], one) and batch.y[place] == y[i]


def test_one_image_is_moved_by_torchs_generator():
    image, crop = torch.rand(3, 8, 8), CropAndFlip(4)
    torch.manual_seed(0)
    found = [crop(image) for _ in range(20)]
    torch.manual_seed(0)
    assert all(torch.equal(crop(image), one) for one in found)
    assert len({one.numpy().tobytes() for one in found}) > 10


@pytest.mark.parametrize("padding", [-1, 1.5, True])
def test_a_padding_that_is_none_is_refused(padding):
    with pytest.raises(ValueError, match="`padding` must be a whole number of at least 0"):
        CropAndFlip(padding)


def test_the_model_is_a_guest(data):
    model = Chain()
    classifier = make_classifier(model)
    state = torch.get_rng_state()
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), augmentation=CropAndFlip(1), seed=0)
    trainer.fit(*data, nb_epochs=1, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
