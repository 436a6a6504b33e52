"""Runs that are killed at any moment, told to stop, out of disk, in each other's way, or restarted by torchrun.

What must survive is the run itself, bit for bit: each test compares with the same run, on the same layout, undisturbed.
"""
import contextlib, dataclasses, gc, io, json, math, mmap, os, pickle, random, re, resource, signal, subprocess, sys, time, zipfile
from pathlib import Path

import pytest
import torch
import torch._dynamo   # otherwise every forked rank imports it anew, for seconds, as soon as it makes an optimizer

import infra, model as nano, processes, train
from runs import stopped_run, weights
from test_train import equal, small_run

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {"alone": (1, {}), "dp": (2, {}), "tp": (2, dict(tp=2))}      # processes, flags
STEPS, SAVE_EVERY = 60, 3
GO, PIDS, FOREVER = 2, 3, 10**9                         # places on the board


# --- tools -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("survival")          # side by side, so that they share the prepared data


@pytest.fixture(scope="module")
def config(corpus, runs):
    """config(layout, name, **changes): a run of 60 steps for that layout, in a directory of its own."""
    gc.collect(), gc.freeze()                           # train.main collects garbage: not this process's, on every rank
    return lambda layout, name, **change: small_run(corpus, runs / f"{layout}-{name}", **dict(
        steps=STEPS, num_hidden_layers=1, num_key_value_heads=2) | LAYOUTS[layout][1] | change)


@pytest.fixture(scope="module")
def undisturbed(config):
    """undisturbed(layout): the directory of that run when nothing happens to it."""
    done = {}

    def get(layout):
        if layout not in done:
            cfg = config(layout, "undisturbed")
            processes.run(LAYOUTS[layout][0], under_fire, cfg, new_board())
            done[layout] = Path(cfg.out)
        return done[layout]
    return get


def new_board():
    """Memory that forked processes share: the step of ranks 0 and 1, whether they may pass `hold`, their process ids."""
    return memoryview(mmap.mmap(-1, 64)).cast("q")


def under_fire(cfg, board, hold=FOREVER, strike=None):
    """train.main(cfg) that shows its steps on the board and waits before step `hold`; rank 0 makes `strike` in a save."""
    rank, original = int(os.environ.get("RANK", 0)), train.lr_at
    board[PIDS + rank] = os.getpid()

    def lr_at(step, cfg):
        board[rank] = step
        while step >= hold and not board[GO]:
            time.sleep(0.001)
        return original(step, cfg)
    train.lr_at, train.report = lr_at, lambda *_: None  # the report only takes time
    infra._cores = lambda: 1                            # one thread, whatever machine this is
    if strike and rank == 0:
        strike(board)
    return train.main(cfg)


class Cut:
    """A file that calls kill() after `left` bytes."""
    def __init__(self, file, left, kill):
        self.file, self.left, self.kill = file, left, kill

    def write(self, data):
        size = len(data)
        if 0 <= self.left < size:
            self.file.write(data[:self.left])
            self.file.flush()
            self.kill()                                 # who is still alive, for another rank was hit, writes the rest
            data = data[self.left:]
        self.left -= size
        self.file.write(data)
        return size

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def in_a_save(victim, number, moment, share):
    """-> a strike: SIGKILL to rank `victim` in the number-th checkpoint that rank 0 writes, at a moment as in IN_SAVES."""
    def strike(board):
        original, count = nano.save_checkpoint, []

        def kill(*_):
            os.kill(board[PIDS + victim], signal.SIGKILL)

        def before(owner, name, calls):                 # of so many calls, kill before the last
            plain, seen = getattr(owner, name), []

            def wrapped(*args, **kwargs):
                seen.append(0)
                if len(seen) == calls:
                    kill()
                return plain(*args, **kwargs)
            setattr(owner, name, wrapped)

        def save_checkpoint(directory, *args, **kwargs):
            count.append(0)
            if len(count) == number:
                if moment == "bytes":
                    left = int(share * nano.checkpoints(directory)[0].stat().st_size)
                    infra.open = lambda path, mode: Cut(open(path, mode), left, kill)
                else:
                    before(*dict(fsync=(os, "fsync", 1), replace=(os, "replace", 1), directory=(os, "fsync", 2),
                                 delete=(Path, "unlink", 2))[moment])
            return original(directory, *args, **kwargs)
        nano.save_checkpoint = save_checkpoint
    return strike


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def ended(ranks, seconds=30):
    """Exit codes; fails where somebody hangs."""
    end = time.monotonic() + seconds
    for p in ranks:
        p.join(max(0, end - time.monotonic()))
    hanging = [rank for rank, p in enumerate(ranks) if p.is_alive()]
    for p in ranks:
        p.kill(), p.join()
    assert not hanging, f"ranks {hanging} still run after {seconds} s"
    return [p.exitcode for p in ranks]


