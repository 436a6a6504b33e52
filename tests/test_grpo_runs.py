"""grpo.py: whole runs. Rewards, stop and resume, replicas and halves, evaluation, distillation, what is refused and what said.

Most tests are for a pitfall that some project fell into: a reference that drifts or is another one after a resume, groups that
replicas tear apart, NaN of masked or unscored answers, samples that repeat, steps counted by rollouts.
"""
import contextlib, dataclasses, gc, io, json, math, os, re, shutil, signal, statistics, time, zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo   # otherwise every forked rank imports it anew, for seconds, as soon as it makes an optimizer

import data, grpo, infra, model as nano, sft, train
from models import random_model
from processes import run as ranks
from runs import TIMING, assert_same_state, one_line, resumed, rows, steps, stopped_run, untimed, weights, write

BYTES = data.get_tokenizer("bytes")
END = BYTES.special["<|im_end|>"]
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, no_rope_layer_interval=2, max_position_embeddings=128, initializer_range=0.1)
KINDS = {"plain": {}, "twice": dict(num_iterations=2), "beta": dict(beta=0.1, optimizer="adamw"),
         "teacher": dict(teacher="other", num_generations=1, prompts=3), "masked": dict(mask_truncated_completions=True)}
PROBLEMS = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in ((7, 8), (1, 2), (3, 3), (40, 4), (5, 5), (6, 9), (2, 11))]
REWARDS = '''
def letter(prompt, completion, answer):
    return completion.count("a") / max(1, len(completion))

def broken(prompt, completion, answer):
    return 1 / 0

def silent(prompt, completion, answer):
    return None

def choosy(prompt, completion, answer):
    return completion.count("a") if len(completion) > 4 else None

def variety(prompt, completion, answer):
    return len(set(completion))

def same(prompt, completion, answer):
    return 1.0

accuracy = format = overlong = same
'''


# --- what the tests share --------------------------------------------------------------------------------------------

def small_model(seed=0, **change):
    return random_model(seed, **SHAPE | change)


def school(m, steps=25):
    """Now its answers are a few letters, most of them, and end now before ten tokens and now not."""
    said = ["".join("abcde"[(i * 5 + j * j) % 5] for j in range(1 + i % 11)) for i in range(22)]
    chats = [[dict(role="user", content=f"{i}+{7 * i % 10}="), dict(role="assistant", content=text)]
             for i, text in enumerate(said)]
    examples = [data.render(chat, ("think", "no_think")[i % 2], tokenizer=BYTES) for i, chat in enumerate(chats)]
    ids, targets, _ = data.chat_batch([[x] for x in examples], max(len(ids) for ids, _ in examples))
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for _ in range(steps):
        (m(ids, None, targets)[0] / (targets != -100).sum()).backward()
        optimizer.step(), optimizer.zero_grad()
    return m


def checkpoint(folder, model=None, step=0, tokenizer="bytes", train_config=None):
    folder.mkdir(parents=True, exist_ok=True)
    return nano.save_checkpoint(folder, model or small_model(), step, tokenizer=tokenizer, train_config=train_config)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """base/, which runs start from, other/, another model, problems, held-out ones and rewards."""
    root = tmp_path_factory.mktemp("grpo")
    checkpoint(root / "base", school(small_model())), checkpoint(root / "other", school(small_model(1)))
    write(root / "problems.jsonl", PROBLEMS)
    write(root / "tasks.jsonl", [dict(prompt=f"{i}+{i}=", answer=str(2 * i)) for i in (21, 22, 23)])
    (root / "rewards.py").write_text(REWARDS, encoding="utf-8")
    gc.collect(), gc.freeze()                           # forked ranks need not look at this process's objects
    return root


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(grpo, "SAMPLES", 3)


def settings(place, out, **change):
    """4 steps of 2 problems x 4 answers, rewarded for the letter a and for being brief."""
    return grpo.Config(**dict(
        beta=0.0,
        init=str(place / "base"), out=str(out), problems=str(place / "problems.jsonl"), tasks=str(place / "tasks.jsonl"),
        rewards=f"{place}/rewards.py:letter", overlong_max=9, overlong_cache=4, prompts=2, num_generations=4, max_new_tokens=10,
        steps=4, micro_batch=3, lr=1e-2, log_every=1, eval_every=1000, save_every=1000, device="cpu", dtype="float32") | change)


@pytest.fixture
def config(place, tmp_path):
    """config(name, **changes): that run in a directory of this test's own."""
    return lambda name="run", **change: settings(place, tmp_path / name, **change)


def kind_of(kind, place):
    change = KINDS[kind]
    return change | dict(teacher=str(place / change["teacher"])) if "teacher" in change else change


def rewarded(place, *names):
    return ",".join(f"{place}/rewards.py:{name}" for name in names)


def session(cfg):
    """grpo.main(cfg) -> (what it returned, the run that it trained, the answers of all replicas in each rollout)."""
    begun, made, begin, rollout = [], [], grpo.begin, grpo.rollout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "begin", lambda *a: begun.append(begin(*a)) or begun[0])
        patch.setattr(grpo, "rollout", lambda run: made.append(rollout(run)) or made[-1])
        return grpo.main(cfg), begun[0], [samples for _, _, samples in made]


def assert_alike(one, other, tolerance=2e-4):
    """Two runs went the same way: answers, steps and final weights."""
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() - TIMING:
            assert b[k] == pytest.approx(a[k], rel=2e-3, abs=2e-4), (k, a["step"])
    a, b = weights(one.out), weights(other.out)
    assert all((a[n] - b[n]).abs().max() < tolerance for n in a)


def same_weights(one, other):
    a, b = (weights(x) if isinstance(x, str | Path) else x for x in (one, other))
    return all(torch.equal(a[n], b[n]) for n in a)


def scripted(script):
    """In place of model.generate: script(prompt, seed) -> its text; "…" ends one that is cut off."""
    def generate(model, prompts, max_new_tokens, temperature=1.0, stop_ids=(), seed=0, compile=False):
        result = []
        for prompt, own in zip(prompts, seed):
            text = script(BYTES.decode(prompt), own, temperature)
            ids = BYTES.encode(text.rstrip("…")) + [END] * (not text.endswith("…"))
            result.append((ids, [0.0] * len(ids)))
        return result
    return generate


# --- a run learns ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_run_makes_likelier_what_it_rewards(config, loss_type, optimizer):
    cfg = config(loss_type=loss_type, optimizer=optimizer, prompts=4, num_generations=6, steps=16, overlong_max=0,
                 micro_batch=8)
    result = grpo.main(cfg)
    told = [row["reward"] for row in steps(cfg)]
    assert statistics.mean(told[-4:]) > statistics.mean(told[:3]) + 0.15
    assert result["step"] == 16 and result["skipped"] == 0 and math.isfinite(result["loss"])


def test_the_length_penalty_alone_makes_answers_shorter(config):
    cfg = config(rewards="", prompts=4, num_generations=6, steps=12, micro_batch=0)
    grpo.main(cfg)
    lengths = [row["completions/mean_length"] for row in steps(cfg)]
    assert statistics.mean(lengths[-3:]) < statistics.mean(lengths[:3]) - 1
    assert steps(cfg)[-1]["completions/clipped_ratio"] < steps(cfg)[0]["completions/clipped_ratio"]


def test_the_rate_rises_and_falls_to_a_tenth_by_optimizer_steps(config):
    for n in (1, 2):
        cfg = config(f"{n}", steps=10, warmup=0.2, lr=1e-3, num_iterations=n)
        grpo.main(cfg)
        rates = [row["lr"] for row in steps(cfg)]
        assert rates == [train.lr_at(step, cfg) for step in range(n - 1, 10, n)] and 1e-4 < rates[-1] < 2e-4
    assert rates[0] == 1e-3


# --- what is sampled -------------------------------------------------------------------------------------------------

