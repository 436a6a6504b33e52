"""The playbook's incidents, brought back on purpose by patching the project from outside. Each lesson runs both ways and prints
the numbers that show what the bug does; the first line of its doc string says where in the code the fix lives.

    python tests/lessons.py                  the list
    python tests/lessons.py drop_eos         that lesson
    python tests/lessons.py grow_longer DIR  the one that can begin with a model of yours

The models are tiny, on one thread and in a temporary directory; nothing is downloaded, and a second run on the same machine
prints the same, but for what is measured in seconds.
"""
import contextlib, functools, io, itertools, json, os, random, statistics, sys, tempfile, time, tracemalloc
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same numbers on any number of cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data, grpo, infra, model as nano, processes, sft, train

SMALL = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2)


# --- what several lessons share --------------------------------------------------------------------------------------

@contextlib.contextmanager
def workplace(documents=80):
    """A temporary directory with docs/, files of Python's library: 15,000 bytes each in the mean, the longest 230,000."""
    with tempfile.TemporaryDirectory() as out:
        Path(out, "docs").mkdir()
        for i, document in enumerate(itertools.islice(data.code_documents(), documents)):
            Path(out, f"docs/{i:02}.txt").write_bytes(document)
        yield out


def quietly(script, cfg, **patches):
    """script.main(cfg), its functions replaced by `patches` -> (its result, what it printed)."""
    with contextlib.ExitStack() as stack:
        for name, value in (dict(report=lambda *_: None) | patches).items():
            stack.enter_context(patch.object(script, name, value))
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return script.main(cfg), said.getvalue()


def steps_of(run):
    """The rows that a run has logged of its steps."""
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row and not row.get("final")]


def pretrain(place, run="run", **flags):
    """train.main on place/docs -> its result, with what it printed."""
    cfg = dict(out=f"{place}/{run}", text=f"{place}/docs", overwrite=True, device="cpu", dtype="float32", log_every=1,
               max_position_embeddings=128, batch_tokens=1024) | SMALL | flags
    result, said = quietly(train, train.Config(**cfg))
    return result | dict(said=said)


def new_model(folder, **shape):
    """The checkpoint of a random model."""
    torch.manual_seed(0)
    Path(folder).mkdir()
    nano.save_checkpoint(folder, nano.Transformer(nano.Config(**SMALL | shape)))


def teach(out, steps, problems=10, **flags):
    """sft.main on `problems` sums a step, from out/start to out/run -> nats per token of held-out answers, and of the rest."""
    cfg = sft.Config(**dict(init=f"{out}/start", out=f"{out}/run", steps=steps, batch=8, overwrite=True, device="cpu",
                            dtype="float32") | flags)
    quietly(sft, cfg, SUMS=problems * steps, validate=lambda run: {})
    model, rng, rt = nano.load_checkpoint(cfg.out)[0], random.Random("held out"), infra.setup(cfg)
    rows = [data.render([dict(role="user", content=f"{a}+{b}="),
                         dict(role="assistant", content=data.sum_answer(a, b, mode, rng))], mode)
            for a, b in data.sums(100, test=True) for mode in ("think", "no_think")]
    others = [(ids, [1 - m for m in mask]) for ids, mask in rows]
    return tuple(-float(sft.logp_sums(model, some, rt).sum()) / sum(sum(mask[1:]) for _, mask in some)
                 for some in (rows, others))


# --- pre-training ----------------------------------------------------------------------------------------------------

def tp_rank(out, **flags):
    """What a rank of same_seed returns: the held-out loss, or why it was not let in."""
    try:
        return pretrain(out, **flags)["val_loss"]
    except SystemExit as e:
        return str(e)


