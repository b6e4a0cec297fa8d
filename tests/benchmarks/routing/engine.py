"""A model of one vLLM engine that steps in virtual time: a pure state machine, no clock and no chance.

It follows vLLM's scheduler (vllm/v1/core/sched/scheduler.py): answers that are under way first, a token each, then
prompts in the order of their arrival, in chunks, as far as the step's tokens go. Who needs a block that isn't there
pushes out whoever came last, who starts anew from the front of the queue (recompute). Gauges change at the end of a
step only.

    ends_at = now + engine.begin()      # None: nothing to do
    made = engine.end()                 # at `ends_at`
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.benchmarks.routing.blocks import Blocks
from tests.benchmarks.routing.profiles import Profile


@dataclass(eq=False, slots=True)
class Job:
    """One request inside an engine; `chain` names the blocks that its prompt and its answer fill."""

    key: int
    prompt_tokens: int
    answer_tokens: int
    chain: Sequence[int]
    cached_tokens: int = 0
    made: int = 0  # tokens of the answer when it last joined those under way
    computed: int = 0  # tokens whose KV is here, likewise
    joined: int = -1  # the engine's count of steps then; -1: its prompt is being read, or it waits
    named: list[int] = field(default_factory=list)
    blank: int = 0
    full: int = 0  # blocks that were full when last looked at, named or not


@dataclass(slots=True)
class Made:
    """What a step came to: whose first token is there, and whose answer is complete."""

    first: list[Job] = field(default_factory=list)
    ended: list[Job] = field(default_factory=list)


@dataclass(slots=True)
class Gauges:
    """What /metrics says; the counters only grow."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


