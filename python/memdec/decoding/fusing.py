"""A step of fewer kernels, for the families whose blocks are Llama's: what a GPU waits for when few rows are computed.

As transformers writes it, a block of Llama or Qwen is some forty kernels, most of which touch a few kilobytes and take
the time of their launch, in a CUDA graph as well. Here the model's forward is written out over its modules' weights:

    x, s = add_norm(mlp's output, s)            the sum of the residual goes along with the norm
    qkv  = x · (Wq, Wk, Wv)ᵀ                    one product
    q    = rotate_and_store(qkv)                keys and values go into their slots
    a    = attention(q, keys, values)           the query heads that share a key head are rows of one attention
    x, s = add_norm(a · Woᵀ, s)
    x    = silu_mul(x · (Wgate, Wup)ᵀ) · Wdownᵀ

That is nine kernels, ten where several tokens are read, and those into which cuBLAS splits a product. Of few rows a
product takes as long as its weights take to read, and what is done before and after it can be done on the way:

    qkv  = norm_linear(s, (Wq, Wk, Wv))
    a    = cached_attention(qkv, keys, values)
    s    = linear_add(a, Wo, s)
    x    = norm_gate_up(s, (Wgate, Wup))
    s    = linear_add(x, Wdown, s)

That is five; see :mod:`memdec.decoding.kernels` for all of them. For several weights to be one matrix, the modules'
parameters are moved, once, to where they lie one behind the other. They stay the parameters they are, of the same
values, and no second copy is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.dlpack import from_dlpack
from transformers.cache_utils import Cache

from memdec.decoding.cache import begin_without_prompt, can_roll_back
from memdec.decoding.kernels import (
    add_norm,
    cached_attention,
    fast_kernels,
    linear_add,
    norm_gate_up,
    norm_linear,
    rotate_and_store,
    silu_mul,
)

LOGGER = logging.getLogger(__name__)

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ACTIVATIONS = ("SiLUActivation", "SiLU")
FEW = 8  # rows, a token each, up to which products are bound by their weights
NEAR = 1024  # slots up to which a program looks at all of them; beyond, sdpa shares them out
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def fused_step(model: Any) -> FusedStep | None:
    """The model's fused step, its weights put side by side; None where it does not compute what such a step does."""
    if not qualifies(model):
        return None
    try:
        return FusedStep(model)
    except (RuntimeError, AttributeError) as problem:
        # Weights made in inference mode do not move outside of it, or there is no room, or this PyTorch cannot do it.
        LOGGER.debug("the steps of %s are not fused: %s", type(model).__name__, problem)
        return None


def qualifies(model: Any) -> bool:
    """Whether the model computes what :class:`FusedStep` does.

    It is a class of transformers' own of one of the FAMILIES, so that nothing is scaled or capped on the way, its parts
    are known by name and class, none is quantised, adapted or shared, and its attention is sdpa without windows.
    """
    family = model.config.model_type
    code = f"transformers.models.{family}.modeling_{family}"
    if FAMILIES.get(family) != type(model).__name__ or type(model).__module__ != code:
        return False
    if model.config._attn_implementation != "sdpa" or not can_roll_back(model):
        return False
    inner = model.model
    if not _has(model, ("model", "lm_head")) or not _has(inner, ("embed_tokens", "layers", "norm")):
        return False
    if type(inner.embed_tokens) is not nn.Embedding or len(inner.layers) != model.config.num_hidden_layers:
        return False
    if not _is_of(code, inner, inner.norm) or not all(_block_qualifies(block, code) for block in inner.layers):
        return False
    if any(2 * inner.rotary_emb.inv_freq.numel() != block.self_attn.head_dim for block in inner.layers):
        return False
    weights = [weight for part in (inner, model.lm_head) for weight in part.parameters()]
    joined = [[part.weight for parts in _products(block) for part in parts] for block in inner.layers]
    return (
        weights[0].is_floating_point()
        and all(type(weight) is nn.Parameter and weight.dtype == weights[0].dtype for weight in weights)
        and len({tuple(weight.shape for weight in block) for block in joined}) == 1
        and len({id(weight) for block in joined for weight in block}) == len(joined) * len(joined[0])
    )


