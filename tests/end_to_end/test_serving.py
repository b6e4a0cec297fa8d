"""`quantgate up` on real vLLM: killed and found again, rolled under load, killed process by process, drained.

The tests build on one another in the order of this file; they serve what the demo made.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from serving.process import session_processes
from tests.end_to_end.running_demo import Running, alive, listens, noted_sessions, start, until

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(1200)]

ALL_READY_SECONDS = 400
REQUESTS = 200
AT_ONCE = 2
PAUSE_SECONDS = 0.2  # more would only make the successor's start slower, on few cores
VARIANTS = ("smol-bf16", "smol-int8", "smol-int4")


@dataclass(slots=True)
class Up:
    """`quantgate up`, its configuration, and who serves."""

    running: Running
    config: Path
    home: Path

    @property
    def addresses(self) -> tuple[str, str]:
        """Of clients and of operators."""
        return listens(self.running)

    def states(self) -> dict[str, str]:
        """Every replica's state, none before the gateway listens."""
        if "listening on" not in self.running.told:
            return {}
        told: list[dict[str, Any]] = httpx.get(f"{self.addresses[1]}/admin/replicas").json()
        return {each["id"]: each["state"] for each in told}

    def all_ready(self) -> bool:
        """Whether there are three, and all of them answer."""
        states = self.states()
        return len(states) == len(VARIANTS) and set(states.values()) == {"ready"}


@pytest.fixture(scope="module")
def up(first_run: Running, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """All three variants, served, with a supervisor that has been killed once."""
    folder = tmp_path_factory.mktemp("up")
    document = yaml.safe_load((home / "demo.yaml").read_text())
    document["gateway"] |= {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "state": f"sqlite:///{folder}/state.db"}
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(document))
    killed = Up(start(folder / "killed", home, "up", str(config)), config, home)
    until(killed.all_ready, ALL_READY_SECONDS, killed.running)
    before = noted_sessions(home)
    killed.running.process.kill()
    killed.running.wait(10)
    assert len(alive(before)) >= 9, "vLLM outlives its supervisor"
    again = Up(start(folder / "again", home, "up", str(config)), config, home)
    until(again.all_ready, 60, again.running)
    assert set(noted_sessions(home)) == set(before), "they were to be adopted, not started anew"
    yield again
    if again.running.process.poll() is None:
        again.running.process.kill()
        again.running.wait(10)


@dataclass(slots=True)
class Load:
    """SDK clients that ask at a steady pace, in threads of their own."""

    address: str
    model: str
    answered: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        """Ask, streaming and not in turn, until told that it is enough."""
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
    """Adopted replicas answer as before; `ps` knows them, with their processes."""
    with openai.OpenAI(base_url=f"{up.addresses[0]}/v1", api_key="EMPTY") as client:
        for name in VARIANTS:
            answer = client.completions.create(model=name, prompt="One, two,", max_tokens=2, temperature=0)
            assert answer.choices[0].text
    listed = start(up.config.parent / "ps", up.home, "ps", str(up.config))
    assert listed.wait(30) == 0, listed.told
    for name in VARIANTS:
        assert re.search(rf"{name}-1 .*ready", listed.out), listed.out


def test_rolling_replacement_breaks_no_request(up: Up) -> None:
    """A replica gets another setting under steady load: its successor starts, proves itself, and takes over."""
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
    """Whichever goes, nothing of that replica stays, and a new one answers; the others are not disturbed."""
    others = {session for session, note in noted_sessions(up.home).items() if "smol-int8" not in note}
    for number in range(len(session_processes(_session(up, "smol-int8-1")))):
        session = _session(up, "smol-int8-1")
        processes = sorted(session_processes(session))
        victim = processes[min(number, len(processes) - 1)]
        tracker = b"resource_tracker" in Path(f"/proc/{victim}/cmdline").read_bytes()
        os.kill(victim, signal.SIGKILL)
        if not tracker:  # which only cleans up: nobody misses it while the others live
            until(partial(_gone, session), 60, up.running)
        until(up.all_ready, 120, up.running)
        with openai.OpenAI(base_url=f"{up.addresses[0]}/v1", api_key="EMPTY") as client:
            assert client.completions.create(model="smol-int8", prompt="One, two,", max_tokens=2).choices[0].text
    assert others <= set(noted_sessions(up.home))


def test_stopping_drains_and_leaves_nothing(up: Up) -> None:
    """A stream that runs when SIGTERM comes is finished; then there is no process, no note, no shared memory left."""
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


def _gone(session: int) -> bool:
    return not session_processes(session)


def _session(up: Up, replica: str) -> int:
    (session,) = [session for session, note in noted_sessions(up.home).items() if f'"{replica}"' in note]
    return session
