"""GPTQModel as its README has it: only bits and group size are set. Runs with `gptqmodel` alone; argv[1] is a job."""

import json
import sys
from pathlib import Path


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, samples, into, options: {bits, group_size}}`."""
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415

    job = json.loads(Path(job_file).read_bytes())
    config = QuantizeConfig(**job["options"])
    model = GPTQModel.load(job["base"], config, device="cpu")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    model.quantize(rows, batch_size=1, calibration_data_min_length=1)
    model.save(job["into"])


if __name__ == "__main__":
    main(sys.argv[1])
