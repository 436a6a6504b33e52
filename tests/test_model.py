"""model.py against independent oracles: a naive transformer in float64, closed forms, the playbook, transformers."""
import dataclasses, math, random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import infra, model as nano

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32, rope_theta=100.0, initializer_range=0.3)      # wide weights: nothing is nearly uniform


def build(seed=0, **change):
    """A small model whose norms are not all one either."""
    torch.manual_seed(seed)
    m = nano.Transformer(nano.Config(**SHAPE | change))
    for name, p in m.named_parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return m


def tokens(*shape, seed=1, vocab=64):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(m, ids, docs=None, grad=False):
    """Training and evaluation may take different paths through attention: tests ask for both."""
    with torch.set_grad_enabled(grad):
        return m(ids, docs).detach()


def naive(config, weights, ids, docs=None):
    """The architecture as the papers write it, one head and one query at a time. weights: {name: tensor}; ids (T,) -> (T, V)."""
    c, T, D = config, len(ids), config.head_dim or config.hidden_size // config.num_attention_heads
    norm = lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps) * w
    docs = [0] * T if docs is None else docs

    def turn(x, t):                                     # (D,) at position t: pairs (i, i + D/2) as complex numbers
        angle = t * c.rope_theta ** (-torch.arange(D // 2, dtype=x.dtype) * 2 / D)
        z = torch.complex(x[:D // 2], x[D // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    x = weights["embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        h = norm(x, w["input_layernorm.weight"])
        rope = not c.no_rope_layer_interval or (i + 1) % c.no_rope_layer_interval != 0
        heads = []
        for head in range(c.num_attention_heads):
            group = head // (c.num_attention_heads // c.num_key_value_heads)
            q, k, v = (h @ w[f"self_attn.{p}_proj.weight"][n * D:(n + 1) * D].T for p, n in (("q", head), ("k", group), ("v", group)))
            if c.qk_norm:
                q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
            if rope:
                q, k = (torch.stack([turn(row, t) for t, row in enumerate(z)]) for z in (q, k))
            rows = []
            for t in range(T):
                seen = [s for s in range(t + 1) if docs[s] == docs[t] and not (rope and c.sliding_window and t - s >= c.sliding_window)]
                p = torch.softmax(k[seen] @ q[t] / math.sqrt(D), 0)
                rows.append(p @ v[seen])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, 1) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["norm.weight"]) @ weights.get("lm_head.weight", weights["embed_tokens.weight"]).T


# --- attention: who sees whom ----------------------------------------------------------------------------------------

VARIANTS = [dict(num_key_value_heads=4), dict(num_key_value_heads=2), dict(num_key_value_heads=1), dict(no_rope_layer_interval=0),
            dict(sliding_window=3), dict(qk_norm=True, tie_word_embeddings=False), dict(head_dim=6, num_attention_heads=3, num_key_value_heads=1)]


@pytest.mark.parametrize("change", VARIANTS)
def test_logits_and_gradients_equal_a_naive_transformer(change):
    m = build(**change)
    ids, docs = tokens(2, 13), torch.tensor([[5] * 4 + [2] * 1 + [9] * 8, [0] * 13])
    weights = {n: p.detach().double().requires_grad_() for n, p in m.named_parameters()}
    expected = torch.stack([naive(m.config, weights, i, d.tolist()) for i, d in zip(ids, docs)])
    push = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * push).sum().backward()
    got = m(ids, docs)
    (got * push).sum().backward()
    assert got.dtype == torch.float32 and (got.double() - expected).abs().max() < 1e-4
    assert (logits_of(m, ids, docs).double() - expected).abs().max() < 1e-4
    for name, p in m.named_parameters():
        assert (p.grad.double() - weights[name].grad).norm() < 1e-4 * weights[name].grad.norm(), name


@pytest.mark.parametrize("T", [1, 2, 5, 32])
def test_without_doc_ids_both_paths_give_plain_causal_attention(T):
    for change in ({}, dict(sliding_window=2), dict(sliding_window=100)):
        m, ids = build(**change), tokens(2, T)
        expected = torch.stack([naive(m.config, {n: p.detach().double() for n, p in m.named_parameters()}, row) for row in ids])
        for grad in (False, True):
            assert (logits_of(m, ids, None, grad).double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("window", [0, 3])
def test_packed_documents_give_the_same_logits_as_separate_ones(grad, window):
    m, sizes = build(sliding_window=window), [5, 1, 9, 7]
    rows = [[tokens(1, n, seed=10 * r + i) for i, n in enumerate(sizes)] for r in range(2)]
    docs = torch.tensor([sum([[i] * n for i, n in zip((7, -3, 0, 4), sizes)], []), sum([[i] * n for i, n in zip((0, 1, 2, 3), sizes)], [])])
    packed = logits_of(m, torch.cat([torch.cat(row, 1) for row in rows]), docs, grad)
    separate = torch.cat([torch.cat([logits_of(m, d, None, grad) for d in row], 1) for row in rows])
    assert (packed - separate).abs().max() < 2e-5
    assert (packed - logits_of(m, torch.cat([torch.cat(row, 1) for row in rows]), None, grad)).abs().max() > 0.1   # masking matters here


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("window", [0, 3])
def test_a_later_token_or_another_document_never_changes_a_logit(grad, window):
    m, ids = build(sliding_window=window), tokens(1, 12)
    docs = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    for d in (None, docs):
        before = logits_of(m, ids, d, grad)
        for t in range(12):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % 64
            changed = (logits_of(m, other, d, grad) != before).any(-1)[0]
            allowed = torch.arange(12) >= t if d is None else (torch.arange(12) >= t) & (d[0] == d[0, t])
            assert not (changed & ~allowed).any() and changed[t]


@pytest.mark.parametrize("change", [dict(sliding_window=5), dict(attention_chunk=5)])
def test_a_row_that_is_longer_by_one_token_than_what_is_seen_is_masked_on_every_path(change):
    m, ids = build(**change), tokens(1, 6)
    near, whole = logits_of(m, ids), logits_of(build(), ids)
    assert (near - logits_of(m, ids, None, True)).abs().max() < 1e-4
    assert (near - whole)[0, :5].abs().max() < 1e-4 and (near - whole)[0, 5].abs().max() > 1e-3


def test_long_rows_take_another_path_with_the_same_result():
    m, ids = build(num_hidden_layers=2, no_rope_layer_interval=2), tokens(1, 1100)
    docs = (torch.arange(1100) >= 1000).long()[None]
    long = logits_of(m, ids, docs, True)
    assert (long - logits_of(m, ids, docs, False)).abs().max() < 1e-4
    assert (long[:, 1000:] - logits_of(m, ids[:, 1000:], None, True)).abs().max() < 2e-3      # angles of 1000 rad in float32
    assert (long[:, :1000] - logits_of(m, ids[:, :1000], None, True)).abs().max() < 1e-4


def test_sliding_window_hides_what_is_older_in_rope_layers_and_nothing_in_nope_layers():
    ids = tokens(1, 10)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 64
    for grad in (False, True):
        for interval, reach in ((0, 3), (1, 10)):       # one layer: RoPE sees 3 tokens, NoPE all
            m = build(num_hidden_layers=1, no_rope_layer_interval=interval, sliding_window=3)
            changed = (logits_of(m, ids, None, grad) != logits_of(m, other, None, grad)).any(-1)[0]
            assert changed.tolist() == [True] * reach + [False] * (10 - reach)


# --- position --------------------------------------------------------------------------------------------------------

def with_positions(m, ids, f):
    """Logits when token t is told that it stands at f(t)."""
    original = m.rope
    m.rope = lambda positions: original(f(positions))
    try:
        return logits_of(m, ids)
    finally:
        del m.rope


def test_rope_scores_depend_on_distance_only_and_nope_layers_ignore_position():
    ids = tokens(2, 12)
    for interval in (0, 1, 4):
        m = build(no_rope_layer_interval=interval)
        plain, shifted, stretched = (with_positions(m, ids, f) for f in (lambda t: t, lambda t: t + 37, lambda t: 3 * t))
        assert (plain - shifted).abs().max() < 1e-3
        assert (plain - stretched).abs().max() > 0.1 if interval != 1 else torch.equal(plain, stretched)


def test_a_nope_layer_sees_a_set_of_tokens_and_a_rope_layer_their_order():
    ids = tokens(1, 9)
    shuffled = ids[:, [3, 6, 0, 5, 7, 1, 4, 2, 8]]      # all but the last, whose logits we compare
    for interval in (0, 1):
        m = build(num_hidden_layers=1, no_rope_layer_interval=interval)
        gap = (logits_of(m, ids)[0, -1] - logits_of(m, shuffled)[0, -1]).abs().max()
        assert gap < 1e-5 if interval else gap > 0.1


def test_rotation_is_multiplication_of_complex_numbers():
    m, D = build(), 8
    q, k = torch.randn(D, generator=torch.Generator().manual_seed(0)), torch.randn(D, generator=torch.Generator().manual_seed(1))
    angle = 100.0 ** (-torch.arange(4).double() * 2 / D)
    z = lambda x: torch.complex(x[:4].double(), x[4:].double())
    for p, s in ((0, 0), (5, 3), (31, 0), (1000, 990)):
        turned = [nano.rotate(x.view(1, 1, 1, D), *m.rope(torch.tensor([t]))).flatten() for x, t in ((q, p), (k, s))]
        assert abs(float(turned[0] @ turned[1]) - float((z(q) * z(k).conj() * torch.polar(torch.ones(4).double(), angle * (p - s))).real.sum())) < 1e-3


# SmolLM3's; a ramp in the middle; one that ends beyond the last pair; one that ends where it begins
@pytest.mark.parametrize("D, theta, n, factor", [(128, 5e6, 65536, 2.0), (64, 1e4, 4096, 16.0), (16, 10.0, 500, 4.0), (2, 1e4, 6, 4.0)])
def test_yarns_angles_and_factor_are_transformers(D, theta, n, factor):
    hf = pytest.importorskip("transformers.modeling_rope_utils", reason="the package transformers is not installed: no second opinion on YaRN")
    theirs = SimpleNamespace(head_dim=D, hidden_size=4 * D, num_attention_heads=4, standardize_rope_params=lambda: None, rope_parameters=dict(
        rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=n))
    inverse, scale = hf.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    angle = torch.arange(50)[:, None] * inverse
    for length in (n, 0):                               # 0: the rows are as much longer as rope_factor says
        m = build(num_hidden_layers=1, head_dim=D, rope_theta=theta, rope_factor=factor, original_max_position_embeddings=length,
                  max_position_embeddings=round(n * factor))
        cos, sin = m.rope(torch.arange(50))
        assert torch.allclose(cos[:, 0, D // 2:], angle.cos() * scale, atol=1e-5) and scale == pytest.approx(0.1 * math.log(factor) + 1)
        assert torch.allclose(sin[:, 0, D // 2:], angle.sin() * scale, atol=1e-5)


def test_smollm3_has_no_rope_in_layers_3_7_to_35():
    c = nano.Config(**nano.PRESETS["smollm3-3b"])
    assert [i for i in range(c.num_hidden_layers) if not c.uses_rope(i)] == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert all(nano.Config(no_rope_layer_interval=0).uses_rope(i) for i in range(40))


# --- arithmetic ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [*nano.PRESETS.values(), dict(tie_word_embeddings=False), dict(qk_norm=True), dict(head_dim=24),
                                   dict(head_dim=24, qk_norm=True, num_key_value_heads=1, tie_word_embeddings=False)],
                         ids=[*nano.PRESETS, "untied", "qk_norm", "head_dim", "all"])
def test_parameter_formula_equals_the_real_count(shape):
    c = nano.Config(**shape)
    with torch.device("meta"):
        assert nano.num_params(c) == sum(p.numel() for p in nano.Transformer(c).parameters())


def test_smollm3_has_3_075_098_624_parameters():
    assert nano.num_params(nano.Config(**nano.PRESETS["smollm3-3b"])) == 3_075_098_624


@pytest.mark.parametrize("change, billions", [       # playbook, "Attention" and "Embeddings": the 1B ablation baseline and its variants
    (dict(num_key_value_heads=1), 1.21), (dict(num_key_value_heads=2), 1.21), (dict(num_key_value_heads=4), 1.22), ({}, 1.24),
    (dict(num_key_value_heads=16, num_hidden_layers=15), 1.21), (dict(num_key_value_heads=32, num_hidden_layers=14), 1.20),
    (dict(num_key_value_heads=16), 1.27), (dict(num_key_value_heads=32), 1.34),
    (dict(tie_word_embeddings=False), 1.49), (dict(tie_word_embeddings=False, num_hidden_layers=12), 1.25)])
def test_parameter_counts_match_the_playbooks_table(change, billions):
    assert abs(nano.num_params(nano.Config(**nano.PRESETS["ablation-1b"] | change)) / 1e9 - billions) < 0.01


def test_kv_cache_bytes_match_the_playbook():
    of = lambda **kw: nano.kv_bytes_per_token(nano.Config(**kw))
    assert of(**nano.PRESETS["smollm3-3b"]) == 73_728
    llama = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32)
    assert of(**llama, num_key_value_heads=32) * 8192 == 4 * 2**30         # Llama-3-8B, were it MHA
    assert of(**llama, num_key_value_heads=8) * 8192 == 2**30
    assert of(hidden_size=8192, num_attention_heads=64, num_hidden_layers=80, num_key_value_heads=64) * 8192 == 20 * 2**30     # 70B
    assert of(head_dim=10, num_key_value_heads=1, num_hidden_layers=3) == 2 * 3 * 10 * 2
    assert nano.kv_bytes_per_token(nano.Config(), 4) == 2 * nano.kv_bytes_per_token(nano.Config())


def test_flops_per_token_are_6n_plus_attention():
    c = nano.Config(**nano.PRESETS["smollm3-3b"])
    assert nano.flops_per_token(c, 4096) == pytest.approx(18.45e9 + 3.62e9, rel=1e-3)
    assert nano.flops_per_token(c, 0) == 6 * 3_075_098_624
    tied, untied = nano.Config(), nano.Config(tie_word_embeddings=False)   # looking a row up multiplies nothing
    assert nano.flops_per_token(untied, 256) == nano.flops_per_token(tied, 256)


def test_a_frozen_model_takes_2_bytes_a_parameter_and_its_adapters_18():
    for tp in (1, 2):
        c = nano.Config()
        adapters = 4 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 512))     # 4 layers, rank 8
        assert nano.lora_params(c, 8) == adapters
        assert nano.training_bytes(c, 100, tp, 8)["states"] == (2 * nano.num_params(c) + 18 * adapters) / tp
        assert nano.training_bytes(c, 100, tp)["states"] == 18 * nano.num_params(c) / tp


def test_the_cache_holds_what_the_formula_says():
    m, seen = build(), []
    for layer in m.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(sum(x.numel() for x in args[3][:2])))
    list(nano.stream(m, [[1, 2, 3], [4]], 5))
    assert sum(seen[-4:]) * 2 == 2 * 8 * nano.kv_bytes_per_token(m.config)  # 2 rows, 3 + 5 places, bf16


