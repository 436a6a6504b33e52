"""data.py: every file format, the split, the shuffle, the mixture and the loader, against independent oracles."""
import itertools, json, os, re, threading, time, tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import data

TOK = data.get_tokenizer("bytes")


def quiet_prepare(path, **kwargs):
    return data.prepare(out=path / "out", **kwargs)


def fake_source(name, n_tokens, eos_every=0):
    """Token i of source `name` is i % 50000, so that a row says which one it is; every eos_every-th is an EOS."""
    tokens = (np.arange(n_tokens) % 50000).astype(np.uint16)
    if eos_every:
        tokens[eos_every - 1::eos_every] = 60000
    meta = dict(eos=60000, tokens=n_tokens, documents=1, bytes=n_tokens, split="document")
    return data.Source(name, tokens, tokens[:n_tokens // 2], meta, meta)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def documents_of(tokens):
    """Split a token file at its EOS, in plain Python."""
    out, current = [], []
    for t in tokens.tolist():
        if t == TOK.eos:
            out.append(bytes(current))
            current = []
        else:
            current.append(t)
    assert not current                                  # the file ends with an EOS
    return out


# --- tokenizers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw", [bytes(range(256)), b"\xff\xfe\x80abc", "käse 漢字 🙂".encode(), b"", b"\x00" * 5])
def test_bytes_round_trip_whatever_they_are(raw):
    assert TOK.encode(raw) == list(raw) and TOK.decode_bytes(TOK.encode(raw)) == raw


def test_text_that_looks_like_a_special_token_stays_text():
    for name in TOK.special:
        assert max(TOK.encode(name)) < 256 and TOK.decode(TOK.encode(name)) == name


def test_byte_tokenizer_ids_are_as_documented():
    assert list(TOK.special.values()) == list(range(256, 264)) and TOK.eos == 256 and TOK.vocab_size == 320
    assert [data.Tokenizer("", None, {}, {}, size).vocab_size for size in (56, 57)] == [64, 128]       # with 8 specials
    assert TOK.decode([104, 105, TOK.eos, TOK.special["<think>"]]) == "hi<|endoftext|><think>"
    assert TOK.decode([0xFF, 319, -100]) == "\ufffd" * 3 and TOK.decode(torch.tensor([104])) == "h"


def test_tiktoken_wrapper_adds_the_chat_tokens_and_pads():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\w+|\W+", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 258})
    tok = data.wrap_tiktoken(encoding, "tiny")
    assert tok.encode("the") == [257] and tok.eos == 258 and tok.vocab_size == 320
    assert tok.special["<|im_start|>"] >= 259 and len(set(tok.special.values())) == len(data.SPECIALS)
    assert tok.decode(tok.encode("the <|endoftext|> 漢")) == "the <|endoftext|> 漢"
    assert tok.eos not in tok.encode("<|endoftext|>")
    assert tok.decode([257, tok.eos, tok.special["<think>"], 319]) == "the<|endoftext|><think>\ufffd"
    assert tok.decode(tok.encode(b"a\xffb")) == "a\ufffdb"


def test_unknown_tokenizer_is_one_line():
    with pytest.raises(ValueError, match="--tokenizer=nonsense: .*expected bytes") as error:
        data.get_tokenizer("nonsense")
    assert "\n" not in str(error.value)


# --- token files: each bad input -------------------------------------------------------------------------------------

@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "x.bin"
    data.write_bin(path, ["abc", b"\xff\x00"], TOK, "x", {"note": 1})
    return path


def edit_sidecar(path, **changes):
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_token_file_holds_the_documents_and_the_sidecar_counts_them(token_file):
    assert data.open_bin(token_file, "bytes").tolist() == [97, 98, 99, 256, 255, 0, 256]
    meta = data.read_meta(token_file)
    assert (meta["documents"], meta["bytes"], meta["tokens"], meta["dtype"], meta["note"]) == (2, 5, 7, "uint16", 1)
    assert token_file.read_bytes() == bytes([97, 0, 98, 0, 99, 0, 0, 1, 255, 0, 0, 0, 0, 1])
    assert not list(token_file.parent.glob("*.tmp"))


def test_large_vocabulary_is_written_as_uint32(tmp_path):
    big = data.Tokenizer("big", lambda t: np.array([70000, 3]), {}, {}, 100_000)
    data.write_bin(tmp_path / "x.bin", ["?"], big, "x", {})
    tokens = data.open_bin(tmp_path / "x.bin")
    assert tokens.tolist() == [70000, 3, 100_000] and tokens.dtype == np.uint32


@pytest.mark.parametrize("changes, kwargs, message", [
    (dict(dtype="float32"), {}, "float32.*expected uint16 or uint32"),
    (dict(dtype="uint32"), {}, "14 bytes.*expected 28"),
    (dict(tokens=8), {}, "14 bytes.*expected 16 for 8 tokens"),
    (dict(tokens="7"), {}, "whole number"),
    (dict(vocab_size=256), {}, "token 256: expected ids below the vocabulary size 256"),
    ({}, dict(tokenizer="gpt2"), "made with tokenizer bytes: expected gpt2"),
    (dict(sha256="0"), dict(verify=True), "other content than recorded"),
])
def test_open_bin_says_what_is_wrong(token_file, changes, kwargs, message):
    edit_sidecar(token_file, **changes)
    with pytest.raises(ValueError, match=message) as error:
        data.open_bin(token_file, **kwargs)
    assert "\n" not in str(error.value) and str(token_file.with_suffix("")) in str(error.value)


def test_truncated_missing_and_empty_token_files_are_errors(token_file, tmp_path):
    token_file.write_bytes(token_file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="11 bytes, truncated.*expected 14"):
        data.open_bin(token_file)
    token_file.unlink()
    with pytest.raises(ValueError, match="0 bytes"):
        data.open_bin(token_file)
    token_file.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: .*expected the sidecar"):
        data.open_bin(token_file)
    data.write_bin(tmp_path / "empty.bin", [], TOK, "x", {})
    with pytest.raises(ValueError, match="empty corpus"):
        data.open_bin(tmp_path / "empty.bin")


def test_verify_finds_one_changed_token_that_the_cheap_check_cannot(token_file):
    raw = bytearray(token_file.read_bytes())
    raw[0] ^= 1
    token_file.write_bytes(raw)
    data.open_bin(token_file)
    with pytest.raises(ValueError, match="sha256"):
        data.open_bin(token_file, verify=True)


# --- corpora and preparation -----------------------------------------------------------------------------------------

def test_embedded_corpora_are_deterministic_and_keep_held_out_sums_away(tmp_path):
    first, again = (list(itertools.islice(data.math_documents(), 300)) for _ in range(2))
    assert first == again and len(set(first)) == 300
    for line in "\n".join(first).splitlines():
        for a, sign, b in re.findall(r"(\d+)([*+-])(\d+)=", line):
            result = line.split("=")[1].split(".")[0]
            if sign == "+" and (int(a) > 9 or int(b) > 9):
                assert not data.held_out(int(a), int(b)) and not data.held_out(int(b), int(a))
            if result and line.count("+") < 2:
                assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    assert data.column_sum(347, 658) == ["7+8=15", "4+5+1=10", "3+6+1=10"]
    assert data.column_sum(5, 99) == ["5+9=14", "0+9+1=10"]
    code, others = (set(data.stdlib_files(code=code)) for code in (True, False))
    assert not code & others and 0.25 < len(code) / len(code | others) < 0.4                   # a third
    assert 0.07 < np.mean([data.held_out(a, b) for a in range(100) for b in range(100)]) < 0.13


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[:7] + ["", " \n"])
    [s] = quiet_prepare(tmp_path, jsonl=str(path), val_fraction=0.3)
    assert (s.meta["duplicates"], s.meta["empty"]) == (7, 2)
    train, val = documents_of(s.train), documents_of(s.val)
    assert sorted(train + val) == sorted(t.encode() for t in texts) and len(val) == s.val_meta["documents"] > 10


def test_validation_never_shares_a_document_with_training_and_ignores_order(tmp_path):
    texts = [f"text number {i % 150}" for i in range(200)]
    splits = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        [s] = quiet_prepare(tmp_path, jsonl=str(write_jsonl(tmp_path / f"{name}.jsonl", order)), val_fraction=0.2)
        assert not set(documents_of(s.train)) & set(documents_of(s.val))
        splits.append(set(documents_of(s.val)))
    assert splits[0] == splits[1] and 15 < len(splits[0]) < 45                                  # a fifth of 150


@pytest.mark.parametrize("n, val_fraction, split", [(19, 0.3, "tail"), (20, 0.3, "document"), (25, 0.01, "tail"), (25, 0.99, "tail")])
def test_fewer_than_20_documents_or_all_by_chance_on_one_side_are_cut_each_at_its_end(tmp_path, n, val_fraction, split):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * 500 for i in range(n)])
    [s] = quiet_prepare(tmp_path, jsonl=str(path), val_fraction=val_fraction)
    assert s.meta["split"] == split and len(s.train) and len(s.val)


