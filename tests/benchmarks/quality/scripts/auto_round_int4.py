"""AutoRound to GPTQ's format. Runs with `auto-round` alone; argv[1] is a job."""

import json
import sys
from itertools import chain
from pathlib import Path

# AutoRound skips samples that are shorter than its sequence length: the chats are joined, and cut into equal parts.
_SEQUENCE_TOKENS = 512


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, samples, into, options: {iters, group_size, batch_size}}`."""
    import torch  # noqa: PLC0415
    from auto_round import AutoRound  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    job = json.loads(Path(job_file).read_bytes())
    options = job["options"]
    tokens = list(chain.from_iterable(job["samples"]))
    parts = torch.tensor(tokens[: len(tokens) // _SEQUENCE_TOKENS * _SEQUENCE_TOKENS]).view(-1, _SEQUENCE_TOKENS)
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(job["base"], dtype="auto"),
        AutoTokenizer.from_pretrained(job["base"]),
        scheme="W4A16",
        group_size=options["group_size"],
        iters=options["iters"],
        batch_size=options["batch_size"],
        seqlen=_SEQUENCE_TOKENS,
        nsamples=len(parts),
        dataset=list(parts.split(1)),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(job["into"], format="auto_gptq")


if __name__ == "__main__":
    main(sys.argv[1])
