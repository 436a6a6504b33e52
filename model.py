"""The network: a Llama-style decoder with SmolLM3's choices, its arithmetic, its weights on disk, and how it writes text.

    python model.py                                   table of presets: parameters, KV cache, FLOPs, training memory
    python model.py out/base --prompt="def main("     stream text from a checkpoint
    python model.py out/grpo --chat                   talk to it; echo "12+34=" | python model.py out/grpo --chat works too
    python model.py out/base --prompt_file=FILE --num_samples=4 --json         a line per prompt in, a line per sample out
    python model.py out/grpo --export_hf=DIR          all that transformers needs; such a directory serves wherever a run does
    python model.py small --bench [--compile]         decoding speed on random weights, one JSON line

SmolLM3 (playbook, "Architecture choices") is Llama with four changes, each one line or two below:
  GQA    4 key/value heads serve 16 query heads: as good as full attention, a quarter of the KV cache
  NoPE   every 4th layer has no positional encoding (no_rope_layer_interval): helps long context, hardly costs at short
  docs   attention never crosses documents that share a row (doc_ids): neutral at 4k tokens, pays at 64k
  ties   one matrix is both embedding and head (tie_word_embeddings): 17 % of a 1B model saved at equal loss
Off by default, each a field of Config: sliding window, chunks, QK-norm, latent attention (MLA), experts (MoE).
Names are Hugging Face's, so that exporting is renaming. Shapes in comments: B rows, T tokens, S cached tokens,
H query heads, KV key/value heads, D head_dim, V vocabulary.
"""
import codecs, contextlib, copy, dataclasses, functools, json, math, sys, time, zipfile, zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from infra import Machine, atomic, cli, launch, peak_memory, read_log, setup, write_json


# --- shape -----------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """The shape of a network, under Hugging Face's names: what a checkpoint records."""
    vocab_size: int = 320                  # rows of the embedding; a multiple of 64
    hidden_size: int = 128                 # width of the residual stream
    intermediate_size: int = 512           # width of the SwiGLU MLP
    num_hidden_layers: int = 4             # blocks
    num_attention_heads: int = 4           # query heads
    num_key_value_heads: int = 2           # key/value heads: = query heads is MHA, 1 is MQA, between is GQA
    head_dim: int = 0                      # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256     # tokens in a training row
    rope_theta: float = 10_000.0           # base of the rotary angles; SmolLM3: 5e4 for rows of 4k, 2e6 for 32k, 5e6 for 64k
    rope_factor: float = 1.0               # YaRN: so many times longer rows than it was trained on; SmolLM3: 2, for 128k
    original_max_position_embeddings: int = 0  # YaRN: the row length that it was trained on; 0: the one before
    no_rope_layer_interval: int = 4        # every n-th layer has no RoPE (NoPE); 0: RoPE everywhere
    sliding_window: int = 0                # RoPE layers see only that many tokens, NoPE layers all; 0: off
    attention_chunk: int = 0               # RoPE layers see only their own chunk of so many positions (Llama 4); 0: off
    rms_norm_eps: float = 1e-6             # inside the square root of RMSNorm
    tie_word_embeddings: bool = True       # the head is the embedding matrix
    qk_norm: bool = False                  # RMSNorm on queries and keys, a remedy for growing attention logits
    kv_lora_rank: int = 0                  # MLA: of a token the cache holds so many numbers for all heads together; 0: off
    qk_rope_head_dim: int = 0              # MLA: dimensions of queries and keys beside head_dim, for RoPE; 0: head_dim / 2
    num_experts: int = 0                   # MoE: many small MLPs, of which a router picks a few for each token; 0: one MLP
    num_experts_per_tok: int = 2           # MoE: so many
    moe_intermediate_size: int = 0         # MoE: width of an expert; 0: intermediate_size / (experts that a token meets)
    num_shared_experts: int = 0            # MoE: experts that all tokens meet besides
    router_aux_loss_coef: float = 0.01     # MoE: weight of the loss that spreads tokens over the experts
    initializer_range: float = 0.02        # std of all matrices at the start

    def __post_init__(self):
        H, KV = self.num_attention_heads, self.num_key_value_heads
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "max_position_embeddings")
        for name in (f.name for f in dataclasses.fields(Config)):
            least = 1 if name in needed else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: {least} or more expected")
        if self.rope_theta <= 1 or self.rope_factor < 1:
            raise ValueError(f"rope_theta={self.rope_theta}, rope_factor={self.rope_factor}: more than 1, and 1 or more expected")
        if H % KV:
            raise ValueError(f"num_key_value_heads={KV}: a divisor of num_attention_heads={H} expected")
        if not self.head_dim and self.hidden_size % H:
            raise ValueError(f"hidden_size={self.hidden_size}: a multiple of num_attention_heads={H} or a head_dim expected")
        if self.rope_size % 2:
            name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
            raise ValueError(f"{name}={self.rope_size}: an even number expected: RoPE rotates pairs")
        if self.kv_lora_rank and self.qk_norm or self.qk_rope_head_dim and not self.kv_lora_rank:
            raise ValueError(f"kv_lora_rank={self.kv_lora_rank}, qk_rope_head_dim={self.qk_rope_head_dim}, "
                             f"qk_norm={self.qk_norm}: the second expected only with the first, the third only without")
        if self.num_experts and not (1 <= self.num_experts_per_tok <= self.num_experts and self.expert_size):
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: 1 to num_experts={self.num_experts} expected, "
                             f"which intermediate_size={self.intermediate_size} is enough for, or a moe_intermediate_size")

    def indivisible(self, tp):
        """Names of the sizes that `tp` ranks cannot share."""
        names = ["num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"]
        return [name for name in names + ["expert_size"] * (self.num_experts > 0) if getattr(self, name) % tp]

    @property
    def head_size(self):
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_size(self):
        """Dimensions of a head that RoPE rotates."""
        return (self.qk_rope_head_dim or self.head_size // 2) if self.kv_lora_rank else self.head_size

    @property
    def expert_size(self):
        """Width of an expert: unless it is given, a token's experts are together as wide as the one MLP that they replace."""
        return self.moe_intermediate_size or self.intermediate_size // (self.num_experts_per_tok + self.num_shared_experts)

    def uses_rope(self, layer):
        """Layers are counted from 0; with interval 4 the NoPE layers are 3, 7, 11, ..."""
        return not self.no_rope_layer_interval or (layer + 1) % self.no_rope_layer_interval != 0


def _shape(hidden, ffn, layers, heads, kv, vocab, context, theta, nope=0):
    return dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=context, rope_theta=theta,
                no_rope_layer_interval=nope)


PRESETS = {
    "nano": {},                                                                # the default: 1M, minutes on a laptop
    "small": _shape(256, 768, 6, 4, 2, 320, 256, 50_000.0, 4),                 # 4.8M, the shape of our speed figures
    "smol-135m": _shape(576, 1536, 30, 9, 3, 49152, 2048, 100_000.0),          # SmolLM2-135M
    "smol-360m": _shape(960, 2560, 32, 15, 5, 49152, 2048, 100_000.0),         # SmolLM2-360M
    "smol-1.7b": _shape(2048, 8192, 24, 32, 32, 49152, 2048, 130_000.0),       # SmolLM2-1.7B
    "ablation-1b": _shape(2048, 8192, 16, 32, 8, 128256, 4096, 50_000.0),      # the playbook's baseline: Llama-3.2-1B
    "smollm3-3b": _shape(2048, 11008, 36, 16, 4, 128256, 4096, 50_000.0, 4),
}


# --- tensor parallelism (Megatron-LM, arXiv 1909.08053) --------------------------------------------------------------
# `tp` is a process group, or None. Its ranks share one model, read the same batch and hold a slice of every matrix, p.tp_dim
# telling of which dimension: q, k, v, gate, up keep some outputs (0), o, down some inputs (1), embedding and head some of the
# vocabulary (0); norms are whole on every rank (None). Two functions move all the data. With tp None they do nothing.

class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place, and autograd may share grad
        dist.all_reduce(grad, group=ctx.tp)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=tp)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def tp_copy(x, tp):
    """Megatron's f, where ranks start to differ: the same x on all of them, whose gradients are parts that must be summed."""
    return x if tp is None else _Copy.apply(x, tp)


def tp_sum(x, tp):
    """Megatron's g, where they become equal again: parts are summed, and the sum's gradient is that of every part."""
    return x if tp is None else _Sum.apply(x, tp)


def shard(full, tp_dim, tp):
    """This rank's slice of a tensor."""
    return full if tp is None or tp_dim is None else full.chunk(tp.size(), tp_dim)[tp.rank()]


def unshard(slices, tp_dims, tp):
    """The way back for a list of tensors, in one all-gather; every rank of tp gets all of them whole."""
    if tp is None or not slices:
        return slices
    mine = torch.cat([x.flatten() for x in slices])
    everyone = [torch.empty_like(mine) for _ in range(tp.size())]
    dist.all_gather(everyone, mine, group=tp)
    parts = zip(*(flat.split([x.numel() for x in slices]) for flat in everyone))
    return [x if d is None else torch.cat([p.view_as(x) for p in ranks], d) for x, d, ranks in zip(slices, tp_dims, parts)]


# --- network ---------------------------------------------------------------------------------------------------------

def matrix(rows, columns, tp, tp_dim):
    """A parameter for this rank's slice of (rows, columns), its values still to come."""
    shape = [rows, columns]
    if tp_dim is not None:
        shape[tp_dim] //= tp.size() if tp else 1
    parameter = nn.Parameter(torch.empty(shape))
    parameter.tp_dim = tp_dim
    return parameter