def test_a_single_text_file_is_cut_exactly_at_the_fraction(tmp_path):
    raw = bytes(range(1, 256)) * 40 + b"tail"
    (tmp_path / "book.txt").write_bytes(raw)
    [s] = quiet_prepare(tmp_path, text=str(tmp_path / "book.txt"), val_fraction=0.1)
    cut = int(0.9 * len(raw))
    assert s.name == "book" and documents_of(s.train) == [raw[:cut]] and documents_of(s.val) == [raw[cut:]]


def test_sources_are_named_and_globs_and_folders_found(tmp_path):
    for i in range(3):
        (tmp_path / "in" / f"d{i}").mkdir(parents=True)
        (tmp_path / "in" / f"d{i}" / "a.md").write_text(f"hello {i} " * 50, encoding="utf-8")
    (tmp_path / "in" / ".hidden").write_text("no", encoding="utf-8")
    spec = f"{tmp_path}/in,mine={tmp_path}/in/d1,star={tmp_path}/in/*/a.md"
    sources = quiet_prepare(tmp_path, text=spec)
    assert [(s.name, s.meta["documents"]) for s in sources] == [("in", 3), ("mine", 1), ("star", 3)]
    with pytest.raises(ValueError, match="different names"):
        quiet_prepare(tmp_path, text=f"x={tmp_path}/in/d1,x={tmp_path}/in/d2")


