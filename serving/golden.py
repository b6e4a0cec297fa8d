"""What a server says of the golden prompt, against what was recorded when its variant was measured.

Distances are root mean squares over 127 tokens, in nats. SmolLM2-135M, recorded by transformers and served by vLLM 0.32
on a CPU, both in bf16 (rows: what is served; columns: what is recorded):

======  =====  =====  =====
served   bf16   w8a8   int4
======  =====  =====  =====
bf16    0.066  0.297  0.602
w8a8    0.363  0.359  0.614
int4    0.600  0.703  0.054
======  =====  =====  =====

So another engine costs 0.05 to 0.07, and a variant whose activations are rounded says something else in every engine:
it is as far from its own record as from its parent's. It is known by being near nothing else: not the parent, and no
further from its record than twice what lay between record and parent.
"""

from collections.abc import Sequence

from config.golden import GoldenAnswer, distance

SAME_NATS = 0.15  # twice and more what engines differ by; a quarter of what tells int4 from anything else


def mismatch(served: Sequence[float], golden: GoldenAnswer) -> str | None:
    """Say why this can't be the recorded model, or None if it can."""
    apart = distance(served, golden.logprobs)
    limit = SAME_NATS if golden.exact else max(SAME_NATS, 2 * distance(golden.logprobs, golden.parent))
    if not apart <= limit:
        return f"{apart:.3f} nats from its record, at most {limit:.3f}"
    from_parent = distance(served, golden.parent) if golden.parent else float("inf")
    if not golden.exact and from_parent <= SAME_NATS:
        return f"{from_parent:.3f} nats from its parent's record, as near as only the parent is"
    return None
