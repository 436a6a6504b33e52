"""infra.py's planner: the playbook's published numbers, memory against what torch keeps, the choice of a layout, when to save,
this machine measured by its own benchmark, and one clear line for whatever it cannot plan."""
import contextlib, dataclasses, io, json, math, random, re, runpy, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data, infra, model, train

PLAN = infra.plan_options()
PRESETS = {name: dict(shape, preset=name) for name, shape in model.PRESETS.items()}
SMOLLM3 = ("smollm3-3b", "--gpu=h100", "--gpus=384", "--tokens=11e12")
V, d, f, L, Q, K, T = 128256, 2048, 11008, 36, 16 * 128, 4 * 128, 4096  # SmolLM3-3B's config.json; Q, K: all heads together
N = V * d + L * (2 * d * (Q + K) + 3 * d * f + 2 * d) + d
FLOPS = 6 * N + 12 * L * Q * T


def run(capsys, *argv):
    """-> (figures, what was printed), or (None, the one line that it ended with)."""
    try:
        figures = infra.plan(infra.cli(PLAN, PRESETS, list(argv)))
    except SystemExit as end:
        err = capsys.readouterr().err.strip()
        line = err if end.code == 2 else end.code
        assert isinstance(line, str) and len(line) > 10 and "\n" not in line and (end.code == 2 or not err), (argv, line)
        return None, line
    return figures, capsys.readouterr().out


def total(tp, rows):
    """GB of SmolLM3 in training, written out: 18 bytes a parameter, layers, logits, 1.5 GB of context, 5 % fragmented."""
    layer = 2 * (2 * d + 2 * d) + 2 * (Q + Q + 2 * K + 4 * f) / tp
    return 1.05 * (18 * N / tp + rows * T * (L * layer + V / tp * 16) + 1.5e9) / 1e9


def choice(memory_gb, **knobs):
    p = PLAN(**model.PRESETS["smollm3-3b"] | knobs)
    return infra.layout(p, model.shape_of(p), memory_gb * 1e9)


# --- the published numbers -------------------------------------------------------------------------------------------

def test_smollm3s_parameters_and_flops_are_counted(capsys):
    figures, out = run(capsys, *SMOLLM3)
    assert figures["params"] == N == 3_075_098_624 and figures["tokens"] == 11e12
    assert f"{FLOPS / 1e9:.4g} GFLOP per token" in out and f"{FLOPS * 11e12:.3g} FLOP for 1.1e+13 tokens" in out
    assert run(capsys, "smollm3-3b", "--gpu=h100")[0]["tokens"] == 20 * N


def test_the_playbooks_384_gpus_come_from_the_rounded_n_with_the_exact_figures_beside(capsys):
    figures, out = run(capsys, *SMOLLM3, "--tflops=720", "--mfu=0.3", "--days=28", "--params=3e9")
    assert [math.ceil(x * 11e12 / (0.3 * 720e12 * 28 * 86400)) for x in (6 * 3e9, 6 * N, FLOPS)] == [379, 389, 465]
    assert list(figures["gpus_needed"].values()) == [(379, 384), (389, 392), (465, 472)]  # and in machines of eight
    assert re.search("379 GPUs for 28 days, 384 .*6N of the rounded N at 30% of 720 TFLOP/s", out) and "389 GPUs" in out
    needed = run(capsys, *SMOLLM3, "--days=14")[0]["gpus_needed"].values()  # without --params nothing is rounded
    assert [exact for exact, _ in needed] == [math.ceil(x * 11e12 / (0.3 * 989e12 * 14 * 86400)) for x in (6 * N, FLOPS)]
    needed = run(capsys, *SMOLLM3, "--days=14", "--tok_per_s=13750")[0]["gpus_needed"].values()  # a known speed needs no mfu
    assert [exact for exact, _ in needed] == [math.ceil(11e12 / 13750 / 14 / 86400)]