class Linear(nn.Module):
    """No bias. The master weight stays float32 for the optimizer and is cast to the activations' dtype on use."""

    def __init__(self, inputs, outputs, tp, tp_dim):
        super().__init__()
        self.weight = matrix(outputs, inputs, tp, tp_dim)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """A rank finds the vectors of its part of the vocabulary, zeros for the rest: the sum over ranks has them all."""

    def __init__(self, size, width, tp):
        super().__init__()
        self.weight, self.tp = matrix(size, width, tp, 0), tp

    def forward(self, ids, dtype):
        if self.tp is None:
            return F.embedding(ids, self.weight).to(dtype)
        at, mine = self.mine(ids)
        return tp_sum(F.embedding(at, self.weight).to(dtype) * mine[..., None], self.tp)

    def mine(self, ids):
        """ids -> (rows of this rank's slice, whether they are in it); row 0 where they are not."""
        at = ids - (0 if self.tp is None else self.tp.rank() * len(self.weight))
        mine = (at >= 0) & (at < len(self.weight))
        return at.masked_fill(~mine, 0), mine


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467). tp: where every rank norms its own heads with one weight."""

    def __init__(self, size, eps, tp=None):
        super().__init__()
        self.weight, self.eps, self.tp = nn.Parameter(torch.ones(size)), eps, tp
        self.weight.tp_dim = None

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, tp_copy(self.weight, self.tp).to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """RoPE (arXiv 2104.09864) on x (B, T, heads, D). Half-rotation: dimension i pairs with i + D/2, as Hugging Face does;
    cos holds each angle twice, sin with a minus in the first half."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def yarn(inverse, c):
    """YaRN (arXiv 2309.00071): angles per token (D/2,) -> theirs for rows c.rope_factor times as long, and what cos and sin are
    multiplied by. Pairs that turn less than once in a row of training are slowed down to see nothing new; those that turn 32
    times stay, for they tell neighbours apart; between the two a ramp. Longer rows spread attention: the factor sharpens it."""
    half, n = len(inverse), c.original_max_position_embeddings or c.max_position_embeddings / c.rope_factor
    pair = lambda turns: half * math.log(n / (2 * math.pi * turns)) / math.log(c.rope_theta)  # which one makes so many
    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), 2 * half - 1)
    slow = ((torch.arange(half, device=inverse.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse * (1 - slow + slow / c.rope_factor), 0.1 * math.log(c.rope_factor) + 1


def attend(q, k, v, mask):
    """softmax(q kᵀ / √D) v. q (B, H, T, D); k, v (B, KV, S, D), the queries being the last T of S places. `mask`:

    None: plain causal. Bool (B or 1, 1, T, S), True = visible: torch's SDPA. Float, 0 or -inf: SDPA on GPUs, on CPUs
    `attend_by_hand`.
    """
    (B, H, T, D), KV = q.shape, k.shape[1]
    if mask is not None and mask.is_floating_point() and q.is_cpu:
        return attend_by_hand(q, k, v, mask)
    if q.is_cuda and KV != H and mask is not None and T == 1:  # decoding: a group's heads are queries of one
        return attend(q.reshape(B, KV, -1, D), k, v, mask.repeat(1, 1, H // KV, 1)).reshape(B, H, 1, -1)
    if q.is_cuda and KV != H and (mask is not None or q.dtype == torch.float32):  # no kernel groups heads then
        k, v = k.repeat_interleave(H // KV, dim=1), v.repeat_interleave(H // KV, dim=1)
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                          enable_gqa=k.shape[1] != H).to(q.dtype)


def attend_by_hand(q, k, v, bias):
    """The same for CPUs, where SDPA is slow at what small models need. Training, 32 rows of 64, 4 heads, forward and
    backward: 11.9 ms there, 1.7 ms here. Decoding, one query a row: 0.15 ms there, 0.1 ms here on a float32 cache.

    The query heads of a group are stacked along T, so no key or value is repeated. Two blocks of queries: the first never
    meets the keys that only the second may see, and a quarter of a square of scores is left out.
    """
    B, H, T, D = q.shape
    KV, S, size, parts = k.shape[1], k.shape[2], -(-T // 2), []
    k, v, queries = k.reshape(B * KV, S, D), v.reshape(B * KV, S, D), (q * D**-0.5).to(k.dtype)
    queries = queries.reshape(B * KV, H // KV, T, D)
    for i in range(0, T, size):
        j = min(i + size, T)
        seen = S - T + j
        rows = queries[:, :, i:j].reshape(B * KV, -1, D)  # (B KV, H/KV (j - i), D)
        scores = torch.bmm(rows, k[:, :seen].transpose(1, 2)).view(B, H, j - i, seen) + bias[:, :, i:j, :seen]
        parts.append(torch.bmm(scores.softmax(dim=-1).view(B * KV, -1, seen), v[:, :seen]).view(B, H, j - i, D))
    return torch.cat(parts, dim=2).to(q.dtype)


def near(i, j, first, window, chunk):
    """Is place j within the window of place i, and in the same chunk, counted from place `first`?"""
    keep = True
    if window:
        keep = i - j < window
    if chunk:
        keep = keep & ((i - first) // chunk == (j - first) // chunk)
    return keep


def visible(T, device, doc_ids=None, window=0, chunk=0):
    """Who may look at whom: bool (B or 1, T, T): not the future, not other documents, not beyond the window or the chunk. A
    document's first chunk begins with it, so that a packed document is what it is alone."""
    i, first = torch.arange(T, device=device), 0
    if chunk and doc_ids is not None:
        first = (i * F.pad(doc_ids.diff(dim=1) != 0, (1, 0))).cummax(dim=1).values[..., None]  # (B, T, 1)
    keep = (i[:, None] >= i) & near(i[:, None], i, first, window, chunk)
    return keep[None] if doc_ids is None else keep & (doc_ids[:, :, None] == doc_ids[:, None, :])


def as_bias(keep, dtype):
    """Bool mask -> 0 where True, -inf where False."""
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -math.inf)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H query heads share KV heads of keys and values; no biases."""

    def __init__(self, config, layer, tp):
        super().__init__()
        d, D = config.hidden_size, config.head_size
        self.head_dim, self.use_rope, self.tp = D, config.uses_rope(layer), tp
        self.q_proj = Linear(d, config.num_attention_heads * D, tp, 0)
        self.k_proj = Linear(d, config.num_key_value_heads * D, tp, 0)
        self.v_proj = Linear(d, config.num_key_value_heads * D, tp, 0)
        self.o_proj = Linear(config.num_attention_heads * D, d, tp, 1)
        self.q_norm = RMSNorm(D, config.rms_norm_eps, tp) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps, tp) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, masks, cache=None):
        """x (B, T, d). cache: (keys, values, at): two (B, KV, capacity, D), and the places (T,) that this call fills; the
        mask says how many places are read. Under tensor parallelism H and KV are this rank's heads."""
        B, T, _ = x.shape
        x = tp_copy(x, self.tp)
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, KV, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        mask = masks[0] if self.use_rope else masks[1]
        if self.use_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            keys, values, at = cache
            keys[:, :, at], values[:, :, at] = k.to(keys.dtype), v.to(values.dtype)
            S = mask.shape[-1]
            k, v = keys[:, :, :S], values[:, :, :S]
        y = attend(q, k, v, mask)
        return tp_sum(self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), self.tp)


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, arXiv 2405.04434), its queries not compressed. A token's keys and values in all heads are made from one
    vector, the latent c (r numbers), by matrices: k = K c, v = V c. Only c is cached, for q · K c = (Kᵀ q) · c: when decoding,
    the heads look at the latents themselves, as in MQA. A rotation between q and K would forbid that, so RoPE has R dimensions
    of its own, whose key all heads share; layers without RoPE do not rotate them."""

    def __init__(self, config, layer, tp):
        super().__init__()
        d, H, D, r, R = config.hidden_size, config.num_attention_heads, config.head_size, config.kv_lora_rank, config.rope_size
        self.sizes, self.use_rope, self.tp = (D, r, R), config.uses_rope(layer), tp
        self.q_proj = Linear(d, H * (D + R), tp, 0)
        self.kv_a_proj_with_mqa = Linear(d, r + R, tp, None)  # every rank makes the whole latent
        self.kv_a_layernorm = RMSNorm(r, config.rms_norm_eps)
        self.kv_b_proj = matrix(H * 2 * D, r, tp, 0)  # K and V of each head
        self.o_proj = Linear(H * D, d, tp, 1)

    def forward(self, x, rope, masks, cache=None):
        """x (B, T, d). cache: (latents and RoPE keys (B, 1, capacity, r + R), the places (T,) that this call fills)."""
        (B, T, _), (D, r, R), up = x.shape, self.sizes, self.kv_b_proj.to(x.dtype)
        q, q_rope = self.q_proj(tp_copy(x, self.tp)).view(B, T, -1, D + R).transpose(1, 2).split((D, R), dim=-1)  # (B, H, T, ·)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((r, R), dim=-1)  # (B, 1, T, r), (B, 1, T, R)
        mask = masks[0] if self.use_rope else masks[1]
        if self.use_rope:
            rope = [angles.transpose(-2, -3) for angles in rope]
            q_rope, k_rope = rotate(q_rope, *rope), rotate(k_rope, *rope)
        latent = tp_copy(torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1), self.tp)
        if cache is None:
            k, v = F.linear(latent[:, 0, :, :r], up).view(B, T, -1, 2 * D).transpose(1, 2).split(D, dim=-1)  # (B, H, T, D)
            k = torch.cat((k, latent[..., r:].expand(-1, k.shape[1], -1, -1)), dim=-1)
            y = attend(torch.cat((q, q_rope), dim=-1), k, F.pad(v, (0, R)), mask)[..., :D]  # fused kernels want v as long as k
        else:
            latents, at = cache
            latents[:, :, at] = latent.to(latents.dtype)
            seen, up = latents[:, :, : mask.shape[-1]], up.view(-1, 2, D, r)
            q = torch.cat((torch.einsum("bhtd,hdr->bhtr", q, up[:, 0]), q_rope), dim=-1)
            y = attend(q * ((r + R) / (D + R)) ** 0.5, seen, seen, mask)[..., :r]  # attend divides by √(r + R): undone
            y = torch.einsum("bhtr,hdr->bhtd", y, up[:, 1])
        return tp_sum(self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), self.tp)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, d, size, tp):
        super().__init__()
        self.tp = tp
        self.gate_proj = Linear(d, size, tp, 0)
        self.up_proj = Linear(d, size, tp, 0)
        self.down_proj = Linear(size, d, tp, 1)

    def part(self, x):
        """This rank's summand."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x, routed=None):
        return tp_sum(self.part(tp_copy(x, self.tp)), self.tp)


class MoE(nn.Module):
    """Mixture of experts (DeepSeekMoE, arXiv 2401.06066): a token goes through the k of N small MLPs that the router finds
    likeliest, weighted with those probabilities, and through the shared ones. A rank of tp has a slice of every expert."""

    def __init__(self, config, tp):
        super().__init__()
        d, N, size, shared = config.hidden_size, config.num_experts, config.expert_size, config.num_shared_experts
        self.k, self.tp, self.gate = config.num_experts_per_tok, tp, Linear(d, N, tp, None)
        self.experts = nn.ModuleList(MLP(d, size, tp) for _ in range(N))
        self.shared_experts = MLP(d, shared * size, tp) if shared else None

    @torch.compiler.disable  # an expert gets as many tokens as it happens to: no shapes for a graph
    def forward(self, x, routed=None):
        """x (B, T, d). The list `routed` receives (B, T, 2, N): 1 for each chosen expert, and all probabilities."""
        p = self.gate(x.float()).softmax(dim=-1)  # (B, T, N); in float32, for the larger of two decides
        weight, chosen = p.topk(self.k)  # (B, T, k)
        if routed is not None:
            routed.append(torch.stack((torch.zeros_like(p).scatter(-1, chosen, 1), p), dim=-2))
        x, weight = tp_copy(x, self.tp), tp_copy(weight, self.tp).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)  # (B T k,) places of (token, choice), expert by expert
        queues = x.flatten(0, 1)[order // self.k].split(chosen.flatten().bincount(minlength=len(self.experts)).tolist())
        y = torch.cat([expert.part(queue) for expert, queue in zip(self.experts, queues)])[order.argsort()]
        y = (y.view(*chosen.shape, -1) * weight[..., None]).sum(dim=-2)  # (B, T, d)
        return tp_sum(y if self.shared_experts is None else y + self.shared_experts.part(x), self.tp)


class Block(nn.Module):
    """Pre-norm residual block: attention, then the MLP."""

    def __init__(self, config, layer, tp):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, tp) if config.num_experts else MLP(config.hidden_size, config.intermediate_size, tp)

    def forward(self, x, rope, masks, cache=None, routed=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, masks, cache)
        return x + self.mlp(self.post_attention_layernorm(x), routed)


class Transformer(nn.Module):
    """compute_dtype is the activations' dtype, float32 unless the caller sets it; parameters are float32, logits too.

    With tp every rank draws its own slices of the matrices, so the ranks' random numbers must differ: see infra.setup.
    """

    compute_dtype = torch.float32

    def __init__(self, config, tp=None, init=True):
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size=0: the tokenizer's vocab_size expected")
        for name in config.indivisible(tp.size()) if tp is not None else ():
            raise ValueError(f"--tp={tp.size()}: a divisor of {name}={getattr(config, name)} expected")
        self.config, self.tp = config, tp
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(Block(config, i, tp) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, tp, 0)
        for p in self.parameters() if init else ():  # one plain normal for all: OLMo 2 found it steadier than scaled schemes
            if p.dim() == 2:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, ids, doc_ids=None, targets=None, reduction="sum", temperature=1.0):
        """ids (B, T) -> logits (B, T, V), float32.

        doc_ids (B, T), any integers: tokens see only their own document (rows hold several, packed end to end).
        targets (B, T), -100 = not counted: instead of logits return two sums over the counted tokens, (nll, z):
        -log p(target) in nats, and logsumexp², the z-loss (PaLM, arXiv 2204.02311) that keeps logits from drifting.
        Sums, not means: only the caller knows how many tokens the whole step has. reduction "none": instead of the sums
        log p(target) at `temperature`, (B, T), 0 where it is not counted: for losses by token or by row.
        With experts the sums are three, the last (L, 2, N): how often each was chosen, and its probabilities (see `balance`).
        """
        x, routed = self.embed_tokens(ids, self.compute_dtype), []
        rope, masks = self.rope(torch.arange(ids.shape[1], device=ids.device)), self.masks(x, doc_ids)
        for layer in self.layers:
            x = layer(x, rope, masks, routed=routed)
        if targets is None:
            return self.logits(x)
        if reduction != "sum":
            return self.counted_logps(x, targets, temperature)
        sums = self.loss_sums(x, targets)
        return (*sums, torch.stack([each[targets != -100].sum(0) for each in routed])) if routed else sums

    def rope(self, positions):
        """positions (T,) or (B, T) -> cos, sin (.., 1, D). Angles need float32: bf16 cannot tell 60,000 from 60,001."""
        c, half = self.config, self.config.rope_size // 2
        inverse, scale = c.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half), 1.0
        if c.rope_factor > 1:
            inverse, scale = yarn(inverse, c)
        angle = positions[..., None, None].float() * inverse
        cos, sin = angle.cos() * scale, angle.sin() * scale
        return torch.cat((cos, cos), -1).to(self.compute_dtype), torch.cat((-sin, sin), -1).to(self.compute_dtype)

    def masks(self, x, doc_ids):
        """(mask of RoPE layers, mask of NoPE layers), made once for all layers in the form `attend` runs fastest here."""
        T, window, chunk = x.shape[1], self.config.sliding_window, self.config.attention_chunk
        by_hand = x.device.type == "cpu" and torch.is_grad_enabled() and T <= 1024  # beyond, T x T scores fill the RAM
        if not by_hand and doc_ids is None and not 0 < window < T and not 0 < chunk < T:
            return None, None
        made = {limits: visible(T, x.device, doc_ids, *limits)[:, None] for limits in ((window, chunk), (0, 0))}
        if by_hand or x.is_cuda:  # there SDPA would make a float mask of a bool one in each layer, and keep all of them
            made = {limits: as_bias(m, x.dtype) for limits, m in made.items()}
        return made[window, chunk], made[0, 0]

    def own_logits(self, x):
        """(B, T, this rank's part of V), float32."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(tp_copy(self.norm(x), self.tp), weight.to(x.dtype)).float()

    def logits(self, x):
        logits, V = self.own_logits(x), self.config.vocab_size
        if self.tp is None:
            return logits
        n = logits.shape[-1]  # each rank fills in its columns, and the sum has them all
        return tp_sum(F.pad(logits, (n * self.tp.rank(), V - n * (self.tp.rank() + 1))), self.tp)

    def loss_sums(self, x, targets):
        logp, lse = self.logps(x, targets)
        return -logp.sum(), lse.square().sum()

    def balance(self, usage, whole):
        """The load-balance loss of Switch (arXiv 2101.03961), without which few experts take all: α N Σ f P, with f an expert's
        share of the choices, P its mean probability. Its gradient, through P, makes those in demand less likely. Per layer
        it is α if all are used alike (α / N in the playbook, which leaves out N) and α N / k if the same k always are.

        Both are of the whole step: `usage` (L, 2, N) is what forward has returned for some of its tokens, `whole` the sum of
        that over all of them. The result is a sum over those tokens, as nll is, to be divided by the same count."""
        share = whole[:, 0] / whole[:, 0].sum(dim=1, keepdim=True).clamp(min=1)
        return self.config.router_aux_loss_coef * self.config.num_experts * (share * usage[:, 1]).sum()

    def logps(self, x, targets, temperature=1.0):
        """log p(target) and the logsumexp of the logits, both of targets' shape and 0 where those are -100."""
        logits, counted = self.own_logits(x), targets != -100
        logits = logits if temperature == 1 else logits / temperature
        at, mine = self.embed_tokens.mine(targets)
        picked = logits.gather(-1, at[..., None])[..., 0]
        # log p = logit - logsumexp; logsumexp() takes up to twice as long, here on CPUs
        lse = picked - logits.log_softmax(dim=-1).gather(-1, at[..., None])[..., 0]
        target = picked * mine
        if self.tp is not None:  # logsumexp over ranks; three numbers a token travel, not V
            top = lse.detach().clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.tp)
            total, target = tp_sum(torch.stack(((lse - top).exp(), target)), self.tp)
            lse = top + total.log()  # the true one: the z-loss of a logsumexp without `top` would not see logits grow
        return (target - lse).masked_fill(~counted, 0), lse.masked_fill(~counted, 0)

    def counted_logps(self, x, targets, temperature, most=2**26):
        """log p(target) (B, T), the head being run where targets count and nowhere else. At most `most` logits are kept at a
        time: with 128k tokens in the vocabulary they would be larger than the model, so the backward pass makes them anew."""
        counted = targets != -100
        x, picked = x[counted], targets[counted]  # (N, d), (N,)
        size, head = max(1, most // self.config.vocab_size), lambda x, y: self.logps(x, y, temperature)[0]
        parts = [head(x, picked)] if len(picked) <= size else [checkpoint(head, *part, use_reentrant=False)
                                                               for part in zip(x.split(size), picked.split(size))]
        return torch.zeros(targets.shape, device=x.device).masked_scatter(counted, torch.cat(parts))

    def step(self, ids, cache, at, positions, mask):
        """Next-token logits (B, V) after ids (B, T), whose keys and values are stored at places `at` (T,).

        cache: per layer what `cache_shapes` says, each (B, heads, capacity, size); positions (B, T) for RoPE; mask bool
        (B or 1, 1, T, S): who sees which of the first S places.
        """
        x, rope, masks = self.embed_tokens(ids, self.compute_dtype), self.rope(positions), [mask]
        window, chunk = self.config.sliding_window, self.config.attention_chunk
        if window or chunk:
            place = torch.arange(mask.shape[-1], device=ids.device)
            first = (at - positions)[:, None, -1:, None]  # (B, 1, 1, 1): before it there is padding
            masks.append(mask & near(at[:, None], place, first, window, chunk))
        if ids.is_cuda or ids.is_cpu and ids.shape[1] <= 1024:
            masks = [as_bias(m, cache[0][0].dtype) for m in masks]
        for layer, stored in zip(self.layers, cache):
            x = layer(x, rope, (masks[-1], masks[0]), (*stored, at))
        return self.logits(x[:, -1])


# --- arithmetic ------------------------------------------------------------------------------------------------------

def matrices(c, active=False):
    """(how many, inputs, outputs) of the matrices in a block; active: of those that one token meets."""
    d, q, kv, r = c.hidden_size, c.num_attention_heads * c.head_size, c.num_key_value_heads * c.head_size, c.kv_lora_rank
    attention = [(2, d, q), (2, d, kv)]
    if r:
        attention = [(1, d, q + c.num_attention_heads * c.rope_size), (1, d, r + c.rope_size), (1, r, 2 * q), (1, q, d)]
    if not c.num_experts:
        return [*attention, (3, d, c.intermediate_size)]
    experts = (c.num_experts_per_tok if active else c.num_experts) + c.num_shared_experts
    return [*attention, (1, d, c.num_experts), (3 * experts, d, c.expert_size)]


def num_params(c, active=False):
    """Parameters, tied matrices once; active: of experts only those that a token goes through."""
    layer = sum(n * i * o for n, i, o in matrices(c, active)) + 2 * c.hidden_size + 2 * c.head_size * c.qk_norm + c.kv_lora_rank
    return c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.num_hidden_layers * layer + c.hidden_size


def flops_per_token(c, seq_len):
    """Training FLOPs per token: 6 per active matmul parameter, plus attention 12·L·H·D·T (PaLM, appendix B: causality ignored;
    MLA's keys are longer)."""
    looked_up = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size  # an untied embedding multiplies nothing
    size = 2 * c.head_size + (c.rope_size if c.kv_lora_rank else 0)  # of a key and a value
    return 6 * (num_params(c, active=True) - looked_up) + 6 * c.num_hidden_layers * c.num_attention_heads * size * seq_len


def cache_shapes(c, tp=1):
    """(heads, size) of each tensor that a layer of one of `tp` ranks caches: keys and values, or latents with RoPE keys."""
    return [(1, c.kv_lora_rank + c.rope_size)] if c.kv_lora_rank else [(c.num_key_value_heads // tp, c.head_size)] * 2


def kv_bytes_per_token(c, bytes_per_element=2, tp=1):
    """Of one of `tp` ranks. Playbook, "Attention": 2 (keys and values) · L · KV · D elements; MLA: L · (latent + RoPE key)."""
    return c.num_hidden_layers * sum(heads * size for heads, size in cache_shapes(c, tp)) * bytes_per_element


def lora_params(c, rank):
    """Of adapters beside all matrices of the blocks, each rank · (inputs + outputs): sft.py's, and a router's and MLA's kv_b."""
    return c.num_hidden_layers * rank * sum(n * (i + o) for n, i, o in matrices(c))


def training_bytes(c, tokens, tp=1, lora_rank=0):
    """Memory of one process for a step on `tokens` tokens, by part; an estimate, not a promise. states: weights, gradients, two
    Adam moments in fp32 and the weights in bf16, 18 B a parameter. activations: what the backward pass needs in bf16, nothing
    recomputed (counted as Korthikanti et al., arXiv 2205.05198, do for GPT). logits: 16 B each, as measured. lora_rank: adapters
    alone have states; the model is frozen, in bf16."""
    q, kv = c.num_attention_heads * c.head_size, c.num_key_value_heads * c.head_size
    attention = (2 * q + 2 * kv) / tp
    if c.kv_lora_rank:
        attention = 2 * (c.kv_lora_rank + c.rope_size) + (5 * q + 4 * c.num_attention_heads * c.rope_size) / tp
    mlp = 4 * c.intermediate_size / tp
    if c.num_experts:
        k, shared = c.num_experts_per_tok, c.num_shared_experts  # the router's float32; inputs and outputs of the experts
        mlp = 2 * (c.hidden_size + c.num_experts) + 2 * k * c.hidden_size + 4 * (k + shared) * c.expert_size / tp
    block = 2 * (4 * c.hidden_size + attention + mlp)
    states = 2 * num_params(c) + 18 * lora_params(c, lora_rank) if lora_rank else 18 * num_params(c)
    return dict(states=states / tp, activations=c.num_hidden_layers * block * tokens,
                logits=16 * c.vocab_size / tp * tokens)


# --- generation ------------------------------------------------------------------------------------------------------

def inference_copy(model):
    """The model with its weights in compute_dtype, so that no forward pass casts them anew; nothing else is different."""
    cast = [p for name, p in model.named_parameters() if p.dtype != model.compute_dtype and not name.endswith(".gate.weight")]
    if not cast:  # routers do not count: they are used in float32
        return model
    weights = {id(p): nn.Parameter(p.detach().to(model.compute_dtype)) for p in cast}
    return copy.deepcopy(model, weights | {id(model.tp): model.tp})  # none in float32; a process group has no copies


def sample(logits, u, temperature, top_k, top_p):
    """logits (B, V) float32, u (B,) uniform in [0, 1) -> ids (B,), their log-probs (B,).

    The log-prob is that of the full softmax at this temperature (at 1 when greedy): what a policy loss recomputes.
    """
    logp = (logits / temperature if temperature > 0 else logits).log_softmax(dim=-1)
    if temperature == 0:
        ids = logp.argmax(dim=-1, keepdim=True)
    else:
        p = logp.exp()
        if top_k:
            p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1])).values[:, -1:], 0)
        if top_p < 1:  # the smallest set of likeliest tokens that holds top_p: drop what comes after it is full
            ordered, order = p.sort(dim=-1, descending=True)
            tail = ordered.cumsum(dim=-1) - ordered >= top_p * ordered.sum(dim=-1, keepdim=True)
            p = p.masked_fill(tail.scatter(-1, order, tail), 0)
        cdf = p.cumsum(dim=-1)
        ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return ids[:, 0], logp.gather(-1, ids)[:, 0]