def test_every_problem_comes_once_per_epoch_in_another_order_and_no_two_answers_share_their_luck(config, monkeypatch):
    seeds, generate = [], nano.generate

    def watched(*args, seed, **kwargs):
        seeds.extend(seed)
        return generate(*args, seed=seed, **kwargs)
    monkeypatch.setattr(nano, "generate", watched)
    _, run, made = session(config(steps=7, num_generations=2))
    asked = [s["prompt"] for samples in made for s in samples]
    assert asked[::2] == asked[1::2]                    # the answers to a problem stand side by side
    first, second = asked[:14:2], asked[14::2]
    assert sorted(first) == sorted(second) == sorted(p["prompt"] for p in PROBLEMS) and first != second
    evaluated = [s for s in seeds if len(s) == 2]
    rollouts = [s for s in seeds if len(s) != 2]
    assert len(set(rollouts)) == len(rollouts) == 28 and set(evaluated) == {(0, j) for j in range(9)}
    seeds.clear()
    grpo.main(config("other", steps=7, num_generations=2, seed=1))
    assert len(set(seeds) - set(rollouts) - set(evaluated)) == 28 + 9


def test_problems_are_put_in_the_mode_and_the_template_of_the_run(config, tmp_path, monkeypatch):
    seen = []

    def script(prompt, seed, temperature):
        seen.append((len(seed), temperature, prompt))
        return "15"
    monkeypatch.setattr(nano, "generate", scripted(script))
    checkpoint(tmp_path / "mid", train_config=dict(style="chatml"))
    empty = "<think>\n\n</think>\n"
    for name, change, end in (("a", dict(mode="no_think"), f"assistant\n{empty}"), ("b", dict(mode="think"), "assistant\n"),
                              ("c", dict(init=str(tmp_path / "mid")), "assistant\n"),
                              ("d", dict(init=str(tmp_path / "mid"), style="compact"), f"assistant\n{empty}")):
        seen.clear()
        grpo.main(config(name, steps=1, temperature=0.7, **change))
        sampled = [(n, p) for n, t, p in seen if t == 0.7]      # of rollouts, and of pass@1 and pass@3
        assert all(p.endswith(f"<|im_start|>{end}") for _, p in sampled) and [n for n, _ in sampled].count(4) == 8
        assert len(sampled) == 2 * 9 + 8 and {(n, t) for n, t, _ in seen} == {(4, 0.7), (2, 0.7), (2, 0.0)}
        assert all(("system" in p) == (name != "c") for _, _, p in seen)
        assert nano.read_checkpoint(tmp_path / name)["train_config"]["style"] == ("chatml" if name == "c" else "compact")


# --- metrics ---------------------------------------------------------------------------------------------------------

STEP = {"step", "tokens", "loss", "lr", "grad_norm", "seconds", "tok_per_s", "skipped", "reward", "reward_std", "reward_errors",
        "rewards/letter", "rewards/accuracy", "rewards/format", "rewards/overlong", "accuracy", "frac_reward_zero_std",
        *(f"completions/{k}" for k in ("mean_length", "median_length", "max_length", "clipped_ratio")), "rollout_seconds",
        "update_seconds", "entropy", "sampler_gap", "clip_ratio/low", "clip_ratio/high"}
SCORES = {*(f"{mode} {what}" for mode in ("think", "no_think") for what in ("accuracy", "tokens", "cut off")),
          "no_think tokens (median)", "think tokens (median)"}


@pytest.mark.parametrize("change, more", [({}, set()), (dict(beta=0.1), {"kl"}), (dict(num_iterations=2), set()),
                                          (dict(teacher="other"), {"kl_teacher"})], ids=["plain", "beta", "twice", "teacher"])
def test_rows_have_all_names_and_finite_values(config, place, change, more):
    if "teacher" in change:
        change = dict(teacher=str(place / "other"))
    cfg = config(rewards=f"{rewarded(place, 'letter')}:2,accuracy,format:0.1", steps=6, eval_every=4, **change)
    result = grpo.main(cfg)
    told, n = rows(cfg), cfg.num_iterations
    assert [row["step"] for row in steps(cfg)] == list(range(n, 7, n)) and all(row.keys() == STEP | more for row in steps(cfg))
    assert all(math.isfinite(v) for row in steps(cfg) for v in row.values())
    tokens = {0: 0} | {row["step"]: row["tokens"] for row in steps(cfg)}
    assert [(row["step"], row["tokens"]) for row in told if "scores" in row] == [(at, tokens[at]) for at in (0, 4, 6)]
    assert told[-1]["final"] and told[-1].keys() == {"final", "step", "tokens", "loss", "seconds", "skipped", "scores"}
    assert result["scores"] == told[-1]["scores"] and result["before"] == dict(scores=told[0]["scores"])
    assert result["tokens"] == told[-1]["tokens"] == steps(cfg)[-1]["tokens"] and result["loss"] == steps(cfg)[-1]["loss"]


def test_a_row_tells_what_the_answers_of_its_step_were_worth(config, place, monkeypatch):
    generated, generate = [], nano.generate

    def watched(*args, seed, **kwargs):
        made = generate(*args, seed=seed, **kwargs)
        generated.extend(ids for own, (ids, _) in zip(seed, made) if len(own) == 4)
        return made
    monkeypatch.setattr(nano, "generate", watched)
    cfg = config(rewards=f"{rewarded(place, 'letter')}:2,accuracy,format:0.1", steps=5)
    _, _, made = session(cfg)
    for ids, s in zip(generated, [s for samples in made for s in samples], strict=True):
        finished = ids[-1] in (END, BYTES.eos)          # the end counts and is no text; nothing comes after it
        assert s["finished"] == finished and s["tokens"] == len(ids) and s["text"] == BYTES.decode(ids[:len(ids) - finished])
        assert END not in ids[:-1] and (finished or len(ids) == 10)
    total = 0
    for row, samples in zip(steps(cfg), made, strict=True):
        texts, lengths, finished = ([s[k] for s in samples] for k in ("text", "tokens", "finished"))
        letter = [t.count("a") / max(1, len(t)) for t in texts]
        well = [float(f and bool(t.strip()) and "think>" not in t) for t, f in zip(texts, finished)]
        penalty = [-min(1, max(0, (n - 5) / 4)) for n in lengths]
        reward = [2 * a + 0.1 * b + c for a, b, c in zip(letter, well, penalty)]
        total += sum(lengths)
        expected = {
            "rewards/letter": statistics.mean(letter), "rewards/format": statistics.mean(well), "rewards/accuracy": 0.0,
            "rewards/overlong": statistics.mean(penalty), "reward": statistics.mean(reward), "accuracy": 0.0,
            "reward_std": statistics.stdev(reward), "completions/mean_length": statistics.mean(lengths), "tokens": total,
            "completions/median_length": statistics.median(lengths), "completions/max_length": max(lengths),
            "completions/clipped_ratio": 1 - statistics.mean(finished), "reward_errors": 0,
            "frac_reward_zero_std": statistics.mean(statistics.pstdev(reward[i:i + 4]) == 0 for i in (0, 4))}
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-6)
        assert row["tok_per_s"] == pytest.approx(sum(lengths) / (row["rollout_seconds"] + row["update_seconds"]))
        groups = [reward[:4], reward[4:]]
        better = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
        assert row["loss"] == pytest.approx(-sum(a * n for a, n in zip(better, lengths)) / sum(lengths), abs=1e-4)
        assert row["clip_ratio/low"] == row["clip_ratio/high"] == 0
    assert {s["finished"] for samples in made for s in samples} == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_and_training_agree_on_log_probs_and_the_kl_starts_at_exactly_0(config, temperature):
    cfg = config(temperature=temperature, beta=0.1)
    grpo.main(cfg)
    first, *_, last = steps(cfg)
    assert all(row["sampler_gap"] < 1e-5 and row["entropy"] > 0.05 for row in steps(cfg))
    assert first["kl"] == 0 and last["kl"] > 1e-4


def test_reference_and_teacher_compute_in_the_dtype_of_the_policy(config, place):
    for name, change in (("kl", dict(beta=0.1)), ("kl_teacher", dict(teacher=str(place / "base")))):
        cfg = config(name, dtype="bfloat16", steps=1, **change)
        grpo.main(cfg)
        assert steps(cfg)[0][name] == 0 and 0 < steps(cfg)[0]["sampler_gap"] < 0.05


def test_the_sampler_gap_is_no_measure_of_how_far_the_policy_has_gone_in_several_steps_on_the_same_answers(config):
    cfg = config(num_iterations=2)
    grpo.main(cfg)
    assert all(row["sampler_gap"] < 1e-5 for row in steps(cfg))


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(config, place):
    cfg = config(teacher=str(place / "base"), temperature=0.6)
    grpo.main(cfg)
    assert all(row["kl_teacher"] == 0 and row["grad_norm"] == 0 and row["sampler_gap"] < 1e-5 for row in steps(cfg))
    assert same_weights(cfg.out, cfg.init)


