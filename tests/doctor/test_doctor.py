"""The doctor finds what is wrong with a machine, and nothing on this one."""

import dataclasses
import fcntl
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from grit_jax.checkpoints.checkpoint import Checkpoints
from grit_jax.cli import doctor as command
from grit_jax.cli.main import main
from grit_jax.doctor import environment, selftest
from grit_jax.doctor.environment import Devices, Environment, find_problems, inspect
from grit_jax.losses import contrastive
from grit_jax.model import attention
from grit_jax.runs.checks import Check
from grit_jax.train import step

HEALTHY = Environment(
    versions={"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1", "jax-cuda12-plugin": None},
    fitting={"jaxlib": "<=0.10.2,>=0.10.1", "libtpu": "==0.0.42.*"},
    device_files={"TPU": ("/dev/accel0",), "NVIDIA GPU": ()},
    platforms=None,
    lock=None,
    devices=(Devices("tpu", "TPU v4", 4, 32 << 30),),
    process_index=0,
    process_count=1,
    error=None,
)
CPU = (Devices("cpu", "cpu", 1, None),)
GPU = {"TPU": (), "NVIDIA GPU": ("/dev/nvidia0",)}


def test_every_check_passes_on_this_machine_and_leaves_nothing_behind(tmp_path):
    checks = list(selftest.selftest(tmp_path))
    assert all(check.passed for check in checks), checks
    kinds = {check.target.partition(",")[0].partition(" (")[0].partition(" in ")[0] for check in checks}
    assert kinds == {
        "attention", "experts", "train step", "contrastive loss", "logits at temperature 0.02", "checkpoint"
    }  # fmt: skip
    assert not list(tmp_path.iterdir())


def outcomes(measurements):
    return [selftest._run(item) for item in measurements]


def test_a_kernel_that_sees_the_future_fails(monkeypatch):
    monkeypatch.setattr(attention, "_splash_mask", lambda _, size: splash_attention_mask.FullMask((size, size)))
    checks = {check.target: check.passed for check in outcomes(selftest._attention())}
    assert not checks["attention, causal (splash, interpreted, float32)"]
    assert checks["attention, bidirectional (splash, interpreted, float32)"]
    assert checks["attention, causal (blockwise, float32)"]


def test_a_grouped_product_that_mixes_up_experts_fails(monkeypatch):
    grouped = jax.lax.ragged_dot
    monkeypatch.setattr(jax.lax, "ragged_dot", lambda x, experts, **options: grouped(x, experts[::-1], **options))
    assert not any(check.passed for check in outcomes(selftest._experts()))


def test_a_step_that_leaves_out_the_other_devices_fails(monkeypatch):
    monkeypatch.setattr(step, "_over_devices", functools.partial(jax.tree.map, lambda x: jnp.sum(x, axis=0)))
    assert not selftest._run(next(selftest._step())).passed


def test_tiled_losses_with_wrong_scores_fail(monkeypatch):
    excess = contrastive._excess
    monkeypatch.setattr(contrastive, "_excess", lambda *inputs: 1.01 * excess(*inputs))
    checks = outcomes(selftest._contrastive())
    assert len(checks) == 2
    assert not any(check.passed for check in checks)


def test_logits_in_one_bfloat16_pass_fail(monkeypatch):
    def one_pass(spec, *operands):  # what a TPU does by default, and a CPU only when told so
        return jnp.einsum(spec, *(x.astype(jnp.bfloat16) for x in operands), preferred_element_type=jnp.float32)

    monkeypatch.setattr(contrastive, "exact_einsum", one_pass)
    (check,) = outcomes(selftest._similarity())
    assert not check.passed
    assert check.difference > 10 * check.tolerance


def test_a_checkpoint_with_one_other_bit_fails_and_is_removed(monkeypatch, tmp_path):
    restore = Checkpoints.restore

    def flip(self, *arguments):
        params, rest = restore(self, *arguments)
        table = params["embedding"]
        return params | {"embedding": table.at[3, 4].set(jnp.nextafter(table[3, 4], jnp.inf))}, rest

    monkeypatch.setattr(Checkpoints, "restore", flip)
    (check,) = outcomes(selftest._checkpoint(tmp_path))
    assert check.difference == 1
    assert not check.passed
    assert not list(tmp_path.iterdir())


def test_what_a_killed_selftest_has_left_is_not_read(tmp_path):
    (tmp_path / "grit-jax-selftest/0").mkdir(parents=True)
    (check,) = outcomes(selftest._checkpoint(tmp_path))
    assert check.passed, check.text
    assert not list(tmp_path.iterdir())


