"""Pre-training: from text to a base model, with the playbook's schedule, optimizers, evaluation and care for the run.

    python train.py                                        1M parameters on the built-in corpora, minutes on 2 cores
    python train.py shakespeare --text=input.txt           one file of text, as quick as it gets
    python train.py small --text='books/*.txt' --steps=2000 --compile
    python train.py --resume                               after Ctrl-C, SIGTERM or a crash: the same run, bit for bit
    torchrun --nproc_per_node=4 train.py --tp=2            4 processes: 2 replicas (data-parallel), each a model in 2 halves
    python train.py smollm3-3b --bench --vocab_size=128256 throughput of a shape on this machine, one JSON line
    python train.py --ablate="num_key_value_heads=4,1;optimizer=adamw" --seeds=3   one change at a time, with its noise
    python train.py --sweep="lr=2e-3,4e-3,8e-3;batch_tokens=1024,2048"             all combinations, the best marked
    python train.py --passkey=256,1024 --steps=600 --out=out/key                   can it find a key in a long row?

Read main() first: it is the whole story. A step is an optimizer step. Everything random is a function of (seed, sample
index), so the only state of the data is one integer, and evaluating more often changes nothing.
"""
import contextlib, dataclasses, gc, io, itertools, json, lzma, math, random, re, statistics, sys, time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import data, infra, model as nano
from infra import Log, Machine, Stop, all_gather, all_sum, in_turn, on_rank_0


@dataclass
class Config(nano.Config, Machine):
    """The flags of train.py: shape, data, optimization, the run."""
    vocab_size: int = 0            # rows of the embedding; 0: the tokenizer's
    # data
    text: str = ""                 # file, folder or glob of your own text, NAME=PATH,... for several; default: built in
    jsonl: str = ""                # JSONL files with a "text" key
    hf: str = ""                   # Hugging Face dataset to stream (needs `datasets` and a network)
    hf_docs: int = 10_000          # documents to take from it
    tokenizer: str = "bytes"       # bytes, a file or folder (tokenizer.json, tokenizer.model), or a tiktoken name such as gpt2
    mixture: str = ""              # smollm3, "text=0.8,code=0.2", or stages "0.7:...;1.0:..."; default: smollm3 or by size
    doc_mask: bool = True          # attention stays within the documents of a row; false: it sees the whole row
    passkey: str = ""              # "256,1024": learn to find keys again, in documents of up to a row; probed at these lengths
    val_fraction: float = 0.05     # held out, by document
    skip_samples: str = ""         # "a:b,c:d": leave out rows a to b-1 of the run's order (after a loss spike)
    # optimization
    steps: int = 1400              # optimizer steps
    batch_tokens: int = 2048       # tokens per step; rows are max_position_embeddings long
    micro_batch: int = 0           # rows per forward pass and process (less memory, same result); 0: all of them at once
    optimizer: str = "muon"        # muon (hidden matrices; AdamW for the rest) or adamw
    lr: float = 4e-3               # peak learning rate; for muon scaled to AdamW's update size, so one value serves both
    weight_decay: float = 0.1      # on matrices, not on norms
    decay_embeddings: bool = False # and on embeddings
    schedule: str = "wsd"          # wsd (warm up, stay, decay to 0), cosine (to 10 %), multistep (steps at 80, 90 %)
    warmup: float = 0.02           # fraction of the steps
    decay: float = 0.4             # fraction of the steps that wsd spends decaying
    grad_clip: float = 1.0         # largest gradient norm
    z_loss: float = 1e-5           # weight of logsumexp squared
    # experiments: many runs in sequence, each in a directory of its own under out (default: out/ablate, out/sweep)
    ablate: str = ""               # "num_key_value_heads=4,1;optimizer=adamw": each change alone against the run without any
    match: str = ""                # params: as many parameters as that run, as nearly as num_hidden_layers allows
    sweep: str = ""                # "lr=2e-3,4e-3;batch_tokens=1024,2048;tokens=2e5,4e5": all combinations
    seeds: int = 1                 # --ablate: runs of each, seed, seed + 1, ...
    # run
    bench: bool = False            # measure speed on random tokens, then stop
    init: str = ""                 # start from this checkpoint's weights and shape
    out: str = "out/base"          # run directory
    resume: bool = False           # go on from the newest checkpoint in out, if there is one
    overwrite: bool = False        # delete the run that is in out
    log_every: int = 50            # steps between printed lines
    eval_every: int = 350          # steps between evaluations
    save_every: int = 350          # steps between checkpoints; also at the end and on signals
    wandb: bool = False            # log to Weights & Biases too


PRESETS = {name: {k: v for k, v in shape.items() if k != "vocab_size"} for name, shape in nano.PRESETS.items()}
PRESETS["small"] |= dict(lr=2e-3, batch_tokens=4096)
_LR = {"smol-135m": 2e-3, "smol-360m": 1e-3, "smol-1.7b": 5e-4, "ablation-1b": 5e-4, "smollm3-3b": 2e-4}
for _name in _LR:  # none was trained here: the playbook's learning rates for 1B and 3B, larger ones for smaller models
    PRESETS[_name] |= dict(optimizer="adamw", lr=_LR[_name], batch_tokens=2**19, micro_batch=4, decay=0.1, compile=True,
                           steps=20_000)
# Time to quality against nanoGPT's CPU recipe (README, "Measured"): rows of 64, whole-file validation.
PRESETS["shakespeare"] = dict(max_position_embeddings=64, hidden_size=256, intermediate_size=768, num_hidden_layers=2,
                              rope_theta=1000.0, no_rope_layer_interval=0, steps=120, batch_tokens=2048, lr=7e-3,
                              decay=0.5, val_fraction=0.1)


# --- optimizers and schedule -----------------------------------------------------------------------------------------

