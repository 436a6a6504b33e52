"""The scripts on a GPU that is none: tensors stay where they are, but those made on or moved to "cuda" (or "mps") say
they are there, whoever mixes them with others gets the error that a GPU would raise, and the code for GPUs runs."""
import copy, json, math, time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo, model as nano, sft, train
from models import random_model

MAY_MIX = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")  # the result is where the first argument is


class Operations(TorchDispatchMode):
    """Below autograd, so backward passes too: what is made of tensors on the device is there as well."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.there, self.made = kind, {}, []  # storages, not to be used again; what was made

    def on(self, x):
        return x.untyped_storage()._cdata in self.there

    def put(self, x):
        if self.kind == "mps" and x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        self.there[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        return x

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places, mixes = [self.on(x) for x in given], op._schema.name.removeprefix("aten::") in MAY_MIX
        if any(places) and not mixes and any(x.dim() for x, there in zip(given, places) if not there):
            raise RuntimeError(f"{op}: tensors on {self.kind} and on cpu")
        result = op(*args, **(kwargs or {}))
        in_backward = not given and torch._C._current_graph_task_id() >= 0  # zeros, for a gradient that nothing has
        if in_backward or (places[:1] == [True] if mixes else any(places)):
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    self.made.append((op._schema.name, x.dtype, tuple(self.put(x).shape)))
        return result


class Calls(TorchFunctionMode):
    """Above autograd: device= and .to() never reach torch, and x.device is what is pretended."""

    def __init__(self, operations):
        super().__init__()
        self.o = operations

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs, tensor, o = dict(kwargs or {}), torch.Tensor, self.o
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if f in (tensor.device.__get__, tensor.is_cuda.__get__, tensor.is_cpu.__get__):
            device = torch.device(o.kind, 0) if o.on(x) else torch.device("cpu")
            if f == tensor.device.__get__:
                return device
            return device.type == ("cuda" if f == tensor.is_cuda.__get__ else "cpu")
        if f is tensor.numpy and o.on(x):
            raise TypeError(f"can't convert {o.kind} tensor to numpy")
        if f is tensor.pin_memory:
            return x.clone()
        if f in (tensor.to, tensor.cpu):
            places = [a for a in (*args[1:], kwargs.pop("device", None)) if isinstance(a, (str, torch.device))]
            dtypes = [a for a in (*args[1:], kwargs.pop("dtype", None)) if isinstance(a, torch.dtype)]
            there, y = o.on(x), x.to(dtypes[0], copy=kwargs.get("copy", False)) if dtypes else x
            to = "cpu" if f is tensor.cpu else torch.device(places[0]).type if places else None
            if to is None or there == (to == o.kind):
                return y
            y = y.clone()
            if not there:
                return o.put(y)
            del o.there[y.untyped_storage()._cdata]
            return y
        if (device := kwargs.get("device")) is not None and torch.device(device).type == o.kind:
            return o.put(f(*args, **kwargs | dict(device="cpu")))
        return f(*args, **kwargs)


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.fixture
def device(request, monkeypatch):
    """The operations on the device that a test's parameter names; default: cuda."""
    kind = getattr(request, "param", "cuda")
    cuda = dict(Event=Event, synchronize=lambda *_: None, set_device=lambda _: None, max_memory_allocated=lambda _: 1,
                get_device_name=lambda _: "NVIDIA H100 80GB HBM3", get_device_capability=lambda *_: (9, 0),
                mem_get_info=lambda *_: (2**33, 2**36))
    for name, value in cuda.items() if kind == "cuda" else ():
        monkeypatch.setattr(torch.cuda, name, value)
    with Operations(kind) as operations, Calls(operations):
        yield operations


both = pytest.mark.parametrize("device", ["cuda", "mps"], indirect=True)


