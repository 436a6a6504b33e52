"""Post-training on given answers: chats (SFT), LoRA, preference pairs (APO, DPO, IPO), evaluation, merging.

    python sft.py                                          out/base -> out/sft: answer sums, with reasoning and without
    python sft.py --stage=apo                              out/sft -> out/apo: rather right and short than wrong or long
    python sft.py --data=chats.jsonl --init=out/base       your own chats, in any of the formats of data.py
    python sft.py --lora_rank=8 --optimizer=adamw --lr=1e-2  train small adapters beside the frozen model
    python sft.py --stage=eval --init=out/apo --against=out/sft [--tasks=problems.jsonl]
    python sft.py --stage=merge --models=out/apo:0.9,out/sft:0.1
    torchrun --nproc_per_node=2 sft.py                     two replicas; --tp=2: one model in two halves

Read main() first. What is random is a function of (seed, number of the row): a run that is resumed ends with the same bits.
"""
import dataclasses, json, math, os, statistics, sys, time, zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data, infra, model as nano, train
from infra import Machine, Stop, all_sum, gather


@dataclass
class Config(Machine):
    """The flags of sft.py, of all its stages."""
    stage: str = "sft"             # sft, apo (preference pairs, whatever the loss_type), eval, merge
    init: str = ""                 # run or Hugging Face directory to start from; default: out/base, for apo out/sft, for eval out/apo
    out: str = ""                  # run directory; default: out/STAGE
    # data
    data: str = ""                 # JSONL files, folders, patterns, NAME=PATH,...; default: sums of numbers
    style: str = ""                # chat template: compact, smollm3 or chatml; default: what init was trained with, or compact
    date: str = ""                 # "Today Date" of style smollm3; default: today
    loss_on: str = "assistant"     # assistant, or all (mid-training: the prompts too)
    max_length: int = 256          # tokens in a row; longer examples are cut
    packing: str = "bfd"           # bfd (best-fit decreasing), or one example a row: longest (padded to it), max_length
    val_fraction: float = 0.02     # held out, by the first message that is no system message
    pairs: str = "self"            # apo without --data of pairs: self (sampled, split by the verifier), or sums (demonstrated)
    # optimization
    epochs: float = 1.0            # passes over the data
    steps: int = 0                 # optimizer steps; 0: as many as the epochs take
    batch: int = 0                 # rows (apo: pairs) per step; default: 16, apo 32
    micro_batch: int = 0           # rows (apo: pairs) per forward pass and process; 0: all of them at once
    optimizer: str = "muon"        # muon or adamw, as in train.py
    lr: float = 0.0                # peak learning rate, cosine to 10 %; default: 2e-3, apo 1e-4
    warmup: float = 0.03           # fraction of the steps
    grad_clip: float = 0.2         # largest gradient norm
    lora_rank: int = 0             # width of the adapters; 0: train the model itself
    lora_alpha: float = 16.0       # their output is scaled by alpha / rank
    lora_dropout: float = 0.05     # share of their inputs set to 0 in training (not on pairs)
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # matrices that get one
    merge: bool = False            # write the adapters folded into the model at the end
    loss_type: str = "apo_zero"    # apo_zero, apo_down, sigmoid (DPO), ipo
    beta: float = 1.0              # larger: closer to the reference (the playbook has it reversed); 0.05 to 0.5 for long answers
    # evaluation, merging
    tasks: str = ""                # JSONL: prompt + answer, GSM8K, question + choices + answer, text; default: held-out sums
    against: str = ""              # eval: second checkpoint, for the paired difference
    samples: int = 1               # eval: answers per problem, sampled at temperature 1; 1: greedy
    max_new_tokens: int = 96       # longest answer
    models: str = ""               # merge: DIR:WEIGHT,DIR:WEIGHT,...
    # run
    resume: bool = False           # go on from the newest checkpoint in out, if there is one
    overwrite: bool = False        # delete the run that is in out
    log_every: int = 20            # steps between printed lines
    eval_every: int = 200          # steps between evaluations
    save_every: int = 200          # steps between checkpoints; also at the end and on signals
    wandb: bool = False            # log to Weights & Biases too
    # not knobs here, but read by what train.py lends (unannotated: no fields)
    schedule, weight_decay, z_loss, decay_embeddings = "cosine", 0.0, 0.0, False


# SmolLM3's own recipes (alignment-handbook, recipes/smollm3), for a model of its size on many GPUs; none was run here.
_RECIPE = dict(optimizer="adamw", grad_clip=0.2, micro_batch=1, compile=True)
PRESETS = {"mid": _RECIPE | dict(style="chatml", loss_on="all", lr=2e-5, epochs=5.0, batch=128, max_length=32768, out="out/mid"),
           "sft": _RECIPE | dict(style="smollm3", lr=2e-5, epochs=5.0, batch=128, max_length=65536),
           "apo": _RECIPE | dict(stage="apo", style="smollm3", lr=1e-6, epochs=1.0, batch=32, max_length=24576, warmup=0.1,
                                 beta=0.05)}
DEFAULTS = {"sft": dict(init="out/base", batch=16, lr=2e-3), "apo": dict(init="out/sft", batch=32, lr=1e-4),
            "eval": dict(init="out/apo"), "merge": {}}
NEW_PAIRS = "pairs.jsonl.0.tmp"  # a name that the next start clears away
SUMS, PROBLEMS, SELF = 12_000, 200, 3_000  # training problems of sft, held-out ones, fresh ones for --pairs=self


