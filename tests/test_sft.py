"""sft.py: losses against closed forms, transformers and TRL; chats, pairs, adapters, evaluation, merging.

Most tests are for a pitfall that some project fell into: means of means, NaN of masked rows, a reference that drifts,
shared history that APO would train, adapters that a resume or a merge loses.
"""
import dataclasses, gc, itertools, json, math, os, random, re, shutil, signal, statistics, uuid
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo   # otherwise every forked rank imports it anew, for seconds, as soon as it makes an optimizer
from torch.nn import functional as F

import data, infra, model as nano, sft, train
from models import random_model
from processes import run as ranks
from runs import assert_same_state, one_line, resumed, rows, steps, stopped_run, untimed, weights, write

CPU = infra.setup(infra.Machine(device="cpu", dtype="float32"))         # one process, alone
BYTES = data.get_tokenizer("bytes")
END, EOS = BYTES.special["<|im_end|>"], BYTES.eos
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, no_rope_layer_interval=2, max_position_embeddings=128, initializer_range=0.1)
KINDS = {"sft": {}, "apo": dict(stage="apo"), "lora": dict(lora_rank=4), "lora apo": dict(stage="apo", lora_rank=4)}


# --- what the tests share --------------------------------------------------------------------------------------------

def small_model(seed=0, **change):
    return random_model(seed, **SHAPE | change)


def checkpoint(folder, seed=0, step=0, tokenizer="bytes", train_config=None, **change):
    folder.mkdir(parents=True, exist_ok=True)
    model = small_model(seed, **change)
    return nano.save_checkpoint(folder, model, step, tokenizer=tokenizer, train_config=train_config)


def chats():
    """26 rows with unlike numbers of trained tokens, so that a mean of means is not the mean."""
    for i in range(26):
        answer = "".join(chr(97 + (i * 5 + j * j) % 26) for j in range(1 + i))
        think = f"<think>\n{i}?\n</think>\n" * (i % 3 == 0)
        yield dict(messages=[dict(role="user", content=f"word {i}?"), dict(role="assistant", content=think + answer)])


def pairs():
    """18 pairs in both modes; chosen ones are in capitals, and the longer of a pair is now this and now that one."""
    for i in range(18):
        think = f"<think>\n{i % 5}\n</think>\n" * (i % 2)
        chosen, rejected = "YES"[:1 + i % 3] * (1 + i % 2), "no" * (1 + i % 4)
        yield dict(prompt=f"Say {i}", chosen=think + chosen, rejected=think + rejected)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """base/, a model that runs start from, and files of chats and pairs."""
    root = tmp_path_factory.mktemp("sft")
    checkpoint(root / "base")
    write(root / "chats.jsonl", chats()), write(root / "pairs.jsonl", pairs())
    gc.collect(), gc.freeze()                           # forked ranks need not look at this process's objects
    return root


def settings(place, out, **change):
    """6 steps of 4 rows, or pairs, on one thread; nothing is held out and nobody asks for answers."""
    file = "pairs" if change.get("stage") == "apo" else "chats"
    return sft.Config(**dict(
        init=str(place / "base"), out=str(out), data=str(place / f"{file}.jsonl"), steps=6, batch=4, lr=1e-2,
        max_length=128, val_fraction=0.0, log_every=1, eval_every=1000, save_every=1000, max_new_tokens=8,
        device="cpu", dtype="float32") | change)


@pytest.fixture
def config(place, tmp_path):
    """config(name, **changes): that run in a directory of this test's own."""
    return lambda name="run", **change: settings(place, tmp_path / name, **change)


def begin(cfg):
    """A run at its beginning, in this process or on a rank."""
    rt = infra.setup(cfg)
    return sft.begin(sft.check(cfg, rt), rt)


def session(cfg):
    """sft.main(cfg) -> (what it returned, the run that it trained)."""
    begun, original = [], sft.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "begin", lambda *a: begun.append(original(*a)) or begun[0])
        return sft.main(cfg), begun[0]


def logp_by_hand(m, ids, mask):
    """Log-probs of the trained tokens of one example, from the logits of a plain forward pass, in float64."""
    with torch.no_grad():
        logits = m(torch.tensor([ids[:-1]]))[0].double()
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    return torch.stack([logp[t, ids[t + 1]] for t in range(len(ids) - 1) if mask[t + 1]])


def rendered(row, **how):
    return data.render(row["messages"], row["mode"], tokenizer=BYTES, **how)


def normalized(source):
    return [data.normalize(row) for row in source]


# --- preference loss -------------------------------------------------------------------------------------------------

LOSSES = ["sigmoid", "apo_zero", "apo_down", "ipo"]
NAMES = {*(f"rewards/{k}" for k in ("chosen", "rejected", "margins", "accuracies")), "logps/chosen", "logps/rejected"}


def random_logps(n=7, seed=0):
    """Four sums of log-probs: of the policy and, near them, of the reference."""
    draw = torch.Generator().manual_seed(seed)
    policy = -60 * torch.rand(2, n, generator=draw, dtype=torch.float64) - 1
    return *policy, *(policy + 8 * torch.randn(2, n, generator=draw, dtype=torch.float64))


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_where_the_policy_is_the_reference_the_losses_are_ln_2_1_1_and_1_over_4_beta_squared(beta):
    chosen, rejected, _, _ = random_logps()
    expected = dict(sigmoid=math.log(2), apo_zero=1.0, apo_down=1.0, ipo=1 / (4 * beta**2))
    for name, value in expected.items():
        loss, metrics = sft.preference_loss(chosen, rejected, chosen, rejected, beta, name)
        assert float(loss) == pytest.approx(value, rel=1e-12), name
        assert all((metrics[f"rewards/{k}"] == 0).all() for k in ("chosen", "rejected", "margins", "accuracies"))


@pytest.mark.parametrize("loss_type, chosen, rejected", [      # the derivatives at 0, in units of beta
    ("sigmoid", -1 / 2, 1 / 2), ("apo_zero", -1 / 4, 1 / 4), ("apo_down", 0.0, 1 / 4)])
def test_gradients_where_the_policy_is_the_reference_are_those_of_the_table(loss_type, chosen, rejected):
    pi = [x.clone().requires_grad_() for x in random_logps()[:2]]
    loss, _ = sft.preference_loss(*pi, pi[0].detach(), pi[1].detach(), 0.3, loss_type)
    loss.backward()
    for p, expected in zip(pi, (chosen, rejected)):
        assert (p.grad * len(p) - 0.3 * expected).abs().max() < 1e-12     # of each pair: the loss is their mean


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_equal_their_closed_forms_pair_by_pair(loss_type, beta):
    lengths = torch.tensor([3, 9, 1, 4, 2, 6, 5]), torch.tensor([8, 1, 2, 7, 5, 3, 4])
    values = random_logps()
    c, r = (values[0] - values[2]).tolist(), (values[1] - values[3]).tolist()
    form = dict(sigmoid=lambda c, r, m, n: -math.log(sigma(beta * (c - r))),
                apo_zero=lambda c, r, m, n: 1 - sigma(beta * c) + sigma(beta * r),
                apo_down=lambda c, r, m, n: sigma(beta * c) + 1 - sigma(beta * (c - r)),
                ipo=lambda c, r, m, n: (c / m - r / n - 1 / (2 * beta)) ** 2)[loss_type]
    expected = [form(*x) for x in zip(c, r, *(n.tolist() for n in lengths))]
    got, metrics = sft.preference_loss(*values, beta, loss_type, lengths)
    assert float(got) == pytest.approx(sum(expected) / 7, rel=1e-9)
    for i in range(7):
        own = [x[i:i + 1] for x in (*values, *lengths)]
        alone, _ = sft.preference_loss(*own[:4], beta, loss_type, tuple(own[4:]))
        assert float(alone) == pytest.approx(expected[i], rel=1e-9)
    assert metrics["rewards/chosen"].tolist() == pytest.approx([beta * x for x in c])
    assert metrics["rewards/rejected"].tolist() == pytest.approx([beta * x for x in r])
    assert metrics["rewards/margins"].tolist() == pytest.approx([beta * (x - y) for x, y in zip(c, r)])
    assert torch.equal(metrics["logps/chosen"], values[0]) and torch.equal(metrics["logps/rejected"], values[1])


def test_ipo_without_lengths_is_the_papers_sum():
    c, r = (x - y for x, y in zip(random_logps()[:2], random_logps()[2:]))
    got, _ = sft.preference_loss(*random_logps(), 0.1, "ipo")
    assert float(got) == pytest.approx(float(((c - r - 5) ** 2).mean()), rel=1e-12)


def test_apo_losses_stay_between_0_and_2_however_far_the_policy_went():
    values = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4])
    far = values.repeat(5), values.repeat_interleave(5)
    for loss_type in ("apo_zero", "apo_down"):
        for c, r in zip(*far):
            loss, _ = sft.preference_loss(c[None], r[None], torch.zeros(1), torch.zeros(1), 0.1, loss_type)
            assert 0 <= float(loss) <= 2
    assert math.isfinite(sft.preference_loss(*far, 0 * far[0], 0 * far[1], 0.1, "sigmoid")[0])


def test_accuracy_is_strict_and_metrics_have_trls_names_and_no_gradient():
    pi = torch.tensor([-1.0, -2.0, -5.0], requires_grad=True)
    _, metrics = sft.preference_loss(pi, torch.tensor([-3.0, -3.0, -3.0]), torch.tensor([-1.0, -3.0, -3.0]),
                                     torch.tensor([-3.0, -3.0, -4.0]), 0.1, "apo_zero")
    assert metrics["rewards/accuracies"].tolist() == [0.0, 1.0, 0.0]    # equal is not better
    assert metrics.keys() == NAMES and not any(v.requires_grad or v.shape != (3,) for v in metrics.values())


def test_an_unknown_loss_type_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="^--loss_type=hinge: apo_zero, apo_down, sigmoid or ipo expected$"):
        sft.preference_loss(*random_logps(), 0.1, "hinge")


# --- other implementations -------------------------------------------------------------------------------------------

def llama(transformers, m, **change):
    """transformers' Llama with the weights of a model that has no NoPE layer."""
    c = m.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{k: getattr(c, k) for k in names}, rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        attn_implementation="eager", bos_token_id=None, **change))
    weights = {f"model.{k}": v for k, v in m.state_dict().items()}
    theirs.load_state_dict(weights | {"lm_head.weight": m.embed_tokens.weight})
    return theirs.float().eval()


def assert_same_gradients(m, theirs, tolerance):
    other = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    for n, p in m.named_parameters():
        assert (p.grad - other[n]).abs().max() < tolerance, n


