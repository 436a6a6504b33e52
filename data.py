"""
Text -> tokens -> rows: tokenizers, corpora, cleaning, mixture, shuffle, packing.

$ python data.py                                  # prepare the embedded corpora, print the tables, show one packed row
$ python data.py --text=notes/,wiki=dumps/*.txt   # your own text: every file a document, every item a source
$ python data.py --jsonl=corpus.jsonl             # rows such as {"text": "..."}
$ python data.py --hf=HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2     # the two flags that download
$ python data.py --mixture="0.7:text=0.8,code=0.2;1.0:text=0.5,code=0.5" --verify
$ python data.py --fertility --tokenizer=bytes,gpt2   # compare tokenizers: tokens per word
$ python data.py --show=chats.jsonl --style=smollm3   # chats or pairs as a model sees them, what is trained marked

What it teaches:
- Shuffle rows over the whole corpus, anew in every epoch. SmolLM3's first loader read one long file for batches on end,
  and its loss was 1.6 times as noisy.
- Build no index. Theirs grew with the steps, 16 bytes a row, 44 GB per process. Here row g of a run is computed from g
  alone: the state of the loader is one integer, and 10^9 steps start as quickly as ten.
- Rows are cut anywhere from the concatenated documents. Document ids keep attention inside a document, and the label
  after an end-of-text is masked: nothing there predicts how an unrelated document begins.
- A chat's ids and the mask of what is trained are built together, part by part. Found by searching the ids for headers, the
  mask is wrong as soon as a user writes one. Chats are packed whole, none of them is cut in two.
"""
import ast, base64, bisect, glob, hashlib, itertools, json, math, os, random, re, sys, sysconfig, time, unicodedata, warnings, zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from reprlib import repr as brief      # of what a message quotes: a long text is never copied whole

import numpy as np
import torch

import infra
from infra import one_line

FORMAT = 1      # of prepared files; a higher number makes everybody rebuild
SLOTS = 1000    # the mixture is a pattern of so many rows: weights are kept to within 1/SLOTS
SPECIALS = "<|endoftext|> <|pad|> <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call>".split()
# name -> stages: (share of the run at which the stage ends, {source: weight}). SmolLM3 left web / code / math 85/12/3
# after 8T of 11.1T tokens. Weights get normalised: those of its last published stage sum to 1.0057.
MIXTURES = {"smollm3": [(0.72, dict(text=85, code=12, math=3)), (0.89, dict(text=75, code=15, math=10)),
                        (1.0, dict(text=63, code=24, math=13))]}


def need(condition, what, expected):
    """ValueError in the form of all messages about input, unless the condition holds."""
    if not condition:
        raise ValueError(f"{what}: expected {expected}")


@dataclass
class Config:
    """What to prepare and what to show: the flags of data.py."""
    text: str = ""                # own text: FILE, DIR or GLOB; several with commas; NAME=PATH names the source
    jsonl: str = ""               # own JSON lines with a key "text", likewise
    hf: str = ""                  # Hugging Face datasets, NAME or NAME:CONFIG, streamed (needs the package datasets)
    hf_docs: int = 10_000         # documents to take from each of them
    tokenizer: str = "bytes"      # bytes, a file or folder of byte-level BPE, or a tiktoken encoding such as gpt2
    mixture: str = ""             # smollm3, "text=0.8,code=0.2", or stages "0.7:text=1;1.0:code=1"; default: smollm3 or by size
    passkey: int = 0              # a corpus to learn looking things up: documents of up to so many bytes (40 or more; 0: none)
    val_fraction: float = 0.05    # share of the documents held out for validation
    out: str = "out/data"         # folder of the token files
    seq_len: int = 256            # tokens per row
    plan_tokens: int = 2_867_200  # length of the run whose epochs the table counts; default: that of train.py
    seed: int = 0                 # order of the rows; corpora and split do not depend on it
    fertility: bool = False       # print tokens per word of each --tokenizer=A,B,... on the corpora, no more
    verify: bool = False          # compare every token file with its checksum
    show: str = ""                # print samples of this JSONL of chats, pairs or problems ("sums": the embedded ones), no more
    style: str = "compact"        # the chat template to show: compact, smollm3 or chatml


# --- tokenizers ------------------------------------------------------------------------------------------------------

ALIASES = {"<|endoftext|>": ("<|end_of_text|>", "</s>", "<eos>"), "<|pad|>": ("<|finetune_right_pad_id|>", "<pad>")}


class Tokenizer:
    """special: name -> id; eos: id; bos: id or None; size: all ids are below it; vocab_size: that, padded to a multiple of 64;
    encode_array: str | bytes -> (n,) ints; state: what a checkpoint keeps of it, to be given to get_tokenizer."""

    def __init__(self, name, encode_array, pieces, special, size, bos=None):
        self.name, self.state, self.encode_array, self.size, self.bos = name, name, encode_array, size, bos
        self.special, spare = dict(special), [s for s in special if "reserved" in s]
        for s in SPECIALS:
            known = [special[other] for other in (s, *ALIASES.get(s, ())) if other in special]
            if known:
                self.special[s] = known[0]
            elif spare:     # a reserved id
                self.special[s] = self.special.pop(spare.pop(0))
            else:
                self.special[s], self.size = self.size, self.size + 1
        self.pieces = pieces | {i: s.encode() for s, i in reversed(self.special.items())}       # id -> bytes
        self.eos, self.vocab_size = self.special[SPECIALS[0]], -(-self.size // 64) * 64

    def encode(self, text):
        """str | bytes -> list of ids. Text never becomes a special token, whatever it looks like."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids):
        """(n,) ids -> bytes. Specials appear by name, ids that stand for nothing as U+FFFD."""
        return b"".join([self.pieces.get(i, b"\xef\xbf\xbd") for i in np.asarray(ids).tolist()])

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_hf(self, directory, style="", length=0):
        """tokenizer.json, tokenizer_config.json and, unless style is empty, chat_template.jinja, for transformers' AutoTokenizer."""
        name = {i: s for s, i in reversed(self.special.items())}
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, padding_side="left",
                      model_max_length=length or int(1e30), bos_token=name.get(self.bos), pad_token=name[self.special["<|pad|>"]],
                      eos_token="<|im_end|>" if style else name[self.eos])
        (Path(directory) / "tokenizer.json").write_text(tokenizer_json(self), encoding="utf-8")
        infra.write_json(Path(directory) / "tokenizer_config.json", config)
        if style:
            (Path(directory) / "chat_template.jinja").write_text(JINJA[style], encoding="utf-8")


def as_bytes(text):
    """UTF-8; bytes stay as they are."""
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")      # lone surrogates become ?


def name_of(state):
    """The name of the tokenizer that a checkpoint keeps, without making it."""
    return state if isinstance(state, str) else state["name"]


def get_tokenizer(name):
    """-> Tokenizer. name: "bytes" (ids 0-255, then the specials, vocabulary 320); a path to byte-level BPE: a tokenizer.json
    of Hugging Face, a rank file as Llama 3's tokenizer.model, a folder that holds one; a tiktoken encoding; a `state`."""
    if isinstance(name, Tokenizer):
        return name
    if isinstance(name, dict):
        return bpe_tokenizer(**name)
    if name == "bytes":
        pieces = {i: bytes([i]) for i in range(256)}
        return Tokenizer(name, lambda text: np.frombuffer(as_bytes(text), np.uint8), pieces, {}, 256)
    if Path(name).exists():
        return read_tokenizer(Path(name))
    try:
        import tiktoken
        return wrap_tiktoken(tiktoken.get_encoding(name), name)
    except Exception as error:      # not installed, unknown, no network: tiktoken and its transport raise many types
        raise ValueError(f"--tokenizer={name}: {one_line(error)}: expected bytes, a file or folder, or a tiktoken encoding such "
                         "as gpt2 (pip install tiktoken; it is downloaded the first time)") from None


# Byte-level BPE in tiktoken's form: a regex cuts text into pieces; in each, the two neighbours whose bytes together make the
# token of the lowest rank merge, again and again. Hugging Face's files list the pairs that may merge instead. Both are the same
# if every token's own bytes, merged by what comes before it, end as a listed pair of it; a file where that fails is refused.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
          r"|\s+")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]       # GPT-2 writes other bytes as characters from 256 on
CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTES = {c: b for b, c in CHARS.items()}
# What Oniguruma (their tokenizers), Rust (tiktoken) and Python read differently in a regex; $ and ^ as Oniguruma means them;
# a text to try a regex on.
UNLIKE = re.compile(r"\\[^\W_DdPpSsnrtu]|\[\[:|--|~~|(?<!\\)\|\||\{,|\{[\d,]+\}[+?]|\(\?(?!i?:|=|!|>|<[=!]).")
LINE_ENDS = {"$": r"(?![^\n])", "^": r"(?<![^\n])"}
PROBE = "It's  1234567\r\n\n\t<é漢>e\u0301 😀."


def bpe_tokenizer(splits, ranks, special, added={}, dead="", nfc=False, bos=None, name=""):
    """-> Tokenizer. splits: regexes, each cutting up the pieces of the one before; ranks: lines of a token in base64 and its id,
    in the order of merging; special: name -> id; added: the same for tokens that text may hold by name; dead: lines of tokens
    that no text leads to; nfc: all but `added` is normalized; bos: id; name: by default a hash of all this."""
    import regex, tiktoken
    live, rest = tokens_of(ranks), tokens_of(dead)
    ids, pieces = np.array([i for _, i in live]), {i: token for token, i in live + rest} | {i: s.encode() for s, i in added.items()}
    bpe = tiktoken.Encoding(name, pat_str=splits[-1], mergeable_ranks={t: n for n, (t, _) in enumerate(live)}, special_tokens={})
    cut = [regex.compile(pattern, regex.V1).finditer for pattern in splits]
    need(all(m[0] for find in cut for m in find(PROBE)), f"splits {splits}", "no empty piece")
    by_name = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")") if added else None

    def encode_array(text):
        text, found = as_bytes(text).decode("utf-8", errors="replace"), []
        for i, part in enumerate(by_name.split(text) if added else [text]):
            if i % 2:
                found.append([added[part]])
                continue
            parts = [unicodedata.normalize("NFC", part) if nfc else part]
            for find in cut[:-1]:
                parts = [m[0] for part in parts for m in find(part)]
            found += [ids[bpe.encode_to_numpy(part)] for part in parts]
        return np.concatenate(found) if found else ids[:0]

    size = max(*pieces, *special.values()) + 1
    result = Tokenizer(name, encode_array, pieces, special, size, bos)
    state = dict(splits=splits, ranks=ranks, special=dict(sorted(result.special.items())), added=dict(sorted(added.items())),
                 dead=dead, nfc=nfc, bos=bos)
    result.name = name or "bpe-" + hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    result.state = state | dict(name=result.name)
    return result


