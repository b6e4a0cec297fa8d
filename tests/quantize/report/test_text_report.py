"""A variant as text: what is known is a line each, and nothing is invented about what is not."""

from pathlib import Path
from typing import Any

import pytest

from config.manifest import Calibration, Check, Override, Quantizer, Restricted
from quantize.report.text_report import disposal_lines, page
from quantize.schemes.scheme import preset
from quantize.variants.pruning import Disposable
from tests.quantize.manifests import manifest, quality

PART = Restricted(tokens=10, kl_mean=0.01, top1_agreement=0.97, perplexity_ratio=1.01)
MISSED = Check(name="kl_mean", value=0.07, limit=0.05, passed=False)


@pytest.mark.parametrize(
    "changes,line",
    [
        ({}, "made         2026-11-01 00:00 UTC by gptqmodel 7.6.0 in 1 s"),
        ({}, "damping      7 modules at 0.01"),
        ({"calibration": None}, "calibration  unknown: made elsewhere, and adopted"),
        (
            {
                "calibration": Calibration(
                    sha256="c", samples=9, tokens=90, reasoning_tokens=50, max_tokens=99, seed=0, generated=8
                )
            },
            "calibration  9 chats, 90 tokens, 50 of them reasoning; 8 written by the base itself",
        ),
        (
            {
                "calibration": Calibration(
                    sha256="c", samples=9, tokens=90, reasoning_tokens=0, max_tokens=99, seed=0, skipped_rows=3
                )
            },
            "calibration  9 chats, 90 tokens, 0 of them reasoning; invalid rows skipped: 3",
        ),
        (
            {"scheme": preset("w4a16-g64").model_copy(update={"overrides": (Override(modules="*.up", bits=8),)})},
            "exception    *.up: 8 bits, group size 64",
        ),
        (
            {"scheme": preset("w4a16-g64").model_copy(update={"overrides": (Override(modules="*.up"),)})},
            "exception    *.up: as in the base",
        ),
        (
            {"quantizer": Quantizer(backend="b", version="1", modules=7, fallback_modules=("m.up",))},
            "rounded      to nearest, not solved: m.up",
        ),
        (
            {"quantizer": Quantizer(backend="b", version="1", modules=7, settings={"scale_norm": 2.4})},
            "settings     scale_norm 2.4",
        ),
        ({"quality": quality(answer=PART)}, "answer       10 tokens: KL 0.0100, top-1 97.0%, perplexity x1.0100"),
        ({"quality": quality(checks=(MISSED,))}, "check        kl_mean 0.0700 against 0.05: failed"),
    ],
)
def test_what_is_known_is_a_line(changes: dict[str, Any], line: str) -> None:
    """Each fact stands behind its name."""
    assert line in page(manifest(**changes), Path("v")).splitlines()


def test_what_is_unknown_is_no_line() -> None:
    """An adopted variant's damping and time are not told."""
    told = page(manifest(quantizer=Quantizer(backend="unknown", version="unknown", modules=7)), Path("v"))
    assert "damping" not in told
    assert "by unknown unknown\n" in told


def test_what_can_go_is_summed_up() -> None:
    """A line each with size and reason, and what it frees together."""
    found = [Disposable(Path("a"), "old", 2_000_000), Disposable(Path("b"), "older", 3_000_000)]
    assert disposal_lines(found) == ["      2 MB  a  old", "      3 MB  b  older", "      5 MB  together"]
    assert disposal_lines([]) == ["nothing to remove"]
