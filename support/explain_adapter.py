"""Stage 3 of an explained edit: what the adapter consists of, and how the instruction routes.

explain.explain() calls it with an Edit. The shares at each step come from passes with the adapter
beside the weights, made for the page.

Key: B = 1; D' width of z; E experts; k kept; p a router's shares before the top k are kept.
"""
import numpy as np
import torch
from torch import Tensor

from mole import Adapter, LoRALinear, route, Routing
from support import export
from support.adapters import mixtures, routed
from support.explain_edit import Edit, heat_strip, lines, Parts, shape, shapes
from support.explain_shares import comparison, Comparison, shares_table, stacked, verdict
from support.figures import text
from support.passages import passage
from support.routing_maps import shares, Shares
from support.words import counted, span

EQUATIONS = {
    "none": "y = x W<sup>T</sup> + b",
    "plain": "y = x W<sup>T</sup> + b + what the adapter adds",
    "routed": "p = softmax( {} )<br>y = x W<sup>T</sup> + b + &sum;<sub>e kept</sub> "
              "p<sub>e</sub> s (x A<sub>e</sub>) B<sub>e</sub>"}
LOGITS = {"soft": "G z / temperature",                   # by routing; else G z
          "standardised": "G ((z &minus; mean) / deviation)"}
NO_ADAPTER = ("<p><strong>There is no adapter in this run: the model works as it was published."
              "</strong></p>")
NOT_ROUTED = "<p><strong>No layer of this adapter is routed by the instruction.</strong></p>"


def composed(adapter: Adapter) -> str:
    """What the adapter consists of, counted, and what its routers see."""
    mixed = mixtures(adapter)
    plain = [layer for layer in adapter.layers.values() if isinstance(layer, LoRALinear)]
    plain += [layer.base for layer in mixed if isinstance(layer.base, LoRALinear)]
    by_token = [layer for layer in mixed if layer.by_token]
    parts = []
    if plain:
        ranks = span([len(layer.lora_A) for layer in plain])
        parts.append(f"<strong>plain LoRA on {counted(len(plain), 'layer')}</strong>, two thin "
                     f"matrices of rank {ranks} beside a frozen one, the same for every "
                     "instruction")
    if mixed:
        experts = span([layer.config.experts for layer in mixed])
        ranks = span([layer.config.rank for layer in mixed])
        parts.append(f"<strong>on {counted(len(mixed), 'layer')} {experts} experts</strong> of "
                     f"rank {ranks}, which are small LoRAs too, and a router that weighs them")
    told = f"<p>The adapter of this run consists of {'; and '.join(parts)}."
    if by_token:
        which = "its routers" if len(by_token) == len(mixed) else f"{len(by_token)} of the routers"
        told += (f" Here {which} see each token's own input, so that other tokens, and other "
                 "steps, are served by other experts.")
    return told + "</p>"


def sees(edit: Edit) -> str:
    """What the instruction's routers see."""
    if edit.trace.pipe.adapter.instruction:
        z = "what a learned query reads from T5's tokens, plus CLIP's vector"
    else:
        z = "CLIP's vector of it"
    told = ("<p><strong>A router sees the instruction and nothing else</strong>: one vector z, "
            f"which is {z}. Neither the picture nor the time nor the token at hand is shown to it, "
            "so all tokens, in all steps, are served by the same experts, each with its share.</p>")
    if edit.routing_text != edit.instruction:
        told += ("<p>In this run the routers did not see the instruction but another text: "
                 f"<q>{text(edit.routing_text)}</q>. The shares below are of that text.</p>")
    return told


