"""Alembic's entry: runs on the connection that `app.store.database.migrate` hands over."""

from alembic import context

from app.store.tables import metadata

# SQLite can create tables within a transaction: a start that is cut short leaves nothing half made.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
