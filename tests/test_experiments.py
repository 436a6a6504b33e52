"""Ablations, sweeps and curves: one change at a time, paired by seed, verdicts that know their noise, nothing run twice."""
import io, itertools, json, math, multiprocessing, random, statistics, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data, infra, model as nano, processes, train


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """cfg(**changes): runs of a moment on a small text, in a directory of the test's own; nobody reads what they write."""
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(train, "report", lambda run, result: None)
    rng = np.random.default_rng(0)
    Path("text.txt").write_text("".join(rng.choice(list("abcdefgh \n"), 20_000)))
    small = dict(text="text.txt", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=32, batch_tokens=64, steps=3, log_every=1, device="cpu", dtype="float32")
    return lambda **change: train.Config(**small | change)


def counted(monkeypatch, scores=None):
    """Each training is noted with its settings; scores(cfg) replaces its bits per byte."""
    done, original = [], train.main

    def main(c):
        if not (c.ablate or c.sweep):
            done.append(c)
        return original(c)
    monkeypatch.setattr(train, "main", main)
    if scores:
        real = train.validate
        monkeypatch.setattr(train, "validate", lambda run: real(run) | dict(val_bpb={"text": scores(run.cfg)}))
    return done


def test_each_change_is_run_alone_on_the_same_rows_with_every_seed(cfg, monkeypatch, capsys):
    done = counted(monkeypatch)
    result = train.main(cfg(ablate="num_key_value_heads=4,2,1;qk_norm=true", seeds=2))
    assert list(result) == ["baseline", "num_key_value_heads=4", "num_key_value_heads=1", "qk_norm=True"] and len(done) == 8
    assert {(c.num_key_value_heads, c.qk_norm) for c in done} == {(2, False), (4, False), (1, False), (2, True)}
    assert [c.seed for c in done] == [0] * 4 + [1] * 4 and len({c.out for c in done}) == 8
    for name, row in result.items():
        kv = int(name[-1]) if "heads" in name else 2
        shape = nano.Config(**dict(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=kv, qk_norm="qk" in name))
        assert row["params"] == nano.num_params(shape) and row["kv_bytes_per_token"] == 2 * 2 * kv * 4 * 2
    last = [json.loads(Path("out/ablate", f"qk_norm=True-seed{s}", "metrics.jsonl").read_text().splitlines()[-1])["val_bpb"]["text"] for s in (0, 1)]
    base = [json.loads(Path("out/ablate", f"baseline-seed{s}", "metrics.jsonl").read_text().splitlines()[-1])["val_bpb"]["text"] for s in (0, 1)]
    gaps = np.subtract(last, base)
    row = result["qk_norm=True"]
    assert row["bpb"]["text"] == pytest.approx(np.mean(last)) and row["gap"] == pytest.approx(gaps.mean())
    assert row["noise"] == pytest.approx(12.71 * gaps.std(ddof=1) / math.sqrt(2), rel=1e-6)
    assert json.loads(Path("out/ablate/ablate.json").read_text())["qk_norm=True"]["gap"] == row["gap"]
    assert "num_key_value_heads=1" in capsys.readouterr().out


@pytest.mark.parametrize("gaps, verdict", [((0.1, 0.11, 0.09), "worse"), ((-0.1, -0.11, -0.09), "better"), ((0.1, -0.1, 0.05), "tie"),
                                           ((0.1, 0.2, 0.3), "tie"), ((0.1,), "one seed: unknown")])
def test_a_gap_within_the_noise_of_the_seeds_is_a_tie(cfg, monkeypatch, gaps, verdict):
    counted(monkeypatch, lambda c: 2.0 + 0.3 * c.seed + (gaps[c.seed] if c.qk_norm else 0))
    assert train.main(cfg(ablate="qk_norm=true", seeds=len(gaps)))["qk_norm=True"]["verdict"] == verdict


