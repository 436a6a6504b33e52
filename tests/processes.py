"""Several processes, as torchrun would start them, but forked from the test: no interpreter to start, no torch to import."""
import multiprocessing, os, pickle, socket, sys, tempfile, time, traceback
from pathlib import Path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(world, function, *args, results=None):
    """Fork `world` processes that call function(*args) with torchrun's environment -> list of multiprocessing.Process.

    Alone (world 1) a process sees no torchrun. Its result, or the traceback as a string, goes to results/<rank>.pickle.
    """
    port = free_port()

    def child(rank):
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        code = 0
        try:
            answer = function(*args)
        except BaseException as e:
            answer, code = "".join(traceback.format_exception(e)), 1
            print(answer, file=sys.stderr)
        if results:
            (Path(results) / f"{rank}.pickle").write_bytes(pickle.dumps((code, answer)))
        sys.stdout.flush()
        os._exit(code)  # no atexit of pytest's

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    return processes


def run(world, function, *args, timeout=60):
    """The results of function(*args) on each of `world` ranks; fails with a rank's traceback, or when it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        processes, end = start(world, function, *args, results=folder), time.monotonic() + timeout
        for p in processes:
            p.join(max(0, end - time.monotonic()))
        hanging = [rank for rank, p in enumerate(processes) if p.is_alive()]
        for p in processes:
            p.kill(), p.join()
        assert not hanging, f"ranks {hanging} still run after {timeout} s"
        answers = [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world)]
    for rank, (code, answer) in enumerate(answers):
        assert code == 0, f"rank {rank}:\n{answer}"
    return [answer for _, answer in answers]
