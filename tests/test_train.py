"""train.py: schedule, optimizers, gradients, evaluation, and a run that survives signals, crashes, NaNs and repetition."""
import dataclasses, io, json, lzma, math, re, shutil, signal, subprocess, sys, time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import data, infra, model as nano, train
from runs import TIMING, rows, stopped_run, untimed, weights

ROOT = Path(__file__).resolve().parent.parent
CPU = infra.setup(infra.Machine(device="cpu", dtype="float32"))         # one process, alone


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where the runs of this file lie side by side, so that they share the prepared data."""
    return tmp_path_factory.mktemp("runs")


def small_run(corpus, out, **change):
    """20 steps of 8 rows of 32 bytes on the tiny corpus."""
    return train.Config(**dict(
        text=str(corpus), out=str(out), steps=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, no_rope_layer_interval=2, max_position_embeddings=32, batch_tokens=256, val_fraction=0.1, log_every=5,
        eval_every=1000, save_every=1000, dtype="float32", device="cpu") | change)


@pytest.fixture
def config(corpus, runs, request):
    """config(name, **changes): that run in a directory of this test's own."""
    test = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return lambda name="run", **change: small_run(corpus, runs / f"{test}-{name}", **change)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def reference(corpus, runs):
    """An undisturbed run: (its configuration, what main returned)."""
    cfg = small_run(corpus, runs / "reference")
    return cfg, train.main(cfg)


# --- schedule --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, expected", [      # of 100 steps, 10 to warm up, lr 2
    ("wsd", {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 59: 2.0, 60: 2.0, 61: 2 * 39 / 40, 80: 1.0, 98: 2 * 2 / 40, 99: 2 / 40, 100: 0.0}),
    ("cosine", {0: 0.2, 9: 2.0, 10: 2.0, 55: 1.1, 100: 0.2, 40: 2 * (0.1 + 0.9 * 0.75), 70: 2 * (0.1 + 0.9 * 0.25)}),
    ("multistep", {0: 0.2, 9: 2.0, 10: 2.0, 79: 2.0, 80: 0.632, 89: 0.632, 90: 0.2, 99: 0.2})])
def test_learning_rate_follows_the_closed_form(schedule, expected):
    cfg = train.Config(schedule=schedule, steps=100, warmup=0.1, decay=0.4, lr=2.0)
    assert {step: train.lr_at(step, cfg) for step in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_shares_that_are_no_whole_number_of_steps_are_rounded():
    cfg = train.Config(steps=30, warmup=0.06, decay=0.19, lr=1.0)              # 1.8 and 5.7 steps: 2 and 6
    assert [train.lr_at(step, cfg) for step in (0, 1, 24, 25, 29)] == pytest.approx([1 / 2, 1, 1, 5 / 6, 1 / 6])


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "multistep"])
@pytest.mark.parametrize("change", [dict(warmup=0.0), dict(warmup=1.0), dict(decay=0.0), dict(decay=1.0), dict(warmup=0.7, decay=0.7), dict(steps=1)])
def test_learning_rate_stays_between_zero_and_the_peak_at_the_edges(schedule, change):
    cfg = train.Config(**dict(schedule=schedule, steps=17, lr=0.5) | change)
    values = [train.lr_at(step, cfg) for step in range(cfg.steps)]
    assert all(0 < v <= 0.5 for v in values) and (max(values) == 0.5 or change.get("warmup") == 0.7 or change.get("decay") == 1.0)


# --- optimizers ------------------------------------------------------------------------------------------------------

def test_muon_equals_torch_optim_muon_bit_for_bit():
    shapes = [(8, 8), (16, 8), (8, 16), (16, 8), (12, 40), (40, 12), (8, 8), (1, 24), (64, 64)]
    draw = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = train.Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=draw) * 10 ** (step - 2)
            q.grad = p.grad.clone()
        if step == 3:                                   # a parameter without a gradient is left alone
            ours[2].grad = theirs[2].grad = None
        for group in mine.param_groups + other.param_groups:
            group["lr"] = 0.02 / (step + 1)
        mine.step(), other.step()
        for p, q in zip(ours, theirs):
            assert torch.equal(p, q), (step, tuple(p.shape))


def test_muon_survives_a_gradient_of_zeros():
    p = torch.nn.Parameter(torch.ones(4, 8))
    p.grad = torch.zeros(4, 8)
    train.Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p.detach(), torch.full((4, 8), 0.95))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_norms_are_not_decayed_and_every_parameter_is_optimized_once(optimizer, tie):
    cfg = train.Config(optimizer=optimizer, weight_decay=0.3, tie_word_embeddings=tie, qk_norm=True, vocab_size=320)
    m = nano.Transformer(nano.shape_of(cfg))
    optimizers = train.make_optimizers(m, cfg)
    found = [(id(p), group["weight_decay"], type(o).__name__) for o in optimizers for group in o.param_groups for p in group["params"]]
    by_id = {i: (decay, kind) for i, decay, kind in found}
    assert len(by_id) == len(found) == len(list(m.parameters()))
    for name, p in m.named_parameters():
        free = "norm" in name or "embed_tokens" in name
        hidden = name.endswith("_proj.weight")
        assert by_id[id(p)] == (0.0 if free else 0.3, "Muon" if hidden and optimizer == "muon" else "AdamW"), name
    adamw = optimizers[-1].param_groups
    assert all(g["betas"] == (0.9, 0.95) for g in adamw)


def test_decay_embeddings_decays_them_and_still_no_norm():
    cfg = train.Config(weight_decay=0.3, decay_embeddings=True, vocab_size=320)
    m = nano.Transformer(nano.shape_of(cfg))
    decays = {id(p): g["weight_decay"] for o in train.make_optimizers(m, cfg) for g in o.param_groups for p in g["params"]}
    assert {name for name, p in m.named_parameters() if not decays[id(p)]} == {n for n, _ in m.named_parameters() if "norm" in n}