# --- LoRA (arXiv 2106.09685) -----------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """W x + alpha / rank · B A drop(x), W frozen. B starts at zero: at first the output is W x to the bit.

    Under tensor parallelism one of A and B is cut like W and the other one is whole on every rank, which sees a part of its
    gradient: tp_copy adds the parts up.
    """

    def __init__(self, linear, rank, scale, dropout, tp):
        super().__init__()
        (outputs, inputs), n, dim = linear.weight.shape, tp.size() if tp else 1, linear.weight.tp_dim
        self.weight, self.scale, self.dropout = linear.weight.requires_grad_(False), scale, dropout
        self.tp_A, self.tp_B = (None, tp) if dim == 1 else (tp, None)
        self.lora_A = nano.matrix(rank, inputs * (n if dim == 1 else 1), tp, 1 if dim == 1 else None)
        self.lora_B = nano.matrix(outputs * (n if dim == 0 else 1), rank, tp, 0 if dim == 0 else None)
        bound = (inputs * (n if dim == 1 else 1)) ** -0.5
        nn.init.uniform_(self.lora_A, -bound, bound), nn.init.zeros_(self.lora_B)
        self.to(linear.weight.device)

    def forward(self, x):
        a, b = nano.tp_copy(self.lora_A, self.tp_A).to(x.dtype), nano.tp_copy(self.lora_B, self.tp_B).to(x.dtype)
        added = F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)
        return F.linear(x, self.weight.to(x.dtype)) + self.scale * added

    def folded(self):
        """An ordinary Linear of the same function."""
        linear = nano.Linear(1, 1, None, 0)
        linear.weight = self.weight
        linear.weight.data = self.weight.data.float() + self.scale * self.lora_B.data @ self.lora_A.data
        return linear


def swap(model, wanted, make):
    """Replace the submodules whose last name is in `wanted` by make(submodule)."""
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in wanted:
            setattr(model.get_submodule(parent), own, make(module))


def add_lora(model, cfg, rt):
    """Freeze the model and put an adapter beside each matrix that cfg.lora_targets names."""
    targets = [t.strip() for t in cfg.lora_targets.split(",")]
    known = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nano.Linear)]
    if unknown := set(targets) - set(known):
        raise SystemExit(f"--lora_targets={cfg.lora_targets}: no {', '.join(sorted(unknown))}: some of "
                         f"{','.join(sorted(set(known)))} expected")
    model.requires_grad_(False)
    dropout = cfg.lora_dropout if cfg.stage == "sft" else 0.0  # pairs are compared with a reference that has none
    swap(model, targets, lambda m: LoRALinear(m, cfg.lora_rank, cfg.lora_alpha / cfg.lora_rank, dropout, model.tp))
    train.share(model, rt)


def fold_lora(model):
    """The adapters become part of the matrices; what was frozen is an ordinary parameter again."""
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    swap(model, names, LoRALinear.folded)
    model.requires_grad_(True)


# --- losses ----------------------------------------------------------------------------------------------------------

def preference_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, loss_type, lengths=None):
    """-> (mean loss over the pairs, {name: (B,)} under TRL's names). Arguments (B,): log-probs summed over the tokens of an
    answer, by the policy (pi) and by the reference. lengths, for ipo: (tokens of chosen (B,), of rejected (B,)), by which TRL
    divides; without them it is the paper's sum.

    DPO's sigmoid (arXiv 2305.18290) looks at the difference alone and is content when both answers become unlikely. APO (arXiv
    2408.06266) anchors each: apo_zero lifts chosen and pushes rejected, for answers better than the model's own; apo_down
    pushes both, rejected more, where the model is the better one. IPO: arXiv 2310.12036. A larger beta keeps the policy closer.
    """
    chosen, rejected = pi_chosen - ref_chosen, pi_rejected - ref_rejected
    if loss_type == "sigmoid":
        loss = -F.logsigmoid(beta * (chosen - rejected))
    elif loss_type == "apo_zero":
        loss = 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    elif loss_type == "apo_down":
        loss = torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))
    elif loss_type == "ipo":
        n_chosen, n_rejected = lengths or (1, 1)
        loss = (chosen / n_chosen - rejected / n_rejected - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"--loss_type={loss_type}: apo_zero, apo_down, sigmoid or ipo expected")
    chosen, rejected = beta * chosen.detach(), beta * rejected.detach()
    return loss.mean(), {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                         "rewards/accuracies": (chosen > rejected).float(), "logps/chosen": pi_chosen.detach(),
                         "logps/rejected": pi_rejected.detach()}


def learn_chats(run, batch):
    """Gradients of the mean loss over the step's trained tokens -> (this replica's part of it, {})."""
    return train.forward_backward(run.replica, batch, run.cfg, run.rt), {}


def learn_pairs(run, batch):
    """Gradients of the mean loss over the step's pairs -> (this replica's part of it, its part of the mean metrics)."""
    (ids, targets, _), reference = batch
    cfg, rt, total, metrics = run.cfg, run.rt, 0.0, {}
    for pairs in train.micro_batches(run.replica, len(reference), cfg.micro_batch, rt):
        rows = slice(2 * pairs.start, 2 * pairs.stop)  # chosen, rejected, chosen, rejected, ...
        x, y, ref = train.to_device(rt, ids[rows], targets[rows], reference[pairs])
        logps, counts = run.replica(x, None, y, reduction="none").sum(1), (y != -100).sum(1)
        loss, values = preference_loss(logps[::2], logps[1::2], ref[:, 0], ref[:, 1], cfg.beta, cfg.loss_type,
                                       (counts[::2], counts[1::2]))
        part = loss * len(ref) / cfg.batch
        (part * rt.dp_size).backward()
        total = total + part.detach()
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value.sum() / cfg.batch
    return total, {name: float(value) for name, value in metrics.items()}  # the device is waited for once, at the end


@torch.no_grad()
def logp_sums(model, rows, rt, places=16384):
    """rows, a list of (ids, mask) -> (n,) log-probs summed over their trained tokens, on the CPU; replicas share the work.
    On CPUs the forward pass is that of training, which has its own attention there, so that a ratio can be just 1."""
    sums, order = torch.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i][0]))[rt.dp_rank::rt.dp_size]
    while order:
        T = len(rows[order[-1]][0])
        some, order = order[-max(1, places // T):], order[:-max(1, places // T)]
        ids, targets, _ = data.chat_batch([[rows[i]] for i in some], T)
        with torch.set_grad_enabled(rt.device.type == "cpu"):  # elsewhere it would only keep what a backward pass needs
            logps = model(*train.to_device(rt, ids), None, *train.to_device(rt, targets), reduction="none")
        sums[some] = logps.detach().sum(1).cpu()
    return sum(gather(rt, sums)) / rt.tp_size


# --- data ------------------------------------------------------------------------------------------------------------

def encode_chat(row, cfg, tokenizer):
    """A normalized row -> [(ids, mask)], or ValueError."""
    if "text" in row:
        ids = tokenizer.encode(row["text"]) + [tokenizer.eos]
        return [(ids, [1] * len(ids))]
    if "messages" not in row:
        raise ValueError(f"{' + '.join(row)}: expected chats or texts (pairs: --stage=apo; problems: --tasks, --pairs=self)")
    return [data.render(row["messages"], row["mode"], cfg.style, row.get("tools"), cfg.date, tokenizer=tokenizer,
                        loss_on=cfg.loss_on)]


def encode_pair(row, cfg, tokenizer):
    """A normalized pair -> [chosen (ids, mask), rejected (ids, mask)]. What they share is not trained: in DPO's difference it
    would cancel, in APO's two separate terms it would not."""
    if "chosen" not in row:
        raise ValueError(f"{' + '.join(row)}: expected prompt + chosen + rejected")
    how = dict(mode=row["mode"], style=cfg.style, tools=row.get("tools"), date=cfg.date, tokenizer=tokenizer)
    shared, result = len(data.render(row["prompt"], add_generation_prompt=True, **how)[0]), []
    if shared >= cfg.max_length:
        raise data.Dropped("a prompt of max_length or more tokens")
    for answer in (row["chosen"], row["rejected"]):
        ids, mask = data.render(row["prompt"] + answer, **how)
        result.append((ids, [0] * shared + mask[shared:]))
    return result


