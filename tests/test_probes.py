"""The probes of infra.py, set beside closed forms, vendors' data sheets, nccl-tests' factors and the kernel's own answers."""
import functools, json, math, os, pickle, re, resource, signal, statistics, subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data, infra, processes

KEYS = {"what", "value", "unit", "convention", "reference", "source", "percent", "verdict", "advice"}
MORE = {"dtype", "square", "main", "x"}                    # of some rows
OPERATIONS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def fake(monkeypatch):
    """fake(module, name=value): infra's own by default, until the test ends."""
    return lambda where=infra, /, **names: [monkeypatch.setattr(where, *pair) for pair in names.items()]


def config(**change):
    return infra.Config(**dict(device="cpu", dtype="float32", preset="small") | change)


def machine(gpu="", **change):
    """What setup() returns; a GPU is one in name only."""
    what = dict(name=gpu, device=SimpleNamespace(type="cuda") if gpu else torch.device("cpu"), dtype=torch.float32)
    return SimpleNamespace(**what | dict(threads=1, peak=None, rank=0, world_size=1) | change)


def probe(only, rt=None, **change):
    """{what: row} of the probes `only`."""
    rows = infra.probe(config(only=only, **change), rt or machine(), SimpleNamespace(signal=None))
    assert all(KEYS | {"probe", "playbook"} == set(r) - MORE for r in rows)
    return {r["what"].strip(): r for r in rows}


def verdicts(rows):
    return " ".join(r["verdict"] for r in (rows.values() if isinstance(rows, dict) else rows))


# --- rows and data sheets --------------------------------------------------------------------------------------------

def test_a_row_passes_from_good_on_fails_below_poor_and_is_not_judged_without_a_reference():
    rows = [infra.finite(infra.row("x", v, reference=1, advice="y")) for v in (0.7, 0.699, 0.5, 0.499, 0, 1.25, math.nan, None)]
    assert verdicts(rows) == "PASS WARN WARN FAIL FAIL PASS FAIL n/a" and all(set(r) == KEYS for r in rows)
    assert [r["percent"] for r in rows] == [70, 69.9, 50, 49.9, 0, 125, None, None]
    assert all(r["advice"] == "y" * (r["verdict"] in ("WARN", "FAIL")) for r in rows)
    rows = [infra.row("x", v, reference=10, good=0.9, poor=0.2) for v in (9, 8.9, 2, 1.9)] + [infra.row("x", 5)]
    rows += [infra.row("x", 5, advice="y", **how) for how in (dict(fine=True), dict(fine=False), dict(fine=False, bad="FAIL"))]
    assert verdicts(rows) == "PASS WARN WARN FAIL n/a PASS WARN FAIL" and [r["advice"] for r in rows[5:]] == ["", "y", "y"]


def test_a_gpu_that_is_not_in_the_table_has_no_figures_rather_than_anothers():
    for name in ("GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "A100-SXM4-40GB MIG 1g.5gb", "H100 80GB HBM3 MIG 3g.40gb",
                 "GRID A100-10C", "H100-80C", "A100-SXM-64GB", "GB200", "T400 4GB", "A10", "A10G", "A100X", "GH200 480GB",
                 "H20", "H800", "B300", "L4", "L40", "MI300A", ""):
        assert infra.data_sheet(f"NVIDIA {name}") is None and infra.peak_flops(f"NVIDIA {name}") is None


def test_each_gpu_has_the_dense_figures_of_its_own_data_sheet():      # bf16 of test_infra.py; GB/s, to a peer in one direction
    figures = {"A100-SXM4-40GB": (1555, 40, 300), "A100-PCIE-40GB": (1555, 40, 31.5), "A100-SXM4-80GB": (2039, 80, 300),
               "A100 80GB PCIe": (1935, 80, 31.5), "H100 PCIe": (2000, 80, 63), "H200": (4800, 141, 450)}
    for name, (gbs, gb, peer) in figures.items():
        sheet = infra.data_sheet(f"NVIDIA {name}")
        assert (sheet.gbs, sheet.gb, sheet.peer) == (gbs, gb, peer) and infra.peak_flops(f"NVIDIA {name}") == 1e12 * sheet.bf16
    assert infra.data_sheet("Tesla T4")[1:6] == (65, None, 8.1, 16, 320) and infra.peak_flops("Tesla T4") is None