def lines_of(tokens):
    """[(bytes, id)] -> lines of a token in base64 and its id."""
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in tokens)


def tokens_of(lines):
    """The inverse of lines_of, for str or bytes; ValueError if they are no such lines."""
    return [(base64.b64decode(token, validate=True), int(i)) for token, i in (line.split() for line in lines.splitlines())]


def wrap_tiktoken(encoding, name):
    """tiktoken.Encoding -> Tokenizer. It replaces invalid UTF-8; only "bytes" round-trips everything."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    special = {s: encoding.encode_single_token(s) for s in sorted(encoding.special_tokens_set)}
    return bpe_tokenizer([encoding._pat_str], lines_of(ranks), special, name=name)


def read_tokenizer(path):
    """A tokenizer.json, a rank file, or the folder that holds one -> Tokenizer, named after its content."""
    files = [f for f in (path / "tokenizer.json", path / "tokenizer.model") if f.is_file()] if path.is_dir() else [path]
    need(files, f"--tokenizer={path}", "a tokenizer.json or a tokenizer.model in it")
    try:
        file = files[0].with_name("tokenizer_config.json")      # file: the one that an error is about
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token") if file.exists() else None
        eos = eos["content"] if isinstance(eos, dict) else eos
        file = files[0]
        raw = file.read_bytes()
        spec = json_spec(json.loads(raw)) if raw.lstrip()[:1] == b"{" else rank_spec(raw)
        special, end = spec["special"], SPECIALS[0]
        if eos in special and eos != "<|im_end|>" and not {end, *ALIASES[end]} & set(special):
            special[end] = special.pop(eos)     # a name that we do not know: only the files say what ends a document
        result, plain = bpe_tokenizer(**spec), get_tokenizer("bytes")
    except Exception as error:      # broken files raise all kinds of it
        told = str(error) if ": expected" in str(error) else f"{type(error).__name__} {one_line(error)}: expected byte-level BPE"
        raise ValueError(f"{file}: {told}") from None
    # What to_hf has written of "bytes" is "bytes" again, not a BPE that is named after a hash.
    return plain if result.size == plain.size and tokenizer_json(result) == tokenizer_json(plain) else result


def rank_spec(raw):
    """Llama 3's tokenizer.model: lines of a token in base64 and its rank, which is its id. The special tokens follow."""
    try:
        live = sorted(tokens_of(raw), key=lambda item: item[1])
    except ValueError:
        raise ValueError("no lines of base64 and rank (a SentencePiece model?): expected a rank file as Llama 3's") from None
    need([i for _, i in live] == list(range(len(live))) and len(dict(live)) == len(live) and
         {t for t, _ in live[:256]} == {bytes([b]) for b in range(256)}, "ranks with gaps, a token twice or not every byte",
         "ranks from 0 on, the 256 bytes first")
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>", reserved[4],
             "<|eot_id|>", *reserved[5:]]
    return dict(splits=[LLAMA3], ranks=lines_of(live), special={s: len(live) + i for i, s in enumerate(names)}, bos=len(live))


def json_spec(j):
    """The content of a Hugging Face tokenizer.json -> arguments of bpe_tokenizer, or ValueError on what they cannot express."""
    model, normalizer = j["model"], j.get("normalizer") or dict(normalizers=[])
    nfc = [n["type"] for n in normalizer.get("normalizers", [normalizer])]
    need(model.get("type", "BPE") == "BPE", f"model {model.get('type')}", "BPE")
    for name, value in dict(byte_fallback=False, dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None).items():
        need(not model.get(name), f"{name}={model.get(name)}", f"{value}, as byte-level BPE has it")
    need(set(nfc) <= {"NFC"}, f"normalizer {', '.join(nfc)}", "none or NFC")
    special, added, vocab, end = {}, {}, model["vocab"], len(model["vocab"])
    for t in j.get("added_tokens") or ():
        i = vocab.get(t["content"], end)
        need(t["id"] == i, f"added token {t['content']!r} with id {t['id']}", f"{i}: their library counts them")
        end = max(end, i + 1)
        if t["special"] or t["content"] in SPECIALS:        # text never becomes one of these
            special[t["content"]] = t["id"]
        else:
            need(t["content"] and not (t["lstrip"] or t["rstrip"] or t["single_word"]), f"added token {t['content']!r}",
                 "lstrip, rstrip, single_word false")
            need(not (nfc and t["normalized"]) or re.fullmatch(r"[^;K`\x80-\U0010ffff]*[ \t\r\n|]", t["content"]),
                 f"added token {t['content']!r} with normalizer NFC", "normalized false")       # or what NFC never makes
            added[t["content"]] = t["id"]
    splits = pieces_of(j.get("pre_tokenizer") or dict(type="none"))
    need(set(CHARS.values()) <= set(vocab), "bytes without a token", "all 256 of them in the vocabulary")
    live, left = ordered(vocab, model["merges"], model.get("ignore_merges", False))
    taken = {*special, *added}
    dead = [(bytes(map(BYTES.get, t)), i) for t, i in left if t not in taken and set(t) <= set(BYTES)]
    if model.get("ignore_merges"):      # then a piece that is a token becomes it, though no merge leads there
        known = dict(live + dead)
        missing = [t for t, _ in dead if halves(t, known)]
        need(not missing, f"ignore_merges, and no merge to {missing}"[:99], "every merge of two tokens to a third")
        live, dead = live + dead, []
    post = j.get("post_processor") or {}
    starts = [p["single"][0] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
    bos = next((special.get(x["SpecialToken"]["id"]) for x in starts if "SpecialToken" in x), None)
    return dict(splits=splits, ranks=lines_of(live), special=special, added=added, dead=lines_of(dead), nfc=bool(nfc),
                bos=bos)


def pieces_of(pre):
    """A tokenizer.json's pre_tokenizer -> the regexes `splits`. What a regex does not match is a piece too, if theirs keeps it."""
    steps, splits = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre], []
    keep = "{0}|(?:(?!{0})[\\s\\S])+".format
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and step is steps[-1]:
            need(not step["add_prefix_space"], "add_prefix_space=true", "false")
            splits += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits":
            splits.append(keep(r"\p{N}" if step["individual_digits"] else r"\p{N}+"))
        elif kind == "Split":
            how, pattern = (step["behavior"], step["invert"]), step["pattern"]
            need(how in (("Isolated", False), ("Removed", True)), f"Split {how[0]}, invert={how[1]}",
                 "Isolated, or Removed inverted")
            pattern = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
            unlike = UNLIKE.search(pattern)
            need(not unlike, f"{unlike and unlike[0]} in the regex of a Split", "what all engines read alike")
            pattern = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]|[$^]", lambda m: LINE_ENDS.get(m[0], m[0]), pattern)
            splits.append(keep(pattern) if how[0] == "Isolated" else pattern)
        else:
            need(False, f"pre_tokenizer {kind}", "Digits and Split, and ByteLevel at the end")
    need(steps and kind == "ByteLevel", "pre_tokenizer without ByteLevel", "it at the end")
    return splits or [r"[\s\S]+"]


def merged(token, ranks):
    """A token's bytes, merged by all that comes before the token itself -> the parts that remain."""
    parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def halves(token, ranks):
    """All pairs of tokens that make this one."""
    return [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]


def ordered(vocab, merges, ignore_merges):
    """-> [(bytes, id)] in the order of merging, and [(characters, id)] of the tokens that no merge makes."""
    pairs, last = {}, -1
    ranks = {bytes([b]): n for n, b in enumerate(sorted(CHARS, key=lambda b: vocab[CHARS[b]]))}
    for n, merge in enumerate(merges):
        pair = tuple(bytes(map(BYTES.__getitem__, x)) for x in (merge.split(" ") if isinstance(merge, str) else merge))
        need(len(pair) == 2 and all(pair), f"merge {n}, {merge!r}", "two tokens")
        ranks.setdefault(pair[0] + pair[1], 256 + n)
        pairs.setdefault(pair[0] + pair[1], {})[pair] = n
    for token, listed in pairs.items():
        first = end = listed.get(merged(token, ranks))
        if first is None and ignore_merges and set(halves(token, ranks)) <= set(listed):    # made whole, or by any pair
            first, end = min(listed.values()), max(listed.values())
        need(first is not None and first > last, f"token {token!r}", "merges in order, and one that its bytes arrive at")
        last = end
    names = {token: "".join(CHARS[b] for b in token) for token in ranks}
    made = set(names.values())
    return [(token, vocab[name]) for token, name in names.items()], [(t, i) for t, i in vocab.items() if t not in made]


