"""What generation and rollouts must do: rows that share a prompt, stop and leave; recorded log-probs; one step of grpo.py."""
import copy, dataclasses, functools, gc, json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo   # otherwise every forked rank imports it anew, for seconds, as soon as it makes an optimizer
from torch.nn import functional as F

import data, grpo, infra, model as nano, train
from models import random_model
from processes import run as ranks

CPU = infra.setup(infra.Machine(device="cpu", dtype="float32"))         # one process, alone
BYTES = data.get_tokenizer("bytes")
END, EOS = BYTES.special["<|im_end|>"], BYTES.eos
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=32, rope_theta=100.0, initializer_range=0.3)
KINDS = {"nope every 4th": {}, "window": dict(sliding_window=3), "all nope": dict(no_rope_layer_interval=1),
         "no nope": dict(no_rope_layer_interval=0), "qk_norm, untied": dict(qk_norm=True, tie_word_embeddings=False),
         "all of it": dict(sliding_window=2, no_rope_layer_interval=2, qk_norm=True, num_key_value_heads=1)}


def build(seed=0, **change):
    return random_model(seed, **SHAPE | change)


def gradients(m):
    return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}


def assert_close(got, expected, tolerance=1e-4):
    """Gradients by name, the difference relative to what is expected."""
    assert got.keys() == expected.keys() and all(g is not None for g in got.values())
    for n, g in expected.items():
        assert (got[n] - g).norm() <= tolerance * g.norm() and g.norm() > 0, (n, float((got[n] - g).norm() / g.norm()))


def assert_same(got, expected):
    """To the bit."""
    assert got.keys() == expected.keys() and all(torch.equal(g, expected[n]) for n, g in got.items())


# --- generation: equal and unequal prompts in one batch --------------------------------------------------------------

A, B, C, D = [3, 1, 4, 1, 5, 9, 2, 6], [7], [60, 61, 62], [5] * 13
PROMPTS = [A, B, A, C, B, A, D, tuple(C)]                # 4 different ones, and what is equal need not be a list


def shapes_of(m, layer=0):
    """From now on the list receives (rows, tokens) of every call of that layer."""
    seen = []
    m.layers[layer].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_equal_full_forwards_for_unequal_prompts_with_duplicates(kind):
    m = build(**KINDS[kind])
    out = nano.generate(m, PROMPTS, 9, temperature=0)
    for prompt, (ids, logps) in zip(PROMPTS, out):
        with torch.no_grad():
            logp = m(torch.tensor([[*prompt, *ids[:-1]]]))[0, len(prompt) - 1:].log_softmax(-1)
        assert ids == logp.argmax(-1).tolist() and len(ids) == 9
        assert logps == pytest.approx(logp.amax(-1).tolist(), abs=1e-4)
    assert len({tuple(ids) for ids, _ in out}) == 4      # equal prompts continue alike, others do not


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_copy_of_a_prompt_gets_what_it_would_get_alone(kind, temperature):
    m, seeds = build(**KINDS[kind]), [(5, i) for i in range(7)] + [(5, 3)]      # the last row has the luck of its twin
    together = nano.generate(m, PROMPTS, 8, temperature, seed=seeds)
    for prompt, seed, (ids, logps) in zip(PROMPTS, seeds, together):
        (alone, alone_logps), = nano.generate(m, [prompt], 8, temperature, seed=[seed])
        assert ids == alone and logps == pytest.approx(alone_logps, abs=1e-4)
    assert together[3] == together[7]
    assert temperature == 0 or len({tuple(ids) for ids, _ in together}) == 7


def test_equal_prompts_are_read_once_in_every_layer_and_decoded_row_by_row():
    m = build()
    seen = [shapes_of(m, i) for i in range(4)]
    nano.generate(m, PROMPTS, 5, seed=1)
    assert all(calls == [(4, 13)] + [(8, 1)] * 4 for calls in seen)


def test_each_row_counts_its_positions_from_its_own_first_token():
    """RoPE sees distances only, but far from 0 it knows them less well: padding must not count."""
    m, seen = build(), []
    original = m.rope
    m.rope = lambda positions: seen.append(positions.tolist()) or original(positions)
    nano.generate(m, PROMPTS, 4)
    assert sorted(row[-1] + 1 for row in seen[0]) == sorted(map(len, (A, B, C, D)))
    assert all(row[12 - row[-1]:] == list(range(row[-1] + 1)) for row in seen[0])
    assert seen[1:] == [[[len(p) + n] for p in PROMPTS] for n in range(3)]


def test_copies_of_a_prompt_do_not_write_into_each_others_cache():
    m, other = build(), [A] * 6
    rows = nano.generate(m, other, 10, 1.3, seed=2)
    assert len({tuple(ids) for ids, _ in rows}) == 6
    for ids, logps in rows:
        with torch.no_grad():
            logp = (m(torch.tensor([A + ids[:-1]]))[0, len(A) - 1:] / 1.3).log_softmax(-1)
        assert logps == pytest.approx(logp[range(10), ids].tolist(), abs=1e-4)


def test_each_token_of_each_row_has_luck_of_its_own():
    m, n = build(vocab_size=16, num_hidden_layers=1), 1500
    out = torch.tensor([ids for ids, _ in nano.generate(m, [B] * n, 4, 1000.0, seed=1)])    # so hot that all ids are alike
    for i in range(4):
        assert ((torch.bincount(out[:, i], minlength=16) - n / 16).abs() < 50).all()        # 5 standard deviations
        assert all(abs(int((out[:, i] == out[:, j]).sum()) - n / 16) < 50 for j in range(i))
        assert abs(int((out[1:, i] == out[:-1, i]).sum()) - n / 16) < 50


# --- generation: rows that stop --------------------------------------------------------------------------------------

def cut(row, stop):
    """A row of a run without stop ids -> the same up to its first stop id."""
    ids, logps = row
    n = next((i + 1 for i, t in enumerate(ids) if t in stop), len(ids))
    return ids[:n], logps[:n]


def assert_rows(got, expected):
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, logps), (_, others) in zip(got, expected):
        assert logps == pytest.approx(others, abs=1e-4)


MANY = [PROMPTS[i % 8] for i in range(24)]


@pytest.mark.parametrize("kind", ["nope every 4th", "all of it"])
def test_stopping_rows_end_with_their_stop_and_change_nothing_for_the_others(kind):
    m = build(**KINDS[kind])
    free, lengths = nano.generate(m, MANY, 12, seed=3), set()
    for stop in ([], [9], range(3), range(0, 64, 5), range(0, 64, 2), range(64)):
        expected = [cut(row, set(stop)) for row in free]
        assert_rows(nano.generate(m, MANY, 12, stop_ids=stop, seed=3), expected)
        lengths |= {len(ids) for ids, _ in expected}
    assert {1, 2, 3, 4, 11, 12} <= lengths               # at the first place, at the last one, and between


