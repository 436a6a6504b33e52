"""Architecture variants of model.py: against transformers, closed forms, and themselves: cached, packed, cut over ranks, counted, saved."""
import dataclasses, functools, json
from types import SimpleNamespace

import pytest
import torch

import infra, model as nano, train
from models import random_model
from processes import run

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32, rope_theta=100.0, no_rope_layer_interval=2, initializer_range=0.3)      # wide: nothing is nearly uniform
KINDS = {"MoE": dict(num_experts=5), "MoE, shared": dict(num_experts=6, num_experts_per_tok=3, num_shared_experts=2, moe_intermediate_size=10),
         "all": dict(num_experts=4, num_experts_per_tok=1, num_shared_experts=1, kv_lora_rank=16, attention_chunk=7, sliding_window=5),
         "MLA": dict(kv_lora_rank=12, qk_rope_head_dim=6), "chunk": dict(attention_chunk=5), "chunk of 1": dict(attention_chunk=1),
         "chunk, window": dict(attention_chunk=6, sliding_window=4)}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], [60, 61, 62], [5] * 13]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(seed=0, **change):
    return random_model(seed, **SHAPE | change)


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
        changed = (logits_of(m, other) - before).abs().amax(-1)[0] > 2e-5    # experts multiply other numbers of rows at a time
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


# --- mixture of experts ----------------------------------------------------------------------------------------------

MOE = dict(num_experts=6, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=12)


def test_experts_and_router_are_deepseeks_in_value_and_gradient():
    theirs = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2",
                                 reason="the package transformers is not installed: no second opinion on MoE")
    moe, x = build(**MOE).layers[0].mlp, torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    hf = theirs.DeepseekV2Moe(theirs.DeepseekV2Config(
        hidden_size=32, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1, topk_method="greedy",
        routed_scaling_factor=1.0, num_attention_heads=4, num_key_value_heads=4))
    stack = lambda *names: torch.stack([torch.cat([getattr(e, n).weight for n in names]) for e in moe.experts]).detach()
    weights = {"experts.gate_up_proj": stack("gate_proj", "up_proj"), "experts.down_proj": stack("down_proj"), "gate.weight": moe.gate.weight}
    hf.load_state_dict(weights | {n: p for n, p in moe.state_dict().items() if n.startswith("shared")})
    a, b, push = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y, expected = moe(a), hf(b)
    (y * push).sum().backward(), (expected * push).sum().backward()
    assert (y - expected).abs().max() < 1e-5 and (a.grad - b.grad).abs().max() < 1e-4
    assert (moe.gate.weight.grad - hf.gate.weight.grad).norm() < 1e-4 * hf.gate.weight.grad.norm()
    down = torch.stack([e.down_proj.weight.grad for e in moe.experts])
    assert (down - hf.experts.down_proj.grad).norm() < 1e-5 * down.norm()


def test_of_n_alike_experts_the_token_meets_k_and_without_a_width_they_cost_what_one_mlp_does():
    m, dense = build(num_experts=8), build()
    for layer, plain in zip(m.layers, dense.layers):
        layer.mlp.gate.weight.data.zero_()              # all as likely: 1 / N each
        for e in layer.mlp.experts:
            e.load_state_dict({n: p[:24] if p.shape[0] == 48 else p[:, :24] for n, p in plain.mlp.state_dict().items()})
    x = torch.randn(1, 5, 32)
    half = m.layers[0].mlp.experts[0](x)                # of the plain MLP's 48
    assert (m.layers[0].mlp(x) - 2 / 8 * half).abs().max() < 1e-6
    router = 4 * 8 * 32
    assert nano.num_params(m.config, active=True) == nano.num_params(dense.config) + router
    shared = dataclasses.replace(m.config, num_shared_experts=1)          # three of a third of the width
    assert nano.num_params(shared, active=True) == nano.num_params(m.config, active=True)
    assert nano.num_params(m.config) == nano.num_params(dense.config) + router + 4 * 6 * 3 * 32 * 24
    assert nano.flops_per_token(m.config, 50) == nano.flops_per_token(dense.config, 50) + 6 * router
    assert nano.lora_params(m.config, 2) == 2 * sum(sum(p.shape) for n, p in m.named_parameters() if "layers" in n and p.dim() == 2)


