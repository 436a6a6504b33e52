"""The machine. Top half: the runtime that every script shares. Bottom half: is it what you paid for, and what would a run take?

    python infra.py                          probes, one table: matmuls, memory, transfers, disk, loader, health
    python infra.py --only=storage --path=/scratch --json=FILE --strict
    torchrun --nproc_per_node=2 infra.py     collectives and stragglers too
    python infra.py plan                     the default model on this machine: tokens/s and peak memory
    python infra.py plan smollm3-3b --tokens=11.2e12 --gpus=384 --gpu=h100       days, memory, layout, traffic, cost
    python infra.py plan smollm3-3b --tokens=11.2e12 --why                       should it be trained at all?
    python infra.py plot out/base out/other --y=val_bpb.text --png=FILE          curves of runs; in the terminal without --png

    cli(Config, presets)    one dataclass -> `python X.py [preset] --key=value`, --help, --config=FILE.toml|json
    setup(cfg)              device, dtype, threads, process groups, seed
    Log                     one line and one JSON row per logged step
    atomic, lock, Stop      what a run needs to survive: files whole or absent, one writer, signals that finish the step

Importing this file measures nothing and starts nothing.
"""
import contextlib, ctypes, dataclasses, datetime, difflib, errno, fnmatch, inspect, itertools, json, math, mmap, os, platform, random
import re, shutil, signal, statistics, subprocess, sys, threading, time, tomllib, tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# --- command line ----------------------------------------------------------------------------------------------------

