"""Pre-training: from text to a base model, with the playbook's schedule, optimizers, evaluation and care for the run.

    python train.py                                        the default: 1M parameters on the built-in corpora, minutes on 2 cores
    python train.py shakespeare --text=input.txt           one file of text, as quick as it gets
    python train.py small --text='books/*.txt' --steps=2000 --compile
    python train.py --resume                               after Ctrl-C, SIGTERM or a crash: the same run, bit for bit
    python train.py smollm3-3b --bench --vocab_size=128256 throughput of a shape on this machine, one JSON line

Read main() first: it is the whole story. A step is an optimizer step. Everything random is a function of (seed, sample
index), so the only state of the data is one integer, and evaluating more often changes nothing.
"""
import dataclasses, gc, json, lzma, math, statistics, sys, time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import data, model as nano
from infra import Log, Stop, cli, peak_memory, setup, write_json


@dataclass
class Config(nano.Config):
    vocab_size: int = 0            # rows of the embedding; 0: the tokenizer's
    # data
    text: str = ""                 # file, folder or glob of your own text; NAME=PATH,... for several sources; default: built in
    jsonl: str = ""                # JSONL files with a "text" key
    hf: str = ""                   # Hugging Face dataset to stream (needs `datasets` and a network)
    tokenizer: str = "bytes"       # bytes, or a tiktoken name such as gpt2 (downloads its vocabulary once)
    mixture: str = ""              # smollm3, or "text=0.8,code=0.2", or stages "0.7:...;1.0:..."; default: smollm3 or by size
    val_fraction: float = 0.05     # held out, by document
    # optimization
    steps: int = 1000              # optimizer steps
    batch_tokens: int = 4096       # tokens per step; rows are max_position_embeddings long
    micro_batch: int = 0           # rows per forward pass (less memory, same result); 0: the whole step at once
    optimizer: str = "muon"        # muon (hidden matrices; AdamW for the rest) or adamw
    lr: float = 4e-3               # peak learning rate; for muon scaled to AdamW's update size, so one value serves both
    weight_decay: float = 0.1      # on matrices, not on embeddings and norms
    schedule: str = "wsd"          # wsd (warm up, stay, decay to 0), cosine (to 10 %), multistep (x0.316 at 80 %, x0.1 at 90 %)
    warmup: float = 0.02           # fraction of the steps
    decay: float = 0.4             # fraction of the steps that wsd spends decaying
    grad_clip: float = 1.0         # largest gradient norm
    z_loss: float = 1e-5           # weight of logsumexp squared
    seed: int = 0                  # initialisation and data order
    # machine
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: str = "auto"            # of the matmuls: bfloat16 where the hardware multiplies it, else float32
    compile: bool = False          # torch.compile each block: pays on long runs
    bench: bool = False            # measure speed on random tokens, then stop
    # run
    init: str = ""                 # start from this checkpoint's weights and shape
    out: str = "out/base"          # run directory
    resume: bool = False           # go on from the newest checkpoint in out, if there is one
    overwrite: bool = False        # delete the run that is in out
    log_every: int = 20            # steps between printed lines
    eval_every: int = 250          # steps between evaluations
    save_every: int = 250          # steps between checkpoints; also at the end and on signals
    wandb: bool = False            # log to Weights & Biases too


PRESETS = {name: {k: v for k, v in shape.items() if k != "vocab_size"} for name, shape in nano.PRESETS.items()}
PRESETS["small"] |= dict(lr=2e-3)
for _name, _lr in {"smol-135m": 2e-3, "smol-360m": 1e-3, "smol-1.7b": 5e-4, "ablation-1b": 5e-4, "smollm3-3b": 2e-4}.items():
    PRESETS[_name] |= dict(optimizer="adamw", lr=_lr, batch_tokens=2**19, micro_batch=4, decay=0.1, compile=True, steps=20_000)