# A compiled graph of many small kernels spends a tenth of its time between them: call them from C++, without checks.
CPU_COMPILE = {"cpp_wrapper": True, "size_asserts": False}


@torch.no_grad()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(), seed=0, compile=False):
    """Yield for each new token a list of (row, id, logprob): of the rows that have met no stop id. Arguments: see `generate`.

    Prompts of unequal length are aligned at their last token. Padding on the left is a document of its own, so nothing
    sees it, and each row counts its positions from its own first token: a row gets what it would get alone. Equal prompts are
    read once. Finished rows leave the batch when they are an eighth of it, for taking them out copies the cache.
    """
    B, device, c, stop = len(prompts), model.embed_tokens.weight.device, model.config, set(stop_ids)
    longest = max(map(len, prompts))
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature and top_k of 0 or more, "
                         f"top_p above 0 and at most 1 expected")
    for i, p in enumerate(prompts):
        if not p or min(p) < 0 or max(p) >= c.vocab_size:
            raise ValueError(f"prompt {i}: at least one token, all in 0..{c.vocab_size - 1} expected")
    seeds = [(seed, i) for i in range(B)] if isinstance(seed, int) else seed
    u = np.stack([np.random.default_rng(s).random(max_new_tokens, np.float32) for s in seeds])
    u = torch.from_numpy(u).to(device)  # (B, new): a row's luck depends on its own seed alone
    numbers = {p: n for n, p in enumerate(dict.fromkeys(map(tuple, prompts)))}  # distinct prompts, P of them
    copies = torch.tensor([numbers[tuple(p)] for p in prompts], device=device)  # (B,): which one a row continues
    pad = torch.tensor([longest - len(p) for p in numbers], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in numbers], device=device)  # (P, longest)
    model = inference_copy(model)

    # on a CPU a frozen step is a sixth faster with a float32 cache (32 rows), a compiled policy with half the bytes (64 rows)
    wide = device.type == "cpu" and compile is not True
    capacity, dtype = longest + max_new_tokens, torch.float32 if wide else model.compute_dtype
    shapes = [(len(numbers), heads, longest, size) for heads, size in cache_shapes(c, model.tp.size() if model.tp else 1)]
    cache = [[torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in model.layers]
    place = torch.arange(capacity, device=device)
    positions, real = (place - pad[:, None]).clamp(min=0), (place >= pad[:, None])[:, None, None]  # (P, 1, 1, capacity)
    mask = visible(longest, device, real[:, 0, 0, :longest].long())[:, None]  # the prompts, all at once
    logits = model.step(ids, cache, place[:longest], positions[:, :longest], mask)
    new, logp = sample(logits[copies], u[:, 0], temperature, top_k, top_p)
    cache = [[F.pad(x[copies], (0, 0, 0, max_new_tokens)) for x in kv] for kv in cache]
    positions, real = positions[copies], real[copies]
    step = compiled_advance(device.type, compile == "frozen") if compile else advance
    rows = list(range(B))  # which prompt each row of the batch continues; None: it has met a stop id
    for S in range(longest, capacity):
        tokens = new.tolist()
        yield [(row, t, p) for row, t, p in zip(rows, tokens, logp.tolist()) if row is not None]
        rows = [None if t in stop else row for row, t in zip(rows, tokens)]
        keep = [i for i, row in enumerate(rows) if row is not None]
        if not keep or S == capacity - 1:
            return
        if len(keep) <= 7 / 8 * len(rows) and not compile:  # a compiled step keeps its shape
            rows, keep = [rows[i] for i in keep], torch.tensor(keep, device=device)
            new, u, positions, real = new[keep], u[keep], positions[keep], real[keep]
            cache = [[x[keep] for x in kv] for kv in cache]
        mask = real[..., : S + 1].contiguous()
        if compile:
            torch._dynamo.mark_dynamic(mask, 3)  # the cache keeps its shape, only how much of it is read grows
        new, logp = step(model, new[:, None], cache, place[S : S + 1], positions[:, S : S + 1], mask, u[:, S - longest + 1],
                         temperature, top_k, top_p)


def advance(model, ids, cache, at, positions, mask, u, temperature, top_k, top_p):
    """One token further: see `Transformer.step` and `sample`."""
    return sample(model.step(ids, cache, at, positions, mask), u, temperature, top_k, top_p)


@functools.cache
def compiled_advance(device_type, frozen):
    """`advance` compiled, half a minute. On a CPU weights may be frozen into it, packed for the matrix units: for one model
    that writes many tokens, not for a policy that changes at every step."""
    if device_type != "cpu":
        return torch.compile(advance)
    torch._inductor.config.freezing = frozen  # must be global: the front end looks at it too
    tuned = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"} if frozen else {}
    return torch.compile(advance, options={**tuned, **CPU_COMPILE})


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(), seed=0, compile=False):
    """Continue each prompt with a KV cache -> list of (ids, logprobs), two lists per prompt.

    prompts: lists of token ids, lengths may differ. temperature 0 is greedy. ids end with the first of stop_ids, which
    belongs to the completion: a policy that never trains its stop token cannot learn to be brief.
    seed: one int, or one per prompt; a row's samples depend only on its own seed and place, not on its neighbours.
    compile: True, or "frozen" where the weights will not change.
    """
    result = [([], []) for _ in prompts]
    if prompts and max_new_tokens > 0:
        for step in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, seed, compile):
            for row, token, logp in step:
                result[row][0].append(token), result[row][1].append(logp)
    return result