def by_hand(m, ids, mask):
    """Log-probs of the trained tokens of one example, from the logits of a plain forward pass, in float64."""
    with torch.no_grad():
        logp = m(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return [float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1) if mask[t + 1]]


def test_entropy_and_both_kls_are_means_over_tokens_computed_by_hand(config, place, monkeypatch):
    """At step 2: policy and reference differ then."""
    batches, original = {}, grpo.learn

    def learn(run, batch):
        if run.step not in batches:
            model = nano.Transformer(run.model.config)
            model.load_state_dict(run.model.state_dict())
            batches[run.step] = model, batch.rows
        return original(run, batch)
    monkeypatch.setattr(grpo, "learn", learn)
    for name, other, change in (("kl", "base", dict(beta=0.1)), ("kl_teacher", "other", dict(teacher=str(place / "other")))):
        batches.clear()
        cfg = config(name, steps=2, **change)
        grpo.main(cfg)
        model, examples = batches[1]
        ours, theirs = ([p for row in examples for p in by_hand(m, *row)]
                        for m in (model, nano.load_checkpoint(place / other)[0]))
        row = steps(cfg)[1]
        assert row["entropy"] == pytest.approx(-statistics.mean(ours), abs=1e-4)
        differences = [q - p for p, q in zip(ours, theirs)]
        kl = [math.exp(d) - d - 1 for d in differences] if name == "kl" else [-d for d in differences]
        assert row[name] == pytest.approx(statistics.mean(kl), abs=1e-4) and row[name] != 0


def test_accuracy_is_told_whatever_is_rewarded_and_what_was_cut_off_is_not_right(config, monkeypatch):
    answer = {p["prompt"]: p["answer"] for p in PROBLEMS}
    right = lambda prompt: answer.get(re.search(r"\d+\+\d+=", prompt)[0], "")
    monkeypatch.setattr(nano, "generate", scripted(lambda prompt, seed, _: (
        "{}", "{}…", "1{}", "so\n{}")[seed[-2] % 4].format(right(prompt))))
    for rewards in ("format", "accuracy"):
        cfg = config(rewards, rewards=rewards)
        grpo.main(cfg)
        assert all(row["accuracy"] == 0.5 and row["completions/clipped_ratio"] == 0.25 for row in steps(cfg))
        assert all(row[f"rewards/{rewards}"] == (0.5 if rewards == "accuracy" else 0.75) for row in steps(cfg))


def test_seconds_are_those_of_training_and_go_on_after_a_resume(config, monkeypatch):
    clock, validate, now = [0.0], grpo.validate, time.perf_counter
    monkeypatch.setattr(grpo, "validate", lambda run: clock.append(clock.pop() + 1000) or validate(run))
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: now() + clock[0], strftime=time.strftime))
    cfg = config(eval_every=1)
    stopped_run(cfg, 2)
    grpo.main(resumed(cfg))
    told = [row["seconds"] for row in rows(cfg)]
    assert told == sorted(told) and told[0] == 0 < told[1] and len(set(told)) >= 5 and told[-1] < 1000


# --- the flags of the loss -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss_type, scale_rewards", [
    *((loss_type, "none") for loss_type in grpo.LOSSES), ("dapo", "group"), ("dapo", "batch")])
def test_the_first_loss_is_what_rewards_lengths_and_flags_make_it(config, loss_type, scale_rewards):
    cfg = config(loss_type=loss_type, scale_rewards=scale_rewards, steps=1, micro_batch=0 if loss_type == "bnpo" else 3)
    _, _, ((*samples,),) = session(cfg)
    rewards, lengths = ([s[k] for s in samples] for k in ("reward", "tokens"))
    groups = [rewards[:4], rewards[4:]]
    spread = dict(group=[statistics.stdev(g) for g in groups], batch=[statistics.stdev(rewards)] * 2, none=[1 - 1e-4] * 2)
    better = [(r - statistics.mean(g)) / (s + 1e-4) for g, s in zip(groups, spread[scale_rewards]) for r in g]
    total = -sum(a * n for a, n in zip(better, lengths))
    expected = dict(dapo=total / sum(lengths), bnpo=total / sum(lengths), dr_grpo=total / 80, grpo=0)[loss_type]
    assert steps(cfg)[0]["loss"] == pytest.approx(expected, abs=1e-5) and abs(total) > 0.1


def test_every_flag_of_the_loss_reaches_it(config):
    change = dict(loss_type="grpo", scale_rewards="none", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.1,
                  beta=0.5, mask_truncated_completions=True, grad_clip=0.1, optimizer="adamw", temperature=0.9, lr=9e-3)
    start = dict(num_iterations=2, epsilon=1e-3, epsilon_high=1e-3)
    plain = config("plain", **start)
    grpo.main(plain)
    for k, v in change.items():
        other = config(k, **start | {k: v})
        grpo.main(other)
        assert not same_weights(plain.out, other.out), k


def test_ratios_are_clipped_by_epsilon_below_and_by_epsilon_high_above(config):
    for name, change in (("low", dict(epsilon=1e-3, epsilon_high=10.0)), ("high", dict(epsilon=0.99, epsilon_high=1e-3))):
        cfg = config(name, num_iterations=2, lr=2e-3, **change)
        grpo.main(cfg)
        assert [max(row[f"clip_ratio/{side}"] for row in steps(cfg)) > 0 for side in ("low", "high")] == [
            name == "low", name == "high"]


@pytest.mark.parametrize("kind", ["masked", "beta", "teacher"])
def test_micro_batches_of_any_size_end_where_all_answers_at_once_do(config, place, kind):
    change = kind_of(kind, place) | dict(num_iterations=2, optimizer="muon")
    cfgs, sizes, forward = [config(f"{n}", micro_batch=n, **change) for n in (0, 1, 3)], [], nano.Transformer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda x: x)    # Newton-Schulz in float32
        patch.setattr(nano.Transformer, "forward", lambda self, ids, *more: sizes.append(len(ids)) or forward(self, ids, *more))
        for cfg in cfgs:
            sizes.clear()
            grpo.main(cfg)
            assert max(sizes) == (cfg.micro_batch or cfg.prompts * cfg.num_generations)
    assert_alike(cfgs[0], cfgs[1]), assert_alike(cfgs[0], cfgs[2])


# --- two steps on the same answers -----------------------------------------------------------------------------------

def test_with_two_iterations_optimizer_steps_are_counted_and_odd_periods_are_kept(config, monkeypatch):
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda run, last=False: saved.append(run.step) or save(run, last))
    cfg = config(steps=12, num_iterations=2, log_every=5, eval_every=3, save_every=3)
    result, run, made = session(cfg)
    assert len(made) == 6 and result["step"] == 12
    assert [row["step"] for row in steps(cfg)] == [2, 6, 10, 12]
    assert [row["step"] for row in rows(cfg) if "scores" in row] == [0, 4, 6, 10, 12]
    assert saved == [4, 6, 10, 12]
    state = nano.read_checkpoint(cfg.out)
    assert state["step"] == 12 and state["consumed_samples"] == 12
    assert all(s["step"] == 12 for s in state["optimizer"].values() if "step" in s)


def test_the_first_step_on_answers_is_on_policy_and_the_second_is_not(config):
    """The first steps of two runs are the same; then one learns from new answers and one from the same again, clipped."""
    once, twice = (config(f"{n}", num_iterations=n, steps=2, lr=2e-3, epsilon=1e-3, epsilon_high=1e-3) for n in (1, 2))
    _, _, (first, _) = session(once)
    _, _, (again,) = session(twice)
    assert [s["text"] for s in first] == [s["text"] for s in again]
    (row,) = steps(twice)
    assert row["clip_ratio/low"] > 0 and row["clip_ratio/high"] > 0 and not same_weights(once.out, twice.out)
    assert row["tokens"] == steps(once)[0]["tokens"]