def lr_at(step, cfg):
    """Learning rate of optimizer step `step` (0-based) of cfg.steps. WSD: playbook, "Learning rate"."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    if cfg.schedule == "cosine":
        return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))
    if cfg.schedule == "multistep":  # DeepSeek's 80/10/10
        done = step / cfg.steps
        return cfg.lr * (1 if done < 0.8 else 0.316 if done < 0.9 else 0.1)
    return cfg.lr * min(1, (cfg.steps - step) / max(1, round(cfg.decay * cfg.steps)))


class Muon(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982): replace a matrix's momentum by the nearest orthogonal matrix, so that all directions learn.

    The same numbers as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), which loops over matrices; here equal shapes
    go through Newton-Schulz together: 28 small matrices on 2 CPU cores, 22.7 -> 8.8 ms a step. Under tensor parallelism
    every rank gathers the whole update first, for the orthogonal matrix nearest to a shard is no shard of the nearest one.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, tp=None):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.tp = tp

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta, same = group["lr"], group["momentum"], {}
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                p_dim = getattr(p, "tp_dim", None)
                whole = [size * (self.tp.size() if self.tp and dim == p_dim else 1) for dim, size in enumerate(p.shape)]
                same.setdefault(tuple(sorted(whole)), []).append((p, p_dim))
            for (short, long), members in same.items():
                for i in range(0, len(members), n := max(1, 2**26 // (short * long))):  # bounds the stack's memory
                    params, dims = zip(*members[i : i + n])
                    grads, momenta = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
                    torch._foreach_lerp_(momenta, grads, 1 - beta)
                    updates = [u.bfloat16() for u in torch._foreach_lerp(grads, momenta, beta)]  # Nesterov
                    updates = nano.unshard(updates, dims, self.tp)
                    flat = orthogonalize(torch.stack([u if u.shape[0] == short else u.T for u in updates]))
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                    for p, dim, u, whole in zip(params, dims, flat, updates):
                        u = nano.shard(u if whole.shape[0] == short else u.T, dim, self.tp)
                        p.add_(u, alpha=-lr * 0.2 * math.sqrt(long))


def orthogonalize(x, steps=5):
    """x (n, short, long), bf16 -> about U Vᵀ of each, singular values near 1: Newton-Schulz, a quintic polynomial."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(model, cfg):
    """AdamW, or Muon for the hidden matrices and AdamW for the rest. Norms do not decay, nor do embeddings unless the flag
    says so (OLMo 2, SmolLM3: decayed they shrink, and early gradients grow)."""
    hidden, kept, decayed = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if cfg.optimizer == "muon" and p.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name:
            hidden.append(p)
        elif p.dim() < 2 or "embed_tokens" in name and not cfg.decay_embeddings:
            kept.append(p)
        else:
            decayed.append(p)
    groups = [dict(params=p, weight_decay=w) for p, w in ((kept, 0.0), (decayed, cfg.weight_decay)) if p]
    optimizers = [Muon(hidden, cfg.lr, cfg.weight_decay, tp=model.tp)] if hidden else []
    return optimizers + ([torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)] if groups else [])


def optimizer_state(model, optimizers):
    """{parameter name: {state name: whole tensor}}, on the CPU: by name and without shards, so that it survives another
    order, optimizer split or layout. Every rank of model.tp takes part."""
    state, result = {p: s for o in optimizers for p, s in o.state.items()}, {}
    for name, p in model.named_parameters():
        if p in state:
            result[name] = {k: nano.unshard([v], [p.tp_dim if v.shape == p.shape else None], model.tp)[0].detach().cpu()
                            for k, v in state[p].items()}
    return result


def load_optimizer_state(model, optimizers, saved):
    """The way back: what optimizer_state returned, or this rank's part of it, into these optimizers."""
    whose = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p in whose and name in saved:
            # AdamW's step counter, a scalar, stays where its other states are: fused AdamW wants it on the device too
            whose[p].state[p] = {k: nano.shard(v, p.tp_dim if v.dim() else None, model.tp).clone().to(p.device)
                                 for k, v in saved[name].items()}


