"""The models against diffusers and transformers, on random weights, small and in fp32.

Every peer gets our state dict, strictly: these tests also say that the names are the released ones.
Weights are scaled for outputs of order 1; then 1e-5 is about a hundred roundings of fp32, which
two orders of summation may differ by, and far below what a wrong constant or order would move.
"""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline,
                       FluxTransformer2DModel)
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as PeerT5Config
from transformers.models.t5.modeling_t5 import T5Attention as PeerT5Attention

import dit
import text_encoder
import vae
import weights
from support import devices
from support.files import config_from, read_json, write_part

KEYS = Path(__file__).parent / "keys"
TOLERANCE = 1e-5                                         # fp32, outputs of order 1: see above


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Norm scales near 1, biases near 0, matrices that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        else:
            p.data = gain * noise / math.sqrt(p[0].numel())
    return model.eval().requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, peer: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal within the tolerance, and of order 1, so that the tolerance means something."""
    assert ours.shape == peer.shape and ours.dtype == peer.dtype
    assert 0.2 < peer.std() < 5, f"outputs of size {peer.std():.3g}: the test would be blind"
    assert (ours - peer).abs().max() <= tolerance


# ----------------------------------------------------------------------------------- transformer

def small_dit(guidance_embeds: bool = True, **changes: object) -> dit.FluxTransformer:
    config = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=3, joint_attention_dim=20, pooled_projection_dim=12,
                  axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds)
    model = randomize(dit.FluxTransformer(dit.DiTConfig(**(config | changes))))
    model.proj_out.weight.data *= 2                      # brings the velocity to order 1
    return model


def dit_peer(model: dit.FluxTransformer) -> FluxTransformer2DModel:
    peer = FluxTransformer2DModel(**vars(model.config), patch_size=1)
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer.eval().requires_grad_(False)


def dit_inputs(model: dit.FluxTransformer, sizes: list[tuple[int, int]], batch: int = 2,
               text: int = 5) -> dict:
    """Random inputs: a target of the first latent size, native references of the others."""
    c = model.config
    ids = torch.cat([dit.position_ids(*sizes[0]), *dit.reference_ids(sizes[1:])])
    return dict(img=randn(batch, len(ids), c.in_channels),
                txt=randn(batch, text, c.joint_attention_dim, seed=2),
                pooled=randn(batch, c.pooled_projection_dim, seed=3),
                t=torch.linspace(0.9, 0.3, batch),
                guidance=torch.linspace(2.5, 4, batch), img_ids=ids)


def run_peer(peer: FluxTransformer2DModel, x: dict) -> Tensor:
    return peer(
        hidden_states=x["img"], encoder_hidden_states=x["txt"], pooled_projections=x["pooled"],
        timestep=x["t"], guidance=x["guidance"] if peer.config.guidance_embeds else None,
        img_ids=x["img_ids"], txt_ids=torch.zeros(x["txt"].shape[1], 3), return_dict=False)[0]


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("batch, sizes", [
    (1, [(8, 8)]), (2, [(6, 10)]), (2, [(8, 8), (8, 8)]), (3, [(4, 12), (10, 6), (2, 4)])])
def test_dit_equals_diffusers(guidance_embeds: bool, batch: int, sizes: list) -> None:
    model = small_dit(guidance_embeds)
    x = dit_inputs(model, sizes, batch)
    assert_close(model(**x), run_peer(dit_peer(model), x))


@pytest.mark.parametrize("changes", [
    dict(num_layers=0), dict(num_single_layers=0),
    dict(num_layers=1, num_single_layers=3, num_attention_heads=1),
    dict(attention_head_dim=32, axes_dims_rope=(8, 12, 12), in_channels=64,
         joint_attention_dim=33)])
def test_dit_equals_diffusers_at_other_shapes(changes: dict) -> None:
    model = small_dit(**changes)
    x = dit_inputs(model, [(6, 8), (4, 6)], text=1)
    assert_close(model(**x), run_peer(dit_peer(model), x))


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0])
def test_dit_equals_diffusers_at_times(t: float) -> None:
    model = small_dit()
    x = dit_inputs(model, [(6, 8)]) | dict(t=torch.full((2,), t))
    assert_close(model(**x), run_peer(dit_peer(model), x))


def test_final_layer_stores_scale_before_shift() -> None:
    """Reference: as diffusers stores it; every block stores shift first."""
    layer = randomize(dit.FinalModulation(8))
    x, vec = randn(2, 5, 8), randn(2, 8, seed=2)
    scale, shift = layer.linear(F.silu(vec))[:, None].chunk(2, dim=-1)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    assert (layer(x, vec) - expected).abs().max() <= 1e-6   # one formula twice: roundings only


def test_sinusoid_takes_frequencies_in_fp32() -> None:
    """Reference: bit for bit as diffusers; fp64 frequencies move the released model's inputs."""
    t = torch.tensor([0.0, 0.001, 0.25, 0.7, 0.999, 1.0, 2.5, 3.5])
    peer = get_timestep_embedding(t * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(dit.sinusoid(t), peer)
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angle = t.double()[:, None] * 1000 * frequency
    assert (torch.cat([angle.cos(), angle.sin()], dim=-1) - dit.sinusoid(t)).abs().max() > 3e-5


def test_sinusoid_multiplies_in_fp32() -> None:
    """Deviation: guidance 2.5 stays 2500; the product in bf16 would be 2496."""
    guidance = torch.tensor([2.5], dtype=torch.bfloat16)
    assert (guidance * 1000).item() == 2496
    assert torch.equal(dit.sinusoid(guidance), dit.sinusoid(guidance.float()))
    rounded = get_timestep_embedding((guidance * 1000).float(), 256, flip_sin_to_cos=True,
                                     downscale_freq_shift=0)
    assert (dit.sinusoid(guidance) - rounded).abs().max() > 1


@pytest.mark.parametrize("axes", [(4, 4, 4), (5, 5, 6), (4, 12), (4, 4, 4, 4)])
def test_axes_are_three_even_numbers_that_fill_the_head(axes: tuple) -> None:
    with pytest.raises(ValueError, match="axes_dims_rope"):
        small_dit(axes_dims_rope=axes)


# ------------------------------------------------------------------------------- clean conditions

def with_condition(model: dit.FluxTransformer) -> dict:
    ids = dit.reference_ids([(4, 6)])[0]
    return dit_inputs(model, [(6, 8)]) | dict(
        cond=randn(2, len(ids), model.config.in_channels, seed=4), cond_ids=ids)


def as_native(x: dict) -> dict:
    """The same inputs with the clean condition's tokens and ids among the native references."""
    rest = {name: value for name, value in x.items() if name not in ("cond", "cond_ids")}
    return rest | dict(img=torch.cat([x["img"], x["cond"]], dim=1),
                       img_ids=torch.cat([x["img_ids"], x["cond_ids"]]))


def test_output_depends_on_condition_but_holds_none_of_it() -> None:
    model = small_dit()
    x = with_condition(model)
    out = model(**x)
    assert out.shape == x["img"].shape
    assert (out - model(**(x | dict(cond=x["cond"].flip(1))))).abs().max() > 1e-2
    assert (out - model(**(x | dict(cond=None, cond_ids=None)))).abs().max() > 1e-2


@pytest.mark.parametrize("singles", [0, 1, 3])
def test_clean_condition_at_time_zero_is_a_native_reference(singles: int) -> None:
    """At t = 0 target and condition are modulated alike, so only the code path differs."""
    model = small_dit(num_single_layers=singles)
    x = with_condition(model) | dict(t=torch.zeros(2))
    targets = x["img"].shape[1]
    assert_close(model(**x), model(**as_native(x))[:, :targets])
    assert_close(model(**x), run_peer(dit_peer(model), as_native(x))[:, :targets])


def test_condition_is_not_a_native_reference_at_other_times() -> None:
    model = small_dit()
    x = with_condition(model)
    assert (model(**x) - model(**as_native(x))[:, :x["img"].shape[1]]).abs().max() > 1e-2


def per_token(self: dit.Modulation, vec: Tensor) -> list[dit.ModulationOut]:
    """Modulation.forward for one vector per token (B, S, D) as well as one per sample (B, D)."""
    vec = vec[:, None] if vec.ndim == 2 else vec
    parts = self.linear(F.silu(vec)).chunk(self.linear.out_features // vec.shape[-1], dim=-1)
    return [dit.ModulationOut(*parts[i:i + 3]) for i in range(0, len(parts), 3)]


def test_condition_is_a_native_reference_modulated_at_time_zero(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition, at any t: one image stream whose tokens carry their own modulation vector."""
    model = small_dit()
    x = with_condition(model)
    texts, targets, conds = (x[name].shape[1] for name in ("txt", "img", "cond"))
    out = model(**x)

    monkeypatch.setattr(dit.Modulation, "forward", per_token)
    vec = model.time_text_embed(x["t"], x["guidance"], x["pooled"])[:, None]
    clean = model.time_text_embed(0 * x["t"], x["guidance"], x["pooled"])[:, None]
    image = torch.cat([vec.expand(-1, targets, -1), clean.expand(-1, conds, -1)], dim=1)
    for block in model.transformer_blocks:
        block.norm1.register_forward_pre_hook(lambda module, args: image)
    for block in model.single_transformer_blocks:
        block.norm.register_forward_pre_hook(
            lambda module, args: torch.cat([vec.expand(-1, texts, -1), image], dim=1))
    assert_close(out, model(**as_native(x))[:, :targets])


def test_order_of_conditions_and_references_is_free() -> None:
    """Attention has no order but the position ids. Sums run in another order: 1e-5."""
    model = small_dit()
    sizes = [(4, 6), (6, 4)]
    first, second = dit.reference_ids(sizes)
    tokens = [randn(2, len(ids), 16, seed=5 + i) for i, ids in enumerate((first, second))]
    x = dit_inputs(model, [(6, 8)])
    one = model(**x, cond=torch.cat(tokens, dim=1), cond_ids=torch.cat([first, second]))
    other = model(**x, cond=torch.cat(tokens[::-1], dim=1), cond_ids=torch.cat([second, first]))
    assert_close(one, other)
    assert (one - model(**x, cond=torch.cat(tokens[::-1], dim=1),
                        cond_ids=torch.cat([first, second]))).abs().max() > 1e-2      # ids swapped

    order = torch.randperm(len(x["img_ids"]), generator=torch.Generator().manual_seed(0))
    shuffled = x | dict(img=x["img"][:, order], img_ids=x["img_ids"][order])
    assert_close(model(**shuffled), model(**x)[:, order])


def test_run_sees_every_block_once_and_conditions_ignore_the_time() -> None:
    model = small_dit()
    x = with_condition(model)
    seen: dict[float, list] = {}
    for t in (0.9, 0.1):
        def run(block: nn.Module, *args: object, t: float = t) -> object:
            seen.setdefault(t, []).append((block, args))
            return block(*args)
        out = model(**(x | dict(t=torch.full((2,), t))), run=run)
        assert torch.equal(out, model(**(x | dict(t=torch.full((2,), t)))))
        assert [block for block, _ in seen[t]] == [*model.transformer_blocks,
                                                   *model.single_transformer_blocks]
    (_, late), (_, early) = seen[0.9][0], seen[0.1][0]
    assert torch.equal(late[2][1], early[2][1])          # what modulates the conditions
    assert not torch.equal(late[2][0], early[2][0])      # and the rest


def test_fp16_is_kept_finite() -> None:
    huge = torch.tensor([torch.inf, -torch.inf, 1.0])
    assert dit.limit(huge.half()).tolist() == [65504, -65504, 1]
    assert torch.equal(dit.limit(huge), huge) and torch.equal(dit.limit(huge.bfloat16()),
                                                              huge.bfloat16())
    model = small_dit()
    for modulation in [block.norm1_context for block in model.transformer_blocks] + [
            block.norm for block in model.single_transformer_blocks]:
        width = modulation.linear.in_features
        modulation.linear.bias.data[-width:] = 6e4       # the last gate: its product overflows
    x = {k: v if k.endswith("ids") else v.half() for k, v in with_condition(model).items()}
    seen = []
    def run(block: nn.Module, *args: object) -> object:
        seen.append(block(*args))
        return seen[-1]
    model.half()(**x, run=run)
    assert all(torch.isfinite(out[0]).all() for out in seen)


def test_samples_of_a_batch_do_not_mix() -> None:
    """The shapes of the products differ, hence their order of summation: 1e-5."""
    model = small_dit()
    x = with_condition(model)
    alone = model(**{k: v if k.endswith("ids") else v[1:] for k, v in x.items()})
    assert_close(model(**x)[1:], alone)


# ------------------------------------------------------------------- tokens, positions, time steps

@pytest.mark.parametrize("h, w", [(2, 2), (6, 10), (16, 4)])
def test_packing_equals_diffusers(h: int, w: int) -> None:
    latents = randn(3, 16, h, w)
    tokens = dit.pack(latents)
    assert torch.equal(tokens, FluxKontextPipeline._pack_latents(latents, 3, 16, h, w))
    assert torch.equal(dit.unpack(tokens, h, w), latents)
    assert torch.equal(dit.unpack(tokens, h, w),
                       FluxKontextPipeline._unpack_latents(tokens, 8 * h, 8 * w, 8))


@pytest.mark.parametrize("h, w", [(5, 4), (4, 5)])
def test_packing_refuses_odd_sides(h: int, w: int) -> None:
    with pytest.raises(ValueError, match=f"{h}x{w}.*even"):
        dit.pack(torch.zeros(1, 16, h, w))


@pytest.mark.parametrize("h, w", [(2, 2), (6, 10), (128, 128), (84, 196)])
def test_position_ids_equal_diffusers(h: int, w: int) -> None:
    peer = FluxKontextPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
    assert torch.equal(dit.position_ids(h, w), peer)
    assert dit.position_ids(h, w).dtype == torch.float32
    peer[:, 0] = 1                                       # as the pipeline marks its one reference
    assert torch.equal(dit.reference_ids([(h, w)])[0], peer)


def test_reference_ids_stand_side_by_side() -> None:
    sizes = [(4, 6), (2, 10), (8, 4)]
    starts, ends = [0, 3, 8], [2, 7, 9]
    for i, ids in enumerate(dit.reference_ids(sizes)):
        h, w = sizes[i]
        assert ids.shape == (h * w // 4, 3) and ids.dtype == torch.float32
        assert (ids[:, 0] == i + 1).all()
        assert ids[:, 1].unique().tolist() == list(range(h // 2))
        assert ids[:, 2].unique().tolist() == list(range(starts[i], ends[i] + 1))
    assert dit.reference_ids([]) == []


def test_positions_beyond_256_stay_exact() -> None:
    ids = dit.position_ids(2, 1200)
    assert ids[:, 2].tolist() == list(range(600))


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 6)])
def test_rope_equals_diffusers(axes: tuple) -> None:
    """Both tables: fp64 angles, different but equal formulas; 1e-6 covers one fp32 rounding."""
    ids = torch.cat([torch.zeros(3, 3), dit.position_ids(20, 600),
                     *dit.reference_ids([(6, 8), (4, 10)])])
    cos, sin = FluxPosEmbed(10000, list(axes))(ids)
    pe = dit.rope(ids, axes)
    assert pe.dtype == torch.complex64 and pe.shape == (len(ids), sum(axes) // 2)
    for ours, theirs in ((pe.real, cos), (pe.imag, sin)):
        assert (ours.repeat_interleave(2, dim=-1) - theirs).abs().max() <= 1e-6
    x = randn(1, 2, len(ids), sum(axes))
    peer = apply_rotary_emb(x, (cos, sin))
    assert (dit.rotate(x, pe) - peer).abs().max() <= TOLERANCE
    assert (dit.rotate(x.bfloat16(), pe).dtype) == torch.bfloat16


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_in_training_is_one_graph_and_of_its_own_type(fast, dtype, monkeypatch):
    """On processors slow at bf16 it passes through fp32, which float64 must not."""
    monkeypatch.setattr(devices, "FAST_BF16", fast)
    model = dit.FluxTransformer(dit.DiTConfig(16, 1, 1, 16, 2, 8, 8, (4, 6, 6)))
    devices.ready(model, nn.Identity(), torch.device("cpu"), dtype)
    q, k, v = (torch.randn(1, 2, 5, 16).to(dtype).requires_grad_() for _ in range(3))
    pe = dit.rope(torch.zeros(5, 3), (4, 6, 6))          # turns nothing
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-12   # its rounding of values about 2
    plain = [model.transformer_blocks[0].attend, model.single_transformer_blocks[0].attend]
    compiled = [torch.compile(one, backend="aot_eager", fullgraph=True) for one in plain]
    for attend in plain + compiled:
        out = attend(q, k, v, pe)
        assert out.dtype == dtype and torch.allclose(out, wanted, atol=limit, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4032, 4096])
def test_schedule_equals_diffusers(steps: int, tokens: int) -> None:
    """1e-6: the peer starts from sigmas in fp32, we round once, at the end."""
    config = json.loads((KEYS / "config_scheduler.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(tokens, config["base_image_seq_len"], config["max_image_seq_len"],
                         config["base_shift"], config["max_shift"])
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    times = dit.schedule(steps, tokens)
    assert times.shape == (steps + 1,) and times.dtype == torch.float32
    assert times[0] == 1 and times[-1] == 0 and (times[1:] < times[:-1]).all()
    assert (times - scheduler.sigmas).abs().max() <= 1e-6


def test_schedule_needs_a_step() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        dit.schedule(0, 256)


# ------------------------------------------------------------------------------------ autoencoder

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


# --------------------------------------------------------------------------------------------- T5

def small_t5(**changes: object) -> text_encoder.T5Encoder:
    """Matrices a little smaller than unit gain: scores are not divided by sqrt(d)."""
    config = dict(vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4) | changes
    model = randomize(text_encoder.T5Encoder(text_encoder.T5Config(**config)), gain=0.7)
    model.shared.weight.data *= math.sqrt(24)
    table = model.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
    table.weight.data *= 2                               # so that a wrong bucket shows
    return model


def t5_peer(model: text_encoder.T5Encoder) -> T5EncoderModel:
    config = PeerT5Config(**vars(model.config), feed_forward_proj="gated-gelu", dropout_rate=0.0,
                          is_encoder_decoder=False, use_cache=False)
    peer = T5EncoderModel(config)
    state = model.state_dict()
    peer.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]},
                         strict=True)
    return peer.eval().requires_grad_(False)


def t5_ids(length: int) -> Tensor:
    ids = torch.randint(2, 40, (2, length), generator=torch.Generator().manual_seed(length))
    ids[0, length // 2], ids[0, length // 2 + 1:] = 1, 0     # the first ends early and is padded
    return ids


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_t5_equals_transformers(length: int) -> None:
    """Reference: no scale, one bias for all blocks, no mask. 200 tokens reach the last bucket."""
    model, ids = small_t5(), t5_ids(length)
    assert_close(model(ids), t5_peer(model)(ids).last_hidden_state)


def test_t5_equals_transformers_at_other_shapes() -> None:
    model = small_t5(num_heads=2, d_kv=6, relative_attention_num_buckets=16,
                     relative_attention_max_distance=40, layer_norm_epsilon=0.05)
    ids = t5_ids(90)
    assert_close(model(ids), t5_peer(model)(ids).last_hidden_state)


def test_t5_lets_padding_attend() -> None:
    """Reference: as the pipeline, which passes no mask. With one, the words' own vectors change."""
    model, ids = small_t5(), t5_ids(20)
    peer = t5_peer(model)
    words = slice(0, 10)
    masked = peer(ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert (model(ids) - masked)[0, words].abs().max() > 1e-2
    assert_close(model(ids)[0, words], peer(ids).last_hidden_state[0, words])


def test_buckets_are_known_and_equal_transformers() -> None:
    known = {0: 0, 8: 24, -16: 10, 64: 30, 91: 31, -91: 15,
             1: 17, -1: 1, 7: 23, -8: 8, 5000: 31, -5000: 15}
    assert text_encoder.bucket(torch.tensor(list(known)), 32, 128).tolist() == list(known.values())
    distance = torch.arange(-600, 601)
    for buckets, longest in ((32, 128), (16, 40)):
        peer = PeerT5Attention._relative_position_bucket(distance, True, buckets, longest)
        assert torch.equal(text_encoder.bucket(distance, buckets, longest), peer)


def test_t5_stays_finite_in_fp16(tmp_path: Path) -> None:
    """The second feed-forward matrix stays fp32, sums are clamped: no infinity where fp16 ends."""
    model = small_t5()
    for block in model.encoder["block"]:
        block.layer[1]["DenseReluDense"].wo.weight.data *= 1e5
    write_part(model.state_dict(), vars(model.config), tmp_path, "model.safetensors",
                         torch.float32)
    half = weights.load("text_encoder_2", tmp_path, dtype=torch.float16)
    assert {p.dtype for name, p in half.named_parameters()
            if name.endswith("wo.weight")} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters()
            if not name.endswith("wo.weight")} == {torch.float16}
    out = half(t5_ids(12))
    assert out.dtype == torch.float16 and out.isfinite().all()


# ------------------------------------------------------------------------------------------- CLIP

def small_clip(eos: int, eps: float = 1e-5) -> text_encoder.CLIPEncoder:
    return randomize(text_encoder.CLIPEncoder(text_encoder.CLIPConfig(
        vocab_size=50, hidden_size=24, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=16, eos_token_id=eos, layer_norm_eps=eps)))


def clip_peer(model: text_encoder.CLIPEncoder) -> CLIPTextModel:
    peer = CLIPTextModel(CLIPTextConfig(**vars(model.config), hidden_act="quick_gelu",
                                        attention_dropout=0.0, bos_token_id=0, pad_token_id=1))
    state = model.state_dict()
    if not any(name.startswith("text_model.") for name in peer.state_dict()):  # newer ones drop it
        state = {name.removeprefix("text_model."): p for name, p in state.items()}
    peer.load_state_dict(state, strict=True)
    return peer.eval().requires_grad_(False)


def clip_ids(end: int, length: int) -> Tensor:
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(length))
    for row, at in enumerate((length // 2, length - 1, 1)):
        ids[row, at:] = end                              # end tokens as padding: the first counts
    return ids


@pytest.mark.parametrize("eos, end", [(2, 49), (49, 49), (20, 20)])
@pytest.mark.parametrize("length, eps", [(3, 1e-5), (16, 1e-5), (16, 0.05)])
def test_clip_equals_transformers(eos: int, end: int, length: int, eps: float) -> None:
    """Reference: with eos_token_id 2, as published, the largest id marks the end; else that id."""
    model, ids = small_clip(eos, eps), clip_ids(end, length)
    assert_close(model(ids), clip_peer(model)(ids).pooler_output)


def test_clip_pools_at_the_first_end_token() -> None:
    """Attention is causal: what follows the end token changes nothing, what precedes it does."""
    for eos in (2, 49):
        model, ids = small_clip(eos), clip_ids(49, 12)[:1]
        after, before = ids.clone(), ids.clone()
        after[0, 8:], before[0, 2] = 5, 1
        assert (model(ids) - model(after)).abs().max() <= TOLERANCE
        assert (model(ids) - model(before)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------- whole sizes

@pytest.mark.parametrize("part, config, model, tensors, parameters", [
    ("transformer", dit.DiTConfig, dit.FluxTransformer, 1160, 11_901_408_320),
    ("vae", vae.VAEConfig, vae.AutoEncoder, 244, 83_819_683),
    ("text_encoder", text_encoder.CLIPConfig, text_encoder.CLIPEncoder, 196, 123_060_480),
    ("text_encoder_2", text_encoder.T5Config, text_encoder.T5Encoder, 219, 4_762_310_656)])
def test_names_and_shapes_of_the_public_model(part: str, config: type, model: type, tensors: int,
                                              parameters: int) -> None:
    values = read_json(KEYS / f"config_{part}.json")
    with torch.device("meta"):
        state = model(config_from(config, values, part)).state_dict()
    assert {name: list(p.shape) for name, p in state.items()} == read_json(
        KEYS / f"{part}.json")
    assert len(state) == tensors and sum(p.numel() for p in state.values()) == parameters
