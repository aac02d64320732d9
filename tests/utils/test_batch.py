import torch

from art_clat import Batch
from art_clat.utils.processes import Part


def test_a_whole_batch_has_one_part():
    batch = Batch.whole(torch.rand(5, 2), torch.arange(5))
    assert len(batch) == batch.part.total == 5
    assert torch.equal(torch.arange(5)[batch.part.mine], torch.arange(5))


def test_chunks_know_their_places_in_the_whole_batch():
    """This process holds 80 of 100 samples, from the tenth on."""
    batch = Batch(torch.rand(80, 3, 32, 32), torch.arange(80), Part(100, slice(10, 90)))
    chunks = batch.chunks()
    assert [len(chunk) for chunk in chunks] == [32, 32, 16]
    places = torch.cat([torch.arange(100)[chunk.part.mine] for chunk in chunks])
    assert torch.equal(places, torch.arange(10, 90)) and all(chunk.part.total == 100 for chunk in chunks)


def test_copies_make_chunks_smaller():
    batch = Batch.whole(torch.rand(40, 3, 32, 32), torch.arange(40))
    assert [len(chunk) for chunk in batch.chunks(copies=2)] == [16, 16, 8]
