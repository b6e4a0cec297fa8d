"""Tables of the state database. A change of them needs a new SCHEMA_VERSION."""

from sqlalchemy import Boolean, Column, Float, Integer, MetaData, String, Table, Text

SCHEMA_VERSION = 3

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
    Column("adapters", Text, nullable=False),  # names, separated by commas
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