def newest(out):
    """The newest checkpoint, which must be readable to its last byte; {} where there is none yet."""
    for path in nano.checkpoints(out)[:1]:
        with zipfile.ZipFile(path) as z:
            assert z.testzip() is None
        return torch.load(path, weights_only=True)
    return {}


def same(a, b):
    """Bit for bit, at any depth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses(out):
    """[(step, loss)] of the metrics rows of training."""
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "grad_norm" in r]


def assert_the_same_run(out, other):
    """Weights, optimizer, memory of norms, rows seen, logged losses: all but the time that it took."""
    a, b = newest(out), newest(other)
    assert a["step"] == STEPS
    for state in (a, b):
        state["monitor"].pop("seconds"), state.pop("train_config")
    assert [k for k in a if not same(a[k], b[k])] == [] and a.keys() == b.keys()
    assert losses(out) == losses(other)
    assert len(nano.checkpoints(out)) <= 2 and not list(Path(out).glob("*.tmp"))


# --- killed ----------------------------------------------------------------------------------------------------------

# Kills in saves, five of ten: of this rank, while rank 0 is there. "bytes": after some share of the file; otherwise before it
# is safe ("fsync"), renamed ("replace"), safe under its new name ("directory"), or older ones are deleted ("delete").
IN_SAVES = {"alone": [(0, "bytes"), (0, "bytes"), (0, "bytes"), (0, "fsync"), (0, "delete")],
            "dp": [(0, "bytes"), (0, "bytes"), (0, "directory"), (1, "bytes"), (1, "replace")],
            "tp": [(0, "bytes"), (0, "bytes"), (0, "replace"), (1, "bytes"), (1, "fsync")]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_kills_at_random_moments_half_of_them_in_saves_change_nothing(layout, config, undisturbed):
    """The same command again and again. A kill comes only after a save, in the next one or soon after, so the run gets on."""
    (world, _), cfg = LAYOUTS[layout], config(layout, "killed", save_every=SAVE_EVERY, resume=True)
    out, kills = Path(cfg.out), IN_SAVES[layout] + [(i % world, "step") for i in range(4)] + [(world - 1, "start")]
    draw = random.Random(layout)
    for victim, moment in draw.sample(kills, 10):
        at, board, strike, target = newest(out).get("step", 0), new_board(), None, FOREVER
        if moment in ("start", "step"):
            target = at + SAVE_EVERY + draw.randint(1, 3)
        else:
            strike = in_a_save(victim, 2, moment, draw.random())
        ranks = processes.start(world, under_fire, cfg, board, target + 3, strike)
        if moment == "start":                           # reading data, meeting, building the model
            time.sleep(draw.uniform(0, 0.3))
        elif moment == "step":
            wait_for(lambda: board[victim] >= target or not ranks[victim].is_alive())
            time.sleep(draw.uniform(0, 0.02))
        if not strike:
            ranks[victim].kill()
        board[GO] = 1                                   # who waits at `hold` sees now that somebody is missing
        if moment == "start":                           # gloo would wait for half an hour; torchrun ends the others like this
            [p.terminate() for p in ranks]
        codes = ended(ranks)                            # in training all others end by themselves
        assert codes[victim] == -signal.SIGKILL and 0 not in codes, (moment, codes)
        got = newest(out).get("step", 0) - at
        if strike:                                      # did it hit what it should?
            torn = victim == 0 and moment in ("bytes", "fsync", "replace")
            assert bool(list(out.glob("ckpt_*.tmp"))) == torn and got == (1 if torn else 2) * SAVE_EVERY, moment
        assert got >= (0 if moment == "start" else SAVE_EVERY)
    assert ended(processes.start(world, under_fire, cfg, new_board())) == [0] * world
    assert_the_same_run(out, undisturbed(layout))


# --- told to stop ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, rank", [("dp", 0), ("dp", 1), ("tp", 1)])
def test_sigterm_to_one_rank_stops_all_at_one_step_with_one_checkpoint(layout, rank, config, undisturbed, tmp_path):
    cfg, board = config(layout, f"stopped-{rank}"), new_board()
    ranks = processes.start(2, under_fire, cfg, board, 12, results=tmp_path)
    wait_for(lambda: board[rank] >= 7)
    os.kill(ranks[rank].pid, signal.SIGTERM)
    board[GO] = 1
    assert ended(ranks) == [0, 0]
    results = [pickle.loads((tmp_path / f"{r}.pickle").read_bytes())[1] for r in range(2)]
    (path,), step = nano.checkpoints(cfg.out), results[0]["step"]
    assert results[1]["step"] == step == newest(cfg.out)["step"] and 7 < step <= 13 and path.name == f"ckpt_{step:08d}.pt"
    assert results[rank]["stopped"] == "SIGTERM" and results[1 - rank]["stopped"] == "another rank's signal"
    assert losses(cfg.out)[-1][0] == step
    again = processes.start(2, under_fire, dataclasses.replace(cfg, resume=True), new_board())
    assert ended(again) == [0, 0]
    a, b = newest(cfg.out), newest(undisturbed(layout))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"]) and a["step"] == STEPS


# --- out of disk -----------------------------------------------------------------------------------------------------

def on_a_full_disk(cfg, space):
    """train.main(cfg); space: {step: bytes that its checkpoint may have}. What it prints goes to cfg.out + ".said"."""
    original, said = train.save, io.StringIO()

    def save(run, last=False):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (space.get(run.step, soft), hard))    # Python ignores SIGXFSZ: an error
        try:
            return original(run, last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            said.write(f"after {run.step}: {newest(run.out).get('step')} {[f.name for f in run.out.glob('*.tmp')]}\n")
    train.save = save
    try:
        with contextlib.redirect_stdout(said):
            under_fire(cfg, new_board())
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(cfg.out + ".said").write_text(said.getvalue(), encoding="utf-8")


def test_a_full_disk_costs_checkpoints_but_not_the_run(config, undisturbed):
    """torch.save fails with different exceptions at the first byte, in the tensors and in the table at the end."""
    cfg, size = config("alone", "full", save_every=10), nano.checkpoints(undisturbed("alone"))[0].stat().st_size
    space = {20: 0, 30: 100, 40: size // 2, 50: size - 500}
    assert ended(processes.start(1, on_a_full_disk, cfg, space)) == [0]
    said = Path(cfg.out + ".said").read_text(encoding="utf-8")
    for step in space:
        assert re.search(rf"WARNING: step {step} was not saved: .*File too large.*; the last checkpoint is of step 10\n", said)
        assert f"after {step}: 10 []\n" in said         # still readable, and nothing half-written beside it
    assert said.count("was not saved") == 4
    assert_the_same_run(cfg.out, undisturbed("alone"))


@pytest.mark.parametrize("layout", ["alone", "dp"])
def test_a_full_disk_at_the_end_is_an_error_and_the_run_can_go_on_later(layout, config, undisturbed, capfd):
    cfg, (world, _) = config(layout, "full at the end", save_every=40), LAYOUTS[layout]
    codes = ended(processes.start(world, on_a_full_disk, cfg, {STEPS: 5000}))
    assert codes == [1] * world                         # the others do not wait for ever for rank 0
    message = f"SystemExit: {cfg.out}: step 60 could not be saved; --resume goes on from the last checkpoint\n"
    assert message in capfd.readouterr().err
    assert "after 60: 40 []\n" in Path(cfg.out + ".said").read_text(encoding="utf-8")
    resumed = processes.start(world, under_fire, dataclasses.replace(cfg, resume=True), new_board())
    assert ended(resumed) == [0] * world
    assert_the_same_run(cfg.out, undisturbed(layout))


def test_a_disk_without_room_for_a_metrics_row_does_not_end_the_run(config, undisturbed):
    cfg = config("alone", "no rows")

    def go():
        original = train.begin

        def begin(*args):
            run = original(*args)
            run.log.file = open("/dev/full", "w")
            return run
        train.begin = begin
        return under_fire(cfg, new_board())
    processes.run(1, go)
    assert same(newest(cfg.out)["model"], newest(undisturbed("alone"))["model"])


# --- two at once -----------------------------------------------------------------------------------------------------

def test_a_second_run_in_the_same_directory_is_refused_in_one_line_and_the_first_goes_on(config, undisturbed, capfd):
    cfg, board = config("alone", "shared", save_every=5), new_board()
    first = processes.start(1, under_fire, cfg, board, 10)
    refusal = rf"^{re.escape(cfg.out)}: process {first[0].pid} on [^\n]* is writing here: [^\n]*$"
    try:
        wait_for(lambda: board[0] == 10)
        before = {f.name: f.read_bytes() for f in Path(cfg.out).iterdir()}
        for change in ({}, dict(resume=True), dict(overwrite=True), dict(lr=1.0)):
            with pytest.raises(SystemExit, match=refusal):
                train.main(dataclasses.replace(cfg, **change))
        assert ended(processes.start(2, under_fire, cfg, new_board())) == [1, 1]    # rank 1 does not wait for ever
        assert f"process {first[0].pid} on " in capfd.readouterr().err
        assert {f.name: f.read_bytes() for f in Path(cfg.out).iterdir()} == before
    finally:
        board[GO] = 1
    assert ended(first) == [0]
    assert_the_same_run(cfg.out, undisturbed("alone"))


# --- started again by torchrun ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [{}, dict(overwrite=True), dict(resume=True)])
def test_a_restarted_command_goes_on_where_the_job_died_whatever_its_flags(change, config, undisturbed, monkeypatch):
    cfg = config("alone", f"restarted-{'-'.join(change)}", **change)
    monkeypatch.setattr(train, "report", lambda *_: None)
    stopped_run(cfg, 20)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(cfg)
    assert_the_same_run(cfg.out, undisturbed("alone"))


def test_a_restarted_command_whose_shape_came_from_init_goes_on_too(config, monkeypatch):
    """Where it died, not at the checkpoint that it once started from, and whatever shape the flags name."""
    base, small = config("alone", "init-base", steps=2, hidden_size=16), dict(steps=8, save_every=2)
    train.main(base)
    cfg, whole = (config("alone", f"init-{name}", init=base.out, **small) for name in ("parts", "whole"))
    train.main(whole)
    stopped_run(cfg, 5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(cfg)
    assert equal(weights(cfg.out), weights(whole.out)) and weights(cfg.out)["norm.weight"].shape == (16,)


def test_a_restart_goes_on_with_no_run_that_the_first_start_refused(config, monkeypatch):
    """torchrun --max_restarts starts a command again that ended with "holds another run" too."""
    cfg = config("alone", "foreign", steps=4)
    train.main(cfg)
    before = {f.name: f.read_bytes() for f in Path(cfg.out).iterdir() if f.name != ".lock"}
    for restarts in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(SystemExit, match=r"holds another run \(other lr\)"):
            train.main(dataclasses.replace(cfg, lr=1e-5))
        assert {f.name: f.read_bytes() for f in Path(cfg.out).iterdir() if f.name != ".lock"} == before


def test_a_restart_still_overwrites_the_old_run_if_the_first_start_died_before_it_could(config, monkeypatch):
    cfg = config("alone", "overwritten", steps=4)
    train.main(cfg)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(dataclasses.replace(cfg, lr=1e-3, overwrite=True))
    train.main(config("alone", "from scratch", steps=4, lr=1e-3))
    assert equal(weights(cfg.out), weights(config("alone", "from scratch").out))


def test_a_restart_goes_on_with_no_run_of_another_job(config, monkeypatch):
    """That it is this very run does not help: the first start was refused, or died before it had begun to overwrite it."""
    cfg = config("alone", "other job", steps=4)
    train.main(cfg)
    (Path(cfg.out) / ".job").write_text("another host 1 2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit, match="holds this very run"):
        train.main(cfg)
    monkeypatch.setattr(train, "save", lambda run, last=False, save=train.save: saved.append(run.step) or save(run, last))
    saved = []
    train.main(dataclasses.replace(cfg, overwrite=True))
    assert saved == [4] and (Path(cfg.out) / ".job").read_text() != "another host 1 2"
    monkeypatch.setattr(train, "forward_backward", None)                # nothing is trained anew by the job that has begun it
    assert math.isfinite(train.main(dataclasses.replace(cfg, overwrite=True))["loss"])


# A script that trains, but misbehaves where its first word says; markers beside it tell what has happened already.
SCRIPT = '''
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import infra, train

faults, original, here = sys.argv.pop(1), train.lr_at, Path(__file__).parent
infra._cores, train.report = lambda: 1, lambda *_: None

def lr_at(step, cfg):
    if faults == "yes" and os.environ["RANK"] == "1":
        if step == 8 and not (here / "killed").exists():
            (here / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 14:
            raise RuntimeError("rank 1 had a bad day")
    return original(step, cfg)

train.lr_at = lr_at
if __name__ == "__main__":
    infra.launch(train.main, infra.cli(train.Config, train.PRESETS))
'''


def torchrun(folder, cfg, *agents, faults="no", seconds=60):
    """A real torchrun of SCRIPT with cfg's flags, for each list of options -> [(exit status, what it printed)]."""
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    flags = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != getattr(train.Config(), k)]
    jobs = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *options, "script.py", faults, *flags],
                             cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
            for options in agents]
    try:
        return [(job.returncode, said) for job in jobs for said, _ in [job.communicate(timeout=seconds)]]
    finally:
        for job in jobs:
            job.terminate()                             # passed on to its processes, if it still runs
        for job in jobs:
            job.communicate(timeout=60)