def same_seed(steps=200):
    """Tensor-parallel ranks that draw the same weights. (infra.py, setup: the seed; train.py, check_ranks: the check)

    Two equal shards see the same input and get the same gradient, so they stay equal for ever: half a model at the price of a
    whole one, with a smooth loss. SmolLM3 trained 1T tokens so, until evaluations fell behind those of a smaller model.
    """
    shape = dict(hidden_size=128, intermediate_size=128, steps=steps)
    half = dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    with workplace() as out:
        def trained(world, **flags):
            answer = processes.run(world, functools.partial(tp_rank, out, **shape | flags), timeout=300)[0]
            if isinstance(answer, str):
                return answer
            state = nano.read_checkpoint(f"{out}/run")
            dims = {n: p.tp_dim for n, p in nano.Transformer(state["model_config"], init=False).named_parameters()}
            halves = [w.chunk(2, dims[n]) for n, w in state["model"].items() if n.startswith("layers") and dims[n] is not None]
            return answer, sum(int((a == b).sum()) for a, b in halves) / sum(a.numel() for a, b in halves)

        refused = trained(2, tp=2, tp_same_seed="on")
        (broken, twins), (fixed, none) = trained(2, tp=2, tp_same_seed="ignore"), trained(2, tp=2)
        (alone, _), (smaller, _) = trained(1), trained(1, **half)
    print(f"two ranks, one model: held-out loss after {steps} steps, and the part of the layers' weights that both ranks hold\n"
          f"  broken: both draw with one seed         {broken:.3f}   {twins:.0%}\n"
          f"  fixed: each with its own                {fixed:.3f}   {none:.0%}\n"
          f"  one process                             {alone:.3f}\n"
          f"  one process, half the heads and MLP     {smaller:.3f}\n"
          f"the check: {refused.partition(';')[0]}; ...")
    return dict(broken=broken, fixed=fixed, twins_broken=twins, twins_fixed=none, alone=alone, half=smaller, refused=refused)


