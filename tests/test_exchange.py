"""There and back: a run exported for transformers answers there as here, and a directory of theirs serves wherever a run does."""
import dataclasses, json
from pathlib import Path

import numpy as np
import pytest
import torch

import data, grpo, infra, model as nano, sft, train
from processes import run

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: nobody to exchange models with")
pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed: no Hugging Face directories")

TOK = data.get_tokenizer("bytes")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
CHAT = [dict(role="user", content="12+34=")]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(folder="run", style="compact", tokenizer=TOK, stage="sft", **change):
    """A random model in a run directory."""
    torch.manual_seed(0)
    m = nano.Transformer(nano.Config(**SHAPE | dict(vocab_size=tokenizer.vocab_size) | change))
    Path(folder).mkdir()
    nano.save_checkpoint(folder, m, step=7, stage=stage, tokenizer=tokenizer.state, train_config=dict(style=style, data="chats.jsonl"))
    return m


def export(source="run", to="hf", **change):
    nano.main(nano.Options(init=source, export_hf=to, **dict(dtype="float32") | change))
    return to


def small_bpe():
    """A tokenizer of some bytes more than one a token."""
    words = [b"ab", b"abc", b" t", b" th", b" the", b"12", b"==", b"\xc3\xa9"]
    ranks = data.lines_of([(bytes([b]), b) for b in range(256)] + [(w, 256 + i) for i, w in enumerate(words)])
    return data.bpe_tokenizer([data.GPT2], ranks, {"<|end_of_text|>": 264, "<|reserved_special_token_0|>": 265})


def bare_bpe():
    """tokenizer.json of bytes and an end of text, nothing else."""
    whole = json.loads(data.tokenizer_json(small_bpe()))
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] in ("<|end_of_text|>", "<|endoftext|>")]
    return whole


@pytest.mark.parametrize("style, tokenizer", [("compact", TOK), ("smollm3", TOK), ("chatml", TOK), ("compact", small_bpe())])
def test_an_exported_chat_answers_in_transformers_token_for_token(here, style, tokenizer):
    ours = checkpoint(style=style, tokenizer=tokenizer, max_position_embeddings=2048)
    export()
    hf, tok = transformers.AutoModelForCausalLM.from_pretrained("hf").eval(), transformers.AutoTokenizer.from_pretrained("hf")
    chats = [[dict(role="system", content="Be brief."), *CHAT], [dict(role="user", content="Is é the letter == abc?")] * 1, CHAT]
    for mode in ("think", "no_think"):
        ids = [data.render(c, mode, style, date="1 May 2026", add_generation_prompt=True, tokenizer=tokenizer)[0] for c in chats]
        how = dict(enable_thinking=mode == "think", add_generation_prompt=True, date="1 May 2026")
        assert [tok.apply_chat_template(c, tokenize=False, **how) for c in chats] == [tokenizer.decode(i) for i in ids]
        theirs = [tok.apply_chat_template(c, return_dict=True, **how)["input_ids"] for c in chats]
        assert theirs == ids
        batch = tok.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt", **how)
        made = hf.generate(**batch, max_new_tokens=64, do_sample=False)[:, batch["input_ids"].shape[1]:]
        stop = [tokenizer.special["<|im_end|>"], tokenizer.eos]
        for row, (new, _) in zip(made.tolist(), nano.generate(ours, ids, 64, temperature=0, stop_ids=stop)):
            assert row[:len(new)] == new and set(row[len(new):]) <= {tokenizer.special["<|pad|>"]}
    assert {hf.generation_config.pad_token_id, *hf.generation_config.eos_token_id} == {tokenizer.special["<|pad|>"], *stop}


