"""Every form of a model directory: it is read right, or refused in one line; the documentation has them all."""

import re
from pathlib import Path

import pytest

from quantize.base import read_base
from quantize.errors import RecipeError
from tests.quantize.model_files.forms import FORMS, LOADED_FORMS, Form, write_llama

PAGE = Path(__file__).parents[3] / "quantize" / "model-directories.md"


def documented() -> dict[str, str]:
    """The rows of the page's table: form -> what happens."""
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {form: outcome for form, outcome in rows if form not in ("form", "---")}


def outcome_of(directory: Path) -> str:
    """What happens to a directory, as the page says it."""
    try:
        base = read_base(directory)
    except RecipeError as error:
        return f"refused: `{str(error).replace(f'{directory}/', '').replace(f'{directory}: ', '')}`"
    return "; ".join(["used", *(f"`{note}`" for note in base.notes)])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_used_or_refused_as_documented(form: Form, tmp_path: Path) -> None:
    """The page's words are the product's."""
    form.change(write_llama(tmp_path / "model"))
    assert outcome_of(tmp_path / "model") == documented()[form.name]


def test_all_forms_are_documented() -> None:
    """The page's table has these forms and no others."""
    assert list(documented()) == [form.name for form in (*FORMS, *LOADED_FORMS)]


def test_only_loaded_files_are_part_of_a_base(tmp_path: Path) -> None:
    """An adapter and Mistral's format beside the weights change neither the tensors nor the digest nor the size."""
    changes = {form.name: form.change for form in FORMS}
    plain, crowded = write_llama(tmp_path / "a" / "m"), write_llama(tmp_path / "b" / "m")
    before = read_base(plain)
    for name in ("adapter beside merged weights", "`consolidated.safetensors` beside the weights"):
        changes[name](crowded)
    for extra in ("params.json", "adapter_config.json"):  # descriptions, read by nobody
        (crowded / extra).unlink()
    after = read_base(crowded)
    assert (after.digest, after.bytes, after.shapes) == (before.digest, before.bytes, before.shapes)


def test_an_adapter_is_refused_where_peft_would_apply_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers applies an adapter beside the weights, if peft is installed."""
    next(form for form in FORMS if form.name.startswith("adapter beside")).change(write_llama(tmp_path / "model"))
    (tmp_path / "packages" / "peft").mkdir(parents=True)
    (tmp_path / "packages" / "peft" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    with pytest.raises(RecipeError, match="peft would apply that adapter to them; move it away"):
        read_base(tmp_path / "model")
