"""Every network twice: as torch.fx traces it, and as torch.export does."""

import pytest
from torch import nn


class SizeChecked(nn.Module):
    """A network that looks at the size of its images, as many do: torch.fx cannot trace that, so torch.export must."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        if images.shape[1] != 3:
            raise ValueError("three channels, please")
        return self.network(images)


@pytest.fixture(params=["fx", "export"])
def traced_by(request):
    """Gives a network in a shape that this tracer takes."""
    return {"fx": lambda model: model, "export": lambda model: SizeChecked(model).train(model.training)}[request.param]
