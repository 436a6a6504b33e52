"""grpo.py, what needs no rollout: advantages, losses, distillation, rewards and settings, against closed forms and TRL.

Most tests are for a pitfall that some project fell into: deviations by n instead of n - 1, groups that mix, clipping on the
wrong side, micro-batches that divide by their own lengths, a loss without the temperature, rewards that raise or say nothing.
"""
import builtins, itertools, math, random, statistics, sys, uuid
from types import SimpleNamespace

import pytest
import torch

import grpo, infra, model as nano
from models import random_model
from runs import one_line

CPU = infra.setup(infra.Machine(device="cpu", dtype="float32"))         # one process, alone
SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, no_rope_layer_interval=2, max_position_embeddings=128, initializer_range=0.2)
NAN, LEVELS, SCALES = math.nan, ("token", "sequence"), ("group", "batch", "none")


# --- what the tests share --------------------------------------------------------------------------------------------

def small_model(seed=0, **change):
    return random_model(seed, **SHAPE | change)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawer(seed):
    """randn of any shape, in float64."""
    draw = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)


# --- advantages ------------------------------------------------------------------------------------------------------

def advantages_by_hand(rewards, G, scale):
    """In plain Python; None in the place of NaN."""
    groups, result = [rewards[i:i + G] for i in range(0, len(rewards), G)], []
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    known = [r for r in rewards if r is not None]
    for group in groups:
        own = [r for r in group if r is not None]
        divisor = dict(group=spread(own) + 1e-4, batch=spread(known) + 1e-4, none=1.0)[scale]
        result += [0.0 if r is None else (r - statistics.mean(own)) / divisor for r in group]
    return result


def assert_advantages(rewards, G, scale):
    got = grpo.advantages(double(*(NAN if r is None else r for r in rewards)), G, scale)
    assert got.tolist() == pytest.approx(advantages_by_hand(rewards, G, scale), rel=1e-9, abs=1e-12)
    return got


@pytest.mark.parametrize("G", [2, 3, 8])
@pytest.mark.parametrize("scale", SCALES)
def test_advantages_equal_their_closed_forms_and_add_up_to_0_in_every_group(scale, G):
    rewards = (2 * drawer(G)(5 * G) + 0.5).tolist()
    got = assert_advantages(rewards, G, scale)
    assert got.shape == (5 * G,) and got.view(5, G).sum(1).abs().max() < 1e-12
    near = [1 + r / 1000 for r in rewards]              # so close to each other that the 1e-4 counts
    assert_advantages(near, G, scale)


def test_advantages_of_one_right_answer_in_four_are_those_of_a_table():
    right = torch.tensor([1.0, 0.0, 0.0, 0.0] + 4 * [0.0])
    assert grpo.advantages(right, 4, "none").tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert grpo.advantages(right, 4).tolist() == pytest.approx([0.75 / 0.5001] + 3 * [-0.25 / 0.5001] + 4 * [0], rel=1e-6)
    batch = math.sqrt(1 / 8) + 1e-4                     # their squares around the mean of 1/8 add up to 7/8, over 8 - 1
    expected = [0.75 / batch] + 3 * [-0.25 / batch] + 4 * [0]
    assert grpo.advantages(right, 4, "batch").tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("G", [2, 3, 6, 7])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1.1, 1e6 + 0.1, 0.0])
def test_equal_rewards_have_advantages_of_exactly_0(value, G, scale):
    for beside in ([], [float(i) for i in range(G)]):   # alone, and next to a group with something to learn from
        for dtype in (torch.float32, torch.float64):
            got = grpo.advantages(torch.tensor(G * [value] + beside, dtype=dtype), G, scale)
            assert (got[:G] == 0).all() and (not beside or (got[G:] != 0).any())
            unscored = grpo.advantages(torch.tensor([NAN] + G * [value], dtype=dtype), G + 1, scale)
            assert (unscored == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_answers_that_nobody_scored_have_advantage_0_and_no_part_in_any_mean(scale):
    for rewards in ([1.0, None, 0.0, 0.5, 2.0, 0.1], [None, None, None, 0.5, 2.0, 0.1], [1.0, None, None, 0.5, 2.0, None],
                    [None] * 6, [None] * 5 + [2.0]):
        got = assert_advantages(rewards, 3, scale)
        assert all(a == 0 for a, r in zip(got.tolist(), rewards) if r is None)
    without = grpo.advantages(double(1.0, 0.0, 0.5, 0.2), 2, scale)
    beside = grpo.advantages(double(1.0, NAN, 0.0, 0.5, NAN, 0.2), 3, scale)
    assert torch.equal(without, beside[[0, 2, 3, 5]])                   # the others do not notice it


def test_a_batch_in_which_at_most_one_answer_is_scored_has_advantages_0():
    for scale, rewards in itertools.product(SCALES, ([NAN] * 4, [NAN, 3.0, NAN, NAN])):
        assert grpo.advantages(torch.tensor(rewards), 2, scale).tolist() == [0.0] * 4
    assert grpo.advantages(torch.tensor([1.0, 2.0]), 1).tolist() == [0.0, 0.0]      # groups of one, as distillation may have


@pytest.mark.parametrize("scale", SCALES)
def test_groups_never_mix(scale):
    rewards = drawer(0)(4, 3)
    before = grpo.advantages(rewards.flatten(), 3, scale).view(4, 3)
    order = [2, 0, 3, 1]
    assert torch.allclose(grpo.advantages(rewards[order].flatten(), 3, scale).view(4, 3), before[order], rtol=1e-12)
    changed = rewards + double([0.0], [5.0], [0.0], [0.0])              # a group that is better as a whole is no better
    after = grpo.advantages(changed.flatten(), 3, scale).view(4, 3)
    if scale == "batch":                                # there they share what they are divided by, and only that
        ratio = after / before
        assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)) and ratio[0, 0] < 0.9
    else:
        assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and torch.allclose(after[1], before[1])


def test_an_unknown_scale_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="^--scale_rewards=std: group, batch or none expected$"):
        grpo.advantages(torch.zeros(4), 2, "std")


# --- losses ----------------------------------------------------------------------------------------------------------

