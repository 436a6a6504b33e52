"""What tests of whole runs share: runs that are stopped and go on, and what they leave in their directories."""
import dataclasses, json, signal, sys
from pathlib import Path

import pytest
import torch

import model as nano, train

TIMING = {"seconds", "tok_per_s", "tok_per_s_p5", "tok_per_s_median", "trained_tok_per_s", "data_wait", "mfu", "rollout_seconds",
          "update_seconds"}                             # fields of a row that no two runs share


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def stop_at(monkeypatch, step):
    """A real SIGTERM in the middle of step `step`."""
    original = train.lr_at

    def lr_at(at, cfg):
        if at == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(at, cfg)
    monkeypatch.setattr(train, "lr_at", lr_at)


def stopped_run(cfg, step):
    """Start cfg, of whichever script, and stop it in step `step`. Uncaught the signal would end pytest: make it an error."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not caught"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            result = sys.modules[type(cfg).__module__].main(cfg)
    finally:
        signal.signal(signal.SIGTERM, before)
    at_once = getattr(cfg, "num_iterations", 1)         # grpo.py looks for signals after so many steps
    assert result["stopped"] == "SIGTERM" and result["step"] == -(-step // at_once) * at_once
    return result


def resumed(cfg, **change):
    return dataclasses.replace(cfg, resume=True, **change)


def rows(cfg):
    return [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def untimed(cfg):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(cfg)]


def steps(cfg):
    """The rows of training steps."""
    return [row for row in rows(cfg) if "grad_norm" in row]


def weights(folder):
    return nano.load_checkpoint(folder)[0].state_dict()


def tensors(value, at=""):
    """All tensors in nested dicts, by path."""
    if isinstance(value, torch.Tensor):
        return {at: value}
    inside = value.items() if isinstance(value, dict) else ()
    return {k: t for name, v in inside for k, t in tensors(v, f"{at}/{name}").items()}


def assert_same_state(one, other):
    """Two run directories hold the same weights, optimizer states and places in the run, bit for bit."""
    a, b = (nano.read_checkpoint(x, fold=False) for x in (one, other))
    for part in ("model", "optimizer", "monitor"):
        x, y = tensors(a[part]), tensors(b[part])
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), part
    plain = [{k: v for k, v in state["monitor"].items() if k not in TIMING and not tensors(v)} for state in (a, b)]
    assert plain[0] == plain[1] and a["model"]
    assert a["step"] == b["step"] and a["consumed_samples"] == b["consumed_samples"]


def one_line(call, *arguments, match):
    """The call ends with one line that says so."""
    with pytest.raises(SystemExit, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