# --- checkpoints -----------------------------------------------------------------------------------------------------

def checkpoints(directory):
    """Checkpoint files in a run directory, newest first."""
    return sorted(Path(directory).glob("ckpt_*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)


def save_checkpoint(directory, model, step=0, consumed_samples=0, stage="base", tokenizer="bytes", optimizer=None,
                    train_config=None, monitor=None, keep=2, lora=None):
    """Write ckpt_<step>.pt (atomically) and then delete all but the newest `keep`. Every rank of model.tp calls, one writes.

    A dict of tensors and plain types: full float32 weights, so that any later stage, layout or program can read it.
    optimizer: {parameter name: {state name: tensor}}; monitor: what the training loop remembers besides (tensors, plain
    types). lora: scale, and base and crc of the file that the adapters belong to; then only they, what is trained, are
    written. Two are kept, for the newest may turn out to be unreadable.
    """
    weights = {n: unshard([p.detach()], [p.tp_dim], model.tp)[0].to("cpu", torch.float32)
               for n, p in model.named_parameters() if p.requires_grad or not lora}
    if model.tp is not None and model.tp.rank():
        return
    state = dict(model=weights, model_config=dataclasses.asdict(model.config), tokenizer=tokenizer, optimizer=optimizer or {},
                 step=step, consumed_samples=consumed_samples, stage=stage, train_config=train_config or {},
                 monitor=monitor or {}, lora=lora or {})
    path = Path(directory) / f"ckpt_{step:08d}.pt"
    try:
        with atomic(path) as f:
            torch.save(state, f)
    except RuntimeError as e:  # torch's own word for a failed write, with the reason behind it
        raise OSError(f"{path} cannot be written: {e.__context__ or e}") from None
    for old in checkpoints(directory)[keep:]:
        old.unlink()
    return path


def read_checkpoint(directory, fold=True):
    """Newest readable checkpoint in a run directory (or one .pt file) -> the dict that save_checkpoint wrote, and its own
    path and crc; of a Hugging Face directory the same. fold: adapters (LoRA) become part of the weights that they belong to."""
    files = [Path(directory)] if Path(directory).is_file() else checkpoints(directory)
    if files:
        state = next(filter(None, map(read_file, files)), None)
        if state is None:
            raise SystemExit(f"{directory}: none of the {len(files)} checkpoints is readable")
    elif any(Path(directory).glob("*.safetensors")):
        state = hf_checkpoint(directory)
    else:
        raise SystemExit(f"{directory}: no checkpoint (ckpt_*.pt) here: a directory written by train.py expected, or config.json "
                         f"and .safetensors")
    if fold and (state["model"] is None or state.get("lora")):
        state["model"] = load_checkpoint(state)[0].state_dict()
    return state


def read_file(path):
    """A checkpoint file -> its content, path and crc; None, and a warning, if it is none."""
    try:
        with zipfile.ZipFile(path) as z:  # torch does not look at the checksums that it writes
            if z.testzip():
                raise ValueError("checksum error")
            crc = zlib.crc32(repr([i.CRC for i in z.infolist()]).encode())
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # ranks of a machine share memory
        state["model"]  # without one it is none of ours
        return state | dict(path=str(path), crc=crc, model_config=Config(**state["model_config"]))
    except Exception as e:  # truncated, corrupt, foreign: half a dozen exception types
        print(f"WARNING: {path} is no readable checkpoint ({type(e).__name__}: {str(e)[:80]})", file=sys.stderr)


def empty_model(config, device, dtype, tp):
    """A model whose weights are still to come, made in `dtype`, so that nothing is ever float32 on the way."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(config, tp, init=False)
    finally:
        torch.set_default_dtype(default)


def load_checkpoint(directory, device="cpu", tp=None, dtype=torch.float32):
    """Newest readable checkpoint -> (model, or this rank's part of it over tp, its weights in dtype; what else is in the file).
    A Hugging Face directory is one too; so is what read_checkpoint has returned of either."""
    state = dict(directory) if isinstance(directory, dict) else read_checkpoint(directory, fold=False)
    config, weights, lora = state.pop("model_config"), state.pop("model"), state.get("lora")
    if lora:
        base = Path(state["path"]).parent / lora["base"]
        model, extra = load_checkpoint(base, device, tp, dtype)
        if extra["crc"] != lora["crc"]:
            raise SystemExit(f"{extra['path']}: not the file that the adapters in {state['path']} were trained on")
    elif weights is None:
        model = from_hf(state["path"], device, dtype, tp, config.vocab_size)
    else:
        model = empty_model(config, device, dtype, tp)
        model.load_state_dict({n: shard(weights.pop(n), p.tp_dim, tp) for n, p in model.named_parameters()} | weights)
    for n, p in model.named_parameters() if lora else ():
        if (b := f"{n[:-6]}lora_B") in weights:
            added = shard(lora["scale"] * weights[b] @ weights[b[:-1] + "A"], p.tp_dim, tp)
            p.data = (p.data.float() + added.to(p.device)).to(dtype)
    model.config = config  # what the caller may have extended, also where the weights came with a config of their own
    return model, state


# --- Hugging Face directories ----------------------------------------------------------------------------------------
# Names are theirs already: "model." in front, but for the head. What config.json says is honoured or refused, never ignored.

HF_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # no defaults
HF_DEFAULTS = {  # transformers': what a config.json leaves out
    "llama": dict(rope_theta=10_000.0, tie_word_embeddings=False, max_position_embeddings=2048, no_rope_layer_interval=0),
    "smollm3": dict(rope_theta=2_000_000.0, tie_word_embeddings=True, max_position_embeddings=32768, no_rope_layer_interval=4)}
HF_ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0, use_sliding_window=False,
               rope_interleaved=False, quantization_config=None)  # the only values that this network computes
HF_IRRELEVANT = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "dtype", "torch_dtype",
                 "transformers_version", "_name_or_path", "sliding_window", "max_window_layers", "pretraining_tp",
                 "is_llama_config", "transformers.js_config"}  # of no consequence for logits, given the values above
ROPE = ("rope_theta", "rope_factor", "original_max_position_embeddings")
HF_LACKS = ("qk_norm", "sliding_window", "attention_chunk", "kv_lora_rank", "num_experts")  # their SmolLM3 and Llama, that is
HF_DETAILS = ("qk_rope_head_dim", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "router_aux_loss_coef")


def hf_config(path):
    """config.json of transformers' SmolLM3ForCausalLM or LlamaForCausalLM -> Config, or one line on what it has that we lack."""
    try:
        return hf_fields(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"{path}: {type(e).__name__}: {e}: the config.json of a model_type {' or '.join(HF_DEFAULTS)} "
                         f"expected") from None


def hf_fields(path):
    """hf_config's work; what broken values raise is left to it."""
    def refuse(name, value, expected):
        raise SystemExit(f"{path}: {name}={json.dumps(value)}: {expected} expected")
    c = json.loads(Path(path).read_text(encoding="utf-8"))
    kind = c.pop("model_type")
    follow = ("num_key_value_heads", "head_dim")  # null: from the others
    c = HF_DEFAULTS[kind] | {name: value for name, value in c.items() if value is not None or name not in follow}
    c |= hf_rope(c, refuse)
    layers, types = c.pop("no_rope_layers", None), set(c.pop("layer_types", None) or ["full_attention"])
    c["no_rope_layer_interval"] = 0 if layers and all(layers) else c["no_rope_layer_interval"]  # 1: this layer has RoPE
    kinds = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in HF_LACKS + HF_DETAILS}
    for name, value in c.items():
        if name in HF_ONLY:
            if value != HF_ONLY[name]:
                refuse(name, value, json.dumps(HF_ONLY[name]))
        elif name in kinds:
            if not isinstance(value, (kinds[name], int)):
                refuse(name, value, kinds[name].__name__)
        elif name not in HF_IRRELEVANT:
            refuse(name, value, "nothing of that name")
    if missing := [name for name in HF_SHAPE if name not in c]:
        raise SystemExit(f"{path}: {', '.join(missing)} expected")
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    if c.get("head_dim", 0) * c["num_attention_heads"] == c["hidden_size"]:
        c["head_dim"] = 0  # as in our own
    config = Config(**{name: value for name, value in c.items() if name in kinds})
    if layers and layers != [int(config.uses_rope(i)) for i in range(config.num_hidden_layers)]:
        refuse("no_rope_layers", layers, "0 at every no_rope_layer_interval-th place, or nowhere,")
    if types != {"full_attention"}:
        refuse("layer_types", sorted(types), "full_attention")
    return config


def hf_rope(c, refuse):
    """Take the rotary embedding out of a config.json's fields -> Config's fields on it. rope_scaling is transformers 4's name."""
    given = {k: v for k in ("rope_scaling", "rope_parameters") for k, v in (c.pop(k, None) or {}).items() if v is not None}
    rest, trained = dict(given), c.pop("original_max_position_embeddings", None)
    result = dict(rope_theta=rest.pop("rope_theta", c["rope_theta"]), rope_factor=1.0)
    kinds = {rest.pop("rope_type", "default"), rest.pop("type", "default")} - {"default"}
    if kinds == {"yarn"}:
        trained = trained or rest.pop("original_max_position_embeddings", c["max_position_embeddings"])
        result |= dict(rope_factor=rest.pop("factor", 0), original_max_position_embeddings=trained)
        rest = {k: v for k, v in rest.items() if (k, v) not in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True))}
    if rest or kinds - {"yarn"} or "rope_factor" in c:
        refuse("rope_parameters", given, "rope_type default, or yarn with its factor and length and defaults besides,")
    return result