def by_hand(values, loss_type="dapo", level="token", low=0.2, high=None, beta=0.0, max_length=9, whole=None):
    """Loss, its gradient with respect to logp, and metrics: one token after the other, in plain Python."""
    logp, old, ref, A, mask = (values[k].tolist() for k in ("logp", "old_logp", "ref_logp", "advantages", "mask"))
    B, T, high = len(logp), len(logp[0]), low if high is None else high
    lengths = [sum(row) for row in mask]
    answers, tokens = whole or (B, sum(lengths))
    loss, grad, metrics = 0.0, [[0.0] * T for _ in range(B)], {"clip_ratio/low": 0.0, "clip_ratio/high": 0.0, "kl": 0.0}
    for b in range(B):
        here = [t for t in range(T) if mask[b][t]]
        divisor = dict(grpo=answers * max(1, lengths[b]), bnpo=max(1, sum(lengths)) * answers / B, dapo=max(1, tokens),
                       dr_grpo=answers * max_length)[loss_type]
        for t in here:
            moved = [logp[b][s] - old[b][s] for s in (here if level == "sequence" else [t])]
            w, a = math.exp(sum(moved) / len(moved)), A[b][t] if isinstance(A[b], list) else A[b]
            if a > 0 and w > 1 + high:                  # already likelier by more than is believed, and no gradient says more
                loss -= a * (1 + high) / divisor
                metrics["clip_ratio/high"] += 1 / max(1, tokens)
            elif a < 0 and w < 1 - low:
                loss -= a * (1 - low) / divisor
                metrics["clip_ratio/low"] += 1 / max(1, tokens)
            else:
                loss -= a * w / divisor
                for s in (here if level == "sequence" else [t]):
                    grad[b][s] -= a * w / len(moved) / divisor
            d = ref[b][t] - logp[b][t]
            loss += beta * (math.exp(d) - d - 1) / divisor
            grad[b][t] += beta * (1 - math.exp(d)) / divisor
            metrics["kl"] += (math.exp(d) - d - 1) / max(1, tokens)
    if not beta:
        del metrics["kl"]
    return loss, torch.tensor(grad, dtype=torch.float64), metrics


def answers(lengths=(7, 3, 1, 0, 5, 4), seed=0, width=7, drift=0.3):
    """Log-probs of answers of unlike lengths, one of them masked, by a policy that has moved since they were sampled."""
    randn, B = drawer(seed), len(lengths)
    logp = -randn(B, width).abs() - 0.1
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    old = logp + drift * (randn(B, width) + randn(B, 1))
    return dict(logp=logp, old_logp=old, ref_logp=logp + 0.5 * randn(B, width), advantages=randn(B), mask=mask)


def step(values, level="token", low=0.2, high=None, max_length=9, **how):
    """policy_loss -> loss, its gradient with respect to logp, metrics."""
    logp = values["logp"].clone().requires_grad_()
    loss, metrics = grpo.policy_loss(**values | dict(logp=logp), epsilon=low, epsilon_high=high,
                                     importance_sampling_level=level, max_length=max_length, **how)
    assert loss.shape == () and not any(m.requires_grad for m in metrics.values())
    return loss.item(), torch.autograd.grad(loss, logp)[0], {k: float(m) for k, m in metrics.items()}


def assert_same_step(one, other, tolerance=1e-12):
    assert one[0] == pytest.approx(other[0], abs=tolerance) and (one[1] - other[1]).abs().max() < tolerance
    assert one[2] == pytest.approx(other[2], abs=1e-7)   # shares, in float32


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_losses_gradients_and_metrics_equal_their_closed_forms(loss_type, level, beta):
    sides = set()
    for seed, (low, high), whole in itertools.product(range(3), [(0.2, None), (0.2, 0.28), (0.05, 0.4)], [None, (11, 50)]):
        how = dict(low=low, high=high, loss_type=loss_type, level=level, beta=beta, whole=whole)
        values = answers(seed=seed)
        values["mask"][0, 2] = values["mask"][4, 0] = False             # holes: what counts need not be the beginning
        got = step(values, **how)
        assert_same_step(got, by_hand(values, **how))
        sides |= {k for k, v in got[2].items() if v}
    assert {"clip_ratio/low", "clip_ratio/high"} <= sides and ("kl" in sides) == bool(beta)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_at_ratio_1_the_gradient_is_that_of_minus_a_log_p_by_each_losss_weight(loss_type, level):
    values = answers(drift=0.0)
    A, mask, length = values["advantages"], values["mask"], values["mask"].sum(1)
    weight = dict(grpo=1 / (6 * length.clamp(min=1)), bnpo=1 / length.sum().expand(6), dapo=1 / length.sum().expand(6),
                  dr_grpo=torch.tensor(1 / (6 * 9)).expand(6))[loss_type]
    loss, grad, metrics = step(values, level, loss_type=loss_type, low=0.0, high=0.0)       # nothing is clipped even then
    assert torch.allclose(grad, -(A * weight)[:, None] * mask, rtol=1e-6, atol=1e-12)
    assert loss == pytest.approx(-float((A * weight * length).sum()), rel=1e-6) and not any(metrics.values())


def test_on_policy_the_grpo_loss_of_whole_groups_is_0_though_its_gradient_is_not():
    values = answers(lengths=(7, 3, 1, 2, 5, 4), drift=0.0)
    values["advantages"] = grpo.advantages(drawer(1)(6), 3)
    loss, grad, _ = step(values, loss_type="grpo")
    assert loss == pytest.approx(0, abs=1e-12) and grad.abs().max() > 0.01
    assert abs(step(values, loss_type="dapo")[0]) > 0.01                # weighted by length it need not be


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage, ratio, moves, low, high", [        # epsilon 0.2, epsilon_high 0.28
    (1.0, 1.30, False, 0, 1), (1.0, 1.25, True, 0, 0), (1.0, 0.70, True, 0, 0), (1.0, 0.50, True, 0, 0),
    (-1.0, 0.79, False, 1, 0), (-1.0, 0.81, True, 0, 0), (-1.0, 1.30, True, 0, 0), (-1.0, 3.00, True, 0, 0),
    (0.0, 3.00, False, 0, 0), (0.0, 0.10, False, 0, 0)])
def test_clipping_stops_the_gradient_only_where_the_policy_has_gone_far_enough(level, advantage, ratio, moves, low, high):
    logp = double([-1.0, -2.0, -3.0])
    values = dict(logp=logp, old_logp=logp - math.log(ratio), ref_logp=None, advantages=double(advantage),
                  mask=torch.tensor([[True, True, False]]))
    loss, grad, metrics = step(values, level, high=0.28)
    assert torch.allclose(grad, -advantage * ratio / 2 * double([1.0, 1.0, 0.0]) * moves, rtol=1e-12)
    assert loss == pytest.approx(-advantage * (1.28 if high else 0.8 if low else ratio))
    assert metrics == {"clip_ratio/low": low, "clip_ratio/high": high}


def test_without_epsilon_high_both_sides_are_clipped_at_epsilon():
    logp = double([-1.0])
    values = dict(logp=logp, old_logp=logp - math.log(1.25), ref_logp=None, advantages=double(1.0), mask=logp < 0)
    assert step(values)[1].item() == 0 and step(values, high=0.28)[1].item() == pytest.approx(-1.25)
    assert step(values, high=0.0)[0] == -1.0            # 0 is a limit, not "none"


def test_in_a_sequence_one_tokens_ratio_is_outweighed_by_the_others():
    logp = double([-1.0, -1.0, -1.0, -1.0])
    old = logp - double(0.9, -0.3, -0.3, -0.3)
    values = dict(logp=logp, old_logp=old, ref_logp=None, advantages=double(1.0), mask=logp < 0)
    assert step(values, "token")[1][0, 0] == 0          # e^0.9 is clipped, the geometric mean of the four is 1
    loss, grad, _ = step(values, "sequence")
    assert loss == pytest.approx(-1) and torch.allclose(grad, torch.full_like(grad, -1 / 4))


