"""The report has everything that is recorded, names what is not, makes no request, and is well-formed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from config.capacity import Capacity, Hardware, write_capacity
from config.manifest import Base
from config.quality import Generation, Restricted, Tasks
from quantize.errors import VariantError
from quantize.report.html_report import visible, write_report
from quantize.schemes.scheme import preset
from tests.config.measurements import SETUP, load, measurement
from tests.quantize.manifests import manifest, quality, write_manifest

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text'"
PART = Restricted(tokens=10, kl_mean=0.01, top1_agreement=0.97, perplexity_ratio=1.01)
RATES = {"unfinished": 0.25, "repeating": 0.0, "unclosed": 0.1}
RICH = quality(
    reasoning=PART,
    answer=PART,
    length_ratio=1.04,
    generation=Generation(
        prompts=8,
        seeds=3,
        new_tokens=128,
        length_ratio=1.04,
        **RATES,
        **{f"parent_{name}": rate for name, rate in RATES.items()},
    ),
    tasks=Tasks(dataset_sha256="t", items=40, parent_accuracy=0.5, accuracy=0.45, recovery=0.9, flips=0.1),
)


class Outline(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        self.links += (attributes.get("aria-labelledby") or "").split()
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def evidence(**changes: Any) -> dict[str, Any]:
    """What an evaluation leaves, with hostile words in it."""
    worst = {"where": "ab12", "kl_mean": 1.2, "kl_here": 7.0, "place": 44, "text": HOSTILE, "next": " 4"}
    sides = {"parent": " noon", "variant": "\n", "parent_top": [[HOSTILE, 0.8]], "variant_top": [["  ", 0.5]]}
    pair = {"prompt": HOSTILE, "seed": 0, "parent": HOSTILE, "variant": HOSTILE, "parent_tokens": 9}
    histogram = {"edges": [0.0, 0.001, 0.01, 0.1], "counts": [5, 3, 2]}
    return {"kl_histogram": histogram, "worst": [{**worst, **sides}], "generations": [pair], **changes}


def modules() -> dict[str, Any]:
    """Losses of two kinds over three layers, one of them never learned."""
    rows = [
        {
            "module": f"model.layers.{layer}.mlp.{kind}",
            "bits": 4,
            "group_size": 64,
            "loss": 0.1 * (layer + 1),
            "damp": 0.01,
        }
        for layer in range(3)
        for kind in ("up_proj", "down_proj")
    ]
    return {"modules": [*rows, {**rows[0], "loss": None, "fallback": True}]}


def written(tmp_path: Path, *directories: Path, base: Path | None = None) -> tuple[str, Outline]:
    """Write a page about directories, and read it back."""
    from config.manifest import Manifest  # noqa: PLC0415

    write_report([(directory, Manifest.read(directory)) for directory in directories], tmp_path / "report.html", base)
    page = (tmp_path / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert all(link.removeprefix("#") in outline.ids for link in outline.links)
    return page, outline


def test_everything_recorded_is_shown(tmp_path: Path) -> None:
    """Charts, tables and samples, all escaped; no link leaves the page and no script is in it."""
    write_manifest(tmp_path / "rich", quality=RICH)
    (tmp_path / "rich" / "quant_log.json").write_text(json.dumps(modules()))
    (tmp_path / "rich" / "evaluation.json").write_text(json.dumps(evidence()))
    gpu = Hardware(device=HOSTILE, count=1, unit="GPU")
    elsewhere = measurement(load(1), setup=SETUP.model_copy(update={"hardware": gpu}))
    write_capacity(tmp_path / "rich" / "capacity.json", Capacity(measurements=(measurement(), elsewhere)))
    page, outline = written(tmp_path, tmp_path / "rich")
    assert outline.seen.count("svg") == outline.seen.count("desc") == 9
    assert "script" not in outline.seen
    assert not re.search(r"https?:|url\(|@import|\ssrc=|\son\w+=", page)
    assert "default-src 'none'" in page
    assert "".join(outline.words).count(HOSTILE) >= 5
    for word in ("did not stop", "recovery", "reasoning", "Rounded to nearest (RTN)", "␣␣ 50.0%", "⏎"):
        assert word in page


def test_the_speed_of_the_base_is_shown_beside_its_variants(tmp_path: Path) -> None:
    """With its directory given, the base has a line of its own; numbers say how many requests ran at a time."""
    write_manifest(tmp_path / "variant")
    write_capacity(tmp_path / "variant" / "capacity.json", Capacity(measurements=(measurement(),)))
    (tmp_path / "smol").mkdir()
    write_capacity(tmp_path / "smol" / "capacity.json", Capacity(measurements=(measurement(load(3), load(7)),)))
    _, outline = written(tmp_path, tmp_path / "variant", base=tmp_path / "smol")
    assert {"1", "4", "3", "7", "base", "smol-int4-01234567"} <= set(outline.words)
    row = ("base", "7", "126.0", "100.0", "300.0")
    assert "\n".join(row) in "\n".join(word.strip() for word in outline.words if word.strip())


def test_different_request_mixes_are_not_comparable(tmp_path: Path) -> None:
    """Measurements with different request mixes have a warning."""
    shape = measurement().mix[0].model_copy(update={"prompt_tokens": 999})
    for name, mix in (("a", measurement().mix), ("b", (shape,))):
        write_manifest(tmp_path / name, id=name)
        write_capacity(tmp_path / name / "capacity.json", Capacity(measurements=(measurement(mix=mix),)))
    page, _ = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert page.count("different request mixes") == 1


def test_the_base_of_other_variants_is_refused(tmp_path: Path) -> None:
    """The error names the directory."""
    write_manifest(tmp_path / "variant")
    (tmp_path / "llama").mkdir()
    with pytest.raises(VariantError, match="none of these variants was made from llama"):
        written(tmp_path, tmp_path / "variant", base=tmp_path / "llama")


def test_what_is_missing_is_one_sentence(tmp_path: Path) -> None:
    """A directory with nothing but its manifest has a page, too."""
    write_manifest(tmp_path / "bare", calibration=None)
    page, outline = written(tmp_path, tmp_path / "bare")
    assert outline.seen.count("svg") == 1
    for line in (
        "Speed: not measured",
        "No paired generations",
        "no quant_log.json",
        "no evaluation.json",
        "by another tool",
    ):
        assert line in page


def test_bases_have_sections_of_their_own(tmp_path: Path) -> None:
    """Variants are grouped by base, the closest first; different texts have a warning."""
    write_manifest(tmp_path / "a", id="smol-int4-far", quality=quality(kl_mean=0.2, tokens=9))
    write_manifest(tmp_path / "b", id="smol-int8-near", scheme=preset("w8a8"))
    write_manifest(tmp_path / "c", id="qwq", base=Base(name="QwQ", digest="1" * 64, dtype="bf16"))
    page, outline = written(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert outline.seen.count("section") == 2
    assert page.count("Evaluated on 2 different texts") == 1
    assert page.index("smol-int8-near") < page.index("smol-int4-far")


def test_an_invalid_file_is_an_error(tmp_path: Path) -> None:
    """It is named, and no page is written."""
    directory = tmp_path / "v"
    write_manifest(directory)
    (directory / "quant_log.json").write_text("{")
    with pytest.raises(VariantError, match=r"quant_log\.json: top level: Invalid JSON"):
        write_report([(directory, manifest())], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """Without dates and random ids, a report can be compared and cached."""
    write_manifest(tmp_path / "rich", quality=RICH)
    (tmp_path / "rich" / "quant_log.json").write_text(json.dumps(modules()))
    (tmp_path / "rich" / "evaluation.json").write_text(json.dumps(evidence()))
    assert written(tmp_path, tmp_path / "rich")[0] == written(tmp_path, tmp_path / "rich")[0]


@pytest.mark.parametrize("token,text", [("  ", "␣␣"), (" a\n", " a⏎"), ("\t", "⇥")])
def test_white_space_of_tokens_is_visible(token: str, text: str) -> None:
    """Line ends and tabs always, spaces where there is nothing else."""
    assert visible(token) == text