# --- embeddings and initialisation -----------------------------------------------------------------------------------

def test_tied_head_is_the_embedding_itself_and_untying_adds_v_times_d():
    tied, untied = build(), build(tie_word_embeddings=False)
    storages = lambda m: {p.untyped_storage().data_ptr() for p in m.state_dict().values()}
    assert not any("lm_head" in name for name in tied.state_dict()) and len(storages(untied)) == len(storages(tied)) + 1
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(untied) - count(tied) == nano.num_params(untied.config) - nano.num_params(tied.config) == 64 * 32
    tied(tokens(1, 4)).sum().backward()                 # rows that no input names still learn as outputs
    assert (tied.embed_tokens.weight.grad.abs().sum(1) > 0).all()


def test_matrices_start_normal_with_the_given_deviation_and_norms_at_one():
    torch.manual_seed(0)
    for name, p in nano.Transformer(nano.Config(initializer_range=0.05)).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.05, rel=0.05) and abs(p.mean().item()) < 0.002, name


def test_bfloat16_computes_near_float32_and_returns_float32():
    m, ids = build(), tokens(2, 12)
    exact = logits_of(m, ids)
    m.compute_dtype = torch.bfloat16
    for grad in (False, True):
        rough = logits_of(m, ids, None, grad)
        assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() < 0.1 * exact.norm()
    assert all(p.dtype == torch.float32 for p in m.parameters())


