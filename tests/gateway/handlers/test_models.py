"""The paths of the clients' port besides inference: the list of models, and refusals of everything else."""

from hashlib import sha256
from importlib.metadata import version

import httpx
import pytest

from config.schema import Floor, LimitSettings
from gateway.handlers.router import Router
from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import address_of, bind
from gateway.keys import Keys, StoredKey, keys_in_force
from gateway.live_config import LiveConfig
from gateway.quota import Quota
from gateway.routing.target import Catalog
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.fleet import CHAT, HELLO, Fleet, deployment, error_of, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEYS = keys_in_force({"alice": StoredKey(sha256=("a" * 64,))})


async def test_the_list_of_models(fleet: Fleet) -> None:
    """Aliases come first, then variants; each with its precisions and the shortest context of its replicas."""
    for replica_id, variant, tokens in (("hi-1", "hi", 32768), ("lo-1", "lo", 4096), ("lo-2", "lo", None)):
        replica = Replica(replica_id, variant, "any", "http://x", "m1", max_model_len_tokens=tokens)
        fleet.registry.put(replica, State.READY)
    try:
        answer = await fleet.client.get("/v1/models")
    finally:
        for replica_id in ("hi-1", "lo-1", "lo-2"):
            fleet.registry.remove(replica_id)
    models = answer.json()
    assert models["object"] == "list"
    listed = {model["id"]: model for model in models["data"]}
    assert list(listed) == ["smol", "strict", "team/small", "hi", "mid", "lo", "odd"]
    assert {(model["object"], model["owned_by"], type(model["created"])) for model in models["data"]} == {
        ("model", "quantgate", int)
    }
    assert [listed[name]["precisions"] for name in ("smol", "strict")] == [["bf16", "int8", "int4"], ["bf16", "int8"]]
    assert [listed[name].get("max_model_len") for name in ("smol", "hi", "mid", "lo")] == [4096, 32768, None, 4096]
    assert [listed[name].get("context_length") for name in ("smol", "hi", "mid", "lo")] == [4096, 32768, None, 4096]
    assert answer.headers["x-request-id"].startswith("req-")


async def test_models_have_the_fields_of_vllm(fleet: Fleet) -> None:
    """`root`, `parent` and `permission`, without which `vllm bench serve` and others stop; no directory is told."""
    model = (await fleet.client.get("/v1/models/smol")).json()
    assert (model["root"], model["parent"]) == ("hi", None)
    (permission,) = model["permission"]
    assert permission["object"] == "model_permission"
    assert {name for name, allowed in permission.items() if allowed is True} == {
        *("allow_sampling", "allow_logprobs", "allow_view"),
    }


@pytest.mark.parametrize("method, path", [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
async def test_health_on_the_port_of_clients(method: str, path: str) -> None:
    """200 without a key once an alias can be answered, 503 before; as tools expect of vLLM."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        assert (await fleet.client.request(method, path)).status_code == 503
        with fleet.replicas(("lo", "http://x")):
            answer = await fleet.client.request(method, path)
        assert (answer.status_code, answer.content) == (200, b"")


async def test_the_version(fleet: Fleet) -> None:
    """The version of quantgate, where tools ask for vLLM's; with keys configured only for those who have one."""
    assert (await fleet.client.get("/version")).json() == {"version": version("quantgate")}
    async with running_gateway(deployment(keys=KEYS)) as guarded:
        assert (await guarded.client.get("/version")).status_code == 401


async def test_the_list_of_a_key_with_a_floor() -> None:
    """Models that no variant may answer for the key are left out; the others have the permitted precisions only."""
    stored = {"picky": StoredKey(sha256=(sha256(b"qg-picky").hexdigest(),), floor=Floor(kl_mean=0.02))}
    headers = {"authorization": "Bearer qg-picky"}
    async with running_gateway(deployment(keys=keys_in_force(stored))) as fleet:
        models = (await fleet.client.get("/v1/models", headers=headers)).json()["data"]
        pinned = await fleet.client.get("/v1/models/hi", headers=headers)
    assert [(model["id"], model["precisions"]) for model in models] == [
        ("smol", ["bf16", "int8"]),
        ("strict", ["bf16", "int8"]),
    ]
    assert (pinned.status_code, pinned.json()["error"]["code"]) == (503, "quality_floor_unmet")


@pytest.mark.parametrize("path, name", [("smol", "smol"), ("team/small", "team/small"), ("team%2Fsmall", "team/small")])
async def test_one_model(fleet: Fleet, path: str, name: str) -> None:
    """A model is found by its name, with the slash escaped or not."""
    answer = await fleet.client.get(f"/v1/models/{path}", headers={"x-request-id": "r-1"})
    assert (answer.status_code, answer.json()["id"], answer.headers["x-request-id"]) == (200, name, "r-1")


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/v1/models/gpt-4o", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/hopeless", 503, "quality_floor_unmet"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "/v1/chat/completions/x", 404, "not_found"),
        ("POST", "/v1/rerank", 404, "not_found"),
        ("POST", "/invocations", 404, "not_found"),
        ("GET", "/metrics", 404, "not_found"),
        ("POST", "/health", 405, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("GET", "/" + "x" * 4000, 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", CHAT, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "not_found"),
        ("DELETE", "/v1/models/smol", 405, "not_found"),
    ],
)
async def test_everything_else_is_refused(fleet: Fleet, method: str, path: str, status: int, code: str) -> None:
    """Other paths and methods are refused in OpenAI's shape, in a message of bounded length."""
    answer = await fleet.client.request(method, path, headers={"x-request-id": "r-1"})
    error = error_of(answer)
    assert (answer.status_code, error["code"], answer.headers["x-request-id"]) == (status, code, "r-1")
    assert len(error["message"]) < 400
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET, HEAD")
        assert "Method Not Allowed" in error["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/smol", "/v1/models/gpt-4o", "/nowhere"])