def test_sft_loss_and_gradients_equal_transformers(config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no second opinion on SFT")
    m = small_model(no_rope_layer_interval=0)
    theirs = llama(transformers, m, pad_token_id=0, eos_token_id=END)
    examples = [rendered(r) for r in normalized(chats())[:8]]
    run = SimpleNamespace(replica=m, cfg=config(micro_batch=2), rt=CPU)
    loss, _ = sft.learn_chats(run, data.chat_batch([[x] for x in examples], 128))
    width = max(len(ids) for ids, _ in examples)
    pad = lambda x, filler: x + [filler] * (width - len(x))
    their_loss = theirs(input_ids=torch.tensor([pad(ids, 0) for ids, _ in examples]),
                        attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in examples]),
                        labels=torch.tensor([pad([i if k else -100 for i, k in zip(*x)], -100) for x in examples])).loss
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_gradients(m, theirs, 1e-5)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    """TRL's DPOTrainer on two random Llamas and a batch that it made -> (trainer, batch, our policy, our reference)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        trl = pytest.importorskip("trl", reason="the package trl is not installed: no second opinion on pairs")
        import datasets.fingerprint, tokenizers, transformers
        # dill and pyarrow in some versions cannot hash a map's arguments
        patch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex))
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>")
        ours = [small_model(seed, no_rope_layer_interval=0, initializer_range=0.2) for seed in (0, 1)]
        special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        theirs = [llama(transformers, m, **special) for m in ours]
        rng = random.Random(0)
        text = lambda: "".join(rng.choice("abcdefgh XYZ0123") for _ in range(rng.randint(1, 12)))
        args = trl.DPOConfig(
            str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            disable_tqdm=True, per_device_train_batch_size=6, beta=0.1, max_length=64)
        rows = [dict(prompt=f"{text()}?", chosen=" " + text(), rejected=" " + text()) for _ in range(6)]
        trainer = trl.DPOTrainer(theirs[0], ref_model=theirs[1], args=args, processing_class=tokenizer,
                                 train_dataset=datasets.Dataset.from_list(rows))
        return trainer, dict(next(iter(trainer.get_train_dataloader()))), *ours


@pytest.mark.filterwarnings("ignore::FutureWarning")       # transformers about what TRL asks of it
@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_on_pairs_has_trls_loss_metrics_and_gradients(dpo, config, loss_type, micro_batch):
    trainer, batch, policy, reference = dpo
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer._metrics["eval"].clear(), trainer.model.zero_grad(), policy.zero_grad()
    theirs = trainer._compute_loss(trainer.model.eval(), dict(batch), False)
    theirs.backward()
    real = [(ids[:n].tolist(), mask[:n].tolist()) for ids, mask, n in
            zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"].sum(1).tolist())]
    examples = [real[i + half] for i in range(6) for half in (0, 6)]    # theirs: first all chosen, then all rejected
    ref = sft.logp_sums(reference, examples, CPU).view(-1, 2)
    cfg = config(stage="apo", batch=6, loss_type=loss_type, beta=0.1, micro_batch=micro_batch)
    run, ours = SimpleNamespace(replica=policy, cfg=cfg, rt=CPU), data.chat_batch([[x] for x in examples], 63)
    loss, metrics = sft.learn_pairs(run, (ours, ref))
    assert float(loss) == pytest.approx(theirs.item(), abs=1e-5, rel=1e-6)
    logged = {k: v[0] for k, v in trainer._metrics["eval"].items()}
    assert metrics == pytest.approx({k: logged[k] for k in NAMES}, abs=1e-4)
    assert_same_gradients(policy, trainer.model, 1e-5 * max(1.0, theirs.item()))


# --- a step of SFT ---------------------------------------------------------------------------------------------------

def noise(reference):
    """So that the policy is not the reference: otherwise mistakes in the rewards are all zero."""
    return reference + 3 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(7))


def first_step(cfg):
    """Loss, gradient norm and metrics of a run's first step, of all replicas together, as main adds them up."""
    run = begin(cfg)
    run.reference = noise(run.reference) if cfg.stage == "apo" else None
    loss, metrics = (sft.learn_pairs if cfg.stage == "apo" else sft.learn_chats)(run, sft.next_batch(run))
    norm = float(train.clip_grad_norm(run.model, 1e9, run.rt))
    loss, *values = (x / run.rt.tp_size for x in infra.all_sum(run.rt, float(loss), *metrics.values()))
    return dict(loss=loss, norm=norm) | dict(zip(metrics, values))


def both_steps(place, out, stage):
    """The first step, alone and over micro-batches of one."""
    return [first_step(settings(place, out, stage=stage, micro_batch=size)) for size in (0, 1)]


@pytest.mark.parametrize("packing", ["bfd", "longest", "max_length"])
def test_one_batch_of_4_equals_2_of_2_and_4_of_1_although_rows_have_unlike_counts(config, packing):
    whole, *parts = (first_step(config(f"{size}", micro_batch=size, packing=packing)) for size in (0, 4, 2, 1))
    assert all(part == pytest.approx(whole, rel=1e-5) for part in parts) and whole["norm"] > 0.1


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_two_replicas_give_the_loss_and_gradient_norm_of_one_process(config, place, tmp_path, stage):
    alone = first_step(config(stage=stage))
    for results in ranks(2, both_steps, place, tmp_path / "two", stage):
        assert all(result == pytest.approx(alone, rel=1e-5, abs=1e-6) for result in results)


def test_loss_and_gradient_norm_are_those_of_the_mean_over_trained_tokens_computed_from_logits(config):
    run = begin(config(micro_batch=2))
    ids, targets, docs = sft.next_batch(run)
    loss, _ = sft.learn_chats(run, (ids, targets, docs))
    norm, m = float(train.clip_grad_norm(run.model, 1e9, CPU)), nano.load_checkpoint(run.cfg.init)[0]
    logits, counted = m(ids, docs), targets != -100
    expected = F.cross_entropy(logits[counted], targets[counted])
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-6)
    assert norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in m.parameters()]).norm()), rel=1e-5)
    means = [F.cross_entropy(logits[b][counted[b]], targets[b][counted[b]]).item() for b in range(4)]
    assert abs(statistics.mean(means) - float(loss)) > 1e-4     # the mean of means would be another number


def test_micro_batches_without_a_trained_token_give_exactly_zero_and_no_nan(config):
    m = small_model()
    run = SimpleNamespace(replica=m, cfg=config(micro_batch=1), rt=CPU)
    ids, targets, docs = data.chat_batch([[rendered(r)] for r in normalized(chats())[:4]], 128)
    nothing, _ = sft.learn_chats(run, (ids, torch.full_like(targets, -100), docs))
    assert float(nothing) == 0.0 and all((p.grad == 0).all() for p in m.parameters())
    masked = targets.clone()
    masked[1] = -100                                    # its neighbours are trained as if it were not there
    results = []
    for rows in ([0, 1, 2, 3], [0, 2, 3]):
        m.zero_grad()
        loss, _ = sft.learn_chats(run, (ids[rows], masked[rows], docs[rows]))
        results.append((float(loss), float(train.clip_grad_norm(m, 1e9, CPU))))
    assert results[0] == pytest.approx(results[1], rel=1e-6) and math.isfinite(sum(results[0])) and results[0][0] > 1


def test_what_is_trained_on_alone_and_packed_with_others_has_the_same_loss_and_gradient_norm(config):
    examples = normalized(chats())[:12]
    spaces = data.pack_best_fit([len(rendered(r)[0]) - 1 for r in examples], 128)
    assert 1 < max(map(len, spaces))
    path = write(Path(config().out).with_suffix(".jsonl"), itertools.islice(chats(), 12))
    packed = first_step(config("packed", data=path, batch=len(spaces)))
    for packing in ("longest", "max_length"):
        assert packed == pytest.approx(first_step(config(packing, data=path, batch=12, packing=packing)), rel=1e-5)


# --- what is trained on ----------------------------------------------------------------------------------------------

def split(batch):
    """The documents in a batch: (inputs, targets) as tuples, padding left out."""
    found = []
    for ids, targets, docs in zip(*batch):
        for d in docs.unique():
            here = docs == d
            if (targets[here] != -100).any():
                found.append((tuple(ids[here].tolist()), tuple(targets[here].tolist())))
    return found


def as_documents(examples):
    return [(tuple(ids[:-1]), tuple(i if k else -100 for i, k in zip(ids[1:], mask[1:]))) for ids, mask in examples]


@pytest.mark.parametrize("change", [{}, dict(packing="longest"), dict(stage="apo")], ids=["packed", "alone", "pairs"])
def test_every_example_is_seen_exactly_once_per_epoch_in_another_order_and_shared_by_replicas(config, change):
    run, pair = begin(config(batch=2, **change)), "stage" in change
    if pair:
        expected = Counter(tuple(data.render(r["prompt"] + r[k], r["mode"], tokenizer=BYTES)[0][:-1])
                           for r in normalized(pairs()) for k in ("chosen", "rejected"))
    else:
        expected = Counter(as_documents([rendered(r) for r in normalized(chats())]))
    n, seen, orders = len(run.examples), [], []
    assert sum(expected.values()) == (36 if pair else 26)
    for step in range(n):                               # two epochs: 2 n rows in steps of 2
        run.consumed = 2 * step
        batch = sft.next_batch(run)
        halves = []
        for rank in range(2):
            own = SimpleNamespace(**vars(run) | dict(rt=SimpleNamespace(**vars(CPU) | dict(dp_rank=rank, dp_size=2))))
            halves.append(sft.next_batch(own))
        if pair:
            assert torch.equal(batch[1], torch.cat([half[1] for half in halves]))       # a reference goes with its pair
            batch, halves = batch[0], [half[0] for half in halves]
        documents = split(batch)
        assert documents == [x for half in halves for x in split(half)]
        seen.extend(ids if pair else (ids, targets) for ids, targets in documents)
    half = len(seen) // 2
    assert Counter(seen[:half]) == Counter(seen[half:]) == expected and seen[:half] != seen[half:]


