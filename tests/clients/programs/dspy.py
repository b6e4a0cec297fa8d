# pip: dspy==3.4.1
# title: DSPy
# runs: a prediction
"""A program of one step; the fake doesn't follow its format, so only what reaches it is looked at."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy

url, model = os.environ["QUANTGATE_URL"], os.environ["QUANTGATE_MODEL"]
lm = dspy.LM(f"openai/{model}", api_base=f"{url}/v1", api_key="any", cache=False, num_retries=0)
(said,) = lm("say hello")
assert "heard say hello" in (said if isinstance(said, str) else said["text"])
