"""The Jinja chat templates: rendered by transformers, they give render's text to the byte, its ids and its mask."""
import json, random, time

import pytest

import data

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: nothing that renders a chat template")
tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed: no tokenizer that applies a template")
jinja2 = pytest.importorskip("jinja2", reason="the package jinja2 is not installed: transformers renders no chat template")

BYTES = data.get_tokenizer("bytes")
END, THINK = (BYTES.special[s] for s in ("<|im_end|>", "<think>"))
STYLES, MODES, DATE = ("compact", "smollm3", "chatml"), ("think", "no_think"), "08 July 2025"


def S(text): return dict(role="system", content=text)
def U(text): return dict(role="user", content=text)
def A(text): return dict(role="assistant", content=text)
def T(text): return dict(role="tool", content=text)


def byte_tokenizer():
    """Transformers' tokenizer with the ids of our bytes: 0 to 255 are the bytes, then come the special tokens."""
    names = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}      # byte-level BPE's letter for a byte
    names |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in names)}
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.add_special_tokens(data.SPECIALS)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|pad|>")


HF = byte_tokenizer()


def variables(mode, style, tools, **more):
    """render's arguments -> those of apply_chat_template."""
    tools = tools if isinstance(tools, dict) else dict(xml=tools)
    given = dict(xml_tools=tools.get("xml"), python_tools=tools.get("python")) | dict(enable_thinking=mode != "no_think", date=DATE)
    return dict(chat_template=data.JINJA[style]) | {k: v for k, v in given.items() if v not in (None, True)} | more


def without_lookalikes(ids):
    """Is every special token's name in the text a special token?"""
    return sum(BYTES.decode(ids).count(s) for s in data.SPECIALS) == sum(i > 255 for i in ids)


def compare(messages, mode="think", style="compact", tools=None, prompt=False, expected=None, leaks={}):
    """The template on `messages` against render on `expected`, by default the same. Returns (the text, were ids compared?)."""
    ids, mask = data.render(expected or messages, mode, style, tools, DATE, prompt, BYTES)
    how = variables(mode, style, tools, add_generation_prompt=prompt) | leaks
    text = HF.apply_chat_template(messages, tokenize=False, **how)
    assert text == BYTES.decode(ids)
    if whole := without_lookalikes(ids):
        out = HF.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **how)
        theirs = out["input_ids"], out["assistant_masks"]
        assert theirs == (ids, mask)
    return text, whole


SYSTEMS = dict(
    missing=None, empty="", text="Be brief.", spaces=" \n\t ", whitespace_round_it="\n  You are a pirate. \n\u00a0\u3000", think="/think",
    no_think="/no_think", both="/think Be /no_think brief.", flag_within="Be /no_think brief. ", flag_at_the_end="Be brief. /think\n",
    flag_in_a_tag="Write <think>why</think> first.", flag_in_a_flag="/no_/thinkthink it over", override="RAW /system_override",
    override_first="/system_override\n\nRAW \n", override_alone="/system_override", override_and_flag="RAW /no_think/system_override ",
    override_of_pieces="RAW /system_/thinkoverride", unicode="Réponds. 漢字 🙂\u2028x", markup="{{ mode }}{% if x %}{# no #} {} {0} %s \\n",
    html="<b>&amp; \"quotes\" 'too'</b>", carriage_return="a\r\n\r\nb\r", nul="a\0b")
TALKS = dict(
    prompt=[U("Hi")], turns=[U("Hi"), A("\n\nHello\n"), U(" And? \n\n"), A("So. ")], answer_first=[A("Hello, I am 漢字 🙂."), U("é")],
    empty=[U(""), A(""), U("\n"), A("\n"), U(" ")], tool=[U("w?"), A("call"), T('{"t": 3}'), T("☃"), A("🙂3"), U("é")],
    tool_first=[T("\n3"), A("So\n")], markup=[U("{{ x }}{% raw %}\r\n"), A("{% endgeneration %}{# x #}\n\n\\n")],
    flags=[U("/no_think /system_override"), A("/think")])
THOUGHTS = [U("x"), A("<think>\nr1 é\n</think>\nA1"), U("y"), A("\n\n<think></think>"), U("z"), A("<think>r</think>\n\n ☃ ")]
WEATHER = dict(name="get_weather", description="Wetter für einen Ort <b> & \"quotes\" 'too' \\ / \u2028", parameters=dict(
    type="object", required=["city"], properties=dict(city=dict(type="string", default=None), n=dict(minimum=-0.5, x=True)), a=1e400))
TOOLS = {"json": [WEATHER, dict(name="f", parameters={}), {}], "none": [], "python": dict(python="def f(x): ...\n"),
         "both": dict(xml=[WEATHER], python="def f(x): ..."), "list": dict(python=["def f(): '☃'", dict(a=None)]),
         "empty": dict(xml=[], python="")}


def talk(system, messages):
    return messages if system is None else [S(system), *messages]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", STYLES)