def test_finished_rows_leave_when_they_are_an_eighth_of_the_batch_and_running_ones_never():
    m, stop = build(), set(range(0, 64, 9))
    whole = [cut(row, stop) for row in nano.generate(m, MANY, 20, seed=3)]
    running = [sum(len(ids) > n for ids, _ in whole) for n in range(20)]
    seen = shapes_of(m)
    nano.generate(m, MANY, 20, stop_ids=stop, seed=3)
    rows = [n for n, T in seen[1:]]
    assert len(seen) == 20 and seen[0] == (4, 13) and all(T == 1 for _, T in seen[1:]) and running[19] > 0
    for n, alive in zip(rows, running[1:]):
        assert alive <= n and n - alive < n / 8          # all that run, and of those that do not less than an eighth
    drops = [(before, after) for before, after in zip([24, *rows], rows) if before != after]
    assert len(drops) > 3 and all(before - after >= before / 8 for before, after in drops)
    assert any(n > alive for n, alive in zip(rows, running[1:]))    # fewer are not worth a copy of the cache


@pytest.mark.parametrize("how", [True, "frozen"])
def test_a_step_to_be_compiled_keeps_its_shape_and_its_rows_say_the_same(monkeypatch, how):
    m, stop, asked = build(), set(range(0, 64, 9)), []
    plain = nano.generate(m, MANY, 20, 0.9, 5, 0.95, stop, seed=3)
    monkeypatch.setattr(nano, "compiled_advance", lambda *a: asked.append(a) or nano.advance)    # the compiler is not ours
    seen = shapes_of(m)
    assert_rows(nano.generate(m, MANY, 20, 0.9, 5, 0.95, stop, seed=3, compile=how), plain)
    assert asked == [("cpu", how == "frozen")] and seen[1:] == [(24, 1)] * (len(seen) - 1)


def test_stream_yields_running_rows_in_order_and_adds_up_to_generate():
    m, stop = build(), set(range(0, 64, 9))
    whole, rows = nano.generate(m, MANY, 12, stop_ids=stop, seed=3), [([], []) for _ in MANY]
    for n, step in enumerate(nano.stream(m, MANY, 12, stop_ids=stop, seed=3)):
        assert [row for row, _, _ in step] == [i for i, (ids, _) in enumerate(whole) if len(ids) > n]
        for row, token, logp in step:
            rows[row][0].append(token), rows[row][1].append(logp)
    assert rows == whole and n + 1 == max(len(ids) for ids, _ in whole)


def test_a_stop_in_the_first_token_ends_a_row_at_once():
    m = build()
    free = nano.generate(m, PROMPTS, 6, seed=1)
    stop = {free[0][0][0], free[6][0][0]}
    got = nano.generate(m, PROMPTS, 6, stop_ids=stop, seed=1)
    assert_rows(got, [cut(row, stop) for row in free])
    assert len(got[0][0]) == len(got[6][0]) == 1 and max(len(ids) for ids, _ in got) > 1


def test_when_all_rows_stop_at_once_nothing_is_computed_any_more():
    m = build()
    free = nano.generate(m, [A] * 5, 8, temperature=0)
    ids = free[0][0]
    n = next(i for i, t in enumerate(ids) if i and t not in ids[:i])    # a token that comes first at place n
    for stop, calls in ((ids[n], n + 1), (ids[0], 1)):
        seen = shapes_of(m)
        assert_rows(nano.generate(m, [A] * 5, 8, temperature=0, stop_ids=[stop]), [cut(row, [stop]) for row in free])
        assert seen == [(1, 8)] + [(5, 1)] * (calls - 1)


def test_one_new_token_needs_the_prompts_alone_and_no_decoding():
    m = build()
    longer, seen = nano.generate(m, PROMPTS, 4, seed=2), shapes_of(m)
    for stop in ((), range(64)):
        assert_rows(nano.generate(m, PROMPTS, 1, seed=2, stop_ids=stop), [(ids[:1], logps[:1]) for ids, logps in longer])
    assert seen == [(4, 13)] * 2


# --- log-probs -------------------------------------------------------------------------------------------------------

def counted(rows):
    """[(prompt, completion)] -> ids and targets as training has them, the completions counted."""
    rows = [[([*p, *c], [0] * len(p) + [1] * len(c))] for p, c in rows]
    return data.chat_batch(rows, max(len(row[0][0]) for row in rows) - 1)[:2]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_log_probs_are_those_that_training_computes(kind, temperature):
    m = build(**KINDS[kind])
    out = nano.generate(m, MANY, 9, temperature, stop_ids=range(0, 64, 9), seed=4)
    ids, targets = counted([(p, c) for p, (c, _) in zip(MANY, out)])
    got = m(ids, None, targets, "none", temperature or 1.0).detach()    # greedy decoding records those of temperature 1
    recorded = torch.tensor([p for _, logps in out for p in logps])
    assert got.shape == targets.shape and (got[targets != -100] - recorded).abs().max() < 1e-4
    assert len({len(c) for c, _ in out}) > 2 and (got[targets == -100] == 0).all()
    if temperature not in (0, 1):
        assert (m(ids, None, targets, "none")[targets != -100] - recorded).abs().max() > 0.1


def holes(seed=1, rows=3, T=8, vocab=64):
    """Random ids and targets; of these a third, and all in one row, do not count."""
    draw = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(vocab, (2, rows, T), generator=draw)
    targets[torch.rand(rows, T, generator=draw) < 0.33] = -100
    targets[1] = -100
    return ids, targets, torch.randn(rows, T, generator=draw)


def in_chunks(m, most):
    """From now on the model keeps at most so many logits; None: as many as it likes."""
    m.counted_logps = functools.partial(nano.Transformer.counted_logps, m, **{} if most is None else dict(most=most))


def pushed(m, ids, targets, push, temperature=1.0, most=None):
    """counted_logps (B, T), chunks of at most `most` logits, and the gradients of its product with `push`."""
    in_chunks(m, most)
    m.zero_grad()
    logp = m(ids, None, targets, "none", temperature)
    (logp * push).sum().backward()
    return logp.detach(), gradients(m)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("tied", [True, False])
def test_counted_log_probs_and_gradients_equal_log_softmax_of_all_logits(tied, temperature):
    m, (ids, targets, push) = build(tie_word_embeddings=tied, qk_norm=not tied), holes()
    logp, got = pushed(m, ids, targets, push, temperature)
    m.zero_grad()
    expected = (m(ids) / temperature).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(targets == -100, 0.0, expected)
    (expected * push).sum().backward()
    assert logp.shape == (3, 8) and logp.dtype == torch.float32 and (logp - expected).abs().max() < 1e-5
    assert (logp[targets == -100] == 0).all() and (logp[targets != -100] < 0).all() and 5 < (targets == -100).sum() < 20
    assert_close(got, gradients(m))


