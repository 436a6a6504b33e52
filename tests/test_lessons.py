"""The lessons that are quick enough still show what they say; the others are run by hand."""
import subprocess, sys
from pathlib import Path

import pytest

import lessons


def test_without_credit_for_the_end_token_a_length_penalty_does_not_shorten_answers():
    got = lessons.drop_eos(steps=12)
    assert got["fixed"] < 0.6 * got["start"] and got["broken"] > 0.8 * got["start"], got


@pytest.mark.parametrize("words, code", [([], 0), (["no_such_lesson"], 1)])
def test_the_list_of_lessons_is_printed_also_for_an_unknown_name(words, code):
    run = subprocess.run([sys.executable, Path(lessons.__file__), *words], capture_output=True, text=True)
    assert run.returncode == code and "drop_eos" in run.stdout and ("no_such_lesson" in run.stderr) == bool(words)
