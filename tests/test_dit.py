"""dit.py against diffusers, on random weights, small and in fp32.

The peer gets our state dict, strictly: these tests also say that the names are the released ones.
Weights are scaled for outputs of order 1; then 1e-5 is about a hundred roundings of fp32, which
two orders of summation may differ by, and far below what a wrong constant or order would move.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import nn, Tensor

import dit
from helpers import assert_close, KEYS, randn, randomize, TOLERANCE


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


# --------------------------------------------------------------------------------- clean conditions

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
        assert [block for block, _ in seen[t]] == model.blocks
        assert model.blocks == [*model.transformer_blocks, *model.single_transformer_blocks]
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


# -------------------------------------------------------------------- tokens, positions, time steps

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