def _safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise SystemExit("Hugging Face directories: the package safetensors is not installed: pip install safetensors") from None


def hf_checkpoint(directory):
    """What read_checkpoint returns, of a Hugging Face directory; `model` is None, for only from_hf reads what it needs."""
    from data import JINJA, get_tokenizer  # only here: the tokenizer tells how many rows the embedding needs
    directory, crc = Path(directory), 0
    config = hf_config(directory / "config.json")
    for _, _, weight in hf_weights(directory):  # ends of each matrix: training changes all of them, and 6 GB would take seconds
        n = weight.get_shape()[0]
        for rows in (weight[:4], weight[max(0, n - 4):]):
            crc = zlib.crc32(rows.contiguous().view(torch.uint8).numpy(), crc)
    try:
        tokenizer = get_tokenizer(directory)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    if tokenizer.size > config.vocab_size:
        config.vocab_size = tokenizer.vocab_size
    template, settings, text = directory / "chat_template.jinja", directory / "tokenizer_config.json", ""
    if template.exists():
        text = template.read_text(encoding="utf-8", errors="replace")
    elif settings.exists():  # the older place
        text = str(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    marks = {JINJA["compact"]: "compact", "Reasoning Mode": "smollm3", "<|im_start|>": "chatml"}
    style = next((style for mark, style in marks.items() if mark in text), "")
    return dict(model=None, model_config=config, tokenizer=tokenizer.state, optimizer={}, step=0, consumed_samples=0, stage="hf",
                train_config=dict(style=style), monitor={}, lora={}, path=str(directory), crc=crc)


def hf_weights(directory):
    """Yield (file, name, an open safetensors slice) of each weight in a directory."""
    safetensors, files = _safetensors(), sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{directory}: no .safetensors here: the weights of a model expected")
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as f:  # the library checks the header against the file's size
                names = list(f.keys())
            for name in names:
                with safetensors.safe_open(file, "pt") as f:  # closed each time: the map gives its pages back
                    yield file, name, f.get_slice(name)
        except (safetensors.SafetensorError, OSError) as e:
            raise SystemExit(f"{file}: {e}: a whole safetensors file expected") from None


def from_hf(directory, device="cpu", dtype=torch.float32, tp=None, vocab_size=0):
    """A directory with config.json and .safetensors -> model (or this rank's part of it over tp), its weights in `dtype`.

    At most one tensor is in memory besides the model. Every weight must be there, once, in the shape that the config implies.
    vocab_size: that many tokens, where they are more than there; the new ones begin as the mean of all others.
    """
    directory, config = Path(directory), hf_config(Path(directory) / "config.json")
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if 0 < size < num_params(config):
        raise SystemExit(f"{directory}: {size:,} bytes of weights: {num_params(config):,} parameters expected, says config.json")
    rows, config.vocab_size = config.vocab_size, max(config.vocab_size, vocab_size)
    model = empty_model(config, device, dtype, tp)
    wanted = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in model.named_parameters()}
    for file, name, weight in hf_weights(directory):
        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith("rotary_emb.inv_freq"):
            continue  # the embedding again, and what follows from rope_theta
        if name not in wanted:
            raise SystemExit(f"{file}: {name} {weight.get_shape()}: no such weight, or twice")
        p, new = wanted.pop(name), 0
        shape = [n * (tp.size() if tp and i == p.tp_dim else 1) for i, n in enumerate(p.shape)]
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            shape[0], new = rows, config.vocab_size - rows
        if weight.get_shape() != shape:
            raise SystemExit(f"{file}: {name} {weight.get_shape()}: {shape} expected")
        w = weight[:]
        if new:
            w = torch.cat((w, w.float().mean(0, keepdim=True).to(w.dtype).expand(new, -1)))
        with torch.no_grad():
            p.copy_(shard(w, p.tp_dim, tp))
    if wanted:
        raise SystemExit(f"{directory}: {len(wanted)} weights are missing, {next(iter(wanted))} among them")
    return model


