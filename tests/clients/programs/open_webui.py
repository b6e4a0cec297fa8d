# pip: open-webui==0.12.4
# title: Open WebUI
# runs: the server: its connection check, the list of models, a chat through its API, whole and as a stream
"""Open WebUI runs as a server of its own, without sign-in, and is asked as its pages ask it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

SETTINGS = {
    "WEBUI_AUTH": "False",
    "ENABLE_OLLAMA_API": "False",
    # No model is downloaded for retrieval or speech.
    "OFFLINE_MODE": "True",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_VERSION_UPDATE_CHECK": "False",
}
START_SECONDS = 180

base, model = f"{os.environ['QUANTGATE_URL']}/v1", os.environ["QUANTGATE_MODEL"]
with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
settings = {"OPENAI_API_BASE_URL": base, "OPENAI_API_KEY": "any", "DATA_DIR": str(Path("data").absolute())}
program = Path(os.environ["CLIENT_FOLDER"], "venv", "bin", "open-webui")
with Path("server.log").open("w") as log:
    server = subprocess.Popen(
        [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, **SETTINGS, **settings},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
try:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as browser:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if browser.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start: {Path('server.log').read_text()[-300:]}")
            time.sleep(0.5)
        signed_in = browser.post("/api/v1/auths/signin", json={"email": "", "password": ""}).raise_for_status()
        browser.headers["authorization"] = f"Bearer {signed_in.json()['token']}"
        check = browser.post("/openai/verify", json={"url": base, "key": "any"}).raise_for_status()
        assert model in [each["id"] for each in check.json()["data"]], check.text
        models = browser.get("/api/models").raise_for_status()
        assert model in [each["id"] for each in models.json()["data"]], models.text
        chat = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        whole = browser.post("/api/chat/completions", json={**chat, "stream": False}).raise_for_status()
        assert "m1 heard" in whole.json()["choices"][0]["message"]["content"], whole.text
        stream = browser.post("/api/chat/completions", json={**chat, "stream": True}).raise_for_status()
        events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", stream.text
        chunks = [json.loads(event) for event in events[:-1]]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))
        assert "m1 heard" in text, stream.text
finally:
    server.terminate()
    server.wait(30)
