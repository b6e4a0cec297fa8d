"""Reading a configuration file: all of its problems are reported at once, each with its line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import SettingsError
from config.explain import known_keys
from config.field_types import PATTERNS, check_url, parse_size_bytes
from config.load import load_settings
from config.schema import Settings, Table

EXAMPLE = Path(__file__).parents[2] / "config" / "example.yaml"
SECRETS = {"REPLICA_KEY": "s3cret", "ADMIN_KEY": "operators", "OPENAI_KEY": "k3y", "OPENAI_ORGANIZATION": "org"}


def write(folder: Path, text: str) -> Path:
    """Write a configuration file."""
    path = folder / "quantgate.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, environment: dict[str, str] | None = None) -> list[str]:
    """Return the problems of a file as they are printed, without its directory."""
    with pytest.raises(SettingsError) as caught:
        load_settings(path, environment or {})
    return [str(problem).replace(str(path), "f") for problem in caught.value.problems]


def test_example_loads() -> None:
    """The shipped example is a valid configuration."""
    settings = load_settings(EXAMPLE, SECRETS)
    assert settings.replicas[0].api_key is not None
    assert settings.replicas[0].api_key.get_secret_value() == "s3cret"
    assert settings.gateway.limits.body_bytes == 32 * 2**20


def test_example_names_every_option() -> None:
    """No option of the schema is missing from the example."""
    text = EXAMPLE.read_text()
    tables: list[type[Table]] = [table for table in Table.__subclasses__() if table.__module__ == Settings.__module__]
    missing = {name for table in tables for name in table.model_fields if f"{name}:" not in text}
    assert not missing


def test_empty_mapping_is_all_defaults(tmp_path: Path) -> None:
    """`{}` is a gateway without aliases, on loopback."""
    settings = load_settings(write(tmp_path, "{}"), {})
    assert settings == Settings()
    assert settings.gateway.listen == "127.0.0.1:8000"


@pytest.mark.parametrize(
    "text,expected",
    [
        ("gatway: {}\n", ["f:1:1: gatway: unknown key; did you mean 'gateway'?"]),
        ("gateway:\n  lissten: 1\n", ["f:2:3: gateway.lissten: unknown key; did you mean 'listen'?"]),
        (
            "replicas:\n- {variant: a, gpuz: [1]}\nvariants: {a: {path: /m}}\n",
            ["f:2:16: replicas.0.gpuz: unknown key; did you mean 'gpus'?"],
        ),
        (
            "variants: {a: {path: /m}}\naliases:\n  x:\n    ladder: [a, b]\n",
            ["f:4:17: aliases.x.ladder.1: unknown variant 'b'; known: a"],
        ),
        ("aliases:\n  x: {}\n", ["f:2:3: aliases.x.ladder: is missing; add 'ladder: ...'"]),
        (
            "gateway: {listen: 8000}\n",
            ["f:1:11: gateway.listen: '8000' is not a valid address; write host:port, for example 127.0.0.1:8000"],
        ),
        (
            "gateway: {listen: '8000'}\n",
            ["f:1:11: gateway.listen: '8000' is not a valid address; write host:port, for example 127.0.0.1:8000"],
        ),
        (
            "gateway: {listen: '0.0.0.0:8000'}\n",
            [
                "f:1:11: gateway.listen: 0.0.0.0:8000 is reachable from other machines, but gateway.keys is not set; "
                "set gateway.keys, or use 127.0.0.1"
            ],
        ),
        (
            "gateway: {admin: '0.0.0.0:8001'}\n",
            [
                "f:1:11: gateway.admin: 0.0.0.0:8001 is reachable from other machines, but gateway.admin_key is not "
                "set; set gateway.admin_key, or use 127.0.0.1"
            ],
        ),
        (
            "gateway: {admin: '0.0.0.0:8001', admin_key: ''}\n",
            ["f:1:34: gateway.admin_key: is empty; write a value"],
        ),
        (
            "variants: {a: {external: x/y, api_key: '', credentials: {organization: ''}}}\n",
            [
                "f:1:31: variants.a.api_key: is empty; write a value",
                "f:1:58: variants.a.credentials.organization: is empty; write a value",
            ],
        ),
        (
            "gateway: {limits: {body_bytes: 3 kg}}\n",
            [
                "f:1:20: gateway.limits.body_bytes: '3 kg' is not a valid size; write a number "
                "with B, KiB, MiB, GiB, KB, MB, GB"
            ],
        ),
        (
            "gateway: [1\n",
            ["f:2:1: is not YAML: expected ',' or ']', but got '<stream end>'; close the bracket opened in line 1"],
        ),
        ("variants: {a: {path: x}, a: {path: y}}\n", ["f:1:26: variants.a: is a duplicate key; keep one"]),
        (
            'variants: {a: {path: "${env:NOWHERE}"}}\n',
            ["f:1:16: variants.a.path: the environment variable NOWHERE is not set; export NOWHERE=..."],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, gpus: [0, 1], tensor_parallel: 2}\n"
            "- {variant: a, gpus: [1]}\n",
            ["f:4:23: replicas.1.gpus.0: GPU 1 is already used by replicas.0; choose another GPU"],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, args: [--enforce-eager, --port=9]}\n",
            ["f:3:40: replicas.0.args.1: '--port=9' is set by quantgate; use port"],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, url: 'http://h:1', count: 2}\n",
            [
                "f:3:35: replicas.0.count: is an option for starting a replica, but url is set, too; remove one",
            ],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, kubernetes: {service: s}, count: 2}\n",
            [
                "f:3:42: replicas.0.count: is an option for starting a replica, but kubernetes is set, too; remove one",
            ],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a, kubernetes: {service: s, selector: k=v}}\n",
            ["f:3:41: replicas.0.kubernetes.selector: is set together with service; remove one"],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a, kubernetes: {namespace: n}}\n",
            ["f:3:16: replicas.0.kubernetes: has neither service nor selector; set one"],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a, kubernetes: {service: s}, url: 'http://h:1'}\n",
            ["f:3:16: replicas.0.kubernetes: is set together with url; remove one"],
        ),
        (
            "variants: {a: {precision: int4}, b: {precision: int8}}\nreplicas:\n"
            "- {variant: a, kubernetes: {service: s}}\n- {variant: b, kubernetes: {service: s, port: 80}}\n",
            ["f:4:16: replicas.1.kubernetes: finds the same pods as replicas.0; remove one, or choose another Service"],
        ),
        (
            "variants: {a: {precision: int4}, b: {precision: int8}}\nreplicas:\n"
            "- {variant: a, kubernetes: {service: s, namespace: n, workload: deployment/w}}\n"
            "- {variant: a, kubernetes: {service: s, namespace: m, workload: deployment/w}}\n"
            "- {variant: b, kubernetes: {service: t, namespace: n, workload: deployment/w}}\n",
            [
                "f:5:55: replicas.2.kubernetes.workload: is the workload of replicas.0, too, so a rollout would scale "
                "it for both; name it in one entry only"
            ],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a, kubernetes: {service: s, workload: pod/p}}\n",
            [
                "f:3:41: replicas.0.kubernetes.workload: 'pod/p' is not a workload; "
                "write deployment/NAME or leaderworkerset/NAME"
            ],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a, kubernetes: {service: s, port: Http}}\n",
            [
                "f:3:41: replicas.0.kubernetes.port: 'Http' is not a port; "
                "write its number, or its name in the Service: lower-case letters, digits, -"
            ],
        ),
        (
            "variants: {a: {precision: int4}}\nreplicas:\n- {variant: a}\n",
            [
                "f:3:3: replicas.0: variant 'a' has no path, so quantgate cannot start it; "
                "set the replica's url or kubernetes, or the variant's path"
            ],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, url: 'http://h:1/v1'}\n",
            [
                "f:3:16: replicas.0.url: 'http://h:1/v1' is not a valid replica URL; write http://host:port, without "
                "/v1, or unix:///path"
            ],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, url: 'http://h:1', ca: ca.pem}\n",
            ["f:3:35: replicas.0.ca: applies only to a url with https://; remove it"],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, certificate: c.pem}\n",
            ["f:3:16: replicas.0.certificate: applies only to a url with https://; remove it"],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, url: 'https://h', key_file: key.pem}\n",
            ["f:3:34: replicas.0.key_file: is set without certificate; set certificate, too"],
        ),
        (
            "variants: {a: {path: /m}}\naliases: {a: {ladder: [a]}}\n",
            [
                "f:2:11: aliases.a: is also the name of a variant, by which clients request the variant "
                "itself; rename one"
            ],
        ),
        (
            "gateway: {admin: '127.0.0.1:8000'}\n",
            ["f:1:11: gateway.admin: is the same address as gateway.listen; choose another port"],
        ),
        (
            "variants: {a: {path: /m, quality: {kl_mean: 0.1}}}\n",
            ["f:1:26: variants.a.quality: is set together with path; the quality comes from its manifest; remove one"],
        ),
        (
            "variants: {a: {}}\n",
            ["f:1:12: variants.a: has neither path nor precision; set one"],
        ),
        (
            "replicas: [{variant: a, url: 'http://h:1'}]\n",
            ["f:1:13: replicas.0.variant: unknown variant 'a'; none is configured"],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, gpus: [0, 1, 2], tensor_parallel: 2}\n",
            ["f:3:16: replicas.0.gpus: has 3 GPUs for count 1 x tensor_parallel 2; list 2 GPUs"],
        ),
        (
            "variants: {a: {path: /m}}\naliases: {x: {ladder: [a, a]}}\n",
            ["f:2:27: aliases.x.ladder.1: 'a' is on the ladder twice; remove one"],
        ),
        (
            "variants: {a: {path: /m}}\naliases: {x: {ladder: [a], spill: {after_seconds: 0.1}}}\n",
            ["f:2:28: aliases.x.spill.return_below_seconds: is greater than after_seconds; choose a smaller number"],
        ),
        (
            "variants: {a: {path: /m, lora: {x: /x}}}\nreplicas: [{variant: a-x}]\naliases: {a-x: {ladder: [a-y]}}\n",
            [
                "f:2:13: replicas.0.variant: 'a-x' is the adapter 'x' of 'a', whose replicas serve it; use 'a'",
                "f:3:11: aliases.a-x: is also the name of a variant, by which clients request the variant itself; "
                "rename one",
                "f:3:26: aliases.a-x.ladder.0: unknown variant 'a-y'; did you mean 'a-x'?",
            ],
        ),
        (
            "variants: {a: {path: /m, lora: {x: {}, a: /x, a-1: /y, b: /z}}, a-b: {path: /n}}\n"
            "replicas: [{variant: a}]\n",
            [
                "f:1:33: variants.a.lora.x.path: is missing, but quantgate starts replicas of its base; set it",
                "f:1:40: variants.a.lora.a: 'a' is also a name of the base model in vLLM; rename the adapter",
                "f:1:47: variants.a.lora.a-1: 'a-1' is also a name of the base model in vLLM; rename the adapter",
                "f:1:56: variants.a.lora.b: is the variant 'a-b', which exists already; rename one",
            ],
        ),
        (
            "variants: {a: {path: /m}}\nreplicas:\n- {variant: a, args: [--enable-lora]}\n",
            [
                "f:3:23: replicas.0.args.0: '--enable-lora' is set by quantgate; use lora of the variant",
            ],
        ),
        (
            "variants: {'a b': {path: /m}}\n",
            ["f:1:12: variants.a b: 'a b' is not a valid name; use letters, digits and . _ : / -"],
        ),
    ],
)
def test_problem_is_placed_and_explained(tmp_path: Path, text: str, expected: list[str]) -> None:
    """A problem names file, line, column, path, what is wrong and what to do."""
    assert problems(write(tmp_path, text)) == expected


def test_all_problems_at_once(tmp_path: Path) -> None:
    """All problems are listed in the order of the file."""
    path = write(tmp_path, "gateway:\n  foo: 1\nvariants:\n  a: {path: 3}\naliases:\n  x: {ladder: [], think: maybe}\n")
    assert [line.split(": ")[0] for line in problems(path)] == ["f:2:3", "f:4:7", "f:6:7", "f:6:19"]


@pytest.mark.parametrize("content, words", [(b"\xff\xfe", "is not UTF-8 text"), (None, "can't be read")])
def test_unreadable_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    """A file that is missing or not UTF-8 is a single problem, not a stack trace."""
    path = tmp_path / "quantgate.yaml"
    if content is not None:
        path.write_bytes(content)
    (only,) = problems(path)
    assert words in only


@given(st.integers(0, 10**6), st.sampled_from([("", 1), ("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GB", 10**9)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    """A size with a unit is that many bytes."""
    assert parse_size_bytes(f"{number}{unit[0]}") == number * unit[1]


def test_known_keys_walks_the_schema() -> None:
    """The known keys are those of the table at the location."""
    assert "ladder" in known_keys(("aliases", "x"))
    assert "gpus" in known_keys(("replicas", 3))
    assert known_keys(("variants",)) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "http://h/",
        "https://a-b.c_d.example.:65535",
        "http://[::1]:8000",
        "unix:///run/vllm.sock",
        "unix:///run/a%20b",
        f"unix:///{'x' * 106}",
    ],
)
def test_valid_replica_urls(url: str) -> None:
    """Every form of URL that both HTTP clients of quantgate support is accepted."""
    assert check_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("h", "h:1", "ftp://h", "http://", "http://h/v1", "http://u:p@h", "http://h?x", "http://h:", "http://h:x"),
        *("http://h:0", "http://h:65536", "http://a..b", "http://.a", "http://é", f"http://{'x' * 64}", "http://a b"),
        *("unix:", "unix:///", "unix://h/s", "unix:s", "unix:///a%00b", "unix:///a b", f"unix:///{'x' * 107}"),
        f"unix:///{'%20' * 107}",
    ],
)
def test_invalid_replica_urls(url: str) -> None:
    """A URL that one of the clients does not support is rejected when the file is read."""
    with pytest.raises(ValueError, match="is not a valid replica URL"):
        check_url(url)


def nested(value: Any, *path: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every object in a JSON document, with its path."""
    if isinstance(value, dict):
        yield path, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        yield from nested(inner, *path, name)


def test_every_pattern_is_explained_and_every_number_bounded() -> None:
    """A new option with a pattern says what to write, and one with a number refuses a slip of the keyboard."""
    for path, schema in nested(Settings.model_json_schema()):
        if isinstance(pattern := schema.get("pattern"), str):
            assert pattern in PATTERNS, path
        # pydantic leaves the bounds of sizes out of the JSON schema: they are numbers after units are read.
        is_size = any(str(name).endswith("_bytes") for name in path)
        if schema.get("type") == "integer" and not is_size:
            assert {"maximum", "exclusiveMaximum"} & schema.keys(), path


@pytest.mark.parametrize("option", ["memory_bytes: 2GB5", "memory_bytes: 9999999GiB", "drain_seconds: 1e12"])
def test_sizes_and_times_are_bounded(tmp_path: Path, option: str) -> None:
    """A size or a time that nobody means is refused."""
    (only,) = problems(write(tmp_path, f"gateway: {{{option}}}"))
    assert "is not a valid size" in only or "must be at most" in only
