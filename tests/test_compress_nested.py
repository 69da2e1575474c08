"""torch's encoder over padded sentences, as it is made by default."""

import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Depth, Pretrained, Widths


class Sentences(nn.Module):
    """Tokens, of which 0 is padding; the mean over those that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        kept = (~padding)[..., None]
        return self.head((x * kept).sum(1) / kept.sum(1))


def test_an_encoder_over_padded_sentences_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Sentences().eval()
    tokens = torch.randint(1, 20, (4, 9))
    tokens[0, 5:] = tokens[1, 7:] = 0
    before = [m.activation_relu_or_gelu for m in model.encoder.layers]
    family = Pretrained(model, tokens, (Widths(multiple=1), Depth()))
    names = set(family.space.names)
    assert {"width:encoder.layers.0.linear1", "width:encoder.layers.0.self_attn"} <= names
    assert "depth:encoder.layers.1.linear1" in names
    assert [m.activation_relu_or_gelu for m in family.model.encoder.layers] == before
    with torch.no_grad():
        whole = family.build(family.original)(tokens)
        assert torch.allclose(whole, model(tokens), atol=1e-5)
        for change in (
            {"width:encoder.layers.0.linear1": 6},
            {"width:encoder.layers.0.self_attn": 2},
            {"depth:encoder.layers.1.linear1": 0},
        ):
            small = family.build({**family.original, **change}).eval()(tokens)
            assert small.shape == whole.shape
            assert torch.isfinite(small).all()
            assert not torch.allclose(small, whole, atol=1e-4)
    assert "Traceback" not in capfd.readouterr().err