def test_what_is_finished_is_not_run_again_and_what_stopped_goes_on(cfg, monkeypatch):
    done = counted(monkeypatch)
    first = train.main(cfg(ablate="qk_norm=true"))
    path = Path("out/ablate/baseline-seed0/metrics.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))         # as if it had been stopped
    assert train.main(cfg(ablate="qk_norm=true;tie_word_embeddings=false"))["qk_norm=True"]["bpb"] == first["qk_norm=True"]["bpb"]
    assert [Path(c.out).name for c in done] == ["baseline-seed0", "qk_norm=True-seed0", "baseline-seed0", "tie_word_embeddings=False-seed0"]
    with pytest.raises(SystemExit, match="baseline-seed0: another experiment .other lr.: --overwrite or another --out expected"):
        train.main(cfg(ablate="qk_norm=true", lr=1e-3))
    train.main(cfg(ablate="qk_norm=true", lr=1e-3, overwrite=True))
    assert len(done) == 6


def test_depth_matches_the_parameters(cfg, monkeypatch):
    result = train.main(cfg(ablate="intermediate_size=8", match="params", steps=1, num_hidden_layers=3))
    sizes = {n: nano.num_params(nano.Config(**dict(vocab_size=320, hidden_size=16, intermediate_size=8, num_hidden_layers=n,
                                                   num_attention_heads=4, num_key_value_heads=2))) for n in range(1, 12)}
    base = result["baseline"]["params"]
    assert result["intermediate_size=8"]["params"] == min(sizes.values(), key=lambda n: abs(n - base)) != sizes[3]


def test_a_sweep_holds_the_tokens_marks_the_best_and_fits_a_power_law(cfg, monkeypatch, capsys):
    best = {128: 1e-3, 256: 2e-3, 512: 4e-3}
    done = counted(monkeypatch, lambda c: 1 + abs(math.log(c.lr / best[c.steps * c.batch_tokens])))
    result = train.main(cfg(sweep="lr=1e-3,2e-3,4e-3;batch_tokens=64,128;tokens=128,256,512"))
    assert len(done) == 18 and {c.steps * c.batch_tokens for c in done} == set(best)
    assert [row["lr"] for row in result["best"]] == list(best.values()) and result["fits"]["lr"][1] == pytest.approx(1)
    assert result["fits"]["batch_tokens"][1] == pytest.approx(0, abs=1e-9)
    a, b = result["fits"]["lr"]
    assert a * result["best"][0]["flops"] ** b == pytest.approx(1e-3) and capsys.readouterr().out.count("<-- best") == 3


def test_what_cannot_be_compared_is_one_line_before_anything_runs(cfg, monkeypatch):
    done = counted(monkeypatch)
    for change, message in ((dict(ablate="lr=1;num_key_value_heads=3"), "--ablate: num_key_value_heads=3: .*a divisor"), (dict(ablate="lr=1", seeds=0), "--seeds=0"),
                            (dict(ablate="lr=1", match="depth"), "--match=depth"), (dict(sweep="num_key_value_heads=3"), "--sweep: num_key"),
                            (dict(sweep="steps=1,2"), "--sweep=steps=1,2: tokens instead of steps"), (dict(sweep="batch_tokens=0"), "--sweep=")):
        with pytest.raises(SystemExit, match=message):
            train.main(cfg(**change))
    assert not done


def compared():
    """An ablation on this rank: what it prints and returns."""
    out, c = io.StringIO(), train.Config(text="text.txt", hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=32,
                                         batch_tokens=64, steps=2, device="cpu", dtype="float32", ablate="qk_norm=true")
    sys.stdout = out                        # rank 1 loses it in setup
    return train.main(c)["qk_norm=True"]["gap"], out.getvalue()


def test_ranks_run_it_together_and_one_speaks(cfg):
    (gap, said), (other, silence) = processes.run(2, compared)
    assert gap == other and "gap to the baseline" in said and not silence


@pytest.mark.parametrize("spec, message", [("lr", "--ablate=lr: lr: FIELD=VALUE"), ("lr=fast", "lr: a number expected, not 'fast'"),
                                           ("lrr=1", "lrr: FIELD=VALUE"), ("lr=1;", ": FIELD=VALUE")])
def test_a_bad_list_of_changes_is_one_line(cfg, spec, message):
    with pytest.raises(SystemExit, match=message):
        train.main(cfg(ablate=spec))


def log(name, rows):
    Path(name).mkdir()
    Path(name, "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_curves_are_drawn_to_scale_smoothed_and_nested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log("one", [dict(step=s, loss=4.0 - s, seconds=2.0 * s, val_bpb={"text": 1.0 * s}) for s in range(4)])
    log("two", [dict(step=s, loss=2.0) for s in range(4)] + [dict(step=9)])
    found = infra.plot(["one", "two"], infra.Plot(width=13))
    assert found["loss"]["one"] == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{4:>10} |a            " and lines[16] == f"{1:>10} |            a" and lines[11].endswith("|b   b   b   b")
    assert "a: one, ends at 1" in lines and "b: two, ends at 2" in lines
    assert infra.plot(["one"], infra.Plot(x="seconds", y="val_bpb.*", smooth=2)) == {"val_bpb.*": {"one val_bpb.text": [
        (0.0, 0.0), (2.0, 0.5), (4.0, 1.5), (6.0, 2.5)]}}
    assert infra.plot(["two", "one"], infra.Plot(y="loss", chain=True))["loss"] == {"loss": [
        (0, 2.0), (1, 2.0), (2, 2.0), (3, 2.0), (9, 4.0), (10, 3.0), (11, 2.0), (12, 1.0)]}
    assert list(infra.plot(["two", "one"], infra.Plot(y="val_bpb.text,loss"))["val_bpb.text"]) == ["one"]   # two has none
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").touch()                 # no row yet: no reason not to see the others
    assert list(infra.plot(["two", "begun"], infra.Plot(y="loss"))["loss"]) == ["two"]
    for directory, y, message in (("none", "loss", "none/metrics.jsonl: .*the log of a run expected"),
                                  ("one", "acc", "one: no acc over step: one of loss, seconds, step, val_bpb.text expected")):
        with pytest.raises(SystemExit, match=message):
            infra.plot([directory], infra.Plot(y=y))
    with pytest.raises(SystemExit, match="run directories expected"):
        infra.plot([], infra.Plot())


def test_a_picture_is_written_if_matplotlib_is_there(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: no picture to write")
    monkeypatch.chdir(tmp_path)
    log("one", [dict(step=s, loss=4.0 - s) for s in range(4)])
    infra.plot(["one"], infra.Plot(png="x.png", y="loss"))
    assert Path("x.png").read_bytes()[:4] == b"\x89PNG"


# --- long context ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", train.DEPTHS)
def test_a_passkey_prompt_is_as_long_as_asked_and_holds_its_key_once_at_its_depth(depth):
    for length in (*range(40, 80), 256, 1000):
        prompt, key = data.passkey(random.Random(length), length, depth)
        at = prompt.index("#")
        assert len(prompt.encode()) == length and prompt.endswith(" #") and prompt.count("#") == 2 and prompt[at + 1] == key
        assert sum(c.isdigit() for c in prompt) == 1 and abs(at / length - depth) < 12 / length + 0.02


def test_passkey_documents_differ_in_key_and_length_and_repeat_their_key():
    documents = list(data.passkey_documents(256))[:500]
    assert documents == list(data.passkey_documents(256))[:500] and len(set(documents)) == 500
    keys = [{d[i + 1] for i, c in enumerate(d) if c == "#"} for d in documents]
    assert max(map(len, keys)) == 1 and len(set().union(*keys)) == 10
    assert max(map(len, documents)) <= 256 and min(map(len, documents)) < 60
    times = [d.count("#") for d in itertools.islice(data.passkey_documents(4000), 200) if len(d) > 2000]
    assert 5 < statistics.fmean(times) < 12 and max(times) > 12             # 2 to 15, not more in longer ones


class Reader(torch.nn.Module):
    """A stand-in for the model, of which only the configuration is looked at."""
    config = nano.Config(max_position_embeddings=64)


@pytest.mark.parametrize("factor, rows", [(1.0, ["32", "64", "128", "128 YaRN", "256", "256 YaRN"]), (2.0, ["32", "64", "128", "256"])])
def test_retrieval_counts_keys_found_by_depth_with_and_without_yarn_beyond_the_trained_rows(monkeypatch, factor, rows):
    model, seen, tokenizer = Reader(), [], data.get_tokenizer("bytes")
    model.config = nano.Config(max_position_embeddings=64, rope_factor=factor, original_max_position_embeddings=32)

    def generate(m, prompts, n, temperature):
        c = m.config
        seen.append((len(prompts[0]), c.rope_factor, c.original_max_position_embeddings, c.max_position_embeddings))
        texts = [bytes(p).decode() for p in prompts]        # it reads no further back than 64 bytes, without YaRN
        sees = [t[t.index("#") + 1] if t.index("#") >= len(t) - 64 * c.rope_factor / factor else "x" for t in texts]
        return [(list(x.encode()), [0.0]) for x in sees]
    monkeypatch.setattr(nano, "generate", generate)
    found, before = train.retrieval(model, tokenizer, [32, 64, 128, 256], problems=3), model.config
    assert list(found) == rows and found["64"] == [100.0] * 5 and found["128"] == [0, 0, found["128"][2], 100, 100]
    assert model.config.rope_factor == factor and model.config is before
    if factor == 1:
        assert found["256 YaRN"] == [100.0] * 5 and (256, 4.0, 64, 256) in seen and (256, 1.0, 32, 256) in seen


def test_a_run_with_passkeys_trains_on_them_probes_them_and_logs_what_was_found(cfg, capsys):
    result = train.main(cfg(text="", passkey="32,64", max_position_embeddings=64))
    assert list(result["val_bpb"]) == ["passkey64"] and list(result["passkey"]) == ["32", "64"]
    assert '"passkey": {"32": [' in Path("out/base/metrics.jsonl").read_text()
    assert "keys found, %" in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(passkey="256,"), dict(passkey="0"), dict(passkey="long"), dict(passkey="64", tokenizer="gpt2")])
def test_passkey_lengths_that_are_none_are_one_line(cfg, change):
    with pytest.raises(SystemExit, match=r"^--passkey=[^\n]*expected$"):
        train.main(cfg(**change))


# --- document masks --------------------------------------------------------------------------------------------------

def test_without_doc_mask_training_and_evaluation_look_across_documents(cfg, monkeypatch):
    Path("docs.jsonl").write_text("".join(json.dumps(dict(text=f"doc {i} " + "ab" * (i % 9))) + "\n" for i in range(300)))
    given, forward = [], nano.Transformer.forward

    def spy(self, ids, docs=None, *rest, **more):
        given.append(docs is not None)
        return forward(self, ids, docs, *rest, **more)
    monkeypatch.setattr(nano.Transformer, "forward", spy)
    for mask in (True, False):
        given.clear()
        train.main(cfg(text="", jsonl="docs.jsonl", doc_mask=mask, out=f"out/{mask}"))
        assert set(given) == {mask}


@pytest.mark.parametrize("change, message", [
    (dict(ablate="seed=1"), "--ablate=seed=1: seed is the same in all runs"), (dict(ablate="steps=6;qk_norm=true"), "steps is the same.*--sweep"),
    (dict(ablate="num_hidden_layers=4", match="params"), "num_hidden_layers is the same"), (dict(ablate="qk_norm=true", init="x"), "qk_norm is the same"),
    (dict(ablate="lr=1e-3", sweep="lr=1e-3"), "one of them expected"), (dict(ablate="lr=1e-3", bench=True), "one of them"),
    (dict(match="params"), "one of them"), (dict(sweep="lr=1e-3", seeds=2), "one of them"),
    (dict(ablate="lr=1e-3;optimizer=adamm"), "--ablate: optimizer=adamm: --optimizer=adamm: muon or adamw"),
    (dict(sweep="batch_tokens=64,70"), "--sweep: batch_tokens=70: "), (dict(sweep="tokens=0,1000"), "tokens and batch_tokens of 1 or more"),
    (dict(sweep="tokens=100;batch_tokens=64"), "no whole number of steps makes 100 tokens")])
def test_what_compares_nothing_is_refused_before_anything_is_trained(cfg, monkeypatch, change, message):
    done = counted(monkeypatch)
    with pytest.raises(SystemExit, match=message):
        train.main(cfg(**change))
    assert not [c for c in done if c.out.startswith("out/")] or "one of them" in message


def test_a_field_named_twice_keeps_all_its_values(cfg, monkeypatch):
    counted(monkeypatch)
    assert list(train.main(cfg(ablate="lr=1e-3;lr=2e-3"))) == ["baseline", "lr=0.001", "lr=0.002"]


def test_a_run_that_diverges_is_the_worst_of_its_experiment_and_not_its_end(cfg, monkeypatch, capsys):
    small = dict(steps=14, optimizer="adamw")
    result = train.main(cfg(sweep="lr=1e-3,1e30,2e-3", **small))
    bpb = [row["bpb"] for row in result["table"]]
    assert bpb[1] == math.inf and math.isfinite(bpb[0] + bpb[2]) and result["best"][0]["lr"] != 1e30
    assert json.loads(Path("out/sweep/sweep.json").read_text())["table"][1]["bpb"] is None
    done = counted(monkeypatch)
    assert train.main(cfg(sweep="lr=1e-3,1e30,2e-3", **small))["table"] == result["table"] and not done      # only read
    for steps in (14, 6):                                   # stopped by the rule of ten, and too short for it
        result = train.main(cfg(ablate="lr=1e38,2e-3", seeds=2, out=f"out/a{steps}", **small | dict(steps=steps)))
        assert result["lr=1e+38"]["verdict"] == "diverged" and result["lr=0.002"]["verdict"] in ("tie", "better", "worse")


def test_a_cut_last_row_is_run_again_or_left_out(cfg, monkeypatch, capsys):
    first = train.main(cfg(ablate="qk_norm=true"))
    log = Path("out/ablate/qk_norm=True-seed0/metrics.jsonl")
    log.write_text(log.read_text()[:-60])
    done = counted(monkeypatch)
    assert train.main(cfg(ablate="qk_norm=true"))["qk_norm=True"]["bpb"] == first["qk_norm=True"]["bpb"] and len(done) == 1
    log.write_text(log.read_text() + '{"half')
    assert infra.logged(log.parent, "step")["loss"]


def test_where_only_the_baseline_diverges_the_others_are_better(cfg, monkeypatch):
    result = train.main(cfg(ablate="lr=2e-3,1e38", lr=1e30, seeds=2, steps=14, optimizer="adamw"))
    assert [row["verdict"] for row in result.values()] == ["diverged", "better", "diverged"]
    assert set(result["lr=0.002"]["bpb"]) == {"text", "mean"} and math.isfinite(result["lr=0.002"]["bpb"]["mean"])


def test_a_sweep_of_which_nothing_is_left_has_no_best_and_no_fit(cfg, capsys):
    result = train.main(cfg(sweep="lr=1e30,1e31;tokens=896,1792", optimizer="adamw"))
    assert not result["best"] and not result["fits"] and "<-- best" not in capsys.readouterr().out


def test_rows_and_rotation_can_be_compared_from_a_checkpoint(cfg, monkeypatch):
    train.main(cfg(out="out/base"))
    result = train.main(cfg(init="out/base", ablate="rope_theta=20000;max_position_embeddings=64"))
    assert len(result) == 3 and all(row["gap"] for name, row in result.items() if name != "baseline")


def test_what_tp_forbids_is_said_before_anything_is_trained(cfg):
    rt = SimpleNamespace(tp_size=2, dp_size=1)
    with pytest.raises(SystemExit, match="--ablate: num_key_value_heads=1: --tp=2: a divisor"):
        train.changed(cfg(tp=2), rt, "ablate", dict(num_key_value_heads=1))
    assert train.changed(cfg(tp=2), rt, "ablate", dict(num_key_value_heads=4)).num_key_value_heads == 4


def test_a_stopped_experiment_says_how_to_go_on(cfg, monkeypatch):
    monkeypatch.setattr(train, "main", lambda c, real=train.main: real(c) if c.ablate else {"stopped": "SIGTERM"})
    for overwrite, text in ((False, "the same command goes on"), (True, "the same command without --overwrite goes on")):
        with pytest.raises(SystemExit, match=text):
            train.main(cfg(ablate="qk_norm=true", overwrite=overwrite))


def held(out):
    file = infra.lock(out)
    time.sleep(20), file.close()


def test_an_experiment_belongs_to_one_command(cfg):
    other = multiprocessing.get_context("fork").Process(target=held, args=("out/sweep",))
    other.start()
    try:
        while not (Path("out/sweep/.lock").exists() and Path("out/sweep/.lock").read_text()):
            time.sleep(0.01)
        with pytest.raises(SystemExit, match="out/sweep: process .* is writing here"):
            train.main(cfg(sweep="lr=1e-3"))
    finally:
        other.kill(), other.join()
