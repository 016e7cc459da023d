"""Projections that read the same tokens as one matrix product: queries, keys and values; gate and up.

Done to a policy that only acts, after its weights were loaded: names in checkpoints stay as they are. Each product is the same up to
the order in which a matrix product adds."""

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from ..experts.smolvla import PrefixReader
from ..layers.decoder import Attention, DecoderBlock, GatedMLP, KeysValues
from ..layers.rotary import rotate
from ..policy import Policy


def merge_projections(policy: Policy) -> None:
    """In place; the policy can act afterwards, and neither be trained, saved nor adapted. A layer's weights exist twice while it is
    merged, no other's."""
    unread = {id(parameter) for parameter in policy.backbone.unread_parameters()}
    for block in [module for module in policy.modules() if isinstance(module, DecoderBlock)]:
        if id(block.self_attn.q_proj.weight) in unread:
            continue  # a prefix's last layer, which gives keys and values alone
        if not isinstance(block, PrefixReader):  # whose keys and values come from other tokens than its queries
            block.self_attn = MergedAttention(block.self_attn)
        block.mlp = MergedGatedMLP(block.mlp)
    tower = getattr(policy.backbone, "vision_tower", None)
    for layer in [] if tower is None else list(tower.modules()):
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, SiglipAttention | CLIPAttention):
            layer.self_attn = MergedVisionAttention(attention)


def merged(*layers: nn.Linear) -> nn.Linear:
    """One layer whose output is theirs, one after the other; all of them have a bias, or none."""
    weight = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    with torch.device("meta"):
        whole = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases))
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return whole


class MergedAttention(Attention):
    """See `Attention`."""

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)
        self.head_dim = plain.head_dim
        self.sizes = [layer.out_features for layer in (plain.q_proj, plain.k_proj, plain.v_proj)]
        self.qkv_proj = merged(plain.q_proj, plain.k_proj, plain.v_proj)
        self.o_proj = plain.o_proj

    def projected(self, x_BND: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, KeysValues]:
        queries, keys, values = (self.heads(part) for part in self.qkv_proj(x_BND).split(self.sizes, dim=-1))
        return rotate(queries, angles), (rotate(keys, angles), values)


class MergedGatedMLP(GatedMLP):
    """See `GatedMLP`."""

    def __init__(self, plain: GatedMLP) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj = merged(plain.gate_proj, plain.up_proj)
        self.down_proj = plain.down_proj
        self.activation = plain.activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)


class MergedVisionAttention(nn.Module):
    """The attention of a SigLIP or CLIP vision layer: in both directions, over tokens that are all there."""

    def __init__(self, plain: SiglipAttention | CLIPAttention) -> None:
        super().__init__()
        self.head_dim, self.scale = plain.head_dim, plain.scale
        self.qkv_proj = merged(plain.q_proj, plain.k_proj, plain.v_proj)
        self.out_proj = plain.out_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """(M, N, D) -> (M, N, D), and no attention weights, as transformers' layers expect it."""
        qkv_MN3hd = self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        queries, keys, values = qkv_MN3hd.permute(2, 0, 3, 1, 4).unbind()
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=attention_mask, scale=self.scale
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None
