"""Reinforcement learning from its own answers: GRPO with verifiable rewards and a length penalty; on-policy distillation.

    python grpo.py                                         out/apo, else out/sft -> out/grpo: right without thinking, and brief
    python grpo.py --overlong_max=0 --out=out/long         no length penalty: /no_think learns to write long again
    python grpo.py --problems=gsm8k.jsonl --init=out/mine --max_new_tokens=512 --overlong_max=400 --overlong_cache=100
    python grpo.py --rewards=accuracy,mine.py:polite:0.5   and your own: mine.py has def polite(prompt, completion, answer)
    python grpo.py --teacher=out/long --out=out/distilled  learn from another model's probabilities instead of from rewards
    python grpo.py --bench                                 speed of one step on random weights, one JSON line
    torchrun --nproc_per_node=2 grpo.py                    two replicas; --tp=2: one model in two halves

Read main() first: sample answers, score them, and make those likelier that beat the mean of their group. What is random is a
function of (seed, number of the problem, number of the answer): a run that is resumed ends with the same bits.
"""
import dataclasses, importlib.util, json, math, statistics, sys, time, zlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import data, infra, model as nano, sft, train
from infra import Machine, Stop, all_sum, gather


@dataclass
class Config(Machine):
    """The flags of grpo.py."""
    init: str = ""                 # run or Hugging Face directory to start from; default: out/apo, else out/sft
    out: str = "out/grpo"          # run directory
    # problems and rewards
    problems: str = ""             # JSONL: prompt + answer, or GSM8K; default: sums of numbers
    tasks: str = ""                # JSONL of held-out problems; default: held-out sums, or one in fifty of --problems
    mode: str = "no_think"         # how the model is asked: no_think or think
    style: str = ""                # chat template: compact, smollm3 or chatml; default: what init was trained with
    date: str = ""                 # "Today Date" of style smollm3; default: today
    rewards: str = "accuracy,format:0.1"  # NAME or FILE.py:FUNCTION, each with :WEIGHT if that is not 1; they are added up
    overlong_max: int = 40         # length penalty: an answer of so many tokens gets -1; 0: no penalty
    overlong_cache: int = 12       # it grows from 0 over the last so many of them
    teacher: str = ""              # checkpoint to distil from, instead of the rewards
    # rollout
    prompts: int = 16              # problems per step
    num_generations: int = 8       # answers to each of them, a group
    temperature: float = 1.0       # of sampling, and so of all log-probs
    max_new_tokens: int = 96       # longest answer
    # loss
    loss_type: str = "dapo"        # dapo, grpo, dr_grpo, bnpo: what the sum over tokens is divided by
    scale_rewards: str = "group"   # advantages divided by the standard deviation of the group, of the batch, or by none
    importance_sampling_level: str = "token"  # probability ratio by token, or sequence (GSPO)
    num_iterations: int = 1        # optimizer steps on the same answers
    epsilon: float = 0.2           # from the second of them on, ratios count down to 1 - epsilon
    epsilon_high: float = 0.28     # and up to 1 + epsilon_high (DAPO's clip-higher)
    beta: float = 0.1              # weight of the KL to --init; 0 (or --teacher): no copy of that in memory
    mask_truncated_completions: bool = False  # answers that were cut off do not count in the loss
    # optimization
    steps: int = 100               # optimizer steps
    micro_batch: int = 32          # answers per forward pass and process; 0: all of them at once
    optimizer: str = "muon"        # muon or adamw, as in train.py
    lr: float = 2e-4               # peak learning rate, cosine to 10 %
    warmup: float = 0.05           # fraction of the steps
    grad_clip: float = 1.0         # largest gradient norm
    # run
    bench: bool = False            # measure speed on random weights, then stop
    resume: bool = False           # go on from the newest checkpoint in out, if there is one
    overwrite: bool = False        # delete the run that is in out
    log_every: int = 10            # steps between printed lines
    eval_every: int = 50           # steps between evaluations
    save_every: int = 50           # steps between checkpoints; also at the end and on signals
    wandb: bool = False            # log to Weights & Biases too
    # not knobs here, but read by what train.py lends (unannotated: no fields)
    schedule, weight_decay, z_loss, decay_embeddings = "cosine", 0.0, 0.0, False


LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
START, SUMS, PROBLEMS = 15_000, 20_000, 200  # sums that sft.py has not trained on, how many of them, held-out ones
SAMPLES = 8                                  # answers to a held-out problem, for pass@1 and pass@8
ROLLOUT = 0x6770                             # a stream of random numbers apart from evaluation's