def test_in_bfloat16_far_neighbours_still_have_angles_of_their_own():
    m, at = build(), torch.arange(60_000, 60_008)
    m.compute_dtype = torch.bfloat16
    cos, sin = m.rope(at)
    angle = at[:, None].double() * 100.0 ** (-torch.arange(4).double() / 4)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert (cos[:, 0, 4:] - angle.cos()).abs().max() < 0.02 and (sin[:, 0, 4:] - angle.sin()).abs().max() < 0.02


# --- loss ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tie", [True, False])
def test_loss_sums_and_gradients_equal_cross_entropy_and_the_true_logsumexp(tie):
    m, ids, targets = build(tie_word_embeddings=tie), tokens(3, 8), tokens(3, 8, seed=5)
    targets[0, :3] = targets[2, -1] = -100
    docs = torch.tensor([[0] * 3 + [1] * 5] * 3)
    nll, z = m(ids, docs, targets)
    (nll + 0.1 * z).backward()
    got = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    logits = m(ids, docs)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    lse = sum(torch.log(torch.exp(logits[b, t].double()).sum()) ** 2 for b in range(3) for t in range(8) if targets[b, t] != -100)
    (expected + 0.1 * lse).backward()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5) and z.item() == pytest.approx(lse.item(), rel=1e-5)
    assert nll.shape == z.shape == () and nll.dtype == z.dtype == torch.float32
    for n, p in m.named_parameters():
        assert (p.grad - got[n]).norm() <= 1e-4 * p.grad.norm(), n


