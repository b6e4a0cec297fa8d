"""KL of a variant from its parent through two running vLLM servers, by a program that shares nothing with `quantize/`.

`python tests/benchmarks/replica_kl.py CHATS.jsonl --parent URL --variant URL [--top 20] [--max-tokens N]
[--against evaluation.json]`

It has its own HTTP, chats, token ids (the parent's server renders and tokenizes) and sums; of numpy it uses arrays and
the bootstrap's draws. With `--against` it compares itself with the measurements of `quantgate evaluate --every-row
--data CHATS.jsonl`, and exits with 1 if either mean lies outside the other's interval.

KL is that over the tokens which both servers name and one rest, plus, for what lies inside the rest, the KL of the
named tokens among themselves times the rest; at the tokens of the last answer of each chat. The interval is the 95 %
bootstrap over chats.
"""

import argparse
import json
import math
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000
TIMEOUT_SECONDS = 600
LEAST_MASS = 1e-6


def main() -> int:
    """Measure, print, compare."""
    options = arguments()
    rows = [json.loads(line) for line in options.chats.read_text(encoding="utf-8").splitlines() if line.strip()]
    sums = np.array([chat_sums(row["messages"], options) for row in rows])
    found = mean_with_interval(sums[:, 1], sums[:, 0])
    print(f"chats {len(sums)}, generated tokens {int(sums[:, 0].sum())}")
    print(f"kl_mean {found[0]:.5f} [{found[1]:.5f}, {found[2]:.5f}]")
    print(f"top1_agreement {sums[:, 2].sum() / sums[:, 0].sum():.4f}")
    print(f"perplexity_ratio {math.exp(sums[:, 3].sum() / sums[:, 0].sum()):.4f}")
    return compare(found, options.against) if options.against else 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--parent", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--against", type=Path)
    return parser.parse_args()


def chat_sums(messages: list[dict[str, str]], options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Tokens, KL, equal argmax and nll difference, summed over the last answer of a chat."""
    begin = len(tokenize(options.parent, messages[:-1], ask=True))
    ids = tokenize(options.parent, messages, ask=False)[: options.max_tokens]
    parent, variant = (positions(url, ids, options.top) for url in (options.parent, options.variant))
    tokens, total, agreed, excess = 0, 0.0, 0, 0.0
    for place in range(begin, len(ids)):
        p, q = parent[place], variant[place]
        tokens += 1
        total += divergence(logprobs(p), logprobs(q))
        agreed += argmax(p) == argmax(q)
        excess += p[str(ids[place])]["logprob"] - q[str(ids[place])]["logprob"]
    return tokens, total, agreed, excess


def tokenize(url: str, messages: list[dict[str, str]], *, ask: bool) -> list[int]:
    """Render and tokenize a chat; `ask`: with the header of the next answer."""
    body = {"messages": messages, "add_generation_prompt": ask, "add_special_tokens": False}
    return list(post(url, "/tokenize", body)["tokens"])


def positions(url: str, ids: list[int], top: int) -> list[dict[str, Any]]:
    """What a server names at each token."""
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
    return list(post(url, "/v1/completions", body)["choices"][0]["prompt_logprobs"])


def logprobs(position: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities by token."""
    return {token: entry["logprob"] for token, entry in position.items()}


def argmax(position: dict[str, Any]) -> str:
    """The likeliest token."""
    return max(position, key=lambda token: (position[token]["logprob"], -position[token]["rank"]))


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """KL(p || q): of the shared tokens and the rest, and as an estimate of that inside the rest."""
    shared = np.array([(p[token], q[token]) for token in p if token in q])
    masses = np.exp(shared)
    known = masses.sum(axis=0)
    rest = np.maximum(1 - known, LEAST_MASS)
    scaled = np.vstack([np.column_stack([masses, shared]), [*rest, *np.log(rest)]])
    coarse = float((scaled[:, 0] * (scaled[:, 2] - scaled[:, 3])).sum())
    among = masses / known
    inside = float((among[:, 0] * np.log(among[:, 0] / among[:, 1])).sum())
    return max(coarse, 0.0) + float(rest[0]) * max(inside, 0.0)


def mean_with_interval(sums: Any, counts: Any) -> tuple[float, float, float]:
    """Mean per token, and its 95 % bootstrap interval over chats."""
    draws = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = (float(np.percentile(means, share)) for share in (2.5, 97.5))
    return float(sums.sum() / counts.sum()), low, high


def compare(found: tuple[float, float, float], evaluation: Path) -> int:
    """Compare with the measurements that quantgate kept; 1 if one mean is outside of the other's interval."""
    chats = json.loads(evaluation.read_text(encoding="utf-8"))["measurements"]["chats"]
    parts = [chat["generated"] for chat in chats]
    theirs = mean_with_interval(
        np.array([part["divergence"] for part in parts]), np.array([part["tokens"] for part in parts])
    )
    print(f"quantgate: kl_mean {theirs[0]:.5f} [{theirs[1]:.5f}, {theirs[2]:.5f}] of {len(chats)} chats")
    reproduced = found[1] <= theirs[0] <= found[2] and theirs[1] <= found[0] <= theirs[2]
    print("reproduced" if reproduced else "not reproduced")
    return 0 if reproduced else 1


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send JSON, read JSON."""
    request = urllib.request.Request(url.rstrip("/") + path, json.dumps(body).encode())  # noqa: S310 - given by hand
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310
        answer: dict[str, Any] = json.load(reply)
    return answer


if __name__ == "__main__":
    sys.exit(main())
