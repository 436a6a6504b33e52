"""infra.py: the command line and each of its errors, files that are whole or absent, one writer, signals, the log, the
machine, several processes."""
import dataclasses, json, math, os, random, re, signal, sys, threading, time
from dataclasses import dataclass

import pytest
import torch

import data, infra, model, processes, train


@dataclass
class Base:
    steps: int = 10          # inherited: optimizer steps, 100 % of them
    lr: float = 1e-3         # inherited, then redefined below


@dataclass
class Knobs(Base):
    lr: float = 2e-3         # peak rate; see # also
    text: str = ""           # files to read
    compile: bool = False    # a switch
    init: str = ""           # a checkpoint
    batch_tokens: int = 64   # two words in the name


PRESETS = {"tiny": dict(steps=3, lr=0.5), "huge": dict(steps=1000)}


def parse(*argv):
    return infra.cli(Knobs, PRESETS, list(argv))


def failure(capsys, *argv, config=Knobs, presets=PRESETS):
    """The one line that a bad command line ends with; its exit status must be 2."""
    with pytest.raises(SystemExit) as end:
        infra.cli(config, presets, list(argv))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.endswith("\n") and err.count("\n") == 1
    return err


# --- command line: what is accepted ----------------------------------------------------------------------------------

def test_no_arguments_give_the_defaults():
    assert parse() == Knobs() and infra.cli(Knobs, argv=[]) == Knobs()


@pytest.mark.parametrize("argv, key, value", [
    (["--lr=1"], "lr", 1.0), (["--lr=1e-4"], "lr", 1e-4), (["--lr", "-3"], "lr", -3.0),
    (["--steps=1e3"], "steps", 1000), (["--steps=2.0"], "steps", 2), (["--steps=1_000"], "steps", 1000), (["--steps=-5"], "steps", -5),
    (["--steps=9007199254740993"], "steps", 2**53 + 1),
    (["--batch-tokens=8"], "batch_tokens", 8), (["--batch_tokens", "8"], "batch_tokens", 8),
    (["--text=a=b"], "text", "a=b"), (["--text="], "text", ""), (["--text", "x y"], "text", "x y"), (["--text=--steps"], "text", "--steps"),
    (["--text=1"], "text", "1"), (["--text=true"], "text", "true"),
    (["--compile"], "compile", True), (["--compile=False"], "compile", False), (["--compile=true"], "compile", True), (["--compile=0"], "compile", False),
    (["--steps=1", "--steps=2"], "steps", 2),
])
def test_a_flag_is_read_as_its_fields_type(argv, key, value):
    cfg = parse(*argv)
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
    assert cfg == dataclasses.replace(Knobs(), **{key: value})


def test_a_bare_switch_leaves_the_next_word_alone():
    assert parse("--compile", "tiny") == Knobs(compile=True, steps=3, lr=0.5)
    assert parse("--compile", "--steps=4") == Knobs(compile=True, steps=4)


def test_a_bare_word_that_is_a_path_is_the_checkpoint_to_start_from(tmp_path):
    assert parse(str(tmp_path)).init == str(tmp_path)
    assert parse("tiny", str(tmp_path)) == Knobs(steps=3, lr=0.5, init=str(tmp_path))