# --- evaluation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, sources, cfg, rt, max_tokens=2**17):
    """{source: (nats per token, bits per byte)} on held-out documents: the same rows every time, no random numbers."""
    T, result = cfg.max_position_embeddings, {}
    rows = max(1, 16384 // T)
    if cfg.micro_batch:  # where memory is short: no more logits than in training, or than 2,048 tokens have
        rows = min(rows, max(cfg.micro_batch, 2048 // T))
    for s in sources:
        nll, count = 0.0, 0
        for i, (ids, targets, docs) in enumerate(data.val_batches(s, T, rows, limit=max_tokens // T)):
            if i % rt.dp_size == rt.dp_rank:  # replicas share the work
                count += int((targets != -100).sum())
                docs = docs if cfg.doc_mask and docs.any() else None
                nll += float(model(*to_device(rt, ids, docs, targets))[0])
        nll, count = all_sum(rt, nll, count)
        loss = nll / count
        result[s.name] = (loss, loss / math.log(2) * s.val_meta["tokens"] / s.val_meta["bytes"])
    return result


DEPTHS = 0, 0.25, 0.5, 0.75, 1


def retrieval(model, tokenizer, lengths, problems=20):
    """{"1024" or "1024 YaRN": % of keys found at each of DEPTHS}: data.passkey, one forward pass each. Lengths beyond the
    rows of training both as the model is and with YaRN, which needs no training; by chance a tenth is right."""
    config, T, found = model.config, model.config.max_position_embeddings, {}
    for length in lengths:
        for yarn in (False, True) if length > T and config.rope_factor == 1 else (False,):
            more = dict(rope_factor=length / T, original_max_position_embeddings=T) if yarn else {}
            model.config = dataclasses.replace(config, max_position_embeddings=max(T, length), **more)
            scores = found[f"{length}{' YaRN' * yarn}"] = []
            for depth in DEPTHS:
                asked = [data.passkey(random.Random(f"{length} {depth} {i}"), length, depth) for i in range(problems)]
                answers = nano.generate(model, [tokenizer.encode(prompt) for prompt, _ in asked], 1, temperature=0)
                right = sum(tokenizer.decode(ids) == key for (ids, _), (_, key) in zip(answers, asked))
                scores.append(100 * right / problems)
    model.config = config
    return found


def lzma_bpb(source, tokenizer, max_tokens=2**21):
    """Bits per byte of a good general compressor on the same held-out text: the yardstick beside the model's."""
    tokens = source.val[:max_tokens]
    text = tokenizer.decode_bytes(tokens[tokens != tokenizer.eos].tolist())
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def validate(run):
    """-> fields of a metrics row: nats per token, bits per byte of each source, at the end keys found; prints them."""
    scores = evaluate(run.model, run.sources, run.cfg, run.rt)
    run.log.say(f"eval {run.step}: " + " | ".join(f"{name} {bpb:.3f} bits/byte" for name, (_, bpb) in scores.items()))
    fields = dict(val_loss=sum(loss for loss, _ in scores.values()) / len(scores),
                  val_bpb={name: bpb for name, (_, bpb) in scores.items()})
    if run.cfg.passkey and run.step == run.cfg.steps:
        found = retrieval(run.model, run.tokenizer, [int(n) for n in run.cfg.passkey.split(",")])
        run.log.say("\nkeys found, %    at" + "".join(f"{depth:7.0%}" for depth in DEPTHS) + " of the row")
        for name, each in found.items():
            run.log.say(f"{name:19}" + "".join(f"{x:7.0f}" for x in each))
        fields["passkey"] = found
    return fields


# --- one step --------------------------------------------------------------------------------------------------------

def to_device(rt, *tensors):
    """CPU tensors (or None) to the device; from pinned memory, so that the copy runs beside the computation."""
    if rt.device.type != "cuda":
        return [t if t is None else t.to(rt.device) for t in tensors]
    return [t if t is None else t.pin_memory().to(rt.device, non_blocking=True) for t in tensors]


def forward_backward(model, batch, cfg, rt, forwards=None):
    """Gradients of the step's mean loss over its counted tokens -> this replica's part of that loss (a tensor, nats per
    token; the parts of all replicas add up to it). `forwards`, a list, receives (begin, end) marks of each forward pass.

    Micro-batches and replicas differ in how many tokens count (labels after an EOS do not), so each adds its sum divided
    by the count of the whole step: a mean of means would weigh tokens in short batches more.
    """
    ids, targets, docs = batch
    count = max(1, all_sum(rt, int((targets != -100).sum()))[0] / rt.tp_size)  # TP ranks hold the same batch
    net, total, whole = getattr(model, "module", model), 0.0, None
    forward = lambda rows: model(*to_device(rt, ids[rows], docs[rows] if docs[rows].any() else None, targets[rows]))
    # Balanced are the experts of the whole step, so a first pass counts them: a third more work, but to balance them in
    # every micro-batch would be another, stricter demand.
    if net.config.num_experts and 0 < cfg.micro_batch < len(ids):
        with torch.no_grad():
            whole = over_replicas(rt, sum(forward(rows)[2] for rows in micro_batches(model, len(ids), cfg.micro_batch, rt)))
    for rows in micro_batches(model, len(ids), cfg.micro_batch, rt):
        begin = infra.mark(rt)
        nll, z, *usage = forward(rows)
        if forwards is not None:
            forwards.append((begin, infra.mark(rt)))
        loss = nll + cfg.z_loss * z
        if usage:
            whole = over_replicas(rt, usage[0]) if whole is None else whole
            loss = loss + net.balance(usage[0], whole)
        (loss * rt.dp_size / count).backward()  # DDP takes the mean over replicas: times their number
        total = total + nll.detach()
    return total / count


def over_replicas(rt, x):
    """The sum of a tensor over the replicas, a constant."""
    x = x.detach().clone()
    if rt.dp_group is not None:
        dist.all_reduce(x, group=rt.dp_group)
    return x


def micro_batches(model, n, size, rt):
    """Slices of n rows, `size` (0: n) at a time, for a loop of forwards and backwards: replicas exchange their gradients
    once, in the last backward."""
    size = size or n
    for i in range(0, n, size):
        silent = rt.dp_group is not None and i + size < n
        with model.no_sync() if silent else contextlib.nullcontext():
            yield slice(i, i + size)


def clip_grad_norm(model, max_norm, rt):
    """Scale the gradients to at most max_norm; returns the norm before. Parameters that TP ranks share count once: were
    every rank to sum what it holds, ranks would scale differently and their norm weights drift apart."""
    sharded = [p.grad for p in model.parameters() if p.grad is not None and p.tp_dim is not None]
    shared = [p.grad for p in model.parameters() if p.grad is not None and p.tp_dim is None]
    square = nn.utils.get_total_norm(sharded).square()
    if rt.tp_group is not None:
        dist.all_reduce(square, group=rt.tp_group)
    norm = (square + nn.utils.get_total_norm(shared).square()).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def is_spike(loss, norm, norms):
    """A step that must not reach the weights: not finite, or ten times the usual gradient (playbook, "Loss spikes").

    The fourth such norm in a row is no spike but a new level, which clipping copes with: where a model begins to see a
    pattern its gradients leap, and a run that skipped all of those steps would never learn it."""
    limit, recent = 10 * statistics.median(norms) if len(norms) >= 50 else math.inf, list(norms)[-3:]
    return not math.isfinite(loss + norm) or norm > limit and any(n <= limit for n in recent)


# --- the run ---------------------------------------------------------------------------------------------------------

SHAPE = {f.name for f in dataclasses.fields(nano.Config)}
NOT_THE_EXPERIMENT = {"resume", "overwrite", "wandb", "bench", "log_every", "eval_every", "save_every", "device", "compile",
                      "tp", "probe", "ablate", "sweep", "match", "seeds", "out"}
# What --resume may change too, which is said; and what the checkpoint tells better, by a checksum or in words of its own.
ON_THE_WAY = {"lr", "grad_clip", "steps", "epochs", "skip_samples", "micro_batch", "num_iterations", "samples", "merge",
              "tokenizer", "init", "stage", "teacher", "data", "problems", "tasks"}


def refuse(cfg, choices, faults):
    """Stop with one line at the first setting that is none of its choices, {field: choices}, and at the first fault:
    (is there one?, what to say). What all three scripts have to ask comes last."""
    for name, known in (choices | dict(optimizer=("muon", "adamw"))).items():
        if getattr(cfg, name) not in known:
            *others, last = filter(None, known)
            raise SystemExit(f"--{name}={getattr(cfg, name)}: {', '.join(others)} or {last} expected")
    for bad, message in (
            *faults,
            (min(cfg.log_every, cfg.eval_every, cfg.save_every) < 1, "--*_every: at least 1 expected"),
            (not 0 <= cfg.warmup <= 1, f"--warmup={cfg.warmup}: 0 to 1, a share of the steps, expected"),
            (cfg.micro_batch < 0, f"--micro_batch={cfg.micro_batch}: 0 or more expected"),
            (cfg.resume and cfg.overwrite, "--resume and --overwrite: one of them expected")):
        if bad:
            raise SystemExit(message)


def check(cfg, rt):
    """Errors that would otherwise surface deep inside, or not at all."""
    T = cfg.max_position_embeddings
    rows = cfg.batch_tokens // T // rt.dp_size  # of one replica
    replicas = f" times {rt.dp_size} replicas" * (rt.dp_size > 1)
    refuse(cfg, dict(schedule=("wsd", "cosine", "multistep")), (
        (cfg.steps < 1, f"--steps={cfg.steps}: at least 1 expected"),
        (cfg.weight_decay < 0, f"--weight_decay={cfg.weight_decay}: 0 or more expected"),
        (cfg.lr <= 0 or cfg.grad_clip <= 0, "--lr, --grad_clip: more than 0 expected"),
        (not 0 <= cfg.decay <= 1, f"--decay={cfg.decay}: 0 to 1, a share of the steps, expected"),
        (cfg.schedule == "wsd" and cfg.warmup + cfg.decay > 1,
         f"--warmup={cfg.warmup}, --decay={cfg.decay}: together 0 to 1 expected"),
        (cfg.batch_tokens % (T * rt.dp_size) or rows < 1,
         f"--batch_tokens={cfg.batch_tokens}: a multiple of --max_position_embeddings={T}{replicas} expected"),
        (cfg.micro_batch and rows % cfg.micro_batch,
         f"--micro_batch={cfg.micro_batch}: a divisor of each process's {rows} rows expected"),
        (cfg.passkey and (cfg.tokenizer != "bytes" or not re.fullmatch(r"[1-9]\d+(,[1-9]\d+)*", cfg.passkey)),
         f"--passkey={cfg.passkey}: row lengths such as 256,1024 and --tokenizer=bytes expected")))


def other_settings(cfg, recorded):
    """Names of what `recorded`, the settings of a run, has otherwise than cfg, but for what may change on the way and for
    what cfg leaves to its --init, the tokenizer or the data."""
    free = NOT_THE_EXPERIMENT | {k for k in ("vocab_size", "original_max_position_embeddings", "steps", "style", "date")
                                 if not getattr(cfg, k, None)}
    if cfg.init:
        rope = {k for k in nano.ROPE if getattr(cfg, k, 0) != getattr(nano.Config, k)}  # flags that count all the same
        free |= SHAPE - {"max_position_embeddings"} - rope
    return [k for k, v in dataclasses.asdict(cfg).items() if k in recorded and k not in free and v != recorded[k]]


def settings(out):
    """What a run's config.json holds; {}: there is none, or nobody can read it."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((Path(out) / "config.json").read_text(encoding="utf-8")))
    return {}


def keep_settings(out, cfg, recorded, other):
    """A run that goes on keeps its settings. Refuses `other` ones, or says them where they may change."""
    script = lambda fields: ("batch_tokens" in fields, "prompts" in fields, fields.get("stage"))
    if script(recorded) != script(vars(cfg)):
        return  # of another script or stage: that is found out, and said, when the checkpoint is read
    name = lambda value: re.sub(r"[^,=]*/", "", str(value).rstrip("/"))  # files may have moved
    may = ON_THE_WAY | ({"max_new_tokens"} if hasattr(cfg, "stage") else set())  # sft.py's are for evaluation
    if fixed := [k for k in other if k not in may and name(getattr(cfg, k)) != name(recorded[k])]:
        raise SystemExit(f"--resume: {out} has {', '.join(f'{k}={recorded[k]}' for k in fixed[:5])}: the same expected "
                         f"(--config={out}/config.json --out={out}), or --init={out} and another --out")
    for k in other:
        print(f"!!! {k}: {getattr(cfg, k)} instead of the run's {recorded[k]}", file=sys.stderr)


def claim(out, cfg, restarted, sources):
    """May this run write to `out`? Refuses where another run would suffer -> whether there is one to resume. sources: what
    this run reads weights from. restarted: torchrun --max_restarts has started the command again that had begun the run
    here, for a process has died; then it goes on, whatever the flags say."""
    files, recorded = nano.checkpoints(out), settings(out)
    other = other_settings(cfg, recorded) if recorded else ["origin"]
    if files and restarted and not other:
        return True
    paths = [Path(source).resolve() for source in sources if source]
    if cfg.overwrite and any(out.resolve() in (path, path.parent) for path in paths):
        raise SystemExit(f"--overwrite: {out} holds what this run begins from: another --out expected")
    if not files and any(out.glob("*.safetensors")):
        raise SystemExit(f"{out}: holds a model for transformers: another --out expected")
    if not files and cfg.resume:
        print(f"{out}: nothing to resume: a new run")
    elif files and cfg.resume:
        keep_settings(out, cfg, recorded, other)
    elif files and not cfg.overwrite:
        what = f"another run (other {', '.join(other[:5])})" if other else "this very run"
        raise SystemExit(f"{out}: holds {what}, up to step {int(files[0].stem[5:])}: --resume goes on with it, "
                         f"--overwrite deletes it, --out=DIR leaves it alone")
    return bool(files) and cfg.resume


def build(cfg, rt, tokenizer, start_from=""):
    """-> (model on the device, what else was in the checkpoint). Shape from the checkpoint where there is one."""
    if start_from:
        model, extra = nano.load_checkpoint(start_from, rt.device, rt.tp_group)
        if (theirs := data.name_of(extra["tokenizer"])) != tokenizer.name:
            raise SystemExit(f"--tokenizer={cfg.tokenizer}: {start_from} was trained with {theirs}"
                             + f" (--tokenizer={start_from})" * (extra["stage"] == "hf"))
    else:
        if 0 < cfg.vocab_size < tokenizer.vocab_size:
            raise SystemExit(f"--vocab_size={cfg.vocab_size}: at least the tokenizer's {tokenizer.vocab_size} expected")
        shape = dataclasses.replace(nano.shape_of(cfg), vocab_size=cfg.vocab_size or tokenizer.vocab_size)
        model, extra = new_model(shape, rt), {}
    return ready(model, cfg, rt), extra


def new_model(shape, rt):
    """Random weights, on the device."""
    model = nano.Transformer(shape, rt.tp_group).to(rt.device)
    share(model, rt)
    return model


def share(model, rt):
    """Make one of what every TP rank has drawn with its own seed though it is the same for all."""
    for p in model.parameters():
        if rt.tp_group is not None and p.tp_dim is None:
            dist.broadcast(p.data, group_src=0, group=rt.tp_group)


def ready(model, cfg, rt):
    """The model, set to the dtype of the matmuls and compiled if that is wanted."""
    model.compute_dtype = rt.dtype
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # RoPE, mask, gradients, rows: a graph for each mix; it gave up at 8
        options = nano.CPU_COMPILE if rt.device.type == "cpu" else None
        for layer in model.layers:  # one block compiled is all blocks compiled, and parameter names stay as they are
            layer.compile(options=options)
        model.loss_sums = torch.compile(model.loss_sums, options=options)
    return model


def data_parallel(model, rt, rows, T):
    """Replicas that average their gradients. Without process_group=, DDP would make every rank equal to rank 0 at the
    start: the shards of tensor parallelism too."""
    if rt.dp_group is None:
        return model
    replica = nn.parallel.DistributedDataParallel(model, process_group=rt.dp_group, gradient_as_bucket_view=True)
    # After its first backward DDP puts gradients into other buckets, and of three or more replicas' gradients the sum depends
    # on the place in a bucket. Without this rehearsal a resumed run would not end with the bits of an undisturbed one.
    ids = torch.zeros(rows, T, dtype=torch.long, device=rt.device)
    replica(ids, None, ids)[0].backward()
    model.zero_grad(set_to_none=True)
    return replica


def check_ranks(model, rt, step):
    """What must hold between the processes before they train -> a list of complaints, the same on all of them.

    Shards that are equal on two TP ranks get equal gradients and stay equal for ever: SmolLM3 trained 1T tokens with the
    capacity of a model half as large before anybody saw it (playbook, "The training marathon", mystery 4).
    """
    def sample(p):
        """256 values from all over it (embeddings of tokens that never come, in the first rows of any shard, are driven to one
        point), and the sum of its bits as integers, which is exact whatever the order."""
        p = p.detach().float().flatten()
        values, bits = p[:: max(1, len(p) // 256)].cpu(), p.view(torch.int32).sum().cpu()
        return torch.cat((values.double(), bits[None].double()))  # on the CPU: Apple's GPUs have no float64
    complaints, steps = [], all_gather(rt, torch.tensor([step]))
    if any(int(s) != step for s in steps):
        complaints.append(f"the ranks stand at steps {[int(s) for s in steps]}: one --out that all of them can read expected")
    for name, p in model.named_parameters():
        ranks = all_gather(rt, sample(p))  # neighbours in this list are the TP ranks of one replica
        for rank, mine in enumerate(ranks):
            twin = rank % rt.tp_size if p.tp_dim is not None else 0
            if not torch.equal(mine, ranks[twin]):
                complaints.append(f"{name} of rank {rank} is not what it is on rank {twin}")
            for other in range(rank % rt.tp_size) if p.tp_dim is not None else ():
                if (mine - ranks[other])[:-1].norm() < 0.1 * mine[:-1].norm():  # of independent draws: 1.4
                    complaints.append(f"{name} holds the same shard on TP ranks {other} and {rank % rt.tp_size}")
    return complaints


def occupy(cfg, rt, *sources):
    """Take cfg.out for this run -> (cfg; the lock, to be kept; whether the run that is there goes on)."""
    locked = infra.lock(cfg.out) if rt.rank == 0 else None
    if cfg.resume and not cfg.init and nano.checkpoints(cfg.out):  # it began from what its config.json says, whatever the flags leave out
        cfg = dataclasses.replace(cfg, init=settings(cfg.out).get("init", ""))
    file, jobs = Path(cfg.out) / ".job", infra.jobs(rt)
    before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    # each machine counts its own restarts
    restarted = all_sum(rt, rt.restarts)[0] > 0 and any(job in before for job in jobs)
    return cfg, locked, on_rank_0(rt, claim, Path(cfg.out), cfg, restarted, sources)


def begin(cfg, rt):
    """Data, model, optimizers and where the run stands: everything main() needs, new or from the newest checkpoint."""
    out, T = Path(cfg.out), cfg.max_position_embeddings
    rows = cfg.batch_tokens // T
    cfg, locked, resuming = occupy(cfg, rt, cfg.init)
    try:
        with in_turn(rt):
            tokenizer = data.get_tokenizer(cfg.tokenizer)
            sources = data.prepare(text=cfg.text, jsonl=cfg.jsonl, hf=cfg.hf, hf_docs=cfg.hf_docs, tokenizer=tokenizer,
                                   val_fraction=cfg.val_fraction, out=out.parent / "data", passkey=T if cfg.passkey else 0)
        loader = data.Loader(sources, cfg.mixture, T, cfg.steps * rows, cfg.seed, cfg.skip_samples)
        for s in sources:  # better now than at the first evaluation
            data.count_rows(f"{s.name}.val", s.val, T)
        model, extra = build(cfg, rt, tokenizer, out if resuming else cfg.init)
        if not resuming:  # the length of rows is a choice of the run that starts from --init, not of the shape there
            nano.extend(model.config, cfg)
            model.config.max_position_embeddings, extra = T, {}
        elif extra["stage"] != "base":
            raise ValueError(f"--resume: {out} holds a run of stage {extra['stage']}: --init={out} and another --out "
                             f"expected")
        else:
            consumed, before = extra["consumed_samples"], extra["train_config"].get("skip_samples", "")
            if data.skipped(before, consumed) != data.skipped(cfg.skip_samples, consumed):
                raise ValueError(f"--skip_samples={cfg.skip_samples}: {out} stands at row {consumed} and has skipped "
                                 f"{before or 'nothing'}: only ranges after that row can change")
    except ValueError as e:
        raise SystemExit(str(e)) from None
    cfg = dataclasses.replace(cfg, **dataclasses.asdict(model.config))  # config.json records what is trained
    run = start(cfg, rt, model, extra, locked, "base", data_parallel(model, rt, cfg.micro_batch or rows // rt.dp_size, T),
                rows=rows, tokenizer=tokenizer, sources=sources, loader=loader, pace=deque(maxlen=100), warned=set())
    run.samples = lambda: samples(run)
    run.log.say(headline(run) + f" | resuming after step {run.step}" * resuming)
    for name, epochs in loader.epochs(cfg.steps * rows).items():
        if epochs > 5:
            run.log.say(f"WARNING: {epochs:.1f} epochs of {name}: beyond 5 a source is worth less and less (playbook)")
    return run


def start(cfg, rt, model, extra, locked, stage, replica, lora=None, **more):
    """A run, ready for its next step: new, or where `extra`, the checkpoint that it goes on from, stands. From here on
    cfg.out is its own. `more` are fields that its loop wants besides."""
    out, monitor = Path(cfg.out), extra["monitor"] if extra else dict(norms=(), skipped=0, seconds=0.0)
    run = SimpleNamespace(cfg=cfg, rt=rt, out=out, locked=locked, stage=stage, model=model, replica=replica, lora=lora,
                          optimizers=make_optimizers(model, cfg), step=extra.get("step", 0), bad=0, monitor=monitor,
                          consumed=extra.get("consumed_samples", 0), norms=deque(monitor["norms"], maxlen=100),
                          skipped=monitor["skipped"], seconds=monitor["seconds"], **more)
    load_optimizer_state(model, run.optimizers, extra.get("optimizer", {}))
    complaints = check_ranks(model, rt, run.step)
    if complaints and cfg.tp_same_seed != "ignore":
        raise SystemExit(f"{len(complaints)} faults, so there is no training: {'; '.join(complaints[:3])}; ... "
                         f"(a demonstration: --tp_same_seed=ignore)")
    if run.step > cfg.steps:
        raise SystemExit(f"--steps={cfg.steps}: {out} stands at step {run.step}: as many or more expected")
    run.log = Log(out, cfg.steps, run.step, cfg.wandb, dataclasses.asdict(cfg), quiet=rt.rank > 0)
    jobs = infra.jobs(rt)
    if rt.rank == 0:
        for f in nano.checkpoints(out) if not extra else ():  # --overwrite; only now: an error above costs nothing
            f.unlink()
        (out / ".job").write_text("\n".join(jobs), encoding="utf-8")  # who may go on with it after a restart
        # without the flags: repeating the run deletes nothing
        infra.write_json(out / "config.json", dataclasses.asdict(cfg) | dict(resume=False, overwrite=False))
    if complaints:
        run.log.say(f"WARNING: training with {len(complaints)} faults: {'; '.join(complaints[:2])}; ...")
    return run


def headline(run):
    """What is trained, on what, where."""
    cfg, rt, T = run.cfg, run.rt, run.cfg.max_position_embeddings
    tokens = T * (cfg.micro_batch or run.rows // rt.dp_size)  # of one pass
    memory = sum(nano.training_bytes(run.model.config, tokens, rt.tp_size).values()) / 2**30
    return (f"{nano.num_params(run.model.config):,} parameters, {cfg.steps:,} steps of {cfg.batch_tokens:,} tokens, about "
            f"{memory:.1f} GiB | {', '.join(f'{s.name} {len(s.train) / 1e6:.1f}M' for s in run.sources)} tokens | {rt.name}, "
            f"{str(rt.dtype)[6:]}" + f" | {rt.dp_size} data-parallel x {rt.tp_size} tensor-parallel" * (rt.world_size > 1))


def save(run, last=False):
    """Checkpoint the run where it stands. A full disk costs this checkpoint, not the run, unless it is the last one."""
    try:
        if run.rt.dp_rank == 0:
            nano.save_checkpoint(run.out, run.model, run.step, run.consumed, run.stage, run.tokenizer.state,
                                 optimizer_state(run.model, run.optimizers), dataclasses.asdict(run.cfg), lora=run.lora,
                                 monitor=run.monitor | dict(norms=list(run.norms), skipped=run.skipped, seconds=run.seconds))
    except OSError as e:
        saved = [int(f.stem[5:]) for f in nano.checkpoints(run.out)]
        run.log.say(f"WARNING: step {run.step} was not saved: {e}; the last checkpoint is of step {max(saved, default='none')}")
        if last:
            raise SystemExit(f"{run.out}: step {run.step} could not be saved; --resume goes on from the last "
                             f"checkpoint") from None


def pace(run, waited, forwards, seconds):
    """How steadily the run goes -> (fields of a metrics row, warnings that are new). Playbook, mysteries 1 and 2: the mean
    hid steps at a tenth of the speed. `waited`: seconds for data in the last `seconds`; forwards: marks of forward passes.
    """
    rt, speeds = run.rt, sorted(run.cfg.batch_tokens / s for s in run.pace)
    mine = torch.tensor([waited / seconds, sum(infra.elapsed(a, b) for a, b in forwards)], dtype=torch.float64)
    wait, forward = torch.stack(all_gather(rt, mine)).T
    slowest, lag = int(forward.argmax()), float(forward.max() / forward.median()) - 1
    fields, causes, found = dict(data_wait=float(wait.max())), [], {}
    if rt.dp_size > 1:  # ranks of one replica wait for each other inside the forward pass, so it names a replica
        fields |= dict(slowest_rank=slowest, slowest_lag=lag)
        causes += [f"rank {slowest} computes {lag:.0%} longer than the middle one"] * (lag > 0.1)
    if len(speeds) >= 20:  # fewer say nothing
        p5, median = speeds[len(speeds) // 20], statistics.median(speeds)
        fields |= dict(tok_per_s_p5=p5, tok_per_s_median=median)
        if wait.max() > 0.05:
            found["data"] = f"rank {int(wait.argmax())} waits {wait.max():.0%} of its time for data"
            causes.append("data come too slowly")
        if p5 < 0.8 * median:
            found["pace"] = (f"the slowest 5 % of the steps run at {p5 / 1000:.1f}k tok/s or less, the median at "
                             f"{median / 1000:.1f}k: " + (" and ".join(causes) or "something else uses this machine"))
    new, run.warned = [text for kind, text in found.items() if kind not in run.warned], set(found)
    return fields, new


def samples(run):
    """Names the step's data, so that it can be looked at."""
    first, last = run.loader.number(run.consumed), run.loader.number(run.consumed + run.rows - 1)
    some = ", ".join(run.loader.describe(first + i) for i in range(min(3, run.rows)))
    return f"--skip_samples={first}:{last + 1} ({some}, ...)"


class Diverged(SystemExit):
    """Ten steps in a row were not finite. Ends a run, but not the experiment that it is part of."""


def update(run, loss, norm, lr):
    """Let the optimizers use the gradients, unless the step is a spike: skipped, said and counted. True if it was used."""
    spike = is_spike(loss, norm, run.norms)
    if math.isfinite(norm):
        run.norms.append(norm)
    if spike:
        run.skipped += 1
        run.log.say(f"SKIPPED step {run.step + 1}: loss {loss:.3f}, gradient norm {norm:.3f}, {run.samples()}")
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not spike:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.bad = run.bad + 1 if spike else 0
    if run.bad == 10:
        raise Diverged(f"step {run.step + 1}: 10 steps in a row were not finite; --resume goes on from the last save, "
                       f"perhaps with a lower --lr or --grad_clip; the data of this step: {run.samples()}")
    return not spike


def finish(run, tokens, stopping, signal, evaluation, report):
    """The end of main() in all three scripts, when the last step is saved -> what it returns. evaluation(run) -> fields
    of the last row; report(run, result) prints something to read."""
    loss = run.monitor.get("loss", math.nan)
    result = dict(step=run.step, tokens=tokens, loss=loss, seconds=run.seconds, skipped=run.skipped)
    if stopping:
        run.log.say(f"{signal or 'A signal'}: saved {run.out} at step {run.step}; --resume goes on from there")
        run.log.close()
        return result | {"stopped": signal or "another rank's signal"}
    result |= evaluation(run)
    run.log.row(final=True, **result)
    run.log.close()
    with contextlib.suppress(OSError):  # a reader who has left
        report(run, result)
    return result


def main(cfg):
    """Train; returns the last evaluation and the totals. With --ablate or --sweep: many times, and what came out."""
    rt = infra.setup(cfg)
    if bool(cfg.ablate) + bool(cfg.sweep) + cfg.bench > 1 or (cfg.match or cfg.seeds != 1) and not cfg.ablate:
        raise SystemExit("--ablate (with --match and --seeds), --sweep or --bench: one of them expected")
    if cfg.ablate or cfg.sweep:
        return experiments(cfg, rt)
    check(cfg, rt)
    if cfg.bench:
        return bench(cfg, rt)
    run = begin(cfg, rt)
    cfg, log, T = run.cfg, run.log, run.cfg.max_position_embeddings
    flops = nano.flops_per_token(run.model.config, T)
    batches = data.prefetch(run.loader, run.consumed, run.rows, cfg.steps - run.step, rt.dp_rank, rt.dp_size)
    gc.collect(), gc.freeze()  # the collector would walk all of torch's objects again and again
    warm, stopping, clock = run.step + 3, False, time.perf_counter()
    step_then, seconds_then, waited, forwards = run.step, run.seconds, 0.0, []  # since the last printed line
    with Stop() as stop:
        while run.step < cfg.steps and not stopping:
            asked = time.perf_counter()
            ids, targets, docs = next(batches)
            batch = ids, targets, docs if cfg.doc_mask else torch.zeros_like(docs)
            waited += time.perf_counter() - asked
            lr = lr_at(run.step, cfg)
            loss = forward_backward(run.replica, batch, cfg, rt, forwards)
            norm = float(clip_grad_norm(run.model, cfg.grad_clip, rt))  # the step's one wait for the device
            # every rank must decide alike, so all decide by sums: of the replicas' losses, and of who has got a signal
            loss, stopping = all_sum(rt, float(loss) / rt.tp_size, stop.signal is not None)
            run.monitor["loss"] = loss
            update(run, loss, norm, lr)
            now = time.perf_counter()
            run.step, run.consumed = run.step + 1, run.consumed + run.rows
            run.seconds, clock = run.seconds + now - clock, now
            log.bar.update(1)
            if run.step > warm:
                run.pace.append(now - asked)
            if run.step % cfg.log_every == 0 or run.step in (1, cfg.steps) or stopping:
                took = run.seconds - seconds_then
                speed = (run.step - step_then) * cfg.batch_tokens / took
                mfu = speed * flops / (rt.peak * rt.world_size) if rt.peak else None
                steady, warnings = pace(run, waited, forwards, took)
                line = f"loss {loss:.4f} | lr {lr:.1e} | grad {norm:.2f} | {speed / 1000:.1f}k tok/s"
                line += f" | data {100 * steady['data_wait']:.1f} %"
                line += f" | mfu {100 * mfu:.1f} % (6N+12LHDT)" if mfu else ""
                line += f" | skipped {run.skipped}" if run.skipped else ""
                log.row(line, step=run.step, tokens=run.consumed * T, loss=loss, lr=lr, grad_norm=norm, tok_per_s=speed,
                        seconds=run.seconds, mfu=mfu, skipped=run.skipped, **steady)
                for warning in warnings:
                    log.say(f"WARNING: {warning}")
                step_then, seconds_then, waited, forwards = run.step, run.seconds, 0.0, []
            if run.step % cfg.eval_every == 0 and run.step < cfg.steps and not stopping:
                log.row(step=run.step, tokens=run.consumed * T, seconds=run.seconds, **validate(run))
                clock = time.perf_counter()  # evaluation is not training time
            if run.step % cfg.save_every == 0 and run.step < cfg.steps and not stopping:
                save(run)
        batches.close()
        save(run, last=True)
    return finish(run, run.consumed * T, stopping, stop.signal, validate, report)


def report(run, result):
    """The end of a run: each source beside lzma, and what the model writes after a held-out document's first words."""
    print("\nheld-out text   model  lzma -9   bits per byte")
    for s in run.sources if run.rt.rank == 0 else ():
        print(f"{s.name:15} {result['val_bpb'][s.name]:5.3f}  {lzma_bpb(s, run.tokenizer):7.3f}")
    decode, prompts = run.tokenizer.decode, [s.val[:64].tolist() for s in run.sources]
    written = nano.generate(run.model, prompts, 160, temperature=0.7, stop_ids=[run.tokenizer.eos])
    for s, prompt, (ids, _) in zip(run.sources, prompts, written):
        print(f"\n--- {s.name}: a held-out beginning >>> what the model makes of it\n{decode(prompt)}>>>{decode(ids)}")
    print(f"\nwrote {run.out}; try: python model.py {run.out} --prompt='...'")


# --- experiments -----------------------------------------------------------------------------------------------------

T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 95 %, by degrees of freedom


def values_of(flag, spec, more=()):
    """"lr=1e-3,2e-3;qk_norm=true" -> {field: [values]}; `more`: names that are no fields, of whole numbers."""
    kinds, result = get_type_hints(Config) | dict.fromkeys(more, int), {}
    for name, _, values in (item.strip().partition("=") for item in spec.split(";")):
        try:
            if name not in kinds or not values:
                raise ValueError("FIELD=VALUE,VALUE;FIELD=VALUE expected (fields: --help)")
            result.setdefault(name, []).extend(infra.convert(v, kinds[name]) for v in values.split(","))
        except ValueError as e:
            raise SystemExit(f"--{flag}={spec}: {name}: {e}") from None
    return result


def changed(cfg, rt, flag, change, tokens=0):
    """cfg with other values (and steps for so many tokens), or one line on why it cannot be trained, before anything is."""
    try:
        result = dataclasses.replace(cfg, **change)
        result = dataclasses.replace(result, steps=round(tokens / result.batch_tokens)) if tokens else result
        check(result, rt)
        if result.indivisible(rt.tp_size):
            raise ValueError(f"--tp={cfg.tp}: a divisor of the KV heads, the FFN and the vocabulary expected")
        if tokens and abs(result.steps * result.batch_tokens - tokens) > 0.02 * tokens:
            raise ValueError(f"no whole number of steps makes {tokens:,} tokens")
        return result
    except (ValueError, SystemExit) as e:
        raise SystemExit(f"--{flag}: {', '.join(f'{k}={v}' for k, v in change.items())}: {e}") from None


def experiment(cfg, rt, name):
    """One run of many -> its last metrics, with tok_per_s (the median) and the model's config. A finished one is only read;
    one that diverged is finished too, and worse than all others."""
    cfg = dataclasses.replace(cfg, ablate="", sweep="", match="", seeds=1, out=f"{cfg.out}/{name}", resume=not cfg.overwrite)
    if cfg.resume and (other := other_settings(cfg, settings(cfg.out))):
        raise SystemExit(f"{cfg.out}: another experiment (other {', '.join(other[:5])}): --overwrite or another --out expected")
    if cfg.overwrite or not any(row.get("final") for row in infra.read_log(cfg.out)):
        print(f"{name} ...", flush=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = main(cfg)
            if "stopped" in result:
                command = "the same command" + " without --overwrite" * cfg.overwrite
                raise SystemExit(f"{cfg.out}: stopped; {command} goes on from there")
        except Diverged as e:
            if rt.rank == 0:
                print(f"{name}: {str(e).partition(';')[0]}", file=sys.stderr)
                with open(Path(cfg.out) / "metrics.jsonl", "a", encoding="utf-8") as f:
                    f.write(json.dumps(dict(final=True, val_bpb={})) + "\n")
        gc.unfreeze()  # main has frozen its run too: else none of them would ever leave the memory
        all_sum(rt, 0)  # rank 0 writes what all of them read now
    rows, recorded = infra.read_log(cfg.out), settings(cfg.out)
    last = [row for row in rows if row.get("final")][-1]
    speeds = [row["tok_per_s"] for row in rows if "tok_per_s" in row]
    bpb = {k: math.inf if v is None else v for k, v in last["val_bpb"].items()}
    bpb["mean"] = statistics.fmean(bpb.values()) if bpb else math.inf
    config = nano.Config(**{name: recorded[name] for name in SHAPE})
    return SimpleNamespace(bpb=bpb, tok_per_s=statistics.median(speeds[1:] or speeds), config=config)


def experiments(cfg, rt):
    """--ablate or --sweep: what came out is in a file too. All of --out belongs to this command."""
    kind, run_all = ("ablate", ablate) if cfg.ablate else ("sweep", sweep)
    cfg = dataclasses.replace(cfg, out=f"out/{kind}" if cfg.out == Config.out else cfg.out)
    with infra.lock(cfg.out) if rt.rank == 0 else contextlib.nullcontext():
        result = run_all(cfg, rt)
        infra.write_json(Path(cfg.out) / f"{kind}.json", infra.finite(result))
    return result


def ablate(cfg, rt):
    """Playbook, "Ablation": one change at a time, the same rows in the same order, the same tokens, several seeds. A change whose
    gap to the baseline could be the seeds' (paired by seed, 95 %) is a tie. -> {name: figures}."""
    if cfg.match not in ("", "params") or cfg.seeds < 1:
        raise SystemExit(f"--match={cfg.match}, --seeds={cfg.seeds}: params or nothing, and at least 1 expected")
    fixed, runs, result = NOT_THE_EXPERIMENT | {"seed", "steps", "batch_tokens", "init"}, {"baseline": cfg}, {}
    if cfg.match:
        fixed |= {"num_hidden_layers"}
    if cfg.init:
        fixed |= SHAPE - {"max_position_embeddings", *nano.ROPE}
    for field, values in values_of("ablate", cfg.ablate).items():
        if field in fixed:
            raise SystemExit(f"--ablate={cfg.ablate}: {field} is the same in all runs"
                             + " (--sweep=tokens=...;batch_tokens=...)" * (field in ("steps", "batch_tokens")))
        runs |= {f"{field}={v}": changed(cfg, rt, "ablate", {field: v}) for v in values if v != getattr(cfg, field)}
    if cfg.match:
        whole = lambda c: dataclasses.replace(c, vocab_size=c.vocab_size or data.get_tokenizer(c.tokenizer).vocab_size)
        wanted = nano.num_params(nano.shape_of(whole(cfg)))
        for name, c in runs.items():
            c = whole(c)
            deep = [dataclasses.replace(c, num_hidden_layers=n) for n in range(1, 4 * cfg.num_hidden_layers)]
            runs[name] = min(deep, key=lambda d: abs(nano.num_params(nano.shape_of(d)) - wanted))
    found = {name: [] for name in runs}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, c in runs.items():
            found[name].append(experiment(dataclasses.replace(c, seed=seed), rt, f"{name}-seed{seed}"))
    sources = max((list(x.bpb) for each in found.values() for x in each), key=len)  # of one that has not diverged
    print(f"\nbits per byte, mean of {cfg.seeds} seeds\n{'':28}{'parameters':>12}{'KV B/token':>11}{'tok/s':>9}"
          + "".join(f"{s:>9}" for s in sources) + "   gap to the baseline")
    for name, each in found.items():
        gaps = [a.bpb["mean"] - b.bpb["mean"] for a, b in zip(each, found["baseline"])]
        gap, n, c, noise = statistics.fmean(gaps), len(gaps), each[0].config, math.nan
        if n > 1 and math.isfinite(gap):
            noise = statistics.stdev(gaps) / math.sqrt(n) * T95[min(n - 1, 9)]
        bpb = {s: statistics.fmean(x.bpb.get(s, math.inf) for x in each) for s in sources}
        verdict = "tie" if abs(gap) <= noise else "better" if gap < 0 else "worse"
        verdict = "" if name == "baseline" else "one seed: unknown" if n == 1 else verdict
        verdict = verdict if math.isfinite(bpb["mean"]) else "diverged"
        params, kv, speed = nano.num_params(c), nano.kv_bytes_per_token(c), statistics.median(x.tok_per_s for x in each)
        result[name] = dict(params=params, kv_bytes_per_token=kv, layers=c.num_hidden_layers, tok_per_s=speed, bpb=bpb,
                            gap=gap, noise=noise, verdict=verdict)
        print(f"{name:28}{params:12,}{kv:11,}{speed:9,.0f}"
              + "".join(f"{v:9.4f}" for v in bpb.values()) + f"   {gap:+.4f} ± {noise:.4f}  {verdict}" * (name != "baseline"))
    return result


def sweep(cfg, rt):
    """All combinations of the values, at equal tokens, and the best of each budget; with several budgets a fit of the power law
    best = a · FLOPs^b of learning rate and batch, as the playbook takes it from DeepSeek (arXiv 2401.02954)."""
    grid = values_of("sweep", cfg.sweep, ["tokens"])
    if "steps" in grid or min(grid.get("batch_tokens", [1]) + grid.get("tokens", [1])) < 1:
        raise SystemExit(f"--sweep={cfg.sweep}: tokens instead of steps, and tokens and batch_tokens of 1 or more expected")
    budgets, runs, table = grid.pop("tokens", [cfg.steps * cfg.batch_tokens]), [], []
    for tokens, *values in itertools.product(budgets, *grid.values()):
        change = dict(zip(grid, values))
        runs.append((tokens, change, changed(cfg, rt, "sweep", change, tokens)))
    for tokens, change, c in runs:
        x = experiment(c, rt, f"{tokens}-" + ",".join(f"{k}={v}" for k, v in change.items()))
        flops = tokens * nano.flops_per_token(x.config, x.config.max_position_embeddings)
        table.append(dict(tokens=tokens, flops=flops, lr=c.lr, batch_tokens=c.batch_tokens) | change | dict(bpb=x.bpb["mean"]))
    best = [min((row for row in table if row["tokens"] == t), key=lambda row: row["bpb"]) for t in budgets]
    best, fits = [row for row in best if math.isfinite(row["bpb"])], {}
    print("\n" + " ".join(f"{k:>14}" for k in table[0]))
    for row in table:
        print(" ".join(f"{v:>14.6g}" if isinstance(v, float | int) else f"{v:>14}" for v in row.values())
              + "  <-- best" * (row in best))
    for k in ("lr", "batch_tokens") if len(best) > 1 else ():
        b, log_a = np.polyfit(np.log([row["flops"] for row in best]), np.log([row[k] for row in best]), 1)
        fits[k] = math.exp(log_a), b
        print(f"best {k} = {fits[k][0]:.4g} * FLOPs^{b:.3f}, from {len(best)} budgets"
              + " (two points: no test of it)" * (len(best) == 2))
    return dict(table=table, best=best, fits=fits)


def bench(cfg, rt, steps=12):
    """Speed of full steps (forward, backward, clip, optimizer) on random tokens, of all processes together."""
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 320)
    T, rows = cfg.max_position_embeddings, cfg.batch_tokens // cfg.max_position_embeddings
    model, _ = build(cfg, rt, data.get_tokenizer("bytes"))
    replica, optimizers = data_parallel(model, rt, cfg.micro_batch or rows // rt.dp_size, T), make_optimizers(model, cfg)
    generator = torch.Generator().manual_seed(cfg.seed + rt.dp_rank)
    ids = torch.randint(0, min(256, cfg.vocab_size), (rows // rt.dp_size, T + 1), generator=generator)
    batch, seconds = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, 1:])), []
    for _ in range(steps + 3):
        start = time.perf_counter()
        loss = forward_backward(replica, batch, cfg, rt)
        norm = clip_grad_norm(model, cfg.grad_clip, rt)
        float(loss), float(norm)
        for o in optimizers:
            o.step(), o.zero_grad(set_to_none=True)
        if rt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[3:])  # the first ones compile and warm up
    speed, flops = cfg.batch_tokens / statistics.median(seconds), nano.flops_per_token(model.config, T)
    result = dict(bench="train", tok_per_s=round(speed),
                  spread=[round(cfg.batch_tokens / s) for s in (seconds[-1], seconds[0])],
                  seconds_per_step=round(statistics.median(seconds), 5),
                  mfu=rt.peak and round(speed * flops / rt.peak / rt.world_size, 4),
                  mfu_convention=f"(6N + 12LHDT) FLOPs per token / {rt.peak_source}",
                  peak_memory_bytes=infra.peak_memory(rt.device), rows=rows, row_tokens=T, optimizer=cfg.optimizer,
                  compile=cfg.compile, processes=rt.world_size, tp=cfg.tp,
                  dtype=str(rt.dtype)[6:], params=nano.num_params(model.config), machine=rt.name, torch=torch.__version__)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    infra.launch(main, infra.cli(Config, PRESETS))
