# pip: instructor==1.17.0
# ci: yes
# title: instructor
# runs: a structured answer by a forced tool
"""An answer that has a type."""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Heard(BaseModel):
    """What the fake calls every tool with."""

    heard: str


client = instructor.from_openai(OpenAI(base_url=f"{os.environ['QUANTGATE_URL']}/v1", api_key="any", max_retries=0))
messages = [{"role": "user", "content": "say hello"}]
answer = client.chat.completions.create(
    model=os.environ["QUANTGATE_MODEL"], messages=messages, response_model=Heard, max_retries=0
)
assert answer.heard == "say hello"
