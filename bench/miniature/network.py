"""The miniature as a trainable network: transformers' modules, fan-in initialisation, and a batched forward pass.

The forward pass computes what `Qwen3_5MoeForConditionalGeneration` computes, but for batches in which the n-th pictures
of all rows have one size: pictures are then attended in one call instead of one call each.
"""

from __future__ import annotations

import copy
import functools
import math

import fast_ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as reference
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

PART = 64  # numbers of tokens that vary are filled up to a multiple of this


class Product(torch.autograd.Function):
    """x [..., C] times weight [R, C], transposed: operands in bfloat16, sums in float32. Also its gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """[..., R] in float32."""
        rows, weight = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        return (rows @ weight.mT).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and weight."""
        rows, weight = ctx.saved_tensors
        g = grad.flatten(0, -2).bfloat16()
        dx = (g @ weight).float().view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, (g.mT @ rows).float() if ctx.needs_input_grad[1] else None


class Experts(torch.autograd.Function):
    """Experts over tokens sorted by expert. x [N, H] float32, sizes of the experts' parts, stacked weights."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, gate_up: Tensor, down: Tensor, sizes: list[int]
    ) -> Tensor:
        """[N, H] in float32: down(silu(gate x) * up x) of each row's expert."""
        x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
        both = torch.cat([part @ w.mT for part, w in zip(x.split(sizes), gate_up, strict=True)]).float()
        gate, up = both.chunk(2, dim=-1)
        inner = (F.silu(gate) * up).bfloat16()
        ctx.save_for_backward(x, gate_up, down, both, inner)
        ctx.sizes = sizes
        return torch.cat([part @ w.mT for part, w in zip(inner.split(sizes), down, strict=True)]).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and both weights."""
        x, gate_up, down, both, inner = ctx.saved_tensors
        g = grad.bfloat16()
        parts = list(zip(g.split(ctx.sizes), down, strict=True))
        ddown = torch.stack([p.mT @ i for (p, _), i in zip(parts, inner.split(ctx.sizes), strict=True)]).float()
        dinner = torch.cat([p @ w for p, w in parts]).float()
        gate, up = both.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        dgate = dinner * up * (sigmoid + silu * (1 - sigmoid))
        dboth = torch.cat([dgate, dinner * silu], dim=-1).bfloat16()
        parts = list(zip(dboth.split(ctx.sizes), gate_up, strict=True))
        dgate_up = torch.stack([p.mT @ i for (p, _), i in zip(parts, x.split(ctx.sizes), strict=True)]).float()
        return torch.cat([p @ w for p, w in parts]).float(), dgate_up, ddown, None


def experts_forward(self: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Experts over tokens sorted by expert: one gather and one scatter. x [T, H], chosen and weights [T, K].

    Each expert's part is filled up with rows of weight 0: products of few sizes, whose code oneDNN makes only once.
    """
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=self.num_experts).tolist()
    sizes = [-(-count // PART) * PART for count in counts]
    places = torch.cat([torch.arange(n) + sum(sizes[:e]) for e, n in enumerate(counts)])
    tokens = torch.zeros(sum(sizes), dtype=torch.long)
    tokens[places] = order // chosen.shape[1]
    share = weights.new_zeros(sum(sizes)).index_copy(0, places, weights.flatten()[order])
    y = Experts.apply(x[tokens], self.gate_up_proj, self.down_proj, sizes) * share[:, None]
    return torch.zeros_like(x).index_add_(0, tokens, y)


def linear_forward(self: nn.Linear, x: Tensor) -> Tensor:
    """Stands in for `nn.Linear.forward`; products too narrow to gain stay in float32."""
    if self.out_features < 32:
        return F.linear(x, self.weight, self.bias)
    y = Product.apply(x, self.weight)
    return y if self.bias is None else y + self.bias


def use_fast_parts() -> None:
    """Replaces slow parts of transformers' modules by ones that train faster on a CPU: equal, but that matrices are
    multiplied in bfloat16 with float32 sums."""
    nn.Linear.forward = linear_forward
    reference.Qwen3_5MoeExperts.forward = experts_forward
    reference.causal_conv1d_fn = fast_ops.convolution
    reference.torch_chunk_gated_delta_rule = fast_ops.delta_rule
    reference.Qwen3_5MoeRMSNorm.forward = fast_ops.rms_norm
    reference.Qwen3_5MoeRMSNormGated.forward = fast_ops.gated_rms_norm


class MultiTokenPredictor(nn.Module):
    """The draft layer: from the final hidden state at t and the token at t+1 to the hidden state that predicts t+2."""

    def __init__(self, config: Qwen3_5MoeConfig) -> None:
        super().__init__()
        text = copy.deepcopy(config.text_config)
        text.num_hidden_layers, text.layer_types = 1, ["full_attention"]
        norm = functools.partial(reference.Qwen3_5MoeRMSNorm, text.hidden_size, eps=text.rms_norm_eps)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = norm(), norm(), norm()
        self.fc = nn.Linear(2 * text.hidden_size, text.hidden_size, bias=False)
        self.layers = nn.ModuleList([reference.Qwen3_5MoeDecoderLayer(text, 0)])

    def forward(self, hidden: Tensor, embedding: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [B, T, H] at t, embedding [B, T, H] of t+1, rotary tables of the positions t; returns [B, T, H]."""
        y = self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1))
        return self.norm(self.layers[0](y, position_embeddings=rotary))


def initialise(model: nn.Module, mtp: nn.Module) -> None:
    """Fan-in initialisation of every matrix; decays of the delta layers that remember from 2 to some 1,000 tokens."""
    for module in (model, mtp):
        for name, p in module.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")) and p.ndim == 3:
                nn.init.normal_(p, std=p.shape[2] ** -0.5)
            elif "embed_tokens" in name:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif "pos_embed" in name:
                nn.init.normal_(p, std=1.0)
            elif name.endswith("A_log"):
                nn.init.zeros_(p)
                p.data.copy_(torch.empty_like(p).uniform_(0.25, 4).log())
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                p.data.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif p.ndim >= 2:
                nn.init.normal_(p, std=(p.numel() / p.shape[0]) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if name.endswith(
                ("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight", "linear_fc2.weight")
            ):
                p.data.mul_(0.5)


def build(config: Qwen3_5MoeConfig) -> tuple[Qwen3_5MoeForConditionalGeneration, MultiTokenPredictor]:
    """A freshly initialised model in float32 and its draft layer."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    model = Qwen3_5MoeForConditionalGeneration(config).float()
    mtp = MultiTokenPredictor(model.config).float()
    initialise(model, mtp)
    return model, mtp


@functools.cache
def _grid_tables(grid: tuple[int, int], side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Interpolation indices and weights [P, 4] and row and column positions of one picture's patches."""
    thw = torch.tensor([[1, *grid]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge, kwargs={}
    )
    return indices, weights, get_vision_position_ids(thw, merge, kwargs={})


def vision_forward(visual: nn.Module, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features of equally large pictures. pixels [B, P, 768] (one frame; the reference repeats it): [B, P/4, H]."""
    indices, weights, positions = _grid_tables(grid, visual.num_grid_per_side, visual.spatial_merge_size)
    proj = visual.patch_embed.proj
    x = F.linear(pixels, proj.weight.sum(2).flatten(1), proj.bias)
    x = x + (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(x, positions)
    batch, count, width = x.shape
    for block in visual.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(batch, count, 3, attn.num_heads, -1).unbind(2)
        q, k = reference.apply_rotary_pos_emb_vision(q, k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + attn.proj(y.transpose(1, 2).reshape(batch, count, width))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.reshape(-1, width)).view(batch, count // 4, -1)


def trunk_forward(
    model: Qwen3_5MoeForConditionalGeneration,
    ids: Tensor,
    positions: Tensor,
    pictures: list[tuple[Tensor, tuple[int, int]]],
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Final hidden states and input embeddings [B, T, H], and picture features [B, N, H], of a right-padded batch.

    positions [3, B, T]; pictures as in `data.Batch`. With `wanted` [M], indices into the B*T tokens, the last layer's
    experts and the final norm run on those alone, and the hidden states are [M, H].
    """
    language = model.model.language_model
    embeddings = language.embed_tokens(ids)
    features = None
    if pictures:
        features = torch.cat([vision_forward(model.model.visual, *p) for p in pictures], dim=1)
        places = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(places, features)
    rotary = language.rotary_emb(embeddings, positions)
    last = language.layers[-1]
    hidden = embeddings
    for layer in language.layers[:-1]:
        hidden = layer(hidden, position_embeddings=rotary)
    if wanted is None:
        return language.norm(last(hidden, position_embeddings=rotary)), embeddings, features
    hidden = hidden + last.self_attn(last.input_layernorm(hidden), rotary, None)[0]
    count = wanted.numel()
    rows = torch.cat([wanted, wanted[:1].expand(-count % PART)])  # products of few sizes here, too
    hidden = hidden.flatten(0, 1)[rows][None]
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    return language.norm(hidden)[0, :count], embeddings, features


def draft_forward(
    model: Qwen3_5MoeForConditionalGeneration,
    mtp: MultiTokenPredictor,
    hidden: Tensor,
    embeddings: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draft hidden states [B, T-1, H]: row t predicts the token at t+2."""
    rotary = model.model.language_model.rotary_emb(hidden[:, :-1], positions[:, :, :-1])
    return mtp(hidden[:, :-1], embeddings[:, 1:], rotary)