def test_flag_beats_file_beats_preset_beats_default_in_any_order(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\nbatch_tokens = 9\ntext = 'from file'\n", encoding="utf-8")
    expected = Knobs(steps=7, lr=0.5, text="flag", batch_tokens=9)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        argv = ["tiny", f"--config={file}", "--text=flag"]
        assert parse(*[argv[i] for i in order]) == expected
    assert parse("--config", str(file)) == Knobs(steps=7, text="from file", batch_tokens=9)


def test_toml_types_are_converted_like_flags(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("lr = 1\nsteps = 1e3\ncompile = true\n", encoding="utf-8")
    cfg = parse(f"--config={file}")
    assert (cfg.lr, cfg.steps, cfg.compile) == (1.0, 1000, True) and type(cfg.lr) is float and type(cfg.steps) is int


def test_config_json_reproduces_the_run(tmp_path):
    cfg = Knobs(steps=3, lr=1 / 3, text='quotes " and käse', compile=True)
    infra.write_json(tmp_path / "config.json", dataclasses.asdict(cfg))
    assert parse(f"--config={tmp_path / 'config.json'}") == cfg
    full = train.Config(steps=7, text="x", lr=1e-3)
    infra.write_json(tmp_path / "config.json", dataclasses.asdict(full))
    assert infra.cli(train.Config, train.PRESETS, [f"--config={tmp_path / 'config.json'}"]) == full


def test_every_preset_of_every_script_is_accepted():
    for config, presets in ((train.Config, train.PRESETS), (model.Options, model.PRESETS)):
        for name, values in presets.items():
            cfg = infra.cli(config, presets, [name])
            assert all(getattr(cfg, k) == v for k, v in values.items())


# --- command line: what is refused -----------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--step=3"], r"--step: unknown key, did you mean steps\?"),
    (["--batch-token=3"], r"--batch_token: unknown key, did you mean batch_tokens\?"),
    (["--qqq=3"], r"--qqq: unknown key; --help lists them"),
    (["--=3"], "unknown key"), (["--"], "unknown key"), (["--no-compile"], "unknown key"),
    (["--steps=1.5"], "--steps: a whole number expected, not '1.5'"), (["--steps=x"], "--steps: a whole number expected"),
    (["--steps="], "whole number"), (["--steps=1e999"], "whole number"), (["--steps=inf"], "whole number"), (["--steps=nan"], "whole number"),
    (["--steps=true"], "whole number"), (["--steps=0x10"], "whole number"),
    (["--lr=nan"], "--lr: a number expected, not 'nan'"), (["--lr=inf"], "a number"), (["--lr=-inf"], "a number"), (["--lr=1e-3x"], "a number"),
    (["--lr=True"], "a number"),
    (["--compile=maybe"], "--compile: true or false expected, not 'maybe'"), (["--compile=2"], "true or false"), (["--compile="], "true or false"),
    (["--steps"], "--steps: a value expected"), (["--steps", "--lr=1"], "--steps: a value expected"), (["--config"], "--config: a value expected"),
    (["medium"], "medium: no such preset.*one of tiny, huge expected"), (["-s"], "-s: no such preset"),
    (["--config=nowhere.toml"], "--config=nowhere.toml: .*[Nn]o such file.*expected"),
    (["--config="], "expected"),
])
def test_bad_arguments_end_with_one_line_and_status_2(capsys, argv, message):
    assert re.search(message, failure(capsys, *argv))