def with_others_experts(edit: Edit, others: Comparison) -> str:
    """How far the picture moves with the experts of the instruction whose choice differs most."""
    if not any(others.changing):
        return ""
    most = int(np.argmax(others.changing))
    trace = edit.trace
    found = trace.decode(trace.again(trace.encode(trace.pipe, [edit.others[most]])))
    return (f"<p>How much does it matter? Made once more with the experts of <q>"
            f"{text(edit.others[most])}</q>, {others.changing[most]:.0%} of them others, and all "
            f"else as it was, the picture's values differ by {edit.apart(found).mean():.1f} of 255 "
            f"on average; without the adapter by {edit.apart(edit.bare).mean():.1f} (8).</p>")


def plain_lora(edit: Edit, routing: Routing) -> str:
    """The rank and size of the LoRA that the adapter is for this one instruction, in words."""
    adapter, ranks, numbers = edit.trace.pipe.adapter, [], 0
    if any(layer.by_token for layer in mixtures(adapter)):
        return "<p>Some layers are routed by each token, so that the adapter is no plain LoRA.</p>"
    for layer in adapter.layers.values():
        A, B = export.layer_as_lora(layer, routing)      # one at a time: they may be large
        ranks.append(len(A))
        numbers += A.numel() + B.numel()
    return (f"<p>One instruction, one mixture: for this edit the whole adapter is a plain LoRA of "
            f"rank {span(ranks)} on {len(ranks)} layers, {numbers:,} numbers.</p>")


def same_shares(edit: Edit, own: dict[str, Shares]) -> str:
    """Whether the routers gave in the run, and in the passes, what they give the text."""
    found = [edit.trace.weights, *(effect.weights for effect in edit.effects)]
    same = all(torch.equal(weights[name].cpu(), found[0][name].cpu())
               for weights in found for name in own)
    steps = len(edit.effects)
    told = f"every router gave exactly the same shares in the run and at all {steps} steps"
    return (f"<p>At the steps that this page looks at, run once more with the adapter beside the "
            f"weights, {told if same else 'some routers did NOT give the shares of the run'}.</p>")


def found_of(p: Tensor, kept: Tensor, edit: Edit) -> str:
    """The routing in a sentence for the top of the page."""
    return (f"On {counted(len(p), 'layer')} {int(kept[0].sum())} of {p.shape[1]} experts serve, "
            "chosen by a text alone; without the whole adapter the picture's values differ by "
            f"{edit.apart(edit.bare).mean():.1f} of 255 on average.")


def routing(edit: Edit) -> Parts:
    """Stage 3."""
    adapter, given = edit.trace.pipe.adapter, edit.trace.given
    layers = routed(adapter)
    if not layers:
        told, equation = NO_ADAPTER, EQUATIONS["none"]
        if adapter:
            told, equation = composed(adapter) + NOT_ROUTED, EQUATIONS["plain"]
        return {"told": told, "equation": equation, "figures": "", "shapes": "", "lines": ""}
    with torch.no_grad(), adapter.serve(*given.routed_by) as now:
        z, lora = now.z, plain_lora(edit, now)
    own = shares(adapter, *given.routed_by)
    others, (p, kept) = comparison(edit, own), stacked(own)
    layer = layers[0]
    strip = heat_strip(z, "z, the instruction vector")
    read = adapter.instruction.forward if adapter.instruction else adapter.serve
    return {"told": composed(adapter) + sees(edit) + same_shares(edit, own)
            + verdict(p, kept, others) + with_others_experts(edit, others) + lora,
            "finding": found_of(p, kept, edit),
            "figures": strip + shares_table(own) + others.shown,
            "equation": EQUATIONS["routed"].format(LOGITS.get(layer.config.routing, "G z")),
            "shapes": shapes(("z", shape(z), "B, D&prime;"),
                             ("G", shape(layer.router.weight), "E, D&prime;: of each layer"),
                             ("p", f"1 x {p.shape[1]}", "B, E"),
                             ("A", shape(layer.experts_A), "in, E r: all experts of a layer"),
                             ("B", shape(layer.experts_B), "E r, out")),
            "lines": lines(passage(read), passage(type(layer).logits),
                           passage(type(layer).routing_weights), passage(route))}
