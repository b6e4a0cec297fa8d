"""Supervisors, their replicas, and the gateways that follow them."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "quantgate_state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_table(
        "quantgate_owners",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("host", sa.String(200), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("joined_at", sa.Float, nullable=False),
        sa.Column("beat", sa.Integer, nullable=False),
        sa.Column("beat_at", sa.Float, nullable=False),
    )
    op.create_table(
        "quantgate_replicas",
        sa.Column("owner", sa.String(200), primary_key=True),
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("variant", sa.String(200), nullable=False),
        sa.Column("precision", sa.String(40), nullable=False),
        sa.Column("url", sa.String(500), nullable=False),
        sa.Column("served_name", sa.String(200), nullable=False),
        sa.Column("max_model_len_tokens", sa.Integer),
        sa.Column("think", sa.String(20)),
        sa.Column("think_token", sa.Integer),
        sa.Column("tools", sa.Boolean),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_table(
        "quantgate_followers",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("seen", sa.Integer, nullable=False),
        sa.Column("beat", sa.Integer, nullable=False),
        sa.Column("beat_at", sa.Float, nullable=False),
    )
