"""`quantgate up` on real vLLM: replicas adopted, replaced under load, killed process by process, drained.

The tests depend on one another in the order of this file; they serve the demo's variants.
"""

import os
import re
import signal
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from serving.process import session_processes
from tests.end_to_end.running_demo import alive, noted_sessions, start, until
from tests.end_to_end.running_up import VARIANTS, Up, start_up

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(1200)]

REQUESTS = 200
AT_ONCE = 2
PAUSE_SECONDS = 0.2  # more would only make the successor's start slower, on few cores


@pytest.fixture(scope="module")
def up(up: Up) -> Up:
    """All three variants, served by a second process: the first one has been killed with `kill -9`."""
    before = noted_sessions(up.home)
    up.running.process.kill()
    up.running.wait(10)
    assert len(alive(before)) >= 9, "vLLM outlives its supervisor"
    up.running = start_up(up.config, up.home, "again")
    until(up.all_ready, 60, up.running)
    assert set(noted_sessions(up.home)) == set(before), "they were to be adopted, not started anew"
    return up


@dataclass(slots=True)
class Load:
    """Requests at a steady rate, from SDK clients in threads of their own."""

    address: str
    model: str
    answered: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        """Send requests, every other one streaming, until `enough` is set."""
        with openai.OpenAI(base_url=f"{self.address}/v1", api_key="EMPTY", max_retries=0) as client:
            while not self.enough.wait(PAUSE_SECONDS):
                try:
                    self._once(client, stream=bool(len(self.answered) % 2))
                except openai.OpenAIError as error:
                    self.broken.append(repr(error))

    def _once(self, client: openai.OpenAI, *, stream: bool) -> None:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
        raw = client.chat.completions.with_raw_response.create(**asked, stream=stream)
        answer: Any = raw.parse()
        reasons = [chunk.choices[0].finish_reason for chunk in answer] if stream else [answer.choices[0].finish_reason]
        if reasons[-1] not in ("stop", "length"):
            self.broken.append(f"ended with {reasons[-1]}")
        self.answered.append(raw.headers["x-quantgate-replica"])


def test_killed_supervisor_s_replicas_answer(up: Up) -> None:
    """Adopted replicas answer as before, and `quantgate ps` lists them as ready."""
    with openai.OpenAI(base_url=f"{up.addresses[0]}/v1", api_key="EMPTY") as client:
        for name in VARIANTS:
            answer = client.completions.create(model=name, prompt="One, two,", max_tokens=2, temperature=0)
            assert answer.choices[0].text
    listed = start(up.config.parent / "ps", up.home, "ps", str(up.config))
    assert listed.wait(30) == 0, listed.stderr
    for name in VARIANTS:
        assert re.search(rf"{name}-1 .*ready", listed.stdout), listed.stdout


def test_rolling_replacement_breaks_no_request(up: Up) -> None:
    """A setting changes under steady load: the surge replica starts, is verified, and takes over; no request fails."""
    load = Load(up.addresses[0], "smol-int4")
    threads = [threading.Thread(target=load.ask) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        document = yaml.safe_load(up.config.read_text())
        (int4,) = [replica for replica in document["replicas"] if replica["variant"] == "smol-int4"]
        int4["max_num_seqs"] = 4
        draft = up.config.with_suffix(".draft")
        draft.write_text(yaml.safe_dump(document))
        draft.replace(up.config)
        until(lambda: len(load.answered) >= REQUESTS and "smol-int4-1b" in load.answered, 300, up.running)
    finally:
        load.enough.set()
        for thread in threads:
            thread.join(60)
    assert load.broken == []
    assert set(load.answered) == {"smol-int4-1", "smol-int4-1b"}
    until(up.all_ready, 60, up.running)
    assert len(noted_sessions(up.home)) == len(VARIANTS)


def test_every_process_of_a_replica_is_killed_once(up: Up) -> None:
    """Whichever process is killed, the whole replica goes and a new one answers; other replicas keep running."""
    others = {session for session, note in noted_sessions(up.home).items() if "smol-int8" not in note}
    for number in range(len(session_processes(_session(up, "smol-int8-1")))):
        session = _session(up, "smol-int8-1")
        processes = sorted(session_processes(session))
        victim = processes[min(number, len(processes) - 1)]
        tracker = b"resource_tracker" in Path(f"/proc/{victim}/cmdline").read_bytes()
        os.kill(victim, signal.SIGKILL)
        if not tracker:  # the resource tracker only cleans up: the replica survives it
            until(partial(_gone, up, session), 60, up.running)
        until(up.all_ready, 120, up.running)
        with openai.OpenAI(base_url=f"{up.addresses[0]}/v1", api_key="EMPTY") as client:
            assert client.completions.create(model="smol-int8", prompt="One, two,", max_tokens=2).choices[0].text
    assert others <= set(noted_sessions(up.home))


def test_stopping_drains_and_leaves_nothing(up: Up) -> None:
    """SIGTERM lets a running stream end; then no process and no record in the ledger is left."""
    sessions = noted_sessions(up.home)
    assert len(alive(sessions)) >= 9
    with openai.OpenAI(base_url=f"{up.addresses[0]}/v1", api_key="EMPTY") as client:
        stream = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": "Count to a hundred."}],
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        up.running.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] == "length"
    assert up.running.wait(90) == 0
    assert alive(sessions) == []
    assert noted_sessions(up.home) == {}


def _gone(up: Up, session: int) -> bool:
    """Whether its processes have ended and the supervisor knows: until then the replica is still listed as ready."""
    return not session_processes(session) and session not in noted_sessions(up.home)


def _session(up: Up, replica: str) -> int:
    (session,) = [session for session, note in noted_sessions(up.home).items() if f'"{replica}"' in note]
    return session