@pytest.mark.parametrize("n, k", [(4, 1), (8, 2), (64, 6)])
def test_balance_is_alpha_when_all_are_used_alike_and_n_times_that_when_one_is(n, k):
    m, T = build(num_experts=n, num_experts_per_tok=k, moe_intermediate_size=4, router_aux_loss_coef=0.25), 1000
    both = lambda chosen, p: torch.stack((chosen, p), dim=1)     # (L, 2, N)
    value = lambda *usage: float(m.balance(both(*usage), both(*usage)))
    even, one = torch.full((4, n), T / n), torch.zeros(4, n)
    one[:, :k] = T                                      # the same k always
    assert value(k * even, even) == pytest.approx(4 * 0.25 * T)  # of 4 layers, T tokens
    assert value(one, one / k) == pytest.approx(4 * 0.25 * T * n / k)
    assert value(one, even) == value(k * even, one / k) == pytest.approx(4 * 0.25 * T)      # both must lean the same way
    assert value(0 * one, 0 * one) == 0                 # a step without a counted token
    p = torch.rand(300, n, generator=torch.Generator().manual_seed(0)).softmax(-1)
    chosen = p.topk(k).indices.flatten().bincount(minlength=n).float()
    playbook = 0.25 * float((chosen / (300 * k) * p.mean(0)).sum())       # alpha sum f P: alpha / N at best
    assert value(chosen[None], p.sum(0)[None]) / 300 == pytest.approx(n * playbook)
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="the package transformers is not installed")
    theirs = float(mixtral.load_balancing_loss_func((p.log(),), n, k))    # its f is of tokens, and sums to k
    assert value(chosen[None], p.sum(0)[None]) / 300 == pytest.approx(0.25 * theirs / k, rel=1e-5)


def uneven_batch():
    """Four rows of 12 whose counted targets number 11, 10, 3 and 8."""
    ids, targets = tokens(4, 12), tokens(4, 12, seed=5)
    for row, hidden in enumerate(([5], [2, 10], range(9), [3, 7, 0, 11])):
        targets[row, list(hidden)] = -100
    return ids, targets, torch.tensor([[0] * 6 + [1] * 6, [0] * 3 + [1] * 8 + [2], [0] * 12, [0] * 4 + [1] * 4 + [2] * 4])


def step_gradients(folder, **change):
    """What a training step of uneven_batch makes on this rank: its part of the loss and the gradients, by name."""
    cfg = train.Config(device="cpu", dtype="float32", z_loss=0.01, **change)
    rt = infra.setup(cfg)
    model, _ = nano.load_checkpoint(folder, tp=rt.tp_group)
    each = 4 // rt.dp_size
    part = slice(rt.dp_rank * each, (rt.dp_rank + 1) * each)
    loss = train.forward_backward(train.data_parallel(model, rt, 1, 8), [x[part] for x in uneven_batch()], cfg, rt)
    return float(loss), {n: nano.unshard([p.grad], [p.tp_dim], rt.tp_group)[0] for n, p in model.named_parameters()}


def test_a_training_step_balances_the_whole_step_whatever_its_passes_replicas_and_slices(tmp_path):
    m, (ids, targets, docs) = build(**MOE, router_aux_loss_coef=0.5), uneven_batch()
    nano.save_checkpoint(tmp_path, m)
    probabilities, counted = [], targets != -100
    for layer in m.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, logits: probabilities.append(logits.softmax(-1)[counted]))
    logits, expected = m(ids, docs)[counted], 0
    for p in probabilities:                             # as it is written: f, P, alpha N sum f P, of the step's 32 counted tokens
        f = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0).mean(0) / 2
        expected = expected + 0.5 * 6 * (f * p.mean(0)).sum()
    nll = torch.nn.functional.cross_entropy(logits, targets[counted])
    (nll + 0.01 * logits.logsumexp(-1).square().mean() + expected).backward(retain_graph=True)
    total = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    expected.backward()                                 # what the balance alone pushes: the router, and what is below it
    assert len(probabilities) == 4 and all(layer.mlp.gate.weight.grad.norm() > 1e-3 for layer in m.layers)
    for world, change in ((1, {}), (1, dict(micro_batch=2)), (1, dict(micro_batch=1)), (2, {}), (2, dict(micro_batch=1)), (2, dict(tp=2, micro_batch=2))):
        ranks = run(world, functools.partial(step_gradients, tmp_path, **change))
        loss = sum(loss for loss, _ in ranks) / change.get("tp", 1)
        assert loss == pytest.approx(nll.item(), rel=1e-5), change    # what is reported is the likelihood alone
        for _, grads in ranks:
            for n, g in grads.items():
                assert (g - total[n]).norm() <= 5e-5 * total[n].norm() + 1e-7, (world, change, n)


