"""Run by Alembic: migrates the connection that `upgrade` was given."""

from alembic import context

from evomerge.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,  # the caller's transaction holds everything
)
context.run_migrations()