class FusedStep:
    """A forward of few tokens of a model that :func:`qualifies`, behind what its cache holds.

    Args:
        model: whose weights are moved side by side; the parameters stay the same objects.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        attention = model.model.layers[0].self_attn
        self.dim: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // self.dim
        self.key_heads: int = attention.k_proj.out_features // self.dim
        self.group = self.heads // self.key_heads
        weight = model.lm_head.weight
        fast_kernels(weight.device, weight.dtype)  # what is tried is tried before a capture
        for block in model.model.layers:
            before = block.mlp.up_proj.weight.data_ptr()
            for parts in _products(block):
                side_by_side(parts)
            if weight.is_cuda and block.mlp.up_proj.weight.data_ptr() != before:
                torch.cuda.empty_cache()  # two pieces where the old weights lay are not room for the next ones

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,  # (B, n)
        positions: Tensor,  # (B, n)
        slots: Tensor,  # (B, n) int64, in [0, room)
        hidden: Tensor,  # (B, n, room) bool, True where a token does not look
        cache: Cache,  # of SlotLayers
    ) -> Tensor:
        """Logits (B, n, V) after each of the tokens, whose keys and values go into their slots."""
        logits: Tensor = self.model.lm_head(self.states(tokens, positions, slots, hidden, cache))
        return logits.view(*tokens.shape, -1)

    @torch.no_grad()
    def states(self, tokens: Tensor, positions: Tensor, slots: Tensor, hidden: Tensor, cache: Cache) -> Tensor:
        """What the head reads of the tokens (B·n, d): all of a step, for who needs no logits."""
        inner = self.model.model
        rows, count = tokens.shape
        x = inner.embed_tokens(tokens)
        cos, sin = inner.rotary_emb(x, positions)
        cos, sin = cos.expand(rows, -1, -1), sin.expand(rows, -1, -1)
        x = x.flatten(0, 1)
        few = rows * count <= FEW
        mask = None if few and hidden.shape[-1] <= NEAR else self.mask(hidden, x.dtype)
        residual: Tensor | None = None
        begin_without_prompt(cache, x, rows, self.key_heads, self.dim)
        for block, layer in zip(inner.layers, cache.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            before, after = block.input_layernorm, block.post_attention_layernorm
            query_key_value, gate_up = map(side_by_side, _products(block))
            if few:
                merged = norm_linear(x, before.weight, before.variance_epsilon, *query_key_value)
            else:
                x, residual = add_norm(x, residual, before.weight, before.variance_epsilon)
                merged = functional.linear(x, *query_key_value)
            given = (merged.view(rows, count, -1), cos, sin, slots, layer.keys, layer.values)
            if mask is None:
                attended = cached_attention(*given, hidden, attention.scaling, _norms(attention))
            else:
                queries = rotate_and_store(*given, _norms(attention))
                attended = self.attend(queries, layer.keys, layer.values, mask, attention.scaling)
            if few:
                x = linear_add(attended, attention.o_proj.weight, attention.o_proj.bias, x)
                gated = norm_gate_up(x, after.weight, after.variance_epsilon, *gate_up)
                x = linear_add(gated, mlp.down_proj.weight, mlp.down_proj.bias, x)
            else:
                x = functional.linear(attended, attention.o_proj.weight, attention.o_proj.bias)
                x, residual = add_norm(x, residual, after.weight, after.variance_epsilon)
                x = silu_mul(functional.linear(x, *gate_up))
                x = functional.linear(x, mlp.down_proj.weight, mlp.down_proj.bias)
        x, _ = add_norm(x, residual, inner.norm.weight, inner.norm.variance_epsilon)
        return x

    def mask(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the attention's scores: see :meth:`attend`."""
        rows, count, room = hidden.shape
        if self.group == 1:
            mask = torch.zeros(rows, 1, count, room, dtype=dtype, device=hidden.device)
            return mask.masked_fill_(hidden[:, None], -torch.inf)
        mask = torch.zeros(rows, self.key_heads, self.group, count, room, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden[:, None, None], -torch.inf)
        return mask.view(rows * self.key_heads, 1, self.group * count, room)

    def attend(
        self,
        queries: Tensor,  # (B, heads, n, dim)
        keys: Tensor,  # (B, key heads, room, dim)
        values: Tensor,  # (B, key heads, room, dim)
        mask: Tensor,  # (B, 1, n, room); with groups (B·key heads, 1, group·n, room)
        scale: float,
    ) -> Tensor:
        """Attention (B·n, heads·dim).

        The queries of a group of heads are rows on their key head, which is not copied for each; key heads are rows of
        the batch, so that what comes out for one token lies as the next product wants it.
        """
        rows, heads, count, dim = queries.shape
        if self.group > 1:
            queries = queries.view(rows * self.key_heads, 1, self.group * count, dim)
            keys, values = keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]
        out: Tensor = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(rows, heads, count, dim).transpose(1, 2).reshape(rows * count, heads * dim)


