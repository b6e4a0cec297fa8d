"""Usage by hour, API key, alias and precision."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """Add the tables."""
    op.create_table(
        "quantgate_usage",
        sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("alias", sa.String(300), primary_key=True),
        sa.Column("precision", sa.String(40), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("external_cost_usd", sa.Float, nullable=False),
    )
    op.create_table(
        "quantgate_usage_batches",
        sa.Column("worker", sa.String(200), primary_key=True),
        sa.Column("batch", sa.Integer, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.execute("UPDATE quantgate_state SET version = 4")
