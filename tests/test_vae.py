"""vae.py against diffusers, on random weights, small and in fp32."""
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import vae
from helpers import assert_close, randn, randomize, TOLERANCE


def small_vae(widths: tuple = (8, 16, 24), layers: int = 1,
              scaling: float = 0.3611) -> vae.AutoEncoder:
    config = vae.VAEConfig(block_out_channels=widths, layers_per_block=layers, latent_channels=4,
                           norm_num_groups=4, scaling_factor=scaling, shift_factor=0.1159)
    return randomize(vae.AutoEncoder(config))


def vae_peer(model: vae.AutoEncoder) -> AutoencoderKL:
    c, levels = model.config, len(model.config.block_out_channels)
    peer = AutoencoderKL(
        block_out_channels=c.block_out_channels, layers_per_block=c.layers_per_block,
        latent_channels=c.latent_channels, norm_num_groups=c.norm_num_groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False, use_post_quant_conv=False)
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer.eval().requires_grad_(False)


def test_only_a_small_model_knows_one_size():
    config = small_vae().config
    for side, wanted in ((64, (64, 64)), (511, (511, 511)), (512, None), (1024, None)):
        assert replace(config, sample_size=side).only_size == wanted


VAES = [((8, 16, 24), 1, 24, 40), ((8, 8, 16, 16), 2, 32, 16),
        ((16, 8), 2, 6, 14), ((12,), 1, 7, 5)]


@pytest.mark.parametrize("widths, layers, height, width", VAES)
def test_vae_equals_diffusers(widths: tuple, layers: int, height: int, width: int) -> None:
    model = small_vae(widths, layers)
    peer, img = vae_peer(model), randn(2, 3, height, width)
    posterior = peer.encode(img).latent_dist
    mean, logvar = model.moments(img)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    assert_close(model.encode(img) / 0.3611, posterior.mode() - 0.1159)
    noise = randn(*mean.shape, seed=9)
    assert_close(model.encode(img, noise) / 0.3611, posterior.mean + posterior.std * noise - 0.1159)

    z = randn(*mean.shape, seed=7)
    assert_close(model.decode(z), peer.decode(z / 0.3611 + 0.1159).sample)


def test_vae_norms_have_the_epsilon_of_diffusers() -> None:
    """Inputs of order 1 do not feel it; flat skies do."""
    def epsilons(model: nn.Module) -> dict[str, float]:
        return {name: module.eps for name, module in model.named_modules()
                if isinstance(module, nn.GroupNorm)}
    model = small_vae()
    assert epsilons(model) == epsilons(vae_peer(model)) and set(epsilons(model).values()) == {1e-6}


def test_vae_draws_the_sample_that_diffusers_draws() -> None:
    model = small_vae()
    img = randn(2, 3, 16, 16)
    peer = vae_peer(model).encode(img).latent_dist.sample(torch.Generator().manual_seed(5))
    noise = torch.randn(peer.shape, generator=torch.Generator().manual_seed(5))
    assert_close(model.encode(img, noise) / 0.3611 + 0.1159, peer)


def test_vae_clamps_the_log_variance_as_diffusers() -> None:
    model = small_vae()
    model.encoder.conv_out.weight.data *= 40
    img = randn(1, 3, 16, 16)
    peer = vae_peer(model).encode(img).latent_dist.logvar
    ours = model.moments(img)[1]
    assert ours.min() == -30 and ours.max() == 20
    assert (ours - peer).abs().max() <= 40 * TOLERANCE   # values are forty times as large


def test_vae_names_a_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="18x16.*4"):
        small_vae().encode(torch.zeros(1, 3, 16, 18))
