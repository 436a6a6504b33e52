"""Tokenizers of others: ids as the package tokenizers gives them, both ways; what tiktoken's form cannot express is refused."""
import base64, copy, functools, itertools, json, random
from pathlib import Path

import pytest
import torch

import data

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed: no second opinion on our ids")
tiktoken = pytest.importorskip("tiktoken", reason="the package tiktoken is not installed: only bytes can be tokenized")
pre = tokenizers.pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
LINES = [
    "Hello world, don't stop: we've 1234567 things!!  They'LL see'S, 3.14159 0x1F ½ ²³ Ⅷ ① ١٢٣ १२३ ๑๒",
    "Быстрая коричневая лиса. Η γρήγορη αλεπού πηδάει. Schnelle Füchse, Straße ſ 'ſ DON'ſ É",
    "敏捷的棕色狐狸跳过懒狗。12345个词元 すばやい茶色のキツネは カタカナ ﾊﾝｶｸ 날쌘 갈색 여우가 \u1112\u1161\u11ab\u1100",
    "الثعلب البني السريع ٣٫١٤ השועל החום המהיר", "तेज़ भूरी लोमड़ी आलसी कुत्ते ด่วนสุนัขจิ้งจอกสีน้ำตาล விரைவான பழுப்பு நரி",
    "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣ 😀😀😀 𝔘𝔫𝔦 𝟘𝟙 𐍈", "e\u0301 a\u0323\u0301 A\u030a o\u0308\u0304 n\u0303\u0338 =\u0338",
    "def f(x):\n    return x**2  # comment\n\n\n\tif (a!=b && c<=d) { foo->bar(); }\r\n\r\nhttps://a.b/?q=a%20b&x=1",
    "<|endoftext|><|im_start|>user <s></s> <|begin_of_text|> <|user|>", "     \n     \n  x, \t\t, \n, y, \n ",
    "\u00a0\u00a0x\u3000\u3000y\u2003 \u2028\u2029\u0085\x0b\x0c\x1c\x1d z\ufeff\u200b\x00\x01\x7f\x80\x9f"]


def texts():
    rng, letters = random.Random(0), "".join(LINES) + " \n\t\r'\"sStT0123456789-_/<>|.," * 9
    out = [*LINES, "\n".join(LINES), "", " ", "\n", "é", (ROOT / "train.py").read_text(encoding="utf-8")[3000:7000]]
    out += ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(90)]
    out += ["".join(rng.choices(" \n\r\t\u00a0\u3000a1.", k=rng.randrange(1, 30))) for _ in range(40)]
    return out + ["".join(chr(rng.randrange(0xd800)) for _ in range(rng.randrange(1, 9))) for _ in range(60)]


def split(pattern, behavior="isolated", invert=False):
    return pre.Split(tokenizers.Regex(pattern), behavior, invert)


