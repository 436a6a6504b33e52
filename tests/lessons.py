"""Bugs brought back on purpose, by patching the project from outside, to see what they do. Both ways are run, one number each.

    python tests/lessons.py                  the list
    python tests/lessons.py drop_eos         that lesson
"""
import contextlib, io, json, sys, tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def drop_eos(steps=30):
    """GRPO without credit for the end token: a length penalty that is hard to obey. (grpo.py, rollout: the mask)

    A random model whose only reward is the penalty, linear from the first token to the 64th. An answer ends where it happens
    to say an end token, so to be brief is to make that token likelier, and the loss must see it. Loss type `grpo`, in which
    answers weigh the same whatever their length. In a sum over all tokens of the step (dapo) long answers have more of them to
    push down, and that shortens answers even so, more slowly.
    """
    import grpo, infra, model as nano

    original = grpo.rollout

    def without_end(run):
        batch, metrics, samples = original(run)
        ends = {run.tokenizer.special["<|im_end|>"], run.tokenizer.eos}
        for i, (ids, mask) in enumerate(batch.rows):
            if ids[-1] in ends:
                batch.rows[i], batch.sampled[i] = (ids, mask[:-1] + [0]), batch.sampled[i][:-1]
        batch.whole = batch.whole[0], sum(sum(mask) for _, mask in batch.rows)
        return batch, metrics, samples

    def lengths(out):
        cfg = grpo.Config(init=f"{out}/start", out=f"{out}/run", overwrite=True, steps=steps, prompts=8, micro_batch=64,
                          rewards="", lr=1e-3, loss_type="grpo", beta=0.0, max_new_tokens=64, overlong_max=64,
                          overlong_cache=64, log_every=1, device="cpu")
        with contextlib.redirect_stdout(io.StringIO()), patch.object(grpo, "PROBLEMS", 1):
            grpo.main(cfg)
        rows = map(json.loads, Path(out, "run/metrics.jsonl").read_text().splitlines())
        return [row["completions/mean_length"] for row in rows if "loss" in row and not row.get("final")]

    with tempfile.TemporaryDirectory() as out:
        Path(out, "start").mkdir()
        infra.setup(grpo.Config(device="cpu"))  # the seed
        nano.save_checkpoint(f"{out}/start", nano.Transformer(nano.Config()))
        start, *_, fixed = lengths(out)
        with patch.object(grpo, "rollout", without_end):
            *_, broken = lengths(out)
    print(f"mean length of the 64 answers of a step, after {steps} steps with nothing but a length penalty\n"
          f"  at the start                            {start:5.1f} tokens\n"
          f"  broken: end token left out of the loss  {broken:5.1f} tokens\n"
          f"  fixed: end token in the loss            {fixed:5.1f} tokens")
    return dict(start=start, broken=broken, fixed=fixed)


LESSONS = {f.__name__: f for f in (drop_eos,)}


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in LESSONS:
        LESSONS[sys.argv[1]]()
    else:
        print("\n".join(f"{name:12}{f.__doc__.splitlines()[0]}" for name, f in LESSONS.items()))
        sys.exit(f"{sys.argv[1]}: no such lesson" if sys.argv[1:] else 0)