def test_log_probs_and_sums_of_the_loss_agree():
    m, (ids, targets, _) = build(), holes()
    assert -m(ids, None, targets, "none").sum().item() == pytest.approx(m(ids, None, targets)[0].item(), rel=1e-5)


@pytest.mark.parametrize("most", [None, 0, 64 * 3])
@pytest.mark.parametrize("tied", [True, False])
def test_where_nothing_counts_there_are_zeros_with_gradients_of_zero(tied, most):
    m, (ids, _, push) = build(tie_word_embeddings=tied, qk_norm=True), holes()
    logp, got = pushed(m, ids, torch.full((3, 8), -100), push, 0.7, most)
    assert logp.shape == (3, 8) and (logp == 0).all()
    assert all(g is not None and (g == 0).all() for g in got.values())


@pytest.mark.parametrize("most", [0, 64, 64 * 3, 64 * 3 + 63])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_of_logits_change_neither_values_nor_gradients(tied, most):
    m, (ids, targets, push) = build(tie_word_embeddings=tied, qk_norm=not tied), holes()
    logp, expected = pushed(m, ids, targets, push, 0.7)
    chunked, got = pushed(m, ids, targets, push, 0.7, most)
    assert (chunked - logp).abs().max() < 1e-5 and torch.equal(chunked == 0, targets == -100)
    assert_close(got, expected, 1e-5)