def file_order(steps=200):
    """Rows that follow each other in a file go into one batch: a noisy loss. (data.py, Loader.locate: permute)

    A long file fills whole batches, and the loss jumps from one file's level to the next one's. SmolLM3's loss went up and
    down by 0.046 instead of 0.029. Here: the difference to the mean of 25 steps round it, after the first third. (That a run as
    short as this one reads the first files only is what its held-out loss suffers from.)
    """
    def noise():
        losses = [row["loss"] for row in steps_of(f"{out}/run")]
        return statistics.stdev(losses[i] - statistics.fmean(losses[i - 12:i + 13]) for i in range(steps // 3, steps - 12))

    with workplace() as out:
        fixed_loss, fixed = pretrain(out, steps=steps)["val_loss"], noise()
        with patch.object(data, "permute", lambda i, n, key: i):
            broken_loss, broken = pretrain(out, steps=steps)["val_loss"], noise()
    print(f"standard deviation of the training loss round its running mean; held-out loss after {steps} steps of 8 rows\n"
          f"  broken: rows as they stand in the files   {broken:.3f}   {broken_loss:.3f}\n"
          f"  fixed: rows shuffled over all files       {fixed:.3f}   {fixed_loss:.3f}\n"
          f"  ratio                                     {broken / fixed:.1f}  (SmolLM3: 1.6)")
    return dict(broken=broken, fixed=fixed, broken_loss=broken_loss, fixed_loss=fixed_loss)


class Indexed(data.Loader):
    """A list of all rows of the run, drawn and shuffled before the first one: as nanosets had it, 16 bytes a row."""

    def __init__(self, sources, mixture, seq_len, total_samples, seed):
        super().__init__(sources, mixture, seq_len, total_samples, seed)
        rng, n = np.random.default_rng(seed), self.n_rows[0]
        self.source = np.zeros(total_samples, np.int64)  # there is one here
        self.row = np.concatenate([rng.permutation(n) for _ in range(-(-total_samples // n))])[:total_samples]

    def locate(self, g):
        return int(self.source[g]), int(self.row[g]), g // self.n_rows[0]


def big_index(most=7):
    """A loader whose index grows with the length of the run. (data.py, Loader.locate and permute: computed, not stored)

    Nanosets wrote down all rows of the run, 43 GB for SmolLM3's 4.7M steps of 576; throughput broke down, on one node too,
    where nothing but the number of steps had been changed. Here: memory held and time to the first batch.
    """
    result, tokens = {}, np.zeros(2**26, np.uint16)
    sources = [data.Source("text", tokens, tokens, dict(eos=1), {})]
    print(f"{'rows of the run':>18}{'broken: an index':>26}{'fixed: a function':>26}")
    for rows in (10**k for k in range(5, most + 1)):
        for name, Loader in (("broken", Indexed), ("fixed", data.Loader)):
            start = time.perf_counter()
            Loader(sources, "", 256, rows, 0).batch(0, 8)
            seconds = time.perf_counter() - start
            tracemalloc.start()  # slow, so not in the time
            loader = Loader(sources, "", 256, rows, 0)
            result[name, rows] = tracemalloc.get_traced_memory()[0], seconds
            tracemalloc.stop()
            del loader
        cells = ((size / 1e6, seconds * 1000) for size, seconds in (result["broken", rows], result["fixed", rows]))
        print(f"{rows:18,}" + "".join("{:13.2f} MB {:7.1f} ms".format(*c) for c in cells))
    each = result["broken", rows][0] / rows
    print(f"  {each:.0f} bytes a row; SmolLM3's 4,720,000 steps of 576 rows: {each * 4_720_000 * 576 / 1e9:.0f} GB a process")
    return result


def slow_disk(steps=112):
    """Storage that stalls now and then, and a mean that hides it. (data.py, prefetch; train.py, pace: the slowest 5 %)

    SmolLM3's shards lay on a disk that was nearly full: median 13,728 tok/s, 7,003 in the slowest 5 % of the steps. Here every
    12th batch comes later by the time of six steps: two batches ahead are too few for that, sixteen are enough.
    """
    original, stall = data.Loader.batch, 0.0

    def stalling(self, consumed, *rest):
        time.sleep(stall * (consumed // 8 % 12 == 11))
        return original(self, consumed, *rest)

    def run(depth):
        with patch.object(data, "prefetch", functools.partial(data.prefetch, depth=depth)):
            said = pretrain(out, steps=steps, log_every=steps)["said"]
        row = steps_of(f"{out}/run")[-1]
        return (row["tok_per_s"], row["tok_per_s_median"], row["tok_per_s_p5"], row["data_wait"],
                next((line for line in said.splitlines() if line.startswith("WARNING: the slowest")), "WARNING: none"))

    with workplace() as out:
        result = dict(steady=run(2))
        stall = 6 * 1024 / result["steady"][1]
        with patch.object(data.Loader, "batch", stalling):
            result |= dict(stalls=run(2), deep=run(16))
    print("tok/s                              mean  median  slowest 5 %  waiting for data")
    for name, title in dict(steady="no stalls", stalls="stalls, 2 batches ahead", deep="stalls, 16 batches ahead").items():
        print("  {:30}{:7,.0f}{:8,.0f}{:13,.0f}{:17.0%}".format(title, *result[name][:4]))
    print(f"the log: {result['stalls'][4]}")
    return result


def bf16_weights(steps=100):
    """Weights kept in bfloat16 lose small updates. (model.py, Transformer: parameters are float32, compute_dtype is not)

    bfloat16 has 8 bits: next to 0.02 the nearest numbers are 0.0001 apart, and AdamW at a learning rate of 1e-5 moves a weight
    by 0.00001. Rounded, it stays where it was, step after step. SmolLM3's mid-training went wrong so, under Accelerate.
    """
    def weights(run):
        return {n: w.bfloat16() for n, w in nano.read_checkpoint(run)["model"].items()}

    def tuned():
        loss = pretrain(out, init=f"{out}/base", steps=steps, optimizer="adamw", lr=1e-5, dtype="bfloat16", weight_decay=0.0)
        after = weights(f"{out}/run")
        return sum(int((w != after[n]).sum()) for n, w in before.items()) / size, loss["val_loss"]

    ready = train.ready
    with workplace() as out:
        start = pretrain(out, "base", steps=steps, dtype="bfloat16")["val_loss"]
        before = weights(f"{out}/base")
        size = sum(w.numel() for w in before.values())
        fixed, fixed_loss = tuned()
        with patch.object(train, "ready", lambda model, *rest: ready(model.bfloat16(), *rest)):
            broken, broken_loss = tuned()
    print(f"{steps} more steps with AdamW at 1e-5: held-out loss, and the weights that have moved by a bfloat16 or more\n"
          f"  before                            {start:.4f}\n"
          f"  broken: weights in bfloat16       {broken_loss:.4f}   {broken:6.1%}\n"
          f"  fixed: weights in float32         {fixed_loss:.4f}   {fixed:6.1%}")
    return dict(start=start, broken=broken, fixed=fixed, broken_loss=broken_loss, fixed_loss=fixed_loss)


def micro_steps(steps=200):
    """Micro-batches counted as optimizer steps: the schedule is over early. (train.py, main: run.step; lr_at)

    With rows in four micro-batches the learning rate has come down to 0 after a quarter of the run, and the other three train
    nothing, at full price.
    """
    lr_at = train.lr_at

    def run():
        loss = pretrain(out, steps=steps, micro_batch=2)["val_loss"]
        return loss, sum(row["lr"] > 0 for row in steps_of(f"{out}/run"))

    with workplace() as out:
        fixed_loss, fixed = run()
        with patch.object(train, "lr_at", lambda step, cfg: lr_at(min(4 * step, cfg.steps), cfg)):
            broken_loss, broken = run()
    print(f"{steps} optimizer steps of 4 micro-batches: held-out loss, and steps that had a learning rate\n"
          f"  broken: the schedule counts micro-batches   {broken_loss:.3f}   {broken} of {steps}\n"
          f"  fixed: it counts optimizer steps            {fixed_loss:.3f}   {fixed} of {steps}")
    return dict(broken=broken, fixed=fixed, broken_loss=broken_loss, fixed_loss=fixed_loss)


def mean_of_means():
    """The mean of micro-batches' means: tokens in short answers weigh more. (train.py, forward_backward: the step's count)

    Sixteen chats, one a micro-batch, with 2 to 29 trained tokens each. The gradient is another one than that of all at once,
    and it changes with --micro_batch, which should change nothing but memory.
    """
    def of_means(model, batch, cfg, rt, forwards=None):
        (ids, targets, docs), total = batch, 0.0
        parts = list(train.micro_batches(model, len(ids), cfg.micro_batch, rt))
        for rows in parts:
            nll, _ = model(ids[rows], docs[rows], targets[rows])
            loss = nll / (targets[rows] != -100).sum() / len(parts)
            loss.backward()
            total = total + loss.detach()
        return total

    def gradient(micro_batch, how):
        model.zero_grad()
        how(model, batch, sft.Config(micro_batch=micro_batch), rt)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rt = infra.setup(sft.Config(device="cpu", dtype="float32"))
    model = nano.Transformer(nano.Config(**SMALL))
    chats = [data.render(row["messages"], row["mode"]) for row in data.sum_chats(8)]
    batch = data.chat_batch([[chat] for chat in chats], max(len(ids) for ids, _ in chats))
    counts = [sum(mask) for _, mask in chats]
    whole = gradient(0, train.forward_backward)
    broken, fixed = (float((gradient(1, how) - whole).norm() / whole.norm()) for how in (of_means, train.forward_backward))
    print(f"16 chats of {min(counts)} to {max(counts)} trained tokens, one at a time: error of the gradient; weight of a\n"
          f"token in the shortest against one in the longest\n"
          f"  broken: mean of means       {broken:8.1e}   {max(counts) / min(counts):4.1f} : 1\n"
          f"  fixed: sums / all tokens    {fixed:8.1e}    1.0 : 1")
    return dict(broken=broken, fixed=fixed, weight=max(counts) / min(counts))


# --- post-training ---------------------------------------------------------------------------------------------------

def no_persona(chats=100):
    """A system prompt that is None is taken for a missing one: personas are lost. (data.py, check_messages: refused)

    The template then gives every chat the default persona. SmolLM3 was trained so, and no benchmark changed when it was put
    right: somebody talked to the model and noticed. What is trained, the answers, are the same tokens either way.
    """
    def none_is_missing(messages):
        if messages[0]["content"] is None:
            del messages[0]

    def rendered(path):
        rows = [row for _, row in data.read_examples(path, {})]
        chats = [data.render(row["messages"], row["mode"], "smollm3", date="today") for row in rows]
        texts = [tokenizer.decode(ids) for ids, _ in chats]
        return (sum(f"You are persona {i}." in text for i, text in enumerate(texts)),
                sum(data.PERSONA in text for text in texts), [[t for t, m in zip(*chat) if m] for chat in chats])

    tokenizer = data.get_tokenizer("bytes")
    with tempfile.TemporaryDirectory() as out:
        for name, key in (("good", "persona"), ("bad", "custom_instructions")):  # the bad one looks under another name: None
            rows = [dict(persona=f"You are persona {i}.") for i in range(chats)]
            Path(out, name).write_text("".join(json.dumps(dict(messages=[
                dict(role="system", content=row.get(key)), dict(role="user", content="Who are you?"),
                dict(role="assistant", content=f"I am number {i}.")])) + "\n" for i, row in enumerate(rows)))
        with patch.object(data, "check_messages", none_is_missing):
            broken, default, trained = rendered(f"{out}/bad")
        fixed, own, the_same = rendered(f"{out}/good")
        try:
            refused = str(rendered(f"{out}/bad"))
        except ValueError as e:
            refused = str(e).replace(f"{out}/", "")
    print(f"{chats} chats, each with a persona of its own: how many keep it, how many get the default one\n"
          f"  broken: None is no system message     {broken:4} {default:4}   trained tokens the same: {trained == the_same}\n"
          f"  fixed: the system message as it is    {fixed:4} {own:4}\n"
          f"what the reader says of the None: {refused}")
    return dict(broken=broken, fixed=fixed, default=default, refused=refused, same=trained == the_same)


def user_turns(steps=200):
    """Training on the users' turns too: less is learnt about answers. (data.py, render: the mask; sft.py, --loss_on)

    Two thirds of the tokens of these chats are headers and questions. The model becomes good at asking, which nobody wants, and
    the same steps teach it less about answering. (Playbook: masking users' turns, IFEval 67.1 -> 71.6.)
    """
    with tempfile.TemporaryDirectory() as out:
        new_model(f"{out}/start")
        (fixed, fixed_user), (broken, broken_user) = teach(out, steps), teach(out, steps, loss_on="all")
    print(f"held-out loss after {steps} steps, nats per token        of answers   of all the rest\n"
          f"  broken: --loss_on=all                             {broken:6.3f}   {broken_user:6.3f}\n"
          f"  fixed: --loss_on=assistant                        {fixed:6.3f}   {fixed_user:6.3f}")
    return dict(broken=broken, fixed=fixed, broken_user=broken_user, fixed_user=fixed_user)


def no_doc_mask(steps=200):
    """Chats that see the others in their packed row. (data.py, chat_batch, to_batch: doc_ids; model.py, visible: the mask)

    Then what a chat is answered depends on what it was packed with, and a model trained so has seen only one chat in four or
    five begin a row, where every chat begins when it is used.
    """
    chat_batch = data.chat_batch

    def blind(rows, T):
        ids, targets, docs = chat_batch(rows, T)
        return ids, targets, torch.zeros_like(docs)

    infra.setup(sft.Config(device="cpu", dtype="float32"))
    model = nano.Transformer(nano.Config(**SMALL, initializer_range=0.1))
    chats = [data.render(row["messages"], row["mode"]) for row in data.sum_chats(2)]
    model.requires_grad_(False)
    alone = model(chat_batch([chats[-1:]], n := len(chats[-1][0]) - 1)[0])[0]
    at = sum(len(ids) - 1 for ids, _ in chats[:-1])
    fixed, broken = (float((model(ids, docs)[0, at:at + n] - alone).abs().max())
                     for ids, _, docs in (chat_batch([chats], 256), blind([chats], 256)))
    with tempfile.TemporaryDirectory() as out:
        new_model(f"{out}/start")
        fixed_loss = teach(out, steps)[0]
        with patch.object(data, "chat_batch", blind):
            broken_loss = teach(out, steps)[0]
    print(f"a packed chat's logits, furthest from those it has alone; held-out loss, one chat a row, after {steps} steps\n"
          f"  broken: one causal mask for the row   {broken:8.1e}   {broken_loss:.3f}\n"
          f"  fixed: each chat sees itself only     {fixed:8.1e}   {fixed_loss:.3f}")
    return dict(broken=broken, fixed=fixed, broken_loss=broken_loss, fixed_loss=fixed_loss)


def grow_longer(init="", steps=50, taught=500):
    """GRPO for being right alone: answers grow longer and longer. (grpo.py, overlong_penalty; --overlong_max)

    Most of the demonstrations are bare sums, which the model cannot do in its head; some show their working, and a few are
    wordy and check it. Reward finds the working, and then the words. SmolLM3's /no_think went from 1,175 tokens to 7,300.
    `python tests/lessons.py grow_longer out/sft` begins with that model; without one a small one is taught first.
    """
    def run(overlong_max):
        cfg = grpo.Config(init=init or f"{out}/run", out=f"{out}/grpo", overwrite=True, steps=steps, prompts=8, beta=0.0,
                          lr=6e-4, log_every=1, overlong_max=overlong_max, device="cpu")
        quietly(grpo, cfg, validate=lambda run: {})
        rows = [(row["completions/mean_length"], row["accuracy"]) for row in steps_of(cfg.out)]
        return [tuple(map(statistics.fmean, zip(*part))) for part in (rows[:3], rows[-10:])]

    sum_chats = data.sum_chats
    with tempfile.TemporaryDirectory() as out:
        if not init:
            new_model(f"{out}/start", hidden_size=128, intermediate_size=256)
            with patch.object(data, "sum_chats", lambda n: [row for row in sum_chats(n) if row["mode"] == "no_think"]):
                teach(out, taught, lr=8e-3, style="chatml", dtype="auto", problems=16)
        start, broken = run(0)
        fixed = run(40)[1]
    print(f"sampled /no_think answers, the first 3 and the last 10 of {steps} steps     mean tokens   right\n"
          f"  at the start                          {start[0]:5.1f}   {start[1]:.0%}\n"
          f"  broken: no length penalty             {broken[0]:5.1f}   {broken[1]:.0%}\n"
          f"  fixed: penalty from 28 to 40 tokens   {fixed[0]:5.1f}   {fixed[1]:.0%}")
    return dict(start=start[0], broken=broken[0], fixed=fixed[0], right=(start[1], broken[1], fixed[1]))


def drop_eos(steps=30, lr=1e-3, **shape):
    """GRPO without credit for the end token: a length penalty that is hard to obey. (grpo.py, rollout: the mask)

    A random model whose only reward is the penalty, linear from the first token to the 64th. An answer ends where it happens
    to say an end token, so to be brief is to make that token likelier, and the loss must see it. Loss type `grpo`, in which
    answers weigh the same whatever their length. In a sum over all tokens of the step (dapo) long answers have more of them to
    push down, and that shortens answers even so, more slowly.
    """
    original = grpo.rollout

    def without_end(run):
        batch, metrics, samples = original(run)
        ends = {run.tokenizer.special["<|im_end|>"], run.tokenizer.eos}
        for i, (ids, mask) in enumerate(batch.rows):
            if ids[-1] in ends:
                batch.rows[i], batch.sampled[i] = (ids, mask[:-1] + [0]), batch.sampled[i][:-1]
        batch.whole = batch.whole[0], sum(sum(mask) for _, mask in batch.rows)
        return batch, metrics, samples

    def lengths(out):
        cfg = grpo.Config(init=f"{out}/start", out=f"{out}/run", overwrite=True, steps=steps, prompts=8, micro_batch=64,
                          rewards="", lr=lr, loss_type="grpo", beta=0.0, max_new_tokens=64, overlong_max=64,
                          overlong_cache=64, log_every=1, device="cpu")
        quietly(grpo, cfg, validate=lambda run: {})
        return [row["completions/mean_length"] for row in steps_of(cfg.out)]

    with tempfile.TemporaryDirectory() as out:
        Path(out, "start").mkdir()
        infra.setup(grpo.Config(device="cpu"))  # the seed
        nano.save_checkpoint(f"{out}/start", nano.Transformer(nano.Config(**shape)))
        start, *_, fixed = lengths(out)
        with patch.object(grpo, "rollout", without_end):
            *_, broken = lengths(out)
    print(f"mean length of the 64 answers of a step, after {steps} steps with nothing but a length penalty\n"
          f"  at the start                            {start:5.1f} tokens\n"
          f"  broken: end token left out of the loss  {broken:5.1f} tokens\n"
          f"  fixed: end token in the loss            {fixed:5.1f} tokens")
    return dict(start=start, broken=broken, fixed=fixed)


LESSONS = {f.__name__: f for f in (same_seed, file_order, big_index, slow_disk, bf16_weights, micro_steps, mean_of_means,
                                   no_persona, user_turns, no_doc_mask, grow_longer, drop_eos)}


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in LESSONS:
        LESSONS[sys.argv[1]](*sys.argv[2:])
    else:
        print("\n".join(f"{name:15}{f.__doc__.splitlines()[0]}" for name, f in LESSONS.items()))
        sys.exit(f"{sys.argv[1]}: no such lesson" if sys.argv[1:] else 0)
