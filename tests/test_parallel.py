"""Replicas (DDP) and tensor parallelism on gloo processes: every layout trains the model that one process trains.

Most tests are for a pitfall that some project fell into: equal seeds (SmolLM3), local gradient norms, Muon on shards, means of
means, the z-loss of shifted logits, DDP over all ranks. `pytest -s` also prints how many bytes a training step sends.
"""
import copy, gc, itertools, os, re, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo   # otherwise every forked rank imports it anew, for seconds, as soon as it makes an optimizer
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import data, infra, model as nano, train
from processes import run

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
             no_rope_layer_interval=2, max_position_embeddings=32)
WIDE = 0.1                 # std of the weights that runs start from: nothing is nearly uniform, norms are not all one either
KINDS = {"adamw": dict(optimizer="adamw", grad_clip=100.0),
         "adamw, untied, qk_norm": dict(optimizer="adamw", tie_word_embeddings=False, qk_norm=True, z_loss=0.01, micro_batch=2,
                                        grad_clip=0.3),
         "muon, qk_norm": dict(optimizer="muon", qk_norm=True, z_loss=0.01, micro_batch=2, grad_clip=0.3),
         "muon, untied": dict(optimizer="muon", tie_word_embeddings=False, grad_clip=0.3)}


def start_from(folder, vocab=320, **change):
    """The checkpoint of a model that no process group has seen."""
    torch.manual_seed(0)
    m = nano.Transformer(nano.Config(**SHAPE | dict(vocab_size=vocab, initializer_range=WIDE) | change))
    for p in m.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    folder.mkdir(parents=True, exist_ok=True)
    nano.save_checkpoint(folder, m)
    return m


def after(owner, name, look):
    """From now on look(result, *arguments) sees every call of owner.name. For forked processes, so nothing is put back."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        look(result, *args, **kwargs)
        return result
    setattr(owner, name, wrapped)


def session(cfg, *prepare):
    """train.main(cfg) on one rank -> what this rank read, computed, said and holds at the end."""
    ids, counts, steps, said, runs, forward, batches = [], [], [], [], [], nano.Transformer.forward, data.val_batches

    def watched(self, rows, docs=None, targets=None):
        if torch.is_grad_enabled():                     # not in evaluations
            ids.append(rows.clone()), counts.append(int((targets != -100).sum()))
        return forward(self, rows, docs, targets)

    nano.Transformer.forward, train.report = watched, lambda *_: None
    data.val_batches = lambda source, T, n, limit: batches(source, T, 24, limit)    # several, so that replicas share them
    after(train, "begin", lambda result, *_: (runs.append(result), ids.clear(), counts.clear()))     # DDP's rehearsal
    after(train, "update", lambda _, run, loss, norm, lr: steps.append((loss, norm)))
    after(infra.Log, "say", lambda _, log, text: said.append(text))
    for change in prepare:
        change()
    result = train.main(cfg)
    model, state = runs[0].model, {p: s for o in runs[0].optimizers for p, s in o.state.items()}
    return SimpleNamespace(ids=torch.cat(ids) if ids else None, counts=counts, steps=steps, said=said, result=result,
                           weights={n: p.detach().clone() for n, p in model.named_parameters()},
                           tp_dim={n: p.tp_dim for n, p in model.named_parameters()}, out=Path(cfg.out),
                           state={n: state[p] for n, p in model.named_parameters()} if state else {},
                           complaints=train.check_ranks(model, runs[0].rt, runs[0].step), dp_rank=runs[0].rt.dp_rank)


def stop_at(step, rank):
    """SIGTERM to one rank in the middle of its step `step`."""
    def prepare():
        if os.environ.get("RANK", "0") == str(rank):
            after(train, "lr_at", lambda _, at, cfg: signal.raise_signal(signal.SIGTERM) if at == step - 1 else None)
    return prepare


def fp32_muon():
    """Newton-Schulz in float32: Muon's only use of bfloat16 in these runs becomes the identity."""
    torch.Tensor.bfloat16 = lambda x: x