def tokenizer_json(tokenizer):
    """The content of a tokenizer.json with which Hugging Face's tokenizers gives the same ids."""
    spec = tokenizer.state if tokenizer.name != "bytes" else dict(
        splits=[r"[\s\S]+"], ranks=lines_of((bytes([b]), b) for b in range(256)), added={}, dead="", nfc=False)
    live, dead = tokens_of(spec["ranks"]), tokens_of(spec["dead"])
    ranks, merges, whole = {t: n for n, (t, _) in enumerate(live)}, [], False
    for token in (t for t, _ in live if len(t) > 1):
        parts = merged(token, ranks)
        whole = whole or len(parts) != 2
        merges += [parts] if len(parts) == 2 else halves(token, ranks)
    by_id = {i: s for s, i in reversed((spec["added"] | tokenizer.special).items())}
    text = lambda token: "".join(CHARS[b] for b in token)
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    special = lambda s: s not in spec["added"] and s not in SPECIALS[4:]        # those would vanish with skip_special_tokens
    # {1,3}+ is possessive to tiktoken, "repeated" to Oniguruma; where a branch ends with it, as cl100k's does, {1,3} is the same.
    split = lambda p: dict(type="Split", pattern=dict(Regex=re.sub(r"(\{\d,\d\})\+", r"\1", p)), behavior="Removed", invert=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    bos = {by_id[i]: dict(id=by_id[i], ids=[i], tokens=[by_id[i]]) for i in [tokenizer.bos] if i is not None}
    a, b = dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=s, special=special(s), **plain) for i, s in sorted(by_id.items())],
        normalizer=dict(type="NFC") if spec["nfc"] else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[*map(split, spec["splits"]), level]),
        post_processor=dict(type="TemplateProcessing", single=[*(dict(SpecialToken=dict(id=s, type_id=0)) for s in bos), a],
                            pair=[a, b], special_tokens=bos),
        decoder=level, model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                                  fuse_unk=False, byte_fallback=False, ignore_merges=whole,
                                  vocab={text(t): i for t, i in live + dead} | {s: i for i, s in by_id.items()},
                                  merges=[[text(a), text(b)] for a, b in merges])),
        ensure_ascii=False)


# --- token files: raw little-endian ids, and a JSON sidecar ----------------------------------------------------------

def write_bin(path, documents, tokenizer, source, facts):
    """Documents (str | bytes) -> `path`, uint16 or uint32 ids with EOS after each document, and its sidecar, which also
    takes `facts`, a dict that is read after the last document. Returns the sidecar."""
    path, digest, width = Path(path), hashlib.sha256(), 2 if tokenizer.vocab_size <= 65536 else 4
    meta = dict(dtype=f"uint{8 * width}", tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos,
                source=source, documents=0, bytes=0, tokens=0)

    def chunks():
        for document in map(as_bytes, documents):
            ids = np.append(tokenizer.encode_array(document), tokenizer.eos).astype(f"<u{width}")
            digest.update(ids)
            meta["documents"] += 1
            meta["bytes"] += len(document)
            meta["tokens"] += len(ids)
            yield ids

    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)       # first: a crash must not leave a sidecar of another file
    with infra.atomic(path) as f:
        f.writelines(chunks())
    meta.update(facts, sha256=digest.hexdigest())
    infra.write_json(path.with_suffix(".json"), meta)
    return meta


def read_meta(path):
    """The sidecar of a token file, or ValueError."""
    sidecar = Path(path).with_suffix(".json")
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
        missing = {"dtype", "tokenizer", "vocab_size", "eos", "tokens", "bytes", "documents", "sha256"} - set(meta)
        if missing or not isinstance(meta["tokens"], int):
            raise ValueError(f"no {', '.join(sorted(missing)) or 'whole number of tokens'}")
        return meta
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{sidecar}: {one_line(error)}: expected the sidecar that belongs to {path}") from None


def open_bin(path, tokenizer=None, verify=False):
    """Token file -> read-only memmap (tokens,) uint16 | uint32, checked against its sidecar and a tokenizer's name."""
    path, meta = Path(path), read_meta(path)
    need(meta["dtype"] in ("uint16", "uint32"), f"{path}: dtype {meta['dtype']!r} in its sidecar", "uint16 or uint32")
    need(tokenizer in (None, meta["tokenizer"]), f"{path}: made with tokenizer {meta['tokenizer']}", tokenizer)
    dtype, size = np.dtype(meta["dtype"]).newbyteorder("<"), path.stat().st_size if path.exists() else 0
    whole = meta["tokens"] * dtype.itemsize
    need(size == whole, f"{path}: {size} bytes, truncated or not {meta['dtype']}",
         f"{whole} for {meta['tokens']} tokens; delete it to rebuild")
    need(size, f"{path}: empty corpus", "at least one token")
    tokens, limit, edge = np.memmap(path, dtype, "r"), meta["vocab_size"], 2**26 // dtype.itemsize
    # The first and last 64 MB only: a wrong dtype or tokenizer shows at once, and reading terabytes would take hours.
    highest = max(tokens[:edge].max(), tokens[-edge:].max())
    need(highest < limit, f"{path}: holds token {highest}", f"ids below the vocabulary size {limit}")
    need(not verify or hashlib.sha256(tokens).hexdigest() == meta["sha256"],     # reads all of it
         f"{path}: other content than recorded", f"sha256 {meta['sha256']}; delete it to rebuild")
    return tokens


# --- embedded corpora: Python's own files and generated sums, nothing is downloaded ----------------------------------

def stdlib_files(code):
    """Sorted paths in Python's own library: a third for `code`, the others for the doc strings in `text`, so that
    none is seen twice; without tests, tables and installed packages."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    skip = "test tests idlelib lib2to3 turtledemo encodings pydoc_data site-packages dist-packages".split()
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]
        found += [Path(folder, f) for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
    return sorted(p for p in found if (zlib.crc32(p.relative_to(root).as_posix().encode()) % 3 == 0) == code)


def code_documents():
    """A third of the modules of Python's standard library, bytes each."""
    return (path.read_bytes() for path in stdlib_files(code=True))