def test_the_head_runs_where_targets_count_only_and_on_no_more_logits_than_allowed():
    m, (ids, targets, push) = build(), holes()
    seen, n = [], int((targets != -100).sum())
    m.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    pushed(m, ids, targets, push)
    pushed(m, ids, targets, push, most=64 * n)
    assert seen == [(n, 32)] * 2
    seen.clear()
    logp = pushed(m, ids, targets, push, most=64 * 3 + 5)[0]
    sizes = [3] * (n // 3) + [n % 3] * (n % 3 > 0)
    assert sorted(rows for rows, _ in seen) == sorted(2 * sizes)         # made anew in the backward pass, not kept
    assert logp.shape == (3, 8)


# --- log-probs under tensor parallelism ------------------------------------------------------------------------------

CASES = [(0.7, None, False), (0.7, 96 * 3, False), (1.3, 0, False), (1.0, None, True), (0.7, 96 * 3, True)]


def tp_logps(folders, tp):
    """For each checkpoint and case: values, and this rank's gradients with the dimension that they are slices of."""
    rt, results = infra.setup(infra.Machine(tp=tp, device="cpu", dtype="float32")), []
    for folder in folders:
        m, _ = nano.load_checkpoint(folder, tp=rt.tp_group)
        dims = {n: p.tp_dim for n, p in m.named_parameters()}
        for temperature, most, nothing in CASES:
            ids, targets, push = holes(vocab=96)
            targets = torch.full_like(targets, -100) if nothing else targets
            results.append((*pushed(m, ids, targets, push, temperature, most), dims))
    return results


def whole(parts, dims):
    """What the ranks hold -> the tensors; a replicated one must be the same on all of them."""
    for n, d in dims.items():
        assert d is not None or all(torch.equal(part[n], parts[0][n]) for part in parts), n
    return {n: parts[0][n] if d is None else torch.cat([part[n] for part in parts], d) for n, d in dims.items()}


def test_counted_log_probs_and_gradients_on_two_ranks_are_those_of_one_process(tmp_path):
    for name, tied in (("tied", True), ("untied", False)):
        (tmp_path / name).mkdir()
        nano.save_checkpoint(tmp_path / name, build(vocab_size=96, tie_word_embeddings=tied, qk_norm=not tied))
    folders = tmp_path / "tied", tmp_path / "untied"
    one, two = tp_logps(folders, 1), ranks(2, tp_logps, folders, 2)
    for (logp, expected, _), *parts in zip(one, *two):
        got = whole([g for _, g, _ in parts], parts[0][2])
        assert all(torch.equal(values, parts[0][0]) and (values - logp).abs().max() < 1e-5 for values, _, _ in parts)
        if (logp == 0).all():
            assert all((g == 0).all() and expected[n].shape == g.shape for n, g in got.items())
        else:
            assert_close(got, expected)
    assert sum(bool((logp == 0).all()) for logp, *_ in one) == 4 and len(one) == 10


# --- a run to roll out -----------------------------------------------------------------------------------------------

QUESTIONS = ["1+2=", "12+345=", "999+1=", "What is 7 and 5?", "40+2=", "100+100=", "Add 9 to 81.", "6+60="]
REWARD = "def variety(prompt, completion, answer):\n    return len(set(completion)) / 7 + len(completion) % 3\n"


def policy(seed=0, endless=False):
    """A random model that ends an answer after a token with a chance of a tenth or so, or never: width 0 of the residual stream
    is the same for all tokens, and the end token's logit alone gains from it."""
    m = build(seed, vocab_size=320, num_hidden_layers=2, no_rope_layer_interval=2, num_attention_heads=8, num_key_value_heads=4,
              initializer_range=0.1, max_position_embeddings=128)
    with torch.no_grad():
        m.embed_tokens.weight[:, 0], m.norm.weight[0] = 2, 1
        for layer in m.layers:
            layer.self_attn.o_proj.weight[0], layer.mlp.down_proj.weight[0] = 0, 0
        m.embed_tokens.weight[[END, EOS], 0] += torch.tensor([-9.0, -9.0] if endless else [0.75, 0.0])
    return m


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/ and another model, problems and a reward."""
    root = tmp_path_factory.mktemp("rollout")
    for name, m in (("base", policy()), ("other", policy(5)), ("endless", policy(endless=True))):
        (root / name).mkdir()
        nano.save_checkpoint(root / name, m)
    write(root / "problems.jsonl", [dict(question=q, answer=str(i)) for i, q in enumerate(QUESTIONS)])
    write(root / "tasks.jsonl", [dict(question="2+2=", answer="4")])
    (root / "mine.py").write_text(REWARD)
    gc.collect(), gc.freeze()                            # forked ranks need not look at this process's objects
    return root


@pytest.fixture
def config(place, tmp_path):
    """config(**changes): 4 problems of 4 answers of up to 10 tokens a step; what the defaults are does not matter here."""
    return lambda **change: grpo.Config(**dict(
        init=str(place / "base"), out=str(tmp_path / "run"), problems=str(place / "problems.jsonl"),
        tasks=str(place / "tasks.jsonl"), rewards=f"{place / 'mine.py'}:variety", overlong_max=8, overlong_cache=4,
        mode="no_think", style="compact", date="1 May 2025", prompts=4, num_generations=4, max_new_tokens=10, temperature=1.0,
        loss_type="dapo", scale_rewards="group", importance_sampling_level="token", num_iterations=1, epsilon=0.2,
        epsilon_high=0.28, beta=0.0, steps=4, micro_batch=0, optimizer="muon", device="cpu", dtype="float32",
        overwrite=True) | change)


def begin(cfg):
    """A run at its beginning, in this process or on a rank."""
    rt = infra.setup(cfg)
    grpo.check(cfg, rt)
    return grpo.begin(cfg, rt)


def altered(run, consumed=0, **change):
    """The same run, standing elsewhere or with other settings."""
    return SimpleNamespace(**vars(run) | dict(consumed=consumed, cfg=dataclasses.replace(run.cfg, **change)))


def fresh(batch, **change):
    """A batch that no optimizer step has seen."""
    return SimpleNamespace(**vars(batch) | dict(old=[]) | change)


def learned(run, batch):
    """grpo.learn -> loss, metrics, gradients."""
    run.replica.zero_grad(set_to_none=True)
    loss, metrics = grpo.learn(run, batch)
    return float(loss), metrics, gradients(run.model)


def spied(run, monkeypatch):
    """A rollout -> batch, samples, and what nano.generate was given and gave: the prompts, the rows."""
    seen, original = [], nano.generate

    def generate(model, prompts, *args, **kwargs):
        seen.append((prompts, original(model, prompts, *args, **kwargs)))
        return seen[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(nano, "generate", generate)
        batch, _, samples = grpo.rollout(run)
    (prompts, out), = seen
    return batch, samples, prompts, out


def written(*answers):
    """A nano.generate that gives these answers in turn, whatever it is asked; log-probs tell them apart."""
    def generate(model, prompts, *args, **kwargs):
        rows = [list(answers[i % len(answers)]) for i in range(len(prompts))]
        return [(row, [-1 - i - j / 100 for j in range(len(row))]) for i, row in enumerate(rows)]
    return generate


def by_hand(m, batch, temperature=1.0):
    """Log-probs of the trained tokens, a list of tensors by row, from the logits of a plain forward pass over each row."""
    result = []
    for ids, mask in batch.rows:
        logp = F.log_softmax(m(torch.tensor([ids[:-1]]))[0] / temperature, -1)
        result.append(torch.stack([logp[t, ids[t + 1]] for t in range(len(ids) - 1) if mask[t + 1]] or [logp.sum() * 0]))
    return result


def gradients_of(m, loss):
    m.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(m)


def group_advantages(rewards, G):
    """(r - mean) / (std + 1e-4), a group at a time."""
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, G)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def key(row, advantage=0.0):
    return tuple(row[0]), tuple(row[1]), round(float(advantage), 3)


# --- rollout: what is sampled ----------------------------------------------------------------------------------------

def answers_of(run, **change):
    """The completions of a rollout, tuples in the run's order."""
    with pytest.MonkeyPatch.context() as patch:
        return [tuple(ids) for ids, _ in spied(altered(run, **change), patch)[3]]


def test_a_step_sampled_twice_is_the_same_to_the_bit(config):
    run = begin(config())
    (one, _, first), (two, _, second) = grpo.rollout(run), grpo.rollout(begin(config()))
    assert one.rows == two.rows and one.sampled == two.sampled and first == second and one.whole == two.whole
    assert torch.equal(one.advantages, two.advantages) and one.advantages.abs().sum() > 1


def test_another_seed_step_problem_or_sample_number_gives_other_answers(config, place):
    run = begin(config(init=str(place / "endless")))
    run.problems = run.problems[:1] * 8                  # one prompt, so that only luck tells answers apart
    rows = [answers_of(run, consumed=consumed, seed=seed) for consumed in (0, 4) for seed in (0, 1)]
    assert [len(r) for r in rows] == [16] * 4 and len({ids for r in rows for ids in r}) == 64


def test_an_answer_depends_on_its_problem_and_number_alone_not_on_the_size_of_the_step(config):
    run = begin(config())
    step = answers_of(run)
    assert answers_of(run, prompts=2) + answers_of(run, prompts=2, consumed=2) == step
    assert answers_of(run, num_generations=2) == [ids for i, ids in enumerate(step) if i % 4 < 2]


@pytest.mark.parametrize("compile", [False, True])
def test_answers_in_bf16_are_the_policys_of_this_step_not_of_an_earlier_one(config, monkeypatch, compile):
    monkeypatch.setattr(nano, "compiled_advance", lambda *a: nano.advance)
    monkeypatch.setattr(train, "ready", lambda model, cfg, rt: setattr(model, "compute_dtype", rt.dtype) or model)
    run = begin(config(dtype="bfloat16", compile=compile))
    before = answers_of(run)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))) * 0.05)
    batch, _, _ = grpo.rollout(run)
    _, metrics, _ = learned(run, batch)
    assert metrics["sampler_gap"] < 0.03 and answers_of(run) != before
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_prompt_is_read_once_a_group(config):
    run = begin(config())
    seen = shapes_of(run.model)
    batch, _, _ = grpo.rollout(run)
    assert seen[0] == (4, max(mask.index(1) for _, mask in batch.rows)) and seen[1][1] == 1


@pytest.mark.parametrize("end", [END, EOS])
def test_answers_end_at_their_first_end_token_or_are_cut_off(config, monkeypatch, end):
    run = begin(config())
    with torch.no_grad():                                # a model that ends its answers with this one
        embedding = run.model.embed_tokens.weight
        embedding[[END, end]] = embedding[[end, END]]
    _, samples, _, out = spied(run, monkeypatch)
    assert sum(ids[-1] == end for ids, _ in out) > 5
    for sample, (ids, _) in zip(samples, out):
        assert not {END, EOS} & set(ids[:-1]) and len(ids) <= 10
        assert sample["finished"] == (ids[-1] in (END, EOS)) and (sample["finished"] or len(ids) == 10)
    assert len({len(ids) for ids, _ in out}) > 4 and {s["finished"] for s in samples} == {True, False}


def order_of(run, epochs):
    """The problems' numbers in the order in which they are asked."""
    seen, n = [], len(run.problems)
    for consumed in range(0, epochs * n, run.cfg.prompts):
        _, _, samples = grpo.rollout(altered(run, consumed=consumed, num_generations=1, max_new_tokens=1, seed=run.cfg.seed))
        seen += [int(s["answer"]) for s in samples]
    return seen