def test_the_playbooks_speed_gives_its_days_and_both_mfu(capsys):
    figures, out = run(capsys, *SMOLLM3, "--tok_per_s=13750", "--price=3")
    hours = 11e12 / 13750 / 3600
    assert figures["days"] == pytest.approx(hours / 384 / 24) == pytest.approx(24.1, abs=0.05)
    assert figures["mfu_6N"] == pytest.approx(6 * N * 13750 / 989e12) == pytest.approx(0.257, abs=5e-4)
    assert figures["mfu"] == pytest.approx(FLOPS * 13750 / 989e12) == pytest.approx(0.307, abs=5e-4)
    assert figures["gpu_hours"] == pytest.approx(hours) and figures["cost"] == pytest.approx(3 * hours)
    assert "24.1 days on 384 x h100 at 13,750 tok/s each; MFU 25.7% (6N), 30.7% (6N + 12LHDT) of 989 TFLOP/s" in out
    assert run(capsys, *SMOLLM3, "--mfu=0.4")[0]["tok_per_s"] == pytest.approx(0.4 * 989e12 / FLOPS)  # mfu counts all FLOPs
    assert run(capsys, *SMOLLM3, "--mfu=0.4", "--tflops=500")[0]["tok_per_s"] == pytest.approx(0.4 * 500e12 / FLOPS)


def test_the_layout_recommended_for_smollm3_is_the_one_it_trained_with(capsys):
    figures, out = run(capsys, *SMOLLM3, "--tok_per_s=13750")
    assert [figures[k] for k in ("tp", "dp", "micro_batch", "accumulation")] == [2, 192, 3, 1]
    assert figures["step_tokens"] == 2_359_296 == 192 * 3 * 4096
    assert figures["step_seconds"] == pytest.approx(2_359_296 / 13750 / 384)
    assert figures["memory"]["total"] == pytest.approx(1e9 * total(2, 3)) and total(2, 3) < 80 < total(1, 1)
    assert re.search(rf"tp=2 micro_batch=3 +<-- +{18 * N / 2e9:.1f} ", out) and out.count("<--") == 1
    assert re.search(r"layout +tp=2 dp=192 micro_batch=3, 1 pass a step: 2,359,296 tokens in\s+0.447 s: the smallest tp", out)


def test_traffic_is_that_of_megatron_and_of_a_ring(capsys):
    figures, out = run(capsys, *SMOLLM3, "--tok_per_s=13750")
    a_token, step = L * 4 * d * 2 * 2 * (2 - 1) / 2, 2_359_296 / 13750 / 384  # layers, all-reduces, width, bf16, 2(t-1)/t
    assert a_token == pytest.approx(590e3, rel=1e-3) and figures["tp_bytes"] == pytest.approx(a_token * 3 * T)
    assert figures["dp_bytes"] == pytest.approx(2 * 191 / 192 * 4 * N / 2) == pytest.approx(12.2e9, rel=5e-3)
    assert f"{a_token * 3 * T / 450e9 / step:.0%} of the time at 450 GB/s" in out
    assert f"{figures['dp_bytes'] / 50e9 / step:.0%} of the time at 50 GB/s, less than" in out
    for network, verb in ((46, "less"), (45, "more")):  # 12.24 GB / 0.447 s / 0.6 = 45.6 GB/s
        out = run(capsys, *SMOLLM3, "--tok_per_s=13750", f"--network={network}")[1]
        assert f"at {network} GB/s, {verb} than the backward pass can hide" in out
    for speed, much in ((76_000, False), (77_000, True)):  # 450 GB/s / 590 kB / 2 ranks * 0.2 = 76.3k tokens/s
        assert ("too much" in run(capsys, *SMOLLM3, f"--tok_per_s={speed}")[1]) == much
    figures, out = run(capsys, "smollm3-3b", "--gpu=h100", "--gpus=8", "--tp=4", "--network=1")  # one machine: its own links
    assert figures["tp_bytes"] == pytest.approx(L * 4 * d * 2 * 2 * 3 / 4 * figures["step_tokens"] / 2)
    assert figures["dp_bytes"] == pytest.approx(4 * N / 4) and "at 1 GB/s" not in out and out.count("at 450 GB/s") == 2
    assert "at 1 GB/s" in run(capsys, "smollm3-3b", "--gpu=h100", "--gpus=16", "--network=1")[1]


def test_checkpoints_are_youngs_two_hours_at_llama_3s_failure_rate(capsys):
    figures, out = run(capsys, *SMOLLM3)
    between = 54 * 24 * 16384 / 419 / 384 * 3600  # seconds from one failure of 384 GPUs to the next
    every = math.sqrt(2 * 60 * between)
    assert figures["checkpoint_seconds"] == pytest.approx(every, rel=1e-3) == pytest.approx(2.1 * 3600, rel=1e-2)
    assert figures["lost"] == pytest.approx(60 / every + every / 2 / between, rel=1e-3)  # saving, and half an interval redone
    assert figures["checkpoint_bytes"] == 3 * 4 * N and "36.9 GB every 2.1 h (Young; 2.08 by Daly)" in out and "132 h" in out
    figures, _ = run(capsys, *SMOLLM3, "--save_seconds=15", "--failure_hours=384")
    assert figures["checkpoint_seconds"] == pytest.approx(math.sqrt(2 * 15 * 3600))


