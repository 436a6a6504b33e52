"""The machine. Top half: the runtime that every script shares. (Probes and the capacity planner will be the bottom half.)

    cli(Config, presets)    one dataclass -> `python X.py [preset] --key=value`, --help, --config=FILE.toml|json
    setup(cfg)              device, dtype, threads, process groups, seed
    Log                     one line and one JSON row per logged step
    atomic, lock, Stop      what a run needs to survive: files whole or absent, one writer, signals that finish the step

Importing this file measures nothing and starts nothing.
"""
import contextlib, ctypes, dataclasses, difflib, inspect, json, math, os, platform, re, signal, sys, threading, time, tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

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


# Dense bf16 FLOP/s from the vendors' data sheets (sparse figures are twice these and never reached). First match wins.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "RTX 4090": 165.2e12, "MI300X": 1307e12}


def peak_flops(name):
    """Published dense bf16 FLOP/s of the GPU called `name`, or None: never another device's figure."""
    if re.search(r"Laptop|MIG|4090 D", name):  # smaller than what their name contains
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


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


if __name__ == "__main__":
    print("infra.py holds the runtime that the other scripts import; its probes are still to come. Try: python train.py")