def test_a_check_that_cannot_be_computed_fails_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    (check,) = outcomes(selftest._checkpoint(tmp_path / "file"))
    assert check.difference == np.inf
    assert "Error: " in check.text


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"devices": CPU, "platforms": "cpu"}, "JAX_PLATFORMS=cpu hides a TPU (/dev/accel0)", "unset JAX_PLATFORMS"),
        ({"devices": CPU}, "JAX does not use a TPU (/dev/accel0)", "JAX_LOGGING_LEVEL=DEBUG"),
        (
            {"devices": CPU, "versions": HEALTHY.versions | {"libtpu": None}},
            "JAX has no support for a TPU (/dev/accel0): libtpu is not installed",
            "'.[tpu]'",
        ),
        (
            {"devices": CPU, "device_files": GPU},
            "no support for a NVIDIA GPU (/dev/nvidia0): jax-cuda12-plugin or jax-cuda13-plugin is not installed",
            "'.[cuda12]'",
        ),
        (
            {"versions": HEALTHY.versions | {"jaxlib": "0.9.1"}},
            "jaxlib 0.9.1 does not fit jax 0.10.2, which takes <=0.10.2,>=0.10.1",
            "pip install",
        ),
        ({"versions": HEALTHY.versions | {"libtpu": "0.0.30"}}, "libtpu 0.0.30 does not fit jax 0.10.2", "'.[tpu]'"),
        (
            {"versions": HEALTHY.versions | {"jax-cuda12-plugin": "0.10.1"}},
            "jax-cuda12-plugin 0.10.1 does not match jaxlib 0.10.2",
            "'.[cuda12]'",
        ),
        (
            {"lock": "another process holds it", "devices": CPU},
            "/tmp/libtpu_lockfile cannot be taken: another",
            "sudo rm",
        ),
    ],
)
def test_each_problem_is_named_with_its_remedy(changes, text, remedy):
    (problem,) = find_problems(dataclasses.replace(HEALTHY, **changes))
    assert text in problem.text
    assert remedy in problem.remedy


def test_a_healthy_machine_has_no_problem():
    assert not list(find_problems(HEALTHY))
    held = dataclasses.replace(HEALTHY, lock="another process holds it")  # so it looks where this process has the TPU
    assert not list(find_problems(held))
    assert not list(find_problems(dataclasses.replace(held, device_files={}, devices=CPU)))
    gpu = dataclasses.replace(HEALTHY, device_files=GPU, devices=(Devices("gpu", "NVIDIA H100", 1, None),))
    assert not list(find_problems(dataclasses.replace(gpu, platforms="cuda,cpu")))


def test_facts_are_those_of_this_machine(monkeypatch):
    facts = inspect()
    assert facts.versions["jax"] == jax.__version__
    assert facts.devices == (Devices("cpu", "cpu", 8, None),)
    assert set(facts.fitting) == {"jaxlib", "libtpu"}
    monkeypatch.setattr(jax, "devices", lambda: 1 / 0)
    facts = inspect()
    assert (facts.devices, facts.error) == ((), "ZeroDivisionError: division by zero")
    assert any("JAX does not start" in problem.text for problem in find_problems(facts))


def test_a_platform_that_was_asked_for_and_is_not_there_is_to_be_unset():
    facts = dataclasses.replace(
        HEALTHY, platforms="tpu", devices=(), device_files={}, error="RuntimeError: Unable to initialize backend 'tpu'"
    )
    (problem,) = find_problems(facts)
    assert problem.remedy == "unset JAX_PLATFORMS"


def test_a_lock_file_is_a_problem_while_another_holds_it(tmp_path):
    path = tmp_path / "lock"
    assert environment._lock(path) is None
    path.write_text("")
    assert environment._lock(path) is None
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert environment._lock(path) == "another process holds it"


GOOD, BAD = Check("sums", 0.0, "largest difference 0"), Check("products", np.inf, "largest difference inf")


@pytest.fixture
def machine(monkeypatch):
    """Sets the facts and the checks that the command finds."""

    def put(facts=HEALTHY, checks=(GOOD,)):
        monkeypatch.setattr(command, "inspect", lambda: facts)
        monkeypatch.setattr(selftest, "selftest", lambda folder: iter(checks))

    return put


def test_doctor_exits_with_1_when_there_is_a_problem_or_a_check_fails(machine, capsys):
    machine()
    assert main(["doctor"]) == 0
    assert "4 x TPU v4 (tpu), 32.0 GiB each" in capsys.readouterr().out
    assert main(["doctor", "--selftest"]) == 0
    assert "ok   sums: largest difference 0" in capsys.readouterr().out
    machine(checks=(BAD, GOOD))
    assert main(["doctor"]) == 0
    assert main(["doctor", "--selftest"]) == 1
    assert "FAIL products: largest difference inf" in capsys.readouterr().out
    machine(dataclasses.replace(HEALTHY, lock="another process holds it", devices=CPU))
    assert main(["doctor", "--selftest"]) == 1
    assert "  remedy: end the process" in capsys.readouterr().out


def test_json_is_one_object(machine, capsys):
    machine(checks=(GOOD, BAD))
    assert main(["doctor", "--selftest", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [check["passed"] for check in found["checks"]] == [True, False]
    assert found["checks"][1]["difference"] is None
    assert found["devices"][0]["kind"] == "TPU v4"
    assert found["problems"] == []


def test_only_process_0_prints_and_all_exit_with_the_same_code(machine, capsys):
    machine(dataclasses.replace(HEALTHY, process_index=1, process_count=2), (BAD,))
    assert main(["doctor", "--selftest", "--checkpoint", "somewhere"]) == 1
    assert capsys.readouterr().out == ""


def test_a_folder_is_asked_for_where_processes_share_none(machine, capsys):
    machine(dataclasses.replace(HEALTHY, process_count=2))
    assert main(["doctor", "--selftest"]) == 2
    assert "--checkpoint is missing: name a folder that all 2 processes see" in capsys.readouterr().err
    assert main(["doctor", "--checkpoint", "x"]) == 2
    assert "add --selftest" in capsys.readouterr().err