@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_the_kl_is_never_negative_0_at_the_reference_and_its_gradient_pulls_towards_it(loss_type):
    values = answers(drift=0.0) | dict(advantages=torch.zeros(6, dtype=torch.float64))
    loss, grad, metrics = step(values, loss_type=loss_type, beta=0.5)
    away, mask = values["logp"] - values["ref_logp"], values["mask"]
    assert loss > 0 and metrics["kl"] > 0 and (torch.sign(grad)[mask] == torch.sign(away)[mask]).all()
    assert metrics["kl"] == step(values, loss_type=loss_type, beta=5.0)[2]["kl"]            # the KL itself, not beta times it
    loss, grad, metrics = step(values | dict(ref_logp=values["logp"]), loss_type=loss_type, beta=0.5)
    assert loss == 0 and metrics["kl"] == 0 and (grad == 0).all()
    for d in (-4.0, -1e-3, 1e-3, 2.0):
        one = dict(values, ref_logp=values["logp"] + d)
        assert step(one, loss_type=loss_type, beta=1.0)[2]["kl"] == pytest.approx(math.exp(d) - d - 1, rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_equal_rewards_give_a_gradient_of_exactly_0_wherever_the_policy_has_gone(loss_type, level):
    values = answers() | dict(advantages=grpo.advantages(double(*[0.1] * 6), 3))
    loss, grad, metrics = step(values | dict(ref_logp=None), level, loss_type=loss_type)
    assert loss == 0 and (grad == 0).all() and metrics == {"clip_ratio/low": 0, "clip_ratio/high": 0}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_a_batch_that_is_masked_throughout_has_loss_0_with_a_gradient_of_0(loss_type, level, beta):
    for whole in (None, (12, 40), (6, 0)):
        values = answers(lengths=(0,) * 6)
        loss, grad, metrics = step(values, level, loss_type=loss_type, beta=beta, whole=whole)
        assert loss == 0 and (grad == 0).all() and not any(metrics.values())


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_what_is_under_the_mask_changes_not_one_bit(loss_type, level, beta):
    values, how = answers(), dict(loss_type=loss_type, level=level, beta=beta)
    wide = values | dict(advantages=values["advantages"][:, None].expand(6, 7))
    for values in (values, wide):
        loss, grad, metrics = step(values, **how)
        randn, other = drawer(9), dict(values)
        for name in ("logp", "old_logp", "ref_logp") + ("advantages",) * (values is wide):
            other[name] = torch.where(values["mask"], values[name], 10 * randn(6, 7))
        changed = step(other, **how)
        assert changed[0] == loss and torch.equal(changed[1], grad) and changed[2] == metrics
        assert (grad[~values["mask"]] == 0).all() and (grad[values["mask"]] != 0).any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_padding_changes_nothing(loss_type, level):
    values, how = answers(), dict(loss_type=loss_type, level=level, beta=0.3)
    padded = {k: v if v.dim() == 1 else torch.nn.functional.pad(v, (0, 4)) for k, v in values.items()}
    one, other = step(values, **how), step(padded, **how)
    assert_same_step(one, (other[0], other[1][:, :7], other[2]), 1e-14)


SPLITS = [[6], [3, 3], [1, 2, 3], [1, 1, 1, 1, 1, 1], [5, 1]]


def in_parts(values, sizes, whole, **how):
    """Loss and metrics added up, gradients side by side: of micro-batches of these sizes."""
    parts = []
    for at, n in zip(itertools.accumulate(sizes, initial=0), sizes):
        parts.append(step({k: v[at:at + n] for k, v in values.items()}, whole=whole, **how))
    return sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), {k: sum(p[2][k] for p in parts) for k in parts[0][2]}


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_losses_metrics_and_gradients_of_micro_batches_add_up_to_those_of_the_step(loss_type, level, sizes):
    values, how = answers(), dict(loss_type=loss_type, level=level, beta=0.3)
    whole = len(values["mask"]), int(values["mask"].sum())
    assert_same_step(in_parts(values, sizes, whole, **how), step(values, **how))


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_bnpo_is_the_mean_over_micro_batches_weighted_by_their_answers(sizes):
    values, how = answers(), dict(loss_type="bnpo", beta=0.3)
    loss, grad, metrics = in_parts(values, sizes, (6, int(values["mask"].sum())), **how)
    alone = [step({k: v[at:at + n] for k, v in values.items()}, **how)
             for at, n in zip(itertools.accumulate(sizes, initial=0), sizes)]
    assert loss == pytest.approx(sum(n / 6 * x[0] for n, x in zip(sizes, alone)), rel=1e-12)
    assert torch.allclose(grad, torch.cat([n / 6 * x[1] for n, x in zip(sizes, alone)]), rtol=1e-12)
    assert metrics == pytest.approx(step(values, **how)[2])             # these are shares of the step's tokens all the same


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", grpo.LOSSES)
def test_advantages_may_differ_from_token_to_token(loss_type, level):
    values, how = answers(), dict(loss_type=loss_type, level=level)
    wide = values | dict(advantages=values["advantages"][:, None].expand(6, 7))
    assert_same_step(step(wide, **how), step(values, **how), 1e-14)
    values["advantages"] = drawer(4)(6, 7)
    assert_same_step(step(values, **how), by_hand(values, **how))


def test_only_dr_grpo_asks_for_the_longest_answer_and_is_inverse_to_it():
    for loss_type in grpo.LOSSES:
        one, two = (step(answers(), loss_type=loss_type, max_length=n)[0] for n in (9, 18))
        assert one == pytest.approx(two * (2 if loss_type == "dr_grpo" else 1), rel=1e-12)


def test_a_long_wrong_answer_costs_as_much_as_a_short_one_in_grpo_alone():
    values = answers(lengths=(1, 7), drift=0.0) | dict(advantages=double(-1.0, -1.0))
    for loss_type in grpo.LOSSES:
        grad = step(values, loss_type=loss_type)[1].sum(1)
        assert float(grad[1] / grad[0]) == pytest.approx(1 if loss_type == "grpo" else 7)


def test_unknown_losses_and_levels_are_errors_that_name_the_known_ones():
    with pytest.raises(ValueError, match="^--loss_type=ppo: dapo, grpo, dr_grpo, bnpo expected$"):
        step(answers(), loss_type="ppo")
    with pytest.raises(ValueError, match="^--importance_sampling_level=word: token or sequence expected$"):
        step(answers(), "word")


def test_by_default_the_loss_is_dapos_by_token_with_epsilon_of_a_fifth_and_no_kl():
    values = answers()
    loss, metrics = grpo.policy_loss(*values.values())
    assert loss.item() == pytest.approx(by_hand(values)[0], rel=1e-12) and "kl" not in metrics


# --- TRL -------------------------------------------------------------------------------------------------------------

PROMPT_LENGTHS, LENGTHS, LONGEST, TEMPERATURE = (5, 2), (4, 7, 1, 9, 2, 6, 9, 3), 9, 0.7    # two groups of four; 9: cut off


