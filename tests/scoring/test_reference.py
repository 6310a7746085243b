"""The definition of importance: it zeroes exactly a neuron's own weights and bias, and puts them back."""

import pytest
import torch

from nt_utils.models import DecoderView
from nt_utils.scoring.reference import importance_by_hand, zeroed
from tests.tiny import CONFIGS, hooks_left, neuron_entries, tiny_model

IDS = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_entries_written_down_by_hand_are_zeroed_and_put_back(name):
    """For every family, layout and kind: these entries and no others, whatever happens inside."""
    model = tiny_model(name)
    view, before = DecoderView(model), {key: value.clone() for key, value in model.named_parameters()}
    for layer, kind in view.space.sites():
        for index in (0, 5, view.space.width((layer, kind)) - 1):
            entries = neuron_entries(view, layer, kind, index)
            wanted = sum(int((parameter[at] != 0).sum()) for parameter, at in entries)
            with pytest.raises(RuntimeError, match="inside"), zeroed(view, layer, kind, index):
                assert all(not parameter[at].any() for parameter, at in entries)
                changed = sum(int((p != before[key]).sum()) for key, p in model.named_parameters())
                assert changed == wanted > 0
                raise RuntimeError("inside")
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_the_change_of_the_blocks_output_by_hand():
    """A Llama's feed-forward neuron writes x_k W_down[:, k]; over the last tokens only those count."""
    view = DecoderView(tiny_model())
    seen = {}
    module = view.projection(1, "ffn").module
    handle = module.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0][0]))
    with torch.no_grad():
        view.model(IDS)
    handle.remove()
    for last in (None, 3):
        found = importance_by_hand(view, IDS, 1, "ffn", [4, 7], last=last)
        x = seen["x"] if last is None else seen["x"][-last:]
        wanted = x[:, [4, 7]].norm(dim=0) * module.weight[:, [4, 7]].norm(dim=0)
        torch.testing.assert_close(found, wanted.detach().double(), rtol=1e-5, atol=1e-6)
    assert hooks_left(view.model) == 0


def test_prompts_go_to_the_models_device():
    """Prompts are encoded on the CPU, whatever the model's device is."""

    class Elsewhere:
        def to(self, device):
            assert device == view.model.device
            return IDS

    view = DecoderView(tiny_model())
    found = importance_by_hand(view, Elsewhere(), 0, "ffn", [1])
    assert torch.equal(found, importance_by_hand(view, IDS, 0, "ffn", [1]))