# --- memory ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tp, layer", [(1, 114_688), (2, 65_536)])
def test_memory_is_the_playbooks_table_and_the_closed_forms(tp, layer):
    m, tokens = infra.gpu_memory(model.Config(**model.PRESETS["smollm3-3b"]), tp, 3), 3 * T
    table = (5865, 11_730, 11_730, 23_460)  # MiB: weights in bf16 and in fp32, gradients, Adam
    assert [n * N / 2**20 for n in (2, 4, 4, 8)] == pytest.approx(table, rel=1e-4)
    assert m["states"] == 18 * N / tp == pytest.approx(2**20 * sum(table) / tp, rel=1e-4)
    assert layer == 2 * 4 * d + 2 * (2 * Q + 2 * K + 4 * f) // tp
    assert m["activations"] == pytest.approx(L * layer * tokens) and m["logits"] == pytest.approx(16 * V / tp * tokens)
    assert m["recomputed"] == pytest.approx((L * 2 * d + layer) * tokens)  # every block's input, and one block at work
    assert m["total"] == pytest.approx(1e9 * total(tp, 3))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_blocks_activations_are_what_torch_keeps_for_the_backward_pass(tp):
    """A rank's block has 1/tp of the heads and of the MLP. Masks of None: SDPA, which keeps no T x T scores."""
    c = model.Config(hidden_size=128, intermediate_size=688, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    own = dataclasses.replace(c, intermediate_size=688 // tp, num_attention_heads=8 // tp, num_key_value_heads=2 // tp)
    net, kept, rows, tokens = model.Transformer(own), {}, 2, 250
    net.compute_dtype = torch.bfloat16
    rope, block = net.rope(torch.arange(tokens)), net.layers[0]
    x = torch.randn(rows, tokens, 128).bfloat16().requires_grad_()
    keep = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # they stay alive: no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (keep(t), t)[1], lambda t: t):
        block(x, rope, (None, None))
    others = {tuple(sorted(t.shape)) for t in (*block.parameters(), *rope)}
    kept = [t for t in kept.values() if tuple(sorted(t.shape)) not in others]
    halves, both = (sum(t.untyped_storage().nbytes() for t in kept if t.itemsize <= size) / rows / tokens for size in (2, 8))
    formula = infra.gpu_memory(c, tp, 1)["activations"] / c.num_hidden_layers / c.max_position_embeddings
    assert formula == pytest.approx(both, rel=0.3)
    # closer: a GPU's RMSNorm keeps its input, a CPU's two float32 copies of that instead
    unfused = any(t.dtype == torch.float32 and t.shape[-1] == 128 for t in kept)
    assert formula == pytest.approx(halves + 2 * 2 * 128 * unfused, rel=0.02)


# --- layout ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gb, knobs, tp, rows", [
    (80, dict(gpus=384), 2, 3), (80, dict(gpus=8), 2, 3),        # all that a replica has; 3 of 144, for 4 need 89 GB
    (total(1, 2) + 0.01, dict(gpus=8), 1, 2), (total(1, 2) - 0.01, dict(gpus=8), 2, 4),
    (50, dict(gpus=8), 4, 3),                                    # one row would fit at 2 (45 GB), two at 4 (33)
    (50, dict(gpus=2), 2, 1), (50, dict(gpus=6), 2, 1),          # as many as there are, and a divisor of them
    (total(4, 1) + 0.01, dict(gpus=8), 4, 1), (200, dict(gpus=1), 1, 4), (100, dict(gpus=3), 1, 1),
    (50, dict(gpus=8, batch_tokens=1), 2, 1),                    # one row a replica, and one fits: no larger tp for two
    (50, dict(gpus=8, batch_tokens=4 * T + 1), 4, 3),            # five rows over two replicas: three each
    (80, dict(gpus=8, tp=4), 4, 6), (80, dict(gpus=8, micro_batch=1), 2, 1), (80, dict(gpus=8, tp=4, micro_batch=5), 4, 5),
])
def test_layout_takes_the_smallest_tp_at_which_two_rows_fit_and_else_one_row(gb, knobs, tp, rows):
    *found, why = choice(gb, **knobs)
    assert found == [tp, rows] and total(tp, rows) <= gb
    assert ("as asked" in why) == ("tp" in knobs or "micro_batch" in knobs)