TEXTS, LEVEL, GPT2 = texts(), pre.ByteLevel(add_prefix_space=False, use_regex=False), pre.ByteLevel(add_prefix_space=False)
LOW, UP = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = "|".join([rf"[^\r\n\p{{L}}\p{{N}}]?{UP}*{LOW}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?", rf"[^\r\n\p{{L}}\p{{N}}]?{UP}+{LOW}*",
                   r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
PRE = {"GPT-2": [GPT2], "Llama 3": [split(data.LLAMA3), LEVEL], "Qwen 2": [split(data.LLAMA3.replace("{1,3}", "")), LEVEL],
       "SmolLM2": [pre.Digits(True), GPT2], "runs of digits": [pre.Digits(False), GPT2],
       "DeepSeek": [*map(split, DEEPSEEK), LEVEL], "Tekken": [split(TEKKEN), LEVEL], "possessive": [split(POSSESSIVE), LEVEL],
       "what a regex leaves": [split(r"\p{L}+|\p{N}"), LEVEL], "groups, then more": [split(r"(\p{L})\p{L}*|\p{N}"), GPT2],
       "ends of lines": [split(r"\s+$|^\s+|[$^]"), LEVEL],
       "leaves nothing": [split(data.LLAMA3, "removed", True), LEVEL], "drops": [split(r"\p{L}+", "removed", True), LEVEL],
       "strings": [pre.Split("e.", "isolated"), pre.Split(" |\n", "isolated"), LEVEL],
       "set in a set": [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), GPT2], "nothing is cut": [LEVEL]}


@functools.cache
def trained(kind):
    """The content of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.Sequence(PRE[kind]), tokenizers.decoders.ByteLevel()
    if kind == "Qwen 2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=LEVEL.alphabet(), show_progress=False,
                                             special_tokens=["<|endoftext|>", "<|im_start|>"])
    tokenizer.train_from_iterator(LINES * 5 + [(ROOT / "README.md").read_text(encoding="utf-8")[:12000]], trainer)
    return tokenizer.to_str()


def tiny(*merges, start=None):
    """The content of a tokenizer.json, GPT-2's way. start: (name, id) of what begins a text."""
    vocab = {c: i for i, c in enumerate([*sorted(data.CHARS.values()), *dict.fromkeys(m.replace(" ", "") for m in merges)])}
    level, post = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True), None
    if start:
        single = [dict(SpecialToken=dict(id=start[0], type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
        named = {start[0]: dict(id=start[0], ids=[start[1]], tokens=[start[0]])}
        post = dict(type="TemplateProcessing", single=single, pair=single, special_tokens=named)
    return dict(version="1.0", added_tokens=[], normalizer=None, pre_tokenizer=level, post_processor=post, decoder=level,
                model=dict(type="BPE", vocab=vocab, merges=list(merges)))


def add(spec, *names, **change):
    """spec with further added tokens, not special ones unless `change` says so."""
    spec = copy.deepcopy(spec)
    for name in names:
        n = 1 + max(len(spec["model"]["vocab"]) - 1, *(t["id"] for t in spec["added_tokens"]), -1)
        plain = dict(id=n, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
        spec["added_tokens"].append(dict(content=name, **plain | change))
    return spec


def read(folder, spec):
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec), encoding="utf-8")
    return data.get_tokenizer(str(folder))


def theirs(spec):
    tokenizer = tokenizers.Tokenizer.from_str(spec if isinstance(spec, str) else json.dumps(spec))
    tokenizer.encode_special_tokens = True              # as text: by default, text that names one becomes one
    return tokenizer


def check(tokenizer, spec, given=TEXTS):
    """The library gives our ids, for its own file and for the exported one. -> them"""
    ids = [tokenizer.encode(text) for text in given]
    assert ids == [e.ids for e in theirs(spec).encode_batch(given, add_special_tokens=False)]
    assert ids == [e.ids for e in theirs(data.tokenizer_json(tokenizer)).encode_batch(given, add_special_tokens=False)]
    return ids


# --- ids -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", PRE)
def test_ids_are_the_librarys_and_a_file_written_from_them_is_the_same_tokenizer(kind, tmp_path):
    spec, order = json.loads(trained(kind)), random.Random(1).sample(range(700), 700)
    spec["model"]["vocab"] = {t: order[i] for t, i in spec["model"]["vocab"].items()}       # ids say nothing about ranks
    for t in spec["added_tokens"]:
        t["id"] = order[t["id"]]
    if len(kind) % 2:                                   # the other one of their ways to write a merge
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    ours = read(tmp_path, spec)
    ids = check(ours, spec)
    assert [theirs(spec).decode(i, skip_special_tokens=False) for i in ids] == [ours.decode(i) for i in ids]
    assert kind in ("drops", "Qwen 2") or [ours.decode(i) for i in ids] == TEXTS
    torch.save(ours.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for other in (read(tmp_path, data.tokenizer_json(ours)), data.get_tokenizer(state)):
        assert (other.name, other.state, other.special, other.size) == (ours.name, ours.state, ours.special, ours.size)
        assert [other.encode(text) for text in TEXTS[:60]] == ids[:60]


@pytest.mark.parametrize("kind", ["Llama 3", "GPT-2", "what a regex leaves"])
def test_a_hundred_thousand_times_the_same_character_is_encoded_alike(kind, tmp_path):
    check(read(tmp_path, trained(kind)), trained(kind), [c * 100_000 + "x" for c in "a 漢"])


def test_invalid_utf8_and_lone_surrogates_are_replaced(tmp_path):
    ours = read(tmp_path, trained("Llama 3"))
    assert ours.encode(b"a\xffb\xf0\x9f\x98") == ours.encode("a\ufffdb\ufffd") and ours.encode("a\ud800b") == ours.encode("a?b")


def test_every_vocabulary_that_is_accepted_gives_the_librarys_ids_for_all_short_texts(tmp_path):
    short, accepted = ["".join(t) for n in range(1, 6) for t in itertools.product("abc", repeat=n)], 0
    for seed in range(75):                              # merges in any order, several for a token, tokens that nothing leads to
        rng, words, merges = random.Random(seed), list("abc"), []
        for _ in range(rng.randrange(2, 8)):
            x, y = rng.choice(words), rng.choice(words)
            words += [x + y] * (x + y not in words)
            merges.insert(len(merges) if rng.random() < 0.7 else rng.randrange(len(merges) + 1), f"{x} {y}")
        if seed % 3 == 0:                               # every way to every token, as Llama 3 has it
            ways = [f"{w[:i]} {w[i:]}" for w in words for i in range(1, len(w)) if w[:i] in words and w[i:] in words]
            merges = ways if seed % 2 else rng.sample(ways, len(ways))
        spec = tiny(*merges)
        spec["model"]["ignore_merges"] = bool(seed % 4)
        if seed % 5 < 2:
            spec["model"]["vocab"].setdefault(rng.choice(("bb", "cab", "abca")), 300)
        try:
            ours = read(tmp_path, spec)
        except ValueError as error:
            assert "expected merges in order" in str(error) or "ignore_merges, and no merge to" in str(error)
            continue
        check(ours, spec, short)
        accepted += 1
    assert 25 < accepted < 65


def test_merges_of_a_token_amid_those_of_others_are_refused_for_their_ranks_differ(tmp_path):
    spec = tiny("a bc", "a b", "b c", "c d", "ab c")     # abcd: theirs ab cd; with abc before cd it were abc d
    spec["model"]["ignore_merges"] = True
    with pytest.raises(ValueError, match="expected merges in order"):
        read(tmp_path, spec)


def test_tokens_that_only_ignore_merges_reaches_are_made_whole(tmp_path):
    spec, rng = json.loads(trained("Llama 3")), random.Random(0)
    words = [t for t in spec["model"]["vocab"] if t not in data.SPECIALS]
    more = [rng.choice(words) + rng.choice(words) for _ in range(200)]
    more += ["qzx", "Ġqzx", "qzxqzx"]                   # the first has no halves: it is made whole and never a half
    for word in sorted(set(more) - set(words)):
        words.insert(rng.randrange(256, len(words)), word)
    ways = [f"{w[:i]} {w[i:]}" for w in words for i in range(1, len(w)) if {w[:i], w[i:]} <= set(words)]
    spec["model"].update(vocab={w: i for i, w in enumerate(words)}, merges=ways, ignore_merges=True)
    spec["added_tokens"] = []
    raw = [bytes(map(data.BYTES.get, w)).decode("utf-8", errors="replace") for w in more]
    check(read(tmp_path, spec), spec, TEXTS + ["".join(rng.choices(raw, k=rng.randrange(1, 6))) for _ in range(500)])
    spec["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="one that its bytes arrive at"):
        read(tmp_path, spec)


@pytest.mark.parametrize("kind, normalized", [("GPT-2", False), ("GPT-2", True), ("Qwen 2", False), ("Qwen 2", True)])
def test_added_tokens_are_found_in_text_the_longest_first_and_special_ones_never(kind, normalized, tmp_path):
    names = [" " * n for n in range(24, 1, -1)] + ["<x>|", "<x>|||", "a|"]
    spec = add(json.loads(trained(kind)), *names, normalized=normalized)
    spec = add(add(spec, "<think>"), "<|user|>", special=True)
    around = [" " * n + w + " " * n * n for n in range(25) for w in ("a", "\u0301", "\n", "<x>||||", "<x>|\u0338", "e\u0301a|")]
    ours = read(tmp_path, spec)
    found = set(itertools.chain(*check(ours, spec, [*TEXTS, *around, "<|user|><|im_start|><x>||<x>|"])))
    assert {t["id"] for t in spec["added_tokens"][2:-2]} <= found
    assert not set(ours.special.values()) & {*found, *ours.encode("<think> <|user|> <|im_end|>")}
    spec["added_tokens"].reverse()                      # the order of a file without a library that sorted it
    spec["model"]["vocab"] |= {t["content"]: t["id"] for t in spec["added_tokens"]}
    assert (read(tmp_path, spec).name, read(tmp_path, data.tokenizer_json(ours)).state) == (ours.name, ours.state)


# --- tiktoken, Llama 3's rank file, bytes ----------------------------------------------------------------------------

def ranks():
    """Tokens in the order of their ranks, the bytes first."""
    vocab = json.loads(trained("Llama 3"))["model"]["vocab"]
    tokens = sorted(set(vocab) - set(data.SPECIALS), key=lambda t: (len(t) > 1, vocab[t]))
    return [bytes(map(data.BYTES.get, t)) for t in tokens]


def rank_file(path):
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks())))
    return path


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_an_exported_tiktoken_encoding_has_its_ids_and_its_special_tokens_where_they_were(name, tmp_path, monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *a, **k: {})     # the ranks would be downloaded, the pattern is here
    known, first = public.ENCODING_CONSTRUCTORS[name](), 300 if name == "p50k_base" else 705
    mergeable = {t: i + (i >= first) for i, t in enumerate(ranks())}        # p50k has a special token amid the others,
    special = {s: first + 2 * n for n, s in enumerate(known["special_tokens"])}     # the newer ones have gaps
    encoding = tiktoken.Encoding(name, pat_str=known["pat_str"], mergeable_ranks=mergeable, special_tokens=special)
    ours = data.wrap_tiktoken(encoding, name)
    library, ids = theirs(data.tokenizer_json(ours)), [ours.encode(text) for text in TEXTS]
    assert ids == [encoding.encode(text, disallowed_special=()) for text in TEXTS]
    assert ids == [library.encode(text).ids for text in TEXTS]
    assert {s: library.token_to_id(s) for s in ours.special} == ours.special and special.items() <= ours.special.items()
    again = read(tmp_path, library.to_str())
    assert again.special == ours.special and [again.encode(text) for text in TEXTS] == ids


def test_a_rank_file_is_llama_3s_and_exported_it_is_the_same_tokenizer(tmp_path):
    ours, n = data.get_tokenizer(str(rank_file(tmp_path / "tokenizer.model"))), len(ranks())
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert [ours.special[s] - n for s in names] == [0, 1, 6, 7, 9] and ours.special["<|reserved_special_token_250|>"] == n + 255
    assert (ours.bos, ours.eos, ours.special["<|pad|>"], ours.size) == (n, n + 1, n + 2, n + 256)
    assert ours.vocab_size % 64 == 0 and 0 <= ours.vocab_size - ours.size < 64 and ours.decode([n + 1]) == "<|end_of_text|>"
    check(ours, data.tokenizer_json(ours))
    assert theirs(data.tokenizer_json(ours)).encode("a").tokens == ["<|begin_of_text|>", "a"]
    from_folder = data.get_tokenizer(str(tmp_path))
    again = read(tmp_path, data.tokenizer_json(ours))
    assert (again.name, again.state, again.bos) == (ours.name, ours.state, n) and from_folder.name == ours.name


def test_bytes_written_as_tokenizer_json_and_read_back_are_bytes(tmp_path):
    ours = read(tmp_path, data.tokenizer_json(data.get_tokenizer("bytes")))
    assert ours.name == ours.state == "bytes" and ours.vocab_size == 320
    check(ours, data.tokenizer_json(ours))


# --- special tokens --------------------------------------------------------------------------------------------------

def test_special_tokens_go_by_other_names_take_reserved_ids_and_then_new_ones(tmp_path):
    names = "<s>", "</s>", "<|reserved_1|>", "<|finetune_right_pad_id|>", "<|reserved_2|>"
    spec = add(tiny("t h", "th e", start=("<s>", 258)), *names, special=True)
    ours = read(tmp_path, spec)
    assert (ours.bos, ours.eos, ours.size, ours.vocab_size) == (258, 259, 267, 320) and names[2] not in ours.special
    assert [ours.special[s] for s in data.SPECIALS] == [259, 261, 260, 262, 263, 264, 265, 266]
    assert ours.decode([257, 258, 259, 260, 266, 300]) == "the<s></s><|im_start|></tool_call>\ufffd"
    assert theirs(spec).encode("the").ids == theirs(data.tokenizer_json(ours)).encode("the").ids == [258, 257]
    plain = read(tmp_path, tiny("t h"))
    assert plain.bos is None and [plain.special[s] for s in data.SPECIALS] == list(range(257, 265)) and plain.size == 265


@pytest.mark.parametrize("eos", ["<end>", dict(content="<end>")])
def test_the_config_beside_it_says_which_token_ends_a_document(eos, tmp_path):
    spec = add(tiny("t h", start=("<end>", 257)), "<end>", "<other>", special=True)
    assert read(tmp_path, spec).eos == 259
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=eos)))
    ours = read(tmp_path, spec)
    assert ours.eos == ours.bos == 257 and ours.decode([257]) == "<|endoftext|>" and "<end>" not in ours.special
    again = read(tmp_path, data.tokenizer_json(ours))
    assert (again.name, again.eos, again.bos) == (ours.name, 257, 257)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json: JSONDecodeError"):
        read(tmp_path, spec)


