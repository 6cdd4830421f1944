"""The equations on scalars and on arrays; nothing here knows of trees, state or storage."""
