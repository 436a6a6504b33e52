"""Architecture variants of model.py: against transformers, closed forms, and themselves: cached, packed, cut over ranks, counted, saved."""
import dataclasses, json

import pytest
import torch

import infra, model as nano, train
from processes import run

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32, rope_theta=100.0, no_rope_layer_interval=2, initializer_range=0.3)      # wide: nothing is nearly uniform
KINDS = {"MLA": dict(kv_lora_rank=12, qk_rope_head_dim=6), "MLA, chunk": dict(kv_lora_rank=16, attention_chunk=5, sliding_window=4),
         "chunk": dict(attention_chunk=5), "chunk of 1": dict(attention_chunk=1), "chunk, window": dict(attention_chunk=6, sliding_window=4)}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], [60, 61, 62], [5] * 13]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(seed=0, **change):
    """A small model whose norms are not all one either."""
    torch.manual_seed(seed)
    m = nano.Transformer(nano.Config(**SHAPE | change))
    for p in m.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return m


def tokens(*shape, seed=1):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(m, ids, docs=None, grad=False):
    """Training and evaluation may take different paths through attention: tests ask for both."""
    with torch.set_grad_enabled(grad):
        return m(ids, docs).detach()


# --- what every variant must do --------------------------------------------------------------------------------------

@every_kind
def test_packed_documents_give_the_same_logits_as_separate_ones(kind):
    m, sizes = build(**KINDS[kind]), [5, 1, 9, 7]
    rows = [[tokens(1, n, seed=10 * r + i) for i, n in enumerate(sizes)] for r in range(2)]
    docs = torch.tensor([sum([[i] * n for i, n in zip(ids, sizes)], []) for ids in ((7, -3, 0, 4), (0, 1, 2, 3))])
    for grad in (False, True):
        packed = logits_of(m, torch.cat([torch.cat(row, 1) for row in rows]), docs, grad)
        separate = torch.cat([torch.cat([logits_of(m, d, None, grad) for d in row], 1) for row in rows])
        assert (packed - separate).abs().max() < 5e-5


@every_kind
def test_a_later_token_never_changes_a_logit_and_both_paths_agree(kind):
    m, ids = build(**KINDS[kind]), tokens(1, 12)
    before = logits_of(m, ids)
    assert (before - logits_of(m, ids, None, True)).abs().max() < 5e-5
    for t in range(12):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % 64
        changed = (logits_of(m, other) - before).abs().amax(-1)[0] > 1e-6
        assert not changed[:t].any() and changed[t]


@every_kind
def test_greedy_cached_equals_greedy_uncached_for_prompts_of_unequal_length(kind):
    m = build(**KINDS[kind])
    for prompt, (ids, logprobs) in zip(PROMPTS, nano.generate(m, PROMPTS, 12, temperature=0)):
        row = list(prompt)
        for logp in logprobs:
            logits = logits_of(m, torch.tensor([row]))[0, -1]
            row.append(int(logits.argmax()))
            assert logp == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
        assert len(ids) == 12 and ids == row[len(prompt):]
    alone = [nano.generate(m, [p], 12, seed=[i])[0][0] for i, p in enumerate(PROMPTS)]     # and rows do not see their neighbours
    assert [ids for ids, _ in nano.generate(m, PROMPTS, 12, seed=range(len(PROMPTS)))] == alone


@every_kind
def test_parameters_and_cache_are_what_the_formulas_say(kind):
    m, stored = build(**KINDS[kind]), []
    assert nano.num_params(m.config) == sum(p.numel() for p in m.parameters())
    for layer in m.layers:
        layer.register_forward_pre_hook(lambda module, args: stored.append(sum(x.numel() for x in args[3][:-1])))
    list(nano.stream(m, [[1, 2, 3], [4]], 5))
    assert sum(stored[-4:]) * 2 == 2 * 8 * nano.kv_bytes_per_token(m.config)  # 2 rows, 3 + 5 places, bf16


@every_kind
def test_a_checkpoint_round_trip_is_exact(tmp_path, kind):
    m = build(**KINDS[kind])
    nano.save_checkpoint(tmp_path, m)
    back, _ = nano.load_checkpoint(tmp_path)
    assert back.config == m.config and torch.equal(logits_of(m, tokens(1, 9)), logits_of(back, tokens(1, 9)))


def on_a_rank(folder, tp, ids, docs, push):
    """Logits, their gradients and greedy tokens of a checkpoint that `tp` ranks share."""
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    model, _ = nano.load_checkpoint(folder, tp=rt.tp_group)
    logits = model(ids, docs)
    (logits * push).sum().backward()
    return logits.detach(), {n: (p.grad, p.tp_dim) for n, p in model.named_parameters()}, nano.generate(model, PROMPTS, 6, temperature=0)


