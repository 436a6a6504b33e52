"""The lessons that are quick enough still show what they say; the others are run by hand."""
import functools, subprocess, sys
from pathlib import Path

import pytest
import torch._dynamo   # else every forked rank imports it anew, for seconds

import lessons


@pytest.fixture(autouse=True)
def fewer_documents(monkeypatch):
    monkeypatch.setattr(lessons, "workplace", functools.partial(lessons.workplace, documents=25))


def test_ranks_that_draw_with_one_seed_hold_the_same_weights_at_the_end_too():
    got = lessons.same_seed(steps=2)
    assert got["twins_broken"] == 1 and got["twins_fixed"] < 0.01 and "same shard on TP ranks 0 and 1" in got["refused"], got


def test_the_loss_is_noisier_where_rows_come_in_file_order():
    got = lessons.file_order(steps=60)
    assert got["broken"] > 1.25 * got["fixed"], got


def test_an_index_grows_with_the_run_and_a_function_does_not():
    got = {key: size for key, (size, _) in lessons.big_index(most=6).items()}
    assert got["broken", 10**6] > 10**6 * 16 and got["fixed", 10**6] < 1.1 * got["fixed", 10**5] < 10**6, got


def test_most_small_updates_do_not_move_a_weight_in_bfloat16():
    got = lessons.bf16_weights(steps=20)
    assert got["broken"] < 0.3 * got["fixed"], got


def test_a_schedule_that_counts_micro_batches_ends_early():
    got = lessons.micro_steps(steps=24)
    assert (got["broken"], got["fixed"]) == (6, 24) and got["broken_loss"] > got["fixed_loss"] + 0.1, got


def test_a_mean_of_means_is_another_gradient():
    got = lessons.mean_of_means()
    assert got["broken"] > 0.1 and got["fixed"] < 1e-5 and got["weight"] > 5, got


def test_a_persona_that_is_none_is_lost_or_refused():
    got = lessons.no_persona(chats=20)
    assert (got["broken"], got["fixed"], got["default"]) == (0, 20, 20) and got["same"], got
    assert got["refused"].startswith("bad:1: message 0: content None"), got


def test_training_on_the_users_turns_teaches_to_ask():
    got = lessons.user_turns(steps=12)
    assert got["broken_user"] < 0.9 * got["fixed_user"] and got["broken"] > got["fixed"], got


def test_without_document_masks_a_chat_depends_on_its_row():
    got = lessons.no_doc_mask(steps=2)
    assert got["broken"] > 0.1 and got["fixed"] < 1e-4, got


def test_without_credit_for_the_end_token_a_length_penalty_does_not_shorten_answers():
    got = lessons.drop_eos(steps=8, lr=4e-3, num_hidden_layers=1)
    assert got["fixed"] < 0.6 * got["start"] and got["broken"] > 0.8 * got["start"], got


def test_the_list_of_lessons_is_printed_also_for_an_unknown_name():
    run = subprocess.run([sys.executable, Path(lessons.__file__), "no_such_lesson"], capture_output=True, text=True)
    assert run.returncode == 1 and "no_such_lesson" in run.stderr and all(name in run.stdout for name in lessons.LESSONS)