@pytest.fixture(scope="session")
def second_opinion(tmp_path_factory):
    """TRL's GRPOTrainer on two random SmolLM3s, and what it is made to believe that it sampled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        trl = pytest.importorskip("trl", "1.16", reason="the package trl (1.16) is not installed: no second opinion on GRPO")
        import datasets.fingerprint, tokenizers, transformers
        # dill and pyarrow in some versions cannot hash a map's arguments
        patch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex))
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>")
        ours = [small_model(seed) for seed in (0, 1)]
        policy, reference = (twin(transformers, m, tokenizer) for m in ours)
        folder = tmp_path_factory.mktemp("trl")
        reference.save_pretrained(folder / "reference")                 # TRL changes its models, so it wants to load it itself
        policy.config._name_or_path = str(folder / "reference")
        args = trl.GRPOConfig(
            str(folder / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=8, num_generations=4, max_completion_length=LONGEST, temperature=TEMPERATURE, beta=0.04,
            epsilon=0.2, epsilon_high=0.28, use_bias_correction_kl=False)
        rewards = [1.0, 0.0, 0.25, 1.0, 0.5, 0.5, 1.0, -0.5]
        trainer = trl.GRPOTrainer(
            policy, reward_funcs=lambda completions, **rest: rewards, args=args, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(8 * [dict(prompt="")]))
    rng = random.Random(0)
    text = lambda n: [rng.randrange(256) for _ in range(n)]
    prompts = [p for n in PROMPT_LENGTHS for p in 4 * [text(n)]]
    completions = [text(n) if n == LONGEST else text(n - 1) + [tokenizer.eos_token_id] for n in LENGTHS]
    trainer._generate = lambda _: (prompts, completions, None, 8 * [""], None, {}, None, [])
    trainer.current_gradient_accumulation_steps = 1
    return SimpleNamespace(trainer=trainer, rewards=rewards, policy=ours[0], reference=ours[1], prompts=prompts,
                           completions=completions)


def twin(transformers, m, tokenizer):
    """transformers' SmolLM3 with the same weights."""
    names = (*SHAPE, "rms_norm_eps", "tie_word_embeddings", "rope_theta")
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    theirs = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(
        **{k: getattr(m.config, k) for k in names}, rope_parameters=dict(rope_type="default", rope_theta=m.config.rope_theta),
        attn_implementation="eager", **special))
    weights = {f"model.{k}": v for k, v in m.state_dict().items()}
    theirs.load_state_dict(weights | {"lm_head.weight": m.embed_tokens.weight})
    return theirs.float().eval()


def scored(opinion, rewards=None, **settings):
    """TRL's batch with these attributes of its trainer."""
    for name, value in settings.items():
        assert hasattr(opinion.trainer, name)
        setattr(opinion.trainer, name, value)
    opinion.rewards[:] = rewards or [1.0, 0.0, 0.25, 1.0, 0.5, 0.5, 1.0, -0.5]
    return opinion.trainer._generate_and_score_completions([dict(prompt="") for _ in range(8)])


def their_step(opinion, loss_type, level, beta, masked):
    """TRL's loss on samples of a policy that has moved since -> (loss, metrics, its batch, its log-probs)."""
    trainer = opinion.trainer
    out = scored(opinion, loss_type=loss_type, importance_sampling_level=level, beta=beta, mask_truncated_completions=masked,
                 scale_rewards="group")
    ids, mask = (torch.cat([out[f"prompt_{k}"], out[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, LONGEST)[0]
    randn = drawer(5)
    out["old_per_token_logps"] = logp.detach() + 0.3 * (randn(8, LONGEST) + randn(8, 1)).float()
    trainer._metrics["eval"].clear(), trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(out))
    loss.backward()
    return loss.item(), {k: v[0] for k, v in trainer._metrics["eval"].items()}, out, logp


def assert_their_metrics(metrics, theirs, level, beta):
    assert (metrics["kl"] == pytest.approx(theirs["kl"], abs=1e-5) and theirs["kl"] > 0.1) if beta else "kl" not in metrics
    for side in ("low", "high") if level == "token" else ():            # theirs for sequences are of answers, ours of tokens
        assert metrics[f"clip_ratio/{side}"] == pytest.approx(theirs[f"clip_ratio/{side}_mean"], abs=1e-6)
        assert theirs[f"clip_ratio/{side}_mean"] > 0.03


parity = [pytest.mark.filterwarnings("ignore::FutureWarning"),          # transformers about what TRL asks of it
          pytest.mark.parametrize("masked", [False, True], ids=["all", "finished"]),
          pytest.mark.parametrize("beta", [0.0, 0.04]), pytest.mark.parametrize("level", LEVELS),
          pytest.mark.parametrize("loss_type", grpo.LOSSES)]


def in_all_ways(test):
    for mark in parity:
        test = mark(test)
    return test


@in_all_ways
def test_the_loss_and_its_metrics_of_the_same_log_probs_are_trls(second_opinion, loss_type, level, beta, masked):
    loss, theirs, out, logp = their_step(second_opinion, loss_type, level, beta, masked)
    mask = out["completion_mask"].bool()
    assert mask.sum(1).tolist() == [0 if masked and n == LONGEST else n for n in LENGTHS]
    got, metrics = grpo.policy_loss(logp, out["old_per_token_logps"], out.get("ref_per_token_logps"), out["advantages"], mask,
                                    0.2, 0.28, beta, loss_type, level, LONGEST)
    assert got.item() == pytest.approx(loss, abs=1e-6) and abs(loss) > 1e-3
    assert_their_metrics({k: float(v) for k, v in metrics.items()}, theirs, level, beta)


def our_batch(opinion, out, micro_batch):
    """What learn() gets from a rollout, after its first pass: old log-probs per micro-batch, in places of its targets."""
    counts = out["completion_mask"].sum(1).tolist()
    order = sorted(range(8), key=lambda i: len(opinion.prompts[i] + opinion.completions[i]))
    rows = [(p + c, [0] * len(p) + [int(n > 0)] * len(c)) for p, c, n in zip(opinion.prompts, opinion.completions, counts)]
    old = []
    for at in range(0, 8, micro_batch or 8):
        part = order[at:at + (micro_batch or 8)]
        old.append(torch.zeros(len(part), len(rows[part[-1]][0]) - 1))
        for row, i in zip(old[-1], part):
            first = len(opinion.prompts[i]) - 1         # the place whose target is the completion's first token
            row[first:first + counts[i]] = out["old_per_token_logps"][i, :counts[i]]
    return SimpleNamespace(rows=[rows[i] for i in order], advantages=out["advantages"][order], old=old, whole=(8, sum(counts)),
                           sampled=[out["old_per_token_logps"][i, :len(opinion.completions[i])].tolist() for i in order])


@in_all_ways
def test_a_step_has_trls_loss_metrics_and_gradients_in_any_micro_batches(second_opinion, loss_type, level, beta, masked):
    loss, theirs, out, logp = their_step(second_opinion, loss_type, level, beta, masked)
    grads = {n.removeprefix("model."): p.grad for n, p in second_opinion.trainer.model.named_parameters()}
    for micro_batch in (0,) if loss_type == "bnpo" else (0, 3):
        batch = our_batch(second_opinion, out, micro_batch)
        cfg = grpo.Config(temperature=TEMPERATURE, max_new_tokens=LONGEST, loss_type=loss_type, importance_sampling_level=level,
                          epsilon=0.2, epsilon_high=0.28, beta=beta, micro_batch=micro_batch)
        run = SimpleNamespace(replica=second_opinion.policy, reference=second_opinion.reference if beta else None, teacher=None,
                              cfg=cfg, rt=CPU)
        run.replica.zero_grad()
        got, metrics = grpo.learn(run, batch)
        assert float(got) == pytest.approx(loss, abs=1e-5)
        assert_their_metrics(metrics, theirs, level, beta)
        for n, p in run.replica.named_parameters():
            assert (p.grad - grads[n]).abs().max() < 1e-4, n
        old = (out["old_per_token_logps"] * out["completion_mask"]).sum() / out["completion_mask"].sum()
        assert metrics["entropy"] == pytest.approx(-old.item(), abs=1e-5)
        assert metrics["sampler_gap"] < 1e-5            # they stand for those that the rollout has recorded
    assert max(float(g.abs().max()) for g in grads.values()) > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rewards", [
    [1.0, 0.0, 0.25, 1.0, 0.5, 0.5, 1.0, -0.5], [0.1] * 4 + [1.0, 0.0, 0.0, 0.0], [1.0, None, 0.25, 1.0, 0.5, 0.5, None, -0.5],
    [None] * 4 + [1.0, 2.0, 0.5, 0.5]], ids=["all", "equal ones", "some", "one group"])