@pytest.mark.parametrize("gb, knobs, tried", [
    (total(4, 1) - 0.01, dict(gpus=8), "1, 2, 4"), (80, dict(gpus=1), "1"), (80, dict(gpus=7), "1"),
    (80, dict(gpus=8, tp=1), "1"), (40, dict(gpus=16, num_key_value_heads=2), "1, 2"),  # never more than key/value heads
])
def test_layout_says_what_it_tried_when_nothing_fits(gb, knobs, tried):
    tp, rows, why = choice(gb, **knobs)
    assert tp is rows is None and why.startswith(f"does not fit into {gb:g} GB with tp of {tried}: ") and "ZeRO" in why


def test_a_model_that_fits_nowhere_still_gets_its_days_and_its_table(capsys):
    figures, out = run(capsys, "smollm3-3b", "--gpu=RTX 4090", "--gpus=3")
    assert figures["tp"] is None and figures["days"] > 0 and "<--" not in out
    assert re.search(r"\nlayout +does not fit into 24 GB with tp of 1: recomputation, .*larger GPU\n$", out)


def test_an_asked_micro_batch_that_does_not_fit_takes_a_larger_tp_or_is_said_not_to_fit(capsys):
    assert total(2, 7) > 80 > total(4, 7) and choice(80, gpus=8, micro_batch=7)[:2] == (4, 7)
    figures, out = run(capsys, "smollm3-3b", "--gpu=h100", "--tp=2", "--micro_batch=1000")
    assert figures["tp"] is None and "does not fit" in out and "tp=2 micro_batch=1000" in out


@pytest.mark.parametrize("key, odd", [("intermediate_size", 11007), ("vocab_size", 128257)])
def test_the_planner_takes_no_tp_that_the_model_refuses(capsys, key, odd):
    assert run(capsys, *SMOLLM3, f"--{key}={odd}")[0]["tp"] is None  # tp=1 does not fit, and 2 does not divide
    assert re.search(rf"tp=2: .*{key}={odd}", run(capsys, *SMOLLM3, f"--{key}={odd}", "--tp=2")[1])


# --- any command line ------------------------------------------------------------------------------------------------

def test_preset_as_a_flag_is_the_bare_word(capsys):
    assert run(capsys, "--preset=smollm3-3b", "--gpu=h100")[0]["params"] == N
    assert re.search(r"foo.*expected", run(capsys, "--preset=foo", "--gpu=h100")[1])


@pytest.mark.parametrize("flags, message", [
    *((f"--{key}={value}", f"{key}={value}(.0)?: more than 0, ") for value in (0, -1)
      for key in "gpus batch_tokens mfu days network save_seconds failure_hours".split()),
    *((f"--{key}=-1", f"{key}=-1(.0)?: 0 or more, ")
      for key in "tokens tok_per_s tflops params tp micro_batch price".split()),
    ("--gpus=2.5", "--gpus: a whole number expected"), ("--mfu=nan", "--mfu: a number expected"), ("--gqu=h100", "mean gpu"),
    ("--hidden_size=0", "1 or more"), ("--tp=3", "tp=3: a divisor of gpus=8.*num_key_value_heads=4.* expected"),
    ("--tp=8", "tp=8: a divisor"), ("--tp=4 --gpus=6", "tp=4: a divisor"), ("--gpu=gtx", "--gpu=gtx: B200, .*H100, .*expected"),
    ("--mfu=1.01", "mfu=1.01: .*1 at most"), ("--gpu= --gpus=16", "--gpus: without --gpu .*--gpu=h100"),
    ("--gpu=gtx --tflops=9", "gtx"), ("--gpu=t4", "--gpu=t4: .*--tflops where it has no bf16"), ("--gpu=t4 --why", "--gpu=t4"),
])
def test_a_bad_value_ends_with_one_line(capsys, flags, message):
    figures, line = run(capsys, "smollm3-3b", "--gpu=h100", *flags.split())
    assert figures is None and re.search(message, line), line


def numbers(x):
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else None
    return [x or 0] if parts is None else [n for part in parts for n in numbers(part)]