def test_the_playbooks_best_h100_stays_below_each_dense_peak_and_only_what_multiplies_is_measured(fake):
    def matmuls(name, capability, **speed):
        fake(torch.cuda, get_device_capability=lambda *_: capability)
        fake(tflops=lambda rt, m, k, n, kind: speed[kind] if kind in speed else torch.empty(-1))      # a RuntimeError
        rows = probe("matmul", machine(name))
        return {what[7:]: r for what, r in rows.items() if what.startswith("matmul")}
    best, peaks = dict(fp32=55, tf32=396, bf16=758, fp16=732, fp8=1457), dict(fp32=67, tf32=494.5, bf16=989, fp16=989, fp8=1979)
    rows = matmuls(H100, (9, 0), **best)
    assert {k: r["percent"] for k, r in rows.items()} == {k: pytest.approx(100 * best[k] / peaks[k], abs=0.1) for k in best}
    assert verdicts(rows) == "PASS PASS PASS PASS PASS" and rows["bf16"]["playbook"] == "714-758"
    best.pop("fp8")                                        # this torch has no kernel for it
    assert verdicts(matmuls(H100, (9, 0), **{k: v / 2 for k, v in best.items()})) == "FAIL FAIL FAIL FAIL n/a"
    assert verdicts(matmuls("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), **best)) == "n/a n/a n/a n/a n/a"
    rows = matmuls(A100, (8, 0), **best)
    assert list(rows) == list(best) and {r["playbook"] for r in rows.values()} == {""}
    assert list(matmuls("Tesla T4", (7, 5), **best)) == ["fp32", "fp16"]


# --- what is counted -------------------------------------------------------------------------------------------------

def test_seconds_are_of_the_best_sample_of_a_second_without_the_first_call(fake):
    clock, real, seconds = 0.0, infra.time.perf_counter, []

    def work():             # the first call compiles, the fourth is disturbed
        nonlocal clock, calls
        calls, clock = calls + 1, clock + call + (5 if calls == 0 else 0.5 * (calls == 3))
    for call in (0.06, 1.0):
        calls = 0
        fake(infra.time, perf_counter=lambda: clock)
        seconds.append((infra.seconds_of(machine(), work), calls))
        fake(infra.time, perf_counter=real)
    assert seconds == [(pytest.approx(0.06), 2 + 9), (pytest.approx(1), 2 + 3)]     # 0.06 + 0.56 + 7 x 0.06


def test_tflops_are_those_that_torch_counts_in_the_dtype_and_precision_they_are_named_for(fake):
    counter, seen, before = FlopCounterMode(display=False), [], torch.get_float32_matmul_precision()

    def second(rt, call, **_):
        with counter:
            seen.append((call().dtype, torch.get_float32_matmul_precision()))
        return 1.0
    fake(seconds_of=second)
    for kind in ("fp32", "bf16", "tf32"):
        assert infra.tflops(machine(), 24, 40, 56, kind) == pytest.approx(1e-12 * counter.get_total_flops())
    assert seen == [(torch.float32, "highest"), (torch.bfloat16, "highest"), (torch.float32, "high")]
    assert torch.get_float32_matmul_precision() == before


def test_emulated_bf16_and_idle_threads_are_judged_and_the_presets_shapes_measured(fake):
    for bf16, many, expected in ((12, 3.2, "PASS"), (11.9, 3.19, "WARN"), (7.9, 2.39, "FAIL")):
        threads, made = [4], set()
        fake(torch, set_num_threads=threads.append)
        speed = lambda kind: bf16 if kind == "bf16" else 10 / many if threads[-1] == 1 else 10
        fake(tflops=lambda rt, m, k, n, kind: made.add((k, n)) or speed(kind))
        rows = probe("matmul", machine(threads=4))
        assert verdicts(rows[f"matmul {w}"] for w in ("bf16", "fp32, 4 threads against 1")) == f"{expected} {expected}"
        assert threads == [4, 1, 4]
    assert made == {(2048, 2048), (256, 256), (256, 128), (256, 768), (768, 256), (256, 320)}   # q o, k v, gate up, down, head


def test_copies_are_counted_as_bytes_read_and_written_and_only_the_large_one_is_judged(fake):
    made = []
    fake(torch, ones=lambda n, device: made.append(torch.empty(n)) or made[-1])
    fake(last_level_cache=lambda: 2**20, seconds_of=lambda rt, call: (call().nbytes * 2) / 1.6e12)
    rows = probe("memory", machine(name=A100))
    assert [r["value"] for r in rows.values()] == pytest.approx([1600] * 3) and verdicts(rows) == "WARN n/a n/a"
    assert rows["copy, memory"]["percent"] == 78.5 and [a.nbytes // 2**18 for a in made] == [2**11, 2, 2]                # of 2039
    assert verdicts(probe("memory", machine(name="NVIDIA GB200"))) == "n/a n/a n/a"


def copies(fake, gb_per_s, empty=torch.empty, **smi):
    """Copies between GPUs take what those of 2**28 bytes would at gb_per_s."""
    made = lambda size, dtype, **_: empty(4 if size == 2**28 else 0, dtype=dtype)
    fake(torch, empty=made, ones=made)
    fake(torch.Tensor, pin_memory=torch.Tensor.clone)
    fake(seconds_of=lambda rt, call: 2**28 / 1e9 / gb_per_s, smi=lambda rt, field: smi[field.split(".")[2]])


def test_transfers_are_set_beside_the_lanes_that_were_negotiated(fake):
    code = 128 / 130
    for gen, lane, lanes, share, expected in (             # GT/s and line codes of the standard
            (1, 2.5 * 0.8, 16, 0.81, "PASS PASS"), (2, 5 * 0.8, 8, 0.74, "WARN WARN"), (3, 8 * code, 16, 0.49, "PASS FAIL"),
            (4, 16 * code, 4, 0.9, "FAIL PASS"), (5, 32 * code, 8, 0.51, "WARN WARN"), (6, 64 * 242 / 256, 2, 1, "FAIL PASS")):
        copies(fake, share * lane / 8 * lanes, gen=str(gen), width=str(lanes))
        rows = probe("transfer", machine(H100))
        assert verdicts(rows) == f"{expected} {expected.split()[1]} n/a n/a n/a n/a"        # lanes, pinned, pageable, latencies
        assert rows["device to host, pinned"]["percent"] == pytest.approx(100 * share, abs=0.2)


def test_gpus_are_joined_in_a_ring_and_a_copy_that_misses_nvlink_fails(fake):
    fake(torch.cuda, device_count=lambda: 3, can_device_access_peer=lambda i, j: (i, j) != (2, 0))
    for speed, verdict in ((364.9, "PASS PASS PASS"), (100, "WARN WARN WARN"), (50, "FAIL FAIL FAIL")):
        copies(fake, speed)
        rows = probe("peers", machine(H100))
        assert list(rows) == ["GPU 0 to GPU 1", "GPU 1 to GPU 2", "GPU 2 to GPU 0"] and verdicts(rows) == verdict
    assert ["peer access" in r["convention"] for r in rows.values()] == [True, True, False]
    assert verdicts(probe("transfer,peers,collectives")) == "n/a n/a n/a"       # a CPU, alone


# --- collectives -----------------------------------------------------------------------------------------------------

def together(gpus, speeds, memory, seconds=None, real_at=0, die=0, only="matmul,memory,collectives", **change):
    """The table of a rank that measures these. It calls collectives of one size only; rank 1 is killed at another, `die`."""
    rank, median, real = int(os.environ["RANK"]), statistics.median, infra.collective_calls
    infra.PROBES["health"] = lambda *_: iter([infra.row("fans", 1, fine=rank == 0)])

    def calls(rt, size):
        if size == die and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        made, buffer = real(rt, min(size, 2**20))
        return made if real_at == size else dict.fromkeys(made, list), size if size > 2**20 else buffer
    os.environ["LOCAL_WORLD_SIZE"] = str(gpus)
    infra.collective_calls, infra.cpu_name = calls, lambda: H100
    infra.last_level_cache, infra.free_memory = lambda: 2**20, lambda: 2**22
    infra.tflops, infra.seconds_of = lambda *_: 100 / (100 / speeds[rank]), lambda *_: memory[rank]
    if seconds:
        infra.statistics = SimpleNamespace(median=lambda times: median(times) if len(times) == 2 else seconds[rank])
    return [r for r in infra.main(config(only=only, **change))["rows"] if r["probe"] not in ("matmul", "memory")]


def test_two_ranks_measure_six_operations_at_three_sizes_and_name_the_straggler():
    slow = 2e-4                                            # the slower rank's seconds are everybody's
    rows, others = processes.run(2, together, 2, (10.0, 8.5), (1.0, 1.25), (1e-4, slow), 2**20)
    names = [f"{op}, {size}" for size in ("1 KiB", "1 MiB", "64 MiB") for op in OPERATIONS]
    assert rows == others and [r["what"] for r in rows[:18]] == names
    values = [1e6 * slow] * 6 + [f * size / slow / 1e9 for size in (2**20, 2**26) for f in (1, 0.5, 0.5, 0.5, 1, 1)]     # n = 2
    assert [r["value"] for r in rows[:18]] == pytest.approx(values) and [r["unit"] for r in rows[5:7]] == ["µs", "GB/s"]
    assert [r["percent"] for r in rows[:18]] == [None] * 13 + [pytest.approx(100 * v / 450, abs=0.1) for v in values[13:]]
    assert verdicts(rows[12:]) == "n/a WARN WARN WARN PASS PASS PASS WARN PASS FAIL"        # ..., 8.5 of 9.25, 0.8 of 0.9
    assert [r["what"] for r in rows if "straggler" in r["advice"]] == ["rank 1: matmul", "rank 1: memory"]
    rows = processes.run(2, together, 1, (10.0, 9.2), (1.0, 1.0))[0]       # a network between them; 9.2 of 9.6
    assert verdicts(rows) == " ".join(["n/a"] * 18 + ["PASS"] * 4)
    for n, reduce, part in ((4, 1.5, 3 / 4), (8, 1.75, 7 / 8)):             # nccl-tests, doc/PERFORMANCE.md
        assert {name: f(n) for name, f in infra.BUS_FACTOR.items()} == dict(zip(OPERATIONS, [reduce, part, part, part, 1, 1]))


def test_what_fails_on_another_rank_is_in_the_table_of_rank_0():
    rows = processes.run(2, together, 2, (10.0, 0.0), (1.0, 1.0))[0]      # rank 1 divides by 0
    assert [r for r in rows if r["verdict"] == "FAIL" and "rank 1" in r["what"] + r["advice"]]


def test_a_rank_that_is_sick_or_killed_is_a_row_of_rank_0_and_the_table_goes_on(tmp_path, capfd):
    what = dict(only="health,collectives,loader", path=str(tmp_path), json=str(tmp_path / "x"), real_at=2**10, die=2**20)
    ranks = processes.start(2, functools.partial(together, **what), 2, None, (1.0, 1.0), results=tmp_path)
    for p in ranks:
        p.join(30)
    assert [p.exitcode for p in ranks] == [0, -signal.SIGKILL] and "1 FAIL: collectives" in capfd.readouterr().out
    _, rows = pickle.loads((tmp_path / "0.pickle").read_bytes())
    assert [r["what"] for r in rows[:2] + rows[7:9]] == ["fans", "rank 1: fans", "send_recv, 1 KiB", "collectives"]
    assert verdicts(rows[:2] + rows[7:9]) == "PASS WARN n/a FAIL" and "has a rank died?" in rows[8]["advice"]
    assert all(r["value"] > 0 for r in rows[2:8]) and rows[-1]["probe"] == "loader"        # the others go on
    assert json.loads((tmp_path / "x").read_text())["rows"] == rows


# --- disk and loader -------------------------------------------------------------------------------------------------

def kind_of(folder):
    """The file system's type by df of GNU coreutils."""
    done = subprocess.run(f"df --output=fstype '{folder}'", shell=True, capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else pytest.skip("no df that tells")


@pytest.fixture
def disk(tmp_path, fake):
    """A real one, free by 256 MiB, so that half of that is written; reads are short. Nothing may stay behind."""
    if kind_of(tmp_path) not in ("ext4", "xfs", "btrfs"):
        pytest.skip("temporary files are not on a disk")
    fake(infra.shutil, disk_usage=lambda folder: os.stat(folder) and SimpleNamespace(free=2**28))
    fake(timed_reads=functools.partial(infra.timed_reads, seconds=0.01))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_share_in_the_page_cache_is_what_was_read_and_nothing_after_eviction(disk, monkeypatch):
    for folder in filter(os.path.isdir, (disk, "/", "/proc", "/dev/shm")):
        assert infra.file_system(folder) == kind_of(folder)
    path, size = disk / "x", 2**22
    path.write_bytes(os.urandom(size))
    shares = [infra.in_page_cache(path), infra.evict(path) or infra.in_page_cache(path)]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM), os.pread(fd, size // 4, 0), os.close(fd)      # without read-ahead
    shares += [infra.in_page_cache(path), path.read_bytes() and infra.in_page_cache(path)]
    monkeypatch.delattr(os, "posix_fadvise")               # macOS
    infra.evict(path)
    assert shares + [infra.in_page_cache(path)] == [1, 0, 1 / 4, 1, 1] and path.unlink() is None


def test_a_disk_is_read_past_the_page_cache_and_what_the_preset_needs_follows(disk, fake):
    shares, reads, syncs, real, timed, fsync = [], [], [], infra.in_page_cache, infra.timed_reads, os.fsync

    def read(path, flags, size, block, threads, ordered):
        reads.append((block, threads))
        assert reads[1:] or len(syncs) == 3                # 64 MiB each, and before the eviction
        assert flags == os.O_DIRECT and os.path.getsize(path) == size == 2**27 and ordered == (block == 2**20)
        return timed(path, flags, size, block, threads, ordered)
    fake(os, fsync=lambda fd: syncs.append(fsync(fd)))
    fake(in_page_cache=lambda path: shares.append(real(path)) or shares[-1], timed_reads=read)
    *rows, checkpoint = probe("storage", path=str(disk)).values()      # and no loader's need: no matmul was measured
    assert shares == [0, 0] and len(reads) == 6 * 5
    assert reads[:5] == reads[25:] == [(2**20, 1), (2**20, 16), (2**14, 1), (2**14, 4), (2**14, 16)]
    assert len(rows) == 6 and all(r["value"] > 0 and r["verdict"] == "n/a" and not r["advice"] for r in rows)
    assert all(r["convention"].endswith(f"{kind_of(disk)}, O_DIRECT and an empty page cache (mincore)") for r in rows[1:])
    rate, p50, p99 = (float(x.replace(",", "")) for x in re.findall(r"([\d,]+)(?: reads/s| µs)", rows[3]["convention"]))
    assert rate * 2**14 / 1e9 == pytest.approx(rows[3]["value"], rel=0.01) and 0 < p50 <= p99
    assert checkpoint["what"] == "  small: checkpoint"


@pytest.mark.parametrize("share, text", [(1.0, "kept the file"), (0.06, "kept the file"), (1.0, "")])
def test_a_page_cache_that_keeps_the_file_is_said_and_no_needs_follow(disk, fake, share, text):
    fake(in_page_cache=lambda path: share, timed_reads=lambda *_: (1e9, [1e-3] * 9))
    rows = probe("storage", path=str(disk)).values()
    assert len(rows) == 6 and all(text in r["advice"] for r in rows)
    assert text or "empty page cache" not in str([r["convention"] for r in rows])


def test_without_direct_reads_and_on_what_lives_in_memory_the_rows_say_so(disk, fake):
    if os.path.isdir("/dev/shm") and kind_of("/dev/shm") == "tmpfs" and os.statvfs("/dev/shm").f_bavail * 4096 > 2**28:
        rows = probe("storage,loader", path="/dev/shm")
        disks = [r for r in rows.values() if r["probe"] == "storage"]
        assert len(disks) == 6 and all("tmpfs lives in memory" in r["advice"] for r in disks)
        assert not rows["loader, cold file"]["value"] and not os.path.exists(f"/dev/shm/.probe.{os.getpid()}.tmp")
    fake(os, open=lambda path, flags, *more, real=os.open: real("/nowhere" if flags & os.O_DIRECT else path, flags, *more))
    rows = probe("storage", path=str(disk))
    assert "evicted first, then buffered" in rows["random, 16 KiB, 4 threads"]["convention"] and "small: checkpoint" in rows


@pytest.mark.parametrize("only, path, reason", [            # sysfs takes nobody's files; a process may end its files at 32 MiB
    ("storage,loader", "{}/missing", "No such file or directory"), ("storage,loader", __file__, "Not a directory"),
    ("storage,loader", "/sys", "Permission denied|Read-only file system"), ("storage", "{}", "No space left on device"),
    ("storage,loader", "{}", "1 MB free, 268 at least expected"), ("storage", "{}", "File too large"),
    ("loader", "{}", "File too large")])
def test_a_disk_that_takes_no_file_is_a_row_with_path_and_reason(disk, fake, only, path, reason):
    if "free" in reason:
        fake(infra.shutil, disk_usage=lambda _: SimpleNamespace(free=10**6))
    elif "space" in reason:                                # after 64 MiB
        fake(os, fsync=lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    elif "large" in reason:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**25, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    path = path.format(disk)
    rows = probe(only + ",transfer", path=path)
    assert sorted(rows) == sorted([*only.split(","), "host to device"])       # the others go on
    for row in (rows[name] for name in only.split(",")):
        assert row["verdict"] == "FAIL"
        assert re.fullmatch(f"{re.escape(path)}: ({reason}): a writable directory expected as --path", row["advice"])


def test_smollm3_needs_ten_times_its_tokens_and_checkpoints_within_two_percent_of_the_time():
    N, H_D, L, T = 3_075_098_624, 2048, 36, 4096           # its model card; 12 bytes of state each, 4 a token
    rows = [dict(square=True, dtype=kind, value=value) for kind, value in (("fp32", 50.0), ("bf16", 700.0), ("fp8", 1300.0))]
    tokens, rt, cfg = 8 * 0.3 * 700e12 / (6 * N + 12 * L * H_D * T), machine(H100, peak=1e12), config(preset="smollm3-3b")
    for read, write, expected in ((1.01, 0.25, "PASS PASS"), (0.99, 0.24, "WARN FAIL"), (0.09, 0.24, "FAIL FAIL")):
        loader, checkpoint = infra.needs(cfg, rt, rows, write * 1e9, read * 10 * tokens * 4)
        assert loader["reference"] == pytest.approx(10 * tokens * 4 / 1e6) == loader["value"] / read
        assert checkpoint["value"] == pytest.approx(12 * N / write / 1e9) and verdicts([loader, checkpoint]) == expected
    assert next(infra.needs(cfg, rt, [], 1e9, 1e9))["reference"] == pytest.approx(loader["reference"] / 700)     # of rt.peak


STARTS = [f"loader's start, {steps} steps" for steps in ("32,000", "3,200,000", "1,000,000,000")]


@pytest.mark.parametrize("grows", ["", "time", "memory"])
def test_the_loader_is_measured_cold_and_warm_and_fails_if_it_grows_with_the_run(disk, fake, grows):
    def loader(*args, real=data.Loader):
        made = real(*args)
        made.order = b"x" * min(args[3] // 64, 2**25) if grows == "memory" else b""
        late[0] += args[3] / 1e9 if grows == "time" else 0
        return made
    late = [0.0]
    fake(data, Loader=loader)
    fake(infra.time, perf_counter=lambda: late.append(late.pop() + 1e-3) or late[0])       # each look takes a millisecond
    fake(seconds_of=lambda rt, call: -late[0] + 1e-3 + (call(), late[0])[1])
    rows = probe("loader", path=str(disk))
    assert list(rows) == ["loader, cold file", "loader, warm file", *STARTS] and all(r["value"] > 0 for r in rows.values())
    assert verdicts(rows[w] for w in STARTS) == ("PASS FAIL FAIL" if grows else "PASS PASS PASS")


# --- health ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def kernel(fake, monkeypatch):
    """kernel(name=text): its files; a list is told turn by turn, what is missing is unreadable. 8 cores for 2 processes."""
    def read_text(self):
        told = files.get(self.name.replace(".", "_"))
        if told is None:
            raise PermissionError(13, "Permission denied")
        return told.pop(0) if isinstance(told, list) else told
    files = {}
    fake(infra.Path, read_text=read_text)
    fake(infra.time, sleep=lambda _: None)
    fake(_cores=lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return files.update


def test_time_that_the_host_or_others_take_is_told_from_proc_stat(kernel):
    before = (1000, 20, 300, 80_000, 50, 6, 7, 800, 900)
    for ticks, world, expected in (         # percent of user, nice, system, idle, iowait, irq, softirq, steal; user holds guest
            ((3, 0, 2, 90, 4, 0, 0, 1, 3), 1, [1, 6, "PASS PASS"]), ((0, 0, 0, 95, 3, 0, 0, 2, 0), 1, [2, 2, "WARN PASS"]),
            ((5, 1, 2, 90, 0, 1, 1, 0, 5), 1, [0, 10, "PASS WARN"]), ((5, 1, 2, 90, 0, 1, 1, 0, 5), 2, [0, 10, "PASS PASS"])):
        after = [b + 10 * t for b, t in zip(before, ticks)]
        kernel(stat=[f"cpu  {' '.join(map(str, x))}\ncpu0 1 2 3\n" for x in (before, after)])
        rows = probe("health", machine(world_size=world))
        rows = [rows[f"CPU time {who}"] for who in ("stolen by the host", "used by others")]
        assert [r["value"] for r in rows] + [verdicts(rows)] == expected


def test_what_the_kernel_tells_is_noted_and_what_it_does_not_is_named(kernel):
    assert verdicts(probe("health", machine(threads=n))["threads"] for n in (3, 4, 5)) == "WARN PASS WARN"
    assert probe("health")["not readable here"]["advice"] == (
        "CPU flags, CPU governor, CPU time of others, CPU quota (cgroup), memory limit (cgroup)")
    for governor, verdict in (("performance", "PASS"), ("powersave", "WARN")):
        kernel(cpuinfo="model name : A chip\nflags\t\t: fpu avx2 amx_bf16\n", scaling_governor=governor + "\n",
               stat="cpu  1 2 3 4 5 6 7 8 9 10\n", cpu_max="200000 100000\n", memory_max="max\n")
        rows = probe("health")
        assert rows["CPU"]["advice"] == "A chip, avx2, amx_bf16" and rows["CPU governor"]["verdict"] == verdict
        assert rows["CPU quota"]["advice"] == "200000 100000 (cgroup)" and "not readable here" not in rows


FINE = {"temperature.gpu": "84", "clocks.sm": "1485", "clocks.max.sm": "1980", "power.limit": "693.00",
        "power.default_limit": "700.00", "clocks_throttle_reasons.active": "0x0000000000000005",
        "ecc.errors.uncorrected.volatile.total": "0", "remapped_rows.pending": "No", "remapped_rows.uncorrectable": "0"}


@pytest.fixture
def gpu(kernel, fake):
    """gpu(answers): health of a GPU for which nvidia-smi answers this, and what could not be read."""
    def health(answers):
        fake(smi=lambda rt, field: answers[field])
        rows = probe("health", machine(H100))
        return {what: r for what, r in rows.items() if what.startswith("GPU")}, rows["not readable here"]["advice"]
    fake(torch, randn=lambda *_, **__: torch.ones(1, 1))
    fake(torch.cuda, synchronize=lambda *_: None)
    return health


def test_what_nvidia_smi_tells_of_a_gpu_is_judged_and_what_it_does_not_is_named(gpu):
    rows, unread = gpu(FINE)
    assert verdicts(rows) == "PASS PASS PASS PASS PASS PASS PASS" and "GPU" not in unread
    for silence in (None, "[Unknown Error]", "[GPU requires reset]"):
        rows, unread = gpu(dict.fromkeys(FINE, silence))
        assert not rows and unread.startswith("GPU's temperature, GPU's clock, ") and unread.count("GPU's") == 9
    for field, answer, what, expected in (
            ("temperature.gpu", "85", "temperature", "WARN it will"), ("clocks.sm", "1484", "clock", "WARN power or heat"),
            ("clocks.sm", "989", "clock", "FAIL power or heat"), ("power.limit", "692", "power cap", "WARN somebody"),
            ("power.limit", "489", "power cap", "FAIL somebody"),
            ("remapped_rows.pending", "Yes", "row remap pending", "WARN its memory"),
            ("ecc.errors.uncorrected.volatile.total", "1", "uncorrected ECC errors", "WARN its memory"),
            ("remapped_rows.uncorrectable", "1", "uncorrectable row remaps", "WARN its memory"),
            *(("clocks_throttle_reasons.active", f"0x{bits:016x}", "throttling", expected) for bits, expected in (      # nvml.h
                (1, "PASS none"), (4, "PASS power cap"), (8, "FAIL hardware slowdown"), (0x20, "FAIL heat"),
                (0x80, "FAIL power brake"), (0x44, "FAIL power cap, heat, by the hardware")))):
        row = gpu(FINE | {field: answer})[0].pop(f"GPU {what}")
        assert f"{row['verdict']} {row['advice']}".startswith(expected)


def test_nvidia_smi_is_asked_for_this_processs_gpu_by_uuid(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(torch.cuda, get_device_properties=lambda _: SimpleNamespace(uuid="12-34"))
    assert infra.smi(machine(H100), "clocks.sm") is None   # not installed
    for says in ("echo 42", "echo '[N/A]'", "echo '[Not Supported]'", "", "echo 42; exit 9", "echo 1; echo 2"):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\n{says}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert infra.smi(machine(H100), "clocks.sm") == ("42" if says == "echo 42" else None)
    assert {"--query-gpu=clocks.sm", "--id=GPU-12-34"} <= set((tmp_path / "asked").read_text().split())


# --- the whole table, and --probe ------------------------------------------------------------------------------------

@pytest.fixture
def probes(fake):
    """probes(name=rows): what these say instead."""
    return lambda **says: fake(PROBES=infra.PROBES | {
        name: rows if callable(rows) else lambda *_, rows=rows: iter(rows) for name, rows in says.items()})


def test_main_writes_every_row_as_strict_json_and_strict_is_status_1_only_if_one_fails(tmp_path, probes, capsys):
    def saved(name):
        return json.loads((tmp_path / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    rows = [infra.row("b", math.inf), infra.row("c", 1.5, "µs", "how", 2, "who", x=1), infra.row("e", 0.6, reference=1)]
    probes(memory=rows, matmul=[infra.note("d", "täxt")])
    told = infra.main(config(only="memory,matmul", strict=True, json=str(tmp_path / "a.json")))
    assert " ".join(r["probe"] + r["what"] for r in told["rows"]) == "matmuld memoryb memoryc memorye"
    assert verdicts(told["rows"]) == "n/a n/a PASS WARN"
    assert all(KEYS < set(r) for r in told["rows"]) and saved("a.json")["rows"] == [infra.finite(r) for r in told["rows"]]
    assert saved("a.json")["machine"] == told["machine"] and re.match(r"\d{4}-\d\d-\d\d$", saved("a.json")["date"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6 and out[0].startswith(f"{told['machine']} | 1 process | ") and out[-1] == "4 rows, 0 FAIL"
    assert re.search(r"^c +1\.5 µs +75 % +PASS +of 2, who; how$", out[3])
    probes(memory=[*rows, infra.row("a", math.nan, reference=1)])
    assert len(infra.main(config(only="memory"))["rows"]) == 4
    with pytest.raises(SystemExit) as end:
        infra.main(config(only="memory", strict=True, json=str(tmp_path / "b.json")))
    assert end.value.code == 1 and saved("b.json")["rows"][3]["value"] is None
    assert capsys.readouterr().out.count("4 rows, 1 FAIL: a\n") == 2


@pytest.mark.parametrize("change, message", [
    (dict(only="disk"), "--only=disk: health, matmul, memory, transfer, peers, collectives, storage, loader expected"),
    (dict(only="memory,disk"), "--only=memory,disk: health, "),
    (dict(only="peers", json="/nowhere/a.json"), "--json=/nowhere/a.json: ")])
def test_an_unknown_probe_or_folder_is_one_line(change, message):
    with pytest.raises(SystemExit, match=message) as end:
        infra.main(config(**change))
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("error, text", [
    (RuntimeError("a\nb"), "RuntimeError: a b"), (MemoryError(), "MemoryError: MemoryError"),
    (ValueError("y" * 300), "ValueError: " + "y" * 200),
    (OSError(12, "Cannot allocate memory"), "OSError: [Errno 12] Cannot allocate memory")])
def test_what_a_probe_raises_is_a_row_and_the_others_go_on(probes, error, text):
    def broken(cfg, rt, rows):
        yield infra.row("a", 1)
        raise error
    probes(memory=broken, loader=[infra.row("b", 2)])
    rows = probe("loader,memory")
    assert list(rows) == ["a", "memory", "b"] and verdicts(rows) == "n/a FAIL n/a" and rows["memory"]["advice"] == text


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_after_the_row_and_torchruns_sigterm_does_not(fake, disk, capsys, which):
    def loader(*args, real=data.Loader):
        if not sent:                                       # the first one, for the cold file
            sent.append(os.kill(os.getpid(), which))
        return real(*args)
    ended, sent = False, []
    fake(data, Loader=loader)
    try:
        infra.main(config(only="loader", path=str(disk)))       # the scratch file goes too
    except SystemExit as e:
        ended = e.code == 130
    out = capsys.readouterr().out
    assert ended == ("warm file" not in out) == (STARTS[2] not in out) == (which == signal.SIGINT) and "cold file" in out


def test_probe_is_the_square_matmul_measured_here_in_the_runs_dtype(tmp_path, fake):
    path = str(tmp_path / "a.json")
    fake(tflops=lambda rt, m, k, n, kind: (0.1 if kind == "fp32" else 0.05) * (1 if m == k == n else 3))
    infra.main(config(only="matmul", json=path))
    for dtype, peak in (("float32", 1e11), ("bfloat16", 5e10)):
        rt = infra.setup(infra.Machine(device="cpu", dtype=dtype, probe=path))
        assert rt.peak == pytest.approx(peak) and rt.peak_source == "matmul measured here"
    rt = infra.setup(infra.Machine(device="cpu", dtype="float32"))
    assert rt.peak is None and rt.peak_source.startswith("published")
    rows = [dict(dtype=kind, value=value, square=True) for kind, value in (("fp32", 1), ("tf32", 4), ("bf16", 8), ("fp8", 16))]
    infra.write_json(path, dict(machine="A", rows=rows + [dict(dtype="bf16", value=99)]))
    assert [infra.measured_peak(path, "A", dtype) for dtype in (torch.float32, torch.bfloat16)] == [4e12, 8e12]      # a GPU


@pytest.mark.parametrize("text, message", [
    (None, "FileNotFoundError"), ("", "JSONDecodeError"), ('{"machine": "A", "ro', "JSONDecodeError"), ("5", "TypeError"),
    ("{}", "KeyError: 'rows'"), ('{"machine": "A", "rows": null}', "TypeError"), ('{"machine": "A", "rows": []}', "KeyError"),
    ('{"rows": [ROW]}', "KeyError: 'machine'"), ('{"machine": "B", "rows": [ROW]}', "ValueError: measured on B: A expected"),
    ('{"machine": "A", "rows": [{"square": true, "dtype": "fp32", "value": 1}]}', "KeyError: 'bf16'"),
    ('{"machine": "A", "rows": [{"square": true, "dtype": "bf16", "value": null}]}', "TypeError"),
    ('{"machine": "A", "rows": ["x"]}', "AttributeError")])
def test_a_file_that_is_no_measurement_of_this_machine_is_one_line(tmp_path, text, message):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text.replace("ROW", '{"square": true, "dtype": "bf16", "value": 1}'))
    with pytest.raises(SystemExit, match=rf"^--probe={re.escape(str(path))}: {message}") as end:
        infra.measured_peak(path, "A", torch.bfloat16)
    assert "\n" not in str(end.value) and "matmul rows" in str(end.value)