@pytest.mark.parametrize("n", [8, 6])                    # of 6, a step holds the last of one epoch and the first of the next
def test_problems_come_in_a_permuted_order_each_once_an_epoch(config, n):
    run = begin(config())
    run.problems = run.problems[:n]
    epochs = [tuple(order_of(run, 2)[i * n:][:n]) for i in range(2)]
    other = tuple(order_of(altered(run, seed=1), 2)[:n])
    assert all(sorted(epoch) == list(range(n)) for epoch in (*epochs, other))
    assert len({*epochs, other, tuple(range(n))}) == 4


@pytest.mark.parametrize("mode, style", [("no_think", "compact"), ("think", "smollm3"), ("no_think", "chatml")])
def test_problems_are_asked_as_render_asks_them(config, monkeypatch, mode, style):
    run = begin(config(mode=mode, style=style, max_new_tokens=2, overlong_max=0))
    _, samples, prompts, _ = spied(run, monkeypatch)
    for i, sample in enumerate(samples):
        assert sample["prompt"] == QUESTIONS[int(sample["answer"])] == samples[i // 4 * 4]["prompt"]
        chat = [dict(role="user", content=sample["prompt"])]
        assert prompts[i] == data.render(chat, mode, style, None, "1 May 2025", True, BYTES)[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_recorded_log_probs_of_a_rollout_equal_recomputed_ones(config, temperature):
    run = begin(config(temperature=temperature))
    batch, _, _ = grpo.rollout(run)
    for recorded, logp in zip(batch.sampled, by_hand(run.model, batch, temperature)):
        assert recorded == pytest.approx(logp.tolist(), abs=1e-4)
    assert batch.old == []


# --- rollout: rows, rewards, advantages ------------------------------------------------------------------------------

def test_rows_are_sorted_by_length_and_nothing_is_lost_or_mixed_up(config, monkeypatch):
    run = begin(config())
    batch, samples, prompts, out = spied(run, monkeypatch)
    lengths = [len(ids) for ids, _ in batch.rows]
    assert lengths == sorted(lengths) and lengths != [len(p) + len(ids) for p, (ids, _) in zip(prompts, out)]
    A = group_advantages([s["reward"] for s in samples], 4)
    expected = [((p + ids, [0] * len(p) + [1] * len(ids)), logps, a) for p, (ids, logps), a in zip(prompts, out, A)]
    assert Counter((*key(row, a), *logps) for row, logps, a in expected) == \
        Counter((*key(row, a), *logps) for row, logps, a in zip(batch.rows, batch.sampled, batch.advantages))
    assert batch.whole == (16, sum(len(ids) for ids, _ in out)) and len({round(a, 3) for a in A}) > 8
    for s, (ids, _) in zip(samples, out):
        text = BYTES.decode(ids[:-1] if s["finished"] else ids)
        penalty = max(-1.0, min(0.0, (4 - len(ids)) / 4))
        assert s["tokens"] == len(ids) and s["text"] == text
        assert s["reward"] == pytest.approx(len(set(text)) / 7 + len(text) % 3 + penalty)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_scaled_as_asked_and_belong_to_their_answers(config, monkeypatch, scale):
    batch, samples, prompts, out = spied(begin(config(scale_rewards=scale)), monkeypatch)
    rewards = torch.tensor([s["reward"] for s in samples], dtype=torch.float64)
    groups = rewards.view(4, 4)
    spread = dict(group=groups.std(1, keepdim=True) + 1e-4, batch=rewards.std() + 1e-4, none=1.0)[scale]
    A = ((groups - groups.mean(1, keepdim=True)) / spread).flatten().tolist()
    expected = Counter((*p, *ids, round(a, 3)) for p, (ids, _), a in zip(prompts, out, A))
    assert Counter((*ids, round(a, 3)) for (ids, _), a in zip(batch.rows, batch.advantages.tolist())) == expected


def test_the_completion_and_its_end_token_are_trained_and_neither_prompt_nor_padding(config, monkeypatch):
    for end in (END, EOS):
        answers = [[65, 66, 67, end], [65] * 10, [end], [66] * 9 + [end]]
        monkeypatch.setattr(nano, "generate", written(*answers))
        batch, _, samples = grpo.rollout(begin(config()))
        assert [s["text"] for s in samples[:4]] == ["ABC", "A" * 10, "", "B" * 9]
        assert [s["finished"] for s in samples[:4]] == [True, False, True, True]
        assert [s["tokens"] for s in samples[:4]] == [4, 10, 1, 10] and batch.whole == (16, 100)
        ids, targets, _ = data.chat_batch([[row] for row in batch.rows], len(batch.rows[-1][0]) - 1)
        trained = [row[row != -100].tolist() for row in targets]
        assert Counter(map(tuple, trained)) == Counter(map(tuple, answers * 4))
        for row, (full, mask), logps in zip(targets, batch.rows, batch.sampled):
            places = (row != -100).nonzero()[:, 0].tolist()
            prompt = len(full) - len(places)
            assert places == list(range(prompt - 1, len(full) - 1)) and len(logps) == len(places)
            assert full[:prompt][-4:] == BYTES.encode("\n\n") + [BYTES.special["</think>"]] + BYTES.encode("\n")


def test_masked_cut_off_answers_leave_the_loss_and_the_count_but_shape_the_mean_of_their_group(config, monkeypatch):
    run = begin(config())
    plain, samples, _, _ = spied(run, monkeypatch)
    batch, masked, _, _ = spied(altered(run, mask_truncated_completions=True), monkeypatch)
    assert masked == samples and torch.equal(batch.advantages, plain.advantages) and batch.sampled == plain.sampled
    assert batch.whole == (16, sum(s["tokens"] for s in samples if s["finished"])) and batch.whole[1] < plain.whole[1]
    finished = [ids[-1] in (END, EOS) for ids, _ in batch.rows]
    assert 3 < sum(finished) < 14
    for (ids, mask), (same, unmasked), kept in zip(batch.rows, plain.rows, finished):
        assert ids == same and mask == (unmasked if kept else [0] * len(ids))
    assert any(a != 0 for a, kept in zip(batch.advantages.tolist(), finished) if not kept)


def test_a_step_whose_answers_were_all_cut_off_and_masked_trains_nothing(config, place):
    run = begin(config(init=str(place / "endless"), mask_truncated_completions=True, overlong_max=0, micro_batch=6))
    batch, _, _ = grpo.rollout(run)
    loss, metrics, got = learned(run, batch)
    assert batch.whole == (16, 0) and loss == 0 and all(v == 0 for v in metrics.values())
    assert all((g == 0).all() for g in got.values())


# --- rollout and learning on two ranks -------------------------------------------------------------------------------

def rolled(cfgs, chunked=False):
    """Of each run: this rank's batch, the whole step's samples, and loss, metrics, gradients of learning from it."""
    results = []
    for cfg in cfgs:
        run = begin(cfg)
        in_chunks(run.model, 320 * 7 if chunked and cfg.micro_batch == 3 else None)
        batch, metrics, samples = grpo.rollout(altered(run, consumed=4))
        parts = vars(fresh(batch))
        loss, values, grads = learned(run, batch)
        metrics.pop("rollout_seconds")
        results.append(SimpleNamespace(**parts, samples=samples, metrics=metrics, loss=loss, values=values, grads=grads,
                                       dims={n: p.tp_dim for n, p in run.model.named_parameters()}))
    return results


@pytest.fixture
def layouts(config, place, tmp_path):
    """layouts(name, **changes): a plain run; one with several micro-batches, cut-off answers masked, advantages scaled over
    all, and a KL; one with a teacher. A directory belongs to one process, so each gets its own."""
    def make(name, **change):
        kinds = (dict(), dict(temperature=0.8, micro_batch=3, scale_rewards="batch", mask_truncated_completions=True, beta=0.1),
                 dict(teacher=str(place / "other"), micro_batch=5, loss_type="grpo"))
        return [config(out=str(tmp_path / f"{name}{i}"), **kind | change) for i, kind in enumerate(kinds)]
    return make


def assert_same_samples(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert {k: v for k, v in a.items() if k not in ("reward", "rewards")} == \
            {k: v for k, v in b.items() if k not in ("reward", "rewards")}
        assert a["reward"] == pytest.approx(b["reward"]) and a["rewards"] == pytest.approx(b["rewards"])


def total(results):
    """Loss and metrics of the parts, added up."""
    return sum(r.loss for r in results), {k: sum(r.values[k] for r in results) for k in results[0].values}


def test_two_replicas_share_the_prompts_of_one_process_and_learn_the_same(layouts):
    alone, two = rolled(layouts("one")), ranks(2, rolled, layouts("two"), True)
    for one, *parts in zip(alone, *two):
        for r in parts:
            assert_same_samples(r.samples, one.samples)
            assert len(r.rows) == 8 and r.whole == one.whole and r.metrics == pytest.approx(one.metrics)
        rows = lambda r: zip(r.rows, r.advantages.tolist(), r.sampled)
        pairs, expected = (sorted(x, key=lambda x: x[:2]) for x in ([*rows(parts[0]), *rows(parts[1])], rows(one)))
        assert [row for row, _, _ in pairs] == [row for row, _, _ in expected]
        assert [a for _, a, _ in pairs] == [a for _, a, _ in expected]
        for (_, _, p), (_, _, q) in zip(pairs, expected):
            assert p == pytest.approx(q, abs=1e-4)
        asked = [{tuple(ids[:len(ids) - len(p)]) for (ids, _), p in zip(r.rows, r.sampled)} for r in parts]
        assert len(asked[0]) == len(asked[1]) == 2 and not asked[0] & asked[1]
        loss, values = total(parts)
        assert loss == pytest.approx(one.loss, abs=1e-5) and values == pytest.approx(one.values, abs=1e-5)
        assert_same(parts[0].grads, parts[1].grads)
        assert_close(parts[0].grads, one.grads)


def test_two_halves_of_a_model_agree_on_every_sample_and_with_one_process(layouts):
    alone, two = rolled(layouts("one")), ranks(2, rolled, layouts("two", tp=2), True)
    for one, *parts in zip(alone, *two):
        first, second = parts
        assert first.samples == second.samples and first.rows == second.rows == one.rows
        assert first.sampled == second.sampled and torch.equal(first.advantages, second.advantages)
        assert torch.equal(first.advantages, one.advantages) and first.whole == second.whole == one.whole
        assert_same_samples(first.samples, one.samples)
        for p, q in zip(first.sampled, one.sampled):
            assert p == pytest.approx(q, abs=1e-4)
        for r in parts:
            assert r.metrics == pytest.approx(one.metrics)
            assert r.loss == pytest.approx(one.loss, abs=1e-5) and r.values == pytest.approx(one.values, abs=1e-5)
        assert_close(whole([r.grads for r in parts], first.dims), one.grads)


# --- learning: the first pass ----------------------------------------------------------------------------------------

NORMALIZERS = {"dapo": lambda lengths: [1 / sum(lengths)] * 16, "grpo": lambda lengths: [1 / 16 / n for n in lengths],
               "dr_grpo": lambda lengths: [1 / (16 * 10)] * 16}


@pytest.fixture
def run(config):
    return begin(config())


@pytest.fixture
def batch(run):
    return grpo.rollout(run)[0]


def expected_loss(m, batch, loss_type="dapo", temperature=1.0, weights=None):
    """-sum A log p / N with the N of that loss; weights: A by token, a list of tensors."""
    logps = by_hand(m, batch, temperature)
    weights = weights or batch.advantages.tolist()
    scale = NORMALIZERS[loss_type]([len(p) for p in batch.sampled])
    return -sum((a * logp).sum() * s for a, logp, s in zip(weights, logps, scale))


@pytest.mark.parametrize("loss_type", NORMALIZERS)
def test_the_first_pass_is_minus_a_log_p_whatever_the_micro_batch(run, batch, loss_type):
    expected = gradients_of(run.model, expected_loss(run.model, batch, loss_type))
    scale = NORMALIZERS[loss_type]([len(p) for p in batch.sampled])
    value = -sum(a * len(p) * s for a, p, s in zip(batch.advantages.tolist(), batch.sampled, scale))
    results = {}
    for size in (0, 1, 3, 16):
        part = fresh(batch)
        loss, metrics, got = results[size] = learned(altered(run, micro_batch=size, loss_type=loss_type), part)
        assert loss == pytest.approx(value, abs=1e-6)    # for the ratio is exactly 1
        assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0 and "kl" not in metrics
        assert len(part.old) == -(-16 // (size or 16)) and not any(x.requires_grad for x in part.old)
        assert metrics == pytest.approx(results[0][1], abs=1e-6)
        assert_close(got, expected)
    assert_same(results[0][2], results[16][2])


def test_a_ratio_of_one_is_exact(run, batch, monkeypatch):
    """An epsilon of 0 clips whatever is not 1, and the old log-probs are the policy's to the bit."""
    calls, original = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda logp, old, *rest: calls.append((logp, old)) or original(logp, old, *rest))
    _, metrics, got = learned(altered(run, micro_batch=3, epsilon=0.0, epsilon_high=0.0), batch)
    assert len(calls) == 6 and all(torch.equal(logp, old) for logp, old in calls)
    assert all(logp.requires_grad and not old.requires_grad for logp, old in calls)
    assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0
    assert_close(got, gradients_of(run.model, expected_loss(run.model, batch)))


@pytest.mark.parametrize("loss_type", NORMALIZERS)
def test_equal_rewards_give_gradients_of_exactly_zero(config, loss_type):
    run = begin(config(overlong_max=0, loss_type=loss_type, micro_batch=5))
    run.rewards = {"same": (lambda prompt, completion, answer: 0.1, 1.0)}
    batch, metrics, _ = grpo.rollout(run)
    loss, _, got = learned(run, batch)
    assert loss == 0 and metrics["frac_reward_zero_std"] == 1 and (batch.advantages == 0).all()
    assert got.keys() == dict(run.model.named_parameters()).keys() and all((g == 0).all() for g in got.values())


def test_every_trained_token_and_so_the_end_token_gets_its_own_gradient(run, batch, monkeypatch):
    """At the logits it is -A (onehot - p) / N, and there are no others."""
    kept, original = [], nano.Transformer.own_logits

    def own_logits(self, x):
        kept.append(original(self, x))
        kept[-1].retain_grad()
        return kept[-1]
    monkeypatch.setattr(nano.Transformer, "own_logits", own_logits)
    learned(run, batch)
    (logits,), N = kept, batch.whole[1]
    target = torch.tensor([t for ids, mask in batch.rows for t, m in zip(ids, mask) if m])
    A = torch.tensor([a for (_, mask), a in zip(batch.rows, batch.advantages.tolist()) for m in mask if m])
    expected = -A[:, None] * (F.one_hot(target, 320) - logits.detach().softmax(-1)) / N
    assert logits.shape == (N, 320) and (logits.grad - expected).abs().max() < 1e-6
    ends = target == END
    assert ends.sum() > 5 and (logits.grad[ends, END].abs() > 1e-4).sum() > 5


def padded_with(number):
    """data.chat_batch, whose padding holds other ids."""
    original = data.chat_batch

    def chat_batch(rows, T):
        ids, targets, docs = original(rows, T)
        for b, row in enumerate(rows):
            n = len(row[0][0]) - 1
            ids[b, n:] = (torch.arange(T - n) * 7 + number) % 320
        return ids, targets, docs
    return chat_batch


@pytest.mark.parametrize("size", [0, 3])
def test_what_stands_after_the_end_token_changes_nothing_and_the_end_token_itself_does(run, batch, monkeypatch, size):
    run = altered(run, micro_batch=size)
    loss, metrics, got = learned(run, fresh(batch))
    with monkeypatch.context() as patch:
        for number in (1, END, 300):
            patch.setattr(data, "chat_batch", padded_with(number))
            other, same, grads = learned(run, fresh(batch))
            assert other == loss and same == metrics
            assert_same(grads, got)
            patch.undo()
    i = next(i for i, (ids, _) in enumerate(batch.rows) if ids[-1] == END and abs(batch.advantages[i]) > 0.1)
    ids, mask = batch.rows[i]
    changed = [*batch.rows[:i], (ids[:-1] + [EOS], mask), *batch.rows[i + 1:]]
    _, _, grads = learned(run, fresh(batch, rows=changed))
    assert all((grads[n] - g).norm() > 1e-3 * g.norm() for n, g in got.items())


def test_a_row_without_its_end_token_learns_something_else(run, batch):
    """So the end token is among what is trained, not only in the row."""
    rows = [(ids, mask[:-1] + [0]) if ids[-1] == END else (ids, mask) for ids, mask in batch.rows]
    sampled = [p[:sum(mask)] for (_, mask), p in zip(rows, batch.sampled)]
    _, _, got = learned(run, fresh(batch))
    _, metrics, other = learned(run, fresh(batch, rows=rows, sampled=sampled))
    assert all((other[n] - g).norm() > 1e-2 * g.norm() for n, g in got.items())


def test_masked_cut_off_answers_get_no_gradient(run):
    run = altered(run, mask_truncated_completions=True, micro_batch=3)
    batch, _, _ = grpo.rollout(run)
    loss, metrics, got = learned(run, fresh(batch))
    kept = [i for i, (_, mask) in enumerate(batch.rows) if any(mask)]
    only = SimpleNamespace(rows=[batch.rows[i] for i in kept], advantages=batch.advantages[kept])
    logps = by_hand(run.model, only)
    expected = -sum((a * p).sum() for a, p in zip(only.advantages.tolist(), logps)) / batch.whole[1]
    assert_close(got, gradients_of(run.model, expected))
    assert metrics["entropy"] == pytest.approx(-float(torch.cat(logps).detach().mean()), abs=1e-5)
    assert metrics["sampler_gap"] < 1e-4
    assert sum(map(len, logps)) == batch.whole[1] and len(kept) < 16
    rows, advantages = zip(*[((ids if any(mask) else ids[:-1] + [65], mask), a if any(mask) else 9.0)
                             for (ids, mask), a in zip(batch.rows, batch.advantages.tolist())])
    assert_same(learned(run, fresh(batch, rows=rows, advantages=torch.tensor(advantages)))[2], got)


# --- learning: metrics and temperature -------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_old_log_probs_gradients_entropy_and_gap_are_those_of_the_temperature_of_sampling(config, temperature):
    run = begin(config(temperature=temperature, micro_batch=5))
    batch, _, _ = grpo.rollout(run)
    _, metrics, got = learned(run, batch)
    logps = by_hand(run.model, batch, temperature)
    flat = torch.cat(logps).detach()
    old = torch.cat([x[x != 0] for x in batch.old])
    assert len(old) == len(flat) == batch.whole[1] and (old - flat).abs().max() < 1e-4
    assert metrics["entropy"] == pytest.approx(-float(flat.mean()), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(-sum(map(sum, batch.sampled)) / batch.whole[1], abs=1e-4)
    assert 0 <= metrics["sampler_gap"] < 1e-4
    assert_close(got, gradients_of(run.model, expected_loss(run.model, batch, temperature=temperature)))


def test_the_gap_is_the_mean_distance_of_recorded_and_recomputed_log_probs(run, batch):
    sampled = [[p + (0.5 if j % 2 else -0.25) for j, p in enumerate(logps)] for logps in batch.sampled]
    off = sum(0.5 if j % 2 else 0.25 for logps in sampled for j in range(len(logps))) / batch.whole[1]
    for size in (0, 3):
        metrics = learned(altered(run, micro_batch=size), fresh(batch, sampled=sampled))[1]
        assert metrics["sampler_gap"] == pytest.approx(off, abs=1e-4)


# --- learning: a second pass -----------------------------------------------------------------------------------------

def moved(run, batch, by=0.5):
    """The run after a step of plain gradient descent on the batch, on a copy of its model."""
    run = SimpleNamespace(**vars(run))
    run.model = run.replica = copy.deepcopy(run.model)
    _, _, got = learned(run, batch)
    with torch.no_grad():
        for n, p in run.model.named_parameters():
            p -= by * got[n]
    return run


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_second_pass_has_the_old_log_probs_of_the_first_and_ratios_of_its_own(run, batch, size):
    run = altered(run, micro_batch=size, num_iterations=2)
    before = torch.cat(by_hand(run.model, batch)).detach()
    run = moved(run, batch)
    old = list(batch.old)
    loss, metrics, got = learned(run, batch)
    assert all(x is y for x, y in zip(old, batch.old)) and len(batch.old) == len(old)
    assert (torch.cat([x[x != 0] for x in batch.old]) - before).abs().max() < 1e-4
    now = by_hand(run.model, batch)
    ratios = (torch.cat(now) - before).exp()
    A = torch.cat([torch.full_like(p.detach(), a) for a, p in zip(batch.advantages.tolist(), now)])
    expected = -torch.minimum(ratios * A, ratios.clamp(0.8, 1.28) * A).sum() / batch.whole[1]
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    low, high = ((ratios < 0.8) & (A < 0)).float().mean(), ((ratios > 1.28) & (A > 0)).float().mean()
    assert metrics["clip_ratio/low"] == pytest.approx(float(low), abs=1e-6) and low > 0
    assert metrics["clip_ratio/high"] == pytest.approx(float(high), abs=1e-6) and high > 0
    assert ((ratios - 1).abs() > 1e-3).float().mean() > 0.5
    assert metrics["entropy"] == pytest.approx(-float(before.mean()), abs=1e-5)
    assert_close(got, gradients_of(run.model, expected))


def test_each_micro_batch_of_a_second_pass_meets_its_own_old_log_probs(config, place):
    """All answers have one length here: others' would fit."""
    run = begin(config(init=str(place / "endless"), micro_batch=4))
    run.problems = run.problems[:1] * 8
    parts, whole = (grpo.rollout(run)[0] for _ in range(2))
    assert len({len(ids) for ids, _ in parts.rows}) == 1
    moving = moved(run, parts, 0.2)
    learned(altered(run, micro_batch=0), whole)
    assert len(parts.old) == 4 and len(whole.old) == 1
    got, expected = learned(moving, parts), learned(altered(moving, micro_batch=0), whole)
    assert got[0] == pytest.approx(expected[0], abs=1e-6) and got[1] == pytest.approx(expected[1], abs=1e-5)
    assert_close(got[2], expected[2])


def test_the_gap_between_sampler_and_training_does_not_grow_because_the_policy_has_moved(run, batch):
    run = moved(run, batch)
    assert learned(run, batch)[1]["sampler_gap"] < 1e-4


# --- learning: reference and teacher ---------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_at_the_start_the_kl_to_the_reference_is_exactly_zero_and_later_that_of_k3(config, temperature):
    run = begin(config(beta=0.5, temperature=temperature, micro_batch=3))
    batch, _, _ = grpo.rollout(run)
    loss, metrics, got = learned(run, fresh(batch))
    assert metrics["kl"] == 0
    plain, _, expected = learned(altered(run, beta=0.0), fresh(batch))
    assert loss == plain
    assert_same(got, expected)
    moving = moved(run, batch, 0.1)
    loss, metrics, got = learned(moving, fresh(batch))
    now, then = (torch.cat(by_hand(m, batch, temperature)) for m in (moving.model, run.model))
    d = then.detach() - now
    kl = (d.exp() - d - 1).sum() / batch.whole[1]
    assert metrics["kl"] == pytest.approx(float(kl.detach()), rel=1e-3) and 1e-4 < kl < 1
    second = learned(moving, batch)[1]                   # no other reference in a second pass on the same answers
    assert second["kl"] == metrics["kl"] and second["entropy"] != metrics["entropy"]
    A = torch.tensor([a for a, p in zip(batch.advantages.tolist(), batch.sampled) for _ in p])
    assert loss == pytest.approx(float(-A.sum() / batch.whole[1] + 0.5 * kl.detach()), abs=1e-5)
    assert_close(got, gradients_of(moving.model, -(A * now).sum() / batch.whole[1] + 0.5 * kl))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_teacher_that_is_the_policy_teaches_exactly_nothing(config, place, temperature):
    run = begin(config(teacher=str(place / "base"), temperature=temperature, micro_batch=3, num_generations=1, prompts=8))
    loss, metrics, got = learned(run, grpo.rollout(run)[0])
    assert loss == 0 and metrics["kl_teacher"] == 0 and all((g == 0).all() for g in got.values())


@pytest.mark.parametrize("loss_type, temperature", [("dapo", 1.0), ("dapo", 0.7), ("grpo", 1.3), ("dr_grpo", 1.0)])
def test_another_teacher_teaches_its_preference_for_each_sampled_token(config, place, loss_type, temperature):
    run = begin(config(teacher=str(place / "other"), temperature=temperature, loss_type=loss_type, micro_batch=3))
    batch, _, _ = grpo.rollout(run)
    loss, metrics, got = learned(run, fresh(batch))
    theirs, ours = ([p.detach() for p in by_hand(m, batch, temperature)] for m in (run.teacher, run.model))
    preference = [t - o for t, o in zip(theirs, ours)]
    expected = expected_loss(run.model, batch, loss_type, temperature, preference)
    assert_close(got, gradients_of(run.model, expected), 1e-3)
    assert metrics["kl_teacher"] == pytest.approx(-float(torch.cat(preference).mean()), abs=1e-5)
    assert abs(metrics["kl_teacher"]) > 0.01
    scale = NORMALIZERS[loss_type]([len(p) for p in batch.sampled])
    assert loss == pytest.approx(-sum(float(a.sum()) * s for a, s in zip(preference, scale)), abs=1e-5)
    changed = fresh(batch, advantages=batch.advantages + 1)             # rewards do not matter then
    assert_same(learned(run, changed)[2], got)
    assert all(p.grad is None for p in run.teacher.parameters())


def test_a_teachers_second_pass_keeps_the_preference_of_the_first(config, place):
    run = begin(config(teacher=str(place / "other"), num_iterations=2, micro_batch=3))
    batch, _, _ = grpo.rollout(run)
    preference = torch.cat(by_hand(run.teacher, batch)).detach() - torch.cat(by_hand(run.model, batch)).detach()
    then = torch.cat(by_hand(run.model, batch)).detach()
    moving = moved(run, batch, 0.2)
    _, metrics, got = learned(moving, batch)
    ratios = (torch.cat(by_hand(moving.model, batch)) - then).exp()
    expected = -torch.minimum(ratios * preference, ratios.clamp(0.8, 1.28) * preference).sum() / batch.whole[1]
    assert metrics["kl_teacher"] == pytest.approx(-float(preference.mean()), abs=1e-5)
    assert_close(got, gradients_of(moving.model, expected), 1e-3)