def check(capsys, *argv):
    """A plan of finite figures that agree with each other, or one line."""
    figures, text = run(capsys, *argv)
    assert not re.search(r"\b(nan|inf)\b", text.replace("'nan'", "")), (argv, text)
    assert figures is None or all(math.isfinite(n) for n in numbers(figures)), (argv, figures)
    if figures and figures.get("tp"):
        p = infra.cli(PLAN, PRESETS, list(argv))
        a_pass = figures["dp"] * figures["micro_batch"] * p.max_position_embeddings
        assert figures["tp"] * figures["dp"] == p.gpus and p.num_key_value_heads % figures["tp"] == 0, argv
        assert 0 <= figures["step_tokens"] - p.batch_tokens < a_pass, argv
        assert figures["step_tokens"] == figures["accumulation"] * a_pass, argv
        assert p.tp in (0, figures["tp"]) and p.micro_batch in (0, figures["micro_batch"]), argv
        assert figures["memory"]["total"] <= 1e9 * infra.data_sheet(p.gpu).gb, argv
    return figures


def test_random_command_lines_get_a_consistent_plan_or_one_line(capsys):
    rng, good = random.Random(0), 0
    knobs = dict(gpus=[0, 1, 3, 7, 8, 12, 384, 100_000], tp=[0, 1, 2, 3, 4, 8], micro_batch=[0, 1, 5, 64], why=["true"],
                 tokens=[0, 1, 1e9, 1e16], batch_tokens=[-1, 1, 4096, 999_999, 1e8], max_position_embeddings=[1, 100, 65536],
                 mfu=[1e-6, 0.5, "nan"], tok_per_s=[0, 0.01, 1e9], tflops=[0, 1, 1e5], days=[1e-3, 1e5], params=[0, 1, 1e13],
                 network=[1e-3, 1e4], save_seconds=[1e-3, 1e6], failure_hours=[1e-3, 1e9], price=[0, -1, 1e4],
                 hidden_size=[96, 12288], intermediate_size=[1, 4096], num_hidden_layers=[1, 7, 1000], vocab_size=[0, 1001],
                 num_key_value_heads=[1, 2, 3, 4], tie_word_embeddings=["false"])
    for _ in range(1000):
        flags = [f"--{k}={rng.choice(knobs[k])}" for k in rng.sample(list(knobs), rng.randrange(5))]
        gpu = rng.choice([*infra.SHEETS, "a100", "H200", "gtx"])
        good += check(capsys, rng.choice(list(PRESETS)), f"--gpu={gpu}", *flags) is not None
    assert 300 < good < 900


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(PLAN) if field.type in (int, float)])
def test_an_absurd_value_gets_finite_figures_or_one_line(capsys, key):
    for value in ("1e-320", "1e-100", "1e12", "1e19", "1e100", "1e308", "-1e308"):
        for more in ([], ["--why"]):
            check(capsys, *SMOLLM3, f"--{key}={value}", *more)


# --- should it be trained? -------------------------------------------------------------------------------------------

def test_why_gives_each_answer_its_cost_and_ends_with_fine_tuning(capsys):
    figures, out = run(capsys, "smollm3-3b", "--tokens=11.2e12", "--tok_per_s=13750", "--price=2", "--why")  # no --gpu: h100s
    costs = {tokens: tokens / 13750 / 3600 for tokens in (5 * 1.8e9, 1e11, 20 * N, 11.2e12)}  # SmolLM3's SFT: 5 epochs
    assert (figures["fine_tune_hours"], figures["pretrain_hours"]) == pytest.approx((costs[9e9], costs[11.2e12]))
    assert re.findall(r"^(\d)\. ", out, re.M) == list("12345") and "on h100s at 13,750 tok/s" in out
    assert all(f"{hours:,.0f} GPU-hours ({2 * hours:,.0f} at 2)" in out for hours in costs.values())
    assert re.search(rf"\nNone is true.*: don't train, fine-tune: {9e9 / 11.2e12:.2%} of the cost\..*\n$", out)
    assert "fine_tune_hours" in run(capsys, *SMOLLM3, "--why")[0]


# --- this machine ----------------------------------------------------------------------------------------------------

def fake(monkeypatch, *children):
    """subprocess.run is answered by `children`, one after the other; -> the arguments that train.py was given."""
    commands, children = [], list(children)

    def answer(command, **_):
        assert command[0] == sys.executable and Path(command[1]) == Path(infra.__file__).with_name("train.py")
        commands.append(command[2:])
        if isinstance(children[0], Exception):
            raise children[0]
        return children.pop(0)
    monkeypatch.setattr(infra.subprocess, "run", answer)
    return commands


