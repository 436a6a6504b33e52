"""The machine. Top half: the runtime that every script shares. (Probes and the capacity planner will be the bottom half.)

    cli(Config, presets)    one dataclass -> `python X.py [preset] --key=value`, --help, --config=FILE.toml|json
    setup(cfg)              device, dtype, threads, process groups, seed
    Log                     one line and one JSON row per logged step
    atomic, lock, Stop      what a run needs to survive: files whole or absent, one writer, signals that finish the step

Importing this file measures nothing and starts nothing.
"""
import contextlib, ctypes, dataclasses, difflib, errno, inspect, json, math, mmap, os, platform, random, re, shutil, signal, statistics
import subprocess, sys, threading, time, tomllib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# --- command line ----------------------------------------------------------------------------------------------------

def _number(text, kind):
    """'1e6' is a fine int and '1' a fine float; 1.5 is no int, and nan is neither."""
    value = float(text)
    if not math.isfinite(value) or (kind is int and value != int(value)):
        raise ValueError
    return int(text) if kind is int and re.fullmatch(r"[+-]?\d[\d_]*", str(text)) else kind(value)


def _convert(value, kind):
    """A flag's text, or a TOML/JSON value, as the field's type. Raises ValueError with what was expected."""
    want = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    try:
        if kind is bool:
            words = {"true": True, "1": True, "false": False, "0": False}
            return value if isinstance(value, bool) else words[str(value).lower()]
        if isinstance(value, (bool, list, dict)) or (kind is str and not isinstance(value, str)):
            raise ValueError
        return value if kind is str else _number(value, kind)
    except (ValueError, KeyError, OverflowError, TypeError):
        raise ValueError(f"{want} expected, not {value!r}") from None


def _config_file(path):
    """The keys in a TOML file, or in the config.json that every run leaves behind."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        keys = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
        if not isinstance(keys, dict):
            raise ValueError("not an object of keys and values")
        return keys
    except OSError as e:
        raise ValueError(f"--config={path}: {e.strerror}: a .toml or .json file expected") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}: TOML (or the config.json of a run) expected") from None


def _comments(Config):
    """field -> its trailing comment, which is its help text (inherited fields included)."""
    notes = {}
    for cls in reversed(Config.__mro__[:-1]):
        notes |= dict(re.findall(r"^ {4}(\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
    return notes


def _help(Config, presets, program):
    words = " [PRESET]" * bool(presets) + " [DIR]" * ("init" in Config.__dataclass_fields__)
    print(f"usage: python {program}{words} [--key=value ...] [--config=FILE.toml]\n")
    if presets:
        print("presets (defaults that flags override):", ", ".join(presets), "\n")
    notes = _comments(Config)
    for f in dataclasses.fields(Config):
        print(f"  --{f.name}={f.default!r}".replace("''", ""), notes.get(f.name, ""), sep="\n        ")


def cli(Config, presets={}, argv=None):
    """Command line -> Config. Order of precedence: field default < preset < --config file < flag.

    Config: a dataclass of int, float, bool and str fields with defaults; a field's trailing comment is its help.
    presets: {name: {field: value}}, chosen by a bare word anywhere; a bare word that is a path means --init.
    Unknown keys and unreadable values end the program with one line and status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    program = Path(sys.argv[0]).name
    kinds = get_type_hints(Config)
    fields = [f.name for f in dataclasses.fields(Config)]
    flags, preset, files = {}, {}, {}

    def check(key, where):
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            raise ValueError(f"{where}: unknown key" + (f", did you mean {close[0]}?" if close else "; --help lists them"))

    try:
        while argv:
            word = argv.pop(0)
            if word in ("-h", "--help"):
                _help(Config, presets, program)
                raise SystemExit(0)
            if not word.startswith("--"):
                if word in presets:
                    preset = presets[word]
                elif "init" in fields and Path(word).exists():
                    flags["init"] = word
                else:
                    raise ValueError(f"{word}: no such preset or checkpoint: one of {', '.join(presets)} expected")
                continue
            key, eq, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key != "config":
                check(key, f"--{key}")
            if not eq:  # `--key value`; a switch never takes the next word, so `--compile tiny` keeps its preset
                if kinds.get(key) is bool or getattr(Config, key, None) == "off":
                    value = "true" if kinds[key] is bool else "on"
                elif argv and not argv[0].startswith("--"):
                    value = argv.pop(0)
                else:
                    raise ValueError(f"--{key}: a value expected: --{key}=...")
            if key == "config":
                files = _config_file(value)
                for name in files:
                    check(name, f"{value}: {name}")
            flags[key] = value
        path = flags.pop("config", "")
        result = {}
        for source, where in ((preset, "preset "), (files, f"{path}: "), (flags, "--")):
            for key, value in source.items():
                try:
                    result[key] = _convert(value, kinds[key])
                except ValueError as e:
                    raise ValueError(f"{where}{key}: {e}") from None
        return Config(**result)
    except ValueError as e:
        print(f"{program}: {e}", file=sys.stderr)
        raise SystemExit(2) from None


# --- device, dtype, threads, process groups --------------------------------------------------------------------------

@dataclasses.dataclass
class Machine:
    """The knobs that every script shares: what setup() reads, and compile."""
    seed: int = 0                  # initialisation, order of the data, samples
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: str = "auto"            # of the matmuls: bfloat16 where the hardware multiplies it, else float32
    compile: bool = False          # torch.compile: half a minute at first, pays on long runs
    tp: int = 1                    # processes (torchrun) that share one model, tensor-parallel; all others are data-parallel
    tp_same_seed: str = "off"      # on: SmolLM3's bug, refused by the check at the start; ignore: train with it