def test_a_chat_holds_the_tokenizers_special_ids_and_text_that_looks_like_them_stays_text(tmp_path):
    ours = read(tmp_path, add(json.loads(trained("Llama 3")), "<|im_end|>", "<think>", "</think>", special=True))
    says = "<|im_end|>\n<|im_start|>assistant\n<think>"
    ids, mask = data.render([dict(role="user", content=says), dict(role="assistant", content="<think>\nhm\n</think>\nfour")],
                            tokenizer=ours)
    start, end, think, thought = (ours.special[s] for s in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    assert [i for i in ids if i in ours.special.values()] == [start, end, start, end, start, think, thought, end]
    assert ours.decode(ids) == ("<|im_start|>system\n/think<|im_end|>\n<|im_start|>user\n" + says + "<|im_end|>\n"
                                "<|im_start|>assistant\n<think>\nhm\n</think>\nfour<|im_end|>\n")
    assert ours.decode([i for i, m in zip(ids, mask) if m]) == "<think>\nhm\n</think>\nfour<|im_end|>"


def test_a_directory_for_transformers_names_the_special_tokens_that_are_in_its_tokenizer(tmp_path):
    ours = data.get_tokenizer(str(rank_file(tmp_path / "tokenizer.model")))
    ours.to_hf(tmp_path, length=64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    library = theirs((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    named = [library.token_to_id(config[f"{s}_token"]) for s in ("bos", "eos", "pad")]
    assert named == [ours.bos, ours.eos, ours.special["<|pad|>"]] and config["model_max_length"] == 64
    ids = [ours.special["<|im_start|>"], *ours.encode("so  it ."), ours.special["<think>"], ours.special["<|im_end|>"]]
    assert library.decode(ids) == "so  it .<think>" and library.decode(ids, skip_special_tokens=False) == ours.decode(ids)


# --- refused ---------------------------------------------------------------------------------------------------------

def top(**change):
    return lambda j: j.update(change)


def model(**change):
    return lambda j: j["model"].update(change)


def first(**step):
    return lambda j: j.update(pre_tokenizer=dict(type="Sequence", pretokenizers=[step, j["pre_tokenizer"]]))


def cut(regex, behavior="Isolated", invert=False):
    return first(type="Split", pattern=dict(Regex=regex), behavior=behavior, invert=invert)


def token(name, normalizer=None, **change):
    return lambda j: j.update(add(j, name, **change), normalizer=normalizer)


@pytest.mark.parametrize("change, message", [
    (model(type="WordPiece"), "model WordPiece: expected BPE"), (model(type="Unigram"), "model Unigram"),
    (model(type="WordLevel"), "model WordLevel"), (model(byte_fallback=True), "byte_fallback=True: expected False"),
    (model(dropout=0.1), "dropout=0.1: expected None"), (model(end_of_word_suffix="</w>"), "end_of_word_suffix=</w>"),
    (model(continuing_subword_prefix="##"), "continuing_subword_prefix=##"),
    (top(pre_tokenizer=dict(type="Metaspace")), "pre_tokenizer Metaspace: expected Digits and Split, and ByteLevel at the end"),
    (top(pre_tokenizer=None), "pre_tokenizer none"), (first(type="Whitespace"), "pre_tokenizer Whitespace"),
    (top(pre_tokenizer=dict(type="Digits", individual_digits=True)), "pre_tokenizer without ByteLevel"),
    (first(type="ByteLevel", add_prefix_space=False), "pre_tokenizer ByteLevel: expected .* at the end"),
    (lambda j: j["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space=true: expected false"),
    (cut("a", "Removed"), "Split Removed, invert=False"), (cut("a", "MergedWithNext"), "Split MergedWithNext"),
    (cut(r"\w+"), r"\\w in the regex of a Split"), (cut("[[:alpha:]]"), r"\[\[: in"), (cut(r"\p{N}{1,3}+"), r"\{1,3\}\+ in"),
    (cut("(?i)ss"), r"\(\?i in"), (cut("x*"), "no empty piece"), (cut(r"(?=(\d{3})+(?!\d))"), "no empty piece"),
    (cut("("), "missing"), (top(normalizer=dict(type="Lowercase")), "normalizer Lowercase: expected none or NFC"),
    (top(normalizer=dict(type="Sequence", normalizers=[dict(type="NFC"), dict(type="Prepend")])), "normalizer NFC, Prepend"),
    (lambda j: j["model"]["vocab"].pop("Ġ"), "bytes without a token"), (model(merges=["th e", "t h"]), "merges in order"),
    (model(merges=["t h", "t he", "h e"]), "token b'the': expected merges in order, and one that its bytes arrive at"),
    (model(merges=["t h", "t x"]), "KeyError 'tx'"), (model(merges=["t"]), "merge 0, 't': expected two tokens"),
    (model(merges=[], ignore_merges=True), "ignore_merges, and no merge to .b'th', b'the', b'he'"), (model(vocab=None), "TypeError"),
    (token("<m>", lstrip=True), "'<m>': expected lstrip"), (token("<m>", rstrip=True), "'<m>': expected lstrip, rstrip"),
    (token("<m>", single_word=True), "'<m>': expected lstrip, rstrip, single_word false"), (token(""), "added token ''"),
    (token("<m>", id=300), "added token '<m>' with id 300: expected 259"),
    (token("<m>", dict(type="NFC"), normalized=True), "added token '<m>' with normalizer NFC: expected normalized false"),
    (lambda j: j.pop("model"), "KeyError 'model'"), (lambda j: j["model"]["vocab"].update(th="x"), "byte-level BPE")])
def test_what_tiktokens_form_cannot_express_is_refused_by_name(change, message, tmp_path):
    spec = tiny("t h", "th e", "h e")
    change(spec)
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}") as error:
        read(tmp_path, spec)
    assert "\n" not in str(error.value)


def whole(raw):
    return lambda lines: [raw]


@pytest.mark.parametrize("change, message", [
    (whole(b""), "not every byte"), (whole(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02"), "a SentencePiece model"),
    (whole(b"[]"), "a SentencePiece model"), (whole(b"\xef\xbb\xbf{}"), "a SentencePiece model"),
    (whole(b"{"), "JSONDecodeError"), (whole(b'{"model": {"vocab": {"a'), "JSONDecodeError"),
    (whole(b'{"a":' * 99999), "RecursionError"),
    (whole(b'{"model": []}'), "AttributeError"), (lambda lines: lines[:255], "not every byte"),
    (lambda lines: lines[:300] + lines[301:], "ranks with gaps"), (lambda lines: lines[1:], "ranks with gaps"),
    (lambda lines: [*lines, b"Ig== %d" % len(lines)], "a token twice"), (lambda lines: [*lines, b"eHl6"], "no lines of base64"),
    (lambda lines: [*lines, b"Ig!= %d" % len(lines)], "no lines of base64"),
    (lambda lines: [*lines, b"eHl6 x"], "no lines of base64")])
def test_a_broken_file_is_one_line_that_names_it(change, message, tmp_path):
    path = rank_file(tmp_path / "tokenizer.model")
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    for name in (path, tmp_path):
        with pytest.raises(ValueError, match=f"tokenizer.model: .*{message}") as error:
            data.get_tokenizer(str(name))
        assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_and_a_missing_path_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="expected a tokenizer.json or a tokenizer.model in it"):
        data.get_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer.json: .*expected bytes, a file or folder"):
        data.get_tokenizer(str(tmp_path / "tokenizer.json"))


# --- fertility -------------------------------------------------------------------------------------------------------

def test_fertility_is_tokens_a_word_and_the_share_of_words_that_continue(tmp_path, capsys):
    read(tmp_path, tiny("t h", "th e"))
    (tmp_path / "a.txt").write_text("the cat, the hat...", encoding="utf-8")    # 6 words: the cat , the hat ...
    both = data.main(data.Config(fertility=True, tokenizer=f"bytes, {tmp_path}", text=f"own={tmp_path}/a.txt"))
    # bytes: 3 + 3 + 1 + 3 + 3 + 3 tokens. The other: 1 + 3 + 1 + 1 + 3 + 3, and 15 for the text, whose spaces count too.
    assert both["bytes"]["own"] == dict(words=6, fertility=16 / 6, continued=5 / 6, bytes_per_token=1.0)
    assert both[str(tmp_path)]["own"] == dict(words=6, fertility=12 / 6, continued=3 / 6, bytes_per_token=19 / 15)
    assert "own" in capsys.readouterr().out