def test_a_row_without_counted_targets_gives_zero_loss_and_zero_gradients():
    m = build()
    nll, z = m(tokens(2, 8), None, torch.full((2, 8), -100))
    (nll + z).backward()
    assert nll.item() == 0 and z.item() == 0 and all((p.grad == 0).all() for p in m.parameters())


# --- another implementation ------------------------------------------------------------------------------------------

def twin(transformers, m, **change):
    """transformers' SmolLM3 with the same weights."""
    c = m.config
    theirs = transformers.SmolLM3Config(
        **{k: getattr(c, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                      "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                                      "no_rope_layer_interval")},
        rope_theta=c.rope_theta, rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        pad_token_id=None, bos_token_id=0, eos_token_id=None, **change)
    hf = transformers.SmolLM3ForCausalLM(theirs).float().eval()
    weights = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in m.state_dict().items()}
    if c.tie_word_embeddings:
        weights["lm_head.weight"] = m.embed_tokens.weight
    hf.load_state_dict(weights)
    return hf


@pytest.mark.parametrize("change", [{}, dict(num_key_value_heads=1, tie_word_embeddings=False), dict(sliding_window=4)])
def test_logits_and_greedy_tokens_equal_transformers_smollm3(change):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: no second opinion on SmolLM3")
    m, ids, window = build(rope_theta=5000.0, **change), tokens(2, 20), {}
    if change.get("sliding_window"):
        window = dict(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 3 + ["full_attention"])
    hf = twin(transformers, m, **window)
    with torch.no_grad():
        assert (hf(ids).logits - m(ids)).abs().max() < 1e-4
    theirs = hf.generate(ids[:, :6], max_new_tokens=12, do_sample=False)[:, 6:]
    assert theirs.tolist() == [new for new, _ in nano.generate(m, ids[:, :6].tolist(), 12, temperature=0)]


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], [60, 61, 62], [5] * 13]