def _native_bf16(device):
    """Does the hardware multiply bfloat16, or only emulate it? (torch's is_bf16_supported() says yes for emulation too.)"""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # private names: absent in some builds, then fp32 is the safe answer
        return any(getattr(torch.cpu, f, bool)() for f in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return False  # mps: not measured


def _cores():
    """Cores this process may use: affinity mask and cgroup quota (containers), not what the box has."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        n = min(n, max(1, round(int(quota) / int(period))))
    return n


def _env(name, default):
    """One of the numbers that torchrun leaves in the environment."""
    return int(os.environ.get(name, default))


def _device(cfg):
    """-> (device, dtype of the matmuls), or one line about what is wrong."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if cfg.device == "auto" else cfg.device)
        if device.type == "cuda" and _env("WORLD_SIZE", 1) > 1:
            device = torch.device("cuda", _env("LOCAL_RANK", 0))
        torch.empty(1, device=device)
    except Exception:  # torch raises anything from AssertionError to RuntimeError here
        raise SystemExit(f"--device={cfg.device}: not usable on this machine, by its process {_env('LOCAL_RANK', 0)}: "
                         f"auto, cpu, cuda (a GPU for each process) or mps expected") from None
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise SystemExit(f"--dtype={cfg.dtype}: auto, float32 or bfloat16 expected")
    if cfg.dtype == "auto":
        return device, torch.bfloat16 if _native_bf16(device) else torch.float32
    return device, getattr(torch, cfg.dtype)


def setup(cfg):
    """Prepare this process, alone or under torchrun. Reads the fields of Machine.

    Returns a namespace: device, dtype (what the matmuls run in; weights, optimizer and loss stay float32), threads, name (of
    the hardware), peak (dense FLOP/s in that dtype, or None when nobody published one); rank, world_size, local_rank,
    restarts (how often torchrun has started this job again); dp_rank, dp_size, dp_group; tp_rank, tp_size, tp_group.
    A group of one process is None. Only rank 0 prints: stdout of the others leads nowhere; errors come from every rank.
    """
    rank, world, local_size = _env("RANK", 0), _env("WORLD_SIZE", 1), _env("LOCAL_WORLD_SIZE", 1)
    device, dtype = _device(cfg)
    if not 0 <= cfg.seed < 2**32:  # torch's CPU generator ignores higher bits: 2**32 would be 0 again
        raise SystemExit(f"--seed={cfg.seed}: 0 to 2**32 - 1 expected")
    if cfg.tp < 1 or world % cfg.tp:
        raise SystemExit(f"--tp={cfg.tp}: a divisor of the number of processes, {world}, expected "
                         f"(torchrun --nproc_per_node=N)")
    if cfg.tp_same_seed not in ("off", "on", "ignore"):
        raise SystemExit(f"--tp_same_seed={cfg.tp_same_seed}: off, on or ignore expected")
    if device.type == "cpu":
        if os.environ.get("OMP_NUM_THREADS") in (None, "1" if local_size > 1 else None):  # torchrun sets 1 unasked
            torch.set_num_threads(max(1, _cores() // local_size))
        _keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")  # fp32 matmuls on CUDA's tensor cores (TF32), as PyTorch once did
    if rank:
        sys.stdout = open(os.devnull, "w")
    dp_group, tp_group = _groups(device, world, cfg.tp)
    # Only initialisation draws from torch's generator; data and sampling are functions of their own seeds. TP ranks draw
    # different shards of one model: with one seed SmolLM3's were equal, for ever, and it had to start over after 1T tokens.
    torch.manual_seed(cfg.seed + TP_SEED_STRIDE * (rank % cfg.tp) * (cfg.tp_same_seed == "off"))
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    return SimpleNamespace(device=device, dtype=dtype, threads=threads, name=name,
                           peak=peak_flops(name) if cuda and dtype == torch.bfloat16 else None,
                           rank=rank, world_size=world, local_rank=_env("LOCAL_RANK", 0),
                           restarts=_env("TORCHELASTIC_RESTART_COUNT", 0),
                           dp_rank=rank // cfg.tp, dp_size=world // cfg.tp, dp_group=dp_group,
                           tp_rank=rank % cfg.tp, tp_size=cfg.tp, tp_group=tp_group)


TP_SEED_STRIDE = 1_000_003  # not 1: rank 1 of --seed=0 would draw what rank 0 of --seed=1 draws


def _groups(device, world, tp):
    """-> (data-parallel group, tensor-parallel group) of this process; None instead of a group of one."""
    dp_group = tp_group = None
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **_store())
        if tp > 1:  # neighbours share a model, for they share a machine and its NVLink
            tp_group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + tp)) for i in range(0, world, tp)])
        if tp < world:
            dp_group, _ = dist.new_subgroups_by_enumeration([list(range(i, world, tp)) for i in range(tp)])
    return dp_group, tp_group