@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_trls(second_opinion, scale, rewards):
    out = scored(second_opinion, rewards, scale_rewards=scale)
    ours = grpo.advantages(torch.tensor([NAN if r is None else r for r in rewards]), 4, scale)
    assert ours.tolist() == pytest.approx(out["advantages"].tolist(), abs=1e-5) and (ours != 0).any()


# --- distillation ----------------------------------------------------------------------------------------------------

def distilling(**change):
    """Two models with a vocabulary that is small enough to try all of it, and a run that makes one of them like the other."""
    student, teacher = (small_model(seed, vocab_size=24, initializer_range=0.3) for seed in (0, 1))
    cfg = grpo.Config(**dict(beta=0.0, temperature=TEMPERATURE, num_generations=1) | change)
    return SimpleNamespace(replica=student, teacher=teacher, reference=None, cfg=cfg, rt=CPU)


def logps_at_the_end(m, prompt):
    return (m(torch.tensor([prompt]))[0, -1] / TEMPERATURE).log_softmax(-1)


def one_answer(prompt, *ids):
    return SimpleNamespace(rows=[(prompt + [*ids], [0] * len(prompt) + [1] * len(ids))], sampled=[[0.0] * len(ids)],
                           advantages=torch.tensor([123.0]), old=[], whole=(1, len(ids)))  # a reward that must not count


def test_over_the_whole_vocabulary_distillations_gradient_is_that_of_the_kl_of_student_and_teacher():
    run, prompt = distilling(), [3, 1, 4, 1]
    student, teacher = (logps_at_the_end(m, prompt) for m in (run.replica, run.teacher))
    kl = (student.exp() * (student - teacher.detach())).sum()
    kl.backward()
    expected = {n: p.grad.clone() for n, p in run.replica.named_parameters()}
    mean, estimate = {n: torch.zeros_like(g) for n, g in expected.items()}, 0.0
    for token, probability in enumerate(student.exp().tolist()):        # instead of sampling: each token as often as it is due
        run.replica.zero_grad()
        _, metrics = grpo.learn(run, one_answer(prompt, token))
        estimate += probability * metrics["kl_teacher"]
        for n, p in run.replica.named_parameters():
            mean[n] += probability * p.grad
    assert estimate == pytest.approx(kl.item(), abs=1e-5) and kl.item() > 0.1
    assert max(float(g.abs().max()) for g in expected.values()) > 0.1
    assert all((mean[n] - expected[n]).abs().max() < 1e-5 for n in expected)
    assert all(p.grad is None for p in run.teacher.parameters())


def test_distilled_tokens_have_the_teachers_log_prob_minus_that_at_sampling_as_their_advantages():
    run, prompt, ids = distilling(loss_type="grpo"), [3, 1, 4], [5, 9, 2]
    at = lambda m: torch.stack([logps_at_the_end(m, prompt + ids[:i])[t] for i, t in enumerate(ids)]).detach().double()
    student, teacher = at(run.replica), at(run.teacher)
    old = student + double(0.4, -0.1, -0.5)             # a later pass: it is not the student's of now
    batch = one_answer(prompt, *ids)
    batch.old = [torch.cat([torch.zeros(2), old.float()])[None]]
    loss, metrics = grpo.learn(run, batch)
    values = dict(logp=student, old_logp=old, ref_logp=student, advantages=teacher - old, mask=torch.ones(3).bool())
    expected, _, clipped = by_hand({k: v[None] for k, v in values.items()}, "grpo", high=0.28)
    assert float(loss) == pytest.approx(expected, abs=1e-4) and sum(clipped.values()) > 0
    assert {k: metrics[k] for k in clipped} == pytest.approx(clipped)
    assert metrics["kl_teacher"] == pytest.approx(float((old - teacher).mean()), abs=1e-4)


def test_a_student_that_is_its_teacher_learns_exactly_nothing():
    run = distilling()
    run.teacher = run.replica
    loss, metrics = grpo.learn(run, one_answer([3, 1], 7, 8))
    assert float(loss) == 0 and metrics["kl_teacher"] == 0 and all((p.grad == 0).all() for p in run.replica.parameters())


# --- length penalty --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length, penalty", [
    (1, 0), (79, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (10_000, -1)])
def test_the_length_penalty_is_that_of_the_table(length, penalty):
    assert grpo.overlong_penalty(length, 100, 20) == pytest.approx(penalty, abs=1e-12)


def test_without_a_band_the_length_penalty_is_all_or_nothing_and_with_nothing_but_a_band_it_begins_at_once():
    assert [grpo.overlong_penalty(n, 100, 0) for n in (1, 99, 100, 101, 500)] == [0, 0, 0, -1, -1]
    assert [grpo.overlong_penalty(n, 4, 4) for n in range(6)] == [0, -0.25, -0.5, -0.75, -1, -1]


def test_the_length_penalty_is_trls():
    rewards = pytest.importorskip("trl.rewards", reason="the package trl is not installed: no second opinion on penalties")
    for longest, cache in ((100, 20), (40, 12), (40, 0), (40, 40), (7, 3)):
        theirs = rewards.get_soft_overlong_punishment(longest, cache)([n * [0] for n in range(130)])
        assert [grpo.overlong_penalty(n, longest, cache) for n in range(130)] == theirs


# --- reward functions ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("completion, right", [
    ("42", 1), (" 42\n", 1), ("42.", 1), ("$42", 1), ("it is\n42", 1), ("<think>\n6*7\n</think>\n42", 1), ("6*7\n#### 42", 1),
    ("a</think>b</think>42", 1), ("41", 0), ("42\nI think", 0), ("42 or 43", 0), ("42 43", 0), ("it is 42", 0), ("142", 0),
    ("", 0), ("\n", 0), ("<think>42</think>", 0), ("<think>42", 0), ("42</think>", 0), ("42<think>", 0), ("#### ", 0),
    ("6*7", 0), ("__import__('builtins').int(42)", 0), ("0b101010", 0), ("42.0", 0)])