def test_optimizer_state_is_saved_by_name_and_comes_back():
    cfg = train.Config(vocab_size=64, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    m = nano.Transformer(nano.shape_of(cfg))
    optimizers = train.make_optimizers(m, cfg)
    m(torch.arange(8)[None]).square().sum().backward()
    [o.step() for o in optimizers]
    saved = train.optimizer_state(m, optimizers)
    assert saved.keys() == dict(m.named_parameters()).keys()
    fresh = train.make_optimizers(m, cfg)
    train.load_optimizer_state(m, fresh, saved)
    again = train.optimizer_state(m, fresh)
    assert all(torch.equal(saved[n][k], again[n][k]) for n in saved for k in saved[n]) and again.keys() == saved.keys()


# --- one step --------------------------------------------------------------------------------------------------------

def small_model(seed=0, **change):
    torch.manual_seed(seed)
    return nano.Transformer(nano.Config(**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                               num_key_value_heads=1, no_rope_layer_interval=2, initializer_range=0.2) | change))


def uneven_batch():
    """Four rows of 12 whose counted targets number 11, 10, 3 and 8."""
    draw = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(64, (4, 12), generator=draw), torch.randint(64, (4, 12), generator=draw)
    docs = torch.tensor([[0] * 6 + [1] * 6, [0] * 3 + [1] * 8 + [2], [0] * 12, [0] * 4 + [1] * 4 + [2] * 4])
    for row, hidden in enumerate(([5], [2, 10], range(9), [3, 7, 0, 11])):
        targets[row, list(hidden)] = -100
    return ids, targets, docs


def gradients(micro_batch, z_loss=0.01):
    m = small_model()
    loss = train.forward_backward(m, uneven_batch(), train.Config(micro_batch=micro_batch, z_loss=z_loss), CPU)
    return float(loss), {n: p.grad for n, p in m.named_parameters()}


def test_one_batch_of_4_equals_2_of_2_and_4_of_1_although_counts_differ():
    loss, grads = gradients(0)
    for micro_batch in (4, 2, 1):
        other, others = gradients(micro_batch)
        assert abs(loss - other) < 1e-6
        assert all((grads[n] - others[n]).abs().max() < 1e-6 for n in grads)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_loss_and_gradients_are_those_of_the_mean_over_counted_tokens_plus_z_loss(micro_batch):
    m, (ids, targets, docs) = small_model(), uneven_batch()
    counted = targets != -100
    logits = m(ids, docs)
    nll = F.cross_entropy(logits[counted], targets[counted])
    (nll + 0.01 * logits[counted].exp().sum(-1).log().square().mean()).backward()
    loss, grads = gradients(micro_batch)
    assert loss == pytest.approx(nll.item(), abs=1e-6)  # what is reported is the likelihood, without the penalty
    for n, p in m.named_parameters():
        assert (p.grad - grads[n]).abs().max() < 1e-6, n
    without = gradients(micro_batch, z_loss=0.0)[1]
    assert max((without[n] - grads[n]).abs().max() for n in grads) > 1e-4


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_equals_torchs_where_one_process_holds_everything(max_norm):
    draw = torch.Generator().manual_seed(0)
    ours, theirs = small_model(), small_model()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        p.grad = torch.randn(p.shape, generator=draw)
        q.grad = p.grad.clone()
    norm, expected = train.clip_grad_norm(ours, max_norm, CPU), torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=0)


def test_spikes_are_what_is_not_finite_or_ten_times_the_median_after_50_steps():
    usual = deque([0.5] * 40 + [3.0] * 20)
    assert train.is_spike(2.0, 5.1, usual) and not train.is_spike(2.0, 4.9, usual)
    assert not train.is_spike(2.0, 1000.0, deque([1.0] * 49)) and train.is_spike(2.0, 1000.0, deque([1.0] * 50))
    assert not train.is_spike(2.0, 1000.0, deque())
    for bad in (math.nan, math.inf, -math.inf):
        assert train.is_spike(bad, 1.0, deque()) and train.is_spike(1.0, bad, deque())


def test_the_fourth_large_gradient_in_a_row_is_no_spike():
    """A new level. Runs that learn to look something up were stopped by ten skipped steps before, on data without a fault."""
    p = torch.nn.Parameter(torch.ones(1))
    run = SimpleNamespace(norms=deque([1.0] * 60, maxlen=100), skipped=0, step=0, optimizers=[torch.optim.SGD([p])],
                          log=SimpleNamespace(say=print), samples=lambda: "", bad=0)
    p.grad = torch.ones(1)
    used = [train.update(run, 2.0, norm, 0.0) for norm in (20.0, 30.0, 20.0, 20.0, 40.0, 1.0, 20.0, 1.0, math.nan)]
    assert used == [False, False, False, True, True, True, False, True, False] and run.skipped == 5
    assert all(map(math.isfinite, run.norms))           # one nan would make the median of all later steps nan


# --- evaluation ------------------------------------------------------------------------------------------------------

@pytest.fixture
def source(corpus, tmp_path):
    (found,) = data.prepare(text=str(corpus), val_fraction=0.1, out=tmp_path / "data")
    return found


def test_bits_per_byte_equal_a_computation_by_hand_document_by_document(source):
    cfg, m, T, EOS = train.Config(max_position_embeddings=32), small_model(vocab_size=320), 32, 256
    tokens, total, counted = source.val.tolist(), 0.0, 0
    for start in range(0, len(tokens) - T, T):
        row, begin = tokens[start:start + T + 1], 0
        for t in range(T):
            if row[t] == EOS or t == T - 1:             # a document's inputs end here; after an EOS nothing is predicted
                piece = row[begin:t + 1]
                with torch.no_grad():
                    logp = m(torch.tensor([piece]))[0].double().log_softmax(-1)
                for i, target in enumerate(row[begin + 1:t + 2]):
                    if piece[i] != EOS:
                        total, counted = total - float(logp[i, target]), counted + 1
                begin = t + 1
    text_bytes = sum(t != EOS for t in tokens)
    loss, bpb = train.evaluate(m, [source], cfg, CPU)[source.name]
    assert loss == pytest.approx(total / counted, rel=1e-5)
    assert bpb == pytest.approx(total / counted / math.log(2) * len(tokens) / text_bytes, rel=1e-5)


def test_evaluation_takes_no_more_rows_at_a_time_than_training_or_2048_tokens(source):
    m, seen, scores, source = small_model(vocab_size=320), [], [], dataclasses.replace(source, val=source.train)
    m.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for rows in (0, 1):
        cfg = train.Config(max_position_embeddings=1024, micro_batch=rows)
        scores.append(train.evaluate(m, [source], cfg, CPU)[source.name])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6) and seen[0] > 2 == max(seen[1:])     # 2,048 tokens