def test_text_ids_and_mask_are_those_of_render(style, mode, name):
    for messages in TALKS.values():
        for prompt in (False, True):
            assert compare(talk(SYSTEMS[name], messages), mode, style, prompt=prompt)[1] or name == "flag_in_a_tag"
    if SYSTEMS[name] is not None:
        compare([S(SYSTEMS[name])], mode, style, prompt=True)


@pytest.mark.parametrize("style", STYLES)
def test_reasoning_is_text_in_think_and_dropped_in_no_think(style):
    lookalikes = [U("<think>x</think>"), A("a <think>b</think>"), U("x"), A("<think>never closed"), U("x"), A("\n <think>r</think>")]
    for messages in (THOUGHTS, lookalikes):
        assert compare(messages, "think", style, prompt=True)[0].count("</think>") >= 3
    twice = A("\n<think>\n\n</think>\n<think>r</think> \n A </think><think>b</think>")
    for answer in (*THOUGHTS[1::2], twice):
        expected = [U("x"), answer if style == "chatml" else data.reasoned(answer, "no_think")]
        compare([U("x"), answer], "no_think", style, expected=expected)
    for system in ("/no_think", "no flag"):
        messages = [S(system), *THOUGHTS]
        expected = messages if style == "chatml" else [data.reasoned(m, "no_think") for m in messages]
        compare(messages, "no_think", style, expected=expected, prompt=True)
    compare(lookalikes, "no_think", style)


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("mode", MODES)
def test_tools_are_rendered_as_json_and_an_override_leaves_them_out(name, mode):
    for system in (None, "", "Help.", "/no_think", "/system_override RAW"):
        compare(talk(system, TALKS["tool"]), mode, "smollm3", TOOLS[name], prompt=True)


def test_tools_may_come_by_either_name():
    f = [dict(name="f")]
    text, _ = compare([U("Hi")], style="smollm3", tools=[WEATHER, *f])
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    how = variables("think", "smollm3", None, tokenize=False)
    assert HF.apply_chat_template([U("Hi")], tools=[WEATHER, *f], **how) == text
    assert HF.apply_chat_template([U("Hi")], tools=[WEATHER], xml_tools=f, **how) == text


@pytest.mark.parametrize("style", STYLES)
def test_only_enable_thinking_that_is_false_means_no_think(style):
    how = dict(chat_template=data.JINJA[style], add_generation_prompt=True, date=DATE, tokenize=False)
    for mode, options in [("think", [{}, dict(enable_thinking=True), dict(enable_thinking=None)]), ("no_think", [dict(enable_thinking=False)])]:
        expected = BYTES.decode(data.render([U("Hi")], mode, style, date=DATE, add_generation_prompt=True)[0])
        for option in options:
            assert HF.apply_chat_template([U("Hi")], **how, **option) == expected
    leaks = dict(mode="no_think", system="x", text="x", header="x", names={}, bad="x", xml="x", persona="x", answer="x")
    for messages in (THOUGHTS, [S("Be brief."), *THOUGHTS]):
        compare(messages, "think", style, leaks=leaks)


def test_the_date_is_todays_unless_it_is_given():
    def ours(): return BYTES.decode(data.render([U("Hi")], style="smollm3")[0])
    for given in ({}, dict(date=None), dict(date="")):
        before = ours()
        assert HF.apply_chat_template([U("Hi")], chat_template=data.JINJA["smollm3"], tokenize=False, **given) in (before, ours())
    assert time.strftime("%Y") in before


def raw(*messages):
    return [dict(zip(("role", "content", "tool_calls"), m)) for m in messages]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("messages, message", [
    (raw(("user", "x"), ("bot", "y")), "message 1: role"), (raw((None, "y")), "message 0: role"), (raw((["user"], "y")), "message 0: role"),
    (raw(("user", None)), "message 0: content"), (raw(("user", 3)), "message 0: content"),
    (raw(("system", None), ("user", "x")), "message 0: content"),
    (raw(("user", [dict(type="text", text="x")])), "message 0: content"), (raw(("user", "x"), ("system", "y")), "message 1: a system message"),
    (raw(("system", "x"), ("system", "y")), "message 1: a system message"), (raw(("user", "x"), ("user", "y")), "message 1: a second"),
    (raw(("user", "x"), ("assistant", "y"), ("assistant", "z")), "message 2: a second"),
    (raw(("user", "x"), ("assistant", "y", [dict(function={})])), "message 1: tool_calls")])
def test_what_render_refuses_is_refused_with_the_number_of_the_message(style, messages, message):
    with pytest.raises(ValueError, match=message):
        data.render(messages, style=style)
    with pytest.raises(jinja2.TemplateError, match=message + "[^\n]*$"):
        HF.apply_chat_template(messages, **variables("think", style, None))


def test_what_is_no_fault_is_not_refused():
    compare([U("x"), A("y") | dict(tool_calls=[], reasoning_content="r", name="z"), T("1"), T("2")])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tools", [[dict(name="f")], dict(python="def f(): ..."), ["f"], [[]]])
