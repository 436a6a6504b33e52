"""python model.py DIR: text, batches, chats in a pipe, memory, longer context; a Hugging Face directory serves wherever a run does."""
import io, json, math, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data, grpo, infra, model as nano, sft, train

TOK = data.get_tokenizer("bytes")
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run directory `base` with a random model that knows the chat template compact, and we stand beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    nano.save_checkpoint("base", nano.Transformer(nano.Config(**SHAPE | dict(initializer_range=0.2))), stage="sft",
                         train_config=dict(style="compact"))
    return tmp_path


def options(**change):
    return nano.Options(**dict(init="base", dtype="float32", max_new_tokens=12, device="cpu") | change)


def talk(monkeypatch, lines, **change):
    """A chat in a pipe -> its messages."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return nano.main(options(chat=True, **change))["messages"]


def answer(messages, mode, seed, n=12, temperature=0.8):
    """What the model says to these messages, by way of generate."""
    m, _ = nano.load_checkpoint("base")
    ids, _ = data.render(messages, mode, add_generation_prompt=True)
    stop = [TOK.special["<|im_end|>"], TOK.eos]
    [(new, _)] = nano.generate(m, [ids], 256 - len(ids), temperature, stop_ids=stop, seed=[seed])
    new = new[:n]
    return TOK.decode(new[:-1] if new[-1] in stop else new)


def test_a_piped_chat_answers_line_by_line_and_remembers(place, monkeypatch, capfd):
    messages = talk(monkeypatch, "12+34=\n\nand 5?\n")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[2]["content"] == "and 5?"
    assert messages[1]["content"] == answer(messages[:1], "think", (0, 1))
    assert messages[3]["content"] == answer(messages[:3], "think", (0, 2))
    out, err = capfd.readouterr()
    assert out == f"{messages[1]['content']}\n{messages[3]['content']}\n" and "\x1b[" not in out + err
    assert err.count("tok/s]") + err.count("cut off]") == 2 and "> " not in out


def test_commands_switch_the_mode_and_begin_anew(place, monkeypatch, capfd):
    messages = talk(monkeypatch, "hello\n/no_think\nhi\n/nonsense\n/system Be brief.\nyes?\n/think no?\n")
    assert messages[0] == dict(role="system", content="Be brief.") and [m["role"] for m in messages[1:]] == ["user", "assistant"] * 2
    assert messages[2]["content"] == answer(messages[:2], "no_think", (0, 3))
    assert messages[3]["content"] == "no?" and messages[4]["content"] == answer(messages[:4], "think", (0, 4))
    assert "/nonsense: /think and /no_think" in capfd.readouterr().err
    assert talk(monkeypatch, "/system Be brief.\nyes?\n/reset\n") == [dict(role="system", content="Be brief.")]
    assert talk(monkeypatch, "/system Be brief.\nyes?\n/system\n") == [] == talk(monkeypatch, "/exit\nyes?\n")


def test_a_thought_of_an_earlier_turn_does_not_break_no_think(place, monkeypatch):
    chat = [dict(role="user", content="a"), dict(role="assistant", content="<think>\nb\n</think>\nc")]
    ids, _ = data.render([data.reasoned(m, "no_think") for m in chat], "no_think")
    assert "<think>\nb" not in TOK.decode(ids)

    def thinking(model, prompts, *rest, **more):
        for t in [TOK.special["<think>"], *b"b", TOK.special["</think>"], *b"c", TOK.special["<|im_end|>"]]:
            yield [(0, t, 0.0)]
    monkeypatch.setattr(nano, "stream", thinking)
    messages = talk(monkeypatch, "a\n/no_think\nb\n", max_new_tokens=30)
    assert messages[1]["content"] == "<think>b</think>c"


def test_turns_that_do_not_fit_are_forgotten_but_the_system_message_stays(place, monkeypatch, capfd):
    messages = talk(monkeypatch, "/system S\n" + "".join(f"{i}{'x' * 40}\n" for i in range(6)), context=160)
    assert messages[0]["content"] == "S" and messages[-2]["content"].startswith("5x") and len(messages) < 9
    assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * (len(messages) // 2)      # a question goes with its answer
    assert talk(monkeypatch, "y" * 300 + "\nz\n")[0]["content"] == "z"
    assert "fewer than 256 expected" in capfd.readouterr().err


def test_room_for_an_answer_is_kept_however_long_the_turns_are(place, monkeypatch):
    sizes = []
    monkeypatch.setattr(nano, "write", lambda model, ids, tokenizer, stop, cfg, limit, room, seed: sizes.append((len(ids), room)) or ("ok", 2, True))
    for n in range(30, 50):
        talk(monkeypatch, f"{'x' * n}\n" * 6, context=160)
    assert 140 < max(n for n, _ in sizes) <= 160 - 12 and {n + room for n, room in sizes} == {160}


def test_a_line_that_is_too_long_is_refused_and_nothing_is_forgotten_for_it(place, monkeypatch, capfd):
    messages = talk(monkeypatch, f"one\ntwo\n{'x' * 500}\n")
    assert [m["content"] for m in messages[::2]] == ["one", "two"] and "fewer than 256 expected" in capfd.readouterr().err


def test_a_flag_in_the_system_message_decides_what_is_kept_of_earlier_thoughts(place, monkeypatch):
    shown = []
    monkeypatch.setattr(nano, "write", lambda model, ids, *more: shown.append(TOK.decode(ids)) or ("<think>\nhm\n</think>\nyes", 3, True))
    talk(monkeypatch, "/system /think\na\nb\n", mode="no_think")
    assert "hm" in shown[1]
    talk(monkeypatch, "/system /no_think Be brief.\na\nb\n")
    assert "hm" not in shown[3] and "yes" in shown[3]


def test_a_prompt_is_a_line_and_no_more(place, capfd):
    Path("p.txt").write_bytes(b"\xef\xbb\xbfabc\nde\x0cf\xe2\x80\xa8g\n")
    samples = nano.main(options(prompt_file="p.txt", json=True, max_new_tokens=1))["samples"]
    assert [s["prompt"] for s in samples] == ["abc", "de\x0cf\u2028g"]


def test_a_reader_that_leaves_is_no_stack_trace(place):
    run = subprocess.run(f"{sys.executable} {nano.__file__} base --prompt=a --max_new_tokens=200 --device=cpu | head -c 1", shell=True,
                         capture_output=True, text=True, errors="replace", env=dict(__import__("os").environ, OMP_NUM_THREADS="1"))
    assert "Traceback" not in run.stderr and "nobody reads the output" in run.stderr, run.stderr


def test_a_chat_with_a_prompt_is_one_answer(place, capfd):
    text = nano.main(options(chat=True, prompt="12+34=", mode="no_think"))["text"]
    assert text == answer([dict(role="user", content="12+34=")], "no_think", (0, 0)) and text in capfd.readouterr().out


def test_prompts_from_a_file_give_json_lines_that_do_not_depend_on_the_batch(place, capfd):
    Path("prompts").write_text("abc\nde\n", encoding="utf-8")
    one = nano.main(options(prompt_file="prompts", num_samples=3, json=True, batch=2))["samples"]
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert lines == one and [s["prompt"] for s in one] == ["abc"] * 3 + ["de"] * 3 and len({s["text"] for s in one}) == 6
    other = nano.main(options(prompt_file="prompts", num_samples=3, json=True, batch=32))["samples"]
    assert [s["text"] for s in one] == [s["text"] for s in other]
    m, _ = nano.load_checkpoint("base")
    ids = list(one[0]["text"].encode()) if one[0]["text"].isascii() else None
    assert one[0]["finished"] or ids is None or len(ids) == one[0]["tokens"]
    encoded, stop = [[*b"abc"]] * 3 + [[*b"de"]] * 3, [TOK.special["<|im_end|>"], TOK.eos]
    made = nano.generate(m, encoded, 12, 0.8, stop_ids=stop, seed=[(0, i, k) for i in range(2) for k in range(3)])
    assert [s["logprob"] for s in one] == pytest.approx([sum(logps) for _, logps in made], rel=1e-4)


def test_a_text_begins_as_documents_do_and_an_empty_one_after_the_end_of_another():
    plain, llama = (SimpleNamespace(bos=bos, eos=9, encode=lambda text: [*text.encode()]) for bos in (None, 7))
    for tokenizer, text, expected in ((plain, "a", [97]), (plain, "", [9]), (llama, "a", [7, 97]), (llama, "", [7])):
        assert nano.encode_prompt(text, tokenizer, "", options()) == expected


def test_memory_is_said_before_it_is_taken_and_refused_where_a_gpu_lacks_it(place, capfd, monkeypatch):
    nano.main(options(prompt="a"))
    n = nano.num_params(nano.Config(**SHAPE))
    assert f"{n:,} parameters: {4 * n / 1e9:.3g} GB in float32" in capfd.readouterr().err
    rt = infra.setup(options())
    rt.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    monkeypatch.setattr(nano, "empty_model", lambda *a: pytest.fail("memory was taken"))
    with pytest.raises(SystemExit, match="base: 0.0 GB, and 0.0 free on .*--context"):
        nano.open_model(options(chat=True), rt)


def test_what_cannot_be_is_one_line(place, monkeypatch):
    for change, message in ((dict(mode="loud"), "--mode=loud: think or no_think"), (dict(style="loud"), "--style=loud"), (dict(num_samples=0), "--num_samples"), (dict(temperature=-1.0), "--temperature, --top_k"), (dict(top_p=2.0), "--top_p"),
                            (dict(init="nowhere"), "no checkpoint"),
                            (dict(prompt_file="nowhere"), "--prompt_file=nowhere: .*a text file expected"),
                            (dict(bench=True, batch=0), "--batch"), (dict(bench=True, prompt_tokens=0), "--prompt_tokens"),
                            (dict(max_new_tokens=10**12), "at most 2 .. 31"), (dict(bench=True, vocab_size=0), "--vocab_size=0"),
                            (dict(init="", chat=True), "--chat, .*a run directory"), (dict(export_hf="x", dtype="flaot32"), "--dtype=flaot32"),
                            (dict(export_hf="base/ckpt_00000000.pt/x"), "Not a directory: an empty directory")):
        with pytest.raises(SystemExit, match=message):
            nano.main(options(**change))


def test_it_works_in_a_real_pipe(place):
    run = subprocess.run([sys.executable, Path(nano.__file__), "base", "--chat", "--max_new_tokens=5", "--device=cpu"], input="1+1=\n",
                         capture_output=True, text=True, encoding="utf-8", errors="replace", env=dict(__import__("os").environ, OMP_NUM_THREADS="1"))
    assert run.returncode == 0 and "tok/s" in run.stderr and len(run.stdout) > 1, run.stderr


def test_flags_on_the_rotary_embedding_lengthen_context(place, capfd):
    m, _ = nano.load_checkpoint("base")
    assert (m.config.rope_theta, m.config.rope_factor) == (10_000.0, 1.0)
    nano.extend(m.config, options(rope_theta=40_000.0, rope_factor=2.0))
    assert (m.config.rope_theta, m.config.rope_factor, m.config.original_max_position_embeddings) == (40_000.0, 2.0, 256)
    assert capfd.readouterr().err.count("!!!") == 2
    nano.extend(m.config, options())                                   # defaults change nothing
    assert m.config.rope_theta == 40_000.0 and not capfd.readouterr().err
    plain = nano.Transformer(nano.Config(**SHAPE))
    cos, sin = plain.rope(torch.arange(4))
    slow, _ = m.rope(torch.arange(4))
    assert slow.max() == pytest.approx(0.1 * math.log(2) + 1) and cos.max() == 1      # YaRN's temperature


def test_a_model_that_was_trained_on_longer_rows_than_yarn_makes_keeps_them():
    for rows, expected in ((100, 256), (256, 256), (512, 512)):
        config = nano.Config(max_position_embeddings=rows, rope_factor=4.0, original_max_position_embeddings=64)
        nano.stretched(config)
        assert config.max_position_embeddings == expected


def test_a_chat_remembers_as_much_as_yarn_makes_of_it(place, capfd):
    model, *_ = nano.open_model(options(chat=True, style="compact", rope_factor=4.0), infra.setup(options()))
    assert (model.config.max_position_embeddings, model.config.original_max_position_embeddings) == (1024, 256)
    assert "cache for 1,024 tokens" in capfd.readouterr().err