@pytest.mark.parametrize("doc_mask, rows", [(True, 3), (False, 3), (False, 0)])
def test_evaluation_masks_documents_as_training_does_and_reads_at_most_so_many_tokens(source, doc_mask, rows):
    m, sums = small_model(vocab_size=320), torch.zeros(2)
    for ids, targets, docs in data.val_batches(source, 32, 4, limit=rows):
        nll, _ = m(ids, docs if doc_mask else None, targets)
        sums += torch.tensor([float(nll.detach()), (targets != -100).sum()])
    cfg = train.Config(max_position_embeddings=32, doc_mask=doc_mask)
    loss, _ = train.evaluate(m, [source], cfg, CPU, **dict(max_tokens=32 * rows + 31) if rows else {})[source.name]
    assert loss == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)


def test_evaluation_touches_neither_random_numbers_nor_the_model(source):
    m = small_model(vocab_size=320)
    before, state = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    first = train.evaluate(m, [source], train.Config(max_position_embeddings=32), CPU)
    assert first == train.evaluate(m, [source], train.Config(max_position_embeddings=32), CPU)
    assert equal(before, m.state_dict()) and torch.equal(state, torch.get_rng_state()) and m.training
    assert all(p.grad is None for p in m.parameters())


def test_lzma_yardstick_is_measured_on_the_documents_own_bytes(source):
    tokens = source.val.tolist()
    documents = bytes(t for t in tokens if t != 256)
    expected = 8 * len(lzma.compress(documents, preset=9)) / len(documents)
    assert train.lzma_bpb(source, data.get_tokenizer("bytes")) == pytest.approx(expected, rel=0.02)


# --- a run -----------------------------------------------------------------------------------------------------------

def test_loss_falls_and_the_result_says_so(reference):
    cfg, result = reference
    losses = [row["loss"] for row in rows(cfg) if "grad_norm" in row]
    assert abs(losses[0] - math.log(320)) < 0.3 and losses[-1] < losses[0] - 1.5
    assert result["step"] == 20 and result["tokens"] == 20 * 256 and result["skipped"] == 0 and 0 < result["seconds"] < 60
    (bpb,) = result["val_bpb"].values()
    assert bpb < 7 and result["val_loss"] < losses[0] - 1


def test_metrics_rows_have_the_agreed_keys_and_the_last_is_final(reference):
    cfg, result = reference
    all_rows = rows(cfg)
    training = [r for r in all_rows if "grad_norm" in r]
    assert [r["step"] for r in training] == [1, 5, 10, 15, 20]
    for row in training:
        assert {"step", "tokens", "loss", "lr", "grad_norm", "tok_per_s", "seconds"} <= row.keys() and "final" not in row
        assert row["tokens"] == row["step"] * 256 and row["lr"] == pytest.approx(train.lr_at(row["step"] - 1, cfg))
        assert row["tok_per_s"] > 0 and row["grad_norm"] > 0
    assert [r["seconds"] for r in training] == sorted(r["seconds"] for r in training)
    last = all_rows[-1]
    assert last["final"] is True and sum("final" in r for r in all_rows) == 1
    assert last["val_loss"] == result["val_loss"] and last["val_bpb"] == result["val_bpb"] and last["step"] == 20


def test_a_run_leaves_its_configuration_and_a_loadable_model(reference):
    cfg, _ = reference
    out = Path(cfg.out)
    assert infra.cli(train.Config, train.PRESETS, [f"--config={out / 'config.json'}"]) == dataclasses.replace(cfg, vocab_size=320)
    m, extra = nano.load_checkpoint(out)
    assert m.config.vocab_size == 320 and m.config.hidden_size == 32 and extra["tokenizer"] == "bytes" and extra["stage"] == "base"
    assert extra["step"] == 20 and extra["consumed_samples"] == 160 and extra["train_config"] == dataclasses.asdict(cfg) | {"vocab_size": 320}
    assert sorted(p.name for p in out.iterdir()) == [".job", ".lock", "ckpt_00000020.pt", "config.json", "metrics.jsonl"]


def test_same_seed_same_weights_bit_for_bit_and_another_seed_others(reference, config):
    cfg, result = reference
    same, other = config("same"), config("other", seed=1)
    again = train.main(same)
    train.main(other)
    assert equal(weights(cfg.out), weights(same.out)) and untimed(cfg) == untimed(same) and again["val_loss"] == result["val_loss"]
    assert not equal(weights(cfg.out), weights(other.out))


def test_evaluating_saving_and_logging_more_often_do_not_change_training(reference, config):
    cfg = config(eval_every=3, save_every=4, log_every=1)
    train.main(cfg)
    assert equal(weights(cfg.out), weights(reference[0].out))
    evaluations = [r for r in rows(cfg) if "val_bpb" in r]
    assert [r["step"] for r in evaluations] == [3, 6, 9, 12, 15, 18, 20] and evaluations[0]["val_loss"] > evaluations[-1]["val_loss"]
    assert len(nano.checkpoints(cfg.out)) == 2
    assert [r["loss"] for r in rows(cfg) if r["step"] in (1, 5, 10, 15, 20) and "grad_norm" in r] == [
        r["loss"] for r in rows(reference[0]) if "grad_norm" in r]


def test_nothing_draws_from_the_global_generator_after_initialisation(config, monkeypatch):
    original, seen = train.make_optimizers, []
    monkeypatch.setattr(train, "make_optimizers", lambda *a: seen.append(torch.get_rng_state()) or original(*a))
    train.main(config(eval_every=5, save_every=5))
    assert torch.equal(seen[0], torch.get_rng_state())


def test_micro_batches_train_the_same_model(reference, config):
    cfg = config(micro_batch=2)
    train.main(cfg)
    for row, other in zip(rows(cfg), rows(reference[0])):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.02)       # Muon's bf16 iteration amplifies rounding
    assert rows(cfg)[0]["loss"] == pytest.approx(rows(reference[0])[0]["loss"], abs=1e-6)


