"""The installed vLLM has all that quantgate relies on; and what is missing is found."""

import zipfile
from pathlib import Path
from typing import get_args

import pytest

from gateway.openai.endpoints import EMBEDDINGS, ENDPOINTS
from tests.contract.reliances import FINDERS, REQUEST_FIELDS, Kind, Reliance, missing, reliances
from tests.contract.sources import NoSources, Sources, installed_sources, wheel_sources


@pytest.fixture(scope="module")
def installed() -> Sources:
    """The vLLM of this environment."""
    try:
        return installed_sources()
    except NoSources as error:
        pytest.skip(str(error))


def test_the_installed_vllm_has_all(installed: Sources) -> None:
    """A rename in vLLM shows here before a user meets it."""
    assert [str(reliance) for reliance in missing(installed)] == []


@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_is_missing_is_found(installed: Sources, kind: Kind) -> None:
    """Every finder can fail: a name that vLLM does not have is missing, in a place that it has."""
    known = next(reliance for reliance in reliances() if reliance.kind == kind)
    absent = Reliance(kind, f"{known.name}-of-nobody", "a test", known.where)
    assert FINDERS[kind](installed, known)
    assert not FINDERS[kind](installed, absent)


def test_every_kind_and_endpoint_is_listed() -> None:
    """No finder is without a reliance, and the prompts of all endpoints are among the fields."""
    assert {reliance.kind for reliance in reliances()} == set(get_args(Kind)) == set(FINDERS)
    listed = {field for fields in REQUEST_FIELDS.values() for field in fields}
    assert {key for endpoint in ENDPOINTS.values() for key in endpoint.prompt_keys} <= listed
    assert set(EMBEDDINGS.prompt_keys) == {"input", "messages"}


def test_a_wheel_is_read_without_installing_it(tmp_path: Path) -> None:
    """Names, fields of bases and strings are found in the files of a wheel."""
    wheel = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/entrypoints/protocol.py", "class A:\n    x: int = 1\nclass B(A):\n    y: int = 2\n")
        archive.writestr("vllm/envs.py", 'V = {"VLLM_X": 1}\ntry:\n    import a as b\nexcept ImportError:\n    c = 1\n')
    sources = wheel_sources(wheel)
    assert sources.version == "9.9.9"
    assert sources.fields("B") == {"x", "y"}
    assert sources.strings("envs.py") == {"VLLM_X"}
    assert sources.names("envs.py") == {"V", "b"}
    assert missing(sources)