def full(m, row):
    """Next-token logits (V,) without a cache."""
    return logits_of(m, torch.tensor([row]))[0, -1]


@pytest.mark.parametrize("change", [{}, dict(sliding_window=3), dict(sliding_window=1), dict(num_key_value_heads=1), dict(no_rope_layer_interval=0),
                                    dict(qk_norm=True, tie_word_embeddings=False)])
def test_greedy_cached_equals_greedy_uncached_for_prompts_of_unequal_length(change):
    m = build(**change)
    for prompt, (ids, logprobs) in zip(PROMPTS, nano.generate(m, PROMPTS, 12, temperature=0)):
        row = list(prompt)
        for logp in logprobs:
            logits = full(m, row)
            row.append(int(logits.argmax()))
            assert logp == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
        assert len(ids) == 12 and ids == row[len(prompt):]


def test_generating_beyond_the_training_length_works():
    m = build()
    (ids, _), = nano.generate(m, [[1] * 30], 10, temperature=0)
    row = [1] * 30
    for _ in range(10):
        row.append(int(full(m, row).argmax()))
    assert ids == row[30:]


@pytest.mark.parametrize("options", [{}, dict(temperature=0.5), dict(temperature=1.7, top_k=5), dict(top_p=0.6)])
def test_returned_logprobs_are_those_of_the_full_softmax(options):
    m = build()
    for prompt, (ids, logprobs) in zip(PROMPTS, nano.generate(m, PROMPTS, 8, seed=3, **options)):
        logits = logits_of(m, torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].double() / options.get("temperature", 1.0)
        expected = logits.log_softmax(-1)[range(8), ids]
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4