def test_torchrun_restarts_a_killed_job_which_goes_on_by_itself_and_names_a_rank_that_raised(config, undisturbed, tmp_path):
    """One job: rank 1 is killed in step 9, all start again and go on after step 6, rank 1 raises in step 15, and that is it.
    A third start completes the run, which is the undisturbed one."""
    cfg = config("dp", "torchrun", save_every=SAVE_EVERY)
    (status, said), = torchrun(tmp_path, cfg, ["--standalone", "--nproc_per_node=2", "--max_restarts=1"], faults="yes")
    assert (tmp_path / "killed").exists() and said.count("resuming after step 6") == 1, said
    assert status != 0 and "RuntimeError: rank 1 had a bad day" in said
    assert re.search(r"Root Cause[^\0]*rank *: 1[^\0]*rank 1 had a bad day", said)      # torchrun's closing summary
    assert newest(cfg.out)["step"] == 12
    assert ended(processes.start(2, under_fire, dataclasses.replace(cfg, resume=True), new_board())) == [0, 0]
    assert_the_same_run(cfg.out, undisturbed("dp"))


def test_two_torchrun_agents_train_what_two_processes_of_one_machine_train(config, undisturbed, tmp_path):
    cfg, port = config("tp", "two-machines"), processes.free_port()
    (status, said), (other, silent) = torchrun(tmp_path, cfg, *(
        ["--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
        for i in range(2)))
    assert status == other == 0, said + silent
    assert "1 data-parallel x 2 tensor-parallel" in said and "step" not in silent       # one of the two speaks
    assert_the_same_run(cfg.out, undisturbed("tp"))