@both
def test_the_pretence_finds_what_mixes_devices(device):
    x, y = torch.ones(2, 3, device=device.kind), torch.ones(2, 3)
    assert x.device.type == (x * 2).T.device.type == y.to(device.kind).device.type == device.kind
    assert y.device.type == x.cpu().device.type == torch.ones_like(y).device.type == "cpu"
    for wrong in (lambda: x + y, lambda: F.embedding(torch.tensor([0]), x), lambda: torch.where(x > 0, y, x), x.numpy):
        with pytest.raises((RuntimeError, TypeError), match=device.kind):
            wrong()
    assert float((x * torch.tensor(2.0))[torch.tensor([1])].sum()) == 6  # scalars and indices may be on the CPU


@both
def test_the_whole_story(device, corpus, tmp_path):
    def rows(name, *made):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(tmp_path / name)
    sums = [(f"{i}+1=", str(i + 1)) for i in range(60)]
    chats = [dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)]) for q, a in sums]
    chats = rows("chats.jsonl", *chats)
    pairs = rows("pairs.jsonl", *(dict(prompt=q, chosen=a, rejected="no") for q, a in sums))
    problems = rows("problems.jsonl", *(dict(prompt=q, answer=a) for q, a in sums[:4]))
    choice = dict(question="a?", choices=["a", "b"], answer=0)
    tasks = rows("tasks.jsonl", dict(prompt="1+1=", answer="2"), choice, dict(text="abc"))
    every = dict(device=device.kind, steps=2, save_every=1, eval_every=1, log_every=1)
    out = {name: str(tmp_path / name) for name in ("base", "sft", "lora", "apo", "grpo", "hf")}
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, no_rope_layer_interval=2)
    base = train.Config(**every, **shape, max_position_embeddings=32, batch_tokens=128, micro_batch=2, text=str(corpus),
                        out=out["base"])
    assert train.main(base)["val_loss"] < 6
    train.main(train.Config(**vars(base) | dict(steps=3, resume=True)))
    chat = every | dict(init=out["base"], batch=4, max_length=64, tasks=tasks, max_new_tokens=3, val_fraction=0.2)
    sft.main(sft.Config(**chat, data=chats, out=out["sft"]))
    sft.main(sft.Config(**chat, data=chats, out=out["lora"], lora_rank=2, merge=True))
    sft.main(sft.Config(**chat | dict(stage="apo", micro_batch=2), data=pairs, out=out["apo"]))
    given = dict(init=out["sft"], problems=problems, tasks=problems, prompts=2, num_generations=2, micro_batch=2,
                 max_new_tokens=3)
    grpo.main(grpo.Config(**every, **given, num_iterations=2, out=out["grpo"]))
    grpo.main(grpo.Config(**every, **given, teacher=out["base"], overwrite=True, out=out["grpo"]))
    for name in out:
        if name == "hf":
            pytest.importorskip("safetensors")
            nano.main(nano.Options(init=out["sft"], export_hf=out["hf"]))
        nano.main(nano.Options(device=device.kind, init=out[name], prompt="1+1=", max_new_tokens=2))
    saved = nano.read_checkpoint(out["sft"])
    assert not any(device.on(x) for x in tree_leaves(saved) if isinstance(x, torch.Tensor))


RT = SimpleNamespace(dp_rank=0, dp_size=1, tp_size=1, world_size=1, rank=0)
VARIANTS = dict(gqa={}, mqa=dict(num_key_value_heads=1), mla=dict(kv_lora_rank=16), window=dict(sliding_window=5),
                chunk=dict(attention_chunk=6), moe=dict(num_experts=4), yarn=dict(rope_factor=2.0, qk_norm=True))


def moved(model, device):
    """A copy of it on the device."""
    return copy.deepcopy(model).to(device.kind)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_device_computes_what_the_cpu_does(device, variant, dtype):
    model = random_model(vocab_size=64, hidden_size=64, intermediate_size=96, **VARIANTS[variant])
    model.compute_dtype, results = dtype, []
    ids = torch.randint(0, 64, (2, 24))
    docs, prompts = (torch.arange(24) > 9).long().expand(2, 24), [ids[0, :7].tolist(), ids[1].tolist()]
    for m, kind in ((moved(model, device), device.kind), (model, "cpu")):
        x, d, found = ids.to(kind), docs.to(kind), []
        for doc_ids in (None, d):
            loss = m(x, doc_ids, x)[0]
            loss.backward()
            with torch.no_grad():
                found += [float(loss), float(m.embed_tokens.weight.grad.norm()), float(m(x, doc_ids, x)[0])]
        made = nano.generate(m, prompts, 6, temperature=0) if dtype == torch.float32 else ()
        results.append(found + [sum(logps) for _, logps in made])
    assert results[0] == pytest.approx(results[1], rel=1e-4 if dtype == torch.float32 else 0.03)