class Engine:
    """One engine; `slowness` is how many times longer its steps take than the profile says."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.slowness = 1.0
        self.gauges = Gauges()
        self.blocks = Blocks(profile.kv_blocks)
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}  # in the order in which they were let in
        self._reading: dict[Job, None] = {}  # those of them whose prompts are being read
        self._answers = 0  # how many of them are under way with their answers
        self._kept_tokens = 0  # KV of those
        self._steps = 0
        self._ending: dict[int, list[Job]] = {}  # by the step that makes their last token
        self._growing: list[dict[Job, None]] = [{} for _ in range(profile.block_tokens)]  # by when a block is needed
        self._read: list[Job] = []  # whose prompts this step ends
        self._pushed_out = False
        self._left = 0  # what is left of this step's tokens

    def submit(self, job: Job) -> None:
        """Queue a request; ValueError if it can never fit."""
        if self._count(job.prompt_tokens + job.answer_tokens) > self.blocks.total:
            raise ValueError(f"request {job.key} is longer than the KV memory")
        self.waiting.append(job)

    def begin(self) -> float | None:
        """Plan a step; returns how many seconds it takes, None if there is nothing to do."""
        if not self.running and not self.waiting:
            return None
        self._pushed_out = False
        self._grow()
        self._left = self.profile.max_num_batched_tokens - self._answers
        left_at_first, answers, kept = self._left, self._answers, self._kept_tokens
        self._read = []
        for job in list(self._reading):
            if self._left and job in self._reading:
                self._read_on(job)
        while self.waiting and self._left and not self._pushed_out and len(self.running) < self.profile.max_num_seqs:
            if not self._let_in(self.waiting[0]):
                break
        return self.slowness * self.profile.step_seconds(left_at_first - self._left, answers, kept)

    def end(self) -> Made:
        """Take what the planned step made."""
        made, gauges = Made(), self.gauges
        self._steps += 1
        self._kept_tokens += self._answers
        gauges.generated_tokens += self._answers
        for job in self._ending.pop(self._steps, ()):
            if job.joined >= 0 and job.joined + job.answer_tokens - job.made == self._steps:
                self._leave(job)
                made.ended.append(job)
        for job in self._read:
            if job not in self._reading:
                continue  # given up, or pushed out, since
            if not job.made:
                made.first.append(job)
                gauges.prompt_tokens += job.prompt_tokens
            gauges.generated_tokens += 1
            job.made += 1
            if job.made == job.answer_tokens:
                self._leave(job)
                made.ended.append(job)
            else:
                self._join(job)
        gauges.finished += len(made.ended)
        gauges.running, gauges.waiting, gauges.kv_usage = len(self.running), len(self.waiting), self.blocks.usage
        return made

    def give_up(self, job: Job) -> None:
        """Forget a request whose client left."""
        if job in self.running:
            self._leave(job)
        else:
            self.waiting.remove(job)

    def under_way(self) -> Iterator[Job]:
        """Those that got a token with the last step, but for whom it was the first or the last."""
        return (job for job in self.running if 0 <= job.joined < self._steps)

    def made_of(self, job: Job) -> int:
        """How many tokens of an answer are there by now."""
        return job.made + (self._steps - job.joined if job.joined >= 0 else 0)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.profile.block_tokens)

    def _grow(self) -> None:
        """Give a block to every answer whose next token needs a new one."""
        due = self._growing[self._steps % self.profile.block_tokens]
        for job in list(due):
            if job not in due:
                continue  # pushed out by one before it
            self._note_full(job, self._computed(job))
            while not self.blocks.take(1):
                if self._push_out_last() is job:
                    break
            else:
                job.blank += 1

    def _read_on(self, job: Job) -> None:
        """Read the next chunk of a prompt, or of a prompt and its answer so far."""
        known = job.prompt_tokens + job.made
        chunk = min(known - job.computed, self._left)
        need = self._count(job.computed + chunk) - len(job.named) - job.blank
        while not self.blocks.take(need):
            if self._push_out_last() is job:
                return
        job.blank += need
        job.computed += chunk
        self._left -= chunk
        self._note_full(job, job.computed)
        if job.computed == known:
            self._read.append(job)

    def _let_in(self, job: Job) -> bool:
        """Begin with the first in the queue, if the whole of its prompt fits."""
        known = job.prompt_tokens + job.made
        # The last token is always computed: its outcome is the first of the answer.
        chain = job.chain[: (known - 1) // self.profile.block_tokens]
        hits = self.blocks.known(chain)
        chain = chain[:hits]
        if self.blocks.price(chain, self._count(known) - hits) > self.blocks.free:
            return False
        self.waiting.popleft()
        self.blocks.hold(chain)
        job.named, job.full, job.computed = list(chain), hits, hits * self.profile.block_tokens
        if not job.made:
            job.cached_tokens = job.computed
        self.gauges.queried_tokens += known
        self.gauges.hit_tokens += job.computed
        self.running[job] = self._reading[job] = None
        self._read_on(job)
        return True

    def _join(self, job: Job) -> None:
        """From the next step on an answer gets a token with every step."""
        del self._reading[job]
        job.joined = self._steps
        self._answers += 1
        self._kept_tokens += job.computed
        self._ending.setdefault(job.joined + job.answer_tokens - job.made, []).append(job)
        self._growing[self._phase(job)][job] = None

    def _phase(self, job: Job) -> int:
        return (job.joined - job.computed) % self.profile.block_tokens

    def _computed(self, job: Job) -> int:
        return job.computed + (self._steps - job.joined if job.joined >= 0 else 0)

    def _note_full(self, job: Job, computed: int) -> None:
        """Name the blocks that have become full, so that others find them."""
        full = computed // self.profile.block_tokens
        for block in job.chain[job.full : full]:
            if self.blocks.name(block):
                job.named.append(block)
                job.blank -= 1
        job.full = full

    def _leave(self, job: Job) -> None:
        """Let go of everything that a running request holds; what it made so far stays known."""
        del self.running[job]
        computed = self._computed(job)
        self._note_full(job, computed)
        self.blocks.let_go(job.named, job.blank)
        if job.joined >= 0:
            self._answers -= 1
            self._kept_tokens -= computed
            job.made += self._steps - job.joined
            del self._growing[self._phase(job)][job]
        else:
            del self._reading[job]
        job.named, job.blank, job.full, job.computed, job.joined = [], 0, 0, 0, -1

    def _push_out_last(self) -> Job:
        """Send whoever came last back to the front of the queue."""
        job = next(reversed(self.running))
        self._leave(job)
        self.waiting.appendleft(job)
        self._pushed_out = True
        self.gauges.preemptions += 1
        return job