def _store():
    """Where the processes find each other, as arguments of init_process_group; {}: torch's own choice.

    Torchrun keeps one store for all its starts, and a process that reads there the address of one that has died waits for
    it for ever (pytorch issue 135712). So each start of a machine has its own names; several machines count their starts
    differently and need a new store."""
    if _env("GROUP_WORLD_SIZE", 1) == 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        return dict(store=dist.PrefixStore(f"start {_env('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank=rank, world_size=world)
    if _env("TORCHELASTIC_MAX_RESTARTS", 0) and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise SystemExit("torchrun --max_restarts on several machines: expected the environment variable "
                         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv_backend=c10d")
    return {}


def all_sum(rt, *numbers):
    """Sums of Python numbers over all ranks, through the CPU."""
    if rt.world_size > 1:
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers)
        numbers = numbers.tolist()
    return numbers


def on_rank_0(rt, function, *args):
    """function(*args), called by rank 0 alone; its result on every rank."""
    box = [function(*args) if rt.rank == 0 else None]
    if rt.world_size > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def gather(rt, value):
    """What each rank has, on all of them: a list by rank."""
    everyone = [value] * rt.world_size
    if rt.world_size > 1:
        dist.all_gather_object(everyone, value)
    return everyone


@contextlib.contextmanager
def in_turn(rt):
    """`with in_turn(rt):` rank 0 goes first, then the first process of every other machine, then the rest: what one writes,
    those after it find, on a shared disk or on their own."""
    turn = 2 if rt.local_rank else 1 if rt.rank else 0
    for _ in range(turn):
        all_sum(rt, 0)
    yield
    for _ in range(2 - turn):
        all_sum(rt, 0)


def all_gather(rt, tensor):
    """The equally shaped CPU tensors of all ranks, a list by rank."""
    everyone = [torch.empty_like(tensor) for _ in range(rt.world_size)] if rt.world_size > 1 else [tensor]
    if rt.world_size > 1:
        dist.all_gather(everyone, tensor)
    return everyone


def launch(main, cfg):
    """main(cfg), for scripts. Under torchrun the rank that failed first speaks, and torchrun's closing summary quotes it: the
    others wait a moment, and are ended before they can add that somebody left them."""
    try:
        main(cfg)
    except BaseException as e:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler
            if os.environ["RANK"] != "0" or not isinstance(e, SystemExit):  # what all find wrong, rank 0 says
                time.sleep(3)
            get_error_handler().record_exception(e)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def mark(rt):
    """A point in the device's work; elapsed(a, b): seconds between two (on CUDA ask only after b has passed)."""
    if rt.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(a, b):
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


def _keep_freed_memory():
    """Tell glibc to keep freed activations instead of returning them to the kernel after every step.

    Getting them back costs a page fault per 4 KiB: attention forward + backward here, 16 rows of 256: 18.7 -> 9.0 ms.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(M_MMAP_THRESHOLD, 1 << 30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_name():
    """'Intel(R) Xeon(R) Processor' where Linux tells, else what Python knows."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


Sheet = namedtuple("Sheet", "bf16 fp16 fp8 fp32 gb gbs peer host")
# Vendors' data sheets: dense TFLOP/s (the "sparse" figures are twice these and never reached), fp32 without tensor cores (TF32
# is half of bf16); GB of memory, its GB/s; GB/s to another GPU and to the host, one direction. First match wins.
SHEETS = {
    "B200": Sheet(2250, 2250, 4500, 80, 180, 8000, 900, 63), "H200 NVL": Sheet(835, 835, 1671, 60, 141, 4800, 450, 63),
    "H200": Sheet(989, 989, 1979, 67, 141, 4800, 450, 63), "H100 PCIe": Sheet(756, 756, 1513, 51, 80, 2000, 63, 63),
    "H100 NVL": Sheet(835, 835, 1671, 60, 94, 3938, 300, 63), "H100": Sheet(989, 989, 1979, 67, 80, 3350, 450, 63),
    "A100-SXM4-40GB": Sheet(312, 312, None, 19.5, 40, 1555, 300, 31.5), "A100-PCIE-40GB": Sheet(312, 312, None, 19.5, 40, 1555, 31.5, 31.5),
    "A100 80GB PCIe": Sheet(312, 312, None, 19.5, 80, 1935, 31.5, 31.5), "A100": Sheet(312, 312, None, 19.5, 80, 2039, 300, 31.5),
    "L40S": Sheet(362, 362, 733, 91.6, 48, 864, 31.5, 31.5), "RTX 4090": Sheet(165.2, 165.2, 330, 82.6, 24, 1008, 31.5, 31.5),
    "T4": Sheet(None, 65, None, 8.1, 16, 320, 15.75, 15.75), "MI300X": Sheet(1307, 1307, 2615, 163.4, 192, 5300, 64, 63)}


def data_sheet(name):
    """What the vendor promises of the GPU called `name`, or None: never another device's figures."""
    if re.search(r"Laptop|MIG|4090 D", name):  # smaller than what their name contains
        return None
    return next((sheet for key, sheet in SHEETS.items() if re.search(rf"\b{key}\b", name, re.I)), None)


def peak_flops(name):
    """Published dense bf16 FLOP/s of the GPU called `name`, or None."""
    sheet = data_sheet(name)
    return sheet and sheet.bf16 and sheet.bf16 * 1e12


def peak_memory(device):
    """Most bytes this process has held: allocator's count on CUDA, resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


# --- writing, stopping, logging --------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as f:` a binary file that appears under its name whole and on disk, or not at all."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # without it a power cut can leave a renamed but empty file
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is durable only once the directory is
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_json(path, obj):
    """Plain types -> a JSON file, atomically."""
    with atomic(path) as f:
        f.write(json.dumps(obj, indent=1).encode())


def lock(directory):
    """Keep other processes from writing to `directory` (created if missing) while the returned file is open. The kernel
    frees it however this process ends. Then removes what a killed process left half-written."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".lock", "a+")
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and so no protection
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{directory}: {file.read()} is writing here: another --out expected, or its end") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()
    return file


class Stop:
    """`with Stop() as stop:` SIGINT and SIGTERM only set stop.signal, so that the step is finished and saved.

    A second signal interrupts at once. Outside the main thread signals cannot be caught, and nothing is changed.
    """
    def __enter__(self):
        self.signal, self.old = None, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def _is_row(text, last):
    """A whole row of an older run, from before the step that is resumed? The last row may have been cut by the crash."""
    try:
        row = json.loads(text)
        return row["step"] <= last and not row.get("final")
    except (ValueError, KeyError, TypeError):
        return False


def finite(value):
    """JSON has no NaN and no infinity: null instead, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """Terminal and out/metrics.jsonl. A live bar only on a terminal; each printed line carries progress and ETA itself."""

    def __init__(self, out, total, start=0, wandb=False, config=None, quiet=False):
        """out: run directory; total: last step; start: steps already done (later rows of an older run are cut off).
        quiet: write nothing (every rank but the first)."""
        self.path, self.total, self.start, self.clock = Path(out) / "metrics.jsonl", total, start, time.perf_counter()
        self.wandb, terminal_only = None, True if quiet else None
        self.bar = tqdm(total=total, initial=start, disable=terminal_only, leave=False, unit="step", dynamic_ncols=True)
        if quiet:
            self.file = open(os.devnull, "w")
            return
        rows = self.path.read_text(encoding="utf-8").splitlines() if start and self.path.exists() else []
        kept = [r for r in rows if _is_row(r, start)]
        with atomic(self.path) as f:
            f.write("".join(r + "\n" for r in kept).encode())
        self.file = open(self.path, "a", encoding="utf-8")
        if wandb:
            try:
                import wandb as module
            except ImportError:
                raise SystemExit("--wandb: the package wandb is not installed: pip install wandb") from None
            self.wandb = module.init(project="nanosmol", name=Path(out).name, config=config)

    def say(self, text):
        """A line for the reader, above the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def eta(self, step):
        left = (time.perf_counter() - self.clock) / max(1, step - self.start) * (self.total - step)
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def row(self, line=None, **values):
        """One JSON row (non-finite numbers become null); with `line`, also one printed line."""
        clean = finite(values)
        try:
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()
        except OSError as e:  # a full disk costs rows, not the run
            self.say(f"WARNING: {self.path}: {e.strerror}: a row is lost")
        if self.wandb:
            self.wandb.log(clean, step=values["step"])
        if line:
            step = values["step"]
            done = f"step {step:>{len(str(self.total))}}/{self.total} {100 * step // self.total:3d}%"
            self.say(f"{done} | {line} | eta {self.eta(step)}")

    def close(self):
        self.bar.close()
        with contextlib.suppress(OSError):  # of rows that a full disk has not taken
            self.file.close()
        if self.wandb:
            self.wandb.finish()


# --- probes: is the machine what you paid for? -----------------------------------------------------------------------
# A probe is a generator of rows. What a part of the machine can do is the best of several tries (as in STREAM and in
# mamf-finder: what disturbs a try only ever makes it slower); what others wait for is the slowest rank's median.

@dataclasses.dataclass
class Config(Machine):
    preset: str = ""          # whose shapes and needs; default: small, on a GPU smollm3-3b (a bare word does it too)
    only: str = ""            # matmul,memory,transfer,peers,collectives,storage,loader,health; default: all
    path: str = "."           # directory whose disk is measured: where data and checkpoints will lie
    json: str = ""            # write the rows to this file; other scripts take it as --probe
    strict: bool = False      # exit with status 1 if anything FAILs


# The playbook's own measurements on 8 x H100 (its chapter on infrastructure), corrected: it sets fp8 beside 3960, the figure
# for sparse matrices, where dense ones reach 1979; and its row "fp32" ran in TF32, whose dense peak is 495, not 67.
PLAYBOOK_H100 = {"bf16": "714-758", "fp16": "687-732", "fp8": "1210-1457", "tf32": "356-396", "memory": "3040", "transfer": "14.2",
                 "peers": "364.9", "all_reduce": "480", "all_to_all": "340"}


def row(what, value, unit="", convention="", reference=None, source="", good=0.7, poor=0.5, advice="", playbook="", **more):
    """One line of the table. reference: what the value is compared with, in the same unit, and where that figure is from; None:
    nobody published one, and nothing is judged. PASS from good * reference on, FAIL below poor * reference."""
    share = value / reference if value is not None and reference else None
    verdict = "n/a" if share is None else "PASS" if share >= good else "WARN" if share >= poor else "FAIL"
    return dict(what=what, value=value, unit=unit, convention=convention, reference=reference, source=source,
                percent=share and round(100 * share, 1), verdict=verdict, advice=advice if verdict in ("WARN", "FAIL") else "",
                playbook=playbook) | more


def note(what, text, verdict="n/a"):
    """A line without a figure."""
    return row(what, None) | dict(verdict=verdict, advice=text)


def show_row(r):
    number = "" if r["value"] is None else f"{r['value']:,.0f}" if r["value"] >= 100 else f"{r['value']:.3g}"
    percent = "" if r["percent"] is None else f"{r['percent']:.0f} %"
    text = "; ".join(filter(None, (r["advice"], r["percent"] is not None and f"of {r['reference']:,.4g}, {r['source']}",
                                   r["playbook"] and f"playbook's H100: {r['playbook']}", r["convention"])))
    print(f"{r['what']:34} {number:>9} {r['unit']:9} {percent:>6}  {r['verdict']:4}  {text}", flush=True)


def seconds_of(rt, call, samples=7, least=0.02):
    """Seconds of one call(): (best, median) of `samples`, each of as many calls as fill `least` seconds; two seconds in all."""
    wait = getattr(torch, rt.device.type).synchronize if rt.device.type in ("cuda", "mps") else lambda: None
    now, times = time.perf_counter, []
    call(), wait()
    start = now()
    call(), wait()
    calls, end = max(1, math.ceil(least / max(1e-9, now() - start))), now() + 2
    while len(times) < samples and (len(times) < 3 or now() < end):
        start = now()
        for _ in range(calls):
            call()
        wait()
        times.append((now() - start) / calls)
    return min(times), statistics.median(times)


def matmul_tflops(rt, m, k, n, kind):
    """TFLOP/s of (m, k) @ (k, n) in fp32, tf32, bf16, fp16 or fp8, of random numbers: multiplying zeros draws less power."""
    dtype = dict(fp32="float32", tf32="float32", bf16="bfloat16", fp16="float16", fp8="float8_e4m3fn")[kind]
    a, b = (torch.randn(size, device=rt.device).to(getattr(torch, dtype)) for size in ((m, k), (n, k)))
    precision, one = torch.get_float32_matmul_precision(), torch.ones((), device=rt.device)
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        if kind == "fp8":
            best, _ = seconds_of(rt, lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16))
        else:
            best, _ = seconds_of(rt, lambda: torch.mm(a, b.T))
    finally:
        torch.set_float32_matmul_precision(precision)
    return 2 * m * k * n / best / 1e12


def probe_matmul(cfg, rt, rows):
    """Every dtype that the device multiplies, at a large square and at the preset's own shapes."""
    cuda, sheet, c = rt.device.type == "cuda", data_sheet(rt.name), preset_config(cfg)
    size, kinds, found = 8192 if cuda else 2048, ["fp32", "bf16"], {}
    if cuda:
        capability = torch.cuda.get_device_capability(rt.device)
        nvidia = torch.version.hip is None
        kinds = ["fp32", *["tf32"] * (nvidia and capability >= (8, 0)), *["bf16"] * _native_bf16(rt.device), "fp16",
                 *["fp8"] * (not nvidia or capability >= (8, 9))]
    for kind in kinds:
        try:
            found[kind] = matmul_tflops(rt, size, size, size, kind)
        except RuntimeError as e:  # fp8 on hardware that this build of torch does not serve
            yield note(f"matmul {kind}", str(e).splitlines()[0][:100])
            continue
        peak = sheet and (sheet.bf16 and sheet.bf16 / 2 if kind == "tf32" else getattr(sheet, kind))
        reference, source, good, poor, advice = peak, "dense TFLOP/s of the data sheet", 0.7, 0.5, (
            "clocks (nvidia-smi -q -d CLOCK), power cap, another process on this GPU, or kernels of another architecture")
        if not cuda and kind == "bf16":
            reference, source, good, poor = found["fp32"], "fp32 here", 1.2, 0.8
            advice = "bf16 is emulated or hardly faster here: --dtype=float32"
        yield row(f"matmul {kind}", found[kind], "TFLOP/s", f"{size}³", reference, source, good, poor, advice,
                  PLAYBOOK_H100.get(kind, "") if "H100" in rt.name else "", dtype=kind, square=True)
    main = dict(float32="tf32" if "tf32" in found else "fp32", bfloat16="bf16")[str(rt.dtype)[6:]]
    if not cuda and rt.threads > 1:
        torch.set_num_threads(1)
        alone = matmul_tflops(rt, size, size, size, main)
        torch.set_num_threads(rt.threads)
        yield row(f"matmul {main}, 1 thread", alone, "TFLOP/s", f"{size}³")
        yield row(f"matmul {main}, {rt.threads} threads against 1", found[main] / alone, "times", "", rt.threads, "threads", 0.8, 0.6,
                  "threads share multipliers (hyperthreads), memory or a power budget, or neighbours use the cores")
    tokens, d, D = 8192 if cuda else 2048, c.hidden_size, c.head_size
    shapes = {"q, o": (d, c.num_attention_heads * D), "k, v": (d, c.num_key_value_heads * D),
              "gate, up": (d, c.intermediate_size), "down": (c.intermediate_size, d), "head": (d, c.vocab_size or 320)}
    for name, (k, n) in shapes.items():
        yield row(f"  {cfg.preset}: {name}", matmul_tflops(rt, tokens, k, n, main), "TFLOP/s", f"{tokens} x {k} x {n}, {main}", found[main],
                  "the square", 0.5, 0, "this shape wastes the machine: wider matrices, more tokens, multiples of 64")


def free_memory():
    """Bytes that can still be used, as far as Linux and its cgroup tell."""
    free = 2**33
    with contextlib.suppress(OSError, ValueError):
        free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def last_level_cache():
    """Bytes, or None where Linux does not tell."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * dict(K=2**10, M=2**20, G=2**30)[s[-1]] for s in sizes), default=None)


def probe_memory(cfg, rt, rows):
    """Copies within the device's memory, large and small."""
    cuda, sheet = rt.device.type == "cuda", data_sheet(rt.name)
    cache = 2**26 if cuda else last_level_cache() or 2**25
    free = torch.cuda.mem_get_info(rt.device)[0] if cuda else free_memory() // _env("LOCAL_WORLD_SIZE", 1)
    large = min(2**30 if cuda else max(2**28, 4 * cache), free // 4)
    for what, size in (("memory", large), ("cache-sized", cache // 4), ("sub-megabyte", 2**18)):
        a, b = (torch.ones(size // 4, device=rt.device) for _ in "ab")
        best, _ = seconds_of(rt, lambda: b.copy_(a))
        main = what == "memory"
        yield row(f"copy, {what}", 2 * size / best / 1e9, "GB/s", f"{size / 2**20:,.4g} MiB, read + written"
                  + ", may be cache" * (main and size < 4 * cache), sheet.gbs if main and sheet else None,
                  "GB/s of the data sheet", 0.8, 0.6, "another process on this GPU, or ECC or throttling: see health",
                  PLAYBOOK_H100["memory"] if main and "H100" in rt.name else "", main=main)


def smi(query, rt):
    """One field of nvidia-smi for this process's GPU, or None. It numbers GPUs as they sit, so they are named by their UUID."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
        uuid = str(torch.cuda.get_device_properties(rt.device).uuid)
        out = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"],
                             capture_output=True, text=True, timeout=10)
        value = out.stdout.strip()
        return value if out.returncode == 0 and value and not re.search(r"N/A|Not Supported|\n", value) else None


def probe_transfer(cfg, rt, rows):
    """Between host and GPU: bandwidth, latency, and what launching a kernel costs."""
    if rt.device.type != "cuda":
        yield note("host to device", "no CUDA device here: nothing to transfer")
        return
    size, link, source = 2**28, None, ""
    generation, width = smi("pcie.link.gen.max", rt), smi("pcie.link.width.current", rt)
    if generation and width:
        link = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.56}.get(int(generation), 0) * int(width)
        source = f"PCIe {generation} x{width} as negotiated"
        yield row("PCIe lanes", int(width), "lanes", f"generation {generation}", 16, "a full slot", 1, 0.5,
                  "the card sits in a narrower slot or behind a hop")
    there, pinned, paged = (torch.empty(size, dtype=torch.uint8, **how) for how in (
        dict(device=rt.device), dict(pin_memory=True), {}))
    for what, to, source_, judged in (("host to device, pinned", there, pinned, True), ("device to host, pinned", pinned, there, True),
                                      ("host to device, pageable", there, paged, False), ("device to host, pageable", paged, there, False)):
        best, _ = seconds_of(rt, lambda: to.copy_(source_, non_blocking=True))
        yield row(what, size / best / 1e9, "GB/s", "one direction", link if judged else None, source, 0.8, 0.5,
                  "an x8 or older hop, or memory of another NUMA node",
                  PLAYBOOK_H100["transfer"] + " over PCIe 4 x8" if judged and "H100" in rt.name else "")

    def wait_for(f):
        f(), torch.cuda.synchronize()
    yield row("4 bytes to the device", 1e6 * seconds_of(rt, lambda: wait_for(lambda: there[:4].copy_(pinned[:4])))[0], "µs", "and a wait")
    yield row("launch of a kernel", 1e6 * seconds_of(rt, lambda: there[:4].add_(1))[0], "µs", "queued, from Python")


def probe_peers(cfg, rt, rows):
    """From each GPU that this process sees to the next."""
    n = torch.cuda.device_count() if rt.device.type == "cuda" and rt.world_size == 1 else 0
    if n < 2:
        yield note("GPU to GPU", "fewer than two GPUs in this process")
    sheet = data_sheet(rt.name)
    for i in range(n if n > 1 else 0):
        a, b = (torch.empty(2**28, dtype=torch.uint8, device=f"cuda:{d}") for d in (i, (i + 1) % n))
        best, _ = seconds_of(rt, lambda: (b.copy_(a, non_blocking=True), torch.cuda.synchronize(i), torch.cuda.synchronize((i + 1) % n)))
        direct = torch.cuda.can_device_access_peer(i, (i + 1) % n)
        yield row(f"GPU {i} to GPU {(i + 1) % n}", 2**28 / best / 1e9, "GB/s", "one direction, " + ("peer access" if direct else "through the host"),
                  sheet and sheet.peer, "GB/s of the data sheet", 0.7, 0.2, "not over NVLink: nvidia-smi topo -m",
                  PLAYBOOK_H100["peers"] if "H100" in rt.name else "")


# Bytes that cross a rank's link for each byte of the buffer (nccl-tests, doc/PERFORMANCE.md): with these "bus bandwidths" of
# different collectives and numbers of ranks compare with one and the same link.
BUS_FACTOR = {"all_reduce": lambda n: 2 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n, "reduce_scatter": lambda n: (n - 1) / n,
              "all_to_all": lambda n: (n - 1) / n, "broadcast": lambda n: 1, "send_recv": lambda n: 1}


def probe_collectives(cfg, rt, rows):
    """Every collective that training uses, small and large, as slow as its slowest rank; then rank by rank what it can do alone."""
    if rt.world_size == 1:
        yield note("collectives", "one process: torchrun --nproc_per_node=N infra.py measures them")
        return
    group, n, sheet = rt.group, rt.world_size, data_sheet(rt.name)
    cuda, host = rt.device.type == "cuda", max(1, n // _env("LOCAL_WORLD_SIZE", n))
    for size in (2**10, 2**20, 2**30 if cuda else 2**26):
        whole, part = torch.ones(size // 4 // n * n, device=rt.device), torch.ones(size // 4 // n, device=rt.device)
        other, right, left = torch.empty_like(whole), (rt.rank + 1) % n, (rt.rank - 1) % n

        def send_recv():
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, whole, right, group), dist.P2POp(dist.irecv, other, left, group)]):
                work.wait()
        collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed them
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        calls = dict(all_reduce=lambda: dist.all_reduce(whole, group=group), all_gather=lambda: collect(whole, part, group=group),
                     reduce_scatter=lambda: scatter(part, whole, group=group),
                     all_to_all=lambda: dist.all_to_all_single(other, whole, group=group),
                     broadcast=lambda: dist.broadcast(whole, 0, group=group), send_recv=send_recv)
        for name, call in calls.items():
            times = []
            for _ in range(8 if size > 2**20 else 24):
                dist.barrier(group)
                start = time.perf_counter()
                call()
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            slowest = torch.tensor([statistics.median(times[2:])], dtype=torch.float64, device=rt.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
            seconds, bytes_ = float(slowest), whole.numel() * 4
            large, label = size > 2**20, f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
            if size == 2**10:
                yield row(f"{name}, {label}", 1e6 * seconds, "µs", f"median of the slowest of {n} ranks")
            else:
                bus = bytes_ / seconds * BUS_FACTOR[name](n) / 1e9
                yield row(f"{name}, {label}", bus, "GB/s", f"bus bandwidth, {n} ranks; {bytes_ / seconds / 1e9:.3g} by the buffer's size",
                          sheet.peer if sheet and large and host == 1 else None, "GB/s to a peer by the data sheet", 0.7, 0.2,
                          "fell back to PCIe or shared memory: NCCL_DEBUG=INFO, look for P2P; unset NCCL_P2P_DISABLE",
                          PLAYBOOK_H100.get(name, "") if "H100" in rt.name and large else "")
    for kind, pick in (("matmul", lambda r: r.get("dtype") == "bf16" or r.get("dtype") == "fp32"), ("memory", lambda r: r.get("main"))):
        mine = [r["value"] for r in rows if r["probe"] == kind and pick(r)]
        everyone = torch.zeros(n, dtype=torch.float64, device=rt.device)
        everyone[rt.rank] = mine[-1] if mine else 0
        dist.all_reduce(everyone, group=group)
        for rank, value in enumerate(everyone.tolist()):
            if value:
                yield row(f"rank {rank}: {kind}", value, "TFLOP/s" if kind == "matmul" else "GB/s", "all ranks at once",
                          statistics.median(everyone.tolist()), "median of the ranks", 0.95, 0.9, "a straggler: everybody waits for it; see its health")


def file_system(path):
    """Type of the file system that holds `path`: ext4, tmpfs, nfs4, ...; "" where Linux does not tell."""
    with contextlib.suppress(OSError):
        where, best = str(Path(path).resolve()), ("", "")
        for _, mount, kind, *_ in map(str.split, Path("/proc/self/mounts").read_text().splitlines()):
            mount = mount.encode().decode("unicode_escape")  # spaces are written \040
            if (where + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
                best = mount, kind
        return best[1]
    return ""


def in_page_cache(path):
    """Share of a file's pages that are in memory (mincore)."""
    with open(path, "r+b") as f, mmap.mmap(f.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), pages)
        del first  # else the view could not be closed
    return math.nan if failed else sum(p & 1 for p in pages) / len(pages)


def evict(path):
    """Have the kernel forget a file's pages; only those that are on disk can go."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd), os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED), os.close(fd)


def timed_reads(path, flags, size, block, threads, ordered, seconds=0.3):
    """Threads read blocks, in order or at random places, for so long or to the file's end -> (bytes/s, sorted seconds of reads)."""
    evict(path)
    fd, latencies, count = os.open(path, os.O_RDONLY | flags), [[] for _ in range(threads)], size // block
    end = time.perf_counter() + seconds

    def read(t):
        buffer, luck, at = mmap.mmap(-1, block), random.Random(t), t  # an anonymous map is aligned, as O_DIRECT wants
        while time.perf_counter() < end and at < count:
            start = time.perf_counter()
            os.preadv(fd, [buffer], (at if ordered else luck.randrange(count)) * block)
            latencies[t].append(time.perf_counter() - start)
            at += threads * ordered
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    took = time.perf_counter() - begin
    os.close(fd)
    everything = sorted(s for each in latencies for s in each)
    return len(everything) * block / took, everything


def probe_storage(cfg, rt, rows):
    """The disk under --path: what reaches it and what comes from it, not what the page cache does."""
    folder = Path(cfg.path)
    path = folder / f".probe.{os.getpid()}.tmp"
    try:
        free = shutil.disk_usage(folder).free
        if free < 2**28:
            yield note(f"storage {folder}", f"{free / 1e6:,.0f} MB free: 268 at least expected, and room for checkpoints: "
                       f"another --path", "FAIL")
            return
        yield from measure_storage(cfg, rt, rows, path, min(2**30, free // 2) // 2**26 * 2**26)
    except OSError as e:
        yield note(f"storage {folder}", f"{e.strerror or e}: a writable directory with free space expected as --path", "FAIL")
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def measure_storage(cfg, rt, rows, path, size):
    kind, chunk, written = file_system(path.parent), 2**26, 0
    noise = memoryview(random.Random(0).randbytes(chunk + 2**16))  # incompressible, and no two chunks alike
    with open(path, "wb", buffering=0) as f:
        start, times = time.perf_counter(), []
        while written < size and time.perf_counter() - start < 5:
            begun = time.perf_counter()
            written += f.write(noise[written // chunk * 1031:][:chunk])
            os.fsync(f.fileno())
            times.append(time.perf_counter() - begun)
        write = chunk / statistics.median(times)
    evict(path)
    cached, flags = in_page_cache(path), getattr(os, "O_DIRECT", 0)
    try:
        os.close(os.open(path, os.O_RDONLY | flags))
    except OSError:  # this file system does not know it
        flags = 0
    size = written // 2**20 * 2**20
    reads = {(order, threads): max(timed_reads(path, flags, size, block, threads, order == "sequential") for _ in range(3))
             for order, block, counts in (("sequential", 2**20, (1, 16)), ("random", 2**14, (1, 4, 16))) for threads in counts}
    honest = kind not in ("tmpfs", "ramfs") and cached < 0.05 and (flags or not reads) and in_page_cache(path) < 0.05
    why = (f"{kind} lives in memory: not a disk's figure" if kind in ("tmpfs", "ramfs") else
           "the page cache kept the file: not a disk's figure")
    how = f"{kind or 'unknown file system'}, " + ("O_DIRECT, page cache empty (mincore)" if honest and flags else "buffered")
    how += ", a server's cache unseen" * bool(re.match("nfs|fuse|lustre|cifs|ceph|9p|virtiofs", kind))
    report = (lambda *a, **k: row(*a, **k)) if honest else lambda what, value, unit="", *a, **k: row(what, value, unit) | dict(advice=why)
    yield report("write", write / 1e9, "GB/s", f"{kind or 'unknown file system'}, fsync every 64 MiB")
    for (order, threads), (speed, latencies) in reads.items():
        p50, p99 = (1e6 * latencies[int(q * (len(latencies) - 1))] for q in (0.5, 0.99))
        block = "1 MiB" if order == "sequential" else "16 KiB"
        yield report(f"{order} read, {block}, {threads} thread{'s' * (threads > 1)}", speed / 1e9, "GB/s",
                     f"{how}; {len(latencies) and speed / (2**20 if block == '1 MiB' else 2**14):,.0f} reads/s, p50 {p50:,.0f} µs, p99 {p99:,.0f} µs")
    if honest:
        yield from needs(cfg, rt, rows, write, reads["random", 16][0])


def needs(cfg, rt, rows, write, read):
    """What the preset wants of the disk, beside what it got."""
    from model import flops_per_token, num_params
    c = preset_config(cfg)
    flops = max([r["value"] * 1e12 for r in rows if r.get("square") and r["dtype"] in ("fp32", "bf16")], default=rt.peak or 0)
    if flops:
        gpus, width = (8 if rt.device.type == "cuda" else 1), 2 if c.vocab_size <= 65536 else 4
        tokens = 0.3 * flops / flops_per_token(c, c.max_position_embeddings) * gpus
        yield row(f"  {cfg.preset}: loader", read / 1e6, "MB/s", f"random reads; {tokens:,.0f} tok/s of {width} bytes at 30 % of the matmuls' speed"
                  + " on 8 GPUs" * (gpus > 1), 10 * tokens * width / 1e6, "ten times what it reads", 1, 0.1, "the disk will stall training")
    state, hours = 12 * num_params(c), 2.1
    share = state / write / (hours * 3600)
    yield row(f"  {cfg.preset}: checkpoint", state / write, "s", f"{state / 1e9:,.3g} GB; {100 * share:.2g} % of the time at one in {hours} h") | dict(
        verdict="PASS" if share < 0.02 else "FAIL", advice="" if share < 0.02 else "2 % at most expected: a faster disk, or fewer checkpoints")


def probe_loader(cfg, rt, rows):
    """Our own loader: tokens/s from a cold and a warm file, and what a longer run costs at the start: nothing."""
    import data
    c, folder = preset_config(cfg), Path(cfg.path)
    T, n = c.max_position_embeddings, max(1, 2**16 // c.max_position_embeddings)
    path = folder / f".probe.{os.getpid()}.bin.tmp"
    try:
        if shutil.disk_usage(folder).free < 2**28:
            raise OSError(errno.ENOSPC, "no space left")
        np.random.default_rng(0).integers(0, 256, 2**25, dtype=np.uint16).tofile(path)
        evict(path)
        cold = in_page_cache(path) < 0.05 and file_system(folder) not in ("tmpfs", "ramfs")

        def loader_of(steps):
            tokens = np.memmap(path, "<u2", "r")
            source = data.Source("random", tokens, tokens, dict(eos=256), {})
            return data.Loader([source], "", T, steps * n, 0)
        start, loader = time.perf_counter(), loader_of(1000)
        loader.batch(0, n)
        if cold:
            yield row("loader, cold file", n * T / (time.perf_counter() - start), "tok/s", f"the first {n} rows of {T}, one thread")
        else:
            yield note("loader, cold file", "the page cache kept the file")
        loader.sources[0].train.max()  # reads all of it
        best, _ = seconds_of(SimpleNamespace(device=torch.device("cpu")), lambda: loader.batch(0, n))
        yield row("loader, warm file", n * T / best, "tok/s", f"{n} rows of {T}, one thread")
        starts = {}
        for steps in (32_000, 3_200_000, 10**9):
            before, start = resident_bytes(), time.perf_counter()
            loader = loader_of(steps)
            loader.batch(steps * n - n, n)
            starts[steps] = 1e3 * (time.perf_counter() - start), max(0, resident_bytes() - before) / 2**20
            yield row(f"loader's start, {steps:,} steps", starts[steps][0], "ms", f"{starts[steps][1]:.1f} MiB more in memory") | (
                {} if steps == 32_000 else dict(verdict="PASS" if starts[steps][1] < starts[32_000][1] + 4 else "FAIL"))
    except OSError as e:
        yield note("loader", f"{folder}: {e.strerror or e}: a writable directory with free space expected as --path", "FAIL")
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def resident_bytes():
    """Of this process, now; 0 where Linux does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return 0


def probe_health(cfg, rt, rows):
    """What slows a machine down without a word. What could not be read is said."""
    unread = []
    if rt.device.type == "cuda":
        a = torch.randn(8192, 8192, device=rt.device, dtype=rt.dtype)
        for _ in range(400):  # a second or two of work, queued: the figures are those under load
            a @ a
        fields = {"temperature": "temperature.gpu", "clock": "clocks.sm", "highest clock": "clocks.max.sm", "throttled by": "clocks_throttle_reasons.active",
                  "power": "power.draw", "power cap": "power.limit", "default power cap": "power.default_limit",
                  "uncorrected ECC errors": "ecc.errors.uncorrected.volatile.total", "remapped rows": "remapped_rows.uncorrectable",
                  "rows to be remapped": "remapped_rows.pending"}
        got = {name: smi(field, rt) for name, field in fields.items()}
        torch.cuda.synchronize()
        unread = [name for name, value in got.items() if value is None]
        number = lambda name: float(got[name]) if got[name] and re.fullmatch(r"[\d.]+", got[name]) else None
        if number("temperature") is not None:
            yield row("GPU temperature", number("temperature"), "°C", "under load") | dict(
                verdict="PASS" if number("temperature") < 85 else "WARN", advice="" if number("temperature") < 85 else "it will throttle: airflow")
        if number("clock") and number("highest clock"):
            yield row("GPU clock", number("clock"), "MHz", "under load", number("highest clock"), "MHz, the highest", 0.75, 0.5, "power or heat holds it down")
        if got["throttled by"]:
            bits = int(got["throttled by"], 16)  # nvml.h: nvmlClocksEventReason*
            names = {4: "power cap", 8: "hardware slowdown", 32: "software thermal limit", 64: "heat (hardware)", 128: "power brake"}
            active = [name for bit, name in names.items() if bits & bit]
            bad = bool(bits & ~(1 | 2 | 4))
            yield note("GPU throttling", ", ".join(active) or "none", "FAIL" if bad else "PASS")
        if number("power cap") and number("default power cap"):
            yield row("GPU power cap", number("power cap"), "W", "", number("default power cap"), "W by default", 0.99, 0.7, "somebody lowered it: nvidia-smi -pl")
        for name in ("uncorrected ECC errors", "rows to be remapped", "remapped rows"):
            if number(name) is not None:
                yield row(f"GPU {name}", number(name)) | dict(verdict="PASS" if number(name) == 0 else "WARN",
                                                              advice="" if number(name) == 0 else "a failing memory: reset, and replace it if they grow")
    flags = set()
    with contextlib.suppress(OSError, TypeError):
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if f in flags]
    yield note("CPU", f"{cpu_name()}; {', '.join(known) or 'no vector extensions that /proc/cpuinfo names'}")
    yield row("threads", rt.threads, "", "", _cores() / _env("LOCAL_WORLD_SIZE", 1), "cores this process may use", 1, 0.5,
              "OMP_NUM_THREADS is set lower") if rt.threads <= _cores() else note("threads", f"{rt.threads} on {_cores()} cores: they will spin", "WARN")
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        value = governor.read_text().strip()
        yield note("CPU governor", value, "PASS" if value == "performance" else "WARN")
    else:
        unread.append("CPU governor")
    try:
        seen = [[int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]] for _ in range(2) if not time.sleep(0.3)]
        ticks = [b - a for a, b in zip(*seen)]
        stolen, others = 100 * ticks[7] / max(1, sum(ticks)), 100 * (sum(ticks) - ticks[3] - ticks[4]) / max(1, sum(ticks))
        yield row("CPU time taken by the host", stolen, "%", "steal") | dict(verdict="PASS" if stolen < 2 else "WARN", advice="" if stolen < 2 else "a shared machine")
        yield row("CPU time used by others", others, "%", "while this process slept") | dict(
            verdict="PASS" if others < 10 else "WARN", advice="" if others < 10 else "something else runs here: every figure above is too low")
    except (OSError, ValueError):
        unread.append("steal time")
    for what, file in (("CPU quota", "cpu.max"), ("memory limit", "memory.max")):
        try:
            yield note(what, "cgroup: " + (Path("/sys/fs/cgroup") / file).read_text().strip())
        except OSError:
            unread.append(f"{what} (cgroup)")
    if unread:
        yield note("not readable here", ", ".join(unread))


PROBES = dict(matmul=probe_matmul, memory=probe_memory, transfer=probe_transfer, peers=probe_peers, collectives=probe_collectives,
              storage=probe_storage, loader=probe_loader, health=probe_health)


def preset_config(cfg):
    """The preset's model.Config."""
    import model
    return model.Config(**model.PRESETS[cfg.preset])


def main(cfg):
    """Run the probes; prints the table row by row and returns the rows."""
    import model
    rt = setup(cfg)
    cfg = dataclasses.replace(cfg, preset=cfg.preset or ("smollm3-3b" if rt.device.type == "cuda" else "small"))
    if cfg.preset not in model.PRESETS:
        raise SystemExit(f"--preset={cfg.preset}: {', '.join(model.PRESETS)} expected")
    wanted = [w for w in cfg.only.split(",") if w] or list(PROBES)
    if set(wanted) - set(PROBES):
        raise SystemExit(f"--only={cfg.only}: {', '.join(PROBES)} expected")
    rows, rt.group = [], None
    if rt.world_size > 1:  # connected now: who waits for a rank that has died since is told, not kept
        rt.group = dist.new_group(timeout=timedelta(seconds=60))
        dist.barrier(rt.group)
    print(f"{rt.name} | {rt.world_size} process{'es' * (rt.world_size > 1)} | torch {torch.__version__} | {time.strftime('%Y-%m-%d')}")
    with Stop() as stop:  # torchrun ends the ranks that are left when one dies; the table is still printed
        for name, probe in PROBES.items():
            if name not in wanted or rt.rank and name in ("storage", "loader", "health"):
                continue
            try:
                for r in probe(cfg, rt, rows):
                    rows.append(dict(probe=name) | r)
                    show_row(rows[-1])
            except Exception as e:  # a rank that died, memory that is not there: a row, and on with the rest
                text = str(e).strip().splitlines() or [""]
                lost = "a rank has died or hangs: its own output says why; " * (name == "collectives")
                rows.append(dict(probe=name) | note(name, f"{lost}{type(e).__name__}: {text[0][:150]}", "FAIL"))
                show_row(rows[-1])
    if cfg.json and rt.rank == 0:
        write_json(cfg.json, dict(machine=rt.name, date=time.strftime("%Y-%m-%d"), torch=torch.__version__, rows=[finite(r) for r in rows]))
    bad = [r["what"].strip() for r in rows if r["verdict"] == "FAIL"]
    print(f"{len(rows)} rows, {len(bad)} FAIL" + ": " * bool(bad) + ", ".join(bad))
    if cfg.strict and bad:
        raise SystemExit(1)
    return dict(machine=rt.name, rows=rows)


if __name__ == "__main__":
    import model
    launch(main, cli(Config, {name: dict(preset=name) for name in model.PRESETS}))