# --- rewards: (prompt, completion, answer), all text -> a number, or None where they have nothing to say ---------------

def accuracy(prompt, completion, answer):
    """1.0 if the last line after the last </think>, or what follows #### there, is the answer. Nothing is ever evaluated."""
    return float(sft.is_right(completion, answer))


def format(prompt, completion, answer):
    """1.0 if the completion is an answer, after one closed thought or none. (In no_think an empty one is in the prompt.)"""
    thought = data.THOUGHT.match(completion)
    said = completion[thought.end():] if thought else completion
    return float(bool(said.strip()) and completion.count("<think>") == completion.count("</think>") == bool(thought))


REWARDS = {"accuracy": accuracy, "format": format}


def overlong_penalty(length, max_length, cache):
    """0 up to max_length - cache tokens, the end token among them, then linearly down to -1 at max_length and beyond (DAPO,
    arXiv 2503.14476, eq. 13; SmolLM3's cure for /no_think answers that grow to thousands of tokens)."""
    if length <= max_length - cache:
        return 0.0
    return max(-1.0, (max_length - cache - length) / cache) if cache else -1.0


def load_rewards(spec):
    """"accuracy,mine.py:polite:0.5" -> {name: (function, weight)}."""
    result = {}
    for item in filter(None, (x.strip() for x in spec.split(","))):
        name, *rest = item.split(":")
        try:
            weight = float(rest.pop()) if len(rest) > name.endswith(".py") else 1.0
            function = REWARDS.get(name)
            if name.endswith(".py"):
                file, name = name, rest.pop()
                module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"rewards of {file}", file))
                sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
                module.__spec__.loader.exec_module(module)
                function = getattr(module, name)
            if rest or not callable(function) or name in {*result, "overlong"} or not math.isfinite(weight):
                raise ValueError(f"{' or '.join(REWARDS)}, or FILE.py:FUNCTION (not called overlong), once each, "
                                 f"with :WEIGHT or without, expected")
        except (Exception, SystemExit) as e:  # a file of the user's can fail in any way
            why = "" if isinstance(e, ValueError) else f"{type(e).__name__}, FILE.py:FUNCTION[:WEIGHT] expected: "
            raise SystemExit(f"--rewards={item}: {why}{data.one_line(e)}") from None
        result[name] = function, weight
    return result


def score(run, sample):
    """Fill in sample["rewards"], {name: value or None}, and sample["reward"], their weighted sum (NaN: no function had
    anything to say). A function that fails or returns no number has nothing to say, and is in sample["complaints"]."""
    cfg, values, sample["complaints"] = run.cfg, {}, {}
    for name, (function, _) in run.rewards.items():
        try:
            value = function(sample["prompt"], sample["text"], sample["answer"])
            if function in REWARDS.values() and not sample["finished"]:  # cut off, it is neither right nor well-formed
                value = 0.0
            if value is not None and not abs(value := float(value)) < 1e30:  # nor NaN
                raise ValueError(f"{value} is no reward")
        except (Exception, SystemExit) as e:
            value, sample["complaints"][name] = None, f"{type(e).__name__}: {data.one_line(e)}"
        values[name] = value
    complain(run, sample)
    parts = [run.rewards[name][1] * value for name, value in values.items() if value is not None]
    mute = bool(run.rewards) and not parts  # the penalty alone would rank it above what is scored
    if cfg.overlong_max:
        values["overlong"] = overlong_penalty(sample["tokens"], cfg.overlong_max, cfg.overlong_cache)
        parts.append(values["overlong"])
    sample |= dict(rewards=values, reward=math.nan if mute or not parts else sum(parts))


def complain(run, sample):
    """Say of each function once how it has failed."""
    for name, why in sample["complaints"].items():
        if name not in run.complained:
            run.complained.add(name)
            run.log.say(f"WARNING: --rewards: {name}: {why}; such answers count as not scored by it")


# --- losses ----------------------------------------------------------------------------------------------------------

