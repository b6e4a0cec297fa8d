"""A replica proves that it is what was declared before it answers anybody, and says what it says of itself."""

import dataclasses

from serving.errors import ProbeFailed
from serving.golden import mismatch
from serving.probe import Probe
from serving.replica import Launch, Replica
from serving.thinking import thinking_verified


async def verified(launch: Launch, replica: Replica, probe: Probe) -> Replica:
    """Hold a running server against its launch; ProbeFailed says what is wrong with it."""
    served = await probe.served_model(replica)
    if served.name != replica.served_name or served.root != str(launch.variant.path):
        raise ProbeFailed(f"{replica.id}: {replica.url} serves {served.name} from {served.root}, not this replica")
    wanted = launch.settings.max_model_len
    if wanted is not None and served.max_model_len_tokens != wanted:
        raise ProbeFailed(f"{replica.id}: max_model_len is {served.max_model_len_tokens}, not {wanted} as configured")
    fingerprint = await probe.generate_one_token(replica)
    if fingerprint != launch.variant.id:
        raise ProbeFailed(f"{replica.id}: {replica.url} calls itself {fingerprint!r}, not {launch.variant.id!r}")
    await _says_what_it_must(launch, replica, probe)
    replica = await thinking_verified(probe, replica, launch.thinking)
    return dataclasses.replace(replica, max_model_len_tokens=served.max_model_len_tokens)


async def _says_what_it_must(launch: Launch, replica: Replica, probe: Probe) -> None:
    """Compare its log-probabilities with those that were recorded when the variant was measured."""
    golden = launch.variant.golden
    if golden is None:
        return
    wrong = mismatch(await probe.prompt_logprobs(replica, golden.ids), golden)
    if wrong:
        raise ProbeFailed(
            f"{replica.id}: the golden prompt says that this is not {launch.variant.id}, or computed wrongly: {wrong}; "
            "`quantgate evaluate` measures it anew"
        )