# --- stop and resume -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_10_and_10_steps_equal_20_bit_for_bit_metrics_included(config, optimizer):
    whole, parts = config("whole", optimizer=optimizer, log_every=1), config("parts", optimizer=optimizer, log_every=1)
    result = train.main(whole)
    stopped = stopped_run(parts, 10)
    assert stopped["step"] == 10 and stopped["stopped"] == "SIGTERM" and not any("final" in r for r in rows(parts))
    assert [p.name for p in nano.checkpoints(parts.out)] == ["ckpt_00000010.pt"]
    resumed = train.main(dataclasses.replace(parts, resume=True))
    assert equal(weights(whole.out), weights(parts.out))
    assert untimed(whole) == untimed(parts) and len(rows(parts)) == 21
    assert {k: v for k, v in resumed.items() if k not in TIMING} == {k: v for k, v in result.items() if k not in TIMING}
    a, b = nano.load_checkpoint(whole.out)[1], nano.load_checkpoint(parts.out)[1]
    assert all(torch.equal(v, b["optimizer"][n][k]) for n, s in a["optimizer"].items() for k, v in s.items())
    assert a["monitor"] | {"seconds": 0} == b["monitor"] | {"seconds": 0} and a["consumed_samples"] == b["consumed_samples"]


def test_seconds_go_on_counting_after_a_resume(config):
    cfg = config(log_every=1)
    stopped_run(cfg, 15)
    train.main(dataclasses.replace(cfg, resume=True))
    seconds = [r["seconds"] for r in rows(cfg) if "grad_norm" in r]
    assert seconds == sorted(seconds)


def test_resume_after_a_truncated_newest_checkpoint_ends_at_the_same_weights(reference, config, capsys):
    cfg = config(save_every=5)
    stopped_run(cfg, 12)
    newest, before = nano.checkpoints(cfg.out)
    assert (newest.name, before.name) == ("ckpt_00000012.pt", "ckpt_00000010.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    train.main(dataclasses.replace(cfg, resume=True))
    out, err = capsys.readouterr()
    assert "WARNING" in err and "ckpt_00000012.pt" in err and "after step 10" in out
    assert equal(weights(cfg.out), weights(reference[0].out))
    steps = [r["step"] for r in rows(cfg) if "grad_norm" in r]
    assert steps == sorted(set(steps))


def test_resume_in_an_empty_directory_starts_from_the_beginning(reference, config):
    cfg = config(resume=True)
    train.main(cfg)
    assert equal(weights(cfg.out), weights(reference[0].out))


def test_resuming_a_finished_run_does_no_harm(config):
    cfg = config()
    result = train.main(cfg)
    before = weights(cfg.out)
    again = train.main(dataclasses.replace(cfg, resume=True))
    assert equal(before, weights(cfg.out)) and again["val_loss"] == result["val_loss"] and rows(cfg)[-1]["final"] is True


def test_a_signal_during_the_last_step_loses_nothing(reference, config):
    cfg = config()
    stopped_run(cfg, 20)
    assert equal(weights(cfg.out), weights(reference[0].out))
    result = train.main(dataclasses.replace(cfg, resume=True))
    assert result["val_loss"] == reference[1]["val_loss"] and rows(cfg)[-1]["final"] is True


def test_sigterm_to_the_script_saves_and_exits_with_status_0(config, tmp_path):
    cfg = config(steps=100_000, log_every=1)
    argv = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != getattr(train.Config(), k)]
    child = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    try:
        for line in child.stdout:
            if line.startswith("step"):
                break
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        rest, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0 and "SIGTERM: saved" in rest and "Traceback" not in rest
    step = nano.load_checkpoint(cfg.out)[1]["step"]
    assert 1 <= step < 100_000 and rows(cfg)[-1]["step"] == step


# --- steps that must not reach the weights ---------------------------------------------------------------------------

def poison(monkeypatch, steps, what, seen=None):
    """The loss or the gradient of these steps (counted from 1) is NaN; `seen` gets the weights at the start of each step."""
    original, calls = train.forward_backward, []

    def forward_backward(model, batch, cfg, rt, forwards=None):
        calls.append(0)
        if seen is not None:
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        loss = original(model, batch, cfg, rt, forwards)
        if len(calls) in steps:
            if what == "loss":
                return loss * math.nan
            next(model.parameters()).grad[0, 0] = {"gradient": math.nan, "infinite gradient": math.inf}[what]
        return loss
    monkeypatch.setattr(train, "forward_backward", forward_backward)


