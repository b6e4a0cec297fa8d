"""LoRA adapters of replicas; rollouts: states, revisions of aliases, audit log, leases, evidence, draws, demands."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Add the tables, and the counter of their changes."""
    op.add_column("quantgate_state", sa.Column("rollout_revision", sa.Integer, nullable=False, server_default="0"))
    # Names of LoRA adapters, separated by commas.
    op.add_column("quantgate_replicas", sa.Column("adapters", sa.Text, nullable=False, server_default=""))
    _create_records()
    _create_evidence()
    op.execute("UPDATE quantgate_state SET version = 3")


def _create_records() -> None:
    op.create_table(
        "quantgate_rollouts",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("alias", sa.String(200), nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("phase", sa.String(20), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("started_by", sa.String(200), nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
    )
    op.create_index(
        "quantgate_one_active_rollout",
        "quantgate_rollouts",
        ["alias"],
        unique=True,
        sqlite_where=sa.text("active = 1"),
        postgresql_where=sa.text("active"),
    )
    op.create_table(
        "quantgate_alias_revisions",
        sa.Column("alias", sa.String(200), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("rollout", sa.String(40)),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "quantgate_rollout_events",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("rollout", sa.String(40)),
        sa.Column("alias", sa.String(200), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("phase", sa.String(20), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
        sa.Column("hooked", sa.Boolean, nullable=False),
    )
    op.create_index("quantgate_rollout_events_of", "quantgate_rollout_events", ["alias", "seq"])
    op.create_table(
        "quantgate_rollout_leases",
        sa.Column("alias", sa.String(200), primary_key=True),
        sa.Column("holder", sa.String(200), nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )


def _create_evidence() -> None:
    op.create_table(
        "quantgate_rollout_blocks",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("rollout", sa.String(40), nullable=False),
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("block", sa.Integer, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_index(
        "quantgate_rollout_blocks_once", "quantgate_rollout_blocks", ["rollout", "worker", "block"], unique=True
    )
    op.create_table(
        "quantgate_rollout_draws",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("rollout", sa.String(40), nullable=False),
        sa.Column("conversation", sa.BigInteger, nullable=False),
        sa.Column("arm", sa.String(10), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
    )
    op.create_index("quantgate_rollout_draws_once", "quantgate_rollout_draws", ["rollout", "conversation"], unique=True)
    op.create_table(
        "quantgate_replica_demands",
        sa.Column("variant", sa.String(200), primary_key=True),
        sa.Column("modeled_on", sa.String(200), nullable=False),
        sa.Column("run", sa.Boolean, nullable=False),
        sa.Column("rollout", sa.String(40), nullable=False),
    )