def child(stdout="", stderr="", returncode=0, **row):
    stdout = "compiling\n" + json.dumps(row) + "\n" if row else stdout
    return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=returncode)


def row(speed=1000, seconds=0.1, memory=1e9):
    return child(machine="a box", tok_per_s=speed, seconds_per_step=seconds, peak_memory_bytes=memory)


def trained(argv):
    return infra.cli(train.Config, train.PRESETS, argv)


def test_this_machine_is_a_straight_line_through_one_and_three_layers(capsys, monkeypatch):
    commands = fake(monkeypatch, row(), row(500, 0.2, 1.2e9))
    figures, out = run(capsys, "smollm3-3b", "--hidden_size=1024", "--tokens=1e9")
    assert figures["tok_per_s"] == pytest.approx(1000 * 0.1 / (0.1 + 35 * 0.05)) and figures["tokens"] == 1e9
    assert figures["peak_memory_bytes"] == pytest.approx(1e9 + 35 * 0.1e9)
    assert "a box: 54 tok/s, 4,500 MB" in out and f"{1e9 / figures['tok_per_s'] / 3600:,.2f} hours for 1e+09 tokens" in out
    again = re.search(r"check: python train.py (.*)", out)[1].split()  # train.py reads them all as the shape that was asked for
    for argv, layers in zip([*commands, again], (1, 3, 36), strict=True):
        shape = model.PRESETS["smollm3-3b"] | dict(hidden_size=1024, num_hidden_layers=layers)
        assert trained(argv).bench and model.shape_of(trained(argv)) == model.Config(**shape)
        assert trained(argv).optimizer == "adamw"