@pytest.mark.parametrize("what", ["loss", "gradient", "infinite gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(config, monkeypatch, capsys, what):
    seen, cfg = [], config(log_every=1)
    poison(monkeypatch, {5, 9}, what, seen)
    result = train.main(cfg)
    same = [equal(a, b) for a, b in zip(seen, seen[1:])]
    assert [i + 1 for i, unchanged in enumerate(same) if unchanged] == [5, 9]
    out = capsys.readouterr().out
    assert "SKIPPED step 5: " in out and "--skip_samples=32:40 (" in out and "SKIPPED step 9: " in out
    assert out.count("SKIPPED") == 2
    assert result["skipped"] == 2 and [r["skipped"] for r in rows(cfg) if "grad_norm" in r] == [0] * 4 + [1] * 4 + [2] * 12
    assert all(math.isfinite(v) for v in result["val_bpb"].values())
    assert rows(cfg)[4]["loss" if what == "loss" else "grad_norm"] is None


def test_ten_bad_steps_in_a_row_stop_the_run_and_name_the_samples(config, monkeypatch):
    cfg = config(save_every=5)
    poison(monkeypatch, {2, *range(7, 30)}, "loss")
    with pytest.raises(SystemExit) as error:
        train.main(cfg)
    message = str(error.value)
    assert "step 16:" in message and "10 steps in a row" in message and "--skip_samples=120:128 (" in message
    assert " row " in message and "\n" not in message
    assert all(torch.isfinite(w).all() for w in weights(cfg.out).values())


def test_nine_bad_steps_in_a_row_do_not_stop_the_run(config, monkeypatch):
    poison(monkeypatch, set(range(3, 12)) | {13}, "gradient")
    assert train.main(config())["skipped"] == 10


def test_skipped_steps_are_still_counted_after_a_resume(config, monkeypatch):
    cfg = config()
    poison(monkeypatch, {5}, "loss")
    stopped_run(cfg, 10)
    assert train.main(dataclasses.replace(cfg, resume=True))["skipped"] == 1


# --- rows that are left out ------------------------------------------------------------------------------------------

def test_skip_samples_trains_the_weights_of_a_loader_that_never_had_these_rows(reference, config, monkeypatch):
    ranges, cfg, by_hand = ((16, 24), (40, 45)), config("flag", skip_samples="16:24,40:45"), config("by-hand")
    train.main(cfg)
    plain, kept = data.Loader.rows, [g for g in range(300) if not any(a <= g < b for a, b in ranges)]
    monkeypatch.setattr(data.Loader, "rows", lambda self, start, n: data.np.concatenate(
        [plain(self, g, 1) for g in kept[start:start + n]]))
    train.main(by_hand)
    assert equal(weights(cfg.out), weights(by_hand.out)) and not equal(weights(cfg.out), weights(reference[0].out))
    assert nano.load_checkpoint(cfg.out)[1]["consumed_samples"] == 160          # as many rows as ever


def test_the_rows_that_a_spike_names_are_those_that_its_step_was_trained_on(config, monkeypatch, capsys):
    """Also where rows are left out already: the numbers are those of the run's order, as --skip_samples wants them."""
    cfg, seen, plain = config(skip_samples="8:16,36:38"), [], data.Loader.batch
    monkeypatch.setattr(data.Loader, "batch", lambda self, k, *rest: seen.append((k, self)) or plain(self, k, *rest))
    poison(monkeypatch, {4, 6}, "loss")
    train.main(cfg)
    out = capsys.readouterr().out
    assert "SKIPPED step 4: " in out and "--skip_samples=32:42 (" in out        # 32 to 41 without 36 and 37: its 8 rows
    (_, loader), = [s for s in seen if s[0] == 40]
    assert f"--skip_samples=50:58 ({loader.describe(50)}, {loader.describe(51)}, {loader.describe(52)}, ...)" in out


def test_resume_takes_ranges_that_are_still_to_come_and_refuses_to_change_those_passed(config):
    cfg, whole = config("parts"), config("whole", skip_samples="80:88,100:101")
    stopped_run(cfg, 10)                                # stands at row 80
    for spec in ("72:80", "0:4", "40:48,80:88", "79:81"):
        with pytest.raises(SystemExit, match=rf"^--skip_samples={spec}: .* stands at row 80 and has skipped nothing: [^\n]*$"):
            train.main(dataclasses.replace(cfg, resume=True, skip_samples=spec))
    train.main(dataclasses.replace(cfg, resume=True, skip_samples="80:88,100:101"))
    train.main(whole)
    assert equal(weights(cfg.out), weights(whole.out))


def test_resume_refuses_to_forget_a_range_that_was_skipped(config):
    cfg = config(skip_samples="16:24,100:108")
    stopped_run(cfg, 10)
    for spec in ("", "100:108", "16:25,100:108"):
        with pytest.raises(SystemExit, match=r"stands at row 80 and has skipped 16:24,100:108: only ranges after"):
            train.main(dataclasses.replace(cfg, resume=True, skip_samples=spec))
    train.main(dataclasses.replace(cfg, resume=True, skip_samples="16:24"))


def test_a_bad_range_ends_with_one_line_before_training(config):
    with pytest.raises(SystemExit, match=r'^--skip_samples=9:3: expected "a:b" or [^\n]*$'):
        train.main(config(skip_samples="9:3"))


# --- how steadily it goes --------------------------------------------------------------------------------------------

def watched(seconds, world=1, ranks=(), monkeypatch=None):
    """A run whose steps of 1,000 tokens took these seconds; `ranks`: (share of waiting, forward seconds) of all of them."""
    rt = SimpleNamespace(**vars(CPU) | dict(world_size=world, dp_size=world))
    if ranks:
        monkeypatch.setattr(train, "all_gather", lambda rt, mine: [torch.tensor(r, dtype=torch.float64) for r in ranks])
    return SimpleNamespace(rt=rt, cfg=train.Config(batch_tokens=1000), pace=deque(seconds, maxlen=100), warned=set())


def test_pace_reports_the_slowest_5_percent_and_the_median():
    fields, warnings = train.pace(watched([0.1] * 90 + [0.11] * 10), 0.3, [(1.0, 5.0)], 10.0)
    assert fields == dict(data_wait=pytest.approx(0.03), tok_per_s_p5=pytest.approx(1000 / 0.11),
                          tok_per_s_median=pytest.approx(10_000)) and not warnings
    fields, warnings = train.pace(watched([0.1] * 18 + [1.0]), 0.3, [(1.0, 5.0)], 10.0)
    assert fields == dict(data_wait=pytest.approx(0.03)) and not warnings       # 19 steps say little about 5 % of them
    fields, warnings = train.pace(watched([0.1] * 18 + [1.0] * 2), 0.3, [(1.0, 5.0)], 10.0)
    assert fields["tok_per_s_p5"] == pytest.approx(1000) and len(warnings) == 1


@pytest.mark.parametrize("slow, seconds, warns", [
    (6, 0.2, True), (4, 0.2, False), (100, 0.2, False), (6, 0.12, False), (6, 0.13, True)])
def test_pace_warns_when_one_step_in_twenty_is_slower_than_four_fifths_of_the_median(slow, seconds, warns):
    _, warnings = train.pace(watched([0.1] * (100 - slow) + [seconds] * slow), 0.0, [(1.0, 5.0)], 10.0)
    assert len(warnings) == warns
    if warns:
        assert f"run at {1 / seconds:.1f}k tok/s or less, the median at 10.0k: something else uses" in warnings[0]


def test_pace_warns_of_data_that_come_too_slowly_and_names_them_as_the_cause():
    assert train.pace(watched([0.1] * 100), 0.49, [(1.0, 5.0)], 10.0)[1] == []
    assert train.pace(watched([0.1] * 100), 0.61, [(1.0, 5.0)], 10.0)[1] == ["rank 0 waits 6% of its time for data"]
    _, warnings = train.pace(watched([0.1] * 90 + [0.5] * 10), 3.0, [(1.0, 5.0)], 10.0)
    assert len(warnings) == 2 and warnings[1].endswith(": data come too slowly")


def test_pace_names_the_rank_that_waits_and_the_one_that_computes_longest(monkeypatch):
    slow_steps, ranks = [0.1] * 90 + [0.5] * 10, [(0.01, 1.0), (0.3, 1.0), (0.02, 1.5), (0.0, 1.0)]
    fields, warnings = train.pace(watched(slow_steps, 4, ranks, monkeypatch), 0.0, [(1.0, 5.0)], 10.0)
    assert fields["data_wait"] == pytest.approx(0.3)
    assert (fields["slowest_rank"], fields["slowest_lag"]) == (2, pytest.approx(0.5))
    assert warnings[0] == "rank 1 waits 30% of its time for data" and len(warnings) == 2
    assert "data come too slowly" in warnings[1] and "rank 2 computes 50% longer than the middle one" in warnings[1]
    fields, warnings = train.pace(watched(slow_steps, 2, [(0.0, 1.0), (0.0, 1.05)], monkeypatch), 0.0, [(1.0, 5.0)], 10.0)
    assert fields["slowest_lag"] == pytest.approx(0.05) and warnings[0].endswith(": something else uses this machine")


def test_pace_warns_once_when_it_begins_and_again_after_a_recovery():
    run, told = watched([0.1] * 100), []
    for waited in (0.0, 1.0, 1.0, 2.0, 0.0, 0.0, 1.0, 1.0):
        told.append(len(train.pace(run, waited, [(1.0, 5.0)], 10.0)[1]))
    assert told == [0, 1, 0, 0, 0, 0, 1, 0]
    run.pace.extend([0.5] * 10)                         # a second trouble is told although the first goes on
    assert [len(train.pace(run, 1.0, [(1.0, 5.0)], 10.0)[1]) for _ in range(2)] == [1, 0]


def test_a_run_with_a_slow_loader_says_so_once_and_records_its_pace(config, monkeypatch, capsys):
    plain, cfg = data.Loader.rows, config(steps=30, log_every=3)
    monkeypatch.setattr(data.Loader, "rows", lambda *a: time.sleep(0.1) or plain(*a))
    train.main(cfg)
    out = capsys.readouterr().out
    assert out.count("WARNING: rank 0 waits ") == 1 and re.search(r"\| data \d\d\.\d %", out)
    training = [r for r in rows(cfg) if "grad_norm" in r]
    assert all(0.05 < r["data_wait"] < 1 for r in training) and "tok_per_s_p5" not in training[0]
    assert 0 < training[-1]["tok_per_s_p5"] <= training[-1]["tok_per_s_median"] < 256 / 0.015
    assert all("slowest_rank" not in r for r in training)       # there is but one


# --- whose directory is it -------------------------------------------------------------------------------------------

def test_a_directory_with_another_configurations_run_is_refused_and_left_alone(config):
    cfg = config(steps=4)
    train.main(cfg)
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    for change, named in ((dict(lr=1e-3), "lr"), (dict(hidden_size=16), "hidden_size"), (dict(seed=3), "seed"), (dict(steps=5), "steps")):
        with pytest.raises(SystemExit, match=rf"another run \(other {named}\).*--resume.*--overwrite.*--out") as error:
            train.main(dataclasses.replace(cfg, **change))
        assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()} == before
    train.main(dataclasses.replace(cfg, lr=1e-3, overwrite=True))
    assert nano.load_checkpoint(cfg.out)[1]["train_config"]["lr"] == 1e-3 and len(nano.checkpoints(cfg.out)) == 1
    assert not equal(weights(cfg.out), torch.load(io.BytesIO(before["ckpt_00000004.pt"]), weights_only=True)["model"])


def test_overwrite_forgets_a_longer_run(config):
    cfg = config(steps=8, save_every=4)
    train.main(cfg)
    short = dataclasses.replace(cfg, steps=4, overwrite=True)
    train.main(short)
    assert [p.name for p in nano.checkpoints(cfg.out)] == ["ckpt_00000004.pt"] and max(r["step"] for r in rows(short)) == 4


def test_the_same_run_again_is_refused_too_and_overwrite_repeats_it_exactly(config):
    cfg = config(steps=6, save_every=3)
    stopped_run(cfg, 3)
    with pytest.raises(SystemExit, match="this very run, up to step 3: --resume"):
        train.main(cfg)
    first = train.main(dataclasses.replace(cfg, resume=True))
    with pytest.raises(SystemExit, match="this very run, up to step 6"):
        train.main(cfg)
    stopped_run(dataclasses.replace(cfg, overwrite=True), 2)
    assert nano.load_checkpoint(cfg.out)[1]["step"] == 2
    assert train.main(dataclasses.replace(cfg, overwrite=True))["val_loss"] == first["val_loss"]


def test_the_recorded_configuration_never_overwrites(config):
    cfg = config(steps=2)
    train.main(cfg)
    train.main(dataclasses.replace(cfg, overwrite=True))
    with pytest.raises(SystemExit, match="this very run"):
        train.main(infra.cli(train.Config, train.PRESETS, [f"--config={cfg.out}/config.json"]))


def test_too_little_held_out_text_is_refused_before_training(tmp_path, config):
    (tmp_path / "tiny.txt").write_text("a few words, " * 40, encoding="utf-8")
    cfg = config(text=str(tmp_path / "tiny.txt"), val_fraction=0.05)
    with pytest.raises(SystemExit, match=r"tiny\.val: \d+ tokens: expected 33 or more"):
        train.main(cfg)
    assert [p.name for p in Path(cfg.out).iterdir()] == [".lock"]


def test_resume_refuses_another_shape(config):
    cfg = config(steps=4)
    stopped_run(cfg, 2)
    with pytest.raises(SystemExit, match="--resume: .*hidden_size=32"):
        train.main(dataclasses.replace(cfg, hidden_size=64, resume=True))
    with pytest.raises(SystemExit, match="--resume: .*max_position_embeddings=32"):     # other rows, another order of data
        train.main(dataclasses.replace(cfg, max_position_embeddings=16, resume=True))


def test_a_new_run_with_yarn_can_be_resumed(config):
    cfg = config(steps=4, rope_factor=2.0)
    stopped_run(cfg, 2)
    assert train.main(dataclasses.replace(cfg, resume=True))["step"] == 4


# --- --init ----------------------------------------------------------------------------------------------------------

def test_init_starts_from_the_checkpoints_weights_and_shape(reference, config):
    before = weights(reference[0].out)
    cfg = config(init=reference[0].out, hidden_size=64, steps=1, lr=1e-12, weight_decay=0.0, log_every=1, seed=5)
    train.main(cfg)
    after, extra = nano.load_checkpoint(cfg.out)
    state = after.state_dict()
    assert after.config.hidden_size == 32 and extra["step"] == 1 and extra["consumed_samples"] == 8
    assert before.keys() == state.keys() and all((before[k] - state[k]).abs().max() < 1e-9 for k in before)
    assert rows(cfg)[0]["loss"] < 4.5                   # not the 5.77 of a fresh model


def test_longer_rows_with_a_larger_base_can_be_trained_from_init(reference, config):
    cfg = config(init=reference[0].out, steps=1, rope_theta=5e5, max_position_embeddings=64, batch_tokens=256)
    train.main(cfg)
    model, extra = nano.load_checkpoint(cfg.out)
    assert (model.config.rope_theta, model.config.max_position_embeddings, extra["consumed_samples"]) == (5e5, 64, 4)
    assert reference[0].max_position_embeddings != 64 and json.loads((Path(cfg.out) / "config.json").read_text())["rope_theta"] == 5e5


def test_evaluations_are_no_training_time(config, monkeypatch):
    real, evaluate, late = time.perf_counter, train.evaluate, [0]

    def slow(*args):
        late[0] += 1000
        return evaluate(*args)
    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: real() + late[0]))
    result = train.main(config(steps=6, eval_every=2))
    assert late == [3000] and 0 < result["seconds"] < 1000


