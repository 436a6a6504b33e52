"""Hugging Face directories: the same logits and tokens as transformers, both ways; whatever we do not compute is refused by name."""
import json, struct

import pytest
import torch

import model as nano

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: no second opinion on its models")
safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed: no Hugging Face directories")

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=3)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
KINDS = {"smollm3": dict(), "untied": dict(tie_word_embeddings=False), "MHA": dict(num_key_value_heads=4), "MQA": dict(num_key_value_heads=1),
         "interval 2": dict(no_rope_layer_interval=2), "RoPE everywhere": dict(no_rope_layers=[1] * 5),
         "llama": dict(llama=True), "llama, tied": dict(llama=True, tie_word_embeddings=True), "wide heads": dict(llama=True, head_dim=16),
         "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=777.0), rms_norm_eps=1e-5),
         "YaRN": dict(rope_parameters=YARN, head_dim=16), "llama, YaRN": dict(llama=True, rope_parameters=YARN | dict(factor=2.5))}


def theirs(folder, llama=False, **change):
    """A random model of transformers, and saved in `folder`."""
    torch.manual_seed(0)
    kind = "Llama" if llama else "SmolLM3"
    hf = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE | change)).float().eval()
    for p in hf.parameters():                              # norms other than 1, logits that differ
        p.data += torch.randn_like(p) * 0.2
    hf.save_pretrained(folder)
    return hf


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_are_those_of_transformers_and_the_way_back_is_exact(tmp_path, kind):
    hf, ids = theirs(tmp_path / "a", **KINDS[kind]), torch.randint(0, 64, (2, 40))
    ours = nano.from_hf(tmp_path / "a")
    prompts = [[5, 6, 7], [8], [9] * 11]
    with torch.no_grad():
        assert (hf(ids).logits - ours(ids)).abs().max() < 1e-4
        nano.to_hf(ours, tmp_path / "b", dtype=torch.float32, shard_bytes=10_000 if kind == "llama" else 10**9)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
        assert (back(ids).logits - ours(ids)).abs().max() < 1e-4
        padded, seen = ([[x] * (11 - len(p)) + (p if x == 3 else [1] * len(p)) for p in prompts] for x in (3, 0))
        made = hf.generate(torch.tensor(padded), attention_mask=torch.tensor(seen), max_new_tokens=64, do_sample=False, pad_token_id=3)
        for row, (new, _) in zip(made[:, 11:].tolist(), nano.generate(ours, prompts, 64, temperature=0, stop_ids=[3])):
            assert row[:len(new)] == new and set(row[len(new):]) <= {3} and (new[-1] == 3 or len(new) == 64)
    assert {n: p.tolist() for n, p in hf.state_dict().items()} == {n: p.tolist() for n, p in back.state_dict().items()}
    again = nano.from_hf(tmp_path / "b")
    assert again.config == ours.config and all(map(torch.equal, again.parameters(), ours.parameters()))
    sizes = [sum(w.nbytes for w in safetensors.load_file(f).values()) for f in (tmp_path / "b").glob("*.safetensors")]
    assert len(sizes) == 1 if kind != "llama" else len(sizes) > 9 and max(sizes) <= 10_000