# --- stop and resume -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_ends_with_the_bits_and_the_rows_of_an_undisturbed_one(config, place, kind):
    change = dict(steps=6, eval_every=3) | kind_of(kind, place)
    cfg, undisturbed = config("stopped", **change), config("undisturbed", **change)
    grpo.main(undisturbed)
    at = stopped_run(cfg, 3)["step"]
    grpo.main(resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)
    told = [row for row in untimed(undisturbed) if row["step"] != at or "grad_norm" in row]     # it did not evaluate there
    assert untimed(cfg) == told and told[-1]["final"] and len(steps(cfg)) == 6 // cfg.num_iterations
    assert not same_weights(cfg.out, cfg.init)


def test_a_stopped_run_tells_its_last_step_however_seldom_it_does(config, capsys):
    cfg = config(log_every=1000, num_iterations=2, steps=8)
    stopped_run(cfg, 4)
    assert [row["step"] for row in steps(cfg)] == [2, 4]
    assert f"SIGTERM: saved {cfg.out} at step 4; --resume goes on from there" in capsys.readouterr().out
    grpo.main(resumed(cfg))
    assert [row["step"] for row in steps(cfg)] == [2, 4, 8] and "| resuming after step 4\n" in capsys.readouterr().out


def test_a_run_that_died_between_two_checkpoints_makes_the_steps_since_the_last_one_again(config):
    cfg, undisturbed = (config(name, steps=6, save_every=2) for name in ("killed", "undisturbed"))
    grpo.main(undisturbed)
    original = train.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", lambda run, *a: original(run, *a) if run.step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grpo.main(cfg)
    assert nano.read_checkpoint(cfg.out)["step"] == 2
    grpo.main(resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)
    assert untimed(cfg) == untimed(undisturbed)


def test_evaluating_logging_and_saving_more_often_changes_nothing(config):
    seldom, often = (config(name, log_every=every, eval_every=every, save_every=every, beta=0.1)
                     for name, every in (("seldom", 1000), ("often", 1)))
    grpo.main(seldom), grpo.main(often)
    assert_same_state(seldom.out, often.out)
    assert [len([row for row in rows(cfg) if "scores" in row]) for cfg in (seldom, often)] == [2, 5]


def test_more_problems_to_test_on_change_nothing(config, tmp_path):
    few, many = (config(name, tasks=write(tmp_path / f"{name}.jsonl", [dict(prompt=f"{i}?", answer="1") for i in range(n)]))
                 for name, n in (("few", 1), ("many", 5)))
    grpo.main(few), grpo.main(many)
    assert same_weights(few.out, many.out)


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(config):
    cfg = config(steps=3)
    result = grpo.main(cfg)
    before = {n: p.clone() for n, p in weights(cfg.out).items()}
    again = grpo.main(resumed(cfg))
    assert same_weights(cfg.out, before) and again["before"] == result["before"] and again["step"] == 3
    assert again["scores"] == result["scores"] and again["tokens"] == result["tokens"]


def test_the_same_run_again_is_refused_and_overwrite_repeats_it(config, tmp_path):
    """It is known as this very run, which torchrun --max_restarts needs to go on with it."""
    cfg = config(steps=3)
    grpo.main(cfg)
    files = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    one_line(grpo.main, cfg, match="this very run, up to step 3: --resume goes on with it, --overwrite deletes it")
    for change in (dict(beta=0.5), dict(num_generations=8), dict(temperature=0.5), dict(overlong_max=8), dict(rewards="format"),
                   dict(num_iterations=3), dict(loss_type="grpo"), dict(epsilon=0.1), dict(mode="think")):
        one_line(grpo.main, dataclasses.replace(cfg, **change), match=rf"another run \(other {next(iter(change))}\)")
    assert {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()} == files
    shutil.copytree(cfg.out, tmp_path / "first")
    grpo.main(dataclasses.replace(cfg, overwrite=True))
    assert_same_state(cfg.out, tmp_path / "first")
    assert len(steps(cfg)) == 3


def test_a_run_that_torchrun_starts_again_goes_on_by_itself_but_not_with_other_settings(config, monkeypatch):
    """The command says neither template nor date; the run's config.json does."""
    cfg, undisturbed = config("restarted", style="", date=""), config("undisturbed", style="", date="")
    grpo.main(undisturbed), stopped_run(cfg, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    one_line(grpo.main, dataclasses.replace(cfg, lr=1e-3), match=r"another run \(other lr\)")
    grpo.main(cfg)
    assert_same_state(cfg.out, undisturbed.out)


def test_a_resume_on_another_day_goes_on_with_the_date_that_the_prompts_had(config, monkeypatch):
    days = iter(["24 November 2026", *["25 November 2026"] * 9])
    cfg = config(style="smollm3", prompts=1)
    undisturbed = dataclasses.replace(cfg, out=cfg.out + "-undisturbed", date="24 November 2026")
    grpo.main(undisturbed)
    monkeypatch.setattr(grpo.time, "strftime", lambda form, *_: next(days))
    stopped_run(cfg, 2), grpo.main(resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)


def test_the_recorded_configuration_starts_the_same_run_and_never_overwrites(config):
    cfg = config(steps=2, overwrite=True, beta=0.1, loss_type="dr_grpo", micro_batch=5)
    grpo.main(cfg)
    recorded = infra.cli(grpo.Config, argv=[f"--config={cfg.out}/config.json"])
    one_line(grpo.main, recorded, match="this very run")
    other = dataclasses.replace(recorded, out=f"{cfg.out}-again")
    grpo.main(other)
    assert_same_state(cfg.out, other.out)


def test_a_resume_with_other_problems_is_refused(config, tmp_path):
    cfg = config()
    stopped_run(cfg, 2)
    for name, others in (("fewer", PROBLEMS[:5]), ("reordered", PROBLEMS[::-1]),
                         ("answered", [dict(p, answer="1") for p in PROBLEMS])):
        path = write(tmp_path / f"{name}.jsonl", others)
        one_line(grpo.main, resumed(cfg, problems=path), match="--resume: .*run was trained on other problems")
    same = write(tmp_path / "elsewhere.jsonl", PROBLEMS)
    assert grpo.main(resumed(cfg, problems=same))["step"] == 4


def test_what_is_refused_leaves_the_run_that_is_there_as_it_is(config, place, tmp_path):
    cfg, others = config(), write(tmp_path / "others.jsonl", PROBLEMS[:5])
    stopped_run(cfg, 2)
    files = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    again = dataclasses.replace(cfg, overwrite=True)
    for bad in (resumed(cfg, beta=0.1), resumed(cfg, teacher=str(place / "other")), resumed(cfg, problems="/nowhere/x.jsonl"),
                dataclasses.replace(again, problems=others, tasks=""), dataclasses.replace(again, teacher="/nowhere"),
                dataclasses.replace(again, rewards="x"), resumed(cfg, problems=others)):
        with pytest.raises(SystemExit):
            grpo.main(bad)
        assert {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()} == files, bad


def test_a_resume_with_another_reference_or_teacher_is_refused(config, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "own")
    plain, beta, taught = config("plain"), config("beta", beta=0.1, init=str(tmp_path / "own")), config(
        "taught", teacher=str(tmp_path / "own"))
    for cfg in (plain, beta, taught):
        stopped_run(cfg, 2)
    refused = r"--resume: .*{}/ckpt_0{{8}}\.pt: not the file that the run in .*{} has had as its --{}$"
    one_line(grpo.main, resumed(plain, beta=0.1), match="--resume: .*plain has beta=0.0: the same expected")
    one_line(grpo.main, resumed(plain, teacher=str(place / "base")), match=refused.format("base", "plain", "teacher"))
    one_line(grpo.main, resumed(beta, init=str(place / "other")), match=refused.format("other", "beta", "init"))
    one_line(grpo.main, resumed(taught, teacher=str(place / "other")), match=refused.format("other", "taught", "teacher"))
    checkpoint(tmp_path / "own", small_model(5))        # another model under the same name
    one_line(grpo.main, resumed(beta), match=refused.format("own", "beta", "init"))
    one_line(grpo.main, resumed(taught), match=refused.format("own", "taught", "teacher"))
    shutil.copytree(place / "base", tmp_path / "moved")
    assert grpo.main(resumed(beta, init=str(tmp_path / "moved")))["step"] == 4      # the same file under another name


def test_a_resume_with_more_iterations_never_goes_beyond_the_last_step(config):
    """To refuse it is as good."""
    cfg = config(steps=4)
    stopped_run(cfg, 3)
    try:
        assert grpo.main(resumed(cfg, num_iterations=2))["step"] == 4
    except SystemExit as refused:
        assert "--num_iterations" in str(refused)


def test_a_resume_in_the_directory_of_another_stage_is_one_line(config, place, tmp_path):
    checkpoint(tmp_path / "base")
    chats = write(tmp_path / "chats.jsonl", [dict(prompt=f"{i}?", completion="b") for i in range(20)])
    sft.main(sft.Config(init=str(place / "base"), data=chats, out=str(tmp_path / "sft"), steps=1, batch=4, device="cpu",
                        dtype="float32", val_fraction=0.0))
    for name in ("base", "sft"):
        before = nano.checkpoints(tmp_path / name)
        one_line(grpo.main, config(name, resume=True), match="--resume")
        assert nano.checkpoints(tmp_path / name) == before


# --- reference and teacher -------------------------------------------------------------------------------------------

def test_without_beta_no_second_model_is_loaded_and_with_it_the_reference_stays_that_of_init(config, place):
    base = weights(place / "base")
    result, run, _ = session(config("none"))
    assert run.reference is None and run.teacher is None and nano.read_checkpoint(run.out)["monitor"]["others"] == {}
    cfg = config("beta", beta=0.1)
    stopped_run(cfg, 2)
    for path in nano.checkpoints(cfg.out):
        assert not same_weights(nano.read_checkpoint(path)["model"], base)
    _, run, _ = session(resumed(cfg))
    assert run.teacher is None and same_weights(run.reference.state_dict(), base)
    assert not same_weights(run.model.state_dict(), base) and all(p.grad is None for p in run.reference.parameters())
    _, run, _ = session(config("taught", teacher=str(place / "other")))
    assert run.reference is None and same_weights(run.teacher.state_dict(), weights(place / "other"))


def test_a_larger_beta_stays_closer_to_the_reference(config):
    ends = {}
    for beta in (0.01, 1.0):
        cfg = config(f"{beta}", beta=beta, steps=12, prompts=4)
        grpo.main(cfg)
        ends[beta] = statistics.mean(row["kl"] for row in steps(cfg)[-4:])
    assert 0 < ends[1.0] < 0.6 * ends[0.01]


@pytest.mark.parametrize("num_generations", [1, 4])
def test_a_student_comes_closer_to_its_teacher_and_rewards_are_still_told(config, tmp_path, num_generations):
    checkpoint(tmp_path / "student", small_model(3)), checkpoint(tmp_path / "teacher", small_model(4))
    cfg = config(init=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), prompts=16 // num_generations, steps=40,
                 num_generations=num_generations, micro_batch=0, log_every=5, rewards="format,accuracy")
    grpo.main(cfg)
    told = [row["kl_teacher"] for row in steps(cfg)]
    assert statistics.mean(told[-3:]) < 0.6 * statistics.mean(told[:2])
    assert all(row["reward"] is not None and row["rewards/format"] is not None for row in steps(cfg))