def convert(value, kind):
    """A flag's text, or a TOML/JSON value, as the field's type: '1e6' is a fine int, '1' a fine float, nan neither.
    Raises ValueError with what was expected."""
    want = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is str:
            return value
        if kind is int:
            with contextlib.suppress(ValueError):
                return int(str(value))  # exactly, however large: a seed may be
        number = float(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
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
    except (OSError, ValueError) as e:
        raise ValueError(f"--config={path}: {one_line(e)}: TOML (or the config.json of a run) expected") from None


def _comments(Config):
    """field -> its trailing comment, which is its help text (inherited fields included)."""
    notes = {}
    for cls in reversed(Config.__mro__[:-1]):
        notes |= dict(re.findall(r"^ +(\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
    return notes


@contextlib.contextmanager
def quiet_pipe():
    """`| head` has seen enough: one line instead of a stack trace."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer cannot be written either
        raise SystemExit("nobody reads the output any more") from None


def _help(Config, presets, program):
    words = " [PRESET]" * bool(presets) + " [DIR]" * ("init" in Config.__dataclass_fields__) + " DIR ..." * (Config is Plot)
    print(f"usage: python {program}{words} [--key=value ...] [--config=FILE.toml]\n")
    if presets:
        print("presets (defaults that flags override):", ", ".join(presets), "\n")
    notes = _comments(Config)
    for f in dataclasses.fields(Config):
        print(f"  --{f.name}={f.default!r}".replace("''", ""), notes.get(f.name, ""), sep="\n        ")


def cli(Config, presets={}, argv=None):
    """Command line -> Config. Order of precedence: field default < preset < --config file < flag.

    Config: a dataclass of int, float, bool and str fields with defaults; a field's trailing comment is its help.
    presets: {name: {field: value}}, chosen by a bare word anywhere, or by `preset` as a flag or in the file; a bare
    word that is a path means --init. Unknown keys and unreadable values end the program with one line and status 2.
    """
    argv, program = list(sys.argv[1:] if argv is None else argv), Path(sys.argv[0]).name
    kinds = get_type_hints(Config) | {"config": str} | ({"preset": str} if presets else {})
    flags, given = {}, {}

    def check(key, where):
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, 1)
            hint = f", did you mean {close[0]}?" if close else "; --help lists them"
            raise ValueError(f"{where}{key}: unknown key{hint}")

    try:
        while argv:
            word = argv.pop(0)
            if word in ("-h", "--help"):
                with quiet_pipe():
                    _help(Config, presets, program)
                raise SystemExit(0)
            if word.startswith("--"):
                key, eq, value = word[2:].partition("=")
                key = key.replace("-", "_")
                check(key, "--")
                if not eq and kinds[key] is bool:  # never takes the next word, so `--compile tiny` keeps its preset
                    value = "true"
                elif not eq and (not argv or argv[0].startswith("--")):
                    raise ValueError(f"--{key}: a value expected: --{key}=...")
                elif not eq:
                    value = argv.pop(0)
                flags[key] = value
            elif word in presets:
                flags["preset"] = word
            elif "init" in kinds and Path(word).exists():
                flags["init"] = word
            else:
                known = f"no such preset or checkpoint: one of {', '.join(presets)}" if presets else "--key=value"
                raise ValueError(f"{word}: {known} expected")
        path = flags.pop("config", None)
        del kinds["config"]  # a file names no other
        for where, keys in ((f"{path}: ", {} if path is None else _config_file(path)), ("--", flags)):
            for key, value in keys.items():
                check(key, where)
                try:
                    given[key] = convert(value, kinds[key])
                except ValueError as e:
                    raise ValueError(f"{where}{key}: {e}") from None
                if key == "preset" and presets and value not in presets:
                    raise ValueError(f"{where}preset={value}: one of {', '.join(presets)} expected")
        preset = presets[given.pop("preset")] if presets and "preset" in given else {}
        return Config(**preset | given)
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
    probe: str = ""                # MFU against what this machine was measured to do: FILE of `python infra.py --json=FILE`


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
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # else waiting would wait for GPU 0
        torch.empty(1, device=device)
    except Exception:  # torch raises anything from AssertionError to RuntimeError here
        raise SystemExit(f"--device={cfg.device}: not usable on this machine, by its process {_env('LOCAL_RANK', 0)}: "
                         f"auto, cpu, cuda (a GPU for each process) or mps expected") from None
    dtypes = dict(float32=torch.float32, bfloat16=torch.bfloat16)
    dtypes["auto"] = torch.bfloat16 if _native_bf16(device) else torch.float32
    if cfg.dtype not in dtypes:
        raise SystemExit(f"--dtype={cfg.dtype}: auto, float32 or bfloat16 expected")
    return device, dtypes[cfg.dtype]


def setup(cfg):
    """Prepare this process, alone or under torchrun. Reads the fields of Machine.

    Returns a namespace: device, dtype (what the matmuls run in; weights, optimizer and loss stay float32), threads, name (of
    the hardware), peak (dense FLOP/s in that dtype, or None when nobody published one), peak_source; rank, world_size, local_rank,
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
        asked = os.environ.get("OMP_NUM_THREADS")
        if asked is None or asked == "1" and local_size > 1:  # torchrun sets 1 unasked
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
    published = peak_flops(name) if cuda and dtype == torch.bfloat16 else None
    return SimpleNamespace(device=device, dtype=dtype, threads=threads, name=name,
                           peak=measured_peak(cfg.probe, name, dtype) if cfg.probe else published,
                           peak_source="matmul measured here" if cfg.probe else "published dense bf16 peak; null: there is none",
                           rank=rank, world_size=world, local_rank=_env("LOCAL_RANK", 0),
                           restarts=_env("TORCHELASTIC_RESTART_COUNT", 0),
                           dp_rank=rank // cfg.tp, dp_size=world // cfg.tp, dp_group=dp_group,
                           tp_rank=rank % cfg.tp, tp_size=cfg.tp, tp_group=tp_group)


TP_SEED_STRIDE = 1_000_003  # not 1: rank 1 of --seed=0 would draw what rank 0 of --seed=1 draws


def _groups(device, world, tp):
    """-> (data-parallel group, tensor-parallel group) of this process; None instead of a group of one."""
    dp_group = tp_group = None
    if world > 1:
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


def gather(rt, value, group=None):
    """What each rank has, on all of them: a list by rank."""
    everyone = [value] * rt.world_size
    if rt.world_size > 1:
        dist.all_gather_object(everyone, value, group=group)
    return everyone


def all_gather(rt, tensor):
    """gather for CPU tensors of one shape: their bytes alone travel, unpickled."""
    everyone = [tensor.clone() for _ in range(rt.world_size)]
    if rt.world_size > 1:
        dist.all_gather(everyone, tensor)
    return everyone


def on_rank_0(rt, function, *args):
    """function(*args), called by rank 0 alone; its result on every rank."""
    return gather(rt, function(*args) if rt.rank == 0 else None)[0]


def jobs(rt):
    """The parents of all ranks (torchrun's agents): the same after a restart, others when the command is typed again."""
    parent, began = os.getppid(), ""
    with contextlib.suppress(OSError, IndexError):  # numbers of processes come again, with another time
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return sorted(set(gather(rt, f"{platform.node()} {parent} {began}")))


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


def one_line(error):
    """An error's message without line breaks, at most 200 characters; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def launch(main, cfg):
    """main(cfg), for scripts. Under torchrun the rank that failed first speaks, and torchrun's closing summary quotes it: the
    others wait a moment, and are ended before they can add that somebody left them."""
    try:
        with quiet_pipe():
            main(cfg)
    except BaseException as e:
        if isinstance(e, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(e):
            e = SystemExit(f"out of memory ({one_line(e)}): less is taken by --micro_batch=1, shorter rows (--max_position_embeddings, "
                           f"--max_length, --max_new_tokens), --tp=2 under torchrun, in sft.py --lora_rank=16; "
                           f"`python infra.py plan SHAPE --gpu=NAME --gpus=1` tells what a shape needs")
        if isinstance(e, KeyboardInterrupt):
            e = SystemExit(130)
        if isinstance(e, ValueError) and str(e).startswith("--"):  # of a flag that only the model could judge
            e = SystemExit(str(e))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler
            if os.environ["RANK"] != "0" or not isinstance(e, SystemExit):  # what all find wrong, rank 0 says
                time.sleep(3)
            get_error_handler().record_exception(e)
        raise e
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
    """Seconds from one mark to another."""
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
    with contextlib.suppress(OSError, TypeError):  # no such file, no such line
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


Sheet = namedtuple("Sheet", "bf16 fp16 fp8 fp32 gb gbs peer")
# Vendors' data sheets: dense TFLOP/s (the "sparse" figures are twice these and never reached), fp32 without tensor cores (TF32
# is half of bf16); GB of memory, its GB/s; GB/s to another GPU, one direction. First match wins.
SHEETS = {name: Sheet(*figures) for name, *figures in (
    ("B200", 2250, 2250, 4500, 75, 180, 8000, 900),
    ("H200 NVL", 835, 835, 1671, 60, 141, 4800, 450),
    ("H200", 989, 989, 1979, 67, 141, 4800, 450),
    ("H100 PCIe", 756, 756, 1513, 51, 80, 2000, 63),
    ("H100 NVL", 835, 835, 1671, 60, 94, 3938, 300),
    ("H100", 989, 989, 1979, 67, 80, 3350, 450),
    ("A100-SXM4-40GB", 312, 312, None, 19.5, 40, 1555, 300),
    ("A100-PCIE-40GB", 312, 312, None, 19.5, 40, 1555, 31.5),
    ("A100 80GB PCIe", 312, 312, None, 19.5, 80, 1935, 31.5),
    ("A100", 312, 312, None, 19.5, 80, 2039, 300),
    ("L40S", 362, 362, 733, 91.6, 48, 864, 31.5),
    ("RTX 4090", 165.2, 165.2, 330, 82.6, 24, 1008, 31.5),
    ("T4", None, 65, None, 8.1, 16, 320, 15.75),
    ("MI300X", 1307, 1307, 2615, 163.4, 192, 5300, 64))}


def data_sheet(name):
    """What the vendor promises of the GPU called `name`, or None: never another device's figures."""
    if re.search(r"Laptop|MIG|4090 D|GRID|-\d+[ABCQ]\b", name):  # parts and variants of what their name contains
        return None
    sheet = next((sheet for key, sheet in SHEETS.items() if re.search(rf"\b{key}\b", name, re.I)), None)
    memory = re.search(r"\b(\d+) ?GB", name, re.I)
    return None if sheet and memory and int(memory[1]) != sheet.gb else sheet


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
        os.fsync(fd)
        os.close(fd)


def write_json(path, obj):
    """Plain types -> a JSON file, atomically."""
    with atomic(path) as f:
        f.write(json.dumps(obj, indent=1).encode())


def lock(directory):
    """Keep other processes from writing to `directory` (created if missing) while the returned file is open. The kernel
    frees it however this process ends. Then removes what a killed process left half-written."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")
    except OSError as e:
        raise SystemExit(f"--out={directory}: {e.strerror}: a directory to write to expected") from None
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
        if re.fullmatch(r".+\.\d+\.tmp", leftover.name):  # atomic's
            leftover.unlink()
    return file


HANGUP = getattr(signal, "SIGHUP", None)  # the terminal has been closed; Windows has no such signal


class Stop:
    """`with Stop() as stop:` SIGINT, SIGTERM and SIGHUP only set stop.signal, so that the step is finished and saved.

    A second SIGINT or SIGTERM interrupts at once. Outside the main thread signals cannot be caught, and nothing is changed.
    """
    def __enter__(self):
        self.signal, self.old, caught = None, {}, [signal.SIGINT, signal.SIGTERM]
        if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup has it ignored
            caught.append(HANGUP)
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.catch) for s in caught}
        return self

    def catch(self, number, frame):
        if self.signal is not None and number != HANGUP:  # a terminal that closes may say so twice
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def read_log(out):
    """The rows of out/metrics.jsonl, as far as there are any; the last one may have been cut off by a crash."""
    path, rows = Path(out) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def finite(value):
    """JSON has no NaN and no infinity: null instead, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """Terminal and out/metrics.jsonl. A live bar only on a terminal; each printed line carries progress and ETA itself."""

    def __init__(self, out, total, start=0, wandb=False, config=None, quiet=False):
        """out: run directory; total: last step; start: steps already done (later rows of an older run are cut off).
        quiet: write nothing (every rank but the first)."""
        self.path, self.total, self.start, self.clock = Path(out) / "metrics.jsonl", total, start, time.perf_counter()
        self.wandb, disable = None, True if quiet else None  # None: tqdm draws on a terminal only
        self.bar = tqdm(total=total, initial=start, disable=disable, leave=False, unit="step", dynamic_ncols=True)
        if quiet:
            self.file = open(os.devnull, "w")
            return
        if wandb:  # first: if it fails, nothing has been touched
            try:
                import wandb as module
            except ImportError:
                raise SystemExit("--wandb: the package wandb is not installed: pip install wandb") from None
            self.wandb = module.init(project="nanosmol", name=Path(out).name, config=config)
        older = [row for row in read_log(out) if isinstance(row.get("step"), int) and not row.get("final")] if start else []
        with atomic(self.path) as f:
            f.write("".join(json.dumps(row) + "\n" for row in older if row["step"] <= start).encode())
        self.file = open(self.path, "a", encoding="utf-8")

    def say(self, text):
        """A line for the reader, above the bar. A reader who has left, or a full disk under his file, does not end the run."""
        with contextlib.suppress(OSError):
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

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
            left = int((time.perf_counter() - self.clock) / max(1, step - self.start) * (self.total - step))
            self.say(f"{done} | {line} | eta {left // 60}:{left % 60:02d}")

    def close(self):
        self.bar.close()
        with contextlib.suppress(OSError):  # of rows that a full disk has not taken
            self.file.close()
        if self.wandb:
            self.wandb.finish()


# --- probes: is the machine what you paid for? -----------------------------------------------------------------------
# A probe is a generator of rows. What one part of the machine can do is the best of several tries, as in STREAM and in
# mamf-finder, for whatever disturbs a try makes it slower; what ranks do together is as slow as the slowest of them.

@dataclasses.dataclass
class Config(Machine):
    """The flags of the probes."""
    preset: str = ""     # whose shapes and needs; default: small, on a GPU smollm3-3b (a bare word does it too)
    only: str = ""       # health,matmul,memory,transfer,peers,collectives,storage,loader; default: all
    path: str = "."      # directory whose disk is measured: where data and checkpoints will lie
    json: str = ""       # write the rows to this file, which the other scripts take as --probe
    strict: bool = False  # exit with status 1 if anything FAILs


# The playbook's measurements on 8 x H100 (its chapter on infrastructure), corrected: it sets fp8 beside 3960, a figure for
# sparse matrices where dense ones reach 1979; and its row "fp32" ran in TF32, whose dense peak is 495, not 67.
PLAYBOOK_H100 = {"matmul bf16": "714-758", "matmul fp16": "687-732", "matmul fp8": "1210-1457", "matmul tf32": "356-396",
                 "copy, memory": "3040", "host to device, pinned": "14.2 over PCIe 4 x8", "GPU 0 to GPU 1": "364.9",
                 "all_reduce, 1024 MiB": "480", "all_to_all, 1024 MiB": "344"}


def row(what, value, unit="", convention="", reference=None, source="", good=0.7, poor=0.5, advice="", fine=None, bad="WARN",
        **more):
    """One line of the table. reference: what the value is set beside, in the same unit, and the source of that; None: nobody
    published a figure, and nothing is judged. PASS from good * reference on, FAIL below poor * reference. Or without one: PASS
    if it is `fine`, else `bad`."""
    share = value / reference if value is not None and reference else None
    verdict = "n/a" if share is None else "PASS" if share >= good else "WARN" if share >= poor else "FAIL"
    verdict = verdict if fine is None else "PASS" if fine else bad
    return dict(what=what, value=value, unit=unit, convention=convention, reference=reference, source=source,
                percent=None if share is None else round(100 * share, 1), verdict=verdict,
                advice=advice if verdict in ("WARN", "FAIL") else "") | more


def note(what, text, verdict="n/a"):
    """A line without a figure."""
    return row(what, None) | dict(verdict=verdict, advice=text)


def show_row(r):
    """Print a row: figure, verdict, and then advice, reference, source and convention, as far as there are any."""
    number = "" if r["value"] is None else f"{r['value']:,.0f}" if r["value"] >= 100 else f"{r['value']:.3g}"
    share = r["percent"]
    percent = "" if share is None else f"{share:.0f} %" if share < 1000 else f"x {share / 100:,.0f}"
    text = "; ".join(filter(None, (r["advice"], r["reference"] and f"of {r['reference']:,.4g}, {r['source']}",
                                   r["playbook"] and f"{r['playbook']} in the playbook", r["convention"])))
    print(f"{r['what']:36} {number:>10} {r['unit']:8} {percent:>6}  {r['verdict']:4}  {text}", flush=True)


def seconds_of(rt, call, least=0.02):
    """Seconds of one call(): the best of a second's samples, three at least, each of as many calls as fill `least` seconds."""
    wait = getattr(torch, rt.device.type).synchronize if rt.device.type in ("cuda", "mps") else lambda: None

    def sample(calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls
    sample(1)  # the first call compiles and allocates
    calls = max(1, math.ceil(least / max(1e-9, sample(1))))
    times, end = [], time.perf_counter() + 1
    while len(times) < 3 or time.perf_counter() < end:
        times.append(sample(calls))
        time.sleep(0.01)  # threads that wait for work spin; asleep, they may be placed anew
    return min(times)


def tflops(rt, m, k, n, kind):
    """TFLOP/s of (m, k) @ (k, n) in fp32, tf32, bf16, fp16 or fp8; of random numbers, for zeros draw less power."""
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp8=torch.float8_e4m3fn)
    a, b = (torch.randn(shape, device=rt.device).to(dtypes.get(kind, torch.float32)) for shape in ((m, k), (n, k)))
    one, precision = torch.ones((), device=rt.device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    call = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16) if kind == "fp8" else torch.mm(a, b.T)
    try:
        return 2e-12 * m * k * n / seconds_of(rt, call, least=0.2 if a.is_cuda else 0.02)  # a GPU must get warm to throttle
    finally:
        torch.set_float32_matmul_precision(precision)


def probe_matmul(cfg, rt, rows):
    """Every dtype that the device multiplies, at a large square and at the preset's own shapes."""
    cuda, sheet, c, found = rt.device.type == "cuda", data_sheet(rt.name), shape_of(cfg), {}
    nvidia = cuda and torch.version.hip is None
    capability = torch.cuda.get_device_capability(rt.device) if nvidia else (99, 0)  # AMD: other numbers, try all
    kinds = dict(fp32=True, tf32=nvidia and capability >= (8, 0), bf16=not cuda or _native_bf16(rt.device), fp16=cuda,
                 fp8=cuda and capability >= (8, 9))
    size = 8192 if cuda else 2048
    for kind in filter(kinds.get, kinds):
        try:
            found[kind] = tflops(rt, size, size, size, kind)
        except (RuntimeError, ValueError) as e:  # fp8 where this build of torch has no kernel for it
            yield note(f"matmul {kind}", one_line(e))
            continue
        more = dict(convention=f"{size}³", dtype=kind, square=True)
        if not cuda and kind == "bf16":
            more |= dict(reference=found["fp32"], source="fp32 here", good=1.2, poor=0.8,
                         advice="bf16 is emulated or hardly faster here: --dtype=float32")
        elif sheet:
            more |= dict(reference=sheet.bf16 and sheet.bf16 / 2 if kind == "tf32" else getattr(sheet, kind),
                         source="dense, data sheet", good=0.6, poor=0.45, advice="clocks and power cap (see health), another "
                         "process on this GPU, or kernels made for another architecture")
        yield row(f"matmul {kind}", found[kind], "TFLOP/s", **more)
    main = "bf16" if rt.dtype == torch.bfloat16 else "tf32" if "tf32" in found else "fp32"
    if rt.device.type == "cpu" and rt.threads > 1:
        torch.set_num_threads(1)
        alone = tflops(rt, size, size, size, main)
        torch.set_num_threads(rt.threads)
        yield row(f"matmul {main}, 1 thread", alone, "TFLOP/s", f"{size}³")
        yield row(f"matmul {main}, {rt.threads} threads against 1", found[main] / alone, "times", "", rt.threads, "threads",
                  0.8, 0.6, "hyperthreads share a multiplier, or others use the cores: try OMP_NUM_THREADS at half")
    tokens, d, heads = 8192 if cuda else 2048, c.hidden_size, c.head_size
    for name, k, n in (("q, o", d, c.num_attention_heads * heads), ("k, v", d, c.num_key_value_heads * heads),
                       ("gate, up", d, c.intermediate_size), ("down", c.intermediate_size, d), ("head", d, c.vocab_size)):
        yield row(f"  {cfg.preset}: {name}", tflops(rt, tokens, k, n, main), "TFLOP/s", f"{tokens} x {k} x {n}, {main}",
                  found.get(main), "the square", 0.5, 0, "this shape wastes the machine: more tokens, wider, multiples of 64")


def free_memory():
    """Bytes that can still be used, as far as Linux and its cgroup tell; else 8 GiB."""
    free = 2**33
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
        free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def last_level_cache():
    """Bytes of all of them together; 32 MiB where Linux does not tell."""
    sizes = {}  # of each level, and of each group of cores that shares one
    for p in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError, LookupError):
            size, level, cores = ((p / name).read_text().strip() for name in ("size", "level", "shared_cpu_list"))
            sizes.setdefault(int(level), {})[cores] = int(size[:-1]) * dict(K=2**10, M=2**20, G=2**30)[size[-1]]
    return sum(sizes[max(sizes)].values()) if sizes else 2**25


def probe_memory(cfg, rt, rows):
    """Copies within the device's memory, large and small."""
    cuda, sheet = rt.device.type == "cuda", data_sheet(rt.name)
    cache = torch.cuda.get_device_properties(rt.device).L2_cache_size if cuda else last_level_cache()
    free = torch.cuda.mem_get_info(rt.device)[0] if cuda else free_memory() // _env("LOCAL_WORLD_SIZE", 1)
    large = min(2**30 if cuda else max(2**28, 4 * cache), free // 4)
    for what, size in (("memory", large), ("cache-sized", cache // 4), ("sub-megabyte", 2**18)):
        both = torch.ones(size // 2 + 32, device=rt.device)  # 128 bytes between them: at equal low bits of their addresses
        a, b = both[: size // 4], both[-(size // 4):]        # a CPU takes the store for a later load's, and waits
        main, speed = what == "memory", 2e-9 * size / seconds_of(rt, lambda: b.copy_(a))
        how = f"{size / 2**20:,.4g} MiB, read + written" + ", may be cache" * (main and size < 4 * cache)
        yield row(f"copy, {what}", speed, "GB/s", how, sheet.gbs if main and sheet else None, "data sheet", 0.8, 0.6,
                  "another process on this GPU, or throttling: see health", main=main)


def smi(rt, field):
    """One field of nvidia-smi for this process's GPU, or None. It counts GPUs in another order than CUDA: the UUID tells."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
        gpu = f"GPU-{torch.cuda.get_device_properties(rt.device).uuid}"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={gpu}"],
                              capture_output=True, text=True, timeout=10)
        value = done.stdout.strip()
        return value if done.returncode == 0 and value and not re.search(r"N/A|Not Supported|\n", value) else None


def probe_transfer(cfg, rt, rows):
    """Between host and GPU: bandwidth, latency, and what the launch of a kernel costs."""
    if rt.device.type != "cuda":
        yield note("host to device", "no CUDA device here: nothing to transfer")
        return
    size, link, source = 2**28, None, ""
    there, paged = (torch.ones(size, dtype=torch.uint8, device=device) for device in (rt.device, "cpu"))
    pinned = paged.pin_memory()
    there.copy_(pinned)  # the link sleeps in a lower generation
    generation, lanes = smi(rt, "pcie.link.gen.current"), smi(rt, "pcie.link.width.current")
    if generation and lanes:
        lane = {"1": 0.25, "2": 0.5, "3": 0.985, "4": 1.969, "5": 3.938, "6": 7.563}.get(generation, 0)
        link, source = lane * int(lanes), f"PCIe {generation} x{lanes} as negotiated"
        yield row("PCIe lanes", int(lanes), "", "", 16, "a full slot", 1, 0.5, "a narrower slot, or a hop on the way")
    for what, to, come in (("host to device, pinned", there, pinned), ("device to host, pinned", pinned, there),
                           ("host to device, pageable", there, paged), ("device to host, pageable", paged, there)):
        speed, fast = size / 1e9 / seconds_of(rt, lambda: to.copy_(come, non_blocking=True)), "pinned" in what
        yield row(what, speed, "GB/s", "one direction", link if fast else None, source, 0.75, 0.5,
                  "an x8 or older hop, or memory of another NUMA node")

    def round_trip():
        there[:4].copy_(pinned[:4], non_blocking=True)
        torch.cuda.synchronize()
    yield row("4 bytes to the device", 1e6 * seconds_of(rt, round_trip), "µs", "and a wait for them")
    yield row("launch of a kernel", 1e6 * seconds_of(rt, lambda: there[:4].add_(1)), "µs", "from Python, queued")


def probe_peers(cfg, rt, rows):
    """From each GPU that this process sees to the next."""
    n, sheet = torch.cuda.device_count() if rt.device.type == "cuda" and rt.world_size == 1 else 0, data_sheet(rt.name)
    if n < 2:
        yield note("GPU to GPU", "fewer than two GPUs in this process")
        return
    for i, j in ((i, (i + 1) % n) for i in range(n)):
        a, b = (torch.empty(2**28, dtype=torch.uint8, device=f"cuda:{gpu}") for gpu in (i, j))

        def copy():
            b.copy_(a, non_blocking=True)
            torch.cuda.synchronize(i), torch.cuda.synchronize(j)
        way = "peer access" if torch.cuda.can_device_access_peer(i, j) else "through the host"
        yield row(f"GPU {i} to GPU {j}", 2**28 / 1e9 / seconds_of(rt, copy), "GB/s", f"one direction, {way}",
                  sheet and sheet.peer, "data sheet", 0.7, 0.2, "slower than its link: nvidia-smi topo -m")


# Bytes over a rank's link for each byte of the whole buffer (nccl-tests, doc/PERFORMANCE.md): "bus bandwidth" is what compares
# collectives and numbers of ranks with one and the same link.
BUS_FACTOR = dict(all_reduce=lambda n: 2 * (n - 1) / n, all_gather=lambda n: (n - 1) / n, reduce_scatter=lambda n: (n - 1) / n,
                  all_to_all=lambda n: (n - 1) / n, broadcast=lambda n: 1, send_recv=lambda n: 1)


def collective_calls(rt, size):
    """-> ({name: call, which starts it and returns what to wait for}, bytes of the buffer, a multiple of ranks)."""
    n, group = rt.world_size, rt.group
    whole, part = torch.ones(size // 4 // n * n, device=rt.device), torch.ones(size // 4 // n, device=rt.device)
    other = torch.empty_like(whole)
    collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # their names before torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def send_recv():  # round the ring
        ops = [dist.P2POp(dist.isend, whole, (rt.rank + 1) % n, group), dist.P2POp(dist.irecv, other, (rt.rank - 1) % n, group)]
        return dist.batch_isend_irecv(ops)
    how = dict(group=group, async_op=True)
    return dict(all_reduce=lambda: [dist.all_reduce(whole, **how)], all_gather=lambda: [collect(whole, part, **how)],
                reduce_scatter=lambda: [scatter(part, whole, **how)],
                all_to_all=lambda: [dist.all_to_all_single(other, whole, **how)],
                broadcast=lambda: [dist.broadcast(whole, 0, **how)], send_recv=send_recv), 4 * whole.numel()


def finish(works, cuda, seconds=20):
    """Wait for what was started. NCCL's own wait sleeps a millisecond at a time, so it is asked only when the time is over,
    to say why."""
    for work in works:
        end = time.perf_counter() + seconds
        while cuda and not work.is_completed() and time.perf_counter() < end:
            pass
        work.wait()


def probe_collectives(cfg, rt, rows):
    """What training's ranks do together, small and large; then what each of them can do alone, beside the others."""
    n, cuda, sheet = rt.world_size, rt.device.type == "cuda", data_sheet(rt.name)
    if n == 1:
        yield note("collectives", "one process: torchrun --nproc_per_node=N infra.py measures them")
        return
    for size in (2**10, 2**20, 2**30 if cuda else 2**26):
        calls, buffer = collective_calls(rt, size)
        label, large = f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB", size > 2**20
        for name, call in calls.items():
            times, each = [], 1 if large else 20  # a barrier lets ranks go tens of microseconds apart
            for _ in range(8):
                dist.barrier(rt.group)
                start = time.perf_counter()
                for _ in range(each):
                    finish(call(), cuda)
                times.append((time.perf_counter() - start) / each)
            slowest = torch.tensor([statistics.median(times[2:])], device=rt.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=rt.group)
            seconds, how = float(slowest), f"median of the slowest of {n} ranks"
            if size == 2**10:
                yield row(f"{name}, {label}", 1e6 * seconds, "µs", how)
                continue
            speed = buffer / seconds / 1e9
            judged = large and sheet and n == _env("LOCAL_WORLD_SIZE", n) and name != "all_reduce"  # switches add: above the link
            judged = judged and torch.version.hip is None  # whose GPUs have a link to every other one
            yield row(f"{name}, {label}", speed * BUS_FACTOR[name](n), "GB/s", f"bus bandwidth, {how}; {speed:.3g} by the buffer",
                      sheet.peer if judged else None, "to a peer, data sheet", 0.7, 0.2,
                      "slower than the link: NCCL_DEBUG=INFO, look for P2P; unset NCCL_P2P_DISABLE")
    for what in ("matmul", "memory"):
        mine = [r["value"] for r in rows if r["probe"] == what and (r.get("main") or r.get("dtype") in ("fp32", "bf16"))]
        values = gather(rt, mine[-1] if mine else 0.0, rt.group)
        measured = [value for value in values if value]
        for rank, value in enumerate(values if measured else ()):
            if not value:
                yield note(f"rank {rank}: {what}", "measured nothing: its own output says why", "FAIL")
                continue
            yield row(f"rank {rank}: {what}", value, "TFLOP/s" if what == "matmul" else "GB/s", "all ranks at once",
                      statistics.median(measured), "median of the ranks", 0.95, 0.9, "a straggler: all others wait for it")


def file_system(folder):
    """Type of the file system that holds `folder`: ext4, tmpfs, nfs4, ...; "" where Linux does not tell."""
    kinds, folder = {}, Path(folder).resolve()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            kinds[Path(mount.replace("\\040", " "))] = kind  # of two in one place the later one is seen
    return next((kinds[place] for place in (folder, *folder.parents) if place in kinds), "")


def in_page_cache(path):
    """Share of a file's pages that are in memory, by mincore; 1 where it cannot tell (some network disks)."""
    with contextlib.suppress(OSError), open(path, "r+b") as f, mmap.mmap(f.fileno(), 0) as view:
        pages, first = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))(), ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), pages)
        del first  # else the map could not be closed
        return 1.0 if failed else sum(p & 1 for p in pages) / len(pages)
    return 1.0


def evict(path):
    """Have the kernel forget a file's pages. Only what is on disk can go, so it is written first."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):  # not on macOS: mincore will tell that the file has stayed
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@contextlib.contextmanager
def scratch_file(folder, least):
    """A name for a file of at least so many bytes in `folder`; the file is gone afterwards."""
    path = Path(folder) / f".probe.{os.getpid()}.tmp"
    if (free := shutil.disk_usage(folder).free) < least:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.0f} MB free, {least / 1e6:,.0f} at least expected")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def timed_reads(path, flags, size, block, threads, ordered, seconds=0.3):
    """Threads read blocks, in order or at random places, for so long or to the end -> (bytes/s, sorted seconds of each)."""
    evict(path)
    fd, count = os.open(path, os.O_RDONLY | flags), size // block
    begin = time.perf_counter()

    def read(t):
        buffer = mmap.mmap(-1, block)  # aligned, as O_DIRECT wants it
        luck, at, taken = random.Random(t), t, []
        while (start := time.perf_counter()) < begin + seconds and at < count:
            os.preadv(fd, [buffer], (at if ordered else luck.randrange(count)) * block)
            taken.append(time.perf_counter() - start)
            at += threads * ordered
        return taken
    try:
        with ThreadPoolExecutor(threads) as pool:
            taken = list(itertools.chain(*pool.map(read, range(threads))))
        return len(taken) * block / (time.perf_counter() - begin), sorted(taken)
    finally:
        os.close(fd)


def probe_storage(cfg, rt, rows):
    """The disk under --path: what reaches it and what comes from it, not what the page cache does."""
    kind, chunk, written, times = file_system(cfg.path) or "unknown file system", 2**26, 0, []
    with scratch_file(cfg.path, 4 * chunk) as path:
        size = min(2**30, shutil.disk_usage(cfg.path).free // 2)
        noise = memoryview(random.Random(0).randbytes(chunk + 2**16))  # incompressible, and no two chunks are alike
        begin = time.perf_counter()
        with open(path, "wb", buffering=0) as f:
            while written + chunk <= size and time.perf_counter() < begin + 5:
                start = time.perf_counter()
                written += f.write(noise[written // chunk * 1031:][:chunk])
                os.fsync(f.fileno())
                times.append(time.perf_counter() - start)
        evict(path)
        cached, flags = in_page_cache(path), getattr(os, "O_DIRECT", 0)
        try:
            os.close(os.open(path, os.O_RDONLY | flags))
        except OSError:  # a file system that has no direct reads
            flags = 0
        kinds, reads = ((2**20, 1), (2**20, 16), (2**14, 1), (2**14, 4), (2**14, 16)), {}
        for block, threads in 6 * kinds:  # in turn, for disks and hosts have bad moments; the best counts
            speed = timed_reads(path, flags, written, block, threads, block == 2**20)
            reads[block, threads] = max(reads.get((block, threads), speed), speed)
        cached = max(cached, in_page_cache(path) if flags else cached)
    doubt = (f"{kind} lives in memory: not a disk's figure" if kind in ("tmpfs", "ramfs") else
             "the page cache kept the file, or cannot be looked into: not the disk's figure" if cached > 0.05 else "")
    how = f"{kind}, O_DIRECT" if flags else f"{kind}, evicted first, then buffered"
    how += " and an empty page cache (mincore)" * bool(flags and cached < 0.05)
    how += ", a server's cache unseen" * bool(re.match("nfs|fuse|lustre|cifs|ceph|9p|virtiofs", kind))
    write, best = chunk / statistics.median(times), reads[2**14, 16][0]
    yield row("write", write / 1e9, "GB/s", f"{kind}, fsync every 64 MiB, median") | dict(advice=doubt)
    for (block, threads), (speed, taken) in reads.items():
        p50, p99 = (1e6 * taken[int(q * (len(taken) - 1))] for q in (0.5, 0.99))
        what = f"{'sequential, 1 MiB' if block == 2**20 else 'random, 16 KiB'}, {threads} thread{'s' * (threads > 1)}"
        yield row(what, speed / 1e9, "GB/s", f"{speed / block:,.0f} reads/s, p50 {p50:,.0f} µs, p99 {p99:,.0f} µs; {how}") | dict(
            advice=doubt)
    if not doubt:
        yield from needs(cfg, rt, rows, write, best)


def needs(cfg, rt, rows, write, read):
    """What the preset wants of the disk, beside what it got (bytes/s)."""
    from model import flops_per_token, num_params
    c = shape_of(cfg)
    flops = max([1e12 * r["value"] for r in rows if r.get("square") and r["dtype"] in ("fp32", "bf16")], default=rt.peak)
    if flops:
        gpus, width = 8 if rt.device.type == "cuda" else 1, 2 if c.vocab_size <= 65536 else 4
        tokens = 0.3 * flops / flops_per_token(c, c.max_position_embeddings) * gpus
        how = f"{tokens:,.0f} tok/s{' on 8 GPUs' * (gpus > 1)} at 30 % of the matmuls' speed, {width} bytes each"
        yield row(f"  {cfg.preset}: loader", read / 1e6, "MB/s", how, 10 * tokens * width / 1e6, "ten times what it reads", 1, 0.1,
                  "the disk will stall the training")
    state, hours = 12 * num_params(c), 2.1  # fp32 weights and two Adam moments
    share = state / write / (3600 * hours)
    how = f"{state / 1e9:,.3g} GB; {100 * share:.2g} % of the time, at one in {hours} h"
    yield row(f"  {cfg.preset}: checkpoint", state / write, "s", how, fine=share < 0.02, bad="FAIL",
              advice="2 % at most expected: a faster disk or fewer checkpoints")


def probe_loader(cfg, rt, rows):
    """data.Loader: tokens/s from a cold and from a warm file, and what a longer run costs at its start: nothing."""
    import data
    c = shape_of(cfg)
    T, n = c.max_position_embeddings, max(1, 2**16 // c.max_position_embeddings)
    with scratch_file(cfg.path, 2**28) as path:
        path.write_bytes(np.random.default_rng(0).integers(0, 256, 2**25, dtype=np.uint16).data)
        evict(path)
        cold = in_page_cache(path) < 0.05 and file_system(cfg.path) not in ("tmpfs", "ramfs")

        def loader_of(steps):
            tokens = np.memmap(path, "<u2", "r")
            return data.Loader([data.Source("random", tokens, tokens, dict(eos=256), {})], "", T, steps * n, 0)
        times = []
        for _ in range(5 if cold else 0):
            evict(path)
            start = time.perf_counter()
            loader_of(1000).batch(0, n)
            times.append(time.perf_counter() - start)
        if cold:
            yield row("loader, cold file", n * T / min(times), "tok/s", f"the first {n} rows of {T}, one thread")
        else:
            yield note("loader, cold file", "the page cache kept the file")
        loader = loader_of(1000)
        loader.sources[0].train.max()  # reads all of it
        cpu = SimpleNamespace(device=torch.device("cpu"))
        warm = seconds_of(cpu, lambda: loader.batch(0, n))
        yield row("loader, warm file", n * T / warm, "tok/s", f"{n} rows of {T}, one thread")
        first = None
        for steps in (32_000, 3_200_000, 10**9):
            seconds = seconds_of(cpu, lambda: loader_of(steps).batch(steps * n - n, n))
            tracemalloc.start()  # not the resident set: what malloc has kept of freed memory would hide what this takes
            loader_of(steps).batch(steps * n - n, n)
            grown = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            first = first or (seconds, grown)
            yield row(f"loader's start, {steps:,} steps", 1e3 * seconds, "ms", f"{grown:.1f} MiB of memory",
                      fine=grown < first[1] + 4 and seconds < 3 * first[0] + 0.05, bad="FAIL",
                      advice="it grows with the length of the run")


def gpu_health(rt, unread):
    """What nvidia-smi tells of this GPU at work; the names of what it does not tell are added to `unread`."""
    a = torch.randn(4096, 4096, device=rt.device, dtype=rt.dtype)
    fields = {"temperature": "temperature.gpu", "clock": "clocks.sm", "highest clock": "clocks.max.sm",
              "power cap": "power.limit", "default power cap": "power.default_limit",
              "throttle reasons": "clocks_throttle_reasons.active", "row remap pending": "remapped_rows.pending",
              "uncorrected ECC errors": "ecc.errors.uncorrected.volatile.total",
              "uncorrectable row remaps": "remapped_rows.uncorrectable"}
    with ThreadPoolExecutor(1) as pool:  # asked after three seconds of work, and answered during it
        answers = pool.submit(lambda: time.sleep(3) or {name: smi(rt, field) or "" for name, field in fields.items()})
        while not answers.done():
            a @ a
            torch.cuda.synchronize()
    told = {name: text.replace("Yes", "1").replace("No", "0") for name, text in answers.result().items()}
    got = {name: float(int(text, 16) if text[:2] == "0x" else text) for name, text in told.items()
           if re.fullmatch(r"0x[\da-fA-F]+|[\d.]+", text)}
    unread += [f"GPU's {name}" for name in fields if name not in got]
    if "temperature" in got:
        yield row("GPU temperature", got["temperature"], "°C", "at work", fine=got["temperature"] < 85,
                  advice="it will throttle: airflow")
    if {"clock", "highest clock"} <= set(got):
        yield row("GPU clock", got["clock"], "MHz", "at work", got["highest clock"], "its highest", 0.75, 0.5,
                  "power or heat holds it down")
    if "throttle reasons" in got:
        names = {4: "power cap", 8: "hardware slowdown", 32: "heat", 64: "heat, by the hardware", 128: "power brake"}  # nvml.h
        active = {bit: name for bit, name in names.items() if int(got["throttle reasons"]) & bit}
        yield note("GPU throttling", ", ".join(active.values()) or "none", "FAIL" if set(active) - {4} else "PASS")
    if {"power cap", "default power cap"} <= set(got):
        yield row("GPU power cap", got["power cap"], "W", "", got["default power cap"], "the default", 0.99, 0.7,
                  "somebody lowered it: nvidia-smi -pl")
    for name in ("uncorrected ECC errors", "row remap pending", "uncorrectable row remaps"):
        if name in got:
            yield row(f"GPU {name}", got[name], fine=got[name] == 0,
                      advice="its memory is failing: reset it, replace it if they grow")


def probe_health(cfg, rt, rows):
    """What slows a machine down without a word; and what could not be read of it."""
    unread = []
    if rt.device.type == "cuda":
        yield from gpu_health(rt, unread)

    def read(what, path, pattern="(.*)"):
        with contextlib.suppress(OSError, TypeError):
            return re.search(pattern, Path(path).read_text(), re.M)[1].strip()
        unread.append(what)
    flags = (read("CPU flags", "/proc/cpuinfo", r"^(?:flags|Features)\s*:(.*)$") or "").split()
    fast = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if f in flags]
    yield note("CPU", ", ".join([cpu_name(), *fast]))
    share = _cores() / _env("LOCAL_WORLD_SIZE", 1)
    if rt.device.type == "cpu":
        yield row("threads", rt.threads, "", f"{share:g} cores are this process's", fine=rt.threads == max(1, int(share)),
                  advice="fewer leave cores idle, more wait for each other: OMP_NUM_THREADS")
    governor = read("CPU governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        yield note("CPU governor", governor, "PASS" if governor == "performance" else "WARN")
    before = read("CPU time of others", "/proc/stat", r"^cpu (.*)$")
    if before:
        time.sleep(0.3)
        after = read("CPU time of others", "/proc/stat", r"^cpu (.*)$")
        ticks = [int(b) - int(a) for a, b in zip(before.split(), after.split())][:8]
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal
        idle, total = ticks[3] + ticks[4], max(1, sum(ticks))
        stolen, busy = 100 * ticks[7] / total, 100 * (sum(ticks) - idle) / total
        yield row("CPU time stolen by the host", stolen, "%", fine=stolen < 2, advice="the machine is shared: compare in pairs")
        yield row("CPU time used by others", busy, "%", "while this process slept", fine=busy < 10 or rt.world_size > 1,
                  advice="something else runs here: the figures below will be too low")
    for what, file in (("CPU quota", "cpu.max"), ("memory limit", "memory.max")):
        limit = read(f"{what} (cgroup)", f"/sys/fs/cgroup/{file}")
        if limit:
            yield note(what, f"{limit} (cgroup)")
    if unread:
        yield note("not readable here", ", ".join(unread))


PROBES = dict(health=probe_health, matmul=probe_matmul, memory=probe_memory, transfer=probe_transfer, peers=probe_peers,
              collectives=probe_collectives, storage=probe_storage, loader=probe_loader)


def shape_of(cfg):
    """The preset's model.Config."""
    import model
    return model.Config(**model.PRESETS[cfg.preset])


def probe(cfg, rt, stop):
    """All rows that --only asks for, or until Ctrl-C. Whatever goes wrong is a row too."""
    rows, wanted = [], [w for w in cfg.only.split(",") if w] or PROBES
    if set(wanted) - set(PROBES):
        raise SystemExit(f"--only={cfg.only}: {', '.join(PROBES)} expected")

    def add(name, r):
        rows.append(dict(probe=name, playbook=PLAYBOOK_H100.get(r["what"], "") if "H100" in rt.name else "") | r)
        show_row(rows[-1])
    for name in (name for name in PROBES if name in wanted and not (rt.rank and name in ("storage", "loader"))):
        try:
            for r in PROBES[name](cfg, rt, rows):
                add(name, r)
                if stop.signal == "SIGINT":
                    return rows
            if name == "health" and rt.world_size > 1:  # rank 0 speaks for the others
                sick = [r for r in rows if r["probe"] == name and r["verdict"] in ("WARN", "FAIL")]
                everyone = gather(rt, sick, rt.group)
                for rank, theirs in enumerate(everyone[1:] if rt.rank == 0 else (), 1):
                    for r in theirs:
                        add(name, r | dict(what=f"rank {rank}: {r['what']}"))
        except Exception as e:  # a rank that has died, a full disk, no memory
            text = f"{type(e).__name__}: {one_line(e)}"
            if name in ("storage", "loader") and getattr(e, "strerror", None):
                text = f"{cfg.path}: {e.strerror}: a writable directory expected as --path"
            elif rt.world_size > 1:
                text += "; has a rank died? Its own output says why"
            add(name, note(name, text, "FAIL"))
    return rows


def main(cfg):
    """Probe the machine; prints the table row by row, returns it."""
    rt = setup(cfg)
    cfg = dataclasses.replace(cfg, preset=cfg.preset or ("smollm3-3b" if rt.device.type == "cuda" else "small"))
    rt.group, date = None, time.strftime("%Y-%m-%d")
    print(f"{rt.name} | {rt.world_size} process{'es' * (rt.world_size > 1)} | torch {torch.__version__} | {date}")
    if cfg.json and not os.access(Path(cfg.json).absolute().parent, os.W_OK):
        raise SystemExit(f"--json={cfg.json}: a file in a writable directory expected")
    with Stop() as stop:  # when a rank dies torchrun ends the others: the table is still printed
        if rt.world_size > 1:  # connected before anything is measured: who waits for a dead rank is told so
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error, not the end of the process
            rt.group = dist.new_group(timeout=datetime.timedelta(seconds=20))  # torchrun gives it thirty
            dist.barrier(rt.group)
        rows = probe(cfg, rt, stop)
    if cfg.json and rt.rank == 0:
        try:
            write_json(cfg.json, finite(dict(machine=rt.name, device=rt.device.type, date=date, torch=torch.__version__,
                                             rows=rows)))
        except OSError as e:
            raise SystemExit(f"--json={cfg.json}: {e.strerror}: a file in a writable directory expected") from None
    failed = [r["what"].strip() for r in rows if r["verdict"] == "FAIL"]
    print(f"{len(rows)} rows, {len(failed)} FAIL" + ": " * bool(failed) + ", ".join(failed))
    if stop.signal == "SIGINT":
        raise SystemExit(130)
    if cfg.strict and failed and rt.rank == 0:  # of several ranks the first is the last to end
        raise SystemExit(1)
    return dict(machine=rt.name, rows=rows)


def measured_peak(path, name, dtype):
    """FLOP/s of the large square matmul in a file that `python infra.py --json=FILE` wrote on this machine."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        rates = {r["dtype"]: r["value"] for r in saved["rows"] if r.get("square")}
        kind = "bf16" if dtype == torch.bfloat16 else "tf32" if "tf32" in rates else "fp32"
        if saved["machine"] != name:
            raise ValueError(f"measured on {saved['machine']}: {name} expected")
        return 1e12 * rates[kind]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"--probe={path}: {type(e).__name__}: {e}: a file of `python infra.py --json=FILE` on this machine "
                         f"expected, with its matmul rows") from None


# --- planner: what a run takes, before anybody pays for it -----------------------------------------------------------

def plan_options():
    """The planner's knobs: the model's shape, and its own. (Not at the top: infra imports model only where it must.)"""
    import model

    @dataclasses.dataclass
    class Plan(model.Config):
        preset: str = "nano"           # whose shape (a bare word does it too); shape flags change it
        gpu: str = ""                  # h100, h200, a100, b200, ...: by its data sheet; default: this machine, measured
        gpus: int = 8                  # how many
        tokens: float = 0              # to train on; 0: 20 per parameter (Chinchilla, arXiv 2203.15556)
        batch_tokens: int = 2_359_296  # per step (SmolLM3's)
        mfu: float = 0.3               # share of the peak that training reaches, counting 6N + 12LHDT FLOPs per token
        tok_per_s: float = 0           # of one GPU, where that is known: instead of mfu
        tflops: float = 0              # peak of one GPU that mfu is a share of; 0: dense bf16 of the data sheet
        days: float = 28               # deadline: how many GPUs meet it
        params: float = 0              # parameters to count with for that; the playbook rounds to 3e9
        tp: int = 0                    # 0: recommended
        micro_batch: int = 0           # rows per forward pass; 0: recommended
        lora_rank: int = 0             # train adapters of that width (sft.py) on the frozen model; 0: all of it
        network: float = 50            # GB/s of one GPU to other machines
        save_seconds: float = 60       # to write a checkpoint
        failure_hours: float = 50_700  # GPU-hours per failure: Llama 3 had 419 in 54 days on 16,384 (arXiv 2407.21783)
        price: float = 2.5             # of a GPU-hour, in any currency: an assumption
        why: bool = False              # should it be trained at all? The playbook's compass, with numbers

        def __post_init__(self):
            super().__post_init__()
            for f in dataclasses.fields(Plan):
                value, needed = getattr(self, f.name), f.name in ("gpus", "batch_tokens", "mfu", "days", "network", "save_seconds",
                                                                  "failure_hours")
                most = 1 if f.name == "mfu" else 1e12 if f.type is int else 1e18
                if f.type in (int, float) and (value or needed) and not 1e-15 <= value <= most:
                    least = "more than 0" if needed else "0 or more"
                    raise ValueError(f"{f.name}={value:.3g}: {least}, {most:g} at most expected")
            if self.tp and (self.gpus % self.tp or self.indivisible(self.tp)):
                raise ValueError(f"tp={self.tp}: a divisor of gpus={self.gpus}, num_key_value_heads={self.num_key_value_heads}, "
                                 f"intermediate_size={self.intermediate_size} and vocab_size={self.vocab_size} expected")
    return Plan


def gpu_memory(c, tp, micro_batch, lora_rank=0):
    """model.training_bytes of one GPU, and besides "recomputed", activations if only the blocks' inputs were kept, and "total"."""
    from model import training_bytes
    tokens = micro_batch * c.max_position_embeddings
    parts = training_bytes(c, tokens, tp, lora_rank)
    total = 1.05 * (sum(parts.values()) + 1.5e9)  # context, communication buffers, 5 % lost to fragmentation
    inputs = 2 * c.hidden_size * c.num_hidden_layers * tokens
    return parts | dict(recomputed=inputs + parts["activations"] / c.num_hidden_layers, total=total)


def layout(p, c, memory):
    """-> (tp, micro_batch, why): the smallest tp at which two rows fit, for each doubling costs traffic; else one row."""
    rows = -(-p.batch_tokens // c.max_position_embeddings)
    sizes = [p.tp] if p.tp else [t for t in (1, 2, 4, 8) if p.gpus % t == 0 and not c.indivisible(t)]
    for least in (2, 1):
        for tp in sizes:
            each = -(-rows // (p.gpus // tp))  # of one replica in a step
            divisors = {m for d in range(1, math.isqrt(each) + 1) if each % d == 0 for m in (d, each // d)}
            asked = [p.micro_batch] if p.micro_batch else sorted(divisors)
            fits = [m for m in asked if gpu_memory(c, tp, m, p.lora_rank)["total"] <= memory]
            if fits and (p.micro_batch or fits[-1] >= min(least, each)):
                why = f"the smallest tp at which {fits[-1]} of a replica's {each} rows fit at once"
                return tp, fits[-1], "as asked" if p.tp or p.micro_batch else why
    return None, None, (f"does not fit into {memory / 1e9:g} GB with tp of {', '.join(map(str, sizes))}: recomputation, "
                        f"optimizer states split over replicas (ZeRO), or a larger GPU")


def plan(p):
    """Print what training this model takes; returns the figures."""
    import model
    c = model.shape_of(p)
    N, T, each = model.num_params(c), c.max_position_embeddings, model.flops_per_token(c, c.max_position_embeddings)
    # what costs time: of experts those that a token meets, and no embedding that is only looked up
    active = model.num_params(c, active=True) - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    tokens, each = p.tokens or 20 * N, each - 2 * active * (p.lora_rank > 0)  # frozen weights have no gradient
    print(f"{p.preset}: {N:,} parameters, {each / 1e9:.4g} GFLOP per token ({4 if p.lora_rank else 6}N + 12LHDT, rows of {T:,}), "
          f"{each * tokens:.3g} FLOP for {tokens:.4g} tokens\n")
    figures = dict(params=N, tokens=tokens)
    if not p.gpu and not p.why:
        for knob in type(p).__annotations__:
            if knob not in ("preset", "tokens") and getattr(p, knob) != getattr(type(p), knob):
                raise SystemExit(f"--{knob}: without --gpu this machine is measured: --gpu=h100 or another expected")
        return figures | plan_here(p, c, tokens)
    sheet = data_sheet(p.gpu or "h100")
    if sheet is None or not (sheet.bf16 or p.tflops):
        raise SystemExit(f"--gpu={p.gpu}: {', '.join(SHEETS)} expected; with --tflops where it has no bf16")
    peak = 1e12 * (p.tflops or sheet.bf16)
    speed = p.tok_per_s or p.mfu * peak / each
    if p.why:
        return figures | compass(p, N, tokens, speed)
    return figures | plan_time(p, active, each, tokens, speed, peak) | plan_layout(p, c, speed, sheet)


def plan_time(p, N, each, tokens, speed, peak):
    """Days, cost, and GPUs for a deadline, by each way of counting."""
    hours, k = tokens / speed / 3600, 4 if p.lora_rank else 6  # FLOPs per parameter and token
    days, by_6n, by_all = hours / p.gpus / 24, k * N * speed / peak, each * speed / peak
    long = f"{days:.1f} days" if days > 2 else f"{24 * days:.2g} hours"
    print(f"time        {long} on {p.gpus:,} x {p.gpu} at {speed:,.0f} tok/s each; MFU {by_6n:.1%} ({k}N), {by_all:.1%} "
          f"({k}N + 12LHDT) of {peak / 1e12:g} TFLOP/s\n"
          f"cost        {hours:,.0f} GPU-hours, {hours * p.price:,.0f} at {p.price:g} an hour; SmolLM3's ablations and repairs "
          f"took 58 % more")
    if p.tok_per_s:
        ways = {f"{speed:,.0f} tok/s": speed}
    else:
        flops = {f"{k}N of the rounded N": k * p.params, f"{k}N": k * N, f"{k}N + 12LHDT": each}
        ways = {f"{name} at {p.mfu:.0%} of {peak / 1e12:g} TFLOP/s": p.mfu * peak / n for name, n in flops.items() if n}
    needed = {}
    for name, rate in ways.items():
        exact = math.ceil(tokens / rate / (p.days * 86_400))
        needed[name] = exact, 8 * -(-exact // 8)
        print(f"deadline    {exact:,} GPUs for {p.days:g} days, {needed[name][1]:,} in machines of 8, counting {name}")
    return dict(days=days, gpu_hours=hours, cost=hours * p.price, mfu_6N=by_6n, mfu=by_all, tok_per_s=speed, gpus_needed=needed)


def plan_layout(p, c, speed, sheet):
    """Memory by layout, the one to take, what it sends over the links, and how often to save."""
    from model import lora_params, num_params
    N, T = lora_params(c, p.lora_rank) if p.lora_rank else num_params(c), c.max_position_embeddings  # N: what is trained
    tp, micro, reason = layout(p, c, 1e9 * sheet.gb)
    columns = dict(states=12, activations=13, recomputed=13, logits=9, total=9)
    print(f"\nGB, of {sheet.gb} on a {p.gpu}".ljust(29) + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for t in sorted({t for t in (1, 2, 4, tp or 1) if t <= p.gpus}):
        shown = micro or p.micro_batch or 1
        m = gpu_memory(c, t, shown, p.lora_rank)
        print(f"tp={t} micro_batch={shown:<4}{'<--' if t == tp else '':8}" + "".join(
            f"{m[name] / 1e9:{width}.1f}" for name, width in columns.items()))
    if tp is None:
        print(f"\nlayout      {reason}")
        return dict(tp=None)
    dp, link, hours = p.gpus // tp, sheet.peer if p.gpus <= 8 else p.network, p.failure_hours / p.gpus
    rounds = -(-p.batch_tokens // (dp * micro * T))
    batch = dp * micro * rounds * T
    step = batch / (speed * p.gpus)
    tp_bytes = c.num_hidden_layers * 4 * c.hidden_size * 2 * 2 * (tp - 1) / tp * batch / dp  # bf16, 2 all-reduces each way
    dp_bytes = 2 * (dp - 1) / dp * 4 * N / tp
    every = math.sqrt(2 * p.save_seconds * hours * 3600)  # Young 1974; Daly 2006 takes the time of the save off
    lost = p.save_seconds / every + every / 7200 / hours
    share, tp_share = dp_bytes / link / 1e9 / step, tp_bytes / sheet.peer / 1e9 / step
    print(f"\nlayout      tp={tp} dp={dp} micro_batch={micro}, {rounds} pass{'es' * (rounds > 1)} a step: {batch:,} tokens in "
          f"{step:.3f} s: {reason}")
    if p.gpus > 1:
        print(f"traffic     of a GPU in a step: tensor-parallel {tp_bytes / 1e9:.1f} GB, {tp_share:.0%} of the time at {sheet.peer:g} "
              f"GB/s{': too much, recompute activations instead' * (tp_share > 0.2)};\n            gradients {dp_bytes / 1e9:.1f} GB, "
              f"{share:.0%} of the time at {link:g} GB/s, {'less' if share < 0.6 / rounds else 'more'} than the backward pass can hide")
    print(f"checkpoint  {12e-9 * N:.3g} GB every {every / 3600:.1f} h (Young; {(every - p.save_seconds) / 3600:.2f} by Daly) if "
          f"saving takes {p.save_seconds:g} s and a GPU fails every {hours:,.0f} h: {lost:.1%} of the time lost")
    return dict(tp=tp, dp=dp, micro_batch=micro, accumulation=rounds, step_tokens=batch, step_seconds=step,
                memory=gpu_memory(c, tp, micro, p.lora_rank), tp_bytes=tp_bytes, dp_bytes=dp_bytes, checkpoint_bytes=12 * N,
                checkpoint_seconds=every, lost=lost)


def plan_here(p, c, tokens):
    """This machine: train.py's own benchmark with one layer and with three; the other layers are a straight line."""
    import model
    runs, L = {}, c.num_hidden_layers
    T, usual = c.max_position_embeddings, model.Config(**model.PRESETS[p.preset] | dict(vocab_size=320))  # train.py's --bench
    shape = [f"--{f.name}={getattr(c, f.name)}" for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(usual, f.name)]
    if T != usual.max_position_embeddings:  # whole rows, and a multiple of the larger presets' micro_batch
        shape += [f"--batch_tokens={max(4, 2048 // T // 4 * 4) * T}"]
    print(f"measuring train.py {p.preset} --bench with 1 and with 3 layers, two minutes at most each ...", flush=True)
    for layers in (1, 3):
        command = [sys.executable, str(Path(__file__).with_name("train.py")), p.preset, "--bench", *shape]
        try:
            done = subprocess.run([*command, f"--num_hidden_layers={layers}"], capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise ValueError(f"ended by signal {-done.returncode}: out of memory?" if done.returncode < 0 else
                                 (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1])
            runs[layers] = json.loads((done.stdout.strip().splitlines() or [""])[-1])
            if None in [runs[layers][key] for key in ("tok_per_s", "seconds_per_step", "peak_memory_bytes")]:
                raise ValueError("no figures")
        except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"python train.py {p.preset} --bench with {layers} layer{'s' * (layers > 1)}, to measure this machine: "
                             f"{str(e)[-150:]}; --gpu=h100 plans for another one") from None
    line = lambda key: runs[1][key] + (L - 1) * max(0, runs[3][key] - runs[1][key]) / 2
    speed, peak = runs[1]["tok_per_s"] * runs[1]["seconds_per_step"] / line("seconds_per_step"), line("peak_memory_bytes")
    print(f"here        {runs[1]['machine']}: {speed:,.0f} tok/s, {peak / 1e6:,.0f} MB at the peak; to check: python train.py "
          f"{' '.join([p.preset, '--bench', *shape])}\n"
          f"            (measured: {runs[1]['tok_per_s']:,} tok/s with 1 layer, {runs[3]['tok_per_s']:,} with 3)\n"
          f"time        {tokens / speed / 3600:,.2f} hours for {tokens:.3g} tokens")
    return dict(tok_per_s=speed, peak_memory_bytes=peak)


def compass(p, N, tokens, speed):
    """The first chapter of the playbook as questions, with what each answer costs this model."""
    def cost(n):
        return f"{n / speed / 3600:,.0f} GPU-hours ({n / speed / 3600 * p.price:,.0f} at {p.price:g})"
    tuning = 5 * 1.8e9  # SmolLM3's SFT: epochs, tokens
    print(f"""Should it be trained from nothing? Take the first line that is true, on {p.gpu or 'h100'}s at {speed:,.0f} tok/s each.

1. A good prompt makes an open model do it.
       Don't train. Write the evaluation first; you need it in any case.
2. It does it after some thousands of examples.
       Don't train: fine-tune. {cost(tuning)} for what SmolLM3's SFT took, {tuning:.0e} tokens.
3. It lacks a domain or a language.
       Don't train from nothing: continue an open base model. {cost(1e11)} for 1e11 tokens.
4. You want to understand something that a small run can show.
       Train small: an ablation of 20 tokens per parameter is {cost(20 * N)}.
5. No open model can be used (data unlike text, a device, a licence, a law), or you fill a gap that others share.
       Train, once evaluation, data and ablations are there: {cost(tokens)} for {tokens:.3g} tokens,
       and more than half of that again for ablations and repairs (SmolLM3: 276,480 + 161,280 GPU-hours).

None is true, or you are not sure: don't train, fine-tune: {tuning / tokens:.2%} of the cost. How: python sft.py""")
    return dict(fine_tune_hours=tuning / speed / 3600, pretrain_hours=tokens / speed / 3600)


# --- curves ----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Plot:
    """The flags of `infra.py plot`."""
    x: str = "step"                # step, tokens or seconds
    y: str = "loss"                # what metrics.jsonl holds: loss, val_bpb.text, "val_bpb.*", reward, ...; a,b: two drawings
    chain: bool = False            # each run begins where the one before it ended: the stages of one story
    smooth: int = 1                # mean of so many rows
    png: str = ""                  # write this picture (needs matplotlib); default: draw in the terminal
    width: int = 76                # columns of that drawing


def logged(directory, x):
    """A run's metrics.jsonl -> {name: [(x, y)]}; of a nested value the name is outer.inner."""
    try:
        found, rows = {}, read_log(directory)
    except OSError as e:
        raise SystemExit(f"{directory}: {e.strerror}: the directory of a run expected") from None
    if not (Path(directory) / "metrics.jsonl").exists():
        raise SystemExit(f"{directory}/metrics.jsonl: no such file: the log of a run expected")
    for row in rows:
        inner = {f"{k}.{i}": v for k, d in row.items() if isinstance(d, dict) for i, v in d.items()}
        for k, v in (row | inner).items():
            if isinstance(v, int | float) and not isinstance(v, bool) and isinstance(row.get(x), int | float):
                found.setdefault(k, []).append((row[x], v))
    return found


def curves(runs, y, p):
    """{label: [(x, y)]} of all runs that log what y says; runs: (directory, what it has logged, where its x begins)."""
    found = {}
    for d, log, begin in runs:
        for name in (name for name in log if fnmatch.fnmatchcase(name, y)):
            means = [statistics.fmean(v for _, v in log[name][max(0, i + 1 - p.smooth):i + 1]) for i in range(len(log[name]))]
            label = name if p.chain else d if name == y else f"{d} {name}"
            found.setdefault(label, []).extend((begin + at, mean) for (at, _), mean in zip(log[name], means))
    if not found:
        names = sorted({name for _, log, _ in runs for name in log})
        raise SystemExit(f"{', '.join(d for d, *_ in runs)}: no {y} over {p.x}: {'one of ' * bool(names)}"
                         f"{', '.join(names) or 'the log of a run'} expected")
    return found


def draw(drawn, width, height=16):
    """{name: points} -> lines of text, a letter for each curve."""
    xs, ys = zip(*(point for points in drawn.values() for point in points))
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    grid = [[" "] * width for _ in range(height)]
    lettered = list(zip(itertools.cycle("abcdefghijklmnopqrstuvwxyz"), drawn.items()))
    for letter, (_, points) in lettered:
        for at, value in points:
            column = round((at - left) / ((right - left) or 1) * (width - 1))
            grid[round((high - value) / ((high - low) or 1) * (height - 1))][column] = letter
    margin = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    lines = [f"{label:>10} |{''.join(row)}" for label, row in zip(margin, grid)]
    return [*lines, " " * 11 + "+" + "-" * width, f"{left:>12.6g}{right:>{width}.6g}",
            *(f"{letter}: {name}, ends at {points[-1][1]:.4g}" for letter, (name, points) in lettered)]


def picture(found, runs, p):
    """Draw the curves into the file p.png."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(f"--png={p.png}: the package matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False, sharex=p.chain,
                                   layout="constrained")
    for axis, (y, drawn) in zip(axes[0], found.items()):
        for name, points in drawn.items():
            axis.plot(*zip(*points), label=name)
        for d, _, begin in runs if p.chain else ():
            axis.axvline(begin, color="0.85", zorder=0)
            axis.text(begin, 1, Path(d).name, transform=axis.get_xaxis_transform(), fontsize=7, color="0.4",
                      rotation=40)
        axis.set(xlabel=p.x, ylabel=y), axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        with atomic(p.png) as f:
            figure.savefig(f, format="png", dpi=110)
    except OSError as e:
        raise SystemExit(f"--png={p.png}: {e.strerror}: a file in a writable directory expected") from None
    print(f"wrote {p.png}")


def plot(directories, p):
    """`python infra.py plot`: draw metrics of runs over each other -> {y: {label: points}}."""
    if not directories or p.smooth < 1 or p.width < 10:
        raise SystemExit("plot: run directories expected, --smooth of 1 or more, --width of 10 or more")
    runs, begin = [], 0
    for d in dict.fromkeys(directories):
        log = logged(d, p.x)
        runs.append((d, log, begin))
        if p.chain:
            begin += max((at for points in log.values() for at, _ in points), default=0)
    found = {y: curves(runs, y, p) for y in p.y.split(",")}
    if p.png:
        picture(found, runs, p)
    else:
        for y, drawn in found.items():
            print("\n".join([f"{y} over {p.x}", *draw(drawn, p.width), ""]))
    return found


if __name__ == "__main__":
    import model
    command, words = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if command in ("plan", "plot"):
        sys.argv[0] += f" {command}"
    if command == "plan":
        shapes = {name: dict(shape, preset=name) for name, shape in model.PRESETS.items()}
        launch(plan, cli(plan_options(), shapes, words))
    elif command == "plot":
        directories, flags = [w for w in words if w[:1] != "-"], [w for w in words if w[:1] == "-"]
        launch(lambda p: plot(directories, p), cli(Plot, {}, flags))
    else:
        launch(main, cli(Config, {name: dict(preset=name) for name in model.PRESETS}))