def test_an_answer_is_accurate_if_its_last_line_after_the_thought_is_what_was_asked_for(completion, right):
    assert grpo.accuracy("6*7=", completion, "42") == right and isinstance(grpo.accuracy("6*7=", completion, "42"), float)


@pytest.mark.parametrize("completion, good", [
    ("42", 1), ("<think>\n6*7\n</think>\n42", 1), ("<think></think>42", 1), ("two\nlines", 1), ("", 0), (" \n", 0),
    ("<think>42</think>", 0), ("<think>42</think>\n ", 0), ("<think>42", 0), ("42</think>", 0), ("42<think>", 0),
    ("<think>a</think><think>b</think>42", 0), ("<think>a</think>b</think>42", 0), ("so <think>a</think>42", 0)])
def test_the_format_is_an_answer_after_one_closed_thought_or_none(completion, good):
    assert grpo.format("6*7=", completion, "42") == good and isinstance(grpo.format("6*7=", completion, "42"), float)


@pytest.fixture
def mine(tmp_path):
    """A file of somebody's own reward functions."""
    path = tmp_path / "mine.py"
    path.write_text("LIMIT = 3\n\n\ndef polite(prompt, completion, answer):\n    return float('please' in completion)\n\n\n"
                    "def short(prompt, completion, answer):\n    return -len(completion) / LIMIT\n\n\n"
                    "def overlong(prompt, completion, answer):\n    return 5.0\n\n\n"
                    "def accuracy(prompt, completion, answer):\n    return 0.75\n", encoding="utf-8")
    return path


def test_rewards_are_names_with_weights_or_without():
    assert grpo.load_rewards("accuracy,format:0.1") == {"accuracy": (grpo.accuracy, 1.0), "format": (grpo.format, 0.1)}
    assert grpo.load_rewards(" format:-2 , accuracy:0 ,") == {"format": (grpo.format, -2.0), "accuracy": (grpo.accuracy, 0.0)}
    assert list(grpo.load_rewards("format,accuracy")) == ["format", "accuracy"] and grpo.load_rewards("") == {}
    assert grpo.load_rewards(grpo.Config().rewards).keys() == {"accuracy", "format"}


def test_rewards_of_somebodys_own_come_from_files(mine, monkeypatch):
    rewards = grpo.load_rewards(f"accuracy:2,{mine}:polite:0.5,{mine}:short")
    assert {name: weight for name, (_, weight) in rewards.items()} == dict(accuracy=2.0, polite=0.5, short=1.0)
    assert rewards["polite"][0]("", "yes please", "") == 1.0 and rewards["short"][0]("", "123456", "") == -2.0
    monkeypatch.chdir(mine.parent)
    assert list(grpo.load_rewards("mine.py:polite")) == ["polite"]


@pytest.mark.parametrize("item, message", [
    ("speed", "accuracy or format, or FILE.py:FUNCTION"), ("accuracy:fast", "could not convert string to float: 'fast'"),
    ("accuracy:", "could not convert"), ("accuracy:nan", "expected"), ("accuracy:inf", "expected"), (":2", "expected"),
    ("accuracy:1:2", "expected"), ("mine.py", "FILE.py:FUNCTION"), ("mine.py:none", "has no attribute 'none'"),
    ("mine.py:LIMIT", "expected"), ("mine.py:polite:nan", "expected"), ("mine.py:polite:x", "could not convert"),
    ("mine.py:polite:1:2", "expected"),
    ("missing.py:polite", "No such file"), ("broken.py:f", "SyntaxError"), ("raises.py:f", "ZeroDivisionError")])
