"""Pictures of structured layers: every stored number is one entry of a picture."""

from torch import nn

from basis.experiments.structured_figures import stored_tensors
from basis.layers.structured import Structure
from tests.layers.structured.kinds import TEXTS


def test_every_stored_number_is_an_entry():
    for text in TEXTS:
        (layer,) = Structure.parse(text).make([nn.Conv2d(16, 16, 3, bias=False)], fitted=False)
        assert sum(int((~tensor.isnan()).sum()) for tensor in stored_tensors(layer)) == layer.stored