def test_a_place_in_a_row_is_for_each_token_but_the_last_and_another_seed_has_another_order(config):
    examples = [[([1] * n, [1] * n)] for n in (6, 5, 4)]                                     # of 5, 4 and 3 places
    assert sorted(len(row) for row in sft.pack(examples, config(max_length=12))) == [3]
    orders = []
    for seed in (0, 1):
        run = SimpleNamespace(cfg=config(seed=seed, max_length=8, batch=26), rt=CPU, consumed=0, examples=[[([k, k], [0, 1])] for k in range(26)])
        orders.append(sft.next_batch(run)[0][:, 0].tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == [*range(26)]


def test_epochs_become_steps(config):
    n = len(begin(config("count")).examples)
    assert begin(config("a", steps=0)).cfg.steps == math.ceil(n / 4)
    assert begin(config("b", steps=0, epochs=2.5)).cfg.steps == math.ceil(2.5 * n / 4)
    assert begin(config("c", steps=0, epochs=0.01)).cfg.steps == 1
    assert begin(config("d", steps=0, epochs=3.0, packing="longest")).cfg.steps == math.ceil(3 * 26 / 4)


def test_what_max_length_cuts_and_drops_is_counted_and_printed(config, tmp_path, capsys):
    source = [*chats(), *(dict(prompt=n * "why? ", completion="so") for n in (20, 30))]
    examples, limit = [rendered(row) for row in normalized(source)], 66
    cut = sum(len(ids) > limit for ids, _ in examples)
    assert all((1 in mask[:limit]) == (i < 26) for i, (_, mask) in enumerate(examples)) and 2 < cut < 26
    run = begin(config(data=write(tmp_path / "more.jsonl", source), max_length=limit, packing="longest"))
    table = capsys.readouterr().out
    assert re.search(rf"more +26 +0 .* {cut} cut; dropped 2: no trained token within max_length\n", table)
    assert sorted(ids for ((ids, _),) in run.examples) == sorted(ids[:limit] for ids, _ in examples[:26])


def test_a_first_token_alone_is_none_to_train_for_nothing_predicts_it(config):
    dropped = {}
    assert sft.encode_all([("a:1", dict(text="")), ("a:2", dict(text="x"))], sft.encode_chat, config(val_fraction=0.0), BYTES, dropped) == (
        [[([120, EOS], [1, 1])]], [], 0)
    assert dropped == {"no trained token within max_length": 1}


def test_nothing_left_is_one_line_and_so_is_a_bad_row_with_its_place(config, tmp_path):
    one_line(sft.main, config("a", max_length=20), match="no example has a trained token")
    path = write(tmp_path / "bad.jsonl", [next(chats()), dict(messages=[dict(role="user", content=None)])])
    one_line(sft.main, config("b", data=path), match=r"bad\.jsonl:2: message 0: content None: expected text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text', encoding="utf-8")
    one_line(sft.main, config("c", data=str(tmp_path / "broken.jsonl")), match=r"broken\.jsonl:2: ")
    path = write(tmp_path / "mixed.jsonl", [next(chats()), next(pairs())])
    one_line(sft.main, config("d", data=path), match=r"mixed\.jsonl:2: .*expected chats or texts")
    one_line(sft.main, config("e", data=path, stage="apo"), match=r"mixed\.jsonl:1: .*expected prompt \+ chosen")
    one_line(sft.main, config("f", data="/nowhere/x.jsonl"), match="/nowhere/x.jsonl: nothing found")
    assert not [p for name in "abcdef" for p in nano.checkpoints(tmp_path / name)]


def test_rows_of_every_format_are_kept_held_out_or_counted_as_dropped(config, tmp_path, capsys):
    formats = dict(
        messages=lambda i: dict(messages=data.as_messages(f"q {i}", "user") + data.as_messages(f"a {i}", "assistant")),
        sharegpt=lambda i: dict(conversations=[{"from": who, "value": f"{who} {i}"} for who in ("human", "gpt")]),
        completion=lambda i: dict(prompt=f"q {i}", completion=f"a {i}"),
        alpaca=lambda i: dict(instruction=f"q {i}", input="", output=f"a {i}"),
        gsm8k=lambda i: dict(question=f"q {i}", answer=f"So <<1+{i}={1 + i}>>{1 + i}.\n#### {1 + i}"),
        text=lambda i: dict(text=f"some text, {i}"), empty=lambda i: dict(messages=[]),
        unanswered=lambda i: dict(messages=[dict(role="user", content=f"q {i}")]))
    for name, make in formats.items():
        write(tmp_path / f"{name}.jsonl", map(make, range(200)))
    cfg = config(data=",".join(str(tmp_path / f"{name}.jsonl") for name in formats), val_fraction=0.3, steps=20)
    run = begin(cfg)
    table, shares, total = capsys.readouterr().out, [], 0
    for name in formats:
        kept, held, tokens, trained, share, rest = re.search(
            rf"^{name} +(\d+) +(\d+) +([\d,]+) +([\d,]+) +([\d.]+)%(.*)$", table, re.M).groups()
        dropped = sum(int(n) for n in re.findall(r"dropped (\d+)", rest))
        assert int(kept) + int(held) + dropped == 200 and dropped == 200 * (name in ("empty", "unanswered")), name
        shares.append(float(share))
        assert int(tokens.replace(",", "")) >= int(trained.replace(",", ""))
        total += int(kept)
    assert sum(shares) == pytest.approx(100, abs=0.5) and 0 < len(run.held) < 600
    assert sum(len(row) for row in run.examples) == total
    assert "dropped 200: no messages" in table and "dropped 200: no trained token within max_length" in table
    run.locked.close()
    result = sft.main(cfg)
    assert result["step"] == 20 and math.isfinite(result["val_loss"]) and result["skipped"] == 0


def test_a_text_is_trained_whole_with_its_end(config):
    (example,), expected = sft.encode_chat(dict(text="Aé"), config(), BYTES), [*"Aé".encode(), EOS]
    assert example == (expected, [1] * 4)


def test_held_out_are_all_answers_to_a_question_and_their_loss_is_the_mean_over_their_tokens(config, tmp_path):
    both = [dict(row, mode=mode) for row in chats() for mode in ("think", "no_think")]
    run = begin(config(data=write(tmp_path / "both.jsonl", both), val_fraction=0.4, packing="longest"))
    question = lambda ids: re.search(r"word \d+\?", BYTES.decode(ids))[0]
    trained, held = ([question(x[0]) for e in part for x in e] for part in (run.examples, run.held))
    assert not set(trained) & set(held) and len(trained) + len(held) == 52 and 4 <= len(held) <= 48
    assert all(n == 2 for n in Counter(trained + held).values())
    logps = [logp_by_hand(run.model, ids, mask) for ((ids, mask),) in run.held]
    assert sft.validate(run)["val_loss"] == pytest.approx(-float(torch.cat(logps).mean()), abs=1e-5)


def test_loss_on_all_trains_prompts_and_the_template_is_the_models_unless_one_is_named(config, tmp_path):
    checkpoint(tmp_path / "mid", train_config=dict(style="chatml"))
    row = normalized(chats())[1]
    for change, style in ((dict(init=str(tmp_path / "mid")), "chatml"), ({}, "compact"),
                          (dict(init=str(tmp_path / "mid"), style="compact"), "compact")):
        run = begin(config(style, overwrite=True, packing="longest", loss_on="all", **change))
        assert run.cfg.style == style and ([rendered(row, style=style, loss_on="all")] in run.examples)
    assert all(all(mask) for ((_, mask),) in run.examples)


def test_training_starts_from_the_checkpoint_and_the_rate_rises_and_falls_to_a_tenth(config):
    cfg = config(steps=20, warmup=0.2, lr=3e-3)
    result = sft.main(cfg)
    rates, losses = [row["lr"] for row in steps(cfg)], [row["loss"] for row in steps(cfg)]
    assert rates[:4] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3]) and rates[4] == 3e-3
    assert rates[4:] == sorted(rates[4:], reverse=True) and 3e-4 < rates[-1] < 3.5e-4
    assert losses[-1] < losses[0] - 0.3 and result["step"] == 20 and math.isnan(result["loss"]) is False
    saved = nano.read_checkpoint(cfg.out)
    assert saved["stage"] == "sft" and saved["consumed_samples"] == 80 and saved["train_config"]["style"] == "compact"


# --- pairs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style, mode", [
    ("compact", "think"), ("compact", "no_think"), ("smollm3", "no_think"), ("chatml", "think")])
def test_shared_history_is_not_trained_and_the_whole_answer_is(config, style, mode):
    history = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello you"), ("user", "And?")]
    prompt, answers = [dict(role=r, content=c) for r, c in history], ("same start, good", "same start, bad!")
    row = dict(zip(("chosen", "rejected"), (data.as_messages(a, "assistant") for a in answers)))
    assert sum(data.render(prompt, mode, style, tokenizer=BYTES)[1]) == len("Hello you") + 1    # as a chat it would be
    row |= dict(prompt=prompt, mode=mode)
    pair = sft.encode_pair(row, config(stage="apo", style=style, max_length=4000), BYTES)
    for (ids, mask), answer in zip(pair, answers, strict=True):
        assert [i for i, k in zip(ids, mask) if k] == [*answer.encode(), END]
        assert BYTES.decode(ids).count("Hello you") == 1 and len(ids) == len(mask)


def test_an_answer_of_several_turns_is_trained_where_the_assistant_speaks(config):
    turns = [dict(role=r, content=c) for r, c in (("assistant", "one"), ("user", "go on"), ("assistant", "two"))]
    row = dict(prompt=data.as_messages("Hi", "user"), chosen=turns, rejected=turns[:1], mode="no_think")
    (ids, mask), _ = sft.encode_pair(row, config(stage="apo", style="compact"), BYTES)
    assert [i for i, k in zip(ids, mask) if k] == [*b"one", END, *b"two", END]


def test_pairs_that_teach_nothing_are_dropped_and_counted(config, tmp_path, capsys):
    same = dict(prompt="q", chosen="yes", rejected="yes")
    thoughts = dict(prompt="q", chosen="<think>a</think>yes", rejected="<think>b</think>yes", mode="no_think")
    run = begin(config(stage="apo", data=write(tmp_path / "more.jsonl", [*pairs(), same, thoughts]), steps=1))
    assert len(run.examples) == 18
    assert sum(int(n) for n in re.findall(r"dropped (\d+): chosen and rejected", capsys.readouterr().out)) == 2


def test_pairs_whose_prompt_fills_max_length_are_dropped_and_counted(config, capsys):
    shared = [len(data.render(r["prompt"], r["mode"], add_generation_prompt=True, tokenizer=BYTES)[0])
              for r in normalized(pairs())]
    limit = sorted(shared)[9]
    dropped = sum(n >= limit for n in shared)
    assert 0 < dropped < 18
    run = begin(config(stage="apo", max_length=limit))
    assert len(run.examples) == 18 - dropped
    assert f"dropped {dropped}: a prompt of max_length or more tokens" in capsys.readouterr().out
    assert all(any(mask[1:]) and len(ids) <= limit for pair in run.examples for ids, mask in pair)


def test_micro_batches_of_pairs_give_the_loss_the_norm_and_the_metrics_of_all_at_once(config):
    whole, *parts = (first_step(config(f"{size}", stage="apo", micro_batch=size)) for size in (0, 4, 2, 1))
    assert all(part == pytest.approx(whole, rel=1e-5, abs=1e-6) for part in parts)
    assert NAMES < whole.keys() and abs(whole["rewards/margins"]) > 0.01 and whole["norm"] > 0.01