# Time to quality against nanoGPT's CPU recipe (README, "Measured"): rows of 64, whole-file validation.
PRESETS["shakespeare"] = dict(max_position_embeddings=64, hidden_size=256, intermediate_size=768, num_hidden_layers=2, rope_theta=1000.0,
                              no_rope_layer_interval=0, steps=120, batch_tokens=2048, lr=7e-3, decay=0.5, val_fraction=0.1)


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
    go through Newton-Schulz together: 28 small matrices on 2 CPU cores, 22.7 -> MEASURED ms a step.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta, same = group["lr"], group["momentum"], {}
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                same.setdefault(tuple(sorted(p.shape)), []).append(p)
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for (short, long), members in same.items():
                for i in range(0, len(members), n := max(1, 2**26 // (short * long))):  # bounds the stack's memory
                    grads = [p.grad for p in members[i : i + n]]
                    momenta = [self.state[p]["momentum_buffer"] for p in members[i : i + n]]
                    torch._foreach_lerp_(momenta, grads, 1 - beta)
                    updates = torch._foreach_lerp(grads, momenta, beta)  # Nesterov
                    flat = orthogonalize(torch.stack([u if u.shape[0] == short else u.T for u in updates]))
                    torch._foreach_mul_(members[i : i + n], 1 - lr * group["weight_decay"])
                    for p, u in zip(members[i : i + n], flat):
                        p.add_(u if p.shape[0] == short else u.T, alpha=-lr * 0.2 * math.sqrt(long))


def orthogonalize(x, steps=5):
    """x (n, short, long) -> about U Vᵀ of each, singular values near 1: Newton-Schulz, a quintic polynomial in bf16."""
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(model, cfg):
    """AdamW for embeddings, head and norms; hidden matrices go to Muon or AdamW, by cfg.optimizer.

    No weight decay on embeddings and norms (OLMo 2, SmolLM3): decayed embeddings shrink, and early gradients grow.
    """
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.dim() == 2 and "embed_tokens" not in n and "lm_head" not in n]
    head = [p for n, p in named if "lm_head" in n]
    rest = [p for n, p in named if p.dim() < 2 or "embed_tokens" in n]
    muon = cfg.optimizer == "muon"
    decayed = head if muon else hidden + head
    groups = [dict(params=rest, weight_decay=0.0)] + [dict(params=decayed, weight_decay=cfg.weight_decay)] * bool(decayed)
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [Muon(hidden, cfg.lr, cfg.weight_decay), adamw] if muon else [adamw]


def optimizer_state(model, optimizers):
    """{parameter name: {state name: tensor}}: by name, so that it survives another order, optimizer split or layout."""
    state = {p: s for o in optimizers for p, s in o.state.items()}
    return {n: {k: v.detach().cpu() for k, v in state[p].items()} for n, p in model.named_parameters() if p in state}


def load_optimizer_state(model, optimizers, saved):
    for o in optimizers:
        for name, p in model.named_parameters():
            if any(p is q for g in o.param_groups for q in g["params"]) and name in saved:
                # AdamW's step counter stays where its other states are; fused AdamW wants it on the device too
                o.state[p] = {k: v.clone().to(p.device) for k, v in saved[name].items()}


# --- evaluation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, sources, cfg, rt, max_tokens=2**17):
    """{source: (nats per token, bits per byte)} on held-out documents: the same rows every time, no random numbers."""
    T, result = cfg.max_position_embeddings, {}
    for s in sources:
        nll, count = 0.0, 0
        for ids, targets, docs in data.val_batches(s, T, max(1, 16384 // T), limit=max_tokens // T):
            count += int((targets != -100).sum())
            docs = docs if docs.any() else None
            nll += float(model(*to_device(rt, ids, docs, targets))[0])
        loss = nll / count
        result[s.name] = (loss, loss / math.log(2) * s.val_meta["tokens"] / s.val_meta["bytes"])
    return result


def lzma_bpb(source, tokenizer, max_tokens=2**21):
    """Bits per byte of a good general compressor on the same held-out text: the yardstick beside the model's."""
    text = tokenizer.decode_bytes(source.val[:max_tokens].tolist())
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def show_evaluation(log, step, scores):
    mean = sum(loss for loss, _ in scores.values()) / len(scores)
    log.say(f"eval {step}: " + " | ".join(f"{n} {bpb:.3f} bits/byte" for n, (_, bpb) in scores.items()))
    return dict(val_loss=mean, val_bpb={n: bpb for n, (_, bpb) in scores.items()})


# --- one step --------------------------------------------------------------------------------------------------------

def to_device(rt, *tensors):
    """CPU tensors (or None) to the device; from pinned memory, so that the copy runs beside the computation."""
    if rt.device.type != "cuda":
        return [t if t is None else t.to(rt.device) for t in tensors]
    return [t if t is None else t.pin_memory().to(rt.device, non_blocking=True) for t in tensors]


def forward_backward(model, batch, cfg, rt):
    """Gradients of the step's mean loss over its counted tokens -> that loss (a tensor, nats per token).

    Micro-batches differ in how many tokens count (labels after an EOS do not), so each adds its sum divided by the
    count of the whole step: a mean of means would weigh tokens in short batches more.
    """
    ids, targets, docs = batch
    count, rows, total = int((targets != -100).sum()), cfg.micro_batch or len(ids), 0.0
    for i in range(0, len(ids), rows):
        d = docs[i : i + rows]
        nll, z = model(*to_device(rt, ids[i : i + rows], d if d.any() else None, targets[i : i + rows]))
        ((nll + cfg.z_loss * z) / count).backward()
        total = total + nll.detach()
    return total / count


def is_spike(loss, norm, norms):
    """A step that must not reach the weights: not finite, or ten times the usual gradient (playbook, "Loss spikes")."""
    return not math.isfinite(loss + norm) or (len(norms) >= 50 and norm > 10 * statistics.median(norms))


# --- the run ---------------------------------------------------------------------------------------------------------

NOT_THE_EXPERIMENT = {"resume", "overwrite", "wandb", "bench", "log_every", "eval_every", "save_every", "device", "compile"}


def check(cfg):
    """Errors that would otherwise surface deep inside, or not at all."""
    T, rows = cfg.max_position_embeddings, cfg.batch_tokens // cfg.max_position_embeddings
    for bad, message in (
            (cfg.optimizer not in ("muon", "adamw"), f"--optimizer={cfg.optimizer}: muon or adamw expected"),
            (cfg.schedule not in ("wsd", "cosine", "multistep"), f"--schedule={cfg.schedule}: wsd, cosine or multistep expected"),
            (min(cfg.steps, cfg.log_every, cfg.eval_every, cfg.save_every) < 1, "--steps, --*_every: at least 1 expected"),
            (cfg.lr <= 0 or cfg.grad_clip <= 0, "--lr, --grad_clip: more than 0 expected"),
            (not (0 <= cfg.warmup <= 1 and 0 <= cfg.decay <= 1), "--warmup, --decay: fractions of the run, 0 to 1, expected"),
            (cfg.batch_tokens % T or rows < 1, f"--batch_tokens={cfg.batch_tokens}: a multiple of --max_position_embeddings={T} expected"),
            (cfg.micro_batch and rows % cfg.micro_batch, f"--micro_batch={cfg.micro_batch}: a divisor of the step's {rows} rows expected"),
            (cfg.resume and cfg.overwrite, "--resume and --overwrite: one of them expected")):
        if bad:
            raise SystemExit(message)


def claim(out, cfg):
    """Make `out` ours without losing what is there. True when there is a run to resume."""
    old, files = out / "config.json", nano.checkpoints(out)
    if files and cfg.overwrite:
        for f in [*files, out / "metrics.jsonl"]:
            f.unlink(missing_ok=True)
        files = []
    if files and not cfg.resume:
        before = json.loads(old.read_text(encoding="utf-8")) if old.exists() else {}
        now = dataclasses.asdict(cfg)
        other = sorted(k for k in now if k not in NOT_THE_EXPERIMENT and before.get(k) != now[k])
        finished = files[0].stem == f"ckpt_{cfg.steps:08d}"
        if other or not finished:
            what = f"a run with other settings ({', '.join(other[:5])})" if other else "an unfinished run"
            raise SystemExit(f"{out}: holds {what}: --resume, --overwrite or another --out expected")
    out.mkdir(parents=True, exist_ok=True)
    return bool(files) and cfg.resume


def build(cfg, rt, tokenizer, start_from):
    """-> (model on the device, what else was in the checkpoint). Shape from the checkpoint where there is one."""
    if start_from:
        model, extra = nano.load_checkpoint(start_from, rt.device)
        if extra["tokenizer"] != cfg.tokenizer:
            raise SystemExit(f"--tokenizer={cfg.tokenizer}: {start_from} was trained with {extra['tokenizer']}")
    else:
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer.vocab_size)
        if cfg.vocab_size < tokenizer.vocab_size:
            raise SystemExit(f"--vocab_size={cfg.vocab_size}: at least the tokenizer's {tokenizer.vocab_size} expected")
        model, extra = nano.Transformer(nano.shape_of(cfg)).to(rt.device), {}
    model.compute_dtype = rt.dtype
    if cfg.compile:
        for layer in model.layers:  # one block compiled is all blocks compiled, and parameter names stay as they are
            layer.compile()
        model.loss_sums = torch.compile(model.loss_sums)
    return model, extra


def main(cfg):
    """Train; returns the last evaluation and the totals."""
    check(cfg)
    rt = setup(cfg)
    if cfg.bench:
        return bench(cfg, rt)
    out, rows = Path(cfg.out), cfg.batch_tokens // cfg.max_position_embeddings
    resuming = claim(out, cfg)
    try:
        tokenizer = data.get_tokenizer(cfg.tokenizer)
        sources = data.prepare(text=cfg.text, jsonl=cfg.jsonl, hf=cfg.hf, tokenizer=cfg.tokenizer,
                               val_fraction=cfg.val_fraction, out=out.parent / "data")
        loader = data.Loader(sources, cfg.mixture, cfg.max_position_embeddings, cfg.steps * rows, cfg.seed)
        model, extra = build(cfg, rt, tokenizer, cfg.out if resuming else cfg.init)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    optimizers = make_optimizers(model, cfg)
    norms, first, consumed, skipped = deque(maxlen=100), 0, 0, 0
    if resuming:
        load_optimizer_state(model, optimizers, extra["optimizer"])
        first, consumed, norms = extra["step"], extra["consumed_samples"], deque(extra["monitor"]["norms"], maxlen=100)
        skipped = extra["monitor"]["skipped"]
        print(f"resuming {out} after step {first}")
    write_json(out / "config.json", dataclasses.asdict(cfg))
    log = Log(out, cfg.steps, first, cfg.wandb, dataclasses.asdict(cfg))
    flops = nano.flops_per_token(model.config, cfg.max_position_embeddings)
    log.say(f"{nano.num_params(model.config):,} parameters, {cfg.steps:,} steps of {cfg.batch_tokens:,} tokens, "
            f"{' + '.join(f'{s.name} {len(s.train) / 1e6:.1f}M' for s in sources)} tokens | {rt.name}, {str(rt.dtype)[6:]}")

    def save(step):
        nano.save_checkpoint(out, model, step, consumed, "base", cfg.tokenizer, optimizer_state(model, optimizers),
                             dataclasses.asdict(cfg), monitor=dict(norms=list(norms), skipped=skipped))

    batches = data.prefetch(loader, consumed, rows, cfg.steps - first)
    gc.collect(), gc.freeze()  # the collector would walk all of torch's objects again and again
    clock = logged = time.perf_counter()
    waited, since, in_a_row, result, step = 0.0, first, 0, {}, first
    with Stop() as stop:
        for step in range(first + 1, cfg.steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            lr = lr_at(step - 1, cfg)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr
            loss = forward_backward(model, batch, cfg, rt)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            loss, norm = float(loss), float(norm)  # the step's one wait for the device
            if is_spike(loss, norm, norms):
                skipped, in_a_row = skipped + 1, in_a_row + 1
                where = f"samples {consumed}..{consumed + rows - 1}: {', '.join(loader.describe(consumed + i) for i in range(min(3, rows)))}, ..."
                log.say(f"SKIPPED step {step}: loss {loss:.3f}, gradient norm {norm:.3f} ({where})")
            else:
                in_a_row = 0
                norms.append(norm)
                for o in optimizers:
                    o.step()
            for o in optimizers:
                o.zero_grad(set_to_none=True)
            consumed += rows
            if in_a_row == 10:
                raise SystemExit(f"step {step}: 10 steps in a row were not finite or spiked; the last: {where}; "
                                 f"--resume restarts before them, a lower --lr or --grad_clip may pass them")
            last = step == cfg.steps or stop.signal
            if step % cfg.log_every == 0 or step == first + 1 or last:
                now = time.perf_counter()
                speed = (step - since) * cfg.batch_tokens / (now - logged)
                mfu = speed * flops / rt.peak if rt.peak else None
                log.row(f"loss {loss:.4f} | lr {lr:.1e} | grad {norm:.2f} | {speed / 1000:.1f}k tok/s | data {100 * waited / (now - logged):.1f} %"
                        + (f" | mfu {100 * mfu:.1f} % (6N+12LHDT)" if mfu else "") + (f" | skipped {skipped}" if skipped else ""),
                        step=step, tokens=consumed * cfg.max_position_embeddings, loss=loss, lr=lr, grad_norm=norm, tok_per_s=speed,
                        seconds=now - clock, data_wait=waited / (now - logged), mfu=mfu, skipped=skipped)
                logged, since, waited = now, step, 0.0
            log.bar.update(1)
            if stop.signal:
                break
            if step % cfg.eval_every == 0 and step < cfg.steps:
                paused = time.perf_counter()
                log.row(step=step, tokens=consumed * cfg.max_position_embeddings, seconds=paused - clock,
                        **show_evaluation(log, step, evaluate(model, sources, cfg, rt)))
                pause = time.perf_counter() - paused  # evaluation is not training time
                clock, logged = clock + pause, logged + pause
            if step % cfg.save_every == 0 and step < cfg.steps:
                save(step)
        seconds = time.perf_counter() - clock
        batches.close()
        save(step)
        if stop.signal:
            log.say(f"{stop.signal}: saved {out} at step {step}; --resume goes on from there")
            log.close()
            return dict(step=step, stopped=stop.signal, seconds=seconds, skipped=skipped)
    scores = evaluate(model, sources, cfg, rt)
    result = dict(step=step, tokens=consumed * cfg.max_position_embeddings, loss=loss, seconds=seconds, skipped=skipped, **show_evaluation(log, step, scores))
    log.row(final=True, **result)
    log.close()
    report(model, sources, scores, tokenizer, out)
    return result


def report(model, sources, scores, tokenizer, out):
    """The end of a run: each source beside lzma, and what the model writes after a held-out document's first words."""
    print("\nheld-out text   model  lzma -9   bits per byte")
    for s in sources:
        print(f"{s.name:15} {scores[s.name][1]:5.3f}  {lzma_bpb(s, tokenizer):7.3f}")
    prompts = [s.val[:48].tolist() for s in sources]
    for s, p, (ids, _) in zip(sources, prompts, nano.generate(model, prompts, 160, temperature=0.7, stop_ids=[tokenizer.eos])):
        print(f"\n--- {s.name}: {tokenizer.decode(p)!r} goes on\n{tokenizer.decode(ids)}")
    print(f"\nwrote {out}; try: python model.py {out} --prompt='...'")


def bench(cfg, rt, steps=12):
    """Speed of full steps (forward, backward, clip, optimizer) on random tokens."""
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 320)
    T, rows = cfg.max_position_embeddings, cfg.batch_tokens // cfg.max_position_embeddings
    model, _ = build(cfg, rt, data.get_tokenizer("bytes"), "")
    optimizers = make_optimizers(model, cfg)
    ids = torch.randint(0, min(256, cfg.vocab_size), (rows, T + 1), generator=torch.Generator().manual_seed(cfg.seed))
    batch, seconds = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros(rows, T, dtype=torch.long)), []
    for _ in range(steps + 3):
        start = time.perf_counter()
        loss = forward_backward(model, batch, cfg, rt)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        float(loss), float(norm)
        for o in optimizers:
            o.step(), o.zero_grad(set_to_none=True)
        if rt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[3:])  # the first ones compile and warm up
    speed, flops = cfg.batch_tokens / statistics.median(seconds), nano.flops_per_token(model.config, T)
    result = dict(bench="train", tok_per_s=round(speed), spread=[round(cfg.batch_tokens / s) for s in (seconds[-1], seconds[0])],
                  seconds_per_step=round(statistics.median(seconds), 5), mfu=rt.peak and round(speed * flops / rt.peak, 4),
                  mfu_convention="(6N + 12LHDT) FLOPs per token / published dense bf16 peak; null: no published peak",
                  peak_memory_bytes=peak_memory(rt.device), rows=rows, row_tokens=T, optimizer=cfg.optimizer, compile=cfg.compile,
                  dtype=str(rt.dtype)[6:], params=nano.num_params(model.config), machine=rt.name, torch=torch.__version__)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(cli(Config, PRESETS))