def test_decoding_copies_no_key_for_the_heads_that_share_it(device):
    model = moved(random_model(vocab_size=64, num_key_value_heads=1), device)
    nano.generate(model, [[1] * 20] * 3, 5)
    kept = [shape[:-2] for _, _, shape in device.made if len(shape) > 3 and shape[-1] == 32 and shape[-2] > 20]  # S x D
    assert kept and max(map(math.prod, kept)) == 3


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_share_one_mask(device, layers):
    model, T = moved(random_model(vocab_size=64, num_hidden_layers=layers), device), 24
    ids = torch.ones(2, T, dtype=torch.long, device="cuda")
    near, every = model.masks(model.embed_tokens(ids, torch.bfloat16), ids)
    assert near is every and every.dtype == torch.bfloat16
    device.made.clear()
    model(ids, ids, ids)[0].backward()
    assert sum(name == "aten::masked_fill_" and shape == (2, 1, T, T) for name, _, shape in device.made) == 1


@pytest.mark.parametrize("dtype, grouped", [(torch.float32, False), (torch.bfloat16, True)])
def test_float32_never_meets_the_kernel_that_keeps_all_scores(device, monkeypatch, dtype, grouped):
    """With grouped heads in float32 (or on a T4) SDPA has none but that one."""
    real, seen = F.scaled_dot_product_attention, []
    spy = lambda *args, **how: seen.append(how["enable_gqa"]) or real(*args, **how)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = moved(random_model(vocab_size=64), device)
    model.compute_dtype = dtype
    model(torch.ones(2, 8, dtype=torch.long, device="cuda"))
    assert set(seen) == {grouped}


def test_the_sampler_is_not_copied_in_float32(device):
    model = moved(random_model(vocab_size=64), device)
    model.compute_dtype = torch.bfloat16
    device.made.clear()
    sampler = nano.inference_copy(model)
    assert [{p.dtype for p in m.parameters()} for m in (sampler, model)] == [{torch.bfloat16}, {torch.float32}]
    assert not {name for name, dtype, _ in device.made if dtype == torch.float32} & {"aten::clone", "aten::empty_like"}


def test_log_probs_keep_nothing_for_a_backward_pass(device):
    model, seen = random_model(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    rts = [SimpleNamespace(**vars(RT), device=torch.device(kind)) for kind in ("cpu", "cuda")]
    sums = [sft.logp_sums(model.to(rt.device), [([1, 2, 3], [0, 1, 1])], rt) for rt in rts]
    assert seen == [True, False] and torch.allclose(*sums)


def test_compiled_blocks_stay_compiled(monkeypatch):
    """On a GPU a block has a graph with a mask and one without, with RoPE and without, with gradients and without, for
    a number of rows and for any: more than torch allows, and those beyond its limit would run as they are."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, inputs, **_: graph.forward))
    monkeypatch.setattr(nano.Transformer, "masks", lambda self, x, docs: (None, None) if docs is None else 2 * [
        nano.as_bias(nano.visible(x.shape[1], x.device, docs)[:, None], x.dtype)])  # as on a GPU
    torch._dynamo.reset()
    cfg, rt = train.Config(compile=True), SimpleNamespace(**vars(RT), device=torch.device("cpu"), dtype=torch.float32)
    model = train.ready(random_model(num_hidden_layers=2, no_rope_layer_interval=2), cfg, rt)
    ids = torch.ones(8, 32, dtype=torch.long)
    for rows in (8, 5):
        for docs in (None, ids[:rows]):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    model(ids[:rows], docs, ids[:rows])
    torch._dynamo.reset()