# --- bench and presets -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bench_prints_one_json_line_with_the_agreed_keys_and_writes_nothing(config, capsys, optimizer):
    cfg = config(bench=True, optimizer=optimizer)
    result = train.main(cfg)
    out = capsys.readouterr().out
    assert json.loads(out) == result and out.count("\n") == 1
    assert {"tok_per_s", "spread", "seconds_per_step", "mfu", "mfu_convention", "peak_memory_bytes", "machine"} <= result.keys()
    assert result["mfu"] is None and result["rows"] * result["row_tokens"] == 256 and result["params"] == nano.num_params(
        nano.shape_of(dataclasses.replace(cfg, vocab_size=320)))
    low, high = result["spread"]
    assert low <= result["tok_per_s"] <= high and result["tok_per_s"] == pytest.approx(256 / result["seconds_per_step"], rel=0.05)
    assert not Path(cfg.out).exists()


def test_every_preset_is_a_valid_configuration_of_its_shape():
    for name, values in train.PRESETS.items():
        cfg = train.Config(**values)
        train.check(cfg, CPU)
        if name in nano.PRESETS:
            shape = nano.Config(**nano.PRESETS[name])
            assert nano.shape_of(dataclasses.replace(cfg, vocab_size=shape.vocab_size)) == shape


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(optimizer="sgd"), "--optimizer=sgd: muon or adamw expected"), (dict(schedule="linear"), "--schedule=linear: wsd, cosine or multistep expected"),
    (dict(steps=0), "--steps.*at least 1"), (dict(log_every=0), "at least 1"), (dict(eval_every=0), "at least 1"), (dict(save_every=-1), "at least 1"),
    (dict(lr=0.0), "--lr.*more than 0"), (dict(lr=-1.0), "--lr.*more than 0"), (dict(grad_clip=0.0), "grad_clip: more than 0"),
    (dict(warmup=1.5), "--warmup.*0 to 1"), (dict(warmup=-0.1), "--warmup"), (dict(decay=1.1), "--decay.*0 to 1"),
    (dict(batch_tokens=100), "--batch_tokens=100: a multiple of --max_position_embeddings=32"), (dict(batch_tokens=0), "--batch_tokens=0"),
    (dict(batch_tokens=-256), "--batch_tokens=-256"),
    (dict(micro_batch=3), "--micro_batch=3: a divisor of each process's 8 rows"), (dict(micro_batch=16), "--micro_batch=16"), (dict(micro_batch=-1), "--micro_batch=-1"),
    (dict(resume=True, overwrite=True), "--resume and --overwrite: one of them"),
    (dict(val_fraction=0.0), "--val_fraction=0.0"), (dict(val_fraction=1.0), "--val_fraction=1.0"),
    (dict(text="/nowhere/x.txt"), "/nowhere/x.txt"), (dict(jsonl="/nowhere/x.jsonl", text=""), "/nowhere/x.jsonl"),
    (dict(tokenizer="nonsense"), "--tokenizer=nonsense"), (dict(mixture="a=1"), "--mixture=a=1"), (dict(mixture="???"), "--mixture"),
    (dict(vocab_size=64), "--vocab_size=64: at least the tokenizer's 320"),
    (dict(init="/nowhere"), "/nowhere: no checkpoint"),
    (dict(device="toaster"), "--device=toaster"), (dict(dtype="float16"), "--dtype=float16"),
    (dict(seed=10**20), "seed"), (dict(max_position_embeddings=2**20, batch_tokens=2**20), "expected")])