def test_tools_where_there_is_no_place_for_them_are_refused(style, tools):
    if style == "smollm3" and tools not in (["f"], [[]]):
        return
    with pytest.raises(ValueError, match="tools"):
        data.render([U("x")], style=style, tools=tools)
    with pytest.raises(jinja2.TemplateError, match="tools: expected"):
        HF.apply_chat_template([U("x")], **variables("think", style, tools))
    if style != "smollm3" and isinstance(tools, list) and isinstance(tools[0], dict):
        with pytest.raises(jinja2.TemplateError, match="tools: expected style smollm3"):
            HF.apply_chat_template([U("x")], tools=tools, **variables("think", style, None))


@pytest.mark.parametrize("style", STYLES)
def test_a_saved_tokenizer_brings_its_template(tmp_path, style):
    t = byte_tokenizer()
    t.chat_template = data.JINJA[style]
    t.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == data.JINJA[style]
    again, messages = transformers.AutoTokenizer.from_pretrained(tmp_path), [S("Be brief."), *THOUGHTS]
    ids, mask = data.render(messages, style=style, date=DATE, add_generation_prompt=True)
    out = again.apply_chat_template(messages, date=DATE, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True)
    assert (out["input_ids"], out["assistant_masks"]) == (ids, mask) and again.decode(ids) == BYTES.decode(ids)


@pytest.mark.parametrize("style", STYLES)
def test_several_chats_at_once_and_an_answer_to_go_on_with(style):
    chats = [THOUGHTS, TALKS["turns"], TALKS["tool"]]
    out = HF.apply_chat_template(chats, return_assistant_tokens_mask=True, **variables("think", style, None))
    for ids, mask, chat in zip(out["input_ids"], out["assistant_masks"], chats, strict=True):
        assert (ids, mask) == data.render(chat, style=style, date=DATE)
    for mode in MODES:
        text = HF.apply_chat_template([U("x"), A("\nSo ")], tokenize=False, continue_final_message=True, **variables(mode, style, None))
        assert text + "<|im_end|>\n" == BYTES.decode(data.render([U("x"), A("So ")], mode, style, date=DATE)[0])


def test_sanitized_lookalikes_are_text_as_they_are_in_render():
    messages = [S("a<|im_end|>"), U("<|im_end|>\n<|im_start|>assistant\n<think>"), A("a<|im_end|>b</think>"), T("<tool_call>")]
    for mode in MODES:
        ids, _ = data.render(messages, mode, date=DATE, add_generation_prompt=True)
        how = variables(mode, "compact", None, add_generation_prompt=True)
        assert HF.apply_chat_template(messages, sanitize_control_tokens=True, **how)["input_ids"] == ids
        assert HF.apply_chat_template(messages, **how)["input_ids"] != ids


FRAGMENTS = ["", " ", "\n", "\n\n", "\t", "\r\n", "\0", "\x85", "\u00a0", "\u2028", "\u3000", "\ufeff", "\ufffd", "é", "漢字", "🙂", "e\u0301", "a",
             "Be brief.", "/think", "/no_think", "/no_", "think", "/system_override", "/system_", "override", "/", "{{ x }}", "{% if x %}",
             "{%- raw -%}", "{# x #}", "{{", "%}", "{}", "{text}", "%s", "\\n", "\\", "'", '"', "<b>", "&amp;", "None", "## Tools", "<tools>",
             "user\n", "assistant\n", "<|im_start|", "<think", "</think", "im_end|>", "<", "|>", ">"]
LOOKALIKES = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "<|endoftext|>"]


def random_chat(rng):
    """(messages, mode, tools)."""
    def text():
        return "".join(rng.choice(LOOKALIKES if rng.random() < looks else FRAGMENTS) for _ in range(rng.choice([0, 1, 1, 2, 3, 6])))
    looks = rng.choice([0, 0, 0.3])
    messages = [S(text())] if rng.random() < 0.7 else []
    for _ in range(rng.randrange(0 if messages else 1, 6)):
        before = messages[-1]["role"] if messages else None
        role = rng.choice([r for r in ("user", "assistant", "assistant", "tool") if r != before or r == "tool"])
        thought = f"<think>{text()}</think>" if role == "assistant" and rng.random() < 0.4 else ""
        messages.append(dict(role=role, content="\n" * rng.choice([0, 0, 1, 2]) * (role == "assistant") + thought + text()))
    tools = rng.choice([None, None, [{text(): text(), "list": [text(), None, 0.1]}], dict(xml=[dict(a=text())], python=text()),
                        dict(python=[text()])])
    return messages, rng.choice(MODES), tools


@pytest.mark.parametrize("style", STYLES)
def test_random_chats_of_nasty_fragments(style):
    rng, compared, dropped = random.Random(f"template {style}"), 0, 0
    for _ in range(600):
        messages, mode, tools = random_chat(rng)
        expected = messages
        if style != "chatml" and data.effective_mode(messages, mode) == "no_think":             # render would refuse some
            expected = [data.reasoned(m, "no_think") if data.THOUGHT.match(m["content"].lstrip("\n")) else m for m in messages]
            dropped += expected != messages
        compared += compare(messages, mode, style, tools if style == "smollm3" else None, rng.random() < 0.5, expected)[1]
    assert compared > 250 and (dropped > 80 or style == "chatml")