def test_a_rows_samples_do_not_depend_on_its_neighbours():
    m = build()
    together = nano.generate(m, PROMPTS, 10, seed=list(range(10, 15)))
    for i, prompt in enumerate(PROMPTS):
        (ids, logprobs), = nano.generate(m, [prompt], 10, seed=[10 + i])
        assert ids == together[i][0] and logprobs == pytest.approx(together[i][1], abs=1e-4)
    first, = nano.generate(m, PROMPTS[:1], 10, seed=5)
    assert first[0] == nano.generate(m, PROMPTS, 10, seed=5)[0][0]


def test_a_row_that_stops_does_not_disturb_the_others():
    m = build()
    free = [ids for ids, _ in nano.generate(m, PROMPTS, 10, seed=1)]
    stop = free[0][2]
    for ids, alone in zip((ids for ids, _ in nano.generate(m, PROMPTS, 10, seed=1, stop_ids=[stop])), free):
        assert ids == (alone[:alone.index(stop) + 1] if stop in alone else alone)


def test_same_seed_same_text_another_seed_another_and_no_global_randomness():
    m = build()
    run = lambda seed: nano.generate(m, PROMPTS, 10, seed=seed)
    torch.manual_seed(1)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert run(1) == run(1) and run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()
    ids = [ids for ids, _ in nano.generate(m, [[7], [7], [7]], 10, seed=1)]
    assert ids[0] != ids[1] != ids[2]                   # equal prompts in one batch get different luck


def first_tokens(m, n, **options):
    return [ids[0] for ids, _ in nano.generate(m, [[7]] * n, 1, seed=0, **options)]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_sampling_frequencies_follow_the_softmax(temperature):
    m, n = build(vocab_size=16, initializer_range=0.15), 4000
    expected = (full(m, [7]) / temperature).softmax(-1) * n
    seen = torch.bincount(torch.tensor(first_tokens(m, n, temperature=temperature)), minlength=16)
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    chi2 = ((seen - expected).square() / expected.clamp(min=1e-9)).sum()
    assert len(expected) > 5 and chi2 < 45              # 15 degrees of freedom: one seed in 10,000 is above 44.3


def test_top_k_and_top_p_allow_exactly_the_likeliest_tokens():
    m = build(vocab_size=16, initializer_range=0.1)
    p = full(m, [7]).softmax(-1).tolist()
    ranked = sorted(range(16), key=lambda i: -p[i])

    def nucleus(share):                                 # the fewest likeliest tokens that hold this share
        held = 0.0
        for n, i in enumerate(ranked):
            held += p[i]
            if held >= share:
                return set(ranked[:n + 1])
    for k in (1, 2, 5):
        assert set(first_tokens(m, 2000, top_k=k)) == set(ranked[:k])
    for share in (1e-6, p[ranked[0]] * 0.99, p[ranked[0]] * 1.01, 0.6, 0.8):
        assert set(first_tokens(m, 2000, top_p=share)) == nucleus(share)
    assert set(first_tokens(m, 2000, top_k=3, top_p=p[ranked[0]] * 0.5)) == {ranked[0]}
    assert first_tokens(m, 50, top_k=100) == first_tokens(m, 50)


def test_top_p_is_a_share_of_what_top_k_leaves_and_a_full_set_takes_no_more():
    pick = lambda p, u, *how: int(nano.sample(torch.tensor([p]).log(), torch.tensor([u]), 1.0, *how)[0])
    almost = 1 - 2**-24                                 # the largest u there is
    assert [pick([0.1, 0.2, 0.4, 0.3], almost, 2, p) for p in (0.5, 0.6)] == [2, 3]         # of 0.7: 0.4 holds 0.35, not 0.42
    assert pick([1.0, 1.0], 0.0, 0, 0.5) == pick([1.0, 1.0], almost, 0, 0.5)                # half of it, exactly
    assert pick([0.1, 0.2, 0.4, 0.3], 0.0, 1, 1.0) == 2                                     # nor the first id, which is not allowed
    assert 0 <= pick([math.nan] * 3, 0.5, 0, 1.0) < 3                                       # no index that would end a GPU's process


def test_among_the_allowed_the_proportions_stay():
    m, n = build(vocab_size=16, initializer_range=0.1), 4000
    p = full(m, [7]).softmax(-1).topk(3)
    seen = torch.bincount(torch.tensor(first_tokens(m, n, top_k=3)), minlength=16)[p.indices]
    expected = p.values / p.values.sum() * n
    assert ((seen - expected).square() / expected).sum() < 18.4            # 2 degrees of freedom, one in 10,000


