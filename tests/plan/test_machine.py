"""The machine that is planned for is the one that is there, or the card that was named."""

import re

import pytest

from qswitch import doctor
from qswitch.config import TrainSection
from qswitch.errors import ConfigError
from qswitch.layers import build_config
from qswitch.plan import machine
from qswitch.plan.machine import GPUS, describe_machine, detect_budget_bytes, find_budget, parse_size
from qswitch.units import GIB


def test_a_card_is_known_by_the_name_that_nvidia_smi_gives_it():
    from qswitch.plan.machine import GPUS, _card_called

    named = {"NVIDIA GeForce RTX 3060": "rtx3060-12gb", "GPU 0, NVIDIA GeForce RTX 4060 Ti": "rtx4060ti-8gb",
             "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx4070tisuper-16gb", "NVIDIA GeForce RTX 3080": "rtx3080-10gb",
             "NVIDIA GeForce RTX 4050 Laptop GPU": "rtx4050-laptop-6gb", "the first GPU, NVIDIA GeForce RTX 4090":
             "rtx4090-24gb"}  # fmt: skip
    assert {label: _card_called(label) for label in named} == {label: GPUS[card] for label, card in named.items()}
    assert _card_called("Tesla V100-SXM2-16GB") is None and _card_called("NVIDIA T400") is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("rtx3080", "rtx3080-10gb or rtx3080-12gb"),
        ("RTX 3080 12GB", "rtx3080-12gb"),
        ("rtx4070-ti-super", "rtx4070tisuper-16gb"),
        ("NVIDIA GeForce RTX 5070 Ti", "rtx5070ti-16gb"),
        ("4060ti-16gb", "rtx4060ti-16gb"),
        ("t4", "tesla-t4-15gb"),
        ("rtx3060-laptop-6gb", None),
        ("gtx1080", None),
        ("a100", None),
    ],
)
def test_a_card_that_is_not_in_the_table_is_answered_with_the_right_one_or_none(written: str, meant: str | None):
    with pytest.raises(ConfigError, match="is not in the table") as caught:
        find_budget(TrainSection(), gpu=written)
    said = str(caught.value)
    assert (f"Did you mean {meant}?" in said) if meant else ("Did you mean" not in said)
    assert "Or give --vram; the hours are then those of an RTX 3060" in said


def test_every_card_is_found_without_its_memory():
    for card in GPUS:
        model = card.rpartition("-")[0]
        with pytest.raises(ConfigError) as caught:
            find_budget(TrainSection(), gpu=model)
        meant = re.search(r"Did you mean (.*?)\?", str(caught.value))[1].split(" or ")
        assert meant == [name for name in GPUS if name.rpartition("-")[0] == model]


def test_the_published_figures_of_a_card_agree_with_each_other():
    """128 fp32 lanes a multiprocessor from Ampere on (64 on Turing), 2 operations each; consumer cards boost to 1.4 to
    2.9 GHz. Tensor products run at twice that rate, on Turing at four times, on a T4 at eight."""
    for name, gpu in GPUS.items():
        lanes, times = (64, 8 if name.startswith("tesla") else 4) if gpu.capability == (7, 5) else (128, 2)
        boost = gpu.flops / times / (2 * lanes * gpu.num_multiprocessors)
        assert 1.4e9 < boost < 2.9e9, name
        assert name.endswith(f"-{gpu.nominal_gib}gb")
    boosts = {"rtx3080-10gb": 1.71, "rtx3080-12gb": 1.71, "rtx3080ti-12gb": 1.665, "rtx3070ti-8gb": 1.77,
              "rtx3090ti-24gb": 1.86, "rtx4070super-12gb": 2.475, "rtx4070ti-12gb": 2.61, "rtx4070tisuper-16gb": 2.61,
              "rtx4080super-16gb": 2.55, "rtx5070-12gb": 2.512, "rtx5070ti-16gb": 2.452, "rtx5080-16gb": 2.617,
              }  # fmt: skip
    for name, ghz in boosts.items():  # the clocks of the same pages
        assert GPUS[name].flops == pytest.approx(2 * 2 * 128 * GPUS[name].num_multiprocessors * ghz * 1e9, rel=5e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 * GIB), ("12GB", 12 * GIB), ("8gib", 8 * GIB), ("12", 12 * GIB), ("7.5 GiB", int(7.5 * GIB)),
     ("512MiB", GIB // 2), (16, 16 * GIB)],
)  # fmt: skip
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "twelve", "-3", "0", "12 apples", "GiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="not a memory size"):
        parse_size(text)