def test_bad_settings_end_with_one_line(config, change, message):
    cfg = config(**change)
    with pytest.raises(SystemExit, match=message) as error:
        train.main(cfg)
    assert "\n" not in str(error.value) and not nano.checkpoints(cfg.out)


def test_only_the_schedule_that_decays_at_the_end_must_leave_room_for_that(config):
    for schedule in ("cosine", "multistep"):
        train.check(config(schedule=schedule, warmup=0.7, decay=0.4), CPU)
    with pytest.raises(SystemExit, match="together 0 to 1 expected"):
        train.check(config(schedule="wsd", warmup=0.7, decay=0.4), CPU)


def test_a_negative_seed_is_refused_in_one_line(config):
    with pytest.raises(SystemExit, match=r"^--seed=-1: 0 to .* expected$"):
        train.main(config(seed=-1, steps=2))


def test_init_from_another_tokenizer_is_refused(config, tmp_path):
    nano.save_checkpoint(tmp_path, small_model(), tokenizer="gpt2")
    with pytest.raises(SystemExit, match="--tokenizer=bytes: .* was trained with gpt2"):
        train.main(config(init=str(tmp_path)))


def test_a_resumed_run_keeps_its_settings_or_says_what_differs(config, capfd):
    """What somebody forgets to type must not change the run; the rate may change on the way, aloud."""
    cfg = config(seed=3, schedule="cosine", optimizer="adamw")
    stopped_run(cfg, 4)
    before = (Path(cfg.out) / "config.json").read_bytes()
    for change, named in ((dict(seed=0), "seed=3"), (dict(schedule="wsd"), "schedule=cosine"), (dict(optimizer="muon"), "optimizer=adamw"),
                          (dict(text="", val_fraction=0.05), "text=.*val_fraction=0.1"), (dict(doc_mask=False), "doc_mask=True"),
                          (dict(batch_tokens=512), "batch_tokens=256")):
        with pytest.raises(SystemExit, match=f"--resume: .* has {named}: the same expected .--config=.*config.json"):
            train.main(dataclasses.replace(cfg, resume=True, **change))
    with pytest.raises(SystemExit, match="--steps=3: .* stands at step 4"):
        train.main(dataclasses.replace(cfg, resume=True, steps=3))
    assert (Path(cfg.out) / "config.json").read_bytes() == before and len(nano.checkpoints(cfg.out)) == 1
    train.main(dataclasses.replace(cfg, resume=True, lr=1e-5, steps=8))
    err = capfd.readouterr().err
    assert f"!!! lr: 1e-05 instead of the run's {cfg.lr}" in err and "!!! steps: 8 instead of the run's 20" in err