def test_stop_id_is_included_and_nothing_follows():
    m = build()
    (free, logprobs), = nano.generate(m, [[7]], 10, seed=4)
    for stop_at in range(10):
        stop = free[stop_at]
        (ids, logp), = nano.generate(m, [[7]], 10, seed=4, stop_ids=(stop, 63 if 63 not in free else stop))
        end = free.index(stop) + 1
        assert ids == free[:end] and logp == pytest.approx(logprobs[:end], abs=1e-5)


def test_the_first_and_the_last_token_of_the_vocabulary_are_tokens():
    (ids, _), = nano.generate(build(), [[0, 63, 0]], 3)
    assert len(ids) == 3


def test_nothing_to_do_gives_nothing():
    assert nano.generate(build(), [], 5) == [] and nano.generate(build(), [[1], [2]], 0) == [([], []), ([], [])]


@pytest.mark.parametrize("prompts, message", [([[1], []], "prompt 1: at least one token"), ([[64]], r"prompt 0: .*0\.\.63 expected"), ([[1, -1]], "prompt 0")])
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        nano.generate(build(), prompts, 3)


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=-0.5), dict(top_p=1.5), dict(top_k=-1)])
def test_bad_sampling_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        nano.generate(build(), [[1]], 3, **options)


def test_bfloat16_generation_leaves_the_model_in_float32():
    m = build()
    m.compute_dtype = torch.bfloat16
    nano.generate(m, [[1, 2]], 3)
    assert all(p.dtype == torch.float32 for p in m.parameters()) and m.training


# --- configuration ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    *((dict([(name, 0)]), f"{name}=0: 1 or more expected") for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
      "num_attention_heads", "num_key_value_heads", "max_position_embeddings")),
    (dict(num_key_value_heads=3), "num_key_value_heads=3: a divisor of num_attention_heads=4"),
    (dict(num_key_value_heads=8), "num_key_value_heads=8: a divisor"),
    (dict(num_attention_heads=3, num_key_value_heads=1), "hidden_size=128: a multiple of num_attention_heads=3"),
    (dict(head_dim=7), "head_dim=7: an even number"), (dict(hidden_size=12), "head_dim=3: an even number"),
    (dict(head_dim=-2), "head_dim"), (dict(vocab_size=-1), "vocab_size"), (dict(sliding_window=-1), "sliding_window"),
    (dict(no_rope_layer_interval=-1), "no_rope_layer_interval"), (dict(rope_theta=0.0), "rope_theta"), (dict(rope_theta=-1.0), "rope_theta"),
    (dict(rms_norm_eps=-1.0), "rms_norm_eps"), (dict(initializer_range=-0.1), "initializer_range")])
def test_impossible_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        nano.Config(**change)


# --- checkpoints -----------------------------------------------------------------------------------------------------

def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("change", [{}, dict(tie_word_embeddings=False, qk_norm=True)])
def test_checkpoint_round_trip_is_exact_and_holds_only_plain_types(tmp_path, change):
    m = build(**change)
    state = {n: dict(exp_avg=torch.randn_like(p), step=torch.tensor(3.0)) for n, p in m.named_parameters()}
    path = nano.save_checkpoint(tmp_path, m, step=7, consumed_samples=56, stage="base", tokenizer="bytes", optimizer=state,
                                train_config=dict(lr=0.1, text="a"))
    raw = torch.load(path, weights_only=True)
    assert raw["step"] == 7 and raw["consumed_samples"] == 56 and raw["stage"] == "base" and raw["tokenizer"] == "bytes"
    assert raw["model_config"] == dataclasses.asdict(m.config) and raw["train_config"] == dict(lr=0.1, text="a")
    assert all(v.dtype == torch.float32 for v in raw["model"].values()) and raw["model"].keys() == dict(m.named_parameters()).keys()
    back, extra = nano.load_checkpoint(tmp_path)
    assert same_weights(m, back) and back.config == m.config and "model" not in extra
    assert all(torch.equal(extra["optimizer"][n][k], v) for n, s in state.items() for k, v in s.items())
    assert torch.equal(logits_of(m, tokens(1, 9)), logits_of(back, tokens(1, 9)))
    assert same_weights(nano.load_checkpoint(path)[0], m)
    assert sorted(x.name for x in tmp_path.iterdir()) == [path.name]