def encode_all(rows, encode, cfg, tokenizer, dropped):
    """(where, normalized row) each -> two lists of encoded examples, for training and held out. Cut to max_length; what has
    no trained token then is dropped and counted, and so are cuts."""
    parts, cuts = ([], []), 0
    for where, row in rows:
        try:
            example = encode(row, cfg, tokenizer)
            cuts += any(len(ids) > cfg.max_length for ids, _ in example)
            example = [(ids[:cfg.max_length], mask[:cfg.max_length]) for ids, mask in example]
            if not all(any(mask[1:]) for _, mask in example):
                raise data.Dropped("no trained token within max_length")
        except data.Dropped as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
            continue
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        asked = [m["content"] for m in row.get("messages") or row.get("prompt") or () if m["role"] != "system"]
        first = asked[0] if asked else row.get("text", "")
        held_out = zlib.crc32(first.encode()) < cfg.val_fraction * 2**32  # all answers to it, or none
        parts[held_out].append(example)
    return *parts, cuts


def load(cfg, encode, tokenizer, default):
    """-> (examples for training, held-out ones), from cfg.data or the (name, rows) of `default`; prints what there is."""
    sources, train_part, val_part, lines, total = [default] if default else [], [], [], [], 0
    for name, files in data.find_files("data", cfg.data) if not default else ():
        dropped = {}
        sources.append((name, [row for f in files for row in data.read_examples(f, dropped)], dropped))
    for name, rows, dropped in sources:
        kept, held, cuts = encode_all(rows, encode, cfg, tokenizer, dropped)
        tokens = sum(len(ids) for example in kept for ids, _ in example)
        trained = sum(sum(mask) for example in kept for _, mask in example)
        train_part, val_part, total = train_part + kept, val_part + held, total + trained
        why = "".join(f"; dropped {n}: {reason}" for reason, n in dropped.items())
        lines.append((name, len(kept), len(held), tokens, trained, f"{cuts} cut" * bool(cuts) + why))
    print(f"{'source':16}{'examples':>9}{'held out':>9}{'tokens':>11}{'trained':>11}  share of what is trained")
    for name, kept, held, tokens, trained, notes in lines:
        print(f"{name:16}{kept:9,}{held:9,}{tokens:11,}{trained:11,}{trained / max(1, total):7.1%}  {notes}")
    if not train_part:
        raise ValueError("no example has a trained token: expected some data (--max_length cuts examples)")
    return train_part, val_part


def read_all(flag, spec):
    """All normalized rows of the files that a flag names."""
    return [row for _, files in data.find_files(flag, spec) for f in files for _, row in data.read_examples(f, {})]


def is_problem(row):
    """A question with one exact answer."""
    return "answer" in row and "choices" not in row