def exactly(optimizer):
    """What to change so that runs of this optimizer can be compared to the last digits."""
    return [fp32_muon] * (optimizer == "muon")


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory):
    """config(**changes): 5 steps of 8 rows of 32 bytes, in a new directory, from a checkpoint that has that shape."""
    root, number = tmp_path_factory.mktemp("parallel"), itertools.count()
    gc.collect(), gc.freeze()                           # train.main collects garbage: not this process's, on every rank

    def make(**change):
        shape = {k: change[k] for k in ("qk_norm", "tie_word_embeddings", "num_key_value_heads") if k in change}
        init = root / "-".join(["init", *(f"{k}={v}" for k, v in sorted(shape.items()))])
        if "init" not in change and not init.exists():
            start_from(init, **shape)
        return train.Config(**dict(
            SHAPE, text=str(corpus), init=str(init), out=str(root / f"run{next(number)}"), steps=5, batch_tokens=256,
            val_fraction=0.1, log_every=1000, eval_every=1000, save_every=1000, dtype="float32", device="cpu",
            initializer_range=WIDE) | change)
    return make


@pytest.fixture(scope="session")
def trained(config):
    """trained(dp, tp, *prepare, **changes): what the ranks of that run tell. A run is started once, however many ask."""
    done = {}

    def get(dp, tp, *prepare, **change):
        key = dp, tp, prepare, *sorted(change.items())
        if key not in done:
            done[key] = run(dp * tp, session, config(tp=tp, **change), *prepare)
        return done[key]
    return get


def together(shards, dim):
    """What the ranks of one replica hold of a tensor -> the tensor; a replicated one must be the same on all of them."""
    assert dim is not None or all(torch.equal(shards[0], x) for x in shards)
    return shards[0] if dim is None else torch.cat(shards, dim)


def assert_close(got, expected, tolerance):
    for name, p in expected.items():
        assert (got[name] - p).abs().max() <= tolerance, (name, float((got[name] - p).abs().max()))


def assert_same_files(one, other):
    """Two checkpoint files hold the same weights and optimizer states, bit for bit."""
    a, b = (torch.load(nano.checkpoints(out)[0], weights_only=True) for out in (one, other))
    assert a["model"].keys() == b["model"].keys() and all(torch.equal(v, b["model"][n]) for n, v in a["model"].items())
    assert a["optimizer"].keys() == b["optimizer"].keys() == a["model"].keys()
    for name, state in a["optimizer"].items():
        other = b["optimizer"][name]
        assert state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items()), name


# --- a layout trains what one process trains -------------------------------------------------------------------------

