"""The same held-out sums through transformers' generate and through ours: accuracy in both modes, and how many texts are equal.

    python model.py out/grpo --export_hf=hf/sums
    python tests/through_transformers.py hf/sums out/grpo
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(exported, run, n=200, batch=50):
    import torch, transformers
    import data, infra, model as nano, sft
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tasks, rt, cfg = data.sum_problems(n), infra.setup(sft.Config()), sft.Config(style="compact")
    tok, (ours, extra) = transformers.AutoTokenizer.from_pretrained(exported), nano.load_checkpoint(run, rt.device)
    ours.compute_dtype = rt.dtype
    for mode in ("think", "no_think"):
        mine = [a for a, in sft.answers(ours, data.get_tokenizer(extra["tokenizer"]), tasks, mode, cfg, rt)]
        for dtype in (torch.float32, torch.bfloat16):
            hf, texts = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=dtype).eval(), []
            for i in range(0, n, batch):
                prompts = tok.apply_chat_template([t["prompt"] for t in tasks[i:i + batch]], enable_thinking=mode == "think", padding=True,
                                                  add_generation_prompt=True, return_dict=True, return_tensors="pt")
                for row in hf.generate(**prompts, max_new_tokens=cfg.max_new_tokens, do_sample=False).tolist():
                    new = row[prompts["input_ids"].shape[1]:]
                    end = next((j for j, t in enumerate(new) if t in hf.generation_config.eos_token_id), None)
                    texts.append("" if end is None else tok.decode(new[:end]))  # cut off: no answer
            theirs = sum(sft.is_right(text, t["answer"]) for text, t in zip(texts, tasks))
            equal = sum(text == a["text"] for text, a in zip(texts, mine))
            print(f"{mode:9} {str(dtype)[6:]:9} transformers {theirs / n:.1%}, ours {sum(a['right'] for a in mine) / n:.1%} ({rt.dtype}), "
                  f"{equal} of {n} texts equal")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