def test_a_model_in_bfloat16_is_saved_in_float32(tmp_path):
    m = build().to(torch.bfloat16)
    saved = nano.read_checkpoint(nano.save_checkpoint(tmp_path, m))["model"]
    assert all(w.dtype == torch.float32 and torch.equal(w, p.float()) for w, p in zip(saved.values(), m.parameters()))


def test_loading_draws_no_random_numbers(tmp_path):
    nano.save_checkpoint(tmp_path, build())
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    nano.load_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_only_the_newest_two_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 250, 1000):
        nano.save_checkpoint(tmp_path, build(), step=step)
    assert nano.load_checkpoint(tmp_path)[1]["step"] == 1000 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_unreadable_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, capsys, damage):
    old, new = build(1), build(2)
    nano.save_checkpoint(tmp_path, old, step=5)
    path = nano.save_checkpoint(tmp_path, new, step=10)
    raw = path.read_bytes()
    broken = {"truncated": raw[:len(raw) // 2], "empty": b"", "text": b"hello\n"}[damage]
    path.write_bytes(broken)
    back, extra = nano.load_checkpoint(tmp_path)
    err = capsys.readouterr().err
    assert extra["step"] == 5 and same_weights(back, old)
    assert err.count("\n") == 1 and "WARNING" in err and path.name in err


def test_no_readable_checkpoint_and_none_at_all_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint"):
        nano.load_checkpoint(tmp_path)
    with pytest.raises(SystemExit, match="nowhere: no checkpoint"):
        nano.load_checkpoint(tmp_path / "nowhere")
    for step in (1, 2):
        nano.save_checkpoint(tmp_path, build(), step=step).write_bytes(b"PK\x03\x04")
    with pytest.raises(SystemExit, match="none of the 2 checkpoints is readable"):
        nano.load_checkpoint(tmp_path)


def test_a_torch_file_that_is_no_checkpoint_of_ours_is_one_line(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "ckpt_00000001.pt")
    with pytest.raises(SystemExit) as error:
        nano.load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"model": Evil()}, tmp_path / "ckpt_00000001.pt")
    with pytest.raises(SystemExit):
        nano.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- python model.py -------------------------------------------------------------------------------------------------

def test_model_py_without_arguments_prints_the_table_of_presets(capsys):
    nano.main(infra.cli(nano.Options, nano.PRESETS, []))
    out = capsys.readouterr().out
    assert all(name in out for name in nano.PRESETS) and "3,075,098,624" in out and "73,728" in out


def test_model_py_streams_the_text_that_generate_gives(tmp_path, capsys):
    m = build(vocab_size=320)
    nano.save_checkpoint(tmp_path, m)
    argv = [str(tmp_path), "--prompt=käse", "--max_new_tokens=20", "--seed=3", "--device=cpu", "--dtype=float32", "--temperature=1.0"]
    result = nano.main(infra.cli(nano.Options, nano.PRESETS, argv))
    from data import get_tokenizer
    tok = get_tokenizer("bytes")
    (ids, _), = nano.generate(m, [tok.encode("käse")], 20, seed=3, stop_ids=[tok.eos])
    expected = tok.decode([i for i in ids if i != tok.eos])
    out = capsys.readouterr().out
    assert out.startswith("käse") and out[4:].rstrip("\n").rstrip("\ufffd") == expected.rstrip("\ufffd\n") and result["text"] == out[4:-1]
    assert nano.main(infra.cli(nano.Options, nano.PRESETS, argv)) == result


def test_decoding_bench_reports_its_keys(capsys):
    argv = ["--bench", "--batch=2", "--prompt_tokens=4", "--max_new_tokens=4", "--hidden_size=32", "--num_hidden_layers=1", "--device=cpu", "--dtype=float32"]
    result = nano.main(infra.cli(nano.Options, nano.PRESETS, argv))
    assert {"tok_per_s", "spread", "seconds_per_step", "mfu", "mfu_convention", "peak_memory_bytes", "machine"} <= result.keys()
    assert result["spread"][0] <= result["tok_per_s"] <= result["spread"][1] and result["mfu"] is None
    assert result["seconds_per_step"] == pytest.approx(2 / result["tok_per_s"], rel=0.01)
    assert capsys.readouterr().out.count("\n") == 1