@pytest.mark.parametrize("kind", ["apo", "lora apo"])
@pytest.mark.parametrize("loss_type", ["apo_zero", "sigmoid"])
def test_at_the_first_step_the_rewards_are_exactly_zero(config, kind, loss_type):
    cfg = config(steps=1, loss_type=loss_type, micro_batch=2, val_fraction=0.2, **KINDS[kind])
    before = sft.main(cfg)["before"]
    (row,) = steps(cfg)
    assert {row[f"rewards/{k}"] for k in ("chosen", "rejected", "margins", "accuracies")} == {0.0}
    assert row["loss"] == pytest.approx(dict(apo_zero=1.0, sigmoid=math.log(2))[loss_type], abs=1e-6)
    assert before["val_rewards/margins"] == 0.0 and before["val_loss"] == pytest.approx(row["loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["apo", "lora apo"])
def test_the_reference_is_the_model_at_the_start_and_stays_so_during_training_and_after_a_resume(config, kind):
    cfg = config(steps=8, val_fraction=0.2, **KINDS[kind])
    base = nano.load_checkpoint(cfg.init)[0]
    stopped_run(cfg, 4)
    first = nano.read_checkpoint(cfg.out, fold=False)["monitor"]["reference"]
    _, run = session(resumed(cfg))
    last = nano.read_checkpoint(cfg.out, fold=False)["monitor"]["reference"]
    by_hand = [[float(logp_by_hand(base, ids, mask).sum()) for ids, mask in pair] for pair in run.examples + run.held]
    assert torch.equal(first, last) and torch.allclose(first, torch.tensor(by_hand), atol=1e-4)
    assert torch.equal(torch.cat([run.reference, run.held_reference]), first) and len(run.held) > 0
    assert rows(cfg)[-1]["rewards/margins" if "rewards/margins" in rows(cfg)[-1] else "val_rewards/margins"] != 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_training_on_pairs_raises_the_margin_also_on_held_out_ones(config, loss_type):
    cfg = config(stage="apo", steps=25, lr=3e-3, loss_type=loss_type, val_fraction=0.2, grad_clip=1.0)
    result, last = sft.main(cfg), steps(cfg)[-1]
    assert last["rewards/margins"] > 0.05 and last["rewards/accuracies"] == 1.0 and last["loss"] < steps(cfg)[0]["loss"]
    assert result["val_rewards/margins"] > 0.02 and result["val_loss"] < result["before"]["val_loss"]
    if loss_type == "apo_zero":
        assert last["rewards/chosen"] > 0 > last["rewards/rejected"]


def test_a_larger_beta_stays_closer_to_the_reference(config):
    """The playbook's prose has it the other way round."""
    moved = {}
    for beta in (0.1, 5.0):
        cfg = config(f"{beta}", stage="apo", steps=40, lr=3e-3, beta=beta, grad_clip=1.0)
        sft.main(cfg)
        moved[beta] = statistics.mean(row["rewards/margins"] / beta for row in steps(cfg)[-4:])
    assert 0 < moved[5.0] < 0.7 * moved[0.1]


# --- pairs from the model itself -------------------------------------------------------------------------------------

def scripted(script):
    """In place of model.generate: script(prompt, number of the answer) -> its text; "…" ends one that is cut off."""
    def generate(model, prompts, max_new_tokens, temperature=1.0, stop_ids=(), seed=0):
        result = []
        for prompt, (_, number) in zip(prompts, seed):
            text = script(BYTES.decode(prompt), number)
            result.append((BYTES.encode(text.rstrip("…")) + [END] * (not text.endswith("…")), None))
        return result
    return generate


PROBLEMS = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in ((7, 8), (1, 2), (3, 3), (4, 4), (5, 5))]
SAID = [["I say\n15", "14", "I have to say\n15", "15"],        # the shortest right one over a wrong one
        ["3", " 3", "we have\n3", "so 1+2=\n3"],                # over a right one that is much longer
        ["so it is\n6", "so it is\n6.", "so it is\n 6", "it is so\n6"],   # nothing to choose from
        ["9", "10", "11", "12"],                                # no right one
        ["10", "no idea…", "1000…", "10"]]                      # what is cut off is no answer


@pytest.fixture
def talk(monkeypatch):
    """Models now say SAID, whatever they are; the list tells for which prompts they were asked to."""
    asked = []

    def script(prompt, number):
        asked.append(prompt)
        return SAID[next(i for i, p in enumerate(PROBLEMS) if p["prompt"] in prompt)][number % 4]
    monkeypatch.setattr(nano, "generate", scripted(script))
    return asked


def test_pairs_of_the_model_itself_are_right_over_wrong_or_longer_and_a_resume_uses_the_same(config, tmp_path, talk):
    cfg = config(stage="apo", data=write(tmp_path / "problems.jsonl", PROBLEMS), steps=4, batch=2)
    stopped_run(cfg, 2)
    path = Path(cfg.out) / "pairs.jsonl"
    before, found = path.read_bytes(), [json.loads(line) for line in path.read_text().splitlines()]
    told = [(p["mode"], *(p[k][0]["content"] for k in ("prompt", "chosen", "rejected"))) for p in found]
    assert told == [(mode, *rest) for mode in ("think", "no_think")
                    for rest in (("7+8=", "15", "14"), ("1+2=", "3", "so 1+2=\n3"))]
    assert len(talk) == 2 * 4 * len(PROBLEMS)
    talk.clear()
    _, run = session(resumed(cfg))
    assert not talk and path.read_bytes() == before and len(run.examples) == 4
    trained = {BYTES.decode([i for i, k in zip(*x) if k]) for pair in run.examples for x in pair}
    assert trained == {f"{text}<|im_end|>" for text in ("15", "14", "3", "so 1+2=\n3")}
    other = dataclasses.replace(cfg, out=str(tmp_path / "undisturbed"))
    sft.main(other)
    assert_same_state(cfg.out, other.out)


def test_a_right_answer_is_too_long_from_one_and_a_half_times_the_shortest_on(config, tmp_path, monkeypatch):
    cfg = config(stage="apo", data=write(tmp_path / "problems.jsonl", PROBLEMS[:1]))
    for lengths, expected in (((10, 14), []), ((10, 15), [("10", "15")]), ((20, 14, 10, 15), [("10", "20")])):
        made = [dict(text=str(n), tokens=n, finished=True, right=True) for n in lengths]
        monkeypatch.setattr(sft, "answers", lambda *_, **__: [made])
        found = sft.self_pairs(None, BYTES, cfg, CPU)
        assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in found] == 2 * expected    # in two modes


def test_two_replicas_make_the_pairs_together_and_one_writes_them(config, tmp_path, talk):
    alone, two = (config(name, stage="apo", data=write(tmp_path / "problems.jsonl", PROBLEMS), steps=2, batch=2)
                  for name in ("alone", "two"))
    ranks(1, rank_session, alone), ranks(2, rank_session, two)
    assert (Path(alone.out) / "pairs.jsonl").read_bytes() == (Path(two.out) / "pairs.jsonl").read_bytes() != b""
    assert_alike(alone, two)


def test_without_data_the_pairs_are_sampled_on_fresh_sums_or_the_demonstrated_ones(config, monkeypatch):
    monkeypatch.setattr(sft, "SUMS", 5), monkeypatch.setattr(sft, "SELF", 3), monkeypatch.setattr(sft, "PROBLEMS", 2)
    total = lambda prompt: sum(map(int, re.findall(r"(\d+)\+(\d+)=", prompt)[-1]))
    monkeypatch.setattr(nano, "generate", scripted(lambda prompt, number: str(total(prompt) + number % 2)))
    cfg = config("self", stage="apo", data="", steps=1)
    sft.main(cfg)
    found = [json.loads(line) for line in (Path(cfg.out) / "pairs.jsonl").read_text().splitlines()]
    assert {pair["prompt"][0]["content"] for pair in found} == {
        f"{a}+{b}=" for a, b in data.sums(8)[5:]}       # neither those of SFT nor held-out ones
    pairs_made = data.sum_pairs(5)
    monkeypatch.setattr(data, "sum_pairs", lambda n: pairs_made)
    run = begin(config("sums", stage="apo", data="", pairs="sums", steps=1))
    assert len(run.examples) == 5 and not (Path(run.cfg.out) / "pairs.jsonl").exists()
    assert len(run.tasks) == 2


# --- LoRA ------------------------------------------------------------------------------------------------------------

TARGETS = sft.Config.lora_targets.split(",")
IDS = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(3))


def adapted(config, **change):
    m = small_model()
    sft.add_lora(m, config(**dict(lora_rank=4) | change), CPU)
    return m


def shake(m, seed=5):
    """Adapters that do something."""
    draw = torch.Generator().manual_seed(seed)
    for n, p in m.named_parameters():
        if n.endswith("lora_B"):
            p.data.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return m


def test_at_the_start_the_output_is_that_of_the_base_to_the_bit_also_with_dropout(config):
    base, m = small_model(), adapted(config, lora_dropout=0.5)
    assert sum(isinstance(x, sft.LoRALinear) for x in m.modules()) == 7 * 2
    for mode in (True, False):
        assert torch.equal(m.train(mode)(IDS), base(IDS))
    assert not torch.equal(shake(m).eval()(IDS), base(IDS))


def test_an_adapter_adds_alpha_over_rank_times_b_a_and_drops_inputs_only_in_training(config):
    m = shake(adapted(config, lora_alpha=6.0, lora_dropout=0.5)).eval()
    layer, x = m.layers[0].mlp.up_proj, torch.randn(5, 32)
    added = 6 / 4 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), x @ layer.weight.T + added, atol=1e-6)
    assert layer.lora_A.shape == (4, 32) and layer.lora_B.shape == (48, 4)
    assert 0.9 * 32**-0.5 < layer.lora_A.abs().max() <= 32**-0.5             # as PEFT draws it
    several = torch.stack([layer.train()(x) for _ in range(400)])
    assert not torch.equal(several[0], several[1])
    assert (several.mean(0) - layer.eval()(x)).abs().mean() < 0.1 * added.abs().mean()


def test_adapters_drop_nothing_where_answers_are_compared_with_a_reference_that_has_none(config):
    for stage, dropout in (("sft", 0.5), ("apo", 0.0)):
        assert {x.dropout for x in adapted(config, stage=stage, lora_dropout=0.5).modules() if isinstance(x, sft.LoRALinear)} == {dropout}


def test_only_adapters_learn_and_their_checkpoint_holds_nothing_else_and_is_small(config, place):
    cfg, base = config(lora_rank=2), nano.load_checkpoint(place / "base")[0].state_dict()
    _, run = session(cfg)
    after = run.model.state_dict()
    assert all(torch.equal(after[n], base[n]) for n in base)
    assert all(p.requires_grad == ("lora" in n) for n, p in run.model.named_parameters())
    file = nano.read_checkpoint(cfg.out, fold=False)
    expected = {n for n in after if "lora_" in n}
    assert file["model"].keys() == expected == file["optimizer"].keys() and len(expected) == 2 * 7 * 2
    assert all(file["model"][n].abs().max() > 0 for n in expected)
    whole, small = ((place / "base/ckpt_00000000.pt").stat().st_size, nano.checkpoints(cfg.out)[0].stat().st_size)
    assert small < whole, "although the optimizer's state is in it too"
    assert sum(p.numel() for p in file["model"].values()) == sum(
        2 * sum(base[n].shape) for n in base if n.rpartition("_proj")[1])


def test_a_checkpoint_of_adapters_loads_as_the_model_that_was_trained(config):
    cfg = config(lora_rank=4, lora_dropout=0.3, grad_clip=1.0)
    _, run = session(cfg)
    loaded, extra = nano.load_checkpoint(cfg.out)
    with torch.no_grad():
        trained, base = run.model.eval()(IDS), nano.load_checkpoint(cfg.init)[0](IDS)
        assert (loaded(IDS) - trained).abs().max() < 1e-5 and (base - trained).abs().max() > 1e-2
    assert extra["lora"]["base"].endswith("ckpt_00000000.pt") and not Path(extra["lora"]["base"]).is_absolute()


def test_targets_choose_the_matrices_and_unknown_ones_are_one_line(config):
    m = adapted(config, lora_targets="q_proj, v_proj")
    names = {n.rpartition(".")[2] for n, x in m.named_modules() if isinstance(x, sft.LoRALinear)}
    assert names == {"q_proj", "v_proj"}
    one_line(sft.main, config(lora_rank=2, lora_targets="q_proj,queries"),
             match=f"--lora_targets=q_proj,queries: no queries: some of {','.join(sorted(TARGETS))} expected")
    one_line(sft.main, config("empty", lora_rank=2, lora_targets=""), match="--lora_targets=: ")


def test_merge_writes_a_whole_model_that_computes_the_same_and_needs_no_base(config, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "own")
    cfg = config(lora_rank=4, merge=True, grad_clip=1.0, init=str(tmp_path / "own"))
    plain = dataclasses.replace(cfg, merge=False, out=str(tmp_path / "plain"))
    sft.main(cfg), sft.main(plain)
    apart = nano.load_checkpoint(plain.out)[0]
    shutil.rmtree(tmp_path / "own")
    merged, extra = nano.load_checkpoint(cfg.out)
    with torch.no_grad():
        assert (merged(IDS) - apart(IDS)).abs().max() < 1e-5
    assert not extra["lora"] and merged.state_dict().keys() == small_model().state_dict().keys() and extra["step"] == 6


def test_adapters_that_were_trained_to_the_end_can_be_merged_later(config):
    cfg = config(lora_rank=4, grad_clip=1.0)
    sft.main(cfg)
    apart = nano.load_checkpoint(cfg.out)[0]
    sft.main(resumed(cfg, merge=True))
    merged, extra = nano.load_checkpoint(cfg.out)
    assert not extra["lora"] and (merged(IDS) - apart(IDS)).abs().max() < 1e-5


