"""Verifies a replica before it gets requests: it serves the declared model, and computes it correctly."""

import dataclasses
import logging

from serving.errors import ProbeFailed
from serving.golden import compare
from serving.probe import Probe
from serving.replica import Launch, Replica
from serving.thinking import verify_thinking

log = logging.getLogger(__name__)


async def verified(launch: Launch, replica: Replica, probe: Probe) -> Replica:
    """Compare a running server with its launch, and return what it reports; ProbeFailed if it is something else."""
    served = await probe.served_model(replica)
    if served.name != replica.served_name or served.root != str(launch.variant.path):
        raise ProbeFailed(f"{replica.id}: {replica.url} serves {served.name} from {served.root}, not this replica")
    for lora in launch.variant.loras:
        if (root := served.adapters.get(lora.name)) != str(lora.path):
            what = "does not serve" if root is None else f"serves another directory, {root}, as"
            raise ProbeFailed(f"{replica.id}: {replica.url} {what} the LoRA adapter {lora.name} of {lora.path}")
    wanted = launch.settings.max_model_len
    if wanted is not None and served.max_model_len_tokens != wanted:
        raise ProbeFailed(f"{replica.id}: max_model_len is {served.max_model_len_tokens}, not {wanted} as configured")
    fingerprint = await probe.generate_one_token(replica)
    if fingerprint != launch.variant.id:
        raise ProbeFailed(f"{replica.id}: {replica.url} calls itself {fingerprint!r}, not {launch.variant.id!r}")
    await _check_golden_prompt(launch, replica, probe, served.max_model_len_tokens)
    replica = await verify_thinking(probe, replica, launch.thinking)
    return dataclasses.replace(replica, max_model_len_tokens=served.max_model_len_tokens)


async def _check_golden_prompt(launch: Launch, replica: Replica, probe: Probe, context_tokens: int | None) -> None:
    """Compare its log-probabilities with those that were recorded when the variant was evaluated."""
    golden = launch.variant.golden
    if golden is None:
        return
    golden = golden.shortened(context_tokens)
    result = compare(await probe.prompt_logprobs(replica, golden.ids), golden)
    if result.verdict == "different":
        raise ProbeFailed(
            f"{replica.id}: golden prompt: this is not {launch.variant.id}, or its results are wrong: {result.reason}; "
            "`quantgate evaluate` records the golden prompt again"
        )
    if result.verdict == "indistinguishable":
        log.info("replica %s: golden prompt: %s", replica.id, result.reason)