def test_losses_by_token_and_evaluation_know_nothing_of_balance():
    m, (ids, targets, docs) = build(**MOE), uneven_batch()
    nll, z, usage = m(ids, docs, targets)
    assert m(ids, docs, targets, reduction="none").sum().item() == pytest.approx(-nll.item(), rel=1e-5)
    assert usage.shape == (4, 2, 6) and (usage[:, 0].sum(1) == 2 * 32).all() and usage[:, 1].sum(1).tolist() == pytest.approx([32] * 4)
    assert len(build()(ids, docs, targets)) == 2


def test_an_expert_that_nobody_chooses_has_a_gradient_of_zero():
    m, (ids, targets, docs) = build(**MOE), uneven_batch()
    for layer in m.layers:
        layer.mlp.gate.forward = lambda x: torch.arange(6.0).expand(*x.shape[:-1], 6) + 0 * x.sum(-1, keepdim=True)     # 4 and 5, always
    nll, z, usage = m(ids, docs, targets)
    nll.backward()
    assert (usage[:, 0] == torch.tensor([0, 0, 0, 0, 32, 32])).all()
    used = [float(e.up_proj.weight.grad.norm()) for e in m.layers[0].mlp.experts]
    assert used[:4] == [0] * 4 and min(used[4:]) > 0


# --- runs ------------------------------------------------------------------------------------------------------------