def test_prepared_files_are_reused_until_something_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100, encoding="utf-8")
    stamp = lambda s: Path(s.train.filename).stat().st_mtime_ns
    [one], [two] = (quiet_prepare(tmp_path, text=str(path)) for _ in range(2))
    assert stamp(one) == stamp(two)
    old = one.train.copy()
    [three] = quiet_prepare(tmp_path, text=str(path), val_fraction=0.5)
    assert len(three.train) < len(old) and np.array_equal(one.train, old)      # what is mapped stays as it was
    path.write_text("other text " * 100, encoding="utf-8")
    assert b"other" in documents_of(quiet_prepare(tmp_path, text=str(path), val_fraction=0.5)[0].train)[0]
    path.write_text("third text " * 100, encoding="utf-8")                     # as long, but later
    os.utime(path, ns=(0, 0))
    [four] = quiet_prepare(tmp_path, text=str(path), val_fraction=0.5)
    assert b"third" in documents_of(four.train)[0]
    Path(four.val.filename).unlink()
    [five] = quiet_prepare(tmp_path, text=str(path), val_fraction=0.5)
    assert np.array_equal(five.val, four.val)
    other = data.Tokenizer("other", lambda text: np.frombuffer(data.as_bytes(text), np.uint8) ^ 1, {i: bytes([i ^ 1]) for i in range(256)}, {}, 256)
    [six] = quiet_prepare(tmp_path, text=str(path), val_fraction=0.5, tokenizer=other)
    assert six.meta["tokenizer"] == "other" and np.array_equal(six.train[:-1], five.train[:-1] ^ 1)