@torch.no_grad()
def side_by_side(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several linear layers as one; their parameters are moved where they do not lie so yet.

    What is returned does not keep the memory alive: the parameters do.
    """
    weight = _joined([part.weight for part in parts])
    return weight, None if parts[0].bias is None else _joined([part.bias for part in parts])


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """(Σ rows, …) of parameters (rows, …) that lie, or from now on lie, one behind the other."""
    first = parameters[0]
    rows = sum(len(parameter) for parameter in parameters)
    if not _are_adjacent(parameters):
        with torch.inference_mode(False):  # a tensor of that mode could not be trained any more
            merged = torch.cat([parameter.detach() for parameter in parameters])
            pieces = torch.split(merged, [len(parameter) for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                # By DLPack, for a storage of its own: who saves a model may take tensors of one storage for copies of
                # each other and leave all but one out (accelerate does).
                parameter.data = from_dlpack(piece)
    size = sum(parameter.nbytes for parameter in parameters)
    storage = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, size)
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(storage, 0, (rows, *first.shape[1:]), first.stride())


def _are_adjacent(parameters: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends."""
    first, place = parameters[0], parameters[0].data_ptr()
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.data_ptr() != place:
            return False
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            return False
        place += parameter.nbytes
    return True


def _products(block: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The linear layers of a block that read the same: of queries, keys and values, and of gate and up."""
    attention, mlp = block.self_attn, block.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)


def _norms(attention: Any) -> tuple[Tensor, Tensor, float] | None:
    """Weights of the norms of queries and keys and their ε, where there are such norms."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


def _block_qualifies(block: Any, code: str) -> bool:
    if not _has(block, ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")):
        return False
    attention, mlp = block.self_attn, block.mlp
    norms = [block.input_layernorm, block.post_attention_layernorm]
    if _has(attention, (*ATTENTION_PARTS, "q_norm", "k_norm")):
        norms += [attention.q_norm, attention.k_norm]
        if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
            return False
    elif not _has(attention, ATTENTION_PARTS):
        return False
    if not getattr(attention, "is_causal", True):
        return False
    if not _has(mlp, MLP_PARTS) or type(mlp.act_fn).__name__ not in ACTIVATIONS:
        return False
    linears = [getattr(attention, name) for name in ATTENTION_PARTS] + [getattr(mlp, name) for name in MLP_PARTS]
    return (
        _is_of(code, block, attention, mlp, *norms)
        and all(type(linear) is nn.Linear for linear in linears)
        and attention.o_proj.weight.is_contiguous()
        and mlp.down_proj.weight.is_contiguous()
        and all(len({part.bias is None for part in parts}) == 1 for parts in _products(block))
    )


def _has(module: Any, names: Sequence[str]) -> bool:
    """Whether the module's children with weights are those of the names."""
    return {name for name, child in module.named_children() if any(True for _ in child.parameters())} == set(names)


def _is_of(code: str, *modules: Any) -> bool:
    """Whether the modules' classes are those of transformers' file for the family."""
    return all(type(module).__module__ == code for module in modules)