def test_a_run_of_another_stage_is_not_resumed(config):
    cfg = config(steps=2)
    train.main(cfg)
    nano.save_checkpoint(cfg.out, nano.load_checkpoint(cfg.out)[0], 3, 24, "sft")
    with pytest.raises(SystemExit, match="holds a run of stage sft: --init="):
        train.main(dataclasses.replace(cfg, resume=True, steps=4))


def test_nothing_is_deleted_by_a_run_that_cannot_begin(config, monkeypatch):
    cfg = config(steps=2)
    train.main(cfg)
    files = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir() if p.name != ".lock"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    for change, message in ((dict(wandb=True), "pip install wandb"), (dict(init=cfg.out), "holds what this run begins from"),
                            (dict(init=f"{cfg.out}/ckpt_00000002.pt"), "holds what this run begins from")):
        with pytest.raises(SystemExit, match=message):
            train.main(dataclasses.replace(cfg, overwrite=True, **change))
    assert {p.name: p.read_bytes() for p in Path(cfg.out).iterdir() if p.name != ".lock"} == files


def test_a_directory_that_is_none_or_holds_a_model_of_others_is_one_line(config, tmp_path):
    (tmp_path / "file").touch(), (tmp_path / "hf").mkdir(), (tmp_path / "hf/model.safetensors").touch()
    for out, message in (("file", "--out=.*File exists: a directory"), ("file/x", "--out=.*Not a directory"), ("hf", "holds a model for transformers")):
        with pytest.raises(SystemExit, match=message):
            train.main(config(out=str(tmp_path / out)) if out == "x" else dataclasses.replace(config(), out=str(tmp_path / out)))


def test_a_broken_config_json_is_another_runs(config):
    cfg = config(steps=2)
    train.main(cfg)
    (Path(cfg.out) / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="holds another run"):
        train.main(cfg)
    train.main(dataclasses.replace(cfg, resume=True))


def test_many_epochs_are_said(config, capsys):
    train.main(config(steps=1))
    assert "epochs of" not in capsys.readouterr().out
    cfg = config("long", steps=20_000)
    stopped_run(cfg, 1)
    assert re.search(r"WARNING: \d+\.\d epochs of .*: beyond 5", capsys.readouterr().out)


def test_a_run_whose_text_has_moved_is_resumed_and_so_is_one_that_forgets_where_it_began(config, corpus, tmp_path, capfd):
    base, moved = config("base", steps=2), tmp_path / Path(corpus).name
    train.main(base)
    cfg = dataclasses.replace(config(steps=6, lr=1e-3), init=base.out, rope_theta=20_000.0)
    stopped_run(cfg, 3)
    with pytest.raises(SystemExit, match="has rope_theta=20000.0: the same expected"):
        train.main(dataclasses.replace(cfg, resume=True, rope_theta=90_000.0))
    shutil.copytree(corpus, moved)
    train.main(dataclasses.replace(cfg, resume=True, text=str(moved), init=""))
    assert json.loads((Path(cfg.out) / "config.json").read_text())["init"] == base.out
    assert "!!! text: " in capfd.readouterr().err


def test_resuming_nothing_is_said_and_post_training_is_named(config, capsys):
    cfg = config(steps=2, resume=True)
    Path(cfg.out).mkdir(parents=True)
    (Path(cfg.out) / "config.json").write_text('{"init": "of another run"}')
    train.main(cfg)
    assert "nothing to resume: a new run" in capsys.readouterr().out
    path = Path(cfg.out) / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["batch_tokens"]
    path.write_text(json.dumps(recorded | dict(batch=4, stage="sft", warmup=0.3)))                    # as sft.py's
    nano.save_checkpoint(cfg.out, nano.load_checkpoint(cfg.out)[0], 3, 24, "sft")
    with pytest.raises(SystemExit, match="holds a run of stage sft"):
        train.main(dataclasses.replace(cfg, steps=4))


def test_a_reader_who_leaves_does_not_take_the_end_of_a_run_with_him(config, monkeypatch):
    def report(*_):
        raise BrokenPipeError
    monkeypatch.setattr(train, "report", report)
    assert train.main(config(steps=1))["step"] == 1


def test_a_finished_run_that_is_resumed_keeps_its_last_loss(config):
    cfg = config(steps=3)
    first = train.main(cfg)["loss"]
    train.main(dataclasses.replace(cfg, resume=True))
    assert rows(cfg)[-1]["final"] and rows(cfg)[-1]["loss"] == first