def test_a_teacher_takes_the_place_of_the_reference_whatever_beta_is_and_the_run_is_known_again(config, place, monkeypatch):
    cfg = config("beta", teacher=str(place / "other"), beta=0.5)
    _, run, _ = session(cfg)
    plain = config("plain", teacher=str(place / "other"))
    grpo.main(plain)
    assert run.reference is None and "kl" not in steps(cfg)[0]
    assert list(nano.read_checkpoint(cfg.out)["monitor"]["others"]) == ["--teacher"]
    assert_same_state(cfg.out, plain.out)
    one_line(grpo.main, cfg, match="this very run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert grpo.main(cfg)["step"] == 4


def test_with_a_teacher_rewards_change_nothing(config, place):
    one, other = (config(name, teacher=str(place / "other"), rewards=rewards)
                  for name, rewards in (("one", "format"), ("other", rewarded(place, "letter"))))
    grpo.main(one), grpo.main(other)
    assert same_weights(one.out, other.out) and steps(one)[-1]["reward"] != steps(other)[-1]["reward"]


# --- layouts ---------------------------------------------------------------------------------------------------------

def rank_session(cfg):
    """grpo.main(cfg) on a rank -> what it returned, holds and wrote, and the answers that it has seen."""
    torch.Tensor.bfloat16 = lambda x: x                 # Newton-Schulz in float32, so that layouts can be compared
    wrote, atomic, rows = [], infra.atomic, []
    for module in (infra, nano):
        module.atomic = lambda path: wrote.append(Path(path).name) or atomic(path)
    learn = grpo.learn
    grpo.learn = lambda run, batch: rows.append(len(batch.rows)) or learn(run, batch)
    result, run, made = session(cfg)
    return SimpleNamespace(result=result, before=result["before"], made=made, wrote=wrote, rows=rows,
                           weights={n: p.detach().clone() for n, p in run.model.named_parameters()},
                           complaints=train.check_ranks(run.model, run.rt, run.step))


def assert_texts_alike(alone, ranks):
    for r in ranks:
        assert [[(s["prompt"], s["text"], s["reward"]) for s in step] for step in r.made] == [
            [(s["prompt"], s["text"], s["reward"]) for s in step] for step in alone.made]


LAYOUTS = {"plain": {}, "odd": dict(num_generations=6, micro_batch=2, loss_type="grpo", scale_rewards="batch"),
           "beta": dict(beta=0.1, num_iterations=2), "teacher": dict(teacher="other", num_generations=3, micro_batch=1)}


def layout_of(kind, place):
    change = LAYOUTS[kind]
    return change | dict(teacher=str(place / change["teacher"])) if "teacher" in change else change


@pytest.mark.parametrize("kind", LAYOUTS)
def test_two_replicas_stay_bit_identical_and_end_where_one_process_does(config, place, kind):
    alone, two = (config(name, **layout_of(kind, place)) for name in ("alone", "two"))
    (one,) = ranks(1, rank_session, alone)
    first, second = ranks(2, rank_session, two)
    assert same_weights(first.weights, second.weights) and not first.complaints
    assert_texts_alike(one, (first, second))
    assert first.rows == second.rows == [n // 2 for n in one.rows]
    assert_alike(alone, two)
    assert first.before == second.before == one.before and first.result["scores"] == second.result["scores"]
    assert first.wrote and not second.wrote and len(rows(two)) == len(rows(alone))
    assert sorted(p.name for p in Path(two.out).iterdir()) == sorted(p.name for p in Path(alone.out).iterdir())


def test_replicas_of_which_one_has_nothing_to_train_end_where_one_process_does(config, monkeypatch):
    """Answers to the problems with even numbers, which the first replica gets, are all cut off, the others never."""
    generate = nano.generate

    def uneven(*args, seed, **kwargs):
        made = generate(*args, seed=seed, **kwargs)
        for own, (ids, logps) in zip(seed, made):
            if len(own) == 4 and own[1] % 2 == 0 and ids[-1] == END:
                ids[-1] = 97
            if len(own) == 4 and own[1] % 2 == 1:
                ids[-1] = END
        return made
    monkeypatch.setattr(nano, "generate", uneven)
    change = dict(mask_truncated_completions=True, micro_batch=3, rewards="format", beta=0.1)
    alone, two = (config(name, **change) for name in ("alone", "two"))
    (one,) = ranks(1, rank_session, alone)
    first, second = ranks(2, rank_session, two)
    assert same_weights(first.weights, second.weights)
    assert_texts_alike(one, (first, second))
    assert_alike(alone, two)
    assert all(row["completions/clipped_ratio"] == 0.5 and math.isfinite(row["loss"]) for row in steps(two))
    counted = [sum(s["tokens"] for s in samples if s["finished"]) for samples in one.made]
    assert [row["tokens"] for row in steps(two)] == [sum(counted[:i + 1]) for i in range(4)]
    assert not same_weights(two.out, two.init)


@pytest.mark.parametrize("kind", ["plain", "beta", "teacher"])
def test_two_tensor_parallel_halves_end_where_one_process_does(config, place, kind):
    change = layout_of(kind, place)
    alone, halves = config("alone", **change), config("halves", tp=2, **change)
    (one,) = ranks(1, rank_session, alone)
    first, second = ranks(2, rank_session, halves)
    assert_texts_alike(one, (first, second))
    assert_alike(alone, halves)
    assert first.wrote and not second.wrote and not first.complaints
    assert first.result["scores"] == pytest.approx(one.result["scores"])


@pytest.mark.parametrize("masked", [True, False])
def test_answers_that_were_all_cut_off_teach_nothing_only_if_they_are_masked(config, monkeypatch, masked):
    generate = nano.generate
    monkeypatch.setattr(nano, "generate", lambda *a, **k: [
        ([97 if i == END else i for i in ids], logps) for ids, logps in generate(*a, **k)])
    cfg = config(mask_truncated_completions=masked, overlong_max=0)
    grpo.main(cfg)
    assert same_weights(cfg.out, cfg.init) == masked
    for row in steps(cfg):
        assert row["completions/clipped_ratio"] == 1 and (row["grad_norm"] == 0) == (row["entropy"] == 0) == masked
        assert (row["tokens"] == 0) == masked and all(map(math.isfinite, row.values())) and row["reward"] > 0


def rank_stop(cfg, step):
    """A signal to rank 1 only."""
    if os.environ["RANK"] == "1":
        original = train.lr_at
        train.lr_at = lambda at, cfg: (at == step - 1 and signal.raise_signal(signal.SIGTERM)) or original(at, cfg)
    return grpo.main(cfg)


def test_a_signal_to_one_of_two_replicas_stops_both_and_the_run_goes_on_bit_for_bit(config):
    cfg, undisturbed = (config(name, num_iterations=2, beta=0.1, steps=6) for name in ("stopped", "undisturbed"))
    ranks(2, grpo.main, undisturbed)
    first, second = ranks(2, rank_stop, cfg, 3)
    assert first["step"] == second["step"] == 4 and first["stopped"] and second["stopped"] == "SIGTERM"
    ranks(2, grpo.main, resumed(cfg))
    assert_same_state(cfg.out, undisturbed.out)
    assert untimed(cfg) == untimed(undisturbed)


def test_problems_that_replicas_cannot_share_are_one_line(config, monkeypatch):
    two = SimpleNamespace(dp_size=2)
    one_line(grpo.check, config(prompts=3), two, match="--prompts=3: a multiple of the 2 replicas expected")


# --- evaluation ------------------------------------------------------------------------------------------------------

def test_scores_are_greedy_in_both_modes_and_sampled_in_the_one_that_is_trained(config, monkeypatch, tmp_path, capsys):
    """The second of the three tasks is always right in /think, and in one of three samples without; one answer is cut off."""
    asked = []

    def script(prompt, seed, temperature):
        if len(seed) == 4:
            return "5" * (1 + seed[2])
        asked.append((temperature, "</think>" in prompt, seed))
        task = next(i for i, t in enumerate(("21+21=", "22+22=", "23+23=")) if t in prompt)
        if temperature == 0:
            return ("42", "44", "1")[task] if "</think>" not in prompt else ("42", "a", "46…")[task]
        return (("42", "so\n42", "42"), ("x", "y", "44"), ("46…", "47 or so", "this is it"))[task][seed[1] % 3]
    monkeypatch.setattr(nano, "generate", scripted(script))
    cfg = config(temperature=0.8, steps=2)
    result = grpo.main(cfg)
    scores = result["scores"]
    assert scores == rows(cfg)[0]["scores"] == rows(cfg)[-1]["scores"]
    lengths = [3, 6, 3, 2, 2, 3, 2, 9, 11]
    assert scores == pytest.approx({
        "think accuracy": 2 / 3, "think tokens": 8 / 3, "think cut off": 0, "no_think accuracy": 1 / 3,
        "no_think tokens": 7 / 3, "no_think cut off": 1 / 3, "no_think pass@1": 4 / 9, "no_think pass@3": 2 / 3,
        "no_think sampled tokens": statistics.mean(lengths), "no_think sampled tokens (longest)": 11,
        "no_think beyond 9": 1 / 9})
    assert all(mode for temperature, mode, _ in asked if temperature) and {t for t, _, _ in asked} == {0.0, 0.8}
    assert {seed for t, _, seed in asked if t} == {(0, j) for j in range(9)}
    out = capsys.readouterr().out
    assert re.search(r"3 held-out problems +before +after\n", out) and re.search(r"no_think pass@3 +0\.667 +0\.667\n", out)
    assert f"wrote {cfg.out}; try: python sft.py --stage=eval --init={cfg.out}" in out
    assert "  21+21= -> 42 [3 tokens, reward 0.00: letter 0.00, overlong 0.00]" in out
    plain = grpo.main(config("plain", mode="think", overlong_max=0, steps=1))["scores"]
    assert {"think pass@1", "think pass@3"} <= plain.keys() and not any("beyond" in k or "no_think pass" in k for k in plain)


def test_scores_are_those_of_sfts_evaluation_and_pass_at_1_is_between_0_and_pass_at_k(config, tmp_path):
    cfg = config(init=str(tmp_path / "long"), tasks=str(tmp_path / "tasks.jsonl"), steps=1, temperature=0.5)
    checkpoint(tmp_path / "long", school(small_model(), 60))    # by now it nearly always says the same
    tasks = [dict(prompt=f"{i}+{7 * i % 10}=", answer="1") for i in range(1, 16, 2)]
    evaluation = sft.Config(stage="eval", init=cfg.init, out=f"{cfg.out}-eval", tasks=write(tmp_path / "tasks.jsonl", tasks),
                            max_new_tokens=10, device="cpu", dtype="float32")
    sft.main(evaluation)
    said = [json.loads(line)["answers"][0] for line in (Path(evaluation.out) / "long.jsonl").read_text().splitlines()[8:]]
    write(tmp_path / "tasks.jsonl", [dict(t, answer=a["text"]) for t, a in zip(tasks[:4], said)] + tasks[4:])
    scores, expected = grpo.main(cfg)["before"]["scores"], sft.main(evaluation)["long"]
    for mode in ("think", "no_think"):
        for what in ("accuracy", "tokens", "cut off"):
            assert scores[f"{mode} {what}"] == pytest.approx(expected[f"{mode} {what}"]["mean"], abs=1e-9)
    assert 0 < scores["no_think pass@1"] <= scores["no_think pass@3"] <= 1 and 0 < scores["no_think accuracy"] < 1


# --- checkpoints -----------------------------------------------------------------------------------------------------

def test_a_checkpoint_is_one_that_every_other_stage_reads(config, tmp_path):
    cfg = config(style="smollm3", steps=2, prompts=1)
    _, run, _ = session(cfg)
    model, extra = nano.load_checkpoint(cfg.out)
    assert same_weights(model.state_dict(), run.model.state_dict())
    assert extra["stage"] == "grpo" and extra["tokenizer"] == "bytes" and not extra["lora"]
    assert extra["step"] == 2 and extra["consumed_samples"] == 2 and extra["train_config"]["style"] == "smollm3"
    assert extra["optimizer"].keys() == model.state_dict().keys()
    sft.main(sft.Config(stage="merge", models=f"{cfg.out}:0.5,{cfg.init}:0.5", out=str(tmp_path / "merged"), device="cpu"))
    again = config("again", init=str(tmp_path / "merged"), steps=1, prompts=1)
    assert session(again)[1].cfg.style == "smollm3"     # the template is what the model was trained with


# --- answers without a reward, steps that are not finite -------------------------------------------------------------

def test_a_reward_function_that_always_fails_is_said_once_and_counted_and_nothing_is_learned(config, place, capsys):
    cfg = config(rewards=rewarded(place, "broken"), overlong_max=0, steps=3)
    result, out = grpo.main(cfg), capsys.readouterr().out
    assert out.count("WARNING: --rewards: broken: ZeroDivisionError: division by zero; such answers count as not scored") == 1
    for row in steps(cfg):
        assert row["reward"] is None and row["rewards/broken"] is None and row["reward_errors"] == 8
        assert row["loss"] == 0 and row["grad_norm"] == 0 and row["frac_reward_zero_std"] == 1 and row["entropy"] > 0
    assert result["step"] == 3 and result["skipped"] == 0 and same_weights(cfg.out, cfg.init)
    assert "NaN" not in (Path(cfg.out) / "metrics.jsonl").read_text()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_reward_that_never_has_anything_to_say_teaches_nothing_and_is_no_error(config, place, capsys, optimizer):
    cfg = config(rewards=rewarded(place, "silent"), overlong_max=0, optimizer=optimizer)
    grpo.main(cfg)
    assert "WARNING" not in capsys.readouterr().out and same_weights(cfg.out, cfg.init)
    assert all(row["rewards/silent"] is None and row["reward_errors"] == 0 and row["reward"] is None for row in steps(cfg))


def test_unanimous_groups_teach_nothing_and_are_counted(config):
    cfg = config(rewards="accuracy", overlong_max=0)
    grpo.main(cfg)
    assert all(row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 and row["reward"] == 0 for row in steps(cfg))
    assert same_weights(cfg.out, cfg.init)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_teaches_nothing_leaves_the_weights_alone_after_others_that_did(config, monkeypatch, optimizer):
    """Momentum does not go on by itself."""
    original, calls = grpo.advantages, []
    monkeypatch.setattr(grpo, "advantages", lambda *a: original(*a) * (calls.append(a) or len(calls) not in (3, 4)))
    cfg, kept = config(optimizer=optimizer, steps=6, save_every=1), []
    monkeypatch.setattr(train, "save", lambda run, last=False: kept.append(
        {n: p.clone() for n, p in run.model.named_parameters()}))
    grpo.main(cfg)
    assert [same_weights(a, b) for a, b in zip(kept, kept[1:])] == [False, True, True, False, False]
    assert [row["grad_norm"] == 0 for row in steps(cfg)] == [False, False, True, True, False, False]


def test_answers_that_a_reward_passes_over_do_not_count_in_its_mean(config, place):
    cfg = config(rewards=rewarded(place, "choosy"), overlong_max=0)
    _, _, made = session(cfg)
    for row, samples in zip(steps(cfg), made):
        scored = [s["text"].count("a") for s in samples if len(s["text"]) > 4]
        assert row["reward"] == row["rewards/choosy"] == pytest.approx(statistics.mean(scored)) and 0 < len(scored) <= 8
        assert row["reward_errors"] == 0 and math.isfinite(row["loss"])
    assert any(len(s["text"]) <= 4 for samples in made for s in samples)


@pytest.mark.parametrize("name", ["same", "accuracy", "format", "overlong"])
def test_a_function_of_the_users_counts_for_every_answer_whatever_its_name(config, place, name):
    """Refusing a name that is taken is as good."""
    cfg = config(rewards=f"{rewarded(place, name)}:4", overlong_max=9)
    try:
        _, _, made = session(cfg)
    except SystemExit as refused:
        assert name != "same" and name in str(refused)
    else:
        assert all(3 <= s["reward"] <= 4 for samples in made for s in samples)


def said(cfg):
    """What a rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        grpo.main(cfg)
    return out.getvalue()


def test_a_reward_function_that_fails_on_another_replica_is_said_too(config, tmp_path):
    cfg = config(steps=1)
    last = session(cfg)[2][0][-1]["prompt"]             # of the second replica
    (tmp_path / "mine.py").write_text(f"def picky(prompt, completion, answer):\n    return 1 / (prompt != {last!r})\n")
    for n in (1, 2):
        other = config(f"{n}", steps=1, rewards=f"{tmp_path}/mine.py:picky")
        assert "WARNING: --rewards: picky: ZeroDivisionError" in ranks(n, said, other)[0]
        assert steps(other)[0]["reward_errors"] == 4


def spoiled(monkeypatch, bad):
    original = grpo.learn

    def learn(run, batch):
        loss, metrics = original(run, batch)
        return (loss * math.nan if run.step + 1 in bad else loss), metrics
    monkeypatch.setattr(grpo, "learn", learn)


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_ten_in_a_row_end_the_run(config, monkeypatch, capsys, n):
    bad = {3}
    spoiled(monkeypatch, bad)
    cfg = config("once", num_iterations=n)
    result = grpo.main(cfg)
    assert result["skipped"] == 1 and "SKIPPED step 3: " in capsys.readouterr().out and math.isfinite(result["loss"])
    assert all(p.isfinite().all() for p in weights(cfg.out).values()) and steps(cfg)[-1]["skipped"] == 1
    bad |= set(range(100))
    one_line(grpo.main, config("always", steps=20, num_iterations=n), match="step 10: 10 steps in a row were not finite")
    bad -= {7}
    assert grpo.main(config("nearly", steps=16, num_iterations=n))["skipped"] == 15


def test_a_skipped_step_is_told_with_its_own_problems(config, monkeypatch, capsys):
    spoiled(monkeypatch, {1, 3})
    grpo.main(config(steps=3))
    out = capsys.readouterr().out
    assert re.search(r"SKIPPED step 1: .*answers to problems 0 to 1 of the run's order", out)
    assert re.search(r"SKIPPED step 3: .*answers to problems 4 to 5 of the run's order", out)


# --- problems --------------------------------------------------------------------------------------------------------

def test_a_file_like_gsm8k_is_split_by_question_and_trained_on(config, tmp_path, capsys):
    given = [dict(question=f"Anna has {i} apples and buys {i % 7}. How many?", answer=f"{i}+{i % 7}=<<{i}+{i % 7}={i + i % 7}>>"
                  f"{i + i % 7}\n#### {i + i % 7}") for i in range(300)]
    path = write(tmp_path / "gsm8k.jsonl", given + given[:40])
    problems, held = grpo.load_problems(grpo.Config(problems=path))
    text = lambda rows: [row["prompt"][-1]["content"] for row in rows]
    assert set(text(held)) == {g["question"] for g in given if zlib.crc32(g["question"].encode()) % 50 == 0} and held
    assert not set(text(held)) & set(text(problems)) and len(problems) + len(held) == 340
    assert all(p["answer"] == str(int(p["answer"])) for p in problems + held)
    result, run, made = session(config(problems=path, tasks="", steps=2))
    assert run.problems == problems and run.tasks == held and result["step"] == 2
    assert {s["prompt"] for samples in made for s in samples} <= set(text(problems))
    assert f"{len(problems)} problems, {len(held)} held out" in capsys.readouterr().out
    with_tasks, tasks = grpo.load_problems(grpo.Config(problems=path, tasks=config().tasks))
    assert len(with_tasks) == 340 and len(tasks) == 3   # nothing is held out of a file beside which there are tasks


def test_no_more_than_so_many_are_held_out_for_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "PROBLEMS", 2)
    path = write(tmp_path / "many.jsonl", [dict(prompt=f"{i}?", answer=str(i)) for i in range(400)])
    problems, held = grpo.load_problems(grpo.Config(problems=path))
    assert len(held) == 2 and not any(p in problems for p in held)


def test_embedded_problems_are_neither_held_out_nor_trained_on_before(tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", [dict(prompt="1?", answer="1")])
    problems, held = grpo.load_problems(grpo.Config())
    text = lambda rows: {row["prompt"][0]["content"] for row in rows}
    assert len(text(problems)) == grpo.SUMS and held == data.sum_problems(200) and len(text(held)) == 200
    seen = {f"{a}+{b}=" for a, b in data.sums(sft.SUMS + sft.SELF)}
    assert not text(problems) & text(held) and not text(problems) & seen and not text(held) & seen
    assert grpo.load_problems(grpo.Config(tasks=tasks))[1] == [dict(prompt=data.as_messages("1?", "user"), answer="1")]
    assert all(sum(map(int, re.findall(r"\d+", p["prompt"][0]["content"]))) == int(p["answer"]) for p in problems + held)


# --- what is refused, and what is only said --------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(mode="both"), "--mode=both: no_think or think expected"), (dict(style="llama"), "--style=llama: compact, smollm3"),
    (dict(loss_type="ppo"), "--loss_type=ppo: dapo, grpo, dr_grpo or bnpo"), (dict(optimizer="sgd"), "--optimizer=sgd: muon"),
    (dict(scale_rewards="all"), "--scale_rewards=all: group, batch or none"),
    (dict(importance_sampling_level="word"), "--importance_sampling_level=word: token or sequence"),
    (dict(num_generations=1), "--num_generations=1: at least 2"), (dict(steps=0), "--steps.*at least 1"),
    (dict(teacher="x", num_generations=0), "--num_generations=0: at least 1"), (dict(prompts=0), "--prompts.*at least 1"),
    (dict(max_new_tokens=0), "--max_new_tokens.*at least 1"), (dict(num_iterations=0), "--num_iterations.*at least 1"),
    (dict(eval_every=0), r"--\*_every: at least 1"), (dict(save_every=-1), r"--\*_every"), (dict(log_every=0), r"--\*_every"),
    (dict(num_iterations=3), "--steps=4: a multiple of --num_iterations=3"), (dict(micro_batch=-1), "--micro_batch=-1: 0 or"),
    (dict(temperature=0.0), "--temperature.*more than 0"), (dict(lr=0.0), "--lr.*more than 0"),
    (dict(grad_clip=-1.0), "--grad_clip"), (dict(epsilon=1.0), "--epsilon"), (dict(epsilon=-0.1), "--epsilon"),
    (dict(epsilon_high=-0.1), "--epsilon_high"), (dict(beta=-1.0), "--beta: 0 or more"),
    (dict(warmup=1.5), "--warmup=1.5: 0 to 1"), (dict(overlong_max=-1), "--overlong_max=-1"),
    (dict(overlong_cache=10), "--overlong_cache=10: 0 to --overlong_max=9"),
    (dict(overlong_cache=-1), "--overlong_cache=-1: 0 to"),
    (dict(resume=True, overwrite=True), "--resume and --overwrite: one of them"),
    (dict(rewards="", overlong_max=0), "--rewards, --overlong_max, --teacher: one of them expected"),
    (dict(rewards="politeness"), "--rewards=politeness: accuracy or format, or FILE.py:FUNCTION"),
    (dict(rewards="nowhere.py:f"), "--rewards=nowhere.py:f: FileNotFoundError"),
    (dict(init="/nowhere"), "/nowhere: no checkpoint"), (dict(init="/nowhere", beta=0.1), "/nowhere: no checkpoint"),
    (dict(teacher="/nowhere"), "/nowhere: no checkpoint"), (dict(tasks="/nowhere/x.jsonl"), "/nowhere/x.jsonl: nothing found"),
    (dict(problems="/nowhere/x.jsonl"), "/nowhere/x.jsonl: nothing found"),
    (dict(seed=-1), "--seed=-1"), (dict(tp=2), "--tp=2")], ids=str)
def test_bad_settings_end_with_one_line_and_leave_no_checkpoint(config, change, message):
    cfg = config(**change)
    one_line(grpo.main, cfg, match=message)
    assert not nano.checkpoints(cfg.out)


def test_files_without_problems_or_with_nothing_left_to_train_or_test_on_are_one_line(config, tmp_path):
    given = [dict(prompt=f"{i}?", answer=str(i)) for i in range(400)]
    held = [g for g in given if zlib.crc32(g["prompt"].encode()) % 50 == 0]
    some = {"chats": [dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")])], "empty": [],
            "choices": [dict(question="?", choices=["a", "b"], answer="B")], "text": [dict(text="once")], "held": held,
            "one": [g for g in given if g not in held][:1], "mixed": [given[0], dict(text="once")]}
    path = {name: write(tmp_path / f"{name}.jsonl", some[name]) for name in some}
    for name in ("chats", "choices", "text", "mixed"):
        one_line(grpo.main, config(f"problems {name}", problems=path[name], tasks=""),
                 match=rf"--problems=.*{name}\.jsonl: problems \(prompt \+ answer\) expected")
    one_line(grpo.main, config("e", problems=path["empty"], tasks=""), match=r"--problems|empty\.jsonl")
    one_line(grpo.main, config("h", problems=path["held"], tasks=""), match=f"--problems, --tasks: .* not 0 and {len(held)}$")
    one_line(grpo.main, config("o", problems=path["one"], tasks=""), match="--problems, --tasks: .* not 1 and 0$")
    for name in ("chats", "choices", "text", "mixed", "empty"):
        one_line(grpo.main, config(f"tasks {name}", tasks=path[name]), match=rf"--tasks|{name}\.jsonl")
    assert not list(tmp_path.glob("*/ckpt*")) and grpo.main(config("fine", problems=path["one"]))["step"] == 4


def test_a_teacher_or_a_reference_with_another_tokenizer_or_vocabulary_is_one_line(config, tmp_path):
    checkpoint(tmp_path / "gpt2", tokenizer="gpt2"), checkpoint(tmp_path / "wide", small_model(vocab_size=384))
    cfg = config(beta=0.1)
    stopped_run(cfg, 2)
    for name in ("gpt2", "wide"):
        one_line(grpo.main, config(f"t {name}", teacher=str(tmp_path / name)),
                 match=f"--teacher=.*{name}: the policy's tokenizer, bytes, expected")
        one_line(grpo.main, resumed(cfg, init=str(tmp_path / name)),
                 match=f"--init=.*{name}: the policy's tokenizer, bytes, expected")
    assert not list(tmp_path.glob("t */ckpt*"))


@pytest.mark.parametrize("change, masks, beyond", [
    (dict(overlong_max=10, mask_truncated_completions=True), True, False),
    (dict(overlong_max=9, mask_truncated_completions=True), False, False),
    (dict(overlong_max=11, mask_truncated_completions=True), True, True), (dict(overlong_max=11), False, True),
    (dict(overlong_max=10), False, False), (dict(overlong_max=0, mask_truncated_completions=True), False, False)], ids=str)
def test_a_length_penalty_that_cannot_work_is_said(config, capsys, change, masks, beyond):
    grpo.begin(config(**change), infra.setup(config()))
    out = capsys.readouterr().out
    assert ("WARNING: --mask_truncated_completions leaves the longest answers out of the loss" in out) == masks
    assert ("WARNING: no answer of at most --max_new_tokens=10 meets the full penalty of --overlong_max=" in out) == beyond


# --- main without anything -------------------------------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An empty directory, and so few sums that main() is quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "SUMS", 40), monkeypatch.setattr(grpo, "PROBLEMS", 3)
    default = {f.name: f.default for f in dataclasses.fields(nano.Config)} | SHAPE
    monkeypatch.setattr(nano.Config, "__init__", lambda self, **change: vars(self).update(default | change))
    return dict(steps=4, prompts=2, num_generations=3, max_new_tokens=6, log_every=1, device="cpu", dtype="float32")


def test_without_a_checkpoint_it_starts_from_a_random_model_and_says_so_loudly(tiny, capsys):
    result, out = grpo.main(grpo.Config(**tiny)), capsys.readouterr().out
    assert "\n!!! no checkpoint in out/apo and out/sft: starting from a small model that knows nothing and will learn" in out
    assert "python train.py, then python sft.py" in out and "wrote out/grpo" in out and "3 held-out problems" in out
    assert "WARNING: no answer of at most --max_new_tokens=6 meets the full penalty of --overlong_max=40" in out
    assert result["step"] == 4 and nano.read_checkpoint("out/grpo")["stage"] == "grpo"
    assert all("kl" not in row for row in steps(grpo.Config()))      # there is nothing to stay close to


def test_a_run_from_a_random_model_is_resumed_as_any_other(tiny, place, capsys):
    cfg = grpo.Config(**tiny | dict(out="out/stopped", rewards=rewarded(place, "variety")))
    stopped_run(cfg, 2)
    capsys.readouterr()
    grpo.main(resumed(cfg))
    assert "!!!" not in capsys.readouterr().out
    grpo.main(dataclasses.replace(cfg, out="out/undisturbed"))
    assert_same_state("out/stopped", "out/undisturbed")


def test_it_starts_from_out_apo_rather_than_from_out_sft(tiny, capsys):
    quick = tiny | dict(rewards="", overlong_max=7, overlong_cache=0, steps=1)      # nothing is learned
    for seed, name in enumerate(("sft", "apo")):
        path = checkpoint(Path("out") / name, small_model(seed))
        grpo.main(grpo.Config(**quick | dict(out=f"out/{seed}")))
        assert same_weights(f"out/{seed}", path)
    cfg = grpo.Config(**tiny | dict(out="out/beta", beta=0.1))
    stopped_run(cfg, 2)
    _, run, _ = session(resumed(cfg))
    assert same_weights(run.reference.state_dict(), "out/apo") and "!!!" not in capsys.readouterr().out
    shutil.rmtree("out/apo")
    one_line(grpo.main, resumed(cfg), match="--resume: out/sft/ckpt_0{8}.pt: not the file that the run in out/beta has had")
