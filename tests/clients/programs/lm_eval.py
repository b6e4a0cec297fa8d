# pip: lm-eval[api]==0.4.13
# title: lm-eval
# runs: a task of two questions with `local-chat-completions`
"""An evaluation on questions of its own, as those of the tasks that come with it are in the network."""

import json
import os
import subprocess
import sys
from pathlib import Path

url, model = os.environ["QUANTGATE_URL"], os.environ["QUANTGATE_MODEL"]
folder = Path("tasks")
folder.mkdir()
questions = [{"question": f"say {word}", "answer": word} for word in ("hello", "goodbye")]
(folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
(folder / "heard.yaml").write_text(f"""
task: heard
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder.resolve()}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
""")
arguments = f"model={model},base_url={url}/v1/chat/completions,num_concurrent=2,max_retries=1"
command = ["lm_eval", "--model", "local-chat-completions", "--model_args", arguments, "--tasks", "heard"]
done = subprocess.run(
    [Path(sys.executable).with_name(command[0]), *command[1:], "--include_path", folder, "--apply_chat_template"],
    env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "any"},
    capture_output=True,
    text=True,
    check=False,
)
if done.returncode or "|heard|" not in done.stdout:
    sys.exit((done.stdout + done.stderr)[-500:])
