"""Checks before a launch: what would fail after minutes of loading, and files whose checksums have changed.

`quantgate doctor`, `up` and `serve` run them. A launch is refused if

- quantization scheme, engine, dtype and KV cache type do not fit together;
- layers, tensor shapes or attention heads are not divisible by the kinds of parallelism;
- `max_model_len` exceeds the model or the KV cache;
- all replicas together need more memory than there is, or GPUs that do not exist;
- a port is in use;
- the model requires its own code, or has a stray `modules.json`.

`reading` reads facts about model and machine. The rules are pure: facts in, reasons for a refusal out.
"""

from serving.preflight.refusals import check_placement, check_servable, refuse_altered

__all__ = ["check_placement", "check_servable", "refuse_altered"]
