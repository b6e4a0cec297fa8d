"""Source of the opening <think> of a running replica, found from a rendered prompt before it is ready."""

import logging
from dataclasses import replace

from serving.errors import ProbeFailed
from serving.probe import Probe
from serving.replica import Replica, Thinking, ThinkTag

log = logging.getLogger(__name__)

THINK = "<think>"
# Explicit, because some templates don't think by default; most ignore the variable.
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


async def verify_thinking(probe: Probe, replica: Replica, wanted: Thinking) -> Replica:
    """Detect how a supervised replica thinks; ProbeFailed if its template does not do what it was started for."""
    if wanted.tag != "injected" and not wanted.switch:
        return await detect_thinking(probe, replica, wanted.tag)
    on = await probe.prompt_end(replica, ON)
    if wanted.tag == "injected" and not _opens(on):
        raise _refusal(replica, wanted, f"its prompts must end in {THINK}, but they end in {on[-40:]!r}")
    if wanted.switch and _opens(off := await probe.prompt_end(replica, OFF)):
        raise _refusal(replica, wanted, f"enable_thinking: false must turn thinking off, but prompts end in {off!r}")
    return await _with_tag(probe, replica, "injected" if _opens(on) else "model")


async def detect_thinking(probe: Probe, replica: Replica, known: ThinkTag | None = None) -> Replica:
    """Detect how a replica thinks if nothing is required of it: it is used also if that cannot be detected.

    It may be another engine, or a model without a chat template. `known` decides where no prompt opens a thought.
    """
    try:
        return await _with_tag(probe, replica, await think_tag(probe, replica, known))
    except ProbeFailed as error:
        log.info("replica %s: the end of its prompts cannot be read: %s", replica.id, error)
        return replace(replica, think=known)


async def think_tag(probe: Probe, replica: Replica, known: ThinkTag | None = None) -> ThinkTag:
    """Return what opens a thought: the template if a prompt ends in the tag, else the model if the tag is one token."""
    if _opens(await probe.prompt_end(replica, ON)):
        return "injected"
    if known in {"model", "none"}:
        return known
    return "model" if len(await probe.token_ids(replica, THINK)) == 1 else "none"


async def _with_tag(probe: Probe, replica: Replica, tag: ThinkTag) -> Replica:
    """Add the tag's token if the model writes it: then the first token of an answer shows whether it thinks."""
    tokens = await probe.token_ids(replica, THINK) if tag == "model" else ()
    return replace(replica, think=tag, think_token=tokens[0] if len(tokens) == 1 else None)


def _refusal(replica: Replica, wanted: Thinking, what: str) -> ProbeFailed:
    return ProbeFailed(f"{replica.id}: {what}; look at its template, {wanted.template or 'that of the model'}")


def _opens(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK)