def test_without_a_length_of_its_own_yarn_extends_the_rows_that_are_there_and_written_is_the_length_that_yarn_uses(tmp_path):
    theirs(tmp_path / "a", rope_parameters=YARN)
    config = json.loads((tmp_path / "a/config.json").read_text())
    del config["rope_parameters"]["original_max_position_embeddings"]
    config.pop("original_max_position_embeddings", None)
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    assert nano.hf_config(tmp_path / "a/config.json").original_max_position_embeddings == 128
    ours = nano.Transformer(nano.Config(hidden_size=32, intermediate_size=48, rope_factor=4.0, max_position_embeddings=128))
    nano.to_hf(ours, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["rope_parameters"]["original_max_position_embeddings"] == 32


def test_a_documents_loss_in_a_packed_row_is_transformers(tmp_path):
    hf, lengths = theirs(tmp_path), (5, 17, 9)
    ours, row = nano.from_hf(tmp_path), torch.randint(0, 64, (1, sum(lengths)))
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    targets = row.roll(-1, 1).masked_fill(doc_ids != doc_ids.roll(-1, 1), -100)
    targets[0, -1] = -100
    with torch.no_grad():
        nll, _ = ours(row, doc_ids, targets)
        expected = sum(hf(part, labels=part).loss * (n - 1) for part, n in zip(row.split(lengths, 1), lengths))
    assert float(nll) == pytest.approx(float(expected), abs=1e-4)


def test_weights_are_read_in_the_wanted_dtype_and_written_in_bf16_by_default(tmp_path):
    hf = theirs(tmp_path / "a")
    ours = nano.from_hf(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    nano.to_hf(ours, tmp_path / "b")
    held = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(held[n], p.bfloat16()) for n, p in hf.state_dict().items() if n in held) and len(held) == 2 + 5 * 9
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_directory_of_transformers_4_is_read_too(tmp_path):
    hf, ids = theirs(tmp_path, llama=True, rope_parameters=dict(rope_type="default", rope_theta=777.0)), torch.randint(0, 64, (1, 9))
    edit(tmp_path, rope_parameters=..., rope_theta=777.0, rope_scaling=None, torch_dtype="float32", head_dim=None, pretraining_tp=2,
         is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": dict(kv_cache_dtype={})})      # SmolLM's
    with torch.no_grad():
        assert (hf(ids).logits - nano.from_hf(tmp_path)(ids)).abs().max() < 1e-4


def edit(folder, **change):
    """config.json with other values; ...: without."""
    path = folder / "config.json"
    c = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not ...}
    path.write_text(json.dumps(c))


@pytest.mark.parametrize("change, message", [
    (dict(hidden_act="gelu"), 'hidden_act="gelu": "silu" expected'), (dict(attention_bias=True), "attention_bias=true: false"),
    (dict(mlp_bias=True), "mlp_bias=true"), (dict(use_sliding_window=True), "use_sliding_window=true"),
    (dict(rope_interleaved=True), "rope_interleaved=true"), (dict(rope_scaling=dict(type="dynamic")), "dynamic"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1"), (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1.0, factor=8.0)), 'rope_parameters=.*"llama3".*factor'),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "linear"),
    (dict(layer_types=["full_attention"] * 4 + ["sliding_attention"]), "layer_types=.*sliding_attention"),
    (dict(no_rope_layers=[1, 0, 1, 1, 1]), "no_rope_layers"), (dict(logit_scale=2.0), "logit_scale=2.0: nothing of that name"),
    (dict(qk_norm=True), "qk_norm=true: nothing of that name"), (dict(model_type="qwen3"), "smollm3 expected"),
    (dict(hidden_size=...), "hidden_size expected"), (dict(num_key_value_heads=3), "num_key_value_heads=3"),
    (dict(hidden_size="wide"), 'hidden_size="wide": int expected'), (dict(hidden_size=64.0), "hidden_size=64.0: int expected"),
    (dict(num_attention_heads=None), "num_attention_heads=null: int expected"), (dict(rope_scaling="linear"), "config.json: "),
    (dict(rope_scaling=[1]), "config.json: "), (dict(layer_types=[{}]), "config.json: "),
    (dict(rope_parameters=dict(rope_type=["yarn"])), "config.json: "),
    (dict(hidden_size=2**20, head_dim=8), r"[\d,]+ bytes of weights: [\d,]+ parameters expected"), (dict(intermediate_size=50), r"\[32, 48\]: \[32, 50\] expected"),
    (dict(num_hidden_layers=6, no_rope_layers=None, layer_types=None), "9 weights are missing, model.layers.5"),
    (dict(num_hidden_layers=4, no_rope_layers=None, layer_types=None), "model.layers.4.*no such weight"),
])
def test_what_the_config_has_that_we_do_not_compute_is_refused_by_name(tmp_path, change, message):
    theirs(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(SystemExit, match=message):
        nano.from_hf(tmp_path)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("broken", [
    lambda whole: whole[:-100], lambda whole: whole[:5], lambda whole: b"", lambda whole: struct.pack("<Q", 2**60) + whole[8:],
    lambda whole: header(**{"model.norm.weight": dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])}),
    lambda whole: header(**{"model.norm.weight": dict(dtype="F32", shape=[32], data_offsets=[0, 4])}) + b"\0" * 4,
    lambda whole: whole[:8] + b"[" + whole[9:]])
def test_a_broken_weight_file_is_one_line_and_no_allocation(tmp_path, broken):
    theirs(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(SystemExit, match="(a whole safetensors file|parameters) expected"):
        nano.from_hf(tmp_path)


def test_no_config_no_weights_a_full_directory_and_what_transformers_lacks_are_one_line(tmp_path, monkeypatch):
    for folder, message in ((tmp_path, "config.json: FileNotFoundError"), (tmp_path / "a", "no .safetensors here")):
        if folder != tmp_path:
            theirs(folder)
            (folder / "model.safetensors").unlink()
        with pytest.raises(SystemExit, match=message):
            nano.from_hf(folder)
    shape = {k: v for k, v in SHAPE.items() if not k.endswith("token_id")}
    with pytest.raises(SystemExit, match="an empty directory expected"):
        nano.to_hf(nano.Transformer(nano.Config(**shape)), tmp_path)
    for change in (dict(qk_norm=True), dict(sliding_window=8)):
        with pytest.raises(SystemExit, match="qk_norm=.*sliding_window=.*none of them"):
            nano.to_hf(nano.Transformer(nano.Config(**shape | change)), tmp_path / "b")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="pip install safetensors"):
        nano.from_hf(tmp_path / "a")


def test_a_checkpoint_is_exported_from_the_command_line(tmp_path, capsys):
    m = nano.Transformer(nano.Config(**{k: v for k, v in SHAPE.items() if not k.endswith("token_id")} | dict(vocab_size=320)))
    nano.save_checkpoint(tmp_path, m)
    nano.main(nano.Options(init=str(tmp_path), export_hf=str(tmp_path / "hf")))
    hf, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32), torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        assert (hf(ids).logits - m(ids)).abs().max() < 0.02 and "wrote" in capsys.readouterr().out      # weights in bf16
