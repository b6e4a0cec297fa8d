"""Tables of the state database. A change of them needs a migration (migrations/versions) and a new SCHEMA_VERSION."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, text

SCHEMA_VERSION = 5
# Where Alembic keeps the version of the last migration.
VERSION_TABLE = "quantgate_schema"

METADATA = MetaData()

# One row. `epoch` is random: a recreated database counts its revisions from 0 again, and readers must not mistake one
# for a revision that they have seen.
STATE = Table(
    "quantgate_state",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("epoch", String(32), nullable=False),
    Column("revision", Integer, nullable=False),
    # Counts the changes of rollouts and of the revisions of aliases.
    Column("rollout_revision", Integer, nullable=False, server_default="0"),
    # Counts the changes of API keys.
    Column("key_revision", Integer, nullable=False, server_default="0"),
)

# Supervisors. `beat` counts their heartbeats; `beat_at` is on their own wall clocks, for display only.
OWNERS = Table(
    "quantgate_owners",
    METADATA,
    Column("id", String(200), primary_key=True),
    Column("host", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("joined_at", Float, nullable=False),
    Column("beat", Integer, nullable=False),
    Column("beat_at", Float, nullable=False),
)

# Replicas as their supervisors published them, without load and keys.
REPLICAS = Table(
    "quantgate_replicas",
    METADATA,
    Column("owner", String(200), primary_key=True),
    Column("id", String(200), primary_key=True),
    Column("variant", String(200), nullable=False),
    Column("precision", String(40), nullable=False),
    Column("url", String(500), nullable=False),
    Column("served_name", String(200), nullable=False),
    Column("max_model_len_tokens", Integer),
    Column("think", String(20)),
    Column("think_token", Integer),
    Column("tools", Boolean),
    Column("adapters", Text, nullable=False, server_default=""),  # names, separated by commas
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("pid", Integer),
    Column("revision", Integer, nullable=False),
)

# Gateway workers, and the revision that each acts on.
FOLLOWERS = Table(
    "quantgate_followers",
    METADATA,
    Column("id", String(200), primary_key=True),
    Column("seen", Integer, nullable=False),
    Column("beat", Integer, nullable=False),
    Column("beat_at", Float, nullable=False),
)

# Rollouts. `plan` and `state` are JSON of gateway.rollout; `version` counts the changes of the row.
ROLLOUTS = Table(
    "quantgate_rollouts",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("alias", String(200), nullable=False),
    Column("active", Boolean, nullable=False),
    Column("phase", String(20), nullable=False),
    Column("version", Integer, nullable=False),
    Column("plan", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("started_by", String(200), nullable=False),
    Column("started_at", Float, nullable=False),
    # One at a time per alias.
    Index(
        "quantgate_one_active_rollout",
        "alias",
        unique=True,
        sqlite_where=text("active = 1"),
        postgresql_where=text("active"),
    ),
)

# Revisions of an alias: never changed, only added. `document` is JSON: ladders, weight, step.
ALIAS_REVISIONS = Table(
    "quantgate_alias_revisions",
    METADATA,
    Column("alias", String(200), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("rollout", String(40)),
    Column("document", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
)

# The audit log: never changed, only added, but for `hooked`: its hooks have run.
ROLLOUT_EVENTS = Table(
    "quantgate_rollout_events",
    METADATA,
    Column("seq", Integer, primary_key=True),
    Column("rollout", String(40)),
    Column("alias", String(200), nullable=False),
    Column("at", Float, nullable=False),
    Column("by", String(200), nullable=False),
    Column("event", String(40), nullable=False),
    Column("phase", String(20), nullable=False),
    Column("why", Text, nullable=False),
    Column("figures", Text, nullable=False),
    Column("hooked", Boolean, nullable=False),
    Index("quantgate_rollout_events_of", "alias", "seq"),
)

# Who drives the rollout of an alias. `fence` grows with every change of the holder: writes with an older one are
# refused.
ROLLOUT_LEASES = Table(
    "quantgate_rollout_leases",
    METADATA,
    Column("alias", String(200), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
)

# Evidence: what a gateway worker saw in a block of 10 s, of the conversations that were drawn in one step.
ROLLOUT_BLOCKS = Table(
    "quantgate_rollout_blocks",
    METADATA,
    Column("seq", Integer, primary_key=True),
    Column("rollout", String(40), nullable=False),
    Column("worker", String(200), nullable=False),
    Column("block", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("document", Text, nullable=False),
    Index("quantgate_rollout_blocks_once", "rollout", "worker", "block", unique=True),
)

# Which arm conversations were drawn to; `conversation` is a hash. Workers learn of the draws of others from here.
ROLLOUT_DRAWS = Table(
    "quantgate_rollout_draws",
    METADATA,
    Column("seq", Integer, primary_key=True),
    Column("rollout", String(40), nullable=False),
    Column("conversation", BigInteger, nullable=False),
    Column("arm", String(10), nullable=False),
    Column("step", Integer, nullable=False),
    Index("quantgate_rollout_draws_once", "rollout", "conversation", unique=True),
)

# Replicas that rollouts want beside, or instead of, the configured ones: `run` like those of another variant, or not.
REPLICA_DEMANDS = Table(
    "quantgate_replica_demands",
    METADATA,
    Column("variant", String(200), primary_key=True),
    Column("modeled_on", String(200), nullable=False),
    Column("run", Boolean, nullable=False),
    Column("rollout", String(40), nullable=False),
)

# What the requests of an hour used, added up over all gateway workers. `hour` counts hours since 1970 (UTC); text that
# does not apply is "none", as in the access log.
USAGE = Table(
    "quantgate_usage",
    METADATA,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("key", String(200), primary_key=True),
    Column("alias", String(300), primary_key=True),
    Column("precision", String(40), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("external_cost_usd", Float, nullable=False),
)

# The last batch of usage that each gateway worker has written: a batch that is written again, because its outcome was
# unknown, is not added twice.
USAGE_BATCHES = Table(
    "quantgate_usage_batches",
    METADATA,
    Column("worker", String(200), primary_key=True),
    Column("batch", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

# API keys, if gateway.keys is `database`. `document` is JSON of gateway.keys: digests and limits, never a key.
KEYS = Table(
    "quantgate_keys",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("document", Text, nullable=False),
)

# Gateway workers that share the limits of keys. `batch` is the last of their reports that was charged; `expires_at` is
# on the clock of the database.
QUOTA_WORKERS = Table(
    "quantgate_quota_workers",
    METADATA,
    Column("worker", String(200), primary_key=True),
    Column("batch", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
)

# Limited keys that were used in the last minutes. `document` is JSON of gateway.quota_shares: levels of the limits, and
# what each worker holds of them.
QUOTAS = Table(
    "quantgate_quotas",
    METADATA,
    Column("key", String(200), primary_key=True),
    Column("document", Text, nullable=False),
)