def test_a_pipeline_needs_nothing_of_ours(here):
    ours = checkpoint()
    export()
    pipe = transformers.pipeline("text-generation", model="hf", dtype=torch.float32)
    said = pipe(CHAT, max_new_tokens=20, do_sample=False)[0]["generated_text"][-1]
    ids = data.render(CHAT, "think", add_generation_prompt=True)[0]
    [(new, _)] = nano.generate(ours, [ids], 20, temperature=0, stop_ids=[TOK.special["<|im_end|>"], TOK.eos])
    kept = [i for i in new if i < 256 or TOK.decode([i]) in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    assert said == dict(role="assistant", content=TOK.decode(kept))


def test_a_base_model_is_exported_without_a_template_and_ends_at_the_end_of_text(here):
    checkpoint(style="", stage="base")
    export()
    tok = transformers.AutoTokenizer.from_pretrained("hf")
    assert tok.chat_template is None and tok.eos_token == "<|endoftext|>" and not Path("hf/chat_template.jinja").exists()
    assert json.loads(Path("hf/generation_config.json").read_text())["eos_token_id"] == [TOK.eos]
    text = "def main():\n  '''é🙂'''\t<|endoftexty|>"
    assert tok(text)["input_ids"] == TOK.encode(text) and tok.decode(TOK.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [TOK, small_bpe()])
def test_an_export_is_read_back_with_its_tokenizer_and_style(here, tokenizer):
    m = checkpoint(style="chatml", tokenizer=tokenizer)
    export()
    back, extra = nano.load_checkpoint("hf")
    assert extra["tokenizer"] == tokenizer.state and extra["train_config"] == dict(style="chatml") and extra["stage"] == "hf"
    assert back.config == m.config and all(map(torch.equal, back.parameters(), m.parameters()))
    export("hf", "again")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"):
        assert Path("again", name).read_bytes() == Path("hf", name).read_bytes(), name


def test_a_directory_without_template_or_chat_tokens_can_be_evaluated_and_merged(here):
    """As a base model from elsewhere is: its vocabulary ends before the tokens of chats."""
    m = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=265, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                               num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
    m.save_pretrained("theirs"), Path("theirs/tokenizer.json").write_text(json.dumps(bare_bpe()))
    Path("few.jsonl").write_text("".join(json.dumps(p) + "\n" for p in data.sum_problems(2)))
    result = sft.main(sft.Config(stage="eval", init="theirs", tasks="few.jsonl", max_new_tokens=2, device="cpu", dtype="float32"))
    assert result
    sft.main(sft.Config(stage="merge", models="theirs:0.5,theirs:0.5", out="merged", device="cpu"))
    merged, plain = nano.load_checkpoint("merged")[0], nano.load_checkpoint("theirs")[0]
    assert merged.config.vocab_size > 265 and all(map(torch.equal, merged.parameters(), plain.parameters()))


def test_the_model_card_tells_shape_data_command_and_metrics_and_leaves_the_licence(here):
    checkpoint()
    Path("run/metrics.jsonl").write_text(json.dumps(dict(step=7, final=True, loss=1.5, scores={"think accuracy": 0.875})) + '\n{"half')
    export()
    card = Path("hf/README.md").read_text(encoding="utf-8")
    for part in ("library_name: transformers", "license: other", "| num_key_value_heads | 2 |", "stage sft, 7 steps", "chats.jsonl",
                 "`python sft.py --config=config.json`", "* think accuracy: 0.875", "* loss: 1.5", "To be filled in by you"):
        assert part in card, part


def test_the_settings_in_a_model_card_repeat_the_run(here):
    """Also those of the shape, and those that are false or 0."""
    cfg = train.Config(**SHAPE | dict(doc_mask=False, weight_decay=0.0, out="elsewhere"))
    Path("run").mkdir()
    nano.save_checkpoint("run", nano.Transformer(nano.Config(**SHAPE)), train_config=dataclasses.asdict(cfg))
    export()
    card = Path("hf/README.md").read_text(encoding="utf-8")
    Path("config.json").write_text(card.split("```json\n")[1].split("```")[0])
    assert "`python train.py --config=config.json`" in card and infra.cli(train.Config, argv=["--config=config.json"]) == cfg


def test_more_tokens_than_the_model_has_rows_for_get_new_rows_the_mean_of_all(here):
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                      num_key_value_heads=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    hf = transformers.LlamaForCausalLM(config)
    hf.save_pretrained("hf")
    Path("hf/tokenizer.json").write_text(data.tokenizer_json(TOK))
    m, extra = nano.load_checkpoint("hf")
    assert extra["tokenizer"] == "bytes" and m.config.vocab_size == 320 and m.lm_head is not None
    for w, theirs in ((m.embed_tokens.weight, hf.model.embed_tokens.weight), (m.lm_head.weight, hf.lm_head.weight)):
        assert torch.equal(w[:256], theirs) and (w[256:] - theirs.mean(0)).abs().max() < 1e-7
    two = run(2, slices, "hf")
    assert torch.equal(torch.cat(two), m.embed_tokens.weight)


def slices(folder):
    rt = infra.setup(train.Config(tp=2, device="cpu"))
    return nano.load_checkpoint(folder, tp=rt.tp_group)[0].embed_tokens.weight.detach()


def test_every_stage_begins_from_a_hugging_face_directory(here, capsys):
    checkpoint(style="chatml")
    hf, common = export(), dict(device="cpu", dtype="float32", init="hf", steps=2, log_every=1)
    rows = [dict(messages=[*CHAT, dict(role="assistant", content="46")]) for _ in range(8)]
    Path("chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("problems.jsonl").write_text("".join(json.dumps(dict(prompt=f"{i}+1=", answer=str(i + 1))) + "\n" for i in range(300)))
    result = sft.main(sft.Config(**common | dict(data="chats.jsonl", batch=2, val_fraction=0.0, max_length=64, out="sft")))
    made = nano.read_checkpoint("sft")
    assert result["step"] == 2 and made["tokenizer"] == "bytes" and made["train_config"]["style"] == "chatml"
    grpo.main(grpo.Config(**common | dict(problems="problems.jsonl", prompts=2, num_generations=2, max_new_tokens=4, out="grpo", eval_every=9)))
    assert nano.read_checkpoint("grpo")["train_config"]["style"] == "chatml"
    train.main(train.Config(**common | dict(text="problems.jsonl", tokenizer="hf", batch_tokens=128, max_position_embeddings=64, eval_every=9,
                                            rope_theta=50_000.0, out="base")))
    assert nano.load_checkpoint("base")[0].config.rope_theta == 50_000.0 and "!!! rope_theta" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--tokenizer=hf2: hf was trained with bytes \(--tokenizer=hf\)"):
        Path("hf2").mkdir()
        Path("hf2/tokenizer.json").write_text(data.tokenizer_json(small_bpe()))
        train.main(train.Config(**common | dict(text="problems.jsonl", tokenizer="hf2", out="other")))
    sft.main(sft.Config(stage="merge", models="hf:0.5,sft:0.5", out="merge"))
    half = nano.read_checkpoint("merge")["model"]["norm.weight"]
    assert torch.allclose(half, (nano.read_checkpoint("hf")["model"]["norm.weight"] + made["model"]["norm.weight"]) / 2)


def test_adapters_on_a_frozen_bf16_model_are_resumed_loaded_and_merged(here):
    base = checkpoint()
    export(dtype="auto")
    common = dict(init="hf", device="cpu", dtype="bfloat16", batch=2, data="chats.jsonl", val_fraction=0.0, max_length=64, lora_rank=2,
                  lora_dropout=0.0, lr=0.01, optimizer="adamw", log_every=1, epochs=9.0, save_every=1)
    Path("chats.jsonl").write_text("".join(json.dumps(dict(messages=[*CHAT, dict(role="assistant", content=str(i))])) + "\n" for i in range(8)))
    cfg = sft.Config(**common | dict(steps=3, out="whole"))
    rt = infra.setup(cfg)
    started = sft.begin(sft.check(cfg, rt), rt)
    kinds = {n.rpartition(".")[2]: p.dtype for n, p in started.model.named_parameters()}
    assert kinds["weight"] == torch.bfloat16 and kinds["lora_A"] == kinds["lora_B"] == torch.float32
    started.log.close()
    sft.main(sft.Config(**common | dict(steps=3, out="whole", overwrite=True)))
    sft.main(sft.Config(**common | dict(steps=3, out="merged", merge=True)))
    saved, (m, _), (flat, _) = nano.read_checkpoint("whole", fold=False), nano.load_checkpoint("whole"), nano.load_checkpoint("merged")
    assert all("lora" in n for n in saved["model"]) and saved["lora"]["base"] == "../hf"
    for n, p in m.named_parameters():
        was = dict(base.named_parameters())[n].detach().bfloat16().float()
        b = saved["model"].get(n[:-6] + "lora_B")
        expected = was if b is None else was + 8 * b @ saved["model"][n[:-6] + "lora_A"]
        assert torch.allclose(p, expected, atol=1e-6) and torch.allclose(p, dict(flat.named_parameters())[n], atol=1e-6), n
    folded = nano.read_checkpoint("whole")["model"]
    assert all(torch.equal(folded[n], p) for n, p in m.named_parameters())
    Path("hf/model.safetensors").write_bytes(Path("hf/model.safetensors").read_bytes()[:-2] + b"\0\1")
    with pytest.raises(SystemExit, match="hf: not the file that the adapters in .*whole"):
        nano.load_checkpoint("whole")


def test_a_directory_whose_tokenizer_we_cannot_read_is_one_line(here):
    checkpoint()
    export()
    Path("hf/tokenizer.json").write_text(json.dumps(dict(model=dict(type="Unigram", vocab=[]))))
    with pytest.raises(SystemExit, match="hf/tokenizer.json: model Unigram: expected BPE"):
        nano.load_checkpoint("hf")
    Path("hf/tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="hf: expected a tokenizer.json or a tokenizer.model in it"):
        nano.load_checkpoint("hf")
    with pytest.raises(SystemExit, match="vocab_size=64: the 264 of tokenizer bytes, or more, expected"):
        nano.to_hf(nano.Transformer(nano.Config(**SHAPE | dict(vocab_size=64))), here / "small", TOK)


def test_flags_on_the_rotary_embedding_reach_an_exported_model_and_adapters_too(here):
    checkpoint(), export()
    model, *_, = nano.open_model(nano.Options(init="hf", rope_theta=40_000.0, rope_factor=4.0, chat=True, device="cpu"), infra.setup(nano.Options(device="cpu")))
    assert (model.config.rope_theta, model.config.rope_factor, model.config.max_position_embeddings) == (40_000.0, 4.0, 1024)
    Path("few.jsonl").write_text(json.dumps(dict(messages=[*CHAT, dict(role="assistant", content="46")])) + "\n")
    sft.main(sft.Config(init="run", data="few.jsonl", val_fraction=0.0, steps=1, batch=1, lora_rank=2, out="lora", device="cpu", dtype="float32"))
    model, *_, = nano.open_model(nano.Options(init="lora", rope_factor=4.0, chat=True, device="cpu"), infra.setup(nano.Options(device="cpu")))
    assert (model.config.rope_factor, model.config.max_position_embeddings) == (4.0, 1024)
    export(to="longer", rope_factor=4.0)
    config = json.loads(Path("longer/config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"] and config["rope_scaling"]["factor"] == 4.0      # transformers 4 reads the first
    config = nano.hf_config("longer/config.json")
    assert (config.rope_factor, config.max_position_embeddings, config.original_max_position_embeddings) == (4.0, 1024, 256)


def test_a_template_inside_the_tokenizers_settings_tells_the_style(here):
    checkpoint(style="chatml"), export()
    settings = json.loads(Path("hf/tokenizer_config.json").read_text()) | dict(chat_template=Path("hf/chat_template.jinja").read_text())
    Path("hf/tokenizer_config.json").write_text(json.dumps(settings)), Path("hf/chat_template.jinja").unlink()
    assert nano.read_checkpoint("hf", fold=False)["train_config"]["style"] == "chatml"


def test_a_llama_that_transformers_would_refuse_is_not_exported(here):
    m = nano.Transformer(nano.Config(**SHAPE | dict(hidden_size=36, num_attention_heads=5, num_key_value_heads=5, head_dim=8, no_rope_layer_interval=0)))
    with pytest.raises(SystemExit, match="hidden_size=36: a multiple of num_attention_heads=5 expected"):
        nano.to_hf(m, "hf")