@every_kind
def test_two_ranks_compute_what_one_computes(tmp_path, kind):
    nano.save_checkpoint(tmp_path, build(**KINDS[kind]))
    docs, push = torch.tensor([[0] * 4 + [1] * 7, [0] * 11]), torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(2))
    (logits, grads, new), = run(1, on_a_rank, tmp_path, 1, tokens(2, 11), docs, push)
    ranks = run(2, on_a_rank, tmp_path, 2, tokens(2, 11), docs, push)
    for got, _, ids in ranks:
        assert (got - logits).abs().max() < 5e-5 and [i for i, _ in ids] == [i for i, _ in new]
    for name, (grad, _) in grads.items():
        (a, dim), (b, _) = (g[name] for _, g, _ in ranks)
        assert dim is not None or torch.equal(a, b), name
        assert ((a if dim is None else torch.cat((a, b), dim)) - grad).norm() <= 2e-5 * grad.norm() + 1e-5, name


@every_kind
def test_export_is_refused_by_name_and_no_foreign_config_switches_it_on(tmp_path, kind):
    pytest.importorskip("safetensors", reason="the package safetensors is not installed: no Hugging Face directories")
    m = build(**KINDS[kind])
    switch = next(iter(KINDS[kind]))
    with pytest.raises(SystemExit, match=f"{switch}={getattr(m.config, switch)}, .*none of them expected"):
        nano.to_hf(m, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    nano.to_hf(build(), tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    plain = json.loads(path.read_text())
    for name, value in KINDS[kind].items():
        assert name not in plain
        path.write_text(json.dumps(plain | {name: value}))
        if name != "sliding_window":                    # theirs too: without use_sliding_window of no consequence
            with pytest.raises(SystemExit, match=f"{name}={value}: nothing of that name expected"):
                nano.hf_config(path)
        else:
            assert nano.hf_config(path).sliding_window == 0


# --- chunked attention -----------------------------------------------------------------------------------------------

def chunks(position, size):
    """Brute force: position (n,) of each token in its document -> bool (n, n), in one chunk and not in the future."""
    return torch.tensor([[b <= a and a // size == b // size for b in position] for a in position])


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_the_mask_of_chunks_is_brute_forces_and_transformers(size):
    docs = [[0] * 4 + [1] * 5 + [9] * 3, [2] * 12]
    positions = [[*range(4), *range(5), *range(3)], [*range(12)]]
    expected = torch.stack([chunks(p, size) & (torch.tensor(d)[:, None] == torch.tensor(d)) for p, d in zip(positions, docs)])
    assert torch.equal(nano.visible(12, "cpu", torch.tensor(docs), chunk=size), expected)
    assert torch.equal(nano.visible(12, "cpu", chunk=size)[0], expected[1])
    near = nano.visible(12, "cpu", torch.tensor(docs), window=2, chunk=size)
    assert torch.equal(near, expected & nano.visible(12, "cpu", window=2))
    masks = pytest.importorskip("transformers.masking_utils", reason="the package transformers is not installed: no second opinion on chunks")
    theirs, places = masks.chunked_causal_mask_function(size, torch.tensor([0, 3])), torch.arange(12)
    at = lambda row: torch.tensor([[bool(theirs(row, 0, q, k)) for k in places] for q in places])
    assert torch.equal(at(0), expected[1]) and torch.equal(at(1)[3:, 3:], chunks(range(9), size))


def test_with_rope_everywhere_chunks_are_documents_of_their_own_and_nope_layers_see_all():
    ids, other = tokens(2, 14), tokens(2, 14, seed=2)
    other[:, 1:] = ids[:, 1:]
    for grad in (False, True):
        m = build(attention_chunk=4, no_rope_layer_interval=0)
        pieces = torch.cat([logits_of(m, part, None, grad) for part in ids.split(4, dim=1)], 1)
        assert (logits_of(m, ids, None, grad) - pieces).abs().max() < 5e-5
        m = build(attention_chunk=4, no_rope_layer_interval=1)
        assert torch.equal(logits_of(m, ids, None, grad), logits_of(build(no_rope_layer_interval=1), ids, None, grad))
        m = build(attention_chunk=4)
        assert (logits_of(m, ids, None, grad) != logits_of(m, other, None, grad)).any(-1).all()


# --- multi-head latent attention -------------------------------------------------------------------------------------

MLA = dict(kv_lora_rank=12, qk_rope_head_dim=6, no_rope_layer_interval=0)


def deepseek(**change):
    """A random model of transformers: DeepSeek-V3 with RoPE in halves, without compressed queries; and our model with its weights."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: no second opinion on MLA and MoE")
    m, c = build(**MLA | change), nano.Config(**SHAPE | MLA | change)
    rope = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.rope_factor > 1:
        rope |= dict(rope_type="yarn", factor=c.rope_factor, original_max_position_embeddings=c.original_max_position_embeddings)
    shape = {k: getattr(c, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                        "max_position_embeddings", "kv_lora_rank", "qk_rope_head_dim", "tie_word_embeddings")}
    hf = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **shape, q_lora_rank=None, qk_nope_head_dim=c.head_size, v_head_dim=c.head_size, num_key_value_heads=None, rope_interleave=False,
        first_k_dense_replace=c.num_hidden_layers, rope_parameters=rope, eos_token_id=None, num_mtp_layers=0)).float().eval()
    weights = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in m.state_dict().items()}
    weights = {f"{k}.weight" if k.endswith("kv_b_proj") else k: v for k, v in weights.items()}
    hf.load_state_dict(weights | {"lm_head.weight": weights.get("lm_head.weight", m.embed_tokens.weight)})
    return m, hf


@pytest.mark.parametrize("change", [{}, dict(tie_word_embeddings=False, head_dim=10), dict(
    rope_factor=2.0, original_max_position_embeddings=16, max_position_embeddings=32, head_dim=16, qk_rope_head_dim=8)])
def test_latent_attention_is_deepseeks(change):
    m, hf = deepseek(**change)
    ids = tokens(2, 20)
    for grad in (False, True):
        with torch.no_grad():
            assert (hf(ids).logits - logits_of(m, ids, None, grad)).abs().max() < 1e-4
    theirs = hf.generate(ids[:, :6], max_new_tokens=12, do_sample=False, pad_token_id=0)[:, 6:]
    assert theirs.tolist() == [new for new, _ in nano.generate(m, ids[:, :6].tolist(), 12, temperature=0)]


@pytest.mark.parametrize("grad", [False, True])
def test_without_rotation_position_does_not_matter_to_latent_attention(grad):
    ids, order = tokens(1, 9), [3, 6, 0, 5, 7, 1, 4, 2, 8]  # all but the last, whose logits we compare
    for interval in (0, 1):
        m = build(kv_lora_rank=12, num_hidden_layers=1, no_rope_layer_interval=interval)
        gap = (logits_of(m, ids, None, grad)[0, -1] - logits_of(m, ids[:, order], None, grad)[0, -1]).abs().max()
        assert gap < 1e-5 if interval else gap > 0.01


def test_both_kinds_of_masks_and_long_prompts_read_the_latents_alike():
    m = build(**MLA, num_hidden_layers=2)
    ids, docs = tokens(1, 1100), (torch.arange(1100) >= 1090).long()[None]
    a, b = logits_of(m, ids, docs, True), logits_of(m, ids, docs, False)  # no T x T scores where rows are that long
    assert (a - b).abs().max() < 1e-3
    (new, logps), = nano.generate(m, ids.tolist(), 2, temperature=0)
    last = logits_of(m, ids)[0, -1]
    assert new[0] == int(last.argmax()) and logps[0] == pytest.approx(float(last.log_softmax(-1).max()), abs=1e-3)


def test_the_playbooks_latent_cache_is_4_and_a_half_head_dims_a_layer_and_whole_on_every_rank():
    of = lambda tp=1, **kw: nano.kv_bytes_per_token(nano.Config(**kw), 1, tp)
    assert of(head_dim=128, kv_lora_rank=512, num_hidden_layers=3, num_attention_heads=16) == 4.5 * 128 * 3
    assert of(head_dim=128, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=60, num_attention_heads=128) == 60 * 576  # DeepSeek-V2
    assert of(2, kv_lora_rank=32) == of(kv_lora_rank=32) and of(2) * 2 == of()
    c = nano.Config(kv_lora_rank=32, qk_rope_head_dim=8)  # 4 heads of 32: scores over 40 numbers, values of 32
    assert nano.flops_per_token(c, 100) - nano.flops_per_token(c, 0) == 3 * 2 * 4 * 4 * (40 + 32) * 100


# --- what cannot be --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    *((dict([(name, -1)]), f"{name}=-1: 0 or more expected") for name in ("attention_chunk", "kv_lora_rank", "qk_rope_head_dim")),
    (dict(kv_lora_rank=8, qk_norm=True), "kv_lora_rank=8, .*qk_norm=True"), (dict(qk_rope_head_dim=4), "kv_lora_rank=0, qk_rope_head_dim=4"),
    (dict(kv_lora_rank=8, qk_rope_head_dim=5), "qk_rope_head_dim=5: an even number"),
    (dict(kv_lora_rank=8, head_dim=6), "qk_rope_head_dim=3: an even number")])
def test_impossible_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        nano.Config(**change)