def test_overlap_is_the_share_of_13_grams_seen_in_training():
    words = [f"w{i}" for i in range(40)]
    held = [" ".join(words).encode(), b"too short"]                                 # 28 sequences of 13 words
    train = TOK.encode(" ".join(words[:20])) + [TOK.eos] + TOK.encode(" ".join(words[20:]))
    assert data.overlap(np.array(train), held, TOK) == pytest.approx((8 + 8) / 28)  # none across the two documents
    assert data.overlap(np.array(train + [TOK.eos] + train), held, TOK) == pytest.approx(16 / 28)          # what comes twice counts once


@pytest.mark.parametrize("line, message", [
    ("{bad", "b.jsonl:2: "), ("[1]", "b.jsonl:2: .*no key"), ('{"x": 1}', "b.jsonl:2: .*no key"),
    ('{"text": 3}', "b.jsonl:2: .*no key"), ('{"text": "\xff"}', "b.jsonl:2: ")])
def test_a_bad_jsonl_row_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=message + '.*expected {"text"'):
        quiet_prepare(tmp_path, jsonl=str(tmp_path / "b.jsonl"))


def test_main_turns_user_errors_into_one_line_exits(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("few words", encoding="utf-8")
    cases = [(dict(text=f"{tmp_path}/absent.txt"), "nothing found"),
             (dict(text=f"{tmp_path}/blank.txt"), "empty corpus"),
             (dict(text=f"{tmp_path}/short.txt"), "expected 257 or more"), (dict(val_fraction=1.0), "val_fraction")]
    for kwargs, message in cases:
        with pytest.raises(SystemExit) as error:
            data.main(data.Config(out=str(tmp_path / "out"), **kwargs))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_main_prints_the_tables_and_a_row_and_warns_above_five_epochs(tmp_path, capsys):
    path = write_jsonl(tmp_path / "tiny.jsonl", [f"{i} is a number, and so is {i + 1}" for i in range(300)])
    cfg = data.Config(jsonl=str(path), out=str(tmp_path / "out"), seq_len=64, plan_tokens=100_000, verify=True)
    metrics = data.main(cfg)
    printed = capsys.readouterr().out
    assert metrics["tiny"]["epochs"] > 5 and metrics["tiny"]["documents"] == 300
    assert 1.02 < metrics["tiny"]["tokens_per_byte"] < 1.05                                     # an end for every 30 bytes
    text = tmp_path / "one.txt"
    text.write_text("word " * 2000, encoding="utf-8")
    assert data.main(data.Config(text=str(text), out=str(tmp_path / "out"), seq_len=64))["one"]["documents"] == 1     # cut in two
    printed += capsys.readouterr().out
    assert "epochs of tiny" in printed and "<|endoftext|>│" in printed and "sha256" in printed


# --- permutation -----------------------------------------------------------------------------------------------------

def test_permute_is_a_bijection_for_every_n_up_to_1000():
    for n in range(1, 1001):
        assert sorted(data.permute(i, n, (7, n)) for i in range(n)) == list(range(n))


def test_permute_is_a_bijection_for_a_large_n_and_stays_in_range_for_huge_ones():
    n = 100_003
    assert len({data.permute(i, n, 5) for i in range(n)}) == n
    for n in (2**40, 2**40 + 1, 2**63):
        out = [data.permute(i * (n // 1000), n, 5) for i in range(1000)]
        assert len(set(out)) == 1000 and 0 <= min(out) and max(out) < n and max(out) > n * 0.99


def test_permute_differs_by_key_and_does_not_change_from_version_to_version():
    keys = (0, 1, 2**70, (1, 2), (2, 1), (1, 2, 0), -1)
    orders = [tuple(data.permute(i, 50, key) for i in range(50)) for key in keys]
    assert len(set(orders)) == len(orders)
    assert [data.permute(i, 10, (0, 1)) for i in range(10)] == [9, 7, 0, 5, 8, 4, 2, 6, 3, 1]
    assert [data.permute(i, 16, 0) for i in range(16)] == [3, 15, 9, 11, 1, 4, 2, 0, 8, 13, 14, 5, 10, 6, 12, 7]                        # a power of 4 needs no larger square


def test_permute_looks_uniform():
    """Chi-square of input block against output block; a good shuffle gives about 1 per degree of freedom."""
    n, k, values = 20_000, 20, []
    for key in range(5):
        table = np.zeros((k, k))
        for i in range(n):
            table[i * k // n, data.permute(i, n, key) * k // n] += 1
        values.append(((table - n / k**2) ** 2 / (n / k**2)).sum() / (k - 1) ** 2)
    assert 0.85 < np.mean(values) < 1.15
    small = np.zeros((5, 5))                            # for small n over many keys: where does each i go?
    for key, i in itertools.product(range(2000), range(5)):
        small[i, data.permute(i, 5, key)] += 1
    assert ((small - 400) ** 2 / 400).sum() / 16 < 2.5


# --- mixture ---------------------------------------------------------------------------------------------------------

SIZES = dict(text=300, code=200, math=100)


def test_mixture_specs_are_read_and_normalised():
    assert data.parse_mixture("text=3, code=1", SIZES) == [(1.0, dict(text=0.75, code=0.25, math=0.0))]
    staged = data.parse_mixture("0.7:text=1;1.0:code=2", SIZES)
    assert staged == [(0.7, dict(text=1, code=0, math=0)), (1.0, dict(text=0, code=1, math=0))]
    assert [end for end, _ in data.parse_mixture("", SIZES)] == [0.72, 0.89, 1.0]
    assert data.parse_mixture("smollm3", SIZES)[2][1]["code"] == pytest.approx(0.24)
    assert data.parse_mixture("", dict(a=30, b=10)) == [(1.0, dict(a=0.75, b=0.25))]


@pytest.mark.parametrize("spec, message", [
    ("text=1,poems=1", "no source poems: expected code, math, text"), ("text=-1,code=2", "none below 0"),
    ("text=0", "one above it"), ("text=nan", "none below 0"), ("text", "expected smollm3"),
    ("text=x", "expected smollm3"), (",", "expected smollm3"), ("0.9:text=1;0.5:code=1", "rising"),
    ("0.5:text=1;0.9:code=1", "the last one 1.0"),
    ("0:text=1;1:code=1", "rising"), ("text=1;code=1", "rising")])
def test_bad_mixtures_are_one_line_errors(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        data.parse_mixture(spec, SIZES)
    assert "\n" not in str(error.value)


# --- loader ----------------------------------------------------------------------------------------------------------

def loader_of(total=5000, seed=3, mixture="0.5:a=0.7,b=0.3;1.0:a=0.123,b=0.377,c=0.5", T=8, skip=""):
    sources = [fake_source("a", 8 * 997 + 1), fake_source("b", 8 * 400 + 5, eos_every=7), fake_source("c", 8 * 250 + 1)]
    return data.Loader(sources, mixture, T, total, seed, skip)


def test_every_sequence_comes_exactly_once_per_epoch_across_stage_changes():
    loader, seen = loader_of(), {}
    for g in range(5000):
        s, row, epoch = loader.locate(g)
        assert row not in seen.setdefault((s, epoch), set())
        seen[s, epoch].add(row)
    last = {s: max(e for t, e in seen if t == s) for s in range(3)}
    for (s, epoch), rows in seen.items():
        if epoch < last[s]:
            assert rows == set(range(loader.n_rows[s]))
    assert last[0] >= 1 and last[1] >= 2 and loader.n_rows == [997, 400, 250]


def test_epochs_seeds_and_sources_have_different_orders():
    def order(loader, s, epoch, n):
        return [r for g in range(5000) for t, r, e in [loader.locate(g)] if (t, e) == (s, epoch)][:n]
    one, other = loader_of(), loader_of(seed=4)
    assert order(one, 1, 0, 50) != order(one, 1, 1, 50) and order(one, 1, 0, 50) != order(other, 1, 0, 50)


def test_sources_of_one_size_and_stages_and_seeds_of_one_mixture_have_orders_of_their_own():
    found = {}
    for seed in (3, 4):
        loader = data.Loader([fake_source(name, 8 * 400 + 1) for name in "ab"], "0.5:a=1,b=1;1.0:a=1,b=1", 8, 4000, seed)
        places = [loader.locate(g) for g in range(4000)]
        found |= {(seed, name): [row for s, row, epoch in places if (s, epoch) == (i, 0)] for i, name in enumerate("ab")}
        found |= {(seed, start): [s for s, _, _ in places[start:start + 1000]] for start in (0, 2000)}
        assert found[seed, 0] == [s for s, _, _ in places[1000:2000]]                        # within a stage the pattern repeats
    assert len(set(map(tuple, found.values()))) == len(found) == 8


def test_the_order_of_a_run_does_not_change_from_version_to_version():
    loader = loader_of(total=100, mixture="0.29:a=0.7,b=0.3;1.0:a=0.3333,b=0.3333,c=0.3334")       # 0.29 * 100 < 29 in floats
    assert [stage[0] for stage in loader.stages] == [0, 29] and np.bincount(loader.stages[1][1]).tolist() == [333, 333, 334]
    assert [loader.locate(g)[:2] for g in (0, 1, 2, 28, 29, 30, 99)] == [(1, 186), (0, 944), (0, 608), (0, 209), (1, 165), (2, 248), (2, 55)]


def test_mixture_fractions_hold_to_one_slot_in_every_stage():
    loader = loader_of(total=10_000)
    for start, (_, weights) in zip((0, 5000), loader.mixture):
        counts = np.bincount([loader.locate(g)[0] for g in range(start, start + data.SLOTS)], minlength=3)
        assert np.abs(counts / data.SLOTS - list(weights.values())).max() <= 1 / data.SLOTS
        halves = np.bincount([loader.locate(g)[0] for g in range(start, start + data.SLOTS // 2)], minlength=3)
        assert np.abs(halves / data.SLOTS * 2 - list(weights.values())).max() < 0.1        # shuffled, not in blocks


def test_drawn_counts_what_locate_gives():
    loader = loader_of()
    for g in (0, 1, 999, 2500, 2501, 4999, 5000):
        assert loader.drawn(g).tolist() == np.bincount([loader.locate(k)[0] for k in range(g)], minlength=3).tolist()


def test_global_batch_is_the_same_for_1_2_and_4_ranks():
    loader = loader_of()
    for k, whole in enumerate(loader.batch(2480, 64)):
        for dp in (2, 4):
            assert torch.equal(whole, torch.cat([loader.batch(2480, 64, r, dp)[k] for r in range(dp)]))
    with pytest.raises(ValueError, match="multiple of 3"):
        loader.batch(0, 64, 0, 3)


def test_a_batch_depends_on_seed_and_position_only():
    used, fresh = loader_of(), loader_of()
    for consumed in (0, 4000, 96, 17):
        used.batch(consumed, 32)
    assert all(map(torch.equal, used.batch(1000, 32), fresh.batch(1000, 32)))
    parts = [fresh.batch(1000, 8)[0], fresh.batch(1008, 24)[0]]
    assert torch.equal(torch.cat(parts), fresh.batch(1000, 32)[0])
    assert not torch.equal(loader_of(seed=4).batch(1000, 32)[0], fresh.batch(1000, 32)[0])


def test_rows_are_windows_of_the_file_with_one_token_ahead():
    loader = loader_of()
    for g, row in zip(range(100, 140), loader.rows(100, 40)):
        s, r, epoch = loader.locate(g)
        assert row.tolist() == loader.sources[s].train[r * 8:r * 8 + 9].tolist() and row.dtype == np.int64
        assert loader.describe(g) == f"{'abc'[s]} row {r} (epoch {epoch})"


def test_labels_after_an_eos_are_masked_and_documents_numbered():
    rows = np.random.default_rng(0).integers(0, 4, (30, 13))               # 3 is the EOS
    ids, targets, doc_ids = data.to_batch(rows, eos=3)
    assert {x.dtype for x in (ids, targets, doc_ids)} == {torch.int64}
    for b, row in enumerate(rows.tolist()):
        document = 0
        for t in range(12):
            assert ids[b, t] == row[t] and doc_ids[b, t] == document
            assert targets[b, t] == (-100 if row[t] == 3 else row[t + 1])
            document += row[t] == 3


def test_loader_start_is_the_same_for_32_thousand_and_a_billion_steps():
    cost = []
    for steps in (32_000, 3_200_000, 10**9):
        loader_of(total=100)                                               # warm caches alike
        tracemalloc.start()
        loader = loader_of(total=steps * 1024)
        loader.batch(steps * 1024 - 64, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        begin = time.perf_counter()
        loader_of(total=steps * 1024)
        cost.append((peak, time.perf_counter() - begin))
    peaks, seconds = zip(*cost)
    assert max(peaks) < 1.1 * min(peaks) and max(peaks) < 2e6 and max(seconds) < 1


def test_too_little_text_for_a_row_is_an_error():
    with pytest.raises(ValueError, match="a.train: 8 tokens: expected 9 or more"):
        data.Loader([fake_source("a", 8)], "", 8, 100, 0)
    with pytest.raises(ValueError, match="a.val: 8 tokens"):
        next(data.val_batches(fake_source("a", 16), 8, 4))
    assert [data.count_rows("", range(n), 8) for n in (9, 16, 17, 24, 25)] == [1, 1, 2, 2, 3]       # the last row needs a last label


def test_validation_batches_cover_the_file_in_order_or_evenly():
    source = fake_source("a", 2 * (8 * 21 + 4))
    ids = torch.cat([batch[0] for batch in data.val_batches(source, 8, 4)])
    assert ids.shape == (21, 8) and ids.flatten().tolist() == source.val[:21 * 8].tolist()
    some = torch.cat([batch[0] for batch in data.val_batches(source, 8, 4, limit=7)])
    assert some[:, 0].tolist() == [8 * 3 * k for k in range(7)]


# --- rows that are left out ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, ranges", [
    ("", []), ("5:9", [(5, 9)]), ("0:1", [(0, 1)]), ("100:200,50:60", [(50, 60), (100, 200)]), ("1:5,5:8", [(1, 5), (5, 8)])])
def test_ranges_of_rows_are_read_and_sorted(spec, ranges):
    assert data.parse_ranges(spec) == ranges


@pytest.mark.parametrize("spec", ["5", "a:b", "5:", ":5", "5:5", "7:3", "-1:4", "1:2:3", "1:5;7:9", "1.5:3", "1:5,4:8",
                                  "1:9,2:3", "1:5,1:5", "1-5"])
def test_bad_ranges_of_rows_are_one_line_errors(spec):
    with pytest.raises(ValueError, match=rf'^--skip_samples={re.escape(spec)}: expected "a:b" or [^\n]*$'):
        data.parse_ranges(spec)
    with pytest.raises(ValueError, match="--skip_samples="):
        loader_of(skip=spec)


SKIPS = ["40:48", "0:16", "16:24,100:117,117:120,2490:2530", "0:1,2:3,4:5,6:7,299:301"]


@pytest.mark.parametrize("spec", SKIPS)
def test_skipping_leaves_out_exactly_these_rows_and_keeps_the_order_of_the_others(spec):
    """2500 is where the mixture changes: it stays at that row of the run's order."""
    plain, loader, ranges = loader_of(), loader_of(skip=spec), data.parse_ranges(spec)
    kept = [g for g in range(5000) if not any(a <= g < b for a, b in ranges)]
    assert [loader.number(k) for k in range(len(kept))] == kept
    for start, n in ((0, 400), (2400, 200)):
        expected = np.concatenate([plain.rows(g, 1) for g in kept[start:start + n]])
        assert np.array_equal(loader.rows(start, n), expected)


@pytest.mark.parametrize("spec", SKIPS)
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_skipped_rows_are_the_same_for_any_number_of_ranks(spec, dp):
    plain, loader = loader_of(), loader_of(skip=spec)
    kept = [g for g in range(5000) if not any(a <= g < b for a, b in data.parse_ranges(spec))]
    for consumed in (0, 32, 96, 2464):
        whole = data.to_batch(np.concatenate([plain.rows(g, 1) for g in kept[consumed:consumed + 32]]), 60000)
        for k, expected in enumerate(whole):
            assert torch.equal(expected, torch.cat([loader.batch(consumed, 32, rank, dp)[k] for rank in range(dp)]))


def test_ranges_that_a_run_has_passed_are_those_before_its_last_row():
    spec = "0:2,5:8,8:9,12:20"                          # trained on: 2 3 4 9 10 11 20 21 ...
    order, passed = [g for g in range(40) if g in (2, 3, 4, 9, 10, 11) or g >= 20], []
    for k in range(12):
        last = order[k - 1] if k else -1
        assert data.skipped(spec, k) == [(a, b) for a, b in data.parse_ranges(spec) if a < last]
        passed.append(len(data.skipped(spec, k)))
    assert passed == [0, 1, 1, 1, 3, 3, 3, 4, 4, 4, 4, 4] and data.skipped("", 100) == []


def test_a_row_of_a_run_with_skipped_rows_is_described_by_its_number_in_the_runs_order():
    loader = loader_of(skip="16:24")
    assert [loader.number(k) for k in (15, 16, 17)] == [15, 24, 25]
    s, row, epoch = loader.locate(24)
    assert loader.describe(loader.number(16)) == f"{'abc'[s]} row {row} (epoch {epoch})" == loader_of().describe(24)


# --- prefetch --------------------------------------------------------------------------------------------------------

def test_prefetch_gives_the_direct_batches_and_ends_its_thread():
    loader, before = loader_of(), threading.active_count()
    got = list(data.prefetch(loader, 40, 16, 9, dp_rank=1, dp_size=2))
    assert len(got) == 9
    for step, batch in enumerate(got):
        assert all(map(torch.equal, batch, loader.batch(40 + 16 * step, 16, 1, 2)))
    batches = data.prefetch(loader, 0, 16, 10**9)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_prefetch_works_ahead_but_not_beyond_its_depth():
    loader, made = loader_of(), []
    plain = loader.batch
    loader.batch = lambda start, *rest: made.append(start) or plain(start, *rest)
    batches = data.prefetch(loader, 0, 4, 100, depth=3)
    next(batches)
    time.sleep(0.2)
    assert made == [0, 4, 8, 12]
    batches.close()


def test_prefetch_raises_what_went_wrong_in_its_thread():
    loader, before = loader_of(), threading.active_count()
    plain = loader.batch
    loader.batch = lambda start, *rest: plain(start, *rest) if start < 8 else 1 / 0
    batches = data.prefetch(loader, 0, 4, 10)
    next(batches), next(batches)
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert threading.active_count() == before


def test_a_folder_with_runs_in_it_is_read_without_them(tmp_path):
    """Else every start would find other documents, and prepare them anew."""
    for file in ("a.txt", "sub/b.txt", "out/base/c.txt", "out/base/ckpt_00000007.pt", "out/base/metrics.jsonl", "out/data/a.train.bin", "out/data/a.train.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"text of {file}")
    [(_, files)] = data.find_files("text", str(tmp_path))
    assert [f.name for f in files] == ["a.txt", "c.txt", "b.txt"]
    [(_, files)] = data.find_files("text", str(tmp_path / "out/data/a.train.json"))        # asked for by name
    assert len(files) == 1


@pytest.mark.parametrize("change, message", [
    (dict(plan_tokens=-1), "--plan_tokens=-1: expected 0"), (dict(plan_tokens=10**30), "--plan_tokens"), (dict(seq_len=0), "--seq_len=0"),
    (dict(mixture="a=1e308,b=1e308"), "none below 0 and one above it"), (dict(mixture="a=1,a=2"), "--mixture=a=1,a=2: expected")])
def test_what_data_cannot_do_is_one_line(tmp_path, change, message):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some words and more of them\n" * 200)
    with pytest.raises(SystemExit, match=message):
        data.main(data.Config(text=f"{tmp_path}/a.txt,{tmp_path}/b.txt", out=str(tmp_path / "out"), **change))


def test_epochs_are_rows_drawn_by_rows_there(tmp_path):
    (tmp_path / "a.txt").write_text("some words and more of them\n" * 200)
    loader = data.Loader(data.prepare(str(tmp_path / "a.txt"), out=tmp_path), "", 16, 1000, 0)
    assert loader.epochs(loader.n_rows[0] * 3) == {"a": 3.0}