def pack(examples, cfg):
    """[[(ids, mask)], ...] -> rows for data.chat_batch."""
    flat = [x for example in examples for x in example]
    if cfg.packing != "bfd":
        return [[x] for x in flat]
    return [[flat[i] for i in row] for row in data.pack_best_fit([len(ids) - 1 for ids, _ in flat], cfg.max_length)]


def self_pairs(model, tokenizer, cfg, rt):
    """Four answers by the model to each problem in each mode -> pairs, normalized: the shortest right one over a wrong one, or
    over one that is right but 1.5 times as long. None from a problem whose answers do not differ so."""
    tasks = read_all("data", cfg.data) if cfg.data else data.sum_problems(SELF, test=False, start=SUMS)
    if not all(is_problem(t) for t in tasks):
        raise ValueError(f"--data={cfg.data}: pairs (prompt + chosen + rejected) or problems (prompt + answer) expected")
    pairs = []
    for mode in ("think", "no_think"):
        for task, made in zip(tasks, answers(model, tokenizer, tasks, mode, cfg, rt, samples=4, temperature=1.0)):
            right = sorted((a for a in made if a["right"]), key=lambda a: a["tokens"])
            worse = [a for a in made if a["finished"] and not a["right"]]
            worse += [a for a in right if a["tokens"] >= 1.5 * right[0]["tokens"]][::-1]
            if right and worse:
                chosen, rejected = (data.as_messages(a["text"], "assistant") for a in (right[0], worse[0]))
                pairs.append(dict(prompt=task["prompt"], chosen=chosen, rejected=rejected, mode=mode))
    return pairs


def pairs_of(cfg, rt, model, tokenizer, resuming):
    """Where the pairs come from, as `load` takes it; None: cfg.data. Sampled ones are kept beside the run."""
    path = Path(cfg.out) / ("pairs.jsonl" if resuming else NEW_PAIRS)  # renamed when the old run is over
    if cfg.data and any("chosen" in row for row in read_all("data", cfg.data)):
        return None
    if cfg.pairs == "sums":
        if cfg.data:
            raise ValueError(f"--pairs=sums: no --data={cfg.data} expected, there are no pairs in it")
        return "sums", [(f"pair {i}", row) for i, row in enumerate(data.sum_pairs(3000))], {}
    if not resuming:
        pairs = self_pairs(model, tokenizer, cfg, rt)
        if not pairs:
            raise ValueError("--pairs=self: expected problems to which the model gives both right and wrong answers")
        if rt.rank == 0:
            with infra.atomic(path) as f:
                f.write("".join(json.dumps(p) + "\n" for p in pairs).encode())
        all_sum(rt, 0)
    elif not path.exists():
        raise ValueError(f"--resume: no {path}: the --data or --pairs that the run in {cfg.out} began with expected")
    dropped = {}
    return "self", list(data.read_examples(path, dropped)), dropped


# --- evaluation ------------------------------------------------------------------------------------------------------

def is_right(text, answer):
    """Is the last line of what follows the last </think>, or what follows #### there, the answer? Nothing is evaluated, and a
    thought that does not end is no answer."""
    said = text.rpartition("</think>")[2]
    lines = [] if "<think>" in said else said.strip().splitlines()
    return bool(lines) and data.clean_answer(lines[-1].rpartition("####")[2]) == data.clean_answer(answer)