async def test_head(fleet: Fleet, path: str) -> None:
    """HEAD gets the status and headers of GET, and no body."""
    got, head = await fleet.client.get(path), await fleet.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert [head.headers[name] for name in ("content-type", "content-length")] == [
        got.headers[name] for name in ("content-type", "content-length")
    ]
    assert (await fleet.client.head(CHAT)).status_code == 405


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/x/cancel"])
async def test_unknown_paths_of_anthropics_api(fleet: Fleet, path: str) -> None:
    """Who asks below /v1/messages reads errors in Anthropic's shape; a key that is missing is told the same way."""
    answer = await fleet.client.post(path, json={})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    assert path in body["error"]["message"]
    assert answer.headers["x-request-id"]
    async with running_gateway(deployment(keys=keys_in_force({}))) as guarded:
        refusal = await guarded.client.post(path, json={})
    assert (refusal.status_code, refusal.json()["error"]["type"]) == (401, "authentication_error")


async def test_models_are_guarded_too() -> None:
    """With keys configured, the models are not listed without one."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        for path in ("/v1/models", "/v1/models/smol", "/v1/models/other"):
            answer = await fleet.client.get(path)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await fleet.admin.get("/livez")).status_code == 200


async def test_a_key_sees_what_it_may_use() -> None:
    """The list has the models that the key may use; others are refused before they are looked up."""
    stored = StoredKey(sha256=(sha256(b"qg-bob").hexdigest(),), aliases=("smol", "lo"))
    async with running_gateway(deployment(keys=keys_in_force({"bob": stored}))) as fleet:
        own = {"authorization": "Bearer qg-bob"}
        listed = (await fleet.client.get("/v1/models", headers=own)).json()["data"]
        assert [model["id"] for model in listed] == ["smol", "lo"]
        assert (await fleet.client.get("/v1/models/lo", headers=own)).status_code == 200
        for name in ("hi", "no-such-model"):
            for answer in (
                await fleet.client.get(f"/v1/models/{name}", headers=own),
                await fleet.ask({**HELLO, "model": name}, own),
            ):
                assert (answer.status_code, error_of(answer)["code"]) == (403, "model_not_allowed")


class Broken:
    """A site whose every answer is a defect of ours."""

    def __init__(self) -> None:
        """Note what was asked."""
        self.noted: list[str] = []
        self.site = Router({}, asgi_nothing, LiveConfig(Catalog({}, {}), Keys(), LimitSettings()), Quota())

    def admit(self, request: Request) -> int:
        """Admit everybody."""
        return self.site.admit(request)

    async def handle(self, request: Request, reply: ResponseWriter) -> None:
        """Fail in a way that nobody foresaw, after the request got its id."""
        request.request_id = self.site.ids.of(request.headers)
        self.noted.append(request.request_id)
        raise ZeroDivisionError("a secret of ours")

    def on_internal_error(self, request: Request, reply: ResponseWriter) -> None:
        """Tell so."""
        self.site.on_internal_error(request, reply)


async def asgi_nothing(scope: object, receive: object, send: object) -> None:
    """An app that nobody gets to."""


async def test_a_defect_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A defect is a 500 in OpenAI's shape that tells nothing but where to look; the log has it whole."""
    broken = Broken()
    with bind("127.0.0.1:0", "test") as taken:
        async with (
            serve_clients(HttpServer(broken, 2**20), taken, 0),
            httpx.AsyncClient(
                base_url=f"http://{address_of(taken)}", timeout=DEADLINE_SECONDS, trust_env=False
            ) as client,
        ):
            answer = await client.post(CHAT, json={})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == broken.noted[-1], "the id under which the log has it"
    assert "ZeroDivisionError: a secret of ours" in caplog.text