@pytest.mark.parametrize("name, text, message", [
    ("a.toml", "steps 7", "a.toml: .*TOML.*expected"),
    ("a.toml", "stepz = 7", r"a.toml: stepz: unknown key, did you mean steps\?"),
    ("a.toml", "[train]\nsteps = 7", "a.toml: train: unknown key"),
    ("a.toml", "steps = '7x'", "a.toml: steps: a whole number expected"),
    ("a.toml", "steps = 1.5", "a.toml: steps: a whole number expected"),
    ("a.toml", "steps = true", "a.toml: steps: a whole number expected"),
    ("a.toml", "lr = nan", "a.toml: lr: a number expected"),
    ("a.toml", "compile = 'perhaps'", "a.toml: compile: true or false expected"),
    ("a.toml", "text = 3", "a.toml: text: text expected, not 3"),
    ("a.toml", "text = ['a']", "a.toml: text: text expected"),
    ("a.toml", "lr = [1.0]", "a.toml: lr: a number expected"),
    ("a.toml", "lr = {a = 1}", "a.toml: lr: a number expected"),
    ("a.json", '{"steps": null}', "a.json: steps: a whole number expected"),
    ("a.json", '{"steps": ', "a.json: .*expected"),
    ("a.json", "[1, 2]", "a.json: .*expected"),
    ("a.json", '"steps"', "a.json: .*expected"),
    ("a.json", "5", "a.json: .*expected"),
])
def test_bad_config_files_are_named_in_one_line(capsys, tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert re.search(message, failure(capsys, f"--config={tmp_path / name}"))


def test_config_that_is_binary_or_a_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00steps")
    assert "a.toml" in failure(capsys, f"--config={tmp_path / 'a.toml'}")
    assert "expected" in failure(capsys, f"--config={tmp_path}")


def test_errors_of_the_dataclass_itself_are_one_line(capsys):
    line = failure(capsys, "--num_attention_heads=3", config=train.Config, presets=train.PRESETS)
    assert "hidden_size=128" in line or "num_key_value_heads=2" in line


# --- help ------------------------------------------------------------------------------------------------------------

def test_help_prints_each_field_with_its_comment_inherited_ones_too(capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as end:
            parse(flag)
        out = capsys.readouterr().out
        assert end.value.code == 0 and "tiny, huge" in out and "--config=FILE.toml" in out
        for default, comment in (("--steps=10", "inherited: optimizer steps, 100 % of them"), ("--lr=0.002", "peak rate; see # also"),
                                 ("--text=", "files to read"), ("--compile=False", "a switch"), ("--batch_tokens=64", "two words in the name")):
            assert re.search(rf"^ *{re.escape(default)}\n +{re.escape(comment)}$", out, re.M), default
        assert "then redefined below" not in out


@pytest.mark.parametrize("config", [data.Config, model.Options, train.Config])
def test_every_knob_of_every_script_has_a_help_text(capsys, config):
    with pytest.raises(SystemExit):
        infra.cli(config, {}, ["--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(config):
        assert re.search(rf"^ *--{field.name}=.*\n +\S.{{5,}}$", out, re.M), field.name


# --- files that are whole or absent ----------------------------------------------------------------------------------

def test_atomic_replaces_the_content_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with infra.atomic(path) as f:
        f.write(b"new")
        assert path.read_bytes() == b"old"              # until the last byte is written, the old one stands
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_keeps_the_old_content_when_the_writer_raises(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error):
        with infra.atomic(path) as f:
            f.write(b"half")
            raise error
    with pytest.raises(error):
        with infra.atomic(tmp_path / "never") as f:
            f.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- one writer ------------------------------------------------------------------------------------------------------

def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def hold(directory):
    """Lock it, say so in a file, wait to be killed."""
    file = infra.lock(directory)
    (directory / "held").touch()
    time.sleep(60)
    file.close()


def test_a_lock_keeps_another_process_out_names_its_own_and_is_freed_by_kill_9(tmp_path):
    out = tmp_path / "deep" / "out"                     # is created
    (holder,) = processes.start(1, hold, out)
    try:
        wait_for((out / "held").exists)
        (out / "ckpt_00000001.pt.7.tmp").write_bytes(b"half of what the first process writes")
        with pytest.raises(SystemExit, match=rf"{re.escape(str(out))}: process {holder.pid} on .* is writing here") as end:
            infra.lock(out)
        assert "\n" not in str(end.value) and (out / "ckpt_00000001.pt.7.tmp").exists()        # not ours to remove
    finally:
        holder.kill()
        holder.join()
    file = infra.lock(out)
    assert (out / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"      # nothing of the first one
    assert sorted(f.name for f in out.iterdir()) == [".lock", "held"]                           # nor what it left behind
    file.close()


def test_a_lock_removes_nothing_but_what_a_killed_process_left_half_written(tmp_path):
    for name in ("ckpt_00000001.pt", "ckpt_00000002.pt.123.tmp", "metrics.jsonl", "metrics.jsonl.5.tmp", "notes.tmp.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.tmp").touch()             # another directory's business
    infra.lock(tmp_path).close()
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == [".lock", "ckpt_00000001.pt", "folder", "metrics.jsonl", "notes.tmp.txt"]
    assert (tmp_path / "folder" / "x.tmp").exists()


# --- signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_only_sets_the_flag_the_second_interrupts_and_handlers_come_back(which):
    def mine(*_):
        raise AssertionError("the old handler ran")
    before = {s: signal.signal(s, mine) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with infra.Stop() as stop:
            assert stop.signal is None
            os.kill(os.getpid(), which)
            assert stop.signal == which.name
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(1000))
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is mine
        with pytest.raises(ZeroDivisionError), infra.Stop():
            1 / 0
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_stop_does_nothing_outside_the_main_thread():
    seen = []

    def work():
        with infra.Stop() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert seen == [(None, before)]


# --- log -------------------------------------------------------------------------------------------------------------

def strict(path):
    """The rows of a JSONL file, read by the JSON standard: NaN and Infinity are errors."""
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log_writes_strict_json_with_null_for_what_is_not_finite(tmp_path):
    log = infra.Log(tmp_path, 10)
    log.row(step=1, loss=math.nan, lr=math.inf, grad_norm=-math.inf, tokens=5, name="käse", mfu=None)
    log.row(step=2, val_loss=1.5, val_bpb={"text": 2.0})
    assert strict(tmp_path / "metrics.jsonl") == [     # before close(): a crash must not lose rows
        dict(step=1, loss=None, lr=None, grad_norm=None, tokens=5, name="käse", mfu=None), dict(step=2, val_loss=1.5, val_bpb={"text": 2.0})]
    log.close()


def test_log_writes_null_for_nan_inside_a_nested_value_too(tmp_path):
    log = infra.Log(tmp_path, 10)
    log.row(step=1, val_bpb={"text": math.nan, "code": 2.0})
    log.close()
    assert strict(tmp_path / "metrics.jsonl") == [dict(step=1, val_bpb={"text": None, "code": 2.0})]


def test_log_prints_a_line_with_progress_and_eta(tmp_path, capsys):
    log = infra.Log(tmp_path, 200)
    log.row("loss 3.0", step=50, loss=3.0)
    log.row(step=60, loss=2.0)                          # no line: a row only
    log.close()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.strip()]
    assert len(lines) == 1 and re.search(r"step +50/200 +25% \| loss 3\.0 \| eta \d+:\d\d$", lines[0])


def test_a_new_log_starts_empty_and_a_resumed_one_keeps_rows_up_to_its_step(tmp_path):
    path, row = tmp_path / "metrics.jsonl", lambda **kw: json.dumps(kw) + "\n"
    path.write_text(row(step=5, loss=1.0) + row(step=10, loss=2.0) + row(step=10, val_loss=3.0) + row(step=11, loss=4.0)
                    + row(step=10, final=True) + row(step=20, loss=5.0) + row(step=None) + row(step="2")
                    + '{"step": 21, "lo', encoding="utf-8")
    log = infra.Log(tmp_path, 30, start=10)
    log.row(step=11, loss=6.0)
    log.close()
    assert strict(path) == [dict(step=5, loss=1.0), dict(step=10, loss=2.0), dict(step=10, val_loss=3.0), dict(step=11, loss=6.0)]
    infra.Log(tmp_path, 30).close()
    assert path.read_text() == ""


def test_a_resumed_log_survives_a_last_row_cut_at_any_byte(tmp_path):
    path, first = tmp_path / "metrics.jsonl", json.dumps(dict(step=5, loss=1.0)) + "\n"
    last = json.dumps(dict(step=10, val_loss=3.0, val_bpb={"text": 2.0}))
    for cut in range(len(last)):
        path.write_text(first + last[:cut], encoding="utf-8")
        infra.Log(tmp_path, 30, start=10).close()
        assert path.read_text(encoding="utf-8") == first, last[:cut]


def test_a_quiet_log_writes_nothing_and_leaves_an_older_file_alone(tmp_path):
    infra.Log(tmp_path / "absent", 10, quiet=True).row(step=1, loss=1.0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").write_text("as it was", encoding="utf-8")
    for start in (0, 5):
        log = infra.Log(tmp_path, 10, start=start, quiet=True)
        log.row(step=6, loss=1.0)
        log.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "as it was"


def test_log_says_what_to_install_when_wandb_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(SystemExit, match="--wandb: .*pip install wandb"):
        infra.Log(tmp_path, 10, wandb=True)


# --- the machine -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, peak", [     # dense bf16, vendors' data sheets
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),         # other chips with figures of their own
    ("NVIDIA GeForce GTX 1080", None), ("Intel(R) Xeon(R) Processor, 2 threads", None), ("", None)])
def test_peak_flops_knows_the_device_or_says_none(name, peak):
    assert infra.peak_flops(name) == peak


def settings(**change):
    return infra.Machine(**dict(device="cpu", dtype="float32") | change)


def test_setup_reports_the_machine_and_seeds_it():
    rt = infra.setup(settings(seed=3))
    drawn = torch.rand(4)
    assert rt.device == torch.device("cpu") and rt.dtype == torch.float32 and rt.peak is None and rt.threads >= 1 and rt.world_size == 1
    infra.setup(settings(seed=3))
    assert torch.equal(drawn, torch.rand(4))
    infra.setup(settings(seed=4))
    assert not torch.equal(drawn, torch.rand(4))
    assert infra.setup(settings(dtype="bfloat16")).dtype == torch.bfloat16
    assert infra.setup(settings(dtype="auto")).dtype in (torch.float32, torch.bfloat16)


def test_setup_does_not_cost_float32_its_precision_on_cpu():
    infra.setup(settings())
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    assert ((a @ b).double() - a.double() @ b.double()).abs().max() < 1e-4


def test_setup_leaves_the_thread_count_to_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    assert infra.setup(settings()).threads == before


@pytest.mark.parametrize("change, message", [
    (dict(device="toaster"), "--device=toaster: .*expected"), (dict(device="cuda:99"), "--device=cuda:99: .*expected"),
    (dict(device=""), "--device=: .*expected"),
    (dict(dtype="float16"), "--dtype=float16: auto, float32 or bfloat16 expected"), (dict(dtype=""), "--dtype="),
    (dict(seed=10**20), "seed"), (dict(seed=2**32), r"--seed=4294967296: 0 to 2\*\*32 - 1 expected"),
    (dict(seed=-1), "--seed=-1: "), (dict(tp=2), "--tp=2: a divisor of the number of processes, 1, expected"),
    (dict(tp=0), "--tp=0: a divisor"), (dict(tp=-1), "--tp=-1: a divisor"),
    (dict(tp_same_seed="yes"), "--tp_same_seed=yes: off, on or ignore expected"),
    (dict(tp_same_seed=""), "--tp_same_seed=: off")])
def test_setup_refuses_in_one_line(change, message):
    with pytest.raises(SystemExit, match=message) as error:
        infra.setup(settings(**change))
    assert "\n" not in str(error.value)


def test_setup_touches_no_other_random_generator():
    random.seed(1)
    state = random.getstate()
    infra.setup(settings())
    assert random.getstate() == state


def test_setup_refuses_a_tp_that_does_not_divide_the_processes_before_they_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")               # no address to meet at: waiting for the others would be an error
    with pytest.raises(SystemExit, match=r"^--tp=3: a divisor of the number of processes, 4, expected \(torchrun [^\n]*\)$"):
        infra.setup(settings(tp=3))


def test_seeds_end_where_torchs_cpu_generator_stops_reading_them():
    a, b = (torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(a, b)                            # so 2**32 would be seed 0 again
    infra.setup(settings(seed=2**32 - 1))
    last = torch.rand(9)
    infra.setup(settings(seed=0))
    assert not torch.equal(last, torch.rand(9))


@pytest.mark.parametrize("omp, local, threads", [
    (None, 1, 6), (None, 2, 3), (None, 4, 1), (None, 8, 1),
    ("1", 2, 3), ("1", 1, None),                        # torchrun sets 1 where nobody asked; alone somebody did ask for it
    ("2", 1, None), ("2", 2, None), ("5", 2, None)])
def test_the_cores_are_shared_by_the_processes_of_a_machine_unless_somebody_chose(monkeypatch, omp, local, threads):
    chosen = []
    monkeypatch.setattr(infra, "_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    infra.setup(settings())
    assert chosen == ([] if threads is None else [threads])


# --- several processes -----------------------------------------------------------------------------------------------

def test_one_process_needs_no_others():
    rt = infra.setup(settings())
    assert (rt.rank, rt.world_size, rt.dp_rank, rt.dp_size, rt.tp_rank, rt.tp_size, rt.restarts) == (0, 1, 0, 1, 0, 1, 0)
    assert rt.dp_group is rt.tp_group is None and not torch.distributed.is_initialized()
    assert tuple(infra.all_sum(rt, 2, 0.5)) == (2, 0.5) and infra.on_rank_0(rt, max, 3, 4) == 4
    assert infra.all_gather(rt, torch.tensor([7]))[0].tolist() == [7]
    with infra.in_turn(rt):
        pass


def meet(folder):
    """What each of two ranks sees of the other."""
    rt = infra.setup(settings())
    called, first = [], folder / "first"
    seen = {k: getattr(rt, k) for k in ("rank", "world_size", "dp_rank", "dp_size", "tp_rank", "tp_size")}
    print(f"printed by rank {rt.rank}")
    seen["sum"] = infra.all_sum(rt, rt.rank + 1, 0.25)
    seen["rank 0 says"] = infra.on_rank_0(rt, lambda word: called.append(rt.rank) or {word: os.getpid()}, "pid")
    seen["called"], seen["pid"] = called, os.getpid()
    seen["gathered"] = [t.tolist() for t in infra.all_gather(rt, torch.tensor([rt.rank, 5]))]
    with infra.in_turn(rt):
        seen["found"] = first.exists()
        if rt.rank == 0:
            time.sleep(0.2)                             # whoever does not wait looks now
            first.touch()
    log = infra.Log(folder, 10, quiet=rt.rank > 0)
    log.row(f"a row of rank {rt.rank}", step=1, rank=rt.rank)
    log.close()
    return seen


def test_two_processes_sum_gather_take_turns_and_speak_with_one_voice(tmp_path, capfd):
    zero, one = processes.run(2, meet, tmp_path)
    assert [x["rank"] for x in (zero, one)] == [0, 1] and zero["world_size"] == one["world_size"] == 2
    assert (zero["dp_rank"], one["dp_rank"], one["dp_size"], one["tp_rank"], one["tp_size"]) == (0, 1, 2, 0, 1)
    assert list(zero["sum"]) == list(one["sum"]) == [3, 0.5]
    assert zero["rank 0 says"] == one["rank 0 says"] == {"pid": zero["pid"]} and (zero["called"], one["called"]) == ([0], [])
    assert zero["gathered"] == one["gathered"] == [[0, 5], [1, 5]]
    assert (zero["found"], one["found"]) == (False, True)       # what the first process wrote, the second finds
    out = capfd.readouterr().out
    assert "printed by rank 0" in out and "a row of rank 0" in out and "rank 1" not in out
    assert strict(tmp_path / "metrics.jsonl") == [dict(step=1, rank=0)]


def first_of_another_machine(folder):
    os.environ["LOCAL_RANK"] = "0"
    rt = infra.setup(settings())
    with infra.in_turn(rt):
        found = (folder / "first").exists()
        if rt.rank == 0:
            time.sleep(0.2)
            (folder / "first").touch()
    return found


def test_rank_0_goes_before_the_first_processes_of_other_machines_for_they_may_share_a_disk(tmp_path):
    assert processes.run(2, first_of_another_machine, tmp_path) == [False, True]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 bytes")])
def test_running_out_of_memory_names_the_flags_that_help(error):
    def main(cfg):
        raise error
    with pytest.raises(SystemExit, match="out of memory .*Tried|tried.* --micro_batch=1.*infra.py plan"):
        infra.launch(main, None)
    with pytest.raises(RuntimeError, match="something else"):
        infra.launch(lambda cfg: (_ for _ in ()).throw(RuntimeError("something else")), None)


def test_a_closed_terminal_is_a_signal_to_stop_unless_nohup_says_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with infra.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP), os.kill(os.getpid(), signal.SIGHUP)       # from the kernel and from the shell
            assert stop.signal == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with infra.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_under_the_output_does_not_end_a_run(tmp_path, monkeypatch):
    log = infra.Log(tmp_path, 10)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    log.say("x" * 10_000), log.row("line", step=1)
    monkeypatch.undo()
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}


def test_memory_in_a_gpus_name_must_be_the_data_sheets():
    for name, gb in (("a100 40gb", None), ("H100 96GB", None), ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA A100-SXM4-80GB", 80),
                     ("NVIDIA A100-SXM-64GB", None), ("NVIDIA A100-SXM4-40GB", 40)):
        sheet = infra.data_sheet(name)
        assert (sheet and sheet.gb) == gb, name


def test_a_preset_may_stand_in_the_file_too(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('preset = "small"\nseed = 3\n')
    cfg = infra.cli(train.Config, train.PRESETS, [f"--config={tmp_path}/a.toml"])
    assert cfg == train.Config(**train.PRESETS["small"], seed=3) == infra.cli(train.Config, train.PRESETS, ["--preset=small", "--seed=3"])
    (tmp_path / "b.toml").write_text('preset = "large"\n')
    with pytest.raises(SystemExit):
        infra.cli(train.Config, train.PRESETS, [f"--config={tmp_path}/b.toml"])
    assert "b.toml: preset=large: one of " in capsys.readouterr().err


def test_a_job_that_a_script_started_in_the_background_hears_sigint():
    """There it is ignored at first, as SIGHUP is under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with infra.Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == "SIGINT"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_preset_before_a_file_with_another_one_wins(tmp_path):
    (tmp_path / "a.toml").write_text('preset = "small"\nseed = 3\n')
    for words in (["shakespeare"], ["--preset=shakespeare"]):
        cfg = infra.cli(train.Config, train.PRESETS, [*words, f"--config={tmp_path}/a.toml"])
        assert cfg == train.Config(**train.PRESETS["shakespeare"], seed=3)