def test_rewards_that_are_none_end_with_one_line_that_names_them(mine, monkeypatch, item, message):
    monkeypatch.chdir(mine.parent)
    (mine.parent / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (mine.parent / "raises.py").write_text("1 / 0\n", encoding="utf-8")
    for spec in (item, f"format,{item}"):
        one_line(grpo.load_rewards, spec, match=f"^--rewards={item}: .*{message}")


def test_a_reward_that_is_named_twice_is_one_line(mine):
    one_line(grpo.load_rewards, "accuracy,format,accuracy:2", match="^--rewards=accuracy:2: .*once each")
    one_line(grpo.load_rewards, f"{mine}:polite,{mine}:polite:2", match=r"^--rewards=.*mine\.py:polite:2: .*once each")


def test_a_file_that_fails_in_many_lines_still_ends_with_one(tmp_path):
    (tmp_path / "long.py").write_text("raise RuntimeError('one\\ntwo')\n", encoding="utf-8")
    one_line(grpo.load_rewards, f"{tmp_path}/long.py:f", match="^--rewards=.*RuntimeError")


def test_a_file_that_holds_a_data_class_with_late_annotations_can_be_read(tmp_path):
    (tmp_path / "late.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Place:\n    x: int = 0\n\n\ndef f(prompt, completion, answer):\n    return 1.0\n", encoding="utf-8")
    assert list(grpo.load_rewards(f"{tmp_path}/late.py:f")) == ["f"]


# --- scores ----------------------------------------------------------------------------------------------------------

def scoring(said=None, **settings):
    """What score() needs of a run: rewards as functions or as --rewards has them, and somebody who listens."""
    rewards = settings.pop("rewards", "accuracy,format:0.1")
    rewards = grpo.load_rewards(rewards) if isinstance(rewards, str) else rewards
    cfg, log = grpo.Config(**dict(beta=0.0, overlong_max=0) | settings), SimpleNamespace(say=([] if said is None else said).append)
    return SimpleNamespace(cfg=cfg, rewards=rewards, complained=set(), log=log)


def sample(text="42", tokens=3, finished=True, answer="42"):
    return dict(prompt="6*7=", text=text, answer=answer, tokens=tokens, finished=finished)


def given(run, **how):
    """A sample, scored."""
    result = sample(**how)
    grpo.score(run, result)
    return result


def says(value):
    return lambda prompt, completion, answer: value


def test_the_reward_is_the_weighted_sum_of_what_the_functions_say():
    run = scoring(rewards="accuracy:2,format:0.1")
    assert given(run)["reward"] == pytest.approx(2.1) and given(run)["rewards"] == dict(accuracy=1.0, format=1.0)
    assert given(run, text="41")["reward"] == pytest.approx(0.1) and given(run, text="")["reward"] == 0
    assert given(run, answer="41")["rewards"] == dict(accuracy=0.0, format=1.0)
    run = scoring(rewards={"a": (says(3), -1.0), "b": (says(0.5), 0.5), "c": (says(7.0), 0.0)})
    assert given(run)["reward"] == pytest.approx(-2.75)


def test_functions_get_prompt_completion_and_answer_in_this_order():
    seen = []
    given(scoring(rewards={"a": (lambda *a: seen.append(a) or 1.0, 1.0)}), text="six", answer="7")
    assert seen == [("6*7=", "six", "7")]


def test_none_is_no_score_and_nothing_but_none_is_nan():
    run = scoring(rewards={"a": (says(None), 5.0), "b": (says(0.5), 1.0)})
    assert given(run) == sample() | dict(rewards=dict(a=None, b=0.5), reward=0.5, complaints={})
    run.rewards["b"] = says(None), 1.0
    result = given(run)
    assert math.isnan(result["reward"]) and not result["complaints"] and not run.complained
    assert math.isnan(given(scoring(rewards=""))["reward"])


def test_numbers_of_any_kind_are_rewards():
    for value, number in ((True, 1.0), (False, 0.0), (3, 3.0), (torch.tensor(0.5), 0.5), (0, 0.0)):
        result = given(scoring(rewards={"a": (says(value), 2.0)}))
        assert result["rewards"] == dict(a=number) and type(result["rewards"]["a"]) is float
        assert result["reward"] == 2 * number and not result["complaints"]


@pytest.mark.parametrize("value", ["good", [1.0], {}, NAN, math.inf, -math.inf, 1j])
def test_what_is_no_number_is_counted_and_no_score(value):
    said = []
    run = scoring(said, rewards={"odd": (says(value), 1.0), "format": (grpo.format, 1.0)})
    first, second = given(run), given(run)
    assert first["rewards"] == second["rewards"] == dict(odd=None, format=1.0) and first["reward"] == 1.0
    assert list(first["complaints"]) == list(second["complaints"]) == ["odd"] and len(said) == 1 and "--rewards: odd: " in said[0]


def test_exceptions_are_counted_and_said_once_for_every_function():
    def fails(prompt, completion, answer):
        raise KeyError("lost")
    said = []
    run = scoring(said, rewards={"a": (fails, 1.0), "b": (lambda p, c, a: 1 / 0, 1.0), "c": (says(0.25), 2.0), "d": (int, 1.0)})
    results = [given(run) for _ in range(3)]
    assert all(list(r["complaints"]) == ["a", "b", "d"] and r["reward"] == 0.5 for r in results)
    assert all(r["rewards"] == dict(a=None, b=None, c=0.25, d=None) for r in results)
    assert len(said) == 3 and all("\n" not in line for line in said)
    assert "a: KeyError: 'lost'" in said[0] and "b: ZeroDivisionError" in said[1] and "d: TypeError" in said[2]


def test_answers_that_were_cut_off_are_neither_right_nor_well_formed(mine):
    run = scoring(rewards=f"accuracy,format:0.1,{mine}:short")
    result = given(run, finished=False)
    assert result["rewards"] == dict(accuracy=0.0, format=0.0, short=pytest.approx(-2 / 3))
    assert result["reward"] == pytest.approx(-2 / 3) and not result["complaints"]


def test_a_function_of_somebodys_own_is_not_taken_for_the_built_in_one_of_that_name(mine):
    run = scoring(rewards=f"{mine}:accuracy")
    assert given(run)["reward"] == given(run, finished=False)["reward"] == 0.75


@pytest.mark.parametrize("tokens, penalty", [(1, 0), (28, 0), (29, -1 / 12), (34, -0.5), (40, -1), (41, -1)])
def test_the_length_penalty_is_added_with_weight_1_and_counts_tokens(tokens, penalty):
    run = scoring(rewards="accuracy:3", overlong_max=40, overlong_cache=12)
    result = given(run, tokens=tokens)
    assert result["reward"] == pytest.approx(3 + penalty)
    assert result["rewards"] == dict(accuracy=1.0, overlong=pytest.approx(penalty))
    cut = given(run, tokens=tokens, finished=False)     # for that there is the penalty too
    assert cut["reward"] == pytest.approx(penalty)


def test_without_a_length_penalty_length_counts_for_nothing_and_without_rewards_it_is_all_there_is():
    assert "overlong" not in given(scoring(), tokens=10_000)["rewards"]
    assert given(scoring(), tokens=10_000)["reward"] == given(scoring(), tokens=1)["reward"]
    assert given(scoring(rewards="", overlong_max=40), tokens=50)["reward"] == -1.0


def test_a_function_named_as_the_length_penalty_is_added_up_or_refused_but_not_lost(mine):
    try:
        run = scoring(rewards=f"{mine}:overlong", overlong_max=40)
    except SystemExit as e:
        assert str(e.code).startswith("--rewards=")
    else:
        assert given(run, tokens=50)["reward"] == 5.0 - 1.0


def test_nothing_that_a_model_says_is_ever_evaluated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run, results, here = scoring(overlong_max=40), [], "__import__('pathlib').Path('here').touch()"
    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "compile", "__import__"):
            patch.setattr(builtins, name, lambda *a, **k: pytest.fail("evaluated"))
        for text in ("__import__('os')", here, f"#### {here}", "6*7", "40+2", "{answer}", "%s", "#### 6*7"):
            results.append(given(run, text=text))
    assert all(r["rewards"]["accuracy"] == 0 and not r["complaints"] for r in results) and not list(tmp_path.iterdir())


# --- metrics ---------------------------------------------------------------------------------------------------------

def made(tokens, reward, text="1", finished=True, errors=0, **rewards):
    return dict(tokens=tokens, reward=reward, rewards=rewards, text=text, answer="1", finished=finished,
                complaints=dict.fromkeys(range(errors), "why"))


def test_metrics_of_a_step_are_those_of_its_answers():
    samples = [
        made(2, 1.5, a=1.0, b=0.5), made(4, 1.5, a=1.0, b=0.5), made(9, 1.5, a=1.0, b=0.5, finished=False),       # all alike
        made(3, 0.0, "2", a=0.0, b=None), made(3, 1.0, a=1.0, b=None, errors=1), made(7, NAN, "no", a=None, b=None, errors=2),
        made(1, NAN, "", a=None, b=None), made(5, 0.5, "2", a=0.5, b=0.0), made(6, NAN, "3", a=None, b=None)]     # one is known
    got = grpo.summary(scoring(num_generations=3), samples)
    assert got == pytest.approx({
        "reward": 6 / 6, "reward_std": math.sqrt((3 * 0.25 + 1 + 0 + 0.25) / 5), "rewards/a": 4.5 / 6, "rewards/b": 1.5 / 4,
        "reward_errors": 3, "accuracy": 3 / 9, "completions/mean_length": 40 / 9, "completions/median_length": 4,
        "completions/max_length": 9, "completions/clipped_ratio": 1 / 9, "frac_reward_zero_std": 2 / 3})


def test_a_function_that_had_nothing_to_say_in_a_whole_step_has_a_mean_of_nan_beside_the_others():
    got = grpo.summary(scoring(num_generations=2), [made(1, r, a=r, b=None) for r in (1.0, 0.0)])
    assert got["rewards/a"] == got["reward"] == 0.5 and math.isnan(got["rewards/b"]) and got["reward_errors"] == 0