def hf_json(c, dtype):
    """Config -> the content of a config.json: the way back from hf_fields."""
    ours = (*HF_LACKS, *HF_DETAILS, *ROPE[1:], "no_rope_layer_interval")
    result = {name: value for name, value in dataclasses.asdict(c).items() if name not in ours}
    result |= {name: HF_ONLY[name] for name in ("hidden_act", "attention_bias", "mlp_bias", "attention_dropout")}
    rope = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.rope_factor > 1:
        trained = c.original_max_position_embeddings or round(c.max_position_embeddings / c.rope_factor)  # as in yarn()
        rope |= dict(rope_type="yarn", factor=c.rope_factor, original_max_position_embeddings=trained)
        result["rope_scaling"] = rope  # transformers 4 reads no rope_parameters
    result |= dict(rope_parameters=rope, head_dim=c.head_size, dtype=str(dtype)[6:], torch_dtype=str(dtype)[6:])
    if not c.no_rope_layer_interval:
        return result | dict(architectures=["LlamaForCausalLM"], model_type="llama")
    layers = [int(c.uses_rope(i)) for i in range(c.num_hidden_layers)]
    return result | dict(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", use_sliding_window=False,
                         no_rope_layer_interval=c.no_rope_layer_interval, no_rope_layers=layers,
                         layer_types=["full_attention" for _ in layers])