def text_documents():
    """The language reference behind help(), then for every module one document with all its doc strings."""
    try:
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
    except ImportError:             # some distributions leave it out
        pass
    for path in stdlib_files(code=False):
        try:
            with warnings.catch_warnings(action="ignore"):      # old escape sequences warn
                nodes = ast.walk(ast.parse(path.read_bytes()))  # parsed, never imported
        except (SyntaxError, ValueError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        docs = [(getattr(n, "name", path.stem), ast.get_docstring(n)) for n in nodes if isinstance(n, kinds)]
        yield "\n\n".join(f"{name}\n{doc}" for name, doc in docs if doc)


def held_out(a, b):
    """Is a + b, in either order, of the tenth of all sums that are kept for testing? Then no corpus may state it."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


def column_sum(a, b, forget=False):
    """Written addition from the right: 347, 658 -> ["7+8=15", "4+5+1=10", "3+6+1=10"]. forget: without carrying."""
    steps, carry = [], 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = 0 if forget else total // 10
    return steps


def problem(rng):
    """Arithmetic with its answer: a product, a difference, a story or a sum; products and most sums with their working."""
    a, b = (rng.randrange(10 ** rng.randint(1, 4)) for _ in range(2))
    kind, who, what = rng.randrange(8), rng.choice("Ada Ben Mia Zoe".split()), rng.choice("apples books coins".split())
    if kind == 0:
        parts = [int(digit) * 10**i for i, digit in enumerate(reversed(str(b)))]
        return "\n".join([f"{a}*{b}=", *(f"{a}*{p}={a * p}" for p in parts if p), str(a * b)])
    if kind == 1 or held_out(a, b):
        return f"{max(a, b)}-{min(a, b)}={abs(a - b)}"
    if kind == 2:
        return f"{who} has {a} {what} and gets {b} more. How many are there now? {a}+{b}={a + b}. Answer: {a + b}"
    return "\n".join([f"{a}+{b}=", *column_sum(a, b), str(a + b)]) if kind < 6 else f"{a}+{b}={a + b}"


def math_documents():
    """10,000 documents of 4 to 12 problems, the same in every run."""
    for i in range(10_000):
        rng = random.Random(f"math {i}")        # one generator per document; the run's seed plays no part in it
        yield "\n".join(problem(rng) for _ in range(rng.randint(4, 12))) + "\n"


WORDS = "the a old red blue small slow quick river house bird tree stone walks sings is was over under near and then it".split()


def passkey(rng, length, depth):
    """Passkey retrieval (arXiv 2305.16300) -> (`length` bytes of words with a key such as "#7" at `depth`, 0 to 1, that end in
    "#"; the key's digit, which comes next)."""
    words, key = [], rng.choice("0123456789")
    while sum(map(len, words)) + len(words) < length - 9:
        words.append(rng.choice(WORDS))
    words.insert(round(depth * len(words)), f"#{key}")
    text = " ".join(words)
    return f"{text:{length - 2}} #", key


def passkey_documents(longest):
    for i in range(6000):
        rng = random.Random(f"passkey {i}")
        key, length, document = rng.choice("0123456789"), rng.randint(40, longest), ""
        often = min(0.3, rng.uniform(2, 15) * 5 / length)       # 2 to 15 times, however long it is: far apart where it is long
        while len(document) < length - 6:
            document += f"#{key} " if rng.random() < often else f"{rng.choice(WORDS)} "
        yield document + "\n"


# --- your own corpora ------------------------------------------------------------------------------------------------

def find_files(flag, spec):
    """"notes.txt,mine=dir,x/*.md" -> (source, sorted files) each; a source is called after its file or its folder."""
    for item in filter(None, map(str.strip, spec.split(","))):
        name, where = ("", item) if "=" not in item or Path(item).exists() else item.split("=", 1)
        path = Path(where).expanduser()
        pattern = glob.escape(str(path)) if path.exists() else str(path)
        if path.is_dir():
            pattern += "/**/*" if flag == "text" else "/**/*.jsonl"        # neither matches hidden files
        files = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        if not path.is_file():      # what runs have left there is no text
            runs = {p.parent for p in files if re.fullmatch(r"ckpt_\d+\.pt", p.name)}
            mine = r"ckpt_\d+\.pt|(config|scores)\.json|(metrics|pairs)\.jsonl"
            files = [p for p in files if not (re.search(r"\.(train|val)\.(bin|json)$", p.name) or
                                              p.parent in runs and re.fullmatch(mine, p.name))]
        need(files, f"--{flag}={item}: nothing found", "a file, a folder with files or a pattern")
        name = name or (path.stem if path.is_file() else path.resolve().name if path.is_dir() else path.parent.name)
        yield re.sub(r"[^\w.-]+", "_", name).strip("._") or flag, files


def read_rows(path, read, expected):
    """JSON lines -> read(object) of each, with what is wrong as file:line. A blank line is None."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                line = line.removeprefix(b"\xef\xbb\xbf").strip()     # a byte-order mark
                row = json.loads(line) if line else None
                if line and not isinstance(row, dict):
                    raise ValueError("no keys, for it is no JSON object")
                result = read(row)
            except (ValueError, RecursionError) as error:
                told = str(error) if ": expected" in str(error) else f"{one_line(error)}: expected {expected}"
                raise ValueError(f"{path}:{number}: {told}") from None
            yield result


def text_of(row):
    if row is None:
        return ""
    need(isinstance(row.get("text"), str), 'no key "text" with a string', '{"text": "..."}')
    return row["text"]


def read_hf(name, limit):
    try:
        import datasets
        repository, _, config = name.partition(":")
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        yield from map(text_of, itertools.islice(rows, limit))
    except Exception as error:      # not installed, no network, no such dataset, no key "text": their own message
        raise ValueError(f"--hf={name}: {one_line(error)}: expected a dataset (pip install datasets)") from None


def find_sources(text, jsonl, hf, hf_docs, passkey=0):
    """{source: (function that yields its documents, JSON-able identity: when it changes, the files are built anew)}"""
    found = []
    for flag, spec, read in (("text", text, lambda path: [path.read_bytes()]),
                             ("jsonl", jsonl, lambda path: read_rows(path, text_of, '{"text": "..."}'))):
        for name, files in find_files(flag, spec):
            identity = [flag, *((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files)]
            found.append((name, lambda f=files, read=read: itertools.chain.from_iterable(map(read, f)), identity))
    for item in filter(None, map(str.strip, hf.split(","))):
        name = re.sub(r"[^\w.-]+", "_", item.split("/")[-1])
        found.append((name, partial(read_hf, item, hf_docs), ["hf", item, hf_docs]))
    if passkey:
        need(passkey >= 40, f"passkey documents of up to {passkey} bytes", "40 or more, for the shortest")
        found.append((f"passkey{passkey}", partial(passkey_documents, passkey), ["passkey", passkey]))
    for make in () if found else (text_documents, code_documents, math_documents):
        found.append((make.__name__.split("_")[0], make, ["embedded", sys.version]))
    names = [name for name, _, _ in found]
    need(len(set(names)) == len(names), f"sources {', '.join(names)}", "different names, as in --text=a=PATH,b=PATH")
    return {name: rest for name, *rest in found}


# --- preparing: clean, split, tokenize -------------------------------------------------------------------------------

@dataclass
class Source:
    name: str
    train: np.ndarray   # (tokens,) uint16 | uint32, a memmap
    val: np.ndarray
    meta: dict          # the sidecar of train: tokens, documents, bytes, eos, duplicates, empty, split, ...
    val_meta: dict      # ... and of val, with overlap


def unique(documents, dropped):
    """Documents -> (bytes, number in [0, 1) from its hash), without empty and repeated ones, which are counted."""
    seen = set()                    # 16 bytes a document are all that stays in memory
    for document in map(as_bytes, documents):
        digest = hashlib.blake2b(document, digest_size=16).digest()
        if not document.strip() or digest in seen:
            dropped["duplicates" if digest in seen else "empty"] += 1
            continue
        seen.add(digest)
        yield document, int.from_bytes(digest[:6], "big") / 2**48


def build(name, documents, tokenizer, val_fraction, out, prepared, tail=False):
    """Write a source's two token files. A document's content decides where it goes, so neither order nor company
    matters, and one that two sources share is on the same side in both. With fewer than 20 documents (tail), the end of
    each is validation instead."""
    held, facts = [], dict(prepared=prepared, duplicates=0, empty=0)    # held: what goes to validation, in memory
    stream = unique(documents(), facts)
    first = list(itertools.islice(stream, 20))
    facts["split"] = "tail" if tail or len(first) < 20 else "document"

    def train_documents():
        for document, number in itertools.chain(first, stream):
            cut = len(document) * (number >= val_fraction)
            if facts["split"] == "tail":
                cut = int((1 - val_fraction) * len(document))
            if cut < len(document):
                held.append(document[cut:])
            if cut:
                yield document[:cut]

    meta = write_bin(out / f"{name}.train.bin", train_documents(), tokenizer, name, facts)
    if facts["split"] == "document" and not (held and meta["tokens"]):
        return build(name, documents, tokenizer, val_fraction, out, prepared, tail=True)    # chance put all on one side
    need(held and meta["tokens"], f"source {name}: empty corpus ({facts['empty']} empty documents)",
         "some text to split")
    facts["overlap"] = overlap(open_bin(out / f"{name}.train.bin"), held, tokenizer)
    write_bin(out / f"{name}.val.bin", held, tokenizer, name, facts)


def ngrams(text, end, n=13):
    """Documents joined by `end`, as bytes: yields every n words in a row, never across documents."""
    for document in text.split(end):
        words = document.split()
        yield from (b" ".join(words[i:i + n]) for i in range(len(words) - n + 1))


def overlap(train, held, tokenizer):
    """Share of validation's distinct 13-word sequences that training holds too: text that documents share, which exact
    deduplication leaves. From the first 200,000 sequences and 2^24 tokens, to bound the time."""
    end = tokenizer.pieces[tokenizer.eos]
    wanted = set(itertools.islice(ngrams(end.join(held), end), 200_000))
    chunks = (tokenizer.decode_bytes(train[i:i + 2**20]) for i in range(0, min(len(train), 2**24), 2**20))
    return len({words for chunk in chunks for words in ngrams(chunk, end) if words in wanted}) / max(1, len(wanted))


def is_current(path, prepared):
    try:
        return path.exists() and read_meta(path).get("prepared") == prepared
    except ValueError:
        return False


def prepare(text="", jsonl="", hf="", hf_docs=10_000, tokenizer="bytes", val_fraction=0.05, out="out/data", passkey=0):
    """-> list[Source], from the token files in `out`, which are built if missing or made from other files or settings.
    One process at a time: with several ranks let rank 0 go first. No seed: all runs see the same corpora and split."""
    need(0 < val_fraction < 1, f"--val_fraction={val_fraction}", "a number between 0 and 1")
    out, tokenizer, sources = Path(out), get_tokenizer(tokenizer), []
    for name, (documents, identity) in find_sources(text, jsonl, hf, hf_docs, passkey).items():
        prepared = hashlib.sha256(json.dumps([FORMAT, tokenizer.name, val_fraction, identity]).encode()).hexdigest()
        paths = [out / f"{name}.{part}.bin" for part in ("train", "val")]
        if not all(is_current(path, prepared) for path in paths):
            print(f"preparing {name} in {out}", flush=True)
            build(name, documents, tokenizer, val_fraction, out, prepared)
        sources.append(Source(name, *(open_bin(p, tokenizer=tokenizer.name) for p in paths), *map(read_meta, paths)))
    return sources


# --- mixture and shuffle ---------------------------------------------------------------------------------------------

def parse_mixture(spec, sizes):
    """Preset, "a=0.8,b=0.2", "0.7:a=1;1.0:a=0.5,b=0.5" or ""; sizes: source -> tokens.
    -> [(share of the run at which the stage ends, {source: weight})], the weights of a stage summing to 1."""
    stages = MIXTURES.get(spec or "smollm3")
    try:
        if spec == "" and set(sizes) != set(stages[0][1]):
            stages = [(1.0, sizes)]
        elif stages is None:
            stages = []
            for end, _, weights in (part.rpartition(":") for part in spec.split(";")):
                pairs = [pair.split("=") for pair in weights.split(",")]
                stages.append((float(end or 1), {name.strip(): float(weight) for name, weight in pairs}))
                if len(stages[-1][1]) < len(pairs):
                    raise ValueError("a name twice")
    except ValueError:
        raise ValueError(f'--mixture={spec}: expected smollm3, "a=0.8,b=0.2" or "0.7:a=1;1.0:a=0.5,b=0.5"') from None
    ends = [end for end, _ in stages]
    need(ends == sorted(set(ends)) and ends[0] > 0 and abs(ends[-1] - 1) < 1e-9,
         f"--mixture={spec}: stages end at {ends}", "rising shares of the run, the last one 1.0")
    for _, weights in stages:
        unknown = sorted(set(weights) - set(sizes))
        need(not unknown, f"--mixture={spec}: no source {', '.join(unknown)}", ", ".join(sorted(sizes)))
        need(min(weights.values()) >= 0 and 0 < sum(weights.values()) < math.inf,
             f"--mixture={spec}: weights {weights}", "none below 0 and one above it")
    return [(end, {name: weights.get(name, 0) / sum(weights.values()) for name in sizes}) for end, weights in stages]


@lru_cache(maxsize=256)
def round_keys(key):
    digest = hashlib.blake2b(repr([int(k) for k in key]).encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i:i + 8], "little") for i in range(0, 48, 8)]


def permute(i, n, key):
    """Where a shuffle of range(n) puts i; key: int or tuple of ints, n <= 2**63. A Feistel network permutes the next
    power of 4, and results outside range(n) go through it again until they fall inside (cycle walking). O(1) memory."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    if not 0 <= i < n <= 2**63:
        raise ValueError(f"permute({i}, {n}): expected 0 <= i < n <= 2**63")
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for k in round_keys(key if isinstance(key, tuple) else (key,)):
            x = (right + k) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ x >> 32 & mask
        i = left << half | right
        if i < n:
            return i


# --- rows ------------------------------------------------------------------------------------------------------------

def count_rows(name, tokens, seq_len):
    """Rows start every seq_len tokens and need one token more, the last label."""
    need(len(tokens) > seq_len, f"{name}: {len(tokens)} tokens", f"{seq_len + 1} or more: add text, shorten the rows "
         "(--seq_len, in train.py --max_position_embeddings) or raise --val_fraction")
    return (len(tokens) - 1) // seq_len


def to_batch(rows, eos):
    """(B, T+1) rows -> ids, targets, doc_ids, int64 tensors (B, T): the label after an EOS is -100, and documents are
    numbered inside their row, an EOS belonging to the document that it ends."""
    ends = rows[:, :-1] == eos
    batch = rows[:, :-1], np.where(ends, -100, rows[:, 1:]), np.cumsum(ends, axis=1) - ends
    return tuple(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in batch)


def parse_ranges(spec):
    """"100:200,500:600" -> [(100, 200), (500, 600)], sorted."""
    try:
        ranges = sorted(tuple(int(end) for end in item.split(":")) for item in spec.split(",") if item)
        ends = [end for pair in ranges for end in pair]
        if ends != sorted(ends) or any(not 0 <= a < b for a, b in ranges):
            raise ValueError
    except ValueError:
        raise ValueError(f'--skip_samples={spec}: expected "a:b" or "a:b,c:d", rows a to b - 1, without overlap') from None
    return ranges


def number(k, skip):
    """The k-th row that is trained on -> its number in the run's order, where the ranges of `skip` are left out."""
    for a, b in skip:
        k += (b - a) * (k >= a)
    return k


def skipped(spec, k):
    """The ranges of `spec` that a run has passed after k rows."""
    ranges = parse_ranges(spec)
    return [(a, b) for a, b in ranges if k and a < number(k - 1, ranges)]


class Loader:
    """Row g of a run of total_samples rows, computed from g and seed alone, whatever the ranks, batch size and history.
    A stage is a shuffled pattern of SLOTS sources, repeated; the u-th row drawn from a source is row
    u mod N of its shuffle number u // N, so every row comes once per epoch, across stages too. With skip, "a:b,c:d", rows
    a..b-1 and c..d-1 are not trained on, and those after them move up."""

    def __init__(self, sources, mixture, seq_len, total_samples, seed, skip=""):
        self.skip = parse_ranges(skip)
        self.sources, self.seq_len, self.seed, self.stages = sources, seq_len, seed, []
        self.n_rows = [count_rows(s.name + ".train", s.train, seq_len) for s in sources]
        self.mixture = parse_mixture(mixture, {s.name: len(s.train) for s in sources})
        start, drawn = 0, np.zeros(len(sources), np.int64)
        for i, (end, weights) in enumerate(self.mixture):
            exact = np.array(list(weights.values())) * SLOTS
            counts = np.floor(exact).astype(np.int64)           # then one more for the largest remainders
            counts[np.argsort(counts - exact, kind="stable")[:SLOTS - counts.sum()]] += 1
            order = [permute(slot, SLOTS, (seed, i)) for slot in range(SLOTS)]
            pattern = np.repeat(np.arange(len(sources)), counts)[order]
            before = np.zeros((SLOTS + 1, len(sources)), np.int64)      # rows of each source in the first i slots
            before[1:] = np.cumsum(pattern[:, None] == np.arange(len(sources)), axis=0)
            self.stages.append((start, pattern, before, drawn))
            start = round(end * total_samples)
            drawn = self.drawn(start)

    def number(self, k):
        return number(k, self.skip)

    def stage(self, g):
        """Stage of row g: its first row, pattern (SLOTS,), before (SLOTS+1, S), rows drawn in earlier stages (S,)."""
        return next(stage for stage in reversed(self.stages) if stage[0] <= g)

    def drawn(self, g):
        """(S,) how many of the first g rows come from each source."""
        start, _, before, earlier = self.stage(g)
        return earlier + (g - start) // SLOTS * before[-1] + before[(g - start) % SLOTS]

    def epochs(self, g):
        """{source: how often the first g rows go through it}."""
        return {s.name: float(taken / n) for s, taken, n in zip(self.sources, self.drawn(g), self.n_rows)}

    def locate(self, g):
        """Row g of the run -> (index of its source, row in that source, epoch)."""
        start, pattern, before, earlier = self.stage(g)
        block, slot = divmod(g - start, SLOTS)
        s = int(pattern[slot])
        epoch, j = divmod(int(earlier[s] + block * before[-1, s] + before[slot, s]), self.n_rows[s])
        name = int.from_bytes(self.sources[s].name.encode(), "big")     # hash() would differ from process to process
        return s, permute(j, self.n_rows[s], (self.seed, name, epoch)), epoch

    def describe(self, g):
        s, row, epoch = self.locate(g)
        return f"{self.sources[s].name} row {row} (epoch {epoch})"

    def rows(self, start, n):
        """The n rows that are trained on from the start-th on, counted from 0 -> (n, seq_len + 1) int64."""
        out, T = np.empty((n, self.seq_len + 1), np.int64), self.seq_len
        for k in range(n):
            s, row, _ = self.locate(self.number(start + k))
            out[k] = self.sources[s].train[row * T:row * T + T + 1]
        return out

    def batch(self, consumed, n, dp_rank=0, dp_size=1):
        """Rank dp_rank's part of rows consumed .. consumed + n: to_batch of (n / dp_size, seq_len + 1)."""
        need(n % dp_size == 0, f"a batch of {n} rows on {dp_size} ranks", f"a multiple of {dp_size}")
        return to_batch(self.rows(consumed + dp_rank * (n // dp_size), n // dp_size), self.sources[0].meta["eos"])


def val_batches(source, seq_len, batch_size, limit=0):
    """Batches of all rows of a source's validation tokens in file order, or of `limit` rows spread evenly over them."""
    n = count_rows(source.name + ".val", source.val, seq_len)
    picked = [k * n // limit for k in range(limit)] if 0 < limit < n else range(n)
    for at in range(0, len(picked), batch_size):
        rows = [source.val[k * seq_len:(k + 1) * seq_len + 1] for k in picked[at:at + batch_size]]
        yield to_batch(np.stack(rows).astype(np.int64), source.val_meta["eos"])


def prefetch(loader, consumed, n, steps, dp_rank=0, dp_size=1, depth=2):
    """The batches of `steps` steps from row `consumed` on, made up to `depth` ahead in one thread, which ends when the
    generator ends or is closed. What goes wrong in the thread is raised here."""
    starts = iter(range(consumed, consumed + steps * n, n))
    with ThreadPoolExecutor(max_workers=1) as thread:
        make = lambda start: thread.submit(loader.batch, start, n, dp_rank, dp_size)
        ahead = deque(map(make, itertools.islice(starts, depth)))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(map(make, itertools.islice(starts, 1)))
            yield batch


# --- chats: messages -> ids and what is trained, built together ------------------------------------------------------

PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
# What SmolLM3's template (alignment-handbook, recipes/smollm3/sft/sft.yaml) adds to it in /think, to the letter.
THINK_PERSONA = (
    " Your role as an assistant involves thoroughly exploring questions through a systematic thinking process before "
    "providing the final precise and accurate solutions. This requires engaging in a comprehensive cycle of analysis, "
    "summarizing, exploration, reassessment, reflection, backtracking, and iteration to develop well-considered thinking "
    "process. Please structure your response into two main sections: Thought and Solution using the specified format: "
    "<think> Thought section </think> Solution section. In the Thought section, detail your reasoning process in steps. "
    "Each step should include detailed considerations such as analysing questions, summarizing relevant findings, "
    "brainstorming new ideas, verifying the accuracy of the current steps, refining any errors, and revisiting previous "
    "steps. In the Solution section, based on various attempts, explorations, and reflections from the Thought section, "
    "systematically present the final solution that you deem correct. The Solution section should be logical, accurate, "
    "and concise and detail necessary steps needed to reach the conclusion.")
XML_TOOLS = ("You may call one or more functions to assist with the user query.\n\nYou are provided with function signatures "
             "within <tools></tools> XML tags:\n\n<tools>\n{}</tools>\n\nFor each function call, return a json object with "
             "function name and arguments within <tool_call></tool_call> XML tags.")
METADATA = ("## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {date}\nReasoning Mode: /{mode}\n\n"
            "## Custom Instructions\n\n{text}## Tools\n\n### XML Tools\n\n{xml}\n\n### Python Tools\n\n{python}\n\n")
THOUGHT = re.compile(r"<think>(.*?)</think>", re.S)     # what an assistant's content may begin with


def check_messages(messages):
    """Raises ValueError with the number of the message that is none."""
    need(isinstance(messages, list) and messages, f"messages {brief(messages)}", "a list of at least one")
    before = None
    for i, m in enumerate(messages):
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        need(role in ("system", "user", "assistant", "tool"), f"message {i}: role {role!r}",
             "system, user, assistant or tool")
        need(not m.get("tool_calls"), f"message {i}: tool_calls",
             "the call as text in content, for templates do not render it")
        # SmolLM3's data once had None here, which its template took for "no system message": every persona was
        # replaced by the default one, and no benchmark showed it (playbook, "Vibe-test your baselines").
        need(isinstance(content, str), f"message {i}: content {brief(content)}",
             "text; without a system message, no such entry")
        need(role != "system" or i == 0, f"message {i}: a system message", "it as the first message only")
        need(role != before or role == "tool", f"message {i}: a second {role} message in a row", "turns to alternate")
        before = role


def check_tools(tools):
    need(not tools or isinstance(tools, list) and all(isinstance(t, dict) for t in tools), f"tools {brief(tools)}",
         "a list of JSON objects")


def effective_mode(messages, mode):
    """A flag in the system message wins."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return "no_think" if "/no_think" in system else "think" if "/think" in system else mode


def system_text(system, mode, style, tools, date):
    """What stands in the system turn; None: there is none. `system`: the system message's text, None if it is missing."""
    need(style == "smollm3" or not tools, f"tools in style {style}", "style smollm3")
    if style == "chatml":
        return system
    text = (system or "").replace("/no_think", "").replace("/think", "").rstrip()
    if "/system_override" in text:
        return text.replace("/system_override", "").rstrip()
    if style == "compact":
        return f"/{mode}\n{text}".rstrip()
    # An empty system message asks for no persona. (Theirs gives it the default one. A flag alone does get that.)
    text = "" if system == "" else (text or PERSONA + THINK_PERSONA * (mode == "think")) + "\n\n"
    tools = tools if isinstance(tools, dict) else dict(xml=tools)
    check_tools(tools.get("xml") if set(tools) <= {"xml", "python"} else tools)
    xml = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools.get("xml") or ())
    return METADATA.format(date=date or time.strftime("%d %B %Y"), mode=mode, text=text,
                           xml=XML_TOOLS.format(xml) if xml else None, python=tools.get("python") or None)


def own_specials(text, style, tokenizer):
    """A system turn -> its parts: in what SmolLM3's template says itself, <think> and <tool_call> are the tokens of that name."""
    own = "|".join(map(re.escape, (THINK_PERSONA, XML_TOOLS.rpartition("{}")[2])))
    for i, part in enumerate(re.split(f"({own})", text) if style == "smollm3" else [text]):
        yield from (tokenizer.special.get(x, x) for x in re.split("(</?think>|</?tool_call>)", part)) if i % 2 else [part]


def render(messages, mode="think", style="compact", tools=None, date=None, add_generation_prompt=False, tokenizer=None,
           loss_on="assistant"):
    """Chat -> (ids, mask), two lists: mask 1 where a token is trained. Text never becomes a special token.

    messages: [{"role": system | user | assistant | tool, "content": text}]. style: compact, a short system turn with the mode;
    smollm3, SmolLM3's training template to the byte; chatml, turns and nothing else (mid-training). mode: think | no_think,
    unless the system message says /think or /no_think. tools: a list of JSON objects, or dict(xml=[...], python="...").
    Trained are the assistant's content, with the reasoning that it begins with, and the <|im_end|> that ends it; not headers,
    and not the empty reasoning that /no_think puts before an answer, for a prompt will hold it. (Their mask has both.)
    loss_on="all" trains everything. add_generation_prompt: end with the header of the answer that the model is to give.
    """
    for what, given, known in (("style", style, ("compact", "smollm3", "chatml")), ("mode", mode, ("think", "no_think")),
                               ("loss_on", loss_on, ("assistant", "all"))):
        need(given in known, f"{what} {given!r}", " or ".join(known))
    check_messages(messages)
    tokenizer, ids, mask = tokenizer or get_tokenizer("bytes"), [], []
    start, end, think, thought = (tokenizer.special[s] for s in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))

    def put(trained, *parts):
        for part in parts:
            new = [part] if isinstance(part, int) else tokenizer.encode(part)
            ids.extend(new)
            mask.extend([int(trained or loss_on == "all")] * len(new))

    mode = effective_mode(messages, mode)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    empty_thought = mode == "no_think" and style != "chatml"
    header = [start, "assistant\n"] + [think, "\n\n", thought, "\n"] * empty_thought
    text = system_text(system, mode, style, tools, date)
    if text is not None:
        put(False, start, "system\n", *own_specials(text, style, tokenizer), end, "\n")
    for i, m in enumerate(messages):
        role, content = m["role"], m["content"]
        if role == "assistant":
            content = content.lstrip("\n")
            found = THOUGHT.match(content)
            need(not found or not empty_thought, f"message {i}: reasoning in mode no_think",
                 "none (normalize takes it out)")
            put(False, *header)
            put(True, *([think, found[1], thought, content[found.end():]] if found else [content]), end)
            put(False, "\n")
        elif role != "system":
            put(False, start, ("user" if role == "tool" and style != "chatml" else role) + "\n" + content, end, "\n")
    if add_generation_prompt:
        put(False, *header)
    return ids, mask


# render in Jinja, for transformers' apply_chat_template: the same text to the byte, {% generation %} round what is trained. The
# mode is enable_thinking. What differs: no_think drops an answer's reasoning instead of refusing it, lone surrogates stay, and
# where a user writes the name of a special token, transformers takes it for that token.
CHECKS = r"""{% for m in messages %}
{% set bad = "role: expected system, user, assistant or tool" if m.role not in ["system", "user", "assistant", "tool"]
    else "tool_calls: expected the call as text in content" if m.tool_calls
    else "content: expected text; without a system message, no such entry" if m.content is not string
    else "a system message: expected it as the first message only" if m.role == "system" and not loop.first
    else "a second message of its role in a row" if not loop.first and m.role == loop.previtem.role and m.role != "tool" %}
{% if bad %}{{ raise_exception("message " ~ loop.index0 ~ ": " ~ bad) }}{% endif %}
{% endfor %}
"""
NO_TOOLS = '{% if tools or xml_tools or python_tools %}{{ raise_exception("tools: expected style smollm3") }}{% endif %}\n'
SYSTEM = r"""{% set system = messages[0].content if messages[0].role == "system" else none %}
{% set text = system or "" %}
{% set mode = "no_think" if "/no_think" in text or "/think" not in text and enable_thinking == false else "think" %}
{% set text = text.replace("/no_think", "").replace("/think", "").rstrip() %}
{% set names = {"user": "user", "tool": "user"} %}
<|im_start|>system
{% if "/system_override" in text %}{{ text.replace("/system_override", "").rstrip() }}{% else %}
"""
TURNS = r"""{% set header = "<|im_start|>assistant\n" ~ ("<think>\n\n</think>\n" if mode == "no_think" else "") %}
{% for m in messages %}
{% if m.role == "assistant" %}
{% set answer = namespace(text=m.content.lstrip("\n")) %}
{% for block in m.content.split("</think>")[1:] if mode == "no_think" %}
{% if answer.text.startswith("<think>") %}{% set answer.text = answer.text.split("</think>", 1)[1].lstrip() %}{% endif %}
{% endfor %}
{{ header }}{% generation %}{{ answer.text }}<|im_end|>{% endgeneration %}{{ "\n" }}{% elif m.role in names %}
<|im_start|>{{ names[m.role] ~ "\n" ~ m.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ header }}{% endif %}
"""
JINJA = dict(
    compact=CHECKS + NO_TOOLS + SYSTEM + '{{ ("/" ~ mode ~ "\\n" ~ text).rstrip() }}{% endif %}<|im_end|>\n' + TURNS,
    smollm3=CHECKS + SYSTEM + r"""{% set xml_tools = (tools or []) + (xml_tools or []) %}
{% set xml %}{% if xml_tools %}""" + XML_TOOLS.format(r"""{% for tool in xml_tools %}
{% if tool is not mapping %}{{ raise_exception("tools: expected a list of JSON objects") }}{% endif %}
{{ tool | tojson }}
{% endfor %}""") + r"""{% else %}None{% endif %}{% endset %}
{% set persona %}""" + PERSONA + '{% if mode == "think" %}' + THINK_PERSONA + "{% endif %}{% endset %}\n" + METADATA.format(
        date='{{ date or strftime_now("%d %B %Y") }}', mode="{{ mode }}", xml="{{ xml }}", python="{{ python_tools or none }}",
        text=r'{{ "" if system == "" else (text or persona) ~ "\n\n" }}') + "{% endif %}<|im_end|>\n" + TURNS,
    chatml=CHECKS + NO_TOOLS + '{% set mode, names = none, {"system": "system", "user": "user", "tool": "tool"} %}\n' + TURNS)


# --- rows of data sets: formats, told by their keys, to one internal form --------------------------------------------

SPEAKERS = dict(human="user", user="user", gpt="assistant", bot="assistant", chatgpt="assistant", assistant="assistant",
                system="system", tool="tool", observation="tool")
FORMATS = ("messages, conversations (from, value), prompt + completion, instruction + output, prompt + chosen + rejected, "
           "question + answer, question + choices + answer, or text")


class Dropped(ValueError):
    """This row teaches nothing: it is left out and counted."""


def as_messages(value, role):
    """Text -> one message of that role; a list of messages stays one."""
    need(isinstance(value, str | list), f"{brief(value)} for the {role}", "text or a list of messages")
    return [dict(role=role, content=value)] if isinstance(value, str) else value


def pair_of(row, prompt):
    """prompt, chosen, rejected as lists of messages. Without a prompt it is what both answers begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    need(type(chosen) is type(rejected) and isinstance(chosen, str | list), "chosen and rejected",
         "two texts or two lists of messages")
    if chosen == rejected:
        raise Dropped("chosen and rejected are the same")
    if isinstance(prompt, str) and isinstance(chosen, list):
        roles = [m.get("role") if isinstance(m, dict) else None for m in chosen]
        n = int(roles[:1] == ["system"])
        if roles[n:n + 1] != ["user"]:      # then both begin with this question, after a system message
            chosen, rejected = (answer[:n] + as_messages(prompt, "user") + answer[n:] for answer in (chosen, rejected))
        prompt = None
    if prompt is None:
        n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        if isinstance(chosen, str):                                     # never in the middle of a word
            n = max(chosen.rfind(space, 0, n) + 1 for space in " \n\t")
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        need(prompt, "chosen and rejected begin differently", "a prompt")
    elif isinstance(prompt, list) and chosen[:len(prompt)] == prompt == rejected[:len(prompt)]:
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    if not chosen or not rejected:
        raise Dropped("an empty answer in a pair")
    return dict(prompt=as_messages(prompt, "user"), chosen=as_messages(chosen, "assistant"),
                rejected=as_messages(rejected, "assistant"))


def choices_of(row, question):
    """A multiple-choice question; choices may be ARC's dict of texts and labels, answer an index, a label or the text."""
    choices, answer = row["choices"], row.get("answer", row.get("answerKey"))
    labels = choices.get("label") if isinstance(choices, dict) else None
    choices = choices.get("text") if isinstance(choices, dict) else choices
    need(isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices), "choices",
         "a list of two or more texts")
    need(labels is None or isinstance(labels, list) and len(labels) == len(choices), f"label {brief(labels)}",
         f"one for each of the {len(choices)} choices")
    for names in (range(len(choices)), labels or (), choices, "ABCDEFGHIJ"):
        if answer in list(names)[:len(choices)] and not isinstance(answer, bool):
            return dict(prompt=as_messages(question, "user"), choices=choices, answer=list(names).index(answer))
    raise ValueError(f"answer {brief(answer)}: expected the index, label or text of one of the {len(choices)} choices")


def clean_answer(text):
    """The form in which answers are compared: "$1,005." is "1005"."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.strip()).strip("$ ").rstrip(". ")


def boxed(text):
    r"""What the last \boxed{...} of a text holds, or None."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = list(itertools.accumulate((c == "{") - (c == "}") for c in rest))
    return rest[:depth.index(-1)] if mark and -1 in depth else None


def answered(question, answer):
    """A problem. Answers of GSM8K (arXiv 2110.14168) and MATH (arXiv 2103.03874) hold the working too, which becomes reasoning,
    GSM8K's without its <<...>>."""
    need(isinstance(answer, str | int | float) and not isinstance(answer, bool), f"answer {brief(answer)}",
         "text or a number")
    working, mark, final = str(answer).rpartition("####")
    if (box := boxed(final)) is not None:       # then #### were headings
        alone = str(answer).strip(" $.") == f"\\boxed{{{box}}}"       # no working beside it
        working, mark, final = str(answer), "" if alone else "\\boxed", box
    result = dict(prompt=as_messages(question, "user"), answer=clean_answer(final))
    need(result["answer"], "answer", f"something after {mark}" if mark else "some text")
    if mark:
        working = re.sub("<<.*?>>", "", working).strip()
        content = f"<think>\n{working}\n</think>\n{result['answer']}"
        result["messages"] = result["prompt"] + [dict(role="assistant", content=content)]
    return result


def instructed(row):
    """instruction and input -> one question; None: there is none."""
    instruction, given = row.get("instruction"), row.get("input") or ""
    if instruction is None:
        return None
    need(isinstance(instruction, str) and isinstance(given, str), "instruction, input", "text")
    return instruction + (f"\n\n{given.strip()}" if given.strip() else "")


def sorted_out(row):
    """A row by its keys, in order of precedence -> the parts of the internal form, not checked yet."""
    nulls = [k for k, v in row.items() if v is None]        # columns of other rows, where data sets are mixed
    row = {k: v for k, v in row.items() if v is not None}
    question = next((row[k] for k in ("question", "prompt", "problem") if k in row), None)
    answer = next((row[k] for k in ("answer", "solution", "target") if k in row), None)
    if "messages" in row:
        return dict(messages=row["messages"])
    if "conversations" in row:
        turns = row["conversations"] if isinstance(row["conversations"], list) else [None]
        need(all(isinstance(t, dict) and t.get("from") in list(SPEAKERS) for t in turns), "conversations",
             f"a list of from ({', '.join(SPEAKERS)}) and value")
        return dict(messages=[dict(role=SPEAKERS[t["from"]], content=t.get("value")) for t in turns])
    if "chosen" in row and "rejected" in row:
        return pair_of(row, instructed(row) if question is None else question)
    if "prompt" in row and "completion" in row:
        return dict(messages=as_messages(row["prompt"], "user") + as_messages(row["completion"], "assistant"))
    if "choices" in row and question is not None:
        return choices_of(row, question)
    if question is not None and answer is not None:
        return answered(question, answer)
    if "instruction" in row and "output" in row:
        return dict(messages=as_messages(instructed(row), "user") + as_messages(row["output"], "assistant"))
    if isinstance(row.get("text"), str):
        return dict(text=row["text"])
    keys = ", ".join([*sorted(row), *(f"{k} (null)" for k in sorted(nulls))])
    raise ValueError(f"keys {keys or 'none'}: expected {FORMATS}")


def reasoned(message, mode):
    """An assistant's message with its reasoning at the very beginning or, in no_think, without it."""
    content = message["content"].lstrip()
    if message["role"] != "assistant" or not THOUGHT.match(content):
        return message
    while mode == "no_think" and (found := THOUGHT.match(content)):     # more than once if a template added an empty one
        content = content[found.end():].lstrip()
    return message | dict(content=content)


def normalize(example):
    """A row of a data set, told by its keys (FORMATS) -> one of
        {"messages", "mode"}  {"prompt", "chosen", "rejected", "mode"}  {"prompt", "choices", "answer": index}
        {"prompt", "answer": text}, GSM8K's rows with "messages" and "mode" besides  {"text"}
    Rows with chats keep their "tools"; messages, prompt, chosen and rejected are lists of {"role", "content"}.

    mode: a flag in the system message, else the row's own "mode" or chat_template_kwargs (smoltalk2), else think if an answer
    begins with <think>, else no_think; there, such reasoning is taken out. Raises Dropped, or ValueError saying what is wrong.
    """
    result, options, tools = sorted_out(example), example.get("chat_template_kwargs") or {}, example.get("tools")
    if "text" in result:
        return result
    if result.get("messages") == []:
        raise Dropped("no messages")
    need(isinstance(options, dict) and isinstance(options.get("enable_thinking"), bool | None), "chat_template_kwargs",
         "an object, enable_thinking in it true or false")
    need(not options.get("xml_tools") and not options.get("python_tools"), "xml_tools, python_tools",
         "a list of JSON objects under tools")
    check_tools(tools)
    instructions = options.get("custom_instructions", example.get("system") or "")      # a column that few rows fill
    need(isinstance(instructions, str), f"system, custom_instructions {brief(instructions)}", "text, or no such key")
    chats = [k for k in ("messages", "prompt", "chosen", "rejected") if k in result]
    for k in chats:
        check_messages(result["prompt"] + result[k] if k in ("chosen", "rejected") else result[k])
        if k in ("messages", "prompt") and instructions and result[k][0]["role"] != "system":
            result[k] = [dict(role="system", content=instructions), *result[k]]
    if chats == ["prompt"]:
        return result
    answers = [m["content"].lstrip() for k in chats for m in result[k] if m["role"] == "assistant"]
    shown = "think" if any(map(THOUGHT.match, answers)) else "no_think"
    flag = {True: "think", False: "no_think", None: shown}[options.get("enable_thinking")]
    mode = effective_mode(result.get("messages") or result["prompt"], example.get("mode") or flag)
    need(mode in ("think", "no_think"), f"mode {mode!r}", "think or no_think")
    result |= {k: [reasoned(m, mode) for m in result[k]] for k in chats} | dict(mode=mode)
    if "chosen" in result and result["chosen"] == result["rejected"]:
        raise Dropped("chosen and rejected differ in reasoning alone, and the mode is no_think")
    return result | (dict(tools=tools) if tools else {})


def read_examples(path, dropped):
    """JSONL in any of the FORMATS -> (file:line, normalized row) each; what is dropped is counted by its reason."""
    def read(row):
        try:
            return None if row is None else normalize(row)
        except Dropped as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
    rows = enumerate(read_rows(path, read, FORMATS), 1)     # one for every line, None where it is blank or dropped
    return ((f"{path}:{number}", row) for number, row in rows if row is not None)


# --- packing chats ---------------------------------------------------------------------------------------------------

def pack_best_fit(lengths, size):
    """Best-fit decreasing: the longest first, each into the fullest bin that still takes it -> lists of indices. Nothing is
    split. O(n log n), over the whole data set (TRL packs a thousand rows at a time)."""
    bins, spaces, holders = [], [], {}      # spaces: free spaces that some bin has, sorted; holders: space -> those bins
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 <= lengths[i] <= size:
            raise ValueError(f"length {lengths[i]} of item {i}: expected 0 to {size}")
        at = bisect.bisect_left(spaces, lengths[i])
        if at == len(spaces):
            space, b = size, len(bins)
            bins.append([])
        else:
            space = spaces[at]
            b = holders[space].pop()
            if not holders[space]:
                del spaces[at]
        bins[b].append(i)
        if not holders.setdefault(space - lengths[i], []):
            bisect.insort(spaces, space - lengths[i])
        holders[space - lengths[i]].append(b)
    return bins


def chat_batch(rows, T):
    """rows, each a list of (ids, mask) -> ids, targets, doc_ids, int64 tensors (B, T). A chat of n tokens takes n - 1 places:
    its last token is a target only, and its first is none. Padding is a document of its own."""
    ids, targets, docs = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100), np.zeros((len(rows), T), np.int64)
    for b, row in enumerate(rows):
        at = 0
        for d, (x, mask) in enumerate(row):
            here = slice(at, at + len(x) - 1)
            ids[b, here], targets[b, here], docs[b, here] = x[:-1], np.where(mask[1:], x[1:], -100), d
            at += len(x) - 1
        docs[b, at:] = len(row)
    return tuple(map(torch.from_numpy, (ids, targets, docs)))


# --- the embedded problem set: sums, answered with reasoning or without ----------------------------------------------

def sums(n, test=False, start=0):
    """n distinct problems (a, b) of 1 to 3 digits a number, all of them held out or none; always the same ones. Two single
    digits are no test: whoever learns column addition has seen them."""
    rng, found = random.Random(f"sums {test}"), {}
    while len(found) < start + n:
        a, b = (rng.randrange(10 ** rng.choice((1, 2, 3, 3))) for _ in range(2))
        if held_out(a, b) == test and (max(a, b) > 9 or not test):
            found[a, b] = None
    return list(found)[start:]


def sum_answer(a, b, mode, rng):
    """A demonstration. In /no_think most are bare, some show their working, a few are wordy and check it: what reinforcement
    learning can lengthen must have been seen."""
    working, check, luck = "\n".join(column_sum(a, b)), "\n".join(column_sum(b, a)), rng.random()
    if mode == "think":
        return f"<think>\n{working}\n</think>\n{a + b}"
    if luck < 0.7:
        return f"{a + b}"
    if luck < 0.9:
        return f"{working}\n{a + b}"
    return f"Let me add {a} and {b}.\n{working}\nLet me check.\n{check}\n{a + b}"


def sum_chats(n):
    """n training problems, each in both modes -> normalized rows."""
    rng = random.Random("chats")
    return [dict(messages=[dict(role="user", content=f"{a}+{b}="), dict(role="assistant", content=sum_answer(a, b, mode, rng))],
                 mode=mode) for a, b in sums(n) for mode in ("think", "no_think")]


def sum_problems(n, test=True, start=0):
    """n problems -> normalized rows {"prompt", "answer"}; by default held out: no corpus, chat or pair has them."""
    return [dict(prompt=[dict(role="user", content=f"{a}+{b}=")], answer=str(a + b)) for a, b in sums(n, test, start)]


def sum_pairs(n):
    """n pairs, in both modes in turn: the right answer, briefly, against that of somebody who forgets to carry."""
    pairs = []
    for a, b in sums(4 * n):
        mode, answers = ("think", "no_think")[len(pairs) % 2], []
        for forget in (False, True):
            steps = column_sum(a, b, forget)
            total = int("".join(s[-1] for s in reversed(steps))) if forget else a + b
            reasoning = "<think>\n{}\n</think>\n".format("\n".join(steps)) * (mode == "think")
            answers.append(as_messages(f"{reasoning}{total}", "assistant"))
        if answers[0] != answers[1] and len(pairs) < n:
            pairs.append(dict(prompt=as_messages(f"{a}+{b}=", "user"), chosen=answers[0], rejected=answers[1], mode=mode))
    return pairs


# --- python data.py --------------------------------------------------------------------------------------------------

def show_sources(sources, loader, plan_rows):
    """Print the tables of sources and stages; returns {source: its numbers}."""
    metrics = {}
    print(f"{'source':12}{'documents':>10}{'duplicates':>11}{'empty':>6}{'bytes':>14}{'tokens':>14}{'tokens/byte':>12}"
          f"{'val tokens':>12}{'overlap':>8}{'epochs':>7}")
    for s, epochs in zip(sources, loader.epochs(plan_rows).values()):
        m, v = s.meta, s.val_meta
        documents = m["documents"] + v["documents"] * (m["split"] == "document")    # tail: both hold parts of the same
        metrics[s.name] = row = dict(
            documents=documents, duplicates=v["duplicates"], empty=v["empty"], bytes=m["bytes"], tokens=m["tokens"],
            tokens_per_byte=m["tokens"] / m["bytes"], val_tokens=v["tokens"], overlap=v["overlap"], epochs=epochs)
        print("{:12}{:10,}{:11,}{:6,}{:14,}{:14,}{:12.3f}{:12,}{:8.1%}{:7.2f}".format(s.name, *row.values()))
    for name, row in metrics.items():
        if row["epochs"] > 5:
            print(f"warning: {row['epochs']:.1f} epochs of {name}; beyond 5 a source is worth less and less (playbook)")
    print("\nmixture: weight asked for -> share of rows")
    for (end, weights), (_, _, before, _) in zip(loader.mixture, loader.stages):
        shares = [f"{name} {w:.4f} -> {n / SLOTS:.3f}" for (name, w), n in zip(weights.items(), before[-1])]
        print(f"  up to {end:4.0%} of the run: " + ", ".join(shares))
    return metrics


def show_row(loader, tokenizer):
    """Print the first row that holds several documents, a bar at each boundary."""
    g = next((g for g in range(200) if loader.batch(g, 1)[2].any()), 0)
    ids, _, doc_ids = (x[0].numpy() for x in loader.batch(g, 1))
    bar = "\x1b[31m│\x1b[0m" if sys.stdout.isatty() else "│"
    print(f"\nrow {g} of the run, {loader.describe(g)}; attention does not cross {bar}\n")
    print(bar.join(tokenizer.decode(ids[doc_ids == d]) for d in range(doc_ids.max() + 1)))


def show_fertility(cfg):
    """--fertility: the playbook's two numbers for choosing a tokenizer, on words encoded alone: tokens per word, and the share
    of words that continue in a second token. Words are runs of letters and digits, or of signs: where no spaces part them, as
    in Chinese, only tokenizers compare, not languages. bytes/token is that of the running text. -> {tokenizer: {source: row}}."""
    metrics, sources = {}, find_sources(cfg.text, cfg.jsonl, cfg.hf, cfg.hf_docs, cfg.passkey)
    tokenizers = {name: get_tokenizer(name) for name in map(str.strip, cfg.tokenizer.split(","))}
    print(f"{'tokenizer':24}{'ids':>9}  {'source':12}{'words':>12}{'fertility':>11}{'continued':>11}{'bytes/token':>13}")
    for name, (source, (documents, _)) in itertools.product(tokenizers, sources.items()):
        tokenizer, words, size, tokens = tokenizers[name], Counter(), 0, 0
        for document in map(as_bytes, documents()):
            words.update(re.findall(r"\w+|[^\w\s]+", document.decode("utf-8", errors="replace")))
            size, tokens = size + len(document), tokens + len(tokenizer.encode(document))
        need(words, f"source {source} without words", "some text")
        n, total = {w: len(tokenizer.encode(w)) for w in words}, words.total()
        row = dict(words=total, fertility=sum(n[w] * k for w, k in words.items()) / total,
                   continued=sum(k for w, k in words.items() if n[w] > 1) / total, bytes_per_token=size / tokens)
        metrics.setdefault(name, {})[source] = row
        print(f"{name[-24:]:24}{tokenizer.size:9,}  {source:12}" + "{:12,}{:11.3f}{:11.1%}{:13.2f}".format(*row.values()))
    return metrics


def show_chat(ids, mask, tokenizer):
    """Print a rendered chat, the trained part green on a terminal and in ‹ › elsewhere."""
    before, after, grey, plain = ("\x1b[32m", "\x1b[0m", "\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("‹", "›", "", "")
    for trained, part in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        print((before if trained else grey) + tokenizer.decode([i for i, _ in part]), end=after if trained else plain)


def rendered(row, name, style, tokenizer):
    """What a row has under `name` -> (ids, mask): of a text all is trained, of a pair only what follows the prompt."""
    if name == "text":
        ids = [*tokenizer.encode(row["text"]), tokenizer.eos]
        return ids, [1] * len(ids)
    how = dict(mode=row["mode"], style=style, tools=row.get("tools"), tokenizer=tokenizer)
    if name == "messages":
        return render(row["messages"], **how)
    ids, mask = render(row["prompt"] + row[name], **how)
    shared = len(render(row["prompt"], add_generation_prompt=True, **how)[0])
    return ids, [0] * shared + mask[shared:]


def show_chats(cfg, tokenizer, limit=5):
    """--show: print the first rows, of pairs both answers; render them all, count, and return the counts."""
    dropped, counts = {}, Counter(rows=0, chats=0, tokens=0, trained=0)
    rows = [("sums", row) for row in sum_chats(2)] if cfg.show == "sums" else read_examples(cfg.show, dropped)
    for where, row in rows:
        counts["rows"] += 1
        names = [k for k in ("messages", "chosen", "rejected", "text") if k in row]
        if not names and counts["rows"] <= limit:
            print(f"--- {where}: {json.dumps(row)}")
        for name in names:
            try:
                ids, mask = rendered(row, name, cfg.style, tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            counts.update(chats=name != "text", tokens=len(ids), trained=sum(mask))
            if counts["rows"] <= limit:
                print(f"--- {where}, {name}, mode {row.get('mode')}: {len(ids)} tokens, {sum(mask)} trained")
                show_chat(ids, mask, tokenizer)
                print("\n" * (name == "text"), end="")
    print(f"\n{counts['rows']} rows: {counts['chats']} chats, {counts['tokens']} tokens, {counts['trained']} of them trained"
          + "".join(f"; {n} more rows dropped: {reason}" for reason, n in dropped.items()))
    return counts


def main(cfg):
    """Prepare and show. Returns {source: documents, tokens, val_tokens, overlap, epochs, ...}."""
    try:
        if cfg.show or cfg.fertility:
            return show_fertility(cfg) if cfg.fertility else show_chats(cfg, get_tokenizer(cfg.tokenizer))
        need(cfg.seq_len > 0, f"--seq_len={cfg.seq_len}", "1 or more")
        need(0 <= cfg.plan_tokens < 2**62, f"--plan_tokens={cfg.plan_tokens}", "0 to 2**62")
        tokenizer, plan_rows = get_tokenizer(cfg.tokenizer), cfg.plan_tokens // cfg.seq_len
        sources = prepare(cfg.text, cfg.jsonl, cfg.hf, cfg.hf_docs, tokenizer, cfg.val_fraction, cfg.out, cfg.passkey)
        loader = Loader(sources, cfg.mixture, cfg.seq_len, plan_rows, cfg.seed)
        for tokens in [part for s in sources for part in (s.train, s.val)] if cfg.verify else ():
            open_bin(tokens.filename, verify=True)
            print(f"{tokens.filename}: sha256 as recorded")
    except BrokenPipeError:     # launch knows what to do
        raise
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None
    print(f"\n{cfg.tokenizer}: {tokenizer.vocab_size} ids. Run: {cfg.plan_tokens:,} tokens in rows of {cfg.seq_len}.\n")
    metrics = show_sources(sources, loader, plan_rows)
    show_row(loader, tokenizer)
    return metrics


if __name__ == "__main__":
    infra.launch(main, infra.cli(Config))
