"""What a file of weights without a config.json says of itself: sizes, from its tensors' shapes.

weights.load() asks when a single file was given; weights.PARTS names the function of each part.
"""
import torch

from dit import DiTConfig

RELEASED = DiTConfig(64, 19, 38, 128, 24, 4096, 768, (16, 56, 56), guidance_embeds=True)
Shapes = dict[str, torch.Size]                           # of tensors, by name


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many blocks have names that begin with the prefix and a number."""
    return len({name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)})


def implied_dit(shapes: Shapes) -> dict:
    """The transformer's configuration; axes_dims_rope are the released model's."""
    width, channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {"in_channels": channels, "num_layers": count_blocks(shapes, "transformer_blocks."),
            "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
            "attention_head_dim": head, "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            "axes_dims_rope": RELEASED.axes_dims_rope,
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes}


def implied_vae(shapes: Shapes) -> dict:
    """The autoencoder's configuration; groups, scale and shift are the released model's."""
    levels = count_blocks(shapes, "encoder.down_blocks.")
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
    return {"block_out_channels": tuple(widths),
            "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
            "latent_channels": shapes["decoder.conv_in.weight"][1], "norm_num_groups": 32,
            "scaling_factor": 0.3611, "shift_factor": 0.1159}


def implied_t5(shapes: Shapes) -> dict:
    """T5's configuration."""
    first = "encoder.block.0.layer."
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    vocab, width = shapes["shared.weight"]
    return {"vocab_size": vocab, "d_model": width, "num_heads": heads,
            "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
            "d_ff": shapes[f"{first}1.DenseReluDense.wo.weight"][1],
            "num_layers": count_blocks(shapes, "encoder.block."),
            "relative_attention_num_buckets": buckets}


def implied_clip(shapes: Shapes) -> dict:
    """CLIP's configuration; its heads have 64 channels."""
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    positions = shapes["text_model.embeddings.position_embedding.weight"][0]
    return {"vocab_size": vocab, "hidden_size": width, "num_attention_heads": width // 64,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": count_blocks(shapes, "text_model.encoder.layers."),
            "max_position_embeddings": positions}
