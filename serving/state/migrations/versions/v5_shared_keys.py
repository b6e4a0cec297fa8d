"""API keys, and limits that gateways share."""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """Add the tables, and the count of changes of keys."""
    op.add_column("quantgate_state", sa.Column("key_revision", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "quantgate_keys",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_table(
        "quantgate_quota_workers",
        sa.Column("worker", sa.String(200), primary_key=True),
        sa.Column("batch", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_table(
        "quantgate_quotas",
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.execute("UPDATE quantgate_state SET version = 5")
