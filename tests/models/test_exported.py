"""Exported programs as models: trusted only when asked, any number of images, and the logits of the network behind them."""

import pytest
import torch
from torch import nn

from marginclip import BoundedNetwork
from marginclip.errors import UserError
from marginclip.models import exported_model, from_program


class Fixed(nn.Module):
    """Gives logits of the number of images that it was exported with, and of no other."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).view(x.shape[0], 4)


def save(model, path, images, *, free=True):
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture
def file(net, images, tmp_path):
    return save(net, tmp_path / "model.pt2", images[:2])


def test_the_file_gives_the_logits_of_its_network_and_can_be_bounded(net, images, file):
    model = exported_model(4, path=file, trust=True, mean=[0.5] * 3, std=[0.25] * 3).eval()
    assert model.loaded_from == file
    wanted = net((images - 0.5) / 0.25)
    torch.testing.assert_close(model(images), wanted)
    bounded = BoundedNetwork(model, images[0])
    assert [len(bound.upper) for _, bound in bounded.each()] == [5, 6]
    assert torch.equal(bounded(images), model(images))
    bounded.set_constant(0.01)
    assert not torch.equal(bounded(images), model(images))


def test_a_file_is_loaded_only_by_those_who_trust_it(file, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("the file was loaded"))
    with pytest.raises(UserError, match=r"torch unpickles it, which can run code from the file; model.trust=true allows that"):
        exported_model(4, path=file)


def test_what_is_no_program_is_one_sentence(tmp_path):
    (tmp_path / "odd.pt2").write_bytes(b"PK not a program")
    with pytest.raises(UserError, match=r"odd.pt2' is no exported program of torch"):
        exported_model(4, path=str(tmp_path / "odd.pt2"), trust=True)
    for path in (None, str(tmp_path / "absent.pt2")):
        with pytest.raises(UserError, match=r"model.path must be an exported program, a .pt2 file"):
            exported_model(4, path=path, trust=True)


def test_a_program_of_a_fixed_number_of_images_is_taken_where_that_does_not_matter(net, images):
    assert torch.equal(from_program(torch.export.export(net, (images[:1],)))(images), net(images))
    with pytest.raises(UserError, match=r"exported for a fixed number of images: export it with dynamic_shapes="):
        from_program(torch.export.export(Fixed(net), (images[:1],)))
