"""The bare library, as its README has it: load, quantize, save. `python -m tests.benchmarks.bare_library JOB`.

Settings, device, dtype and token samples are those of our own side; everything else is the library's.
"""

import json
import sys
from pathlib import Path


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, settings, gptaq, samples, into}`."""
    import torch  # noqa: PLC0415
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415
    from gptqmodel.quantization.config import GPTAQConfig  # noqa: PLC0415

    job = json.loads(Path(job_file).read_bytes())
    device, dtype = ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    extra = {"gptaq": GPTAQConfig(alpha=job["gptaq"])} if job["gptaq"] else {}
    config = QuantizeConfig(**job["settings"], **extra, offload_to_disk=False)
    model = GPTQModel.load(job["base"], config, device=device, dtype=dtype)
    tokenized = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    model.quantize(tokenized, batch_size=1, calibration_data_min_length=1, calibration_sort=None)
    model.save(job["into"])


if __name__ == "__main__":
    main(sys.argv[1])
