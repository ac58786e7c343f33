"""A teacher over several GPUs: its layers are divided well, and every byte is counted on one card."""

from __future__ import annotations

import itertools

import pytest

from qswitch.config import RunConfig
from qswitch.errors import PlanError
from qswitch.plan import memory
from qswitch.plan.advice import require_fit
from qswitch.plan.breakdown import break_down
from qswitch.plan.cards import best_split, even_split
from qswitch.plan.machine import Budget, Machine
from qswitch.plan.render import render
from qswitch.plan.scheduler import model_shapes, plan_run
from qswitch.plan.teacher_alone import plan_teaching
from qswitch.presets import load_run_config
from qswitch.units import GIB

MACHINE = Machine("cuda", "bf16")


def with_gpus(num: int, **changes: object) -> RunConfig:
    config = load_run_config("llama-7b-to-1b")
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"num_gpus": num, **changes})})


def test_the_plan_counts_each_card():
    """Bytes of weights and caches are neither lost nor counted twice, and the fullest card decides."""
    teacher, student = model_shapes(with_gpus(1))
    one, found = (break_down(with_gpus(num), teacher, student, MACHINE) for num in (1, 3))
    assert sum(found.teacher_layers) == teacher.num_layers and len(found.further) == 2

    def total(part: str) -> int:
        return found.parts[part] + sum(card.parts[part] for card in found.further)

    assert total("teacher_weights") == one.parts["teacher_weights"]
    # Keys and values of every layer, and the keys of one while it is packed anew: on each card that has layers.
    packing = one.parts["teacher_kv_cache"] / (2 * teacher.num_layers + 1)
    packed = sum(bool(num) for num in found.teacher_layers)
    assert total("teacher_kv_cache") == one.parts["teacher_kv_cache"] + (packed - 1) * packing
    assert found.total_bytes < one.total_bytes
    assert found.total_bytes == max(max(found.phases.values()), *(card.total_bytes for card in found.further))
    plan = plan_run(with_gpus(3), budget_bytes=6 * GIB, machine=MACHINE)
    assert plan.fits and max(plan.phases.values()) <= 6 * GIB
    assert all(card.total_bytes <= 6 * GIB for card in plan.breakdown.further)
    shown = render(plan, [], "named")
    assert "Memory of GPU 0 by part" in shown and "Memory of GPU 2 by part" in shown
    with pytest.raises(PlanError, match=r"on GPU [012] even at its smallest .*; the budget is 2.00"):
        require_fit(plan_run(with_gpus(3), budget_bytes=2 * GIB, machine=MACHINE))


def test_the_split_is_the_one_whose_fullest_gpu_holds_least():
    for num_layers, num_gpus, fixed in itertools.product((1, 2, 7, 32), (2, 3, 5), (0, 3, 10, 100)):
        tried = {}

        def measured(layers: tuple[int, ...], fixed: int = fixed, tried: dict = tried) -> tuple[int, ...]:
            tried[layers] = max(fixed + layers[0], *layers[1:])
            return layers

        found = best_split(
            num_layers, num_gpus, measured, lambda split, fixed=fixed: (fixed + split[0], max(split[1:]))
        )
        every = [
            split for split in itertools.product(range(num_layers + 1), repeat=num_gpus) if sum(split) == num_layers
        ] if num_gpus < 4 or num_layers < 8 else [(n, *even_split(num_layers - n, num_gpus - 1))
                                                  for n in range(num_layers + 1)]  # fmt: skip
        assert tried[found] == min(max(fixed + split[0], *split[1:]) for split in every), (num_layers, num_gpus, fixed)


def test_the_layers_are_shared_evenly():
    assert even_split(7, 3) == (2, 2, 3) and even_split(6, 3) == (2, 2, 2) and even_split(1, 2) == (0, 1)


def test_a_teacher_alone_is_planned_over_its_gpus():
    budget = Budget(4 * GIB, "named", "cuda")
    config = with_gpus(3)
    with pytest.raises(PlanError, match="The teacher alone needs"):
        plan_teaching(with_gpus(1, precision="bf16"), budget, MACHINE)
    plan = plan_teaching(config, budget, MACHINE)
    assert sum(plan.teacher_layers) == 32 and plan.total_bytes <= budget.num_bytes and len(plan.further) == 2
    assert plan.total_bytes == max(sum(plan.parts.values()), *(card.total_bytes for card in plan.further))
    assert "It lies on 3 GPUs" in plan.render()
    two = plan_teaching(config, budget, MACHINE, processes=2)
    assert two.seconds == pytest.approx(plan.seconds / 2) and "in each of 2 processes" in two.render()


def test_a_teacher_that_passes_by_has_the_room_that_its_plan_leaves():
    budget = Budget(4 * GIB, "named", "cuda")
    plan = plan_teaching(with_gpus(1, precision="bf16"), budget, MACHINE, spread=True)
    assert plan.host_bytes > 8 * GIB
    working = sum(plan.parts[name] for name in ("kept_hidden", "kv_cache", "logits", "forward"))
    beside = plan.parts["cuda_context"] + int(working * 1.05)  # with the allowance that the plan of a run has
    assert plan.weights_room_bytes == budget.num_bytes - beside
    assert plan.parts["teacher_weights"] == plan.weights_room_bytes, "all that is left is used"
    # What stays and what passes by: a layer, or the head where it is larger, as Gemma 2's of 256000 x 3584 weights is.
    assert plan.parts["teacher_weights"] - (13.48e9 - plan.host_bytes) == pytest.approx(13.48e9 / 32, rel=0.1)
    gemma = load_run_config("gemma2-9b-to-2b", ["teacher.precision=bf16", "rollout.policy=teacher"])
    plan = plan_teaching(gemma, Budget(8 * GIB, "named", "cuda"), MACHINE, spread=True)
    weights = memory.weight_bytes(model_shapes(gemma)[0], "bf16", 2)
    assert plan.parts["teacher_weights"] - (weights - plan.host_bytes) == pytest.approx(256000 * 3584 * 2, rel=0.05)
