"""The README's quick-start commands run as they stand, at a reduced number of steps."""
import json, os, re, shlex, subprocess, sys
from pathlib import Path

import pytest

import data, infra

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def quick_start():
    """Commands of the fenced blocks that follow a `<!-- quick start -->` mark, without their trailing comments."""
    blocks = re.findall(r"<!-- quick start -->\n```(?:bash|sh)\n(.*?)```", README, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("python ")]


def test_quick_start_commands_run_in_an_empty_directory(tmp_path):
    commands, few = quick_start(), tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(problem) + "\n" for problem in data.sum_problems(8)))
    assert [c[1] for c in commands][:1] == ["train.py"] and len(commands) >= 3
    for command in commands:
        short = ["--steps=3", "--log_every=1"] if command[1] in ("train.py", "sft.py", "grpo.py") else []
        short += [f"--tasks={few}"] if command[1] in ("sft.py", "grpo.py") else []     # 200 answers of an untrained model are long
        short += ["--pairs=sums"] if "--stage=apo" in command else []                  # and so are 12,000
        run = subprocess.run([sys.executable, ROOT / command[1], *command[2:], *short], cwd=tmp_path, capture_output=True,
                             text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "2"})
        assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
        assert run.stdout.strip(), command


@pytest.mark.parametrize("name", ["train", "model", "data", "sft", "grpo", "infra"])
def test_every_flag_in_the_readme_exists(name):
    """`--flag` words on README lines that call a script are fields of that script's Config."""
    module = __import__(name)
    fields = {f for c in (getattr(module, "Options", None), module.Config) if c for f in c.__dataclass_fields__}
    for line in re.findall(rf"^(?:python|torchrun [^#]*?) {name}\.py.*$", README, re.M):
        known = {" plan": infra.plan_options(), " plot": infra.Plot}.get(re.search(r" (?:plan|plot)\b|$", line)[0])
        known = known.__dataclass_fields__ if known else fields
        for flag in re.findall(r"--([a-z_]+)", line.partition(".py")[2].split("#")[0]):
            assert flag in {*known, "config", "help"}, line