def test_groups_whose_rewards_are_alike_teach_nothing_and_are_counted():
    run = scoring(num_generations=2)
    share = lambda *rewards: grpo.summary(run, [made(1, r, a=r) for r in rewards])["frac_reward_zero_std"]
    assert share(1.0, 1.0, 0.0, 0.0) == 1 and share(1.0, 0.0, 0.0, 1.0) == 0 and share(1.0, 1.0, 0.0, 1.0) == 0.5
    assert share(0.0, NAN, 0.0, 1.0) == 0.5 and share(NAN, NAN, 0.0, 1.0) == 0.5


def test_the_median_length_of_an_even_number_of_answers_is_between_the_middle_ones():
    got = grpo.summary(scoring(num_generations=2), [made(n, 1.0, a=1.0) for n in (1, 10, 2, 5)])
    assert got["completions/median_length"] == 3.5 and got["completions/max_length"] == 10


def test_a_step_in_which_nothing_was_scored_has_metrics_all_the_same():
    got = grpo.summary(scoring(num_generations=2), [made(3, NAN, a=None, errors=1), made(5, NAN, "2", a=None, errors=1)])
    assert math.isnan(got["reward"]) and math.isnan(got["rewards/a"]) and got["reward_errors"] == 2
    assert got["accuracy"] == 0.5 and got["completions/mean_length"] == 4 and got["frac_reward_zero_std"] == 1


# --- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(mode="thinking"), "--mode=thinking: no_think or think expected"), (dict(mode=""), "--mode=: "),
    (dict(style="llama"), "--style=llama: compact, smollm3 or chatml expected"),
    (dict(loss_type="ppo"), "--loss_type=ppo: dapo, grpo, dr_grpo or bnpo expected"),
    (dict(scale_rewards="std"), "--scale_rewards=std: group, batch or none expected"),
    (dict(importance_sampling_level="word"), "--importance_sampling_level=word: token or sequence expected"),
    (dict(optimizer="sgd"), "--optimizer=sgd: muon or adamw expected"),
    (dict(steps=0), "--steps.*at least 1"), (dict(prompts=0), "--prompts.*at least 1"), (dict(prompts=-4), "--prompts.*at"),
    (dict(max_new_tokens=0), "--max_new_tokens.*at least 1"), (dict(num_iterations=0), "--num_iterations.*at least 1"),
    (dict(num_iterations=-1), "--num_iterations.*at least 1"),
    (dict(log_every=0), r"--\*_every: at least 1"), (dict(eval_every=0), "_every: at least 1"),
    (dict(save_every=-1), "_every: at least 1"),
    (dict(num_generations=1), "--num_generations=1: at least 2 expected"), (dict(num_generations=0), "--num_generations=0: at"),
    (dict(num_generations=0, teacher="x"), "--num_generations=0: at least 1 expected"),
    (dict(steps=5, num_iterations=2), "--steps=5: a multiple of --num_iterations=2 expected"),
    (dict(micro_batch=-1), "--micro_batch=-1: 0 or more expected"),
    (dict(temperature=0.0), "--temperature.*more than 0"), (dict(temperature=-1.0), "--temperature.*more than 0"),
    (dict(lr=0.0), "--lr.*more than 0"), (dict(grad_clip=0.0), "--grad_clip.*more than 0"),
    (dict(epsilon=-0.1), r"--epsilon \(below 1\).*0 or more"), (dict(epsilon=1.0), r"--epsilon \(below 1\)"),
    (dict(epsilon_high=-0.1), "--epsilon_high.*0 or more"), (dict(beta=-0.1), "--beta.*0 or more"),
    (dict(warmup=-0.1), "--warmup=-0.1: 0 to 1"), (dict(warmup=1.1), "--warmup=1.1: 0 to 1"), (dict(warmup=NAN), "--warmup=na"),
    (dict(overlong_max=-1), "--overlong_max=-1"), (dict(overlong_cache=-1), "--overlong_cache=-1"),
    (dict(overlong_max=0, overlong_cache=-1), "--overlong_cache=-1"),
    (dict(overlong_max=10, overlong_cache=11), "--overlong_cache=11: 0 to --overlong_max=10 expected"),
    (dict(resume=True, overwrite=True), "--resume and --overwrite: one of them")], ids=str)
def test_bad_settings_end_with_one_line(change, message):
    one_line(grpo.check, grpo.Config(**change), CPU, match=message)


@pytest.mark.parametrize("change", [
    {}, dict(num_generations=1, teacher="x"), dict(micro_batch=0), dict(epsilon=0.0, epsilon_high=0.0), dict(epsilon_high=5.0),
    dict(overlong_max=12, overlong_cache=12), dict(overlong_max=0, overlong_cache=99), dict(overlong_cache=0), dict(beta=0.1),
    dict(warmup=0.0), dict(warmup=1.0), dict(steps=6, num_iterations=3), dict(resume=True), dict(num_generations=2),
    dict(mode="think", style="smollm3", loss_type="bnpo", scale_rewards="batch", importance_sampling_level="sequence",
         optimizer="adamw"),
    dict(steps=1, prompts=1, max_new_tokens=1, log_every=1, eval_every=1, save_every=1)], ids=str)
def test_settings_at_their_limits_are_good(change):
    grpo.check(grpo.Config(**change), CPU)


def test_prompts_that_replicas_cannot_share_are_one_line():
    four = SimpleNamespace(**vars(CPU) | dict(world_size=4, dp_size=4))
    one_line(grpo.check, grpo.Config(prompts=6), four, match="--prompts=6: a multiple of the 4 replicas expected")
    grpo.check(grpo.Config(prompts=8), four)


def rated(rewards, text, **change):
    run = SimpleNamespace(cfg=grpo.Config(**change), rewards=rewards, complained=set(), log=SimpleNamespace(say=lambda text: None))
    sample = dict(prompt="", text=text, answer="", finished=True, tokens=5)
    grpo.score(run, sample)
    return sample


def test_an_answer_that_no_function_could_score_is_not_scored_though_a_penalty_is_on():
    def fails(prompt, text, answer):
        return -len(text) / 10 if "a" not in text else 1 / 0
    for overlong_max in (40, 0):
        assert math.isnan(rated({"f": (fails, 1.0)}, "cab", overlong_max=overlong_max)["reward"])
        assert rated({"f": (fails, 1.0)}, "xyz", overlong_max=overlong_max)["reward"] == pytest.approx(-0.3)
    assert rated({"f": (fails, 1.0), "accuracy": (grpo.accuracy, 1.0)}, "cab")["reward"] == 0.0
    assert rated({}, "cab")["reward"] == 0.0                # the penalty alone


@pytest.mark.parametrize("value", [1e39, math.inf, math.nan, "much"])
def test_a_reward_beyond_float32_is_none(value):
    sample = rated({"f": (lambda *_: value, 1.0)}, "x")
    assert math.isnan(sample["reward"]) and len(sample["complaints"]) == 1


def test_a_reward_file_that_exits_is_one_line_or_a_complaint(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    one_line(grpo.load_rewards, f"{tmp_path}/mine.py:f", match="^--rewards=.*SystemExit")
    sample = rated({"f": (lambda *_: sys.exit("bye"), 1.0)}, "x")
    assert len(sample["complaints"]) == 1 and "bye" in sample["complaints"]["f"]