def test_what_a_container_holds_of_files_it_has_read_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 17\nfile {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n")
    monkeypatch.setattr(machine, "_host_available_bytes", lambda: (8 * GIB, "meminfo"))
    assert detect_budget_bytes("cpu") == (2 * GIB, "free memory of the container (cgroup)")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    assert detect_budget_bytes("cpu")[0] == 4 * GIB, "memory.stat is of an earlier moment, and no more than the limit"
    (tmp_path / "memory.max").write_text("max\n")
    assert detect_budget_bytes("cpu") == (8 * GIB, "meminfo")


def test_the_budget_is_found_on_gpu_and_host(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    size, source = detect_budget_bytes()
    assert size > 0 and ("meminfo" in source or "cgroup" in source)
    with pytest.raises(ConfigError, match="no GPU answers"):
        detect_budget_bytes("cuda")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 11264, NVIDIA GeForce RTX 3060, 8.6\n")
    program.chmod(0o755)
    assert detect_budget_bytes() == (11 * GIB, "free memory of the first GPU, NVIDIA GeForce RTX 3060 (nvidia-smi)")
    assert "meminfo" in detect_budget_bytes("cpu")[1] or "cgroup" in detect_budget_bytes("cpu")[1]
    program.write_text("#!/bin/sh\necho 'driver failed'; exit 9\n")
    assert "nvidia-smi" not in detect_budget_bytes()[1]
    program.unlink()
    monkeypatch.setattr(machine, "WSL_PROGRAMS", tmp_path / "wsl")
    (tmp_path / "wsl").mkdir()
    (tmp_path / "wsl" / "nvidia-smi").write_text("#!/bin/sh\necho 8192, NVIDIA GeForce RTX 4060, 8.9\n")
    (tmp_path / "wsl" / "nvidia-smi").chmod(0o755)
    assert "RTX 4060" in detect_budget_bytes()[1], "under WSL2 without a login shell"


FAKE_NVIDIA_SMI = """#!/bin/sh
id=0; query=
for word in "$@"; do case "$word" in --id=*) id=${word#--id=};; --query-gpu=*) query=$word;; esac; done
case "$query" in *compute_cap*) [ -n "$OLD_DRIVER" ] && exit 2;; esac
case "$id" in
  0|GPU-aaaa) line="22528, NVIDIA GeForce RTX 2080 Ti, 7.5";;
  1|GPU-bbbb) line="11264, NVIDIA GeForce RTX 3060, 8.6";;
  *) exit 6;;
esac
case "$query" in *compute_cap*) echo "$line";; *) echo "${line%,*}";; esac
"""


def test_the_gpu_that_cuda_sees_first_is_planned_for(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(FAKE_NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    train = build_config({"teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"train": "c.jsonl"}}).train
    # A card without bf16 units computes in fp16, and is planned so, also where it is only named.
    assert detect_budget_bytes()[0] == 22 * GIB and describe_machine(train).compute_dtype == "fp16"
    assert describe_machine(train, "cuda").compute_dtype == "bf16", "of a card that is called by its memory alone"
    assert describe_machine(train, "cuda", machine.GPUS["tesla-t4-15gb"]).compute_dtype == "fp16"
    assert machine.gpu_dtype((6, 1)) == "fp32" and machine.gpu_dtype((7, 0)) == "fp16"
    asked = tmp_path / "asked"
    program.write_text(FAKE_NVIDIA_SMI + f"echo >> {asked}\n")
    assert describe_machine(train).compute_dtype == describe_machine(train).compute_dtype == "fp16"
    assert not asked.exists(), "what a card is called and can do stays"
    assert detect_budget_bytes()[0] == 22 * GIB and asked.read_text() == "\n", "what is free does not"
    for first in ("1", "1,0", "GPU-bbbb"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)
        size, source = detect_budget_bytes()
        assert size == 11 * GIB and source.startswith(
            f"free memory of GPU {first.split(',')[0]}, NVIDIA GeForce RTX 3060"
        )
        assert describe_machine(train).compute_dtype == "bf16"
    for hidden in ("", "-1", "7"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert "nvidia-smi" not in detect_budget_bytes()[1] and describe_machine(train).device == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("OLD_DRIVER", "yes")
    assert detect_budget_bytes()[0] == 22 * GIB and describe_machine(train).compute_dtype == "fp16", "by its name"


# As nvidia-smi answers on a machine whose first card is whole and whose second is cut (MIG): it knows no slice's UUID.
SLICED_NVIDIA_SMI = """#!/bin/sh
id=0; query=
for word in "$@"; do case "$word" in --id=*) id=${word#--id=};; --query-gpu=*) query=$word;; esac; done
case "$query" in *compute_cap*) [ -n "$OLD_DRIVER" ] && exit 2; capability=", 8.0";; esac
case "$id" in
  0|GPU-aaaa) echo "40000, NVIDIA A100-PCIE-40GB$capability, Disabled";;
  1|GPU-bbbb) echo "[Insufficient Permissions], NVIDIA A100-SXM4-80GB$capability, Enabled";;
  *) echo "No devices were found"; exit 6;;
esac
"""


@pytest.mark.parametrize("old_driver", ["", "yes"])
def test_a_slice_of_a_card_is_not_taken_for_the_whole(monkeypatch, tmp_path, old_driver):
    program = tmp_path / "nvidia-smi"
    program.write_text(SLICED_NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("OLD_DRIVER", old_driver)
    train = build_config({"teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"train": "c.jsonl"}}).train
    for visible, card in (
        ("MIG-c7384736-a75d-5afc-978f-d2f1294409fd", "NVIDIA A100-PCIE-40GB"),  # of no card that it names
        ("MIG-GPU-bbbb/1/0", "NVIDIA A100-SXM4-80GB"),
        ("1", "NVIDIA A100-SXM4-80GB"),
        ("GPU-bbbb", "NVIDIA A100-SXM4-80GB"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ConfigError, match=rf"GPU {visible}, {card} is cut into slices.*not known.*--vram 9GiB"):
            detect_budget_bytes()
        assert machine.find_budget(train, vram="9GiB").num_bytes == 9 * GIB
        found = describe_machine(train)
        assert found.device == "cuda" and found.compute_dtype == "bf16"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert detect_budget_bytes()[0] == 40000 * 2**20
    with pytest.raises(ConfigError, match="GPU 1, NVIDIA A100-SXM4-80GB is cut"):
        detect_budget_bytes(num_gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    for name in ("_try_nf4", "_try_hub"):
        monkeypatch.setattr(doctor, name, lambda *_: "not tried")
    assert "free memory  GPU 1, NVIDIA A100-SXM4-80GB is cut into slices" in doctor.render(doctor.examine())