def test_a_run_of_all_variants_together_learns_and_resumes_bit_for_bit(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", lambda *_: None)
    cfg = train.Config(**SHAPE | KINDS["all"] | dict(vocab_size=0, initializer_range=0.02), text=str(corpus), steps=12, batch_tokens=256, device="cpu",
                       dtype="float32", out=str(tmp_path / "whole"), val_fraction=0.1, log_every=1, eval_every=100, save_every=6)
    train.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert rows[11]["loss"] < rows[0]["loss"] - 0.5 and rows[11]["skipped"] == 0
    newest, oldest = nano.checkpoints(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / oldest.name).write_bytes(oldest.read_bytes())
    train.main(dataclasses.replace(cfg, out=str(tmp_path / "part"), resume=True))
    a, b = (nano.load_checkpoint(tmp_path / out)[0] for out in ("whole", "part"))
    assert oldest.name == "ckpt_00000006.pt" and all(map(torch.equal, a.parameters(), b.parameters())) and a.config == b.config
    assert a.config.num_experts == 4 and a.config.kv_lora_rank == 16 and len(list(a.parameters())) == len(list(build(**KINDS["all"]).parameters()))


@pytest.mark.parametrize("change", [dict(kv_lora_rank=64), dict(num_experts=5, moe_intermediate_size=200), dict(num_experts=9, num_shared_experts=1),
                                    dict(kv_lora_rank=48, qk_rope_head_dim=16, num_experts=4, num_experts_per_tok=1)])
def test_a_blocks_activations_are_what_torch_keeps_for_the_backward_pass(change):
    """As tests/test_plan.py has it for the plain block: a CPU's RMSNorm keeps two float32 copies where a GPU's keeps its input."""
    c = nano.Config(hidden_size=128, intermediate_size=688, num_attention_heads=8, num_key_value_heads=2, head_dim=16, **change)
    net, kept, rows, T = nano.Transformer(c), {}, 2, 250
    net.compute_dtype = torch.bfloat16
    rope, x = net.rope(torch.arange(T)), torch.randn(rows, T, 128).bfloat16().requires_grad_()
    keep = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # they stay alive: no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (keep(t), t)[1], lambda t: t):
        net.layers[0](x, rope, (None, None))
    others = {tuple(sorted(t.shape)) for t in (*net.layers[0].parameters(), *rope)}
    halves = sum(t.untyped_storage().nbytes() for t in kept.values() if t.itemsize == 2 and tuple(sorted(t.shape)) not in others)
    norms, router = 2 * (128 + 128 + c.kv_lora_rank), 4 * (128 + c.num_experts) * (c.num_experts > 0)
    assert nano.training_bytes(c, 1)["activations"] / c.num_hidden_layers == pytest.approx(halves / rows / T + norms + router,
                                                                                          rel=0.05 if c.num_experts else 0.01)


@pytest.mark.parametrize("change, shared", [
    (dict(), 0), (dict(kv_lora_rank=48, qk_rope_head_dim=16), 2 * (48 + 16)),              # the latent, before and after its norm
    (dict(num_experts=5, num_experts_per_tok=2), 2 * (32 + 5) + 2 * 2 * 32)])               # the router's float32, what experts get and give
def test_ranks_share_the_heads_and_the_mlp_and_hold_the_rest_of_the_activations_each(change, shared):
    c = nano.Config(**SHAPE | change)
    one, two, four = (nano.training_bytes(c, 10, tp)["activations"] for tp in (1, 2, 4))
    assert one - two == 2 * (two - four) > 0 and 2 * two - one == 10 * 4 * 2 * (4 * 32 + shared)      # 10 tokens, 4 layers, bf16


# --- what cannot be --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    *((dict([(name, -1)]), f"{name}=-1: 0 or more expected") for name in ("attention_chunk", "kv_lora_rank", "qk_rope_head_dim", "num_experts",
      "moe_intermediate_size", "num_shared_experts", "router_aux_loss_coef")),
    (dict(num_experts=4, num_experts_per_tok=5), "num_experts_per_tok=5: 1 to num_experts=4"), (dict(num_experts=4, num_experts_per_tok=0), "num_experts_per_tok=0"),
    (dict(num_experts=600, num_experts_per_tok=513), "intermediate_size=512"),
    (dict(kv_lora_rank=8, qk_norm=True), "kv_lora_rank=8, .*qk_norm=True"), (dict(qk_rope_head_dim=4), "kv_lora_rank=0, qk_rope_head_dim=4"),
    (dict(kv_lora_rank=8, qk_rope_head_dim=5), "qk_rope_head_dim=5: an even number"),
    (dict(kv_lora_rank=8, head_dim=6), "qk_rope_head_dim=3: an even number")])
def test_impossible_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        nano.Config(**change)


def test_an_expert_that_cannot_be_cut_is_refused_by_name():
    c = nano.Config(**SHAPE, num_experts=4, moe_intermediate_size=25)
    with pytest.raises(ValueError, match="--tp=2: a divisor of expert_size=25 expected"):
        nano.Transformer(c, SimpleNamespace(size=lambda: 2))
    assert not c.indivisible(1) and c.indivisible(2) == ["expert_size"]
    assert not dataclasses.replace(c, num_experts=0).indivisible(2)


@pytest.mark.parametrize("change", [{}, dict(num_experts=4), dict(kv_lora_rank=16), dict(qk_norm=True), dict(tie_word_embeddings=False)],
                         ids=str)
def test_a_copy_in_bfloat16_computes_the_bits_of_the_model_that_casts_its_weights(change):
    """Else the KL to a reference that is the same model would not begin at 0, nor sampling be on-policy."""
    m = random_model(vocab_size=64, **change)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0.5, 0.1)                    # norms too
    m.compute_dtype = torch.bfloat16
    twin, ids = nano.inference_copy(m), torch.randint(0, 64, (2, 50))
    assert twin.embed_tokens.weight.dtype == torch.bfloat16
    assert nano.inference_copy(twin) is twin
    assert torch.equal(*(each(ids, None, ids, "none", 0.7) for each in (m, twin)))