def advantages(rewards, num_generations, scale_rewards="group"):
    """rewards (P * G,), the G answers to a prompt side by side -> (P * G,): how much better than the mean of its group.

    scale_rewards: "group" divides by the group's standard deviation (n - 1) + 1e-4 (GRPO, arXiv 2402.03300), "batch" by that
    of all rewards, "none" by nothing (Dr. GRPO, arXiv 2503.20783: a group that is nearly unanimous weighs less). Equal rewards
    give exactly 0. NaN, not scored: advantage 0, and no part in any mean.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"--scale_rewards={scale_rewards}: group, batch or none expected")
    groups = rewards.view(-1, num_generations)
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    groups = torch.where(known, groups - groups.nan_to_num(-math.inf).amax(1, keepdim=True), 0.0)  # so that equal ones are 0
    centered = torch.where(known, groups - groups.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale_rewards == "group":
        centered = centered / ((centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    elif scale_rewards == "batch":
        spread = rewards[~rewards.isnan()]
        centered = centered / ((spread.std() if len(spread) > 1 else 0.0) + 1e-4)
    return centered.flatten()


def policy_loss(logp, old_logp, ref_logp, advantages, mask, epsilon=0.2, epsilon_high=None, beta=0.0, loss_type="dapo",
                importance_sampling_level="token", max_length=None, whole=None):
    """-> (loss, metrics: kl and the shares of clipped ratios). Log-probs and mask (B, T); advantages (B,), or (B, T).

    logp is the policy's, old_logp that of the policy that sampled, ref_logp that of the reference (None where beta is 0), all
    at the temperature of sampling. To maximise: PPO's clipped surrogate (arXiv 1707.06347), min(w A, clip(w, 1 - epsilon,
    1 + epsilon_high) A), w = exp(logp - old_logp) by token, or the geometric mean of a sequence's (GSPO, arXiv 2507.18071);
    minus beta times the KL to the reference in its k3 form, exp(d) - d - 1, d = ref_logp - logp.
    loss_type says what the sum over tokens is divided by. grpo: each answer by its own length, then by their number (a long
    wrong answer becomes cheaper than a short one); bnpo: the tokens of this batch; dapo (arXiv 2503.14476): the tokens of the
    whole step; dr_grpo: answers times max_length, a constant. whole: (answers, tokens) of the step of which this is a
    micro-batch; then losses and metrics of the parts add up to those of the step.
    """
    answers, tokens = whole or (len(logp), mask.sum())
    tokens = max(1, tokens)
    A = advantages[:, None] if advantages.dim() == 1 else advantages
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio, length = logp - old_logp, mask.sum(1, keepdim=True).clamp(min=1)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / length
    elif importance_sampling_level != "token":
        raise ValueError(f"--importance_sampling_level={importance_sampling_level}: token or sequence expected")
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + high) * A)
    clipped = {"clip_ratio/low": (ratio < 1 - epsilon) & (A < 0), "clip_ratio/high": (ratio > 1 + high) & (A > 0)}
    metrics = {name: (c * mask).sum() / tokens for name, c in clipped.items()}
    if beta:
        d = ref_logp - logp
        kl = d.exp() - d - 1
        loss = loss + beta * kl
        metrics["kl"] = (kl * mask).sum().detach() / tokens
    loss = loss * mask  # (B, T)
    if loss_type == "grpo":
        return (loss / length).sum() / answers, metrics
    if loss_type == "dr_grpo":
        return loss.sum() / (answers * max_length), metrics
    if loss_type == "bnpo":
        return loss.sum() / mask.sum().clamp(min=1) * len(logp) / answers, metrics
    if loss_type == "dapo":
        return loss.sum() / tokens, metrics
    raise ValueError(f"--loss_type={loss_type}: {', '.join(LOSSES)} expected")


# --- rollout ---------------------------------------------------------------------------------------------------------

def rollout(run):
    """The next problems, num_generations answers to each, and what these are worth -> what learn() wants, metrics, and the
    answers of all replicas.

    Sampled from the full softmax that the loss scores with (no top-k, no top-p). The end token is part of the completion, of
    its length and of the loss: without credit for stopping, to be brief is hard to learn (tests/lessons.py drop_eos).
    Nothing after it is.
    """
    cfg, rt, start, G = run.cfg, run.rt, time.perf_counter(), run.cfg.num_generations
    size, n = cfg.prompts // rt.dp_size, len(run.problems)
    numbers = range(run.consumed + rt.dp_rank * size, run.consumed + (rt.dp_rank + 1) * size)  # in the run's order
    problems = [run.problems[data.permute(k % n, n, (cfg.seed, k // n))] for k in numbers]
    prompts = [data.render(p["prompt"], cfg.mode, cfg.style, None, cfg.date, True, run.tokenizer)[0] for p in problems]
    jobs = [(k, i, g) for i, k in enumerate(numbers) for g in range(G)]
    with torch.no_grad():  # the sampler is the policy of this step in the dtype of the matmuls; a compiled step reads it
        for mine, its in zip(run.sampler.parameters(), run.model.parameters()):
            mine.copy_(its)
    out = nano.generate(run.sampler, [prompts[i] for _, i, _ in jobs], cfg.max_new_tokens, cfg.temperature, stop_ids=run.stop_ids,
                        seed=[(cfg.seed, k, g, ROLLOUT) for k, _, g in jobs], compile=cfg.compile)
    samples, rows, sampled = [], [], []
    for (_, i, _), (ids, logps) in zip(jobs, out):
        finished = ids[-1] in run.stop_ids
        text = run.tokenizer.decode(ids[:-1] if finished else ids)
        samples.append(dict(prompt=problems[i]["prompt"][-1]["content"], text=text, answer=problems[i]["answer"],
                            tokens=len(ids), finished=finished))
        score(run, samples[-1])
        counts = finished or not cfg.mask_truncated_completions
        rows.append((prompts[i] + ids, [0] * len(prompts[i]) + [int(counts)] * len(ids)))
        sampled.append(logps)
    everyone = [s for part in gather(rt, samples)[::rt.tp_size] for s in part]  # of all replicas, in the run's order
    for s in everyone:  # only rank 0 can be heard
        complain(run, s)
    rewards = torch.tensor([s["reward"] for s in everyone])
    mine = advantages(rewards, G, cfg.scale_rewards)[rt.dp_rank * len(rows):][:len(rows)]
    tokens = sum(s["tokens"] for s in everyone if s["finished"] or not cfg.mask_truncated_completions)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # alike lengths go together: little padding
    batch = SimpleNamespace(rows=[rows[i] for i in order], sampled=[sampled[i] for i in order], advantages=mine[order],
                            old=[], whole=(len(everyone), tokens))
    return batch, summary(run, everyone) | dict(rollout_seconds=time.perf_counter() - start), everyone


def summary(run, samples):
    """All answers of a step, groups side by side -> metrics under TRL's names."""
    lengths, G = [s["tokens"] for s in samples], run.cfg.num_generations
    groups = [[s["reward"] for s in samples[i:i + G] if not math.isnan(s["reward"])] for i in range(0, len(samples), G)]
    known = [r for group in groups for r in group]
    result = {"reward": statistics.fmean(known) if known else math.nan,
              "reward_std": statistics.stdev(known) if len(known) > 1 else math.nan}
    for name in samples[0]["rewards"]:
        values = [s["rewards"][name] for s in samples if s["rewards"][name] is not None]
        result[f"rewards/{name}"] = statistics.fmean(values) if values else math.nan
    return result | {
        "reward_errors": sum(len(s["complaints"]) for s in samples),
        "accuracy": statistics.fmean(s["finished"] and sft.is_right(s["text"], s["answer"]) for s in samples),
        "completions/mean_length": statistics.fmean(lengths), "completions/median_length": statistics.median(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(not s["finished"] for s in samples),
        "frac_reward_zero_std": statistics.fmean(len(set(group)) < 2 for group in groups)}


# --- one step --------------------------------------------------------------------------------------------------------

def frozen_logps(model, ids, targets, temperature):
    """Of the reference or the teacher. On CPUs the forward pass is that of training, which has another attention there, so
    that the KL to a model that is the same is exactly 0."""
    with torch.set_grad_enabled(ids.device.type == "cpu"):
        return model(ids, None, targets, "none", temperature).detach()


def learn(run, batch):
    """Gradients of the step's loss -> (this replica's part of it, its part of the metrics).

    The first pass over the answers is on-policy, and its log-probs are the old ones of the passes after it: at first the ratio
    is exactly 1, and the gradient that of -A log p.
    """
    cfg, rt, total, metrics, first = run.cfg, run.rt, 0.0, {}, not batch.old
    tokens = max(1, batch.whole[1])
    for i, part in enumerate(train.micro_batches(run.replica, len(batch.rows), cfg.micro_batch, rt)):
        rows = batch.rows[part]
        ids, targets, _ = data.chat_batch([[row] for row in rows], len(rows[-1][0]) - 1)
        ids, targets, A = train.to_device(rt, ids, targets, batch.advantages[part])
        logp, mask = run.replica(ids, None, targets, "none", cfg.temperature), targets != -100
        if first:
            batch.old.append(logp.detach())
        if run.teacher is not None:  # its preference for each sampled token: the gradient is that of the KL to it, in the mean
            A = frozen_logps(run.teacher, ids, targets, cfg.temperature) - batch.old[i]
        reference, beta = None, 0.0
        if run.reference is not None:
            reference, beta = frozen_logps(run.reference, ids, targets, cfg.temperature), cfg.beta
        loss, values = policy_loss(logp, batch.old[i], reference, A, mask, cfg.epsilon, cfg.epsilon_high, beta,
                                   cfg.loss_type, cfg.importance_sampling_level, cfg.max_new_tokens, batch.whole)
        (loss * rt.dp_size).backward()  # DDP takes the mean over replicas: times their number
        values["entropy"] = -batch.old[i].sum() / tokens  # the sampled tokens' mean -log p is an unbiased estimate of it
        recorded = torch.tensor([p for row, ps in zip(rows, batch.sampled[part]) if any(row[1]) for p in ps], device=rt.device)
        values["sampler_gap"] = (batch.old[i][mask] - recorded).abs().sum() / tokens  # rollout and training should agree
        if run.teacher is not None:
            values["kl_teacher"] = -(A * mask).sum() / tokens
        total = total + loss.detach()
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return total, {name: float(value) for name, value in metrics.items()}


# --- evaluation ------------------------------------------------------------------------------------------------------

def validate(run):
    """-> fields of a metrics row: held-out accuracy in both modes, greedy; pass@1, pass@8 and lengths of sampled answers in
    the mode that is trained. Prints a line, and one answer."""
    cfg, rt = run.cfg, run.rt
    items, _ = sft.evaluate_tasks(run.model, run.tokenizer, run.tasks, cfg, rt)
    made = sft.answers(run.model, run.tokenizer, run.tasks, cfg.mode, cfg, rt, SAMPLES, cfg.temperature)
    scores = {name: sft.mean_stderr(values)[0] for name, values in items.items()}
    flat = [a for each in made for a in each]
    scores |= {f"{cfg.mode} pass@1": statistics.fmean(a["right"] for a in flat),
               f"{cfg.mode} pass@{SAMPLES}": statistics.fmean(any(a["right"] for a in each) for each in made),
               f"{cfg.mode} sampled tokens": statistics.fmean(a["tokens"] for a in flat),
               f"{cfg.mode} sampled tokens (longest)": max(a["tokens"] for a in flat)}
    if cfg.overlong_max:
        scores[f"{cfg.mode} beyond {cfg.overlong_max}"] = statistics.fmean(a["tokens"] > cfg.overlong_max for a in flat)
    run.log.say(f"eval {run.step}: " + " | ".join(f"{name} {value:.{1 if 'tokens' in name else 3}f}"
                                                  for name, value in scores.items() if "cut off" not in name))
    show(run, dict(made[0][0], prompt=run.tasks[0]["prompt"][-1]["content"], answer=run.tasks[0]["answer"]))
    return dict(scores=scores)


def show(run, sample):
    """One answer to read, with its reward."""
    score(run, sample)
    parts = ", ".join(f"{name} {'None' if value is None else f'{value:.2f}'}" for name, value in sample["rewards"].items())
    text = sample["text"].replace("\n", "⏎")
    run.log.say(f"  {sample['prompt']:.60} -> {text:.200} [{sample['tokens']} tokens, reward {sample['reward']:.2f}: {parts}]")


# --- the run ---------------------------------------------------------------------------------------------------------

def check(cfg, rt):
    """Errors that would otherwise surface deep inside, or not at all."""
    train.refuse(cfg, dict(
        mode=("no_think", "think"), style=("", "compact", "smollm3", "chatml"), loss_type=LOSSES,
        scale_rewards=("group", "batch", "none"), importance_sampling_level=("token", "sequence")), (
        (min(cfg.steps, cfg.prompts, cfg.max_new_tokens, cfg.num_iterations) < 1,
         "--steps, --prompts, --max_new_tokens, --num_iterations: at least 1 expected"),
        (cfg.num_generations < 2 and not cfg.teacher,
         f"--num_generations={cfg.num_generations}: at least 2 expected: answers are compared with each other"),
        (cfg.num_generations < 1, f"--num_generations={cfg.num_generations}: at least 1 expected"),
        (cfg.prompts % rt.dp_size, f"--prompts={cfg.prompts}: a multiple of the {rt.dp_size} replicas expected"),
        (cfg.steps % max(1, cfg.num_iterations),
         f"--steps={cfg.steps}: a multiple of --num_iterations={cfg.num_iterations} expected"),
        (min(cfg.temperature, cfg.lr, cfg.grad_clip) <= 0, "--temperature, --lr, --grad_clip: more than 0 expected"),
        (min(cfg.epsilon, cfg.epsilon_high, cfg.beta) < 0 or cfg.epsilon >= 1,
         "--epsilon (below 1), --epsilon_high, --beta: 0 or more expected"),
        (cfg.overlong_max < 0 or not 0 <= cfg.overlong_cache <= (cfg.overlong_max or math.inf),
         f"--overlong_cache={cfg.overlong_cache}: 0 to --overlong_max={cfg.overlong_max} expected"),
        (not (cfg.rewards or cfg.overlong_max or cfg.teacher),
         "--rewards, --overlong_max, --teacher: one of them expected, else there is nothing to learn")))


def first_of(cfg):
    """What the policy begins from; "": nothing."""
    return cfg.init or next((d for d in ("out/apo", "out/sft") if nano.checkpoints(d)), "")


def open_model(cfg, rt, resuming):
    """-> (policy, what its checkpoint holds besides, the models beside it by the flag that names them, the crc of their
    files). --init is the reference, the checkpoint that the run began with."""
    init, others, crcs = first_of(cfg), {}, {}
    if init or resuming:
        model, extra = nano.load_checkpoint(cfg.out if resuming else init, rt.device, rt.tp_group)
    else:
        model, extra = train.new_model(nano.Config(), rt), dict(tokenizer="bytes", train_config={})
        print("\n!!! no checkpoint in out/apo and out/sft: starting from a small model that knows nothing and will "
              "learn nothing here, without KL (python train.py, then python sft.py, make one that does)\n")
    if resuming and extra["stage"] != "grpo":
        raise SystemExit(f"--resume: {cfg.out} holds a run of stage {extra['stage']}: --init={cfg.out} and another --out "
                         f"expected")
    for flag, directory in (("--init", init if cfg.beta else ""), ("--teacher", cfg.teacher)):
        if directory:
            other, its = nano.load_checkpoint(directory, rt.device, rt.tp_group)
            if its["tokenizer"] != extra["tokenizer"] or other.config.vocab_size != model.config.vocab_size:
                raise SystemExit(f"{flag}={directory}: the policy's tokenizer, {data.name_of(extra['tokenizer'])}, expected")
            if resuming and extra["monitor"]["others"].get(flag) != its["crc"]:
                raise SystemExit(f"--resume: {its['path']}: not the file that the run in {cfg.out} has had as its "
                                 f"{flag}")
            other.compute_dtype = rt.dtype
            others[flag], crcs[flag] = nano.inference_copy(other), its["crc"]  # never trained: half the memory
    return train.ready(model, cfg, rt), extra, others, crcs


def load_problems(cfg):
    """-> (problems to train on, held-out ones)."""
    if not cfg.problems:
        rows, held = data.sum_problems(SUMS, test=False, start=START), data.sum_problems(PROBLEMS)
    else:
        rows, held = [], []
        for row in sft.read_all("problems", cfg.problems):
            if not sft.is_problem(row):
                raise ValueError(f"--problems={cfg.problems}: problems (prompt + answer) expected")
            (held if not cfg.tasks and zlib.crc32(row["prompt"][-1]["content"].encode()) % 50 == 0 else rows).append(row)
        held = held[:PROBLEMS]
    if cfg.tasks:
        held = sft.load_tasks(cfg)
    if not rows or not held or not all(map(sft.is_problem, held)):
        raise ValueError(f"--problems, --tasks: problems (prompt + answer) to train on and others to test on expected, not "
                         f"{len(rows)} and {len(held)}")
    return rows, held


def begin(cfg, rt):
    """Models, problems, optimizers and where the run stands: everything main() needs, new or from the newest checkpoint."""
    rewards = load_rewards(cfg.rewards)
    cfg = dataclasses.replace(cfg, beta=0.0) if cfg.teacher else cfg  # there the teacher is what it stays close to
    cfg, locked, resuming = train.occupy(cfg, rt, first_of(cfg), cfg.teacher)
    model, extra, others, crcs = open_model(cfg, rt, resuming)
    before = extra["train_config"]
    date = cfg.date or resuming and before["date"] or time.strftime("%d %B %Y")  # a run does not change with the day
    cfg = dataclasses.replace(cfg, style=cfg.style or before.get("style") or "compact", date=date)
    try:
        problems, tasks = load_problems(cfg)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    mark = zlib.crc32(json.dumps(problems).encode())
    if resuming and extra["monitor"]["problems"] != mark:
        raise SystemExit(f"--resume: {cfg.out} was trained on other problems: the same --problems expected")
    tokenizer = data.get_tokenizer(extra["tokenizer"])
    run = train.start(cfg, rt, model, extra if resuming else {}, locked, "grpo", train.data_parallel(model, rt, 1, 8),
                      sampler=nano.inference_copy(model), tokenizer=tokenizer, problems=problems, tasks=tasks, rewards=rewards,
                      stop_ids=[tokenizer.special["<|im_end|>"], tokenizer.eos], reference=others.get("--init"),
                      teacher=others.get("--teacher"), complained=set())
    run.samples = lambda: f"answers to problems {run.consumed - cfg.prompts} to {run.consumed - 1} of the run's order"
    run.monitor |= dict(others=crcs, problems=mark)
    run.log.say(headline(run) + f" | resuming after step {run.step}" * resuming)
    longest = max(problems, key=lambda p: len(p["prompt"][-1]["content"]))["prompt"]
    most = len(data.render(longest, cfg.mode, cfg.style, None, cfg.date, True, tokenizer)[0]) + cfg.max_new_tokens
    if most > model.config.max_position_embeddings:
        run.log.say(f"WARNING: the longest prompt and --max_new_tokens={cfg.max_new_tokens} make {most} tokens: the model "
                    f"knows rows of {model.config.max_position_embeddings}")
    if cfg.overlong_max > cfg.max_new_tokens:
        run.log.say(f"WARNING: no answer of at most --max_new_tokens={cfg.max_new_tokens} meets the full penalty of "
                    f"--overlong_max={cfg.overlong_max}")
    if cfg.mask_truncated_completions and cfg.overlong_max >= cfg.max_new_tokens:
        run.log.say("WARNING: --mask_truncated_completions leaves the longest answers out of the loss, and with them most of "
                    "the length penalty: --overlong_max below --max_new_tokens expected")
    return run


def headline(run):
    """What is trained, on what, where."""
    cfg, rt = run.cfg, run.rt
    band = f"penalty from {cfg.overlong_max - cfg.overlong_cache} to {cfg.overlong_max}" if cfg.overlong_max else "no penalty"
    return (f"{nano.num_params(run.model.config):,} parameters, {cfg.steps:,} steps of {cfg.prompts} x {cfg.num_generations} "
            f"/{cfg.mode} answers of up to {cfg.max_new_tokens} tokens, {band} | {len(run.problems):,} problems, "
            f"{len(run.tasks)} held out | {rt.name}, {str(rt.dtype)[6:]}"
            + f" | {rt.dp_size} data-parallel x {rt.tp_size} tensor-parallel" * (rt.world_size > 1))


def told(m, norm):
    """The printed line of a step, of its metrics."""
    lengths = [m[f"completions/{k}_length"] for k in ("mean", "median", "max")]
    return " | ".join([
        f"reward {m['reward']:.3f}", f"accuracy {m['accuracy']:.3f}",
        "tokens {:.1f}, median {:.0f}, max {}".format(*lengths), f"cut off {m['completions/clipped_ratio']:.0%}",
        f"same {m['frac_reward_zero_std']:.0%}", f"entropy {m['entropy']:.3f}",
        *(f"{k} {m[k]:.4f}" for k in ("kl", "kl_teacher") if k in m),
        f"grad {norm:.2f}", f"{m['rollout_seconds']:.2f} + {m['update_seconds']:.2f} s"])


def main(cfg):
    """Train; returns the final metrics."""
    rt = infra.setup(cfg)
    if cfg.bench:
        return bench(cfg, rt)
    check(cfg, rt)
    run = begin(cfg, rt)
    cfg, log = run.cfg, run.log
    if "before" not in run.monitor:
        run.monitor["before"] = validate(run)
        log.row(step=run.step, tokens=0, seconds=0.0, **run.monitor["before"])
        log.clock = time.perf_counter()
    start, stopping = time.perf_counter() - run.seconds, False
    tokens = run.monitor.setdefault("tokens", 0)
    with Stop() as stop:
        while run.step < cfg.steps and not stopping:
            batch, metrics, _ = rollout(run)
            begun, run.consumed, tokens = time.perf_counter(), run.consumed + cfg.prompts, tokens + batch.whole[1]
            run.monitor["tokens"] = tokens
            for _ in range(min(cfg.num_iterations, cfg.steps - run.step)):
                lr = train.lr_at(run.step, cfg)
                loss, values = learn(run, batch)
                norm = float(train.clip_grad_norm(run.model, cfg.grad_clip, rt))
                loss, stopping, *sums = all_sum(rt, float(loss) / rt.tp_size, stop.signal is not None,
                                                *(v / rt.tp_size for v in values.values()))
                run.monitor["loss"] = loss
                # where nothing was learnt, momentum must not go on: Muon's steps are as long whatever it is
                if norm == 0:
                    run.bad = 0
                else:
                    train.update(run, loss, norm, lr)
                run.step += 1
                log.bar.update(1)
            run.seconds = time.perf_counter() - start
            metrics |= dict(zip(values, sums)) | dict(update_seconds=time.perf_counter() - begun)
            due = lambda every: run.step // every > (run.step - cfg.num_iterations) // every  # num_iterations of them at once
            if due(cfg.log_every) or run.step in (cfg.num_iterations, cfg.steps) or stopping:
                speed = batch.whole[1] / (metrics["rollout_seconds"] + metrics["update_seconds"])
                log.row(told(metrics, norm), step=run.step, tokens=tokens, loss=loss, lr=lr, grad_norm=norm,
                        seconds=run.seconds, tok_per_s=speed, skipped=run.skipped, **metrics)
            if due(cfg.eval_every) and run.step < cfg.steps and not stopping:
                paused = time.perf_counter()
                log.row(step=run.step, tokens=tokens, seconds=run.seconds, **validate(run))
                start += time.perf_counter() - paused
            if due(cfg.save_every) and run.step < cfg.steps and not stopping:
                train.save(run)
        train.save(run, last=True)
    result = train.finish(run, tokens, stopping, stop.signal, validate, report)
    return result | dict(before=run.monitor["before"])


def report(run, result):
    """Before and after."""
    print(f"\n{len(run.tasks)} held-out problems{'before':>24}{'after':>9}")
    for name, value in result["scores"].items():
        print(f"  {name:34}{run.monitor['before']['scores'].get(name, math.nan):9.3f}{value:9.3f}")
    print(f"\nwrote {run.out}; try: python sft.py --stage=eval --init={run.out}")


def bench(cfg, rt, steps=7):
    """Speed of whole steps on random weights, of all processes together. The shape is fixed: `small`, 8 prompts x 8 answers of
    up to 128 tokens, a reward that any text earns; what is left to the flags is how (--micro_batch, --compile, --tp, ...)."""
    cfg = dataclasses.replace(cfg, prompts=8, num_generations=8, max_new_tokens=128, overlong_max=0, mode="think",
                              style="chatml", optimizer="adamw", lr=1e-6, beta=0.0, steps=steps)
    check(cfg, rt)
    model = train.ready(train.new_model(nano.Config(**nano.PRESETS["small"]), rt), cfg, rt)
    problems = [dict(prompt=[dict(role="user", content=f"{i}+{i + 3}=")], answer="") for i in range(10, 74)]
    tokenizer = data.get_tokenizer("bytes")
    run = SimpleNamespace(cfg=cfg, rt=rt, model=model, sampler=nano.inference_copy(model), problems=problems, consumed=0,
                          replica=train.data_parallel(model, rt, 1, 8), tokenizer=tokenizer, stop_ids=[tokenizer.eos],
                          reference=None, teacher=None, complained=set(),
                          rewards={"variety": (lambda prompt, completion, answer: len(set(completion)) / 50, 1.0)})
    optimizers, seconds = train.make_optimizers(model, cfg), []
    for _ in range(steps):
        start = time.perf_counter()
        batch, metrics, _ = rollout(run)
        learn(run, batch)
        float(train.clip_grad_norm(model, cfg.grad_clip, rt))
        for o in optimizers:
            o.step(), o.zero_grad(set_to_none=True)
        if rt.device.type == "cuda":
            torch.cuda.synchronize()
        run.consumed += cfg.prompts
        seconds.append((time.perf_counter() - start, metrics["rollout_seconds"], batch.whole[1]))
    seconds = sorted(seconds[2:])  # the first ones warm up or compile
    whole, sampling, tokens = seconds[len(seconds) // 2]
    flops = 2 * nano.num_params(model.config, active=True) + nano.flops_per_token(model.config, 144)
    result = dict(bench="grpo", tok_per_s=round(tokens / whole),
                  spread=[round(n / s) for s, _, n in (seconds[-1], seconds[0])],
                  seconds_per_step=round(whole, 4), rollout_seconds=round(sampling, 4), new_tokens=tokens,
                  mfu=rt.peak and round(tokens / whole * flops / rt.peak / rt.world_size, 4),
                  mfu_convention=f"(2N + 6N + 12LHDT) FLOPs per new token / {rt.peak_source}",
                  peak_memory_bytes=infra.peak_memory(rt.device), prompts=cfg.prompts, num_generations=cfg.num_generations,
                  max_new_tokens=cfg.max_new_tokens, optimizer=cfg.optimizer, micro_batch=cfg.micro_batch, compile=cfg.compile,
                  processes=rt.world_size, tp=cfg.tp, dtype=str(rt.dtype)[6:], params=nano.num_params(model.config),
                  machine=rt.name, torch=torch.__version__)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    infra.launch(main, infra.cli(Config))