def assert_trains_alike(one, ranks, tolerance):
    """Losses, norms (relative to themselves), final weights, validation; and the same step on every rank."""
    for r in ranks:
        assert r.steps == ranks[0].steps and len(r.steps) == len(one.steps)
        assert r.result["val_loss"] == ranks[0].result["val_loss"]
    for (loss, norm), (expected, expected_norm) in zip(ranks[0].steps, one.steps):
        assert loss == pytest.approx(expected, abs=tolerance) and norm == pytest.approx(expected_norm, rel=tolerance)
    assert_close(nano.load_checkpoint(ranks[0].out)[0].state_dict(), nano.load_checkpoint(one.out)[0].state_dict(), tolerance)
    assert ranks[0].result["val_loss"] == pytest.approx(one.result["val_loss"], abs=10 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_two_replicas_on_two_ranks_each_train_what_one_process_trains(trained, kind):
    change, prepare = KINDS[kind], exactly(KINDS[kind]["optimizer"])
    one, ranks = trained(1, 1, *prepare, **change)[0], trained(2, 2, *prepare, **change)
    assert_trains_alike(one, ranks, 1e-4)
    assert all((norm > change["grad_clip"]) == (change["grad_clip"] < 1) for _, norm in one.steps)      # clipped, or not
    counts = [torch.tensor(ranks[i].counts).view(5, -1).sum(1) for i in (0, 2)]
    assert (counts[0] != counts[1]).any()               # a mean of the replicas' means would be another number


@pytest.mark.parametrize("dp, tp", [(1, 2), (2, 1), (1, 4), (4, 1)])
def test_every_layout_trains_what_one_process_trains(trained, dp, tp):
    change = KINDS["adamw, untied, qk_norm"] | dict(micro_batch=0)
    assert_trains_alike(trained(1, 1, **change)[0], trained(dp, tp, **change), 1e-4)


def test_muon_in_bfloat16_stays_within_1e_3(trained):
    """Its Newton-Schulz iteration multiplies small singular values by up to 3.4445^5 = 485, and so what a sum in another
    order does to the last of bfloat16's 8 bits. In float32, above, the same runs agree within 1e-4."""
    assert_trains_alike(trained(1, 1, **KINDS["muon, untied"])[0], trained(2, 2, **KINDS["muon, untied"]), 1e-3)


# --- data ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dp, tp", [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_replicas_read_their_part_of_the_batch_in_order_and_the_ranks_of_one_read_the_same(trained, dp, tp):
    change = KINDS["adamw, untied, qk_norm"] | dict(micro_batch=2 if (dp, tp) == (2, 2) else 0)
    one, ranks = trained(1, 1, **change)[0], trained(dp, tp, **change)
    parts = [r.ids.view(5, 8 // dp, 32) for r in ranks[::tp]]
    assert torch.equal(torch.cat(parts, 1), one.ids.view(5, 8, 32))
    assert all(torch.equal(r.ids, ranks[r.dp_rank * tp].ids) for r in ranks) and len(one.ids.unique(dim=0)) > 20


# --- ranks stay together ---------------------------------------------------------------------------------------------

LONG = dict(init="", steps=20, batch_tokens=128, num_hidden_layers=1, qk_norm=True, grad_clip=0.3, lr=0.02)


def test_after_20_steps_replicas_and_replicated_parameters_are_bit_identical(trained):
    ranks = trained(2, 2, **LONG)
    for name, dim in ranks[0].tp_dim.items():
        for i, r in enumerate(ranks):
            assert torch.equal(r.weights[name], ranks[i % 2 if dim is not None else 0].weights[name]), (name, i)
        if dim is not None:
            assert not torch.isclose(ranks[0].weights[name], ranks[1].weights[name]).all(), name
        else:
            assert (ranks[0].weights[name] - 1).abs().max() > 1e-3, name      # they have moved together, not stood still
    assert all(r.steps == ranks[0].steps and len(r.steps) == 20 for r in ranks)
    assert all(r.complaints == [] and not any("WARNING: training" in s for s in r.said) for r in ranks)


# --- checkpoints -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_ranks_holds_their_shards_put_together(trained, kind):
    prepare = exactly(KINDS[kind]["optimizer"])
    one, ranks = trained(1, 1, *prepare, **KINDS[kind])[0], trained(2, 2, *prepare, **KINDS[kind])[:2]
    model, extra = nano.load_checkpoint(ranks[0].out)
    assert model.state_dict().keys() == extra["optimizer"].keys() == one.weights.keys()
    for name, p in model.state_dict().items():
        dim, muon = ranks[0].tp_dim[name], KINDS[kind]["optimizer"] == "muon" and "layers" in name and p.dim() == 2
        assert torch.equal(p, together([r.weights[name] for r in ranks], dim)) and p.shape == one.weights[name].shape, name
        assert extra["optimizer"][name].keys() == ({"momentum_buffer"} if muon else {"exp_avg", "exp_avg_sq", "step"}), name
        for key, value in extra["optimizer"][name].items():
            shards = [r.state[name][key] for r in ranks]
            assert torch.equal(value, together(shards, None if key == "step" else dim)), (name, key)
            assert value.shape == one.state[name][key].shape, (name, key)


@pytest.mark.parametrize("kind, tp", [("adamw", 4), ("adamw, untied, qk_norm", 2), ("muon, untied", 2)])
def test_a_checkpoint_comes_back_from_another_layout_bit_for_bit(trained, config, kind, tp):
    """One process's, loaded by several ranks and saved by them: weights, optimizer states and logits differ by exactly 0."""
    one = trained(1, 1, *exactly(KINDS[kind]["optimizer"]), **KINDS[kind])[0]
    cfg = config(**KINDS[kind] | dict(tp=tp, resume=True))
    shutil.copytree(one.out, cfg.out)
    before = nano.checkpoints(cfg.out)[0].stat().st_mtime_ns
    ranks = run(tp, session, cfg)                       # all steps are done: it loads and saves
    assert ranks[0].steps == [] and nano.checkpoints(cfg.out)[0].stat().st_mtime_ns > before and ranks[0].complaints == []
    assert_same_files(one.out, cfg.out)
    with torch.no_grad():
        a, b = (nano.load_checkpoint(out)[0](one.ids[:2]) for out in (one.out, cfg.out))
    assert torch.equal(a, b)


def test_a_run_goes_on_under_other_layouts_with_the_same_data_and_losses(trained, config):
    change, prepare = dict(steps=12, tie_word_embeddings=False, grad_clip=0.3), exactly("muon")     # and AdamW for the rest
    one = trained(1, 1, *prepare, **change)[0]
    cfg, ids, steps = config(**change), [], []
    for dp, tp, end in ((2, 2, 3), (1, 1, 6), (2, 1, 9), (1, 2, 12)):
        vars(cfg).update(tp=tp, resume=end > 3)
        ranks = run(dp * tp, session, cfg, stop_at(end, dp * tp - 1), *prepare)     # the last rank gets the signal
        ids.append(torch.cat([r.ids.view(3, -1, 32) for r in ranks[::tp]], 1)), steps.extend(ranks[0].steps)
    assert torch.equal(torch.cat(ids), one.ids.view(12, 8, 32))
    assert torch.tensor(steps) == pytest.approx(torch.tensor(one.steps), abs=2e-4)
    assert_close(nano.load_checkpoint(cfg.out)[0].state_dict(), one.weights, 2e-4)


def test_a_run_of_four_replicas_goes_on_bit_for_bit(trained, config):
    """A sum of more than two numbers depends on their order, and DDP's buckets decide on that."""
    change = KINDS["adamw, untied, qk_norm"] | dict(micro_batch=0)
    whole, cfg = trained(4, 1, **change)[0], config(**change, resume=True)
    steps = run(4, session, cfg, stop_at(2, 3))[0].steps + run(4, session, cfg)[0].steps
    assert steps == whole.steps
    assert_same_files(whole.out, cfg.out)


# --- the loss and the logits -----------------------------------------------------------------------------------------

def losses(tp, cases):
    """loss_sums on this rank's columns of given logits -> per case nll, z and the gradients of each."""
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    model, results = nano.Transformer(nano.Config(**SHAPE | dict(vocab_size=64, num_hidden_layers=1)), rt.tp_group), []
    model.own_logits = lambda x: x
    for logits, targets in cases:
        own = logits.chunk(tp, -1)[rt.tp_rank].clone().requires_grad_()
        sums = model.loss_sums(own, targets)
        results.append([*(float(s) for s in sums), *(torch.autograd.grad(s, own, retain_graph=True)[0] for s in sums)])
    return results


@pytest.mark.parametrize("tp", [2, 4])
def test_vocabulary_parallel_loss_and_z_loss_equal_the_unsharded_ones(tp):
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 8, 64, generator=draw), torch.randint(64, (3, 8), generator=draw)
    targets[0, ::3], targets[2] = -100, -100            # a whole row that nobody counts
    first, last = torch.zeros(64), torch.zeros(64)
    first[3], last[60] = 30, 30
    low, high = targets.clone().clamp(max=15), targets.clone().clamp(min=48).masked_fill(targets == -100, -100)
    cases = [(logits, targets), (logits + last, low), (logits + first, high),       # the largest logit on another rank
             (200 * logits.sign(), targets), (logits + 200, targets), (logits - 200, targets)]
    ranks = run(tp, losses, tp, cases)
    for i, (x, t) in enumerate(cases):
        x = x.double().requires_grad_()
        nll = F.cross_entropy(x.flatten(0, 1), t.flatten(), ignore_index=-100, reduction="sum")
        z = torch.logsumexp(x, -1)[t != -100].square().sum()
        expected = [torch.autograd.grad(s, x)[0] for s in (nll, z)]
        nll, z = nll.item(), z.item()
        assert all(r[i][:2] == pytest.approx([nll, z], rel=1e-5) for r in ranks), i
        for k in (0, 1):
            got = torch.cat([r[i][2 + k] for r in ranks], -1)        # of a logsumexp of 200 float32 knows 1.5e-5
            assert got.dtype == torch.float32 and (got - expected[k]).abs().max() <= 5e-5 * max(1, expected[k].abs().max()), i


def logits_and_gradients(folder, tp, ids, docs, push):
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    model, _ = nano.load_checkpoint(folder, tp=rt.tp_group)
    logits = model(ids, docs)
    (logits * push).sum().backward()
    named = list(model.named_parameters())
    return logits.detach(), {n: p.grad for n, p in named}, {n: p.tp_dim for n, p in named}


@pytest.mark.parametrize("tp, tied", [(2, True), (2, False), (4, False)])
def test_logits_and_their_gradients_equal_the_unsharded_ones(tmp_path, tp, tied):
    start_from(tmp_path, tie_word_embeddings=tied, qk_norm=not tied, sliding_window=5)
    ids = torch.randint(320, (2, 11), generator=torch.Generator().manual_seed(1))
    docs = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    push = torch.randn(2, 11, 320, generator=torch.Generator().manual_seed(2))
    (logits, grads, _), = run(1, logits_and_gradients, tmp_path, 1, ids, docs, push)
    ranks = run(tp, logits_and_gradients, tmp_path, tp, ids, docs, push)
    for got, _, _ in ranks:
        assert got.shape == (2, 11, 320) and torch.equal(got, ranks[0][0]) and (got - logits).abs().max() < 1e-5
    for name, dim in ranks[0][2].items():
        assert (together([g[name] for _, g, _ in ranks], dim) - grads[name]).norm() < 1e-5 * grads[name].norm(), name


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [[7, 8, 9, 10, 11], [5], [100, 300, 319]]


def written(folder, tp):
    """What this rank makes of the prompts: in four ways, and once in bfloat16, of which generate makes itself a copy."""
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    model, _ = nano.load_checkpoint(folder, tp=rt.tp_group)
    rows = [nano.generate(model, PROMPTS, 16, seed=seed, **how) for seed, how in (
        (0, dict(temperature=0)), (3, {}), (4, dict(temperature=1.3, top_k=20)), (5, dict(top_p=0.8, stop_ids=range(40))))]
    model.compute_dtype = torch.bfloat16
    return rows, nano.generate(model, PROMPTS, 16)


def test_two_ranks_write_what_one_process_writes(tmp_path):
    start_from(tmp_path, tie_word_embeddings=False, initializer_range=0.3)
    (one, _), (two, rough) = run(1, written, tmp_path, 1)[0], (ranks := run(2, written, tmp_path, 2))[0]
    assert ranks[0] == ranks[1] and [len(ids) for ids, _ in rough] == [16] * 3
    for rows, expected in zip(two, one):
        for (ids, logps), (ids1, logps1) in zip(rows, expected):
            assert ids == ids1 and logps == pytest.approx(logps1, abs=1e-4)
    assert len({tuple(ids) for rows in one for ids, _ in rows}) == 12 and any(len(ids) < 16 for ids, _ in one[3])


# --- gradients -------------------------------------------------------------------------------------------------------

def matrices(tp_group):
    """Parameters with random weights and gradients -> [(this rank's part, its tp_dim, whole weight, whole gradient)]."""
    draw, result = torch.Generator().manual_seed(0), []
    for shape, dim in (((16, 8), 0), ((8, 16), 1), ((8, 8), 0), ((16, 8), 1), ((8,), None)):
        weight, grad = (torch.randn(shape, generator=draw) for _ in "wg")
        p = torch.nn.Parameter(nano.shard(weight, dim, tp_group).clone())
        p.grad, p.tp_dim = nano.shard(grad, dim, tp_group).clone(), dim
        result.append((p, dim, weight, grad))
    return result


def clipped(tp):
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    held = matrices(rt.tp_group)
    model = SimpleNamespace(parameters=lambda: [p for p, *_ in held])
    local = torch.nn.utils.get_total_norm([p.grad for p, *_ in held])
    norm = train.clip_grad_norm(model, 1.0, rt)
    factors = [float((p.grad / nano.shard(grad, dim, rt.tp_group)).mean()) for p, dim, _, grad in held]
    return norm, local, factors


@pytest.mark.parametrize("tp", [2, 4])
def test_the_gradient_norm_counts_shards_once_and_replicated_parameters_once(tp):
    norm = torch.nn.utils.get_total_norm([grad for *_, grad in matrices(None)])
    ranks = run(tp, clipped, tp)
    for got, local, factors in ranks:
        assert torch.equal(got, ranks[0][0]) and float(got) == pytest.approx(float(norm), rel=1e-6)
        assert factors == pytest.approx([float(1 / norm)] * 5, rel=1e-4)
        assert local < 0.8 * norm                       # what the naive norm would be: every rank another one, all too small


def muon(tp):
    """Three steps -> this rank's shards: of the matrices put together, of the matrices alone, and of one process's."""
    rt = infra.setup(train.Config(tp=tp, device="cpu"))
    results = []
    for group, tp_group in ((rt.tp_group, rt.tp_group), (None, rt.tp_group), (None, None)):
        held = matrices(tp_group)[:4]
        optimizer = train.Muon([p for p, *_ in held], lr=0.1, weight_decay=0.1, tp=group)
        for _ in range(3):
            optimizer.step()
            for p, dim, _, grad in held:
                p.grad = nano.shard(grad.roll(1, 0), dim, tp_group).clone()
        results.append([nano.shard(p.detach(), dim, rt.tp_group if tp_group is None else None) for p, dim, *_ in held])
    return results


@pytest.mark.parametrize("tp", [2, 4])
def test_muon_on_shards_updates_as_on_whole_matrices(tp):
    start = [weight for _, _, weight, _ in matrices(None)]
    for rank, (got, naive, expected) in enumerate(run(tp, muon, tp)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
        for own, other, weight, dim in zip(expected, naive, start, (0, 1, 0, 1)):
            update = own - weight.chunk(tp, dim)[rank]
            assert (other - own).norm() > 0.1 * update.norm()       # a shard's nearest orthogonal matrix is not that


# --- what travels ----------------------------------------------------------------------------------------------------

SITES = {"_allreduce_fut": "gradients, by DDP", "clip_grad_norm": "gradient norm", "Muon.step": "Muon, updates",
         "all_sum": "counts, loss, signal", "pace": "pace, when logged", "Transformer.loss_sums": "loss",
         "Embedding.forward": "embedding", "Block.forward": "blocks, forward", "_Copy.backward": "blocks and head, backward"}


def tally(cfg):
    """The first step, which is logged -> {what was sent: (calls, bytes that this rank handed to collectives)}."""
    sent, snapshots = {}, []

    def count(_, tensor, *args, **kwargs):
        tensor = args[0] if isinstance(tensor, list) else tensor        # all_gather(list, tensor)
        frame, names = sys._getframe(2), []
        while frame:
            names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        what = next((what for site, what in SITES.items() if site in names), names[0])
        calls, size = sent.get(what, (0, 0))
        sent[what] = calls + 1, size + tensor.numel() * tensor.element_size()

    def snapshot(*_):
        snapshots.append(dict(sent))
        if len(snapshots) == 2:
            raise StopIteration                         # the step is over

    after(dist, "all_reduce", count), after(dist, "all_gather", count)
    after(DistributedDataParallel, "__init__", lambda _, self, *args, process_group, **kwargs: self.register_comm_hook(
        process_group, allreduce_hook))                 # DDP's own all-reduces are in C++: have them made in Python
    after(train, "lr_at", snapshot)
    try:
        train.main(cfg)
    except StopIteration:
        pass
    first, second = snapshots
    step = {k: (n - first.get(k, (0, 0))[0], b - first.get(k, (0, 0))[1]) for k, (n, b) in second.items()}
    return {k: v for k, v in step.items() if v != (0, 0)}


def payload(cfg, dp, tp):
    """What a step of Muon without micro-batches should send: {what: (calls, bytes, ranks that take part, formula)}."""
    L, d = cfg.num_hidden_layers, cfg.hidden_size
    tokens, a = cfg.batch_tokens // dp, 2 if cfg.dtype == "bfloat16" else 4
    norms, embedding = (2 * L + 1) * d, 320 * d
    hidden, x = nano.num_params(nano.shape_of(cfg)) - norms - embedding, tokens * d * a
    rows = {"counts, loss, signal": (2, 8 + 16, dp * tp, "8; 16"), "pace, when logged": (1, 16, dp * tp, "16")}
    if dp > 1:
        rows["gradients, by DDP"] = 2, 4 * ((hidden + embedding) // tp + norms), dp, "4 N"
    if tp > 1:
        rows |= {"embedding": (1, x, tp, "BTd a"), "blocks, forward": (2 * L, 2 * L * x, tp, "2 L BTd a"),
                 "blocks and head, backward": (2 * L + 1, (2 * L + 1) * x, tp, "(2 L + 1) BTd a"),
                 "loss": (2, 3 * tokens * 4, tp, "3 BT 4"), "gradient norm": (1, 4, tp, "4"),
                 "Muon, updates": (3, 2 * hidden // tp, tp, "2 M / tp")}       # of three shapes
    return rows


def show(dp, tp, cfg, sent):
    """Rows for the README. On a ring a rank sends 2 (n - 1) / n times an all-reduce's payload, n - 1 times an all-gather's."""
    for what, (_, _, n, formula) in payload(cfg, dp, tp).items():
        calls, size = sent[what]
        ring = (n - 1) * size if "Muon" in what or "pace" in what else 2 * (n - 1) * size // n
        print(f"| {dp} x {tp} | {cfg.dtype} | {what} | {calls} | {size:,} | {formula} | {ring:,} |")


def test_a_step_sends_what_the_formulas_say(config):
    """One step of the default model, of 2,048 tokens."""
    shape = {k: getattr(train.Config(), k) for k in (*SHAPE, "batch_tokens")} | dict(init="", vocab_size=320, steps=2)
    print("\n\nB rows of T tokens in a replica, width d, L layers, a bytes an activation, M parameters of Muon, N on a rank\n"
          "\n| dp x tp | activations | what | calls | payload, bytes | formula | sent by a rank of a ring |\n"
          "|---|---|---|---:|---:|---|---:|")
    for dp, tp, dtype in ((1, 2, "bfloat16"), (1, 2, "float32"), (2, 1, "float32"), (2, 2, "bfloat16"), (2, 2, "float32")):
        cfg = config(**shape, tp=tp, dtype=dtype)
        sent = run(dp * tp, tally, cfg)
        assert sent[0] == {k: v[:2] for k, v in payload(cfg, dp, tp).items()} and all(s == sent[0] for s in sent)
        show(dp, tp, cfg, sent[0])


def test_micro_batches_exchange_gradients_once_a_step(config):
    sums = []
    for micro_batch in (0, 1):
        cfg = config(steps=2, micro_batch=micro_batch)
        sums.append(run(2, tally, cfg)[0]["gradients, by DDP"])
    assert sums[0] == sums[1] and sums[0][1] == 4 * nano.num_params(nano.load_checkpoint(cfg.init)[0].config)


# --- seeds -----------------------------------------------------------------------------------------------------------

def drawn(cfg):
    """A new model as train.main builds it, with norms drawn at random instead of ones."""
    class Norm(nano.RMSNorm):
        def __init__(self, size, *args):
            super().__init__(size, *args)
            torch.nn.init.normal_(self.weight)
    nano.RMSNorm = Norm
    model, _ = train.build(cfg, infra.setup(cfg), data.get_tokenizer("bytes"))
    return {n: p.detach() for n, p in model.named_parameters()}, {n: p.tp_dim for n, p in model.named_parameters()}


def test_ranks_draw_unlike_shards_and_share_what_is_replicated(config):
    shape = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, qk_norm=True, tie_word_embeddings=False)
    ranks, sizes = run(4, drawn, config(**shape, init="", tp=4)), set()
    for name, dim in ranks[0][1].items():
        for (a, _), (b, _) in itertools.combinations(ranks, 2):
            if dim is None:
                assert torch.equal(a[name], b[name]), name
            else:
                x, y = a[name].flatten(), b[name].flatten()
                assert len(x) > 4096 and abs(float(torch.corrcoef(torch.stack((x, y)))[0, 1])) < 0.05, name
                assert float(x.std()) == pytest.approx(WIDE, rel=0.05)        # not that of a narrower or wider matrix
                sizes.add(name)
    assert len(sizes) == 2 * 7 + 2


@pytest.fixture
def draws(monkeypatch):
    """draws(seed, tp, rank): the first random numbers of that rank, in this process and without its group."""
    monkeypatch.setattr(infra, "_groups", lambda *_: (None, None))
    monkeypatch.setattr(sys, "stdout", sys.stdout)      # setup closes that of ranks above 0

    def draw(seed, tp=1, rank=0):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(tp))
        infra.setup(train.Config(seed=seed, tp=tp, device="cpu"))
        return tuple(torch.randn(4).tolist())
    return draw


def test_51_neighbouring_seeds_on_8_ranks_share_no_draw(draws):
    assert len({draws(seed, 8, rank) for seed in range(51) for rank in range(8)}) == 51 * 8


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_alone_or_as_rank_0_a_seed_draws_what_torch_draws(draws, seed):
    torch.manual_seed(seed)
    assert tuple(torch.randn(4).tolist()) == draws(seed) == draws(seed, 4, 0) != draws(seed, 4, 1)


# --- the check before training ---------------------------------------------------------------------------------------

def refusal(cfg, *prepare):
    """How train.main ends on this rank: in one line, or not at all."""
    try:
        session(cfg, *prepare)
    except SystemExit as e:
        return str(e)


def test_equal_seeds_are_refused(config):
    for message in run(2, refusal, config(tp=2, init="", tp_same_seed="on")):
        assert re.search(r"faults, so there is no training: .*q_proj.* same shard on TP ranks 0 and 1.*tp_same_seed", message)
        assert "\n" not in message


def test_equal_shards_never_part_when_the_check_is_ignored(trained):
    """The lesson of SmolLM3: no step heals it, and nothing else shows it."""
    bug, right = trained(1, 2, tp_same_seed="ignore", **LONG), trained(2, 2, **LONG)[:2]
    for name, dim in bug[0].tp_dim.items():
        if name.startswith("layers") and dim is not None:
            assert torch.equal(bug[0].weights[name], bug[1].weights[name]), name
            assert (right[0].weights[name] - right[1].weights[name]).norm() > 0.5 * right[0].weights[name].norm(), name
    assert len(bug[0].steps) == 20 and any("WARNING: training with" in s and "same shard" in s for s in bug[0].said)
    assert not any("WARNING: training with" in s for s in right[0].said)
    assert bug[0].complaints == bug[1].complaints != [] == right[0].complaints


def over_all_ranks():
    train.data_parallel = lambda model, *_: DistributedDataParallel(model)


def test_ddp_over_all_ranks_is_refused(config):
    """It overwrites every rank's shards with those of rank 0."""
    for message in run(4, refusal, config(tp=2), over_all_ranks):
        assert "same shard on TP ranks 0 and 1" in message


def faults(cfg):
    """Complaints of check_ranks about one damage after the other."""
    rt = infra.setup(cfg)
    model, _ = train.build(cfg, rt, data.get_tokenizer("bytes"))
    p, good = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    q, norm, found = "layers.1.self_attn.q_proj.weight", "norm.weight", [train.check_ranks(model, rt, 7)]
    found.append(train.check_ranks(model, rt, rt.rank))
    for rank, name in ((3, norm), (2, q)):
        if rt.rank == rank:
            p[name].data.view(-1)[5] += 1e-6
        found.append(train.check_ranks(model, rt, 7))
        model.load_state_dict(good)
    dist.broadcast(p[q].data, group_src=0, group=rt.tp_group)
    return [*found, train.check_ranks(model, rt, 7)]


def test_the_check_is_silent_when_all_is_right_and_names_each_fault(config):
    ranks = run(4, faults, config(init="", tp=2))
    silent, steps, norm, replica, shard = ranks[0]
    assert all(r == ranks[0] for r in ranks) and silent == []
    assert len(steps) == 1 and "steps [0, 1, 2, 3]" in steps[0]
    assert norm == ["norm.weight of rank 3 is not what it is on rank 0"]
    assert replica == ["layers.1.self_attn.q_proj.weight of rank 2 is not what it is on rank 0"]
    assert set(shard) == {"layers.1.self_attn.q_proj.weight holds the same shard on TP ranks 0 and 1"}


def collapsed(cfg):
    """Complaints about a model whose unused tokens have one embedding, as training makes it: in both ranks' first rows."""
    rt = infra.setup(cfg)
    model, _ = train.build(cfg, rt, data.get_tokenizer("bytes"))
    with torch.no_grad():
        model.embed_tokens.weight[:24] = 1.0
    return train.check_ranks(model, rt, 0)


def test_embeddings_of_unused_tokens_are_not_taken_for_equal_shards(config):
    assert run(2, collapsed, config(init="", tp=2)) == [[], []]


# --- bad settings ----------------------------------------------------------------------------------------------------

BAD_SHAPES = {"num_attention_heads=3": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=8),
              "num_key_value_heads=1": dict(num_key_value_heads=1), "intermediate_size=63": dict(intermediate_size=63),
              "vocab_size=321": dict(vocab_size=321)}


def refusals(cfgs):
    return [refusal(cfg) for cfg in cfgs]


def test_a_shape_that_two_ranks_cannot_share_is_refused_by_name(config):
    for messages in run(2, refusals, [config(**dict(init="", tp=2) | change) for change in BAD_SHAPES.values()]):
        assert messages == [f"--tp=2: a divisor of {field} expected" for field in BAD_SHAPES]


@pytest.mark.parametrize("world, tp", [(3, 2), (1, 2), (2, 4), (2, 0), (2, -1)])
def test_processes_that_tp_does_not_divide_are_refused(monkeypatch, world, tp):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit, match=rf"^--tp={tp}: a divisor of the number of processes, {world}, expected") as error:
        infra.setup(train.Config(tp=tp, device="cpu"))
    assert "\n" not in str(error.value)


def test_a_batch_that_replicas_or_micro_batches_cannot_share_is_refused(config):
    for dp, change, message in (
            (3, {}, "^--batch_tokens=256: a multiple of --max_position_embeddings=32 times 3 replicas expected"),
            (16, {}, "times 16 replicas"),
            (2, dict(micro_batch=8), "^--micro_batch=8: a divisor of each process's 4 rows expected")):
        with pytest.raises(SystemExit, match=message) as error:
            train.check(config(**change), SimpleNamespace(dp_size=dp))
        assert "\n" not in str(error.value)


def test_an_unknown_way_to_seed_is_refused():
    with pytest.raises(SystemExit, match="^--tp_same_seed=yes: off, on or ignore expected$"):
        infra.setup(train.Config(tp_same_seed="yes", device="cpu"))