def test_adapters_find_their_base_when_both_move_together_and_say_when_it_is_gone_or_another(config, place, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(place / "base", tree / "base")
    cfg = config("tree/run", lora_rank=2, init=str(tree / "base"))
    sft.main(cfg)
    before = nano.load_checkpoint(cfg.out)[0](IDS)
    shutil.move(tree, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert torch.equal(nano.load_checkpoint(moved / "run")[0](IDS), before)
    (moved / "base").rename(moved / "gone")
    one_line(nano.load_checkpoint, moved / "run", match="base/ckpt_00000000.pt")
    checkpoint(moved / "base", seed=1)                  # another model under the same name
    one_line(nano.load_checkpoint, moved / "run", match="base/ckpt_0{8}.pt: not the file that the adapters in .*run")


def test_adapters_do_not_overwrite_their_own_base(config, tmp_path):
    path = checkpoint(tmp_path / "run")
    cfg = config("run", lora_rank=2, init=str(tmp_path / "run"), overwrite=True)
    one_line(sft.main, cfg, match="--out")
    assert path.exists() and nano.load_checkpoint(cfg.out)


def test_adapters_on_adapters_load_as_trained(config):
    one = config("one", lora_rank=2, steps=3, grad_clip=1.0)
    sft.main(one)
    two = config("two", lora_rank=3, steps=3, grad_clip=1.0, init=one.out, stage="apo")
    _, run = session(two)
    with torch.no_grad():
        assert (nano.load_checkpoint(two.out)[0](IDS) - run.model.eval()(IDS)).abs().max() < 1e-5


def test_adapters_need_a_checkpoint_and_a_resume_the_same_kind_of_run(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one_line(sft.main, config("none", init="", lora_rank=2), match="--lora_rank: a checkpoint to adapt expected")
    whole, adapters = config("whole"), config("adapters", lora_rank=2)
    stopped_run(whole, 2), stopped_run(adapters, 2)
    one_line(sft.main, resumed(whole, lora_rank=2), match="--resume: .*whole has lora_rank=0: the same expected")
    one_line(sft.main, resumed(adapters, lora_rank=0), match="--resume: .*adapters has lora_rank=2: the same expected")
    merged = config("merged", lora_rank=2, merge=True)
    sft.main(merged)
    one_line(sft.main, resumed(merged, steps=9), match="--resume: .*merged holds a whole model: --init=.*merged and another")


@pytest.mark.parametrize("change", [
    dict(lora_rank=4), dict(lora_targets="q_proj"), dict(lora_targets="q_proj,v_proj,o_proj"),
    dict(lora_alpha=8.0)], ids=str)
def test_a_resume_with_adapters_of_another_kind_is_refused_in_one_line(config, change):
    cfg = config(lora_rank=2, lora_targets="q_proj,v_proj")
    stopped_run(cfg, 2)
    one_line(sft.main, resumed(cfg, **change), match=f"--resume: .*run has {next(iter(change))}=")
    Path(cfg.out, "config.json").unlink()               # the checkpoint knows them too
    one_line(sft.main, resumed(cfg, **change), match="--resume: .*run has other --lora_rank, --lora_alpha, --lora_targets")


def test_a_resume_onto_another_base_is_refused(config, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "own")
    cfg = config(lora_rank=2, init=str(tmp_path / "own"))
    stopped_run(cfg, 2)
    checkpoint(tmp_path / "own", seed=1)
    one_line(sft.main, resumed(cfg), match="not the file that the adapters")


# --- layouts ---------------------------------------------------------------------------------------------------------

def rank_session(cfg):
    """sft.main(cfg) on a rank -> its rows, and what it holds at the end."""
    torch.Tensor.bfloat16 = lambda x: x                 # Newton-Schulz in float32, so that layouts can be compared
    result, run = session(cfg)
    return SimpleNamespace(result=result, weights={n: p.detach().clone() for n, p in run.model.named_parameters()},
                           complaints=train.check_ranks(run.model, run.rt, run.step))


def assert_alike(one, other, tolerance=1e-4):
    """Two runs went the same way: steps and final weights."""
    for a, b in zip(steps(one), steps(other), strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=1e-3, abs=1e-4)
    a, b = (nano.load_checkpoint(cfg.out)[0].state_dict() for cfg in (one, other))
    assert all((a[n] - b[n]).abs().max() < tolerance for n in a)
    return a


@pytest.mark.parametrize("kind", ["sft", "apo", "lora"])
def test_two_replicas_stay_bit_identical_and_end_where_one_process_does(config, kind):
    change = dict(val_fraction=0.2, lora_dropout=0.0, micro_batch=1) | KINDS[kind]
    alone, two = config("alone", **change), config("two", **change)
    ranks(1, rank_session, alone)
    first, second = ranks(2, rank_session, two)
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)
    assert_alike(alone, two)
    assert first.result["val_loss"] == second.result["val_loss"] == pytest.approx(rows(alone)[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["sft", "lora", "lora apo"])
def test_a_run_goes_on_in_two_tensor_parallel_halves_as_in_one_process(config, tmp_path, kind):
    change = dict(val_fraction=0.2, lora_dropout=0.0) | KINDS[kind]
    alone, halves = config("alone", **change), config("halves", tp=2, **change)
    ranks(1, stopped_run, alone, 2)
    shutil.copytree(alone.out, halves.out)
    ranks(1, rank_session, resumed(alone))
    results = ranks(2, rank_session, resumed(halves))
    assert_alike(alone, halves)
    assert not results[0].complaints
    assert results[0].result["val_loss"] == pytest.approx(rows(alone)[-1]["val_loss"], rel=1e-4)


def test_adapters_that_start_in_two_halves_are_cut_or_shared_and_loaded_whole(config):
    cfg = config(tp=2, lora_rank=4, steps=3, lora_dropout=0.3, merge=False, grad_clip=1.0)
    first, second = ranks(2, rank_session, cfg)
    whole = nano.read_checkpoint(cfg.out, fold=False)["model"]
    for n, full in whole.items():
        a, b = first.weights[n], second.weights[n]
        row_parallel = "o_proj" in n or "down_proj" in n
        cut = None if n.endswith("A") != row_parallel else 1 if row_parallel else 0
        assert torch.equal(full, a if cut is None else torch.cat([a, b], cut)), n
        assert torch.equal(a, b) == (cut is None), n
    assert not first.complaints


def merged_rank(cfg):
    """The adapters of a finished run, folded by two ranks."""
    return sft.main(resumed(cfg, merge=True))["step"]


def test_two_halves_fold_their_adapters_into_the_model_that_one_process_loads(config):
    cfg = config(tp=2, lora_rank=4, steps=3, grad_clip=1.0)
    ranks(2, rank_session, cfg)
    apart = nano.load_checkpoint(cfg.out)[0](IDS)
    assert ranks(2, merged_rank, cfg) == [3, 3]
    merged, extra = nano.load_checkpoint(cfg.out)
    assert not extra["lora"] and (merged(IDS) - apart).abs().max() < 1e-5


# --- stop and resume -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_ends_with_the_bits_and_the_rows_of_an_undisturbed_one(config, kind):
    """Adapters drop inputs at random, and half-trained ones are no reference: both must not show."""
    change = dict(steps=8, val_fraction=0.2, eval_every=3, lora_dropout=0.3, micro_batch=2) | KINDS[kind]
    cfg, undisturbed = config("stopped", **change), config("undisturbed", **change)
    sft.main(undisturbed)
    stopped_run(cfg, 3)
    sft.main(resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)
    told = [row for row in untimed(undisturbed) if row["step"] != 3 or "grad_norm" in row]  # it did not evaluate there
    assert [row for row in untimed(cfg)] == told and told[-1]["final"]


def test_a_run_that_torchrun_starts_again_goes_on_by_itself_whatever_the_data_have_filled_in(config, monkeypatch):
    """The command says neither steps nor template nor date; the run's config.json does."""
    change = dict(steps=0, epochs=2.0, style="", date="")
    cfg, undisturbed = config("restarted", **change), config("undisturbed", **change)
    sft.main(undisturbed), stopped_run(cfg, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    sft.main(cfg)
    assert_same_state(cfg.out, undisturbed.out)


def test_evaluating_and_saving_more_often_changes_nothing(config):
    seldom, often = (config(name, lora_rank=4, lora_dropout=0.3, val_fraction=0.2, eval_every=every, save_every=every)
                     for name, every in (("seldom", 1000), ("often", 1)))
    sft.main(seldom), sft.main(often)
    assert_same_state(seldom.out, often.out)
    assert [len([row for row in rows(cfg) if "val_loss" in row]) for cfg in (seldom, often)] == [2, 7]


def rank_stop(cfg, step):
    """A signal to rank 1 only."""
    torch.Tensor.bfloat16 = lambda x: x
    if os.environ["RANK"] == "1":
        original = train.lr_at
        train.lr_at = lambda at, cfg: (at == step - 1 and signal.raise_signal(signal.SIGTERM)) or original(at, cfg)
    return sft.main(cfg)


def test_a_signal_to_one_of_two_replicas_stops_both_and_the_run_goes_on_bit_for_bit(config):
    change = dict(lora_rank=4, lora_dropout=0.3, packing="longest")
    cfg, undisturbed = config("stopped", **change), config("undisturbed", **change)
    ranks(2, rank_session, undisturbed)
    first, _ = ranks(2, rank_stop, cfg, 3)
    assert first["step"] == 3 and first["stopped"]
    ranks(2, rank_session, resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)


@pytest.mark.parametrize("change", [dict(steps=3), dict(steps=0, epochs=0.5)], ids=str)
@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_the_same_run_again_is_refused_and_overwrite_repeats_it(config, stage, change):
    """It is known as this very run, which torchrun --max_restarts needs to go on with it."""
    cfg = config(stage=stage, **change)
    last = sft.main(cfg)["step"]
    files = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    one_line(sft.main, dataclasses.replace(cfg, beta=0.5), match=r"another run \(other .*beta")
    one_line(sft.main, cfg, match=f"this very run, up to step {last}: --resume goes on with it, --overwrite deletes it")
    assert {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()} == files
    before = {n: p.clone() for n, p in nano.read_checkpoint(cfg.out)["model"].items()}
    sft.main(dataclasses.replace(cfg, overwrite=True))
    again = nano.read_checkpoint(cfg.out)["model"]
    assert all(torch.equal(before[n], again[n]) for n in before)


def test_the_recorded_configuration_starts_the_same_run_and_never_overwrites(config):
    cfg = config(steps=2, overwrite=True)
    sft.main(cfg)
    recorded = infra.cli(sft.Config, sft.PRESETS, [f"--config={cfg.out}/config.json"])
    one_line(sft.main, recorded, match="this very run")
    other = dataclasses.replace(recorded, out=f"{cfg.out}-again")
    sft.main(other)
    assert_same_state(cfg.out, other.out)


@pytest.mark.parametrize("change", ["fewer", "reordered"])
def test_a_resume_with_other_pairs_is_refused_in_one_line(config, tmp_path, change):
    """The reference belongs to the pairs, one by one."""
    cfg, all_of_them = config(stage="apo"), list(pairs())
    stopped_run(cfg, 2)
    path = write(tmp_path / "others.jsonl", all_of_them[:10] if change == "fewer" else all_of_them[::-1])
    one_line(sft.main, resumed(cfg, data=path), match="--resume|--data")


def test_a_resume_on_another_day_goes_on_with_the_date_that_the_chats_had(config, monkeypatch):
    days = iter(["24 November 2026", *["25 November 2026"] * 9])
    cfg = config(style="smollm3", max_length=600, steps=4)
    undisturbed = dataclasses.replace(cfg, out=cfg.out + "-undisturbed", date="24 November 2026")
    sft.main(undisturbed)
    monkeypatch.setattr(sft.time, "strftime", lambda form, *_: next(days))
    stopped_run(cfg, 2), sft.main(resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(config):
    cfg = config(stage="apo", steps=3, val_fraction=0.2)
    result = sft.main(cfg)
    before = {n: p.clone() for n, p in nano.read_checkpoint(cfg.out)["model"].items()}
    again = sft.main(resumed(cfg))
    after = nano.read_checkpoint(cfg.out)["model"]
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert again["val_loss"] == result["val_loss"] and again["before"] == result["before"] and again["step"] == 3


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_ten_in_a_row_end_the_run(config, monkeypatch, capsys):
    original, bad = sft.learn_chats, {3}

    def learn(run, batch):
        loss, metrics = original(run, batch)
        return (loss * math.nan if run.step + 1 in bad else loss), metrics
    monkeypatch.setattr(sft, "learn_chats", learn)
    cfg = config("once")
    result = sft.main(cfg)
    assert result["skipped"] == 1 and "SKIPPED step 3: " in capsys.readouterr().out and math.isfinite(result["loss"])
    assert all(p.isfinite().all() for p in nano.read_checkpoint(cfg.out)["model"].values())
    bad |= set(range(100))
    one_line(sft.main, config("always", steps=20), match="step 10: 10 steps in a row")


# --- evaluation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, right", [
    ("1005", True), ("<think>\n7+8=15\n</think>\n1005", True), ("<think>\n1005\n</think>\n1004", False),
    ("#### 1005", True), ("so it is #### 1005", True), ("1005 #### 3", False), ("#### 1005\n7", False),
    ("1,005", True), ("$1,005.", True), ("$ 1005", True), ("1005.0", False), ("-1005", False), ("10 05", False),
    ("7+8=15\n1005\n\n", True), ("1005\nor so", False), ("The answer is 1005", False), ("1004", False),
    ("", False), ("\n", False), ("</think>", False), ("1005</think>", False), ("1005</think>1</think>1005", True),
    ("1000+5", False), ("__import__('os')", False)])
def test_right_is_the_last_line_after_the_last_thought(text, right):
    assert sft.is_right(text, "1005") is right


def test_what_stands_in_a_thought_that_never_ends_is_no_answer():
    assert not sft.is_right("<think>\n998+7\n1005", "1005")


def test_answers_are_compared_in_one_form():
    assert sft.is_right("1005", "$1,005.") and sft.is_right("Paris", " Paris ") and not sft.is_right("paris", "Paris")
    forms = {"1,000,000": "1000000", "3,4": "3,4", "1,23": "1,23", " $5.$ ": "5", ".5": ".5", "5. ": "5"}
    assert {text: data.clean_answer(text) for text in forms} == forms


def test_mean_and_standard_error():
    assert sft.mean_stderr([1, 0, 1, 1]) == (0.75, pytest.approx(0.25))        # stdev of the sample, 0.5, by the root of 4
    assert sft.mean_stderr([3.0])[0] == 3.0 and math.isnan(sft.mean_stderr([3.0])[1])


TASKS = [dict(prompt=[dict(role="user", content=p["prompt"])], answer=p["answer"]) for p in PROBLEMS]


def ask(cfg, samples, temperature, batch=128):
    """-> (the answers, how many of them this rank wrote)."""
    rt, wrote, generate = infra.setup(cfg), [], nano.generate
    watched = lambda model, prompts, *a, **k: wrote.extend(prompts) or generate(model, prompts, *a, **k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "generate", watched)
        return sft.answers(small_model(), BYTES, TASKS, "think", cfg, rt, samples, temperature, batch), len(wrote)


def test_answers_are_given_without_dropout_and_training_goes_on_with_it(config):
    m, cfg = shake(adapted(config, lora_dropout=0.5)), dataclasses.replace(config(max_new_tokens=12), style="compact")
    one, other = (sft.answers(m.train(mode), BYTES, TASKS, "think", cfg, CPU) for mode in (True, False))
    assert one == other and not m.training
    sft.answers(m.train(), BYTES, TASKS[:1], "think", cfg, CPU)
    assert m.training


@pytest.mark.parametrize("samples", [1, 4])
def test_one_answer_is_greedy_and_several_are_sampled_at_temperature_1(config, monkeypatch, samples):
    asked = []

    def answers(model, tokenizer, tasks, mode, cfg, rt, samples, temperature):
        asked.append((mode, samples, temperature))
        return [[dict(text="", tokens=1, finished=True, right=False)] * samples for _ in tasks]
    monkeypatch.setattr(sft, "answers", answers)
    sft.evaluate_tasks(small_model(), BYTES, TASKS, config(), CPU, samples)
    assert asked == [(mode, samples, float(samples > 1)) for mode in ("think", "no_think")]


@pytest.mark.parametrize("loss_type", ["sft", "ipo"])
def test_the_held_out_loss_counts_the_tokens_that_are_predicted_and_trained(config, loss_type):
    m, texts = shake(adapted(config, lora_dropout=0.5)).eval(), [[*b"abcdef"], [*b"ghi"], [*b"jk"], [*b"lmnopqr"]]
    held = [[(ids, [1] * len(ids))] for ids in texts]
    if loss_type == "ipo":
        held = [[(ids, [0, 0] + [1] * (len(ids) - 2)) for ids in ([*b"abcdef"], [*b"abx"])], [([*b"jkl"], [0, 1, 1]), ([*b"jmnopqr"], [0] + [1] * 6)]]
    sums = torch.tensor([float(logp_by_hand(m, *x).sum()) for each in held for x in each])
    run = SimpleNamespace(cfg=config(stage="apo" if loss_type == "ipo" else "sft", loss_type="ipo", beta=0.5), rt=CPU, model=m.train(), held=held, tasks=[],
                          held_reference=torch.zeros(2, 2), step=0, log=SimpleNamespace(say=print))
    if loss_type == "ipo":                              # 4 and 1 tokens, 2 and 6
        expected = ((sums[0] / 4 - sums[1] / 1 - 1) ** 2 + (sums[2] / 2 - sums[3] / 6 - 1) ** 2) / 2
    else:
        expected = -sums.sum() / (5 + 2 + 1 + 6)
    assert sft.validate(run)["val_loss"] == pytest.approx(float(expected), rel=1e-4) and m.training      # without dropout, but for a moment


@pytest.mark.parametrize("samples, temperature", [(1, 0.0), (3, 1.0)])
def test_answers_are_the_same_on_one_rank_and_two_and_in_batches_of_any_size(config, samples, temperature):
    cfg = dataclasses.replace(config(max_new_tokens=12), style="compact")
    alone, n = ask(cfg, samples, temperature)
    assert len(alone) == 5 and all(len(each) == samples for each in alone) and n == 5 * samples
    assert ask(cfg, samples, temperature) == ask(cfg, samples, temperature, batch=2) == (alone, n)
    assert ranks(2, ask, cfg, samples, temperature) == [(alone, -(-n // 2)), (alone, n // 2)]
    assert len({a["text"] for each in alone for a in each}) > 1
    assert (ask(dataclasses.replace(cfg, seed=1), samples, temperature)[0] == alone) == (temperature == 0)


def test_an_answer_counts_its_end_and_one_that_is_cut_off_is_not_right(config, talk):
    cfg, m = dataclasses.replace(config(), style="compact"), small_model()
    ((first, cut, _, _),) = sft.answers(m, BYTES, TASKS[4:], "no_think", cfg, CPU, samples=4)
    assert first == dict(text="10", tokens=3, finished=True, right=True)
    assert cut == dict(text="no idea", tokens=7, finished=False, right=False)
    assert talk[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n") and m.training
    talk.clear()
    assert not sft.answers(m, BYTES, [dict(TASKS[4], answer="1000")], "think", cfg, CPU, samples=4)[0][2]["right"]
    assert talk[0].endswith("<|im_start|>assistant\n")


def test_accuracy_is_the_mean_over_samples_and_pass_at_k_asks_for_one(config, talk):
    cfg = dataclasses.replace(config(), style="compact")
    items, given = sft.evaluate_tasks(small_model(), BYTES, TASKS, cfg, CPU, samples=4)
    for mode in ("think", "no_think"):
        assert items[f"{mode} accuracy"] == [0.75, 1.0, 1.0, 0.0, 0.5] and items[f"{mode} pass@4"] == [1, 1, 1, 0, 1]
        assert sum(items[f"{mode} cut off"]) == 0.5 and len(items[f"{mode} cut off"]) == 5      # by problem: its answers are alike
        lengths = [len(text.rstrip("…")) + (not text.endswith("…")) for said in SAID for text in said]
        assert items[f"{mode} tokens"] == [sum(lengths[i:i + 4]) / 4 for i in range(0, 20, 4)]
    assert [a["text"] for a in given["think"][0]] == SAID[0]
    items, _ = sft.evaluate_tasks(small_model(), BYTES, TASKS[3:], cfg, CPU)
    assert items["think accuracy"] == [0.0, 0.0] and "think pass@1" not in items


def test_multiple_choice_takes_the_likelier_text_per_character(config, monkeypatch):
    seen = []

    def logp_sums(model, rows, rt):
        seen.extend(rows)
        return torch.tensor([-4.0, -10.0, -6.0, -3.0, -4.0])     # per character -2, -1, -3 and -3, -2
    monkeypatch.setattr(sft, "logp_sums", logp_sums)
    tasks = [dict(prompt=data.as_messages("Which?", "user"), choices=["ab", "ten signs_", "cd"], answer=1),
             dict(prompt=data.as_messages("And?", "user"), choices=["é", "yy"], answer=0)]       # é: one character, two tokens
    items, _ = sft.evaluate_tasks(small_model(), BYTES, tasks, config(), CPU)
    assert items == {"multiple choice": [1.0, 0.0]}
    assert BYTES.decode(seen[1][0]) == "Question: Which?\nAnswer: ten signs_"
    assert [BYTES.decode([i for i, k in zip(*row) if k]) for row in seen] == [" ab", " ten signs_", " cd", " é", " yy"]


def test_bits_per_byte_and_choices_equal_a_computation_by_hand(config):
    m, texts = small_model(), ["Ünïcode, a text", "b"]
    question = dict(prompt=data.as_messages("q", "user"), choices=["no", "yes!"])
    tasks = [dict(text=t) for t in texts] + [question | dict(answer=k) for k in (0, 1)]
    items, _ = sft.evaluate_tasks(m, BYTES, tasks, config(), CPU)
    by_hand = []
    for text in texts:
        ids = [EOS, *text.encode()]
        by_hand.append(-float(logp_by_hand(m, ids, [1] * len(ids)).sum()) / math.log(2) / len(text.encode()))
    assert items["bits per byte"] == pytest.approx(by_hand, abs=1e-5)
    prompt, scores = [*b"Question: q\nAnswer:"], []
    for choice in ("no", "yes!"):
        ids = prompt + [*f" {choice}".encode()]
        scores.append(float(logp_by_hand(m, ids, [i >= len(prompt) for i in range(len(ids))]).sum()) / len(choice))
    best = scores.index(max(scores))
    assert items["multiple choice"] == [float(best == 0), float(best == 1)]


def test_a_text_longer_than_the_models_rows_is_read_in_windows_each_token_once(config):
    m, text = small_model(max_position_embeddings=16), "Something much longer than sixteen bytes, with 3 windows."
    ids, logps = [EOS, *text.encode()], []
    for start in range(0, len(ids) - 1, 16):            # a window's first token was the last target of the one before
        part = ids[start:start + 17]
        logps.append(logp_by_hand(m, part, [1] * len(part)))
    assert list(map(len, logps)) == [16, 16, 16, len(text) - 48]
    items, _ = sft.evaluate_tasks(m, BYTES, [dict(text=text), dict(text="short")], config(), CPU)
    bits = -float(torch.cat(logps).sum()) / math.log(2)
    assert items["bits per byte"][0] == pytest.approx(bits / len(text), abs=1e-5)
    alone, _ = sft.evaluate_tasks(m, BYTES, [dict(text="short")], config(), CPU)
    assert items["bits per byte"][1] == pytest.approx(alone["bits per byte"][0], abs=1e-5)


def test_sums_of_log_probs_do_not_depend_on_neighbours_or_on_how_many_go_at_once():
    m, examples = small_model(), [rendered(r) for r in normalized(chats())]
    expected = [float(logp_by_hand(m, *x).sum()) for x in examples]
    for places in (16384, 300, 1):
        assert sft.logp_sums(m, examples, CPU, places).tolist() == pytest.approx(expected, abs=1e-3)


def test_evaluation_compares_two_models_writes_their_answers_and_their_scores(place, config, tmp_path, capsys):
    checkpoint(tmp_path / "other", seed=1)
    texts = [dict(text=f"text {i} and more") for i in range(6)]
    tasks = [*PROBLEMS, *texts, dict(question="?", choices=["a", "b"], answer="B")]
    cfg = config("eval", stage="eval", data="", against=str(place / "base"), init=str(tmp_path / "other"),
                 tasks=write(tmp_path / "tasks.jsonl", tasks))
    result, table = sft.main(cfg), capsys.readouterr().out
    assert list(result) == ["base", "other"]
    assert json.loads((Path(cfg.out) / "scores.json").read_text()) == infra.finite(result)
    bpb = [[-float(logp_by_hand(nano.load_checkpoint(d)[0], ids, [1] * len(ids)).sum()) / math.log(2) / (len(ids) - 1)
            for ids in ([EOS, *t["text"].encode()] for t in texts)] for d in (cfg.against, cfg.init)]
    difference = [b - a for a, b in zip(*bpb)]
    numbers = [(statistics.mean(x), statistics.stdev(x) / 6**0.5) for x in (*bpb, difference)]
    line = next(line for line in table.splitlines() if line.startswith("bits per byte"))
    printed = [float(x) for x in re.findall(r"-?\d+\.\d+", line)]
    assert printed == pytest.approx([x for pair in numbers for x in pair], abs=6e-4)
    assert re.match(r"bits per byte +6 ", line) and "difference" in table and re.search(r"\(median \d+, \d+\)", table)
    expected = dict(zip(("mean", "stderr"), numbers[1]), items=6)
    assert result["other"]["bits per byte"] == pytest.approx(expected, abs=1e-5)
    assert result["base"]["multiple choice"]["items"] == 1 and math.isnan(result["base"]["multiple choice"]["stderr"])
    for name in ("base", "other"):
        lines = [json.loads(line) for line in (Path(cfg.out) / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert [(x["mode"], x["prompt"][0]["content"]) for x in lines] == [
            (mode, p["prompt"]) for mode in ("think", "no_think") for p in PROBLEMS]
        assert all(x["answers"][0].keys() == {"text", "tokens", "finished", "right"} and x["answer"] for x in lines)
        assert result[name]["think accuracy"]["mean"] == statistics.mean(x["answers"][0]["right"] for x in lines[:5])


def test_evaluation_tells_two_directories_of_the_same_name_apart_and_samples_when_asked(config, tmp_path):
    for seed, folder in enumerate(("a/run", "b/run")):
        checkpoint(tmp_path / folder, seed)
    cfg = config("eval", stage="eval", data="", against=str(tmp_path / "a/run"), init=str(tmp_path / "b/run"),
                 samples=2, tasks=write(tmp_path / "tasks.jsonl", PROBLEMS[:2]), max_new_tokens=4)
    result = sft.main(cfg)
    assert len(result) == 2 and "run" in result and str(tmp_path / "b/run") in result
    assert result["run"]["think pass@2"]["items"] == 2 and result["run"]["think tokens"]["items"] == 2
    assert len(list(Path(cfg.out).glob("*.jsonl"))) == 2


def test_evaluation_gives_the_same_on_two_ranks(config, tmp_path, place):
    tasks = write(tmp_path / "tasks.jsonl", [*PROBLEMS, dict(text="some text"), dict(text="more of it")])
    one, two = (config(name, stage="eval", data="", tasks=tasks) for name in ("one", "two"))
    alone = sft.main(one)
    for result in ranks(2, sft.main, two):
        for score, numbers in alone["base"].items():
            assert result["base"][score] == pytest.approx(numbers, abs=1e-5), score


def test_a_runs_own_evaluation_has_the_scores_of_the_tasks_before_on_the_way_and_after(config, tmp_path, talk, capsys):
    cfg = config(tasks=write(tmp_path / "tasks.jsonl", PROBLEMS), eval_every=3)
    result = sft.main(cfg)
    scores = [row["scores"] for row in rows(cfg) if "scores" in row]
    assert len(scores) == 3 and result["scores"] == scores[-1] and result["before"]["scores"] == scores[0]
    lengths = [len(SAID[i][i % 4]) + 1 for i in range(5)]
    assert scores[0]["think accuracy"] == 4 / 5 and scores[0]["no_think tokens (median)"] == statistics.median(lengths)
    assert scores[0]["think tokens"] == pytest.approx(statistics.mean(lengths)) != statistics.median(lengths)
    out = capsys.readouterr().out
    assert "5 held-out problems" in out and re.search(r"think accuracy +0\.800 +0\.800", out)


# --- merging ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def three(tmp_path):
    """Checkpoints a, b and c of one shape."""
    for seed, (name, style) in enumerate(dict(a="chatml", b="smollm3", c="compact").items()):
        checkpoint(tmp_path / name, seed, step=10 * seed + 10, train_config=dict(style=style))
    return tmp_path


def merging(folder, models, **change):
    """models: (name, weight) each, or what --models gets."""
    models = models if isinstance(models, str) else ",".join(f"{folder / name}:{weight}" for name, weight in models)
    return sft.Config(**dict(stage="merge", models=models, out=str(folder / "merged"), device="cpu") | change)


def test_merging_is_the_weighted_sum_of_all_parameters(three, capsys):
    sft.main(merging(three, [("a", 0.9), ("b", 0.1)]))
    merged, extra = nano.load_checkpoint(three / "merged")
    a, b = weights(three / "a"), weights(three / "b")
    for n, p in merged.state_dict().items():
        assert torch.equal(p, 0.9 * a[n] + 0.1 * b[n]), n
    assert "0.9 x " in capsys.readouterr().out
    assert extra["stage"] == extra["train_config"]["stage"] == "merge" and extra["train_config"]["style"] == "chatml"
    assert not extra["optimizer"] and extra["tokenizer"] == "bytes" and extra["step"] == 10      # of the first one


def test_merging_with_weight_one_copies_and_three_models_and_extrapolation_work(three):
    sft.main(merging(three, [("a", 1.0), ("b", 0.0)], out=str(three / "copy")))
    sft.main(merging(three, [("a", 0.5), ("b", 0.25), ("c", 0.25)], out=str(three / "three")))
    sft.main(merging(three, [("a", 1.5), ("b", -0.5)], out=str(three / "beyond")))
    a, b, c, copied, mixed, beyond = (weights(three / name) for name in ("a", "b", "c", "copy", "three", "beyond"))
    for n in a:
        assert torch.equal(copied[n], a[n]) and torch.allclose(beyond[n], 1.5 * a[n] - 0.5 * b[n], atol=1e-6)
        assert torch.allclose(mixed[n], 0.5 * a[n] + 0.25 * b[n] + 0.25 * c[n], atol=1e-6)


def test_what_cannot_be_merged_is_one_line(three):
    checkpoint(three / "wide", num_hidden_layers=1), checkpoint(three / "gpt2", tokenizer="gpt2")
    for models, message in (
            ([("a", 0.9), ("b", 0.101)], "weights that add up to 1 expected"), ([("a", "x")], "DIR:WEIGHT,DIR:WEIGHT"),
            ([("a", "nan")], "weights that add up to 1 expected"),
            ([("a", 0.5), ("wide", 0.5)], "wide: another shape or tokenizer than .*a$"),
            ([("a", 0.5), ("gpt2", 0.5)], "gpt2: another shape or tokenizer"),
            ([("a", 0.5), ("nowhere", 0.5)], "nowhere: no checkpoint")):
        one_line(sft.main, merging(three, models), match=message)
    for spec in ("", str(three / "a"), f"{three / 'a'}:1,"):
        one_line(sft.main, merging(three, spec), match="--models=.*: DIR:WEIGHT,DIR:WEIGHT,... expected")
    assert not nano.checkpoints(three / "merged")


def test_merging_into_a_run_is_refused_and_overwrite_replaces_it(three):
    before = nano.checkpoints(three / "c")[0].read_bytes()
    cfg = merging(three, [("a", 0.5), ("b", 0.5)], out=str(three / "c"))
    one_line(sft.main, cfg, match="c: holds a checkpoint: --overwrite")
    assert nano.checkpoints(three / "c")[0].read_bytes() == before
    checkpoint(three / "c", 4, step=40)                 # now two that are newer than what is merged
    sft.main(dataclasses.replace(cfg, overwrite=True))
    (path,) = nano.checkpoints(three / "c")
    a, b, c = (weights(three / name) for name in "abc")
    assert all(torch.allclose(c[n], (a[n] + b[n]) / 2, atol=1e-7) for n in a)


def test_merging_folds_adapters(config, tmp_path):
    cfg = config("lora", lora_rank=4, grad_clip=1.0)
    sft.main(cfg)
    sft.main(merging(tmp_path, f"{cfg.out}:0.25,{cfg.init}:0.75"))
    a, b, c = weights(cfg.out), weights(cfg.init), weights(tmp_path / "merged")
    assert all(torch.allclose(c[n], 0.25 * a[n] + 0.75 * b[n], atol=1e-6) for n in a)
    assert any((a[n] != c[n]).any() for n in a)


# --- main without anything -------------------------------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An empty directory, and so few sums that main() is quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "SUMS", 40), monkeypatch.setattr(sft, "PROBLEMS", 3), monkeypatch.setattr(sft, "SELF", 2)
    default = {f.name: f.default for f in dataclasses.fields(nano.Config)} | dict(SHAPE, max_position_embeddings=256)
    monkeypatch.setattr(nano.Config, "__init__", lambda self, **change: vars(self).update(default | change))
    pairs_made = data.sum_pairs(6)
    monkeypatch.setattr(data, "sum_pairs", lambda n: pairs_made)


def test_without_a_checkpoint_it_starts_from_a_random_model_and_says_so_loudly(tiny, capsys):
    quick = dict(steps=2, batch=2, max_new_tokens=6, device="cpu", dtype="float32")
    result, out = sft.main(sft.Config(**quick)), capsys.readouterr().out
    assert "!!! no checkpoint in out/base: starting from a small model that knows nothing" in out
    assert {"think accuracy", "no_think accuracy", "think tokens (median)"} <= result["scores"].keys()
    assert re.search(r"3 held-out problems +before +after\n", out) and "wrote out/sft" in out
    assert "/think" in out and "/no_think" in out and nano.read_checkpoint("out/sft")["stage"] == "sft"
    sft.main(sft.Config(stage="apo", pairs="sums", **quick))                # finds out/sft
    assert "!!!" not in capsys.readouterr().out and nano.read_checkpoint("out/apo")["stage"] == "apo"
    evaluated = sft.main(sft.Config(stage="eval", against="out/sft", **quick))
    assert list(evaluated) == ["sft", "apo"] and evaluated["apo"]["think accuracy"]["items"] == 3
    assert Path("out/eval/scores.json").exists() and Path("out/eval/apo.jsonl").exists()
    sft.main(sft.Config(stage="merge", models="out/apo:0.9,out/sft:0.1", device="cpu"))
    assert nano.read_checkpoint("out/merge")["stage"] == "merge"


def test_a_run_from_a_random_model_is_resumed_as_any_other(tiny, capsys):
    cfg = sft.Config(steps=4, batch=2, max_new_tokens=6, device="cpu", dtype="float32", out="out/stopped")
    stopped_run(cfg, 2)
    capsys.readouterr()
    sft.main(resumed(cfg))
    assert "!!!" not in capsys.readouterr().out
    sft.main(dataclasses.replace(cfg, out="out/undisturbed"))
    assert_same_state("out/stopped", "out/undisturbed")


def test_a_named_checkpoint_that_is_not_there_is_one_line(tiny, config):
    for stage in ("sft", "apo", "eval"):
        one_line(sft.main, sft.Config(stage=stage, init="nowhere", pairs="sums"), match="nowhere: no checkpoint")
    one_line(sft.main, sft.Config(stage="eval"), match="out/apo: no checkpoint")


def test_a_model_that_makes_no_pairs_of_its_own_is_told_so(tiny, capsys):
    """What is missing there is a right answer, not a shorter example."""
    one_line(sft.main, sft.Config(stage="apo", steps=1, max_new_tokens=4, device="cpu"), match="pairs")


# --- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(stage="dpo"), "--stage=dpo: sft, apo, eval or merge expected"),
    (dict(style="llama"), "--style=llama: compact, smollm3 or chatml expected"),
    (dict(loss_on="user"), "--loss_on=user: assistant or all"), (dict(packing="ffd"), "--packing=ffd: bfd, longest"),
    (dict(loss_type="hinge"), "--loss_type=hinge: apo_zero, apo_down, sigmoid or ipo expected"),
    (dict(pairs="mine"), "--pairs=mine: self or sums"), (dict(optimizer="sgd"), "--optimizer=sgd: muon or adamw"),
    (dict(log_every=0), "at least 1"), (dict(eval_every=0), "at least 1"), (dict(save_every=-1), "at least 1"),
    (dict(max_length=0), "--max_length"), (dict(samples=0), "--samples"), (dict(max_new_tokens=0), "--max_new_tokens"),
    (dict(steps=-1), "--steps or --epochs"), (dict(steps=0, epochs=0.0), "--steps or --epochs: more than 0"),
    (dict(lr=-1.0), "--lr.*more than 0"), (dict(grad_clip=0.0), "grad_clip"), (dict(beta=0.0), "--beta=0.0: more than 0"),
    (dict(warmup=1.5), "--warmup.*0 to 1"), (dict(warmup=-0.1), "--warmup"),
    (dict(val_fraction=-0.1), "--val_fraction"), (dict(val_fraction=1.0), "--val_fraction=1.0: 0 to 1"),
    (dict(lora_rank=-1), "--lora_rank: 0 or more"),
    (dict(lora_rank=2, lora_dropout=1.0), "--lora_dropout: 0 to 1"), (dict(merge=True), "--merge: --lora_rank"),
    (dict(micro_batch=3), "--micro_batch=3: a divisor of each process's 4 rows"), (dict(batch=-4), "--batch=-4"),
    (dict(micro_batch=8), "--micro_batch=8"), (dict(micro_batch=-1), "--micro_batch=-1"),
    (dict(resume=True, overwrite=True), "--resume and --overwrite: one of them expected"),
    (dict(tasks="/nowhere/x.jsonl"), "/nowhere/x.jsonl"), (dict(init="/nowhere"), "/nowhere: no checkpoint"),
    (dict(seed=-1), "--seed=-1"), (dict(dtype="float16"), "--dtype=float16"), (dict(device="x"), "--device=x"),
    (dict(stage="eval", data="", samples=0), "--samples"), (dict(stage="eval", data="", style="x"), "--style=x"),
    (dict(stage="eval", data="", max_new_tokens=0), "--max_new_tokens"),
    (dict(stage="eval", data="", tasks="/nowhere/x.jsonl"), "/nowhere/x.jsonl")], ids=str)
def test_bad_settings_end_with_one_line(config, change, message):
    cfg = config(**change)
    one_line(sft.main, cfg, match=message)
    assert not nano.checkpoints(cfg.out)


def test_tasks_that_are_none_are_one_line(config, tmp_path):
    path = write(tmp_path / "none.jsonl", chats())
    for change in ({}, dict(stage="eval", data="")):
        one_line(sft.main, config(tasks=path, **change), match=r"--tasks=.*problems \(prompt \+ answer\)")


def test_a_batch_that_replicas_cannot_share_and_a_merge_on_two_processes_are_one_line(config):
    two = SimpleNamespace(**vars(CPU) | dict(world_size=2, dp_size=2))
    one_line(sft.check, config(batch=3), two, match="--batch=3: a multiple of the 2 replicas")
    one_line(sft.check, config(batch=8, micro_batch=3), two, match="--micro_batch=3: a divisor of each process's 4 rows")
    one_line(sft.check, config(stage="merge"), two, match="--stage=merge: one process expected")


def test_defaults_follow_the_stage():
    for stage, batch, lr in (("sft", 16, 2e-3), ("apo", 32, 1e-4)):
        cfg = sft.check(sft.Config(stage=stage), CPU)
        assert (cfg.batch, cfg.lr, cfg.out) == (batch, lr, f"out/{stage}")
        cfg = sft.check(sft.Config(stage=stage, batch=8, lr=1.0, out="x", date="today"), CPU)
        assert (cfg.batch, cfg.lr, cfg.out, cfg.date) == (8, 1.0, "x", "today")
    assert sft.check(sft.Config(stage="eval"), CPU).init == "out/apo"
    assert sft.check(sft.Config(stage="merge"), CPU).out == "out/merge"


def test_held_out_sums_are_asked_for_unless_a_run_has_data_of_its_own(monkeypatch):
    monkeypatch.setattr(sft, "PROBLEMS", 7)
    asked = [len(sft.load_tasks(sft.Config(**change))) for change in ({}, dict(data="x"), dict(data="x", stage="eval"))]
    assert asked == [7, 0, 7] and sft.load_tasks(sft.Config()) == data.sum_problems(7)


SMOLLM3 = dict(optimizer="adamw", packing="bfd", grad_clip=0.2, lora_rank=0, loss_on="assistant", loss_type="apo_zero")


@pytest.mark.parametrize("name, recipe", [      # alignment-handbook 925acdf, recipes/smollm3: sft/mid, sft/sft, dpo/apo
    ("mid", dict(stage="sft", lr=2e-5, epochs=5, batch=128, max_length=2**15, warmup=0.03, style="chatml",
                 loss_on="all")),
    ("sft", dict(stage="sft", lr=2e-5, epochs=5, batch=128, max_length=2**16, warmup=0.03, style="smollm3")),
    ("apo", dict(stage="apo", lr=1e-6, epochs=1, batch=32, max_length=24576, warmup=0.1, beta=0.05))])
def test_presets_are_smollm3s_recipes(name, recipe):
    cfg = sft.check(infra.cli(sft.Config, sft.PRESETS, [name]), CPU)
    assert {k: getattr(cfg, k) for k in SMOLLM3 | recipe} == SMOLLM3 | recipe
    assert cfg.schedule == "cosine" and cfg.weight_decay == 0.0


def test_presets_have_no_other_names():
    assert sft.PRESETS.keys() == {"mid", "sft", "apo"}


def test_models_with_rows_of_unlike_length_merge_into_one_with_the_longest(tmp_path):
    checkpoint(tmp_path / "a", 0, max_position_embeddings=512), checkpoint(tmp_path / "b", 1, max_position_embeddings=128)
    sft.main(merging(tmp_path, [("b", 0.5), ("a", 0.5)]))
    assert nano.load_checkpoint(tmp_path / "merged")[0].config.max_position_embeddings == 512


def test_adapters_on_a_file_of_ours_keep_its_weights_in_float32(config, place):
    [file] = (place / "base").glob("*.pt")
    sft.main(config(init=str(file), lora_rank=2, lr=1e-30, merge=True, steps=1, dtype="bfloat16"))
    a, b = weights(config().out), weights(place / "base")
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_tokens_are_the_places_of_the_batches_and_go_on_counting_after_a_resume(config):
    cfg = config(stage="apo")
    whole, seen, original = config("whole", stage="apo"), [], sft.next_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "next_batch", lambda run: seen.append(original(run)) or seen[-1])
        sft.main(whole)
    places = [batch[0].numel() for batch, _ in seen]
    assert [row["tokens"] for row in steps(whole)] == [sum(places[:i + 1]) for i in range(6)]
    stopped_run(cfg, 3)
    sft.main(resumed(cfg))
    assert [row["tokens"] for row in steps(cfg)] == [row["tokens"] for row in steps(whole)]


def test_rows_without_a_question_or_a_text_do_not_end_in_a_stack_trace(config, tmp_path):
    system = [dict(role="system", content="Start.")]
    rows = [dict(prompt=system, chosen=[dict(role="assistant", content="Hello!")], rejected=[dict(role="assistant", content="Go")])] * 4
    sft.main(config(stage="apo", data=write(tmp_path / "p.jsonl", rows), steps=1))
    items, _ = sft.evaluate_tasks(small_model(), BYTES, [dict(text=""), dict(text="words")], config(), CPU)
    assert len(items["bits per byte"]) == 1


def test_an_overwriting_run_that_cannot_begin_keeps_the_old_runs_pairs(config, monkeypatch):
    made = [dict(prompt=[dict(role="user", content="1+1=")], chosen=[dict(role="assistant", content="2")],
                 rejected=[dict(role="assistant", content="3")], mode="no_think")] * 4
    monkeypatch.setattr(sft, "self_pairs", lambda *_: made)
    cfg = config(stage="apo", data="", tasks="", steps=2)
    monkeypatch.setattr(sft, "load_tasks", lambda cfg: [])
    sft.main(cfg)
    before = (Path(cfg.out) / "pairs.jsonl").read_bytes()
    made[0]["chosen"] = [dict(role="assistant", content="4")]
    one_line(sft.main, dataclasses.replace(cfg, overwrite=True, max_length=4), match="no example has a trained token")
    assert (Path(cfg.out) / "pairs.jsonl").read_bytes() == before
    sft.main(resumed(cfg, steps=3))


def test_the_length_of_answers_in_evaluations_may_change_on_the_way(config):
    cfg = config()
    stopped_run(cfg, 2)
    sft.main(resumed(cfg, max_new_tokens=4))
    one_line(sft.main, resumed(cfg, max_length=64), match="--resume: .* has max_length=128: the same expected")