def test_this_machine_is_measured_by_the_real_benchmark(capsys, monkeypatch):
    def here(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train.main(trained(command[2:]))
        return child(out.getvalue())
    monkeypatch.setattr(infra.subprocess, "run", here)
    small = ["--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=5", "--max_position_embeddings=64"]
    figures, _ = run(capsys, "nano", *small)
    assert 10 < figures["tok_per_s"] < 1e9 and figures["peak_memory_bytes"] > 1e7


def test_rows_longer_than_the_presets_batch_are_measured_too(capsys, monkeypatch):
    commands = fake(monkeypatch, row(), row())
    assert run(capsys, "nano", "--max_position_embeddings=3000")[0]
    assert all(trained(argv).max_position_embeddings == 3000 and trained(argv).batch_tokens % 3000 == 0 for argv in commands)


def test_a_noisy_measurement_gives_no_negative_time(capsys, monkeypatch):
    fake(monkeypatch, row(1000, 0.1, 1e9), row(1100, 0.09, 0.9e9))
    figures, _ = run(capsys, "smollm3-3b")
    assert figures["tok_per_s"] > 0 and figures["peak_memory_bytes"] >= 0.9e9


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("answer, message", [
    (child(stderr="Traceback\n  ...\ntrain.py: --tp: bad\n", returncode=1), "train.py: --tp: bad"),
    (child(returncode=-9), r"\b9\b"), (child(returncode=3), r"\b3\b"),
    (child(stderr="UserWarning: slow\n", returncode=-9), r"\b9\b"),  # killed: the last warning is not the reason
    (subprocess.TimeoutExpired(["python"], 300), "timed out after 300"), (child("hello\n"), "Expecting value"),
    (child(), ""), (child("\n\n"), ""), (child("7\n"), ""), (child("null\n"), ""), (child(machine="no figures"), ""),
    (child(machine="no memory", tok_per_s=9, seconds_per_step=1, peak_memory_bytes=None), ""),
])
def test_a_benchmark_that_fails_is_one_line(capsys, monkeypatch, second, answer, message):
    fake(monkeypatch, *[row()] * second, answer, row())
    figures, line = run(capsys, "smollm3-3b")
    assert figures is None and re.search(message, line) and line.startswith("python train.py smollm3-3b --bench with ")
    assert f"with {3 if second else 1} layer" in line and "--gpu=h100 plans for another one" in line


def test_the_command_line_plans_a_preset(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [infra.__file__, "plan", *SMOLLM3, "--why"])
    runpy.run_path(infra.__file__, run_name="__main__")
    assert capsys.readouterr().out.startswith("smollm3-3b: 3,075,098,624 parameters")


def test_a_reader_who_has_seen_enough_gets_no_stack_trace(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    for file, *words in ([infra, "plan", *SMOLLM3], [infra, "plot", str(tmp_path)], [infra, "--help"], [data, "--show=sums"]):
        child = subprocess.Popen([sys.executable, "-u", file.__file__, *words], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
        child.stdout.close()                             # before it has begun
        assert child.stderr.read().strip() == "nobody reads the output any more" and child.wait(60) == 1


def test_help_lists_every_knob_with_its_comment():
    done = subprocess.run([sys.executable, infra.__file__, "plan", "--help"], capture_output=True, text=True, timeout=60)
    notes = dict(re.findall(r"^  --(\w+)=.*\n {8}(\S.*)$", done.stdout, re.M))
    assert done.returncode == 0 and not done.stderr and list(notes) == list(PLAN.__dataclass_fields__)
    assert notes["price"].startswith("of a GPU-hour") and notes["gpus"] == "how many" and "Llama 3" in notes["failure_hours"]
    assert "usage: python infra.py plan [PRESET]" in done.stdout and "nano, small" in done.stdout


def test_an_embedding_that_is_only_looked_up_costs_no_time(capsys):
    figures, _ = run(capsys, "smollm3-3b", "--gpu=h100", "--gpus=8", "--tokens=1e9", "--tie_word_embeddings=false", "--max_position_embeddings=64")
    assert figures["mfu_6N"] < figures["mfu"]
    flops = [re.search(r"([\d.]+) GFLOP", run(capsys, "smollm3-3b", "--gpu=h100", "--gpus=8", "--tokens=1e9", "--lora_rank=16",
                                              f"--tie_word_embeddings={tied}")[1])[1] for tied in ("true", "false")]
    assert flops[0] == flops[1]


def test_adapters_beside_a_frozen_model_cost_4_flops_a_parameter_and_attention(capsys):
    figures, out = run(capsys, *SMOLLM3, "--lora_rank=16", "--tok_per_s=13750", "--params=3e9")
    each = 4 * N + 12 * L * Q * T
    assert f"{each / 1e9:.4g} GFLOP per token (4N + 12LHDT" in out
    assert (figures["mfu_6N"], figures["mfu"]) == pytest.approx((4 * N * 13750 / 989e12, each * 13750 / 989e12))
    needed = run(capsys, *SMOLLM3, "--lora_rank=16", "--params=3e9")[0]["gpus_needed"].values()
    assert [exact for exact, _ in needed] == [math.ceil(x * 11e12 / (0.3 * 989e12 * 28 * 86400)) for x in (4 * 3e9, 4 * N, each)]


@pytest.mark.parametrize("exact, machines", [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_gpus_for_a_deadline_come_in_machines_of_8(capsys, exact, machines):
    figures, _ = run(capsys, "smollm3-3b", "--gpu=h100", "--tok_per_s=10000", "--days=1", f"--tokens={10000 * 86400 * (exact - 0.5)}")
    assert list(figures["gpus_needed"].values()) == [(exact, machines)]


def test_20_tokens_per_parameter_count_all_experts(capsys):
    figures, _ = run(capsys, "nano", "--gpu=h100", "--gpus=1", "--num_experts=8")
    assert figures["tokens"] == 20 * figures["params"] == 20 * model.num_params(model.Config(num_experts=8))


def test_of_several_passes_only_the_last_hides_the_exchange(capsys):
    _, out = run(capsys, "smollm3-3b", "--gpu=h100", "--gpus=192", "--micro_batch=3", "--batch_tokens=4718592", "--network=13", "--tokens=11e12")
    assert "4 passes" in out and "more than the backward pass can hide" in out


def test_a_model_with_8_kv_heads_is_cut_into_8_where_less_does_not_fit():
    p = PLAN(**model.PRESETS["smollm3-3b"] | dict(num_key_value_heads=8, gpus=16))
    c = model.shape_of(p)
    memory = {tp: infra.gpu_memory(c, tp, 2)["total"] for tp in (4, 8)}
    assert infra.layout(p, c, memory[8])[0] == 8 and infra.layout(p, c, memory[4])[0] == 4
    assert infra.layout(dataclasses.replace(p, gpus=12), c, memory[8])[0] is None            # 12 GPUs are no eights
