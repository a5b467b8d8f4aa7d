"""The true size: what is proven of tiny models holds of SDXL-Turbo's own configuration."""

import pytest
import torch
from torch import Tensor, nn
from true_size import true_size_sdxl

from probe.capture import capturing
from probe.diffusion import DrawConfig
from probe.passes import read_passes
from probe.sites import parse_site

FOUR = tuple(map(parse_site, ("down.2.1", "mid.0", "up.0.0", "up.0.1")))


@pytest.mark.slow
def test_the_true_configuration_gives_1280_channels_of_16_by_16_places() -> None:
    """Random weights in bfloat16, 512 x 512 pixels, one step.

    Takes 8 GB of memory and two minutes on one core.
    """
    model = true_size_sdxl()
    parameters = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()
    }
    assert parameters == {
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
    }
    assert model.dtype == torch.bfloat16 and model.prompt_tokens == 77
    assert model.image_size(DrawConfig()) == (512, 512)
    own: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str):
        def keep(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
            own[name] = (args[0], out[0])

        return keep

    handles = [model.block(site).register_forward_hook(keeper(str(site))) for site in FOUR]
    with torch.no_grad(), capturing(model, FOUR, early_exit=False) as seen:
        drawn = model.generate(["a sloth"], [42])
    for handle in handles:
        handle.remove()
    assert drawn.images.shape == (1, 512, 512, 3)
    assert model.pipeline.scheduler.timesteps.tolist() == [999]
    for site in FOUR:
        assert model.grid(site) == (16, 16)
        assert seen[site].shape == (1, 256, 1280) and seen[site].dtype == torch.bfloat16
        update = seen[site].transpose(1, 2).unflatten(2, (16, 16))
        assert update[0].shape == (1280, 16, 16) and update.isfinite().all() and update.any()
        entering, leaving = own[str(site)]
        assert torch.equal(entering + update, leaving)
    again = read_passes(model, ["a sloth"], [42], DrawConfig(), FOUR[:1]).values[FOUR[0]]
    assert torch.equal(again[0], seen[FOUR[0]])