def answers(model, tokenizer, tasks, mode, cfg, rt, samples=1, temperature=0.0, batch=128):
    """The model's answers -> for each task a list of `samples` dicts: text, tokens (with the end token), finished, right.
    Replicas share the work; an answer depends on (seed, its number) alone."""
    end, model_was = tokenizer.special["<|im_end|>"], model.training
    prompts = [data.render(t["prompt"], mode, cfg.style, None, cfg.date, True, tokenizer)[0] for t in tasks]
    jobs = sorted(range(len(tasks) * samples), key=lambda j: len(prompts[j // samples]))[rt.dp_rank::rt.dp_size]
    made = {}
    model.eval()
    for i in range(0, len(jobs), batch):
        some = jobs[i:i + batch]
        out = nano.generate(model, [prompts[j // samples] for j in some], cfg.max_new_tokens, temperature,
                            stop_ids=[end, tokenizer.eos], seed=[(cfg.seed, j) for j in some])
        for j, (ids, _) in zip(some, out):
            finished = ids[-1] in (end, tokenizer.eos)
            text = tokenizer.decode(ids[:-1] if finished else ids)
            right = finished and is_right(text, tasks[j // samples]["answer"])
            made[j] = dict(text=text, tokens=len(ids), finished=finished, right=right)
    model.train(model_was)
    made = {j: a for part in gather(rt, made) for j, a in part.items()}
    return [[made[i * samples + s] for s in range(samples)] for i in range(len(tasks))]


def mean_stderr(values):
    """-> (mean, its standard error)."""
    n = len(values)
    return sum(values) / n, statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def evaluate_tasks(model, tokenizer, tasks, cfg, rt, samples=1):
    """{score: list of one number per item}, {mode: list of answers} for tasks of any kind: problems in both modes, multiple
    choice by log-prob per character of each choice (the playbook's cloze form, which small models can do), text in bits per
    byte."""
    items, given = {}, {}
    problems = list(filter(is_problem, tasks))
    for mode in ("think", "no_think") if problems else ():
        made = given[mode] = answers(model, tokenizer, problems, mode, cfg, rt, samples, float(samples > 1))
        items[f"{mode} accuracy"] = [sum(a["right"] for a in each) / samples for each in made]
        if samples > 1:
            items[f"{mode} pass@{samples}"] = [float(any(a["right"] for a in each)) for each in made]
        items[f"{mode} tokens"] = [sum(a["tokens"] for a in each) / samples for each in made]
        items[f"{mode} cut off"] = [sum(not a["finished"] for a in each) / samples for each in made]
    choice, rows, texts = [t for t in tasks if "choices" in t], [], [t["text"] for t in tasks if t.get("text")]
    for t in choice:
        prompt = tokenizer.encode("Question: " + t["prompt"][-1]["content"] + "\nAnswer:")
        said = [tokenizer.encode(" " + c) for c in t["choices"]]
        rows += [(prompt + ids, [0] * len(prompt) + [1] * len(ids)) for ids in said]
    window, windows = model.config.max_position_embeddings, []
    for text in texts:  # a window's first token is the last one of the window before it
        ids = [tokenizer.eos] + tokenizer.encode(text)
        parts = [ids[i:i + window + 1] for i in range(0, len(ids) - 1, window)]
        windows.append(len(parts))
        rows += [(part, [1] * len(part)) for part in parts]
    sums = logp_sums(model, rows, rt).tolist() if rows else []
    for t in choice:
        scores = [sums.pop(0) / len(c) for c in t["choices"]]
        items.setdefault("multiple choice", []).append(float(scores.index(max(scores)) == t["answer"]))
    for text, n in zip(texts, windows):
        logp, sums = sum(sums[:n]), sums[n:]
        items.setdefault("bits per byte", []).append(-logp / math.log(2) / max(1, len(text.encode())))
    return items, given


def load_tasks(cfg):
    """cfg.tasks, or the held-out sums; [] where the data are the user's and come without tasks."""
    if cfg.tasks:
        tasks = read_all("tasks", cfg.tasks)
        if not any("answer" in t or "text" in t for t in tasks):
            raise ValueError(f"--tasks={cfg.tasks}: problems (prompt + answer), question + choices + answer, or text expected")
        return tasks
    return [] if cfg.data and cfg.stage != "eval" else data.sum_problems(PROBLEMS)


def show_scores(columns):
    """A table of {name of a model: items}; with two models their paired difference."""
    first, *rest = columns.values()
    print(f"\n{'':20}{'items':>6}" + "".join(f"{name:>20}" for name in columns) + f"{'difference':>20}" * bool(rest))
    for score, values in first.items():
        cells = [mean_stderr(items[score]) for items in columns.values()]
        if rest and len(rest[0][score]) == len(values):
            cells.append(mean_stderr([b - a for a, b in zip(values, rest[0][score])]))
        line = "".join(f"{m:11.3f} ± {e:5.3f} " for m, e in cells)
        medians = " (median " + ", ".join(f"{statistics.median(items[score]):.0f}" for items in columns.values()) + ")"
        print(f"{score:20}{len(values):6,}{line}" + medians * score.endswith("tokens"))


def evaluation(cfg, rt):
    """--stage=eval: one model or two on the same tasks; their answers go to out/NAME.jsonl, the scores to out/scores.json."""
    try:
        tasks, columns, out = load_tasks(cfg), {}, Path(cfg.out)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    for directory in filter(None, (cfg.against, cfg.init)):
        model, extra = nano.load_checkpoint(directory, rt.device, rt.tp_group)
        model.compute_dtype, tokenizer = rt.dtype, data.get_tokenizer(extra["tokenizer"])
        own = dataclasses.replace(cfg, style=cfg.style or extra["train_config"].get("style") or "compact")
        items, given = evaluate_tasks(model, tokenizer, tasks, own, rt, cfg.samples)
        name = Path(directory).name if Path(directory).name not in columns else str(directory)
        columns[name] = items
        if rt.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            problems = list(filter(is_problem, tasks))
            with infra.atomic(out / f"{name.replace('/', '_')}.jsonl") as f:
                for mode, made in given.items():
                    for t, each in zip(problems, made):
                        f.write((json.dumps(t | dict(mode=mode, answers=each)) + "\n").encode())
    result = {name: {score: dict(zip(("mean", "stderr"), mean_stderr(v)), items=len(v)) for score, v in items.items()}
              for name, items in columns.items()}
    show_scores(columns)
    if rt.rank == 0:
        infra.write_json(out / "scores.json", infra.finite(result))
    print(f"\nwrote {out}/scores.json and the answers beside it")
    return result


def validate(run):
    """-> fields of a metrics row: loss on held-out examples, accuracy on problems in both modes; prints a line."""
    cfg, rt, fields, said = run.cfg, run.rt, {}, []
    if run.held:
        run.model.eval()
        if cfg.stage == "apo":
            sums = logp_sums(run.model, [x for pair in run.held for x in pair], rt).view(-1, 2)
            lengths = torch.tensor([[sum(x[1]) for x in pair] for pair in run.held])
            loss, values = preference_loss(*sums.T, *run.held_reference.T, cfg.beta, cfg.loss_type, tuple(lengths.T))
            fields = dict(val_loss=float(loss)) | {f"val_{k}": float(v.mean()) for k, v in values.items()}
            said = [f"held-out pairs {float(loss):.4f}, margin {fields['val_rewards/margins']:.3f}"]
        else:
            flat = [x for example in run.held for x in example]
            nll, count = -float(logp_sums(run.model, flat, rt).sum()), sum(sum(mask[1:]) for _, mask in flat)
            fields, said = dict(val_loss=nll / count), [f"held-out loss {nll / count:.4f}"]
        run.model.train()
    if run.tasks:
        items, _ = evaluate_tasks(run.model, run.tokenizer, run.tasks, cfg, rt)
        fields["scores"] = {score: mean_stderr(v)[0] for score, v in items.items()}
        fields["scores"] |= {f"{s} (median)": statistics.median(v) for s, v in items.items() if s.endswith("tokens")}
        said += [f"{s} {v:.3f}" for s, v in fields["scores"].items() if "tokens" not in s and "cut off" not in s]
    run.log.say(f"eval {run.step}: " + " | ".join(said or ["nothing is held out"]))
    return fields


# --- merging ---------------------------------------------------------------------------------------------------------

def merging(cfg, rt):
    """--stage=merge: the weighted mean of checkpoints, as SmolLM3 ended (0.9 of APO's, 0.1 of mid-training's)."""
    merged, longest, out = None, 1, Path(cfg.out)
    try:
        models = [(d, float(w)) for d, _, w in (item.rpartition(":") for item in cfg.models.split(","))]
    except ValueError:
        raise SystemExit(f"--models={cfg.models}: DIR:WEIGHT,DIR:WEIGHT,... expected") from None
    if not abs(sum(w for _, w in models) - 1) <= 1e-6:  # nan is not 1 either
        raise SystemExit(f"--models={cfg.models}: weights that add up to 1 expected")
    locked = infra.lock(out)
    if nano.checkpoints(out) and not cfg.overwrite:
        raise SystemExit(f"{out}: holds a checkpoint: --overwrite replaces it, --out=DIR leaves it alone")
    for directory, weight in models:
        state = nano.read_checkpoint(directory)
        shape = dataclasses.replace(state["model_config"], max_position_embeddings=1)  # the longest rows of all
        longest = max(state["model_config"].max_position_embeddings, longest)
        if merged and (shape, state["tokenizer"]) != (merged["model_config"], merged["tokenizer"]):
            raise SystemExit(f"{directory}: another shape or tokenizer than {models[0][0]}")
        model = {n: weight * p + (merged["model"][n] if merged else 0) for n, p in state["model"].items()}
        merged = (merged or state) | dict(model=model, model_config=shape)
    model = nano.Transformer(dataclasses.replace(merged["model_config"], max_position_embeddings=longest), init=False)
    model.load_state_dict(merged["model"])
    path = nano.save_checkpoint(out, model, merged["step"], 0, "merge", merged["tokenizer"], keep=sys.maxsize,
                                train_config=dataclasses.asdict(cfg) | {k: merged["train_config"].get(k, "")
                                                                        for k in ("style", "data")})
    for other in set(nano.checkpoints(out)) - {path}:
        other.unlink()
    locked.close()
    print(f"wrote {path}: " + " + ".join(f"{w:g} x {d}" for d, w in models))
    return dict(step=merged["step"], out=str(out))


# --- the run ---------------------------------------------------------------------------------------------------------

def check(cfg, rt):
    """Fill in what depends on the stage; errors that would otherwise surface deep inside."""
    if cfg.stage not in DEFAULTS:
        raise SystemExit(f"--stage={cfg.stage}: sft, apo, eval or merge expected")
    defaults, learns = DEFAULTS[cfg.stage] | dict(out=f"out/{cfg.stage}"), cfg.stage in ("sft", "apo")
    missing = {k: v for k, v in defaults.items() if not (getattr(cfg, k) or k == "init" and learns)}  # open_model finds that
    cfg = dataclasses.replace(cfg, **missing)
    rows = cfg.batch // rt.dp_size
    train.refuse(cfg, dict(
        style=("", "compact", "smollm3", "chatml"), loss_on=("assistant", "all"), pairs=("self", "sums"),
        packing=("bfd", "longest", "max_length"), loss_type=("apo_zero", "apo_down", "sigmoid", "ipo")), (
        (cfg.stage == "merge" and rt.world_size > 1, "--stage=merge: one process expected, without torchrun"),
        (min(cfg.max_length, cfg.samples, cfg.max_new_tokens) < 1,
         "--max_length, --samples, --max_new_tokens: at least 1 expected"),
        (cfg.steps < 0 or not cfg.steps and cfg.epochs <= 0, "--steps or --epochs: more than 0 expected"),
        (learns and min(cfg.batch, cfg.lr, cfg.grad_clip, cfg.beta) <= 0,
         f"--batch={cfg.batch}, --lr={cfg.lr}, --grad_clip={cfg.grad_clip}, --beta={cfg.beta}: more than 0 expected"),
        (not 0 <= cfg.val_fraction < 1, f"--val_fraction={cfg.val_fraction}: 0 to 1 expected"),
        (cfg.lora_rank < 0 or not 0 <= cfg.lora_dropout < 1, "--lora_rank: 0 or more, --lora_dropout: 0 to 1 expected"),
        (cfg.merge and not cfg.lora_rank, "--merge: --lora_rank expected (two models: --stage=merge)"),
        (cfg.batch % rt.dp_size, f"--batch={cfg.batch}: a multiple of the {rt.dp_size} replicas expected"),
        (cfg.micro_batch and rows % cfg.micro_batch,
         f"--micro_batch={cfg.micro_batch}: a divisor of each process's {rows} rows expected")))
    return cfg


def open_model(cfg, rt, resuming):
    """-> (model, what its checkpoint holds besides, run.lora). From cfg.init or the stage's default, else a small new one."""
    default = DEFAULTS[cfg.stage]["init"]
    init = cfg.init or (default if nano.checkpoints(default) else "")
    here = nano.read_checkpoint(cfg.out, fold=False) if resuming else None
    if resuming and bool(here["lora"]) != bool(cfg.lora_rank):
        what = "adapters" if here["lora"] else "a whole model"
        raise SystemExit(f"--resume: {cfg.out} holds {what}: --init={cfg.out} and another --out expected")
    if resuming and not cfg.lora_rank:
        model, extra = nano.load_checkpoint(here, rt.device, rt.tp_group)
    elif init:
        theirs = any(Path(init).glob("*.safetensors"))
        dtype = rt.dtype if cfg.lora_rank and theirs else torch.float32  # a frozen 3B in half the memory
        model, extra = nano.load_checkpoint(init, rt.device, rt.tp_group, dtype)
    else:
        print(f"\n!!! no checkpoint in {default}: starting from a small model that knows nothing "
              f"(python train.py makes one that does)\n")
        model, extra = train.new_model(nano.Config(), rt), dict(tokenizer="bytes", train_config={})
    lora = None
    if cfg.lora_rank:
        if "path" not in extra:
            raise SystemExit("--lora_rank: a checkpoint to adapt expected (--init=DIR; python train.py writes out/base)")
        add_lora(model, cfg, rt)
        base = os.path.relpath(extra["path"], cfg.out)
        lora = dict(scale=cfg.lora_alpha / cfg.lora_rank, base=base, crc=extra["crc"])
    if lora and resuming:
        if any(here["train_config"][k] != getattr(cfg, k) for k in ("lora_rank", "lora_alpha", "lora_targets")):
            raise SystemExit(f"--resume: {cfg.out} has other --lora_rank, --lora_alpha, --lora_targets: the same expected")
        if here["lora"]["crc"] != lora["crc"]:
            raise SystemExit(f"--resume: {extra['path']}: not the file that the adapters in {cfg.out} were trained on")
        model.load_state_dict({n: nano.shard(here["model"][n], p.tp_dim, rt.tp_group)
                               for n, p in model.named_parameters() if p.requires_grad}, strict=False)
        extra = here
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, cfg.max_length)
    return train.ready(model, cfg, rt), extra, lora


def begin(cfg, rt):
    """Model, data, optimizers and where the run stands: everything main() needs, new or from the newest checkpoint."""
    cfg, locked, resuming = train.occupy(cfg, rt, cfg.init or DEFAULTS[cfg.stage]["init"])
    model, extra, lora = open_model(cfg, rt, resuming)
    before = extra["train_config"]
    if resuming and extra["stage"] != cfg.stage:
        raise SystemExit(f"--resume: {cfg.out} holds a run of stage {extra['stage']}: --init={cfg.out} and another --out "
                         f"expected")
    date = cfg.date or resuming and before["date"] or time.strftime("%d %B %Y")  # a run does not change with the day
    cfg = dataclasses.replace(cfg, style=cfg.style or before.get("style") or "compact", date=date)
    try:
        tokenizer, tasks = data.get_tokenizer(extra["tokenizer"]), load_tasks(cfg)
        if cfg.stage == "apo":
            examples, held = load(cfg, encode_pair, tokenizer, pairs_of(cfg, rt, model, tokenizer, resuming))
        else:
            sums = None if cfg.data else ("sums", [(f"chat {i}", row) for i, row in enumerate(data.sum_chats(SUMS))], {})
            examples, held = load(cfg, encode_chat, tokenizer, sums)
            examples = pack(examples, cfg)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    cfg = dataclasses.replace(cfg, steps=cfg.steps or max(1, math.ceil(cfg.epochs * len(examples) / cfg.batch)))
    T = max(len(x[0]) for pair in examples for x in pair) if cfg.stage == "apo" else cfg.max_length
    rows = (cfg.micro_batch or cfg.batch // rt.dp_size) * (2 if cfg.stage == "apo" else 1)
    mark = fingerprint(examples)
    if resuming and extra["monitor"]["data"] != mark:
        raise SystemExit(f"--resume: {cfg.out} was trained on other examples: the same --data and --max_length expected")
    run = train.start(cfg, rt, model, extra if resuming else {}, locked, cfg.stage, train.data_parallel(model, rt, rows, T),
                      lora=lora, tokenizer=tokenizer, tasks=tasks, examples=examples, held=held)
    run.samples = lambda: f"rows {run.consumed} to {run.consumed + cfg.batch - 1} of the run's order"
    run.monitor["data"] = mark
    run.monitor.setdefault("tokens", run.consumed * cfg.max_length)
    if cfg.stage == "apo":
        if not resuming:
            if rt.rank == 0 and (new := run.out / NEW_PAIRS).exists():
                new.replace(run.out / "pairs.jsonl")
            run.monitor["reference"] = logp_sums(model, [x for pair in examples + held for x in pair], rt).view(-1, 2)
        run.reference, run.held_reference = run.monitor["reference"].split([len(examples), len(held)])
    run.log.say(headline(run) + f" | resuming after step {run.step}" * resuming)
    return run


def headline(run):
    """What is trained, on what, where."""
    cfg, rt, model = run.cfg, run.rt, run.model
    trained = sum(p.numel() * (rt.tp_size if p.tp_dim is not None else 1) for p in model.parameters() if p.requires_grad)
    what = "pairs" if cfg.stage == "apo" else f"rows of {cfg.max_length}"
    return (f"{nano.num_params(model.config):,} parameters and {trained:,} trained, {cfg.steps:,} steps of {cfg.batch} {what}"
            f" | {rt.name}, {str(rt.dtype)[6:]} | template {cfg.style}"
            + f" | {rt.dp_size} data-parallel x {rt.tp_size} tensor-parallel" * (rt.world_size > 1))


def fingerprint(examples):
    """One number that tells other data, or another order of them."""
    crc = 0
    for x in (x for example in examples for x in example):
        crc = zlib.crc32(np.array(x, np.int32), crc)
    return crc


def next_batch(run):
    """The step's batch, or this replica's part of it. Row k of the run is row k mod n of the shuffle number k // n."""
    n, size, rt = len(run.examples), run.cfg.batch // run.rt.dp_size, run.rt
    start = run.consumed + rt.dp_rank * size
    picked = [data.permute(k % n, n, (run.cfg.seed, k // n)) for k in range(start, start + size)]
    apo, T = run.cfg.stage == "apo", run.cfg.max_length
    rows = [[answer] for i in picked for answer in run.examples[i]] if apo else [run.examples[i] for i in picked]
    if apo or run.cfg.packing == "longest":
        T = max(len(row[0][0]) for row in rows) - 1
    batch = data.chat_batch(rows, T)
    return (batch, run.reference[picked]) if apo else batch


def main(cfg):
    """One stage; returns its final metrics."""
    rt = infra.setup(cfg)
    cfg = check(cfg, rt)
    if cfg.stage in ("eval", "merge"):
        return (evaluation if cfg.stage == "eval" else merging)(cfg, rt)
    run = begin(cfg, rt)
    cfg, log, learn = run.cfg, run.log, learn_pairs if run.cfg.stage == "apo" else learn_chats
    if "before" not in run.monitor:
        run.monitor["before"] = validate(run)
        log.row(step=run.step, tokens=0, seconds=0.0, **run.monitor["before"])
        log.clock = time.perf_counter()
    stopping, clock, seconds_then, trained, places = False, time.perf_counter(), run.seconds, 0, 0
    with Stop() as stop:
        while run.step < cfg.steps and not stopping:
            if cfg.lora_dropout and cfg.lora_rank:  # the one thing here that draws from torch's generator
                torch.manual_seed(zlib.crc32(f"{cfg.seed} {run.step} {rt.dp_rank}".encode()))
            batch, lr = next_batch(run), train.lr_at(run.step, cfg)
            loss, metrics = learn(run, batch)
            norm = float(train.clip_grad_norm(run.model, cfg.grad_clip, rt))
            targets = batch[0][1] if cfg.stage == "apo" else batch[1]
            loss, stopping, counted, seen, *values = all_sum(
                rt, float(loss) / rt.tp_size, stop.signal is not None, int((targets != -100).sum()) / rt.tp_size,
                targets.numel() / rt.tp_size, *(v / rt.tp_size for v in metrics.values()))
            trained, places, run.monitor["loss"] = trained + counted, places + seen, loss
            run.monitor["tokens"] += int(seen)  # padding, too
            train.update(run, loss, norm, lr)
            now = time.perf_counter()
            run.step, run.consumed = run.step + 1, run.consumed + cfg.batch
            run.seconds, clock = run.seconds + now - clock, now
            log.bar.update(1)
            if run.step % cfg.log_every == 0 or run.step in (1, cfg.steps) or stopping:
                took = run.seconds - seconds_then
                metrics = dict(zip(metrics, values))
                line = f"loss {loss:.4f} | lr {lr:.1e} | grad {norm:.2f} | {places / took / 1000:.1f}k tok/s, of which "
                line += f"{trained / took / 1000:.2f}k trained"
                line += "".join(f" | {k.removeprefix('rewards/')} {v:.3f}" for k, v in metrics.items() if "rewards" in k)
                log.row(line, step=run.step, tokens=run.monitor["tokens"], loss=loss, lr=lr, grad_norm=norm,
                        tok_per_s=places / took, trained_tok_per_s=trained / took, seconds=run.seconds, skipped=run.skipped,
                        **metrics)
                seconds_then, trained, places = run.seconds, 0, 0
            if run.step % cfg.eval_every == 0 and run.step < cfg.steps and not stopping:
                log.row(step=run.step, tokens=run.monitor["tokens"], seconds=run.seconds, **validate(run))
                clock = time.perf_counter()  # evaluation is not training time
            if run.step % cfg.save_every == 0 and run.step < cfg.steps and not stopping:
                train.save(run)
        if cfg.merge and not stopping:
            fold_lora(run.model)
            run.lora, run.optimizers = None, []
        train.save(run, last=True)
    result = train.finish(run, run.monitor["tokens"], stopping, stop.signal, validate, report)
    return result | dict(before=run.monitor["before"])


def report(run, result):
    """Before and after, and some answers to read."""
    before, after = run.monitor["before"].get("scores", {}), result.get("scores", {})
    if after:
        print(f"\n{len(run.tasks)} held-out problems{'before':>16}{'after':>9}")
    for score in after:
        print(f"  {score:26}{before.get(score, math.nan):9.3f}{after[score]:9.3f}")
    problems = list(filter(is_problem, run.tasks))[:3]
    for mode in ("think", "no_think") if problems else ():
        for task, (made,) in zip(problems, answers(run.model, run.tokenizer, problems, mode, run.cfg, run.rt)):
            print(f"\n/{mode}  {task['prompt'][-1]['content']}\n{made['text']}   [{'right' if made['right'] else 'wrong'}]")
    print(f"\nwrote {run.out}; try: python sft.py --stage=eval --init={run.out}")


if __name__ == "__main__":
    infra.launch(main, infra.cli(Config, PRESETS))