def write_weights(model, directory, dtype, shard_bytes):
    """Weights under transformers' names, in files of up to shard_bytes, with an index where that makes more than one."""
    files, size = [{}], 0
    for name, p in model.named_parameters():
        size += p.numel() * dtype.itemsize
        if size > shard_bytes and files[-1]:
            files, size = files + [{}], p.numel() * dtype.itemsize
        files[-1][name if name.startswith("lm_head") else f"model.{name}"] = p.detach()
    n, where = len(files), {}
    for i, weights in enumerate(files, 1):
        name = f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
        weights = {key: w.to("cpu", dtype).contiguous() for key, w in weights.items()}  # of one file at a time
        _safetensors().torch.save_file(weights, directory / name, {"format": "pt"})
        where |= dict.fromkeys(weights, name)
    if n > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        write_json(directory / "model.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=where))


def to_hf(model, directory, tokenizer=None, style="", dtype=torch.bfloat16, shard_bytes=5_000_000_000, card=""):
    """The way back: what transformers' AutoModelForCausalLM, AutoTokenizer and pipeline load without code of ours, as a
    SmolLM3ForCausalLM, or LlamaForCausalLM where all layers have RoPE. Without tensor parallelism.
    style: of the chat template, none if empty; weights in files of up to shard_bytes; card: the text of README.md."""
    _safetensors()  # or one line on how to get it
    directory, c = Path(directory), model.config
    if any(getattr(c, name) for name in HF_LACKS) or model.tp is not None:
        raise SystemExit("".join(f"{name}={getattr(c, name)}, " for name in HF_LACKS) + f"tp={model.tp is not None}: "
                         f"none of them expected: transformers' SmolLM3 and Llama have no such thing")
    if not c.no_rope_layer_interval and c.hidden_size % c.num_attention_heads:
        raise SystemExit(f"hidden_size={c.hidden_size}: a multiple of num_attention_heads={c.num_attention_heads} expected: "
                         f"transformers refuses other Llamas")
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if tokenizer:
        if tokenizer.size > c.vocab_size:
            raise SystemExit(f"vocab_size={c.vocab_size}: the {tokenizer.size} of tokenizer {tokenizer.name}, or more, "
                             f"expected")
        ends = [tokenizer.special["<|im_end|>"]] * bool(style) + [tokenizer.eos]
        ids = dict(bos_token_id=tokenizer.bos, eos_token_id=ends, pad_token_id=tokenizer.special["<|pad|>"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise OSError("nothing is written over")
    except OSError as e:
        raise SystemExit(f"{directory}: {e.strerror or e}: an empty directory expected") from None
    write_weights(model, directory, dtype, shard_bytes)
    if tokenizer:
        tokenizer.to_hf(directory, style, c.max_position_embeddings)
        write_json(directory / "generation_config.json", ids | dict(max_new_tokens=c.max_position_embeddings // 2))
    if card:
        (directory / "README.md").write_text(card, encoding="utf-8")
    write_json(directory / "config.json", hf_json(c, dtype) | ids)  # last: without it, it is no model for anybody


def model_card(config, extra, name):
    """README.md of an exported model: what a reader of it wants to know, as far as the checkpoint and its directory tell."""
    path, script = Path(extra["path"]), dict(base="train", grpo="grpo", hf="").get(extra["stage"], "sft")
    settings, last = extra["train_config"], {}
    for row in read_log(path.parent) if script else ():
        last = row if row.get("final") else last
    found = {k: last[k] for k in ("loss", "val_loss") if k in last} | last.get("scores", {})
    found |= {f"bits per byte, held-out {k}": v for k, v in last.get("val_bpb", {}).items()}
    data = ", ".join(str(settings[k]) for k in ("text", "jsonl", "hf", "data", "problems") if settings.get(k))
    shape = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(config).items())
    metrics = "\n".join(f"* {k}: {v:.4g}" for k, v in found.items() if v is not None) or "None are on record."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanosmol]
license: other  # to be chosen by you, who publish this
---

# {name}

{num_params(config):,} parameters, trained with nanosmol: stage {extra["stage"]}, {extra["step"]:,} steps.

| shape | |
|---|---|
{shape}

## Data and training

Data: {data or "what nanosmol has built in (a Python installation's documentation and sources, generated sums)"}.
{f"Repeated by `python {script}.py --config=config.json`, config.json being" if script else "Not trained, but exported again:"}

```json
{json.dumps(settings, indent=1)}
```

## Metrics at the end of that run

{metrics}

## Licence, intended use, limits

To be filled in by you, who publish this.
"""


# --- command line ----------------------------------------------------------------------------------------------------

@dataclass
class Options(Config, Machine):
    """The flags of model.py."""
    init: str = ""               # run directory, e.g. out/base, or a Hugging Face directory
    prompt: str = ""             # text to continue; with --chat: to answer
    prompt_file: str = ""        # file of prompts, a line each
    chat: bool = False           # talk to it: turns from the keyboard or, line by line, from a pipe
    mode: str = "think"          # --chat: think or no_think, at the start
    style: str = ""              # --chat: compact, smollm3 or chatml; default: what it was trained with
    context: int = 4096          # --chat: tokens that it remembers, at most its max_position_embeddings
    num_samples: int = 1         # continuations of each prompt
    json: bool = False           # print them as JSON lines
    export_hf: str = ""          # write the model to this empty directory, for transformers; --dtype=float32: not in bfloat16
    max_new_tokens: int = 256    # length of the continuation
    temperature: float = 0.8     # 0: greedy
    top_k: int = 0               # sample among the k likeliest; 0: all
    top_p: float = 1.0           # sample among the likeliest that hold this probability
    bench: bool = False          # measure decoding on random weights
    batch: int = 32              # --bench, --prompt_file, --num_samples: rows at a time
    prompt_tokens: int = 32      # --bench: tokens in each prompt


def extend(config, cfg):
    """What the flags say on the rotary embedding, where that is not the default, replaces what a checkpoint says: the playbook
    lengthens context by a larger base (ABF) and training, then by YaRN without. Call it before the row length changes."""
    for name in ROPE:
        old, new = getattr(config, name), getattr(cfg, name)
        if new not in (old, getattr(Config, name)):
            print(f"!!! {name}: {new} instead of the checkpoint's {old}", file=sys.stderr)
            setattr(config, name, new)
    if config.rope_factor > 1 and not config.original_max_position_embeddings:
        config.original_max_position_embeddings = config.max_position_embeddings


def stretched(config):
    """Rows as long as YaRN makes them: what a model is chatted with, or exported."""
    if config.rope_factor > 1:
        longer = round(config.original_max_position_embeddings * config.rope_factor)
        config.max_position_embeddings = max(config.max_position_embeddings, longer)


def shape_of(cfg):
    """The model.Config inside a script's Config, which inherits its fields."""
    return Config(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config)})


def table():
    """Presets and what they cost."""
    lines = [f"{'preset':12} {'parameters':>14} {'KV bytes/token':>15} {'train FLOPs/token':>18} {'training memory':>16}"]
    for name, shape in PRESETS.items():
        c = Config(**shape)
        T = c.max_position_embeddings
        lines.append(f"{name:12} {num_params(c):14,} {kv_bytes_per_token(c):15,} {flops_per_token(c, T):18.3g} "
                     f"{sum(training_bytes(c, T).values()) / 2**30:12.2f} GiB")
    return "\n".join([*lines, "KV cache in bf16; FLOPs 6N + 12LHDT at the preset's row length; memory: AdamW, one such row."])


def bench(cfg):
    """Decoding speed: full sampling, every row runs to the end."""
    rt = setup(cfg)
    model = Transformer(shape_of(cfg), rt.tp_group).to(rt.device, rt.dtype)
    model.compute_dtype = rt.dtype
    ids = np.random.default_rng(cfg.seed).integers(0, min(256, cfg.vocab_size), (cfg.batch, cfg.prompt_tokens)).tolist()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        generate(model, ids, cfg.max_new_tokens, seed=cfg.seed, compile=cfg.compile and "frozen")
        seconds.append(time.perf_counter() - start)
    speed = sorted(cfg.batch * cfg.max_new_tokens / s for s in seconds[1:])  # the first run warms up or compiles
    flops = 2 * num_params(model.config, active=True)
    return dict(bench="decode", tok_per_s=round(speed[2]), spread=[round(speed[0]), round(speed[-1])],
                seconds_per_step=round(cfg.batch / speed[2], 6), mfu=rt.peak and round(speed[2] * flops / rt.peak, 4),
                mfu_convention=f"2N FLOPs per new token / {rt.peak_source}",
                peak_memory_bytes=peak_memory(rt.device), batch=cfg.batch, prompt_tokens=cfg.prompt_tokens,
                max_new_tokens=cfg.max_new_tokens, compile=cfg.compile, dtype=str(rt.dtype)[6:],
                params=num_params(model.config), machine=rt.name, torch=torch.__version__)


def export(cfg):
    """--export_hf: a run for transformers, with what the flags say on the rotary embedding."""
    from data import get_tokenizer
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    state = read_checkpoint(cfg.init, fold=False)
    extend(state["model_config"], cfg), stretched(state["model_config"])
    model, extra = load_checkpoint(state, dtype=dtype)
    style, name = extra["train_config"].get("style", ""), Path(cfg.export_hf).name
    to_hf(model, cfg.export_hf, get_tokenizer(extra["tokenizer"]), style, dtype, card=model_card(model.config, extra, name))
    print(f"wrote {cfg.export_hf}; try: transformers chat {cfg.export_hf}; before you publish it, fill in the licence in its "
          f"README.md")
    return {"export_hf": cfg.export_hf}


def open_model(cfg, rt):
    """-> (model, its weights in the dtype of the matmuls, ready to write; tokenizer; chat template; stop ids). Says what memory
    that takes before it is taken."""
    from data import get_tokenizer  # the rest of this file does without text
    state = read_checkpoint(cfg.init, fold=False)
    c, dtype = state["model_config"], rt.dtype
    extend(c, cfg), stretched(c)
    rows = cfg.batch if cfg.prompt_file else min(cfg.batch, cfg.num_samples)
    tokens = min(cfg.context, c.max_position_embeddings) if cfg.chat else 2 * rows * cfg.max_new_tokens  # half of it the prompt
    weights = num_params(c) * dtype.itemsize / rt.tp_size
    cache = kv_bytes_per_token(c, 4 if rt.device.type == "cpu" else dtype.itemsize, rt.tp_size) * tokens
    print(f"{num_params(c):,} parameters: {weights / 1e9:.3g} GB in {str(dtype)[6:]}, and {cache / 1e9:.3g} GB of cache for {tokens:,} "
          f"tokens | {rt.name}", file=sys.stderr)
    if rt.device.type == "cuda" and weights + cache > (free := torch.cuda.mem_get_info()[0]):
        raise SystemExit(f"{cfg.init}: {(weights + cache) / 1e9:.1f} GB, and {free / 1e9:.1f} free on {rt.name}: fewer tokens "
                         f"(--context, --max_new_tokens, --batch), --tp=2 or --device=cpu expected")
    model, extra = load_checkpoint(state, rt.device, rt.tp_group, dtype)
    model.compute_dtype, tokenizer, style = dtype, get_tokenizer(extra["tokenizer"]), extra["train_config"].get("style")
    if cfg.chat and not (style or cfg.style):
        print(f"!!! {cfg.init} has seen no chats, as far as it says: do not expect answers", file=sys.stderr)
    return model, tokenizer, cfg.style or style or "compact", [tokenizer.special["<|im_end|>"], tokenizer.eos]


def encode_prompt(text, tokenizer, style, cfg):
    """What the model is to continue: the text, or a chat with this one turn."""
    if cfg.chat:
        from data import render
        return render([dict(role="user", content=text)], cfg.mode, style, add_generation_prompt=True, tokenizer=tokenizer)[0]
    ids = tokenizer.encode(text)
    return [tokenizer.bos, *ids] if tokenizer.bos is not None else ids or [tokenizer.eos]  # which begins any document


def write(model, prompt, tokenizer, stop, cfg, limit, room, seed):
    """Print up to `limit` tokens after `prompt` as they come, a thought dimmed -> (text, tokens, whether it came to an end)."""
    utf8, text, finished, n = codecs.getincrementaldecoder("utf-8")("replace"), [], False, 0
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    marks = {tokenizer.special["<think>"]: (dim, ""), tokenizer.special["</think>"]: ("", plain)}
    try:
        for ((_, token, _),) in stream(model, [prompt], room, cfg.temperature, cfg.top_k, cfg.top_p, stop, [seed],
                                       cfg.compile and "frozen"):
            n += 1
            finished = token in stop
            if not finished:
                text.append(utf8.decode(tokenizer.decode_bytes([token])))
                before, after = marks.get(token, ("", ""))
                print(f"{before}{text[-1]}{after}", end="", flush=True)
            if finished or n == limit:
                break
    except KeyboardInterrupt:  # enough of that
        pass
    text.append(utf8.decode(b"", final=True))  # half a character
    print(f"{text[-1]}{plain}")
    return "".join(text), n, finished


COMMANDS = ("/think and /no_think switch, /system TEXT begins anew under that, /reset begins anew, /exit or Ctrl-D ends; "
            "Ctrl-C: enough")


def remembered(messages, mode, style, tokenizer, room):
    """-> (messages without the oldest turns, so that `room` tokens hold them or the last one is alone; their ids)."""
    from data import reasoned, render
    first = sum(m["role"] == "system" for m in messages)
    while True:
        shown = [reasoned(m, mode) for m in messages]
        ids, _ = render(shown, mode, style, add_generation_prompt=True, tokenizer=tokenizer)
        if len(ids) <= room or len(messages) <= first + 1:
            return messages, ids
        messages = messages[:first] + messages[first + 2:]


def chat(model, tokenizer, style, stop, cfg):
    """Talk until the end of the input -> {"messages": [...]}. Turns that no longer fit are forgotten, the oldest first."""
    from data import effective_mode
    keyboard, messages, mode, turn = sys.stdin.isatty(), [], cfg.mode, 0
    window = min(cfg.context, model.config.max_position_embeddings)
    if keyboard:
        with contextlib.suppress(ImportError):  # Windows
            import readline  # editing and history of the line
        print(f"{COMMANDS}\n")
    while True:
        try:
            line = input(f"{mode}> " if keyboard else "").strip()
        except (EOFError, KeyboardInterrupt):
            return dict(messages=messages)
        except UnicodeDecodeError as e:
            print(f"{e}: a line of UTF-8 expected", file=sys.stderr)
            continue
        command, _, rest = line.partition(" ")
        if command in ("/think", "/no_think"):
            mode, line = command[1:], rest.strip()
        elif command == "/system":
            messages, line = [dict(role="system", content=rest.strip())] if rest.strip() else [], ""
        elif command == "/reset":
            messages, line = [m for m in messages if m["role"] == "system"], ""
        elif command in ("/exit", "/quit"):
            return dict(messages=messages)
        elif command.startswith("/") and command[1:].isalpha():
            print(f"{command}: {COMMANDS}", file=sys.stderr)
            continue
        if not line:
            continue
        asked, turn = [*messages, dict(role="user", content=line)], turn + 1
        room = window - min(cfg.max_new_tokens, window // 4)
        kept, ids = remembered(asked, effective_mode(asked, mode), style, tokenizer, room)
        if len(ids) >= window:
            print(f"{len(ids)} tokens: fewer than {window} expected (--context, max_position_embeddings)", file=sys.stderr)
            continue
        messages = kept
        start = time.perf_counter()  # room for the whole window, always: a compiled step is for one size of the cache
        text, tokens, finished = write(model, ids, tokenizer, stop, cfg, cfg.max_new_tokens, window - len(ids), (cfg.seed, turn))
        messages.append(dict(role="assistant", content=text))
        speed = f"[{tokens} tokens, {tokens / (time.perf_counter() - start):.0f} tok/s{'' if finished else ', cut off'}]"
        print(f"\x1b[2m{speed}\x1b[0m\n" if keyboard else speed, file=sys.stderr)


def continuations(model, tokenizer, style, stop, prompts, cfg):
    """cfg.num_samples of each prompt, printed as text or JSON lines -> {"samples": [...]}."""
    jobs, samples = [(i, k) for i in range(len(prompts)) for k in range(cfg.num_samples)], []
    for at in range(0, len(jobs), cfg.batch):
        some = jobs[at:at + cfg.batch]
        ids = [encode_prompt(prompts[i], tokenizer, style, cfg) for i, _ in some]
        made = generate(model, ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, stop,
                        [(cfg.seed, *job) for job in some], cfg.compile and "frozen")
        for (i, _), (new, logps) in zip(some, made):
            finished = new[-1] in stop
            text = tokenizer.decode(new[:-1] if finished else new)
            samples.append(dict(prompt=prompts[i], text=text, tokens=len(new), finished=finished, logprob=sum(logps)))
            print(json.dumps(samples[-1], ensure_ascii=False) if cfg.json else f"--- {prompts[i]}\n{text}", flush=True)
    return dict(samples=samples)


def main(cfg):
    """The table, a benchmark, an export, a chat, or text after prompts."""
    for bad, message in ((cfg.mode not in ("think", "no_think"), f"--mode={cfg.mode}: think or no_think expected"),
                         (cfg.style not in ("", "compact", "smollm3", "chatml"),
                          f"--style={cfg.style}: compact, smollm3 or chatml expected"),
                         (min(cfg.num_samples, cfg.batch, cfg.context, cfg.max_new_tokens, cfg.prompt_tokens) < 1,
                          "--num_samples, --batch, --context, --max_new_tokens, --prompt_tokens: at least 1 expected"),
                         (cfg.max_new_tokens > 2**31, f"--max_new_tokens={cfg.max_new_tokens}: at most 2 ** 31 expected"),
                         (cfg.bench and cfg.vocab_size < 1, f"--vocab_size={cfg.vocab_size}: at least 1 expected"),
                         (cfg.export_hf and cfg.dtype not in ("auto", "float32", "bfloat16"),
                          f"--dtype={cfg.dtype}: float32 or bfloat16 expected"),
                         (not (cfg.init or cfg.bench) and (cfg.export_hf or cfg.chat or cfg.prompt or cfg.prompt_file),
                          "--export_hf, --chat, --prompt, --prompt_file: a run directory, too, expected: python model.py out/base ..."),
                         (min(cfg.temperature, cfg.top_k) < 0 or not 0 < cfg.top_p <= 1,
                          "--temperature, --top_k: 0 or more expected; --top_p: above 0 and at most 1")):
        if bad:
            raise SystemExit(message)
    if cfg.bench:
        result = bench(cfg)
        print(json.dumps(result))
        return result
    if not cfg.init:
        print(table())
        return {}
    if cfg.export_hf:
        return export(cfg)
    rt, prompts, talk = setup(cfg), [cfg.prompt], cfg.chat and not (cfg.prompt or cfg.prompt_file)
    if cfg.prompt_file:
        try:
            prompts = Path(cfg.prompt_file).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, ValueError) as e:
            raise SystemExit(f"--prompt_file={cfg.prompt_file}: {e}: a text file expected, a prompt on each line") from None
    if rt.world_size > rt.tp_size or talk and rt.world_size > 1:
        raise SystemExit("one process expected, or --tp with a --prompt")
    model, tokenizer, style, stop = open_model(cfg, rt)
    if talk:
        return chat(model, tokenizer, style, stop, cfg)
    if cfg.prompt_file or cfg.json or cfg.num_samples > 1:
        return continuations(model, tokenizer, style, stop, prompts, cfg)
    print(cfg.prompt, end="\n" if cfg.chat else "", flush=True)
    n = cfg.max_new_tokens
    text, _, _ = write(model, encode_prompt(cfg.prompt, tokenizer, style, cfg), tokenizer, stop, cfg, n, n, (cfg.seed, 0))
    return {"text": text}


if __name__ == "__main__":
    launch(main, cli(Options, PRESETS))
